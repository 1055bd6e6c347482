"""Pictures: the numbers behind them, and the pictures where matplotlib is installed."""

import numpy as np
import pytest
from support import band, random

import foveal


def test_weights_are_those_of_the_definition():
    q, k = random(2, 9, 4, 8), random(2, 12, 2, 8, seed=1)
    weights = foveal.plot.weights_of(foveal.attention, q, k, causal=True)
    assert weights.shape == (2, 4, 9, 12)
    assert np.allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.array_equal(weights[0, 0] > 0, band(9, 12, None, 0)[0, 0])


def test_pictures():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = foveal.plot.pattern(foveal.sparse.sparse_transformer, 24, stride=6)
    seen = np.asarray(ax.images[0].get_array())
    assert seen.shape == (24, 24) and seen[20, 14] and not seen[20, 12] and not seen[3, 4]
    q = random(1, 8, 2, 4)
    assert foveal.plot.weights(foveal.exact.full, q, q, head=1).images
