"""The layers of a gated model as functions of rows of which the clean ones come first: W x for those, W x + s B A x behind them.

Both halves share one matmul with W, so that clean rows have the parent's numbers and W is read once; s B A is multiplied out where it is no larger than
its factors. Entry points: `Gate` (its `cut` is the number of clean rows of a forward), `fits`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _layers(model) -> dict:
    """Layer with an adapter -> its weight and bias, and the factors of the adapter; sought once, for a walk through the modules takes as long as a
    small forward."""
    if "layers" not in model.row_gate:
        model.row_gate["layers"] = {part: (part.base_layer.weight, part.base_layer.bias, part.lora_A["default"].weight, part.lora_B["default"].weight)
                                    for part in model.modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")}
    return model.row_gate["layers"]


def fits(model) -> bool:
    """Whether the adapters of `model`, gated, are as `backbones.with_lora` makes them: plain LoRA over plain layers, and a row for [MASK]."""
    embedding = getattr(model.get_input_embeddings(), "token_adapter", None)
    one = embedding is not None and list(embedding.token_indices.values()) == [[model.config.hilda["mask_token_id"]]] and not embedding.merged
    return one and type(embedding.base_layer) is torch.nn.Embedding and all(
        type(part.base_layer) is torch.nn.Linear and part.active_adapters == ["default"] and not part.merged and not part.disable_adapters
        and not getattr(part, "lora_variant", None) and part.lora_B["default"].bias is None for part in _layers(model))


def _product(part, weight: Tensor, down: Tensor, up: Tensor) -> Tensor | None:
    """s A' B' (in, out) of a layer whose factors are no smaller, kept until they change; None where they are."""
    if down.numel() + up.numel() < weight.numel() or down.dtype != weight.dtype:
        return None
    state = (down.data_ptr(), down._version, up.data_ptr(), up._version)
    if getattr(part, "product", (None,))[0] != state:
        part.product = state, part.scaling["default"] * (up @ down).t().contiguous()
    return part.product[1]


class Gate:
    """cut: how many rows of what comes in, its first ones, are clean; set before each forward."""

    def __init__(self, model):
        self.cut, self.parts = 0, _layers(model)

    def function(self, part):
        """A layer with an adapter as a function (N, in) -> (N, out); None for any other module."""
        if part not in self.parts:
            return None
        weight, bias, down, up = self.parts[part]
        product, scaling, weight, down, up = _product(part, weight, down, up), part.scaling["default"], weight.t(), down.t(), up.t()

        def run(x: Tensor) -> Tensor:
            out = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
            if self.cut >= len(x):
                return out
            if product is not None:
                out[self.cut:].addmm_(x[self.cut:], product)
            else:
                out[self.cut:].add_(torch.mm(torch.mm(x[self.cut:].to(down.dtype), down), up), alpha=scaling)
            return out

        return run

    @staticmethod
    def embedding(model):
        """Ids (b, Q) -> (b, Q, D), the trained row at [MASK]; peft would copy the whole table first."""
        adapter, mask_id = model.get_input_embeddings().token_adapter, model.config.hilda["mask_token_id"]
        table, row = adapter.base_layer.weight, adapter.trainable_tokens_delta["default"][0]
        return lambda ids: torch.where((ids == mask_id)[..., None], row.to(table.dtype), F.embedding(ids, table))
