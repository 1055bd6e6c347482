//! The structs and tags of the header. All of them mean something when every byte is zero: nothing, or the default.

use std::ffi::{c_char, c_void};

/// How numbers are stored: one of `FOVEAL_F32`, `FOVEAL_F16`, `FOVEAL_BF16`. Arithmetic is 32-bit for all of them.
pub type foveal_dtype = u32;

/// IEEE 754 binary32, `float`.
pub const FOVEAL_F32: foveal_dtype = 0;
/// IEEE 754 binary16.
pub const FOVEAL_F16: foveal_dtype = 1;
/// The upper half of a binary32.
pub const FOVEAL_BF16: foveal_dtype = 2;

/// A view of memory that belongs to the caller: element (b, t, h, d) is at
/// `data + b * strides[0] + t * strides[1] + h * strides[2] + d`, counted in elements.
///
/// The last axis is contiguous. Strides of inputs may be anything, zero included; rows of outputs must be disjoint.
/// Inputs are only read. `data` may be NULL if an extent is 0. A tensor of zero bytes (NULL, extents 0) stands for
/// one that is absent, where that is allowed.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_tensor {
    /// The first element, aligned to its size.
    pub data: *mut c_void,
    /// How elements are stored.
    pub dtype: foveal_dtype,
    /// Extents: batch, sequence, heads, dim.
    pub shape: [usize; 4],
    /// Elements from one sequence of the batch, one token, one head to the next.
    pub strides: [usize; 3],
}

/// Numbers that are only read; absent if both members are zero.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_floats {
    /// The first of them.
    pub data: *const f32,
    /// How many there are.
    pub len: usize,
}

/// Numbers that are written; absent if both members are zero.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_floats_out {
    /// The first of them.
    pub data: *mut f32,
    /// How many there are.
    pub len: usize,
}

/// What scores are multiplied by: `FOVEAL_SCALE_INVERSE_SQRT_DIM` or `FOVEAL_SCALE_VALUE`.
pub type foveal_scale_kind = u32;

/// 1 / sqrt(key dim).
pub const FOVEAL_SCALE_INVERSE_SQRT_DIM: foveal_scale_kind = 0;
/// The member `scale`.
pub const FOVEAL_SCALE_VALUE: foveal_scale_kind = 1;

/// Linear biases (ALiBi): `FOVEAL_ALIBI_NONE`, `FOVEAL_ALIBI_STANDARD` or `FOVEAL_ALIBI_GIVEN`.
pub type foveal_alibi_kind = u32;

/// No linear bias.
pub const FOVEAL_ALIBI_NONE: foveal_alibi_kind = 0;
/// The slopes of the paper (Press et al. 2022), for any number of heads.
pub const FOVEAL_ALIBI_STANDARD: foveal_alibi_kind = 1;
/// The member `alibi_slopes`.
pub const FOVEAL_ALIBI_GIVEN: foveal_alibi_kind = 2;

/// Which keys a query may see: one of `FOVEAL_MASK_FULL`, `_CAUSAL`, `_WINDOW`, `_DOCUMENTS`, `_BYTES`, `_BITS`.
pub type foveal_mask_kind = u32;

/// All.
pub const FOVEAL_MASK_FULL: foveal_mask_kind = 0;
/// Those at or before the query's position.
pub const FOVEAL_MASK_CAUSAL: foveal_mask_kind = 1;
/// The `width` newest ones at or before the query's position, its own included.
pub const FOVEAL_MASK_WINDOW: foveal_mask_kind = 2;
/// Those of the query's own document: `documents`.
pub const FOVEAL_MASK_DOCUMENTS: foveal_mask_kind = 3;
/// Those whose byte in `dense` is not 0.
pub const FOVEAL_MASK_BYTES: foveal_mask_kind = 4;
/// Those whose bit in `dense` is 1.
pub const FOVEAL_MASK_BITS: foveal_mask_kind = 5;

/// Keys from `behind` before the query's position to `ahead` after it, both included.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct foveal_band {
    /// 1 if `behind` is a limit, 0 if there is none.
    pub has_behind: u32,
    /// 1 if `ahead` is a limit, 0 if there is none.
    pub has_ahead: u32,
    /// How far back.
    pub behind: usize,
    /// How far forward.
    pub ahead: usize,
}

/// Documents packed one after the other into one sequence ("varlen", `cu_seqlens`), the same for the whole batch.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_documents {
    /// `count + 1` cumulative lengths among the queries, from 0 to their number.
    pub query_starts: *const usize,
    /// `count + 1` cumulative lengths among the keys; NULL if they are those of the queries.
    pub key_starts: *const usize,
    /// Documents.
    pub count: usize,
}

/// A mask `[batch, heads, queries, keys]` without gaps; a batch or heads of 1 is shared by all.
///
/// `FOVEAL_MASK_BYTES`: one byte a key (`uint8_t`). `FOVEAL_MASK_BITS`: words (`uint64_t`), of which each row has
/// `(keys + 63) / 64`; key `j` is bit `j % 64` of word `j / 64`, the lowest first. The call copies it, as bits.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_dense_mask {
    /// The first byte or word.
    pub data: *const c_void,
    /// Sequences, or 1.
    pub batch: usize,
    /// Query heads, or 1.
    pub heads: usize,
    /// Queries.
    pub queries: usize,
    /// Keys.
    pub keys: usize,
}

/// Which keys each query may see. Query `i` of T sits at position `i + S - T` among S keys, so that the last query
/// sits at the last key. A row that may see nothing gives output 0 and log-sum-exp -infinity.
///
/// Members that the kind does not use are zero.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_mask {
    /// What the mask is made of.
    pub kind: foveal_mask_kind,
    /// Keys of a window. `FOVEAL_MASK_WINDOW` only.
    pub width: usize,
    /// With every kind: keys outside of it are hidden too. With documents it is counted within each, its last query
    /// at its last key.
    pub band: foveal_band,
    /// `FOVEAL_MASK_DOCUMENTS` only.
    pub documents: foveal_documents,
    /// `FOVEAL_MASK_BYTES` and `FOVEAL_MASK_BITS` only.
    pub dense: foveal_dense_mask,
}

/// A learned bias by bucketed distance (T5, Raffel et al. 2020); absent if every member is zero.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_relative_bias {
    /// `[buckets, heads]` row by row; 2 to 512 buckets.
    pub table: foveal_floats,
    /// Query heads.
    pub heads: usize,
    /// The distance from which on all share the last bucket: 128 in T5, at most 65536.
    pub max_distance: usize,
    /// 1 if half of the buckets are for keys ahead of the query, 0 if those count as distance 0.
    pub bidirectional: u32,
}

/// Weights that are left out at random. The choice depends on seed, sequence, head and the two positions alone, so
/// that backward makes it again.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct foveal_dropout {
    /// The part that is left out, from 0 (none) to less than 1; the others are divided by 1 - rate.
    pub rate: f32,
    /// What the choice depends on.
    pub seed: u64,
}

/// What is to be computed: `softmax(scale * Q K^T under the mask) V`. All zero, or `foveal_attention_default()`, is
/// everything sees everything, on all threads.
///
/// Scores go through, in this order: scale, softcap, biases (dense, linear, relative), mask, sinks, softmax,
/// dropout. Everything that is pointed to belongs to the caller, is read during the call only, and is not written.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_attention {
    /// Where the scale comes from.
    pub scale_kind: foveal_scale_kind,
    /// The scale; 0 unless `scale_kind` is `FOVEAL_SCALE_VALUE`.
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)`; 0 for none.
    pub softcap: f32,
    /// Linear biases.
    pub alibi_kind: foveal_alibi_kind,
    /// One slope a query head; absent unless `alibi_kind` is `FOVEAL_ALIBI_GIVEN`.
    pub alibi_slopes: foveal_floats,
    /// Who may see whom.
    pub mask: foveal_mask,
    /// `[B, T, H, S]`, `FOVEAL_F32`, of which the first three extents may be 1 and are shared then; absent for none.
    pub bias: foveal_tensor,
    /// A bias by distance.
    pub relative_bias: foveal_relative_bias,
    /// One logit a query head, as of a key without a value; absent for none.
    pub sinks: foveal_floats,
    /// Left out weights.
    pub dropout: foveal_dropout,
    /// The most threads that the call may use; 0 for all that there are.
    pub threads: usize,
    /// Instructions: "portable", "avx2", "avx512" or "avx512bf16"; NULL for those of the environment variable
    /// FOVEAL_SIMD, else the fastest.
    pub level: *const c_char,
}

/// Queries, keys and values. Query head `h` reads key/value head `h / (H / KV)`; H is a multiple of KV.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_inputs {
    /// `[B, T, H, Dk]`, Dk from 1 to 4096.
    pub q: foveal_tensor,
    /// `[B, S, KV, Dk]`. May be stored in another type than the queries.
    pub k: foveal_tensor,
    /// `[B, S, KV, Dv]`, stored as the keys, Dv from 1 to 4096.
    pub v: foveal_tensor,
}

/// Results of forward and decode, which write them, and what backward needs of them, which reads them.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_results {
    /// `[B, T, H, Dv]`, stored as the queries.
    pub out: foveal_tensor,
    /// Log-sum-exp of each row's scores, `[B, T, H, 1]`, `FOVEAL_F32`, natural logarithm. May be absent in forward
    /// and decode.
    pub lse: foveal_tensor,
}

/// The gradients of a loss with respect to forward's results.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_upstream {
    /// Of the output, in its shape, stored as the queries.
    pub d_out: foveal_tensor,
    /// Of the log-sum-exp, in its shape, `FOVEAL_F32`; absent for zeros.
    pub d_lse: foveal_tensor,
}

/// Where backward writes the gradients of the loss. What was there is overwritten.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct foveal_gradients {
    /// Of the queries, in their shape and type.
    pub d_q: foveal_tensor,
    /// Of the keys, in their shape and type: the sum over the query heads that read them.
    pub d_k: foveal_tensor,
    /// Of the values, likewise.
    pub d_v: foveal_tensor,
    /// Of the bias, in its shape, `FOVEAL_F32`, summed over the axes that it shares; absent if not wanted.
    pub d_bias: foveal_tensor,
    /// Of the slopes, one a query head; absent if not wanted.
    pub d_slopes: foveal_floats_out,
    /// Of the table of the relative bias, `[buckets, heads]`; absent if not wanted.
    pub d_table: foveal_floats_out,
    /// Of the sinks, one a query head; absent if not wanted.
    pub d_sinks: foveal_floats_out,
}
