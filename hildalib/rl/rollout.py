"""Completions sampled by edit decoding, with everything that a likelihood or a reward may ask of them.

Entry points: `sample` (prompt ids -> `Rollout`), `score` (texts -> rewards), `graded` (a task by its partial credit), `spliced`
(a completion for every draft of a block), `within` (settings that cannot spend more than a budget of forwards).
"""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import EditSettings, Trace, edit_decode
from hildalib.decoding.decoded import eos_ids


@dataclass(frozen=True)
class Rollout:
    """B sampled rows on canvases of length L, a whole number of blocks, with position 0 at the first real token.

    x0 (B, L) long: the prompt, then what stood in each block when it closed. docs (B, L) long: 0, and -1 where a row has no
    block. scored (B, L) bool, True = a token of the completion: up to and with the first EOS, at most max_new_tokens; what
    else was decoded in that last block is its tail. The C *rounds* of a block are the forwards that wrote in it: noisy
    (B, C, L) long is the canvas that round c read, wrote (B, C, L) bool where it wrote (filled or edited), predicted (B, C, L)
    long the block with every mask replaced by the token chosen for it; blocks with fewer rounds repeat x0 and write nothing.
    step_map (B, L) long: the row's forward that wrote the token last, 0 = never. confidence (B, L): its probability then,
    nan = never. edits (B,): tokens that were changed after they had been written. ids (B, T), forwards, positions_fed (B,): as
    in `Decoded`. prompt_length (B,).
    """

    x0: Tensor
    docs: Tensor
    scored: Tensor
    noisy: Tensor
    wrote: Tensor
    predicted: Tensor
    step_map: Tensor
    confidence: Tensor
    edits: Tensor
    ids: Tensor
    forwards: Tensor
    positions_fed: Tensor
    prompt_length: Tensor
    block_size: int
    mask_token_id: int
    temperature: float

    @property
    def written(self) -> Tensor:
        """(B, L) bool: decoded positions, the tail of the last block included."""
        return (self.docs == 0) & (torch.arange(self.x0.shape[1]) >= self.prompt_length[:, None])

    def take(self, rows: Tensor) -> "Rollout":
        """The rows at the indices or mask `rows`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if torch.is_tensor(value)})


def sample(model, prompt_ids: Tensor, settings: EditSettings, *, attention_mask: Tensor | None = None,
           generator: torch.Generator | None = None) -> Rollout:
    """One completion a row of prompt_ids (B, P), left-padded as for `edit_decode`; CPU tensors.

    Block size 1 with tau_edit >= 1 samples the AR model: one token a forward, left to right. Raises HildaError with look_back:
    an edit of a closed block was made in sight of a later one, a state that no likelihood here can show again.
    """
    if settings.look_back:
        raise HildaError(f"look_back = {settings.look_back}: rollouts need look_back = 0, edits of closed blocks have no likelihood here")
    decoded = edit_decode(model, prompt_ids, settings, attention_mask=attention_mask, generator=generator, trace=True)
    trace = decoded.trace
    used = int((trace.ids[-1] != trace.mask_token_id).any(0).nonzero()[0].max()) // trace.block_size * trace.block_size + trace.block_size
    trace = replace(trace, **{name: getattr(trace, name)[..., :used] for name in ("ids", "state", "confidence", "predicted")})
    x0, length = torch.from_numpy(trace.ids[-1].copy()), torch.from_numpy(trace.prompt_length)
    docs = torch.where(x0 == trace.mask_token_id, -1, 0)
    position = torch.arange(used)
    generated = (docs == 0) & (position >= length[:, None])
    ended = (torch.isin(x0, torch.tensor(eos_ids(model), dtype=torch.long)) & generated).long()
    scored = generated & (position < length[:, None] + settings.max_new_tokens) & (ended.cumsum(1) - ended == 0)
    return Rollout(x0, docs, scored, *_rounds(trace), *_history(trace), ids=decoded.ids.cpu().clone(), forwards=decoded.forwards.cpu().clone(),
                   positions_fed=decoded.positions_fed.cpu().clone(), prompt_length=length, block_size=trace.block_size,
                   mask_token_id=trace.mask_token_id, temperature=settings.temperature)


def _blocks(values: np.ndarray, size: int) -> np.ndarray:
    """(..., L) -> (..., L // K, K)."""
    return values.reshape(*values.shape[:-1], -1, size)


def _rounds(trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """noisy, wrote and predicted, each (B, C, L): round c of a block is the c-th forward that wrote in it."""
    size, before, wrote = trace.block_size, trace.ids[:-1], trace.ids[1:] != trace.ids[:-1]
    touched = _blocks(wrote, size).any(-1)  # (S, B, L // K)
    rank = touched.cumsum(0) - 1
    frame = np.full((touched.shape[1], int(rank.max()) + 1, touched.shape[2]), -1)
    step, row, block = touched.nonzero()
    frame[row, rank[step, row, block], block] = step
    rows, blocks = np.arange(frame.shape[0])[:, None, None], np.arange(frame.shape[2])

    def gather(values: np.ndarray, otherwise) -> Tensor:
        picked = _blocks(values, size)[frame.clip(0), rows, blocks]  # (B, C, L // K, K)
        picked = np.where(frame[..., None] >= 0, picked, otherwise)
        return torch.from_numpy(picked.reshape(*frame.shape[:2], -1))

    final = _blocks(trace.ids[-1], size)[:, None]
    return gather(before, final), gather(wrote, False), gather(trace.predicted[1:], final)


def _history(trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """step_map (B, L), confidence (B, L), edits (B,)."""
    before, after = trace.ids[:-1], trace.ids[1:]
    wrote = before != after
    step_map = (wrote * trace.forward[1:, :, None]).max(0)  # a row's forwards only grow
    edits = (wrote & (before != trace.mask_token_id)).sum((0, 2))
    return torch.from_numpy(step_map), torch.from_numpy(trace.confidence[-1].copy()), torch.from_numpy(edits)


def graded(task) -> SimpleNamespace:
    """`task` with its partial credit, `parts`, as its score: a reward that tells apart completions which are all wrong.

    Raises HildaError where the task has none."""
    if not hasattr(task, "parts"):
        raise HildaError(f"task {task.name} has no partial credit; set partial_credit to false, or take arithmetic")
    return SimpleNamespace(name=f"{task.name}, parts", version=task.version, prompt=task.prompt, score=task.parts)


def score(ids: Tensor, tokenizer, task, items: list[dict]) -> Tensor:
    """(B,) rewards in [0, 1] of generated ids (B, T); items: one a row. Equal answers to one item are scored once.

    Raises HildaError when the task gives anything else: a reward that is not a number would reach every weight.
    """
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    asked = {(id(item), text): (text, item) for text, item in zip(texts, items)}
    pairs = list(asked.values())
    found = task.scores(*map(list, zip(*pairs))) if hasattr(task, "scores") else [task.score(text, item) for text, item in pairs]
    if wrong := [value for value in found if not 0 <= value <= 1]:
        raise HildaError(f"task {task.name} scored an answer {wrong[0]}; rewards must be in [0, 1]")
    known = dict(zip(asked, found))
    return torch.tensor([known[id(item), text] for text, item in zip(texts, items)], dtype=torch.float32)


def spliced(rollout: Rollout, drafts: Tensor, where: Tensor, eos: list[int]) -> Tensor:
    """(n, T) completions, one for each True of where (B, C, L // K): the row's own, with that block as drafts (B, C, L) has it.

    What a full-canvas model would have predicted beyond the block is not known to a block-causal one; the blocks that were
    really decoded stand in for it. Cut after the first EOS and EOS-padded like `Decoded.ids`.
    """
    row, copy, block = where.nonzero().T
    length = rollout.prompt_length[row][:, None]
    column = block[:, None] * rollout.block_size + torch.arange(rollout.block_size)
    canvas = rollout.x0[row]
    new = torch.where(column < length, canvas.gather(1, column), drafts[row, copy].gather(1, column))
    canvas = canvas.scatter(1, column, new).masked_fill(rollout.docs[row] < 0, eos[0])
    canvas = F.pad(canvas, (0, rollout.ids.shape[1]), value=eos[0])
    ids = canvas.gather(1, length + torch.arange(rollout.ids.shape[1]))
    ended = torch.isin(ids, torch.tensor(eos)).long()
    return ids.masked_fill(ended.cumsum(1) - ended > 0, eos[0])


def within(settings: EditSettings, forwards: int, block_size: int) -> EditSettings:
    """`settings` that cannot spend more than `forwards` forwards a row, whatever the model and the prompt's length.

    A block takes at most ceil(K / minimum) forwards to fill and max_post_steps to edit: first max_post_steps gives way, then
    `minimum` is raised. Raises HildaError when not even one forward a block fits.
    """
    blocks = -(-(settings.max_new_tokens + block_size - 1) // block_size)  # a prompt may end just before a border
    each = forwards // blocks
    if each < 1:
        raise HildaError(f"{forwards} forwards are fewer than the {blocks} blocks of max_new_tokens = {settings.max_new_tokens}; allow more, or fewer tokens")
    fills = min(each, -(-block_size // settings.minimum))
    return replace(settings, minimum=-(-block_size // fills), max_post_steps=min(settings.max_post_steps, each - fills))
