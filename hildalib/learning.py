"""RL runs side by side: which prompts teach, what each method learns and spends, and how noisy the estimators behind them are.

Entry points: `learning_curves` (logs -> accuracy, cost), `costs` (a row a method), and the figures `prompts`, `curves`, `habits`, `estimators`.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hildalib.style import FAINT, GREY, OKABE, colours, end_labels, need, styled

X_NAMES = {"step": "RL steps", "cpu_seconds": "CPU-seconds", "rollouts": "rollouts"}


def learning_curves(logs: dict[str, pd.DataFrame], starts: dict[str, float], rollouts: int) -> pd.DataFrame:
    """Held-out accuracy of each run at each evaluation, step 0 included: columns arm, step, accuracy, cpu_seconds, rollouts (sums).

    logs: arm -> what `rl.train` returned, its `evaluate` giving "accuracy"; starts: arm -> accuracy before the first step;
    rollouts: completions a step.
    """
    parts = []
    for name, log in logs.items():
        spent = log.assign(cpu_seconds=log.cpu_seconds.cumsum(), rollouts=log.step * rollouts, arm=name)
        first = pd.DataFrame([{"arm": name, "step": 0, "accuracy": starts[name], "cpu_seconds": 0.0, "rollouts": 0}])
        parts.append(pd.concat([first, spent.loc[spent.accuracy.notna(), first.columns]]))
    return pd.concat(parts, ignore_index=True)


def costs(logs: dict[str, pd.DataFrame], rollouts: int) -> pd.DataFrame:
    """One row a run: columns arm, rollouts, cpu_seconds, forwards, learn_positions (sums), and means over steps of what the gradient
    had to work with: equal_groups, entropy, tokens, edits, log_ratio_std, grad_norm (nan where a method has none)."""
    summed, averaged = ["cpu_seconds", "forwards", "learn_positions"], ["equal_groups", "entropy", "tokens", "edits", "log_ratio_std", "grad_norm"]
    rows = []
    for name, log in logs.items():
        log = log.reindex(columns=[*summed, *averaged])
        rows.append({"arm": name, "rollouts": len(log) * rollouts} | log[summed].sum().to_dict() | log[averaged].mean().to_dict())
    return pd.DataFrame(rows)


@styled
def prompts(rates: np.ndarray, group: int) -> Figure:
    """How many prompts the start policy answers with each success rate. rates (n,): shares of right ones among `group` completions."""
    hits = np.rint(np.asarray(rates) * group).astype(int)
    count = np.bincount(hits, minlength=group + 1)
    inside = count[1:group].sum()
    fig, ax = plt.subplots(figsize=(6.4, 3.0))
    ax.bar(range(group + 1), count, width=0.8, color=[FAINT, *[OKABE["blue"]] * (group - 1), FAINT])
    for at, number in enumerate(count):
        ax.annotate(f"{number}", (at, number), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, color=GREY)
    ax.set_xticks(range(group + 1))
    ax.set(xlabel=f"right answers of {group} completions", ylabel="prompts")
    ax.set_title(f"{inside} of {len(hits)} prompts can teach: some answers right, some wrong (blue)")
    return fig


def _means(table: pd.DataFrame, x: str) -> dict[str, pd.DataFrame]:
    """arm -> its mean over seeds at each evaluation: columns step, `x`, accuracy."""
    columns = ["accuracy"] if x == "step" else [x, "accuracy"]
    return {name: part.groupby("step")[columns].mean().reset_index() for name, part in table.groupby("arm", sort=False)}


@styled
def curves(table: pd.DataFrame, *, x: str = "step", apart: tuple[str, ...] = ()) -> Figure:
    """Held-out accuracy against `x` (step, cpu_seconds or rollouts), a panel a method: its seeds thin, their mean thick, the means
    of all others in grey behind. Columns: arm, seed, step, accuracy and the one named by `x`.

    A method whose mean ends below its start is drawn in vermillion. apart: arms with another start (the AR twin): black, not in
    the background of the others, on an axis of the same length around their own values.
    """
    need(table, "curves", "arm", "seed", "step", "accuracy", x)
    means = _means(table, x)
    columns = min(len(means), 5)
    rows = -(-len(means) // columns)
    fig, axes = plt.subplots(rows, columns, sharex=True, squeeze=False, figsize=(2.1 * columns + 0.8, 1.9 * rows + 0.7))
    for ax in axes.flat[len(means):]:
        ax.set_visible(False)
    inside = table.accuracy[~table.arm.isin(apart)] if set(means) - set(apart) else table.accuracy
    margin = max(0.06 * (inside.max() - inside.min()), 0.02)
    low, high = inside.min() - margin, inside.max() + margin
    for ax, (name, mean) in zip(axes.flat, means.items()):
        for other in [value for key, value in means.items() if key not in apart] if name not in apart else []:
            ax.plot(other[x], other.accuracy, color=FAINT, linewidth=0.8, zorder=1)
        lost = mean.accuracy.iloc[-1] < mean.accuracy.iloc[0]
        colour = OKABE["vermillion"] if lost else "black" if name in apart else OKABE["blue"]
        for _, part in table[table.arm == name].groupby("seed"):
            ax.plot(part[x], part.accuracy, color=colour, linewidth=0.7, alpha=0.6, zorder=2)
        ax.plot(mean[x], mean.accuracy, color=colour, linewidth=2.2, zorder=3)
        own = table.accuracy[table.arm == name]
        shift = (own.min() + own.max() - low - high) / 2 if name in apart else 0.0
        ax.set_ylim(low + shift, high + shift)
        ax.set_title(f"{name}\n{100 * mean.accuracy.iloc[0]:.1f} → {100 * mean.accuracy.iloc[-1]:.1f} %", fontsize=8.5, color=colour)
        ax.grid(axis="y")
    fig.supxlabel(X_NAMES[x], fontsize=9)
    fig.supylabel("held-out accuracy", fontsize=9)
    return fig


@styled
def habits(table: pd.DataFrame, *, start: str) -> Figure:
    """What became of two habits: a panel each for the share of answers with a step, and for how many of those are right; a line a method
    from the start to its own mean, its seeds as small dots.

    Columns: arm, seed, worked, right (shares); the rows whose arm is `start` are where the lines begin. Losses are vermillion.
    """
    need(table, "habits", "arm", "seed", "worked", "right")
    names = [name for name in dict.fromkeys(table.arm) if name != start]
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 0.3 * len(names) + 1.3), sharey=True)
    for ax, column, title in zip(axes, ("worked", "right"), ("How many answers are worked out?", "How many of those are right?")):
        origin = table[table.arm == start][column].mean()
        ax.axvline(origin, color="black", linewidth=1)
        for at, name in enumerate(names):
            values = table[table.arm == name][column]
            colour = OKABE["vermillion"] if values.mean() < origin else OKABE["blue"]
            ax.plot([origin, values.mean()], [at, at], color=colour, linewidth=1.6)
            ax.plot(values, [at] * len(values), "o", color=colour, markersize=3, alpha=0.5)
            ax.plot(values.mean(), at, "o", color=colour, markersize=6)
        ax.annotate("start", (origin, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points", va="top", fontsize=8)
        ax.set(xlim=(0, 1.02), xlabel="share")
        ax.set_title(title)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.9)
    return fig


@styled
def estimators(table: pd.DataFrame) -> Figure:
    """What an estimate costs and is worth: its bias with the noise of that mean, and its spread, against noisy copies in the forward.

    Columns: those of `rl.likelihood.audit`. The bias is against what an estimator stands for: the exact block ELBO, for a trajectory
    all the choices that the decoder made.
    """
    need(table, "estimators", "estimator", "copies", "bias", "noise", "std")
    colour = colours(table.estimator)
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.6))
    names = list(colour)
    for at, (name, part) in enumerate(table.groupby("estimator", sort=False)):
        for i, row in enumerate(part.itertuples()):
            y = at + 0.22 * (i - (len(part) - 1) / 2)
            left.plot([row.bias - 2 * row.noise, row.bias + 2 * row.noise], [y, y], color=colour[name], linewidth=1.4)
            left.plot(row.bias, y, "o", color=colour[name], markersize=4)
    left.axvline(0, color=GREY, linewidth=1, zorder=0)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set(xlabel="bias (nats a completion)")
    left.set_title("Is it right on average?")
    ends = []
    for name, part in table[table["std"] > 0].groupby("estimator", sort=False):
        right.plot(part.copies, part["std"], "o-", color=colour[name], markersize=4)
        ends.append((float(part["std"].iloc[-1]), name, colour[name]))
    right.set_xscale("log", base=2)
    right.set_xticks(sorted(table.copies.unique()), [f"{c}" for c in sorted(table.copies.unique())])
    right.minorticks_off()
    right.set_ylim(bottom=0)
    right.grid(axis="y")
    right.set(xlabel="noisy copies in the one forward", ylabel="std of one estimate (nats)")
    right.set_title("How much does one estimate vary?")
    end_labels(right, ends)
    return fig
