"""D2F's pipelined decoding (arXiv 2508.09192, Algorithm 2): blocks begin before those in front of them are done.

Every forward reads all open blocks, each seeing the unfinished ones before it; a model learns that with `Recipe.pipeline`. A block that
is done, and before which all are, is committed by the next forward, as in `edit_decode`. Entry points: `pipeline_decode`, `PipelineSettings`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import rules
from hildalib.decoding.decoded import Decoded, blank, check_context, check_prompts, completion, eos_ids, left_padded
from hildalib.decoding.reader import Reader


@dataclass(frozen=True)
class PipelineSettings:
    """Choices of a pipelined decode. tau_mask: confidence above which a mask is written. tau_add: share of the last open block that must be
    written before another one is opened. tau_act: share of a block after which the one behind it writes at least one token a forward, as the
    first always does. blocks: most blocks open at once (ours; D2F opens as many as tau_add lets it). block_size None: the model's own."""

    tau_mask: float = 0.9
    tau_add: float = 0.1
    tau_act: float = 0.95
    blocks: int = 4
    block_size: int | None = None
    max_new_tokens: int = 128

    def __post_init__(self):
        for name in ("tau_mask", "tau_add", "tau_act"):
            if not 0 <= getattr(self, name) <= 1:
                raise HildaError(f"{name} = {getattr(self, name)} is outside [0, 1]; it is a probability or a share")
        for name in ("blocks", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise HildaError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.block_size is not None and self.block_size < 1:
            raise HildaError(f"block_size = {self.block_size} must be at least 1, or None for the model's own")


class _Pipeline:
    """State of one batch; b counts the rows still running, N the blocks of the canvas."""

    def __init__(self, model, prompt_ids: Tensor, lengths: Tensor, settings: PipelineSettings, size: int):
        self.settings, self.size, self.mask_id = settings, size, model.config.hilda["mask_token_id"]
        self.lengths, self.ends = lengths, -(-(lengths + settings.max_new_tokens) // size) * size
        self.canvas = blank(prompt_ids, lengths, int(self.ends.max()), self.mask_id)
        self.eos = torch.tensor(eos_ids(model), dtype=torch.long, device=prompt_ids.device)
        self.reader = Reader(model, self.canvas, size)
        self.start = lengths // size * size  # all before it is committed
        self.opened = self.start + size  # end of the last open block
        self.live = torch.arange(len(lengths), device=lengths.device)

    def _written(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(share of each block that is no mask (b, N), end of the stretch of whole blocks that begins at `start` (b,))."""
        share = 1 - (self.canvas[rows] == self.mask_id).view(len(rows), -1, self.size).float().mean(-1)
        number = torch.arange(share.shape[1], device=share.device)
        whole = ((share == 1) | (number < (self.start[rows] // self.size)[:, None])).long().cumprod(-1).sum(-1)
        return share, whole * self.size

    def _first_eos(self, rows: Tensor) -> Tensor:
        """(b,) position of the first generated EOS, the canvas's end where there is none."""
        column = torch.arange(self.canvas.shape[1], device=rows.device)
        found = torch.isin(self.canvas[rows], self.eos) & (column >= self.lengths[rows][:, None])
        return column.where(found, len(column)).amin(-1)

    def step(self) -> None:
        """One forward of every live row: commits what is whole, reads what is open, writes, opens."""
        live, size, settings = self.live, self.size, self.settings
        share, whole = self._written(live)
        last = share.gather(1, (self.opened[live] // size - 1)[:, None])[:, 0]
        more = (last >= settings.tau_add) & (self.opened[live] < self.ends[live]) & (self.opened[live] - whole < settings.blocks * size)
        self.opened[live] += size * (more & (self._first_eos(live) >= self.opened[live])).long()
        opened = self.opened[live]
        logits = self.reader.read_open(self.canvas[live], self.start[live], whole, opened, live)
        self.start[live] = whole
        positions = self.reader.positions(whole, logits.shape[1])
        ids, number = self.canvas[live].gather(1, positions), positions // size
        masked = (ids == self.mask_id) & (torch.arange(logits.shape[1], device=ids.device) < (opened - whole)[:, None])
        tokens, confidence = rules.choose(logits, 0.0, None)
        urgent = (number * size == whole[:, None]) | (share.gather(1, (number - 1).clamp(min=0)) >= settings.tau_act)
        blocks = (len(ids) * (ids.shape[1] // size), size)
        sure, forced = (rules.fill(confidence.view(blocks), masked.view(blocks), settings.tau_mask, count).view_as(masked) for count in (0, 1))
        row, column = torch.where(urgent, forced, sure).nonzero(as_tuple=True)
        self.canvas[live[row], positions[row, column]] = tokens[row, column]
        self._drop_finished()

    def _drop_finished(self) -> None:
        """Rows leave when all is written up to their end, or up to the end of the block with their first EOS."""
        _, whole = self._written(self.live)
        done = (self._first_eos(self.live) < whole) | (whole >= self.ends[self.live])
        if done.any():
            kept = (~done).nonzero()[:, 0]
            self.live = self.live[kept]
            self.reader.keep_rows(kept)


@torch.inference_mode()
def pipeline_decode(model, prompt_ids: Tensor, settings: PipelineSettings = PipelineSettings(), *, attention_mask: Tensor | None = None) -> Decoded:
    """Greedy completions of prompts (B, P), left-padded where attention_mask (B, P) is 0; arguments and result as in `edit_decode`.

    Each forward writes at least one token of the first open block, so a row costs at most max_new_tokens + 1 forwards. Nothing is edited: what
    a block was when the next one was begun on it must stay. With blocks = 1 these are the tokens and forwards of `edit_decode` that
    never edits. HildaError for a model without [MASK].
    """
    record = getattr(model.config, "hilda", None)
    size = record and (settings.block_size or record.get("block_size"))
    if not size:
        raise HildaError("this model is no dLLM: convert it first, for example with `hilda run 02_wsd`")
    lengths = left_padded(prompt_ids, attention_mask)
    check_prompts(lengths, record["label_shift"])
    check_context(model, int(lengths.max()) + settings.max_new_tokens)
    state = _Pipeline(model, prompt_ids, lengths, settings, size)
    while len(state.live):
        state.step()
    return Decoded(completion(state.canvas, lengths, settings.max_new_tokens, state.eos), state.reader.forwards, state.reader.fed)
