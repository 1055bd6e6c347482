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
    let p = s.splat(0.001_326_472_7);
    let p = s.fma(p, f, s.splat(0.009_671_513));
    let p = s.fma(p, f, s.splat(0.055_507_336));
    let p = s.fma(p, f, s.splat(0.240_222_42));
    let p = s.fma(p, f, s.splat(0.693_147));
    let p = s.fma(p, f, s.splat(1.0));
    s.scale_exponent(p, t, x)
}
