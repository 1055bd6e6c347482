//! Kernels over rows of activations: normalisation, gates, softmax, sums.

use super::{Simd, dispatch, math};

/// Numbers of a vector from `at` on, zeros beyond the end.
#[inline(always)]
pub(super) fn load<S: Simd>(s: S, x: &[f32], at: usize) -> S::F {
    let x = &x[at..];
    // SAFETY: at most as many numbers as `x` holds.
    unsafe {
        if x.len() >= S::LANES { s.load(x.as_ptr()) } else { s.load_part(x.as_ptr(), x.len()) }
    }
}

#[inline(always)]
pub(super) fn store<S: Simd>(s: S, x: &mut [f32], at: usize, value: S::F) {
    let x = &mut x[at..];
    // SAFETY: at most as many numbers as `x` holds.
    unsafe {
        if x.len() >= S::LANES {
            s.store(x.as_mut_ptr(), value);
        } else {
            s.store_part(x.as_mut_ptr(), value, x.len());
        }
    }
}

dispatch! {
    /// Σ x², in four sums of lanes.
    pub(crate) fn sum_squares(x: &[f32]) -> f32 = sum_squares_kernel
}

#[inline(always)]
fn sum_squares_kernel<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for block in (0..x.len()).step_by(4 * S::LANES) {
        for (u, sum) in sums.iter_mut().enumerate() {
            let at = block + u * S::LANES;
            if at < x.len() {
                let x = load(s, x, at);
                *sum = s.fma(x, x, *sum);
            }
        }
    }
    let [a, b, c, d] = sums;
    s.sum(s.add(s.add(a, b), s.add(c, d)))
}

dispatch! {
    /// `x = x * factor * weight`; both have the same length.
    pub(crate) fn scale_by(x: &mut [f32], factor: f32, weight: &[f32]) = scale_by_kernel
}

#[inline(always)]
fn scale_by_kernel<S: Simd>(s: S, x: &mut [f32], factor: f32, weight: &[f32]) {
    assert_eq!(x.len(), weight.len());
    let factor = s.splat(factor);
    for at in (0..x.len()).step_by(S::LANES) {
        let scaled = s.mul(load(s, x, at), factor);
        store(s, x, at, s.mul(scaled, load(s, weight, at)));
    }
}

dispatch! {
    /// `gate = silu(gate) * up`; both have the same length.
    pub(crate) fn silu_gate(gate: &mut [f32], up: &[f32]) = silu_gate_kernel
}

#[inline(always)]
fn silu_gate_kernel<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    for at in (0..gate.len()).step_by(S::LANES) {
        let g = load(s, gate, at);
        let silu = s.mul(g, math::sigmoid(s, g));
        store(s, gate, at, s.mul(silu, load(s, up, at)));
    }
}

/// ½ (1 + tanh z) = sigmoid(2 z), z = √(2/π) (g + 0.044715 g³).
const TWICE: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;

dispatch! {
    /// `gate = gelu(gate) * up`, GELU in its tanh form; both have the same length.
    pub(crate) fn gelu_gate(gate: &mut [f32], up: &[f32]) = gelu_gate_kernel
}

#[inline(always)]
fn gelu_gate_kernel<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    for at in (0..gate.len()).step_by(S::LANES) {
        let g = load(s, gate, at);
        let cubic = s.fma(s.mul(g, g), s.splat(TWICE * 0.044_715), s.splat(TWICE));
        let gelu = s.mul(g, math::sigmoid(s, s.mul(g, cubic)));
        store(s, gate, at, s.mul(gelu, load(s, up, at)));
    }
}

dispatch! {
    /// The gradients of `silu(gate) · up`, in place: of the gate, of `up`, and in place of `d` the product itself.
    pub(crate) fn silu_gate_gradient(gate: &mut [f32], up: &mut [f32], d: &mut [f32]) = silu_gate_gradient_kernel
}

#[inline(always)]
fn silu_gate_gradient_kernel<S: Simd>(s: S, gate: &mut [f32], up: &mut [f32], d: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == d.len());
    for at in (0..gate.len()).step_by(S::LANES) {
        let (g, u, d_h) = (load(s, gate, at), load(s, up, at), load(s, d, at));
        let sigmoid = math::sigmoid(s, g);
        let silu = s.mul(g, sigmoid);
        // σ + g σ (1 − σ).
        let slope = s.fma(silu, s.sub(s.splat(1.0), sigmoid), sigmoid);
        store(s, gate, at, s.mul(s.mul(d_h, u), slope));
        store(s, up, at, s.mul(d_h, silu));
        store(s, d, at, s.mul(silu, u));
    }
}

dispatch! {
    /// The gradients of `gelu(gate) · up`, in place: of the gate, of `up`, and in place of `d` the product itself.
    pub(crate) fn gelu_gate_gradient(gate: &mut [f32], up: &mut [f32], d: &mut [f32]) = gelu_gate_gradient_kernel
}

#[inline(always)]
fn gelu_gate_gradient_kernel<S: Simd>(s: S, gate: &mut [f32], up: &mut [f32], d: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == d.len());
    for at in (0..gate.len()).step_by(S::LANES) {
        let (g, u, d_h) = (load(s, gate, at), load(s, up, at), load(s, d, at));
        let square = s.mul(g, g);
        let cubic = s.fma(square, s.splat(TWICE * 0.044_715), s.splat(TWICE));
        let sigmoid = math::sigmoid(s, s.mul(g, cubic));
        let gelu = s.mul(g, sigmoid);
        // σ(t) + g σ(t) (1 − σ(t)) t′ with t = 2 z.
        let inner = s.fma(square, s.splat(3.0 * TWICE * 0.044_715), s.splat(TWICE));
        let rest = s.mul(s.sub(s.splat(1.0), sigmoid), inner);
        let slope = s.fma(gelu, rest, sigmoid);
        store(s, gate, at, s.mul(s.mul(d_h, u), slope));
        store(s, up, at, s.mul(d_h, gelu));
        store(s, d, at, s.mul(gelu, u));
    }
}

dispatch! {
    /// `x = cap * tanh(x / cap)`.
    pub(crate) fn softcap(x: &mut [f32], cap: f32) = softcap_kernel
}

#[inline(always)]
fn softcap_kernel<S: Simd>(s: S, x: &mut [f32], cap: f32) {
    let cap = s.splat(cap);
    for at in (0..x.len()).step_by(S::LANES) {
        let ratio = s.div(load(s, x, at), cap);
        store(s, x, at, s.mul(cap, math::tanh(s, ratio)));
    }
}

dispatch! {
    /// `x = x + y`; both have the same length.
    pub(crate) fn add(x: &mut [f32], y: &[f32]) = add_kernel
}

#[inline(always)]
fn add_kernel<S: Simd>(s: S, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    for at in (0..x.len()).step_by(S::LANES) {
        store(s, x, at, s.add(load(s, x, at), load(s, y, at)));
    }
}

dispatch! {
    /// The largest number, NaN passed over; −∞ if there is none.
    pub(crate) fn largest(x: &[f32]) -> f32 = largest_kernel
}

#[inline(always)]
fn largest_kernel<S: Simd>(s: S, x: &[f32]) -> f32 {
    let lowest = s.splat(f32::NEG_INFINITY);
    let mut most = lowest;
    for at in (0..x.len()).step_by(S::LANES) {
        let n = (x.len() - at).min(S::LANES);
        let present = s.select(((1u64 << n) - 1) as u32, load(s, x, at), lowest);
        most = s.max(present, most);
    }
    s.reduce_max(most)
}

dispatch! {
    /// Σ exp(x − shift), in f64 over blocks of 1024.
    pub(crate) fn sum_exp(x: &[f32], shift: f32) -> f64 = sum_exp_kernel
}

#[inline(always)]
fn sum_exp_kernel<S: Simd>(s: S, x: &[f32], shift: f32) -> f64 {
    let shift = s.splat(shift);
    let mut total = 0.0;
    for block in x.chunks(1024) {
        let mut sum = s.splat(0.0);
        for at in (0..block.len()).step_by(S::LANES) {
            let n = (block.len() - at).min(S::LANES);
            let e = math::exp(s, s.sub(load(s, block, at), shift));
            sum = s.add(sum, s.select(((1u64 << n) - 1) as u32, e, s.splat(0.0)));
        }
        total += f64::from(s.sum(sum));
    }
    total
}

dispatch! {
    /// `x = exp(x − shift) * factor`.
    pub(crate) fn exp_scaled(x: &mut [f32], shift: f32, factor: f32) = exp_scaled_kernel
}

#[inline(always)]
fn exp_scaled_kernel<S: Simd>(s: S, x: &mut [f32], shift: f32, factor: f32) {
    let (shift, factor) = (s.splat(shift), s.splat(factor));
    for at in (0..x.len()).step_by(S::LANES) {
        let e = math::exp(s, s.sub(load(s, x, at), shift));
        store(s, x, at, s.mul(e, factor));
    }
}

dispatch! {
    /// `x = x − shift`.
    pub(crate) fn shift_down(x: &mut [f32], shift: f32) = shift_down_kernel
}

#[inline(always)]
fn shift_down_kernel<S: Simd>(s: S, x: &mut [f32], shift: f32) {
    for at in (0..x.len()).step_by(S::LANES) {
        store(s, x, at, s.sub(load(s, x, at), s.splat(shift)));
    }
}
