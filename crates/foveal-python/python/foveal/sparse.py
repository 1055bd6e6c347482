"""Exact attention to keys that are chosen: cost follows the pairs that are seen.

Queries ``[B, T, H, D]``, keys ``[B, S, KV, D]`` and values ``[B, S, KV, Dv]`` of one dtype give ``[B, T, H, Dv]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveal._core import Array, State, run


def _out(results: tuple[Array, ...], return_lse: bool) -> Any:
    return (results[0], results[1]) if return_lse else results[0]


def sparse_transformer(
    q: Array,
    k: Array,
    v: Array,
    *,
    pattern: str = "strided",
    stride: int = 128,
    width: int = 8,
    window: str = "paper",
    sub_blocks: int | None = None,
    combine: str = "merged",
    layer: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    state: State | None = None,
) -> Any:
    """The Sparse Transformer (Child et al. 2019): near tokens and each ``stride``-th one (``pattern="strided"``), or the
    own block of ``stride`` tokens and the last ``width`` columns of earlier ones (``"fixed"``).

    ``window`` says whether the near part has stride + 1 keys (``"paper"``) or stride (``"code"``); ``sub_blocks`` lets
    heads take turns among so many places of the summary; ``combine`` is ``"merged"``, ``"per_head"`` or ``"interleaved"``
    (by ``layer``). With a ``state`` the tokens follow those that it has taken in.

    >>> x = np.ones((1, 40, 2, 4), np.float32)
    >>> foveal.sparse.sparse_transformer(x, x, x, pattern="fixed", stride=8, width=2).shape
    (1, 40, 2, 4)
    """
    options = (pattern, stride, width, window, sub_blocks, combine, layer, scale)
    return _out(run("sparse_transformer", (q, k, v), options, state), return_lse)


def longformer(
    q: Array,
    k: Array,
    v: Array,
    *,
    reach: int,
    causal: bool = False,
    gaps: Sequence[int] = (1,),
    global_tokens: Sequence[Sequence[int]] = ((),),
    global_projections: tuple[Array, Array, Array] | None = None,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Longformer (Beltagy et al. 2020): ``reach`` keys on each side, and global tokens that see and are seen by all.

    ``gaps`` between keys of a window: one for all heads or one for each. ``global_tokens``: positions, one list for all
    sequences or one for each; their rows read ``global_projections`` (queries, keys, values), by default the same ones.
    ``lengths``: tokens of each sequence, of which what follows is padding.

    >>> x = np.ones((2, 40, 2, 4), np.float32)
    >>> foveal.sparse.longformer(x, x, x, reach=4, global_tokens=[[0]]).shape
    (2, 40, 2, 4)
    """
    lists = [list(tokens) for tokens in global_tokens]
    options = (reach, causal, list(gaps), lists, None if lengths is None else list(lengths), scale)
    arrays = (q, k, v, *(global_projections or (None,) * 3))
    return _out(run("longformer", arrays, options), return_lse)


def bigbird(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int = 64,
    random: int = 3,
    seed: int = 0,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """BigBird (Zaheer et al. 2020): neighbouring blocks, the first and the last, and ``random`` blocks drawn by ``seed``.

    >>> x = np.ones((1, 100, 2, 4), np.float32)
    >>> foveal.sparse.bigbird(x, x, x, block=8, random=2).shape
    (1, 100, 2, 4)
    """
    return _out(run("bigbird", (q, k, v), (block, random, seed, causal, scale)), return_lse)


def lsh(
    qk: Array,
    v: Array,
    *,
    chunk: int = 64,
    buckets: int | Array = 32,
    rounds: int = 2,
    seed: int = 0,
    causal: bool = True,
    strict: bool = False,
    apart: bool = False,
    self_logit: float | None = None,
    scale: float = 1.0,
    return_lse: bool = False,
    state: State | None = None,
) -> Any:
    """Reformer (Kitaev et al. 2020): tokens that hash alike, sorted and cut into chunks; queries ``[B, T, H, D]`` are keys.

    ``buckets``: how many a round has, or whole numbers ``[B, H, rounds, T]``. ``strict`` hides keys of other buckets;
    ``apart`` begins new chunks with every bucket, so that later tokens change none. A row's logit with itself is less 10⁵,
    or ``self_logit``. With a ``state``, which needs ``apart``, the tokens follow those that it has taken in.

    >>> x = np.random.default_rng(0).standard_normal((1, 64, 2, 8)).astype(np.float32)
    >>> foveal.sparse.lsh(x, x, chunk=16, buckets=8).shape
    (1, 64, 2, 8)
    """
    counted = isinstance(buckets, int)
    options = (chunk, buckets if counted else 2, rounds, seed, causal, strict, apart, self_logit, scale)
    return _out(run("lsh", (qk, v, None if counted else buckets), options, state), return_lse)


def moba(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int = 512,
    top: int = 3,
    scale: float | None = None,
    return_lse: bool = False,
    state: State | None = None,
) -> Any:
    """MoBA (Lu et al. 2025): the own block and the ``top - 1`` earlier ones whose mean key suits the query best. Causal.
    With a ``state`` the tokens follow those that it has taken in.

    >>> x = np.ones((1, 100, 2, 4), np.float32)
    >>> foveal.sparse.moba(x, x, x, block=16, top=2).shape
    (1, 100, 2, 4)
    """
    return _out(run("moba", (q, k, v), (block, top, scale), state), return_lse)


def native_sparse(
    q: Array,
    k: Array,
    v: Array,
    gates: Array,
    *,
    compressed: tuple[Array, Array] | None = None,
    near: tuple[Array, Array] | None = None,
    length: int = 32,
    stride: int = 16,
    block: int = 64,
    top: int = 16,
    window: int = 512,
    scale: float | None = None,
    state: State | None = None,
) -> Array:
    """Native Sparse Attention (Yuan et al. 2025): compressed tokens, the blocks whose compressed tokens weigh most, and a
    window, summed by float32 gates ``[B, T, H, 3]`` in this order. Causal.

    Keys and values of the blocks are ``k`` and ``v``; ``compressed`` are those of compressed tokens, of ``length`` tokens
    each, ``stride`` apart, means by default; ``near`` are those of the window, by default the blocks'. With a
    ``state`` the tokens follow those that it has taken in, and ``compressed`` are those that they bring to their end.

    >>> q, kv = np.ones((1, 100, 4, 16), np.float32), np.ones((1, 100, 2, 16), np.float32)
    >>> gates = np.ones((1, 100, 4, 3), np.float32)
    >>> foveal.sparse.native_sparse(q, kv, kv, gates, length=8, stride=4, block=8, top=5, window=16).shape
    (1, 100, 4, 16)
    """
    arrays = (q, k, v, gates, *(compressed or (None,) * 2), *(near or (None,) * 2))
    return run("native_sparse", arrays, (length, stride, block, top, window, scale), state)[0]
