//! LayerNorm, and the gradients of norms, against f64, on every level and at lengths around a vector's.

mod support;

use foveal::nn::{
    LayerNorm, NormBackward, NormGradients, RmsNorm, layer_norm, layer_norm_backward, rms_norm,
    rms_norm_backward,
};
use foveal::{Error, Gradient, Level};
use support::Random;

const WIDTHS: [usize; 15] = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 577];

/// What all gradients are before a call that adds to them.
const BEFORE: f32 = 0.25;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Rms,
    Layer,
    LayerWithoutBias,
}

/// Rows to normalise.
struct Case {
    kind: Kind,
    width: usize,
    epsilon: f32,
    x: Vec<f32>,
    d_y: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// Results in f64: y, d_x, d_weight, d_bias; each with the magnitude of its terms.
type Expected = [Vec<(f64, f64)>; 4];

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

impl Case {
    /// Rows around `offset`.
    fn new(kind: Kind, rows: usize, width: usize, offset: f32) -> Case {
        let mut random = Random::new((rows * 1000 + width) as u64);
        let mut numbers =
            |count: usize| -> Vec<f32> { (0..count).map(|_| random.number()).collect() };
        let x = numbers(rows * width).iter().map(|x| x + offset).collect();
        let (d_y, weight, bias) = (numbers(rows * width), numbers(width), numbers(width));
        Case { kind, width, epsilon: 1e-5, x, d_y, weight, bias }
    }

    fn bias(&self) -> Option<&[f32]> {
        (self.kind == Kind::Layer).then_some(&self.bias[..])
    }

    fn forward(&self, x: &[f32], y: &mut [f32], level: Level) -> Result<(), Error> {
        let Case { weight, epsilon, .. } = self;
        match self.kind {
            Kind::Rms => rms_norm(RmsNorm { weight, epsilon: *epsilon }, x, y, level),
            _ => {
                let norm = LayerNorm { weight, bias: self.bias(), epsilon: *epsilon };
                layer_norm(norm, x, y, level)
            }
        }
    }

    fn backward(&self, gradients: NormGradients<'_>, level: Level) -> Result<(), Error> {
        let Case { weight, epsilon, .. } = self;
        let rows = NormBackward { x: &self.x, d_y: &self.d_y };
        match self.kind {
            Kind::Rms => {
                let norm = RmsNorm { weight, epsilon: *epsilon };
                rms_norm_backward(norm, rows, gradients, level)
            }
            _ => {
                let norm = LayerNorm { weight, bias: self.bias(), epsilon: *epsilon };
                layer_norm_backward(norm, rows, gradients, level)
            }
        }
    }

    /// y, d_x, d_weight, d_bias by the kernels, over poisoned memory unless they add.
    fn run(&self, add: bool, level: Level) -> [Vec<f32>; 4] {
        let fill = if add { BEFORE } else { f32::NAN };
        let mut y = vec![f32::NAN; self.x.len()];
        self.forward(&self.x, &mut y, level).unwrap();
        let (mut d_x, mut d_weight, mut d_bias) =
            (vec![fill; self.x.len()], vec![fill; self.width], vec![fill; self.width]);
        fn place(add: bool, x: &mut [f32]) -> Gradient<&mut [f32]> {
            if add { Gradient::Add(x) } else { Gradient::Write(x) }
        }
        let d_bias_place = match self.kind {
            Kind::Layer => place(add, &mut d_bias),
            _ => Gradient::Skip,
        };
        let gradients = NormGradients {
            d_x: place(add, &mut d_x),
            d_weight: place(add, &mut d_weight),
            d_bias: d_bias_place,
        };
        self.backward(gradients, level).unwrap();
        if self.kind != Kind::Layer {
            d_bias.clear();
        }
        [y, d_x, d_weight, d_bias]
    }

    /// One row normalised in f64, and what it was divided by.
    fn normalized(&self, x: &[f64]) -> (Vec<f64>, f64) {
        let mean_of = |x: &mut dyn Iterator<Item = f64>| x.sum::<f64>() / self.width as f64;
        let mean = if self.kind == Kind::Rms { 0.0 } else { mean_of(&mut x.iter().copied()) };
        let square = mean_of(&mut x.iter().map(|x| (x - mean).powi(2)));
        let root = (square + f64::from(self.epsilon)).sqrt();
        (x.iter().map(|x| (x - mean) / root).collect(), root)
    }

    fn result(&self, x: &[f64]) -> Vec<f64> {
        let (normalized, _) = self.normalized(x);
        let bias = |i: usize| self.bias().map_or(0.0, |bias| f64::from(bias[i]));
        let scaled = normalized.iter().zip(&self.weight).enumerate();
        scaled.map(|(i, (x, &w))| x * f64::from(w) + bias(i)).collect()
    }

    /// By the rules of differentiation: the Jacobian of a row is (δ_ij − c/D − x̂_i x̂_j / D) / root, c = 1 for a
    /// norm that subtracts the mean. Magnitudes take |x̂| + 1 for x̂, times 1 + the largest |x| / root: what the
    /// subtraction of the mean costs.
    fn expected(&self) -> Expected {
        let width = self.width as f64;
        let (mut y, mut d_x) = (vec![], vec![]);
        let (mut d_weight, mut d_bias) =
            (vec![(0.0, 0.0); self.width], vec![(0.0, 0.0); self.width]);
        for (x, d_y) in self.x.chunks(self.width).zip(self.d_y.chunks(self.width)) {
            let (x, d_y) = (wide(x), wide(d_y));
            let (normalized, root) = self.normalized(&x);
            let lost = match self.kind {
                Kind::Rms => 1.0,
                _ => 1.0 + 2.0 * x.iter().fold(0.0, |most: f64, x| most.max(x.abs())) / root,
            };
            let centred = if self.kind == Kind::Rms { 0.0 } else { 1.0 / width };
            for (i, (y_i, x_i)) in self.result(&x).into_iter().zip(&normalized).enumerate() {
                let most = lost * (x_i.abs() + 1.0);
                let bias = self.bias().map_or(0.0, |bias| f64::from(bias[i].abs()));
                y.push((y_i, most * f64::from(self.weight[i].abs()) + bias));
                let terms = normalized.iter().zip(&d_y).zip(&self.weight).enumerate();
                let mut sum = (0.0, 0.0);
                for (j, ((x_j, d_y), &w)) in terms {
                    let same = if i == j { 1.0 } else { 0.0 };
                    let g = d_y * f64::from(w) / root;
                    sum.0 += (same - centred - x_i * x_j / width) * g;
                    sum.1 += (same + centred + most * (x_j.abs() + 1.0) / width) * g.abs();
                }
                d_x.push(sum);
                d_weight[i].0 += d_y[i] * x_i;
                d_weight[i].1 += d_y[i].abs() * most;
                d_bias[i].0 += d_y[i];
                d_bias[i].1 += d_y[i].abs();
            }
        }
        if self.kind != Kind::Layer {
            d_bias.clear();
        }
        [y, d_x, d_weight, d_bias]
    }
}

const KINDS: [Kind; 3] = [Kind::Rms, Kind::Layer, Kind::LayerWithoutBias];
const NAMES: [&str; 4] = ["y", "d_x", "d_weight", "d_bias"];

/// Roundings, in units of the terms' magnitudes: a row's sums have up to width / 32 + 8 steps, those over rows 64
/// and then one a block.
fn steps(case: &Case, name: &str) -> f64 {
    let rows = case.x.len() / case.width;
    match name {
        "y" | "d_x" => case.width as f64 / 32.0 + 8.0,
        _ => rows.min(64) as f64 + rows as f64 / 64.0 + 8.0,
    }
}

fn check(case: &Case, level: Level) {
    let expected = case.expected();
    for add in [false, true] {
        let got = case.run(add, level);
        for ((got, expected), name) in got.iter().zip(&expected).zip(NAMES) {
            assert_eq!(got.len(), expected.len(), "{name}");
            let before = if add && name != "y" { f64::from(BEFORE) } else { 0.0 };
            for (i, (&got, (expected, magnitude))) in got.iter().zip(expected).enumerate() {
                let error = (f64::from(got) - before - expected).abs();
                let bound = steps(case, name) * 2f64.powi(-24) * (magnitude + before);
                assert!(
                    error <= bound,
                    "{level} {:?} {name}[{i}] of width {}: {got} for {expected}, \
                     error {error:e} > {bound:e}",
                    case.kind,
                    case.width
                );
            }
        }
    }
}

#[test]
fn norms_and_their_gradients_are_within_their_bounds() {
    for level in Level::available() {
        for kind in KINDS {
            for width in WIDTHS {
                let rows = [0, 1, 2, 3, 63, 64, 65, 150].into_iter();
                for rows in rows.filter(|rows| rows * width <= 10_000) {
                    check(&Case::new(kind, rows, width, 0.0), level);
                }
                // The mean of squares would lose everything here, deviations from the mean do not.
                check(&Case::new(kind, 3, width, 1000.0), level);
            }
        }
    }
}

#[test]
fn gradients_are_the_differences_of_the_loss() {
    for kind in KINDS {
        let case = Case::new(kind, 2, 9, 0.5);
        let loss = |x: &[f64]| -> f64 {
            let y = x.chunks(9).flat_map(|row| case.result(row));
            y.zip(&case.d_y).map(|(y, &d_y)| y * f64::from(d_y)).sum()
        };
        let [_, d_x, ..] = case.run(false, Level::detect().unwrap());
        let x = wide(&case.x);
        for (i, &d_x) in d_x.iter().enumerate() {
            let at = |step: f64| {
                let mut x = x.clone();
                x[i] += step;
                loss(&x)
            };
            let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((slope - f64::from(d_x)).abs() < 2e-6, "{kind:?} {i}: {d_x}, slope {slope}");
        }
    }
}

#[test]
fn constant_rows_have_results_and_gradients() {
    for level in Level::available() {
        for kind in KINDS {
            let mut case = Case::new(kind, 2, 20, 0.0);
            case.x.fill(0.0);
            check(&case, level);
        }
    }
}

#[test]
fn nan_stays_in_its_row_and_column() {
    for level in Level::available() {
        for kind in KINDS {
            let mut case = Case::new(kind, 3, 20, 0.0);
            case.d_y[25] = f32::NAN;
            let [_, d_x, d_weight, d_bias] = case.run(false, level);
            for (i, x) in d_x.iter().enumerate() {
                assert_eq!(x.is_nan(), i / 20 == 1, "{level} {kind:?} d_x[{i}]");
            }
            for (i, x) in d_weight.iter().chain(&d_bias).enumerate() {
                assert_eq!(x.is_nan(), i % 20 == 5, "{level} {kind:?} parameter {i}");
            }
        }
    }
}

#[test]
fn what_is_skipped_is_not_needed() {
    let level = Level::detect().unwrap();
    let case = Case::new(Kind::Layer, 70, 9, 0.0);
    let [_, d_x, ..] = case.run(false, level);
    let mut only = vec![f32::NAN; d_x.len()];
    case.backward(NormGradients { d_x: Gradient::Write(&mut only), ..Default::default() }, level)
        .unwrap();
    assert_eq!(only, d_x);
}

#[test]
fn lengths_that_do_not_fit_are_refused_and_nothing_is_written() {
    let level = Level::detect().unwrap();
    let mut case = Case::new(Kind::Layer, 2, 5, 0.0);
    let refused = |case: &Case, lengths: [usize; 3]| {
        let mut numbers = [7.0; 64];
        let (d_x, rest) = numbers.split_at_mut(lengths[0]);
        let (d_weight, rest) = rest.split_at_mut(lengths[1]);
        let gradients = NormGradients {
            d_x: Gradient::Write(d_x),
            d_weight: Gradient::Write(d_weight),
            d_bias: Gradient::Write(&mut rest[..lengths[2]]),
        };
        let error = case.backward(gradients, level).unwrap_err();
        assert_eq!(numbers, [7.0; 64]);
        error
    };
    for lengths in [[9, 5, 5], [10, 4, 5], [10, 5, 6]] {
        let error = refused(&case, lengths);
        assert!(matches!(error, Error::LengthMismatch { .. }), "{error}");
    }
    for kind in [Kind::Rms, Kind::LayerWithoutBias] {
        let error = refused(&Case::new(kind, 2, 5, 0.0), [10, 5, 5]);
        assert!(matches!(error, Error::InvalidParameter { .. }), "{error}");
    }
    let mut y = [7.0; 10];
    case.bias.pop();
    let error = case.forward(&case.x, &mut y, level).unwrap_err();
    assert!(matches!(error, Error::LengthMismatch { expected: 5, got: 4, .. }), "{error}");
    let error = case.forward(&case.x[..9], &mut y[..9], level).unwrap_err();
    assert!(matches!(error, Error::LengthMismatch { .. }), "{error}");
    assert_eq!(y, [7.0; 10]);
    case.d_y.pop();
    let error = refused(&case, [10, 5, 5]);
    assert!(matches!(error, Error::LengthMismatch { expected: 10, got: 9, .. }), "{error}");
}
