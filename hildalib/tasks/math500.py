"""MATH-500: 500 competition problems of MATH (Hendrycks et al. 2021, arXiv:2103.03874; chosen by Lightman et al. 2023,
arXiv:2305.20050), answers in LaTeX inside \\boxed{}, compared mathematically (see `hildalib.verifier`).

There is a test split only. Problems set aside for validation would leave a test that cannot be compared with published numbers,
and some 50 problems (+-14 points) are too few to tune on: use gsm8k's validation split for that.
Entry points: `items`, `prompt`, `response`, `boxed`, `score` (one text), `scores` (many, in parallel).
"""

from __future__ import annotations

from hildalib import HildaError, corpora, tasks, verifier

name = "math500"
version = 1

INSTRUCTION = "Solve the problem step by step. Put the final answer in \\boxed{}."
LONGEST = 20_000  # characters, from the end, that are searched: the longest gold solution has about 3,400
LONGEST_ANSWER = 200  # characters inside \boxed{}: the longest gold answer has 53, and the parser's time grows with nesting
_BOX = "\\boxed{"


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Items {"problem", "solution", "answer", "subject", "level"} of split "test".

    limit: a sample drawn with `seed`, in file order; None takes all. HildaError for another split, or if neither folder nor hub
    has the data.
    """
    if tasks.check_split(split) != "test":
        raise HildaError(f"math500 has no split {split!r}: all its problems are the test; train and tune on gsm8k, report math500 with split='test'")
    rows = [{key: row[key] for key in ("problem", "solution", "answer", "subject", "level") if key in row} for row in corpora.records(name, "test")]
    return tasks.sampled(rows, limit, seed)


def prompt(item: dict) -> str:
    """The problem, the fixed instruction, and the cue for the answer."""
    return f"Question: {item['problem'].strip()}\n{INSTRUCTION}\nAnswer:"


def response(item: dict) -> str:
    """The gold solution, with its answer in \\boxed{}; begins with a space, since it follows "Answer:"."""
    return " " + item["solution"].strip()


def boxed(text: str) -> str:
    """What the last \\boxed{...} holds, "" if there is none, it is not closed, or it is longer than `LONGEST_ANSWER`."""
    tail = text[-LONGEST:] if isinstance(text, str) else ""
    start = tail.rfind(_BOX)
    if start < 0:
        return ""
    answer, depth = tail[start + len(_BOX):][:LONGEST_ANSWER + 1], 1
    for end, character in enumerate(answer):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return answer[:end].strip()
    return ""


def scores(texts: list[str], items: list[dict]) -> list[float]:
    """1.0 for each text whose last \\boxed{} equals the gold answer, in order: 0.5 is \\frac{1}{2}, x = 7 is 7, 42\\% is 42.

    The same text apart from white space is equal; anything else is up to math-verify. 0.0 for what it cannot read in bounded
    time and memory. HildaError if math-verify does not work here.
    """
    pairs = [(item["answer"], boxed(text)) for text, item in zip(texts, items, strict=True)]
    found = ["".join(gold.split()) == "".join(answer.split()) for gold, answer in pairs]
    unsure = [i for i, (_, answer) in enumerate(pairs) if answer and not found[i]]
    for i, same in zip(unsure, verifier.equal([pairs[i] for i in unsure])):
        found[i] = same
    return [float(same) for same in found]


def score(text: str, item: dict) -> float:
    """`scores` of one text."""
    return scores([text], [item])[0]
