"""Large vocabularies and small cards: logits in chunks, layers run twice, 8-bit states and 4-bit weights give what the plain step gives."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_training import IDS
from tiny import as_rows, text, tiny, weights

from hildalib import backbones, tables, training
from hildalib.gated import checkpointing, gate
from hildalib.layout import Layout, target_scores, validate
from hildalib.recipe import NoisedRows, Recipe, collate
from hildalib.training import DiffusionTrainer, train
from hildalib.wsd import BlockSchedule

FULL = Recipe(BlockSchedule(stable=(4, 3)), batch_size=4, lr=1e-2, warmup_steps=0, log_every=1, edit_rate=0.2, keep_weight=0.2, draft_share=0.5,
              kl_weight=0.5, kl_top_k=5, cap_weight=0.3, causal_context=True, context_weight=0.5)


def gradients(model, recipe, folder, parent=None, lean=True):
    """Loss and gradients of the first micro-batch of a run; lean: summed where they lie, as in training in one process."""
    model.zero_grad()
    rows = NoisedRows(as_rows(*text(6, documents=True)), recipe, IDS)
    trainer = DiffusionTrainer(model=model, args=training._arguments(recipe, folder, model.device), train_dataset=rows, data_collator=collate, recipe=recipe,
                               hilda=model.config.hilda, parent=parent)
    with training.lean(model, recipe) if lean else contextlib.nullcontext():
        loss = trainer.compute_loss(model.train(), collate([rows[n] for n in range(4)]))
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert torch.isclose(found[0], expected[0], atol=1e-5) and found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("change", [{"head_rows": 1}, {"head_rows": 7}, {"head_rows": 10_000}, {"gradient_checkpointing": True, "head_rows": 7}])
def test_chunks_and_checkpoints_change_neither_loss_nor_gradient(tmp_path, change, lean):
    (model, _), (parent, _) = tiny(0, sharpen=2.0), tiny(1, sharpen=2.0)
    expected = gradients(model, FULL, tmp_path, parent)
    if "gradient_checkpointing" in change:
        model.gradient_checkpointing_enable(checkpointing(model))
    same(gradients(model, replace(FULL, **change), tmp_path, parent, lean), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_summed_where_they_lie_are_those_of_autograd(tied):
    """Two micro-batches, with a padding row that does not learn from its embedding; afterwards the model is as it was."""
    model, _ = tiny(sharpen=2.0)
    if not tied:
        model.config.tie_word_embeddings, model.lm_head.weight = False, torch.nn.Parameter(model.lm_head.weight.detach().clone())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (table.weight is head.weight) == tied and table.padding_idx == 0
    found = []
    for within in (contextlib.nullcontext(), tables.in_place(model)):
        model.zero_grad()
        with within:
            for seed in range(2):
                ids, docs = text(seed=seed)
                ids[0, :3] = 0
                targets = torch.ones(2, 1, 16, dtype=torch.bool)
                layout = Layout.build(ids, ids[:, None], docs, 4, True)
                target_scores(model, layout, targets, lambda logits, rows: logits[:, 5:].logsumexp(-1), 5).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], msg=name)
    assert "forward" not in table.__dict__ and not hasattr(head, "product")


def test_no_more_rows_of_logits_live_at_once_than_asked_for(tmp_path):
    model, _ = tiny()
    head, whole = model.get_output_embeddings(), F.linear
    recipe = replace(FULL, kl_weight=0.0, cap_weight=0.0, draft_share=0.0, head_rows=6)
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda x, w, *b: (rows.append(x.shape[-2]) if w.data_ptr() == head.weight.data_ptr() else None) or whole(x, w, *b))
        gradients(model, recipe, tmp_path)
    assert max(rows) == 6 and len(rows) > 8 and "forward" not in head.__dict__


def test_no_target_at_all_is_no_error():
    model, _ = tiny()
    ids, docs = text()
    layout = Layout.build(ids, ids[:, None], docs, 4, True)
    none = torch.zeros(2, 1, 16, dtype=torch.bool)
    out = target_scores(model, layout, none, lambda logits, rows: logits.logsumexp(-1), 4)
    out.sum().backward()
    assert out.shape == (0,)


def test_validation_in_chunks_is_validation():
    model, _ = tiny(sharpen=2.0)
    rows = as_rows(*text(5, documents=True))
    plain, chunked = (validate(model, rows, block_size=4, head_rows=n) for n in (0, 3))
    assert plain == pytest.approx(chunked, abs=1e-5)


@pytest.fixture
def parent(tmp_path):
    backbones.save(*tiny(block_size=4, causal=True, sharpen=4.0), tmp_path / "parent")
    return lambda **options: backbones.load(tmp_path / "parent", dtype="float32", device="cpu", **options)


def with_random_adapter(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


ADAPTED = replace(FULL, context_weight=0.0, cap_weight=0.0, adapter_rank=4, adapter_lr=1e-2)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("change", [{"head_rows": 7}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "head_rows": 7}])
def test_adapters_learn_the_same_when_layers_run_twice_and_logits_come_in_chunks(tmp_path, parent, change, gated):
    """Gated: in the backward a layer must act on the rows on which it acted in the forward."""
    results = []
    for recipe in (ADAPTED, replace(ADAPTED, **change)):
        torch.manual_seed(0)
        model = with_random_adapter(parent(lora=4)[0])
        model = gate(model) if gated else model
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(checkpointing(model))
        results.append(gradients(model, recipe, tmp_path / "x"))
    same(results[1], results[0])
    assert any(value.abs().max() > 1e-4 for name, value in results[0][1].items() if "lora_A" in name)


def test_the_base_under_an_adapter_is_its_teacher(tmp_path, parent):
    """KL to the parent beside the model and to the parent under its adapter are one loss."""
    torch.manual_seed(0)
    model = with_random_adapter(parent(lora=4)[0])
    same(gradients(model, ADAPTED, tmp_path), gradients(model, ADAPTED, tmp_path, parent()[0]))


def test_a_quantised_parent_learns_through_adapters_and_goes_on_from_its_folder(tmp_path, parent):
    """NF4 with LoRA: the loss falls, the 4-bit weights stay, what is saved is loaded as what was trained, and the finished run is taken over."""
    torch.manual_seed(0)
    model, tokenizer = parent(quantize="nf4", lora=8)
    recipe = replace(ADAPTED, schedule=BlockSchedule(stable=(4, 12)), kl_weight=0.0, adapter_rank=0, lr=2e-2, head_rows=9, gradient_checkpointing=True)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    ids = torch.tensor([5, 6, 7, 8]).repeat(4).expand(8, -1).contiguous()
    log = train(model, tokenizer, as_rows(ids), recipe, tmp_path / "run")
    assert log.m2t.iloc[-1] < 0.8 * log.m2t.iloc[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    again, _ = backbones.load(tmp_path / "run" / "model", dtype="float32", device="cpu")
    torch.manual_seed(0)
    fresh, _ = parent(quantize="nf4", lora=8)
    before = again(input_ids=ids[:1]).logits.sub(fresh(input_ids=ids[:1]).logits).abs().max()
    assert train(fresh, tokenizer, as_rows(ids), recipe, tmp_path / "run").m2t.tolist() == pytest.approx(log.m2t.tolist())
    with torch.no_grad():
        trained = model(input_ids=ids[:1]).logits
        assert before > 1 and all(torch.allclose(found(input_ids=ids[:1]).logits, trained, atol=1e-4) for found in (again, fresh))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_states_learn_what_32_bit_states_learn_also_in_embeddings(tmp_path, optimizer):
    """One step is the sign of the gradient, so it agrees closely; the Trainer's exemption of embeddings is lifted."""
    from bitsandbytes.optim import GlobalOptimManager

    found = {}
    for name in (optimizer, "adamw_torch"):
        model, tokenizer = tiny(vocabulary="".join(map(chr, range(48, 48 + 150))), block_size=None)  # 155 x 32: large enough for 8 bits
        recipe = Recipe(BlockSchedule(stable=(4, 6)), batch_size=4, lr=1e-2, warmup_steps=0, log_every=1, optimizer=name)
        train(model, tokenizer, as_rows(*text(12)), recipe, tmp_path / name)
        found[name] = weights(model)
    start = weights(tiny(vocabulary="".join(map(chr, range(48, 48 + 150))), block_size=None)[0])
    moved, apart = (found["adamw_torch"] - start).norm(), (found[optimizer] - found["adamw_torch"]).norm()
    assert apart < 0.1 * moved and not GlobalOptimManager.get_instance().module_weight_config_triple
