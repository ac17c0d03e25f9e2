"""A cache whose committed part is rounded or thinned once it is committed (open blocks are never touched), or that lies where memory is plentiful.

A block is compressed after the forward that committed it, never in its denoising forwards, whose keys are of noisy tokens. What counts as memory are the
bytes that the committed part takes in this form; here it is kept unpacked, so its speed is not that of a kernel that reads it packed.
Entry points: `Compression` (a field of `EditSettings`), `CompressedCache`, the scorers `knorm`, `Zap` (`Zap.fit`: a linear KVzap), and their controls `large`, `Drawn`.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding.cache import BlockCache
from hildalib.gated import is_gated

Scorer = Callable[[int, Tensor, Tensor], Tensor]  # (layer, attention input (n, D), keys (n, heads, D_head)) -> (n, heads), the lowest go first


def knorm(layer: int, hidden: Tensor, keys: Tensor) -> Tensor:
    """Keys of small norm stay (arXiv 2406.11430, read in kvpress): those attract attention."""
    return -keys.float().norm(dim=-1)


def large(layer: int, hidden: Tensor, keys: Tensor) -> Tensor:
    """Its opposite, a control: keys of large norm stay."""
    return -knorm(layer, hidden, keys)


class Drawn:
    """Who stays is drawn: the control of all scorers. Reproducible from its seed for the same decodes in the same order."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, layer: int, hidden: Tensor, keys: Tensor) -> Tensor:
        return torch.rand(keys.shape[:2], generator=self.generator).to(keys.device)


@dataclass(frozen=True)
class Compression:
    """bits: 8 or 4, keys and values rounded per channel over the tokens of a block, between their least and their largest (float16); None: not. keep: share
    of the committed entries of each layer and head that stay; scorer: who goes; window: newest committed positions that always stay. offload: keys and values
    lie in main memory while a GPU computes, in a file while a CPU does, and come in layer by layer as they are read; the tokens are the same."""

    bits: int | None = None
    keep: float = 1.0
    scorer: Scorer = knorm
    window: int = 0
    offload: bool = False

    def __post_init__(self):
        if self.bits not in (None, 4, 8):
            raise HildaError(f"bits = {self.bits} must be 4, 8 or None")
        if not 0 <= self.keep <= 1:
            raise HildaError(f"keep = {self.keep} is outside [0, 1]; it is a share")
        if self.window < 0:
            raise HildaError(f"window = {self.window} must be at least 0")


def rounded(x: Tensor, bits: int) -> Tensor:
    """x (n, K, heads, D) as it comes back from `bits` a number and two float16 a channel of each of the n groups of K."""
    low, high = x.amin(1, keepdim=True).half().float(), x.amax(1, keepdim=True).half().float()
    step = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)  # 1e-8: a channel that is constant
    return (low + step * ((x.float() - low) / step).round().clamp(0, 2**bits - 1)).to(x.dtype)


def in_file(x: Tensor) -> Tensor:
    """x on the CPU, in a file that goes when nothing reads it any more: its pages can be taken for something else and come back when they are read."""
    with tempfile.TemporaryFile() as file:  # the mapping outlives its handle
        held = np.memmap(file, np.uint8, "w+", shape=(math.prod(x.shape) * x.element_size(),))
    return torch.from_numpy(held).view(x.dtype).view(x.shape).copy_(x)


class CompressedCache(BlockCache):
    """A `BlockCache` that is told which slots are committed (`settle`); `size`: slots of a block."""

    def __init__(self, slots: int, choice: Compression, size: int):
        super().__init__(-(-slots // size) * size)
        self.choice, self.size, self.filed = choice, size, False
        self.scores: dict[int, Tensor] = {}  # (B, slots, heads) of a layer
        self.gone: dict[int, Tensor] = {}  # (B, slots, heads) bool, True = evicted
        self.settled: Tensor | None = None  # (B,) slots that are compressed already

    def write(self, index: Tensor, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """As `BlockCache.write`; what is offloaded comes back to where keys are."""
        if not self.choice.offload:
            return super().write(index, keys, values, layer)
        device, rows = keys.device, self.only
        self.filed, self.only = device.type == "cpu", rows if rows is None else rows.cpu()
        read = super().write(index.cpu(), keys.cpu(), values.cpu(), layer)
        self.only = rows
        return tuple(part.to(device) for part in read)

    def _hold(self, layer: int, keys: Tensor, values: Tensor) -> None:
        super()._hold(layer, *((in_file(keys), in_file(values)) if self.filed else (keys, values)))

    def note(self, index: Tensor, hidden: Tensor, keys: Tensor, layer: int) -> None:
        """Scores what is about to be written."""
        if self.choice.keep == 1:
            return
        if layer not in self.scores:
            self.scores[layer] = keys.new_zeros(len(self.rows), self.slots, keys.shape[1], dtype=torch.float32)
            self.gone[layer] = torch.zeros_like(self.scores[layer], dtype=torch.bool)
        self.scores[layer].view(-1, keys.shape[1])[index] = self.choice.scorer(layer, hidden, keys).float()

    def bias(self, bias: Tensor | None, layer: int, heads: int) -> Tensor | None:
        """With -inf at what is evicted: (b, heads, Q, slots in use)."""
        if layer not in self.gone or self.settled is None:
            return bias
        gone = self.gone[layer] if self.only is None else self.gone[layer][self.only]
        gone = gone[:, :self.used].transpose(1, 2).repeat_interleave(heads // self.gone[layer].shape[2], 1)[:, :, None]
        return torch.zeros_like(gone, dtype=self.keys[layer].dtype).masked_fill_(gone, -torch.inf) + (0 if bias is None else bias)

    def settle(self, start: Tensor) -> Tensor:
        """All slots before start (b,) are committed; compresses those that were not. Returns (b,) bytes of the committed part."""
        if not self.keys:
            return torch.zeros_like(start)
        before = torch.zeros_like(start) if self.settled is None else self.settled
        if self.settled is None or bool((start > before).any()):
            self._round(before, start)
            self._evict(start)
            self.settled, self.held = start.clone(), self._bytes(start)
        return self.held

    def _round(self, before: Tensor, start: Tensor) -> None:
        if not self.choice.bits:
            return
        group = torch.arange(self.slots // self.size, device=start.device)
        fresh = (group >= (before // self.size)[:, None]) & (group < (start // self.size)[:, None])
        for store in (self.keys, self.values):
            for held in store.values():
                blocks = held.view(len(held), -1, self.size, *held.shape[2:])
                here = fresh.to(held.device)
                blocks[here] = rounded(blocks[here], self.choice.bits)

    def _evict(self, start: Tensor) -> None:
        if self.choice.keep == 1:
            return
        column = torch.arange(self.slots, device=start.device)[:, None]  # (slots, 1) beside (B, slots, heads)
        end = start[:, None, None]
        count = (self.choice.keep * end).ceil()
        for layer, scores in self.scores.items():
            worth = scores.masked_fill(self.gone[layer] | (column >= end), -torch.inf)
            worth = worth.masked_fill((column < end) & (column >= end - self.choice.window), torch.inf)
            rank = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            kept = (rank < count) | (column >= end - self.choice.window)
            self.gone[layer] = (column < end) & (~kept | self.gone[layer])

    def _bytes(self, start: Tensor) -> Tensor:
        total = torch.zeros(len(start), device=start.device)
        for layer, keys in self.keys.items():
            heads, width = keys.shape[2:]
            entries = heads * start - (self.gone[layer].sum((1, 2)) if layer in self.gone else 0)
            total += 2 * entries * width * ((self.choice.bits or 8 * keys.element_size()) / 8)
            total += 2 * heads * width * 4 * (start // self.size) * bool(self.choice.bits)  # 4: least and step in float16, a channel and block
        return total.long()

    def keep_rows(self, rows: Tensor) -> None:
        super().keep_rows(rows.cpu() if self.choice.offload else rows)
        self.scores, self.gone = ({layer: held[rows] for layer, held in store.items()} for store in (self.scores, self.gone))
        if self.settled is not None:
            self.settled, self.held = self.settled[rows], self.held[rows]


class Zap:
    """A linear KVzap (arXiv 2601.07891, its Linear(D, n_kv)): a ridge regression from a layer's attention input to how much an entry will matter.

    Target: log max_j a_ji ||W_o v_i|| / ||h_j||, over the heads of a group. The published queries j are a repetition of the text; here they are what
    comes after i in it (ours: a small model does not repeat), read causally, as a committed context is."""

    def __init__(self, weights: list[Tensor]):
        self.weights = weights

    def __call__(self, layer: int, hidden: Tensor, keys: Tensor) -> Tensor:
        return _with_one(hidden.float()) @ self.weights[layer].to(hidden.device)

    @classmethod
    @torch.no_grad()
    def fit(cls, model, ids: Tensor, ridge: float = 1e-3) -> "Zap":
        """From texts ids (N, L) long without padding. ridge: weight of the penalty, as a share of the mean variance."""
        weights = []
        for hidden, target in zip(*targets(model, ids)):
            x, y = _with_one(hidden.flatten(0, 1)), target.flatten(0, 1)
            gram = x.T @ x
            weights.append(torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y))
        return cls(weights)

    @torch.no_grad()
    def r2(self, model, ids: Tensor) -> list[float]:
        """Share of the target's variance that it explains on texts ids (N, L), by layer."""
        found = []
        for layer, (hidden, target) in enumerate(zip(*targets(model, ids))):
            error = target - self(layer, hidden, None)
            found.append(1 - float(error.var() / target.var()))
        return found


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def targets(model, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(attention inputs (N, L - 1, D), targets of `Zap` (N, L - 1, key heads)), each by layer; the last token is nobody's context."""
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that shows its weights; causal without a mask
    try:
        out = model(input_ids=ids, output_attentions=True, output_hidden_states=True, use_cache=False)
    finally:
        model.set_attn_implementation(kind)
    inputs, wanted = [], []
    plain = model.get_base_model() if is_gated(model) else model  # what reads a context is the parent
    for layer, attention, stream in zip(plain.model.layers, out.attentions, out.hidden_states):
        at, hidden = layer.self_attn, layer.input_layernorm(stream)
        heads, width = at.config.num_attention_heads, at.head_dim
        values = at.v_proj(hidden).view(*ids.shape, -1, width)  # (N, L, key heads, D)
        group = heads // values.shape[2]
        out_of = at.o_proj.weight.view(-1, heads, width)
        moved = torch.einsum("nlhd,ohd->nlho", values.repeat_interleave(group, 2), out_of).norm(dim=-1)  # (N, L, heads)
        share = attention / stream.norm(dim=-1)[:, None, :, None]  # (N, heads, queries, keys)
        share = share.masked_fill(torch.ones(share.shape[-2:]).triu().bool(), 0.0).amax(2).transpose(1, 2)  # later queries alone
        worth = (share * moved)[:, :-1].view(len(ids), -1, values.shape[2], group).amax(-1)
        inputs.append(hidden[:, :-1].float())
        wanted.append(worth.float().clamp(min=1e-8).log())
    return inputs, wanted
