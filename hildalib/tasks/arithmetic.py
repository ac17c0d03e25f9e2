"""Arithmetic chains with worked steps: short, character-friendly, verifiable, endless.

Prompt "17+25-8=", response "17+25=42;42-8=34;34": one step per operation, then the answer. Entry points: `items`, `stream`,
`prompt`, `response`, `answer`, `score` (final answer), `exact` (whole response), `parts` (partial credit, a reward for RL), `sound`.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator

from hildalib import tasks

name = "arithmetic"
version = 1

SMALLEST, LARGEST = 1, 49  # operands of one or two digits: carries and borrows occur, yet 1 M parameters learn them in minutes
TERMS = (2, 3)  # one or two worked steps: a wrong first step then spoils the answer, which is what editing may repair
LOWEST, HIGHEST = 0, 99  # running results: no minus sign to learn, and at most two digits
STALE_DRAWS = 10_000  # the space has about 10^6 questions a split; this many repeats in a row means that it is used up


def _apply(left: int, op: str, right: int) -> int:
    return left + right if op == "+" else left - right


def _results(item: dict) -> list[int]:
    """Running results after each operation, left to right."""
    results, value = [], item["terms"][0]
    for op, term in zip(item["ops"], item["terms"][1:]):
        value = _apply(value, op, term)
        results.append(value)
    return results


def _draw(rng: random.Random) -> dict:
    while True:
        count = rng.choice(TERMS)
        item = {"terms": [rng.randint(SMALLEST, LARGEST) for _ in range(count)],
                "ops": [rng.choice("+-") for _ in range(count - 1)]}
        if all(LOWEST <= result <= HIGHEST for result in _results(item)):
            return item


def key(item: dict) -> str:
    """Canonical question: the signed terms in sorted order, so that 17+25 and 25+17 share a split."""
    signed = [item["terms"][0], *(_apply(0, op, term) for op, term in zip(item["ops"], item["terms"][1:]))]
    return " ".join(map(str, sorted(signed)))


def stream(seed: int = 0, split: str = "train") -> Iterator[dict]:
    """Endless items {"terms": [17, 25, 8], "ops": ["+", "-"]} of `split`; repeats are possible."""
    return tasks.stream_of(name, _draw, key, split, seed)


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """`limit` different questions (default `tasks.DEFAULT_SIZES`). No train question, reordered or not, is in another split."""
    count = tasks.DEFAULT_SIZES[tasks.check_split(split)] if limit is None else limit
    return tasks.items_of(stream(seed, split), prompt, count, STALE_DRAWS)


def prompt(item: dict) -> str:
    """"17+25-8="."""
    return str(item["terms"][0]) + "".join(f"{op}{term}" for op, term in zip(item["ops"], item["terms"][1:])) + "="


def response(item: dict) -> str:
    """"17+25=42;42-8=34;34"."""
    results = _results(item)
    steps = [f"{left}{op}{right}={result}"
             for left, op, right, result in zip([item["terms"][0], *results], item["ops"], item["terms"][1:], results)]
    return ";".join([*steps, str(results[-1])])


def answer(text: str) -> str:
    """What follows the last ';', outer white space aside: what a vote counts."""
    return text.rpartition(";")[2].strip()


def score(text: str, item: dict) -> float:
    """1.0 if what follows the last ';' is the right answer and nothing else (outer white space aside), else 0.0.

    The answer is compared as a string, never parsed. A bare answer without a step and its ';' is 0.0: the steps are the task.
    """
    if not isinstance(text, str):
        return 0.0
    return float(text.rfind(";") > 0 and answer(text) == str(_results(item)[-1]))


def exact(text: str, item: dict) -> float:
    """1.0 if the whole text is the worked response (outer white space aside), else 0.0."""
    return float(isinstance(text, str) and text.strip() == response(item))


def parts(text: str, item: dict) -> float:
    """The share of the worked response's numbers and signs that the text has, each in its place: partial credit in [0, 1].

    "17+25=43;43" for "17+25=42;42" has 5 of 7. What is too much counts as wrong, so 1.0 is `exact` and nothing else.
    """
    if not isinstance(text, str):
        return 0.0
    found, wanted = (re.findall(r"[0-9]+|[^0-9]", value) for value in (text.strip(), response(item)))
    return sum(one == other for one, other in zip(found, wanted)) / max(len(found), len(wanted))


def sound(text: str, item: dict) -> int:
    """Characters of `text` before the first that is not the worked response's."""
    return len(os.path.commonprefix([text, response(item)]))
