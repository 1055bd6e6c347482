//! Attention within a segment, mixed with what a matrix holds of all segments before: `infini`.
//!
//! ```text
//! out = g · read of M_{s−1} + (1 − g) · softmax over the segment          g = sigmoid(β)
//! ```
//!
//! Munkhdalai et al. 2024; see [`Infini`]. Carried: M and z, constants to gradients, which go through all segments of a call. A
//! call that goes on with a text has whole segments, unless it is the last.

use std::ops::Range;

use foveal::linear::State;
use foveal::memory::infini::{Gradients, Infini, Tokens, Update, Upstream};
use foveal::{TensorMut, nn};

use super::SectionPlace;
use super::linear::{load, store};
use crate::Error;
use crate::config::{Mechanism, MemoryUpdate};
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Tools, range};

/// The heads of a section.
#[derive(Debug)]
pub(super) struct Compressed {
    layer: Infini,
    rotated: bool,
    gate: Range<usize>,
}

impl Compressed {
    pub(super) fn new(mechanism: &Mechanism, place: SectionPlace<'_>) -> Result<Compressed, Error> {
        let &Mechanism::Infini { segment, update, rotated } = mechanism else {
            return Err(Error::SectionState);
        };
        let update = match update {
            MemoryUpdate::Linear => Update::Linear,
            MemoryUpdate::Delta => Update::Delta,
        };
        let layer = Infini::new(segment)?.update(update).scale(place.scale());
        Ok(Compressed { layer, rotated, gate: range(place.ranges, &place.name("gate"))? })
    }

    fn tokens<'a>(&self, call: &SectionCall<'a>) -> Result<Tokens<'a, f32>, Error> {
        let gate = &call.parameters[self.gate.clone()];
        if !self.rotated {
            return Ok(Tokens::new(call.q, call.k, call.v, gate));
        }
        let [q, k] = call.plain.ok_or(Error::SectionState)?;
        Ok(Tokens::new(q, k, call.v, gate).rotated(call.q, call.k))
    }
}

/// Refuses a call that begins within a segment.
pub(super) fn check_start(start: usize, segment: usize) -> Result<(), Error> {
    match start.is_multiple_of(segment) {
        true => Ok(()),
        false => Err(Error::config(
            "tokens of a call that a text goes on from",
            start,
            format!("whole segments of {segment}"),
        )),
    }
}

impl TrainedSection for Compressed {
    fn positions(&self) -> Positions {
        if self.rotated { Positions::Both } else { Positions::Plain }
    }

    fn forward(
        &self,
        call: SectionCall<'_>,
        carried: Option<&mut SectionCarried>,
        out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error> {
        let layer = self.layer.clone().cpu(tools.cpu);
        let tokens = self.tokens(&call)?;
        let mut memory = layer.memory(&tokens)?;
        if carried.is_some() {
            check_start(call.start, layer.segment())?;
        }
        load(&mut memory, carried.as_deref())?;
        let initial = call.keep.then(|| memory.clone());
        layer.forward_into(&tokens, out, &mut memory, tools.workspace)?;
        if let Some(carried) = carried {
            store(&memory, carried);
        }
        Ok(Box::new(initial))
    }

    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let initial: State = taken::<Option<State>>(saved)?.ok_or(Error::SectionState)?;
        let layer = self.layer.clone().cpu(tools.cpu);
        let tokens = self.tokens(&call)?;
        let SectionGradients { d_q, d_k, d_v, d_plain, gradients: arena, .. } = gradients;
        let mut d_gate = vec![0.0; self.gate.len()];
        let (d_q, d_k, d_rotated) = match d_plain {
            Some([plain_q, plain_k]) => (plain_q, plain_k, Some((d_q, d_k))),
            None => (d_q, d_k, None),
        };
        let places = Gradients { d_q, d_k, d_v, d_gate: &mut d_gate, d_rotated };
        let upstream = Upstream { d_out: upstream.d_out, initial: &initial };
        // No gradient comes from later segments' calls.
        let mut d_memory = layer.memory(&tokens)?;
        layer.backward_into(&tokens, upstream, places, &mut d_memory, tools.workspace)?;
        Ok(nn::add(&mut arena[self.gate.clone()], &d_gate, tools.cpu.level)?)
    }
}
