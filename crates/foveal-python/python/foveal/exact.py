"""Softmax attention, computed exactly."""

from __future__ import annotations

from typing import Any

from foveal._attention import attention
from foveal._core import Array, band, is_torch, run


def full(q: Array, k: Array, v: Array, *, causal: bool = True, **options: Any) -> Any:
    """Every token sees all tokens before it: ``foveal.attention`` with causal masking and any of its other options.

    >>> x = np.ones((1, 3, 2, 4), np.float32)
    >>> foveal.exact.full(x, x, x).shape
    (1, 3, 2, 4)
    """
    return attention(q, k, v, causal=causal, **options)


def window(q: Array, k: Array, v: Array, *, width: int, **options: Any) -> Any:
    """Every token sees the ``width`` newest tokens, its own included; other options are those of ``foveal.attention``.

    >>> x = np.ones((1, 3, 2, 4), np.float32)
    >>> foveal.exact.window(x, x, x, width=2).shape
    (1, 3, 2, 4)
    """
    return attention(q, k, v, window=width, **options)


def differential(
    q: Array,
    k: Array,
    v: Array,
    lambda_q1: Array,
    lambda_k1: Array,
    lambda_q2: Array,
    lambda_k2: Array,
    weight: Array,
    *,
    init: float,
    epsilon: float = 1e-5,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    """The difference of two softmaxes over the same values, normalised (Ye et al. 2024).

    Queries ``[B, T, 2H, d]`` and keys ``[B, S, 2KV, d]``: heads ``2h`` and ``2h + 1`` are the two maps of head ``h``.
    Values ``[B, S, KV, Dv]``. The four lambdas are float32 vectors of one length, ``weight`` is float32 ``[Dv]``.
    ``init`` is lambda_init, 0.8 - 0.6·exp(-0.3·depth) as published. Gives ``[B, T, H, Dv]``.

    >>> q, v, z = np.ones((1, 3, 4, 8), np.float32), np.ones((1, 3, 2, 16), np.float32), np.zeros(8, np.float32)
    >>> foveal.exact.differential(q, q, v, z, z, z, z, np.ones(16, np.float32), init=0.8).shape
    (1, 3, 2, 16)
    """
    behind, ahead = band(causal, window)
    arrays = (q, k, v, lambda_q1, lambda_k1, lambda_q2, lambda_k2, weight)
    return run("differential", arrays, (init, epsilon, behind, ahead, scale))[0]


def mla(
    q: Array,
    rows: Array,
    up: Array,
    *,
    rope_dim: int,
    value_dim: int,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    generated: bool = False,
    return_lse: bool = False,
) -> Any:
    """Latent attention (DeepSeek-V2): keys and values of all heads are made from one compressed row a token, or queries
    taken to it (``generated``). float32. Tensors that want gradients take keys and values of all heads, in memory.

    Queries ``[B, T, H, n + rope_dim]``, rows ``[B, S, c + rope_dim]``, the up-projection ``[H·(n + value_dim), c]``: of
    each head first the rows of its keys, then those of its values. Gives ``[B, T, H, value_dim]``.

    >>> q, rows = np.ones((1, 3, 2, 12), np.float32), np.ones((1, 3, 20), np.float32)
    >>> foveal.exact.mla(q, rows, np.ones((2 * 16, 16), np.float32), rope_dim=4, value_dim=8).shape
    (1, 3, 2, 8)
    """
    if is_torch(q):
        from foveal import torch as foveal_torch

        if foveal_torch.wants_gradients((q, rows, up)):
            keys, values = foveal_torch.expand(rows, up, q.shape[2], (rope_dim, value_dim))
            return attention(q, keys, values, causal=causal, window=window, scale=scale, return_lse=return_lse)
    behind, ahead = band(causal, window)
    out, lse = run("mla", (q, rows, up), (rope_dim, value_dim, behind, ahead, scale, generated))
    return (out, lse) if return_lse else out


def transformer_xl(
    q: Array,
    k: Array,
    v: Array,
    distances: Array,
    content_bias: Array,
    position_bias: Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Queries are compared with keys and with distances (Dai et al. 2019); keys and values of earlier segments stand in
    front of the segment's own. Causal.

    Queries ``[B, T, H, D]``, keys and values ``[B, S, KV, D]``, float32 keys by distance ``[P, H, D]`` whose row ``p`` is
    for keys ``p`` positions behind the query (the last for all beyond), float32 biases u and v ``[H, D]``.

    >>> x, r, u = np.ones((1, 3, 2, 4), np.float32), np.ones((3, 2, 4), np.float32), np.zeros((2, 4), np.float32)
    >>> foveal.exact.transformer_xl(x, x, x, r, u, u).shape
    (1, 3, 2, 4)
    """
    behind, ahead = band(True, window)
    options = (behind, ahead, scale, None, False, 0.0, 0, False, True)
    arrays = (q, k, v, *(None,) * 7, distances, content_bias, position_bias)
    out, lse = run("attention", arrays, options)
    return (out, lse) if return_lse else out
