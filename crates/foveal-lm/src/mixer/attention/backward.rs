//! The gradients of a layer of attention, from its last step to its first.

use foveal::nn::{self, NormBackward, NormGradients, RmsNorm, rms_norm_backward};
use foveal::plan;
use foveal::projection::{
    Input, MatrixShape, Output, ProjectionBackward, ProjectionGradients, backward_workspace_bytes,
    project_backward,
};
use foveal::{Gradient, TensorMut, TensorRef};

use super::saved::same;
use super::{AttentionParameters, Bound, MultiHeadAttention, Saved, StateGradient};
use crate::Error;
use crate::linear::{Affine, LinearRef, Run};

/// The gradients that come back to a layer.
#[derive(Debug, Clone, Copy)]
pub struct Upstream<'a> {
    /// Of its results, `[sequences, T, width]`.
    pub d_y: &'a [f32],
    /// Of the states that it left, from the calls that followed; `None` for zeros.
    pub d_state: Option<&'a StateGradient>,
}

/// The gradients that a layer hands on.
#[derive(Debug, Clone, PartialEq)]
pub struct InputGradients {
    /// Of its inputs, `[sequences, T, width]`.
    pub d_x: Vec<f32>,
    /// Of what keys and values were made from, if that was another sequence: `[sequences, new, key_width]` and
    /// `[sequences, new, value_width]`.
    pub d_source: Option<[Vec<f32>; 2]>,
    /// Of the states that it found.
    pub d_state: StateGradient,
}

impl MultiHeadAttention {
    /// Adds the gradients of a call's parameters to `gradients`, as far as there are places for them, and returns those
    /// of its inputs. Parameters are those that forward was given.
    ///
    /// # Errors
    /// [`Error::Kernel`] if parameters or gradients do not fit the layer or the call; nothing has been added then.
    pub fn backward(
        &self,
        parameters: &AttentionParameters<&[f32]>,
        saved: &Saved,
        upstream: Upstream<'_>,
        gradients: &mut AttentionParameters<&mut [f32]>,
        run: &mut Run<'_>,
    ) -> Result<InputGradients, Error> {
        let layer = Bound { layer: self, parameters: self.views(parameters)?, capped: None };
        layer.check(saved, &upstream)?;
        layer.check_places(gradients)?;
        run.workspace.reserve(backward_workspace_bytes(run.cpu));

        let mut d_mixed = vec![0.0; saved.mixed.len()];
        let output = Step { affine: layer.parameters.output, x: &saved.mixed, d_y: upstream.d_y };
        output.run(&mut gradients.output, Gradient::Write(&mut d_mixed), run)?;
        let mut d = layer.attention(saved, &d_mixed, &mut gradients.sinks, run)?;
        if let Some(d_state) = upstream.d_state {
            d.add(d_state, saved.sequences);
        }
        let d_state = d.take_state(saved);
        layer.rotation(saved, &mut d, run)?;
        layer.norms(saved, &mut d, gradients, run)?;
        let inputs = layer.projections(saved, &d, gradients, run)?;
        Ok(InputGradients { d_state, ..inputs })
    }
}

/// Gradients of queries, keys and values, as far back as backward has come.
struct Heads {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Heads {
    /// Adds what comes back to the states after the call.
    fn add(&mut self, d_state: &StateGradient, sequences: usize) {
        for (all, newest) in [(&mut self.k, &d_state.keys), (&mut self.v, &d_state.values)] {
            let (all_len, len) = (all.len() / sequences.max(1), newest.len() / sequences.max(1));
            let sequences = all.chunks_exact_mut(all_len.max(1)).zip(newest.chunks(len.max(1)));
            for (all, newest) in sequences {
                let last = &mut all[all_len - len..];
                last.iter_mut().zip(newest).for_each(|(sum, d)| *sum += d);
            }
        }
    }

    /// Takes away what belongs to keys and values that the states held before the call.
    fn take_state(&mut self, saved: &Saved) -> StateGradient {
        let (positions, sequences) = (saved.held.len(), saved.sequences);
        let take = |all: &mut Vec<f32>| {
            let len = all.len() / sequences.max(1);
            let old = len / positions.max(1) * (positions - saved.new);
            if old == 0 {
                return vec![];
            }
            let part = |range: std::ops::Range<usize>| {
                all.chunks_exact(len).flat_map(|all| &all[range.clone()]).copied().collect()
            };
            let (before, new) = (part(0..old), part(old..len));
            *all = new;
            before
        };
        let (keys, values) = (take(&mut self.k), take(&mut self.v));
        StateGradient { start: saved.held.start, keys, values }
    }
}

impl Bound<'_> {
    /// Refuses a call that was not this layer's, or gradients that are not this call's.
    fn check(&self, saved: &Saved, upstream: &Upstream<'_>) -> Result<(), Error> {
        let layer = self.layer;
        let AttentionParameters { query_norm, key_norm, .. } = self.parameters;
        let [queries, held, new] =
            [saved.tokens, saved.held.len(), saved.new].map(|count| count * saved.sequences);
        let (queries, held, new) =
            (queries * layer.q_width(), held * layer.kv_width(), new * layer.kv_width());
        for (what, expected, got) in [
            ("saved queries", queries, saved.q.len()),
            ("saved keys", held, saved.k.len()),
            ("saved queries before a norm", normed(query_norm, queries), saved.plain_q.len()),
            ("saved keys before a norm", normed(key_norm, new), saved.plain_k.len()),
            ("gradient of an attention's results", saved.x.len(), upstream.d_y.len()),
        ] {
            same(what, expected, got)?;
        }
        let Some(d_state) = upstream.d_state else { return Ok(()) };
        let first = d_state.start.max(saved.held.start);
        let positions = saved.held.end.saturating_sub(first);
        let expected = positions * saved.sequences * layer.kv_width();
        same("gradient of the keys of states", expected, d_state.keys.len())?;
        same("gradient of the values of states", expected, d_state.values.len())
    }

    /// Refuses places that do not fit the parameters.
    fn check_places(&self, places: &AttentionParameters<&mut [f32]>) -> Result<(), Error> {
        let AttentionParameters { query, key, value, output, .. } = self.parameters;
        for (what, affine, place) in [
            ("gradient of an attention's query weights", query, &places.query),
            ("gradient of an attention's key weights", key, &places.key),
            ("gradient of an attention's value weights", value, &places.value),
            ("gradient of an attention's output weights", output, &places.output),
        ] {
            let MatrixShape { out_features, in_features } = affine.weight.shape();
            same(what, out_features * in_features, place.weight.len())?;
        }
        let AttentionParameters { query_norm, key_norm, sinks, .. } = self.parameters;
        for (what, parameter, place) in [
            ("gradient of a bias of queries", query.bias, &places.query.bias),
            ("gradient of a bias of keys", key.bias, &places.key.bias),
            ("gradient of a bias of values", value.bias, &places.value.bias),
            ("gradient of a bias of results", output.bias, &places.output.bias),
            ("gradient of a norm of queries", query_norm, &places.query_norm),
            ("gradient of a norm of keys", key_norm, &places.key_norm),
            ("gradient of sinks", sinks, &places.sinks),
        ] {
            let expected = parameter.map_or(0, <[f32]>::len);
            same(what, expected, place.as_ref().map_or(expected, |place| place.len()))?;
        }
        Ok(())
    }

    fn attention(
        &self,
        saved: &Saved,
        d_mixed: &[f32],
        sinks: &mut Option<&mut [f32]>,
        run: &mut Run<'_>,
    ) -> Result<Heads, Error> {
        let (queries, keys) = (saved.query_shape(self.layer), saved.held_shape(self.layer));
        let attention = self.layer.attention(self.parameters.sinks, run.cpu);
        let plan = attention.plan(queries, keys, keys)?;
        let mut d = Heads {
            q: vec![0.0; saved.q.len()],
            k: vec![0.0; saved.k.len()],
            v: vec![0.0; saved.v.len()],
        };
        let mut d_sinks = sinks.as_ref().map(|sinks| vec![0.0; sinks.len()]);
        run.workspace.reserve(plan.backward_workspace_bytes::<f32>());
        plan.backward(
            plan::Inputs {
                q: TensorRef::new(&saved.q, queries)?,
                k: TensorRef::new(&saved.k, keys)?,
                v: TensorRef::new(&saved.v, keys)?,
            },
            plan::Saved {
                out: TensorRef::new(&saved.mixed, queries)?,
                lse: TensorRef::new(&saved.lse, queries.per_row())?,
            },
            plan::Upstream { d_out: TensorRef::new(d_mixed, queries)?, d_lse: None },
            plan::Gradients {
                d_q: TensorMut::new(&mut d.q, queries)?,
                d_k: TensorMut::new(&mut d.k, keys)?,
                d_v: TensorMut::new(&mut d.v, keys)?,
                terms: plan::TermGradients {
                    d_sinks: d_sinks.as_deref_mut(),
                    ..Default::default()
                },
            },
            run.workspace,
        )?;
        if let (Some(sinks), Some(d_sinks)) = (sinks, d_sinks) {
            nn::add(sinks, &d_sinks, run.cpu.level)?;
        }
        Ok(d)
    }

    fn rotation(&self, saved: &Saved, d: &mut Heads, run: &Run<'_>) -> Result<(), Error> {
        let Some(rotation) = &saved.rotation else { return Ok(()) };
        let (queries, keys) = (saved.query_shape(self.layer), saved.new_shape(self.layer));
        rotation.rotate_gradient(run.cpu.level, TensorMut::new(&mut d.q, queries)?)?;
        rotation.rotate_gradient(run.cpu.level, TensorMut::new(&mut d.k, keys)?)?;
        Ok(())
    }

    fn norms(
        &self,
        saved: &Saved,
        d: &mut Heads,
        gradients: &mut AttentionParameters<&mut [f32]>,
        run: &Run<'_>,
    ) -> Result<(), Error> {
        let AttentionParameters { query_norm, key_norm, .. } = self.parameters;
        for (weight, x, d, d_weight) in [
            (query_norm, &saved.plain_q, &mut d.q, &mut gradients.query_norm),
            (key_norm, &saved.plain_k, &mut d.k, &mut gradients.key_norm),
        ] {
            let Some(weight) = weight else { continue };
            let norm = RmsNorm { weight, epsilon: self.layer.norm_epsilon };
            let mut d_x = vec![0.0; x.len()];
            let places = NormGradients {
                d_x: Gradient::Write(&mut d_x),
                d_weight: added(d_weight),
                d_bias: Gradient::Skip,
            };
            rms_norm_backward(norm, NormBackward { x, d_y: d }, places, run.cpu.level)?;
            *d = d_x;
        }
        Ok(())
    }

    fn projections(
        &self,
        saved: &Saved,
        d: &Heads,
        gradients: &mut AttentionParameters<&mut [f32]>,
        run: &mut Run<'_>,
    ) -> Result<InputGradients, Error> {
        let AttentionParameters { query, key, value, .. } = self.parameters;
        let mut d_x = vec![0.0; saved.x.len()];
        let step = Step { affine: query, x: &saved.x, d_y: &d.q };
        step.run(&mut gradients.query, Gradient::Write(&mut d_x), run)?;
        let mut d_source = None;
        if let Some([keys, values]) = &saved.source {
            let (mut d_keys, mut d_values) = (vec![0.0; keys.len()], vec![0.0; values.len()]);
            let step = Step { affine: key, x: keys, d_y: &d.k };
            step.run(&mut gradients.key, Gradient::Write(&mut d_keys), run)?;
            let step = Step { affine: value, x: values, d_y: &d.v };
            step.run(&mut gradients.value, Gradient::Write(&mut d_values), run)?;
            d_source = Some([d_keys, d_values]);
        } else {
            let step = Step { affine: key, x: &saved.x, d_y: &d.k };
            step.run(&mut gradients.key, Gradient::Add(&mut d_x), run)?;
            let step = Step { affine: value, x: &saved.x, d_y: &d.v };
            step.run(&mut gradients.value, Gradient::Add(&mut d_x), run)?;
        }
        Ok(InputGradients { d_x, d_source, d_state: StateGradient::default() })
    }
}

/// One projection's backward.
struct Step<'a> {
    affine: LinearRef<'a>,
    x: &'a [f32],
    d_y: &'a [f32],
}

impl Step<'_> {
    fn run(
        &self,
        gradients: &mut Affine<&mut [f32]>,
        d_x: Gradient<&mut [f32]>,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let weights = self.affine.weight;
        let MatrixShape { out_features, in_features } = weights.shape();
        let rows = self.x.len() / in_features.max(1);
        let x = Input { data: self.x, rows, stride: in_features };
        let d_y = Input { data: self.d_y, rows, stride: out_features };
        let places = ProjectionGradients {
            d_x: d_x.map(|data| Output { data, stride: in_features }),
            d_weights: Gradient::Add(&mut *gradients.weight),
            d_bias: added(&mut gradients.bias),
        };
        let projection = ProjectionBackward { weights, x, d_y };
        Ok(project_backward(projection, places, run.cpu, run.workspace)?)
    }
}

/// A place to add to, if there is one.
fn added<'a>(place: &'a mut Option<&mut [f32]>) -> Gradient<&'a mut [f32]> {
    match place {
        Some(place) => Gradient::Add(place),
        None => Gradient::Skip,
    }
}

/// Numbers that are kept from before a norm.
fn normed(weight: Option<&[f32]>, len: usize) -> usize {
    weight.map_or(0, |_| len)
}
