"""From a mechanism's name, arrays and options to the native module, or through PyTorch's operators where gradients are wanted."""

from __future__ import annotations

import sys
from typing import Any

from foveal import _native

Array = Any
"""A NumPy array, a PyTorch tensor, or anything else with ``__dlpack__``: float32, float16 or bfloat16, on the CPU."""


def is_torch(array: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def run(name: str, arrays: tuple[Array | None, ...], options: tuple[Any, ...]) -> tuple[Array, ...]:
    """The results of a mechanism: arrays of the kind of the first one."""
    if is_torch(arrays[0]):
        from foveal import torch as foveal_torch

        return foveal_torch.run(name, arrays, options)
    return _native.forward(name, arrays, options)


def band(causal: bool, window: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own position a query sees; ``None`` for all."""
    if window is None:
        return None, 0 if causal else None
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window = {window}: expected at least 1 key, the query's own")
        return window - 1, 0
    behind, ahead = window
    for side in (behind, ahead):
        if side is not None and side < 0:
            raise ValueError(f"window = {window}: expected numbers of keys before and after, or None for all")
    return behind, 0 if causal else ahead


limit: int = 0
"""The most threads that calls may use; 0 for all."""
current: int = 0
"""What the native module was told last; 0 for all."""


def set_limit(threads: int) -> None:
    global limit, current
    limit = current = threads
    _native.set_threads(threads)
