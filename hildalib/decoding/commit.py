"""Who is written in a forward: commit rules, each a frozen dataclass of its constants, called with a `rules.Block`.

A rule returns (b, K) bool, True = this mask is written now; where it chooses none, `rules.advance` writes the most confident one.
Defaults are the published ones. Entry points: RULES (name -> rule), the rules, `unigram`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hildalib.decoding.rules import Block, at_least, fill, leading


@dataclass(frozen=True)
class Threshold:
    """Masks more confident than tau, at least `minimum` of them: Fast-dLLM (arXiv 2505.22618, Algorithm 1; its 0.9, where the test
    is >=) and LLaDA2.1 (Eq. 1, strict)."""

    tau: float = 0.9
    minimum: int = 1

    def __call__(self, block: Block) -> Tensor:
        if self.minimum == 1:  # `rules.advance` sees to one
            return block.masked & (block.confidence > self.tau)
        return fill(block.confidence, block.masked, self.tau, self.minimum)


@dataclass(frozen=True)
class Quota:
    """The `tokens` most confident masks, no more and no fewer: low-confidence re-masking of LLaDA (arXiv 2502.09992, appendix A;
    K / tokens forwards a block)."""

    tokens: int = 1

    def __call__(self, block: Block) -> Tensor:
        return leading(block.confidence, block.masked, self.tokens)


@dataclass(frozen=True)
class Factor:
    """The largest n with (n + 1) (1 - c_n) < factor, c_n the n-th confidence from above (Fast-dLLM, arXiv 2505.22618, section 3.3 and
    theorem 1: with factor <= 1 greedy parallel = greedy sequential). The circulating code also accepts the last candidate
    when that one is the first to fail; here it is not."""

    factor: float = 1.0

    def __call__(self, block: Block) -> Tensor:
        ranked = block.confidence.double().masked_fill(~block.masked, -1).sort(-1, descending=True).values
        n = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
        passed = ((n + 1) * (1 - ranked) < self.factor) & (ranked >= 0)  # the left side grows with n, so these are the first ones
        return leading(block.confidence, block.masked, passed.sum(-1, keepdim=True))


@dataclass(frozen=True)
class EntropyBound:
    """EB-Sampler (arXiv 2505.24857): masks in order of rising entropy, the longest run whose sum of entropies less the largest
    of them is at most gamma nats; never none. gamma 0.1 is the default of the code we read, 0.01 that of its comparisons."""

    gamma: float = 0.1

    def __call__(self, block: Block) -> Tensor:
        entropy = torch.special.entr(block.probabilities().double()).sum(-1)
        ranked = entropy.masked_fill(~block.masked, torch.inf).sort(-1).values
        before = ranked.cumsum(-1).roll(1, -1)
        before[..., 0] = 0  # the largest of the first k is the k-th: what counts is the sum before it
        count = ((before <= self.gamma) & ranked.isfinite()).sum(-1, keepdim=True)
        return leading(-entropy, block.masked, count)


@dataclass(frozen=True)
class Klass:
    """KLASS (arXiv 2511.05664): masks more confident than tau whose distribution moved by KL(now | before) < epsilon in each of
    the last `history` forwards; otherwise the `minimum` most confident. Constants are those for LLaDA on GSM8K. The first
    forward has no distribution before it and counts as moved, so nothing passes before the third. Memory starts anew with each
    block (the authors' code carries it on, for it reads later blocks too)."""

    tau: float = 0.6
    epsilon: float = 0.015
    history: int = 2
    minimum: int = 1

    def __call__(self, block: Block) -> Tensor:
        now, calm = block.probabilities(), block.recall("klass_calm", block.masked.shape[1])
        before = block.recall("klass_before", *now.shape[1:]).clamp(min=1e-12)  # the code's guard: an underflow is no movement
        moved = (torch.xlogy(now, now) - torch.xlogy(now, before)).sum(-1)
        calm = torch.where(moved < self.epsilon, calm + 1, 0)
        block.memory |= {"klass_before": now, "klass_calm": calm}
        ready = block.masked & (block.confidence > self.tau) & (calm >= self.history)
        return torch.where(ready.any(-1, keepdim=True), ready, leading(block.confidence, block.masked, self.minimum))


@dataclass(frozen=True)
class Hierarchy:
    """Hierarchy decoding (dInfer, arXiv 2510.08666; read in its code): of every unbroken run of masks the most confident one if
    above `low`, so that neighbours are not written together, and every mask above tau. tau has no published default."""

    tau: float = 0.9
    low: float = 0.4

    def __call__(self, block: Block) -> Tensor:
        confidence, masked = block.confidence, block.masked
        run = (~masked).cumsum(-1)
        peak = confidence.new_full((len(run), run.shape[1] + 1), -1).scatter_reduce(-1, run, confidence.masked_fill(~masked, -1), "amax").gather(-1, run)
        return masked & ((confidence > self.tau) | ((confidence == peak) & (confidence > self.low)))


@dataclass(frozen=True)
class Credit:
    """CreditDecoding (arXiv 2510.06133; constants read in dInfer's code): past favourites count. Per block and token
    C <- beta C, plus confidence^gamma for the favourite of each mask; masks take tokens and confidences from
    logits + alpha ln(1 + C), and those above tau are written. tau is Fast-dLLM's."""

    tau: float = 0.9
    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2

    def __call__(self, block: Block) -> Tensor:
        top, favourite = block.probabilities().max(-1)
        credit = self.beta * block.recall("credit", *block.logits.shape[1:])
        credit = credit.scatter_add(-1, favourite[..., None], (top ** self.gamma * block.hidden)[..., None])
        block.memory["credit"] = credit
        fused = block.logits.float() + self.alpha * credit.log1p()
        block.choose(torch.where(block.hidden[..., None], fused, block.logits.float()))
        return fill(block.confidence, block.masked, self.tau)


@dataclass(frozen=True)
class PositionCalibrated:
    """PC-Sampler (arXiv 2508.13021; read in its code): the `tokens` masks with the highest exp(-decay * i) * min(-c ln f, clip), i the
    position in its block, c the confidence and f the frequency of the chosen token: left first, common words last. decay: 0.25, 0 for
    Sudoku, 0.5 for Countdown. frequencies: (V,) of `unigram`; None: all tokens alike."""

    frequencies: Tensor | None = field(default=None, compare=False, repr=False)
    decay: float = 0.25
    clip: float = 10.0
    tokens: int = 1

    def __call__(self, block: Block) -> Tensor:
        vocabulary = block.logits.shape[-1]
        table = torch.full((vocabulary,), 1 / vocabulary) if self.frequencies is None else self.frequencies
        rarity = -block.confidence * table.to(block.logits.device)[block.tokens].log()
        position = torch.arange(rarity.shape[1], device=rarity.device)
        return leading((-self.decay * position).exp() * rarity.clamp(max=self.clip), block.masked, self.tokens)


def unigram(ids: Tensor, vocabulary: int) -> Tensor:
    """(V,) relative frequency of each token in `ids` (any shape, long) of a corpus; one that is missing counts as seen once."""
    return torch.bincount(ids.flatten(), minlength=vocabulary).clamp(min=1) / ids.numel()


@dataclass(frozen=True)
class Saber:
    """The adaptive threshold of Saber (arXiv 2510.18165; read in its code): masks more confident than the mean confidence with which
    the row's tokens were written so far (1 before the first), at least `minimum`. Its other half is `revise.Saber`."""

    minimum: int = 2

    def __call__(self, block: Block) -> Tensor:
        tau = block.history.nanmean(-1, keepdim=True).nan_to_num(1.0)
        return at_least(block.masked & (block.confidence > tau), block.confidence, block.masked, self.minimum)


@dataclass(frozen=True)
class Wino:
    """The generous draft of WINO (arXiv 2507.18578; read in its code): masks above tau (0.5 to 0.8 by task), at most `share` of the
    masks, that cap kept between 5 and 20. Its verifier is `revise.Wino`."""

    tau: float = 0.6
    share: float = 0.7

    def __call__(self, block: Block) -> Tensor:
        most = (self.share * block.hidden.sum(-1, keepdim=True).double()).long().clamp(5, 20)  # the code's bounds
        return block.masked & (block.confidence > self.tau) & leading(block.confidence, block.masked, most)


RULES = {"threshold": Threshold, "quota": Quota, "factor": Factor, "entropy": EntropyBound, "klass": Klass, "hierarchy": Hierarchy, "credit": Credit,
         "pc": PositionCalibrated, "saber": Saber, "wino": Wino}
