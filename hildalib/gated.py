"""LoRA that acts on noisy rows only, over a frozen autoregressive parent: what reads clean rows is the parent itself.

The drafts of such a model are its adapter's, what verifies them is the parent, so self-speculation writes the parent's greedy text (the
idea of R-ISD, I-DLM, arXiv 2604.11035). Entry points: `gate`, `draft_as` (a start), `noisy_rows`, `is_gated`, `rank`; `read_clean`: the clean half, read
once without a gradient.
"""

import contextlib

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.adapters import fit


def is_gated(model) -> bool:
    """Whether the adapters of `model` act on noisy rows only."""
    return hasattr(model, "row_gate")


def rank(model) -> int:
    """Rank of the adapters of a gated model, 0 for any other."""
    return model.peft_config["default"].r if is_gated(model) else 0


def gate(model):
    """Lets the LoRA adapters of a peft model act only where `noisy_rows` says so, nowhere by default; returns the model.

    The `hilda` record says "gated", so that the model is saved as an adapter beside its parent, and never merged into it.
    """
    if not hasattr(model, "peft_config"):
        raise HildaError("only LoRA adapters can be kept to noisy rows; load the parent with backbones.load(..., lora=rank)")
    if is_gated(model):
        return model
    model.row_gate = {"rows": None}

    def only_there(_, __, out: Tensor) -> Tensor:
        rows = model.row_gate["rows"]
        if rows is True:
            return out
        return out * 0.0 if rows is None else out * rows[..., None].to(out.dtype)

    for name, module in model.named_modules():
        if "lora_B." in name:
            module.register_forward_hook(only_there)
    model.config.hilda = model.config.hilda | {"gated": True}
    return model


@torch.no_grad()
def draft_as(model, donor):
    """Starts the adapters of a gated model as what `donor`, a whole model of its shape, has other weights than its parent, cut to their rank (SVD, which
    loses least), and its row of [MASK] as the donor's; returns the model. Norms and other embeddings stay the parent's."""
    if not is_gated(model):
        raise HildaError("draft_as is for gated adapters; call gated.gate first")
    fit(model, donor)
    mask_row = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    mask_row[0] = donor.get_input_embeddings().weight[model.config.hilda["mask_token_id"]]
    return model


@contextlib.contextmanager
def noisy_rows(model, rows: Tensor | bool | None):
    """Within, adapters of a gated model act on `rows` (B, Q) bool; True: on every row, None: on none. Nothing happens to other models."""
    plain = getattr(model, "module", model)  # under DDP
    if not is_gated(plain):
        yield
        return
    before, plain.row_gate["rows"] = plain.row_gate["rows"], rows
    try:
        yield
    finally:
        plain.row_gate["rows"] = before


def checkpointing(model) -> dict:
    """Arguments of `gradient_checkpointing_enable` under which a layer that is run again in the backward acts on the rows it acted on before."""
    def contexts():
        return contextlib.nullcontext(), noisy_rows(model, model.row_gate["rows"] if is_gated(model) else None)

    return {"use_reentrant": False, "context_fn": contexts}


class CleanReading:
    """What the frozen parent of a gated model makes of the clean half of a layout: keys, values, and hidden (B, L, D).

    As `past_key_values` it shows noisy rows [their own keys | those of the clean half], the order of the layout's mask. Half of a step's
    rows then cost one forward and no backward, and drafts, teacher and loss share them.
    """

    def __init__(self):
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.hidden: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Called by the attention layers; keys, values (B, heads, rows, D_head)."""
        if self.hidden is None:
            self.keys[layer], self.values[layer] = keys, values
            return keys, values
        return torch.cat([keys, self.keys[layer]], 2), torch.cat([values, self.values[layer]], 2)

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked for where position ids are not given; they always are."""
        return 0

    def of(self, rows: Tensor) -> "CleanReading":
        """The reading of `rows` (B,) bool alone."""
        part = CleanReading()
        part.keys, part.values = ({layer: value[rows] for layer, value in store.items()} for store in (self.keys, self.values))
        part.hidden = self.hidden[rows]
        return part


@torch.no_grad()
def read_clean(model, layout) -> CleanReading | None:
    """The clean half of `layout` (layout.Layout), read by the parent; None where the model is not gated, the layout has no clean half, or
    gradient checkpointing, which knows no `past_key_values`, is on."""
    plain = getattr(model, "module", model)
    if not is_gated(plain) or layout.clean is None:
        return None
    if plain.training and any(getattr(module, "gradient_checkpointing", False) for module in plain.modules()):
        return None
    reading, half, base = CleanReading(), layout.clean, plain.get_base_model()
    with plain.disable_adapter():
        out = getattr(base, base.base_model_prefix)(input_ids=layout.ids[:, half:], attention_mask=layout.mask[:, :, half:, half:],
                                                    position_ids=layout.positions[:, half:], past_key_values=reading, use_cache=False)
    reading.hidden = out.last_hidden_state
    return reading
