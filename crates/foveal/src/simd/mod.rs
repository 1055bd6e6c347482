//! Vector instructions: the only folder with intrinsics, target features or `cfg(target_arch)`.
//!
//! An algorithm is written once, generic over [`Simd`]: a zero-size token whose existence proves
//! that the processor has the instructions. [`dispatch!`] compiles it once per level inside a
//! `target_feature` shell and picks the shell by the [`Level`] that the caller carries. Options of
//! a mechanism are data; the copies of a kernel are levels × storage types, nothing else.

#![allow(
    clippy::needless_range_loop,
    reason = "tiles of registers are indexed by row and vector, as the formulas are"
)]
#![allow(
    clippy::needless_pass_by_value,
    reason = "kernels take their arguments as `dispatch!` hands them on"
)]

mod level;
mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;

pub(crate) mod coded;
pub(crate) mod conv;
pub(crate) mod decode;
pub(crate) mod decode_pairs;
pub(crate) mod delta;
pub(crate) mod efficient;
pub(crate) mod encode;
pub(crate) mod favor;
pub(crate) mod gate;
pub(crate) mod gradient;
pub(crate) mod loss;
pub(crate) mod math;
pub(crate) mod near;
pub(crate) mod nn;
pub(crate) mod norm;
pub(crate) mod optimizer;
pub(crate) mod pairs;
pub(crate) mod peak;
pub(crate) mod product;
pub(crate) mod projection;
pub(crate) mod rotate;
pub(crate) mod row;
pub(crate) mod select;
pub(crate) mod short;
pub(crate) mod sweep;
pub(crate) mod terms;
pub(crate) mod tile;
pub(crate) mod token;
mod words;

pub(crate) use level::Kind;
pub use level::Level;
pub(crate) use portable::Portable;
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use product::NoPairs as Pairs;
#[cfg(target_arch = "x86_64")]
pub(crate) use {
    avx2::Avx2, avx512::Avx512, avx512bf16::Avx512Bf16, avx512bf16::Avx512Bf16 as Pairs,
};

/// Vectors of `f32` and what kernels do with them.
///
/// Methods take the token so that vectors can't be made without it. Loads and stores need no
/// alignment.
pub trait Simd: Copy {
    /// `LANES` numbers.
    type F: Copy;
    /// 8 or 16.
    const LANES: usize;
    /// Vectors side by side in a tile kernel's columns, so that 6 rows of them stay in registers.
    const TILE_VECTORS: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// `p` is valid for reading `LANES` numbers.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// Lanes from `n` on are zero.
    /// # Safety
    /// `p` is valid for reading `n <= LANES` numbers.
    unsafe fn load_part(self, p: *const f32, n: usize) -> Self::F;
    /// # Safety
    /// `p` is valid for writing `LANES` numbers.
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// # Safety
    /// `p` is valid for writing `n <= LANES` numbers.
    unsafe fn store_part(self, p: *mut f32, x: Self::F, n: usize);
    /// # Safety
    /// `p` is valid for reading `LANES` IEEE binary16 numbers.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// # Safety
    /// `p` is valid for reading `LANES` bfloat16 numbers.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    /// Rounded to nearest, ties to even.
    /// # Safety
    /// `p` is valid for writing `LANES` IEEE binary16 numbers.
    unsafe fn store_f16(self, p: *mut u16, x: Self::F);
    /// Rounded to nearest, ties to even.
    /// # Safety
    /// `p` is valid for writing `LANES` bfloat16 numbers.
    unsafe fn store_bf16(self, p: *mut u16, x: Self::F);
    /// 64 codes of a byte as numbers 1 + code / 256, in the first `64 / LANES` vectors: code `16 k + l` is byte `k` of the
    /// `l`-th of 16 words of 32 bits.
    /// # Safety
    /// `p` is valid for reading 64 bytes.
    unsafe fn load_bytes(self, p: *const u8) -> [Self::F; 8];
    /// 64 codes of four bits as numbers 1 + code / 16, in the first `64 / LANES` vectors: code `16 k + l` lies from bit
    /// `4 k + 16 (l / 8)` on in the `l % 8`-th of 8 words of 32 bits.
    /// # Safety
    /// `p` is valid for reading 32 bytes.
    unsafe fn load_halves(self, p: *const u8) -> [Self::F; 8];
    /// # Safety
    /// `p` is valid for reading `LANES` bytes.
    unsafe fn load_i8(self, p: *const i8) -> Self::F;
    /// The low and the high four bits of `LANES` bytes, as whole numbers 0 to 15.
    /// # Safety
    /// `p` is valid for reading `LANES` bytes.
    unsafe fn load_nibbles(self, p: *const u8) -> (Self::F, Self::F);

    /// Asks for the cache line at `p` to be brought to the second level; may do nothing.
    fn prefetch(self, p: *const u8);

    /// Lanewise sum.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lanewise difference.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lanewise product.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lanewise quotient.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lanewise square root.
    fn sqrt(self, a: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the processor can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Lanewise larger; where `a` is NaN, `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lanewise smaller; where `a` is NaN, `b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a` in lanes whose bit is set, `b` in the others.
    fn select(self, bits: u32, a: Self::F, b: Self::F) -> Self::F;
    /// One bit for each lane in which `a` is greater than `b`; NaN is not.
    fn above(self, a: Self::F, b: Self::F) -> u32;
    /// `p * 2^k` with `k` in the low bits of `t` (a number plus 1.5·2²³), and 0 where `x < -126`.
    /// NaN in `p` stays.
    fn scale_exponent(self, p: Self::F, t: Self::F, x: Self::F) -> Self::F;

    /// Sum over lanes, in the order that [`Simd::sums`] uses for each of its vectors.
    fn sum(self, a: Self::F) -> f32;
    /// Largest lane.
    fn reduce_max(self, a: Self::F) -> f32;
    /// Sums over lanes of 16 vectors, written side by side.
    /// # Safety
    /// `out` is valid for writing 16 numbers.
    unsafe fn sums(self, a: &[Self::F; 16], out: *mut f32);
    /// Transposes the first `LANES` vectors as a square matrix.
    fn transpose(self, a: &mut [Self::F; 16]);
}

/// Defines a function that runs a generic kernel compiled for the level given first.
///
/// `dispatch!(pub(crate) fn name<E: Element>(a: A, b: B) -> R = kernel);` makes
/// `name(level, a, b)` call `kernel(token, a, b)` inside the level's `target_feature` shell.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident
        $(<$($generic:ident: $bound:path),+>)?
        ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:path) => {
        $(#[$meta])*
        $vis fn $name $(<$($generic: $bound),+>)? (
            level: $crate::simd::Level, $($arg: $ty),*
        ) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512 $(<$($generic: $bound),+>)? (
                token: $crate::simd::Avx512, $($arg: $ty),*
            ) $(-> $ret)? {
                $kernel(token, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2 $(<$($generic: $bound),+>)? (
                token: $crate::simd::Avx2, $($arg: $ty),*
            ) $(-> $ret)? {
                $kernel(token, $($arg),*)
            }
            match level.kind() {
                $crate::simd::Kind::Portable(token) => $kernel(token, $($arg),*),
                // SAFETY: the token exists only where detection found these instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Kind::Avx2(token) => unsafe { avx2(token, $($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Kind::Avx512(token) => unsafe { avx512(token, $($arg),*) },
                // SAFETY: as above; this level has all that AVX-512 stands for.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Kind::Avx512Bf16(token) => unsafe {
                    avx512(token.avx512(), $($arg),*)
                },
            }
        }
    };
}
pub(crate) use dispatch;
