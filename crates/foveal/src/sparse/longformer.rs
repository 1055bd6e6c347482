//! Longformer: a window around each token, and a few global tokens that see all and are seen by all.
//!
//! ```text
//! local rows i     {j : |i − j| ≤ reach · gap, gap divides i − j} ∪ global      q, k, v
//! global rows g    all tokens                                                   q', k', v', projections of their own
//! causal           the same, keys at or before the query
//! ```
//!
//! A band (with a gap: of tokens sorted by residue), a strip of the global keys outside it, gathered once, and the
//! global rows, joined by log-sum-exp; nothing is counted twice. Cost for each query: 2·reach + 1 + global keys, and
//! N for each global row. Beltagy et al. 2020, section 3.

use super::parts::{GATHERED, Heads, Part, Runner, SORTED, Tokens};
use super::rows::{Listed, by_residue};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::{Band, Coverage, Documents, Mask, Pattern, Rising, Site, fill_range};
use crate::plan::{Backward, Inputs, expect};
use crate::problem::{Attention, Forward, Scale};
use crate::tensor::{Shape, TensorRef};
use std::ops::Range;
use std::sync::Arc;

/// Longformer attention.
///
/// ```
/// use foveal::plan::Inputs;
/// use foveal::sparse::Longformer;
/// use foveal::{Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let x = Tensor::<f32>::zeros(Shape { batch: 2, seq: 100, heads: 4, dim: 16 })?;
/// let inputs = Inputs { q: x.view(), k: x.view(), v: x.view() };
/// // 8 keys on each side; the first token of both sequences is global.
/// let layer = Longformer::new(8).global(vec![vec![0]]);
/// let forward = layer.forward(inputs, inputs)?;
/// let [local, global] = layer.backward(inputs, inputs, &forward, x.view())?;
/// assert_eq!([local.d_q.shape(), global.d_q.shape()], [x.shape(); 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Longformer {
    reach: usize,
    causal: bool,
    gaps: Vec<usize>,
    global: Vec<Vec<usize>>,
    lengths: Option<Vec<usize>>,
    scale: Scale,
    cpu: Option<Cpu>,
}

impl Longformer {
    /// A window of `reach` keys on each side of a token (half of the published w) and no global tokens.
    pub fn new(reach: usize) -> Longformer {
        let (gaps, global) = (vec![1], vec![vec![]]);
        let scale = Scale::default();
        Longformer { reach, causal: false, gaps, global, lengths: None, scale, cpu: None }
    }

    /// Hides keys after the query, from global rows as well.
    pub fn causal(self) -> Longformer {
        Longformer { causal: true, ..self }
    }

    /// The distance between neighbouring keys of a window (dilation): one for all query heads, or one for each.
    pub fn gaps(self, gaps: Vec<usize>) -> Longformer {
        Longformer { gaps, ..self }
    }

    /// Positions of global tokens in any order: one list for all sequences, or one for each.
    pub fn global(self, mut global: Vec<Vec<usize>>) -> Longformer {
        for positions in &mut global {
            positions.sort_unstable();
            positions.dedup();
        }
        Longformer { global, ..self }
    }

    /// Tokens of each sequence; what follows is padding: no key, and rows of zeros with log-sum-exp −∞.
    pub fn lengths(self, lengths: Vec<usize>) -> Longformer {
        Longformer { lengths: Some(lengths), ..self }
    }

    /// What scores are multiplied by.
    pub fn scale(self, scale: Scale) -> Longformer {
        Longformer { scale, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> Longformer {
        Longformer { cpu: Some(cpu), ..self }
    }

    /// The pattern as a mask: exact attention with it is [`Longformer::forward`]'s where both projections are the same. It
    /// skips what is far from all windows and global tokens, but keys between those of a window with gaps take time.
    pub fn mask(&self) -> Mask {
        Mask::pattern(Definition(self.clone()))
    }

    /// Self-attention of local rows by `local` and of global rows by `global`, each queries `[B, N, H, Dk]`, keys
    /// `[B, N, KV, Dk]` and values `[B, N, KV, Dv]`. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// Those of [`Attention::plan`]; [`Error::ShapeMismatch`] for inputs of different shapes or other numbers of
    /// queries than keys; [`Error::InvalidParameter`] for a gap of 0 and for lists that are neither one nor one for
    /// each; [`Error::OutOfRange`] for global tokens beyond a sequence's end.
    pub fn forward<E: Element>(
        &self,
        local: Inputs<'_, E, E>,
        global: Inputs<'_, E, E>,
    ) -> Result<Forward<E>> {
        let (runner, [near, far]) = self.prepare(&local, &global)?;
        let mut result = runner.forward(local, &near)?;
        runner.forward_into(global, &far, &mut result)?;
        Ok(result)
    }

    /// Gradients of `local` and of `global`, from what [`Longformer::forward`] was given and gave and the gradient of
    /// its output. Where both are the same tensors, their gradient is the sum. Allocates the results.
    ///
    /// # Errors
    /// Those of [`Longformer::forward`]; [`Error::ShapeMismatch`] for results of another shape.
    pub fn backward<E: Element>(
        &self,
        local: Inputs<'_, E, E>,
        global: Inputs<'_, E, E>,
        forward: &Forward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<[Backward<E>; 2]> {
        let (runner, [near, far]) = self.prepare(&local, &global)?;
        Ok([
            runner.backward(local, forward, d_out, &near)?,
            runner.backward(global, forward, d_out, &far)?,
        ])
    }

    /// Checks everything and chooses the parts that read local and global projections.
    fn prepare<E: Element>(
        &self,
        local: &Inputs<'_, E, E>,
        global: &Inputs<'_, E, E>,
    ) -> Result<(Runner, [Vec<Heads>; 2])> {
        let [q, k, v] = [local.q.shape(), local.k.shape(), local.v.shape()];
        let cpu = self.cpu.map_or_else(Cpu::detect, Ok)?;
        let runner = Runner { scale: self.scale.resolve(q.dim)?, cpu };
        Attention::new().cpu(cpu).plan(q, k, v)?;
        expect("keys of the same tokens as the queries", Shape { seq: q.seq, ..k }, k)?;
        expect("global queries", q, global.q.shape())?;
        expect("global keys", k, global.k.shape())?;
        expect("global values", v, global.v.shape())?;
        self.check(q)?;
        let same = self.global.len() == 1 && self.lengths.is_none();
        let step = if same { q.batch.max(1) } else { 1 };
        let mut all = [vec![], vec![]];
        for start in (0..q.batch).step_by(step) {
            let sequences = start..start + step;
            let span = Sequence {
                length: self.lengths.as_ref().map_or(q.seq, |lengths| lengths[start]),
                global: self.global_of(start).into(),
            };
            let heads = if self.gaps.len() == 1 { q.heads } else { 1 };
            for first in (0..q.heads).step_by(heads.max(1)) {
                let parts = self.local_parts(&span, self.gaps[first.min(self.gaps.len() - 1)]);
                let heads = first..first + heads;
                all[0].push(Heads { sequences: sequences.clone(), heads, parts });
            }
            let (heads, parts) = (0..q.heads, self.global_parts(&span));
            all[1].push(Heads { sequences, heads, parts });
        }
        Ok((runner, all))
    }

    fn check(&self, q: Shape) -> Result<()> {
        let refuse =
            |what, expected, got: String| Err(Error::InvalidParameter { what, expected, got });
        if self.gaps.contains(&0) {
            return refuse("gap between keys of a window", "at least 1", "0".into());
        }
        let fits = |n: usize, all: usize| n == 1 || n == all;
        if !fits(self.gaps.len(), q.heads) {
            let expected = "one gap for all query heads, or one for each";
            return refuse("gaps", expected, self.gaps.len().to_string());
        }
        if !fits(self.global.len(), q.batch) {
            let expected = "one list for all sequences, or one for each";
            return refuse("lists of global tokens", expected, self.global.len().to_string());
        }
        let lengths = self.lengths.as_deref().unwrap_or(&[]);
        if self.lengths.is_some() && lengths.len() != q.batch {
            return refuse("lengths", "one for each sequence", lengths.len().to_string());
        }
        if let Some(&got) = lengths.iter().find(|&&length| length > q.seq) {
            return Err(Error::OutOfRange { what: "length", got, limit: q.seq + 1 });
        }
        for batch in 0..q.batch {
            let limit = lengths.get(batch).copied().unwrap_or(q.seq);
            if let Some(&got) = self.global_of(batch).last().filter(|&&last| last >= limit) {
                return Err(Error::OutOfRange { what: "global token", got, limit });
            }
        }
        Ok(())
    }

    fn global_of(&self, batch: usize) -> &[usize] {
        match &self.global[..] {
            [one] => one,
            each => each.get(batch).map_or(&[], Vec::as_slice),
        }
    }

    /// The window, and global keys outside it, for all rows but the global ones.
    fn local_parts(&self, span: &Sequence, gap: usize) -> Vec<Part> {
        let Sequence { length, global } = span;
        let band = Band {
            behind: Some(self.reach),
            ahead: Some(if self.causal { 0 } else { self.reach }),
        };
        let mut parts = vec![];
        if gap == 1 {
            let mask = Mask::Band(band).and(blind(global.to_vec()));
            parts.push(Part {
                queries: Tokens::Span(0..*length),
                keys: Tokens::Span(0..*length),
                mask,
            });
        } else {
            let step = (SORTED / length.div_ceil(gap).max(1)).max(1);
            for first in (0..gap.min(*length)).step_by(step) {
                let residues = || first..(first + step).min(gap);
                let (rows, starts) = by_residue(0..*length, gap, residues());
                let (keys, _) = by_residue(0..*length, gap, residues());
                let mut hidden: Vec<usize> = rows.places(global).collect();
                hidden.sort_unstable();
                let classes = Documents::new(&starts, &starts).expect("cumulative lengths");
                let mask = Mask::from(classes.within(band)).and(blind(hidden));
                parts.push(Part {
                    queries: Tokens::Listed(rows),
                    keys: Tokens::Listed(keys),
                    mask,
                });
            }
        }
        for start in (0..*length).step_by(GATHERED) {
            let rows = start..(start + GATHERED).min(*length);
            let seen = match self.causal {
                true => global.partition_point(|&g| g < rows.end),
                false => global.len(),
            };
            if seen > 0 {
                let strip = Strip {
                    global: global.clone(),
                    origin: rows.end as isize - seen as isize,
                    near: (self.reach, gap),
                    causal: self.causal,
                };
                let keys = Tokens::Listed(Listed::ascending(global[..seen].to_vec()));
                parts.push(Part { queries: Tokens::Span(rows), keys, mask: Mask::pattern(strip) });
            }
        }
        parts
    }

    /// The global rows.
    fn global_parts(&self, span: &Sequence) -> Vec<Part> {
        let Sequence { length, global } = span;
        if global.is_empty() {
            return vec![];
        }
        let mask = match self.causal {
            true => Mask::pattern(UpTo { rows: global.clone(), keys: *length }),
            false => Mask::Full,
        };
        let queries = Tokens::Listed(Listed::ascending(global.to_vec()));
        vec![Part { queries, keys: Tokens::Span(0..*length), mask }]
    }
}

/// One sequence, or all if they are alike.
struct Sequence {
    length: usize,
    global: Arc<[usize]>,
}

/// Whether key `j` lies in the window of row `i`.
fn near(i: usize, j: usize, (reach, gap): (usize, usize)) -> bool {
    let distance = i.abs_diff(j);
    distance.is_multiple_of(gap) && distance / gap <= reach
}

/// Everything, for all rows but some.
fn blind(rows: Vec<usize>) -> Mask {
    if rows.is_empty() { Mask::Full } else { Mask::pattern(Blind { rows }) }
}

/// Rows that see nothing among rows that see everything.
#[derive(Debug)]
struct Blind {
    /// Ascending.
    rows: Vec<usize>,
}

impl Blind {
    fn holds(&self, i: isize) -> bool {
        usize::try_from(i).is_ok_and(|i| self.rows.binary_search(&i).is_ok())
    }
}

impl Pattern for Blind {
    fn allows(&self, _: Site, i: isize, _: usize) -> bool {
        !self.holds(i)
    }

    fn live(
        &self,
        _: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        let before = |end: isize| self.rows.partition_point(|&row| (row as isize) < end);
        let blind = before(rows.end).saturating_sub(before(rows.start));
        if blind < rows.len() && !keys.is_empty() {
            visit(keys, if blind == 0 { Coverage::Full } else { Coverage::Partial });
        }
    }

    fn fill(&self, _: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(if self.holds(i) { 0..0 } else { keys.clone() }, keys, bits);
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "all rows but {}", self.rows.len())
    }
}

/// Global keys that are not in a row's window; global rows see none.
#[derive(Debug)]
struct Strip {
    global: Arc<[usize]>,
    /// What is added to a position among the gathered keys to have that among all tokens.
    origin: isize,
    near: (usize, usize),
    causal: bool,
}

impl Pattern for Strip {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        let Ok(i) = usize::try_from(i + self.origin) else { return false };
        let Some(&global) = self.global.get(j) else { return false };
        let seen = global <= i || !self.causal;
        seen && !near(i, global, self.near) && self.global.binary_search(&i).is_err()
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} global keys outside windows", self.global.len())
    }
}

/// Gathered rows that see the keys up to their own token.
#[derive(Debug)]
struct UpTo {
    rows: Arc<[usize]>,
    keys: usize,
}

impl Rising for UpTo {
    fn visible(&self, _: Site, i: isize) -> Range<usize> {
        let row = i.saturating_add_unsigned(self.rows.len()).saturating_sub_unsigned(self.keys);
        let row = usize::try_from(row).ok().and_then(|row| self.rows.get(row));
        0..row.map_or(0, |&row| row + 1)
    }

    fn words(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} gathered rows, causal", self.rows.len())
    }
}

/// The index sets as they are defined.
#[derive(Debug)]
struct Definition(Longformer);

impl Pattern for Definition {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        let Longformer { reach, causal, gaps, lengths, .. } = &self.0;
        let Ok(i) = usize::try_from(i) else { return false };
        let Some(&gap) = gaps.get(if gaps.len() == 1 { 0 } else { at.q_head }) else {
            return false;
        };
        let length = lengths.as_ref().and_then(|lengths| lengths.get(at.batch).copied());
        let there = length.is_none_or(|length| i < length && j < length);
        let global = self.0.global_of(at.batch);
        let is_global = |x: usize| global.binary_search(&x).is_ok();
        let seen = near(i, j, (*reach, gap)) || is_global(i) || is_global(j);
        there && seen && (j <= i || !causal)
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        let global = self.0.global_of(at.batch);
        let row = |x: &usize| isize::try_from(*x).is_ok_and(|x| rows.contains(&x));
        let gap = self.0.gaps.get(if self.0.gaps.len() == 1 { 0 } else { at.q_head });
        let far = isize::try_from(self.0.reach.saturating_mul(gap.copied().unwrap_or(0)));
        let far = far.unwrap_or(isize::MAX);
        let ahead = if self.0.causal { 0 } else { far };
        let place = |x: isize| usize::try_from(x).unwrap_or(0).clamp(keys.start, keys.end);
        let near = match global.iter().any(row) {
            true => keys.clone(),
            false => place(rows.start.saturating_sub(far))..place(rows.end.saturating_add(ahead)),
        };
        let strip = |x: &&usize| keys.contains(*x);
        let before = global.iter().filter(strip).filter(|x| **x < near.start);
        before.for_each(|&x| visit(x..x + 1, Coverage::Partial));
        if !near.is_empty() && !rows.is_empty() {
            visit(near.clone(), Coverage::Partial);
        }
        let after = global.iter().filter(strip).filter(|x| **x >= near.end.max(near.start));
        after.for_each(|&x| visit(x..x + 1, Coverage::Partial));
    }

    fn same_for_all_heads(&self) -> bool {
        self.0.gaps.len() == 1
    }
}
