"""Prompt-response pairs land on their own blocks, and only the response is noised."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from hildalib import HildaError, backbones
from hildalib.pairs import of_source, pack_pairs, unpack_pairs
from hildalib.tasks.tinystories import OPENING_WORDS


def picture(row, maskable=False):
    return " | ".join(" ".join("#" if maskable and v else "." if maskable else "-" if v < 0 else str(int(v)) for v in half) for half in (row[:8], row[8:]))


def test_docstring_picture_is_what_pack_pairs_gives():
    rows, left_out = pack_pairs([([5, 6, 7], [8, 9])], 12, 0, 4)
    drawn = {"input_ids": picture(rows["input_ids"][0]), "doc_ids": picture(rows["doc_ids"][0]), "maskable": picture(rows["maskable"][0], True)}
    assert drawn == {"input_ids": "5 6 7 8 9 0 0 0 | 0 0 0 0", "doc_ids": "0 0 0 0 0 0 0 0 | - - - -", "maskable": ". . . # # # # # | . . . ."}
    assert all(f"{name:<9}  {value}" in pack_pairs.__doc__ for name, value in drawn.items()) and left_out == 0


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.lists(st.integers(5, 9), max_size=7), st.lists(st.integers(5, 9), max_size=7)), min_size=1, max_size=8),
       size=st.sampled_from([1, 2, 4, 8]))
def test_every_pair_that_fits_is_there_once_whole_on_a_block_border_and_ends_in_eos(pairs, size):
    if min(len(p) + len(r) for p, r in pairs) >= 16:
        return
    rows, left_out = pack_pairs(pairs, 16, 0, size)
    found = []
    for ids, docs, maskable in zip(rows["input_ids"], rows["doc_ids"], rows["maskable"]):
        assert not maskable[docs < 0].any() and (ids[docs < 0] == 0).all()
        for number in docs[docs >= 0].unique():
            where = (docs == number).nonzero().flatten()
            prompt, response = pairs[int(number)]
            assert where[0] % size == 0 and len(where) % size == 0 and len(where) - len(prompt) - len(response) in range(1, size + 1)
            assert ids[where].tolist() == prompt + response + [0] * (len(where) - len(prompt) - len(response))
            assert maskable[where].tolist() == [False] * len(prompt) + [True] * (len(where) - len(prompt))
            found.append(int(number))
    assert found == [n for n, (p, r) in enumerate(pairs) if len(p) + len(r) < 16] and left_out == len(pairs) - len(found)


def test_a_length_off_the_block_grid_and_pairs_that_are_all_too_long_are_errors():
    with pytest.raises(HildaError, match="length 10 is no multiple of block_size 4"):
        pack_pairs([([5], [6])], 10, 0, 4)
    with pytest.raises(HildaError, match="no prompt-response pair fits into 4 tokens"):
        pack_pairs([([5, 6], [7, 8])], 4, 0, 4)
    assert pack_pairs([([5, 6], [7, 8]), ([5], [6])], 4, 0, 4)[1] == 1


def test_rows_have_the_types_that_training_takes():
    rows, _ = pack_pairs([([5], [6])] * 3, 8, 0, 4)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in rows.items()} == {
        "input_ids": (torch.long, (2, 8)), "doc_ids": (torch.long, (2, 8)), "maskable": (torch.bool, (2, 8))}


def test_pairs_come_back_as_they_went_in():
    pairs = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9, 5, 6]), ([9, 9], [])]
    for size in (2, 4, 12):
        assert unpack_pairs(pack_pairs(pairs, 12, 0, size)[0], 0) == pairs


def test_pairs_of_a_source_are_worded_as_evaluation_words_them(tmp_path, monkeypatch):
    """A question becomes a user's turn, the opening of a story stays as it is; a source of mere texts is refused."""
    story = "Once upon a time, there was a small fox who wanted to fly. " * 8
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "stories.jsonl").write_text("".join(json.dumps({"text": f"{story}It was day {n}."}) + "\n" for n in range(4)), encoding="utf-8")
    (tmp_path / "dolma_mini").mkdir()
    (tmp_path / "dolma_mini" / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}", "id": str(n)}) + "\n" for n in range(40)), encoding="utf-8")
    monkeypatch.setenv("HILDA_DATA", str(tmp_path))
    tokenizer = backbones.nano()[1]
    tokenizer.chat_template = "{% for message in messages %}U:{{ message.content }};A:{% endfor %}"
    told = of_source("tinystories", tokenizer, split="train", limit=3, seed=0)
    assert len(told) == 3 and all(len(opening.split()) == OPENING_WORDS and (opening + rest).startswith(story) for opening, rest in told)
    asked = of_source("arithmetic", tokenizer, split="train", limit=3, seed=0)
    assert all(prompt.startswith("U:") and prompt.endswith(";A:") for prompt, _ in asked)
    with pytest.raises(HildaError, match="no pairs of prompt and response"):
        of_source("dolma", tokenizer, split="train", limit=3, seed=0)
