//! What a step of a product multiplies: numbers of f32, or pairs of bf16.
//!
//! ```text
//! numbers:   c ← c + a·b                 pairs:   c ← c + a₀·b₀ + a₁·b₁        a, b: bf16, c: f32
//! ```
//!
//! The tile kernels and row kernels are written once over a [`Product`]. A *cell* is what one lane of a factor holds: a
//! number, or two neighbouring ones along the axis that is summed over. Both take 32 bits, so that matrices of cells
//! lie in `f32` buffers either way, half as deep where cells are pairs.
//!
//! `vdpbf16ps` (AVX-512 BF16) takes a step of pairs at the cost of one multiply-add. It rounds to nearest, ties to even,
//! takes subnormal inputs for zero and flushes subnormal results to zero.

use super::tile::Steps;
use super::{Level, Pairs, Simd};
use crate::element::{DType, Element};

/// How a kernel multiplies.
pub(crate) trait Product: Copy {
    /// The vectors that sums are kept in.
    type S: Simd;
    /// Numbers in a cell.
    const CELL: usize;

    /// The token of the vectors.
    fn simd(self) -> Self::S;
    /// `c` plus the products of the cells of `a` and `b`.
    fn step(
        self,
        a: <Self::S as Simd>::F,
        b: <Self::S as Simd>::F,
        c: <Self::S as Simd>::F,
    ) -> <Self::S as Simd>::F;
    /// `LANES` cells as they lie.
    /// # Safety
    /// `p` is valid for reading `LANES * CELL` elements.
    unsafe fn load_cells<E: Element>(self, p: *const E) -> <Self::S as Simd>::F;
    /// Numbers from `n` on are zero.
    /// # Safety
    /// `p` is valid for reading `n <= LANES * CELL` elements.
    unsafe fn load_cells_part<E: Element>(self, p: *const E, n: usize) -> <Self::S as Simd>::F;
    /// Turns weights `[row][KEY_TILE]` into cells, in the steps of 16 keys that are computed.
    fn weights(self, weights: &mut [f32], steps: Steps);
}

impl<S: Simd> Product for S {
    type S = S;
    const CELL: usize = 1;

    #[inline(always)]
    fn simd(self) -> S {
        self
    }
    #[inline(always)]
    fn step(self, a: S::F, b: S::F, c: S::F) -> S::F {
        self.fma(a, b, c)
    }
    #[inline(always)]
    unsafe fn load_cells<E: Element>(self, p: *const E) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { E::load(self, p) }
    }
    #[inline(always)]
    unsafe fn load_cells_part<E: Element>(self, p: *const E, n: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { E::load_part(self, p, n) }
    }
    #[inline(always)]
    fn weights(self, _: &mut [f32], _: Steps) {}
}

/// A product of pairs: what else it takes to make cells.
pub(crate) trait PairProduct: Product {
    /// Rounds numbers to bf16, to nearest, ties to even; subnormal ones become zero. The first `LANES` are in the
    /// lower half of the lanes, number `2 i` below `2 i + 1` in lane `i`, the others in the upper half.
    fn round(self, low: <Self::S as Simd>::F, high: <Self::S as Simd>::F) -> <Self::S as Simd>::F;
    /// Cells across two rows of `2 * LANES` elements: in lane `i` of the first result elements `i` of `a` and `b`, of
    /// the second elements `LANES + i`.
    fn interleave(
        self,
        a: <Self::S as Simd>::F,
        b: <Self::S as Simd>::F,
    ) -> [<Self::S as Simd>::F; 2];
}

/// The token of a processor without such instructions: there is none.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPairs {}

#[cfg(not(target_arch = "x86_64"))]
mod no_pairs {
    use super::{Element, NoPairs, PairProduct, Product, Simd, Steps};
    use crate::simd::Portable;
    use crate::simd::words::{ByteProduct, Words};

    type F = <Portable as Simd>::F;
    type U = <Portable as Words>::U;

    impl ByteProduct for NoPairs {
        unsafe fn load_bytes(self, _: *const f32) -> U {
            match self {}
        }
        fn masked(self, _: U, _: u32, _: u32) -> U {
            match self {}
        }
        fn no_dots(self) -> U {
            match self {}
        }
        fn dot_bytes(self, _: U, _: U, _: U) -> U {
            match self {}
        }
        fn numbers(self, _: U) -> F {
            match self {}
        }
    }

    impl Product for NoPairs {
        type S = Portable;
        const CELL: usize = 2;

        fn simd(self) -> Portable {
            match self {}
        }
        fn step(self, _: F, _: F, _: F) -> F {
            match self {}
        }
        unsafe fn load_cells<E: Element>(self, _: *const E) -> F {
            match self {}
        }
        unsafe fn load_cells_part<E: Element>(self, _: *const E, _: usize) -> F {
            match self {}
        }
        fn weights(self, _: &mut [f32], _: Steps) {
            match self {}
        }
    }

    impl PairProduct for NoPairs {
        fn round(self, _: F, _: F) -> F {
            match self {}
        }
        fn interleave(self, _: F, _: F) -> [F; 2] {
            match self {}
        }
    }
}

/// Which product a call takes. A value is its own proof that the instructions exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Cells are numbers.
    Numbers(Level),
    /// Cells are pairs of bf16.
    Pairs(Pairs),
}

impl Form {
    /// Pairs if both factors are stored as bf16 and the level has the instruction, else numbers.
    pub(crate) fn of(level: Level, factors: [DType; 2]) -> Form {
        match level.pairs() {
            Some(pairs) if factors == [DType::Bf16; 2] => Form::Pairs(pairs),
            _ => Form::Numbers(level),
        }
    }

    /// The level whose kernels do all else.
    pub(crate) fn level(self) -> Level {
        match self {
            Form::Numbers(level) => level,
            Form::Pairs(pairs) => Level::of(pairs),
        }
    }

    /// Cells of `n` numbers.
    pub(crate) fn cells(self, n: usize) -> usize {
        n.div_ceil(self.cell())
    }

    fn cell(self) -> usize {
        match self {
            Form::Numbers(_) => 1,
            Form::Pairs(_) => 2,
        }
    }
}

/// Defines a function that runs a kernel over a [`PairProduct`]; the first argument is [`Pairs`].
macro_rules! dispatch_pairs {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)?
        ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:path) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? (
            pairs: $crate::simd::Pairs, $($arg: $ty),*
        ) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(
                    enable = "avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
                )]
                fn shell $(<$generic: $bound>)? (
                    pairs: $crate::simd::Pairs, $($arg: $ty),*
                ) $(-> $ret)? {
                    $kernel(pairs, $($arg),*)
                }
                // SAFETY: the token exists only where detection found these instructions.
                unsafe { shell(pairs, $($arg),*) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            $kernel(pairs, $($arg),*)
        }
    };
}
pub(crate) use dispatch_pairs;

/// Like [`dispatch!`](super::dispatch), for a kernel over a [`Product`]: the first argument is a [`Form`].
macro_rules! dispatch_form {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)?
        ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:path) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? (
            form: $crate::simd::product::Form, $($arg: $ty),*
        ) $(-> $ret)? {
            $crate::simd::dispatch! {
                fn numbers $(<$generic: $bound>)? ($($arg: $ty),*) $(-> $ret)? = $kernel
            }
            $crate::simd::product::dispatch_pairs! {
                fn pairs $(<$generic: $bound>)? ($($arg: $ty),*) $(-> $ret)? = $kernel
            }
            match form {
                $crate::simd::product::Form::Numbers(level) => numbers(level, $($arg),*),
                $crate::simd::product::Form::Pairs(token) => pairs(token, $($arg),*),
            }
        }
    };
}
pub(crate) use dispatch_form;
