"""Infilling of HumanEval (after Bavarian et al. 2022, arXiv:2207.14255): lines of the gold body are missing between prefix and suffix.

Made here from the gold bodies: single-line removes one line, multi-line any run of lines, one included, that begins and ends with a line
that is not blank. A diffusion decoder may put `suffix` on the canvas; what reads only leftwards
gets `prompt_with_suffix`. Scored by running prefix + middle + suffix.
Entry points: `items`, `prompt`, `prefix`, `suffix`, `prompt_with_suffix`, `response`, `score`, `scores`, `job` (what the sandbox runs).
"""

from __future__ import annotations

from collections.abc import Iterator

from hildalib import tasks
from hildalib.tasks import code, humaneval

name = "infilling"
version = 1

SPLITS = ("test", "single-line", "multi-line")


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Items {"task_id", "kind", "prefix", "middle", "suffix", "prompt", "test", "entry_point"}, where prefix + middle + suffix is the gold program.

    split: "single-line" (1,033 items), "multi-line" (5,815) or, the same, "test". limit: a sample drawn with `seed`, in order; None
    takes all. HildaError if neither folder nor hub has HumanEval.
    """
    kind = "multi-line" if tasks.check_split(split, SPLITS) == "test" else split
    return tasks.sampled([item for row in humaneval.items("test") for item in _holes(row, kind)], limit, seed)


def _holes(row: dict, kind: str) -> Iterator[dict]:
    lines = row["canonical_solution"].splitlines(keepends=True)
    full = [number for number, line in enumerate(lines) if line.strip()]
    for place, first in enumerate(full):
        for last in full[place:place + 1] if kind == "single-line" else full[place:]:
            yield {**{field: row[field] for field in ("prompt", "test", "entry_point")}, "task_id": f"{row['task_id']}/{first}-{last}", "kind": kind,
                   "prefix": row["prompt"] + "".join(lines[:first]), "middle": "".join(lines[first:last + 1]), "suffix": "".join(lines[last + 1:])}


def prompt(item: dict) -> str:
    """The prefix."""
    return item["prefix"]


def prefix(item: dict) -> str:
    """What stands before the hole; ends at a line end."""
    return item["prefix"]


def suffix(item: dict) -> str:
    """What stands after the hole; empty where the hole reaches the end."""
    return item["suffix"]


def prompt_with_suffix(item: dict) -> str:
    """For a model that reads only leftwards: the suffix first, then the prefix, at whose end the answer goes on."""
    return f"# These lines come after the ones that are to be written:\n{item['suffix'].rstrip()}\n\n# The program up to there:\n{item['prefix']}"


def response(item: dict) -> str:
    """The gold middle: whole lines."""
    return item["middle"]


def middle(text: str, item: dict) -> str:
    """The lines of `text` that belong in the hole: one for single-line; else up to where the function ends, less the suffix if that is said again."""
    lines = code.until(code.AFTER_FUNCTION, code.block(text[:code.LONGEST])).splitlines()
    full = [number for number, line in enumerate(lines) if line.strip()]
    after = [line.rstrip() for line in item["suffix"].splitlines() if line.strip()]
    end = len(lines)
    if item["kind"] == "single-line":
        end = full[0] + 1 if full else 0
    elif after and [lines[number].rstrip() for number in full[-len(after):]] == after:
        end = full[-len(after)]
    return "".join(f"{line}\n" for line in lines[:end])


def job(text: str, item: dict) -> dict:
    """Arguments of `sandbox.run` that score `text`."""
    return humaneval.judged(item["prefix"] + middle(text, item) + item["suffix"], item)


def scores(texts: list[str], items: list[dict]) -> list[float]:
    """`score` of each text, several at once."""
    return code.scores(job, name, texts, items)


def score(text: str, item: dict) -> float:
    """1.0 if prefix + middle + suffix passes every test, contained, else 0.0. HildaError where code cannot be contained."""
    return scores([text], [item])[0]
