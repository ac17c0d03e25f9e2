"""The ladder of block sizes, written out step by step, and the mean of checkpoints."""

import pytest
import torch
from safetensors.torch import save_file

from hildalib import HildaError
from hildalib.wsd import BlockSchedule, merge_checkpoints


def test_sizes_and_stages_of_every_step():
    schedule = BlockSchedule(warmup=[(1, 2), (4, 1)], stable=(16, 3), decay=[(8, 2), (4, 1)])
    assert schedule.total_steps == 9
    assert [schedule.block_size(step) for step in range(11)] == [1, 1, 4, 16, 16, 16, 8, 8, 4, 4, 4]  # the last size holds
    assert [schedule.stage(step) for step in range(9)] == ["warmup"] * 3 + ["stable"] * 3 + ["decay"] * 3


def test_a_stage_without_steps_is_left_out_everywhere():
    schedule = BlockSchedule(warmup=[(1, 2)], stable=(64, 0), decay=[(8, 2), (4, 0)])
    assert [schedule.block_size(step) for step in range(6)] == [1, 1, 8, 8, 8, 8]
    assert schedule.stage(2) == schedule.stage(99) == "decay" and schedule.check(8) is schedule  # 64 and 4 are never used


def test_lists_from_a_parameter_file_are_rungs_too():
    assert BlockSchedule(warmup=[[1, 2]], stable=[4, 1]).rungs() == [(1, 2), (4, 1)]


def test_a_scaled_schedule_has_every_rung_longer_and_drops_none():
    schedule = BlockSchedule(warmup=[(1, 3), (4, 1)], stable=(16, 0), decay=[(8, 10)])
    assert schedule.scaled(1.5).rungs() == [(1, 4), (4, 2), (16, 0), (8, 15)]
    assert schedule.scaled(0.1).rungs() == [(1, 1), (4, 1), (16, 0), (8, 1)] and schedule.scaled(1.0) == schedule


def test_a_stable_stage_is_taken_from_the_last_rung_at_equal_steps():
    schedule = BlockSchedule(warmup=[(1, 3)], stable=(16, 0), decay=[(8, 2), (4, 9)])
    assert schedule.with_stable_stage().rungs() == [(1, 3), (16, 4), (8, 2), (4, 5)]
    with pytest.raises(HildaError, match="no decay rung"):
        BlockSchedule(stable=(16, 4)).with_stable_stage()


@pytest.mark.parametrize("options, message", [
    ({}, "no steps at all"), ({"stable": (8, 0)}, "no steps at all"), ({"warmup": [(0, 3)]}, r"rung \(0, 3\)"), ({"decay": [(4, -1)]}, r"rung \(4, -1\)")])
def test_an_impossible_schedule_is_refused(options, message):
    with pytest.raises(HildaError, match=message):
        BlockSchedule(**options)


def test_a_size_that_does_not_divide_the_row_is_named():
    with pytest.raises(HildaError, match="block size 6 does not divide length 16"):
        BlockSchedule(warmup=[(4, 1)], stable=(6, 1)).check(16)


def test_merge_is_the_mean_in_float32_in_the_dtype_of_the_files(tmp_path):
    values = [1.0, 2.0, 258.0]  # 1 + 2 + 258 = 261 is no bfloat16: a running sum in bfloat16 would be 260
    for number, value in enumerate(values):
        save_file({"a": torch.full((2, 3), value, dtype=torch.bfloat16), "b": torch.tensor([float(number)])}, tmp_path / f"{number}.safetensors")
    merged = merge_checkpoints(sorted(tmp_path.glob("*.safetensors")))
    assert merged["a"].dtype == torch.bfloat16 and (merged["a"] == 87).all() and merged["b"].tolist() == [1.0]


def test_merging_one_file_gives_the_file(tmp_path):
    tensors = {"a": torch.randn(4, 4)}
    save_file(tensors, tmp_path / "one.safetensors")
    assert torch.equal(merge_checkpoints([tmp_path / "one.safetensors"])["a"], tensors["a"])


@pytest.mark.parametrize("other", [{"b": torch.zeros(2)}, {"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(2)}])
def test_checkpoints_of_different_models_are_refused_by_name(tmp_path, other):
    save_file({"a": torch.zeros(2)}, tmp_path / "first.safetensors")
    save_file(other, tmp_path / "second.safetensors")
    with pytest.raises(HildaError, match="second.safetensors: holds other tensors than .*first.safetensors"):
        merge_checkpoints([tmp_path / "first.safetensors", tmp_path / "second.safetensors"])


def test_nothing_to_merge_is_an_error():
    with pytest.raises(HildaError, match="no checkpoint to merge"):
        merge_checkpoints([])
