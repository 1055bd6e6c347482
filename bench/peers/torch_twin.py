"""The same training run twice: `foveal train`, and transformers' Llama with PyTorch's AdamW.

Both begin with one model file and see the same bytes in the same order, at the same learning rates. Prints the losses of some steps, the
largest difference, and the seconds of a step (medians). Needs torch, transformers and safetensors; see setup.sh.

    python torch_twin.py target/release/foveal TEXT [--steps 200] [--threads 1] [--precision f32] [--sequence 256] …
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

MASK = (1 << 64) - 1


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class Order:
    """The sequences of an epoch, as crates/foveal-lm/src/train/data.rs has them."""

    def __init__(self, run, epoch, tokens, sequence):
        seed = mix(run)
        for x in (1, epoch, 0):
            seed = mix(seed ^ mix(x))
        self.state = seed
        self.first = self.below(sequence)
        count = (tokens - 1 - self.first) // sequence
        self.order = list(range(count))
        for last in range(1, count)[::-1]:
            other = self.below(last + 1)
            self.order[last], self.order[other] = self.order[other], self.order[last]

    def below(self, n):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        return (mix(self.state) * n) >> 64


def batches(text, sequence, batch, run=1):
    epoch = 0
    places = []
    while True:
        rows = []
        while len(rows) < batch:
            if not places:
                order = Order(run, epoch, len(text), sequence)
                places = [order.first + n * sequence for n in order.order]
                epoch += 1
            start = places.pop(0)
            rows.append(text[start : start + sequence + 1])
        yield torch.tensor(rows)


def rate(step, steps, last=0.1):
    warmup = steps // 20
    if step < warmup:
        return (step + 1) / warmup
    way = (step - warmup) / max(steps - warmup, 1)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(way, 1)))


def twin(arguments, model, text):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    losses, seconds = [], []
    for step, rows in zip(range(arguments.steps), batches(text, arguments.sequence, arguments.batch)):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
            logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * rate(step, arguments.steps)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return losses, seconds


def ours(arguments, folder, text):
    settings = {
        "model.from": folder / "model",
        "data.train": json.dumps([str(text)]),
        "data.tokenizer": "bytes",
        "data.validation_share": 0,
        "data.sequence": arguments.sequence,
        "data.batch": arguments.batch,
        "optimizer.learning_rate": arguments.rate,
        "schedule.steps": arguments.steps,
        "train.precision": arguments.precision,
        "train.evaluate_every": 0,
        "train.checkpoint_every": 0,
    }
    command = [arguments.foveal, "train", "--out", folder / "run", "--threads", str(arguments.threads)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    # Without a file the command has settings of its own, all of which count for the twin too but these.
    empty = folder / "empty.toml"
    empty.write_text("")
    command.insert(2, empty)
    subprocess.run(command, check=True, capture_output=True)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records], [record["seconds"] for record in records]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("foveal", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    arguments.foveal = arguments.foveal.resolve()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        max_position_embeddings=arguments.sequence,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=256,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model.save_pretrained(folder / "model")
        mine, my_seconds = ours(arguments, folder, arguments.text.resolve())
    model.train()
    theirs, their_seconds = twin(arguments, model, list(arguments.text.read_bytes()))
    print("step  foveal    torch     difference")
    for step in sorted({1, 10, 50, 200, arguments.steps}):
        if step <= arguments.steps:
            a, b = mine[step - 1], theirs[step - 1]
            print(f"{step:4}  {a:.6f}  {b:.6f}  {abs(a - b):.2e}")
    print(f"largest difference of {arguments.steps} steps: {max(abs(a - b) for a, b in zip(mine, theirs)):.2e}")
    a, b = statistics.median(my_seconds), statistics.median(their_seconds)
    print(f"seconds a step (medians): foveal {a:.4f}, torch {b:.4f}, ratio {a / b:.3f}")


if __name__ == "__main__":
    main()
