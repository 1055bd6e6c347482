"""foveal.attention against its definition in float64: masks, options, strides, dtypes, places for results."""

import numpy as np
import pytest
from support import band, close, random, reference

import foveal


@pytest.mark.parametrize("queries,keys", [(1, 1), (1, 37), (5, 5), (37, 64), (64, 37), (300, 300), (0, 3), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(queries, keys, causal):
    q, k, v = random(2, queries, 4, 16), random(2, keys, 2, 16, seed=1), random(2, keys, 2, 24, seed=2)
    out, lse = foveal.attention(q, k, v, causal=causal, return_lse=True)
    mask = band(queries, keys, None, 0 if causal else None)
    expected, expected_lse = reference(q, k, v, mask=mask)
    close(out, expected, 2e-5)
    close(lse, expected_lse, 2e-5)


@pytest.mark.parametrize(
    "window,behind,ahead", [(1, 0, 0), (7, 6, 0), ((3, 2), 3, 2), ((None, 2), None, 2), ((0, None), 0, None)]
)
def test_windows(window, behind, ahead):
    q, k, v = random(1, 30, 2, 8), random(1, 41, 2, 8, seed=1), random(1, 41, 2, 8, seed=2)
    expected, _ = reference(q, k, v, mask=band(30, 41, behind, ahead))
    close(foveal.attention(q, k, v, window=window), expected, 2e-5)


@pytest.mark.parametrize("shape", [(2, 4, 9, 70), (1, 4, 9, 70), (2, 1, 9, 70), (1, 1, 9, 70), (9, 70), (70,), (2, 1, 1, 70)])
def test_masks_broadcast(shape):
    q, k, v = random(2, 9, 4, 8), random(2, 70, 2, 8, seed=1), random(2, 70, 2, 8, seed=2)
    mask = random(*shape, seed=3) > 0.3
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask[..., 0, :] = False
    expected, lse = reference(q, k, v, mask=np.broadcast_to(mask, (2, 4, 9, 70)) & band(9, 70, None, 0))
    got = foveal.attention(q, k, v, mask=mask, causal=True, return_lse=True)
    close(got[0], expected, 2e-5)
    close(got[1], lse, 2e-5)


def test_terms():
    q, k, v = random(2, 20, 4, 8), random(2, 20, 2, 8, seed=1), random(2, 20, 2, 8, seed=2)
    bias, sinks = random(1, 4, 20, 20, seed=3), random(4, seed=4)
    options = {"scale": 0.7, "softcap": 2.0, "bias": bias, "sinks": sinks}
    expected, lse = reference(q, k, v, mask=band(20, 20, 4, 0), **options)
    got = foveal.attention(q, k, v, window=5, return_lse=True, **options)
    close(got[0], expected, 2e-5)
    close(got[1], lse, 2e-5)


def test_alibi_and_key_lengths():
    q, k, v = random(3, 6, 8, 8), random(3, 6, 8, 8, seed=1), random(3, 6, 8, 8, seed=2)
    slopes = 2.0 ** -np.arange(1, 9, dtype=np.float32)
    distance = np.arange(6)[:, None] - np.arange(6)[None, :]
    bias = -slopes[:, None, None] * distance
    lengths = np.array([6, 3, 0])
    mask = band(6, 6, None, 0) & (np.arange(6) < lengths[:, None])[:, None, None, :]
    expected, _ = reference(q, k, v, mask=mask, bias=bias[None])
    close(foveal.attention(q, k, v, causal=True, alibi=slopes, key_lengths=lengths), expected, 2e-5)
    close(foveal.attention(q, k, v, causal=True, alibi=True, key_lengths=lengths), expected, 2e-5)


def test_any_strides_without_a_copy():
    packed = random(2, 3, 50, 4, 16)
    q, k, v = (packed[:, n] for n in range(3))
    by_heads = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    once = np.broadcast_to(k[:, :, :1], k.shape)
    expected = foveal.attention(*(x.copy() for x in (q, k, v)), causal=True)
    assert np.array_equal(foveal.attention(q, k, v, causal=True), expected)
    assert np.array_equal(foveal.attention(*by_heads, causal=True), expected)
    assert np.array_equal(foveal.attention(q, once, v), foveal.attention(q, once.copy(), v))
    # Read-only arrays are read.
    frozen = q.copy()
    frozen.flags.writeable = False
    assert np.array_equal(foveal.attention(frozen, k, v, causal=True), expected)


def test_half_precision():
    q, k, v = (random(1, 40, 2, 16, seed=n).astype(np.float16) for n in range(3))
    out = foveal.attention(q, k, v, causal=True)
    assert out.dtype == np.float16
    expected, _ = reference(q, k, v, mask=band(40, 40, None, 0))
    close(out, expected, 1e-3)


def test_out_is_written_in_place():
    q, k, v = random(2, 33, 4, 8), random(2, 33, 2, 8, seed=1), random(2, 33, 2, 12, seed=2)
    expected, expected_lse = foveal.attention(q, k, v, causal=True, return_lse=True)
    whole = np.full((2, 4, 33, 12), np.nan, np.float32)
    place = whole.transpose(0, 2, 1, 3)
    out, lse = foveal.attention(q, k, v, causal=True, out=place, return_lse=True)
    assert out is place
    assert np.array_equal(place, expected) and np.array_equal(lse, expected_lse)


def test_same_bits_whatever_the_threads_and_the_batch():
    q, k, v = random(2, 600, 4, 16), random(2, 600, 2, 16, seed=1), random(2, 600, 2, 16, seed=2)
    whole = foveal.attention(q, k, v, causal=True)
    alone = foveal.attention(q[1:], k[1:], v[1:], causal=True)
    assert np.array_equal(whole[1:], alone)
    own = foveal.get_num_threads()
    try:
        for threads in (1, 2):
            foveal.set_num_threads(threads)
            assert foveal.get_num_threads() == threads
            assert np.array_equal(foveal.attention(q, k, v, causal=True), whole)
    finally:
        foveal.set_num_threads(0)
    assert foveal.get_num_threads() == own


def test_the_future_does_not_leak():
    q, k, v = random(1, 70, 2, 8), random(1, 70, 2, 8, seed=1), random(1, 70, 2, 8, seed=2)
    before = foveal.attention(q, k, v, causal=True)
    k[:, 40:], v[:, 40:] = np.nan, np.inf
    assert np.array_equal(foveal.attention(q, k, v, causal=True)[:, :40], before[:, :40])


def test_dropout_is_that_of_its_seed():
    x = random(1, 200, 2, 16)
    a, b, c = (foveal.attention(x, x, x, dropout=0.5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_merging_parts_gives_the_whole():
    q, k, v = random(2, 9, 4, 8), random(2, 50, 2, 8, seed=1), random(2, 50, 2, 8, seed=2)
    whole = foveal.attention(q, k, v, return_lse=True)
    parts = [foveal.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in [(0, 0), (0, 13), (13, 50)]]
    joined = parts[0]
    for part in parts[1:]:
        joined = foveal.merge(*joined, *part)
    close(joined[0], whole[0], 2e-6)
    close(joined[1], whole[1], 2e-6)


def test_rope_turns_products_by_distance():
    q, k = random(1, 30, 2, 16), random(1, 30, 2, 16, seed=1)
    for options in ({}, {"interleaved": True}, {"rotary_dim": 8, "theta": 1e6}):
        a = foveal.rope(q, **options), foveal.rope(k, **options)
        b = (foveal.rope(x, np.arange(1000, 1030), **options) for x in (q, k))
        products = [np.einsum("bthd,bshd->bhts", *pair) for pair in (a, tuple(b))]
        close(products[0], products[1], 1e-4)
    assert np.array_equal(foveal.rope(q, np.zeros(30, np.int32)), q)
