#!/usr/bin/env python3
"""Makes the golden vectors of MoBA and Native Sparse Attention: definitions in f64, row by row.

    scripts/golden_sparse.py OUT [--fla FOLDER] [--moba FILE]

Writes one safetensors file a case and prints the lines of the manifest. With --fla, the folder of an unpacked
`fla-core` wheel, and --moba, the authors' `moba_naive.py`, both are run as well and have to agree.
Needs PyTorch (gradients are autograd's, in f64), NumPy, safetensors, and einops for the check.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import pathlib
import sys
import types

import torch
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)
LOSS = "sum(out*d_out)"
TOLERANCE = {
    "metric": "max|a-b| <= tol*(1+max|b|) per tensor",
    "f64": 1e-11,
    "f32": 2e-05,
    "reason": "f64 reference; only summation order differs. f32: a few dozen ulp of the largest term in sums of this length",
}


def best(scores, count):
    """The places of the `count` largest scores, the earlier one among equals, and how much they stand out."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    chosen, rest = order[:count], order[count:]
    gap = scores[chosen[-1]] - scores[rest[0]] if chosen and rest else math.inf
    return chosen, gap


def attend(q, k, v, scale):
    """One row's output and log-sum-exp."""
    if len(k) == 0:
        return torch.zeros(v.shape[-1]), torch.tensor(-math.inf)
    logits = scale * (k @ q)
    return torch.softmax(logits, 0) @ v, torch.logsumexp(logits, 0)


def rows(q, k):
    """Every row: sequence, query head, key/value head, query, position."""
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                yield b, h, h * kv_heads // heads, i, i + keys - queries


def moba(q, k, v, block, top):
    """Output, log-sum-exp, the earlier blocks that each row chose, and the smallest gap at a cut."""
    scale = q.shape[-1] ** -0.5
    out, lse, choices, gap = {}, {}, {}, math.inf
    for b, h, g, i, p in rows(q, k):
        own = max(p, 0) // block
        means = [k[b, n * block : (n + 1) * block, g].mean(0) for n in range(own)]
        chosen, own_gap = best([float(mean @ q[b, i, h]) for mean in means], top - 1)
        gap = min(gap, own_gap)
        seen = [j for j in range(p + 1) if j // block == own or j // block in chosen]
        out[b, h, i], lse[b, h, i] = attend(q[b, i, h], k[b, seen, g], v[b, seen, g], scale)
        choices[b, h, i] = chosen + [-1] * (top - 1 - len(chosen))
    return stack(out, q), stack(lse, q), ints(choices, q.shape[2], q), gap


def native(q, kv, gates, sizes):
    """Output, the blocks that each group's rows chose besides those that all see, and the smallest gap at a cut."""
    length, stride, block, top, window = sizes
    scale = q.shape[-1] ** -0.5
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = kv
    group = q.shape[2] // k_slc.shape[2]
    out, choices, gap = {}, {}, math.inf
    for b, h, g, i, p in rows(q, k_slc):
        whole = max(0, (p + 1 - length) // stride + 1) if p + 1 >= length else 0
        compressed, _ = attend(q[b, i, h], k_cmp[b, :whole, g], v_cmp[b, :whole, g], scale)
        own = max(p, 0) // block
        if h % group == 0:
            weights = torch.zeros(whole)
            for member in range(h, h + group):
                if whole:
                    weights += torch.softmax(scale * (k_cmp[b, :whole, g] @ q[b, i, member]), 0).detach()
            candidates = list(range(1, max(own - 1, 1)))
            overlap = [
                [block // stride * n + m - o for m in range(block // stride) for o in range(length // stride)]
                for n in candidates
            ]
            scores = [sum(float(weights[x]) for x in places if 0 <= x < whole) for places in overlap]
            picked, own_gap = best(scores, top - 3)
            gap = min(gap, own_gap)
            chosen = [candidates[n] for n in picked]
            choices[b, g, i] = chosen + [-1] * (top - 3 - len(chosen))
        blocks = {0, own - 1, own} | {n for n in choices[b, g, i] if n >= 0}
        seen = [j for j in range(p + 1) if j // block in blocks]
        selected, _ = attend(q[b, i, h], k_slc[b, seen, g], v_slc[b, seen, g], scale)
        near = slice(max(p + 1 - window, 0), max(p + 1, 0))
        local, _ = attend(q[b, i, h], k_win[b, near, g], v_win[b, near, g], scale)
        parts = torch.stack([compressed, selected, local])
        out[b, h, i] = gates[b, i, h] @ parts
    return stack(out, q), ints(choices, k_slc.shape[2], q), gap


def stack(values, q):
    batch, queries, heads, _ = q.shape
    return torch.stack(
        [torch.stack([torch.stack([values[b, h, i] for h in range(heads)]) for i in range(queries)]) for b in range(batch)]
    )


def ints(values, choosers, q):
    return torch.tensor(
        [[[values[b, h, i] for i in range(q.shape[1])] for h in range(choosers)] for b in range(q.shape[0])], dtype=torch.int64
    )


def draw(seed, shapes):
    torch.manual_seed(seed)
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def gradients(out, d_out, tensors):
    (out * d_out).sum().backward()
    return {f"grad.{name}": x.grad for name, x in tensors.items()}


def moba_case(name, seed, shape, block, top):
    batch, queries, keys, heads, kv_heads, dim, value_dim = shape
    tensors = draw(
        seed,
        {
            "q": (batch, queries, heads, dim),
            "k": (batch, keys, kv_heads, dim),
            "v": (batch, keys, kv_heads, value_dim),
        },
    )
    out, lse, choices, gap = moba(*tensors.values(), block, top)
    d_out = torch.randn(out.shape)
    results = {"out": out, "lse": lse} | gradients(out, d_out, tensors)
    options = {"scale": dim**-0.5, "block": block, "top": top, "gap_at_the_cut": gap, "loss": LOSS}
    return name, "moba", options, tensors | {"d_out": d_out, "choices": choices} | results


def native_case(name, seed, shape, sizes, pooled):
    batch, queries, keys, heads, kv_heads, dim, value_dim = shape
    length, stride, block, top, window = sizes
    count = max(0, (keys - length) // stride + 1) if keys >= length else 0
    shapes = {"q": (batch, queries, heads, dim)}
    for branch, seq in ("cmp", count), ("slc", keys), ("win", keys):
        if pooled and branch != "slc":
            continue
        shapes |= {f"k_{branch}": (batch, seq, kv_heads, dim), f"v_{branch}": (batch, seq, kv_heads, value_dim)}
    tensors = draw(seed, shapes)
    if pooled:
        for x in "kv":
            whole = tensors[f"{x}_slc"]
            pool = torch.stack([whole[:, n * stride : n * stride + length].mean(1) for n in range(count)], 1)
            tensors[f"{x}_cmp"] = pool.detach().requires_grad_()
            tensors[f"{x}_win"] = whole.detach().clone().requires_grad_()
    tensors["gates"] = torch.rand(batch, queries, heads, 3).requires_grad_()
    kv = [(tensors[f"k_{branch}"], tensors[f"v_{branch}"]) for branch in ("cmp", "slc", "win")]
    out, choices, gap = native(tensors["q"], kv, tensors["gates"], sizes)
    d_out = torch.randn(out.shape)
    results = {"out": out} | gradients(out, d_out, tensors)
    names = ["length", "stride", "block", "top", "window"]
    options = {"scale": dim**-0.5} | dict(zip(names, sizes)) | {"gap_at_the_cut": gap, "loss": LOSS}
    return name, "native_sparse", options, tensors | {"d_out": d_out, "choices": choices} | results


def check_moba(module, case):
    _, _, options, x = case
    heads = x["q"].shape[2]
    k, v = (x[name].repeat_interleave(heads // x[name].shape[2], 2) for name in "kv")
    error = 0.0
    for b in range(len(x["q"])):
        ends = torch.tensor([0, x["q"].shape[1]])
        out = module.moba_attn_varlen_naive(
            x["q"][b], k[b], v[b], ends, x["q"].shape[1], options["block"], options["top"]
        )
        error = max(error, float((out - x["out"][b]).abs().max()))
    return error


def check_native(module, case):
    _, _, options, x = case
    block, scale = options["block"], options["scale"]
    counts = options["top"]
    # The package also pools the last block that is not whole; no row sees that.
    k_cmp = torch.cat([x["k_cmp"], x["k_cmp"][:, :1]], 1)
    picked = module.naive_nsa_topk(x["q"], k_cmp, counts, block, scale)
    for b, i, g in ((b, i, g) for b in range(picked.shape[0]) for i in range(picked.shape[1]) for g in range(picked.shape[2])):
        own = i // block
        ours = {0, max(own - 1, 0), own} | {int(n) for n in x["choices"][b, g, i] if n >= 0}
        theirs = {int(n) for n in picked[b, i, g] if n >= 0}
        assert ours == theirs, (b, i, g, ours, theirs)
    cmp, _ = module.naive_nsa_compression(x["q"], x["k_cmp"], x["v_cmp"], block, scale)
    slc = module.naive_nsa_selection(x["q"], x["k_slc"], x["v_slc"], picked, block, scale)
    group = x["q"].shape[2] // x["k_win"].shape[2]
    q, k, v = (t.transpose(1, 2) for t in (x["q"], *(x[n].repeat_interleave(group, 2) for n in ("k_win", "v_win"))))
    near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - options["window"])
    win = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scale).transpose(1, 2)
    out = sum(g[..., None] * o for g, o in zip(x["gates"].unbind(-1), (cmp, slc, win)))
    return float((out - x["out"]).abs().max())


def load(path, stubs=()):
    for name, members in stubs:
        sys.modules[name] = module = types.ModuleType(name)
        module.__dict__.update(members)
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, case, cross_check, source):
    name, mechanism, options, tensors = case
    if math.isinf(options["gap_at_the_cut"]):
        options["gap_at_the_cut"] = None
    data = {n: x.detach().contiguous() for n, x in tensors.items()}
    path = folder / f"{name}.safetensors"
    save_file(data, path)
    raw = path.read_bytes()

    def axes(n, x):
        if n == "choices":
            return "batch,choosers,queries,blocks"
        return "batch,seq,heads" if x.dim() == 3 else "batch,seq,heads,dim"

    def role(n):
        known = {"d_out": "upstream_grad", "choices": "aux", "out": "output", "lse": "output"}
        return "grad" if n.startswith("grad.") else known.get(n, "input")

    entry = {
        "name": name,
        "file": path.name,
        "mechanism": mechanism,
        "options": options,
        "tensors": {
            n: {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "axes": axes(n, x), "role": role(n)}
            for n, x in data.items()
        },
        "source": source,
        "cross_check": cross_check,
        "exact_outputs": [n for n in data if role(n) in ("output", "grad")],
        "tolerance": TOLERANCE,
        "bytes": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    print("  " + json.dumps(entry, ensure_ascii=False) + ",")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--fla", type=pathlib.Path)
    parser.add_argument("--moba", type=pathlib.Path)
    arguments = parser.parse_args()
    # The packages cast to f32; here they stay in f64.
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    authors = load(arguments.moba) if arguments.moba else None
    fla = None
    if arguments.fla:
        stubs = [("fla.ops.utils", {"prepare_chunk_offsets": None}), ("fla.ops.utils.pooling", {"mean_pooling": None})]
        fla = load(arguments.fla / "fla/ops/nsa/naive.py", stubs)
    source = "independent f64 definition of scripts/golden_sparse.py, from"
    # Sequences, queries, keys, heads, key/value heads, dim, dim of values.
    for case, self_attention in [
        (moba_case("moba_grouped", 1, (2, 37, 37, 4, 2, 8, 8), 6, 3), True),
        (moba_case("moba_top_1", 2, (1, 20, 20, 1, 1, 5, 5), 4, 1), True),
        (moba_case("moba_fewer_queries", 3, (1, 9, 30, 2, 2, 6, 4), 4, 4), False),
    ]:
        check = "none"
        if authors and self_attention:
            error = check_moba(authors, case)
            assert error < 1e-12, (case[0], error)
            check = f"the authors' moba_naive.py, casts to f32 lifted, {error:.1e}"
        write(arguments.out, case, check, f"{source} MoBA (arXiv 2502.13189)")
    # Tokens of a compressed one, their distance, tokens of a block, blocks, window.
    for case, pooled in [
        (native_case("native_sparse_pooled", 4, (2, 41, 41, 4, 2, 6, 6), (4, 4, 4, 5, 6), True), True),
        (native_case("native_sparse_overlapping", 5, (1, 45, 45, 4, 1, 6, 4), (8, 2, 4, 5, 7), False), False),
        (native_case("native_sparse_fewer_queries", 6, (1, 7, 40, 2, 2, 5, 3), (4, 2, 8, 4, 3), False), False),
    ]:
        check = "none"
        if fla and pooled:
            error = check_native(fla, case)
            assert error < 1e-12, (case[0], error)
            check = f"fla-core's naive selection, compression and choice, casts to f32 lifted, {error:.1e}"
        write(arguments.out, case, check, f"{source} Native Sparse Attention (arXiv 2502.11089)")


if __name__ == "__main__":
    main()
