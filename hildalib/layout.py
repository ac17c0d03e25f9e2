"""One forward of block diffusion: the layout [noisy copies | clean], its mask, and the rows that predict each token.

Entry points: `Layout.build`, `target_logits` (LM head only where a loss or a draft needs it), `clean_logits`, `validate`.
"""

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import attention
from hildalib.gated import CleanReading, noisy_rows, read_clean
from hildalib.noise import corrupt
from hildalib.objective import predictable, source_rows
from hildalib.residual import Residual, carry

CHECK_RATES = (0.15, 0.5, 1.0)  # validation mask rates: near the end, in the middle and at the start of a block's decoding


@contextlib.contextmanager
def selected_rows(model, index: Tensor):
    """Within, the LM head sees only the rows `index` (n,) of the flattened (B * Q) hidden states: logits are (1, n, V).

    The head and its softmax are a third of the cost at 49k tokens of vocabulary; rows without loss need neither. A hook,
    because DDP and PEFT only work when the whole model's forward is called.
    """
    head = model.get_output_embeddings() if not hasattr(model, "module") else model.module.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[index][None],))
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Layout:
    """One forward of block diffusion: what goes in, and which of its rows predict the (C, L) positions of each copy."""

    ids: Tensor  # (B, rows)
    mask: Tensor
    positions: Tensor
    source: Tensor = field(repr=False)  # (C, L)
    clean: int | None = None  # first row of the clean half, where there is one beside noisy copies
    autoregressive: bool = False  # the clean half is all there is
    tiles: list | None = field(default=None, repr=False)  # of `attention.tiles`

    @classmethod
    def build(cls, x0: Tensor, noisy: Tensor, docs: Tensor, block_size: int, label_shift: bool, causal_context: bool = False, pipeline: int = 1,
              causal_blocks: bool = False, stream: bool = False) -> "Layout":
        """x0, docs (B, L); noisy (B, C, L). The clean half is dropped at block size L, the noisy one at shifted size 1. pipeline,
        causal_blocks: as in `attention.noisy_clean`. stream: noisy copies alone, each read causally from its first token on (CARD)."""
        batch, copies, length = noisy.shape
        device, clean, autoregressive = x0.device, None, block_size == 1 and label_shift
        if autoregressive:
            ids, mask = x0, attention.block_causal(length, 1, docs)
            source = source_rows(length, length, True, clean=False)[:1].expand(copies, -1)
            parts, tiles = 1, attention.tiles(mask, length, 1, 0)
        elif block_size == length or stream:
            every = docs.repeat_interleave(copies, 0)
            ids, mask = noisy.flatten(0, 1), attention.block_causal(length, 1, every) if stream else attention.full(every)
            source, parts, tiles = source_rows(length, length, label_shift, clean=False), 1, None
        else:
            rule = causal_context, pipeline, causal_blocks
            ids, mask = torch.cat([noisy.flatten(1), x0], 1), attention.noisy_clean(length, block_size, docs, copies, *rule)
            source = source_rows(length, block_size * pipeline, label_shift, copies=copies)  # inside a group the row before is a noisy one
            parts, clean, tiles = copies + 1, copies * length, attention.tiles(mask, length, block_size, copies, *rule)
        positions = torch.arange(length, device=device).repeat(parts).expand(len(ids), -1)
        return cls(ids, mask.to(device), positions, source.to(device), clean, autoregressive, tiles)

    def rows(self, targets: Tensor) -> Tensor:
        """(n,) flat hidden rows that predict the True positions of targets (B, C, L), in row-major order."""
        batch, copies, length = targets.shape
        if len(self.ids) == batch:
            flat = self.source[None] + self.ids.shape[1] * torch.arange(batch, device=targets.device)[:, None, None]
        else:  # block size L: every copy is a row of the forward
            flat = self.source[:1] + length * torch.arange(batch * copies, device=targets.device)[:, None]
            flat = flat.view(batch, copies, length)
        return flat[targets]

    @property
    def noisy(self) -> Tensor:
        """(B, rows) bool, True = a row of a noisy copy; at shifted block size 1 there is none."""
        end = self.ids.shape[1] if self.clean is None else self.clean
        return (torch.arange(self.ids.shape[1], device=self.ids.device) < end * (not self.autoregressive)).expand(len(self.ids), -1)

    def carry(self, model, logits: Tensor, rows: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        """(., rows, D) input embeddings whose masks carry what aligned logits (n, V) of those masks, row-major, expect there
        (`residual.Residual`, in the model's own embeddings; a gradient through these is our reading of Algorithm 1).

        rows (B,) bool: only masks of these rows of the batch are in logits; None: all. embeds: of the layout, if already made.
        """
        embedding, mask_id = (plain := getattr(model, "module", model)).get_input_embeddings(), plain.config.hilda["mask_token_id"]
        masks = (self.ids == mask_id) & self.noisy  # a clean text may hold the word
        masks = masks if rows is None else masks & rows.repeat_interleave(len(masks) // len(rows))[:, None]
        return carry(embedding(self.ids) if embeds is None else embeds, masks, Residual()(logits, embedding, mask_id))

    def context_rows(self, targets: Tensor) -> Tensor:
        """(m,) flat hidden rows of the clean half that predict the True positions of targets (B, L) as an AR model does."""
        row, position = targets.nonzero(as_tuple=True)
        return row * self.ids.shape[1] + self.clean + position - 1


def target_logits(model, layout: Layout, targets: Tensor, inputs_embeds: Tensor | None = None, context: Tensor | None = None,
                  reading: CleanReading | None = None) -> Tensor:
    """(n, V) float logits of the True positions of targets (B, C, L), row-major, with [MASK] barred from the output.

    context (B, L) bool: after them the next-token logits (m, V) of its True positions, from the clean half. reading: what
    `gated.read_clean` made of that half; only noisy rows are run then.
    """
    rows = layout.rows(targets)
    rows = rows if context is None else torch.cat([rows, layout.context_rows(context)])
    end = None if reading is None else layout.clean
    width, at = layout.ids.shape[1], rows % layout.ids.shape[1]
    run = rows if end is None else (rows // width * end + at)[at < end]
    tiles = layout.tiles if end is None or layout.tiles is None else [tile for tile in layout.tiles if tile[0].start < end]
    source = {"input_ids": layout.ids[:, :end]} if inputs_embeds is None else {"inputs_embeds": inputs_embeds[:, :end]}
    with selected_rows(model, run), noisy_rows(model, layout.noisy if end is None else True):
        logits = model(**source, attention_mask=layout.mask[:, :, :end], position_ids=layout.positions[:, :end], use_cache=False, tiles=tiles,
                       past_key_values=reading).logits[0].float()
    if end is not None:
        fresh = logits
        logits = fresh.new_empty(len(rows), fresh.shape[1])
        logits[at < end], logits[at >= end] = fresh, clean_logits(model, reading, (rows // width)[at >= end], at[at >= end] - end)
    plain = getattr(model, "module", model)
    logits[:, plain.config.hilda["mask_token_id"]] = -torch.inf
    return logits


@torch.no_grad()
def clean_logits(model, reading: CleanReading, row: Tensor, position: Tensor) -> Tensor:
    """(n, V) float: what the parent expects after `position` (n,) of clean rows `row` (n,), [MASK] barred."""
    plain = getattr(model, "module", model)
    logits = plain.get_output_embeddings()(reading.hidden[row, position]).float()
    logits[:, plain.config.hilda["mask_token_id"]] = -torch.inf
    return logits


@torch.no_grad()
def validate(model, rows: dict[str, Tensor], *, block_size: int, label_shift: bool | None = None, causal_context: bool | None = None,
             rates=CHECK_RATES, batch_size: int = 32, seed: int = 0, residual: bool = False) -> dict[float, float]:
    """{t: nats per masked token} on held-out rows, the same masks for every model of a vocabulary (seeded).

    label_shift, causal_context: None takes what the model's `hilda` record says. residual: the loss of a second forward, whose masks
    carry what the first expected there.
    """
    model.eval()
    record = model.config.hilda
    label_shift = record["label_shift"] if label_shift is None else label_shift
    causal_context = record.get("causal_context", False) if causal_context is None else causal_context
    out = {}
    for t in rates:
        total = count = 0.0
        for start in range(0, len(rows["input_ids"]), batch_size):
            x0, docs, maskable = (rows[key][start:start + batch_size] for key in ("input_ids", "doc_ids", "maskable"))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
            noised = corrupt(x0, predictable(maskable, docs, label_shift), block_size=block_size, t=t, generator=generator,
                             mask_token_id=model.config.hilda["mask_token_id"], forbidden_ids=[])
            canvas = (value.to(model.device) for value in (x0, noised.noisy_ids[:, None], docs))
            targets = noised.mask_targets.to(model.device)
            layout = Layout.build(*canvas, block_size, label_shift, causal_context, causal_blocks=record.get("causal_blocks", False))
            reading = read_clean(model, layout)
            logits = target_logits(model, layout, targets[:, None], reading=reading)
            if residual:
                logits = target_logits(model, layout, targets[:, None], layout.carry(model, logits), reading=reading)
            total += F.cross_entropy(logits, x0.to(model.device)[targets], reduction="sum").item()
            count += noised.mask_targets.sum().item()
        out[t] = total / max(count, 1)
    return out
