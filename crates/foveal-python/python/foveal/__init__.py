"""Attention mechanisms of the transformer family, fast and exact, on CPUs.

>>> import numpy as np, foveal
>>> q = np.zeros((1, 100, 8, 64), np.float32)   # [batch, seq, heads, dim]
>>> k = v = np.zeros((1, 100, 2, 64), np.float32)  # 4 query heads share a key/value head
>>> foveal.attention(q, k, v, causal=True).shape
(1, 100, 8, 64)

Arrays are NumPy's, PyTorch's (bfloat16 and float16 too) or any library's that speaks DLPack; results are of the same
library. Inputs may have any strides as long as the last axis is contiguous; nothing is copied. The interpreter is
released while kernels run. PyTorch tensors that want gradients get them.

``foveal.exact``, ``foveal.sparse``, ``foveal.linear`` and ``foveal.memory`` have a function for each mechanism that
``foveal.mechanisms()`` lists; ``foveal.torch``, ``foveal.nn``, ``foveal.fla``, ``foveal.hf`` and ``foveal.distributed`` need
PyTorch, ``foveal.plot`` needs matplotlib.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NamedTuple

from foveal import _core, _native, exact, linear, memory, sparse
from foveal._attention import attention, flash_attn_func, flash_attn_varlen_func
from foveal._core import State
from foveal._caches import ContiguousCache, PagedCache, PagePool, QuantizedCache, attention_cached
from foveal._positions import merge, rope

__version__: str = _native.__version__

__all__ = [
    "ContiguousCache",
    "Mechanism",
    "PagePool",
    "PagedCache",
    "QuantizedCache",
    "State",
    "__version__",
    "attention",
    "attention_cached",
    "exact",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "get_num_threads",
    "linear",
    "mechanisms",
    "memory",
    "merge",
    "rope",
    "set_num_threads",
    "sparse",
]


class Mechanism(NamedTuple):
    """A mechanism: where its function is, what it does, and where it was published."""

    name: str
    group: str
    summary: str
    paper: str
    backward: bool


def mechanisms() -> list[Mechanism]:
    """All mechanisms.

    >>> [m.name for m in foveal.mechanisms() if m.group == "memory"]
    ['infini', 'memorizing']
    """
    return [Mechanism(*row) for row in _native.mechanisms()]


def set_num_threads(threads: int) -> None:
    """How many threads calls may use from here on; 0 for all. Results do not depend on it, bit for bit.

    Calls on PyTorch tensors use as many as ``torch.get_num_threads()`` says, if that is fewer.
    """
    if threads < 0:
        raise ValueError(f"threads = {threads}: expected 0 (all) or more")
    _core.set_limit(threads)


def get_num_threads() -> int:
    """How many threads a call may use."""
    return _native.get_threads()


def __getattr__(name: str) -> ModuleType:
    # What needs PyTorch or matplotlib is imported when it is asked for.
    if name in ("distributed", "fla", "hf", "nn", "plot", "torch"):
        return importlib.import_module(f"foveal.{name}")
    raise AttributeError(f"module 'foveal' has no attribute {name!r}")


# The other threads do not survive a fork; the child goes on alone.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _core.set_limit(1))
