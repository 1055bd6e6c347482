"""A module of PyTorch for each mechanism, named after it: ``native_sparse`` is ``NativeSparse``.

Modules take queries, keys and values ``[B, T, H, D]`` (and gates, where a mechanism has some for each token) and give
``[B, T, H, Dv]``; options are those of the function of the same name. What a mechanism learns beside projections is a
parameter of its module.

>>> import torch
>>> x = torch.ones(1, 5, 2, 4)
>>> foveal.nn.Window(width=3)(x, x, x).shape
torch.Size([1, 5, 2, 4])
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import foveal
from foveal import exact, linear, memory, sparse

__all__ = ["Differential", "Infini", "Linformer", "Memorizing", "TransformerXl"]


class _Mechanism(nn.Module):
    """Attention with fixed options."""

    function: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *arrays: Tensor, **more: Any) -> Any:
        return type(self).function(*arrays, **self.options, **more)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


class Differential(_Mechanism):
    """``foveal.exact.differential`` with its vectors of λ and the weight of its norm, at a depth of the model."""

    def __init__(self, dim: int, value_dim: int, *, depth: int = 0, **options: Any) -> None:
        init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        super().__init__(init=init, **options)
        names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(dim) * 0.1))
        self.weight = nn.Parameter(torch.ones(value_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        vectors = (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        return exact.differential(q, k, v, *vectors, self.weight, **self.options)


class TransformerXl(_Mechanism):
    """``foveal.exact.transformer_xl`` with its biases u and v, and the matrix that makes keys of distances' sinusoids."""

    def __init__(self, heads: int, dim: int, *, distances: int, features: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.heads, self.dim = heads, dim
        features = features or heads * dim
        angles = torch.arange(distances)[:, None] * 10000.0 ** (-torch.arange(0, features, 2) / features)
        self.register_buffer("sinusoids", torch.cat([angles.sin(), angles.cos()], dim=1), persistent=False)
        self.projection = nn.Linear(features, heads * dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, dim))
        self.position_bias = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        keys = self.projection(self.sinusoids).view(-1, self.heads, self.dim)
        return exact.transformer_xl(q, k, v, keys, self.content_bias, self.position_bias, **self.options)


class Linformer(_Mechanism):
    """``foveal.linear.linformer`` with its matrices over ``length`` tokens; one for keys and values if ``shared``."""

    def __init__(self, length: int, rank: int, *, shared: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.e = nn.Parameter(torch.randn(rank, length) / math.sqrt(length))
        self.f = None if shared else nn.Parameter(torch.randn(rank, length) / math.sqrt(length))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return linear.linformer(q, k, v, self.e, self.f, **self.options)


class Infini(_Mechanism):
    """``foveal.memory.infini`` with its gates."""

    def __init__(self, heads: int, *, segment: int, **options: Any) -> None:
        super().__init__(segment=segment, **options)
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:  # type: ignore[override]
        return memory.infini(q, k, v, self.gate, **self.options, **more)


class Memorizing(_Mechanism):
    """``foveal.memory.memorizing`` with its gates and scales."""

    def __init__(self, heads: int, *, segment: int, **options: Any) -> None:
        super().__init__(segment=segment, **options)
        self.gate = nn.Parameter(torch.zeros(heads))
        self.scale = nn.Parameter(torch.full((heads,), 8.0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return memory.memorizing(q, k, v, self.gate, self.scale, bias, **self.options)


def _modules() -> None:
    groups = {"exact": exact, "sparse": sparse, "linear": linear, "memory": memory}
    for mechanism in foveal.mechanisms():
        name = _camel(mechanism.name)
        if name in globals():
            continue
        function = getattr(groups[mechanism.group], mechanism.name)
        words = f"``foveal.{mechanism.group}.{mechanism.name}``: {mechanism.summary} ({mechanism.paper})."
        body = {"function": staticmethod(function), "__doc__": words, "__module__": __name__}
        globals()[name] = type(name, (_Mechanism,), body)
        __all__.append(name)


_modules()
