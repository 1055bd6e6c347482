//! The row kernels of [`decode`](super::decode) on coded keys and values, without decoding them.
//!
//! ```text
//! keys      s_t = Σ_c q_c (s_c · code_tc + m_c) = Σ_c (q_c s_c) code_tc + Σ_c q_c m_c      per group of 64 tokens
//! values    o_c = Σ_t p_t (s_t · code_tc + m_t) = Σ_t (p_t s_t) code_tc + Σ_t p_t m_t      per group of 64 channels
//! ```
//!
//! Scales are multiplied into the query (into the weights) once a group, after which a code costs its conversion and
//! one multiply-add for each row. A score starts from Σ q m and is one chain of additions over the channels; an output
//! is one chain over the tokens of a tile, into which each group of tokens first adds Σ p m. Neither depends on how many rows share
//! the call. A weight of 0 adds exact zeros.

use super::tile::{KEY_TILE, KeyWords, padded};
use super::{Simd, dispatch};
use crate::cache::codes::{Bits, ChannelCodes, GROUP, GROUPS, TokenCodes};
use crate::element::Lanes;
use half::f16;

/// Channels whose scales are multiplied into a query at a time.
const FOLD: usize = 128;

/// Codes of one width.
pub(crate) trait Code: Copy {
    /// Which.
    const BITS: Bits;
    /// How many codes there are: 2ᵇ.
    const STEPS: f32;

    /// The codes of a group as numbers 1 + code / 2ᵇ, in order, in the first `GROUP / LANES` vectors.
    /// # Safety
    /// `p` is valid for reading the bytes of `GROUP` codes.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 8];
}

/// Codes of a byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Eight;
/// Codes of half a byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Four;

impl Code for Eight {
    const BITS: Bits = Bits::Eight;
    const STEPS: f32 = 256.0;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 8] {
        // SAFETY: the caller's promise.
        unsafe { s.load_bytes(p) }
    }
}

impl Code for Four {
    const BITS: Bits = Bits::Four;
    const STEPS: f32 = 16.0;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::F; 8] {
        // SAFETY: the caller's promise.
        unsafe { s.load_halves(p) }
    }
}

/// Runs the same expression with the code for whichever width it is.
macro_rules! with_code {
    ($bits:expr, $code:ident => $body:expr) => {
        match $bits {
            $crate::cache::codes::Bits::Eight => {
                let $code = $crate::simd::coded::Eight;
                $body
            }
            $crate::cache::codes::Bits::Four => {
                let $code = $crate::simd::coded::Four;
                $body
            }
        }
    };
}
pub(crate) use with_code;

/// What [`channel_scores`] reads and writes, as [`RowScores`](super::decode::RowScores).
#[derive(Debug)]
pub(crate) struct ChannelScores<'a> {
    /// Query rows, each padded with zeros to a multiple of 16 numbers.
    pub(crate) queries: &'a [f32],
    /// The tile's keys.
    pub(crate) keys: ChannelCodes<'a>,
    /// One set of bits per query row.
    pub(crate) visible: &'a [KeyWords],
    /// Out: `[row][KEY_TILE]`, −∞ where masked.
    pub(crate) out: &'a mut [f32],
    /// Out: the largest visible score of each row.
    pub(crate) max: &'a mut [f32],
}

dispatch! {
    /// S = Q Kᵀ, masked, with row maxima.
    pub(crate) fn channel_scores<C: Code>(code: C, args: ChannelScores<'_>) = channel_scores_kernel
}

#[inline(always)]
fn channel_scores_kernel<S: Simd, C: Code>(s: S, _: C, args: ChannelScores<'_>) {
    let ChannelScores { queries, keys, visible, out, max } = args;
    let (rows, stride) = (visible.len(), padded(keys.width));
    assert!(queries.len() >= rows * stride && out.len() >= rows * KEY_TILE && max.len() == rows);
    assert!(keys.bits == C::BITS);
    for group in 0..GROUPS {
        let mut r = 0;
        while r < rows {
            let q = queries[r * stride..].as_ptr();
            let to = out[r * KEY_TILE + group * GROUP..].as_mut_ptr();
            // SAFETY: there are `rows` queries and score rows; as many are taken as are left.
            unsafe {
                r += match rows - r {
                    4.. if S::LANES == 16 => group_scores::<S, C, 4>(s, q, (keys, group), to),
                    2.. if S::LANES == 16 => group_scores::<S, C, 2>(s, q, (keys, group), to),
                    _ => group_scores::<S, C, 1>(s, q, (keys, group), to),
                };
            }
        }
    }
    for r in 0..rows {
        let row = &mut out[r * KEY_TILE..][..KEY_TILE];
        max[r] = mask_row(s, &visible[r], row);
    }
}

/// Writes −∞ over what a row does not see; returns the largest of the rest.
#[inline(always)]
fn mask_row<S: Simd>(s: S, visible: &KeyWords, row: &mut [f32]) -> f32 {
    let mut largest = s.splat(f32::NEG_INFINITY);
    for (n, part) in row.chunks_exact_mut(S::LANES).enumerate() {
        let at = n * S::LANES;
        let bits = (visible[at / 64] >> (at % 64)) as u32;
        // SAFETY: a part is a vector.
        unsafe {
            let x = s.select(bits, s.load(part.as_ptr()), s.splat(f32::NEG_INFINITY));
            s.store(part.as_mut_ptr(), x);
            largest = s.max(x, largest);
        }
    }
    s.reduce_max(largest)
}

/// Scores of R queries with a group of 64 keys; returns R.
///
/// # Safety
/// `queries` is valid for R rows of the padded width, `out` for 64 numbers in each of R score rows; `keys` has its codes and
/// ranges.
#[inline(always)]
unsafe fn group_scores<S: Simd, C: Code, const R: usize>(
    s: S,
    queries: *const f32,
    (keys, group): (ChannelCodes<'_>, usize),
    out: *mut f32,
) -> usize {
    let (width, stride, vectors) = (keys.width, padded(keys.width), GROUP / S::LANES);
    let [scales, minima] = keys.ranges(group);
    let mut sums = [[s.splat(0.0); 8]; R];
    for first in (0..width).step_by(FOLD) {
        let n = (width - first).min(FOLD);
        let mut folded = [[0.0f32; FOLD]; R];
        // SAFETY: `n` channels are left from `first` on; queries are padded to whole vectors.
        unsafe {
            let ranges = (scales[first..].as_ptr(), minima[first..].as_ptr());
            for r in 0..R {
                let query = queries.add(r * stride + first);
                let constant = s.splat(fold::<S, C>(s, query, ranges, &mut folded[r][..n]));
                for sum in &mut sums[r][..vectors] {
                    *sum = s.add(*sum, constant);
                }
            }
            let codes = keys.codes(group)[C::BITS.bytes(GROUP) * first..].as_ptr();
            for c in 0..n {
                let x = C::load(s, codes.add(C::BITS.bytes(GROUP) * c));
                for r in 0..R {
                    let q = s.splat(folded[r][c]);
                    for v in 0..vectors {
                        sums[r][v] = s.fma(q, x[v], sums[r][v]);
                    }
                }
            }
        }
    }
    for r in 0..R {
        for v in 0..vectors {
            // SAFETY: 64 numbers of each score row are writable.
            unsafe { s.store(out.add(r * KEY_TILE + v * S::LANES), sums[r][v]) };
        }
    }
    R
}

/// Writes a · 2ᵇ s, which loaded codes are multiplied by; returns Σ a · (m − 2ᵇ s), which makes up for their ones.
///
/// # Safety
/// `a` is valid for the length of `out` rounded up to whole vectors, scales and minima for its length.
#[inline(always)]
unsafe fn fold<S: Simd, C: Code>(
    s: S,
    a: *const f32,
    (scales, minima): (*const f16, *const f16),
    out: &mut [f32],
) -> f32 {
    let mut sum = s.splat(0.0);
    for i in (0..out.len()).step_by(S::LANES) {
        let n = (out.len() - i).min(S::LANES);
        // SAFETY: the caller's promise; `n` numbers are left of `out`.
        unsafe {
            let load = |p: *const f16| match n == S::LANES {
                true => f16::load(s, p.add(i)),
                false => f16::load_part(s, p.add(i), n),
            };
            let (x, scale) = (s.load(a.add(i)), s.mul(load(scales), s.splat(C::STEPS)));
            sum = s.fma(x, s.sub(load(minima), scale), sum);
            s.store_part(out.as_mut_ptr().add(i), s.mul(x, scale), n);
        }
    }
    s.sum(sum)
}

/// What [`token_values`] reads and writes, as [`RowValues`](super::decode::RowValues).
#[derive(Debug)]
pub(crate) struct TokenValues<'a> {
    /// Probabilities, `[row][KEY_TILE]`.
    pub(crate) probabilities: &'a [f32],
    /// The tile's values.
    pub(crate) values: TokenCodes<'a>,
    /// What accumulators are multiplied by first; one per row.
    pub(crate) rescale: &'a [f32],
    /// Accumulators, `[row][width rounded up to 16]`.
    pub(crate) out: &'a mut [f32],
    /// Scratch of the same size.
    pub(crate) sums: &'a mut [f32],
}

dispatch! {
    /// O ← α O + P V.
    pub(crate) fn token_values<C: Code>(code: C, args: TokenValues<'_>) = token_values_kernel
}

#[inline(always)]
fn token_values_kernel<S: Simd, C: Code>(s: S, _: C, args: TokenValues<'_>) {
    let TokenValues { probabilities, values, rescale, out, sums } = args;
    let (rows, stride) = (rescale.len(), padded(values.width));
    assert!(probabilities.len() >= rows * KEY_TILE);
    assert!(out.len() >= rows * stride && sums.len() >= rows * stride);
    assert!(values.codes.len() == KEY_TILE * values.row_bytes());
    assert!(values.ranges.len() == 2 * KEY_TILE * values.width.div_ceil(GROUP));
    sums[..rows * stride].fill(0.0);
    for (tokens, column) in
        (0..GROUPS).flat_map(|g| (0..values.width).step_by(GROUP).map(move |c| (g, c)))
    {
        let mut r = 0;
        while r < rows {
            let p = probabilities[r * KEY_TILE + tokens * GROUP..].as_ptr();
            let at = Weigh { values, tokens, column, p, sum: sums[r * stride..].as_mut_ptr() };
            // SAFETY: there are `rows` rows of probabilities and sums; as many are taken as are left.
            unsafe {
                r += match rows - r {
                    4.. if S::LANES == 16 => weigh::<S, C, 4>(s, &at),
                    2.. if S::LANES == 16 => weigh::<S, C, 2>(s, &at),
                    _ => weigh::<S, C, 1>(s, &at),
                };
            }
        }
    }
    for r in 0..rows {
        for at in (r * stride..(r + 1) * stride).step_by(S::LANES) {
            // SAFETY: strides are multiples of LANES and both buffers hold `rows` of them.
            unsafe {
                let (o, sum) = (out.as_mut_ptr().add(at), s.load(sums.as_ptr().add(at)));
                s.store(o, s.fma(s.splat(rescale[r]), s.load(o), sum));
            }
        }
    }
}

struct Weigh<'a> {
    values: TokenCodes<'a>,
    /// The group of tokens.
    tokens: usize,
    /// The first channel of the group of channels.
    column: usize,
    p: *const f32,
    sum: *mut f32,
}

/// Adds 64 weighted values to 64 channels of the sums of R rows; returns R.
///
/// # Safety
/// `at.p` is valid for 64 numbers in each of R score rows, `at.sum` for R rows of the padded width; `at.values` has its codes
/// and ranges.
#[inline(always)]
unsafe fn weigh<S: Simd, C: Code, const R: usize>(s: S, at: &Weigh<'_>) -> usize {
    let Weigh { values, tokens, column, .. } = *at;
    let stride = padded(values.width);
    let [scales, minima] = values.ranges(tokens, column / GROUP);
    // Vectors beyond the padded width exist as codes only.
    let vectors = ((stride - column) / S::LANES).min(GROUP / S::LANES);
    let mut folded = [[0.0f32; GROUP]; R];
    let mut sums = [[s.splat(0.0); 8]; R];
    // SAFETY: see the contract; `vectors` of them lie inside a row of sums.
    unsafe {
        for r in 0..R {
            let p = at.p.add(r * KEY_TILE);
            let constant = fold::<S, C>(s, p, (scales.as_ptr(), minima.as_ptr()), &mut folded[r]);
            for v in 0..vectors {
                let sum = at.sum.add(r * stride + column + v * S::LANES);
                sums[r][v] = s.add(s.load(sum), s.splat(constant));
            }
        }
        let first = values.row_bytes() * tokens * GROUP + C::BITS.bytes(column);
        let codes = values.codes.as_ptr().add(first);
        for t in 0..GROUP {
            let x = C::load(s, codes.add(values.row_bytes() * t));
            for r in 0..R {
                let p = s.splat(folded[r][t]);
                for v in 0..GROUP / S::LANES {
                    sums[r][v] = s.fma(p, x[v], sums[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..vectors {
                s.store(at.sum.add(r * stride + column + v * S::LANES), sums[r][v]);
            }
        }
    }
    R
}
