"""What a forward of a decode costs as it grows, beside the two floors of the machine: its matmul rate and its memory bandwidth.

An AR model reads its weights for one position, a block-diffusion model for a block and its copy: as long as reading the weights is what
takes the time, the other positions are free. Entry points: `measure` (a table), `in_turns`, `Machine`, `random_llama`, `figure`,
`lengths` (as the text grows).
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from hildalib.decoding.linear import linear
from hildalib.decoding.reader import Reader
from hildalib.style import GREY, OKABE, need, styled

SIDE = 1024  # of the square matmul whose rate is measured; large enough for full blocks of any cache
STREAM = 64 * 2**20  # weights of the matrix whose product with one row, as a decode does it, measures bandwidth: beyond every cache


def _best(run, seconds: float, clock=time.perf_counter) -> float:
    """Shortest time of `run()` by `clock` in `seconds` of trying: a floor is what the machine can do when nothing else happens."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = clock()
        run()
        best = min(best, clock() - start)
    return best


def in_turns(runs: list[Callable[[], object]], *, seconds: float, rounds: int, clock=time.perf_counter) -> list[float]:
    """Shortest time of each of `runs` in seconds of `clock`. They take turns, `seconds` each in each of `rounds`, so that what else the machine
    does slows none alone."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        best = [min(fastest, _best(run, seconds, clock)) for fastest, run in zip(best, runs)]
    return best


@dataclass(frozen=True)
class Machine:
    """flops: operations a second of a large matmul; bandwidth: bytes a second of a matrix beyond all caches that is multiplied with one row; both in `dtype`."""

    flops: float
    bandwidth: float
    dtype: torch.dtype = torch.float32

    @classmethod
    @torch.inference_mode()
    def measure(cls, seconds: float = 1.0, dtype: torch.dtype = torch.float32) -> "Machine":
        """Of this process with its threads, the best in `seconds` for each."""
        square, row, tall = (torch.randn(rows, SIDE, dtype=dtype) for rows in (SIDE, 1, STREAM // SIDE))
        large, stream = linear(square), linear(tall)
        found = _best(lambda: large(square), seconds), _best(lambda: stream(row), seconds)
        return cls(2 * SIDE**3 / found[0], dtype.itemsize * STREAM / found[1], dtype)


def weights(model) -> tuple[int, int]:
    """Weights that every position is multiplied with, and those of the head, which only rows with logits meet."""
    head = model.get_output_embeddings()
    head = head.token_adapter.base_layer if hasattr(head, "token_adapter") else head  # of a gated model
    return sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head), head.weight.numel()


def floors(model, machine: Machine, positions: int, context: int) -> dict[str, float]:
    """Seconds that `positions` positions in one forward take at least: for their matmuls (attention to `context` keys included), and
    for reading the weights once (what fits a cache can be read faster). machine: measured in the dtype of the weights."""
    body, head = weights(model)
    config = model.config
    scores = 4 * config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) * config.num_hidden_layers
    return {"matmul_s": positions * (2 * (body + head) + scores * context) / machine.flops, "memory_s": machine.dtype.itemsize * (body + head) / machine.bandwidth}


def random_llama(hidden: int, layers: int, heads: int, key_heads: int, intermediate: int, vocabulary: int):
    """A Llama of that shape with random weights and a `hilda` record: what a forward costs does not depend on what was learned."""
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
                         intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=True, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval()
    model.config.hilda = {"mask_token_id": vocabulary - 1, "block_size": 1, "label_shift": True, "causal_context": True}
    return model


def _step(model, size: int, batch: int, context: int):
    """A function that reads the next block of `batch` rows behind `context` (a multiple of size) tokens in the cache, always the same one."""
    start, mask_id = torch.full((batch,), context), model.config.hilda["mask_token_id"]
    canvas = torch.zeros(batch, context + size, dtype=torch.long)
    canvas[:, context:] = mask_id
    reader, live, no = Reader(model, canvas, size), torch.arange(batch), torch.zeros(batch, dtype=torch.bool)
    step = lambda: reader.read(canvas, start, live, no, no, no)  # noqa: E731
    step()  # the prompt
    reader.carry = reader.carry if reader.carry is not None else torch.zeros(batch, 1)
    step()  # the first read of a shape is slow
    return step


@torch.inference_mode()
def measure(model, machine: Machine, *, sizes: list[int], batches: list[int], contexts: list[int], seconds: float = 0.5, rounds: int = 3) -> pd.DataFrame:
    """One row a block size, batch and context: positions of a forward, its best time, its floors; all behind that many cached tokens.

    model: a dLLM, or an AR model with a `hilda` record, of which block size 1 is a step. The shapes are timed `in_turns`. Columns: block_size, batch, context, positions, seconds, matmul_s, memory_s.
    """
    kept, shapes = model.config.hilda, list(itertools.product(sizes, batches, contexts))
    steps = []
    try:
        for size, batch, context in shapes:
            model.config.hilda = kept | {"block_size": size}
            steps.append(_step(model, size, batch, -(-context // size) * size))
    finally:
        model.config.hilda = kept
    best = in_turns(steps, seconds=seconds, rounds=rounds)
    return pd.DataFrame([{"block_size": size, "batch": batch, "context": context, "positions": size * batch, "seconds": fastest,
                          **floors(model, machine, size * batch, -(-context // size) * size + size)} for (size, batch, context), fastest in zip(shapes, best)])


@styled
def figure(table: pd.DataFrame) -> Figure:
    """Time of a forward against its positions, a panel a model, with both floors; a line a batch.

    Columns: model, batch, positions, seconds, matmul_s, memory_s.
    """
    need(table, "roofline", "model", "batch", "positions", "seconds", "matmul_s", "memory_s")
    names = list(dict.fromkeys(table.model))
    fig, axes = plt.subplots(1, len(names), figsize=(1.2 + 4.0 * len(names), 3.8), squeeze=False)
    shades = [OKABE["blue"], OKABE["vermillion"], OKABE["green"], OKABE["purple"]]
    for ax, name in zip(axes[0], names):
        part = table[table.model == name].sort_values("positions")
        ax.plot(part.positions, 1e3 * part.matmul_s, color=GREY, linestyle="--", label="floor: matmul rate")
        ax.plot(part.positions, 1e3 * part.memory_s, color=GREY, linestyle=":", label="floor: weights read once")
        for (batch, group), colour in zip(part.groupby("batch"), shades):
            ax.plot(group.positions, 1e3 * group.seconds, "o-", color=colour, markersize=4, label=f"measured, batch {batch}")
        ax.set(xscale="log", yscale="log", xlabel="positions of a forward", ylabel="milliseconds", title=name)
        ax.grid(True, which="major")
        ax.legend(fontsize=7.5)
    return fig


@styled
def lengths(table: pd.DataFrame) -> Figure:
    """Time of a forward against the tokens already read, a line a block size. Columns: block_size, context, seconds."""
    need(table, "lengths", "block_size", "context", "seconds")
    fig, ax = plt.subplots(figsize=(5.2, 3.4))
    for (size, group), colour in zip(table.groupby("block_size"), (OKABE["black"], OKABE["blue"], OKABE["vermillion"], OKABE["green"])):
        group = group.sort_values("context")
        ax.plot(group.context, 1e3 * group.seconds, "o-", color=colour, markersize=4, label="one position" if size == 1 else f"a block of {size}")
    ax.set(xlabel="tokens already read", ylabel="milliseconds a forward", ylim=(0, None))
    ax.grid(axis="y")
    ax.legend(fontsize=8)
    return fig
