"""Every mechanism of the registry has a function, and gradients by finite differences."""

import inspect

import numpy as np
import pytest
from support import Recorded, close, random

import foveal

GROUPS = {g: getattr(foveal, g) for g in ("exact", "sparse", "linear", "memory")}
T, H, D = 20, 2, 4


def x(seed, *shape):
    return random(*(shape or (1, T, H, D)), seed=seed)


def vector(seed, n=H):
    return random(n, seed=seed) * np.float32(0.5)


def calls():
    """For each mechanism its arrays and options, small."""
    gates = -np.abs(x(9, 1, T, H))
    unit = x(1) / np.linalg.norm(x(1), axis=-1, keepdims=True)
    strengths = 1 / (1 + np.exp(-x(8, 1, T, H)))
    pairs = x(0, 1, T, 2 * H, D), x(1, 1, T, 2 * H, D)
    qkv = x(0), x(1), x(2)
    return {
        "full": (qkv, {}),
        "window": (qkv, {"width": 5}),
        "differential": ((*pairs, x(2), *(vector(n, 3) for n in range(4)), 1 + vector(7, D)), {"init": 0.6}),
        "mla": ((x(0, 1, T, H, 8), x(1, 1, T, 14), x(2, H * (6 + 3), 12)), {"rope_dim": 2, "value_dim": 3}),
        "transformer_xl": ((*qkv, x(3, 7, H, D), x(4, H, D), x(5, H, D)), {}),
        "sparse_transformer": (qkv, {"pattern": "strided", "stride": 4}),
        "longformer": (qkv, {"reach": 3, "global_tokens": [[0, 7]], "causal": True}),
        "bigbird": (qkv, {"block": 4, "random": 1}),
        "lsh": ((x(0), x(2)), {"chunk": 5, "buckets": 4, "scale": 0.5}),
        "moba": (qkv, {"block": 4, "top": 2}),
        "native_sparse": (
            (*qkv, strengths.repeat(3, -1).reshape(1, T, H, 3)),
            {"length": 4, "stride": 2, "block": 4, "top": 3, "window": 5},
        ),
        "linear": (qkv, {}),
        "performer": (qkv, {"features": 8, "seed": 3}),
        "efficient": (qkv, {}),
        "linformer": ((*qkv, x(3, 3, T), x(4, 3, T)), {}),
        "retention": (qkv, {}),
        "scalar_decay": ((*qkv, gates), {}),
        "gla": ((*qkv, -np.abs(x(9))), {}),
        "delta": ((x(0), unit, x(2), strengths), {}),
        "gated_delta": ((x(0), unit, x(2), gates, strengths), {}),
        "infini": ((*qkv, vector(3)), {"segment": 6}),
        "memorizing": ((*qkv, vector(3), 1 + vector(4)), {"segment": 6, "top": 2}),
    }


MECHANISMS = foveal.mechanisms()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_functions_are_in_step_with_the_registry(mechanism):
    function = getattr(GROUPS[mechanism.group], mechanism.name)
    assert function.__doc__ and ">>>" in function.__doc__
    assert function.__module__ == f"foveal.{mechanism.group}"
    assert mechanism.name in calls()
    hints = inspect.signature(function)
    assert all(p.annotation is not inspect.Parameter.empty for p in hints.parameters.values())


def test_no_group_has_a_function_that_the_registry_lacks():
    for group, module in GROUPS.items():
        own = {n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
        names = {m.name for m in MECHANISMS if m.group == group}
        assert {n for n in own if not n.startswith("_")} == names


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_gradients_are_those_of_finite_differences(mechanism):
    function = getattr(GROUPS[mechanism.group], mechanism.name)
    arrays, options = calls()[mechanism.name]
    call = Recorded(function, *arrays, **options)
    out = call.result
    weights = random(*out.shape, seed=77)
    if not mechanism.backward:
        with pytest.raises(NotImplementedError):
            call.gradients(weights)
        return
    gradients = [d for d in call.gradients(weights, *(None,) * 2) if d is not None]
    generator = np.random.default_rng(5)
    given = [a for a in call.call[1] if a is not None]
    assert len(gradients) == len(given)
    for n, (array, gradient) in enumerate(zip(given, gradients)):
        if mechanism.name == "memorizing" and n in (1, 2):
            continue  # Entries of the memory are constants to the gradients, not to a step.
        assert gradient.shape == array.shape and gradient.dtype == array.dtype
        direction = generator.standard_normal(array.shape).astype(np.float32)
        # Where rows choose by content, a step must not change what they choose.
        step = np.float32(1e-3 if mechanism.name in ("lsh", "memorizing", "moba", "native_sparse") else 1e-2)
        losses = []
        for side in (step, -step):
            moved = [a + side * direction if m == n else a for m, a in enumerate(arrays)]
            losses.append((function(*moved, **options).astype(np.float64) * weights).sum())
        slope = (losses[0] - losses[1]) / (2 * float(step))
        expected = float((gradient.astype(np.float64) * direction).sum())
        assert abs(slope - expected) <= 2e-2 * (1 + abs(expected)), (n, slope, expected)


STATES = ("linear", "performer", "efficient", "retention", "scalar_decay", "gla", "delta", "gated_delta")


@pytest.mark.parametrize("name", STATES)
def test_a_sequence_in_pieces_gives_the_same_bits(name):
    function = getattr(foveal.linear, name)
    arrays, options = calls()[name]
    causal = {"causal": True} if name == "efficient" else {}
    whole, end = function(*arrays, **options, **causal, return_state=True)
    state, parts = None, []
    for piece in (slice(0, 7), slice(7, 8), slice(8, T)):
        own = (a[:, piece] for a in arrays)
        part, state = function(*own, **options, **causal, initial_state=state, return_state=True)
        parts.append(part)
    assert np.array_equal(np.concatenate(parts, 1), whole)
    for a, b in zip(state if isinstance(state, tuple) else (state,), end if isinstance(end, tuple) else (end,)):
        assert np.array_equal(a, b)


def test_packed_sequences_and_padding_of_a_recurrence():
    arrays, _ = calls()["gla"]
    packed, states = foveal.linear.gla(*arrays, cu_seqlens=np.array([0, 6, 20]), return_state=True)
    for n, part in enumerate((slice(0, 6), slice(6, 20))):
        alone, state = foveal.linear.gla(*(a[:, part] for a in arrays), return_state=True)
        assert np.array_equal(packed[:, part], alone)
        assert np.array_equal(states[n : n + 1], state)
    present = np.ones((1, T), bool)
    present[:, 12:] = False
    _, padded = foveal.linear.gla(*arrays, present=present, return_state=True)
    q, k, v, decay = arrays
    silent = k.copy()
    silent[:, 12:] = 0
    _, expected = foveal.linear.gla(q, silent, v, decay, return_state=True)
    close(padded, expected, 1e-6)


def test_half_precision_of_all_groups():
    for name in ("moba", "retention", "infini", "linear"):
        group = next(m.group for m in MECHANISMS if m.name == name)
        arrays, options = calls()[name]
        halves = [a.astype(np.float16) if a.ndim == 4 else a for a in arrays]
        out = getattr(GROUPS[group], name)(*halves, **options)
        assert out.dtype == np.float16
        close(out, getattr(GROUPS[group], name)(*arrays, **options), 2e-2)
