#!/usr/bin/env python3
"""Unpacks the novels and cuts them into what the built-in model learns from, what it is chosen by, and what it is judged by.

    models/novels/prepare.py [OUT]      # usually target/novels

OUT/train         six novels without every twentieth chapter: all that is learned from, and what a 5-gram counts
OUT/editions      the same twelve times, chapters in another order, names exchanged: what the model and its tokenizer see
OUT/validation    the chapters kept aside: what choices are made by
OUT/test          Northanger Abbey, whole, which the commands have built in: looked at when everything is chosen
OUT/words.txt     the words of OUT/editions, in small letters

Lines of a paragraph become one line; an empty line stays between paragraphs.

Six novels have few people, and a model soon knows them all; then it has no use for a page that says who is in the room. In an
edition two chapters of three have other names: each surname, name of a woman, of a man and of a place becomes one that was drawn
for this chapter, from the novels' own and names.txt. Who is meant can then be read in the chapter only.
"""

import collections
import lzma
import pathlib
import random
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEST = ROOT / "crates/foveal-cli/assets/northanger-abbey.txt"
CHAPTER = re.compile(r"^(?:CHAPTER|Chapter) .*$", re.MULTILINE)
# Of each twenty chapters of a book, counted from 0, the one that is kept aside.
ASIDE = 12
EDITIONS = 12
# The share of an edition's chapters that keep their names.
KEPT = 0.35

NAME = re.compile(r"\b[A-Z][a-z]{2,}\b")
TITLE = r"(?:Mr|Mrs|Miss|Misses|Dr|Captain|Colonel|Admiral|Lady|Lord|Sir)"
# Capital words that look like names of one of the kinds and are not.
NO_NAME = set(
    "Mrs Miss Misses Colonel Captain Admiral Lady Lord Sir Monsieur Bishop Commodore Monday Tuesday Wednesday Thursday Friday "
    "Saturday Sunday January February March April May June July August September October November December Christmas Easter "
    "Michaelmas Providence Christian Quaker English French Italian Irish Indian Roman Japanese Spanish German Greek Dutch "
    "American Mediterranean Atlantic Pacific Indies Cape Magna Canallers Canaller Nantucketer Cottager Lakeman".split()
)


def unwrapped(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", ""))
    lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n\n".join(line for line in lines if line) + "\n"


def chapters(text: str) -> list[str]:
    """What stands before the first chapter, and the chapters."""
    begins = [0] + [match.start() for match in CHAPTER.finditer(text)] + [len(text)]
    return [text[begin:end] for begin, end in zip(begins, begins[1:])]


def cut(text: str) -> tuple[str, str]:
    """The text without the chapters that are kept aside, and those."""
    first, *rest = chapters(text)
    aside = [chapter for n, chapter in enumerate(rest) if n % 20 == ASIDE]
    kept = [chapter for n, chapter in enumerate(rest) if n % 20 != ASIDE]
    return first + "".join(kept), "".join(aside)


def kinds(text: str) -> dict[str, str]:
    """The names of a text, each a surname, a place, a woman's (she) or a man's (he), by the words around them."""
    count = collections.Counter
    capital, small = count(NAME.findall(text)), count(re.findall(r"\b[a-z]+\b", text))
    inside = count(re.findall(r"(?<=[a-z,;] )([A-Z][a-z]{2,})\b", text))
    titled = count(re.findall(rf"\b{TITLE}\.? ([A-Z][a-z]{{2,}})\b", text))
    placed = count(re.findall(r"\b(?:in|at|to|from|of|near) ([A-Z][a-z]{2,})\b", text))
    she, he = count(), count()
    for match in NAME.finditer(text):
        after = text[match.end() : match.end() + 80].lower()
        she[match[0]] += len(re.findall(r"\b(?:she|her|herself)\b", after))
        he[match[0]] += len(re.findall(r"\b(?:he|his|him|himself)\b", after))
    found = {}
    for word, times in capital.items():
        begins_sentences = inside[word] + titled[word] < 0.4 * times
        plural = word.endswith("s") and capital[word[:-1]] > times
        if times < 5 or word in NO_NAME or small[word.lower()] > 0.05 * times or begins_sentences or plural:
            continue
        women, men = she[word] + 1, he[word] + 1
        if titled[word] >= 0.3 * times:
            found[word] = "surname"
        elif placed[word] >= 0.45 * times:
            found[word] = "place"
        elif times >= 8 and placed[word] < 0.3 * times and women + men >= 0.2 * times:
            if max(women, men) > 1.3 * min(women, men):
                found[word] = "she" if women > men else "he"
    return found


def exchanged(text: str, names: dict[str, str], pools: dict[str, list[str]], draw: random.Random) -> str:
    """The text with each name replaced by one of its kind; families are called by the plural of theirs."""
    new = {}
    for kind, pool in pools.items():
        own = [name for name in names if names[name] == kind]
        new.update(zip(own, draw.sample(pool, len(own))))

    def other(match: re.Match) -> str:
        word = match[0]
        if word.endswith("s") and names.get(word[:-1]) == "surname" and word not in new:
            return new[word[:-1]] + "s"
        return new.get(word, word)

    return NAME.sub(other, text)


def more_names() -> dict[str, list[str]]:
    """names.txt, a list for each kind."""
    lists = {}
    for word in (HERE / "names.txt").read_text("utf-8").split("\n", 1)[1].split():
        if word.endswith(":"):
            lists[word[:-1]] = own = []
        else:
            own.append(word)
    return lists


def editions(texts: list[str]) -> list[str]:
    names = kinds("".join(texts))
    pools = {
        kind: sorted({name for name in names if names[name] == kind} | set(more))
        for kind, more in more_names().items()
    }
    draw = random.Random(1)
    parts = [chapter for text in texts for chapter in chapters(text) if chapter]
    made = []
    for _ in range(EDITIONS):
        draw.shuffle(parts)
        made.append("".join(part if draw.random() < KEPT else exchanged(part, names, pools, draw) for part in parts))
    return made


def write(folder: pathlib.Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")


def main() -> None:
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target/novels"
    train, validation = {}, {}
    for path in sorted((HERE / "text").glob("*.txt.xz")):
        kept, aside = cut(lzma.decompress(path.read_bytes()).decode("utf-8"))
        train[path.stem], validation[path.stem] = unwrapped(kept), unwrapped(aside)
    made = editions(list(train.values()))
    write(out / "train", train)
    write(out / "editions", {f"edition-{n:02}.txt": text for n, text in enumerate(made)})
    write(out / "validation", validation)
    write(out / "test", {TEST.name: unwrapped(TEST.read_text("utf-8"))})
    words = sorted(set(re.findall(r"[a-z]+", " ".join(made).lower())))
    (out / "words.txt").write_text("\n".join(words) + "\n")


if __name__ == "__main__":
    main()
