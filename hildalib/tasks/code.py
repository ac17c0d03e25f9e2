"""What the code benchmarks share: finding the program in a model's text, scoring many texts, and pass@k.

Texts are only cut by lines here, never parsed or executed: that is the sandbox's work.
Entry points: `block`, `until`, `scores`, `pass_at_k`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from hildalib import HildaError, sandbox

LONGEST = 20_000  # characters of an answer that are looked at: the longest gold program has about 1,500
_FENCED = re.compile(r"^[ \t]{0,3}```[^\n]*\n(.*?)(?:^[ \t]{0,3}```|\Z)", re.MULTILINE | re.DOTALL)
_BEGINS_WITH_CODE = re.compile(r"(?:[ \t]*\n)*(?:  |\t|def |class |import |from |@)")
# What a base model writes at the left margin when it goes on after the function it was asked for.
AFTER_FUNCTION = re.compile(r"^(?:def |class |if |print\(|assert |import |from |#|@|```|<\|)", re.MULTILINE)
AFTER_PROGRAM = re.compile(r"^(?:if __name__|print\(|assert |```|\[DONE\]|<\|)", re.MULTILINE)


def block(text: str) -> str:
    """The first fenced code block of `text`; `text` itself where there is none, or where it begins with code (a fence then ends it)."""
    found = None if _BEGINS_WITH_CODE.match(text) else _FENCED.search(text)
    return found.group(1) if found else text


def until(stop: re.Pattern, text: str) -> str:
    """`text` before the first match of `stop` that is not at its very beginning."""
    found = stop.search(text, 1) if text else None
    return text[:found.start()] if found else text


def scores(job: Callable[[str, dict], dict], label: str, texts: Sequence[str], items: Sequence[dict]) -> list[float]:
    """1.0 for each text whose program passes every test of its item, else 0.0, several at once, in order.

    job(text, item): the arguments of `sandbox.run` that judge it. HildaError where code cannot be contained, or the lengths differ.
    """
    if len(texts) != len(items):
        raise HildaError(f"{len(texts)} texts for {len(items)} items; give one text an item")
    places = [place for place, text in enumerate(texts) if isinstance(text, str)]
    found = [0.0] * len(texts)
    for place, result in zip(places, sandbox.run_many([job(texts[place], items[place]) for place in places], label=label)):
        found[place] = float(result.ok)
    return found


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of `samples` answers, drawn without replacement, hold one of the `correct` ones: unbiased for pass@k.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021, arXiv:2107.03374, equation 1. HildaError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise HildaError(f"pass@{k} of {samples} samples, {correct} correct: needs 0 <= correct <= samples and 1 <= k <= samples")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)
