"""Exact attention, and flash-attn's functions."""

from __future__ import annotations

from typing import Any

from foveal import _native
from foveal._core import Array, band, is_torch, run

def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    alibi: Array | bool | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    key_lengths: Array | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    generated: bool = False,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Softmax attention, exactly, without ever storing a score: ``softmax(scale · q kᵀ, masked) v``.

    Args:
        q: Queries ``[B, T, H, D]``.
        k: Keys ``[B, S, KV, D]``; query head ``h`` reads key/value head ``h // (H // KV)``.
        v: Values ``[B, S, KV, Dv]``.
        causal: Query ``i`` of ``T`` sits at position ``i + S - T`` and sees keys up to there (bottom-right).
        window: The newest ``window`` keys, the query's own included; or how many keys before and after its own.
        mask: Truth values that broadcast to ``[B, H, T, S]``, True where a key is seen.
        bias: float32 ``[B or 1, H or 1, T or 1, S]``, added to scores.
        alibi: ``True`` for the standard slopes, or float32 slopes ``[H]``: scores fall with distance.
        scale: What scores are multiplied by; ``1/√D`` by default.
        softcap: Bends scores towards ±softcap, before biases and masks.
        sinks: float32 ``[H]``: a learned logit of each head, as of a key without a value.
        key_lengths: Whole numbers ``[B]``: how many keys each sequence has; what follows is padding.
        dropout: The share of weights that is left out, by ``seed``.
        generated: Takes the kernels of generated tokens (at most 64 rows; no gradients).
        return_lse: Also gives the log-sum-exp of each row, float32 ``[B, T, H]``.
        out: Where the output is written instead of a new array (no gradients).

    Returns:
        ``[B, T, H, Dv]`` of q's dtype, or that and the log-sum-exp. A row that sees nothing is 0, its log-sum-exp -inf.

    >>> x = np.ones((1, 3, 1, 4), np.float32)
    >>> out, lse = foveal.attention(x, x, x, window=2, scale=1.0, return_lse=True)
    >>> np.exp(lse[0, :, 0] - 4).round(3)   # keys that each row sees
    array([1., 2., 2.], dtype=float32)
    """
    behind, ahead = (None, 0 if causal else None) if window is None else band(causal, window)
    standard = alibi is True
    slopes = None if alibi is None or isinstance(alibi, bool) else alibi
    options = (behind, ahead, scale, softcap, standard, dropout, seed, generated, return_lse)
    if mask is None and bias is None and slopes is None and sinks is None and key_lengths is None:
        arrays = q, k, v
    else:
        arrays = (q, k, v, mask, bias, slopes, sinks, None, None, key_lengths, None, None, None)
    if out is not None:
        if is_torch(q):
            from foveal import torch as foveal_torch

            lse = foveal_torch.attention_into(arrays, out, options)
        else:
            lse = _native.attention_into(arrays, out, options)
    else:
        results = run("attention", arrays, options)
        return results[:2] if return_lse else results[0]
    return (out, lse) if return_lse else out


def _sides(causal: bool, window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    # As a tensor, too.
    left, right = (int(side) for side in window_size)
    behind = None if left < 0 else left
    ahead = None if right < 0 else right
    return behind, 0 if causal else ahead


def _slopes(alibi_slopes: Array | None) -> Array | None:
    if alibi_slopes is None or alibi_slopes.ndim == 1:
        return alibi_slopes
    if alibi_slopes.shape[0] == 1:
        return alibi_slopes[0]
    raise ValueError("alibi_slopes: expected [heads]; slopes that differ between sequences are not supported")


def _seed(q: Array, dropout_p: float) -> int:
    if dropout_p == 0.0:
        return 0
    if is_torch(q):
        import torch

        return int(torch.randint(0, 2**62, ()).item())
    import numpy as np

    return int(np.random.randint(0, 2**62))


def _by_heads(lse: Array) -> Array:
    return lse.transpose(-1, -2) if is_torch(lse) else lse.swapaxes(-1, -2)


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn's function of this name, with its meaning, on the CPU.

    Queries ``[B, T, H, D]``, keys and values ``[B, S, KV, D]``; causal is bottom-right; ``window_size`` is how many keys
    to the left and right of its own position a query sees, -1 for all. Results are deterministic with or without asking.

    With ``return_attn_probs``: the output, the log-sum-exp ``[B, H, T]``, and ``None`` in place of probabilities.

    >>> x = np.ones((1, 3, 1, 4), np.float32)
    >>> out, lse, _ = foveal.flash_attn_func(x, x, x, softmax_scale=1.0, window_size=(1, 0), return_attn_probs=True)
    >>> np.exp(lse[0, 0] - 4).round(3)
    array([1., 2., 2.], dtype=float32)
    """
    behind, ahead = _sides(causal, window_size)
    options = (behind, ahead, softmax_scale, softcap or None, False, dropout_p, _seed(q, dropout_p), False, True)
    arrays = (q, k, v, None, None, _slopes(alibi_slopes), *(None,) * 7)
    out, lse = run("attention", arrays, options)
    return (out, _by_heads(lse), None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn's function of this name: sequences packed one after the other, without padding.

    Queries ``[total_q, H, D]``, keys and values ``[total_k, KV, D]``; ``cu_seqlens`` are int32 or int64 offsets
    ``[sequences + 1]`` that begin with 0. The longest lengths are not needed. ``alibi_slopes`` need the same offsets for
    queries and keys.

    >>> x = np.ones((5, 1, 4), np.float32)
    >>> cuts = np.array([0, 2, 5], np.int32)
    >>> _, lse, _ = foveal.flash_attn_varlen_func(x, x, x, cuts, cuts, softmax_scale=1.0, return_attn_probs=True)
    >>> np.exp(lse[0] - 4).round(3)
    array([2., 2., 3., 3., 3.], dtype=float32)
    """
    if getattr(q, "ndim", 0) != 3:
        raise ValueError("q: expected the packed form [tokens, heads, dim]")
    if alibi_slopes is not None and list(cu_seqlens_q) != list(cu_seqlens_k):
        raise ValueError("alibi_slopes: expected the same offsets for queries and keys")
    behind, ahead = _sides(causal, window_size)
    options = (behind, ahead, softmax_scale, softcap or None, False, dropout_p, _seed(q, dropout_p), False, True)
    nothing = (None,) * 4
    arrays = (q[None], k[None], v[None], None, None, _slopes(alibi_slopes), None, cu_seqlens_q, cu_seqlens_k, *nothing)
    out, lse = run("attention", arrays, options)
    return (out[0], _by_heads(lse[0]), None) if return_attn_probs else out[0]
