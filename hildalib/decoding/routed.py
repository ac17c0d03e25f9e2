"""S2D2 as published: the block loop in which the model at block size 1 judges drafted tokens, where a router expects that to pay.

Not lossless, unlike `speculation`: a draft sees what stands right of its tokens, edits and what is written beside the judged span are not judged, and
even at temperature 0 acceptance is a draw. Entry points: `routed_decode`, `RoutedSettings`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import rules
from hildalib.decoding.decoded import Decoded, completion, left_padded
from hildalib.decoding.edit import BlockLoop
from hildalib.decoding.settings import EditSettings


@dataclass(frozen=True)
class RoutedSettings:
    """When the first run of masks of a block is judged (S2D2, arXiv 2603.25702; read in its code).

    route "static": where E - cost >= bar, E = sum_k prod_{i<=k} exp(-H_i / ln V) over the run, the tokens that the entropies H_i of its drafts let
    hope for; "dynamic": cost counts once for each mask above tau_mask, which the usual rule would write for nothing; "span": runs of at least `bar` masks;
    "always". off: below it judging stops until `bar` is reached again (hysteresis; the code's 1 and -5, dynamic), None: the same bar for both.
    quota: tokens below which a forward also writes by the usual rule; the code takes it from its schedule of steps, of which the sheet we worked from has no
    general value. greedy (ours): a draft is accepted where the judge would have chosen it, and what it would have chosen takes the first wrong one's place.
    Left out: the code's bandit over spans, and its margins of 0 or 1 in place of entropies.
    """

    route: Literal["always", "static", "dynamic", "span"] = "dynamic"
    cost: float = 1.0
    bar: float = 0.0
    off: float | None = None
    quota: int = 1
    greedy: bool = False

    def __post_init__(self):
        if self.route not in ("always", "static", "dynamic", "span"):
            raise HildaError(f"route = {self.route!r} must be always, static, dynamic or span")
        if self.off is not None and self.off > self.bar:
            raise HildaError(f"off = {self.off} is above bar = {self.bar}: judging would stop where it starts; lower off")
        if self.quota < 0:
            raise HildaError(f"quota = {self.quota} must be at least 0")


def first_run(masked: Tensor) -> Tensor:
    """(b, K) bool: the first unbroken run of masked (b, K)."""
    begun = masked.long().cummax(-1).values.bool()
    return masked & ((begun & ~masked).long().cumsum(-1) == 0)


def expected(entropy: Tensor, run: Tensor, vocabulary: int) -> Tensor:
    """(b,): E of `RoutedSettings`, from entropies (b, K) in nats of the drafts in run (b, K) bool, one stretch."""
    survival = torch.where(run, -entropy / torch.tensor(float(vocabulary)).log(), 0.0).cumsum(-1).exp()
    return (survival * run).sum(-1)


class _Routed(BlockLoop):
    """The block loop, whose commit rule may ask the judge; `judging` is whom the rule is called for."""

    def __init__(self, model, prompt_ids: Tensor, lengths: Tensor, settings: EditSettings, routing: RoutedSettings, generator):
        super().__init__(model, prompt_ids, lengths, settings, generator, trace=False)
        self.routing, self.usual, self.commit = routing, self.commit, self._judged
        self.reader.cache.slots += (1 if self.shift else 2) * self.size + self.size  # room behind an open block for what the judge reads

    def _write(self, live: Tensor, logits: Tensor, frozen: Tensor, hidden_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.judging = live
        return super()._write(live, logits, frozen, hidden_logits)

    def _judged(self, block: rules.Block) -> Tensor:
        """The commit rule: what the judge accepts, its own token where it does not; the usual rule where it was not asked or wrote too little."""
        run = first_run(block.masked)
        asked = self._route(block, run) & run.any(-1)
        written = torch.zeros_like(run)
        if asked.any():
            written[asked] = self._walk(block, run, asked)
        short = (~asked | (written.sum(-1) < self.routing.quota))[:, None]
        rest = block.masked & ~written
        masked, block.masked = block.masked, rest
        usual = rules.at_least(self.usual(block), block.confidence, rest, 1)
        block.masked = masked
        return written | usual & short

    def _route(self, block: rules.Block, run: Tensor) -> Tensor:
        """(b,) True = these runs are judged."""
        choice, size = self.routing, run.sum(-1)
        if choice.route == "always":
            return torch.ones_like(size, dtype=torch.bool)
        score = size.float()
        if choice.route != "span":
            chances = block.probabilities()
            usual = (block.masked & (block.confidence > self.settings.tau_mask)).sum(-1) if choice.route == "dynamic" else 1
            score = expected(torch.special.entr(chances).sum(-1), run, chances.shape[-1]) - choice.cost * usual
        if choice.off is None:
            return score >= choice.bar
        on = block.recall("routed", 1)[:, 0] > 0
        on = torch.where(on, score >= choice.off, score >= choice.bar)
        block.memory["routed"] = on[:, None].float()
        return on

    def _judge(self, block: rules.Block, run: Tensor, asked: Tensor) -> Tensor:
        """(n, K, V) probabilities at block size 1 of the blocks `asked` (b,) bool, edits of this forward and drafts of the run filled in."""
        edited = rules.edit(block.tokens, block.confidence, block.current, block.visible, self.settings.tau_edit)
        ids = torch.where(block.hidden | edited, block.tokens, block.current)[asked]
        rows = torch.searchsorted(self.live, self.judging[asked])
        payer, start = self.payer[self.judging[asked]], self.start[self.judging[asked]]
        size, reader = self.size, self.reader
        positions = reader.positions(start, size)
        every = torch.ones(size, size, dtype=torch.bool, device=ids.device)
        clean = every[:1]
        with reader.only(rows):
            if self.shift:
                logits = reader.align(reader.aside(payer, start, ids, positions, every.tril(), clean=clean), reader.carry)
            else:  # a row of masks behind the block, each seeing the tokens before it and itself
                seen = torch.cat([torch.cat([every.tril(), ~every], 1), torch.cat([every.tril(-1), torch.eye(size, dtype=torch.bool, device=ids.device)], 1)])
                logits = reader.aside(payer, start, torch.cat([ids, torch.full_like(ids, self.mask_id)], 1), positions.repeat(1, 2), seen,
                                      wanted=size + torch.arange(size, device=ids.device), clean=torch.cat([clean, ~clean], 1))
        return logits.float().softmax(-1)

    def _walk(self, block: rules.Block, run: Tensor, asked: Tensor) -> Tensor:
        """(n, K) bool: accepted from the left of each run up to the first rejected one, which is written too, with what takes its place."""
        judge, drafts, chances = self._judge(block, run, asked), block.tokens[asked], block.probabilities()[asked]
        run, size = run[asked], run.shape[1]
        if self.routing.greedy:
            accepted, instead = judge.argmax(-1) == drafts, judge.argmax(-1)
        else:
            draw = torch.rand(len(run), size + 1, generator=self.generator, dtype=torch.float64).to(judge.device)
            ratio = (judge.gather(-1, drafts[..., None]) / chances.gather(-1, drafts[..., None]).clamp(min=1e-12))[..., 0]  # 1e-12: an underflow accepts
            left = (judge - chances).clamp(min=0).double()
            left = torch.where(left.sum(-1, keepdim=True) > 0, left, judge.double()).cumsum(-1)
            accepted = draw[:, :size] < ratio
            instead = (left > draw[:, size:, None] * left[..., -1:]).long().argmax(-1)
        before = (~accepted & run).long().cumsum(-1)
        kept, replaced = run & (before == 0), run & ~accepted & (before == 1)
        block.tokens[asked] = torch.where(replaced, instead, drafts)
        block.confidence[asked] = torch.where(kept | replaced, judge.gather(-1, block.tokens[asked][..., None])[..., 0], block.confidence[asked])
        return kept | replaced


@torch.inference_mode()
def routed_decode(model, prompt_ids: Tensor, settings: EditSettings, routing: RoutedSettings = RoutedSettings(), *, attention_mask: Tensor | None = None,
                  generator: torch.Generator | None = None) -> Decoded:
    """`edit_decode` with S2D2's judge; arguments and result as there, `generator` draws what is accepted.

    Judging costs a forward over K positions in a shifted model (2 K otherwise) whose keys are dropped; its edits, if tau_edit < 1, are
    written as they are. The judge reads the cached context: in a model without a causal one that is not quite its block-size-1 mode.
    """
    lengths = left_padded(prompt_ids, attention_mask)
    state = _Routed(model, prompt_ids, lengths, settings, routing, generator)
    while len(state.live):
        state.step()
    return Decoded(completion(state.canvas, lengths, settings.max_new_tokens, state.eos), state.reader.forwards, state.reader.fed)
