//! What a layer of attention carries from call to call: keys and values, stored in one of several ways.
//!
//! ```text
//! f32  4 bytes a number, as they were computed      q8  8.5 bits, the newest 256 to 512 tokens bf16
//! f16  2 bytes, 11 significant bits                 q4  4.5 bits, likewise
//! bf16 2 bytes, 8 significant bits
//! ```
//!
//! Queries stay f32 whatever the store, so that nothing but what is stored is rounded, once. Scores and sums are f32.

mod contents;
mod evicting;
mod options;
mod pages;
mod retrieving;
mod snapshot;
mod store;

use std::ops::Range;

use foveal::cache::{KvStore, KvTile, Rolling, SharedTile};
use foveal::{Attention, DType, Mask, Phase, Plan, TensorRef};

use crate::Error;
use crate::mixer::sections::SectionState;

pub(crate) use contents::{Contents, Taken};
use evicting::Evicting;
pub(crate) use evicting::Seen;
pub use options::{CacheOptions, CacheStorage, Keep, Retrieval};
pub(crate) use pages::Demand;
pub use pages::Pages;
pub(crate) use retrieving::{Asking, Retrieving};
pub(crate) use snapshot::{Array, Span};
pub(crate) use store::Store;

/// What a layer keeps of the tokens seen so far.
#[derive(Debug, Clone)]
pub struct LayerState {
    store: Store,
    policy: Policy,
    /// Of a layer whose heads are mixed by several mechanisms, or one that keeps something else: then the store is empty.
    sections: Vec<SectionState>,
}

/// What is seen, and given up, where that is not what the layer itself says.
#[derive(Debug, Clone)]
enum Policy {
    Layer,
    /// So many of the newest tokens.
    Reach(usize),
    /// The first tokens as well, which lie in a store of their own.
    Rolling(Rolling, Box<Store>),
    Evicting(Box<Evicting>),
    Retrieving(Box<Retrieving>),
}

/// Sizes of a layer of attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Numbers of a key and of a value.
    pub(crate) dims: (usize, usize),
}

impl LayerState {
    /// A state that holds no tokens and gives up what the layer says.
    pub(crate) fn new(storage: CacheStorage, heads: Heads) -> Result<LayerState, Error> {
        let store = Store::new(storage, heads.kv_heads, heads.dims)?;
        Ok(LayerState { store, policy: Policy::Layer, sections: vec![] })
    }

    /// A state of sections.
    pub(crate) fn of_sections(sections: Vec<SectionState>) -> Result<LayerState, Error> {
        let none = Heads { heads: 0, kv_heads: 0, dims: (0, 0) };
        Ok(LayerState { sections, ..LayerState::new(CacheStorage::F32, none)? })
    }

    pub(crate) fn section(&self, n: usize) -> Option<&SectionState> {
        self.sections.get(n)
    }

    pub(crate) fn section_mut(&mut self, n: usize) -> Option<&mut SectionState> {
        self.sections.get_mut(n)
    }

    /// The sections, in order.
    pub(crate) fn sections(&self) -> &[SectionState] {
        &self.sections
    }

    /// The same, to be changed.
    pub(crate) fn sections_mut(&mut self) -> &mut [SectionState] {
        &mut self.sections
    }

    /// A state that holds no tokens, of which queries see no more than the `reach` newest ones.
    pub(crate) fn within(
        storage: CacheStorage,
        heads: Heads,
        reach: usize,
    ) -> Result<LayerState, Error> {
        Ok(LayerState { policy: Policy::Reach(reach), ..LayerState::new(storage, heads)? })
    }

    /// A state that holds no tokens, and keeps what `options` say.
    pub(crate) fn keeping(options: &CacheOptions, heads: Heads) -> Result<LayerState, Error> {
        let policy = match options.keep {
            Keep::All => Policy::Layer,
            Keep::Rolling(rolling) => {
                // Few tokens, and seen by all: codes would save nothing.
                let coded = options.storage.coded();
                let storage = if coded { CacheStorage::Bf16 } else { options.storage };
                let first = Store::new(storage, heads.kv_heads, heads.dims)?;
                Policy::Rolling(rolling, Box::new(first))
            }
            Keep::HeavyHitters { budget } => {
                let heads = [heads.heads, heads.kv_heads];
                Policy::Evicting(Box::new(Evicting::heavy_hitters(budget, heads)?))
            }
            Keep::Retrieve(retrieval) => {
                Policy::Retrieving(Box::new(Retrieving::new(retrieval, options.storage, heads)?))
            }
            Keep::SnapKv { budget } => {
                Policy::Evicting(Box::new(Evicting::snap_kv(budget, heads.heads)))
            }
        };
        Ok(LayerState { policy, ..LayerState::new(options.storage, heads)? })
    }

    /// What queries see of the store, and how many of the newest tokens at most, where that is not what the layer says.
    pub(crate) fn sight(&self) -> Option<(Mask, Option<usize>)> {
        match &self.policy {
            Policy::Layer => None,
            Policy::Reach(reach) => Some((Mask::window(*reach), Some(*reach))),
            Policy::Rolling(rolling, _) => Some((Mask::causal(), Some(rolling.window()))),
            Policy::Retrieving(retrieving) => Some((Mask::causal(), Some(retrieving.window()))),
            Policy::Evicting(_) => Some((Mask::causal(), None)),
        }
    }

    /// The first tokens and how many there are to be, if they are seen as well as the newest.
    pub(crate) fn rolling(&self) -> Option<(Rolling, &dyn KvStore)> {
        match &self.policy {
            Policy::Rolling(rolling, first) => Some((*rolling, &**first)),
            Policy::Retrieving(retrieving) => retrieving.seen().ok(),
            _ => None,
        }
    }

    /// Names its parts; `None` if with the options that made the state they are not all that it is.
    pub(crate) fn save<'a>(&'a self, layer: usize, contents: &mut Contents<'a>) -> Option<()> {
        let prefix = format!("layer.{layer}.");
        for (n, section) in self.sections.iter().enumerate() {
            contents.within(format!("{prefix}section.{n}."));
            section.save(contents)?;
        }
        contents.within(prefix);
        match &self.policy {
            Policy::Evicting(_) | Policy::Retrieving(_) => return None,
            _ if !self.sections.is_empty() => {}
            Policy::Layer | Policy::Reach(_) => contents.store("", &self.store),
            Policy::Rolling(_, first) => {
                contents.store("", &self.store);
                contents.store("first_", first);
            }
        }
        Some(())
    }

    /// Takes over what a file has of a state of a text of `position` tokens; of other sections than can be saved nothing.
    pub(crate) fn restore(
        &mut self,
        layer: usize,
        position: usize,
        taken: &mut Taken<'_>,
    ) -> Result<(), Error> {
        let prefix = format!("layer.{layer}.");
        for (n, section) in self.sections.iter_mut().enumerate() {
            taken.within(format!("{prefix}section.{n}."));
            section.restore(position, taken)?;
        }
        taken.within(prefix);
        match &mut self.policy {
            Policy::Evicting(_) | Policy::Retrieving(_) => {}
            _ if !self.sections.is_empty() => {}
            Policy::Layer | Policy::Reach(_) => taken.store("", &mut self.store)?,
            Policy::Rolling(_, first) => {
                taken.store("", &mut self.store)?;
                taken.store("first_", first)?;
            }
        }
        Ok(())
    }

    /// Whether it holds what a state of this layer, of that reach, holds of a text of `position` tokens. Sections: whether they
    /// are at `position`.
    pub(crate) fn is_at(&self, reach: Option<usize>, position: usize) -> bool {
        if !self.sections.is_empty() {
            return self.sections.iter().all(|section| section.end() == position);
        }
        let reach = self.sight().map_or(reach, |(_, reach)| reach);
        let first = self.rolling().is_none_or(|(rolling, first)| {
            (first.start(), first.end()) == (0, rolling.sinks_among(0..position).len())
        });
        first && self.store.is_at(reach, position)
    }

    /// What fetches pieces of the text, if something does.
    pub(crate) fn retrieving(&self) -> Option<&Retrieving> {
        match &self.policy {
            Policy::Retrieving(retrieving) => Some(retrieving),
            _ => None,
        }
    }

    /// The same, to take in tokens and to fetch.
    pub(crate) fn retrieving_mut(&mut self) -> Option<&mut Retrieving> {
        match &mut self.policy {
            Policy::Retrieving(retrieving) => Some(retrieving),
            _ => None,
        }
    }

    /// How keys and values are stored.
    pub fn storage(&self) -> CacheStorage {
        self.store.storage()
    }

    /// Bytes of the keys and values that are held.
    pub fn bytes(&self) -> usize {
        let first = match &self.policy {
            Policy::Rolling(_, first) => first.bytes(),
            Policy::Retrieving(retrieving) => retrieving.bytes(),
            _ => 0,
        };
        let sections = self.sections.iter().map(SectionState::bytes).sum::<usize>();
        first + self.store.bytes() + sections
    }

    /// Forgets everything and keeps the memory; the next token has position 0.
    pub fn clear(&mut self) {
        self.store.clear();
        self.sections.iter_mut().for_each(SectionState::clear);
        match &mut self.policy {
            Policy::Layer | Policy::Reach(_) => {}
            Policy::Rolling(_, first) => first.clear(),
            Policy::Evicting(evicting) => evicting.clear(),
            Policy::Retrieving(retrieving) => retrieving.clear(),
        }
    }

    /// Gives up keys that got little weight, if it is time to, before a call of `tokens` tokens.
    pub(crate) fn before(
        &mut self,
        call: (&Attention<'_>, Phase),
        tokens: usize,
    ) -> Result<(), Error> {
        match &mut self.policy {
            Policy::Evicting(evicting) => evicting.before(&mut self.store, call, tokens),
            _ => Ok(()),
        }
    }

    /// Whether [`LayerState::rewind`] can go back to `position`, in a layer of that reach: whether all that the next query
    /// would see is still there.
    pub(crate) fn can_rewind(&self, reach: Option<usize>, position: usize) -> bool {
        if !self.sections.is_empty() {
            // What was given up for it can't be brought back.
            return self.sections.iter().all(|section| section.end() == position);
        }
        let reach = match &self.policy {
            Policy::Layer => reach,
            Policy::Reach(reach) => Some(*reach),
            Policy::Rolling(..) | Policy::Evicting(_) | Policy::Retrieving(_) => return false,
        };
        if self.coded() {
            return position == self.end();
        }
        let seen = (position + 1).saturating_sub(reach.unwrap_or(usize::MAX));
        self.start() <= seen && (self.start()..=self.end()).contains(&position)
    }

    /// Forgets the tokens from `position` on, if [`LayerState::can_rewind`] says so.
    pub(crate) fn rewind(&mut self, position: usize) {
        if self.sections.is_empty() {
            self.store.truncate(position);
        }
    }

    /// Whether weights are to be looked at after each call: [`LayerState::after`].
    pub(crate) fn evicting(&self) -> bool {
        matches!(self.policy, Policy::Evicting(_))
    }

    /// Remembers what a call gave weight to.
    pub(crate) fn after(&mut self, plan: &Plan<'_>, seen: Seen<'_>) -> Result<(), Error> {
        match &mut self.policy {
            Policy::Evicting(evicting) => evicting.after(&self.store, plan, seen),
            _ => Ok(()),
        }
    }

    /// Gives up what no later query can see, of which the newest `reach` tokens are seen, and appends the tokens of one
    /// sequence, `[1, tokens, kv_heads, dim]`.
    pub(crate) fn append(
        &mut self,
        reach: Option<usize>,
        k: TensorRef<'_, f32>,
        v: TensorRef<'_, f32>,
    ) -> Result<(), Error> {
        let tokens = k.shape().seq;
        if let Policy::Rolling(rolling, first) = &mut self.policy {
            let end = self.store.end();
            let count = rolling.sinks_among(end..end + tokens).len();
            first.make_room(None, count)?;
            first.append(k.tokens(0..count), v.tokens(0..count))?;
        }
        self.store.make_room(reach, tokens)?;
        self.store.append(k, v)
    }
}

impl KvStore for LayerState {
    fn end(&self) -> usize {
        self.store.end()
    }

    fn start(&self) -> usize {
        self.store.start()
    }

    fn kv_heads(&self) -> usize {
        self.store.kv_heads()
    }

    fn dims(&self) -> (usize, usize) {
        self.store.dims()
    }

    fn dtype(&self) -> DType {
        self.store.dtype()
    }

    fn coded(&self) -> bool {
        self.store.coded()
    }

    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        self.store.shared_tile(position)
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        self.store.tile(head, positions)
    }
}
