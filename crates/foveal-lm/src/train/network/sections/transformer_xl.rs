//! Segments with the keys and values of those before them, by content and by distance: `transformer_xl`.
//!
//! ```text
//! out_i = softmax_j(scale (⟨q_i + u, k_j⟩ + ⟨q_i + v, r(i − j)⟩)) V       r(p) = W_r [sin, cos](p)
//! ```
//!
//! Dai et al. 2019; see [`RelativeEncoding`]. Carried: the keys and values that later segments see, which are constants to
//! gradients. (The paper carries what the layer below gave and projects it again, so that its projections have a gradient
//! of the memory as well.) Within a call gradients go through: calls of one segment are the paper's training.

use std::ops::Range;

use foveal::plan::{self, Plan};
use foveal::position::RelativeEncoding;
use foveal::{Attention, Mask, Scale, Shape, Tensor, TensorMut, TensorRef, nn};

use super::SectionPlace;
use crate::Error;
use crate::config::Mechanism;
use crate::mixer::{MAX_REACH, segments_mask};
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Projected, Tools, range};

/// The heads of a section.
#[derive(Debug)]
pub(super) struct TransformerXl {
    segment: usize,
    memory: usize,
    same_length: bool,
    /// Sines and cosines of each distance, `[distances, width]`.
    table: Vec<f32>,
    /// From them to keys by distance, `[distances, heads, dim]`.
    projection: Projected,
    distances: Shape,
    content: Range<usize>,
    position: Range<usize>,
    scale: Scale,
}

/// What backward needs.
struct Saved {
    lse: Vec<f32>,
    keys: Vec<f32>,
    /// Keys and values of earlier segments and the call's own, if there are earlier ones.
    all: Option<[Tensor<f32>; 2]>,
    /// The position of the first key in its text.
    origin: usize,
}

impl TransformerXl {
    pub(super) fn new(
        mechanism: &Mechanism,
        place: SectionPlace<'_>,
    ) -> Result<TransformerXl, Error> {
        let &Mechanism::TransformerXl { segment, memory, same_length, clamp } = mechanism else {
            return Err(Error::SectionState);
        };
        if segment == 0 {
            return Err(Error::config("segment of a mixer", segment, "at least 1 token"));
        }
        let (heads, dim) = (place.heads, place.config.attention.head_dim);
        let width = place.config.width;
        let reach = segment.saturating_add(memory);
        if reach > MAX_REACH {
            let expected = format!("at most {MAX_REACH} tokens");
            return Err(Error::config("segment and memory of a mixer", reach, expected));
        }
        let rows = clamp.map_or(reach, |clamp| reach.min(clamp.saturating_add(1)));
        let own = |name: &str| place.name(name);
        Ok(TransformerXl {
            segment,
            memory,
            same_length,
            table: RelativeEncoding::sinusoids(rows, width)?,
            projection: Projected::new(place.ranges, &own("r_proj"), [heads * dim, width], false)?,
            distances: Shape { batch: 1, seq: rows, heads, dim },
            content: range(place.ranges, &own("content_bias"))?,
            position: range(place.ranges, &own("position_bias"))?,
            scale: place.scale(),
        })
    }

    /// Keys and values with those of earlier segments before them, if there are any.
    fn with_earlier(
        &self,
        call: &SectionCall<'_>,
        carried: Option<&SectionCarried>,
    ) -> Result<Option<[Tensor<f32>; 2]>, Error> {
        let Some(carried) = carried.filter(|carried| !carried.floats.is_empty()) else {
            return Ok(None);
        };
        let [keys, values] = &carried.floats[..] else { return Err(Error::SectionState) };
        let shape = call.k.shape();
        let row = shape.batch * shape.heads * shape.dim;
        let earlier = Shape { seq: keys.len() / row.max(1), ..shape };
        let joined = |earlier_rows: &[f32], own: TensorRef<'_, f32>| -> Result<_, Error> {
            let before = TensorRef::new(earlier_rows, earlier)?;
            let mut all = Tensor::zeros(Shape { seq: earlier.seq + shape.seq, ..shape })?;
            copy((before, 0..earlier.seq), all.view_mut(), 0);
            copy((own, 0..shape.seq), all.view_mut(), earlier.seq);
            Ok(all)
        };
        Ok(Some([joined(keys, call.k)?, joined(values, call.v)?]))
    }

    /// Keeps what the tokens from `end` on see.
    fn carry(
        &self,
        [k, v]: [TensorRef<'_, f32>; 2],
        end: usize,
        carried: &mut SectionCarried,
    ) -> Result<(), Error> {
        let first = match self.same_length {
            true => end.saturating_sub(self.memory),
            false => (end / self.segment * self.segment).saturating_sub(self.memory),
        };
        let Shape { seq, .. } = k.shape();
        let kept = (end - first).min(seq);
        carried.floats.clear();
        for x in [k, v] {
            let mut rows = Tensor::zeros(Shape { seq: kept, ..x.shape() })?;
            copy((x, seq - kept..seq), rows.view_mut(), 0);
            carried.floats.push(rows.into_vec());
        }
        Ok(())
    }

    fn attention<'a>(
        &self,
        call: &SectionCall<'a>,
        keys: &'a [f32],
        (origin, tools): (usize, &Tools<'_>),
    ) -> Result<Attention<'a>, Error> {
        let mask = match self.same_length {
            true => Mask::window(self.memory.max(1)),
            false => segments_mask((self.segment, self.memory), origin),
        };
        let parameters = call.parameters;
        let encoding = RelativeEncoding::new(
            TensorRef::new(keys, self.distances)?,
            &parameters[self.content.clone()],
            &parameters[self.position.clone()],
        )?;
        let attention = Attention::new().mask(mask).scale(self.scale).cpu(tools.cpu);
        let attention = attention.relative_encoding(encoding);
        Ok(match call.dropout {
            Some(dropout) => attention.dropout(dropout),
            None => attention,
        })
    }
}

/// Copies tokens of all sequences to where those from `first` on lie.
fn copy(
    (from, tokens): (TensorRef<'_, f32>, Range<usize>),
    mut to: TensorMut<'_, f32>,
    first: usize,
) {
    let Shape { batch, heads, .. } = from.shape();
    for (b, (n, t)) in (0..batch).flat_map(|b| tokens.clone().enumerate().map(move |t| (b, t))) {
        (0..heads).for_each(|h| to.row_mut(b, first + n, h).copy_from_slice(from.row(b, t, h)));
    }
}

/// What attention reads: the call's own keys and values, or those with earlier ones.
fn inputs<'a>(
    call: &SectionCall<'a>,
    all: Option<&'a [Tensor<f32>; 2]>,
) -> plan::Inputs<'a, f32, f32> {
    let (k, v) = all.map_or((call.k, call.v), |[k, v]| (k.view(), v.view()));
    plan::Inputs { q: call.q, k, v }
}

fn planned<'a>(
    attention: &'a Attention<'_>,
    inputs: &plan::Inputs<'_, f32, f32>,
) -> Result<Plan<'a>, Error> {
    Ok(attention.plan(inputs.q.shape(), inputs.k.shape(), inputs.v.shape())?)
}

impl TrainedSection for TransformerXl {
    fn positions(&self) -> Positions {
        Positions::Plain
    }

    fn forward(
        &self,
        call: SectionCall<'_>,
        carried: Option<&mut SectionCarried>,
        out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error> {
        let all = self.with_earlier(&call, carried.as_deref())?;
        let mut keys = tools.pool.take(self.distances.seq * self.projection.shape.out_features);
        self.projection.forward(call.parameters, &self.table, &mut keys, tools)?;
        let inputs = inputs(&call, all.as_ref());
        let origin = (call.start + call.q.shape().seq).saturating_sub(inputs.k.shape().seq);
        let attention = self.attention(&call, &keys, (origin, &*tools))?;
        let plan = planned(&attention, &inputs)?;
        tools.workspace.reserve(plan.workspace_bytes());
        let rows = call.q.shape().per_row();
        let mut lse = vec![0.0; if call.keep { rows.batch * rows.seq * rows.heads } else { 0 }];
        let place = call.keep.then(|| TensorMut::new(&mut lse, rows)).transpose()?;
        plan.forward(inputs, out, place, tools.workspace)?;
        drop(attention);
        if let Some(carried) = carried {
            self.carry([inputs.k, inputs.v], call.start + call.q.shape().seq, carried)?;
        }
        Ok(Box::new(Saved { lse, keys, all, origin }))
    }

    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let Saved { lse, keys, all, origin } = taken(saved)?;
        let SectionGradients { d_q, mut d_k, mut d_v, gradients: arena, .. } = gradients;
        let inputs = inputs(&call, all.as_ref());
        let attention = self.attention(&call, &keys, (origin, &*tools))?;
        let plan = planned(&attention, &inputs)?;
        tools.workspace.reserve(plan.backward_workspace_bytes::<f32>());
        let mut d_keys = Tensor::zeros(self.distances)?;
        let biases = self.content.len();
        let [mut d_content, mut d_position] = [vec![0.0; biases], vec![0.0; biases]];
        let mut d_all = match &all {
            Some([k, v]) => Some([Tensor::zeros(k.shape())?, Tensor::zeros(v.shape())?]),
            None => None,
        };
        let (to_k, to_v) = match &mut d_all {
            Some([k, v]) => (k.view_mut(), v.view_mut()),
            None => (d_k.reborrow(), d_v.reborrow()),
        };
        let terms = plan::TermGradients {
            d_relative_keys: Some(d_keys.view_mut()),
            d_content_bias: Some(&mut d_content),
            d_position_bias: Some(&mut d_position),
            ..plan::TermGradients::default()
        };
        plan.backward(
            inputs,
            plan::Saved { out: upstream.out, lse: TensorRef::new(&lse, call.q.shape().per_row())? },
            plan::Upstream { d_out: upstream.d_out, d_lse: None },
            plan::Gradients { d_q, d_k: to_k, d_v: to_v, terms },
            tools.workspace,
        )?;
        drop(attention);
        // Those of earlier segments go nowhere.
        if let Some([k, v]) = &d_all {
            let own = k.shape().seq - call.k.shape().seq..k.shape().seq;
            copy((k.view(), own.clone()), d_k, 0);
            copy((v.view(), own), d_v, 0);
        }
        let level = tools.cpu.level;
        nn::add(&mut arena[self.content.clone()], &d_content, level)?;
        nn::add(&mut arena[self.position.clone()], &d_position, level)?;
        let rows = (&self.table[..], d_keys.as_slice());
        self.projection.weight_gradient((call.parameters, arena), rows, tools)?;
        tools.pool.give(keys);
        Ok(())
    }
}
