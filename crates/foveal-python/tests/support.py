"""Definitions in float64, golden vectors, and gradients without PyTorch."""

import json
import pathlib

import numpy as np

from foveal import _core, _native

GOLDEN = pathlib.Path(__file__).parents[2] / "foveal" / "tests" / "golden"


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def reference(q, k, v, *, mask=None, scale=None, softcap=None, bias=None, sinks=None):
    """Attention in float64, the definition; mask ``[B or 1, H or 1, T, S]``."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("bthd,bshd->bhts", q, k) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks[None, :, None, None])
    safe = np.where(np.isinf(top), 0, top)
    weights = np.exp(scores - safe)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[None, :, None, None] - safe)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = (np.log(total) + safe)[..., 0].transpose(0, 2, 1)
        probabilities = np.where(total > 0, weights / total, 0)
    return np.einsum("bhts,bshd->bthd", probabilities, v), lse


def band(queries, keys, behind, ahead):
    """Truth values of a band, bottom-right."""
    i = np.arange(queries)[:, None] + keys - queries
    j = np.arange(keys)[None, :]
    seen = np.ones((queries, keys), bool)
    if behind is not None:
        seen &= j >= i - behind
    if ahead is not None:
        seen &= j <= i + ahead
    return seen[None, None]


def close(got, expected, tolerance):
    """max|a − b| ≤ tolerance · (1 + max|b|), infinities in the same places."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    finite = np.isfinite(expected)
    assert np.array_equal(got[~finite], expected[~finite], equal_nan=True)
    if finite.any():
        error = np.abs(got[finite] - expected[finite]).max()
        bound = tolerance * (1 + np.abs(expected[finite]).max())
        assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"


class Recorded:
    """Runs a function of ``foveal`` and keeps what it asked of the native module, for gradients."""

    def __init__(self, function, *arguments, **options):
        calls = []

        def run(name, arrays, given, state=None):
            assert state is None
            if name == "attention":
                given = (*given[:-1], True)  # Gradients need the log-sum-exp.
            results = _native.forward(name, arrays, given)
            calls.append((name, arrays, results, given))
            return results

        modules = [m for m in map(_module, _MODULES)]
        kept = [m.run for m in modules]
        for module in modules:
            module.run = run
        try:
            self.result = function(*arguments, **options)
        finally:
            for module, own in zip(modules, kept):
                module.run = own
        (self.call,) = calls

    def gradients(self, *d_results):
        name, arrays, results, options = self.call
        return _native.backward(name, arrays, results, d_results, options)


_MODULES = ("_attention", "_positions", "exact", "sparse", "linear", "memory")


def _module(name):
    import importlib

    return importlib.import_module(f"foveal.{name}")


_TYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def golden(mechanism):
    """Cases of a mechanism: name, options, tensors as float32, and the tolerance."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    for case in manifest["cases"]:
        if case["mechanism"] == mechanism:
            yield case["name"], case["options"], _tensors(GOLDEN / case["file"]), case["tolerance"]["f32"]


def _tensors(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + at for at in entry["data_offsets"])
            numbers = np.frombuffer(data[start:end], _TYPES[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = numbers.astype(np.float32) if numbers.dtype == np.float64 else numbers.copy()
    return tensors


def cases(*mechanisms):
    """For ``pytest.mark.parametrize``: a case and its name."""
    import pytest

    return [pytest.param(*case, id=case[0]) for mechanism in mechanisms for case in golden(mechanism)]
