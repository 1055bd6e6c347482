//! Visiting the rows of tensors, all or those of a list, shared out over threads; each row is written by one of them.

use crate::element::Element;
use crate::parallel::for_each_item;
use crate::tensor::{Patch, Shape, Spans, TensorMut};
use std::iter::repeat_n;
use std::ops::Range;
use std::sync::OnceLock;

/// Tokens of a piece of one sequence.
const PIECE: usize = 512;

/// Tokens in the order in which they are gathered. Rows that are written over (not added to) occur once.
#[derive(Debug)]
pub(super) struct Listed {
    tokens: Vec<usize>,
    /// Places in the list in the order of tokens, once somebody asks; `None` if that is the list's own.
    order: Option<OnceLock<Vec<usize>>>,
}

impl Listed {
    /// A list that ascends.
    pub(super) fn ascending(tokens: Vec<usize>) -> Listed {
        Listed { tokens, order: None }
    }

    /// A list in any order.
    pub(super) fn sorted(tokens: Vec<usize>) -> Listed {
        Listed { tokens, order: Some(OnceLock::new()) }
    }

    fn order(&self) -> Option<&[usize]> {
        let sort = || {
            let mut order: Vec<usize> = (0..self.tokens.len()).collect();
            order.sort_unstable_by_key(|&place| self.tokens[place]);
            order
        };
        self.order.as_ref().map(|order| &order.get_or_init(sort)[..])
    }

    /// Other numbers for the same tokens, in the same order.
    pub(super) fn map(self, rename: impl Fn(usize) -> usize) -> Listed {
        Listed { tokens: self.tokens.into_iter().map(rename).collect(), ..self }
    }

    pub(super) fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// The n-th smallest token, and its place in the list.
    fn nth(&self, n: usize) -> (usize, usize) {
        let place = self.order().map_or(n, |order| order[n]);
        (self.tokens[place], place)
    }

    /// The first n whose token is at least `token`.
    fn first_from(&self, token: usize) -> usize {
        let (mut low, mut high) = (0, self.tokens.len());
        while low < high {
            let middle = low.midpoint(high);
            match self.nth(middle).0 < token {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }

    /// The places of tokens in the list, as far as they are in it.
    pub(super) fn places<'a>(&'a self, tokens: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
        tokens.iter().filter_map(|&token| self.within(&(token..token + 1)).map(|x| x.1).next())
    }

    /// The list's tokens in a range, each with its place.
    fn within(&self, range: &Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        (self.first_from(range.start)..self.first_from(range.end)).map(|n| self.nth(n))
    }
}

/// The positions of a range that have one of the residues, class by class, and where the classes begin and end.
pub(super) fn by_residue(
    positions: Range<usize>,
    stride: usize,
    residues: Range<usize>,
) -> (Listed, Vec<usize>) {
    let origin = positions.start % stride;
    let first = |residue: usize| {
        let ahead = match residue.checked_sub(origin) {
            Some(ahead) => ahead,
            None => stride - (origin - residue),
        };
        positions.start.saturating_add(ahead)
    };
    let (mut tokens, mut starts) = (vec![], vec![0]);
    for residue in residues {
        tokens.extend((first(residue)..positions.end).step_by(stride));
        starts.push(tokens.len());
    }
    let order = in_turn(&tokens, &starts);
    (Listed { tokens, order: Some(order.into()) }, starts)
}

/// Places in the order of tokens, of lists side by side that ascend in steps of the same length, longer than the distance of
/// their first tokens: they take turns.
fn in_turn(tokens: &[usize], starts: &[usize]) -> Vec<usize> {
    let mut lists: Vec<_> = starts.windows(2).map(|list| list[0]..list[1]).collect();
    lists.retain(|list| !list.is_empty());
    lists.sort_unstable_by_key(|list| tokens[list.start]);
    let longest = lists.iter().map(Range::len).max().unwrap_or(0);
    let place = |n: usize| lists.iter().map(move |list| list.start + n..list.end);
    (0..longest).flat_map(|n| place(n).filter_map(|mut rest| rest.next())).collect()
}

/// The pieces that a tensor of so many sequences and tokens falls into: sequences, or stretches of the only one.
fn cuts(shape: Shape) -> Option<Vec<usize>> {
    let ends = (PIECE..shape.seq).step_by(PIECE).chain([shape.seq]);
    (shape.batch == 1).then(|| std::iter::once(0).chain(ends).collect())
}

/// Calls `work` with each piece of a tensor, its sequence and its tokens.
fn each_piece<E: Element>(
    x: TensorMut<'_, E>,
    threads: usize,
    work: impl Fn(Patch<'_, E>, usize, Range<usize>) + Sync,
) {
    let shape = x.shape();
    if shape.checked_len() == Some(0) {
        return;
    }
    let cuts = cuts(shape);
    let spans = Spans::new(shape.batch, shape.seq, cuts.as_deref()).expect("cuts ascend");
    let patches = x.into_patches(spans, shape.heads).enumerate();
    for_each_item(patches, repeat_n((), threads), |(n, patch), ()| {
        let (batch, tokens) = spans.get(n);
        work(patch, batch, tokens);
    });
}

/// Like [`each_piece`], for an output and its log-sum-exp together.
fn each_piece_of<E: Element>(
    (x, y): (TensorMut<'_, E>, TensorMut<'_, f32>),
    threads: usize,
    work: impl Fn((Patch<'_, E>, Patch<'_, f32>), usize, Range<usize>) + Sync,
) {
    let shape = x.shape();
    if shape.checked_len() == Some(0) {
        return;
    }
    let cuts = cuts(shape);
    let spans = Spans::new(shape.batch, shape.seq, cuts.as_deref()).expect("cuts ascend");
    let y = y.into_patches(spans, shape.heads);
    let patches = x.into_patches(spans, shape.heads).zip(y).enumerate();
    for_each_item(patches, repeat_n((), threads), |(n, patches), ()| {
        let (batch, tokens) = spans.get(n);
        work(patches, batch, tokens);
    });
}

/// Calls `write` with `[sequence, token, head]` and the row of each.
pub(super) fn each_row<E: Element>(
    x: TensorMut<'_, E>,
    threads: usize,
    write: impl Fn([usize; 3], &mut [E]) + Sync,
) {
    let heads = x.shape().heads;
    each_piece(x, threads, |mut patch, batch, tokens| {
        for (t, token) in tokens.enumerate() {
            for head in 0..heads {
                write([batch, token, head], patch.row(t, head));
            }
        }
    });
}

/// Calls `write` with `[sequence, place in the list, head]` and the row of each token of a list.
pub(super) fn each_listed_row<E: Element>(
    x: TensorMut<'_, E>,
    listed: &Listed,
    threads: usize,
    write: impl Fn([usize; 3], &mut [E]) + Sync,
) {
    let heads = x.shape().heads;
    each_piece(x, threads, |mut patch, batch, tokens| {
        for (token, place) in listed.within(&tokens) {
            for head in 0..heads {
                write([batch, place, head], patch.row(token - tokens.start, head));
            }
        }
    });
}

/// [`each_row`] for the rows of an output and its log-sum-exp together.
pub(super) fn each_row_of<E: Element>(
    rows: (TensorMut<'_, E>, TensorMut<'_, f32>),
    threads: usize,
    write: impl Fn([usize; 3], (&mut [E], &mut [f32])) + Sync,
) {
    let heads = rows.0.shape().heads;
    each_piece_of(rows, threads, |(mut x, mut y), batch, tokens| {
        for (t, token) in tokens.enumerate() {
            for head in 0..heads {
                write([batch, token, head], (x.row(t, head), y.row(t, head)));
            }
        }
    });
}

/// [`each_listed_row`] for the rows of an output and its log-sum-exp together.
pub(super) fn each_listed_row_of<E: Element>(
    rows: (TensorMut<'_, E>, TensorMut<'_, f32>),
    listed: &Listed,
    threads: usize,
    write: impl Fn([usize; 3], (&mut [E], &mut [f32])) + Sync,
) {
    let heads = rows.0.shape().heads;
    each_piece_of(rows, threads, |(mut x, mut y), batch, tokens| {
        for (token, place) in listed.within(&tokens) {
            let t = token - tokens.start;
            for head in 0..heads {
                write([batch, place, head], (x.row(t, head), y.row(t, head)));
            }
        }
    });
}
