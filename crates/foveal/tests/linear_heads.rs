//! Heads that go through a sequence together: each has the bits that it has alone, forward and backward, whether its rows
//! are read where they lie or gathered.

mod support;

use foveal::linear::{
    Delta, Linear, Recurrence, Retention, ScalarDecay, State, StateShape, VectorDecay,
};
use foveal::{Cpu, Level, Shape, Tensor, Threads};
use std::num::NonZeroUsize;
use support::Random;
use support::linear::{Call, Sizes};

const HEADS: usize = 6;

/// One head of a tensor, as a tensor.
fn head(x: &Tensor<f32>, h: usize) -> Tensor<f32> {
    let shape = x.shape();
    let rows = x.as_slice().chunks(shape.dim).skip(h).step_by(shape.heads);
    Tensor::from_vec(rows.flatten().copied().collect(), Shape { heads: 1, ..shape }).unwrap()
}

/// One head of a state.
fn own(state: &State, h: usize) -> State {
    let shape = state.shape();
    let sums = state.key_sums();
    let mut one =
        State::zeros(StateShape { heads: 1, ..shape }, usize::from(!sums.is_empty())).unwrap();
    let size = shape.key_dim * shape.value_dim;
    let matrices = state.matrices().chunks(size).skip(h).step_by(shape.heads).flatten();
    one.matrices_mut().iter_mut().zip(matrices).for_each(|(to, from)| *to = *from);
    let sums = sums.chunks(shape.key_dim).skip(h).step_by(shape.heads).flatten();
    one.key_sums_mut().iter_mut().zip(sums).for_each(|(to, from)| *to = *from);
    one
}

fn alone(call: &Call<f32>, h: usize) -> Call<f32> {
    Call {
        q: head(&call.q, h),
        k: head(&call.k, h),
        v: head(&call.v, h),
        log_decay: call.log_decay.as_ref().map(|x| head(x, h)),
        beta: call.beta.as_ref().map(|x| head(x, h)),
        present: call.present.clone(),
        cuts: None,
        d_out: head(&call.d_out, h),
        initial: own(&call.initial, h),
        d_final: own(&call.d_final, h),
    }
}

/// Calls on all heads against calls on one; `one` is the mechanism of a head alone.
fn company_changes_no_bit<R: Recurrence + Clone>(name: &str, all: &R, one: impl Fn(usize) -> R) {
    // Rows where they lie, and gathered since they have to be padded; three blocks.
    for (key_dim, value_dim) in [(16, 48), (5, 7)] {
        let sizes = Sizes { batch: 2, seq: 70, groups: HEADS, heads: HEADS, key_dim, value_dim };
        let mut random = Random::new(1);
        let mut call: Call<f32> = Call::random(all, sizes, &mut random);
        for absent in [false, true] {
            call.present = absent.then(|| (0..140).map(|t| t % 9 != 3).collect());
            for (level, threads) in Level::available().flat_map(|level| [(level, 1), (level, 4)]) {
                let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
                let cpu = Cpu { level, threads };
                let what = format!("{name} {level} {key_dim} {absent}");
                let (out, reads, state) = call.forward(all, cpu);
                let (gradients, d_state) = call.backward(all, cpu);
                for h in 0..HEADS {
                    let call = alone(&call, h);
                    let (own_out, own_reads, own_state) = call.forward(&one(h), cpu);
                    assert_eq!(head(&out, h), own_out, "{what} {h}");
                    if all.form().beta {
                        assert_eq!(head(&reads, h), own_reads, "{what} {h}");
                    }
                    assert_eq!(own(&state, h), own_state, "{what} {h}");
                    let (own_gradients, own_d_state) = call.backward(&one(h), cpu);
                    assert_eq!(head(&gradients.d_q, h), own_gradients.d_q, "{what} {h}");
                    assert_eq!(head(&gradients.d_k, h), own_gradients.d_k, "{what} {h}");
                    assert_eq!(head(&gradients.d_v, h), own_gradients.d_v, "{what} {h}");
                    let gate = |x: &Option<Tensor<f32>>| x.as_ref().map(|x| head(x, h));
                    assert_eq!(gate(&gradients.d_log_decay), own_gradients.d_log_decay, "{what}");
                    assert_eq!(gate(&gradients.d_beta), own_gradients.d_beta, "{what} {h}");
                    assert_eq!(own(&d_state, h), own_d_state, "{what} {h}");
                }
            }
        }
    }
}

#[test]
fn a_head_has_the_bits_that_it_has_alone() {
    company_changes_no_bit("linear", &Linear::new(), |_| Linear::new());
    let decays: Vec<f32> = (0..HEADS).map(|h| 1.0 - 0.1 * h as f32).collect();
    let one = |h: usize| Retention::new(1).decays(vec![decays[h]]);
    company_changes_no_bit("retention", &Retention::new(HEADS).decays(decays.clone()), one);
    company_changes_no_bit("scalar decay", &ScalarDecay::new(), |_| ScalarDecay::new());
    company_changes_no_bit("gla", &VectorDecay::new(), |_| VectorDecay::new());
    company_changes_no_bit("delta", &Delta::new(), |_| Delta::new());
    company_changes_no_bit("gated delta", &Delta::gated(), |_| Delta::gated());
}
