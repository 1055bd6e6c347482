//! Multi-head attention with its projections (Vaswani et al. 2017, §3.2.2), heads grouped or not (Ainslie et al. 2023,
//! arXiv:2305.13245).
//!
//! ```text
//! q = rope(norm(x Wqᵀ + bq))   k = rope(norm(u Wkᵀ + bk))   v = w Wvᵀ + bv      q [T, H, D], k v [S, KV, D]
//! y = concat_h(softmax(scale · q_h K_gᵀ) V_g) Woᵀ + bo                          g = h / (H / KV)
//! ```
//!
//! Rows x are as wide as the layer; u and w are x itself, or rows of another sequence of any widths (cross-attention).
//! K and V are those of this call after those that the state holds, stored rotated. The norms are Qwen 3's and Gemma
//! 3's, the sinks gpt-oss's; biases, norms, rotation and sinks are there where parameters or inputs hold them.
//!
//! Forward costs 2 · T · width · D · (2 H + 2 KV) operations besides attention, backward twice that. It keeps, per
//! token, its inputs, q, k, v, the output of attention and its log-sum-exp, and q and k before their norm.

mod attended;
mod backward;
mod parameters;
mod saved;
mod stored;

use foveal::cache::{KvStore, RollingCall};
use foveal::nn::{RmsNorm, rms_norm_in_place};
use foveal::position::RopeTable;
use foveal::projection::Matrix;
use foveal::{Attention, Cpu, Mask, Phase, Scale, Shape, TensorMut, TensorRef};

use super::state::{Asking, Heads, Seen};
use super::{CacheStorage, LayerState};
use crate::Error;
use crate::linear::{Run, forward_together};

pub use attended::Attended;
pub use backward::{InputGradients, Upstream};
pub use parameters::AttentionParameters;
pub use saved::{Saved, StateGradient};
pub(crate) use stored::Activations;
pub use stored::GroupedQueryAttention;
pub(in crate::mixer) use stored::StoredParameters;

/// What a layer of attention computes, without its parameters.
///
/// ```
/// use foveal::projection::Activations;
/// use foveal::{Cpu, Mask, Phase, Scale, Workspace};
/// use foveal_lm::mixer::{Affine, AttentionParameters, Inputs, MultiHeadAttention, Run, Upstream};
///
/// # fn main() -> Result<(), foveal_lm::Error> {
/// let layer = MultiHeadAttention {
///     width: 32,
///     key_width: 32,
///     value_width: 32,
///     heads: 4,
///     kv_heads: 2,
///     head_dim: 8,
///     scale: Scale::InverseSqrtDim,
///     softcap: None,
///     mask: Mask::causal(),
///     reach: None,
///     norm_epsilon: 1e-6,
/// };
/// let affine = |rows: usize| Affine { weight: vec![0.1; rows * 32], bias: None };
/// let (query, key, value, output) = (affine(32), affine(16), affine(16), affine(32));
/// let (query_norm, key_norm, sinks) = (None, None, None);
/// let parameters =
///     AttentionParameters { query, key, value, output, query_norm, key_norm, sinks };
///
/// let mut workspace = Workspace::new();
/// let (cpu, phase, activations) = (Cpu::detect()?, Phase::Prompt, Activations::F32);
/// let mut run = Run { cpu, phase, activations, workspace: &mut workspace };
/// let mut states = [layer.state()?, layer.state()?];
/// // Two sequences of three tokens.
/// let inputs = Inputs { x: &[0.5; 2 * 3 * 32], ..Inputs::default() };
/// let (y, saved) = layer.forward(&parameters.as_slices(), inputs, &mut states, &mut run)?;
///
/// let mut gradients = parameters.zeros();
/// let upstream = Upstream { d_y: &y, d_state: None };
/// let before = layer.backward(
///     &parameters.as_slices(),
///     &saved,
///     upstream,
///     &mut gradients.as_slices_mut(),
///     &mut run,
/// )?;
/// assert_eq!(before.d_x.len(), y.len());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MultiHeadAttention {
    /// Numbers of an input and an output row.
    pub width: usize,
    /// Numbers of the rows that keys are made from; `width` for self-attention.
    pub key_width: usize,
    /// Numbers of the rows that values are made from; `width` for self-attention.
    pub value_width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: Scale,
    /// What scores are bent to, `c · tanh(score / c)`: Gemma 2's.
    pub softcap: Option<f32>,
    /// Which keys each query may see.
    pub mask: Mask,
    /// How many of the newest tokens a query sees at most, its own included: states give up older ones. `None` where the
    /// mask has no such bound, or is about more than distance.
    pub reach: Option<usize>,
    /// ε of the norms of queries and keys.
    pub norm_epsilon: f32,
}

/// The tokens of one call, the same number of each sequence; sequences one after the other.
#[derive(Debug, Clone, Copy, Default)]
pub struct Inputs<'a> {
    /// `[sequences, T, width]`.
    pub x: &'a [f32],
    /// What keys and values are made from.
    pub source: Source<'a>,
    /// The rotations of the tokens' positions: of queries and keys alike.
    pub rotation: Option<&'a RopeTable>,
}

/// What new keys and values are made from.
#[derive(Debug, Clone, Copy, Default)]
pub enum Source<'a> {
    /// The layer's own inputs: self-attention.
    #[default]
    Own,
    /// Another sequence: cross-attention. With empty slices, queries see what the states hold already.
    Other {
        /// `[sequences, new, key_width]`.
        keys: &'a [f32],
        /// `[sequences, new, value_width]`.
        values: &'a [f32],
    },
}

/// Parameters as kernels read them.
pub(crate) type Views<'a> = AttentionParameters<Matrix<'a>, &'a [f32]>;

/// A layer with its parameters.
struct Bound<'a> {
    layer: &'a MultiHeadAttention,
    parameters: Views<'a>,
    /// The rotations of queries towards the first tokens, where a rolling state sees those.
    capped: Option<&'a RopeTable>,
}

impl MultiHeadAttention {
    /// A state that holds no tokens; it grows as they come.
    ///
    /// # Errors
    /// [`Error::Kernel`] for sizes beyond the address space.
    pub fn state(&self) -> Result<LayerState, Error> {
        LayerState::new(CacheStorage::F32, self.sizes())
    }

    fn sizes(&self) -> Heads {
        Heads { heads: self.heads, kv_heads: self.kv_heads, dims: (self.head_dim, self.head_dim) }
    }

    /// Mixes the tokens of `states.len()` sequences, whose keys and values it appends to the states. Returns a result
    /// for every row of `inputs.x`, and what backward needs.
    ///
    /// # Errors
    /// [`Error::Kernel`] if parameters, inputs or states do not fit the layer, or each other; [`Error::TrainingState`].
    /// Where it is the mask or the grouping of heads that does not fit, the states have already moved on.
    pub fn forward(
        &self,
        parameters: &AttentionParameters<&[f32]>,
        inputs: Inputs<'_>,
        states: &mut [LayerState],
        run: &mut Run<'_>,
    ) -> Result<(Vec<f32>, Saved), Error> {
        let mut saved = Saved::kept();
        let mut y = vec![0.0; inputs.x.len()];
        let bound = Bound { layer: self, parameters: self.views(parameters)?, capped: None };
        bound.forward(inputs, &mut y, states, &mut saved, run)?;
        Ok((y, saved))
    }

    /// Numbers of a token's queries.
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Numbers of a token's keys or values.
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn shape(&self, [batch, seq]: [usize; 2], heads: usize) -> Shape {
        Shape { batch, seq, heads, dim: self.head_dim }
    }

    fn attention<'a>(&self, sinks: Option<&'a [f32]>, cpu: Cpu) -> Attention<'a> {
        let attention = Attention::new().mask(self.mask.clone()).scale(self.scale).cpu(cpu);
        let attention = match self.softcap {
            Some(cap) => attention.softcap(cap),
            None => attention,
        };
        match sinks {
            Some(sinks) => attention.sinks(sinks),
            None => attention,
        }
    }
}

impl Bound<'_> {
    /// [`MultiHeadAttention::forward`] into given memory.
    fn forward(
        &self,
        inputs: Inputs<'_>,
        y: &mut [f32],
        states: &mut [LayerState],
        saved: &mut Saved,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        saved.begin(self.layer, &inputs, states)?;
        self.project(inputs, saved, run)?;
        self.normalize(saved, run)?;
        if let Some(capped) = self.capped.filter(|_| states.iter().any(|s| s.rolling().is_some())) {
            saved.capped_q.clone_from(&saved.q);
            let q = saved.query_shape(self.layer);
            capped.rotate(run.cpu.level, TensorMut::new(&mut saved.capped_q, q)?)?;
        }
        let retrieving = states.iter().any(|state| state.retrieving().is_some());
        if retrieving {
            saved.unrotated[0].clone_from(&saved.q);
            saved.unrotated[1].clone_from(&saved.k);
        }
        if let Some(rotation) = inputs.rotation {
            let (q, k) = (saved.query_shape(self.layer), saved.new_shape(self.layer));
            rotation.rotate(run.cpu.level, TensorMut::new(&mut saved.q, q)?)?;
            rotation.rotate(run.cpu.level, TensorMut::new(&mut saved.k, k)?)?;
        }
        self.append(saved, states, run)?;
        if let ([state], true) = (&mut *states, retrieving) {
            self.fetch(saved, state, inputs.rotation, run)?;
        }
        self.attend(saved, states, run)?;
        forward_together(&saved.mixed, [(self.parameters.output, y)], run)
    }

    /// Queries, keys and values as they leave their projections.
    fn project(
        &self,
        inputs: Inputs<'_>,
        saved: &mut Saved,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let AttentionParameters { query, key, value, .. } = self.parameters;
        let Saved { q, k, v, .. } = saved;
        match inputs.source {
            Source::Own => forward_together(inputs.x, [(query, q), (key, k), (value, v)], run),
            Source::Other { keys, values } => {
                forward_together(inputs.x, [(query, q)], run)?;
                forward_together(keys, [(key, k)], run)?;
                forward_together(values, [(value, v)], run)
            }
        }
    }

    fn normalize(&self, saved: &mut Saved, run: &Run<'_>) -> Result<(), Error> {
        let Saved { q, k, plain_q, plain_k, kept, .. } = saved;
        let AttentionParameters { query_norm, key_norm, .. } = self.parameters;
        for (weight, rows, plain) in [(query_norm, q, plain_q), (key_norm, k, plain_k)] {
            let Some(weight) = weight else { continue };
            if *kept {
                plain.clone_from(rows);
            }
            let norm = RmsNorm { weight, epsilon: self.layer.norm_epsilon };
            rms_norm_in_place(norm, rows, run.cpu.level)?;
        }
        Ok(())
    }

    /// Moves the states on, and keeps what they hold.
    fn append(
        &self,
        saved: &mut Saved,
        states: &mut [LayerState],
        run: &Run<'_>,
    ) -> Result<(), Error> {
        let tokens = saved.new;
        let attention = self.layer.attention(self.parameters.sinks, run.cpu);
        let len = tokens * self.layer.kv_width();
        for (n, state) in states.iter_mut().enumerate() {
            state.before((&attention, run.phase), tokens)?;
            let shape = self.layer.shape([1, tokens], self.layer.kv_heads);
            let own = n * len..(n + 1) * len;
            let (k, v) = (&saved.k[own.clone()], &saved.v[own]);
            let (k, v) = (TensorRef::new(k, shape)?, TensorRef::new(v, shape)?);
            state.append(self.layer.reach, k, v)?;
        }
        saved.keep_states(self.layer, states);
        Ok(())
    }

    fn attend(
        &self,
        saved: &mut Saved,
        states: &mut [LayerState],
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        if let [state] = states
            && state.rolling().is_some()
        {
            return self.roll(saved, state, run);
        }
        let layer = self.layer;
        let shape = saved.query_shape(layer);
        let held = states.iter().map(|state| state.end() - state.start()).max().unwrap_or(0);
        let keys = layer.shape([states.len(), held], layer.kv_heads);
        let attention = layer.attention(self.parameters.sinks, run.cpu);
        let plan = match run.phase {
            Phase::Prompt => attention.plan(shape, keys, keys)?,
            Phase::Generated => attention.plan_decode(shape, keys, keys)?,
        };
        run.workspace.reserve(plan.workspace_bytes());
        let evicting = states.iter().any(LayerState::evicting);
        if evicting {
            saved.lse.resize(states.len() * saved.tokens * layer.heads, 0.0);
        }
        let stores: Vec<&dyn KvStore> = states.iter().map(|state| state as &dyn KvStore).collect();
        let q = TensorRef::new(&saved.q, shape)?;
        let wanted = saved.leaves_lse() || evicting;
        let out = TensorMut::new(&mut saved.mixed, shape)?;
        let lse = wanted.then(|| TensorMut::new(&mut saved.lse, shape.per_row()));
        plan.forward_cached(q, &stores, (out, lse.transpose()?), run.workspace)?;
        if let ([state], true) = (states, evicting) {
            let lse = TensorRef::new(&saved.lse, shape.per_row())?;
            state.after(&plan, Seen { phase: run.phase, q, lse })?;
        }
        Ok(())
    }

    /// Takes new tokens into what a state keeps of the whole text, and fetches what their queries see.
    fn fetch(
        &self,
        saved: &Saved,
        state: &mut LayerState,
        rotation: Option<&RopeTable>,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let Some(retrieving) = state.retrieving_mut() else { return Ok(()) };
        let [q, k] = &saved.unrotated;
        let (queries, new) = (saved.query_shape(self.layer), saved.new_shape(self.layer));
        retrieving.remember(TensorRef::new(k, new)?, TensorRef::new(&saved.v, new)?)?;
        let Scale::Value(scale) = self.layer.scale else { return Err(Error::SectionState) };
        let rope = rotation.map(RopeTable::rope);
        retrieving.fetch(Asking { q: TensorRef::new(q, queries)?, scale, rope }, run)
    }

    /// Attention to the first tokens and the newest.
    fn roll(&self, saved: &mut Saved, state: &LayerState, run: &mut Run<'_>) -> Result<(), Error> {
        let Some((rolling, first)) = state.rolling() else { return Ok(()) };
        let shape = saved.query_shape(self.layer);
        saved.lse.resize(saved.tokens * self.layer.heads, 0.0);
        // Without rotations, queries are the same towards all keys.
        let capped_q = if self.capped.is_some() { &saved.capped_q } else { &saved.q };
        let call = RollingCall {
            phase: run.phase,
            q: TensorRef::new(&saved.q, shape)?,
            capped_q: TensorRef::new(capped_q, shape)?,
            first,
            newest: state,
        };
        let out = TensorMut::new(&mut saved.mixed, shape)?;
        let lse = TensorMut::new(&mut saved.lse, shape.per_row())?;
        let attention = self.layer.attention(self.parameters.sinks, run.cpu);
        let scratch = &mut saved.rolling;
        rolling.forward(&attention, call, (out, lse), run.workspace, scratch)?;
        Ok(())
    }
}
