"""Adapters on noisy rows: what reads clean rows is the frozen parent, in training, in decoding and after a round trip to disk."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import MASK, as_rows, text, tiny

from hildalib import HildaError, attention, backbones
from hildalib.decoding import EditSettings, PipelineSettings, SearchSettings, ar_decode, edit_decode, explore, order_token_search, pipeline_decode, revise, self_speculate
from hildalib.decoding import linear as laid
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.compression import targets
from hildalib.decoding.forward import Forward, is_straight
from hildalib.gated import draft_as, gate, is_gated, noisy_rows, read_clean
from hildalib.layout import Layout, target_logits
from hildalib.recipe import Recipe
from hildalib.training import DiffusionTrainer, train
from hildalib.wsd import BlockSchedule

RECIPE = Recipe(BlockSchedule(stable=(4, 3)), batch_size=4, lr=1e-2, warmup_steps=0, causal_context=True, draft_share=0.5, log_every=1)


@pytest.fixture
def pair(tmp_path):
    """(parent, gated model with a random adapter, tokenizer)."""
    backbones.save(*tiny(block_size=4, causal=True, sharpen=6.0), tmp_path / "parent")
    parent, tokenizer = backbones.load(tmp_path / "parent", dtype="float32", device="cpu")
    torch.manual_seed(0)  # peft draws from the global stream
    model = gate(backbones.load(tmp_path / "parent", dtype="float32", device="cpu", lora=4)[0])
    stir(model, 1)
    return parent, model, tokenizer


def stir(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


def test_without_noisy_rows_it_is_the_parent_and_on_them_it_is_not(pair):
    parent, model, _ = pair
    ids, docs = text(rows=2)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, parent(input_ids=ids).logits)
        layout = Layout.build(ids, torch.full((2, 1, 16), MASK), docs, 4, True, True)
        where = torch.ones(2, 1, 16, dtype=torch.bool)
        context = torch.arange(16).expand(2, -1) > 0
        ours, theirs = (target_logits(m, layout, where, context=context).split([32, 30]) for m in (model, parent))
    assert torch.equal(ours[1], theirs[1]) and not torch.allclose(ours[0][:, 5:], theirs[0][:, 5:], atol=1e-2)


def test_at_block_size_1_every_row_is_the_parents(pair):
    parent, model, _ = pair
    ids, docs = text(rows=2)
    with torch.no_grad():
        ours = target_logits(model, Layout.build(ids, ids[:, None], docs, 1, True, True), torch.ones(2, 1, 16, dtype=torch.bool))
        theirs = parent(input_ids=ids, attention_mask=attention.block_causal(16, 1)).logits
    assert torch.allclose(ours.view(2, 16, -1)[:, 1:, 5:], theirs[:, :-1, 5:], atol=1e-5)
    prompt, settings = torch.tensor([[5, 6, 7]]), EditSettings(tau_edit=2.0, max_new_tokens=12, block_size=1)
    twin = ar_decode(parent, prompt, max_new_tokens=12).ids[0]
    assert torch.equal(edit_decode(model, prompt, settings).ids[0, :len(twin)], twin)


@pytest.mark.parametrize("seed", range(4))
def test_self_speculation_writes_the_parents_text_whatever_the_adapter_drafts(pair, seed):
    parent, model, _ = pair
    stir(model, seed)
    prompt = torch.tensor([[5, 6 + seed, 7, 8, 9]])
    twin = ar_decode(parent, prompt, max_new_tokens=19).ids[0]
    assert torch.equal(self_speculate(model, prompt, max_new_tokens=19).ids[0, :len(twin)], twin)


def test_a_search_is_judged_by_the_parent_where_it_reads_clean_rows_and_drafted_by_the_adapter(pair):
    parent, model, _ = pair
    model.config.eos_token_id = None
    prompt, settings = torch.tensor([[5, 6, 7, 8, 9]]), EditSettings(tau_mask=0.0, tau_edit=2.0, max_new_tokens=11)
    choices = SearchSettings(beams=1, children=3, temperature=2.0, scorer="causal", prune="end")
    found = explore(model, prompt, settings, choices, generator=torch.Generator().manual_seed(0))
    for text_, value in zip(found.ids[0], found.values[0]):
        with torch.no_grad():
            logits = parent(input_ids=torch.cat([prompt[0], text_])[None]).logits[0, 4:-1]
        logits[:, MASK] = -torch.inf
        assert float(value) == pytest.approx(float(logits.log_softmax(-1).gather(-1, text_[:, None]).mean()), abs=1e-4)
    alone = order_token_search(model, prompt, settings, replace(choices, children=1))
    assert torch.equal(alone.ids, edit_decode(model, prompt, settings).ids)


def test_cached_decoding_gives_the_logits_of_the_training_layout(pair):
    """One forward after the prompt: all masks of the open block, with the adapter, over a context without it."""
    _, model, _ = pair
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    first = edit_decode(model, prompt, EditSettings(tau_mask=0.0, tau_edit=2.0, max_new_tokens=3)).ids[0]
    canvas = torch.cat([prompt, torch.full((1, 3), MASK)], 1)
    layout = Layout.build(canvas, canvas[:, None], torch.zeros_like(canvas), 4, True, True)
    with torch.no_grad():
        logits = target_logits(model, layout, (torch.arange(8) > 4)[None, None])
    end = (first == 2).nonzero()[0, 0] + 1 if (first == 2).any() else 3
    assert torch.equal(logits.argmax(-1)[:end], first[:end])


def test_training_moves_the_adapter_only_and_disk_brings_it_back(pair, tmp_path):
    parent, model, tokenizer = pair
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tokenizer, as_rows(*text(12)), RECIPE, tmp_path / "run")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name or "trainable_tokens" in name for name in moved)
    again, _ = backbones.load(tmp_path / "run" / "model", dtype="float32", device="cpu")
    torch.manual_seed(0)
    finished = gate(backbones.load(tmp_path / "parent", dtype="float32", device="cpu", lora=4)[0])
    stir(finished, 1)
    train(finished, tokenizer, as_rows(*text(12)), RECIPE, tmp_path / "run")  # is done, and loaded
    prompt, settings = torch.tensor([[5, 6, 7]]), EditSettings(tau_mask=0.3, tau_edit=0.3, max_new_tokens=12)
    assert is_gated(again) and again.config.hilda["causal_context"]
    for other in (again, finished):
        assert is_straight(other)
        assert torch.equal(edit_decode(other, prompt, settings).ids, edit_decode(model, prompt, settings).ids)
    twin = ar_decode(parent, prompt, max_new_tokens=12).ids[0]
    assert torch.equal(self_speculate(again, prompt, max_new_tokens=12).ids[0, :len(twin)], twin)


def loss_and_gradients(model, layout, targets, labels, reading):
    model.zero_grad()
    torch.nn.functional.cross_entropy(target_logits(model, layout, targets, reading=reading), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "token" not in name}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("length", [16, 256])  # dense mask; tiles
def test_the_clean_half_read_once_gives_the_logits_and_gradients_of_one_forward(pair, copies, length):
    _, model, _ = pair
    ids, docs = text(rows=3, length=length)
    noisy = torch.where(torch.rand(3, copies, length, generator=torch.Generator().manual_seed(1)) < 0.5, MASK, ids[:, None])
    targets = (noisy == MASK) & (torch.arange(length) > 0)
    layout, labels = Layout.build(ids, noisy, docs, 4, True, True), ids[:, None].expand_as(noisy)[targets]
    model.train().set_attn_implementation(attention.TILED)
    reading = read_clean(model, layout)
    ours, whole = target_logits(model, layout, targets, reading=reading), target_logits(model, layout, targets)
    torch.testing.assert_close(ours, whole)
    split, joint = (loss_and_gradients(model, layout, targets, labels, r) for r in (reading, None))
    assert split.keys() == joint.keys() and all(torch.allclose(split[name], joint[name], atol=1e-6) for name in joint)
    part = torch.tensor([True, False, True])
    alone = Layout.build(ids[part], noisy[part], docs[part], 4, True, True)
    torch.testing.assert_close(target_logits(model, alone, targets[part], reading=reading.of(part)), whole[targets.nonzero()[:, 0] != 1])


def test_a_gated_model_is_its_own_teacher(pair, tmp_path):
    """KL to a parent loaded beside it and to the parent under its adapters are one loss."""
    parent, model, tokenizer = pair
    rows, start = as_rows(*text(12)), {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = replace(RECIPE, kl_weight=0.7, kl_top_k=4)
    own = train(model, tokenizer, rows, recipe, tmp_path / "own")
    model.load_state_dict(start, strict=False)
    trainer_teacher = DiffusionTrainer._teacher

    def told(self, batch, targets, reading):
        return trainer_teacher(self, batch, targets, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTrainer, "_teacher", told)
        beside = train(model, tokenizer, rows, recipe, tmp_path / "beside", parent=parent)
    assert own.kl.gt(0).all() and torch.allclose(torch.tensor(own.kl), torch.tensor(beside.kl), atol=1e-5)
    assert torch.allclose(torch.tensor(own.loss), torch.tensor(beside.loss), atol=1e-5)


def test_the_clean_half_is_read_in_the_one_forward_where_it_must_be(pair):
    parent, model, _ = pair
    ids, docs = text(rows=1)
    noisy = torch.full((1, 1, 16), MASK)
    assert read_clean(parent, Layout.build(ids, noisy, docs, 4, True, True)) is None  # all of its weights learn
    assert read_clean(model, Layout.build(ids, noisy, docs, 1, True, True)) is None  # no clean half beside noisy rows
    model.train().gradient_checkpointing_enable()
    assert read_clean(model, Layout.build(ids, noisy, docs, 4, True, True)) is None


@pytest.mark.parametrize("wrong, remedy", [({"causal_context": False}, "causal_context: true"), ({"context_weight": 1.0}, "context_weight and ar_share to 0"),
                                           ({"ar_share": 0.1}, "ar_share"), ({"schedule": BlockSchedule([(1, 2)], (4, 3))}, "block size 1 out")])
def test_a_recipe_that_wants_clean_rows_to_learn_is_refused(pair, tmp_path, wrong, remedy):
    _, model, tokenizer = pair
    with pytest.raises(HildaError, match=remedy):
        train(model, tokenizer, as_rows(*text(12)), replace(RECIPE, **wrong), tmp_path)


def test_a_model_without_adapters_cannot_be_gated():
    with pytest.raises(HildaError, match="only LoRA adapters can be kept to noisy rows"):
        gate(tiny()[0])


@pytest.mark.parametrize("when", [2, 4])
def test_an_interrupted_run_of_adapters_ends_where_an_undisturbed_one_does(pair, tmp_path, when):
    _, model, tokenizer = pair
    rows, recipe = as_rows(*text(24)), replace(RECIPE, schedule=BlockSchedule(decay=[(4, 6)]), kl_weight=0.5, save_every=2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = train(model, tokenizer, rows, recipe, tmp_path / "whole")
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(start, strict=False)

    def killed(self, *args, **kwargs):
        if self.state.global_step > when:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    training_step = DiffusionTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(model, tokenizer, rows, recipe, tmp_path / "cut")
    model.load_state_dict(start, strict=False)
    log = train(model, tokenizer, rows, recipe, tmp_path / "cut")
    assert all(torch.equal(p, end[name]) for name, p in model.named_parameters())
    assert log.loss.tolist() == whole.loss.tolist()


def one_forward(model, noisy, straight, **rows):
    """Of two rows of 8 random tokens, [MASK] among them; (logits but for [MASK], last layer's keys)."""
    forward, cache = Forward(model), BlockCache(8)
    forward.straight &= straight
    ids, positions = text(rows=2, length=8)[0], torch.arange(8).expand(2, -1)
    ids[:, ::3] = MASK
    with torch.inference_mode():
        out = forward(ids, positions, attention.window(positions, cache.at(positions).used, 4), cache, noisy=noisy, **rows)
        out[..., MASK] = 0
    return out, cache.keys[1]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, None])
def test_straight_lines_give_the_bits_of_clean_rows_and_the_numbers_of_noisy_ones(pair, share):
    parent, model, _ = pair
    noisy = None if share is None else torch.rand(2, 8, generator=torch.Generator().manual_seed(3)) < share
    if share == 0.5:
        noisy[:, 0] = False
        noisy[0, 1], noisy[1, 2] = True, False  # out of order, in both rows
    (ours, keys), (theirs, expected) = (one_forward(model, noisy, straight, wanted=None) for straight in (True, False))
    assert is_straight(model)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)
    if not share:
        table = model.get_input_embeddings().token_adapter
        with torch.no_grad():
            parent.get_input_embeddings().weight[MASK] = table.trainable_tokens_delta["default"][0]
        for mine, parents in zip((ours, keys), one_forward(parent, noisy, True, wanted=None)):
            assert torch.equal(mine, parents)
    real, wanted = torch.ones(2, 8, dtype=torch.bool), torch.tensor([1, 2, 7, 8, 9, 12])
    real[1, 5:] = False
    asked = torch.tensor([True, False, True, True, True, False])
    part, _ = one_forward(model, noisy, True, wanted=wanted, real=real, asked=asked)
    torch.testing.assert_close(part[:3][asked[:3]], ours[wanted[:3]][asked[:3]], atol=1e-5, rtol=1e-5)  # of the row without padding
    some, _ = one_forward(model, noisy, True, wanted=wanted)
    torch.testing.assert_close(some, ours[wanted], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [4, 64])
def test_weights_laid_out_for_the_cpu_give_the_same_numbers(pair, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(laid, "WORTH", 1)  # weights of this size would be left as they are
    model = gate(backbones.load(tmp_path / "parent", dtype="float32", device="cpu", lora=rank)[0])
    stir(model, 1)
    noisy = torch.rand(2, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    for rows in (noisy, None):
        for mine, pefts in zip(one_forward(model, rows, True, wanted=None), one_forward(model, rows, False, wanted=None)):
            torch.testing.assert_close(mine, pefts, atol=1e-4, rtol=1e-4)


def test_factors_of_high_rank_are_multiplied_once_and_again_when_they_change(pair, tmp_path):
    model = gate(backbones.load(tmp_path / "parent", dtype="float32", device="cpu", lora=64)[0])
    noisy = torch.rand(2, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    for seed in (1, 2):
        stir(model, seed)
        for mine, pefts in zip(one_forward(model, noisy, True, wanted=None), one_forward(model, noisy, False, wanted=None)):
            torch.testing.assert_close(mine, pefts, atol=1e-4, rtol=1e-4)

    def kept():
        return [part.changes[-1] for part in model.modules() if hasattr(part, "changes")]

    before = kept()
    one_forward(model, noisy, True, wanted=None)
    assert len(before) == 8 and all(a is b for a, b in zip(before, kept()))  # of two layers: q k v, o, gate and up, down


def test_adapters_that_start_as_a_difference_draft_as_its_donor_does(pair):
    parent, model, _ = pair
    donor = copy.deepcopy(parent)
    torch.manual_seed(4)
    with torch.no_grad():
        for module in donor.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight += 0.1 * torch.randn(len(module.weight), 4) @ torch.randn(4, module.weight.shape[1])  # as many ranks as the adapters have
        donor.get_input_embeddings().weight[MASK].normal_()
        draft_as(model, donor)
        ids = text(rows=2)[0]
        ids[:, 1::3] = MASK
        expected = donor(input_ids=ids).logits
        with noisy_rows(model, True):
            found = model(input_ids=ids).logits
    shown = torch.arange(found.shape[-1]) != MASK  # [MASK]'s own logit is never read
    torch.testing.assert_close(found[..., shown], expected[..., shown], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, parent(input_ids=ids).logits, atol=0.1)
    with pytest.raises(HildaError, match="gated.gate first"):
        draft_as(parent, donor)


def test_decoders_write_the_same_in_straight_lines_and_through_peft(pair, monkeypatch):
    _, model, _ = pair
    prompts, real = torch.tensor([[2, 2, 5, 6, 7], [9, 5, 6, 7, 8], [2, 2, 2, 2, 9]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    rules = [revise.RULES[name]() for name in ("edit", "wino", "t2m")]
    decoders = [lambda r=r: edit_decode(model, prompts, EditSettings(tau_mask=0.5, revise=r, max_post_steps=3, max_new_tokens=15), attention_mask=real) for r in rules]
    decoders += [lambda: self_speculate(model, prompts, attention_mask=real, max_new_tokens=15),
                 lambda: pipeline_decode(model, prompts, PipelineSettings(tau_mask=0.4, max_new_tokens=15), attention_mask=real),
                 lambda: edit_decode(model, prompts, EditSettings(block_size=1, tau_edit=2.0, max_new_tokens=9), attention_mask=real)]
    found = [decode() for decode in decoders]
    monkeypatch.setattr("hildalib.decoding.forward.is_straight", lambda model: False)
    for out, decode in zip(found, decoders):
        expected = decode()
        for name in ("ids", "forwards", "positions_fed"):
            assert torch.equal(getattr(out, name), getattr(expected, name))
        assert not (out.ids == MASK).any()


def test_what_a_context_is_worth_is_asked_of_the_parent_which_reads_it(pair):
    parent, model, _ = pair
    ids = text(rows=2, length=8)[0]
    with torch.no_grad():
        for mine, parents in zip(targets(model, ids), targets(parent, ids)):
            assert len(mine) == len(parents) == 2 and all(torch.equal(one, other) for one, other in zip(mine, parents))


def test_foreign_adapters_keep_their_own_forward(pair):
    _, model, _ = pair
    model.base_model.merge_adapter()
    assert not is_straight(model)
    model.base_model.unmerge_adapter()
    assert is_straight(model) and not is_straight(model.train())
