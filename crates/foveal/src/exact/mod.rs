//! Softmax attention, exact.
//!
//! ```text
//! S = scale · Q Kᵀ  (−∞ where masked)      P = softmax_rows(S)      O = P V
//! ```
//!
//! [`terms`] may cap or bias S, add a sink to each row of P, and drop weights.
//!
//! Neither S nor P is ever stored as a whole: keys pass by in tiles of 256, and each query row keeps
//! a running maximum, sum and accumulator (Dao et al. 2022; Dao 2023). [`forward`] runs tiles of query
//! rows for prompts, [`decode`] runs single rows for generated tokens, `state` joins partial results,
//! [`reference`] is the definition in f64; [`inspect`] makes P again to look at it;
//! [`differential`] subtracts two runs, [`latent`] attends over rows that all heads share.
//!
//! Cost: 2·T·S·(Dk + Dv) floating-point operations a head for the visible part; memory beyond inputs
//! and outputs is one packed copy of the keys in flight.

pub(crate) mod backward;
mod cells;
pub(crate) mod decode;
pub mod differential;
pub(crate) mod forward;
pub mod inspect;
pub(crate) mod instances;
pub mod latent;
pub mod reference;
mod relative;
pub(crate) mod short;
pub(crate) mod state;
pub(crate) mod terms;

use crate::cache::Sequences;
use crate::element::Element;
use crate::mask::{Coverage, Mask, Pattern, Site};
use crate::plan::Sizes;
use crate::simd::product::Form;
use crate::simd::row;
use crate::simd::tile::KEY_TILE;
use crate::tensor::{SharedRows, TensorRef};
use cells::seen;
use std::ops::Range;
use terms::Terms;

/// A call whose shapes have been checked.
#[derive(Debug)]
pub(crate) struct Problem<'a, E, K> {
    pub(crate) q: TensorRef<'a, E>,
    pub(crate) kv: Sequences<'a, K>,
    pub(crate) mask: &'a Mask,
    pub(crate) scale: f32,
    pub(crate) terms: &'a Terms<'a>,
    pub(crate) sizes: Sizes,
    pub(crate) out: SharedRows<'a, E>,
    pub(crate) lse: Option<SharedRows<'a, f32>>,
}

impl<E: Element, K> Problem<'_, E, K> {
    /// Writes one row's output and log-sum-exp from its accumulator, base-2 maximum and sum.
    ///
    /// # Safety
    /// No other thread writes this row.
    unsafe fn finish(
        &self,
        (batch, i, head): (usize, usize, usize),
        acc: &[f32],
        (max, sum): (f32, f32),
    ) {
        // SAFETY: the caller's promise.
        let out = unsafe { self.out.row(batch, i, head) };
        // A sink is a key without a value, counted once, in the end.
        let sink = self.terms.sink(head);
        let join = state::Join::new(max, sink);
        let (max, keep, sum) = match sink {
            f32::NEG_INFINITY => (max, 1.0, sum),
            _ => (join.max, join.keep, sum * join.keep + join.add),
        };
        row::scale_into(self.sizes.cpu.level, acc, keep * state::reciprocal(sum), out);
        if let Some(lse) = &self.lse {
            // SAFETY: the caller's promise.
            let lse = unsafe { lse.row(batch, i, head) };
            lse[0] = state::log_sum_exp(max, sum);
        }
    }
}

impl<E: Element, K: Element> Problem<'_, E, K> {
    /// How a sequence's products are computed.
    fn form(&self, batch: usize) -> Form {
        self.terms.form(self.sizes.cpu.level, [E::DTYPE, self.kv.dtype(batch)])
    }
}

/// Scores are multiplied by a non-negative factor; a negative scale turns the queries around.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factor {
    /// What queries are multiplied by when they are copied: 1, −1 or 0.
    pub(crate) sign: f32,
    /// What scores are multiplied by in base 2: |scale| · log2 e, or 1 for a scale of 0.
    pub(crate) factor: f32,
}

impl Factor {
    /// What products of turned queries and keys are multiplied by to be scores.
    pub(crate) fn magnitude(self) -> f32 {
        self.factor * std::f32::consts::LN_2
    }

    pub(crate) fn new(scale: f32) -> Factor {
        match scale {
            0.0 => Factor { sign: 0.0, factor: 1.0 },
            _ => Factor { sign: scale.signum(), factor: scale.abs() * std::f32::consts::LOG2_E },
        }
    }

    /// Copies the cells of one query, turned around if the scale asks for it.
    fn load<E: Element>(self, form: Form, query: &[E], to: &mut [f32]) {
        form.load(query, self.sign, to);
    }
}

/// Calls `compute` once, in order, for each key tile of `keys` that some of the rows may see, with the
/// tile's positions and whether every row sees all of them.
fn live_tiles(
    mask: &Mask,
    (site, rows): (Site, Range<isize>),
    keys: Range<usize>,
    compute: &mut dyn FnMut(Range<usize>, bool),
) {
    // A tile is held back until the mask has said all that it says about it.
    let mut pending: Option<(Range<usize>, bool)> = None;
    mask.live(site, rows, keys.clone(), &mut |range, coverage| {
        for tile in range.start / KEY_TILE..range.end.div_ceil(KEY_TILE) {
            let start = (tile * KEY_TILE).max(keys.start);
            let positions = start..((tile + 1) * KEY_TILE).min(keys.end);
            match &mut pending {
                Some((held, full)) if *held == positions => *full = false,
                _ => {
                    let covered = range.start <= positions.start && positions.end <= range.end;
                    let next = (positions, covered && coverage == Coverage::Full);
                    if let Some((held, full)) = pending.replace(next) {
                        compute(held, full);
                    }
                }
            }
        }
    });
    if let Some((held, full)) = pending {
        compute(held, full);
    }
}

/// Whether some of the rows may see some of the keys.
fn sees(mask: &Mask, (site, rows): (Site, Range<isize>), keys: Range<usize>) -> bool {
    let mut seen = false;
    mask.live(site, rows, keys, &mut |_, _| seen = true);
    seen
}
