"""What a model thought of a mask one forward ago, put into that mask's embedding in the next: Residual Context Diffusion and a cousin of it.

`Residual` (RCD) wants a model trained for it (`Recipe.residual_share`), `Smoothing` (dInfer) wants none. Both are called with the aligned
logits (n, V) of n masks, [MASK] barred, and return (n, D), which is added to the embedding of [MASK] there; decoders and trainers
decide which masks. Entry points: `Residual`, `Smoothing`, `carry`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import HildaError


def _expected(probabilities: Tensor, embedding, top_k: int) -> Tensor:
    """(n, D): the mean input embedding under probabilities (n, V), or under their top_k renormalised."""
    weight = embedding.weight
    if not top_k:
        return probabilities.to(weight.dtype) @ weight
    share, ids = probabilities.topk(min(top_k, probabilities.shape[-1]))
    return F.embedding_bag(ids, weight, per_sample_weights=(share / share.sum(-1, keepdim=True)).to(weight.dtype), mode="sum")


@dataclass(frozen=True)
class Residual:
    """e_i = (1 - a_i) E[MASK] + a_i sum_v p_i(v) E(v) with a_i = weight H(p_i) / ln V (arXiv 2601.22954 v2, Eqs. 1 to 3): where the
    forward before was unsure, the mask says what it expected. weight 0: nothing is carried.

    temperature: T_res of Algorithm 2, of the distribution whose entropy is taken (0.92 and 0.98 in secondary sources); tempered: the
    expectation is taken under it too, as section 3.3 has it and Algorithm 2 has not. top_k: the expectation under the k most probable
    tokens, renormalised (ours), for over all V it costs as much as the output head; 0: all. The entropy is always that of all V.
    """

    weight: float = 1.0
    temperature: float = 1.0
    tempered: bool = False
    top_k: int = 0

    def __post_init__(self):
        if not 0 <= self.weight <= 1 or not self.temperature > 0 or self.top_k < 0:
            raise HildaError(f"{self}: weight must be in [0, 1], temperature above 0 and top_k at least 0 (0: all tokens)")

    def __call__(self, logits: Tensor, embedding, mask_id: int, forwards: Tensor | None = None) -> Tensor:
        """(n, D) from logits (n, V); embedding: the model's input embedding, a module with a weight (V, D)."""
        plain, tempered = logits.float().softmax(-1), (logits.float() / self.temperature).softmax(-1)
        share = self.weight * torch.special.entr(tempered).sum(-1, keepdim=True) / math.log(logits.shape[-1])
        mask = embedding(torch.tensor([mask_id], device=logits.device))
        return share.to(mask.dtype) * (_expected(tempered if self.tempered else plain, embedding, self.top_k) - mask)


@dataclass(frozen=True)
class Smoothing:
    """e_i = E[MASK] + w sum_v p_i(v) E(v), w = min(start + growth * forwards, most), forwards those of the sequence before this one: the
    iteration smoothing of dInfer (arXiv 2510.08666; read in its code), for models never trained for it. Its threshold, which falls by 0.02 a
    forward from 1, is left out: it acts on who is written, and answers of a few blocks end before it has fallen."""

    start: float = 0.15
    growth: float = 0.02
    most: float = 0.3
    temperature: float = 1.0

    def __call__(self, logits: Tensor, embedding, mask_id: int, forwards: Tensor) -> Tensor:
        """(n, D) from logits (n, V) and the forwards (n,) that each mask's row has behind it, the one that gave the logits included."""
        share = (self.start + self.growth * (forwards - 1)).clamp(max=self.most)
        return share[:, None].to(embedding.weight.dtype) * _expected((logits.float() / self.temperature).softmax(-1), embedding, 0)


def carry(embeds: Tensor, masks: Tensor, added: Tensor) -> Tensor:
    """embeds (..., D) with added (n, D) at the True positions of masks (...), in row-major order."""
    return embeds + torch.zeros_like(embeds).masked_scatter(masks[..., None], added)
