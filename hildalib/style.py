"""The look and the shelf of every figure: one style, one palette, one way to store picture and numbers together.

Entry points: `styled` (decorator: draw under hilda.mplstyle), `save` (PNG + CSV of the numbers drawn), `read` (that CSV
back, provenance included), `OKABE` and `colours` and `shapes` (names -> colours, markers), `need` (a table has its columns, or HildaError).
"""

import functools
import io
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from csv import QUOTE_NONNUMERIC
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from hildalib import HildaError, paths

STYLE = Path(__file__).with_name("hilda.mplstyle")
OKABE = {"blue": "#0072B2", "vermillion": "#D55E00", "green": "#009E73", "purple": "#CC79A7", "orange": "#E69F00",
         "sky": "#56B4E9", "yellow": "#F0E442", "black": "#000000"}
GREY, FAINT = "#777777", "#D9D9D9"
TWIN = "AR twin"  # arm name of the autoregressive twin in every table
FIXED = {TWIN: OKABE["black"], "dLLM S": OKABE["vermillion"], "dLLM Q": OKABE["blue"]}  # same arm, same colour, any figure


def styled(draw):
    """`draw` run under hilda.mplstyle, whatever the caller's own settings are."""
    @functools.wraps(draw)
    def under_style(*args, **kwargs):
        with plt.style.context(STYLE):
            return draw(*args, **kwargs)
    return under_style


def colours(names: Iterable[str]) -> dict[str, str]:
    """Colour of each name, in order of appearance; S, Q and the AR twin keep theirs. From the seventh other name on (fewer beside S and Q) colours repeat."""
    names = list(dict.fromkeys(names))
    free = [c for c in list(OKABE.values())[:6] if c not in {FIXED[n] for n in names if n in FIXED}]
    spare = [n for n in names if n not in FIXED]
    return {**{n: FIXED[n] for n in names if n in FIXED}, **{n: free[i % len(free)] for i, n in enumerate(spare)}}


def shapes(colour: Mapping[str, str]) -> dict[str, str]:
    """Marker of each name in `colour`: a dot, but where names share a colour a square, a triangle and a diamond for the second, third and fourth of it."""
    alike = {tone: [name for name, own in colour.items() if own == tone] for tone in colour.values()}
    return {name: "os^D"[alike[tone].index(name) % 4] for name, tone in colour.items()}


def need(table: pd.DataFrame, figure: str, *columns: str) -> pd.DataFrame:
    """`table` unchanged; HildaError where it is empty or lacks one of `columns`."""
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise HildaError(f"figure '{figure}' needs column(s) {', '.join(missing)}; the table has "
                         f"{', '.join(map(str, table.columns)) or 'none'}. Add them where the table is made.")
    if table.empty:
        raise HildaError(f"figure '{figure}' got a table without rows; run the step that fills it first.")
    return table


def end_labels(ax: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write (y in data units, text, colour) right of the axes, moved apart where lines end close to each other."""
    gap = 10.5 / (ax.get_position().height * ax.get_figure().get_figheight() * 72)  # 8-point text needs 10.5 points
    to_axes = ax.transAxes.inverted()
    ax.get_ylim()  # settles limits that what was drawn last has moved; transforms do not
    rows = sorted((float(to_axes.transform(ax.transData.transform((0, y)))[1]), text, colour) for y, text, colour in labels)
    heights = [row[0] for row in rows]
    for _ in range(100):  # neighbours push each other apart by halves; a hundred rounds settle a dozen labels
        for i in range(len(heights) - 1):
            lack = max(gap - (heights[i + 1] - heights[i]), 0) / 2
            heights[i], heights[i + 1] = heights[i] - lack, heights[i + 1] + lack
    for at, (_, text, colour) in zip(heights, rows):
        ax.annotate(text, (1, at), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points",
                    va="center", color=colour, fontsize=8, annotation_clip=False)


def place(ax: Axes, points: list[tuple[float, float, str, dict]]) -> list[str]:
    """Label (x, y, label, text style) in order of importance where there is room; what would overlap is left out.

    Returns the labels written. The limits of `ax` must be final.
    """
    figure = ax.get_figure()
    figure.draw_without_rendering()
    frame, taken, written = ax.get_window_extent(), [], []
    centres = [ax.transData.transform(p[:2]) for p in points]
    for (x, y, label, look), centre in zip(points, centres):
        for dx, dy, ha, va in ((6, 4, "left", "bottom"), (-6, 4, "right", "bottom"), (6, -4, "left", "top"),
                               (-6, -4, "right", "top"), (0, 8, "center", "bottom"), (0, -8, "center", "top")):
            note = ax.annotate(label, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va,
                               path_effects=[withStroke(linewidth=2.5, foreground="white")], **look)
            box = note.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            clear = not any(box.overlaps(other) for other in taken) and not any(
                box.padded(3).contains(*c) for c in centres if c is not centre)
            if inside and clear:
                taken.append(box)
                written.append(label)
                break
            note.remove()
    return written


@styled
def save(fig: Figure, name: str, table: pd.DataFrame, *, profile: str, seed: int = 0,
         provenance: Mapping[str, object] | None = None) -> Path:
    """Write `<name>.png` (120 dpi) and `<name>.csv` (the numbers drawn) into the figure folder; path of the PNG.

    provenance: what the numbers were made from (model, data, seeds, device ...): a grey line under the figure and leading
    `# key: value` lines in the CSV; None takes `table.attrs["provenance"]`, which `read` fills. Equal input gives equal
    bytes. Both files are complete before either replaces an older one. Raises HildaError for a name that is no file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise HildaError(f"figure name {name!r} is no portable file name; use letters, digits, '-', '_' and '.'.")
    facts = {k: " ".join(str(v).split()) for k, v in (provenance or table.attrs.get("provenance", {})).items()}
    for old in [t for t in fig.texts if t.get_gid() == "provenance"]:
        old.remove()
    width = int(fig.get_figwidth() * 19)  # 6.5-point DejaVu Sans sets about 19 characters an inch
    line = "\n".join(textwrap.wrap(" · ".join(f"{k}: {v}" for k, v in facts.items()), width))
    fig.draw_without_rendering()  # now the layout is final and the lowest ink known
    below = min(fig.get_tightbbox().y0, 0) - 0.06  # inches
    fig.text(0.01, below / fig.get_figheight(), line, fontsize=6.5, color=GREY, va="top", gid="provenance")
    picture, folder = io.BytesIO(), paths.figure_dir(profile, seed)
    fig.savefig(picture, format="png", metadata={"Software": None})  # no version, no date: bytes repeat
    head = "".join(f"# {k}: {v}\n" for k, v in facts.items())
    # quoted strings: a '#' inside one is then no comment to pandas.read_csv(comment="#")
    numbers = head + table.to_csv(index=False, quoting=QUOTE_NONNUMERIC, lineterminator="\n")
    ready = []
    for suffix, content in ((".csv", numbers.encode("utf-8")), (".png", picture.getvalue())):
        part = folder / f".{name}{suffix}.{os.getpid()}.part"
        part.write_bytes(content)
        ready.append((part, folder / f"{name}{suffix}"))
    for part, final in ready:
        os.replace(part, final)
    return folder / f"{name}.png"


def read(path: str | Path) -> pd.DataFrame:
    """The table behind a figure; its provenance is in `.attrs["provenance"]`. `path` may name the PNG or the CSV."""
    path = Path(path).with_suffix(".csv")
    if not path.is_file():
        raise HildaError(f"no table at {path}; run the notebook that draws this figure.")
    facts = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("# "):
                break
            key, _, value = line[2:].rstrip("\n").partition(": ")
            facts[key] = value
    # only an empty field is a missing value: a token or a task may well be called "null" or "NA"
    table = pd.read_csv(path, comment="#", keep_default_na=False, na_values=[""])
    table.attrs["provenance"] = facts
    return table
