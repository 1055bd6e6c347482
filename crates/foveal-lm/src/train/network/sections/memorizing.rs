//! Attention within a segment, mixed with the entries of a document's past that suit a query best: `memorizing`.
//!
//! ```text
//! out = g · softmax over the k best of the memory + (1 − g) · softmax over the segment          g = sigmoid(β)
//! ```
//!
//! Wu et al. 2022; see [`Memorizing`]. Entries of the memory, the segment before and the choice among entries are constants to
//! gradients, also within a call. Carried: entries and the segment before, text by text. A call that goes on with a text has
//! whole segments, unless it is the last.

use std::ops::Range;

use foveal::cache::{ContiguousCache, KvKeys, KvRows, KvStore, KvValues, TILE, pieces};
use foveal::memory::MemorizingState;
use foveal::memory::memorizing::{Memorizing, MemorizingForward, Tokens};
use foveal::sparse::StateHeads;
use foveal::{Phase, Shape, Strides, TensorMut, TensorRef, nn};

use super::SectionPlace;
use super::infini::check_start;
use crate::Error;
use crate::config::Mechanism;
use crate::train::network::carried::SectionCarried;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Tools, range};

type State = MemorizingState<ContiguousCache<f32>>;

/// The heads of a section.
#[derive(Debug)]
pub(super) struct Remembered {
    layer: Memorizing,
    heads: StateHeads,
    gate: Range<usize>,
    scale: Range<usize>,
}

/// The states with which the texts of a call began, and what forward gave.
type Saved = Vec<(State, MemorizingForward<f32>)>;

/// Arrays and counts that a text carries: entries' keys and values, and the window's; where entries begin and end, tokens, and
/// those of the segment before.
const ARRAYS: usize = 4;

impl Remembered {
    pub(super) fn new(mechanism: &Mechanism, place: SectionPlace<'_>) -> Result<Remembered, Error> {
        let &Mechanism::Memorizing { segment, top, capacity, previous, .. } = mechanism else {
            return Err(Error::SectionState);
        };
        let dim = place.config.attention.head_dim;
        let SectionPlace { heads, kv_heads, .. } = place;
        Ok(Remembered {
            layer: Memorizing::new(segment, top, capacity)?.previous(previous),
            heads: StateHeads { heads, kv_heads, key_dim: dim, value_dim: dim },
            gate: range(place.ranges, &place.name("gate"))?,
            scale: range(place.ranges, &place.name("scale"))?,
        })
    }

    /// One text of a call.
    fn tokens<'a>(&self, call: &SectionCall<'a>, text: usize) -> Tokens<'a, f32> {
        let own = |x: TensorRef<'a, f32>| x.part(text..text + 1, 0..x.shape().heads);
        let (gate, scale) = (self.gate.clone(), self.scale.clone());
        let parameters = call.parameters;
        let (q, k, v) = (own(call.q), own(call.k), own(call.v));
        Tokens::new(q, k, v, &parameters[gate], &parameters[scale])
    }

    fn layer(&self, tools: &Tools<'_>) -> Memorizing {
        self.layer.clone().cpu(tools.cpu)
    }

    /// The state of a text: a new one, or as it was carried.
    fn load(
        &self,
        layer: &Memorizing,
        (text, tokens): (usize, usize),
        carried: Option<&SectionCarried>,
    ) -> Result<State, Error> {
        let StateHeads { kv_heads, key_dim, value_dim, .. } = self.heads;
        let new = |held: usize| {
            // Whole tiles are forgotten, and a segment comes before others go.
            let most = layer.capacity().min(held + tokens) + TILE + layer.segment();
            ContiguousCache::new(kv_heads, (key_dim, value_dim), most)
        };
        let Some(carried) = carried.filter(|carried| !carried.floats.is_empty()) else {
            return Ok(layer.state(self.heads, new(0)?)?);
        };
        let floats = carried.floats.get(ARRAYS * text..ARRAYS * (text + 1));
        let counts = carried.counts.get(ARRAYS * text..ARRAYS * (text + 1));
        let (Some([keys, values, window_keys, window_values]), Some(&[start, end, tokens, before])) =
            (floats, counts)
        else {
            return Err(Error::SectionState);
        };
        let count = |n: u64| usize::try_from(n).map_err(|_| Error::SectionState);
        let (start, end) = (count(start)?, count(end)?);
        let held = end.checked_sub(start).ok_or(Error::SectionState)?;
        let mut store: ContiguousCache<f32> = new(held)?;
        store.clear_to(start)?;
        let rows = |x: &'_ [f32], dim: usize| -> Result<(), Error> {
            if x.len() == held * kv_heads * dim { Ok(()) } else { Err(Error::SectionState) }
        };
        rows(keys, key_dim)?;
        rows(values, value_dim)?;
        let view = |x, dim| {
            let strides = Strides { batch: 0, seq: dim, heads: held * dim };
            TensorRef::from_strides(x, Shape { batch: 1, seq: held, heads: kv_heads, dim }, strides)
        };
        store.append(view(keys, key_dim)?, view(values, value_dim)?)?;
        let mut state = layer.resume(self.heads, store)?;
        state.restore(count(tokens)?, count(before)?, [window_keys, window_values])?;
        Ok(state)
    }
}

/// Adds a text's state to what is carried.
fn store(state: &State, carried: &mut SectionCarried) {
    let entries = state.store();
    let mut arrays = [vec![], vec![]];
    for head in 0..entries.kv_heads() {
        for piece in pieces(entries.start()..entries.end()) {
            let tile = entries.tile(head, piece);
            if let (KvKeys::Rows(KvRows::F32(keys)), KvValues::Rows(KvRows::F32(values))) =
                (tile.keys, tile.values)
            {
                (0..keys.count()).for_each(|n| arrays[0].extend_from_slice(keys.row(n)));
                (0..values.count()).for_each(|n| arrays[1].extend_from_slice(values.row(n)));
            }
        }
    }
    carried.floats.extend(arrays);
    carried.floats.extend(state.window().map(<[f32]>::to_vec));
    let counts = [entries.start(), entries.end(), state.tokens(), state.before()];
    carried.counts.extend(counts.map(|n| n as u64));
}

impl TrainedSection for Remembered {
    fn positions(&self) -> Positions {
        Positions::Plain
    }

    fn forward(
        &self,
        call: SectionCall<'_>,
        carried: Option<&mut SectionCarried>,
        mut out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error> {
        let layer = self.layer(tools);
        if carried.is_some() {
            check_start(call.start, layer.segment())?;
        }
        let (mut saved, mut later): (Saved, _) = (vec![], SectionCarried::default());
        for text in 0..call.q.shape().batch {
            let mut state = self.load(&layer, (text, call.q.shape().seq), carried.as_deref())?;
            let before = call.keep.then(|| state.clone());
            let forward = state.forward(&self.tokens(&call, text), Phase::Prompt)?;
            copy(forward.out.view(), &mut out, text);
            if carried.is_some() {
                store(&state, &mut later);
            }
            saved.extend(before.map(|before| (before, forward)));
        }
        if let Some(carried) = carried {
            *carried = later;
        }
        Ok(Box::new(saved))
    }

    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let SectionGradients { mut d_q, mut d_k, mut d_v, gradients: arena, .. } = gradients;
        let level = tools.cpu.level;
        for (text, (state, forward)) in taken::<Saved>(saved)?.into_iter().enumerate() {
            let heads = 0..self.heads.heads;
            let d_out = upstream.d_out.part(text..text + 1, heads);
            let d = state.backward(&self.tokens(&call, text), &forward, d_out)?;
            copy(d.d_q.view(), &mut d_q, text);
            copy(d.d_k.view(), &mut d_k, text);
            copy(d.d_v.view(), &mut d_v, text);
            nn::add(&mut arena[self.gate.clone()], &d.d_gate, level)?;
            nn::add(&mut arena[self.scale.clone()], &d.d_scale, level)?;
        }
        Ok(())
    }
}

/// Copies one text's rows to its place.
fn copy(from: TensorRef<'_, f32>, to: &mut TensorMut<'_, f32>, text: usize) {
    let Shape { seq, heads, .. } = from.shape();
    for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        to.row_mut(text, t, head).copy_from_slice(from.row(0, t, head));
    }
}
