"""HILDA: small autoregressive LMs turned into editable block-diffusion LMs, and what each idea buys.

One notation everywhere: B batch, L length, K block size, V vocabulary, D hidden; t mask rate in (0, 1];
x0 clean ids, xt noisy ids; M2T mask-to-token, T2T token-to-token edit; NFE forwards, TPF generated tokens
per forward. Entry points: `generate` here, `python -m hildalib` on the command line, `notebooks/` for the book.
"""

import logging

__version__ = "0.1.0"

# What Transformers and peft import says in every process which kernels it has not found: torchao those of other machines, bitsandbytes one on a hub.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class HildaError(Exception):
    """An error a user can act on: its message names the file or key at fault and the remedy."""


def generate(prompt: str, model="smollm2-135m-dllm", mode: str = "Q", tau_mask: float | None = None,
             tau_edit: float | None = None, max_new_tokens: int = 128, seed: int = 0, chat: bool = False) -> str:
    """Text that the editable dLLM `model` writes after `prompt`.

    model: folder, hub id or registered name (the default comes with HILDA, but for its base, which is fetched once), or an already loaded
    `(model, tokenizer)` pair. chat: the prompt is a user's turn of the model's chat template. mode: "S" (fast) or
    "Q" (quality), presets of LLaDA2.1's model cards, whose thresholds tau_mask and tau_edit in [0, 1] override; or "own", the text that the
    model would write token by token, drafted in blocks and verified, for models whose closed blocks are read causally.
    Raises HildaError on an unknown mode, a threshold out of range, a prompt longer than the context, or a model
    that is not a dLLM.
    """
    from hildalib.engine import Choices, open_engine

    Choices(mode, tau_mask, tau_edit, max_new_tokens).check()  # refuses what makes no sense before a model is loaded
    engine = open_engine(model)
    return engine.generate(engine.turn(prompt) if chat else prompt, mode, tau_mask, tau_edit, max_new_tokens, seed)
