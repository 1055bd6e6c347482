"""Linear attention: cost grows with the number of tokens, not with its square.

Queries and keys ``[B, T, G, D]`` of one dtype with values ``[B, T, H, Dv]`` give ``[B, T, H, Dv]``; value head ``h`` reads
query and key head ``h // (H // G)``. Gates are float32.

A state is carried from call to call, so that a prompt in pieces, or token by token, gives the same bits as one call on the
whole: ``out, state = f(…, return_state=True)`` and then ``f(…, initial_state=state)``. It is float32 ``[B, H, D, Dv]``, or
for mechanisms that normalise a pair of that and sums of keys. ``cu_seqlens``: offsets of sequences packed in a batch of 1;
``present``: truth values ``[B, T]``, False for padding, which writes nothing.
"""

from __future__ import annotations

from typing import Any

from foveal._core import Array, run


def _recurrent(
    name: str,
    tokens: tuple[Array, Array, Array],
    gates: tuple[Array | None, Array | None],
    state: Any,
    more: tuple[Array | None, Array | None, bool, bool],
    options: tuple[Any, ...],
) -> Any:
    present, cu_seqlens, return_state, sums = more
    initial = (state or (None, None)) if sums else (state, None)
    arrays = (*tokens, *gates, *initial, present, cu_seqlens)
    out, matrices, key_sums, _ = run(name, arrays, options)
    if not return_state:
        return out
    return out, ((matrices, key_sums) if sums else matrices)


def linear(
    q: Array,
    k: Array,
    v: Array,
    *,
    feature_map: str = "elu_plus_one",
    epsilon: float | None = 1e-6,
    causal: bool = True,
    initial_state: tuple[Array, Array] | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """Queries and keys mapped to positive numbers, their products normalised (Katharopoulos et al. 2020).

    ``feature_map``: ``"elu_plus_one"``, ``"relu"``, ``"exp"`` or ``"identity"``; ``epsilon`` is added to the
    denominator, ``None`` for no denominator. Scores are not scaled. Not causal: all tokens see all.

    >>> x = np.ones((1, 10, 2, 4), np.float32)
    >>> out, (state, sums) = foveal.linear.linear(x, x, x, return_state=True)
    >>> out.shape, state.shape, sums.shape
    ((1, 10, 2, 4), (1, 2, 4, 4), (1, 2, 4))
    """
    more = (present, cu_seqlens, return_state, True)
    return _recurrent("linear", (q, k, v), (None, None), initial_state, more, (feature_map, epsilon, causal))


def performer(
    q: Array,
    k: Array,
    v: Array,
    *,
    features: int = 256,
    seed: int = 0,
    kernel: str = "softmax",
    causal: bool = True,
    initial_state: tuple[Array, Array] | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """Softmax attention estimated by positive orthogonal random features (FAVOR+, Choromanski et al. 2021), drawn by
    ``seed``; ``kernel="relu"`` for features max(ωx, 0).

    >>> x = np.ones((1, 10, 2, 4), np.float32)
    >>> foveal.linear.performer(x, x, x, features=32).shape
    (1, 10, 2, 4)
    """
    more = (present, cu_seqlens, return_state, True)
    options = (features, int(q.shape[-1]), seed, kernel, causal)
    return _recurrent("performer", (q, k, v), (None, None), initial_state, more, options)


def efficient(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    initial_state: tuple[Array, Array] | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """Softmax over the channels of queries and, in each channel, over keys (Shen et al. 2021).

    >>> x = np.ones((1, 10, 2, 4), np.float32)
    >>> foveal.linear.efficient(x, x, x).shape
    (1, 10, 2, 4)
    """
    more = (present, cu_seqlens, return_state, True)
    return _recurrent("efficient", (q, k, v), (None, None), initial_state, more, (causal,))


def linformer(
    q: Array, k: Array, v: Array, e: Array, f: Array | None = None, *, scale: float | None = None, return_lse: bool = False
) -> Any:
    """Softmax attention to few learned mixtures of all keys and values (Wang et al. 2020); not causal.

    Queries ``[B, T, H, D]``, keys and values ``[B, S, KV, D]``; float32 matrices ``[rank, length]`` for keys and values,
    one for both without ``f``; a shorter sequence takes their first columns.

    >>> x, e = np.ones((1, 10, 2, 4), np.float32), np.ones((3, 16), np.float32)
    >>> foveal.linear.linformer(x, x, x, e).shape
    (1, 10, 2, 4)
    """
    out, lse, _, _ = run("linformer", (q, k, v, e, f), (scale,))
    return (out, lse) if return_lse else out


def retention(
    q: Array,
    k: Array,
    v: Array,
    *,
    decays: list[float] | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """A state that decays by a constant of each head (Sun et al. 2023): ``decays`` of your own, or RetNet's
    1 - 2^(-5-h). ``scale`` multiplies what is read; 1/√D by default.

    >>> x = np.ones((1, 10, 2, 4), np.float32)
    >>> foveal.linear.retention(x, x, x).shape
    (1, 10, 2, 4)
    """
    more = (present, cu_seqlens, return_state, False)
    options = (None if decays is None else [float(x) for x in decays], int(v.shape[2]), scale)
    return _recurrent("retention", (q, k, v), (None, None), initial_state, more, options)


def scalar_decay(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """A state that decays by one number for each token and head, as in Mamba-2 (Dao and Gu 2024): natural logarithms
    ``[B, T, H]``. ``scale`` multiplies what is read; 1/√D by default.

    >>> x, a = np.ones((1, 10, 2, 4), np.float32), np.zeros((1, 10, 2), np.float32)
    >>> foveal.linear.scalar_decay(x, x, x, a).shape
    (1, 10, 2, 4)
    """
    more = (present, cu_seqlens, return_state, False)
    return _recurrent("scalar_decay", (q, k, v), (log_decay, None), initial_state, more, (scale,))


def gla(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """A state that decays by a number for each token and key channel (Yang et al. 2023): natural logarithms
    ``[B, T, H, D]``. ``scale`` multiplies what is read; 1/√D by default.

    >>> x = np.ones((1, 10, 2, 4), np.float32)
    >>> foveal.linear.gla(x, x, x, -x).shape
    (1, 10, 2, 4)
    """
    more = (present, cu_seqlens, return_state, False)
    return _recurrent("gla", (q, k, v), (log_decay, None), initial_state, more, (scale,))


def delta(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """A token replaces what its key has read, instead of adding to it (Yang et al. 2024), by a writing strength
    ``[B, T, H]``. Keys should have length 1. ``scale`` multiplies what is read; 1/√D by default.

    >>> x, b = np.full((1, 10, 2, 4), 0.5, np.float32), np.ones((1, 10, 2), np.float32)
    >>> foveal.linear.delta(x, x, x, b).shape
    (1, 10, 2, 4)
    """
    more = (present, cu_seqlens, return_state, False)
    return _recurrent("delta", (q, k, v), (None, beta), initial_state, more, (scale,))


def gated_delta(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    present: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
) -> Any:
    """The delta rule on a state that decays by one number for each token and head (Yang et al. 2024): natural logarithms
    and strengths ``[B, T, H]``. Keys should have length 1. ``scale`` multiplies what is read; 1/√D by default.

    >>> x, b = np.full((1, 10, 2, 4), 0.5, np.float32), np.ones((1, 10, 2), np.float32)
    >>> foveal.linear.gated_delta(x, x, x, -b, b).shape
    (1, 10, 2, 4)
    """
    more = (present, cu_seqlens, return_state, False)
    return _recurrent("gated_delta", (q, k, v), (log_decay, beta), initial_state, more, (scale,))
