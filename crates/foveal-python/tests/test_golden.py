"""Golden vectors through the Python face: outputs, states and gradients of independent implementations."""

import numpy as np
import pytest
from support import Recorded, cases, close

import foveal


def check(tensors, gradients, tolerance):
    """Gradients by the name of what they are of."""
    checked = 0
    for name, got in gradients.items():
        if f"grad.{name}" in tensors:
            close(got, tensors[f"grad.{name}"], tolerance)
            checked += 1
    assert checked


@pytest.mark.parametrize("name,options,t,tolerance", cases("softmax"))
def test_softmax(name, options, t, tolerance):
    causal = options["mask_kind"] == "causal"
    side = options.get("band")
    side = side if isinstance(side, dict) else {"left": None, "right": 0 if causal else None}
    plain = options["mask_kind"] in ("none", "causal", "causal sliding window", "two-sided window")
    given = {"scale": options["scale"], "softcap": options.get("softcap"), "return_lse": True}
    if plain:
        given["window"] = (side["left"], side["right"])
    elif "mask" in t:
        given["mask"] = t["mask"].astype(bool)
    if "slopes" in t:
        given["alibi"] = t["slopes"]
    elif "bias" in t:
        given["bias"] = t["bias"]
    given["sinks"] = t.get("sinks")
    call = Recorded(foveal.attention, t["q"], t["k"], t["v"], **given)
    out, lse = call.result
    close(out, t["out"], tolerance)
    close(lse, t["lse"], tolerance)
    if "d_out" in t:
        d = call.gradients(t["d_out"], t.get("d_lse"))
        check(t, dict(zip(("q", "k", "v", "mask", "bias", "slopes", "sinks"), d)), tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("softmax_varlen"))
def test_varlen(name, options, t, tolerance):
    window = (options["window"] - 1, 0) if options["window"] else (-1, -1)
    call = Recorded(
        foveal.flash_attn_varlen_func,
        *(t[n] for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")),
        softmax_scale=options["scale"],
        causal=options["mask_kind"] == "causal",
        window_size=window,
        return_attn_probs=True,
    )
    out, lse, _ = call.result
    close(out, t["out"], tolerance)
    close(lse.T, t["lse"], tolerance)
    d = call.gradients(t["d_out"][None], None)
    check(t, {n: x[0] for n, x in zip("qkv", d)}, tolerance)


RECURRENT = {
    "scalar_decay": (foveal.linear.scalar_decay, ("log_decay",)),
    "vector_decay": (foveal.linear.gla, ("log_decay",)),
    "delta_rule": (foveal.linear.delta, ("beta",)),
    "gated_delta_rule": (foveal.linear.gated_delta, ("log_decay", "beta")),
    "retention": (foveal.linear.retention, ()),
}


@pytest.mark.parametrize("mechanism", RECURRENT)
def test_recurrent(mechanism):
    function, gates = RECURRENT[mechanism]
    for name, options, t, tolerance in (case.values for case in cases(mechanism)):
        if "q" not in t:
            continue
        state = t.get("initial_state")
        more = {"decays": [1 - 2.0 ** (-5 - h) for h in range(t["v"].shape[2])]} if mechanism == "retention" else {}
        call = Recorded(
            function,
            *(t[n] for n in ("q", "k", "v", *gates)),
            scale=options["scale"],
            initial_state=state,
            return_state=True,
            **more,
        )
        out, final = call.result
        close(out, t["out"], tolerance)
        close(final, t["final_state"], tolerance)
        d = call.gradients(t["d_out"], t.get("d_final_state"), None)
        names = ("q", "k", "v", "log_decay", "beta", "initial_state")
        check(t, {n: x for n, x in zip(names, d) if x is not None}, tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("linear_attention"))
def test_linear(name, options, t, tolerance):
    state = (t["initial_state"], t["initial_z"]) if "initial_state" in t else None
    present = t["key_mask"].astype(bool) if "key_mask" in t else None
    if t["q"].shape[1] != t["k"].shape[1]:
        pytest.skip("queries of other tokens than the keys are two calls")
    call = Recorded(
        foveal.linear.linear,
        *(t[n] for n in "qkv"),
        epsilon=options["eps"],
        causal=options["causal"],
        initial_state=state,
        present=present,
        return_state=True,
    )
    out, (final, sums) = call.result
    close(out, t["out"], tolerance)
    close(final, t["final_state"], tolerance)
    close(sums, t["final_z"], tolerance)
    d = call.gradients(t["d_out"], t.get("d_final_state"), t.get("d_final_z"))
    names = ("q", "k", "v", "", "", "initial_state", "initial_z")
    check(t, {n: x for n, x in zip(names, d) if x is not None}, tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("efficient_attention"))
def test_efficient(name, options, t, tolerance):
    if t["q"].shape[1] != t["k"].shape[1]:
        pytest.skip("queries of other tokens than the keys are two calls")
    call = Recorded(foveal.linear.efficient, *(t[n] for n in "qkv"))
    close(call.result, t["out"], tolerance)
    check(t, dict(zip("qkv", call.gradients(t["d_out"], None, None))), tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("linformer"))
def test_linformer(name, options, t, tolerance):
    if "q" not in t:
        pytest.skip("a layer with its projections")
    call = Recorded(
        foveal.linear.linformer, *(t[n] for n in "qkv"), t["e"], t.get("f"), scale=options["scale"], return_lse=True
    )
    close(call.result[0], t["out"], tolerance)
    close(call.result[1], t["lse"], tolerance)
    d = call.gradients(t["d_out"])
    check(t, {n: x for n, x in zip(("q", "k", "v", "e", "f"), d) if x is not None}, tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("moba"))
def test_moba(name, options, t, tolerance):
    call = Recorded(
        foveal.sparse.moba,
        *(t[n] for n in "qkv"),
        block=options["block"],
        top=options["top"],
        scale=options["scale"],
        return_lse=True,
    )
    close(call.result[0], t["out"], tolerance)
    close(call.result[1], t["lse"], tolerance)
    check(t, dict(zip("qkv", call.gradients(t["d_out"]))), tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("native_sparse"))
def test_native_sparse(name, options, t, tolerance):
    sizes = {n: options[n] for n in ("length", "stride", "block", "top", "window", "scale")}
    names = ("q", "k_slc", "v_slc", "gates", "k_cmp", "v_cmp", "k_win", "v_win")
    q, k, v, gates, k_cmp, v_cmp, k_win, v_win = (t[n] for n in names)
    pair, near = (k_cmp, v_cmp), (k_win, v_win)
    call = Recorded(foveal.sparse.native_sparse, q, k, v, gates, compressed=pair, near=near, **sizes)
    close(call.result, t["out"], tolerance)
    check(t, dict(zip(names, call.gradients(t["d_out"]))), tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("infini_attention"))
def test_infini(name, options, t, tolerance):
    memory = next(((t[a], t[b]) for a, b in [("initial_memory", "initial_z")] if a in t), None)
    rope, turned, rotated = options["rope"], [], None
    if rope:
        more = {"theta": rope["base"], "interleaved": rope["layout"] == "interleaved"}
        turned = [Recorded(foveal.rope, t[n], **more) for n in "qk"]
        rotated = tuple(y.result for y in turned)
    call = Recorded(
        foveal.memory.infini,
        *(t[n] for n in "qkv"),
        t["beta"],
        segment=options["segment"],
        update=options["rule"],
        bypass_empty="bypassed" in name,
        rotated=rotated,
        scale=options["scale"],
        memory=memory,
        return_memory=True,
    )
    out, (matrices, sums) = call.result
    close(out, t["out"], tolerance)
    close(matrices, t["final_memory"], tolerance)
    close(sums, t["final_z"], tolerance)
    d = list(call.gradients(t["d_out"], t.get("d_final_memory"), t.get("d_final_z")))
    for n, y in enumerate(turned):
        d[n] = d[n] + y.gradients(d[4 + n])[0]
    names = ("q", "k", "v", "beta", "", "", "initial_memory", "initial_z")
    check(t, {n: x for n, x in zip(names, d) if x is not None}, tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("memorizing"))
def test_memorizing(name, options, t, tolerance):
    if "reset" in name:
        pytest.skip("a call's sequences are documents from their beginnings")
    bias = t.get("bias")
    call = Recorded(
        foveal.memory.memorizing,
        *(t[n] for n in "qkv"),
        t["gate"],
        t["scale"],
        None if bias is None else bias.reshape(1, *bias.shape[-3:]),
        segment=options["segment"],
        top=options["top_k"],
        capacity=options["memory_capacity"],
        previous="xl_cache" in name,
    )
    close(call.result, t["out"], tolerance)
    d = call.gradients(t["d_out"])
    check(t, {n: x for n, x in zip(("q", "k", "v", "gate", "scale"), d) if x is not None}, tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("differential"))
def test_differential(name, options, t, tolerance):
    q, k = (np.stack([t[n + "1"], t[n + "2"]], 3).reshape(*t[n + "1"].shape[:2], -1, t[n + "1"].shape[3]) for n in "qk")
    vectors = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    call = Recorded(
        foveal.exact.differential,
        *(q, k, t["v"]),
        *(t[n] for n in vectors),
        t["norm_weight"],
        init=options["lambda_init"],
        scale=options["scale"],
        **({"epsilon": options["norm_eps"]} if "norm_eps" in options else {}),
    )
    close(call.result, t["out"], tolerance)
    d = call.gradients(t["d_out"])
    pairs = {f"{n}{m + 1}": x[:, :, m::2] for n, x in zip("qk", d) for m in range(2)}
    check(t, pairs | dict(zip(("v", *vectors, "norm_weight"), d[2:])), tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("mla_attention"))
def test_mla(name, options, t, tolerance):
    q = np.concatenate([t["q_nope"], t["q_rope"]], -1)
    rows = np.concatenate([t["latent"], t["k_rope"]], -1)
    up = np.concatenate([t["w_uk"], t["w_uv"]], 1).reshape(-1, t["latent"].shape[-1])
    for generated in (False, True):
        out, lse = foveal.exact.mla(
            q,
            rows,
            up,
            rope_dim=t["k_rope"].shape[-1],
            value_dim=t["w_uv"].shape[1],
            scale=options["scale"],
            generated=generated,
            return_lse=True,
        )
        close(out, t["out"], tolerance)
        close(lse, t["lse"], tolerance)


@pytest.mark.parametrize("name,options,t,tolerance", cases("merge"))
def test_merge(name, options, t, tolerance):
    joined = t["part_out"][0], t["part_lse"][0]
    for out, lse in zip(t["part_out"][1:], t["part_lse"][1:]):
        joined = foveal.merge(*joined, out, lse)
    close(joined[0], t["out"], tolerance)
    close(joined[1], t["lse"], tolerance)
