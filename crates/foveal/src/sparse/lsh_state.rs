//! Reformer token by token: of each bucket its open chunk and the one before it.
//!
//! ```text
//! token n of a bucket sees tokens m · max(⌊n / m⌋ − 1, 0) … n − 1 of it, in each round, and itself
//! held: at most 2 m − 1 tokens of a bucket, each once for a head however many rounds show it
//! ```
//!
//! Only chunks of buckets ([`Reformer::bucket_chunks`]) leave earlier rows as they are. The same directions hash all
//! tokens of a text. Kitaev et al. 2020, section 2.

use super::lsh::AngularHash;
use super::lsh_pattern::{Entry, Sorted};
use super::parts::{Heads, Memory, Part, Runner, Tokens};
use super::pattern::Segments;
use super::reformer::{Reformer, normalised};
use super::rows::Listed;
use super::state::StateHeads;
use crate::cpu::{Cpu, Phase};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::plan::{Inputs, expect};
use crate::problem::{Attention, Forward};
use crate::tensor::{Shape, Tensor, TensorRef};
use crate::workspace::Workspace;
use std::collections::BTreeMap;

/// Tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct LshTokens<'a, E> {
    /// What is hashed, `[1, n, H, D]`: the queries, or what they were before they were rotated.
    pub hashed: TensorRef<'a, E>,
    /// Queries and before normalisation keys, `[1, n, H, D]`.
    pub qk: TensorRef<'a, E>,
    /// Values, `[1, n, H, Dv]`.
    pub v: TensorRef<'a, E>,
}

/// What later queries of a sequence can see.
///
/// ```
/// use foveal::sparse::{AngularHash, LshTokens, Reformer, StateHeads};
/// use foveal::{Phase, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let heads = StateHeads { heads: 2, kv_heads: 2, key_dim: 16, value_dim: 16 };
/// let layer = Reformer::new(4)?.bucket_chunks();
/// let mut state = layer.state(AngularHash::new(16, 8, 2, 1)?, heads)?;
/// let shape = Shape { batch: 1, seq: 50, heads: 2, dim: 16 };
/// let x = Tensor::from_vec((0..50 * 32).map(|n| (n as f32).sin()).collect(), shape)?;
/// let tokens = LshTokens { hashed: x.view(), qk: x.view(), v: x.view() };
/// assert_eq!(state.forward(tokens, Phase::Prompt)?.out.shape(), shape);
/// assert_eq!(state.tokens(), 50);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LshState<E> {
    pub(super) layer: Reformer,
    runner: Runner,
    pub(super) hash: AngularHash,
    pub(super) shape: StateHeads,
    pub(super) heads: Vec<Head<E>>,
    pub(super) tokens: usize,
    workspace: Workspace,
}

/// Tokens of a head that some bucket still shows.
#[derive(Debug, Clone, Default)]
pub(super) struct Head<E> {
    /// Normalised keys and values, a slot each.
    pub(super) keys: Vec<E>,
    pub(super) values: Vec<E>,
    /// How many buckets show what is in a slot.
    pub(super) shown: Vec<u32>,
    free: Vec<u32>,
    pub(super) buckets: BTreeMap<u64, Bucket>,
}

/// A bucket of one round.
#[derive(Debug, Clone, Default)]
pub(super) struct Bucket {
    /// Its tokens so far.
    pub(super) count: usize,
    /// Slots of the newest of them: those that the next one sees.
    pub(super) held: Vec<u32>,
}

impl Reformer {
    /// A state that has seen nothing, of tokens that are hashed by `hash`.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for chunks that aren't those of buckets, if later tokens aren't hidden, and for values
    /// that heads share; those of [`Attention::plan_decode`].
    pub fn state<E: Element>(&self, hash: AngularHash, shape: StateHeads) -> Result<LshState<E>> {
        let StateHeads { heads, kv_heads, key_dim, value_dim } = shape;
        let rules = [
            (
                "chunks of a state",
                self.cuts.apart,
                "chunks of buckets: others move with later tokens",
            ),
            ("order of a state", self.cuts.causal, "causal: later tokens don't exist yet"),
            ("key/value heads of LSH attention", heads == kv_heads, "one for each query head"),
        ];
        for (what, holds, expected) in rules {
            if !holds {
                let got = format!("{self:?} with {shape:?}");
                return Err(Error::InvalidParameter { what, expected, got });
            }
        }
        let runner = self.runner(key_dim)?;
        let q = Shape { batch: 1, seq: 1, heads, dim: key_dim };
        Attention::new().cpu(runner.cpu).plan_decode(q, q, Shape { dim: value_dim, ..q })?;
        let (heads, workspace) = ((0..heads).map(|_| Head::new()).collect(), Workspace::new());
        Ok(LshState { layer: *self, runner, hash, shape, heads, tokens: 0, workspace })
    }
}

impl<E: Element> LshState<E> {
    /// Tokens appended.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens held by all heads.
    pub fn entries(&self) -> usize {
        self.heads.iter().map(|head| head.shown.len() - head.free.len()).sum()
    }

    /// Bytes of the keys and values that are held, and of the lists of buckets.
    pub fn bytes(&self) -> usize {
        let StateHeads { key_dim, value_dim, .. } = self.shape;
        let lists = self.heads.iter().flat_map(|head| head.buckets.values());
        self.entries() * (key_dim + value_dim) * E::DTYPE.size()
            + lists.map(|bucket| bucket.held.len() * size_of::<u32>()).sum::<usize>()
    }

    /// Takes these instructions and threads from now on.
    pub fn set_cpu(&mut self, cpu: Cpu) {
        self.runner.cpu = cpu;
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.heads.iter_mut().for_each(|head| *head = Head::new());
        self.tokens = 0;
    }

    /// Appends tokens and attends with all of them: those of a prompt together, with the same bits however it is cut into
    /// calls, generated ones one by one. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; the state is unchanged then.
    pub fn forward(&mut self, tokens: LshTokens<'_, E>, phase: Phase) -> Result<Forward<E>> {
        let LshTokens { hashed, qk, v } = tokens;
        let StateHeads { heads, key_dim, value_dim, .. } = self.shape;
        let shape = Shape { batch: 1, seq: qk.shape().seq, heads, dim: key_dim };
        expect("queries and keys to append", shape, qk.shape())?;
        expect("what is hashed", shape, hashed.shape())?;
        let shape = Shape { dim: value_dim, ..shape };
        expect("values to append", shape, v.shape())?;
        let buckets = self.hash.buckets(hashed, self.runner.cpu)?;
        let (k, _) = normalised(qk)?;
        let mut result = Forward {
            out: Tensor::zeros(shape)?,
            lse: Tensor::from_vec(vec![f32::NEG_INFINITY; shape.seq * heads], shape.per_row())?,
        };
        let mut memory = Memory::new(self.runner.cpu);
        for head in 0..heads {
            let sorted = Sorted::new(&buckets, (0, head), self.layer.cuts.chunk);
            let own = Inputs {
                q: qk.part(0..1, head..head + 1),
                k: k.view().part(0..1, head..head + 1),
                v: v.part(0..1, head..head + 1),
            };
            let part = match phase {
                Phase::Prompt => self.prompt(head, own, (&sorted, &mut memory))?,
                Phase::Generated => self.generate(head, own, &sorted)?,
            };
            self.finish(head, own, part, &mut result);
        }
        self.tokens += shape.seq;
        Ok(result)
    }

    /// Joins each row with itself, and writes a head's rows to where they belong.
    fn finish(
        &self,
        head: usize,
        own: Inputs<'_, E, E>,
        mut part: Forward<E>,
        to: &mut Forward<E>,
    ) {
        let (mut out, mut lse) = (part.out.view_mut(), part.lse.view_mut());
        let (mut to, mut to_lse) = (to.out.view_mut(), to.lse.view_mut());
        for t in 0..own.q.shape().seq {
            let row = (out.row_mut(0, t, 0), &mut lse.row_mut(0, t, 0)[0]);
            let own = [own.q, own.k, own.v].map(|x| x.row(0, t, 0));
            self.layer.join_self(&self.runner, own, self.hash.rounds(), row);
            to.row_mut(0, t, head).copy_from_slice(out.row_mut(0, t, 0));
            to_lse.row_mut(0, t, head)[0] = lse.row_mut(0, t, 0)[0];
        }
    }

    /// All rows of a head, without themselves: each chunk of a bucket is a part.
    fn prompt(
        &mut self,
        head: usize,
        own: Inputs<'_, E, E>,
        (sorted, memory): (&Sorted, &mut Memory<E>),
    ) -> Result<Forward<E>> {
        let (chunk, state) = (self.layer.cuts.chunk, &mut self.heads[head]);
        let held = state.shown.len();
        let (keys, values) = (state.keys_and(own.k)?, state.values_and(own.v)?);
        let mut parts = vec![];
        for bucket in sorted.rounds.iter().flat_map(|own| own.chunk_by(|a, b| a.bucket == b.bucket))
        {
            parts.extend(state.parts(bucket, (held, chunk)));
        }
        state.append(own, &sorted.rounds, chunk);
        let shape = Shape { dim: values.shape().dim, ..own.q.shape() };
        let lse = Tensor::from_vec(vec![f32::NEG_INFINITY; shape.seq], shape.per_row())?;
        let mut result = Forward { out: Tensor::zeros(shape)?, lse };
        if shape.seq > 0 {
            let inputs = Inputs { q: own.q, k: keys.view(), v: values.view() };
            let heads = [Heads { sequences: 0..1, heads: 0..1, parts }];
            self.runner.forward_in(memory, inputs, &heads, &mut result)?;
        }
        Ok(result)
    }

    /// One row of a head after the other, without themselves.
    fn generate(
        &mut self,
        head: usize,
        own: Inputs<'_, E, E>,
        sorted: &Sorted,
    ) -> Result<Forward<E>> {
        let (chunk, state) = (self.layer.cuts.chunk, &mut self.heads[head]);
        let seq = own.q.shape().seq;
        let mut by_token = vec![vec![]; seq];
        for entry in sorted.rounds.iter().flatten() {
            by_token[entry.token as usize].push(*entry);
        }
        let shape = Shape { dim: own.v.shape().dim, ..own.q.shape() };
        let (mut out, mut lse) = (Tensor::zeros(shape)?, Tensor::zeros(shape.per_row())?);
        for (t, entries) in by_token.iter().enumerate() {
            let (keys, values) = state.seen(entries, [own.k.shape(), own.v.shape()])?;
            let one = Inputs { q: own.q.tokens(t..t + 1), k: keys.view(), v: values.view() };
            let attention = self.runner.attention(Mask::Full);
            let plan = attention.plan_decode(one.q.shape(), one.k.shape(), one.v.shape())?;
            self.workspace.reserve(plan.workspace_bytes());
            let to = out.view_mut().into_span(t..t + 1);
            let to_lse = lse.view_mut().into_span(t..t + 1);
            plan.forward(one, to, Some(to_lse), &mut self.workspace)?;
            let [k, v] = [own.k, own.v].map(|x| x.tokens(t..t + 1));
            let entries: Vec<_> =
                entries.iter().map(|entry| vec![Entry { token: 0, ..*entry }]).collect();
            state.append(Inputs { q: own.q, k, v }, &entries, chunk);
        }
        Ok(Forward { out, lse })
    }
}

impl<E: Element> Head<E> {
    pub(super) fn new() -> Head<E> {
        let (keys, values, shown, free) = (vec![], vec![], vec![], vec![]);
        Head { keys, values, shown, free, buckets: BTreeMap::new() }
    }

    /// The keys of all slots, and behind them those of a call.
    fn keys_and(&self, own: TensorRef<'_, E>) -> Result<Tensor<E>> {
        behind(&self.keys, own)
    }

    fn values_and(&self, own: TensorRef<'_, E>) -> Result<Tensor<E>> {
        behind(&self.values, own)
    }

    /// The chunks of a call's tokens of one bucket, behind `held` slots.
    fn parts(&self, rows: &[Entry], (held, chunk): (usize, usize)) -> Vec<Part> {
        let bucket = self.buckets.get(&rows[0].bucket);
        let (count, slots) = bucket.map_or((0, &[][..]), |bucket| (bucket.count, &bucket.held[..]));
        let slots = slots.iter().map(|&slot| slot as usize);
        let keys: Vec<usize> =
            slots.chain(rows.iter().map(|entry| held + entry.token as usize)).collect();
        // The place in the bucket of the first of them.
        let base = count + rows.len() - keys.len();
        let (mut parts, mut first) = (vec![], count);
        while first < count + rows.len() {
            let start = first / chunk * chunk;
            let end = start.saturating_add(chunk).min(count + rows.len());
            let keys = keys[start.saturating_sub(chunk).max(base) - base..end - base].to_vec();
            let tokens = rows[first - count..end - count].iter();
            let queries: Vec<usize> = tokens.map(|entry| entry.token as usize).collect();
            let mask =
                Segments { rows: vec![0, queries.len()], keys: vec![0, keys.len()], skip: 1 };
            parts.push(Part {
                queries: Tokens::Listed(Listed::ascending(queries)),
                keys: Tokens::Listed(Listed::sorted(keys)),
                mask: Mask::pattern(mask),
            });
            first = end;
        }
        parts
    }

    /// Copies of what a token in these buckets sees, once for each bucket.
    fn seen(&self, entries: &[Entry], [k, v]: [Shape; 2]) -> Result<(Tensor<E>, Tensor<E>)> {
        let lists = entries.iter().filter_map(|entry| self.buckets.get(&entry.bucket));
        let slots: Vec<usize> =
            lists.flat_map(|bucket| &bucket.held).map(|&slot| slot as usize).collect();
        let copy = |data: &[E], shape: Shape| {
            let row = |&slot: &usize| &data[slot * shape.dim..(slot + 1) * shape.dim];
            let data = slots.iter().flat_map(row).copied().collect();
            Tensor::from_vec(data, Shape { seq: slots.len(), ..shape })
        };
        Ok((copy(&self.keys, k)?, copy(&self.values, v)?))
    }

    /// Takes tokens in, given each round's in the order of their buckets, and lets go of what none shows any more.
    fn append(&mut self, own: Inputs<'_, E, E>, rounds: &[Vec<Entry>], chunk: usize) {
        let seq = own.k.shape().seq;
        let mut slots: Vec<Option<u32>> = vec![None; seq];
        for rows in rounds.iter().flat_map(|own| own.chunk_by(|a, b| a.bucket == b.bucket)) {
            let mut bucket = self.buckets.remove(&rows[0].bucket).unwrap_or_default();
            bucket.count += rows.len();
            // The next token sees the chunk before its own.
            let first = (bucket.count / chunk).saturating_sub(1) * chunk;
            let kept = rows.len().min(bucket.count - first);
            let room = bucket.count - first - kept;
            for slot in bucket.held.drain(..bucket.held.len().saturating_sub(room)) {
                self.let_go(slot);
            }
            for entry in &rows[rows.len() - kept..] {
                let token = entry.token as usize;
                let slot = *slots[token].get_or_insert_with(|| {
                    self.take([own.k.row(0, token, 0), own.v.row(0, token, 0)])
                });
                self.shown[slot as usize] += 1;
                bucket.held.push(slot);
            }
            self.buckets.insert(rows[0].bucket, bucket);
        }
    }

    fn let_go(&mut self, slot: u32) {
        let shown = &mut self.shown[slot as usize];
        *shown -= 1;
        if *shown == 0 {
            self.free.push(slot);
        }
    }

    /// Writes a token to a slot that nobody shows yet.
    fn take(&mut self, [k, v]: [&[E]; 2]) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.shown.push(0);
            self.shown.len() as u32 - 1
        });
        for (to, row) in [(&mut self.keys, k), (&mut self.values, v)] {
            let at = slot as usize * row.len();
            to.resize(to.len().max(at + row.len()), E::default());
            to[at..at + row.len()].copy_from_slice(row);
        }
        slot
    }
}

/// Rows that are held, and those of a call behind them.
fn behind<E: Element>(held: &[E], own: TensorRef<'_, E>) -> Result<Tensor<E>> {
    let Shape { seq, dim, .. } = own.shape();
    let mut data = Vec::with_capacity(held.len() + seq * dim);
    data.extend_from_slice(held);
    (0..seq).for_each(|t| data.extend_from_slice(own.row(0, t, 0)));
    Tensor::from_vec(data, Shape { seq: held.len() / dim.max(1) + seq, ..own.shape() })
}
