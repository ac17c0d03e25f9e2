"""95 % intervals: of a proportion (Wilson) and of a mean over seeds or items (Student's t); and a test of paired differences that assumes no
distribution, for scores that are seldom 1. Entry points: `wilson`, `mean_interval`, `sign_test`."""

import math
from fractions import Fraction

import numpy as np


def wilson(successes, trials, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Wilson score interval of a proportion, elementwise; z = 1.959964 is 95 %. No trials give nan."""
    n = np.where(np.asarray(trials) > 0, trials, np.nan).astype(float)
    p = np.asarray(successes) / n
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t. With x = sqrt(v) tan(a) the density of a is cos(a)^(v-1), smooth and bounded."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    middle = (angle[1:] + angle[:-1]) / 2
    weight = np.cos(middle) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(weight) / weight.sum()])
    return math.sqrt(freedom) * math.tan(np.interp(0.975, share, angle))


def mean_interval(values) -> tuple[float, float, float]:
    """(mean, low, high), Student's t over the values (one a seed); a single value has no interval (nan)."""
    values = np.asarray(values, dtype=float)
    half = t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def sign_test(differences) -> float:
    """Two-sided exact p of as uneven a split of the signs if both were as likely; zeros and nan say nothing. For 0/1 scores: McNemar's exact test."""
    differences = np.asarray(differences, dtype=float)
    more, fewer = int((differences > 0).sum()), int((differences < 0).sum())
    tail = sum(math.comb(more + fewer, k) for k in range(min(more, fewer) + 1))
    return min(1.0, float(Fraction(2 * tail, 2 ** (more + fewer))))
