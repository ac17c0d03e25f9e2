"""Figures of data and training: table -> figure, drawn before any token is decoded.

Entry points, all in `hildalib.figures` too: `lengths` (documents), `attention` (a mask), `losses` (training curves over
the block-size staircase), `by_rate` + `loss_by_t` (loss per mask rate).
"""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hildalib import HildaError
from hildalib.style import FAINT, GREY, OKABE, colours, end_labels, need, styled


@styled
def lengths(table: pd.DataFrame, *, row_length: int | None = None, efficiency: float | None = None) -> Figure:
    """Histogram of document lengths. Columns: length (tokens), documents (how many of that length; absent = 1 each).

    row_length: positions of one packed row, marked, with the share of positions that hold a token if each document had a
    row of its own. efficiency: that share after packing, in [0, 1].
    """
    count = need(table, "lengths", "length").get("documents", pd.Series(1, index=table.index))
    length, total = table["length"], int(count.sum())
    fig, ax = plt.subplots(figsize=(7.2, 3.4))
    longest = int(max(length.max(), row_length or 0))
    width = -(-(longest + 1) // 40)  # whole tokens: bars of equal width then count equally many lengths
    bins = np.arange(0, longest + 2 * width, width)
    ax.hist(length, bins=bins, weights=count, color=OKABE["blue"], edgecolor="white", linewidth=0.4)
    mean = float((length * count).sum() / total)
    notes = [f"{total:,} documents", f"mean {mean:,.0f} tokens"]
    if row_length:
        ax.axvline(row_length, color=OKABE["vermillion"], linestyle="--", linewidth=1.2)
        ax.annotate(f"packed row: {row_length:,}", (row_length, 1), xycoords=("data", "axes fraction"), ha="center",
                    va="bottom", color=OKABE["vermillion"], fontsize=8)
        alone = float((length.clip(upper=row_length) * count).sum() / (total * row_length))
        notes += ["", "positions that hold a token", f"one document a row: {alone:.1%}"]
    if efficiency is not None:
        notes.append(f"packed: {efficiency:.1%}")
    ax.set_title("Document lengths")
    ax.annotate("\n".join(notes), (1, 1), xycoords="axes fraction", xytext=(10, 0), textcoords="offset points", fontsize=8,
                color="#333333", va="top", linespacing=1.5, annotation_clip=False)
    ax.set(xlabel="document length (tokens)", ylabel="documents", xlim=(0, bins[-1]))
    return fig


@styled
def attention(mask, length: int, block_size: int, doc_ids=None) -> Figure:
    """An attention mask, True = the query (row) may attend to the key (column), with the borders it is made of.

    mask: (..., L, L) or (..., n L, n L) bool; the last part of an n-part layout is clean, the others noisy. Only the first
    item of a batch is drawn. doc_ids: (L,) or (B, L). Table to store: `pandas.DataFrame(mask.astype(int))`.
    """
    mask = np.asarray(mask)
    mask = mask.reshape(-1, *mask.shape[-2:])[0].astype(bool)
    size, parts = mask.shape[0], mask.shape[0] // length
    if mask.shape != (parts * length, parts * length) or not parts:
        raise HildaError(f"attention mask is {mask.shape}, not a whole number of parts of length {length}; check `length`.")
    clean = np.arange(size) // length == parts - 1
    kind = np.where(mask, 1 + clean[:, None].astype(int) * 2 + clean[None, :], 0) if parts > 1 else mask * 4
    fig, ax = plt.subplots(figsize=(5.4, 5.2))
    shades = ["white", OKABE["sky"], OKABE["orange"], OKABE["purple"], OKABE["blue"]]
    ax.imshow(kind, cmap=ListedColormap(shades), vmin=0, vmax=4, extent=(0, size, size, 0))
    lines = {at: (GREY, 0.5, "-") for at in range(0, size + 1, block_size)}
    lines |= {p * length + at: (GREY, 0.5, "-") for p in range(parts) for at in range(0, length, block_size)}
    if doc_ids is not None:
        docs = np.asarray(doc_ids).reshape(-1, length)[0]
        starts = np.flatnonzero(docs[1:] != docs[:-1]) + 1
        lines |= {p * length + int(at): (OKABE["vermillion"], 1.3, "--") for p in range(parts) for at in starts}
    lines |= {p * length: ("black", 2.0, "-") for p in range(parts + 1)}
    for at, (colour, width, dash) in lines.items():
        ax.axhline(at, color=colour, linewidth=width, linestyle=dash, clip_on=False)
        ax.axvline(at, color=colour, linewidth=width, linestyle=dash, clip_on=False)
    # at most about eight numbers a part, or they collide
    every = block_size * max(1, -(-length // (8 * block_size))) * (2 if parts > 2 else 1)
    ticks = [p * length + at for p in range(parts) for at in range(0, length, every)]
    ax.set_xticks([t + 0.5 for t in ticks], [str(t % length) for t in ticks], fontsize=7)
    ax.set_yticks([t + 0.5 for t in ticks], [str(t % length) for t in ticks], fontsize=7)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for part in range(parts if parts > 1 else 0):
        name, middle = (r"clean $x_0$" if part == parts - 1 else r"noisy $x_t$"), (part + 0.5) / parts
        ax.text(middle, 1.015, name, transform=ax.transAxes, ha="center", va="bottom")
        ax.text(1.02, 1 - middle, name, transform=ax.transAxes, ha="left", va="center", rotation=270)
    borders = f"L = {length}, K = {block_size}" + (", dashed: document border" if doc_ids is not None else "")
    ax.set_title(f"May attend ({borders})\n" if parts > 1 else f"May attend ({borders})")
    ax.set(xlabel="key position", ylabel="query position")
    return fig


LOSS_NAMES = {"m2t": "M2T loss", "t2t": "T2T loss", "ar": "next-token loss", "kl": "KL to parent", "loss": "loss"}


def _smooth(values: pd.Series, segment: pd.Series) -> pd.Series:
    """Centred rolling mean over 1/25 of the curve that never mixes stages or block sizes."""
    window = max(len(values) // 25, 3)
    return values.groupby(segment).transform(lambda v: v.rolling(window, center=True, min_periods=1).mean())


@styled
def losses(table: pd.DataFrame, *, parent: float | None = None) -> Figure:
    """Training curves, one panel a loss, and below them the block size on the same steps.

    Columns: step; any of m2t, t2t, ar, kl, loss (nats per token, nan where not measured); optional arm, stage, block_size.
    A row's loss is drawn only if it has no other, since a weighted total compares with nothing.
    parent: next-token loss of the AR parent on the same text, a dashed line in the m2t, ar and loss panels.
    """
    table = need(table, "losses", "step").copy()
    if "loss" in table:
        table["loss"] = table["loss"].where(table.reindex(columns=[c for c in LOSS_NAMES if c != "loss"]).isna().all(axis=1))
    shown = [c for c in LOSS_NAMES if c in table and table[c].notna().any()]
    if not shown:
        raise HildaError(f"figure 'losses' needs one of the columns {', '.join(LOSS_NAMES)} with numbers in it.")
    arms = table.get("arm", pd.Series("", index=table.index))
    colour = colours(arms)
    staircase = "block_size" in table and table["block_size"].notna().any()
    fig, axes = plt.subplots(2 if staircase else 1, len(shown), sharex=True, squeeze=False,
                             figsize=(max(3.3 * len(shown) + 0.6, 5.0), 3.9 if staircase else 3.2),
                             height_ratios=[4.2, 1] if staircase else [1])
    for top, name in zip(axes[0], shown):
        ends, inner = [], []
        for arm, part in table.groupby(arms, sort=False):
            part = part[part[name].notna()].sort_values("step")
            if part.empty:
                continue
            marks = part.reindex(columns=["stage", "block_size"]).astype(object).fillna("")
            segment = (marks != marks.shift()).any(axis=1).cumsum()
            smooth = _smooth(part[name], segment)
            top.plot(part["step"], part[name], color=colour[arm], linewidth=0.6, alpha=0.25)
            for _, piece in smooth.groupby(segment):
                top.plot(part.loc[piece.index, "step"], piece, color=colour[arm])
            ends.append((float(smooth.iloc[-1]), str(arm), colour[arm]))
            inner.append(smooth)
        inner = pd.concat(inner)
        if parent is not None and name in ("m2t", "ar", "loss"):
            top.axhline(parent, color=GREY, linestyle=(0, (5, 3)), linewidth=1.1)
            ends.append((parent, f"parent {parent:.2f}", GREY))
            inner = pd.concat([inner, pd.Series([parent])])
        margin = 0.06 * (inner.max() - inner.min() or 1.0)
        top.set_ylim(inner.min() - margin, inner.max() + margin)  # raw spikes may leave the panel, the trend may not
        top.margins(x=0)
        top.set_title(LOSS_NAMES[name])
        end_labels(top, [e for e in ends if e[1]])
    axes[0, 0].set_ylabel("loss (nats per token)")
    for column, name in zip(axes.T, shown):
        part = table[table[name].notna()]
        _stages(column, part, arms[part.index])
        if staircase:
            _staircase(column[1], part, arms[part.index], colour)
    if staircase:
        axes[1, 0].set_ylabel("block K")
    for low in axes[-1]:
        low.set_xlabel("step")
    return fig


def _stages(column: np.ndarray, table: pd.DataFrame, arms: pd.Series) -> None:
    """Stage borders as hairlines, named at the top of the panel; taken from the first arm that passes several."""
    if "stage" not in table:
        return
    rows = next((t for _, t in table.groupby(arms, sort=False) if t["stage"].nunique() > 1), None)
    if rows is None:
        return
    starts = rows.dropna(subset="stage").sort_values("step").groupby("stage", sort=False)["step"].min()
    for at in starts.iloc[1:]:
        for ax in column:
            ax.axvline(at, color=FAINT, linewidth=1, zorder=0)
    ends = [*starts.iloc[1:], table["step"].max()]
    for stage, left, right in zip(starts.index, starts, ends):
        column[0].text((left + right) / 2, 0.985, stage, transform=column[0].get_xaxis_transform(), ha="center", va="top",
                       fontsize=7.5, color=GREY)


def _staircase(ax: plt.Axes, table: pd.DataFrame, arms: pd.Series, colour: Mapping[str, str]) -> None:
    """Block size of the arms of this panel; one grey line where all follow the same schedule."""
    steps = {arm: t.dropna(subset="block_size").sort_values("step")[["step", "block_size"]].to_numpy()
             for arm, t in table.groupby(arms, sort=False)}
    steps = {arm: s for arm, s in steps.items() if len(s)}
    if not steps:
        ax.text(0.5, 0.5, "no blocks", transform=ax.transAxes, ha="center", va="center", fontsize=7.5, color=GREY)
        ax.set_yticks([])
        return
    same = len({s.tobytes() for s in steps.values()}) == 1
    for arm, (x, y) in ((arm, s.T) for arm, s in steps.items()):
        ax.plot(x, y, drawstyle="steps-post", color=GREY if same else colour[arm], linewidth=1.3)
    sizes = sorted(table["block_size"].dropna().unique())
    marks = sizes if len(sizes) <= 3 else [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
    ax.set_yscale("log", base=2)
    ax.set_ylim(sizes[0] / 1.6, sizes[-1] * 1.6)
    ax.set_yticks(marks, [f"{m:g}" for m in marks])
    ax.minorticks_off()


def by_rate(log: pd.DataFrame, rows: int = 20) -> pd.DataFrame:
    """The table of `loss_by_t` from a training log: mean of each column m2t_t<upper edge> over its last `rows` entries.

    Columns: t (centre of the bucket), loss. Raises HildaError for a log without such columns.
    """
    edges = sorted(float(c.removeprefix("m2t_t")) for c in log.columns if c.startswith("m2t_t"))
    if not edges:
        raise HildaError("the training log has no columns m2t_t<rate>; it was not written by the diffusion trainer.")
    means = [log[f"m2t_t{edge:.2f}"].dropna().tail(rows).mean() for edge in edges]
    return pd.DataFrame({"t": [(low + high) / 2 for low, high in zip([0.0, *edges], edges)], "loss": means})


@styled
def loss_by_t(table: pd.DataFrame) -> Figure:
    """Loss against mask rate. Columns: t (centre of the bucket), loss (nats per masked token); optional low, high, arm."""
    need(table, "loss_by_t", "t", "loss")
    arms = table.get("arm", pd.Series("", index=table.index))
    colour, ends = colours(arms), []
    fig, ax = plt.subplots()
    for arm, part in table.groupby(arms, sort=False):
        part = part.sort_values("t")
        if {"low", "high"} <= set(part):
            ax.fill_between(part["t"], part["low"], part["high"], color=colour[arm], alpha=0.15, linewidth=0)
        ax.plot(part["t"], part["loss"], color=colour[arm], marker="o", markersize=4)
        ends.append((float(part["loss"].iloc[-1]), str(arm), colour[arm]))
    ax.grid(axis="y")
    ax.set(xlabel="mask rate t (share of the block that is masked)", ylabel="loss (nats per masked token)", xlim=(0, 1))
    ax.set_title("What the mask rate costs")
    end_labels(ax, [e for e in ends if e[1]])
    return fig
