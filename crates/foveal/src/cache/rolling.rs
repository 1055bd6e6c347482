//! The first tokens and the newest ones, at positions that stay small: StreamingLLM (Xiao et al. 2024, §3.2).
//!
//! ```text
//! tokens seen by position t       0 .. M  |  t − N + 1 ..= t           all 0..=t while t < M + N
//! their places in the cache       0 .. M  |  M .. M + N                what rotary positions are counted by
//! ```
//!
//! A score depends on the distance of two places only. Among the N newest tokens that is the distance of their positions;
//! to the first M it is that of a query at min(t, M + N − 1). So every key is stored once, rotated by its own position, as in
//! any other cache, and queries come in two rotations: by t for the newest keys, by min(t, M + N − 1) for the first ones.
//! The two results are joined by their log-sum-exp. That is the definition, not an approximation of it:
//!
//! ```text
//! o = merge(attend(q rotated by min(t, M + N − 1), the first M),  attend(q rotated by t, the newest N, none of the first M))
//! ```
//!
//! No key is ever rotated again. A step costs M + N keys, whatever went before; memory is that of M and of N tokens and at most two
//! tiles. Both parts obey the rules of all attention, so that no bit depends on how a prompt is cut, on threads, or on rows
//! that share a call. Any two stores do: rows of any type, codes, pages.

use super::KvStore;
use crate::cpu::Phase;
use crate::error::{Error, Result};
use crate::exact::state::join_rows;
use crate::mask::Mask;
use crate::problem::Attention;
use crate::simd::Level;
use crate::tensor::{Shape, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

/// How many of the first tokens are seen, and how many of the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rolling {
    sinks: usize,
    window: usize,
}

/// One call: queries of one sequence and the stores that hold what they see.
#[derive(Debug, Clone, Copy)]
pub struct RollingCall<'a> {
    /// Which kernels.
    pub phase: Phase,
    /// Queries `[1, T, H, Dk]` rotated by their own positions, the last `T` of the sequence.
    pub q: TensorRef<'a, f32>,
    /// The same queries rotated by [`Rolling::query_position`].
    pub capped_q: TensorRef<'a, f32>,
    /// The first M tokens, or as many as there are: [`Rolling::sinks_among`].
    pub first: &'a dyn KvStore,
    /// The newest tokens, all that the queries see and any before them.
    pub newest: &'a dyn KvStore,
}

/// Memory of calls, which grows as needed.
#[derive(Debug, Default)]
pub struct RollingScratch {
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Rolling {
    /// The `sinks` first and the `window` newest tokens, the query's own included.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a window of 0, or one that with its sinks can't be counted.
    pub fn new(sinks: usize, window: usize) -> Result<Rolling> {
        if window == 0 || sinks.checked_add(window).is_none() {
            let expected = "1 or more tokens, that can be counted together with the first ones";
            let got = format!("{window} after {sinks}");
            return Err(Error::InvalidParameter { what: "rolling window", expected, got });
        }
        Ok(Rolling { sinks, window })
    }

    /// M: how many of the first tokens are seen.
    pub fn sinks(&self) -> usize {
        self.sinks
    }

    /// N: how many of the newest tokens are seen.
    pub fn window(&self) -> usize {
        self.window
    }

    /// M + N: the most tokens that are seen.
    pub fn tokens(&self) -> usize {
        self.sinks + self.window
    }

    /// The place in the cache of a query at `position`: what it is rotated by towards the first tokens.
    pub fn query_position(&self, position: usize) -> usize {
        position.min(self.tokens() - 1)
    }

    /// Which of a call's tokens belong to the first ones of the sequence, counted within the call.
    pub fn sinks_among(&self, positions: Range<usize>) -> Range<usize> {
        0..self.sinks.saturating_sub(positions.start).min(positions.len())
    }

    /// Attention of the queries to what they see, with the scale, softcap, learned sinks and processor of `attention`; its
    /// mask is replaced. Writes the output and its log-sum-exp.
    ///
    /// # Errors
    /// Those of [`Plan::forward_cached`](crate::Plan::forward_cached); [`Error::InvalidParameter`] for terms that depend on
    /// positions, and dropout; [`Error::LengthMismatch`] for a first store that does not hold the first tokens.
    pub fn forward(
        &self,
        attention: &Attention<'_>,
        call: RollingCall<'_>,
        (mut out, mut lse): (TensorMut<'_, f32>, TensorMut<'_, f32>),
        workspace: &mut Workspace,
        scratch: &mut RollingScratch,
    ) -> Result<()> {
        if attention.terms().by_position() {
            let (what, expected) = ("terms of a rolling call", "a softcap or learned sinks");
            let got = attention.terms().to_string();
            return Err(Error::InvalidParameter { what, expected, got });
        }
        let (end, held) = (call.newest.end(), call.first.end() - call.first.start());
        let expected = self.sinks.min(end);
        if held != expected {
            let what = "first tokens of a rolling cache";
            return Err(Error::LengthMismatch { what, expected, got: held });
        }
        // A store whose last key lies at the last query's position sees queries where they are; the first tokens end earlier.
        let seen = Mask::band(None, Some(end - held));
        let rest = Mask::window(self.window).and(Mask::keys(self.sinks..usize::MAX));
        let newest = attention.clone().mask(rest);
        let parts = (out.reborrow(), lse.reborrow());
        run((&newest, call.phase), (call.q, call.newest), parts, workspace)?;
        if held == 0 {
            return Ok(());
        }
        let first = attention.clone().without_sinks().mask(seen);
        let shape = out.shape();
        let rows = shape.per_row();
        scratch.out.resize(shape.checked_len().unwrap_or(0), 0.0);
        scratch.lse.resize(rows.checked_len().unwrap_or(0), 0.0);
        let parts =
            (TensorMut::new(&mut scratch.out, shape)?, TensorMut::new(&mut scratch.lse, rows)?);
        run((&first, call.phase), (call.capped_q, call.first), parts, workspace)?;
        let level = attention.resolved_cpu()?.level;
        let first = (TensorRef::new(&scratch.out, shape)?, TensorRef::new(&scratch.lse, rows)?);
        join(level, (out, lse), first);
        Ok(())
    }
}

/// One of the two parts.
fn run(
    (attention, phase): (&Attention<'_>, Phase),
    (q, store): (TensorRef<'_, f32>, &dyn KvStore),
    (out, lse): (TensorMut<'_, f32>, TensorMut<'_, f32>),
    workspace: &mut Workspace,
) -> Result<()> {
    let (dim, value_dim) = store.dims();
    let (seq, heads) = (store.end() - store.start(), store.kv_heads());
    let k = Shape { batch: 1, seq, heads, dim };
    let v = Shape { dim: value_dim, ..k };
    let plan = match phase {
        Phase::Prompt => attention.plan(q.shape(), k, v)?,
        Phase::Generated => attention.plan_decode(q.shape(), k, v)?,
    };
    workspace.reserve(plan.workspace_bytes());
    plan.forward_cached(q, &[store], (out, Some(lse)), workspace)
}

/// Joins every row of the second result to that of the first.
fn join(
    level: Level,
    (mut out, mut lse): (TensorMut<'_, f32>, TensorMut<'_, f32>),
    (other, other_lse): (TensorRef<'_, f32>, TensorRef<'_, f32>),
) {
    let Shape { seq, heads, .. } = out.shape();
    for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        let to = (out.row_mut(0, t, head), &mut lse.row_mut(0, t, head)[0]);
        join_rows(level, to, (other.row(0, t, head), other_lse.row(0, t, head)[0]));
    }
}
