"""Prompt-response pairs -> rows in which only the response is noised and scored.

Each pair begins on a block border and is filled up with EOS to the next one, so that its blocks lie as decoding will lay them
(LLaDA2.0 section 5.1; block-aligned EOS instead of padding to the full length, which would make EOS most of the targets).
Entry points: `of_source` and `worded` (texts), `pack_pairs`, `unpack_pairs` (ids).
"""

from collections.abc import Iterable

import torch

from hildalib import HildaError, backbones, corpora, tasks
from hildalib.packing import PADDING


def worded(task, tokenizer, prompts: list[str], chat: bool) -> list[str]:
    """What the model is given: with `chat` each prompt as a user's turn, unless the task's prompts are openings that it is to continue."""
    return [backbones.chat_prompt(tokenizer, prompt) for prompt in prompts] if chat and not getattr(task, "CONTINUES", False) else prompts


def of_source(name: str, tokenizer, *, split: str, limit: int | None, seed: int) -> list[tuple[str, str]]:
    """(prompt, response) of a source, the prompt worded as evaluation words it: a user's turn of the chat template where there is one, or the bare
    opening of a text to continue (TinyStories). HildaError for a source without pairs, and as in `corpora.load`."""
    corpus = corpora.load(name, split=split, limit=limit, seed=seed, pairs=True)
    if "prompt" not in corpus.column_names:
        raise HildaError(f"source {name!r} has texts but no pairs of prompt and response; take it out of sft_sources, or use it in sources")
    task = tasks.load(name) if name in tasks.NAMES else None
    return list(zip(worded(task, tokenizer, corpus["prompt"], chat=True), corpus["response"]))


def pack_pairs(pairs: Iterable[tuple[list[int], list[int]]], length: int, eos_token_id: int, block_size: int) -> tuple[dict[str, torch.Tensor], int]:
    """Rows of whole pairs, first come first packed, and the number of pairs left out because they exceed `length`.

    pairs: (prompt ids, response ids). Returns {"input_ids", "doc_ids" (-1 = padding), "maskable" (True = response, its EOS and
    the EOS up to the block border)}, each (N, L). Example: prompt [5 6 7], response [8 9], length 12, K 4, EOS 0

        input_ids  5 6 7 8 9 0 0 0 | 0 0 0 0
        doc_ids    0 0 0 0 0 0 0 0 | - - - -
        maskable   . . . # # # # # | . . . .

    Raises HildaError if length is no multiple of block_size, or no pair fits.
    """
    if length % block_size:
        raise HildaError(f"length {length} is no multiple of block_size {block_size}; pairs could not be aligned to blocks")
    rows: list[list[tuple[int, list[int], int]]] = []
    room = left_out = 0
    for number, (prompt, response) in enumerate(pairs):
        tokens = [*prompt, *response, eos_token_id]
        tokens += [eos_token_id] * (-len(tokens) % block_size)
        if len(tokens) > length:
            left_out += 1
            continue
        if len(tokens) > room:
            rows.append([])
            room = length
        rows[-1].append((number, tokens, len(prompt)))
        room -= len(tokens)
    if not rows:
        raise HildaError(f"no prompt-response pair fits into {length} tokens; raise `length` or use shorter pairs")
    packed = {"input_ids": torch.full((len(rows), length), eos_token_id), "doc_ids": torch.full((len(rows), length), PADDING),
              "maskable": torch.zeros(len(rows), length, dtype=torch.bool)}
    for row, members in enumerate(rows):
        at = 0
        for number, tokens, prompt in members:
            end = at + len(tokens)
            packed["input_ids"][row, at:end] = torch.tensor(tokens)
            packed["doc_ids"][row, at:end] = number
            packed["maskable"][row, at + prompt:end] = True
            at = end
    return packed, left_out


def unpack_pairs(rows: dict[str, torch.Tensor], eos_token_id: int) -> list[tuple[list[int], list[int]]]:
    """The (prompt ids, response ids) that `pack_pairs` made `rows` of, in their order; a response ends before its first EOS."""
    pairs = []
    for ids, docs, maskable in zip(rows["input_ids"], rows["doc_ids"], rows["maskable"]):
        for number in docs[docs != PADDING].unique_consecutive():
            own = docs == number
            response = ids[own & maskable].tolist()
            pairs.append((ids[own & ~maskable].tolist(), response[:response.index(eos_token_id)]))
    return pairs
