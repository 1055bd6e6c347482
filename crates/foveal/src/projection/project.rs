//! Matrix times rows of activations: checks, packing of inputs, and the split over threads.
//!
//! Work is cut at fixed rows of the matrices: into runs of about 32 KiB for generated rows, into
//! panels of 64 for prompts. A result is computed whole by one thread, in an order that no cut
//! changes.

use super::{Format, Matrix, MatrixShape};
use crate::cpu::{Cpu, MAX_GENERATED_ROWS, Phase};
use crate::error::{Error, Result};
use crate::parallel::for_each_part;
use crate::simd::product::Form;
use crate::simd::projection::dequantize::dequantize;
use crate::simd::projection::panel::{PanelCall, panel};
use crate::simd::projection::{Columns, RowCall, RowInputs, pack, packed_len, rows};
use crate::simd::tile::{PANEL, pack_keys};
use crate::simd::{Level, pairs};
use crate::tensor::{Rows, Shape};
use crate::workspace::Workspace;
use std::ops::Range;

/// Input columns of a panel; a multiple of every block length.
const DEPTH: usize = 256;
/// Widened rows, then the panel.
const PANEL_SCRATCH: usize = 2 * PANEL * DEPTH;
/// Stored bytes of a part, for generated rows.
const PART_BYTES: usize = 32 << 10;
/// Less than this many stored bytes times rows are not worth waking threads for.
const SPLIT_BYTES: usize = 192 << 10;
/// Less than this many multiplications are not worth waking threads for.
const SPLIT_PRODUCTS: usize = 2 << 20;
/// Matrices that share one parallel region.
const TOGETHER: usize = 8;

/// Rows of activations: `rows` of them, `stride` numbers apart, as wide as the matrix asks for.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// How many rows.
    pub rows: usize,
    /// Numbers from one row to the next; rows may overlap.
    pub stride: usize,
}

/// Rows of results, as many as the input has, `stride` numbers apart.
#[derive(Debug)]
pub struct Output<'a> {
    /// The numbers; those between rows are left alone.
    pub data: &'a mut [f32],
    /// Numbers from one row to the next; at least `out_features`.
    pub stride: usize,
}

/// One matrix and where its results go.
#[derive(Debug)]
pub struct Projection<'a> {
    /// The matrix `[out_features, in_features]`.
    pub weights: Matrix<'a>,
    /// The results `[rows, out_features]`.
    pub output: Output<'a>,
}

/// How a projection runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Which kernels: they add up in different orders.
    pub phase: Phase,
    /// Which instructions and how many threads.
    pub cpu: Cpu,
    /// What inputs are rounded to before they are multiplied.
    pub activations: Activations,
}

/// What the rows of a projection's input are rounded to, each row for itself. Sums and results are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Activations {
    /// Nothing: products are those of f32.
    #[default]
    F32,
    /// Prompts multiply bf16, weights too, where the level has an instruction for it: twice as fast. Generated rows
    /// multiply f32.
    Bf16,
    /// As [`Bf16`](Activations::Bf16), and generated rows meet weights of 4 to 8 bits as 8-bit integers with a scale for
    /// 32 neighbours, where the level has an instruction for it.
    Int8,
}

impl Activations {
    /// All of them, the most exact first.
    pub const ALL: [Activations; 3] = [Activations::F32, Activations::Bf16, Activations::Int8];

    /// `f32`, `bf16` or `int8`.
    pub const fn name(self) -> &'static str {
        match self {
            Activations::F32 => "f32",
            Activations::Bf16 => "bf16",
            Activations::Int8 => "int8",
        }
    }

    /// What many rows are multiplied as.
    pub(super) fn form(self, level: Level) -> Form {
        match (self, level.pairs()) {
            (Activations::F32, _) | (_, None) => Form::Numbers(level),
            (Activations::Bf16 | Activations::Int8, Some(pairs)) => Form::Pairs(pairs),
        }
    }

    /// Those of this name.
    pub fn named(name: &str) -> Option<Activations> {
        Activations::ALL.into_iter().find(|activations| activations.name() == name)
    }
}

impl Call {
    fn form(&self) -> Form {
        self.activations.form(self.cpu.level)
    }

    fn row_inputs(&self, format: Format) -> RowInputs {
        RowInputs::new(self.cpu.level, self.activations == Activations::Int8, format)
    }
}

/// Bytes of workspace that [`project_many`] needs for these matrices and this many input rows.
pub fn workspace_bytes(weights: &[Matrix<'_>], rows: usize, call: Call) -> usize {
    weights.iter().fold(0, |sum, matrix| grown(sum, matrix, rows, call)).saturating_mul(4)
}

/// Numbers of workspace with one more matrix: scratch for every thread, or one more packed input.
fn grown(floats: usize, matrix: &Matrix<'_>, rows: usize, call: Call) -> usize {
    match call.phase {
        Phase::Prompt => {
            let scratch = PANEL_SCRATCH.saturating_mul(call.cpu.threads.count());
            scratch.saturating_add(cells_len(call.form(), rows, matrix.shape().in_features))
        }
        Phase::Generated => {
            let format = matrix.format();
            let row = packed_len(call.row_inputs(format), format, matrix.shape().in_features);
            floats.saturating_add(row.saturating_mul(rows))
        }
    }
}

/// Numbers of memory for the cells of a prompt's rows; numbers are their own cells.
fn cells_len(form: Form, rows: usize, width: usize) -> usize {
    match form {
        Form::Numbers(_) => 0,
        Form::Pairs(_) => rows.saturating_mul(form.cells(width)),
    }
}

/// y\[r, n\] = Σ_k W\[n, k\] · x\[r, k\] for every row r of `x`.
///
/// A row's result depends on the row, the matrix, the phase, the level and the activations, and on nothing else: not
/// on the other rows, nor on threads. One thread allocates nothing.
///
/// # Errors
/// [`Error::BufferLength`] or [`Error::OverlappingOutput`] if rows do not fit their buffers;
/// [`Error::TooManyRows`] for more than 64 generated rows; [`Error::WorkspaceTooSmall`] if
/// `workspace` holds less than [`workspace_bytes`]. Nothing has been written then.
///
/// ```
/// use foveal::projection::{Activations, Call, Format, Input, Matrix, MatrixShape, Output, project};
/// use foveal::{Cpu, Phase, Workspace};
///
/// let bytes: Vec<u8> = [1f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
/// let shape = MatrixShape { out_features: 2, in_features: 2 };
/// let weights = Matrix::new(Format::F32, shape, &bytes)?;
/// let mut y = [0.0; 2];
/// let activations = Activations::F32;
/// let call = Call { phase: Phase::Generated, cpu: Cpu::detect()?, activations };
/// let x = Input { data: &[1.0, 10.0], rows: 1, stride: 2 };
/// project(&weights, x, Output { data: &mut y, stride: 2 }, call, &mut Workspace::new())?;
/// assert_eq!(y, [21.0, 43.0]);
/// # Ok::<(), foveal::Error>(())
/// ```
pub fn project(
    weights: &Matrix<'_>,
    x: Input<'_>,
    output: Output<'_>,
    call: Call,
    workspace: &mut Workspace,
) -> Result<()> {
    project_many(&mut [Projection { weights: *weights, output }], x, call, workspace)
}

/// [`project`] for several matrices of one input (queries, keys and values; gate and up), whose
/// work threads share out together. The results are those of separate calls, bit for bit.
///
/// # Errors
/// Those of [`project`]; [`Error::LengthMismatch`] if the matrices differ in `in_features`.
/// Nothing has been written then.
pub fn project_many(
    projections: &mut [Projection<'_>],
    x: Input<'_>,
    call: Call,
    workspace: &mut Workspace,
) -> Result<()> {
    let Some(first) = projections.first() else { return Ok(()) };
    let width = first.weights.shape().in_features;
    check_input("projection input", x, width)?;
    if call.phase == Phase::Generated && x.rows > MAX_GENERATED_ROWS {
        return Err(Error::TooManyRows { got: x.rows, limit: MAX_GENERATED_ROWS });
    }
    let mut needed = 0;
    for projection in &*projections {
        check_projection(projection, x.rows, width)?;
        needed = grown(needed, &projection.weights, x.rows, call);
    }
    let mut floats = workspace.floats(needed)?;
    if x.rows == 0 {
        return Ok(());
    }
    if call.phase == Phase::Prompt {
        let (cells, scratch) = floats.split_at_mut(cells_len(call.form(), x.rows, width));
        let x = as_cells(call.form(), x, width, cells);
        projections.chunks_mut(TOGETHER).for_each(|region| prompt(region, x, call, scratch));
        return Ok(());
    }
    for region in projections.chunks_mut(TOGETHER) {
        let used = region.iter().fold(0, |n, p| grown(n, &p.weights, x.rows, call));
        let (packed, rest) = floats.split_at_mut(used);
        generated(region, x, call, packed);
        floats = rest;
    }
    Ok(())
}

pub(super) fn check_input(what: &'static str, x: Input<'_>, width: usize) -> Result<()> {
    let (expected, got) = (span(x.rows, x.stride, width), x.data.len());
    if got < expected {
        return Err(Error::BufferLength { what, expected, got });
    }
    Ok(())
}

pub(super) fn check_output(
    what: &'static str,
    output: &Output<'_>,
    rows: usize,
    width: usize,
) -> Result<()> {
    if rows > 1 && output.stride < width {
        let shape = Shape { batch: 1, seq: rows, heads: 1, dim: width };
        return Err(Error::OverlappingOutput { shape });
    }
    let (expected, got) = (span(rows, output.stride, width), output.data.len());
    if got < expected {
        return Err(Error::BufferLength { what, expected, got });
    }
    Ok(())
}

/// Numbers from the first of `rows` rows to the end of the last.
fn span(rows: usize, stride: usize, width: usize) -> usize {
    match rows {
        0 => 0,
        _ => (rows - 1).saturating_mul(stride).saturating_add(width),
    }
}

fn check_projection(projection: &Projection<'_>, rows: usize, width: usize) -> Result<()> {
    let MatrixShape { out_features, in_features } = projection.weights.shape();
    if in_features != width {
        let what = "in_features of matrices with one input";
        return Err(Error::LengthMismatch { what, expected: width, got: in_features });
    }
    check_output("projection output", &projection.output, rows, out_features)
}

/// A matrix of a region, cut into parts of `part_rows` rows.
struct Job<'a> {
    weights: Matrix<'a>,
    out: Columns<'a>,
    /// The input as the row kernels take it.
    x: Input<'a>,
    part_rows: usize,
}

impl<'a> Job<'a> {
    fn new(projection: &'a mut Projection<'_>, x: Input<'a>, part_rows: usize) -> Job<'a> {
        let weights = projection.weights;
        let Output { data, stride } = &mut projection.output;
        let out = Columns::new(data, x.rows, weights.shape().out_features, *stride);
        Job { weights, out: out.expect("checked before"), x, part_rows }
    }

    fn parts(&self) -> usize {
        self.weights.shape().out_features.div_ceil(self.part_rows)
    }

    fn part(&self, part: usize) -> Range<usize> {
        let first = part * self.part_rows;
        first..self.weights.shape().out_features.min(first + self.part_rows)
    }
}

/// The matrices of one parallel region.
struct Region<'a>([Option<Job<'a>>; TOGETHER]);

impl<'a> Region<'a> {
    fn jobs(&self) -> impl Iterator<Item = &Job<'a>> {
        self.0.iter().flatten()
    }

    fn parts(&self) -> usize {
        self.jobs().map(Job::parts).sum()
    }

    /// The job and rows of a part.
    fn locate(&self, mut part: usize) -> (&Job<'a>, Range<usize>) {
        for job in self.jobs() {
            if part < job.parts() {
                return (job, job.part(part));
            }
            part -= job.parts();
        }
        unreachable!("parts are counted by the same jobs")
    }
}

/// A prompt's rows as cells of the form: as they come, or rounded into `cells`.
fn as_cells<'a>(form: Form, x: Input<'a>, width: usize, cells: &'a mut [f32]) -> Input<'a> {
    let Form::Pairs(pairs) = form else { return x };
    let stride = form.cells(width);
    for (row, cells) in cells.chunks_exact_mut(stride.max(1)).enumerate() {
        pairs::round_row(pairs, &x.data[row * x.stride..][..width], cells);
    }
    Input { data: cells, rows: x.rows, stride }
}

/// Row kernels: inputs packed once for each format, then runs of matrix rows.
fn generated(projections: &mut [Projection<'_>], x: Input<'_>, call: Call, mut free: &mut [f32]) {
    let cpu = call.cpu;
    let mut region = Region(std::array::from_fn(|_| None));
    let mut stored = 0usize;
    for (i, projection) in projections.iter_mut().enumerate() {
        let weights = projection.weights;
        let (format, width) = (weights.format(), weights.shape().in_features);
        stored = stored.saturating_add(weights.bytes().len());
        let stride = packed_len(call.row_inputs(format), format, width);
        let known = region.jobs().find(|job| job.weights.format() == format).map(|job| job.x);
        let x = match known {
            Some(packed) => packed,
            None if stride == 0 => x,
            None => {
                let (packed, rest) = std::mem::take(&mut free).split_at_mut(x.rows * stride);
                free = rest;
                let rows = (0..x.rows).map(|row| &x.data[row * x.stride..][..width]);
                pack(call.row_inputs(format), format, rows, packed.chunks_exact_mut(stride));
                Input { data: packed, rows: x.rows, stride }
            }
        };
        let part_rows = (PART_BYTES / weights.row_bytes().max(1)).next_multiple_of(16).max(16);
        region.0[i] = Some(Job::new(projection, x, part_rows));
    }
    let split = stored.saturating_mul(x.rows) >= SPLIT_BYTES;
    let threads = if split { cpu.threads.count().min(region.parts()).max(1) } else { 1 };
    for_each_part(region.parts(), std::iter::repeat_n((), threads), |part, ()| {
        let (job, weight_rows) = region.locate(part);
        let format = job.weights.format();
        let row_call = RowCall {
            weights: job.weights.rows(weight_rows.clone()),
            row_bytes: job.weights.row_bytes(),
            in_features: job.weights.shape().in_features,
            x: job.x.data,
            x_stride: job.x.stride,
            rows: job.x.rows,
            out: &job.out,
            columns: weight_rows,
        };
        rows(call.row_inputs(format), format, row_call);
    });
}

/// Tile kernels: panels of 64 matrix rows, each widened once for all input rows.
fn prompt(projections: &mut [Projection<'_>], x: Input<'_>, call: Call, scratch: &mut [f32]) {
    let mut region = Region(std::array::from_fn(|_| None));
    let mut products = 0usize;
    for (i, projection) in projections.iter_mut().enumerate() {
        let MatrixShape { out_features, in_features } = projection.weights.shape();
        products = products.saturating_add(out_features.saturating_mul(in_features));
        region.0[i] = Some(Job::new(projection, x, PANEL));
    }
    let work = |part: usize, scratch: &mut &mut [f32]| {
        let (job, columns) = region.locate(part);
        prompt_panel(job, columns, call.form(), scratch);
    };
    let threads = call.cpu.threads.count().min(region.parts());
    if threads <= 1 || products.saturating_mul(x.rows) < SPLIT_PRODUCTS {
        for_each_part(region.parts(), std::iter::once(scratch), work);
    } else {
        let scratches = scratch.chunks_exact_mut(PANEL_SCRATCH).take(threads);
        for_each_part(region.parts(), scratches, work);
    }
}

/// One panel's results for every input row, over runs of `DEPTH` input columns.
fn prompt_panel(job: &Job<'_>, columns: Range<usize>, form: Form, scratch: &mut [f32]) {
    let level = form.level();
    let format = job.weights.format();
    let width = job.weights.shape().in_features;
    let (widened, packed) = scratch[..PANEL_SCRATCH].split_at_mut(PANEL * DEPTH);
    // A matrix without columns still has results, zeros.
    for start in (0..width.max(1)).step_by(DEPTH) {
        let depth = start..width.min(start + DEPTH);
        let bytes = |k: usize| k / format.block_len() * format.block_bytes();
        let stored = bytes(depth.start)..bytes(depth.end);
        for (n, out) in columns.clone().zip(widened.chunks_exact_mut(depth.len().max(1))) {
            let row = &job.weights.rows(n..n + 1)[stored.clone()];
            dequantize(level, format, row, &mut out[..depth.len()]);
        }
        let cells = form.cells(depth.len());
        let weights = pack_panel(form, (widened, depth.len(), columns.len()), packed);
        let Input { data, rows, stride } = job.x;
        let call = PanelCall {
            x: &data[form.cells(depth.start)..],
            x_stride: stride,
            depth: cells,
            weights,
            out: &job.out,
            rows: 0..rows,
            columns: columns.clone(),
            add: start > 0,
        };
        panel(form, &call);
    }
}

/// The panel of `count` widened rows of `width` numbers, as cells.
fn pack_panel<'a>(
    form: Form,
    (widened, width, count): (&[f32], usize, usize),
    packed: &'a mut [f32],
) -> &'a [f32] {
    let cells = form.cells(width);
    let what = "a panel holds DEPTH numbers for each of its rows";
    match form {
        Form::Numbers(level) => {
            let weights = &mut packed[..PANEL * cells];
            let rows = Rows::new(widened, width, count, width).expect(what);
            pack_keys(level, rows, weights);
            weights
        }
        Form::Pairs(pairs) => {
            let (rounded, packed) = packed.split_at_mut(PANEL * cells);
            let widened = widened.chunks_exact(width.max(1));
            for (row, cells) in widened.zip(rounded.chunks_exact_mut(cells.max(1))).take(count) {
                pairs::round_row(pairs, row, cells);
            }
            let weights = &mut packed[..PANEL * cells];
            let rows = Rows::new(rounded, cells, count, cells).expect(what);
            pairs::pack_cells(pairs, rows, width, weights);
            weights
        }
    }
}
