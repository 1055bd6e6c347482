//! Linformer: softmax attention to a fixed number of mixtures of all keys.
//!
//! ```text
//! K' = E K      V' = F V      out = softmax(scale · Q K'ᵀ) V'          E, F: [rank, context]
//! ```
//!
//! Wang et al. 2020; see [`foveal::linear::Linformer`]. Every mixture holds all tokens, so that it has no causal form: encoders
//! only. Queries and keys are rotated before they are mixed. Kept for backward: the mixtures, the output and its log-sum-exp.

use std::ops::Range;

use foveal::linear::{Linformer, LinformerForward, MatrixGradients, SequenceMatrix, Sharing};
use foveal::{Attention, Gradient, Scale, Shape, TensorMut, TensorRef, plan};

use super::SectionPlace;
use crate::Error;
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Tools, range};

/// Linformer over all heads of a section.
#[derive(Debug)]
pub(super) struct Mixtures {
    rank: usize,
    context: usize,
    scale: Scale,
    keys: Range<usize>,
    /// Of values, where keys do not share theirs.
    values: Option<Range<usize>>,
}

impl Mixtures {
    pub(super) fn new(
        rank: usize,
        shared: bool,
        place: SectionPlace<'_>,
    ) -> Result<Mixtures, Error> {
        if place.causal {
            return Err(Error::UnsupportedConfig {
                key: "\"foveal\" mixer".to_owned(),
                found: "\"linformer\", which has no causal form: train it with hidden tokens"
                    .to_owned(),
            });
        }
        let tensor = |name| range(place.ranges, &place.name(name));
        Ok(Mixtures {
            rank,
            context: place.config.context,
            scale: place.scale(),
            keys: tensor("e_proj.weight")?,
            values: if shared { None } else { Some(tensor("f_proj.weight")?) },
        })
    }

    fn sharing<'a>(&self, parameters: &'a [f32]) -> Result<Sharing<'a>, Error> {
        let matrix = |range: &Range<usize>| {
            SequenceMatrix::new(&parameters[range.clone()], self.rank, self.context)
        };
        Ok(match &self.values {
            Some(values) => {
                Sharing::Headwise { keys: matrix(&self.keys)?, values: matrix(values)? }
            }
            None => Sharing::KeyValue(matrix(&self.keys)?),
        })
    }

    fn attention(&self, call: &SectionCall<'_>, tools: &Tools<'_>) -> Attention<'static> {
        let attention = Attention::new().scale(self.scale).cpu(tools.cpu);
        match call.dropout {
            Some(dropout) => attention.dropout(dropout),
            None => attention,
        }
    }
}

impl TrainedSection for Mixtures {
    fn positions(&self) -> Positions {
        Positions::Rotated
    }

    fn forward(
        &self,
        call: SectionCall<'_>,
        _carried: Option<&mut SectionCarried>,
        mut out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error> {
        let SectionCall { q, k, v, .. } = call;
        let attention = self.attention(&call, tools);
        let layer = Linformer { attention: &attention, sharing: self.sharing(call.parameters)? };
        let given = layer.forward(plan::Inputs { q, k, v })?;
        copy(given.out.view(), &mut out);
        Ok(Box::new(call.keep.then_some(given)))
    }

    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let given: LinformerForward<f32> =
            taken::<Option<LinformerForward<f32>>>(saved)?.ok_or(Error::SectionState)?;
        let SectionCall { q, k, v, .. } = call;
        let SectionGradients { mut d_q, mut d_k, mut d_v, gradients: arena, .. } = gradients;
        let attention = self.attention(&call, tools);
        let layer = Linformer { attention: &attention, sharing: self.sharing(call.parameters)? };
        let values = self.values.clone().unwrap_or(0..0);
        let places = arena.get_disjoint_mut([self.keys.clone(), values]);
        let [d_keys, d_values] = places.map_err(|_| Error::SectionState)?;
        let matrices = MatrixGradients {
            d_keys: Gradient::Add(d_keys),
            d_values: if self.values.is_some() { Gradient::Add(d_values) } else { Gradient::Skip },
        };
        let inputs = plan::Inputs { q, k, v };
        let d = layer.backward(inputs, &given, upstream.d_out, matrices)?;
        for (from, to) in [(d.d_q, &mut d_q), (d.d_k, &mut d_k), (d.d_v, &mut d_v)] {
            copy(from.view(), to);
        }
        Ok(())
    }
}

/// Copies all rows.
fn copy(from: TensorRef<'_, f32>, to: &mut TensorMut<'_, f32>) {
    let Shape { batch, seq, heads, .. } = from.shape();
    for (b, t) in (0..batch).flat_map(|b| (0..seq).map(move |t| (b, t))) {
        for head in 0..heads {
            to.row_mut(b, t, head).copy_from_slice(from.row(b, t, head));
        }
    }
}
