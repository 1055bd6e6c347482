//! Recurrences with gates: `retention`, `scalar_decay`, `gla`, `delta`, `gated_delta`.
//!
//! ```text
//! q, k, v ← silu(conv(q, k, v))     q, k ← q / ‖q‖, k / ‖k‖     o = recurrence(q, k, v, a, β)
//! out = RMSNorm(o) ∘ silu(x W_g)    head by head
//! ```
//!
//! Which of the parts a mechanism has: `docs/mixers.md`; sources: [`foveal::linear`] and [`foveal::nn`]. Carried: states, and
//! the last inputs of convolutions. Kept for backward: what each part was given, and for delta rules what keys read. Tokens see
//! those before them only: an objective without order is refused.

mod convolution;
mod gates;

use std::ops::Range;

use foveal::linear::{Gradients, Results, State, Tokens, Upstream};
use foveal::nn::{self, GateOrder, GatedNorm, GatedNormBackward, GatedNormGradients, RmsNorm};
use foveal::{Gradient, Shape, TensorMut, TensorRef};

use self::convolution::Convolution;
use self::gates::{GateRows, Gates, projected};
use super::SectionPlace;
use super::linear::{load, store};
use crate::Error;
use crate::config::Mechanism;
use crate::mixer::{Rule, UNIT_EPSILON, with_rule};
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Projected, Tools, range};

/// The heads of a section.
#[derive(Debug)]
pub(super) struct Recurring {
    rule: Rule,
    /// Of queries, keys and values; without any, none.
    convolutions: Vec<Convolution>,
    gates: Gates,
    gate: Projected,
    norm: Range<usize>,
    epsilon: f32,
}

/// With what sequences begin.
#[derive(Clone)]
struct Initial {
    state: State,
    /// The last inputs of each convolution, of all sequences.
    last: Vec<Vec<f32>>,
}

/// What a call leaves for backward.
struct Saved {
    initial: Initial,
    gates: GateRows,
    /// Queries, keys and values as the recurrence reads them.
    rows: [Vec<f32>; 3],
    /// Queries and keys before they were made as long as 1.
    long: Option<[Vec<f32>; 2]>,
    /// What keys read.
    reads: Option<Vec<f32>>,
    /// What the recurrence gave, and the arguments of its gate.
    mixed: Vec<f32>,
    gate: Vec<f32>,
}

/// Of a recurrence's queries, keys and values; of its decays and strengths.
type RuleGradients = ([Vec<f32>; 3], [Vec<f32>; 2]);

impl Recurring {
    pub(super) fn new(
        mechanism: &Mechanism,
        rule: Rule,
        place: SectionPlace<'_>,
    ) -> Result<Recurring, Error> {
        if !place.causal {
            let what = "objective of a mixer with gates, which reads from left to right";
            return Err(Error::config(what, "masked", "causal"));
        }
        let (config, heads) = (place.config, place.heads);
        let channels = heads * config.attention.head_dim;
        let taps = match *mechanism {
            Mechanism::ScalarDecay { conv }
            | Mechanism::Delta { conv, .. }
            | Mechanism::GatedDelta { conv, .. } => conv,
            _ => 0,
        };
        let names = ["q_conv.weight", "k_conv.weight", "v_conv.weight"];
        let names = if taps == 0 { &[][..] } else { &names };
        let convolutions = names.iter().map(|name| Convolution::new(name, channels, place));
        let gate = place.name("gate_proj");
        Ok(Recurring {
            rule,
            convolutions: convolutions.collect::<Result<_, _>>()?,
            gates: Gates::new(mechanism, place)?,
            gate: Projected::new(place.ranges, &gate, [channels, config.width], false)?,
            norm: range(place.ranges, &place.name("norm.weight"))?,
            epsilon: config.norm_epsilon,
        })
    }

    fn norm<'a>(&self, parameters: &'a [f32]) -> GatedNorm<'a> {
        let norm = RmsNorm { weight: &parameters[self.norm.clone()], epsilon: self.epsilon };
        GatedNorm { norm, order: GateOrder::After }
    }

    fn initial(
        &self,
        tokens: &Tokens<'_, f32>,
        sequences: usize,
        carried: Option<&SectionCarried>,
    ) -> Result<Initial, Error> {
        let mut state = with_rule!(&self.rule, rule => rule.state(tokens)?);
        load(&mut state, carried)?;
        let last = self.convolutions.iter().enumerate().map(|(n, convolution)| {
            let len = sequences * convolution.state();
            match carried.and_then(|carried| carried.floats.get(2 + n)) {
                None => Ok(vec![0.0; len]),
                Some(last) if last.len() == len => Ok(last.clone()),
                Some(_) => Err(Error::SectionState),
            }
        });
        Ok(Initial { state, last: last.collect::<Result<_, _>>()? })
    }

    /// Queries, keys and values as the recurrence reads them, and the first two before they were made as long as 1.
    fn prepare(
        &self,
        call: &SectionCall<'_>,
        last: &mut [Vec<f32>],
        tools: &mut Tools<'_>,
    ) -> Result<Rows, Error> {
        let mut rows = [call.q, call.k, call.v].map(|x| gathered(x, tools));
        let convolved = rows.iter_mut().zip(&self.convolutions).zip(last);
        for ((rows, convolution), last) in convolved {
            let y = convolution.forward(call.parameters, rows, last, tools)?;
            tools.pool.give(std::mem::replace(rows, y));
        }
        if !self.rule.unit_keys() {
            return Ok((rows, None));
        }
        let long = [tools.pool.copy(&rows[0]), tools.pool.copy(&rows[1])];
        for rows in &mut rows[..2] {
            nn::l2_norm(rows, call.q.shape().dim, UNIT_EPSILON, tools.cpu.level)?;
        }
        Ok((rows, Some(long)))
    }

    fn tokens<'a>(
        &self,
        [q, k, v]: [&'a [f32]; 3],
        gates: &'a GateRows,
        shape: Shape,
    ) -> Result<Tokens<'a, f32>, Error> {
        let view = |x| TensorRef::new(x, shape);
        let mut tokens = Tokens::new(view(q)?, view(k)?, view(v)?);
        if let Some(dim) = self.gates.decay_dim(shape.dim) {
            tokens = tokens.log_decay(TensorRef::new(&gates.log_decay, Shape { dim, ..shape })?);
        }
        if self.gates.has_strength() {
            tokens = tokens.beta(TensorRef::new(&gates.beta, Shape { dim: 1, ..shape })?);
        }
        Ok(tokens)
    }

    /// From the gradient of what the recurrence gave to those of its rows, and of its gates.
    fn rule_backward(
        &self,
        saved: &Saved,
        d_mixed: &[f32],
        shape: Shape,
        tools: &mut Tools<'_>,
    ) -> Result<RuleGradients, Error> {
        let [q, k, v] = &saved.rows;
        let tokens = self.tokens([q, k, v], &saved.gates, shape)?;
        let mut d = [q, k, v].map(|x| tools.pool.take(x.len()));
        let [d_q, d_k, d_v] = &mut d;
        let mut d_gates =
            [&saved.gates.log_decay, &saved.gates.beta].map(|x| tools.pool.take(x.len()));
        let [d_decay, d_beta] = &mut d_gates;
        let one = |x, dim| TensorMut::new(x, Shape { dim, ..shape });
        let decay = self.gates.decay_dim(shape.dim).map(|dim| one(d_decay, dim)).transpose()?;
        let beta = self.gates.has_strength().then(|| one(d_beta, 1)).transpose()?;
        let places = Gradients {
            d_q: TensorMut::new(d_q, shape)?,
            d_k: TensorMut::new(d_k, shape)?,
            d_v: TensorMut::new(d_v, shape)?,
            d_log_decay: decay,
            d_beta: beta,
        };
        let reads = saved.reads.as_ref().map(|reads| TensorRef::new(reads, shape)).transpose()?;
        let initial = &saved.initial.state;
        let upstream = Upstream { d_out: TensorRef::new(d_mixed, shape)?, initial, reads };
        with_rule!(&self.rule, rule => {
            let rule = rule.clone().cpu(tools.cpu);
            let mut d_state = rule.state(&tokens)?;
            rule.backward_into(&tokens, upstream, places, &mut d_state, tools.workspace)?;
        });
        Ok((d, d_gates))
    }

    /// Back through lengths of 1 and convolutions.
    fn unprepare(
        &self,
        call: &SectionCall<'_>,
        saved: &Saved,
        mut d: [Vec<f32>; 3],
        gradients: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<[Vec<f32>; 3], Error> {
        if let Some(long) = &saved.long {
            for (long, d) in long.iter().zip(&mut d) {
                nn::l2_norm_backward(long, call.q.shape().dim, UNIT_EPSILON, d, tools.cpu.level)?;
            }
        }
        let convolved = d.iter_mut().zip(&self.convolutions).zip(&saved.initial.last);
        for (((d, convolution), last), x) in convolved.zip([call.q, call.k, call.v]) {
            let x = gathered(x, tools);
            let arenas = (call.parameters, &mut *gradients);
            let d_x = convolution.backward(arenas, (&x, last), d, tools)?;
            tools.pool.give(std::mem::replace(d, d_x));
            tools.pool.give(x);
        }
        Ok(d)
    }
}

/// Queries, keys and values, and the first two as they were before their lengths.
type Rows = ([Vec<f32>; 3], Option<[Vec<f32>; 2]>);

/// All rows, one after the other.
fn gathered(x: TensorRef<'_, f32>, tools: &mut Tools<'_>) -> Vec<f32> {
    let Shape { batch, seq, heads, dim } = x.shape();
    let mut rows = tools.pool.take(batch * seq * heads * dim);
    let places = rows.chunks_exact_mut(dim.max(1)).enumerate();
    places.for_each(|(n, to)| {
        to.copy_from_slice(x.row(n / heads / seq, n / heads % seq, n % heads));
    });
    rows
}

/// The inverse of [`gathered`].
fn scattered(rows: &[f32], mut to: TensorMut<'_, f32>) {
    let Shape { seq, heads, dim, .. } = to.shape();
    for (n, row) in rows.chunks_exact(dim.max(1)).enumerate() {
        to.row_mut(n / heads / seq, n / heads % seq, n % heads).copy_from_slice(row);
    }
}

impl TrainedSection for Recurring {
    fn positions(&self) -> Positions {
        if self.rule.rotated() { Positions::Rotated } else { Positions::Plain }
    }

    fn forward(
        &self,
        call: SectionCall<'_>,
        carried: Option<&mut SectionCarried>,
        out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error> {
        let (shape, level) = (call.q.shape(), tools.cpu.level);
        let none = Shape { batch: shape.batch, seq: 0, ..shape };
        let no_gates = GateRows::default();
        let empty = self.tokens([&[]; 3], &no_gates, none)?;
        let initial = self.initial(&empty, shape.batch, carried.as_deref())?;
        let Initial { mut state, mut last } = initial.clone();
        let gates = self.gates.forward(call.parameters, call.x, tools)?;
        let (rows, long) = self.prepare(&call, &mut last, tools)?;
        let mut mixed = tools.pool.take(rows[2].len());
        let reads = call.keep && self.gates.has_strength();
        let mut reads = reads.then(|| tools.pool.take(mixed.len()));
        let [q, k, v] = &rows;
        let tokens = self.tokens([q, k, v], &gates, shape)?;
        let place = reads.as_mut().map(|reads| TensorMut::new(reads, shape)).transpose()?;
        let results = Results { out: TensorMut::new(&mut mixed, shape)?, reads: place };
        with_rule!(&self.rule, rule => {
            let rule = rule.clone().cpu(tools.cpu);
            rule.forward_into(&tokens, results, &mut state, tools.workspace)?;
        });
        if let Some(carried) = carried {
            store(&state, carried);
            carried.floats.truncate(2);
            carried.floats.extend(last);
        }
        let gate = projected(&self.gate, call.parameters, call.x, tools)?;
        let mut y = tools.pool.take(mixed.len());
        nn::gated_norm(self.norm(call.parameters), &mixed, &gate, &mut y, level)?;
        scattered(&y, out);
        tools.pool.give(y);
        let saved = Saved { initial, gates, rows, long, reads, mixed, gate };
        if call.keep {
            return Ok(Box::new(Some(saved)));
        }
        saved.give(tools);
        Ok(Box::new(None::<Saved>))
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
        let SectionGradients { d_q, d_k, d_v, d_x, gradients, .. } = gradients;
        let (shape, level) = (call.q.shape(), tools.cpu.level);
        let d_y = gathered(upstream.d_out, tools);
        let [mut d_mixed, mut d_gate] = [d_y.len(); 2].map(|len| tools.pool.take(len));
        let places = GatedNormGradients {
            d_x: &mut d_mixed,
            d_gate: &mut d_gate,
            d_weight: Gradient::Add(&mut gradients[self.norm.clone()]),
        };
        let rows = GatedNormBackward { x: &saved.mixed, gate: &saved.gate, d_y: &d_y };
        let norm = self.norm(call.parameters);
        nn::gated_norm_backward(norm, rows, places, tools.workspace, level)?;
        let (arenas, place) = ((call.parameters, &mut *gradients), Gradient::Add(&mut *d_x));
        self.gate.backward(arenas, (call.x, &d_gate), place, tools)?;
        let (d, mut d_gates) = self.rule_backward(&saved, &d_mixed, shape, tools)?;
        let d = self.unprepare(&call, &saved, d, gradients, tools)?;
        for (d, place) in d.iter().zip([d_q, d_k, d_v]) {
            scattered(d, place);
        }
        let (arenas, rows) = ((call.parameters, gradients), (call.x, &saved.gates));
        let both = d_gates.each_mut().map(Vec::as_mut_slice);
        self.gates.backward(arenas, rows, both, d_x, tools)?;
        let buffers = [d_y, d_mixed, d_gate].into_iter().chain(d).chain(d_gates);
        buffers.for_each(|buffer| tools.pool.give(buffer));
        saved.give(tools);
        Ok(())
    }
}

impl Saved {
    /// Gives the buffers back.
    fn give(self, tools: &mut Tools<'_>) {
        let Saved { gates, rows, long, reads, mixed, gate, .. } = self;
        gates.give(tools);
        let buffers = rows.into_iter().chain(long.into_iter().flatten()).chain(reads);
        buffers.chain([mixed, gate]).for_each(|buffer| tools.pool.give(buffer));
    }
}
