//! Two weight rows at a time, against one to four input rows in registers.
//!
//! What is loaded of an input serves both weight rows. The operations of a sum are the same whatever rows are beside it,
//! so that its bits are too.

use super::RowCall;
use super::blocks::{Chunk, Packed};
use crate::simd::words::Words;
use crate::simd::{Simd, dispatch};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Weight rows whose lanes are added up together.
const TOGETHER: usize = 16;

/// The input rows of a call, and the length of a weight row.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub(super) data: *const f32,
    pub(super) stride: usize,
    pub(super) in_features: usize,
}

/// How one weight row meets R input rows: a format, and what it is computed with.
pub(super) trait Dots: Copy {
    /// The vectors that sums are kept in.
    type S: Words;

    /// The token of the vectors.
    fn simd(self) -> Self::S;
    /// Numbers of an input row.
    fn width(self, in_features: usize) -> usize;
    /// Sums that are still spread over lanes.
    /// # Safety
    /// `row` is valid for reading a weight row, and `x` for reading R input rows.
    unsafe fn dots<const R: usize>(self, row: *const u8, x: Inputs) -> [<Self::S as Simd>::F; R];
    /// Those of W weight rows.
    /// # Safety
    /// That of [`Dots::dots`], for each of them.
    #[inline(always)]
    unsafe fn several<const W: usize, const R: usize>(
        self,
        rows: [*const u8; W],
        x: Inputs,
    ) -> [[<Self::S as Simd>::F; R]; W] {
        let mut dots = [[self.simd().splat(0.0); R]; W];
        for (dots, row) in dots.iter_mut().zip(rows) {
            // SAFETY: the caller's promise is the callee's.
            *dots = unsafe { self.dots::<R>(row, x) };
        }
        dots
    }
}

dispatch! {
    pub(super) fn run<N: Number>(format: N, call: RowCall<'_>) = run_numbers
}

#[inline(always)]
fn run_numbers<S: Words, N: Number>(s: S, _: N, call: RowCall<'_>) {
    run_rows(Numbers(s, PhantomData::<N>), &call);
}

dispatch! {
    pub(super) fn run_packed<B: Packed>(format: B, call: RowCall<'_>) = run_packed_kernel
}

#[inline(always)]
fn run_packed_kernel<S: Words, B: Packed>(s: S, format: B, call: RowCall<'_>) {
    run_rows(Grouped(s, format), &call);
}

/// The weight rows of a call, some at a time.
fn together(call: &RowCall<'_>) -> impl Iterator<Item = Range<usize>> + use<> {
    let count = call.columns.len();
    (0..count).step_by(TOGETHER).map(move |first| first..count.min(first + TOGETHER))
}

/// All weight rows of a call, against all input rows: some of these, which stay near, against all weights, then the next.
#[inline(always)]
pub(super) fn run_rows<D: Dots>(dots: D, call: &RowCall<'_>) {
    let width = dots.width(call.in_features);
    let reached = call.rows.saturating_sub(1) * call.x_stride + width;
    assert!(call.rows == 0 || call.x.len() >= reached);
    let group = if D::S::LANES == 16 { 4 } else { 2 };
    for row in (0..call.rows).step_by(group) {
        for weights in together(call) {
            match (call.rows - row).min(group) {
                1 => block::<D, 1>(dots, call, weights, row),
                2 => block::<D, 2>(dots, call, weights, row),
                3 if D::S::LANES == 16 => block::<D, 3>(dots, call, weights, row),
                _ if D::S::LANES == 16 => block::<D, 4>(dots, call, weights, row),
                _ => unreachable!("groups have two rows"),
            }
        }
    }
}

fn inputs(call: &RowCall<'_>, row: usize) -> Inputs {
    Inputs {
        data: call.x[row * call.x_stride..].as_ptr(),
        stride: call.x_stride,
        in_features: call.in_features,
    }
}

#[inline(always)]
fn block<D: Dots, const R: usize>(dots: D, call: &RowCall<'_>, weights: Range<usize>, row: usize) {
    let x = inputs(call, row);
    let s = dots.simd();
    let mut lanes = [[MaybeUninit::uninit(); TOGETHER]; R];
    let weight =
        |n: usize| call.weights[(weights.start + n) * call.row_bytes..][..call.row_bytes].as_ptr();
    let pairs = weights.len() / 2 * 2;
    for j in (0..pairs).step_by(2) {
        // SAFETY: whole weight rows, and rows row..row + R of the input, which `project` checked.
        let sums = unsafe { dots.several::<2, R>([weight(j), weight(j + 1)], x) };
        for r in 0..R {
            lanes[r][j].write(sums[0][r]);
            lanes[r][j + 1].write(sums[1][r]);
        }
    }
    for j in pairs..TOGETHER {
        let sums = match j < weights.len() {
            // SAFETY: as above.
            true => unsafe { dots.dots::<R>(weight(j), x) },
            false => [s.splat(0.0); R],
        };
        for r in 0..R {
            lanes[r][j].write(sums[r]);
        }
    }
    // SAFETY: all of them have been written, the pairs and then those from `pairs` on.
    let lanes = unsafe { &*(&raw const lanes).cast::<[[<D::S as Simd>::F; TOGETHER]; R]>() };
    write(s, call, weights, row, lanes);
}

/// Adds up the lanes of each weight row and input row.
#[inline(always)]
fn write<S: Simd, const R: usize>(
    s: S,
    call: &RowCall<'_>,
    weights: Range<usize>,
    row: usize,
    lanes: &[[S::F; TOGETHER]; R],
) {
    for (r, lanes) in lanes.iter().enumerate() {
        let mut sums = [0.0; TOGETHER];
        let columns = call.columns.start + weights.start..call.columns.start + weights.end;
        // SAFETY: `sums` holds 16 numbers; these columns are this call's alone.
        let out = unsafe {
            s.sums(lanes, sums.as_mut_ptr());
            call.out.part(row + r, columns)
        };
        out.copy_from_slice(&sums[..out.len()]);
    }
}

/// A format of [`Packed`] chunks, whose inputs are numbers.
#[derive(Debug, Clone, Copy)]
struct Grouped<S, B>(S, B);

impl<S: Words, B: Packed> Dots for Grouped<S, B> {
    type S = S;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }
    #[inline(always)]
    fn width(self, in_features: usize) -> usize {
        B::LAYOUT.packed_len(in_features, S::LANES)
    }
    #[inline(always)]
    unsafe fn dots<const R: usize>(self, row: *const u8, x: Inputs) -> [S::F; R] {
        // SAFETY: the caller's promise is the callee's.
        let [dots] = unsafe { self.several::<1, R>([row], x) };
        dots
    }
    #[inline(always)]
    unsafe fn several<const W: usize, const R: usize>(
        self,
        rows: [*const u8; W],
        x: Inputs,
    ) -> [[S::F; R]; W] {
        let s = self.0;
        let mut sums = [[[s.splat(0.0); 2]; R]; W];
        let (whole, rest) = (x.in_features / (8 * S::LANES), x.in_features % (8 * S::LANES));
        for n in 0..whole {
            // SAFETY: chunk n < whole of every row is all there, and the caller's promise.
            unsafe {
                let weights = B::chunks(s, rows, (n, S::LANES / 4));
                add_chunk::<S, B, W, R>(s, weights, n, x, &mut sums);
            }
        }
        if rest > 0 {
            // SAFETY: the last chunk has `rest` weights, and the caller's promise.
            unsafe {
                let weights = B::chunks(s, rows, (whole, rest / 32));
                add_chunk::<S, B, W, R>(s, weights, whole, x, &mut sums);
            }
        }
        let mut dots = [[s.splat(0.0); R]; W];
        for w in 0..W {
            for r in 0..R {
                dots[w][r] = s.add(sums[w][r][0], sums[w][r][1]);
            }
        }
        dots
    }
}

/// # Safety
/// `x` is valid for reading chunk number `chunk` of R packed input rows.
#[inline(always)]
unsafe fn add_chunk<S: Words, B: Packed, const W: usize, const R: usize>(
    s: S,
    weights: [Chunk<S>; W],
    chunk: usize,
    x: Inputs,
    sums: &mut [[[S::F; 2]; R]; W],
) {
    // SAFETY: the chunk lies inside the input, by the caller's promise.
    let first = unsafe { x.data.add(chunk * B::LAYOUT.vectors() * S::LANES) };
    let part = [[s.splat(0.0); R]; W];
    let mut products = Products { s, weights, x: first, stride: x.stride, part, sums };
    // Not a loop: one that the compiler leaves a loop keeps its sums in memory.
    // SAFETY: the caller's promise.
    unsafe {
        products.add::<B>(0);
        products.add::<B>(1);
        products.add::<B>(2);
        products.add::<B>(3);
        products.add::<B>(4);
        products.add::<B>(5);
        products.add::<B>(6);
        products.add::<B>(7);
    }
}

/// A chunk of W weight rows against R input rows, one product after the other for all sums: what is made of a weight or
/// loaded of an input serves all of them, and is gone then.
struct Products<'a, S: Words, const W: usize, const R: usize> {
    s: S,
    weights: [Chunk<S>; W],
    /// The chunk of the first input row.
    x: *const f32,
    stride: usize,
    part: [[S::F; R]; W],
    sums: &'a mut [[[S::F; 2]; R]; W],
}

impl<S: Words, const W: usize, const R: usize> Products<'_, S, W, R> {
    /// The i-th of eight products. Both p of a lane are one chain, or one follows the other; a whole chain is scaled.
    /// # Safety
    /// A chunk of each input row is readable.
    #[inline(always)]
    unsafe fn add<B: Packed>(&mut self, i: usize) {
        let (s, shared) = (self.s, B::LAYOUT.shared());
        let (k, p) = if shared { (i, 0) } else { (i % 4 * 2 + i / 4, i / 4) };
        let mut q = [s.splat(0.0); W];
        for w in 0..W {
            q[w] = B::FIELDS.centred(s, self.weights[w].words, k);
        }
        for r in 0..R {
            // SAFETY: a chunk has eight vectors or more, and row r lies r strides further.
            let x = unsafe { s.load(self.x.add(r * self.stride + k * S::LANES)) };
            for w in 0..W {
                let part = &mut self.part[w][r];
                *part = if k == p { s.mul(q[w], x) } else { s.fma(q[w], x, *part) };
            }
        }
        if i == 7 || (i == 3 && !shared) {
            // SAFETY: the caller's promise.
            unsafe { self.scale::<B>(p) };
        }
    }

    /// # Safety
    /// That of [`Products::add`].
    #[inline(always)]
    unsafe fn scale<B: Packed>(&mut self, p: usize) {
        let s = self.s;
        for r in 0..R {
            for w in 0..W {
                let sum = &mut self.sums[w][r][p];
                *sum = s.fma(self.weights[w].scale[p], self.part[w][r], *sum);
            }
            if p < B::LAYOUT.vectors() - 8 {
                // SAFETY: the sums of inputs follow the eight vectors.
                let x = unsafe { s.load(self.x.add(r * self.stride + (8 + p) * S::LANES)) };
                for w in 0..W {
                    let sum = &mut self.sums[w][r][p];
                    *sum = s.fma(self.weights[w].minimum[p], x, *sum);
                }
            }
        }
    }
}

/// A plain number; inputs are taken as they come.
pub(super) trait Number: Copy + Send + Sync {
    const SIZE: usize;
    /// # Safety
    /// `p` is valid for reading `LANES` numbers; it need not be aligned.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F;
}

macro_rules! number {
    ($name:ident, $size:expr, $load:ident, $doc:expr) => {
        #[doc = $doc]
        #[derive(Debug, Clone, Copy)]
        pub(super) struct $name;

        impl Number for $name {
            const SIZE: usize = $size;
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
                // SAFETY: the caller's promise; loads need no alignment.
                unsafe { s.$load(p.cast()) }
            }
        }
    };
}
number!(F32, 4, load, "Binary32.");
number!(F16, 2, load_f16, "Binary16.");
number!(Bf16, 2, load_bf16, "The upper half of a binary32.");

/// A format of [`Number`]s.
#[derive(Clone, Copy)]
struct Numbers<S, N>(S, PhantomData<N>);

impl<S: Words, N: Number> Dots for Numbers<S, N> {
    type S = S;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }
    #[inline(always)]
    fn width(self, in_features: usize) -> usize {
        in_features
    }
    #[inline(always)]
    unsafe fn dots<const R: usize>(self, row: *const u8, x: Inputs) -> [S::F; R] {
        // SAFETY: the caller's promise is the callee's.
        unsafe { number_dots::<S, N, R>(self.0, row, x) }
    }
}

/// # Safety
/// That of [`Dots::dots`].
#[inline(always)]
unsafe fn number_dots<S: Simd, N: Number, const R: usize>(
    s: S,
    row: *const u8,
    x: Inputs,
) -> [S::F; R] {
    const SUMS: usize = 4;
    let mut sums = [[s.splat(0.0); SUMS]; R];
    let mut rest = [s.splat(0.0); R];
    let whole = x.in_features / S::LANES;
    let together = whole / SUMS * SUMS;
    for v in (0..together).step_by(SUMS) {
        for u in 0..SUMS {
            // SAFETY: vector v + u < whole lies inside the row and inside each input row.
            unsafe {
                let at = (v + u) * S::LANES;
                let weight = N::load(s, row.add(at * N::SIZE));
                for (r, sums) in sums.iter_mut().enumerate() {
                    sums[u] = s.fma(weight, s.load(x.data.add(r * x.stride + at)), sums[u]);
                }
            }
        }
    }
    for at in (together * S::LANES..x.in_features).step_by(S::LANES) {
        let left = (x.in_features - at).min(S::LANES);
        // SAFETY: `left` numbers are left in the row and in each input row; the copy makes a whole
        // vector of them.
        unsafe {
            let mut bytes = [0u8; 64];
            let from = row.add(at * N::SIZE);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), left * N::SIZE);
            let weight = N::load(s, bytes.as_ptr());
            for (r, rest) in rest.iter_mut().enumerate() {
                let x = s.load_part(x.data.add(r * x.stride + at), left);
                *rest = s.fma(weight, x, *rest);
            }
        }
    }
    std::array::from_fn(|r| {
        let [a, b, c, d] = sums[r];
        s.add(s.add(s.add(a, b), s.add(c, d)), rest[r])
    })
}
