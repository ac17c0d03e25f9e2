"""GSM-symbolic, grade-school word problems from templates (Mirzadeh et al. 2024, arXiv:2410.05229), endless and without a file.

The questions come from the package reasoning-gym (optional); the format, the splits and the scores are those of GSM8K, never
the package's own. Entry points: `items`, `stream`, `prompt`, `response`, `score` (strict), `flexible`; `generator` names the source.
"""

from __future__ import annotations

import importlib.metadata
import random
import re
from collections.abc import Iterator
from fractions import Fraction

from hildalib import HildaError, tasks
from hildalib.tasks.gsm8k import flexible, normalise, prompt, response, score

__all__ = ["flexible", "generator", "items", "key", "name", "prompt", "response", "score", "stream", "version"]

name = "gsm_symbolic"
version = 1

STALE_DRAWS = 10_000  # there are many thousands of questions; this many repeats in a row means that a split is used up
_REQUEST = " Give the result as your final answer. Do not include units."  # the package's instruction; `prompt` has its own
_ASCII = str.maketrans("£€×÷•", "$$x/-")  # one currency, as the templates write "$31" into sums of pounds; and nano reads ASCII
_POINT_ZERO = re.compile(r"(?<=[0-9])\.0+(?![0-9])")  # "6.0 eggs"
_LONG_DECIMAL = re.compile(r"\.[0-9]{4}")  # "27.916666666666664 hours": no person would ask that
_FIGURE = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
# A claim is "2 * 3 + 4 = 20/2", without brackets, and not the tail of a longer sum.
_COMMA, _UNITS = re.compile(r"(?<=[0-9]),(?=[0-9]{3})"), re.compile(r"(?<=[0-9%]) ?[A-Za-z][A-Za-z/ ]*(?= [-+*/=])")
_SUM = r"[0-9.]*[0-9]%?(?: ?[-+*/] ?[0-9.]*[0-9]%?)"
_CLAIM = re.compile(rf"(?<![-+*/.(0-9A-Za-z])(?<![-+*/(] )({_SUM}+) ?= ?({_SUM}*)(?! ?[-+*/(0-9%])")
_STEP = re.compile(r"([-+*/]) ?([0-9.]+)(%?)")


def _entry(seed: int) -> dict:
    try:
        import reasoning_gym  # only here: it is optional, and takes a second
    except ImportError as error:
        raise HildaError(f"{name} needs the package reasoning-gym, which cannot be imported ({error}); install it with python -m pip "
                         'install -c constraints.txt -e ".[gym]" (it compiles a little C), or use gsm8k or arithmetic') from error
    # Item 1 of 2: item 0 would draw its template and its first value from the same random number.
    return reasoning_gym.create_dataset(name, size=2, seed=seed)[1]


def _value(expression: str) -> Fraction:
    total = term = Fraction(0)
    for op, digits, percent in _STEP.findall("+" + expression):
        number = Fraction(digits) / (100 if percent else 1)
        if op in "*/":
            term = term * number if op == "*" else term / number
        else:
            total, term = total + term, number if op == "+" else -number
    return total + term


def _claims(text: str) -> list[tuple[str, str]]:
    """Both sides of every plain equation in a worked answer, currencies and units aside."""
    plain = _COMMA.sub("", text.replace("$", "").replace(" x ", " * "))
    return _CLAIM.findall(_UNITS.sub("", plain))


def _sound(item: dict) -> bool:
    """Whether the worked answer holds. Some templates round half a person or pan down, subtract floats, or give a negative age."""
    if "#### -" in item["answer"] or _LONG_DECIMAL.search(item["question"] + item["answer"]):
        return False
    return all(_value(left) == _value(right) for left, right in _claims(item["answer"]))


def _tidy(text: str) -> str:
    return _POINT_ZERO.sub("", text.translate(_ASCII)).strip()


def _draw(rng: random.Random) -> dict:
    while True:
        entry = _entry(rng.getrandbits(48))  # wide: neighbouring seeds of the package share questions
        item = {"question": _tidy(entry["question"].removesuffix(_REQUEST)), "answer": _tidy(entry["metadata"]["answer_cot"])}
        if score(f"#### {normalise(entry['answer'])}", item):  # the package's answer is also where its worked answer ends
            return item


def key(item: dict) -> str:
    """Canonical question: the numbers of question and worked answer, so that the same problem about Ava and about Mia shares a split."""
    return " ".join(_FIGURE.findall(f"{item['question']}\n{item['answer']}"))


def generator() -> str:
    """Package and version that made the questions; the same seed gives the same questions only with the same version."""
    return f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"


def stream(seed: int = 0, split: str = "train") -> Iterator[dict]:
    """Endless items {"question", "answer"} of `split`, in GSM8K's form; repeats are possible. HildaError without reasoning-gym."""
    return filter(_sound, tasks.stream_of(name, _draw, key, split, seed))


def items(split: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """`limit` different questions (default `tasks.DEFAULT_SIZES`). No train question, the names in it changed or not, is in another split."""
    count = tasks.DEFAULT_SIZES[tasks.check_split(split)] if limit is None else limit
    return tasks.items_of(stream(seed, split), prompt, count, STALE_DRAWS)
