#!/usr/bin/env python3
"""Sparse attention next to PyTorch and Hugging Face on the CPU: one thread, taking turns, best of the rounds.

    PYTHON bench/peers/sparse_layers.py target/release/examples/sparse_peer [--rounds 5] [--tokens 1024,4096,16384] [--only NAME] [--case NAME]

`sdpa`  scaled_dot_product_attention under the dense mask of the pattern, made beforehand: fixed, strided, window; one head of 64
`flex`  flex_attention, compiled, with the pattern's block mask: forward alone (PyTorch has no backward of it on CPUs)
`hf`    the self-attention layers of Longformer and BigBird, 8 heads of 64; their projections are in their time, and PyTorch's
        time for the same projections is added to ours; then both without that time

The peer's result is compared with ours first, but for BigBird, which draws random blocks of its own. Needs the environment that
bench/peers/setup.sh makes, transformers in it, and `cargo build --release -p foveal --example sparse_peer`.
"""

import argparse
import math
import pathlib
import subprocess
import tempfile
import time

import torch

DIM = 64


def mask(case, n):
    """The pattern's pairs, as the papers define them."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    stride = math.ceil(math.sqrt(n))
    seen = {
        "fixed": lambda: (i // stride == j // stride) | (j % stride >= stride - 8),
        "strided": lambda: (i - j <= stride) | ((i - j) % stride == 0),
        "window": lambda: i - j < 512,
    }[case]()
    return seen & (j <= i)


def mask_mod(case, n):
    stride = math.ceil(math.sqrt(n))
    return {
        "fixed": lambda b, h, i, j: ((i // stride == j // stride) | (j % stride >= stride - 8)) & (j <= i),
        "strided": lambda b, h, i, j: ((i - j <= stride) | ((i - j) % stride == 0)) & (j <= i),
        "window": lambda b, h, i, j: (i - j < 512) & (j <= i),
    }[case]


class Ours:
    """Our process, with its inputs in a folder."""

    def __init__(self, binary, case, tensors):
        self.folder = tempfile.TemporaryDirectory()
        tokens, heads = tensors["q"].shape[:2]
        for name, x in tensors.items():
            x.detach().contiguous().numpy().tofile(pathlib.Path(self.folder.name, name))
        command = [binary, case, str(tokens), str(heads), self.folder.name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def result(self, name, shape):
        return torch.from_file(str(pathlib.Path(self.folder.name, name)), size=math.prod(shape)).view(shape)

    def times(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [float(x) for x in self.process.stdout.readline().split()]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def draw(heads, n, names):
    return {name: torch.randn(n, heads, DIM) for name in names}


def timed(work):
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def compare(name, ours, theirs):
    worst = (ours - theirs).abs().max().item() / (1 + theirs.abs().max().item())
    assert worst < 1e-4, f"{name} differs: {worst}"


def rounds(count, ours, theirs):
    """The least of each side's times, taking turns."""
    best = [[math.inf] * 2, [math.inf] * 2]
    for _ in range(count):
        for side, times in enumerate((ours(), theirs())):
            best[side] = [min(a, b) for a, b in zip(best[side], times)]
    return best


def show(case, peer, n, best):
    ours, theirs = best
    cells = []
    for a, b in zip(ours, theirs):
        cells.append(f"{a * 1e3:.1f}, {b * 1e3:.1f}, {b / a:.1f}" if math.isfinite(b) else f"{a * 1e3:.1f}, –")
    print(f"| {case} | {peer} | {n} | {cells[0]} | {cells[1]} |", flush=True)


def sdpa(binary, case, n, count):
    x = draw(1, n, ["q", "k", "v", "d_out"])
    ours = Ours(binary, case, x)
    q, k, v = (x[name].transpose(0, 1)[None].contiguous().requires_grad_() for name in "qkv")
    d_out, seen = x["d_out"].transpose(0, 1)[None].contiguous(), mask(case, n)

    def theirs():
        out, forward = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        gradients, backward = timed(lambda: torch.autograd.grad(out, (q, k, v), d_out))
        theirs.last = out, gradients
        return forward, backward

    theirs()
    out, gradients = theirs.last
    for name, tensor in zip(["out", "d_q", "d_k", "d_v"], (out, *gradients)):
        compare(name, ours.result(name, (n, 1, DIM)), tensor[0].transpose(0, 1).detach())
    show(case, "SDPA", n, rounds(count, ours.times, theirs))
    ours.close()


def flex(binary, case, n, count):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x = draw(1, n, ["q", "k", "v", "d_out"])
    ours = Ours(binary, case, x)
    q, k, v = (x[name].transpose(0, 1)[None].contiguous() for name in "qkv")
    blocks = create_block_mask(mask_mod(case, n), None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention)
    with torch.no_grad():
        out = compiled(q, k, v, block_mask=blocks)
        compare("out", ours.result("out", (n, 1, DIM)), out[0].transpose(0, 1))

        def theirs():
            return timed(lambda: compiled(q, k, v, block_mask=blocks))[1], math.inf

        show(case, "FlexAttention", n, rounds(count, ours.times, theirs))
    ours.close()


def layer(name, n):
    """The layer, how it is called, and its projections."""
    if name == "longformer":
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        config = LongformerConfig(
            hidden_size=512, num_attention_heads=8, attention_window=[512], attention_probs_dropout_prob=0.0
        )
        module = LongformerSelfAttention(config, 0)
        is_global = torch.zeros(1, n, dtype=torch.bool)
        is_global[0, [g * n // 4 for g in range(4)]] = True
        options = {
            "attention_mask": torch.where(is_global, 10000.0, 0.0),
            "is_index_masked": torch.zeros(1, n, dtype=torch.bool),
            "is_index_global_attn": is_global,
            "is_global_attn": True,
        }
        names = ["query", "key", "value", "query_global", "key_global", "value_global"]
        return module, options, [getattr(module, name) for name in names]
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=512, num_attention_heads=8, block_size=64, num_random_blocks=3, max_position_embeddings=max(n, 4096)
    )
    module = BigBirdBlockSparseAttention(config, seed=1)
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, n), 64)
    options = {
        "band_mask": band,
        "from_mask": from_mask,
        "to_mask": to_mask,
        "from_blocked_mask": blocked,
        "to_blocked_mask": blocked,
    }
    return module, options, [module.query, module.key, module.value]


def hugging_face(binary, case, n, count):
    module, options, projections = layer(case, n)
    hidden = torch.randn(1, n, 512).requires_grad_()
    d_out = torch.randn(1, n, 512)
    heads = [projection(hidden).detach()[0].view(n, 8, DIM) for projection in projections]
    names = ["q", "k", "v", "qg", "kg", "vg"]
    x = dict(zip(names, heads)) | {"d_out": d_out[0].view(n, 8, DIM)}
    ours = Ours(binary, case, x)
    leaves = [hidden, *module.parameters()]
    upstream = [torch.randn(1, n, 512) for _ in projections]

    def theirs():
        out, forward = timed(lambda: module(hidden, **options)[0])
        out = out.reshape(1, n, 512)
        theirs.out = out.detach()
        return forward, timed(lambda: torch.autograd.grad(out, leaves, d_out))[1]

    def projected():
        """What the projections alone take."""
        outs, forward = timed(lambda: [projection(hidden) for projection in projections])
        return forward, timed(lambda: torch.autograd.grad(outs, leaves, upstream))[1]

    best = {name: [math.inf] * 2 for name in ("ours", "projections")}

    def with_projections():
        parts = {"ours": ours.times(), "projections": projected()}
        for name, times in parts.items():
            best[name] = [min(a, b) for a, b in zip(best[name], times)]
        return [a + b for a, b in zip(*parts.values())]

    theirs()
    if case == "longformer":
        compare("out", ours.result("out", (n, 8, DIM)), theirs.out[0].view(n, 8, DIM))
    whole = rounds(count, with_projections, theirs)
    show(case, "Hugging Face, with projections", n, whole)
    # What is left of their time without the projections.
    rest = [a - b for a, b in zip(whole[1], best["projections"])]
    show(case, "Hugging Face, without", n, [best["ours"], rest])
    ours.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", default="1024,4096,16384")
    parser.add_argument("--only", choices=["sdpa", "flex", "hf"])
    parser.add_argument("--case")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, best of {arguments.rounds}; ours, peer in ms, peer ÷ ours\n")
    print("| pattern | peer | N | forward | backward |\n|---|---|---|---|---|")
    for n in map(int, arguments.tokens.split(",")):
        for peer, run, cases in [
            ("sdpa", sdpa, ["fixed", "strided", "window"]),
            ("flex", flex, ["fixed", "strided", "window"]),
            ("hf", hugging_face, ["longformer", "bigbird"]),
        ]:
            if arguments.only not in (None, peer):
                continue
            for case in (case for case in cases if arguments.case in (None, case)):
                try:
                    run(arguments.binary, case, n, arguments.rounds)
                except (RuntimeError, AssertionError, NotImplementedError) as error:
                    print(f"| {case} | {peer} | {n} | failed: {str(error).splitlines()[0][:120]} | |", flush=True)


if __name__ == "__main__":
    main()
