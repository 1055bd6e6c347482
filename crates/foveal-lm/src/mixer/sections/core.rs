//! The mechanisms by name.

use foveal::cache::KvStore;
use foveal::plan::Inputs;
use foveal::sparse::{
    AngularHash, BigBird, BlockPlan, Longformer, LshTokens, Moba, NativeSparse, Reformer,
    SparseTransformer, StateHeads,
};
use foveal::{Attention, Mask, Phase, Scale, Shape, Tensor, TensorMut, TensorRef, nn};

use super::across::{Encoding, Remembering, Segments};
use super::chosen::{lsh, native_sparse, sparse_transformer};
use super::global::Globals;
use super::recurrent::{Recurring, projected};
use super::scale;
use super::state::{Compressing, SectionState};
use crate::Error;
use crate::config::Mechanism;
use crate::linear::{Linear, Run};
use crate::mixer::state::Heads;
use crate::mixer::{CacheStorage, LayerState, Store};
use crate::names::Parts;

/// What a section computes.
#[derive(Clone, Debug)]
pub(super) struct Core {
    sizes: Heads,
    scale: Scale,
    kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Exact attention to what a mask shows; of so many newest tokens, if there is a bound.
    Masked {
        mask: Mask,
        reach: Option<usize>,
        global: Option<Box<Globals>>,
    },
    /// The same by content and by distance.
    Segments(Box<Segments>),
    Sparse(SparseTransformer),
    Moba(Moba),
    /// With the projection to gates, `[3 · heads, width]`.
    Native(NativeSparse, Linear),
    /// Queries are keys.
    Lsh(Reformer, Box<AngularHash>),
    Recurring(Box<Recurring>),
    Remembering(Box<Remembering>),
}

/// The tokens of a call, as a section sees them: `[sequences, tokens, …]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct SectionTokens<'a> {
    /// The layer's inputs.
    pub(super) x: &'a [f32],
    pub(super) q: TensorRef<'a, f32>,
    pub(super) k: TensorRef<'a, f32>,
    pub(super) v: TensorRef<'a, f32>,
    /// Queries and keys without rotation.
    pub(super) plain: [TensorRef<'a, f32>; 2],
}

impl Core {
    pub(super) fn new(
        mechanism: &Mechanism,
        sizes: Heads,
        (parts, layer, section): (&Parts<'_>, usize, usize),
    ) -> Result<Core, Error> {
        let context = parts.config().context;
        let scale = scale(parts);
        if let Some(recurring) = Recurring::new(mechanism, sizes, (parts, layer, section))? {
            return Ok(Core { sizes, scale, kind: Kind::Recurring(Box::new(recurring)) });
        }
        let (heads, place) = (sizes.heads, (parts, layer, section));
        if let Some(segments) = Segments::new(mechanism, (heads, sizes.dims.0), place)? {
            return Ok(Core { sizes, scale, kind: Kind::Segments(Box::new(segments)) });
        }
        if let Some(remembering) = Remembering::new(mechanism, heads, scale, place)? {
            return Ok(Core { sizes, scale, kind: Kind::Remembering(Box::new(remembering)) });
        }
        let kind = match mechanism {
            Mechanism::Full {} => {
                Kind::Masked { mask: Mask::window(context), reach: Some(context), global: None }
            }
            &Mechanism::Window { tokens } => {
                positive("window of a mixer", tokens)?;
                Kind::Masked { mask: Mask::window(tokens), reach: Some(tokens), global: None }
            }
            Mechanism::Longformer { reach, gap, global, global_projections } => {
                positive("gap of a mixer", *gap)?;
                let pattern = Longformer::new(*reach).gaps(vec![*gap]).causal();
                let alone = *gap == 1 && global.is_empty();
                let mask = pattern.global(vec![global.clone()]).mask();
                let globals = match global_projections {
                    true => Some(Box::new(Globals::new(global, sizes, place)?)),
                    false => None,
                };
                let reach = alone.then(|| reach.saturating_add(1));
                Kind::Masked { mask, reach, global: globals }
            }
            &Mechanism::Bigbird { block, random, seed } => {
                let blocks = context.div_ceil(block.max(1));
                let plan = BlockPlan::published([sizes.heads, blocks, random], seed)?;
                let mask = BigBird { block, plan, causal: true }.mask()?;
                Kind::Masked { mask, reach: None, global: None }
            }
            Mechanism::SparseTransformer { .. } => {
                Kind::Sparse(sparse_transformer(mechanism, layer)?.scale(scale))
            }
            &Mechanism::Moba { block, top } => Kind::Moba(Moba::new(block, top)?.scale(scale)),
            Mechanism::NativeSparse { .. } => {
                let shape = [3 * sizes.heads, parts.config().width];
                let gates = parts.section(layer, section, "gate_proj", shape)?;
                Kind::Native(native_sparse(mechanism)?.scale(scale), gates)
            }
            Mechanism::Lsh { .. } => {
                let (layer, hash) = lsh(mechanism, [sizes.heads, sizes.kv_heads, sizes.dims.0])?;
                Kind::Lsh(layer, Box::new(hash))
            }
            Mechanism::Linformer { .. } => {
                return Err(Error::UnsupportedConfig {
                    key: "\"foveal\" mixer".to_owned(),
                    found: "\"linformer\", which is not causal and so continues no text".to_owned(),
                });
            }
            // Made above.
            _ => return Err(Error::SectionState),
        };
        Ok(Core { sizes, scale, kind })
    }

    pub(super) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Whether its queries and keys are rotated.
    pub(super) fn rotated(&self) -> bool {
        match &self.kind {
            Kind::Recurring(recurring) => recurring.rotated(),
            Kind::Remembering(remembering) => remembering.rotated(),
            Kind::Segments(_) => false,
            _ => true,
        }
    }

    /// Whether it reads queries and keys with rotation and without.
    pub(super) fn reads_both(&self) -> bool {
        match &self.kind {
            Kind::Remembering(remembering) => remembering.rotated(),
            Kind::Lsh(..) => true,
            _ => false,
        }
    }

    /// The projections of its global tokens.
    pub(super) fn globals(&self) -> Option<&Globals> {
        match &self.kind {
            Kind::Masked { global, .. } => global.as_deref(),
            _ => None,
        }
    }

    /// What its scores are multiplied by.
    pub(super) fn scale(&self) -> Scale {
        self.scale
    }

    /// How many of the newest tokens a query sees at most, of those in a store.
    pub(super) fn reach(&self) -> Option<usize> {
        match &self.kind {
            Kind::Masked { reach, .. } => *reach,
            Kind::Segments(segments) => Some(segments.reach),
            _ => None,
        }
    }

    fn state_heads(&self) -> StateHeads {
        let Heads { heads, kv_heads, dims: (key_dim, value_dim) } = self.sizes;
        StateHeads { heads, kv_heads, key_dim, value_dim }
    }

    /// A state that has seen nothing. Keys and values that a mask shows or a memory is searched for are stored as `storage`
    /// says, others as f32.
    pub(super) fn state(&self, storage: CacheStorage) -> Result<SectionState, Error> {
        Ok(match &self.kind {
            Kind::Masked { .. } | Kind::Segments(_) => {
                let Heads { kv_heads, dims, .. } = self.sizes;
                let store = || Store::new(storage, kv_heads, dims);
                match self.globals() {
                    Some(globals) => {
                        SectionState::Global(Box::new([store()?, store()?]), globals.last())
                    }
                    None => SectionState::Keys(Box::new(store()?)),
                }
            }
            Kind::Sparse(layer) => SectionState::Sparse(Box::new(layer.state(self.state_heads())?)),
            Kind::Moba(layer) => SectionState::Moba(Box::new(layer.state(self.state_heads())?)),
            Kind::Native(layer, _) => {
                let state = layer.state(self.state_heads())?;
                SectionState::Native(Box::new(Compressing { state, open: [vec![], vec![]] }))
            }
            Kind::Lsh(layer, hash) => {
                let hash = AngularHash::clone(hash);
                SectionState::Lsh(Box::new(layer.state(hash, self.state_heads())?.into()))
            }
            Kind::Recurring(recurring) => SectionState::Recurrent(Box::new(recurring.state()?)),
            Kind::Remembering(remembering) => {
                SectionState::Memory(Box::new(remembering.state(self.state_heads(), storage)?))
            }
        })
    }

    /// Appends the tokens to section `n` of the states, and writes what its heads give to `out`.
    pub(super) fn forward(
        &self,
        (states, n): (&mut [LayerState], usize),
        tokens: SectionTokens<'_>,
        mut out: TensorMut<'_, f32>,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        match &self.kind {
            Kind::Masked { mask, reach, .. } => {
                self.masked((mask, *reach, None), (states, n), tokens, out, run)
            }
            Kind::Segments(segments) => {
                let Segments { mask, reach, encoding } = &**segments;
                let seen = (mask, Some(*reach), Some(encoding));
                self.masked(seen, (states, n), tokens, out, run)
            }
            Kind::Remembering(remembering) => {
                Core::remembering(remembering, (states, n), tokens, out, run)
            }
            Kind::Recurring(recurring) => {
                let own = states.iter_mut().map(|state| match state.section_mut(n) {
                    Some(SectionState::Recurrent(state)) => Some(&mut **state),
                    _ => None,
                });
                let given = recurring.forward(own, tokens, run)?;
                copy(TensorRef::new(&given, out.shape())?, &mut out, (0, 0));
                Ok(())
            }
            Kind::Native(_, gates) => {
                let gates = gates_of(gates, tokens.x, run)?;
                self.chosen((states, n), tokens, &gates, out, run)
            }
            Kind::Sparse(_) | Kind::Moba(_) | Kind::Lsh(..) => {
                self.chosen((states, n), tokens, &[], out, run)
            }
        }
    }

    /// One sequence after the other: prompts as a whole, generated tokens one by one.
    fn chosen(
        &self,
        (states, n): (&mut [LayerState], usize),
        tokens: SectionTokens<'_>,
        gates: &[f32],
        mut out: TensorMut<'_, f32>,
        run: &Run<'_>,
    ) -> Result<(), Error> {
        let seq = tokens.q.shape().seq;
        let step = if run.phase == Phase::Prompt { seq.max(1) } else { 1 };
        let shape = Shape { dim: 3, ..tokens.q.shape() };
        let gates = match &self.kind {
            Kind::Native(..) => TensorRef::new(gates, shape)?,
            _ => TensorRef::new(&[], Shape { dim: 0, ..shape })?,
        };
        for (sequence, state) in states.iter_mut().enumerate() {
            let state = state.section_mut(n).ok_or(Error::SectionState)?;
            for t in (0..seq).step_by(step) {
                let own = |x| sequence_of(x, sequence).tokens(t..t + step);
                let SectionTokens { x, q, k, v, plain } = tokens;
                let (q, k, v, plain) = (own(q), own(k), own(v), plain.map(own));
                let own = (SectionTokens { x, q, k, v, plain }, own(gates));
                let given = self.choose(state, own, run)?;
                copy(given.view(), &mut out, (sequence, t));
            }
        }
        Ok(())
    }

    /// A prompt of one sequence, or one generated token.
    fn choose(
        &self,
        state: &mut SectionState,
        (tokens, gates): (SectionTokens<'_>, TensorRef<'_, f32>),
        run: &Run<'_>,
    ) -> Result<Tensor<f32>, Error> {
        let SectionTokens { q, k, v, .. } = tokens;
        let prompt = run.phase == Phase::Prompt;
        match (&self.kind, state) {
            (Kind::Sparse(_), SectionState::Sparse(state)) => {
                state.set_cpu(run.cpu);
                if prompt {
                    return Ok(state.prompt(Inputs { q, k, v })?.out);
                }
                state.append(k, v)?;
                Ok(state.attend(q)?.out)
            }
            (Kind::Moba(_), SectionState::Moba(state)) => {
                state.set_cpu(run.cpu);
                if prompt {
                    return Ok(state.prompt(Inputs { q, k, v })?.out);
                }
                state.append(k, v)?;
                Ok(state.attend(q)?.out)
            }
            (Kind::Native(..), SectionState::Native(native)) => {
                native.state.set_cpu(run.cpu);
                native.forward((Inputs { q, k, v }, gates), run.phase)
            }
            (Kind::Lsh(..), SectionState::Lsh(hashed)) => {
                let state = hashed.change();
                state.set_cpu(run.cpu);
                let hashed = tokens.plain[0];
                Ok(state.forward(LshTokens { hashed, qk: q, v }, run.phase)?.out)
            }
            _ => Err(Error::SectionState),
        }
    }

    /// One sequence after the other.
    fn remembering(
        remembering: &Remembering,
        (states, n): (&mut [LayerState], usize),
        tokens: SectionTokens<'_>,
        mut out: TensorMut<'_, f32>,
        run: &Run<'_>,
    ) -> Result<(), Error> {
        for (sequence, state) in states.iter_mut().enumerate() {
            let Some(SectionState::Memory(state)) = state.section_mut(n) else {
                return Err(Error::SectionState);
            };
            let own = |x| sequence_of(x, sequence);
            let SectionTokens { x, q, k, v, plain } = tokens;
            let (q, k, v, plain) = (own(q), own(k), own(v), plain.map(own));
            let given = remembering.forward(state, SectionTokens { x, q, k, v, plain }, run)?;
            copy(given.view(), &mut out, (sequence, 0));
        }
        Ok(())
    }

    /// Exact attention over keys and values of all sequences.
    fn masked(
        &self,
        (mask, reach, encoding): (&Mask, Option<usize>, Option<&Encoding>),
        (states, n): (&mut [LayerState], usize),
        tokens: SectionTokens<'_>,
        out: TensorMut<'_, f32>,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let shape = tokens.q.shape();
        let mut held = 0;
        for (sequence, state) in states.iter_mut().enumerate() {
            let store = state.section_mut(n).and_then(SectionState::keys_mut);
            let store = store.ok_or(Error::SectionState)?;
            store.make_room(reach, shape.seq)?;
            store.append(sequence_of(tokens.k, sequence), sequence_of(tokens.v, sequence))?;
            held = held.max(store.end() - store.start());
        }
        let stores: Vec<&dyn KvStore> = states
            .iter()
            .filter_map(|state| state.section(n).and_then(SectionState::keys))
            .map(|store| store as &dyn KvStore)
            .collect();
        let keys = Shape { seq: held, heads: self.sizes.kv_heads, ..shape };
        let attention = Attention::new().mask(mask.clone()).scale(self.scale).cpu(run.cpu);
        let attention = match encoding {
            Some(encoding) => attention.relative_encoding(encoding.view()?),
            None => attention,
        };
        let plan = match run.phase {
            Phase::Prompt => attention.plan(shape, keys, keys)?,
            Phase::Generated => attention.plan_decode(shape, keys, keys)?,
        };
        run.workspace.reserve(plan.workspace_bytes());
        Ok(plan.forward_cached(tokens.q, &stores, (out, None), run.workspace)?)
    }
}

fn positive(what: &str, found: usize) -> Result<(), Error> {
    if found == 0 { Err(Error::config(what, found, "at least 1 token")) } else { Ok(()) }
}

/// The gates of all tokens, `[rows, heads, 3]`.
fn gates_of(gates: &Linear, x: &[f32], run: &mut Run<'_>) -> Result<Vec<f32>, Error> {
    let mut gates = projected(gates, x, run)?;
    nn::sigmoid(&mut gates, 1.0, run.cpu.level)?;
    Ok(gates)
}

/// Copies all rows of `from` to where a sequence and a token of `to` begin.
pub(super) fn copy(
    from: TensorRef<'_, f32>,
    to: &mut TensorMut<'_, f32>,
    (sequence, first): (usize, usize),
) {
    let Shape { batch, seq, heads, .. } = from.shape();
    for (b, t) in (0..batch).flat_map(|b| (0..seq).map(move |t| (b, t))) {
        for head in 0..heads {
            to.row_mut(sequence + b, first + t, head).copy_from_slice(from.row(b, t, head));
        }
    }
}

/// One sequence of a batch.
pub(super) fn sequence_of(x: TensorRef<'_, f32>, sequence: usize) -> TensorRef<'_, f32> {
    x.part(sequence..sequence + 1, 0..x.shape().heads)
}
