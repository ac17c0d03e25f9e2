"""One interface to whatever decodes: text in, text out, alone or in batches, and what each forward wrote on the way.

`Engine` is hildalib's own decoder on a Transformers model; `DInferEngine` hands LLaDA2 checkpoints to the package dInfer where it and CUDA are
there. Entry points: `open_engine`, `Engine` (`generate`, `generate_batch`, `stream`), `Choices`, `Step`, `Answer`.
"""

import importlib
import importlib.util
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from hildalib import HildaError, backbones, windows
from hildalib.decoding import PRESETS, EditSettings, settings_for
from hildalib.decoding.decoded import eos_ids
from hildalib.decoding.edit import BlockLoop
from hildalib.decoding.speculation import Speculation, drafts
from hildalib.devices import cuda_fault

LOG = logging.getLogger("hildalib.engine")
OWN = "own"  # mode of the model's own text: what its block-size-1 mode would write, drafted in blocks and verified (`self_speculate`)
MODES = (*PRESETS, OWN)
TOKENIZER = threading.Lock()  # a fast tokenizer refuses to be used by two threads at a time ("Already borrowed")


@dataclass(frozen=True)
class Choices:
    """How a prompt is decoded. mode: a preset, whose thresholds tau_mask, tau_edit in [0, 1] override, or OWN, which has none. temperature 0 takes
    the argmax, and then the seed changes nothing; OWN knows no other."""

    mode: str = "Q"
    tau_mask: float | None = None
    tau_edit: float | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """HildaError where a choice makes no sense."""
        if self.mode != OWN:
            self.settings()
        elif self.tau_mask is not None or self.tau_edit is not None or self.temperature:
            raise HildaError(f"mode {OWN!r} takes the model's favourite token by token: leave tau_mask, tau_edit and temperature out, or use mode Q")
        else:
            EditSettings(max_new_tokens=self.max_new_tokens)

    def loop(self, model, prompts: torch.Tensor, lengths: torch.Tensor) -> BlockLoop | Speculation:
        """The state of a decode of prompts (B, P), left-padded, of `lengths` (B,), at its first forward."""
        if self.mode == OWN:
            return Speculation(model, prompts, lengths, self.max_new_tokens)
        return BlockLoop(model, prompts, lengths, self.settings(), torch.Generator().manual_seed(self.seed), False)

    def settings(self) -> EditSettings:
        """Of the threshold decoder; HildaError where a choice makes no sense, or the mode has no thresholds."""
        if self.mode not in PRESETS:
            raise HildaError(f"mode {self.mode!r} is unknown; use one of {', '.join(MODES)}")
        return settings_for(self.mode, self.tau_mask, self.tau_edit, max_new_tokens=self.max_new_tokens, temperature=self.temperature)

    def together(self) -> "Choices | None":
        """What prompts must have in common to be decoded as one batch; None where each needs noise of its own."""
        return None if self.temperature else replace(self, seed=0)


@dataclass(frozen=True)
class Step:
    """One forward of one row, its `forward`-th. written: (position, id, confidence) of masks filled; edited: (position, id before, id after,
    confidence) of tokens changed; position 0 is the first token after the prompt. text: that of the closed blocks, which nothing changes any more.
    """

    forward: int
    written: list[tuple[int, int, float]]
    edited: list[tuple[int, int, int, float]]
    text: str


@dataclass(frozen=True)
class Answer:
    """text after the prompt, cut at the first stop string; tokens generated for it, EOS included; forwards that the row took part in.
    finish: "stop" at EOS or a stop string, "length" where max_new_tokens ran out."""

    text: str
    prompt_tokens: int
    tokens: int
    forwards: int
    finish: str


class Engine:
    """Block-diffusion decoding of a dLLM of hildalib, on the device and in the dtype it was loaded with.

    Rows of a batch finish apart and do not see one another: in exact arithmetic a row's answer is that of the row alone. In floating point a
    larger batch may add in another order, so a confidence within an ulp or two of a threshold may fall on its other side.
    """

    batches = True

    def __init__(self, model, tokenizer):
        if not (getattr(model.config, "hilda", None) or {}).get("block_size"):
            raise HildaError("this model is autoregressive, not yet a dLLM: convert it with `hilda run 02_wsd 03_sft`, then pass the folder of "
                             "its `model`")
        self.model, self.tokenizer, self.context = model, tokenizer, windows.context_limit(model)
        folder = Path(str(model.name_or_path))
        self.eos, self.name = eos_ids(model), (folder.parent if folder.name == "model" else folder).name or "hilda"  # runs end in dLLM/model

    # ---- text in, text out ------------------------------------------------------------------------------------------------------

    def generate(self, prompt: str, mode: str = "Q", tau_mask: float | None = None, tau_edit: float | None = None, max_new_tokens: int = 128,
                 seed: int = 0, temperature: float = 0.0) -> str:
        """Text after `prompt`; arguments as in `hildalib.generate`, whose text it is."""
        return self.generate_batch([prompt], mode, tau_mask, tau_edit, max_new_tokens, seed, temperature)[0]

    def generate_batch(self, prompts: Sequence[str], mode: str = "Q", tau_mask: float | None = None, tau_edit: float | None = None,
                       max_new_tokens: int = 128, seed: int = 0, temperature: float = 0.0) -> list[str]:
        """Texts after `prompts`, decoded together."""
        choices = Choices(mode, tau_mask, tau_edit, max_new_tokens, temperature, seed)
        return [answer.text for answer in self.answers([self.encode(prompt) for prompt in prompts], choices)]

    def answers(self, prompts: list[list[int]], choices: Choices, stops: Sequence[str] = ()) -> list[Answer]:
        """Answers to token lists. stops: strings at which each text is cut."""
        for ids in prompts:
            self.check(ids, choices)
        found = {row: event for row, event in self.stream(prompts, choices, [tuple(stops)] * len(prompts)) if isinstance(event, Answer)}
        return [found[row] for row in range(len(prompts))]

    def turn(self, prompt: str) -> str:
        """`prompt` as one user turn of the chat template, open for the answer; unchanged where the model has no template."""
        with TOKENIZER:
            return backbones.chat_prompt(self.tokenizer, prompt)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, no special token added. HildaError where `text` is no valid Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise HildaError(f"the prompt is not valid Unicode at character {error.start}; send whole characters") from None
        with TOKENIZER:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens."""
        with TOKENIZER:
            return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def check(self, ids: list[int], choices: Choices) -> None:
        """HildaError where the prompt `ids` cannot be decoded so: a choice out of range, no token, a [MASK], beyond the context."""
        choices.check()
        if choices.mode == OWN:
            drafts(self.model)
        record, length = self.model.config.hilda, len(ids) + choices.max_new_tokens
        if record["label_shift"] and not ids:
            raise HildaError("a shifted model predicts each token from the one before; the prompt needs at least one token")
        if record["mask_token_id"] in ids:
            raise HildaError(f"the prompt contains {self.tokenizer.mask_token}, which stands for what is to be written; leave it out")
        if length > self.context:
            raise HildaError(f"prompt and max_new_tokens need {length} positions, the model's context is {self.context}; "
                             "shorten the prompt or lower max_new_tokens")

    # ---- forward by forward -----------------------------------------------------------------------------------------------------

    def stream(self, prompts: list[list[int]], choices: Choices, stops: Sequence[tuple[str, ...]] | None = None, *, steps: bool = False,
               gone: Callable[[int], bool] = lambda row: False) -> Iterator[tuple[int, Step | Answer]]:
        """(row, event) as they happen: `Step`s of each row, if asked for, then its `Answer`, at once when the row is done.

        prompts: token lists that `check` has passed. stops: strings of each row. gone: asked before each forward; a row it names leaves
        the batch without an answer.
        """
        stops, rows = stops or [()] * len(prompts), list(range(len(prompts)))
        for part in [rows] if choices.together() else [[row] for row in rows]:
            for place, event in self._decode([prompts[row] for row in part], choices, [stops[row] for row in part], steps,
                                             lambda place, part=part: gone(part[place])):
                yield part[place], event

    def _decode(self, prompts, choices: Choices, stops, steps: bool, gone) -> Iterator[tuple[int, Step | Answer]]:
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        rows = [torch.tensor(ids, dtype=torch.long) for ids in prompts]
        padded = pad_sequence(rows, batch_first=True, padding_value=self.eos[0], padding_side="left")
        state = choices.loop(self.model, padded.to(device), lengths)
        waiting, left, texts, begins = set(range(len(prompts))), set(), [""] * len(prompts), [len(ids) for ids in prompts]
        while waiting:
            left |= {row for row in waiting if gone(row)}
            waiting -= left
            state.done[list(left)] = True  # they go with the next step
            before, starts = state.canvas.clone(), state.start.tolist()
            if not waiting:
                return
            with torch.inference_mode():
                state.step()
            done, moved, forwards = state.done.tolist(), state.start.tolist(), state.reader.forwards.tolist()
            for row in sorted(waiting):
                answer = None
                if done[row] or moved[row] > starts[row]:
                    ids = self._closed(state, row, begins[row], choices.max_new_tokens, done[row])
                    texts[row], cut = _cut(self.decode(ids), stops[row])
                    if done[row] or cut:
                        answer = self._answer(ids, texts[row], cut, stops[row], begins[row], forwards[row])
                if steps:
                    yield row, _step(state, before, row, begins[row], choices.max_new_tokens, forwards[row], texts[row])
                if answer:
                    yield row, answer
                    waiting.discard(row)
                    left.add(row)

    def _closed(self, state: BlockLoop | Speculation, row: int, begin: int, most: int, done: bool) -> list[int]:
        """Generated ids that nothing will change, up to and with the first EOS."""
        end = begin + most if done else min(int(state.start[row]), begin + most)
        ids = state.canvas[row, begin:end].tolist()
        ends = [place for place, token in enumerate(ids) if token in self.eos]
        return ids[:ends[0] + 1] if ends else ids

    def _answer(self, ids: list[int], text: str, cut: bool, stops: tuple[str, ...], begin: int, forwards: int) -> Answer:
        if cut:  # the tokens that it took until the first stop string was there
            low, high = 1, len(ids)
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if _cut(self.decode(ids[:middle]), stops)[1] else (middle + 1, high)
            ids = ids[:low]
        ended = cut or bool(ids and ids[-1] in self.eos)
        return Answer(text, begin, len(ids), forwards, "stop" if ended else "length")


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to its first stop string, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[:min(places)], True) if places else (text, False)


def _step(state: BlockLoop | Speculation, before: torch.Tensor, row: int, begin: int, most: int, forward: int, text: str) -> Step:
    changed = (state.canvas[row] != before[row]).nonzero()[:, 0].tolist()
    written, edited = [], []
    for place in (place for place in changed if place < begin + most):
        old, new, sure = int(before[row, place]), int(state.canvas[row, place]), float(state.snapshot[row, place])
        (written.append((place - begin, new, sure)) if old == state.mask_id else edited.append((place - begin, old, new, sure)))
    return Step(forward, written, edited, text)


# ---- dInfer ---------------------------------------------------------------------------------------------------------------------

DINFER_FAMILY = "llada2"  # what dInfer decodes block by block; of plain Llama or Qwen classes it has none
DINFER_BLOCK = 32  # block size of the LLaDA2 checkpoints


def dinfer_fault(folder: str | Path) -> str:
    """"" where dInfer can decode the model in `folder`, else why not."""
    if importlib.util.find_spec("dinfer") is None:
        return "the package dinfer is not installed"
    if fault := cuda_fault():
        return fault
    config = Path(folder) / "config.json"
    family = json.loads(config.read_text(encoding="utf-8")).get("model_type", "") if config.is_file() else "unknown"
    return "" if family.startswith(DINFER_FAMILY) else f"dInfer has no class for model_type {family!r}, only for {DINFER_FAMILY}*"


class DInferEngine(Engine):
    """LLaDA2 checkpoints through dInfer (github.com/inclusionAI/dInfer, v0.2): background processes on the GPUs, one threshold.

    Call shapes as its repository shows them: `SamplingParams(threshold=, cache=, temperature=, early_stop=, use_bd=, parallel_decoding=,
    max_length=, mask_id=, eos_id=)`, `DiffusionLLMServing(folder, model_type=, sample_params=, num_gpus=, dp_size=, tpep_size=, backend=)`,
    `.generate(ids (b, L) long, gen_length=, block_length=)` -> (b, L') prompts and texts, EOS-padded, `.num_forwards`. Tested against a
    stand-in with these shapes only, never against dInfer itself. Not established, hence not used: how prompts of different lengths share a
    batch (each is decoded alone); whether gen_length counts the prompt (read as: no). v0.2 has no editing, so tau_edit must be 1; its
    threshold is fixed at the start.
    """

    batches = False

    def __init__(self, folder: str | Path, tau_mask: float = PRESETS["Q"].tau_mask, max_length: int = 4096):
        from transformers import AutoTokenizer

        dinfer = importlib.import_module("dinfer")
        self.tokenizer, self.tau_mask, self.context, self.name = AutoTokenizer.from_pretrained(folder), tau_mask, max_length, Path(folder).name
        self.eos = [self.tokenizer.eos_token_id]
        known = {} if self.tokenizer.mask_token_id is None else {"mask_id": self.tokenizer.mask_token_id}
        params = dinfer.SamplingParams(threshold=tau_mask, cache="prefix", temperature=0.0, early_stop=True, use_bd=True,
                                       parallel_decoding="threshold", max_length=max_length, eos_id=self.eos[0], **known)
        self.serving = dinfer.DiffusionLLMServing(str(folder), model_type="llada2-mini", sample_params=params, num_gpus=1, dp_size=1, tpep_size=1,
                                                  backend="sglang")

    def check(self, ids: list[int], choices: Choices) -> None:
        """HildaError for what dInfer cannot do: edit, sample, another threshold than the one it was started with, a text beyond max_length."""
        if choices.mode == OWN:
            raise HildaError(f"dInfer has no mode {OWN!r}; ask for tau_edit = 1, or use the engine transformers")
        settings, length = choices.settings(), len(ids) + choices.max_new_tokens
        if settings.tau_edit < 1 or settings.temperature:
            raise HildaError("dInfer neither edits nor samples here: ask for tau_edit = 1 and temperature = 0, or use the engine transformers")
        if settings.tau_mask != self.tau_mask:
            raise HildaError(f"dInfer was started with tau_mask = {self.tau_mask}; ask for that, or start it again with {settings.tau_mask}")
        if not ids or length > self.context:
            raise HildaError(f"prompt and max_new_tokens need {length} positions, of {self.context}, and the prompt at least one; change one of them")

    def stream(self, prompts, choices, stops=None, *, steps=False, gone=lambda row: False) -> Iterator[tuple[int, Step | Answer]]:
        """As `Engine.stream`; dInfer shows no steps, and a row can only leave before its turn."""
        for row, ids in enumerate(prompts):
            if gone(row):
                continue
            length = -(-choices.max_new_tokens // DINFER_BLOCK) * DINFER_BLOCK  # whole blocks; what is too much is cut
            out = self.serving.generate(torch.tensor([ids]), gen_length=length, block_length=DINFER_BLOCK)[0].tolist()
            own = out[len(ids):len(ids) + choices.max_new_tokens]
            own = own[:own.index(self.eos[0]) + 1] if self.eos[0] in own else own
            text, cut = _cut(self.decode(own), stops[row] if stops else ())
            yield row, self._answer(own, text, cut, stops[row] if stops else (), len(ids), int(self.serving.num_forwards))


def open_engine(model, engine: str = "auto", **options) -> Engine:
    """The engine for `model`: a folder, hub id or registered name, or a loaded (model, tokenizer) pair.

    engine: "transformers", "dinfer", or "auto", which is dInfer where it can, and logs why where it cannot. options: of `backbones.load`.
    """
    if engine not in ("auto", "transformers", "dinfer"):
        raise HildaError(f"engine {engine!r} is unknown; use auto, transformers or dinfer")
    if isinstance(model, tuple):
        return Engine(*model)
    if engine != "transformers":
        fault = dinfer_fault(model)
        if not fault:
            return DInferEngine(model)
        if engine == "dinfer":
            raise HildaError(f"dInfer cannot be used: {fault}; use the engine transformers")
        LOG.info("decoding with Transformers; dInfer is not used: %s", fault)
    return Engine(*backbones.load(model, **options))
