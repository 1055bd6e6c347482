//! Layer operators against f64, on every level and at lengths around a vector's.

use foveal::nn::{
    RmsNorm, add, gelu_gate, log_softmax, rms_norm, rms_norm_in_place, silu_gate, softcap, softmax,
};
use foveal::{Error, Level};

const LENGTHS: [usize; 14] = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 577];

/// Numbers between −1 and 1 that look random, times a scale.
fn numbers(count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| scale * next()).collect()
}

fn assert_close(got: f32, expected: f64, bound: f64, what: &str) {
    let error = (f64::from(got) - expected).abs();
    assert!(error <= bound, "{what}: {got:e} for {expected:e}, error {error:e} > {bound:e}");
}

#[test]
fn rms_norm_divides_by_the_root_of_the_mean_of_squares() {
    for level in Level::available() {
        for width in LENGTHS {
            let weight = numbers(width, 1, 2.0);
            let norm = RmsNorm { weight: &weight, epsilon: 1e-5 };
            for scale in [1e-3, 1.0, 1e3] {
                let x = numbers(3 * width, 2, scale);
                let mut y = vec![f32::NAN; x.len()];
                rms_norm(norm, &x, &mut y, level).unwrap();
                let mut z = x.clone();
                rms_norm_in_place(norm, &mut z, level).unwrap();
                assert_eq!(y, z);
                for (x, y) in x.chunks(width.max(1)).zip(y.chunks(width.max(1))) {
                    let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
                    let root = (squares / width as f64 + f64::from(1e-5f32)).sqrt();
                    for ((&x, &w), &y) in x.iter().zip(&weight).zip(y) {
                        let expected = f64::from(x) * f64::from(w) / root;
                        assert_close(y, expected, 1e-6 * expected.abs(), level.name());
                    }
                }
            }
        }
    }
}

#[test]
fn rms_norm_of_zeros_is_zero() {
    for level in Level::available() {
        let norm = RmsNorm { weight: &[3.0; 20], epsilon: 1e-6 };
        let mut x = [0.0; 40];
        rms_norm_in_place(norm, &mut x, level).unwrap();
        assert_eq!(x, [0.0; 40]);
    }
}

/// Magnitudes from 1e-6 to 1e4, both signs, zero first.
fn gates() -> Vec<f32> {
    let positive = (0..400).map(|i| 10f32.powf(i as f32 / 40.0 - 6.0));
    std::iter::once(0.0).chain(positive.flat_map(|x| [x, -x])).collect()
}

#[test]
fn silu_is_within_its_bound() {
    for level in Level::available() {
        let gates = gates();
        for length in LENGTHS.into_iter().chain([gates.len()]) {
            let up = numbers(length, 3, 2.0);
            let mut y = gates[..length].to_vec();
            silu_gate(&mut y, &up, level).unwrap();
            for ((&g, &u), &y) in gates.iter().zip(&up).zip(&y) {
                let (g, u) = (f64::from(g), f64::from(u));
                let expected = g / (1.0 + (-g).exp()) * u;
                // Far below, exp saturates at 2¹²⁷.
                let bound = 1e-6 * expected.abs() + 1.2e-38 * (g * u).abs();
                assert_close(y, expected, bound, &format!("{level} silu({g})"));
            }
        }
    }
}

#[test]
fn gelu_is_within_its_bound() {
    for level in Level::available() {
        let gates = gates();
        let up = numbers(gates.len(), 4, 2.0);
        let mut y = gates.clone();
        gelu_gate(&mut y, &up, level).unwrap();
        for ((&g, &u), &y) in gates.iter().zip(&up).zip(&y) {
            let (g, u) = (f64::from(g), f64::from(u));
            let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            let expected = g / (1.0 + (-2.0 * z).exp()) * u;
            let relative = 1e-6 + if z < 0.0 { 4e-7 * z.abs().min(50.0) } else { 0.0 };
            let bound = relative * expected.abs() + 1.2e-38 * (g * u).abs();
            assert_close(y, expected, bound, &format!("{level} gelu({g})"));
        }
    }
}

#[test]
fn softcap_is_within_its_bound() {
    for level in Level::available() {
        for cap in [0.5, 30.0] {
            let x = gates();
            for length in LENGTHS.into_iter().chain([x.len()]) {
                let mut y = x[..length].to_vec();
                softcap(&mut y, cap, level).unwrap();
                for (&x, &y) in x.iter().zip(&y) {
                    let expected = f64::from(cap) * (f64::from(x) / f64::from(cap)).tanh();
                    assert_close(y, expected, 6e-7 * expected.abs(), level.name());
                }
            }
        }
        let mut row = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        softcap(&mut row, 30.0, level).unwrap();
        assert!(row[0].is_nan() && row[1..] == [30.0, -30.0]);
        for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = softcap(&mut row, cap, level).unwrap_err();
            assert!(matches!(error, Error::InvalidParameter { .. }));
        }
    }
}

#[test]
fn nan_gates_stay_nan() {
    for level in Level::available() {
        for gate in [silu_gate, gelu_gate] {
            let mut g = [f32::NAN, 1.0, f32::INFINITY];
            gate(&mut g, &[1.0; 3], level).unwrap();
            assert!(g[0].is_nan() && g[1] > 0.5 && g[2] == f32::INFINITY, "{level} {g:?}");
        }
    }
}

#[test]
fn residual_sums_are_rounded_once() {
    for level in Level::available() {
        for length in LENGTHS {
            let (x, y) = (numbers(length, 5, 1.0), numbers(length, 6, 1.0));
            let mut sum = x.clone();
            add(&mut sum, &y, level).unwrap();
            let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_eq!(sum, expected);
        }
    }
}

#[test]
fn softmax_and_its_logarithm_are_within_their_bounds() {
    for level in Level::available() {
        for length in LENGTHS.into_iter().skip(1).chain([5000]) {
            for scale in [0.1, 10.0, 60.0] {
                let mut x = numbers(length, 7, scale);
                x[length / 2] = f32::NEG_INFINITY;
                x[0] = scale;
                let sum: f64 = x.iter().map(|&x| f64::from(x - scale).exp()).sum();
                let (mut p, mut log) = (x.clone(), x.clone());
                softmax(&mut p, level);
                log_softmax(&mut log, level);
                for ((&x, &p), &log) in x.iter().zip(&p).zip(&log) {
                    // f32 holds x − max only to its last place.
                    let exponent = f64::from(x) - f64::from(scale);
                    let expected = exponent.exp() / sum;
                    let relative = 1e-6 + 6e-8 * exponent.abs().min(200.0);
                    assert_close(p, expected, relative * expected + 2e-38, level.name());
                    if x == f32::NEG_INFINITY {
                        assert_eq!((p, log), (0.0, f32::NEG_INFINITY));
                        continue;
                    }
                    let expected = exponent - sum.ln();
                    let most = f64::from(x.abs()).max(expected.abs()).max(f64::from(scale));
                    let bound = 5e-7 + 2f64.powi(-23) * most;
                    assert_close(log, expected, bound, level.name());
                }
            }
        }
    }
}

#[test]
fn rows_without_a_finite_largest_logit_become_nan() {
    for level in Level::available() {
        for row in [[f32::NEG_INFINITY; 3], [0.0, f32::INFINITY, 1.0], [0.0, f32::NAN, 1.0]] {
            for function in [softmax, log_softmax] {
                let mut x = row;
                function(&mut x, level);
                assert!(x.iter().all(|x| x.is_nan()), "{level} {row:?} {x:?}");
            }
        }
        softmax(&mut [], level);
        log_softmax(&mut [], level);
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let level = Level::available().last().unwrap();
    let norm = RmsNorm { weight: &[1.0; 4], epsilon: 0.0 };
    let refused = |result: Result<(), Error>| matches!(result, Err(Error::LengthMismatch { .. }));
    assert!(refused(rms_norm(norm, &[1.0; 8], &mut [0.0; 4], level)));
    assert!(refused(rms_norm_in_place(norm, &mut [0.0; 6], level)));
    assert!(refused(rms_norm_in_place(RmsNorm { weight: &[], ..norm }, &mut [0.0], level)));
    assert!(refused(silu_gate(&mut [0.0; 2], &[0.0; 3], level)));
    assert!(refused(gelu_gate(&mut [0.0; 2], &[0.0; 1], level)));
    assert!(refused(add(&mut [0.0; 2], &[0.0; 1], level)));
}
