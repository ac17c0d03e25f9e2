"""Sudoku with 4x4 cells and 2x2 boxes: every row, column and box holds 1 to 4 once, and each puzzle has one solution.

Prompt "0301;2000;0010;1040=", response the filled grid, rows parted by ';'; 0 is a hole. These characters are among those of
the arithmetic task, so that one small vocabulary spells both. Entry points: `items`, `stream`, `prompt`, `response`, `score`,
`solutions`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations

from hildalib import tasks

name = "sudoku"
version = 1

DIGITS, HOLE = "1234", "0"
# Of 16 cells. With fewer, most of the answer is a copy of the prompt; with 10 holes 45 % of all choices leave one solution, with
# 11 only 22 %, so that the puzzles would be a narrow selection.
HOLES = range(6, 11)
STALE_DRAWS = 10_000  # there are millions of puzzles; this many repeats in a row means that a split is used up


def _fits(rows: tuple[str, ...], row: str) -> bool:
    """Whether `row` may stand below `rows`. Disjoint left halves suffice: the right halves of two rows are what is left over."""
    columns_differ = all(old[i] != row[i] for old in rows for i in range(4))
    return columns_differ and not (len(rows) % 2 and set(rows[-1][:2]) & set(row[:2]))


def _filled(rows: tuple[str, ...] = ()) -> Iterator[str]:
    if len(rows) == 4:
        yield ";".join(rows)
        return
    for row in map("".join, permutations(DIGITS)):
        if _fits(rows, row):
            yield from _filled((*rows, row))


@lru_cache(maxsize=1)
def grids() -> tuple[str, ...]:
    """All 288 complete grids, as responses."""
    return tuple(_filled())


@lru_cache(maxsize=1)
def _with_given() -> dict[tuple[int, str], frozenset[str]]:
    """Place in the text and digit there -> the grids that have it."""
    return {(i, digit): frozenset(grid for grid in grids() if grid[i] == digit) for i in range(len(grids()[0])) for digit in DIGITS}


def solutions(puzzle: str) -> frozenset[str]:
    """Every complete grid that keeps the givens of `puzzle`, "0301;2000;0010;1040" for example."""
    return frozenset(grids()).intersection(*(_with_given()[i, digit] for i, digit in enumerate(puzzle) if digit in DIGITS))


def _draw(rng: random.Random) -> dict:
    holes = rng.choice(HOLES)  # before the loop: so each number of holes is as frequent as another
    while True:
        cells = list(rng.choice(grids()))
        for i in rng.sample([i for i, cell in enumerate(cells) if cell in DIGITS], holes):
            cells[i] = HOLE
        found = solutions("".join(cells))
        if len(found) == 1:
            return {"puzzle": "".join(cells), "solution": next(iter(found))}


def key(item: dict) -> str:
    """Canonical question: digits renamed in the order of their first appearance, so that all 24 renamings share a split."""
    seen = "".join(dict.fromkeys(cell for cell in item["puzzle"] if cell in DIGITS))
    return item["puzzle"].translate(str.maketrans(seen, DIGITS[:len(seen)]))


def stream(seed: int = 0, split: str = "train") -> Iterator[dict]:
    """Endless items {"puzzle": "0301;2000;0010;1040", "solution": the one grid} of `split`; repeats are possible."""
    return tasks.stream_of(name, _draw, key, split, seed)


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """`limit` different puzzles (default `tasks.DEFAULT_SIZES`). No train puzzle, its digits renamed or not, is in another split."""
    count = tasks.DEFAULT_SIZES[tasks.check_split(split)] if limit is None else limit
    return tasks.items_of(stream(seed, split), prompt, count, STALE_DRAWS)


def prompt(item: dict) -> str:
    """"0301;2000;0010;1040="."""
    return item["puzzle"] + "="


def response(item: dict) -> str:
    """The complete grid in the form of the prompt."""
    return item["solution"]


def score(text: str, item: dict) -> float:
    """1.0 if the text (outer white space aside) is a complete valid grid that keeps every given, else 0.0. Nothing is parsed."""
    if not isinstance(text, str) or text.strip() not in grids():
        return 0.0
    return float(all(asked in (HOLE, found) for asked, found in zip(item["puzzle"], text.strip())))
