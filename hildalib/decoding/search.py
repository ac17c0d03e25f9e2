"""Order-Token Search: beams that differ in which positions are written when, and in what is written there.

After arXiv 2601.20339, of which we know the abstract and others' accounts of its algorithm (`SearchSettings` says what is unverified), for models
whose blocks see nothing to their right (`scorers`). Entry points: `order_token_search` (the best beam), `explore` (all that survive), `vote`,
`SearchSettings`, `Beams`.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import rules
from hildalib.decoding.decoded import Decoded, completion, left_padded
from hildalib.decoding.edit import BlockLoop
from hildalib.decoding.scorers import SCORERS, Candidates, path
from hildalib.decoding.settings import EditSettings
from hildalib.residual import Smoothing

PRUNES = ("first", "block", "end", "write")


@dataclass(frozen=True)
class SearchSettings:
    """Choices of a search. beams: how many survive (the paper's K, 3 to 8). children: candidates a beam; beams * children of them share what
    beams there are. temperature: of the Gumbel noise on the masks of the children (the paper searches 0.2 to 1 for each task). greedy_child: each beam's first
    child takes no noise and writes what the model prefers, an only child is as noisy as its parent (ours); otherwise all children take it, as
    published. scorer: what judges them, a name
    in SCORERS or a function like those. prune: when they compete:

    first: after the block's first forward, each judged by its guess of the whole block; then the survivors write on. The published
    schedule. block: when their blocks are finished (ours: a guess from nothing but masks is no block yet). end: once, at the end; with
    one beam the best of `children` independent samples. write: after every forward; a child writes one (position, token) pair, no
    noise, and the `beams` most probable paths go on: beam search in the strict sense, in which `children`, temperature and the commit
    rule play no part.

    accumulate: a beam is worth the mean log-probability a token of all its judged blocks; otherwise of the last one. Unverified: which of
    the two the paper does, as sources differ (they sum; the mean is ours, for beams that end at different lengths), the form of its
    noise, and whether equal beams are merged as they are here (the likelier path stays; in "end" all do, so that they may be counted).
    """

    beams: int = 4
    children: int = 4
    temperature: float = 1.0
    scorer: str | Callable[[Candidates], Tensor] = "halves"
    prune: str = "block"
    accumulate: bool = True
    greedy_child: bool = True

    def __post_init__(self):
        for name in ("beams", "children"):
            if getattr(self, name) < 1:
                raise HildaError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.prune not in PRUNES:
            raise HildaError(f"prune = {self.prune!r} must be one of {', '.join(PRUNES)}")
        if not callable(self.scorer) and self.scorer not in SCORERS:
            raise HildaError(f"scorer = {self.scorer!r} must be one of {', '.join(SCORERS)}")
        if self.prune == "write" and self.score is not path:
            raise HildaError("prune = 'write' compares blocks that are not finished, which only scorer 'path' can; use it, or prune = 'block'")
        if not self.temperature > 0 and self.prune != "write" and self.width > 1:
            raise HildaError(f"temperature = {self.temperature} makes all children alike; give one above 0")

    @property
    def width(self) -> int:
        """Candidates a prompt."""
        return self.beams * self.children

    @property
    def score(self) -> Callable[[Candidates], Tensor]:
        """(b, K) log-probabilities of the tokens of `Candidates`."""
        return self.scorer if callable(self.scorer) else SCORERS[self.scorer]


@dataclass(frozen=True)
class Beams:
    """ids (B, N, T) long: the surviving texts of each prompt, best first, EOS-padded on the right. values (B, N): mean log-probability a
    token of the blocks that had to be judged, -inf where a prompt has fewer than N texts. forwards, positions_fed (B,): of all candidates
    together, also of those that fell."""

    ids: Tensor
    values: Tensor
    forwards: Tensor
    positions_fed: Tensor

    def best(self) -> Decoded:
        """The best text of each prompt, at the cost of all."""
        return Decoded(self.ids[:, 0], self.forwards, self.positions_fed)


class _Search(BlockLoop):
    """State of one batch: its rows are beams, those of a prompt side by side; `payer` (b,) says whose they are.

    All rows go through their blocks together: what has closed its block waits until all have; then they are judged, and the survivors' first
    step in the next block, already read by the forward that closed theirs, is written once for each child.
    """

    def __init__(self, model, prompt_ids: Tensor, lengths: Tensor, settings: EditSettings, search: SearchSettings, generator):
        super().__init__(model, prompt_ids, lengths, settings, generator, trace=False)
        self.search, self.waiting, self.noisy = search, self.done.clone(), torch.zeros_like(self.done)
        self.total, self.count = torch.zeros(2, len(lengths), dtype=torch.float64, device=lengths.device)  # of log-probabilities, of tokens
        self.open = ~self.done  # rows that write in this block
        self.begun, self.before = self.start.clone(), None  # where it begins, and the logits that predict its first token
        self.guess = self.canvas[:, :self.size].clone()  # what the last forward would have made of the block
        self.sure = torch.zeros(self.guess.shape, device=lengths.device)  # and with what confidence
        self.found: list[list[tuple[float, Tensor]]] = [[] for _ in lengths]
        self.reader.cache.slots += 3 * self.size  # room for what scorers read: a block and its shadow
        read = self.reader.read(self.canvas, self.start, self.payer, *[torch.zeros_like(self.done)] * 3)
        self.pending = self.reader.align(read.own, self.reader.carry)

    def run(self, lengths: Tensor) -> Beams:
        """lengths (B,) of the prompts."""
        while len(self.payer):
            if self.search.prune == "write":
                self._branch_by_pair()
            else:
                self._branch()
            if self.search.prune == "first":
                self._prune(self.guess, self.sure)
            while not bool(self.waiting.all()):
                self.step()
            if self.search.prune in ("block", "end"):
                slots = self._slots()
                self._prune(self.canvas.gather(1, slots), self.snapshot.gather(1, slots))
            self._retire()
        return self._beams(lengths)

    def _take(self, index: list[int]) -> None:
        """`index` are the rows that go on; those that branch are there more than once."""
        if index == list(range(len(self.payer))):
            return  # nothing branches or falls: no cache need be copied
        rows = torch.tensor(index, dtype=torch.long, device=self.payer.device)
        for name in ("canvas", "lengths", "ends", "start", "post", "done", "generated", "snapshot", "remasks", "payer",  # of every decode
                     "waiting", "noisy", "total", "count", "open", "begun", "before", "guess", "sure", "pending"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[rows])
        self.memory = {name: value[rows] for name, value in self.memory.items()}
        self.reader.keep_rows(rows)

    def _groups(self) -> list[list[int]]:
        """The rows of each prompt that is still searched, one list a prompt."""
        groups: dict[int, list[int]] = {}
        for row, payer in enumerate(self.payer.tolist()):
            groups.setdefault(payer, []).append(row)
        return list(groups.values())

    def _value(self) -> Tensor:
        """(b,) mean log-probability a token."""
        return self.total / self.count.clamp(min=1)

    def _texts(self) -> list[tuple[int, ...]]:
        """What tells one beam from another: its canvas, of a finished one what comes out."""
        ends = completion(self.canvas, self.lengths, self.settings.max_new_tokens, self.eos).tolist()
        return [tuple(end if done else row) for row, end, done in zip(self.canvas.tolist(), ends, self.done.tolist())]

    def _slots(self) -> Tensor:
        """(b, K) positions of the blocks that are being written or judged."""
        return self.begun[:, None] + torch.arange(self.size, device=self.begun.device)

    # ---- one forward ----------------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One forward of the rows that do not wait."""
        self.live = (~self.waiting).nonzero().squeeze(1)
        with self.reader.only(self.live):
            super().step()
        self.waiting |= self.done

    def _block(self, live: Tensor, positions: Tensor, logits: Tensor, frozen: Tensor, hidden_logits: Tensor | None) -> rules.Block:
        """As in `BlockLoop`, with sampled tokens for the masks of noisy rows. Edits are never noisy."""
        block = super()._block(live, positions, logits, frozen, hidden_logits)
        noisy = self.noisy[live][:, None] & block.hidden
        if noisy.any():
            tokens, confidence = rules.choose(logits, self.search.temperature, self.generator)
            block.tokens, block.confidence = torch.where(noisy, tokens, block.tokens), torch.where(noisy, confidence, block.confidence)
        self.guess[live] = torch.where(block.hidden, block.tokens, block.current)
        self.sure[live] = torch.where(block.hidden, block.confidence, block.snapshot)
        return block

    def _write(self, live: Tensor, logits: Tensor, frozen: Tensor, hidden_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As in `BlockLoop`; where every write is a branch, what was read is left to `_branch_by_pair`."""
        if self.search.prune != "write":
            return super()._write(live, logits, frozen, hidden_logits)
        masked = (self.canvas[live].gather(1, self.reader.positions(self.start[live], self.size)) == self.mask_id).any(-1)
        self._begin(live[masked], logits[masked])
        self.post.index_add_(0, live, (~masked).long())
        return ~masked, torch.zeros_like(masked)

    def _begin(self, rows: Tensor, logits: Tensor) -> None:
        """What has been read is written when all rows have read."""
        self.pending[rows], self.waiting[rows] = logits, True

    def _drop_finished(self) -> None:
        """Finished beams stay and compete."""

    # ---- branching ------------------------------------------------------------------------------------------------------------------

    def _branch(self) -> None:
        """Children of every beam that is not finished write the first step of their block: one as the beam would alone (`greedy_child`), the others with noise."""
        done, noisy, index, flags = self.done.tolist(), self.noisy.tolist(), [], []
        for rows in self._groups():
            still = sum(not done[row] for row in rows)
            room = self.search.width - (len(rows) - still)
            for row in rows:
                share = 1 if done[row] else -(-room // still)  # what does not divide goes to the first, the best
                if not done[row]:
                    room, still = room - share, still - 1
                index += [row] * share
                flags += [True] * share if not self.search.greedy_child else [noisy[row]] if share == 1 else [False] + [True] * (share - 1)
        self._take(index)
        self.noisy = torch.tensor(flags, device=self.payer.device)
        self.begun, self.before, self.open, self.waiting = self.start.clone(), self.reader.carry, ~self.done, self.done.clone()
        rows = self.open.nonzero().squeeze(1)
        super()._begin(rows, self.pending[rows])
        self.waiting |= self.done

    def _branch_by_pair(self) -> None:
        """Of all ways to go on, a (beam, position, token) or a finished beam as it is, each prompt keeps the most probable that lead to
        different texts."""
        slots = self.reader.positions(self.start, self.size)
        masked = rules.leftmost(self.canvas.gather(1, slots) == self.mask_id, self.settings.sub_block) & ~self.done[:, None]
        top = self.pending.float().softmax(-1).topk(min(self.search.beams, self.pending.shape[-1]))  # (b, K, m)
        pairs = top.values.masked_fill(~masked[..., None], 0).double().log()
        value = ((self.total[:, None, None] + pairs) / (self.count[:, None, None] + 1)).flatten(1)
        value = torch.cat([value, self._value()[:, None].masked_fill(~self.done[:, None], -torch.inf)], 1)  # last: as it is
        before, kept = self._texts(), []
        for rows in self._groups():
            ranked, order = value[rows].flatten().sort(descending=True, stable=True)
            texts = set()
            for number in order[ranked > -torch.inf].tolist():
                row, choice = rows[0] + number // value.shape[1], number % value.shape[1]
                column, rank = divmod(choice, top.indices.shape[-1])
                text = list(before[row])
                if column < self.size:
                    text[int(slots[row, column])] = int(top.indices[row, column, rank])
                if tuple(text) not in texts:
                    texts.add(tuple(text))
                    kept.append((row, column, rank))
                if len(texts) == self.search.beams:
                    break
        parents, columns, ranks = map(torch.tensor, zip(*kept))
        self._take(parents.tolist())
        rows = (columns < self.size).nonzero().squeeze(1)
        where = rows, slots[parents[rows], columns[rows]]
        self.canvas[where], self.snapshot[where] = (table[parents[rows], columns[rows], ranks[rows]] for table in (top.indices, top.values))
        self.total[rows] += pairs[parents[rows], columns[rows], ranks[rows]]
        self.count[rows] += 1
        full = (self.canvas.gather(1, self.reader.positions(self.start, self.size)) != self.mask_id).all(-1) & ~self.done
        self._exhaust(full.nonzero().squeeze(1))
        self.waiting = self.done.clone()

    # ---- judging --------------------------------------------------------------------------------------------------------------------

    def _counted(self, ids: Tensor) -> Tensor:
        """(b, K) True = a generated token of block `ids` (b, K) that is wanted and not behind an EOS."""
        generated = self._slots() >= self.lengths[:, None]
        ended = (torch.isin(ids, self.eos) & generated & self.settings.stop_at_eos).long()
        return generated & (self._slots() < self.ends[:, None]) & (ended.cumsum(-1) - ended == 0)

    def _prune(self, ids: Tensor, confidence: Tensor) -> None:
        """Equal beams become one (samples stay, judged once), blocks `ids` (b, K) with a rival are judged, and of each prompt the best go on."""
        if self.search.prune != "end":
            likelihood = confidence.double().log().masked_fill(~self._counted(ids), 0).sum(-1).tolist()
            texts, kept = self._texts(), []
            for rows in self._groups():
                likeliest = {texts[row]: row for row in sorted(rows, key=lambda row: likelihood[row])}  # of equal texts the last stays
                kept += sorted(likeliest.values())
            ids, confidence = ids[kept], confidence[kept]
            self._take(kept)
        own, first = list(zip(self.payer.tolist(), self._texts())), {}
        equal = [first.setdefault(text, row) for row, text in enumerate(own)]
        texts, alike = Counter(payer for payer, _ in first), self.search.score is not path  # equal texts have paths of their own
        opened = self.open.tolist()
        rows = [row for row, (payer, _) in enumerate(own) if opened[row] and texts[payer] > 1 and (not alike or equal[row] == row)]
        if rows:
            self._judge(torch.tensor(rows, device=ids.device), ids[rows], confidence[rows], self._counted(ids)[rows])
        if alike:
            self.total, self.count = self.total[equal], self.count[equal]
        if self.search.prune != "end":
            self._take([row for rows in self._groups() for row in self._ranked(rows)[:self.search.beams]])

    def _judge(self, rows: Tensor, ids: Tensor, confidence: Tensor, counted: Tensor) -> None:
        """The blocks `ids` (b, K) of `rows` (b,) are scored."""
        ended = (torch.isin(ids, self.eos) & counted).any(-1) & self.settings.stop_at_eos
        follows = ~ended & (self.begun[rows] + self.size < self.ends[rows])
        before = None if self.before is None else self.before[rows]
        with self.reader.only(rows):
            logs = self.search.score(Candidates(self.reader, self.payer[rows], self.begun[rows], ids, before, confidence, counted, follows))
        kept = float(self.search.accumulate)
        self.total[rows] = kept * self.total[rows] + logs.double().masked_fill(~counted, 0).sum(-1)
        self.count[rows] = kept * self.count[rows] + counted.sum(-1)

    def _ranked(self, rows: list[int]) -> list[int]:
        """`rows`, best first; of equals the first, which took no noise."""
        value = self._value().tolist()
        return sorted(rows, key=lambda row: -value[row])

    def _retire(self) -> None:
        """Prompts all of whose beams are finished leave, each text once (samples as often as drawn)."""
        done, value, texts, kept = self.done.tolist(), self._value().tolist(), self._texts(), []
        for rows in self._groups():
            if all(done[row] for row in rows):
                first: dict[object, int] = {}
                for row in self._ranked(rows):
                    first.setdefault(row if self.search.prune == "end" else texts[row], row)
                self.found[int(self.payer[rows[0]])] = [(value[row], self.canvas[row].clone()) for row in first.values()]
            else:
                kept += rows
        if len(kept) < len(done):
            self._take(kept)

    def _beams(self, lengths: Tensor) -> Beams:
        most = max(map(len, self.found))
        values = [[value for value, _ in beams] + [-torch.inf] * (most - len(beams)) for beams in self.found]
        rows = torch.stack([canvas for beams in self.found for canvas in [text for _, text in beams] + [beams[0][1]] * (most - len(beams))])
        ids = completion(rows, lengths.repeat_interleave(most), self.settings.max_new_tokens, self.eos)
        return Beams(ids.view(len(self.found), most, -1), torch.tensor(values), self.reader.forwards, self.reader.fed)


@torch.inference_mode()
def explore(model, prompt_ids: Tensor, settings: EditSettings, choices: SearchSettings, *, attention_mask: Tensor | None = None,
            generator: torch.Generator | None = None) -> Beams:
    """All beams that are left when every one has ended; arguments as in `edit_decode`, whose rules of `settings` each beam follows.

    Every beam pays for its forwards, and every candidate for the one that judges it; candidates without a rival are not judged. Raises
    HildaError for settings that look back, compress the cache or smooth, and with prune "write" for a residual or a revision rule that changes
    what is written.
    """
    if settings.look_back:
        raise HildaError("look_back re-reads closed blocks, which other beams no longer share; search with look_back=0")
    if settings.kv is not None:
        raise HildaError("kv compresses what a text has committed, and beams wait for one another in between; search with kv=None")
    if isinstance(settings.residual, Smoothing):
        raise HildaError("Smoothing counts the forwards of one text, and beams share an account; search with residual=None or Residual()")
    if choices.prune == "write" and settings.residual:
        raise HildaError("prune = 'write' branches before a residual is made; search with residual=None or prune = 'block'")
    if choices.prune == "write" and (settings.revision_rule.confirms or settings.revision_rule.remasks):
        raise HildaError("prune = 'write' writes each position once; search with tau_edit=1 and no other revision rule")
    lengths = left_padded(prompt_ids, attention_mask)
    return _Search(model, prompt_ids, lengths, settings, choices, generator).run(lengths)


def order_token_search(model, prompt_ids: Tensor, settings: EditSettings, choices: SearchSettings, *, attention_mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Decoded:
    """The best beam of `explore`. With one beam and one child (prune "write": one beam) it is `edit_decode`, token for token and forward for
    forward ("write": with one token a forward)."""
    return explore(model, prompt_ids, settings, choices, attention_mask=attention_mask, generator=generator).best()


def vote(beams: Beams, answer: Callable[[Tensor], Hashable]) -> Decoded:
    """Self-consistency: of each prompt the best text among those that give its most frequent answer. answer: text (T,) -> what is counted."""
    chosen = []
    for texts, values in zip(beams.ids, beams.values):
        answers = [answer(text) for text, value in zip(texts, values) if value > -torch.inf]
        chosen.append(texts[answers.index(max(answers, key=answers.count))])
    return Decoded(torch.stack(chosen), beams.forwards, beams.positions_fed)
