"""A training run as data: what every row of a run shows, and what each arm of a comparison keeps and changes."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny import MASK, as_rows, text

from hildalib import HildaError
from hildalib.objective import predictable
from hildalib.recipe import ARMS, NoisedRows, Recipe, arm, collate, every_weight, noised_of
from hildalib.wsd import BlockSchedule

IDS = {"mask_token_id": MASK, "forbidden_ids": range(5), "vocab_size": 19}
LADDER = BlockSchedule(warmup=[(1, 2)], stable=(16, 2), decay=[(4, 4)])


def noisy(recipe, rows=6, documents=True):
    return NoisedRows(as_rows(*text(rows, 16, documents=documents)), recipe, IDS)


def test_every_epoch_shows_every_text_once_in_its_own_order():
    data = noisy(Recipe(LADDER, batch_size=3))
    assert len(data) == 24 and len(data.order) == 24
    epochs = [data.order[start:start + 6].tolist() for start in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len({*map(tuple, epochs)}) > 1
    assert all(torch.equal(data[n]["input_ids"], data.rows["input_ids"][data.order[n]]) for n in range(24))
    assert noisy(Recipe(LADDER, batch_size=3, seed=1)).order.tolist() != data.order.tolist()


def test_a_row_is_the_same_whether_its_step_is_one_batch_or_several():
    forms = [noisy(Recipe(LADDER, batch_size=4, ar_share=0.5, edit_rate=0.2, draft_share=0.5)),
             noisy(Recipe(LADDER, batch_size=2, accumulate=2, ar_share=0.5, edit_rate=0.2, draft_share=0.5))]
    for n in range(len(forms[0])):
        first, *others = (form[n] for form in forms)
        assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(other[key])) for other in others for key in first)


@pytest.mark.parametrize("batch_size, accumulate, processes, share", [(8, 1, 1, (8, 1)), (8, 1, 2, (4, 1)), (4, 4, 2, (4, 2)), (4, 4, 8, (2, 1)),
                                                                      (6, 4, 6, (2, 2))])
def test_processes_share_micro_batches_first_and_then_their_rows(batch_size, accumulate, processes, share):
    assert Recipe(LADDER, batch_size=batch_size, accumulate=accumulate).share(processes) == share
    assert share[0] * share[1] * processes == batch_size * accumulate


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(HildaError, match="3 processes cannot share a step of 2 micro-batches of 4 rows"):
        Recipe(LADDER, batch_size=4, accumulate=2).share(3)


def test_block_size_and_targets_follow_the_step_of_the_row():
    data = noisy(Recipe(LADDER, batch_size=2))
    assert [data[n]["block_size"] for n in range(0, 16, 2)] == [1, 1, 16, 16, 4, 4, 4, 4]
    first, docs = data[0], data.rows["doc_ids"][data.order[0]][None]
    wanted = predictable(torch.ones(1, 16, dtype=torch.bool), docs, True)
    assert torch.equal(first["mask_targets"], wanted) and (first["t"] == 1).all()  # size 1: next-token prediction of everything
    blocks = data[8]["t"].view(4, 4)
    assert (blocks == blocks[:, :1]).all()


def test_ar_share_is_the_share_of_later_steps_at_size_1():
    steps = 2000
    data = noisy(Recipe(BlockSchedule(stable=(4, steps)), batch_size=1, ar_share=0.3))
    at_one = [data.block_size(step) == 1 for step in range(steps)]
    assert not at_one[0] and abs(sum(at_one) / steps - 0.3) < 4 * (0.21 / steps) ** 0.5


def test_a_complementary_row_covers_every_maskable_token_exactly_once():
    data = noisy(Recipe(LADDER, batch_size=2, complementary=True, edit_rate=0.3))
    for n in range(len(data)):
        item = data[n]
        assert item["noisy_ids"].shape == (2, 16) and torch.equal(item["mask_targets"].sum(0), item["maskable"][0].long())
    assert Recipe(LADDER, complementary=True).copies_used == 2


def test_copies_have_noise_of_their_own():
    item = noisy(Recipe(BlockSchedule(stable=(4, 1)), batch_size=1, copies=3))[0]
    assert item["noisy_ids"].shape == (3, 16) and len({tuple(row.tolist()) for row in item["noisy_ids"]}) == 3


def test_drafts_fill_masks_only_in_the_share_of_rows_asked_for():
    data = noisy(Recipe(BlockSchedule(stable=(16, 1000)), batch_size=1, draft_share=0.25, low=0.9), documents=False)
    items = [data[n] for n in range(1000)]
    assert not any((item["fill"] & ~item["mask_targets"]).any() for item in items)
    share = sum(bool(item["fill"].any()) for item in items) / 1000  # a drafted row fills a uniform share, hence now and then nothing
    assert 0.25 * 0.85 - 4 * 0.014 < share < 0.25 + 4 * 0.014


def test_prompts_and_padding_are_never_targets():
    ids, docs = text(4, 16)
    docs[:, 12:] = -1
    maskable = torch.arange(16).expand(4, -1) >= 5
    data = NoisedRows(as_rows(ids, docs, maskable), Recipe(LADDER, batch_size=2, edit_rate=0.5, label_shift=False, complementary=True), IDS)
    for n in range(len(data)):
        targets = data[n]["mask_targets"] | data[n]["edit_targets"]
        assert not targets[:, :5].any() and not targets[:, 12:].any()


def test_a_batch_keeps_copies_apart_and_its_noise_lays_them_in_one_row_each():
    data = noisy(Recipe(BlockSchedule(stable=(4, 1)), batch_size=3, copies=2))
    batch = collate([data[n] for n in range(3)])
    assert batch["noisy_ids"].shape == (3, 2, 16) and batch["input_ids"].shape == (3, 16) and (batch["block_size"], batch["row"]) == (4, 0)
    flat = noised_of(batch)
    assert torch.equal(flat.noisy_ids[3], data[1]["noisy_ids"][1]) and flat.mask_targets.shape == (6, 16)


def test_a_share_of_blocks_hides_its_suffix_in_both_copies_and_size_1_stays_the_ar_objective():
    every, none = (noisy(Recipe(LADDER, batch_size=2, complementary=True, suffix_share=share), documents=False) for share in (1.0, 0.0))
    hidden = every[8]["mask_targets"].view(2, 4, 4)
    assert torch.equal(hidden, hidden.cummax(-1).values) and not torch.equal(hidden[0], ~hidden[1])
    assert torch.equal(every[0]["mask_targets"], none[0]["mask_targets"])  # block size 1
    shown = none[8]["mask_targets"].view(2, 4, 4)[:, 1:]
    assert torch.equal(shown[0], ~shown[1]) and not torch.equal(shown, shown.cummax(-1).values)
    with pytest.raises(HildaError, match="suffix_share = 0.5 with weighting 1/t"):
        Recipe(LADDER, suffix_share=0.5, weighting="1/t")


def test_a_schedule_that_does_not_fit_the_rows_is_refused():
    with pytest.raises(HildaError, match="block size 6 does not divide length 16"):
        noisy(Recipe(BlockSchedule(stable=(6, 2))))


# ---- arms -----------------------------------------------------------------------------------------------------------------------

FULL = Recipe(LADDER, batch_size=2, accumulate=2, edit_rate=0.2, draft_share=0.5, keep_weight=0.1, kl_weight=0.4, ar_share=0.2, cap_weight=0.1,
              mask_noise=0.1, mask_noise_steps=3, complementary=True, seed=7, stage="wsd")


def changed(name):
    before, after = asdict(FULL), asdict(arm(FULL, name))
    return {key: after[key] for key in before if before[key] != after[key]}


@pytest.mark.parametrize("name, expected", [
    ("dLLM", {}), ("no T2T", {"edit_rate": 0.0, "draft_share": 0.0, "keep_weight": 0.0}), ("random T2T", {"draft_share": 0.0}),
    ("hard labels", {"kl_weight": 0.0}), ("parent KL", {}), ("unshifted", {"label_shift": False}), ("no size-1 rows", {"ar_share": 0.0}), ("size-1 rows", {}),
    ("direct", {"schedule": asdict(BlockSchedule(stable=(4, 8)))}), ("complementary", {}), ("no keep", {"keep_weight": 0.0}),
    ("residual", {"residual_share": 1.0}), ("no residual", {}),
    ("suffix masks", {"suffix_share": 0.5}), ("full sequence", {"schedule": asdict(BlockSchedule(stable=(16, 8)))}), ("checkpoint merge", {"merge_top_k": 3, "save_every": 1}),
    ("causal context", {"causal_context": True, "context_weight": 1.0}), ("block-causal context", {}), ("no AR term", {}),
    ("no mask noise", {"mask_noise_steps": 0}), ("stable stage", {"schedule": asdict(LADDER.with_stable_stage())})])
def test_an_arm_changes_one_idea_and_nothing_else(name, expected):
    assert changed(name) == expected


def test_arms_of_a_recipe_with_a_causal_context():
    causal = replace(FULL, causal_context=True, context_weight=0.7)
    assert arm(causal, "causal context") == causal and arm(causal, "no AR term") == replace(causal, context_weight=0.0)
    assert arm(replace(causal, residual_share=0.5), "AR twin") == arm(FULL, "AR twin") and arm(replace(FULL, residual_share=0.5), "no residual") == FULL
    assert arm(causal, "block-causal context") == FULL and arm(causal, "AR twin") == arm(FULL, "AR twin")


def test_next_tokens_are_not_trained_where_the_block_gives_them_away():
    with pytest.raises(HildaError, match="context_weight = 0.5 trains next-token prediction where later tokens of the block are in sight; set causal_context"):
        Recipe(LADDER, context_weight=0.5)


def test_every_arm_has_as_many_steps_and_rows_a_step():
    for name in ARMS:
        other = arm(FULL, name)
        assert (other.schedule.total_steps, other.global_batch, other.lr, other.seed, other.optimizer) == (8, 4, FULL.lr, 7, FULL.optimizer)


def test_a_plain_conversion_is_masks_at_uniform_rates_and_nothing_else():
    ours = replace(FULL, causal_context=True, context_weight=1.0, low=0.2, high=0.8, suffix_share=0.5, mask_noise_steps=3, merge_top_k=2, save_every=2)
    kept = {name: getattr(ours, name) for name in ("batch_size", "accumulate", "lr", "seed", "optimizer", "warmup_steps", "save_every", "log_every", "weight_decay")}
    for recipe in (ours, arm(ours, "gated adapters")):
        plain = arm(recipe, "plain conversion")
        assert plain == Recipe(BlockSchedule(stable=(4, 8)), label_shift=False, full_share=0.0, edit_weight=plain.edit_weight, kl_top_k=plain.kl_top_k,
                               draft_turns=plain.draft_turns, adapter_lr=plain.adapter_lr, mask_noise=plain.mask_noise, **kept), recipe


def test_the_arms_that_train_every_weight():
    names = {*ARMS, "plain conversion at equal compute", "hard labels at equal compute"}
    assert {name for name in names if every_weight(name)} == {"AR twin", "all weights", "CARD", "plain conversion", "plain conversion at equal compute"}


def test_the_ar_twin_sees_the_same_texts_in_the_same_order_as_next_token_prediction():
    ours, twin = noisy(FULL), noisy(arm(FULL, "AR twin"))
    assert len(ours) == len(twin) and all(torch.equal(ours[n]["input_ids"], twin[n]["input_ids"]) for n in range(len(ours)))
    for n in range(len(twin)):
        item = twin[n]
        assert item["block_size"] == 1 and torch.equal(item["mask_targets"], item["maskable"]) and not item["edit_targets"].any() and not item["fill"].any()
    assert arm(FULL, "AR twin").stage == "wsd twin"


def test_the_cost_of_a_row_by_hand():
    plain = Recipe(BlockSchedule(decay=[(4, 10)]))
    assert plain.cost() == 3 * 2  # noisy and clean half, forward and backward
    assert replace(plain, copies=3).cost() == 3 * 4 and replace(plain, complementary=True).cost() == 3 * 3
    assert replace(plain, residual_share=0.5).cost() == 6 + 0.5 * 2  # the reference reads both halves of half the rows
    assert replace(plain, kl_weight=0.5).cost() == 6 + 1 and replace(plain, draft_share=0.5, draft_turns=2).cost() == 6 + 0.5 * 2 * 2


def test_the_cost_follows_the_rungs():
    """Block size 1 is a plain next-token step; at full length nothing clean stands beside the noisy row."""
    ladder = Recipe(BlockSchedule([(1, 10)], (16, 10), [(4, 20)]), draft_share=1.0)
    assert ladder.cost(16) == (10 * 1 + 10 * 1 + 20 * 2) / 40 * (3 + 1)
    assert ladder.cost() == (10 * 1 + 30 * 2) / 40 * (3 + 1)
    assert replace(ladder, ar_share=0.25).cost(16) == (10 * 1 + 10 * 1 + 20 * (0.25 * 1 + 0.75 * 2)) / 40 * (3 + 1)
    assert replace(ladder, label_shift=False).cost(16) == (10 * 2 + 10 * 1 + 20 * 2) / 40 * (3 + 1)  # unshifted, size 1 is no AR step


def test_equal_compute_gives_a_cheaper_arm_more_steps():
    recipe = replace(FULL, complementary=False, draft_share=0.0, ar_share=0.0, schedule=BlockSchedule([(2, 6)], (16, 0), [(4, 60)]))  # 7 forwards a row
    longer = arm(recipe, "hard labels at equal compute")  # 6
    assert longer.schedule.rungs() == [(2, 7), (16, 0), (4, 70)] and longer.kl_weight == 0
    assert longer.schedule.total_steps * longer.cost() == recipe.schedule.total_steps * recipe.cost()
    full = arm(recipe, "full sequence at equal compute", 16)  # 4
    assert full.schedule.rungs() == [(16, round(66 * 7 / 4))]


def test_an_unknown_arm_is_an_error_that_lists_them():
    with pytest.raises(HildaError, match="arm 'dLM' is unknown; use one of dLLM, no T2T"):
        arm(FULL, "dLM")


def test_adapters_learn_from_noisy_rows_at_their_own_rate():
    gated = arm(replace(FULL, ar_share=0.2, causal_context=True, context_weight=1.0, schedule=BlockSchedule([(1, 6), (4, 2)], (16, 0), [(8, 4)])), "gated adapters")
    assert gated.schedule.rungs() == [(1, 0), (4, 8), (16, 0), (8, 4)] and gated.context_weight == gated.ar_share == 0
    assert gated.adapter_rank == 64 and gated.adapter_lr == 2 * FULL.lr
    assert arm(gated, "AR twin").adapter_rank == arm(gated, "all weights").adapter_rank == 0
    with pytest.raises(HildaError, match="adapter_lr > 0"):
        replace(FULL, adapter_rank=8)
    with pytest.raises(HildaError, match="no larger block size"):
        BlockSchedule([(4, 2)], (1, 3)).without_size_one()
