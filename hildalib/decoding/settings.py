"""The choices of a decode and the presets of the LLaDA2.1 model cards.

Entry points: `EditSettings`, `PRESETS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import commit as commits, revise as revisions
from hildalib.decoding.compression import Compression
from hildalib.decoding.rules import Block
from hildalib.residual import Residual, Smoothing


@dataclass(frozen=True)
class EditSettings:
    """Choices of a decode. tau_mask, tau_edit: thresholds (probabilities); tau_mask > 1 writes one token a forward,
    tau_edit >= 1 never edits, tau_edit = 0 edits on every change of mind. max_post_steps: forwards a block may spend after
    its last mask is gone. block_size None: the model's own. minimum: masks filled when none passes tau_mask. look_back:
    closed blocks that are re-read, with the block that follows in view, and edited once more at tau_edit (multi-block editing;
    the published description has no algorithm, this form is ours). stop_at_eos: nothing after the first EOS is decoded.

    commit: who is written, a rule of `decoding.commit`; None is `Threshold(tau_mask, minimum)`. revise: who is revised, a rule
    of `decoding.revise`; None is `Edit(tau_edit)`. Any two go together. sub_block: masks are written in the leftmost stretch of
    that many positions that still has some (Fast-dLLM v2, arXiv 2509.26328, section 3.3: 8 in a block of 32), whatever the
    rule; the whole block stays in view. max_remasks: how often one position may go back to [MASK].

    residual: what a mask carries from one forward of its block to the next (`hildalib.residual`); None is the plain [MASK]. The first
    forward of a block has none (a cold start); a position's is gone once it is written, and comes anew if it goes back to [MASK].

    kv: how committed keys and values are kept (`decoding.compression`); None: as they are. Not with look_back, which writes them again.

    Every decode ends: each forward of a block with masks writes at least one, a position is a mask at most 1 + max_remasks
    times, and a block may be without masks after at most max_post_steps + 1 forwards. So a block of K costs at most
    (1 + max_remasks) * K + max_post_steps + 1 forwards (+ 2 with look_back), its commit included."""

    tau_mask: float = 0.7
    tau_edit: float = 0.5
    block_size: int | None = None
    max_post_steps: int = 16  # LLaDA2.1 model cards
    max_new_tokens: int = 128
    temperature: float = 0.0
    minimum: int = 1
    look_back: int = 0
    stop_at_eos: bool = True
    commit: Callable[[Block], Tensor] | None = None
    revise: revisions.Revision | None = None
    sub_block: int | None = None
    max_remasks: int = 1  # Token-to-Mask (arXiv 2604.18738) lets a position go back once
    residual: Residual | Smoothing | None = None
    kv: Compression | None = None

    def __post_init__(self):
        for name in ("tau_mask", "tau_edit", "temperature"):
            if not getattr(self, name) >= 0:
                raise HildaError(f"{name} = {getattr(self, name)} must be 0 or more (thresholds are probabilities)")
        for name, low in (("max_new_tokens", 1), ("minimum", 1), ("max_post_steps", 0), ("look_back", 0), ("max_remasks", 0)):
            if getattr(self, name) < low:
                raise HildaError(f"{name} = {getattr(self, name)} must be at least {low}")
        if self.kv is not None and self.look_back:
            raise HildaError("look_back writes committed blocks again, which `kv` has compressed; use one of the two")
        for name, otherwise in (("block_size", "the model's own"), ("sub_block", "no sub-blocks")):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise HildaError(f"{name} = {getattr(self, name)} must be at least 1, or None for {otherwise}")
        for name, room, fits in (("commit", commits, callable), ("revise", revisions, lambda rule: isinstance(rule, revisions.Revision))):
            if getattr(self, name) is not None and not fits(getattr(self, name)):
                raise HildaError(f"{name} = {getattr(self, name)!r} must be a rule, as decoding.{name}.RULES[name](); names: {', '.join(room.RULES)}")

    @property
    def commit_rule(self):
        """The rule that says who is written."""
        return self.commit or commits.Threshold(self.tau_mask, self.minimum)

    @property
    def revision_rule(self) -> revisions.Revision:
        """The rule that says who is revised."""
        return self.revise or revisions.Edit(self.tau_edit)


PRESETS = {  # LLaDA2.1-mini and -flash model cards
    "S": EditSettings(tau_mask=0.5, tau_edit=0.0),
    "Q": EditSettings(tau_mask=0.7, tau_edit=0.5),
}
