//! Whole layers (projections, QK-norm, RoPE, grouped attention) against golden vectors, with the definition in
//! f64 and with the engine, in one call and token by token.

mod support;

use foveal::position::Rope;
use foveal::reference::{Input, attention};
use foveal::{Attention, Cpu, Mask, Scale, Shape, Tensor};
use support::cpus;
use support::golden::cases;
use support::layer::{Heads, Kernels, Layer};

/// The formulas in f64.
struct Definition;

impl Kernels for Definition {
    fn attend(&self, inputs: [&Heads; 3], mask: &Mask, scale: f64) -> Vec<f64> {
        let inputs = inputs.map(|x| Input { data: &x.data, shape: x.shape });
        attention(inputs, scale, mask).unwrap().out
    }

    fn rotate(&self, rope: &Rope, positions: &[usize], x: &mut Heads) {
        let Shape { heads, dim, .. } = x.shape;
        for (token, &position) in x.data.chunks_mut(heads * dim).zip(positions) {
            for head in token.chunks_mut(dim) {
                for (c, (cos, sin)) in rope.cos_sin(position).enumerate() {
                    let (a, b) = (head[c], head[c + dim / 2]);
                    head[c] = a * cos - b * sin;
                    head[c + dim / 2] = b * cos + a * sin;
                }
            }
        }
    }
}

/// The kernels in f32; calls of one token take those for generated tokens.
struct Engine(Cpu);

fn round(x: &Heads) -> Tensor<f32> {
    Tensor::from_vec(x.data.iter().map(|&x| x as f32).collect(), x.shape).unwrap()
}

fn widen(x: &Tensor<f32>) -> Vec<f64> {
    x.as_slice().iter().map(|&x| x.into()).collect()
}

impl Kernels for Engine {
    fn attend(&self, inputs: [&Heads; 3], mask: &Mask, scale: f64) -> Vec<f64> {
        let [q, k, v] = inputs.map(round);
        let scale = Scale::Value(scale as f32);
        let attention = Attention::new().mask(mask.clone()).scale(scale).cpu(self.0);
        let result = match q.shape().seq {
            1 => attention.decode(q.view(), k.view(), v.view()),
            _ => attention.forward(q.view(), k.view(), v.view()),
        };
        widen(&result.unwrap().out)
    }

    fn rotate(&self, rope: &Rope, positions: &[usize], x: &mut Heads) {
        let mut rotated = round(x);
        let table = rope.table(positions.iter().copied()).unwrap();
        table.rotate(self.0.level, rotated.view_mut()).unwrap();
        x.data = widen(&rotated);
    }
}

/// In one call, as a prompt and then token by token, and as two prompts.
fn check(layer: &Layer, kernels: &dyn Kernels, tolerance: f64) {
    let seq = layer.case.tensor("x").shape[1];
    layer.check(kernels, &[seq], tolerance);
    let prefill = layer.case.options["prefill"].as_u64().map_or(3, |n| n as usize);
    let mut calls = vec![1; seq - prefill + 1];
    calls[0] = prefill;
    layer.check(kernels, &calls, tolerance);
    layer.check(kernels, &[2, seq - 2], tolerance);
}

fn check_all(mechanism: &str, count: usize) {
    let layers: Vec<_> = cases(mechanism).into_iter().map(Layer::new).collect();
    assert_eq!(layers.len(), count);
    for layer in &layers {
        check(layer, &Definition, layer.case.tolerance("f64"));
        for cpu in cpus() {
            check(layer, &Engine(cpu), layer.case.tolerance("f32"));
        }
    }
}

#[test]
fn grouped_layers() {
    check_all("gqa_layer", 4);
}

#[test]
fn grouped_layers_with_normalized_queries_and_keys() {
    check_all("qknorm_gqa_layer", 3);
}
