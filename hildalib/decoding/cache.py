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
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def at(self, positions: Tensor) -> "BlockCache":
        """positions (B, Q) long: the slots the next forward writes."""
        self.batch, self.used = len(positions), int(positions.max()) + 1
        self.index = (positions + self.slots * torch.arange(self.batch, device=positions.device)[:, None]).flatten()  # of all B * slots
        return self

    def write(self, index: Tensor, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Writes (N, heads, D_head) where index (N,) of `self.index` says; returns the slots in use, (B, heads, slots, D_head)."""
        for store, new in ((self.keys, keys), (self.values, values)):
            if layer not in store:
                store[layer] = new.new_zeros(self.batch, self.slots, *new.shape[1:])
            store[layer].flatten(0, 1).index_copy_(0, index, new)
        return self.keys[layer][:, :self.used].transpose(1, 2), self.values[layer][:, :self.used].transpose(1, 2)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Called by the attention layers of Transformers with keys and values of all positions, (B, heads, Q, D_head)."""
        return self.write(self.index, keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1), layer)

    def get_seq_length(self, layer: int = 0) -> int:
        """Length that Transformers asks for when position ids are not given; they always are."""
        return self.used

    def keep_rows(self, rows: Tensor) -> None:
        """Drops finished rows: `rows` (b,) long are the ones that go on."""
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows]
