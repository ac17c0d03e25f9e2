"""One forward of block diffusion: the layout [noisy copies | clean], its mask, and the rows that predict each token.

Entry points: `Layout.build`, `target_logits` (LM head only where a loss or a draft needs it), `target_scores` (and never more than a few rows of
it at once), `clean_logits`, `validate`.
"""

import contextlib
from collections.abc import Callable
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
def selected_rows(model, index: Tensor, score: Callable | None = None, chunk: int = 0, read: tuple[Tensor, Tensor] | None = None):
    """Within, the LM head sees only the rows `index` (n,) of the flattened (B * Q) hidden states: logits are (1, n, V).

    read: (hidden (m, D) of other rows, where (n + m,) bool they go among those of `index`).

    The head and its softmax are a third of the cost at 49k tokens of vocabulary; rows without loss need neither. A hook,
    because DDP, FSDP and PEFT only work when the whole model's forward is called. chunk > 0: the model gives score(logits) of its rows
    instead, (1, n, ...) of `in_chunks`.
    """
    plain = getattr(model, "module", model)
    head = plain.get_output_embeddings()

    def select(_, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0].flatten(0, 1)[index]
        if read is not None:
            hidden = hidden.new_empty(len(read[1]), hidden.shape[1]).masked_scatter(read[1][:, None], read[0].to(hidden)).masked_scatter(~read[1][:, None], hidden)
        return (hidden[None],)

    handle = head.register_forward_pre_hook(select)
    if chunk:
        whole, mask_id = getattr(head, "product", head.forward), plain.config.hilda["mask_token_id"]
        head.forward = lambda hidden: in_chunks(head, lambda rows: _barred(whole(rows), mask_id), score, chunk, hidden[0])[None]
    try:
        yield
    finally:
        handle.remove()
        if chunk:
            del head.forward


def _barred(logits: Tensor, mask_id: int) -> Tensor:
    """float logits (n, V) without the possibility of [MASK]."""
    logits = logits.float()
    logits[:, mask_id] = -torch.inf
    return logits


class _InChunks(torch.autograd.Function):
    """The forward keeps the scores alone; the backward makes the logits of each chunk again."""

    @staticmethod
    def forward(ctx, logits_of, score, chunk: int, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.call, ctx.weights = (logits_of, score, chunk), weights
        kind = hidden.device.type
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        ctx.save_for_backward(hidden)
        return torch.cat([score(logits_of(hidden[at:at + chunk]), slice(at, at + chunk)) for at in range(0, max(len(hidden), 1), chunk)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (hidden,), (logits_of, score, chunk) = ctx.saved_tensors, ctx.call
        wanted = [weight for weight in ctx.weights if weight.requires_grad]
        into_hidden, into = torch.empty_like(hidden), [None] * len(wanted)
        for at in range(0, max(len(hidden), 1), chunk):
            rows = slice(at, at + chunk)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                part = hidden[rows].detach().requires_grad_()
                out = score(logits_of(part), rows)
            into_hidden[rows], *fresh = torch.autograd.grad(out, (part, *wanted), grad[rows], allow_unused=True)  # a tied head's own [MASK] row is none
            into = [old if new is None else new if old is None else old.add_(new) for old, new in zip(into, fresh)]
        found = iter(into)
        return None, None, None, into_hidden, *(next(found) if weight.requires_grad else None for weight in ctx.weights)


def in_chunks(head, logits_of: Callable, score: Callable, chunk: int, hidden: Tensor) -> Tensor:
    """score(logits_of(hidden (n, D)) (n, V), rows) -> (n, ...), `chunk` rows at a time in the forward and again in the backward.

    At a vocabulary of 151,936 the logits of 1,024 rows and their gradient are 1.2 GB, those of 128 rows 160 MB; the price is that the head's
    product is made twice. `head` owns the weights that logits_of uses; under `tables.in_place` their gradient is summed elsewhere.
    """
    return _InChunks.apply(logits_of, score, chunk, hidden, *(() if hasattr(head, "product") else head.parameters()))


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
    read = None if end is None else (reading.hidden[(rows // width)[at >= end], at[at >= end] - end], at >= end)
    with selected_rows(model, run, read=read), noisy_rows(model, layout.noisy if end is None else True):
        logits = model(**source, attention_mask=layout.mask[:, :, :end], position_ids=layout.positions[:, :end], use_cache=False, tiles=tiles,
                       past_key_values=reading).logits[0].float()
    plain = getattr(model, "module", model)
    logits[:, plain.config.hilda["mask_token_id"]] = -torch.inf
    return logits


def target_scores(model, layout: Layout, targets: Tensor, score: Callable, chunk: int = 0, inputs_embeds: Tensor | None = None,
                  context: Tensor | None = None, reading: CleanReading | None = None) -> Tensor:
    """score(`target_logits`, all rows) -> (n or n + m, ...); with chunk > 0 of so many rows at a time, and without a gradient to anything else
    that `score` uses. score: (logits (r, V), slice of these rows among all) -> (r, ...), each row for itself."""
    if not chunk:
        return score(target_logits(model, layout, targets, inputs_embeds, context, reading), slice(None))
    rows = layout.rows(targets)
    rows = rows if context is None else torch.cat([rows, layout.context_rows(context)])
    source = {"input_ids": layout.ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    with selected_rows(model, rows, score, chunk), noisy_rows(model, layout.noisy):
        return model(**source, attention_mask=layout.mask, position_ids=layout.positions, use_cache=False, tiles=layout.tiles).logits[0]


@torch.no_grad()
def clean_logits(model, reading: CleanReading, row: Tensor, position: Tensor) -> Tensor:
    """(n, V) float: what the parent expects after `position` (n,) of clean rows `row` (n,), [MASK] barred."""
    plain = getattr(model, "module", model)
    logits = plain.get_output_embeddings()(reading.hidden[row, position]).float()
    logits[:, plain.config.hilda["mask_token_id"]] = -torch.inf
    return logits


@torch.no_grad()
def validate(model, rows: dict[str, Tensor], *, block_size: int, label_shift: bool | None = None, causal_context: bool | None = None,
             rates=CHECK_RATES, batch_size: int = 32, seed: int = 0, residual: bool = False, head_rows: int = 0) -> dict[float, float]:
    """{t: nats per masked token} on held-out rows, the same masks for every model of a vocabulary (seeded).

    label_shift, causal_context: None takes what the model's `hilda` record says. residual: the loss of a second forward, whose masks
    carry what the first expected there. head_rows: rows of the head at a time, where the vocabulary is large; 0: all.
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
            reading = None if head_rows else read_clean(model, layout)
            labels, carried = x0.to(model.device)[targets], None
            if residual:
                carried = layout.carry(model, target_logits(model, layout, targets[:, None], reading=reading))
            nll = target_scores(model, layout, targets[:, None], lambda logits, rows: F.cross_entropy(logits, labels[rows], reduction="none"),  # noqa: B023
                                head_rows, carried, reading=reading)
            total += nll.sum().item()
            count += noised.mask_targets.sum().item()
        out[t] = total / max(count, 1)
    return out
