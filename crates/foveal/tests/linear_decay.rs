//! States that forget: what decays for long stays among quick numbers; delta rules overwrite; a long stream through one
//! head.

mod support;

use foveal::linear::reference::{Sequences, States, forward};
use foveal::linear::{
    Delta, Recurrence, Recurrent, Retention, ScalarDecay, State, Tokens, VectorDecay,
};
use foveal::reference::Input;
use foveal::{Cpu, Scale, Shape, Tensor};
use support::linear::{Call, Sizes};
use support::{Random, cpus, error};

fn filled(shape: Shape, x: f32) -> Tensor<f32> {
    Tensor::from_vec(vec![x; shape.checked_len().unwrap()], shape).unwrap()
}

/// Decays by e^log for `seq` tokens that write nothing, from random states: states and their gradients.
fn forgotten<R: Recurrence + Clone>(mechanism: &R, seq: usize, log: f32, cpu: Cpu) -> [State; 2] {
    let sizes = Sizes { batch: 1, seq, groups: 2, heads: 2, key_dim: 7, value_dim: 18 };
    let mut call: Call<f32> = Call::random(mechanism, sizes, &mut Random::new(1));
    for x in [&mut call.k, &mut call.v, &mut call.q, &mut call.d_out] {
        *x = filled(x.shape(), 0.0);
    }
    if let Some(log_decay) = &mut call.log_decay {
        *log_decay = filled(log_decay.shape(), log);
    }
    let (_, _, state) = call.forward(mechanism, cpu);
    [state, call.backward(mechanism, cpu).1]
}

fn never_subnormal<R: Recurrence + Clone>(name: &str, mechanism: &R, log: f32) {
    for cpu in cpus() {
        // Without the rule, numbers would lie below 2⁻¹²⁶ from about the 90 / −log-th token on, those near 0 for ever.
        for seq in [30, 700, 4000] {
            for state in forgotten(mechanism, seq, log, cpu) {
                let what = format!("{name} {} {seq} tokens", cpu.level);
                let numbers = state.matrices();
                assert!(numbers.iter().all(|x| x.is_normal()), "{what}: a subnormal number");
                let settled = (2f64.powi(-100) / (1.0 - f64::from(log).exp())) as f32;
                if seq == 4000 {
                    let near = |x: &f32| (x / settled - 1.0).abs() < 1e-4;
                    assert!(numbers.iter().all(near), "{what}: {:e}", numbers[0]);
                }
            }
        }
    }
}

#[test]
fn what_decays_for_long_settles_above_subnormal_numbers() {
    never_subnormal("scalar decay", &ScalarDecay::new(), -0.2);
    never_subnormal("gla", &VectorDecay::new(), -0.2);
    never_subnormal("gated delta", &Delta::gated(), -0.2);
    never_subnormal("scalar decay", &ScalarDecay::new(), -700.0);
    let decays = vec![(-0.2f32).exp(); 2];
    never_subnormal("retention", &Retention::new(2).decays(decays), -0.2);
}

#[test]
fn a_decay_of_one_keeps_every_bit_of_numbers_that_count() {
    let mechanism = ScalarDecay::new();
    let sizes = Sizes { batch: 1, seq: 4000, groups: 2, heads: 2, key_dim: 7, value_dim: 18 };
    let mut call: Call<f32> = Call::random(&mechanism, sizes, &mut Random::new(1));
    call.v = filled(call.v.shape(), 0.0);
    call.log_decay = call.log_decay.map(|x| filled(x.shape(), 0.0));
    for cpu in cpus() {
        let (_, _, state) = call.forward(&mechanism, cpu);
        assert_eq!(state, call.initial, "{}", cpu.level);
    }
}

/// `count` unit keys of `dim` numbers, orthogonal: rows of a Hadamard matrix.
fn keys(count: usize, dim: usize) -> Vec<Vec<f32>> {
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let length = (dim as f32).sqrt();
    (0..count).map(|i| (0..dim).map(|j| sign(i, j) / length).collect()).collect()
}

/// A pair, and which of its values is written, if any.
type Access = (usize, Option<usize>);

/// An associative memory: pairs are written, some of them again with other values, and all are read. The largest error of
/// what is read, relative to the values that were written last and first.
fn memory(mechanism: Delta, cpu: Cpu) -> [f64; 2] {
    const PAIRS: usize = 24;
    const DIM: usize = 32;
    let mut random = Random::new(2);
    let keys = keys(PAIRS, DIM);
    let mut value = || -> Vec<f32> { (0..DIM).map(|_| random.number()).collect() };
    let values: Vec<[Vec<f32>; 2]> = (0..PAIRS).map(|_| [value(), value()]).collect();
    // Every pair, then every third one with another value, then nothing but reads.
    let writes = (0..PAIRS).map(|n| (n, 0)).chain((0..PAIRS).step_by(3).map(|n| (n, 1)));
    let mut tokens: Vec<Access> = writes.map(|(n, m)| (n, Some(m))).collect();
    let written = tokens.len();
    tokens.extend((0..PAIRS).map(|n| (n, None)));
    let shape = Shape { batch: 1, seq: tokens.len(), heads: 1, dim: DIM };
    let rows = |row: &dyn Fn(&Access) -> Vec<f32>, shape| {
        Tensor::from_vec(tokens.iter().flat_map(row).collect(), shape).unwrap()
    };
    let k = rows(&|(n, _)| keys[*n].clone(), shape);
    let v = rows(&|(n, m)| m.map_or(vec![0.0; DIM], |m| values[*n][m].clone()), shape);
    let beta = rows(&|(_, m)| vec![f32::from(m.is_some())], shape.per_row());
    let keep = filled(shape.per_row(), 0.0);
    let recurrent = Recurrent::new(mechanism.scale(Scale::Value(1.0))).cpu(cpu);
    let mut call = Tokens::new(k.view(), k.view(), v.view()).beta(beta.view());
    if mechanism == Delta::gated() {
        call = call.log_decay(keep.view());
    }
    let out = recurrent.forward(&call, &mut recurrent.state(&call).unwrap()).unwrap();
    let read = out.as_slice()[written * DIM..].chunks(DIM);
    let mut errors = [0.0f64; 2];
    for (n, read) in read.enumerate() {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let last = usize::from(n % 3 == 0);
        errors[0] = errors[0].max(error(read, &wide(&values[n][last])));
        if last == 1 {
            errors[1] = errors[1].max(error(read, &wide(&values[n][0])));
        }
    }
    errors
}

#[test]
fn delta_rules_hold_pairs_and_overwrite_them() {
    for cpu in cpus() {
        for mechanism in [Delta::new(), Delta::gated()] {
            let [last, first] = memory(mechanism, cpu);
            assert!(last <= 1e-6, "{}: {last:e}", cpu.level);
            assert!(first > 0.1, "{}: {first:e}", cpu.level);
        }
    }
}

/// A million tokens through one head of 16 × 16 in constant memory, in pieces of 4000.
#[test]
fn a_long_stream_stays_close_to_f64() {
    const PIECE: usize = 4000;
    let cpu = cpus().last().unwrap();
    let mut random = Random::new(3);
    let shape = Shape { batch: 1, seq: PIECE, heads: 1, dim: 16 };
    let mechanism = Delta::gated();
    let recurrent = Recurrent::new(mechanism).cpu(cpu);
    let (mut state, mut wide): (Option<State>, Option<States>) = (None, None);
    let mut worst = 0.0f64;
    for piece in 0..250 {
        let [q, v]: [Tensor<f32>; 2] = [0; 2].map(|_| random.tensor(shape, 1.0));
        let mut keys = random.tensor::<f32>(shape, 1.0).into_vec();
        for key in keys.chunks_mut(16) {
            let length = key.iter().map(|x| x * x).sum::<f32>().sqrt();
            key.iter_mut().for_each(|x| *x /= length);
        }
        let k = Tensor::from_vec(keys, shape).unwrap();
        let gates = random.tensor::<f32>(shape.per_row(), 1.0).into_vec();
        // Strengths of 0 to 1, decays of e⁻²ᐧ¹⁰⁻³ to 1.
        let beta = gates.iter().map(|x| 0.5 + 0.5 * x).collect();
        let beta = Tensor::from_vec(beta, shape.per_row()).unwrap();
        let log_decay = gates.iter().map(|x| 1e-3 * (x - 1.0)).collect();
        let log_decay = Tensor::from_vec(log_decay, shape.per_row()).unwrap();
        let tokens =
            Tokens::new(q.view(), k.view(), v.view()).beta(beta.view()).log_decay(log_decay.view());
        let own = state.get_or_insert_with(|| recurrent.state(&tokens).unwrap());
        let out = recurrent.forward(&tokens, own).unwrap();
        let all = [&q, &k, &v, &log_decay, &beta]
            .map(|x| x.as_slice().iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        let input = |n: usize, shape| Input { data: &all[n], shape };
        let sequences = Sequences {
            q: input(0, shape),
            k: input(1, shape),
            v: input(2, shape),
            log_decay: Some(input(3, shape.per_row())),
            beta: Some(input(4, shape.per_row())),
            present: None,
            cuts: None,
        };
        let wide = wide.get_or_insert_with(|| States::zeros(own.shape(), 0));
        let expected = forward(&mechanism, &sequences, wide);
        worst = worst.max(error(out.as_slice(), &expected));
        assert!(worst <= 5e-6, "{} after {} tokens: {worst:e}", cpu.level, (piece + 1) * PIECE);
    }
}
