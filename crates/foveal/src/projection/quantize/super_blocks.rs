//! Blocks of 256 elements: runs with small scales of their own, multiples of the block's.

use half::f16;

use super::fit::{self, Affine, Levels, nearest, weights};
use super::put_half;

/// What a `Q4_K` or a `Q5_K` block is made of.
struct Runs {
    d: f16,
    m: f16,
    /// Scale and minimum of each run, 0 to 63.
    steps: [[u8; 2]; 8],
    codes: [u8; 256],
}

/// Scales and minima of eight runs of 32, as multiples of two of the block, and codes from 0 to `highest`.
fn runs(x: &[f32; 256], highest: f32) -> Runs {
    let parts: &[[f32; 32]] = x.as_chunks().0;
    let mut fits = [Affine { scale: 0.0f32, minimum: 0.0f32 }; 8];
    for (fit, part) in fits.iter_mut().zip(parts) {
        *fit = fit::affine(part, &weights::<32>(part), (highest, 0.0), |x| x);
    }
    let most = |of: fn(&Affine<f32>) -> f32| fits.iter().map(of).fold(0.0, f32::max);
    let d = f16::from_f32(most(|fit| fit.scale) / 63.0);
    let m = f16::from_f32(most(|fit| -fit.minimum) / 63.0);
    let mut made = Runs { d, m, steps: [[0; 2]; 8], codes: [0; 256] };
    for (r, part) in parts.iter().enumerate() {
        made.steps[r] = steps(part, fits[r], (d.to_f32(), m.to_f32()), highest);
        let [scale, minimum] = made.steps[r].map(f32::from);
        let (scale, minimum) = (d.to_f32() * scale, m.to_f32() * minimum);
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (code, x) in made.codes[32 * r..].iter_mut().zip(part) {
            *code = nearest((x + minimum) * inverse, Levels { lowest: 0.0, highest }) as u8;
        }
    }
    made
}

/// The multiples of `d` and `m` around a fit that are best for a run.
fn steps(x: &[f32; 32], fit: Affine<f32>, (d, m): (f32, f32), highest: f32) -> [u8; 2] {
    let levels = Levels { lowest: 0.0, highest: 63.0 };
    let step = |x: f32, unit: f32| if unit == 0.0 { 0.0 } else { nearest(x / unit, levels) };
    let (scale, minimum) = (step(fit.scale, d), step(-fit.minimum, m));
    let w = weights::<32>(x);
    let mut best = (f32::INFINITY, [0; 2]);
    for (by_scale, by_minimum) in
        [-1.0, 0.0, 1.0].into_iter().flat_map(|a| [(a, -1.0), (a, 0.0), (a, 1.0)])
    {
        let s = nearest(scale + by_scale, levels);
        let t = nearest(minimum + by_minimum, levels);
        let error = fit::affine_error(x, &w, (d * s, -(m * t)), highest);
        if error < best.0 {
            best = (error, [s as u8, t as u8]);
        }
    }
    best.1
}

/// Packs eight pairs of six bits.
fn put_steps(out: &mut [u8], steps: &[[u8; 2]; 8]) {
    for r in 0..4 {
        let ([s, t], [s_high, t_high]) = (steps[r], steps[r + 4]);
        out[r] = s | s_high >> 4 << 6;
        out[r + 4] = t | t_high >> 4 << 6;
        out[r + 8] = s_high & 15 | t_high << 4;
    }
}

/// Writes the low four bits of 256 codes, runs `2g` and `2g + 1` in the bytes of group `g`.
fn put_nibbles(out: &mut [u8], codes: &[u8; 256]) {
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = codes[64 * group + i] & 15 | codes[64 * group + 32 + i] << 4;
        }
    }
}

pub(super) fn q4_k(x: &[f32; 256], block: &mut [u8; 144]) {
    let made = runs(x, 15.0);
    put_half(block, 0, made.d);
    put_half(block, 2, made.m);
    put_steps(&mut block[4..16], &made.steps);
    put_nibbles(&mut block[16..], &made.codes);
}

pub(super) fn q5_k(x: &[f32; 256], block: &mut [u8; 176]) {
    let made = runs(x, 31.0);
    put_half(block, 0, made.d);
    put_half(block, 2, made.m);
    put_steps(&mut block[4..16], &made.steps);
    for (i, byte) in block[16..48].iter_mut().enumerate() {
        *byte = (0..8).fold(0, |bits, r| bits | (made.codes[32 * r + i] >> 4 & 1) << r);
    }
    put_nibbles(&mut block[48..], &made.codes);
}

pub(super) fn q6_k(x: &[f32; 256], block: &mut [u8; 210]) {
    const LEVELS: Levels = Levels { lowest: -32.0, highest: 31.0 };
    let parts: &[[f32; 16]] = x.as_chunks().0;
    let mut scales = [0.0f32; 16];
    for (scale, part) in scales.iter_mut().zip(parts) {
        *scale = fit::symmetric(part, &weights::<16>(part), LEVELS, |x| x);
    }
    let most = scales.iter().fold(0.0f32, |most, &x| if x.abs() > most.abs() { x } else { most });
    // The largest goes to −128, the end that reaches further.
    let d = f16::from_f32(most / -128.0);
    put_half(block, 208, d);
    let mut codes = [0u8; 256];
    for (r, part) in parts.iter().enumerate() {
        let bytes = Levels { lowest: -128.0, highest: 127.0 };
        let step = if d.to_f32() == 0.0 { 0.0 } else { nearest(scales[r] / d.to_f32(), bytes) };
        block[192 + r] = step as i8 as u8;
        let scale = d.to_f32() * step;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (code, x) in codes[16 * r..].iter_mut().zip(part) {
            *code = (nearest(x * inverse, LEVELS) + 32.0) as u8;
        }
    }
    for (half, codes) in codes.chunks_exact(128).enumerate() {
        for i in 0..32 {
            let [a, b, c, d] = [0, 1, 2, 3].map(|k| codes[32 * k + i]);
            block[64 * half + i] = a & 15 | c << 4;
            block[64 * half + 32 + i] = b & 15 | d << 4;
            block[128 + 32 * half + i] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
}
