"""Fast-dLLM's approximate caches, for models that see the whole text in both directions (MDLM, LLaDA): keys read anew once a block, kept in between.

A prefix cache keeps what stands before the block, a dual one what stands behind it too; both are as old as the block's first forward, whose tokens have
changed since. Block-causal models have exact caches and need neither. Entry points: `refreshed_decode`, `RefreshedSettings`, `staleness` (what it costs).
"""

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import rules
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.decoded import Decoded, blank, check_context, completion, eos_ids, left_padded
from hildalib.decoding.forward import Forward


@dataclass(frozen=True)
class RefreshedSettings:
    """Choices of a decode (Fast-dLLM, arXiv 2505.22618). cache: what a forward that refreshes nothing reads from it: "none" (it feeds the whole text),
    "prefix" (it feeds the block and all behind it), "dual" (the block alone). refresh: forwards from one reading of everything to the next
    within a block; None, as published: once a block. tau_mask: confidence above which a mask is written, the surest always is. block_size: positions
    written before those behind them; blocks are counted from the text's start (in the paper from the prompt's end)."""

    cache: Literal["none", "prefix", "dual"] = "prefix"
    refresh: int | None = None
    tau_mask: float = 0.9
    block_size: int = 32
    max_new_tokens: int = 128

    def __post_init__(self):
        if self.cache not in ("none", "prefix", "dual"):
            raise HildaError(f"cache = {self.cache!r} must be none, prefix or dual")
        for name in ("refresh", "block_size", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise HildaError(f"{name} = {getattr(self, name)} must be at least 1")


class _Refreshed:
    """State of one batch; b counts the rows still running, T the positions of the canvas."""

    def __init__(self, model, prompt_ids: Tensor, lengths: Tensor, settings: RefreshedSettings):
        record = getattr(model.config, "hilda", None) or {}
        if not record.get("block_size") or record.get("causal_context"):
            raise HildaError("these caches are for a dLLM that reads in both directions; train one with the arm \"full sequence\", or use edit_decode")
        if record["label_shift"] and int(lengths.min()) < 1:
            raise HildaError("a shifted model predicts each token from the one before; the prompt needs at least one token")
        self.settings, self.size, self.mask_id, self.shift = settings, settings.block_size, record["mask_token_id"], int(record["label_shift"])
        self.lengths, self.ends = lengths, -(-(lengths + settings.max_new_tokens) // self.size) * self.size  # nothing is behind these
        self.canvas = blank(prompt_ids, lengths, int(self.ends.max()), self.mask_id)
        self.eos = torch.tensor(eos_ids(model), dtype=torch.long, device=prompt_ids.device)
        self.forward, self.cache = Forward(model), BlockCache(self.canvas.shape[1])
        self.start, self.age = lengths // self.size * self.size, torch.zeros_like(lengths)  # age: forwards since all was read
        self.live = torch.arange(len(lengths), device=lengths.device)
        self.forwards, self.fed = torch.zeros_like(lengths), torch.zeros_like(lengths)

    def read(self, cache: BlockCache, anew: Tensor) -> Tensor:
        """(b, K, V) aligned logits of the open blocks; `anew` (b,) bool: the row reads its whole text. Their keys land in `cache`."""
        start, ends, size = self.start[self.live], self.ends[self.live], self.size
        column = torch.arange(self.canvas.shape[1], device=start.device)
        open_ = (start - self.shift).clamp(min=0)  # a shifted block is predicted from the position in front of it on
        first = torch.where(anew, 0, open_)
        count = torch.where(anew, ends, (ends if self.settings.cache == "prefix" else start + size) - open_)
        self.fed_now = count
        at = column[:int(count.max())]
        real = at < count[:, None]
        positions = first[:, None] + torch.minimum(at, count[:, None] - 1)
        cache.at(positions).used = len(column)  # what stands behind the block is seen too
        mask = None if self.forward.straight and int(ends.min()) == len(column) else (column < ends[:, None])[:, None, None].expand(-1, 1, len(at), -1)
        wanted = (start[:, None] - self.shift + column[:size]).clamp(min=0) - first[:, None]
        wanted = (wanted + len(at) * torch.arange(len(start), device=start.device)[:, None]).flatten()
        ids = self.canvas[self.live].gather(1, positions)
        logits = self.forward(ids, positions, mask, cache, wanted, real=None if real.all() else real)
        logits = logits.view(len(start), size, -1)
        logits[..., self.mask_id] = -torch.inf
        return logits

    def step(self, watch: list | None = None) -> None:
        """One forward of every live row: writes the surest masks of its block, moves on where none is left."""
        live, size, settings = self.live, self.size, self.settings
        anew = (self.age[live] == 0) | (settings.cache == "none")
        if settings.refresh:
            anew |= self.age[live] % settings.refresh == 0
        logits = self.read(self.cache, anew)
        self.forwards[live] += 1
        self.fed[live] += self.fed_now
        positions = self.start[live, None] + torch.arange(size, device=live.device)
        ids = self.canvas[live].gather(1, positions)
        masked = ids == self.mask_id
        if watch is not None:
            exact = self.read(BlockCache(self.canvas.shape[1]), torch.ones_like(anew))[masked].float().log_softmax(-1)
            found, age = logits[masked].float().log_softmax(-1), self.age[live, None].expand_as(masked)[masked]
            kl = torch.where(exact.isinf(), 0.0, exact.exp() * (exact - found)).sum(-1)
            watch.append(pd.DataFrame({"age": age.tolist(), "kl": kl.tolist(), "changed": (exact.argmax(-1) != found.argmax(-1)).tolist()}))
        tokens, confidence = rules.choose(logits, 0.0, None)
        ids = torch.where(rules.fill(confidence, masked, settings.tau_mask), tokens, ids)
        self.canvas[live] = self.canvas[live].scatter(1, positions, ids)
        whole = (ids != self.mask_id).all(-1)
        self.age[live] = torch.where(whole, 0, self.age[live] + 1)
        self.start[live] += size * whole.long()
        done = whole & ((self.start[live] >= self.ends[live]) | self._ended(live))
        if done.any():
            kept = (~done).nonzero()[:, 0]
            self.live = live[kept]
            if len(kept):
                self.cache.keep_rows(kept)

    def _ended(self, rows: Tensor) -> Tensor:
        """(b,) True = an EOS stands before the open block."""
        column = torch.arange(self.canvas.shape[1], device=rows.device)
        own = (column >= self.lengths[rows][:, None]) & (column < self.start[rows][:, None])
        return (torch.isin(self.canvas[rows], self.eos) & own).any(-1)


@torch.inference_mode()
def refreshed_decode(model, prompt_ids: Tensor, settings: RefreshedSettings = RefreshedSettings(), *, attention_mask: Tensor | None = None) -> Decoded:
    """Greedy completions of prompts (B, P), left-padded where attention_mask (B, P) is 0; arguments and result as in `edit_decode`.

    A row sees all of its text at every position: prompt, what is written, and [MASK] up to the end of the block that holds its last position. It
    stops behind the block of its first EOS. With refresh = 1 the text is that of cache "none". HildaError for a model that is no dLLM or has a causal context.
    """
    lengths = left_padded(prompt_ids, attention_mask)
    state = _decode(model, prompt_ids, lengths, settings, None)
    return Decoded(completion(state.canvas, lengths, settings.max_new_tokens, state.eos), state.forwards, state.fed)


@torch.inference_mode()
def staleness(model, prompt_ids: Tensor, settings: RefreshedSettings, *, attention_mask: Tensor | None = None) -> pd.DataFrame:
    """How far what the caches say is from what an uncached forward over the same canvas says: a row a mask and forward, columns age (forwards since all was
    read), kl (nats, uncached to cached), changed (another favourite). The decode goes on from the cached logits; costs a full forward a step."""
    watch: list[pd.DataFrame] = []
    _decode(model, prompt_ids, left_padded(prompt_ids, attention_mask), settings, watch)
    return pd.concat(watch, ignore_index=True)


def _decode(model, prompt_ids: Tensor, lengths: Tensor, settings: RefreshedSettings, watch: list | None) -> _Refreshed:
    check_context(model, int(lengths.max()) + settings.max_new_tokens)
    state = _Refreshed(model, prompt_ids, lengths, settings)
    while len(state.live):
        state.step(watch)
    return state
