"""What goes into every decoder and what comes out: prompts on a canvas of masks, `Decoded`.

Entry points: `Decoded`, `left_padded`, `blank`, `completion`, `check_context`, `check_prompts`, `eos_ids`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding.trace import Trace


@dataclass(frozen=True)
class Decoded:
    """ids (B, T) long: generated tokens only, EOS-padded on the right. forwards (B,): forwards each row took part in,
    prefill and commits included. positions_fed (B,): positions it fed in them. trace: what happened, if asked for.
    kv_bytes (B,): of the committed cache of a row when it was last read, if `EditSettings.kv` asks for it."""

    ids: Tensor
    forwards: Tensor
    positions_fed: Tensor
    trace: Trace | None = None
    kv_bytes: Tensor | None = None


def eos_ids(model) -> list[int]:
    """The model's end-of-text ids, as a list."""
    eos = model.config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def check_context(model, length: int) -> None:
    """Raises HildaError when `length` positions exceed the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and length > limit:
        raise HildaError(f"prompt and max_new_tokens need {length} positions, the model's context is {limit}; shorten the prompt or lower max_new_tokens")


def check_prompts(lengths: Tensor, shift: bool = True) -> None:
    """Raises HildaError where a prompt of lengths (B,) has no token and the model needs one."""
    if shift and int(lengths.min()) < 1:
        raise HildaError("a shifted model predicts each token from the one before; the prompt needs at least one token")


def left_padded(prompt_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B,) lengths of the prompts (B, P), whose attention_mask (B, P) (1 = real; None: all) must be zeros first, then ones."""
    real = torch.ones_like(prompt_ids) if attention_mask is None else attention_mask.long()
    lengths = real.sum(1)
    if not torch.equal(real, (torch.arange(prompt_ids.shape[1], device=prompt_ids.device) >= (prompt_ids.shape[1] - lengths)[:, None]).long()):
        raise HildaError("attention_mask: prompts must be left-padded (zeros first, then ones)")
    return lengths


def blank(prompt_ids: Tensor, lengths: Tensor, slots: int, mask_id: int) -> Tensor:
    """(B, slots): the prompts without their padding, position 0 the first real token, and [MASK] after them."""
    canvas = torch.full((len(prompt_ids), slots), mask_id, device=prompt_ids.device)
    for row, length in enumerate(lengths.tolist()):
        canvas[row, :length] = prompt_ids[row, prompt_ids.shape[1] - length:]
    return canvas


def completion(canvas: Tensor, lengths: Tensor, max_new_tokens: int, eos: Tensor) -> Tensor:
    """(B, max_new_tokens): the generated tokens of canvas (B, slots), EOS after the first of eos (n,)."""
    ids = canvas.gather(1, lengths[:, None] + torch.arange(max_new_tokens, device=canvas.device))
    if not len(eos):
        return ids
    ended = torch.isin(ids, eos).long()
    return ids.masked_fill(ended.cumsum(1) - ended > 0, int(eos[0]))
