"""A key-value cache with one slot per absolute position, so that a block in progress is simply written over.

Commit is free: the last forward that saw a block's final tokens has left its keys in place. Nothing is cropped,
concatenated or copied, and rows of a batch may stand at different blocks. Entry point: `BlockCache`.
"""

import torch
from torch import Tensor


class BlockCache:
    """Keys and values of shape (B, slots, heads, D_head) a layer, so that a position is written at one stretch.

    Call `at(positions)` before each forward: row r then writes slot positions[r, q] and attention reads slots
    0..max(positions); which of those a query may see is the mask's business (`attention.window`). `Forward` writes rows of its
    choice; a Transformers model that is handed the cache as `past_key_values` writes all.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.only: Tensor | None = None  # (b,) the rows that take part, where not all do
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.views: dict[int, tuple[Tensor, ...]] = {}  # of both, as they are written and as they are read
        self.rows: Tensor | None = None  # (B, 1) the first of all B * slots of each row

    def at(self, positions: Tensor) -> "BlockCache":
        """positions (B, Q) long: the slots the next forward writes."""
        if self.only is not None:
            rows = self.slots * self.only[:, None]
        else:
            if self.rows is None or len(self.rows) != len(positions):
                self.rows = self.slots * torch.arange(len(positions), device=positions.device)[:, None]
            rows = self.rows
        self.used, self.index = int(positions.max()) + 1, (positions + rows).flatten()
        return self

    def write(self, index: Tensor, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Writes (N, heads, D_head) where index (N,) of `self.index` says; returns the slots in use, (B, heads, slots, D_head)."""
        if layer not in self.views:
            self._hold(layer, *(new.new_zeros(len(self.rows), self.slots, *new.shape[1:]) for new in (keys, values)))
        to_keys, to_values, keys_read, values_read = self.views[layer]
        to_keys.index_copy_(0, index, keys)
        to_values.index_copy_(0, index, values)
        read = slice(None) if self.only is None else self.only
        return keys_read[read, :, :self.used], values_read[read, :, :self.used]

    def _hold(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys[layer], self.values[layer] = keys, values
        self.views[layer] = keys.flatten(0, 1), values.flatten(0, 1), keys.transpose(1, 2), values.transpose(1, 2)

    def note(self, index: Tensor, hidden: Tensor, keys: Tensor, layer: int) -> None:
        """Told by `Forward` before a write, with the attention inputs (N, D) that keys (N, heads, D_head) were made from; a plain cache has no use for it."""

    def bias(self, bias: Tensor | None, layer: int, heads: int) -> Tensor | None:
        """What is added to the scores of a layer of so many heads, `bias` (b, 1, Q, slots in use) being the mask's; here that alone."""
        return bias

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Called by the attention layers of Transformers with keys and values of all positions, (B, heads, Q, D_head)."""
        return self.write(self.index, keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1), layer)

    def get_seq_length(self, layer: int = 0) -> int:
        """Length that Transformers asks for when position ids are not given; they always are."""
        return self.used

    def keep_rows(self, rows: Tensor) -> None:
        """`rows` (b,) long are the ones that go on: finished ones are missing, those that branch are there more than once."""
        for layer in self.keys:
            self._hold(layer, self.keys[layer][rows], self.values[layer][rows])
