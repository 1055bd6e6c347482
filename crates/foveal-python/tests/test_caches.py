"""Caches: decoded tokens are those of the whole, whatever the store."""

import numpy as np
import pytest
from support import band, close, random, reference

import foveal

Q, K, V = random(1, 300, 4, 64), random(1, 300, 2, 64, seed=1), random(1, 300, 2, 64, seed=2)


def stores():
    yield "float32", foveal.ContiguousCache(2, 64), 2e-5
    yield "float16", foveal.ContiguousCache(2, 64, dtype="float16", capacity=1), 3e-3
    yield "bfloat16", foveal.ContiguousCache(2, 64, dtype="bfloat16"), 3e-2
    yield "paged", foveal.PagePool(2, 64, pages=2).create(), 2e-5
    yield "8 bits", foveal.QuantizedCache(2, 64), 3e-2
    yield "4 bits", foveal.QuantizedCache(2, 64, bits=4), 3e-1


@pytest.mark.parametrize("name,cache,tolerance", [pytest.param(*s, id=s[0]) for s in stores()])
def test_tokens_one_by_one(name, cache, tolerance):
    cache.append(K[:, :290], V[:, :290])
    prompt = foveal.attention_cached(Q[:, :290], [cache])
    rows = [prompt]
    for t in range(290, 300):
        cache.append(K[:, t : t + 1], V[:, t : t + 1])
        rows.append(foveal.attention_cached(Q[:, t : t + 1], [cache], window=100 if t == 299 else None))
    expected, _ = reference(Q, K, V, mask=band(300, 300, None, 0))
    near, _ = reference(Q, K, V, mask=band(300, 300, 99, 0))
    expected[:, 299] = near[:, 299]
    close(np.concatenate(rows, 1), expected, tolerance)
    assert len(cache) == cache.end == 300
    cache.clear()
    assert len(cache) == 0


def test_a_batch_of_ragged_sequences_of_any_kinds():
    caches = [foveal.ContiguousCache(2, 64), foveal.PagePool(2, 64, pages=2).create()]
    for cache, length in zip(caches, (7, 260)):
        cache.append(K[:, :length], V[:, :length])
    q = np.concatenate([Q[:, 6:7], Q[:, 259:260]])
    out, lse = foveal.attention_cached(q, caches, return_lse=True)
    for n, cache in enumerate(caches):
        alone = foveal.attention_cached(q[n : n + 1], [cache])
        assert np.array_equal(out[n : n + 1], alone)
    assert lse.shape == (2, 1, 4)


def test_forks_share_pages_and_go_their_own_ways():
    pool = foveal.PagePool(2, 64, pages=3)
    first = pool.create()
    first.append(K[:, :256], V[:, :256])
    second = first.fork()
    assert pool.free_pages == 2
    second.append(K[:, 256:257], V[:, 256:257])
    first.append(-K[:, 256:257], -V[:, 256:257])
    assert pool.free_pages == 0
    a, b = (foveal.attention_cached(Q[:, 256:257], [cache]) for cache in (first, second))
    assert not np.array_equal(a, b)
    with pytest.raises(ValueError, match="pages"):
        pool.create().append(K, V)
    second.truncate(256)
    assert len(second) == 256
    with pytest.raises(ValueError, match="paged"):
        foveal.ContiguousCache(2, 64)._store.fork(0)


def test_what_does_not_fit_is_refused():
    cache = foveal.ContiguousCache(2, 64)
    with pytest.raises(ValueError):
        cache.append(K[:, :3, :1], V[:, :3, :1])
    with pytest.raises(ValueError, match="one store for each sequence|batch"):
        foveal.attention_cached(np.concatenate([Q, Q])[:, :1], [cache])
    with pytest.raises(TypeError):
        cache.append(K.astype(np.float64), V.astype(np.float64))
    with pytest.raises(ValueError, match="bits"):
        foveal.QuantizedCache(2, 64, bits=3)
    with pytest.raises(ValueError, match="dtype"):
        foveal.ContiguousCache(2, 64, dtype="float64")
    with pytest.raises(ValueError, match="truncate"):
        foveal.QuantizedCache(2, 64)._store.truncate(0)
