"""What the model says of the open blocks of a batch, forward by forward, with the cache and the cost of each forward.

A closed block is committed by the forward in which the next one takes its first step. With a block-causal context the keys of the
confirming forward are the commit; with a causal one (`hilda["causal_context"]`) a causal copy of the block rides along.
Entry points: `Reader`, `Reading`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hildalib import attention
from hildalib.decoding import shadow
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.forward import Forward
from hildalib.gated import is_gated


@dataclass(frozen=True)
class Reading:
    """Logits of one forward, [MASK] barred. own (b, K, V): the open block's rows. last (b, V): what predicts the position after the
    block, once it is closed. following (b, K, V) or None: the rows of the next block. copy (b, K, V) or None: those of the block's
    causal copy. hidden (b, K, V) or None: the shadow's."""

    own: Tensor
    last: Tensor
    following: Tensor | None = None
    copy: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """Rows of a forward: ids, their positions and cache slots, each (b, Q); mask (b, 1, Q or 1, slots), filled in once the number of
    slots is known; wanted: the columns that need logits, None for all, or (b, n) long; clean (b, Q) or (1, 1) bool: rows that are context.
    real (b, Q or 1) bool: rows that are not there only because a batch is one tensor. mute (b, n) bool: logits nobody looks at."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    mask: Callable[[int], Tensor]  # of the slots in use
    wanted: Tensor | None = None
    clean: Tensor | bool = False
    real: Tensor | bool = True
    mute: Tensor | bool = False


class Reader:
    """The model, its cache and its account. Everything is in rows of the batch that still run, b of them."""

    def __init__(self, model, canvas: Tensor, size: int, revision=None):
        record = model.config.hilda
        self.forward = Forward(model)
        self.model, self.size, self.revision, self.length = model, size, revision, canvas.shape[1]
        self.mask_id, self.shift = record["mask_token_id"], record["label_shift"]
        self.causal = record.get("causal_context", False) and size > 1  # blocks of one are causal anyway
        self.shadow_at = 2 * size + self.causal * size  # its keys go behind whatever else stands behind the committed slots
        self.cache = BlockCache(self.length + self.causal * 2 * size + (3 * size if revision and revision.shadow else 0))
        self.carry: Tensor | None = None  # (b, V) logits of the last committed position, which predict the next block's first
        self.forwards = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
        self.fed = torch.zeros_like(self.forwards)
        self.columns = torch.arange(self.cache.slots, device=canvas.device)

    def align(self, logits: Tensor, before: Tensor | None) -> Tensor:
        """Row i of the result predicts position i; before (b, V): logits of the position in front of them."""
        if not self.shift:
            return logits
        first = logits[:, :1] if before is None else before[:, None]  # nothing before block 0, whose first token is prompt
        return torch.cat([first, logits[:, :-1]], 1)

    def positions(self, start: Tensor, count: int) -> Tensor:
        """(b, count) positions from start (b,) on; those beyond the canvas are its last one again."""
        return (start[:, None] + self.columns[:count]).clamp(max=self.length - 1)

    def count(self, rows: Tensor, positions: Tensor | int) -> None:
        """One more forward of `rows`, which fed `positions` of their own (what only other rows of the batch need is not theirs)."""
        self.forwards.index_add_(0, rows, torch.ones_like(rows))
        self.fed.index_add_(0, rows, torch.as_tensor(positions, device=rows.device).expand(rows.shape))

    def _feed(self, *parts: _Part) -> list[Tensor]:
        """One forward of all parts: logits (b, n, V) of what each wants; their keys land in their slots."""
        slots = torch.cat([part.slots for part in parts], 1)
        used = self.cache.at(slots).used
        mask = torch.cat([part.mask(used).expand(-1, -1, part.slots.shape[1], -1) for part in parts], 2)
        index = torch.arange(slots.numel(), device=slots.device).view_as(slots).split([part.slots.shape[1] for part in parts], 1)
        index = [rows if part.wanted is None else rows.gather(1, part.wanted) for rows, part in zip(index, parts)]
        wanted = torch.cat(index, 1).flatten()
        real, asked = self._needed(parts, index)
        logits = self.forward(torch.cat([part.ids for part in parts], 1), torch.cat([part.positions for part in parts], 1), mask, self.cache, wanted,
                              real=real, asked=asked, noisy=self._noisy(parts))
        logits = logits.view(len(slots), -1, logits.shape[-1])
        logits[..., self.mask_id] = -torch.inf
        return list(logits.split([rows.shape[1] for rows in index], 1))

    def _needed(self, parts: tuple[_Part, ...], index: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """`real` and `asked` of `Forward`; None where all are."""
        real = asked = None
        if len(index[0]) > 1 and any(part.real is not True for part in parts):  # a batch of one has nothing that is there for others
            real = torch.cat([torch.as_tensor(part.real, device=part.slots.device).expand(part.slots.shape) for part in parts], 1)
        if any(part.mute is not False for part in parts):
            asked = torch.cat([~torch.as_tensor(part.mute, device=rows.device).expand(rows.shape) for part, rows in zip(parts, index)], 1).flatten()
        if real is not None:
            shown = real.flatten()[torch.cat(index, 1).flatten()]
            asked = shown if asked is None else shown & asked
        return real, asked

    def _mute(self, canvas: Tensor, positions: Tensor) -> Tensor | bool:
        """(b, Q) True = the row at that position predicts no mask, where nothing but masks is ever written."""
        if self.revision is None or self.revision.reads:
            return False
        ahead = positions + self.shift
        return (canvas.gather(1, ahead.clamp(max=self.length - 1)) != self.mask_id) & (ahead // self.size == positions // self.size)

    def _noisy(self, parts: tuple[_Part, ...]) -> Tensor | None:
        """(b, Q) True = not a row of the context, for a gated model; at shifted block size 1 every row is the AR model's."""
        if not is_gated(self.model) or self.size == 1 and self.shift:
            return None
        return torch.cat([~torch.as_tensor(part.clean, device=part.slots.device).expand(part.slots.shape) for part in parts], 1)

    def _in_place(self, canvas: Tensor, positions: Tensor, mask=None, **options) -> _Part:
        """The canvas at `positions`, in the slots of those; it sees all slots up to the end of each position's block."""
        return _Part(canvas.gather(1, positions), positions, positions, mask or (lambda used: attention.window(positions, used, self.size)), **options)

    def read(self, canvas: Tensor, start: Tensor, live: Tensor, ahead: Tensor, spent: Tensor, shadowed: Tensor,
             verify: bool = False) -> Reading:
        """The blocks of canvas (b, T) that begin at start (b,). ahead (b,) bool: the block has no mask, and if it stays as it is it is
        committed by this forward, which reads the next one too. spent (b,) bool: it will stay. shadowed (b,) bool: its tokens are to be
        predicted without being seen. live (b,): the rows' numbers in the account. verify: the whole causal copy is wanted."""
        size = self.size
        if not self.cache.keys and int(start.max()):
            self.count(live, start + size)
            return self._prefill(canvas, start)
        copied = ahead & ~spent if self.causal else torch.zeros_like(ahead)
        self.count(live, size * (1 + ahead.long() + copied.long()) + shadowed.long() * shadow.count(size, self.shift))
        if self.causal and ahead.any():
            parts = self._commit_and_read(canvas, start, ahead, spent, verify)
        else:
            positions = self.positions(start, size * (2 if ahead.any() else 1))
            real = ahead[:, None] | (torch.arange(positions.shape[1], device=start.device) < size)
            parts = [self._in_place(canvas, positions, real=real, mute=self._mute(canvas, positions))]
        if shadowed.any():
            parts.append(self._shadow(canvas, start, shadowed))
        *read, hidden = self._feed(*parts) if shadowed.any() else (*self._feed(*parts), None)
        if hidden is not None and self.shift:
            first = read[0][:, :1] if self.carry is None else self.carry[:, None]
            hidden = torch.cat([first, hidden], 1)
        if len(read) == 1:
            own, following = read[0][:, :size], read[0][:, size:] if ahead.any() else None
            return Reading(own, own[:, -1], following, hidden=hidden)
        commit, following = read[-2:]
        return Reading(read[0], commit[:, -1], following, commit, hidden)

    def _prefill(self, canvas: Tensor, start: Tensor) -> Reading:
        """The first forward: the whole prompt blocks, committed, and the block after them."""
        size = self.size
        positions = self.positions(torch.zeros_like(start), int(start.max()) + size)
        columns = (start[:, None] - 1 + torch.arange(size + 1, device=start.device)).clamp(min=0)

        def causal(used: int) -> Tensor:
            ends = torch.where(positions < start[:, None], positions + 1, (positions // size + 1) * size)
            return (torch.arange(used, device=start.device) < ends[..., None])[:, None]

        logits, = self._feed(self._in_place(canvas, positions, causal if self.causal else None, wanted=columns, clean=positions < start[:, None],
                                            real=positions < (start + size)[:, None], mute=self._mute(canvas, columns)))
        self.carry = logits[:, 0]
        return Reading(logits[:, 1:], logits[:, -1])

    def _commit_and_read(self, canvas: Tensor, start: Tensor, ahead: Tensor, spent: Tensor, whole: bool) -> list[_Part]:
        """Three parts: the open block once more, unless all are `ahead` and `spent`; its causal copy, the commit; the next block.

        Where a row is `ahead` the copy takes the block's slots and the block itself stands behind the next one; elsewhere the block
        keeps its slots, and the other two parts are there because a batch is one tensor: nothing sees them. whole: logits of all
        rows of the copy, not of its last only.
        """
        size, column, final = self.size, torch.arange(self.size, device=start.device), bool((ahead & spent).all())
        aside = 2 * size * ahead.long()[:, None]  # where the block stands, counted from start
        copy = 2 * size - aside
        own, following = self.positions(start, size), self.positions(start + size, size)

        def part(positions: Tensor, at: Tensor, *seen, **options) -> _Part:
            return _Part(canvas.gather(1, positions), positions, start[:, None] + at + column, lambda used: attention.spans(start, used, *seen), **options)

        block = part(own, aside, (aside, aside + size), real=~(ahead & spent)[:, None], mute=self._mute(canvas, own))
        commit = part(own, copy, (copy, copy + column + 1), clean=True, real=ahead[:, None],
                      wanted=None if final or whole else torch.full_like(aside, size - 1), mute=final and not whole and column < size - 1)
        begun = part(following, torch.full_like(aside, size), (copy, copy + size), (size, 2 * size), real=ahead[:, None])
        return [commit, begun] if final else [block, commit, begun]

    def _shadow(self, canvas: Tensor, start: Tensor, shadowed: Tensor) -> _Part:
        """The shadow of the open block (`shadow.rows`), of which the last rows predict."""
        size, at = self.size, start[:, None]
        ids, positions = shadow.rows(canvas.gather(1, self.positions(start, size)), at, self.mask_id, self.shift)
        column = torch.arange(ids.shape[1], device=start.device)
        return _Part(ids, positions, at + self.shadow_at + column,
                     lambda used: shadow.window(at, size, used, self.shadow_at, self.shift, self.revision.isolated),
                     column[self.shift - size:].expand(len(ids), -1), real=shadowed[:, None])

    def advance(self, stable: Tensor, last: Tensor) -> None:
        """The blocks of rows `stable` (b,) bool are closed: `last` (b, V) predicts what follows them."""
        if self.carry is None or self.shift:
            self.carry = last if self.carry is None else torch.where(stable[:, None], last, self.carry)

    def reread(self, canvas: Tensor, positions: Tensor, horizon: Tensor) -> Tensor:
        """(b, Q, V) logits of the window `positions` (b, Q), all of it in view of itself up to horizon (b,); then `recommit`."""
        return self._feed(self._in_place(canvas, positions, lambda used: (torch.arange(used, device=horizon.device) < horizon[:, None])[:, None, None]))[0]

    def recommit(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """(b, Q, V) logits of the window, whose keys are what they would have been had it been written so from the start."""
        causal = lambda used: (torch.arange(used, device=positions.device) <= positions[..., None])[:, None]  # noqa: E731
        return self._feed(self._in_place(canvas, positions, causal if self.causal else None, clean=True))[0]

    def keep_rows(self, kept: Tensor) -> None:
        """`kept` (b,) long are the rows that go on."""
        self.cache.keep_rows(kept)
        self.carry = self.carry[kept]
