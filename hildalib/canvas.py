"""Trace -> drawing: what stood at every position of the canvas, and how the threshold-edit loop wrote it.

Entry points: `cells` (trace -> table, the numbers behind each picture), `canvas` (one step as a grid of token cells),
`filmstrip` (one row per forward), `visible` (a token made readable). Nothing here knows a model: a trace and strings do.
Every state has a sign besides its colour: mask hatched, draft dashed, edited thick and underlined, committed solid.
"""

from collections.abc import Callable, Sequence
from functools import cache

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import ScaledTranslation

from hildalib import HildaError
from hildalib.style import GREY, OKABE, styled

STATES = ("PROMPT", "MASK", "DRAFT", "EDITED", "COMMITTED")  # index = state code of a trace
# Okabe-Ito hues, lightened where black text stands on them
FILL = {"PROMPT": "#EDEDED", "MASK": "#8A8A8A", "DRAFT": "#A9D8F5", "EDITED": "#F2A36B", "COMMITTED": "#6CC4A4"}
EDGE = {"PROMPT": "#D0D0D0", "MASK": "#5A5A5A", "DRAFT": OKABE["blue"], "EDITED": "#8F3B00", "COMMITTED": "#00664B"}
MASK_SIGN = "▒"
Tokens = Sequence[str] | Callable[[int], str]


def visible(text: str) -> str:
    """`text` with every invisible character shown: newline ⏎, space ·, tab ⇥, other controls as their pictures."""
    if text == "":
        return "∅"
    shown = text.replace("\r\n", "⏎").replace("\n", "⏎").replace(" ", "·").replace("\t", "⇥")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 0x20 else "␡" if c == "\x7f" else c for c in shown)


@cache
def _shades() -> list[tuple[str, str]]:
    fill = mpl.colormaps["cividis"](np.linspace(0, 1, 101))[:, :3]
    linear = np.where(fill <= 0.04045, fill / 12.92, ((fill + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722] > 0.179  # where black and white text contrast equally (WCAG 2.1)
    return [(to_hex(c), "#000000" if is_light else "#FFFFFF") for c, is_light in zip(fill, light)]


def shade(confidence: float) -> tuple[str, str]:
    """(cell colour, text colour) of a confidence in [0, 1] on cividis."""
    return _shades()[round(100 * min(max(float(confidence), 0.0), 1.0))]


def _row(trace, row: int, *steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    ids = np.asarray(trace.ids)
    entries, rows = ids.shape[:2]
    if not 0 <= row < rows:
        raise HildaError(f"row {row} is not in this trace, which holds rows 0 to {rows - 1}.")
    for step in steps:
        if not 0 <= step < entries:
            raise HildaError(f"step {step} is not in this trace; it holds the canvas at steps 0 to {entries - 1}.")
    return (ids[:, row], *(np.asarray(part)[:, row] for part in (trace.state, trace.confidence, trace.forward)))


def cells(trace, steps: int | Sequence[int], tokens: Tokens, row: int = 0) -> pd.DataFrame:
    """One line per (step, position) of one row of the trace: what a drawing of these steps shows.

    tokens: strings by id, or a callable id -> string (such as `lambda i: tokenizer.decode([i])`). Columns: step, position,
    block, id, text (visible), state (name), confidence (nan for prompt and mask), forward (number of the forward that
    wrote the token standing there; -1 for prompt and mask). Step 0 is the canvas before the first forward. Raises
    HildaError for a step or row outside the trace.
    """
    wanted = [steps] if isinstance(steps, (int, np.integer)) else list(steps)
    ids, state, confidence, forward = _row(trace, row, *wanted)
    text = cache(lambda i: visible(tokens(i) if callable(tokens) else tokens[i]))
    both_nan = np.isnan(confidence[1:]) & np.isnan(confidence[:-1])
    rewritten = (ids[1:] != ids[:-1]) | ((confidence[1:] != confidence[:-1]) & ~both_nan)  # (S, T)
    position, frames = np.arange(ids.shape[1]), []
    for step in wanted:
        last = np.maximum.reduce(np.where(rewritten[:step], np.arange(1, step + 1)[:, None], 0), axis=0, initial=0)  # (T,)
        filled = state[step] > STATES.index("MASK")
        names = [STATES[s] for s in state[step]]
        frames.append(pd.DataFrame({
            "step": step, "position": position, "block": position // trace.block_size, "id": ids[step],
            "text": [MASK_SIGN if n == "MASK" else text(int(i)) for n, i in zip(names, ids[step])], "state": names,
            "confidence": confidence[step], "forward": np.where(filled, forward[last], -1)}))
    return pd.concat(frames, ignore_index=True)


def tally(trace, step: int, row: int = 0) -> dict[str, int]:
    """How many positions of the canvas stand in each state at `step`, in the order of STATES."""
    state = _row(trace, row, step)[1]
    return {name: int((state[step] == code).sum()) for code, name in enumerate(STATES)}


@cache
def _drawable(character: str) -> bool:
    return get_font(findfont("DejaVu Sans Mono")).get_char_index(ord(character)) > 0


def _fit(text: str, room: int) -> str:
    """`text` in at most `room` characters that the font has."""
    text = "".join(c if _drawable(c) else "□" for c in text)
    return text if len(text) <= room else text[:max(room - 1, 1)] + "…" if room > 1 else text[:room]


def _cell(ax: Axes, x: float, y: float, item, colour: str, room: int, size: float, border: float = 1.0) -> None:
    """One token cell, 1 x 0.86 data units with its lower left corner at (x, y)."""
    state, edited = item.state, item.state == "EDITED"
    scored = colour == "confidence" and item.confidence == item.confidence
    fill, ink = shade(item.confidence) if scored else (FILL[state], "#666666" if state == "PROMPT" else "#000000")
    style = {"DRAFT": (0, (2.5, 1.5))}.get(state, "-")
    ax.add_patch(Rectangle((x + 0.04, y), 0.92, 0.86, facecolor=fill, edgecolor=EDGE[state], linestyle=style,
                           linewidth=(2.0 if edited else 0.9) * border, hatch="////" if state == "MASK" else None))
    if state == "MASK" or room < 1:
        return
    ax.text(x + 0.5, y + 0.44, _fit(item.text, room), ha="center", va="center", color=ink, fontsize=size,
            family="monospace", fontweight="bold" if edited else "normal", clip_on=True, parse_math=False)
    if edited:
        ax.plot([x + 0.2, x + 0.8], [y + 0.13, y + 0.13], color=ink, linewidth=1.1 * border, solid_capstyle="butt")


def _key(ax: Axes, colour: str, below: float) -> None:
    """States `below` points under the axes, and the confidence scale where cells are coloured by it."""
    marks = [Patch(facecolor="white" if colour == "confidence" and s in ("DRAFT", "EDITED", "COMMITTED") else FILL[s],
                   edgecolor=EDGE[s], linestyle=(0, (2.5, 1.5)) if s == "DRAFT" else "-",
                   linewidth=2 if s == "EDITED" else 0.9, hatch="////" if s == "MASK" else None, label=s.lower())
             for s in STATES]
    # anchored to the axes: a legend "outside" the figure moves when a provenance line is cut in below it
    drop = ScaledTranslation(0, -below / 72, ax.get_figure().dpi_scale_trans)
    ax.legend(handles=marks, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=ax.transAxes + drop, ncols=5,
              handlelength=1.6, columnspacing=1.8, borderaxespad=0)
    if colour == "confidence":
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "cividis")
        bar = ax.get_figure().colorbar(scale, ax=ax, fraction=0.025, pad=0.01, aspect=18)
        bar.set_label("confidence")
        bar.outline.set_visible(False)


def _checked(colour: str) -> str:
    if colour not in ("state", "confidence"):
        raise HildaError(f"colour is {colour!r}; a canvas is coloured by 'state' or by 'confidence'.")
    return colour


def summary(trace, step: int, row: int = 0) -> str:
    """Headline of a canvas: which forward, how far."""
    _, state, _, forward = _row(trace, row, step)
    count, total = tally(trace, step, row), int((state[step] != 0).sum())
    when = "before the first forward" if step == 0 else f"after forward {forward[step]} of {forward[-1]}"
    return f"{when}: {total - count['MASK']} of {total} tokens written, {count['EDITED']} edited"


@styled
def canvas(trace, step: int, tokens: Tokens, row: int = 0, *, colour: str = "state", columns: int = 16) -> Figure:
    """The canvas after `step` forwards: a grid of token cells, `columns` a line, blocks parted by dark bars.

    colour: "state" or "confidence" (cividis; prompt and mask stay grey). Table to store: `cells(trace, step, tokens, row)`.
    """
    table = cells(trace, step, tokens, row)
    columns = min(columns, len(table))
    lines = -(-len(table) // columns)
    wide = max(0.64 * columns, 4.8)  # 0.64 inch holds eight characters of 7-point monospace
    fig, ax = plt.subplots(figsize=(wide, 0.36 * lines + 0.75))
    for item in table.itertuples():
        x, y = item.position % columns, -(item.position // columns)
        _cell(ax, x, y, item, _checked(colour), room=8, size=7)
        if item.position % trace.block_size == 0:
            ax.plot([x, x], [y - 0.06, y + 0.92], color="black", linewidth=2.2, solid_capstyle="butt", clip_on=False)
    ax.set(xlim=(-0.05, columns + 0.05), ylim=(-lines + 0.9, 1), title=f"Canvas {summary(trace, step, row)}")
    ax.set_yticks([0.43 - n for n in range(lines)], [str(n * columns) for n in range(lines)])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_ylabel("position", fontsize=7.5, color=GREY)
    _key(ax, colour, below=5)
    return fig


def even(entries: int, most: int) -> list[int]:
    """At most `most` steps out of range(entries), evenly spread, first and last included."""
    return sorted(set(np.linspace(0, entries - 1, min(entries, most)).round().astype(int).tolist()))


@styled
def filmstrip(trace, tokens: Tokens, steps: Sequence[int] | None = None, row: int = 0, *, colour: str = "state",
              positions: slice | None = None) -> Figure:
    """The canvas step by step, one line of cells per forward, with what each forward wrote and edited at its right.

    steps: trace entries to show; None takes 16 evenly spread, first and last included. positions: part of the canvas; None
    is everything after the prompt. Counts at the right compare with the line above. Table to store: `cells(trace, steps, ...)`.
    """
    steps = even(len(trace.ids), 16) if steps is None else list(steps)
    table = cells(trace, steps, tokens, row)
    span = range(np.asarray(trace.ids).shape[2])[positions or slice(int(np.asarray(trace.prompt_length)[row]), None)]
    if not len(span):
        raise HildaError(f"positions {positions} of this canvas are empty; choose a slice with at least one position.")
    wide = min(max(0.5 * len(span), 4.8), 12.0)  # inches: a page, not a scroll
    room, size = int(wide / len(span) * 0.92 * 72 / (0.6 * 6.5)), 6.5  # monospace is 0.6 em wide
    fig, ax = plt.subplots(figsize=(wide + 2.2, 0.27 * len(steps) + 0.75))
    before = None
    for line, (step, frame) in enumerate(table.groupby("step", sort=False)):
        frame = frame.iloc[list(span)].reset_index(drop=True)
        for place, item in enumerate(frame.itertuples()):
            _cell(ax, place, -line, item, _checked(colour), room if room > 3 else 0, size, border=min(1.0, 12 / len(span) + 0.4))
        if before is not None:
            written = int(((before.state == "MASK") & (frame.state != "MASK")).sum())
            back = int(((before.state != "MASK") & (frame.state == "MASK")).sum())
            edited = int(((before.state != "MASK") & (frame.state != "MASK") & (before.id != frame.id)).sum())
            note = ", ".join([f"+{written}"] * bool(written) + [f"{edited} edited"] * bool(edited) + [f"{back} masked again"] * bool(back)) or "–"
            ax.text(len(span) + 0.015 * len(span), 0.43 - line, note, va="center", fontsize=7, color="#333333")
        before = frame
    for place, position in enumerate(span):
        if position % trace.block_size == 0:
            ax.axvline(place, color="black", linewidth=1.8, zorder=3)
    number = _row(trace, row)[3]
    ax.set_yticks([0.43 - n for n in range(len(steps))], ["start" if s == 0 else f"forward {number[s]}" for s in steps])
    places = [p for p, at in enumerate(span) if at % trace.block_size == 0]
    places = places if places and places[0] < 3 else [0, *places]  # two numbers nearer than that run into each other
    ax.set_xticks([p + 0.5 for p in places], [str(span[p]) for p in places])
    ax.set(xlim=(-0.1, len(span) + 0.1), ylim=(0.92 - len(steps), 1), xlabel="position (blocks parted by dark lines)")
    ax.set_title("Canvas, one line a forward")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _key(ax, colour, below=34)  # past tick labels and axis label
    return fig
