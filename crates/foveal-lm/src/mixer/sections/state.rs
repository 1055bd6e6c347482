//! What a section carries of a text.

use std::sync::OnceLock;

use foveal::cache::KvStore;
use foveal::plan::Inputs;
use foveal::sparse::{Branches, LshState, MobaState, NativeState, SparseState, StateHeads};
use foveal::{Phase, Shape, Tensor, TensorRef};

use super::across::MemoryState;
use super::recurrent::RecurrentState;
use crate::Error;
use crate::mixer::{Contents, Store, Taken};

/// The state of one section of a layer.
#[derive(Clone, Debug)]
pub(crate) enum SectionState {
    /// Keys and values.
    Keys(Box<Store>),
    /// Keys and values, and those of the global tokens' projections up to the last global position, which comes behind.
    Global(Box<[Store; 2]>, usize),
    Sparse(Box<SparseState<f32>>),
    Moba(Box<MobaState<f32>>),
    Native(Box<Compressing>),
    Lsh(Box<Hashed>),
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

/// The state of LSH attention, and its image once somebody has asked for it.
#[derive(Clone, Debug)]
pub(crate) struct Hashed {
    pub(super) state: LshState<f32>,
    image: OnceLock<[Vec<f32>; 5]>,
}

impl From<LshState<f32>> for Hashed {
    fn from(state: LshState<f32>) -> Hashed {
        Hashed { state, image: OnceLock::new() }
    }
}

impl Hashed {
    /// The state, which is about to change.
    pub(super) fn change(&mut self) -> &mut LshState<f32> {
        self.image = OnceLock::new();
        &mut self.state
    }

    fn image(&self) -> &[Vec<f32>; 5] {
        self.image.get_or_init(|| self.state.image())
    }
}

impl Compressing {
    fn clear(&mut self) {
        self.state.clear();
        self.open.iter_mut().for_each(Vec::clear);
    }

    /// Takes tokens in, and attends with all of their queries.
    pub(super) fn forward(
        &mut self,
        (tokens, gates): (Inputs<'_, f32, f32>, TensorRef<'_, f32>),
        phase: Phase,
    ) -> Result<Tensor<f32>, Error> {
        let Inputs { q, k, v } = tokens;
        if phase == Phase::Generated {
            self.append(k, v)?;
            let q = Branches { compressed: q, selected: q, window: q };
            return Ok(self.state.attend(q, gates)?.out);
        }
        let [keys, values] = self.compress([k, v])?;
        let compressed = Inputs { q, k: keys.view(), v: values.view() };
        let all = Branches { compressed, selected: tokens, window: tokens };
        Ok(self.state.prompt(all, gates)?.out)
    }

    /// Takes tokens in, with the last one of each length its mean as well.
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<(), Error> {
        let [keys, values] = self.compress([k, v])?;
        let of = |compressed, x| Branches { compressed, selected: x, window: x };
        Ok(self.state.append(of(keys.view(), k), of(values.view(), v))?)
    }

    /// The means that tokens complete.
    fn compress(&mut self, tokens: [TensorRef<'_, f32>; 2]) -> Result<[Tensor<f32>; 2], Error> {
        let Shape { seq, heads, dim, .. } = tokens[0].shape();
        for (open, x) in self.open.iter_mut().zip(tokens) {
            for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
                open.extend_from_slice(x.row(0, t, head));
            }
        }
        let (layer, count) = (*self.state.layer(), self.state.compressed_by(seq));
        let all = Shape { seq: self.open[0].len() / (heads * dim).max(1), ..tokens[0].shape() };
        let means = |open: &[f32]| -> Result<Tensor<f32>, Error> {
            match count {
                0 => Ok(Tensor::zeros(Shape { seq: 0, ..all })?),
                _ => Ok(layer.pool(TensorRef::new(open, all)?)?),
            }
        };
        let both = [means(&self.open[0])?, means(&self.open[1])?];
        let gone = count * layer.sizes().stride * heads * dim;
        self.open.iter_mut().for_each(|open| drop(open.drain(..gone.min(open.len()))));
        Ok(both)
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
    /// The keys and values that a mask shows.
    pub(super) fn keys(&self) -> Option<&Store> {
        match self {
            SectionState::Keys(store) => Some(store),
            SectionState::Global(both, _) => Some(&both[0]),
            _ => None,
        }
    }

    /// The same to append to.
    pub(super) fn keys_mut(&mut self) -> Option<&mut Store> {
        match self {
            SectionState::Keys(store) => Some(store),
            SectionState::Global(both, _) => Some(&mut both[0]),
            _ => None,
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        match self {
            SectionState::Keys(store) => store.clear(),
            SectionState::Global(both, _) => both.iter_mut().for_each(Store::clear),
            SectionState::Sparse(state) => state.clear(),
            SectionState::Moba(state) => state.clear(),
            SectionState::Lsh(hashed) => hashed.change().clear(),
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
            SectionState::Global(both, _) => {
                contents.store("", &both[0]);
                contents.store("global_", &both[1]);
            }
            SectionState::Lsh(hashed) => {
                let names = ["counts", "slots", "lists", "keys", "values"];
                names
                    .into_iter()
                    .zip(hashed.image())
                    .for_each(|(name, x)| contents.numbers(name, x));
            }
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
                native.append(k, v)
            }
            SectionState::Recurrent(state) => state.restore(tokens, taken),
            SectionState::Memory(state) => state.restore(tokens, taken),
            SectionState::Global(both, last) => {
                taken.store("", &mut both[0])?;
                taken.store("global_", &mut both[1])?;
                let expected = if tokens <= *last { tokens } else { 0 };
                let (what, got) = ("tokens of global projections", both[1].end());
                match got == expected {
                    true => Ok(()),
                    false => Err(foveal::Error::LengthMismatch { what, expected, got }.into()),
                }
            }
            SectionState::Lsh(hashed) => {
                let state = hashed.change();
                let [counts, slots] = state.tables();
                let (counts, slots) =
                    (taken.vector("counts", counts)?, taken.vector("slots", slots)?);
                let [lists, keys, values] = state.lengths(tokens, [&counts, &slots])?;
                let lists = taken.vector("lists", lists)?;
                let rows = [taken.vector("keys", keys)?, taken.vector("values", values)?];
                Ok(state.restore(tokens, [counts, slots, lists], rows)?)
            }
        }
    }

    /// Bytes of what is held.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            SectionState::Keys(store) => store.bytes(),
            SectionState::Global(both, _) => both.iter().map(Store::bytes).sum(),
            SectionState::Sparse(state) => state.bytes(),
            SectionState::Moba(state) => state.bytes(),
            SectionState::Lsh(hashed) => hashed.state.bytes(),
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
            SectionState::Global(both, _) => both[0].end(),
            SectionState::Sparse(state) => state.tokens(),
            SectionState::Moba(state) => state.tokens(),
            SectionState::Lsh(hashed) => hashed.state.tokens(),
            SectionState::Native(native) => native.state.tokens(),
            SectionState::Recurrent(state) => state.tokens,
            SectionState::Memory(state) => state.tokens(),
        }
    }
}
