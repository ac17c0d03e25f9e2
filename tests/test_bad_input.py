"""Bad input gives one HildaError that names the file or key and the remedy, and leaves nothing half-written.

Where each case is proved:
    unknown or mistyped parameter           test_params.py (bad value, bad line), test_cli.py (status 2), test_book.py (before a kernel starts)
    missing upstream artefact               here (artefacts, and `hilda run` with status 2)
    empty, truncated or non-UTF-8 data      test_corpora.py (damage is named by file and line); nothing kept of a broken record: test_packing.py
    corrupt model folder                    test_backbones.py (damaged folder); corrupt rows, metrics, finished runs and checkpoints: here, test_training.py
    wrong vocabulary                        tokenizer larger than embeddings: test_backbones.py; rows of another tokenizer: here
    prompt longer than the context          test_decoding.py (both decoders); through `generate` and the command line: here
    thresholds outside [0, 1]               test_decoding.py (settings), test_params.py (sweeps here); `generate` and the command line: here
    loss that is not a number               here
"""

import json

import pytest
import torch
from tiny import as_rows, text, tiny

import hildalib
from hildalib import HildaError, artefacts, backbones, params, paths
from hildalib.__main__ import main
from hildalib.recipe import Recipe
from hildalib.training import DiffusionTrainer, train
from hildalib.wsd import BlockSchedule

RECIPE = Recipe(BlockSchedule(stable=(4, 6)), batch_size=4, log_every=1, save_every=2)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- artefacts ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ask, name", [
    (lambda: artefacts.load_rows("nano", "01_data", "train", 2), "train.safetensors"), (lambda: artefacts.read_metrics("nano", "01_data", 2), "metrics.json"),
    (lambda: artefacts.model_folder("nano", "01_data", "no T2T", 2), "model")])
def test_a_missing_artefact_is_named_with_the_command_that_makes_it(ask, name):
    with pytest.raises(HildaError, match="is missing; make it with: python -m hildalib run 01_data --profile nano") as error:
        ask()
    assert name in str(error.value) and "seed2" in str(error.value)
    assert not paths.outputs_root().exists()  # to ask for a thing does not make its folder


def test_a_run_without_what_it_needs_ends_with_status_2_and_leaves_nothing(capsys):
    assert main(["run", "03_sft", "--profile", "smoke"]) == 2
    shown = capsys.readouterr().err
    assert "03_sft needs the results of 01_data, 02_wsd" in shown and "first: hilda run 01_data 02_wsd --profile smoke" in shown
    assert not (paths.outputs_root() / "smoke" / "03_sft").exists()


def test_rows_and_metrics_come_back_and_damage_to_them_is_named():
    rows = as_rows(*text(3))
    path = artefacts.save_rows(rows, "smoke", "01_data", "train")
    back = artefacts.load_rows("smoke", "01_data", "train", vocab_size=19)
    assert all(torch.equal(back[name], rows[name]) for name in rows)
    artefacts.write_metrics({"accuracy": torch.tensor(0.5)}, "smoke", "01_data", 0)
    assert artefacts.read_metrics("smoke", "01_data")["accuracy"] == 0.5 and files(path.parent) == ["train.safetensors"]
    record = paths.output_dir("smoke", "01_data") / "metrics.json"
    path.write_bytes(path.read_bytes()[:-9])
    record.write_text(record.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    for ask, file in ((lambda: artefacts.load_rows("smoke", "01_data", "train"), path), (lambda: artefacts.read_metrics("smoke", "01_data"), record)):
        with pytest.raises(HildaError, match="is damaged .*; delete it and run 01_data again") as error:
            ask()
        assert str(file) in str(error.value)


def test_rows_of_another_tokenizer_are_refused():
    artefacts.save_rows(as_rows(torch.tensor([[5, 18, 40]])), "smoke", "01_data", "train")
    with pytest.raises(HildaError, match="train.safetensors holds token id 40, the model has 19; run 01_data with the same `model`"):
        artefacts.load_rows("smoke", "01_data", "train", vocab_size=19)


def test_seeds_done_lists_what_is_there():
    for seed in (0, 2, 10):
        artefacts.write_metrics({}, "smoke", "05_benchmarks", seed)
    paths.output_dir("smoke", "05_benchmarks", 3)
    found = artefacts.seeds_done("smoke", "05_benchmarks", "metrics.json")
    assert list(found) == [0, 2, 10] and all(json.loads(path.read_text(encoding="utf-8"))["seed"] == seed for seed, path in found.items())


# ---- training -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("poison_at", [0, 3])
def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_neither_model_nor_log(tmp_path, monkeypatch, poison_at):
    model, tokenizer = tiny(block_size=None)
    compute_loss = DiffusionTrainer.compute_loss

    def poisoned(trainer, *arguments, **options):
        if trainer.state.global_step == poison_at:
            with torch.no_grad():
                model.model.norm.weight[0] = torch.nan
        return compute_loss(trainer, *arguments, **options)

    monkeypatch.setattr(DiffusionTrainer, "compute_loss", poisoned)
    with pytest.raises(HildaError, match=f"loss is nan at step {poison_at}, block size 4, row {4 * poison_at}: lower `lr`"):
        train(model, tokenizer, as_rows(*text(12)), RECIPE, tmp_path / "run")
    kept = files(tmp_path / "run")
    assert not any(name.startswith(("model", "log")) for name in kept)
    assert any("checkpoint-2" in name for name in kept) == (poison_at > 2)  # what was good is kept, as the message says


def test_a_damaged_finished_run_is_named(tmp_path):
    for damage in ("model.safetensors", "config.json"):
        folder = tmp_path / damage.partition(".")[0]
        for attempt in range(2):
            model, tokenizer = tiny(block_size=None)
            if attempt:
                file = folder / "model" / damage
                file.write_bytes(file.read_bytes()[:40])
                with pytest.raises(HildaError, match="model is damaged .*; delete .* and run again"):
                    train(model, tokenizer, as_rows(*text(12)), RECIPE, folder)
            else:
                train(model, tokenizer, as_rows(*text(12)), RECIPE, folder)


# ---- generation -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dllm(tmp_path_factory):
    """A folder with a dLLM of context 64, trained for a few steps."""
    model, tokenizer = tiny(block_size=None, max_length=64)
    folder = tmp_path_factory.mktemp("dllm")
    train(model, tokenizer, as_rows(*text(12)), RECIPE, folder)
    return str(folder / "model")


def test_generate_writes_text_from_a_folder_and_from_a_loaded_pair(dllm, capsys):
    said = hildalib.generate("1+2=", model=dllm, mode="S", max_new_tokens=12)
    assert isinstance(said, str) and len(said) <= 12 and {*said} <= {*"0123456789+-=;"}
    assert said == hildalib.generate("1+2=", model=backbones.load(dllm, dtype="float32", device="cpu"), mode="S", max_new_tokens=12)
    assert main(["generate", "1+2=", "--model", dllm, "--mode", "S", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said


@pytest.mark.parametrize("options, message", [
    ({"tau_mask": 1.5}, r"tau_mask = 1.5 is outside \[0, 1\]"), ({"tau_edit": -0.1}, r"tau_edit = -0.1 is outside \[0, 1\]"),
    ({"tau_mask": float("nan")}, "tau_mask = nan"), ({"mode": "X"}, "mode 'X' is unknown; use one of S, Q"), ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    ({"prompt": "1" * 60}, "need 72 positions, the model's context is 64; shorten the prompt or lower max_new_tokens"),
    ({"prompt": ""}, "the prompt needs at least one token")])
def test_generate_refuses_what_it_cannot_do(dllm, options, message):
    with pytest.raises(HildaError, match=message):
        hildalib.generate(**{"prompt": "1+1=", "model": dllm, "max_new_tokens": 12} | options)


@pytest.mark.parametrize("arguments, message", [
    (["1" * 60, "--max-new-tokens", "12"], "error: prompt and max_new_tokens need 72 positions"), (["1", "--tau-mask", "1.5"], "'1.5' is not a number in [0, 1]"),
    (["1", "--tau-edit", "nan"], "'nan' is not a number in [0, 1]"), (["1", "--max-new-tokens", "0"], "at least 1"), ([""], "at least one token")])
def test_the_command_line_ends_with_status_2_and_one_line(dllm, capsys, arguments, message):
    try:
        status = main(["generate", *arguments, "--model", dllm])
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    assert status == 2 and message in shown.err and "Traceback" not in shown.err and not shown.out


def test_generate_says_what_to_do_with_a_model_that_is_still_autoregressive(tmp_path):
    folder = backbones.save(*tiny(block_size=None), tmp_path / "ar")
    with pytest.raises(HildaError, match="autoregressive, not yet a dLLM: convert it with `hilda run 02_wsd 03_sft`"):
        hildalib.generate("1+1=", model=str(folder))


@pytest.mark.parametrize("notebook, key", [("04_decode", "tau_masks"), ("04_decode", "tau_edits"), ("05_benchmarks", "sweep_masks"), ("05_benchmarks", "sweep_edits")])
def test_thresholds_of_a_sweep_are_probabilities(notebook, key):
    with pytest.raises(HildaError, match=rf"--set: {key}.*must be in \[0, 1\]"):
        params.load(notebook, overrides={key: "[0.5, 1.5]"})
