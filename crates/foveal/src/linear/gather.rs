//! What a call reads, block by block: which tokens a block has, and their rows as kernels take them.

use super::block::{BLOCK, Step};
use super::tokens::Sizes;
use super::{DecayForm, FeatureMap, Recurrence, Tokens};
use crate::element::Element;
use crate::error::Result;
use crate::simd::Level;
use crate::simd::near::Near;
use crate::simd::sweep::{TokenRows, padded};
use crate::simd::token::{self, gather};
use crate::tensor::{Rows, Spans, TensorRef};
use std::ops::Range;

/// Tokens of a head, by absolute position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) batch: usize,
    pub(super) first: usize,
    pub(super) len: usize,
    pub(super) head: usize,
    /// Where they lie: all tensors, those of keys and values, or that of queries.
    pub(super) step: Step,
}

/// A call whose shapes have been checked.
pub(super) struct Engine<'a, 'b, R, E> {
    pub(super) mechanism: &'a R,
    pub(super) tokens: &'a Tokens<'b, E>,
    pub(super) sizes: Sizes<'b>,
    /// How many queries read what all keys wrote; `None` if each token reads what was written up to it.
    pub(super) queries: Option<usize>,
}

impl<R, E: Element> Engine<'_, '_, R, E> {
    /// The stretches of tokens that queries and outputs are cut into.
    pub(super) fn query_spans(&self) -> Result<Spans<'_>> {
        match self.queries {
            None => Ok(self.sizes.spans),
            Some(queries) => Spans::new(self.sizes.spans.count(), queries, None),
        }
    }

    /// Tokens of a sequence: keys and queries apart count apart.
    pub(super) fn tokens_of(&self, span: &Range<usize>) -> usize {
        span.len() + self.queries.unwrap_or(0)
    }

    /// Blocks of a sequence.
    pub(super) fn blocks(&self, span: &Range<usize>) -> usize {
        span.len().div_ceil(BLOCK) + self.queries.map_or(0, |queries| queries.div_ceil(BLOCK))
    }

    /// The `n`-th block of a sequence: of tokens, or of keys and, after all of those, of queries.
    pub(super) fn place(
        &self,
        (batch, span): (usize, &Range<usize>),
        head: usize,
        n: usize,
    ) -> Place {
        let keys = span.len().div_ceil(BLOCK);
        let (step, first, end) = match self.queries {
            None => (Step::Both, span.start + n * BLOCK, span.end),
            Some(_) if n < keys => (Step::Write, span.start + n * BLOCK, span.end),
            Some(queries) => (Step::Read, (n - keys) * BLOCK, queries),
        };
        Place { batch, first, len: BLOCK.min(end - first), head, step }
    }
}

/// Whose rows a map takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Query,
    Key,
}

/// The rows of a block of tokens.
pub(super) struct Gathered<'a> {
    pub(super) q: &'a mut [f32],
    pub(super) k: &'a mut [f32],
    pub(super) v: &'a mut [f32],
    pub(super) decay: &'a mut [f32],
    pub(super) beta: &'a mut [f32],
    /// Rows that are not mapped yet.
    pub(super) raw: &'a mut [f32],
}

/// Takes the first `n` numbers of what is left.
pub(crate) fn take<'a>(floats: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (own, rest) = std::mem::take(floats).split_at_mut(n);
    *floats = rest;
    own
}

impl<'a> Gathered<'a> {
    pub(super) fn floats(sizes: &Sizes<'_>) -> usize {
        let (keys, values) = sizes.strides();
        let gates = padded(sizes.decay_dim.unwrap_or(1)) + 1;
        BLOCK * (2 * keys + values + gates + padded(sizes.input_dim))
    }

    pub(super) fn take(floats: &mut &'a mut [f32], sizes: &Sizes<'_>) -> Gathered<'a> {
        let (keys, values) = sizes.strides();
        Gathered {
            q: take(floats, BLOCK * keys),
            k: take(floats, BLOCK * keys),
            v: take(floats, BLOCK * values),
            decay: take(floats, BLOCK * padded(sizes.decay_dim.unwrap_or(1))),
            beta: take(floats, BLOCK),
            raw: take(floats, BLOCK * padded(sizes.input_dim)),
        }
    }
}

/// The rows of a block of tokens, in scratch or where the tensors lie.
pub(super) struct Mapped<'a> {
    pub(super) q: TokenRows<'a>,
    pub(super) k: TokenRows<'a>,
    pub(super) v: TokenRows<'a>,
}

/// Rows that need no map, no widening and no padding, as they lie.
fn in_place<E: Element>(rows: Rows<'_, E>, map: FeatureMap) -> Option<TokenRows<'_>> {
    let ready = map == FeatureMap::Identity && rows.width() == padded(rows.width());
    let rows = rows.as_f32().filter(|_| ready)?;
    Some(TokenRows { data: rows.as_slice(), stride: rows.stride() })
}

/// Rows as numbers, where they lie or gathered.
fn plain_rows<'a, E: Element>(
    level: Level,
    rows: Rows<'a, E>,
    raw: &'a mut [f32],
) -> TokenRows<'a> {
    in_place(rows, FeatureMap::Identity).unwrap_or_else(|| {
        gather(level, rows, FeatureMap::Identity, raw);
        TokenRows { data: raw, stride: padded(rows.width()) }
    })
}

impl<R: Recurrence, E: Element> Engine<'_, '_, R, E> {
    /// Adds what a block reads of the tensors of tokens.
    pub(super) fn near_inputs(&self, near: &mut Near, place: Place) {
        let Place { batch, first, len, head, step } = place;
        let Tokens { q, k, v, log_decay, .. } = *self.tokens;
        let (range, group) = (first..first + len, self.group(head));
        let tensors = [
            (q.head(batch, group), step != Step::Write),
            (k.head(batch, group), step != Step::Read),
            (v.head(batch, head), step != Step::Read),
        ];
        for (rows, _) in tensors.into_iter().filter(|(_, wanted)| *wanted) {
            let rows = rows.slice(range.clone());
            near.add(rows.as_ptr(), rows.stride(), rows.width());
        }
        if let Some(log_decay) = log_decay.filter(|x| x.shape().dim > 1) {
            let rows = log_decay.head(batch, head).slice(range);
            near.add(rows.as_ptr(), rows.stride(), rows.width());
        }
    }

    /// The mapped rows of a block of tokens; what they lack is absent or zero.
    pub(super) fn gather(&self, level: Level, rows: &mut Gathered<'_>, place: Place) {
        let Place { batch, first, len, head, step } = place;
        let (range, group) = (first..first + len, self.group(head));
        match step {
            Step::Write => rows.q[..len * self.sizes.strides().0].fill(0.0),
            _ => {
                let queries = self.tokens.q.head(batch, group).slice(range.clone());
                self.map_rows(level, Role::Query, queries, (rows.raw, rows.q));
            }
        }
        if step == Step::Read {
            self.leave_out(rows.k, rows.v, len);
        } else {
            let keys = self.tokens.k.head(batch, group).slice(range.clone());
            self.gather_keys(level, keys, (rows.raw, rows.k), place);
            let values = self.tokens.v.head(batch, head).slice(range);
            self.gather_values(level, values, rows.v, place);
        }
        self.gather_gates(level, (rows.decay, rows.beta), place);
    }

    /// Absent keys, and values of zero.
    fn leave_out(&self, k: &mut [f32], v: &mut [f32], len: usize) {
        let (keys, values) = self.sizes.strides();
        k[..len * keys].fill(self.mechanism.form().absent);
        v[..len * values].fill(0.0);
    }

    pub(super) fn gather_gates(
        &self,
        level: Level,
        (decay, beta): (&mut [f32], &mut [f32]),
        place: Place,
    ) {
        let Place { batch, first, len, head, .. } = place;
        let range = first..first + len;
        if let Some(log_decay) = self.tokens.log_decay {
            let log_decay = log_decay.head(batch, head).slice(range.clone());
            match self.mechanism.form().decay {
                DecayForm::Scalar => (0..len).for_each(|t| {
                    // In f64, since an error is multiplied along the sequence.
                    decay[t] = f64::from(log_decay.row(t)[0]).exp() as f32;
                }),
                _ => gather(level, log_decay, FeatureMap::Exp, decay),
            }
        } else if let Some(fixed) = self.mechanism.fixed_decay(head) {
            decay[..len].fill(fixed);
        }
        if let Some(given) = self.tokens.beta {
            let given = given.head(batch, head).slice(range);
            (0..len).for_each(|t| beta[t] = given.row(t)[0]);
        }
    }

    /// The rows of a block of tokens: where they lie, or mapped and gathered.
    pub(super) fn mapped<'r>(
        &'r self,
        level: Level,
        (q, k, v): (&'r mut [f32], &'r mut [f32], &'r mut [f32]),
        raw: &mut [f32],
        place: Place,
    ) -> Mapped<'r> {
        let Place { batch, first, len, head, step } = place;
        let (form, range, group) = (self.mechanism.form(), first..first + len, self.group(head));
        let (keys, values) = self.sizes.strides();
        let rows = |tensor: TensorRef<'r, E>, head| tensor.head(batch, head).slice(range.clone());
        // What is mapped by rows does not lie anywhere.
        let lie = |rows| in_place(rows, form.map).filter(|_| self.mechanism.row_maps().is_none());
        let queries = (step != Step::Write).then(|| rows(self.tokens.q, group));
        let q = queries.and_then(lie).unwrap_or_else(|| {
            if let Some(rows) = queries {
                self.map_rows(level, Role::Query, rows, (&mut *raw, q));
            }
            TokenRows { data: q, stride: keys }
        });
        if step == Step::Read {
            self.leave_out(k, v, len);
            let k = TokenRows { data: k, stride: keys };
            return Mapped { q, k, v: TokenRows { data: v, stride: values } };
        }
        let all = |rows: TokenRows<'r>| self.tokens.present.is_none().then_some(rows);
        let own = rows(self.tokens.k, group);
        let k = lie(own).and_then(all).unwrap_or_else(|| {
            self.gather_keys(level, own, (raw, k), place);
            TokenRows { data: k, stride: keys }
        });
        let own = rows(self.tokens.v, head);
        let v = in_place(own, FeatureMap::Identity).and_then(all).unwrap_or_else(|| {
            self.gather_values(level, own, v, place);
            TokenRows { data: v, stride: values }
        });
        Mapped { q, k, v }
    }

    /// Mapped rows of queries or keys, by way of `raw`.
    fn map_rows(
        &self,
        level: Level,
        role: Role,
        rows: Rows<'_, E>,
        (raw, to): (&mut [f32], &mut [f32]),
    ) {
        match self.mechanism.row_maps() {
            None => gather(level, rows, self.mechanism.form().map, to),
            Some(maps) => {
                let x = plain_rows(level, rows, raw);
                maps.apply(level, role, (x, rows.count()), to);
            }
        }
    }

    /// Mapped keys, with those of absent tokens replaced.
    fn gather_keys(
        &self,
        level: Level,
        rows: Rows<'_, E>,
        (raw, to): (&mut [f32], &mut [f32]),
        place: Place,
    ) {
        self.map_rows(level, Role::Key, rows, (raw, to));
        let stride = self.sizes.strides().0;
        self.leave_out_absent(to, stride, self.mechanism.form().absent, place);
    }

    /// Values, with zeros for those of absent tokens.
    fn gather_values(&self, level: Level, rows: Rows<'_, E>, to: &mut [f32], place: Place) {
        gather(level, rows, FeatureMap::Identity, to);
        self.leave_out_absent(to, self.sizes.strides().1, 0.0, place);
    }

    /// Replaces the rows of absent tokens.
    pub(super) fn leave_out_absent(
        &self,
        rows: &mut [f32],
        stride: usize,
        absent: f32,
        place: Place,
    ) {
        for t in (0..place.len).filter(|t| !self.is_present(place.batch, place.first + t)) {
            rows[t * stride..(t + 1) * stride].fill(absent);
        }
    }

    /// The rows that were mapped, of queries or keys: as they lie, or gathered to `raw`.
    pub(super) fn raw_rows<'r>(
        &'r self,
        level: Level,
        role: Role,
        place: Place,
        raw: &'r mut [f32],
    ) -> TokenRows<'r> {
        let Place { batch, first, len, head, .. } = place;
        let tensor = if role == Role::Query { self.tokens.q } else { self.tokens.k };
        plain_rows(level, tensor.head(batch, self.group(head)).slice(first..first + len), raw)
    }

    /// The gradient of outputs times the scale.
    pub(super) fn gather_upstream(
        &self,
        level: Level,
        d_out: TensorRef<'_, E>,
        place: Place,
        g: &mut [f32],
    ) {
        let Place { batch, first, len, head, step } = place;
        if step == Step::Write {
            return g[..len * self.sizes.strides().1].fill(0.0);
        }
        let d_out = d_out.head(batch, head).slice(first..first + len);
        gather(level, d_out, FeatureMap::Identity, g);
        let scale = self.sizes.scale;
        if scale != 1.0 {
            let g = &mut g[..len * self.sizes.strides().1];
            token::scale(level, scale, g);
        }
    }

    /// The query and key head that a value head reads.
    fn group(&self, head: usize) -> usize {
        head * self.sizes.groups / self.sizes.heads
    }

    /// Whether a key and a value count.
    pub(super) fn is_present(&self, batch: usize, token: usize) -> bool {
        let at = batch * self.tokens.k.shape().seq + token;
        self.tokens.present.is_none_or(|present| present[at])
    }
}
