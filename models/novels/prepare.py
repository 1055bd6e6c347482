#!/usr/bin/env python3
"""Unpacks the novels and cuts them into what the built-in model learns from, what it is chosen by, and what it is judged by.

    models/novels/prepare.py [OUT]      # usually target/novels

OUT/train         six novels without every twentieth chapter: all that training and the tokenizer see
OUT/validation    those chapters: what choices are made by
OUT/test          Northanger Abbey, whole, which the commands have built in: looked at when everything is chosen
OUT/words.txt     the words of OUT/train, in small letters

Lines of a paragraph become one line; an empty line stays between paragraphs.
"""

import lzma
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEST = ROOT / "crates/foveal-cli/assets/northanger-abbey.txt"
CHAPTER = re.compile(r"^(?:CHAPTER|Chapter) .*$", re.MULTILINE)
WORD = re.compile(r"[a-z]+")
# Of each twenty chapters of a book, counted from 0, the one that is kept aside.
ASIDE = 12


def unwrapped(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", ""))
    lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n\n".join(line for line in lines if line) + "\n"


def cut(text: str) -> tuple[str, str]:
    """The text without the chapters that are kept aside, and those."""
    begins = [match.start() for match in CHAPTER.finditer(text)] + [len(text)]
    chapters = [text[begin:end] for begin, end in zip(begins, begins[1:])]
    aside = [chapter for n, chapter in enumerate(chapters) if n % 20 == ASIDE]
    kept = [chapter for n, chapter in enumerate(chapters) if n % 20 != ASIDE]
    return text[: begins[0]] + "".join(kept), "".join(aside)


def main() -> None:
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target/novels"
    texts = {("test", TEST.name): TEST.read_text("utf-8")}
    for path in sorted((HERE / "text").glob("*.txt.xz")):
        kept, aside = cut(lzma.decompress(path.read_bytes()).decode("utf-8"))
        texts["train", path.stem] = kept
        texts["validation", path.stem] = aside
    for (part, name), text in texts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        (out / part / name).write_bytes(unwrapped(text).encode("utf-8"))
    trained = " ".join(unwrapped(text) for (part, _), text in texts.items() if part == "train")
    words = sorted(set(WORD.findall(trained.lower())))
    (out / "words.txt").write_text("\n".join(words) + "\n")
    for part in ("train", "validation", "test"):
        size = sum(path.stat().st_size for path in (out / part).iterdir())
        print(f"{out / part}: {size} bytes")


if __name__ == "__main__":
    main()
