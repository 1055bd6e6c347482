"""From a mechanism's name, arrays and options to the native module, or through PyTorch's operators where gradients are wanted."""

from __future__ import annotations

import sys
from typing import Any

from numpy import ndarray

from foveal import _native

Array = Any
"""A NumPy array, a PyTorch tensor, or anything else with ``__dlpack__``: float32, float16 or bfloat16, on the CPU."""


def is_torch(array: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


class State:
    """What a mechanism holds of one sequence between calls: the keys and values that later tokens can see, or a memory.

    Given to ``sparse_transformer``, ``lsh``, ``moba``, ``native_sparse``, ``infini`` or ``memorizing`` as ``state=``, it takes
    their tokens in; each call has to have the same options. A call of one token takes the kernels of generated tokens, a
    longer one those of prompts. One sequence (a batch of 1), no gradients.

    >>> x, state = np.ones((1, 100, 2, 4), np.float32), foveal.State()
    >>> prompt = foveal.sparse.moba(x, x, x, block=16, top=2, state=state)
    >>> foveal.sparse.moba(x[:, :1], x[:, :1], x[:, :1], block=16, top=2, state=state).shape, len(state)
    ((1, 1, 2, 4), 101)
    """

    def __init__(self) -> None:
        self._held = _native.State()
        self._of: tuple[str, tuple[Any, ...]] | None = None

    def __len__(self) -> int:
        """Tokens taken in."""
        return self._held.tokens()

    def clear(self) -> None:
        """Forgets everything; what comes next may be of another mechanism."""
        self._held.clear()
        self._of = None

    def _step(self, name: str, arrays: tuple[Array | None, ...], options: tuple[Any, ...]) -> tuple[Array, ...]:
        if self._of not in (None, (name, options)):
            raise ValueError(f"state: begun by {self._of[0]} with other options; expected the same ones, or a new state")
        if is_torch(arrays[0]):
            from foveal import torch as foveal_torch

            results = foveal_torch.step(name, self._held, arrays, options)
        else:
            results = _native.step(name, self._held, arrays, options)
        self._of = (name, options)
        return results


def run(
    name: str, arrays: tuple[Array | None, ...], options: tuple[Any, ...], state: State | None = None
) -> tuple[Array, ...]:
    """The results of a mechanism: arrays of the kind of the first one. Trailing arrays that are missing may be left out."""
    if state is not None:
        return state._step(name, arrays, options)
    if type(arrays[0]) is not ndarray and is_torch(arrays[0]):
        # Importing it again would cost as much as the rest of a call.
        tensors = sys.modules.get("foveal.torch")
        if tensors is None:
            from foveal import torch as tensors
        return tensors.run(name, arrays, options)
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
