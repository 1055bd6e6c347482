//! The computation that attention kernels replace: two matrix products with a softmax between them.
//!
//! ```text
//! for each head:   S = Q Kᵀ     P = softmax_rows(scale · S)     O = P V
//! ```
//!
//! It is as good as its kind gets: scratch is kept, the softmax is vectorised, and products are those of
//! the crate `gemm-f32` with AVX-512, on rows where they lie or on gathered ones, or plain vector loops,
//! whichever is fastest for the shape. Inputs lie as ours do: `[batch, seq, heads, dim]` for prompts, head
//! by head for decoding. Heads go to threads; where there are fewer heads than threads, the products are
//! split. S has a row for all query heads of a group where each has a single query.

use crate::case::{AttentionCase, Phase};
use crate::data::Inputs;
use crate::mask::{MaskSpec, Sight};
use crate::product::{Right, Rows, multiply};
use foveal::{Shape, Tensor};
use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;
use std::f32::consts::{LN_2, LOG2_E};
use std::time::Instant;

/// How matrices are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Products {
    /// By the crate `gemm-f32`, on rows where they lie.
    Gemm,
    /// Likewise, on copies of each head's rows, one after the other.
    Gathered,
    /// By loops over rows, which very small matrices prefer.
    Loops,
}

/// How often products are tried, and for how many seconds each time.
const TRIALS: usize = 7;
const TRIAL: f64 = 1e-3;

/// A case, laid out for the unfused computation.
pub(crate) struct Unfused {
    sight: Sight,
    threads: usize,
    unit: Unit,
    units: usize,
    products: Products,
    arch: Arch,
    q: Heads,
    k: Heads,
    v: Heads,
    /// `[batch, heads, seq, dim]`.
    out: Vec<f32>,
    /// −∞ or 0 for each (query, key), where the mask is not a range.
    bias: Vec<f32>,
    /// An S and gathered rows for each thread.
    scratch: Vec<f32>,
    shape: Shape,
}

/// One product with one key/value head.
#[derive(Debug, Clone, Copy)]
struct Unit {
    rows: usize,
    keys: usize,
    dim: usize,
    /// Units that read the same keys.
    sharing: usize,
}

impl Unit {
    fn scratch(&self) -> usize {
        self.rows * self.keys + (self.rows + 2 * self.keys) * self.dim
    }
}

impl Unfused {
    /// Copies the inputs and finds out which products are faster. `None` if S would be larger than
    /// 1 GiB.
    pub(crate) fn new(case: &AttentionCase, inputs: &Inputs, sight: Sight) -> Option<Unfused> {
        let AttentionCase { seq_q, seq_k, heads, kv_heads, dim, threads, batch, .. } = *case;
        let group = heads / kv_heads;
        let merged = seq_q == 1;
        let unit = Unit {
            rows: if merged { group } else { seq_q },
            keys: seq_k,
            dim,
            sharing: if merged { 1 } else { group },
        };
        let units = batch * if merged { kv_heads } else { heads };
        if unit.rows * unit.keys * threads.min(units) > 1 << 28 {
            return None;
        }
        let mut unfused = Unfused {
            sight,
            threads,
            unit,
            units,
            products: Products::Gemm,
            arch: Arch::new(),
            q: Heads::new(&inputs.q, Phase::Forward),
            k: Heads::new(&inputs.k, case.phase),
            v: Heads::new(&inputs.v, case.phase),
            out: vec![0.0; batch * seq_q * heads * dim],
            bias: bias(&sight),
            scratch: vec![0.0; unit.scratch() * threads.min(units)],
            shape: inputs.q.shape(),
        };
        unfused.choose();
        Some(unfused)
    }

    /// Times the products by turns and keeps the fastest; loops only where they have a chance.
    fn choose(&mut self) {
        let small = self.unit.rows * self.unit.keys <= 1 << 14 || self.unit.rows == 1;
        let all = [Products::Gemm, Products::Gathered, Products::Loops];
        let mut tried = all.map(|products| (products, f64::INFINITY));
        for _ in 0..TRIALS {
            for (products, best) in tried.iter_mut().take(if small { 3 } else { 2 }) {
                self.products = *products;
                *best = best.min(self.seconds());
            }
        }
        let fastest = tried.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b));
        self.products = fastest.map_or(Products::Gemm, |(products, _)| products);
    }

    /// Seconds of one run, of so many that a clock can tell.
    fn seconds(&mut self) -> f64 {
        let (start, mut runs) = (Instant::now(), 0);
        loop {
            self.run();
            runs += 1;
            let seconds = start.elapsed().as_secs_f64();
            if seconds >= TRIAL {
                return seconds / f64::from(runs);
            }
        }
    }

    /// What was chosen.
    pub(crate) fn note(&self) -> String {
        match self.products {
            Products::Gemm => "gemm".to_owned(),
            Products::Gathered => "gemm on gathered heads".to_owned(),
            Products::Loops => "loops".to_owned(),
        }
    }

    /// Computes the output.
    pub(crate) fn run(&mut self) {
        let mut out = std::mem::take(&mut self.out);
        let mut scratch = std::mem::take(&mut self.scratch);
        let workers = self.threads.min(self.units);
        let whole = if workers < self.threads { self.threads } else { 1 };
        let per_worker = self.units.div_ceil(workers);
        let len = self.unit.rows * self.unit.dim;
        let work = |(worker, (out, scratch)): (usize, (&mut [f32], &mut [f32]))| {
            for (n, out) in out.chunks_exact_mut(len).enumerate() {
                self.unit(worker * per_worker + n, (scratch, out), whole);
            }
        };
        if workers == 1 {
            work((0, (&mut out, &mut scratch)));
        } else {
            let outs = out.par_chunks_mut(per_worker * len);
            outs.zip(scratch.par_chunks_mut(self.unit.scratch())).enumerate().for_each(work);
        }
        (self.out, self.scratch) = (out, scratch);
    }

    /// One product with one head, on `threads` threads.
    fn unit(&self, n: usize, (scratch, out): (&mut [f32], &mut [f32]), threads: usize) {
        let Unit { rows, keys, dim, sharing } = self.unit;
        // A merged unit's rows are the heads of a group, one after the other in `[batch, 1, heads, dim]`.
        let q = match self.shape.seq {
            1 => Rows::dense(&self.q.data[n * rows * dim..][..rows * dim], dim),
            _ => self.q.head(n),
        };
        let (k, v) = (self.k.head(n / sharing), self.v.head(n / sharing));
        let scale = 1.0 / (dim as f32).sqrt();
        let (scores, gathered) = scratch.split_at_mut(rows * keys);
        match self.products {
            Products::Gemm => self.product_pair([q, k, v], (scores, out), scale, threads),
            Products::Gathered => {
                let (q_room, rest) = gathered.split_at_mut(rows * dim);
                let (k_room, v_room) = rest.split_at_mut(keys * dim);
                let heads = [q.gather(q_room), k.gather(k_room), v.gather(v_room)];
                self.product_pair(heads, (scores, out), scale, threads);
            }
            Products::Loops => {
                self.arch.dispatch(Loops { case: self, q, k, v, scores, out, scale })
            }
        }
    }

    fn product_pair(
        &self,
        [q, k, v]: [Rows<'_>; 3],
        (scores, out): (&mut [f32], &mut [f32]),
        scale: f32,
        threads: usize,
    ) {
        multiply(q, Right::Transposed(k), scores, threads);
        self.softmax_rows(scores, scale, threads);
        multiply(Rows::dense(scores, self.unit.keys), Right::Plain(v), out, threads);
    }

    fn softmax_rows(&self, scores: &mut [f32], scale: f32, threads: usize) {
        let keys = self.unit.keys;
        if threads == 1 {
            self.arch.dispatch(SoftmaxRows { case: self, first: 0, scores, scale });
        } else {
            let share = self.unit.rows.div_ceil(threads);
            scores.par_chunks_mut(share * keys).enumerate().for_each(|(n, scores)| {
                let first = n * share;
                self.arch.dispatch(SoftmaxRows { case: self, first, scores, scale });
            });
        }
    }

    #[inline(always)]
    fn softmax_row(&self, row: usize, scores: &mut [f32], scale: f32) {
        let i = if self.sight.queries == 1 { 0 } else { row };
        let range = self.sight.range(i);
        if !self.bias.is_empty() {
            let bias = &self.bias[i * scores.len()..];
            scores.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
        }
        scores[..range.start].fill(0.0);
        scores[range.end..].fill(0.0);
        softmax(&mut scores[range], scale);
    }

    /// The output, `[batch, seq, heads, dim]`.
    pub(crate) fn output(&self) -> Vec<f32> {
        let Shape { batch, seq, heads, dim } = self.shape;
        let mut out = Vec::with_capacity(self.out.len());
        for (b, i) in (0..batch).flat_map(|b| (0..seq).map(move |i| (b, i))) {
            for h in 0..heads {
                out.extend_from_slice(&self.out[((b * heads + h) * seq + i) * dim..][..dim]);
            }
        }
        out
    }
}

/// Softmax of rows of S, compiled for the processor's own instructions.
struct SoftmaxRows<'a> {
    case: &'a Unfused,
    /// The number of the first row.
    first: usize,
    scores: &'a mut [f32],
    scale: f32,
}

impl NullaryFnOnce for SoftmaxRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (i, row) in self.scores.chunks_exact_mut(self.case.unit.keys).enumerate() {
            self.case.softmax_row(self.first + i, row, self.scale);
        }
    }
}

/// Everything by loops, compiled for the processor's own instructions.
struct Loops<'a> {
    case: &'a Unfused,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    scores: &'a mut [f32],
    out: &'a mut [f32],
    scale: f32,
}

impl NullaryFnOnce for Loops<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Loops { case, q, k, v, scores, out, scale } = self;
        let Unit { keys, dim, .. } = case.unit;
        for (i, scores) in scores.chunks_exact_mut(keys).enumerate() {
            for (j, score) in scores.iter_mut().enumerate() {
                *score = dot(q.row(i), k.row(j));
            }
        }
        for (i, scores) in scores.chunks_exact_mut(keys).enumerate() {
            case.softmax_row(i, scores, scale);
        }
        for (scores, out) in scores.chunks_exact(keys).zip(out.chunks_exact_mut(dim)) {
            out.fill(0.0);
            for (j, &weight) in scores.iter().enumerate() {
                for (out, &value) in out.iter_mut().zip(v.row(j)) {
                    *out = value.mul_add(weight, *out);
                }
            }
        }
    }
}

/// What is added to scores before the softmax; empty where rows see ranges.
fn bias(sight: &Sight) -> Vec<f32> {
    let MaskSpec::Random(_) = sight.mask else { return Vec::new() };
    let pairs = (0..sight.queries).flat_map(|i| (0..sight.keys).map(move |j| (i, j)));
    pairs.map(|(i, j)| if sight.allows(i, j) { 0.0 } else { f32::NEG_INFINITY }).collect()
}

/// A tensor by heads: `[batch, seq, heads, dim]`, as prompts come, or `[batch, heads, seq, dim]`, as caches
/// lie.
struct Heads {
    data: Vec<f32>,
    shape: Shape,
    phase: Phase,
}

impl Heads {
    fn new(x: &Tensor<f32>, phase: Phase) -> Heads {
        let shape = x.shape();
        let Shape { batch, seq, heads, .. } = shape;
        let rows =
            (0..batch * heads).flat_map(|n| (0..seq).map(move |i| (n / heads, i, n % heads)));
        let view = x.view();
        let data = match phase {
            Phase::Forward | Phase::Backward => x.as_slice().to_vec(),
            Phase::Decode => rows.flat_map(|(b, i, h)| view.row(b, i, h)).copied().collect(),
        };
        Heads { data, shape, phase }
    }

    /// Head `n % heads` of sequence `n / heads`.
    #[inline(always)]
    fn head(&self, n: usize) -> Rows<'_> {
        let Shape { seq, heads, dim, .. } = self.shape;
        let (first, stride) = match self.phase {
            Phase::Forward | Phase::Backward => {
                (n / heads * seq * heads * dim + n % heads * dim, heads * dim)
            }
            Phase::Decode => (n * seq * dim, dim),
        };
        let data = &self.data[first..first + (seq - 1) * stride + dim];
        Rows { data, count: seq, width: dim, stride }
    }
}

const LANES: usize = 16;

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (mut sums, mut rest) = ([0.0f32; LANES], 0.0);
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (x, y) in a.remainder().iter().zip(b.remainder()) {
        rest += x * y;
    }
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    rest + sums.iter().sum::<f32>()
}

#[inline(always)]
fn softmax(row: &mut [f32], scale: f32) {
    let factor = scale * LOG2_E;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let mut largest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    largest = lanes.iter().copied().fold(largest, f32::max);
    let shift = if largest == f32::NEG_INFINITY { 0.0 } else { largest * factor };
    let mut sums = [0.0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp2(x.mul_add(factor, -shift));
            *sum += *x;
        }
    }
    let mut sum = 0.0;
    for x in chunks.into_remainder() {
        *x = exp2(x.mul_add(factor, -shift));
        sum += *x;
    }
    sum += sums.iter().sum::<f32>();
    let reciprocal = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    row.iter_mut().for_each(|x| *x *= reciprocal);
}

/// 2^x for x ≤ 0 to about 2⁻²²; 0 below −126. Cephes' polynomial.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    let bounded = if x > -126.0 { x } else { -126.0 };
    let rounded = bounded + 12_582_912.0;
    let f = bounded - (rounded - 12_582_912.0);
    let mut p = 1.535_336_2e-4_f32;
    for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 0.240_226_48, LN_2, 1.0] {
        p = p.mul_add(f, c);
    }
    let scaled = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x > -126.0 { scaled } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::Expected;

    #[test]
    fn both_products_give_the_definition() {
        let masks = [MaskSpec::Full, MaskSpec::Causal, MaskSpec::Window(3), MaskSpec::Random(128)];
        for (mask, threads) in masks.into_iter().flat_map(|mask| [(mask, 1), (mask, 2)]) {
            for (seq_q, seq_k, phase) in [
                (1, 9, Phase::Decode),
                (9, 9, Phase::Forward),
                (1, 1, Phase::Forward),
                (40, 70, Phase::Forward),
            ] {
                for (heads, kv_heads) in [(1, 1), (6, 2), (3, 1)] {
                    let start = AttentionCase::smallest();
                    let sizes = AttentionCase { phase, seq_q, seq_k, heads, kv_heads, ..start };
                    let case = AttentionCase { batch: 2, dim: 20, mask, threads, ..sizes };
                    let inputs = Inputs::new(&case).unwrap();
                    let sight = Sight { mask, queries: seq_q, keys: seq_k, seed: 3 };
                    let expected = Expected::new(&inputs, &sight);
                    let mut unfused = Unfused::new(&case, &inputs, sight).unwrap();
                    for products in [Products::Gemm, Products::Gathered, Products::Loops] {
                        unfused.products = products;
                        unfused.out.fill(f32::NAN);
                        unfused.run();
                        let checked = expected.check(&unfused.output(), 2e-6);
                        checked.unwrap_or_else(|error| panic!("{case:?} {products:?}: {error}"));
                    }
                }
            }
        }
    }
}
