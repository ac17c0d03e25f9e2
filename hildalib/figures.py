"""Table -> figure. Each function draws one table of plain columns and returns the matplotlib figure; no model is run.

Entry points: `lengths`, `attention`, `losses`, `by_rate` + `loss_by_t`, `surface`, `pareto`, `calibration` + `confidence`,
`benchmarks`, `ablation`, from a trace `canvas` and `filmstrip`; `save` stores picture and numbers, `read` gets them back.
A column a figure needs and does not find raises HildaError. Intervals drawn are 95 %.
"""

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hildalib import HildaError
from hildalib.canvas import canvas, cells, filmstrip
from hildalib.curves import attention, by_rate, lengths, loss_by_t, losses
from hildalib.intervals import mean_interval, wilson
from hildalib.style import FAINT, GREY, OKABE, TWIN, colours, end_labels, need, place, read, save, styled

__all__ = ["ablation", "attention", "benchmarks", "by_rate", "calibration", "canvas", "cells", "confidence", "filmstrip",
           "lengths", "loss_by_t", "losses", "mean_interval", "pareto", "read", "save", "surface", "wilson"]


def _bars(ax: Axes, x, y, low, high, colour: str, along: str = "y", **line) -> None:
    draw = ax.vlines if along == "y" else ax.hlines
    draw(x if along == "y" else y, low, high, color=colour, **{"linewidth": 1.6, "alpha": 0.75, **line})


def _threshold(value: float) -> str:
    return f"{value:g}" if value <= 1 else "off"


@styled
def surface(table: pd.DataFrame, *, quality: str = "accuracy",
            presets: Mapping[str, tuple[float, float]] | None = None) -> Figure:
    """Two heat maps over the thresholds. Columns: tau_mask, tau_edit, tpf and the one named by `quality`.

    A threshold over 1 reads "off". Rows without thresholds (the AR twin) are passed over; a pair of thresholds measured twice
    raises HildaError, because a silent mean would mix arms. presets: name -> (tau_mask, tau_edit), outlined in its cell.
    """
    table = need(table, "surface", "tau_mask", "tau_edit", quality, "tpf").dropna(subset=["tau_mask", "tau_edit"])
    twice = table[table.duplicated(["tau_mask", "tau_edit"])]
    if len(twice):
        raise HildaError(f"figure 'surface' has several rows for tau_mask {twice.tau_mask.iloc[0]:g}, tau_edit "
                         f"{twice.tau_edit.iloc[0]:g}; choose one arm and one task, or average over seeds, first.")
    grids = {c: table.pivot(index="tau_mask", columns="tau_edit", values=c).sort_index(ascending=False)
             for c in (quality, "tpf")}
    rows, columns = grids["tpf"].index, grids["tpf"].columns
    fig, axes = plt.subplots(1, 2, figsize=(1.5 * len(columns) + 2.0, 0.5 * len(rows) + 1.4), sharey=True)
    for ax, (name, grid), title in zip(axes, grids.items(), (quality, "tokens per forward (TPF)")):
        image = ax.imshow(grid, aspect="auto")
        ax.set_title(title)
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            named = [k for k, at in (presets or {}).items() if at == (rows[i], columns[j])]
            text = "–" if np.isnan(value) else f"{value:.3f}" if name == quality else f"{value:.2f}"
            ink = GREY if np.isnan(value) else "black" if image.norm(value) > 0.5 else "white"
            ax.text(j, i, " ".join([*named, text]), ha="center", va="center", fontsize=8,
                    fontweight="bold" if named else "normal", color=ink)
            if named:
                ax.add_patch(plt.Rectangle((j - 0.47, i - 0.46), 0.94, 0.92, fill=False, linewidth=2.2,
                                           edgecolor=OKABE["vermillion"]))
        ax.set_xticks(range(len(columns)), [_threshold(v) for v in columns])
        ax.set_xlabel(r"edit threshold $\tau_{edit}$")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [_threshold(v) for v in rows])
    axes[0].set_ylabel(r"mask threshold $\tau_{mask}$")
    return fig


def front(tpf, quality) -> np.ndarray:
    """Indices of the points that no other point beats in both, from slow to fast; of equal points the first."""
    tpf, quality = np.asarray(tpf, dtype=float), np.asarray(quality, dtype=float)
    best, kept = -math.inf, []
    for i in np.lexsort((np.arange(len(tpf)), -quality, -tpf)):
        if quality[i] > best:
            best = quality[i]
            kept.append(i)
    return np.array(kept[::-1], dtype=int)


@styled
def pareto(table: pd.DataFrame, *, quality: str = "accuracy", figsize: tuple[float, float] = (6.4, 4.2)) -> Figure:
    """Quality against tokens per forward, with the front of settings that nothing beats in both.

    Columns: tpf and the one named by `quality`; optional low, high (its interval), tau_mask, tau_edit (label of a front point),
    preset ("S" or "Q" where the row is that preset), arm. Rows of arm "AR twin" become a horizontal band: one token a forward.
    """
    table = need(table, "pareto", quality, "tpf").assign(quality=table.get(quality))
    arms = table.get("arm", pd.Series("dLLM", index=table.index)).fillna("dLLM")
    points, twins = table[arms != TWIN], table[arms == TWIN]
    fig, ax = plt.subplots(figsize=figsize)
    bars = {"low", "high"} <= set(table)
    if bars:
        _bars(ax, points["tpf"], None, points["low"], points["high"], FAINT, linewidth=1.2, alpha=1, zorder=1)
    ax.scatter(points["tpf"], points["quality"], s=22, color=OKABE["sky"], edgecolor="white", linewidth=0.5, zorder=2)
    best = points.iloc[front(points["tpf"], points["quality"])]
    ax.plot(best["tpf"], best["quality"], color=OKABE["blue"], marker="o", markersize=5, zorder=3)
    for twin in twins.itertuples():
        ax.axhline(twin.quality, color="black", linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        if bars:
            ax.axhspan(twin.low, twin.high, color="black", alpha=0.07, linewidth=0, zorder=0)
    preset = points.get("preset", pd.Series("", index=points.index)).fillna("").astype(str)
    named = points[preset != ""]
    ax.scatter(named["tpf"], named["quality"], s=90, facecolor="none", edgecolor=OKABE["vermillion"], linewidth=2, zorder=4)
    ax.set_xlim(0, 1.08 * table["tpf"].max())
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    ax.grid(axis="y")
    ax.set(xlabel="tokens per forward (TPF)", ylabel=quality)
    ax.set_title("Quality against speed")
    for twin in twins.head(1).itertuples():
        end_labels(ax, [(twin.quality, TWIN, "black")])
    labels = [(r.tpf, r.quality, f"preset {preset[r.Index]}", {"fontweight": "bold", "color": OKABE["vermillion"]})
              for r in named.itertuples()]
    if {"tau_mask", "tau_edit"} <= set(points):
        rest = best[~best.index.isin(named.index)]
        labels += [(r.tpf, r.quality, f"{_threshold(r.tau_mask)} / {_threshold(r.tau_edit)}",
                    {"fontsize": 7.5, "color": "#333333"}) for r in rest.itertuples()]
        ax.annotate(r"labels: $\tau_{mask}$ / $\tau_{edit}$", (1, 0.01), xycoords="axes fraction", ha="right", va="bottom",
                    fontsize=7.5, color=GREY)
    place(ax, labels)
    return fig


def calibration(confidence, correct, bins: int = 20) -> pd.DataFrame:
    """Written tokens in equal confidence bins: columns low, high (bin), right, wrong (counts), confidence (mean, nan if empty).

    confidence: (N,) in [0, 1], probability of the token when it was written. correct: (N,) bool, True = it is the right one.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if len(confidence) == 0 or not ((confidence >= 0) & (confidence <= 1)).all():
        raise HildaError("calibration needs at least one confidence, all within [0, 1]; drop prompt and mask positions first.")
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    right, total = np.bincount(index, correct, minlength=bins), np.bincount(index, confidence, minlength=bins)
    edge = np.linspace(0, 1, bins + 1)
    return pd.DataFrame({"low": edge[:-1], "high": edge[1:], "right": right.astype(int), "wrong": count - right.astype(int),
                         "confidence": np.divide(total, count, out=np.full(bins, np.nan), where=count > 0)})


@styled
def confidence(table: pd.DataFrame) -> Figure:
    """Confidence when written, right against wrong tokens, and how far it can be believed. Columns: those of `calibration`.

    The calibration error named in the title is the mean gap |accuracy - confidence| over tokens (ECE).
    """
    need(table, "confidence", "low", "high", "right", "wrong", "confidence")
    count = table["right"] + table["wrong"]
    filled = table[count > 0]
    n, width = count[count > 0], table["high"] - table["low"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.6), width_ratios=[1.25, 1])
    top = 0.0
    for column, colour, style in (("right", "blue", {"alpha": 0.75}), ("wrong", "vermillion", {"fill": False, "hatch": "////"})):
        share = table[column] / max(int(table[column].sum()), 1)
        left.bar(table["low"], share, width, align="edge", edgecolor=OKABE[colour], facecolor=OKABE[colour], **style)
        top = max(top, share.max())
    left.set(xlim=(0, 1), xlabel="confidence when written", ylabel="share of right (of wrong) tokens", ylim=(0, 1.05 * top))
    left.set_title("Right and wrong tokens")
    left.text(0.03, 0.97, f"right: {int(table['right'].sum()):,} tokens", transform=left.transAxes, color=OKABE["blue"], va="top")
    left.text(0.03, 0.89, f"wrong (hatched): {int(table['wrong'].sum()):,} tokens", transform=left.transAxes,
              color=OKABE["vermillion"], va="top")
    accuracy, (low, high) = filled["right"] / n, wilson(filled["right"], n)
    right.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (5, 3)))
    _bars(right, filled["confidence"], None, low, high, OKABE["blue"])
    right.plot(filled["confidence"], accuracy, "o", color=OKABE["blue"], markersize=4.5)
    ece = float(((accuracy - filled["confidence"]).abs() * n).sum() / n.sum())
    right.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence when written", ylabel="share right", aspect="equal")
    right.set_title(f"Calibration (ECE {ece:.3f})")
    return fig


COSTS = {"nfe": ("forwards (NFE)", "{:.0f}"), "tpf": ("tokens per forward", "{:.1f}"), "tokens_per_s": ("tokens / s", "{:.0f}")}


@styled
def benchmarks(table: pd.DataFrame, *, score: str = "accuracy") -> Figure:
    """Dots with intervals, task by task and arm by arm, and beside them what each cost.

    Columns: task, arm ("dLLM S", "dLLM Q", "AR twin"), the one named by `score`, low, high; optional nfe, tpf, tokens_per_s
    (a panel each), as `evaluate.summary` gives them. TPF is read within a task, never across tasks.
    """
    table = need(table, "benchmarks", "task", "arm", score, "low", "high").assign(score=table.get(score))
    costs = [c for c in COSTS if c in table and table[c].notna().any()]
    colour, rows, heads, y = colours(table["arm"]), [], [], 0.0
    for task, part in table.groupby("task", sort=False):
        heads.append((y, str(task)))
        rows += [(y + 1 + i, row) for i, row in enumerate(part.itertuples())]
        y += len(part) + 1.6
    fig, axes = plt.subplots(1, 1 + len(costs), sharey=True, squeeze=False, width_ratios=[3.2] + [1] * len(costs),
                             figsize=(4.6 + 1.5 * len(costs), 0.24 * y + 0.9))
    main, *sides = axes[0]
    for at, row in rows:
        _bars(main, None, at, row.low, row.high, colour[row.arm], along="x")
        main.plot(row.score, at, "o", color=colour[row.arm], markersize=5.5)
        main.annotate(f"{row.score:.3f}", (row.high, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5,
                      color="#333333")
        for ax, cost in zip(sides, costs):
            value = getattr(row, cost)
            ax.hlines(at, 0, value, color=colour[row.arm], linewidth=1, alpha=0.5)
            ax.plot(value, at, "o", color=colour[row.arm], markersize=4)
            ax.annotate("–" if np.isnan(value) else COSTS[cost][1].format(value), (0 if np.isnan(value) else value, at),
                        xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5, color="#333333")
    for at, task in heads:
        main.text(-0.005, at, task, transform=main.get_yaxis_transform(), fontweight="bold", ha="right", va="center")
    main.set_yticks([at for at, _ in rows], [row.arm for _, row in rows])
    for label, (_, row) in zip(main.get_yticklabels(), rows):
        label.set_color(colour[row.arm])
    main.set(ylim=(y - 0.9, -0.6), xlabel=score, xlim=(min(0.0, table["low"].min()), 1.12 * max(table["high"].max(), 0.01)))
    for ax, cost in zip(sides, costs):
        ax.set(xlim=(0, 1.5 * max(table[cost].max(), 1e-9)), xlabel=COSTS[cost][0])
    for ax in axes[0]:
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
    return fig


@styled
def ablation(table: pd.DataFrame, value: str, group: str, *, better: str | None = None, within: tuple = (-np.inf, np.inf)) -> Figure:
    """Which arm is better: a dot per seed, mean and t-interval per arm, and the paired difference to the first arm.

    Columns: `value`, `group`, optional seed; dots of one seed are joined by a hairline. better: "higher" or "lower", written
    on the axis. The difference is taken seed by seed where both arms have it; below three seeds the title says so.
    within: the least and the most that `value` can be, (0, 1) for a share; intervals end there.
    """
    need(table, "ablation", value, group)
    arrows = {"higher": "  (higher is better →)", "lower": "  (← lower is better)", None: ""}
    if better not in arrows:
        raise HildaError(f"better is {better!r}; say 'higher' or 'lower', or leave it out.")
    names, colour = list(dict.fromkeys(table[group])), colours(map(str, table[group]))
    seeds = table.pivot_table(index="seed", columns=group, values=value)[names] if "seed" in table else None
    fig, ax = plt.subplots(figsize=(6.8, 0.48 * len(names) + 1.1))
    if seeds is not None:
        for _, row in seeds.iterrows():
            ax.plot(row, range(len(names)), color=FAINT, linewidth=0.9, zorder=1)
    fewest = min(table.groupby(group)[value].count())
    for y, name in enumerate(names):
        values = table.loc[table[group] == name, value].dropna()
        mean, *ends = mean_interval(values)
        low, high = np.clip(ends, *within)
        ax.plot(values, [y] * len(values), "o", color=colour[str(name)], alpha=0.45, markersize=4, zorder=2)
        _bars(ax, None, y, low, high, colour[str(name)], along="x", linewidth=2.2, zorder=3)
        ax.plot(mean, y, "D", color=colour[str(name)], markersize=6.5, markeredgecolor="white", zorder=4)
        note = f"{mean:#.4g}"
        if seeds is not None and y:
            pairs = (seeds[name] - seeds[names[0]]).dropna()
            note += "   {:+#.3g} [{:+#.3g}, {:+#.3g}]".format(*mean_interval(pairs)) if len(pairs) > 1 else "   too few pairs"
        ax.annotate(note, (1, y), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center",
                    fontsize=8, color="#333333", annotation_clip=False)
    head = "mean" + (f"   paired difference to {names[0]} [95 %]" if seeds is not None and len(names) > 1 else "")
    ax.annotate(head, (1, -0.62), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center",
                fontsize=7.5, color=GREY, annotation_clip=False)
    ax.set_yticks(range(len(names)), [str(n) for n in names])
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    ax.set_xlabel(value + arrows[better])
    ax.set_title(f"{fewest} seeds" if fewest >= 3 else f"{fewest} seed{'s' * (fewest != 1)}: too few for a claim")
    return fig
