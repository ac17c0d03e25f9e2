"""What an export computes beside its source: the same random text through both, under a causal mask and one of blocks.

Entry points: `logits_of` a model on `sample`, `compared` -> `Exported`, `checked` (its words).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hildalib import attention


@dataclass(frozen=True)
class Exported:
    """What was written. difference: largest |logit - source's logit| as a share of the largest logit; kl: mean nats of KL(source, export);
    same: share of rows of equal argmax."""

    form: str
    folder: Path
    difference: float
    kl: float
    same: float
    note: str = ""

    def __str__(self) -> str:
        checked = (f"read back: logits differ by at most {self.difference:.1e} of the largest, KL {self.kl:.1e} nats, the same most likely token in "
                   f"{100 * self.same:.1f} % of rows")
        return "\n".join(filter(None, [f"{self.form}: {self.folder}", checked, self.note]))


def sample(model) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (2, 24) long, positions (2, 24) long, masks (2, 2, 1, 24, 24) bool): random text, read causally and in blocks."""
    size = (getattr(model.config, "hilda", None) or {}).get("block_size") or 1
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    masks = torch.stack([attention.block_causal(24, one)[:1].expand(2, -1, -1, -1) for one in (1, size)])
    return ids, torch.arange(24).expand(2, -1).contiguous(), masks


@torch.inference_mode()
def logits_of(model, masked: bool = True) -> Tensor:
    """(n, 2, 24, V) float32 logits of `sample`; masked: under both masks, else as a plain causal LM reads them."""
    ids, positions, masks = (part.to(model.device) for part in sample(model))
    if not masked:
        return model(input_ids=ids, use_cache=False).logits.float().cpu()[None]
    return torch.stack([model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits.float().cpu() for mask in masks])


def compared(form: str, folder: Path, found: Tensor, source: Tensor, note: str = "") -> Exported:
    """Of the logits (n, 2, 24, V) that were read back, `found`, beside those of the source."""
    ours, theirs = source.log_softmax(-1), found.log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean()
    largest = float((found - source).abs().max() / source.abs().max().clamp(min=1.0))
    return Exported(form, folder, largest, max(float(kl), 0.0), float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()), note)


def checked(exported: Exported) -> str:
    """What reading it back showed, in words, without form and folder."""
    return str(exported).partition("\n")[2]
