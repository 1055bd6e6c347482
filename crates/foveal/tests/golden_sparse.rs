//! Sparse attention against golden vectors: outputs, log-sum-exps and gradients, on every level.

mod support;

use foveal::mask::{Pattern, Site};
use foveal::plan::{Backward, Inputs};
use foveal::sparse::{
    BigBird, BlockPlan, Combine, Factors, Longformer, SparseTransformer, SubBlocks, Window,
};
use foveal::{Attention, Forward, Mask, Scale, Shape, Tensor};
use support::attention::{entry, shape};
use support::cpus;
use support::golden::{Case, cases};

fn tensor(case: &Case, name: &str) -> Tensor<f32> {
    Tensor::from_vec(case.tensor(name).to_f32(), shape(case.tensor(name))).unwrap()
}

/// The pattern that a case's options describe.
fn layer(case: &Case) -> SparseTransformer {
    let count = |name: &str| case.options[name].as_u64().map(|x| x as usize);
    let pattern = case.options["pattern"].as_str().unwrap();
    let convention = case.options["window_convention"].as_str().unwrap_or_default();
    let stride = ["stride", "block", "window"].into_iter().find_map(count).unwrap();
    let factors = if pattern.starts_with("fixed") {
        let same = SubBlocks::Same(count("vert").unwrap_or(0));
        let sub_blocks = count("num_verts").map_or(same, SubBlocks::Cycle);
        Factors::Fixed { stride, summary: count("summary").unwrap(), sub_blocks }
    } else {
        let code = convention.contains("p-l+1") || convention.contains("exactly l keys");
        let window = if code { Window::Code } else { Window::Paper };
        Factors::Strided { stride, window }
    };
    let separate = pattern.contains("multi-head") || pattern.contains("separate heads");
    let combine = match case.options["part"].as_str() {
        Some("a1") => Combine::Interleaved { layer: 0 },
        Some("a2") => Combine::Interleaved { layer: 1 },
        _ if separate => Combine::PerHead,
        _ if pattern.starts_with("local") => Combine::Interleaved { layer: 0 },
        _ if pattern.starts_with("strided A2") => Combine::Interleaved { layer: 1 },
        _ => Combine::Merged,
    };
    SparseTransformer::new(factors)
        .unwrap()
        .combine(combine)
        .scale(Scale::Value(case.number("scale") as f32))
}

#[test]
fn the_sparse_transformer_agrees_with_its_golden_vectors() {
    for case in cases("sparse_transformer") {
        let [q, k, v, d_out] = ["q", "k", "v", "d_out"].map(|name| tensor(&case, name));
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        for cpu in cpus() {
            let layer = layer(&case).cpu(cpu);
            let forward = layer.forward(inputs).unwrap();
            let backward = layer.backward(inputs, &forward, d_out.view()).unwrap();
            compare(&case, &forward, &backward);
        }
    }
}

fn compare(case: &Case, forward: &Forward<f32>, backward: &Backward<f32>) {
    let results = [
        ("out", &forward.out),
        ("lse", &forward.lse),
        ("grad.q", &backward.d_q),
        ("grad.k", &backward.d_k),
        ("grad.v", &backward.d_v),
    ];
    for (name, got) in results {
        let got: Vec<f64> = got.as_slice().iter().map(|&x| x.into()).collect();
        case.check(name, &got, case.tolerance("f32"));
    }
}

#[test]
fn the_masks_are_the_golden_ones() {
    for case in cases("sparse_transformer") {
        check_mask(&case, &layer(&case).mask());
    }
    for case in cases("bigbird") {
        check_mask(&case, &bigbird(&case).mask().unwrap());
    }
}

fn check_mask(case: &Case, mask: &Mask) {
    let golden = case.tensor("mask");
    let [q, k] = ["q", "k"].map(|name| shape(case.tensor(name)));
    for (row, j, q_head) in
        (0..q.seq).flat_map(|i| (0..k.seq).flat_map(move |j| (0..q.heads).map(move |h| (i, j, h))))
    {
        let site = Site { batch: 0, q_head, kv_head: 0 };
        let i = row as isize + k.seq as isize - q.seq as isize;
        let expected = entry(golden, site, row, j) == 1.0;
        assert_eq!(mask.allows(site, i, j), expected, "{} {row} {j} {q_head}", case.name);
    }
}

fn bigbird(case: &Case) -> BigBird {
    let random = case.tensor("random_blocks");
    let choices: Vec<_> = random.data.iter().map(|&x| (x >= 0.0).then_some(x as usize)).collect();
    let &[heads, blocks, count] = &random.shape[..] else { panic!("{:?}", random.shape) };
    let plan = BlockPlan::given([heads, blocks, count], &choices).unwrap();
    let causal = case.options["causal"].as_bool().unwrap();
    BigBird { block: case.number("block") as usize, plan, causal }
}

#[test]
fn bigbird_agrees_with_its_golden_vectors() {
    for case in cases("bigbird") {
        let [q, k, v, d_out] = ["q", "k", "v", "d_out"].map(|name| tensor(&case, name));
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        for cpu in cpus() {
            let scale = Scale::Value(case.number("scale") as f32);
            let mask = bigbird(&case).mask().unwrap();
            let attention = Attention::new().mask(mask).scale(scale).cpu(cpu);
            let forward = attention.forward(inputs.q, inputs.k, inputs.v).unwrap();
            let backward = attention.backward(inputs, &forward, d_out.view()).unwrap();
            compare(&case, &forward, &backward);
        }
    }
}

/// `x Wᵀ + b` in f64, as a tensor of heads.
fn project(case: &Case, name: &str, heads: usize) -> Tensor<f32> {
    let x = case.tensor("x");
    let [weight, bias] =
        ["weight", "bias"].map(|part| &case.tensor(&format!("{name}.{part}")).data);
    let &[batch, seq, width] = &x.shape[..] else { panic!("{:?}", x.shape) };
    let rows = x.data.chunks(width).flat_map(|x| {
        weight
            .chunks(width)
            .zip(bias)
            .map(move |(w, b)| (x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>() + b) as f32)
    });
    let shape = Shape { batch, seq, heads, dim: bias.len() / heads };
    Tensor::from_vec(rows.collect(), shape).unwrap()
}

/// Checks the gradients of a projection from that of its result, and adds its part to that of `x`.
fn unproject(case: &Case, name: &str, d: &Tensor<f32>, d_x: &mut [f64]) {
    let x = case.tensor("x");
    let width = x.shape[2];
    let weight = &case.tensor(&format!("{name}.weight")).data;
    let features = weight.len() / width;
    let (mut d_weight, mut d_bias) = (vec![0.0; weight.len()], vec![0.0; features]);
    let rows = d.as_slice().chunks(features).zip(x.data.chunks(width)).zip(d_x.chunks_mut(width));
    for ((d, x), d_x) in rows {
        for (n, &d) in d.iter().enumerate() {
            let d = f64::from(d);
            d_bias[n] += d;
            for i in 0..width {
                d_weight[n * width + i] += d * x[i];
                d_x[i] += d * weight[n * width + i];
            }
        }
    }
    let tolerance = case.tolerance("f32");
    case.check(&format!("grad.{name}.weight"), &d_weight, tolerance);
    case.check(&format!("grad.{name}.bias"), &d_bias, tolerance);
}

#[test]
fn longformer_agrees_with_its_golden_vectors() {
    const LOCAL: [&str; 3] = ["query", "key", "value"];
    const GLOBAL: [&str; 3] = ["query_global", "key_global", "value_global"];
    for case in cases("longformer") {
        let heads = case.number("heads") as usize;
        let flags = |name: &str| {
            let mask = case.tensor(name);
            mask.data.chunks(mask.shape[1]).map(<[f64]>::to_vec).collect::<Vec<_>>()
        };
        let global = flags("global_mask")
            .into_iter()
            .map(|flags| (0..flags.len()).filter(|&t| flags[t] != 0.0).collect::<Vec<_>>());
        let lengths = flags("key_mask").into_iter().map(|flags| {
            let length = flags.iter().take_while(|&&flag| flag != 0.0).count();
            assert!(flags[length..].iter().all(|&flag| flag == 0.0), "padding is on the right");
            length
        });
        let layer = Longformer::new(case.number("window_total") as usize / 2)
            .global(global.collect())
            .lengths(lengths.collect())
            .scale(Scale::Value(case.number("scale") as f32));
        let local = LOCAL.map(|name| project(&case, name, heads));
        let far = GLOBAL.map(|name| project(&case, name, heads));
        let d_out = Tensor::from_vec(case.tensor("d_out").to_f32(), local[0].shape()).unwrap();
        for cpu in cpus() {
            let layer = layer.clone().cpu(cpu);
            let [local_inputs, far_inputs] =
                [&local, &far].map(|x| Inputs { q: x[0].view(), k: x[1].view(), v: x[2].view() });
            let forward = layer.forward(local_inputs, far_inputs).unwrap();
            let out: Vec<f64> = forward.out.as_slice().iter().map(|&x| x.into()).collect();
            case.check("out", &out, case.tolerance("f32"));
            let gradients =
                layer.backward(local_inputs, far_inputs, &forward, d_out.view()).unwrap();
            let mut d_x = vec![0.0; case.tensor("x").data.len()];
            for (names, d) in [LOCAL, GLOBAL].into_iter().zip(&gradients) {
                for (name, d) in names.into_iter().zip([&d.d_q, &d.d_k, &d.d_v]) {
                    unproject(&case, name, d, &mut d_x);
                }
            }
            case.check("grad.x", &d_x, case.tolerance("f32"));
        }
    }
}
