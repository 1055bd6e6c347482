//! One document's memory, and the tokens of the segment that is not whole yet.
//!
//! ```text
//! window   [ the segment before, if it is seen | the open segment ]      k̂ and v in f32, head by head
//! memory   k̂ and v of whole segments, the newest `capacity` tokens       in any store
//! ```
//!
//! Tokens are read against the memory as it was when their segment began, so that a text gives the same bits however it is
//! cut into calls. The N-th token of a segment writes it.

use super::super::{Gate, MemoryStore};
use super::index::Lists;
use super::probe::search_lists;
use super::retrieve::Entries;
use super::search::{NONE, search};
use super::{Memorizing, MemorizingForward, Normal, Selected, Tokens};
use crate::cache::{ContiguousCache, TILE};
use crate::cpu::{Cpu, MAX_GENERATED_ROWS, Phase};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::plan::Inputs;
use crate::sparse::StateHeads;
use crate::tensor::{Shape, Spans, Strides, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

/// What a document leaves to its later tokens.
#[derive(Debug)]
pub struct MemorizingState<M> {
    pub(super) memorizing: Memorizing,
    pub(super) shape: StateHeads,
    pub(super) store: M,
    /// Where retrieval is approximate.
    lists: Option<Lists>,
    /// `[kv head][window]`.
    pub(super) keys: Vec<f32>,
    values: Vec<f32>,
    /// Tokens of the segment before that are held.
    pub(super) before: usize,
    open: usize,
    tokens: usize,
    pub(super) workspace: Workspace,
}

impl<M: Clone> Clone for MemorizingState<M> {
    fn clone(&self) -> Self {
        MemorizingState {
            memorizing: self.memorizing.clone(),
            store: self.store.clone(),
            lists: self.lists.clone(),
            keys: self.keys.clone(),
            values: self.values.clone(),
            workspace: Workspace::new(),
            ..*self
        }
    }
}

impl Memorizing {
    /// A store in memory with room for the tokens that are remembered and the segment that comes next. Allocates it.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space.
    pub fn store<E: Element>(&self, shape: StateHeads) -> Result<ContiguousCache<E>> {
        let StateHeads { kv_heads, key_dim, value_dim, .. } = shape;
        // Whole tiles are forgotten: up to 255 tokens more than are remembered stay.
        let room = self.capacity.saturating_add(TILE - 1).saturating_add(self.segment);
        ContiguousCache::new(kv_heads, (key_dim, value_dim), room)
    }

    /// The state of a document that has not begun, with an empty store. Allocates the window.
    ///
    /// # Errors
    /// Those of [`crate::Attention::plan`]; [`Error::InvalidParameter`] for a store that holds tokens, or codes without the
    /// keys that they stand for; [`Error::ShapeMismatch`] for one of other heads or dims; [`Error::ShapeOverflow`] if a window
    /// is more than the address space.
    pub fn state<M: MemoryStore>(&self, shape: StateHeads, store: M) -> Result<MemorizingState<M>> {
        if store.end() != 0 {
            let (what, expected) = ("store of a new memory", "an empty one");
            let got = format!("{} tokens", store.end());
            return Err(Error::InvalidParameter { what, expected, got });
        }
        self.resume(shape, store)
    }

    /// The state of a document of which a store holds what is remembered, as one that was found on disk: its next token begins a
    /// segment, which sees none before it but by retrieval.
    ///
    /// # Errors
    /// Those of [`Memorizing::state`], but for tokens that the store holds.
    pub fn resume<M: MemoryStore>(
        &self,
        shape: StateHeads,
        store: M,
    ) -> Result<MemorizingState<M>> {
        let StateHeads { heads, kv_heads, key_dim, value_dim } = shape;
        let q = Shape { batch: 1, seq: 1, heads, dim: key_dim };
        let k = Shape { heads: kv_heads, ..q };
        self.attention()?.plan(q, k, Shape { dim: value_dim, ..k })?;
        let (dim, values) = store.dims();
        let row = |heads, key, value| Shape { batch: 1, seq: 1, heads, dim: key + value };
        let got = row(store.kv_heads(), dim, values);
        if (dim, values, store.kv_heads()) != (key_dim, value_dim, kv_heads) {
            let (what, expected) =
                ("keys and values of a memory's store", row(kv_heads, key_dim, value_dim));
            return Err(Error::ShapeMismatch { what, expected, got });
        }
        if store.exact().coded() {
            let (what, expected) = ("store of a memory", "one of rows, or of codes and their keys");
            return Err(Error::InvalidParameter { what, expected, got: "codes alone".to_owned() });
        }
        let tokens = store.end();
        let window = |dim| -> Result<Vec<f32>> {
            let of = Shape { batch: 1, seq: self.window(), heads: kv_heads, dim };
            Ok(Tensor::zeros(of)?.into_vec())
        };
        let lists = self.index.map(|index| Lists::new(index, kv_heads, key_dim)).transpose()?;
        Ok(MemorizingState {
            memorizing: self.clone(),
            shape,
            store,
            lists,
            keys: window(key_dim)?,
            values: window(value_dim)?,
            before: 0,
            open: 0,
            tokens,
            workspace: Workspace::new(),
        })
    }
}

impl<M: MemoryStore> MemorizingState<M> {
    /// Bytes of the memory, of its index, and of the window that is allocated from the beginning.
    pub fn bytes(&self) -> usize {
        let (key_dim, value_dim) = self.store.dims();
        let entries = (self.store.end() - self.store.start()) * self.store.kv_heads();
        let window = size_of::<f32>() * (self.keys.len() + self.values.len());
        let rows = entries * (key_dim + value_dim) * self.store.dtype().size();
        let lists = self.lists.as_ref().map_or(0, |lists| lists.bytes(self.remembered()));
        window + lists + self.store.held_bytes().unwrap_or(rows)
    }

    /// Tokens of the document that were seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of the segment that is not whole yet.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Tokens that later ones can retrieve.
    pub fn remembered(&self) -> usize {
        self.range().len()
    }

    /// What it is a state of.
    pub fn memorizing(&self) -> &Memorizing {
        &self.memorizing
    }

    /// Whose heads.
    pub fn heads(&self) -> StateHeads {
        self.shape
    }

    /// What keeps the entries.
    pub fn store(&self) -> &M {
        &self.store
    }

    /// Tokens of the segment before the open one that local attention sees.
    pub fn before(&self) -> usize {
        self.before
    }

    /// What local attention sees, `[kv head][token][dim]` with room for all that it may see: k̂ and v, of the segment before
    /// first. With the store and the numbers of tokens it is the state.
    pub fn window(&self) -> [&[f32]; 2] {
        [&self.keys, &self.values]
    }

    /// Takes up what another state of the same description held after so many tokens, whose store this one has already
    /// ([`Memorizing::resume`]): its [`MemorizingState::before`] and its [`MemorizingState::window`].
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for slices of other lengths; [`Error::OutOfRange`] for tokens that the store and one segment
    /// can't be. The state is unchanged then.
    pub fn restore(
        &mut self,
        tokens: usize,
        before: usize,
        [keys, values]: [&[f32]; 2],
    ) -> Result<()> {
        for (own, new) in [(&self.keys, keys), (&self.values, values)] {
            if own.len() != new.len() {
                let (what, expected, got) = ("numbers of a window", own.len(), new.len());
                return Err(Error::LengthMismatch { what, expected, got });
            }
        }
        let segment = self.memorizing.segment;
        let open = tokens.checked_sub(self.store.end()).filter(|&open| open < segment);
        let Some(open) = open else {
            let what = "the token of a document whose earlier ones are remembered";
            return Err(Error::OutOfRange { what, got: tokens, limit: self.store.end() + segment });
        };
        if before != 0 && before != segment || before + segment > self.memorizing.window() {
            let what = "tokens seen of the segment before";
            let limit = self.memorizing.window() - segment;
            return Err(Error::OutOfRange { what, got: before, limit });
        }
        self.keys.copy_from_slice(keys);
        self.values.copy_from_slice(values);
        (self.tokens, self.open, self.before) = (tokens, open, before);
        Ok(())
    }

    /// What an [`Index`](super::Index) is besides the store: after how many tokens its centroids were made, and the
    /// centroids, `[kv head][list][dim]`; none while all entries are searched. `None` without an index.
    pub fn centroids(&self) -> Option<(usize, &[f32])> {
        self.lists.as_ref().map(Lists::made)
    }

    /// Takes up the [`MemorizingState::centroids`] of another state of the same description, whose store this one has already,
    /// if there are any. Entries find their lists again when the next token is read.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for other numbers than those of the lists; [`Error::OutOfRange`] for centroids that were made
    /// after the newest token. The state is unchanged then.
    pub fn restore_centroids(&mut self, made_at: usize, centroids: &[f32]) -> Result<()> {
        let limit = self.store.end() + 1;
        if made_at == 0 || made_at >= limit {
            let what = "the token after which centroids were made";
            return Err(Error::OutOfRange { what, got: made_at, limit });
        }
        match &mut self.lists {
            Some(lists) => lists.restore(made_at, centroids),
            None => {
                let (what, got) = ("numbers of an index's centroids", centroids.len());
                Err(Error::LengthMismatch { what, expected: 0, got })
            }
        }
    }

    /// What keeps the entries, alone.
    pub fn into_store(self) -> M {
        self.store
    }

    /// Forgets everything, as at the end of a document, and keeps the memory that it takes.
    pub fn clear(&mut self) {
        self.store.clear();
        self.lists.iter_mut().for_each(Lists::clear);
        (self.before, self.open, self.tokens) = (0, 0, 0);
    }

    /// The positions that are searched.
    pub(super) fn range(&self) -> Range<usize> {
        let end = self.store.end();
        end.saturating_sub(self.memorizing.capacity).max(self.store.start())..end
    }

    /// The outputs of tokens that follow on those seen, and what backward needs. Allocates them, what is gathered, and the
    /// workspace once.
    ///
    /// Tokens of a prompt give the same bits in one call or many. So do generated ones, however many share a call, of at most 64.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::LengthMismatch`], [`Error::TooManyRows`]; [`Error::OutOfRange`] for documents of
    /// 2³² − 1 tokens or more. The state is unchanged then. Errors of a store that has no room for a segment, after which
    /// the state is to be cleared.
    pub fn forward<E: Element>(
        &mut self,
        tokens: &Tokens<'_, E>,
        phase: Phase,
    ) -> Result<MemorizingForward<E>> {
        self.check(tokens, phase)?;
        let StateHeads { heads, value_dim, .. } = self.shape;
        let seq = tokens.q.shape().seq;
        let shape = Shape { batch: 1, seq, heads, dim: value_dim };
        let top = self.memorizing.top;
        let mut forward = MemorizingForward {
            out: Tensor::zeros(shape)?,
            local: Tensor::zeros(shape)?,
            local_lse: Tensor::zeros(shape.per_row())?,
            memory: Tensor::zeros(shape)?,
            memory_lse: Tensor::zeros(shape.per_row())?,
            selected: Selected { heads, top, data: Vec::new() },
        };
        let mut done = 0;
        while done < seq {
            let own = done..seq.min(done + (self.memorizing.segment - self.open));
            self.piece(&tokens.span(own.clone()), &mut forward, own.clone(), phase)?;
            done = own.end;
        }
        let gates: Vec<Gate> = tokens.gate.iter().map(|&beta| Gate::new(beta)).collect();
        let cpu = self.memorizing.machine()?;
        mix(cpu, &gates, (forward.memory.view(), forward.local.view()), forward.out.view_mut());
        Ok(forward)
    }

    fn check<E: Element>(&self, tokens: &Tokens<'_, E>, phase: Phase) -> Result<()> {
        self.memorizing.check(self.shape, tokens)?;
        let got = tokens.q.shape().seq;
        if phase == Phase::Generated && got > MAX_GENERATED_ROWS {
            return Err(Error::TooManyRows { got, limit: MAX_GENERATED_ROWS });
        }
        let (end, limit) = (self.tokens.saturating_add(got), NONE as usize);
        if end >= limit {
            return Err(Error::OutOfRange { what: "the token of a document", got: end, limit });
        }
        Ok(())
    }

    /// Tokens of one segment: the tokens `own` of a call.
    fn piece<E: Element>(
        &mut self,
        tokens: &Tokens<'_, E>,
        forward: &mut MemorizingForward<E>,
        own: Range<usize>,
        phase: Phase,
    ) -> Result<()> {
        let cpu = self.memorizing.machine()?;
        let (range, capacity) = (self.range(), self.memorizing.capacity);
        if let Some(lists) = &mut self.lists {
            lists.catch_up(&self.store, (&range, capacity), cpu)?;
        }
        let normal = Normal::of(cpu.level, tokens)?;
        self.hold(&normal);
        let bias = self.bias(tokens)?;
        let MemorizingForward { local, local_lse, memory, memory_lse, selected, .. } = forward;
        let span = |x| TensorMut::into_span(x, own.clone());
        let mut workspace = std::mem::take(&mut self.workspace);
        let (k, v) = self.near()?;
        let mut attention = self.memorizing.near()?;
        if let Some(bias) = &bias {
            attention = attention.bias(bias.view());
        }
        let q = normal.scaled.view();
        let plan = match phase {
            Phase::Prompt => attention.plan(q.shape(), k.shape(), v.shape())?,
            Phase::Generated => attention.plan_decode(q.shape(), k.shape(), v.shape())?,
        };
        workspace.reserve(plan.workspace_bytes());
        let results = (span(local.view_mut()), Some(span(local_lse.view_mut())));
        plan.forward(Inputs { q, k, v }, results.0, results.1, &mut workspace)?;
        let chosen = self.select(normal.q.view(), (phase, cpu));
        selected.extend(&chosen);
        let results = (span(memory.view_mut()), span(memory_lse.view_mut()));
        self.retrieve(&chosen, q, results, &mut workspace)?;
        self.workspace = workspace;
        self.close()
    }

    /// The entries that queries select, `[head][token][top]`.
    fn select(&self, q: TensorRef<'_, f32>, (phase, cpu): (Phase, Cpu)) -> Vec<u32> {
        let Shape { seq, heads, .. } = q.shape();
        let (top, range) = (self.memorizing.top, self.range());
        // More than there are would only be searched in vain.
        let most = top.min(range.len());
        let mut best = vec![NONE; heads * seq * most];
        let at: (&dyn MemoryStore, _) = (&self.store, range);
        match self.lists.as_ref().filter(|lists| lists.ready()) {
            Some(lists) => search_lists(lists, at, q, (most, cpu, phase), &mut best),
            None => search(at, q, (most, cpu, phase), &mut best),
        }
        if most == top {
            return best;
        }
        let mut selected = vec![NONE; heads * seq * top];
        if most > 0 {
            for (to, from) in selected.chunks_exact_mut(top).zip(best.chunks_exact(most)) {
                to[..most].copy_from_slice(from);
            }
        }
        selected
    }

    /// Attention to what was selected; zeros and −∞ while there is nothing.
    fn retrieve(
        &self,
        selected: &[u32],
        q: TensorRef<'_, f32>,
        (out, mut lse): (TensorMut<'_, f32>, TensorMut<'_, f32>),
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Shape { seq, heads, .. } = q.shape();
        match self.entries(selected)? {
            Some(entries) => {
                entries.attend(&self.memorizing.attention()?, q, (out, lse), workspace)
            }
            None => {
                for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                    lse.row_mut(0, t, head)[0] = f32::NEG_INFINITY;
                }
                Ok(())
            }
        }
    }

    /// What was selected, unless there is nothing to select.
    pub(super) fn entries<'a>(&'a self, selected: &'a [u32]) -> Result<Option<Entries<'a>>> {
        let (top, cpu) = (self.memorizing.top, self.memorizing.machine()?);
        let most = top.min(self.range().len());
        let entries = Entries { store: &self.store, selected, top, most, cpu };
        Ok((most > 0).then_some(entries))
    }

    /// Takes tokens into the window.
    pub(super) fn hold(&mut self, normal: &Normal) {
        let (window, first) = (self.memorizing.window(), self.before + self.open);
        for (from, to) in [(&normal.k, &mut self.keys), (&normal.v, &mut self.values)] {
            let Shape { seq, heads, dim, .. } = from.shape();
            for head in 0..heads {
                let rows = to[(head * window + first) * dim..][..seq * dim].chunks_exact_mut(dim);
                rows.enumerate().for_each(|(t, row)| {
                    row.copy_from_slice(from.view().row(0, t, head));
                });
            }
        }
        self.open += normal.k.shape().seq;
        self.tokens += normal.k.shape().seq;
    }

    /// The keys and values that local attention sees.
    pub(super) fn near(&self) -> Result<(TensorRef<'_, f32>, TensorRef<'_, f32>)> {
        self.rows(0..self.before + self.open)
    }

    /// Some rows of the window.
    fn rows(&self, rows: Range<usize>) -> Result<(TensorRef<'_, f32>, TensorRef<'_, f32>)> {
        let StateHeads { kv_heads, key_dim, value_dim, .. } = self.shape;
        let window = self.memorizing.window();
        let k = held(&self.keys, [kv_heads, window, key_dim], rows.clone())?;
        Ok((k, held(&self.values, [kv_heads, window, value_dim], rows)?))
    }

    /// |s| times the bias of the newest tokens of the open segment, for the keys of the window.
    pub(super) fn bias<E: Element>(&self, tokens: &Tokens<'_, E>) -> Result<Option<Tensor<f32>>> {
        let Some(bias) = tokens.bias else { return Ok(None) };
        let Shape { seq, heads, .. } = tokens.q.shape();
        let first = self.first_column();
        let keys = self.before + self.open;
        let mut scaled = Tensor::zeros(Shape { batch: 1, seq, heads, dim: keys })?;
        let mut rows = scaled.view_mut();
        for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
            let scale = tokens.scale[head].abs();
            let from = &bias.row(0, self.open - seq + t, head)[first..first + keys];
            let to = rows.row_mut(0, t, head).iter_mut();
            to.zip(from).for_each(|(to, from)| *to = scale * from);
        }
        Ok(Some(scaled))
    }

    /// The column of a bias that the first key of the window has.
    pub(super) fn first_column(&self) -> usize {
        self.memorizing.window() - self.memorizing.segment - self.before
    }

    /// Writes the open segment if it is whole.
    pub(super) fn close(&mut self) -> Result<()> {
        let Memorizing { segment, capacity, previous, .. } = self.memorizing;
        if self.open < segment {
            return Ok(());
        }
        // What the next segment cannot retrieve makes room for this one.
        let end = self.store.end() + segment;
        self.store.forget(end.saturating_sub(capacity).min(self.store.end()));
        let (before, all) = (self.before, self.before + self.open);
        let StateHeads { kv_heads: heads, key_dim, value_dim, .. } = self.shape;
        let window = self.memorizing.window();
        let k = held(&self.keys, [heads, window, key_dim], before..all)?;
        let v = held(&self.values, [heads, window, value_dim], before..all)?;
        self.store.append(k, v)?;
        if previous {
            for (data, dim) in [(&mut self.keys, key_dim), (&mut self.values, value_dim)] {
                for head in 0..heads {
                    let at = head * window;
                    data.copy_within((at + before) * dim..(at + all) * dim, at * dim);
                }
            }
            self.before = segment;
        }
        self.open = 0;
        Ok(())
    }
}

/// Rows of `[heads, window, dim]`.
fn held(
    data: &[f32],
    [heads, window, dim]: [usize; 3],
    rows: Range<usize>,
) -> Result<TensorRef<'_, f32>> {
    let shape = Shape { batch: 1, seq: rows.len(), heads, dim };
    let strides = Strides { batch: 0, seq: dim, heads: window * dim };
    TensorRef::from_strides(&data[rows.start * dim..], shape, strides)
}

/// out = g · memory + (1 − g) · local, rounded once.
fn mix<E: Element>(
    cpu: Cpu,
    gates: &[Gate],
    (memory, local): (TensorRef<'_, f32>, TensorRef<'_, f32>),
    out: TensorMut<'_, E>,
) {
    let Shape { seq, heads, .. } = out.shape();
    if out.shape().checked_len() == Some(0) {
        return;
    }
    let spans = Spans::new(1, seq, None).expect("no cuts");
    let threads = std::iter::repeat_n((), cpu.threads.count());
    for_each_item(out.into_patches(spans, 1).enumerate(), threads, |(head, mut out), ()| {
        let gate = gates[head % heads];
        for t in 0..seq {
            let from = memory.row(0, t, head).iter().zip(local.row(0, t, head));
            for (out, (memory, local)) in out.row(t, 0).iter_mut().zip(from) {
                *out = E::from_f32(gate.memory * memory + gate.local * local);
            }
        }
    });
}
