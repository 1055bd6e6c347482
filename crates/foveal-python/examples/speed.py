"""Speed next to PyTorch's, side by side with the same threads: alternating rounds, best of each and median of ratios.

    python crates/foveal-python/examples/speed.py [calls] [attention] [prefill] [prefill_bf16] [window] [training] [linear] [memory]

``memory`` is the peak of processes of their own, after and beside what the model itself takes.
"""

import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import foveal
import foveal.torch


def compare(name, own, other, rounds=7, least=0.02):
    """Times two functions in turn; both have run once before."""
    own(), other()
    times = []
    for function in (own, other):
        start = time.perf_counter()
        if least:
            function()
        times.append(max(1, int(least / (time.perf_counter() - start))))
    samples = ([], [])
    for _ in range(rounds):
        for function, list_, count in zip((own, other), samples, times):
            start = time.perf_counter()
            for _ in range(count):
                function()
            list_.append((time.perf_counter() - start) / count)
    best = [min(s) for s in samples]
    ratio = statistics.median(b / a for a, b in zip(*samples))
    unit, factor = ("µs", 1e6) if best[0] < 1e-3 else ("ms", 1e3)
    print(f"{name:58} {best[0] * factor:9.2f} {unit} {best[1] * factor:9.2f} {unit}   {best[1] / best[0]:5.2f} [{ratio:5.2f}]", flush=True)
    return best[1] / best[0]


def calls():
    a = np.zeros((1, 1, 8, 64), np.float32)
    t = torch.zeros(1, 1, 8, 64)
    y = torch.zeros(1, 8, 1, 64)
    with torch.no_grad():
        sdpa = lambda: F.scaled_dot_product_attention(y, y, y)  # noqa: E731
        compare("one token, 8 heads of 64: attention(NumPy)", lambda: foveal.attention(a, a, a), sdpa)
        compare("one token: attention(tensors), no grad", lambda: foveal.attention(t, t, t), sdpa)
        compare("one token: foveal.torch.scaled_dot_product_attention", lambda: foveal.torch.scaled_dot_product_attention(y, y, y), sdpa)
    g, h = t.clone().requires_grad_(), y.clone().requires_grad_()
    compare("one token, gradients recorded", lambda: foveal.attention(g, g, g), lambda: F.scaled_dot_product_attention(h, h, h))


def attention():
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            ratios = []
            for n, heads in ((128, 8), (512, 8), (2048, 4), (4096, 2)):
                for causal in (False, True):
                    x = [torch.randn(1, heads, n, 64, dtype=dtype, requires_grad=backward) for _ in range(3)]
                    d = torch.randn(1, heads, n, 64, dtype=dtype)

                    def step(function):
                        out = function(*x, is_causal=causal)
                        if backward:
                            torch.autograd.grad(out, x, d)

                    name = f"{'training step' if backward else 'forward'}, {str(dtype)[6:]}, N {n}, {heads} heads, {'causal' if causal else 'full'}"
                    own = lambda: step(foveal.torch.scaled_dot_product_attention)  # noqa: E731
                    ratios.append(compare(name, own, lambda: step(F.scaled_dot_product_attention)))
            print(f"geometric mean: {statistics.geometric_mean(ratios):.2f}\n")


def model(implementation, dtype, window=None, layers=30):
    """A model of SmolLM2-135M's shape with random weights, or the same with a sliding window."""
    import transformers

    import foveal.hf  # noqa: F401

    small = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    }
    torch.manual_seed(0)
    kind = transformers.LlamaConfig if window is None else transformers.MistralConfig
    more = {} if window is None else {"sliding_window": window}
    config = kind(**small, num_hidden_layers=layers, **more)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return made.to(dtype).eval()


def prompt(made, length):
    with torch.no_grad():
        made(torch.randint(0, 49152, (1, length)), logits_to_keep=1, use_cache=False)


def step(made, length):
    tokens = torch.randint(0, 49152, (1, length))
    made.zero_grad()
    made(tokens, labels=tokens, use_cache=False).loss.backward()


# Name, what is done, tokens, dtype, window, layers.
CASES = {
    "prefill": ("SmolLM2's shape, 30 layers, prompt of 4096, f32", prompt, 4096, torch.float32, None, 30),
    "prefill_bf16": ("SmolLM2's shape, 30 layers, prompt of 4096, bf16", prompt, 4096, torch.bfloat16, None, 30),
    "window": ("window of 512, 6 layers, prompt of 8192, f32", prompt, 8192, torch.float32, 512, 6),
    "training": ("training step, 6 layers, 2048 tokens, f32", step, 2048, torch.float32, None, 6),
}


def case(name):
    words, run, length, dtype, window, layers = CASES[name]
    pair = [model(i, dtype, window, layers).train(run is step) for i in ("foveal", "sdpa")]
    compare(words, *(lambda m=m: run(m, length) for m in pair), rounds=3, least=0)


def memory():
    for name, (words, *_) in CASES.items():
        peaks = []
        for implementation in ("foveal", "sdpa"):
            command = [sys.executable, __file__, "peak", name, implementation]
            peaks.append([int(n) for n in subprocess.check_output(command, text=True).split()])
        for (before, peak), whose in zip(peaks, ("ours", "sdpa's")):
            print(f"{words:52} {whose:6} {peak >> 10:6} MiB, {(peak - before) >> 10} above the model", flush=True)


def peak(name, implementation):
    _, run, length, dtype, window, layers = CASES[name]
    made = model(implementation, dtype, window, layers).train(run is step)
    run(made, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(made, length)
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def plain(family, name):
    """A plain form of flash-linear-attention, in PyTorch's operators."""
    import importlib

    return getattr(importlib.import_module(f"fla.ops.{family}.naive"), name)


def linear():
    from transformers.models.qwen3_next import modeling_qwen3_next as home

    rule = home.torch_chunk_gated_delta_rule
    rule = getattr(rule, "__wrapped__", rule)
    q, k, v = (torch.randn(1, 2048, 8, 64) for _ in range(3))
    k = F.normalize(k, dim=-1)
    g, beta, decay = -torch.rand(1, 2048, 8), torch.rand(1, 2048, 8), -torch.rand(1, 2048, 8, 64)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    linear, by_heads = foveal.linear, beta.transpose(1, 2)
    retention, delta = (lambda: linear.retention(q, k, v)), (lambda: linear.delta(q, k, v, beta))
    scalar, gated = (lambda: linear.scalar_decay(q, k, v, g)), (lambda: linear.gated_delta(q, k, v, g, beta))
    rows = (
        ("linear, fla's chunks", lambda: linear.linear(q, k, v, feature_map="identity", epsilon=None), "linear_attn", "naive_chunk_linear_attn", (q, k, v)),
        ("retention, fla's squares", retention, "retention", "naive_retention", heads),
        ("scalar decay, fla's chunks", scalar, "simple_gla", "naive_chunk_simple_gla", (q, k, v, g)),
        ("scalar decay, fla's steps", scalar, "simple_gla", "naive_recurrent_simple_gla", (q, k, v, g)),
        ("gla, fla's steps", lambda: linear.gla(q, k, v, decay), "gla", "naive_recurrent_gla", (q, k, v, decay)),
        ("delta, fla's chunks", delta, "delta_rule", "delta_rule_chunkwise", (*heads, by_heads)),
        ("delta, fla's steps", delta, "delta_rule", "delta_rule_recurrence", (*heads, by_heads)),
        ("gated delta, fla's chunks", gated, "gated_delta_rule", "naive_chunk_gated_delta_rule", (q, k, v, g, beta)),
        ("gated delta, fla's steps", gated, "gated_delta_rule", "naive_recurrent_gated_delta_rule", (q, k, v, beta, g)),
    )
    print("2048 tokens, 8 heads of 64, f32")
    with torch.no_grad():
        compare("gated delta, Transformers' chunks", gated, lambda: rule(q, k, v, g, beta), rounds=5)
        for name, own, family, form, given in rows:
            other = plain(family, form)
            compare(name, own, lambda other=other, given=given: other(*given), rounds=3)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(*sys.argv[2:])
        sys.exit()
    chosen = sys.argv[1:] or ["calls", "attention", *CASES, "linear", "memory"]
    print(f"{torch.get_num_threads()} threads; ours, PyTorch's, PyTorch ÷ ours: best ÷ best [median]")
    for name in chosen:
        case(name) if name in CASES else globals()[name]()
