"""`hilda tune`: a handed-out model goes on learning in both its adapters, another one in all its weights; pairs of one's own; what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hildalib import HildaError, backbones, exports, tuning
from hildalib.__main__ import main
from hildalib.decoding import ar_decode, self_speculate
from hildalib.gated import gate
from hildalib.nano import nano

FEW = {"profile": "smoke", "overrides": {"adapter_lr": 0.01, "context_weight": 0.0, "kl_weight": 0.5, "twin_rank": 3, "lr": 0.02}}


@pytest.fixture
def sums(tmp_path):
    """A file of pairs: sums of one digit."""
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n % 10}+1=", "response": f"{n % 10 + 1};"}) + "\n" for n in range(40)))
    return str(file)


@pytest.fixture
def handed(tmp_path, monkeypatch):
    """Adapters to hand out over a model with a name: those of its tuning and those that draft."""
    model, tokenizer = nano(32, 2)
    model.config.hilda |= {"parent": "named/model"}
    base, fetch = backbones.save(model, tokenizer, tmp_path / "named"), backbones.fetch
    monkeypatch.setattr(backbones, "fetch", lambda name: base if str(name) == "named/model" else fetch(name))
    for place, rank, record in (("whole", 3, {"block_size": 1}), ("drafts", 4, {"block_size": 4, "causal_context": True})):
        adapted = backbones.with_lora(backbones.load(tmp_path / "whole" if rank == 4 else "named/model", dtype="float32", device="cpu")[0], rank)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(rank))
        adapted.config.hilda = adapted.config.hilda | record | {"stage": "sft", "parent": "named/model"}
        backbones.save(gate(adapted) if rank == 4 else adapted, tokenizer, tmp_path / place)
    return exports.export(tmp_path / "drafts", "adapter", tmp_path / "handed").folder


def logits(folder):
    with torch.no_grad():
        return backbones.load(folder, dtype="float32", device="cpu")[0](input_ids=torch.arange(6, 18)[None]).logits


def test_a_handed_out_model_learns_in_both_its_adapters_and_can_be_handed_out_again(handed, sums, tmp_path, monkeypatch):
    plan = tuning.Plan([sums], steps=30, draft_steps=2, length=64, **FEW)
    made = tuning.tune(str(handed), str(tmp_path / "more"), plan)
    assert {file.name for file in made.iterdir()} >= {"adapter_model.safetensors", "hilda.json", "README.md", "twin"}
    card = (made / "README.md").read_text()
    assert "Tuned further by `hilda tune`" in card and "sums.jsonl" in card and str(tmp_path) not in card
    targets = json.loads((made / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 14 and targets == sorted(targets)  # the same folder, whatever order a set has
    record = json.loads((made / "hilda.json").read_text())["hilda"]
    assert (record["block_size"], record["stage"], record["parent"], record["gated"]) == (4, "sft", "named/model", True)
    model = backbones.load(made, dtype="float32", device="cpu")[0]
    assert model.peft_config["default"].r == 4 and backbones.load(made / "twin", device="cpu")[0].peft_config["default"].r == 3
    assert torch.allclose(logits(made), logits(tmp_path / "more" / "twin" / "model"), atol=0.02)  # adapters handed out are in bfloat16
    assert (logits(made) - logits(handed)).abs().max() > 0.1  # what reads has learned
    monkeypatch.setattr("hildalib.training.DiffusionTrainer.train", lambda *_, **__: pytest.fail("trained again"))
    assert tuning.tune(str(handed), str(tmp_path / "more"), plan) == made
    with pytest.raises(HildaError, match="by other settings"):
        tuning.tune(str(handed), str(tmp_path / "more"), replace(plan, steps=31))


def ending(prompts, folder):
    """A nano model in `folder` some of whose greedy texts of 36 tokens after `prompts` end: a token that is in half of them is its EOS."""
    model, tokenizer = nano(32, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 4 if weight.ndim > 1 else 1  # or it would say one token for ever
    texts = ar_decode(model, tokenizer(prompts, return_tensors="pt", add_special_tokens=False)["input_ids"], max_new_tokens=36).ids
    common = [int((texts == token).any(1).sum()) for token in range(len(tokenizer))]
    model.config.eos_token_id = min(range(len(common)), key=lambda token: abs(common[token] - len(prompts) / 2))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    return backbones.save(model, tokenizer, folder)


def test_a_base_answers_the_prompts_itself_and_only_what_ends_is_learned(tmp_path, monkeypatch):
    prompts = [f"{n}+{m}=" for n in range(5) for m in range(4)]
    model, tokenizer = backbones.load(folder := ending(prompts, tmp_path / "base"), dtype="float32", device="cpu")
    encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"] + [[5] * 70]
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)
    found = tuning.own_answers(folder, encoded, 40, "float32", tmp_path, alone)
    expected = []
    for prompt in encoded[:-1]:
        ids = ar_decode(model, torch.tensor([prompt]), max_new_tokens=36).ids[0].tolist()
        expected += [(prompt, ids[:ids.index(tokenizer.eos_token_id)])] if tokenizer.eos_token_id in ids else []
    assert found == expected and 0 < len(found) < 20
    second = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False, wait_for_everyone=lambda: tuning.own_answers(
        folder, encoded, 40, "float32", tmp_path, SimpleNamespace(**{**vars(alone), "num_processes": 2})) if not (tmp_path / "answers-0-of-2.csv").exists() else None)
    assert sorted(tuning.own_answers(folder, encoded, 40, "float32", tmp_path, second)) == sorted(found)
    monkeypatch.setattr(tuning, "ar_decode", lambda *_, **__: pytest.fail("asked again"))
    assert tuning.own_answers(folder, encoded, 40, "float32", tmp_path, alone) == found


def test_drafting_adapters_can_learn_alone_on_what_their_base_answers(handed, tmp_path, monkeypatch):
    (prompts := tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(40)))
    tokenizer = nano(32, 2)[1]
    monkeypatch.setattr(tuning, "own_answers", lambda base, *rest: answered.append(base) or [([7, 8, 9], [10, 11, 12, 13, 14])] * 9)
    answered = []
    plan = tuning.Plan([str(prompts)], steps=0, draft_steps=40, own_answers=True, length=64, **FEW)
    made = tuning.tune(str(handed), str(tmp_path / "more"), plan)
    assert answered == [str(handed / "twin")]
    for file in (handed / "twin").iterdir():
        assert (made / "twin" / file.name).read_bytes() == file.read_bytes()  # it stays, to the byte
    told = json.loads((tmp_path / "more" / "tuning.json").read_text())
    assert told["own_answers"] and told["steps"] == 0 and json.dumps(told, indent=1) in (made / "README.md").read_text()
    model, base = (backbones.load(folder, dtype="float32", device="cpu")[0] for folder in (made, made / "twin"))
    prompt = torch.tensor([[7, 8, 9]])
    assert torch.equal(self_speculate(model, prompt, max_new_tokens=12).ids, ar_decode(base, prompt, max_new_tokens=12).ids)  # what is written is the base's
    plain, _ = nano(32, 2)
    plain.config.hilda |= {"block_size": 4}
    with pytest.raises(HildaError, match="needs steps of its own"):
        tuning.tune(str(backbones.save(plain, tokenizer, tmp_path / "plain")), str(tmp_path / "other"), plan)


def test_a_base_without_adapters_of_its_own_is_given_some(handed, sums, tmp_path):
    (record := json.loads((handed / "hilda.json").read_text()))["base"] = "named/model"
    (handed / "hilda.json").write_text(json.dumps(record))
    made = tuning.tune(str(handed), str(tmp_path / "more"), tuning.Plan([sums], steps=3, draft_steps=1, length=64, **FEW))
    assert backbones.load(made / "twin", device="cpu")[0].peft_config["default"].r == 3


def test_what_lies_on_weights_that_nobody_else_has_stays_where_it_was_trained(handed, sums, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hildalib.handout.MOST", 2)  # a base of which more than that has changed counts as tuned in all its weights
    made = tuning.tune(str(handed), str(tmp_path / "more"), tuning.Plan([sums], steps=3, draft_steps=1, length=64, **FEW))
    assert made == tmp_path / "more" / "drafts" / "model" and "cannot be handed out" in capsys.readouterr().out
    assert backbones.load(made, dtype="float32", device="cpu")[0].config.hilda["stage"] == "sft"


def test_another_model_learns_in_all_its_weights_under_the_objective_that_is_named(sums, tmp_path):
    model, tokenizer = nano(32, 2)
    model.config.hilda |= {"block_size": 4, "label_shift": False}
    backbones.save(model, tokenizer, tmp_path / "plain")
    plan = tuning.Plan([f"{sums}=8", "arithmetic=20"], steps=3, length=64, arm="plain conversion", **FEW)
    made = tuning.tune(str(tmp_path / "plain"), str(tmp_path / "more"), plan)
    again = backbones.load(made, dtype="float32", device="cpu")[0]
    assert again.config.hilda["label_shift"] is False and again.config.hilda["stage"] == "sft"
    assert all(not torch.equal(one, other) for one, other in zip(again.model.layers.parameters(), model.model.layers.parameters()))


def test_pairs_are_read_from_a_file_a_line_each(sums, tmp_path):
    tokenizer = nano(32, 2)[1]
    assert tuning.pairs_of(sums, tokenizer, 2, seed=0) == [("0+1=", "1;"), ("1+1=", "2;")]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n{"prompt": 3, "response": "2"}\n')
    with pytest.raises(HildaError, match=r"bad.jsonl, line 2: not \{"):
        tuning.pairs_of(str(tmp_path / "bad.jsonl"), tokenizer, 9, seed=0)
    with pytest.raises(HildaError, match="absent.jsonl is not there"):
        tuning.pairs_of(str(tmp_path / "absent.jsonl"), tokenizer, 9, seed=0)


def test_the_command_refuses_a_model_that_is_not_converted_and_tells_what_comes_next(sums, tmp_path, capsys):
    model, tokenizer = nano(32, 2)
    backbones.save(model, tokenizer, tmp_path / "ar")
    common = ["tune", "--sources", sums, "--out", str(tmp_path / "more"), "--profile", "smoke", "--steps", "1", "--length", "64"]
    assert main([*common, "--model", str(tmp_path / "ar")]) == 2
    assert "is autoregressive; convert it first" in capsys.readouterr().err
    model.config.hilda |= {"block_size": 4, "causal_context": True}
    backbones.save(model, tokenizer, tmp_path / "dllm")
    assert main([*common, "--model", str(tmp_path / "dllm")]) == 0
    printed = capsys.readouterr().out
    assert "40 pairs in" in printed and "next: hilda generate" in printed and "every weight" in printed
