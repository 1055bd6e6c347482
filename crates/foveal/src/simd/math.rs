//! Elementary functions on vectors, with their error bounds.

use super::Simd;

/// 2^x for x ≤ 127: relative error ≤ 1.7e-7 (1.9e-7 on the portable level, which rounds products
/// too), exactly 1 at 0, exactly 0 below −126 and at −∞; NaN stays NaN.
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

/// d/dx (x σ(x)) = σ(x) (1 + x σ(−x)): absolute error ≤ 1e-6 and, beyond 20, relative to |x|; NaN stays NaN.
#[inline(always)]
pub(crate) fn silu_slope<S: Simd>(s: S, x: S::F) -> S::F {
    let other = sigmoid(s, s.sub(s.splat(0.0), x));
    s.mul(sigmoid(s, x), s.fma(x, other, s.splat(1.0)))
}

/// ln(1 + e^x): relative error ≤ 6e-7 for x ≥ −87, below 2^−126 for x < −88; NaN stays NaN.
///
/// max(x, 0) + ln(1 + u) with u = e^−|x| ≤ 1, and ln(1 + u) = 2 artanh z with z = u / (2 + u) ≤ ⅓ by its series, whose
/// first term that is left out is below 2e-9 of it.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    let u = exp(s, s.min(x, s.sub(zero, x)));
    let z = s.div(u, s.add(s.splat(2.0), u));
    let square = s.mul(z, z);
    let mut p = s.splat(2.0 / 15.0);
    for odd in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        p = s.fma(p, square, s.splat(2.0 / odd));
    }
    s.fma(p, z, s.max(zero, x))
}

/// tanh x: relative error ≤ 4e-7, saturated at ±1, ±0 at ±0; NaN stays NaN.
///
/// With e = e^(2x) − 1, which keeps its accuracy near 0: tanh x = e / (e + 2). e = 2^k (2^f − 1) + (2^k − 1).
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    const ROUND: f32 = 1.5 * (1u32 << 23) as f32;
    // 2^(2 · 10 · log2 e) is far from overflow, and tanh is 1 there.
    let x = s.max(s.splat(-10.0), s.min(s.splat(10.0), x));
    let y = s.mul(x, s.splat(2.0 * std::f32::consts::LOG2_E));
    let t = s.add(y, s.splat(ROUND));
    let f = s.sub(y, s.sub(t, s.splat(ROUND)));
    let power = s.scale_exponent(s.splat(1.0), t, y);
    let e = s.fma(power, exp2_less_one(s, f), s.sub(power, s.splat(1.0)));
    s.div(e, s.add(e, s.splat(2.0)))
}

/// 2^f − 1 for |f| ≤ ½, with a small relative error.
#[inline(always)]
fn exp2_less_one<S: Simd>(s: S, f: S::F) -> S::F {
    let p = s.splat(1.525_273_4e-5);
    let p = s.fma(p, f, s.splat(1.540_353e-4));
    let p = s.fma(p, f, s.splat(1.333_355_8e-3));
    let p = s.fma(p, f, s.splat(9.618_129e-3));
    let p = s.fma(p, f, s.splat(5.550_411e-2));
    let p = s.fma(p, f, s.splat(2.402_265e-1));
    let p = s.fma(p, f, s.splat(std::f32::consts::LN_2));
    s.mul(p, f)
}

#[cfg(test)]
mod tests {
    use super::{exp, exp2, sigmoid, silu_slope, softplus, tanh};
    use crate::simd::{Level, Simd, dispatch};

    dispatch! {
        fn exp2_of(x: &mut [f32; 16]) = exp2_kernel
    }
    #[inline(always)]
    fn exp2_kernel<S: Simd>(s: S, x: &mut [f32; 16]) {
        each(s, x, exp2);
    }

    dispatch! {
        fn exp_of(x: &mut [f32; 16]) = exp_kernel
    }
    #[inline(always)]
    fn exp_kernel<S: Simd>(s: S, x: &mut [f32; 16]) {
        each(s, x, exp);
    }

    dispatch! {
        fn sigmoid_of(x: &mut [f32; 16]) = sigmoid_kernel
    }
    #[inline(always)]
    fn sigmoid_kernel<S: Simd>(s: S, x: &mut [f32; 16]) {
        each(s, x, sigmoid);
    }

    dispatch! {
        fn softplus_of(x: &mut [f32; 16]) = softplus_kernel
    }
    #[inline(always)]
    fn softplus_kernel<S: Simd>(s: S, x: &mut [f32; 16]) {
        each(s, x, softplus);
    }

    dispatch! {
        fn silu_slope_of(x: &mut [f32; 16]) = silu_slope_kernel
    }
    #[inline(always)]
    fn silu_slope_kernel<S: Simd>(s: S, x: &mut [f32; 16]) {
        each(s, x, silu_slope);
    }

    dispatch! {
        fn tanh_of(x: &mut [f32; 16]) = tanh_kernel
    }
    #[inline(always)]
    fn tanh_kernel<S: Simd>(s: S, x: &mut [f32; 16]) {
        each(s, x, tanh);
    }

    #[inline(always)]
    fn each<S: Simd>(s: S, x: &mut [f32; 16], f: impl Fn(S, S::F) -> S::F) {
        for x in x.chunks_exact_mut(S::LANES) {
            // SAFETY: the chunk holds LANES numbers.
            unsafe { s.store(x.as_mut_ptr(), f(s, s.load(x.as_ptr()))) };
        }
    }

    /// The largest error over every 127th number of both signs up to `most`, as `error` measures it.
    fn worst(
        level: Level,
        most: f32,
        of: fn(Level, &mut [f32; 16]),
        error: impl Fn(f32, f32) -> f64,
    ) -> f64 {
        let mut worst = 0.0f64;
        let step = 127;
        for first in (0..most.to_bits()).step_by(16 / 2 * step) {
            let mut x = [0.0; 16];
            for (i, x) in x.iter_mut().enumerate() {
                let magnitude = f32::from_bits(first + (i / 2 * step) as u32);
                *x = if i % 2 == 0 { magnitude } else { -magnitude };
            }
            let mut y = x;
            of(level, &mut y);
            for (x, y) in x.into_iter().zip(y).filter(|(x, _)| x.abs() <= most) {
                worst = worst.max(error(x, y));
            }
        }
        worst
    }

    fn relative(got: f32, expected: f64) -> f64 {
        (f64::from(got) / expected - 1.0).abs()
    }

    fn one(level: Level, of: fn(Level, &mut [f32; 16]), x: f32) -> f32 {
        let mut x = [x; 16];
        of(level, &mut x);
        x[3]
    }

    #[test]
    fn exp2_is_within_its_bound() {
        for level in Level::available() {
            let bound = if level.name() == "portable" { 1.9e-7 } else { 1.7e-7 };
            let error = worst(level, 126.0, exp2_of, |x, y| relative(y, f64::from(x).exp2()));
            assert!(error <= bound, "{level}: {error:e}");
            let error = (0..4096)
                .map(|i| 126.0 + i as f32 / 4096.0)
                .map(|x| relative(one(level, exp2_of, x), f64::from(x).exp2()))
                .fold(0.0, f64::max);
            assert!(error <= bound, "{level}: {error:e}");
            let value = |x| one(level, exp2_of, x);
            assert_eq!((value(0.0), value(-0.0)), (1.0, 1.0));
            assert_eq!(
                (value(-126.00001), value(f32::NEG_INFINITY), value(-1e30)),
                (0.0, 0.0, 0.0)
            );
            assert_eq!((value(-126.0), value(127.0)), (2f32.powi(-126), 2f32.powi(127)));
            assert!(value(f32::NAN).is_nan());
        }
    }

    #[test]
    fn exp_is_within_its_bound() {
        for level in Level::available() {
            let error = worst(level, 87.3, exp_of, |x, y| relative(y, f64::from(x).exp()));
            assert!(error <= 3e-7, "{level}: {error:e}");
            let value = |x| one(level, exp_of, x);
            assert_eq!((value(0.0), value(-0.0)), (1.0, 1.0));
            assert_eq!((value(-87.4), value(f32::NEG_INFINITY), value(-1e30)), (0.0, 0.0, 0.0));
            assert!(value(f32::INFINITY) == value(89.0) && value(1e30).is_finite());
            assert!(relative(value(88.0), 88f64.exp()) <= 3e-7);
            assert!(value(f32::NAN).is_nan());
        }
    }

    #[test]
    fn sigmoid_is_within_its_bounds() {
        for level in Level::available() {
            let exact = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
            let error = worst(level, 87.0, sigmoid_of, |x, y| relative(y, exact(x)));
            assert!(error <= 5e-7, "{level} relative: {error:e}");
            let error = worst(level, 1e4, sigmoid_of, |x, y| (f64::from(y) - exact(x)).abs());
            assert!(error <= 2e-7, "{level} absolute: {error:e}");
            let value = |x| one(level, sigmoid_of, x);
            assert_eq!((value(0.0), value(100.0), value(f32::INFINITY)), (0.5, 1.0, 1.0));
            assert!(value(-89.0) < f32::MIN_POSITIVE && value(f32::NEG_INFINITY) >= 0.0);
            assert!(value(f32::NAN).is_nan());
        }
    }

    #[test]
    fn softplus_is_within_its_bound() {
        for level in Level::available() {
            let exact = |x: f32| {
                let x = f64::from(x);
                x.max(0.0) + (-x.abs()).exp().ln_1p()
            };
            let error = worst(level, 87.0, softplus_of, |x, y| relative(y, exact(x)));
            assert!(error <= 6e-7, "{level}: {error:e}");
            let value = |x| one(level, softplus_of, x);
            assert_eq!((value(200.0), value(f32::NEG_INFINITY)), (200.0, 0.0));
            assert!(value(-89.0) < f32::MIN_POSITIVE && value(f32::INFINITY) == f32::INFINITY);
            assert!(value(f32::NAN).is_nan());
        }
    }

    #[test]
    fn the_slope_of_silu_is_within_its_bound() {
        for level in Level::available() {
            let exact = |x: f32| {
                let x = f64::from(x);
                let sigmoid = 1.0 / (1.0 + (-x).exp());
                sigmoid * (1.0 + x * (1.0 - sigmoid))
            };
            let error = worst(level, 80.0, silu_slope_of, |x, y| {
                (f64::from(y) - exact(x)).abs() / f64::from(x.abs().max(20.0) / 20.0)
            });
            assert!(error <= 1e-6, "{level}: {error:e}");
            assert_eq!(one(level, silu_slope_of, 0.0), 0.5);
            assert!(one(level, silu_slope_of, f32::NAN).is_nan());
        }
    }

    #[test]
    fn tanh_is_within_its_bound() {
        for level in Level::available() {
            let error = worst(level, 30.0, tanh_of, |x, y| match x {
                0.0 => f64::from((y != 0.0) as u8),
                _ => relative(y, f64::from(x).tanh()),
            });
            assert!(error <= 4e-7, "{level}: {error:e}");
            let value = |x| one(level, tanh_of, x);
            assert_eq!((value(0.0), value(f32::INFINITY), value(-1e30)), (0.0, 1.0, -1.0));
            assert!(value(f32::NAN).is_nan());
        }
    }
}
