//! Results through the C interface have the bits of the same call in Rust, for every option.

mod support;

use foveal::mask::{Band, Dense, Documents, Extent};
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::position::{RelativeBias, Slopes};
use foveal::{
    Attention, Cpu, Dropout, Element, Level, Mask, Scale, Shape, Tensor, TensorMut, TensorRef,
    Threads, Workspace,
};
use foveal_c::*;
use half::{bf16, f16};
use std::ffi::CString;
use std::ptr::{null, null_mut};
use support::*;

fn shape([batch, seq, heads, dim]: [usize; 4]) -> Shape {
    Shape { batch, seq, heads, dim }
}

fn view<E: Element>(data: &[E], extents: [usize; 4]) -> TensorRef<'_, E> {
    TensorRef::new(data, shape(extents)).unwrap()
}

fn bits(data: &[f32]) -> Vec<u32> {
    data.iter().map(|x| x.to_bits()).collect()
}

/// Everything that a call gives, in Rust.
fn expected(attention: &Attention<'_>, call: &Call) -> (Vec<f32>, Vec<f32>, [Vec<f32>; 3]) {
    let (q, k, v) = (view(&call.q, Q), view(&call.k, K), view(&call.v, V));
    let forward = attention.forward(q, k, v).unwrap();
    let plan = attention.plan(q.shape(), k.shape(), v.shape()).unwrap();
    let mut gradients = [Q, K, V].map(|extents| Tensor::<f32>::zeros(shape(extents)).unwrap());
    let [d_q, d_k, d_v] = &mut gradients;
    let into = Gradients {
        d_q: d_q.view_mut(),
        d_k: d_k.view_mut(),
        d_v: d_v.view_mut(),
        terms: TermGradients::default(),
    };
    let saved = Saved { out: forward.out.view(), lse: forward.lse.view() };
    let upstream = Upstream { d_out: view(&call.d_out, OUT), d_lse: Some(view(&call.d_lse, LSE)) };
    let mut workspace = Workspace::for_backward::<f32>(&plan);
    plan.backward(Inputs { q, k, v }, saved, upstream, into, &mut workspace).unwrap();
    (forward.out.into_vec(), forward.lse.into_vec(), gradients.map(Tensor::into_vec))
}

/// Compares forward, backward and decode; returns the output for tests that expect a difference.
fn same(name: &str, options: &foveal_attention, attention: &Attention<'_>) -> Vec<f32> {
    let mut call = Call::new();
    let workspace = foveal_workspace_create();
    let structs = Structs { attention: *options, ..call.structs() };
    assert_eq!(structs.forward(workspace), FOVEAL_OK, "{name}: {}", message());
    assert_eq!(structs.backward(workspace), FOVEAL_OK, "{name}: {}", message());
    let (out, lse, [d_q, d_k, d_v]) = expected(attention, &call);
    assert_eq!(bits(&call.out), bits(&out), "{name}");
    assert_eq!(bits(&call.lse), bits(&lse), "{name}");
    assert_eq!(bits(&call.d_q), bits(&d_q), "{name}");
    assert_eq!(bits(&call.d_k), bits(&d_k), "{name}");
    assert_eq!(bits(&call.d_v), bits(&d_v), "{name}");

    call.out.fill(f32::NAN);
    let structs = Structs { attention: *options, ..call.structs() };
    assert_eq!(structs.decode(workspace), FOVEAL_OK, "{name}: {}", message());
    let decoded = attention.decode(view(&call.q, Q), view(&call.k, K), view(&call.v, V)).unwrap();
    assert_eq!(bits(&call.out), bits(decoded.out.as_slice()), "{name}");
    assert_eq!(bits(&call.lse), bits(decoded.lse.as_slice()), "{name}");
    // SAFETY: made above, used no more.
    unsafe { foveal_workspace_free(workspace) };
    out
}

/// Like [`same`], and the option is not without effect.
fn same_and_different(name: &str, options: &foveal_attention, attention: &Attention<'_>) {
    let plain = same("the default", &foveal_attention_default(), &Attention::new());
    assert_ne!(bits(&same(name, options, attention)), bits(&plain), "{name}");
}

fn masked(mask: foveal_mask) -> foveal_attention {
    foveal_attention { mask, ..foveal_attention_default() }
}

#[test]
fn a_missing_description_is_the_default() {
    let mut call = Call::new();
    let s = call.structs();
    // SAFETY: all views are those of live vectors.
    let status = unsafe { foveal_attention_forward(null(), &s.inputs, &s.results, null_mut()) };
    assert_eq!(status, FOVEAL_OK);
    assert_eq!(bits(&call.out), bits(&expected(&Attention::new(), &call).0));
}

#[test]
fn masks_by_distance() {
    let kind = |kind| foveal_mask { kind, ..foveal_mask::default() };
    let with = |mask| Attention::new().mask(mask);
    same_and_different("causal", &masked(kind(FOVEAL_MASK_CAUSAL)), &with(Mask::causal()));
    let window = |width| foveal_mask { width, ..kind(FOVEAL_MASK_WINDOW) };
    same_and_different("window", &masked(window(3)), &with(Mask::window(3)));
    same_and_different("nothing", &masked(window(0)), &with(Mask::window(0)));
    let band = foveal_band { has_behind: 1, has_ahead: 1, behind: 2, ahead: 1 };
    let own = Mask::band(Some(2), Some(1));
    let mask = foveal_mask { band, ..foveal_mask::default() };
    same_and_different("band", &masked(mask), &with(own.clone()));
    let mask = foveal_mask { band, ..kind(FOVEAL_MASK_CAUSAL) };
    same_and_different("causal band", &masked(mask), &with(Mask::causal().and(own)));
    let band = foveal_band { has_behind: 0, has_ahead: 1, behind: 0, ahead: 0 };
    let mask = foveal_mask { band, ..foveal_mask::default() };
    same_and_different("a limit of 0", &masked(mask), &with(Mask::causal()));
}

#[test]
fn masks_with_arrays() {
    let (queries, keys) = ([0, 2, 2, QUERIES], [0, 4, 6, KEYS]);
    let documents =
        foveal_documents { query_starts: queries.as_ptr(), key_starts: keys.as_ptr(), count: 3 };
    let mask = foveal_mask { kind: FOVEAL_MASK_DOCUMENTS, documents, ..foveal_mask::default() };
    let packed = Documents::new(&queries, &keys).unwrap();
    let attention = Attention::new().mask(packed.clone().into());
    same_and_different("documents", &masked(mask), &attention);
    let band = foveal_band { has_ahead: 1, ..foveal_band::default() };
    let within = packed.within(Band { behind: None, ahead: Some(0) });
    let attention = Attention::new().mask(within.into());
    same_and_different("causal documents", &masked(foveal_mask { band, ..mask }), &attention);

    for (batch, heads) in [(1, 1), (BATCH, 1), (1, HEADS), (BATCH, HEADS)] {
        let rows = batch * heads * QUERIES;
        let visible: Vec<bool> = numbers(rows * KEYS, 9).into_iter().map(|x| x > 0.0).collect();
        // Any byte but 0 is one that sees; bits beyond the last key mean nothing.
        let bytes: Vec<u8> = visible.iter().map(|&visible| u8::from(visible) * 0x40).collect();
        let word = |row: &[bool]| {
            row.iter().rev().fold(u64::MAX, |word, &visible| word << 1 | u64::from(visible))
        };
        let words: Vec<u64> = visible.chunks(KEYS).map(word).collect();
        let extent = Extent { batch, heads, queries: QUERIES, keys: KEYS };
        let attention = Attention::new().mask(Dense::new(&visible, extent).unwrap().into());
        for (kind, data) in
            [(FOVEAL_MASK_BYTES, bytes.as_ptr().cast()), (FOVEAL_MASK_BITS, words.as_ptr().cast())]
        {
            let dense = foveal_dense_mask { data, batch, heads, queries: QUERIES, keys: KEYS };
            let mask = foveal_mask { kind, dense, ..foveal_mask::default() };
            same_and_different("dense", &masked(mask), &attention);
        }
    }
}

#[test]
fn scale_cap_dropout_and_instructions() {
    let default = foveal_attention_default();
    for scale in [0.0, -0.5, 2.0] {
        let options = foveal_attention { scale_kind: FOVEAL_SCALE_VALUE, scale, ..default };
        let attention = Attention::new().scale(Scale::Value(scale));
        same_and_different("scale", &options, &attention);
    }
    let options = foveal_attention { softcap: 0.3, ..default };
    same_and_different("softcap", &options, &Attention::new().softcap(0.3));
    let options =
        foveal_attention { dropout: foveal_dropout { rate: 0.4, seed: 1 << 40 }, ..default };
    let dropout = Dropout { rate: 0.4, seed: 1 << 40 };
    same_and_different("dropout", &options, &Attention::new().dropout(dropout));
    for level in Level::available() {
        let name = CString::new(level.name()).unwrap();
        let options = foveal_attention { level: name.as_ptr(), threads: 1, ..default };
        let attention = Attention::new().cpu(Cpu { level, threads: Threads::ONE });
        same(level.name(), &options, &attention);
    }
}

#[test]
fn biases_sinks_and_their_gradients() {
    let (bias, slopes) = (numbers(len(BIAS), 6), numbers(HEADS, 7));
    let (table, sinks) = (numbers(8 * HEADS, 8), numbers(HEADS, 9));
    let options = foveal_attention {
        alibi_kind: FOVEAL_ALIBI_GIVEN,
        alibi_slopes: floats(&slopes),
        bias: dense(&bias, FOVEAL_F32, BIAS),
        relative_bias: foveal_relative_bias {
            table: floats(&table),
            heads: HEADS,
            max_distance: 6,
            bidirectional: 1,
        },
        sinks: floats(&sinks),
        ..foveal_attention_default()
    };
    let attention = Attention::new()
        .alibi(Slopes::Given(&slopes))
        .bias(view(&bias, BIAS))
        .relative_bias(RelativeBias::bidirectional(&table, HEADS, 6).unwrap())
        .sinks(&sinks);
    same_and_different("all terms", &options, &attention);
    let standard =
        foveal_attention { alibi_kind: FOVEAL_ALIBI_STANDARD, ..foveal_attention_default() };
    same_and_different("ALiBi", &standard, &Attention::new().alibi(Slopes::Standard));
    let mut causal = foveal_attention_default();
    causal.relative_bias = foveal_relative_bias { bidirectional: 0, ..options.relative_bias };
    let bias = RelativeBias::causal(&table, HEADS, 6).unwrap();
    same_and_different("causal buckets", &causal, &Attention::new().relative_bias(bias));
    gradients_of_terms(&options, &attention);
}

fn gradients_of_terms(options: &foveal_attention, attention: &Attention<'_>) {
    let lengths = [HEADS, 8 * HEADS, HEADS];
    let [mut slopes, mut table, mut sinks] = lengths.map(|n| vec![f32::NAN; n]);
    let mut call = Call::new();
    let d_bias = call.d_bias.as_mut_ptr();
    let mut structs = Structs { attention: *options, ..call.structs() };
    structs.gradients.d_bias =
        foveal_tensor_dense(d_bias.cast(), FOVEAL_F32, 1, QUERIES, HEADS, KEYS);
    structs.gradients.d_slopes = floats_out(&mut slopes);
    structs.gradients.d_table = floats_out(&mut table);
    structs.gradients.d_sinks = floats_out(&mut sinks);
    assert_eq!(structs.forward(null_mut()), FOVEAL_OK, "{}", message());
    assert_eq!(structs.backward(null_mut()), FOVEAL_OK, "{}", message());

    let mut own = Call::new();
    let [mut d_slopes, mut d_table, mut d_sinks] = lengths.map(|n| vec![f32::NAN; n]);
    let plan = attention.plan(shape(Q), shape(K), shape(V)).unwrap();
    let into = Gradients {
        d_q: TensorMut::new(&mut own.d_q, shape(Q)).unwrap(),
        d_k: TensorMut::new(&mut own.d_k, shape(K)).unwrap(),
        d_v: TensorMut::new(&mut own.d_v, shape(V)).unwrap(),
        terms: TermGradients {
            d_bias: Some(TensorMut::new(&mut own.d_bias, shape(BIAS)).unwrap()),
            d_slopes: Some(&mut d_slopes),
            d_table: Some(&mut d_table),
            d_sinks: Some(&mut d_sinks),
            ..TermGradients::default()
        },
    };
    let inputs = Inputs { q: view(&own.q, Q), k: view(&own.k, K), v: view(&own.v, V) };
    let saved = Saved { out: view(&call.out, OUT), lse: view(&call.lse, LSE) };
    let upstream = Upstream { d_out: view(&own.d_out, OUT), d_lse: Some(view(&own.d_lse, LSE)) };
    let mut workspace = Workspace::for_backward::<f32>(&plan);
    plan.backward(inputs, saved, upstream, into, &mut workspace).unwrap();
    for (got, expected) in
        [(&call.d_bias, &own.d_bias), (&slopes, &d_slopes), (&table, &d_table), (&sinks, &d_sinks)]
    {
        assert_eq!(bits(got), bits(expected));
        assert!(got.iter().all(|x| x.is_finite()) && got.iter().any(|&x| x != 0.0));
    }
}

/// All pairs of storage types of queries and keys.
#[test]
fn storage_types() {
    pairs_with::<f32>(FOVEAL_F32);
    pairs_with::<f16>(FOVEAL_F16);
    pairs_with::<bf16>(FOVEAL_BF16);
}

fn pairs_with<E: Element + PartialEq>(queries: foveal_dtype) {
    pair::<E, f32>(queries, FOVEAL_F32);
    pair::<E, f16>(queries, FOVEAL_F16);
    pair::<E, bf16>(queries, FOVEAL_BF16);
}

fn pair<E: Element + PartialEq, K2: Element + PartialEq>(
    queries: foveal_dtype,
    keys: foveal_dtype,
) {
    fn stored<E: Element>(count: usize, seed: u32) -> Vec<E> {
        numbers(count, seed).into_iter().map(E::from_f32).collect()
    }
    let (q, d_out) = (stored::<E>(len(Q), 1), stored::<E>(len(OUT), 4));
    let (k, v) = (stored::<K2>(len(K), 2), stored::<K2>(len(V), 3));
    let nan = E::from_f32(f32::NAN);
    let (mut out, mut lse) = (vec![nan; len(OUT)], vec![f32::NAN; len(LSE)]);
    let mut d_q = vec![nan; len(Q)];
    let [mut d_k, mut d_v] = [K, V].map(|extents| vec![K2::from_f32(f32::NAN); len(extents)]);
    let mut structs = Call::new().structs();
    structs.inputs =
        foveal_inputs { q: dense(&q, queries, Q), k: dense(&k, keys, K), v: dense(&v, keys, V) };
    let written = |data: *mut std::ffi::c_void, dtype, [batch, seq, heads, dim]: [usize; 4]| {
        foveal_tensor_dense(data, dtype, batch, seq, heads, dim)
    };
    structs.results = foveal_results {
        out: written(out.as_mut_ptr().cast(), queries, OUT),
        lse: written(lse.as_mut_ptr().cast(), FOVEAL_F32, LSE),
    };
    structs.upstream =
        foveal_upstream { d_out: dense(&d_out, queries, OUT), d_lse: foveal_tensor::default() };
    structs.gradients.d_q = written(d_q.as_mut_ptr().cast(), queries, Q);
    structs.gradients.d_k = written(d_k.as_mut_ptr().cast(), keys, K);
    structs.gradients.d_v = written(d_v.as_mut_ptr().cast(), keys, V);
    assert_eq!(structs.forward(null_mut()), FOVEAL_OK, "{}", message());
    assert_eq!(structs.backward(null_mut()), FOVEAL_OK, "{}", message());

    let attention = Attention::new();
    let plan = attention.plan(shape(Q), shape(K), shape(V)).unwrap();
    let inputs = Inputs { q: view(&q, Q), k: view(&k, K), v: view(&v, V) };
    let mut own_out = Tensor::<E>::zeros(shape(OUT)).unwrap();
    let mut own_lse = Tensor::<f32>::zeros(shape(LSE)).unwrap();
    let mut workspace = Workspace::for_backward::<E>(&plan);
    workspace.reserve(plan.workspace_bytes());
    plan.forward(inputs, own_out.view_mut(), Some(own_lse.view_mut()), &mut workspace).unwrap();
    assert!(out == own_out.as_slice() && bits(&lse) == bits(own_lse.as_slice()));
    let mut own_q = Tensor::<E>::zeros(shape(Q)).unwrap();
    let mut own_k = Tensor::<K2>::zeros(shape(K)).unwrap();
    let mut own_v = Tensor::<K2>::zeros(shape(V)).unwrap();
    let into = Gradients {
        d_q: own_q.view_mut(),
        d_k: own_k.view_mut(),
        d_v: own_v.view_mut(),
        terms: TermGradients::default(),
    };
    let saved = Saved { out: own_out.view(), lse: own_lse.view() };
    let upstream = Upstream { d_out: view(&d_out, OUT), d_lse: None };
    plan.backward(inputs, saved, upstream, into, &mut workspace).unwrap();
    assert!(d_q == own_q.as_slice() && d_k == own_k.as_slice() && d_v == own_v.as_slice());
}

/// Queries, keys and values of one packed tensor `[B, T, 3, H, D]`, and an output with heads before tokens.
#[test]
fn strides_of_other_layouts() {
    let (tokens, heads, dim) = (7, 3, 4);
    let packed = numbers(BATCH * tokens * 3 * heads * dim, 11);
    let part = |n: usize| {
        let data = packed[n * heads * dim..].as_ptr();
        let per_token = 3 * heads * dim;
        foveal_tensor {
            data: data.cast_mut().cast(),
            dtype: FOVEAL_F32,
            shape: [BATCH, tokens, heads, dim],
            strides: [tokens * per_token, per_token, dim],
        }
    };
    let mut out = vec![f32::NAN; BATCH * heads * tokens * dim];
    let results = foveal_results {
        out: foveal_tensor {
            data: out.as_mut_ptr().cast(),
            dtype: FOVEAL_F32,
            shape: [BATCH, tokens, heads, dim],
            strides: [heads * tokens * dim, dim, tokens * dim],
        },
        lse: foveal_tensor::default(),
    };
    let inputs = foveal_inputs { q: part(0), k: part(1), v: part(2) };
    // SAFETY: all views lie within live vectors.
    let status = unsafe { foveal_attention_forward(null(), &inputs, &results, null_mut()) };
    assert_eq!(status, FOVEAL_OK, "{}", message());

    let own = |n: usize| {
        let token = |t: &[f32]| t[n * heads * dim..][..heads * dim].to_vec();
        let data = packed.chunks(3 * heads * dim).flat_map(token).collect();
        Tensor::from_vec(data, shape([BATCH, tokens, heads, dim])).unwrap()
    };
    let [q, k, v] = [0, 1, 2].map(own);
    let expected = Attention::new().forward(q.view(), k.view(), v.view()).unwrap();
    for (b, h, t) in
        (0..BATCH * heads * tokens).map(|n| (n / (heads * tokens), n / tokens % heads, n % tokens))
    {
        let at = ((b * heads + h) * tokens + t) * dim;
        assert_eq!(&out[at..at + dim], expected.out.view().row(b, t, h));
    }
}

/// Nothing to do is no error, with NULL for what has no elements.
#[test]
fn tensors_without_elements() {
    for axis in 0..2 {
        let mut call = Call::new();
        let mut structs = call.structs();
        let Structs { inputs, results, upstream, gradients, .. } = &mut structs;
        let tensors = [&mut inputs.q, &mut results.out, &mut results.lse, &mut upstream.d_out];
        for tensor in tensors.into_iter().chain([&mut upstream.d_lse, &mut gradients.d_q]) {
            (tensor.shape[axis], tensor.data) = (0, null_mut());
        }
        let kv = [&mut inputs.k, &mut inputs.v, &mut gradients.d_k, &mut gradients.d_v];
        for tensor in kv.into_iter().filter(|_| axis == 0) {
            (tensor.shape[axis], tensor.data) = (0, null_mut());
        }
        assert_eq!(structs.forward(null_mut()), FOVEAL_OK, "{}", message());
        assert_eq!(structs.decode(null_mut()), FOVEAL_OK, "{}", message());
        assert_eq!(structs.backward(null_mut()), FOVEAL_OK, "{}", message());
        // Keys that no query reads have no influence.
        assert!(axis == 0 || call.d_k.iter().chain(&call.d_v).all(|&x| x == 0.0));
    }
}

/// One workspace for calls of several sizes, one after the other.
#[test]
fn a_workspace_grows() {
    let workspace = foveal_workspace_create();
    for tokens in [3, 600, 20] {
        let extents = [1, tokens, 2, 16];
        let x = numbers(len(extents), 12);
        let mut out = vec![f32::NAN; x.len()];
        let tensor = dense(&x, FOVEAL_F32, extents);
        let inputs = foveal_inputs { q: tensor, k: tensor, v: tensor };
        let out_data = out.as_mut_ptr().cast();
        let results = foveal_results {
            out: foveal_tensor { data: out_data, ..tensor },
            lse: foveal_tensor::default(),
        };
        // SAFETY: all views are those of live vectors.
        let status = unsafe { foveal_attention_forward(null(), &inputs, &results, workspace) };
        assert_eq!(status, FOVEAL_OK, "{}", message());
        let x = view(&x, extents);
        let expected = Attention::new().forward(x, x, x).unwrap();
        assert_eq!(bits(&out), bits(expected.out.as_slice()));
    }
    // SAFETY: made above, used no more; nothing is done with NULL.
    unsafe {
        foveal_workspace_free(workspace);
        foveal_workspace_free(null_mut());
    }
}

#[test]
fn the_version_is_the_crates() {
    // SAFETY: a C string that lives as long as the library.
    let version = unsafe { std::ffi::CStr::from_ptr(foveal_version()) };
    assert_eq!(version.to_str().unwrap(), env!("CARGO_PKG_VERSION"));
}
