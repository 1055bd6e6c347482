//! Matrix products by the crate `gemm-f32`, behind a face that checks lengths.

use gemm_common::Parallelism;

/// Rows of a matrix, `stride` numbers apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) count: usize,
    pub(crate) width: usize,
    pub(crate) stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows one after the other.
    pub(crate) fn dense(data: &'a [f32], width: usize) -> Rows<'a> {
        Rows { data, count: data.len() / width, width, stride: width }
    }

    /// A copy with rows one after the other.
    pub(crate) fn gather<'b>(&self, room: &'b mut [f32]) -> Rows<'b> {
        let room = &mut room[..self.count * self.width];
        for (i, to) in room.chunks_exact_mut(self.width).enumerate() {
            to.copy_from_slice(self.row(i));
        }
        Rows::dense(room, self.width)
    }

    /// One row.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.width]
    }
}

/// The right side of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    Plain(Rows<'a>),
    Transposed(Rows<'a>),
}

/// `out = a · b`, dense, on `threads` threads.
pub(crate) fn multiply(a: Rows<'_>, b: Right<'_>, out: &mut [f32], threads: usize) {
    let parallel = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    let (columns, depth, row_stride, column_stride, b) = match b {
        Right::Plain(b) => (b.width, b.count, b.stride, 1, b),
        Right::Transposed(b) => (b.count, b.width, 1, b.stride, b),
    };
    assert!(a.width == depth && out.len() >= a.count * columns);
    for x in [a, b] {
        assert!(x.data.len() >= x.count.saturating_sub(1) * x.stride + x.width);
    }
    // The product's transpose, because the crate prefers columns.
    // SAFETY: both operands hold all of their rows, and `out`, which is borrowed exclusively and not
    // read, holds the product.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            columns,
            a.count,
            depth,
            out.as_mut_ptr(),
            columns as isize,
            1,
            false,
            b.data.as_ptr(),
            row_stride as isize,
            column_stride as isize,
            a.data.as_ptr(),
            a.stride as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallel,
        );
    }
}

/// `out[rows, n] = x[rows, k] · w[n, k]ᵀ`: the product of a projection with a widened matrix.
pub(crate) fn project(x: &[f32], w: &[f32], width: usize, out: &mut [f32], threads: usize) {
    let w = Right::Transposed(Rows::dense(w, width));
    multiply(Rows::dense(x, width), w, out, threads);
}
