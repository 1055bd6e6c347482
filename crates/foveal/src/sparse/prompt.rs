//! Prompts: all rows of a call at once, from a state and behind what it holds.
//!
//! ```text
//! row i sees what it sees token by token        queries [1, n, H, Dk], positions p … p + n − 1
//! keys = what the state holds, then the call's  each part's keys at places that only the text's positions say
//! ```
//!
//! The kernels are those of prompts, so that a row's bits differ from those of a generated one; but they are the same however
//! the prompt is cut into calls: a window's keys begin at a multiple of 256 of the text, a block's and a residue class's at its
//! first token, summaries at the first block's, and parts are joined in the same order for a row whatever is beside it.

use super::held::Held;
use super::parts::{Heads, Part, Tokens};
use super::sparse_transformer::{Sees, classes, strips};
use super::state::{Columns, Keep, SparseState};
use crate::element::Element;
use crate::error::Result;
use crate::mask::Mask;
use crate::plan::{Inputs, expect};
use crate::problem::Forward;
use crate::tensor::{Shape, Tensor, TensorRef};
use std::ops::Range;

/// Keys of a window begin at multiples of this: a tile.
const TILE: usize = 256;

impl<E: Element> Held<E> {
    /// The positions of a call's rows behind so many tokens, if keys, values and queries fit.
    pub(super) fn rows_of(
        &self,
        tokens: usize,
        Inputs { q, k, v }: Inputs<'_, E, E>,
    ) -> Result<Range<usize>> {
        let count = self.check(k.shape(), v.shape())?;
        let shape =
            Shape { batch: 1, seq: count, heads: self.shape.heads, dim: self.shape.key_dim };
        expect("queries of the tokens to append", shape, q.shape())?;
        Ok(tokens..tokens + count)
    }

    /// All keys and values.
    pub(super) fn all<'a>(&'a self, q: TensorRef<'a, E>) -> Result<Inputs<'a, E, E>> {
        let [key_dim, value_dim] = [self.shape.key_dim, self.shape.value_dim];
        let shape = Shape { batch: 1, seq: self.entries(), heads: self.shape.kv_heads, dim: 0 };
        let k = TensorRef::new(&self.keys, Shape { dim: key_dim, ..shape })?;
        let v = TensorRef::new(&self.values, Shape { dim: value_dim, ..shape })?;
        Ok(Inputs { q, k, v })
    }

    /// Of a state of the newest `width` tokens, token t at t mod `width`: the keys and values that rows can see, their own
    /// included, from a multiple of a tile on. What no row can see is zero.
    pub(super) fn newest(
        &self,
        width: usize,
        rows: Range<usize>,
        own: [TensorRef<'_, E>; 2],
    ) -> Result<[Tensor<E>; 2]> {
        let low = (rows.start + 1).saturating_sub(width);
        let start = low / TILE * TILE;
        let held = [&self.keys, &self.values].into_iter().zip(self.widths());
        let tensors = held.zip(own).map(|((held, numbers), own)| {
            let shape = Shape { seq: rows.end - start, ..own.shape() };
            let mut data = Vec::with_capacity((rows.end - start) * numbers);
            data.resize((low - start) * numbers, E::default());
            for t in low..rows.start {
                let at = t % width * numbers;
                data.extend_from_slice(&held[at..at + numbers]);
            }
            for (t, head) in
                (0..rows.len()).flat_map(|t| (0..shape.heads).map(move |head| (t, head)))
            {
                data.extend_from_slice(own.row(0, t, head));
            }
            Tensor::from_vec(data, shape)
        });
        let mut tensors = tensors.collect::<Result<Vec<_>>>()?.into_iter();
        Ok([0; 2].map(|_| tensors.next().expect("keys and values")))
    }
}

/// The own blocks of rows at some positions, one part each; `entry` says where a token lies.
pub(super) fn block_parts(
    rows: &Range<usize>,
    block: usize,
    entry: impl Fn(usize) -> usize,
) -> Vec<Part> {
    let mut parts = vec![];
    let mut first = rows.start;
    while first < rows.end {
        let start = first / block * block;
        let end = start.saturating_add(block).min(rows.end);
        parts.push(Part {
            queries: Tokens::Span(first - rows.start..end - rows.start),
            keys: Tokens::Span(entry(start)..entry(end - 1) + 1),
            mask: Mask::causal(),
        });
        first = end;
    }
    parts
}

impl<E: Element> SparseState<E> {
    /// Appends the tokens of a prompt, keys `[1, n, KV, Dk]` and values `[1, n, KV, Dv]`, and attends with all of their
    /// queries, `[1, n, H, Dk]`. However a prompt is cut into such calls, the bits are the same. Allocates the result and
    /// what is gathered.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`]; the state is unchanged then.
    pub fn prompt(&mut self, inputs: Inputs<'_, E, E>) -> Result<Forward<E>> {
        let rows = self.held.rows_of(self.tokens, inputs)?;
        let Inputs { q, k, v } = inputs;
        let runner = self.held.runner;
        match self.keep.clone() {
            Keep::Newest { width } => {
                let [keys, values] = self.held.newest(width, rows.clone(), [k, v])?;
                self.append(k, v)?;
                let parts = vec![Part {
                    queries: Tokens::Span(0..rows.len()),
                    keys: Tokens::Span(0..keys.shape().seq),
                    mask: Mask::window(width),
                }];
                let heads = Heads { sequences: 0..1, heads: 0..self.held.shape.heads, parts };
                runner.forward(Inputs { q, k: keys.view(), v: values.view() }, &[heads])
            }
            Keep::All { stride, width } => {
                self.append(k, v)?;
                let heads = self.each_head(|sees| strided_parts(&rows, (stride, width), sees));
                runner.forward(self.held.all(q)?, &heads)
            }
            Keep::Summaries { columns, block } => {
                let layout = self.lay_out(&rows, [k, v], (columns, block));
                let heads = self.each_head(|sees| layout.parts(&rows, sees));
                let result = runner.forward(self.held.all(q)?, &heads)?;
                self.summarise_blocks(&layout, rows.end);
                Ok(result)
            }
        }
    }

    /// The parts of all heads, or of each.
    fn each_head(&self, parts: impl Fn(Sees) -> Vec<Part>) -> Vec<Heads> {
        let all = self.held.shape.heads;
        let step = if self.sees.len() == 1 { all } else { 1 };
        let own = |(n, &sees): (usize, &Sees)| Heads {
            sequences: 0..1,
            heads: n * step..(n + 1) * step,
            parts: parts(sees),
        };
        self.sees.iter().enumerate().map(own).collect()
    }

    /// Appends tokens as they are, so that a call's rows find finished blocks' columns, and everything behind them.
    fn lay_out(
        &mut self,
        rows: &Range<usize>,
        token_of: [TensorRef<'_, E>; 2],
        (columns, block): (Columns, bool),
    ) -> Layout {
        if block && rows.start > 0 && rows.start.is_multiple_of(columns.stride) && !rows.is_empty()
        {
            self.summarise(&columns);
        }
        for (t, position) in rows.clone().enumerate() {
            if block || columns.any_holds(position % columns.stride) {
                self.held.write(self.held.entries(), token_of, t);
            }
        }
        self.tokens = rows.end;
        Layout { finished: rows.start / columns.stride, columns, block }
    }

    /// Keeps the columns of the blocks that have ended.
    fn summarise_blocks(&mut self, layout: &Layout, end: usize) {
        let Layout { columns, finished, block } = layout;
        let open = end.saturating_sub(1) / columns.stride;
        if !block || open <= *finished {
            return;
        }
        let kept: Vec<usize> = (*finished..open)
            .flat_map(|n| columns.of_block(n))
            .chain(open * columns.stride..end)
            .map(|position| layout.entry(position))
            .collect();
        let first = finished * columns.count();
        let widths = self.held.widths();
        for (data, width) in [&mut self.held.keys, &mut self.held.values].into_iter().zip(widths) {
            for (to, from) in (first..).zip(&kept) {
                data.copy_within(from * width..(from + 1) * width, to * width);
            }
            data.truncate((first + kept.len()) * width);
        }
    }
}

/// The near part, and each residue class that has a row.
fn strided_parts(rows: &Range<usize>, (stride, width): (usize, usize), sees: Sees) -> Vec<Part> {
    let start = (rows.start + 1).saturating_sub(width) / TILE * TILE;
    let near = sees.first.then(|| Part {
        queries: Tokens::Span(0..rows.len()),
        keys: Tokens::Span(start..rows.end),
        mask: Mask::window(width),
    });
    let skip = if sees.first { (width - 1) / stride + 1 } else { 0 };
    let far = sees.second.then(|| classes([rows.len(), rows.end], stride, skip, 1));
    near.into_iter().chain(far.into_iter().flatten()).collect()
}

/// Where tokens lie: of finished blocks only columns, of later ones all, or only columns of any.
struct Layout {
    columns: Columns,
    block: bool,
    /// Blocks of which only columns are held.
    finished: usize,
}

impl Layout {
    fn entry(&self, position: usize) -> usize {
        let Columns { stride, .. } = self.columns;
        let (block, place) = (position / stride, position % stride);
        if self.block && block >= self.finished {
            return self.finished * self.columns.count() + position - self.finished * stride;
        }
        block * self.columns.count() + self.columns.index(place)
    }

    fn parts(&self, rows: &Range<usize>, sees: Sees) -> Vec<Part> {
        let Columns { stride, summary, .. } = self.columns;
        let mut parts = vec![];
        if sees.first {
            parts.extend(block_parts(rows, stride, |position| self.entry(position)));
        }
        if sees.second {
            for part in strips([rows.len(), rows.end], (stride, summary), sees) {
                let Tokens::Listed(listed) = part.keys else { continue };
                let keys = Tokens::Listed(listed.map(|position| self.entry(position)));
                parts.push(Part { keys, ..part });
            }
        }
        parts
    }
}
