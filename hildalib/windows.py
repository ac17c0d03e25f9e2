"""How far a model may look: its trained length, or the sliding window of some of its layers, which a 4-D mask would override.

Entry points: `context_limit`; `guard`, which `backbones.load` puts on every model.
"""

from transformers import PreTrainedModel

from hildalib import HildaError


def context_limit(model) -> int:
    """Positions the model may see: trained length, or the sliding window where some layers have one (a 4-D mask overrides the window,
    so beyond it those layers would attend further than they ever learned to)."""
    config = model.config
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ()) and config.sliding_window
    return min(config.max_position_embeddings, sliding or config.max_position_embeddings)


def guard(model: PreTrainedModel) -> None:
    """Makes a forward under a 4-D mask refuse positions beyond the window of `model`'s sliding layers, where it has any."""
    if context_limit(model) < model.config.max_position_embeddings:
        model.model.register_forward_pre_hook(_refuse, with_kwargs=True)  # inner: older peft calls the outer forward directly


def _refuse(module, _, kwargs) -> None:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None or mask.ndim != 4:
        return
    length = mask.shape[-1] if positions is None else int(positions.max()) + 1
    if length > module.config.sliding_window:
        raise HildaError(f"{length} positions under a 4-D mask exceed the sliding window of {module.config.sliding_window} that some layers of this "
                         "model were trained with; use shorter sequences")
