"""Rotary positions, and the joining of partial results."""

from __future__ import annotations

from foveal._core import Array, run


def rope(
    x: Array,
    positions: Array | None = None,
    *,
    theta: float = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> Array:
    """Turns pairs of numbers of queries or keys ``[B, T, H, D]`` by angles that grow with the position.

    ``positions`` are whole numbers ``[T]``, 0 to T - 1 by default. Pairs are ``(c, c + D/2)`` as in checkpoints of Hugging
    Face, or ``(2c, 2c + 1)`` if interleaved. Angles are formed in float64.

    >>> x = np.ones((1, 2, 1, 2), np.float32)
    >>> foveal.rope(x)[0, :, 0].round(3)
    array([[ 1.   ,  1.   ],
           [-0.301,  1.382]], dtype=float32)
    """
    (turned,) = run("rope", (x, positions), (theta, rotary_dim, interleaved))
    return turned


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Joins attention of the same queries to two sets of keys that share none: outputs ``[B, T, H, Dv]`` and float32
    log-sum-exps ``[B, T, H]`` of each.

    >>> q, k = np.ones((1, 1, 1, 4), np.float32), np.ones((1, 6, 1, 4), np.float32)
    >>> a = foveal.attention(q, k[:, :2], k[:, :2], return_lse=True)
    >>> b = foveal.attention(q, k[:, 2:], k[:, 2:], return_lse=True)
    >>> whole = foveal.attention(q, k, k, return_lse=True)
    >>> np.allclose(foveal.merge(*a, *b)[1], whole[1])
    True
    """
    from foveal._core import is_torch

    if is_torch(out_a):
        from foveal import torch as foveal_torch

        return foveal_torch.merge(out_a, lse_a, out_b, lse_b)
    out, lse = run("merge", (out_a, lse_a, out_b, lse_b), ())
    return out, lse
