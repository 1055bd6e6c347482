//! Vectors of 32-bit words and the small integers packed in them: what the quantised matrix kernels
//! need beyond [`Simd`].
//!
//! A word holds up to eight small integers, its *fields*. [`Words::field`] makes one field of every
//! word a number without shifting it down: its bits are laid under the exponent of 2²³, which is
//! then subtracted, so that a field at bit `s` comes out as `2^s` times its value, exactly.

use super::Simd;
use super::product::PairProduct;

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// 2²³ as a number: the low mantissa bits of its neighbours count units.
const UNITS: f32 = 8_388_608.0;

/// What [`Words::signed_byte`] flips: bit 7 of the byte, which makes it the byte plus 128, and the
/// exponent of 2²³.
const fn flip(shift: u32) -> u32 {
    UNITS.to_bits() | 0x80 << shift
}

/// What [`Words::signed_byte`] takes off again.
const fn flipped(shift: u32) -> f32 {
    UNITS + (0x80u32 << shift) as f32
}

/// Products of bytes: a product of pairs whose processor has AVX-512 VNNI too.
pub(crate) trait ByteProduct: PairProduct<S: Words> {
    /// Words as they lie in a buffer of numbers.
    /// # Safety
    /// `p` is valid for reading `LANES` numbers.
    unsafe fn load_bytes(self, p: *const f32) -> <Self::S as Words>::U;
    /// The bits under `mask`, of which those of `flip` are turned round.
    fn masked(self, a: <Self::S as Words>::U, mask: u32, flip: u32) -> <Self::S as Words>::U;
    /// Sums of nothing.
    fn no_dots(self) -> <Self::S as Words>::U;
    /// `sums` plus, in each lane, the four products of an unsigned byte of `a` and a signed one of `b`.
    fn dot_bytes(
        self,
        sums: <Self::S as Words>::U,
        a: <Self::S as Words>::U,
        b: <Self::S as Words>::U,
    ) -> <Self::S as Words>::U;
    /// Signed words as numbers.
    fn numbers(self, a: <Self::S as Words>::U) -> <Self::S as Simd>::F;
}

/// Packed small integers.
pub(crate) trait Words: Simd {
    /// `LANES` words of 32 bits.
    type U: Copy;

    /// # Safety
    /// `p` is valid for reading `4 * LANES` bytes.
    unsafe fn load_words(self, p: *const u8) -> Self::U;
    /// The 32 bytes at `p`, repeated as often as they fit.
    /// # Safety
    /// `p` is valid for reading 32 bytes.
    unsafe fn load_repeated(self, p: *const u8) -> Self::U;
    /// `count <= LANES / 4` pieces of 16 bytes, `stride` bytes apart; the missing ones are zero.
    /// # Safety
    /// Each of the `count` pieces is readable.
    unsafe fn load_pieces(self, p: *const u8, stride: usize, count: usize) -> Self::U;
    /// `count <= LANES / 8` pieces of 32 bytes, `stride` bytes apart; the missing ones are zero.
    /// # Safety
    /// Each of the `count` pieces is readable.
    unsafe fn load_large_pieces(self, p: *const u8, stride: usize, count: usize) -> Self::U;
    /// `count <= LANES / 4` binary16 numbers, `stride` bytes apart, each in four lanes; the missing
    /// ones are zero.
    /// # Safety
    /// Each of the `count` numbers is readable.
    unsafe fn load_f16_quads(self, p: *const u8, stride: usize, count: usize) -> Self::F;

    /// `count <= LANES / 4` binary16 numbers, `stride` bytes apart, each in eight lanes; the missing
    /// ones are zero.
    /// # Safety
    /// Each of the `count` numbers is readable.
    unsafe fn load_f16_octets(self, p: *const u8, stride: usize, count: usize) -> [Self::F; 2];

    /// Exact binary16 to binary32.
    fn widen_f16(self, bits: u16) -> f32;
    /// Four signed bytes, times a factor.
    fn scaled_bytes(self, bytes: [u8; 4], factor: f32) -> [f32; 4];
    /// Each number in four lanes; with eight lanes, numbers `2 * half` and `2 * half + 1`.
    fn quads(self, x: [f32; 4], half: usize) -> Self::F;
    /// Numbers 0 and 2, then 1 and 3, in eight lanes each; with eight lanes in all, number
    /// `2 * half`, then `2 * half + 1`.
    fn octets(self, x: [f32; 4], half: usize) -> [Self::F; 2];

    /// Logical shift right.
    fn shift_right<const N: u32>(self, a: Self::U) -> Self::U;
    /// Shift left.
    fn shift_left<const N: u32>(self, a: Self::U) -> Self::U;
    /// Logical shift right, each lane by its own count below 32.
    fn shift_right_each(self, a: Self::U, counts: Self::U) -> Self::U;
    /// Bits of `b` where the mask is set, bits of `a` elsewhere.
    fn merge(self, a: Self::U, b: Self::U, mask: u32) -> Self::U;
    /// The low four bits of every byte of `a`, and a fifth that is bit `i mod 16` of 16 bits for
    /// byte `i`: those at `p` for the first 16 bytes, at `p + stride` for the next, `count` in all.
    /// # Safety
    /// Each of the `count <= LANES / 4` pairs of bytes is readable.
    unsafe fn join_fifth(self, a: Self::U, p: *const u8, stride: usize, count: usize) -> Self::U;
    /// The field under `mask`, which lies below bit 23, as it stands in the word, minus the whole
    /// number `offset`.
    fn field(self, a: Self::U, mask: u32, offset: f32) -> Self::F;
    /// The signed byte at bit `shift`, which is 0 or 8, times `2^shift`.
    fn signed_byte(self, a: Self::U, shift: u32) -> Self::F;
    /// The low four bits, minus 8.
    #[inline(always)]
    fn low_nibble(self, a: Self::U) -> Self::F {
        self.field(a, 15, 8.0)
    }
}
