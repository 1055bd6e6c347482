//! Makes codes of keys and values, and numbers of codes: see [`cache::codes`](crate::cache::codes).
//!
//! Encoding uses nothing but single IEEE operations, so that every level makes the same codes. Decoding multiplies and adds in
//! one rounding where the processor can. Coded keys lie in the order of packed panels already.

use super::coded::Code;
use super::product::{PairProduct, dispatch_pairs};
use super::tile::{KEY_TILE, PANEL};
use super::{Simd, dispatch};
use crate::cache::codes::{Bits, ChannelCodes, GROUP, GROUPS, Scaling, TokenCodes, coded_width};
use crate::element::Lanes;
use half::{bf16, f16};

/// Channels whose bounds are looked for together.
const BLOCK: usize = 16;

/// Scale and minimum of numbers between two bounds in codes of `0..=most`.
pub(crate) fn scaling(min: f32, max: f32, most: f32) -> Scaling {
    let scale = f16::from_f32((max - min) / most);
    let scale = if scale == f16::ZERO { f16::ONE } else { scale };
    Scaling { scale, min: f16::from_f32(min) }
}

/// ⌊(x − min) / scale + 0.5⌋, kept within `0..=most`; 0 for NaN.
#[inline(always)]
pub(crate) fn code(x: f32, scale: f32, min: f32, most: f32) -> u32 {
    let x = (x - min) / scale + 0.5;
    let x = if x > 0.0 { x } else { 0.0 };
    let x = if x < most { x } else { most };
    // SAFETY: the number is between 0 and `most`. Cutting off is rounding down.
    unsafe { x.to_int_unchecked::<i32>() as u32 }
}

fn most(bits: Bits) -> f32 {
    ((1 << bits.count()) - 1) as f32
}

/// Rows of 64 neighbouring tokens, and where their codes go.
#[derive(Debug)]
pub(crate) struct Encode<'a> {
    pub(crate) bits: Bits,
    /// The numbers of a row.
    pub(crate) width: usize,
    /// `[token][width]`.
    pub(crate) rows: &'a [bf16],
    /// Codes of the group, as [`ChannelCodes`] or [`TokenCodes`] has them.
    pub(crate) codes: &'a mut [u8],
    /// Scales and minima, likewise.
    pub(crate) ranges: &'a mut [f16],
}

dispatch! {
    /// Encodes the keys of a group of tokens, channel by channel.
    pub(crate) fn encode_keys(args: Encode<'_>) = encode_keys_kernel
}

#[inline(always)]
fn encode_keys_kernel<S: Simd>(s: S, args: Encode<'_>) {
    let Encode { bits, width, rows, codes, ranges } = args;
    let bytes = bits.bytes(GROUP);
    assert!(rows.len() == GROUP * width && codes.len() == bytes * width);
    let (scales, minima) = ranges.split_at_mut(width);
    for first in (0..width).step_by(BLOCK) {
        let n = (width - first).min(BLOCK);
        // Channels beyond the width are zeros.
        let mut block = [[0.0f32; BLOCK]; GROUP];
        for (t, row) in block.iter_mut().enumerate() {
            let from = &rows[t * width + first..][..n];
            match from.as_array::<BLOCK>() {
                Some(from) => *row = from.map(widen),
                None => row.iter_mut().zip(from).for_each(|(x, from)| *x = widen(*from)),
            }
        }
        let bounds = bounds(&block);
        let at = [&mut scales[first..first + n], &mut minima[first..first + n]];
        let (scale, min) = scalings(s, bounds, most(bits), at);
        let number = |n: usize, c: usize| code(block[n][c], scale[c], min[c], most(bits));
        for l in 0..bytes / 4 {
            // One word of each channel.
            let mut words = [0u32; BLOCK];
            for (n, shift) in of_word(bits, l) {
                for c in 0..BLOCK {
                    words[c] |= number(n, c) << shift;
                }
            }
            for c in 0..n {
                let to = &mut codes[(first + c) * bytes + 4 * l..][..4];
                to.copy_from_slice(&words[c].to_le_bytes());
            }
        }
    }
}

dispatch! {
    /// Encodes the values of a group of tokens, token by token.
    pub(crate) fn encode_values(args: Encode<'_>) = encode_values_kernel
}

#[inline(always)]
fn encode_values_kernel<S: Simd>(s: S, args: Encode<'_>) {
    let Encode { bits, width, rows, codes, ranges } = args;
    let (bytes, row_bytes) = (bits.bytes(GROUP), bits.bytes(coded_width(width)));
    assert!(rows.len() == GROUP * width && codes.len() == GROUP * row_bytes);
    assert!(ranges.len() == 2 * GROUP * width.div_ceil(GROUP));
    for (first, tokens) in
        (0..width).step_by(GROUP).flat_map(|c| (0..GROUP).step_by(BLOCK).map(move |t| (c, t)))
    {
        let n = (width - first).min(GROUP);
        let mut block = [[0.0f32; GROUP]; BLOCK];
        let mut extremes = [[0.0f32; BLOCK]; 2];
        for (t, row) in block.iter_mut().enumerate() {
            let from = &rows[(tokens + t) * width + first..][..n];
            // Missing channels repeat the first one, which changes no bound.
            match from.as_array::<GROUP>() {
                Some(from) => *row = from.map(widen),
                None => *row = std::array::from_fn(|c| widen(*from.get(c).unwrap_or(&from[0]))),
            }
            let (parts, _) = row.as_chunks::<BLOCK>();
            let [low, high] = bounds(parts);
            let smaller = |a, b| if a < b { a } else { b };
            let larger = |a, b| if a > b { a } else { b };
            extremes[0][t] = low.into_iter().reduce(smaller).unwrap_or(0.0);
            extremes[1][t] = high.into_iter().reduce(larger).unwrap_or(0.0);
        }
        let (scales, minima) = ranges[2 * first..][..2 * GROUP].split_at_mut(GROUP);
        let at = [&mut scales[tokens..tokens + BLOCK], &mut minima[tokens..tokens + BLOCK]];
        let (scale, min) = scalings(s, extremes, most(bits), at);
        for (t, row) in block.iter().enumerate() {
            let mut coded = row.map(|x| code(x, scale[t], min[t], most(bits)));
            coded[n..].fill(0);
            let at = (tokens + t) * row_bytes + bits.bytes(first);
            for (l, to) in codes[at..at + bytes].chunks_exact_mut(4).enumerate() {
                let word = of_word(bits, l).fold(0, |word, (n, shift)| word | coded[n] << shift);
                to.copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// The codes that the `l`-th word of a group holds, and how far from its lowest bit they lie: see
/// [`Simd::load_bytes`] and [`Simd::load_halves`].
#[inline(always)]
fn of_word(bits: Bits, l: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = 32 / bits.count();
    (0..count).map(move |k| match bits {
        Bits::Eight => (16 * k + l, 8 * k),
        Bits::Four => (16 * (k % 4) + 8 * (k / 4) + l, 4 * k),
    })
}

/// The smallest and the largest of each column.
#[inline(always)]
fn bounds(rows: &[[f32; BLOCK]]) -> [[f32; BLOCK]; 2] {
    let (mut low, mut high) = (rows[0], rows[0]);
    for row in rows {
        for c in 0..BLOCK {
            low[c] = if row[c] < low[c] { row[c] } else { low[c] };
            high[c] = if row[c] > high[c] { row[c] } else { high[c] };
        }
    }
    [low, high]
}

/// As [`scaling`], for each pair of bounds: stores as many scales and minima as there is room for, and returns all of them.
#[inline(always)]
fn scalings<S: Simd>(
    s: S,
    [low, high]: [[f32; BLOCK]; 2],
    most: f32,
    [scales, minima]: [&mut [f16]; 2],
) -> ([f32; BLOCK], [f32; BLOCK]) {
    let round = |x: [f32; BLOCK]| {
        let mut rounded = [f16::ZERO; BLOCK];
        for at in (0..BLOCK).step_by(S::LANES) {
            // SAFETY: BLOCK is whole vectors.
            unsafe { s.store_f16(rounded[at..].as_mut_ptr().cast(), s.load(x[at..].as_ptr())) };
        }
        rounded
    };
    let scale = round(std::array::from_fn(|c| (high[c] - low[c]) / most));
    let scale = scale.map(|x| if x.to_bits() == 0 { f16::ONE } else { x });
    let min = round(low);
    scales.copy_from_slice(&scale[..scales.len()]);
    minima.copy_from_slice(&min[..minima.len()]);
    (numbers(s, &scale), numbers(s, &min))
}

#[inline(always)]
fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

dispatch! {
    /// Decodes the keys of a tile into panels, as [`pack_keys`](super::tile::pack_keys) packs them.
    pub(crate) fn decode_keys<C: Code>(code: C, keys: ChannelCodes<'_>, out: &mut [f32]) = decode_keys_kernel
}

#[inline(always)]
fn decode_keys_kernel<S: Simd, C: Code>(s: S, _: C, keys: ChannelCodes<'_>, out: &mut [f32]) {
    const { assert!(GROUP == PANEL) };
    let (width, bytes) = (keys.width, C::BITS.bytes(GROUP));
    assert!(out.len() == KEY_TILE * width && keys.bits == C::BITS);
    for (group, first) in (0..GROUPS).flat_map(|g| (0..width).step_by(BLOCK).map(move |c| (g, c))) {
        let [scales, minima] = keys.ranges(group).map(|x| numbers(s, &x[first..]));
        for c in 0..(width - first).min(BLOCK) {
            let (scale, min) = (s.splat(scales[c]), s.splat(minima[c]));
            let at = group * width + first + c;
            // SAFETY: a channel of a group has GROUP codes and GROUP numbers of `out`.
            unsafe {
                let x = C::load(s, keys.codes(group)[(first + c) * bytes..].as_ptr());
                let to = out.as_mut_ptr().add(at * GROUP);
                for v in 0..GROUP / S::LANES {
                    s.store(to.add(v * S::LANES), number::<S, C>(s, x[v], scale, min));
                }
            }
        }
    }
}

dispatch! {
    /// Decodes the values of a tile into rows of the width.
    pub(crate) fn decode_values<C: Code>(code: C, values: TokenCodes<'_>, out: &mut [f32]) = decode_values_kernel
}

#[inline(always)]
fn decode_values_kernel<S: Simd, C: Code>(s: S, _: C, values: TokenCodes<'_>, out: &mut [f32]) {
    let (width, row_bytes) = (values.width, values.row_bytes());
    assert!(out.len() == KEY_TILE * width && values.codes.len() == KEY_TILE * row_bytes);
    for (first, column) in
        (0..KEY_TILE).step_by(BLOCK).flat_map(|t| (0..width).step_by(GROUP).map(move |c| (t, c)))
    {
        let ranges = values.ranges(first / GROUP, column / GROUP);
        let [scales, minima] = ranges.map(|x| numbers(s, &x[first % GROUP..]));
        for t in 0..BLOCK {
            let (scale, min) = (s.splat(scales[t]), s.splat(minima[t]));
            // SAFETY: a token has whole groups of codes, and `out` its channels, of which as many are written as there are.
            unsafe {
                let codes = values.codes.as_ptr().add((first + t) * row_bytes);
                let x = C::load(s, codes.add(C::BITS.bytes(column)));
                for v in 0..GROUP / S::LANES {
                    let left = width.saturating_sub(column + v * S::LANES).min(S::LANES);
                    let to = (first + t) * width + column + v * S::LANES;
                    let to = out.as_mut_ptr().wrapping_add(to);
                    let x = number::<S, C>(s, x[v], scale, min);
                    if left == S::LANES { s.store(to, x) } else { s.store_part(to, x, left) }
                }
            }
        }
    }
}

/// What a loaded code stands for.
#[inline(always)]
fn number<S: Simd, C: Code>(s: S, x: S::F, scale: S::F, min: S::F) -> S::F {
    // Both factors are powers of two, and the code is exact.
    let code = s.fma(x, s.splat(C::STEPS), s.splat(-C::STEPS));
    s.fma(code, scale, min)
}

/// The first `BLOCK` of some f16 numbers, or all and zeros.
#[inline(always)]
fn numbers<S: Simd>(s: S, from: &[f16]) -> [f32; BLOCK] {
    let mut to = [0.0; BLOCK];
    for i in (0..from.len().min(BLOCK)).step_by(S::LANES) {
        let n = (from.len() - i).min(S::LANES);
        // SAFETY: `n` numbers are readable, and BLOCK is whole vectors.
        unsafe {
            let p = from.as_ptr().add(i);
            let x = if n == S::LANES { f16::load(s, p) } else { f16::load_part(s, p, n) };
            s.store(to.as_mut_ptr().add(i), x);
        }
    }
    to
}

dispatch_pairs! {
    /// As [`decode_keys`], into cells of pairs: each number is rounded to bf16.
    pub(crate) fn decode_key_pairs<C: Code>(code: C, keys: ChannelCodes<'_>, out: &mut [f32]) = decode_key_pairs_kernel
}

#[inline(always)]
fn decode_key_pairs_kernel<P: PairProduct, C: Code>(
    product: P,
    _: C,
    keys: ChannelCodes<'_>,
    out: &mut [f32],
) {
    let (s, width, bytes) = (product.simd(), keys.width, C::BITS.bytes(GROUP));
    let depth = width.div_ceil(2);
    assert!(P::S::LANES == 16 && out.len() == KEY_TILE * depth && keys.bits == C::BITS);
    for (group, first) in (0..GROUPS).flat_map(|g| (0..width).step_by(BLOCK).map(move |c| (g, c))) {
        let [scales, minima] = keys.ranges(group).map(|x| numbers(s, &x[first..]));
        let n = (width - first).min(BLOCK);
        for c in (0..n).step_by(2) {
            // SAFETY: a channel of a group has GROUP codes, a pair of channels GROUP cells of `out`.
            unsafe {
                let channel = |c: usize| {
                    let x = C::load(s, keys.codes(group)[(first + c) * bytes..].as_ptr());
                    let (scale, min) = (s.splat(scales[c]), s.splat(minima[c]));
                    halves::<P, C>(product, x, scale, min)
                };
                let one = channel(c);
                let other = if c + 1 < n { channel(c + 1) } else { [s.splat(0.0); 2] };
                let to = out.as_mut_ptr().add((group * depth + (first + c) / 2) * GROUP);
                for half in 0..2 {
                    let cells = product.interleave(one[half], other[half]);
                    s.store(to.add(32 * half), cells[0]);
                    s.store(to.add(32 * half + 16), cells[1]);
                }
            }
        }
    }
}

/// What 64 loaded codes stand for, rounded to bf16, 32 numbers a vector.
#[inline(always)]
fn halves<P: PairProduct, C: Code>(
    product: P,
    x: [<P::S as Simd>::F; 8],
    scale: <P::S as Simd>::F,
    min: <P::S as Simd>::F,
) -> [<P::S as Simd>::F; 2] {
    let x = |v: usize| number::<P::S, C>(product.simd(), x[v], scale, min);
    [product.round(x(0), x(1)), product.round(x(2), x(3))]
}

dispatch_pairs! {
    /// As [`decode_values`], into rows of cells of pairs: each number is rounded to bf16.
    pub(crate) fn decode_value_pairs<C: Code>(code: C, values: TokenCodes<'_>, out: &mut [f32]) = decode_value_pairs_kernel
}

#[inline(always)]
fn decode_value_pairs_kernel<P: PairProduct, C: Code>(
    product: P,
    _: C,
    values: TokenCodes<'_>,
    out: &mut [f32],
) {
    let (s, width, row_bytes) = (product.simd(), values.width, values.row_bytes());
    assert!(P::S::LANES == 16 && out.len() == KEY_TILE / 2 * width);
    assert!(values.codes.len() == KEY_TILE * row_bytes);
    for (first, column) in
        (0..KEY_TILE).step_by(BLOCK).flat_map(|t| (0..width).step_by(GROUP).map(move |c| (t, c)))
    {
        let ranges = values.ranges(first / GROUP, column / GROUP);
        let [scales, minima] = ranges.map(|x| numbers(s, &x[first % GROUP..]));
        for t in (0..BLOCK).step_by(2) {
            // SAFETY: a token has whole groups of codes; a pair of tokens has `width` cells of `out`, of which as many are
            // written as are left.
            unsafe {
                let token = |t: usize| {
                    let codes = values.codes.as_ptr().add((first + t) * row_bytes);
                    let x = C::load(s, codes.add(C::BITS.bytes(column)));
                    halves::<P, C>(product, x, s.splat(scales[t]), s.splat(minima[t]))
                };
                let (one, other) = (token(t), token(t + 1));
                let to = out.as_mut_ptr().add((first + t) / 2 * width);
                for half in 0..2 {
                    let cells = product.interleave(one[half], other[half]);
                    for (n, cells) in cells.into_iter().enumerate() {
                        let at = column + 32 * half + 16 * n;
                        let left = width.saturating_sub(at).min(16);
                        s.store_part(to.wrapping_add(at), cells, left);
                    }
                }
            }
        }
    }
}
