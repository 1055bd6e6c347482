"""Many Python threads at once."""

import os
import threading

import numpy as np
import pytest
from support import random

import foveal


def test_eight_threads_at_once_get_their_own_results():
    inputs = [[random(1, 150 + 10 * n, 4, 16, seed=3 * n + m) for m in range(3)] for n in range(8)]
    expected = [foveal.attention(*x, causal=True) for x in inputs]
    failures = []
    start = threading.Barrier(8)

    def work(n):
        start.wait()
        for _ in range(20):
            if not np.array_equal(foveal.attention(*inputs[n], causal=True), expected[n]):
                failures.append(n)
            foveal.linear.retention(*inputs[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_cache_belongs_to_one_call_at_a_time():
    cache = foveal.ContiguousCache(kv_heads=2, dim=64)
    kv = random(1, 4000, 2, 64)
    cache.append(kv, kv)
    q = random(1, 2000, 4, 64)
    refused, done = [], threading.Event()

    def append():
        while not done.is_set():
            try:
                cache.append(kv[:, :1], kv[:, :1])
            except RuntimeError as error:
                refused.append(str(error))

    thread = threading.Thread(target=append)
    thread.start()
    for _ in range(5):
        try:
            foveal.attention_cached(q, [cache], generated=False)
        except RuntimeError as error:
            refused.append(str(error))
    done.set()
    thread.join()
    assert all("in use by another thread" in words for words in refused)
    assert len(cache) >= 4000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_goes_on_alone():
    x = random(1, 700, 4, 16)
    expected = foveal.attention(x, x, x)
    child = os.fork()
    if child == 0:
        same = np.array_equal(foveal.attention(x, x, x), expected)
        os._exit(0 if same and foveal.get_num_threads() == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
