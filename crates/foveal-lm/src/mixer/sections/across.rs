//! Sections that see across segments.
//!
//! ```text
//! transformer_xl   softmax over the segment and the `memory` tokens before it, by content and by distance:
//!                  scale (⟨q + u, k⟩ + ⟨q + v, r(i − j)⟩)      r(p) = W_r [sin, cos](p)
//! infini           g · (what a matrix holds of all segments before) + (1 − g) · softmax over the segment
//! memorizing       g · softmax over the `top` best keys of the document's past + (1 − g) · softmax over the segment
//! ```
//!
//! Formulas and sources: [`foveal::position::RelativeEncoding`], [`foveal::memory`]. Borders of segments lie at multiples of
//! their length in the text, however it is cut into calls. Queries and keys are rotated within Infini's segments only, if
//! at all: what a memory adds up or looks for has no place.

use std::ops::Range;
use std::path::Path;

use foveal::cache::{KvStore, TILE};
use foveal::mask::{Coverage, Pattern, Site};
use foveal::memory::infini::{self, Infini, InfiniState};
use foveal::memory::memorizing::{self, Index, Memorizing, MemorizingState};
use foveal::position::RelativeEncoding;
use foveal::sparse::StateHeads;
use foveal::{Mask, Scale, Shape, Tensor, TensorRef};

use super::core::SectionTokens;
use super::entries::{Entries, Rows, layout};
use crate::Error;
use crate::config::{Mechanism, MemoryUpdate};
use crate::linear::Run;
use crate::memory_file::MemoryFile;
use crate::mixer::{CacheStorage, Contents, Store, Taken};
use crate::names::Parts;

/// A memory of what is no longer seen.
#[derive(Clone, Debug)]
pub(super) enum Remembering {
    Infini { layer: Infini, gate: Vec<f32>, rotated: bool },
    Memorizing { layer: Memorizing, gate: Vec<f32>, scale: Vec<f32> },
}

/// What such a memory is of a text.
#[derive(Clone, Debug)]
pub(crate) enum MemoryState {
    Infini(Box<InfiniState<f32>>),
    Memorizing(Box<MemorizingState<Entries>>),
}

impl MemoryState {
    pub(super) fn tokens(&self) -> usize {
        match self {
            MemoryState::Infini(state) => state.tokens(),
            MemoryState::Memorizing(state) => state.tokens(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            MemoryState::Infini(state) => state.bytes(),
            MemoryState::Memorizing(state) => state.bytes(),
        }
    }

    pub(super) fn clear(&mut self) {
        match self {
            MemoryState::Infini(state) => state.clear(),
            MemoryState::Memorizing(state) => state.clear(),
        }
    }
}

impl MemoryState {
    /// Keeps the entries of a memory in a file from here on, and begins with those that it holds; `None` for a state of constant
    /// size.
    pub(crate) fn keep_in(
        &mut self,
        path: &Path,
        (storage, identity): (CacheStorage, [u8; 32]),
    ) -> Result<Option<usize>, Error> {
        let MemoryState::Memorizing(state) = self else { return Ok(None) };
        let (memorizing, heads) = (state.memorizing().clone(), state.heads());
        // Whatever was held goes; so that a file may be opened anew.
        let file = MemoryFile::open(path, &layout(&memorizing, heads, (storage, identity)))?;
        let found = file.end() - file.start();
        **state = memorizing.resume(heads, Entries::in_file(file, storage)?)?;
        Ok(Some(found))
    }

    /// Names its parts; `None` if they are not all that it is.
    pub(super) fn save<'a>(&'a self, contents: &mut Contents<'a>) -> Option<()> {
        match self {
            MemoryState::Infini(state) => {
                contents.numbers("matrices", state.memory().matrices());
                contents.numbers("key_sums", state.memory().key_sums());
                let parts = SEGMENT.iter().zip(state.segment());
                parts.for_each(|(name, numbers)| contents.numbers(name, numbers));
                Some(())
            }
            MemoryState::Memorizing(state) => {
                let parts = WINDOW.iter().zip(state.window());
                parts.for_each(|(name, numbers)| contents.numbers(name, numbers));
                if let Some((made_at, centroids)) = state.centroids() {
                    contents.count(INDEX[0], made_at);
                    contents.numbers(INDEX[1], centroids);
                }
                state.store().save(contents)
            }
        }
    }

    /// Takes over what a file has of a state of so many tokens.
    pub(super) fn restore(&mut self, tokens: usize, taken: &mut Taken<'_>) -> Result<(), Error> {
        match self {
            MemoryState::Infini(state) => {
                let lengths = [state.memory().matrices().len(), state.memory().key_sums().len()];
                let memory =
                    [taken.vector("matrices", lengths[0])?, taken.vector("key_sums", lengths[1])?];
                let mut parts = [vec![], vec![], vec![]];
                for ((name, part), own) in SEGMENT.iter().zip(&mut parts).zip(state.segment()) {
                    *part = taken.vector(name, own.len())?;
                }
                let memory = memory.each_ref().map(Vec::as_slice);
                Ok(state.restore(tokens, memory, parts.each_ref().map(Vec::as_slice))?)
            }
            MemoryState::Memorizing(state) => restore(state, tokens, taken),
        }
    }

    /// Brings entries that are in files to the disk.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        match self {
            MemoryState::Infini(_) => Ok(()),
            MemoryState::Memorizing(state) => state.store().sync(),
        }
    }

    /// The entries of a memory that grows.
    pub(crate) fn entries(&self) -> Option<&Entries> {
        match self {
            MemoryState::Infini(_) => None,
            MemoryState::Memorizing(state) => Some(state.store()),
        }
    }
}

/// What is held of Infini's open segment, and of the tokens that a memorizing section sees, in a file.
const SEGMENT: [&str; 3] = ["segment_keys", "segment_values", "segment_plain_keys"];
const WINDOW: [&str; 2] = ["window_keys", "window_values"];
/// After how many tokens the centroids of an index were made, and the centroids.
const INDEX: [&str; 2] = ["index_made", "index_centroids"];

/// [`MemoryState::restore`] of a memory that grows.
fn restore(
    state: &mut MemorizingState<Entries>,
    tokens: usize,
    taken: &mut Taken<'_>,
) -> Result<(), Error> {
    let (memorizing, heads) = (state.memorizing().clone(), state.heads());
    let [keys, values] = state.window().map(<[f32]>::len);
    let window = [taken.vector(WINDOW[0], keys)?, taken.vector(WINDOW[1], values)?];
    let (segment, capacity) = (memorizing.segment(), memorizing.capacity());
    let end = tokens / segment * segment;
    let gone = end.saturating_sub(capacity.max(segment));
    let none = Store::new(CacheStorage::F32, heads.kv_heads, (heads.key_dim, heads.value_dim))?;
    let none = memorizing.state(heads, Entries::Rows(Rows::Ram(Box::new(none))))?;
    let entries = std::mem::replace(state, none).into_store();
    let entries = entries.restored(gone / TILE * TILE..end, taken)?;
    *state = memorizing.resume(heads, entries)?;
    let before = if memorizing.sees_previous() && end > 0 { segment } else { 0 };
    state.restore(tokens, before, window.each_ref().map(Vec::as_slice))?;
    let Some(index) = memorizing.indexed() else { return Ok(()) };
    let made_at = taken.count(INDEX[0])?;
    if made_at > 0 {
        let count = index.lists() * heads.kv_heads * heads.key_dim;
        state.restore_centroids(made_at, &taken.vector(INDEX[1], count)?)?;
    }
    Ok(())
}

impl Remembering {
    /// `None` for a mechanism without such a memory.
    pub(super) fn new(
        mechanism: &Mechanism,
        heads: usize,
        scale: Scale,
        (parts, layer, section): (&Parts<'_>, usize, usize),
    ) -> Result<Option<Remembering>, Error> {
        let vector = |part: &str| parts.section_vector(layer, section, part, heads);
        Ok(Some(match *mechanism {
            Mechanism::Infini { segment, update, rotated } => {
                let update = match update {
                    MemoryUpdate::Linear => infini::Update::Linear,
                    MemoryUpdate::Delta => infini::Update::Delta,
                };
                let layer = Infini::new(segment)?.update(update).scale(scale);
                Remembering::Infini { layer, gate: vector("gate")?, rotated }
            }
            Mechanism::Memorizing { segment, top, capacity, previous, index } => {
                let index = index.map(|index| Index::new(index.lists, index.probes)).transpose()?;
                let layer =
                    Memorizing::new(segment, top, capacity)?.previous(previous).index(index);
                Remembering::Memorizing { layer, gate: vector("gate")?, scale: vector("scale")? }
            }
            _ => return Ok(None),
        }))
    }

    /// Whether some of its queries and keys are rotated.
    pub(super) fn rotated(&self) -> bool {
        matches!(self, Remembering::Infini { rotated: true, .. })
    }

    pub(super) fn state(
        &self,
        heads: StateHeads,
        storage: CacheStorage,
    ) -> Result<MemoryState, Error> {
        Ok(match self {
            Remembering::Infini { layer, rotated, .. } => {
                MemoryState::Infini(Box::new(layer.state(heads, *rotated)?))
            }
            Remembering::Memorizing { layer, .. } => {
                // Only rows are searched.
                let storage = if storage.coded() { CacheStorage::Bf16 } else { storage };
                let dims = (heads.key_dim, heads.value_dim);
                let store = Store::new(storage, heads.kv_heads, dims)?;
                let entries = Entries::Rows(Rows::Ram(Box::new(store)));
                MemoryState::Memorizing(Box::new(layer.state(heads, entries)?))
            }
        })
    }

    /// What the heads give of one sequence's tokens, on from its state.
    pub(super) fn forward(
        &self,
        state: &mut MemoryState,
        tokens: SectionTokens<'_>,
        run: &Run<'_>,
    ) -> Result<Tensor<f32>, Error> {
        let SectionTokens { plain: [q, k], v, .. } = tokens;
        match (self, state) {
            (Remembering::Infini { gate, rotated, .. }, MemoryState::Infini(state)) => {
                let own = infini::Tokens::new(q, k, v, gate);
                let own = if *rotated { own.rotated(tokens.q, tokens.k) } else { own };
                Ok(state.forward(&own, run.phase)?)
            }
            (Remembering::Memorizing { gate, scale, .. }, MemoryState::Memorizing(state)) => {
                let own = memorizing::Tokens::new(q, k, v, gate, scale);
                Ok(state.forward(&own, run.phase)?.out)
            }
            _ => Err(Error::SectionState),
        }
    }
}

/// What a relative encoding reads: keys by distance, `[distances, heads, head_dim]`, and two biases, `[heads, head_dim]`.
#[derive(Clone, Debug)]
pub(super) struct Encoding {
    keys: Vec<f32>,
    shape: Shape,
    content: Vec<f32>,
    position: Vec<f32>,
}

/// The most tokens that a section of Transformer-XL may see: as many keys by distance are made when a model is loaded.
pub(crate) const MAX_REACH: usize = 1 << 20;

/// What a section of Transformer-XL sees.
#[derive(Clone, Debug)]
pub(super) struct Segments {
    pub(super) mask: Mask,
    /// Keys that a query may see at most.
    pub(super) reach: usize,
    pub(super) encoding: Encoding,
}

impl Segments {
    /// `None` for another mechanism.
    pub(super) fn new(
        mechanism: &Mechanism,
        (heads, dim): (usize, usize),
        (parts, layer, section): (&Parts<'_>, usize, usize),
    ) -> Result<Option<Segments>, Error> {
        let &Mechanism::TransformerXl { segment, memory, same_length, clamp } = mechanism else {
            return Ok(None);
        };
        if segment == 0 {
            return Err(Error::config("segment of a mixer", segment, "at least 1 token"));
        }
        let width = parts.config().width;
        let reach = segment.saturating_add(memory);
        if reach > MAX_REACH {
            let expected = format!("at most {MAX_REACH} tokens");
            return Err(Error::config("segment and memory of a mixer", reach, expected));
        }
        let mask = match same_length {
            true => Mask::window(memory.max(1)),
            false => segments_mask((segment, memory), 0),
        };
        // A distance beyond the last row takes the last row.
        let distances = clamp.map_or(reach, |clamp| reach.min(clamp.saturating_add(1)));
        let table = RelativeEncoding::sinusoids(distances, width)?;
        let projection = parts.section(layer, section, "r_proj", [heads * dim, width])?;
        let keys = projection.rows_of(&table)?;
        let vector = |part: &str| parts.section_vector(layer, section, part, heads * dim);
        let shape = Shape { batch: 1, seq: distances, heads, dim };
        let (content, position) = (vector("content_bias")?, vector("position_bias")?);
        let encoding = Encoding { keys, shape, content, position };
        Ok(Some(Segments { mask, reach, encoding }))
    }
}

impl Encoding {
    pub(super) fn view(&self) -> Result<RelativeEncoding<'_>, Error> {
        let keys = TensorRef::new(&self.keys, self.shape)?;
        Ok(RelativeEncoding::new(keys, &self.content, &self.position)?)
    }
}

/// The tokens of the query's segment up to itself, and so many before the segment; keys are those of a text from `origin` on.
pub(crate) fn segments_mask((segment, memory): (usize, usize), origin: usize) -> Mask {
    Mask::pattern(SegmentMask { segment, memory, origin })
}

#[derive(Debug)]
struct SegmentMask {
    segment: usize,
    memory: usize,
    /// The position of the first key in its text.
    origin: usize,
}

impl SegmentMask {
    /// The first position that the query at `i` sees.
    fn first(&self, i: usize) -> usize {
        let begins = (i + self.origin) / self.segment * self.segment;
        begins.saturating_sub(self.memory).saturating_sub(self.origin)
    }
}

impl Pattern for SegmentMask {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        usize::try_from(i).is_ok_and(|i| (self.first(i)..=i).contains(&j))
    }

    fn live(
        &self,
        _: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        let (Ok(first), Ok(end)) = (usize::try_from(rows.start.max(0)), usize::try_from(rows.end))
        else {
            return;
        };
        if first >= end {
            return;
        }
        // A row before position 0 sees nothing, so that nothing is full.
        let all = self.first(end - 1)..if rows.start < 0 { 0 } else { first + 1 };
        let any = self.first(first)..end;
        let pieces = match all.is_empty() {
            true => [(any, Coverage::Partial), (0..0, Coverage::Full), (0..0, Coverage::Partial)],
            false => [
                (any.start..all.start, Coverage::Partial),
                (all.clone(), Coverage::Full),
                (all.end..any.end, Coverage::Partial),
            ],
        };
        for (piece, coverage) in pieces {
            let piece = piece.start.max(keys.start)..piece.end.min(keys.end);
            if !piece.is_empty() {
                visit(piece, coverage);
            }
        }
    }
}
