#!/usr/bin/env python3
"""What other means make of the held-out texts, in bits a byte: gzip, xz and brotli, and an interpolated 5-gram.

    models/novels/baselines.py TOKENIZER.json [TEXTS]      # TEXTS: what prepare.py made, usually target/novels

Needs `brotli` and `tokenizers` from PyPI. Compressors are primed: counted is what the held-out text adds to the
compressed training text (gzip looks back 32 KiB only, and is not). The 5-gram counts the model's own tokens and is smoothed
as Kneser and Ney have it, interpolated, with one discount for each order from the counts of counts (n1 / (n1 + 2 n2)).
"""

import collections
import gzip
import lzma
import math
import pathlib
import sys

import brotli
import tokenizers

HERE = pathlib.Path(__file__).resolve().parent
ORDER = 5


def read(folder: pathlib.Path) -> list[str]:
    return [path.read_text("utf-8") for path in sorted(folder.iterdir())]


def xz(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return len(lzma.compress(data, filters=filters))


def brotlied(data: bytes) -> int:
    return len(brotli.compress(data, quality=11, lgwin=24))


class KneserNey:
    """p(w | h) = max(c(hw) - d, 0) / c(h) + d · kinds(h) / c(h) · p(w | h without its first), counts below the highest order being of the
    different tokens that come before; uniform at the end."""

    def __init__(self, texts: list[list[int]], vocab: int):
        self.vocab = vocab
        counts = [collections.Counter() for _ in range(ORDER + 1)]
        for text in texts:
            for n in range(1, ORDER + 1):
                counts[n].update(zip(*(text[k:] for k in range(n))))
        self.orders = []
        for n in range(1, ORDER + 1):
            if n == ORDER:
                own = counts[n]
            else:
                own = collections.Counter(gram[1:] for gram in counts[n + 1])
            sums, kinds = collections.Counter(), collections.Counter()
            for gram, count in own.items():
                sums[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            once = sum(count == 1 for count in own.values())
            twice = sum(count == 2 for count in own.values())
            self.orders.append((own, sums, kinds, once / (once + 2 * twice)))

    def probability(self, history: tuple[int, ...], token: int) -> float:
        p = 1 / self.vocab
        for n, (own, sums, kinds, discount) in enumerate(self.orders):
            if n > len(history):
                break
            before = history[len(history) - n :]
            total = sums[before]
            if total:
                p = (max(own[before + (token,)] - discount, 0) + discount * kinds[before] * p) / total
        return p

    def bits(self, text: list[int]) -> float:
        steps = range(1, len(text))
        return -sum(math.log2(self.probability(tuple(text[max(0, i - ORDER + 1) : i]), text[i])) for i in steps)


def main() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    folder = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else HERE.parents[1] / "target/novels"
    train = read(folder / "train")
    data = "".join(train).encode("utf-8")
    grams = KneserNey([tokenizer.encode(text).ids for text in train], tokenizer.get_vocab_size())
    primed = {"xz": (xz, xz(data)), "brotli": (brotlied, brotlied(data))}
    print("| text | gzip | xz | brotli | 5-gram |\n|---|---|---|---|---|")
    for part in ("validation", "test"):
        texts = read(folder / part)
        held = "".join(texts).encode("utf-8")
        found = [len(gzip.compress(held, 9))]
        found += [size(data + held) - before for size, before in primed.values()]
        bits = [8 * size / len(held) for size in found]
        bits.append(sum(grams.bits(tokenizer.encode(text).ids) for text in texts) / len(held))
        print(f"| {part} | " + " | ".join(f"{x:.3f}" for x in bits) + " |", flush=True)


if __name__ == "__main__":
    main()
