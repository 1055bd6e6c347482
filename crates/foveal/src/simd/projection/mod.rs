//! Matrix kernels over stored weights: rows for few inputs, panels for many.
//!
//! [`rows`] computes y\[r, n\] = Σ_k W\[n, k\] x\[r, k\] one weight row after the other, each read from
//! end to end and widened in registers. [`panel`](panel::panel) does it for 64 weight rows that were widened and
//! transposed beforehand. Stored bytes are little-endian.

mod blocks;
pub(crate) mod dequantize;
mod integers;
pub(crate) mod panel;
mod row;
pub(crate) mod transpose;

use super::product::dispatch_pairs;
use super::words::{ByteProduct, Words};
use super::{Kind, Level, Pairs, Simd, dispatch};
use crate::projection::Format;
use blocks::Layout;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of results that several threads fill, each its own columns.
#[derive(Debug)]
pub(crate) struct Columns<'a> {
    data: *mut f32,
    rows: usize,
    width: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: `part`'s contract gives every range of columns to one user at a time.
unsafe impl Sync for Columns<'_> {}
// SAFETY: as above; the exclusive borrow lives as long as this view.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// Views `rows` rows of `width` numbers, `stride` apart, or `None` if they overlap or leave
    /// `data`.
    pub(crate) fn new(
        data: &'a mut [f32],
        rows: usize,
        width: usize,
        stride: usize,
    ) -> Option<Self> {
        if rows > 0 && width > 0 {
            let needed = (rows - 1).checked_mul(stride)?.checked_add(width)?;
            if needed > data.len() || (rows > 1 && stride < width) {
                return None;
            }
        }
        Some(Columns { data: data.as_mut_ptr(), rows, width, stride, lifetime: PhantomData })
    }

    /// # Safety
    /// No other reference to these columns of this row is alive.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: the constructor checked that rows of `width` numbers lie inside the buffer; the
        // caller promises that this part is not aliased.
        unsafe {
            let at = self.data.add(row * self.stride + columns.start);
            std::slice::from_raw_parts_mut(at, columns.len())
        }
    }
}

/// The bytes of numbers in memory, which are those of a stored F32 row.
pub(crate) fn bytes_of(numbers: &[f32]) -> &[u8] {
    // SAFETY: the bytes are those of the slice, all of them are initialised, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), std::mem::size_of_val(numbers)) }
}

/// What [`rows`] reads and writes.
#[derive(Debug, Clone)]
pub(crate) struct RowCall<'a> {
    /// The weight rows of this part, one after the other.
    pub(crate) weights: &'a [u8],
    /// Bytes of a weight row.
    pub(crate) row_bytes: usize,
    /// Elements of a weight row.
    pub(crate) in_features: usize,
    /// Input rows: packed by [`pack`] where [`packed_len`] is not 0, as they come otherwise.
    pub(crate) x: &'a [f32],
    /// Numbers from one input row to the next.
    pub(crate) x_stride: usize,
    /// Input rows.
    pub(crate) rows: usize,
    /// Results.
    pub(crate) out: &'a Columns<'a>,
    /// The columns of results that belong to the weight rows; they are this call's alone.
    pub(crate) columns: Range<usize>,
}

/// What row kernels take their inputs for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowInputs {
    /// Numbers.
    Numbers(Level),
    /// 8-bit integers with a scale for each 32, where the weights are integers too.
    Integers(Pairs),
}

impl RowInputs {
    /// Integers if they are wanted and there are weights and instructions for them.
    pub(crate) fn new(level: Level, integers: bool, format: Format) -> RowInputs {
        match level.pairs() {
            Some(pairs) if integers && blocks::layout(format).is_some() => {
                RowInputs::Integers(pairs)
            }
            _ => RowInputs::Numbers(level),
        }
    }
}

/// Products of weight rows with up to 64 input rows. Sums run in one order that depends on the
/// format, the kind of inputs, the level and `in_features` only.
pub(crate) fn rows(inputs: RowInputs, format: Format, call: RowCall<'_>) {
    match inputs {
        RowInputs::Numbers(level) => rows_of_numbers(level, format, call),
        RowInputs::Integers(pairs) => rows_of_integers(pairs, format, call),
    }
}

fn rows_of_integers(pairs: Pairs, format: Format, call: RowCall<'_>) {
    use blocks::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
    use integers::run;
    match format {
        Format::F32 | Format::F16 | Format::BF16 => unreachable!("numbers have no integers"),
        Format::Q8_0 => run(pairs, Q8_0, call),
        Format::Q4_0 => run(pairs, Q4_0, call),
        Format::Q4_1 => run(pairs, Q4_1, call),
        Format::Q5_0 => run(pairs, Q5_0, call),
        Format::Q5_1 => run(pairs, Q5_1, call),
        Format::Q4_K => run(pairs, Q4_K, call),
        Format::Q5_K => run(pairs, Q5_K, call),
        Format::Q6_K => run(pairs, Q6_K, call),
    }
}

fn rows_of_numbers(level: Level, format: Format, call: RowCall<'_>) {
    use blocks::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
    use row::{Bf16, F16, F32, run, run_packed};
    match format {
        Format::F32 => run(level, F32, call),
        Format::F16 => run(level, F16, call),
        Format::BF16 => run(level, Bf16, call),
        Format::Q8_0 => run_packed(level, Q8_0, call),
        Format::Q4_0 => run_packed(level, Q4_0, call),
        Format::Q4_1 => run_packed(level, Q4_1, call),
        Format::Q5_0 => run_packed(level, Q5_0, call),
        Format::Q5_1 => run_packed(level, Q5_1, call),
        Format::Q4_K => run_packed(level, Q4_K, call),
        Format::Q5_K => run_packed(level, Q5_K, call),
        Format::Q6_K => run_packed(level, Q6_K, call),
    }
}

/// Numbers of one packed input row; 0 for formats that take inputs as they come.
pub(crate) fn packed_len(inputs: RowInputs, format: Format, in_features: usize) -> usize {
    let Some(layout) = blocks::layout(format) else { return 0 };
    match inputs {
        RowInputs::Numbers(level) => layout.packed_len(in_features, lanes(level)),
        RowInputs::Integers(pairs) => {
            layout.packed_integers_len(in_features, lanes(Level::of(pairs)))
        }
    }
}

fn lanes(level: Level) -> usize {
    match level.kind() {
        Kind::Portable(_) => super::Portable::LANES,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(_) => super::Avx2::LANES,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(_) | Kind::Avx512Bf16(_) => super::Avx512::LANES,
    }
}

/// Packs input rows for a format whose [`packed_len`] is not 0; each of `out` is as long as that.
pub(crate) fn pack<'a>(
    inputs: RowInputs,
    format: Format,
    x: impl Iterator<Item = &'a [f32]>,
    out: std::slice::ChunksExactMut<'_, f32>,
) {
    let layout = blocks::layout(format).expect("a packed format");
    match inputs {
        RowInputs::Numbers(level) => {
            let order = layout.order(lanes(level));
            x.zip(out).for_each(|(x, out)| pack_numbers(level, layout, &order, x, out));
        }
        RowInputs::Integers(pairs) => {
            x.zip(out).for_each(|(x, out)| pack_integers(pairs, layout, x, out));
        }
    }
}

dispatch! {
    fn pack_numbers(layout: Layout, order: &blocks::Order, x: &[f32], out: &mut [f32])
        = pack_numbers_kernel
}

#[inline(always)]
fn pack_numbers_kernel<S: Words>(
    _: S,
    layout: Layout,
    order: &blocks::Order,
    x: &[f32],
    out: &mut [f32],
) {
    layout.pack::<S>(order, x, out);
}

dispatch_pairs! {
    fn pack_integers(layout: Layout, x: &[f32], out: &mut [f32]) = pack_integers_kernel
}

#[inline(always)]
fn pack_integers_kernel<P: ByteProduct>(_: P, layout: Layout, x: &[f32], out: &mut [f32]) {
    layout.pack_integers::<P::S>(x, out);
}
