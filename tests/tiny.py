"""Small random models and rows shared by the tests. Entry points: `tiny`, `text`, `as_rows`, `SPECIALS`."""

import torch
import torch.nn.functional as F

from hildalib import nano

VOCABULARY = "0123456789+-=;"  # what the arithmetic task writes; ids 5..18 after the five specials
FIRST, LAST = 5, 4 + len(VOCABULARY)
EOS, MASK = 2, 3


def tiny(seed=0, shift=True, block_size=4, sharpen=1.0, vocabulary=VOCABULARY, causal=False, **options):
    """A random nano model with its tokenizer; `sharpen` scales its weights so that confidences spread over (0, 1)."""
    model, tokenizer = nano.nano(32, 2, 2, vocabulary=vocabulary, seed=seed, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= sharpen if parameter.ndim > 1 else 1.0
    model.config.hilda = model.config.hilda | {"block_size": block_size, "label_shift": shift, "causal_context": causal}
    return model, tokenizer


def text(rows=2, length=16, seed=0, documents=False):
    """(ids, doc_ids), each (rows, length); with `documents` a border at 7, which is no block border."""
    ids = torch.randint(FIRST, LAST + 1, (rows, length), generator=torch.Generator().manual_seed(seed))
    docs = (torch.arange(length) >= 7).long() if documents else torch.zeros(length, dtype=torch.long)
    return ids, docs.expand(rows, -1).contiguous()


def as_rows(ids, docs=None, maskable=None):
    docs = torch.zeros_like(ids) if docs is None else docs
    return {"input_ids": ids, "doc_ids": docs, "maskable": torch.ones_like(ids, dtype=torch.bool) if maskable is None else maskable}


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def padded(prompts):
    """Prompts (each (P,) long) as a left-padded batch: ids (B, P) and which of them are real."""
    width = max(map(len, prompts))
    return (torch.stack([F.pad(p, (width - len(p), 0), value=EOS) for p in prompts]),
            torch.stack([F.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]))
