//! Differential and latent attention, rotary positions, and the joining of partial results.

use crate::array::View;
use crate::attention::simple;
use crate::call::{Given, Mechanism, cpu, owned, scale};
use crate::error::{Error, Result};
use crate::output::Output;
use foveal::cache::LatentCache;
use foveal::differential::{Differential, DifferentialForward, Lambda, Pairs};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
use foveal::mask::Band;
use foveal::nn::RmsNorm;
use foveal::position::{Rope, RopeConfig, RopeLayout};
use foveal::projection::{Matrix, MatrixShape};
use foveal::{
    Attention, Element, Forward, Phase, Shape, SoftmaxState, Tensor, TensorRef, Workspace,
};

/// Differential attention: heads 2h and 2h + 1 of queries and keys are the two maps of head h.
#[derive(Debug)]
pub(crate) struct TwoMaps {
    pub(crate) init: f32,
    pub(crate) epsilon: f32,
    pub(crate) band: Band,
    pub(crate) scale: Option<f32>,
}

const LAMBDAS: usize = 3;
const WEIGHT: usize = 7;

impl TwoMaps {
    fn run<T>(
        &self,
        given: &Given<'_>,
        run: impl FnOnce(Differential<'_>) -> Result<T>,
    ) -> Result<T> {
        let attention =
            Attention::new().mask(simple(self.band)).scale(scale(self.scale)).cpu(cpu()?);
        let floats = |n: usize| given.view(n)?.floats();
        let lambda = Lambda {
            first: [floats(LAMBDAS)?, floats(LAMBDAS + 1)?],
            second: [floats(LAMBDAS + 2)?, floats(LAMBDAS + 3)?],
            init: self.init,
        };
        let norm = RmsNorm { weight: floats(WEIGHT)?, epsilon: self.epsilon };
        run(Differential { attention: &attention, lambda, norm })
    }
}

/// Every second head.
fn pairs<'a, E: Element>(given: &Given<'a>) -> Result<Pairs<'a, E>> {
    Ok(Pairs {
        q: given.view(0)?.alternating()?,
        k: given.view(1)?.alternating()?,
        v: given.tensor(2)?,
    })
}

impl Mechanism for TwoMaps {
    const ARRAYS: &'static [&'static str] =
        &["q", "k", "v", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "weight"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let forward = self.run(given, |layer| Ok(layer.forward(pairs::<E>(given)?)?))?;
        let [first, second] = forward.maps;
        Ok(vec![
            Output::tensor(forward.out),
            Output::tensor(first.out),
            Output::per_row(first.lse),
            Output::tensor(second.out),
            Output::per_row(second.lse),
        ])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        let map = |n: usize| -> Result<Forward<E>> {
            let (out, lse) = (results.tensor(n)?, results.view(n + 1)?.per_row()?);
            Ok(Forward { out: owned(out)?, lse: owned(lse)? })
        };
        let forward =
            DifferentialForward { out: owned(results.tensor(0)?)?, maps: [map(1)?, map(3)?] };
        let d_out = d.tensor(0)?;
        let back =
            self.run(given, |layer| Ok(layer.backward(pairs::<E>(given)?, &forward, d_out)?))?;
        let vector = |x: Vec<f32>| {
            let len = x.len();
            Some(Output::new(x, &[len]))
        };
        let [q1, k1] = back.d_lambda.first;
        let [q2, k2] = back.d_lambda.second;
        Ok(vec![
            Some(woven(&back.d_q)),
            Some(woven(&back.d_k)),
            Some(Output::tensor(back.d_v)),
            vector(q1),
            vector(k1),
            vector(q2),
            vector(k2),
            vector(back.d_weight),
        ])
    }
}

/// Heads of two tensors in turn.
fn woven<E: Element>([a, b]: &[Tensor<E>; 2]) -> Output {
    let shape = a.shape();
    let mut numbers = Vec::with_capacity(2 * a.as_slice().len());
    let rows = a.as_slice().chunks_exact(shape.dim).zip(b.as_slice().chunks_exact(shape.dim));
    for (a, b) in rows {
        numbers.extend_from_slice(a);
        numbers.extend_from_slice(b);
    }
    Output::new(numbers, &[shape.batch, shape.seq, 2 * shape.heads, shape.dim])
}

/// Latent attention of f32 queries to rows that all heads share.
#[derive(Debug)]
pub(crate) struct Latent {
    /// Numbers of a row that are a rotated key.
    pub(crate) rope: usize,
    /// Numbers of a head's value.
    pub(crate) value: usize,
    pub(crate) band: Band,
    pub(crate) scale: Option<f32>,
    pub(crate) generated: bool,
}

impl Mechanism for Latent {
    const ARRAYS: &'static [&'static str] = &["q", "rows", "up"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let (q, rows) = (given.tensor::<f32>(0)?, given.view(1)?);
        let &[batch, seq, row] = rows.shape() else {
            let got = rows.shape().to_vec();
            return Err(Error::Shape {
                what: "rows, [batch, seq, latent + rope]",
                expected: vec![0; 3],
                got,
            });
        };
        let (shape, up) = (q.shape(), given.view(2)?);
        let &[out_features, in_features] = up.shape() else {
            let (what, got) = ("up, [heads · (nope + value), latent]", up.shape().to_vec());
            return Err(Error::Shape { what, expected: vec![0; 2], got });
        };
        if batch != shape.batch {
            let expected = vec![shape.batch, seq, row];
            return Err(Error::Shape { what: "rows", expected, got: rows.shape().to_vec() });
        }
        let dims = LatentDims {
            heads: shape.heads,
            latent: row.saturating_sub(self.rope),
            rope: self.rope,
            nope: shape.dim.saturating_sub(self.rope),
            value: self.value,
        };
        let attention =
            Attention::new().mask(simple(self.band)).scale(scale(self.scale)).cpu(cpu()?);
        let up = Matrix::from_floats(MatrixShape { out_features, in_features }, up.floats()?)?;
        let layer = LatentAttention::new(attention, dims, up)?;
        let rows = rows.shared_rows::<f32>()?;
        let mut caches = vec![];
        for b in 0..batch {
            let mut cache = LatentCache::<f32>::new((dims.latent, dims.rope), seq)?;
            cache.append(rows.part(b..b + 1, 0..1))?;
            caches.push(cache);
        }
        let stores: Vec<_> = caches.iter().map(|cache| cache as _).collect();
        let phase = if self.generated { Phase::Generated } else { Phase::Prompt };
        let call = LatentCall { q, stores: &stores, phase, form: LatentForm::of(phase) };
        let mut out = Tensor::zeros(Shape { dim: self.value, ..shape })?;
        let mut lse = Tensor::zeros(shape.per_row())?;
        let outputs = (out.view_mut(), Some(lse.view_mut()));
        layer.forward(call, outputs, &mut LatentScratch::default(), &mut Workspace::new())?;
        Ok(vec![Output::tensor(out), Output::per_row(lse)])
    }

    fn backward<E: Element>(
        &self,
        _given: &Given<'_>,
        _results: &Given<'_>,
        _d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        Err(Error::NoBackward { what: "mla" })
    }
}

/// Rotary positions.
#[derive(Debug)]
pub(crate) struct Rotary {
    pub(crate) theta: f64,
    pub(crate) rotary_dim: Option<usize>,
    pub(crate) interleaved: bool,
}

impl Rotary {
    fn run<E: Element>(&self, given: &Given<'_>, x: &View<'_>, back: bool) -> Result<Output> {
        let x = x.tensor::<E>()?;
        let shape = x.shape();
        let layout = if self.interleaved { RopeLayout::Interleaved } else { RopeLayout::HalfSplit };
        let mut config = RopeConfig::new(shape.dim, layout);
        config.theta = self.theta;
        config.rotary_dim = self.rotary_dim.unwrap_or(shape.dim);
        let positions = match given.optional(1) {
            Some(positions) => positions.indices()?,
            None => (0..shape.seq).collect(),
        };
        let (expected, got) = (shape.seq, positions.len());
        if expected != got {
            let (expected, got) = (vec![expected], vec![got]);
            return Err(Error::Shape { what: "positions", expected, got });
        }
        let table = Rope::new(config)?.table(positions)?;
        let copy = owned(x)?;
        let floats = copy.as_slice().iter().map(|x| x.to_f32()).collect();
        let mut turned = Tensor::from_vec(floats, shape)?;
        match back {
            false => table.rotate(cpu()?.level, turned.view_mut())?,
            true => table.rotate_gradient(cpu()?.level, turned.view_mut())?,
        }
        Ok(Output::rounded::<E>(turned))
    }
}

impl Mechanism for Rotary {
    const ARRAYS: &'static [&'static str] = &["x", "positions"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        Ok(vec![self.run::<E>(given, given.view(0)?, false)?])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        _results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        Ok(vec![Some(self.run::<E>(given, d.view(0)?, true)?), None])
    }
}

/// Two partial results of the same queries over different keys, joined by their log-sum-exps.
#[derive(Debug)]
pub(crate) struct Join;

impl Join {
    fn row<E: Element>(x: TensorRef<'_, E>, [b, t, h]: [usize; 3]) -> Vec<f32> {
        x.row(b, t, h).iter().map(|x| x.to_f32()).collect()
    }
}

impl Mechanism for Join {
    const ARRAYS: &'static [&'static str] = &["out_a", "lse_a", "out_b", "lse_b"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let (a, b) = (given.tensor::<E>(0)?, given.tensor::<E>(2)?);
        let lses = [given.view(1)?.per_row()?, given.view(3)?.per_row()?];
        let shape = a.shape();
        let numbers = |x: Shape| vec![x.batch, x.seq, x.heads, x.dim];
        for (what, expected, got) in [
            ("out_b", shape, b.shape()),
            ("lse_a", shape.per_row(), lses[0].shape()),
            ("lse_b", shape.per_row(), lses[1].shape()),
        ] {
            if expected != got {
                return Err(Error::Shape { what, expected: numbers(expected), got: numbers(got) });
            }
        }
        let (mut out, mut lse) = (Vec::with_capacity(shape.checked_len().unwrap_or(0)), vec![]);
        let mut row = vec![0.0; shape.dim];
        for (b_, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
            for h in 0..shape.heads {
                let at = [b_, t, h];
                let state = |x, lse: TensorRef<'_, f32>| {
                    SoftmaxState::from_output(&Join::row(x, at), lse.row(b_, t, h)[0])
                };
                let mut joined = state(a, lses[0]);
                joined.merge(&state(b, lses[1]));
                lse.push(joined.finish(&mut row));
                out.extend(row.iter().map(|&x| E::from_f32(x)));
            }
        }
        let lse = Tensor::from_vec(lse, shape.per_row())?;
        Ok(vec![Output::tensor(Tensor::from_vec(out, shape)?), Output::per_row(lse)])
    }

    fn backward<E: Element>(
        &self,
        _given: &Given<'_>,
        _results: &Given<'_>,
        _d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        Err(Error::NoBackward { what: "merge" })
    }
}
