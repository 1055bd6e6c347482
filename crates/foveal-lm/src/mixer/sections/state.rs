//! What a section carries of a text.

use foveal::cache::KvStore;
use foveal::sparse::{MobaState, NativeState, SparseState, StateHeads};
use foveal::{Shape, TensorRef};

use super::across::MemoryState;
use super::recurrent::RecurrentState;
use crate::Error;
use crate::mixer::{Contents, Store, Taken};

/// The state of one section of a layer.
#[derive(Clone, Debug)]
pub(crate) enum SectionState {
    /// Keys and values.
    Keys(Box<Store>),
    Sparse(Box<SparseState<f32>>),
    Moba(Box<MobaState<f32>>),
    Native(Box<Compressing>),
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
    fn clear(&mut self) {
        self.state.clear();
        self.open.iter_mut().for_each(Vec::clear);
    }
}

/// Keys and values of a file, so many rows for each key/value head.
fn rows(taken: &Taken<'_>, entries: usize, heads: StateHeads) -> Result<[Vec<f32>; 2], Error> {
    let len = |dim: usize| entries.saturating_mul(heads.kv_heads * dim);
    Ok([taken.vector("keys", len(heads.key_dim))?, taken.vector("values", len(heads.value_dim))?])
}

fn views(
    [keys, values]: &[Vec<f32>; 2],
    seq: usize,
    heads: StateHeads,
) -> Result<[TensorRef<'_, f32>; 2], Error> {
    let StateHeads { kv_heads, key_dim, value_dim, .. } = heads;
    let shape = |dim| Shape { batch: 1, seq, heads: kv_heads, dim };
    Ok([TensorRef::new(keys, shape(key_dim))?, TensorRef::new(values, shape(value_dim))?])
}

impl SectionState {
    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        match self {
            SectionState::Keys(store) => store.clear(),
            SectionState::Sparse(state) => state.clear(),
            SectionState::Moba(state) => state.clear(),
            SectionState::Native(native) => native.clear(),
            SectionState::Recurrent(state) => state.clear(),
            SectionState::Memory(state) => state.clear(),
        }
    }

    /// Names its parts; `None` if they are not all that it is.
    pub(crate) fn save<'a>(&'a self, contents: &mut Contents<'a>) -> Option<()> {
        let mut rows = |[keys, values]: [&'a [f32]; 2]| {
            contents.numbers("keys", keys);
            contents.numbers("values", values);
        };
        match self {
            SectionState::Keys(store) => contents.store("", store),
            SectionState::Sparse(state) => rows(state.rows()),
            SectionState::Moba(state) => rows(state.rows()),
            SectionState::Native(native) => rows(native.state.rows()),
            SectionState::Recurrent(state) => state.save(contents),
            SectionState::Memory(state) => state.save(contents)?,
        }
        Some(())
    }

    /// Takes over what a file has of a state of so many tokens.
    ///
    /// # Errors
    /// For parts of other lengths.
    pub(crate) fn restore(&mut self, tokens: usize, taken: &mut Taken<'_>) -> Result<(), Error> {
        match self {
            SectionState::Keys(store) => taken.store("", store),
            SectionState::Sparse(state) => {
                let rows = rows(taken, state.entries_of(tokens), state.heads())?;
                Ok(state.restore(tokens, rows)?)
            }
            SectionState::Moba(state) => {
                state.clear();
                let rows = rows(taken, tokens, state.heads())?;
                let [k, v] = views(&rows, tokens, state.heads())?;
                Ok(state.append(k, v)?)
            }
            SectionState::Native(native) => {
                native.clear();
                let heads = native.state.heads();
                let rows = rows(taken, tokens, heads)?;
                let [k, v] = views(&rows, tokens, heads)?;
                (0..tokens).try_for_each(|t| native.append(k.tokens(t..t + 1), v.tokens(t..t + 1)))
            }
            SectionState::Recurrent(state) => state.restore(tokens, taken),
            SectionState::Memory(state) => state.restore(tokens, taken),
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
            SectionState::Recurrent(state) => state.bytes(),
            SectionState::Memory(state) => state.bytes(),
        }
    }

    /// The position after the newest token.
    pub(crate) fn end(&self) -> usize {
        match self {
            SectionState::Keys(store) => store.end(),
            SectionState::Sparse(state) => state.tokens(),
            SectionState::Moba(state) => state.tokens(),
            SectionState::Native(native) => native.state.tokens(),
            SectionState::Recurrent(state) => state.tokens,
            SectionState::Memory(state) => state.tokens(),
        }
    }
}
