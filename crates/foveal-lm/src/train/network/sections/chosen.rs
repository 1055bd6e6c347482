//! Sparse attention whose parts are chosen: `sparse_transformer`, `moba`, `native_sparse`, `lsh`.
//!
//! ```text
//! out = attention to what the pattern, the query's scores or its hash choose       no gradient goes through the choice
//! native_sparse    out = Σ_n g_n · branch_n       g = σ(x W_g)       compressed keys and values are means
//! ```
//!
//! Formulas and sources: [`foveal::sparse`]. Backward takes the choices that forward made. Nothing is carried: a segment sees
//! itself. All of these see only what is before a token, so that none is trained without order.

use foveal::plan::{Backward, Inputs};
use foveal::sparse::{
    AngularHash, BlockChoices, Branches, Buckets, Moba, NativeForward, NativeSparse, Reformer,
    ReformerForward, SparseTransformer,
};
use foveal::{Forward, Gradient, Tensor, TensorMut, TensorRef, nn};

use super::SectionPlace;
use crate::Error;
use crate::config::Mechanism;
use crate::mixer::{lsh, native_sparse, sparse_transformer};
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Projected, Tools};

/// Attention to chosen keys over all heads of a section.
#[derive(Debug)]
pub(super) enum Chosen {
    Pattern(SparseTransformer),
    Moba(Moba),
    /// With the projection to gates.
    Native(NativeSparse, Projected),
    Lsh(Reformer, Box<AngularHash>),
}

/// What backward needs of forward.
enum Saved {
    Pattern(Forward<f32>),
    Moba(Forward<f32>, BlockChoices),
    /// With the gates.
    Native(Box<NativeForward<f32>>, Tensor<f32>),
    Lsh(ReformerForward<f32>, Buckets),
}

impl Chosen {
    /// `None` for another mechanism.
    pub(super) fn new(
        mechanism: &Mechanism,
        place: SectionPlace<'_>,
    ) -> Result<Option<Chosen>, Error> {
        let (scale, config) = (place.scale(), place.config);
        let chosen = match mechanism {
            Mechanism::SparseTransformer { .. } => {
                Chosen::Pattern(sparse_transformer(mechanism, place.layer)?.scale(scale))
            }
            &Mechanism::Moba { block, top } => Chosen::Moba(Moba::new(block, top)?.scale(scale)),
            Mechanism::NativeSparse { .. } => {
                let shape = [3 * place.heads, config.width];
                let gates = Projected::new(place.ranges, &place.name("gate_proj"), shape, false)?;
                Chosen::Native(native_sparse(mechanism)?.scale(scale), gates)
            }
            Mechanism::Lsh { .. } => {
                let sizes = [place.heads, place.kv_heads, config.attention.head_dim];
                let (layer, hash) = lsh(mechanism, sizes)?;
                Chosen::Lsh(layer, Box::new(hash))
            }
            _ => return Ok(None),
        };
        if !place.causal {
            let found = format!("{} in a model whose tokens see all others", mechanism.name());
            return Err(Error::config("mixer", found, "a mechanism that isn't causal by itself"));
        }
        Ok(Some(chosen))
    }
}

/// The inputs of Native Sparse Attention: one key and value for all branches, and their means.
fn branches<'a>(
    call: &SectionCall<'a>,
    [keys, values]: [&'a Tensor<f32>; 2],
) -> Branches<Inputs<'a, f32, f32>> {
    let own = inputs(call);
    let compressed = Inputs { q: own.q, k: keys.view(), v: values.view() };
    Branches { compressed, selected: own, window: own }
}

fn inputs<'a>(call: &SectionCall<'a>) -> Inputs<'a, f32, f32> {
    Inputs { q: call.q, k: call.k, v: call.v }
}

/// What is hashed: queries before they are rotated.
fn hashed<'a>(call: &SectionCall<'a>) -> Result<TensorRef<'a, f32>, Error> {
    Ok(call.plain.ok_or(Error::SectionState)?[0])
}

impl TrainedSection for Chosen {
    fn positions(&self) -> Positions {
        match self {
            Chosen::Lsh(..) => Positions::Both,
            _ => Positions::Rotated,
        }
    }

    fn forward(
        &self,
        call: SectionCall<'_>,
        _carried: Option<&mut SectionCarried>,
        out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error> {
        let SectionCall { q, k, v, .. } = call;
        let saved = match self {
            Chosen::Pattern(layer) => Saved::Pattern(layer.cpu(tools.cpu).forward(inputs(&call))?),
            Chosen::Moba(layer) => {
                let layer = layer.cpu(tools.cpu);
                let choices = layer.choose(q, k)?;
                Saved::Moba(layer.forward(inputs(&call), &choices)?, choices)
            }
            Chosen::Native(layer, gates) => {
                let layer = layer.cpu(tools.cpu);
                let shape = foveal::Shape { dim: 3, ..q.shape() };
                let mut made =
                    vec![0.0; q.shape().batch * q.shape().seq * gates.shape.out_features];
                gates.forward(call.parameters, call.x, &mut made, tools)?;
                nn::sigmoid(&mut made, 1.0, tools.cpu.level)?;
                let gates = Tensor::from_vec(made, shape)?;
                let (keys, values) = (layer.pool(k)?, layer.pool(v)?);
                let given = layer.forward(branches(&call, [&keys, &values]), gates.view())?;
                Saved::Native(Box::new(given), gates)
            }
            Chosen::Lsh(layer, hash) => {
                let buckets = hash.buckets(hashed(&call)?, tools.cpu)?;
                Saved::Lsh(layer.cpu(tools.cpu).forward(q, v, &buckets)?, buckets)
            }
        };
        let given = match &saved {
            Saved::Pattern(given) | Saved::Moba(given, _) => &given.out,
            Saved::Native(given, _) => &given.out,
            Saved::Lsh(given, _) => &given.result.out,
        };
        write(given, out);
        Ok(Box::new(call.keep.then_some(saved)))
    }

    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let saved = taken::<Option<Saved>>(saved)?.ok_or(Error::SectionState)?;
        let (d_out, own) = (upstream.d_out, inputs(&call));
        let d = match (self, saved) {
            (Chosen::Pattern(layer), Saved::Pattern(forward)) => {
                layer.cpu(tools.cpu).backward(own, &forward, d_out)?
            }
            (Chosen::Moba(layer), Saved::Moba(forward, choices)) => {
                layer.cpu(tools.cpu).backward(own, &choices, &forward, d_out)?
            }
            (Chosen::Native(layer, projection), Saved::Native(forward, gates)) => {
                let layer = layer.cpu(tools.cpu);
                return native_backward(
                    (&layer, projection),
                    (call, &forward, gates),
                    d_out,
                    gradients,
                    tools,
                );
            }
            (Chosen::Lsh(layer, _), Saved::Lsh(forward, buckets)) => {
                let layer = layer.cpu(tools.cpu);
                let (d_q, d_v) = layer.backward((call.q, call.v), &buckets, &forward, d_out)?;
                // Queries are keys, and no gradient goes through the hash.
                let d_k = Tensor::zeros(call.k.shape())?;
                if let Some(d_plain) = gradients.d_plain {
                    d_plain.into_iter().for_each(clear);
                }
                Backward { d_q, d_k, d_v }
            }
            _ => return Err(Error::SectionState),
        };
        write(&d.d_q, gradients.d_q);
        write(&d.d_k, gradients.d_k);
        write(&d.d_v, gradients.d_v);
        Ok(())
    }
}

/// The gradients of all three branches together, and those of the gates.
fn native_backward(
    (layer, projection): (&NativeSparse, &Projected),
    (call, forward, gates): (SectionCall<'_>, &NativeForward<f32>, Tensor<f32>),
    d_out: TensorRef<'_, f32>,
    gradients: SectionGradients<'_>,
    tools: &mut Tools<'_>,
) -> Result<(), Error> {
    let (keys, values) = (layer.pool(call.k)?, layer.pool(call.v)?);
    let own = branches(&call, [&keys, &values]);
    let (d, d_gates) = layer.backward(own, gates.view(), forward, d_out)?;
    let Branches { compressed, selected, window } = d;
    let tokens = call.k.shape().seq;
    let pooled = |d: &Tensor<f32>| layer.pool_backward(d.view(), tokens);
    let (d_k, d_v) = (pooled(&compressed.d_k)?, pooled(&compressed.d_v)?);
    let sum = |all: [Tensor<f32>; 3]| -> Result<Tensor<f32>, Error> {
        let [first, more @ ..] = all;
        let (shape, mut sum) = (first.shape(), first.into_vec());
        for x in &more {
            tools.add(&mut sum, x.as_slice())?;
        }
        Ok(Tensor::from_vec(sum, shape)?)
    };
    write(&sum([compressed.d_q, selected.d_q, window.d_q])?, gradients.d_q);
    write(&sum([d_k, selected.d_k, window.d_k])?, gradients.d_k);
    write(&sum([d_v, selected.d_v, window.d_v])?, gradients.d_v);
    // σ′ = σ (1 − σ).
    let slopes = gates.as_slice().iter().zip(d_gates.as_slice());
    let d_scores: Vec<f32> = slopes.map(|(gate, d)| d * gate * (1.0 - gate)).collect();
    let arenas = (call.parameters, gradients.gradients);
    projection.backward(arenas, (call.x, &d_scores), Gradient::Add(gradients.d_x), tools)
}

/// Writes a tensor to where its rows belong.
fn write(from: &Tensor<f32>, mut to: TensorMut<'_, f32>) {
    let shape = from.shape();
    for (b, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
        for head in 0..shape.heads {
            to.row_mut(b, t, head).copy_from_slice(from.view().row(b, t, head));
        }
    }
}

fn clear(mut to: TensorMut<'_, f32>) {
    let shape = to.shape();
    for (b, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
        (0..shape.heads).for_each(|head| to.row_mut(b, t, head).fill(0.0));
    }
}
