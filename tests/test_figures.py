"""Figures: what is drawn comes from the table, is stored with it, and repeats byte for byte."""

import math
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from hildalib import HildaError, canvas, figures, intervals, paths
from hildalib.style import FIXED, TWIN, colours, end_labels

matplotlib.use("Agg")
FACTS = {"model": "nano", "data": "synthetic", "seeds": "0, 1, 2", "device": "cpu"}
WORDS = ["The", " cat", "\n", " <sat>", " on", " mats", " & dogs", ".", "[MASK]"]
P, M, D, E, C = range(5)


def small_trace():
    """Block size 4, prompt 3, mask id 8: one draft that is edited, its block closed, then half of the next block.

        step 0   P P P M | M M M M
        step 1   P P P D | M M M M      3 written
        step 2   P P P E | M M M M      3 edited, block closed
        step 3   P P P E | D M D M
        step 4   P P P E | C C C C      5 and 7 written, block closed
    """
    ids = np.array([[0, 1, 2, 8, 8, 8, 8, 8], [0, 1, 2, 3, 8, 8, 8, 8], [0, 1, 2, 4, 8, 8, 8, 8],
                    [0, 1, 2, 4, 5, 8, 6, 8], [0, 1, 2, 4, 5, 3, 6, 7]])
    state = np.array([[P, P, P, M, M, M, M, M], [P, P, P, D, M, M, M, M], [P, P, P, E, M, M, M, M],
                      [P, P, P, E, D, M, D, M], [P, P, P, E, C, C, C, C]], dtype=np.uint8)
    n = math.nan
    confidence = np.array([[n] * 8, [n, n, n, 0.4, n, n, n, n], [n, n, n, 0.9, n, n, n, n],
                           [n, n, n, 0.9, 0.8, n, 0.7, n], [n, n, n, 0.9, 0.8, 0.6, 0.7, 1.0]], dtype=np.float32)
    return SimpleNamespace(ids=ids[:, None], state=state[:, None], confidence=confidence[:, None],
                           forward=np.arange(5)[:, None], prompt_length=np.array([3]), block_size=4, mask_token_id=8)


def sweep():
    rows = [{"tau_mask": m, "tau_edit": e, "accuracy": 0.3 + 0.5 * m - 0.1 * e, "tpf": 5 - 4 * m, "arm": "dLLM", "preset": None}
            for m in (0.5, 0.7, 0.9) for e in (0.5, 0.9, 1.1)]
    rows[3]["preset"] = "S"
    table = pd.DataFrame([*rows, {"accuracy": 0.7, "tpf": 1.0, "arm": TWIN}])
    return table.assign(low=table.accuracy - 0.05, high=table.accuracy + 0.05)


def curves():
    steps = np.arange(60)
    diffusion = pd.DataFrame({"step": steps, "arm": "dLLM", "stage": np.repeat(["warmup", "stable", "decay"], 20),
                              "block_size": np.repeat([1, 4, 16, 16, 8, 4], 10), "m2t": 3 - steps / 40, "t2t": 2 - steps / 60})
    return pd.concat([diffusion, pd.DataFrame({"step": steps, "arm": TWIN, "ar": 2.5 - steps / 50})], ignore_index=True)


def scores():
    rows = [(task, arm, s) for task, s in (("chains", 0.8), ("sudoku", 0.4)) for arm in ("dLLM S", "dLLM Q", TWIN)]
    table = pd.DataFrame(rows, columns=["task", "arm", "accuracy"])
    low, high = figures.wilson(100 * table.accuracy, 100)
    return table.assign(low=low, high=high, nfe=[20, 40, 64] * 2, tpf=[3.2, 1.6, 1.0] * 2, tokens_per_s=[9.0, 5.0, math.nan] * 2)


def seeds(count=3):
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"arm": arm, "seed": k, "loss": base + 0.1 * k + 0.01 * rng.random()}
                         for arm, base in (("no edits", 1.6), ("edits", 1.5)) for k in range(count)])


def every_figure():
    confidence = np.linspace(0.05, 1, 40)
    calibrated = figures.calibration(confidence, confidence > 0.5)
    lengths = pd.DataFrame({"length": [5, 10, 40], "documents": [3, 2, 1]})
    mask = np.tril(np.ones((8, 8), dtype=int))
    rates = pd.DataFrame({"t": [0.1, 0.5, 0.9], "loss": [1.0, 1.5, 2.0], "low": [0.9, 1.4, 1.9], "high": [1.1, 1.6, 2.1]})
    trace = small_trace()
    return {"lengths": (lambda: figures.lengths(lengths, row_length=32, efficiency=0.9), lengths),
            "attention": (lambda: figures.attention(mask[None, None], 4, 2, [0, 0, 0, 1]), pd.DataFrame(mask)),
            "losses": (lambda: figures.losses(curves(), parent=1.2), curves()),
            "loss_by_t": (lambda: figures.loss_by_t(rates), rates),
            "surface": (lambda: figures.surface(sweep(), presets={"S": (0.7, 0.5)}), sweep()),
            "pareto": (lambda: figures.pareto(sweep()), sweep()),
            "confidence": (lambda: figures.confidence(calibrated), calibrated),
            "benchmarks": (lambda: figures.benchmarks(scores()), scores()),
            "ablation": (lambda: figures.ablation(seeds(), "loss", "arm", better="lower"), seeds()),
            "canvas": (lambda: figures.canvas(trace, 3, WORDS), figures.cells(trace, 3, WORDS)),
            "filmstrip": (lambda: figures.filmstrip(trace, WORDS, colour="confidence"), figures.cells(trace, range(5), WORDS))}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", list(every_figure()))
@pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")  # those are of kernels that other tests ran, collected here
def test_same_table_gives_same_png_bytes_and_its_own_numbers_back(name):
    draw, table = every_figure()[name]
    first = figures.save(draw(), name, table, profile="nano", provenance=FACTS).read_bytes()
    back = figures.read(paths.figure_dir("nano") / f"{name}.png")
    path = figures.save(draw(), name, back, profile="nano", seed=1)  # the stored provenance is printed again
    assert path == paths.figure_dir("nano", 1) / f"{name}.png"
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and path.read_bytes() == first
    assert back.attrs["provenance"] == FACTS
    pd.testing.assert_frame_equal(back, table.rename(columns=str).reset_index(drop=True), check_dtype=False)
    assert sorted(p.name for p in path.parent.iterdir()) == [f"{name}.csv", f"{name}.png"]


def test_a_stored_table_redraws_the_stored_picture():
    table = sweep()
    path = figures.save(figures.pareto(table), "sweep", table, profile="nano", provenance=FACTS)
    again = figures.read(path)
    assert figures.save(figures.pareto(again), "again", again, profile="nano").read_bytes() == path.read_bytes()


def test_text_with_comment_signs_and_line_ends_survives_the_csv():
    table = pd.DataFrame({"text": ["# not a comment", "a#b", 'quote " and , comma', "NA"], "n": [1.5, 2.0, math.nan, 3]})
    path = figures.save(plt.figure(), "odd", table, profile="nano", provenance={"data": "two\nlines"})
    pd.testing.assert_frame_equal(figures.read(path), table)
    assert pd.read_csv(path.with_suffix(".csv"), comment="#")["text"].tolist()[:3] == table["text"].tolist()[:3]


def test_provenance_is_written_once_under_the_figure_and_below_all_ink():
    figure, table = figures.ablation(seeds(), "loss", "arm"), seeds()
    for _ in range(2):
        figures.save(figure, "one", table, profile="nano", provenance=FACTS)
    line, = [t for t in figure.texts if t.get_gid() == "provenance"]
    assert line.get_text().replace("\n", " ") == "model: nano · data: synthetic · seeds: 0, 1, 2 · device: cpu"
    lowest_ink = min(ax.get_tightbbox().y0 for ax in figure.axes)
    assert line.get_window_extent().y1 < lowest_ink


def test_a_failed_save_leaves_the_older_files_alone(monkeypatch):
    table = seeds()
    path = figures.save(figures.ablation(table, "loss", "arm"), "kept", table, profile="nano")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures.save(figures.ablation(table.head(4), "loss", "arm"), "kept", table, profile="nano")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("name", ["a:b", "../up", "", "with space", "café"])
def test_names_that_are_not_portable_file_names_are_refused(name):
    with pytest.raises(HildaError, match="portable file name"):
        figures.save(plt.figure(), name, seeds(), profile="nano")


def test_a_missing_column_or_table_is_named():
    with pytest.raises(HildaError, match="'benchmarks' needs column.s. low, high; the table has task, arm, accuracy"):
        figures.benchmarks(pd.DataFrame({"task": ["a"], "arm": ["b"], "accuracy": [0.5]}))
    with pytest.raises(HildaError, match="without rows"):
        figures.pareto(sweep().head(0))
    with pytest.raises(HildaError, match="no table at"):
        figures.read(paths.figure_dir("nano") / "never.png")


def test_drawing_does_not_change_the_callers_style():
    before = dict(plt.rcParams)
    figures.pareto(sweep())
    assert dict(plt.rcParams) == before


def test_arms_keep_their_colour_whatever_their_company():
    assert colours(["x", TWIN, "dLLM S", "y"])[TWIN] == colours([TWIN])[TWIN] == FIXED[TWIN]
    many = colours(["x", "dLLM S", "y", "dLLM Q", "z"])
    assert len(set(many.values())) == 5


def test_a_label_stands_beside_a_line_that_has_just_moved_the_limits():
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0.6, 0.6])
    ax.figure.draw_without_rendering()
    ax.axhline(0.3)
    end_labels(ax, [(0.6, "line", "k"), (0.3, "below", "k")])
    assert all(-0.1 < text.xy[1] < 1.1 for text in ax.texts)
    plt.close(fig)


def test_end_labels_of_close_lines_do_not_overlap():
    _, ax = plt.subplots()
    ax.set_ylim(0, 1)
    end_labels(ax, [(0.5, "a", "k"), (0.501, "b", "k"), (0.502, "c", "k"), (0.9, "far", "k")])
    boxes = [t.get_window_extent() for t in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:])
    assert [t.get_text() for t in sorted(ax.texts, key=lambda t: t.xy[1])] == ["a", "b", "c", "far"]
    assert max(ax.texts, key=lambda t: t.xy[1]).xy[1] == pytest.approx(0.9)


def test_packing_efficiency_counts_cut_documents_once():
    figure = figures.lengths(pd.DataFrame({"length": [4, 8, 20]}), row_length=8)  # (4 + 8 + 8) of 3 rows of 8
    assert "one document a row: 83.3%" in figure.axes[0].texts[-1].get_text()


def test_counted_lengths_equal_the_documents_one_by_one():
    one = figures.lengths(pd.DataFrame({"length": [3, 3, 3, 9]}))
    counted = figures.lengths(pd.DataFrame({"length": [3, 9], "documents": [3, 1]}))
    heights = [[bar.get_height() for bar in figure.axes[0].patches] for figure in (one, counted)]
    assert heights[0] == heights[1] and sum(heights[0]) == 4


def test_attention_colours_each_kind_of_pair_and_nothing_else():
    length, size = 4, 2
    block = np.arange(length) // size
    own, past, clean = (block[:, None] == block), (block[:, None] > block), (block[:, None] >= block)
    mask = np.block([[own, past], [np.zeros_like(own), clean]])
    drawn = figures.attention(mask, length, size).axes[0].images[0].get_array()
    assert ((drawn > 0) == mask).all()
    assert [set(np.unique(part)) - {0} for part in (drawn[:4, :4], drawn[:4, 4:], drawn[4:, 4:])] == [{1}, {2}, {4}]
    with pytest.raises(HildaError, match="whole number of parts"):
        figures.attention(np.ones((7, 7)), 4, 2)


def test_smoothed_losses_do_not_mix_block_sizes():
    table = pd.DataFrame({"step": range(40), "block_size": [1] * 20 + [4] * 20, "m2t": [1.0] * 20 + [2.0] * 20})
    top = figures.losses(table).axes[0]
    raw, *smooth = top.lines
    assert len(raw.get_xdata()) == 40 and [set(line.get_ydata()) for line in smooth] == [{1.0}, {2.0}]


def test_losses_show_only_what_was_measured_and_the_parent_where_it_compares():
    figure = figures.losses(curves(), parent=1.2)
    titles = [ax.get_title("left") for ax in figure.axes[:3]]
    assert titles == ["M2T loss", "T2T loss", "next-token loss"]
    named = [{t.get_text() for t in ax.texts} for ax in figure.axes]
    assert ["parent 1.20" in words for words in named[:3]] == [True, False, True]
    assert {"warmup", "stable", "decay"} <= named[0] and "no blocks" in named[5]
    np.testing.assert_array_equal(figure.axes[3].lines[-1].get_ydata(), curves().block_size[:60])


def test_a_weighted_total_is_not_drawn_beside_its_parts():
    table = pd.DataFrame({"step": [0, 1] * 2, "arm": ["dLLM"] * 2 + [TWIN] * 2, "m2t": [2.0, 1.0, math.nan, math.nan],
                          "loss": [9.0, 8.0, 3.0, 2.0]})
    panels = figures.losses(table).axes
    assert [ax.get_title("left") for ax in panels] == ["M2T loss", "loss"]
    assert panels[1].lines[0].get_ydata().tolist() == [3.0, 2.0]
    assert table["loss"].tolist() == [9.0, 8.0, 3.0, 2.0]  # the caller's table is left alone


def test_loss_by_rate_averages_the_last_logged_rows_at_the_middle_of_each_bucket():
    log = pd.DataFrame({"step": [0, 1, 2, 3], "m2t_t1.00": [9.0, 3.0, math.nan, 5.0], "m2t_t0.50": [9.0, 1.0, 2.0, 4.0]})
    table = figures.by_rate(log, rows=2)
    assert table["t"].tolist() == [0.25, 0.75] and table["loss"].tolist() == [3.0, 4.0]
    with pytest.raises(HildaError, match="no columns m2t_t"):
        figures.by_rate(log[["step"]])


def test_surface_puts_each_number_in_its_cell_and_refuses_to_average():
    figure = figures.surface(sweep(), presets={"S": (0.7, 0.5)})
    quality = figure.axes[0]
    labels = [[t.get_text() for t in axis.get_ticklabels()] for axis in (quality.yaxis, quality.xaxis)]
    assert labels == [["0.9", "0.7", "0.5"], ["0.5", "0.9", "off"]]
    texts = {t.get_position(): t.get_text() for t in quality.texts}
    assert texts[0, 0] == "0.700" and texts[2, 2] == "0.440" and texts[0, 1] == "S 0.600"
    with pytest.raises(HildaError, match="several rows for tau_mask 0.5, tau_edit 0.5"):
        figures.surface(pd.concat([sweep(), sweep()]))


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(1)
    tpf, quality = rng.integers(0, 6, 40), rng.integers(0, 6, 40)  # small integers: many ties
    beaten = [any((tpf[j] >= tpf[i]) and (quality[j] >= quality[i]) and (tpf[j], quality[j]) != (tpf[i], quality[i])
                  for j in range(40)) for i in range(40)]
    found = figures.front(tpf, quality)
    assert {(tpf[i], quality[i]) for i in found} == {(tpf[i], quality[i]) for i in range(40) if not beaten[i]}
    assert (np.diff(tpf[found]) > 0).all() and (np.diff(quality[found]) < 0).all()


def test_pareto_marks_presets_and_draws_the_twin_as_a_band():
    ax = figures.pareto(sweep()).axes[0]
    words = [t.get_text() for t in ax.texts]
    assert "preset S" in words and TWIN in words
    assert any(isinstance(p, Rectangle) and np.allclose([p.get_y(), p.get_height()], [0.65, 0.1]) for p in ax.patches)


def test_pareto_labels_do_not_cover_each_other():
    ax = figures.pareto(sweep()).axes[0]
    labels = [t for t in ax.texts if t.get_text() != TWIN and "labels" not in t.get_text()]
    boxes = [t.get_window_extent() for t in labels]
    assert len(boxes) >= 3 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:])


def test_calibration_counts_every_token_once():
    table = figures.calibration([0.0, 0.49, 0.5, 1.0], [False, True, True, True], bins=2)
    assert table[["right", "wrong"]].to_numpy().tolist() == [[1, 1], [2, 0]]
    assert table["confidence"].tolist() == pytest.approx([0.245, 0.75])
    for bad in ([math.nan], [1.2], []):
        with pytest.raises(HildaError, match="within .0, 1."):
            figures.calibration(bad, [True] * len(bad))


def test_calibration_error_is_the_mean_gap_over_tokens():
    table = figures.calibration([0.8] * 10 + [0.3] * 30, [True] * 5 + [False] * 35, bins=10)
    title = figures.confidence(table).axes[1].get_title("left")
    assert title == "Calibration (ECE 0.300)"  # (10 |0.5 - 0.8| + 30 |0 - 0.3|) / 40


def test_wilson_interval_solves_the_score_equation():
    low, high = figures.wilson([0, 7, 10], [10, 10, 10])
    for bound, successes in ((low[1], 7), (high[1], 7), (high[0], 0), (low[2], 10)):
        assert abs(successes / 10 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 10))
    assert low[0] == pytest.approx(0) and high[2] == pytest.approx(1)
    assert np.isnan(figures.wilson(0, 0)).all()


@pytest.mark.parametrize("freedom, exact", [(1, math.tan(0.475 * math.pi)), (2, 0.95 / math.sqrt(2 * 0.975 * 0.025)),
                                            (9, 2.262157), (30, 2.042272)])
def test_t_quantile_matches_closed_forms_and_printed_tables(freedom, exact):
    assert intervals.t_quantile(freedom) == pytest.approx(exact, rel=1e-5)


def test_ablation_compares_seed_by_seed():
    table = pd.DataFrame({"arm": ["a"] * 3 + ["b"] * 3, "seed": [0, 1, 2] * 2, "loss": [1.0, 2.0, 3.0, 1.5, 2.5, 3.5]})
    figure = figures.ablation(table, "loss", "arm", better="lower")
    notes = [t.get_text() for t in figure.axes[0].texts]
    assert notes[1] == "2.500   +0.500 [+0.500, +0.500]"  # seeds spread widely, the paired difference does not
    assert figure.axes[0].get_title("left") == "3 seeds"
    assert "too few" in figures.ablation(table[table.seed < 2], "loss", "arm").axes[0].get_title("left")
    assert figures.mean_interval([1.0]) == (1.0, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True))


def test_intervals_of_an_ablation_end_where_its_value_does():
    table = pd.DataFrame({"arm": ["a"] * 3 + ["b"] * 3, "seed": [0, 1, 2] * 2, "accuracy": [0.7, 0.9, 1.0, 0.1, 0.0, 0.3]})

    def reach(**within) -> tuple[float, float]:
        ax = figures.ablation(table, "accuracy", "arm", **within).axes[0]
        spans = [segment[:, 0] for bars in ax.collections for segment in bars.get_segments()]
        spans += [line.get_xdata() for line in ax.lines if line.get_linewidth() == 2.2]
        return min(map(min, spans)), max(map(max, spans))

    low, high = reach()
    assert low < 0 and high > 1 and reach(within=(0, 1)) == (0, 1)


def test_benchmark_rows_carry_score_interval_and_cost():
    figure = figures.benchmarks(scores())
    assert [ax.get_xlabel() for ax in figure.axes] == ["accuracy", "forwards (NFE)", "tokens per forward", "tokens / s"]
    words = [t.get_text() for t in figure.axes[0].texts]
    assert words.count("0.800") == 3 and {"chains", "sudoku"} <= set(words)
    assert [t.get_text() for t in figure.axes[3].texts] == ["9", "5", "–"] * 2


def test_cells_say_what_stood_where_and_which_forward_wrote_it():
    table = canvas.cells(small_trace(), 3, WORDS)
    assert table["text"].tolist() == ["The", "·cat", "⏎", "·on", "·mats", "▒", "·&·dogs", "▒"]
    assert table["state"].tolist() == ["PROMPT"] * 3 + ["EDITED", "DRAFT", "MASK", "DRAFT", "MASK"]
    assert table["forward"].tolist() == [-1, -1, -1, 2, 3, -1, 3, -1]
    assert table["block"].tolist() == [0] * 4 + [1] * 4
    assert canvas.cells(small_trace(), 0, WORDS)["confidence"].isna().all()
    assert canvas.cells(small_trace(), [0, 4], lambda i: WORDS[i])["step"].tolist() == [0] * 8 + [4] * 8


def test_rewriting_the_same_token_counts_as_written_by_the_later_forward():
    trace = small_trace()
    trace.confidence[4, 0, 4] = 0.95  # same token, new confidence
    assert canvas.cells(trace, 4, WORDS)["forward"].tolist()[4] == 4


def test_state_names_follow_the_codes_of_the_trace():
    codes = pytest.importorskip("hildalib.decoding.trace", reason="the decoder is not part of this checkout")
    assert [canvas.STATES[code] for code in (codes.PROMPT, codes.MASK, codes.DRAFT, codes.EDITED, codes.COMMITTED)] == [
        "PROMPT", "MASK", "DRAFT", "EDITED", "COMMITTED"]


def test_canvas_draws_one_cell_a_position_in_the_colour_and_line_of_its_state():
    ax = figures.canvas(small_trace(), 3, WORDS, columns=4).axes[0]
    drawn = [p for p in ax.patches if isinstance(p, Rectangle)]
    states = canvas.cells(small_trace(), 3, WORDS)["state"]
    assert [to_hex(p.get_facecolor()).upper() for p in drawn] == [canvas.FILL[s].upper() for s in states]
    assert [bool(p.get_hatch()) for p in drawn] == [s == "MASK" for s in states]
    assert len({(p.get_linewidth(), str(p.get_linestyle()), bool(p.get_hatch())) for p in drawn}) == 4  # without colour
    assert {p.get_y() for p in drawn} == {0, -1}  # wrapped at four


def test_filled_states_differ_in_grey_from_masks_and_each_other_by_line():
    assert len(set(canvas.FILL.values())) == len(canvas.FILL) == len(canvas.STATES)
    ax = figures.canvas(small_trace(), 4, WORDS, colour="confidence").axes[0]
    fills = [to_hex(p.get_facecolor()) for p in ax.patches]
    assert fills[3:] == [canvas.shade(c)[0] for c in (0.9, 0.8, 0.6, 0.7, 1.0)]
    assert {f.upper() for f in fills[:3]} == {canvas.FILL["PROMPT"]}


def test_filmstrip_counts_what_each_forward_wrote_and_edited():
    ax = figures.filmstrip(small_trace(), WORDS).axes[0]
    assert [t.get_text() for t in ax.texts if t.get_family() != ["monospace"]] == ["+1", "1 edited", "+2", "+2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["start", "forward 1", "forward 2", "forward 3", "forward 4"]
    assert len([p for p in ax.patches]) == 5 * 5  # prompt hidden
    wide = figures.filmstrip(small_trace(), WORDS, steps=[4], positions=slice(0, 2)).axes[0]
    assert len(wide.patches) == 2


def test_steps_rows_and_colours_that_do_not_exist_are_refused():
    with pytest.raises(HildaError, match="steps 0 to 4"):
        figures.canvas(small_trace(), 5, WORDS)
    with pytest.raises(HildaError, match="rows 0 to 0"):
        figures.filmstrip(small_trace(), WORDS, row=1)
    with pytest.raises(HildaError, match="'state' or by 'confidence'"):
        figures.canvas(small_trace(), 1, WORDS, colour="age")


def test_even_steps_keep_both_ends():
    assert canvas.even(5, 16) == [0, 1, 2, 3, 4]
    assert canvas.even(100, 4) == [0, 33, 66, 99]


def test_invisible_characters_become_visible():
    assert canvas.visible(" a\n\tb\x00\x7f") == "·a⏎⇥b␀␡"
    assert canvas.visible("") == "∅"
