"""Rollouts and likelihoods against what the decoder did, enumeration, and a slow reference; leakage; the hard forward budget."""

import itertools
import math
from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tiny import EOS, MASK, tiny

from hildalib import HildaError, objective
from hildalib.decoding import EditSettings, ar_decode, edit_decode
from hildalib.rl import likelihood
from hildalib.rl.rollout import Rollout, sample, score, spliced, within

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [5, 9, 7, 6, 8], [0, 0, 0, 0, 9]])
REAL = (PROMPTS > 0).long()
WILD = EditSettings(tau_mask=0.3, tau_edit=0.1, max_post_steps=3, max_new_tokens=9, temperature=0.9, block_size=4)


def rolled(seed=0, shift=True, eos=0.0, model_seed=1, **changes):
    """(model, rollout) of three prompts; eos > 0 makes EOS more likely."""
    model, _ = tiny(model_seed, shift=shift, sharpen=6.0)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] += eos * model.get_output_embeddings().weight.abs().mean()
    return model, sample(model, PROMPTS, replace(WILD, **changes), attention_mask=REAL, generator=torch.Generator().manual_seed(seed))


def total(model, states):
    return (likelihood.token_logp(model, states)[0] * states.weight).sum((1, 2))


# ---- rollout --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [True, False])
def test_a_rollout_holds_what_the_decoder_returned(shift):
    model, rollout = rolled(shift=shift)
    decoded = edit_decode(model, PROMPTS, WILD, attention_mask=REAL, generator=torch.Generator().manual_seed(0), trace=True)
    assert torch.equal(rollout.ids, decoded.ids) and torch.equal(rollout.forwards, decoded.forwards)
    for row, length in enumerate(REAL.sum(1).tolist()):
        assert rollout.x0[row, :length].tolist() == PROMPTS[row, 5 - length:].tolist()
        count = int(rollout.scored[row].sum())
        assert rollout.x0[row][rollout.scored[row]].tolist() == decoded.ids[row, :count].tolist()
        assert rollout.scored[row].nonzero()[0] == length and (decoded.ids[row, count:] == EOS).all()
    assert ((rollout.step_map > 0) == rollout.written).all() and (rollout.confidence.isnan() == ~rollout.written).all()
    assert rollout.edits.sum() > 0 and rollout.edits.sum() == (rollout.wrote & (rollout.noisy != MASK)).sum()
    assert not (rollout.predicted == MASK)[(rollout.docs == 0)[:, None].expand_as(rollout.predicted)].any()


def test_playing_the_rounds_again_gives_the_final_canvas():
    _, rollout = rolled()
    size = rollout.block_size
    canvas = torch.where(rollout.written, MASK, rollout.x0).unflatten(-1, (-1, size))
    for noisy, wrote, predicted in zip(*(value.unflatten(-1, (-1, size)).unbind(1) for value in (rollout.noisy, rollout.wrote, rollout.predicted))):
        playing = wrote.any(-1, keepdim=True)
        assert torch.equal(torch.where(playing, noisy, canvas), canvas)
        canvas = torch.where(wrote, predicted, canvas)
    assert torch.equal(canvas.flatten(-2), rollout.x0)


def test_the_completion_ends_with_its_first_eos_and_the_rest_of_the_block_is_tail():
    _, rollout = rolled(eos=5.0, tau_edit=2.0)
    ended = (rollout.x0 == EOS) & rollout.scored
    assert ended.any() and (ended.sum(1) <= 1).all()
    assert (rollout.written & ~rollout.scored).any()


def test_block_size_1_samples_the_ar_model_token_by_token():
    model, rollout = rolled(block_size=1, tau_edit=2.0, temperature=0.0)
    greedy = ar_decode(model, PROMPTS, max_new_tokens=9, attention_mask=REAL)
    assert torch.equal(rollout.ids, greedy.ids) and torch.equal(rollout.forwards, greedy.forwards)
    states = likelihood.mean_field(rollout)
    for row, length in enumerate(rollout.prompt_length.tolist()):
        count = length + int(rollout.scored[row].sum())
        logits = model(input_ids=rollout.x0[row:row + 1, :count]).logits[0].float()
        logits[:, MASK] = -torch.inf
        expected = logits.log_softmax(-1)[length - 1:count - 1].gather(1, rollout.x0[row, length:count, None]).sum()
        assert torch.isclose(total(model, states)[row], expected, atol=1e-4)


def test_look_back_is_refused():
    with pytest.raises(HildaError, match="look_back = 1: rollouts need look_back = 0"):
        rolled(look_back=1)


@hypothesis_settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), size=st.sampled_from([1, 2, 4, 8]), budget=st.integers(5, 40), minimum=st.sampled_from([1, 2]), post=st.sampled_from([0, 2, 16]),
       tau_edit=st.sampled_from([0.0, 0.2, 2.0]))
def test_a_budget_of_forwards_is_never_exceeded(seed, size, budget, minimum, post, tau_edit):
    model, _ = tiny(seed % 5, block_size=size, sharpen=6.0)
    settings = EditSettings(tau_mask=2.0, tau_edit=tau_edit, minimum=minimum, max_post_steps=post, max_new_tokens=9, temperature=1.0, stop_at_eos=False)
    if budget < -(-(9 + size - 1) // size):
        with pytest.raises(HildaError, match="forwards are fewer than"):
            within(settings, budget, size)
        return
    decoded = edit_decode(model, PROMPTS, within(settings, budget, size), attention_mask=REAL, generator=torch.Generator().manual_seed(seed))
    assert decoded.forwards.max() <= budget


# ---- the layout sees what the decoder saw ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_an_actions_probability_is_the_one_the_decoder_wrote_it_with(shift, size):
    """Temperature 0, so that the softmax is the plain one; the last write of each token is on record."""
    model, rollout = rolled(shift=shift, temperature=0.0, block_size=size)
    states = likelihood.trajectory(rollout, edits=True)
    logp = likelihood.token_logp(model, states)[0]
    assert torch.equal(states.weight != 0, rollout.wrote)
    order = torch.arange(1, rollout.noisy.shape[1] + 1)[:, None]
    last = (rollout.wrote * order).max(1, keepdim=True).values == order
    found = (logp * (rollout.wrote & last)).sum(1).exp()
    assert torch.allclose(found[rollout.written], rollout.confidence[rollout.written], atol=1e-4) and rollout.edits.sum() > 0


def test_a_trajectory_is_scored_under_the_temperature_of_its_sampling():
    model, rollout = rolled(temperature=0.5)
    logp, _ = likelihood.token_logp(model, likelihood.trajectory(rollout, edits=True))
    row, copy, position = rollout.wrote.nonzero()[-1].tolist()
    start = position // 4 * 4
    canvas = torch.cat([rollout.x0[row, :start], rollout.noisy[row, copy, start:start + 4]])
    logits = reference._logits(model, canvas, len(canvas), likelihood_mask(len(canvas)))
    assert torch.isclose(logp[row, copy, position], (logits[position] / 0.5).log_softmax(-1)[rollout.predicted[row, copy, position]], atol=1e-4)


def likelihood_mask(length):
    from hildalib import attention

    return attention.block_causal(length, 4)


def test_trajectories_with_and_without_edits_agree_where_nothing_was_edited():
    model, rollout = rolled(tau_edit=2.0)
    assert rollout.edits.sum() == 0
    both = [likelihood.trajectory(rollout, edits=edits) for edits in (True, False)]
    assert torch.allclose(*(total(model, states) for states in both), atol=1e-4)
    assert torch.equal(both[0].weight, both[1].weight)


def test_an_edit_gets_credit_only_where_it_is_an_action():
    _, rollout = rolled()
    with_edits, without = (likelihood.trajectory(rollout, edits=edits) for edits in (True, False))
    assert with_edits.weight.sum() == rollout.wrote.sum() > without.weight.sum() == rollout.written.sum()
    changed = rollout.wrote & (rollout.noisy != MASK)
    assert (with_edits.weight[changed] == 1).all() and (with_edits.labels != with_edits.noisy)[changed].all()
    assert (without.noisy[without.weight != 0] == MASK).all()
    assert torch.equal(without.weight.sum(1), rollout.written.float())  # each token once


def test_sampled_rounds_stand_for_all_of_them_on_average():
    model, rollout = rolled()
    for build in (lambda **o: likelihood.trajectory(rollout, edits=True, **o), lambda **o: likelihood.denoising(rollout, [EOS], **o)):
        whole = total(model, build()).detach()
        draws = torch.stack([total(model, build(samples=2, generator=torch.Generator().manual_seed(seed))).detach() for seed in range(200)])
        assert build(samples=2).noisy.shape[1] == 2 < build().noisy.shape[1]
        assert ((draws.mean(0) - whole).abs() <= 4 * draws.std(0) / 200 ** 0.5 + 1e-4).all()


# ---- no leakage -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("build", [likelihood.mean_field, lambda r: likelihood.elbo_states(r, 4, "coupled", torch.Generator().manual_seed(1)),
                                   lambda r: likelihood.trajectory(r, edits=True), lambda r: likelihood.trajectory(r, edits=False),
                                   lambda r: likelihood.denoising(r, [EOS])])
def test_clean_tokens_of_a_block_never_reach_its_own_or_earlier_scores(build):
    model, rollout = rolled()
    states = build(rollout)
    before = likelihood.token_logp(model, states)[0].detach()
    for block in range(rollout.x0.shape[1] // 4):
        inside = torch.zeros_like(rollout.x0, dtype=torch.bool)
        inside[:, block * 4:block * 4 + 4] = True
        changed = torch.where(inside & (states.docs == 0), (states.x0 - 4) % 10 + 5, states.x0)
        after = likelihood.token_logp(model, replace(states, x0=changed))[0].detach()
        assert torch.equal(before[..., :block * 4 + 4], after[..., :block * 4 + 4])
        assert not (states.weight[..., block * 4 + 4:] != 0).any() or not torch.equal(before, after)


def test_what_follows_the_completion_does_not_tell_its_length():
    """The tail of the last block is hidden in every noisy copy, and a canvas with more blocks changes nothing."""
    model, rollout = rolled(eos=5.0, tau_edit=2.0)
    tail = (rollout.written & ~rollout.scored)[:, None]
    for states in (likelihood.mean_field(rollout), likelihood.elbo_states(rollout, 2, "random")):
        assert (states.noisy[tail.expand_as(states.noisy)] == MASK).all() and tail.any()
        wider = replace(states, **{name: F.pad(getattr(states, name), (0, 4), value=value) for name, value in
                                   (("x0", MASK), ("docs", -1), ("noisy", MASK), ("labels", MASK), ("weight", 0))})
        assert torch.allclose(total(model, wider), total(model, states), atol=1e-5)


def test_a_mask_is_shared_or_the_ratio_is_noise():
    """The log-ratio of two close policies: under one mask far less spread than under two."""
    model, rollout = rolled()
    near, _ = rolled()
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    shared, apart = [], []
    for seed in range(12):
        first, second = (likelihood.elbo_states(rollout, 2, "random", torch.Generator().manual_seed(2 * seed + i)) for i in (0, 1))
        shared.append(total(near, first) - total(model, first))
        apart.append(total(near, second) - total(model, first))
    assert torch.stack(shared).std(0).max() < 0.1 * torch.stack(apart).std(0).min()


# ---- exactness ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [True, False])
def test_enumeration_agrees_with_the_other_enumeration_and_with_all_orders(shift):
    model, rollout = rolled(shift=shift, tau_edit=2.0, max_new_tokens=7)
    elbo, exact = likelihood.exact(model, rollout, copies=5)
    whole = rollout.written == rollout.scored
    for row in range(3):
        if whole[row].all():
            used = int((rollout.docs[row] == 0).sum())
            ids, scored = rollout.x0[row:row + 1, :used], rollout.scored[row:row + 1, :used]
            assert torch.isclose(-elbo[row].float(), objective.exact_elbo(model, ids, scored, block_size=4)[0], atol=1e-3)
        assert torch.isclose(exact[row], by_orders(model, rollout, row), atol=1e-3)
    assert (exact >= elbo - 1e-6).all() and whole.all(1).any()


def by_orders(model, rollout, row):
    """log of the mean over orders of the product of conditionals, block by block, one forward a conditional."""
    result = 0.0
    for start in range(0, rollout.x0.shape[1], 4):
        spots = [i for i in range(start, start + 4) if rollout.scored[row, i]]
        if not spots:
            continue
        values = []
        for order in itertools.permutations(spots):
            canvas = torch.where(rollout.written[row], MASK, rollout.x0[row])
            canvas[:start] = rollout.x0[row, :start]
            value = 0.0
            for spot in order:
                logits = reference._logits(model, canvas[:start + 4], start + 4, likelihood_mask(start + 4))
                value += logits[spot].log_softmax(-1)[rollout.x0[row, spot]].item()
                canvas[spot] = rollout.x0[row, spot]
            values.append(value)
        result += torch.tensor(values, dtype=torch.float64).logsumexp(0).item() - math.log(len(values))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("scheme, samples", [("random", 1), ("random", 3), ("stratified", 3), ("coupled", 2), ("coupled", 4), ("balanced", 2), ("balanced", 4)])
def test_elbo_estimates_are_unbiased(scheme, samples):
    model, rollout = rolled(eos=3.0, tau_edit=2.0)
    elbo, _ = likelihood.exact(model, rollout)
    draws = torch.stack([total(model, likelihood.elbo_states(rollout, samples, scheme, torch.Generator().manual_seed(seed))).detach() for seed in range(300)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - elbo).abs() <= 4 * error + 1e-5).all() and (error > 0).sum() >= 2


@pytest.mark.parametrize("scheme", ["coupled", "balanced"])
def test_pairs_score_every_token_once_and_balanced_ones_have_constant_weight(scheme):
    _, rollout = rolled()
    states = likelihood.elbo_states(rollout, 4, scheme, torch.Generator().manual_seed(0))
    scored = states.weight != 0
    constant = torch.allclose(states.weight.sum(1).unflatten(-1, (-1, 4)).sum(-1), rollout.scored.unflatten(-1, (-1, 4)).sum(-1).float())
    assert constant == (scheme == "balanced")
    assert torch.equal(scored[:, :2].long() + scored[:, 2:].long(), rollout.scored[:, None].expand(-1, 2, -1).long())


@pytest.mark.parametrize("scheme, samples", [("antithetic", 2), ("coupled", 3), ("random", 0)])
def test_impossible_estimates_are_refused(scheme, samples):
    with pytest.raises(HildaError, match="use one of random, stratified, coupled, balanced, and an even number"):
        likelihood.elbo_states(rolled()[1], samples, scheme)


def test_the_audit_finds_the_elbo_unbiased_the_mean_field_biased_and_more_copies_less_noisy():
    model, rollout = rolled(max_new_tokens=5)
    table = likelihood.audit(model, rollout, samples=(2, 8), draws=40, generator=torch.Generator().manual_seed(0)).set_index(["estimator", "copies"])
    masked = table.loc[list(likelihood.SCHEMES)]
    assert (masked.noise > 0).all() and (masked.elbo_error.abs() < 4 * masked.noise).all() and table.noise["mean field", 1] == 0 and len(masked) == 8
    assert table["std"]["balanced", 2] < table["std"]["coupled", 2]
    for scheme in likelihood.SCHEMES:
        assert table["std"][scheme, 8] < table["std"][scheme, 2]
    assert (masked.likelihood_error < 4 * masked.noise).all()  # a lower bound


def test_the_mean_field_is_biased():
    model, rollout = rolled(max_new_tokens=5)
    elbo, exact = likelihood.exact(model, rollout)
    assert ((total(model, likelihood.mean_field(rollout)).detach() - elbo).abs()).max() > 0.3 and (exact - elbo).max() > 0.1


# ---- predictions ----------------------------------------------------------------------------------------------------------------

def test_denoising_scores_each_whole_prediction_at_the_state_it_was_made_in():
    model, rollout = rolled(tau_edit=2.0, tau_mask=2.0)  # one token a forward
    states = likelihood.denoising(rollout, [EOS])
    scored = (states.weight != 0).unflatten(-1, (-1, 4))
    masks = (states.noisy == MASK).unflatten(-1, (-1, 4)).sum(-1)
    n = rollout.written.unflatten(-1, (-1, 4)).sum(-1)[:, None]
    rate = (states.weight.unflatten(-1, (-1, 4)).amax(-1) * masks)[scored.any(-1)]
    assert torch.allclose(rate, n.expand_as(masks)[scored.any(-1)].float())  # weight n / m
    assert (states.noisy[states.weight != 0] == MASK).all() and (states.labels[states.weight != 0] != MASK).all()
    where = scored.any(-1)
    ids = spliced(rollout, states.labels, where, [EOS])
    row, copy, block = where.nonzero().T
    last = copy == where.sum(1)[row, block] - 1
    assert torch.equal(ids[last], rollout.ids[row[last]])  # the last prediction of a block is what it became
    assert not torch.equal(ids, rollout.ids[row]) and not (ids == MASK).any()


def test_redrawn_predictions_fill_the_visited_states_as_often_as_the_model_says_and_score_what_a_quota_would_write():
    model, rollout = rolled(tau_edit=2.0, tau_mask=2.0)
    one, many = likelihood.denoising(rollout, [EOS]), likelihood.redrawn(model, rollout, [EOS], 400, generator=torch.Generator().manual_seed(0))
    assert many.draws == 400 and torch.equal(many.noisy, one.noisy)
    labels, weight = (value.unflatten(1, (-1, 400)) for value in (many.labels, many.weight))
    assert (labels == one.noisy[:, :, None])[(one.noisy != MASK)[:, :, None].expand_as(labels)].all() and not (labels[weight != 0] == MASK).any()
    row, copy, position = (one.weight != 0).nonzero()[0].tolist()
    said = likelihood.token_logp(model, many)[0].unflatten(1, (-1, 400))[row, copy, :, position].exp()
    found = labels[row, copy, :, position]
    top = found.mode().values
    assert abs((found == top).float().mean() - said[found == top].mean()) < 0.1  # four standard errors at p = 1/2
    few = likelihood.redrawn(model, rollout, [EOS], 3, quota=1, generator=torch.Generator().manual_seed(0))
    assert few.weight.unique().tolist() == [0.0, 1.0] and (few.weight.unflatten(-1, (-1, 4)).sum(-1) <= 1).all()


def test_equal_answers_are_scored_once_and_a_reward_that_is_no_number_is_an_error():
    from types import SimpleNamespace

    _, tokenizer = tiny()
    asked, item, other = [], {"a": 1}, {"a": 1}
    task = SimpleNamespace(name="t", score=lambda text, item: asked.append(text) or float(text == "12"))
    ids = torch.tensor([[6, 7, EOS], [6, 7, EOS], [7, 7, EOS], [6, 7, EOS]])
    assert score(ids, tokenizer, task, [item, item, item, other]).tolist() == [1, 1, 0, 1] and len(asked) == 3
    with pytest.raises(HildaError, match="task t scored an answer nan; rewards must be in"):
        score(ids, tokenizer, SimpleNamespace(name="t", score=lambda text, item: float("nan")), [item] * 4)


def test_taking_rows_takes_them_everywhere():
    _, rollout = rolled()
    part = rollout.take(torch.tensor([2, 0]))
    assert isinstance(part, Rollout) and torch.equal(part.noisy, rollout.noisy[[2, 0]]) and part.block_size == 4
