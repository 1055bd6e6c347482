//! Linear attention without gates: a matrix for each head that every token writes to and reads: `linear`, `performer`,
//! `efficient`.
//!
//! ```text
//! S_t = S_{t−1} + φ(k_t) v_tᵀ      z_t = z_{t−1} + φ(k_t)      out_t = S_tᵀ φ(q_t) / (φ(q_t) · z_t + ε)
//! ```
//!
//! Katharopoulos et al. 2020; see [`foveal::linear::Linear`], [`foveal::linear::Favor`] and [`foveal::linear::Efficient`] for
//! other φ and normalisations. Without order, every query reads what all keys have written.
//! Carried: S and z. Kept for backward: those of the beginning.

use foveal::TensorMut;
use foveal::linear::{AnyOrder, Gradients, Recurrent, Results, State, Tokens, Upstream};

use super::SectionPlace;
use crate::Error;
use crate::mixer::Rule;
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::Tools;

/// Linear attention over all heads of a section.
#[derive(Debug)]
struct Kernel<R> {
    rule: Recurrent<R>,
    causal: bool,
}

/// A recurrence that reads keys in any order; `None` for another one.
pub(super) fn kernel(rule: &Rule, place: SectionPlace<'_>) -> Option<Box<dyn TrainedSection>> {
    let causal = place.causal;
    match rule.clone() {
        Rule::Linear(rule) => Some(Box::new(Kernel { rule, causal })),
        Rule::Performer(rule) => Some(Box::new(Kernel { rule, causal })),
        Rule::Efficient(rule) => Some(Box::new(Kernel { rule, causal })),
        _ => None,
    }
}

fn tokens<'a>(call: &SectionCall<'a>) -> Tokens<'a, f32> {
    Tokens::new(call.q, call.k, call.v)
}

/// Fills a new state with what was carried, if there is something.
pub(super) fn load(state: &mut State, carried: Option<&SectionCarried>) -> Result<(), Error> {
    let Some(carried) = carried.filter(|carried| !carried.floats.is_empty()) else { return Ok(()) };
    let [matrices, sums, ..] = &carried.floats[..] else { return Err(Error::SectionState) };
    let lengths = (state.matrices().len(), state.key_sums().len());
    if lengths != (matrices.len(), sums.len()) {
        return Err(Error::SectionState);
    }
    state.matrices_mut().copy_from_slice(matrices);
    state.key_sums_mut().copy_from_slice(sums);
    Ok(())
}

/// Puts a state where the next segment finds it.
pub(super) fn store(state: &State, carried: &mut SectionCarried) {
    carried.floats.resize(carried.floats.len().max(2), vec![]);
    carried.floats[0] = state.matrices().to_vec();
    carried.floats[1] = state.key_sums().to_vec();
}

impl<R: AnyOrder + Clone + Send + 'static> TrainedSection for Kernel<R> {
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
        let rule = self.rule.clone().cpu(tools.cpu);
        let tokens = tokens(&call);
        let mut state = rule.state(&tokens)?;
        load(&mut state, carried.as_deref())?;
        let initial = call.keep.then(|| state.clone());
        match self.causal {
            true => {
                let results = Results { out, reads: None };
                rule.forward_into(&tokens, results, &mut state, tools.workspace)?;
            }
            false => {
                rule.forward_bidirectional_into(&tokens, out, &mut state, tools.workspace)?;
            }
        }
        if let Some(carried) = carried {
            store(&state, carried);
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
        let SectionGradients { d_q, d_k, d_v, .. } = gradients;
        let places = Gradients { d_q, d_k, d_v, d_log_decay: None, d_beta: None };
        let rule = self.rule.clone().cpu(tools.cpu);
        let upstream = Upstream::new(upstream.d_out, &initial);
        let mut d_state = rule.state(&tokens(&call))?;
        let tokens = tokens(&call);
        let workspace = &mut *tools.workspace;
        match self.causal {
            true => rule.backward_into(&tokens, upstream, places, &mut d_state, workspace)?,
            false => rule.backward_bidirectional_into(
                &tokens,
                upstream,
                places,
                &mut d_state,
                workspace,
            )?,
        }
        Ok(())
    }
}
