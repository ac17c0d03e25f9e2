"""MBPP, mostly basic Python problems (Austin et al. 2021, arXiv:2108.07732): a sentence and three asserts, a program is asked.

The names which the tests take from the program are those the gold program defines; modules they use are the judge's own.
Entry points: `items`, `prompt`, `response`, `score`, `scores`, `job` (what the sandbox runs).
"""

from __future__ import annotations

import ast

from hildalib import corpora, tasks
from hildalib.tasks import code

name = "mbpp"
version = 1

SPLITS = ("train", "validation", "test", "prompt")  # 374, 90, 500 and, for few-shot prompts, 10 rows
_FIELDS = ("task_id", "text", "code", "test_setup_code", "test_list")


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Items {"task_id", "text", "code", "test_setup_code", "test_list"} of a published split.

    limit: a sample drawn with `seed`, in file order; None takes all. HildaError if neither folder nor hub has the data.
    """
    tasks.check_split(split, SPLITS)
    rows = ({field: row[field] for field in _FIELDS} for row in corpora.records(name, split))
    return tasks.sampled([{**row, "code": _unix(row["code"]), "test_setup_code": _unix(row["test_setup_code"])} for row in rows], limit, seed)


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def prompt(item: dict) -> str:
    """The sentence and the three tests, as in the corpus."""
    tests = "\n".join(item["test_list"])
    return f"{item['text'].strip()}\nYour code should pass these tests:\n{tests}\n\n"


def response(item: dict) -> str:
    """The gold program."""
    return item["code"]


def program(text: str) -> str:
    """The first fenced block, or else the text up to where the program ends and talk or tests begin."""
    text = text[:code.LONGEST]
    found = code.block(text)
    return found if found != text else code.until(code.AFTER_PROGRAM, found)


def job(text: str, item: dict) -> dict:
    """Arguments of `sandbox.run` that score `text`."""
    tests = "\n".join([item["test_setup_code"], *item["test_list"]])
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    gold = ast.parse(item["code"]).body
    names = sorted({node.name for node in gold if isinstance(node, (ast.FunctionDef, ast.ClassDef))} & used)
    imports = [node for node in gold if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [node for node in imports if any((alias.asname or alias.name) in used for alias in node.names)]
    return {"code": program(text), "setup": "\n".join(map(ast.unparse, modules)), "names": names, "tests": tests}


def scores(texts: list[str], items: list[dict]) -> list[float]:
    """`score` of each text, several at once."""
    return code.scores(job, name, texts, items)


def score(text: str, item: dict) -> float:
    """1.0 if the program passes every test, contained, else 0.0. HildaError where code cannot be contained."""
    return scores([text], [item])[0]
