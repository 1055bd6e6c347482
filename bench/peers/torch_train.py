"""A training step of a Llama-like decoder in PyTorch on the CPU, as the peer of the example `train_speed`.

The model is the one of that example: RMSNorm, rotary positions (halves), scaled_dot_product_attention, SwiGLU, an untied
head, cross-entropy over all tokens, fused AdamW; f32, or bf16 by autocast. Prints one JSON line a length: the least and the
median time of a step in milliseconds, with its forward, backward and optimizer parts, the resident set at its peak above
the level after imports, and the losses of the first steps.

    python torch_train.py --threads 2 --steps 5 --lengths 256,2048,8192 [--bf16] [--compile] [--weights FOLDER]
"""

import argparse
import json
import resource
import statistics
import time

import torch
import torch.nn.functional as F

WIDTH, LAYERS, HEADS, INNER, VOCAB = 256, 4, 4, 1024, 4096
EPSILON = 1e-5


def resident_mib():
    """The largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return F.rms_norm(x, (WIDTH,), self.weight, EPSILON)


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"]:
            setattr(self, name, torch.nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x, cos, sin):
        batch, seq, _ = x.shape
        split = lambda x: x.view(batch, seq, HEADS, -1).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        q, k = rotated(q, cos, sin).to(v.dtype), rotated(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, WIDTH))


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = torch.nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = torch.nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = torch.nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Attention(), FeedForward()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(torch.nn.Module):
    """Its parameters have the names of a Llama model's safetensors, but for the prefix `model.`."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCAB, WIDTH)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = Norm()
        self.lm_head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets, cos, sin):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCAB).float(), targets.view(-1))


def rotations(seq):
    frequencies = 10000.0 ** (-torch.arange(0, WIDTH // HEADS, 2).double() / (WIDTH // HEADS))
    angles = torch.outer(torch.arange(seq).double(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def batch_of(step, batch, seq):
    """The example's tokens: linear congruential, the target of each the next."""
    count = batch * (seq + 1)
    state, tokens = (step * 2654435761 + 12345) % 2**32, []
    for _ in range(count):
        state = (state * 1664525 + 1013904223) % 2**32
        tokens.append((state >> 8) % VOCAB)
    tokens = torch.tensor(tokens).view(batch, seq + 1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def load(model, folder):
    """Takes the numbers of a folder's model.safetensors."""
    from safetensors.torch import load_file

    stored = {name.removeprefix("model."): x for name, x in load_file(f"{folder}/model.safetensors").items()}
    model.load_state_dict(stored)


def measure(seq, options, base):
    torch.manual_seed(1)
    model = Model()
    if options.weights:
        load(model, options.weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if options.compile else model
    batch = max(options.tokens // seq, 1)
    cos, sin = rotations(seq)
    times, losses = [], []
    for step in range(options.steps + 2):
        tokens, targets = batch_of(step, batch, seq)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
            loss = forward(tokens, targets, cos, sin)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = time.perf_counter()
        losses.append(loss.item())
        if step >= 2:
            times.append([1000 * (b - a) for a, b in [(start, done), (start, middle), (middle, end), (end, done)]])
    least = min(times)
    print(
        json.dumps(
            {
                "length": seq,
                "batch": batch,
                "threads": options.threads,
                "dtype": "bf16" if options.bf16 else "f32",
                "ms": [round(x, 1) for x in least],
                "median_ms": round(statistics.median(t[0] for t in times), 1),
                "peak_mib": round(resident_mib() - base),
                "losses": [round(x, 5) for x in losses[:5]],
            }
        ),
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step, at least one text")
    parser.add_argument("--lengths", default="256,2048,8192")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--weights", help="a folder with model.safetensors to begin with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = resident_mib()
    for seq in map(int, options.lengths.split(",")):
        measure(seq, options, base)


if __name__ == "__main__":
    main()
