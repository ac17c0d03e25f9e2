"""Text and JSON-lines files, plain, gzip or zstandard, read line by line with errors that name file and line.

Entry points: `read_lines`, `read_json`, `sha256_of`. Nothing is guessed or skipped: the first broken line ends the reading.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow

from hildalib import HildaError

CODECS = {".gz": "gzip", ".zst": "zstd"}
JSON_SUFFIXES = tuple(f".{kind}{codec}" for kind in ("jsonl", "json") for codec in ("", *CODECS))
_BOM = b"\xef\xbb\xbf"  # some Windows editors put it before the first line


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of the file as stored."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.stat().st_size == 0:
        raise HildaError(f"{path} is empty; remove it or fetch it again")
    number = 0
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=CODECS.get(path.suffix))) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except OSError as error:  # pyarrow's words for a stream that ends early or whose checksum is wrong
        raise HildaError(f"{path} is truncated or damaged after line {number} ({error}); fetch it again") from error
    if number == 0:
        raise HildaError(f"{path} holds no line; remove it or fetch it again")


def read_lines(path: Path) -> Iterator[str]:
    """Lines without their ends. HildaError for broken UTF-8, a damaged archive, an empty file."""
    for number, line in _raw_lines(path):
        try:
            yield line.removeprefix(_BOM if number == 1 else b"").decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise HildaError(f"{path}, line {number} is not UTF-8 ({error.reason} at byte {error.start}); convert or remove it") from error


def _check_row(row: object, required: tuple[str, ...], where: str) -> dict:
    if not isinstance(row, dict):
        raise HildaError(f"{where} is not a JSON object; one object a line is expected")
    for key in required:
        if not isinstance(row.get(key), str):
            raise HildaError(f"{where} has no text under the key {key!r}; add it or remove the row")
        try:
            row[key].encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" is legal JSON and no character
            raise HildaError(f"{where} has half a surrogate pair under {key!r}; repair or remove the row") from error
    return row


def read_json(path: Path, required: tuple[str, ...] = ()) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a JSON-lines file; blank lines are passed over; `required` keys must hold text.

    HildaError for broken JSON or UTF-8, a row that is no object or lacks a key, a damaged archive, an empty file.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HildaError(f"{where} is not JSON ({error}); repair or remove the row") from error
        yield number, _check_row(row, required, where)
