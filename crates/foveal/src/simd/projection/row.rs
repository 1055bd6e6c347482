//! One weight row after the other, against one to four input rows in registers.
//!
//! The operations of an input row are the same whatever rows are beside it, so that its sums are
//! too.

use super::RowCall;
use super::blocks::{Chunk, Packed};
use crate::simd::words::Words;
use crate::simd::{Simd, dispatch};
use std::marker::PhantomData;
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
    let mut lanes = [[s.splat(0.0); TOGETHER]; R];
    for (j, n) in weights.clone().enumerate() {
        let weight = &call.weights[n * call.row_bytes..][..call.row_bytes];
        // SAFETY: a whole weight row, and rows row..row + R of the input, which `project` checked.
        let sums = unsafe { dots.dots::<R>(weight.as_ptr(), x) };
        for (lanes, dot) in lanes.iter_mut().zip(sums) {
            lanes[j] = dot;
        }
    }
    write(s, call, weights, row, &lanes);
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
        let s = self.0;
        let mut sums = [[s.splat(0.0); 2]; R];
        let (whole, rest) = (x.in_features / (8 * S::LANES), x.in_features % (8 * S::LANES));
        for n in 0..whole {
            // SAFETY: chunk n < whole is all there, and the caller's promise.
            unsafe {
                add_chunk::<S, B, R>(s, B::chunk(s, row, n, S::LANES / 4), n, x, &mut sums);
            }
        }
        if rest > 0 {
            // SAFETY: the last chunk has `rest` weights, and the caller's promise.
            unsafe {
                add_chunk::<S, B, R>(s, B::chunk(s, row, whole, rest / 32), whole, x, &mut sums);
            }
        }
        sums.map(|[even, odd]| s.add(even, odd))
    }
}

/// # Safety
/// `x` is valid for reading chunk number `chunk` of R packed input rows.
#[inline(always)]
unsafe fn add_chunk<S: Words, B: Packed, const R: usize>(
    s: S,
    weights: Chunk<S>,
    chunk: usize,
    x: Inputs,
    sums: &mut [[S::F; 2]; R],
) {
    let vectors = B::LAYOUT.vectors();
    let q = B::FIELDS.centred(s, weights.words);
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: a packed chunk has `vectors` vectors, and row r lies r strides further.
        let x = |k: usize| unsafe {
            s.load(x.data.add(r * x.stride + (chunk * vectors + k) * S::LANES))
        };
        if B::LAYOUT.shared() {
            let mut part = s.mul(q[0], x(0));
            for k in 1..8 {
                part = s.fma(q[k], x(k), part);
            }
            sums[0] = s.fma(weights.scale[0], part, sums[0]);
            if vectors > 8 {
                sums[0] = s.fma(weights.minimum[0], x(8), sums[0]);
            }
            continue;
        }
        for (p, sum) in sums.iter_mut().enumerate() {
            let mut part = s.mul(q[p], x(p));
            for c in 1..4 {
                part = s.fma(q[2 * c + p], x(2 * c + p), part);
            }
            *sum = s.fma(weights.scale[p], part, *sum);
            if p < vectors - 8 {
                *sum = s.fma(weights.minimum[p], x(8 + p), *sum);
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
