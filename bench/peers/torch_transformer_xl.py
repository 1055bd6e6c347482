"""Transformer-XL's attention as its authors released it for PyTorch (kimiyoung/transformer-xl, RelPartialLearnableMultiHeadAttn),
from queries, keys and values on, one thread.

    python bench/peers/torch_transformer_xl.py
    cargo run --release -p foveal --example relative_speed

AC and BD are products over all keys, BD is shifted by padding and reshaping, masked, and goes through softmax. D 64, 8 heads, segments
over memories as in the example; best of seven rounds. "forward + backward" is autograd's pass as well.
"""

import math
import time

import torch

torch.set_num_threads(1)
HEADS, DIM = 8, 64


def rel_shift(x):
    q, k, heads = x.shape
    padded = torch.cat([torch.zeros((q, 1, heads)), x], dim=1).view(k + 1, q, heads)
    return padded[1:].view_as(x)


def attention(q, k, v, r, u, w, mask):
    ac = torch.einsum("ind,jnd->ijn", q + u, k)
    bd = rel_shift(torch.einsum("ind,jnd->ijn", q + w, r))
    score = (ac + bd) / math.sqrt(DIM)
    score = score.masked_fill(mask[:, :, None], float("-inf"))
    return torch.einsum("ijn,jnd->ind", torch.softmax(score, dim=1), v)


def best(call):
    call()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


print(f"PyTorch {torch.__version__}, one thread: segment + memory, forward, forward + backward")
for segment, memory in [(128, 128), (512, 512), (2048, 0), (512, 1600), (128, 3800)]:
    keys = segment + memory
    make = lambda *shape: torch.randn(*shape, requires_grad=True)
    q, k, v, r = make(segment, HEADS, DIM), make(keys, HEADS, DIM), make(keys, HEADS, DIM), make(keys, HEADS, DIM)
    u, w = make(HEADS, DIM), make(HEADS, DIM)
    mask = torch.ones(segment, keys, dtype=torch.bool).triu(1 + memory)
    with torch.no_grad():
        forward = best(lambda: attention(q, k, v, r, u, w, mask))
    upstream = torch.randn(segment, HEADS, DIM)
    both = best(lambda: attention(q, k, v, r, u, w, mask).backward(upstream))
    print(f"{segment:5} + {memory:5}  {forward:8.2f} ms  {both:8.2f} ms", flush=True)
