"""Attention over a sequence on several processes equals that on one, forward and backward.

    torchrun --nproc-per-node 2 examples/ring.py
"""

import torch
import torch.distributed as dist

from foveal import attention
from foveal.distributed import gather_attention, ring_attention, shard, unshard


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
    torch.manual_seed(0)
    tokens = 256 * dist.get_world_size()
    q = torch.randn(1, tokens, 8, 64)
    k, v = torch.randn(1, tokens, 2, 64), torch.randn(1, tokens, 2, 64)
    weights = torch.randn(1, tokens, 8, 64)

    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attention(*whole, causal=True)
    (expected * weights).sum().backward()

    for form in (ring_attention, gather_attention):
        own = [shard(x).requires_grad_() for x in (q, k, v)]
        out = form(*own, causal=True)
        (out * shard(weights)).sum().backward()
        errors = [(unshard(out) - expected).abs().max().item()]
        errors += [(unshard(x.grad) - y.grad).abs().max().item() for x, y in zip(own, whole)]
        if dist.get_rank() == 0:
            words = ", ".join(f"{name} {error:.1e}" for name, error in zip(("out", "dq", "dk", "dv"), errors))
            print(f"{form.__name__} on {dist.get_world_size()} processes, largest differences: {words}")
        assert max(errors) < 1e-4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
