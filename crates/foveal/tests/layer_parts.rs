//! Short convolutions, gates, heads of length 1 and gated norms: definitions in f64, differences of them, cuts, refusals.

mod support;

use foveal::nn::{
    ConvBackward, ConvGradients, DecayGate, DecayGateGradients, GateGradient, GateOrder, GatedNorm,
    GatedNormBackward, GatedNormGradients, RmsNorm, ShortConv, decay_gate, decay_gate_backward,
    gated_norm, gated_norm_backward, l2_norm, l2_norm_backward, log_sigmoid, log_sigmoid_backward,
    short_conv, short_conv_backward, sigmoid, sigmoid_backward, silu_gate, silu_gate_gradient,
};
use foveal::{Error, Gradient, Level, Workspace};
use support::{Random, error};

/// Lengths around those of vectors.
const WIDTHS: [usize; 12] = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64];

fn numbers(random: &mut Random, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| scale * random.number()).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

/// The gradient of ⟨f(x), weights⟩ for the `part`-th of several inputs, by central differences.
fn differences<const N: usize>(
    inputs: &[Vec<f64>; N],
    part: usize,
    f: impl Fn(&[Vec<f64>; N]) -> Vec<f64>,
    weights: &[f64],
) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut inputs = inputs.clone();
    let loss =
        |inputs: &[Vec<f64>; N]| -> f64 { f(inputs).iter().zip(weights).map(|(a, b)| a * b).sum() };
    (0..inputs[part].len())
        .map(|n| {
            let own = inputs[part][n];
            let mut at = |x: f64| {
                inputs[part][n] = x;
                loss(&inputs)
            };
            let slope = (at(own + STEP) - at(own - STEP)) / (2.0 * STEP);
            at(own);
            slope
        })
        .collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// A convolution with what it is run on.
struct Conv {
    kernel: usize,
    channels: usize,
    silu: bool,
    biased: bool,
    /// Taps, bias, inputs, state before them.
    numbers: [Vec<f32>; 4],
}

impl Conv {
    fn random(kernel: usize, channels: usize, tokens: usize, random: &mut Random) -> Conv {
        let (silu, biased) = (kernel.is_multiple_of(2), channels.is_multiple_of(2));
        let lengths = [
            kernel * channels,
            if biased { channels } else { 0 },
            tokens * channels,
            (kernel - 1) * channels,
        ];
        let numbers = lengths.map(|count| numbers(random, count, 1.0));
        Conv { kernel, channels, silu, biased, numbers }
    }

    fn parameters(&self) -> ShortConv<'_> {
        let bias = self.biased.then_some(&self.numbers[1][..]);
        ShortConv { weight: &self.numbers[0], bias, channels: self.channels, silu: self.silu }
    }

    /// Results and the state after them, one after the other, by the definition.
    fn define(&self, [weight, bias, x, state]: &[Vec<f64>; 4]) -> Vec<f64> {
        let inputs = [&state[..], x].concat();
        let tokens = x.len() / self.channels;
        let mut out: Vec<f64> = (0..x.len())
            .map(|n| {
                let (t, c) = (n / self.channels, n % self.channels);
                let terms = (0..self.kernel)
                    .map(|i| weight[i * self.channels + c] * inputs[(t + i) * self.channels + c]);
                let u = terms.sum::<f64>() + if self.biased { bias[c] } else { 0.0 };
                if self.silu { silu(u) } else { u }
            })
            .collect();
        out.extend(&inputs[tokens * self.channels..]);
        out
    }

    fn run(&self, level: Level) -> (Vec<f32>, Vec<f32>) {
        let mut state = self.numbers[3].clone();
        let mut y = vec![f32::NAN; self.numbers[2].len()];
        short_conv(self.parameters(), &self.numbers[2], &mut state, &mut y, level).unwrap();
        (y, state)
    }
}

fn convolutions() -> impl Iterator<Item = Conv> {
    let mut random = Random::new(1);
    let sizes = (2..=8).flat_map(|kernel| WIDTHS.map(|channels| (kernel, channels)));
    let mut all = vec![];
    for (kernel, channels) in sizes {
        for tokens in [0, 1, 2, 5, 9] {
            all.push(Conv::random(kernel, channels, tokens, &mut random));
        }
    }
    all.into_iter()
}

#[test]
fn convolutions_are_their_definition() {
    for conv in convolutions() {
        let expected = conv.define(&conv.numbers.each_ref().map(|x| wide(x)));
        for level in Level::available() {
            let (y, state) = conv.run(level);
            let what = format!("{level} {} taps {} channels", conv.kernel, conv.channels);
            close(&what, &[y, state].concat(), &expected, 1e-6);
        }
    }
}

#[test]
fn gradients_of_convolutions_are_differences() {
    let mut random = Random::new(2);
    let more = [(4, 3, 150), (3, 2, 64), (2, 1, 65)]
        .map(|(kernel, channels, tokens)| Conv::random(kernel, channels, tokens, &mut random));
    for conv in convolutions().filter(|conv| conv.channels <= 9).chain(more) {
        let inputs = conv.numbers.each_ref().map(|x| wide(x));
        let upstream = numbers(&mut random, conv.numbers[2].len() + conv.numbers[3].len(), 1.0);
        let (d_y, d_final) = upstream.split_at(conv.numbers[2].len());
        let expected = [0, 1, 2, 3]
            .map(|n| differences(&inputs, n, |inputs| conv.define(inputs), &wide(&upstream)));
        for level in Level::available() {
            let mut d_state = d_final.to_vec();
            let [mut d_weight, mut d_bias, mut d_x] =
                [0, 1, 2].map(|n| vec![f32::NAN; conv.numbers[n].len()]);
            let d_bias_place =
                if conv.biased { Gradient::Write(&mut d_bias[..]) } else { Gradient::Skip };
            let gradients = ConvGradients {
                d_x: Gradient::Write(&mut d_x),
                d_weight: Gradient::Write(&mut d_weight),
                d_bias: d_bias_place,
            };
            let rows = ConvBackward { x: &conv.numbers[2], initial: &conv.numbers[3], d_y };
            short_conv_backward(conv.parameters(), rows, gradients, &mut d_state, level).unwrap();
            let what = format!("{level} {} taps {} channels", conv.kernel, conv.channels);
            for (got, expected) in [d_weight, d_bias, d_x, d_state].iter().zip(&expected) {
                close(&what, got, expected, 1e-5);
            }
        }
    }
}

#[test]
fn added_gradients_of_convolutions_are_added() {
    let conv = Conv::random(4, 6, 20, &mut Random::new(3));
    let d_y = numbers(&mut Random::new(4), 120, 1.0);
    for level in Level::available() {
        let run = |start: f32, add: bool| {
            let mut places = [0, 1, 2].map(|n| vec![start; conv.numbers[n].len()]);
            let [weight, bias, x] = &mut places;
            let gradients = match add {
                true => ConvGradients {
                    d_x: Gradient::Add(x),
                    d_weight: Gradient::Add(weight),
                    d_bias: Gradient::Add(bias),
                },
                false => ConvGradients {
                    d_x: Gradient::Write(x),
                    d_weight: Gradient::Write(weight),
                    d_bias: Gradient::Write(bias),
                },
            };
            let rows = ConvBackward { x: &conv.numbers[2], initial: &conv.numbers[3], d_y: &d_y };
            let mut d_state = vec![0.0; 18];
            short_conv_backward(conv.parameters(), rows, gradients, &mut d_state, level).unwrap();
            places
        };
        for (written, added) in run(f32::NAN, false).iter().zip(&run(0.5, true)) {
            let expected: Vec<f64> = written.iter().map(|&x| f64::from(x) + 0.5).collect();
            close("added", added, &expected, 1e-6);
        }
    }
}

#[test]
fn pieces_and_single_tokens_of_a_convolution_give_the_bits_of_the_whole() {
    for kernel in 2..=8 {
        let conv = Conv::random(kernel, 21, 23, &mut Random::new(5));
        for level in Level::available() {
            let (whole, last) = conv.run(level);
            for step in [1, 2, 3, 7] {
                let (mut state, mut pieces) = (conv.numbers[3].clone(), vec![]);
                for x in conv.numbers[2].chunks(21 * step) {
                    let mut y = vec![f32::NAN; x.len()];
                    short_conv(conv.parameters(), x, &mut state, &mut y, level).unwrap();
                    pieces.extend(y);
                }
                assert_eq!((&pieces, &state), (&whole, &last), "{level} {kernel} taps by {step}");
            }
        }
    }
}

#[test]
fn no_convolved_token_depends_on_later_ones() {
    let conv = Conv::random(4, 5, 12, &mut Random::new(6));
    for level in Level::available() {
        let (whole, _) = conv.run(level);
        for t in 0..12 {
            let mut other = Conv { numbers: conv.numbers.clone(), ..conv };
            other.numbers[2][5 * t..].fill(f32::NAN);
            assert_eq!(other.run(level).0[..5 * t], whole[..5 * t]);
        }
    }
}

#[test]
fn strengths_and_decays_are_their_definitions() {
    let mut random = Random::new(7);
    for count in WIDTHS {
        let x = numbers(&mut random, count, 12.0);
        let d = numbers(&mut random, count, 1.0);
        for level in Level::available() {
            type InPlace<'a> = &'a dyn Fn(&mut [f32]);
            let check =
                |what: &str, run: InPlace<'_>, back: InPlace<'_>, f: &dyn Fn(f64) -> f64| {
                    let (mut y, mut d_x) = (x.clone(), d.clone());
                    run(&mut y);
                    close(what, &y, &wide(&x).into_iter().map(f).collect::<Vec<_>>(), 1e-6);
                    back(&mut d_x);
                    let of = |inputs: &[Vec<f64>; 1]| inputs[0].iter().map(|&x| f(x)).collect();
                    let expected = differences(&[wide(&x)], 0, of, &wide(&d));
                    close(&format!("gradient of {what}"), &d_x, &expected, 1e-6);
                };
            check(
                "sigmoid",
                &|y| sigmoid(y, 2.0, level).unwrap(),
                &|d| sigmoid_backward(&x, 2.0, d, level).unwrap(),
                &|x| 2.0 / (1.0 + (-x).exp()),
            );
            check(
                "logarithm of a sigmoid",
                &|y| log_sigmoid(y, 16.0, level).unwrap(),
                &|d| log_sigmoid_backward(&x, 16.0, d, level).unwrap(),
                &|x| -softplus(-x) / 16.0,
            );
        }
    }
}

#[test]
fn a_logarithm_of_a_sigmoid_keeps_its_digits_where_it_is_small() {
    for level in Level::available() {
        for x in [20.0f32, 40.0, 80.0, -80.0, 5.0] {
            let mut y = [x];
            log_sigmoid(&mut y, 1.0, level).unwrap();
            let exact = -softplus(-f64::from(x));
            let error = (f64::from(y[0]) / exact - 1.0).abs();
            assert!(error <= 1e-6, "{level} {x}: {error:e}");
        }
    }
}

#[test]
fn decays_by_softplus_are_their_definition() {
    let mut random = Random::new(8);
    for heads in WIDTHS {
        for tokens in [0, 1, 6] {
            let [a_log, bias] = [0; 2].map(|_| numbers(&mut random, heads, 2.0));
            let [x, d] = [4.0, 1.0].map(|scale| numbers(&mut random, tokens * heads, scale));
            let define = |inputs: &[Vec<f64>; 3]| -> Vec<f64> {
                let [a_log, bias, x] = inputs;
                let decay =
                    |(n, x): (usize, &f64)| -a_log[n % heads].exp() * softplus(x + bias[n % heads]);
                x.iter().enumerate().map(decay).collect()
            };
            let inputs = [wide(&a_log), wide(&bias), wide(&x)];
            let expected = [0, 1, 2].map(|n| differences(&inputs, n, define, &wide(&d)));
            for level in Level::available() {
                let gate = DecayGate { a_log: &a_log, bias: &bias };
                let mut y = x.clone();
                decay_gate(gate, &mut y, level).unwrap();
                close("decays", &y, &define(&inputs), 1e-6);
                assert!(y.iter().all(|&y| y <= 0.0));
                let (mut d_a_log, mut d_bias) = (vec![f32::NAN; heads], vec![0.5; heads]);
                let mut d_x = d.clone();
                let gradients = DecayGateGradients {
                    d_a_log: Gradient::Write(&mut d_a_log),
                    d_bias: Gradient::Add(&mut d_bias),
                };
                decay_gate_backward(gate, &x, &mut d_x, gradients, level).unwrap();
                d_bias.iter_mut().for_each(|x| *x -= 0.5);
                for (got, expected) in [&d_a_log, &d_bias, &d_x].into_iter().zip(&expected) {
                    close("gradient of decays", got, expected, 1e-5);
                }
                let skipped = DecayGateGradients::default();
                let mut alone = d.clone();
                decay_gate_backward(gate, &x, &mut alone, skipped, level).unwrap();
                assert_eq!(alone, d_x);
            }
        }
    }
}

#[test]
fn output_gates_have_the_gradients_of_their_definition() {
    let mut random = Random::new(9);
    for count in WIDTHS {
        let [gate, up, d_y] = [6.0, 1.0, 1.0].map(|scale| numbers(&mut random, count, scale));
        let define = |[gate, up]: &[Vec<f64>; 2]| -> Vec<f64> {
            gate.iter().zip(up).map(|(&g, u)| silu(g) * u).collect()
        };
        let inputs = [wide(&gate), wide(&up)];
        let expected = [0, 1].map(|n| differences(&inputs, n, define, &wide(&d_y)));
        for level in Level::available() {
            let mut y = gate.clone();
            silu_gate(&mut y, &up, level).unwrap();
            close("gated", &y, &define(&inputs), 1e-6);
            let [mut d_gate, mut d_up, mut d_h] = [&gate, &up, &d_y].map(Clone::clone);
            let of = GateGradient { gate: &mut d_gate, up: &mut d_up, d_h: &mut d_h };
            silu_gate_gradient(of, level).unwrap();
            close("gated once more", &d_h, &define(&inputs), 1e-6);
            close("gradient of a gate", &d_gate, &expected[0], 2e-6);
            close("gradient of what is gated", &d_up, &expected[1], 2e-6);
        }
    }
}

#[test]
fn rows_of_length_one_are_their_definition() {
    let mut random = Random::new(10);
    for width in WIDTHS {
        let [x, d] = [0; 2].map(|_| numbers(&mut random, 3 * width, 1.0));
        for epsilon in [1e-6f32, 0.1] {
            let define = |[x]: &[Vec<f64>; 1]| -> Vec<f64> {
                let row = |row: &[f64]| {
                    let sum: f64 = row.iter().map(|x| x * x).sum();
                    let r = (sum + f64::from(epsilon)).powf(-0.5);
                    row.iter().map(|x| r * x).collect::<Vec<_>>()
                };
                x.chunks(width).flat_map(row).collect()
            };
            let expected = differences(&[wide(&x)], 0, define, &wide(&d));
            for level in Level::available() {
                let (mut y, mut d_x) = (x.clone(), d.clone());
                l2_norm(&mut y, width, epsilon, level).unwrap();
                close("length 1", &y, &define(&[wide(&x)]), 1e-6);
                l2_norm_backward(&x, width, epsilon, &mut d_x, level).unwrap();
                close("gradient of length 1", &d_x, &expected, 1e-5);
            }
        }
    }
}

#[test]
fn gated_norms_are_their_definition() {
    let mut random = Random::new(11);
    for (width, rows) in WIDTHS.iter().map(|&width| (width, 3)).chain([(4, 65), (3, 130)]) {
        let [x, gate, d_y] = [1.0, 3.0, 1.0].map(|scale| numbers(&mut random, rows * width, scale));
        let weight = numbers(&mut random, width, 1.0);
        for order in [GateOrder::After, GateOrder::Before] {
            let define = |[x, gate, weight]: &[Vec<f64>; 3]| -> Vec<f64> {
                let row = |(x, gate): (&[f64], &[f64])| {
                    let gated = |x: &[f64]| -> Vec<f64> {
                        x.iter().zip(gate).map(|(x, &g)| x * silu(g)).collect()
                    };
                    let norm = |x: &[f64]| -> Vec<f64> {
                        let mean = x.iter().map(|x| x * x).sum::<f64>() / width as f64;
                        let r = (mean + f64::from(0.01f32)).powf(-0.5);
                        x.iter().zip(weight).map(|(x, w)| x * r * w).collect()
                    };
                    match order {
                        GateOrder::After => gated(&norm(x)),
                        GateOrder::Before => norm(&gated(x)),
                    }
                };
                x.chunks(width).zip(gate.chunks(width)).flat_map(row).collect()
            };
            let inputs = [wide(&x), wide(&gate), wide(&weight)];
            let expected = [0, 1, 2].map(|n| differences(&inputs, n, define, &wide(&d_y)));
            for level in Level::available() {
                let norm = RmsNorm { weight: &weight, epsilon: 0.01 };
                let norm = GatedNorm { norm, order };
                let mut y = vec![f32::NAN; x.len()];
                gated_norm(norm, &x, &gate, &mut y, level).unwrap();
                close("gated norm", &y, &define(&inputs), 2e-6);
                let [mut d_x, mut d_gate] = [0; 2].map(|_| vec![f32::NAN; x.len()]);
                let mut d_weight = vec![f32::NAN; width];
                let gradients = GatedNormGradients {
                    d_x: &mut d_x,
                    d_gate: &mut d_gate,
                    d_weight: Gradient::Write(&mut d_weight),
                };
                let backward = GatedNormBackward { x: &x, gate: &gate, d_y: &d_y };
                let mut workspace = Workspace::new();
                workspace.reserve(1 << 14);
                workspace.poison();
                gated_norm_backward(norm, backward, gradients, &mut workspace, level).unwrap();
                for (got, expected) in [&d_x, &d_gate, &d_weight].into_iter().zip(&expected) {
                    close(&format!("gradient of a norm gated {order:?}"), got, expected, 1e-5);
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let level = Level::available().next().unwrap();
    let length = |result: foveal::Result<()>| matches!(result, Err(Error::LengthMismatch { .. }));
    let invalid =
        |result: foveal::Result<()>| matches!(result, Err(Error::InvalidParameter { .. }));
    let conv = |weight| ShortConv { weight, bias: None, channels: 4, silu: true };
    let (four, mut state, mut y) = ([0.0; 16], [0.0; 12], [0.0; 8]);
    assert_eq!(conv(&four).state_len(), Ok(12));
    assert!(invalid(short_conv(conv(&four[..4]), &[0.0; 8], &mut state, &mut y, level)));
    assert!(invalid(short_conv(conv(&[0.0; 36]), &[0.0; 8], &mut state, &mut y, level)));
    let none = ShortConv { channels: 0, ..conv(&four) };
    assert!(invalid(short_conv(none, &[], &mut [], &mut [], level)));
    assert!(length(short_conv(conv(&four[..15]), &[0.0; 8], &mut state, &mut y, level)));
    assert!(length(short_conv(conv(&four), &[0.0; 7], &mut state, &mut y[..7], level)));
    assert!(length(short_conv(conv(&four), &[0.0; 8], &mut state, &mut y[..4], level)));
    assert!(length(short_conv(conv(&four), &[0.0; 8], &mut state[..8], &mut y, level)));
    let biased = ShortConv { bias: Some(&four[..3]), ..conv(&four) };
    assert!(length(short_conv(biased, &[0.0; 8], &mut state, &mut y, level)));
    let rows = ConvBackward { x: &[0.0; 8], initial: &[0.0; 12], d_y: &[0.0; 8] };
    let d_bias = ConvGradients { d_bias: Gradient::Write(&mut y[..4]), ..Default::default() };
    assert!(invalid(short_conv_backward(conv(&four), rows, d_bias, &mut state, level)));
    let d_weight = ConvGradients { d_weight: Gradient::Write(&mut y[..]), ..Default::default() };
    assert!(length(short_conv_backward(conv(&four), rows, d_weight, &mut state, level)));
    let d_y = ConvBackward { d_y: &[0.0; 4], ..rows };
    let nothing = ConvGradients::default();
    assert!(length(short_conv_backward(conv(&four), d_y, nothing, &mut state, level)));
    assert!(invalid(sigmoid(&mut y, f32::INFINITY, level)));
    assert!(length(sigmoid_backward(&[0.0; 3], 1.0, &mut y, level)));
    assert!(invalid(log_sigmoid(&mut y, 0.0, level)));
    assert!(length(log_sigmoid_backward(&[0.0; 3], 16.0, &mut y, level)));
    let gate = DecayGate { a_log: &[0.0; 3], bias: &[0.0; 3] };
    assert!(length(decay_gate(gate, &mut y, level)));
    assert!(length(decay_gate(DecayGate { bias: &[0.0; 2], ..gate }, &mut y[..6], level)));
    let gradients =
        DecayGateGradients { d_a_log: Gradient::Write(&mut state), ..Default::default() };
    assert!(length(decay_gate_backward(gate, &[0.0; 6], &mut y[..6], gradients, level)));
    assert!(invalid(l2_norm(&mut y, 4, -1.0, level)));
    assert!(length(l2_norm(&mut y, 3, 0.0, level)));
    assert!(length(l2_norm(&mut y, 0, 0.0, level)));
    assert!(length(l2_norm_backward(&[0.0; 4], 4, 0.0, &mut y, level)));
    let norm = RmsNorm { weight: &four[..4], epsilon: 0.1 };
    for order in [GateOrder::After, GateOrder::Before] {
        let norm = GatedNorm { norm, order };
        assert!(length(gated_norm(norm, &[0.0; 8], &[0.0; 4], &mut y, level)));
        assert!(length(gated_norm(norm, &[0.0; 7], &[0.0; 7], &mut y[..7], level)));
        let rows = GatedNormBackward { x: &[0.0; 8], gate: &[0.0; 8], d_y: &[0.0; 4] };
        let (mut d_x, mut d_gate) = ([0.0; 8], [0.0; 8]);
        let gradients =
            GatedNormGradients { d_x: &mut d_x, d_gate: &mut d_gate, d_weight: Gradient::Skip };
        let mut workspace = Workspace::new();
        assert!(length(gated_norm_backward(norm, rows, gradients, &mut workspace, level)));
    }
}
