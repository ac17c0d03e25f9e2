"""One value or one YAML file, checked against a declared type: the mechanics under hildalib.params.

Entry points: `read_yaml`, `parse` (text of --set), `checked` (type, bounds, choices), `plain`, `as_yaml`, `nearest`.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from hildalib import HildaError

Pairs = list[tuple[int, int]]  # [[size, steps], ...], as in a block-size schedule
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the known name that is probably meant, else all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where YAML would keep the last in silence."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file. HildaError naming the file if it is not YAML, not a mapping, or writes a key twice."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise HildaError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise HildaError(f"{path}: must hold lines `key: value`, found {type(found).__name__}")
    return found


def parse(value):
    """A `--set` text as YAML reads it; anything but a string as it is."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value) if value else value
    except yaml.YAMLError:
        return value  # a bare string such as "a: b: c"; the type check speaks about it


def checked(value, kind, declared: dataclasses.Field, where: str):
    """`value` as the declared type, within bounds and choices; HildaError naming `where`, what was expected and an example."""
    rules = declared.metadata
    try:
        result = _coerce(value, kind)
    except TypeError:
        example = as_yaml(declared.default_factory())
        raise HildaError(f"{where} = {value!r}: expected {_name(kind)}, for example `{declared.name}: {example}` "
                         f"({rules['help']})") from None
    for leaf in _leaves(result):
        if leaf is None:
            continue
        if rules["choices"] is not None and leaf not in rules["choices"]:
            raise HildaError(f"{where} = {leaf!r}: {nearest(str(leaf), map(str, rules['choices']))} ({rules['help']})")
        below, above = (rules["low"] is not None and leaf < rules["low"]), (rules["high"] is not None and leaf > rules["high"])
        if below or above:
            raise HildaError(f"{where} = {leaf!r}: must be {_bounds(rules)} ({rules['help']})")
    return result


def _coerce(value, kind):
    """`value` as `kind`, or TypeError. Numbers never come from booleans, nor integers from floats."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _coerce(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_coerce(item, arguments[0]) for item in value]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise TypeError
        return [_coerce(item, option) for item, option in zip(value, arguments)]
    if kind is float and isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-3 as a string
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise TypeError
    return value


def _leaves(value) -> list:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def plain(value):
    """Tuples as lists: what YAML, JSON and a parameters cell hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def typed(value):
    """`value` with the type of every leaf beside it, so that 1 and 1.0 and True compare unequal."""
    return [typed(item) for item in value] if isinstance(value, (list, tuple)) else (type(value), value)


def _bounds(rules: Mapping) -> str:
    low, high = rules["low"], rules["high"]
    return f"in [{low}, {high}]" if None not in (low, high) else f"at least {low}" if high is None else f"at most {high}"


def _name(kind) -> str:
    if kind == Pairs:
        return "a list of [size, steps] pairs of integers"
    plain = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false", types.NoneType: "null"}
    if kind in plain:
        return plain[kind]
    inner = [_name(option) for option in typing.get_args(kind)]
    return f"a list, each item {inner[0]}" if typing.get_origin(kind) is list else " or ".join(inner)


def as_yaml(value) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()
