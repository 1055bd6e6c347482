"""flash-linear-attention's functions, with its arguments and meanings, on the CPU.

Queries, keys ``[B, T, H, D]`` and values ``[B, T, H, Dv]``; decays are natural logarithms; states are ``[B, H, D, Dv]`` in
float32. With ``cu_seqlens`` a batch of one holds sequences one after the other, and states are one for each. Functions of
one mechanism whose names begin with ``chunk``, ``fused_recurrent`` and the like are the same one here: kernels choose their
form themselves. Options that are not supported raise ``ValueError``.

>>> import torch
>>> x, g = torch.ones(1, 100, 2, 16), torch.zeros(1, 100, 2, 16)
>>> out, state = foveal.fla.chunk_gla(x, x, x, g, output_final_state=True)
>>> out.shape, state.shape
(torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal import linear

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "parallel_retention",
    "parallel_simple_gla",
]

_Result = tuple[Tensor, Any]

_HINTS = frozenset({"cu_seqlens_cpu", "chunk_size", "chunk_indices"})
"""Arguments of kernels on GPUs that change no result."""


def _refuse(more: dict[str, Any]) -> None:
    for name, value in more.items():
        if name not in _HINTS and value is not None and value is not False:
            raise ValueError(f"{name}: not supported on the CPU")


def _decay(log: Tensor, v: Tensor) -> Tensor:
    return log.float().expand(*v.shape[:3], *log.shape[3:])


def _run(
    function: Callable[..., Any],
    arrays: tuple[Tensor, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    more: dict[str, Any],
    normalise: bool = False,
) -> _Result:
    """Runs with gates in float32; the state only if it is asked for."""
    _refuse(more)
    q, k, v, *gates = arrays
    dtype = v.dtype
    if normalise or not q.dtype == k.dtype == dtype:
        q, k, v = (x.float() for x in (q, k, v))
    if normalise:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state = None if initial_state is None else initial_state.float()
    options = {"scale": scale, "initial_state": state, "return_state": True, "cu_seqlens": cu_seqlens}
    out, final = function(q, k, v, *(g.float() for g in gates), **options)
    return out.to(dtype), final if output_final_state else None


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> _Result:
    """RetNet's retention with its fixed decays, by ``foveal.linear.retention``."""
    return _run(linear.retention, (q, k, v), scale, initial_state, output_final_state, cu_seqlens, more)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> _Result:
    """A decay for each token and head (``g`` ``[B, T, H]``), or for each head (``g_gamma`` ``[H]``), by
    ``foveal.linear.scalar_decay``; as in Mamba-2."""
    if g is not None and g_gamma is not None:
        raise ValueError("g and g_gamma: expected one of them")
    log = q.new_zeros(1) if g is None and g_gamma is None else g if g is not None else g_gamma
    return _run(linear.scalar_decay, (q, k, v, _decay(log, v)), scale, initial_state, output_final_state, cu_seqlens, more)


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> _Result:
    """Gated linear attention with decays ``[B, T, H, D]``, by ``foveal.linear.gla``."""
    return _run(linear.gla, (q, k, v, g), scale, initial_state, output_final_state, cu_seqlens, more)


def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None = None, gv: Tensor | None = None, **options: Any
) -> _Result:
    """``chunk_gla`` under the name of its token-by-token form; decays of values (``gv``) are not supported."""
    if gv is not None:
        raise ValueError("gv: not supported on the CPU")
    return chunk_gla(q, k, v, torch.zeros_like(q, dtype=torch.float32) if gk is None else gk, **options)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> _Result:
    """DeltaNet with strengths ``[B, T, H]``, by ``foveal.linear.delta``."""
    if beta.dim() != 3:
        raise ValueError("beta: expected [B, T, H]; a strength for each channel is not supported")
    options = scale, initial_state, output_final_state, cu_seqlens, more, use_qk_l2norm_in_kernel
    return _run(linear.delta, (q, k, v, beta), *options)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> _Result:
    """Gated DeltaNet with decays and strengths ``[B, T, H]``, by ``foveal.linear.gated_delta``; value heads may be a
    multiple of the query and key heads."""
    options = scale, initial_state, output_final_state, cu_seqlens, more, use_qk_l2norm_in_kernel
    return _run(linear.gated_delta, (q, k, v, g, beta), *options)


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, beta: Tensor | None = None, **options: Any
) -> _Result:
    """``chunk_gated_delta_rule`` under the name of its token-by-token form; no decay without ``g``, strength 1 without ``beta``."""
    heads = v.new_zeros(v.shape[:3], dtype=torch.float32)
    return chunk_gated_delta_rule(q, k, v, heads if g is None else g, heads + 1 if beta is None else beta, **options)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> _Result:
    """Causal linear attention of queries and keys that are features already, by ``foveal.linear.linear``; with
    ``normalize`` outputs are divided by q·Σk + 10⁻¹⁰, and a state is a pair with the sums of keys ``[B, 1, H, D]``."""
    _refuse(more)
    dtype, state = v.dtype, initial_state
    if normalize:
        # One more channel of values, all ones, sums the keys.
        q, k, v = q.float(), k.float(), torch.nn.functional.pad(v.float(), (0, 1), value=1.0)
        state = None if state is None else torch.cat([state[0], state[1].squeeze(1).unsqueeze(-1)], -1)
    if state is not None:
        state = state.float(), state.new_zeros(*state.shape[:2], 0, dtype=torch.float32)
    options = {"feature_map": "identity", "epsilon": None, "cu_seqlens": cu_seqlens}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, (final, _) = linear.linear(q * scale, k, v, initial_state=state, return_state=True, **options)
    if normalize:
        out = (out[..., :-1] / (out[..., -1:] + 1e-10)).to(dtype)
        final = final[..., :-1], final[..., -1].unsqueeze(1)
    return out, final if output_final_state else None


fused_recurrent_retention = parallel_retention = chunk_retention
fused_recurrent_simple_gla = parallel_simple_gla = chunk_simple_gla
fused_recurrent_delta_rule = chunk_delta_rule
fused_recurrent_linear_attn = fused_chunk_linear_attn = chunk_linear_attn
