//! Gradients of a projection y = x Wᵀ + b, with x `[rows, K]`, y `[rows, N]`, W `[N, K]`.
//!
//! ```text
//! d_x[r, k] = Σ_n d_y[r, n] · W[n, k]     d_W[n, k] = Σ_r d_y[r, n] · x[r, k]     d_b[n] = Σ_r d_y[r, n]
//! ```
//!
//! 4 · rows · N · K operations; W may be stored in any format and is never expanded as a whole, gradients
//! are f32. Both products run through the panels of the forward pass. Results are cut into blocks of up
//! to 384 × 256, each computed whole by one thread, in an order that no cut changes.
//!
//! With [`Activations`] other than f32, both factors of both products are rounded to pairs of bf16 where the level has an
//! instruction for them: twice as fast, with the error that [the module](super) states. Bias gradients are not rounded.

use super::project::{Activations, Input, Output, check_input, check_output};
use super::{Matrix, MatrixShape};
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::parallel::for_each_part;
use crate::simd::norm::add_column_sums;
use crate::simd::pairs;
use crate::simd::product::Form;
use crate::simd::projection::Columns;
use crate::simd::projection::dequantize::dequantize;
use crate::simd::projection::panel::{PanelCall, panel};
use crate::simd::projection::transpose::transpose;
use crate::simd::tile::PANEL;
use crate::tensor::Rows;
use crate::workspace::Workspace;
use std::ops::Range;

/// Numbers that are summed over in one run.
const DEPTH: usize = 256;
/// Rows of results that the kernel computes together.
const RUN: usize = 6;
/// The most rows of results that one left factor is laid out for.
const STRIP: usize = 16 * RUN;
/// The most strips of a block: they share the panels of its right factor.
const MOST_STRIPS: usize = 4;
/// Columns of results of a block: whole panels, and a multiple of every block length.
const BLOCK_COLUMNS: usize = 4 * PANEL;
/// A strip of the left factor, then the panels of the right factor, then a widened row of that, then its rows as cells.
const SCRATCH: usize = DEPTH * (STRIP + BLOCK_COLUMNS) + BLOCK_COLUMNS + DEPTH * CELLS;
/// Cells of a row of a block's right factor.
const CELLS: usize = BLOCK_COLUMNS / 2;
/// Less than this many multiplications are not worth waking threads for.
const SPLIT_PRODUCTS: usize = 2 << 20;

/// What a projection was, and the gradient that comes back for its result.
#[derive(Debug, Clone, Copy)]
pub struct ProjectionBackward<'a> {
    /// The matrix `[out_features, in_features]`.
    pub weights: Matrix<'a>,
    /// The inputs `[rows, in_features]`; read for the gradient of the weights only.
    pub x: Input<'a>,
    /// The gradient of the results, `[rows, out_features]`.
    pub d_y: Input<'a>,
}

/// Where the gradients of a projection go.
#[derive(Debug, Default)]
pub struct ProjectionGradients<'a> {
    /// Of the inputs, `[rows, in_features]`.
    pub d_x: Gradient<Output<'a>>,
    /// Of the weights, `[out_features, in_features]`, row-major.
    pub d_weights: Gradient<&'a mut [f32]>,
    /// Of the bias, `[out_features]`.
    pub d_bias: Gradient<&'a mut [f32]>,
}

/// Bytes of workspace that [`project_backward`] needs, whatever the matrix.
pub fn backward_workspace_bytes(cpu: Cpu) -> usize {
    (4 * SCRATCH).saturating_mul(cpu.threads.count())
}

/// The gradients of one projection, those that are asked for.
///
/// The same numbers give the same bits for every number of threads. One thread allocates nothing.
///
/// # Errors
/// [`Error::BufferLength`], [`Error::LengthMismatch`] or [`Error::OverlappingOutput`] if rows or gradients do
/// not fit their buffers or each other; [`Error::WorkspaceTooSmall`] if `workspace` holds less than
/// [`backward_workspace_bytes`]. Nothing has been written then.
///
/// ```
/// use foveal::projection::{
///     Input, Matrix, MatrixShape, ProjectionBackward, ProjectionGradients, backward_workspace_bytes,
///     project_backward,
/// };
/// use foveal::{Cpu, Gradient, Workspace};
///
/// let shape = MatrixShape { out_features: 2, in_features: 2 };
/// let weights = Matrix::from_floats(shape, &[1.0, 2.0, 3.0, 4.0])?;
/// let x = Input { data: &[1.0, 10.0], rows: 1, stride: 2 };
/// let d_y = Input { data: &[1.0, -1.0], rows: 1, stride: 2 };
/// let mut d_weights = [0.0; 4];
/// let gradients =
///     ProjectionGradients { d_weights: Gradient::Add(&mut d_weights), ..Default::default() };
/// let cpu = Cpu::detect()?;
/// let mut workspace = Workspace::new();
/// workspace.reserve(backward_workspace_bytes(cpu));
/// project_backward(ProjectionBackward { weights, x, d_y }, gradients, cpu, &mut workspace)?;
/// assert_eq!(d_weights, [1.0, 10.0, -1.0, -10.0]);
/// # Ok::<(), foveal::Error>(())
/// ```
pub fn project_backward(
    projection: ProjectionBackward<'_>,
    gradients: ProjectionGradients<'_>,
    cpu: Cpu,
    workspace: &mut Workspace,
) -> Result<()> {
    project_backward_as(projection, gradients, (cpu, Activations::F32), workspace)
}

/// [`project_backward`] with factors that are rounded first.
///
/// # Errors
/// Those of [`project_backward`].
pub fn project_backward_as(
    projection: ProjectionBackward<'_>,
    gradients: ProjectionGradients<'_>,
    (cpu, activations): (Cpu, Activations),
    workspace: &mut Workspace,
) -> Result<()> {
    check(&projection, &gradients)?;
    let form = activations.form(cpu.level);
    let scratch = workspace.floats(backward_workspace_bytes(cpu) / 4)?;
    let ProjectionBackward { weights, x, d_y } = projection;
    let MatrixShape { out_features, in_features } = weights.shape();
    if let Some((Output { data, stride }, add)) = gradients.d_x.into_place() {
        let out = Columns::new(data, d_y.rows, in_features, stride).expect("checked before");
        let sizes = Sizes { rows: d_y.rows, columns: in_features, depth: out_features };
        let (left, right) = (Left::Rows(d_y), Right::Stored(weights));
        Product { left, right, sizes, out, add, form }.run(cpu, scratch);
    }
    if let Some((data, add)) = gradients.d_weights.into_place() {
        let out = Columns::new(data, out_features, in_features, in_features);
        let sizes = Sizes { rows: out_features, columns: in_features, depth: d_y.rows };
        let (left, right) = (Left::Columns(d_y), Right::Rows(x));
        let out = out.expect("checked before");
        Product { left, right, sizes, out, add, form }.run(cpu, scratch);
    }
    if let Some((d_bias, add)) = gradients.d_bias.into_place() {
        if !add {
            d_bias.fill(0.0);
        }
        let rows = Rows::new(d_y.data, d_y.stride, d_y.rows, out_features)?;
        add_column_sums(cpu.level, rows, d_bias);
    }
    Ok(())
}

fn check(projection: &ProjectionBackward<'_>, gradients: &ProjectionGradients<'_>) -> Result<()> {
    let ProjectionBackward { weights, x, d_y } = projection;
    let MatrixShape { out_features, in_features } = weights.shape();
    check_input("gradient of projection results", *d_y, out_features)?;
    if let Some(d_x) = gradients.d_x.place() {
        check_output("gradient of projection inputs", d_x, d_y.rows, in_features)?;
    }
    if let Some(d_weights) = gradients.d_weights.place() {
        check_input("projection input", *x, in_features)?;
        let what = "rows of a projection's input and of its result's gradient";
        same(what, d_y.rows, x.rows)?;
        same("gradient of projection weights", out_features * in_features, d_weights.len())?;
    }
    match gradients.d_bias.place() {
        Some(d_bias) => same("gradient of a projection's bias", out_features, d_bias.len()),
        None => Ok(()),
    }
}

fn same(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::LengthMismatch { what, expected, got }) }
}

#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    columns: usize,
    depth: usize,
}

/// The left factor A of a product, `[rows, depth]`.
#[derive(Clone, Copy)]
enum Left<'a> {
    Rows(Input<'a>),
    /// Stored transposed: column m of the input is row m of A.
    Columns(Input<'a>),
}

/// The right factor B of a product, `[depth, columns]`.
#[derive(Clone, Copy)]
enum Right<'a> {
    Rows(Input<'a>),
    Stored(Matrix<'a>),
}

/// Rows of a block of results, of which `across` lie side by side: as many as share a right factor well, and so that all
/// threads have the same number of equal blocks. So none waits for the last.
fn block_rows(rows: usize, across: usize, threads: usize) -> usize {
    if threads == 1 {
        return MOST_STRIPS * STRIP;
    }
    let (least, most) = (rows.div_ceil(MOST_STRIPS * STRIP), rows.div_ceil(STRIP / 2));
    let fair = |down: &usize| (down * across).is_multiple_of(threads);
    even(rows, (least..=most).find(fair).unwrap_or(most))
}

/// Rows of each of so many equal parts: whole runs of the kernel.
fn even(rows: usize, parts: usize) -> usize {
    rows.div_ceil(parts.max(1)).max(1).next_multiple_of(RUN)
}

/// C\[m, n\] = Σ_k A\[m, k\] · B\[k, n\], or added to what C holds.
struct Product<'a> {
    left: Left<'a>,
    right: Right<'a>,
    sizes: Sizes,
    out: Columns<'a>,
    add: bool,
    form: Form,
}

impl Product<'_> {
    fn run(&self, cpu: Cpu, scratch: &mut [f32]) {
        let Sizes { rows, columns, depth } = self.sizes;
        let split = rows.saturating_mul(columns).saturating_mul(depth) >= SPLIT_PRODUCTS;
        let threads = if split { cpu.threads.count() } else { 1 };
        let across = columns.div_ceil(BLOCK_COLUMNS);
        let block = block_rows(rows, across, threads);
        let parts = rows.div_ceil(block) * across;
        let work = |part: usize, scratch: &mut &mut [f32]| {
            let (row, column) = (part / across * block, part % across * BLOCK_COLUMNS);
            let rows = row..rows.min(row + block);
            self.block(rows, column..columns.min(column + BLOCK_COLUMNS), scratch);
        };
        let threads = threads.min(parts).max(1);
        for_each_part(parts, scratch.chunks_exact_mut(SCRATCH).take(threads), work);
    }

    fn block(&self, rows: Range<usize>, columns: Range<usize>, scratch: &mut [f32]) {
        let strip = even(rows.len(), rows.len().div_ceil(STRIP));
        let (left, rest) = scratch.split_at_mut(DEPTH * STRIP);
        let (panels, rest) = rest.split_at_mut(DEPTH * BLOCK_COLUMNS);
        // A product over nothing still has results, zeros.
        for start in (0..self.sizes.depth.max(1)).step_by(DEPTH) {
            let depth = start..self.sizes.depth.min(start + DEPTH);
            self.right_panels(depth.clone(), columns.clone(), panels, rest);
            for first in rows.clone().step_by(strip) {
                let rows = first..rows.end.min(first + strip);
                let (x, x_stride) = self.left_cells(rows.clone(), depth.clone(), left);
                let starts = columns.clone().step_by(PANEL);
                for (start, weights) in starts.zip(panels.chunks_exact(DEPTH * PANEL)) {
                    let call = PanelCall {
                        x,
                        x_stride,
                        depth: self.form.cells(depth.len()),
                        weights,
                        out: &self.out,
                        rows: rows.clone(),
                        columns: start..columns.end.min(start + PANEL),
                        add: self.add || depth.start > 0,
                    };
                    panel(self.form, &call);
                }
            }
        }
    }

    /// Packs a run of the right factor into panels of cells.
    fn right_panels(
        &self,
        depth: Range<usize>,
        columns: Range<usize>,
        panels: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (widened, rounded) = scratch.split_at_mut(BLOCK_COLUMNS);
        let count = depth.len();
        for (at, k) in depth.enumerate() {
            let row = self.right_row(k, columns.clone(), widened);
            match self.form {
                Form::Numbers(_) => spread(row, &mut panels[at * PANEL..]),
                Form::Pairs(token) => {
                    for (part, cells) in
                        row.chunks(PANEL).zip(rounded.chunks_mut(DEPTH * PANEL / 2))
                    {
                        let cells = &mut cells[at * PANEL / 2..(at + 1) * PANEL / 2];
                        let (filled, rest) = cells.split_at_mut(part.len().div_ceil(2));
                        pairs::round_row(token, part, filled);
                        rest.fill(0.0);
                    }
                }
            }
        }
        let Form::Pairs(token) = self.form else { return };
        let all = columns.len().div_ceil(PANEL);
        let rounded = rounded.chunks(DEPTH * PANEL / 2).take(all);
        for (cells, panel) in rounded.zip(panels.chunks_exact_mut(DEPTH * PANEL)) {
            let rows = Rows::new(cells, PANEL / 2, count, PANEL / 2).expect("rows of cells");
            pairs::pack_rows(token, rows, PANEL, &mut panel[..count.div_ceil(2) * PANEL]);
        }
    }

    /// Rows of cells of the left factor from `depth.start` on, and their stride.
    fn left_cells<'a>(
        &'a self,
        rows: Range<usize>,
        depth: Range<usize>,
        scratch: &'a mut [f32],
    ) -> (&'a [f32], usize) {
        let level = self.form.level();
        let width = depth.len();
        match (self.left, self.form) {
            _ if depth.is_empty() => (&[], 0),
            (Left::Rows(x), Form::Numbers(_)) => {
                (&x.data[rows.start * x.stride + depth.start..], x.stride)
            }
            (Left::Rows(x), Form::Pairs(token)) => {
                for (row, cells) in rows.zip(scratch.chunks_exact_mut(DEPTH)) {
                    let row = &x.data[row * x.stride..][depth.clone()];
                    pairs::round_row(token, row, &mut cells[..width.div_ceil(2)]);
                }
                (scratch, DEPTH)
            }
            (Left::Columns(x), form) => {
                let first = &x.data[depth.start * x.stride + rows.start..];
                let block = Rows::new(first, x.stride, width, rows.len());
                transpose(level, block.expect("checked before"), scratch, DEPTH);
                if let Form::Pairs(token) = form {
                    let mut numbers = [0.0; DEPTH];
                    for cells in scratch.chunks_exact_mut(DEPTH).take(rows.len()) {
                        numbers[..width].copy_from_slice(&cells[..width]);
                        pairs::round_row(token, &numbers[..width], &mut cells[..width.div_ceil(2)]);
                    }
                }
                (scratch, DEPTH)
            }
        }
    }

    /// Some columns of row `k` of the right factor.
    fn right_row<'a>(
        &'a self,
        k: usize,
        columns: Range<usize>,
        widened: &'a mut [f32],
    ) -> &'a [f32] {
        match self.right {
            Right::Rows(x) => &x.data[k * x.stride..][columns],
            Right::Stored(matrix) => {
                let format = matrix.format();
                let bytes = |k: usize| k / format.block_len() * format.block_bytes();
                let row = &matrix.rows(k..k + 1)[bytes(columns.start)..bytes(columns.end)];
                let widened = &mut widened[..columns.len()];
                dequantize(self.form.level(), format, row, widened);
                widened
            }
        }
    }
}

/// Puts a row into its place in each panel; the missing numbers of the last one become zero.
fn spread(row: &[f32], panels: &mut [f32]) {
    for (part, panel) in row.chunks(PANEL).zip(panels.chunks_mut(DEPTH * PANEL)) {
        let (filled, rest) = panel[..PANEL].split_at_mut(part.len());
        filled.copy_from_slice(part);
        rest.fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_get_the_same_number_of_equal_blocks() {
        for (threads, rows, across) in [
            (2, 256, 1),
            (2, 256, 4),
            (2, 1024, 1),
            (2, 2048, 1),
            (2, 2048, 5),
            (3, 4096, 1),
            (4, 8192, 4),
            (8, 1024, 1),
            (16, 4096, 3),
        ] {
            let block = block_rows(rows, across, threads);
            assert!(block <= MOST_STRIPS * STRIP + RUN && block.is_multiple_of(RUN));
            let down = rows.div_ceil(block);
            assert!((down * across).is_multiple_of(threads), "{rows} {across} {threads}");
            let last = rows - (down - 1) * block;
            assert!(last + down * RUN >= block, "{rows} {across} {threads}: {last} of {block}");
        }
        // Few rows are cut as far as is worth it.
        assert_eq!(block_rows(256, 1, 8), 48);
        assert_eq!(block_rows(0, 1, 2), RUN);
        assert_eq!(block_rows(5, 3, 4), RUN);
        assert_eq!(even(256, 256usize.div_ceil(STRIP)), 90);
    }
}
