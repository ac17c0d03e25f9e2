"""Sliders: the HTML says what the trace says, text is escaped, and no slider ever decodes."""

import math
from html.parser import HTMLParser

import pandas as pd
import pytest
from test_figures import WORDS, small_trace, sweep

from hildalib import HildaError, widgets
from hildalib.canvas import shade

STATES_AT_3 = ["PROMPT"] * 3 + ["EDITED", "DRAFT", "MASK", "DRAFT", "MASK"]


class Cells(HTMLParser):
    """The cells of a canvas as a browser would read them: [(class, title, style, text)]; bars between blocks as "|"."""

    def __init__(self, html):
        super().__init__()
        self.found, self.open, self.tags = [], False, set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.open = "title" in attrs
        if self.open:
            self.found.append([attrs["class"], attrs["title"], attrs.get("style"), ""])
        elif tag == "b":
            self.found.append("|")

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, data):
        if self.open:
            self.found[-1][3] += data

    @property
    def cells(self):
        return [c for c in self.found if c != "|"]


def stored():
    """Three traces; two of one prompt at the ends of the grid."""
    late = small_trace()
    late.ids = late.ids[:3]
    late.state, late.confidence, late.forward = late.state[:3], late.confidence[:3], late.forward[:3]
    return {("story", 0.5, 0.5): small_trace(), ("story", 0.9, 0.9): late, ("sum", 0.5, 0.5): small_trace()}


def test_one_cell_a_position_with_state_text_and_a_bar_at_each_block_border():
    found = Cells(widgets.canvas_html(small_trace(), 3, WORDS)).found
    assert found.index("|") == 4 and found.count("|") == 1
    cells = [c for c in found if c != "|"]
    assert [c[0] for c in cells] == STATES_AT_3
    assert [c[3] for c in cells] == ["The", "·cat", "⏎", "·on", "·mats", "▒", "·&·dogs", "▒"]


def test_titles_name_token_state_confidence_and_the_forward_that_wrote_it():
    titles = [c[1] for c in Cells(widgets.canvas_html(small_trace(), 3, WORDS)).cells]
    assert titles[3] == "position 3, token ·on, edited, confidence 0.900, written by forward 2"
    assert titles[0] == "position 0, token The, prompt"
    assert titles[5] == "position 5, mask"


def test_hostile_tokens_are_shown_as_text_and_never_as_markup():
    hostile = ["<script>alert(1)</script>", '" onmouseover="x', "</span><img src=x>", "&lt;", "a", "b", "c", "d", "m"]
    html = widgets.canvas_html(small_trace(), 4, hostile)
    read = Cells(html)
    assert [c[3] for c in read.cells][:3] == ["<script>alert(1)</script>", '"·onmouseover="x', "</span><img·src=x>"]
    assert read.tags <= {"style", "div", "p", "span", "b", "br"} and 'onmouseover="x"' not in html


def test_colour_by_confidence_paints_filled_cells_only():
    cells = Cells(widgets.canvas_html(small_trace(), 3, WORDS, colour="confidence")).cells
    assert [c[2] is None for c in cells] == [s in ("PROMPT", "MASK") for s in STATES_AT_3]
    assert cells[3][2] == "background:{};color:{}".format(*shade(0.9))
    assert all(c[2] is None for c in Cells(widgets.canvas_html(small_trace(), 3, WORDS)).cells)
    with pytest.raises(HildaError, match="'state' or by 'confidence'"):
        widgets.canvas_html(small_trace(), 3, WORDS, colour="age")


def test_text_on_every_shade_stays_readable():
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for percent in range(101):
        light, dark = sorted(map(luminance, shade(percent / 100)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1 AA for small text


def test_headline_and_key_count_the_states():
    html = widgets.canvas_html(small_trace(), 3, WORDS)
    assert "Canvas after forward 3 of 4: 3 of 5 tokens written, 1 edited" in html
    assert "draft 2" in html and "prompt 3" in html


def test_a_newline_token_also_breaks_the_line_but_a_masked_one_does_not():
    assert "⏎</span><br>" in widgets.canvas_html(small_trace(), 3, WORDS)
    assert "<br>" not in widgets.canvas_html(small_trace(), 3, ["x"] * 8 + ["\n"])


def test_second_row_of_a_batch_is_its_own_canvas():
    import numpy as np

    one, two = small_trace(), small_trace()
    two.ids = np.where(two.ids == 0, 7, two.ids)
    for name in ("ids", "state", "confidence", "forward"):
        setattr(one, name, np.concatenate([getattr(one, name), getattr(two, name)], axis=1))
    one.prompt_length = np.array([3, 3])
    assert [Cells(widgets.canvas_html(one, 3, WORDS, row=r)).cells[0][3] for r in (0, 1)] == ["The", "."]


def test_nearest_agrees_with_a_search_over_all_and_stays_with_the_prompt():
    traces = stored()
    for asked in ((0.5, 0.5), (0.6, 0.7), (0.95, 0.4), (1.1, 1.1)):
        key = widgets.nearest(traces, "story", *asked)
        assert key[0] == "story" and math.dist(key[1:], asked) == min(math.dist(k[1:], asked) for k in traces if k[0] == "story")
    assert widgets.nearest(traces, "sum", 0.9, 0.9) == ("sum", 0.5, 0.5)
    with pytest.raises(HildaError, match="stored prompts: story, sum"):
        widgets.nearest(traces, "poem", 0.5, 0.5)


def test_frame_holds_the_step_within_the_trace_and_owns_up_to_a_substitute():
    traces = stored()
    assert widgets.frame(traces, WORDS, "story", 0.9, 0.9, 99) == widgets.canvas_html(traces["story", 0.9, 0.9], 2, WORDS)
    substitute = widgets.frame(traces, WORDS, "story", 0.5, 0.9, 1)
    assert "nothing is stored at 0.5 / 0.9" in substitute and substitute.endswith(widgets.canvas_html(small_trace(), 1, WORDS))


def test_marker_sits_on_the_measured_point_of_the_picture():
    drawn = widgets.panel(sweep())
    assert drawn.png[:4] == b"\x89PNG"
    assert (drawn.width, drawn.height) == tuple(int.from_bytes(drawn.png[i:i + 4], "big") for i in (16, 20))  # as stored
    fast, slow = drawn.at[0.5, 0.5], drawn.at[0.9, 0.5]
    assert fast[0] > slow[0] and fast[1] > slow[1]  # more tokens a forward is right, less quality is lower on a screen
    assert all(0 < x < drawn.width and 0 < y < drawn.height for x, y in drawn.at.values())
    assert f"left:{fast[0] - 12:.1f}px;top:{fast[1] - 12:.1f}px" in widgets.marker(drawn, 0.5, 0.5)
    assert "current setting" not in widgets.marker(drawn, 0.1, 0.1) and "not measured" in widgets.marker(drawn, 0.1, 0.1)


def test_moving_a_slider_changes_the_canvas_and_runs_nothing():
    pytest.importorskip("ipywidgets", reason="the interface needs ipywidgets")
    box = widgets.explorer(stored(), sweep(), WORDS, decode_again=lambda *_: pytest.fail("a slider decoded"))
    c = box.controls
    seen = [c.canvas.value]
    for control, value in ((c.step, 1), (c.colour, "confidence"), (c.step, 3), (c.tau_mask, 0.9)):
        control.value = value
        seen.append(c.canvas.value)
    assert len(set(seen)) == len(seen)
    assert c.canvas.value == widgets.frame(stored(), WORDS, "story", 0.9, 0.5, 3, "confidence")
    assert c.ring.value == widgets.marker(widgets.panel(sweep()), 0.9, 0.5)


def test_the_step_slider_follows_the_length_of_the_trace():
    pytest.importorskip("ipywidgets", reason="the interface needs ipywidgets")
    c = widgets.explorer(stored(), sweep(), WORDS).controls
    assert (c.step.value, c.step.max) == (4, 4)
    c.tau_mask.value = c.tau_edit.value = 0.9
    assert (c.step.value, c.step.max) == (2, 2)  # finished stays finished
    c.tau_mask.value = c.tau_edit.value = 0.5
    assert (c.step.value, c.step.max) == (4, 4)
    c.step.value = 1
    c.tau_mask.value = c.tau_edit.value = 0.9
    assert c.step.value == 1
    assert c.again.disabled  # nothing to decode with


def test_play_and_step_slider_move_together():
    pytest.importorskip("ipywidgets", reason="the interface needs ipywidgets")
    c = widgets.explorer(stored(), sweep(), WORDS).controls
    assert c.play.value == c.step.value == 4  # opening the explorer shows the finished canvas
    c.play.value = 1
    assert c.step.value == 1 and "after forward 1 of 4" in c.canvas.value
    c.tau_mask.value = c.tau_edit.value = 0.9
    assert c.play.max == c.step.max == 2


def test_decode_again_stores_the_trace_where_the_sliders_stand():
    pytest.importorskip("ipywidgets", reason="the interface needs ipywidgets")
    traces, asked = stored(), []
    c = widgets.explorer(traces, sweep(), WORDS, decode_again=lambda *key: asked.append(key) or small_trace()).controls
    c.tau_edit.value = 0.9
    assert "nothing is stored" in c.canvas.value
    c.again.click()
    assert asked == [("story", 0.5, 0.9)] and asked[0] in traces
    assert "nothing is stored" not in c.canvas.value and not c.again.disabled


def test_a_failing_decode_is_shown_escaped_and_stores_nothing():
    pytest.importorskip("ipywidgets", reason="the interface needs ipywidgets")

    def refuse(*_):
        raise HildaError("prompt too long <b>")

    traces = stored()
    c = widgets.explorer(traces, sweep(), WORDS, decode_again=refuse).controls
    c.tau_edit.value = 0.9
    c.again.click()
    assert "error: prompt too long &lt;b&gt;" in c.status.value and len(traces) == 3 and not c.again.disabled


def test_explorer_prints_what_the_numbers_were_made_from_and_refuses_no_traces():
    pytest.importorskip("ipywidgets", reason="the interface needs ipywidgets")
    table = sweep()
    table.attrs["provenance"] = {"data": "<synthetic>"}
    assert "data: &lt;synthetic&gt;" in widgets.explorer(stored(), table, WORDS).children[-1].value
    with pytest.raises(HildaError, match="no traces"):
        widgets.explorer({}, pd.DataFrame(), WORDS)
