//! Rotary embeddings against golden vectors, and what rotations have to obey.

mod support;

use foveal::position::{Rope, RopeConfig, RopeLayout, RopeScaling, RopeTable, Yarn, YarnAmplitude};
use foveal::{Level, Shape, Strides, Tensor, TensorMut};
use support::Random;
use support::attention::shape;
use support::golden::{Array, Case, cases, check};
use support::rope::rope_config;

const LAYOUTS: [(RopeLayout, &str); 2] =
    [(RopeLayout::HalfSplit, "half_split"), (RopeLayout::Interleaved, "interleaved")];

fn golden_rope(case: &Case, layout: RopeLayout) -> Rope {
    Rope::new(rope_config(&case.options, case.number("head_dim") as usize, layout)).unwrap()
}

fn tensor(array: &Array) -> Tensor<f32> {
    Tensor::from_vec(array.to_f32(), shape(array)).unwrap()
}

fn widen(x: &Tensor<f32>) -> Vec<f64> {
    x.as_slice().iter().map(|&x| x.into()).collect()
}

#[test]
fn frequencies_and_tables_agree_with_the_golden_vectors() {
    let cases = cases("rope");
    assert_eq!(cases.len(), 12);
    for case in &cases {
        let rope = golden_rope(case, RopeLayout::HalfSplit);
        let expected = &case.tensor("inv_freq").data;
        assert_eq!(rope.frequencies().len(), expected.len(), "{}", case.name);
        for (got, expected) in rope.frequencies().iter().zip(expected) {
            assert!((got / expected - 1.0).abs() < 1e-12, "{}: {got} {expected}", case.name);
        }
        let multiplier = case.number("cos_sin_multiplier");
        assert!((rope.amplitude() / multiplier - 1.0).abs() < 1e-14, "{}", case.name);
        let positions = case.tensor("positions").indices();
        let (cos, sin): (Vec<_>, Vec<_>) = positions.iter().flat_map(|&p| rope.cos_sin(p)).unzip();
        case.check("cos", &cos, case.tolerance("f64"));
        case.check("sin", &sin, case.tolerance("f64"));
    }
}

#[test]
fn rotations_and_gradients_agree_with_the_golden_vectors() {
    for case in cases("rope") {
        let tolerance = case.tolerance("f32_with_f64_angles");
        for ((layout, name), level) in
            LAYOUTS.into_iter().flat_map(|x| Level::available().map(move |level| (x, level)))
        {
            let rope = golden_rope(&case, layout);
            let table = rope.table(case.tensor("positions").indices()).unwrap();
            let (mut x, mut d_x) = (tensor(case.tensor("x")), tensor(case.tensor("d_out")));
            table.rotate(level, x.view_mut()).unwrap();
            case.check(&format!("out_{name}"), &widen(&x), tolerance);
            table.rotate_gradient(level, d_x.view_mut()).unwrap();
            case.check(&format!("grad.x_{name}"), &widen(&d_x), tolerance);
        }
    }
}

fn yarn_rope(layout: RopeLayout) -> Rope {
    let scaling = RopeScaling::Yarn(Yarn::new(4.0, 256.0));
    Rope::new(RopeConfig { rotary_dim: 10, scaling, ..RopeConfig::new(13, layout) }).unwrap()
}

const SHAPE: Shape = Shape { batch: 2, seq: 5, heads: 3, dim: 13 };

#[test]
fn unrotating_restores_and_the_rest_of_a_head_stays() {
    for ((layout, name), level) in
        LAYOUTS.into_iter().flat_map(|x| Level::available().map(move |level| (x, level)))
    {
        let table = yarn_rope(layout).table(1_000_000..1_000_005).unwrap();
        let before: Tensor<f32> = Random::new(1).tensor(SHAPE, 1.0);
        let mut x = before.clone();
        table.rotate(level, x.view_mut()).unwrap();
        for (x, before) in x.as_slice().chunks(13).zip(before.as_slice().chunks(13)) {
            assert_eq!(x[10..], before[10..], "{name} {level}");
            assert_ne!(x[..10], before[..10], "{name} {level}");
        }
        table.unrotate(level, x.view_mut()).unwrap();
        check(&format!("{name} {level}"), &widen(&x), &widen(&before), 5e-7);
    }
}

/// ⟨g, R x⟩ = ⟨Rᵀ g, x⟩ for partial rotations with an amplitude, and the rest of a head passes through.
#[test]
fn gradients_are_rotated_by_the_transpose() {
    for ((layout, name), level) in
        LAYOUTS.into_iter().flat_map(|x| Level::available().map(move |level| (x, level)))
    {
        let table = yarn_rope(layout).table(1000..1005).unwrap();
        assert!(table.rope().amplitude() > 1.1);
        let x: Tensor<f32> = Random::new(6).tensor(SHAPE, 1.0);
        let d_y: Tensor<f32> = Random::new(7).tensor(SHAPE, 1.0);
        let (mut y, mut d_x) = (x.clone(), d_y.clone());
        table.rotate(level, y.view_mut()).unwrap();
        table.rotate_gradient(level, d_x.view_mut()).unwrap();
        let rows = |x: &Tensor<f32>| -> Vec<Vec<f64>> {
            widen(x).chunks(13).map(<[f64]>::to_vec).collect()
        };
        let product = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let (x, y, d_x, d_y) = (rows(&x), rows(&y), rows(&d_x), rows(&d_y));
        for row in 0..x.len() {
            assert_eq!(d_x[row][10..], d_y[row][10..], "{name} {level}");
            let (behind, before) = (product(&d_y[row], &y[row]), product(&d_x[row], &x[row]));
            assert!((behind - before).abs() < 2e-6, "{name} {level} {behind} {before}");
        }
    }
}

#[test]
fn scores_depend_on_the_distance_alone() {
    for (layout, name) in LAYOUTS {
        let rope = Rope::new(RopeConfig::new(64, layout)).unwrap();
        let shape = Shape { batch: 1, seq: 1, heads: 1, dim: 64 };
        let mut random = Random::new(2);
        let (q, k): (Tensor<f32>, Tensor<f32>) =
            (random.tensor(shape, 1.0), random.tensor(shape, 1.0));
        let score = |at: usize| -> f64 {
            let turned = |x: &Tensor<f32>, position: usize| {
                let mut x = x.clone();
                let table = rope.table([position]).unwrap();
                table.rotate(Level::detect().unwrap(), x.view_mut()).unwrap();
                widen(&x)
            };
            turned(&q, at + 17).iter().zip(turned(&k, at)).map(|(q, k)| q * k).sum()
        };
        for at in [1, 1000, 1_000_000, 1 << 30] {
            assert!((score(at) - score(0)).abs() < 3e-6, "{name} at {at}");
        }
    }
}

#[test]
fn cosines_are_right_at_a_million_tokens() {
    let rope = Rope::new(RopeConfig::new(2, RopeLayout::HalfSplit)).unwrap();
    // The first pair turns one radian a token: sines of whole numbers.
    for (position, sin, cos) in [
        (1_000_000, -0.349_993_502_171_292_94, 0.936_752_127_533_122_2),
        (10_000_000, 0.420_547_793_190_782_5, -0.907_270_386_181_739_6),
    ] {
        let table = rope.table([position]).unwrap();
        let shape = Shape { batch: 1, seq: 1, heads: 1, dim: 2 };
        let mut x = Tensor::from_vec(vec![1.0, 0.0], shape).unwrap();
        table.rotate(Level::detect().unwrap(), x.view_mut()).unwrap();
        assert_eq!(x.as_slice(), [cos as f32, sin as f32], "{position}");
    }
}

#[test]
fn every_level_gives_the_same_bits() {
    for dim in (0..=70).step_by(2) {
        for (layout, name) in LAYOUTS {
            let shape = Shape { batch: 1, seq: 3, heads: 2, dim: dim + 1 };
            let config = RopeConfig { rotary_dim: dim, ..RopeConfig::new(dim + 1, layout) };
            let table = Rope::new(config).unwrap().table([3, 70_001, 12]).unwrap();
            let results = Level::available().map(|level| {
                let mut x: Tensor<f32> = Random::new(dim as u64).tensor(shape, 1.0);
                table.rotate(level, x.view_mut()).unwrap();
                x.into_vec().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            let results: Vec<_> = results.collect();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{name} {dim}");
        }
    }
}

/// Rows of the table by rotating (1, 0) in every pair.
fn rotated(table: &RopeTable, shape: Shape) -> Vec<f32> {
    let mut x: Tensor<f32> = Random::new(5).tensor(shape, 1.0);
    table.rotate(Level::detect().unwrap(), x.view_mut()).unwrap();
    x.into_vec()
}

#[test]
fn tables_move_grow_and_shrink_as_if_made_anew() {
    let rope = yarn_rope(RopeLayout::HalfSplit);
    let mut moved = rope.table(0..0).unwrap();
    let steps = [&[7, 8, 9][..], &[7, 8, 9], &[8, 8], &[], &[1], &[1, 4, 8, 16, 23], &[1, 5]];
    for positions in steps {
        moved.set_positions(positions.iter().copied()).unwrap();
        assert_eq!(moved.positions(), positions);
        let shape = Shape { seq: positions.len(), ..SHAPE };
        let fresh = rope.table(positions.iter().copied()).unwrap();
        assert_eq!(rotated(&moved, shape), rotated(&fresh, shape), "{positions:?}");
    }
}

#[test]
fn sequences_of_a_batch_may_have_positions_of_their_own() {
    let rope = yarn_rope(RopeLayout::Interleaved);
    let own = rotated(&rope.table([0, 1, 2, 3, 4, 90, 91, 92, 93, 94]).unwrap(), SHAPE);
    let half = own.len() / 2;
    let shared = |start: usize| rotated(&rope.table(start..start + 5).unwrap(), SHAPE);
    assert_eq!(own[..half], shared(0)[..half]);
    assert_eq!(own[half..], shared(90)[half..]);
}

#[test]
fn strided_views_rotate_like_dense_ones() {
    let table = yarn_rope(RopeLayout::HalfSplit).table(3..8).unwrap();
    let dense = rotated(&table, SHAPE);
    // Heads first: [batch, heads, seq, dim].
    let strides = Strides { batch: 5 * 3 * 13, seq: 13, heads: 5 * 13 };
    let mut data = vec![0.0; dense.len()];
    let source: Tensor<f32> = Random::new(5).tensor(SHAPE, 1.0);
    let mut view = TensorMut::from_strides(&mut data, SHAPE, strides).unwrap();
    let places = |b: usize| (0..5).flat_map(move |t| (0..3).map(move |h| (b, t, h)));
    for (b, t, h) in (0..2).flat_map(places) {
        view.row_mut(b, t, h).copy_from_slice(source.view().row(b, t, h));
    }
    table.rotate(Level::detect().unwrap(), view.reborrow()).unwrap();
    for ((b, t, h), row) in (0..2).flat_map(places).zip(dense.chunks(13)) {
        assert_eq!(view.row_mut(b, t, h), row);
    }
}

#[test]
fn frequency_factors_divide_and_static_ntk_stretches() {
    let plain = Rope::new(RopeConfig::new(8, RopeLayout::HalfSplit)).unwrap();
    let factors = [1.0f32, 2.0, 0.5, 4.0];
    let divided = plain.clone().with_frequency_factors(&factors).unwrap();
    for ((a, b), factor) in plain.frequencies().iter().zip(divided.frequencies()).zip(factors) {
        assert_eq!(a / f64::from(factor), *b);
    }
    let ntk = |scaling| {
        Rope::new(RopeConfig { scaling, ..RopeConfig::new(8, RopeLayout::HalfSplit) }).unwrap()
    };
    // The highest frequency stays, the lowest is divided by the factor.
    let stretched = ntk(RopeScaling::Ntk { factor: 4.0 });
    let ratio = |n: usize| plain.frequencies()[n] / stretched.frequencies()[n];
    assert_eq!(ratio(0), 1.0);
    assert!((ratio(3) - 4.0).abs() < 1e-12);
    let dynamic =
        |context| ntk(RopeScaling::DynamicNtk { factor: 1.0, original_context: 100.0, context });
    assert_eq!(dynamic(400.0), stretched);
    assert_eq!(dynamic(50.0), plain);
}

#[test]
fn parameters_outside_their_ranges_are_refused() {
    let good = RopeConfig::new(16, RopeLayout::HalfSplit);
    let refused = |config: RopeConfig| Rope::new(config).unwrap_err().to_string();
    for rotary_dim in [3, 18, usize::MAX - 1] {
        assert!(refused(RopeConfig { rotary_dim, ..good }).contains("rotary dim"));
    }
    let huge = RopeConfig::new(usize::MAX - 1, RopeLayout::HalfSplit);
    assert!(refused(huge).contains("rotary dim"));
    let bad = [0.0, -1.0, f64::NAN, f64::INFINITY];
    for x in bad {
        let yarn = Yarn::new(4.0, 256.0);
        for scaling in [
            RopeScaling::Linear { factor: x },
            RopeScaling::Ntk { factor: x },
            RopeScaling::DynamicNtk { factor: x, original_context: 1.0, context: 1.0 },
            RopeScaling::DynamicNtk { factor: 1.0, original_context: x, context: 1.0 },
            RopeScaling::DynamicNtk { factor: 1.0, original_context: 1.0, context: x },
            RopeScaling::Yarn(Yarn { factor: x, ..yarn }),
            RopeScaling::Yarn(Yarn { original_context: x, ..yarn }),
            RopeScaling::Yarn(Yarn { beta_fast: x, ..yarn }),
            RopeScaling::Yarn(Yarn { beta_slow: x, ..yarn }),
            RopeScaling::Yarn(Yarn { amplitude: YarnAmplitude::Fixed(x), ..yarn }),
        ] {
            refused(RopeConfig { scaling, ..good });
        }
        refused(RopeConfig { theta: x, ..good });
        let llama = |x: [f64; 4]| {
            let [factor, low_freq_factor, high_freq_factor, original_context] = x;
            let scaling =
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context };
            Rope::new(RopeConfig { scaling, ..good })
        };
        let numbers = [8.0, 1.0, 4.0, 8192.0];
        assert!(llama(numbers).is_ok());
        for n in 0..4 {
            let mut numbers = numbers;
            numbers[n] = x;
            assert!(llama(numbers).is_err(), "{numbers:?}");
        }
        let rope = Rope::new(good).unwrap();
        assert!(rope.with_frequency_factors(&[x as f32; 8]).is_err());
    }
    // A frequency that overflows, and one that vanishes.
    refused(RopeConfig { scaling: RopeScaling::Linear { factor: 1e-310 }, ..good });
    refused(RopeConfig { scaling: RopeScaling::Ntk { factor: 1e308 }, ..good });
    assert!(Rope::new(good).unwrap().with_frequency_factors(&[1.0; 7]).is_err());
}

#[test]
fn tables_refuse_what_they_were_not_made_for() {
    let rope = Rope::new(RopeConfig::new(16, RopeLayout::HalfSplit)).unwrap();
    let mut table = rope.table(0..5).unwrap();
    let rotate = |table: &RopeTable, shape: Shape| {
        let mut x = Tensor::zeros(shape).unwrap();
        table.rotate(Level::detect().unwrap(), x.view_mut())
    };
    let shape = Shape { dim: 16, ..SHAPE };
    assert!(rotate(&table, shape).is_ok());
    assert!(rotate(&table, Shape { dim: 18, ..shape }).is_err());
    assert!(rotate(&table, Shape { seq: 4, ..shape }).is_err());
    assert!(rotate(&table, Shape { seq: 0, ..shape }).is_err());
    assert!(rotate(&table, Shape { batch: 0, ..shape }).is_ok());
    assert!(table.set_positions(0..usize::MAX).is_err());
    assert!(table.positions().is_empty());
    assert!(table.set_positions(5..6).is_ok());
}
