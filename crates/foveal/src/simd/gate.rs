//! Kernels of gates: sigmoids, decays, and gradients of products with SiLU.

use super::nn::{load, store};
use super::{Simd, dispatch, math};

dispatch! {
    /// `x = factor · sigmoid(x)`.
    pub(crate) fn sigmoid(factor: f32, x: &mut [f32]) = sigmoid_kernel
}

#[inline(always)]
fn sigmoid_kernel<S: Simd>(s: S, factor: f32, x: &mut [f32]) {
    for at in (0..x.len()).step_by(S::LANES) {
        let y = math::sigmoid(s, load(s, x, at));
        store(s, x, at, s.mul(y, s.splat(factor)));
    }
}

dispatch! {
    /// `d = d · factor · σ(x) (1 − σ(x))`; both have the same length.
    pub(crate) fn sigmoid_backward(factor: f32, x: &[f32], d: &mut [f32]) = sigmoid_backward_kernel
}

#[inline(always)]
fn sigmoid_backward_kernel<S: Simd>(s: S, factor: f32, x: &[f32], d: &mut [f32]) {
    for at in (0..d.len()).step_by(S::LANES) {
        let x = load(s, x, at);
        // 1 − σ(x) = σ(−x) keeps its digits.
        let both = s.mul(math::sigmoid(s, x), math::sigmoid(s, s.sub(s.splat(0.0), x)));
        store(s, d, at, s.mul(load(s, d, at), s.mul(both, s.splat(factor))));
    }
}

dispatch! {
    /// `x = factor · ln σ(x)`.
    pub(crate) fn log_sigmoid(factor: f32, x: &mut [f32]) = log_sigmoid_kernel
}

#[inline(always)]
fn log_sigmoid_kernel<S: Simd>(s: S, factor: f32, x: &mut [f32]) {
    for at in (0..x.len()).step_by(S::LANES) {
        let below = math::softplus(s, s.sub(s.splat(0.0), load(s, x, at)));
        store(s, x, at, s.mul(below, s.splat(-factor)));
    }
}

dispatch! {
    /// `d = d · factor · σ(−x)`; both have the same length.
    pub(crate) fn log_sigmoid_backward(factor: f32, x: &[f32], d: &mut [f32]) = log_sigmoid_backward_kernel
}

#[inline(always)]
fn log_sigmoid_backward_kernel<S: Simd>(s: S, factor: f32, x: &[f32], d: &mut [f32]) {
    for at in (0..d.len()).step_by(S::LANES) {
        let slope = math::sigmoid(s, s.sub(s.splat(0.0), load(s, x, at)));
        store(s, d, at, s.mul(load(s, d, at), s.mul(slope, s.splat(factor))));
    }
}

dispatch! {
    /// `x = −exp(a_log) · softplus(x + bias)`; all have the same length.
    pub(crate) fn decay(a_log: &[f32], bias: &[f32], x: &mut [f32]) = decay_kernel
}

#[inline(always)]
fn decay_kernel<S: Simd>(s: S, a_log: &[f32], bias: &[f32], x: &mut [f32]) {
    for at in (0..x.len()).step_by(S::LANES) {
        let y = math::softplus(s, s.add(load(s, x, at), load(s, bias, at)));
        let rate = math::exp(s, load(s, a_log, at));
        store(s, x, at, s.mul(s.sub(s.splat(0.0), rate), y));
    }
}

/// Where gradients of parameters are added; empty for none.
#[derive(Debug)]
pub(crate) struct DecaySums<'a> {
    pub(crate) d_a_log: &'a mut [f32],
    pub(crate) d_bias: &'a mut [f32],
}

dispatch! {
    /// One row of the gradients of [`decay`]: `d` becomes that of `x`.
    pub(crate) fn decay_backward(a_log: &[f32], bias: &[f32], x: &[f32], d: &mut [f32], sums: DecaySums<'_>) = decay_backward_kernel
}

#[inline(always)]
fn decay_backward_kernel<S: Simd>(
    s: S,
    a_log: &[f32],
    bias: &[f32],
    x: &[f32],
    d: &mut [f32],
    sums: DecaySums<'_>,
) {
    let DecaySums { d_a_log, d_bias } = sums;
    for at in (0..d.len()).step_by(S::LANES) {
        let x = s.add(load(s, x, at), load(s, bias, at));
        let rate = s.sub(s.splat(0.0), math::exp(s, load(s, a_log, at)));
        let d_y = s.mul(load(s, d, at), rate);
        let d_x = s.mul(d_y, math::sigmoid(s, x));
        store(s, d, at, d_x);
        if !d_a_log.is_empty() {
            store(s, d_a_log, at, s.fma(d_y, math::softplus(s, x), load(s, d_a_log, at)));
        }
        if !d_bias.is_empty() {
            store(s, d_bias, at, s.add(load(s, d_bias, at), d_x));
        }
    }
}

dispatch! {
    /// `x = x · silu(gate)`; both have the same length.
    pub(crate) fn multiply_silu(x: &mut [f32], gate: &[f32]) = multiply_silu_kernel
}

#[inline(always)]
fn multiply_silu_kernel<S: Simd>(s: S, x: &mut [f32], gate: &[f32]) {
    for at in (0..x.len()).step_by(S::LANES) {
        let g = load(s, gate, at);
        store(s, x, at, s.mul(load(s, x, at), s.mul(g, math::sigmoid(s, g))));
    }
}

dispatch! {
    /// The gradients of `up · silu(gate)`: `up` becomes that of the gate, `d` that of `up`. All have the same length.
    pub(crate) fn silu_backward(gate: &[f32], up: &mut [f32], d: &mut [f32]) = silu_backward_kernel
}

#[inline(always)]
fn silu_backward_kernel<S: Simd>(s: S, gate: &[f32], up: &mut [f32], d: &mut [f32]) {
    for at in (0..d.len()).step_by(S::LANES) {
        let (g, d_y) = (load(s, gate, at), load(s, d, at));
        let d_silu = s.mul(d_y, load(s, up, at));
        store(s, up, at, s.mul(d_silu, math::silu_slope(s, g)));
        store(s, d, at, s.mul(d_y, s.mul(g, math::sigmoid(s, g))));
    }
}
