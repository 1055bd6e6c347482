"""Attention to near tokens, mixed with what a memory of earlier ones gives."""

from __future__ import annotations

from typing import Any

from foveal._core import Array, State, run


def infini(
    q: Array,
    k: Array,
    v: Array,
    gate: Array,
    *,
    segment: int,
    update: str = "linear",
    bypass_empty: bool = False,
    rotated: tuple[Array, Array] | None = None,
    scale: float | None = None,
    memory: tuple[Array, Array] | None = None,
    return_memory: bool = False,
    state: State | None = None,
) -> Any:
    """Infini-attention (Munkhdalai et al. 2024): attention within segments of so many tokens, mixed by a gate with what a
    matrix remembers of the segments before.

    Queries ``[B, T, H, D]``, keys and values ``[B, T, KV, D]`` without positions; ``rotated`` are queries and keys with
    them, for attention within a segment. ``gate`` is float32 ``[H]``: sigmoid of it is the memory's share. ``update`` is
    ``"linear"`` or ``"delta"``; with ``bypass_empty`` the gate waits until the memory holds something. A memory, float32
    matrices ``[B, KV, D, Dv]`` and sums ``[B, KV, D]``, is carried on by calls of whole segments; a
    ``state`` holds it and the tokens of a segment that is not whole, whose calls may end anywhere.

    >>> x = np.ones((1, 20, 2, 4), np.float32)
    >>> out, (matrices, sums) = foveal.memory.infini(x, x, x, np.zeros(2, np.float32), segment=8, return_memory=True)
    >>> out.shape, matrices.shape, sums[0, 0, 0]   # 16 tokens of whole segments, elu(1) + 1 each
    ((1, 20, 2, 4), (1, 2, 4, 4), np.float32(32.0))
    """
    if update not in ("linear", "delta"):
        raise ValueError(f"update = {update!r}: expected 'linear' or 'delta'")
    arrays = (q, k, v, gate, *(rotated or (None, None)), *(memory or (None, None)))
    out, matrices, sums = run("infini", arrays, (segment, update == "delta", bypass_empty, scale), state)
    return (out, (matrices, sums)) if return_memory else out


def memorizing(
    q: Array,
    k: Array,
    v: Array,
    gate: Array,
    scale: Array,
    bias: Array | None = None,
    *,
    segment: int,
    top: int = 32,
    capacity: int = 65536,
    previous: bool = False,
    index: tuple[int, int] | None = None,
    state: State | None = None,
) -> Array:
    """Memorizing Transformers (Wu et al. 2022): attention within a segment, mixed by a gate with attention to the ``top``
    best of a document's past keys. Each sequence is a document from its beginning; queries and keys are normalised.

    Queries ``[B, T, H, D]``, keys and values ``[B, T, KV, D]``; float32 gates and scales ``[H]``; ``bias`` float32
    ``[1, H, segment, segment]``, or twice as many keys if ``previous`` lets rows see the segment before. ``capacity``:
    tokens that are remembered. With an ``index`` of so many lists, of which a query searches so many, retrieval is
    approximate and costs that share, once 32 tokens for each list are remembered. With a ``state`` the document goes on.

    >>> x, one = np.ones((1, 20, 2, 4), np.float32), np.ones(2, np.float32)
    >>> foveal.memory.memorizing(x, x, x, one, one, segment=8, top=4).shape
    (1, 20, 2, 4)
    """
    return run("memorizing", (q, k, v, gate, scale, bias), (segment, top, capacity, previous, index), state)[0]
