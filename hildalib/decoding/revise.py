"""Who is revised in a forward: revision rules, each a frozen dataclass of its constants, called with a `rules.Block` after the commit.

A rule returns (b, K) bool, True = this token is revised now: it takes the newly chosen token (`Edit`) or goes back to [MASK] (all
others). Entry points: RULES (name -> rule), the rules. How a decode that takes tokens back still ends: `EditSettings`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding.rules import Block, edit, leading


class Revision:
    """remasks: what is revised goes back to [MASK]. confirms: it may revise a block that had no mask when it was read, so that a
    full block is read once more. shadow: it needs `Block.shadow`. reads: it looks at logits of visible tokens, which are not worked out
    otherwise."""

    remasks = True
    confirms = False
    shadow = False
    reads = True


@dataclass(frozen=True)
class Edit(Revision):
    """T2T of LLaDA2.1 (arXiv 2602.08676, Eq. 2): visible tokens are replaced where the chosen one differs with more than tau. 1: never."""

    tau: float = 0.5
    remasks = False

    @property
    def confirms(self) -> bool:
        return self.tau < 1

    reads = confirms

    def __call__(self, block: Block) -> Tensor:
        return edit(block.tokens, block.confidence, block.current, block.visible, self.tau)


@dataclass(frozen=True)
class TokenToMask(Revision):
    """T2M (arXiv 2604.18738): visible tokens whose own probability is now below tau, at most `share` of the visible ones, the least
    probable first. How the share is rounded (here down, but at least one) is unverified."""

    tau: float = 0.3
    share: float = 0.25
    confirms = True

    def __call__(self, block: Block) -> Tensor:
        support = block.support(block.logits)
        most = (self.share * block.visible.sum(-1, keepdim=True).double()).long().clamp(min=1)
        return leading(-support, block.visible & ~block.spent & (support < self.tau), most)


def _once_full(block: Block, name: str, rounds: int) -> Tensor:
    """(b, 1) True = this forward filled the block, as it has fewer than `rounds` times before."""
    passed = block.recall(name, 1)
    now = block.full() & (passed < rounds)
    block.memory[name] = passed + now
    return now


@dataclass(frozen=True)
class Snapshot(Revision):
    """Snapshot-confidence re-masking of Diffusion-in-Diffusion (arXiv 2601.13599): when a draft is complete, the `ratio` of it that was
    written with the least confidence goes back to [MASK], `rounds` times; no forward is spent on it. Secondary sources: ratios
    of 0.25 to 0.5 work best. The paper drafts with blocks of 4 and refines all at once; here both happen inside one block
    (`EditSettings.sub_block` drafts in small steps), since a model rarely bears a larger block than it was trained with."""

    ratio: float = 0.25
    rounds: int = 1

    def __call__(self, block: Block) -> Tensor:
        among = block.revisable()
        count = (self.ratio * (block.visible | block.filled).sum(-1, keepdim=True).double()).long()
        return leading(-block.snapshot, among, count) & _once_full(block, "snapshot_rounds", self.rounds)


@dataclass(frozen=True)
class Ratio(Revision):
    """A re-mask policy by ratio: when a block is full, in every `window` positions (one each `stride`, the last flush right)
    the `target` share written with the least confidence goes back to [MASK], as long as that is below the `cap` quantile of
    the block's confidences; the `minimum` share goes in any case. Window and stride are in tokens of one block: a block of up to 64 has
    one window. How target, minimum and cap act together is our reading, unverified."""

    target: float = 0.15
    minimum: float = 0.05
    window: int = 64
    stride: int = 32
    cap: float = 0.95
    rounds: int = 1

    def __call__(self, block: Block) -> Tensor:
        written, size = block.visible | block.filled, block.current.shape[1]
        tau = block.snapshot.masked_fill(~written, torch.nan).nanquantile(self.cap, dim=-1, keepdim=True)
        column, chosen = torch.arange(size, device=written.device), torch.zeros_like(written)
        last = max(size - self.window, 0)
        for start in sorted({*range(0, last + 1, self.stride), last}):
            inside = written & (column >= start) & (column < start + self.window)
            count = inside.sum(-1, keepdim=True).double()
            wanted = torch.minimum((self.target * count).floor(), (inside & (block.snapshot < tau)).sum(-1, keepdim=True))
            chosen |= leading(-block.snapshot, inside & ~block.spent, torch.maximum(wanted, (self.minimum * count).ceil()))
        return chosen & _once_full(block, "ratio_rounds", self.rounds)


@dataclass(frozen=True)
class Wino(Revision):
    """The verifier of WINO (arXiv 2507.18578; read in its code): visible tokens that a second row of masks, which sees everything
    but the token in question, gives less than tau. Only in forwards that wrote more than one token, and fewer than the forward
    before wrote. The shadow rows see each other, as in the code; isolated: each sees only itself, as if just that token
    were masked. For shifted models the rows are our derivation (`decoding.shadow`)."""

    tau: float = 0.9
    isolated: bool = False
    shadow = True

    def __call__(self, block: Block) -> Tensor:
        before = block.recall("wino_wrote", 1)
        wrote = block.filled.sum(-1, keepdim=True)
        block.memory["wino_wrote"] = wrote.float()
        if block.shadow is None:  # nothing is visible yet
            return torch.zeros_like(block.filled)
        support = block.support(block.shadow)
        return leading(-support, block.visible & ~block.spent & (support < self.tau), before - 1) & (wrote > 1)


@dataclass(frozen=True)
class Saber(Revision):
    """Backtracking of Saber (arXiv 2510.18165; read in its code): of the written tokens those whose position lost most confidence since
    the forward before, max(least // 2, ceil(k / 8)) after k were written and fewer than k; none once the block is full. As in
    the code, confidence is that of the favourite, not of the placed token; the paper's count is max(1, floor(k / mu))."""

    least: int = 2

    def __call__(self, block: Block) -> Tensor:
        gain = block.confidence - block.recall("saber_before", block.confidence.shape[1])
        block.memory["saber_before"] = block.confidence
        wrote = block.filled.sum(-1, keepdim=True)
        count = torch.minimum(((wrote + 7) // 8).clamp(min=self.least // 2), wrote - 1)  # 8: the code's
        return leading(-gain, block.revisable(), count) & ~block.full()


@dataclass(frozen=True)
class ReMDM(Revision):
    """ReMDM (arXiv 2503.00307, section 4; read in its code): every visible token goes back with probability sigma, at most
    sigma_max = (1 - alpha_s) / alpha_t. cap: min(eta, sigma_max), eta 0.02 to 0.04; rescale: eta sigma_max; conf: sigma_max
    times the softmax of minus the confidences they were written with. The paper's alpha follows a schedule, its masks are
    revealed more often to make up for it, and its loop variant holds alpha; here the commit rule decides, so alpha is the
    share of the block that is visible before (t) and after (s) it. At temperature 0 only who goes back is random."""

    eta: float = 0.04
    strategy: Literal["cap", "rescale", "conf"] = "cap"

    def __post_init__(self):
        if self.strategy not in ("cap", "rescale", "conf"):
            raise HildaError(f"strategy = {self.strategy!r} must be cap, rescale or conf")

    def __call__(self, block: Block) -> Tensor:
        visible, size = block.visible.sum(-1, keepdim=True), (block.visible | block.hidden).sum(-1, keepdim=True)
        most = ((size - visible - block.filled.sum(-1, keepdim=True)) / visible.clamp(min=1)).clamp(max=1)
        if self.strategy == "conf":
            sigma = most * (-block.snapshot).masked_fill(~block.visible, -torch.inf).softmax(-1)
        else:
            sigma = most.clamp(max=self.eta) if self.strategy == "cap" else self.eta * most
        draw = torch.rand(block.visible.shape, generator=block.generator).to(sigma.device)
        return block.visible & (draw < sigma)


RULES = {"edit": Edit, "t2m": TokenToMask, "snapshot": Snapshot, "ratio": Ratio, "wino": Wino, "saber": Saber, "remdm": ReMDM}
