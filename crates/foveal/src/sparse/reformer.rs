//! Reformer: rows see the keys of their own and the previous chunk of tokens sorted by bucket.
//!
//! ```text
//! k_j = q_j / ‖q_j‖                             one projection for queries and keys
//! round r: tokens sorted by (bucket, position), cut into chunks of m; chunk c sees chunks c − 1 and c
//!          (chunk 0 the last one of round r − 1, the first round's of the last round)
//! apart    with [`Reformer::bucket_chunks`]: each bucket is cut into chunks by itself, and shows no other
//! self:    a row sees itself with a logit that counts only where it sees nothing else
//! out:     one softmax over what all rounds see; a key seen in n rounds counts n times
//! ```
//!
//! Exact given the buckets, which carry no gradient. Sorted tokens are gathered some at a time; rounds, and
//! the row itself, are joined by log-sum-exp. Cost for each query: 2·m keys a round, and sorting. Kitaev et al. 2020,
//! section 2.
//!
//! Where the published chunks end depends on how many tokens of the whole text are in the buckets before: what a row sees
//! moves with tokens behind it, which a language model doesn't have yet. Chunks of buckets end where earlier tokens say.

use super::lsh::Buckets;
use super::lsh_pattern::{Chunks, Cuts, Definition, Entry, Sorted};
use super::parts::{Heads, Memory, Part, Runner, SORTED, Tokens};
use super::rows::Listed;
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::exact::state::join_rows;
use crate::mask::Mask;
use crate::plan::{Backward, Inputs, expect};
use crate::problem::{Attention, Forward, Scale};
use crate::tensor::{Shape, Tensor, TensorRef};
use std::ops::AddAssign;

/// What becomes of a row's logit with itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SelfLogit {
    /// A number is subtracted; 10⁵ in the authors' code.
    Subtract(f32),
    /// It is this number; −5·10⁴ in the package `reformer-pytorch`.
    Replace(f32),
}

/// Reformer's attention.
///
/// ```
/// use foveal::sparse::{AngularHash, Reformer};
/// use foveal::{Cpu, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let shape = Shape { batch: 1, seq: 64, heads: 2, dim: 16 };
/// let qk = Tensor::from_vec((0..64 * 32).map(|n| (n as f32).sin()).collect(), shape)?;
/// let buckets = AngularHash::new(16, 8, 2, 1)?.buckets(qk.view(), Cpu::detect()?)?;
/// let layer = Reformer::new(16)?;
/// let forward = layer.forward(qk.view(), qk.view(), &buckets)?;
/// let (d_qk, d_v) = layer.backward((qk.view(), qk.view()), &buckets, &forward, qk.view())?;
/// assert_eq!([d_qk.shape(), d_v.shape()], [shape; 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Reformer {
    pub(super) cuts: Cuts,
    self_logit: SelfLogit,
    scale: Scale,
    cpu: Option<Cpu>,
}

/// A result, and what backward needs of its making.
#[derive(Debug, Clone, PartialEq)]
pub struct ReformerForward<E> {
    /// Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H, 1]` of all rounds.
    pub result: Forward<E>,
    /// The weight of the row itself, of all rounds, `[B, N, H, 1]`.
    pub self_weight: Tensor<f32>,
}

impl Reformer {
    /// Chunks of `chunk` tokens, causal, as in the authors' code: scores are not scaled, 10⁵ is subtracted from a
    /// row's logit with itself, and buckets do not hide what chunks show.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for chunks of no tokens.
    pub fn new(chunk: usize) -> Result<Reformer> {
        if chunk == 0 {
            let (what, expected) = ("tokens of a chunk", "at least 1");
            return Err(Error::InvalidParameter { what, expected, got: chunk.to_string() });
        }
        let (self_logit, scale) = (SelfLogit::Subtract(1e5), Scale::Value(1.0));
        let cuts = Cuts { chunk, causal: true, strict: false, apart: false };
        Ok(Reformer { cuts, self_logit, scale, cpu: None })
    }

    /// Whether keys after the query are hidden.
    pub fn causal(self, causal: bool) -> Reformer {
        Reformer { cuts: Cuts { causal, ..self.cuts }, ..self }
    }

    /// Hides keys of a chunk that are not in the query's bucket.
    pub fn strict_buckets(self) -> Reformer {
        Reformer { cuts: Cuts { strict: true, ..self.cuts }, ..self }
    }

    /// Cuts each bucket into chunks by itself, the first from its first token on; keys of other buckets are hidden. If
    /// later tokens are hidden as well, no row depends on them, its keys included, and tokens can be made one by one
    /// ([`Reformer::state`]).
    pub fn bucket_chunks(self) -> Reformer {
        Reformer { cuts: Cuts { apart: true, ..self.cuts }, ..self }
    }

    /// What becomes of a row's logit with itself.
    pub fn self_logit(self, self_logit: SelfLogit) -> Reformer {
        Reformer { self_logit, ..self }
    }

    /// What products of queries and normalised keys are multiplied by.
    pub fn scale(self, scale: Scale) -> Reformer {
        Reformer { scale, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> Reformer {
        Reformer { cpu: Some(cpu), ..self }
    }

    /// The pairs that some round lets through, as a mask, for looking at it: a row sees itself, but with its own logit,
    /// and what a mask shows once may be seen in several rounds.
    pub fn mask(&self, buckets: &Buckets) -> Mask {
        let (cuts, buckets) = (self.cuts, buckets.clone());
        let [batch, heads] = buckets.choosers();
        let sites = (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head)));
        let sorted = sites.map(|site| Sorted::new(&buckets, site, cuts.chunk));
        let place = |own: Sorted| if cuts.apart { own.ranks() } else { own.places() };
        let places = sorted.map(place).collect();
        Mask::pattern(Definition { buckets, cuts, places })
    }

    /// Attention of `qk` `[B, N, H, D]`, queries and before normalisation keys, to values `[B, N, H, Dv]`. Any number
    /// of tokens: the last chunk of a round may be shorter. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// Those of [`Attention::plan`]; [`Error::ShapeMismatch`] for values or buckets of other tokens or heads.
    pub fn forward<E: Element>(
        &self,
        qk: TensorRef<'_, E>,
        v: TensorRef<'_, E>,
        buckets: &Buckets,
    ) -> Result<ReformerForward<E>> {
        let runner = self.prepare(qk.shape(), v.shape(), buckets)?;
        let (k, _) = normalised(qk)?;
        let inputs = Inputs { q: qk, k: k.view(), v };
        let mut result = runner.forward(inputs, &[])?;
        let mut self_weight = Tensor::zeros(qk.shape().per_row())?;
        let Shape { batch, seq, heads, .. } = qk.shape();
        let mut memory = Memory::new(runner.cpu);
        for (b, head) in (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head))) {
            let sorted = Sorted::new(buckets, (b, head), self.cuts.chunk);
            if seq > 0 {
                let own = [self.parts(&sorted, (b, head))];
                runner.forward_in(&mut memory, inputs, &own, &mut result)?;
            }
            let counts = match self.cuts.apart {
                true => vec![buckets.rounds(); seq],
                false => sorted.self_counts(self.cuts.strict),
            };
            for (t, count) in counts.into_iter().enumerate() {
                let own = [qk, k.view(), v].map(|x| x.row(b, t, head));
                let (mut out, mut lse) = (result.out.view_mut(), result.lse.view_mut());
                let row = (out.row_mut(b, t, head), &mut lse.row_mut(b, t, head)[0]);
                let weight = self.join_self(&runner, own, count, row);
                self_weight.view_mut().row_mut(b, t, head)[0] = weight;
            }
        }
        Ok(ReformerForward { result, self_weight })
    }

    /// Gradients of `qk` and of the values, from what [`Reformer::forward`] was given and gave, and the gradient of
    /// its output. Allocates the results and what is gathered.
    ///
    /// # Errors
    /// Those of [`Reformer::forward`]; [`Error::ShapeMismatch`] for results of another shape.
    pub fn backward<E: Element>(
        &self,
        (qk, v): (TensorRef<'_, E>, TensorRef<'_, E>),
        buckets: &Buckets,
        forward: &ReformerForward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<(Tensor<E>, Tensor<E>)> {
        let runner = self.prepare(qk.shape(), v.shape(), buckets)?;
        let (k, inverses) = normalised(qk)?;
        let inputs = Inputs { q: qk, k: k.view(), v };
        expect("weight of rows themselves", qk.shape().per_row(), forward.self_weight.shape())?;
        let mut d = runner.backward(inputs, &forward.result, d_out, &[])?;
        let Shape { batch, seq, heads, .. } = qk.shape();
        let mut memory = Memory::new(runner.cpu);
        for (b, head) in (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head))) {
            let sorted = Sorted::new(buckets, (b, head), self.cuts.chunk);
            if seq > 0 {
                let own = [self.parts(&sorted, (b, head))];
                let call = (inputs, &forward.result, d_out);
                runner.backward_in(&mut memory, call, &own, &mut d)?;
            }
            for t in 0..seq {
                let at = [b, t, head];
                self.self_backward(runner.scale, (inputs, forward, d_out), at, &mut d);
                let inverse = inverses.view().row(b, t, head)[0];
                through_norm(k.view().row(b, t, head), inverse, at, &mut d);
            }
        }
        Ok((d.d_q, d.d_v))
    }

    pub(super) fn runner(&self, dim: usize) -> Result<Runner> {
        let cpu = self.cpu.map_or_else(Cpu::detect, Ok)?;
        Ok(Runner { scale: self.scale.resolve(dim)?, cpu })
    }

    fn prepare(&self, qk: Shape, v: Shape, buckets: &Buckets) -> Result<Runner> {
        let runner = self.runner(qk.dim)?;
        Attention::new().cpu(runner.cpu).plan(qk, qk, v)?;
        buckets.check(qk)?;
        Ok(runner)
    }

    /// Joins what a row sees of itself, so many times, with what it has seen: its query, key and value. Returns the
    /// weight of itself.
    pub(super) fn join_self<E: Element>(
        &self,
        runner: &Runner,
        [q, k, v]: [&[E]; 3],
        count: usize,
        row: (&mut [E], &mut f32),
    ) -> f32 {
        let logit = self.self_score(runner.scale, q, k) + (count as f32).ln();
        join_rows(runner.cpu.level, row, (v, logit))
    }

    /// Chunks of all rounds of one head, some rows at a time.
    fn parts(&self, sorted: &Sorted, (batch, head): (usize, usize)) -> Heads {
        let Cuts { chunk, apart, .. } = self.cuts;
        let step = (SORTED / chunk).max(1).saturating_mul(chunk);
        let mut parts = vec![];
        for (round, own) in sorted.rounds.iter().enumerate() {
            if apart {
                for bucket in own.chunk_by(|a, b| a.bucket == b.bucket) {
                    for rows in bucket.chunks(chunk).enumerate() {
                        let start = rows.0 * chunk;
                        parts.push(self.part(&bucket[start.saturating_sub(chunk)..start], rows.1));
                    }
                }
                continue;
            }
            for start in (0..own.len()).step_by(step) {
                let before = match start {
                    0 => sorted.last_chunk(sorted.before(round)),
                    start => &own[start - chunk..start],
                };
                let end = start.saturating_add(step).min(own.len());
                parts.push(self.part(before, &own[start..end]));
            }
        }
        Heads { sequences: batch..batch + 1, heads: head..head + 1, parts }
    }

    /// Whole chunks, and the one before them.
    fn part(&self, before: &[Entry], rows: &[Entry]) -> Part {
        let entries: Vec<Entry> = before.iter().chain(rows).copied().collect();
        let tokens = |entries: &[Entry]| entries.iter().map(|entry| entry.token as usize).collect();
        let (queries, keys) = (Listed::sorted(tokens(rows)), Listed::sorted(tokens(&entries)));
        let breaks = |n: &usize| *n == 0 || !entries[*n].follows(entries[*n - 1]);
        let mask = Mask::pattern(Chunks {
            before: before.len(),
            runs: (0..entries.len()).filter(breaks).collect(),
            entries,
            chunk: self.cuts.chunk,
            causal: self.cuts.causal,
            strict: self.cuts.strict,
        });
        Part { queries: Tokens::Listed(queries), keys: Tokens::Listed(keys), mask }
    }

    /// A row's logit with itself.
    fn self_score<E: Element>(&self, scale: f32, q: &[E], k: &[E]) -> f32 {
        let product = || in_lanes(q.iter().zip(k).map(|(q, k)| q.to_f32() * k.to_f32()));
        match self.self_logit {
            SelfLogit::Subtract(penalty) => scale * product() - penalty,
            SelfLogit::Replace(logit) => logit,
        }
    }

    /// What a row's pair with itself adds to gradients: dV += w dO and, where the logit depends on the row,
    /// dS = w (dO · v − dO · O).
    fn self_backward<E: Element>(
        &self,
        scale: f32,
        (inputs, forward, d_out): (Inputs<'_, E, E>, &ReformerForward<E>, TensorRef<'_, E>),
        [b, t, head]: [usize; 3],
        d: &mut Backward<E>,
    ) {
        let weight = forward.self_weight.view().row(b, t, head)[0];
        if weight == 0.0 {
            return;
        }
        let (v, d_out) = (inputs.v.row(b, t, head), d_out.row(b, t, head));
        let out = forward.result.out.view();
        let out = out.row(b, t, head);
        let (mut d_q, mut d_k, mut d_v) = (d.d_q.view_mut(), d.d_k.view_mut(), d.d_v.view_mut());
        let add = |to: &mut [E], from: &[E], by: f32| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = E::from_f32(to.to_f32() + by * from.to_f32());
            }
        };
        add(d_v.row_mut(b, t, head), d_out, weight);
        if matches!(self.self_logit, SelfLogit::Subtract(_)) {
            let terms = d_out.iter().zip(v).zip(out);
            let slope = in_lanes(terms.map(|((d, v), o)| d.to_f32() * (v.to_f32() - o.to_f32())));
            let by = weight * slope * scale;
            add(d_q.row_mut(b, t, head), inputs.k.row(b, t, head), by);
            add(d_k.row_mut(b, t, head), inputs.q.row(b, t, head), by);
        }
    }
}

/// A sum of terms, every eighth in a sum of its own: eight additions don't wait for each other.
fn in_lanes<T: Copy + Default + AddAssign>(terms: impl Iterator<Item = T>) -> T {
    let mut lanes = [T::default(); 8];
    terms.enumerate().for_each(|(n, term)| lanes[n % 8] += term);
    let mut sum = T::default();
    lanes.into_iter().for_each(|lane| sum += lane);
    sum
}

/// Normalised keys and 1 / ‖q‖. A vector of zeros stays one.
pub(super) fn normalised<E: Element>(q: TensorRef<'_, E>) -> Result<(Tensor<E>, Tensor<f32>)> {
    let shape = q.shape();
    let (mut k, mut inverses) = (Tensor::zeros(shape)?, Tensor::zeros(shape.per_row())?);
    for (b, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
        for head in 0..shape.heads {
            let q = q.row(b, t, head);
            let square = in_lanes(q.iter().map(|x| f64::from(x.to_f32()).powi(2)));
            let inverse = if square == 0.0 { 0.0 } else { (1.0 / square.sqrt()) as f32 };
            let mut keys = k.view_mut();
            let row = keys.row_mut(b, t, head).iter_mut().zip(q);
            row.for_each(|(k, q)| *k = E::from_f32(q.to_f32() * inverse));
            inverses.view_mut().row_mut(b, t, head)[0] = inverse;
        }
    }
    Ok((k, inverses))
}

/// dQ += (dK − k (k · dK)) / ‖q‖.
fn through_norm<E: Element>(k: &[E], inverse: f32, [b, t, head]: [usize; 3], d: &mut Backward<E>) {
    let d_k = d.d_k.view();
    let d_k = d_k.row(b, t, head);
    let along = in_lanes(k.iter().zip(d_k).map(|(k, d)| k.to_f32() * d.to_f32()));
    let mut d_q = d.d_q.view_mut();
    for ((to, k), d_k) in d_q.row_mut(b, t, head).iter_mut().zip(k).zip(d_k) {
        *to = E::from_f32(to.to_f32() + (d_k.to_f32() - k.to_f32() * along) * inverse);
    }
}
