"""Parameters of a run, checked before a kernel starts: smoke defaults, a profile's file, overlays and `--set key=value`, against `records`.

Entry points: `load`, `check`, `defaults`, `of` (from a notebook's variables), `profiles`, `covered`; `cell_mismatch` compares a record with the
notebook's own parameters cell.
"""

import ast
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

from hildalib import HildaError, paths
from hildalib.records import RECORDS, SMOKE
from hildalib.values import as_yaml, checked, nearest, parse, plain, read_yaml, typed

OVERLAYS = "overlays"  # folder of the files <overlay>.yaml, beside those of the profiles


def defaults(notebook: str, record: type | None = None) -> dict:
    """The smoke values of a notebook: what its parameters cell holds."""
    return plain(dataclasses.asdict((record or _record(notebook))()))


def of(notebook: str, names: Mapping[str, object]) -> dict:
    """The parameters of `notebook` among `names`, the variables of its kernel."""
    return {name: names[name] for name in defaults(notebook)}


def load(notebook: str, profile: str = SMOKE, overrides: Mapping[str, object] | None = None, *,
         record: type | None = None, folder: Path | None = None) -> dict:
    """Checked parameters of a run: smoke defaults <- <folder>/<profile>/<notebook>.yaml <- overlays <- overrides.

    A profile's file must hold exactly the keys of the record, so that no value is taken in silence. profile "a+b": profile a under the overlay
    <folder>/overlays/b.yaml, whose keys change what the notebook has of them; its results have a folder of their own. Values in `overrides` that
    are strings are read as YAML. folder: the folder of all profiles. Raises HildaError on an unknown notebook, profile, overlay or key, a
    missing key, a wrong type, a value out of bounds or a broken file, and names the place and the remedy.
    """
    record, folder = record or _record(notebook), folder or paths.params()
    values, full, (profile, *overlays) = defaults(notebook, record), profile, profile.split("+")
    if profile != SMOKE:
        path = _profile_file(notebook, profile, folder)
        found = read_yaml(path)
        _check_keys(found, record, str(path))
        missing = [name for name in values if name not in found]
        if missing:
            lines = ", ".join(f"`{name}: {as_yaml(values[name])}`" for name in missing)
            raise HildaError(f"{path}: missing {', '.join(missing)}; add {lines} (the smoke values) or your own")
        values = check(record, found, str(path))
        if values["profile"] != profile:
            raise HildaError(f"{path}: profile is {values['profile']!r} in the folder of {profile!r}; write `profile: {profile}`")
    for name in overlays:
        values |= _overlay(name, record, folder)
    values["profile"] = full
    given = {key: parse(value) for key, value in (overrides or {}).items()}
    _check_keys(given, record, "--set")
    if given.get("profile", full) != full:
        raise HildaError(f"--set: profile cannot be set; use --profile {given['profile']}")
    return values | check(record, given, "--set")


def check(record: type, values: Mapping[str, object], where: str) -> dict:
    """`values` with each entry checked against its declaration; an int becomes a float where a float is declared."""
    hints = typing.get_type_hints(record)
    declared = {field.name: field for field in dataclasses.fields(record)}
    return {name: checked(value, hints[name], declared[name], f"{where}: {name}") for name, value in values.items()}


def profiles(folder: Path | None = None) -> list[str]:
    """Every profile: smoke and each folder under params/."""
    folder = folder or paths.params()
    return [SMOKE, *_names(folder)] if folder.is_dir() else [SMOKE]


def overlays(folder: Path | None = None) -> list[str]:
    """Every overlay: a file in the folder of that name."""
    return sorted(file.stem for file in ((folder or paths.params()) / OVERLAYS).glob("*.yaml"))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name != OVERLAYS)


def _overlay(name: str, record: type, folder: Path) -> dict:
    """What the overlay changes of a notebook's parameters, checked; each of its keys belongs to some notebook."""
    path, known = folder / OVERLAYS / f"{name}.yaml", overlays(folder)
    if name not in known:
        raise HildaError(f"unknown overlay {name!r}; {nearest(name, known)}")
    found, own = read_yaml(path), {field.name for field in dataclasses.fields(record)}
    anywhere = own | {field.name for other in RECORDS.values() for field in dataclasses.fields(other)}
    for key in found:
        if key not in anywhere - {"profile"}:
            raise HildaError(f"{path}: no notebook has a parameter {key!r}; {nearest(str(key), anywhere)}")
    return check(record, {key: value for key, value in found.items() if key in own}, str(path))


def covered(notebooks: Iterable[str], profile: str, folder: Path) -> list[str]:
    """Those of `notebooks` that the profile has a file for, in their order; all of them for smoke."""
    profile = profile.split("+")[0]
    if profile == SMOKE or profile not in profiles(folder):
        return list(notebooks)  # an unknown profile is reported when its first file is read
    return [name for name in notebooks if (folder / profile / f"{name}.yaml").is_file()]


def cell_parameters(nb) -> dict:
    """Names and values of the cell tagged `parameters` of an nbformat notebook.

    Read with ast rather than papermill's line pattern, which misses `x: int | None = None` and strings holding `=`.
    """
    tagged = [cell for cell in nb.cells if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise HildaError(f"{len(tagged)} cells carry the tag 'parameters'; tag exactly one, or values given to a run are overwritten")
    values = {}
    for node in ast.parse(tagged[0].source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        try:
            values[targets[0].id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise HildaError(f"line {node.lineno} of the parameters cell is not `name = literal`; keep only such lines in it") from None
    return values


def cell_mismatch(nb, record: type) -> list[str]:
    """Differences between a notebook's parameters cell and its record, one line each; [] where they agree."""
    cell, declared = cell_parameters(nb), plain(dataclasses.asdict(record()))
    lines = [f"{name} is in the cell but not in the record" for name in cell if name not in declared]
    lines += [f"{name} is in the record but not in the cell; write `{name} = {value!r}`"
              for name, value in declared.items() if name not in cell]
    lines += [f"{name} is {cell[name]!r} in the cell and {value!r} in the record"
              for name, value in declared.items() if name in cell and typed(cell[name]) != typed(value)]
    return lines


def _record(notebook: str) -> type:
    if notebook not in RECORDS:
        raise HildaError(f"unknown notebook {notebook!r}; {nearest(notebook, RECORDS)}")
    return RECORDS[notebook]


def _profile_file(notebook: str, profile: str, folder: Path) -> Path:
    if profile not in profiles(folder):
        raise HildaError(f"unknown profile {profile!r}; {nearest(profile, profiles(folder))}")
    path = folder / profile / f"{notebook}.yaml"
    if not path.is_file():
        raise HildaError(f"{path} does not exist; write it with the keys of the parameters cell of {notebook}")
    return path


def _check_keys(values: Mapping, record: type, where: str) -> None:
    known = {field.name: field.metadata["help"] for field in dataclasses.fields(record)}
    for name in values:
        if name not in known:
            raise HildaError(f"{where}: unknown parameter {name!r}; {nearest(str(name), known)}")
