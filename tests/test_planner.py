"""The planner: its prediction is what the allocator hands out in a real step, its operations are those of a hand count, its advice makes things fit."""

from dataclasses import replace

import pytest

from hildalib import HildaError, params, planner
from hildalib.__main__ import main
from hildalib.footprint import simulate
from hildalib.rehearsal import PLAIN, qwen3, rehearse
from hildalib.wsd import BlockSchedule

SMALL = qwen3(64, 3, 4, 2, 160, 3_000, 16)
GATED = {"adapter_rank": 4, "adapter_lr": 1e-3, "context_weight": 0.0, "gradient_checkpointing": True}


@pytest.mark.parametrize("length, changes, stored", [
    (256, {}, {}), (128, {"batch_size": 3, "copies": 2, "keep_weight": 0.1}, {}), (256, {"gradient_checkpointing": True, "head_rows": 32}, {}),
    (128, {"head_rows": 16, "optimizer": "adamw_8bit"}, {"weights": "bfloat16"}), (128, GATED, {}),
    (128, {"gradient_checkpointing": True, "head_rows": 16}, {"lora_rank": 4, "quantize": "nf4"}),
    (128, {"schedule": BlockSchedule(stable=(128, 1)), "context_weight": 0.0}, {}), (128, {"precision": "bfloat16"}, {})])
def test_predicted_peak_memory_is_what_a_real_step_takes(length, changes, stored):
    found = rehearse(SMALL, replace(PLAIN, **changes), length, **stored)
    assert abs(found["error"]) < 0.1, found


def test_operations_are_those_of_a_hand_count():
    length, layers, hidden, heads, key_heads, size, inner, vocabulary = 64, 3, 64, 4, 2, 16, 160, 3_000
    step = simulate(SMALL, replace(PLAIN, context_weight=0.0), length, math=True)
    rows = 2 * length  # noisy and clean; attention without tiles, for 128 rows are one tile
    layer = hidden * size * (2 * heads + 2 * key_heads) + 3 * hidden * inner
    forward = 2 * rows * layer * layers + 4 * rows * rows * heads * size * layers + 2 * length * hidden * vocabulary
    assert step.forward_flops == pytest.approx(forward, rel=0.01)  # rotary positions are a small product too
    assert step.flops == pytest.approx(3 * forward, rel=0.01)


def test_each_saving_saves_where_it_says():
    plain, few = simulate(SMALL, PLAIN, 256), simulate(SMALL, replace(PLAIN, head_rows=16), 256)
    assert few.peak < plain.peak and few.parts["logits and loss"] < plain.parts["logits and loss"]
    deep = qwen3(64, 12, 4, 2, 160, 500, 16)
    whole, twice = simulate(deep, PLAIN, 256), simulate(deep, replace(PLAIN, gradient_checkpointing=True), 256)
    assert twice.parts["activations"] < whole.parts["activations"] / 3 and twice.flops > 1.2 * whole.flops
    eight = simulate(deep, replace(PLAIN, optimizer="paged_adamw_8bit"), 256)
    assert eight.pageable == eight.parts["optimiser state"] < whole.parts["optimiser state"] / 3
    four = simulate(deep, PLAIN, 256, quantize="nf4", lora_rank=4)
    assert four.trained < whole.trained / 5 and four.parts["weights"] < whole.parts["weights"] / 3
    assert simulate(deep, PLAIN, 256, math=True).peak > whole.peak  # scores stand whole


def test_a_stage_that_does_not_fit_is_told_what_would_make_it_fit(capsys, monkeypatch):
    monkeypatch.setattr(planner, "RESERVE", 0)
    monkeypatch.setitem(planner.KNOWN, "small", SMALL)
    arguments = ["plan", "02_wsd", "--profile", "smoke", "--set", "model=small", "--set", "length=256", "--set", "stable=[256,0]", "--gflops", "10"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    peak = float(next(line for line in shown.splitlines() if line.startswith("  peak")).split()[1])
    assert main([*arguments, "--memory", f"{peak * 1000 * 1.05:.0f}MB"]) == 0 and "fits in" in capsys.readouterr().out
    assert main([*arguments, "--memory", f"{peak * 1000 / 3:.0f}MB"]) == 1
    shown = capsys.readouterr().out
    advice = next(line for line in shown.splitlines() if line.startswith("it fits with")).removeprefix("it fits with ").rstrip(":").split()
    assert main([*arguments, *advice, "--memory", f"{peak * 1000 / 3:.0f}MB"]) == 0
    assert main([*arguments, "--memory", "0.1MB"]) == 1 and "no setting makes it fit" in capsys.readouterr().out


def test_time_of_a_stage_is_that_of_its_steps():
    """Twice the steps take twice as long; a step at block size 1 is one row a row, one in blocks of 8 two."""
    found = {key: planner.plan("02_wsd", "smoke", {"draft_share": "0", "ar_share": "0", "kl_weight": "0", "warmup": warmup, "decay": decay}, rate=1e9)
             for key, (warmup, decay) in {"once": ("[]", "[[8, 10]]"), "twice": ("[]", "[[8, 20]]"), "half at 1": ("[[1, 10]]", "[[8, 10]]")}.items()}
    assert found["twice"].seconds == pytest.approx(2 * found["once"].seconds)
    assert found["half at 1"].seconds == pytest.approx(1.5 * found["once"].seconds)


@pytest.mark.parametrize("arguments, message", [
    (("04_decode",), "has no plan"), (("02_wsd", "--memory", "8"), "write for example 8GB"), (("02_wsd", "--set", "lrr=1"), "did you mean 'lr'"),
    (("02_wsd", "--profile", "nano+pascall"), "did you mean 'pascal'"), (("02_wsd", "--profile", "smoke", "--set", "model=no/such-model"), "no configuration of")])
def test_mistakes_are_explained(capsys, arguments, message):
    assert main(["plan", *arguments, "--gflops", "10"]) == 2 and message in capsys.readouterr().err


def test_the_8_gb_profiles_say_what_they_must():
    """What a plan of them stands on; the plans themselves take a minute each."""
    small, large = (params.load("02_wsd", f"qwen3-{size}") for size in ("0.6b", "1.7b"))
    lengths = [params.load("01_data", f"qwen3-{size}")["length"] for size in ("0.6b", "1.7b")]
    assert lengths == [1024, 512] and large["decay"][-1][0] == 32 and large["quantize"] == "nf4" and large["lora_rank"] and not small["lora_rank"]
    old = params.load("02_wsd", "qwen3-1.7b+pascal")
    assert (old["precision"], old["weights"], old["gradient_checkpointing"], old["quantize"]) == ("float32", "float32", True, "nf4")


def test_memory_is_read_with_its_unit():
    assert (planner.bytes_of("8GB"), planner.bytes_of("7.5GiB"), planner.bytes_of("512 MiB")) == (8e9, 7.5 * 2**30, 2**29)
    with pytest.raises(HildaError):
        planner.bytes_of("GB")
