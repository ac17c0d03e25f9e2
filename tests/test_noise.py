"""Corruption: every position is what its targets say, rates are the ones asked for, and what must add up adds up."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import MASK, text

from hildalib.noise import allowed_ids, block_rates, complement, corrupt, own_drafts, suffix_blocks

BANNED = [0, 1, 2, 4]


def noised(ids, maskable=None, seed=0, size=4, **options):
    maskable = torch.ones_like(ids, dtype=torch.bool) if maskable is None else maskable
    options = {"forbidden_ids": BANNED, "vocab_size": 19} | options
    return corrupt(ids, maskable, block_size=size, mask_token_id=MASK, generator=torch.Generator().manual_seed(seed), **options)


def test_each_slice_of_the_band_gets_exactly_one_rate():
    rates = block_rates(5, 8, low=0.3, high=0.7, generator=torch.Generator().manual_seed(0))
    slices = ((rates - 0.3) / 0.4 * 40).floor().flatten().long()
    assert sorted(slices.tolist()) == list(range(40)) and slices.tolist() != list(range(40))


def test_full_share_sets_that_share_of_rates_to_one_and_leaves_the_others():
    plain, mixed = (block_rates(100, 100, high=0.9, full_share=share, generator=torch.Generator().manual_seed(0)) for share in (0.0, 0.25))
    full = mixed == 1
    assert not (plain == 1).any() and torch.equal(plain[~full], mixed[~full])
    assert abs(full.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 10_000) ** 0.5


def test_a_rate_may_be_given_for_all_for_rows_for_blocks_or_for_positions():
    ids, _ = text(2, 10)  # the last block has two positions
    blocks = torch.tensor([[0.2, 0.2, 0.2], [0.7, 0.7, 0.7]])
    forms = [blocks[:, 0], blocks, blocks.repeat_interleave(4, 1)[:, :10]]
    found = [noised(ids, t=t) for t in forms]
    assert all(torch.equal(found[0].noisy_ids, other.noisy_ids) and torch.equal(found[0].t, other.t) for other in found[1:])
    assert (noised(ids, t=0.3).t == 0.3).all() and found[0].t.shape == (2, 10)
    uneven = noised(ids, t=torch.tensor([[0.0, 1.0, 0.0]] * 2)).mask_targets
    assert uneven[:, 4:8].all() and uneven.sum() == 8


def test_one_rate_is_drawn_for_each_block():
    ids, _ = text(3, 16)
    rates = noised(ids).t.view(3, 4, 4)
    assert (rates == rates[:, :, :1]).all() and len(rates[:, :, 0].unique()) == 12


@pytest.mark.parametrize("size", [4, 5, 8])
def test_a_suffix_block_hides_its_last_positions_and_so_does_its_complement(size):
    ids, _ = text(6, 40)
    suffix = suffix_blocks(6, 40 // size, 0.5, generator=torch.Generator().manual_seed(1))
    assert 0 < suffix.sum() < suffix.numel()
    plain, mixed = noised(ids, size=size), noised(ids, size=size, suffix=suffix)
    there = suffix.repeat_interleave(size, 1)
    other, twin = complement(plain, ids, MASK), complement(mixed, ids, MASK, suffix, size)
    assert torch.equal(mixed.mask_targets[~there], plain.mask_targets[~there]) and torch.equal(twin.mask_targets[~there], other.mask_targets[~there])
    for row, rates in ((mixed, mixed.t), (twin, 1 - mixed.t)):
        hidden = row.mask_targets.view(6, -1, size)[suffix]
        assert torch.equal(hidden, hidden.cummax(-1).values)  # nothing visible behind a mask
        assert torch.equal(hidden.sum(-1), (rates.view(6, -1, size)[suffix][:, 0] * size).round().long())
    assert torch.equal(mixed.t, plain.t) and torch.equal(twin.noisy_ids == MASK, twin.mask_targets)


def test_suffix_blocks_come_at_their_share_and_never_hide_a_prompt():
    blocks = suffix_blocks(100, 100, 0.25, generator=torch.Generator().manual_seed(0))
    assert abs(blocks.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 10_000) ** 0.5
    ids, _ = text(4, 16)
    maskable = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    out = noised(ids, maskable, suffix=everywhere)
    assert not ((out.mask_targets | complement(out, ids, MASK, everywhere, 4).mask_targets) & ~maskable).any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), edit_rate=st.sampled_from([0.0, 0.3, 1.0]), t=st.sampled_from([None, 0.0, 0.4, 1.0]), share=st.floats(0, 1))
def test_every_position_is_a_mask_a_wrong_token_or_itself(seed, edit_rate, t, share):
    ids, _ = text(3, 17, seed)
    maskable = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share
    out = noised(ids, maskable, seed, edit_rate=edit_rate, t=t)
    assert not (out.mask_targets & out.edit_targets).any() and not ((out.mask_targets | out.edit_targets) & ~maskable).any()
    assert torch.equal(out.keep_targets, maskable & ~out.mask_targets & ~out.edit_targets)
    assert torch.equal(out.noisy_ids == MASK, out.mask_targets)
    assert torch.equal(out.noisy_ids != ids, out.mask_targets | out.edit_targets)
    assert t != 1.0 or torch.equal(out.mask_targets, maskable)
    assert t != 0.0 or not out.mask_targets.any()
    assert edit_rate != 1.0 or not out.keep_targets.any()
    again = noised(ids, maskable, seed, edit_rate=edit_rate, t=t)
    assert torch.equal(out.noisy_ids, again.noisy_ids)


def test_masked_and_edited_shares_are_the_rates_asked_for():
    ids, _ = text(100, 400)
    out = noised(ids, t=0.4, edit_rate=0.2)
    visible = (~out.mask_targets).sum()
    assert abs(out.mask_targets.float().mean() - 0.4) < 4 * (0.24 / ids.numel()) ** 0.5
    assert abs(out.edit_targets.sum() / visible - 0.2) < 4 * (0.16 / visible) ** 0.5


@pytest.mark.parametrize("token, choices", [(5, 13), (18, 13), (11, 13), (2, 14)])  # 2 is EOS: it is never drawn, so all 14 others remain
def test_wrong_tokens_are_uniform_over_the_other_allowed_ids(token, choices):
    ids = torch.full((50, 400), token)
    drawn = noised(ids, t=0.0, edit_rate=1.0).noisy_ids
    counts = torch.bincount(drawn.flatten(), minlength=19).float()
    assert (counts > 0).sum() == choices and counts[token] == 0 and counts[:5].sum() == 0
    expected = ids.numel() / choices
    assert ((counts[counts > 0] - expected).abs() < 5 * expected ** 0.5).all()


def test_allowed_ids_are_the_vocabulary_without_the_banned():
    ids, _ = text()
    assert allowed_ids(ids, MASK, [0, 2, 99], 8).tolist() == [1, 4, 5, 6, 7]
    assert allowed_ids(torch.tensor([[6]]), MASK, [], None).tolist() == [0, 1, 2, 4, 5, 6]


def test_a_row_and_its_complement_mask_every_token_exactly_once():
    ids, _ = text(4, 16)
    maskable = torch.arange(16).expand(4, -1) >= 3
    first = noised(ids, maskable, edit_rate=0.5)
    second = complement(first, ids, MASK)
    assert torch.equal(first.mask_targets.int() + second.mask_targets.int(), maskable.int())
    assert not second.edit_targets.any() and torch.equal(second.noisy_ids == MASK, second.mask_targets)
    assert torch.equal(second.noisy_ids[~second.mask_targets], ids[~second.mask_targets])  # no wrong token survives
    assert torch.allclose(first.t + second.t, torch.ones(()))


def test_drafts_move_masks_to_the_edit_targets_right_or_wrong():
    ids, _ = text(2, 8)
    before = noised(ids, t=0.6)
    fill = torch.ones_like(ids, dtype=torch.bool)
    fill[:, 4:] = False
    after = own_drafts(before, fill, lambda noisy: ids)  # every draft is right
    drafted = before.mask_targets & fill
    assert drafted.any() and torch.equal(after.edit_targets, drafted) and torch.equal(after.mask_targets, before.mask_targets & ~fill)
    assert torch.equal(after.noisy_ids[drafted], ids[drafted]) and torch.equal(after.noisy_ids[~drafted], before.noisy_ids[~drafted])
    assert torch.equal(before.noisy_ids == MASK, before.mask_targets)  # the input is left as it was


def test_each_turn_of_drafting_sees_the_canvas_of_the_turn_before():
    before, seen = noised(text(1, 8)[0], t=1.0), []

    def predict(noisy):
        seen.append(noisy.clone())
        return torch.full_like(noisy, 5 + len(seen))

    fill = torch.arange(8)[None] < 2
    after = own_drafts(before, fill, predict, turns=3)
    assert [canvas[0, :3].tolist() for canvas in seen] == [[MASK] * 3, [6, 6, MASK], [7, 7, MASK]]
    assert after.noisy_ids[0, :3].tolist() == [8, 8, MASK]
