"""Documents as token lists -> rows of one length, in memory or on disk.

Entry points: `pack` (documents may straddle rows), `pack_whole` (they never do), `write_shards` / `open_shards` (memory-mapped,
checked by sha256, resumable after a kill at any point) and `Packed` (the rows of `pack`, read lazily from shards).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hildalib import HildaError
from hildalib.textfiles import sha256_of
from hildalib.tokenisation import BATCH_DOCUMENTS, encoded

PADDING = -1  # doc_id of a padded position
BUFFER = 1024  # documents sorted together by `pack_whole`: best fit gains little beyond, and memory stays bounded
SHARD_TOKENS = 1 << 24  # 32 MB a shard of uint16: a kill loses seconds of work, a large corpus has hundreds of files
INDEX = "index.json"


def pack(documents: Iterable[list[int]], length: int, eos_token_id: int) -> dict[str, torch.Tensor]:
    """Documents, each followed by EOS, laid end to end and cut into rows of `length`.

    Returns "input_ids", "doc_ids", "position_ids", each (N, L) int64. doc_ids: index of the document, never decreasing; -1 pads
    the last row, with EOS as its token. A document that straddles two rows keeps its id, and is a document of its own in the
    second row: nothing attends across rows. position_ids are 0..L-1 in every row, whatever document stands there, since the
    block grid counts from position 0 of the row (as LLaDA2 does); so a document may begin inside a block.
    Example: documents [5 6 7], [8 9], [1 2 3 4 5 6 7], length 8, EOS 0

        input_ids     5 6 7 0 8 9 0 1   2 3 4 5 6 7 0  0
        doc_ids       0 0 0 0 1 1 1 2   2 2 2 2 2 2 2 -1
        position_ids  0 1 2 3 4 5 6 7   0 1 2 3 4 5 6  7

    HildaError if there is no document.
    """
    _check_length(length)
    pieces = [np.asarray([*document, eos_token_id], dtype=np.int64) for document in documents]
    if not pieces:
        raise HildaError("there is no document to pack; give at least one")
    owners = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return _rows(np.concatenate(pieces), owners, length, eos_token_id)


def _check_length(length: int) -> None:
    if length < 1:
        raise HildaError(f"length={length}: a row needs at least one position")


def _rows(tokens: np.ndarray, owners: np.ndarray, length: int, eos_token_id: int) -> dict[str, torch.Tensor]:
    """Flat tokens and their doc ids, padded to whole rows."""
    missing = -len(tokens) % length
    shape = (-1, length)
    input_ids = np.pad(tokens, (0, missing), constant_values=eos_token_id).reshape(shape)
    doc_ids = np.pad(owners, (0, missing), constant_values=PADDING).reshape(shape)
    return {"input_ids": torch.from_numpy(input_ids), "doc_ids": torch.from_numpy(doc_ids), "position_ids": torch.arange(length).repeat(len(input_ids), 1)}


def pack_whole(documents: Iterable[list[int]], length: int, eos_token_id: int) -> tuple[dict[str, torch.Tensor], int]:
    """Rows in which no document is split, for short ones (prompts with responses); every row is padded as in `pack`.

    Best fit decreasing over `BUFFER` documents at a time; inside a row documents keep their order, so doc_ids (index in
    `documents`) never decrease there. A document of more than length - 1 tokens is cut to `length` tokens and gets no EOS, since
    its text does not end there. Returns (rows as in `pack`, number of documents cut). HildaError if there is no document.
    """
    _check_length(length)
    rows: list[list[tuple[int, list[int]]]] = []
    cut, numbered = 0, enumerate(documents)
    while buffer := list(itertools.islice(numbered, BUFFER)):
        cut += sum(len(document) >= length for _, document in buffer)
        rows += _fit([(number, [*document, eos_token_id][:length]) for number, document in buffer], length)
    if not rows:
        raise HildaError("there is no document to pack; give at least one")
    tokens = np.full((len(rows), length), eos_token_id, dtype=np.int64)
    owners = np.full((len(rows), length), PADDING, dtype=np.int64)
    for row, members in enumerate(rows):
        ids = [token for _, document in members for token in document]
        tokens[row, :len(ids)] = ids
        owners[row, :len(ids)] = np.repeat([number for number, _ in members], [len(document) for _, document in members])
    return _rows(tokens.ravel(), owners.ravel(), length, eos_token_id), cut


def _fit(buffer: list[tuple[int, list[int]]], length: int) -> list[list[tuple[int, list[int]]]]:
    """Longest first, each into the fullest row that still has room; rows in the order of their first document."""
    space: list[tuple[int, int]] = []  # (free positions, row), sorted
    rows: list[list[tuple[int, list[int]]]] = []
    for number, document in sorted(buffer, key=lambda pair: (-len(pair[1]), pair[0])):
        place = bisect.bisect_left(space, (len(document), -1))
        free, row = space.pop(place) if place < len(space) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append((number, document))
        bisect.insort(space, (free - len(document), row))
    return sorted(sorted(row, key=lambda pair: pair[0]) for row in rows)


# ---- shards ---------------------------------------------------------------------------------------------------------------------

def fingerprint(tokenizer) -> str:
    """sha256 of everything that decides a fast tokenizer's ids, EOS included. HildaError for a slow one, or one without EOS."""
    if not getattr(tokenizer, "is_fast", False):
        raise HildaError(f"{type(tokenizer).__name__} is not a fast tokenizer; load one with AutoTokenizer.from_pretrained(..., use_fast=True)")
    if tokenizer.eos_token_id is None:
        raise HildaError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    record = {key: value for key, value in state.items() if key not in ("truncation", "padding")}  # set by every call anew
    return hashlib.sha256(json.dumps([record, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all, also when the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _json(record: dict) -> bytes:
    return (json.dumps(record, sort_keys=True) + "\n").encode()


def _names(folder: Path, number: int) -> tuple[Path, Path]:
    """Tokens and record of a shard; a shard exists once its record does."""
    return folder / f"shard-{number:05d}.bin", folder / f"shard-{number:05d}.json"


def _read_record(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HildaError(f"{path} cannot be read ({error}); write the shards again with resume=False") from error


class _Writer:
    """Collects documents and commits them shard by shard; `chain` is the running sha256 of all source texts so far."""

    def __init__(self, folder: Path, tokenizer, shard_tokens: int):
        self.folder, self.shard_tokens = folder, shard_tokens
        self.dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
        self.common = {"tokenizer": fingerprint(tokenizer), "dtype": self.dtype.str, "eos_token_id": tokenizer.eos_token_id,
                       "shard_tokens": shard_tokens}
        self.eos = np.array([tokenizer.eos_token_id], dtype=self.dtype)
        self.records: list[dict] = []
        self.chain, self.rows = b"", 0
        self._clear()

    def _clear(self) -> None:
        self.pieces, self.offsets, self.account = [], [0], {}

    def resume(self) -> None:
        """Take over the committed shards. HildaError if they are of another tokenizer or shard size, or damaged."""
        while (paths := _names(self.folder, len(self.records)))[1].exists():
            record = _read_record(paths[1])
            for key, value in self.common.items():
                if record.get(key) != value:
                    raise HildaError(f"{paths[1]} was written with another {key} ({record.get(key)}, now {value}); "
                                     "use another folder, or resume=False to replace the shards")
            _check_size(paths[0], record)
            self.records.append(record)
        if self.records:
            self.rows, self.chain = self.records[-1]["rows"], bytes.fromhex(self.records[-1]["source"])

    def add(self, document: dict, ids: np.ndarray) -> None:
        """ids without EOS, which is added."""
        count, text = len(ids) + 1, document["text"]
        if self.pieces and self.offsets[-1] + count > self.shard_tokens:
            self.commit()
        self.pieces += [ids.astype(self.dtype), self.eos]
        self.offsets.append(self.offsets[-1] + count)
        self.rows, self.chain = self.rows + 1, _link(self.chain, text)
        _add(self.account, document.get("source", ""), (1, count, len(text.encode("utf-8"))))

    def commit(self) -> None:
        if not self.pieces:
            return
        tokens, record_path = _names(self.folder, len(self.records))
        content = np.concatenate(self.pieces).tobytes()
        record = {**self.common, "file": tokens.name, "tokens": self.offsets[-1], "offsets": self.offsets, "rows": self.rows,
                  "source": self.chain.hex(), "account": self.account, "sha256": hashlib.sha256(content).hexdigest()}
        _replace(tokens, content)
        _replace(record_path, _json(record))  # last: it makes the shard count
        self.records.append(record)
        self._clear()


def _add(account: dict[str, list[int]], source: str, counts: Iterable[int]) -> None:
    account[source] = [old + new for old, new in zip(account.get(source, (0, 0, 0)), counts)]


def accounted(folder: str | Path) -> dict[str, list[int]]:
    """{source: [documents, tokens with EOS, bytes of UTF-8 text]} of the shards committed in `folder`, finished or not."""
    account: dict[str, list[int]] = {}
    for path in sorted(Path(folder).glob("shard-*.json")):
        for source, counts in _read_record(path).get("account", {}).items():
            _add(account, source, counts)
    return account


def _link(chain: bytes, text: str) -> bytes:
    return hashlib.sha256(chain + hashlib.sha256(text.encode("utf-8")).digest()).digest()


def _skip(documents: Iterator[dict], writer: _Writer) -> None:
    """Pass over the rows that are already in shards, making sure that they are the same rows."""
    chain, count = b"", 0
    for document in itertools.islice(documents, writer.rows):
        chain, count = _link(chain, document["text"]), count + 1
    if count < writer.rows or chain != writer.chain:
        raise HildaError(f"the texts are not those that the shards in {writer.folder} were begun with; "
                         "give the same source, or resume=False to replace the shards")


def _remove_shards(folder: Path) -> None:
    """The index first, then records before tokens: at no point does a half-removed folder look whole."""
    (folder / INDEX).unlink(missing_ok=True)
    for pattern in ("shard-*.json", "shard-*.bin", "shard-*.tmp"):
        for path in sorted(folder.glob(pattern), reverse=True):
            path.unlink()


def write_shards(documents: Iterable[str | dict], tokenizer, folder: str | Path, *, shard_tokens: int = SHARD_TOKENS, resume: bool = True,
                 jobs: int = 1, batch: int = BATCH_DOCUMENTS, spent: list[float] | None = None) -> Path:
    """Tokenise `documents`, texts or rows {"text", "source"} of `corpora.rows`, and write them to `folder` as shards for `open_shards`; returns the
    folder. The bytes do not depend on jobs, the number of processes, nor on batch (both, and spent, as in `tokenisation.encoded`).

    Streams: holds a few batches a process and one shard. shard-00000.bin: token ids, every document followed by EOS, uint16 or uint32, little
    endian; a document never straddles shards, so one that is longer than `shard_tokens` has a larger shard of its own.
    shard-00000.json: sha256, document offsets, source rows used up to its end, account by source (`accounted`). index.json: written last, the shards are complete.
    resume: go on after the last whole shard; the bytes are those of an uninterrupted run. Raises HildaError for a slow tokenizer,
    for shards of another tokenizer, shard size or source, and for a source without texts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        _remove_shards(folder)
    writer, rows = _Writer(folder, tokenizer, shard_tokens), ({"text": row} if isinstance(row, str) else row for row in documents)
    writer.resume()
    if (folder / INDEX).exists():
        return folder
    _skip(rows, writer)
    for row, ids in tqdm(encoded(rows, tokenizer, jobs, batch, spent), desc="tokenise", unit="document", initial=writer.rows, disable=None):
        writer.add(row, ids)
    writer.commit()
    if not writer.records:
        raise HildaError(f"there is no text to write to {folder}; check the source")
    for leftover in folder.glob("shard-*.tmp"):
        leftover.unlink()
    _replace(folder / INDEX, _json({**writer.common, "shards": len(writer.records), "documents": writer.rows, "source": writer.chain.hex(),
                                    "tokens": sum(record["tokens"] for record in writer.records)}))
    return folder


def _check_size(path: Path, record: dict) -> None:
    expected = record["tokens"] * np.dtype(record["dtype"]).itemsize
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise HildaError(f"{path} has {found} bytes where {expected} were written; write the shards again with resume=False")


class Shards:
    """Documents of a shard folder as numpy views, never read whole into memory. `len` counts documents; made by `open_shards`."""

    def __init__(self, folder: Path, index: dict, records: list[dict]):
        self.folder, self.index, self.eos_token_id = folder, index, index["eos_token_id"]
        self._dtype = np.dtype(index["dtype"])
        sizes = [np.diff(record["offsets"]) for record in records]
        self.ends = np.cumsum(np.concatenate(sizes))  # (documents,) end of each, EOS included, in the stream of all tokens
        self.shard_ends = np.cumsum([record["tokens"] for record in records])
        self._maps: dict[int, np.memmap] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # a pickled memmap is a copy of the file: data-loader processes map it anew

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        """Token ids of document `number` without its EOS, a read-only view."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = int(self.ends[number - 1]) if number else 0
        return self.tokens(start, int(self.ends[number]) - 1)

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(_names(self.folder, shard)[0], dtype=self._dtype, mode="r")
        return self._maps[shard]

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens start..end-1 of the stream of all documents with their EOS; a view where they lie in one shard, else a copy."""
        pieces = []
        shard = int(np.searchsorted(self.shard_ends, start, side="right"))
        while start < end:
            first = int(self.shard_ends[shard - 1]) if shard else 0
            stop = min(end, int(self.shard_ends[shard]))
            pieces.append(self._map(shard)[start - first:stop - first])
            start, shard = stop, shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, self._dtype)


def open_shards(folder: str | Path, tokenizer=None, *, verify: bool = True) -> Shards:
    """The shards of `folder`. tokenizer: the one that will be used with them, compared by `fingerprint`. verify: check sha256.

    HildaError if the folder has no finished shards, a file is missing, truncated or changed, or another tokenizer wrote them.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        raise HildaError(f"{folder} holds no finished shards; run write_shards there (it resumes)")
    index = _read_record(folder / INDEX)
    if tokenizer is not None and fingerprint(tokenizer) != index["tokenizer"]:
        raise HildaError(f"the shards in {folder} were written by another tokenizer; write them again to another folder")
    records = [_read_record(_names(folder, number)[1]) for number in range(index["shards"])]
    for number, record in enumerate(records):
        path = _names(folder, number)[0]
        _check_size(path, record)
        if verify and sha256_of(path) != record["sha256"]:
            raise HildaError(f"{path} has changed since it was written (sha256 differs); write the shards again with resume=False")
    return Shards(folder, index, records)


class Packed(Dataset):
    """The rows of `pack` over all documents of `shards`, read one at a time: {"input_ids", "doc_ids", "position_ids"}, each (L,)."""

    def __init__(self, shards: Shards, length: int):
        _check_length(length)
        self.shards, self.length = shards, length

    def __len__(self) -> int:
        return -(-int(self.shards.ends[-1]) // self.length)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        start = row * self.length
        end = min(start + self.length, int(self.shards.ends[-1]))
        owners = np.searchsorted(self.shards.ends, np.arange(start, end), side="right")
        tokens = self.shards.tokens(start, end).astype(np.int64)
        return {key: value[0] for key, value in _rows(tokens, owners, self.length, self.shards.eos_token_id).items()}
