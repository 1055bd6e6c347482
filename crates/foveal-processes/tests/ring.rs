//! Attention over a shared sequence against the definition in f64 on the whole one, for each level, several numbers of
//! processes, and workspaces full of NaN.

use foveal::mask::Pattern;
use foveal::reference::{Derivatives, Input, Options, Partial, attention, attention_backward};
use foveal::testing::normal;
use foveal::{Cpu, Level, Mask, Shape, Tensor, Threads as Cores, Workspace, plan::Inputs};
use foveal_processes::{
    Error, Processes, RingAttention, RingGradients, RingResult, Share, Threads,
};

/// Queries, keys, values and the gradient of the output.
fn inputs(seq: usize) -> [Tensor<f32>; 4] {
    let shape = Shape { batch: 2, seq, heads: 4, dim: 16 };
    let shapes = [shape, Shape { heads: 2, ..shape }, Shape { heads: 2, dim: 24, ..shape }];
    let [q, k, v] = [0, 1, 2].map(|n| normal(shapes[n], n as u64).unwrap());
    let d_out = normal(Shape { dim: 24, ..shape }, 9).unwrap();
    [q, k, v, d_out]
}

fn wide(x: &Tensor<f32>) -> Vec<f64> {
    x.as_slice().iter().map(|&x| f64::from(x)).collect()
}

fn poisoned() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.poison();
    workspace
}

/// The definition on the whole sequence.
fn defined(of: &[Tensor<f32>; 4], causal: bool) -> (Partial, Derivatives) {
    let mask = if causal { Mask::causal() } else { Mask::full() };
    let mask: &dyn Pattern = &mask;
    let wide = of.each_ref().map(wide);
    let input = |n: usize| Input { data: &wide[n], shape: of[n].shape() };
    let all = [input(0), input(1), input(2)];
    let out = attention(all, 0.25, mask).unwrap();
    let no_lse = vec![0.0; out.lse.len()];
    let d_lse = Input { data: &no_lse, shape: of[0].shape().per_row() };
    let d = attention_backward(all, &Options::new(0.25, mask), [input(3), d_lse]).unwrap();
    (out, d)
}

/// Forward and backward as so many processes, put together.
fn shared(
    of: &[Tensor<f32>; 4],
    share: Share,
    causal: bool,
    cpu: Cpu,
) -> Vec<(RingResult, RingGradients)> {
    let all = Threads::run(share.count, |processes| -> Result<_, Error> {
        let rank = processes.rank();
        let mut own = vec![];
        for whole in of {
            own.push(share.of(whole.view(), rank)?);
        }
        let given = Inputs { q: own[0].view(), k: own[1].view(), v: own[2].view() };
        let ring = RingAttention::new(&processes).causal(causal).balanced(share.balanced).cpu(cpu);
        let result = ring.forward(given, &mut poisoned())?;
        let d = ring.backward(given, &result, own[3].view(), &mut poisoned())?;
        let whole = |x: &Tensor<f32>| share.gather(&processes, x);
        let result = RingResult { out: whole(&result.out)?, lse: whole(&result.lse)? };
        let (d_q, d_k, d_v) = (whole(&d.d_q)?, whole(&d.d_k)?, whole(&d.d_v)?);
        Ok((result, RingGradients { d_q, d_k, d_v }))
    });
    all.into_iter().map(Result::unwrap).collect()
}

fn close(what: &str, found: &Tensor<f32>, expected: &[f64]) {
    assert_eq!(found.as_slice().len(), expected.len());
    for (n, (&a, &b)) in found.as_slice().iter().zip(expected).enumerate() {
        assert!((f64::from(a) - b).abs() <= 2e-5 * (1.0 + b.abs()), "{what} {n}: {a} {b}");
    }
}

#[test]
fn a_shared_sequence_has_the_attention_and_gradients_of_the_whole() {
    let of = inputs(48);
    for causal in [true, false] {
        let (out, d) = defined(&of, causal);
        for level in Level::available() {
            for (count, balanced) in [(1, true), (2, true), (2, false), (3, true), (4, true)] {
                let cpu = Cpu { level, ..Cpu::detect().unwrap() };
                let share = Share { count, balanced };
                for (result, gradients) in shared(&of, share, causal, cpu) {
                    close("out", &result.out, &out.out);
                    close("lse", &result.lse, &out.lse);
                    close("d_q", &gradients.d_q, &d.d_q);
                    close("d_k", &gradients.d_k, &d.d_k);
                    close("d_v", &gradients.d_v, &d.d_v);
                }
            }
        }
    }
}

#[test]
fn gradients_are_those_of_small_differences() {
    let of = inputs(16);
    let (share, cpu) = (Share { count: 2, balanced: true }, Cpu::detect().unwrap());
    // The loss that has `d_out` as its gradient.
    let loss = |of: &[Tensor<f32>; 4]| -> f64 {
        let result = &shared(of, share, true, cpu)[0].0;
        wide(&result.out).iter().zip(wide(&of[3])).map(|(a, b)| a * b).sum()
    };
    let (_, d) = &shared(&of, share, true, cpu)[1];
    for (n, gradient) in [&d.d_q, &d.d_k, &d.d_v].into_iter().enumerate() {
        for at in (0..gradient.as_slice().len()).step_by(97) {
            let moved = |by: f32| {
                let mut of = of.clone();
                let (shape, mut numbers) = (of[n].shape(), of[n].clone().into_vec());
                numbers[at] += by;
                of[n] = Tensor::from_vec(numbers, shape).unwrap();
                loss(&of)
            };
            let difference = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            let found = f64::from(gradient.as_slice()[at]);
            assert!((found - difference).abs() < 2e-3, "{n} {at}: {found} {difference}");
        }
    }
}

#[test]
fn later_tokens_and_threads_change_no_bit() {
    let of = inputs(48);
    let share = Share { count: 3, balanced: true };
    let cpu = |threads: usize| Cpu {
        threads: Cores::at_most(threads.try_into().unwrap()),
        ..Cpu::detect().unwrap()
    };
    let before = shared(&of, share, true, cpu(1));
    assert!(before == shared(&of, share, true, cpu(3)), "threads");
    let mut later = of.clone();
    for (n, x) in later.iter_mut().enumerate().take(3) {
        let (mut view, shape) = (x.view_mut(), of[n].shape());
        for (batch, t) in (0..shape.batch).flat_map(|b| (20..shape.seq).map(move |t| (b, t))) {
            (0..shape.heads).for_each(|h| view.row_mut(batch, t, h).fill(f32::NAN));
        }
    }
    let after = shared(&later, share, true, cpu(1));
    let (a, b) = (before[0].0.out.view(), after[0].0.out.view());
    for (batch, t) in (0..2).flat_map(|b| (0..20).map(move |t| (b, t))) {
        (0..4).for_each(|h| assert_eq!(a.row(batch, t, h), b.row(batch, t, h), "{t}"));
    }
    assert!(b.row(0, 20, 0)[0].is_nan());
}

#[test]
fn what_does_not_fit_is_an_error_everywhere() {
    let [q, k, v, _] = inputs(48);
    let uneven = Share { count: 5, balanced: true }.of(q.view(), 0);
    assert!(matches!(uneven, Err(Error::Uneven { found: 48, multiple: 10, .. })));
    // The second process has a shorter share.
    let errors = Threads::run(2, |processes| {
        let share = Share { count: 2 + processes.rank(), balanced: true };
        let own = [&q, &k, &v].map(|x| share.of(x.view(), 0).unwrap());
        let given = Inputs { q: own[0].view(), k: own[1].view(), v: own[2].view() };
        RingAttention::new(&processes).forward(given, &mut Workspace::new()).unwrap_err()
    });
    for error in &errors {
        assert!(matches!(error, Error::Differs { .. }), "{error}");
    }
    let errors = Threads::run(2, |processes| {
        let given = Inputs { q: q.view(), k: k.view(), v: v.view() };
        let causal = processes.rank() == 0;
        let ring = RingAttention::new(&processes).causal(causal);
        ring.forward(given, &mut Workspace::new()).unwrap_err().to_string()
    });
    assert!(
        errors[1].contains("options of a ring") && errors[1].contains("process 0"),
        "{errors:?}"
    );
    let errors = Threads::run(2, |processes| {
        let k = k.view();
        let given = Inputs { q: q.view(), k, v: q.view() };
        RingAttention::new(&processes).forward(given, &mut Workspace::new()).unwrap_err()
    });
    assert!(matches!(errors[0], Error::Kernel(foveal::Error::ShapeMismatch { .. })));
}
