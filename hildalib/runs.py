"""The folder of a training run: whose it is, where it goes on, and when it is whole.

A finished run is folder/model and, written last, folder/log.csv; folder/checkpoints exists only while it runs.
Entry points: `fingerprint`, `digest`, `claim`, `resumable`, `load_finished`, `publish`.
"""

import hashlib
import json
import re
import shutil
import zipfile
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hildalib import HildaError, backbones
from hildalib.recipe import Recipe


def fingerprint(model, rows: dict[str, Tensor], recipe: Recipe) -> str:
    """What a run depends on; a checkpoint of another fingerprint is never resumed. Choices left at their default do not count, so an option
    that a later version adds throws no finished run away."""
    chosen = {field.name: value for field, value in zip(fields(recipe), asdict(recipe).values()) if field.default is MISSING or value != field.default}
    digest = hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode())
    for tensor in (*rows.values(), *(p.detach() for p in model.parameters())):
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()[:32]


def digest(source: Path) -> str:
    """What a model is: of the weights and records in a model's folder, and in the folder that its adapters lie on."""
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted([*source.glob("*.safetensors"), *source.glob("*.json")]):
        whole.update(file.read_bytes())
    if (source / backbones.ADAPTER_RECORD).is_file() and (base := Path(backbones.base_of(source))).is_dir():
        whole.update(digest(base).encode())
    return whole.hexdigest()


def claim(folder: Path, fingerprint: str) -> None:
    """Makes `folder` this run's own: what another recipe, text or parent left there is removed."""
    marker = folder / "fingerprint.txt"
    if marker.exists() and marker.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(fingerprint, encoding="utf-8")


def resumable(folder: Path) -> str | None:
    """The newest complete checkpoint; half-written ones (trainer_state.json is written last) and damaged ones are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            for file in checkpoint.glob("*.safetensors"):
                with safe_open(file, framework="pt"):
                    pass
            if all(map(zipfile.is_zipfile, (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")))):  # torch.save writes zip archives
                return str(checkpoint)
            shutil.rmtree(checkpoint)
        except (OSError, ValueError, SafetensorError):
            shutil.rmtree(checkpoint)
    return None


def load_finished(model, folder: Path) -> None:
    """Weights and `hilda` record of a model that `train` has saved."""
    if (folder / backbones.ADAPTER_RECORD).is_file():  # adapters that were not merged
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        model.config.hilda = model.config.hilda | json.loads((folder / backbones.ADAPTER_RECORD).read_text(encoding="utf-8"))["hilda"]
        return
    try:
        whole = load_file(folder / "model.safetensors")
        foreign = _under(model, whole) if hasattr(model, "peft_config") else model.load_state_dict(whole, strict=False).unexpected_keys  # absent: a tied head
        if foreign:
            raise HildaError(f"{folder} holds tensors that this model has not (first: {foreign[0]}); take it with backbones.load")
        model.config.hilda = model.config.hilda | json.loads((folder / "config.json").read_text(encoding="utf-8"))["hilda"]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise HildaError(f"{folder} is damaged ({error}); delete {folder.parent} and run again: it is trained anew") from error


@torch.no_grad()
def _under(model, whole: dict) -> list[str]:
    """Lays `whole`, the weights that adapters were merged into, under those of `model`, which then add nothing; returns the names it has no place for."""
    there = {re.sub(r"\.(token_adapter|base_layer)(?=\.)", "", name): tensor for name, tensor in model.get_base_model().state_dict().items()}
    for name, tensor in there.items():
        if name in whole:
            tensor.copy_(whole[name])
        elif ".lora_B." in name:
            tensor.zero_()
    tokens = getattr(model.get_input_embeddings(), "token_adapter", None)
    if tokens is not None:
        tokens.trainable_tokens_delta["default"].copy_(tokens.base_layer.weight[tokens.token_indices["default"]])
    return [name for name in whole if name not in there]


def publish(model, tokenizer, history, folder: Path) -> None:
    """The finished run: model, then log.csv, whose presence says that the run is whole; checkpoints go last."""
    backbones.save(model, tokenizer, folder / "model")
    temporary = folder / "log.tmp"
    history.to_csv(temporary, index=False)
    temporary.replace(folder / "log.csv")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
