"""Greedy or sampled AR decoding of the twin, counted like the diffusion decoders. Entry point: `ar_decode`."""

import torch
from torch import Tensor

from hildalib.decoding.edit import Decoded, check_context, eos_ids


@torch.inference_mode()
def ar_decode(model, prompt_ids: Tensor, *, max_new_tokens: int, attention_mask: Tensor | None = None, temperature: float = 0.0,
              seed: int = 0) -> Decoded:
    """Transformers' `generate` with its KV cache, [MASK] barred; arguments and result as in `edit_decode`.

    forwards of a row = the tokens it generated, EOS included (the prompt's forward gives the first one);
    positions_fed = its prompt and all generated tokens but the last.
    """
    attention_mask = torch.ones_like(prompt_ids) if attention_mask is None else attention_mask
    check_context(model, prompt_ids.shape[1] + max_new_tokens)
    eos, record = eos_ids(model), getattr(model.config, "hilda", None)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    out = model.generate(prompt_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, eos_token_id=eos or None,
                         pad_token_id=eos[0] if eos else 0, suppress_tokens=[record["mask_token_id"]] if record else None, **sampling)
    ids = out[:, prompt_ids.shape[1]:]
    ended = torch.isin(ids, torch.tensor(eos, dtype=torch.long, device=ids.device)) if eos else torch.zeros_like(ids, dtype=torch.bool)
    count = (ended.long().cumsum(1) - ended.long() == 0).sum(1)  # tokens up to and with the first EOS
    return Decoded(ids, count, attention_mask.sum(1) + count - 1)
