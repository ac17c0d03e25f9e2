"""One real training step with random weights on this CPU: its peak memory, by PyTorch's profiler, and its time, beside what `footprint` predicts.

The independent check of the planner: the step is the trainer's own, and the allocator's events hold kernels' workspace too.
Entry points: `rehearse` (one row of the table), `python -m hildalib.rehearsal --help` (the table of several configurations).
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config

from hildalib import HildaError, backbones, training
from hildalib.attention import TILED
from hildalib.devices import matmul_rate
from hildalib.footprint import simulate
from hildalib.gated import checkpointing, gate
from hildalib.recipe import NoisedRows, Recipe, collate
from hildalib.wsd import BlockSchedule


def _model(config, recipe: Recipe, weights: str, quantize: str, lora_rank: int):
    dtype, mask = getattr(torch, weights), config.vocab_size - 1
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if quantize:
        from transformers import BitsAndBytesConfig

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            options = BitsAndBytesConfig(**backbones.QUANTIZE[quantize], bnb_4bit_compute_dtype=dtype)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=dtype, device_map={"": "cpu"})
    model.config.hilda = {"mask_token_id": mask, "label_shift": recipe.label_shift}
    if recipe.adapter_rank or lora_rank:
        model = backbones.with_lora(model, recipe.adapter_rank or lora_rank)
        model = gate(model) if recipe.adapter_rank else model
    model.set_attn_implementation(TILED)
    return model.train()


def _bytes(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _leaves(value):
    """Every tensor inside nested dicts, lists and bitsandbytes quantisation states."""
    if isinstance(value, torch.Tensor):
        yield value
        value = getattr(value, "quant_state", None)
    if isinstance(value, dict):
        value = list(value.values())
    elif value is not None and hasattr(value, "absmax"):
        value = [value.absmax, value.code, value.offset, value.state2]
    for part in value if isinstance(value, (list, tuple)) else ():
        yield from _leaves(part)


def _highest(profiled) -> tuple[int, int]:
    """Highest and last sum of the allocations seen, in bytes above what was there at the beginning."""
    events = sorted(((event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda e: e[0])
    total = best = 0
    for _, size in events:
        total += size
        best = max(best, total)
    return best, total


def rehearse(config, recipe: Recipe, length: int, *, weights: str = "float32", quantize: str = "", lora_rank: int = 0) -> dict:
    """One row: measured and predicted peak in bytes; CPU-seconds of the step, its FLOPs, and the least seconds that the planner gives it: at the rate
    of a large matmul, measured beside it.

    The optimiser's state is there before the step, as in all but the first. `recipe` should draw no drafts: they are no part of the peak.
    """
    model = _model(config, recipe, weights, quantize, lora_rank)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size - 1, (recipe.batch_size, length), generator=generator)
    rows = {"input_ids": ids, "doc_ids": torch.zeros_like(ids), "maskable": torch.ones_like(ids, dtype=torch.bool)}
    data = NoisedRows(rows, recipe, {"mask_token_id": config.vocab_size - 1, "forbidden_ids": range(5), "vocab_size": config.vocab_size})
    with tempfile.TemporaryDirectory() as folder:
        arguments = training._arguments(recipe, Path(folder), torch.device("cpu"))
        trainer = training.DiffusionTrainer(model=model, args=arguments, train_dataset=data, data_collator=collate, recipe=recipe, hilda=model.config.hilda)
    optimizer = trainer.create_optimizer()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(checkpointing(model))
    batch = collate([data[n] for n in range(recipe.batch_size)])

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = trainer.compute_loss(model, batch)
        loss.backward()
        optimizer.step()

    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    if recipe.accumulate == 1:  # else the gradient of earlier micro-batches is there
        optimizer.zero_grad(set_to_none=True)
    there = [p.grad for p in model.parameters() if p.grad is not None]
    resident = _bytes([*_leaves(list(model.parameters())), *model.buffers(), *there, *_leaves([dict(s) for s in optimizer.state.values()])])
    rate = matmul_rate(torch.device("cpu"), torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32, 1024) * 1e9
    start = time.process_time()
    with training.lean(model, recipe), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    spent = time.process_time() - start
    targets = batch["mask_targets"] | batch["edit_targets"]
    targets |= (batch["maskable"] & ~targets) if recipe.keep_weight else False
    context = trainer._context(batch)
    predicted = simulate(config, recipe, length, weights=weights, quantize=quantize, lora_rank=lora_rank, device="cpu", targets=targets, context=context)
    highest, last = _highest(profiled)
    new = _bytes(p.grad for p in model.parameters() if p.grad is not None and not any(p.grad is old for old in there))
    if abs(last - new) > 0.05 * highest:  # what a step leaves behind is its gradients; seen once on a busy machine, with a peak 36 % too low
        raise HildaError(f"the profiler lost sight of allocations ({last:,} bytes seem to be left, {new:,} are); run again, on a quieter machine")
    measured = resident + highest
    return {"parameters": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()), "measured": measured, "predicted": predicted.peak,
            "error": predicted.peak / measured - 1, "cpu_seconds": spent, "flops": predicted.flops, "least_seconds": predicted.flops / rate}


def qwen3(hidden: int, layers: int, heads: int, key_heads: int, intermediate: int, vocabulary: int, head_size: int) -> Qwen3Config:
    """A Qwen3 of that shape; its head is its embedding."""
    return Qwen3Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads, intermediate_size=intermediate,
                       vocab_size=vocabulary, head_dim=head_size, tie_word_embeddings=True, max_position_embeddings=4096)


SHAPES = {"tiny": (128, 4, 4, 2, 256, 4_000, 32), "wide head": (256, 4, 4, 2, 512, 60_000, 64), "deep": (256, 12, 4, 4, 768, 8_000, 64),
          "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151_936, 128)}
PLAIN = Recipe(BlockSchedule(stable=(32, 10)), batch_size=1, lr=1e-4, edit_rate=0.1, causal_context=True, context_weight=1.0, weighting="mean")
CONFIGURATIONS = [  # shape, length, changes of the recipe, stored how
    ("tiny", 256, {}, {}), ("tiny", 256, {"batch_size": 4, "copies": 2, "keep_weight": 0.1}, {}), ("tiny", 512, {"gradient_checkpointing": True}, {}),
    ("wide head", 256, {}, {}), ("wide head", 256, {"head_rows": 64}, {}), ("wide head", 256, {"head_rows": 64, "optimizer": "adamw_8bit"}, {}),
    ("deep", 512, {}, {}), ("deep", 512, {"gradient_checkpointing": True}, {}), ("tiny", 256, {"gradient_checkpointing": True, "precision": "bfloat16"}, {}),
    ("deep", 512, {"gradient_checkpointing": True, "head_rows": 128, "optimizer": "adamw_8bit"}, {"weights": "bfloat16"}),
    ("deep", 512, {}, {"lora_rank": 16}), ("deep", 512, {"gradient_checkpointing": True, "head_rows": 128}, {"lora_rank": 16, "quantize": "nf4"}),
    ("deep", 512, {"adapter_rank": 16, "adapter_lr": 1e-3, "context_weight": 0.0, "gradient_checkpointing": True}, {}),
    ("deep", 256, {"schedule": BlockSchedule(stable=(256, 10)), "context_weight": 0.0}, {}),
    ("qwen3-0.6b", 1024, {"gradient_checkpointing": True, "head_rows": 128, "optimizer": "adamw_8bit"}, {}),  # float32: bfloat16 is emulated on many CPUs
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hildalib.rehearsal", description="Peak memory of real steps beside the planner's prediction, as a CSV table.")
    parser.add_argument("--only", help="shapes to rehearse (default: all): " + ", ".join(SHAPES), nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("planned.csv"), help="file of the table; what it holds of other shapes is kept (default: %(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one core's seconds beside one core's rate
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for shape, length, changes, stored in CONFIGURATIONS:
        if shape in given.only:
            said = {key: "full length" if key == "schedule" else value for key, value in (changes | stored).items()}
            row = {"shape": shape, "length": length, "configuration": ", ".join(f"{key}={value}" for key, value in said.items()) or "float32, all weights"}
            row |= rehearse(qwen3(*SHAPES[shape]), replace(PLAIN, **changes), length, **stored)
            print("{shape:11} L {length:4}  {configuration:80}  measured {measured:13,}  predicted {predicted:13,}  {error:+.1%}  "
                  "{cpu_seconds:7.2f} CPU-s, at least {least_seconds:.2f}".format(**row), flush=True)
            table = [pd.read_csv(given.out)] if given.out.exists() else []
            table = pd.concat([*(old[(old["shape"] != shape) | (old.length != length) | (old.configuration != row["configuration"])] for old in table),
                               pd.DataFrame([row])], ignore_index=True)  # a row at a time: what an interrupted run measured is kept
            table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
