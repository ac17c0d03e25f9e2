"""A model class for EleutherAI's lm-evaluation-harness: its tasks, scored with hildalib's decoder and block ELBO.

lm_eval (0.4.13) knows the models of its own table only, no plugin of another package; so its command line is called through this module,
with its own arguments: `python -m hildalib.harness --model hilda --model_args pretrained=FOLDER,mode=Q --tasks gsm8k`. In Python,
`import hildalib.harness` before `lm_eval.simple_evaluate(model="hilda", ...)`. Needs the extra `harness`. Entry points: `HildaLM`, `main`.
"""

import sys
from dataclasses import replace

import torch

from hildalib import HildaError, backbones, objective
from hildalib.decoding import ar_decode, edit_decode
from hildalib.engine import OWN, Choices, open_engine
from hildalib.gated import is_gated, noisy_rows

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise HildaError(f"the harness needs the package lm_eval ({error}): python -m pip install -c constraints.txt -e \".[harness]\"") from None


@register_model("hilda")
class HildaLM(TemplateLM):
    """An editable dLLM as a model of the harness.

    pretrained: folder, hub id or registered name, or a loaded (model, tokenizer) pair. mode, tau_mask, tau_edit: of generation; max_gen_toks:
    where a task does not say how long. samples, seed: of the ELBO; every request draws the same noise, so that the choices of a question
    differ by their text alone. block_size: of the ELBO, None for the model's own; 1 gives the exact log-likelihood of its autoregressive
    mode (one sample), which a model with unshifted labels has not. A log-likelihood under blocks is minus the negative ELBO that
    `objective.elbo` estimates: a lower bound, not comparable with an AR model's exact one.
    """

    def __init__(self, pretrained, mode: str = "Q", tau_mask: float | None = None, tau_edit: float | None = None, max_gen_toks: int = 256,
                 samples: int = 32, seed: int = 0, block_size: int | None = None, batch_size: int | str | None = None, device: str | None = None,
                 dtype: str = "auto", max_batch_size: int | None = None):
        super().__init__()
        pretrained = pretrained if isinstance(pretrained, tuple) else backbones.load(pretrained, dtype=dtype, device=device or "auto")
        self.engine = open_engine(pretrained)
        self.model, self.tokenizer, self._device = self.engine.model, self.engine.tokenizer, self.engine.model.device
        self.choices = Choices(mode, tau_mask, tau_edit, max_gen_toks, seed=seed)
        self.block_size = block_size or self.model.config.hilda["block_size"]
        self.exact = self.block_size == 1
        if self.exact and not self.model.config.hilda["label_shift"]:
            raise HildaError("block_size=1 is the autoregressive mode of a model with shifted labels; this one has none: leave block_size out")
        self.samples, self.seed = 1 if self.exact else int(samples), int(seed)
        self.rows = 8 if batch_size in (None, "auto") or not str(batch_size).isdecimal() else int(batch_size)
        self.choices.check()

    # ---- what the harness asks of a model ---------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.engine.eos[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.engine.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts up to their stop strings; requests of equal length and stops are decoded together. Sampling follows the request's temperature."""
        groups, texts = {}, [""] * len(requests)
        for number, request in enumerate(requests):
            options = dict(request.args[1])
            until, new = options.get("until") or [], int(options.get("max_gen_toks") or self.choices.max_new_tokens)
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            groups.setdefault((tuple([until] if isinstance(until, str) else until), new, temperature), []).append(number)
        for (stops, new, temperature), numbers in groups.items():
            choices, room = replace(self.choices, max_new_tokens=new, temperature=temperature), self.engine.context - new
            if room < 1:
                raise HildaError(f"max_gen_toks = {new} leaves no room for a prompt in a context of {self.engine.context}; "
                                 "give --gen_kwargs max_gen_toks=N")
            for start in range(0, len(numbers), self.rows):
                part = numbers[start:start + self.rows]
                prompts = [self.engine.encode(requests[number].args[0])[-room:] for number in part]
                for number, answer in zip(part, self.engine.answers(prompts, choices, [stop for stop in stops if stop])):
                    texts[number] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[number].args, answer.text)
        return texts

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in disjoint windows of the context, the first after an EOS."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(self.engine.encode(request.args[0]), self.prefix_token_id, self.engine.context - 1, 1)
            totals.append(sum(self.score(context, own) for context, own in map(make_disjoint_window, windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        results = []
        for key, context, own in requests:
            results.append((self.score(context, own), self.greedy(context, own)))
            self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    # ---- numbers ----------------------------------------------------------------------------------------------------------------

    def _fitting(self, context: list[int], own: list[int]) -> list[int]:
        """The context, shortened from the left to what fits in front of `own`."""
        return context[-max(1, self.engine.context - len(own)):]

    @torch.inference_mode()
    def score(self, context: list[int], own: list[int]) -> float:
        """Nats: log-likelihood of the tokens `own` after `context`, minus the mean of `objective.elbo` over `samples` rows."""
        context = self._fitting(context, own)
        ids = torch.tensor([context + own], device=self.device)
        maskable = (torch.arange(ids.shape[1], device=self.device) >= len(context))[None]
        generator, total = torch.Generator().manual_seed(self.seed), 0.0
        noisy = (torch.arange(2 * ids.shape[1], device=self.device) < ids.shape[1])[None] if is_gated(self.model) and not self.exact else None
        for start in range(0, self.samples, self.rows):
            count = min(self.rows, self.samples - start)
            with noisy_rows(self.model, noisy):
                bound = objective.elbo(self.model, ids.expand(count, -1), maskable.expand(count, -1), block_size=self.block_size, samples=1,
                                       generator=generator)
            total += float(bound.sum())
        return -total / self.samples

    def greedy(self, context: list[int], own: list[int]) -> bool:
        """Whether the decoder itself (at block size 1: the AR mode) writes the tokens `own` after `context`."""
        prompt = torch.tensor([self._fitting(context, own)], device=self.device)
        if self.exact or self.choices.mode == OWN:
            ids = ar_decode(self.model, prompt, max_new_tokens=len(own)).ids
        else:
            ids = edit_decode(self.model, prompt, replace(self.choices, max_new_tokens=len(own)).settings()).ids
        return ids[0].tolist() == own


def main() -> None:
    """lm_eval's command line, with the model `hilda` in its table."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
