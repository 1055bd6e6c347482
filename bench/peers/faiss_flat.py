"""Exact nearest keys by inner product with faiss's flat index, one thread: the work of a segment of Memorizing Transformers.

    python -m venv V && V/bin/pip install faiss-cpu numpy
    OMP_NUM_THREADS=1 V/bin/python bench/peers/faiss_flat.py
    cargo run --release -p foveal --example memory_speed memorizing

512 queries of each of 8 heads against 65536 entries of their own, k = 32; best of three rounds. The example's time has attention
within the segment and to what was retrieved on top.
"""

import time

import faiss
import numpy

faiss.omp_set_num_threads(1)
print(f"faiss {faiss.__version__}, one thread")
random = numpy.random.default_rng(1)
for dim in (64, 128):

    def unit(count):
        rows = random.standard_normal((count, dim), dtype=numpy.float32)
        return rows / numpy.linalg.norm(rows, axis=1, keepdims=True)

    heads = []
    for _ in range(8):
        index = faiss.IndexFlatIP(dim)
        index.add(unit(65536))
        heads.append((index, unit(512)))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for index, queries in heads:
            index.search(queries, 32)
        best = min(best, time.perf_counter() - start)
    operations = 2 * 8 * 512 * 65536 * dim
    print(f"8 x {dim}: {best * 1e3:.1f} ms, {operations / best / 1e9:.1f} GFLOP/s")
