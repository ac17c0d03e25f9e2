"""Backbones: a plain Hugging Face causal LM plus one atomic [MASK] token.

Entry points: `load` and `save` (folder, hub id, .gguf file, "smollm2-135m", "smollm2-135m-dllm", "nano"), `nano` (random init, character tokenizer),
`forbidden_ids`, `chat_prompt`; `with_lora`, `fetch`, `choose_dtype` and `device_report` from their own rooms. The class, the modelling
file and the safetensors layout are the parent's; `config.hilda` is the only addition, so a dLLM loads anywhere without remote code.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hildalib import HildaError, paths, weights, windows
from hildalib.adapters import mask_row, with_lora
from hildalib.devices import choose_device, choose_dtype, device_report, prepare  # noqa: F401  (device_report is part of this surface)
from hildalib.gated import gate, is_gated
from hildalib.nano import MASK_TOKEN, nano, nano_config  # noqa: F401
from hildalib.weights import fetch, quiet

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "OLMo2", "gemma3_text": "Gemma3"}  # config model_type -> name
QUANTIZE = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}
MIN_MASK_NORM = 0.1  # of the median embedding norm: a [MASK] row near zero makes the first diffusion steps explode (LLaDA2.0, 7.1)
ADAPTER_RECORD = "hilda.json"  # beside adapter_config.json: what the adapter sits on


# --- loading ---------------------------------------------------------------------------------------------------------------------

def load(name_or_path: str | os.PathLike, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto",
         quantize: str | None = None, lora: int | dict | None = None, base: str | os.PathLike | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in eval mode under sdpa attention, with its tokenizer and one [MASK] token (added if absent).

    name_or_path: folder, .gguf file, hub id, or a name that `weights` or `nano` registers. dtype, device: "auto" follows `choose_dtype`, `choose_device`.
    quantize: None, "nf4" or "int8" (bitsandbytes). lora: rank, or keyword arguments of peft's LoraConfig; trains adapters on every linear
    layer and the [MASK] row, everything else is frozen. base: of a folder that holds an adapter, the model to lay it over instead of the one that it
    was trained on, e.g. that one tuned since. `model.config.hilda` holds mask_token_id, block_size (None until converted),
    label_shift, stage ("ar" until converted), parent and, where known, the origin of the weights; config.eos_token_id is one int.
    Raises HildaError for an unknown name or family, a broken or foreign file, or a device that is absent.
    """
    if quantize not in (None, *QUANTIZE):
        raise HildaError(f"quantize={quantize!r}; use None, " + " or ".join(map(repr, QUANTIZE)))
    name = str(name_or_path)
    device = choose_device(device)
    dtype = choose_dtype(device, dtype)
    prepare(device)
    if name == "nano":
        if quantize:
            raise HildaError("nano is too small to quantise; load it with quantize=None")
        model, tokenizer = nano()
        model.to(device, dtype)
    elif name.endswith(".gguf"):
        if quantize:
            raise HildaError(f"{name} is quantised already and is read as plain weights; save it as a folder first, then quantise that")
        with _explained(Path(name)), quiet():
            model, tokenizer = weights.load_gguf(Path(name))
        _check_family(model.config, Path(name))
        model.set_attn_implementation("sdpa")
        model.to(device, dtype)
    else:
        folder = _recovered(Path(name)) if Path(name).parent.is_dir() else Path(name)
        folder = fetch(folder if folder.is_dir() else name)
        if (folder / ADAPTER_RECORD).is_file():
            if lora is not None:
                raise HildaError(f"{folder} holds a LoRA adapter already; load it with lora=None")
            return _load_adapter(folder, dtype, device, quantize, base)
        if base is not None:
            raise HildaError(f"{folder} holds whole weights, which are laid over nothing; leave out base={str(base)!r}")
        model, tokenizer = _load_folder(folder, dtype, device, quantize)
        name = str(folder.resolve()) if Path(name).is_dir() else name
    _complete(model, tokenizer, name)
    model.name_or_path = name  # what an adapter remembers as its base
    model = model if lora is None else with_lora(model, lora)
    return model.eval(), tokenizer


def _load_folder(folder: Path, dtype: torch.dtype, device: torch.device, quantize: str | None):
    if not (folder / "config.json").is_file():
        raise HildaError(f"{folder}/config.json is missing; point to a folder written by `save_pretrained` or to a hub id")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise HildaError(f"{folder} has no *.safetensors file; other formats are refused because loading them may run code: convert the weights "
                         "with model.save_pretrained(...)")
    for file in files:
        with _explained(file), safe_open(file, framework="pt"):
            pass
    with _explained(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder)
    _check_family(config, folder / "config.json")
    tokenizer = _read_tokenizer(folder)
    options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True, "output_loading_info": True}
    if quantize:
        from transformers import BitsAndBytesConfig

        compute = {"bnb_4bit_compute_dtype": dtype} if quantize == "nf4" else {}
        options |= {"quantization_config": BitsAndBytesConfig(**QUANTIZE[quantize], **compute), "device_map": {"": device}}
    with _explained(files[0]), quiet():
        model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack weights for a kernel in bfloat16, whatever dtype was asked for
    absent = sorted(info["missing_keys"])
    if absent:
        raise HildaError(f"the weights in {folder} lack {len(absent)} tensors that its config.json calls for (first: {absent[0]}); take "
                         "config.json and *.safetensors from the same checkpoint")
    return model if quantize or getattr(model, "is_quantized", False) else model.to(device), tokenizer


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` gives beside the model, without loading its weights."""
    if name == "nano" or name.endswith(".gguf"):
        return load(name)[1]
    folder = fetch(name)
    tokenizer = _read_tokenizer(folder)
    with _explained(folder / "config.json"):
        _ensure_eos(SimpleNamespace(config=AutoConfig.from_pretrained(folder)), tokenizer, name)
    _ensure_mask(tokenizer)
    return tokenizer


def _ensure_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": AddedToken(MASK_TOKEN, special=True, normalized=False)})


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with _explained(folder / "tokenizer.json"):
        # Auto would rebuild the pipeline from the family (a Qwen model gets Qwen's pre-tokenizer, whatever its tokenizer.json says).
        exact = (folder / "tokenizer.json").is_file()
        return (PreTrainedTokenizerFast if exact else AutoTokenizer).from_pretrained(folder)


def _check_family(config, file: Path) -> None:
    if config.model_type not in FAMILIES:
        raise HildaError(f"{file}: model_type {config.model_type!r} is not supported; use one of the families "
                         + ", ".join(FAMILIES.values()) + " (text-only checkpoints)")


@contextlib.contextmanager
def _explained(file: Path):
    """Turns what libraries raise over a damaged file into one HildaError that names it."""
    try:
        yield
    except HildaError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HildaError(f"cannot read {file}: {reason}; the file is missing, damaged or of another model: download it again") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises bare Exception on a damaged tokenizer.json
            raise
        raise HildaError(f"cannot read {file}: {error}; download it again") from error


# --- the one token ---------------------------------------------------------------------------------------------------------------

def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Adds what a parent lacks: EOS, pad, [MASK] with its embedding row, and the `hilda` record."""
    weight = model.get_input_embeddings().weight
    known, rows = getattr(model.config, "hilda", None) or {}, len(weight)
    added = set(tokenizer.added_tokens_decoder)
    top = max((i for i in tokenizer.get_vocab().values() if i not in added), default=0)
    if max(top, known.get("mask_token_id", 0)) >= rows:
        raise HildaError(f"the tokenizer of {name} has ids up to {max(top, known.get('mask_token_id', 0))} but its weights have {rows} embedding "
                         "rows; take tokenizer.json and *.safetensors from the same checkpoint")
    _ensure_eos(model, tokenizer, name)
    before = set(tokenizer.get_vocab().values())
    _ensure_mask(tokenizer)
    mask = tokenizer.mask_token_id
    if known.get("mask_token_id", mask) != mask:
        raise HildaError(f"{name}: config.json records mask id {known['mask_token_id']}, the tokenizer has {mask}; take both from the same folder")
    ids = tokenizer(f"a{tokenizer.mask_token}b", add_special_tokens=False).input_ids
    if ids.count(mask) != 1 or len(ids) < 3:
        raise HildaError(f"{name}: the tokenizer does not keep {tokenizer.mask_token} as one token inside a text; its tokenizer.json cannot be used")
    fresh = mask >= rows or mask not in before
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        with torch.no_grad(), quiet():
            model.resize_token_embeddings(needed, mean_resizing=False)
    if fresh:
        real = torch.tensor(sorted(i for i in before if i < rows))
        _set_mask_row(model, mask, real, range(rows, needed))
    model.config.hilda = {"block_size": None, "label_shift": True, "causal_context": False, "stage": "ar", "parent": name, **known, "mask_token_id": mask}
    windows.guard(model)


@torch.no_grad()
def _set_mask_row(model: PreTrainedModel, mask: int, real: torch.Tensor, new: range) -> None:
    """Mean of the real rows for [MASK] and every row that had none. As an output its logit is then the mean logit, so by Jensen it
    takes at most 1/V of the probability from the parent's tokens."""
    seen = {}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = layer.weight
        if weight.data_ptr() in seen:  # tied
            continue
        seen[weight.data_ptr()] = True
        table = weight[real.to(weight.device)].float()
        row = table.mean(0)
        if layer is model.get_input_embeddings():
            row = row * max(1.0, MIN_MASK_NORM * table.norm(dim=1).median().item() / row.norm().clamp_min(1e-12).item())
        weight[sorted({mask, *new})] = row.to(weight)


def _ensure_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    listed = model.config.eos_token_id
    first = listed[0] if isinstance(listed, (list, tuple)) and listed else listed
    if tokenizer.eos_token_id is None and isinstance(first, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    if tokenizer.eos_token_id is None:
        raise HildaError(f"{name} names no end-of-sequence token; set eos_token in its tokenizer_config.json or eos_token_id in its config.json")
    model.config.eos_token_id = tokenizer.eos_token_id  # one int: what packing appends is what decoding stops at
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def forbidden_ids(model, tokenizer: PreTrainedTokenizerBase, *, keep_eos: bool = False) -> torch.Tensor:
    """Sorted ids (n,) long on the CPU that are no text: specials, [MASK] and padded rows (embedding rows without a token).

    Never drawn as T2T noise, never an output; keep_eos=True leaves EOS out of the list, for the outputs of a decoder.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    special |= {model.config.hilda["mask_token_id"], *(set(range(rows)) - set(tokenizer.get_vocab().values()))}
    return torch.tensor(sorted(special - ({tokenizer.eos_token_id} if keep_eos else set())), dtype=torch.long)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """`prompt` as one user turn of the tokenizer's chat template, open for the answer; unchanged where there is no template."""
    if not tokenizer.chat_template:
        return prompt
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)


# --- adapters --------------------------------------------------------------------------------------------------------------------

def _load_adapter(folder: Path, dtype: torch.dtype, device: torch.device, quantize: str | None, base: str | os.PathLike | None):
    from peft import PeftModel

    record, name = _record(folder), str(base or base_of(folder))
    model, tokenizer = load(name, dtype=dtype, device=device, quantize=quantize or record["quantize"])
    if is_gated(model):
        raise HildaError(f"the base of {folder}, {name!r}, is itself drafted for by adapters on noisy rows; name what those lie on")
    if hasattr(model, "peft_config"):  # a tuned base that is handed out as adapters of its own
        model = model.merge_and_unload()
        model.name_or_path = name
    trained, here = record["hilda"].get("weights"), model.config.hilda.get("weights")
    if trained != here:
        raise HildaError(f"the adapter in {folder} was trained on {trained}, but {name!r} is {here} on this machine; fetch those weights and "
                         f"name them as \"base\" in {folder / ADAPTER_RECORD} (those of the package index: {weights.INSTRUCT!r})")
    with _explained(folder / "adapter_model.safetensors"), quiet():
        model = mask_row(PeftModel.from_pretrained(model, folder, is_trainable=True))
    model.config.hilda = record["hilda"]
    return (gate(model) if record["hilda"].get("gated") else model).eval(), tokenizer


def _record(folder: Path) -> dict:
    with _explained(folder / ADAPTER_RECORD):
        return json.loads((folder / ADAPTER_RECORD).read_text(encoding="utf-8"))


def base_of(folder: Path) -> str:
    """What the adapter in `folder` lies on, by its record: a name, or a folder, looked for beside the adapter first."""
    base = _record(folder)["base"]
    beside = (folder / base).resolve()
    return str(beside) if beside.is_dir() else base


# --- saving ----------------------------------------------------------------------------------------------------------------------

def save(model, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> Path:
    """Writes model and tokenizer as `folder`: complete or not at all; an earlier model there is replaced as a whole.

    Plain models and merged copies of LoRA models become an ordinary Hugging Face folder (safetensors). LoRA on quantised weights cannot be
    merged exactly, LoRA on noisy rows (`gated.gate`) not at all: the adapter is saved with a note on its base, and `load` puts both together again.
    Raises HildaError if `folder` holds anything that is not a model, or cannot be written.
    """
    target = _recovered(Path(folder).resolve())
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or _is_model(target))):
        raise HildaError(f"{target} exists and is not a model folder; choose another folder, nothing was written")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = weights.scratch_folder(target)
        try:
            with quiet():
                _write(model, scratch)
                tokenizer.save_pretrained(scratch)
            if target.exists():
                os.replace(target, _backup(target))
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            _recovered(target)
            shutil.rmtree(_backup(target), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise HildaError(f"cannot write {target}: {error}; free some space or choose another folder (an earlier model there is kept)") from error
    return target


def _write(model, folder: Path) -> None:
    if not hasattr(model, "peft_config"):
        weights.drop_gguf_traces(model).save_pretrained(folder)
    elif (quantized := getattr(model.config, "quantization_config", None)) is None and not is_gated(model):
        copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
    else:
        how = None if quantized is None else "nf4" if quantized.load_in_4bit else "int8"
        record = {"base": paths.portable(model.get_base_model().name_or_path, folder), "quantize": how, "hilda": model.config.hilda,
                  "note": "LoRA adapter that is not merged into its base; hildalib.backbones.load of this folder loads the base and adds it"}
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / ADAPTER_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_RECORD).is_file()


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _recovered(folder: Path) -> Path:
    """`folder`, put back first if a `save` was killed between its two renames."""
    if not folder.exists() and _backup(folder).is_dir():
        os.replace(_backup(folder), folder)
    return folder
