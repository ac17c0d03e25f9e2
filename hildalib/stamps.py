"""What a finished run was made from: content hashes of inputs and artefacts, so that a rerun does only what changed.

Entry points: `inputs` (cells, parameters, library modules, upstream artefacts), `artefacts`, `environment`, `differences`. Times and
checkouts do not matter, contents do; of the library only the modules that a notebook imports, directly or not, count.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import threading
from pathlib import Path

import nbformat

from hildalib import paths

STAMP = "stamp.json"
SOURCES = ("notebooks", "hildalib", "params", "constraints.txt", "pyproject.toml")  # of a checkout: what decides a result; a run rewrites the rest
UNFINISHED = "unfinished.json"
PACKAGES = ("accelerate", "bitsandbytes", "datasets", "numpy", "peft", "tokenizers", "torch", "transformers")
# Progress states of a trainer inside `checkpoints`, which may be deleted once a run is finished.
RESUMABLE = re.compile(r"checkpoint-\d+")


def digest(value) -> str:
    """sha256 of bytes, of text with line ends as LF, or of anything JSON holds."""
    if not isinstance(value, (bytes, str)):
        value = json.dumps(value, sort_keys=True)
    return hashlib.sha256(value.replace("\r\n", "\n").encode() if isinstance(value, str) else value).hexdigest()


def inputs(notebook: Path, parameters: dict, upstream: dict[str, str], library: Path) -> dict:
    """Everything that decides a result. upstream: notebook name -> digest of its artefacts; library: the folder of hildalib.

    Prose is left out: only code cells count.
    """
    code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    return {"cells": digest("\n\n".join(code)), "parameters": parameters,
            "modules": {name: digest(path.read_text(encoding="utf-8")) for name, path in modules(code, library).items()},
            "upstream": upstream}


def differences(old: dict, new: dict) -> str:
    """Which inputs differ, in words: "parameters lr, modules noise"."""
    parts = []
    for group in new:
        before, after = old.get(group), new[group]
        if before == after:
            continue
        named = isinstance(before, dict) and isinstance(after, dict)
        keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key)) if named else []
        parts.append(f"{group} {', '.join(keys)}".strip())
    return "; ".join(parts)


def modules(code: list[str], library: Path) -> dict[str, Path]:
    """Module files of `library` that the cells in `code` import, directly or through one another: dotted name -> file."""
    found, seen = {}, set()
    todo = [request for cell in code for request in _imports(_parse(cell), library.name, None)]
    while todo:
        name, wanted = todo.pop()
        path = _file(library, name)
        if path is None or (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        found[name] = path
        parent = name.rpartition(".")[0]
        if parent:
            todo.append((parent, ""))  # importing a.b runs a/__init__.py, of which nothing is asked
        package, tree = path.name == "__init__.py", _parse(path.read_text(encoding="utf-8"))
        todo += _imports(tree, name if package else parent, wanted if package else None)
        if wanted and package:
            todo.append((f"{name}.{wanted}", None))  # the name may be a submodule
        if package and wanted != "" and "import_module" in path.read_text(encoding="utf-8"):
            todo += [(f"{name}.{entry.stem}", None) for entry in path.parent.glob("*.py") if entry.stem != "__init__"]
    return dict(sorted(found.items()))


_PARSER = threading.Lock()  # CPython 3.11 counts the parser's recursion once for all threads: two at a time raise SystemError


def _parse(source: str) -> ast.Module:
    with _PARSER:
        try:
            return ast.parse(source)
        except SyntaxError:  # a cell with a magic: its import lines still count
            return ast.parse("\n".join(line for line in source.splitlines() if re.match(r"(from|import)\s[^(\\]*$", line)))


def _imports(tree: ast.Module, package: str, wanted: str | None) -> list[tuple[str, str | None]]:
    """(module, name asked of it) of each import in `tree`; None asks for all of it, "" for nothing.

    In a package's __init__ the imports inside functions count only for the function that was asked for: `from hildalib import
    HildaError` needs nothing of what `hildalib.generate` imports when called.
    """
    inner = [node for node in tree.body if wanted is None or not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name == wanted]
    requests = []
    for node in (node for statement in inner for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            requests += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            requests += [(module, None if alias.name == "*" else alias.name) for alias in node.names]
    return requests


def _file(library: Path, name: str) -> Path | None:
    head, *rest = name.split(".")
    if head != library.name:
        return None
    base = library.joinpath(*rest)
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def artefacts(folder: Path) -> dict[str, dict]:
    """Files that a run left in `folder`: relative path -> {"bytes", "sha256"}; not the executed copy, stamps and resumable states."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        skipped = path.suffix == ".ipynb" or path.name in (STAMP, UNFINISHED) or any(map(RESUMABLE.fullmatch, relative.parts))
        if path.is_file() and not skipped:
            with path.open("rb") as stream:
                found[relative.as_posix()] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    return found


def lost(folder: Path, recorded: dict[str, dict]) -> list[str]:
    """Recorded artefacts that are gone or have another size (contents are hashed once, when a run ends).

    Text may change its size with the line ends of a checkout, so for it existence suffices.
    """
    def intact(path: Path, size: int) -> bool:
        return path.is_file() and (path.suffix in (".json", ".csv", ".txt") or path.stat().st_size == size)
    return [name for name, facts in recorded.items() if not intact(folder / name, facts["bytes"])]


def environment() -> dict:
    """Versions, machine and commit of a run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), "versions": versions,
            "commit": _git("rev-parse", "HEAD") or None, "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES))}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, or not a checkout
    return done.stdout.strip()


def read(path: Path) -> dict | None:
    """The record in a JSON file; None where there is none or it is unreadable."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write(path: Path, record: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    os.replace(partial, path)
