"""What one notebook leaves for the next: rows as safetensors, numbers as metrics.json, models as folders.

A missing or damaged artefact is one error that names the file and the command that makes it. Entry points: `save_rows`,
`load_rows`, `model_folder`, `write_metrics`, `read_metrics`, `seeds_done`; `kept`, a table that an interrupted run need not make again.
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hildalib
from hildalib import HildaError, paths


def _need(path: Path, profile: str, notebook: str) -> Path:
    if not path.exists():
        raise HildaError(f"{path} is missing; make it with: python -m hildalib run {notebook}" + (f" --profile {profile}" if profile != "smoke" else "")
                         + " (or run that notebook first)")
    return path


def save_rows(rows: dict[str, torch.Tensor], profile: str, notebook: str, name: str, seed: int = 0) -> Path:
    """Writes rows (each tensor (N, L)) as checkpoints/<name>.safetensors of a notebook, atomically."""
    path = paths.checkpoint_dir(profile, notebook, seed) / f"{name}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({key: value.contiguous() for key, value in rows.items()}, temporary)
    os.replace(temporary, path)
    return path


def load_rows(profile: str, notebook: str, name: str, seed: int = 0, *, vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """What `save_rows` wrote. vocab_size: ids at or above it mean that another tokenizer wrote the rows (HildaError)."""
    path = _need(paths.checkpoint_dir(profile, notebook, seed, create=False) / f"{name}.safetensors", profile, notebook)
    try:
        rows = load_file(path)
    except (SafetensorError, OSError) as error:
        raise HildaError(f"{path} is damaged ({error}); delete it and run {notebook} again") from error
    if vocab_size and int(rows["input_ids"].max()) >= vocab_size:
        raise HildaError(f"{path} holds token id {int(rows['input_ids'].max())}, the model has {vocab_size}; run {notebook} with the same `model`")
    return rows


def model_folder(profile: str, notebook: str, arm: str, seed: int = 0, *, otherwise: str | None = None) -> Path | str:
    """Folder of a model that a notebook trained. otherwise: the name to give where it is not there; None: a HildaError."""
    folder = paths.checkpoint_dir(profile, notebook, seed, create=False) / arm / "model"
    return otherwise if otherwise is not None and not folder.exists() else _need(folder, profile, notebook)


def write_metrics(metrics: dict, profile: str, notebook: str, seed: int = 0, *, model=None) -> None:
    """metrics.json of a notebook, with the device and library versions that made it; written last, atomically."""
    device = "cpu" if model is None else str(model.device)
    name = torch.cuda.get_device_name(model.device) if device.startswith("cuda") else platform.processor() or platform.machine()
    record = metrics | {"seed": seed, "device": f"{device} ({name}, {torch.get_num_threads()} threads)",
                        "versions": {package.__name__: package.__version__ for package in (torch, transformers, hildalib)}}
    path = paths.output_dir(profile, notebook, seed) / "metrics.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_metrics(profile: str, notebook: str, seed: int = 0) -> dict:
    """metrics.json of an earlier notebook."""
    path = _need(paths.output_dir(profile, notebook, seed, create=False) / "metrics.json", profile, notebook)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HildaError(f"{path} is damaged ({error}); delete it and run {notebook} again") from error


def seeds_done(profile: str, notebook: str, name: str) -> dict[int, Path]:
    """{seed: path} of the file `name` that runs of other seeds of this profile have left in `notebook`, seed 0 included."""
    root = paths.outputs_root() / profile
    found = {int(path.name[4:]): path / notebook / name for path in root.glob("seed*") if path.name[4:].isdigit()}
    return {seed: path for seed, path in sorted((found | {0: root / notebook / name}).items()) if path.exists()}


def kept(path: Path, key: object, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table that an earlier run left at `path` for the same `key` (anything that JSON can write), else what `make` gives, left there.

    A CSV file below a line with the key and the columns of text, which come back to the letter: "007", "null" and "" too.
    """
    key = json.loads(json.dumps(key))  # as it comes back
    if not path.exists() or _head(path).get("key") != key:
        table, temporary = make(), path.with_name(f"{path.name}.{os.getpid()}.tmp")
        text = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
        temporary.write_text(f"# {json.dumps({'key': key, 'text': text})}\n{table.to_csv(index=False)}", encoding="utf-8", newline="")
        os.replace(temporary, path)
    return kept_table(path)


def kept_table(path: Path) -> pd.DataFrame:
    """What `kept` left at `path`, whatever its key."""
    text, columns = _head(path)["text"], pd.read_csv(path, skiprows=1, nrows=0)
    numbers = {name: [""] for name in columns if name not in text}  # where an empty field is a missing number
    return pd.read_csv(path, skiprows=1, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=numbers)


def _head(path: Path) -> dict:
    """The first line of what `kept` left; {} of anything else."""
    with path.open(encoding="utf-8") as lines:
        try:
            return json.loads(lines.readline().removeprefix("# "))
        except ValueError:
            return {}
