"""GGUF files that Foveal has converted, opened by llama.cpp: whether both continue texts with the same tokens.

pip install xllamacpp; python3 scripts/check_llama_cpp.py target/release/foveal [MODEL.gguf] [--steps 300] [-n 48]

A small model is trained on the built-in novel and written as it is, and with grouped keys and values; so is MODEL (of the Llama
architecture, SmolLM2 for instance), with one key/value head. Matrices, keys, values and activations are f32 on both sides,
tokens greedy. Fails where a text differs.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import xllamacpp

PROMPTS = ["Catherine was", "She had never ", "\"I do not understand you,\" said ", "The morning of the 12th;\n\n"]


def foveal(program: str, *arguments: object) -> str:
    """What the command prints."""
    done = subprocess.run([program, *map(str, arguments)], check=True, capture_output=True)
    return done.stdout.decode(errors="replace")


def models(program: str, folder: Path, model: str | None, steps: int) -> dict[str, Path]:
    """The files to compare, by what they are."""
    run = folder / "run"
    foveal(program, "train", "--out", run, "--set", f"schedule.steps={steps}")
    files = {"trained": folder / "trained.gguf", "trained, 2 key/value heads": folder / "grouped.gguf"}
    foveal(program, "quantize", run, files["trained"], "--type", "F32")
    grouped = ("--attention", "gqa", "--kv-heads", 2, "--type", "F32")
    foveal(program, "convert", run, files["trained, 2 key/value heads"], *grouped)
    if model:
        name = f"{Path(model).stem}, 1 key/value head"
        files[name] = folder / "mqa.gguf"
        foveal(program, "convert", model, files[name], "--attention", "mqa", "--type", "F32")
    return files


def theirs(file: Path, count: int) -> list[str]:
    """llama.cpp's texts."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 512, 1, False, 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(parameters)
    texts = []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "top_k": 1, "seed": 1}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        texts.append(answer["choices"][0]["text"])
    return texts


def ours(program: str, file: Path, count: int) -> list[str]:
    """Foveal's texts."""
    exact = ("--temperature", 0, "--activations", "f32", "--kv-cache", "f32", "-n", count)
    return [foveal(program, "generate", "--model", file, *exact, prompt) for prompt in PROMPTS]


def main() -> None:
    """Compares, and says what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("foveal")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("-n", type=int, default=48)
    given = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, file in models(given.foveal, Path(folder), given.model, given.steps).items():
            for prompt, own, other in zip(PROMPTS, ours(given.foveal, file, given.n), theirs(file, given.n)):
                own = own.removeprefix(prompt)
                # The command ends its text with a line break.
                same = own.rstrip("\n") == other.rstrip("\n")
                different += not same
                print(f"{name}: {'same' if same else 'DIFFERENT'}: {prompt!r} -> {other!r}", flush=True)
                if not same:
                    print(f"    ours: {own!r}", flush=True)
    if different:
        raise SystemExit(f"{different} texts differ")


if __name__ == "__main__":
    main()
