//! What a section carries of a text.

use foveal::cache::KvStore;
use foveal::plan::Inputs;
use foveal::sparse::{Branches, LshState, MobaState, NativeSparse, NativeState, SparseState};
use foveal::{Phase, Shape, Tensor, TensorRef};

use super::across::MemoryState;
use super::recurrent::RecurrentState;
use crate::Error;
use crate::mixer::Store;

/// The state of one section of a layer.
#[derive(Clone, Debug)]
pub(crate) enum SectionState {
    /// Keys and values.
    Keys(Box<Store>),
    /// Keys and values, and those of the global tokens' projections.
    Global(Box<[Store; 2]>),
    Sparse(Box<SparseState<f32>>),
    Moba(Box<MobaState<f32>>),
    Native(Box<Compressing>),
    Lsh(Box<LshState<f32>>),
    Recurrent(Box<RecurrentState>),
    Memory(Box<MemoryState>),
}

/// The state of Native Sparse Attention, and the tokens that are not compressed yet.
#[derive(Clone, Debug)]
pub(crate) struct Compressing {
    pub(super) state: NativeState<f32>,
    /// Keys and values `[tokens, kv_heads, head_dim]` from the beginning of the next compressed token on.
    pub(super) open: [Vec<f32>; 2],
}

impl Compressing {
    /// Takes tokens in, with the last one of each length its mean as well, and attends with all of their queries.
    pub(super) fn forward(
        &mut self,
        layer: &NativeSparse,
        (tokens, gates): (Inputs<'_, f32, f32>, TensorRef<'_, f32>),
        phase: Phase,
    ) -> Result<Tensor<f32>, Error> {
        let Inputs { q, k, v } = tokens;
        let Shape { seq, heads, dim, .. } = k.shape();
        for (open, x) in self.open.iter_mut().zip([k, v]) {
            for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
                open.extend_from_slice(x.row(0, t, head));
            }
        }
        let count = self.state.compressed_by(seq);
        let all = Shape { seq: self.open[0].len() / (heads * dim).max(1), ..k.shape() };
        let means = |open: &[f32]| -> Result<Tensor<f32>, Error> {
            match count {
                0 => Ok(Tensor::zeros(Shape { seq: 0, ..all })?),
                _ => Ok(layer.pool(TensorRef::new(open, all)?)?),
            }
        };
        let (keys, values) = (means(&self.open[0])?, means(&self.open[1])?);
        let out = match phase {
            Phase::Prompt => {
                let compressed = Inputs { q, k: keys.view(), v: values.view() };
                let all = Branches { compressed, selected: tokens, window: tokens };
                self.state.prompt(all, gates)?.out
            }
            Phase::Generated => {
                let of = |compressed, x| Branches { compressed, selected: x, window: x };
                self.state.append(of(keys.view(), k), of(values.view(), v))?;
                self.state.attend(of(q, q), gates)?.out
            }
        };
        let gone = count * layer.sizes().stride * heads * dim;
        self.open.iter_mut().for_each(|open| drop(open.drain(..gone.min(open.len()))));
        Ok(out)
    }
}

impl SectionState {
    /// The keys and values that a mask shows.
    pub(super) fn keys(&self) -> Option<&Store> {
        match self {
            SectionState::Keys(store) => Some(store),
            SectionState::Global(both) => Some(&both[0]),
            _ => None,
        }
    }

    /// The same to append to.
    pub(super) fn keys_mut(&mut self) -> Option<&mut Store> {
        match self {
            SectionState::Keys(store) => Some(store),
            SectionState::Global(both) => Some(&mut both[0]),
            _ => None,
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        match self {
            SectionState::Keys(store) => store.clear(),
            SectionState::Global(both) => both.iter_mut().for_each(Store::clear),
            SectionState::Sparse(state) => state.clear(),
            SectionState::Moba(state) => state.clear(),
            SectionState::Lsh(state) => state.clear(),
            SectionState::Native(native) => {
                native.state.clear();
                native.open.iter_mut().for_each(Vec::clear);
            }
            SectionState::Recurrent(state) => state.clear(),
            SectionState::Memory(state) => state.clear(),
        }
    }

    /// Bytes of what is held.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            SectionState::Keys(store) => store.bytes(),
            SectionState::Global(both) => both.iter().map(Store::bytes).sum(),
            SectionState::Sparse(state) => state.bytes(),
            SectionState::Moba(state) => state.bytes(),
            SectionState::Lsh(state) => state.bytes(),
            SectionState::Native(native) => {
                let open = native.open.iter().map(Vec::len).sum::<usize>();
                native.state.bytes() + open * size_of::<f32>()
            }
            SectionState::Recurrent(state) => state.bytes(),
            SectionState::Memory(state) => state.bytes(),
        }
    }

    /// The position after the newest token.
    pub(crate) fn end(&self) -> usize {
        match self {
            SectionState::Keys(store) => store.end(),
            SectionState::Global(both) => both[0].end(),
            SectionState::Sparse(state) => state.tokens(),
            SectionState::Moba(state) => state.tokens(),
            SectionState::Lsh(state) => state.tokens(),
            SectionState::Native(native) => native.state.tokens(),
            SectionState::Recurrent(state) => state.tokens,
            SectionState::Memory(state) => state.tokens(),
        }
    }
}
