"""Completions sampled by edit decoding, with everything that a likelihood or a reward may ask of them.

Entry points: `sample` (prompt ids -> `Rollout`), `score` (texts -> rewards), `graded` (a task by its partial credit), `spliced`
(a completion for every draft of a block), `within` and `most_forwards` (what a completion may cost); for rollouts made in another way
`joined`, `continued`, `spared` and `moved`.
"""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import EditSettings, Trace, edit_decode
from hildalib.decoding.decoded import completion, eos_ids


@dataclass(frozen=True)
class Rollout:
    """B sampled rows on canvases of length L, a whole number of blocks, with position 0 at the first real token.

    x0 (B, L) long: the prompt, then what stood in each block when it closed. docs (B, L) long: 0, and -1 where a row has no
    block. scored (B, L) bool, True = a token of the completion: up to and with the first EOS, at most max_new_tokens; what
    else was decoded in that last block is its tail. The C *rounds* of a block are the forwards that wrote in it: noisy
    (B, C, L) long is the canvas that round c read, wrote (B, C, L) bool where it wrote (filled or edited), predicted (B, C, L)
    long the block with every mask replaced by the token chosen for it; blocks with fewer rounds repeat x0 and write nothing.
    step_map (B, L) long: the row's forward that wrote the token last, 0 = never. confidence (B, L): its probability then,
    nan = never. credit (B, L) float: a factor on whatever an objective makes of the token, 0 = it trains nothing. edits (B,):
    tokens that were changed after they had been written. ids (B, T), forwards, positions_fed (B,): as in `Decoded`.
    prompt_length (B,). Tokens of a completion that were given to the decoder (`continued`) are not scored and have step 0.
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
    credit: Tensor
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
        return self.step_map > 0

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
    return Rollout(x0, docs, scored, *_rounds(trace), *_history(trace), credit=torch.ones(x0.shape), ids=decoded.ids.cpu().clone(),
                   forwards=decoded.forwards.cpu().clone(), positions_fed=decoded.positions_fed.cpu().clone(), prompt_length=length, block_size=trace.block_size,
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
    known = {"sound": task.sound} if hasattr(task, "sound") else {}
    return SimpleNamespace(name=f"{task.name}, parts", version=task.version, prompt=task.prompt, score=task.parts, **known)


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


def most_forwards(settings: EditSettings, block_size: int, prompt_length: int) -> int:
    """The most forwards that a completion of a prompt may cost, whatever the model, where nothing goes back to [MASK]: the masks of each
    block by as few as the commit rule writes at a time, and max_post_steps where a full block is read again."""
    rule, size = settings.commit_rule, block_size
    least = 1 if settings.sub_block else getattr(rule, "tokens", getattr(rule, "minimum", 1))
    blocks = -(-(prompt_length + settings.max_new_tokens) // size) - prompt_length // size
    fills = -(-(size - prompt_length % size) // least) + (blocks - 1) * -(-size // least)
    return fills + blocks * settings.max_post_steps * settings.revision_rule.confirms


def replayed(x0: Tensor, step_map: Tensor, block_size: int, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """(noisy, wrote), each (B, C, L): the rounds in which the tokens of x0 (B, L) came as if each had been written once, at its step."""
    blocks = step_map.unflatten(-1, (-1, block_size))
    later = (blocks[..., None] > blocks[..., None, :]) & (blocks[..., None, :] > 0)  # which of its block were final before it
    first = torch.ones(block_size, block_size, dtype=torch.bool).tril(-1)
    leads = (blocks > 0) & ~((blocks[..., None] == blocks[..., None, :]) & first).any(-1)  # one token for each distinct step
    rank = (later & leads[..., None, :]).sum(-1).flatten(-2)[:, None]
    copies, written = torch.arange(int(rank.max()) + 1)[:, None], (step_map > 0)[:, None]
    return x0[:, None].masked_fill(written & (rank >= copies), mask_token_id), written & (rank == copies)


def joined(parts: list[Rollout]) -> Rollout:
    """The rows of all parts, one after the other, on canvases as long and with as many rounds as the largest; ids of one width."""
    length, rounds = (max(part.noisy.shape[axis] for part in parts) for axis in (2, 1))
    outside = {"docs": -1, "step_map": 0, "scored": False, "wrote": False, "confidence": float("nan"), "credit": 1.0}

    def widened(part: Rollout, name: str) -> Tensor:
        value = getattr(part, name)
        if name in ("x0", "noisy", "predicted", *outside):
            value = F.pad(value, (0, length - value.shape[-1]), value=outside.get(name, part.mask_token_id))
        if value.ndim == 3:
            more = rounds - value.shape[1]
            last = torch.zeros_like(value[:, :1]) if name == "wrote" else widened(part, "x0")[:, None]
            value = torch.cat([value, last.expand(-1, more, -1)], 1)
        return value

    tensors = [field.name for field in fields(Rollout) if torch.is_tensor(getattr(parts[0], field.name))]
    return replace(parts[0], **{name: torch.cat([widened(part, name) for part in parts]) for name in tensors})


def continued(rollout: Rollout, prompt_length: Tensor, max_new_tokens: int, eos: list[int]) -> Rollout:
    """`rollout`, whose prompts ended with the beginning of a completion, as completions of prompts of prompt_length (B,), at most
    max_new_tokens long. What was given belongs to the text and is not scored; what was decoded beyond the end trains nothing."""
    inside = torch.arange(rollout.x0.shape[1]) < (prompt_length + max_new_tokens)[:, None]
    canvas = F.pad(rollout.x0.masked_fill(rollout.docs < 0, eos[0]), (0, max_new_tokens), value=eos[0])
    return replace(rollout, prompt_length=prompt_length, scored=rollout.scored & inside, credit=rollout.credit * inside,
                   ids=completion(canvas, prompt_length, max_new_tokens, torch.tensor(eos)))


def spared(rollout: Rollout, until: Tensor) -> Rollout:
    """`rollout` with the tokens of the completion before position until (B,) as if they had been given: in sight of all others and never trained."""
    position = torch.arange(rollout.x0.shape[1])
    before = (position < until[:, None]) & (position >= rollout.prompt_length[:, None])
    return replace(rollout, scored=rollout.scored & ~before, step_map=rollout.step_map.masked_fill(before, 0),
                   credit=rollout.credit.masked_fill(before, 0.0))


def moved(rollout: Rollout, prompts: list[list[int]], eos: list[int]) -> Rollout:
    """The completions of `rollout` behind other prompts, one a row, as if these had been answered so.

    Blocks are counted from the first token, so a prompt of another length cuts the completion into other blocks: their rounds follow
    from the steps (`replayed`). The tail of the last block is EOS and trains nothing.
    """
    size, count = rollout.block_size, rollout.scored.sum(1)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends = -(-(lengths + count) // size) * size
    position = torch.arange(int(ends.max()))
    docs = torch.where(position < ends[:, None], 0, -1)
    x0 = torch.where(docs == 0, eos[0], rollout.mask_token_id)
    scored = (position >= lengths[:, None]) & (position < (lengths + count)[:, None])
    step_map = torch.where((docs == 0) & (position >= lengths[:, None]), rollout.step_map.amax(1, keepdim=True), 0)
    confidence = torch.full(x0.shape, torch.nan)
    for row, prompt in enumerate(prompts):
        x0[row, :len(prompt)] = torch.tensor(prompt)
    for new, old in ((x0, rollout.x0), (step_map, rollout.step_map), (confidence, rollout.confidence)):
        new[scored] = old[rollout.scored]
    noisy, wrote = replayed(x0, step_map, size, rollout.mask_token_id)
    return replace(rollout, x0=x0, docs=docs, scored=scored, noisy=noisy, wrote=wrote, predicted=x0[:, None].expand_as(noisy).clone(),
                   step_map=step_map, confidence=confidence, credit=scored.float(), prompt_length=lengths)
