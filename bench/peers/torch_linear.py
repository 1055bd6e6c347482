"""Linear attention in PyTorch next to Foveal's, on one thread, f32.

    target/release/examples/linear_speed has to be built: cargo build --release -p foveal --example linear_speed
    python torch_linear.py [TOKENS] [DIM] [MECHANISM...]      8 heads; 16384 tokens and 64 numbers a head unless told otherwise

Peers: for elu + 1, causal, normalised, the chunked forms that PyTorch's operators allow (sums of chunks by cumsum, or a
loop that carries the state), each with chunks of several lengths; the fastest stands for PyTorch. For the others, the
forms in plain PyTorch that fla-core brings (`fla.ops.*.naive`, read from their files, since importing fla asks for a GPU).
Every form is checked against a loop over tokens in f64 before it is timed. Foveal's program runs before and
after the peers of each mechanism; both sides count their best.

Needs torch, numpy, einops and fla-core (`pip install fla-core einops` next to what setup.sh makes).
"""

import importlib.util
import pathlib
import re
import subprocess
import sys
import sysconfig
import time

import torch
import torch.nn.functional as F

HEADS = 8
CHECKED = 512
ROUNDS = 3
OWN = pathlib.Path(__file__).parents[2] / "target/release/examples/linear_speed"


def naive(name):
    """The plain forms of an operator of fla-core."""
    path = pathlib.Path(sysconfig.get_paths()["purelib"]) / f"fla/ops/{name}/naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mapped(x):
    return F.elu(x) + 1


def whole_chunks(q, k, v, chunk):
    """All chunks at once; states by a cumulative sum. [B, H, T, D]"""
    q, k = mapped(q), mapped(k)
    batch, heads, tokens, dim = q.shape
    cut = lambda x: x.view(batch, heads, tokens // chunk, chunk, dim)
    q, k, v = cut(q), cut(k), cut(v)
    states = (k.transpose(-1, -2) @ v).cumsum(2)
    states = F.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    sums = k.sum(3, keepdim=True).cumsum(2)
    sums = F.pad(sums, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    scores = (q @ k.transpose(-1, -2)).tril()
    out = q @ states + scores @ v
    den = (q * sums).sum(-1, keepdim=True) + scores.sum(-1, keepdim=True) + 1e-6
    return (out / den).view(batch, heads, tokens, dim)


def carried_chunks(q, k, v, chunk):
    """One chunk after the other."""
    q, k = mapped(q), mapped(k)
    batch, heads, tokens, dim = q.shape
    state = q.new_zeros(batch, heads, dim, dim)
    total = q.new_zeros(batch, heads, 1, dim)
    out = []
    for own_q, own_k, own_v in zip(*(x.split(chunk, 2) for x in (q, k, v))):
        scores = (own_q @ own_k.transpose(-1, -2)).tril()
        den = (own_q * total).sum(-1, keepdim=True) + scores.sum(-1, keepdim=True) + 1e-6
        out.append((own_q @ state + scores @ own_v) / den)
        state = state + own_k.transpose(-1, -2) @ own_v
        total = total + own_k.sum(2, keepdim=True)
    return torch.cat(out, 2)


def steps(name, x):
    """The definition, token by token, in f64. All [B, H, T, D]; gates [B, H, T] or [B, H, T, D]."""
    q, k, v, decay, vector, beta = (x[n].double() for n in ("q", "k", "v", "decay", "vector", "beta"))
    tokens, dim = q.shape[2:]
    scale = dim**-0.5
    if name == "linear":
        q, k, scale = mapped(q), mapped(k), 1.0
    state, total, out = torch.zeros(*q.shape[:2], dim, dim, dtype=torch.float64), 0.0, []
    for t in range(tokens):
        if name in ("retention", "scalar_decay", "gated_delta"):
            gate = decay if name != "retention" else retention_decay(q)
            state = state * gate[:, :, t, None, None].exp()
        if name == "gla":
            state = state * vector[:, :, t, :, None].exp()
        write = v[:, :, t]
        if name in ("delta", "gated_delta"):
            write = beta[:, :, t, None] * (write - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * write[:, :, None]
        total = total + k[:, :, t]
        own = torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]) * scale
        if name == "linear":
            own = own / ((q[:, :, t] * total).sum(-1, keepdim=True) + 1e-6)
        out.append(own)
    return torch.stack(out, 2)


def retention_decay(q):
    gamma = 1 - 2.0 ** (-5.0 - torch.arange(q.shape[1], dtype=torch.float64))
    return gamma.log()[None, :, None].expand(q.shape[:3])


def forms():
    """Name of the mechanism → forms: (name, the longest text, function of inputs [B, H, T, D])."""
    linear, simple = naive("linear_attn"), naive("simple_gla")
    gla, delta, gated = naive("gla"), naive("delta_rule"), naive("gated_delta_rule")
    late = lambda *tensors: [x.transpose(1, 2) for x in tensors]
    back = lambda out: (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
    few, all_of = 512, 1 << 20

    def retention(x, length=all_of):
        return simple.naive_chunk_simple_gla(*late(x["q"], x["k"], x["v"], retention_decay(x["q"]).float()))

    chunks = [32, 64, 128, 256]
    torch_forms = [
        (f"torch {form.__name__} {chunk}", all_of, lambda x, form=form, chunk=chunk: form(x["q"], x["k"], x["v"], chunk))
        for form in (whole_chunks, carried_chunks)
        for chunk in chunks
    ]
    unit = lambda x: late(mapped(x["q"]), mapped(x["k"]), x["v"])
    simple_inputs = lambda x: late(x["q"], x["k"], x["v"], x["decay"])
    return {
        "linear": torch_forms
        + [
            ("fla naive_chunk_linear_attn", all_of, lambda x: back(linear.naive_chunk_linear_attn(*unit(x), normalize=True))),
            ("fla naive_recurrent_linear_attn", few, lambda x: back(linear.naive_recurrent_linear_attn(*unit(x), normalize=True))),
        ],
        "retention": [
            ("fla naive_chunk_simple_gla", all_of, lambda x: back(retention(x))),
            ("fla naive_retention", few, lambda x: naive("retention").naive_retention(x["q"], x["k"], x["v"])),
        ],
        "scalar_decay": [
            ("fla naive_chunk_simple_gla", all_of, lambda x: back(simple.naive_chunk_simple_gla(*simple_inputs(x)))),
            ("fla naive_recurrent_simple_gla", few, lambda x: back(simple.naive_recurrent_simple_gla(*simple_inputs(x)))),
        ],
        "gla": [
            ("fla naive_recurrent_gla", few, lambda x: back(gla.naive_recurrent_gla(*late(x["q"], x["k"], x["v"], x["vector"])))),
        ],
        "delta": [
            ("fla delta_rule_chunkwise", all_of, lambda x: delta.delta_rule_chunkwise(x["q"], x["k"], x["v"], x["beta"])[0]),
            ("fla delta_rule_recurrence", few, lambda x: delta.delta_rule_recurrence(x["q"], x["k"], x["v"], x["beta"])[0]),
        ],
        "gated_delta": [
            (
                "fla naive_chunk_gated_delta_rule",
                all_of,
                lambda x: back(
                    gated.naive_chunk_gated_delta_rule(*late(x["q"], x["k"], x["v"]), *late(x["decay"], x["beta"]))
                ),
            ),
            (
                "fla naive_recurrent_gated_delta_rule",
                few,
                lambda x: back(
                    gated.naive_recurrent_gated_delta_rule(*late(x["q"], x["k"], x["v"]), *late(x["beta"], x["decay"]))
                ),
            ),
        ],
    }


def inputs(tokens, dim):
    torch.manual_seed(1)
    rows = lambda: torch.rand(1, HEADS, tokens, dim) * 2 - 1
    return {
        "q": rows(),
        "k": F.normalize(rows(), dim=-1),
        "v": rows(),
        "decay": -0.1 * torch.rand(1, HEADS, tokens),
        "vector": -0.1 * torch.rand(1, HEADS, tokens, dim),
        "beta": torch.rand(1, HEADS, tokens),
    }


def check(name, form, x, expected):
    with torch.no_grad():
        got = form(x).double()
    off = float((got - expected).abs().max() / expected.abs().max())
    if not off < 1e-4:
        sys.exit(f"{name} is wrong: off by {off}")


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(form, x):
    """Best seconds of forward, and of forward and backward; none where gradients do not go through."""

    def forward():
        with torch.no_grad():
            form(x)

    best = min(seconds(forward) for _ in range(ROUNDS))
    leaves = {name: tensor.clone().requires_grad_(name in "qkv") for name, tensor in x.items()}
    try:
        both = min(seconds(lambda: form(leaves).sum().backward()) for _ in range(ROUNDS - 1))
    except RuntimeError:
        both = None
    return best, both


def own(name, tokens, dim):
    """Foveal's Mtok/s a head: forward, forward and backward."""
    text = subprocess.run([OWN, str(tokens), str(dim), name], check=True, capture_output=True, text=True).stdout
    found = re.search(rf"^\| {name} \| ([\d.]+) \| [\d.]+ % \| ([\d.]+) \|", text, re.M)
    return tuple(map(float, found.groups()))


def main():
    numbers = [int(x) for x in sys.argv[1:] if x.isdigit()]
    names = [x for x in sys.argv[1:] if not x.isdigit()]
    tokens, dim = numbers + [16384, 64][len(numbers) :]
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {tokens} tokens, {HEADS} heads of {dim}", flush=True)
    small = inputs(CHECKED, dim)
    for name, all_forms in forms().items():
        if names and name not in names:
            continue
        expected, rows, best = steps(name, small), [], own(name, tokens, dim)
        for form_name, longest, form in all_forms:
            check(form_name, form, small, expected)
            length = min(tokens, longest)
            forward, both = timed(form, inputs(length, dim))
            rate = lambda time: length * HEADS / time / 1e6 if time else 0.0
            rows.append((form_name, length, rate(forward), rate(both)))
        best = tuple(map(max, best, own(name, tokens, dim)))
        print(f"\n{name}: Foveal {best[0]:.2f} forward, {best[1]:.2f} with gradients (Mtok/s a head)")
        for form_name, length, forward, both in rows:
            times = [f"{own / rate:.1f} x" if rate else "-" for own, rate in zip(best, (forward, both))]
            print(f"  {form_name}, {length} tokens: {forward:.4f} {both:.4f}; Foveal is {times[0]}, {times[1]}", flush=True)


if __name__ == "__main__":
    main()
