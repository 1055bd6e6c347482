//! Sections with a state of constant size: the parts that a layer puts around a matrix-state recurrence.
//!
//! ```text
//! q, k, v ← silu(conv(q, k, v))             with "conv": taps          short causal convolutions, channel by channel
//! q, k ← q / ‖q‖, k / ‖k‖                   delta rules
//! β = c σ(x W_β)                            delta rules                c = 2 with "negative_eigenvalues"
//! log a = −exp(a_log) softplus(x W_a + b)   scalar_decay, gated_delta  a number for each head
//! log a = ln σ(x W_a₁ W_a₂ + b) / 16        gla                        a number for each key channel
//! o = recurrence(q, k, v, a, β)
//! y = RMSNorm(o) ∘ silu(x W_g)              all but linear and efficient, head by head
//! ```
//!
//! Sources and formulas of the recurrences: [`foveal::linear`]; of the parts: [`foveal::nn`]. Queries and keys are rotated
//! for retention only. A section's value heads have a query and a key each.

use std::ops::Range;

use foveal::linear::{State, Tokens};
use foveal::nn::{self, DecayGate, GateOrder, GatedNorm, RmsNorm, ShortConv};
use foveal::{Cpu, Shape, Tensor, TensorRef};

use super::core::SectionTokens;
use super::rule::{Rule, TAU, UNIT_EPSILON, with_rule};
use crate::Error;
use crate::config::Mechanism;
use crate::linear::{Linear, Run};
use crate::mixer::state::Heads;
use crate::mixer::trace::{Weigher, probed, probes};
use crate::mixer::{Contents, Taken};
use crate::names::Parts;

/// A recurrence and what is around it.
#[derive(Clone, Debug)]
pub(super) struct Recurring {
    rule: Rule,
    heads: usize,
    head_dim: usize,
    /// Of queries, keys and values; without any, none.
    convolutions: Vec<Convolution>,
    strength: Option<(Linear, f32)>,
    decay: Option<DecayParts>,
    gate: Option<(Linear, Vec<f32>)>,
    norm_epsilon: f32,
}

/// Taps, `[K, channels]`.
#[derive(Clone, Debug)]
struct Convolution {
    taps: Vec<f32>,
    channels: usize,
}

#[derive(Clone, Debug)]
enum DecayParts {
    Softplus { projection: Linear, a_log: Vec<f32>, bias: Vec<f32> },
    Sigmoid { down: Linear, up: Linear },
}

/// What a recurrence carries of a text.
#[derive(Clone, Debug)]
pub(crate) struct RecurrentState {
    matrices: State,
    /// The last inputs of each convolution.
    convolutions: Vec<Vec<f32>>,
    pub(super) tokens: usize,
}

impl RecurrentState {
    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.matrices.matrices_mut().fill(0.0);
        self.matrices.key_sums_mut().fill(0.0);
        self.convolutions.iter_mut().for_each(|last| last.fill(0.0));
        self.tokens = 0;
    }

    pub(super) fn save<'a>(&'a self, contents: &mut Contents<'a>) {
        contents.numbers("matrices", self.matrices.matrices());
        contents.numbers("key_sums", self.matrices.key_sums());
        for (n, last) in self.convolutions.iter().enumerate() {
            contents.numbers(&format!("convolution.{n}"), last);
        }
    }

    pub(super) fn restore(&mut self, tokens: usize, taken: &Taken<'_>) -> Result<(), Error> {
        taken.numbers("matrices", self.matrices.matrices_mut())?;
        taken.numbers("key_sums", self.matrices.key_sums_mut())?;
        for (n, last) in self.convolutions.iter_mut().enumerate() {
            taken.numbers(&format!("convolution.{n}"), last)?;
        }
        self.tokens = tokens;
        Ok(())
    }

    pub(super) fn bytes(&self) -> usize {
        let matrices = self.matrices.matrices().len() + self.matrices.key_sums().len();
        let convolutions = self.convolutions.iter().map(Vec::len).sum::<usize>();
        (matrices + convolutions) * size_of::<f32>()
    }
}

impl Recurring {
    /// The parts of a mechanism; `None` if it is no recurrence.
    pub(super) fn new(
        mechanism: &Mechanism,
        sizes: Heads,
        place: (&Parts<'_>, usize, usize),
    ) -> Result<Option<Recurring>, Error> {
        let Heads { heads, kv_heads, dims: (head_dim, _) } = sizes;
        let (parts, layer, section) = place;
        let width = parts.config().width;
        let linear = |part: &str, shape| parts.section(layer, section, part, shape);
        let vector = |part: &str, len| parts.section_vector(layer, section, part, len);
        let softplus = || -> Result<Option<DecayParts>, Error> {
            let projection = linear("decay_proj", [heads, width])?;
            let (a_log, bias) = (vector("a_log", heads)?, vector("dt_bias", heads)?);
            Ok(Some(DecayParts::Softplus { projection, a_log, bias }))
        };
        let strength = |negative: bool| -> Result<Option<(Linear, f32)>, Error> {
            Ok(Some((linear("beta_proj", [heads, width])?, if negative { 2.0 } else { 1.0 })))
        };
        let Some(rule) = Rule::new(mechanism, (heads, kv_heads), head_dim)? else {
            return Ok(None);
        };
        let (taps, strength, decay) = match *mechanism {
            Mechanism::ScalarDecay { conv } => (conv, None, softplus()?),
            Mechanism::Gla { rank } => {
                let down = linear("decay_down", [rank, width])?;
                let up = linear("decay_up", [heads * head_dim, rank])?;
                let bias = Some(vector("decay_up.bias", heads * head_dim)?);
                (0, None, Some(DecayParts::Sigmoid { down, up: Linear { bias, ..up } }))
            }
            Mechanism::Delta { conv, negative_eigenvalues } => {
                (conv, strength(negative_eigenvalues)?, None)
            }
            Mechanism::GatedDelta { conv, negative_eigenvalues } => {
                (conv, strength(negative_eigenvalues)?, softplus()?)
            }
            _ => (0, None, None),
        };
        let gate = rule.gated().then(|| -> Result<_, Error> {
            let projection = linear("gate_proj", [heads * head_dim, width])?;
            Ok((projection, vector("norm.weight", head_dim)?))
        });
        let channels = heads * head_dim;
        let names = if taps == 0 { &[][..] } else { &["q_conv", "k_conv", "v_conv"] };
        let convolution = |name: &&str| -> Result<Convolution, Error> {
            let by_channel = parts.section_taps(layer, section, name, [channels, taps])?;
            let tap = |n: usize| by_channel.iter().skip(n).step_by(taps).copied();
            Ok(Convolution { taps: (0..taps).flat_map(tap).collect(), channels })
        };
        let convolutions: Vec<_> = names.iter().map(convolution).collect::<Result<_, _>>()?;
        convolutions.iter().try_for_each(|conv| conv.view().state_len().map(|_| ()))?;
        Ok(Some(Recurring {
            rule,
            heads,
            head_dim,
            convolutions,
            strength,
            decay,
            gate: gate.transpose()?,
            norm_epsilon: parts.config().norm_epsilon,
        }))
    }

    /// Whether queries and keys are rotated.
    pub(super) fn rotated(&self) -> bool {
        self.rule.rotated()
    }

    /// A state that has seen nothing.
    pub(super) fn state(&self) -> Result<RecurrentState, Error> {
        let call = Call { q: vec![], k: vec![], v: vec![], log_decay: vec![], beta: vec![] };
        let matrices = with_rule!(&self.rule, rule => rule.state(&call.tokens(self, 0)?)?);
        let last = |conv: &Convolution| Ok(vec![0.0; conv.view().state_len()?]);
        let convolutions = self.convolutions.iter().map(last).collect::<Result<_, Error>>()?;
        Ok(RecurrentState { matrices, convolutions, tokens: 0 })
    }

    /// What the heads give of the tokens of all sequences, `[sequences, tokens, heads, head_dim]`, on from the states.
    pub(super) fn forward<'s>(
        &self,
        states: impl Iterator<Item = Option<&'s mut RecurrentState>>,
        tokens: SectionTokens<'_>,
        run: &mut Run<'_>,
    ) -> Result<Vec<f32>, Error> {
        let seq = tokens.q.shape().seq;
        let (log_decay, beta) = self.gates(tokens.x, run)?;
        let mut out = vec![];
        for (n, state) in states.enumerate() {
            let state = state.ok_or(Error::SectionState)?;
            let rows = |x: TensorRef<'_, f32>| gathered(x, n);
            let own = |x: &[f32]| {
                let width = x.len() / (tokens.q.shape().batch * seq).max(1) * seq;
                x[n * width..(n + 1) * width].to_vec()
            };
            let mut call = Call {
                q: rows(tokens.q),
                k: rows(tokens.k),
                v: rows(tokens.v),
                log_decay: own(&log_decay),
                beta: own(&beta),
            };
            self.prepare(&mut call, state, run.cpu)?;
            let RecurrentState { matrices, tokens: seen, .. } = state;
            let given = with_rule!(&self.rule, rule => {
                rule.clone().cpu(run.cpu).forward(&call.tokens(self, seq)?, matrices)?
            });
            *seen += seq;
            out.extend(Tensor::into_vec(given));
        }
        self.finish(tokens.x, out, run)
    }

    /// What the recurrence alone gives of unit vectors in place of values: what is left of each key's value in what a row reads.
    pub(super) fn weigh(
        &self,
        tokens: SectionTokens<'_>,
        (rows, first_head): (Range<usize>, usize),
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let (log_decay, beta) = self.gates(tokens.x, run)?;
        let mut state = self.state()?;
        let [q, k, v] = [tokens.q, tokens.k, tokens.v].map(|x| gathered(x, 0));
        let mut call = Call { q, k, v, log_decay, beta };
        self.prepare(&mut call, &mut state, run.cpu)?;
        let seq = rows.end;
        let shape = Shape { batch: 1, seq, heads: self.heads, dim: self.head_dim };
        for first in (0..seq).step_by(self.head_dim.max(1)) {
            call.v = probes(shape, first)?.into_vec();
            state.clear();
            let matrices = &mut state.matrices;
            let given = with_rule!(&self.rule, rule => {
                rule.clone().cpu(run.cpu).forward(&call.tokens(self, seq)?, matrices)?
            });
            probed(given.view(), (0, first), (rows.clone(), first_head), weigher);
        }
        Ok(())
    }

    /// Logarithms of decays, and writing strengths, of all tokens.
    fn gates(&self, x: &[f32], run: &mut Run<'_>) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let level = run.cpu.level;
        let (mut log_decay, mut beta) = (vec![], vec![]);
        match &self.decay {
            None => {}
            Some(DecayParts::Softplus { projection, a_log, bias }) => {
                log_decay = projected(projection, x, run)?;
                nn::decay_gate(DecayGate { a_log, bias }, &mut log_decay, level)?;
            }
            Some(DecayParts::Sigmoid { down, up }) => {
                log_decay = projected(up, &projected(down, x, run)?, run)?;
                nn::log_sigmoid(&mut log_decay, TAU, level)?;
            }
        }
        if let Some((projection, factor)) = &self.strength {
            beta = projected(projection, x, run)?;
            nn::sigmoid(&mut beta, *factor, level)?;
        }
        Ok((log_decay, beta))
    }

    /// Convolutions and lengths of 1.
    fn prepare(&self, call: &mut Call, state: &mut RecurrentState, cpu: Cpu) -> Result<(), Error> {
        let Call { q, k, v, .. } = call;
        let rows = [&mut *q, &mut *k, v].into_iter().zip(&mut state.convolutions);
        for (conv, (x, last)) in self.convolutions.iter().zip(rows) {
            let mut y = vec![0.0; x.len()];
            nn::short_conv(conv.view(), x, last, &mut y, cpu.level)?;
            *x = y;
        }
        if self.rule.unit_keys() {
            nn::l2_norm(q, self.head_dim, UNIT_EPSILON, cpu.level)?;
            nn::l2_norm(k, self.head_dim, UNIT_EPSILON, cpu.level)?;
        }
        Ok(())
    }

    /// Norm and gate of what the recurrence gave.
    fn finish(&self, x: &[f32], out: Vec<f32>, run: &mut Run<'_>) -> Result<Vec<f32>, Error> {
        let Some((projection, weight)) = &self.gate else { return Ok(out) };
        let gate = projected(projection, x, run)?;
        let norm = RmsNorm { weight, epsilon: self.norm_epsilon };
        let norm = GatedNorm { norm, order: GateOrder::After };
        let mut y = vec![0.0; out.len()];
        nn::gated_norm(norm, &out, &gate, &mut y, run.cpu.level)?;
        Ok(y)
    }
}

impl Convolution {
    fn view(&self) -> ShortConv<'_> {
        let Convolution { taps, channels } = self;
        ShortConv { weight: taps, bias: None, channels: *channels, silu: true }
    }
}

/// The tokens of one sequence, row after row.
struct Call {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    log_decay: Vec<f32>,
    beta: Vec<f32>,
}

impl Call {
    fn tokens(&self, section: &Recurring, seq: usize) -> Result<Tokens<'_, f32>, Error> {
        let shape = Shape { batch: 1, seq, heads: section.heads, dim: section.head_dim };
        let view = |x| TensorRef::new(x, shape);
        let tokens = Tokens::new(view(&self.q)?, view(&self.k)?, view(&self.v)?);
        let one = Shape { dim: 1, ..shape };
        let tokens = match &section.decay {
            None => tokens,
            Some(DecayParts::Softplus { .. }) => {
                tokens.log_decay(TensorRef::new(&self.log_decay, one)?)
            }
            Some(DecayParts::Sigmoid { .. }) => tokens.log_decay(view(&self.log_decay)?),
        };
        match &section.strength {
            None => Ok(tokens),
            Some(_) => Ok(tokens.beta(TensorRef::new(&self.beta, one)?)),
        }
    }
}

/// One sequence's rows, side by side.
fn gathered(x: TensorRef<'_, f32>, sequence: usize) -> Vec<f32> {
    let Shape { seq, heads, .. } = x.shape();
    let rows = (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head)));
    rows.flat_map(|(t, head)| x.row(sequence, t, head)).copied().collect()
}

/// All rows of `x` by a projection.
pub(super) fn projected(linear: &Linear, x: &[f32], run: &mut Run<'_>) -> Result<Vec<f32>, Error> {
    let rows = x.len() / linear.in_features().max(1);
    let mut y = vec![0.0; rows * linear.out_features()];
    linear.forward(x, &mut y, run)?;
    Ok(y)
}
