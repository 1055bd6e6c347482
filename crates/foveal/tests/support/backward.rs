//! Backward calls on poisoned memory, and their gradients in f64.

use super::Random;
use super::sizes::Sizes;
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::reference::{Derivatives, Input, Options, attention_backward};
use foveal::{Attention, Element, Forward, Shape, Tensor, TensorMut, Workspace};

/// The tensors that a backward call reads, besides the results of forward.
#[derive(Debug, Clone)]
pub struct Call<E> {
    pub q: Tensor<E>,
    pub k: Tensor<E>,
    pub v: Tensor<E>,
    pub d_out: Tensor<E>,
    pub d_lse: Option<Tensor<f32>>,
}

/// Which gradients of terms are wanted: lengths, 0 for none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// `{batch, queries, heads, keys}` of the bias.
    pub bias: Option<Shape>,
    pub slopes: usize,
    pub table: usize,
    pub sinks: usize,
}

/// All gradients, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Result<E> {
    pub d_q: Vec<E>,
    pub d_k: Vec<E>,
    pub d_v: Vec<E>,
    pub d_bias: Vec<f32>,
    pub d_slopes: Vec<f32>,
    pub d_table: Vec<f32>,
    pub d_sinks: Vec<f32>,
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
        self.run_with(attention, Wanted::default())
    }

    /// The same with gradients of terms.
    pub fn run_with(&self, attention: &Attention<'_>, wanted: Wanted) -> Result<E> {
        let forward = attention.forward(self.q.view(), self.k.view(), self.v.view()).unwrap();
        self.backward(attention, &forward, wanted)
    }

    /// Backward alone.
    pub fn backward(
        &self,
        attention: &Attention<'_>,
        forward: &Forward<E>,
        wanted: Wanted,
    ) -> Result<E> {
        let nan = |x: &Tensor<E>| vec![E::from_f32(f32::NAN); x.as_slice().len()];
        let shape = wanted.bias.unwrap_or(Shape { batch: 0, seq: 0, heads: 0, dim: 0 });
        let [d_bias, d_slopes, d_table, d_sinks] =
            [shape.checked_len().unwrap(), wanted.slopes, wanted.table, wanted.sinks]
                .map(|n| vec![f32::NAN; n]);
        let (d_q, d_k, d_v) = (nan(&self.q), nan(&self.k), nan(&self.v));
        let mut result = Result { d_q, d_k, d_v, d_bias, d_slopes, d_table, d_sinks };
        let plan = attention.plan(self.q.shape(), self.k.shape(), self.v.shape()).unwrap();
        let mut workspace = Workspace::for_backward::<E>(&plan);
        workspace.poison();
        let inputs = Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() };
        let saved = Saved { out: forward.out.view(), lse: forward.lse.view() };
        let d_lse = self.d_lse.as_ref().map(Tensor::view);
        let upstream = Upstream { d_out: self.d_out.view(), d_lse };
        let some = |x| Some(x).filter(|x: &&mut [f32]| !x.is_empty());
        let gradients = Gradients {
            d_q: TensorMut::new(&mut result.d_q, self.q.shape()).unwrap(),
            d_k: TensorMut::new(&mut result.d_k, self.k.shape()).unwrap(),
            d_v: TensorMut::new(&mut result.d_v, self.v.shape()).unwrap(),
            terms: TermGradients {
                d_bias: wanted.bias.map(|s| TensorMut::new(&mut result.d_bias, s).unwrap()),
                d_slopes: some(&mut result.d_slopes),
                d_table: some(&mut result.d_table),
                d_sinks: some(&mut result.d_sinks),
                ..TermGradients::default()
            },
        };
        plan.backward(inputs, saved, upstream, gradients, &mut workspace).unwrap();
        result
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
    pub fn beside<'a>(
        &self,
        expected: &'a Derivatives,
    ) -> [(&'static str, Vec<f32>, &'a [f64]); 3] {
        let wide = |x: &[E]| x.iter().map(|x| x.to_f32()).collect();
        [
            ("dQ", wide(&self.d_q), &expected.d_q),
            ("dK", wide(&self.d_k), &expected.d_k),
            ("dV", wide(&self.d_v), &expected.d_v),
        ]
    }
}

/// Sums of `[batch, queries, heads, keys]` over the pairs for which `place` gives the same number.
pub fn gather(
    d_scores: &[f64],
    (q, keys): (Shape, usize),
    len: usize,
    place: impl Fn([usize; 4]) -> (usize, f64),
) -> Vec<f64> {
    let mut sums = vec![0.0; len];
    for (n, d) in d_scores.iter().enumerate() {
        let (row, j) = (n / keys, n % keys);
        let (batch, i) = (row / q.heads / q.seq, row / q.heads % q.seq);
        let (at, factor) = place([batch, i, row % q.heads, j]);
        sums[at] += factor * d;
    }
    sums
}
