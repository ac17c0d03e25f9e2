"""How much of a method's gradient is signal: its spread over fresh rollouts, and the part of it that the draw of masks alone makes.

Entry points: `gradient_noise` (a model), `noise_of` (gradients).
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hildalib import footprint
from hildalib.attention import TILED
from hildalib.decoding import EditSettings
from hildalib.rl import gradient, trainer

NOTHING = {"noise": float("nan"), "mask_noise": float("nan")}


def gradient_noise(model, tokenizer, task, pool: list[dict], recipe: trainer.RLRecipe, settings: EditSettings, *, batches: int = 4,
                   chat: bool = False) -> dict:
    """{"noise", "mask_noise"} of `noise_of` for the first `batches` steps of a run, nothing updated, masks drawn twice on each; and
    "learn_mb", the most memory in MB that scoring and the backward pass of one step held, beside weights and optimiser.

    nan where fewer than two of the steps had a group to learn from.
    """
    model.set_attn_implementation(TILED)  # as in training
    run, pairs, most = trainer._Run(model, tokenizer, task, pool, recipe, settings, chat), [], 0
    for step in range(batches):
        run.step = step
        sampled = run.roll()
        pair = [run._batch(*sampled, update) for update in range(2)]
        if None not in pair:
            pairs.append(torch.stack([_gradient(run, batch) for batch in pair]))
            most = most or footprint.held(lambda batch=pair[0]: _gradient(run, batch), model.device)
    model.set_attn_implementation("sdpa")
    found = noise_of(torch.stack(pairs)) if len(pairs) > 1 else NOTHING
    return found | {"learn_mb": most / 1e6 if pairs else float("nan")}


def _gradient(run, batch: gradient.Batch) -> Tensor:
    """(parameters,) gradient of one batch, its reference the present weights: there a KL penalty has none."""
    run.optimizer.zero_grad()
    reference = None if run.reference is None else gradient.scored(run.reference, batch.states, run.recipe.micro_batch)
    batch = replace(batch, reference=reference)
    gradient.policy_gradient(run.model, batch.states, partial(batch.loss, run.method.objective), run.recipe.micro_batch)
    flat = torch.cat([p.grad.flatten() for p in run.trained.values()])
    run.optimizer.zero_grad()
    return flat


def noise_of(gradients: Tensor) -> dict:
    """noise: the variance of one step's gradient over the squared mean gradient; mask_noise: the part of it that is due to the masks.

    gradients (steps, 2, parameters): a pair has its rollouts in common, not its masks. A noise of 9 means that the mean of nine
    steps is as much signal as noise. The squared mean comes from products of different steps, so that noise does not pass for
    signal; nan where they agree on no direction.
    """
    flat = gradients.flatten(0, 1).double()
    products = (flat @ flat.T).unflatten(0, (-1, 2)).unflatten(-1, (-1, 2)).transpose(1, 2)  # (steps, steps, 2, 2)
    same = torch.eye(len(gradients), dtype=torch.bool)
    signal = products[~same].mean().item()
    square = products[same].diagonal(dim1=-2, dim2=-1).mean().item()
    masks = square - products[same][:, 0, 1].mean().item()
    return {"noise": (square - signal) / signal, "mask_noise": masks / signal} if signal > 0 else NOTHING
