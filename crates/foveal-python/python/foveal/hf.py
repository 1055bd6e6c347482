"""Hugging Face Transformers on Foveal: importing this module registers ``attn_implementation="foveal"``.

>>> import foveal.hf                                                                       # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="foveal")       # doctest: +SKIP

Causal and bidirectional attention, sliding windows, padding, packed sequences, softcap, sinks, grouped heads, biases by
position, dropout, dynamic and static caches, forward and backward. What is not supported raises ``ValueError``.

Within ``use_linear_kernels(model)`` models with gated delta rules (Qwen3-Next and its kin) run on Foveal's recurrence.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from foveal import fla
from foveal.torch import run

__all__ = ["NAME", "attention", "attention_mask", "chunk_gated_delta_rule", "use_linear_kernels"]

NAME = "foveal"
"""What ``attn_implementation`` is to be."""


def _refuse(kwargs: dict[str, Any], cache: Any) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError('"foveal" never stores attention weights; use attn_implementation="eager" to get them')
    if cache is not None and hasattr(cache, "block_tables") or type(cache).__name__ == "PagedAttentionCache":
        raise ValueError('"foveal" does not support continuous batching; use attn_implementation="sdpa"')
    for name in ("head_mask", "layer_head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f'"foveal" does not support {name}; use attn_implementation="eager"')


def _as_bias(mask: Tensor, seq: int, keys: int) -> Tensor:
    bias = mask.float()
    return bias.expand(*bias.shape[:-2], seq, keys)


def _cuts(kwargs: dict[str, Any], query: Tensor, key: Tensor) -> Tensor | None:
    cuts = kwargs.get("cu_seq_lens_q")
    packed = cuts is not None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    return cuts if packed else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls: queries ``[B, H, T, D]``, keys and values ``[B, KV, S, D]``."""
    _refuse(kwargs, cache)
    seq, keys = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal and seq > 1 and attention_mask is None
    behind = ahead = mask = bias = None
    if causal:
        if keys > seq:
            # A prompt in an empty static cache, whose other places hold nothing yet.
            key, value, keys = key[:, :, :seq], value[:, :, :seq], seq
            position_bias = None if position_bias is None else position_bias[..., :seq]
        window = kwargs.get("sliding_window")
        behind, ahead = (None if window is None else window - 1), 0
    elif attention_mask is not None:
        band = getattr(attention_mask, "foveal_band", None)
        if band is not None:
            behind, ahead = band
        elif attention_mask.dtype == torch.bool:
            mask = attention_mask[..., :keys]
        else:
            bias = _as_bias(attention_mask[..., :keys], seq, keys)
    if position_bias is not None:
        own = _as_bias(position_bias, seq, keys)
        bias = own if bias is None else bias + own
    sinks = kwargs.get("s_aux")
    cuts = _cuts(kwargs, query, key) if mask is None and bias is None else None
    seed = int(torch.randint(0, 2**62, ()).item()) if dropout else 0
    generated = seq == 1 and not torch.is_grad_enabled()
    options = (behind, ahead, scaling, kwargs.get("softcap"), False, dropout, seed, generated, False)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sinks = None if sinks is None else sinks.float()
    results = run("attention", (q, k, v, mask, bias, None, sinks, cuts, cuts, *(None,) * 4), options)
    return results[0], None


def _band(window: int | None, mask_function: Callable[..., Any]) -> tuple[int | None, int] | None:
    """How far back a mask without padding sees, if it is causal or a causal window; ``None`` for any other."""
    if window is None:
        return (None, 0) if mask_function is causal_mask_function else None
    # A window of w is told from a chunk of w by what token w sees: tokens from 1 on, or none before it.
    zero = torch.zeros((), dtype=torch.long)
    sees = [bool(mask_function(zero, zero, zero + window, zero + key)) for key in (0, 1)]
    return (window - 1, 0) if window > 1 and sees == [False, True] else None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that Transformers calls: truth values ``[B, 1, T, S]``, or ``None`` where causality says it all.

    A causal window without padding is marked, so that its kernels see a window and no array of truth values.
    """
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    plain = allow_is_causal_skip and not use_vmap and not torch.compiler.is_compiling()
    if mask is None or not plain or (attention_mask is not None and not attention_mask.all()):
        return mask
    aligned = int(q_offset) + q_length == kv_offset + kv_length
    padded = attention_mask is not None and attention_mask.shape[-1] < kv_offset + kv_length
    band = _band(local_size, mask_function) if aligned and not padded else None
    if band is not None:
        mask.foveal_band = band
    return mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """``foveal.fla.chunk_gated_delta_rule`` with the names of arguments that Transformers has, which are more than it needs."""
    common = {"scale": scale, "initial_state": initial_state, "output_final_state": output_final_state}
    common |= {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "cu_seqlens": cu_seqlens}
    return fla.chunk_gated_delta_rule(query, key, value, g, beta, **common)


_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


@contextlib.contextmanager
def use_linear_kernels(model: nn.Module) -> Iterator[int]:
    """Within it, layers with gated delta rules of the model's family run on Foveal where their tensors are on the CPU;
    gives how many layers of the model those are."""
    modules = {type(layer).__module__ for layer in model.modules()}
    homes = [sys.modules[name] for name in modules if hasattr(sys.modules[name], _RULES[0])]
    kept = [(home, name, getattr(home, name)) for home in homes for name in _RULES if hasattr(home, name)]
    names = {home.__name__ for home in homes}
    layers = [y for y in model.modules() if type(y).__module__ in names and type(y).__name__.endswith("GatedDeltaNet")]
    for home, name, own in kept:
        setattr(home, name, _on_the_cpu(own))
    try:
        yield len(layers)
    finally:
        for home, name, own in kept:
            setattr(home, name, own)


def _on_the_cpu(own: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(own)

    def rule(*arguments: Any, **options: Any) -> Any:
        given = dict(signature.bind(*arguments, **options).arguments)
        query = given["query"]
        if query.device.type != "cpu" or query.dtype == torch.float64:
            return own(*arguments, **options)
        given.pop("chunk_size", None)
        return chunk_gated_delta_rule(**given.pop("kwargs", {}), **given)

    return rule
