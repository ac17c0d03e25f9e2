"""LoRA on a frozen base, and what keeps its step cheap: nothing that is frozen is copied, cast or differentiated again and again.

Entry points: `with_lora`; `fit` (to the difference of two models), `mask_row` (a learned [MASK] embedding without a copy of the table), `halved`
(frozen weights in bfloat16 while adapters train). Adapters that act on noisy rows only: `gated`.
"""

import contextlib
import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hildalib import HildaError
from hildalib.weights import quiet


def with_lora(model: PreTrainedModel, lora: int | dict):
    """`model` as a peft model: LoRA on every linear layer but the output head, plus the [MASK] embedding row (tied heads follow it)."""
    from peft import LoraConfig, get_peft_model

    chosen = {"r": lora, "lora_alpha": 2 * lora} if isinstance(lora, int) else dict(lora)  # alpha = 2r: updates keep their size over ranks
    options = {"target_modules": "all-linear", "trainable_token_indices": [model.config.hilda["mask_token_id"]], **chosen}
    try:
        with quiet():
            return mask_row(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)))
    except (TypeError, ValueError) as error:
        raise HildaError(f"lora={lora!r}: {error}; give a rank >= 1 or keyword arguments of peft.LoraConfig") from error


@torch.no_grad()
def fit(model, donor) -> None:
    """Sets the adapters of a peft model to what `donor`, a whole model of its shape, has other weights in those layers, cut to their rank (SVD, which
    loses least)."""
    theirs, reach = dict(donor.named_modules()), model.peft_config["default"].r
    for name, part in model.get_base_model().named_modules():
        if hasattr(part, "lora_A"):
            left, strengths, right = torch.linalg.svd((theirs[name].weight - part.base_layer.weight).float(), full_matrices=False)
            root = strengths[:reach].sqrt()
            for factor in (part.lora_A["default"].weight, part.lora_B["default"].weight):
                factor.zero_()  # a rank above the layer's own stays empty
            part.lora_A["default"].weight[:len(root)] = root[:, None] * right[:reach]
            part.lora_B["default"].weight[:, :len(root)] = left[:, :reach] * root / part.scaling["default"]


def mask_row(model):
    """Makes the trainable token of a peft model (`trainable_token_indices`) cost a row instead of a table; returns the model.

    PEFT writes the row into a copy of the whole table in each forward and sums a gradient of its size in each backward, twice where the head is
    tied: at 49,152 x 576 in float32 that is 113 MB each time. Here only embeddings of the token are replaced, and the head stays as it is, for
    the [MASK] logit is barred wherever logits are read.
    """
    plain, row = _classes()
    for module in model.modules():
        if type(module) is plain:
            module.__class__ = row
    return model


@functools.cache
def _classes() -> tuple[type, type]:
    """PEFT's layer of trainable tokens, and ours; peft is imported where adapters are."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    class MaskRow(TrainableTokensLayer):
        def forward_adapters(self, x: Tensor, active_adapters, *args, **kwargs) -> Tensor:
            out = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters or not active_adapters or isinstance(self.base_layer, nn.Linear):
                return out
            for name in active_adapters:
                for token, row in zip(self.token_indices[name], self.trainable_tokens_delta[name]):
                    out = torch.where((x == token)[..., None], row.to(out), out)
            return out

    return TrainableTokensLayer, MaskRow


@contextlib.contextmanager
def halved(model):
    """Within, linear layers that are frozen hold bfloat16 weights, and adapters take their inputs as they come: what autocast would make of
    both in each forward, made once. A tied head brings the embedding along, and with it the residual stream, as in a model that is stored in
    bfloat16; adapters stay float32. Afterwards the float32 weights are back."""
    frozen = [module.weight for module in model.modules() if type(module) is nn.Linear and not module.weight.requires_grad]
    kept = [weight.data for weight in frozen]
    casting = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]  # PEFT's own switch trips over trainable tokens
    for weight in frozen:
        weight.data = weight.data.bfloat16()
    for module in casting:
        module.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for module in casting:
            module.cast_input_dtype_enabled = True
        for weight, data in zip(frozen, kept):
            weight.data = data
