//! Packed blocks, a *chunk* of `8 * LANES` weights at a time.
//!
//! The weights of a chunk fill one vector of bytes (two, once high bits are joined on, or if they have
//! eight bits), and weight `k = 2 c + p` of a lane lies in byte `c` of its word, in the low half for
//! `p` = 0 and the high half for `p` = 1, or in the first vector and the second. They are never put in order; the inputs are, once per call, into the
//! weights' order ([`Layout::pack`]). A chunk's part of a row's sum is, with centred integers
//! q − c and the sums `X_p` of the inputs,
//!
//! ```text
//! Σ_p scale_p · Σ_c q_(2c+p) x_(2c+p)  +  Σ_p minimum_p · X_p
//! ```
//!
//! where w = scale (q − c) + minimum; where both `p` of a lane lie in one block, all eight products are one chain under its
//! scale. Centring keeps the two parts as small as the weights are.

use crate::projection::Format;
use crate::simd::words::Words;

/// Where the weights of a chunk come from, and how the fields that hold them are scaled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Neighbouring lanes that hold one piece of a block.
    piece_lanes: usize,
    /// Elements from one piece to the next.
    piece_stride: usize,
    /// Elements from `p` = 0 to `p` = 1; 0 stands for those of a vector of bytes.
    parity_stride: usize,
    /// Field `k` comes out of a word as `2^exponents[k]` times its value.
    exponents: [u32; 8],
    /// Sums of inputs that follow a chunk's inputs: none, one, or one for each `p`.
    sums: usize,
}

const NIBBLES: [u32; 8] = [0, 4, 8, 12, 0, 4, 8, 12];
const BYTES: [u32; 8] = [0, 0, 8, 8, 0, 0, 8, 8];

const SMALL: Layout =
    Layout { piece_lanes: 4, piece_stride: 32, parity_stride: 16, exponents: NIBBLES, sums: 0 };

pub(super) fn layout(format: Format) -> Option<Layout> {
    match format {
        Format::Q4_0 => Some(Q4_0::LAYOUT),
        Format::Q4_1 => Some(Q4_1::LAYOUT),
        Format::Q5_0 => Some(Q5_0::LAYOUT),
        Format::Q5_1 => Some(Q5_1::LAYOUT),
        Format::Q4_K => Some(Q4_K::LAYOUT),
        Format::Q5_K => Some(Q5_K::LAYOUT),
        Format::Q6_K => Some(Q6_K::LAYOUT),
        Format::Q8_0 => Some(Q8_0::LAYOUT),
        Format::F32 | Format::F16 | Format::BF16 => None,
    }
}

impl Layout {
    /// Vectors of a packed chunk.
    pub(super) const fn vectors(&self) -> usize {
        8 + self.sums
    }

    pub(super) fn packed_len(&self, in_features: usize, lanes: usize) -> usize {
        in_features.div_ceil(8 * lanes) * self.vectors() * lanes
    }

    /// The element of lane 0, `k` = 0.
    fn base(&self, chunk: usize, lanes: usize) -> usize {
        // Eight lanes hold every other piece of Q6_K's halves.
        if self.parity_stride > self.piece_stride && lanes == 8 {
            chunk / 2 * 128 + chunk % 2 * 32
        } else {
            chunk * 8 * lanes
        }
    }

    /// Writes a row of inputs in the order of the weights, divided by the scales of their fields,
    /// with the sums that minima need; inputs beyond the end are zero.
    #[inline(always)]
    pub(super) fn pack<S: Words>(&self, order: &Order, x: &[f32], out: &mut [f32]) {
        assert_eq!(out.len(), self.packed_len(x.len(), S::LANES));
        for (chunk, out) in out.chunks_exact_mut(self.vectors() * S::LANES).enumerate() {
            let x = x.get(self.base(chunk, S::LANES)..).unwrap_or(&[]);
            match x.first_chunk() {
                Some(x) => self.pack_chunk::<S>(order, x, out),
                None => {
                    let mut rest = [0.0; SPAN];
                    rest[..x.len()].copy_from_slice(x);
                    self.pack_chunk::<S>(order, &rest, out);
                }
            }
        }
    }

    #[inline(always)]
    fn pack_chunk<S: Words>(&self, order: &Order, x: &[f32; SPAN], out: &mut [f32]) {
        let (packed, minima) = out.split_at_mut(8 * S::LANES);
        let mut sums = [[0.0; 16]; 2];
        let vectors = packed.chunks_exact_mut(S::LANES).zip(order.chunks_exact(S::LANES));
        for (k, (vector, order)) in vectors.enumerate() {
            let scale = 1.0 / (1u32 << self.exponents[k]) as f32;
            let lanes = vector.iter_mut().zip(order).zip(&mut sums[k % 2]);
            for ((out, &at), sum) in lanes {
                let x = x[usize::from(at) % SPAN];
                *out = x * scale;
                *sum += x;
            }
        }
        if self.sums == 1 {
            for lane in 0..S::LANES {
                sums[0][lane] += sums[1][lane];
            }
        }
        for (out, sums) in minima.chunks_exact_mut(S::LANES).zip(&sums) {
            out.copy_from_slice(&sums[..S::LANES]);
        }
    }

    /// Which input, counted from a chunk's first, each number of a packed chunk is.
    pub(super) fn order(&self, lanes: usize) -> Order {
        let parity_stride = if self.parity_stride == 0 { 4 * lanes } else { self.parity_stride };
        let mut order = [0; SPAN];
        for (n, at) in order[..8 * lanes].iter_mut().enumerate() {
            let (k, lane) = (n / lanes, n % lanes);
            let (piece, word) = (lane / self.piece_lanes, lane % self.piece_lanes);
            let from = piece * self.piece_stride + k % 2 * parity_stride + 4 * word + k / 2;
            *at = from as u8;
        }
        order
    }
}

/// Inputs from a chunk's first to its last, at most.
const SPAN: usize = 128;

/// See [`Layout::order`].
pub(super) type Order = [u8; SPAN];

/// Inputs of a row of 8-bit integers that share a scale.
const RUN: usize = 32;

impl Layout {
    /// Whether both `p` of a lane lie in one run of 32, which is one block then.
    pub(super) const fn shared(&self) -> bool {
        0 < self.parity_stride && self.parity_stride < RUN
    }

    /// Vectors of a packed chunk of integers: for each `p` integers, then scales, then scaled sums of integers; one
    /// vector of either for both `p` that are [`shared`](Layout::shared).
    pub(super) const fn integer_vectors(&self) -> usize {
        if self.shared() { 4 } else { 6 }
    }

    /// Numbers of a packed row of integers.
    pub(super) fn packed_integers_len(&self, in_features: usize, lanes: usize) -> usize {
        in_features.div_ceil(8 * lanes) * self.integer_vectors() * lanes
    }

    /// Writes a row of inputs as 8-bit integers in the order of the weights. Of 32 neighbours the largest is ±127; a
    /// number that isn't finite makes their scale NaN.
    #[inline(always)]
    pub(super) fn pack_integers<S: Words>(&self, x: &[f32], out: &mut [f32]) {
        const LANES: usize = 16;
        assert!(S::LANES == LANES && out.len() == self.packed_integers_len(x.len(), LANES));
        let parity_stride = if self.parity_stride == 0 { 4 * LANES } else { self.parity_stride };
        let chunks = x.chunks(8 * LANES).zip(out.chunks_exact_mut(self.integer_vectors() * LANES));
        for (x, out) in chunks {
            let (mut integers, mut scales) = ([0i8; 8 * LANES], [0.0; 4]);
            let runs = x.chunks(RUN).zip(integers.chunks_exact_mut(RUN)).zip(&mut scales);
            for ((x, integers), scale) in runs {
                *scale = round_run(x, integers);
            }
            let (words, rest) = out.split_at_mut(2 * LANES);
            let (scaled, sums) = rest.split_at_mut(rest.len() / 2);
            sums.fill(0.0);
            for p in 0..2 {
                for lane in 0..LANES {
                    let (piece, word) = (lane / self.piece_lanes, lane % self.piece_lanes);
                    let at = piece * self.piece_stride + p * parity_stride + 4 * word;
                    let four = [0, 1, 2, 3].map(|c| integers[at + c]);
                    let bits = u32::from_le_bytes(four.map(|q| q as u8));
                    words[p * LANES + lane] = f32::from_bits(bits);
                    let to = if self.shared() { lane } else { p * LANES + lane };
                    scaled[to] = scales[at / RUN];
                    let sum: i32 = four.iter().map(|&q| i32::from(q)).sum();
                    sums[to] += scales[at / RUN] * sum as f32;
                }
            }
        }
    }
}

/// Rounds up to 32 numbers to integers times the scale that is returned.
#[inline(always)]
fn round_run(x: &[f32], integers: &mut [i8]) -> f32 {
    let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
    let finite = x.iter().all(|x| x.is_finite());
    let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
    for (q, &x) in integers.iter_mut().zip(x) {
        *q = (x * inverse).round_ties_even() as i8;
    }
    if finite { most / 127.0 } else { f32::NAN }
}

/// The weights of a chunk: for each `p` the words that hold its integers, their scale, and what is added to them once
/// they are centred.
pub(super) struct Chunk<S: Words> {
    pub(super) words: [S::U; 2],
    pub(super) scale: [S::F; 2],
    pub(super) minimum: [S::F; 2],
}

/// How integers lie in the words of a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fields {
    /// In the low halves of bytes, around 8. The words of `p` = 1 are the same, shifted.
    Nibbles,
    /// In the low bits of bytes, around this centre, which is below 64; the other bits are anything.
    Bytes(u32),
    /// Signed bytes.
    Signed,
}

impl Fields {
    /// Centred integers times `2^exponents[k]`.
    #[inline(always)]
    pub(super) fn centred<S: Words>(self, s: S, words: [S::U; 2]) -> [S::F; 8] {
        match self {
            Fields::Nibbles => nibbles(s, words[0]),
            Fields::Bytes(centre) => bytes(s, words, centre),
            Fields::Signed => signed_bytes(s, words),
        }
    }

    /// The mask and the bits to flip that make integers unsigned bytes, and the byte that stands for the centre.
    pub(super) const fn unsigned(self) -> (u32, u32, f32) {
        match self {
            Fields::Nibbles => (0x0f0f_0f0f, 0, 8.0),
            Fields::Bytes(centre) => ((2 * centre - 1) * 0x0101_0101, 0, centre as f32),
            Fields::Signed => (u32::MAX, 0x8080_8080, 128.0),
        }
    }
}

/// A format that [`Layout::pack`] orders inputs for.
pub(super) trait Packed: Copy + Send + Sync {
    const LAYOUT: Layout;
    const FIELDS: Fields;

    /// Where blocks are smaller than a chunk, `blocks` of them are there and the other weights are
    /// zero.
    /// # Safety
    /// `row` is valid for reading a row that has these blocks, or the block of this chunk.
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, blocks: usize) -> Chunk<S>;
}

// Loops, not closures over arrays: the compiler does not always inline those into the code of a
// level.
#[inline(always)]
fn nibbles<S: Words>(s: S, low: S::U) -> [S::F; 8] {
    let words = [low, s.shift_right::<16>(low)];
    let mut q = [s.splat(0.0); 8];
    for k in 0..8 {
        let (word, shift) = (words[k / 4], NIBBLES[k]);
        q[k] = match shift {
            0 => s.low_nibble(word),
            _ => s.field(word, 15 << shift, (8u32 << shift) as f32),
        };
    }
    q
}

/// The words of nibbles for `p` = 0 and 1.
#[inline(always)]
fn shifted<S: Words>(s: S, low: S::U) -> [S::U; 2] {
    [low, s.shift_right::<4>(low)]
}

/// Bytes of even and odd `k`; the fields are the bits below twice the centre.
#[inline(always)]
fn bytes<S: Words>(s: S, halves: [S::U; 2], centre: u32) -> [S::F; 8] {
    let upper = [s.shift_right::<16>(halves[0]), s.shift_right::<16>(halves[1])];
    let words = [halves, upper];
    let mut q = [s.splat(0.0); 8];
    for k in 0..8 {
        let shift = BYTES[k];
        let (mask, offset) = ((2 * centre - 1) << shift, (centre << shift) as f32);
        q[k] = s.field(words[k / 4][k % 2], mask, offset);
    }
    q
}

#[inline(always)]
fn signed_bytes<S: Words>(s: S, halves: [S::U; 2]) -> [S::F; 8] {
    let words = [halves, [s.shift_right::<16>(halves[0]), s.shift_right::<16>(halves[1])]];
    let mut q = [s.splat(0.0); 8];
    for k in 0..8 {
        q[k] = s.signed_byte(words[k / 4][k % 2], BYTES[k]);
    }
    q
}

/// 8-bit integers around 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Q8_0;

impl Packed for Q8_0 {
    const LAYOUT: Layout =
        Layout { piece_lanes: 8, piece_stride: 32, parity_stride: 0, exponents: BYTES, sums: 0 };
    const FIELDS: Fields = Fields::Signed;

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, blocks: usize) -> Chunk<S> {
        let half = S::LANES / 8;
        // SAFETY: `blocks` blocks of 34 bytes start there, `half` of them in the first vector.
        let (scale, first, second) = unsafe {
            let p = row.add(34 * chunk * 2 * half);
            let first = s.load_large_pieces(p.add(2), 34, blocks.min(half));
            let second = p.wrapping_add(2 + 34 * half);
            let second = s.load_large_pieces(second, 34, blocks.saturating_sub(half));
            (s.load_f16_octets(p, 34, blocks), first, second)
        };
        Chunk { words: [first, second], scale, minimum: [s.splat(0.0); 2] }
    }
}

/// 4-bit integers around 8.
#[derive(Debug, Clone, Copy)]
pub(super) struct Q4_0;

impl Packed for Q4_0 {
    const LAYOUT: Layout = SMALL;
    const FIELDS: Fields = Fields::Nibbles;

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, blocks: usize) -> Chunk<S> {
        // SAFETY: `blocks` blocks of 18 bytes start there.
        let (scale, low) = unsafe {
            let p = row.add(18 * chunk * (S::LANES / 4));
            (s.load_f16_quads(p, 18, blocks), s.load_pieces(p.add(2), 18, blocks))
        };
        Chunk { words: shifted(s, low), scale: [scale; 2], minimum: [s.splat(0.0); 2] }
    }
}

/// 4-bit integers with a minimum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Q4_1;

impl Packed for Q4_1 {
    const LAYOUT: Layout = Layout { sums: 1, ..SMALL };
    const FIELDS: Fields = Fields::Nibbles;

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, blocks: usize) -> Chunk<S> {
        // SAFETY: `blocks` blocks of 20 bytes start there.
        let (scale, minimum, low) = unsafe {
            let p = row.add(20 * chunk * (S::LANES / 4));
            let scale = s.load_f16_quads(p, 20, blocks);
            (scale, s.load_f16_quads(p.add(2), 20, blocks), s.load_pieces(p.add(4), 20, blocks))
        };
        let minimum = s.fma(scale, s.splat(8.0), minimum);
        Chunk { words: shifted(s, low), scale: [scale; 2], minimum: [minimum; 2] }
    }
}

/// The fifth bit of every byte.
const FIFTH: u32 = 0x1010_1010;

/// High halves of every byte.
const HIGH: u32 = 0xf0f0_f0f0;

/// 5-bit integers around 16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Q5_0;

impl Packed for Q5_0 {
    const LAYOUT: Layout = Layout { exponents: BYTES, ..SMALL };
    const FIELDS: Fields = Fields::Bytes(16);

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, blocks: usize) -> Chunk<S> {
        // SAFETY: `blocks` blocks of 22 bytes start there.
        let (scale, words) = unsafe {
            let p = row.add(22 * chunk * (S::LANES / 4));
            (s.load_f16_quads(p, 22, blocks), five_bits(s, p.add(2), 22, blocks))
        };
        Chunk { words, scale: [scale; 2], minimum: [s.splat(0.0); 2] }
    }
}

/// The bytes of even and odd `k` of blocks whose words of fifth bits lie at `p`, their nibbles behind them.
/// # Safety
/// `blocks` such runs of 20 bytes, `stride` apart, are readable.
#[inline(always)]
unsafe fn five_bits<S: Words>(s: S, p: *const u8, stride: usize, blocks: usize) -> [S::U; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let low = s.load_pieces(p.add(4), stride, blocks);
        let even = s.join_fifth(low, p, stride, blocks);
        [even, s.join_fifth(s.shift_right::<4>(low), p.add(2), stride, blocks)]
    }
}

/// 5-bit integers with a minimum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Q5_1;

impl Packed for Q5_1 {
    const LAYOUT: Layout = Layout { exponents: BYTES, sums: 1, ..SMALL };
    const FIELDS: Fields = Fields::Bytes(16);

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, blocks: usize) -> Chunk<S> {
        // SAFETY: `blocks` blocks of 24 bytes start there.
        let (scale, minimum, words) = unsafe {
            let p = row.add(24 * chunk * (S::LANES / 4));
            let scale = s.load_f16_quads(p, 24, blocks);
            let minimum = s.load_f16_quads(p.add(2), 24, blocks);
            (scale, minimum, five_bits(s, p.add(4), 24, blocks))
        };
        let minimum = s.fma(scale, s.splat(16.0), minimum);
        Chunk { words, scale: [scale; 2], minimum: [minimum; 2] }
    }
}

/// The block of 256 of a chunk, and which part of it: first by 128 weights, then, with eight lanes,
/// by half of them.
#[inline(always)]
fn large_block<S: Words>(chunk: usize) -> (usize, usize, usize) {
    let at = chunk * S::LANES;
    (at / 32, at % 32 / 16, at % 16 / 8)
}

/// 4-bit integers, a 6-bit scale and minimum for 32.
#[derive(Debug, Clone, Copy)]
#[allow(non_camel_case_types, reason = "the names are those of the format")]
pub(super) struct Q4_K;

impl Packed for Q4_K {
    const LAYOUT: Layout =
        Layout { piece_lanes: 8, piece_stride: 64, parity_stride: 32, exponents: NIBBLES, sums: 2 };
    const FIELDS: Fields = Fields::Nibbles;

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, _: usize) -> Chunk<S> {
        let (block, part, half) = large_block::<S>(chunk);
        // SAFETY: a block has 144 bytes: 16 of scales, then four groups of 32.
        let ((scale, minimum), low) = unsafe {
            let p = row.add(144 * block);
            let low = s.load_words(p.add(16 + 64 * part + 32 * half));
            (six_bit_scales(s, p, (part, half), 8.0), low)
        };
        Chunk { words: shifted(s, low), scale, minimum }
    }
}

/// The scales of a part of a block that begins with two halves and 12 packed bytes, and what is added to integers
/// around `centre`.
/// # Safety
/// `p` is valid for reading 16 bytes.
#[inline(always)]
unsafe fn six_bit_scales<S: Words>(
    s: S,
    p: *const u8,
    (part, half): (usize, usize),
    centre: f32,
) -> ([S::F; 2], [S::F; 2]) {
    // SAFETY: two halves and three words.
    let (d, m, [a, b, c]) = unsafe {
        let [d, m] = p.cast::<[u16; 2]>().read_unaligned();
        (s.widen_f16(d), s.widen_f16(m), p.add(4).cast::<[u32; 3]>().read_unaligned())
    };
    let (scales, minima) = match part {
        0 => (a & 0x3f3f_3f3f, b & 0x3f3f_3f3f),
        _ => (c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030),
    };
    let scale = s.octets(s.scaled_bytes(scales.to_le_bytes(), d), half);
    let below = s.octets(s.scaled_bytes(minima.to_le_bytes(), -m), half);
    let centre = s.splat(centre);
    (scale, [s.fma(scale[0], centre, below[0]), s.fma(scale[1], centre, below[1])])
}

/// 5-bit integers, a 6-bit scale and minimum for 32.
#[derive(Debug, Clone, Copy)]
#[allow(non_camel_case_types, reason = "the names are those of the format")]
pub(super) struct Q5_K;

impl Packed for Q5_K {
    const LAYOUT: Layout = Layout { exponents: BYTES, ..Q4_K::LAYOUT };
    const FIELDS: Fields = Fields::Bytes(16);

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, _: usize) -> Chunk<S> {
        /// The second group of a part has its fifth bits two bits higher.
        static COUNTS: [u32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2];
        let (block, part, half) = large_block::<S>(chunk);
        // SAFETY: a block has 176 bytes: 16 of scales, 32 of fifth bits, then four groups of 32; the
        // table has 16 words, LANES of them from 8 * half on.
        let ((scale, minimum), low, fifth) = unsafe {
            let p = row.add(176 * block);
            let fifth = s.load_repeated(p.add(16));
            // The part's first bit, 0 or 4, comes to bit 4.
            let fifth = if part == 0 { s.shift_left::<4>(fifth) } else { fifth };
            let counts = s.load_words(COUNTS.as_ptr().add(8 * half).cast());
            let low = s.load_words(p.add(48 + 64 * part + 32 * half));
            let fifth = s.shift_right_each(fifth, counts);
            (six_bit_scales(s, p, (part, half), 16.0), low, fifth)
        };
        let words = [
            s.merge(low, fifth, FIFTH),
            s.merge(s.shift_right::<4>(low), s.shift_right::<1>(fifth), FIFTH),
        ];
        Chunk { words, scale, minimum }
    }
}

/// 6-bit integers around 32, an 8-bit scale for 16.
#[derive(Debug, Clone, Copy)]
#[allow(non_camel_case_types, reason = "the names are those of the format")]
pub(super) struct Q6_K;

impl Packed for Q6_K {
    const LAYOUT: Layout =
        Layout { piece_lanes: 8, piece_stride: 32, parity_stride: 64, exponents: BYTES, sums: 0 };
    const FIELDS: Fields = Fields::Bytes(32);

    #[inline(always)]
    unsafe fn chunk<S: Words>(s: S, row: *const u8, chunk: usize, _: usize) -> Chunk<S> {
        /// The second half's bit pairs lie two bits higher.
        static COUNTS: [u32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2];
        let (block, part, half) = large_block::<S>(chunk);
        // SAFETY: a block has 210 bytes: two parts of 64 bytes, of 32 and of 8, and a half; the
        // table has 16 words, LANES of them from 8 * half on.
        let (low, high, counts, scales, d) = unsafe {
            let p = row.add(210 * block);
            let low = s.load_words(p.add(64 * part + 32 * half));
            let high = s.load_repeated(p.add(128 + 32 * part));
            let counts = s.load_words(COUNTS.as_ptr().add(8 * half).cast());
            let scales = p.add(192 + 8 * part).cast::<[[u8; 4]; 2]>().read_unaligned();
            let d = s.widen_f16(p.add(208).cast::<u16>().read_unaligned());
            (low, high, counts, scales, d)
        };
        let high = s.shift_right_each(high, counts);
        let words = [
            s.merge(low, s.shift_left::<4>(high), HIGH),
            s.merge(s.shift_right::<4>(low), high, HIGH),
        ];
        let scale = [
            s.quads(s.scaled_bytes(scales[0], d), half),
            s.quads(s.scaled_bytes(scales[1], d), half),
        ];
        Chunk { words, scale, minimum: [s.splat(0.0); 2] }
    }
}
