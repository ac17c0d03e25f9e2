"""What masks carry from one forward to the next: the formulas by hand, cached = uncached with every rule, and the loss of stage 2."""

import itertools
import math
from dataclasses import replace

import pytest
import reference_rules
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from test_rules import COMMITS, REVISIONS, compare_with_uncached
from test_training import batch_of, trainer_of
from tiny import EOS, FIRST, MASK, as_rows, padded, text, tiny, weights

from hildalib import HildaError, backbones
from hildalib.decoding import EditSettings, edit_decode
from hildalib.decoding.forward import Forward
from hildalib.gated import gate
from hildalib.layout import Layout, target_logits, validate
from hildalib.recipe import Recipe
from hildalib.residual import Residual, Smoothing
from hildalib.training import train
from hildalib.wsd import BlockSchedule

PROMPT_IDS = torch.tensor([[5, 6, 7]])
PAIRS = list(itertools.product(COMMITS, REVISIONS))
SOME = PAIRS[::11] + PAIRS[5::11]  # every rule of either kind
NOTHING = [Residual(weight=0.0), Residual(weight=0.0, top_k=3), Smoothing(0.0, 0.0, 0.0)]
CARRIED = [Residual(), Residual(0.7, 0.5), Residual(temperature=2.0, tempered=True), Residual(top_k=3), Residual(0.9, 1.5, True, 2), Smoothing(), Smoothing(0.1, 0.2, 0.8, 0.5)]
RECIPE = Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, residual_share=1.0)


# ---- the formulas ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", CARRIED)
def test_what_a_mask_carries_is_what_the_plain_loop_says(rule):
    model, _ = tiny(sharpen=3.0)
    embedding, logits = model.get_input_embeddings(), 3 * torch.randn(6, 19, generator=torch.Generator().manual_seed(0))
    logits[:, MASK] = -torch.inf
    forwards = torch.tensor([1, 2, 3, 5, 8, 40])
    with torch.no_grad():
        found = embedding.weight[MASK] + rule(logits, embedding, MASK, forwards)
        expected = torch.stack([reference_rules.carried_by(rule, model, row, n) for row, n in zip(logits, forwards.tolist())])
    assert torch.allclose(found, expected, atol=1e-6)
    assert rule(logits[:0], embedding, MASK, forwards[:0]).shape == (0, 32)


def test_the_surer_the_model_was_the_plainer_the_mask():
    """Entropy 0: the plain [MASK]. Two equal chances of V: a share ln 2 / ln V of their mean. All but [MASK] alike: ln(V - 1) / ln V."""
    embedding = torch.nn.Embedding(4, 2)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, 3.0]]))
    inf = torch.inf
    sure, two, all_three = torch.tensor([[0.0, -inf, -inf, -inf], [0.0, 0.0, -inf, -inf], [0.0, 0.0, 0.0, -inf]])[:, None]
    assert torch.equal(Residual()(sure, embedding, 3), torch.zeros(1, 2))
    assert torch.allclose(Residual()(two, embedding, 3), 0.5 * (torch.tensor([[0.5, 0.5]]) - embedding.weight[3]))
    assert torch.allclose(Residual()(all_three, embedding, 3), math.log(3) / math.log(4) * (torch.tensor([[1.0, 1.0]]) - embedding.weight[3]))


def test_a_temperature_moves_the_weight_alone_unless_the_expectation_is_tempered_too():
    model, _ = tiny()
    embedding, logits = model.get_input_embeddings(), torch.randn(5, 19, generator=torch.Generator().manual_seed(1))
    plain, hot, both = (rule(logits, embedding, MASK) for rule in (Residual(), Residual(temperature=3.0), Residual(temperature=3.0, tempered=True)))
    ratio = hot / plain
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3) and (ratio > 1).all()  # the same direction, further
    assert not torch.allclose(both, hot, atol=1e-3)


def test_all_tokens_are_the_top_k_of_the_vocabulary_and_few_keep_the_whole_entropy():
    model, _ = tiny()
    embedding, logits = model.get_input_embeddings(), torch.randn(5, 19, generator=torch.Generator().manual_seed(1))
    full, all_of_them, one = (Residual(top_k=k)(logits, embedding, MASK) for k in (0, 99, 1))
    assert torch.allclose(full, all_of_them, atol=1e-6)
    share = torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True) / math.log(19)
    assert torch.allclose(one, share * (embedding.weight[logits.argmax(-1)] - embedding.weight[MASK]), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"weight": 1.5}, {"temperature": 0.0}, {"top_k": -1}, {"weight": float("nan")}])
def test_impossible_residuals_are_refused(wrong):
    with pytest.raises(HildaError, match=r"weight must be in \[0, 1\], temperature above 0"):
        Residual(**wrong)


# ---- in decoding ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models():
    return {(seed, shift, causal, size): tiny(seed, shift=shift, causal=causal, block_size=size, sharpen=6.0)[0]
            for seed in range(2) for shift in (True, False) for causal in (True, False) for size in (4, 8)}


@pytest.mark.parametrize("pair", SOME, ids="-".join)
def test_4_weight_0_gives_the_tokens_and_costs_of_no_residual(models, pair):
    number = PAIRS.index(pair)
    nothing = NOTHING[number % 3]
    model = models[number % 2, number % 3 > 0, number % 5 > 2, (4, 8)[number // 2 % 2]]
    settings = EditSettings(commit=COMMITS[pair[0]], revise=REVISIONS[pair[1]], max_post_steps=3, max_new_tokens=19)
    ids, real = padded([torch.randint(FIRST, 15, (n,), generator=torch.Generator().manual_seed(number)) for n in (3, 9, 1, 12)])
    plain, carried = (edit_decode(model, ids, replace(settings, residual=rule), attention_mask=real, generator=torch.Generator().manual_seed(1))
                      for rule in (None, nothing))
    for name in ("ids", "forwards", "positions_fed"):
        assert torch.equal(getattr(plain, name), getattr(carried, name)), name


@pytest.mark.parametrize("pair", SOME, ids="-".join)
def test_4_cached_equals_uncached_with_a_residual_and_every_rule(models, pair):
    number = PAIRS.index(pair)
    compare_with_uncached(models, pair, number % 2, number % 3 > 0, number % 5 > 2, (4, 8)[number // 2 % 2], 3, number, (3, 9), residual=CARRIED[number % len(CARRIED)])


@hypothesis_settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pair=st.sampled_from(PAIRS), residual=st.sampled_from(CARRIED), seed=st.integers(0, 1), shift=st.booleans(), causal=st.booleans(), size=st.sampled_from([4, 8]),
       sub_block=st.sampled_from([None, 3]), post=st.sampled_from([0, 3]), max_remasks=st.sampled_from([0, 1, 2]), look_back=st.sampled_from([0, 0, 1]),
       numbers=st.integers(0, 10_000))
def test_4_cached_equals_uncached_with_a_residual_for_any_settings(models, **case):
    compare_with_uncached(models, **case, lengths=(3, 9, 1))


@pytest.mark.parametrize("causal", [True, False])
def test_only_masks_that_the_forward_before_left_in_the_same_block_carry_anything(models, monkeypatch, causal):
    """Read off the model's inputs: rows that are no token's embedding. None in the first forward of a block (cold start)."""
    model, seen = models[0, True, causal, 4], []
    plain, embedded = model.get_input_embeddings().weight, Forward._embedded

    def watched(self, ids, carried):
        seen.append((embeds := embedded(self, ids, carried)) if carried is not None else None)
        return embeds if carried is not None else embedded(self, ids, carried)

    monkeypatch.setattr(Forward, "_embedded", watched)
    settings = EditSettings(tau_mask=0.6, tau_edit=1.0, max_new_tokens=21, stop_at_eos=False, residual=Residual())
    trace = edit_decode(model, torch.tensor([[5, 6, 7, 8]]), settings, trace=True).trace  # ids[n]: what forward n read
    masks = torch.tensor(trace.ids[:len(seen), 0] == MASK)
    start = masks.int().argmax(-1) // 4 * 4  # of the block that is written; one that is full is only committed
    assert seen[0] is None and len(seen) == len(trace.ids) - 1
    for n in range(1, len(seen)):
        block = slice(int(start[n]), int(start[n]) + 4)
        carried = (masks[n] & masks[n - 1])[block] & (start[n] == start[n - 1])
        bare = (seen[n][0, :, None] == plain).all(-1).any(-1)
        assert torch.equal(~bare[:4], carried) and bare[4:].all(), n
    assert (start[1:] == start[:-1]).sum() > 3


def test_a_residual_changes_what_is_written(models):
    settings = EditSettings(tau_mask=0.8, tau_edit=1.0, max_new_tokens=40, stop_at_eos=False)
    texts = [edit_decode(models[seed, True, True, 8], PROMPT_IDS, replace(settings, residual=rule)).ids for rule in (None, Residual(), Smoothing()) for seed in range(2)]
    assert not torch.equal(torch.cat(texts[:2]), torch.cat(texts[2:4])) and not torch.equal(torch.cat(texts[:2]), torch.cat(texts[4:]))


def test_a_gated_model_carries_a_residual_too(tmp_path):
    """Its embedding of [MASK] is the adapter's own; one more forward of the training layout at the same masks is the oracle."""
    backbones.save(*tiny(block_size=4, causal=True, sharpen=6.0), tmp_path / "parent")
    torch.manual_seed(0)
    model = gate(backbones.load(tmp_path / "parent", dtype="float32", device="cpu", lora=4)[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.normal_()
    prompt, settings = torch.tensor([[5, 6, 7, 8, 9]]), EditSettings(tau_mask=2.0, tau_edit=2.0, max_new_tokens=3, residual=Residual(), stop_at_eos=False)
    trace = edit_decode(model, prompt, settings, trace=True).trace
    canvas = torch.tensor(trace.ids[0])
    for n in range(2):  # the second mask to be written is chosen after a forward that carries what the first one said of it
        masks = (canvas == MASK)[:, None]
        layout = Layout.build(canvas, canvas[:, None], torch.zeros_like(canvas), 4, True, True)  # its clean half holds masks too: they stay plain
        with torch.no_grad():
            said = target_logits(model, layout, masks, layout.carry(model, said[kept]) if n else None)
        chosen = int(said.softmax(-1).max(-1).values.argmax())
        kept = torch.arange(len(said)) != chosen
        position = int(masks[0, 0].nonzero()[chosen])
        canvas[0, position] = said[chosen].argmax()
        assert trace.ids[n + 1, 0, position] == canvas[0, position] and torch.equal(torch.tensor(trace.ids[n + 1]), canvas)


# ---- in training ----------------------------------------------------------------------------------------------------------------

def expected_loss(model, reference, batch, carries, causal):
    """The mean M2T loss of one batch, position by position, from whole forwards."""
    K, (B, C, L), E = batch["block_size"], batch["noisy_ids"].shape, model.get_input_embeddings().weight
    layout = Layout.build(batch["input_ids"], batch["noisy_ids"], batch["doc_ids"], K, True, causal)
    rows, total, count = layout.ids.shape[1], 0.0, 0
    embeds = E[layout.ids].clone()
    said = reference(input_ids=layout.ids, attention_mask=layout.mask, position_ids=layout.positions).logits.detach()
    for b, c, i in (batch["noisy_ids"] == MASK).nonzero().tolist():
        row, at, before = (b, c * L + i, layout.source[c, i]) if rows > L else (b * C + c, i, layout.source[0, i])
        logits = said[row, before].clone()
        logits[MASK] = -torch.inf
        if carries[b]:
            embeds[row, at] = reference_rules.carried_by(Residual(), model, logits, 1)
    out = model(inputs_embeds=embeds, attention_mask=layout.mask, position_ids=layout.positions).logits
    for b, c, i in batch["mask_targets"].nonzero().tolist():
        row, before = (b, layout.source[c, i]) if rows > L else (b * C + c, layout.source[0, i])
        logits = out[row, before].clone()
        logits[MASK] = -torch.inf
        total, count = total + F.cross_entropy(logits, batch["input_ids"][b, i]), count + 1
    return total / count


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size, copies", [(4, 1), (4, 2), (16, 2)])
@pytest.mark.parametrize("carries", [[True, True, True], [True, False, True], [False, False, False]])
def test_the_loss_of_stage_2_by_hand(tmp_path, causal, size, copies, carries):
    """Every layout: noisy and clean halves, several copies, block size L; the reference's distributions, the model's own embeddings."""
    recipe = replace(RECIPE, schedule=BlockSchedule(stable=(size, 1)), copies=copies, causal_context=causal)
    (model, _), (reference, _) = tiny(0, sharpen=3.0), tiny(1, sharpen=3.0)
    trainer, batch = trainer_of(model, recipe, tmp_path), batch_of(recipe, documents=True)
    trainer.reference = reference
    assert batch["carries"].all()
    batch["carries"] = torch.tensor(carries)
    loss, expected = trainer.compute_loss(model, batch), expected_loss(model, reference, batch, carries, causal)
    assert torch.isclose(loss, expected, atol=1e-5)
    gradients = []
    for value in (loss, expected):
        model.zero_grad()
        value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-5) and all(p.grad is None for p in reference.parameters())
    batch["carries"] = torch.zeros(3, dtype=torch.bool)
    assert any(carries) != torch.isclose(loss, trainer.compute_loss(model, batch), atol=1e-5)


def test_next_token_steps_have_no_masks_to_carry_anything(tmp_path):
    recipe = replace(RECIPE, schedule=BlockSchedule(stable=(1, 1)))
    model, _ = tiny(0)
    trainer, batch = trainer_of(model, recipe, tmp_path), batch_of(recipe)  # no reference is asked
    batch["carries"], plain = torch.zeros_like(batch["carries"]), trainer.compute_loss(model, batch)
    assert torch.equal(plain, trainer.compute_loss(model, batch))


def test_the_share_of_rows_that_carry_is_that_of_the_recipe_and_leaves_their_noise_alone():
    plain, half = (batch_of(replace(RECIPE, residual_share=share, schedule=BlockSchedule(stable=(4, 400)), batch_size=1, edit_rate=0.2, draft_share=0.5), rows=400)
                   for share in (0.0, 0.5))
    assert not plain["carries"].any() and abs(half["carries"].float().mean() - 0.5) < 4 * 0.5 / 400 ** 0.5
    assert all(torch.equal(plain[key], half[key]) for key in ("noisy_ids", "fill", "mask_targets", "input_ids"))


def test_a_run_needs_a_reference_and_accumulated_parts_are_the_whole(tmp_path):
    rows, recipe = as_rows(*text(12)), replace(RECIPE, schedule=BlockSchedule(stable=(4, 3)), batch_size=4, lr=1e-2, residual_share=0.5, draft_share=0.5, log_every=1)
    with pytest.raises(HildaError, match="residual_share > 0 needs the frozen model that supplies the residual; pass reference="):
        train(*tiny(0), rows, recipe, tmp_path / "none")
    ends, reference = [], tiny(1)[0]
    for n in (1, 2):
        model, tokenizer = tiny(0)
        train(model, tokenizer, rows, replace(recipe, batch_size=4 // n, accumulate=n), tmp_path / str(n), reference=reference)
        ends.append(weights(model))
    model, tokenizer = tiny(0)
    train(model, tokenizer, rows, replace(recipe, residual_share=0.0), tmp_path / "plain")
    assert torch.allclose(*ends, atol=2e-5) and not torch.allclose(ends[0], weights(model), atol=1e-3)
    assert torch.equal(weights(reference), weights(tiny(1)[0]))


def test_validation_can_look_twice():
    """The second forward carries what the first said: by hand for one row without shift."""
    model, _ = tiny(shift=False, sharpen=3.0)
    rows = as_rows(*text(3))
    once, twice = (validate(model, rows, block_size=4, rates=(1.0,), residual=residual)[1.0] for residual in (False, True))
    canvas = torch.full((3, 1, 16), MASK)
    layout = Layout.build(rows["input_ids"], canvas, rows["doc_ids"], 4, False)
    where = torch.ones(3, 1, 16, dtype=torch.bool)
    with torch.no_grad():
        said = target_logits(model, layout, where)
        embeds = model.get_input_embeddings()(layout.ids).clone()
        embeds[:, :16] = torch.stack([reference_rules.carried_by(Residual(), model, row, 1) for row in said]).view(3, 16, -1)
        again = target_logits(model, layout, where, embeds)
    for found, logits in ((once, said), (twice, again)):
        assert found == pytest.approx(F.cross_entropy(logits, rows["input_ids"].flatten()).item(), abs=1e-5)
    assert abs(once - twice) > 1e-3
