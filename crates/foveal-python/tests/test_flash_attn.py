"""flash-attn's functions with flash-attn's meaning."""

import numpy as np
import pytest
from support import band, close, random, reference

import foveal


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (5, 2), (0, 0), (-1, 4)])
@pytest.mark.parametrize("queries,keys", [(20, 20), (9, 20), (20, 9)])
def test_windows_exclude_the_own_position(causal, window, queries, keys):
    q, k, v = random(2, queries, 4, 16), random(2, keys, 2, 16, seed=1), random(2, keys, 2, 16, seed=2)
    behind, ahead = (None if side < 0 else side for side in window)
    mask = band(queries, keys, behind, 0 if causal else ahead)
    expected, lse = reference(q, k, v, mask=mask)
    out, got_lse, nothing = foveal.flash_attn_func(
        q, k, v, causal=causal, window_size=window, return_attn_probs=True
    )
    assert nothing is None
    close(out, expected, 2e-5)
    close(got_lse, lse.transpose(0, 2, 1), 2e-5)


def test_a_window_may_be_an_array():
    q, k, v = random(1, 9, 2, 16), random(1, 9, 2, 16, seed=1), random(1, 9, 2, 16, seed=2)
    out = foveal.flash_attn_func(q, k, v, window_size=np.array([3, 1]))
    np.testing.assert_array_equal(out, foveal.flash_attn_func(q, k, v, window_size=(3, 1)))


def test_softcap_scale_and_slopes():
    q, k, v = random(2, 12, 4, 16), random(2, 12, 4, 16, seed=1), random(2, 12, 4, 16, seed=2)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    distance = np.arange(12)[:, None] - np.arange(12)[None, :]
    bias = (-slopes[:, None, None] * distance)[None]
    options = {"scale": 0.3, "softcap": 3.0, "bias": bias}
    expected, _ = reference(q, k, v, mask=band(12, 12, None, 0), **options)
    for given in (slopes, slopes[None]):
        out = foveal.flash_attn_func(q, k, v, softmax_scale=0.3, softcap=3.0, causal=True, alibi_slopes=given)
        close(out, expected, 2e-5)
    with pytest.raises(ValueError, match="alibi_slopes"):
        foveal.flash_attn_func(q, k, v, alibi_slopes=np.stack([slopes, slopes]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 0)])
def test_packed_sequences_are_sequences(causal, window):
    lengths_q, lengths_k = [3, 0, 7, 1], [5, 2, 7, 4]
    cu_q, cu_k = (np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k))
    q, k, v = random(11, 4, 8), random(18, 2, 8, seed=1), random(18, 2, 8, seed=2)
    out, lse, _ = foveal.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), causal=causal, window_size=window, return_attn_probs=True
    )
    assert out.shape == q.shape and lse.shape == (4, 11)
    for n in range(4):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone, own, _ = foveal.flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], causal=causal, window_size=window, return_attn_probs=True
        )
        close(out[rows], alone[0], 2e-6)
        close(lse[:, rows], own[0], 2e-6)


def test_packed_arguments_are_checked():
    q = random(4, 2, 8)
    with pytest.raises(ValueError, match="document starts"):
        foveal.flash_attn_varlen_func(q, q, q, np.array([0, 3, 2]), np.array([0, 3, 4]))
    with pytest.raises(ValueError, match="packed"):
        foveal.flash_attn_varlen_func(q[None], q, q, np.array([0, 4]), np.array([0, 4]))
    with pytest.raises(TypeError, match="int32 or int64"):
        foveal.flash_attn_varlen_func(q, q, q, np.array([0.0, 4.0]), np.array([0.0, 4.0]))
