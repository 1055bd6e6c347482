//! Bad input of every kind: the status, what the message names, and that nothing has been written.

mod support;

use foveal_c::*;
use std::ptr::{null, null_mut, without_provenance, without_provenance_mut};
use support::*;

type Run = fn(&Structs, *mut foveal_workspace) -> foveal_status;

/// Runs calls on structs that `spoil` changed; all have to refuse them alike.
fn refused_by(calls: &[Run], expected: foveal_status, words: &str, spoil: impl Fn(&mut Structs)) {
    let mut call = Call::new();
    let mut structs = call.structs();
    spoil(&mut structs);
    for run in calls {
        assert_eq!(run(&structs, null_mut()), expected, "{words}: {}", message());
        assert!(message().contains(words), "{:?} has no {words:?}", message());
    }
    untouched(&call);
}

fn refused(expected: foveal_status, words: &str, spoil: impl Fn(&mut Structs)) {
    refused_by(&[Structs::forward, Structs::decode, Structs::backward], expected, words, spoil);
}

/// Refused where results are written.
fn no_result(expected: foveal_status, words: &str, spoil: impl Fn(&mut Structs)) {
    refused_by(&[Structs::forward, Structs::decode], expected, words, spoil);
}

fn no_gradient(expected: foveal_status, words: &str, spoil: impl Fn(&mut Structs)) {
    refused_by(&[Structs::backward], expected, words, spoil);
}

fn untouched(call: &Call) {
    for output in call.outputs() {
        assert!(output.iter().all(|x| x.is_nan()), "{call:?}");
    }
}

#[test]
fn what_is_spoilt_below_is_fine_otherwise() {
    let mut call = Call::new();
    let structs = call.structs();
    assert_eq!(structs.forward(null_mut()), FOVEAL_OK);
    assert_eq!(structs.decode(null_mut()), FOVEAL_OK);
    assert_eq!(structs.backward(null_mut()), FOVEAL_OK);
    assert!(call.outputs()[..5].iter().all(|output| output.iter().all(|x| x.is_finite())));
}

#[test]
fn structs_that_are_not_there() {
    let mut call = Call::new();
    let s = call.structs();
    let odd = without_provenance::<foveal_inputs>(9);
    // SAFETY: what is not NULL points to a struct or is refused for its alignment.
    unsafe {
        let (a, i, r, w) = (&s.attention, &s.inputs, &s.results, null_mut());
        assert_eq!(foveal_attention_forward(a, null(), r, w), FOVEAL_NULL_POINTER);
        assert!(message().starts_with("inputs is NULL"), "{}", message());
        assert_eq!(foveal_attention_decode(a, i, null(), w), FOVEAL_NULL_POINTER);
        assert!(message().starts_with("results is NULL"), "{}", message());
        assert_eq!(foveal_attention_forward(a, odd, r, w), FOVEAL_MISALIGNED);
        let (u, g) = (&s.upstream, &s.gradients);
        assert_eq!(foveal_attention_backward(a, i, r, null(), g, w), FOVEAL_NULL_POINTER);
        assert!(message().starts_with("upstream is NULL"), "{}", message());
        assert_eq!(foveal_attention_backward(a, i, r, u, null(), w), FOVEAL_NULL_POINTER);
        assert!(message().starts_with("gradients is NULL"), "{}", message());
        let odd = without_provenance_mut(9);
        assert_eq!(foveal_attention_forward(a, i, r, odd), FOVEAL_MISALIGNED);
        assert!(message().starts_with("the workspace"), "{}", message());
        untouched(&call);
    }
}

#[test]
fn pointers_of_tensors() {
    refused(FOVEAL_NULL_POINTER, "inputs.q is NULL; expected 320 elements", |s| {
        s.inputs.q.data = null_mut();
    });
    refused(FOVEAL_NULL_POINTER, "results.out", |s| s.results.out.data = null_mut());
    refused(FOVEAL_NULL_POINTER, "results.lse", |s| s.results.lse.data = null_mut());
    refused(FOVEAL_MISALIGNED, "inputs.k is at address", |s| {
        s.inputs.k.data = s.inputs.k.data.wrapping_byte_add(2);
    });
    refused(FOVEAL_MISALIGNED, "results.out", |s| {
        s.results.out.data = s.results.out.data.wrapping_byte_add(1);
    });
    refused(FOVEAL_SHAPE_OVERFLOW, "inputs.v", |s| {
        s.inputs.v.data = without_provenance_mut(usize::MAX - 3);
    });
    no_gradient(FOVEAL_NULL_POINTER, "upstream.d_out", |s| s.upstream.d_out.data = null_mut());
    no_gradient(FOVEAL_NULL_POINTER, "gradients.d_v", |s| s.gradients.d_v.data = null_mut());
    no_gradient(FOVEAL_NULL_POINTER, "results.lse", |s| {
        s.results.lse = foveal_tensor { shape: [1, 1, 1, 1], ..foveal_tensor::default() };
    });
    no_gradient(FOVEAL_SHAPE_MISMATCH, "log-sum-exp", |s| {
        s.results.lse = foveal_tensor::default();
    });
    no_gradient(FOVEAL_NULL_POINTER, "gradients.d_sinks", |s| {
        s.gradients.d_sinks = foveal_floats_out { data: null_mut(), len: HEADS };
    });
}

#[test]
fn extents_and_strides() {
    for axis in 0..4 {
        refused(FOVEAL_SHAPE_OVERFLOW, "inputs.q", |s| s.inputs.q.shape[axis] = usize::MAX);
        refused(FOVEAL_SHAPE_OVERFLOW, "results.out", |s| s.results.out.shape[axis] = usize::MAX);
        refused(FOVEAL_SHAPE_MISMATCH, "", |s| s.inputs.v.shape[axis.min(2)] -= 1);
    }
    for axis in 0..3 {
        refused(FOVEAL_SHAPE_OVERFLOW, "inputs.k", |s| s.inputs.k.strides[axis] = usize::MAX);
        // As many elements as fit isize, but not as many bytes.
        refused(FOVEAL_SHAPE_OVERFLOW, "results.lse", |s| {
            s.results.lse.strides[axis] = usize::MAX / 5;
        });
        // Rows of an output on top of each other.
        no_result(FOVEAL_OVERLAP, "rows overlap", |s| s.results.out.strides[axis] = 0);
        no_gradient(FOVEAL_OVERLAP, "rows overlap", |s| s.gradients.d_k.strides[axis] = 1);
    }
    // More than the address space, over memory that exists.
    refused(FOVEAL_SHAPE_OVERFLOW, "queries", |s| {
        for t in [&mut s.inputs.q, &mut s.inputs.k, &mut s.inputs.v] {
            (t.shape[0], t.strides[0]) = (usize::MAX >> 2, 0);
        }
    });
    refused(FOVEAL_HEAD_GROUPING, "4 query heads", |s| {
        (s.inputs.k.shape[2], s.inputs.v.shape[2]) = (3, 3);
        (s.inputs.k.strides, s.inputs.v.strides) = ([0; 3], [0; 3]);
    });
    refused(FOVEAL_INVALID_PARAMETER, "key dimension = 0", |s| {
        (s.inputs.q.shape[3], s.inputs.k.shape[3]) = (0, 0);
    });
    no_gradient(FOVEAL_SHAPE_MISMATCH, "planned keys", |s| s.gradients.d_k.shape[1] -= 1);
    no_gradient(FOVEAL_SHAPE_MISMATCH, "log-sum-exp", |s| s.upstream.d_lse.shape[1] -= 1);
}

#[test]
fn memory_that_is_written_and_shared() {
    // The view that is moved is the smaller one: a larger one would reach into whatever lies behind.
    const { assert!(VALUE_DIM < KEY_DIM && LSE[1] * LSE[2] <= V[1] * V[2] * V[3]) };
    no_result(FOVEAL_OVERLAP, "results.out is written and shares memory with inputs.q", |s| {
        s.results.out.data = s.inputs.q.data;
    });
    no_result(FOVEAL_OVERLAP, "shares memory with inputs.v", |s| {
        s.results.lse.data = s.inputs.v.data.wrapping_byte_add(4 * (len(V) - len(LSE)));
    });
    no_result(FOVEAL_OVERLAP, "results.lse is written and shares memory with results.out", |s| {
        s.results.lse.data = s.results.out.data;
    });
    no_result(FOVEAL_OVERLAP, "sinks", |s| {
        s.attention.sinks = foveal_floats { data: s.results.lse.data.cast(), len: HEADS };
    });
    no_gradient(
        FOVEAL_OVERLAP,
        "gradients.d_v is written and shares memory with gradients.d_k",
        |s| {
            s.gradients.d_v.data = s.gradients.d_k.data;
        },
    );
    no_gradient(
        FOVEAL_OVERLAP,
        "gradients.d_q is written and shares memory with upstream.d_out",
        |s| {
            s.upstream.d_out.data = s.gradients.d_q.data;
        },
    );
    no_gradient(FOVEAL_OVERLAP, "gradients.d_sinks", |s| {
        s.gradients.d_sinks = foveal_floats_out { data: s.gradients.d_q.data.cast(), len: HEADS };
    });
}

#[test]
fn types_and_tags() {
    refused(FOVEAL_UNKNOWN_VALUE, "inputs.q = 3", |s| s.inputs.q.dtype = 3);
    refused(FOVEAL_UNKNOWN_VALUE, "results.lse = 4294967295", |s| s.results.lse.dtype = u32::MAX);
    refused(FOVEAL_DTYPE_MISMATCH, "inputs.v is stored as bf16; expected f32", |s| {
        s.inputs.v.dtype = FOVEAL_BF16;
    });
    refused(FOVEAL_DTYPE_MISMATCH, "results.out", |s| s.results.out.dtype = FOVEAL_F16);
    refused(FOVEAL_DTYPE_MISMATCH, "results.lse", |s| s.results.lse.dtype = FOVEAL_BF16);
    refused(FOVEAL_DTYPE_MISMATCH, "bias", |s| {
        s.attention.bias = foveal_tensor { dtype: FOVEAL_F16, ..s.inputs.q };
    });
    no_gradient(FOVEAL_DTYPE_MISMATCH, "gradients.d_k", |s| s.gradients.d_k.dtype = FOVEAL_F16);
    no_gradient(FOVEAL_DTYPE_MISMATCH, "upstream.d_lse", |s| s.upstream.d_lse.dtype = FOVEAL_F16);
    refused(FOVEAL_UNKNOWN_VALUE, "scale_kind = 2", |s| s.attention.scale_kind = 2);
    refused(FOVEAL_UNKNOWN_VALUE, "alibi_kind = 3", |s| s.attention.alibi_kind = 3);
    refused(FOVEAL_UNKNOWN_VALUE, "mask.kind = 6", |s| s.attention.mask.kind = 6);
    refused(FOVEAL_UNKNOWN_VALUE, "mask.band.has_ahead = 2", |s| {
        s.attention.mask.band.has_ahead = 2
    });
    refused(FOVEAL_UNKNOWN_VALUE, "bidirectional", |s| {
        s.attention.relative_bias.bidirectional = 7;
    });
}

#[test]
fn members_without_their_kind() {
    let unused = |words, spoil: fn(&mut Structs)| refused(FOVEAL_INVALID_PARAMETER, words, spoil);
    unused("scale is given", |s| s.attention.scale = 0.5);
    unused("scale is given", |s| s.attention.scale = f32::NAN);
    unused("mask.width", |s| s.attention.mask.width = 5);
    unused("mask.documents", |s| {
        s.attention.mask.kind = FOVEAL_MASK_CAUSAL;
        s.attention.mask.documents.count = 1;
    });
    unused("mask.dense", |s| s.attention.mask.dense.keys = 1);
    unused("mask.band", |s| s.attention.mask.band.behind = 1);
    unused("alibi_slopes", |s| s.attention.alibi_slopes = floats(&[0.0; HEADS]));
}

#[test]
fn numbers_of_the_description() {
    let invalid = |words, spoil: fn(&mut Structs)| refused(FOVEAL_INVALID_PARAMETER, words, spoil);
    invalid("scale = NaN", |s| {
        (s.attention.scale_kind, s.attention.scale) = (FOVEAL_SCALE_VALUE, f32::NAN);
    });
    invalid("softcap = -1", |s| s.attention.softcap = -1.0);
    invalid("softcap = NaN", |s| s.attention.softcap = f32::NAN);
    invalid("dropout rate = 1", |s| s.attention.dropout.rate = 1.0);
    invalid("dropout rate = NaN", |s| s.attention.dropout.rate = f32::NAN);
    invalid("relative bias max_distance = 3", |s| {
        static TABLE: [f32; 32 * HEADS] = [0.0; 32 * HEADS];
        let (table, heads, max_distance) = (floats(&TABLE), HEADS, 3);
        s.attention.relative_bias =
            foveal_relative_bias { table, heads, max_distance, bidirectional: 0 };
    });
    static THREE: [f32; 3] = [0.0; 3];
    refused(FOVEAL_LENGTH_MISMATCH, "sinks", |s| s.attention.sinks = floats(&THREE));
    refused(FOVEAL_LENGTH_MISMATCH, "ALiBi slopes", |s| {
        s.attention.alibi_kind = FOVEAL_ALIBI_GIVEN;
        s.attention.alibi_slopes = floats(&THREE);
    });
    refused(FOVEAL_NULL_POINTER, "alibi_slopes", |s| s.attention.alibi_kind = FOVEAL_ALIBI_GIVEN);
    refused(FOVEAL_NULL_POINTER, "sinks", |s| s.attention.sinks.len = HEADS);
    refused(FOVEAL_SHAPE_OVERFLOW, "sinks", |s| {
        s.attention.sinks = foveal_floats { data: THREE.as_ptr(), len: usize::MAX / 2 };
    });
    refused(FOVEAL_MISALIGNED, "sinks", |s| {
        let data = THREE.as_ptr().wrapping_byte_add(1);
        s.attention.sinks = foveal_floats { data, len: 1 };
    });
    refused(FOVEAL_NULL_POINTER, "relative_bias.table", |s| {
        s.attention.relative_bias.heads = HEADS
    });
    refused(FOVEAL_SHAPE_MISMATCH, "a bias is", |s| s.attention.bias = s.inputs.q);
    refused(FOVEAL_LEVEL_UNAVAILABLE, "\"sse9\"", |s| s.attention.level = c"sse9".as_ptr());
    refused(FOVEAL_LEVEL_UNAVAILABLE, "UTF-8", |s| s.attention.level = c"\xff".as_ptr());
    no_gradient(FOVEAL_INVALID_PARAMETER, "gradient of sinks", |s| {
        s.gradients.d_sinks = foveal_floats_out { data: s.results.out.data.cast(), len: HEADS };
        s.results.out.data = s.upstream.d_out.data;
    });
}

#[test]
fn masks() {
    static STARTS: [usize; 3] = [0, 2, QUERIES];
    static FALLING: [usize; 3] = [0, 3, 2];
    let documents = |query_starts: *const usize, count| foveal_mask {
        kind: FOVEAL_MASK_DOCUMENTS,
        documents: foveal_documents { query_starts, key_starts: null(), count },
        ..foveal_mask::default()
    };
    refused(FOVEAL_NULL_POINTER, "query_starts", |s| s.attention.mask = documents(null(), 2));
    refused(FOVEAL_NULL_POINTER, "query_starts", |s| s.attention.mask = documents(null(), 0));
    refused(FOVEAL_SHAPE_OVERFLOW, "query_starts", |s| {
        s.attention.mask = documents(STARTS.as_ptr(), usize::MAX);
    });
    refused(FOVEAL_MISALIGNED, "query_starts", |s| {
        s.attention.mask = documents(STARTS.as_ptr().wrapping_byte_add(4), 1);
    });
    refused(FOVEAL_INVALID_PARAMETER, "document starts", |s| {
        s.attention.mask = documents(FALLING.as_ptr(), 2);
    });
    // As many queries as the call has, but not as many keys.
    refused(FOVEAL_MASK_SHAPE, "", |s| s.attention.mask = documents(STARTS.as_ptr(), 2));

    static WORDS: [u64; QUERIES] = [1; QUERIES];
    let dense = |kind, [batch, heads, queries, keys]: [usize; 4]| foveal_mask {
        kind,
        dense: foveal_dense_mask { data: WORDS.as_ptr().cast(), batch, heads, queries, keys },
        ..foveal_mask::default()
    };
    for kind in [FOVEAL_MASK_BYTES, FOVEAL_MASK_BITS] {
        refused(FOVEAL_MASK_SHAPE, "a dense mask", |s| {
            s.attention.mask = dense(kind, [1, 1, 4, KEYS]);
        });
        refused(FOVEAL_NULL_POINTER, "mask.dense", |s| {
            s.attention.mask = dense(kind, [1, 1, QUERIES, KEYS]);
            s.attention.mask.dense.data = null();
        });
        refused(FOVEAL_SHAPE_OVERFLOW, "mask.dense", |s| {
            s.attention.mask = dense(kind, [usize::MAX, HEADS, QUERIES, KEYS]);
        });
        // Rows that cannot be counted have no keys to point to.
        refused(FOVEAL_LENGTH_MISMATCH, "dense mask", |s| {
            s.attention.mask = dense(kind, [usize::MAX, HEADS, QUERIES, 0]);
        });
    }
    refused(FOVEAL_MISALIGNED, "mask.dense", |s| {
        s.attention.mask = dense(FOVEAL_MASK_BITS, [1, 1, 1, KEYS]);
        let odd = s.attention.mask.dense.data.wrapping_byte_add(1);
        s.attention.mask.dense.data = odd;
    });
}

#[test]
fn too_many_rows_for_decode() {
    let mut call = Call::new();
    let mut structs = call.structs();
    (structs.inputs.q.shape[1], structs.inputs.q.strides[1]) = (65, 0);
    assert_eq!(structs.decode(null_mut()), FOVEAL_TOO_MANY_ROWS);
    assert!(message().contains("65 generated rows"), "{}", message());
    untouched(&call);
}

#[test]
fn no_memory_is_no_crash() {
    let mut call = Call::new();
    let mut structs = call.structs();
    // Far more keys than there is memory for: one row, again and again.
    for t in [&mut structs.inputs.k, &mut structs.inputs.v] {
        (t.shape[1], t.strides[1]) = (usize::MAX >> 16, 0);
    }
    assert_eq!(structs.decode(null_mut()), FOVEAL_OUT_OF_MEMORY, "{}", message());
    assert!(message().starts_with("there is no memory for a workspace of"), "{}", message());
    // A workspace that could not grow serves the next call.
    let workspace = foveal_workspace_create();
    assert_eq!(structs.decode(workspace), FOVEAL_OUT_OF_MEMORY, "{}", message());
    untouched(&call);
    assert_eq!(call.structs().decode(workspace), FOVEAL_OK, "{}", message());
    // SAFETY: made above, used no more.
    unsafe { foveal_workspace_free(workspace) };
}
