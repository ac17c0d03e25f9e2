"""One step of a block: what a forward says (`Block`), who is written, who is revised, and what the canvas is then (`advance`).

The rules themselves are small frozen dataclasses in `commit` and `revise`, each called with a `Block`; every mask is (b, K) bool,
True = is written (revised) now. Entry points: `choose`, `fill`, `edit`, `leading`, `at_least`, `Block`, `advance`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(tokens, confidence), each (B, K), from aligned logits (B, K, V) whose [MASK] entry is already -inf.

    Temperature 0: the argmax. Otherwise a Gumbel-max sample in float64 (low precision distorts samples). The confidence
    is the plain softmax probability of the chosen token in float32, never that of a tempered or filtered distribution.
    """
    probabilities = logits.float().softmax(-1)
    if temperature == 0:
        confidence, tokens = probabilities.max(-1)
        return tokens, confidence
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    tokens = (logits.double() / temperature - (-uniform.log()).log()).argmax(-1)
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]


def leading(score: Tensor, among: Tensor, count: Tensor | int) -> Tensor:
    """The `count` (an int or (b, 1) long; all of them where fewer) highest-scoring positions `among` (b, K) bool; ties from
    the left. score (b, K), finite there."""
    score = score.masked_fill(~among, -torch.inf)
    if isinstance(count, int) and count == 1:
        return among & torch.zeros_like(among).scatter_(-1, score.argmax(-1, keepdim=True), True)  # the first of several
    return among & (score.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count)


def at_least(chosen: Tensor, confidence: Tensor, masked: Tensor, minimum: int) -> Tensor:
    """`chosen`, or where it has fewer than `minimum` positions the `minimum` most confident masked ones instead: progress."""
    if minimum == 1:
        short = masked.any(-1, keepdim=True) & ~chosen.any(-1, keepdim=True)
    else:
        short = chosen.sum(-1, keepdim=True) < masked.sum(-1, keepdim=True).clamp(max=minimum)
    return torch.where(short, leading(confidence, masked, minimum), chosen) if bool(short.any()) else chosen


def fill(confidence: Tensor, masked: Tensor, tau_mask: float, minimum: int = 1) -> Tensor:
    """Gamma of LLaDA2.1 Eq. 1: masked positions more confident than tau_mask (strictly); where fewer than `minimum` pass,
    the `minimum` most confident masked ones instead, so that every forward makes progress."""
    return at_least(masked & (confidence > tau_mask), confidence, masked, minimum)


def edit(tokens: Tensor, confidence: Tensor, current: Tensor, editable: Tensor, tau_edit: float) -> Tensor:
    """Delta of LLaDA2.1 Eq. 2: editable positions whose chosen token differs from the current one and is more confident
    than tau_edit (strictly). tau_edit = 0 edits on every change of mind; tau_edit >= 1 never edits."""
    return editable & (tokens != current) & (confidence > tau_edit)


@dataclass
class Block:
    """What a rule sees: b open blocks of K positions after one forward. Prompt positions are in none of the masks.

    logits (b, K, V): aligned, [MASK] barred. current (b, K) long: the canvas that was read. hidden: [MASK] stands there.
    masked: the hidden ones that may be written now (one sub-block of them). visible: a generated token stands there. spent: has
    been back at [MASK] as often as it may. snapshot: confidence with which each position was last written, nan where never;
    history (b, T): the same for the whole row, prompt included. shadow (b, K, V) or None: logits of each position with its own
    token hidden (`revise.Wino`). tokens, confidence (b, K): what `choose` makes of the logits. filled: what the commit rule
    chose, for the revision rule. memory: what a rule noted of these blocks, (b, ...) each; gone when a block begins.
    """

    logits: Tensor
    current: Tensor
    hidden: Tensor
    masked: Tensor
    visible: Tensor
    spent: Tensor
    history: Tensor
    snapshot: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)
    shadow: Tensor | None = None
    temperature: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self):
        self.choose(self.logits)

    def choose(self, logits: Tensor) -> None:
        """Takes tokens and confidences from `logits` (b, K, V)."""
        self.tokens, self.confidence = choose(logits, self.temperature, self.generator)

    def recall(self, name: str, *shape: int) -> Tensor:
        """memory[name] (b, *shape); zeros in the first forward of a block."""
        return self.memory.get(name, self.logits.new_zeros(len(self.logits), *shape, dtype=torch.float32))

    def probabilities(self) -> Tensor:
        """(b, K, V) float32 softmax of the logits."""
        return self.logits.float().softmax(-1)

    def support(self, logits: Tensor) -> Tensor:
        """(b, K) probability of the current token under `logits` (b, K, V); 0 at [MASK]."""
        return logits.float().softmax(-1).gather(-1, self.current[..., None])[..., 0]

    def revisable(self) -> Tensor:
        """Generated tokens, those of this forward included, that may still go back to [MASK]."""
        return (self.visible | self.filled) & ~self.spent

    def full(self) -> Tensor:
        """(b, 1) True = this forward wrote the last mask of the block."""
        return ((self.hidden & ~self.filled).sum(-1) == 0)[:, None] & self.filled.any(-1, keepdim=True)


def leftmost(hidden: Tensor, size: int | None) -> Tensor:
    """The part of `hidden` (b, K) in the leftmost sub-block of `size` positions that has any; all of it without sub-blocks."""
    if size is None:
        return hidden
    column = torch.arange(hidden.shape[-1], device=hidden.device)
    first = hidden.int().argmax(-1, keepdim=True)
    return hidden & (column // size == first // size)


def advance(block: Block, commit, revise, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, filled, revised), each (b, K): the canvas after the commit rule and then the revision rule, both from one forward.

    Where masks may be written at least one is. What is revised takes its chosen token, or goes back to [MASK] if the rule
    re-masks, each position at most as often as `spent` lets it.
    """
    block.filled = at_least(commit(block), block.confidence, block.masked, 1)
    block.snapshot = torch.where(block.filled, block.confidence, block.snapshot)
    revised = revise(block) & (block.revisable() if revise.remasks else block.visible)
    if not revise.remasks:
        block.snapshot = torch.where(revised, block.confidence, block.snapshot)
    ids = torch.where(block.filled, block.tokens, block.current)
    return torch.where(revised, mask_id if revise.remasks else block.tokens, ids), block.filled, revised
