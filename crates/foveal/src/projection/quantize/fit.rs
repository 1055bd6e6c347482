//! Scales and minima of a run of numbers by weighted least squares, over several ways to round.

use half::f16;

/// The whole numbers that codes stand for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Levels {
    pub(super) lowest: f32,
    pub(super) highest: f32,
}

/// `x ≈ scale · q + minimum`, as `T` holds them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Affine<T> {
    pub(super) scale: T,
    pub(super) minimum: T,
}

/// Runs whose largest number is below this have no scale in f16 that is not zero.
const NOTHING: f32 = 1e-10;

/// How much the error of each number counts.
pub(super) fn weights<const LEN: usize>(x: &[f32; LEN]) -> [f32; LEN] {
    // Scaled, so that no square overflows.
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    if most < NOTHING {
        return [1.0; LEN];
    }
    let squares: f32 = x.iter().map(|x| (x / most) * (x / most)).sum();
    let root = (squares / LEN as f32).sqrt();
    x.map(|x| root + x.abs() / most)
}

/// The whole number next to `x`, ties to even, within the levels. `x` is not NaN.
pub(super) fn nearest(x: f32, levels: Levels) -> f32 {
    /// In this range of f32 neighbours are 1 apart.
    const ONES: f32 = 1.5 * (1 << 23) as f32;
    x.clamp(levels.lowest, levels.highest) + ONES - ONES
}

/// A scale as formats store it.
pub(super) fn half(x: f32) -> f16 {
    f16::from_f32(x)
}

/// What a stored scale stands for.
pub(super) trait Stored: Copy {
    fn value(self) -> f32;
}

impl Stored for f16 {
    fn value(self) -> f32 {
        self.to_f32()
    }
}

impl Stored for f32 {
    fn value(self) -> f32 {
        self
    }
}

/// Sums over a run of what `of` makes of each number and its weight, in eight partial sums each.
///
/// The length is a multiple of eight.
#[inline(always)]
fn sums<const N: usize>(x: &[f32], w: &[f32], of: impl Fn(f32, f32) -> [f32; N]) -> [f32; N] {
    let mut sums = [[0.0f32; 8]; N];
    for (x, w) in x.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
        for lane in 0..8 {
            let terms = of(x[lane], w[lane]);
            for (sum, term) in sums.iter_mut().zip(terms) {
                sum[lane] += term;
            }
        }
    }
    sums.map(|[a, b, c, d, e, f, g, h]| ((a + b) + (c + d)) + ((e + f) + (g + h)))
}

/// Σ w (x − d · q)² with the best q.
fn symmetric_error(x: &[f32], w: &[f32], d: f32, levels: Levels) -> f32 {
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let [error] = sums(x, w, |x, w| {
        let off = x - d * nearest(x * inverse, levels);
        [w * off * off]
    });
    error
}

/// A scale for numbers around zero.
pub(super) fn symmetric<T: Stored>(
    x: &[f32],
    w: &[f32],
    levels: Levels,
    store: impl Fn(f32) -> T,
) -> T {
    let extreme = x.iter().fold(0.0f32, |most, &x| if x.abs() > most.abs() { x } else { most });
    if extreme.abs() < NOTHING {
        return store(0.0);
    }
    let plain = store(extreme / levels.lowest);
    let mut best = (symmetric_error(x, w, plain.value(), levels), plain);
    for step in -9..=9 {
        // The extreme goes to the lowest level, or near it.
        let inverse = (levels.lowest + 0.1 * step as f32) / extreme;
        let [products, squares] = sums(x, w, |x, w| {
            let q = nearest(x * inverse, levels);
            [w * x * q, w * q * q]
        });
        if squares > 0.0 {
            let scale = store(products / squares);
            let error = symmetric_error(x, w, scale.value(), levels);
            if error < best.0 {
                best = (error, scale);
            }
        }
    }
    best.1
}

/// Σ w (x − d · q − m)² with the best q.
pub(super) fn affine_error(x: &[f32], w: &[f32], (d, m): (f32, f32), highest: f32) -> f32 {
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let levels = Levels { lowest: 0.0, highest };
    let [error] = sums(x, w, |x, w| {
        let off = x - d * nearest((x - m) * inverse, levels) - m;
        [w * off * off]
    });
    error
}

/// A scale, and a minimum of at most `limits.1`, for codes from 0 to `limits.0`.
pub(super) fn affine<T: Stored>(
    x: &[f32],
    w: &[f32],
    (highest, most): (f32, f32),
    store: impl Fn(f32) -> T,
) -> Affine<T> {
    let low = x.iter().copied().fold(f32::INFINITY, f32::min).min(most);
    let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let stored = |(scale, minimum): (f32, f32)| {
        let fit = Affine { scale: store(scale), minimum: store(minimum) };
        (affine_error(x, w, (fit.scale.value(), fit.minimum.value()), highest), fit)
    };
    if high - low < NOTHING {
        return stored((0.0, low)).1;
    }
    let mut best = stored(((high - low) / highest, low));
    for step in 0..=20 {
        let inverse = (highest - 1.0 + 0.1 * step as f32) / (high - low);
        let Some(fit) = least_squares(x, w, (inverse, low), (highest, most)) else { continue };
        let fit = stored(fit);
        if fit.0 < best.0 {
            best = fit;
        }
    }
    best.1
}

/// The best scale and minimum for the whole numbers that `inverse · (x − low)` rounds to.
fn least_squares(
    x: &[f32],
    w: &[f32],
    (inverse, low): (f32, f32),
    (highest, most): (f32, f32),
) -> Option<(f32, f32)> {
    let levels = Levels { lowest: 0.0, highest };
    let [s_w, s_x, s_q, s_qq, s_xq] = sums(x, w, |x, w| {
        let q = nearest(inverse * (x - low), levels);
        [w, w * x, w * q, w * q * q, w * x * q]
    });
    let determinant = s_w * s_qq - s_q * s_q;
    if determinant <= 0.0 {
        return None;
    }
    let scale = (s_w * s_xq - s_x * s_q) / determinant;
    let minimum = (s_qq * s_x - s_q * s_xq) / determinant;
    let (scale, minimum) =
        if minimum > most { ((s_xq - most * s_q) / s_qq, most) } else { (scale, minimum) };
    (scale > 0.0).then_some((scale, minimum))
}
