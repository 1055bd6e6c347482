//! Keys that are given up because they got little weight: what is remembered of weights, and when a choice is made.
//!
//! ```text
//! heavy hitters   scores_j += Σ_i P_ij after each call       a choice before each generated token, and before a prompt's token
//!                                                            whose position is a multiple of 256
//! SnapKV          the last W queries of a prompt are kept    a choice when a prompt has ended
//! ```
//!
//! Positions and phases of tokens decide when, sums that run row by row in f64 decide what: nothing depends on how a prompt is
//! cut into calls. Kept keys stay rotated by their positions, as queries are. Causal order is that of what is kept.

use foveal::cache::eviction::{Pooling, RunningScores, Scores, SnapKv, snap_kv};
use foveal::cache::{KvStore, TILE};
use foveal::inspect::{Forwarded, Per};
use foveal::{Attention, Phase, Plan, Shape, TensorRef};

use super::Store;
use crate::Error;

/// The last tokens of a prompt that SnapKV asks, at most.
const ASKED: usize = 32;
/// Neighbours that SnapKV joins.
const KERNEL: usize = 5;

/// What is remembered of weights.
#[derive(Debug, Clone)]
pub(super) struct Evicting {
    /// Keys that are kept.
    budget: usize,
    /// Tokens seen since the beginning.
    seen: usize,
    policy: Policy,
}

#[derive(Debug, Clone)]
enum Policy {
    HeavyHitters(RunningScores),
    /// The last queries of the prompt that is being read, `[rows, heads, dim]`, and their log-sum-exp.
    SnapKv {
        queries: Vec<f32>,
        lse: Vec<f32>,
        heads: usize,
    },
}

/// A call that attention has just been computed for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub(crate) phase: Phase,
    pub(crate) q: TensorRef<'a, f32>,
    pub(crate) lse: TensorRef<'a, f32>,
}

impl Evicting {
    pub(super) fn heavy_hitters(
        budget: usize,
        [heads, kv_heads]: [usize; 2],
    ) -> Result<Evicting, Error> {
        let policy = Policy::HeavyHitters(RunningScores::new(heads, kv_heads)?);
        Ok(Evicting { budget, seen: 0, policy })
    }

    pub(super) fn snap_kv(budget: usize, heads: usize) -> Evicting {
        let policy = Policy::SnapKv { queries: vec![], lse: vec![], heads };
        Evicting { budget, seen: 0, policy }
    }

    pub(super) fn clear(&mut self) {
        self.seen = 0;
        match &mut self.policy {
            Policy::HeavyHitters(scores) => scores.clear(),
            Policy::SnapKv { queries, lse, .. } => {
                queries.clear();
                lse.clear();
            }
        }
    }

    /// Queries of a prompt that are asked in the end.
    fn asked(&self) -> usize {
        ASKED.min(self.budget.div_ceil(2))
    }

    /// Gives up keys, if it is time to, before `tokens` tokens of a call are appended.
    pub(super) fn before(
        &mut self,
        store: &mut Store,
        (attention, phase): (&Attention<'_>, Phase),
        tokens: usize,
    ) -> Result<(), Error> {
        let generated = phase == Phase::Generated;
        let (budget, asked, over) = (self.budget, self.asked(), store.held() > self.budget);
        let between = self.seen.is_multiple_of(TILE);
        self.seen += tokens;
        match &mut self.policy {
            Policy::HeavyHitters(scores) if over && (generated || between) => {
                let heavy = budget / 2;
                let kept = scores.scores().heavy_hitters(heavy, budget - heavy);
                store.retain(&kept)?;
                Ok(scores.retain(&kept)?)
            }
            Policy::SnapKv { queries, lse, heads } if generated && !lse.is_empty() => {
                if over {
                    let scores = asked_scores(store, attention, (queries, lse, *heads))?;
                    let (capacity, pooling) = (budget, Pooling::Average);
                    let keep = SnapKv { capacity, window: asked, kernel: KERNEL, pooling };
                    store.retain(&snap_kv(&scores, keep)?)?;
                }
                queries.clear();
                lse.clear();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Remembers what a call gave weight to, or who is to be asked.
    pub(super) fn after(
        &mut self,
        store: &Store,
        plan: &Plan<'_>,
        seen: Seen<'_>,
    ) -> Result<(), Error> {
        let (Shape { seq, heads, dim, .. }, asked) = (seen.q.shape(), self.asked());
        match &mut self.policy {
            Policy::HeavyHitters(scores) => {
                let stores = [store as &dyn KvStore];
                let of = Forwarded::cached(seen.q, &stores, seen.lse);
                Ok(scores.add(plan, of, 0..seq)?)
            }
            Policy::SnapKv { queries, lse, .. } if seen.phase == Phase::Prompt => {
                for t in seq.saturating_sub(asked)..seq {
                    for head in 0..heads {
                        queries.extend_from_slice(seen.q.row(0, t, head));
                        lse.extend_from_slice(seen.lse.row(0, t, head));
                    }
                }
                let old = (lse.len() / heads.max(1)).saturating_sub(asked);
                queries.drain(..old * heads * dim);
                lse.drain(..old * heads);
                Ok(())
            }
            Policy::SnapKv { .. } => Ok(()),
        }
    }
}

/// What the last queries of a prompt give to each key.
fn asked_scores(
    store: &Store,
    attention: &Attention<'_>,
    (queries, lse, heads): (&[f32], &[f32], usize),
) -> Result<Scores, Error> {
    let dim = store.dims().0;
    let q = Shape { batch: 1, seq: lse.len() / heads.max(1), heads, dim };
    let keys = Shape { seq: store.held(), heads: store.kv_heads(), ..q };
    let plan = attention.plan(q, keys, keys)?;
    let stores = [store as &dyn KvStore];
    let (queries, lse) = (TensorRef::new(queries, q)?, TensorRef::new(lse, q.per_row())?);
    let of = Forwarded::cached(queries, &stores, lse);
    let mut scores = Scores::new(store.kv_heads());
    scores.add(plan.column_sums(of, 0..q.seq, Per::KvHead)?.view())?;
    Ok(scores)
}
