/* Foveal: attention for CPUs, exact and fast. The C interface.
 *
 * Made by `cargo xtask docs` from crates/foveal-c; changes belong there.
 *
 * Tensors are [batch, seq, heads, dim] with strides in elements. Structs of zeros mean nothing, or the default, so
 * that members which a caller does not know stay out of the way. Calls return a status, and write nothing unless it
 * is FOVEAL_OK; foveal_last_error_message() says why in words. All memory but a workspace belongs to the caller, and
 * nothing is kept after a call. Calls may run on several threads at once; they share the threads of one pool, whose
 * number the environment variable RAYON_NUM_THREADS sets.
 *
 * Numbers are checked: NULL, alignment, extents, strides, overlap. That a pointer points to as much memory as its
 * struct says cannot be checked, and is the caller's promise.
 */

#ifndef FOVEAL_H
#define FOVEAL_H

#include <stddef.h>
#include <stdint.h>

/// Scratch memory that is kept between calls; it grows to what the largest of them needs. One call at a time may
/// use it.
typedef struct foveal_workspace foveal_workspace;

/// What scores are multiplied by: `FOVEAL_SCALE_INVERSE_SQRT_DIM` or `FOVEAL_SCALE_VALUE`.
typedef uint32_t foveal_scale_kind;

/// Linear biases (ALiBi): `FOVEAL_ALIBI_NONE`, `FOVEAL_ALIBI_STANDARD` or `FOVEAL_ALIBI_GIVEN`.
typedef uint32_t foveal_alibi_kind;

/// Numbers that are only read; absent if both members are zero.
typedef struct foveal_floats {
  /// The first of them.
  const float *data;
  /// How many there are.
  size_t len;
} foveal_floats;

/// Which keys a query may see: one of `FOVEAL_MASK_FULL`, `_CAUSAL`, `_WINDOW`, `_DOCUMENTS`, `_BYTES`, `_BITS`.
typedef uint32_t foveal_mask_kind;

/// Keys from `behind` before the query's position to `ahead` after it, both included.
typedef struct foveal_band {
  /// 1 if `behind` is a limit, 0 if there is none.
  uint32_t has_behind;
  /// 1 if `ahead` is a limit, 0 if there is none.
  uint32_t has_ahead;
  /// How far back.
  size_t behind;
  /// How far forward.
  size_t ahead;
} foveal_band;

/// Documents packed one after the other into one sequence ("varlen", `cu_seqlens`), the same for the whole batch.
typedef struct foveal_documents {
  /// `count + 1` cumulative lengths among the queries, from 0 to their number.
  const size_t *query_starts;
  /// `count + 1` cumulative lengths among the keys; NULL if they are those of the queries.
  const size_t *key_starts;
  /// Documents.
  size_t count;
} foveal_documents;

/// A mask `[batch, heads, queries, keys]` without gaps; a batch or heads of 1 is shared by all.
///
/// `FOVEAL_MASK_BYTES`: one byte a key (`uint8_t`). `FOVEAL_MASK_BITS`: words (`uint64_t`), of which each row has
/// `(keys + 63) / 64`; key `j` is bit `j % 64` of word `j / 64`, the lowest first. The call copies it, as bits.
typedef struct foveal_dense_mask {
  /// The first byte or word.
  const void *data;
  /// Sequences, or 1.
  size_t batch;
  /// Query heads, or 1.
  size_t heads;
  /// Queries.
  size_t queries;
  /// Keys.
  size_t keys;
} foveal_dense_mask;

/// Which keys each query may see. Query `i` of T sits at position `i + S - T` among S keys, so that the last query
/// sits at the last key. A row that may see nothing gives output 0 and log-sum-exp -infinity.
///
/// Members that the kind does not use are zero.
typedef struct foveal_mask {
  /// What the mask is made of.
  foveal_mask_kind kind;
  /// Keys of a window. `FOVEAL_MASK_WINDOW` only.
  size_t width;
  /// With every kind: keys outside of it are hidden too. With documents it is counted within each, its last query
  /// at its last key.
  struct foveal_band band;
  /// `FOVEAL_MASK_DOCUMENTS` only.
  struct foveal_documents documents;
  /// `FOVEAL_MASK_BYTES` and `FOVEAL_MASK_BITS` only.
  struct foveal_dense_mask dense;
} foveal_mask;

/// How numbers are stored: one of `FOVEAL_F32`, `FOVEAL_F16`, `FOVEAL_BF16`. Arithmetic is 32-bit for all of them.
typedef uint32_t foveal_dtype;

/// A view of memory that belongs to the caller: element (b, t, h, d) is at
/// `data + b * strides[0] + t * strides[1] + h * strides[2] + d`, counted in elements.
///
/// The last axis is contiguous. Strides of inputs may be anything, zero included; rows of outputs must be disjoint.
/// Inputs are only read. `data` may be NULL if an extent is 0. A tensor of zero bytes (NULL, extents 0) stands for
/// one that is absent, where that is allowed.
typedef struct foveal_tensor {
  /// The first element, aligned to its size.
  void *data;
  /// How elements are stored.
  foveal_dtype dtype;
  /// Extents: batch, sequence, heads, dim.
  size_t shape[4];
  /// Elements from one sequence of the batch, one token, one head to the next.
  size_t strides[3];
} foveal_tensor;

/// A learned bias by bucketed distance (T5, Raffel et al. 2020); absent if every member is zero.
typedef struct foveal_relative_bias {
  /// `[buckets, heads]` row by row; 2 to 512 buckets.
  struct foveal_floats table;
  /// Query heads.
  size_t heads;
  /// The distance from which on all share the last bucket: 128 in T5, at most 65536.
  size_t max_distance;
  /// 1 if half of the buckets are for keys ahead of the query, 0 if those count as distance 0.
  uint32_t bidirectional;
} foveal_relative_bias;

/// Weights that are left out at random. The choice depends on seed, sequence, head and the two positions alone, so
/// that backward makes it again.
typedef struct foveal_dropout {
  /// The part that is left out, from 0 (none) to less than 1; the others are divided by 1 - rate.
  float rate;
  /// What the choice depends on.
  uint64_t seed;
} foveal_dropout;

/// What is to be computed: `softmax(scale * Q K^T under the mask) V`. All zero, or `foveal_attention_default()`, is
/// everything sees everything, on all threads.
///
/// Scores go through, in this order: scale, softcap, biases (dense, linear, relative), mask, sinks, softmax,
/// dropout. Everything that is pointed to belongs to the caller, is read during the call only, and is not written.
typedef struct foveal_attention {
  /// Where the scale comes from.
  foveal_scale_kind scale_kind;
  /// The scale; 0 unless `scale_kind` is `FOVEAL_SCALE_VALUE`.
  float scale;
  /// Scores become `softcap * tanh(score / softcap)`; 0 for none.
  float softcap;
  /// Linear biases.
  foveal_alibi_kind alibi_kind;
  /// One slope a query head; absent unless `alibi_kind` is `FOVEAL_ALIBI_GIVEN`.
  struct foveal_floats alibi_slopes;
  /// Who may see whom.
  struct foveal_mask mask;
  /// `[B, T, H, S]`, `FOVEAL_F32`, of which the first three extents may be 1 and are shared then; absent for none.
  struct foveal_tensor bias;
  /// A bias by distance.
  struct foveal_relative_bias relative_bias;
  /// One logit a query head, as of a key without a value; absent for none.
  struct foveal_floats sinks;
  /// Left out weights.
  struct foveal_dropout dropout;
  /// The most threads that the call may use; 0 for all that there are.
  size_t threads;
  /// Instructions: "portable", "avx2", "avx512" or "avx512bf16"; NULL for those of the environment variable
  /// FOVEAL_SIMD, else the fastest.
  const char *level;
} foveal_attention;

/// What a call returns: `FOVEAL_OK`, or why it was refused. A refused call has written nothing, except after
/// `FOVEAL_PANIC`; `foveal_last_error_message` says in words what was found and what was expected.
typedef int32_t foveal_status;

/// Queries, keys and values. Query head `h` reads key/value head `h / (H / KV)`; H is a multiple of KV.
typedef struct foveal_inputs {
  /// `[B, T, H, Dk]`, Dk from 1 to 4096.
  struct foveal_tensor q;
  /// `[B, S, KV, Dk]`. May be stored in another type than the queries.
  struct foveal_tensor k;
  /// `[B, S, KV, Dv]`, stored as the keys, Dv from 1 to 4096.
  struct foveal_tensor v;
} foveal_inputs;

/// Results of forward and decode, which write them, and what backward needs of them, which reads them.
typedef struct foveal_results {
  /// `[B, T, H, Dv]`, stored as the queries.
  struct foveal_tensor out;
  /// Log-sum-exp of each row's scores, `[B, T, H, 1]`, `FOVEAL_F32`, natural logarithm. May be absent in forward
  /// and decode.
  struct foveal_tensor lse;
} foveal_results;

/// The gradients of a loss with respect to forward's results.
typedef struct foveal_upstream {
  /// Of the output, in its shape, stored as the queries.
  struct foveal_tensor d_out;
  /// Of the log-sum-exp, in its shape, `FOVEAL_F32`; absent for zeros.
  struct foveal_tensor d_lse;
} foveal_upstream;

/// Numbers that are written; absent if both members are zero.
typedef struct foveal_floats_out {
  /// The first of them.
  float *data;
  /// How many there are.
  size_t len;
} foveal_floats_out;

/// Where backward writes the gradients of the loss. What was there is overwritten.
typedef struct foveal_gradients {
  /// Of the queries, in their shape and type.
  struct foveal_tensor d_q;
  /// Of the keys, in their shape and type: the sum over the query heads that read them.
  struct foveal_tensor d_k;
  /// Of the values, likewise.
  struct foveal_tensor d_v;
  /// Of the bias, in its shape, `FOVEAL_F32`, summed over the axes that it shares; absent if not wanted.
  struct foveal_tensor d_bias;
  /// Of the slopes, one a query head; absent if not wanted.
  struct foveal_floats_out d_slopes;
  /// Of the table of the relative bias, `[buckets, heads]`; absent if not wanted.
  struct foveal_floats_out d_table;
  /// Of the sinks, one a query head; absent if not wanted.
  struct foveal_floats_out d_sinks;
} foveal_gradients;

/// Done.
#define FOVEAL_OK 0

/// A pointer is NULL where something has to be.
#define FOVEAL_NULL_POINTER 1

/// A pointer is not aligned for what it points to.
#define FOVEAL_MISALIGNED 2

/// A number of a tag (a dtype, a kind) that means nothing.
#define FOVEAL_UNKNOWN_VALUE 3

/// A tensor is stored in another type than it has to be.
#define FOVEAL_DTYPE_MISMATCH 4

/// Extents and strides, or what a call needs for them, exceed the address space.
#define FOVEAL_SHAPE_OVERFLOW 5

/// Something that is written shares memory with itself or with something else.
#define FOVEAL_OVERLAP 6

/// Two shapes that have to agree do not.
#define FOVEAL_SHAPE_MISMATCH 7

/// Two lengths that have to agree do not.
#define FOVEAL_LENGTH_MISMATCH 8

/// The number of query heads is no multiple of the number of key/value heads.
#define FOVEAL_HEAD_GROUPING 9

/// A mask was made for other lengths than those of the call.
#define FOVEAL_MASK_SHAPE 10

/// A number outside of the range that a parameter accepts.
#define FOVEAL_INVALID_PARAMETER 11

/// More query rows than `foveal_attention_decode` takes in one call.
#define FOVEAL_TOO_MANY_ROWS 12

/// The processor lacks the instructions that were asked for.
#define FOVEAL_LEVEL_UNAVAILABLE 13

/// The workspace is in use by another call.
#define FOVEAL_WORKSPACE_BUSY 14

/// There is no memory for the workspace or the mask.
#define FOVEAL_OUT_OF_MEMORY 15

/// A reason that has no status of its own.
#define FOVEAL_OTHER 98

/// A defect of the library. Outputs may have been written in part.
#define FOVEAL_PANIC 99

/// IEEE 754 binary32, `float`.
#define FOVEAL_F32 0

/// IEEE 754 binary16.
#define FOVEAL_F16 1

/// The upper half of a binary32.
#define FOVEAL_BF16 2

/// 1 / sqrt(key dim).
#define FOVEAL_SCALE_INVERSE_SQRT_DIM 0

/// The member `scale`.
#define FOVEAL_SCALE_VALUE 1

/// No linear bias.
#define FOVEAL_ALIBI_NONE 0

/// The slopes of the paper (Press et al. 2022), for any number of heads.
#define FOVEAL_ALIBI_STANDARD 1

/// The member `alibi_slopes`.
#define FOVEAL_ALIBI_GIVEN 2

/// All.
#define FOVEAL_MASK_FULL 0

/// Those at or before the query's position.
#define FOVEAL_MASK_CAUSAL 1

/// The `width` newest ones at or before the query's position, its own included.
#define FOVEAL_MASK_WINDOW 2

/// Those of the query's own document: `documents`.
#define FOVEAL_MASK_DOCUMENTS 3

/// Those whose byte in `dense` is not 0.
#define FOVEAL_MASK_BYTES 4

/// Those whose bit in `dense` is 1.
#define FOVEAL_MASK_BITS 5

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/// The text of the last error that a call on this thread ended with; empty if none did. Never NULL. It belongs to
/// the library, and stays as it is until the next call on this thread fails or the thread ends.
const char *foveal_last_error_message(void);

/// An empty workspace, to be freed with `foveal_workspace_free`.
struct foveal_workspace *foveal_workspace_create(void);

/// Frees a workspace and its memory. NULL is ignored.
///
/// # Safety
/// `workspace` comes from `foveal_workspace_create`, no call uses it, and it is not used again.
void foveal_workspace_free(struct foveal_workspace *workspace);

/// The library's version, for example "0.1.0". Structs may change with it: header and library of one version belong
/// together.
const char *foveal_version(void);

/// Everything sees everything, scores are scaled by 1 / sqrt(key dim), all threads: a struct of zeros.
struct foveal_attention foveal_attention_default(void);

/// A view of a tensor `[batch, seq, heads, dim]` without gaps. Reads nothing. Strides that overflow become the
/// largest there is, and the call that uses them refuses them.
struct foveal_tensor foveal_tensor_dense(const void *data,
                                         foveal_dtype dtype,
                                         size_t batch,
                                         size_t seq,
                                         size_t heads,
                                         size_t dim);

/// Attention of all queries of a prompt: writes `results.out`, and `results.lse` if it is there.
///
/// `attention` may be NULL for the default; `workspace` may be NULL, then the call allocates what it needs.
/// May be called by several threads at once, each with outputs and a workspace of its own.
///
/// # Safety
/// Pointers are NULL or point to what their types say; a tensor's memory is there from its first element to its
/// last, and is not written by anybody else during the call.
foveal_status foveal_attention_forward(const struct foveal_attention *attention,
                                       const struct foveal_inputs *inputs,
                                       const struct foveal_results *results,
                                       struct foveal_workspace *workspace);

/// Like `foveal_attention_forward`, for generated tokens: up to 64 query rows, which read keys and values from end
/// to end as they lie. Rows of one call give the same bits as rows of several.
///
/// Sequences of different lengths are calls of their own, with a batch of 1 each.
///
/// # Safety
/// That of `foveal_attention_forward`.
foveal_status foveal_attention_decode(const struct foveal_attention *attention,
                                      const struct foveal_inputs *inputs,
                                      const struct foveal_results *results,
                                      struct foveal_workspace *workspace);

/// Gradients of a loss with respect to queries, keys and values, and to the bias, slopes, table and sinks if they
/// are wanted.
///
/// `attention` and `inputs` are those of the forward call, `results` what it wrote, both members of it. Gradients do
/// not share memory with each other, not even interleaved.
///
/// # Safety
/// That of `foveal_attention_forward`.
foveal_status foveal_attention_backward(const struct foveal_attention *attention,
                                        const struct foveal_inputs *inputs,
                                        const struct foveal_results *results,
                                        const struct foveal_upstream *upstream,
                                        const struct foveal_gradients *gradients,
                                        struct foveal_workspace *workspace);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FOVEAL_H */
