//! Everything that a call can refuse, with what was found, what was expected and what to do.

use crate::projection::{Format, RowError};
use crate::tensor::Shape;

/// The result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused. Nothing has been written when one of these comes back.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer does not hold what its shape and strides say.
    #[error("{what}: the buffer holds {got} elements, the shape needs {expected}")]
    BufferLength {
        /// Which buffer.
        what: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements found.
        got: usize,
    },
    /// A shape whose element count, strides or workspace overflow the address space.
    #[error(
        "{what}: the shape {shape}, with its strides or what a call on it needs, is larger than the address space"
    )]
    ShapeOverflow {
        /// Which tensor.
        what: &'static str,
        /// The shape.
        shape: Shape,
    },
    /// Strides of an output under which two elements share one place.
    #[error("strides of an output of shape {shape} make rows overlap; outputs need disjoint rows")]
    OverlappingOutput {
        /// The shape.
        shape: Shape,
    },
    /// Two shapes that have to agree do not.
    #[error("{what}: expected {expected}, got {got}")]
    ShapeMismatch {
        /// What has to agree, in words.
        what: &'static str,
        /// The expected shape.
        expected: Shape,
        /// The shape found.
        got: Shape,
    },
    /// Query heads can't be shared out evenly over the key/value heads.
    #[error(
        "{heads} query heads can't be grouped over {kv_heads} key/value heads; \
         the first must be a multiple of the second"
    )]
    HeadGrouping {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// A number outside the range that a parameter accepts.
    #[error("{what} = {got}: expected {expected}")]
    InvalidParameter {
        /// Which parameter.
        what: &'static str,
        /// What it accepts.
        expected: &'static str,
        /// What it was given.
        got: String,
    },
    /// A mask that was made for other sequence lengths than those of the call.
    #[error("{what} was made for {expected}, the call has {got}")]
    MaskShape {
        /// Which mask.
        what: &'static str,
        /// What the mask covers.
        expected: String,
        /// What the call asks for.
        got: String,
    },
    /// More rows in one call than the row kernels take.
    #[error("{got} generated rows in one call, at most {limit}; run longer inputs as a prompt")]
    TooManyRows {
        /// Rows asked for.
        got: usize,
        /// Rows that one call takes.
        limit: usize,
    },
    /// A workspace that is smaller than the plan needs.
    #[error(
        "the workspace holds {got} bytes, the plan needs {expected}; make it with Workspace::for_plan, \
         for a backward pass with Workspace::for_backward"
    )]
    WorkspaceTooSmall {
        /// Bytes needed.
        expected: usize,
        /// Bytes found.
        got: usize,
    },
    /// A backward pass of a plan for generated tokens.
    #[error(
        "the plan is for generated tokens, which have no backward pass; make it with Attention::plan"
    )]
    NoBackward,
    /// Memory that the system does not give.
    #[error("there is no memory for {what} of {bytes} bytes")]
    OutOfMemory {
        /// What it is for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// An append that would exceed a cache's capacity. The cache is unchanged.
    #[error("the cache holds {len} of {capacity} tokens; {appended} more do not fit")]
    CacheFull {
        /// Tokens held.
        len: usize,
        /// Tokens that fit.
        capacity: usize,
        /// Tokens that were to be appended.
        appended: usize,
    },
    /// A store outside of this crate that could not take what it was given.
    #[error("the store of a memory: {reason}")]
    Store {
        /// What it says.
        reason: String,
    },
    /// An append that would take more pages than are free. The pool is unchanged.
    #[error(
        "the tokens need {needed} more pages, {free} are free; free sequences or make the pool larger"
    )]
    OutOfPages {
        /// Pages needed.
        needed: usize,
        /// Pages that no sequence holds.
        free: usize,
    },
    /// A stored row whose length does not fit its format or its bytes.
    #[error(transparent)]
    Row(#[from] RowError),
    /// A stored matrix whose bytes are too few or too many for its shape.
    #[error(
        "a {format} matrix of {out_features} rows of {in_features} elements has {expected} bytes, \
         got {got}"
    )]
    MatrixBytes {
        /// The format of the matrix.
        format: Format,
        /// Its rows.
        out_features: usize,
        /// Elements of a row.
        in_features: usize,
        /// The bytes that such a matrix has; `usize::MAX` if more than the address space.
        expected: usize,
        /// The bytes given.
        got: usize,
    },
    /// Two lengths that have to agree do not.
    #[error("{what}: expected a length of {expected}, got {got}")]
    LengthMismatch {
        /// What has to agree, in words.
        what: &'static str,
        /// The expected length.
        expected: usize,
        /// The length found.
        got: usize,
    },
    /// A row number at or beyond the end.
    #[error("{what} {got} is out of range; there are {limit}")]
    OutOfRange {
        /// What is counted, in words.
        what: &'static str,
        /// The number given.
        got: usize,
        /// How many there are.
        limit: usize,
    },
    /// A recurrent state of other extents, or of another kind, than the call's.
    #[error(
        "the state is {got}, the call needs {expected}; make it with Recurrent::state, or Infini::memory"
    )]
    StateShape {
        /// What the call needs.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A SIMD level that does not exist or that this processor lacks.
    #[error("SIMD level {name:?} is not available; this processor offers {available}")]
    SimdUnavailable {
        /// The name asked for.
        name: String,
        /// The names that work here, separated by commas.
        available: String,
    },
}
