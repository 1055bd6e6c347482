#!/usr/bin/env python3
"""Writes the small language model of the Python package glassllm as a GGUF file.

    pip download --no-deps glassllm==0.1.0 && unzip glassllm-0.1.0-py3-none-any.whl
    scripts/convert_glassllm.py glassllm/weights en crates/foveal-lm/tests/assets/glassllm-en.gguf

Needs NumPy. The same input gives the same bytes. Architecture `llama`: grouped-query attention with interleaved RoPE,
SwiGLU, RMSNorm, the embedding tied to the head. Matrices are stored as (in, out) and written as rows of `in` values.

The tokenizer is BPE on characters; GGUF's kind `llama` (SentencePiece by score) gives the same ids when each token has
the score minus its rank and BPE gives back every token as itself: then two neighbours that together are a token are
always the two that BPE merges into it. The script checks that. Not in the file: glassllm brings text to NFC first.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np

SHA256 = {
    "en.npz": "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
    "en.tokenizer.json": "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
    "pt.npz": "597120c1ccf0ba55af6f5aac949be7dbdfbbe7a5f1fc9214473d07f07c580ca2",
    "pt.tokenizer.json": "6e1bc69437adfcbd391d5ffe17d8c75d9931ec2af866992f371d50d272308618",
}
LANGUAGES = {"en": "English", "pt": "Portuguese"}

SPACE = "▁"
SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"]
NORMAL, UNKNOWN, CONTROL = 1, 2, 3

ALIGNMENT = 32
TENSOR_F32, TENSOR_F16 = 0, 1
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SCALARS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}


def read_checked(folder: Path, name: str) -> Path:
    path = folder / name
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{path}: sha256 is {found}, expected {SHA256[name]}")
    return path


def merge_all(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """BPE: the pair of lowest rank first, the leftmost of equals."""
    symbols = list(text)
    while len(symbols) > 1:
        pairs = [(ranks[pair], at) for at, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


def tokenizer(path: Path) -> dict:
    """The metadata of the tokenizer, after a check that scores express its merges."""
    data = json.loads(path.read_text(encoding="utf-8"))
    merges = [tuple(pair) for pair in data["merges"]]
    tokens = SPECIALS + data["alphabet"] + [left + right for left, right in merges]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    if len(set(tokens)) != len(tokens):
        sys.exit("two tokens have the same text")
    if any("\n" in left + right or (SPACE in right and left.strip(SPACE)) for left, right in merges):
        sys.exit("a merge crosses the words that glassllm cuts text into")
    broken = [token for token in tokens[len(SPECIALS) :] if merge_all(token, ranks) != [token]]
    if broken:
        sys.exit(f"BPE does not give back the tokens {broken}")
    plain = len(SPECIALS) + len(data["alphabet"])
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (STRING, tokens),
        "tokenizer.ggml.scores": (F32, [0.0] * plain + [-float(rank + 1) for rank in range(len(merges))]),
        "tokenizer.ggml.token_type": (
            I32,
            [CONTROL, UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(tokens) - len(SPECIALS)),
        ),
        "tokenizer.ggml.padding_token_id": (U32, 0),
        "tokenizer.ggml.unknown_token_id": (U32, 1),
        "tokenizer.ggml.bos_token_id": (U32, 2),
        "tokenizer.ggml.eos_token_id": (U32, 3),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.ggml.add_eos_token": (BOOL, False),
        "tokenizer.ggml.add_space_prefix": (BOOL, False),
    }


def description(language: str, config: dict, ffn: int) -> dict:
    return {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, f"glassllm {language}"),
        "general.author": (STRING, "Oséias Dias de Farias"),
        "general.version": (STRING, "0.1.0"),
        "general.license": (STRING, "mit"),
        "general.source.url": (STRING, "https://github.com/Oseiasdfarias/glassllm"),
        "general.languages": (STRING, [language]),
        "general.file_type": (U32, 1),
        "llama.vocab_size": (U32, config["vocab_size"]),
        "llama.context_length": (U32, config["max_len"]),
        "llama.embedding_length": (U32, config["d_model"]),
        "llama.block_count": (U32, config["n_layers"]),
        "llama.feed_forward_length": (U32, ffn),
        "llama.attention.head_count": (U32, config["n_heads"]),
        "llama.attention.head_count_kv": (U32, config["n_kv_heads"]),
        "llama.attention.layer_norm_rms_epsilon": (F32, config["eps"]),
        "llama.rope.dimension_count": (U32, config["d_model"] // config["n_heads"]),
        "llama.rope.freq_base": (F32, config["rope_base"]),
    }


def tensors(weights: dict[str, np.ndarray], layers: int) -> list[tuple[str, np.ndarray]]:
    """GGUF's names; f16 matrices with one row for each output, f32 norms."""
    out = [("token_embd.weight", weights["E"])]
    matrices = {
        "attn_q": "attn.W_Q",
        "attn_k": "attn.W_K",
        "attn_v": "attn.W_V",
        "attn_output": "attn.W_O",
        "ffn_gate": "ffn.W1",
        "ffn_up": "ffn.W3",
        "ffn_down": "ffn.W2",
    }
    for layer in range(layers):
        here, there = f"blk.{layer}.", f"blocks.{layer}."
        for name, norm in (("attn_norm", "norm1.gamma"), ("ffn_norm", "norm2.gamma")):
            out.append((f"{here}{name}.weight", weights[there + norm].astype(np.float32)))
        for name, matrix in matrices.items():
            out.append((f"{here}{name}.weight", np.ascontiguousarray(weights[there + matrix].T)))
    out.append(("output_norm.weight", weights["norm_f.gamma"].astype(np.float32)))
    return out


def text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def scalar(kind: int, value) -> bytes:
    return text(value) if kind == STRING else struct.pack(SCALARS[kind], value)


def entry(key: str, kind: int, value) -> bytes:
    if isinstance(value, list):
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        return text(key) + head + b"".join(scalar(kind, element) for element in value)
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def padding(size: int) -> bytes:
    return b"\0" * (-size % ALIGNMENT)


def gguf(metadata: dict, arrays: list[tuple[str, np.ndarray]]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(metadata))
    head += b"".join(entry(key, *value) for key, value in metadata.items())
    body = b""
    for name, array in arrays:
        kind = {"float32": TENSOR_F32, "float16": TENSOR_F16}[array.dtype.name]
        axes = array.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, len(body))
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        body += data + padding(len(data))
    return head + padding(len(head)) + body


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[2] not in LANGUAGES:
        sys.exit(__doc__)
    folder, language, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    with np.load(read_checked(folder, f"{language}.npz")) as data:
        config = json.loads(str(data["__config__"]))
        weights = {name: data[name] for name in data.files if name != "__config__"}
    metadata = description(language, config, weights["blocks.0.ffn.W1"].shape[1])
    metadata |= tokenizer(read_checked(folder, f"{language}.tokenizer.json"))
    output.write_bytes(gguf(metadata, tensors(weights, config["n_layers"])))


if __name__ == "__main__":
    main()
