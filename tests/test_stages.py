"""`hilda train`: arms from parameters alone, where the notebook finds them; parameters become the recipe field by field."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny import as_rows

from hildalib import HildaError, artefacts, backbones, book, exports, params, paths, runs, stages, stamps, training
from hildalib.__main__ import main
from hildalib.nano import nano
from hildalib.recipe import Recipe, arm
from hildalib.wsd import BlockSchedule


@pytest.fixture
def data():
    """Rows of 01_data at smoke, as that notebook leaves them, with its stamp."""
    tokenizer = nano(32, 2)[1]
    digits = tokenizer("0123456789", add_special_tokens=False).input_ids
    for split, count in (("train", 24), ("validation", 8)):
        ids = torch.tensor(digits)[torch.randint(10, (count, 64), generator=torch.Generator().manual_seed(count))]
        artefacts.save_rows(as_rows(ids), "smoke", "01_data", split)
    stamps.write(paths.output_dir("smoke", "01_data") / stamps.STAMP, {"digest": "x", "artefacts": {}})


def test_train_leaves_arms_that_the_notebook_finds_finished(data, monkeypatch, capsys):
    few = ["--set", "parent_steps=3", "--set", "warmup=[[1,1],[4,1]]", "--set", "decay=[[8,2]]"]
    assert main(["train", "02_wsd", "--profile", "smoke", "--arm", "dLLM", "--arm", "AR twin", *few]) == 0
    assert "next: hilda run 02_wsd --profile smoke" in capsys.readouterr().out
    folder = paths.checkpoint_dir("smoke", "02_wsd")
    assert {path.parent.name for path in folder.glob("*/log.csv")} == {"parent", "dLLM", "AR twin"}
    overrides = dict(text.split("=") for text in few[1::2])
    (job,) = book.plan(book.Book(), ["02_wsd"], "smoke", overrides)
    book.begin(job, job.inputs(), force=False)  # as `hilda run` begins: what train left is a run to be continued
    monkeypatch.setattr(training.DiffusionTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    stage = stages.conversion(job.parameters)  # as the notebook does
    assert len(stage.train("dLLM")) and (folder / "dLLM" / "model").is_dir()
    (other,) = book.plan(book.Book(), ["02_wsd"], "smoke", overrides | {"lr": "0.5"})
    book.begin(other, other.inputs(), force=False)
    assert not (folder / "dLLM").exists()  # another recipe continues nothing


def test_two_processes_of_a_launcher_on_a_cpu_share_the_arm(data):
    """Each would begin a run of its own, and be refused by the other's lock, if they did not know of one another."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hildalib", "train", "02_wsd", "--profile",
               "smoke", "--arm", "AR twin", "--set", "parent_steps=2", "--set", "warmup=[[1,1]]", "--set", "decay=[[8,1]]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=paths.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("next: hilda run") == 1 and (paths.checkpoint_dir("smoke", "02_wsd") / "AR twin" / "log.csv").is_file()


def test_parameters_become_the_recipe_field_by_field():
    values = params.load("02_wsd", "recipes")
    recipe = stages.recipe_of(values, stages.schedule_of(values), "wsd")
    shared = {field.name for field in fields(Recipe)} & {*values}
    assert len(shared) > 25 and all(getattr(recipe, name) == values[name] for name in shared)
    assert recipe.schedule.rungs() == [tuple(rung) for rung in (*values["warmup"], values["stable"], *values["decay"])]
    values = params.load("03_sft", "smol")
    assert stages.recipe_of(values, recipe.schedule, "sft", adapter_rank=7).adapter_rank == 7


def test_an_arm_may_have_a_rate_of_its_own(monkeypatch):
    seen = {}
    monkeypatch.setattr(stages.training, "train", lambda *given, title, **_: seen.update({title: given[3].lr}))
    stage = stages.Stage(Path("x"), None, {"train": {"input_ids": torch.zeros(1, 8)}}, Recipe(BlockSchedule(stable=(4, 2)), lr=0.5), lambda *_: None, rates={"AR twin": 0.25})
    for name in ("AR twin", "dLLM"):
        stage.train(name)
    assert seen == {"AR twin": 0.25, "dLLM": 0.5}


def test_a_quantised_parent_needs_adapters_for_every_arm(data):
    values = params.load("02_wsd", "smoke", {"quantize": "nf4", "adapter_rank": "4", "adapter_lr": "0.1"})
    with pytest.raises(HildaError, match="set lora_rank"):
        stages.conversion(values)


def test_a_quantised_parent_is_converted_and_tuned_under_adapters(data, tmp_path):
    """02 and 03 with NF4 and LoRA, dLLM and twin, on a small model from a folder."""
    model, tokenizer = nano(32, 2)
    backbones.save(model, tokenizer, tmp_path / "parent")
    changes = {"model": str(tmp_path / "parent"), "quantize": "nf4", "lora_rank": 4, "arms": ["dLLM", "AR twin"], "warmup": [[1, 1]], "decay": [[8, 2]],
               "head_rows": 16, "gradient_checkpointing": True, "kl_weight": 0.5, "optimizer": "adamw_8bit"}
    stage = stages.conversion(params.load("02_wsd", "smoke", changes))
    for name in ("dLLM", "AR twin"):
        stage.train(name)
    for split in ("train", "validation"):
        artefacts.save_rows(artefacts.load_rows("smoke", "01_data", split), "smoke", "01_data", f"sft-{split}")
    tuned = stages.tuning(params.load("03_sft", "smoke", {"arms": ["dLLM", "AR twin"], "steps": 2, "head_rows": 16}))
    assert len(tuned.train("dLLM")) and tuned.recipe.causal_context
    again = backbones.load(paths.checkpoint_dir("smoke", "03_sft") / "dLLM" / "model", dtype="float32", device="cpu")[0]
    assert again.config.hilda["stage"] == "sft" and again.is_quantized


def test_adapters_go_on_learning_over_the_tuned_twin_and_move_with_it(data, tmp_path, monkeypatch):
    """adapter_base: clean rows are then the tuned twin's to the bit, wherever the outputs lie; without adapters it is refused."""
    gates = {"adapter_rank": 4, "adapter_lr": 0.01, "context_weight": 0.0, "ar_share": 0.0, "warmup": [[2, 1]], "decay": [[8, 2]], "parent_steps": 2}
    converted = stages.conversion(params.load("02_wsd", "smoke", {**gates, "arms": ["dLLM", "AR twin"]}))
    artefacts.save_rows(artefacts.load_rows("smoke", "01_data", "train"), "smoke", "01_data", "sft-train")
    values = params.load("03_sft", "smoke", {"arms": ["AR twin", "dLLM"], "adapter_base": "AR twin", "adapter_lr": 0.01, "context_weight": 0.0, "steps": 2})
    for name in ("dLLM", "AR twin"):
        converted.train(name)
    with pytest.raises(HildaError, match="AR twin.*is missing"):
        stages.tuning(values).train("dLLM")
    tuned = stages.tuning(values)
    assert stages.beginnings(values) == "AR twin starts from AR twin of 02, dLLM starts from dLLM of 02"
    for name in values["arms"]:
        tuned.train(name)
    (tmp_path / "outputs").rename(tmp_path / "moved")
    monkeypatch.setenv("HILDA_OUTPUTS", str(tmp_path / "moved"))
    ids = torch.randint(1, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    folders = {arm: artefacts.model_folder("smoke", "03_sft", arm) for arm in values["arms"]}
    logits = {arm: backbones.load(folder, dtype="float32", device="cpu")[0](input_ids=ids).logits for arm, folder in folders.items()}
    assert torch.equal(*logits.values())
    assert not torch.equal(logits["dLLM"], backbones.load(artefacts.model_folder("smoke", "02_wsd", "dLLM"), device="cpu")[0](input_ids=ids).logits)
    with pytest.raises(HildaError, match="laid over nothing"):
        backbones.load(folders["AR twin"], base=folders["AR twin"])
    with pytest.raises(HildaError, match="which nobody else has"):
        exports.export(folders["dLLM"], "adapter", tmp_path / "out")
    monkeypatch.setattr(stages.gated, "rank", lambda _: 0)
    with pytest.raises(HildaError, match="made no adapters"):
        stages.tuning(values)
    (artefacts.model_folder("smoke", "02_wsd", "dLLM") / backbones.ADAPTER_RECORD).unlink()
    with pytest.raises(HildaError, match="twin_rank = 3.*made no adapters"):
        stages.origins(values | {"twin_rank": 3})


def test_an_arm_of_every_weight_is_tuned_alone_in_a_profile_of_adapters(data):
    """`hilda train 03_sft --arm "plain conversion"`: nobody to learn from, so neither twin nor adapters need be there."""
    gates = {"adapter_rank": 4, "adapter_lr": 0.01, "context_weight": 0.0, "ar_share": 0.0, "warmup": [[2, 1]], "decay": [[8, 2]], "parent_steps": 2}
    stages.conversion(params.load("02_wsd", "smoke", {**gates, "kl_weight": 0.5, "arms": ["plain conversion"]})).train("plain conversion")
    artefacts.save_rows(artefacts.load_rows("smoke", "01_data", "train"), "smoke", "01_data", "sft-train")
    values = params.load("03_sft", "smoke", {"arms": ["plain conversion"], "adapter_base": "AR twin", "adapter_lr": 0.01, "context_weight": 0.0, "kl_weight": 0.5, "twin_rank": 3, "steps": 2})
    assert stages.tuning(values).train("plain conversion").step.max() == 2


@pytest.mark.parametrize("name", ["AR twin", "plain conversion"])
def test_an_arm_without_a_causal_context_is_tuned_alone_as_beside_the_dllm(data, name):
    """`hilda train 03_sft --arm "AR twin"` where the profile's context_weight is for a dLLM with a causal context."""
    short = {"warmup": [[2, 1]], "decay": [[8, 2]], "parent_steps": 2, "arms": ["dLLM", name]}
    conversion = stages.conversion(params.load("02_wsd", "smoke", short))
    for each in short["arms"]:
        conversion.train(each)
    artefacts.save_rows(artefacts.load_rows("smoke", "01_data", "train"), "smoke", "01_data", "sft-train")
    alone = stages.tuning(params.load("03_sft", "smoke", {"arms": [name], "context_weight": 3.0, "steps": 2}))
    beside = stages.tuning(params.load("03_sft", "smoke", {"arms": short["arms"], "context_weight": 3.0, "steps": 2}))
    assert beside.recipe.context_weight == 3.0 and arm(alone.recipe, name, 64) == arm(beside.recipe, name, 64)
    assert alone.train(name).step.max() == 2


def test_a_twin_tuned_in_adapters_is_handed_out_with_those_that_draft_for_it(data, tmp_path, monkeypatch):
    """twin_rank: the twin starts at what the dLLM's adapters lie on; both changes together are a folder of adapters that loads beside that model's name."""
    model, tokenizer = nano(32, 2)
    model.config.hilda |= {"parent": "named/model"}
    base = backbones.save(model, tokenizer, tmp_path / "named")
    fetch = backbones.fetch
    monkeypatch.setattr(backbones, "fetch", lambda name: base if str(name) == "named/model" else fetch(name))
    gates = {"adapter_rank": 4, "adapter_lr": 0.01, "context_weight": 0.0, "ar_share": 0.0, "warmup": [[2, 1]], "decay": [[8, 2]], "model": "named/model"}
    stages.conversion(params.load("02_wsd", "smoke", {**gates, "arms": ["dLLM"]})).train("dLLM")
    artefacts.save_rows(artefacts.load_rows("smoke", "01_data", "train"), "smoke", "01_data", "sft-train")
    values = params.load("03_sft", "smoke", {"arms": ["AR twin", "dLLM"], "adapter_base": "AR twin", "twin_rank": 3, "adapter_lr": 0.01, "context_weight": 0.0,
                                             "steps": 3, "lr": 0.02})
    tuned = stages.tuning(values)
    assert tuned.rates == {"AR twin": 0.01}
    assert stages.beginnings(values) == "AR twin starts from named/model, dLLM starts from dLLM of 02"
    for name in values["arms"]:
        tuned.train(name)
    folder = artefacts.model_folder("smoke", "03_sft", "dLLM")
    done = exports.export(folder, "adapter", tmp_path / "out")
    assert {file.name for file in (done.folder / "twin").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "hilda.json"}
    assert "beside named/model" in str(done) and str(tmp_path) not in "".join(file.read_text(encoding="utf-8") for file in done.folder.rglob("*.json"))
    twin, handed = backbones.load(artefacts.model_folder("smoke", "03_sft", "AR twin"), dtype="float32", device="cpu")[0], backbones.load(done.folder, dtype="float32", device="cpu")[0]
    parent = backbones.load("named/model", dtype="float32", device="cpu")[0]
    again = tuned.start("AR twin", arm(tuned.recipe, "AR twin"))
    runs.load_finished(again, artefacts.model_folder("smoke", "03_sft", "AR twin"))  # as the notebook does once the twin is trained
    ids = torch.randint(1, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    far, near = ((model(input_ids=ids).logits - twin(input_ids=ids).logits)[..., :-1].abs().max() for model in (parent, handed))
    assert 0 < near < 0.02 * far
    assert torch.allclose(again(input_ids=ids).logits, twin(input_ids=ids).logits, atol=1e-5)
    assert handed.peft_config["default"].r == 4 and backbones.load(done.folder / "twin", dtype="float32", device="cpu")[0].peft_config["default"].r == 3
    with pytest.raises(HildaError, match="exported already"):
        exports.export(done.folder, "adapter", tmp_path / "again")
    whole = artefacts.model_folder("smoke", "03_sft", "AR twin")
    changed = backbones.load(whole, dtype="float32", device="cpu")
    with torch.no_grad():
        changed[0].model.norm.weight += 0.5
        changed[0].get_input_embeddings().weight[:70] += 0.1
    backbones.save(*changed, whole)
    monkeypatch.setattr("hildalib.handout.MOST", 16)
    with pytest.raises(HildaError, match="tuned in all its weights.*twin_rank"):
        exports.export(folder, "adapter", tmp_path / "whole")


@pytest.mark.parametrize("arguments, message", [(("04_decode",), "use 02_wsd or 03_sft"), (("02_wsd", "--profile", "smoke"), "needs the results of 01_data"),
                                                (("02_wsd", "--set", "lrr=1"), "did you mean 'lr'")])
def test_mistakes_are_explained(capsys, arguments, message):
    assert main(["train", *arguments]) == 2 and message in capsys.readouterr().err
