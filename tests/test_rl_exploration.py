"""Exploration wrappers: the hard budget of forwards, credit for the part that was explored, prompts restored in the loss, and runs that repeat."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS, MASK, tiny, weights

from hildalib import HildaError, rl, tasks
from hildalib.attention import TILED
from hildalib.decoding import EditSettings, commit, edit_decode
from hildalib.rl import METHODS, RLRecipe, likelihood, trainer
from hildalib.rl.exploration import EXPLORATIONS, Explorer, Finish, Plain, Prune, Purify, Retry
from hildalib.rl.rollout import continued, joined, most_forwards, moved, spared

SETTINGS = EditSettings(tau_edit=2.0, max_new_tokens=10, temperature=1.0, commit=commit.Quota(2))
POOL = [{"prompt": text} for text in ("1", "2+2=", "9-", "345+17")]


def share(text):
    return text.count("1") / (len(text) + 1)


def task_of(reward, **extra):
    return SimpleNamespace(name="t", version=1, prompt=lambda item: item["prompt"], score=lambda text, item: reward(text), **extra)


def bench_of(reward=share, settings=SETTINGS, sharpen=4.0, other=None, **extra):
    model, tokenizer = tiny(1, sharpen=sharpen)
    model.eval()
    return Explorer(model, other or model, tokenizer, task_of(reward, **extra), settings, [EOS])


def prompts_of(bench):
    return bench.tokenizer([item["prompt"] for item in POOL], add_special_tokens=False)["input_ids"]


def plain_of(bench, rewards, seed=0):
    """A plain half of two attempts each with the rewards as given, so that what a wrapper does with them is known."""
    ids = [prompt for prompt in prompts_of(bench) for _ in range(2)]
    rollout, _ = bench.decode(ids, bench.settings, torch.Generator().manual_seed(seed))
    return Plain(prompts_of(bench), POOL, rollout, torch.tensor(rewards), 2)


def explored(name, bench, seed=0, group=8):
    return bench.explore(name, prompts_of(bench), POOL, group, torch.Generator().manual_seed(seed))


def nudged(seed=5, size=0.05):
    model, _ = tiny(1, sharpen=4.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model.eval()


# ---- the budget -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"commit": commit.Quota(3)}, {"commit": None, "tau_mask": 2.0}, {"tau_edit": 0.1, "max_post_steps": 2},
                                     {"commit": None, "tau_mask": 0.4, "minimum": 2, "block_size": 1}])
def test_no_completion_costs_more_than_the_worst_case_and_one_without_end_costs_it(changes):
    model, _ = tiny(1, sharpen=4.0)
    settings = replace(SETTINGS, **changes)
    for length in (1, 3, 4, 6):
        prompts = torch.randint(5, 19, (6, length), generator=torch.Generator().manual_seed(length))
        decoded = edit_decode(model, prompts, replace(settings, stop_at_eos=False), generator=torch.Generator().manual_seed(0))
        most = most_forwards(settings, settings.block_size or 4, length)
        assert decoded.forwards.max() <= most and (decoded.forwards.max() == most or "max_post_steps" in changes or settings.block_size == 1)


@pytest.mark.parametrize("name", EXPLORATIONS)
@pytest.mark.parametrize("reward", [share, lambda text: 0.0, lambda text: 1.0])
def test_the_explored_half_never_spends_more_than_the_plain_half(name, reward):
    bench = bench_of(reward, other=nudged())
    for seed in range(3):
        rollout, items, rewards, groups = explored(name, bench, seed)
        plain, _ = bench.decode([prompt for prompt in prompts_of(bench) for _ in range(4)], bench.settings, torch.Generator().manual_seed(seed))
        assert torch.equal(rollout.ids[:16], plain.ids) and rollout.forwards.sum() <= 2 * plain.forwards.sum()
        assert len(rollout.x0) == len(items) == len(rewards) == len(groups)
        assert all(items[row] is POOL[row // 4] for row in range(16))


def test_a_budget_begins_only_rows_whose_worst_case_it_covers_and_gives_back_what_they_left():
    bench, generator = bench_of(), torch.Generator().manual_seed(0)
    prompt = prompts_of(bench)[0]
    worst = most_forwards(SETTINGS, 4, len(prompt))
    assert bench.decode([prompt] * 3, SETTINGS, generator, worst - 1) == (None, [])
    with_eos = bench_of()
    with torch.no_grad():
        with_eos.model.get_output_embeddings().weight[EOS] *= 8  # short answers leave much over
    rollout, begun = with_eos.decode([prompt] * 9, SETTINGS, generator, 3 * worst)
    assert rollout.forwards.sum() <= 3 * worst and begun == list(range(len(rollout.x0)))
    assert len(begun) == 9 or 3 * worst - rollout.forwards.sum() < worst


# ---- rollouts made in another way -------------------------------------------------------------------------------------------------

def test_replayed_steps_joined_rows_and_an_unmoved_row_are_what_the_decoder_made():
    bench = bench_of()
    rollout, _ = bench.decode(prompts_of(bench), SETTINGS, torch.Generator().manual_seed(0))
    other, _ = bench.decode(prompts_of(bench)[:1], replace(SETTINGS, commit=commit.Quota(4)), torch.Generator().manual_seed(0))
    assert other.x0.shape[1] < rollout.x0.shape[1] and other.noisy.shape[1] < rollout.noisy.shape[1]
    both = joined([other, rollout])
    for states in (likelihood.mean_field, lambda r: likelihood.trajectory(r, edits=True), lambda r: likelihood.denoising(r, [EOS])):
        def total(r, states=states):
            found = states(r)
            return (likelihood.token_logp(bench.model, found)[0] * found.weight).sum((1, 2)).detach()
        assert torch.allclose(total(both), torch.cat([total(other), total(rollout)]), atol=1e-4)
    back = moved(rollout, prompts_of(bench), [EOS])
    assert torch.equal(back.scored, rollout.scored) and torch.equal(back.x0[back.scored], rollout.x0[rollout.scored])
    length = back.noisy.shape[1]
    same = back.scored[:, None].expand(-1, length, -1)
    assert torch.equal(back.noisy[same], rollout.noisy[:, :length][same]) and torch.equal(back.wrote[same], rollout.wrote[:, :length][same])
    assert not back.credit[~back.scored].any()


def test_a_completion_that_was_begun_for_the_decoder_is_scored_only_where_it_went_on():
    bench = bench_of()
    rollout, _ = bench.decode(prompts_of(bench), SETTINGS, torch.Generator().manual_seed(0))
    until = rollout.prompt_length + 2
    kept = [row[:end].tolist() for row, end in zip(rollout.x0, until.tolist())]
    again, _ = bench.decode(kept, replace(SETTINGS, max_new_tokens=8), torch.Generator().manual_seed(1))
    again = continued(again, rollout.prompt_length, 10, [EOS])
    assert torch.equal(again.ids[:, :2], rollout.ids[:, :2]) and again.ids.shape == rollout.ids.shape
    for part in (again, spared(rollout, until)):
        states = likelihood.mean_field(part)
        given = torch.arange(part.x0.shape[1]) < until[:, None]
        assert not (states.weight[:, 0] != 0)[given].any() and not (states.noisy[:, 0] == MASK)[given].any()
        assert ((states.weight[:, 0] != 0) == part.scored).all() and part.scored.any(1).all()


# ---- one by one -----------------------------------------------------------------------------------------------------------------

def test_certain_blocks_are_finished_in_one_forward_whose_surplus_is_not_trained():
    bench = bench_of(settings=(cold := replace(SETTINGS, temperature=0.3)))
    prompts, rule = prompts_of(bench) * 4, Finish(SETTINGS.commit, 0.1)
    rollout, _ = bench.decode(prompts, replace(cold, commit=rule), torch.Generator().manual_seed(0))
    late = Prune(0.1)._late(rollout, rule.tokens)
    written = rollout.wrote.unflatten(-1, (-1, 4)).sum(-1)
    assert late.any() and (rollout.confidence[late] > 0.1).all() and written.max() > 2
    assert int((written > 2).sum()) == int(late.unflatten(-1, (-1, 4)).any(-1).sum())
    never, _ = bench.decode(prompts, replace(cold, commit=Finish(SETTINGS.commit, 1.0)), torch.Generator().manual_seed(0))
    quota, _ = bench.decode(prompts, cold, torch.Generator().manual_seed(0))
    assert torch.equal(never.ids, quota.ids) and torch.equal(never.forwards, quota.forwards) and not Prune(1.0)._late(never, 2).any()


def test_pruning_gives_the_prefix_that_all_attempts_share_and_takes_it_from_every_loss():
    bench = bench_of()
    plain = plain_of(bench, [0.0] * 8)
    row = plain.rollout
    length = int(row.prompt_length[2])
    x0, confidence = row.x0.clone(), row.confidence.clone()
    x0[2, length:length + 3] = x0[3, length:length + 3] = torch.tensor([7, 8, 9])  # prompt 1 agrees on three, surely on two
    x0[2, length + 3] = 10 - (x0[3, length + 3] == 10).long()
    confidence[2:4, length:length + 2], confidence[3, length + 2] = 0.99, 0.5
    confidence[[0, 1, 4, 5, 6, 7]] = 0.1
    plain = replace(plain, rollout=replace(row, x0=x0, confidence=confidence, scored=row.scored | (torch.arange(8) // 2 == 1)[:, None]))
    made, _, _, groups = Prune(0.9)(bench, plain, torch.Generator().manual_seed(0))
    start = made.prompt_length
    pair = groups == 1
    assert (made.ids[pair][2:, :2] == torch.tensor([7, 8])).all() and len(made.ids[pair]) > 2
    assert not any(made.scored[i, start[i]:start[i] + 2].any() for i in pair.nonzero()[:, 0])
    assert all(made.scored[i, start[i]] for i in (~pair).nonzero()[:, 0])
    off, _, _, _ = Prune(1.0)(bench, plain, torch.Generator().manual_seed(0))
    assert (off.scored[torch.arange(8), off.prompt_length[:8]]).all() and (off.credit[off.scored] == 1).all()


def test_a_failed_attempt_is_repeated_from_its_first_wrong_block_and_only_the_rest_is_trained():
    bench = bench_of(sound=lambda text, item: 6)
    plain = plain_of(bench, [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    made, items, rewards, groups = Retry()(bench, plain, torch.Generator().manual_seed(0))
    assert len(made.x0) == 10 and groups[8:].tolist() == [0, 1] and made.forwards[8:].sum() <= plain.budget
    for new, old in ((8, 0), (9, 2)):
        start, count = int(made.prompt_length[old]), int(plain.rollout.scored[old].sum())
        cut = max((start + min(6, count - 1)) // 4 * 4, start)
        assert torch.equal(made.x0[new, :cut], made.x0[old, :cut]) and cut > start
        for row in (old, new):
            assert not made.scored[row, :cut].any() and made.scored[row, cut] and made.prompt_length[row] == start
    assert (made.credit[[1, 3]] > 1).all() and torch.equal(made.scored[1], plain.rollout.scored[1])
    a = 1 - torch.tensor([0.0, 1.0, rewards[8]]).mean()
    assert torch.allclose(made.credit[1], 1 / a)  # a right answer counts 1 where its advantage was a


def test_without_a_criterion_the_block_of_the_least_sure_token_is_the_wrong_one():
    bench = bench_of()
    plain = plain_of(bench, [0.0] * 8)
    for row in range(8):
        least = int(plain.rollout.confidence[row].masked_fill(~plain.rollout.scored[row], 2.0).argmin())
        assert Retry()._wrong(bench, plain, row) == max(least // 4 * 4, int(plain.rollout.prompt_length[row]))


def test_tasks_say_how_far_a_text_is_right():
    item = {"terms": [17, 25, 8], "ops": ["+", "-"]}
    arithmetic, shortcuts = tasks.load("arithmetic"), tasks.load("shortcuts")
    assert [arithmetic.sound(text, item) for text in ("17+25=42;42-8=34;34", "17+25=43;43-8=35;35", "34", "")] == [19, 7, 0, 0]
    assert [shortcuts.sound(text, item) for text in ("34", "35", "17+25=42;42-9", "3x")] == [2, 1, 12, 1]


def test_lens_deletes_what_rl_moved_most_and_restores_the_prompt_in_the_loss():
    bench = bench_of(other=nudged())
    plain = plain_of(bench, [0.0] * 8)
    wrapper = Purify(gamma=0.3)
    change = bench.moved_by(plain.prompts)
    for prompt, values in zip(plain.prompts, change):
        ids = torch.tensor([prompt])
        now, then = (model(input_ids=ids).logits[0].index_fill(-1, torch.tensor([MASK]), -torch.inf).log_softmax(-1) for model in (bench.model, bench.start))
        expected = (now - then)[:-1].gather(1, ids[0, 1:, None])[:, 0].abs()
        assert values[0] == 0 and torch.allclose(values[1:], expected, atol=1e-4)
    shorter = wrapper._shorter(bench, dict(enumerate(plain.prompts)))
    assert 0 not in shorter and len(shorter[3]) == 6 - 2  # a prompt of one token has none to lose
    gone = change[3].topk(2).indices.tolist()
    assert shorter[3] == [token for at, token in enumerate(plain.prompts[3]) if at not in gone]
    right = bench_of(lambda text: 1.0, other=nudged())  # every answer of the other half is right
    made, items, rewards, groups = wrapper(right, plain, torch.Generator().manual_seed(0))
    assert made.forwards.sum() <= 2 * plain.budget
    used = [(groups == number).nonzero()[:, 0].tolist() for number in range(4)]
    assert all(len(rows) == 2 and max(rows) >= 8 for rows in used[1:])  # right ones in the place of as many wrong ones
    for number in (1, 2, 3):
        for row in (row for row in used[number] if row >= 8):
            assert rewards[row] == 1 and made.x0[row, :made.prompt_length[row]].tolist() == plain.prompts[number]
            assert (made.credit[row][made.scored[row]] == 1).all()
            ids = made.x0[row][made.scored[row]]
            assert torch.equal(made.ids[row, :len(ids)], ids)


def test_lens_weighs_a_rebuilt_group_and_leaves_one_alone_whose_shorter_prompt_is_no_better():
    bench = bench_of(other=nudged())
    half, generator = 4, torch.Generator().manual_seed(0)
    ids = [prompt for prompt in prompts_of(bench) for _ in range(half)]
    rollout, _ = bench.decode(ids, bench.settings, generator)
    rewards = torch.tensor([0.0, 1, 0, 0] * 2 + [1.0] * 8)
    both = joined([rollout, rollout.take(torch.arange(8))])
    rewards = torch.cat([rewards, torch.tensor([1.0, 0, 1, 0, 0, 0, 1, 0])])
    groups = torch.cat([torch.arange(4), torch.arange(2)]).repeat_interleave(4)
    alone = Purify()._transfer(both, rewards, groups, 0, 16, 0.25)
    assert sorted(alone.tolist()) == [0, 2, 17, 19]
    assert (both.credit[1] == 0.25).all() and (both.credit[[3, 16, 18]] == 0.75).all() and (both.credit[4:16] == 1).all()
    assert Purify()._transfer(both, rewards, groups, 1, 16, 0.25).tolist() == [20, 21, 22, 23] and (both.credit[4:8] == 1).all()


# ---- nothing to do --------------------------------------------------------------------------------------------------------------

def test_where_nothing_qualifies_both_halves_are_plain():
    bench = bench_of(lambda text: 1.0)
    generator = torch.Generator().manual_seed(0)
    rounds = plain_of(bench, [1.0] * 8)
    again, begun = bench.decode([rounds.prompts[number] for number in rounds.rounds], bench.settings, torch.Generator().manual_seed(3), rounds.budget)
    for wrapper in (Purify(tau=0.0), Purify(tau=2.0), Prune(tau=1.0)):  # no prompt is hard; start and policy are one; nothing is certain
        made, _, _, groups = wrapper(bench, rounds, generator.manual_seed(3))
        if wrapper != Purify(tau=2.0):  # which paid for scores
            assert torch.equal(made.ids[8:], again.ids) and groups[8:].tolist() == [rounds.rounds[i] for i in begun]
        assert (made.credit[made.scored] == 1).all() and groups.max() < 4
    made, _, _, _ = Retry()(bench, rounds, generator)
    assert torch.equal(made.ids, rounds.rollout.ids) and torch.equal(made.scored, rounds.rollout.scored) and (made.credit == 1).all()


# ---- in the loop ----------------------------------------------------------------------------------------------------------------

def run_of(name, method="wd1", reward=share, steps=3, **changes):
    model, tokenizer = tiny(1, sharpen=4.0)
    recipe = RLRecipe(method, steps=steps, prompts=3, group=4, lr=1e-3, exploration=name, save_every=1, **changes)
    return model, tokenizer, task_of(reward), recipe


@pytest.mark.parametrize("method", [name for name in METHODS if name != "AR GRPO"])
@pytest.mark.parametrize("name", EXPLORATIONS)
def test_every_wrapper_goes_with_every_method(name, method):
    model, tokenizer, task, recipe = run_of(name, method, lambda text: float(share(text) > 0.1))
    model.eval().set_attn_implementation(TILED)
    run = trainer._Run(model, tokenizer, task, POOL, recipe, SETTINGS, False)
    rows = [run.advance() for _ in range(3)]
    assert any(row["learn_forwards"] for row in rows) and all(row.get("loss", 0.0) == row.get("loss", 0.0) for row in rows)


@pytest.mark.parametrize("name", EXPLORATIONS)
def test_only_tokens_with_credit_move_the_loss(name):
    model, tokenizer, task, recipe = run_of(name, reward=lambda text: float(share(text) > 0.1))
    model.eval().set_attn_implementation(TILED)
    run = trainer._Run(model, tokenizer, task, POOL, recipe, SETTINGS, False)
    while (batch := run._batch(*(rolled := run.roll()), 0)) is None:  # a step whose rewards are all equal
        run.step += 1
    rollout, items, rewards, groups = rolled
    rows = torch.isin(groups, batch.groups)
    trained = batch.states.weight[:, 0] != 0
    assert torch.equal(trained, (rollout.scored & (rollout.credit > 0))[rows]) and (batch.lengths == trained.sum(1).clamp(min=1)).all()


@pytest.mark.parametrize("name", EXPLORATIONS)
def test_equal_rewards_change_no_weight(name, tmp_path):
    for value in (0.0, 1.0):
        model, tokenizer, task, recipe = run_of(name, reward=lambda text, value=value: value)
        before = weights(model)
        log = rl.train(model, tokenizer, task, POOL, recipe, SETTINGS, tmp_path / f"{value}")
        assert torch.equal(weights(model), before) and (log.equal_groups == 1).all() and not log.learn_forwards.any()


@pytest.mark.parametrize("name", EXPLORATIONS)
def test_a_wrapped_run_repeats_and_continues_where_it_stopped(name, tmp_path, monkeypatch):
    def trained(folder, **changes):
        model, tokenizer, task, recipe = run_of(name, steps=4, **changes)
        log = rl.train(model, tokenizer, task, POOL, recipe, SETTINGS, tmp_path / folder)
        return weights(model), log

    whole, log = trained("whole")
    assert torch.equal(trained("again")[0], whole) and not torch.equal(trained("other", seed=1)[0], whole)
    advance = trainer._Run.advance

    def stopping(run):
        if run.step == 2:
            raise KeyboardInterrupt
        return advance(run)

    monkeypatch.setattr(trainer._Run, "advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained("cut")
    monkeypatch.setattr(trainer._Run, "advance", advance)
    resumed, other = trained("cut")
    columns = ["step", "reward", "forwards", "positions", "learn_positions", "equal_groups"]
    assert torch.equal(resumed, whole) and other[columns].equals(log[columns])


def test_a_wrapper_is_part_of_what_a_run_depends_on():
    model, _ = tiny(1)
    found = [trainer._fingerprint(model, POOL, RLRecipe("wd1", group=4, exploration=name), SETTINGS, task_of(share)) for name in ("", *EXPLORATIONS)]
    assert len(set(found)) == 4


@pytest.mark.parametrize("changes, message", [({"exploration": "luck"}, "exploration 'luck' is unknown; use one of STP-inspired"),
                                              ({"exploration": "LENS-like", "group": 3}, "group = 3: with exploration half")])
def test_impossible_wrappers_are_named(changes, message):
    with pytest.raises(HildaError, match=message):
        RLRecipe("wd1", **changes)
