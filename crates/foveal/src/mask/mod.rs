//! Who may see whom.
//!
//! A mask is a predicate `allows(site, i, j)` on absolute positions: query `i` of `T` sits at
//! `i + S − T` when there are `S` keys ("bottom-right"), so that a prompt's last token sees all of it,
//! and a single new token sees the whole cache:
//!
//! ```text
//! causal, T = 2, S = 5        causal, T = 5, S = 2
//!     1 1 1 1 .                   . .
//!     1 1 1 1 1                   . .
//!                                 . .
//!                                 1 .
//!                                 1 1
//! ```
//!
//! A row that may see nothing gives output 0 and log-sum-exp −∞. Everything else that a pattern says
//! ([`Pattern::live`], [`Pattern::fill`]) is a faster form of `allows` and must agree with it.

mod band;
mod blocks;
mod choice;
mod combine;
mod dense;
mod documents;
mod keys;
mod prefix;
mod rising;
mod runs;
mod streaming;
mod tree;

pub use band::Band;
pub use blocks::{BlockSize, Blocks};
pub use dense::Dense;
pub use documents::Documents;
pub use keys::Keys;
pub use prefix::Prefix;
pub use tree::{MAX_TREE, Tree};

pub(crate) use rising::Rising;
pub(crate) use runs::{add_range, fill_range, live_between, set_bits};

use std::ops::Range;
use std::sync::Arc;

/// Where a query row stands: its sequence and heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Index of the sequence in the batch.
    pub batch: usize,
    /// Query head.
    pub q_head: usize,
    /// The key/value head that it reads.
    pub kv_head: usize,
}

/// Whether a range of keys is visible to every row asked about, or only to some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// Every row sees every key of the range.
    Full,
    /// Some row may see some key of the range.
    Partial,
}

/// Sequence lengths of a call, for patterns that were made for particular ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Queries.
    pub queries: usize,
    /// Keys, all positions since the sequence's beginning included.
    pub keys: usize,
}

/// The most keys that one call of [`Pattern::fill`] asks about.
pub const FILL_LIMIT: usize = crate::simd::tile::KEY_TILE;

/// A set of visible (query, key) pairs. Positions are absolute; those of queries are negative where a
/// call has more queries than keys.
pub trait Pattern: std::fmt::Debug + Send + Sync {
    /// May query position `i` see key position `j`? Defines the pattern.
    fn allows(&self, at: Site, i: isize, j: usize) -> bool;

    /// Visits, in ascending order and without overlap, non-empty ranges within `keys` that together
    /// hold every key that some row of `rows` may see. The default is one [`Coverage::Partial`] range.
    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        let _ = (at, rows);
        if !keys.is_empty() {
            visit(keys, Coverage::Partial);
        }
    }

    /// Sets bit `b` of `bits` (bit `b % 64` of word `b / 64`) exactly where row `i` may see key
    /// `keys.start + b`, and clears all others. `keys` holds at most [`FILL_LIMIT`] positions.
    /// The default asks [`Pattern::allows`].
    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        bits.fill(0);
        for (b, j) in keys.enumerate() {
            bits[b / 64] |= u64::from(self.allows(at, i, j)) << (b % 64);
        }
    }

    /// Whether all heads of a sequence have the same pattern. False is always right.
    fn same_for_all_heads(&self) -> bool {
        false
    }

    /// Refuses lengths that the pattern was not made for.
    ///
    /// # Errors
    /// [`crate::Error::MaskShape`], by patterns with sizes of their own.
    fn check(&self, extent: Extent) -> crate::Result<()> {
        let _ = extent;
        Ok(())
    }

    /// Refuses the lengths of one sequence, where each sequence of a batch has its own. The default is
    /// [`Pattern::check`].
    ///
    /// # Errors
    /// Those of [`Pattern::check`].
    fn check_sequence(&self, batch: usize, extent: Extent) -> crate::Result<()> {
        let _ = batch;
        self.check(extent)
    }

    /// The pattern in a few words, for [`crate::Plan::explain`]. The default is its `Debug` form.
    ///
    /// # Errors
    /// Those of the formatter.
    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Which keys each query may see: a value that is cheap to clone and to combine.
///
/// ```
/// use foveal::Mask;
/// let local = Mask::causal().and(Mask::window(4096));
/// let packed = Mask::documents(&[0, 10, 25]).unwrap().and(Mask::causal());
/// # let _ = (local, packed);
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Mask {
    /// Everything sees everything.
    #[default]
    Full,
    /// Keys from so far behind to so far ahead of the query.
    Band(Band),
    /// Packed documents that don't see each other.
    Documents(Arc<Documents>),
    /// One bit per (query, key).
    Dense(Arc<Dense>),
    /// A pattern of the caller's.
    Pattern(Arc<dyn Pattern>),
    /// Visible in both.
    And(Arc<[Mask; 2]>),
    /// Visible in either.
    Or(Arc<[Mask; 2]>),
}

impl Mask {
    /// Everything sees everything.
    pub fn full() -> Mask {
        Mask::Full
    }

    /// Keys at or before the query's position.
    pub fn causal() -> Mask {
        Mask::Band(Band { behind: None, ahead: Some(0) })
    }

    /// The `width` newest keys at or before the query's position, itself included: exactly
    /// `i − width < j <= i`. A width of zero sees nothing.
    pub fn window(width: usize) -> Mask {
        match width.checked_sub(1) {
            Some(behind) => Mask::Band(Band { behind: Some(behind), ahead: Some(0) }),
            None => Mask::Pattern(Arc::new(band::Nothing)),
        }
    }

    /// Keys from `behind` before to `ahead` after the query's position, both included; `None` has
    /// no end.
    pub fn band(behind: Option<usize>, ahead: Option<usize>) -> Mask {
        Mask::Band(Band { behind, ahead })
    }

    /// Documents packed one after the other in one sequence; `starts` are their cumulative lengths,
    /// `[0, len₀, len₀ + len₁, …]`, for queries and keys alike.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParameter`] unless `starts` begins with 0 and does not fall.
    pub fn documents(starts: &[usize]) -> crate::Result<Mask> {
        Ok(Mask::Documents(Arc::new(Documents::new(starts, starts)?)))
    }

    /// Everything within the first `length` tokens, causal after them (a prefix language model).
    /// [`Prefix::new`] takes a length for each sequence.
    pub fn prefix(length: usize) -> Mask {
        Prefix::new(&[length]).into()
    }

    /// The keys of one range of positions, whatever the query.
    pub fn keys(range: Range<usize>) -> Mask {
        Keys::new(vec![range]).into()
    }

    /// The first `lengths[b]` keys of sequence `b`: what follows is padding.
    pub fn key_lengths(lengths: &[usize]) -> Mask {
        Keys::padded_right(lengths).into()
    }

    /// All but the first `padding[b]` keys of sequence `b`.
    pub fn left_padding(padding: &[usize]) -> Mask {
        Keys::padded_left(padding).into()
    }

    /// The first `sinks` tokens and the `width` newest ones, the query's own included; nothing after
    /// the query (StreamingLLM, Xiao et al. 2024, §3.2, without its re-positioning).
    pub fn streaming(sinks: usize, width: usize) -> Mask {
        Mask::pattern(streaming::Streaming { sinks, width })
    }

    /// A mask for each query head, as many as there are.
    pub fn per_head(masks: Vec<Mask>) -> Mask {
        Mask::pattern(choice::Choice::by_head(masks))
    }

    /// A mask for each sequence of a batch, as many as there are.
    pub fn per_sequence(masks: Vec<Mask>) -> Mask {
        Mask::pattern(choice::Choice::by_sequence(masks))
    }

    /// A pattern of your own.
    pub fn pattern(pattern: impl Pattern + 'static) -> Mask {
        Mask::Pattern(Arc::new(pattern))
    }

    /// Visible in both.
    pub fn and(self, other: Mask) -> Mask {
        match (self, other) {
            (Mask::Full, mask) | (mask, Mask::Full) => mask,
            (Mask::Band(a), Mask::Band(b)) => Mask::Band(a.and(b)),
            (a, b) => Mask::And(Arc::new([a, b])),
        }
    }

    /// Visible in either.
    pub fn or(self, other: Mask) -> Mask {
        match (self, other) {
            (Mask::Full, _) | (_, Mask::Full) => Mask::Full,
            (a, b) => Mask::Or(Arc::new([a, b])),
        }
    }
}

impl From<Documents> for Mask {
    fn from(documents: Documents) -> Mask {
        Mask::Documents(Arc::new(documents))
    }
}

impl From<Dense> for Mask {
    fn from(dense: Dense) -> Mask {
        Mask::Dense(Arc::new(dense))
    }
}

/// Patterns that need no variant of their own.
macro_rules! as_pattern {
    ($($pattern:ty),*) => {
        $(impl From<$pattern> for Mask {
            fn from(pattern: $pattern) -> Mask {
                Mask::pattern(pattern)
            }
        })*
    };
}

as_pattern!(Blocks, Keys, Prefix, Tree);

/// Calls a method of the variant's own pattern.
macro_rules! each {
    ($mask:expr, $pattern:ident => $call:expr) => {
        match $mask {
            Mask::Full => {
                let $pattern = &band::Everything;
                $call
            }
            Mask::Band($pattern) => $call,
            Mask::Documents($pattern) => $call,
            Mask::Dense($pattern) => $call,
            Mask::Pattern($pattern) => $call,
            Mask::And(both) => {
                let $pattern = &combine::And(&both[0], &both[1]);
                $call
            }
            Mask::Or(both) => {
                let $pattern = &combine::Or(&both[0], &both[1]);
                $call
            }
        }
    };
}

impl Pattern for Mask {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        each!(self, p => p.allows(at, i, j))
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        each!(self, p => p.live(at, rows, keys, visit))
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        each!(self, p => p.fill(at, i, keys, bits))
    }

    fn same_for_all_heads(&self) -> bool {
        each!(self, p => p.same_for_all_heads())
    }

    fn check(&self, extent: Extent) -> crate::Result<()> {
        each!(self, p => p.check(extent))
    }

    fn check_sequence(&self, batch: usize, extent: Extent) -> crate::Result<()> {
        each!(self, p => p.check_sequence(batch, extent))
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Mask::Full => f.write_str("full"),
            Mask::Band(band) => band.fmt(f),
            Mask::Documents(documents) => write!(f, "{} documents", documents.count()),
            Mask::Dense(_) => f.write_str("dense"),
            Mask::Pattern(pattern) => pattern.describe(f),
            Mask::And(both) => write!(f, "({} and {})", both[0], both[1]),
            Mask::Or(both) => write!(f, "({} or {})", both[0], both[1]),
        }
    }
}

/// The only entry, or that of a sequence.
fn one_or_own<T>(entries: &[T], batch: usize) -> Option<&T> {
    match entries {
        [one] => Some(one),
        _ => entries.get(batch),
    }
}

/// Refuses a batch for which `what` holds neither one entry nor one a sequence.
fn check_sequences(what: &'static str, entries: usize, extent: Extent) -> crate::Result<()> {
    if entries == 1 || entries == extent.batch {
        return Ok(());
    }
    let show = |n: usize| format!("{n} sequences");
    Err(crate::Error::MaskShape { what, expected: show(entries), got: show(extent.batch) })
}
