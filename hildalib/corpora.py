"""A text or task source by name, as a `datasets.Dataset` that carries where it came from.

Looked for in this order: the folder HILDA_DATA, the Hugging Face hub, what is embedded (procedural tasks; in TinyStories' place
stories that SmolLM2 writes itself). Entry points: `load`, `rows` (streams big corpora), `provenance`, `records` (raw rows of a benchmark), `NAMES`.
Knows files and hub ids; knows neither tokenizers nor models.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetInfo, load_dataset

from hildalib import HildaError, paths
from hildalib.stories import STORIES, whole_stories, written_stories
from hildalib.textfiles import JSON_SUFFIXES, read_json, read_lines, sha256_of

EVAL_PERCENT = 5  # of documents, where the publisher made no split: 1 in 20 keeps evaluation cheap and training data plentiful
HUB_SECONDS = 10  # how long the hub may take to answer before it counts as out of reach


@dataclass(frozen=True)
class Source:
    """Where a corpus may come from and how its raw rows become documents.

    folder: split -> files under HILDA_DATA; where splits share files, `member(raw, split)` tells their rows apart. hub: (id,
    configuration), with hub_splits split -> name there. convert: raw row -> columns, any number of documents; None for the
    files of a task. assemble: lines -> texts, for .txt.
    """

    licence: str
    folder: dict[str, tuple[str, ...]]
    convert: Callable[[dict], Iterable[dict]] | None = None
    hub: tuple[str, str | None] | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)
    member: Callable[[dict, str], bool] | None = None
    assemble: Callable[[Iterator[str]], Iterator[str]] | None = None
    note: str = ""


def split_of(text: str, eval_percent: int = EVAL_PERCENT) -> str:
    """"validation" for `eval_percent` of all texts, by sha256, else "train": identical documents are always on one side."""
    return "validation" if int.from_bytes(_digest(text), "big") % 100 < eval_percent else "train"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]  # 128 bits: no collision among any number of documents


# ---- from raw rows to documents -------------------------------------------------------------------------------------------------

def _document(raw: dict) -> Iterator[dict]:
    yield {"text": raw["text"]}


def _pair(prompt: str, response: str) -> Iterator[dict]:
    """One question and answer; the text is their concatenation, nothing in between."""
    yield {"prompt": prompt, "response": response, "text": prompt + response}


def _instruction(raw: dict) -> Iterator[dict]:
    for instance in raw.get("instances", [raw]):
        asked = instance.get("input", raw.get("context", ""))  # "context" and "response" are the names that dolly uses
        question = "\n\n".join(part.strip() for part in (raw["instruction"], asked) if part.strip())
        yield from _pair(f"{question}\n\n", instance.get("output", raw.get("response", "")).strip())


def _mbpp_pair(raw: dict) -> Iterator[dict]:
    tests = "\n".join(raw["test_list"])
    yield from _pair(f"{raw['text'].strip()}\nYour code should pass these tests:\n{tests}\n\n", raw["code"].replace("\r\n", "\n"))


def _mbpp_member(raw: dict, split: str) -> bool:
    """Austin et al. 2021, arXiv:2108.07732: task ids 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 train."""
    number = int(raw["task_id"])
    return split == ("prompt" if number <= 10 else "test" if number <= 510 else "validation" if number <= 600 else "train")


def _hash_member(raw: dict, split: str) -> bool:
    return split_of(raw["text"] if "text" in raw else raw["instruction"]) == split


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """WikiText articles: a line " = Title = " begins one."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=]+ = \s*", line) and article:
            yield "\n".join(article)
            article = []
        if line.strip():
            article.append(line.strip())
    yield "\n".join(article)


def _both(*patterns: str) -> dict[str, tuple[str, ...]]:
    return {"train": patterns, "validation": patterns}


_MBPP_SPLITS = ("prompt", "test", "validation", "train")
SOURCES = {
    "tinystories": Source(
        "CDLA-Sharing-1.0", {"train": ("tinystories/stories.jsonl*", "tinystories/train_head_1k.txt*"), "validation": ("tinystories/valid_a.txt*",)},
        _document, ("roneneldan/TinyStories", None), {"train": "train", "validation": "validation"}, assemble=whole_stories),
    "dolma": Source(
        "mixed: public domain, CC-BY-4.0, CC-BY-SA-3.0, ODC-BY-1.0", _both("dolma_mini/*.jsonl*"), _document, member=_hash_member,
        note="a small collection in the Dolma document schema, not a sample of Dolma"),
    "gsm8k": Source(
        "MIT", {"train": ("gsm8k/train.jsonl*",), "test": ("gsm8k/test.jsonl*",)},
        hub=("openai/gsm8k", "main"), hub_splits={"train": "train", "test": "test"}),
    "math500": Source(
        "MIT", {"test": ("math500/test.jsonl*",)}, hub=("HuggingFaceH4/MATH-500", None), hub_splits={"test": "test"}),
    "humaneval": Source(
        "MIT", {"test": ("humaneval/HumanEval.jsonl*",)}, lambda raw: _pair(raw["prompt"], raw["canonical_solution"]),
        ("openai/openai_humaneval", None), {"test": "test"}),
    "mbpp": Source(
        "CC-BY-4.0", dict.fromkeys(_MBPP_SPLITS, ("mbpp/mbpp.jsonl*",)), _mbpp_pair, ("google-research-datasets/mbpp", "full"),
        {split: split for split in _MBPP_SPLITS}, _mbpp_member),
    "instruct": Source(
        "Apache-2.0 (folder), CC-BY-SA-3.0 (hub)", _both("instruct/*.jsonl*"), _instruction,
        ("databricks/databricks-dolly-15k", None), {"train": "train", "validation": "train"}, _hash_member),
    "wikitext2": Source(
        "CC-BY-SA-3.0", {"validation": ("wikitext2/valid.txt*",)}, _document, ("Salesforce/wikitext", "wikitext-2-v1"),
        {"validation": "validation"}, assemble=_articles, note="tokenised form with <unk>: for perplexity only"),
    "countdown": Source(
        "Apache-2.0", {"d1": ("countdown/cd3_test_d1.jsonl*",), "dream": ("countdown/cd3_test_dream.jsonl*",)}),
}
TASKS = ("arithmetic", "countdown", "gsm8k", "gsm_symbolic", "math500", "shortcuts", "sudoku")  # their rows are the prompts and responses of hildalib.tasks
NAMES = (*SOURCES, "arithmetic", "gsm_symbolic", "shortcuts", "sudoku", "stories-smollm2", "dolma:FOLDER")


# ---- folder, then hub -----------------------------------------------------------------------------------------------------------

def _source(name: str) -> Source:
    if name.startswith("dolma:"):
        return Source("that of the folder's owner", _both(*(f"**/*{suffix}" for suffix in JSON_SUFFIXES)), _document, member=_hash_member)
    if name not in SOURCES:
        raise HildaError(f"unknown corpus {name!r}; use one of {', '.join(NAMES)}")
    return SOURCES[name]


def _files(name: str, split: str) -> tuple[Path | None, list[Path]]:
    """Root and files of a split in the folder, sorted; an empty list where the folder does not have them."""
    source = _source(name)
    root = Path(name.removeprefix("dolma:")).expanduser() if name.startswith("dolma:") else paths.data_dir()
    patterns = source.folder.get(split, ())
    found = sorted({path for pattern in patterns for path in (root.glob(pattern) if root else ()) if path.is_file()})
    if name.startswith("dolma:") and not found:
        raise HildaError(f"no file ending in {', '.join(JSON_SUFFIXES)} under {root}; name the folder of the documents in dolma:FOLDER")
    return root, found


def _revision(hub_id: str) -> str:
    """Commit of a hub data set. HildaError after `HUB_SECONDS` without an answer."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "as cached"
    from huggingface_hub import HfApi  # only here: nothing else needs a network

    try:
        return HfApi().dataset_info(hub_id, timeout=HUB_SECONDS).sha
    except Exception as error:  # any failure of any transport means the same to the user
        raise HildaError(f"{hub_id} is not in the folder HILDA_DATA and the hub cannot be reached ({type(error).__name__}); set HILDA_DATA "
                         "to a folder with its files, or HF_HUB_OFFLINE=1 if it was fetched before, or use a procedural corpus "
                         "(arithmetic, countdown, sudoku) or stories-smollm2") from error


def _hub_rows(name: str, source: Source, split: str, revision: str) -> Iterator[dict]:
    hub_id, configuration = source.hub
    try:
        table = load_dataset(hub_id, configuration, split=source.hub_splits[split], revision=None if revision == "as cached" else revision)
    except Exception as error:
        raise HildaError(f"{hub_id} could not be loaded ({type(error).__name__}: {str(error)[:200]}); check the network, or set HILDA_DATA "
                         "to a folder with its files") from error
    if name == "wikitext2":  # one line a row there
        table = ({"text": text} for text in _articles(row["text"] for row in table))
    for number, raw in enumerate(table):
        yield {**raw, "_id": f"{hub_id}/{source.hub_splits[split]}:{number}"}


def _folder_rows(source: Source, root: Path, files: list[Path]) -> Iterator[dict]:
    for path in files:
        inside = path.relative_to(root).as_posix()
        if ".txt" in path.suffixes:
            found: Iterable = enumerate(({"text": text} for text in source.assemble(read_lines(path))), start=1)
        else:
            found = read_json(path, required=("text",) if source.convert is _document else ())
        for number, raw in found:
            yield {**raw, "_id": f"{inside}:{number}"}


def _open(name: str, split: str) -> tuple[Iterator[dict], dict]:
    """Raw rows of a split (each with "_id", its place) and where they come from."""
    source = _source(name)
    known = {**source.folder, **source.hub_splits}
    if split not in known:
        raise HildaError(f"corpus {name!r} has no split {split!r}; it has {', '.join(known)}")
    root, files = _files(name, split)
    origin = {"source": name, "split": split, "licence": source.licence} | ({"note": source.note} if source.note else {})
    if files:
        raw_rows = _folder_rows(source, root, files)
        origin |= {"origin": "folder", "files": {path.relative_to(root).as_posix(): path for path in files}}
    elif source.hub:
        try:
            revision = _revision(source.hub[0])
        except HildaError as error:
            if name != "tinystories":
                raise
            warnings.warn(f"{error}. Meanwhile SmolLM2 writes stories itself, once", stacklevel=2)
            return _embedded(split)
        raw_rows = _hub_rows(name, source, split, revision)
        origin |= {"origin": "hub", "source": source.hub[0], "revision": revision}
    else:
        raise HildaError(f"corpus {name!r} ({split}) is not under the folder HILDA_DATA; set HILDA_DATA to a folder that has "
                         f"{' and '.join(source.folder[split])}"
                         + (", or name a folder of Dolma documents as dolma:FOLDER" if name == "dolma" else ""))
    shared = source.member and (files or len(set(source.hub_splits.values())) < len(source.hub_splits))
    return (raw for raw in raw_rows if not shared or source.member(raw, split)), origin


def _embedded(split: str) -> tuple[Iterator[dict], dict]:
    found, origin = written_stories(None, STORIES, seed=0)
    return ({**row, "_id": row["id"]} for row in found if split_of(row["text"]) == split), origin | {"split": split}


def records(name: str, split: str = "train") -> Iterator[dict]:
    """Raw rows of a benchmark with its publisher's own keys. HildaError as in `load`."""
    return _open(name, split)[0]


def rows(name: str, split: str = "train") -> Iterator[dict]:
    """Documents {"text", "source", "id"} (with "prompt" and "response" where the corpus has them), streamed, in file order.

    For corpora larger than memory: nothing is kept, repeats are not removed. Tasks give their default items. Raises HildaError, at the row where it happens and
    naming file and line, for broken UTF-8 or JSON, a row without a text, a truncated or damaged archive, an empty file.
    """
    if name in TASKS:
        yield from _task_rows(name, split, None, 0)[0]
        return
    raw_rows, origin = _open(name, split)
    for raw in raw_rows:
        place = raw.pop("_id")
        for document in _source(name).convert(raw):
            yield {"text": document["text"], "source": str(raw.get("source", origin["source"])), "id": str(raw.get("id", place)), **document}


# ---- embedded ---------------------------------------------------------------------------------------------------------------------

def _task_rows(name: str, split: str, limit: int | None, seed: int) -> tuple[list[dict], dict]:
    from hildalib import tasks  # tasks read their files through `records`, so the two modules meet only here

    task = tasks.load(name)
    if split == "train" and limit and hasattr(task, "stream"):  # as drawn, repeats and all: without them a large sample runs out of easy questions
        items = list(itertools.islice(task.stream(seed, split), limit))
    else:
        items = task.items(split, limit, seed)
    found = [{"text": task.prompt(item) + task.response(item), "source": name, "id": f"{name}-{split}-{number}",
              "prompt": task.prompt(item), "response": task.response(item)} for number, item in enumerate(items)]
    maker = task.generator() if hasattr(task, "generator") else "HILDA"
    label = {"source": name, "split": split, "origin": "procedural", "licence": f"Apache-2.0 (generated by {maker})",
             "revision": f"{name} version {task.version}, seed {seed}"}
    if name in SOURCES and (name == "gsm8k" or split in SOURCES[name].folder):
        published = "train" if name == "gsm8k" and split == "validation" else split
        label = _open(name, published)[1] | {"split": split}
    return found, label


# ---- the whole corpus -----------------------------------------------------------------------------------------------------------

def _distinct(documents: Iterable[dict]) -> Iterator[dict]:
    seen: set[bytes] = set()
    for document in documents:
        digest = _digest(document["text"])
        if digest not in seen and document["text"].strip():
            seen.add(digest)
            yield document


def _sample(documents: Iterable[dict], limit: int | None, seed: int) -> list[dict]:
    """Uniform sample of `limit` documents in their order, holding no more than that in memory (reservoir)."""
    if limit is None:
        return list(documents)
    rng, kept = random.Random(seed), []
    for number, document in enumerate(documents):
        place = number if number < limit else rng.randrange(number + 1)
        if number < limit:
            kept.append((number, document))
        elif place < limit:
            kept[place] = (number, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])]


def load(name: str, *, split: str = "train", limit: int | None = None, seed: int = 0, pairs: bool = False,
         writer: Callable[[list[str], int], list[str]] | None = None) -> Dataset:
    """The corpus `name` with columns text, source, id, and prompt, response where it has them; see `provenance`.

    Repeated and blank documents are left out, but for procedural training questions, which come as drawn. limit: that many
    documents, drawn with `seed`; None gives all (procedural tasks: `tasks.DEFAULT_SIZES`; stories-smollm2: openings before they
    are split). pairs: TinyStories too has them, an opening and the rest. writer: for "stories-smollm2" only, (openings, seed) ->
    continuations instead of SmolLM2's; asked once, then cached.
    Raises HildaError for an unknown name or split, a source that is nowhere to be had, and damaged files (see `rows`).
    """
    if name in TASKS or pairs and name == "tinystories":
        found, origin = _task_rows(name, split, limit, seed)
    elif name == "stories-smollm2":
        found, origin = written_stories(writer, STORIES if limit is None else limit, seed)
        found, origin = [row for row in _distinct(found) if split_of(row["text"]) == split], origin | {"split": split}
    else:
        origin = _open(name, split)[1]
        found = _sample(_distinct(rows(name, split)), limit, seed)
    if not found:
        raise HildaError(f"corpus {name!r} has no document in split {split!r}; use another split, or more data")
    if "files" in origin:
        origin["sha256"] = {inside: sha256_of(path) for inside, path in origin.pop("files").items()}
    record = {**origin, "rows": len(found)}
    return Dataset.from_list(found, info=DatasetInfo(description=json.dumps(record, ensure_ascii=False)))


def provenance(corpus: Dataset) -> dict:
    """What `corpus`, as `load` gave it (or mapped, or filtered since), was made from.

    source, split, origin ("folder", "hub", "embedded" or "procedural"), licence, rows, and either sha256 {file: hex} or revision.
    HildaError for a data set that does not come from `load`.
    """
    try:
        return json.loads(corpus.info.description)
    except (json.JSONDecodeError, TypeError) as error:
        raise HildaError("this data set carries no provenance; get it from corpora.load") from error
