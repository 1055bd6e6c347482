//! Token by token: what later queries can see, and no more.
//!
//! ```text
//! fixed      c·⌊t/l⌋ summaries of finished blocks, and the t mod l + 1 tokens of the own one      ≤ l + c·⌊t/l⌋
//! strided    all t + 1 tokens; a query reads the near ones and one in l of the others
//! A¹ alone   of strided: the l + 1 (or l) newest tokens
//! ```
//!
//! for a query at position t, and each sub-block of columns that some head has. Keys that lie as they are read need
//! no mask; where heads differ, the fixed pattern masks what its heads share. Child et al. 2019.

use super::held::{Held, Stepped};
use super::sparse_transformer::{Factors, Sees, SparseTransformer, near};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::{Mask, Pattern, Site};
use crate::problem::Forward;
use crate::tensor::TensorRef;
use std::sync::Arc;

/// Heads and dims of a layer whose tokens are made one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateHeads {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers of a key.
    pub key_dim: usize,
    /// Numbers of a value.
    pub value_dim: usize,
}

/// Keys and values of one sequence, as far as later queries can see them.
///
/// ```
/// use foveal::sparse::{SparseTransformer, StateHeads};
/// use foveal::{Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let heads = StateHeads { heads: 4, kv_heads: 2, key_dim: 16, value_dim: 16 };
/// let mut state = SparseTransformer::fixed(10, 2)?.state(heads)?;
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 1, heads: 4, dim: 16 })?;
/// let prompt = Tensor::<f32>::zeros(Shape { batch: 1, seq: 95, heads: 2, dim: 16 })?;
/// state.append(prompt.view(), prompt.view())?;
/// assert_eq!(state.attend(q.view())?.out.shape(), q.shape());
/// assert_eq!((state.tokens(), state.entries()), (95, 9 * 2 + 5));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SparseState<E> {
    pub(super) held: Held<E>,
    pub(super) keep: Keep,
    /// What each query head sees; one for all if they agree.
    pub(super) sees: Vec<Sees>,
    /// Tokens appended.
    pub(super) tokens: usize,
}

/// Which tokens are held, and where.
#[derive(Debug, Clone)]
pub(super) enum Keep {
    /// The newest ones, token t at t mod `width`.
    Newest { width: usize },
    /// All, in order.
    All { stride: usize, width: usize },
    /// Columns of finished blocks in order, then the own block.
    Summaries { columns: Columns, block: bool },
}

impl SparseTransformer {
    /// A state that has seen nothing.
    ///
    /// # Errors
    /// Those of [`crate::Attention::plan_decode`].
    pub fn state<E: Element>(&self, shape: StateHeads) -> Result<SparseState<E>> {
        let held = Held::new(self.runner(shape.key_dim)?, shape)?;
        let mut sees: Vec<Sees> = (0..shape.heads).map(|head| self.sees(head)).collect();
        let keep = keep(self.factors, &sees);
        if sees.windows(2).all(|pair| pair[0] == pair[1]) {
            sees.truncate(1);
        }
        Ok(SparseState { held, keep, sees, tokens: 0 })
    }
}

/// What has to be held for heads that see this.
fn keep(factors: Factors, sees: &[Sees]) -> Keep {
    match factors {
        Factors::Strided { stride, window } => {
            let width = near(stride, window);
            match sees.iter().any(|sees| sees.second) {
                true => Keep::All { stride, width },
                false => Keep::Newest { width },
            }
        }
        Factors::Fixed { stride, summary, .. } => {
            let mut starts: Vec<usize> =
                sees.iter().filter(|sees| sees.second).map(|sees| sees.column).collect();
            starts.sort_unstable();
            starts.dedup();
            let columns = Columns { stride, summary, starts: starts.into() };
            Keep::Summaries { columns, block: sees.iter().any(|sees| sees.first) }
        }
    }
}

/// The columns of a block that are in some head's summary: `summary` neighbouring ones from each start.
#[derive(Debug, Clone)]
pub(super) struct Columns {
    pub(super) stride: usize,
    pub(super) summary: usize,
    starts: Arc<[usize]>,
}

impl Columns {
    /// Columns of a block.
    pub(super) fn count(&self) -> usize {
        self.starts.len() * self.summary
    }

    fn holds(&self, start: usize, place: usize) -> bool {
        (start..start + self.summary).contains(&place)
    }

    pub(super) fn any_holds(&self, place: usize) -> bool {
        self.starts.iter().any(|&start| self.holds(start, place))
    }

    /// Which of the columns a place of a block is, if it is one.
    pub(super) fn index(&self, place: usize) -> usize {
        let n = self.starts.partition_point(|&start| start <= place).saturating_sub(1);
        let start = self.starts.get(n).copied().unwrap_or(place);
        n * self.summary + place.saturating_sub(start)
    }

    /// The positions of a block's columns, in order.
    pub(super) fn of_block(&self, n: usize) -> impl Iterator<Item = usize> + '_ {
        let place = |start: &usize| *start..*start + self.summary;
        self.starts.iter().flat_map(place).map(move |place| n * self.stride + place)
    }
}

impl<E: Element> SparseState<E> {
    /// Tokens appended.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens held.
    pub fn entries(&self) -> usize {
        self.held.entries()
    }

    /// Bytes of the keys and values that are held.
    pub fn bytes(&self) -> usize {
        self.held.bytes()
    }

    /// Takes these instructions and threads from now on.
    pub fn set_cpu(&mut self, cpu: Cpu) {
        self.held.runner.cpu = cpu;
    }

    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.tokens = 0;
        self.held.clear();
    }

    /// Heads and dims.
    pub fn heads(&self) -> StateHeads {
        self.held.shape
    }

    /// Keys and values that are held, rows `[entry][kv head]`: with the number of tokens, all that there is to the state.
    pub fn rows(&self) -> [&[E]; 2] {
        self.held.rows()
    }

    /// How many entries it holds of so many tokens.
    pub fn entries_of(&self, tokens: usize) -> usize {
        let Some(newest) = tokens.checked_sub(1) else { return 0 };
        match &self.keep {
            Keep::All { .. } => tokens,
            Keep::Newest { width } => tokens.min(*width),
            Keep::Summaries { columns, block: true } => {
                newest / columns.stride * columns.count() + newest % columns.stride + 1
            }
            Keep::Summaries { columns, block: false } => {
                let open = (0..tokens % columns.stride).filter(|&place| columns.any_holds(place));
                tokens / columns.stride * columns.count() + open.count()
            }
        }
    }

    /// Takes over what [`SparseState::rows`] gave of a state of so many tokens, in place of what is held.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for rows of another number; the state is unchanged then.
    pub fn restore(&mut self, tokens: usize, [keys, values]: [Vec<E>; 2]) -> Result<()> {
        let (entries, [key, value]) = (self.entries_of(tokens), self.held.widths());
        for (len, width) in [(keys.len(), key), (values.len(), value)] {
            let (what, expected) = ("rows of a state", entries.saturating_mul(width));
            if len != expected {
                return Err(Error::LengthMismatch { what, expected, got: len });
            }
        }
        (self.held.keys, self.held.values, self.tokens) = (keys, values, tokens);
        Ok(())
    }

    /// Appends tokens: keys `[1, n, KV, Dk]` and values `[1, n, KV, Dv]`. Allocates as it grows.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`]; the state is unchanged then.
    pub fn append(&mut self, k: TensorRef<'_, E>, v: TensorRef<'_, E>) -> Result<()> {
        let tokens = self.held.check(k.shape(), v.shape())?;
        (0..tokens).for_each(|t| self.push([k, v], t));
        Ok(())
    }

    /// Attention of the newest token's queries, `[1, 1, H, Dk]`. Allocates the result, and the workspace once.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    pub fn attend(&mut self, q: TensorRef<'_, E>) -> Result<Forward<E>> {
        let mut result = self.held.nothing(q.shape())?;
        if self.tokens == 0 {
            return Ok(result);
        }
        let heads = self.held.shape.heads;
        let apart = self.sees.len() > 1 && matches!(self.keep, Keep::All { .. });
        let step = if apart { 1 } else { heads };
        for first in (0..heads).step_by(step.max(1)) {
            for read in self.reads(self.sees[if apart { first } else { 0 }]) {
                self.held.attend(q, first..first + step, read, &mut result)?;
            }
        }
        Ok(result)
    }

    /// Takes one token in, and lets go of what it ends.
    fn push(&mut self, token_of: [TensorRef<'_, E>; 2], t: usize) {
        let token = self.tokens;
        self.tokens += 1;
        let mut place = self.entries();
        match &self.keep {
            Keep::All { .. } => {}
            Keep::Newest { width } => place = token % width,
            Keep::Summaries { columns, block: true } => {
                if token > 0 && token.is_multiple_of(columns.stride) {
                    let columns = columns.clone();
                    self.summarise(&columns);
                    place = self.entries();
                }
            }
            Keep::Summaries { columns, block: false } => {
                if !columns.any_holds(token % columns.stride) {
                    return;
                }
            }
        }
        self.held.write(place, token_of, t);
    }

    /// Keeps the columns of the block that has just ended.
    pub(super) fn summarise(&mut self, columns: &Columns) {
        let start = self.entries() - columns.stride;
        let widths = self.held.widths();
        for (data, width) in [&mut self.held.keys, &mut self.held.values].into_iter().zip(widths) {
            let mut end = start;
            for first in columns.starts.iter().map(|column| start + column) {
                data.copy_within(first * width..(first + columns.summary) * width, end * width);
                end += columns.summary;
            }
            data.truncate(end * width);
        }
    }

    /// The entries that a head (or all) reads now, each as first, end and step.
    fn reads(&self, sees: Sees) -> Vec<(Stepped, Mask)> {
        let newest = self.tokens - 1;
        match &self.keep {
            Keep::Newest { .. } => {
                vec![(Stepped { entries: 0..self.entries(), step: 1 }, Mask::Full)]
            }
            &Keep::All { stride, width } => {
                let near = self.tokens.saturating_sub(width)..self.tokens;
                // The column's newest member that is not near.
                let skip = if sees.first { (width - 1) / stride + 1 } else { 0 };
                let far = newest % stride..(newest + 1).saturating_sub(skip.saturating_mul(stride));
                let reads = [(sees.first, near, 1), (sees.second, far, stride)];
                let reads = reads.into_iter().filter(|(seen, keys, _)| *seen && !keys.is_empty());
                let stepped = |entries, step| (Stepped { entries, step }, Mask::Full);
                reads.map(|(_, keys, step)| stepped(keys, step)).collect()
            }
            Keep::Summaries { columns, block } => {
                let all = 0..self.entries();
                let mask = match self.sees.len() {
                    1 => Mask::Full,
                    _ => Mask::pattern(Own {
                        sees: self.sees.clone(),
                        columns: columns.clone(),
                        strip: match block {
                            true => newest / columns.stride * columns.count(),
                            false => all.end,
                        },
                    }),
                };
                match all.is_empty() {
                    true => vec![],
                    false => vec![(Stepped { entries: all, step: 1 }, mask)],
                }
            }
        }
    }
}

/// The entries of [`Keep::Summaries`] that each head sees, where heads differ.
#[derive(Debug)]
struct Own {
    sees: Vec<Sees>,
    columns: Columns,
    /// Entries before the own block.
    strip: usize,
}

impl Pattern for Own {
    fn allows(&self, at: Site, _: isize, j: usize) -> bool {
        let Sees { first, second, column } = self.sees[at.q_head];
        match j.checked_sub(self.strip) {
            Some(place) => first || second && self.columns.holds(column, place),
            None => {
                let n = j % self.columns.count() / self.columns.summary;
                second && self.columns.starts[n] == column
            }
        }
    }
}
