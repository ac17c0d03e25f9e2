"""Corpora: where rows come from is recorded, damage is named with file and line, train and evaluation never share a document."""

import gzip
import hashlib
import json
import os

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hildalib import HildaError, corpora, paths
from hildalib.tasks import math500

DOCUMENTS = [{"text": f"Document number {i}.", "id": f"d{i}", "source": "books"} for i in range(200)]


def _jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _dolma(folder, content, name="a.jsonl"):
    (folder / name).write_bytes(content)
    return f"dolma:{folder}"


@pytest.fixture(autouse=True)
def no_data(tmp_path, monkeypatch):
    """Neither data folder nor shared cache, unless a test asks for the real one."""
    real = os.environ.get("HILDA_DATA")
    monkeypatch.delenv("HILDA_DATA", raising=False)
    monkeypatch.setenv("HILDA_CACHE", str(tmp_path / "cache"))
    return real


@pytest.fixture
def real_data(no_data, monkeypatch):
    if not no_data:
        pytest.skip("HILDA_DATA is not set: the real files are not here")
    monkeypatch.setenv("HILDA_DATA", no_data)


# ---- reading --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, packed", [
    ("a.jsonl", bytes), ("a.json", lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b"\r\n")), ("a.jsonl.gz", gzip.compress), ("a.json.gz", gzip.compress),
    ("a.jsonl.gz", lambda b: gzip.compress(b) + gzip.compress(b"\n")), ("sub.jsonl.zst", lambda b: pyarrow.compress(b, codec="zstd", asbytes=True))])
def test_plain_gzip_and_zstandard_give_the_same_documents(tmp_path, name, packed):
    corpus = _dolma(tmp_path, packed(_jsonl(DOCUMENTS)), name)
    found = [*corpora.rows(corpus, "train"), *corpora.rows(corpus, "validation")]
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in DOCUMENTS)
    assert {row["text"] for row in found} == {row["text"] for row in DOCUMENTS} and {row["source"] for row in found} == {"books"}


def test_a_document_without_text_is_left_out(tmp_path):
    corpus = _dolma(tmp_path, _jsonl([*DOCUMENTS, {"text": "", "id": "empty"}]))
    assert {row["text"] for split in ("train", "validation") for row in corpora.load(corpus, split=split)} == {row["text"] for row in DOCUMENTS}


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8"), ("a.jsonl", GOOD + b'{"text": "cut', r"a\.jsonl, line 2 is not JSON"),
    ("a.jsonl", GOOD + GOOD + b'{"body": "x"}\n', r"a\.jsonl, line 3 has no text under the key 'text'"),
    ("a.jsonl", b'{"text": 3}\n', r"line 1 has no text"), ("a.jsonl", b'["text"]\n', r"line 1 is not a JSON object"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1 has half a surrogate pair"), ("a.jsonl", b"[" * 200_000, r"line 1 is not JSON"),
    ("a.jsonl", b"", r"a\.jsonl is empty"), ("a.jsonl.gz", gzip.compress(b""), r"a\.jsonl\.gz holds no line"),
    ("a.jsonl.gz", gzip.compress(_jsonl(DOCUMENTS))[:-20], r"a\.jsonl\.gz is truncated or damaged"),
    ("a.jsonl.gz", gzip.compress(_jsonl(DOCUMENTS))[:-1], r"truncated or damaged"), ("a.jsonl.gz", b"hello", r"truncated or damaged"),
    ("a.jsonl.zst", pyarrow.compress(_jsonl(DOCUMENTS), codec="zstd", asbytes=True)[:-9], r"a\.jsonl\.zst is truncated or damaged")])
def test_damage_is_named_by_file_and_line_and_gives_no_half_result(tmp_path, name, content, message):
    with pytest.raises(HildaError, match=message):
        corpora.load(_dolma(tmp_path, content, name))


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    with pytest.raises(HildaError, match="line 3 has no text"):
        list(corpora.rows(_dolma(tmp_path, GOOD + b"\n" + b"{}\n")))


def test_unknown_names_splits_and_empty_folders_are_errors(tmp_path):
    for name, split, message in [("moby", "train", "unknown corpus 'moby'"), ("dolma", "train", "set HILDA_DATA"), ("math500", "train", "has no split 'train'"),
                                 (f"dolma:{tmp_path}", "train", "no file ending in"), ("arithmetic", "dev", "unknown split"),
                                 (f"dolma:{tmp_path}", "test", "has no split 'test'")]:
        with pytest.raises(HildaError, match=message):
            corpora.load(name, split=split)


def test_without_network_the_hub_is_a_clear_error(monkeypatch):
    import huggingface_hub

    def unreachable(self, *arguments, **keywords):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(HildaError, match=r"openai/gsm8k is not in the folder HILDA_DATA and the hub cannot be reached \(ConnectionError\)"):
        corpora.load("gsm8k")


def test_the_hub_is_asked_for_the_commit_that_is_recorded(monkeypatch):
    import huggingface_hub

    asked = {}

    def table(path, configuration, **keywords):
        asked.update(keywords, path=path)
        return iter([{"problem": "1+1?", "solution": "2", "answer": "2"}])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, *a, **k: type("Info", (), {"sha": "abc123"}))
    monkeypatch.setattr(corpora, "load_dataset", table)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    corpus = corpora.load("math500", split="test")
    assert asked["revision"] == "abc123" and corpus[0]["text"] == math500.prompt({"problem": "1+1?"}) + " 2"
    found = corpora.provenance(corpus)
    assert (found["origin"], found["revision"], found["source"], found["rows"]) == ("hub", "abc123", "HuggingFaceH4/MATH-500", 1)


# ---- splits and samples ---------------------------------------------------------------------------------------------------------

def test_splits_are_disjoint_complete_and_free_of_repeats(tmp_path):
    corpus = _dolma(tmp_path, _jsonl(DOCUMENTS))
    _dolma(tmp_path, _jsonl(DOCUMENTS[::2]), "b.jsonl")
    train, held = ({row["text"] for row in corpora.load(corpus, split=split)} for split in ("train", "validation"))
    assert train.isdisjoint(held) and train | held == {row["text"] for row in DOCUMENTS} and held
    assert len(corpora.load(corpus)) == len(train)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.integers(0, 100), st.integers(0, 100))
def test_split_of_is_a_function_of_the_text_and_grows_with_the_share(text, one, two):
    low, high = sorted((one, two))
    assert corpora.split_of(text, 0) == "train" and corpora.split_of(text, 100) == "validation"
    assert (corpora.split_of(text, low), corpora.split_of(text, high)) != ("validation", "train")


def test_a_limit_is_a_seeded_sample_in_file_order(tmp_path):
    corpus = _dolma(tmp_path, _jsonl(DOCUMENTS))
    everything = corpora.load(corpus)["text"][:]
    one, again, other = (corpora.load(corpus, limit=20, seed=seed)["text"][:] for seed in (1, 1, 2))
    assert one == again != other and len(set(one)) == 20
    assert [everything.index(text) for text in one] == sorted(everything.index(text) for text in one)
    assert corpora.load(corpus, limit=10**6)["text"][:] == everything


# ---- provenance -----------------------------------------------------------------------------------------------------------------

def test_provenance_carries_the_sha256_of_every_file_and_survives_map(tmp_path):
    content = _jsonl(DOCUMENTS)
    corpus = corpora.load(_dolma(tmp_path, content))
    found = corpora.provenance(corpus.map(lambda row: {"length": len(row["text"])}))
    assert found["sha256"] == {"a.jsonl": hashlib.sha256(content).hexdigest()}
    assert (found["origin"], found["rows"], found["split"]) == ("folder", len(corpus), "train") and found["licence"]


def test_a_dataset_from_elsewhere_has_no_provenance():
    with pytest.raises(HildaError, match="no provenance"):
        corpora.provenance(corpora.Dataset.from_dict({"text": ["a"]}))


@pytest.mark.parametrize("name", ["arithmetic", "countdown", "sudoku", "gsm_symbolic"])
def test_procedural_corpora_need_no_file_and_name_version_and_seed(name):
    if name == "gsm_symbolic":
        pytest.importorskip("reasoning_gym", reason="reasoning-gym (the extra gym) is not installed")
    corpus = corpora.load(name, limit=20, seed=3)
    assert corpus.column_names == ["text", "source", "id", "prompt", "response"] and len(corpus) == 20
    assert all(row["text"] == row["prompt"] + row["response"] for row in corpus)
    found = corpora.provenance(corpus)
    assert found["origin"] == "procedural" and "seed 3" in found["revision"] and ("reasoning-gym 0." in found["licence"]) == (name == "gsm_symbolic")


# ---- stories that a model writes ------------------------------------------------------------------------------------------------

def test_written_stories_are_labelled_cached_and_written_once():
    calls = []

    def writer(openings, seed):
        calls.append(len(openings))
        return [f" The end of {seed} {i}." for i in range(len(openings))]

    one = corpora.load("stories-smollm2", limit=40, writer=writer)
    assert sum(calls) == 40 and corpora.load("stories-smollm2", limit=40)["text"][:] == one["text"][:] and sum(calls) == 40
    found = corpora.provenance(one)
    assert found["origin"] == "embedded" and "SmolLM2 itself" in found["note"] and list(found["sha256"]) == ["stories-smollm2-40-seed0.jsonl"]
    held = corpora.load("stories-smollm2", split="validation", limit=40)
    assert len(one) + len(held) == 40 and set(one["text"]).isdisjoint(held["text"])


def test_an_interrupted_writer_goes_on_and_gives_the_same_bytes():
    def writer(openings, seed):
        return [f" And so on {seed}{i}." for i in range(len(openings))]

    def dying(openings, seed):
        if seed >= 32:
            raise KeyboardInterrupt
        return writer(openings, seed)

    with pytest.raises(KeyboardInterrupt):
        corpora.load("stories-smollm2", limit=50, writer=dying)
    (partial,) = paths.cache_dir().glob("*.partial")
    partial.write_bytes(partial.read_bytes()[:-5])  # a kill in the middle of a row
    corpora.load("stories-smollm2", limit=50, writer=writer)
    (resumed,) = (path.read_bytes() for path in paths.cache_dir().iterdir())
    next(paths.cache_dir().iterdir()).unlink()
    corpora.load("stories-smollm2", limit=50, writer=writer)
    assert [path.read_bytes() for path in paths.cache_dir().iterdir()] == [resumed]


def test_smollm2_is_the_default_writer_and_stands_in_for_tinystories_without_network(monkeypatch):
    import huggingface_hub

    from hildalib.decoding import autoregressive

    def unreachable(self, *arguments, **keywords):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(autoregressive, "story_writer", lambda: lambda openings, seed: [f" The end, {seed} and {i}." for i in range(len(openings))])
    with pytest.warns(UserWarning, match="SmolLM2 writes stories itself"):
        parts = {split: corpora.load("tinystories", split=split) for split in ("train", "validation")}
    assert all(corpora.provenance(part)["source"] == "stories-smollm2" for part in parts.values())
    assert set(parts["train"]["text"]).isdisjoint(parts["validation"]["text"]) and len(parts["validation"]) > 0


def test_a_written_story_ends_with_a_sentence_and_does_not_touch_the_global_generator():
    import torch

    from hildalib import nano
    from hildalib.decoding import autoregressive

    assert autoregressive.whole_sentences(' He ran. "Stop!" she said. Then he') == ' He ran. "Stop!" she said.'
    assert autoregressive.whole_sentences("no end") == "no end"
    model, tokenizer = nano.nano(16, 1, seed=0)
    before = torch.get_rng_state()
    ids = tokenizer(["1+2="], return_tensors="pt", add_special_tokens=False)["input_ids"]
    one, two = (autoregressive.ar_decode(model, ids, max_new_tokens=6, temperature=1.0, seed=seed).ids for seed in (3, 3))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


# ---- the real files -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, split, count", [
    ("tinystories", "train", 3500), ("tinystories", "validation", 400), ("dolma", "train", 1500), ("dolma", "validation", 50), ("gsm8k", "test", 1319),
    ("math500", "test", 500), ("humaneval", "test", 164), ("mbpp", "test", 500), ("mbpp", "validation", 90), ("mbpp", "train", 374),
    ("mbpp", "prompt", 10), ("instruct", "train", 1400), ("wikitext2", "validation", 60), ("countdown", "d1", 240)])
def test_real_files_give_their_rows_with_provenance(real_data, name, split, count):
    corpus = corpora.load(name, split=split)
    found = corpora.provenance(corpus)
    assert count <= len(corpus) < count * 2 and found["origin"] == "folder" and found["licence"]
    for file, digest in found["sha256"].items():
        assert hashlib.sha256((paths.data_dir() / file).read_bytes()).hexdigest() == digest
    assert len(set(corpus["text"])) == len(corpus) and all(text.strip() for text in corpus["text"])


@pytest.mark.parametrize("name, splits", [("tinystories", ("train", "validation")), ("dolma", ("train", "validation")),
                                          ("gsm8k", ("train", "validation", "test")), ("mbpp", ("train", "validation", "test", "prompt"))])
def test_real_splits_share_no_document(real_data, name, splits):
    texts = [text for split in splits for text in corpora.load(name, split=split)["text"]]
    assert len(texts) == len(set(texts))
