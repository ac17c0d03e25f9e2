"""RL runs side by side: tables worked out by hand, the noise of a gradient against its closed form, and figures that show what the table says."""

import math
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny, weights

from hildalib import HildaError, footprint, learning
from hildalib.decoding import EditSettings
from hildalib.rl import RLRecipe, likelihood, noise, objectives
from hildalib.rl.rollout import sample
from hildalib.style import OKABE

matplotlib.use("Agg")
LOG = pd.DataFrame({"step": [1, 2, 3], "accuracy": [np.nan, 0.5, 0.75], "cpu_seconds": [1.0, 2.0, 4.0], "forwards": [10, 20, 30],
                    "learn_positions": [5, 5, 0], "equal_groups": [0.0, 0.5, 1.0], "entropy": [2.0, 1.0, np.nan], "tokens": [4.0, 5.0, 6.0]})
SETTINGS = EditSettings(tau_mask=2.0, tau_edit=2.0, max_new_tokens=6, temperature=1.0)


def test_curves_begin_at_the_start_and_add_up_what_was_spent():
    table = learning.learning_curves({"a": LOG}, {"a": 0.25}, rollouts=8)
    assert table.to_dict("list") == {"arm": ["a"] * 3, "step": [0, 2, 3], "accuracy": [0.25, 0.5, 0.75], "cpu_seconds": [0.0, 3.0, 7.0], "rollouts": [0, 16, 24]}


def test_costs_are_sums_and_signals_are_means():
    row = learning.costs({"a": LOG}, rollouts=8).iloc[0]
    assert (row.arm, row.rollouts, row.cpu_seconds, row.forwards, row.learn_positions) == ("a", 24, 7.0, 60, 10)
    assert (row.equal_groups, row.entropy, row.tokens) == (0.5, 1.5, 5.0) and math.isnan(row.log_ratio_std)


def test_prompts_that_teach_are_counted_and_coloured():
    figure = learning.prompts(np.array([0, 0, 0.25, 0.5, 0.75, 1, 1, 1]), 4)
    heights, colours = zip(*[(bar.get_height(), matplotlib.colors.to_hex(bar.get_facecolor())) for bar in figure.axes[0].patches])
    assert heights == (2, 1, 1, 1, 3) and {c.upper() for c in colours[1:4]} == {OKABE["blue"]} and OKABE["blue"] not in (colours[0].upper(), colours[4].upper())
    assert figure.axes[0].get_title(loc="left").startswith("3 of 8 prompts can teach")


def test_a_panel_a_method_and_a_fall_is_shown_as_a_fall():
    rows = [(arm, seed, step, 0.5 + slope * step + 0.01 * seed, 10 * step) for arm, slope in (("up", 0.1), ("down", -0.1)) for seed in (0, 1) for step in (0, 1, 2)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "step", "accuracy", "cpu_seconds"])
    for x in ("step", "cpu_seconds"):
        panels = learning.curves(table, x=x).axes
        assert [ax.get_title(loc="left") for ax in panels] == ["up\n50.5 → 70.5 %", "down\n50.5 → 30.5 %"]
        assert [ax._left_title.get_color() for ax in panels] == [OKABE["blue"], OKABE["vermillion"]]
        assert all(len(ax.lines) == 2 + 2 + 1 for ax in panels)  # means of both, two seeds, own mean
    up, down = learning.curves(table, apart=("down",)).axes
    assert len(up.lines) == 1 + 2 + 1 and len(down.lines) == 2 + 1 and np.ptp(up.get_ylim()) == pytest.approx(np.ptp(down.get_ylim()))
    with pytest.raises(HildaError, match="column.s. rollouts"):
        learning.curves(table, x="rollouts")


def test_habits_begin_at_the_start_and_losses_are_vermillion():
    table = pd.DataFrame({"arm": ["start", "start", "a", "a"], "seed": [0, 1, 0, 1], "worked": [0.2, 0.4, 0.8, 1.0], "right": [0.9, 0.9, 0.6, 0.8]})
    left, right = learning.habits(table, start="start").axes
    for ax, begin, end, colour in ((left, 0.3, 0.9, "blue"), (right, 0.9, 0.7, "vermillion")):
        _, line, seeds, mean = ax.lines
        assert line.get_xdata() == pytest.approx([begin, end]) and line.get_color() == OKABE[colour]
        assert len(seeds.get_xdata()) == 2 and mean.get_xdata() == pytest.approx([end])


def test_noise_of_a_gradient_is_variance_over_squared_mean_and_its_part_within_a_pair():
    """mean 2 in one of 400 directions, std 0.3 between rollouts and 0.1 between masks in each: noise 400 * (0.09 + 0.01) / 4."""
    generator, mean = torch.Generator().manual_seed(0), torch.zeros(400)
    mean[0] = 2.0
    between = 0.3 * torch.randn(200, 1, 400, generator=generator)
    found = noise.noise_of(mean + between + 0.1 * torch.randn(200, 2, 400, generator=generator))
    assert found["noise"] == pytest.approx(10.0, rel=0.1) and found["mask_noise"] == pytest.approx(1.0, rel=0.1)
    assert math.isnan(noise.noise_of(torch.tensor([[[1.0], [1.0]], [[-1.0], [-1.0]]]))["noise"])  # no common direction


def task_of(reward):
    return SimpleNamespace(name="t", version=1, prompt=lambda item: item["prompt"], score=lambda text, item: reward(text))


@pytest.mark.parametrize("method, masks", [("wd1", False), ("REINFORCE", True), ("ESPO", True)])
def test_measuring_noise_changes_no_weight_and_only_random_masks_make_mask_noise(method, masks):
    model, tokenizer = tiny(1)
    before = weights(model)
    recipe = RLRecipe(method, prompts=2, group=6, samples=2)
    found = noise.gradient_noise(model, tokenizer, task_of(lambda text: text.count("7") / 6), [{"prompt": "1"}, {"prompt": "2+"}], recipe, SETTINGS, batches=3)
    assert torch.equal(weights(model), before) and all(p.grad is None for p in model.parameters())
    assert math.isnan(found["noise"]) or (abs(found["mask_noise"]) > 1e-9) == masks


def test_without_a_difference_in_reward_there_is_no_noise_to_measure():
    model, tokenizer = tiny(1)
    found = noise.gradient_noise(model, tokenizer, task_of(lambda text: 1.0), [{"prompt": "1"}], RLRecipe("wd1", prompts=1, group=2), SETTINGS, batches=2)
    assert all(map(math.isnan, found.values()))


def test_imitation_raises_right_answers_and_leaves_wrong_ones_alone():
    logp, weight, lengths = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True), torch.ones(2, 2), torch.tensor([2.0, 2.0])
    loss, _ = objectives.imitation(logp, logp.detach(), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), weight, lengths)
    gradient, = torch.autograd.grad(loss, logp)
    assert loss.item() == 1.5 and gradient.tolist() == [[-0.5, -0.5], [0.0, 0.0]]
    nothing, _ = objectives.imitation(logp, logp.detach(), torch.zeros(2), torch.tensor([0, 0]), weight, lengths)
    assert nothing.item() == 0


def test_the_audit_of_trajectories_and_of_log_ratios():
    """A trajectory that scores some rounds stands for the one that scores all; two policies under the same masks differ less than under fresh ones,
    and one policy beside itself not at all."""
    model, _ = tiny(1, sharpen=6.0)
    other, _ = tiny(1, sharpen=5.9)
    rollout = sample(model, torch.tensor([[5, 6, 7], [5, 9, 7]]), replace(SETTINGS, tau_mask=0.3, tau_edit=0.1, max_post_steps=3, max_new_tokens=9),
                     generator=torch.Generator().manual_seed(0))
    table = likelihood.audit(model, rollout, (2,), 40, torch.Generator().manual_seed(0), other=other).set_index("estimator")
    assert (table["bias"].drop("mean field").abs() < 4 * table.noise.drop("mean field") + 1e-4).all()
    assert (table.ratio_std < table.ratio_std_fresh)[list(likelihood.SCHEMES)].all() and table.ratio_std["mean field"] == 0
    alone = likelihood.audit(model, rollout, (2,), 5, torch.Generator().manual_seed(0), other=model)
    assert alone.ratio_std.max() == 0


def test_memory_held_is_that_of_tensors_alive_together_in_forward_and_backward():
    x = torch.ones(1000, requires_grad=True)

    def one_after_the_other():
        for _ in range(3):
            torch.ones(500)

    assert footprint.held(lambda: [torch.ones(500) for _ in range(3)]) == 3 * 2000
    assert 2000 <= footprint.held(one_after_the_other) < 2 * 2000
    assert footprint.held(lambda: (2 * x).exp().sum().backward()) >= 2 * 4000  # exp keeps its result for the gradient of its input
