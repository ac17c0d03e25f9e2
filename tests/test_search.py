"""Search over orders and tokens: one beam is greedy decoding, a wide one finds what enumeration finds, scorers against uncached forwards."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from reference_rules import shadow_logits
from tiny import EOS, FIRST, MASK, padded, tiny

from hildalib import HildaError
from hildalib.decoding import Beams, EditSettings, SearchSettings, ar_decode, edit_decode, explore, order_token_search, vote
from hildalib.decoding.compression import Compression
from hildalib.decoding.scorers import SCORERS
from hildalib.residual import Residual, Smoothing

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
PRUNES = ("first", "block", "end", "write")


def endless(seed=0, **options):
    """A tiny model that knows no EOS: all it writes is text."""
    model, _ = tiny(seed, **options)
    model.config.eos_token_id = None
    return model


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- one beam -------------------------------------------------------------------------------------------------------------------

@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1, 2, 4]), shift=st.booleans(), causal=st.booleans(),
       tau_mask=st.sampled_from([0.0, 0.3, 0.6, 2.0]), tau_edit=st.sampled_from([0.0, 0.3, 2.0]),
       new=st.sampled_from([1, 6, 13]), prune=st.sampled_from(PRUNES[:3]))
def test_4_one_beam_is_greedy_decoding_alone_and_in_a_batch(seed, size, shift, causal, tau_mask, tau_edit, new, prune):
    model, _ = tiny(seed % 9, shift=shift, causal=causal, block_size=size, sharpen=7.0)
    batch, real = padded([torch.randint(FIRST, 15, (n,), generator=noise(seed)) for n in (3, 8, 1)])
    settings = EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, max_post_steps=3, max_new_tokens=new)
    greedy = edit_decode(model, batch, settings, attention_mask=real)
    beam = order_token_search(model, batch, settings, SearchSettings(beams=1, children=1, prune=prune), attention_mask=real)
    assert all(torch.equal(getattr(greedy, name), getattr(beam, name)) for name in ("ids", "forwards", "positions_fed"))


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.booleans(), causal=st.booleans(), new=st.sampled_from([1, 6, 13]), sub_block=st.sampled_from([None, 2]))
def test_4_one_path_is_greedy_decoding_with_one_token_a_forward(seed, shift, causal, new, sub_block):
    model, _ = tiny(seed % 9, shift=shift, causal=causal, sharpen=7.0)
    batch, real = padded([torch.randint(FIRST, 15, (n,), generator=noise(seed)) for n in (3, 8)])
    settings = EditSettings(tau_mask=2.0, tau_edit=2.0, max_new_tokens=new, sub_block=sub_block)
    greedy = edit_decode(model, batch, settings, attention_mask=real)
    path = order_token_search(model, batch, settings, SearchSettings(beams=1, prune="write", scorer="path"), attention_mask=real)
    assert all(torch.equal(getattr(greedy, name), getattr(path, name)) for name in ("ids", "forwards", "positions_fed"))


# ---- the best path --------------------------------------------------------------------------------------------------------------

def step(model, canvas, start, end):
    """(K, V) probabilities of the open block, uncached."""
    causal = model.config.hilda["causal_context"]
    return reference._logits(model, canvas, end, reference.open_block(start, end, end - start, causal))[start:end].softmax(-1)


@pytest.mark.parametrize("shift, causal", itertools.product([True, False], [True, False]))
@pytest.mark.parametrize("length", [3, 4])
def test_a_wide_beam_finds_the_best_of_all_orders_and_tokens(shift, causal, length):
    """Every order of the block's positions, every token at each: up to 3! * 6^3 paths, each worth the product of what it wrote."""
    model = endless(length, shift=shift, causal=causal, block_size=3, vocabulary="01", sharpen=6.0)
    prompt = torch.tensor([5, 6, 5, 6])[:length]
    start, end = length // 3 * 3, length // 3 * 3 + 3
    words, best = [token for token in range(7) if token != MASK], {}

    def follow(canvas, value):
        free = [i for i in range(start, end) if canvas[i] == MASK]
        if not free:
            text = tuple(canvas[length:].tolist())
            best[text] = max(best.get(text, -math.inf), value)
            return
        with torch.no_grad():
            chances = step(model, canvas, start, end)
        for i, token in itertools.product(free, words):
            child = canvas.clone()
            child[i] = token
            follow(child, value + math.log(chances[i - start, token]))

    follow(torch.cat([prompt, torch.full((end - length,), MASK)]), 0.0)
    found = explore(model, prompt[None], EditSettings(tau_edit=2.0, max_new_tokens=end - length),
                    SearchSettings(beams=400, prune="write", scorer="path"))  # more beams than there are partial texts
    assert len(best) == 6 ** (end - length) and tuple(found.ids[0, 0].tolist()) == max(best, key=best.get)
    values = {tuple(ids.tolist()): float(value) * (end - length) for ids, value in zip(found.ids[0], found.values[0])}
    assert values == pytest.approx(best, abs=1e-4)  # not the best alone: every text with its best order


@pytest.mark.parametrize("beams", [2, 5])
def test_a_narrow_beam_keeps_the_paths_that_a_plain_beam_search_keeps(beams):
    model, size, total = endless(3, causal=True, sharpen=5.0), 4, 12
    found = explore(model, PROMPT, EditSettings(tau_edit=2.0, max_new_tokens=total - 5), SearchSettings(beams=beams, prune="write", scorer="path"))
    paths = [(0.0, torch.cat([PROMPT[0], torch.full((total - 5,), MASK)]))]
    for _ in range(total - 5):
        ways = {}
        for value, canvas in paths:
            start = int((canvas == MASK).nonzero()[0]) // size * size
            with torch.no_grad():
                chances = step(model, canvas, start, start + size)
            for i, token in itertools.product([i for i in range(size) if canvas[start + i] == MASK], range(chances.shape[1])):
                child = canvas.clone()
                child[start + i] = token
                if chances[i, token] > 0:
                    text = tuple(child.tolist())
                    ways[text] = max(ways.get(text, -math.inf), value + math.log(chances[i, token]))
        paths = [(value, torch.tensor(text)) for text, value in sorted(ways.items(), key=lambda way: -way[1])[:beams]]
    assert found.ids[0].tolist() == [canvas[5:].tolist() for _, canvas in paths]
    assert found.values[0].tolist() == pytest.approx([value / (total - 5) for value, _ in paths], abs=1e-5)


# ---- scorers --------------------------------------------------------------------------------------------------------------------

def direct(model, canvas, start, length, name):
    """(K,) log-probabilities of the block at `start`, from uncached forwards of the text up to it (and over the next block)."""
    causal, shift = model.config.hilda["causal_context"], model.config.hilda["label_shift"]
    end = start + 4
    block = canvas[start:end]
    own = [i for i in range(start, end) if i >= length]

    def hidden(positions):
        x = canvas.clone()
        x[positions] = MASK
        return reference._logits(model, x, end, reference.open_block(start, end, 4, causal))[start:end].log_softmax(-1)

    def support(table):
        return table.gather(-1, block[:, None])[:, 0]

    if name == "remasked":
        return support(hidden(own))
    if name == "halves":
        even, odd = (support(hidden([i for i in own if i % 2 == side])) for side in (0, 1))
        return torch.where(torch.arange(4) % 2 == 0, even, odd)
    if name == "shadow":
        return support(shadow_logits(model, canvas, start, end, isolated=True).log_softmax(-1))
    if name == "causal":
        return support(reference._logits(model, canvas, end, torch.ones(1, 1, end, end, dtype=torch.bool).tril())[start:end].log_softmax(-1))
    assert name == "next"
    ahead = torch.cat([canvas[:end], torch.full((4,), MASK)])
    return reference._logits(model, ahead, end + 4, reference.open_block(end, end + 4, 4, causal))[end:].log_softmax(-1).amax(-1)


CASES = [(name, shift, causal) for name in SCORERS for shift in (True, False) for causal in (True, False) if name != "causal" or shift and causal]


@pytest.mark.parametrize("name, shift, causal", CASES)
@pytest.mark.parametrize("lengths, new", [((5, 9, 1), 11), ((4, 8), 8)])
def test_a_scorer_is_what_uncached_forwards_say(name, shift, causal, lengths, new):
    """Every candidate of prompts that end in a block, on a border and in the first block; blocks filled at once, so that the path is known: it is the
    reading a block began with. `next` falls back on it in the last block."""
    model = endless(5, shift=shift, causal=causal, sharpen=6.0)
    prompts = [torch.randint(FIRST, 15, (n,), generator=noise(n)) for n in lengths]
    batch, real = padded(prompts)
    for accumulate in (True, False):
        choices = SearchSettings(beams=1, children=3, temperature=2.0, prune="end", scorer=name, accumulate=accumulate)
        found = explore(model, batch, EditSettings(tau_mask=0.0, tau_edit=2.0, max_new_tokens=new), choices, attention_mask=real, generator=noise())
        for prompt, texts, values in zip(prompts, found.ids, found.values):
            assert values.tolist() == sorted(values.tolist(), reverse=True) and len({tuple(text.tolist()) for text in texts}) > 1
            for text, value in zip(texts, values):
                canvas, parts = torch.cat([prompt, text]), []
                for start in range(len(prompt) // 4 * 4, len(canvas), 4):
                    reading = "remasked" if name == "path" or name == "next" and start + 4 == len(canvas) else name
                    with torch.no_grad():
                        parts.append(direct(model, canvas, start, len(prompt), reading)[max(len(prompt) - start, 0):])
                assert float(value) == pytest.approx(float((torch.cat(parts) if accumulate else parts[-1]).mean()), abs=1e-4)


def test_a_path_of_many_forwards_is_worth_the_confidences_of_its_trace():
    model = endless(4, causal=True, sharpen=4.0)
    settings = EditSettings(tau_mask=0.3, tau_edit=2.0, max_new_tokens=11)
    greedy = edit_decode(model, PROMPT, settings, trace=True)
    found = explore(model, PROMPT, settings, SearchSettings(beams=1, children=8, temperature=2.0, prune="end", scorer="path"), generator=noise())
    texts = [tuple(text.tolist()) for text in found.ids[0]]
    assert len(texts) == 8 and len({*texts}) > 4  # samples, as many as asked for
    value = found.values[0, texts.index(tuple(greedy.ids[0].tolist()))]
    assert float(value) == pytest.approx(np.log(greedy.trace.confidence[-1, 0, 5:16]).mean(), abs=1e-5)


@pytest.mark.parametrize("prune", ["first", "block"])
def test_the_published_score_always_prefers_the_child_without_noise(prune):
    """In a model that sees nothing to the right the block masked again is the reading it began with, whose argmax nothing beats."""
    for seed in range(4):
        model = endless(seed, causal=True, sharpen=5.0)
        settings = EditSettings(tau_mask=0.0, tau_edit=2.0, max_new_tokens=11)
        choices = SearchSettings(beams=2, children=4, temperature=3.0, scorer="remasked", prune=prune)
        search = order_token_search(model, PROMPT, settings, choices, generator=noise(seed))
        assert search.ids.tolist() == edit_decode(model, PROMPT, settings).ids.tolist() and search.forwards > 10


def test_a_scorer_of_ones_own_decides():
    """Worth of a token: its id. The search then writes higher ids than greedy decoding, and the more so the more it may try."""
    model = endless(1, causal=True, sharpen=3.0)
    settings, means = EditSettings(tau_mask=0.0, tau_edit=2.0, max_new_tokens=11), []
    for children in (1, 4, 16):
        choices = SearchSettings(beams=1, children=children, temperature=4.0, scorer=lambda block: block.ids.float())
        means.append(order_token_search(model, PROMPT, settings, choices, generator=noise()).ids.float().mean())
    assert means[0] < means[1] < means[2]


def test_causal_needs_an_ar_mode():
    for options in ({"causal": False}, {"causal": True, "shift": False}):
        with pytest.raises(HildaError, match="scorer 'causal' needs a shifted dLLM with a causal context"):
            explore(tiny(sharpen=7.0, **options)[0], PROMPT, EditSettings(tau_mask=0.0), SearchSettings(scorer="causal"), generator=noise())


# ---- cost -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scorer, positions", [("path", 0), ("remasked", 4), ("halves", 8), ("shadow", 4 + 2 * 3), ("causal", 4), ("next", 8)])
def test_every_beam_pays_for_its_forwards_and_every_candidate_for_its_judge(scorer, positions):
    """Blocks are filled at once (tau_mask 0). The prompt's block and the first open one: 1 forward for all. Then in each of two blocks the
    candidates are judged, but before that those of the first block, all of them, have read the second one with the forward that commits theirs;
    the last block needs no commit. Noise so strong that no two of the candidates are equal."""
    model = endless(0, causal=True)
    found = explore(model, PROMPT[:, :4], EditSettings(tau_mask=0.0, tau_edit=2.0, max_new_tokens=8),
                    SearchSettings(beams=2, children=3, temperature=50.0, scorer=scorer), generator=noise())
    judged = 6 * (positions > 0)
    assert found.forwards.tolist() == [1 + 6 + judged + judged] and found.positions_fed.tolist() == [(4 + 4) + 6 * 8 + 2 * judged * positions]


def test_equal_beams_are_one_and_pay_once():
    """A model so sure that noise changes nothing: greedy decoding's text; candidates fall together, nobody is judged."""
    model = endless(0, causal=True, sharpen=30.0)
    settings = EditSettings(tau_mask=0.0, tau_edit=2.0, max_new_tokens=8)
    found = explore(model, PROMPT[:, :4], settings, SearchSettings(beams=2, children=3, temperature=1e-6, scorer="halves"), generator=noise())
    assert found.ids.shape[1] == 1 and torch.equal(found.ids[:, 0], edit_decode(model, PROMPT[:, :4], settings).ids)
    assert found.forwards.tolist() == [1 + 6]  # six children commit the first block, none of the second needs to


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), prune=st.sampled_from(PRUNES), scorer=st.sampled_from(list(SCORERS)), shift=st.booleans(), causal=st.booleans(),
       tau_edit=st.sampled_from([0.0, 2.0]), beams=st.integers(1, 3), children=st.integers(1, 3))
def test_6_no_mask_comes_out_and_every_search_ends(seed, prune, scorer, shift, causal, tau_edit, beams, children):
    scorer = "path" if prune == "write" or scorer == "causal" and not (shift and causal) else scorer
    tau_edit = 2.0 if prune == "write" else tau_edit
    model, _ = tiny(seed % 9, shift=shift, causal=causal, sharpen=7.0)
    prompts = [torch.randint(FIRST, 15, (n,), generator=noise(seed)) for n in (3, 8, 1)]
    batch, real = padded(prompts)
    settings = EditSettings(tau_mask=0.4, tau_edit=tau_edit, max_post_steps=2, max_new_tokens=11)
    choices = SearchSettings(beams=beams, children=children, prune=prune, scorer=scorer)
    found, again = (explore(model, batch, settings, choices, attention_mask=real, generator=noise(seed)) for _ in range(2))
    assert not (found.ids == MASK).any() and found.ids.shape[2] == 11 and torch.equal(found.ids, again.ids)  # the same noise, the same search
    blocks, width = 4, beams if prune == "write" else beams * children
    assert (found.forwards <= 1 + blocks * width * (4 + 2 + 1 + 1)).all()  # writes, forwards without masks, commit, judge
    assert found.values.tolist() == found.values.sort(-1, descending=True).values.tolist()
    for texts, values in zip(found.ids, found.values):
        alive = [tuple(text.tolist()) for text, value in zip(texts, values) if value > -torch.inf]
        assert 1 <= len(alive) <= (width if prune == "end" else beams)
        assert len({*alive}) == len(alive) or prune == "end"
        assert all(EOS not in text or {*text[text.index(EOS):]} == {EOS} for text in alive)


# ---- controls -------------------------------------------------------------------------------------------------------------------

def test_a_vote_takes_the_most_frequent_answer_and_of_its_texts_the_best():
    ids = torch.tensor([[[1, 7], [2, 8], [3, 8], [4, 9]], [[1, 7], [2, 8], [3, 8], [3, 8]]])
    values = torch.tensor([[0.0, -1.0, -2.0, -3.0], [0.0, -1.0, -torch.inf, -torch.inf]])  # the second prompt has two beams
    chosen = vote(Beams(ids, values, torch.tensor([5, 6]), torch.tensor([50, 60])), lambda text: int(text[1]))
    assert chosen.ids.tolist() == [[2, 8], [1, 7]] and chosen.forwards.tolist() == [5, 6] and chosen.positions_fed.tolist() == [50, 60]


def test_a_wide_ar_beam_finds_the_most_probable_text_and_pays_for_all_its_beams():
    model = endless(1, vocabulary="01", sharpen=8.0)
    model.config.eos_token_id = EOS  # `generate` wants a token to pad with
    words, best = [token for token in range(7) if token not in (MASK, EOS)], {}
    for pair in itertools.product(words, words):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 6, *pair]])).logits[0, 1:3]
        logits[:, MASK] = -torch.inf
        best[pair] = float(logits.log_softmax(-1).gather(-1, torch.tensor(pair)[:, None]).sum())
    out = ar_decode(model, torch.tensor([[EOS, 5, 6]]), attention_mask=torch.tensor([[0, 1, 1]]), max_new_tokens=2, beams=49)
    if EOS not in out.ids[0]:
        assert tuple(out.ids[0].tolist()) == max(best, key=best.get)
    assert out.forwards.tolist() == [49 * 2] and out.positions_fed.tolist() == [49 * 3]


# ---- settings -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("choices, message", [
    ({"beams": 0}, "beams = 0 must be at least 1"), ({"children": -1}, "children = -1 must be at least 1"),
    ({"prune": "never"}, "prune = 'never' must be one of first, block, end, write"), ({"prune": "write"}, "which only scorer 'path' can"),
    ({"scorer": "gut"}, "scorer = 'gut' must be one of path, remasked"), ({"temperature": 0.0}, "makes all children alike"),
    ({"temperature": float("nan")}, "makes all children alike")])
def test_impossible_choices_are_named(choices, message):
    with pytest.raises(HildaError, match=message):
        SearchSettings(**choices)


def test_what_a_search_cannot_share_or_take_back_is_refused():
    model, path = tiny()[0], SearchSettings(prune="write", scorer="path")
    with pytest.raises(HildaError, match="search with look_back=0"):
        explore(model, PROMPT, EditSettings(look_back=1), SearchSettings(), generator=noise())
    with pytest.raises(HildaError, match="search with tau_edit=1"):
        explore(model, PROMPT, EditSettings(tau_edit=0.5), path)
    with pytest.raises(HildaError, match="search with kv=None"):
        explore(model, PROMPT, EditSettings(kv=Compression(bits=8)), SearchSettings(), generator=noise())
    with pytest.raises(HildaError, match="beams share an account"):
        explore(model, PROMPT, EditSettings(residual=Smoothing()), SearchSettings(), generator=noise())
    with pytest.raises(HildaError, match="branches before a residual is made"):
        explore(model, PROMPT, EditSettings(tau_edit=1.0, residual=Residual()), path)


@pytest.mark.parametrize("prune", PRUNES[:3])
def test_beams_carry_their_residuals(prune):
    """One beam is greedy decoding with it; of several, those of one prompt do not change what the others write."""
    model = endless(3, causal=True, sharpen=3.0)
    settings = EditSettings(tau_mask=0.5, tau_edit=1.0, max_new_tokens=9, residual=Residual())
    batch, real = padded([torch.randint(FIRST, 15, (n,), generator=noise(n)) for n in (3, 6)])
    one = order_token_search(model, batch, settings, SearchSettings(beams=1, children=1, prune=prune), attention_mask=real)
    assert torch.equal(one.ids, edit_decode(model, batch, settings, attention_mask=real).ids)
    plain = order_token_search(model, batch, replace(settings, residual=None), SearchSettings(beams=1, children=1, prune=prune), attention_mask=real)
    assert not torch.equal(one.ids, plain.ids)  # it does act
    several = explore(model, batch, settings, SearchSettings(beams=2, children=2, scorer="path", prune=prune), attention_mask=real, generator=noise())
    assert several.ids.shape == (2, 4 if prune == "end" else several.ids.shape[1], 9) and (several.ids != MASK).all()


def test_without_a_greedy_child_every_child_is_noisy():
    """A model of zeros prefers the first token always; noise alone makes it write another."""
    model = endless(0, causal=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    settings, choices = EditSettings(tau_mask=0.0, tau_edit=1.0, max_new_tokens=8), SearchSettings(beams=1, children=3, prune="end", scorer="path")
    greedy = edit_decode(model, PROMPT, settings).ids[0]
    found = {flag: explore(model, PROMPT, settings, replace(choices, greedy_child=flag), generator=noise(1)).ids[0] for flag in (True, False)}
    assert any(torch.equal(text, greedy) for text in found[True]) and not any(torch.equal(text, greedy) for text in found[False])
