"""How good is a block that stands? Log-probabilities of its tokens, each scorer from another reading of the same model.

In a model whose blocks see nothing to their right the published score of Order-Token Search is no judge of a block (`remasked`); the
others are ours. Every scorer is called with `Candidates` and spends at most one forward. Entry points: SCORERS (name -> scorer), `Candidates`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import shadow
from hildalib.decoding.reader import Reader


@dataclass(frozen=True)
class Candidates:
    """What a scorer sees: b blocks of K positions, all before them committed. payer (b,): whose account a forward goes to. start (b,):
    first positions. ids (b, K) long: no mask among them. before (b, V) or None: logits of the position in front. confidence (b, K): of each token
    when it was written. counted (b, K) bool, True = generated, wanted and not behind an EOS. follows (b,) bool: there is a next block."""

    reader: Reader
    payer: Tensor
    start: Tensor
    ids: Tensor
    before: Tensor | None
    confidence: Tensor
    counted: Tensor
    follows: Tensor

    @property
    def positions(self) -> Tensor:
        """(b, K) of the block."""
        return self.start[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)

    def hide(self, hidden: Tensor) -> Tensor:
        """(b, K): the block with [MASK] at hidden (K,) bool; prompt tokens stay."""
        return torch.where(hidden & self.counted, self.reader.mask_id, self.ids)

    def read(self, ids: Tensor, positions: Tensor, seen: Tensor, **options) -> Tensor:
        """One forward: `Reader.aside` behind these blocks."""
        return self.reader.aside(self.payer, self.start, ids, positions, seen, **options)

    def support(self, logits: Tensor) -> Tensor:
        """(b, K) log-probability of the block's tokens under aligned logits (b, K, V)."""
        return logits.float().log_softmax(-1).gather(-1, self.ids[..., None])[..., 0]


def path(block: Candidates) -> Tensor:
    """The path itself: what each token was worth to the forward that wrote it. No forward. Tokens written together did not see
    each other, which is exactly what this score does not notice."""
    return block.confidence.clamp(min=torch.finfo(torch.float32).tiny).log()


def remasked(block: Candidates) -> Tensor:
    """The published score: log p of all tokens given the whole block masked again (Order-Token Search, arXiv 2601.20339, Eq. 2 as others quote
    it). There the text behind the block, the model's own guess, is in view; here nothing is, so this is the reading the block began with,
    and the un-noised child wins whatever stands in it."""
    size = block.ids.shape[1]
    every = torch.ones(size, size, dtype=torch.bool, device=block.ids.device)
    return block.support(block.reader.align(block.read(block.hide(every[0]), block.positions, every), block.before))


def halves(block: Candidates) -> Tensor:
    """Pseudo-likelihood of complementary halves: every second token from the others, and these from those. One forward of 2 K positions.
    Which halves is ours."""
    size = block.ids.shape[1]
    even = torch.arange(size, device=block.ids.device) % 2 == 0
    every = torch.ones(size, size, dtype=torch.bool, device=block.ids.device)
    logits = block.read(torch.cat([block.hide(even), block.hide(~even)], 1), block.positions.repeat(1, 2), torch.block_diag(every, every).bool())
    first, second = (block.support(block.reader.align(half, block.before)) for half in logits.chunk(2, 1))
    return torch.where(even, first, second)


def shadowed(block: Candidates) -> Tensor:
    """Each token from all others, in one forward of the block and its shadow (`decoding.shadow`, isolated rows: one token hidden at a
    time). Optimistic where layers are more than one: the others have seen it."""
    reader, size = block.reader, block.ids.shape[1]
    ids, positions = shadow.rows(block.ids, block.start[:, None], reader.mask_id, reader.shift)
    rule = shadow.table(size, reader.shift, True, ids.device)
    column = torch.arange(size + len(rule), device=ids.device)
    own, last = (column < size).expand(size, -1), column[reader.shift - size:]
    logits = block.read(torch.cat([block.ids, ids], 1), torch.cat([block.positions, positions], 1), torch.cat([own, rule]), wanted=last)
    if reader.shift:
        logits = torch.cat([logits[:, :1] if block.before is None else block.before[:, None], logits], 1)
    return block.support(logits)


def causal(block: Candidates) -> Tensor:
    """Next-token log-likelihood of the block read token by token: what the model's own AR mode thinks of it. One forward of K positions. Only for
    shifted models with a causal context (HildaError), which learnt to read so."""
    reader, size = block.reader, block.ids.shape[1]
    if not (reader.causal and reader.shift):
        raise HildaError("scorer 'causal' needs a shifted dLLM with a causal context; convert one with causal_context: true, or use 'halves'")
    seen = torch.ones(size, size, dtype=torch.bool, device=block.ids.device).tril()
    clean = torch.ones(1, size, dtype=torch.bool, device=block.ids.device)
    return block.support(reader.align(block.read(block.ids, block.positions, seen, clean=clean), block.before))


def following(block: Candidates) -> Tensor:
    """Next-block evidence: how sure the model is of the first step of the block behind this one, each position's best token. One forward of 2 K
    positions. Where no block follows, the path stands in: both are log-probabilities a token."""
    reader, size, device = block.reader, block.ids.shape[1], block.ids.device
    every = torch.ones(size, size, dtype=torch.bool, device=device)
    seen = torch.cat([torch.cat([every.tril() if reader.causal else every, ~every], 1), torch.cat([every, every], 1)])
    clean = torch.cat([every[:1], ~every[:1]], 1)
    ids = torch.cat([block.ids, torch.full_like(block.ids, reader.mask_id)], 1)
    wanted = torch.arange(size - reader.shift, 2 * size - reader.shift, device=device)
    logits = block.read(ids, torch.cat([block.positions, block.positions + size], 1), seen, wanted=wanted, clean=clean)
    return torch.where(block.follows[:, None], logits.float().log_softmax(-1).amax(-1), path(block))


SCORERS = {"path": path, "remasked": remasked, "halves": halves, "shadow": shadowed, "causal": causal, "next": following}
