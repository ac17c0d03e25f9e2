"""TinyStories continuation (Eldan and Li 2023, arXiv:2305.07759): an opening is given, the model tells the rest.

There is no right answer. `score` is one minus the repetition of one continuation; `metrics` measures a set of them; likelihood
under a fixed judge is measured where models are known. Entry points: `items`, `prompt`, `response`, `score`, `metrics`.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from hildalib import corpora, tasks

name = "tinystories"
version = 1
CONTINUES = True  # a prompt is the opening of a text, not a question

OPENING_WORDS = 20  # one or two sentences: the hero and the wish are named, the story is still open
GRAM = 3  # words; common phrases ("there was a") repeat honestly as 2-grams, copied sentences already do as 3-grams
LONGEST = 20_000  # characters that are looked at: the longest TinyStories has about 5,000
COMPARED = 200  # continuations compared in pairs for self-similarity, the first ones: 20,000 pairs, a second
_WORD = re.compile(r"[A-Za-z']+|[0-9]+")


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Items {"prompt", "reference"} cut after `OPENING_WORDS` words. train: training stories; validation and test: halves, by hash,
    of the published validation stories.

    limit: a sample drawn with `seed`, in file order; None takes all. HildaError if neither folder nor hub has the data.
    """
    train = tasks.check_split(split) == "train"
    stories = dict.fromkeys(row["text"] for row in corpora.rows(name, "train" if train else "validation"))
    if not train:  # half of the published validation text each
        stories = [story for story in stories if (corpora.split_of(story, 50) == "validation") == (split == "validation")]
    found = [cut for cut in map(_cut, stories) if cut["reference"].strip()]
    return tasks.sampled(found, limit, seed)


def _cut(story: str) -> dict:
    """The story in two parts, whose concatenation is the story; the second begins with the white space between them."""
    words = list(re.finditer(r"\S+", story))
    end = words[min(OPENING_WORDS, len(words)) - 1].end()
    return {"prompt": story[:end], "reference": story[end:]}


def prompt(item: dict) -> str:
    """The opening."""
    return item["prompt"]


def response(item: dict) -> str:
    """The rest of the published story."""
    return item["reference"]


def words(text: str) -> list[str]:
    """Lower-case words and numbers of the first `LONGEST` characters."""
    return _WORD.findall(text[:LONGEST].lower()) if isinstance(text, str) else []


def grams(text: str, size: int = GRAM) -> list[tuple[str, ...]]:
    """Word n-grams in order."""
    found = words(text)
    return list(zip(*(found[start:] for start in range(size))))


def repetition(text: str) -> float:
    """Share of word 3-grams that occurred before in the same text: 0.0 none repeats, towards 1.0 a loop. 0.0 below 3 words."""
    found = grams(text)
    return 1 - len(set(found)) / len(found) if found else 0.0


def longest_repeat(text: str) -> float:
    """Length of the longest word sequence that occurs twice without overlap, over half the words: 1.0 is a text said twice."""
    found = words(text)
    low, high = 0, len(found) // 2
    while low < high:  # a repeat of n words contains one of n-1: bisection finds the longest
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _repeats(found, middle) else (low, middle - 1)
    return low / (len(found) // 2) if len(found) > 1 else 0.0


def _repeats(found: list[str], size: int) -> bool:
    first: dict[tuple[str, ...], int] = {}
    return any(start - first.setdefault(tuple(found[start:start + size]), start) >= size for start in range(len(found) - size + 1))


def score(text: str, item: dict) -> float:
    """1 - `repetition(text)`, in [0, 1]; 0.0 for a text below 3 words. It is not correctness: `item` is not looked at."""
    return 1 - repetition(text) if len(words(text)) >= GRAM else 0.0


def metrics(texts: list[str]) -> dict[str, float]:
    """Repetition within and diversity across continuations, each in [0, 1] but `words`.

    words: mean count. repetition, longest_repeat: means over texts. distinct_1, _2, _3: different n-grams over all n-grams of all
    texts together (Li et al. 2016, arXiv:1510.03055). self_similarity: mean Jaccard overlap of the 3-gram sets of two texts.
    """
    sets = [set(grams(text)) for text in texts[:COMPARED]]
    overlaps = [len(one & two) / len(one | two) if one | two else 0.0 for i, one in enumerate(sets) for two in sets[:i]]
    distinct = {size: Counter(gram for text in texts for gram in grams(text, size)) for size in (1, 2, 3)}

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    return {"words": mean([len(words(text)) for text in texts]), "repetition": mean([repetition(text) for text in texts]),
            "longest_repeat": mean([longest_repeat(text) for text in texts]), "self_similarity": mean(overlaps),
            **{f"distinct_{size}": len(counts) / counts.total() if counts else 0.0 for size, counts in distinct.items()}}
