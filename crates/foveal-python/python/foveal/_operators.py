"""Every mechanism as an operator of PyTorch, ``torch.ops.foveal.<name>``, with shapes for tracing and gradients.

An operator takes the mechanism's arrays in order and its options as the text of a tuple; its gradients are an operator
``<name>_backward`` of their own, so that ``torch.compile`` looks into neither.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal import _native

if torch.distributed.is_available():
    # The first call of any operator imports it. Its functions have the process group of that moment for a default, which
    # would live on after destroy_process_group(), with threads that the interpreter does not wait for when it ends.
    import torch.distributed.nn.functional  # noqa: F401

_Results = list[tuple[tuple[int, ...], torch.dtype]]


class Spec(NamedTuple):
    """What an operator is given and gives."""

    arrays: str
    """Names in the order of the native module: ``?`` where one may be missing, ``!`` where it has no gradient."""
    results: Callable[[dict[str, Any], tuple[Any, ...]], _Results]
    """Shapes and dtypes from arrays by name and options."""
    gradients: tuple[int, ...] = (0,)
    """Which results take gradients."""


def _out(a: dict[str, Any], q: str = "q") -> tuple[tuple[int, ...], torch.dtype]:
    return (*a[q].shape[:3], a["v"].shape[3]), a[q].dtype


def _row(a: dict[str, Any], q: str = "q") -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(a[q].shape[:3]), torch.float32


def _output_and_lse(a: dict[str, Any], _: tuple[Any, ...]) -> _Results:
    return [_out(a), _row(a)]


def _differential(a: dict[str, Any], _: tuple[Any, ...]) -> _Results:
    batch, seq, heads, _d = a["q"].shape
    out = (batch, seq, heads // 2, a["v"].shape[3]), a["q"].dtype
    lse = (batch, seq, heads // 2), torch.float32
    return [out, out, lse, out, lse]


def _recurrent(sums: Callable[[tuple[Any, ...]], int], features: bool, reads: bool) -> Any:
    def results(a: dict[str, Any], options: tuple[Any, ...]) -> _Results:
        batch, seq, heads, value_dim = a["v"].shape
        sequences = batch if a["cu_seqlens"] is None else a["cu_seqlens"].shape[0] - 1
        key_dim = options[0] if features else a["q"].shape[3]
        kept = (batch, seq if reads else 0, heads, value_dim)
        return [
            _out(a) if a["q"].shape[2] == heads else ((batch, seq, heads, value_dim), a["q"].dtype),
            ((sequences, heads, key_dim, value_dim), torch.float32),
            ((sequences, heads, key_dim * sums(options)), torch.float32),
            (kept, torch.float32),
        ]

    return results


def _linformer(a: dict[str, Any], _: tuple[Any, ...]) -> _Results:
    batch, _s, kv_heads, dim = a["k"].shape
    rank, value_dim = a["e"].shape[0], a["v"].shape[3]
    mixed = [((batch, rank, kv_heads, d), torch.float32) for d in (dim, value_dim)]
    return [_out(a), _row(a), *mixed]


def _infini(a: dict[str, Any], _: tuple[Any, ...]) -> _Results:
    batch, _t, kv_heads, dim = a["k"].shape
    matrices = (batch, kv_heads, dim, a["v"].shape[3])
    return [_out(a), (matrices, torch.float32), (matrices[:3], torch.float32)]


_TOKENS = "q k v log_decay? beta? initial_state? initial_sums? present?! cu_seqlens?!"
_STATE = (0, 1, 2)

SPECS: dict[str, Spec] = {
    "attention": Spec(
        "q k v mask?! bias? alibi? sinks? cu_seqlens_q?! cu_seqlens_k?! key_lengths?! distances? content_bias? position_bias?",
        _output_and_lse,
        (0, 1),
    ),
    "differential": Spec("q k v lambda_q1 lambda_k1 lambda_q2 lambda_k2 weight", _differential),
    "mla": Spec(
        "q rows up",
        lambda a, o: [((*a["q"].shape[:3], o[1]), torch.float32), _row(a)],
        (),
    ),
    "rope": Spec("x positions?!", lambda a, _: [(tuple(a["x"].shape), a["x"].dtype)]),
    "sparse_transformer": Spec("q k v", _output_and_lse),
    "longformer": Spec("q k v global_q? global_k? global_v?", _output_and_lse),
    "bigbird": Spec("q k v", _output_and_lse),
    "lsh": Spec("qk v buckets?!", lambda a, _: [_out(a, "qk"), _row(a, "qk"), _row(a, "qk")]),
    "moba": Spec("q k v", _output_and_lse),
    "native_sparse": Spec(
        "q k v gates k_compressed? v_compressed? k_window? v_window?", lambda a, _: [_out(a)]
    ),
    "linear": Spec(_TOKENS, _recurrent(lambda o: int(o[1] is not None), False, False), _STATE),
    "performer": Spec(_TOKENS, _recurrent(lambda _: 1, True, False), _STATE),
    "efficient": Spec(_TOKENS, _recurrent(lambda _: 2, False, False), _STATE),
    "linformer": Spec("q k v e f?", _linformer),
    "retention": Spec(_TOKENS, _recurrent(lambda _: 0, False, False), _STATE),
    "scalar_decay": Spec(_TOKENS, _recurrent(lambda _: 0, False, False), _STATE),
    "gla": Spec(_TOKENS, _recurrent(lambda _: 0, False, False), _STATE),
    "delta": Spec(_TOKENS, _recurrent(lambda _: 0, False, True), _STATE),
    "gated_delta": Spec(_TOKENS, _recurrent(lambda _: 0, False, True), _STATE),
    "infini": Spec("q k v gate rotated_q? rotated_k? memory? memory_sums?", _infini, _STATE),
    "memorizing": Spec("q k v gate scale bias?", lambda a, _: [_out(a)]),
}

_WHOLE = {"initial_state", "initial_sums", "memory", "memory_sums"}
"""Arrays that the native module takes only if they lie one number after the other, whatever their axes."""


@functools.lru_cache(maxsize=4096)
def _decode(options: str) -> tuple[Any, ...]:
    return ast.literal_eval(options)


def ready(array: Tensor | None, whole: bool = False) -> Tensor | None:
    """A tensor as the native module takes it: the same one, unless its last axis is not contiguous."""
    if array is None:
        return None
    if not isinstance(array, Tensor):
        raise TypeError(f"expected a tensor next to tensors, got {type(array).__name__}")
    if whole or array.dim() < 3:
        return array if array.is_contiguous() else array.contiguous()
    return array if array.stride(-1) == 1 or array.shape[-1] <= 1 else array.contiguous()


class _Names(NamedTuple):
    all: tuple[str, ...]
    optional: frozenset[str]
    constant: frozenset[str]


def _names(arrays: str) -> _Names:
    words = arrays.split()
    plain = tuple(word.rstrip("?!") for word in words)
    pairs = list(zip(words, plain))
    return _Names(
        plain, frozenset(p for w, p in pairs if "?" in w), frozenset(p for w, p in pairs if "!" in w)
    )


def ready_all(name: str, arrays: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The arrays of a mechanism as the native module takes them."""
    strided = name == "attention"  # It takes none whole, and calls of the shortest kind.
    try:
        for array in arrays:
            if array is None or array.is_contiguous():
                continue
            if not strided or array.dim() < 3 or array.stride(-1) != 1:
                break
        else:
            return arrays
    except AttributeError:
        pass  # No tensor: `ready` says so.
    names = NAMES[name].all
    return tuple([ready(array, whole=n in _WHOLE) for n, array in zip(names, arrays)])


NAMES = {name: _names(spec.arrays) for name, spec in SPECS.items()}


def _differentiable(name: str, tensors: Sequence[Any]) -> list[int]:
    """Places of the tensors that have gradients."""
    all_, _, constant = NAMES[name]
    return [n for n, tensor in enumerate(tensors) if tensor is not None and all_[n] not in constant]


def _gradients(
    name: str, given: tuple[Sequence[Any], Sequence[Any], Sequence[Any]], options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Gradients of all arrays, from those, the results, and the gradients of results."""
    inputs, results, d = given
    states = len(SPECS[name].gradients) > 2
    d = tuple(ready(x, whole=states and n in (1, 2)) for n, x in enumerate(d))
    return _native.backward(name, tuple(ready_all(name, inputs)), tuple(results), d, options)


def _keep(ctx: Any, name: str, tensors: Sequence[Any], results: Sequence[Any]) -> None:
    """Keeps what gradients need."""
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None), *results)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(x for n, x in enumerate(results) if n not in SPECS[name].gradients))


def _kept(ctx: Any, name: str, d_results: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The arrays, the results, and the gradients of those that take any; no gradients if there are none."""
    saved = list(ctx.saved_tensors)
    tensors = [saved.pop(0) if there else None for there in ctx.present]
    if all(d is None for d in d_results):
        return tensors, saved, None
    wanted = [d_results[n] for n in SPECS[name].gradients]
    if wanted[0] is None:
        wanted[0] = torch.zeros_like(saved[0])
    return tensors, saved, wanted


class Recorded(torch.autograd.Function):
    """A mechanism with gradients, called straight: the same kernels as by its operator, which costs ten times as much a call."""

    @staticmethod
    def forward(ctx: Any, name: str, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        results = _native.forward(name, tuple(ready_all(name, tensors)), options)
        ctx.name, ctx.options = name, options
        _keep(ctx, name, tensors, results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_results: Any) -> tuple[Any, ...]:
        tensors, saved, wanted = _kept(ctx, ctx.name, d_results)
        if wanted is None:
            return (None,) * (2 + len(tensors))
        gradients = _gradients(ctx.name, (tensors, saved, wanted), ctx.options)[: len(tensors)]
        return None, None, *gradients, *(None,) * (len(tensors) - len(gradients))


def _define(name: str, spec: Spec) -> Callable[..., Any]:
    names = NAMES[name]
    count = len(names.all)
    arrays = ", ".join(f"Tensor{'?' if n in names.optional else ''} {n}" for n in names.all)
    example = _arity(name)

    def given(arguments: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(names.all, arguments))

    def run(*arguments: Any) -> Any:
        *tensors, options = arguments
        results = _native.forward(name, tuple(ready_all(name, tensors)), _decode(options))
        return results if len(results) > 1 else results[0]

    def fake(*arguments: Any) -> Any:
        *tensors, options = arguments
        shapes = spec.results(given(tensors), _decode(options))
        results = tuple(tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in shapes)
        return results if len(results) > 1 else results[0]

    gives = ", ".join(["Tensor"] * example)
    schema = f"({arrays}, str options) -> ({gives})" if example > 1 else f"({arrays}, str options) -> Tensor"
    forward = torch.library.custom_op(
        f"foveal::{name}", run, mutates_args=(), schema=schema, device_types="cpu"
    )
    forward.register_fake(fake)
    if not spec.gradients:
        return forward

    def run_backward(*arguments: Any) -> list[Tensor]:
        *tensors, options = arguments
        inputs, results, d = tensors[:count], tensors[count : count + example], tensors[count + example :]
        gradients = _gradients(name, (inputs, results, d), _decode(options))
        return [gradients[n] for n in _differentiable(name, inputs)]

    def fake_backward(*arguments: Any) -> list[Tensor]:
        places = _differentiable(name, arguments[:count])
        return [arguments[n].new_empty(arguments[n].shape) for n in places]

    kept = ", ".join(f"Tensor result_{n}" for n in range(example))
    d = ", ".join(f"Tensor{'?' if n else ''} d_{n}" for n in range(len(spec.gradients)))
    backward = torch.library.custom_op(
        f"foveal::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"({arrays}, {kept}, {d}, str options) -> Tensor[]",
        device_types="cpu",
    )
    backward.register_fake(fake_backward)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.options = inputs
        _keep(ctx, name, tensors, output if isinstance(output, (tuple, list)) else (output,))

    def through(ctx: Any, *d_results: Any) -> tuple[Any, ...]:
        tensors, saved, wanted = _kept(ctx, name, d_results)
        if wanted is None:
            return (None,) * (count + 1)
        gradients = iter(backward(*tensors, *saved, *wanted, ctx.options))
        places = set(_differentiable(name, tensors))
        return (*(next(gradients) if n in places else None for n in range(count)), None)

    forward.register_autograd(through, setup_context=setup)
    return forward


def _arity(name: str) -> int:
    """How many results a mechanism has."""
    recurrent = SPECS[name].arrays == _TOKENS
    several = {"differential": 5, "lsh": 3, "linformer": 4, "infini": 3}
    single = ("rope", "native_sparse", "memorizing")
    return 4 if recurrent else several.get(name, 1 if name in single else 2)


OPERATORS = {name: _define(name, spec) for name, spec in SPECS.items()}
