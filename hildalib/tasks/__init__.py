"""Benchmarks, one module each: what is asked, what a gold answer looks like, how an answer is scored.

A task *is* its module: `load("arithmetic")` returns it. Every task has `name`, `version` (raised whenever a prompt or a score
changes), `items(split, limit=None, seed=0)`, `prompt(item)`, `response(item)` and `score(text, item)` in [0, 1], which is 0.0
for anything hostile or unparsable, in bounded time, and evaluates the text nowhere but in the sandbox (code tasks raise HildaError
where there is none). Procedural tasks also have `stream(seed)`, and `generator()`, which names package and version, where another
package makes the questions; a task whose scores are costly also has `scores(texts, items)`, many at once; one whose prompts are openings
to be continued, not questions, says `CONTINUES`.
Entry points: `load`, `NAMES`, `GENERATED`; for the authors of procedural tasks `question_split`, `stream_of`,
`items_of`; for those of tasks with files `sampled`.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Callable, Iterator
from types import ModuleType

from hildalib import HildaError

NAMES = ("arithmetic", "countdown", "gsm8k", "gsm_symbolic", "humaneval", "infilling", "math500", "mbpp", "shortcuts", "sudoku", "tinystories")
GENERATED = ("arithmetic", "countdown", "gsm_symbolic", "shortcuts", "sudoku")  # procedural: made on the spot, without files
SPLITS = ("train", "validation", "test")
# Of 100 hash buckets 80 train, 10 validate, 10 test: even the smallest question space here (a few thousand) leaves hundreds.
TEST_BUCKETS, VALIDATION_BUCKETS, BUCKETS = 10, 10, 100
# What `items` returns when no limit is given: enough for a Wilson interval of about +-3 points, and a nano SFT set.
DEFAULT_SIZES = {"train": 20_000, "validation": 500, "test": 1_000}


def load(name: str) -> ModuleType:
    """The task called `name`. HildaError if there is none."""
    if name not in NAMES:
        raise HildaError(f"unknown task {name!r}; use one of {', '.join(NAMES)}")
    return importlib.import_module(f"hildalib.tasks.{name}")


def check_split(split: str, known: tuple[str, ...] = SPLITS) -> str:
    """`split` itself. HildaError if it is not in `known`."""
    if split not in known:
        raise HildaError(f"unknown split {split!r}; use one of {', '.join(known)}")
    return split


def sampled(rows: list, limit: int | None, seed: int) -> list:
    """`limit` of `rows` drawn with `seed`, in their order; None, or more than there are, takes all."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def question_split(key: str) -> str:
    """The one split that the question with canonical form `key` belongs to, whatever the seed (sha256 of the key)."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % BUCKETS
    if bucket < TEST_BUCKETS:
        return "test"
    return "validation" if bucket < TEST_BUCKETS + VALIDATION_BUCKETS else "train"


def stream_of(name: str, draw: Callable[[random.Random], dict], key: Callable[[dict], str], split: str,
              seed: int) -> Iterator[dict]:
    """Endless items of `split`: what `draw(rng)` gives, less what `question_split(key(item))` puts elsewhere. May repeat."""
    check_split(split)
    rng = random.Random(f"{name}/{split}/{seed}")  # a string seed is hashed the same on every platform
    while True:
        item = draw(rng)
        if question_split(key(item)) == split:
            yield item


def items_of(stream: Iterator[dict], key: Callable[[dict], str], count: int, most: int) -> list[dict]:
    """The first `count` items of `stream` with different keys.

    most: draws without a new question after which the question space counts as exhausted (HildaError).
    """
    seen, found, stale = set(), [], 0
    while len(found) < count:
        item = next(stream)
        if key(item) in seen:
            stale += 1
            if stale > most:
                raise HildaError(f"only {len(found)} different questions found where limit={count} were asked; lower the limit")
            continue
        seen.add(key(item))
        found.append(item)
        stale = 0
    return found
