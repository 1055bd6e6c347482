"""What decoding keeps: keys and values of one sequence of one layer, and attention of queries to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveal import _native
from foveal._core import Array, band


def _no_grad(array: Array) -> Array:
    # Caches take numbers, no gradients.
    return array.detach() if hasattr(array, "detach") else array


class _Cache:
    _store: _native.Cache

    def __len__(self) -> int:
        """Tokens that are held."""
        return self._store.end() - self._store.start()

    @property
    def end(self) -> int:
        """Tokens appended so far: the position of the next one."""
        return self._store.end()

    def append(self, k: Array, v: Array) -> None:
        """Appends keys ``[1, n, KV, D]`` and values ``[1, n, KV, Dv]``."""
        self._store.append(_no_grad(k), _no_grad(v))

    def forget(self, before: int) -> None:
        """Gives up the tokens before a position, as far as whole tiles of 256 allow."""
        self._store.forget(before)

    def clear(self) -> None:
        """Gives up everything."""
        self._store.clear()


class ContiguousCache(_Cache):
    """Keys and values in one piece, which grows.

    >>> cache = foveal.ContiguousCache(kv_heads=2, dim=64, dtype="float32")
    >>> kv = np.zeros((1, 10, 2, 64), np.float32)
    >>> cache.append(kv, kv)
    >>> q = np.zeros((1, 1, 8, 64), np.float32)
    >>> foveal.attention_cached(q, [cache]).shape, len(cache)
    ((1, 1, 8, 64), 10)
    """

    def __init__(
        self, kv_heads: int, dim: int, *, value_dim: int | None = None, capacity: int = 256, dtype: str = "float32"
    ) -> None:
        self._store = _native.Cache.contiguous(kv_heads, (dim, value_dim or dim), capacity, dtype)

    def truncate(self, end: int) -> None:
        """Keeps the tokens before ``end``."""
        self._store.truncate(end)


class QuantizedCache(_Cache):
    """Keys and values as whole numbers of 8 or 4 bits with a scale and a minimum for each group of 64."""

    def __init__(
        self, kv_heads: int, dim: int, *, bits: int = 8, value_dim: int | None = None, capacity: int = 256
    ) -> None:
        self._store = _native.Cache.quantized(bits, kv_heads, (dim, value_dim or dim), capacity)


class PagePool:
    """Pages of 256 tokens that the sequences of a layer share.

    >>> pool = foveal.PagePool(kv_heads=2, dim=64, pages=8)
    >>> prompt = pool.create()
    >>> kv = np.zeros((1, 300, 2, 64), np.float32)
    >>> prompt.append(kv, kv)
    >>> answer = prompt.fork(256)   # shares the first page
    >>> len(answer), pool.free_pages
    (256, 6)
    """

    def __init__(
        self, kv_heads: int, dim: int, *, pages: int, value_dim: int | None = None, dtype: str = "float32"
    ) -> None:
        self._pool = _native.Pool(kv_heads, (dim, value_dim or dim), pages, dtype)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._pool.free_pages()

    def create(self) -> PagedCache:
        """An empty sequence."""
        return PagedCache(self._pool.create())


class PagedCache(_Cache):
    """A sequence in pages of a pool; made by ``PagePool.create`` and ``fork``."""

    def __init__(self, store: _native.Cache) -> None:
        self._store = store

    def fork(self, end: int | None = None) -> PagedCache:
        """A sequence with the first ``end`` tokens (all by default), whose pages both hold."""
        return PagedCache(self._store.fork(self.end if end is None else end))

    def truncate(self, end: int) -> None:
        """Keeps the tokens before ``end``."""
        self._store.truncate(end)


def attention_cached(
    q: Array,
    caches: Sequence[ContiguousCache | PagedCache | QuantizedCache],
    *,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    generated: bool | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of the newest queries ``[B, T, H, D]`` to one cache for each sequence, of any kinds and lengths.

    Query ``i`` of ``T`` sits at position ``cache.end + i - T``: append keys and values first. ``generated`` says which
    kernels: those of generated tokens (up to 64 rows), the default for one query, or those of prompts. The other options
    are those of ``attention``. No gradients.
    """
    behind, ahead = band(causal, window)
    rows = q.shape[1] if getattr(q, "ndim", 0) == 4 else 0
    generated = rows == 1 if generated is None else generated
    stores = [cache._store for cache in caches]
    out, lse = _native.attention_cached(_no_grad(q), stores, sinks, (behind, ahead, scale, softcap, generated))
    return (out, lse) if return_lse else out
