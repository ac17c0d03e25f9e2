"""Commit and revision rules: every pair against naive one-row loops, forward by forward and through whole decodes; then the bounds,
under a model that answers at random, and what each rule reduces to."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import reference
import reference_rules
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from tiny import EOS, FIRST, MASK, padded, tiny
from transformers.modeling_outputs import CausalLMOutput

from hildalib import HildaError, nano
from hildalib.decoding import EditSettings, commit, edit_decode, revise, rules, shadow
from hildalib.decoding.trace import EDITED, MASK as MASKED

VOCABULARY, ROWS, FORWARDS = 12, 5, 14
COMMITS = {  # constants at which confidences of random logits fall on both sides
    "threshold": commit.Threshold(0.6, 2), "quota": commit.Quota(3), "factor": commit.Factor(1.2), "entropy": commit.EntropyBound(0.9),
    "klass": commit.Klass(0.4, 0.05), "hierarchy": commit.Hierarchy(0.8, 0.3), "credit": commit.Credit(0.7),
    "pc": commit.PositionCalibrated(torch.linspace(0.01, 0.3, 40), 0.1, 1.5, 2), "saber": commit.Saber(), "wino": commit.Wino(0.4)}
REVISIONS = {
    "edit": revise.Edit(0.4), "t2m": revise.TokenToMask(), "snapshot": revise.Snapshot(0.3, 2), "ratio": revise.Ratio(0.4, 0.1, 4, 3, 0.7),
    "wino": revise.Wino(), "wino-isolated": revise.Wino(0.7, True), "saber": revise.Saber(), "remdm": revise.ReMDM(0.3),
    "remdm-rescale": revise.ReMDM(0.5, "rescale"), "remdm-conf": revise.ReMDM(strategy="conf")}
PAIRS = list(itertools.product(COMMITS, REVISIONS))


def test_every_rule_is_tested():
    assert {type(rule) for rule in COMMITS.values()} == set(commit.RULES.values()) == set(reference_rules.COMMIT)
    assert {type(rule) for rule in REVISIONS.values()} == set(revise.RULES.values()) == set(reference_rules.REVISE)
    assert all(rule() for rule in (*commit.RULES.values(), *revise.RULES.values()))  # every constant has a default


# ---- forward by forward ---------------------------------------------------------------------------------------------------------

def logits_of(forward, size, seed):
    """(ROWS, size, V) logits that now and then stay as they were, so that a rule that waits for calm can act."""
    generator = torch.Generator().manual_seed(1000 * seed + forward // 4)
    logits = 3 * torch.randn(ROWS, size, VOCABULARY, generator=generator)
    logits += 0.02 * torch.randn(ROWS, size, VOCABULARY, generator=generator) * (forward % 4)
    logits[..., MASK] = -torch.inf
    return logits


@pytest.mark.parametrize("sub_block", [None, 3])
@pytest.mark.parametrize("committed, revised", PAIRS)
def test_a_batch_goes_through_the_canvases_of_the_naive_loops(committed, revised, sub_block, size=8):
    settings = EditSettings(commit=COMMITS[committed], revise=REVISIONS[revised], sub_block=sub_block, max_remasks=2)
    free = torch.arange(size) >= torch.arange(ROWS)[:, None] - 1  # row r has r - 1 tokens of prompt in the block
    canvas = torch.full((ROWS, size), MASK).masked_fill(~free, 7)
    snapshot, remasks, memory = torch.full((ROWS, size), torch.nan), torch.zeros_like(canvas), {}
    lists = [(canvas[r].tolist(), {}, [float("nan")] * size, [0] * size) for r in range(ROWS)]
    ours, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for forward in range(FORWARDS):
        logits, shadows = logits_of(forward, size, PAIRS.index((committed, revised))), logits_of(forward, size, -1)
        hidden = canvas == MASK
        history = torch.cat([torch.full((ROWS, 1), 0.5), snapshot], 1)  # an earlier block wrote one token
        block = rules.Block(logits, canvas, hidden, rules.leftmost(hidden, sub_block), free & ~hidden, remasks >= 2, history, snapshot, memory, shadows,
                            generator=ours)
        canvas, filled, changed = rules.advance(block, settings.commit_rule, settings.revision_rule, MASK)
        remasks, memory = remasks + changed * settings.revision_rule.remasks, block.memory
        snapshot = block.snapshot
        draws = torch.rand(ROWS, size, generator=theirs) if revised.startswith("remdm") else [None] * ROWS
        for r, (ids, state, scores, counts) in enumerate(lists):
            ids, wrote, went = reference_rules.step(settings, logits[r], ids, free[r].tolist(), MASK, state, scores, [0.5] + scores, counts,
                                                    shadows[r], draws[r])
            lists[r] = ids, state, scores, counts
            assert filled[r].nonzero()[:, 0].tolist() == sorted(wrote) and changed[r].nonzero()[:, 0].tolist() == sorted(went), (forward, r)
            assert canvas[r].tolist() == ids and remasks[r].tolist() == counts
            assert torch.allclose(snapshot[r], torch.tensor(scores), equal_nan=True)
        assert (canvas[~free] == 7).all()


def test_the_canvases_above_had_something_to_revise():
    """Every revision rule acts somewhere, and every commit rule writes other sets than the single most confident mask."""
    acted, plain = set(), set()
    for committed, revised in PAIRS:
        settings = EditSettings(commit=COMMITS[committed], revise=REVISIONS[revised], max_remasks=2)
        ids, state, scores, counts = [MASK] * 8, {}, [float("nan")] * 8, [0] * 8
        for forward in range(FORWARDS):
            ids, wrote, went = reference_rules.step(settings, logits_of(forward, 8, 3)[0], ids, [True] * 8, MASK, state, scores, scores, counts,
                                                    logits_of(forward, 8, -1)[0], [0.1] * 8)
            acted |= {revised} if went else set()
            plain |= {committed} if len(wrote) > 1 else set()
    assert acted == set(REVISIONS) and plain == set(COMMITS)


# ---- whole decodes --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models():
    return {(seed, shift, causal, size): tiny(seed, shift=shift, causal=causal, block_size=size, sharpen=8.0)[0]
            for seed in range(2) for shift in (True, False) for causal in (True, False) for size in (4, 8)}


def compare_with_uncached(models, pair, seed, shift, causal, size, post, numbers, lengths, **changes):
    model, generator = models[seed, shift, causal, size], torch.Generator().manual_seed(numbers)
    settings = EditSettings(tau_edit=0.2, commit=COMMITS[pair[0]], revise=REVISIONS[pair[1]], max_post_steps=post, max_new_tokens=11, **changes)
    prompts = [torch.randint(FIRST, 15, (n,), generator=generator) for n in lengths]
    drawn = pair[1].startswith("remdm")  # a batch shares its stream of random numbers, so rows are only comparable alone
    alone = []
    for prompt in prompts[:1] if drawn else prompts:
        expected, forwards = reference_rules.decode(model, prompt, settings, torch.Generator().manual_seed(numbers) if drawn else None)
        alone.append(out := edit_decode(model, prompt[None], settings, generator=torch.Generator().manual_seed(numbers)))
        assert out.ids[0, :len(expected)].tolist() == expected and (out.ids[0, len(expected):] == EOS).all() and out.forwards[0] == forwards
    if not drawn:
        ids, real = padded(prompts)
        together = edit_decode(model, ids, settings, attention_mask=real)
        for name in ("ids", "forwards", "positions_fed"):
            assert torch.equal(getattr(together, name), torch.cat([getattr(out, name) for out in alone])), name


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_4_cached_equals_uncached_for_every_pair_alone_and_in_a_batch(models, pair):
    number = PAIRS.index(pair)
    compare_with_uncached(models, pair, number % 2, number % 3 > 0, number % 5 > 2, (4, 8)[number // 2 % 2], 3, number, (3, 9))


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pair=st.sampled_from(PAIRS), seed=st.integers(0, 1), shift=st.booleans(), causal=st.booleans(), size=st.sampled_from([4, 8]), sub_block=st.sampled_from([None, 3]),
       post=st.sampled_from([0, 3]), max_remasks=st.sampled_from([0, 1, 2]), look_back=st.sampled_from([0, 0, 1, 2]), numbers=st.integers(0, 10_000))
def test_4_cached_equals_uncached_for_any_settings(models, **case):
    compare_with_uncached(models, **case, lengths=(3, 9, 1, 12))


def test_sampling_with_any_rule_repeats_and_never_writes_a_mask(models):
    for committed, revised in zip(itertools.cycle(COMMITS), REVISIONS):
        settings = EditSettings(commit=COMMITS[committed], revise=REVISIONS[revised], temperature=1.0, max_new_tokens=12, stop_at_eos=False)
        one, two = (edit_decode(models[0, True, False, 8], torch.tensor([[5, 6, 7]]), settings, generator=torch.Generator().manual_seed(4)).ids for _ in range(2))
        assert torch.equal(one, two) and not (one == MASK).any()


def test_default_rules_are_the_two_thresholds_by_name(models):
    model, prompt = models[0, True, False, 4], torch.tensor([[5, 6, 7]])
    settings = EditSettings(tau_mask=0.4, tau_edit=0.2, minimum=2, max_new_tokens=20)
    named = replace(settings, tau_mask=0.9, tau_edit=1.0, minimum=1, commit=commit.Threshold(0.4, 2), revise=revise.Edit(0.2))
    one, two = edit_decode(model, prompt, settings), edit_decode(model, prompt, named)
    assert torch.equal(one.ids, two.ids) and torch.equal(one.forwards, two.forwards)


# ---- bounds ---------------------------------------------------------------------------------------------------------------------

class Whim(torch.nn.Module):
    """A model that changes its mind completely at every forward, and is always sure: the worst a rule can meet."""

    def __init__(self, size, seed, sharpness=12.0):
        super().__init__()
        self.config = nano.nano_config(8, 1, 1, vocab_size=VOCABULARY, eos_token_id=EOS)
        self.config.hilda = {"mask_token_id": MASK, "block_size": size, "label_shift": False}
        self.head, self.sharpness, self.numbers = torch.nn.Identity(), sharpness, torch.Generator().manual_seed(seed)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, past_key_values, **_):
        keys = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        past_key_values.update(keys, keys, 0)
        rows = self.head(torch.zeros(*input_ids.shape, 1)).shape[1]
        return CausalLMOutput(logits=self.sharpness * torch.randn(1, rows, VOCABULARY, generator=self.numbers))


@pytest.mark.parametrize("committed, revised", PAIRS)
def test_no_pair_of_rules_can_be_kept_going_prompts_stay_and_masks_never_come_out(committed, revised):
    prompts, real = torch.tensor([[EOS, EOS, 5, 6, 7], [9, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for seed, (remasks, post, sub_block, sharpness) in enumerate([(0, 0, None, 12.0), (1, 16, 2, 12.0), (3, 2, None, 0.5)]):
        eager = replace(REVISIONS[revised], tau=0.0) if revised == "edit" else REVISIONS[revised]
        settings = EditSettings(commit=COMMITS[committed], revise=eager, max_remasks=remasks, max_post_steps=post, sub_block=sub_block, max_new_tokens=20,
                                stop_at_eos=False)
        out = edit_decode(Whim(8, seed, sharpness), prompts, settings, attention_mask=real, generator=torch.Generator().manual_seed(seed), trace=True)
        trace, blocks = out.trace, 4
        assert (out.forwards <= blocks * ((1 + remasks) * 8 + post + 1)).all()
        assert not (out.ids == MASK).any()
        for row, length in ((0, 3), (1, 5)):
            assert (trace.ids[:, row, :length] == prompts[row, 5 - length:].numpy()).all() and not (trace.ids[-1, row, :length + 20] == MASK).any()
        back = ((trace.ids[:-1] != MASK) & (trace.ids[1:] == MASK)).sum(0)
        assert back.max() <= remasks
        assert ((trace.state == MASKED) == (trace.ids == MASK)).all() and (np.isnan(trace.confidence) == np.isin(trace.state, [0, MASKED])).all()
        assert not (trace.state == EDITED).any() or revised == "edit"


# ---- what rules reduce to -------------------------------------------------------------------------------------------------------

def block(logits, canvas=None, **changes):
    canvas = torch.full(logits.shape[:2], MASK) if canvas is None else canvas
    hidden, nan = canvas == MASK, torch.full(canvas.shape, torch.nan)
    return rules.Block(**{"logits": logits, "current": canvas, "hidden": hidden, "masked": hidden, "visible": ~hidden, "spent": torch.zeros_like(hidden),
                          "history": nan, "snapshot": nan} | changes)


def confident(values):
    """(1, K, V) logits whose favourites have the given probabilities."""
    p = torch.tensor(values, dtype=torch.float64)
    logits = ((1 - p) / (VOCABULARY - 2)).log()[:, None].repeat(1, VOCABULARY)
    logits[:, 7] = p.log()
    logits[:, MASK] = -torch.inf
    return logits[None].float()


def test_quota_k_writes_k_a_forward(models):
    for tokens in (1, 2, 3):
        trace = edit_decode(models[1, True, False, 8], torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]),
                            EditSettings(commit=commit.Quota(tokens), tau_edit=1, max_new_tokens=16, stop_at_eos=False), trace=True).trace
        written = ((trace.ids[:-1] == MASK) & (trace.ids[1:] != MASK)).sum((1, 2))
        rest = [min(tokens, 8 - done) for done in range(0, 8, tokens)]
        assert written[written > 0].tolist() == rest * 2


def test_factor_theorem_and_the_last_candidate_that_fails_is_not_accepted():
    """Of 0.9, 0.8, 0.7 at factor 1 only n = 1, 2 satisfy (n + 1)(1 - c) < 1; the circulating code would take the third too."""
    chosen = commit.Factor(1.0)(block(confident([0.8, 0.7, 0.9])))
    assert chosen.tolist() == [[True, False, True]]
    for c, factor in ((0.91, 1.0), (0.94, 1.0), (0.5, 2.1), (0.6, 0.5)):  # equal confidences: all n below factor / (1 - c) - 1
        count = commit.Factor(factor)(block(confident([c] * 12))).sum().item()
        assert count == sum((n + 1) * (1 - c) < factor for n in range(1, 13))
    for f in (0.3, 0.7):  # one mask: the threshold 1 - factor / 2
        assert [bool(commit.Factor(f)(block(confident([c]))).any()) for c in (1 - f / 2 - 0.01, 1 - f / 2 + 0.01)] == [False, True]


def test_entropy_bound_0_is_one_at_a_time_and_a_large_one_is_everything():
    logits = torch.randn(3, 8, VOCABULARY, generator=torch.Generator().manual_seed(0))
    lowest = torch.distributions.Categorical(logits=logits).entropy().argmin(-1)
    assert torch.equal(commit.EntropyBound(0.0)(block(logits)), F.one_hot(lowest, 8).bool())
    assert commit.EntropyBound(8 * np.log(VOCABULARY))(block(logits)).all()


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.7, 3.0])
def test_entropy_bound_agrees_with_the_scheduler_of_diffusers(gamma):
    diffusers = pytest.importorskip("diffusers", reason="the oracle is EntropyBoundScheduler of diffusers, which is not installed")
    if not hasattr(diffusers, "EntropyBoundScheduler"):
        pytest.skip(f"diffusers {diffusers.__version__} has no EntropyBoundScheduler")
    oracle = diffusers.EntropyBoundScheduler(entropy_bound=gamma, t_max=1.0, t_min=1.0)
    logits = 4 * torch.randn(40, 8, VOCABULARY, generator=torch.Generator().manual_seed(0))
    theirs = oracle.step(logits, timestep=1, sample=torch.full((40, 8), MASK)).accepted_index
    assert torch.equal(commit.EntropyBound(gamma)(block(logits)), theirs)


def test_klass_waits_for_two_calm_forwards_and_then_writes_all_that_is_sure():
    logits, memory, counts = confident([0.9, 0.8, 0.5, 0.9]), {}, []
    for _ in range(3):
        now = block(logits, memory=memory)
        counts.append(commit.Klass(0.6, 0.01)(now).sum().item())
        memory = now.memory
    assert counts == [1, 1, 3]
    moved = block(logits.roll(1, 1), memory=memory)
    assert commit.Klass(0.6, 0.01)(moved).tolist() == [[True, False, False, False]]  # 0.9 where 0.9 was is calm, the others moved


def test_credit_without_weight_is_the_threshold_and_with_it_reaches_a_steady_favourite_sooner():
    logits = 2 * torch.randn(4, 8, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[..., MASK] = -torch.inf
    assert torch.equal(commit.Credit(0.5, alpha=0.0)(block(logits)), commit.Threshold(0.5)(block(logits)))
    memory, confidences = {}, []
    for _ in range(4):
        now = block(confident([0.6]), memory=memory)
        commit.Credit()(now)
        memory = now.memory
        confidences.append(now.confidence.item())
    assert confidences == sorted(confidences) and confidences[0] > 0.6 and not torch.isinf(now.memory["credit"]).any()


def test_pc_sampler_with_strong_decay_reads_left_to_right_and_without_it_prefers_rare_words():
    logits = confident([0.5, 0.9, 0.9])
    assert commit.PositionCalibrated(decay=50.0)(block(logits)).tolist() == [[True, False, False]]
    logits[0, 2] = logits[0, 2].roll(1)  # favourite 8 instead of 7
    logits[0, 2, MASK + 1], logits[0, 2, MASK] = logits[0, 2, 5], -torch.inf
    counts = commit.unigram(torch.tensor([7] * 8 + [8, 5]), VOCABULARY)
    assert counts[7] == 0.8 and counts[8] == counts[11] == 0.1
    assert commit.PositionCalibrated(counts, decay=0.0)(block(logits)).tolist() == [[False, False, True]]


def test_hierarchy_never_writes_neighbours_below_its_threshold():
    assert commit.Hierarchy(0.95, 0.4)(block(confident([0.5, 0.6, 0.5, 0.7, 0.3]))).tolist() == [[False, False, False, True, False]]
    canvas = torch.tensor([[MASK, MASK, 9, MASK, MASK]])
    assert commit.Hierarchy(0.95, 0.4)(block(confident([0.5, 0.6, 0.5, 0.35, 0.3]), canvas)).tolist() == [[False, True, False, False, False]]


def test_sub_blocks_are_finished_from_the_left(models):
    trace = edit_decode(models[0, False, False, 8], torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]),
                        EditSettings(tau_mask=0.3, tau_edit=1, sub_block=2, max_new_tokens=8, stop_at_eos=False), trace=True).trace
    masks = (trace.ids[:, 0, 8:] == MASK).reshape(-1, 4, 2).any(2)
    assert all(not row[:k].any() for row in masks for k in range(4) if row[k:].any() and not row[:k + 1].any())
    assert (np.diff(masks.astype(int), axis=1) >= 0).all()  # never a mask left of a finished sub-block


@pytest.mark.parametrize("rule", [revise.Snapshot(0.0), revise.Wino(0.0), revise.TokenToMask(0.0), revise.ReMDM(0.0), revise.Ratio(0.0, 0.0)])
def test_a_rule_that_revises_nothing_is_no_rule(models, rule):
    settings = EditSettings(tau_mask=0.4, tau_edit=1, max_new_tokens=20)
    plain = edit_decode(models[0, True, False, 8], torch.tensor([[5, 6, 7]]), settings)
    assert torch.equal(plain.ids, edit_decode(models[0, True, False, 8], torch.tensor([[5, 6, 7]]), replace(settings, revise=rule)).ids)


def test_remdm_takes_back_the_share_it_says():
    canvas = torch.full((400, 8), 7)
    canvas[:, 6:] = MASK
    logits = torch.zeros(400, 8, VOCABULARY)
    for rule, share in ((revise.ReMDM(0.1), 0.1), (revise.ReMDM(0.6, "cap"), 1 / 6), (revise.ReMDM(0.6, "rescale"), 0.1),
                        (revise.ReMDM(strategy="conf"), 1 / 36)):
        now = block(logits, canvas, snapshot=torch.full((400, 8), 0.5), generator=torch.Generator().manual_seed(0))
        now.filled = F.one_hot(torch.full((400,), 6), 8).bool()  # alpha goes from 6/8 to 7/8: sigma_max = 1/6
        chosen = rule(now)
        assert abs(chosen[:, :6].float().mean() - share) < 4 * (share * (1 - share) / 2400) ** 0.5 and not chosen[:, 6:].any()


# ---- the shadow -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [True, False])
def test_an_isolated_shadow_row_of_one_layer_is_the_prediction_without_the_token(shift):
    """With one layer nothing can leak through neighbours, so hiding a token from its shadow row is masking it."""
    model, _ = nano.nano(32, 1, 2, vocabulary="0123456789")
    model.config.hilda = model.config.hilda | {"block_size": 4, "label_shift": shift}
    x = torch.tensor([5, 6, 7, 8, 9, 10, 11, 12])
    seen = reference_rules.shadow_logits(model, x, 4, 8, isolated=True)
    for i in range(4):
        hidden = x.clone()
        hidden[4 + i] = MASK
        assert torch.allclose(seen[i, 4:], reference_rules._logits(model, hidden, 8, reference.open_block(4, 8, 4, False))[4 + i, 4:], atol=1e-5)


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_shadow_rows_never_see_their_own_token_nor_anyone_them(shift, isolated):
    ids, positions = shadow.rows(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[4]]), MASK, shift)
    assert ids.tolist() == ([[MASK] * 3 + [5, 6, 7]] if shift else [[MASK] * 4])
    assert positions.tolist() == ([[5, 6, 7, 4, 5, 6]] if shift else [[4, 5, 6, 7]])
    assert ids.shape[1] == shadow.count(4, shift)
    mask = shadow.window(torch.tensor([[4]]), 4, 18, 8, shift, isolated)[0, 0]
    predicted = [1, 2, 3, 1, 2, 3] if shift else [0, 1, 2, 3]
    assert all(not mask[row, 4 + i] for row, i in enumerate(predicted)) and mask[:, :4].all() and not mask[:, 8:12].any()


def test_a_shadow_is_paid_for_only_where_a_token_can_be_checked(models):
    """Three forwards of two tokens in one block of 6: the first has nothing to check, the last one commits nothing more."""
    settings = EditSettings(commit=commit.Quota(2), revise=revise.Wino(0.0), block_size=6, max_new_tokens=6, stop_at_eos=False)
    for shift, extra in ((False, 6), (True, 10)):
        out = edit_decode(models[0, shift, False, 8], torch.arange(6)[None] + FIRST, settings)
        assert out.forwards.tolist() == [3] and out.positions_fed.tolist() == [6 + 3 * 6 + 2 * extra]


# ---- settings -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"commit": "klass"}, "commit = 'klass' must be a rule.*names: threshold, quota"),
    ({"revise": commit.Quota()}, r"revise = Quota\(tokens=1\) must be a rule.*names: edit, t2m"),
    ({"sub_block": 0}, "sub_block = 0 must be at least 1"), ({"max_remasks": -1}, "max_remasks = -1 must be at least 0")])
def test_settings_say_what_a_rule_is(changes, message):
    with pytest.raises(HildaError, match=message):
        EditSettings(**changes)


def test_an_unknown_remdm_strategy_is_refused():
    with pytest.raises(HildaError, match="strategy = 'loop' must be cap, rescale or conf"):
        revise.ReMDM(strategy="loop")
