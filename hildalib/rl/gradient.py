"""One gradient step of RL: the samples that it learns from, and the gradient of any objective of them in micro-batches.

Entry points: `Batch` (its `loss`), `policy_gradient` (one loss, its gradient left in the model), `scored` (log-probabilities as constants).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.rl.likelihood import States, token_logp


@dataclass(frozen=True)
class Batch:
    """What one gradient step learns from: N samples in the rows of `states`; tensors as in `objectives.sequence`."""

    states: States
    rewards: Tensor
    groups: Tensor
    lengths: Tensor
    predictions: bool
    old: Tensor | None = None
    reference: Tensor | None = None

    def view(self, values: Tensor) -> Tensor:
        """(B, C, L) -> (N, M): all of a row is one sample, or each prediction of a block is."""
        return values.unflatten(-1, (-1, self.states.block_size))[blocks_scored(self.states)] if self.predictions else values.flatten(1)

    def loss(self, objective: Callable, logp: Tensor) -> tuple[Tensor, dict]:
        """logp (B, C, L). Without `old` the policy that sampled is the present one: the ratio is 1, its gradient is not 0."""
        logp = self.view(logp)
        constants = {} if self.reference is None else {"reference": self.view(self.reference)}
        old = logp.detach() if self.old is None else self.view(self.old)
        return objective(logp, old, self.rewards, self.groups, self.view(self.states.weight), self.lengths, **constants)


def blocks_scored(states: States) -> Tensor:
    """(B, C, L // K) bool, True = something of the block is scored in this copy."""
    return (states.weight != 0).unflatten(-1, (-1, states.block_size)).any(-1)


def policy_gradient(model, states: States, loss_of: Callable[[Tensor], tuple[Tensor, dict]], micro_batch: int) -> dict:
    """Adds the gradient of loss_of(logp (B, C, L)) to the model's; returns its statistics with loss and entropy (nats a token).

    The loss couples rows (softmax weights, normalised ratios), so with several micro-batches all are scored first without
    gradient, then each again with the loss's derivative fixed: the same gradient.
    """
    parts = [slice(start, start + micro_batch) for start in range(0, len(states.x0), micro_batch)]
    with torch.set_grad_enabled(len(parts) == 1):
        found = [token_logp(model, states.take(part)) for part in parts]
    logp, entropy = (torch.cat(values) for values in zip(*found))
    leaf = logp.detach().requires_grad_()
    loss, statistics = loss_of(leaf.cpu())
    if not torch.isfinite(loss):
        raise HildaError(f"loss is {loss.item()}: lower lr, or look at clip_share and ratio_max in the log; checkpoints before it are kept")
    gradient, = torch.autograd.grad(loss, leaf)
    for part in parts:
        (logp if len(parts) == 1 else token_logp(model, states.take(part))[0]).backward(gradient[part])
    count = (states.weight != 0).unflatten(1, (-1, states.draws)).any(2).sum().clamp(min=1)
    return statistics | {"loss": loss.item(), "entropy": (entropy.sum() / count).item()}


@torch.no_grad()
def scored(model, states: States, micro_batch: int) -> Tensor:
    """(B, C, L) log-probabilities without gradient, on the CPU."""
    rows = range(0, len(states.x0), micro_batch)
    return torch.cat([token_logp(model, states.take(slice(start, start + micro_batch)))[0] for start in rows]).cpu()
