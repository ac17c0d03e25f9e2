"""Arms side by side: the best accuracy each reaches at equal tokens per forward, and differences with their intervals over seeds.

Entry points: `both` (the rows of two arms), `best_at` (the Pareto step), `difference_curve` and `at_equal_tpf` (numbers), `arms` (figure);
`forwards`, `spending` and `pareto` (figures: accuracy against what it costs); `differences` (any measure, seed by seed), `at_equal_cost` (beside what
one arm reaches for as much), `paired` (item by item) and `verdicts` (all arms and measures on one page).
"""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from hildalib import HildaError
from hildalib.intervals import mean_interval, sign_test
from hildalib.style import FAINT, FIXED, GREY, OKABE, TWIN, colours, end_labels, need, place, shapes, styled

POINTS = 25  # speeds compared between the slowest and the fastest that both arms reach


def best_at(table: pd.DataFrame, tpf: np.ndarray) -> np.ndarray:
    """Best accuracy among settings of `table` (columns tpf, accuracy) with at least each of the given tokens per forward; nan
    where none is that fast."""
    reached = table.tpf.to_numpy()[None] >= tpf[:, None]
    best = np.where(reached, table.accuracy.to_numpy()[None], -np.inf).max(1)
    return np.where(np.isfinite(best), best, np.nan)


def both(table: pd.DataFrame, reference: str, other: str) -> pd.DataFrame:
    """The rows of two arms, in the seeds that have both: other runs of a profile may have been made with fewer arms."""
    pair = table[table.arm.isin([reference, other])]
    return pair[pair.groupby("seed").arm.transform("nunique") == 2]


def at_equal_tpf(table: pd.DataFrame, *, reference: str, other: str) -> dict:
    """{"difference", "low", "high", "seeds", "points", "reference", "tpf"}: mean accuracy of `reference` minus `other` at equal tokens per forward.

    table: columns arm, seed, tpf, accuracy, several settings an arm and seed. In each seed the two best-accuracy steps are
    compared over the speeds both reach; the interval is a 95 % t-interval over seeds (nan with one). tpf: (slowest, fastest).
    """
    need(table, "at_equal_tpf", "arm", "seed", "tpf", "accuracy")
    gaps, spans = [], []
    for _, part in table.groupby("seed"):
        first, second = (part[part.arm == name] for name in (reference, other))
        if first.empty or second.empty:
            raise HildaError(f"at_equal_tpf needs rows of both {reference!r} and {other!r} in every seed")
        fastest = min(first.tpf.max(), second.tpf.max())
        slowest = min(max(first.tpf.min(), second.tpf.min()), fastest)  # arms whose speeds do not meet: the slower one's fastest
        speeds = np.linspace(slowest, fastest, POINTS)
        gaps.append(float(np.nanmean(best_at(first, speeds) - best_at(second, speeds))))
        spans.append((speeds[0], speeds[-1]))
    mean, low, high = mean_interval(gaps)
    return {"difference": mean, "low": low, "high": high, "seeds": len(gaps), "points": POINTS, "reference": reference, "tpf": (float(np.min(spans)), float(np.max(spans)))}


def difference_curve(table: pd.DataFrame, *, reference: str, other: str) -> pd.DataFrame:
    """`reference` minus `other` at each speed that both arms reach in every seed: columns tpf, difference, low, high (95 % t over seeds)."""
    need(table, "difference_curve", "arm", "seed", "tpf", "accuracy")
    groups = [(part[part.arm == reference], part[part.arm == other]) for _, part in table.groupby("seed")]
    ends = [(max(a.tpf.min(), b.tpf.min()), min(a.tpf.max(), b.tpf.max())) for a, b in groups]
    slowest, fastest = max(low for low, _ in ends), min(high for _, high in ends)
    speeds = np.linspace(min(slowest, fastest), fastest, 4 * POINTS)
    gaps = np.array([best_at(a, speeds) - best_at(b, speeds) for a, b in groups])
    return pd.DataFrame([(speed, *mean_interval(column)) for speed, column in zip(speeds, gaps.T)], columns=["tpf", "difference", "low", "high"])


def _steps(ax, table: pd.DataFrame, colour: dict, x: str, sign: int) -> list[tuple[float, str, str]]:
    """Draws each arm's best accuracy against column x (sign 1: at least that much, -1: at most); its end labels."""
    ends = []
    for name, part in table.groupby("arm", sort=False):
        ax.plot(part[x], part.accuracy, "o", color=colour[name], markersize=3, alpha=0.45)
        part = part.assign(tpf=sign * part[x])
        speeds = np.linspace(part.tpf.min(), part.groupby("seed").tpf.max().min(), 200)
        steps = np.array([best_at(group, speeds) for _, group in part.groupby("seed")])
        for step in steps:
            ax.plot(sign * speeds, step, color=colour[name], linewidth=0.6, alpha=0.5)
        ax.plot(sign * speeds, steps.mean(0), color=colour[name], linewidth=2.2)
        ends.append((float(steps.mean(0)[-1 if sign > 0 else 0]), name, colour[name]))
    return ends


@styled
def forwards(table: pd.DataFrame) -> Figure:
    """Best accuracy with at most so many forwards an answer: a thin step for each seed, a thick one for their mean, dots for all settings.

    Columns: arm, seed, nfe, accuracy. Rows of arm "AR twin" are a dashed line at their mean; its forwards stand in its label.
    """
    need(table, "forwards", "arm", "seed", "nfe", "accuracy")
    drawn, twin = table[table.arm != TWIN], table[table.arm == TWIN]
    fig, ax = plt.subplots(figsize=(6.4, 4.0))
    ends = _steps(ax, drawn, colours(drawn.arm), "nfe", -1)
    if len(twin):
        ax.axhline(twin.accuracy.mean(), color="black", linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        ends.append((twin.accuracy.mean(), f"{TWIN}, {twin.nfe.mean():.1f} forwards", "black"))
    ax.set(xlabel="forwards an answer (at most)", ylabel="accuracy")
    end_labels(ax, ends)
    return fig


@styled
def arms(table: pd.DataFrame, verdict: dict | None = None) -> Figure:
    """Best accuracy against tokens per forward: a thin step for each seed, a thick one for their mean, dots for all settings.

    Columns: arm, seed, tpf, accuracy. verdict: what `at_equal_tpf` returned, for the title; with it a lower panel shows the
    difference at each speed, with its interval over seeds.
    """
    need(table, "arms", "arm", "seed", "tpf", "accuracy")
    colour = colours(table.arm)
    fig, axes = plt.subplots(2 if verdict else 1, 1, figsize=(6.4, 5.2 if verdict else 4.0), sharex=True, squeeze=False,
                             height_ratios=[2.4, 1] if verdict else [1])
    ax, low = axes[0, 0], axes[-1, 0]
    ends = _steps(ax, table, colour, "tpf", 1)
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


def differences(table: pd.DataFrame, value: str, *, reference: str) -> pd.DataFrame:
    """Every other arm minus `reference`, paired by seed: columns arm, difference, low, high (95 % t over seeds), seeds.

    table: columns arm, seed and `value`, one row an arm and seed. Seeds that lack one of the two are left out.
    """
    need(table, "differences", "arm", "seed", value)
    wide = table.pivot(index="seed", columns="arm", values=value)
    if reference not in wide:
        raise HildaError(f"differences needs rows of the arm {reference!r}; the table has {', '.join(map(str, wide))}")
    others = [name for name in dict.fromkeys(table.arm) if name != reference]
    gaps = {name: (wide[name] - wide[reference]).dropna() for name in others}
    rows = [(name, *mean_interval(gap), len(gap)) for name, gap in gaps.items() if len(gap)]
    return pd.DataFrame(rows, columns=["arm", "difference", "low", "high", "seeds"])


def at_equal_cost(table: pd.DataFrame, value: str, cost: str, *, reference: str) -> pd.DataFrame:
    """Every other arm minus what `reference` reaches at the same `cost`, paired by seed: columns arm, difference, low, high (95 % t over seeds), seeds,
    same_sign (the seeds agree on who is ahead).

    table: columns arm, seed, `value` and `cost`, several settings an arm and seed, whose differences are averaged. The settings of `reference` are joined
    by lines; what is cheaper or dearer than all of them is compared with the nearest.
    """
    need(table, "at_equal_cost", "arm", "seed", value, cost)
    gaps: dict[str, list[float]] = {}
    for seed, part in table.groupby("seed"):
        curve = part[part.arm == reference].sort_values(cost)
        if curve.empty:
            raise HildaError(f"at_equal_cost needs rows of the arm {reference!r} in seed {seed}; the table has {', '.join(map(str, part.arm.unique()))}")
        rest = part[part.arm != reference]
        found = (rest[value] - np.interp(rest[cost], curve[cost], curve[value])).groupby(rest.arm, sort=False).mean()
        for name, gap in found.items():
            gaps.setdefault(name, []).append(gap)
    rows = [(name, *mean_interval(gap), len(gap), len({*np.sign(gap)}) == 1) for name, gap in gaps.items()]
    return pd.DataFrame(rows, columns=["arm", "difference", "low", "high", "seeds", "same_sign"])


def paired(table: pd.DataFrame, value: str, *, reference: str) -> pd.DataFrame:
    """`reference` minus every other arm, paired by item: columns arm, items, mean, difference, low, high (95 % t over items), p (`sign_test`).

    table: columns arm, item and `value`, one row an arm and item. Items whose value one of the two lacks are left out.
    """
    need(table, "paired", "arm", "item", value)
    wide = table.pivot(index="item", columns="arm", values=value)
    if reference not in wide:
        raise HildaError(f"paired needs rows of the arm {reference!r}; the table has {', '.join(map(str, wide))}")
    rows = []
    for name in dict.fromkeys(table.arm[table.arm != reference]):
        both = wide[[reference, name]].dropna()
        gaps = both[reference] - both[name]
        rows.append((name, len(both), both[name].mean(), *mean_interval(gaps), sign_test(gaps)))
    return pd.DataFrame(rows, columns=["arm", "items", "mean", "difference", "low", "high", "p"])


@styled
def spending(table: pd.DataFrame, x: str = "nfe", label: str = "forwards an item") -> Figure:
    """Accuracy against forwards, or another cost x: a line an arm, a dot a setting, each the mean over seeds with its interval; a panel for every `base`.

    Columns: base, arm, x, accuracy, low, high. Rows of base "", what the others are measured against, are in every
    panel, grey but for the twin, S and Q; where there are no others they are in colour. Where a panel has more arms than colours, shapes tell them apart.
    """
    need(table, "spending", "base", "arm", x, "accuracy", "low", "high")
    bases = [base for base in dict.fromkeys(table.base) if base] or [""]
    fig, axes = plt.subplots(1, len(bases), figsize=(1.0 + 4.4 * len(bases), 5.0), sharex=True, sharey=True, squeeze=False)
    axes[0, 0].set(xscale="log", ylabel="accuracy", xlim=(0.8 * table[x].min(), 1.6 * table[x].max()))
    axes[0, 0].xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=ScalarFormatter(), minor_locator=NullLocator())
    ends = []
    for ax, base in zip(axes[0], bases):
        panel = table[table.base.isin(["", base])]
        named = colours([*FIXED, *panel.arm[(panel.base != "") | (base == "")]])  # an arm in grey leaves S's and Q's colours to them
        colour, shape = dict.fromkeys(panel.arm, GREY) | named, dict.fromkeys(panel.arm, "o") | shapes(named)
        for name, part in panel.sort_values(x).groupby("arm", sort=False):
            above = 2 + (name in named)  # S and Q may lie where a grey arm lies
            ax.vlines(part[x], part.low, part.high, color=colour[name], linewidth=1.2, alpha=0.5)
            ax.plot(part[x], part.accuracy, f"{shape[name]}-", color=colour[name], markersize=4, zorder=above, label=name)
            last = part.iloc[-1]
            ends.append((ax, (last[x], last.accuracy, name, {"color": colour[name], "fontsize": 8})))
        ax.set(xlabel=label, title=base)
        ax.grid(axis="y")
    for ax in axes[0]:
        _named(ax, [end for where, end in ends if where is ax])
    return fig


def best(table: pd.DataFrame, cost: str, *, less: bool) -> pd.Series:
    """(n,) bool: no row of `table` has a higher accuracy for no more of `cost` (`less`: a small cost is good, else a large one). False without a cost."""
    price = table[cost].to_numpy() * (1 if less else -1)
    accuracy = table.accuracy.to_numpy()
    better = (accuracy[None] >= accuracy[:, None]) & (price[None] <= price[:, None])
    better &= (accuracy[None] > accuracy[:, None]) | (price[None] < price[:, None])
    return pd.Series(~better.any(1) & np.isfinite(price), index=table.index)


@styled
def pareto(table: pd.DataFrame, costs: dict[str, str]) -> Figure:
    """Accuracy of every arm and setting against each of two costs, a panel each: what nothing beats in both is named, with its intervals; the rest is grey.

    Columns: arm, accuracy, low, high, and the costs, a column and its label each (with their intervals in <cost>_low and <cost>_high, where there are any);
    the first is better where it is small, the second where it is large.
    Raises HildaError where a cost has no number at all.
    """
    need(table, "pareto", "arm", "accuracy", "low", "high", *costs)
    if empty := [cost for cost in costs if not np.isfinite(table[cost]).any()]:
        raise HildaError(f"figure 'pareto': column {empty[0]!r} has no number in any row that all runs share; runs of an older version lack it, so run the other seeds again")
    fig, axes = plt.subplots(1, 2, figsize=(11.0, 4.8), sharey=True)
    fronts = [best(table, cost, less=number == 0) for number, cost in enumerate(costs)]
    colour = colours([TWIN, *table.arm[fronts[0] | fronts[1]]])
    shape = shapes(colour)
    for ax, (cost, label), front in zip(axes, costs.items(), fronts):
        ax.plot(table[cost][~front], table.accuracy[~front], "o", color=FAINT, markersize=4)
        first = table[front].sort_values(cost)
        ax.plot(first[cost], first.accuracy, color=GREY, linewidth=1, drawstyle="steps-pre" if cost != next(iter(costs)) else "steps-post", zorder=1)
        for row in first.to_dict("records"):
            ax.vlines(row[cost], row["low"], row["high"], color=colour[row["arm"]], linewidth=1.2, alpha=0.5)
            if f"{cost}_low" in row:
                ax.hlines(row["accuracy"], row[f"{cost}_low"], row[f"{cost}_high"], color=colour[row["arm"]], linewidth=1.2, alpha=0.5)
            ax.plot(row[cost], row["accuracy"], shape[row["arm"]], color=colour[row["arm"]], markersize=5, linestyle="none", label=row["arm"])
        ax.set(xscale="log", xlabel=label, xlim=(0.7 * table[cost].min(), 1.6 * table[cost].max()))
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=ScalarFormatter(), minor_locator=NullLocator())
        ax.grid(axis="y")
    axes[0].set_ylabel("accuracy")
    for ax, cost, front in zip(axes, costs, fronts):
        once = table[front].sort_values("accuracy", ascending=False).drop_duplicates("arm")
        _named(ax, [(row[cost], row["accuracy"], row["arm"], {"color": colour[row["arm"]], "fontsize": 8}) for row in once.to_dict("records")])
    return fig


def _named(ax, points: list[tuple]) -> None:
    """Writes a label beside each of `points` (as for `place`); what finds no room there and is not grey stands in a legend."""
    left = {point[2] for point in points} - {*place(ax, points)}
    lines = {line.get_label(): line for line in ax.lines if line.get_label() in left and line.get_color() != GREY}
    if lines:
        ax.legend(lines.values(), lines, loc="lower right", fontsize=7.5)


SIDES = {"higher": 1, "lower": -1}  # sign of a good difference
TAIL = 0.8  # share of all interval ends that a panel shows in full; what lies beyond is an arrow and its number


@styled
def verdicts(table: pd.DataFrame, *, reference: str) -> Figure:
    """All arms beside `reference`, a panel a measure: a dot and its interval, right of zero where the measure is higher.

    Columns: measure, arm, difference, low, high, better ("higher" or "lower"). Filled blue: better for sure (the interval is on
    that side of zero); filled vermillion: worse for sure; hollow grey: no answer, or a single seed.
    """
    need(table, "verdicts", "measure", "arm", "difference", "low", "high", "better")
    names, measures = list(dict.fromkeys(table.arm)), list(dict.fromkeys(table.measure))
    fig, axes = plt.subplots(1, len(measures), figsize=(1.6 + 2.5 * len(measures), 0.3 * len(names) + 1.2), sharey=True, squeeze=False)
    for ax, measure in zip(axes[0], measures):
        part = table[table.measure == measure]
        edge = 1.15 * float(np.nanquantile(part[["difference", "low", "high"]].abs(), TAIL)) or 1.0
        ax.axvline(0, color=GREY, linewidth=1)
        for row in part.itertuples():
            y, sign = names.index(row.arm), SIDES[row.better]
            good, bad = min(row.low * sign, row.high * sign) > 0, max(row.low * sign, row.high * sign) < 0
            colour = OKABE["blue"] if good else OKABE["vermillion"] if bad else GREY
            ax.plot(np.clip([row.low, row.high], -edge, edge), [y, y], color=colour, linewidth=1.6)
            if abs(row.difference) > edge:
                side = np.sign(row.difference)
                ax.plot(side * edge, y, ">" if side > 0 else "<", color=colour, markersize=6, clip_on=False)
                number = format(row.difference, "+.2g" if abs(row.difference) < 100 else "+.0f")
                ax.annotate(number, (side * edge, y), xytext=(-2 * side, 4), textcoords="offset points", fontsize=7, color=colour, va="bottom", ha="right" if side > 0 else "left")
            else:
                ax.plot(row.difference, y, "o", color=colour, markersize=5, markerfacecolor=colour if good or bad else "white")
        ax.set_xlim(-edge, edge)
        ax.locator_params(axis="x", nbins=5)  # numbers with three decimals would touch
        ax.set_title(f"{fill(measure, 24)}\n({part.better.iloc[0]} is better)", fontsize=8.5)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    fig.supxlabel(f"difference to {reference}, 95 % interval over seeds", fontsize=8)
    return fig
