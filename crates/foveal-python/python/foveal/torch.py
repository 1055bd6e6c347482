"""PyTorch: attention in its layout, and in place of its own.

Every function of ``foveal`` takes tensors; those that want gradients go through operators of ``torch.library``
(``torch.ops.foveal``), which ``torch.compile`` and ``torch.export`` understand. Tensors are on the CPU, float32, float16
or bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foveal import _core, _native
from foveal._operators import NAMES, OPERATORS, SPECS, Recorded, ready, ready_all

__all__ = ["merge", "replace_sdpa", "scaled_dot_product_attention"]

_PLAIN = (Tensor, torch.nn.Parameter)


def wants_gradients(arrays: tuple[Tensor | None, ...]) -> bool:
    """Whether a call is to be recorded."""
    if torch.is_grad_enabled():
        for x in arrays:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _share_threads() -> None:
    threads = torch.get_num_threads()
    if _core.limit:
        threads = min(threads, _core.limit)
    if threads != _core.current:
        _core.current = threads
        _native.set_threads(threads)


def run(name: str, arrays: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a mechanism."""
    if _is_watched(arrays[0]):
        return _operate(name, arrays, options)
    _share_threads()
    if not wants_gradients(arrays):
        if name == "attention" and _is_large(arrays[0]):
            return _into_new(arrays, options)
        return _native.forward(name, tuple(ready_all(name, arrays)), options)
    if not SPECS[name].gradients:
        return _operate(name, arrays, options)
    return Recorded.apply(name, _with_lse(name, options), *arrays)


def _is_large(query: Tensor) -> bool:
    """Whether PyTorch is to allocate the output: large blocks of two allocators leave holes that neither can fill."""
    return query.dim() == 4 and query.numel() >= 1 << 18


def _into_new(arrays: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    query, _, value, *_ = arrays
    if not isinstance(value, Tensor) or value.dim() != 4 or query.device.type != "cpu":
        return _native.forward("attention", tuple(ready_all("attention", arrays)), options)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, _native.attention_into(tuple(ready_all("attention", arrays)), out, options)


def _is_watched(tensor: Tensor) -> bool:
    """Whether somebody looks at the operators that are called: a tracer, a mode, a transform, or a kind of tensor."""
    return _is_compiling() or type(tensor) not in _PLAIN or _modes() > 0 or _transforms() is not None


_is_compiling = torch.compiler.is_compiling
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack


def _with_lse(name: str, options: tuple[Any, ...]) -> tuple[Any, ...]:
    # Gradients need the log-sum-exp.
    return (*options[:-1], True) if name == "attention" else options


def _operate(name: str, arrays: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """By an operator, which tracing, modes and transforms see."""
    if not _is_compiling():
        _share_threads()
    missing = (None,) * (len(NAMES[name].all) - len(arrays))
    results = OPERATORS[name](*arrays, *missing, repr(_with_lse(name, options)))
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def step(name: str, state: Any, arrays: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a mechanism that goes on with a state; no gradients."""
    _share_threads()
    arrays = tuple([x.detach() if isinstance(x, Tensor) else x for x in arrays])
    return _native.step(name, state, tuple(ready_all(name, arrays)), options)


def expand(rows: Tensor, up: Tensor, heads: int, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Keys ``[B, S, H, n + rope_dim]`` and values ``[B, S, H, value_dim]`` of the compressed rows of latent attention."""
    rope_dim, value_dim = dims
    latent, turned = rows.split([rows.shape[-1] - rope_dim, rope_dim], -1)
    both = torch.nn.functional.linear(latent, up).unflatten(-1, (heads, -1))
    keys, values = both.split([both.shape[-1] - value_dim, value_dim], -1)
    turned = turned.unsqueeze(2).expand(-1, -1, heads, -1)
    return torch.cat([keys, turned], -1), values


def attention_into(arrays: tuple[Tensor | None, ...], out: Tensor, options: tuple[Any, ...]) -> Tensor:
    """Attention into a tensor; the log-sum-exp."""
    if wants_gradients((*arrays, out)):
        raise RuntimeError("attention with out=... has no gradients; call it under torch.no_grad()")
    _share_threads()
    return _native.attention_into(tuple(ready_all("attention", arrays)), out, options)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """``foveal.merge`` with gradients."""
    arrays = (out_a, lse_a, out_b, lse_b)
    if not torch.compiler.is_compiling() and not wants_gradients(arrays):
        out, lse = _native.forward("merge", tuple(ready(x) for x in arrays), ())
        return out, lse
    lse = torch.logaddexp(lse_a, lse_b)
    # Rows that see nothing in either part stay 0.
    safe = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
    weight_a, weight_b = (torch.exp(x - safe).unsqueeze(-1) for x in (lse_a, lse_b))
    out = weight_a * out_a.float() + weight_b * out_b.float()
    return out.to(out_a.dtype), lse


def _bias(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A float mask as a bias ``[1 or B, 1 or H, T, S]``."""
    bias = attn_mask.float()
    while bias.dim() < 4:
        bias = bias.unsqueeze(0)
    seq, keys = query.shape[-2], key.shape[-2]
    return bias.expand(bias.shape[0], bias.shape[1], seq, keys)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on Foveal's kernels: ``[B, H, T, D]`` (or ``[H, T, D]``),
    causal from the top left, truth values True where seen, float masks added to scores.

    >>> import torch
    >>> x = torch.ones(1, 2, 3, 4)
    >>> foveal.torch.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([1, 2, 3, 4])
    """
    if query.dim() == 3:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        out = scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        return out.squeeze(0)
    if query.dim() != 4:
        raise ValueError(f"query: expected [batch, heads, seq, dim] or [heads, seq, dim], got {query.dim()} axes")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        heads = (query.shape[1], key.shape[1])
        raise ValueError(f"{heads[0]} query heads and {heads[1]} key heads: expected the same, or enable_gqa=True")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal exclude each other")
    seq, keys = query.shape[2], key.shape[2]
    ahead = None
    if is_causal:
        # Keys after the last query are seen by none; after that, positions count from the bottom right.
        if keys > seq:
            key, value, keys = key[:, :, :seq], value[:, :, :seq], seq
        ahead = seq - keys
    mask = bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = _bias(attn_mask, query, key)
    seed = int(torch.randint(0, 2**62, ()).item()) if dropout_p else 0
    options = (None, ahead, scale, None, False, dropout_p, seed, False, False)
    terms = () if attn_mask is None else (mask, bias)
    if not _is_watched(query) and not wants_gradients((query, key, value, bias)) and not _is_large(query):
        _share_threads()
        arrays = tuple(ready_all("attention", (query, key, value, *terms)))
        return _native.forward("attention_by_heads", arrays, options)[0]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = run("attention", (q, k, v, *terms), options)[0]
    return out.transpose(1, 2)


_KINDS = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def replace_sdpa() -> Iterator[None]:
    """Within it, ``torch.nn.functional.scaled_dot_product_attention`` is Foveal's where that takes the tensors (on the
    CPU, of three or four axes, float32, float16 or bfloat16), and PyTorch's elsewhere.

    >>> with foveal.torch.replace_sdpa():
    ...     y = torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 3, 4)] * 3)
    """
    functional = torch.nn.functional
    own = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        ours = (
            query.device.type == "cpu"
            and query.dim() in (3, 4)
            and query.dim() == key.dim() == value.dim()
            and query.dtype in _KINDS
            and query.shape[: query.dim() - 3] == key.shape[: key.dim() - 3]
        )
        return (scaled_dot_product_attention if ours else own)(query, key, value, *rest, **options)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own
