"""Model x task x decoder -> scores with intervals and what they cost.

Entry points: `run` (one row an item), `worded` (prompts as the model gets them), `summary` (one row a run, Wilson interval), `diffusion`, `routed`, `refreshed`, `pipelined`,
`speculative`, `searching`, `autoregressive` and `generating` (decoders), `coverage` (of searched beams), `likelihood` (nats a token under a judge), `across_seeds`.
"""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hildalib import HildaError
from hildalib.decoding import (Beams, Decoded, EditSettings, PipelineSettings, RefreshedSettings, RoutedSettings, SearchSettings, ar_decode, edit_decode,
                               explore, generate_decode, pipeline_decode, refreshed_decode, routed_decode, self_speculate)
from hildalib.decoding.decoded import eos_ids
from hildalib.devices import peak_memory_gb, start_peak
from hildalib.intervals import mean_interval, wilson
from hildalib.pairs import worded

Decoder = Callable[[torch.nn.Module, Tensor, Tensor], Decoded]  # (model, prompt_ids (B, P), attention_mask (B, P))


def diffusion(settings: EditSettings, seed: int = 0) -> Decoder:
    """Threshold-edit decoding as a decoder of `run`."""
    return lambda model, ids, real: edit_decode(model, ids, settings, attention_mask=real, generator=torch.Generator().manual_seed(seed))


def routed(settings: EditSettings, routing: RoutedSettings, seed: int = 0) -> Decoder:
    """S2D2's routed verification as a decoder of `run`."""
    return lambda model, ids, real: routed_decode(model, ids, settings, routing, attention_mask=real, generator=torch.Generator().manual_seed(seed))


def refreshed(settings: RefreshedSettings) -> Decoder:
    """Fast-dLLM's caches as a decoder of `run`."""
    return lambda model, ids, real: refreshed_decode(model, ids, settings, attention_mask=real)


def pipelined(settings: PipelineSettings) -> Decoder:
    """Pipelined blocks as a decoder of `run`."""
    return lambda model, ids, real: pipeline_decode(model, ids, settings, attention_mask=real)


def speculative(max_new_tokens: int, tolerance: float = 1.0) -> Decoder:
    """Self-speculation as a decoder of `run`: the text of the model's own AR mode, or with a tolerance below 1 one that it finds about as probable."""
    return lambda model, ids, real: self_speculate(model, ids, attention_mask=real, max_new_tokens=max_new_tokens, tolerance=tolerance)


def searching(settings: EditSettings, choices: SearchSettings, seed: int = 0, kept: list[Beams] | None = None) -> Decoder:
    """Order-token search as a decoder of `run`. kept: the beams of each batch are appended to it."""
    def decode(model, ids, real):
        beams = explore(model, ids, settings, choices, attention_mask=real, generator=torch.Generator().manual_seed(seed))
        if kept is not None:
            kept.append(beams)
        return beams.best()
    return decode


def autoregressive(max_new_tokens: int, temperature: float = 0.0, seed: int = 0, beams: int = 1) -> Decoder:
    """The AR twin's decoding, with KV cache, as a decoder of `run`."""
    return lambda model, ids, real: ar_decode(model, ids, attention_mask=real, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                                              beams=beams)


def generating(max_new_tokens: int) -> Decoder:
    """The same greedy text by Transformers' `generate`, as a decoder of `run`."""
    return lambda model, ids, real: generate_decode(model, ids, attention_mask=real, max_new_tokens=max_new_tokens)


def coverage(kept: list[Beams], tokenizer, task, items: list) -> float:
    """Share of `items` that at least one of the texts kept by `searching` gets right: what a perfect judge of them would reach."""
    texts = [tokenizer.batch_decode(beams, skip_special_tokens=True) for batch in kept for beams in batch.ids]
    return sum(max(task.score(text, item) for text in own) for own, item in zip(texts, items, strict=True)) / len(items)


def left_pad(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), each (B, P) long, of token lists of different lengths."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def generated_tokens(ids: Tensor, eos: list[int]) -> Tensor:
    """(B,) tokens up to and with the first EOS: what counts as generated. EOS padding after it does not."""
    ended = torch.isin(ids, torch.tensor(eos, dtype=ids.dtype, device=ids.device)).long()
    return (ended.cumsum(1) - ended == 0).sum(1)


def run(model, tokenizer, task, decoder: Decoder, *, limit: int | None = None, seed: int = 0, split: str = "test",
        batch_size: int = 32, chat: bool = False) -> pd.DataFrame:
    """Decodes and scores `limit` items of a task split; one row an item.

    Columns: prompt, text, score in [0, 1], tokens (generated, first EOS included), forwards, positions_fed (prefill and
    commits included), seconds and cpu_seconds (the batch's time, shared equally), peak_memory_gb of the process while its batch was decoded. chat: see `worded`. Raises HildaError when the split is empty.
    """
    items = task.items(split, limit=limit, seed=seed)
    if not items:
        raise HildaError(f"task {task.name}: split {split!r} is empty; check HILDA_DATA or choose another split")
    eos, frames = eos_ids(model), []
    bar = tqdm(total=len(items), desc=f"{task.name} ({split})", unit="item", disable=None, delay=5, leave=False)  # short ones only clutter
    for start in range(0, len(items), batch_size):
        part = items[start:start + batch_size]
        prompts = [task.prompt(item) for item in part]
        ids, real = left_pad(tokenizer(worded(task, tokenizer, prompts, chat), add_special_tokens=False)["input_ids"], eos[0])
        start_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        decoded = decoder(model, ids.to(model.device), real.to(model.device))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = peak_memory_gb()
        texts = tokenizer.batch_decode(decoded.ids, skip_special_tokens=True)
        scores = task.scores(texts, part) if hasattr(task, "scores") else [task.score(text, item) for text, item in zip(texts, part)]
        frames.append(pd.DataFrame({
            "prompt": prompts, "text": texts, "score": scores,
            "tokens": generated_tokens(decoded.ids, eos).tolist(), "forwards": decoded.forwards.tolist(),
            "positions_fed": decoded.positions_fed.tolist(), "seconds": wall / len(part), "cpu_seconds": cpu / len(part), "peak_memory_gb": peak}))
        if decoded.kv_bytes is not None:
            frames[-1]["kv_bytes"] = decoded.kv_bytes.tolist()
        bar.update(len(part))
    bar.close()
    return pd.concat(frames, ignore_index=True)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row: accuracy (mean score) with its 95 % Wilson interval low..high, items, NFE and positions an item, TPF = generated
    tokens / forwards, tokens_per_s, cpu_seconds an item, peak_memory_gb of the process; kv_bytes an item where they were counted.

    The Wilson interval treats the mean score as a proportion: exact for 0/1 scores, conservative for scores between.
    """
    low, high = wilson(frame.score.sum(), len(frame))
    return pd.DataFrame([{
        "accuracy": frame.score.mean(), "low": float(low), "high": float(high), "items": len(frame), "nfe": frame.forwards.mean(),
        "tpf": frame.tokens.sum() / frame.forwards.sum(), "tokens_per_s": frame.tokens.sum() / frame.seconds.sum(),
        "positions_fed": frame.positions_fed.mean(), "cpu_seconds": frame.cpu_seconds.mean(), "tokens": frame.tokens.mean(),
        "peak_memory_gb": frame.peak_memory_gb.max(), **({"kv_bytes": frame.kv_bytes.mean()} if "kv_bytes" in frame else {})}])


@torch.inference_mode()
def likelihood(judge, tokenizer, prompts: list[str], texts: list[str], batch_size: int = 8) -> list[float]:
    """Nats a token of each text after its prompt under the AR model `judge` (nan for an empty text). Right-padded batches:
    causal attention never looks at the padding."""
    scores = []
    for start in range(0, len(texts), batch_size):
        heads = tokenizer(prompts[start:start + batch_size], add_special_tokens=False)["input_ids"]
        tails = tokenizer(texts[start:start + batch_size], add_special_tokens=False)["input_ids"]
        rows = [head + tail for head, tail in zip(heads, tails)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=judge.device)
        nll = F.cross_entropy(judge(input_ids=ids, use_cache=False).logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        for values, head, row in zip(nll, heads, rows):
            own = values[max(len(head) - 1, 0):len(row) - 1]
            scores.append(own.mean().item() if len(own) else float("nan"))
    return scores


def across_seeds(tables: dict[int, pd.DataFrame], keys: list[str], values: list[str], shares: tuple[str, ...] = ()) -> pd.DataFrame:
    """Mean and 95 % t-interval over seeds of each value, one row per combination of `keys`; column n_seeds says how many.

    shares: those of `values` that lie in [0, 1]; their intervals end there, where a t-interval of few seeds would not."""
    stacked = pd.concat([table.assign(run_seed=seed) for seed, table in tables.items()], ignore_index=True)
    rows = []
    for key, group in stacked.groupby(keys, sort=False):
        row = dict(zip(keys, key if isinstance(key, tuple) else (key,))) | {"n_seeds": group.run_seed.nunique()}
        for value in values:
            mean, *ends = mean_interval(group[value])
            row[value], row[f"{value}_low"], row[f"{value}_high"] = mean, *(np.clip(ends, 0.0, 1.0) if value in shares else ends)
        rows.append(row)
    return pd.DataFrame(rows)
