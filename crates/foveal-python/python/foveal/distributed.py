"""Attention over a sequence that is shared out over processes (``torch.distributed``, gloo).

```text
ring     keys and values go round; each process joins what it sees of them: o = Σ_n e^(L_n − L) o_n,  L = log Σ_n e^(L_n)
gather   keys and values of all processes are gathered first
backward of a part, run with the joined o and L, is exact; gradients of keys and values go round with them
```

Balanced placement: the sequence is cut into 2W pieces, and process r of W holds pieces r and 2W − 1 − r, so that all have
the same work under a causal mask. ``shard`` cuts a sequence so, ``unshard`` puts it together. Memory of the ring is two
shards of keys and values a process; messages travel while kernels run. Liu et al. 2023, arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import foveal
from foveal import _native
from foveal.torch import _share_threads

__all__ = ["gather_attention", "ring_attention", "shard", "unshard"]


def _pieces(rank: int, world: int, balanced: bool) -> list[int]:
    """Which pieces of the sequence a process holds, in order."""
    return [rank, 2 * world - 1 - rank] if balanced else [rank]


def _world(group: Any) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def shard(x: Tensor, *, balanced: bool = True, group: Any = None) -> Tensor:
    """This process's share of a whole sequence ``[B, T, ...]``; T is a multiple of the processes (twice that, balanced)."""
    rank, world = _world(group)
    count = 2 * world if balanced else world
    if x.shape[1] % count:
        raise ValueError(f"{x.shape[1]} tokens on {world} processes: expected a multiple of {count}")
    chunks = x.chunk(count, 1)
    return torch.cat([chunks[n] for n in _pieces(rank, world, balanced)], 1)


def unshard(x: Tensor, *, balanced: bool = True, group: Any = None) -> Tensor:
    """The whole sequence, on every process, from shares ``[B, T / W, ...]``."""
    _, world = _world(group)
    shares = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(shares, x.detach().contiguous(), group=group)
    pieces: list[Any] = [None] * (2 * world if balanced else world)
    for rank, share in enumerate(shares):
        own = _pieces(rank, world, balanced)
        for n, piece in zip(own, share.chunk(len(own), 1)):
            pieces[n] = piece
    return torch.cat(pieces, 1)


def _parts(mine: int, theirs: int, world: int, how: tuple[bool, bool]) -> Iterator[tuple[int, int, bool]]:
    """Which of this process's pieces see which of another's, and whether only what is before them."""
    causal, balanced = how
    for i, a in enumerate(_pieces(mine, world, balanced)):
        for j, b in enumerate(_pieces(theirs, world, balanced)):
            if not causal or b <= a:
                yield i, j, causal and a == b


def _options(diagonal: bool, scale: float | None) -> tuple[Any, ...]:
    return (None, 0 if diagonal else None, scale, None, False, 0.0, 0, False, True)


_NOTHING = (None,) * 10


class _Rotation:
    """Tensors that go to the next process while this one computes."""

    def __init__(self, tensors: list[Tensor], group: Any) -> None:
        rank, world = _world(group)
        to, source = ((rank + step) % world for step in (1, -1))
        if group is not None:
            to, source = (dist.get_global_rank(group, n) for n in (to, source))
        self.sent = [x.contiguous() for x in tensors]
        self.got = [torch.empty_like(x) for x in self.sent]
        operations = [dist.P2POp(dist.isend, x, to, group) for x in self.sent]
        operations += [dist.P2POp(dist.irecv, x, source, group) for x in self.got]
        self.requests = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        return self.got


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: tuple[bool, bool], scale: float | None, group: Any) -> Tensor:
        rank, world = _world(group)
        count = len(_pieces(rank, world, how[1]))
        _share_threads()
        rows = q.contiguous().chunk(count, 1)
        joined: list[Any] = [None] * count
        held = [k, v]
        for step in range(world):
            rotation = _Rotation(held, group) if step + 1 < world else None
            keys, values = (x.chunk(count, 1) for x in held)
            for i, j, diagonal in _parts(rank, (rank - step) % world, world, how):
                arrays = (rows[i], keys[j], values[j], *_NOTHING)
                part = _native.forward("attention", arrays, _options(diagonal, scale))
                # Parts are joined in float32, and rounded once.
                part = (part[0].float(), part[1])
                joined[i] = part if joined[i] is None else foveal.merge(*joined[i], *part)
            held = rotation.wait() if rotation else held
        out = torch.cat([x[0] for x in joined], 1).to(q.dtype)
        lse = torch.cat([x[1] for x in joined], 1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how, ctx.scale, ctx.group = how, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        rank, world = _world(ctx.group)
        count = len(_pieces(rank, world, ctx.how[1]))
        cut = lambda x: [y.contiguous() for y in x.chunk(count, 1)]  # noqa: E731
        rows, outs, lses, d_outs = (cut(x) for x in (q, out, lse, d_out))
        d_q = [torch.zeros_like(x, dtype=torch.float32) for x in rows]
        held = [k, v]
        d_held = [torch.zeros(x.shape) for x in held]
        _share_threads()
        for step in range(world):
            rotation = _Rotation(held, ctx.group) if step + 1 < world else None
            keys, values = (x.chunk(count, 1) for x in held)
            d_keys, d_values = (x.chunk(count, 1) for x in d_held)
            for i, j, diagonal in _parts(rank, (rank - step) % world, world, ctx.how):
                arrays = (rows[i], keys[j], values[j], *_NOTHING)
                d = _native.backward(
                    "attention", arrays, (outs[i], lses[i]), (d_outs[i], None), _options(diagonal, ctx.scale)
                )
                for to, own in zip((d_q[i], d_keys[j], d_values[j]), d):
                    to += own
            held = rotation.wait() if rotation else held
            # Gradients follow their keys and values, and are home after the last step.
            d_held = _Rotation(d_held, ctx.group).wait() if world > 1 else d_held
        d_k, d_v = (x.to(k.dtype) for x in d_held)
        return torch.cat(d_q, 1).to(q.dtype), d_k, d_v, None, None, None


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    balanced: bool = True,
    scale: float | None = None,
    group: Any = None,
) -> Tensor:
    """Attention of this process's queries ``[B, T / W, H, D]`` to the keys and values of all, which go round.

    Every process of the group calls it with shares of one length (``shard``); gives this process's share. With gradients.
    """
    return _Ring.apply(q, k, v, (causal, balanced), scale, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, balanced: bool, group: Any) -> Tensor:
        ctx.balanced, ctx.group = balanced, group
        return unshard(x, balanced=balanced, group=group)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        whole = d.float().contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return shard(whole, balanced=ctx.balanced, group=ctx.group).to(d.dtype), None, None


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    balanced: bool = True,
    scale: float | None = None,
    group: Any = None,
) -> Tensor:
    """The same by gathering keys and values of all processes first: one message instead of W − 1, and memory for all of
    them. For short sequences and few key/value heads."""
    rank, world = _world(group)
    keys, values = (_Gather.apply(x, balanced, group) for x in (k, v))
    own = _pieces(rank, world, balanced)
    outs = []
    for n, rows in zip(own, q.chunk(len(own), 1)):
        end = (n + 1) * rows.shape[1] if causal else keys.shape[1]
        outs.append(foveal.attention(rows, keys[:, :end], values[:, :end], causal=causal, scale=scale))
    return torch.cat(outs, 1)
