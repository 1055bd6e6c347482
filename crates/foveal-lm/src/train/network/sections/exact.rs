//! Exact attention to what a mask shows: `full`, `window`, `longformer`, `bigbird`, and the attention of families.
//!
//! ```text
//! out_h = softmax(cap(scale · q_h K_gᵀ), masked) V_g          g = h / (H / KV)
//! ```
//!
//! Kept for backward: a number a query and head. Nothing is carried: a segment sees itself. In bf16, queries, keys, values,
//! results and their gradients are rounded, scores and sums are not.

use std::ops::Range;

use foveal::sparse::{BigBird, BlockPlan, Longformer};
use foveal::{Attention, Mask, Plan, Scale, Shape, Tensor, TensorMut, TensorRef, plan};
use half::bf16;

use super::SectionPlace;
use super::rounded::{rounded, widen};
use crate::Error;
use crate::config::Mechanism;
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Tools, range};

/// Attention over all heads of a section.
#[derive(Debug)]
pub(super) struct Exact {
    mask: Mask,
    scale: Scale,
    softcap: Option<f32>,
    /// Logits of sinks, one a query head.
    sinks: Option<Range<usize>>,
}

/// The log-sum-exp of each query, `[sequences, T, heads, 1]`.
struct Saved(Vec<f32>);

impl Exact {
    /// With what families have: windows, caps, sinks.
    pub(super) fn of_family(place: SectionPlace<'_>, reach: Option<usize>) -> Result<Exact, Error> {
        let SectionPlace { config, ranges, layer, .. } = place;
        let sinks = config
            .attention
            .sinks
            .then(|| range(ranges, &format!("model.layers.{layer}.self_attn.sinks")));
        Ok(Exact {
            mask: near(place, reach),
            scale: place.scale(),
            softcap: config.attention.softcap,
            sinks: sinks.transpose()?,
        })
    }

    pub(super) fn new(mechanism: &Mechanism, place: SectionPlace<'_>) -> Result<Exact, Error> {
        let context = place.config.context;
        let mask = match mechanism {
            &Mechanism::Window { tokens } => {
                positive("window of a mixer", tokens)?;
                near(place, Some(tokens))
            }
            Mechanism::Longformer { reach, gap, global, .. } => {
                positive("gap of a mixer", *gap)?;
                let pattern = Longformer::new(*reach).gaps(vec![*gap]);
                let pattern = if place.causal { pattern.causal() } else { pattern };
                pattern.global(vec![global.clone()]).mask()
            }
            &Mechanism::Bigbird { block, random, seed } => {
                let blocks = context.div_ceil(block.max(1));
                let plan = BlockPlan::published([place.heads, blocks, random], seed)?;
                BigBird { block, plan, causal: place.causal }.mask()?
            }
            _ => near(place, None),
        };
        Ok(Exact { mask, scale: place.scale(), softcap: None, sinks: None })
    }

    fn attention<'a>(&self, call: &SectionCall<'a>, tools: &Tools<'_>) -> Attention<'a> {
        let attention = Attention::new().mask(self.mask.clone()).scale(self.scale).cpu(tools.cpu);
        let attention = match self.softcap {
            Some(cap) => attention.softcap(cap),
            None => attention,
        };
        let attention = match call.dropout {
            Some(dropout) => attention.dropout(dropout),
            None => attention,
        };
        match self.sinks.clone() {
            Some(sinks) => attention.sinks(&call.parameters[sinks]),
            None => attention,
        }
    }
}

/// All tokens of the context, or so many newest; without order, so many on each side.
fn near(place: SectionPlace<'_>, reach: Option<usize>) -> Mask {
    match (place.causal, reach) {
        (true, None) => Mask::window(place.config.context),
        (true, Some(tokens)) => Mask::window(tokens.min(place.config.context)),
        (false, None) => Mask::full(),
        (false, Some(tokens)) => Longformer::new(tokens.saturating_sub(1)).mask(),
    }
}

fn positive(what: &str, found: usize) -> Result<(), Error> {
    if found == 0 { Err(Error::config(what, found, "at least 1 token")) } else { Ok(()) }
}

impl TrainedSection for Exact {
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
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        tools.workspace.reserve(plan.workspace_bytes());
        let shape = q.shape().per_row();
        let mut lse = if call.keep { tools.pool.take(length(shape)) } else { vec![] };
        let place = call.keep.then(|| TensorMut::new(&mut lse, shape)).transpose()?;
        if tools.rounds() {
            let [q, k, v] =
                [rounded(q, tools.cpu)?, rounded(k, tools.cpu)?, rounded(v, tools.cpu)?];
            let mut given = Tensor::zeros(out.shape())?;
            let inputs = plan::Inputs { q: q.view(), k: k.view(), v: v.view() };
            plan.forward(inputs, given.view_mut(), place, tools.workspace)?;
            widen(&given, &mut out);
        } else {
            plan.forward(plan::Inputs { q, k, v }, out, place, tools.workspace)?;
        }
        Ok(Box::new(Saved(lse)))
    }

    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let Saved(lse) = taken(saved)?;
        let SectionCall { q, k, v, .. } = call;
        let SectionGradients { d_q, d_k, d_v, gradients: arena, .. } = gradients;
        let attention = self.attention(&call, tools);
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        let lse_view = TensorRef::new(&lse, q.shape().per_row())?;
        let mut sinks = self.sinks.clone().map(|sinks| vec![0.0; sinks.len()]);
        let terms = plan::TermGradients { d_sinks: sinks.as_deref_mut(), ..Default::default() };
        let inputs = plan::Inputs { q, k, v };
        if tools.rounds() {
            let places = [d_q, d_k, d_v];
            backward_rounded(&plan, (inputs, lse_view), upstream, (places, terms), tools)?;
        } else {
            tools.workspace.reserve(plan.backward_workspace_bytes::<f32>());
            let saved = plan::Saved { out: upstream.out, lse: lse_view };
            let upstream = plan::Upstream { d_out: upstream.d_out, d_lse: None };
            let gradients = plan::Gradients { d_q, d_k, d_v, terms };
            plan.backward(inputs, saved, upstream, gradients, tools.workspace)?;
        }
        if let (Some(range), Some(sinks)) = (self.sinks.clone(), sinks) {
            foveal::nn::add(&mut arena[range], &sinks, tools.cpu.level)?;
        }
        tools.pool.give(lse);
        Ok(())
    }
}

/// The gradients by way of numbers of 16 bits.
fn backward_rounded(
    plan: &Plan<'_>,
    (inputs, lse): (plan::Inputs<'_, f32, f32>, TensorRef<'_, f32>),
    upstream: SectionUpstream<'_>,
    (places, terms): ([TensorMut<'_, f32>; 3], plan::TermGradients<'_>),
    tools: &mut Tools<'_>,
) -> Result<(), Error> {
    let cpu = tools.cpu;
    let plan::Inputs { q, k, v } = inputs;
    let [q, k, v] = [rounded(q, cpu)?, rounded(k, cpu)?, rounded(v, cpu)?];
    let [out, d_out] = [rounded(upstream.out, cpu)?, rounded(upstream.d_out, cpu)?];
    let [mut d_q, mut d_k, mut d_v] =
        [Tensor::zeros(q.shape())?, Tensor::zeros(k.shape())?, Tensor::zeros(v.shape())?];
    tools.workspace.reserve(plan.backward_workspace_bytes::<bf16>());
    plan.backward(
        plan::Inputs { q: q.view(), k: k.view(), v: v.view() },
        plan::Saved { out: out.view(), lse },
        plan::Upstream { d_out: d_out.view(), d_lse: None },
        plan::Gradients { d_q: d_q.view_mut(), d_k: d_k.view_mut(), d_v: d_v.view_mut(), terms },
        tools.workspace,
    )?;
    for (from, mut to) in [d_q, d_k, d_v].iter().zip(places) {
        widen(from, &mut to);
    }
    Ok(())
}

fn length(Shape { batch, seq, heads, dim }: Shape) -> usize {
    batch * seq * heads * dim
}
