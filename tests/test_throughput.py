"""The fast form of a conversion step is the plain form: same loss, same gradient, and tiles leave out only what the mask forbids."""

import pytest
import torch
from tiny import tiny

from hildalib import attention, throughput


@pytest.mark.parametrize("length, block_size, copies", [(256, 8, 1), (300, 32, 3), (384, 384, 1), (512, 4, 2), (300, 1, 0), (257, 8, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_cover_every_pair_that_the_mask_allows_and_no_query_twice(length, block_size, copies, causal):
    docs = (torch.arange(length) >= length // 3).long()[None]
    mask = attention.noisy_clean(length, block_size, docs, copies, causal) if copies else attention.block_causal(length, block_size, docs)
    rebuilt, seen = torch.zeros_like(mask), torch.zeros(mask.shape[-1], dtype=torch.long)
    for rows, keys, part in attention.tiles(mask, length, block_size, copies, causal):
        rebuilt[:, :, rows] = rebuilt[:, :, rows].index_copy(3, keys, part)
        seen[rows] += 1
    assert torch.equal(rebuilt, mask) and (seen == 1).all()


def test_short_rows_are_not_tiled():
    mask = attention.noisy_clean(2 * attention.TILE - 1, 8)
    assert attention.tiles(mask, 2 * attention.TILE - 1, 8, 1) is None


@pytest.mark.parametrize("block_size, copies", [(8, 1), (8, 3), (32, 2)])
def test_the_shared_form_has_the_loss_and_gradient_of_the_plain_form(block_size, copies):
    model, tokenizer = tiny()
    batch = throughput.batch_of(model, tokenizer, 2 * attention.TILE + 40, copies, block_size, seed=1)
    found = []
    for loss_of, implementation in ((throughput.plain_loss, "sdpa"), (throughput.shared_loss, attention.TILED)):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        loss = loss_of(model, *batch, block_size) / batch[-1].sum()
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_the_measurement_counts_the_same_tokens_for_both_forms_and_restores_the_model(capsys):
    model, tokenizer = tiny()
    rows = throughput.measure(model, tokenizer, length=32, copies=2, block_size=4, rounds=2)
    assert [row["form"] for row in rows] == ["plain", "shared"] * 2 and model.config._attn_implementation == "sdpa"
    for plain, shared in zip(rows[::2], rows[1::2]):
        assert plain["supervised"] == shared["supervised"] > 0 and plain["loss"] == pytest.approx(shared["loss"], rel=1e-5)
        assert plain["matmul_share"] > 0 and shared["matmul_share"] > 0
    assert "supervised tokens/CPU-s" in capsys.readouterr().out


def test_step_flops_by_hand():
    model, _ = tiny()
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert throughput.step_flops(model, 10, 4, 100) == 6 * (body * 10 + head * 4) + 12 * 32 * 100 * 2  # width 32, two layers
