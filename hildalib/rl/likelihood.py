"""How likely a completion is under a block-diffusion model: estimators, exact values for small blocks, and the audit.

An estimator is a choice of `States`: noisy canvases, the tokens scored on each, and weights. A forward in the layout
[noisy copies | clean] scores all blocks of its states (`token_logp`). Entry points: `mean_field`, `elbo_states`, `trajectory`,
`denoising` (each Rollout -> States), `token_logp`, `exact` (enumeration), `audit`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import HildaError
from hildalib.layout import Layout, target_logits
from hildalib.rl.rollout import Rollout, replayed

SCHEMES = ("random", "stratified", "coupled", "balanced")


@dataclass(frozen=True)
class States:
    """C noisy copies of B rows over one clean copy: x0, docs (B, L) as in `Rollout`; noisy, labels (B, C, L) long; weight
    (B, C, L) float, 0 = not scored; or J of both for each copy, (B, C * J, L) with copy c's at c * J to c * J + J - 1, which cost no
    more forward than one. The log-likelihood that they stand for is the sum of weight * log p(labels | noisy), where a
    noisy block sees its own copy's block and the clean blocks before it. Comparing two policies means the same States for both:
    a ratio under different masks is noise. temperature: of the softmax (1 but for the decoder's own choices and predictions, which were
    sampled)."""

    x0: Tensor
    docs: Tensor
    noisy: Tensor
    labels: Tensor
    weight: Tensor
    block_size: int
    temperature: float = 1.0

    def take(self, rows: Tensor | slice) -> "States":
        """The rows at `rows`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if torch.is_tensor(value)})

    @property
    def draws(self) -> int:
        """J, the labels of each copy."""
        return self.labels.shape[1] // self.noisy.shape[1]

    def parts(self) -> Iterator[tuple[Tensor, "States"]]:
        """(rows, their States): rows whose last scored block is the same, cut after it and after the last copy that is scored. Nothing
        that no score depends on is fed."""
        size, scored = self.block_size, self.weight != 0
        last = (scored.any(1) * torch.arange(scored.shape[-1], device=scored.device)).amax(1) // size
        for block in last.unique().tolist():
            rows, end = (last == block).nonzero()[:, 0], (block + 1) * size
            part, used = self.take(rows), scored[rows].any(0).any(-1).nonzero()
            copies = int(used.amax()) // self.draws + 1 if len(used) else 1
            noisy, labels, weight = (value[:, :copies * many, :end] for value, many in ((part.noisy, 1), (part.labels, self.draws), (part.weight, self.draws)))
            yield rows, replace(part, x0=part.x0[:, :end], docs=part.docs[:, :end], noisy=noisy, labels=labels, weight=weight)

    @property
    def positions(self) -> int:
        """Positions that one scoring of all rows feeds."""
        return sum(part.x0.numel() * ((part.noisy.shape[1] if self.block_size > 1 else 0) + (self.block_size < part.x0.shape[1] or self.block_size == 1))
                   for _, part in self.parts())


def token_logp(model, states: States) -> tuple[Tensor, Tensor]:
    """(log p(labels) (B, C * J, L), entropy of the prediction (B, C, L)), nats on the model's device, 0 where nothing is scored.

    [MASK] is barred as in decoding. The entropy carries no gradient.
    """
    length, rows, found = states.x0.shape[1], [], []
    for index, part in states.parts():
        rows.append(index)
        found.append([F.pad(value, (0, length - value.shape[2], 0, full.shape[1] - value.shape[1]))
                      for value, full in zip(_token_logp(model, part), (states.labels, states.noisy))])
    back = torch.cat(rows).argsort()
    logp, entropy = (torch.cat(values)[back.to(values[0].device)] for values in zip(*found))
    return logp, entropy


def _predictions(model, states: States) -> tuple[Tensor, Tensor]:
    """(log-probabilities (n, V), targets (B, C, L) bool with n True) in one forward: of every position that some label is scored at."""
    device = next(model.parameters()).device
    x0, noisy, docs, weight = (value.to(device) for value in (states.x0, states.noisy, states.docs, states.weight))
    targets, record = (weight != 0).unflatten(1, (-1, states.draws)).any(2), model.config.hilda
    layout = Layout.build(x0, noisy, docs, states.block_size, record["label_shift"], record.get("causal_context", False))
    return (target_logits(model, layout, targets) / states.temperature).log_softmax(-1), targets


def _token_logp(model, states: States) -> tuple[Tensor, Tensor]:
    """`token_logp` in one forward."""
    logp, targets = _predictions(model, states)
    with torch.no_grad():
        entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    labels, scored = (value.to(logp.device).unflatten(1, (-1, states.draws)).movedim(2, -1) for value in (states.labels, states.weight != 0))
    found = logp.new_zeros(labels.shape).masked_scatter(targets[..., None], logp.gather(-1, labels[targets])) * scored  # (B, C, L, J)
    return found.movedim(-1, 2).flatten(1, 2), logp.new_zeros(targets.shape).masked_scatter(targets, entropy)


def _states(rollout: Rollout, noisy: Tensor, weight: Tensor, labels: Tensor | None = None, temperature: float = 1.0) -> States:
    labels = rollout.x0[:, None].expand_as(noisy) if labels is None else labels
    return States(rollout.x0, rollout.docs, noisy, labels, weight.float(), rollout.block_size, temperature)


def _noised(rollout: Rollout, masked: Tensor) -> Tensor:
    """(B, C, L): x0 with masked (B, C, L) hidden, and with it the tail after the completion, which would tell its length."""
    tail = rollout.written & ~rollout.scored
    return rollout.x0[:, None].expand_as(masked).masked_fill(masked | tail[:, None], rollout.mask_token_id)


def mean_field(rollout: Rollout) -> States:
    """Every token of a block from nothing but the blocks before it: one copy (d1, arXiv 2504.12216, section 3, there with the whole
    completion masked and 15 % of the prompt too; a model that has always seen its context clean gets it clean here). Biased: it
    scores a single forward that would fill the whole block. At block size 1 it is the AR log-likelihood, exactly."""
    return _states(rollout, _noised(rollout, rollout.scored[:, None]), rollout.scored[:, None])


def _uniform(shape: tuple[int, int, int], stratify: bool, generator: torch.Generator | None) -> Tensor:
    """(B, C, blocks) uniform in [0, 1); stratified: one draw in each of the C * blocks equal slices of a row, in random order."""
    u = torch.rand(shape, generator=generator)
    if not stratify:
        return u
    count = shape[1] * shape[2]
    slices = torch.rand(shape[0], count, generator=generator).argsort(1)
    return (slices.view(shape) + u) / count


def _per_position(values: Tensor, size: int) -> Tensor:
    return values.repeat_interleave(size, -1)


def _block_sum(values: Tensor, size: int) -> Tensor:
    """(..., L) -> (..., L // K)."""
    return values.unflatten(-1, (-1, size)).sum(-1)


def elbo_states(rollout: Rollout, samples: int = 2, scheme: str = "balanced", generator: torch.Generator | None = None) -> States:
    """`samples` copies whose weighted sum estimates the block ELBO without bias (LLaDA, arXiv 2502.09992, Eq. 6 a block).

    Of a block's n scored tokens a random subset of m is masked. "random": m uniform in 1..n, weight n/m. "stratified": the same,
    m spread evenly over a row's copies and blocks (as BD3-LM spreads its rates). "coupled": pairs of a mask with m uniform in
    0..n and its complement, weights (n+1)/m and (n+1)/(n-m), each halved (ESPO, arXiv 2512.03759, its published code). Where m is
    0 or n only half of the weight is there: rare in ESPO's 256 tokens, not in a block of 8. "balanced" (ours): pairs with m
    uniform in 1..n, weights n/m and n/(n-m), each halved, and 1 where m = n; the weights of a pair always sum to n. In both
    pairs every token is scored once and m is spread like "stratified". Raises HildaError on another scheme, or an odd number of
    samples where they come in pairs.
    """
    paired, coupled = scheme in ("coupled", "balanced"), scheme == "coupled"
    if scheme not in SCHEMES or samples < 1 or (paired and samples % 2):
        raise HildaError(f"scheme {scheme!r} with {samples} samples: use one of {', '.join(SCHEMES)}, and an even number of samples for pairs")
    size, scored = rollout.block_size, rollout.scored
    draws, n = samples // (1 + paired), _block_sum(scored, size)[:, None]
    u = _uniform((len(scored), draws, n.shape[-1]), scheme != "random", generator)
    count = torch.minimum((u * (n + coupled)).floor(), n - 1.0 + coupled) + (not coupled)  # u * n may round up to n
    order = torch.rand(len(scored), draws, scored.shape[1], generator=generator).masked_fill(~scored[:, None], 2.0)  # 2: after all others
    rank = order.unflatten(-1, (-1, size)).argsort(-1).argsort(-1).flatten(-2)
    masked = scored[:, None] & (rank < _per_position(count, size))
    share = torch.full_like(count, 1.0 / samples)
    if paired:
        share = share * (1.0 if coupled else 1.0 + (count == n))
        masked, count, share = torch.cat([masked, scored[:, None] & ~masked], 1), torch.cat([count, n - count], 1), torch.cat([share, share], 1)
    return _states(rollout, _noised(rollout, masked), _per_position((n + coupled) / count.clamp(min=1) * share, size) * masked)


def _picked(rounds: Tensor, samples: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Which rounds to score, (B, C', L // K) indices with weights: all, or `samples` of each block's rounds (B, L // K), drawn
    with one random offset and equal steps (systematic sampling; AGRPO's low-discrepancy draw) and weighted back to all."""
    most = max(int(rounds.max()), 1)
    if samples is None or samples >= most:
        index = torch.arange(most)[None, :, None].expand(len(rounds), -1, rounds.shape[1])
        return index, (index < rounds[:, None]).float()
    u = (torch.arange(samples)[None, :, None] + torch.rand(len(rounds), 1, rounds.shape[1], generator=generator)) / samples
    index = torch.minimum((u * rounds[:, None]).long(), (rounds[:, None] - 1).clamp(min=0))
    return index, (rounds / samples)[:, None].expand_as(index) * (rounds[:, None] > 0)


def _gathered(values: Tensor, index: Tensor, size: int) -> Tensor:
    """(B, C, L) at rounds index (B, C', L // K) -> (B, C', L)."""
    return values.gather(1, _per_position(index, size))


def trajectory(rollout: Rollout, *, edits: bool, samples: int | None = None, generator: torch.Generator | None = None) -> States:
    """The choices of the decoder, each at the state in which it was made, under the temperature of the rollout.

    edits=False: a token is credited once, where it was written last; the state is x0 with all tokens of the same or later step
    masked (AGRPO, arXiv 2510.04019; TraceRL, arXiv 2509.06949). edits=True: every write is an action, a T2T edit as well as a
    fill that an edit later undid, at the canvas that the decoder really read; how LLaDA2.1 does this is unpublished, the form is
    ours. Without edits in the rollout both are the same. The choice *where* to write is not scored in either: it follows from
    confidences by thresholds. samples: rounds of each block that are scored, weighted to stand for all; None = all.
    """
    size = rollout.block_size
    if edits:
        noisy, scored, labels = rollout.noisy, rollout.wrote, rollout.predicted
    else:
        noisy, scored = replayed(rollout.x0, rollout.step_map, size, rollout.mask_token_id)
        labels = rollout.x0[:, None].expand_as(noisy)
    rounds = (_block_sum(scored, size) > 0).sum(1)
    index, weight = _picked(rounds, samples, generator)
    index = index.clamp(max=noisy.shape[1] - 1)
    noisy, scored, labels = (_gathered(value, index, size) for value in (noisy, scored, labels))
    return _states(rollout, noisy, _per_position(weight, size) * scored, labels, rollout.temperature or 1.0)


def denoising(rollout: Rollout, eos: list[int], samples: int | None = None, generator: torch.Generator | None = None) -> States:
    """The whole prediction of a block at each state that its decoding went through (wd1++, arXiv 2507.08838, section 3.3).

    Scored at round l: the tokens chosen for all masks, up to the first EOS of the prediction, with weight n/m for m masks in n
    decoded positions. The paper's factor is T/l with a direction that its text leaves open; as the ELBO's 1/t it is this one.
    samples: rounds of each block, as in `trajectory`; the temperature is the rollout's too.
    """
    size, written = rollout.block_size, rollout.written[:, None]
    masked = (rollout.noisy == rollout.mask_token_id) & written & _per_position(_block_sum(rollout.wrote, size) > 0, size)
    rounds = (_block_sum(masked, size) > 0).sum(1)  # rounds that filled come before those that only edit
    index, weight = _picked(rounds, samples, generator)
    noisy, masked, labels = (_gathered(value, index, size) for value in (rollout.noisy, masked, rollout.predicted))
    rate = _block_sum(written, size) / _block_sum(masked, size).clamp(min=1)
    states = _states(rollout, noisy, _per_position(weight * rate, size) * masked, labels, rollout.temperature or 1.0)
    return _until_eos(rollout, states, eos)


def _until_eos(rollout: Rollout, states: States, eos: list[int]) -> States:
    """No score for what a prediction has after its first EOS, or beyond max_new_tokens."""
    size, labels = rollout.block_size, states.labels
    ended = (torch.isin(labels, torch.tensor(eos)) & rollout.written[:, None]).unflatten(-1, (-1, size)).long()
    before = (ended.cumsum(-1) - ended == 0).flatten(-2)
    inside = torch.arange(labels.shape[-1]) < (rollout.prompt_length + rollout.ids.shape[1])[:, None]
    return replace(states, weight=states.weight * (before & inside[:, None]))


@torch.no_grad()
def redrawn(model, rollout: Rollout, eos: list[int], draws: int, quota: int | None = None, samples: int | None = None,
            generator: torch.Generator | None = None) -> States:
    """`denoising` with `draws` predictions of each state, all drawn anew from the probabilities that one forward gives (ours).

    The forward is what costs; of a state that has it, many predictions tell which of its tokens were worth what. quota: of each
    prediction only its `quota` most confident tokens are scored, with weight 1: those that `Quota` would write. Scoring the rest too
    makes a model sure of guesses that it would not yet have written, and confidence is what tells the decoder where to begin.
    """
    size, states = rollout.block_size, denoising(rollout, eos, samples, generator)
    masked = (states.noisy == rollout.mask_token_id) & _per_position(_block_sum(states.weight, size) > 0, size)
    states = replace(states, weight=_per_position(states.weight.unflatten(-1, (-1, size)).amax(-1), size) * masked)
    labels, confidence = (value[:, :, None].repeat(1, 1, draws, 1) for value in (states.noisy, torch.full_like(states.weight, -1.0)))
    for rows, part in states.parts():
        logp, targets = _predictions(model, part)
        row, copy, position = targets.cpu().nonzero().T
        chance = logp.exp().cpu()
        drawn = torch.multinomial(chance, draws, replacement=True, generator=generator)
        labels[rows[row], copy, :, position], confidence[rows[row], copy, :, position] = drawn, chance.gather(1, drawn)
    weight = states.weight[:, :, None].repeat(1, 1, draws, 1)
    if quota:
        order = confidence.unflatten(-1, (-1, size)).argsort(dim=-1, descending=True, stable=True).argsort(-1).flatten(-2)
        weight = ((weight != 0) & (order < quota)).float()
    return _until_eos(rollout, replace(states, labels=labels.flatten(1, 2), weight=weight.flatten(1, 2)), eos)


@torch.no_grad()
def exact(model, rollout: Rollout, copies: int = 16) -> tuple[Tensor, Tensor]:
    """(block ELBO, log-likelihood), each (B,) nats, by enumerating all 2^n - 1 masks of a block of n scored tokens.

    Both are of the completion given the prompt when a block's tokens come one at a time in a uniformly random order: the ELBO is
    the mean over orders of the log-probability, the log-likelihood the log of the mean probability. copies: masks a forward.
    Raises HildaError above block size 10 (a thousand masks).
    """
    size, scored = rollout.block_size, rollout.scored
    if size > 10:
        raise HildaError(f"block size {size}: exact enumeration is for at most 10 positions a block (2^K masks)")
    rank = (scored.unflatten(-1, (-1, size)).cumsum(-1) - 1).flatten(-2)
    patterns = torch.arange(1, 2**size)
    table = []
    for part in patterns.split(copies):
        masked = scored[:, None] & (part[None, :, None] >> rank[:, None].clamp(min=0) & 1).bool()
        table.append(token_logp(model, _states(rollout, _noised(rollout, masked), masked))[0].cpu())
    table = torch.cat(table, 1).double()  # (B, 2^K - 1, L)
    n = _block_sum(scored, size)
    inside = patterns[None, :, None] < 2 ** n[:, None]  # (B, 2^K - 1, L // K); the others repeat a smaller mask
    m = torch.tensor([bin(p).count("1") for p in patterns.tolist()])[None, :, None]
    weight = ((m.double()).lgamma() + (n[:, None] - m + 1).clamp(min=1).double().lgamma() - (n[:, None] + 1).double().lgamma()).exp()
    elbo = (_block_sum(table, size) * weight * inside).sum((1, 2))
    return elbo, _random_order(table, rank, scored, n, size)


def _random_order(table: Tensor, rank: Tensor, scored: Tensor, n: Tensor, size: int) -> Tensor:
    """(B,) log-likelihood from table (B, 2^K - 1, L): g(mask) = mean over its tokens i of p(i | rest) g(mask without i)."""
    by_rank = torch.full((len(table), table.shape[1], n.shape[1], size), -torch.inf, dtype=table.dtype)
    row, position = scored.nonzero().T
    by_rank[row, :, position // size, rank[row, position]] = table[row, :, position]
    g = {0: torch.zeros(n.shape, dtype=table.dtype)}
    for mask in range(1, 2**size):
        bits = [i for i in range(size) if mask >> i & 1]
        options = torch.stack([by_rank[:, mask - 1, :, i] + g[mask ^ 1 << i] for i in bits])
        g[mask] = options.logsumexp(0) - math.log(len(bits))
    whole = torch.stack([g[2**i - 1] for i in range(size + 1)])  # (K + 1, B, L // K)
    return whole.gather(0, n[None])[0].sum(1)


@torch.no_grad()
def audit(model, rollout: Rollout, samples: tuple[int, ...] = (2, 4, 8), draws: int = 50, generator: torch.Generator | None = None,
          other=None) -> pd.DataFrame:
    """Estimators against enumeration: one row an estimator and number of noisy copies, averaged over the rows of the rollout.

    Columns in nats: elbo_error and likelihood_error, the mean estimate less the exact ELBO or log-likelihood; bias, less what the
    estimator stands for: the exact ELBO, for a trajectory all its rounds; noise, the standard error of that mean over the draws;
    std, of one estimate. copies: noisy copies a row in the one forward, the cost. other: a second policy; adds ratio_std, the std
    over draws of the log-ratio of the two under the same states, and ratio_std_fresh, with states drawn for each.
    """
    elbo, likelihood = exact(model, rollout)

    def values(policy, states: States) -> Tensor:
        return (token_logp(policy, states)[0].cpu() * states.weight).sum((1, 2)).double()

    def row(name: str, build, count: int, target: Tensor = elbo) -> dict:
        drawn = [build() for _ in range(count)]
        found = torch.stack([values(model, states) for states in drawn])  # (draws, B)
        std = found.std(0, correction=int(count > 1))
        result = {"estimator": name, "copies": drawn[0].noisy.shape[1], "elbo_error": (found.mean(0) - elbo).mean().item(),
                  "likelihood_error": (found.mean(0) - likelihood).mean().item(), "bias": (found.mean(0) - target).mean().item(),
                  "std": std.mean().item(), "noise": (std.square().mean() / count / len(elbo)).sqrt().item()}
        if other is not None:
            second = torch.stack([values(other, states) for states in drawn])
            result["ratio_std"] = (found - second).std(0, correction=int(count > 1)).mean().item()
            result["ratio_std_fresh"] = (std.square() + second.var(0, correction=int(count > 1))).sqrt().mean().item()
        return result

    rows = [row("mean field", lambda: mean_field(rollout), 1)]
    for scheme in SCHEMES:
        rows += [row(scheme, lambda: elbo_states(rollout, count, scheme, generator), draws) for count in samples]
    for edits in (False, True):
        whole = values(model, trajectory(rollout, edits=edits))
        rows += [row("trajectory" + " with edits" * edits, lambda: trajectory(rollout, edits=edits, samples=count, generator=generator), draws, whole)
                 for count in samples]
    return pd.DataFrame(rows)
