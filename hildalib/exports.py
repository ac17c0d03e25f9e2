"""Models for other programs: each written whole or not at all, read back, and compared with its source.

hf: a folder to push to a hub, plain Transformers, with a model card. gguf: float32 weights for engines that decode from left to right. onnx: a
graph whose attention mask is an input, hence AR and block diffusion. int8: eight-bit linear layers (bitsandbytes). merged: adapters of a
quantised base, added to its weights. adapter: gated adapters in bfloat16, to be handed out beside a base that has a name (`handout`). Entry points:
`export`, `FORMS`; `Exported` from `readback`.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hildalib import HildaError, backbones, weights, windows
from hildalib.cards import card
from hildalib.gated import is_gated
from hildalib.handout import adapter
from hildalib.readback import Exported, checked, compared, logits_of, sample

ROUNDED = ("int8", "adapter")  # forms whose weights are not quite those of the source
EXACT = 1e-3  # largest difference of logits, as a share of the largest logit, that float32 in another order of operations explains
CLOSE = 0.1  # nats, mean KL of the source's distributions from those of rounded weights, above which an export is not kept (ours)
GGUF = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type -> architecture of gguf and of Transformers' reader
SPLITS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}  # what gguf calls the split of a text before merges; unseen by the check here


def export(model: str | os.PathLike, to: str, out: str | os.PathLike | None = None, *, license: str | None = None) -> Exported:
    """Writes `model` (folder, hub id or registered name) in the form `to` as folder `out` (default: beside it, with the form's name).

    license: of the weights, for the card. Raises HildaError where the folder exists, the form does not fit the model, or what was read back
    computes something else; then nothing is left.
    """
    if to not in FORMS:
        raise HildaError(f"export to {to!r} is unknown; use one of {', '.join(FORMS)}")
    name, local = str(model).rstrip("/").rpartition("/")[2], Path(model).is_dir()
    source = Path(model) if local or str(model) in (weights.SMOL, weights.INSTRUCT) else weights.fetch(model)
    target = Path(out) if out else source.absolute().with_name(f"{source.name}-{to}") if local else Path(f"{name}-{to}").absolute()
    if target.exists():
        raise HildaError(f"{target} exists; remove it or choose another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = weights.scratch_folder(target)
    try:
        exported = FORMS[to](source, scratch, license)
        limit, found = (CLOSE, exported.kl) if to in ROUNDED else (EXACT, exported.difference)
        if not found <= limit:  # nan too
            raise HildaError(f"the {to} export of {source} computes something else ({exported}); it is not kept: please report this with the "
                             "model's config.json")
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(to, target, exported.difference, exported.kl, exported.same, exported.note)


# ---- sources and readers ----------------------------------------------------------------------------------------------------------

def _plain(folder: Path):
    """The model as anyone loads it: Transformers alone, no remote code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, device_map={"": "cpu"}).eval()


def _source(source: Path):
    """(model, tokenizer) in float32 on the CPU, whole: adapters that can be merged are; gated ones are refused."""
    model, tokenizer = backbones.load(source, dtype="float32", device="cpu")
    _refuse_gated(model)
    if hasattr(model, "peft_config"):
        raise HildaError(f"{source} holds adapters beside a quantised base; first: hilda export {source} --to merged")
    parent = model.config.hilda.get("parent")
    if parent and Path(parent).is_absolute():  # whoever gets the export has no such folder
        model.config.hilda = model.config.hilda | {"parent": Path(parent).name}
    return model, tokenizer


def _refuse_gated(model) -> None:
    if is_gated(model):
        raise HildaError("gated adapters act on noisy rows only, and plain weights act on all rows: merged, they would change what reads the clean "
                         "context too, and the model would no longer be its parent there; keep the adapter folder and load it with backbones.load")


# ---- forms ----------------------------------------------------------------------------------------------------------------------

def _hf(source: Path, folder: Path, license: str | None) -> Exported:
    model, tokenizer = _source(source)
    return _published("hf", source, folder, model, tokenizer, license)


def _merged(source: Path, folder: Path, license: str | None) -> Exported:
    """Base in float32 plus adapters; those were trained beside the quantised base, so the sum differs from it by the base's rounding."""
    from peft import PeftModel

    record = source / backbones.ADAPTER_RECORD
    if not record.is_file():
        raise HildaError(f"{source} has no {backbones.ADAPTER_RECORD}: it holds no separate adapters, and there is nothing to merge; use --to hf")
    kept = json.loads(record.read_text(encoding="utf-8"))
    base, tokenizer = backbones.load(backbones.base_of(source), dtype="float32", device="cpu")
    if kept["hilda"].get("gated"):
        base.row_gate = None
        _refuse_gated(base)
    model = PeftModel.from_pretrained(base, source).eval()
    model.config.hilda = kept["hilda"]
    note = f"merged into the float32 base; the adapters were trained beside its {kept['quantize']} form" if kept["quantize"] else ""
    return _published("merged", source, folder, model, tokenizer, license, note)


def _published(form: str, source: Path, folder: Path, model, tokenizer, license: str | None, note: str = "") -> Exported:
    """A folder of plain Transformers with a card, loaded once more by Transformers alone."""
    from transformers import AutoTokenizer

    logits = logits_of(model)
    saved = backbones.save(model, tokenizer, folder / "whole")
    for file in saved.iterdir():
        os.replace(file, folder / file.name)
    saved.rmdir()
    sample = "12+34=46; The cat sat."
    if AutoTokenizer.from_pretrained(folder)(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise HildaError(f"the tokenizer of {source} is read as another one by Transformers' AutoTokenizer; set tokenizer_class in its "
                         "tokenizer_config.json")
    exported = compared(form, folder, logits_of(_plain(folder)), logits, note)
    (folder / "README.md").write_text(card(source, model, checked(exported), license), encoding="utf-8")
    return exported


def _int8(source: Path, folder: Path, license: str | None) -> Exported:
    model, tokenizer = _source(source)
    small, _ = backbones.load(source, dtype="float32", device="cpu", quantize="int8")
    small.config.hilda = model.config.hilda
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    exported = compared("int8", folder, logits_of(_plain(folder)), logits_of(model), "needs bitsandbytes to load")
    (folder / "README.md").write_text(card(source, model, checked(exported), license), encoding="utf-8")
    return exported


def _onnx(source: Path, folder: Path, license: str | None) -> Exported:
    """model.onnx: input_ids, position_ids (B, Q) int64 and attention_mask (B, 1, Q, Q) bool, True = may attend -> logits (B, Q, V). No cache."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HildaError(f"export to onnx needs the package {error.name}: python -m pip install -c constraints.txt -e \".[export]\"") from None
    model, tokenizer = _source(source)

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, position_ids, attention_mask):
            return self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False).logits

    ids, positions, masks = sample(model)
    rows, columns = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=2, max=windows.context_limit(model))
    torch.onnx.export(Graph().eval(), (ids[:, :10], positions[:, :10], masks[0, :, :, :10, :10]), folder / "model.onnx", dynamo=True, verbose=False,
                      input_names=["input_ids", "position_ids", "attention_mask"], output_names=["logits"],
                      external_data=model.num_parameters() > 2**28,  # a graph in one file holds at most 2 GiB
                      dynamic_shapes=({0: rows, 1: columns}, {0: rows, 1: columns}, {0: rows, 2: columns, 3: columns}))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = [session.run(None, {"input_ids": ids.numpy(), "position_ids": positions.numpy(), "attention_mask": mask.numpy()})[0] for mask in masks]
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    note = f"block size {model.config.hilda['block_size']}, [MASK] {model.config.hilda['mask_token_id']}: in config.json, key hilda"
    return compared("onnx", folder, torch.stack([torch.from_numpy(one) for one in found]).float(), logits_of(model), note)


def _gguf(source: Path, folder: Path, license: str | None) -> Exported:
    """model.gguf, float32. Engines that read it decode from left to right, as the model at block size 1; read back by Transformers, not llama.cpp."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = _source(source)
    config, family = model.config, model.config.model_type
    if family not in GGUF:
        raise HildaError(f"export to gguf knows {', '.join(GGUF)}, not {family!r}; use --to hf")
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        raise HildaError("export to gguf knows plain rotary positions only; this model scales them: use --to hf")
    arch = getattr(gguf.MODEL_ARCH, GGUF[family])
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), gguf.MODEL_ARCH_NAMES[arch])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for add, value in ((writer.add_name, source.name), (writer.add_context_length, config.max_position_embeddings),
                       (writer.add_embedding_length, config.hidden_size), (writer.add_block_count, config.num_hidden_layers),
                       (writer.add_feed_forward_length, config.intermediate_size), (writer.add_head_count, config.num_attention_heads),
                       (writer.add_head_count_kv, config.num_key_value_heads), (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
                       (writer.add_rope_freq_base, config.rope_parameters["rope_theta"]), (writer.add_rope_dimension_count, width), (writer.add_key_length, width), (writer.add_value_length, width),
                       (writer.add_vocab_size, config.vocab_size), (writer.add_file_type, gguf.LlamaFileType.ALL_F32)):
        add(value)
    _gguf_tokenizer(writer, tokenizer, config.vocab_size, "qwen2" if family.startswith("qwen") else None)
    names, tied = gguf.get_tensor_name_map(arch, config.num_hidden_layers), config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name.startswith("lm_head."):
            continue
        table = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if family == "llama" and f".{part}." in name:
                table = turned(table, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # The reader takes the width of a Qwen3 head for 128, whatever the file says; the config says it too.
    back = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", config=copy.deepcopy(config)).eval()
    sample, note = "12+34=46; The cat sat.", "the file holds the weights; diffusion needs hildalib and the record in config.json, key hilda"
    try:
        same = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    except Exception:  # the reader knows few kinds of tokenizers
        same = False
    note += "" if same else "; Transformers' reader does not rebuild this tokenizer from it, so keep tokenizer.json beside it"
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return compared("gguf", folder, logits_of(back, masked=False), logits_of(model, masked=False), note)


def turned(table, heads: int):
    """Rows of a query or key projection, numpy (heads * width, ...), as gguf's Llama wants them: it rotates neighbours, Hugging Face's halves."""
    return table.reshape(heads, 2, len(table) // heads // 2, *table.shape[1:]).swapaxes(1, 2).reshape(table.shape)


def _gguf_tokenizer(writer, tokenizer, rows: int, split: str | None) -> None:
    """Vocabulary, kinds and merges; a tokenizer of single characters is byte-level BPE without merges. split: None to look it up in `SPLITS`."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    core, before, added = whole["model"], whole["pre_tokenizer"] or {}, tokenizer.added_tokens_decoder
    kinds_before = tuple(part["type"] for part in before.get("pretokenizers", [before] if before else []))
    if core["type"] not in ("BPE", "WordLevel"):
        raise HildaError(f"export to gguf knows BPE and character tokenizers, not {core['type']}; use --to hf")
    spelt = bytes_to_unicode()
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(rows):
        token = known.get(number)
        kind = gguf.TokenType.UNUSED if token is None else gguf.TokenType.CONTROL if number in added else gguf.TokenType.NORMAL
        if core["type"] == "WordLevel" and kind == gguf.TokenType.NORMAL and not (token.startswith("[") and len(token) > 1):
            token = "".join(spelt[byte] for byte in token.encode())
        tokens.append(f"[unused{number}]" if token is None else token)
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split or SPLITS.get(kinds_before, "default"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in core.get("merges", [])])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_mask_token_id(tokenizer.mask_token_id)
    writer.add_add_bos_token(False)
    for add, value in ((writer.add_bos_token_id, tokenizer.bos_token_id), (writer.add_pad_token_id, tokenizer.pad_token_id),
                       (writer.add_chat_template, tokenizer.chat_template)):
        if value is not None:
            add(value)


FORMS: dict[str, Callable[[Path, Path, str | None], Exported]] = {"hf": _hf, "gguf": _gguf, "onnx": _onnx, "merged": _merged, "int8": _int8, "adapter": adapter}
