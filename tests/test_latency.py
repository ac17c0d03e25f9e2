"""The decoder writes what diffusers' LLaDA2 pipeline writes, and feeds what was counted by hand; no timings."""

import pytest
import torch

from hildalib import HildaError, latency
from hildalib.decoding import EditSettings, edit_decode

pipeline = pytest.mark.skipif(not latency.has_pipeline(), reason="the oracle is LLaDA2Pipeline of diffusers, which is not installed")


def model(seed=0, block_size=4):
    """Weights sharpened so that confidences spread over (0, 1)."""
    out = latency.random_model(block_size, hidden=32, layers=2, heads=4, key_heads=2, intermediate=64, vocabulary=23, seed=seed)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter *= 12.0 if parameter.ndim > 1 else 1.0
    return out


def prompts(rows, length, seed=0):
    return torch.randint(22, (rows, length), generator=torch.Generator().manual_seed(seed))


@pipeline
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("length, new", [(8, 12), (6, 10), (1, 7)])  # the prompt ends on a block border, and inside a block
def test_a_fixed_quota_writes_the_tokens_of_diffusers_pipeline(length, new, steps):
    for seed in range(3):
        ids = prompts(2, length, seed)
        ours = latency.decode(model(seed), ids, new, steps)
        assert torch.equal(ours.ids, latency.pipeline_decode(model(seed), ids, new, steps))


@pipeline
@pytest.mark.parametrize("tau_mask, tau_edit", [(0.3, 0.2), (0.6, 0.4), (0.9, 0.9)])
def test_two_thresholds_write_the_tokens_of_diffusers_pipeline_edits_included(tau_mask, tau_edit):
    """The pipeline looks at max_post_steps after a forward, LLaDA2.1's own loop before it: its 2 are our 3. With as many steps as positions it
    would leave a block at its last fill, unconfirmed: here it has twice as many."""
    edited = 0
    for seed in range(4):
        ids = prompts(1, 6, seed)
        theirs = latency.pipeline_decode(model(seed), ids, 10, 8, threshold=tau_mask, editing_threshold=tau_edit, max_post_steps=2)
        settings = EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, max_post_steps=3, max_new_tokens=10, stop_at_eos=False)
        assert torch.equal(edit_decode(model(seed), ids, settings).ids, theirs)
        edited += not torch.equal(theirs, latency.pipeline_decode(model(seed), ids, 10, 8, threshold=tau_mask))
    assert edited or tau_edit > 0.5


@pytest.mark.parametrize("prompt, blocks, size, steps", [(8, 3, 4, 2), (8, 2, 4, 4), (16, 2, 8, 1), (12, 3, 4, 1)])
def test_positions_and_head_rows_are_those_counted_by_hand(prompt, blocks, size, steps):
    """Prompt and first block; every later block once more beside its predecessor's commit; `steps` forwards a block, whose masks alone go through the head."""
    network, forwards = model(block_size=size), []
    found = latency.shapes(network, lambda: forwards.append(latency.decode(network, prompts(1, prompt), blocks * size, steps)))
    masks = [size - step * size // steps for step in range(steps)]
    expected = [(size, rows) for rows in masks] * blocks
    for block in range(blocks):
        expected[block * steps] = (prompt + size if block == 0 else 2 * size, masks[0])
    assert found == expected
    assert forwards[0].positions_fed.tolist() == [prompt + blocks * steps * size + (blocks - 1) * size] and forwards[0].forwards.tolist() == [blocks * steps]


def test_flops_by_hand_and_shares_sum_to_one(monkeypatch, capsys):
    network = model()
    body = sum(p.numel() for name, p in network.named_parameters() if "proj" in name)
    assert latency.flops(network, [(5, 2), (3, 0)]) == 2 * (body * 8 + 23 * 32 * 2)
    found = latency.shares(lambda: latency.decode(network, prompts(1, 8), 8, 2))
    assert sum(found.values()) == pytest.approx(1) and min(found.values()) > 0
    monkeypatch.setattr(latency, "has_pipeline", lambda: False)
    rows = latency.measure(network, prompt=8, new=8, steps=2, rounds=2)
    assert len(rows) == 2 and all(row["pipeline_s"] is None and row["ours_s"] > 0 and row["floor_s"] > 0 for row in rows)
    forwards = latency.shapes(network, lambda: latency.decode(network, prompts(1, 8), 8, 2))
    wider = 2 * (body + 23 * 32) * rows[0]["fed"] / latency.flops(network, forwards)
    assert all(row["wide_floor_s"] / row["floor_s"] == pytest.approx(wider) for row in rows) and wider > 1
    assert "decode" in capsys.readouterr().out


@pipeline
def test_different_tokens_are_no_comparison(monkeypatch):
    monkeypatch.setattr(latency, "pipeline_decode", lambda *_: torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(HildaError, match="tokens differ from the pipeline's"):
        latency.measure(model(), prompt=8, new=8, steps=2, rounds=1)
