//! Backward calls on poisoned memory, and their gradients in f64.

use super::Random;
use foveal::plan::{Gradients, Inputs, Saved, Upstream};
use foveal::reference::{Derivatives, Input, Options, attention_backward};
use foveal::{Attention, Element, Shape, Tensor, Workspace};

/// The extents of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub value_dim: usize,
}

/// The tensors that a backward call reads, besides the results of forward.
#[derive(Debug, Clone)]
pub struct Call<E> {
    pub q: Tensor<E>,
    pub k: Tensor<E>,
    pub v: Tensor<E>,
    pub d_out: Tensor<E>,
    pub d_lse: Option<Tensor<f32>>,
}

/// Gradients of queries, keys and values.
#[derive(Debug, Clone, PartialEq)]
pub struct Result<E> {
    pub d_q: Vec<E>,
    pub d_k: Vec<E>,
    pub d_v: Vec<E>,
}

impl<E: Element> Call<E> {
    pub fn random(sizes: Sizes, seed: u64) -> Call<E> {
        let mut random = Random::new(seed);
        let Sizes { batch, queries, keys, heads, kv_heads, dim, value_dim } = sizes;
        let q = Shape { batch, seq: queries, heads, dim };
        let k = Shape { batch, seq: keys, heads: kv_heads, dim };
        Call {
            q: random.tensor(q, 2.0),
            k: random.tensor(k, 2.0),
            v: random.tensor(Shape { dim: value_dim, ..k }, 1.0),
            d_out: random.tensor(Shape { dim: value_dim, ..q }, 1.0),
            d_lse: Some(random.tensor(q.per_row(), 1.0)),
        }
    }

    /// Forward and backward; what is written to is filled with NaN before.
    pub fn run(&self, attention: &Attention<'_>) -> Result<E> {
        let forward = attention.forward(self.q.view(), self.k.view(), self.v.view()).unwrap();
        let nan = |x: &Tensor<E>| {
            let len = x.as_slice().len();
            Tensor::from_vec(vec![E::from_f32(f32::NAN); len], x.shape()).unwrap()
        };
        let (mut d_q, mut d_k, mut d_v) = (nan(&self.q), nan(&self.k), nan(&self.v));
        let plan = attention.plan(self.q.shape(), self.k.shape(), self.v.shape()).unwrap();
        let mut workspace = Workspace::for_backward::<E>(&plan);
        workspace.poison();
        let inputs = Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() };
        let saved = Saved { out: forward.out.view(), lse: forward.lse.view() };
        let d_lse = self.d_lse.as_ref().map(Tensor::view);
        let upstream = Upstream { d_out: self.d_out.view(), d_lse };
        let gradients =
            Gradients { d_q: d_q.view_mut(), d_k: d_k.view_mut(), d_v: d_v.view_mut() };
        plan.backward(inputs, saved, upstream, gradients, &mut workspace).unwrap();
        Result { d_q: d_q.into_vec(), d_k: d_k.into_vec(), d_v: d_v.into_vec() }
    }

    /// The gradients as they are defined.
    pub fn define(&self, options: &Options<'_>) -> Derivatives {
        let wide = |x: &Tensor<E>| -> Vec<f64> {
            x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect()
        };
        let tensors = [&self.q, &self.k, &self.v, &self.d_out];
        let data = tensors.map(wide);
        let [q, k, v, d_out] =
            std::array::from_fn(|n| Input { data: &data[n], shape: tensors[n].shape() });
        let shape = q.shape.per_row();
        let d_lse: Vec<f64> = match &self.d_lse {
            Some(d_lse) => d_lse.as_slice().iter().map(|&x| x.into()).collect(),
            None => vec![0.0; shape.checked_len().unwrap()],
        };
        let d_lse = Input { data: &d_lse, shape };
        attention_backward([q, k, v], options, [d_out, d_lse]).unwrap()
    }
}

impl<E: Element> Result<E> {
    /// Each gradient in f32 next to its definition.
    pub fn beside<'a>(&self, expected: &'a Derivatives) -> [(&'static str, Vec<f32>, &'a [f64]); 3] {
        let wide = |x: &[E]| x.iter().map(|x| x.to_f32()).collect();
        [
            ("dQ", wide(&self.d_q), &expected.d_q),
            ("dK", wide(&self.d_k), &expected.d_k),
            ("dV", wide(&self.d_v), &expected.d_v),
        ]
    }
}
