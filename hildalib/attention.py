"""Every attention mask of HILDA, dense and as FlexAttention mask functions.

True = the query (second to last axis) may attend to the key (last axis). Dense masks are (B or 1, 1, Q, KV) bool, the
form SDPA takes; eager attention would silently add a bool mask to the scores, so models are loaded with SDPA.
Entry points: `full`, `block_causal`, `noisy_clean`, `noisy_clean_mod` (FlexAttention), `window`, `spans` and `beside` (cached decoding),
and `tiles`, which leaves out of a dense mask the parts that no query of a stretch may see (TILED, an attention of Transformers).
"""

from functools import lru_cache

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TILED = "sdpa_tiles"  # name of the attention below; a model without `tiles=` in its forward behaves as under "sdpa"
TILE = 128  # queries of a tile: smaller ones skip more keys but call more kernels; below two tiles the dense mask is as fast


def _documents(base: Tensor, doc_ids: Tensor | None, tiles: int) -> Tensor:
    """(Q, KV) mask gated by "same document"; doc_ids (B, L) repeated `tiles` times along the layout -> (., 1, Q, KV)."""
    if doc_ids is None:
        return base[None, None]
    docs = doc_ids.repeat(1, tiles)  # (B, tiles * L)
    return (base.to(docs.device) & (docs[:, :, None] == docs[:, None, :]))[:, None]


def full(doc_ids: Tensor) -> Tensor:
    """All pairs inside a document, no causality: the MDLM step (LLaDA2.0 Eq. 4).

    doc_ids: (B, L) long, -1 for padding. Returns (B, 1, L, L) bool, True = may attend.
    """
    return (doc_ids[:, :, None] == doc_ids[:, None, :])[:, None]


@lru_cache(maxsize=64)  # one dense mask per shape is built once a run; 64 covers every rung of a WSD ladder
def _block_causal(length: int, block_size: int) -> Tensor:
    block = torch.arange(length) // block_size
    return block[:, None] >= block[None, :]


@lru_cache(maxsize=64)
def _noisy_clean(length: int, block_size: int, copies: int, causal_context: bool, pipeline: int, causal_blocks: bool) -> Tensor:
    index = torch.arange((copies + 1) * length)
    return _layout_rule(index[:, None], index[None, :], length, block_size, copies, causal_context, pipeline, causal_blocks)


def _layout_rule(q, k, length: int, block_size: int, copies: int, causal_context: bool, pipeline: int, causal_blocks: bool):
    """The block-diffusion rule (LLaDA2.0 Eq. 3; BD3-LM) for rows q and keys k: parts 0..copies-1 are noisy, part `copies` is clean."""
    part_q, part_k, at_q, at_k = q // length, k // length, q % length, k % length
    block_q, block_k = at_q // block_size, at_k // block_size
    group_q, group_k = block_q // pipeline, block_k // pipeline
    clean_q, clean_k = part_q == copies, part_k == copies
    own_group = ~clean_q & (part_q == part_k) & (group_q == group_k) & (at_q >= at_k if causal_blocks else block_q >= block_k)
    past_clean = ~clean_q & clean_k & (group_q > group_k)
    return own_group | past_clean | (clean_q & clean_k & (at_q >= at_k if causal_context or causal_blocks else block_q >= block_k))


def block_causal(length: int, block_size: int, doc_ids: Tensor | None = None) -> Tensor:
    """Bidirectional inside a block, causal between blocks; block of i = i // block_size from absolute position 0.

    Returns (1, 1, L, L), or (B, 1, L, L) when doc_ids (B, L) gates it; bool, True = may attend. Block size 1 is the
    causal mask, block size L the full one. For L = 4, K = 2 (rows are queries, # = may attend):

        # # . .
        # # . .
        # # # #
        # # # #
    """
    return _documents(_block_causal(length, block_size), doc_ids, 1)


def noisy_clean(length: int, block_size: int, doc_ids: Tensor | None = None, copies: int = 1, causal_context: bool = False,
                pipeline: int = 1, causal_blocks: bool = False) -> Tensor:
    """Mask of the layout [xt_1 | .. | xt_copies | x0], all parts at the same positions 0..L-1.

    A noisy row sees its own block of its own copy and the clean blocks strictly before it; a clean row sees clean
    blocks up to its own (LLaDA2.0 Eq. 3). Several noisy copies share one clean copy, so C copies cost (C + 1) L
    rows and not 2 C L. causal_context: a clean row sees clean rows up to its own instead, so the clean half is the AR model
    that the dLLM comes from (the form is ours). pipeline: in groups of that many blocks a noisy row sees its own block and the noisy
    ones before it, and the clean ones only of earlier groups (D2F, arXiv 2508.09192; groups are ours, D2F has one). causal_blocks: it
    sees nothing to its right even in its own block, nor does a clean row (CARD, arXiv 2601.22031). Returns (1 or B, 1, (C+1)L, (C+1)L) bool, True = may attend; no row is
    ever empty. For L = 4, K = 2, C = 1, without and with causal_context:

        # # . . | . . . .        # # . . | . . . .
        # # . . | . . . .        # # . . | . . . .
        . . # # | # # . .        . . # # | # # . .
        . . # # | # # . .        . . # # | # # . .
        --------+--------        --------+--------
        . . . . | # # . .        . . . . | # . . .
        . . . . | # # . .        . . . . | # # . .
        . . . . | # # # #        . . . . | # # # .
        . . . . | # # # #        . . . . | # # # #
    """
    return _documents(_noisy_clean(length, block_size, copies, causal_context, pipeline, causal_blocks), doc_ids, copies + 1)


def noisy_clean_mod(length: int, block_size: int, doc_ids: Tensor | None = None, copies: int = 1, causal_context: bool = False,
                    pipeline: int = 1, causal_blocks: bool = False):
    """The same rule as a FlexAttention `mask_mod(b, h, q, kv)`, for `create_block_mask` on a GPU."""

    def mask_mod(b, h, q, kv):
        rule = _layout_rule(q, kv, length, block_size, copies, causal_context, pipeline, causal_blocks)
        return rule if doc_ids is None else rule & (doc_ids[b, q % length] == doc_ids[b, kv % length])

    return mask_mod


def window(positions: Tensor, slots: int, block_size: int) -> Tensor:
    """Mask of a cached forward whose slot j holds the key of absolute position j of the same row.

    positions: (B, Q) long, the absolute positions fed; rows may stand at different places. Returns (B, 1, Q, slots)
    bool, True = may attend: every slot of the query's own block and of all blocks before it.
    """
    ends = (positions // block_size + 1) * block_size  # first slot the query may not see
    return (torch.arange(slots, device=positions.device) < ends[:, :, None])[:, None]


def spans(start: Tensor, slots: int, first: Tensor, end: Tensor) -> Tensor:
    """Mask of a cached forward in which a row's open block may stand in several versions behind its committed slots.

    start (b,): the first slot that is not committed; first, end (b, Q): the further slots [first, end) of each query, counted from
    start. Returns (b, 1, Q, slots) bool, True = may attend: all committed slots and these.
    """
    offset = (torch.arange(slots, device=start.device) - start[:, None])[:, None]  # (b, 1, slots)
    return ((offset < 0) | (offset >= first[..., None]) & (offset < end[..., None]))[:, None]


def beside(start: Tensor, slots: int, first: int, seen: Tensor) -> Tensor:
    """Mask of Q queries in the slots from start (b,) + first on: the slots before start, and of one another what seen (Q, Q) says.

    Returns (b, 1, Q, slots) bool, True = may attend.
    """
    offset = torch.arange(slots, device=start.device) - start[:, None]  # (b, slots)
    column, inside = offset - first, (offset >= first) & (offset < first + len(seen))
    own = seen.T[column.clamp(0, len(seen) - 1)] & inside[..., None]  # (b, slots, Q)
    return (own | (offset < 0)[..., None]).transpose(1, 2)[:, None]


@lru_cache(maxsize=64)
def _tile_plan(length: int, block_size: int, copies: int, *rule: bool | int) -> list[tuple[slice, Tensor]]:
    base = _noisy_clean(length, block_size, copies, *rule) if copies else _block_causal(length, block_size)
    starts = [part * length + at for part in range(copies + 1) for at in range(0, length, TILE)]
    rows = [slice(start, start + min(TILE, length - start % length)) for start in starts]
    return [(row, base[row].any(0).nonzero()[:, 0]) for row in rows]


def tiles(mask: Tensor, length: int, block_size: int, copies: int, causal_context: bool = False, pipeline: int = 1,
          causal_blocks: bool = False) -> list[tuple[slice, Tensor, Tensor]] | None:
    """`mask` in stretches of at most TILE queries, each with the keys that any of them may see: (rows, keys (n,), mask part).

    mask: what `noisy_clean` (or, copies = 0, `block_causal`) gave for these arguments. None where tiles would not pay. With C
    copies the dense layout costs ((C + 1) L)^2 scores, its tiles about (C + 1) L^2 / 2. To be passed as `tiles=` to a model
    under attention TILED; every score left out is one that the mask forbids.
    """
    if length < 2 * TILE:
        return None
    plan = [(rows, keys.to(mask.device)) for rows, keys in _tile_plan(length, block_size, copies, causal_context, pipeline, causal_blocks)]
    return [(rows, keys, mask[:, :, rows][..., keys]) for rows, keys in plan]


def _written_out(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, **_):
    """SDPA as two products around a softmax, heads that share keys in one product: at the sizes of a tile half the time of the CPU's fused kernel
    in bfloat16, whose backward is slow. Scores are rounded to bfloat16, as eager attention rounds them. -> (B, rows, heads, D), None."""
    batch, heads, rows, width = query.shape
    shared = heads // key.shape[1]
    query = (query * (scaling or width**-0.5)).reshape(batch, -1, shared * rows, width)
    scores = (query @ key.transpose(-1, -2)).view(batch, -1, shared, rows, key.shape[2]).masked_fill(~mask[:, :, None], -torch.inf)
    return (scores.softmax(-1).to(value).flatten(2, 3) @ value).view(batch, heads, rows, width).transpose(1, 2), None


def _tiled_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, tiles=None, **options):
    """Attention tile by tile; query, key, value (B, heads, rows, D). Without tiles plain SDPA."""
    if tiles is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attend = _written_out if query.device.type == "cpu" and query.dtype == torch.bfloat16 else sdpa_attention_forward
    return torch.cat([attend(module, query[:, :, rows], key[:, :, keys], value[:, :, keys], part, **options)[0] for rows, keys, part in tiles], 1), None


AttentionInterface.register(TILED, _tiled_attention)
AttentionMaskInterface.register(TILED, sdpa_mask)
