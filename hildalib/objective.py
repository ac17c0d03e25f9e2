"""Losses of block diffusion: M2T, T2T, keep, confidence (CAP), the pull toward the frozen AR parent, and the ELBO.

Logits handed to a public function are aligned: row i predicts x0[i]. `source_rows` says which hidden row that is, shifted
or not. Entry points: `diffusion_loss`, `Losses`, `source_rows`, `parent_kl`, `elbo`, `exact_elbo`.
"""

from dataclasses import dataclass
from itertools import product
from math import factorial

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import HildaError, attention
from hildalib.noise import Noised

EDIT_WEIGHT = 0.5  # unpublished in LLaDA2.1; ours, from the nano probes: T2T rows repeat easy context, M2T carries the task


@dataclass(frozen=True)
class Losses:
    """Scalars in nats: `total` = m2t + edit_weight * t2t + keep_weight * keep."""

    total: Tensor
    m2t: Tensor
    t2t: Tensor
    keep: Tensor


def _mean(values: Tensor, where: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum of values on `where` over their number (or `count`); 0 and not NaN when there is none."""
    return values.masked_fill(~where, 0.0).sum() / (where.sum() if count is None else count).clamp(min=1)


def target_counts(noised: Noised, weighting: str) -> dict[str, Tensor]:
    """Denominators of one batch; summed over micro-batches and processes they make accumulated = whole-batch losses."""
    if weighting not in ("1/t", "mean", "context"):
        raise HildaError(f"weighting {weighting!r} is unknown; use '1/t', 'mean' or 'context'")
    m2t = noised.mask_targets if weighting == "mean" else noised.maskable
    return {"m2t": m2t.sum(), "t2t": noised.edit_targets.sum(), "keep": noised.keep_targets.sum()}


def combine(token_loss: Tensor, noised: Noised, *, weighting: str = "1/t", edit_weight: float = EDIT_WEIGHT,
            keep_weight: float = 0.0, counts: dict[str, Tensor] | None = None) -> Losses:
    """Losses from token_loss (B, L), the cross-entropy (or KL) in nats at each target, anything elsewhere.

    "1/t": sum of loss / t over masked positions, divided by the number of maskable positions (LLaDA2.0 Eq. 1-2, LLaDA
    guidelines); unbiased for the ELBO. "mean": mean over masked positions (dFactory). "context": over all maskable positions, visible
    ones too, by how much of what stands left of them can be seen (`context_weights`). T2T and keep have no weights
    and are plain means. counts: `target_counts` of the whole optimiser step when the batch is one part of it.
    """
    counts = counts or target_counts(noised, weighting)
    # a complement has t = 0 where nothing is masked: 1/t must not become infinite there, not even in the gradient
    weight = 1.0 / noised.t.masked_fill(~noised.mask_targets, 1.0) if weighting == "1/t" else torch.ones_like(noised.t)
    where = noised.mask_targets
    if weighting == "context":
        weight, where = context_weights(noised.mask_targets), noised.maskable
    m2t = _mean(token_loss * weight, where, counts["m2t"])
    t2t = _mean(token_loss, noised.edit_targets, counts["t2t"])
    keep = _mean(token_loss, noised.keep_targets, counts["keep"])
    return Losses(m2t + edit_weight * t2t + keep_weight * keep, m2t, t2t, keep)


def context_weights(masked: Tensor, decay: float = 0.5, floor: float = 1.0) -> Tensor:
    """(B, L) weights of CARD's loss (arXiv 2601.22031): w_n = 1 / (floor + S_n) with S_n = C_{n-1} + (1 - decay) S_{n-1}, where C_i counts a
    masked position i (B, L) once, and once more behind another mask. decay and floor are the paper's p and beta, known at second hand only."""
    cost = masked.float() * (1 + F.pad(masked[:, :-1].float(), (1, 0)))
    seen, weights = torch.zeros_like(cost[:, 0]), []
    for column in cost.unbind(1):
        weights.append(1 / (floor + seen))
        seen = column + (1 - decay) * seen
    return torch.stack(weights, 1)


def diffusion_loss(logits: Tensor, input_ids: Tensor, noised: Noised, *, weighting: str = "1/t",
                   edit_weight: float = EDIT_WEIGHT, keep_weight: float = 0.0) -> Losses:
    """M2T + T2T loss of aligned logits (B, L, V) against x0 = input_ids (B, L); see `combine` for the weighting."""
    token_loss = F.cross_entropy(logits.float().flatten(0, 1), input_ids.flatten(), reduction="none").view_as(input_ids)
    return combine(token_loss, noised, weighting=weighting, edit_weight=edit_weight, keep_weight=keep_weight)


def predictable(maskable: Tensor, doc_ids: Tensor, label_shift: bool) -> Tensor:
    """(B, L) bool: maskable positions that have a source row. Shifted, the first token of a document has none: the row
    before it belongs to another document (or does not exist), just as in the AR parent's next-token loss."""
    if not label_shift:
        return maskable & (doc_ids >= 0)
    same = F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (1, 0), value=False)
    return maskable & same & (doc_ids >= 0)


def source_rows(length: int, block_size: int, label_shift: bool, *, copies: int = 1, clean: bool = True) -> Tensor:
    """(copies, L) long: the row of the layout [xt_1 | .. | xt_copies | x0] whose logits predict position i of each copy.

    Unshifted: the position's own noisy row. Shifted: row i - 1, which for the first position of a block is the clean
    half's last row of the previous block; it has seen what the AR parent saw, so the shift is well posed. clean=False:
    the clean half was dropped (block size = L). Position 0 has no shifted source; the entry there is its own row.
    """
    position = torch.arange(length)
    if not label_shift:
        return position + length * torch.arange(copies)[:, None]
    before = (position - 1).clamp(min=0)
    rows = before + length * torch.arange(copies)[:, None]
    if clean:
        rows = torch.where((position % block_size == 0) & (position > 0), before + length * copies, rows)
    return rows


def parent_kl(logits: Tensor, teacher_logp: Tensor, teacher_ids: Tensor) -> Tensor:
    """KL(parent || student) per row, in nats, over the parent's top-k tokens and one bucket for all the others.

    logits (N, V) student; teacher_logp (N, k) the parent's log probabilities of teacher_ids (N, k). Exact when k = V;
    otherwise a lower bound (merging outcomes loses information). OPDLM's top-k form has no tail bucket; with it the
    student cannot lower the loss by leaking mass into the tail.
    """
    return top_k_kl(logits.float().log_softmax(-1).gather(1, teacher_ids), teacher_logp)


def top_k_kl(student: Tensor, teacher_logp: Tensor) -> Tensor:
    """`parent_kl` of the student's log probabilities (N, k) at the teacher's tokens."""
    p = teacher_logp.exp()
    inside = (p * (teacher_logp - student).masked_fill(p == 0, 0.0)).sum(-1)  # a barred [MASK] is impossible under both
    floor = torch.finfo(torch.float32).eps  # a tail below one ulp is no tail; keeps log finite at k = V
    tail_p, tail_q = (1 - p.sum(-1)).clamp(min=0), (1 - student.exp().sum(-1)).clamp(min=floor)
    return inside + torch.where(tail_p > floor, tail_p * (tail_p.clamp(min=floor).log() - tail_q.log()), torch.zeros_like(tail_p))


def correct_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """CAP (LLaDA2.0 section 5.2; dParallel): (entropy in nats where the argmax is right, else 0; whether it is right), each (N,).

    logits (N, V), labels (N,). Minimising its mean over right rows makes right predictions sure, so that more of them pass tau_mask.
    """
    logp = logits.float().log_softmax(-1)
    right = logp.argmax(-1) == labels
    lowest = torch.finfo(logp.dtype).min  # the barred [MASK] has -inf, and 0 * -inf would be nan
    return -(logp.exp() * logp.clamp(min=lowest)).sum(-1) * right, right


@torch.no_grad()
def aligned_logits(model, x0: Tensor, noisy: Tensor, block_size: int, doc_ids: Tensor | None = None) -> Tensor:
    """(B, L, V) aligned logits of a noisy canvas (B, L) beside its clean copy (B, L), [MASK] barred from the output."""
    batch, length = x0.shape
    record = model.config.hilda
    mask = attention.noisy_clean(length, block_size, doc_ids, causal_context=record.get("causal_context", False),
                                 causal_blocks=record.get("causal_blocks", False)).to(x0.device)
    positions = torch.arange(length, device=x0.device).repeat(2).expand(batch, -1)
    logits = model(input_ids=torch.cat([noisy, x0], 1), attention_mask=mask, position_ids=positions, use_cache=False).logits
    rows = source_rows(length, block_size, record["label_shift"])[0].to(x0.device)
    logits = logits[:, rows].float()
    logits[..., record["mask_token_id"]] = -torch.inf
    return logits


def _masked_nll(model, input_ids: Tensor, masked: Tensor, block_size: int) -> Tensor:
    """(B, L) nats of x0 at the masked positions, 0 elsewhere."""
    noisy = input_ids.masked_fill(masked, model.config.hilda["mask_token_id"])
    logits = aligned_logits(model, input_ids, noisy, block_size)
    nll = F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none").view_as(input_ids)
    return torch.where(masked, nll, torch.zeros_like(nll))


def _block_sizes(maskable: Tensor, block_size: int) -> Tensor:
    """(B, L): how many maskable positions the block of each position holds."""
    return _block_sum(maskable.float(), block_size)


def _block_sum(values: Tensor, block_size: int) -> Tensor:
    """(B, L): each position's block total of values (B, L)."""
    batch, length = values.shape
    padded = F.pad(values, (0, -length % block_size)).view(batch, -1, block_size)
    return padded.sum(-1, keepdim=True).expand_as(padded).reshape(batch, -1)[:, :length]


def elbo(model, input_ids: Tensor, maskable: Tensor, *, block_size: int, samples: int = 8,
         generator: torch.Generator | None = None) -> Tensor:
    """(B,) nats: Monte-Carlo estimate of the block ELBO, an upper bound on -log p(maskable tokens | the rest).

    Each sample draws, per block of n maskable positions, m uniform in 1..n and masks a random subset of m with weight n/m:
    the same expectation as t ~ U(0, 1] with weight 1/t (LLaDA guidelines, Eq. 6) without its heavy tail. All blocks of a
    sample share one noisy+clean forward. maskable (B, L) bool, True = is scored; the [MASK] logit is barred.
    """
    total = torch.zeros(len(input_ids), device=input_ids.device)
    sizes = _block_sizes(maskable, block_size)
    length = input_ids.shape[1]
    for _ in range(samples):
        u = torch.rand(input_ids.shape[0], -(-length // block_size), generator=generator)
        u = u.repeat_interleave(block_size, 1)[:, :length].to(input_ids.device)
        count = (u * sizes).floor().clamp(max=(sizes - 1).clamp(min=0)) + 1  # m, the same for all positions of a block
        order = torch.rand(input_ids.shape, generator=generator).to(input_ids.device).masked_fill(~maskable, torch.inf)
        masked = maskable & (_rank_in_block(order, block_size) < count)
        total += (_masked_nll(model, input_ids, masked, block_size) * sizes / count).sum(1)
    return total / samples


def _rank_in_block(order: Tensor, block_size: int) -> Tensor:
    """(B, L): the rank of order (B, L) inside its block, 0 = smallest."""
    batch, length = order.shape
    padded = F.pad(order, (0, -length % block_size), value=torch.inf).view(batch, -1, block_size)
    return padded.argsort(-1).argsort(-1).reshape(batch, -1)[:, :length].float()


def exact_elbo(model, input_ids: Tensor, maskable: Tensor, *, block_size: int) -> Tensor:
    """(B,) nats: the same bound by enumeration of all 2^n masks of each block; for the audit of `elbo`, n <= ~10.

    The mask of a given m-subset has weight (m-1)! (n-m)! / n!, the integral of t^(m-1) (1-t)^(n-m) over t.
    """
    totals = []
    for ids, allowed in zip(input_ids, maskable):
        total = torch.zeros((), device=ids.device)
        for start in range(0, len(ids), block_size):
            spots = [i for i in range(start, min(start + block_size, len(ids))) if allowed[i]]
            for pattern in product([False, True], repeat=len(spots)):
                if m := sum(pattern):
                    masked = torch.zeros_like(allowed)
                    masked[[i for i, on in zip(spots, pattern) if on]] = True
                    weight = factorial(m - 1) * factorial(len(spots) - m) / factorial(len(spots))
                    total = total + weight * _masked_nll(model, ids[None], masked[None], block_size).sum()
        totals.append(total)
    return torch.stack(totals)
