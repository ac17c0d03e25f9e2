"""Countdown: reach a target with each of a few numbers used exactly once; checked by a small parser of its own, never by eval.

Prompt "3 7 5 -> 26:", response "3*7=21,21+5=26": one equation per operation, whose operands are given numbers or earlier
results. Entry points: `items` (procedural splits, and the published files as splits "d1" and "dream"), `stream`, `prompt`,
`response`, `score`, `solutions`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

from hildalib import corpora, tasks

name = "countdown"
version = 1

NUMBERS = 3  # two equations: the size of the published cd3 files
LARGEST = 30  # 42,068 questions, their order aside, mostly two-digit; and few published questions (numbers to 100) fall inside
TARGETS = range(1, 100)  # as in the published files
FILES = ("d1", "dream")  # published questions: the benchmark of d1, and Dream's rows with worked solutions
STALE_DRAWS = 10_000  # a split has thousands of questions; this many repeats in a row means that it is used up
LONGEST = 200  # characters of an answer that are looked at: two equations of three-digit numbers need 30
_EQUATION = re.compile(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})")  # ASCII digits only; six bound every product


def _apply(left: int, op: str, right: int) -> int | None:
    """Result of one operation, None where the game forbids it: a negative difference, a division with a remainder."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right if left >= right else None
    if op == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def _search(numbers: tuple[int, ...], done: str, found: dict[int, str]) -> None:
    if len(numbers) == 1:
        found.setdefault(numbers[0], done[:-1])  # without the trailing comma
        return
    for i, j in combinations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        high, low = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        for op in "+-*/":
            result = _apply(high, op, low)
            if result is not None:
                _search((*rest, result), f"{done}{high}{op}{low}={result},", found)


@lru_cache(maxsize=8192)  # all 4,960 multisets of three numbers up to 30 fit
def solutions(numbers: tuple[int, ...]) -> dict[int, str]:
    """Every target that `numbers` reach, each with one worked response. At most a handful of numbers: the search is full."""
    found: dict[int, str] = {}
    _search(numbers, "", found)
    return found


def _draw(rng: random.Random) -> dict:
    while True:
        numbers = [rng.randint(1, LARGEST) for _ in range(NUMBERS)]
        reachable = solutions(tuple(sorted(numbers)))
        targets = [target for target in sorted(reachable) if target in TARGETS]
        if targets:
            target = rng.choice(targets)
            return {"numbers": numbers, "target": target, "solution": reachable[target]}


def key(item: dict) -> str:
    """Canonical question: sorted numbers and target, so that 3 7 5 -> 26 and 7 5 3 -> 26 share a split."""
    return f"{sorted(item['numbers'])} {item['target']}"


def stream(seed: int = 0, split: str = "train") -> Iterator[dict]:
    """Endless items {"numbers": [3, 7, 5], "target": 26, "solution": "3*7=21,21+5=26"}; repeats are possible."""
    return tasks.stream_of(name, _draw, key, split, seed)


def _published(file: str) -> Iterator[dict]:
    """Rows of a published file that are not questions of the procedural training split."""
    for row in corpora.records("countdown", file):
        *numbers, target = map(int, [*row["input"].split(","), *([row["output"]] if file == "d1" else [])])
        item = {"numbers": numbers, "target": target, "solution": solutions(tuple(numbers)).get(target)}
        if file == "dream":
            item["solution"] = row["output"]
        if max(numbers) > LARGEST or tasks.question_split(key(item)) != "train":
            yield item


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """`limit` different questions of train, validation or test (default `tasks.DEFAULT_SIZES`), disjoint whatever the seed.

    split "d1" and "dream" give the published files under HILDA_DATA (HildaError without them), in their order, less the few
    rows that procedural training may contain; the seed is not used.
    """
    if tasks.check_split(split, (*tasks.SPLITS, *FILES)) in FILES:
        return list(_published(split))[:limit]
    count = tasks.DEFAULT_SIZES[split] if limit is None else limit
    return tasks.items_of(stream(seed, split), key, count, STALE_DRAWS)


def prompt(item: dict) -> str:
    """"3 7 5 -> 26:"."""
    return f"{' '.join(map(str, item['numbers']))} -> {item['target']}:"


def response(item: dict) -> str:
    """"3*7=21,21+5=26"."""
    return item["solution"]


def score(text: str, item: dict) -> float:
    """1.0 if the equations are true, use every number exactly once and end in the target, else 0.0.

    The text (outer white space aside) must be equations 'a op b=c' joined by ',' and nothing else: whole numbers without a
    sign, at most six digits, and divisions without remainder.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        return 0.0
    pool, last = Counter(item["numbers"]), None
    for equation in text.strip().split(","):
        match = _EQUATION.fullmatch(equation)
        if match is None:
            return 0.0
        left, op, right, last = int(match[1]), match[2], int(match[3]), int(match[4])
        pool.subtract((left, right))
        if min(pool[left], pool[right]) < 0 or _apply(left, op, right) != last:
            return 0.0
        pool[last] += 1
    return float(last == item["target"] and +pool == Counter([last]))
