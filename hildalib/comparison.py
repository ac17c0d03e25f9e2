"""Two arms at equal tokens per forward: the best accuracy each reaches, and the difference with its interval over seeds.

Entry points: `best_at` (the Pareto step), `difference_curve` and `at_equal_tpf` (numbers), `arms` (figure).
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hildalib import HildaError
from hildalib.intervals import mean_interval
from hildalib.style import GREY, colours, end_labels, need, styled

POINTS = 25  # speeds compared between the slowest and the fastest that both arms reach


def best_at(table: pd.DataFrame, tpf: np.ndarray) -> np.ndarray:
    """Best accuracy among settings of `table` (columns tpf, accuracy) with at least each of the given tokens per forward; nan
    where none is that fast."""
    reached = table.tpf.to_numpy()[None] >= tpf[:, None]
    best = np.where(reached, table.accuracy.to_numpy()[None], -np.inf).max(1)
    return np.where(np.isfinite(best), best, np.nan)


def at_equal_tpf(table: pd.DataFrame, *, reference: str, other: str) -> dict:
    """{"difference", "low", "high", "points", "reference", "tpf"}: mean accuracy of `reference` minus `other` at equal tokens per forward.

    table: columns arm, seed, tpf, accuracy, several settings an arm and seed. In each seed the two best-accuracy steps are
    compared over the speeds both reach; the interval is a 95 % t-interval over seeds (nan with one). tpf: (slowest, fastest).
    """
    need(table, "at_equal_tpf", "arm", "seed", "tpf", "accuracy")
    differences, spans = [], []
    for _, part in table.groupby("seed"):
        first, second = (part[part.arm == name] for name in (reference, other))
        if first.empty or second.empty:
            raise HildaError(f"at_equal_tpf needs rows of both {reference!r} and {other!r} in every seed")
        fastest = min(first.tpf.max(), second.tpf.max())
        slowest = min(max(first.tpf.min(), second.tpf.min()), fastest)  # arms whose speeds do not meet: the slower one's fastest
        speeds = np.linspace(slowest, fastest, POINTS)
        differences.append(float(np.nanmean(best_at(first, speeds) - best_at(second, speeds))))
        spans.append((speeds[0], speeds[-1]))
    mean, low, high = mean_interval(differences)
    return {"difference": mean, "low": low, "high": high, "points": POINTS, "reference": reference, "tpf": (float(np.min(spans)), float(np.max(spans)))}


def difference_curve(table: pd.DataFrame, *, reference: str, other: str) -> pd.DataFrame:
    """`reference` minus `other` at each speed that both arms reach in every seed: columns tpf, difference, low, high (95 % t over seeds)."""
    need(table, "difference_curve", "arm", "seed", "tpf", "accuracy")
    groups = [(part[part.arm == reference], part[part.arm == other]) for _, part in table.groupby("seed")]
    ends = [(max(a.tpf.min(), b.tpf.min()), min(a.tpf.max(), b.tpf.max())) for a, b in groups]
    slowest, fastest = max(low for low, _ in ends), min(high for _, high in ends)
    speeds = np.linspace(min(slowest, fastest), fastest, 4 * POINTS)
    gaps = np.array([best_at(a, speeds) - best_at(b, speeds) for a, b in groups])
    return pd.DataFrame([(speed, *mean_interval(column)) for speed, column in zip(speeds, gaps.T)], columns=["tpf", "difference", "low", "high"])


@styled
def arms(table: pd.DataFrame, verdict: dict | None = None) -> Figure:
    """Best accuracy against tokens per forward: a thin step for each seed, a thick one for their mean, dots for all settings.

    Columns: arm, seed, tpf, accuracy. verdict: what `at_equal_tpf` returned, for the title; with it a lower panel shows the
    difference at each speed, with its interval over seeds.
    """
    need(table, "arms", "arm", "seed", "tpf", "accuracy")
    colour, ends = colours(table.arm), []
    fig, axes = plt.subplots(2 if verdict else 1, 1, figsize=(6.4, 5.2 if verdict else 4.0), sharex=True, squeeze=False,
                             height_ratios=[2.4, 1] if verdict else [1])
    ax, low = axes[0, 0], axes[-1, 0]
    for name, part in table.groupby("arm", sort=False):
        ax.plot(part.tpf, part.accuracy, "o", color=colour[name], markersize=3, alpha=0.45)
        speeds = np.linspace(part.tpf.min(), part.groupby("seed").tpf.max().min(), 200)
        steps = np.array([best_at(group, speeds) for _, group in part.groupby("seed")])
        for step in steps:
            ax.plot(speeds, step, color=colour[name], linewidth=0.6, alpha=0.5)
        ax.plot(speeds, steps.mean(0), color=colour[name], linewidth=2.2)
        ends.append((float(steps.mean(0)[-1]), name, colour[name]))
    low.set_xlabel("tokens per forward (at least)")
    ax.set_ylabel("accuracy")
    end_labels(ax, ends)
    if verdict:
        interval = "" if np.isnan(verdict["low"]) else f" [{verdict['low']:+.3f}, {verdict['high']:+.3f}]"
        ax.set_title(f"at equal tokens per forward: {verdict['reference']} {verdict['difference']:+.3f}{interval}", fontsize=9)
        curve = difference_curve(table, reference=verdict["reference"], other=next(name for name in table.arm.unique() if name != verdict["reference"]))
        low.axhline(0, color=GREY, linewidth=1)
        low.fill_between(curve.tpf, curve.low, curve.high, color=colour[verdict["reference"]], alpha=0.2, linewidth=0, step="mid")
        low.plot(curve.tpf, curve.difference, color=colour[verdict["reference"]], drawstyle="steps-mid")
        low.set_ylabel("difference")
    return fig
