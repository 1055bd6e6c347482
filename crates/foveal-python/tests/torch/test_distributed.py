"""Sequences shared out over processes: the same as on one, forward and backward; training in parallel."""

import os
import pathlib
import socket
import subprocess
import sys
import weakref

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

import foveal  # noqa: E402
import foveal.torch  # noqa: E402, F401

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "ring.py"


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(rank, world, address):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(address), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)


def end():
    # A group that something still holds goes on with its threads while the interpreter ends, which may abort the process.
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None


def sharded(rank, world, address):
    from foveal.distributed import gather_attention, ring_attention, shard, unshard

    start(rank, world, address)
    tokens = 12 * world
    q = torch.randn(2, tokens, 4, 8)
    k, v, weights = torch.randn(2, tokens, 2, 8), torch.randn(2, tokens, 2, 6), torch.randn(2, tokens, 4, 6)
    for causal in (False, True):
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = foveal.attention(*whole, causal=causal, scale=0.3)
        d = torch.autograd.grad((expected * weights).sum(), whole)
        for balanced in (False, True):
            cut = lambda x, balanced=balanced: shard(x, balanced=balanced)  # noqa: E731
            assert torch.equal(unshard(cut(q), balanced=balanced), q)
            for form in (ring_attention, gather_attention):
                own = [cut(x).requires_grad_() for x in (q, k, v)]
                out = form(*own, causal=causal, balanced=balanced, scale=0.3)
                torch.testing.assert_close(out, cut(expected), atol=3e-6, rtol=1e-5)
                got = torch.autograd.grad((out * cut(weights)).sum(), own)
                for a, b in zip(got, d):
                    torch.testing.assert_close(a, cut(b), atol=2e-5, rtol=1e-4)
                halves = [x.detach().bfloat16().requires_grad_() for x in own]
                half = form(*halves, causal=causal, balanced=balanced, scale=0.3)
                assert half.dtype == torch.bfloat16
                torch.testing.assert_close(half.float(), cut(expected.detach()), atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="multiple"):
        shard(q[:, :5])
    end()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_give_the_whole(world):
    torch.multiprocessing.spawn(sharded, (world, port()), nprocs=world)


def trained(rank, world, address):
    start(rank, world, address)
    from torch.nn.parallel import DistributedDataParallel

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 8).unbind(2)
            return foveal.attention(q, k, v, causal=True).flatten(2)

    layer = Layer()
    parallel = DistributedDataParallel(layer)
    x = torch.randn(2 * world, 10, 16)
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    alone = Layer()
    alone.load_state_dict(layer.state_dict())
    alone(x).square().mean().backward()
    torch.testing.assert_close(layer.project.weight.grad, alone.project.weight.grad, atol=1e-6, rtol=1e-4)
    del parallel
    end()


def test_training_in_parallel():
    torch.multiprocessing.spawn(trained, (2, port()), nprocs=2)


def test_the_example():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={port()}", str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "ring_attention on 2 processes" in done.stdout
