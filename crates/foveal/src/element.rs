//! Storage types: `f32`, `f16` and `bf16` hold numbers in memory; sums are `f32`.

use crate::exact::instances::Instances;
use half::{bf16, f16};

/// A type that tensors may be stored in: `f32`, `half::f16` or `half::bf16`.
///
/// Kernels widen on load and round (to nearest, ties to even) on store; sums, statistics and
/// accumulators are `f32` for all three. Products of bf16 with bf16 are taken in pairs where the processor has an
/// instruction for it.
pub trait Element:
    Lanes + Instances + Copy + Default + Send + Sync + std::fmt::Debug + 'static
{
    /// Which of the three this is.
    const DTYPE: DType;

    /// Exact conversion to `f32`.
    fn to_f32(self) -> f32;

    /// Conversion from `f32`, rounded to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

/// The run-time name of an [`Element`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        })
    }
}

pub(crate) use lanes::Lanes;

mod lanes {
    use crate::cache::KvRows;
    use crate::simd::Simd;
    use crate::tensor::Rows;

    /// How vectors of a storage type are moved to and from `f32` lanes. Seals `Element`.
    #[doc(hidden)]
    pub trait Lanes: Sized {
        /// Rows of this type as rows of any type.
        fn kv_rows(rows: Rows<'_, Self>) -> KvRows<'_>;
        /// # Safety
        /// `p` is valid for reading `S::LANES` elements.
        unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F;
        /// Lanes from `n` on are zero.
        /// # Safety
        /// `p` is valid for reading `n <= S::LANES` elements.
        unsafe fn load_part<S: Simd>(s: S, p: *const Self, n: usize) -> S::F;
        /// # Safety
        /// `p` is valid for writing `n <= S::LANES` elements.
        unsafe fn store_part<S: Simd>(s: S, p: *mut Self, x: S::F, n: usize);
    }

    impl Lanes for f32 {
        fn kv_rows(rows: Rows<'_, f32>) -> KvRows<'_> {
            KvRows::F32(rows)
        }
        #[inline(always)]
        unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::F {
            // SAFETY: the caller's promise is the callee's.
            unsafe { s.load(p) }
        }
        #[inline(always)]
        unsafe fn load_part<S: Simd>(s: S, p: *const f32, n: usize) -> S::F {
            // SAFETY: the caller's promise is the callee's.
            unsafe { s.load_part(p, n) }
        }
        #[inline(always)]
        unsafe fn store_part<S: Simd>(s: S, p: *mut f32, x: S::F, n: usize) {
            // SAFETY: the caller's promise is the callee's.
            unsafe { if n == S::LANES { s.store(p, x) } else { s.store_part(p, x, n) } }
        }
    }

    macro_rules! sixteen_bit {
        ($ty:ty, $widen:ident, $round:ident, $rows:ident) => {
            impl Lanes for $ty {
                fn kv_rows(rows: Rows<'_, $ty>) -> KvRows<'_> {
                    KvRows::$rows(rows)
                }
                #[inline(always)]
                unsafe fn load<S: Simd>(s: S, p: *const $ty) -> S::F {
                    // SAFETY: the caller's promise is the callee's; the type is a transparent u16.
                    unsafe { s.$widen(p.cast()) }
                }
                #[inline(always)]
                unsafe fn load_part<S: Simd>(s: S, p: *const $ty, n: usize) -> S::F {
                    let mut part = [0u16; 16];
                    // SAFETY: n <= LANES <= 16 elements are readable at p, and part holds 16.
                    unsafe {
                        std::ptr::copy_nonoverlapping(p.cast::<u16>(), part.as_mut_ptr(), n);
                        s.$widen(part.as_ptr())
                    }
                }
                #[inline(always)]
                unsafe fn store_part<S: Simd>(s: S, p: *mut $ty, x: S::F, n: usize) {
                    // SAFETY: LANES <= 16 numbers fit `part`, of which n are writable at p.
                    unsafe {
                        if n == S::LANES {
                            return s.$round(p.cast(), x);
                        }
                        let mut part = [0u16; 16];
                        s.$round(part.as_mut_ptr(), x);
                        std::ptr::copy_nonoverlapping(part.as_ptr(), p.cast::<u16>(), n);
                    }
                }
            }
        };
    }
    sixteen_bit!(half::f16, load_f16, store_f16, F16);
    sixteen_bit!(half::bf16, load_bf16, store_bf16, Bf16);
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline]
    fn from_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    #[inline]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline]
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
}
