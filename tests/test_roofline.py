"""Floors against hand counts; the table has the forwards that were asked for. No time is asserted beyond being one."""

import pandas as pd
import pytest
import torch
from tiny import tiny

from hildalib import HildaError, roofline
from hildalib.adapters import with_lora
from hildalib.gated import gate


def test_floors_by_hand():
    model, _ = tiny()
    body, head = roofline.weights(model)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name)
    assert (body, head) == (linear, 19 * 32)
    found = roofline.floors(model, roofline.Machine(flops=1e9, bandwidth=1e8), positions=8, context=20)
    scores = 4 * model.config.num_attention_heads * model.config.head_dim * model.config.num_hidden_layers
    assert found == pytest.approx({"matmul_s": 8 * (2 * (body + head) + 20 * scores) / 1e9, "memory_s": 4 * (body + head) / 1e8})


def test_one_row_a_shape_and_the_model_is_left_as_it_was():
    model, _ = tiny(causal=True)
    before, generator = dict(model.config.hilda), torch.random.get_rng_state()
    table = roofline.measure(model, roofline.Machine(1e9, 1e9), sizes=[1, 4], batches=[1, 3], contexts=[6], seconds=0.01)
    assert table.positions.tolist() == [1, 3, 4, 12] and (table.seconds > 0).all() and torch.isfinite(torch.tensor(table.seconds.values)).all()
    assert model.config.hilda == before and torch.equal(generator, torch.random.get_rng_state())
    axes = roofline.figure(table.assign(model="tiny")).axes
    assert len(axes) == 1 and len(axes[0].lines) == 4
    with pytest.raises(HildaError, match="'roofline' needs column"):
        roofline.figure(table)


def test_lengths_have_a_line_a_block_size():
    model, _ = tiny(causal=True)
    table = roofline.measure(model, roofline.Machine(1e9, 1e9), sizes=[1, 4], batches=[1], contexts=[8, 16], seconds=0.01)
    assert table[["block_size", "context"]].to_numpy().tolist() == [[1, 8], [1, 16], [4, 8], [4, 16]]
    lines = roofline.lengths(table).axes[0].lines
    assert [line.get_label() for line in lines] == ["one position", "a block of 4"] and all(line.get_xdata().tolist() == [8, 16] for line in lines)


def test_half_the_bytes_and_the_adapters_of_noisy_rows_count():
    model, _ = tiny()
    wide, head = roofline.weights(model)
    halved = roofline.floors(model, roofline.Machine(1e9, 1e8, torch.bfloat16), positions=8, context=20)
    assert halved["memory_s"] == pytest.approx(2 * (wide + head) / 1e8)
    gated = gate(with_lora(tiny()[0], 4))
    added = sum(p.numel() for name, p in gated.named_parameters() if "lora_" in name)
    assert roofline.weights(gated) == (wide + added, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_is_measured(dtype):
    machine = roofline.Machine.measure(0.05, dtype)
    assert machine.flops > 1e6 and machine.bandwidth > 1e6 and machine.dtype == dtype
