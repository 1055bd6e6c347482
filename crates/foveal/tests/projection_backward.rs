//! Gradients of projections against sums in f64, for every level, format and awkward shape.

mod support;

use foveal::projection::{
    Activations, Format, Input, Matrix, MatrixShape, Output, ProjectionBackward,
    ProjectionGradients, backward_workspace_bytes, dequantize_row, project_backward,
    project_backward_as,
};
use foveal::{Cpu, Error, Gradient, Level, Threads, Workspace};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::{Random, cpus};

/// A projection of `rows` rows with gaps between them.
struct Case {
    format: Format,
    shape: MatrixShape,
    rows: usize,
    bytes: Vec<u8>,
    weights: Vec<f32>,
    x: Vec<f32>,
    d_y: Vec<f32>,
    activations: Activations,
}

/// Numbers between rows, which nothing may read or write.
const GAP: usize = 3;

/// What all gradients are before a call that adds to them.
const BEFORE: f32 = 0.25;

fn numbers(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.number()).collect()
}

impl Case {
    fn new(format: Format, [rows, out_features, in_features]: [usize; 3]) -> Case {
        let mut random = Random::new((rows * 1000 + out_features * 100 + in_features) as u64);
        let bytes: Vec<u8> = match format {
            Format::F32 => numbers(&mut random, out_features * in_features)
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect(),
            Format::F16 => numbers(&mut random, out_features * in_features)
                .iter()
                .flat_map(|&x| f16::from_f32(x).to_le_bytes())
                .collect(),
            Format::BF16 => numbers(&mut random, out_features * in_features)
                .iter()
                .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                .collect(),
            // Every two bytes a small number where they are read as a scale, and any integers elsewhere.
            _ => (0..out_features * format.row_bytes(in_features).unwrap())
                .map(|n| if n % 2 == 0 { random.bits() as u8 } else { 0x2a })
                .collect(),
        };
        let mut weights = vec![f32::NAN; out_features * in_features];
        dequantize_row(format, &bytes, &mut weights).unwrap();
        let mut padded = |width: usize| -> Vec<f32> {
            let row = |_| {
                let mut row = numbers(&mut random, width);
                row.extend([f32::NAN; GAP]);
                row
            };
            (0..rows).flat_map(row).collect()
        };
        let (x, d_y) = (padded(in_features), padded(out_features));
        let shape = MatrixShape { out_features, in_features };
        let activations = Activations::F32;
        Case { format, shape, rows, bytes, weights, x, d_y, activations }
    }

    fn backward(&self) -> ProjectionBackward<'_> {
        let MatrixShape { out_features, in_features } = self.shape;
        ProjectionBackward {
            weights: Matrix::new(self.format, self.shape, &self.bytes).unwrap(),
            x: Input { data: &self.x, rows: self.rows, stride: in_features + GAP },
            d_y: Input { data: &self.d_y, rows: self.rows, stride: out_features + GAP },
        }
    }

    /// All three gradients, over poisoned memory of exactly the stated size.
    fn run(&self, add: bool, cpu: Cpu) -> [Vec<f32>; 3] {
        let MatrixShape { out_features, in_features } = self.shape;
        let stride = in_features + GAP;
        let fill = if add { BEFORE } else { f32::NAN };
        let mut d_x = vec![fill; self.rows * stride];
        let (mut d_weights, mut d_bias) =
            (vec![fill; out_features * in_features], vec![fill; out_features]);
        let mut workspace = Workspace::new();
        workspace.reserve(backward_workspace_bytes(cpu));
        workspace.poison();
        let output = Output { data: &mut d_x, stride };
        let gradients = if add {
            ProjectionGradients {
                d_x: Gradient::Add(output),
                d_weights: Gradient::Add(&mut d_weights),
                d_bias: Gradient::Add(&mut d_bias),
            }
        } else {
            ProjectionGradients {
                d_x: Gradient::Write(output),
                d_weights: Gradient::Write(&mut d_weights),
                d_bias: Gradient::Write(&mut d_bias),
            }
        };
        let how = (cpu, self.activations);
        project_backward_as(self.backward(), gradients, how, &mut workspace).unwrap();
        let bits = fill.to_bits();
        let untouched = |row: &[f32]| row[in_features..].iter().all(|x| x.to_bits() == bits);
        assert!(d_x.chunks(stride).all(untouched), "numbers between rows were written");
        let d_x = d_x.chunks(stride).flat_map(|row| row[..in_features].to_vec()).collect();
        [d_x, d_weights, d_bias]
    }

    /// The gradients as defined, each with the sum of its terms' magnitudes.
    fn expected(&self) -> [Vec<(f64, f64)>; 3] {
        let MatrixShape { out_features, in_features } = self.shape;
        let (rows, outs, ins) = (0..self.rows, 0..out_features, 0..in_features);
        let weight = |n: usize, k: usize| f64::from(self.weights[n * in_features + k]);
        let x = |r: usize, k: usize| f64::from(self.x[r * (in_features + GAP) + k]);
        let d_y = |r: usize, n: usize| f64::from(self.d_y[r * (out_features + GAP) + n]);
        let pair = |sum: (f64, f64), term: f64| (sum.0 + term, sum.1 + term.abs());
        let d_x = rows.clone().flat_map(|r| {
            let outs = outs.clone();
            ins.clone()
                .map(move |k| outs.clone().map(|n| d_y(r, n) * weight(n, k)).fold((0.0, 0.0), pair))
        });
        let d_weights = outs.clone().flat_map(|n| {
            let rows = rows.clone();
            ins.clone()
                .map(move |k| rows.clone().map(|r| d_y(r, n) * x(r, k)).fold((0.0, 0.0), pair))
        });
        let d_bias = outs.clone().map(|n| rows.clone().map(|r| d_y(r, n)).fold((0.0, 0.0), pair));
        [d_x.collect(), d_weights.collect(), d_bias.collect()]
    }

    fn check(&self, add: bool, cpu: Cpu) {
        let MatrixShape { out_features, in_features } = self.shape;
        let results = self.run(add, cpu);
        let terms = [out_features, self.rows, self.rows];
        let names = ["d_x", "d_weights", "d_bias"];
        for (((got, expected), terms), name) in
            results.iter().zip(self.expected()).zip(terms).zip(names)
        {
            assert_eq!(got.len(), expected.len());
            // A run of 256 terms, then the runs.
            let steps = terms.min(256) as f64 + terms as f64 / 256.0 + 2.0;
            for (i, (&got, (sum, magnitude))) in got.iter().zip(expected).enumerate() {
                let before = if add { f64::from(BEFORE) } else { 0.0 };
                let error = (f64::from(got) - sum - before).abs();
                // Both factors rounded to bf16, as `projection` says; the bias is a sum of what comes.
                let rounded = self.activations != Activations::F32 && name != "d_bias";
                let rounding = if rounded { 2f64.powi(-7) + 2f64.powi(-16) } else { 0.0 };
                let bound = steps * 2f64.powi(-24) * (magnitude + before) + rounding * magnitude;
                assert!(
                    error <= bound,
                    "{} {} {name}[{i}] of [{}, {out_features}, {in_features}], add {add}: \
                     {got} for {sum}, error {error:e} > {bound:e}",
                    cpu.level,
                    self.format,
                    self.rows
                );
            }
        }
    }
}

#[test]
fn every_small_shape_is_within_its_bound() {
    for cpu in cpus() {
        for rows in 0..=9 {
            for out_features in [0, 1, 2, 5, 7, 8, 9] {
                for in_features in 0..=9 {
                    let case = Case::new(Format::F32, [rows, out_features, in_features]);
                    case.check(false, cpu);
                    case.check(true, cpu);
                }
            }
        }
    }
}

#[test]
fn shapes_around_blocks_and_panels_are_within_their_bound() {
    let shapes = [
        [95, 63, 64],
        [96, 65, 66],
        [97, 17, 255],
        [257, 16, 257],
        [33, 97, 129],
        [5, 193, 513],
        [1, 300, 31],
        [513, 31, 15],
    ];
    for cpu in cpus() {
        for shape in shapes {
            for add in [false, true] {
                Case::new(Format::F32, shape).check(add, cpu);
            }
        }
    }
}

#[test]
fn every_format_of_weights_is_within_its_bound() {
    for cpu in cpus() {
        for format in Format::ALL {
            let width = if format.block_len() == 1 { 70 } else { 512 + format.block_len() };
            let case = Case::new(format, [20, 33, width]);
            assert!(case.weights.iter().all(|x| x.is_finite()));
            case.check(false, cpu);
        }
    }
}

#[test]
fn rounded_factors_are_within_their_bound_and_exact_where_they_are_bf16() {
    for cpu in cpus() {
        for shape in
            [[1, 1, 1], [3, 5, 7], [95, 63, 64], [97, 17, 255], [257, 66, 259], [513, 31, 15]]
        {
            for add in [false, true] {
                let case = Case::new(Format::F32, shape);
                Case { activations: Activations::Bf16, ..case }.check(add, cpu);
            }
        }
        // Numbers that bf16 holds: rounding does nothing, and products are those of f32 but for the order of sums.
        let mut case = Case::new(Format::BF16, [40, 33, 70]);
        for x in case.x.iter_mut().chain(&mut case.d_y) {
            *x = bf16::from_f32(*x).to_f32();
        }
        case.check(false, cpu);
        let exact = case.run(false, cpu);
        let rounded = Case { activations: Activations::Bf16, ..case }.run(false, cpu);
        for (a, b) in exact.iter().flatten().zip(rounded.iter().flatten()) {
            assert!((a - b).abs() < 1e-5 * (1.0 + a.abs()), "{} {a} {b}", cpu.level);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for level in Level::available() {
        for (shape, activations) in [
            ([300, 200, 600], Activations::F32),
            ([64, 700, 130], Activations::F32),
            ([300, 200, 601], Activations::Bf16),
        ] {
            let case = Case { activations, ..Case::new(Format::F32, shape) };
            let run = |threads| {
                let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
                let results = case.run(true, Cpu { level, threads });
                results.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            };
            let one = run(1);
            assert!(one == run(2), "{level} {shape:?} 2 threads");
            assert!(one == run(5), "{level} {shape:?} 5 threads");
        }
    }
}

#[test]
fn what_is_skipped_need_not_be_there() {
    let cpu = cpus().last().unwrap();
    let case = Case::new(Format::F32, [7, 5, 6]);
    let [d_x, _, d_bias] = case.run(false, cpu);
    let mut workspace = Workspace::new();
    workspace.reserve(backward_workspace_bytes(cpu));
    let (mut only_x, mut only_bias) = ([f32::NAN; 7 * 6], [f32::NAN; 5]);
    let gradients = ProjectionGradients {
        d_x: Gradient::Write(Output { data: &mut only_x, stride: 6 }),
        d_weights: Gradient::Skip,
        d_bias: Gradient::Write(&mut only_bias),
    };
    let no_x = Input { data: &[], rows: 0, stride: 0 };
    let backward = ProjectionBackward { x: no_x, ..case.backward() };
    project_backward(backward, gradients, cpu, &mut workspace).unwrap();
    assert_eq!((&only_x[..], &only_bias[..]), (&d_x[..], &d_bias[..]));
}

/// Σ d_y · (x Wᵀ + b) is linear in each of its arguments, so that differences of any size are exact.
#[test]
fn gradients_are_the_differences_of_the_loss() {
    let cpu = cpus().last().unwrap();
    let case = Case::new(Format::F32, [4, 3, 5]);
    let loss = |weights: &[f32], x: &[f32], bias: &[f32]| -> f64 {
        let results = (0..4).flat_map(|r| (0..3).map(move |n| (r, n)));
        results
            .map(|(r, n)| {
                let product: f64 = (0..5)
                    .map(|k| f64::from(x[r * (5 + GAP) + k]) * f64::from(weights[n * 5 + k]))
                    .sum();
                (product + f64::from(bias[n])) * f64::from(case.d_y[r * (3 + GAP) + n])
            })
            .sum()
    };
    let [d_x, d_weights, d_bias] = case.run(false, cpu);
    let base = loss(&case.weights, &case.x, &[0.0; 3]);
    for (i, d_x) in d_x.iter().enumerate() {
        let mut x = case.x.clone();
        let at = i / 5 * (5 + GAP) + i % 5;
        x[at] += 1.0;
        let step = f64::from(x[at]) - f64::from(case.x[at]);
        let slope = (loss(&case.weights, &x, &[0.0; 3]) - base) / step;
        assert!((slope - f64::from(*d_x)).abs() < 2e-6);
    }
    for (i, d_weight) in d_weights.iter().enumerate() {
        let mut weights = case.weights.clone();
        weights[i] += 1.0;
        let step = f64::from(weights[i]) - f64::from(case.weights[i]);
        let slope = (loss(&weights, &case.x, &[0.0; 3]) - base) / step;
        assert!((slope - f64::from(*d_weight)).abs() < 2e-6);
    }
    for (i, d_bias) in d_bias.iter().enumerate() {
        let mut bias = [0.0; 3];
        bias[i] = 1.0;
        let slope = loss(&case.weights, &case.x, &bias) - base;
        assert!((slope - f64::from(*d_bias)).abs() < 2e-6);
    }
}

#[test]
fn nan_reaches_what_depends_on_it_only() {
    for cpu in cpus() {
        let mut case = Case::new(Format::F32, [10, 9, 70]);
        case.d_y[3 * (9 + GAP) + 4] = f32::NAN;
        let [d_x, d_weights, d_bias] = case.run(false, cpu);
        for (i, x) in d_x.iter().enumerate() {
            assert_eq!(x.is_nan(), i / 70 == 3, "{} d_x[{i}]", cpu.level);
        }
        for (i, x) in d_weights.iter().enumerate() {
            assert_eq!(x.is_nan(), i / 70 == 4, "{} d_weights[{i}]", cpu.level);
        }
        for (i, x) in d_bias.iter().enumerate() {
            assert_eq!(x.is_nan(), i == 4, "{} d_bias[{i}]", cpu.level);
        }
    }
}

#[test]
fn calls_that_do_not_fit_are_refused_and_write_nothing() {
    let cpu = cpus().last().unwrap();
    let case = Case::new(Format::F32, [4, 3, 5]);
    let mut full = Workspace::new();
    full.reserve(backward_workspace_bytes(cpu));
    let mut numbers = [7.0; 64];
    let mut refuse = |backward, [d_x, d_weights, d_bias]: [usize; 3], stride, workspace: &mut _| {
        let (x, rest) = numbers.split_at_mut(d_x);
        let (weights, rest) = rest.split_at_mut(d_weights);
        let gradients = ProjectionGradients {
            d_x: Gradient::Write(Output { data: x, stride }),
            d_weights: Gradient::Add(weights),
            d_bias: Gradient::Write(&mut rest[..d_bias]),
        };
        let error = project_backward(backward, gradients, cpu, workspace).unwrap_err();
        assert_eq!(numbers, [7.0; 64]);
        error
    };
    let backward = case.backward();
    let sizes = [20, 15, 3];
    let error = refuse(backward, sizes, 5, &mut Workspace::new());
    assert!(matches!(error, Error::WorkspaceTooSmall { got: 0, .. }), "{error}");
    let error = refuse(backward, [19, 15, 3], 5, &mut full);
    assert!(matches!(error, Error::BufferLength { expected: 20, got: 19, .. }), "{error}");
    let error = refuse(backward, sizes, 4, &mut full);
    assert!(matches!(error, Error::OverlappingOutput { .. }), "{error}");
    let error = refuse(backward, [20, 16, 3], 5, &mut full);
    assert!(matches!(error, Error::LengthMismatch { expected: 15, got: 16, .. }), "{error}");
    let error = refuse(backward, [20, 15, 4], 5, &mut full);
    assert!(matches!(error, Error::LengthMismatch { expected: 3, got: 4, .. }), "{error}");
    let fewer = Input { rows: 3, ..backward.x };
    let error = refuse(ProjectionBackward { x: fewer, ..backward }, sizes, 5, &mut full);
    assert!(matches!(error, Error::LengthMismatch { expected: 4, got: 3, .. }), "{error}");
    let short = Input { data: &case.x[..28], ..backward.x };
    let error = refuse(ProjectionBackward { x: short, ..backward }, sizes, 5, &mut full);
    assert!(matches!(error, Error::BufferLength { expected: 29, got: 28, .. }), "{error}");
    let short = Input { data: &case.d_y[..20], ..backward.d_y };
    let error = refuse(ProjectionBackward { d_y: short, ..backward }, sizes, 5, &mut full);
    assert!(matches!(error, Error::BufferLength { expected: 21, got: 20, .. }), "{error}");
}

#[test]
fn numbers_in_memory_are_a_matrix() {
    let numbers = numbers(&mut Random::new(1), 6);
    let shape = MatrixShape { out_features: 2, in_features: 3 };
    let matrix = Matrix::from_floats(shape, &numbers).unwrap();
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!((matrix.format(), matrix.bytes()), (Format::F32, &bytes[..]));
    let error = Matrix::from_floats(shape, &numbers[1..]).unwrap_err();
    assert!(matches!(error, Error::MatrixBytes { expected: 24, got: 20, .. }), "{error}");
}
