//! What a section carries of a text.

use foveal::cache::KvStore;
use foveal::sparse::{MobaState, NativeState, SparseState};

use crate::mixer::Store;

/// The state of one section of a layer.
#[derive(Clone, Debug)]
pub(crate) enum SectionState {
    /// Keys and values.
    Keys(Box<Store>),
    Sparse(Box<SparseState<f32>>),
    Moba(Box<MobaState<f32>>),
    Native(Box<Compressing>),
}

/// The state of Native Sparse Attention, and the tokens that are not compressed yet.
#[derive(Clone, Debug)]
pub(crate) struct Compressing {
    pub(super) state: NativeState<f32>,
    /// Keys and values `[tokens, kv_heads, head_dim]` from the beginning of the next compressed token on.
    pub(super) open: [Vec<f32>; 2],
}

impl SectionState {
    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        match self {
            SectionState::Keys(store) => store.clear(),
            SectionState::Sparse(state) => state.clear(),
            SectionState::Moba(state) => state.clear(),
            SectionState::Native(native) => {
                native.state.clear();
                native.open.iter_mut().for_each(Vec::clear);
            }
        }
    }

    /// Bytes of what is held.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            SectionState::Keys(store) => store.bytes(),
            SectionState::Sparse(state) => state.bytes(),
            SectionState::Moba(state) => state.bytes(),
            SectionState::Native(native) => {
                let open = native.open.iter().map(Vec::len).sum::<usize>();
                native.state.bytes() + open * size_of::<f32>()
            }
        }
    }

    /// The position after the newest token.
    pub(crate) fn end(&self) -> usize {
        match self {
            SectionState::Keys(store) => store.end(),
            SectionState::Sparse(state) => state.tokens(),
            SectionState::Moba(state) => state.tokens(),
            SectionState::Native(native) => native.state.tokens(),
        }
    }
}
