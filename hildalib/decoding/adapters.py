"""The layers of a gated model as functions of rows of which the clean ones come first: W x for those, W x + s B A x behind them.

Both halves share one matmul with W, so that clean rows have the parent's numbers and W is read once; s B A is multiplied out where it is no larger than
its factors. Entry points: `Gate` (its `cut` is the number of clean rows of a forward), `fits`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib.decoding.linear import linear, linears


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


def _changes(parts: list, layers: dict) -> tuple[list[Tensor], Callable]:
    """What the adapters of `parts`, which read the same rows, add together: ([A (R, in)], x -> x (s B)'), A and B (out, R) one below the other and block
    by block, or ([], x -> x (s B A)') where the product is no larger; in the dtype of the weights, kept until the factors change."""
    factors = [layers[part][2:] for part in parts]
    state = [(tensor.data_ptr(), tensor._version) for pair in factors for tensor in pair] + [layers[parts[0]][0].dtype]
    if getattr(parts[0], "changes", (None,))[0] != state:
        downs, ups = zip(*((down.detach(), part.scaling["default"] * up.detach()) for part, (down, up) in zip(parts, factors)))
        down, up = torch.cat(downs), torch.block_diag(*ups)
        *first, last = (change.to(state[-1]) for change in ([up @ down] if down.numel() + up.numel() >= len(up) * down.shape[1] else [down, up]))
        parts[0].changes = state, first, linear(last)
    return parts[0].changes[1:]


class Gate:
    """cut: how many rows of what comes in, its first ones, are clean; set before each forward."""

    def __init__(self, model):
        self.cut, self.layers = 0, _layers(model)

    def functions(self, parts: list):
        """Layers with adapters that read the same rows as one function of x (N, in), as `linears` has it; None for other modules."""
        if not all(part in self.layers for part in parts):
            return None
        weights, biases = (list(group) for group in zip(*(self.layers[part][:2] for part in parts)))
        down, change = _changes(parts, self.layers)  # a factor that reads what the weights read is multiplied with them
        base, sizes = linears(weights + down, biases + [None] * len(down)), [len(weight) for weight in weights]
        total = sum(sizes)

        def side_by_side(outs: Tensor, x: Tensor) -> Tensor:
            if self.cut < len(x):
                outs[self.cut:, :total].add_(change(outs[self.cut:, total:] if down else x[self.cut:]))
            return outs[:, :total]

        def run(x: Tensor):
            outs = base(x)
            if isinstance(outs, Tensor):
                return side_by_side(outs, x)
            if self.cut < len(x):
                for out, more in zip(outs, change(outs[-1][self.cut:] if down else x[self.cut:]).split(sizes, -1)):
                    out[self.cut:].add_(more)
            return outs[0] if len(sizes) == 1 else outs[:len(sizes)]

        return run

    @staticmethod
    def embedding(model):
        """Ids (b, Q) -> (b, Q, D), the trained row at [MASK]; peft would copy the whole table first."""
        adapter, mask_id = model.get_input_embeddings().token_adapter, model.config.hilda["mask_token_id"]
        table, row = adapter.base_layer.weight, adapter.trainable_tokens_delta["default"][0]
        return lambda ids: torch.where((ids == mask_id)[..., None], row.to(table.dtype), F.embedding(ids, table))
