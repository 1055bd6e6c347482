"""States: a sequence in pieces, and token by token, against the whole."""

import numpy as np
import pytest
from support import close, random

import foveal

T, H, D = 40, 4, 8
NAMES = ("sparse_transformer", "lsh", "moba", "native_sparse", "infini", "memorizing")


def call(name):
    """A mechanism as a function of a span of tokens, and which one of its group it is."""
    q, k, v = random(1, T, H, D), random(1, T, 2, D, seed=1), random(1, T, 2, D, seed=2)
    gates = 1 / (1 + np.exp(-random(1, T, H, 3, seed=3)))
    head = random(H, seed=4)
    near = random(1, T, 2, D, seed=5), random(1, T, 2, D, seed=6)
    sparse, memory = foveal.sparse, foveal.memory
    qkv = lambda at: (q[:, at], k[:, at], v[:, at])  # noqa: E731
    lengths = {"length": 4, "stride": 2, "block": 4, "top": 3, "window": 5}
    calls = {
        "sparse_transformer": lambda at, **s: sparse.sparse_transformer(*qkv(at), pattern="fixed", stride=6, width=2, **s),
        "lsh": lambda at, **s: sparse.lsh(q[:, at], v.repeat(2, 2)[:, at], chunk=5, buckets=4, apart=True, scale=0.5, **s),
        "moba": lambda at, **s: sparse.moba(*qkv(at), block=8, top=2, **s),
        "native_sparse": lambda at, **s: sparse.native_sparse(
            *qkv(at), gates[:, at], near=(near[0][:, at], near[1][:, at]), **lengths, **s
        ),
        "infini": lambda at, **s: memory.infini(*qkv(at), head, segment=6, **s),
        "memorizing": lambda at, **s: memory.memorizing(*qkv(at), head, 1 + head**2, segment=6, top=3, **s),
    }
    return calls[name]


def run(function, cuts):
    state = foveal.State()
    parts = [function(slice(a, b), state=state) for a, b in zip(cuts, cuts[1:])]
    assert len(state) == T
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_pieces_gives_the_same_bits(name):
    function = call(name)
    whole = run(function, [0, T])
    assert np.array_equal(run(function, [0, 7, 24, 38, T]), whole)
    close(whole, function(slice(0, T)), 2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_are_generated(name):
    function = call(name)
    close(run(function, [0, 9, *range(10, T + 1)]), function(slice(0, T)), 3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_change_nothing(name):
    function = call(name)
    state = foveal.State()
    first = function(slice(0, 23), state=state)
    function(slice(23, T), state=state)
    assert np.array_equal(first, function(slice(0, 23), state=foveal.State()))


def test_states_are_of_one_mechanism_with_its_options():
    x, state = random(1, 10, 2, 8), foveal.State()
    foveal.sparse.moba(x, x, x, block=4, state=state)
    with pytest.raises(ValueError, match="other options"):
        foveal.sparse.moba(x, x, x, block=5, state=state)
    with pytest.raises(ValueError, match="moba"):
        foveal.sparse.sparse_transformer(x, x, x, state=state)
    half = x.astype(np.float16)
    with pytest.raises(ValueError, match="dtype"):
        foveal.sparse.moba(half, half, half, block=4, state=state)
    with pytest.raises(ValueError):
        foveal.sparse.moba(x, x[:, :, :, :4], x, block=4, state=state)
    assert len(state) == 10
    state.clear()
    foveal.sparse.sparse_transformer(x, x, x, state=state)
    assert len(state) == 10
    two = random(2, 10, 2, 8)
    with pytest.raises(ValueError):
        foveal.sparse.moba(two, two, two, state=foveal.State())
    with pytest.raises(ValueError, match="chunks"):
        foveal.sparse.lsh(x, x, state=foveal.State())
    memory = np.zeros((1, 2, 8, 8), np.float32), np.zeros((1, 2, 8), np.float32)
    with pytest.raises(ValueError, match="memory"):
        foveal.memory.infini(x, x, x, np.zeros(2, np.float32), segment=4, memory=memory, state=foveal.State())


def test_a_memory_goes_with_the_state():
    x, gate, state = random(1, 20, 2, 8), np.zeros(2, np.float32), foveal.State()
    for piece in (slice(0, 5), slice(5, 20)):
        part = x[:, piece]
        _, memory = foveal.memory.infini(part, part, part, gate, segment=8, return_memory=True, state=state)
    _, expected = foveal.memory.infini(x, x, x, gate, segment=8, return_memory=True)
    assert all(np.array_equal(a, b) for a, b in zip(memory, expected))


def test_the_index_of_a_memory():
    tokens = 300
    q, k, v = (random(1, tokens, 2, 8, seed=n) for n in range(3))
    head = np.ones(2, np.float32)
    options = {"segment": 50, "top": 4}
    exact = foveal.memory.memorizing(q, k, v, head, head, **options)
    every = foveal.memory.memorizing(q, k, v, head, head, index=(4, 4), **options)
    assert np.array_equal(every, exact)  # All lists are searched.
    few = foveal.memory.memorizing(q, k, v, head, head, index=(4, 1), **options)
    # Lists begin with 128 remembered tokens, those of the third segment.
    assert np.array_equal(few[:, :150], exact[:, :150]) and not np.array_equal(few, exact)
    with pytest.raises(ValueError, match="lists"):
        foveal.memory.memorizing(q, k, v, head, head, index=(4, 5), **options)
