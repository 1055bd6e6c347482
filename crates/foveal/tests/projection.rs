//! Projections against sums in f64, for every format, level and awkward shape.

use foveal::projection::{
    Activations, Call, Format, Input, Matrix, MatrixShape, Output, Projection, dequantize_row,
    embed, project, project_many, workspace_bytes,
};
use foveal::{Cpu, Error, Level, MAX_GENERATED_ROWS, Phase, Threads, Workspace};
use half::{bf16, f16};
use std::num::NonZeroUsize;

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// Between −1 and 1.
    fn number(&mut self) -> f32 {
        (self.bits() & 0xff_ffff) as f32 / 8_388_608.0 - 1.0
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }
}

struct Stored {
    format: Format,
    shape: MatrixShape,
    bytes: Vec<u8>,
}

impl Stored {
    fn random(
        format: Format,
        out_features: usize,
        in_features: usize,
        random: &mut Random,
    ) -> Self {
        let blocks = out_features * in_features / format.block_len();
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let mut block: Vec<u8> =
                (0..format.block_bytes()).map(|_| random.bits() as u8).collect();
            let halves: &[usize] = match format {
                Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => &[0],
                Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
                Format::Q6_K => &[208],
                _ => &[],
            };
            for &at in halves {
                block[at..at + 2].copy_from_slice(&f16::from_f32(random.number()).to_le_bytes());
            }
            let x = random.number();
            match format {
                Format::F32 => block = x.to_le_bytes().to_vec(),
                Format::F16 => block = f16::from_f32(x).to_le_bytes().to_vec(),
                Format::BF16 => block = bf16::from_f32(x).to_le_bytes().to_vec(),
                _ => {}
            }
            bytes.extend(block);
        }
        Stored { format, shape: MatrixShape { out_features, in_features }, bytes }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.format, self.shape, &self.bytes).unwrap()
    }

    fn values(&self) -> Vec<f32> {
        let mut values = vec![f32::NAN; self.shape.out_features * self.shape.in_features];
        dequantize_row(self.format, &self.bytes, &mut values).unwrap();
        values
    }

    /// Σ w x for every row and output, and Σ |s (q − c)| + |m + s c| times |x|. For formats with a
    /// minimum the bracket is at most three times the largest weight of its run of 32, because every
    /// such run here has integers on both sides of the centre.
    fn expected(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let width = self.shape.in_features;
        let values = self.values();
        let mut expected = Vec::new();
        for x in x.chunks_exact(width) {
            for row in values.chunks_exact(width) {
                let products = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let magnitude = row.chunks(32).zip(x.chunks(32)).map(|(w, x)| {
                    let most = w.iter().fold(0f32, |most, w| most.max(w.abs()));
                    let part = |(w, x): (&f32, &f32)| match self.format {
                        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => {
                            f64::from(3.0 * most) * f64::from(x.abs())
                        }
                        _ => f64::from(w.abs()) * f64::from(x.abs()),
                    };
                    w.iter().zip(x).map(part).sum::<f64>()
                });
                expected.push((products.sum(), magnitude.sum()));
            }
        }
        expected
    }

    /// The bound that the module states, as a multiple of the magnitude.
    fn bound(&self, call: Call) -> f64 {
        let width = self.shape.in_features as f64;
        let steps = match call.phase {
            Phase::Generated => width / 32.0 + 16.0,
            Phase::Prompt => width.min(256.0) + width / 256.0 + 4.0,
        };
        let rounded = if in_pairs(call) { 2f64.powi(-7) + 2f64.powi(-16) } else { 0.0 };
        steps * 2f64.powi(-24) + rounded
    }

    /// What integers cost for every row and output: Σ |w| max |x| / 254, of runs of 32, and what the sums of unsigned
    /// integers do.
    fn integers_cost(&self, x: &[f32]) -> Vec<f64> {
        let width = self.shape.in_features;
        let steps = (width as f64 / 32.0 + 16.0) * 2f64.powi(-24);
        let values = self.values();
        let most = |x: &[f32]| f64::from(x.iter().fold(0f32, |most, x| most.max(x.abs())));
        let run = |(w, x): (&[f32], &[f32])| {
            let weights: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
            most(x) * (weights / 254.0 + steps * 8.0 * 32.0 * most(w))
        };
        let rows = x.chunks_exact(width).flat_map(|x| {
            let outputs = values.chunks_exact(width);
            outputs.map(move |row| row.chunks(32).zip(x.chunks(32)).map(run).sum())
        });
        rows.collect()
    }
}

/// Whether a call multiplies pairs of bf16.
fn in_pairs(call: Call) -> bool {
    let has = call.cpu.level.name() == "avx512bf16";
    has && call.phase == Phase::Prompt && call.activations != Activations::F32
}

/// Whether a call multiplies integers.
fn in_integers(call: Call, format: Format) -> bool {
    let has = call.cpu.level.name() == "avx512bf16" && format.block_len() > 1;
    has && call.phase == Phase::Generated && call.activations == Activations::Int8
}

/// Both phases with all that inputs may be rounded to.
fn calls(level: Level, threads: usize) -> impl Iterator<Item = Call> {
    let cpu = cpu(level, threads);
    [Phase::Generated, Phase::Prompt]
        .into_iter()
        .flat_map(move |phase| Activations::ALL.map(|activations| Call { phase, cpu, activations }))
}

fn cpu(level: Level, threads: usize) -> Cpu {
    Cpu { level, threads: Threads::at_most(NonZeroUsize::new(threads).unwrap()) }
}

/// Runs over poisoned memory of exactly the stated size.
fn run(stored: &Stored, x: &[f32], rows: usize, call: Call) -> Vec<f32> {
    let matrix = stored.matrix();
    let width = stored.shape.in_features;
    let mut workspace = Workspace::new();
    workspace.reserve(workspace_bytes(&[matrix], rows, call));
    let mut y = vec![f32::NAN; rows * stored.shape.out_features];
    let input = Input { data: x, rows, stride: width };
    let output = Output { data: &mut y, stride: stored.shape.out_features };
    project(&matrix, input, output, call, &mut workspace).unwrap();
    y
}

fn widths(format: Format) -> &'static [usize] {
    match format.block_len() {
        1 => &[1, 7, 15, 16, 17, 40, 63, 64, 65, 257, 576],
        32 => &[32, 64, 96, 160, 288, 576, 1568],
        _ => &[256, 512, 768],
    }
}

fn assert_close(stored: &Stored, x: &[f32], y: &[f32], call: Call) {
    let expected = stored.expected(x);
    let integers = in_integers(call, stored.format).then(|| stored.integers_cost(x));
    assert_eq!(y.len(), expected.len());
    for (i, (&got, &(expected, magnitude))) in y.iter().zip(&expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        let cost = integers.as_ref().map_or(0.0, |cost| cost[i]);
        let bound = stored.bound(call) * magnitude + cost + 1e-30;
        let MatrixShape { out_features, in_features } = stored.shape;
        assert!(
            error <= bound,
            "{call:?} {} [{out_features}, {in_features}] result {i}: \
             {got} for {expected}, error {error:e} > {bound:e}",
            stored.format
        );
    }
}

#[test]
fn every_format_and_shape_is_within_its_bound() {
    let mut random = Random(1);
    for level in Level::available() {
        for format in Format::ALL {
            for (case, &width) in widths(format).iter().enumerate() {
                for out_features in [1, 63, 64, 65] {
                    let stored = Stored::random(format, out_features, width, &mut random);
                    let rows = [1, 2, 5, 6, 7, 3][case % 6];
                    let x = random.numbers(rows * width);
                    for call in calls(level, 1) {
                        assert_close(&stored, &x, &run(&stored, &x, rows, call), call);
                    }
                }
            }
        }
    }
}

#[test]
fn floats_of_every_small_width_are_within_their_bound() {
    let mut random = Random(2);
    for level in Level::available() {
        for format in [Format::F32, Format::F16, Format::BF16] {
            for width in 1..=40 {
                let stored = Stored::random(format, 3, width, &mut random);
                let x = random.numbers(2 * width);
                for call in calls(level, 1) {
                    assert_close(&stored, &x, &run(&stored, &x, 2, call), call);
                }
            }
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn the_rows_of_a_call_change_no_bit() {
    let mut random = Random(3);
    for level in Level::available() {
        for format in Format::ALL {
            let (out_features, width) = (65, *widths(format).last().unwrap());
            let stored = Stored::random(format, out_features, width, &mut random);
            for call in calls(level, 1) {
                let most = if call.phase == Phase::Generated { 64 } else { 65 };
                let x = random.numbers(most * width);
                let whole = run(&stored, &x, most, call);
                assert_close(&stored, &x, &whole, call);
                for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 23, 64] {
                    let first = most - rows;
                    let some = run(&stored, &x[first * width..], rows, call);
                    let same = bits(&whole[first * out_features..]) == bits(&some);
                    assert!(same, "{call:?} {format} {rows} rows");
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random(4);
    for level in Level::available() {
        for format in Format::ALL {
            let width = if format.block_len() == 256 { 768 } else { 576 };
            let stored = Stored::random(format, 1000, width, &mut random);
            for call in calls(level, 1) {
                let x = random.numbers(9 * width);
                let run = |threads| run(&stored, &x, 9, Call { cpu: cpu(level, threads), ..call });
                let one = bits(&run(1));
                assert!(one == bits(&run(2)), "{call:?} {format} 2 threads");
                assert!(one == bits(&run(3)), "{call:?} {format} 3 threads");
            }
        }
    }
}

#[test]
fn many_matrices_give_what_they_give_alone() {
    let mut random = Random(5);
    let formats = Format::ALL.iter().chain(&[Format::Q4_1, Format::Q6_K, Format::F16]);
    let stored: Vec<_> =
        formats.map(|&format| Stored::random(format, 70, 512, &mut random)).collect();
    let matrices: Vec<_> = stored.iter().map(Stored::matrix).collect();
    for level in Level::available() {
        for call in calls(level, 2) {
            let rows = if call.phase == Phase::Generated { 3 } else { 20 };
            let (stride, gap) = (512 + 5, 70 + 3);
            let x = random.numbers(rows * stride);
            let mut results = vec![vec![-7.0; rows * gap]; stored.len()];
            let mut projections: Vec<_> = matrices
                .iter()
                .zip(&mut results)
                .map(|(&weights, y)| Projection {
                    weights,
                    output: Output { data: y, stride: gap },
                })
                .collect();
            let mut workspace = Workspace::new();
            workspace.reserve(workspace_bytes(&matrices, rows, call));
            let input = Input { data: &x, rows, stride };
            project_many(&mut projections, input, call, &mut workspace).unwrap();
            for (stored, y) in stored.iter().zip(&results) {
                for (x, y) in x.chunks_exact(stride).zip(y.chunks_exact(gap)) {
                    let alone = run(stored, &x[..512], 1, Call { cpu: cpu(level, 1), ..call });
                    assert!(bits(&alone) == bits(&y[..70]), "{call:?} {}", stored.format);
                    assert_eq!(y[70..], [-7.0; 3]);
                }
            }
        }
    }
}

#[test]
fn nothing_in_gives_nothing_or_zeros() {
    for level in Level::available() {
        for call in calls(level, 2) {
            for format in Format::ALL {
                let mut random = Random(6);
                let no_outputs = Stored::random(format, 0, 256, &mut random);
                assert!(run(&no_outputs, &[1.0; 256], 1, call).is_empty());
                let some = Stored::random(format, 3, 256, &mut random);
                assert!(run(&some, &[], 0, call).is_empty());
                let no_inputs = Stored::random(format, 3, 0, &mut random);
                assert_eq!(run(&no_inputs, &[], 2, call), [0.0; 6]);
            }
        }
    }
}

#[test]
fn nan_reaches_its_row_only() {
    let mut random = Random(7);
    for level in Level::available() {
        for format in Format::ALL {
            let stored = Stored::random(format, 20, 512, &mut random);
            let mut x = random.numbers(3 * 512);
            x[512 + 37] = f32::NAN;
            for call in calls(level, 1) {
                let y = run(&stored, &x, 3, call);
                let nan: Vec<_> = y.iter().map(|y| y.is_nan()).collect();
                assert!(nan[20..40].iter().all(|&nan| nan), "{call:?} {format}");
                assert!(!nan[..20].iter().chain(&nan[40..]).any(|&nan| nan));
            }
        }
    }
}

#[test]
fn embeddings_are_the_stored_rows() {
    let mut random = Random(8);
    for level in Level::available() {
        for format in Format::ALL {
            for &width in widths(format) {
                let stored = Stored::random(format, 5, width, &mut random);
                let values = stored.values();
                let tokens = [4, 0, 4, 2];
                let mut out = vec![f32::NAN; tokens.len() * width];
                embed(&stored.matrix(), &tokens, &mut out, level).unwrap();
                for (&token, row) in tokens.iter().zip(out.chunks_exact(width)) {
                    assert_eq!(row, &values[token as usize * width..][..width], "{level} {format}");
                }
            }
        }
    }
}

#[test]
fn calls_that_do_not_fit_are_refused_and_write_nothing() {
    let stored = Stored::random(Format::Q4_1, 4, 64, &mut Random(9));
    let matrix = stored.matrix();
    let level = Level::available().last().unwrap();
    let activations = Activations::F32;
    let call = Call { phase: Phase::Generated, cpu: cpu(level, 1), activations };
    let x = vec![1.0; 65 * 64];
    let mut y = vec![7.0; 65 * 4];
    let mut workspace = Workspace::new();
    let refuse = |rows, x: &[f32], y: &mut [f32], stride, workspace: &mut Workspace| {
        let input = Input { data: x, rows, stride: 64 };
        let error = project(&matrix, input, Output { data: y, stride }, call, workspace);
        error.unwrap_err()
    };
    let error = refuse(1, &x, &mut y, 4, &mut workspace);
    assert!(matches!(error, Error::WorkspaceTooSmall { got: 0, .. }), "{error}");
    workspace.reserve(1 << 20);
    let error = refuse(65, &x, &mut y, 4, &mut workspace);
    assert_eq!(error, Error::TooManyRows { got: 65, limit: MAX_GENERATED_ROWS });
    let error = refuse(2, &x[..127], &mut y, 4, &mut workspace);
    assert!(matches!(error, Error::BufferLength { expected: 128, got: 127, .. }), "{error}");
    let error = refuse(2, &x, &mut y[..7], 4, &mut workspace);
    assert!(matches!(error, Error::BufferLength { expected: 8, got: 7, .. }), "{error}");
    let error = refuse(2, &x, &mut y, 3, &mut workspace);
    assert!(matches!(error, Error::OverlappingOutput { .. }), "{error}");
    assert!(y.iter().all(|&y| y == 7.0));
    let mut out = [7.0; 64];
    let error = embed(&matrix, &[4], &mut out, level).unwrap_err();
    assert_eq!(error, Error::OutOfRange { what: "token", got: 4, limit: 4 });
    let error = embed(&matrix, &[0, 1], &mut out, level).unwrap_err();
    assert!(matches!(error, Error::LengthMismatch { expected: 128, got: 64, .. }), "{error}");
    assert_eq!(out, [7.0; 64]);
}

#[test]
fn matrices_whose_bytes_do_not_fit_are_refused() {
    let shape = MatrixShape { out_features: 3, in_features: 64 };
    let error = Matrix::new(Format::Q4_0, shape, &[0; 107]).unwrap_err();
    assert!(matches!(error, Error::MatrixBytes { expected: 108, got: 107, .. }), "{error}");
    let shape = MatrixShape { out_features: 3, in_features: 65 };
    assert!(matches!(Matrix::new(Format::Q4_0, shape, &[]), Err(Error::Row(_))));
    let shape = MatrixShape { out_features: usize::MAX, in_features: usize::MAX };
    let error = Matrix::new(Format::F32, shape, &[0; 8]).unwrap_err();
    assert!(matches!(error, Error::MatrixBytes { expected: usize::MAX, .. }), "{error}");
}

#[test]
fn a_level_without_the_instructions_multiplies_f32() {
    let mut random = Random(10);
    for level in Level::available() {
        for format in Format::ALL {
            let stored = Stored::random(format, 70, 512, &mut random);
            let x = random.numbers(3 * 512);
            for call in calls(level, 1) {
                let exact = Call { activations: Activations::F32, ..call };
                let same = bits(&run(&stored, &x, 3, call)) == bits(&run(&stored, &x, 3, exact));
                let rounded = in_pairs(call) || in_integers(call, format);
                assert_eq!(same, !rounded, "{call:?} {format}");
            }
        }
    }
}
