"""A key-value cache with one slot per absolute position, so that a block in progress is simply written over.

Commit is free: the last forward that saw a block's final tokens has left its keys in place. Nothing is cropped,
concatenated or copied, and rows of a batch may stand at different blocks. Entry point: `BlockCache`.
"""

import torch
from torch import Tensor


class BlockCache:
    """Keys and values of shape (B, heads, slots, D_head) a layer, handed to a Transformers model as `past_key_values`.

    Call `at(positions)` before each forward: row r then writes slot positions[r, q] and attention reads slots
    0..max(positions); which of those a query may see is the mask's business (`attention.window`).
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.only: Tensor | None = None  # (b,) the rows that take part, where not all do
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def at(self, positions: Tensor) -> "BlockCache":
        """positions (B, Q) long: the slots the next forward writes."""
        self.positions, self.used = positions, int(positions.max()) + 1
        self.rows = (torch.arange(len(positions), device=positions.device) if self.only is None else self.only)[:, None]
        return self

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Called by the attention layers: writes (B, heads, Q, D_head) and returns the slots in use."""
        for store, new in ((self.keys, keys), (self.values, values)):
            if layer not in store:
                batch, heads, _, width = new.shape
                store[layer] = new.new_zeros(batch, heads, self.slots, width)
            store[layer][self.rows, :, self.positions] = new.transpose(1, 2)
        read = slice(None) if self.only is None else self.only
        return self.keys[layer][read, :, :self.used], self.values[layer][read, :, :self.used]

    def get_seq_length(self, layer: int = 0) -> int:
        """Length that Transformers asks for when position ids are not given; they always are."""
        return self.used

    def keep_rows(self, rows: Tensor) -> None:
        """`rows` (b,) long are the ones that go on: finished ones are missing, those that branch are there more than once."""
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows]
