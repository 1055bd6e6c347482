//! What the terms of a call get: gradients of a dense bias, of slopes, of a table of buckets and of sinks, and what a
//! [relative encoding](super::relative) adds up.
//!
//! ```text
//! dbias = dS, summed over the axes that the bias shares     dtable[b, h] = Σ dS_ij where bucket(i − j) = b
//! dslope_h = −Σ dS_ij |i − j|                               dsink_h = −Σ_i e^(sink_h − lse_i) D_i
//! ```
//!
//! Numbers of a head are added up chunk by chunk, and chunks in the order of sequences and rows.

use super::relative::places;
use super::tile::KeyTile;
use super::{BackwardProblem, Chunk, Engine, Join, Wave};
use crate::element::Element;
use crate::exact::terms::Terms;
use crate::parallel::for_each_part;
use crate::simd::{Level, gradient, row};
use crate::tensor::{Shape, SharedRows};

/// Where the gradients of terms are written, if they are asked for.
#[derive(Debug, Default)]
pub(crate) struct TermOutputs<'a> {
    /// Shaped as the bias.
    pub(crate) bias: Option<SharedRows<'a, f32>>,
    /// One a query head.
    pub(crate) slopes: Option<&'a mut [f32]>,
    /// `[buckets, heads]`.
    pub(crate) table: Option<&'a mut [f32]>,
    /// One a query head.
    pub(crate) sinks: Option<&'a mut [f32]>,
    /// `[1, distances, heads, dim]`.
    pub(crate) relative_keys: Option<SharedRows<'a, f32>>,
    /// `[heads, dim]`.
    pub(crate) content_bias: Option<&'a mut [f32]>,
    /// `[heads, dim]`.
    pub(crate) position_bias: Option<&'a mut [f32]>,
}

/// Places in a chunk's numbers.
pub(super) const SINK: usize = 0;
pub(super) const SLOPE: usize = 1;
pub(super) const TABLE: usize = 2;

/// Numbers that each chunk adds up.
pub(super) fn tally(terms: &Terms<'_>) -> usize {
    let (end, dim) = places(terms);
    let any = end > TABLE || dim > 0 || terms.alibi.is_some() || terms.sinks.is_some();
    if any { (end + 2 * dim).next_multiple_of(16) } else { 0 }
}

/// How a bias with gradients lies to the rows of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Each row has numbers of its own, or there is no bias.
    Nothing,
    /// Rows of one key/value head of one sequence share numbers, and no others.
    Within,
    /// Key/value heads or sequences share numbers.
    Across,
}

impl Sharing {
    pub(super) fn new(terms: &Terms<'_>, q: Shape, kv_heads: usize) -> Sharing {
        let Some(bias) = terms.bias.map(|bias| bias.shape()) else { return Sharing::Nothing };
        let shares = |own: usize, call: usize| own == 1 && call > 1;
        if shares(bias.batch, q.batch) || shares(bias.heads, q.heads) && kv_heads > 1 {
            Sharing::Across
        } else if shares(bias.heads, q.heads) || shares(bias.seq, q.seq) {
            Sharing::Within
        } else {
            Sharing::Nothing
        }
    }
}

/// The row of a bias that a query row gets, as indices of its tensor.
fn bias_row(bias: Shape, chunk: &Chunk, i: usize) -> (usize, usize, usize) {
    let own = |index, extent| if extent == 1 { 0 } else { index };
    let site = chunk.site;
    (own(site.batch, bias.batch), own(i, bias.seq), own(site.q_head, bias.heads))
}

/// dS of one row.
pub(super) struct RowGradient<'a> {
    pub(super) i: usize,
    /// Of the query.
    pub(super) position: isize,
    pub(super) values: &'a [f32],
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// Fills the gradient of the bias with zeros.
    pub(super) fn clear_bias(&self) {
        let Some(bias) = &self.call.terms_out.bias else { return };
        let Shape { batch, seq, heads, .. } = bias.shape();
        let threads = (0..self.call.sizes.cpu.threads.count()).map(|_| ());
        for_each_part(batch * seq, threads, |part, ()| {
            for head in 0..heads {
                // SAFETY: each part has its own rows.
                unsafe { bias.row(part / seq, part % seq, head) }.fill(0.0);
            }
        });
    }

    /// Adds one row's dS to the gradients of slopes, table and bias.
    pub(super) fn add_terms(
        &self,
        chunk: &Chunk,
        keys: &KeyTile<'_>,
        row_gradient: &RowGradient<'_>,
        bias_sums: &mut [f32],
    ) {
        let RowGradient { i, position, values } = *row_gradient;
        let (terms, level) = (self.call.terms, self.call.sizes.cpu.level);
        if terms.alibi.is_some() || terms.relative.is_some() {
            // SAFETY: each chunk belongs to one part.
            let tally = unsafe { self.tallies.row(0, chunk.unit, chunk.index) };
            let first = position - keys.positions.start as isize;
            tally_row(level, terms, (first, values), tally);
        }
        let Some(bias) = &self.call.terms_out.bias else { return };
        if bias_sums.is_empty() {
            let (batch, seq, head) = bias_row(bias.shape(), chunk, i);
            // SAFETY: nothing is shared, so that the row belongs to this query alone.
            let out = unsafe { bias.row(batch, seq, head) };
            out[keys.positions.clone()].copy_from_slice(values);
        } else {
            let r = if bias.shape().seq == 1 { 0 } else { i - chunk.rows.start };
            let sums = &mut bias_sums[r * self.layout.stretch + keys.first..][..values.len()];
            row::blend(level, sums, 1.0, values, 1.0);
        }
    }

    /// Adds the wave's sums to the gradient of a bias, chunk by chunk.
    pub(super) fn join_bias(&self, step: &Join<'_>, wave: &Wave, sums: &[f32]) {
        let Some(bias) = self.call.terms_out.bias.as_ref().filter(|_| self.layout.bias_sums > 0)
        else {
            return;
        };
        for (&index, sums) in wave.live().iter().zip(sums.chunks_exact(self.layout.slot)) {
            let chunk = self.chunk(step.unit, index);
            let rows = if bias.shape().seq == 1 { 1 } else { chunk.rows.len() };
            let sums = sums[self.layout.sums..].chunks_exact(self.layout.stretch);
            for (i, sum) in (chunk.rows.start..chunk.rows.start + rows).zip(sums) {
                let (batch, seq, head) = bias_row(bias.shape(), &chunk, i);
                // SAFETY: one thread at a time joins: the workspace is cut so that units which
                // share rows of the bias come one after the other.
                let out = unsafe { bias.row(batch, seq, head) };
                let level = self.call.sizes.cpu.level;
                row::blend(level, &mut out[step.keys.clone()], 1.0, &sum[..step.keys.len()], 1.0);
            }
        }
    }

    /// Adds one number of dS to the gradient of the bias.
    ///
    /// # Safety
    /// No other thread computes rows that share numbers with this one.
    pub(super) unsafe fn add_bias(&self, chunk: &Chunk, (i, j): (usize, usize), d_score: f32) {
        if let Some(bias) = &self.call.terms_out.bias {
            let (batch, seq, head) = bias_row(bias.shape(), chunk, i);
            // SAFETY: the caller's promise.
            let out = unsafe { bias.row(batch, seq, head) };
            out[j] += d_score;
        }
    }
}

/// Adds a row of dS, whose first key is `first` behind the query, to the numbers of its chunk.
fn tally_row(level: Level, terms: &Terms<'_>, (first, values): (isize, &[f32]), tally: &mut [f32]) {
    if terms.alibi.is_some() {
        tally[SLOPE] -= gradient::distance_sum(level, values, -first as f32);
    }
    let Some(relative) = &terms.relative else { return };
    let (mut distance, mut rest) = (first, values);
    while !rest.is_empty() {
        let (same, after) = rest.split_at(relative.run(distance).min(rest.len()));
        tally[TABLE + relative.bucket(distance)] += gradient::sum(level, same);
        (distance, rest) = (distance - same.len() as isize, after);
    }
}

/// The same for one number.
pub(super) fn tally_pair(terms: &Terms<'_>, distance: isize, d_score: f32, tally: &mut [f32]) {
    if terms.alibi.is_some() {
        tally[SLOPE] -= d_score * distance.unsigned_abs() as f32;
    }
    if let Some(relative) = &terms.relative {
        tally[TABLE + relative.bucket(distance)] += d_score;
    }
}

/// Sums of all chunks of each head, over sequences.
pub(super) fn finish<E, K>(
    call: &mut BackwardProblem<'_, E, K>,
    tallies: &[f32],
    (q, kv_heads): (Shape, usize),
    (chunks, tally): (usize, usize),
) {
    let group = q.heads.checked_div(kv_heads).unwrap_or(0);
    let per_head = chunks.checked_div(group).unwrap_or(0);
    let total = |head: usize, place: usize| {
        let mut sum = 0.0;
        for batch in 0..q.batch {
            let first = (batch * kv_heads + head / group) * chunks + head % group * per_head;
            for chunk in first..first + per_head {
                sum += f64::from(tallies[chunk * tally + place]);
            }
        }
        sum as f32
    };
    let (first, dim) = places(call.terms);
    let TermOutputs { slopes, table, sinks, content_bias, position_bias, .. } = &mut call.terms_out;
    for (out, first) in [(content_bias, first), (position_bias, first + dim)] {
        for (n, out) in out.iter_mut().flat_map(|out| out.iter_mut()).enumerate() {
            *out = total(n / dim, first + n % dim);
        }
    }
    for (out, place) in [(slopes, SLOPE), (sinks, SINK)] {
        for (head, out) in out.iter_mut().flat_map(|out| out.iter_mut()).enumerate() {
            *out = total(head, place);
        }
    }
    for (n, out) in table.iter_mut().flat_map(|table| table.iter_mut()).enumerate() {
        *out = total(n % q.heads, TABLE + n / q.heads);
    }
}
