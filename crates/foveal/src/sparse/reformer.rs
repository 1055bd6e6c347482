//! Reformer: rows see the keys of their own and the previous chunk of tokens sorted by bucket.
//!
//! ```text
//! k_j = q_j / ‖q_j‖                             one projection for queries and keys
//! round r: tokens sorted by (bucket, position), cut into chunks of m; chunk c sees chunks c − 1 and c
//!          (chunk 0 the last one of round r − 1, the first round's of the last round)
//! self:    a row sees itself with a logit that counts only where it sees nothing else
//! out:     one softmax over what all rounds see; a key seen in n rounds counts n times
//! ```
//!
//! Exact given the buckets, which carry no gradient. Sorted tokens are gathered some at a time; rounds, and
//! the row itself, are joined by log-sum-exp. Cost for each query: 2·m keys a round, and sorting. Kitaev et al. 2020,
//! section 2.

use super::lsh::Buckets;
use super::parts::{Heads, Memory, Part, Runner, SORTED, Tokens};
use super::rows::Listed;
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::exact::state::join_rows;
use crate::mask::{Coverage, Mask, Pattern, Site, set_bits};
use crate::plan::{Backward, Inputs, expect};
use crate::problem::{Attention, Forward, Scale};
use crate::tensor::{Shape, Tensor, TensorRef};
use std::ops::Range;

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
    chunk: usize,
    causal: bool,
    strict: bool,
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
        Ok(Reformer { chunk, causal: true, strict: false, self_logit, scale, cpu: None })
    }

    /// Whether keys after the query are hidden.
    pub fn causal(self, causal: bool) -> Reformer {
        Reformer { causal, ..self }
    }

    /// Hides keys of a chunk that are not in the query's bucket.
    pub fn strict_buckets(self) -> Reformer {
        Reformer { strict: true, ..self }
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
        let (layer, buckets) = (*self, buckets.clone());
        let [batch, heads] = buckets.choosers();
        let sites = (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head)));
        let places = sites.map(|site| Sorted::new(&buckets, site, self.chunk).places()).collect();
        Mask::pattern(Definition { layer, buckets, places })
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
            let sorted = Sorted::new(buckets, (b, head), self.chunk);
            if seq > 0 {
                let own = [self.parts(&sorted, (b, head))];
                runner.forward_in(&mut memory, inputs, &own, &mut result)?;
            }
            let counts = sorted.self_counts(self.strict);
            for (t, count) in counts.into_iter().enumerate() {
                let logit =
                    self.self_score(runner.scale, qk.row(b, t, head), k.view().row(b, t, head));
                let (mut out, mut lse) = (result.out.view_mut(), result.lse.view_mut());
                let row = (out.row_mut(b, t, head), &mut lse.row_mut(b, t, head)[0]);
                let own = (v.row(b, t, head), logit + (count as f32).ln());
                let weight = join_rows(runner.cpu.level, row, own);
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
            let sorted = Sorted::new(buckets, (b, head), self.chunk);
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

    fn prepare(&self, qk: Shape, v: Shape, buckets: &Buckets) -> Result<Runner> {
        let cpu = self.cpu.map_or_else(Cpu::detect, Ok)?;
        Attention::new().cpu(cpu).plan(qk, qk, v)?;
        buckets.check(qk)?;
        Ok(Runner { scale: self.scale.resolve(qk.dim)?, cpu })
    }

    /// Chunks of all rounds of one head, some rows at a time.
    fn parts(&self, sorted: &Sorted, (batch, head): (usize, usize)) -> Heads {
        let step = (SORTED / self.chunk).max(1).saturating_mul(self.chunk);
        let mut parts = vec![];
        for round in 0..sorted.rounds.len() {
            for start in (0..sorted.rounds[round].len()).step_by(step) {
                parts.push(self.part(sorted, round, start..start.saturating_add(step)));
            }
        }
        Heads { sequences: batch..batch + 1, heads: head..head + 1, parts }
    }

    /// Whole chunks of one round, and the one before them.
    fn part(&self, sorted: &Sorted, round: usize, rows: Range<usize>) -> Part {
        let own = &sorted.rounds[round];
        let rows = rows.start..rows.end.min(own.len());
        let before = match rows.start {
            0 => sorted.last_chunk(sorted.before(round)),
            start => &own[start - self.chunk..start],
        };
        let entries: Vec<Entry> = before.iter().chain(&own[rows.clone()]).copied().collect();
        let tokens = |entries: &[Entry]| entries.iter().map(|entry| entry.token as usize).collect();
        let (queries, keys) =
            (Listed::sorted(tokens(&own[rows])), Listed::sorted(tokens(&entries)));
        let breaks = |n: &usize| *n == 0 || !entries[*n].follows(entries[*n - 1]);
        let mask = Mask::pattern(Chunks {
            before: before.len(),
            runs: (0..entries.len()).filter(breaks).collect(),
            entries,
            chunk: self.chunk,
            causal: self.causal,
            strict: self.strict,
        });
        Part { queries: Tokens::Listed(queries), keys: Tokens::Listed(keys), mask }
    }

    /// A row's logit with itself.
    fn self_score<E: Element>(&self, scale: f32, q: &[E], k: &[E]) -> f32 {
        let product = || q.iter().zip(k).map(|(q, k)| q.to_f32() * k.to_f32()).sum::<f32>();
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
            let slope: f32 = terms.map(|((d, v), o)| d.to_f32() * (v.to_f32() - o.to_f32())).sum();
            let by = weight * slope * scale;
            add(d_q.row_mut(b, t, head), inputs.k.row(b, t, head), by);
            add(d_k.row_mut(b, t, head), inputs.q.row(b, t, head), by);
        }
    }
}

/// Normalised keys and 1 / ‖q‖. A vector of zeros stays one.
fn normalised<E: Element>(q: TensorRef<'_, E>) -> Result<(Tensor<E>, Tensor<f32>)> {
    let shape = q.shape();
    let (mut k, mut inverses) = (Tensor::zeros(shape)?, Tensor::zeros(shape.per_row())?);
    for (b, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
        for head in 0..shape.heads {
            let q = q.row(b, t, head);
            let square: f64 = q.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
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
    let along: f32 = k.iter().zip(d_k).map(|(k, d)| k.to_f32() * d.to_f32()).sum();
    let mut d_q = d.d_q.view_mut();
    for ((to, k), d_k) in d_q.row_mut(b, t, head).iter_mut().zip(k).zip(d_k) {
        *to = E::from_f32(to.to_f32() + (d_k.to_f32() - k.to_f32() * along) * inverse);
    }
}

/// A token in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    token: u32,
    /// Its bucket and round, as one number.
    bucket: u64,
}

impl Entry {
    /// Whether it is a later token of the same bucket.
    fn follows(self, other: Entry) -> bool {
        self.bucket == other.bucket && self.token > other.token
    }
}

/// The tokens of one head, sorted for each round.
struct Sorted {
    rounds: Vec<Vec<Entry>>,
    chunk: usize,
}

impl Sorted {
    fn new(buckets: &Buckets, (batch, head): (usize, usize), chunk: usize) -> Sorted {
        let round = |round: usize| {
            let entry = |(token, &bucket): (usize, &u32)| Entry {
                token: token as u32,
                bucket: (round as u64) << 32 | u64::from(bucket),
            };
            let own = buckets.of(batch, head, round).iter().enumerate();
            let mut entries: Vec<Entry> = own.map(entry).collect();
            // Tokens ascend, and stay in order within a bucket.
            entries.sort_by_key(|entry| entry.bucket);
            entries
        };
        Sorted { rounds: (0..buckets.rounds()).map(round).collect(), chunk }
    }

    /// The round whose last chunk the first chunk of a round sees.
    fn before(&self, round: usize) -> usize {
        (round + self.rounds.len() - 1) % self.rounds.len()
    }

    fn last_chunk(&self, round: usize) -> &[Entry] {
        let own = &self.rounds[round];
        &own[own.len().saturating_sub(1) / self.chunk * self.chunk..]
    }

    /// Each token's place in each round.
    fn places(&self) -> Vec<Vec<usize>> {
        let round = |own: &Vec<Entry>| {
            let mut places = vec![0; own.len()];
            own.iter().enumerate().for_each(|(place, entry)| places[entry.token as usize] = place);
            places
        };
        self.rounds.iter().map(round).collect()
    }

    /// How often each token sees itself.
    fn self_counts(&self, strict: bool) -> Vec<usize> {
        let mut counts = vec![self.rounds.len(); self.rounds[0].len()];
        for (round, own) in self.rounds.iter().enumerate() {
            let before = self.last_chunk(self.before(round));
            for entry in own.iter().take(self.chunk) {
                let same = |other: &&Entry| {
                    other.token == entry.token && (!strict || other.bucket == entry.bucket)
                };
                counts[entry.token as usize] += before.iter().filter(same).count();
            }
        }
        counts
    }
}

/// Sorted rows in chunks, each of which sees itself and what lies before it; but no row sees its own token.
#[derive(Debug)]
struct Chunks {
    /// The keys; rows are those behind the first `before`.
    entries: Vec<Entry>,
    /// Where runs of ascending tokens of one bucket begin.
    runs: Vec<usize>,
    before: usize,
    chunk: usize,
    causal: bool,
    strict: bool,
}

impl Chunks {
    /// The keys of the chunks that a position sees.
    fn visible(&self, i: isize) -> Range<usize> {
        // A row's position is that of its own entry.
        let entry = usize::try_from(i).ok().filter(|&i| i < self.entries.len());
        let Some(row) = entry.and_then(|i| i.checked_sub(self.before)) else { return 0..0 };
        let own = self.before + row / self.chunk * self.chunk;
        let start = if row < self.chunk { 0 } else { own - self.chunk };
        start..own.saturating_add(self.chunk).min(self.entries.len())
    }

    fn shows(&self, row: Entry, key: Entry) -> bool {
        let other = if self.causal { key.token < row.token } else { key.token != row.token };
        other && (!self.strict || key.bucket == row.bucket)
    }
}

impl Pattern for Chunks {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        self.visible(i).contains(&j) && self.shows(self.entries[i as usize], self.entries[j])
    }

    fn live(
        &self,
        _: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        if rows.is_empty() {
            return;
        }
        let (first, last) = (self.visible(rows.start), self.visible(rows.end - 1));
        let live = first.start.max(keys.start)..last.end.min(keys.end);
        if !live.is_empty() {
            visit(live, Coverage::Partial);
        }
    }

    fn fill(&self, _: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        bits.fill(0);
        let visible = self.visible(i);
        let seen = visible.start.max(keys.start)..visible.end.min(keys.end);
        if seen.is_empty() {
            return;
        }
        let row = self.entries[i as usize];
        let first = self.runs.partition_point(|&start| start <= seen.start) - 1;
        let runs = &self.runs[first..self.runs.partition_point(|&start| start < seen.end)];
        let ends = runs[1..].iter().copied().chain([seen.end]);
        for (&start, end) in runs.iter().zip(ends) {
            let run = start.max(seen.start)..end;
            if self.strict && self.entries[run.start].bucket != row.bucket {
                continue;
            }
            let before = |end: u32| {
                run.start + self.entries[run.clone()].partition_point(|key| key.token < end)
            };
            let own = before(row.token);
            set_bits(bits, run.start - keys.start, own - keys.start);
            if !self.causal {
                set_bits(bits, before(row.token + 1) - keys.start, run.end - keys.start);
            }
        }
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sorted chunks of {}", self.chunk)
    }
}

/// The pairs of all rounds as they are defined.
#[derive(Debug)]
struct Definition {
    layer: Reformer,
    buckets: Buckets,
    /// `[batch · heads][round][token]`.
    places: Vec<Vec<Vec<usize>>>,
}

impl Pattern for Definition {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        let [batch, heads] = self.buckets.choosers();
        let tokens = self.buckets.tokens();
        let Some(i) = usize::try_from(i).ok().filter(|&i| i < tokens && j < tokens) else {
            return false;
        };
        if at.batch >= batch || at.q_head >= heads || self.layer.causal && j > i {
            return false;
        }
        let rounds = &self.places[at.batch * heads + at.q_head];
        let last = (tokens - 1) / self.layer.chunk;
        (0..rounds.len()).any(|round| {
            let before = (round + rounds.len() - 1) % rounds.len();
            let buckets = |round| self.buckets.of(at.batch, at.q_head, round);
            let same = |other| round == other && buckets(round)[i] == buckets(other)[j];
            let shown = |other| !self.layer.strict || same(other);
            let chunk = |round: usize, token: usize| rounds[round][token] / self.layer.chunk;
            let (own, key) = (chunk(round, i), chunk(round, j));
            let wraps = own == 0 && chunk(before, j) == last && shown(before);
            (key == own || key + 1 == own) && shown(round) || wraps
        })
    }
}
