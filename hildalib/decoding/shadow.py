"""The shadow of a block: extra rows of the same forward that predict each position without seeing its token (WINO).

Nothing attends to the shadow, so the block's own logits stay what they were. With more than one layer a shadow row still sees its
token through its neighbours: an optimistic verifier. Entry points: `rows`, `count`, `table`, `window`.
"""

import torch
from torch import Tensor


def rows(block: Tensor, start: Tensor, mask_id: int, shift: bool) -> tuple[Tensor, Tensor]:
    """(ids, positions), each (b, S): the shadow of `block` (b, K) long whose first position is `start` (b, 1).

    Unshifted, S = K: [MASK] at every position i, whose row predicts it. Shifted, S = 2 (K - 1): [MASK] at positions 1..K-1, then
    the tokens before them again, whose rows predict them; position 0 is predicted from the block before, which never sees it.
    """
    column = torch.arange(block.shape[1], device=block.device)
    if not shift:
        return torch.full_like(block, mask_id), start + column
    ids = torch.cat([torch.full_like(block[:, 1:], mask_id), block[:, :-1]], 1)
    return ids, start + torch.cat([column[1:], column[:-1]])


def count(size: int, shift: bool) -> int:
    """S, the rows of the shadow of a block of `size`."""
    return 2 * (size - 1) if shift else size


def table(size: int, shift: bool, isolated: bool, device) -> Tensor:
    """(S, K + S) bool, True = the shadow row may attend to that position of the block, or of the shadow."""
    own = torch.eye(size, dtype=torch.bool, device=device)
    if not shift:
        return torch.cat([~own, own if isolated else torch.ones_like(own)], 1)
    hidden, again = own[1:], own[:-1]  # position i, and i - 1, which its predicting row stands for
    masks = again[:, :-1] if isolated else torch.ones_like(again[:, :-1])
    none = torch.zeros_like(masks)
    return torch.cat([torch.cat([~hidden, masks, none], 1), torch.cat([~(hidden | again), masks, again[:, :-1]], 1)])


def window(start: Tensor, size: int, slots: int, first: int, shift: bool, isolated: bool) -> Tensor:
    """(b, 1, S, slots) bool, True = may attend: the blocks before, and of its own block and shadow what `table` says.

    start (b, 1): slot of the block's first position; the shadow's keys are in the slots from start + first on.
    """
    rule = table(size, shift, isolated, start.device)
    offset = torch.arange(slots, device=start.device) - start
    column = torch.where((offset >= 0) & (offset < size), offset, -1)
    column = torch.where((offset >= first) & (offset < first + count(size, shift)), offset - first + size, column)
    seen = rule.T[column.clamp(min=0)] & (column >= 0)[..., None]  # (b, slots, S)
    return (seen | (offset < 0)[..., None]).transpose(1, 2)[:, None]
