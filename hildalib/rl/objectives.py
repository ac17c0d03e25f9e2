"""Policy objectives as plain functions of log-probabilities and rewards, so that they can be read and tested side by side.

All have the form f(logp, old, rewards, groups, weight, lengths, **constants) -> (loss, statistics); see `sequence` for the shapes.
Entry points: `wd1` (also wd1++, on other states), `espo`, `ebpo`, `diffu_grpo`, `agrpo`, `grpo`, `reinforce`, `imitation` (the
control without blame); `advantages`, `informative`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import HildaError

LARGEST = 10.0  # log-ratios are cut at +-10 before exp (TraceRL's code): only then is a runaway ratio a number at all
SAME = 1e-6  # rewards closer than this are equal: float32 means of equal rewards differ by less


def sequence(logp: Tensor, weight: Tensor) -> Tensor:
    """(N,) log-likelihoods in nats from their terms.

    Shapes of this module: logp, old, weight (N, M) float, the N samples' terms, weight 0 = no term; old: the same under the
    policy that sampled, without gradient. rewards (N,) float. groups (N,) long: samples with equal numbers answer the same
    prompt. lengths (N,): tokens of each sample. Statistics are floats.
    """
    return (logp * weight).sum(1)


def advantages(rewards: Tensor, groups: Tensor, scaled: bool = False) -> Tensor:
    """(N,) reward less the mean of its group; scaled: divided by the group's standard deviation (GRPO; d1 and wd1 do not)."""
    members = F.one_hot(groups.unique(return_inverse=True)[1]).to(rewards)  # (N, groups)
    count = members.sum(0)
    centred = rewards - members @ (members.T @ rewards / count)
    if not scaled:
        return centred
    deviation = (members.T @ centred.square() / (count - 1).clamp(min=1)).sqrt()
    return centred / (members @ deviation).clamp(min=SAME)


def informative(rewards: Tensor, groups: Tensor) -> Tensor:
    """(N,) bool, True = the rewards of its group differ: only such groups move any objective here, the others may be dropped."""
    different = advantages(rewards, groups).abs() > SAME
    return torch.isin(groups, groups[different])


def _ratio_statistics(log_ratio: Tensor, low: float, high: float) -> dict[str, float]:
    """log_ratio (n,): its spread, the extremes of the ratio, and the share outside [low, high]."""
    log_ratio = log_ratio.detach()
    ratio = log_ratio.clamp(-LARGEST, LARGEST).exp()
    clipped = (ratio < low) | (ratio > high)
    return {"log_ratio_std": log_ratio.std(correction=0).item(), "ratio_min": ratio.min().item(), "ratio_max": ratio.max().item(),
            "clip_share": clipped.float().mean().item()}


def reinforce(logp: Tensor, old: Tensor, rewards: Tensor, groups: Tensor, weight: Tensor, lengths: Tensor):
    """-mean(A * log-likelihood / length): group baseline, no ratio, no clipping; what every other objective must beat.

    The division by length is ours, here as elsewhere: a sum lets long samples dominate.
    """
    return -(advantages(rewards, groups) * sequence(logp, weight) / lengths).mean(), {}


def imitation(logp: Tensor, old: Tensor, rewards: Tensor, groups: Tensor, weight: Tensor, lengths: Tensor):
    """-sum(reward * log-likelihood / length) / sum(reward): supervised steps on the policy's own right answers (rejection sampling). No
    baseline, so nothing is ever made less likely: what RL must beat at the same cost. All rewards 0: no loss."""
    return -(rewards * sequence(logp, weight) / lengths).sum() / rewards.sum().clamp(min=SAME), {}


def wd1(logp: Tensor, old: Tensor, rewards: Tensor, groups: Tensor, weight: Tensor, lengths: Tensor, *, psi: float = 1.0):
    """Weighted likelihood with a mirrored penalty (wd1, arXiv 2507.08838, Eq. 4-9): sum of (softmax(-psi A) - softmax(psi A)) *
    log-likelihood, both softmaxes over all N samples. No ratio and no old or reference policy.

    psi = 1 (paper, all experiments). On the states of `likelihood.denoising`, with one sample a prediction, this is wd1++. The
    paper sums over tokens; so does this.
    """
    a = advantages(rewards, groups)
    coefficient = (psi * a).softmax(0) - (-psi * a).softmax(0)
    return -(coefficient * sequence(logp, weight)).sum(), {"weight_max": coefficient.abs().max().item()}


def espo(logp: Tensor, old: Tensor, rewards: Tensor, groups: Tensor, weight: Tensor, lengths: Tensor, *, epsilon: float = 3e-4,
         beta: float = 0.0, reference: Tensor | None = None):
    """A completion is one action, its ELBO the log-likelihood (ESPO, arXiv 2512.03759): ratio exp((ELBO - ELBO_old) / length), and
    beta times the k2 penalty (ELBO - ELBO_reference)^2 / 2 / length (the division as in its code).

    In place of PPO's min, which leaves ratios unbounded where A < 0, StableDRL's normalised form (arXiv 2603.06743): -sum(c A
    log-likelihood / length) / sum(c) with c the ratio clipped to 1 +- epsilon, without gradient (its detach and epsilon are
    unpublished; ours). epsilon = 3e-4 as in GSPO: divided by the length, log-ratios are that small; watch clip_share.
    beta: the paper has 1e-3 (mathematics), 3e-3 (Countdown), 1e-2 (Sudoku, code). reference: logp of the frozen policy.
    """
    value, before = sequence(logp, weight) / lengths, sequence(old, weight) / lengths
    log_ratio = (value - before).detach().clamp(-LARGEST, LARGEST)
    c = log_ratio.exp().clamp(1 - epsilon, 1 + epsilon)
    loss = -(c * advantages(rewards, groups) * value).sum() / c.sum()
    if beta:
        loss = loss + beta * ((value - sequence(_needed(reference), weight) / lengths).square() * lengths / 2).mean()
    return loss, _ratio_statistics(log_ratio, 1 - epsilon, 1 + epsilon)


def ebpo(logp: Tensor, old: Tensor, rewards: Tensor, groups: Tensor, weight: Tensor, lengths: Tensor, *, low: float = 3e-4,
         high: float = 4e-4):
    """LLaDA2.1's ELBO-based block policy optimisation (arXiv 2602.08676, section 3.2): -mean(min(rho A, clip(rho) A)), rho from the
    weighted block log-likelihoods of noisy copies beside the clean one, asymmetric clipping.

    Unpublished: copies and their weights, normalisation by length, clip range, advantage. Ours: those of `elbo_states`, by
    length, GSPO's 3e-4 and 4e-4, reward less group mean.
    """
    log_ratio = sequence(logp - old, weight) / lengths
    loss = -_clipped(log_ratio, advantages(rewards, groups), low, high).mean()
    return loss, _ratio_statistics(log_ratio, 1 - low, 1 + high)


def _clipped(log_ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    ratio = log_ratio.clamp(-LARGEST, LARGEST).exp()
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def clipped_tokens(logp: Tensor, old: Tensor, rewards: Tensor, groups: Tensor, weight: Tensor, lengths: Tensor, *, epsilon: float,
                   beta: float = 0.0, reference: Tensor | None = None, scaled: bool = False):
    """PPO's clipped ratio a token, averaged over all tokens, and beta times the k3 estimate of KL(policy || reference).

    `diffu_grpo` (d1, arXiv 2504.12216: epsilon 0.5, beta 0.04), `agrpo` (arXiv 2510.04019: 0.2, no KL) and `grpo` (advantages
    divided by the group's deviation, 0.2), the reference arm at block size 1, are this function.
    """
    terms = weight != 0
    log_ratio = (logp - old)[terms]
    a = advantages(rewards, groups, scaled)[:, None].expand_as(weight)[terms]
    value = _clipped(log_ratio, a, epsilon, epsilon)
    if beta:
        distance = (_needed(reference) - logp)[terms].clamp(-LARGEST, LARGEST)
        value = value - beta * (distance.exp() - distance - 1)
    return -(value * weight[terms]).sum() / weight[terms].sum(), _ratio_statistics(log_ratio, 1 - epsilon, 1 + epsilon)


diffu_grpo = partial(clipped_tokens, epsilon=0.5, beta=0.04)
agrpo = partial(clipped_tokens, epsilon=0.2)
grpo = partial(clipped_tokens, epsilon=0.2, scaled=True)


def _needed(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise HildaError("beta > 0 penalises the distance from a reference policy; pass its log-probabilities as reference, or set beta to 0")
    return reference
