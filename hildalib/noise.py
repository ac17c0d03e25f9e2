"""Forward corruption of block diffusion: masks (M2T), wrong tokens (T2T), complements and the model's own drafts.

Absorbing noise with the linear schedule alpha_t = 1 - t: a maskable token is [MASK] with probability t, one t per block.
Entry points: `corrupt`, `complement`, `own_drafts`, `block_rates`, `rising_rates`, `soft_tail`, `suffix_blocks`; all return or take `Noised`,
all tensors (B, L).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noised:
    """A corrupted batch.

    noisy_ids (B, L) long, xt. mask_targets (B, L) bool, True = is [MASK], to be predicted (M2T). edit_targets (B, L) bool,
    True = carries a wrong or drafted token, to be recovered (T2T). t (B, L) float, the mask rate of each position's
    block. maskable (B, L) bool, True = could have been noised; visible maskable tokens that are in neither set are the
    keep targets (their label is the token itself).
    """

    noisy_ids: Tensor
    mask_targets: Tensor
    edit_targets: Tensor
    t: Tensor
    maskable: Tensor

    @property
    def keep_targets(self) -> Tensor:
        """(B, L) bool, True = maskable, shown unchanged."""
        return self.maskable & ~self.mask_targets & ~self.edit_targets


def block_rates(rows: int, blocks: int, *, low: float = 0.0, high: float = 1.0, full_share: float = 0.0,
                generator: torch.Generator | None = None) -> Tensor:
    """(rows, blocks) mask rates, stratified over all blocks (BD3-LM `_sample_t`): one uniform draw in each of the
    rows*blocks equal slices of [low, high], the bandwidth of LLaDA2.0 section 5.1, in random order. A share `full_share`
    of blocks gets t = 1, the state in which every block starts to decode and which a bandwidth below 1 never shows."""
    count = rows * blocks
    slices = torch.randperm(count, generator=generator)
    u = (slices + torch.rand(count, generator=generator)) / count
    rates = low + (high - low) * u
    rates[torch.rand(count, generator=generator) < full_share] = 1.0
    return rates.view(rows, blocks)


def rising_rates(rates: Tensor, group: int, *, high: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """(rows, blocks) mask rates that rise inside each group of `group` blocks, from rates of the same shape (`block_rates`): the first
    block of a group keeps its rate p, each further one adds U(0, 1) (high - p) / (group - 1), and none falls below a rate of its own that is 1
    (D2F, arXiv 2508.09192, as in its code, which draws p from [0.2, 0.7] and has one group a row)."""
    rows, blocks = rates.shape
    groups = -(-blocks // group)
    padded = torch.cat([rates, rates.new_zeros(rows, groups * group - blocks)], 1).view(rows, groups, group)
    first = padded[..., :1]
    steps = torch.rand(padded.shape, generator=generator) * (high - first).clamp(min=0) / max(group - 1, 1)
    steps[..., 0] = 0.0
    rising = torch.maximum(first + steps.cumsum(-1), (padded == 1.0).float().cummax(-1).values)
    return rising.view(rows, -1)[:, :blocks]


def soft_tail(maskable: Tensor, slack: float, *, generator: torch.Generator | None = None) -> Tensor:
    """(B, L) mask rates of CARD's soft tail (arXiv 2601.22031): of n maskable positions N ~ U{1..n} are to be masked, in a window of the last
    W = min(n, slack N) of them, so each there with probability N / W (drawn one by one here; the paper draws exactly N). slack is its lambda,
    whose value is unpublished."""
    count = maskable.sum(1, keepdim=True)
    wanted = (torch.rand(count.shape, generator=generator) * count).floor() + 1
    window = (slack * wanted).floor().clamp(max=count)
    behind = maskable.long().flip(1).cumsum(1).flip(1)  # 1 at the last maskable position
    return torch.where(maskable & (behind <= window), wanted / window.clamp(min=1), 0.0).clamp(max=1.0)


def suffix_blocks(rows: int, blocks: int, share: float, *, generator: torch.Generator | None = None) -> Tensor:
    """(rows, blocks) bool, True = this block's masks are its last positions, the states that left-to-right decoding passes
    through. Random masks rarely hide all that stands right of a token, so much of the loss falls on tokens that the right
    gives away (the form is ours; that random masks are not the states of decoding is the point of TraceRL, arXiv 2509.06949)."""
    return torch.rand(rows, blocks, generator=generator) < share


def _suffix(t: Tensor, block_size: int) -> Tensor:
    """(B, L) bool, True = among the last round(t K) positions of its block, for rates t (B, L)."""
    place = torch.arange(t.shape[1]) % block_size
    return 1 - (place + 0.5) / block_size < t


def _per_position(t, shape: torch.Size, block_size: int) -> Tensor:
    """t given as a number, (B,), (B, L // K rounded up) or (B, L) -> (B, L) float."""
    batch, length = shape
    t = torch.as_tensor(t, dtype=torch.float32)
    if t.ndim == 2 and t.shape[1] != length:
        t = t.repeat_interleave(block_size, dim=1)[:, :length]
    return (t[:, None] if t.ndim == 1 else t).expand(batch, length)


def _random_tokens(x0: Tensor, allowed: Tensor, generator: torch.Generator | None) -> Tensor:
    """A uniformly drawn allowed id different from x0 at every position; `allowed` (A,) sorted ids, A >= 2."""
    rank = torch.searchsorted(allowed, x0)  # where x0 stands among the allowed ids, if it does
    inside = (rank < len(allowed)) & (allowed[rank.clamp(max=len(allowed) - 1)] == x0)
    draw = (torch.rand(x0.shape, generator=generator) * (len(allowed) - inside.long())).long()
    return allowed[(draw + (inside & (draw >= rank)).long()).clamp(max=len(allowed) - 1)]


def corrupt(input_ids: Tensor, maskable: Tensor, *, block_size: int, mask_token_id: int, forbidden_ids,
            edit_rate: float = 0.0, t=None, generator: torch.Generator | None = None, low: float = 0.0, high: float = 1.0,
            full_share: float = 0.0, suffix: Tensor | None = None, vocab_size: int | None = None) -> Noised:
    """One noisy copy of x0 (LLaDA2.1 section 3.1: the M2T and T2T streams in one sequence).

    input_ids (B, L) long; maskable (B, L) bool, True = may be noised (False for prompts and padding). Positions are masked
    with their block's rate t: given as a number, (B,), (B, blocks) or (B, L), else drawn by `block_rates(low, high,
    full_share)`. suffix (B, blocks) bool, True = the last round(t K) positions of this block are masked instead
    (`suffix_blocks`). Of the maskable tokens left visible a share `edit_rate` is replaced by a token drawn uniformly from
    the vocabulary without `forbidden_ids`, [MASK] and x0 itself. vocab_size: ids at or above it are never drawn (default:
    the largest id in sight). CPU tensors; the noise of a `generator` state is always the same.
    """
    shape = input_ids.shape
    if t is None:
        t = block_rates(shape[0], -(-shape[1] // block_size), low=low, high=high, full_share=full_share, generator=generator)
    t = _per_position(t, shape, block_size)
    masked = torch.rand(shape, generator=generator) < t
    if suffix is not None:
        masked = torch.where(_per_position(suffix, shape, block_size) > 0, _suffix(t, block_size), masked)
    masked &= maskable
    noisy = input_ids.masked_fill(masked, mask_token_id)
    edited = torch.zeros_like(masked)
    if edit_rate > 0:
        edited = maskable & ~masked & (torch.rand(shape, generator=generator) < edit_rate)
        noisy = torch.where(edited, _random_tokens(input_ids, allowed_ids(input_ids, mask_token_id, forbidden_ids, vocab_size), generator), noisy)
    return Noised(noisy, masked, edited, t, maskable)


def allowed_ids(input_ids: Tensor, mask_token_id: int, forbidden_ids, vocab_size: int | None) -> Tensor:
    """(A,) sorted ids that may appear as random noise: everything below `vocab_size` but [MASK] and `forbidden_ids`."""
    banned = torch.as_tensor(list(map(int, forbidden_ids)) + [mask_token_id], dtype=torch.long)
    size = vocab_size or int(max(input_ids.max(), banned.max())) + 1
    keep = torch.ones(size, dtype=torch.bool)
    keep[banned[banned < size]] = False
    return keep.nonzero().squeeze(1)


def complement(noised: Noised, input_ids: Tensor, mask_token_id: int, suffix: Tensor | None = None, block_size: int = 1) -> Noised:
    """The complementary row (LLaDA2.0 section 5.1): what was visible is masked, what was masked is visible and clean, at
    rate 1 - t; over both rows every maskable token is an M2T target exactly once. In the blocks of suffix (B, blocks) a
    complement would hide the left and show the right: there the row is another suffix, again of rate 1 - t."""
    masked = ~noised.mask_targets
    if suffix is not None:
        masked = torch.where(_per_position(suffix, masked.shape, block_size) > 0, _suffix(1.0 - noised.t, block_size), masked)
    masked &= noised.maskable
    return Noised(input_ids.masked_fill(masked, mask_token_id), masked, torch.zeros_like(masked), 1.0 - noised.t, noised.maskable)


def own_drafts(noised: Noised, fill: Tensor, predict: Callable[[Tensor], Tensor], turns: int = 1) -> Noised:
    """Multi-turn forward: the model's own mistakes become T2T targets (LLaDA2.1 3.1 names it; the form is ours).

    fill (B, L) bool, a subset of mask_targets: the masks that get a draft. `predict(noisy_ids) -> (B, L) long` is the
    model's argmax at every position, called without gradient `turns` times; each turn rewrites all drafted positions from
    the previous turn's canvas. Drafted positions move from the mask targets to the edit targets, right or wrong: where
    the draft is right the label says keep. Only the ids depend on the model, never the counts of targets.
    """
    fill = fill & noised.mask_targets
    noisy = noised.noisy_ids
    for _ in range(turns):
        noisy = torch.where(fill, predict(noisy), noisy)
    return replace(noised, noisy_ids=noisy, mask_targets=noised.mask_targets & ~fill, edit_targets=noised.edit_targets | fill)
