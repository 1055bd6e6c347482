//! A validated call: shapes, kernel, tiles, parts and workspace, decided before any data is seen.

use crate::cache::{KvStore, Sequences};
use crate::cpu::{Cpu, MAX_GENERATED_ROWS, Phase};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::exact::inspect::{Forwarded, Look};
use crate::exact::terms::Terms;
use crate::exact::{Factor, Problem, decode, forward, instances, short};
use crate::mask::{Extent, Mask, Pattern};
use crate::problem::Attention;
use crate::simd::tile::KEY_TILE;
use crate::tensor::{Shape, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::fmt;

mod backward;

pub use backward::{Backward, Gradients, Saved, TermGradients, Upstream};

/// The largest dimension of a key or value.
pub const MAX_DIM: usize = 4096;

/// An [`Attention`] with shapes, checked and ready to run, any number of times.
///
/// Making one neither allocates nor reads data. It stays valid while a cache grows, up to the number
/// of keys that it was planned for.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    mask: &'a Mask,
    terms: &'a Terms<'a>,
    cpu: Cpu,
    phase: Phase,
    scale: f32,
    q: Shape,
    /// Keys; `seq` is the most that a call may see.
    k: Shape,
    value_dim: usize,
}

/// Queries `[B, T, H, Dk]`, keys `[B, S, KV, Dk]` and values `[B, S, KV, Dv]` of one call.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, E, K> {
    /// Queries.
    pub q: TensorRef<'a, E>,
    /// Keys.
    pub k: TensorRef<'a, K>,
    /// Values.
    pub v: TensorRef<'a, K>,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(
        attention: &'a Attention<'_>,
        shapes: [Shape; 3],
        phase: Phase,
    ) -> Result<Self> {
        let [q, k, v] = shapes;
        let expected = Shape { batch: q.batch, dim: q.dim, ..k };
        if k != expected {
            let what = "keys must have the batch and dim of the queries";
            return Err(Error::ShapeMismatch { what, expected, got: k });
        }
        let expected = Shape { dim: v.dim, ..k };
        if v != expected {
            let what = "values must have the batch, seq and heads of the keys";
            return Err(Error::ShapeMismatch { what, expected, got: v });
        }
        if k.heads == 0 && q.heads != 0 || k.heads != 0 && !q.heads.is_multiple_of(k.heads) {
            return Err(Error::HeadGrouping { heads: q.heads, kv_heads: k.heads });
        }
        for (what, dim) in [("key dimension", q.dim), ("value dimension", v.dim)] {
            if !(1..=MAX_DIM).contains(&dim) {
                let expected = "1 to 4096";
                return Err(Error::InvalidParameter { what, expected, got: dim.to_string() });
            }
        }
        if phase == Phase::Generated && q.seq > MAX_GENERATED_ROWS {
            return Err(Error::TooManyRows { got: q.seq, limit: MAX_GENERATED_ROWS });
        }
        check_countable([q, k], v.dim, phase)?;
        attention.terms().check(q, k.seq)?;
        let plan = Plan {
            mask: attention.masked_by(),
            terms: attention.terms(),
            cpu: attention.resolved_cpu()?,
            phase,
            scale: attention.resolved_scale(q.dim)?,
            q,
            k,
            value_dim: v.dim,
        };
        Ok(plan)
    }

    /// The output's shape, `[B, T, H, Dv]`.
    pub fn out_shape(&self) -> Shape {
        Shape { dim: self.value_dim, ..self.q }
    }

    /// Bytes of workspace that a call needs. With caches of 16-bit elements it is the most of all
    /// storage types, so that one workspace serves any.
    pub fn workspace_bytes(&self) -> usize {
        4 * match self.phase {
            Phase::Prompt => forward::workspace_floats(&self.sizes()),
            Phase::Generated => decode::workspace_floats(&self.sizes()),
        }
    }

    /// Attention of queries to keys and values held in tensors. Allocates nothing itself (threads
    /// may), unless a key or value is not finite.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if a tensor is not of the planned shape, [`Error::MaskShape`],
    /// [`Error::WorkspaceTooSmall`]. Nothing is written then.
    pub fn forward<E: Element, K: Element>(
        &self,
        inputs: Inputs<'_, E, K>,
        out: TensorMut<'_, E>,
        lse: Option<TensorMut<'_, f32>>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let v = Shape { dim: self.value_dim, ..self.k };
        expect("planned keys", self.k, inputs.k.shape())?;
        expect("planned values", v, inputs.v.shape())?;
        self.check_mask(self.k.seq)?;
        self.execute(inputs.q, Sequences::Tensors(inputs.k, inputs.v), (out, lse), workspace)
    }

    /// Attention of queries to one cache per sequence, each of its own length: query `i` of `T` sits
    /// at position `i + store.end() − T`. Allocates nothing itself, as [`Plan::forward`].
    ///
    /// # Errors
    /// Those of [`Plan::forward`]; [`Error::ShapeMismatch`] also if a store has other heads or
    /// dimensions than planned, or holds more tokens.
    pub fn forward_cached<E: Element>(
        &self,
        q: TensorRef<'_, E>,
        stores: &[&dyn KvStore],
        outputs: (TensorMut<'_, E>, Option<TensorMut<'_, f32>>),
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check_stores(stores)?;
        self.execute::<E, E>(q, Sequences::Stores(stores), outputs, workspace)
    }

    fn execute<E: Element, K: Element>(
        &self,
        q: TensorRef<'_, E>,
        kv: Sequences<'_, K>,
        outputs: (TensorMut<'_, E>, Option<TensorMut<'_, f32>>),
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (mut out, mut lse) = outputs;
        expect("planned queries", self.q, q.shape())?;
        expect("planned output", self.out_shape(), out.shape())?;
        if let Some(lse) = &lse {
            expect("planned log-sum-exp", self.out_shape().per_row(), lse.shape())?;
        }
        let floats = workspace.floats(self.workspace_bytes() / 4)?;
        let problem = Problem {
            q,
            kv,
            mask: self.mask,
            terms: self.terms,
            scale: self.scale,
            sizes: self.sizes(),
            out: out.share(),
            lse: lse.as_mut().map(TensorMut::share),
        };
        instances::forward(self.phase, &problem, floats);
        Ok(())
    }

    fn check_stores(&self, stores: &[&dyn KvStore]) -> Result<()> {
        let planned = Shape { batch: stores.len(), ..self.k };
        expect("one store for each sequence", self.k, planned)?;
        for (batch, store) in stores.iter().enumerate() {
            let (dim, value_dim) = store.dims();
            let held = store.end() - store.start();
            let got = Shape { batch: self.k.batch, seq: held, heads: store.kv_heads(), dim };
            let fits = got.heads == self.k.heads && dim == self.k.dim && held <= self.k.seq;
            if !fits || value_dim != self.value_dim {
                let what = "a store must have the planned heads and dims, and no more tokens";
                return Err(Error::ShapeMismatch { what, expected: self.k, got });
            }
            self.mask.check_sequence(batch, self.extent(store.end()))?;
            self.terms.check_end(store.end())?;
        }
        Ok(())
    }

    /// A forward whose weights are to be looked at, checked as the forward was.
    pub(crate) fn look<'b, E: Element, K: Element>(
        &'b self,
        of: Forwarded<'b, E, K>,
    ) -> Result<Look<'b, E, K>> {
        expect("planned queries", self.q, of.q.shape())?;
        expect("planned log-sum-exp", self.q.per_row(), of.lse.shape())?;
        match of.keys {
            Sequences::Tensors(keys, _) => {
                expect("planned keys", self.k, keys.shape())?;
                self.check_mask(self.k.seq)?;
            }
            Sequences::Stores(stores) => self.check_stores(stores)?,
        }
        let factor = Factor::new(self.scale);
        Ok(Look { of, mask: self.mask, terms: self.terms, factor, sizes: self.sizes() })
    }

    fn check_mask(&self, keys: usize) -> Result<()> {
        self.mask.check(self.extent(keys))
    }

    fn extent(&self, keys: usize) -> Extent {
        let Shape { batch, seq: queries, heads, .. } = self.q;
        Extent { batch, heads, queries, keys }
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            q: self.q,
            kv_heads: self.k.heads,
            keys: self.k.seq,
            value_dim: self.value_dim,
            same_heads: self.mask.same_for_all_heads() && self.terms.encoding.is_none(),
            by_distance: self.terms.encoding.is_some(),
            cpu: self.cpu,
        }
    }

    /// What will run, in words: kernel, instructions, tiles, parts, threads, workspace.
    pub fn explain(&self) -> Explanation {
        let sizes = self.sizes();
        let (kernel, parts) = match self.phase {
            Phase::Prompt if short::fits(&sizes, self.terms) => {
                (Kernel::Short, sizes.q.batch * sizes.kv_heads)
            }
            Phase::Prompt => (Kernel::Tiled, forward::parts(&sizes)),
            Phase::Generated => (Kernel::Rows, decode::parts(&sizes)),
        };
        Explanation {
            kernel,
            level: self.cpu.level.name(),
            mask: self.mask.to_string(),
            terms: self.terms.to_string(),
            group: sizes.group(),
            key_tile: KEY_TILE,
            parts,
            threads: self.cpu.threads.count().min(parts.max(1)),
            workspace_bytes: self.workspace_bytes(),
        }
    }
}

/// Which kernels a plan runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// Query tiles against packed key tiles.
    Tiled,
    /// Heads of at most 64 queries against at most 64 keys, in one pass.
    Short,
    /// Row by row over keys as they lie, split over the sequence.
    Rows,
}

/// What a [`Plan`] will do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Explanation {
    /// The kernels.
    pub kernel: Kernel,
    /// The instructions: `portable`, `avx2`, `avx512` or `avx512bf16`. The last is `avx512` for all but queries and keys of
    /// bf16, which it multiplies in pairs.
    pub level: &'static str,
    /// The mask, in words.
    pub mask: String,
    /// What else is done to scores, in words: `none`, or `softcap 50, ALiBi` and so on.
    pub terms: String,
    /// Query heads that share one key/value head.
    pub group: usize,
    /// Keys of a tile.
    pub key_tile: usize,
    /// Independent parts that threads pick up.
    pub parts: usize,
    /// Threads that can be busy at once.
    pub threads: usize,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernel = match self.kernel {
            Kernel::Tiled => "tiled kernels",
            Kernel::Short => "short kernels",
            Kernel::Rows => "row kernels",
        };
        write!(
            f,
            "{kernel} ({}), mask {}, terms {}, {} query heads per key/value head, key tiles of {}, {} parts on \
             {} threads, {} bytes of workspace",
            self.level,
            self.mask,
            self.terms,
            self.group,
            self.key_tile,
            self.parts,
            self.threads,
            self.workspace_bytes
        )
    }
}

/// The numbers of a plan that kernels derive theirs from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) q: Shape,
    pub(crate) kv_heads: usize,
    /// The most keys of a sequence.
    pub(crate) keys: usize,
    pub(crate) value_dim: usize,
    /// Whether rows of all heads go together: all have the same mask, and products of keys alone.
    pub(crate) same_heads: bool,
    /// Whether there is a product by distance.
    pub(crate) by_distance: bool,
    pub(crate) cpu: Cpu,
}

impl Sizes {
    /// Query heads per key/value head.
    pub(crate) fn group(&self) -> usize {
        self.q.heads.checked_div(self.kv_heads).unwrap_or(0)
    }
}

impl Workspace {
    /// A workspace of the size that `plan` needs. Allocates it.
    pub fn for_plan(plan: &Plan<'_>) -> Workspace {
        let mut workspace = Workspace::new();
        workspace.reserve(plan.workspace_bytes());
        workspace
    }
}

pub(crate) fn expect(what: &'static str, expected: Shape, got: Shape) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::ShapeMismatch { what, expected, got }) }
}

/// Refuses sizes of which the parts or the workspace could not be counted. Dims are checked before.
fn check_countable([q, k]: [Shape; 2], value_dim: usize, phase: Phase) -> Result<()> {
    /// So many floats still have fewer than `usize::MAX` bytes.
    const LIMIT: usize = usize::MAX >> 4;
    // Beyond the numbers themselves: padding of a row, and of the keys to whole tiles and spans.
    let row = q.dim + value_dim + 64;
    let keys = k.seq.saturating_add(512);
    // Generated rows keep a partial result for each span of keys.
    let spans = if phase == Phase::Generated { keys } else { 1 };
    let sizes = [("queries", q, [q.seq, spans]), ("keys", k, [keys, 1])];
    for (what, shape, [seq, times]) in sizes {
        let factors = [shape.batch, shape.heads, seq, times].map(|n| n.max(1));
        let count = factors.iter().try_fold(row, |count, &n| count.checked_mul(n));
        count.filter(|&n| n <= LIMIT).ok_or(Error::ShapeOverflow { what, shape })?;
    }
    Ok(())
}
