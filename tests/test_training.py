"""Training: what the loss is made of, where its gradient goes, and what an interrupted or finished run leaves.

Resuming to the same bytes, accumulation and block size 1 are proved in test_invariants.py.
"""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import FIRST, MASK, as_rows, text, tiny, weights
from transformers import Trainer

from hildalib import HildaError, attention, backbones, runs, training
from hildalib.adapters import with_lora
from hildalib.layout import Layout, target_logits, validate
from hildalib.recipe import NoisedRows, Recipe, arm, collate
from hildalib.training import DiffusionTrainer, train
from hildalib.wsd import BlockSchedule

IDS = {"mask_token_id": MASK, "forbidden_ids": range(5), "vocab_size": 19}
SHORT = Recipe(BlockSchedule(warmup=[(1, 1)], stable=(4, 3)), batch_size=4, lr=1e-2, warmup_steps=1, log_every=1, edit_rate=0.2, draft_share=0.5)


def trainer_of(model, recipe, folder, parent=None):
    rows = NoisedRows(as_rows(*text(6)), recipe, IDS)
    return DiffusionTrainer(model=model, args=training._arguments(recipe, folder, model.device), train_dataset=rows, data_collator=collate, recipe=recipe,
                            hilda=model.config.hilda, parent=parent)


def batch_of(recipe, rows=3, start=0, **noise):
    data = NoisedRows(as_rows(*text(6, **noise)), recipe, IDS)
    return collate([data[start + n] for n in range(rows)])


# ---- the loss -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [2, 4, 16])
def test_two_copies_over_one_clean_copy_cost_and_teach_what_two_rows_do(tmp_path, size, shift):
    recipe = Recipe(BlockSchedule(stable=(size, 1)), batch_size=3, copies=2, edit_rate=0.2, keep_weight=0.3, label_shift=shift, weighting="1/t")
    model, _ = tiny(shift=shift)
    trainer = trainer_of(model, recipe, tmp_path)
    shared = batch_of(recipe, documents=True)
    apart = {key: value.flatten(0, 1)[:, None] if value.ndim == 3 else value.repeat_interleave(2, 0) for key, value in shared.items() if torch.is_tensor(value)}
    results = []
    for batch in (shared, apart | {"block_size": size, "row": 0}):
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert torch.isclose(results[0][0], results[1][0], atol=1e-6) and torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_the_pull_to_the_parent_is_zero_at_the_parent_and_mixes_linearly(tmp_path):
    model, _ = tiny(sharpen=3.0)
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        recipe = Recipe(BlockSchedule(stable=(1, 1)), batch_size=3, kl_weight=weight, kl_top_k=99)  # more than the vocabulary: all of it
        losses[weight] = trainer_of(model, recipe, tmp_path, parent=copy.deepcopy(model)).compute_loss(model, batch_of(recipe)).item()
    assert abs(losses[1.0]) < 1e-5 < losses[0.0] and losses[0.25] == pytest.approx(0.75 * losses[0.0], abs=1e-5)


def test_the_parent_speaks_for_each_target_from_its_own_causal_context(tmp_path):
    """At block size 4 and full top-k the loss is the mean KL(parent || student) over the masks, computed apart."""
    recipe = Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, kl_weight=1.0, kl_top_k=99)
    (model, _), (parent, _) = tiny(0, sharpen=2.0), tiny(1, sharpen=2.0)
    batch = batch_of(recipe, documents=True)
    loss = trainer_of(model, recipe, tmp_path, parent).compute_loss(model, batch)
    where = batch["mask_targets"]
    student = target_logits(model, Layout.build(batch["input_ids"], batch["noisy_ids"], batch["doc_ids"], 4, True), where).log_softmax(-1)
    teacher = parent(input_ids=batch["input_ids"], attention_mask=attention.block_causal(16, 1, batch["doc_ids"])).logits[:, :-1]
    teacher = torch.cat([torch.zeros_like(teacher[:, :1]), teacher], 1)[where[:, 0]].clone()
    student, teacher = (x[:, [i for i in range(19) if i != MASK]].log_softmax(-1) for x in (student, teacher))
    assert torch.isclose(loss, F.kl_div(student, teacher, reduction="batchmean", log_target=True), atol=1e-5)


def test_without_shift_a_token_that_no_parent_row_predicts_keeps_its_hard_label(tmp_path):
    """The first token of a document: an unshifted dLLM predicts it, an AR parent does not."""
    model, _ = tiny(shift=False, sharpen=2.0)
    batch = batch_of(Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, label_shift=False), documents=True)
    first = torch.zeros_like(batch["mask_targets"])
    first[..., [0, 7]] = True
    batch["mask_targets"] = first
    batch["noisy_ids"] = batch["input_ids"][:, None].masked_fill(first, MASK)
    recipes = [Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, label_shift=False, kl_weight=weight) for weight in (0.0, 0.7)]
    hard, mixed = (trainer_of(model, recipe, tmp_path, tiny(1)[0]).compute_loss(model, batch) for recipe in recipes)
    assert torch.isclose(hard, mixed, atol=1e-6)


@pytest.mark.parametrize("options", [{"cap_weight": 0.5}, {"complementary": True, "weighting": "1/t", "full_share": 1.0}, {"kl_weight": 0.5, "kl_top_k": 99}])
def test_options_that_touch_barred_logits_or_empty_rates_stay_finite(tmp_path, options):
    recipe = Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, **options)
    model, _ = tiny()
    loss = trainer_of(model, recipe, tmp_path, parent=tiny(1)[0]).compute_loss(model, batch_of(recipe))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---- its gradient ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift, position, reached", [
    # layout for L 16, K 4: noisy rows 0..15, clean rows 16..31
    (False, 4, {*range(4, 8), *range(16, 20)}), (False, 1, {*range(0, 4)}), (True, 5, {*range(4, 8), *range(16, 20)}),
    (True, 4, {*range(16, 20)}),  # first of its block: predicted by the last clean row before it
    (False, 14, {*range(12, 16), *range(16, 28)})])
def test_gradient_of_a_target_reaches_its_own_noisy_block_and_the_clean_past_only(shift, position, reached):
    model, _ = tiny(shift=shift)
    ids, docs = text(1)
    where = (torch.arange(16) == position)[None, None]
    layout = Layout.build(ids, ids.masked_fill(torch.arange(16) % 4 != 3, MASK)[:, None], docs, 4, shift)
    embeds = model.get_input_embeddings()(layout.ids).detach().requires_grad_()
    F.cross_entropy(target_logits(model, layout, where, embeds), ids[0, position:position + 1]).backward()
    assert {*embeds.grad[0].abs().sum(-1).nonzero().flatten().tolist()} == reached


def test_neither_the_parent_nor_the_drafting_forward_gets_a_gradient(tmp_path):
    recipe = Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, draft_share=1.0, kl_weight=0.5, draft_turns=2)
    (model, _), (parent, _) = tiny(0), tiny(1)
    trainer, batch = trainer_of(model, recipe, tmp_path, parent), batch_of(recipe)
    assert batch["fill"].any()
    forwards = []
    model.register_forward_hook(lambda module, _, out: forwards.append(out.logits.requires_grad))
    trainer.compute_loss(model, batch).backward()
    assert forwards == [False, False, True] and all(p.grad is None for p in parent.parameters())


def test_a_draft_is_the_argmax_of_the_canvas_before_and_costs_rows_with_drafts_only(tmp_path):
    recipe = Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, draft_share=1.0)
    model, _ = tiny(sharpen=3.0)
    trainer, batch = trainer_of(model, recipe, tmp_path), batch_of(recipe)
    batch["fill"][1] = False
    seen = []
    model.register_forward_hook(lambda module, _, kwargs, out: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    drafted = trainer._draft(model, batch, training.noised_of(batch), None)
    layout = Layout.build(batch["input_ids"], batch["noisy_ids"], batch["doc_ids"], 4, True)
    expected = batch["noisy_ids"].clone()
    expected[batch["fill"]] = target_logits(model, layout, batch["fill"]).argmax(-1)
    assert seen[0] == 2 and torch.equal(drafted.noisy_ids, expected.flatten(0, 1))
    assert torch.equal(drafted.edit_targets, batch["fill"].flatten(0, 1))


def test_noise_on_mask_embeddings_fades_linearly_to_nothing_and_touches_masks_only():
    model, _ = tiny()
    recipe = Recipe(BlockSchedule(stable=(4, 1)), mask_noise=0.5, mask_noise_steps=10)
    ids, docs = text(64, 16)
    canvas = ids.masked_fill(torch.arange(16) % 2 == 0, MASK)
    layout = Layout.build(ids, canvas[:, None], docs, 4, True)
    plain, masks = model.get_input_embeddings()(layout.ids), layout.ids == MASK
    for step in (0, 5, 9):
        stub = SimpleNamespace(state=SimpleNamespace(global_step=step), recipe=recipe, hilda=model.config.hilda,
                               accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped))
        change = (DiffusionTrainer._noisy_embeddings(stub, model, layout, 0) - plain).detach()
        assert (change[~masks] == 0).all()
        assert change[masks].std().item() == pytest.approx(0.5 * (1 - step / 10), rel=4 / (2 * change[masks].numel()) ** 0.5)
    stub.state.global_step = 10
    assert DiffusionTrainer._noisy_embeddings(stub, model, layout, 0) is None


@pytest.mark.parametrize("options", [{}, {"schedule": BlockSchedule(stable=(16, 3)), "copies": 2}])
def test_noise_on_masks_is_the_same_in_one_batch_and_in_accumulated_parts(tmp_path, options):
    recipes = [SHORT.__class__(**{**SHORT.__dict__, "mask_noise": 1.0, "mask_noise_steps": 9, "batch_size": 4 // n, "accumulate": n} | options) for n in (1, 2)]
    whole, parts = (weights(run(tmp_path / str(n), recipe)[0]) for n, recipe in enumerate(recipes))
    assert torch.allclose(whole, parts, atol=2e-5) and not torch.allclose(whole, weights(run(tmp_path / "plain")[0]), atol=1e-3)


@pytest.mark.parametrize("complementary", [True, False])
def test_the_ar_term_of_a_causal_context_is_the_next_token_loss_of_the_targets(tmp_path, complementary):
    """Computed apart in a plain causal forward; nothing where the clean half is dropped (block size L, or 1)."""
    model, _ = tiny(sharpen=2.0)
    for size in (1, 4, 16):
        plain, with_term = (Recipe(BlockSchedule(stable=(size, 1)), batch_size=3, complementary=complementary, causal_context=True, context_weight=weight)
                            for weight in (0.0, 0.6))
        batch = batch_of(plain, documents=True)
        without, loss = (trainer_of(model, recipe, tmp_path).compute_loss(model, batch) for recipe in (plain, with_term))
        logits = model(input_ids=batch["input_ids"], attention_mask=attention.block_causal(16, 1, batch["doc_ids"])).logits[:, :-1].clone()
        logits[..., MASK] = -torch.inf
        where = (batch["doc_ids"][:, 1:] == batch["doc_ids"][:, :-1]) & batch["maskable"][:, 0, 1:]
        expected = F.cross_entropy(logits[where], batch["input_ids"][:, 1:][where]) if size == 4 else 0.0
        assert torch.isclose(loss - without, torch.as_tensor(0.6 * expected), atol=1e-5)


def test_validation_loss_is_the_cross_entropy_of_the_seeded_masks():
    model, _ = tiny(sharpen=2.0)
    rows = as_rows(*text(5, documents=True))
    found = validate(model, rows, block_size=4, label_shift=True, rates=(1.0,), batch_size=2)
    where = torch.ones(5, 1, 16, dtype=torch.bool)
    where[..., [0, 7]] = False  # first tokens of documents
    layout = Layout.build(rows["input_ids"], rows["input_ids"][:, None].masked_fill(where, MASK), rows["doc_ids"], 4, True)
    with torch.no_grad():
        logits = target_logits(model, layout, where)
    assert found[1.0] == pytest.approx(F.cross_entropy(logits, rows["input_ids"][where[:, 0]]).item(), abs=1e-5)


# ---- runs -----------------------------------------------------------------------------------------------------------------------

def run(folder, recipe=SHORT, seed=0, **options):
    model, tokenizer = tiny(seed, block_size=None)
    log = train(model, tokenizer, as_rows(*text(12)), recipe, folder, **options)
    return model, log


def test_a_run_leaves_its_model_its_log_and_no_checkpoints(tmp_path):
    model, log = run(tmp_path / "run", SHORT.__class__(**{**SHORT.__dict__, "save_every": 2, "stage": "sft"}))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["fingerprint.txt", "log.csv", "model"]
    loaded, _ = backbones.load(tmp_path / "run" / "model", dtype="float32", device="cpu")
    assert torch.equal(weights(loaded), weights(model)) and not model.training
    assert {key: loaded.config.hilda[key] for key in ("block_size", "label_shift", "stage")} == {"block_size": 4, "label_shift": True, "stage": "sft"}
    assert log.step.tolist() == [1, 2, 3, 4] and log.block_size.tolist() == [1, 4, 4, 4] and log.stage.tolist() == ["warmup"] + ["stable"] * 3
    assert log.m2t.notna().all() and log.t2t.iloc[1:].notna().any() and not any(name == "kl" for name in log)


def test_a_finished_run_is_loaded_and_not_trained_again(tmp_path, monkeypatch):
    first, log = run(tmp_path)
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    again, stored = run(tmp_path)
    assert torch.equal(weights(first), weights(again)) and again.config.hilda == first.config.hilda
    pd.testing.assert_frame_equal(log.reset_index(drop=True), stored, check_dtype=False)


def test_adapters_train_and_a_finished_run_that_was_merged_is_taken_over_under_them(tmp_path):
    backbones.save(*tiny(block_size=None), tmp_path / "parent")
    logits, ids = [], text(2)[0]
    for _ in range(2):
        torch.manual_seed(0)  # peft draws the adapter from the global stream
        model, tokenizer = backbones.load(tmp_path / "parent", dtype="float32", device="cpu", lora=4)
        train(model, tokenizer, as_rows(*text(12)), SHORT, tmp_path / "run")
        assert model.config.hilda["block_size"] == 4
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    with torch.no_grad():
        loaded = backbones.load(tmp_path / "run" / "model", dtype="float32", device="cpu")[0](input_ids=ids).logits
    for one in logits:
        assert torch.allclose(loaded[..., FIRST:], one[..., FIRST:], atol=1e-4)  # [MASK] is never read
    assert all(not tensor.any() for name, tensor in model.named_parameters() if "lora_B" in name)  # counted once: in the weights
    plain = tiny(block_size=None)[0]
    with pytest.raises(HildaError, match="holds tensors that this model has not"):
        runs.load_finished(plain, foreign_folder(tmp_path))


def foreign_folder(folder):
    """A finished model with one tensor too many."""
    model = tiny(block_size=4)[0]
    state = {**model.state_dict(), "model.stranger.weight": torch.zeros(2)}
    (folder / "foreign").mkdir()
    save_file({name: value.clone() for name, value in state.items() if name != "lm_head.weight"}, folder / "foreign" / "model.safetensors")
    return folder / "foreign"


@pytest.mark.parametrize("change", [{"lr": 5e-3}, {"seed": 1}])
def test_nothing_of_another_recipe_is_taken_over(tmp_path, change):
    run(tmp_path / "mixed")
    (tmp_path / "mixed" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    recipe = SHORT.__class__(**{**SHORT.__dict__, **change})
    mixed, fresh = run(tmp_path / "mixed", recipe)[0], run(tmp_path / "fresh", recipe)[0]
    assert torch.equal(weights(mixed), weights(fresh)) and not (tmp_path / "mixed" / "checkpoints").exists()


def test_nothing_of_other_rows_or_other_weights_is_taken_over(tmp_path):
    other, _ = run(tmp_path, seed=1)
    same, _ = run(tmp_path, seed=0)
    assert not torch.equal(weights(other), weights(same))


def test_half_written_and_damaged_checkpoints_are_removed_and_the_newest_whole_one_is_taken(tmp_path):
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save({"step": step}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global', encoding="utf-8")
    optimizer = tmp_path / "checkpoint-10" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-40])
    assert runs.resumable(tmp_path) == str(tmp_path / "checkpoint-4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert runs.resumable(tmp_path / "nothing") is None


def test_a_run_whose_only_checkpoint_is_half_written_gives_the_bytes_of_a_fresh_one(tmp_path):
    model, _ = tiny(block_size=None)
    folder = tmp_path / "cut"
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (folder / "fingerprint.txt").write_text(runs.fingerprint(model, as_rows(*text(12)), SHORT), encoding="utf-8")
    assert torch.equal(weights(run(folder)[0]), weights(run(tmp_path / "fresh")[0]))


def test_merge_takes_the_mean_of_the_best_checkpoints_at_the_working_size(tmp_path):
    recipe = Recipe(BlockSchedule(warmup=[(1, 2)], stable=(4, 6)), merge_top_k=2, save_every=2)
    validation = as_rows(*text(6, seed=5))
    models = {2: tiny(0)[0], 4: tiny(1)[0], 6: tiny(2, sharpen=6.0)[0], 8: tiny(3)[0]}
    with torch.no_grad():  # step 2 was saved at block size 1: however good, it is not a candidate
        models[2] = tiny(9)[0]
        models[6].model.norm.weight *= 10  # sure and wrong: the worst
    scores = {step: sum(validate(m, validation, block_size=4, label_shift=True).values()) for step, m in models.items() if step > 2}
    assert max(scores, key=scores.get) == 6
    for step, member in models.items():
        member.save_pretrained(tmp_path / f"checkpoint-{step}")
    merged, _ = tiny(7)
    training._merge_best(merged, recipe, tmp_path, validation)
    assert torch.allclose(weights(merged), (weights(models[4]) + weights(models[8])) / 2, atol=1e-7)


def test_a_merged_run_is_stored_and_differs_from_its_last_weights(tmp_path):
    recipe = SHORT.__class__(**{**SHORT.__dict__, "save_every": 1, "merge_top_k": 2})
    merged, _ = run(tmp_path / "merged", recipe, validation=as_rows(*text(4, seed=5)))
    stored, _ = backbones.load(tmp_path / "merged" / "model", dtype="float32", device="cpu")
    assert torch.equal(weights(stored), weights(merged)) and not torch.equal(weights(merged), weights(run(tmp_path / "last")[0]))


def test_adapters_have_no_checkpoints_to_merge(tmp_path):
    model, tokenizer = tiny(shift=True, causal=True)
    rows = as_rows(*text(12))
    with pytest.raises(HildaError, match="here adapters are trained; set merge_top_k to 0"):
        train(with_lora(model, 2), tokenizer, rows, replace(SHORT, merge_top_k=2, save_every=1, adapter_rank=2, adapter_lr=0.01), tmp_path, validation=rows)


def test_bfloat16_is_refused_on_a_card_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "bf16_fault", lambda device: "this card (sm_61) has no bfloat16")
    model, tokenizer = tiny(shift=True, causal=True)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(HildaError, match="sm_61.*precision=float32, or add .pascal"):
        train(model, tokenizer, as_rows(*text(12)), replace(SHORT, precision="bfloat16"), tmp_path)


@pytest.mark.parametrize("change, message", [({"kl_weight": 0.5}, "kl_weight > 0 needs the frozen AR parent"), ({"merge_top_k": 2}, "merge_top_k > 0 needs"),
                                             ({"schedule": BlockSchedule(stable=(3, 2))}, "block size 3 does not divide length 16")])
def test_an_impossible_run_is_refused_and_leaves_no_model(tmp_path, change, message):
    with pytest.raises(HildaError, match=message):
        run(tmp_path / "run", SHORT.__class__(**{**SHORT.__dict__, **change}))
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "log.csv").exists()


def test_training_lowers_the_loss_of_the_twin_and_of_the_dllm_alike(tmp_path):
    """Rows that are one repeated line can be learned; the loss falls below the ln 14 of a guess."""
    ids = torch.tensor([5, 6, 7, 8]).repeat(4).expand(8, -1).contiguous()
    recipe = Recipe(BlockSchedule(stable=(4, 40)), batch_size=8, lr=1e-2, warmup_steps=5, log_every=10, full_share=0.0, high=0.8)
    for name in ("dLLM", "AR twin"):
        model, tokenizer = tiny(block_size=None)
        log = train(model, tokenizer, as_rows(ids), arm(recipe, name), tmp_path / name)
        assert log.m2t.iloc[-1] < 0.5 < 2.0 < log.m2t.iloc[0]


def test_a_slow_run_shows_its_steps_between_logs_and_a_log_is_never_swallowed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.ProgressLines, "PATIENCE", 0.0)
    monkeypatch.setattr(training.ProgressLines, "SECONDS", 0.0)
    model, tokenizer = tiny()
    train(model, tokenizer, as_rows(*text(6)), replace(SHORT, log_every=2), tmp_path, title="slow")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("slow")]
    assert [line.split()[2] for line in lines] == ["1/4", "2/4", "3/4", "4/4"] and all("ETA" in line for line in lines)
    assert ["m2t" in line for line in lines] == [True, True, False, True]  # step 1 is always logged, then every second


def test_an_option_that_is_not_used_throws_no_finished_run_away():
    """A choice at its default leaves the fingerprint alone; any other changes it."""
    model, rows = tiny(block_size=None)[0], as_rows(*text(4))
    before = runs.fingerprint(model, rows, SHORT)
    assert before == runs.fingerprint(model, rows, replace(SHORT, merge_top_k=Recipe.merge_top_k)) != runs.fingerprint(model, rows, replace(SHORT, merge_top_k=2))
