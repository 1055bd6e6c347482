//! Elementary functions on vectors, with their error bounds.

use super::Simd;

/// 2^x for x ≤ 127: relative error ≤ 1.6e-7 (1.4 ulp), exactly 1 at 0, exactly 0 below −126 and
/// at −∞; NaN stays NaN.
///
/// x = k + f with k whole and |f| ≤ ½; 2^f by a polynomial of degree 5 whose constant term is
/// fixed at 1 (minimax elsewhere, 1.1e-7), 2^k by an addition to the exponent field.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    const ROUND: f32 = 1.5 * (1u32 << 23) as f32;
    let t = s.add(x, s.splat(ROUND));
    let f = s.sub(x, s.sub(t, s.splat(ROUND)));
    s.scale_exponent(exp2_fraction(s, f), t, x)
}

/// 2^f for |f| ≤ ½, or just beyond.
#[inline(always)]
fn exp2_fraction<S: Simd>(s: S, f: S::F) -> S::F {
    let p = s.splat(0.001_326_472_7);
    let p = s.fma(p, f, s.splat(0.009_671_513));
    let p = s.fma(p, f, s.splat(0.055_507_336));
    let p = s.fma(p, f, s.splat(0.240_222_42));
    #[allow(clippy::approx_constant, reason = "a minimax coefficient near ln 2, not ln 2")]
    let p = s.fma(p, f, s.splat(0.693_147));
    s.fma(p, f, s.splat(1.0))
}

/// e^x: relative error ≤ 3e-7 for −87.3 ≤ x ≤ 88, exactly 1 at 0, exactly 0 below −87.4, and
/// saturated at e^88.02 = 2^127 for greater x, +∞ included; NaN stays NaN.
///
/// x = k ln 2 + rest with k whole, by a subtraction of k ln 2 in two parts: the rest is as exact for
/// large |x| as for small.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    const ROUND: f32 = 1.5 * (1u32 << 23) as f32;
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts; the first has 10 bits, so that its product with k is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = s.min(s.splat(88.02), x);
    let x = s.max(s.splat(-1000.0), x);
    let t = s.add(s.mul(x, s.splat(LOG2_E)), s.splat(ROUND));
    let k = s.sub(t, s.splat(ROUND));
    let rest = s.fma(k, s.splat(-LN_2_HIGH), x);
    let rest = s.fma(k, s.splat(-LN_2_LOW), rest);
    let f = s.mul(rest, s.splat(LOG2_E));
    let scaled = s.mul(x, s.splat(LOG2_E));
    s.scale_exponent(exp2_fraction(s, f), t, scaled)
}

/// 1 / (1 + e^−x): absolute error ≤ 2e-7, relative error ≤ 5e-7 for x ≥ −87; exactly ½ at 0, 1 for
/// large x, below 2^−126 for x < −88; NaN stays NaN.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}
