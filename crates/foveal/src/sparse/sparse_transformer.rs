//! The Sparse Transformer's two patterns, each the union of two sets of about √N keys.
//!
//! ```text
//! strided   A¹(i) = {i − l, …, i}  (l + 1 keys; in the released code l)    A²(i) = {j ≤ i : (i − j) mod l = 0}
//! fixed     A¹(i) = {j ≤ i : ⌊j/l⌋ = ⌊i/l⌋}        A²(i) = {j ≤ i : j mod l ∈ {l − (s+1)c, …, l − sc − 1}}
//! heads see A¹ ∪ A² (merged), or even heads A¹ and odd ones A² (per head), or even layers A¹ and odd ones A²
//! ```
//!
//! Strided: a band, and the tokens sorted by residue, so that each residue class is a causal run; what the band
//! holds is left out of the classes. Fixed: blocks side by side, and a strip of the summary columns, gathered once,
//! of earlier blocks. Cost for each query: l/2 or l + N/(2l) keys (strided), l/2 + c·N/(2l) (fixed); with l ≈ √N
//! that is O(N√N) a head. Child et al. 2019, sections 4.2 and 4.3; `num_verts` as in its released kernels.

use super::parts::{GATHERED, Heads, Part, Runner, SORTED, Tokens};
use super::pattern::{Segments, Stairs, blocks};
use super::rows::{Listed, by_residue};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::{Mask, Pattern, Site};
use crate::plan::{Backward, Inputs};
use crate::problem::{Attention, Forward, Scale};
use crate::tensor::TensorRef;

/// How many near keys A¹ of the strided pattern holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Window {
    /// `i − l ..= i`: l + 1 keys, as published.
    #[default]
    Paper,
    /// `i − l + 1 ..= i`: l keys, as in the released code.
    Code,
}

/// Which columns of each block are a head's summary, counted in sub-blocks of `summary` from the block's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubBlocks {
    /// The same for all heads; 0 is the last.
    Same(usize),
    /// Head `h` uses `h mod n`, so that n heads summarise a block at n places (`num_verts`).
    Cycle(usize),
}

/// The pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factors {
    /// Near tokens, and each `stride`-th one before.
    Strided {
        /// l.
        stride: usize,
        /// Keys of the near part.
        window: Window,
    },
    /// The own block, and some columns of all blocks.
    Fixed {
        /// l, the tokens of a block.
        stride: usize,
        /// c, the columns of a summary.
        summary: usize,
        /// Where they lie.
        sub_blocks: SubBlocks,
    },
}

/// Which of the two sets a head sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Combine {
    /// Their union.
    #[default]
    Merged,
    /// Even heads see A¹, odd heads A².
    PerHead,
    /// All heads see A¹ in even layers and A² in odd ones.
    Interleaved {
        /// The layer's number, from 0.
        layer: usize,
    },
}

/// What parts are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Forward,
    Backward,
}

/// Rows whose near keys are packed together.
const NEAR: usize = 2048;

/// What one head sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sees {
    pub(super) first: bool,
    pub(super) second: bool,
    /// The first summary column's place in a block.
    pub(super) column: usize,
}

/// Sparse Transformer attention: each row sees about 2√N keys at or before it.
///
/// ```
/// use foveal::plan::Inputs;
/// use foveal::sparse::SparseTransformer;
/// use foveal::{Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 4, dim: 16 })?;
/// let inputs = Inputs { q: x.view(), k: x.view(), v: x.view() };
/// let layer = SparseTransformer::fixed(10, 2)?;
/// let forward = layer.forward(inputs)?;
/// let gradients = layer.backward(inputs, &forward, x.view())?;
/// assert_eq!(gradients.d_q.shape(), x.shape());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct SparseTransformer {
    pub(super) factors: Factors,
    pub(super) combine: Combine,
    scale: Scale,
    cpu: Option<Cpu>,
}

impl SparseTransformer {
    /// A pattern whose two sets are merged in every head.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless 1 ≤ c ≤ l, and all sub-blocks lie within a block.
    pub fn new(factors: Factors) -> Result<SparseTransformer> {
        check(factors)?;
        let (combine, scale) = (Combine::default(), Scale::default());
        Ok(SparseTransformer { factors, combine, scale, cpu: None })
    }

    /// The strided pattern with the published window.
    ///
    /// # Errors
    /// Those of [`SparseTransformer::new`].
    pub fn strided(stride: usize) -> Result<SparseTransformer> {
        SparseTransformer::new(Factors::Strided { stride, window: Window::default() })
    }

    /// The fixed pattern with the last `summary` columns of each block for all heads.
    ///
    /// # Errors
    /// Those of [`SparseTransformer::new`].
    pub fn fixed(stride: usize, summary: usize) -> Result<SparseTransformer> {
        SparseTransformer::new(Factors::Fixed { stride, summary, sub_blocks: SubBlocks::Same(0) })
    }

    /// Which set a head sees.
    pub fn combine(self, combine: Combine) -> SparseTransformer {
        SparseTransformer { combine, ..self }
    }

    /// What scores are multiplied by.
    pub fn scale(self, scale: Scale) -> SparseTransformer {
        SparseTransformer { scale, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> SparseTransformer {
        SparseTransformer { cpu: Some(cpu), ..self }
    }

    /// The same pattern as a mask, for looking at it: exact attention with it takes the time of full attention.
    pub fn mask(&self) -> Mask {
        Mask::pattern(Definition { factors: self.factors, combine: self.combine })
    }

    /// Attention of queries `[B, T, H, Dk]` to keys `[B, S, KV, Dk]` and values `[B, S, KV, Dv]`; query `i` is at
    /// position `i + S − T`. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// Those of [`Attention::plan`].
    pub fn forward<E: Element>(&self, inputs: Inputs<'_, E, E>) -> Result<Forward<E>> {
        let (runner, heads) = self.prepare(&inputs, Way::Forward)?;
        runner.forward(inputs, &heads)
    }

    /// Gradients from what [`SparseTransformer::forward`] was given and gave, and the gradient of its output
    /// `[B, T, H, Dv]`. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// Those of [`Attention::plan`]; [`Error::ShapeMismatch`] for results of another shape.
    pub fn backward<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        forward: &Forward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<Backward<E>> {
        let (runner, heads) = self.prepare(&inputs, Way::Backward)?;
        runner.backward(inputs, forward, d_out, &heads)
    }

    pub(super) fn runner(&self, dim: usize) -> Result<Runner> {
        let cpu = self.cpu.map_or_else(Cpu::detect, Ok)?;
        Ok(Runner { scale: self.scale.resolve(dim)?, cpu })
    }

    /// Checks the shapes and chooses the parts of all heads.
    pub(super) fn prepare<E: Element>(
        &self,
        inputs: &Inputs<'_, E, E>,
        way: Way,
    ) -> Result<(Runner, Vec<Heads>)> {
        let [q, k, v] = [inputs.q.shape(), inputs.k.shape(), inputs.v.shape()];
        let runner = self.runner(q.dim)?;
        Attention::new().cpu(runner.cpu).plan(q, k, v)?;
        let lengths = [q.seq, k.seq];
        let sees = |head| self.sees(head);
        if (1..q.heads).all(|head| sees(head) == sees(0)) {
            let parts = self.parts(sees(0), lengths, way);
            return Ok((runner, vec![Heads { sequences: 0..q.batch, heads: 0..q.heads, parts }]));
        }
        let each = |head| {
            let parts = self.parts(sees(head), lengths, way);
            Heads { sequences: 0..q.batch, heads: head..head + 1, parts }
        };
        Ok((runner, (0..q.heads).map(each).collect()))
    }

    /// What a head sees.
    pub(super) fn sees(&self, head: usize) -> Sees {
        sees(self.factors, self.combine, head)
    }

    fn parts(&self, sees: Sees, lengths: [usize; 2], way: Way) -> Vec<Part> {
        let second = match self.factors {
            _ if !sees.second => vec![],
            Factors::Strided { stride, window } => {
                // Members of a class that the band holds.
                let skip = if sees.first { (near(stride, window) - 1) / stride + 1 } else { 0 };
                classes(lengths, stride, skip, SORTED)
            }
            Factors::Fixed { stride, summary, .. } => strips(lengths, (stride, summary), sees),
        };
        let first = if sees.first { self.near_parts(lengths, way) } else { vec![] };
        first.into_iter().chain(second).collect()
    }

    /// A¹: forward some rows at a time, so that what is packed for them stays in cache; backward all, whose gradients need
    /// not be added up then.
    fn near_parts(&self, [queries, keys]: [usize; 2], way: Way) -> Vec<Part> {
        let (unseeing, step) = match way {
            Way::Forward => (queries.saturating_sub(keys), NEAR),
            Way::Backward => (0, queries.max(1)),
        };
        let part = |start: usize| {
            let rows = start..start.saturating_add(step).min(queries);
            let position = |row: usize| (row + keys).saturating_sub(queries);
            // Backward takes all keys where they lie.
            let first = if way == Way::Forward { position(rows.start) } else { 0 };
            let end = position(rows.end);
            let (from, mask) = match self.factors {
                Factors::Strided { stride, window } => {
                    let width = near(stride, window);
                    ((first + 1).saturating_sub(width), Mask::window(width))
                }
                Factors::Fixed { stride, .. } => {
                    let from = first / stride * stride;
                    (from, blocks([rows.len(), end - from], stride))
                }
            };
            Part { queries: Tokens::Span(rows), keys: Tokens::Span(from..end), mask }
        };
        (unseeing..queries).step_by(step).map(part).collect()
    }
}

/// Keys of the near part.
pub(super) fn near(stride: usize, window: Window) -> usize {
    match window {
        Window::Paper => stride.saturating_add(1),
        Window::Code => stride,
    }
}

fn sees(factors: Factors, combine: Combine, head: usize) -> Sees {
    let [first, second] = match combine {
        Combine::Merged => [true, true],
        Combine::PerHead => [head.is_multiple_of(2), !head.is_multiple_of(2)],
        Combine::Interleaved { layer } => [layer.is_multiple_of(2), !layer.is_multiple_of(2)],
    };
    let column = match factors {
        Factors::Strided { .. } => 0,
        Factors::Fixed { stride, summary, sub_blocks } => {
            let n = match sub_blocks {
                SubBlocks::Same(n) => n,
                SubBlocks::Cycle(n) => head % n,
            };
            stride - (n + 1) * summary
        }
    };
    // Heads that only see A¹ differ in nothing.
    Sees { first, second, column: if second { column } else { 0 } }
}

fn check(factors: Factors) -> Result<()> {
    let refuse = |what, expected, got: usize| {
        Err(Error::InvalidParameter { what, expected, got: got.to_string() })
    };
    let (Factors::Strided { stride, .. } | Factors::Fixed { stride, .. }) = factors;
    if stride == 0 {
        return refuse("the Sparse Transformer's stride l", "at least 1", stride);
    }
    let Factors::Fixed { summary, sub_blocks, .. } = factors else { return Ok(()) };
    if !(1..=stride).contains(&summary) {
        let expected = "1 to the stride l: the summary columns are columns of a block";
        return refuse("the Sparse Transformer's summary width c", expected, summary);
    }
    let fit = stride / summary;
    match sub_blocks {
        SubBlocks::Same(n) if n >= fit => {
            let expected = "less than l / c: sub-blocks of c columns lie within a block of l";
            refuse("the Sparse Transformer's sub-block", expected, n)
        }
        SubBlocks::Cycle(n) if !(1..=fit).contains(&n) => {
            let expected =
                "1 to l / c: sub-blocks of c columns lie side by side within a block of l";
            refuse("the Sparse Transformer's number of sub-blocks", expected, n)
        }
        _ => Ok(()),
    }
}

/// Tokens sorted by residue, as many classes at a time as have `together` tokens, one at least; rows see what is at least
/// `skip` places before them in their class.
pub(super) fn classes(
    [queries, keys]: [usize; 2],
    stride: usize,
    skip: usize,
    together: usize,
) -> Vec<Part> {
    // The first query whose position is not negative, and its position.
    let (row, position) = (queries.saturating_sub(keys), keys.saturating_sub(queries));
    let longest = keys.div_ceil(stride);
    if longest <= skip {
        return vec![];
    }
    let step = (together / longest).max(1);
    let waves = (0..stride.min(keys)).step_by(step);
    let wave = |first: usize| {
        let residues = first..(first + step).min(stride).min(keys);
        let (own, rows) = by_residue(position..keys, stride, residues.clone());
        let (all, starts) = by_residue(0..keys, stride, residues);
        let own = own.map(|p| p - position + row);
        let mask = Mask::pattern(Segments { rows, keys: starts, skip });
        Part { queries: Tokens::Listed(own), keys: Tokens::Listed(all), mask }
    };
    waves.map(wave).filter(|part| !part.queries.is_empty()).collect()
}

/// The summary columns for some rows at a time, of earlier blocks only where rows see their own block as a whole.
pub(super) fn strips(
    [queries, keys]: [usize; 2],
    (stride, width): (usize, usize),
    sees: Sees,
) -> Vec<Part> {
    let Sees { first: merged, column, .. } = sees;
    let strip = |start: usize| {
        let rows = start..(start + GATHERED).min(queries);
        // What the last of them sees.
        let last = (rows.end + keys).saturating_sub(queries);
        let end = if merged { last.saturating_sub(1) / stride * stride } else { last };
        let starts = (column..end).step_by(stride);
        let tokens: Vec<usize> =
            starts.flat_map(|start| start..start.saturating_add(width).min(end)).collect();
        let origin = last as isize - tokens.len() as isize;
        let own = (!merged).then_some(column);
        let mask = Mask::pattern(Stairs { stride, width, own, origin });
        let keys = Tokens::Listed(Listed::ascending(tokens));
        Part { queries: Tokens::Span(rows), keys, mask }
    };
    (0..queries).step_by(GATHERED).map(strip).filter(|part| !part.keys.is_empty()).collect()
}

/// The index sets as they are defined.
#[derive(Debug)]
struct Definition {
    factors: Factors,
    combine: Combine,
}

impl Pattern for Definition {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        let Some(distance) = usize::try_from(i).ok().and_then(|i| i.checked_sub(j)) else {
            return false;
        };
        let sees = sees(self.factors, self.combine, at.q_head);
        let (first, second) = match self.factors {
            Factors::Strided { stride, window } => {
                (distance < near(stride, window), distance.is_multiple_of(stride))
            }
            Factors::Fixed { stride, summary, .. } => {
                let place = j % stride;
                let column = (sees.column..sees.column + summary).contains(&place);
                ((j + distance) / stride == j / stride, column)
            }
        };
        sees.first && first || sees.second && second
    }

    fn same_for_all_heads(&self) -> bool {
        let cycles = |factors| matches!(factors, Factors::Fixed { sub_blocks: SubBlocks::Cycle(n), .. } if n > 1);
        self.combine != Combine::PerHead && !cycles(self.factors)
    }
}
