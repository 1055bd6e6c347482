//! Gradients of attention, by computing probabilities again from the saved log-sum-exp.
//!
//! ```text
//! P = exp(scale · Q Kᵀ − lse)   D = rowsum(dO ∘ O) − dlse   dS = P ∘ (dO Vᵀ − D)
//! dQ = scale · dS K             dK = scale · dSᵀ Q          dV = Pᵀ dO
//!
//! for each (sequence, key/value head):
//!     for each stretch of 256 to 1024 keys:                K and V packed, and K as rows
//!         for each chunk of ≤ 288 rows of a query head:    a sum of its own for dK and dV
//!             for each 96 rows, for each tile of 256 keys:
//!                 for each group of 6 rows:                S, dP; P, dS; dQ += dS K
//!                 dV += Pᵀ dO, dK += dSᵀ Q
//!         dK, dV = the chunks' sums, added in order
//! ```
//!
//! Queries, keys and values of bf16 are multiplied in pairs where the processor can: P and dS are then rounded to bf16,
//! side by side for dQ, and two rows in a pair for dV and dK.
//!
//! Neither P nor dS is ever stored as a whole. Cuts lie at fixed positions of the sequence, and what
//! they cut is joined in order: the sums are the same whether one thread takes a key/value head from
//! beginning to end, or all threads share its chunks tile by tile. The first way has no barriers; the
//! second is taken where there are too few heads for the threads.
//!
//! Cost: 2·T·S·(3·Dk + 2·Dv) floating-point operations a query head for the visible part. Memory beyond
//! inputs and gradients: two numbers a row of the heads in flight; for each thread one stretch of keys,
//! a tile of P and of dS, and the sums of a stretch; for 16-bit queries an `f32` image of the dQ in flight.
//! Dao et al. 2022, algorithm 4; Dao 2023, algorithm 2.

mod careful;
mod layout;
mod relative;
mod terms;
mod tile;

use super::Factor;
use super::terms::{RowSite, Terms};
use crate::cache::{KvKeys, KvValues, kv_rows};
use crate::element::Element;
use crate::mask::{Mask, Pattern, Site};
use crate::parallel::for_each_part;
use crate::plan::Sizes;
use crate::simd::product::Form;
use crate::simd::row;
use crate::simd::tile::{PANEL, padded};
use crate::tensor::{SharedRows, TensorRef};
use layout::{Layout, Memory, shared};
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use tile::Work;

pub(crate) use layout::workspace_floats;
pub(crate) use terms::TermOutputs;

/// Keys whose sums one part joins.
const JOINED: usize = 16;
/// Rows between the one that is read and the one that is asked for.
const AHEAD: usize = 8;

/// A backward call whose shapes have been checked.
#[derive(Debug)]
pub(crate) struct BackwardProblem<'a, E, K> {
    pub(crate) q: TensorRef<'a, E>,
    pub(crate) k: TensorRef<'a, K>,
    pub(crate) v: TensorRef<'a, K>,
    pub(crate) out: TensorRef<'a, E>,
    pub(crate) lse: TensorRef<'a, f32>,
    pub(crate) d_out: TensorRef<'a, E>,
    pub(crate) d_lse: Option<TensorRef<'a, f32>>,
    pub(crate) d_q: SharedRows<'a, E>,
    pub(crate) d_k: SharedRows<'a, K>,
    pub(crate) d_v: SharedRows<'a, K>,
    pub(crate) terms_out: TermOutputs<'a>,
    pub(crate) mask: &'a Mask,
    pub(crate) terms: &'a Terms<'a>,
    pub(crate) scale: f32,
    pub(crate) sizes: Sizes,
}

/// Runs the call. `floats` is the workspace, of [`workspace_floats`].
pub(crate) fn run<E: Element, K: Element>(
    call: &mut BackwardProblem<'_, E, K>,
    floats: &mut [f32],
) {
    let layout = Layout::new(&call.sizes, call.terms, E::DTYPE);
    let (tallies, floats) = floats.split_at_mut(layout.tallies());
    let tallies_of = shared(tallies, [layout.units, layout.chunks, layout.tally]);
    let factor = Factor::new(call.scale);
    let form = call.terms.form(call.sizes.cpu.level, [E::DTYPE, K::DTYPE]);
    let engine = Engine { call, layout, factor, form, tallies: tallies_of };
    engine.clear_bias();
    engine.clear_relative_keys();
    // Either every thread has a head of its own, or all have one together.
    let each = floats.chunks_exact_mut(layout.floats()).take(layout.heads_at_once);
    for_each_part(layout.strands, each, |strand, floats| {
        for unit in layout.units_of(strand) {
            engine.head(unit, layout.split(floats));
        }
    });
    let (sizes, chunks) = ((call.sizes.q, call.sizes.kv_heads), (layout.chunks, layout.tally));
    terms::finish(call, tallies, sizes, chunks);
}

/// Neighbouring rows of one query head, whose sums for dK and dV are kept apart from the others'.
#[derive(Debug, Clone)]
struct Chunk {
    /// Its sequence and key/value head.
    unit: usize,
    /// Among the chunks of those.
    index: usize,
    site: Site,
    rows: Range<usize>,
}

/// Where dQ is added up: the gradient itself, or an image of the head's chunks in `f32`.
#[derive(Debug)]
struct Image<'a> {
    rows: SharedRows<'a, f32>,
    apart: bool,
}

impl Image<'_> {
    /// # Safety
    /// No other reference to this row is alive.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, chunk: &Chunk, i: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe {
            match self.apart {
                true => self.rows.row(0, chunk.index, i - chunk.rows.start),
                false => self.rows.row(chunk.site.batch, i, chunk.site.q_head),
            }
        }
    }
}

struct Engine<'a, E, K> {
    call: &'a BackwardProblem<'a, E, K>,
    layout: Layout,
    factor: Factor,
    /// How products are computed.
    form: Form,
    /// What each chunk adds up for the terms' gradients.
    tallies: SharedRows<'a, f32>,
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    fn chunk(&self, unit: usize, index: usize) -> Chunk {
        let sizes = &self.call.sizes;
        let (batch, kv_head) = (unit / sizes.kv_heads, unit % sizes.kv_heads);
        let q_head = kv_head * sizes.group() + index / self.layout.per_head;
        let first = index % self.layout.per_head * self.layout.rows;
        let rows = first..(first + self.layout.rows).min(sizes.q.seq);
        Chunk { unit, index, site: Site { batch, q_head, kv_head }, rows }
    }

    /// Absolute positions of query rows.
    fn positions(&self, rows: &Range<usize>) -> Range<isize> {
        let origin = self.call.sizes.keys as isize - self.call.sizes.q.seq as isize;
        rows.start as isize + origin..rows.end as isize + origin
    }

    fn row_site(&self, chunk: &Chunk, query: usize) -> RowSite {
        let Site { batch, q_head: head, .. } = chunk.site;
        RowSite { batch, head, query, position: self.positions(&(query..query + 1)).start }
    }

    /// Positions of a stretch of keys.
    fn keys(&self, stretch: usize) -> Range<usize> {
        let len = self.layout.stretch;
        stretch * len..((stretch + 1) * len).min(self.call.sizes.keys)
    }

    /// The gradients of one key/value head of one sequence and of its query heads.
    fn head(&self, unit: usize, memory: Memory<'_>) {
        let Memory { statistics, image, keys: floats, total, sums, scratch } = memory;
        let layout = &self.layout;
        let image = match self.call.d_q.as_f32() {
            Some(rows) => Image { rows, apart: false },
            None => {
                let shape = [layout.chunks, layout.rows, self.call.sizes.q.dim];
                Image { rows: shared(image, shape), apart: true }
            }
        };
        let finite = self.prepare(unit, &image, statistics, scratch);
        if !(finite && self.encoding_is_finite(unit)) {
            return careful::head(self, unit);
        }
        for n in 0..layout.stretches {
            let keys = self.keys(n);
            self.pack(unit, &keys, floats, scratch);
            let mut wave = Wave { next: 0, chunks: [0; layout::MOST_SLOTS], count: 0 };
            let mut first = true;
            while first || wave.next < layout.chunks {
                self.next_wave(unit, &keys, &mut wave);
                let stretch = layout.stretch(self.form, floats, keys.clone());
                let slots = shared(sums, [layout.slots, 1, layout.slot]);
                let scratches = scratch.chunks_exact_mut(layout.scratch);
                for_each_part(wave.count, scratches, |slot, scratch| {
                    let chunk = self.chunk(unit, wave.live()[slot]);
                    let statistics = &statistics[chunk.index * layout.statistics..];
                    // SAFETY: each part writes its own slot.
                    let sums = unsafe { slots.row(0, slot, 0) };
                    let work = Work { statistics, image: &image, scratch, sums };
                    self.accumulate(&chunk, &stretch, work);
                });
                let last = wave.next == layout.chunks;
                let step = Join { unit, keys: &keys, count: wave.count, first, last };
                self.join(&step, sums, total, scratch);
                self.join_bias(&step, &wave, sums);
                self.join_relative(&step, &wave, sums);
                first = false;
            }
        }
        if image.apart {
            self.round(unit, &image, scratch);
        }
    }

    /// D and the log-sum-exp of each row in base 2, zeros in dQ, and whether all inputs are finite.
    fn prepare(
        &self,
        unit: usize,
        image: &Image<'_>,
        statistics: &mut [f32],
        scratch: &mut [f32],
    ) -> bool {
        let layout = &self.layout;
        let finite = AtomicBool::new(true);
        let statistics = shared(statistics, [layout.chunks, 1, layout.statistics]);
        let scratches = scratch.chunks_exact_mut(layout.scratch);
        for_each_part(layout.chunks + layout.stretches, scratches, |part, _| {
            let fine = match part.checked_sub(layout.chunks) {
                Some(n) => self.keys_are_finite(unit, self.keys(n)),
                None => {
                    // SAFETY: each part writes the statistics of its own chunk.
                    let statistics = unsafe { statistics.row(0, part, 0) };
                    self.prepare_chunk(&self.chunk(unit, part), image, statistics)
                }
            };
            if !fine {
                finite.store(false, Ordering::Relaxed);
            }
        });
        finite.into_inner()
    }

    fn keys_are_finite(&self, unit: usize, keys: Range<usize>) -> bool {
        let BackwardProblem { k, v, sizes, .. } = self.call;
        let (batch, head) = (unit / sizes.kv_heads, unit % sizes.kv_heads);
        let (k, v, level) = (k.head(batch, head), v.head(batch, head), sizes.cpu.level);
        let end = keys.end;
        keys.fold(true, |fine, j| {
            if j + AHEAD < end {
                row::prefetch(level, k.row(j + AHEAD));
                row::prefetch(level, v.row(j + AHEAD));
            }
            fine & row::all_finite(level, k.row(j)) & row::all_finite(level, v.row(j))
        })
    }

    fn prepare_chunk(&self, chunk: &Chunk, image: &Image<'_>, statistics: &mut [f32]) -> bool {
        let BackwardProblem { q, out, lse, d_out, d_lse, terms, sizes, .. } = self.call;
        let level = sizes.cpu.level;
        let Site { batch, q_head, .. } = chunk.site;
        let (logs, deltas) = statistics.split_at_mut(self.layout.rows);
        let sink = terms.sinks.map(|sinks| sinks[q_head]);
        let (mut finite, mut d_sink) = (true, 0.0);
        for (r, i) in chunk.rows.clone().enumerate() {
            if i + AHEAD < chunk.rows.end {
                row::prefetch(level, q.row(batch, i + AHEAD, q_head));
                row::prefetch(level, out.row(batch, i + AHEAD, q_head));
                row::prefetch(level, d_out.row(batch, i + AHEAD, q_head));
            }
            let lse = lse.row(batch, i, q_head)[0];
            let product = row::dot(level, out.row(batch, i, q_head), d_out.row(batch, i, q_head));
            let d_lse = d_lse.map_or(0.0, |d_lse| d_lse.row(batch, i, q_head)[0]);
            // A row that sees nothing has P = 0 = exp2(s − ∞).
            logs[r] = if lse == f32::NEG_INFINITY { f32::INFINITY } else { lse * LOG2_E };
            deltas[r] = product - d_lse;
            if let Some(sink) = sink.filter(|_| lse != f32::NEG_INFINITY) {
                d_sink -= f64::from(sink - lse).exp() * f64::from(deltas[r]);
            }
            finite &= lse < f32::INFINITY && deltas[r].is_finite();
            finite &= row::all_finite(level, q.row(batch, i, q_head));
            // SAFETY: rows belong to one chunk, and each chunk to one part.
            unsafe { image.row(chunk, i) }.fill(0.0);
        }
        // SAFETY: each chunk belongs to one part.
        let tally = unsafe { self.tallies.row(0, chunk.unit, chunk.index) };
        tally.fill(0.0);
        if sink.is_some() {
            tally[terms::SINK] = d_sink as f32;
        }
        finite
    }

    /// Packs a stretch of keys and values into panels, and copies its keys as rows.
    fn pack(&self, unit: usize, keys: &Range<usize>, floats: &mut [f32], scratch: &mut [f32]) {
        let BackwardProblem { k, v, sizes, .. } = self.call;
        let (batch, head) = (unit / sizes.kv_heads, unit % sizes.kv_heads);
        let (k, v, form) = (k.head(batch, head), v.head(batch, head), self.form);
        let panels = self.layout.panels(form, floats);
        let scratches = scratch.chunks_exact_mut(self.layout.scratch);
        for_each_part(keys.len().div_ceil(PANEL), scratches, |panel, _| {
            let start = keys.start + panel * PANEL;
            let own = start..(start + PANEL).min(keys.end);
            // SAFETY: each part writes its own panel.
            let [packed_k, packed_v, rows] =
                panels.each_ref().map(|x| unsafe { x.row(0, panel, 0) });
            let (k, v) = (kv_rows(k.slice(own.clone())), kv_rows(v.slice(own)));
            form.pack_keys(KvKeys::Rows(k), packed_k);
            form.pack_keys(KvKeys::Rows(v), packed_v);
            form.pack_values(KvValues::Rows(k), rows);
        });
    }

    /// The next chunks with a row that may see one of the keys.
    fn next_wave(&self, unit: usize, keys: &Range<usize>, wave: &mut Wave) {
        wave.count = 0;
        while wave.next < self.layout.chunks {
            let Chunk { index, site, rows, .. } = self.chunk(unit, wave.next);
            let mut seen = false;
            let positions = self.positions(&rows);
            self.call.mask.live(site, positions, keys.clone(), &mut |_, _| seen = true);
            if seen {
                if wave.count == self.layout.slots {
                    return;
                }
                wave.chunks[wave.count] = index;
                wave.count += 1;
            }
            wave.next += 1;
        }
    }

    /// Adds the wave's sums to the total of the stretch, and after the last wave writes dK and dV.
    fn join(&self, step: &Join<'_>, sums: &[f32], total: &mut [f32], scratch: &mut [f32]) {
        let BackwardProblem { d_k, d_v, sizes, .. } = self.call;
        let (batch, head) = (step.unit / sizes.kv_heads, step.unit % sizes.kv_heads);
        let (level, width) = (sizes.cpu.level, self.layout.width);
        let block = JOINED * width;
        let totals = shared(total, [self.layout.stretch / JOINED, 1, block]);
        let scratches = scratch.chunks_exact_mut(self.layout.scratch);
        for_each_part(step.keys.len().div_ceil(JOINED), scratches, |part, _| {
            // SAFETY: each part writes its own keys.
            let total = unsafe { totals.row(0, part, 0) };
            let used = (step.keys.len() - part * JOINED).min(JOINED);
            let total = &mut total[..used * width];
            if step.first {
                total.fill(0.0);
            }
            for sums in sums.chunks_exact(self.layout.slot).take(step.count) {
                row::blend(level, total, 1.0, &sums[part * block..][..used * width], 1.0);
            }
            if step.last {
                let first = step.keys.start + part * JOINED;
                for (j, sum) in (first..).zip(total.chunks_exact(width)) {
                    let (key, value) = sum.split_at(padded(sizes.q.dim));
                    // SAFETY: as above.
                    let (d_k, d_v) = unsafe { (d_k.row(batch, j, head), d_v.row(batch, j, head)) };
                    // Queries were turned around where the scale is negative.
                    row::scale_into(level, key, self.call.scale.abs(), d_k);
                    row::scale_into(level, value, 1.0, d_v);
                }
            }
        });
    }

    /// Writes dQ from its image.
    fn round(&self, unit: usize, image: &Image<'_>, scratch: &mut [f32]) {
        let scratches = scratch.chunks_exact_mut(self.layout.scratch);
        for_each_part(self.layout.chunks, scratches, |index, _| {
            let chunk = self.chunk(unit, index);
            for i in chunk.rows.clone() {
                // SAFETY: rows belong to one chunk, and each chunk to one part.
                let (from, to) = unsafe {
                    (
                        image.row(&chunk, i),
                        self.call.d_q.row(chunk.site.batch, i, chunk.site.q_head),
                    )
                };
                row::scale_into(self.call.sizes.cpu.level, from, 1.0, to);
            }
        });
    }
}

/// Chunks whose sums are in memory at the same time.
struct Wave {
    /// The chunk after them.
    next: usize,
    chunks: [usize; layout::MOST_SLOTS],
    count: usize,
}

impl Wave {
    fn live(&self) -> &[usize] {
        &self.chunks[..self.count]
    }
}

/// What is joined: the sums of `count` chunks for some keys.
struct Join<'a> {
    unit: usize,
    keys: &'a Range<usize>,
    count: usize,
    first: bool,
    last: bool,
}
