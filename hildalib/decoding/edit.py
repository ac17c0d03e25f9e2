"""The block loop: by default the threshold-edit loop of LLaDA2.1 (section 2), batched and cached, on any plain causal LM.

Rows of a batch advance through their own blocks: a row that closes a block starts the next one while others still edit theirs,
and finished rows leave the batch. Who is written and who is revised is for the rules of `EditSettings` to say.
Entry points: `edit_decode`; `BlockLoop`, its state.
"""

import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.decoding import rules
from hildalib.decoding.decoded import Decoded, blank, check_context, check_prompts, completion, eos_ids, left_padded
from hildalib.decoding.reader import Reader
from hildalib.decoding.settings import EditSettings
from hildalib.decoding.trace import Recorder
from hildalib.residual import carry


class BlockLoop:
    """State of one batched decode; b counts the rows still running, T = P_max + max_new_tokens rounded up to whole blocks.
    In `search` the rows are beams."""

    def __init__(self, model, prompt_ids: Tensor, lengths: Tensor, settings: EditSettings, generator, trace: bool):
        record = getattr(model.config, "hilda", None)
        if not record:
            raise HildaError("this model has no `hilda` record in its config: load it with hildalib.backbones.load, or convert it first (notebook 02)")
        self.settings, self.generator = settings, generator
        self.commit, self.revise = settings.commit_rule, settings.revision_rule
        self.mask_id, self.shift = record["mask_token_id"], record["label_shift"]
        self.size = size = settings.block_size or record["block_size"]
        if not size:
            raise HildaError("no block size: the model was never converted; give EditSettings(block_size=...) to decode it anyway")
        check_prompts(lengths, self.shift)
        device, batch = prompt_ids.device, len(prompt_ids)
        self.lengths, self.ends = lengths, lengths + settings.max_new_tokens
        slots = -(-int(self.ends.max()) // size) * size
        check_context(model, int(self.ends.max()))
        self.canvas = blank(prompt_ids, lengths, slots, self.mask_id)
        self.eos = torch.tensor(eos_ids(model), dtype=torch.long, device=device)
        self.reader = Reader(model, self.canvas, size, self.revise, settings.kv)
        self.start = lengths // size * size  # where each row's current block begins
        self.post = torch.zeros_like(self.start)  # forwards spent on the block since its last mask went
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.live = torch.arange(batch, device=device)  # row of the reader -> batch row
        self.payer = self.live.clone()  # batch row -> whose account its forwards go to
        self.generated = torch.arange(slots, device=device) >= lengths[:, None]
        self.stops = self.eos if settings.stop_at_eos else self.eos[:0]  # nothing is decoded behind these
        self.snapshot = torch.full(self.canvas.shape, torch.nan, device=device)  # confidence of each position when last written
        self.remasks = torch.zeros_like(self.canvas)  # how often each position went back to [MASK]
        self.memory: dict[str, Tensor] = {}  # what rules note of the open blocks, and what their masks carry, (B, ...) each
        self.recorder = Recorder(self.canvas, lengths, size, self.mask_id) if trace else None

    def _block(self, live: Tensor, positions: Tensor, logits: Tensor, frozen: Tensor, hidden_logits: Tensor | None) -> rules.Block:
        """What the rules see of the current blocks of rows `live`, at positions (b, K)."""
        rows = live[:, None]
        current, history, frozen = self.canvas[rows, positions], self.snapshot[live], frozen[:, None]
        masked = current == self.mask_id
        hidden = masked & ~frozen
        return rules.Block(
            logits=logits, current=current, hidden=hidden, masked=rules.leftmost(hidden, self.settings.sub_block),
            visible=self.generated[rows, positions] & ~(masked | frozen), spent=self.remasks[rows, positions] >= self.settings.max_remasks,
            history=history, snapshot=history.gather(1, positions), memory={name: value[live] for name, value in self.memory.items()},
            shadow=hidden_logits, temperature=self.settings.temperature, generator=self.generator)

    def _write(self, live: Tensor, logits: Tensor, frozen: Tensor, hidden_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fill and revise the current blocks of rows `live` by aligned logits (b, K, V); frozen (b,) bool: write nothing.
        Returns (no mask is left, something was revised), each (b,) bool."""
        rows, positions = live[:, None], self.reader.positions(self.start[live], self.size)
        block = self._block(live, positions, logits, frozen, hidden_logits)
        ids, filled, revised = rules.advance(block, self.commit, self.revise, self.mask_id)
        self.canvas[rows, positions] = ids
        self.snapshot[rows, positions] = block.snapshot
        if self.revise.remasks:
            self.remasks[rows, positions] += revised.long()
        if self.settings.residual:
            block.memory["residual"] = self._residual(live, logits, block.hidden & ~block.filled)
        for name, value in block.memory.items():
            self.memory.setdefault(name, value.new_zeros(len(self.canvas), *value.shape[1:]))[live] = value
        if self.recorder:
            self.recorder.write(live, positions, filled, revised, block.confidence, block.tokens, self.revise.remasks)
        full = (ids != self.mask_id).all(-1)
        self.post.index_add_(0, live, full.long())
        return full, revised.any(-1)

    def _residual(self, live: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
        """(b, K, D): what the next forward adds to the embeddings of `masks` (b, K) bool, read as [MASK] and not written; zeros elsewhere."""
        forwards = self.reader.forwards[self.payer[live[masks.nonzero()[:, 0]]]]
        added = self.settings.residual(logits[masks], self.reader.model.get_input_embeddings(), self.mask_id, forwards)
        return carry(added.new_zeros(*masks.shape, added.shape[-1]), masks, added)

    def step(self) -> None:
        """One forward of every live row: fill and edit its block; where the block was done, begin the next one too."""
        live, settings, reader = self.live, self.settings, self.reader
        canvas, start = self.canvas[live], self.start[live]
        positions = reader.positions(start, self.size)
        masked = canvas.gather(1, positions) == self.mask_id
        whole = ~masked.any(-1)
        complete = bool(whole.any())  # only then can a row be at its last block, begin the next one or close
        last = self._last(live) if complete else whole
        shadowed = ~whole & (~masked & self.generated[live[:, None], positions]).any(-1) if self.revise.shadow else torch.zeros_like(whole)
        ahead = torch.zeros_like(whole) if settings.look_back else whole & ~last
        spent = whole & (self.post[live] > settings.max_post_steps) if complete else whole  # this forward only commits an exhausted block
        carried = self.memory["residual"][live] if "residual" in self.memory else None
        read = reader.read(canvas, start, self.payer[live], ahead, spent, shadowed, carried=carried)
        full, edited = self._write(live, reader.align(read.own, reader.carry), spent, read.hidden)
        stable = whole & ~edited  # the forward saw the block's final tokens
        reader.advance(stable, read.last)
        self._exhaust(live[full & ~stable & (self.post[live] > self._post_limit())])
        closed = self._close(stable, last)
        if read.following is not None and (begin := closed & ahead).any():
            self._begin(live[begin], reader.align(read.following, read.last)[begin])
        if self.recorder:
            self.recorder.snap(self.canvas, reader.forwards)
        self._drop_finished()

    def _begin(self, rows: Tensor, logits: Tensor) -> None:
        """The first step of the blocks of `rows`, by aligned logits (b, K, V)."""
        full, _ = self._write(rows, logits, torch.zeros_like(rows, dtype=torch.bool))
        if self._post_limit() < 1:
            self._exhaust(rows[full])

    def _post_limit(self) -> int:
        """Where no full block is revised a confirming forward changes nothing."""
        return self.settings.max_post_steps if self.revise.confirms else 0

    def _last(self, rows: Tensor) -> Tensor:
        """(b,) True = nothing is to be decoded behind the current block as it stands: all is there that was asked for, or an EOS."""
        return (self.start[rows] + self.size >= self.ends[rows]) | (torch.isin(self.canvas[rows], self.stops) & self.generated[rows]).any(-1)

    def _exhaust(self, rows: Tensor) -> None:
        """`rows` may spend no more forwards on their block: the next one only commits it, unless it is the last."""
        if not len(rows):
            return
        self.done[rows] = self._last(rows)
        self.post[rows] = self.settings.max_post_steps + 1
        if self.recorder:
            self.recorder.close(rows, self.start[rows], self.size)

    def _close(self, stable: Tensor, last: Tensor) -> Tensor:
        """Moves rows whose block is `stable` to their next one, unless it was their last; returns (b,) bool, True = has moved."""
        moving = stable & ~last
        if not stable.any():
            return moving
        live = self.live
        if self.recorder:
            self.recorder.close(live[stable], self.start[live[stable]], self.size)
        self.done[live[stable & last]] = True
        if self.settings.look_back and bool(moving.any()):
            self._look_back(moving)
        moved = live[moving]
        self.start[moved] += self.size
        self.post[moved] = 0
        for value in self.memory.values():
            value[moved] = 0
        return moving

    def _drop_finished(self) -> None:
        kept = (~self.done[self.live]).nonzero().squeeze(1)
        if len(kept) < len(self.live):
            self.live = self.live[kept]
            self.reader.keep_rows(kept)

    def _look_back(self, closing: Tensor) -> None:
        """Edits in the `look_back` blocks before a just closed one, that block in view; then the window is committed anew.

        All live rows are fed (a batch is one tensor), but only `closing` rows are edited; for the others the window is
        their own last blocks and the second forward restores exactly the keys that were there.
        """
        live, reader, span = self.live, self.reader, (self.settings.look_back + 1) * self.size
        start = (self.start[live] + self.size - span).clamp(min=0)
        positions = reader.positions(start, span)
        horizon = self.start[live] + self.size
        logits = reader.reread(self.canvas[live], positions, horizon)
        reader.count(live[closing], span)
        if self.shift:  # the window's first token has no row in the window; it stays
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        tokens, confidence = rules.choose(logits, self.settings.temperature, self.generator)
        current = self.canvas[live].gather(1, positions)
        reach = closing[:, None] & (positions < self.start[live][:, None]) & (positions >= self.lengths[live][:, None])
        reach &= (positions > start[:, None]) if self.shift else True
        edited = rules.edit(tokens, confidence, current, reach, self.settings.tau_edit)
        self.canvas[live] = self.canvas[live].scatter(1, positions, torch.where(edited, tokens, current))
        history = self.snapshot[live]
        self.snapshot[live] = history.scatter(1, positions, torch.where(edited, confidence, history.gather(1, positions)))
        if self.recorder:
            self.recorder.write(live, positions, torch.zeros_like(edited), edited, confidence, tokens)
            self.recorder.snap(self.canvas, reader.forwards)
        raw = reader.recommit(self.canvas[live], positions)
        reader.count(live[closing], span)
        last = (self.start[live] + self.size - 1 - start)[:, None, None].expand(-1, 1, raw.shape[-1])
        reader.advance(closing, raw.gather(1, last)[:, 0])
        if self.recorder:
            self.recorder.snap(self.canvas, reader.forwards)


@torch.inference_mode()
def edit_decode(model, prompt_ids: Tensor, settings: EditSettings, *, attention_mask: Tensor | None = None,
                generator: torch.Generator | None = None, trace: bool = False) -> Decoded:
    """Block-diffusion decoding; with the default rules, two thresholds, exactly LLaDA2.1's loop for a batch of one.

    prompt_ids (B, P) long, left-padded with attention_mask (B, P) (1 = real) where lengths differ. In each block, from
    position prompt_length // K * K on: one forward; masked positions more confident than tau_mask are filled (at least
    one), visible generated ones whose argmax changed with more than tau_edit are edited; the block closes on the first
    forward that finds no mask and edits nothing, or after max_post_steps forwards without masks. Returns `Decoded`,
    ids (B, max_new_tokens) cut after the first EOS. Prompt tokens never change, [MASK] never comes out. Raises HildaError
    on a model without a `hilda` record, a prompt longer than the context, or thresholds below 0.
    """
    lengths = left_padded(prompt_ids, attention_mask)
    state = BlockLoop(model, prompt_ids, lengths, settings, generator, trace)
    while len(state.live):
        state.step()
    return Decoded(completion(state.canvas, lengths, settings.max_new_tokens, state.eos), state.reader.forwards, state.reader.fed,
                   state.recorder.trace() if state.recorder else None, state.reader.kv_bytes)
