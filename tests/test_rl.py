"""Objectives and the loop of RL: signs, zeros and first-update ratios, worked values, and bandits that every method must solve."""

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tiny import EOS, MASK, tiny, weights

from hildalib import HildaError, attention, rl, tasks
from hildalib.attention import TILED
from hildalib.decoding import EditSettings, commit
from hildalib.rl import METHODS, RLRecipe, likelihood, objectives, trainer
from hildalib.rl.gradient import policy_gradient, scored
from hildalib.rl.rollout import graded, sample, score

OBJECTIVES = {"wd1": objectives.wd1, "espo": objectives.espo, "ebpo": objectives.ebpo, "diffu_grpo": partial(objectives.diffu_grpo, beta=0.0),
              "agrpo": objectives.agrpo, "grpo": objectives.grpo, "reinforce": objectives.reinforce}
REWARDS, GROUPS = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.0]), torch.tensor([0, 0, 0, 7, 7, 7])
SETTINGS = EditSettings(tau_mask=2.0, tau_edit=2.0, max_new_tokens=2, temperature=1.0)


def terms(seed=0, rows=6, width=4):
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, width, generator=generator) * 3
    weight = (torch.rand(rows, width, generator=generator) < 0.7).float() + torch.eye(rows, width)
    return logp * (weight != 0), weight, torch.full((rows,), 3.0)


def gradient(objective, rewards=REWARDS, groups=GROUPS, seed=0, old=None, **constants):
    logp, weight, lengths = terms(seed, len(rewards))
    logp.requires_grad_()
    loss, statistics = objective(logp, logp.detach() if old is None else old, rewards, groups, weight, lengths, **constants)
    return torch.autograd.grad(loss, logp)[0], loss.item(), statistics


# ---- advantages -----------------------------------------------------------------------------------------------------------------

def test_advantages_by_hand():
    assert torch.allclose(objectives.advantages(REWARDS, GROUPS), torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0.5, -0.5]))
    scaled = objectives.advantages(REWARDS, GROUPS, scaled=True)
    assert torch.allclose(scaled[3:], torch.tensor([0, 1.0, -1.0])) and math.isclose(scaled[0], 2 / 3 / math.sqrt(1 / 3), rel_tol=1e-6)


def test_groups_without_a_difference_are_not_informative():
    rewards, groups = torch.tensor([0.1, 0.1, 0.1, 1, 0, 0.3, 0.3]), torch.tensor([4, 4, 4, 1, 1, 2, 2])
    assert objectives.informative(rewards, groups).tolist() == [False] * 3 + [True] * 2 + [False] * 2


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8), st.integers(1, 3))
def test_advantages_sum_to_zero_in_each_group(rewards, count):
    values, groups = torch.tensor(rewards), torch.arange(len(rewards)) % count
    a = objectives.advantages(values, groups)
    assert all(abs(a[groups == g].sum()) < 1e-5 for g in range(count))


# ---- every objective ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_rewards_give_no_gradient(name):
    for value in (0.0, 0.3, 1.0):
        found, _, _ = gradient(OBJECTIVES[name], torch.full((6,), value))
        assert torch.allclose(found, torch.zeros_like(found), atol=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_raises_what_was_rewarded_and_lowers_what_was_not(name):
    """One group, one winner: a step against the gradient must raise the winner's log-likelihood and lower every loser's."""
    found, _, _ = gradient(OBJECTIVES[name], torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.zeros(6, dtype=torch.long))
    _, weight, _ = terms()
    assert (found[0][weight[0] != 0] < 0).all() and (found[1:][weight[1:] != 0] > 0).all() and (found[weight == 0] == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_flipped_rewards_flip_the_gradient(name):
    """At the first update, where no ratio is clipped."""
    forth, back = (gradient(OBJECTIVES[name], rewards)[0] for rewards in (REWARDS, 1 - REWARDS))
    assert torch.allclose(forth, -back, atol=1e-6) and forth.abs().max() > 0


@pytest.mark.parametrize("name, floor", [("espo", 1.0), ("ebpo", 1.0), ("diffu_grpo", None), ("agrpo", None)])
def test_the_first_update_has_ratio_1_and_the_gradient_of_reinforce(name, floor):
    found, loss, statistics = gradient(OBJECTIVES[name])
    assert statistics["ratio_min"] == statistics["ratio_max"] == 1.0 and statistics["clip_share"] == statistics["log_ratio_std"] == 0.0
    logp, weight, lengths = terms()
    if floor:
        expected, _, _ = gradient(objectives.reinforce)
    else:  # a mean over all tokens
        expected = -objectives.advantages(REWARDS, GROUPS)[:, None] * weight / weight.sum()
    assert torch.allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("name", ["espo", "ebpo", "agrpo"])
def test_runaway_ratios_stay_finite_and_are_counted(name):
    logp, _, _ = terms()
    for shift in (-500.0, 500.0):
        found, loss, statistics = gradient(OBJECTIVES[name], old=logp + shift)
        assert math.isfinite(loss) and torch.isfinite(found).all() and statistics["clip_share"] == 1.0


def test_clipping_takes_the_gradient_of_winners_that_have_won_enough_and_espo_bounds_losers_too():
    logp, weight, lengths = terms()
    rewards, groups = torch.tensor([1.0, 0, 1, 0, 1, 0]), torch.zeros(6, dtype=torch.long)
    found, _, _ = gradient(objectives.agrpo, rewards, groups, old=logp - 1.0)  # every ratio is e
    assert (found[rewards == 1] == 0).all() and (found[rewards == 0][weight[rewards == 0] != 0] > 0).all()
    old = logp.clone()
    old[1] -= 6.0  # each token of one loser has become e^6 times as likely
    wild = gradient(objectives.ebpo, rewards, groups, old=old)[0][1].abs().max()
    calm = gradient(objectives.espo, rewards, groups, old=old)[0][1].abs().max()
    assert wild > 100 * calm > 0


# ---- one by one -----------------------------------------------------------------------------------------------------------------

def test_wd1_by_hand():
    logp, weight = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, _ = objectives.wd1(logp, logp, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), weight, torch.tensor([2, 1]))
    up = math.exp(0.5) / (math.exp(0.5) + math.exp(-0.5))
    assert math.isclose(loss, -((up - (1 - up)) * -3 + ((1 - up) - up) * -3), abs_tol=1e-6)
    sharper, _ = objectives.wd1(logp * weight, logp, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([2, 1]), psi=2.0)
    assert math.isclose(sharper, -(math.tanh(1.0) * -1 - math.tanh(1.0) * -3), abs_tol=1e-5)


def test_k2_pulls_the_elbo_back_to_the_reference_and_k3_is_zero_there():
    logp, weight, lengths = terms()
    equal = torch.zeros(6)
    for objective, beta in ((objectives.espo, 0.1), (objectives.diffu_grpo, 0.04)):
        at_home, loss, _ = gradient(objective, equal, beta=beta, reference=logp)
        assert torch.allclose(at_home, torch.zeros(()), atol=1e-7) and abs(loss) < 1e-7
        away, loss, _ = gradient(objective, equal, beta=beta, reference=logp - 1.0)
        assert (away[weight != 0] > 0).all() and loss > 0  # more likely than under the reference: pushed down
    value = objectives.espo(logp, logp, equal, GROUPS, weight, lengths, beta=0.1, reference=logp - 1.0)[0]
    assert math.isclose(value, 0.1 * (weight.sum(1).square() / 2 / lengths).mean(), rel_tol=1e-5)
    with pytest.raises(HildaError, match="pass its log-probabilities as reference, or set beta to 0"):
        objectives.espo(logp, logp, equal, GROUPS, weight, lengths, beta=0.1)


# ---- the gradient in the model ----------------------------------------------------------------------------------------------------

def task_of(reward):
    return SimpleNamespace(name="bandit", version=1, prompt=lambda item: item["prompt"], score=lambda text, item: reward(text))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(method):
    model, tokenizer = tiny(1, block_size=1 if method == "AR GRPO" else 4, sharpen=4.0)
    recipe = RLRecipe(method, prompts=3, group=4, updates=1)
    settings = replace(SETTINGS, max_new_tokens=6, tau_edit=0.1 if method != "AR GRPO" else 2.0)
    pool, found = [{"prompt": "1+2="}, {"prompt": "7"}, {"prompt": "33-1="}], []
    for micro in (64, 5):
        run = trainer._Run(model, tokenizer, task_of(lambda text: text.count("1") / (len(text) + 1)), pool, replace(recipe, micro_batch=micro), settings, False)
        items = [item for item in pool for _ in range(4)]
        ids, real = trainer._encode(tokenizer, run.task, items, False, EOS)
        rollout = sample(model, ids, settings, attention_mask=real, generator=torch.Generator().manual_seed(0))
        rewards = score(rollout.ids, tokenizer, run.task, items)
        batch = run._batch(rollout, items, rewards, torch.arange(3).repeat_interleave(4), 0)
        batch = replace(batch, reference=None if run.reference is None else scored(run.reference, batch.states, micro))
        model.zero_grad()
        policy_gradient(model, batch.states, partial(batch.loss, run.method.objective), micro)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*found, atol=1e-5 * found[0].abs().max()) and found[0].abs().max() > 0


def test_a_policy_scored_twice_under_the_same_states_has_ratio_1_with_any_micro_batch():
    model, _ = tiny(1, sharpen=4.0)
    rollout = sample(model, torch.tensor([[5, 6, 7]] * 6), replace(SETTINGS, max_new_tokens=6), generator=torch.Generator().manual_seed(0))
    states = likelihood.elbo_states(rollout, 2, "balanced", torch.Generator().manual_seed(0))
    logp, weight = likelihood.token_logp(model, states)[0].flatten(1), states.weight.flatten(1)
    for micro in (2, 6):
        old = scored(model, states, micro).flatten(1)
        _, statistics = objectives.espo(logp, old, REWARDS, GROUPS, weight, rollout.scored.sum(1))
        assert abs(statistics["ratio_min"] - 1) < 1e-6 and abs(statistics["ratio_max"] - 1) < 1e-6


@pytest.mark.parametrize("method", [name for name in METHODS if name != "AR GRPO"])
def test_groups_with_equal_rewards_change_no_weight(method, tmp_path):
    model, tokenizer = tiny(1)
    before = weights(model)
    log = rl.train(model, tokenizer, task_of(lambda text: 1.0), [{"prompt": "1"}], RLRecipe(method, steps=1, prompts=1, group=2), SETTINGS, tmp_path)
    assert torch.equal(weights(model), before) and log.equal_groups[0] == 1.0 and log.learn_forwards[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_solves_a_bandit_of_two_tokens(method, tmp_path):
    """Reward: the share of the two tokens that is "7". One prompt, thirty steps, a second or two: at the end the policy is sure."""
    ar = method == "AR GRPO"
    model, tokenizer = tiny(1, block_size=1 if ar else 4)
    recipe = RLRecipe(method, steps=30, prompts=1, group=16, updates=1, lr=2e-2, max_grad_norm=1.0, weight_decay=0.0, eval_every=100)
    settings = replace(SETTINGS, tau_edit=2.0 if ar or "edits" not in method else 0.5, max_post_steps=2)
    log = rl.train(model, tokenizer, task_of(lambda text: text[:2].count("7") / 2), [{"prompt": "1"}], recipe, settings, tmp_path)
    assert log.reward[0] < 0.5 and log.reward[-5:].mean() > 0.95

# ---- what a method climbs, by enumeration -----------------------------------------------------------------------------------------

def worth(text):
    """A reward that is no sum over tokens; small, where softmax weights are linear in the advantage."""
    return 0.05 * (7 * int("1" + text) % 11) / 11


def small(size=2):
    """A model with few tokens, and `look(canvas)`: (2, V) log-probabilities of the two answer tokens, by an uncached forward."""
    model, tokenizer = tiny(1, block_size=size, sharpen=5.0, vocabulary="0123")
    prompt = tokenizer("01")["input_ids"]

    def look(*canvas):
        ids = torch.tensor(prompt + list(canvas))
        return reference._logits(model, ids, len(ids), attention.block_causal(len(ids), size))[2:].log_softmax(-1)

    def reward(*ids):
        cut = ids[:ids.index(EOS)] if EOS in ids else ids
        return worth(tokenizer.decode(cut, skip_special_tokens=True))

    return model, tokenizer, look, reward, [token for token in range(len(tokenizer)) if token != MASK]


def estimated(method, model, tokenizer, settings, rows=6000):
    """(parameters,) gradient that a method gives on one group of `rows` completions."""
    model.set_attn_implementation(TILED)
    run = trainer._Run(model, tokenizer, task_of(worth), [{"prompt": "01"}], RLRecipe(method, prompts=1, group=rows, micro_batch=rows), settings, False)
    batch = run._batch(*run.roll(), 0)
    policy_gradient(model, batch.states, partial(batch.loss, run.method.objective), rows)
    model.set_attn_implementation("sdpa")
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient_of(value, model):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])


def same(found, expected):
    return (found - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("method, scale", [("wd1", 2.0), ("wd1++", 2.0), ("AGRPO", 0.5)])
def test_where_a_block_is_written_at_once_the_mean_gradient_is_that_of_the_expected_reward(method, scale):
    """wd1's two softmaxes differ by 2 A / N; a mean over tokens halves where there are two. REINFORCE and its kin climb the ELBO instead."""
    model, tokenizer, look, reward, tokens = small()
    logp = look(MASK, MASK)
    value = sum((logp[0, a] + logp[1, b]).exp() * reward(a, b) for a in tokens for b in tokens)
    found = estimated(method, model, tokenizer, replace(SETTINGS, commit=commit.Quota(2)))
    assert same(found, -scale * gradient_of(value, model))


@pytest.mark.parametrize("method, rows", [("wd1++", 6000), ("wd1++ redrawn", 600)])
def test_wd1pp_climbs_the_reward_of_whole_predictions_at_the_states_that_decoding_visits(method, rows):
    """Two rounds of one token each: the first prediction with weight 1, the second, one mask of two, with weight 2; how likely the state
    is carries no gradient. All 64 predictions of the first round are enumerated, each with the state that it leads to."""
    model, tokenizer, look, reward, tokens = small()
    logp = look(MASK, MASK)
    value = second = 0.0
    for a in tokens:
        for b in tokens:
            chance = (logp[0, a] + logp[1, b]).exp()
            value = value + chance * reward(a, b)
            first = bool(logp[0, a] >= logp[1, b])  # the more confident of the two is written
            if first and a == EOS:
                continue  # what comes after an EOS is not scored
            then = look(a, MASK)[1] if first else look(MASK, b)[0]
            second += chance.item()
            value = value + 2 * chance.detach() * sum(then[c].exp() * (reward(a, c) if first else reward(c, b)) for c in tokens)
    found = estimated(method, model, tokenizer, SETTINGS, rows)
    if method == "wd1++ redrawn":  # its N leaves out states whose predictions earn the same, so only the direction is known
        expected = -gradient_of(value, model)
        assert torch.cosine_similarity(found, expected, 0) > 0.99
        return
    assert same(found, -2 / (1 + second) * gradient_of(value, model))  # 2 A / N again, N counting both samples of a row


def test_a_graded_task_is_scored_by_its_partial_credit():
    task, item = graded(tasks.load("arithmetic")), {"terms": [17, 25], "ops": ["+"]}
    assert task.prompt(item) == "17+25=" and task.score("17+25=43;43", item) == 5 / 7
    with pytest.raises(HildaError, match="task countdown has no partial credit"):
        graded(tasks.load("countdown"))


# ---- the loop -------------------------------------------------------------------------------------------------------------------

def short_run(folder, steps=6, **changes):
    model, tokenizer = tiny(1, sharpen=2.0)
    recipe = RLRecipe("ESPO", steps=steps, prompts=2, group=4, updates=2, lr=1e-3, save_every=1, **changes)
    pool = [{"prompt": text} for text in ("1", "2+2=", "9-", "345")]
    log = rl.train(model, tokenizer, task_of(lambda text: text.count("1") / (len(text) + 1)), pool, recipe, replace(SETTINGS, max_new_tokens=6), Path(folder),
                   evaluate=lambda model: {"held_out": float(weights(model).sum())})
    return weights(model), log


STABLE = ["step", "reward", "loss", "grad_norm", "entropy", "log_ratio_std", "forwards", "learn_positions"]


def test_the_learning_rate_falls_on_a_line_from_lr_to_its_end():
    model, tokenizer = tiny(1, sharpen=2.0)
    for end, expected in ((1.0, [2.0, 2.0, 2.0, 2.0]), (0.0, [2.0, 1.5, 1.0, 0.5])):
        recipe = RLRecipe("wd1", steps=4, prompts=1, group=4, lr=2.0, lr_end=end)
        run = trainer._Run(model, tokenizer, task_of(lambda text: text.count("1") / (len(text) + 1)), [{"prompt": "1"}], recipe, SETTINGS, False)
        run.optimizer.step, found = lambda: None, []
        for _ in range(4):
            run.advance()
            found.append(run.optimizer.param_groups[0]["lr"])
        assert found == pytest.approx(expected)


def test_a_run_repeats_and_a_finished_one_is_loaded(tmp_path):
    first, log = short_run(tmp_path / "a")
    again, other = short_run(tmp_path / "b"), short_run(tmp_path / "c", seed=1)
    assert torch.equal(first, again[0]) and log[STABLE].equals(again[1][STABLE]) and not torch.equal(first, other[0])
    start = time.perf_counter()
    loaded, back = short_run(tmp_path / "a")
    assert torch.equal(loaded, first) and back.reward.round(6).equals(log.reward.round(6)) and time.perf_counter() - start < 5
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"model", "log.csv", "fingerprint.txt"}
    assert log.held_out.notna().tolist() == [False] * 4 + [True, True] and (log.log_ratio_std > 0).all()


def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
    """SIGKILL after some steps; the rerun gives the weights and the log of an undisturbed run, bit for bit."""
    cut = tmp_path / "cut"
    code = f"import sys, torch; torch.set_num_threads(1); sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_rl; test_rl.short_run({str(cut)!r}, steps=40)"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not (cut / "state.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (cut / "state.pt").exists() and not (cut / "log.csv").exists(), "the run was over before it could be killed"
    resumed, log = short_run(cut, steps=40)
    whole, expected = short_run(tmp_path / "whole", steps=40)
    assert torch.equal(resumed, whole) and log[STABLE].equals(expected[STABLE])


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_not_resumed(tmp_path):
    expected, _ = short_run(tmp_path / "whole")
    for name, content in (("other", None), ("damaged", b"PK\x03\x04 half a file")):
        folder = tmp_path / name
        folder.mkdir()
        if content:
            (folder / "state.pt").write_bytes(content)
        else:
            torch.save({"fingerprint": "another", "step": 5}, folder / "state.pt")
        assert torch.equal(short_run(folder)[0], expected)


def test_every_pass_shows_every_prompt_once_in_a_new_order():
    pool, recipe = [{"n": n} for n in range(6)], RLRecipe(prompts=4)
    shown = [item["n"] for step in range(9) for item in trainer.prompts_of(step, recipe, pool)]
    passes = [tuple(shown[start:start + 6]) for start in range(0, 36, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes) and len(set(passes)) > 3


def test_success_rates_are_means_of_rewards_in_the_order_of_the_items():
    model, tokenizer = tiny(1)
    task = SimpleNamespace(name="t", prompt=lambda item: item["prompt"], score=lambda text, item: item["worth"] * (len(text) > 0))
    items = [{"prompt": str(n), "worth": n / 4} for n in range(5)]
    rates = trainer.success_rates(model, tokenizer, task, items, replace(SETTINGS, max_new_tokens=6), group=3, batch_size=7)
    assert torch.allclose(rates, torch.arange(5) / 4) and torch.equal(rates, trainer.success_rates(model, tokenizer, task, items, replace(SETTINGS, max_new_tokens=6), group=3, batch_size=7))


@pytest.mark.parametrize("changes, message", [({"method": "PPO"}, "method 'PPO' is unknown; use one of wd1"), ({"group": 1}, "group = 1: a completion is judged"),
                                              ({"steps": 0}, "steps = 0 must be at least 1")])
def test_impossible_recipes_are_named(changes, message):
    with pytest.raises(HildaError, match=message):
        RLRecipe(**changes)


def test_an_empty_pool_and_temperature_0_are_refused(tmp_path):
    model, tokenizer = tiny()
    with pytest.raises(HildaError, match="pool of prompts is empty"):
        rl.train(model, tokenizer, task_of(len), [], RLRecipe(), SETTINGS, tmp_path)
    with pytest.raises(HildaError, match="temperature = 0 samples the same answer"):
        rl.train(model, tokenizer, task_of(len), [{"prompt": "1"}], RLRecipe(), replace(SETTINGS, temperature=0.0), tmp_path)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    model, tokenizer = tiny(1)
    states = likelihood.mean_field(sample(model, torch.tensor([[5, 6]]), SETTINGS))
    with pytest.raises(HildaError, match="loss is nan: lower lr"):
        policy_gradient(model, states, lambda logp: (logp.sum() * torch.nan, {}), 4)


# ---- hostile completions ----------------------------------------------------------------------------------------------------------

ITEMS = {"arithmetic": {"terms": [40, 2], "ops": ["+"]}, "countdown": {"numbers": [3, 7, 5], "target": 26}, "gsm8k": {"answer": "#### 42"},
         "gsm_symbolic": {"answer": "#### 42"}, "sudoku": {"puzzle": "1234;3410;2040;4320", "solution": "1234;3412;2143;4321"}}


@pytest.mark.parametrize("name", ITEMS)
def test_hostile_completions_earn_nothing_in_bounded_time_and_do_nothing(name, tmp_path, monkeypatch):
    """Through the path that rewards take: code in an expression, huge numbers, nested powers, unicode digits, 1 MB of text."""
    monkeypatch.chdir(tmp_path)
    evil = "open('evil', 'w')"
    texts = [evil, f"3*7=21,21+{evil}=26", f"40+2={evil};{evil}", f"#### {evil}", f"__import__('pathlib').Path('evil').touch() or 42", "9" * 1_000_000,
             "40+2=" + "9" * 1_000_000 + ";" + "9" * 1_000_000, "9**9**9**9", "3*7=21,21+9**9**9**9=26", "#### 9**9**9**9", "(" * 1_000_000, "40+2=42;٤٢",
             "#### ٤٢", "40+2=42;４２", "3*7=21,21+５=26", "３*7=21,21+5=26", "1²34;3412;2143;4321", "x" * 1_000_000, "#### " * 200_000, ";" * 1_000_000, "1+" * 500_000,
             "\0" * 1_000_000, "1234;" * 200_000]
    tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: texts)
    start = time.process_time()
    assert not score(torch.zeros(len(texts), 1), tokenizer, tasks.load(name), [ITEMS[name]] * len(texts)).any()
    assert time.process_time() - start < 10 and not list(tmp_path.iterdir())
