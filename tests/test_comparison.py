"""Arms at equal tokens per forward, worked out by hand on steps of two or three settings."""

import math

import matplotlib
import numpy as np
import pandas as pd
import pytest

from hildalib import HildaError, comparison
from hildalib.comparison import POINTS, arms, at_equal_tpf, best_at, difference_curve
from hildalib.intervals import mean_interval
from hildalib.style import GREY, OKABE


def table(**settings):
    """arm=[(seed, tpf, accuracy), ...]"""
    return pd.DataFrame([(name, *row) for name, rows in settings.items() for row in rows], columns=["arm", "seed", "tpf", "accuracy"])


def test_the_best_of_all_settings_at_least_that_fast():
    points = pd.DataFrame({"tpf": [1.0, 2.0, 4.0], "accuracy": [0.5, 0.8, 0.3]})
    found = best_at(points, np.array([0.5, 1.0, 1.5, 2.0, 2.1, 4.0, 4.1]))
    np.testing.assert_array_equal(found, [0.8, 0.8, 0.8, 0.8, 0.3, 0.3, np.nan])  # a faster setting that is better too also counts for a slow speed


def test_an_arm_equals_itself_and_a_constant_lead_is_found_exactly():
    rows = [(0, 1.0, 0.9), (0, 2.0, 0.7), (0, 3.0, 0.2)]
    assert at_equal_tpf(table(a=rows, b=rows), reference="a", other="b")["difference"] == 0
    ahead = at_equal_tpf(table(a=[(s, tpf, accuracy + 0.05) for s, tpf, accuracy in rows], b=rows), reference="a", other="b")
    assert ahead["difference"] == pytest.approx(0.05) and math.isnan(ahead["low"]) and ahead["tpf"] == (1.0, 3.0) and ahead["points"] == POINTS


def test_only_speeds_that_both_reach_are_compared():
    """a: 0.9 up to 2, then 0.5 up to 5. b: 0.6 up to 3. From 1 to 3 inclusive in 25 points: 13 at most 2 (lead 0.3), 12 above (lead -0.1)."""
    verdict = at_equal_tpf(table(a=[(0, 1.0, 0.8), (0, 2.0, 0.9), (0, 5.0, 0.5)], b=[(0, 0.5, 0.1), (0, 3.0, 0.6)]), reference="a", other="b")
    assert verdict["tpf"] == (1.0, 3.0) and verdict["difference"] == pytest.approx((13 * 0.3 - 12 * 0.1) / 25)


def test_arms_whose_speeds_do_not_meet_are_compared_at_the_fastest_speed_of_the_slower():
    verdict = at_equal_tpf(table(a=[(0, 1.0, 0.9), (0, 2.0, 0.8)], b=[(0, 3.0, 0.7), (0, 4.0, 0.6)]), reference="a", other="b")
    assert verdict["tpf"] == (2.0, 2.0) and verdict["difference"] == pytest.approx(0.1)


def test_the_interval_is_over_seeds_and_swapping_the_arms_flips_the_sign():
    seeds = table(a=[(s, 1.0, 0.5 + lead) for s, lead in enumerate((0.1, 0.2, 0.3))], b=[(s, 1.0, 0.5) for s in range(3)])
    verdict, swapped = (at_equal_tpf(seeds, reference=one, other=two) for one, two in (("a", "b"), ("b", "a")))
    half = 4.302653 * 0.1 / 3 ** 0.5
    assert [verdict[k] for k in ("difference", "low", "high")] == pytest.approx([0.2, 0.2 - half, 0.2 + half], abs=1e-5)
    assert [swapped[k] for k in ("difference", "high", "low")] == pytest.approx([-0.2, -0.2 + half, -0.2 - half], abs=1e-5)


def test_an_absent_arm_or_column_is_an_error():
    with pytest.raises(HildaError, match="both 'a' and 'c' in every seed"):
        at_equal_tpf(table(a=[(0, 1.0, 0.5)], b=[(0, 1.0, 0.5)]), reference="a", other="c")
    with pytest.raises(HildaError, match="both 'a' and 'b' in every seed"):
        at_equal_tpf(table(a=[(0, 1.0, 0.5), (1, 1.0, 0.5)], b=[(0, 1.0, 0.5)]), reference="a", other="b")
    with pytest.raises(HildaError, match="needs column"):
        at_equal_tpf(table(a=[(0, 1.0, 0.5)]).drop(columns="tpf"), reference="a", other="b")


def test_the_difference_at_each_speed_has_its_interval_over_seeds():
    a = [(s, tpf, accuracy + lead) for s, lead in enumerate((0.1, 0.2, 0.3)) for tpf, accuracy in ((1.0, 0.5), (2.0, 0.4))]
    b = [(s, tpf, accuracy) for s in range(3) for tpf, accuracy in ((1.0, 0.5), (2.5, 0.1))]
    curve = difference_curve(table(a=a, b=b), reference="a", other="b")
    half = 4.302653 * 0.1 / 3 ** 0.5
    assert curve.tpf.iloc[[0, -1]].tolist() == [1.0, 2.0]
    assert curve.iloc[0][1:].tolist() == pytest.approx([0.2, 0.2 - half, 0.2 + half], abs=1e-5)  # both at their best setting
    assert curve.iloc[-1][1:].tolist() == pytest.approx([0.5, 0.5 - half, 0.5 + half], abs=1e-5)  # 0.4 + lead against 0.1
    np.testing.assert_array_equal(curve.difference.round(6).unique(), [0.2, 0.5])


def test_the_figure_draws_every_setting_each_seed_and_their_mean():
    rows = table(a=[(0, 1.0, 0.9), (0, 2.0, 0.5), (1, 1.0, 0.7), (1, 2.5, 0.3)], b=[(0, 1.0, 0.4), (1, 1.5, 0.6)])
    figure = arms(rows, at_equal_tpf(rows, reference="a", other="b"))
    axes, lower = figure.axes
    by_width = {}
    for line in axes.lines:
        by_width.setdefault("dots" if line.get_marker() == "o" else "mean" if line.get_linewidth() > 2 else "seed", []).append(line)
    assert {kind: len(lines) for kind, lines in by_width.items()} == {"dots": 2, "seed": 4, "mean": 2}
    mean = by_width["mean"][0]
    assert mean.get_xdata()[[0, -1]].tolist() == [1.0, 2.0]  # up to the speed that all its seeds reach
    assert mean.get_ydata()[[0, -1]].tolist() == pytest.approx([0.8, 0.4])
    assert len(lower.lines) == 2 and lower.get_ylabel() == "difference"
    assert "a +0.100" in axes.get_title(loc="left") and {text.get_text() for text in axes.texts} == {"a", "b"}
    matplotlib.pyplot.close(figure)


def test_accuracy_against_forwards_counts_every_cheaper_setting_and_the_twin_is_a_line():
    rows = pd.DataFrame([("a", 0, 4.0, 0.9), ("a", 0, 2.0, 0.5), ("a", 1, 3.0, 0.7), ("a", 1, 2.5, 0.8), ("AR twin", 0, 16.0, 0.9), ("AR twin", 1, 15.0, 1.0)],
                        columns=["arm", "seed", "nfe", "accuracy"])
    figure = comparison.forwards(rows)
    axes, = figure.axes
    mean = next(line for line in axes.lines if line.get_linewidth() > 2)
    spent, best = mean.get_xdata(), mean.get_ydata()
    assert sorted((spent.min(), spent.max())) == [2.5, 4.0]  # from where both seeds have a setting
    found = {x: best[np.argmin(abs(spent - x))] for x in (2.5, 3.5, 4.0)}
    assert found == pytest.approx({2.5: (0.5 + 0.8) / 2, 3.5: (0.5 + 0.8) / 2, 4.0: (0.9 + 0.8) / 2})
    line = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert [*line.get_ydata()] == pytest.approx([0.95, 0.95]) and "AR twin, 15.5 forwards" in {text.get_text() for text in axes.texts}
    matplotlib.pyplot.close(figure)


def test_answers_are_paired_by_item_and_what_one_side_lacks_is_left_out():
    scores = {"ours": [1, 1, 0, 1, 0], "theirs": [0, 1, 0, 0, float("nan")], "same": [1, 1, 0, 1, 0]}
    table = pd.DataFrame([{"arm": arm, "item": item, "score": score} for arm, values in scores.items() for item, score in enumerate(values)])
    found = comparison.paired(table.sample(frac=1, random_state=0), "score", reference="ours").set_index("arm")
    gaps = np.array([1, 0, 0, 1])  # t of 3 degrees of freedom: 3.1824
    assert found.loc["theirs", ["items", "mean", "difference"]].tolist() == [4, 0.25, 0.5]
    assert found.loc["theirs", "high"] == pytest.approx(0.5 + 3.1824 * gaps.std(ddof=1) / 2, abs=1e-3)
    assert found.loc["same", ["items", "difference", "low", "high", "p"]].tolist() == [5, 0, 0, 0, 1]
    assert found.loc["theirs", "p"] == 0.5  # two items differ, both for us: 1/4 by chance, either way
    with pytest.raises(HildaError, match="rows of the arm 'mine'"):
        comparison.paired(table, "score", reference="mine")


def test_differences_are_paired_by_seed():
    table = pd.DataFrame({"arm": ["a", "b", "c"] * 3, "seed": [0, 0, 0, 1, 1, 1, 2, 2, 2], "loss": [1.0, 1.5, 0.9, 2.0, 2.5, 2.1, 3.0, 3.5, np.nan]})
    found = comparison.differences(table, "loss", reference="a").set_index("arm")
    assert found.loc["b"].tolist() == pytest.approx([0.5, 0.5, 0.5, 3])  # the spread of the seeds is not that of the difference
    assert found.difference["c"] == pytest.approx(0.0) and found.seeds["c"] == 2 and found.low["c"] < -0.5
    with pytest.raises(HildaError, match="rows of the arm 'd'"):
        comparison.differences(table, "loss", reference="d")


def test_at_equal_cost_the_reference_is_read_off_its_own_line():
    rows = [("plain", seed, nfe, accuracy + 0.1 * seed) for seed in range(3) for nfe, accuracy in ((2, 0.2), (4, 0.6))]
    rows += [("between", seed, 3, 0.4 + 0.1 * seed + gap) for seed, gap in enumerate((0.1, 0.2, 0.3))]
    rows += [("dear", seed, 9, 0.5 + 0.1 * seed) for seed in range(3)] + [("cheap", 0, 1, 0.2), ("cheap", 1, 1, 0.4)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "nfe", "accuracy"])
    found = comparison.at_equal_cost(table, "accuracy", "nfe", reference="plain").set_index("arm")
    assert list(found.index) == ["between", "dear", "cheap"] and found.seeds.tolist() == [3, 3, 2]
    mean, low, high = mean_interval([0.1, 0.2, 0.3])
    assert found.loc["between", ["difference", "low", "high"]].tolist() == pytest.approx([mean, low, high])
    assert found.difference["dear"] == pytest.approx(-0.1) and found.difference["cheap"] == pytest.approx(0.05)
    assert found.same_sign.tolist() == [True, True, False]
    with pytest.raises(HildaError, match="needs rows of the arm 'absent' in seed 0"):
        comparison.at_equal_cost(table, "accuracy", "nfe", reference="absent")


def test_the_front_is_what_nothing_beats_in_both():
    table = pd.DataFrame([("a", 1, 0.5, 4.0), ("b", 2, 0.5, 5.0), ("c", 3, 0.9, 1.0), ("d", 4, 0.8, 2.0), ("c", 3, 0.9, 1.0)],
                         columns=["arm", "nfe", "accuracy", "speed"]).assign(low=0.1, high=0.95)
    assert comparison.best(table, "nfe", less=True).tolist() == [True, False, True, False, True]
    assert comparison.best(table, "speed", less=False).tolist() == [False, True, True, True, True]
    unknown = table.assign(speed=[4.0, 5.0, float("nan"), 2.0, float("nan")])
    assert comparison.best(unknown, "speed", less=False).tolist() == [False, True, False, True, False]
    figure = comparison.pareto(table, {"nfe": "forwards", "speed": "speed"})
    assert len(figure.axes) == 2 and {text.get_text() for text in figure.axes[0].texts} == {"a", "c"}
    spread = comparison.pareto(table.assign(speed_low=0.5, speed_high=7.0), {"nfe": "forwards", "speed": "speed"})
    first, second = ([line[:, 0].tolist() for bars in ax.collections for line in bars.get_segments()] for ax in spread.axes)
    assert [0.5, 7.0] in second and [0.5, 7.0] not in first
    with pytest.raises(HildaError, match="'pareto' needs column"):
        comparison.pareto(table.drop(columns="speed"), {"nfe": "forwards", "speed": "speed"})
    with pytest.raises(HildaError, match="'speed' has no number.*run the other seeds again"):
        comparison.pareto(table.assign(speed=float("nan")), {"nfe": "forwards", "speed": "speed"})


def test_the_page_of_verdicts_is_sure_only_where_the_interval_is_and_names_what_runs_off_it():
    rows = [("loss", "worse", 0.5, 0.4, 0.6, "lower"), ("loss", "better", -0.3, -0.4, -0.2, "lower"), ("loss", "open", 0.1, -0.2, 0.4, "lower"),
            ("loss", "far", 9.0, 8.0, 10.0, "lower"), ("loss", "single", 0.2, np.nan, np.nan, "lower")]
    fig = comparison.verdicts(pd.DataFrame(rows, columns=["measure", "arm", "difference", "low", "high", "better"]), reference="dLLM")
    ax = fig.axes[0]
    dots = {int(line.get_ydata()[0]): line for line in ax.lines if line.get_marker() == "o"}
    assert [dots[y].get_markerfacecolor() for y in (0, 1, 2, 4)] == [OKABE["vermillion"], OKABE["blue"], "white", "white"]
    assert 3 not in dots and [text.get_text() for text in ax.texts] == ["+9"]


def test_seeds_that_lack_an_arm_are_left_out():
    rows = table(a=[(0, 1.0, 0.5), (1, 1.0, 0.5)], b=[(1, 1.0, 0.6)], c=[(0, 1.0, 0.1)])
    assert comparison.both(rows, "a", "b").seed.tolist() == [1, 1] and comparison.both(rows, "b", "c").empty


def test_spending_has_a_panel_for_every_base_and_what_is_compared_with_in_each():
    rows = [("", "AR twin", 16, 0.9), ("", "one draft", 4, 0.6), ("", "one draft", 3, 0.3), ("drafts", "search", 15, 0.8), ("drafts", "vote", 13, 0.7), ("Q", "search", 18, 0.9)]
    points = pd.DataFrame(rows, columns=["base", "arm", "nfe", "accuracy"]).assign(low=lambda part: part.accuracy - 0.1, high=lambda part: part.accuracy + 0.1)
    first, second = comparison.spending(points).axes
    assert [ax.get_title(loc="left") for ax in (first, second)] == ["drafts", "Q"]
    assert [len(ax.lines) for ax in (first, second)] == [4, 3]
    drawn = {tuple(line.get_xdata()): line.get_color() for line in first.lines}
    assert drawn[3, 4] == GREY and drawn[16,] == OKABE["black"] and len({*drawn.values()}) == 4  # a line goes from few forwards to many
    crowd = pd.DataFrame([("", "AR twin", 16, 0.9), *(("drafts", f"arm {i}", 4, 0.6) for i in range(13))], columns=points.columns[:4]).assign(low=0.5, high=0.7)
    (ax,) = comparison.spending(crowd).axes
    beside, below = ([text.get_text() for text in part] for part in (ax.texts, ax.get_legend().get_texts()))
    assert sorted(beside + below) == sorted(crowd.arm) and len(below) > 3  # who finds no room stands in the legend
    looks = [(line.get_color(), line.get_marker()) for line in ax.lines]
    assert len({*looks}) == 14
    with pytest.raises(HildaError, match="'spending' needs column.s. base"):
        comparison.spending(points.drop(columns="base"))
