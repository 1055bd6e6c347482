"""Pictures of who looks at whom (needs matplotlib).

Weights are read off by giving a mechanism the rows of an identity matrix for values: its output is then the weight of
each key. That holds for every mechanism that mixes values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from foveal._core import Array

__all__ = ["pattern", "weights", "weights_of"]


def weights_of(function: Callable[..., Any], q: Array, k: Array, *arrays: Array, **options: Any) -> np.ndarray:
    """The weights ``[B, H, T, S]`` of a mechanism for queries ``[B, T, H, D]`` and keys ``[B, S, KV, D]``, S up to 4096.

    >>> x = np.ones((1, 3, 1, 4), np.float32)
    >>> foveal.plot.weights_of(foveal.exact.window, x, x, width=2)[0, 0].round(2)
    array([[1. , 0. , 0. ],
           [0.5, 0.5, 0. ],
           [0. , 0.5, 0.5]], dtype=float32)
    """
    batch, keys, heads, _ = k.shape
    values = np.broadcast_to(np.eye(keys, dtype=np.float32)[None, :, None], (batch, keys, heads, keys))
    return np.asarray(function(q, k, values, *arrays, **options)).transpose(0, 2, 1, 3)


def _axes(ax: Any) -> Any:
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.figure().gca()
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    return ax


def weights(
    function: Callable[..., Any], q: Array, k: Array, *arrays: Array, head: int = 0, ax: Any = None, **options: Any
) -> Any:
    """Draws the weights of one head of the first sequence, dark where they are large; gives the axes."""
    ax = _axes(ax)
    ax.imshow(weights_of(function, q, k, *arrays, **options)[0, head], cmap="Greys", vmin=0, aspect="auto")
    return ax


def pattern(function: Callable[..., Any], tokens: int = 64, *arrays: Array, ax: Any = None, **options: Any) -> Any:
    """Draws which of so many tokens see which, for random queries and keys; gives the axes."""
    generator = np.random.default_rng(0)
    q, k = (generator.standard_normal((1, tokens, 1, 16)).astype(np.float32) for _ in range(2))
    ax = _axes(ax)
    seen = weights_of(function, q, k, *arrays, **options)[0, 0] != 0
    ax.imshow(seen, cmap="Greys", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    return ax
