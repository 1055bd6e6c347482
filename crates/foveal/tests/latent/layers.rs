//! Latent layers of random numbers, their definition in f64, and the engine's results for them.
#![allow(unreachable_pub)]

use crate::support::Random;
use foveal::cache::{KvStore, LatentCache};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
use foveal::projection::{Format, Matrix, MatrixShape, dequantize_row};
use foveal::reference::{Input, Partial};
use foveal::{Attention, Cpu, Element, Mask, Phase, Scale, Shape, Tensor, TensorRef, Workspace};

pub const FORMS: [LatentForm; 2] = [LatentForm::Plain, LatentForm::Absorbed];
pub const PHASES: [Phase; 2] = [Phase::Prompt, Phase::Generated];

/// A layer's matrix, queries and rows.
#[derive(Debug, Clone)]
pub struct Layer {
    pub dims: LatentDims,
    pub format: Format,
    pub up: Vec<u8>,
    /// `[batch, T, H, n + r]`.
    pub q: Tensor<f32>,
    /// `[batch, S, 1, c + r]`.
    pub rows: Tensor<f32>,
}

impl Layer {
    /// A batch of so many queries over so many rows, with a matrix of `f32`.
    pub fn new(dims: LatentDims, [batch, queries, keys]: [usize; 3], seed: u64) -> Layer {
        let mut random = Random::new(seed);
        let numbers = dims.heads * (dims.nope + dims.value) * dims.latent;
        let scale = 2.0 / (dims.latent as f32).sqrt();
        let up = (0..numbers).flat_map(|_| (random.number() * scale).to_le_bytes()).collect();
        let shape = |seq, heads, dim| Shape { batch, seq, heads, dim };
        Layer {
            dims,
            format: Format::F32,
            up,
            q: random.tensor(shape(queries, dims.heads, dims.query()), 2.0),
            rows: random.tensor(shape(keys, 1, dims.row()), 1.5),
        }
    }

    pub fn matrix(&self) -> Matrix<'_> {
        let out_features = self.dims.heads * (self.dims.nope + self.dims.value);
        let shape = MatrixShape { out_features, in_features: self.dims.latent };
        Matrix::new(self.format, shape, &self.up).unwrap()
    }

    pub fn scale(&self) -> f64 {
        1.0 / (self.dims.query() as f64).sqrt()
    }

    pub fn batch(&self) -> usize {
        self.rows.shape().batch
    }

    /// One sequence of the batch.
    pub fn sequence(&self, batch: usize) -> Layer {
        let one = |x: &Tensor<f32>| {
            let shape = Shape { batch: 1, ..x.shape() };
            let len = shape.checked_len().unwrap();
            Tensor::from_vec(x.as_slice()[batch * len..(batch + 1) * len].to_vec(), shape).unwrap()
        };
        Layer { q: one(&self.q), rows: one(&self.rows), ..self.clone() }
    }

    /// A cache for each sequence.
    pub fn caches<E: Element>(&self) -> Vec<LatentCache<E>> {
        let Shape { batch, seq, dim, .. } = self.rows.shape();
        let caches = (0..batch).map(|b| {
            let mut cache = LatentCache::new((self.dims.latent, self.dims.rope), seq).unwrap();
            let own = &self.rows.as_slice()[b * seq * dim..(b + 1) * seq * dim];
            let shape = Shape { batch: 1, ..self.rows.shape() };
            cache.append(TensorRef::new(own, shape).unwrap()).unwrap();
            cache
        });
        caches.collect()
    }

    /// The plain form in f64, with rows as `E` stores them: output and log-sum-exp.
    pub fn reference<E: Element>(&self, mask: &Mask) -> Partial {
        let LatentDims { heads, latent, nope, value, .. } = self.dims;
        let mut up = vec![0.0f32; heads * (nope + value) * latent];
        let stored = self.up.chunks(self.format.row_bytes(latent).unwrap().max(1));
        for (bytes, row) in stored.zip(up.chunks_mut(latent)) {
            dequantize_row(self.format, bytes, row).unwrap();
        }
        let (mut k, mut v) = (vec![], vec![]);
        for row in self.rows.as_slice().chunks(self.dims.row()) {
            let row: Vec<f64> = row.iter().map(|&x| E::from_f32(x).to_f32().into()).collect();
            let product =
                |w: &[f32]| -> f64 { w.iter().zip(&row).map(|(&w, c)| f64::from(w) * c).sum() };
            for head in 0..heads {
                let up = |n: usize| product(&up[(head * (nope + value) + n) * latent..][..latent]);
                k.extend((0..nope).map(up));
                k.extend(&row[latent..]);
                v.extend((nope..nope + value).map(up));
            }
        }
        let q: Vec<f64> = self.q.as_slice().iter().map(|&x| x.into()).collect();
        let keys = Shape { heads, dim: self.dims.query(), ..self.rows.shape() };
        let inputs = [
            Input { data: &q, shape: self.q.shape() },
            Input { data: &k, shape: keys },
            Input { data: &v, shape: Shape { dim: value, ..keys } },
        ];
        foveal::reference::attention(inputs, self.scale(), mask).unwrap()
    }

    pub fn run<E: Element>(&self, attention: Attention<'_>, way: (LatentForm, Phase)) -> Answer {
        let caches = self.caches::<E>();
        let stores: Vec<&dyn KvStore> = caches.iter().map(|cache| cache as _).collect();
        self.over(attention, &stores, way)
    }

    /// The engine's output and log-sum-exp, with memory that is poisoned before it is used.
    pub fn over(
        &self,
        attention: Attention<'_>,
        stores: &[&dyn KvStore],
        (form, phase): (LatentForm, Phase),
    ) -> Answer {
        let layer = LatentAttention::new(attention, self.dims, self.matrix()).unwrap();
        let call = LatentCall { q: self.q.view(), stores, phase, form };
        let shape = Shape { dim: self.dims.value, ..self.q.shape() };
        let nan = |shape: Shape| {
            Tensor::from_vec(vec![f32::NAN; shape.checked_len().unwrap()], shape).unwrap()
        };
        let (mut scratch, mut workspace) = (LatentScratch::default(), Workspace::new());
        let run = |scratch: &mut LatentScratch, workspace: &mut Workspace| {
            let (mut out, mut lse) = (nan(shape), nan(shape.per_row()));
            let outputs = (out.view_mut(), Some(lse.view_mut()));
            layer.forward(call, outputs, scratch, workspace).unwrap();
            Answer { out: out.into_vec(), lse: lse.into_vec() }
        };
        let first = run(&mut scratch, &mut workspace);
        scratch.poison();
        workspace.poison();
        let again = run(&mut scratch, &mut workspace);
        assert_eq!(first.bits(), again.bits(), "what is left in memory matters");
        again
    }
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

impl Answer {
    pub fn bits(&self) -> Vec<u32> {
        self.out.iter().chain(&self.lse).map(|x| x.to_bits()).collect()
    }
}

pub fn attention<'a>(mask: Mask, cpu: Cpu) -> Attention<'a> {
    Attention::new().mask(mask).cpu(cpu)
}

#[test]
fn a_scale_that_is_not_said_is_that_of_a_heads_own_key() {
    let dims = LatentDims { heads: 2, latent: 9, rope: 4, nope: 5, value: 3 };
    let layer = Layer::new(dims, [1, 3, 3], 1);
    for cpu in crate::support::cpus() {
        for way in FORMS.into_iter().flat_map(|form| PHASES.map(|phase| (form, phase))) {
            let plain = attention(Mask::causal(), cpu);
            let said = plain.clone().scale(Scale::Value(1.0 / 3.0));
            assert_eq!(layer.run::<f32>(plain, way).bits(), layer.run::<f32>(said, way).bits());
        }
    }
}
