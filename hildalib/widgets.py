"""Trace -> sliders. Three layers: stored traces, functions that return HTML, and a thin user interface over them.

Entry points: `canvas_html` (one step of one trace as HTML, no plotting library at work), `nearest` and `frame` (what the
sliders mean), `panel` and `marker` (the Pareto picture and the ring on it), `explorer` (the interface for Jupyter).
Moving a slider never runs a model; only the button "decode again" does, through the callable handed in.
"""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from hildalib import HildaError
from hildalib.canvas import EDGE, FILL, MASK_SIGN, STATES, Tokens, cells, shade, summary, tally
from hildalib.figures import pareto
from hildalib.style import styled

Key = tuple[str, float, float]  # prompt name, tau_mask, tau_edit

# every state has a mark besides its colour: stripes, dashes, thick underlined border, solid border
_STYLE = "".join(f".hilda .{s}{{background:{FILL[s]};border-color:{EDGE[s]}}}" for s in STATES)
CSS = f"""<style>.hilda{{background:#fff;color:#111;font:13px/2.1 'DejaVu Sans Mono',Menlo,Consolas,monospace;padding:6px 8px}}
.hilda span{{display:inline-block;border:1px solid;border-radius:3px;padding:0 4px;margin:1px;line-height:1.45;color:#111}}
.hilda b{{display:inline-block;width:0;border-left:3px solid #000;height:1.5em;margin:0 3px;vertical-align:middle}}
.hilda p{{font:12px sans-serif;margin:2px 0 6px;color:#333}}{_STYLE}
.hilda .PROMPT{{color:#555}}.hilda .DRAFT{{border-style:dashed}}
.hilda .MASK{{color:#fff;background:repeating-linear-gradient(135deg,#8A8A8A 0 4px,#6E6E6E 4px 8px)}}
.hilda .EDITED{{border-width:2px;font-weight:bold;text-decoration:underline}}</style>"""


def _cell(item, colour: str) -> str:
    scored = item.confidence == item.confidence
    facts = [f"position {item.position}", item.state.lower()]
    if item.state != "MASK":
        facts.insert(1, f"token {item.text}")
    if scored:
        facts.append(f"confidence {item.confidence:.3f}")
    if item.forward >= 0:
        facts.append(f"written by forward {item.forward}")
    paint = ""
    if scored and colour == "confidence":
        fill, ink = shade(item.confidence)
        paint = f' style="background:{fill};color:{ink}"'
    title = escape(", ".join(facts), quote=True)
    line_end = "<br>" if item.state != "MASK" and item.text.endswith("⏎") else ""
    return f'<span class="{item.state}" title="{title}"{paint}>{escape(item.text)}</span>{line_end}'


def canvas_html(trace, step: int, tokens: Tokens, colour: str = "state", row: int = 0) -> str:
    """The canvas after `step` forwards as HTML: one span a position, black bars between blocks, a title on each cell.

    tokens: strings by id or a callable id -> string; all text is escaped. colour: "state" or "confidence" (cividis; prompt
    and mask keep theirs). Raises HildaError for another colour, or a step or row outside the trace.
    """
    if colour not in ("state", "confidence"):
        raise HildaError(f"colour is {colour!r}; a canvas is coloured by 'state' or by 'confidence'.")
    table, parts = cells(trace, step, tokens, row), []
    for item in table.itertuples():
        if item.position and item.position % trace.block_size == 0:
            parts.append("<b></b>")
        parts.append(_cell(item, colour))
    count = tally(trace, step, row)
    key = " ".join(f'<span class="{s}">{MASK_SIGN + " " if s == "MASK" else ""}{s.lower()} {count[s]}</span>' for s in STATES)
    headline = escape(f"Canvas {summary(trace, step, row)}", quote=True)
    return (f'{CSS}<div class="hilda" role="group" aria-label="{headline}"><p>{headline}</p>'
            f'<div>{"".join(parts)}</div><p>{key}</p></div>')


def nearest(traces: Mapping[Key, object], prompt: str, tau_mask: float, tau_edit: float) -> Key:
    """Key of the stored trace of `prompt` closest to the two thresholds (Euclidean; of equal ones the lower thresholds)."""
    known = [key for key in traces if key[0] == prompt]
    if not known:
        names = ", ".join(sorted({key[0] for key in traces})) or "none"
        raise HildaError(f"no trace is stored for prompt {prompt!r}; stored prompts: {names}.")
    return min(known, key=lambda key: (np.hypot(key[1] - tau_mask, key[2] - tau_edit), key[1:]))


def last_step(trace) -> int:
    """Index of the finished canvas: the number of forwards stored."""
    return len(trace.ids) - 1


def frame(traces: Mapping[Key, object], tokens: Tokens, prompt: str, tau_mask: float, tau_edit: float, step: int,
          colour: str = "state", row: int = 0) -> str:
    """What the sliders show: the stored trace nearest to the thresholds, at `step` (held within that trace), as HTML.

    Says so above the canvas where the thresholds asked for are not stored themselves.
    """
    key = nearest(traces, prompt, tau_mask, tau_edit)
    trace = traces[key]
    note = "" if key[1:] == (tau_mask, tau_edit) else (
        f'<p style="color:#8F3B00">nothing is stored at {tau_mask:g} / {tau_edit:g}; shown: '
        f"tau_mask {key[1]:g}, tau_edit {key[2]:g}</p>")
    return note + canvas_html(trace, min(max(step, 0), last_step(trace)), tokens, colour, row)


@dataclass(frozen=True)
class Panel:
    """The Pareto picture, drawn once. at: (tau_mask, tau_edit) -> (x, y) in pixels from the upper left corner."""

    png: bytes
    width: int
    height: int
    at: Mapping[tuple[float, float], tuple[float, float]]


@styled
def panel(table: pd.DataFrame, *, quality: str = "accuracy") -> Panel:
    """`figures.pareto` of `table` (with tau_mask and tau_edit) as a picture of 100 dpi, and where each setting lies on it."""
    fig = pareto(table, quality=quality, figsize=(4.6, 3.6))
    fig.set_dpi(100)
    fig.draw_without_rendering()
    ax, picture = fig.axes[0], io.BytesIO()
    with plt.rc_context({"savefig.bbox": None}):  # a tight cut would shift the picture under the marker
        fig.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    width, height = (int(side) for side in fig.canvas.get_width_height())
    rows = table.dropna(subset=["tau_mask", "tau_edit"])
    spots = ax.transData.transform(rows[["tpf", quality]].to_numpy(dtype=float))
    plt.close(fig)
    at = {(float(r.tau_mask), float(r.tau_edit)): (float(x), float(height - y)) for r, (x, y) in zip(rows.itertuples(), spots)}
    return Panel(picture.getvalue(), width, height, at)


def marker(drawn: Panel, tau_mask: float, tau_edit: float) -> str:
    """A ring around the setting on the Pareto picture, and its thresholds in words; only words where it was not measured."""
    words = f"tau_mask {tau_mask:g}, tau_edit {tau_edit:g}"
    spot = drawn.at.get((tau_mask, tau_edit))
    ring = "" if spot is None else (
        '<div role="img" aria-label="current setting" style="position:absolute;'
        f'left:{spot[0] - 12:.1f}px;top:{spot[1] - 12:.1f}px;'
        'width:24px;height:24px;box-sizing:border-box;border:3px solid #CC79A7;border-radius:50%"></div>')
    words += " (not measured)" if spot is None else ""
    return (f'<div style="position:relative;width:{drawn.width}px;height:{drawn.height}px;pointer-events:none">{ring}'
            f'<div style="position:absolute;right:8px;top:4px;font:12px sans-serif;color:#8a3d6b">{words}</div></div>')


def explorer(traces: dict[Key, object], table: pd.DataFrame, tokens: Tokens,
             decode_again: Callable[[str, float, float], object] | None = None, *, quality: str = "accuracy", row: int = 0):
    """Sliders over stored traces, as a widget to end a notebook cell with.

    traces: {(prompt name, tau_mask, tau_edit): Trace}. table: as for `figures.pareto`, with tau_mask and tau_edit; its
    provenance (`figures.read` or `table.attrs["provenance"]`) is printed below. tokens:
    strings by id or a callable. decode_again(prompt, tau_mask, tau_edit) -> Trace is what the button runs; its trace is put
    into `traces` (the caller's dict). The controls are in `.controls` for a script or a test.
    """
    import ipywidgets as w  # only the interface needs it: a batch run that draws HTML does not

    if not traces:
        raise HildaError("the explorer got no traces; decode at least one prompt with trace=True and store it.")
    look_up = cache(lambda i: tokens(i) if callable(tokens) else tokens[i])
    grid = [sorted({key[axis] for key in traces} | set(table.get(name, pd.Series(dtype=float)).dropna()))
            for axis, name in ((1, "tau_mask"), (2, "tau_edit"))]
    drawn, wide = panel(table, quality=quality), {"description_width": "80px"}
    first = next(iter(traces))

    def slider(name: str, values: list[float], value: float):
        return w.SelectionSlider(options=[(f"{v:g}" if v <= 1 else f"{v:g} (off)", v) for v in values], value=value,
                                 description=name, style=wide)

    c = SimpleNamespace(
        prompt=w.Dropdown(options=list(dict.fromkeys(key[0] for key in traces)), value=first[0], description="prompt",
                          style=wide),
        tau_mask=slider("tau_mask", grid[0], first[1]), tau_edit=slider("tau_edit", grid[1], first[2]),
        step=w.IntSlider(value=last_step(traces[first]), min=0, max=last_step(traces[first]), description="step", style=wide),
        play=w.Play(min=0, max=last_step(traces[first]), interval=400),
        colour=w.ToggleButtons(options=["state", "confidence"], tooltips=["colour by state", "colour by confidence"],
                               style={"button_width": "120px"}),
        again=w.Button(description="decode again", icon="refresh", disabled=decode_again is None), status=w.HTML(),
        canvas=w.HTML(layout=w.Layout(width="100%")), ring=w.HTML(layout=w.Layout(margin=f"-{drawn.height}px 0 0 0")))
    w.link((c.step, "value"), (c.play, "value"))  # in the kernel: a jslink would start by pulling the step to 0

    def place() -> Key:
        return c.prompt.value, c.tau_mask.value, c.tau_edit.value

    def show(*_):
        c.canvas.value = frame(traces, look_up, *place(), c.step.value, c.colour.value, row)

    def move(*_):
        end, finished = last_step(traces[nearest(traces, *place())]), c.step.value == c.step.max
        c.step.max = c.play.max = end  # a finished canvas stays finished, an early step stays that step
        c.step.value = end if finished else min(c.step.value, end)
        c.ring.value = marker(drawn, c.tau_mask.value, c.tau_edit.value)
        show()

    def run(_):
        c.again.disabled, c.status.value = True, "decoding ..."
        try:
            key = place()
            traces[key] = decode_again(*key)
            c.status.value = escape(f"stored a new trace of {key[0]} at {key[1]:g} / {key[2]:g}")
            move()
        except Exception as error:  # a callback's exception would vanish in the kernel's log
            c.status.value = f'<span style="color:#8F3B00">error: {escape(str(error))}</span>'
        finally:
            c.again.disabled = False

    for control in (c.prompt, c.tau_mask, c.tau_edit):
        control.observe(move, "value")
    for control in (c.step, c.colour):
        control.observe(show, "value")
    c.again.on_click(run)
    move()
    picture = base64.b64encode(drawn.png).decode("ascii")
    image = w.HTML(f'<img alt="quality against tokens per forward" width="{drawn.width}" height="{drawn.height}" '
                   f'style="display:block;max-width:none" src="data:image/png;base64,{picture}">', layout=w.Layout(margin="0"))
    fixed = w.Layout(width=f"{drawn.width + 4}px", min_width=f"{drawn.width + 4}px", overflow="hidden")
    left = w.VBox([c.prompt, c.tau_mask, c.tau_edit, w.HBox([c.step, c.play]), c.colour, c.again, c.status])
    made_from = escape(" · ".join(f"{k}: {v}" for k, v in table.attrs.get("provenance", {}).items()))
    source = w.HTML(f'<span style="font:11px sans-serif;color:#777">{made_from}</span>')
    box = w.VBox([w.HBox([left, w.VBox([image, c.ring], layout=fixed)]), c.canvas, source])
    box.controls = c
    return box
