//! Latent attention, plain and absorbed, against its definition in f64 and against golden vectors.

#[path = "../support/mod.rs"]
mod support;

mod laws;
mod layers;
mod refusals;

use foveal::cache::{KvStore, LatentCache};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentScratch};
use foveal::projection::{Format, Matrix, MatrixShape};
use foveal::{Element, Mask, Phase, Scale, Shape, Tensor, TensorRef, Workspace};
use half::{bf16, f16};
use layers::{FORMS, Layer, PHASES, attention};
use support::golden::{Case, cases, check};
use support::{cpus, error};

/// Both forms, both phases and every level against the definition.
fn check_layer<E: Element>(layer: &Layer, mask: &Mask, bound: f64) {
    let expected = layer.reference::<E>(mask);
    for cpu in cpus() {
        for (form, phase) in FORMS.into_iter().flat_map(|form| PHASES.map(|phase| (form, phase))) {
            if phase == Phase::Generated && layer.q.shape().seq > 64 {
                continue;
            }
            let got = layer.run::<E>(attention(mask.clone(), cpu), (form, phase));
            let what =
                format!("{:?} {} {mask} {} {form:?} {phase:?}", layer.dims, E::DTYPE, cpu.level);
            let worst = error(&got.out, &expected.out);
            assert!(worst <= bound, "{what}: output off by {worst:e}");
            let worst = error(&got.lse, &expected.lse);
            assert!(worst <= bound, "{what}: log-sum-exp off by {worst:e}");
        }
    }
}

#[test]
fn all_small_shapes() {
    for queries in 0..=6 {
        for keys in 0..=7 {
            let n = queries * 8 + keys;
            let dims = LatentDims {
                heads: [1, 2, 3, 13][n % 4],
                latent: [1, 2, 7, 8, 17, 33][n % 6],
                rope: [0, 2, 4, 6, 16][n % 5],
                nope: [1, 3, 8, 17, 0, 16, 33][n % 7].max(usize::from(n % 5 == 0)),
                value: [1, 5, 16, 18][(n / 3) % 4],
            };
            let layer = Layer::new(dims, [2, queries, keys], n as u64);
            for mask in [Mask::full(), Mask::causal(), Mask::window(2), Mask::window(0)] {
                check_layer::<f32>(&layer, &mask, 3e-6);
            }
        }
    }
}

#[test]
fn shapes_around_every_block_size() {
    for (n, (queries, keys)) in
        [(5, 63), (7, 65), (64, 255), (49, 257), (3, 512), (2, 513), (97, 300), (1, 1100)]
            .into_iter()
            .enumerate()
    {
        let dims = LatentDims {
            heads: [2, 16, 3, 1, 12, 4, 5, 20][n],
            latent: [64, 32, 130, 48, 256, 8, 72, 16][n],
            rope: [16, 8, 32, 64, 2, 10, 0, 4][n],
            nope: [32, 16, 64, 130, 8, 20, 33, 12][n],
            value: [32, 64, 16, 65, 8, 100, 1, 24][n],
        };
        let layer = Layer::new(dims, [1, queries, keys], 100 + n as u64);
        for mask in [Mask::causal(), Mask::window(70), Mask::band(Some(40), Some(3))] {
            check_layer::<f32>(&layer, &mask, 5e-6);
        }
    }
}

#[test]
fn rows_of_16_bits() {
    let dims = LatentDims { heads: 4, latent: 48, rope: 16, nope: 24, value: 32 };
    for (queries, keys) in [(1, 600), (5, 5), (70, 300)] {
        let layer = Layer::new(dims, [2, queries, keys], keys as u64);
        check_layer::<bf16>(&layer, &Mask::causal(), 5e-6);
        check_layer::<f16>(&layer, &Mask::causal(), 5e-6);
    }
}

#[test]
fn matrices_in_the_form_of_their_file() {
    let dims = LatentDims { heads: 3, latent: 256, rope: 8, nope: 40, value: 33 };
    let layer = Layer::new(dims, [1, 4, 40], 5);
    let numbers: Vec<f32> =
        layer.up.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
    let halves = |narrow: fn(f32) -> [u8; 2]| numbers.iter().flat_map(|&x| narrow(x)).collect();
    let forms: [(Format, Vec<u8>); 3] = [
        (Format::BF16, halves(|x| bf16::from_f32(x).to_le_bytes())),
        (Format::F16, halves(|x| f16::from_f32(x).to_le_bytes())),
        (Format::Q8_0, numbers.chunks(32).flat_map(q8_0).collect()),
    ];
    for (format, up) in forms {
        check_layer::<f32>(&Layer { format, up, ..layer.clone() }, &Mask::causal(), 1e-5);
    }
}

/// A block of 32 numbers.
fn q8_0(block: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(block.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0);
    let code = |x: &f32| (x / scale.to_f32()).round().clamp(-127.0, 127.0) as i8 as u8;
    scale.to_le_bytes().into_iter().chain(block.iter().map(code)).collect()
}

/// The tensors of a golden call as a layer: `w_uk [H, n, c]` and `w_uv [H, v, c]` side by side.
fn golden(case: &Case) -> Layer {
    let shape = |name: &str| case.tensor(name).shape.clone();
    let (q, keys) = (shape("q_nope"), shape("latent"));
    let dims = LatentDims {
        heads: q[2],
        latent: keys[2],
        rope: shape("k_rope")[2],
        nope: q[3],
        value: shape("w_uv")[1],
    };
    let joined = |a: &str, b: &str, [x, y]: [usize; 2]| -> Vec<f32> {
        let (a, b) = (case.tensor(a).to_f32(), case.tensor(b).to_f32());
        a.chunks(x).zip(b.chunks(y)).flat_map(|(a, b)| [a, b].concat()).collect()
    };
    let up = joined("w_uk", "w_uv", [dims.nope * dims.latent, dims.value * dims.latent]);
    let rows = joined("latent", "k_rope", [dims.latent, dims.rope]);
    let queries = joined("q_nope", "q_rope", [dims.nope, dims.rope]);
    let shape = |seq, heads, dim| Shape { batch: q[0], seq, heads, dim };
    Layer {
        dims,
        format: Format::F32,
        up: up.into_iter().flat_map(f32::to_le_bytes).collect(),
        q: Tensor::from_vec(queries, shape(q[1], dims.heads, dims.query())).unwrap(),
        rows: Tensor::from_vec(rows, shape(keys[1], 1, dims.row())).unwrap(),
    }
}

#[test]
fn golden_vectors() {
    let cases = cases("mla_attention");
    assert_eq!(cases.len(), 2);
    for case in cases {
        let (layer, tolerance) = (golden(&case), case.tolerance("f32"));
        assert!((layer.scale() - case.number("scale")).abs() < 1e-15);
        let widen = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        for cpu in cpus() {
            for (form, phase) in
                FORMS.into_iter().flat_map(|form| PHASES.map(|phase| (form, phase)))
            {
                let got = layer.run::<f32>(attention(Mask::causal(), cpu), (form, phase));
                case.check("out", &widen(&got.out), tolerance);
                case.check("lse", &widen(&got.lse), tolerance);
            }
        }
        golden_latent(&case, &layer, tolerance);
    }
}

/// With W_UK = W_UV = 1 and the golden absorbed queries, the output is the golden mixed row.
fn golden_latent(case: &Case, layer: &Layer, tolerance: f64) {
    let LatentDims { heads, latent, rope, nope, .. } = layer.dims;
    let dims = LatentDims { nope: latent, value: latent, ..layer.dims };
    let one: Vec<f32> =
        (0..latent * latent).map(|n| if n % (latent + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let up = one.repeat(2 * heads);
    let shape = MatrixShape { out_features: 2 * heads * latent, in_features: latent };
    let absorbed = case.tensor("q_absorbed").to_f32();
    let rotated = layer.q.as_slice().chunks(nope + rope).map(|q| &q[nope..]);
    let q = absorbed.chunks(latent).zip(rotated).flat_map(|(q, r)| [q, r].concat()).collect();
    let q = Tensor::from_vec(q, Shape { dim: latent + rope, ..layer.q.shape() }).unwrap();
    let caches: Vec<LatentCache<f32>> = layer.caches();
    let stores: Vec<&dyn KvStore> = caches.iter().map(|cache| cache as _).collect();
    for (cpu, form) in cpus().flat_map(|cpu| FORMS.map(|form| (cpu, form))) {
        let scale = Scale::Value(case.number("scale") as f32);
        let attention = attention(Mask::causal(), cpu).scale(scale);
        let up = Matrix::from_floats(shape, &up).unwrap();
        let one = LatentAttention::new(attention, dims, up).unwrap();
        let mut out = Tensor::<f32>::zeros(Shape { dim: latent, ..q.shape() }).unwrap();
        let call = LatentCall { q: q.view(), stores: &stores, phase: Phase::Prompt, form };
        let (mut scratch, mut workspace) = (LatentScratch::default(), Workspace::new());
        one.forward(call, (out.view_mut(), None), &mut scratch, &mut workspace).unwrap();
        let got: Vec<f64> = out.as_slice().iter().map(|&x| x.into()).collect();
        check(&case.name, &got, &case.tensor("out_latent").data, tolerance);
    }
}

#[test]
fn values_are_stored_once() {
    let (latent, rope) = (512, 64);
    let mut cache = LatentCache::<bf16>::new((latent, rope), 3).unwrap();
    assert_eq!(cache.bytes_per_token(), (latent + rope) * 2);
    let rows = vec![0.5f32; 3 * (latent + rope)];
    let shape = Shape { batch: 1, seq: 3, heads: 1, dim: latent + rope };
    cache.append(TensorRef::new(&rows, shape).unwrap()).unwrap();
    let tile = cache.tile(0, 0..3);
    let row = |rows, n| match rows {
        Some(foveal::cache::KvRows::Bf16(rows)) => rows.row(n),
        other => panic!("{other:?}"),
    };
    for n in 0..3 {
        let (key, value) = (row(tile.keys.rows(), n), row(tile.values.rows(), n));
        assert_eq!((key.len(), value.len()), (latent + rope, latent));
        assert_eq!(key.as_ptr(), value.as_ptr());
    }
}
