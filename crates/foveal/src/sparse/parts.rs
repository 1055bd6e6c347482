//! Running parts and joining them: gather, attend, merge; backward with the merged result, scatter, add.
//!
//! A unit is some sequences and heads with the same parts, few enough that what is gathered for them
//! stays small: memory beyond inputs and results is about six times [`UNIT`] numbers in all, whatever the length.

use super::rows::{Listed, each_listed_row, each_listed_row_of, each_row, each_row_of};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::Result;
use crate::exact::state::join_rows;
use crate::mask::Mask;
use crate::plan::{Backward, Gradients, Inputs, Saved, TermGradients, Upstream, expect};
use crate::problem::{Attention, Forward, Scale};
use crate::tensor::{Shape, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

/// Tokens that mechanisms gather at a time.
pub(super) const GATHERED: usize = 4096;

/// Tokens that are gathered at a time from all over a sequence: few enough that they stay in cache.
pub(super) const SORTED: usize = 1024;

/// Output numbers that a unit may have for so many tokens.
const UNIT: usize = 1 << 21;

/// Which tokens of a tensor a part takes.
#[derive(Debug)]
pub(super) enum Tokens {
    /// Neighbours, where they lie.
    Span(Range<usize>),
    /// Those of a list, gathered.
    Listed(Listed),
}

impl Tokens {
    /// The tokens of a tensor, gathered if they have to be, into memory that is free.
    fn of<'a, E: Element>(
        &self,
        from: TensorRef<'a, E>,
        held: &'a mut Option<Tensor<E>>,
        (free, threads): (&mut Vec<Vec<E>>, usize),
    ) -> Result<TensorRef<'a, E>> {
        let list = match self {
            Tokens::Span(span) => return Ok(from.span(span.clone())),
            Tokens::Listed(listed) => listed.tokens(),
        };
        let mut to = reuse(free, Shape { seq: list.len(), ..from.shape() })?;
        each_row(to.view_mut(), threads, |[b, t, h], row| {
            row.copy_from_slice(from.row(b, list[t], h));
        });
        Ok(held.insert(to).view())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Tokens::Span(span) => span.len(),
            Tokens::Listed(listed) => listed.tokens().len(),
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of these tokens of a tensor.
    fn shape(&self, whole: Shape) -> Shape {
        Shape { seq: self.len(), ..whole }
    }

    /// Calls `write` with the index and the row of each of these tokens.
    fn scatter<E: Element>(
        &self,
        to: TensorMut<'_, E>,
        threads: usize,
        write: impl Fn([usize; 3], &mut [E]) + Sync,
    ) {
        match self {
            Tokens::Span(span) => each_row(to.into_span(span.clone()), threads, write),
            Tokens::Listed(listed) => each_listed_row(to, listed, threads, write),
        }
    }
}

/// Exact attention of some queries to some keys.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) queries: Tokens,
    pub(super) keys: Tokens,
    /// On tokens as they lie after gathering.
    pub(super) mask: Mask,
}

impl Part {
    /// Whether it surely has none of these queries.
    fn spares(&self, rows: &Range<usize>) -> bool {
        let apart = |own: &Range<usize>| own.end <= rows.start || rows.end <= own.start;
        matches!(&self.queries, Tokens::Span(own) if apart(own))
    }

    /// What it reads.
    fn gather<'a, E: Element>(
        &self,
        inputs: Inputs<'a, E, E>,
        held: &'a mut [Option<Tensor<E>>; 3],
        memory: &mut Memory<E>,
    ) -> Result<Inputs<'a, E, E>> {
        let [q, k, v] = held;
        let threads = memory.threads;
        Ok(Inputs {
            q: self.queries.of(inputs.q, q, (&mut memory.free, threads))?,
            k: self.keys.of(inputs.k, k, (&mut memory.free, threads))?,
            v: self.keys.of(inputs.v, v, (&mut memory.free, threads))?,
        })
    }

    /// Whether it takes all queries and keys where they lie.
    fn is_whole(&self, queries: usize, keys: usize) -> bool {
        let whole =
            |tokens: &Tokens, all| matches!(tokens, Tokens::Span(span) if *span == (0..all));
        whole(&self.queries, queries) && whole(&self.keys, keys)
    }
}

/// Neighbouring query heads with the same parts: whole groups, or heads of one group.
#[derive(Debug)]
pub(super) struct Heads {
    pub(super) sequences: Range<usize>,
    pub(super) heads: Range<usize>,
    pub(super) parts: Vec<Part>,
}

/// What all parts have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Runner {
    pub(super) scale: f32,
    pub(super) cpu: Cpu,
}

/// Tensors and a workspace that units use one after the other.
pub(super) struct Memory<E> {
    threads: usize,
    workspace: Workspace,
    free: Vec<Vec<E>>,
    logs: Vec<Vec<f32>>,
}

impl<E: Element> Memory<E> {
    pub(super) fn new(cpu: Cpu) -> Memory<E> {
        let (workspace, free, logs) = (Workspace::new(), vec![], vec![]);
        Memory { threads: cpu.threads.count(), workspace, free, logs }
    }

    /// A tensor with any contents.
    fn take(&mut self, shape: Shape) -> Result<Tensor<E>> {
        reuse(&mut self.free, shape)
    }

    fn take_logs(&mut self, shape: Shape) -> Result<Tensor<f32>> {
        reuse(&mut self.logs, shape.per_row())
    }

    fn give(&mut self, tensors: impl IntoIterator<Item = Tensor<E>>) {
        self.free.extend(tensors.into_iter().map(Tensor::into_vec));
    }
}

/// A tensor on the largest vector that is free.
fn reuse<E: Element>(free: &mut Vec<Vec<E>>, shape: Shape) -> Result<Tensor<E>> {
    let largest = (0..free.len()).max_by_key(|&n| free[n].len());
    let Some(mut data) = largest.map(|n| free.swap_remove(n)) else { return Tensor::zeros(shape) };
    match shape.checked_len() {
        Some(len) => data.resize(len, E::default()),
        None => return Tensor::zeros(shape),
    }
    Tensor::from_vec(data, shape)
}

/// Sequences and query heads that are computed together, and their key/value heads.
struct Unit<'p> {
    parts: &'p [Part],
    batch: Range<usize>,
    heads: Range<usize>,
    kv: Range<usize>,
    /// Whether no unit before has touched these key/value heads.
    first: bool,
}

impl Unit<'_> {
    fn rows<'a, E: Element>(&self, x: TensorRef<'a, E>) -> TensorRef<'a, E> {
        x.part(self.batch.clone(), self.heads.clone())
    }

    fn rows_mut<'a, E: Element>(&self, x: &'a mut Tensor<E>) -> TensorMut<'a, E> {
        x.view_mut().into_part(self.batch.clone(), self.heads.clone())
    }

    fn keys<'a, E: Element>(&self, x: TensorRef<'a, E>) -> TensorRef<'a, E> {
        x.part(self.batch.clone(), self.kv.clone())
    }

    fn keys_mut<'a, E: Element>(&self, x: &'a mut Tensor<E>) -> TensorMut<'a, E> {
        x.view_mut().into_part(self.batch.clone(), self.kv.clone())
    }

    fn inputs<'a, E: Element>(&self, inputs: Inputs<'a, E, E>) -> Inputs<'a, E, E> {
        let Inputs { q, k, v } = inputs;
        Inputs { q: self.rows(q), k: self.keys(k), v: self.keys(v) }
    }
}

/// Cuts a call into units. `group` is the number of query heads of a key/value head.
fn units<'p>(all: &'p [Heads], out: Shape, group: usize) -> Vec<Unit<'p>> {
    let mut units = vec![];
    for Heads { sequences: own, heads, parts } in all {
        let step = group.min(heads.len());
        let fit = (UNIT / (out.seq.min(GATHERED) * step * out.dim)).max(1);
        let runs = heads.len() / step;
        let (sequences, runs) = if fit < runs { (1, fit) } else { (fit / runs, runs) };
        for start in own.clone().step_by(sequences) {
            let batch = start..(start + sequences).min(own.end);
            for first in heads.clone().step_by(step * runs) {
                let heads = first..(first + step * runs).min(heads.end);
                let kv = heads.start / group..(heads.end - 1) / group + 1;
                let first = heads.start.is_multiple_of(group);
                units.push(Unit { parts, batch: batch.clone(), heads, kv, first });
            }
        }
    }
    units
}

impl Runner {
    pub(super) fn attention(&self, mask: Mask) -> Attention<'static> {
        Attention::new().mask(mask).scale(Scale::Value(self.scale)).cpu(self.cpu)
    }

    /// The joined output of all parts. `heads` covers all query heads in order.
    pub(super) fn forward<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        heads: &[Heads],
    ) -> Result<Forward<E>> {
        let Inputs { q, v, .. } = inputs;
        let shape = Shape { dim: v.shape().dim, ..q.shape() };
        let out = Tensor::zeros(shape)?;
        let nothing = vec![f32::NEG_INFINITY; out.as_slice().len() / shape.dim];
        let lse = Tensor::from_vec(nothing, shape.per_row())?;
        let mut result = Forward { out, lse };
        self.forward_into(inputs, heads, &mut result)?;
        Ok(result)
    }

    /// Joins all parts with a result of other keys, or of other rows. A part that is the first of its rows here is
    /// written over what they hold, if it takes its rows where they lie.
    pub(super) fn forward_into<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        heads: &[Heads],
        result: &mut Forward<E>,
    ) -> Result<()> {
        if result.out.as_slice().is_empty() {
            return Ok(());
        }
        self.forward_in(&mut Memory::new(self.cpu), inputs, heads, result)
    }

    /// [`Runner::forward_into`] of a result that is not empty.
    pub(super) fn forward_in<E: Element>(
        &self,
        memory: &mut Memory<E>,
        inputs: Inputs<'_, E, E>,
        heads: &[Heads],
        result: &mut Forward<E>,
    ) -> Result<()> {
        let Forward { out, lse } = result;
        for unit in units(heads, out.shape(), inputs.q.shape().heads / inputs.k.shape().heads) {
            for (n, part) in unit.parts.iter().enumerate() {
                let results = (unit.rows_mut(out), unit.rows_mut(lse));
                let inputs = unit.inputs(inputs);
                match &part.queries {
                    Tokens::Span(rows) if unit.parts[..n].iter().all(|part| part.spares(rows)) => {
                        let (out, lse) = results;
                        let results = (out.into_span(rows.clone()), lse.into_span(rows.clone()));
                        self.attend(part, inputs, results, memory)?;
                    }
                    _ => self.attend_and_merge(part, inputs, results, memory)?,
                }
            }
        }
        Ok(())
    }

    /// One part, from gathering to its results.
    fn attend<E: Element>(
        &self,
        part: &Part,
        inputs: Inputs<'_, E, E>,
        (out, lse): (TensorMut<'_, E>, TensorMut<'_, f32>),
        memory: &mut Memory<E>,
    ) -> Result<()> {
        let mut held = [None, None, None];
        let gathered = part.gather(inputs, &mut held, memory)?;
        let attention = self.attention(part.mask.clone());
        let Inputs { q, k, v } = gathered;
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        memory.workspace.reserve(plan.workspace_bytes());
        plan.forward(gathered, out, Some(lse), &mut memory.workspace)?;
        memory.give(held.into_iter().flatten());
        Ok(())
    }

    /// One part, joined with what its rows have seen before.
    fn attend_and_merge<E: Element>(
        &self,
        part: &Part,
        inputs: Inputs<'_, E, E>,
        (out, lse): (TensorMut<'_, E>, TensorMut<'_, f32>),
        memory: &mut Memory<E>,
    ) -> Result<()> {
        let shape = part.queries.shape(out.shape());
        let (mut more, mut more_lse) = (memory.take(shape)?, memory.take_logs(shape)?);
        self.attend(part, inputs, (more.view_mut(), more_lse.view_mut()), memory)?;
        let (from, from_lse) = (more.view(), more_lse.view());
        let join = |[b, t, h]: [usize; 3], (out, lse): (&mut [E], &mut [f32])| {
            let more = (from.row(b, t, h), from_lse.row(b, t, h)[0]);
            join_rows(self.cpu.level, (out, &mut lse[0]), more);
        };
        match &part.queries {
            Tokens::Span(span) => {
                let rows = (out.into_span(span.clone()), lse.into_span(span.clone()));
                each_row_of(rows, memory.threads, join);
            }
            Tokens::Listed(listed) => each_listed_row_of((out, lse), listed, memory.threads, join),
        }
        memory.give([more]);
        memory.logs.push(more_lse.into_vec());
        Ok(())
    }

    /// Gradients from what [`Runner::forward`] was given and gave.
    pub(super) fn backward<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        forward: &Forward<E>,
        d_out: TensorRef<'_, E>,
        heads: &[Heads],
    ) -> Result<Backward<E>> {
        let Inputs { q, k, v } = inputs;
        let shape = Shape { dim: v.shape().dim, ..q.shape() };
        expect("output", shape, forward.out.shape())?;
        expect("log-sum-exp", shape.per_row(), forward.lse.shape())?;
        expect("gradient of the output", shape, d_out.shape())?;
        let (d_q, d_k) = (Tensor::zeros(q.shape())?, Tensor::zeros(k.shape())?);
        let mut d = Backward { d_q, d_k, d_v: Tensor::zeros(v.shape())? };
        if shape.checked_len() != Some(0) {
            let call = (inputs, forward, d_out);
            self.backward_in(&mut Memory::new(self.cpu), call, heads, &mut d)?;
        }
        Ok(d)
    }

    /// Adds the gradients of all parts, to zeros where a unit is the first of its heads. The output is not empty.
    pub(super) fn backward_in<E: Element>(
        &self,
        memory: &mut Memory<E>,
        (inputs, forward, d_out): (Inputs<'_, E, E>, &Forward<E>, TensorRef<'_, E>),
        heads: &[Heads],
        d: &mut Backward<E>,
    ) -> Result<()> {
        let [q, k] = [inputs.q.shape(), inputs.k.shape()];
        for unit in units(heads, d_out.shape(), q.heads / k.heads) {
            for (n, part) in unit.parts.iter().enumerate() {
                let call = Call {
                    inputs: unit.inputs(inputs),
                    out: unit.rows(forward.out.view()),
                    lse: unit.rows(forward.lse.view()),
                    d_out: unit.rows(d_out),
                };
                let d = Derivatives {
                    q: unit.rows_mut(&mut d.d_q),
                    k: unit.keys_mut(&mut d.d_k),
                    v: unit.keys_mut(&mut d.d_v),
                };
                match n == 0 && unit.first && part.is_whole(q.seq, k.seq) {
                    true => self.differentiate(part, call, d, memory)?,
                    false => self.differentiate_and_add(part, call, d, memory)?,
                }
            }
        }
        Ok(())
    }

    /// The gradients that one part's pairs have, from the results of all parts.
    fn differentiate<E: Element>(
        &self,
        part: &Part,
        call: Call<'_, E>,
        d: Derivatives<'_, E>,
        memory: &mut Memory<E>,
    ) -> Result<()> {
        let (mut held, mut held_rows, mut logs) = ([None, None, None], [None, None], None);
        let gathered = part.gather(call.inputs, &mut held, memory)?;
        let (threads, [held_out, held_d_out]) = (memory.threads, &mut held_rows);
        let out = part.queries.of(call.out, held_out, (&mut memory.free, threads))?;
        let d_out = part.queries.of(call.d_out, held_d_out, (&mut memory.free, threads))?;
        let lse = part.queries.of(call.lse, &mut logs, (&mut memory.logs, threads))?;
        let attention = self.attention(part.mask.clone());
        let Inputs { q, k, v } = gathered;
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        memory.workspace.reserve(plan.backward_workspace_bytes::<E>());
        let saved = Saved { out, lse };
        let upstream = Upstream { d_out, d_lse: None };
        let terms = TermGradients::default();
        let gradients = Gradients { d_q: d.q, d_k: d.k, d_v: d.v, terms };
        plan.backward(gathered, saved, upstream, gradients, &mut memory.workspace)?;
        memory.give(held.into_iter().chain(held_rows).flatten());
        memory.logs.extend(logs.map(Tensor::into_vec));
        Ok(())
    }

    /// One part's gradients, added to those of the parts before it.
    fn differentiate_and_add<E: Element>(
        &self,
        part: &Part,
        call: Call<'_, E>,
        d: Derivatives<'_, E>,
        memory: &mut Memory<E>,
    ) -> Result<()> {
        let Derivatives { q, k, v } = d;
        let mut more_q = memory.take(part.queries.shape(q.shape()))?;
        let mut more_k = memory.take(part.keys.shape(k.shape()))?;
        let mut more_v = memory.take(part.keys.shape(v.shape()))?;
        let more = Derivatives { q: more_q.view_mut(), k: more_k.view_mut(), v: more_v.view_mut() };
        self.differentiate(part, call, more, memory)?;
        for (to, from, tokens) in
            [(q, &more_q, &part.queries), (k, &more_k, &part.keys), (v, &more_v, &part.keys)]
        {
            let from = from.view();
            tokens.scatter(to, memory.threads, |[b, t, h], to| {
                for (to, from) in to.iter_mut().zip(from.row(b, t, h)) {
                    *to = E::from_f32(to.to_f32() + from.to_f32());
                }
            });
        }
        memory.give([more_q, more_k, more_v]);
        Ok(())
    }
}

/// What backward reads.
#[derive(Clone, Copy)]
struct Call<'a, E> {
    inputs: Inputs<'a, E, E>,
    out: TensorRef<'a, E>,
    lse: TensorRef<'a, f32>,
    d_out: TensorRef<'a, E>,
}

/// What backward writes.
struct Derivatives<'a, E> {
    q: TensorMut<'a, E>,
    k: TensorMut<'a, E>,
    v: TensorMut<'a, E>,
}

#[cfg(test)]
mod tests;
