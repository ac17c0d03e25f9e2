"""LoRA that acts on noisy rows only, over a frozen autoregressive parent: what reads clean rows is the parent itself.

The drafts of such a model are its adapter's, what verifies them is the parent, so self-speculation writes the parent's greedy text (the
idea of R-ISD, I-DLM, arXiv 2604.11035). Entry points: `gate`, `noisy_rows`, `is_gated`.
"""

import contextlib

from torch import Tensor

from hildalib import HildaError


def is_gated(model) -> bool:
    """Whether the adapters of `model` act on noisy rows only."""
    return hasattr(model, "row_gate")


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
        return out * 0.0 if rows is None else out * rows[..., None].to(out.dtype)

    for name, module in model.named_modules():
        if "lora_B." in name:
            module.register_forward_hook(only_there)
    model.config.hilda = model.config.hilda | {"gated": True}
    return model


@contextlib.contextmanager
def noisy_rows(model, rows: Tensor | None):
    """Within, adapters of a gated model act on `rows` (B, Q) bool; None: on no row. Nothing happens to other models."""
    plain = getattr(model, "module", model)  # under DDP
    if not is_gated(plain):
        yield
        return
    before, plain.row_gate["rows"] = plain.row_gate["rows"], rows
    try:
        yield
    finally:
        plain.row_gate["rows"] = before
