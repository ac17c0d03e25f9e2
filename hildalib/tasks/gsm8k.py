"""GSM8K, grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168): question, worked answer, "#### number".

Calculator marks <<48/2=24>> are removed from the gold answers. Entry points: `items`, `prompt`, `response`, `score` (strict:
the number after ####), `flexible` (the last number of the text).
"""

from __future__ import annotations

import re

from hildalib import corpora, tasks

name = "gsm8k"
version = 1

INSTRUCTION = "Solve the problem step by step. End with a line of the form #### number."
LONGEST = 20_000  # characters, from the end, that are searched: the longest gold answer has about 1,200
_MARK = re.compile(r"<<[^<>]*>>")
# Bounded and ASCII: no catastrophic backtracking, no huge integers; what a comma or point joins to more digits is not a number.
_NUMBER = r"-?\$?(?:[0-9]{1,3}(?:,[0-9]{3}){1,6}|[0-9]{1,20})(?:\.[0-9]{1,12})?(?![.,]?[0-9])"
_STRICT = re.compile(rf"####[ \t]{{0,8}}({_NUMBER})")
_ANY = re.compile(rf"(?<![0-9])(?<![0-9][.,]){_NUMBER}")


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Items {"question", "answer"}. test: the published test file; validation and train: the training file by hash (10 : 90).

    limit: a sample drawn with `seed`, in file order; None takes all. HildaError if neither folder nor hub has the data.
    """
    test = tasks.check_split(split) == "test"
    rows = [{"question": row["question"], "answer": row["answer"]} for row in corpora.records(name, "test" if test else "train")]
    if not test:
        rows = [row for row in rows if (tasks.question_split(row["question"]) == "validation") == (split == "validation")]
    return tasks.sampled(rows, limit, seed)


def prompt(item: dict) -> str:
    """The question, the fixed instruction, and the cue for the answer."""
    return f"Question: {item['question'].strip()}\n{INSTRUCTION}\nAnswer:"


def response(item: dict) -> str:
    """The gold answer without calculator marks; begins with a space, since it follows "Answer:"."""
    return " " + _MARK.sub("", item["answer"]).strip()


def normalise(number: str) -> str:
    """"$1,250.00" -> "1250": commas, $ and leading or trailing zeros removed; equal strings mean equal numbers."""
    whole, _, fraction = number.replace(",", "").replace("$", "").partition(".")
    sign, whole, fraction = whole.startswith("-"), whole.lstrip("-").lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if sign and value != "0" else value


def _matches(pattern: re.Pattern, text: str, item: dict) -> float:
    if not isinstance(text, str):
        return 0.0
    found = pattern.findall(text[-LONGEST:])
    gold = _STRICT.findall(item["answer"])[-1]
    return float(bool(found) and normalise(found[-1]) == normalise(gold))


def score(text: str, item: dict) -> float:
    """Strict: 1.0 if the number after the last #### equals the gold number exactly after `normalise`, else 0.0."""
    return _matches(_STRICT, text, item)


def flexible(text: str, item: dict) -> float:
    """1.0 if the last number in the text equals the gold number, else 0.0. Always report beside `score`, never instead."""
    return _matches(_ANY, text, item)
