"""Packing: every token once and in order, shards that survive a kill, rows from disk equal to rows from memory."""

import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildalib import HildaError, packing

EOS = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 50), max_size=20), min_size=1, max_size=30)
few = settings(max_examples=60, deadline=None)


# ---- pack -----------------------------------------------------------------------------------------------------------------------

def test_docstring_picture_is_what_pack_gives():
    found = packing.pack([[5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6, 7]], 8, EOS)
    lines = [line.split() for line in packing.pack.__doc__.splitlines()]
    picture = {line[0]: [int(cell) for cell in line[1:]] for line in lines if len(line) == 17 and line[0] in found}
    assert picture == {key: value.flatten().tolist() for key, value in found.items()}


@few
@given(DOCUMENTS, st.integers(1, 17))
def test_pack_keeps_every_token_once_and_in_order_and_marks_all_padding(documents, length):
    found = packing.pack(documents, length, EOS)
    ids, owners = found["input_ids"].flatten(), found["doc_ids"].flatten()
    real = owners >= 0
    assert ids[real].tolist() == [token for document in documents for token in [*document, EOS]]
    for number, document in enumerate(documents):
        assert ids[owners == number].tolist() == [*document, EOS]
    assert (owners[real].diff() >= 0).all() and not real[int(real.sum()):].any()
    assert (~real).sum() < length and (ids[~real] == EOS).all() and (owners[~real] == packing.PADDING).all()
    assert (found["position_ids"] == torch.arange(length)).all()
    assert all(value.dtype == torch.int64 and value.shape == found["input_ids"].shape for value in found.values())


@few
@given(DOCUMENTS, st.integers(1, 17))
def test_pack_whole_never_splits_a_document(documents, length):
    found, cut = packing.pack_whole(documents, length, EOS)
    whole = [document for document in documents if len(document) < length]
    assert cut == len(documents) - len(whole)
    for number, document in enumerate(documents):
        rows, positions = (found["doc_ids"] == number).nonzero(as_tuple=True)
        assert rows.unique().numel() == 1 and (positions.diff() == 1).all()
        assert found["input_ids"][rows, positions].tolist() == [*document, EOS][:length]
    real = found["doc_ids"] >= 0
    assert int(real.sum()) == sum(min(len(document) + 1, length) for document in documents)
    for row in found["doc_ids"]:
        assert (row[row >= 0].diff() >= 0).all() and row[0] >= 0
    assert (found["input_ids"][~real] == EOS).all()


@few
@given(DOCUMENTS, st.integers(1, 17))
def test_pack_whole_leaves_no_two_rows_that_would_fit_into_one(documents, length):
    used = (packing.pack_whole(documents, length, EOS)[0]["doc_ids"] >= 0).sum(1).sort().values
    assert len(used) < 2 or int(used[0] + used[1]) > length


def test_pack_whole_takes_more_documents_than_its_buffer(monkeypatch):
    monkeypatch.setattr(packing, "BUFFER", 3)
    documents = [[i] * (i % 4) for i in range(1, 11)]
    found, cut = packing.pack_whole(documents, 6, EOS)
    assert cut == 0 and sorted(found["doc_ids"].unique().tolist()) == [*([-1] if (found["doc_ids"] < 0).any() else []), *range(10)]


@pytest.mark.parametrize("function", [packing.pack, packing.pack_whole])
def test_nothing_to_pack_and_rows_without_positions_are_errors(function):
    with pytest.raises(HildaError, match="no document"):
        function([], 8, EOS)
    with pytest.raises(HildaError, match="length=0"):
        function([[1]], 0, EOS)


# ---- shards ---------------------------------------------------------------------------------------------------------------------

def _tokenizer(words=()):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<eos>", "[MASK]", *map(chr, range(32, 127)), "Ġ", *words]
    raw = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", mask_token="[MASK]")


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer()


def _texts(count=60):
    rng = random.Random(0)
    return ["".join(rng.choices("abc de", k=rng.randint(0, 40))) for _ in range(count)]


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _write(folder, tokenizer, **kwargs):
    return packing.write_shards(iter(kwargs.pop("texts", _texts())), tokenizer, folder, **{"shard_tokens": 200, "batch": 7, **kwargs})


@pytest.mark.parametrize("length", [1, 13, 64, 5000])
def test_rows_from_shards_equal_rows_from_memory(tmp_path, tokenizer, length):
    shards = packing.open_shards(_write(tmp_path, tokenizer), tokenizer)
    documents = tokenizer(_texts(), add_special_tokens=False)["input_ids"]
    assert [shards[i].tolist() for i in range(len(shards))] == documents
    memory, rows = packing.pack(documents, length, tokenizer.eos_token_id), packing.Packed(shards, length)
    assert len(rows) == len(memory["input_ids"]) and len(list(tmp_path.glob("*.bin"))) > 3
    for key, value in memory.items():
        assert torch.equal(torch.stack([rows[i][key] for i in range(len(rows))]), value)


def test_documents_are_read_only_views_and_survive_pickling(tmp_path, tokenizer):
    import pickle

    shards = packing.open_shards(_write(tmp_path, tokenizer))
    assert isinstance(shards[3], np.memmap) and not shards[3].flags.writeable
    copy = pickle.loads(pickle.dumps(shards))
    assert copy[3].tolist() == shards[3].tolist()
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_special_tokens_spelled_out_in_a_text_do_not_become_special_ids(tmp_path, tokenizer):
    shards = packing.open_shards(_write(tmp_path, tokenizer, texts=["a[MASK]b<eos>c"]))
    assert not {tokenizer.mask_token_id, tokenizer.eos_token_id} & set(shards[0].tolist())
    assert len(shards[0]) == len("a[MASK]b<eos>c")


def test_a_large_vocabulary_gets_four_bytes_an_id(tmp_path):
    large = _tokenizer([f"w{i}" for i in range(1 << 16)])
    folder = _write(tmp_path, large, texts=["abc"])
    assert (folder / "shard-00000.bin").stat().st_size == 4 * 4


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_stopping_at_any_write_and_resuming_gives_the_same_bytes(tmp_path, tokenizer, monkeypatch, name):
    whole = _bytes(_write(tmp_path / "whole", tokenizer))
    real, stops = getattr(os, name), 0
    for stop in range(2 * len(list((tmp_path / "whole").glob("*.bin"))) + 1):
        folder, calls = tmp_path / f"{name}{stop}", iter(range(10**6))

        def dying(*arguments):
            if next(calls) == stop:
                raise KeyboardInterrupt  # nothing in the code under test catches it or cleans up: as after a kill
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, dying)
            _write(folder, tokenizer)
        with pytest.raises(HildaError, match="no finished shards"):
            packing.open_shards(folder)
        assert _bytes(_write(folder, tokenizer)) == whole
        stops += 1
    assert stops > 8


def test_sigkill_at_a_random_row_and_resuming_gives_the_same_bytes(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = textwrap.dedent("""
        import sys
        from transformers import AutoTokenizer
        from hildalib import packing
        sys.path.insert(0, sys.argv[1])
        from test_packing import _texts
        def slow():
            for number, text in enumerate(_texts()):
                print(number, flush=True)
                sys.stdin.readline()  # one row a line from the test: the kill falls on a known row, anywhere in the writing
                yield text
        packing.write_shards(slow(), AutoTokenizer.from_pretrained(sys.argv[2]), sys.argv[3], shard_tokens=200, batch=1)
    """)
    here, folder = os.path.dirname(__file__), tmp_path / "killed"
    row = random.Random().randint(20, len(_texts()) - 1)  # after at least one shard; another row every time
    worker = subprocess.Popen([sys.executable, "-c", program, here, str(tmp_path / "tokenizer"), str(folder)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.path.dirname(here))
    while int(worker.stdout.readline()) < row:
        worker.stdin.write("\n")
        worker.stdin.flush()
    worker.kill()
    worker.communicate()
    begun = list(folder.glob("*.json"))
    assert begun and not (folder / packing.INDEX).exists()
    assert _bytes(_write(folder, tokenizer)) == _bytes(_write(tmp_path / "whole", tokenizer))


def test_a_finished_folder_is_left_as_it_is(tmp_path, tokenizer):
    folder = _write(tmp_path, tokenizer)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    _write(folder, tokenizer)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_shard_is_named_with_the_remedy(tmp_path, tokenizer, damage):
    path = _write(tmp_path, tokenizer) / "shard-00001.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(HildaError, match=r"shard-00001\.bin.*resume=False"):
        packing.open_shards(tmp_path)
    path.unlink()
    with pytest.raises(HildaError, match=r"shard-00001\.bin.*resume=False"):
        packing.open_shards(tmp_path)
    assert len(packing.open_shards(_write(tmp_path, tokenizer, resume=False))) == len(_texts())


def test_a_broken_record_is_named(tmp_path, tokenizer):
    (_write(tmp_path, tokenizer) / "shard-00001.json").write_text("{", encoding="utf-8")
    with pytest.raises(HildaError, match=r"shard-00001\.json"):
        packing.open_shards(tmp_path)


def test_another_tokenizer_shard_size_or_source_is_refused(tmp_path, tokenizer):
    other = _tokenizer(["zz"])
    folder = _write(tmp_path, tokenizer)
    with pytest.raises(HildaError, match="another tokenizer"):
        packing.open_shards(folder, other)
    with pytest.raises(HildaError, match="another tokenizer"):
        _write(folder, other)
    with pytest.raises(HildaError, match="another shard_tokens"):
        _write(folder, tokenizer, shard_tokens=300)
    (folder / packing.INDEX).unlink()
    with pytest.raises(HildaError, match="not those"):
        _write(folder, tokenizer, texts=["x", *_texts()])
    with pytest.raises(HildaError, match="not those"):
        _write(folder, tokenizer, texts=_texts()[:5])


def test_padding_or_truncating_calls_do_not_change_the_fingerprint(tokenizer):
    before = packing.fingerprint(tokenizer)
    tokenizer(["abc"], max_length=2, truncation=True)
    assert packing.fingerprint(tokenizer) == before != packing.fingerprint(_tokenizer(["zz"]))


def test_a_source_without_texts_and_a_tokenizer_without_eos_are_errors(tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(HildaError, match="no text"):
        _write(tmp_path / "none", tokenizer, texts=[])
    with pytest.raises(HildaError, match="end-of-sequence"):
        _write(tmp_path / "eos", PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
