//! A grouped-query layer in plain loops around replaceable kernels.
//!
//! ```text
//! q, k, v = x Wᵀ + b      q, k = rope(norm(q)), rope(norm(k))      out = attention(q, k, v) Wₒᵀ + bₒ
//! ```

use super::golden::{Case, check};
use super::rope::rope_config;
use foveal::position::{Rope, RopeLayout};
use foveal::{Mask, Shape};
use std::ops::Range;

/// Numbers `[batch, seq, heads, dim]`.
#[derive(Debug, Clone)]
pub struct Heads {
    pub shape: Shape,
    pub data: Vec<f64>,
}

impl Heads {
    fn empty(like: Shape) -> Heads {
        Heads { shape: Shape { seq: 0, ..like }, data: vec![] }
    }

    /// The tokens of `self` and then those of `new`, for each sequence.
    fn append(&self, new: &Heads) -> Heads {
        let shape = Shape { seq: self.shape.seq + new.shape.seq, ..new.shape };
        let sequence = |heads: &Heads, b: usize| {
            let len = heads.data.len() / heads.shape.batch;
            heads.data[b * len..(b + 1) * len].to_vec()
        };
        let data = (0..shape.batch).flat_map(|b| [sequence(self, b), sequence(new, b)].concat());
        Heads { shape, data: data.collect() }
    }
}

/// What a layer is made of besides matrices.
pub trait Kernels {
    /// Attention's output `[batch, seq, heads, value dim]`.
    fn attend(&self, inputs: [&Heads; 3], mask: &Mask, scale: f64) -> Vec<f64>;
    /// Rotates every token to its position, those of one sequence after the other's.
    fn rotate(&self, rope: &Rope, positions: &[usize], x: &mut Heads);
}

/// A golden layer.
#[derive(Debug)]
pub struct Layer {
    pub case: Case,
    rope: Rope,
    mask: Mask,
    /// Heads of queries, and of keys and values.
    heads: [usize; 2],
}

impl Layer {
    pub fn new(case: Case) -> Layer {
        let dim = case.number("head_dim") as usize;
        let config = rope_config(&case.options["rope_parameters"], dim, RopeLayout::HalfSplit);
        let mask = match case.options["window"].as_u64() {
            Some(width) => Mask::window(width as usize),
            None => Mask::causal(),
        };
        let heads = ["num_attention_heads", "num_key_value_heads"].map(|n| case.number(n) as usize);
        let rope = Rope::new(config).unwrap();
        check(&case.name, rope.frequencies(), &case.tensor("inv_freq").data, 1e-12);
        Layer { rope, mask, heads, case }
    }

    /// Runs the whole input in calls of the given numbers of tokens, each with the keys and values of
    /// those before, and compares the output and the cache.
    pub fn check(&self, kernels: &dyn Kernels, calls: &[usize], tolerance: f64) {
        let [batch, seq, features] = self.case.tensor("x").shape[..] else { unreachable!() };
        assert_eq!(calls.iter().sum::<usize>(), seq);
        let like = Shape { batch, seq, heads: self.heads[1], dim: self.dim() };
        let (mut k, mut v) = (Heads::empty(like), Heads::empty(like));
        let mut out = Heads::empty(Shape { heads: 1, dim: features, ..like });
        for &count in calls {
            let tokens = k.shape.seq..k.shape.seq + count;
            let [q, new_k, new_v] = self.project_inputs(kernels, tokens);
            (k, v) = (k.append(&new_k), v.append(&new_v));
            let scale = self.case.number("scale");
            let attended = kernels.attend([&q, &k, &v], &self.mask, scale);
            let data = self.project("o_proj", &attended, q.shape.heads * q.shape.dim);
            out = out.append(&Heads { shape: Shape { seq: count, ..out.shape }, data });
        }
        self.case.check("out", &out.data, tolerance);
        if self.case.tensors.contains_key("cache_k") {
            self.case.check("cache_k", &k.data, tolerance);
            self.case.check("cache_v", &v.data, tolerance);
        }
    }

    fn dim(&self) -> usize {
        self.case.number("head_dim") as usize
    }

    /// Queries, keys and values of some tokens, ready for attention.
    fn project_inputs(&self, kernels: &dyn Kernels, tokens: Range<usize>) -> [Heads; 3] {
        let x = self.case.tensor("x");
        let (batch, features) = (x.shape[0], x.shape[2]);
        let take = |data: &[f64], width: usize| -> Vec<f64> {
            let sequences = data.chunks(data.len() / batch);
            sequences.flat_map(|s| s[tokens.start * width..tokens.end * width].to_vec()).collect()
        };
        let x = take(&x.data, features);
        let positions = take(&self.case.tensor("position_ids").data, 1);
        let positions: Vec<usize> = positions.into_iter().map(|p| p as usize).collect();
        [("q", 0), ("k", 1), ("v", 1)].map(|(name, which)| {
            let mut data = self.project(&format!("{name}_proj"), &x, features);
            self.normalize(&format!("{name}_norm.weight"), &mut data);
            let (heads, dim) = (self.heads[which], self.dim());
            let mut result = Heads { shape: Shape { batch, seq: tokens.len(), heads, dim }, data };
            if name != "v" {
                kernels.rotate(&self.rope, &positions, &mut result);
            }
            result
        })
    }

    /// `x Wᵀ + b` for rows of `width` numbers.
    fn project(&self, name: &str, x: &[f64], width: usize) -> Vec<f64> {
        let weight = &self.case.tensor(&format!("{name}.weight")).data;
        let bias = self.case.tensors.get(&format!("{name}.bias"));
        let rows = x.chunks(width).flat_map(|x| {
            weight.chunks(width).enumerate().map(move |(n, row)| {
                let product: f64 = row.iter().zip(x).map(|(w, x)| w * x).sum();
                product + bias.map_or(0.0, |bias| bias.data[n])
            })
        });
        rows.collect()
    }

    /// RMSNorm of each head, if the layer has it; Gemma's weights are offsets from 1.
    fn normalize(&self, name: &str, x: &mut [f64]) {
        let Some(weight) = self.case.tensors.get(name) else { return };
        let order = self.case.options["order"].as_str().unwrap();
        let offset = if order.contains("(1+w)") { 1.0 } else { 0.0 };
        for head in x.chunks_mut(weight.data.len()) {
            let square: f64 = head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64;
            let factor = (square + self.case.number("rms_norm_eps")).sqrt().recip();
            for (x, w) in head.iter_mut().zip(&weight.data) {
                *x *= factor * (w + offset);
            }
        }
    }
}
