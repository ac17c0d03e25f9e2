"""Exports: what is written computes what its source computes, in the program it is for; what cannot be written says why; nothing half-made stays."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hildalib import HildaError, attention, backbones, exports, nano
from hildalib.__main__ import main
from hildalib.engine import open_engine
from hildalib.gated import gate

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
    assert "that of the" not in card and "licence of their parent" in exports.card(folder, model, done, None)


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


def test_what_cannot_be_exported_leaves_nothing(tmp_path, monkeypatch, capsys):
    folder = backbones.save(*llama(), tmp_path / "model")
    with pytest.raises(HildaError, match="unknown; use one of hf, gguf, onnx, merged, int8"):
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
