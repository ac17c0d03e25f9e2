"""HumanEval (Chen et al. 2021, arXiv:2107.03374): 164 functions to be written from signature and docstring, judged by their tests.

The answer goes on where the prompt ends, or is a (fenced) program that defines the function again. Entry points: `items`, `prompt`,
`response`, `score`; `job` (what the sandbox runs), `judged`, shared with `infilling`.
"""

from __future__ import annotations

import re

from hildalib import corpora, tasks
from hildalib.tasks import code

name = "humaneval"
version = 1
CONTINUES = True  # a prompt is the head of a program, not a question

SPLITS = ("test",)
_FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
_BODY = re.compile(r"(?:[ \t]*\n)*[ \t]")  # the first line that is not blank is indented


def items(split: str = "test", limit: int | None = None, seed: int = 0) -> list[dict]:
    """Items {"task_id", "prompt", "canonical_solution", "test", "entry_point"}; there is only the split test.

    limit: a sample drawn with `seed`, in file order; None takes all. HildaError if neither folder nor hub has the data.
    """
    tasks.check_split(split, SPLITS)
    return tasks.sampled([{field: row[field] for field in _FIELDS} for row in corpora.records(name, split)], limit, seed)


def prompt(item: dict) -> str:
    """Imports, helpers, signature and docstring."""
    return item["prompt"]


def response(item: dict) -> str:
    """The gold function body."""
    return item["canonical_solution"]


def program(text: str, item: dict) -> str:
    """The whole program that `text` answers with: a definition of the function after the prompt's head, or prompt and body."""
    text = text[:code.LONGEST]
    found, again = code.block(text), re.compile(rf"^def {re.escape(item['entry_point'])}\b", re.MULTILINE)
    if again.search(found) and not _BODY.match(found):
        head = item["prompt"][:[match.start() for match in again.finditer(item["prompt"])][-1]]
        return head + (found if found != text else code.until(code.AFTER_PROGRAM, found))
    return item["prompt"] + code.until(code.AFTER_FUNCTION, found)


def judged(whole: str, item: dict) -> dict:
    """Arguments of `sandbox.run`. The judge has the prompt's own helpers, which some tests use, not the candidate's."""
    return {"code": whole, "setup": item["prompt"], "names": [item["entry_point"]], "tests": f"{item['test']}\ncheck({item['entry_point']})\n"}


def job(text: str, item: dict) -> dict:
    """Arguments of `sandbox.run` that score `text`."""
    return judged(program(text, item), item)


def scores(texts: list[str], items: list[dict]) -> list[float]:
    """`score` of each text, several at once."""
    return code.scores(job, name, texts, items)


def score(text: str, item: dict) -> float:
    """1.0 if the program passes every test, contained, else 0.0. HildaError where code cannot be contained."""
    return scores([text], [item])[0]
