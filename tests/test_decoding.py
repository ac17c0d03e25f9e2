"""The decoder's own promises: settings, ends, traces, costs. Token for token against an uncached decoder: test_invariants.py."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from tiny import EOS, FIRST, MASK, tiny

from hildalib import HildaError, attention, nano
from hildalib.decoding import (PRESETS, Decoded, EditSettings, PipelineSettings, Trace, ar_decode, edit_decode, pipeline_decode, rules, self_speculate,
                               settings_for)
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.trace import COMMITTED, DRAFT, EDITED, PROMPT, MASK as MASKED

PROMPT_IDS = torch.tensor([[5, 6, 7]])


# ---- settings -------------------------------------------------------------------------------------------------------------------

def test_presets_are_those_of_the_model_cards_and_thresholds_override_them():
    assert (PRESETS["S"].tau_mask, PRESETS["S"].tau_edit, PRESETS["Q"].tau_mask, PRESETS["Q"].tau_edit) == (0.5, 0.0, 0.7, 0.5)
    assert settings_for("S") == PRESETS["S"]
    assert settings_for("Q", tau_edit=0.0, max_new_tokens=3) == replace(PRESETS["Q"], tau_edit=0.0, max_new_tokens=3)
    own = {"mine": EditSettings(tau_mask=0.1)}
    assert settings_for("mine", presets=own).tau_mask == 0.1 and settings_for("mine", tau_mask=1.0, presets=own).tau_mask == 1.0


@pytest.mark.parametrize("arguments, message", [
    (("fast",), "mode 'fast' is unknown; use one of S, Q"), (("S", 1.01), r"tau_mask = 1.01 is outside \[0, 1\]"),
    (("S", None, -0.1), r"tau_edit = -0.1 is outside \[0, 1\]"), (("S", float("nan")), r"tau_mask = nan is outside \[0, 1\]")])
def test_settings_for_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(HildaError, match=message):
        settings_for(*arguments)


@pytest.mark.parametrize("name, value", [("tau_mask", -1.0), ("tau_edit", float("nan")), ("temperature", -0.5), ("max_new_tokens", 0), ("minimum", 0),
                                         ("max_post_steps", -1), ("look_back", -1), ("block_size", 0), ("block_size", -4)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(HildaError, match=f"{name} = {value} must be"):
        EditSettings(**{name: value})


# ---- rules ----------------------------------------------------------------------------------------------------------------------

def test_thresholds_are_strict_and_the_minimum_takes_the_most_confident_masks():
    confidence, masked = torch.tensor([[0.5, 0.6, 0.9, 0.7]]), torch.tensor([[True, True, False, True]])
    chosen = {(tau, minimum): rules.fill(confidence, masked, tau, minimum)[0].tolist() for tau, minimum in ((0.5, 1), (0.6, 1), (0.7, 1), (0.7, 2), (0.0, 9))}
    assert chosen == {(0.5, 1): [False, True, False, True], (0.6, 1): [False, False, False, True], (0.7, 1): [False, False, False, True],
                      (0.7, 2): [False, True, False, True], (0.0, 9): [True, True, False, True]}
    tokens, current, editable = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 9, 9, 9]]), torch.tensor([[True, True, True, False]])
    assert rules.edit(tokens, confidence, current, editable, 0.6)[0].tolist() == [False, False, True, False]


def test_equal_confidences_are_filled_from_the_left():
    assert rules.fill(torch.full((1, 5), 0.2), torch.tensor([[False, True, True, True, True]]), 0.5, 2)[0].tolist() == [False, True, True, False, False]


def test_sampled_tokens_follow_the_tempered_softmax_and_their_confidence_is_the_plain_one():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    tokens, confidence = rules.choose(logits.expand(1, 20_000, 4), 0.5, torch.Generator().manual_seed(0))
    share = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    expected = (logits / 0.5).softmax(-1)
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / tokens.numel()).sqrt()).all() and share[3] == 0
    assert torch.allclose(confidence, logits.softmax(-1)[tokens])


# ---- how a decode ends ----------------------------------------------------------------------------------------------------------

def test_everything_after_the_first_eos_is_eos_and_no_block_behind_it_is_decoded():
    ends = []
    for seed in range(8):
        model, _ = tiny(seed, shift=False, sharpen=7.0)
        settings = EditSettings(tau_mask=0.3, tau_edit=0.3, max_new_tokens=30)
        out = edit_decode(model, PROMPT_IDS, settings, trace=True)
        row = out.ids[0].tolist()
        if EOS not in row:
            continue
        ends.append(end := row.index(EOS))
        assert row[end:] == [EOS] * (30 - end)
        closing = (3 + end) // 4 * 4 + 4  # end of the block that holds the EOS
        assert (out.trace.state[-1, 0, closing:] == MASKED).all()
        on = edit_decode(model, PROMPT_IDS, replace(settings, stop_at_eos=False), trace=True)
        assert not (on.trace.ids[-1] == MASK).any() and on.forwards[0] > out.forwards[0] and torch.equal(on.ids, out.ids)  # more work, the same text
    assert len(ends) >= 2 and len({*ends}) > 1


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 12])
def test_a_prompt_before_on_and_after_a_block_border_is_decoded_as_the_reference_does(length, shift, causal):
    model, _ = tiny(2, shift=shift, causal=causal, sharpen=7.0)
    prompt = torch.arange(length) % 14 + FIRST
    settings = EditSettings(tau_mask=0.4, tau_edit=0.2, max_new_tokens=11, stop_at_eos=False)
    out = edit_decode(model, prompt[None], settings, trace=True)
    assert out.trace.ids[-1, 0, length:length + 11].tolist() == reference.edit_decode(model, prompt, settings).tolist()  # uncut after an EOS
    assert out.trace.ids.shape[2] == -(-(length + 11) // 4) * 4 and out.forwards[0] == len(out.trace.ids) - 1


def test_one_token_is_the_least_one_can_ask_for():
    model, _ = tiny(sharpen=7.0)
    assert edit_decode(model, PROMPT_IDS, EditSettings(max_new_tokens=1)).ids.shape == (1, 1)


def test_the_context_is_a_limit_for_both_decoders_and_reaching_it_is_not_beyond_it():
    model, _ = nano.nano(32, 2, 2, vocabulary="01", max_length=16)
    model.config.hilda = model.config.hilda | {"block_size": 4}
    prompt = torch.full((1, 10), FIRST)
    for decode in (lambda n: edit_decode(model, prompt, EditSettings(max_new_tokens=n)), lambda n: ar_decode(model, prompt, max_new_tokens=n)):
        assert decode(6).ids.shape[1] <= 6
        with pytest.raises(HildaError, match="need 17 positions, the model's context is 16; shorten the prompt or lower max_new_tokens"):
            decode(7)


@pytest.mark.parametrize("real", [[[1, 1, 0]], [[1, 0, 1]], [[0, 1, 0]]])
def test_prompts_padded_anywhere_but_on_the_left_are_refused(real):
    with pytest.raises(HildaError, match="left-padded"):
        edit_decode(tiny()[0], PROMPT_IDS, EditSettings(max_new_tokens=2), attention_mask=torch.tensor(real))


def test_an_empty_prompt_needs_a_model_without_shift():
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(HildaError, match="the prompt needs at least one token"):
        edit_decode(tiny()[0], empty, EditSettings(max_new_tokens=2))
    assert edit_decode(tiny(shift=False)[0], empty, EditSettings(max_new_tokens=6)).ids.shape == (1, 6)


@pytest.mark.parametrize("decode", [lambda *a, **k: ar_decode(*a, max_new_tokens=2, **k), lambda *a, **k: self_speculate(*a, max_new_tokens=2, **k),
                                    lambda *a, **k: edit_decode(*a, EditSettings(max_new_tokens=2), **k), pipeline_decode])
def test_a_batch_with_an_empty_prompt_is_refused_by_every_decoder(decode):
    model, _ = tiny(causal=True)
    with pytest.raises(HildaError, match="the prompt needs at least one token"):
        decode(model, torch.tensor([[5, 6], [5, 6]]), attention_mask=torch.tensor([[1, 1], [0, 0]]))


def test_a_pipeline_needs_a_dllm_whatever_block_size_is_asked_for():
    model, _ = tiny()
    del model.config.hilda
    with pytest.raises(HildaError, match="no dLLM: convert it first"):
        pipeline_decode(model, PROMPT_IDS, PipelineSettings(block_size=4))


def test_a_model_that_is_no_dllm_is_refused_with_the_remedy():
    model, _ = tiny(block_size=None)
    del model.config.hilda["causal_context"]  # as in the records of older checkpoints
    with pytest.raises(HildaError, match="never converted; give EditSettings"):
        edit_decode(model, PROMPT_IDS, EditSettings())
    assert edit_decode(model, PROMPT_IDS, EditSettings(block_size=4, max_new_tokens=2)).ids.shape == (1, 2)
    del model.config.hilda
    with pytest.raises(HildaError, match="no `hilda` record"):
        edit_decode(model, PROMPT_IDS, EditSettings())


# ---- cost -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tau_edit, forwards", [(2.0, 5), (0.999, 6)])
def test_a_block_is_committed_by_the_first_forward_of_the_next(tau_edit, forwards, causal):
    """Everything is filled at once (tau_mask 0), nothing is edited: 5 blocks cost 5 forwards, and 1 more to confirm the last where edits
    are possible, instead of 5 * (1 fill + 1 commit). Each fused forward feeds two blocks; three where a block that may still be edited
    goes into a causal context."""
    model, _ = tiny(causal=causal)  # unsharpened: no confidence near 0.999
    settings = EditSettings(tau_mask=0.0, tau_edit=tau_edit, max_new_tokens=20, stop_at_eos=False)
    out = edit_decode(model, torch.tensor([[5, 6, 7, 8]]), settings, trace=True)
    assert out.forwards.tolist() == [forwards] and out.forwards[0] < 5 * 2
    assert out.positions_fed.tolist() == [(4 + 4) + 4 * (8 + 4 * (causal and tau_edit < 1)) + (forwards - 5) * 4]
    masks = (out.trace.state[:, 0, 4:] == MASKED).sum(1)
    assert masks.tolist()[:6] == [20, 16, 12, 8, 4, 0]


def test_an_ar_twin_costs_one_forward_a_token():
    model, _ = tiny(sharpen=7.0)
    out = ar_decode(model, torch.tensor([[EOS, 5, 6], [5, 6, 7]]), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), max_new_tokens=9)
    for row, length in ((0, 2), (1, 3)):
        ids = out.ids[row].tolist()
        count = ids.index(EOS) + 1 if EOS in ids else len(ids)
        assert out.forwards[row] == count and out.positions_fed[row] == length + count - 1
    canvas = torch.tensor([5, 6, 7])
    for token in out.ids[1, :int(out.forwards[1])]:
        with torch.no_grad():
            logits = model(input_ids=canvas[None]).logits[0, -1]
        logits[MASK] = -torch.inf
        assert token == logits.argmax()
        canvas = torch.cat([canvas, token[None]])


def test_at_block_size_1_with_shift_the_decoder_is_the_ar_twin():
    for seed in range(4):
        model, _ = tiny(seed, block_size=1, causal=seed % 2 == 1, sharpen=7.0)
        ours = edit_decode(model, PROMPT_IDS, EditSettings(tau_edit=2.0, max_new_tokens=12)).ids[0]
        twin = ar_decode(model, PROMPT_IDS, max_new_tokens=12).ids[0]
        assert torch.equal(ours[:len(twin)], twin) and (ours[len(twin):] == EOS).all()


# ---- the trace ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("look_back", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_states_say_what_the_ids_did(seed, look_back):
    model, _ = tiny(seed, sharpen=8.0)
    prompts, real = torch.tensor([[EOS, EOS, 5, 6, 7], [9, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = EditSettings(tau_mask=0.4, tau_edit=0.1, max_post_steps=3, max_new_tokens=14, look_back=look_back)
    out = edit_decode(model, prompts, settings, attention_mask=real, trace=True)
    trace = out.trace
    before, after, was, now = trace.ids[:-1], trace.ids[1:], trace.state[:-1], trace.state[1:]
    assert ((trace.state == MASKED) == (trace.ids == MASK)).all()
    assert ((trace.state == PROMPT) == (np.arange(trace.ids.shape[2]) < trace.prompt_length[:, None])).all()
    assert (np.isnan(trace.confidence) == np.isin(trace.state, [PROMPT, MASKED])).all()
    written = trace.confidence[~np.isnan(trace.confidence)]
    assert ((written > 0) & (written <= 1)).all()
    changed = (before != after) & (was != MASKED)
    assert changed.any() == (now == EDITED).any() and (now[changed] == EDITED).all()  # a change to a visible token is an edit
    assert (after[was == PROMPT] == before[was == PROMPT]).all()
    allowed = {PROMPT: {PROMPT}, MASKED: {MASKED, DRAFT, COMMITTED}, DRAFT: {DRAFT, EDITED, COMMITTED}, EDITED: {EDITED}, COMMITTED: {COMMITTED, EDITED}}
    for code, followers in allowed.items():
        assert {*np.unique(now[was == code]).tolist()} <= followers
    if not look_back:
        assert (before == after)[was == COMMITTED].all()
    assert (np.diff(trace.forward, axis=0) >= 0).all() and (trace.forward[0] == 0).all() and (trace.forward[-1] == out.forwards.numpy()).all()
    for row, length in enumerate(trace.prompt_length):
        assert out.ids[row, 0] == trace.ids[-1, row, length]
    assert (trace.predicted == trace.ids)[trace.ids != MASK].all()


def test_edits_were_seen_in_the_traces_above():
    found = [edit_decode(tiny(seed, sharpen=8.0)[0], PROMPT_IDS, EditSettings(tau_mask=0.4, tau_edit=0.1, max_post_steps=3, max_new_tokens=14), trace=True).trace
             for seed in range(4)]
    assert any((trace.state == EDITED).any() for trace in found)


def test_a_trace_keeps_the_whole_prediction_of_a_block_before_it_is_masked_again():
    """Greedy, one token a forward: what the model chose for each mask is what an independent forward of that canvas prefers."""
    model, _ = tiny(sharpen=8.0)
    trace = edit_decode(model, PROMPT_IDS, EditSettings(tau_mask=2.0, tau_edit=2.0, max_new_tokens=5, stop_at_eos=False), trace=True).trace
    seen = 0
    for before, after in zip(trace.ids, trace.predicted[1:]):
        end = int((before[0] != after[0]).nonzero()[0].max()) // 4 * 4 + 4 if (before != after).any() else 0
        canvas = torch.tensor(before[0, :end])
        if end:
            chosen = reference._logits(model, canvas, end, attention.block_causal(end, 4)).argmax(-1)
            assert torch.equal(torch.where(canvas == MASK, chosen, canvas), torch.tensor(after[0, :end]))
            seen += (canvas == MASK).sum()
    assert seen > 5


def test_a_stored_trace_comes_back_whole_and_untrusted_files_are_not_unpickled(tmp_path):
    trace = edit_decode(tiny()[0], PROMPT_IDS, EditSettings(max_new_tokens=6), trace=True).trace
    back = Trace.load(trace.save(tmp_path / "trace.npz"))
    assert all(np.array_equal(getattr(trace, name), getattr(back, name), equal_nan=name == "confidence") for name in ("ids", "state", "confidence", "forward", "predicted", "prompt_length"))
    assert (back.block_size, back.mask_token_id) == (4, MASK) and isinstance(back.block_size, int)
    np.savez(tmp_path / "evil.npz", **{name: np.array([object()]) for name in trace.__dataclass_fields__})
    with pytest.raises(ValueError, match="allow_pickle"):
        Trace.load(tmp_path / "evil.npz")


def test_no_trace_unless_asked_for():
    assert isinstance(out := edit_decode(tiny()[0], PROMPT_IDS, EditSettings(max_new_tokens=3)), Decoded) and out.trace is None


# ---- sampling and the cache -----------------------------------------------------------------------------------------------------

def test_sampling_differs_from_greedy_stays_in_the_vocabulary_and_ignores_the_global_stream():
    model, _ = tiny()
    settings = EditSettings(tau_mask=0.05, tau_edit=0.5, temperature=1.0, max_new_tokens=40, stop_at_eos=False)
    torch.manual_seed(0)
    first = edit_decode(model, PROMPT_IDS, settings, generator=torch.Generator().manual_seed(1)).ids
    torch.manual_seed(9)
    again = edit_decode(model, PROMPT_IDS, settings, generator=torch.Generator().manual_seed(1)).ids
    greedy = edit_decode(model, PROMPT_IDS, replace(settings, temperature=0.0)).ids
    assert torch.equal(first, again) and not torch.equal(first, greedy) and not (first == MASK).any()


def test_a_cache_slot_holds_what_was_written_last_and_rows_can_leave():
    cache = BlockCache(6)
    new = torch.arange(8.0).view(2, 1, 4, 1)
    cache.at(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])).update(new, -new, 0)
    keys, values = cache.at(torch.tensor([[2, 3], [4, 5]])).update(10 + new[:, :, :2], -new[:, :, :2], 0)
    assert keys[:, 0, :, 0].tolist() == [[0, 1, 10, 11, 0, 0], [4, 5, 6, 7, 14, 15]] and keys.shape == values.shape == (2, 1, 6, 1)
    cache.keep_rows(torch.tensor([1]))
    assert cache.keys[0][:, :, 0, 0].tolist() == [[4, 5, 6, 7, 14, 15]] and cache.get_seq_length() == 6
