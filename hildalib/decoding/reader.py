"""What the model says of the open blocks of a batch, forward by forward, with the cache and the cost of each forward.

A closed block is committed by the forward in which the next one takes its first step. With a block-causal context the keys of the
confirming forward are the commit; with a causal one (`hilda["causal_context"]`) a causal copy of the block rides along.
Entry points: `Reader`, `Reading`.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import HildaError, attention
from hildalib.decoding import shadow
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.compression import CompressedCache, Compression
from hildalib.decoding.forward import Forward
from hildalib.gated import is_gated


@dataclass(frozen=True)
class Reading:
    """Logits of one forward, [MASK] barred. own (b, K, V): the open block's rows. last (b, V): what predicts the position after the
    block, once it is closed. following (b, K, V) or None: the rows of the next block. hidden (b, K, V) or None: the shadow's."""

    own: Tensor
    last: Tensor
    following: Tensor | None = None
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

    def __init__(self, model, canvas: Tensor, size: int, revision=None, kv: Compression | None = None):
        record = model.config.hilda
        self.forward = Forward(model)
        self.model, self.size, self.revision, self.length = model, size, revision, canvas.shape[1]
        self.mask_id, self.shift = record["mask_token_id"], record["label_shift"]
        self.causal = record.get("causal_context", False) and size > 1  # blocks of one are causal anyway
        self.seen = 1 if record.get("causal_blocks") else size  # what a row of an open block sees, in steps of this many positions
        self.shadow_at = 2 * size + self.causal * size  # its keys go behind whatever else stands behind the committed slots
        slots = self.length + self.causal * 2 * size + (3 * size if revision and revision.shadow else 0)
        self.cache = BlockCache(slots) if kv is None else CompressedCache(slots, kv, size)
        if kv is not None and not self.forward.straight:
            raise HildaError("a compressed cache needs a plain Llama, Qwen2 or Qwen3 in evaluation, under SDPA; leave EditSettings(kv=...) out")
        self.carry: Tensor | None = None  # (b, V) logits of the last committed position, which predict the next block's first
        self.forwards = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
        self.fed = torch.zeros_like(self.forwards)
        self.kv_bytes = None if kv is None else torch.zeros_like(self.forwards)
        self.columns = torch.arange(self.cache.slots, device=canvas.device)
        self.triple = _triple(size, canvas.device) if self.causal else None

    def align(self, logits: Tensor, before: Tensor | None) -> Tensor:
        """Row i of the result predicts position i; before (b, V): logits of the position in front of them."""
        if not self.shift:
            return logits
        first = logits[:, :1] if before is None else before[:, None]  # nothing before block 0, whose first token is prompt
        return torch.cat([first, logits[:, :-1]], 1)

    def positions(self, start: Tensor, count: int) -> Tensor:
        """(b, count) positions from start (b,) on; those beyond the canvas are its last one again."""
        positions = start[:, None] + self.columns[:count]
        return positions if count == self.size else positions.clamp(max=self.length - 1)  # a block is never beyond

    def count(self, rows: Tensor, positions: Tensor | int) -> None:
        """One more forward of `rows`, which fed `positions` of their own (what only other rows of the batch need is not theirs). Beams of
        one prompt all name its row, which pays for each."""
        one = torch.ones_like(rows)
        self.forwards.index_add_(0, rows, one)
        self.fed.index_add_(0, rows, one * positions)

    def _feed(self, *parts: _Part, carried: Tensor | None = None) -> list[Tensor]:
        """One forward of all parts: logits (b, n, V) of what each wants; their keys land in their slots. carried (b, K, D): added to the
        embeddings of the first K columns."""
        slots = _joined([part.slots for part in parts], 1)
        used = self.cache.at(slots).used
        mask = _joined([part.mask(used).expand(-1, -1, part.slots.shape[1], -1) for part in parts], 2)
        wanted, counts = None, [(part.slots if part.wanted is None else part.wanted).shape[1] for part in parts]
        if any(part.wanted is not None for part in parts):
            index = torch.arange(slots.numel(), device=slots.device).view_as(slots).split([part.slots.shape[1] for part in parts], 1)
            wanted = _joined([rows if part.wanted is None else rows.gather(1, part.wanted) for rows, part in zip(index, parts)], 1).flatten()
        real, asked = self._needed(parts, wanted, counts)
        ids, positions = (_joined([getattr(part, name) for part in parts], 1) for name in ("ids", "positions"))
        logits = self.forward(ids, positions, mask, self.cache, wanted, real=real, asked=asked, noisy=self._noisy(parts), carried=carried)
        logits = logits.view(len(slots), -1, logits.shape[-1])
        logits[..., self.mask_id] = -torch.inf
        return [logits] if len(parts) == 1 else list(logits.split(counts, 1))

    def _needed(self, parts: tuple[_Part, ...], wanted: Tensor | None, counts: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """`real` and `asked` of `Forward`, where each part wants so many rows; None where all are."""
        real = asked = None
        if len(parts[0].slots) > 1 and any(part.real is not True for part in parts):  # a batch of one has nothing that is there for others
            real = _joined([torch.as_tensor(part.real, device=part.slots.device).expand(part.slots.shape) for part in parts], 1)
        if any(part.mute is not False for part in parts):
            asked = ~_joined([torch.as_tensor(part.mute, device=part.slots.device).expand(len(part.slots), count)
                              for part, count in zip(parts, counts)], 1).flatten()
        if real is not None:
            shown = real.flatten() if wanted is None else real.flatten()[wanted]
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
        """The canvas at `positions`, in the slots of those; it sees all slots up to the end of each position's block, or up to itself in a model of
        causal blocks."""
        return _Part(canvas.gather(1, positions), positions, positions, mask or (lambda used: attention.window(positions, used, self.seen)), **options)

    def read(self, canvas: Tensor, start: Tensor, live: Tensor, ahead: Tensor, spent: Tensor, shadowed: Tensor,
             carried: Tensor | None = None) -> Reading:
        """The blocks of canvas (b, T) that begin at start (b,). ahead (b,) bool: the block has no mask, and if it stays as it is it is
        committed by this forward, which reads the next one too. spent (b,) bool: it will stay. shadowed (b,) bool: its tokens are to be
        predicted without being seen. live (b,): the rows' numbers in the account (`count`). carried (b, K, D): what the masks of the block
        add to their embeddings."""
        size = self.size
        if not self.cache.keys and int(start.max()):
            self.count(live, start + size)
            return self._prefill(canvas, start)
        if self.kv_bytes is not None:
            self.kv_bytes[live] = self.cache.settle(start)
        begins, shadows = bool(ahead.any()), bool(shadowed.any())
        fed = size * (1 + ahead.long() + (ahead & ~spent).long() * self.causal) if begins else size
        self.count(live, fed + shadowed.long() * shadow.count(size, self.shift) if shadows else fed)
        if self.causal and begins:
            part, widths = self._commit_and_read(canvas, start, ahead, spent)
        else:
            positions, widths = self.positions(start, size * (1 + begins)), [size] * (1 + begins)
            real = ahead[:, None] | (self.columns[:2 * size] < size) if begins else True
            part = self._in_place(canvas, positions, real=real, mute=self._mute(canvas, positions))
        if shadows:
            read, hidden = self._feed(part, self._shadow(canvas, start, shadowed), carried=carried)
            if self.shift:
                first = read[:, :1] if self.carry is None else self.carry[:, None]
                hidden = torch.cat([first, hidden], 1)
        else:
            (read,), hidden = self._feed(part, carried=carried), None
        read = read.split(widths, 1)
        if not (self.causal and begins):
            return Reading(read[0], read[0][:, -1], read[1] if begins else None, hidden=hidden)
        commit, following = read[-2:]
        return Reading(read[0].expand(-1, size, -1), commit[:, -1], following, hidden)  # where all are spent `own` says nothing

    def verify(self, canvas: Tensor, start: Tensor, live: Tensor, onward: Tensor) -> Reading:
        """The drafted blocks of canvas (b, T) that begin at start (b,), read causally, token by token, in their own slots: `own`, which commits them if
        they stay. onward (b,) bool: the next block is read behind it (`following`); where no row asks for it, it is not there. live: as in `read`."""
        size, onwards = self.size, bool(onward.any())
        column = self.columns[:size * (1 + onwards)]
        clean = column < size
        self.count(live, size * (1 + onward.long()))
        slots = start[:, None] + column
        ends = start[:, None] + torch.where(clean, column + 1, 2 * size)
        positions = slots.clamp(max=self.length - 1)
        logits, = self._feed(_Part(canvas.gather(1, positions), positions, slots, lambda used: (self.columns[:used] < ends[..., None])[:, None],
                                   clean=clean[None], real=onward[:, None] | clean if onwards else True))
        return Reading(logits[:, :size], logits[:, size - 1], logits[:, size:] if onwards else None)

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

    def _commit_and_read(self, canvas: Tensor, start: Tensor, ahead: Tensor, spent: Tensor) -> tuple[_Part, list[int]]:
        """The open block once more, unless all are `ahead` and `spent`; its causal copy, the commit; the next block. And how many rows of
        each are wanted, of the copy its last.

        Where a row is `ahead` the copy takes the block's slots and the block itself stands behind the next one; elsewhere the block
        keeps its slots, and the other two are there because a batch is one tensor: nothing sees them.
        """
        size, closing = self.size, ahead & spent
        gone = size * bool(closing.all())
        columns, places = self.columns[gone:3 * size], self.triple[..., gone:]
        positions = (start[:, None] + places[0, 0]).clamp(max=self.length - 1)
        at, first, end = places[1:, ahead.long()]
        real = torch.where(columns < size, ~closing[:, None], ahead[:, None]) if len(start) > 1 and not gone else True
        wanted = (columns[(columns < size) | (columns >= 2 * size - 1)] - gone).expand(len(start), -1)
        mute = False if gone else self._mute(canvas, positions[:, :size])
        mute = mute if mute is False else F.pad(mute, (0, size + 1))
        part = _Part(canvas.gather(1, positions), positions, start[:, None] + at, lambda used: attention.spans(start, used, first, end),
                     wanted, clean=((columns >= size) & (columns < 2 * size))[None], real=real, mute=mute)
        return part, [size] * (not gone) + [1, size]

    def _shadow(self, canvas: Tensor, start: Tensor, shadowed: Tensor) -> _Part:
        """The shadow of the open block (`shadow.rows`), of which the last rows predict."""
        size, at = self.size, start[:, None]
        ids, positions = shadow.rows(canvas.gather(1, self.positions(start, size)), at, self.mask_id, self.shift)
        column = torch.arange(ids.shape[1], device=start.device)
        return _Part(ids, positions, at + self.shadow_at + column,
                     lambda used: shadow.window(at, size, used, self.shadow_at, self.shift, self.revision.isolated),
                     column[self.shift - size:].expand(len(ids), -1), real=shadowed[:, None])

    def read_open(self, canvas: Tensor, start: Tensor, whole: Tensor, opened: Tensor, live: Tensor) -> Tensor:
        """(b, n, V) aligned logits of positions whole (b,) to opened (b,) of canvas (b, T), in one forward. Blocks [start, whole) are done and
        committed by it; those behind them are open, each in view of the ones before it. n is the most that a row has open. live: as in `read`."""
        first = start if self.cache.keys else torch.zeros_like(start)
        self.count(live, opened - first)
        positions = self.positions(first, int((opened - first).max()))
        clean = positions < whole[:, None]
        ends = (positions // self.seen + 1) * self.seen
        ends = torch.where(clean, positions + 1, ends) if self.causal else ends
        columns = (whole - first - 1)[:, None] + torch.arange(int((opened - whole).max()) + 1, device=start.device)
        logits, = self._feed(self._in_place(canvas, positions, lambda used: (torch.arange(used, device=start.device) < ends[..., None])[:, None],
                                            wanted=columns.clamp(0, positions.shape[1] - 1), clean=clean, real=positions < opened[:, None]))
        self.carry = logits[:, 0] if self.carry is None else torch.where((whole > first)[:, None], logits[:, 0], self.carry)
        return self.align(logits[:, 1:], self.carry)

    def advance(self, stable: Tensor, last: Tensor) -> None:
        """The blocks of rows `stable` (b,) bool are closed: `last` (b, V) predicts what follows them."""
        if self.carry is None or self.shift:
            self.carry = last if self.carry is None else torch.where(stable[:, None], last, self.carry) if stable.any() else self.carry

    def reread(self, canvas: Tensor, positions: Tensor, horizon: Tensor) -> Tensor:
        """(b, Q, V) logits of the window `positions` (b, Q), all of it in view of itself up to horizon (b,); then `recommit`."""
        return self._feed(self._in_place(canvas, positions, lambda used: (torch.arange(used, device=horizon.device) < horizon[:, None])[:, None, None]))[0]

    def recommit(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """(b, Q, V) logits of the window, whose keys are what they would have been had it been written so from the start."""
        causal = lambda used: (torch.arange(used, device=positions.device) <= positions[..., None])[:, None]  # noqa: E731
        return self._feed(self._in_place(canvas, positions, causal if self.causal else None, clean=True))[0]

    def aside(self, payer: Tensor, start: Tensor, ids: Tensor, positions: Tensor, seen: Tensor, *, wanted: Tensor | None = None,
              clean: Tensor | bool = False) -> Tensor:
        """(b, n, V) logits of ids (b, Q) at positions (b, Q), read in one forward that leaves no trace: they stand in the slots behind the
        block at start (b,), see what is committed before it and one another as seen (Q, Q) bool says, and nothing sees them.

        payer (b,): the rows' numbers in the account. wanted (n,): columns of which logits are needed; None: all. clean (1, Q): rows
        that are context. The cache must have Q slots beyond the last block.
        """
        self.count(payer, ids.shape[1])
        slots = start[:, None] + self.size + torch.arange(ids.shape[1], device=ids.device)
        wanted = None if wanted is None else wanted.expand(len(ids), -1)
        return self._feed(_Part(ids, positions, slots, lambda used: attention.beside(start, used, self.size, seen), wanted, clean))[0]

    @contextlib.contextmanager
    def only(self, rows: Tensor):
        """Within, the batch is its rows `rows` (b,) long, all different; the others keep their keys and wait."""
        carry, self.cache.only = self.carry, rows
        self.carry = None if carry is None else carry[rows]
        yield
        if self.carry is not None:
            carry = self.carry.new_zeros(len(self.cache.keys[0]), self.carry.shape[1]) if carry is None else carry
            carry = carry.index_copy(0, rows, self.carry)
        self.carry, self.cache.only = carry, None

    def keep_rows(self, kept: Tensor) -> None:
        """`kept` (b,) long are the rows that go on, one or more times each."""
        if len(kept):
            self.cache.keep_rows(kept)
            self.carry = None if self.carry is None else self.carry[kept]


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@lru_cache(maxsize=8)
def _triple(size: int, device) -> Tensor:
    """(4, 2, 3 K) long: of the rows of a block, of its causal copy and of the next block the position, the slot, and the first and the
    end of the slots it sees, all counted from the block's start; for a block that goes on, and for one that closes."""
    column, one = torch.arange(size, device=device), torch.ones(size, dtype=torch.long, device=device)
    position = torch.cat([column, column, size + column])
    open_block = [torch.cat(rows) for rows in ((column, 2 * size + column, size + column), (0 * one, 2 * size * one, 0 * one),
                                               (size * one, 2 * size + column + 1, 2 * size * one))]
    closing = [torch.cat(rows) for rows in ((2 * size + column, column, size + column), (2 * size * one, 0 * one, 0 * one),
                                            (3 * size * one, column + 1, 2 * size * one))]
    return torch.stack([torch.stack(pair) for pair in zip([position, *open_block], [position, *closing])])
