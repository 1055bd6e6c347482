//! What a gradient's bits may not depend on: threads, the rest of the batch, strides, what a row may not see;
//! and where a NaN or an infinity may arrive.

mod support;

use foveal::mask::{Pattern, Site};
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::reference::{Derivatives, Options};
use foveal::{
    Attention, Cpu, Element, Error, Level, Mask, Shape, Strides, Tensor, TensorMut, TensorRef,
    Threads, Workspace,
};
use half::bf16;
use std::num::NonZeroUsize;
use support::backward::{Call, Result, Wanted};
use support::sizes::Sizes;
use support::{Random, cpus, tokens};

const SIZES: Sizes =
    Sizes { batch: 1, queries: 700, keys: 600, heads: 4, kv_heads: 1, dim: 24, value_dim: 40 };

fn cpu(level: Level, threads: usize) -> Cpu {
    Cpu { level, threads: Threads::at_most(NonZeroUsize::new(threads).unwrap()) }
}

/// One key/value head: threads share its chunks; several: each thread has heads of its own.
fn all_thread_counts_agree<E: Element + PartialEq>() {
    for (batch, heads, kv_heads) in [(1, 4, 1), (1, 4, 4), (3, 4, 2)] {
        let call = Call::<E>::random(Sizes { batch, heads, kv_heads, ..SIZES }, 1);
        for level in Level::available() {
            for mask in [Mask::causal(), Mask::window(90), Mask::band(Some(300), Some(9))] {
                let attention = Attention::new().mask(mask.clone());
                let one = call.run(&attention.clone().cpu(cpu(level, 1)));
                for threads in [2, 3, 5] {
                    let many = call.run(&attention.clone().cpu(cpu(level, threads)));
                    assert!(many == one, "{level} {mask} {kv_heads} {threads} {}", E::DTYPE);
                }
            }
        }
    }
}

#[test]
fn threads() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
    pool.install(all_thread_counts_agree::<f32>);
    pool.install(all_thread_counts_agree::<bf16>);
}

#[test]
fn the_rest_of_the_batch_and_other_heads() {
    let sizes = Sizes { batch: 3, heads: 4, kv_heads: 2, ..SIZES };
    let call = Call::<f32>::random(sizes, 2);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let together = call.run(&attention);
        for batch in 0..3 {
            let part = |x: &Tensor<f32>| {
                let len = x.as_slice().len() / 3;
                let shape = Shape { batch: 1, ..x.shape() };
                Tensor::from_vec(x.as_slice()[batch * len..][..len].to_vec(), shape).unwrap()
            };
            let alone = Call {
                q: part(&call.q),
                k: part(&call.k),
                v: part(&call.v),
                d_out: part(&call.d_out),
                d_lse: call.d_lse.as_ref().map(part),
            };
            let alone = alone.run(&attention);
            let own = |x: &[f32]| x[batch * x.len() / 3..(batch + 1) * x.len() / 3].to_vec();
            assert_eq!(alone.d_q, own(&together.d_q), "{}", cpu.level);
            assert_eq!(alone.d_k, own(&together.d_k), "{}", cpu.level);
            assert_eq!(alone.d_v, own(&together.d_v), "{}", cpu.level);
        }
    }
}

/// The same numbers as `[batch, heads, seq, dim]` with gaps between rows.
fn scattered<E: Element>(x: &Tensor<E>) -> (Vec<E>, Strides) {
    let Shape { batch, seq, heads, dim } = x.shape();
    let row = dim + 3;
    let strides = Strides { batch: heads * seq * row, heads: seq * row, seq: row };
    let mut data = vec![E::from_f32(f32::NAN); batch * heads * seq * row];
    for (n, from) in x.as_slice().chunks_exact(dim).enumerate() {
        let (h, s, b) = (n % heads, n / heads % seq, n / heads / seq);
        data[b * strides.batch + h * strides.heads + s * row..][..dim].copy_from_slice(from);
    }
    (data, strides)
}

fn gathered<E: Element>(data: &[E], strides: Strides, shape: Shape) -> Vec<E> {
    let view = TensorRef::from_strides(data, shape, strides).unwrap();
    let rows = (0..shape.batch)
        .flat_map(|b| (0..shape.seq).flat_map(move |s| (0..shape.heads).map(move |h| (b, s, h))));
    rows.flat_map(|(b, s, h)| view.row(b, s, h).to_vec()).collect()
}

#[test]
fn strides() {
    let call = Call::<f32>::random(Sizes { batch: 2, heads: 4, kv_heads: 2, ..SIZES }, 3);
    let attention = Attention::new().mask(Mask::causal());
    let expected = call.run(&attention);
    let forward = attention.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
    let plan = attention.plan(call.q.shape(), call.k.shape(), call.v.shape()).unwrap();
    let inputs = [&call.q, &call.k, &call.v, &forward.out, &call.d_out];
    let inputs = inputs.map(|x| (scattered(x), x.shape()));
    let [q, k, v, out, d_out] = inputs
        .each_ref()
        .map(|((data, strides), shape)| TensorRef::from_strides(data, *shape, *strides).unwrap());
    let mut gradients = [&call.q, &call.k, &call.v].map(|x| (scattered(x), x.shape()));
    let [d_q, d_k, d_v] = gradients.each_mut().map(|((data, strides), shape)| {
        data.fill(f32::NAN);
        TensorMut::from_strides(data, *shape, *strides).unwrap()
    });
    plan.backward(
        Inputs { q, k, v },
        Saved { out, lse: forward.lse.view() },
        Upstream { d_out, d_lse: call.d_lse.as_ref().map(Tensor::view) },
        Gradients { d_q, d_k, d_v, terms: TermGradients::default() },
        &mut Workspace::for_backward::<f32>(&plan),
    )
    .unwrap();
    let [d_q, d_k, d_v] = gradients.map(|((data, strides), shape)| gathered(&data, strides, shape));
    assert!(d_q == expected.d_q && d_k == expected.d_k && d_v == expected.d_v);
}

/// Replaces the rows of some tokens.
fn spoiled(x: &Tensor<f32>, seq: std::ops::Range<usize>, with: f32) -> Tensor<f32> {
    let mut x = x.clone();
    let Shape { batch, heads, .. } = x.shape();
    let mut view = x.view_mut();
    for (b, s) in (0..batch).flat_map(|b| seq.clone().map(move |s| (b, s))) {
        (0..heads).for_each(|h| view.row_mut(b, s, h).fill(with));
    }
    x
}

const SQUARE: Sizes = Sizes { queries: 300, keys: 300, heads: 2, ..SIZES };

#[test]
fn finite_numbers_that_a_row_may_not_see() {
    let call = Call::<f32>::random(SQUARE, 4);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let clean = call.run(&attention);
        for first in [1, 6, 100, 255, 256, 299] {
            let later = Call {
                k: spoiled(&call.k, first..300, 1e4),
                v: spoiled(&call.v, first..300, 1e15),
                ..call.clone()
            };
            let got = later.run(&attention);
            let seen = first * SQUARE.heads * SQUARE.dim;
            assert!(got.d_q[..seen] == clean.d_q[..seen], "{} {first}", cpu.level);
        }
    }
}

/// Which numbers are not finite.
fn marks(x: &[f32]) -> Vec<bool> {
    x.iter().map(|x| !x.is_finite()).collect()
}

fn check_marks(what: &str, got: &Result<f32>, expected: &Derivatives) {
    for (name, got, expected) in got.beside(expected) {
        let wide: Vec<f32> = expected.iter().map(|&x| x as f32).collect();
        let differs = marks(&got).iter().zip(marks(&wide)).position(|(a, b)| *a != b);
        assert_eq!(differs, None, "{what}: {name}, number {differs:?}");
        let size = wide.iter().filter(|x| x.is_finite()).fold(1.0f32, |m, x| m.max(x.abs()));
        for (n, (g, e)) in got.iter().zip(&wide).enumerate().filter(|(_, (_, e))| e.is_finite()) {
            assert!((g - e).abs() <= 5e-6 * size, "{what}: {name}, number {n}: {g}, expected {e}");
        }
    }
}

#[test]
fn what_is_not_finite_goes_where_the_formulas_take_it() {
    let clean = Call::<f32>::random(Sizes { queries: 60, keys: 290, heads: 2, ..SIZES }, 5);
    for mask in [Mask::causal(), Mask::window(30)] {
        for with in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (rows, keys) = (20..22, 255..256);
            let per_row =
                |x: &Option<Tensor<f32>>| x.as_ref().map(|x| spoiled(x, rows.clone(), with));
            let calls = [
                ("Q", Call { q: spoiled(&clean.q, rows.clone(), with), ..clean.clone() }),
                ("K", Call { k: spoiled(&clean.k, keys.clone(), with), ..clean.clone() }),
                ("V", Call { v: spoiled(&clean.v, keys.clone(), with), ..clean.clone() }),
                ("dO", Call { d_out: spoiled(&clean.d_out, rows.clone(), with), ..clean.clone() }),
                ("dlse", Call { d_lse: per_row(&clean.d_lse), ..clean.clone() }),
            ];
            for (operand, call) in calls {
                let scale = 1.0 / (SIZES.dim as f64).sqrt();
                let expected = call.define(&Options::new(scale, &mask));
                for cpu in cpus() {
                    let got = call.run(&Attention::new().mask(mask.clone()).cpu(cpu));
                    let what = format!("{operand} {with} {mask} {}", cpu.level);
                    check_marks(&what, &got, &expected);
                    let marks = marks(&got.d_q);
                    assert!(marks.contains(&true), "{what}: it arrived nowhere");
                    assert!(marks.contains(&false), "{what}: it arrived everywhere");
                }
            }
        }
    }
}

/// Nothing but the last key, which is NaN, is hidden.
#[derive(Debug)]
struct NotLast(usize);

impl Pattern for NotLast {
    fn allows(&self, _: Site, _: isize, j: usize) -> bool {
        j + 1 < self.0
    }
}

#[test]
fn a_nan_that_nobody_sees_arrives_nowhere() {
    let clean = Call::<f32>::random(SQUARE, 6);
    let call = Call {
        k: spoiled(&clean.k, 299..300, f32::NAN),
        v: spoiled(&clean.v, 299..300, f32::INFINITY),
        ..clean.clone()
    };
    let mask = Mask::pattern(NotLast(300));
    let expected = clean.define(&Options::new(1.0 / (SIZES.dim as f64).sqrt(), &mask));
    for cpu in cpus() {
        let got = call.run(&Attention::new().mask(mask.clone()).cpu(cpu));
        check_marks(cpu.level.name(), &got, &expected);
        let last = |x: &[f32], width: usize| x[299 * width..].iter().all(|&x| x == 0.0);
        assert!(last(&got.d_k, SIZES.dim) && last(&got.d_v, SIZES.value_dim));
    }
}

#[test]
fn rows_that_see_nothing_have_no_gradient() {
    // 700 queries over 600 keys: the first 100 rows sit before all keys.
    let call = Call::<f32>::random(SIZES, 7);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let got = call.run(&attention);
        let dead = 100 * SIZES.heads * SIZES.dim;
        assert!(got.d_q[..dead].iter().all(|&x| x == 0.0), "{}", cpu.level);
        assert!(got.d_q[dead..].iter().any(|&x| x != 0.0));
        // And what comes from above them goes nowhere.
        let other = Call {
            d_out: spoiled(&call.d_out, 0..100, 7.0),
            d_lse: call.d_lse.as_ref().map(|d_lse| spoiled(d_lse, 0..100, 9.0)),
            ..call.clone()
        };
        assert!(other.run(&attention) == got, "{}", cpu.level);
    }
}

/// Runs a call whose parts the caller changes and returns what it refuses.
fn refused(change: impl FnOnce(&mut Parts)) -> Error {
    let mut random = Random::new(8);
    let q = Shape { batch: 1, seq: 5, heads: 4, dim: 8 };
    let k = Shape { seq: 7, heads: 2, ..q };
    let v = Shape { dim: 6, ..k };
    let out = Shape { dim: 6, ..q };
    let mut parts = Parts {
        inputs: [q, k, v, out, out].map(|shape| random.tensor(shape, 1.0)),
        per_row: [q.per_row(), q.per_row()].map(|shape| random.tensor(shape, 1.0)),
        gradients: [q, k, v].map(|shape| random.tensor(shape, 1.0)),
        d_bias: None,
        d_sinks: None,
        decode: false,
        workspace: None,
    };
    change(&mut parts);
    let before = parts.gradients.clone();
    let attention = Attention::new().softcap(3.0);
    let plan = match parts.decode {
        true => attention.plan_decode(q, k, v).unwrap(),
        false => attention.plan(q, k, v).unwrap(),
    };
    let mut workspace =
        parts.workspace.take().unwrap_or_else(|| Workspace::for_backward::<f32>(&plan));
    let [q, k, v, out, d_out] = parts.inputs.each_ref().map(Tensor::view);
    let [lse, d_lse] = parts.per_row.each_ref().map(Tensor::view);
    let [d_q, d_k, d_v] = parts.gradients.each_mut().map(Tensor::view_mut);
    let terms = TermGradients {
        d_bias: parts.d_bias.as_mut().map(Tensor::view_mut),
        d_sinks: parts.d_sinks.as_deref_mut(),
        ..TermGradients::default()
    };
    let error = plan.backward(
        Inputs { q, k, v },
        Saved { out, lse },
        Upstream { d_out, d_lse: Some(d_lse) },
        Gradients { d_q, d_k, d_v, terms },
        &mut workspace,
    );
    assert_eq!(before, parts.gradients, "something was written");
    error.unwrap_err()
}

/// The tensors of a call by what they are.
struct Parts {
    /// Q, K, V, O, dO.
    inputs: [Tensor<f32>; 5],
    /// The log-sum-exp and its gradient.
    per_row: [Tensor<f32>; 2],
    gradients: [Tensor<f32>; 3],
    d_bias: Option<Tensor<f32>>,
    d_sinks: Option<Vec<f32>>,
    decode: bool,
    workspace: Option<Workspace>,
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let longer = |x: &Tensor<f32>| {
        let shape = x.shape();
        Tensor::zeros(Shape { seq: shape.seq + 1, ..shape }).unwrap()
    };
    let is_shape = |error: Error| matches!(error, Error::ShapeMismatch { .. });
    for n in 0..5 {
        assert!(is_shape(refused(|parts| parts.inputs[n] = longer(&parts.inputs[n]))), "{n}");
    }
    for n in 0..2 {
        assert!(is_shape(refused(|parts| parts.per_row[n] = longer(&parts.per_row[n]))), "{n}");
    }
    for n in 0..3 {
        assert!(is_shape(refused(|parts| parts.gradients[n] = longer(&parts.gradients[n]))), "{n}");
    }
    assert_eq!(refused(|parts| parts.decode = true), Error::NoBackward);
    let error = refused(|parts| parts.workspace = Some(Workspace::new()));
    assert!(matches!(error, Error::WorkspaceTooSmall { .. }));
    let error = refused(|parts| parts.d_sinks = Some(vec![0.0; 4]));
    assert!(error.to_string().contains("softcap 3"), "{error}");
    let error = refused(|parts| parts.d_bias = Some(longer(&parts.inputs[0])));
    assert!(matches!(error, Error::InvalidParameter { .. }));
}

#[test]
fn gradients_of_terms_have_the_terms_shape() {
    let call = Call::<f32>::random(SQUARE, 9);
    let sinks = [0.5, 1.0];
    let attention = Attention::new().sinks(&sinks);
    let forward = attention.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
    let plan = attention.plan(call.q.shape(), call.k.shape(), call.v.shape()).unwrap();
    let [mut d_q, mut d_k, mut d_v] = [call.q.clone(), call.k.clone(), call.v.clone()];
    let mut d_sinks = [0.0; 3];
    let error = plan.backward(
        Inputs { q: call.q.view(), k: call.k.view(), v: call.v.view() },
        Saved { out: forward.out.view(), lse: forward.lse.view() },
        Upstream { d_out: call.d_out.view(), d_lse: None },
        Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            terms: TermGradients { d_sinks: Some(&mut d_sinks), ..TermGradients::default() },
        },
        &mut Workspace::for_backward::<f32>(&plan),
    );
    let expected = Error::LengthMismatch { what: "gradient of sinks", expected: 2, got: 3 };
    assert_eq!(error, Err(expected));
}

#[test]
fn a_prefix_of_the_rows_has_the_same_gradients() {
    // dQ of a row depends on nothing but the row and its keys; here the keys are cut with the rows.
    let call = Call::<f32>::random(SQUARE, 10);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let whole = call.run(&attention);
        for len in [1, 95, 256, 257] {
            let cut = |x: &Tensor<f32>| {
                let shape = Shape { seq: len, ..x.shape() };
                let view = tokens(x, 0..len);
                let rows = (0..len).flat_map(|s| (0..shape.heads).map(move |h| (s, h)));
                let data = rows.flat_map(|(s, h)| view.row(0, s, h).to_vec()).collect();
                Tensor::from_vec(data, shape).unwrap()
            };
            let part = Call {
                q: cut(&call.q),
                k: cut(&call.k),
                v: cut(&call.v),
                d_out: cut(&call.d_out),
                d_lse: call.d_lse.as_ref().map(cut),
            };
            let part = part.run(&attention);
            assert!(part.d_q == whole.d_q[..part.d_q.len()], "{} {len}", cpu.level);
        }
    }
}

#[test]
fn one_workspace_serves_several_calls() {
    let call = Call::<f32>::random(SQUARE, 11);
    let attention = Attention::new();
    let forward = attention.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
    let first = call.backward(&attention, &forward, Wanted::default());
    assert!(first == call.backward(&attention, &forward, Wanted::default()));
}
