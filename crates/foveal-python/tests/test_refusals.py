"""What is refused, and with which exception."""

import numpy as np
import pytest
from support import random

import foveal

X = random(1, 4, 2, 8)


@pytest.mark.parametrize(
    "arrays,options,error,words",
    [
        ((X.astype(np.float64), X, X), {}, TypeError, "q: expected float32, float16 or bfloat16, got float64"),
        ((X, X.astype(np.float64), X), {}, TypeError, "k: expected float32, got float64"),
        ((X, X.astype(np.float16), X), {}, TypeError, "k: expected float32, got float16"),
        ((X.astype(np.int32), X, X), {}, TypeError, "int32"),
        (([[[[1.0]]]], X, X), {}, TypeError, "expected a NumPy array.*got list"),
        ((X, None, X), {}, ValueError, "k is needed"),
        ((X[0], X, X), {}, ValueError, r"q: expected an array of 4 axes, \[batch, seq, heads, dim\], got 3"),
        ((X[None], X, X), {}, ValueError, "at most 4"),
        ((X, X[:, :, :, :4], X), {}, ValueError, "batch and dim of the queries"),
        ((X, X, X[:, :3]), {}, ValueError, "batch, seq and heads of the keys"),
        ((random(1, 4, 3, 8), X, X), {}, ValueError, "3 query heads"),
        ((X[..., ::2], X[..., :4], X), {}, ValueError, "q: the last axis has to be contiguous"),
        ((X[:, ::-1], X, X), {}, ValueError, "q: a stride of -16 goes backwards"),
        ((X, X, X), {"mask": np.ones((5, 4), bool)}, ValueError, "mask: expected the shape"),
        ((X, X, X), {"mask": np.ones((4, 4), np.float32)}, TypeError, "mask: expected bool, got float32"),
        ((X, X, X), {"bias": np.ones((1, 2, 4, 5), np.float32)}, ValueError, "bias"),
        ((X, X, X), {"bias": np.ones((1, 2, 4, 4), np.float16)}, TypeError, "bias: expected float32"),
        ((X, X, X), {"sinks": np.ones(3, np.float32)}, ValueError, "sinks"),
        ((X, X, X), {"alibi": np.ones(3, np.float32)}, ValueError, "slopes"),
        ((X, X, X), {"scale": float("nan")}, ValueError, "scale"),
        ((X, X, X), {"softcap": -1.0}, ValueError, "softcap"),
        ((X, X, X), {"window": 0}, ValueError, "window = 0"),
        ((X, X, X), {"window": (-1, 0)}, ValueError, "window"),
        ((X, X, X), {"dropout": 1.5}, ValueError, "dropout"),
        ((X, X, X), {"key_lengths": np.array([-1])}, ValueError, "not negative"),
        ((X, X, X), {"causal": True, "out": np.empty((1, 4, 2, 7), np.float32)}, ValueError, "output"),
        ((X, X, X), {"out": np.empty((1, 4, 2, 8), np.float16)}, TypeError, "out: expected float32"),
        ((X, X, X), {"out": np.broadcast_to(np.float32(0), X.shape)}, ValueError, "read-only"),
        ((random(1, 65, 2, 8), X, X), {"generated": True}, ValueError, "65 generated rows"),
    ],
)
def test_attention_refuses(arrays, options, error, words):
    with pytest.raises(error, match=words):
        foveal.attention(*arrays, **options)


def test_results_are_not_written_over_inputs():
    for name, arrays in [("q", (X.copy(), X, X)), ("k", (X, X.copy(), X)), ("v", (X, X, X.copy()))]:
        place = arrays["qkv".index(name)]
        with pytest.raises(ValueError, match=f"out shares memory with {name}"):
            foveal.attention(*arrays, out=place)
        assert np.array_equal(place, X)


def test_arrays_elsewhere_are_refused():
    class Device:
        """An array that says it is in a GPU's memory; NumPy's own otherwise."""

        def __init__(self, array):
            self.array = array

        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **_):
            raise BufferError("this array is on a GPU")

    with pytest.raises(BufferError, match="GPU"):
        foveal.attention(Device(X), X, X)


def test_other_functions_refuse_words_they_do_not_know():
    with pytest.raises(ValueError, match="pattern = spiral: expected strided or fixed"):
        foveal.sparse.sparse_transformer(X, X, X, pattern="spiral")
    with pytest.raises(ValueError, match="feature_map"):
        foveal.linear.linear(X, X, X, feature_map="cosine")
    with pytest.raises(ValueError, match="update"):
        foveal.memory.infini(X, X, X, np.zeros(2, np.float32), segment=2, update="both")
    with pytest.raises(ValueError, match="decays"):
        foveal.linear.gla(X, X, X, np.zeros((1, 4, 2), np.float32))
    with pytest.raises(ValueError, match="positions"):
        foveal.rope(X, np.arange(3))
    with pytest.raises(ValueError, match="threads"):
        foveal.set_num_threads(-1)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = foveal.nothing


def test_an_array_is_freed_after_use():
    import gc
    import weakref

    array = np.zeros((1, 4, 2, 8), np.float32).view(_Watched)
    watch = weakref.ref(array)
    out = foveal.attention(array, array, array)
    again = foveal.attention(out, out, out)
    del array
    gc.collect()
    assert watch() is None
    assert again.flags.writeable


class _Watched(np.ndarray):
    """An array with weak references."""
