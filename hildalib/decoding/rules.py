"""Who is written and who is revised in one step of a block: small functions of confidences and the canvas.

All tensors are (B, K); every function returns a bool mask, True = is written now. Entry points: `choose`, `fill`, `edit`.
"""

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(tokens, confidence), each (B, K), from aligned logits (B, K, V) whose [MASK] entry is already -inf.

    Temperature 0: the argmax. Otherwise a Gumbel-max sample in float64 (low precision distorts samples). The confidence
    is the plain softmax probability of the chosen token in float32, never that of a tempered or filtered distribution.
    """
    probabilities = logits.float().softmax(-1)
    if temperature == 0:
        confidence, tokens = probabilities.max(-1)
        return tokens, confidence
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    tokens = (logits.double() / temperature - (-uniform.log()).log()).argmax(-1)
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]


def fill(confidence: Tensor, masked: Tensor, tau_mask: float, minimum: int = 1) -> Tensor:
    """Gamma of LLaDA2.1 Eq. 1: masked positions more confident than tau_mask (strictly); where fewer than `minimum` pass,
    the `minimum` most confident masked ones instead, so that every forward makes progress."""
    passed = masked & (confidence > tau_mask)
    ranked = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(masked).scatter(-1, ranked[..., :minimum], True) & masked
    return torch.where((passed.sum(-1) < minimum)[..., None], best, passed)


def edit(tokens: Tensor, confidence: Tensor, current: Tensor, editable: Tensor, tau_edit: float) -> Tensor:
    """Delta of LLaDA2.1 Eq. 2: editable positions whose chosen token differs from the current one and is more confident
    than tau_edit (strictly). tau_edit = 0 edits on every change of mind; tau_edit >= 1 never edits."""
    return editable & (tokens != current) & (confidence > tau_edit)
