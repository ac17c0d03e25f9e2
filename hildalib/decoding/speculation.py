"""Self-speculation: a block drafted by diffusion, verified by the same model reading it token by token (greedy; lossless unless told otherwise).

For models with a causal context, whose closed blocks are read as an AR model reads them: the causal copy that commits a block also says
what the model's own AR mode would have written (the idea of S2D2, arXiv 2603.25702, without its losses: strict acceptance, no edits).
Entry points: `self_speculate`; `Speculation`, its state; `drafts` (whether a model can).
"""

import math

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding.decoded import Decoded, blank, check_context, check_prompts, completion, eos_ids, left_padded
from hildalib.decoding.reader import Reader

SURER = 1.0  # nats by which the AR mode's token behind a wrong one must be more probable than the drafted one (ours; chosen on validation prompts)


def _belief(logits: Tensor) -> Tensor:
    """(b, K) log-probability of the most probable token of logits (b, K, V); to the few digits of their dtype, which a comparison by a nat can spare."""
    return logits.softmax(-1).amax(-1).float().log()


def drafts(model) -> int:
    """Tokens that `model` drafts at a time. HildaError where its AR mode is not what commits a block: without shift, causal context or blocks."""
    record = getattr(model.config, "hilda", None) or {}
    size = record.get("block_size") or 0
    if not record.get("causal_context") or not record["label_shift"] or size < 2:
        raise HildaError("self-speculation needs a shifted dLLM with a causal context and blocks of at least 2; convert one with causal_context: true")
    return size


class Speculation:
    """State of one batch, rows named as in `BlockLoop`; the first forward drafts, each other one verifies the drafted block of a row and drafts the
    next."""

    def __init__(self, model, prompt_ids: Tensor, lengths: Tensor, max_new_tokens: int, tolerance: float = 1.0):
        self.size = size = drafts(model)
        check_prompts(lengths)
        check_context(model, int(lengths.max()) + max_new_tokens)
        self.mask_id, self.slack = model.config.hilda["mask_token_id"], -math.log(tolerance)
        self.lengths, self.ends = lengths, lengths + max_new_tokens
        device, slots = prompt_ids.device, -(-int(self.ends.max()) // size) * size
        self.canvas = blank(prompt_ids, lengths, slots, self.mask_id)
        self.eos = torch.tensor(eos_ids(model), dtype=torch.long, device=device)
        self.reader = Reader(model, self.canvas, size)
        self.start, self.sure = lengths // size * size, lengths.clone()  # the open block; positions before `sure` are verified
        self.generated = self.reader.columns[:slots] >= lengths[:, None]
        self.live = torch.arange(len(prompt_ids), device=device)
        self.done = torch.zeros(len(prompt_ids), dtype=torch.bool, device=device)
        self.belief = torch.zeros(self.canvas.shape, device=device)  # log-probability that a drafted token had when it was written

    @property
    def snapshot(self) -> Tensor:
        """(B, T) probability that each token had when it was written."""
        return self.belief.exp().clamp(max=1.0)

    def _finished(self, rows: Tensor, before: Tensor) -> Tensor:
        """(b,) True = all that was asked for, or an EOS, stands among the verified tokens before `before`."""
        verified = self.reader.columns[:self.canvas.shape[1]] < before[:, None]
        return (before >= self.ends[rows]) | (torch.isin(self.canvas[rows], self.eos) & verified & self.generated[rows]).any(-1)

    def _ending(self, rows: Tensor, canvas: Tensor, start: Tensor) -> Tensor:
        """(b,) True = the text ends with this block if its draft stays, so nothing need be drafted behind it."""
        positions = self.reader.positions(start, self.size)
        ends = torch.isin(canvas.gather(1, positions), self.eos) & self.generated[rows].gather(1, positions)
        return ends.any(-1) | (start + self.size >= self.ends[rows])

    def _draft(self, rows: Tensor, logits: Tensor) -> None:
        """Masks of the open blocks of `rows` get the argmax of aligned logits (b, K, V)."""
        positions = self.reader.positions(self.start[rows], self.size)
        ids, best = self.canvas[rows].gather(1, positions), logits.max(-1).indices  # in bfloat16 a quarter of the time of argmax
        self.canvas[rows] = self.canvas[rows].scatter(1, positions, torch.where(ids == self.mask_id, best, ids))
        self.belief[rows] = self.belief[rows].scatter(1, positions, _belief(logits))

    def _verify(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Tokens up to the first one that the AR mode, aligned logits (b, K, V), would not have written (or, with slack, finds too improbable)
        stay; its own takes that place, and behind it the draft waits for the next forward. Returns (b,) True = all of the block stayed."""
        positions = self.reader.positions(self.start[rows], self.size)
        ids, (top, own) = self.canvas[rows].gather(1, positions), logits.max(-1)
        right = (ids == own) if self.slack == 0 else top - logits.gather(-1, ids[..., None]).squeeze(-1) <= self.slack
        count = (right | (positions < self.sure[rows][:, None])).long().cumprod(-1).sum(-1)
        if (count < self.size).any():
            column, belief = self.reader.columns[:self.size], self.belief[rows].gather(1, positions)
            sure = _belief(logits)
            other = (column > count[:, None]) & (sure > belief + SURER) | (column == count[:, None])
            self.belief[rows] = self.belief[rows].scatter(1, positions, torch.where(other, sure, belief))
            self.canvas[rows] = self.canvas[rows].scatter(1, positions, torch.where(other, own, ids))
        self.sure[rows] = self.start[rows] + (count + 1).clamp(max=self.size)
        return count == self.size

    def _begin(self) -> None:
        """The first forward: drafts the open blocks."""
        rows = self.live
        none = torch.zeros_like(rows, dtype=torch.bool)
        read = self.reader.read(self.canvas, self.start, rows, none, none, none)
        self._draft(rows, self.reader.align(read.own, self.reader.carry))
        self.reader.advance(none, read.last)

    def step(self) -> None:
        """One forward of every live row: verifies its block and drafts the next one. Rows that are `done` leave with it."""
        self._verify_and_draft() if self.reader.cache.keys else self._begin()
        if self.done[self.live].any():
            kept = (~self.done[self.live]).nonzero().squeeze(1)
            self.live = self.live[kept]
            self.reader.keep_rows(kept)

    def _verify_and_draft(self) -> None:
        live, reader, canvas, start = self.live, self.reader, self.canvas[self.live], self.start[self.live]
        read = reader.verify(canvas, start, live, ~self._ending(live, canvas, start))
        closed = self._verify(live, reader.align(read.own, reader.carry))
        reader.advance(closed, read.last)
        self.start[live[closed]] += self.size
        done = self._finished(live, self.sure[live])
        if (begin := closed & ~done).any():
            self._draft(live[begin], reader.align(read.following, read.last)[begin])
        self.done[live[done]] = True


@torch.inference_mode()
def self_speculate(model, prompt_ids: Tensor, *, max_new_tokens: int, attention_mask: Tensor | None = None, tolerance: float = 1.0) -> Decoded:
    """The text of `ar_decode`, token for token (up to ties in floating point), in fewer forwards; arguments and result as in `edit_decode`.

    A forward verifies the drafted block and, unless the draft ends the text, drafts the next one on it; if all of it stays, that was K
    tokens. Otherwise the AR mode's own choice takes the place of the first wrong token, and the next forward verifies what was drafted
    behind it, or what the AR mode wrote there where it is much surer (it has read the wrong token; the draft has read none). So a block
    costs 1 forward and 1 more for each rejection, K + 1 at most. tolerance in (0, 1]: a drafted token also stays while it is at least that many times as
    probable as the AR mode's favourite; below 1 the text is no longer the AR mode's (typical acceptance without its entropy, Medusa,
    arXiv 2401.10774). Raises HildaError for another tolerance, and for a model without a causal context, whose AR mode is
    not what commits a block.
    """
    if not 0 < tolerance <= 1:
        raise HildaError(f"tolerance = {tolerance} is no share of a probability; give a number above 0 and at most 1, which keeps the text of the AR mode")
    lengths = left_padded(prompt_ids, attention_mask)
    state = Speculation(model, prompt_ids, lengths, max_new_tokens, tolerance)
    while len(state.live):
        state.step()
    return Decoded(completion(state.canvas, lengths, max_new_tokens, state.eos), state.reader.forwards, state.reader.fed)
