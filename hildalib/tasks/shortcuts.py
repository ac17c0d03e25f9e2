"""Arithmetic chains with two habits to choose between: of the demonstrations some are worked out, the others give the answer at once.

The questions are those of `arithmetic`; a hash of the question decides how its demonstration answers, and both ways score if they are
right. A model that learned from both and cannot do two operations in its head is right far more often when it works: what a
verifiable reward can bring out without teaching anything new. Entry points: `items`, `stream`, `prompt`, `response`, `answer`, `worked`,
`score`, `sound`.
"""

from __future__ import annotations

import hashlib
import os

from hildalib.tasks import arithmetic
from hildalib.tasks.arithmetic import answer, items, key, prompt, stream

name = "shortcuts"
version = 1

AT_ONCE = 55  # of 100 demonstrations: the start then answers at once more often than not, and both ways are sampled

__all__ = ["answer", "items", "name", "prompt", "response", "score", "sound", "stream", "version", "worked"]


def _shown_at_once(item: dict) -> bool:
    digest = hashlib.sha256(f"at once {key(item)}".encode()).digest()  # not the hash that splits questions, which would keep one habit from a split
    return int.from_bytes(digest[:8], "big") % 100 < AT_ONCE


def response(item: dict) -> str:
    """"17+25=42;42-8=34;34", or "34" for the questions whose demonstration takes the short way."""
    worked_out = arithmetic.response(item)
    return answer(worked_out) if _shown_at_once(item) else worked_out


def worked(text: str) -> bool:
    """True = the text has a step, whether it is right or not."""
    return ";" in text


def score(text: str, item: dict) -> float:
    """1.0 if what follows the last ';', or all of a text without one, is the right answer (outer white space aside), else 0.0."""
    return float(isinstance(text, str) and answer(text) == answer(arithmetic.response(item)))


def sound(text: str, item: dict) -> int:
    """Characters of `text` before it leaves both right ways to answer."""
    worked_out = arithmetic.response(item)
    return max(len(os.path.commonprefix([text, way])) for way in (worked_out, answer(worked_out)))
