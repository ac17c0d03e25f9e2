"""Greedy or sampled AR decoding of the twin, counted like the diffusion decoders.

Entry points: `ar_decode`; `generate_decode`, the same by Transformers' `generate`; `story_writer`, which has a language model continue openings (the embedded corpus).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from hildalib import attention
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.decoded import Decoded, blank, check_context, check_prompts, eos_ids, left_padded
from hildalib.decoding.forward import Forward


@torch.inference_mode()
def ar_decode(model, prompt_ids: Tensor, *, max_new_tokens: int, attention_mask: Tensor | None = None, temperature: float = 0.0,
              seed: int = 0, beams: int = 1) -> Decoded:
    """Next-token decoding with a KV cache, [MASK] barred; arguments and result as in `edit_decode`. Greedy, it runs the same `Forward` as the
    diffusion decoders and is faster than Transformers' `generate`, whose tokens it writes; models that `Forward` has no straight lines for,
    sampling and beam search go through `generate`.

    forwards of a row = the tokens it generated, EOS included (the prompt's forward gives the first one);
    positions_fed = its prompt and all generated tokens but the last. beams: its beam search, `beams` times that cost: what it goes on to spend
    after the best text has ended is not counted.
    """
    lengths = left_padded(prompt_ids, attention_mask)
    check_prompts(lengths)
    check_context(model, prompt_ids.shape[1] + max_new_tokens)
    eos, forward = eos_ids(model), Forward(model)
    if not forward.straight or temperature or beams > 1:
        return generate_decode(model, prompt_ids, max_new_tokens=max_new_tokens, attention_mask=attention_mask, temperature=temperature, seed=seed, beams=beams)
    return _decoded(_greedy(forward, prompt_ids, lengths, max_new_tokens, eos, _barred(model)), lengths, eos)


def generate_decode(model, prompt_ids: Tensor, *, max_new_tokens: int, attention_mask: Tensor | None = None, temperature: float = 0.0, seed: int = 0,
                    beams: int = 1) -> Decoded:
    """Transformers' `generate` with its KV cache, [MASK] barred; arguments and result as in `ar_decode`."""
    lengths, eos = left_padded(prompt_ids, attention_mask), eos_ids(model)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    attention_mask = torch.ones_like(prompt_ids) if attention_mask is None else attention_mask
    with torch.random.fork_rng(devices=[prompt_ids.device] if prompt_ids.is_cuda else []):  # `generate` knows only the global generator
        torch.manual_seed(seed)
        out = model.generate(prompt_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, eos_token_id=eos or None,
                             pad_token_id=eos[0] if eos else 0, num_beams=beams, suppress_tokens=_barred(model) or None, **sampling)
    return _decoded(out[:, prompt_ids.shape[1]:], lengths, eos, beams)


def _barred(model) -> list[int]:
    record = getattr(model.config, "hilda", None)
    return [record["mask_token_id"]] if record else []


def _decoded(ids: Tensor, lengths: Tensor, eos: list[int], beams: int = 1) -> Decoded:
    ended = torch.isin(ids, torch.tensor(eos, dtype=torch.long, device=ids.device)) if eos else torch.zeros_like(ids, dtype=torch.bool)
    count = (ended.long().cumsum(1) - ended.long() == 0).sum(1)  # tokens up to and with the first EOS
    return Decoded(ids, beams * count, beams * (lengths + count - 1))


def _greedy(forward: Forward, prompt_ids: Tensor, lengths: Tensor, max_new_tokens: int, eos: list[int], barred: list[int]) -> Tensor:
    """(B, max_new_tokens): the argmax, token by token, EOS after the first EOS; finished rows leave the batch."""
    device, width = prompt_ids.device, int(lengths.max())
    out = torch.full((len(prompt_ids), max_new_tokens), eos[0] if eos else 0, device=device)
    live, ends, cache = torch.arange(len(out), device=device), torch.tensor(eos, dtype=torch.long, device=device), BlockCache(width + max_new_tokens)
    ids, positions = blank(prompt_ids, lengths, width, 0), torch.arange(width, device=device).expand(len(out), -1)
    real, wanted = positions < lengths[:, None], live * width + lengths - 1
    for number in range(max_new_tokens):
        cache.at(positions)
        mask = None if number and len(live) == 1 else attention.window(positions, cache.used, 1)  # one row sees all that it has written
        logits = forward(ids, positions, mask, cache, None if number else wanted, real=None if number or len(live) == 1 else real)
        if barred:
            logits[:, barred] = -torch.inf
        token = logits.max(-1).indices  # in bfloat16 a quarter of the time of argmax
        out[live, number] = token
        if eos and (done := torch.isin(token, ends)).any():
            kept = (~done).nonzero()[:, 0]
            live, lengths, token = live[kept], lengths[kept], token[kept]
            if not len(live):
                break
            cache.keep_rows(kept)
        ids, positions = token[:, None], (lengths + number)[:, None]
    return out


def story_writer(name: str = "smollm2-135m", max_new_tokens: int = 160, temperature: float = 0.7) -> Callable[[list[str], int], list[str]]:
    """A writer (openings, seed) -> continuations for `corpora.load("stories-smollm2")`; the model is loaded at its first call.

    A continuation ends at EOS, or after the last full sentence within max_new_tokens. Cooler than 1: a 135 M model wanders off.
    """
    held = []

    def write(openings: list[str], seed: int) -> list[str]:
        from hildalib import backbones

        if not held:
            held.extend(backbones.load(name))
        model, tokenizer = held
        encoded = tokenizer(openings, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(model.device)
        decoded = ar_decode(model, encoded["input_ids"], max_new_tokens=max_new_tokens, attention_mask=encoded["attention_mask"],
                            temperature=temperature, seed=seed)
        texts = [tokenizer.decode(ids[:count], skip_special_tokens=True) for ids, count in zip(decoded.ids, decoded.forwards.tolist())]
        return [text if count < max_new_tokens else whole_sentences(text) for text, count in zip(texts, decoded.forwards.tolist())]

    return write


def whole_sentences(text: str) -> str:
    """`text` up to its last full stop, question or exclamation mark (with a closing quote); all of it if there is none."""
    ends = list(re.finditer(r"[.!?][\"\u201d]?(?=\s|$)", text))
    return text[:ends[-1].end()] if ends else text
