//! Kernels of an optimizer's step: one pass over parameters, gradients and both moments.

use super::nn::{load, store};
use super::{Simd, dispatch};

/// The numbers of a step, all factors ready.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors {
    /// What gradients are multiplied by.
    pub(crate) gradient: f32,
    /// 1 − β of both moments.
    pub(crate) fresh: [f32; 2],
    /// 1 − learning rate · decay.
    pub(crate) keep: f32,
    /// −learning rate / (1 − β₁ᵗ).
    pub(crate) rate: f32,
    /// 1 / √(1 − β₂ᵗ).
    pub(crate) root: f32,
    /// ε.
    pub(crate) epsilon: f32,
}

dispatch! {
    /// The step of AdamW; all slices have the same length.
    pub(crate) fn adamw(
        factors: Factors, parameters: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32],
    ) = adamw_kernel
}

#[inline(always)]
fn adamw_kernel<S: Simd>(
    s: S,
    factors: Factors,
    parameters: &mut [f32],
    gradients: &[f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    let len = parameters.len();
    assert!([gradients.len(), first.len(), second.len()] == [len; 3]);
    let scale = s.splat(factors.gradient);
    let fresh = factors.fresh.map(|x| s.splat(x));
    let (keep, rate) = (s.splat(factors.keep), s.splat(factors.rate));
    let (root, epsilon) = (s.splat(factors.root), s.splat(factors.epsilon));
    for at in (0..len).step_by(S::LANES) {
        let g = s.mul(load(s, gradients, at), scale);
        let m = load(s, first, at);
        let m = s.fma(fresh[0], s.sub(g, m), m);
        let v = load(s, second, at);
        let v = s.fma(fresh[1], s.sub(s.mul(g, g), v), v);
        let size = s.fma(s.sqrt(v), root, epsilon);
        let p = s.mul(load(s, parameters, at), keep);
        let p = s.fma(rate, s.div(m, size), p);
        store(s, first, at, m);
        store(s, second, at, v);
        store(s, parameters, at, p);
    }
}
