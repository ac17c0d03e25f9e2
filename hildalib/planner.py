"""What a training stage needs before it is started: peak memory in its parts, operations, time, and whether a card holds it.

Entry points: `plan` (a `Plan`, from parameters alone: no weights, no data), `run` (`hilda plan`), `config_of`. Peak memory is that of the step itself
run without content (`footprint`), at the most positions with a loss that a step can have; time is operations over a matmul rate, hence a lower bound.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hildalib import HildaError, devices, nano, params
from hildalib.footprint import Step, simulate
from hildalib.progress import duration
from hildalib.recipe import Recipe, arm
from hildalib.stages import recipe_of, schedule_of
from hildalib.values import nearest
from hildalib.wsd import BlockSchedule

UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}
RESERVE = 0.5e9  # bytes of a card that the driver's context and the allocator's rounding take; ours, not measured on a card here


def _qwen3(hidden: int, intermediate: int) -> Qwen3Config:
    return Qwen3Config(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       head_dim=128, vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=32_768)


KNOWN = {  # published shapes, so that planning needs no network
    "smollm2-135m": LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                                vocab_size=49_153, tie_word_embeddings=True, max_position_embeddings=8_192),
    "Qwen/Qwen3-0.6B-Base": _qwen3(1024, 3072), "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144)}
REMEDIES = (  # tried in this order, each on top of those before it: from what costs time to what changes the model
    {"gradient_checkpointing": "true"}, {"head_rows": "128"}, {"batch_size": "1"}, {"optimizer": "paged_adamw_8bit"},
    {"weights": "bfloat16", "precision": "bfloat16"}, {"quantize": "nf4", "lora_rank": "32"})


@dataclass
class Plan:
    """step: of one micro-batch; seconds: of the whole stage at `rate` FLOP a second; fits: None without a memory to fit in."""

    values: dict
    recipe: Recipe
    length: int
    parameters: int
    step: Step
    rate: float
    memory: float | None

    @property
    def needed(self) -> int:
        """Bytes that must be on the card at the highest moment."""
        return self.step.peak - self.step.pageable

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.needed + RESERVE <= self.memory

    @property
    def tokens(self) -> int:
        """Clean tokens of the stage."""
        return self.recipe.schedule.total_steps * self.recipe.global_batch * self.length

    @property
    def flops_a_token(self) -> float:
        """Mean over the stage: steps at other block sizes have other rows, drafts and a teacher are forwards more."""
        recipe, size = self.recipe, self.recipe.schedule.block_size(self.recipe.schedule.total_steps)
        planned = dataclasses.replace(recipe, schedule=BlockSchedule(stable=(size, 1)), ar_share=0.0, kl_weight=0.0, draft_share=0.0, residual_share=0.0)
        extra = recipe.draft_share * recipe.draft_turns + recipe.residual_share
        rows = (recipe.cost(self.length) - (recipe.kl_weight > 0)) / (3 + extra) / (planned.cost(self.length) / 3)
        forward = self.step.forward_flops * (extra * rows + (recipe.kl_weight > 0) / (1 + recipe.copies_used))
        return (self.step.flops * rows + forward) / (recipe.batch_size * self.length)

    @property
    def seconds(self) -> float:
        return self.tokens * self.flops_a_token / self.rate

    def lines(self) -> list[str]:
        recipe, step = self.recipe, self.step
        rows = [f"{self.parameters:,} parameters, {step.trained:,} of them trained; a step: {recipe.accumulate} x {recipe.batch_size} rows of {self.length:,} tokens", ""]
        rows += [f"  {name:20} {size / 1e9:7.3f} GB" for name, size in step.parts.items() if size > step.peak / 2000]
        rows += [f"  {'peak':20} {step.peak / 1e9:7.3f} GB" + (f", {step.pageable / 1e9:.3f} GB of it may leave the card" if step.pageable else "")]
        if self.memory is not None:
            rows += [f"  {'fits' if self.fits else 'does NOT fit'} in {self.memory / 1e9:.2f} GB, of which {RESERVE / 1e9:.1f} GB are left to driver and allocator"]
        days = f"{self.seconds / 86400:,.1f} days" if self.seconds > 2 * 86400 else duration(self.seconds)
        return [*rows, "", f"  at most {self.rate / self.flops_a_token:.3g} tokens/s at {self.rate / 1e9:.3g} GFLOP/s; {self.tokens:,} tokens take at least {days}"]


def bytes_of(text: str) -> float:
    """"8GB" or "7.5GiB" in bytes."""
    for unit, size in UNITS.items():
        if text.endswith(unit) and text.removesuffix(unit).strip().replace(".", "", 1).isdecimal():
            return float(text.removesuffix(unit)) * size
    raise HildaError(f"{text!r} is not an amount of memory; write for example 8GB or 7.5GiB")


def config_of(values: Mapping):
    """Configuration of the model that the parameters of 02 name: from this table, a folder, or config.json alone from the hub."""
    name = values["model"]
    if name == "nano":
        return nano.nano(values["hidden"], values["layers"])[0].config  # its vocabulary is made with it; smaller than a step's rows
    if name in KNOWN:
        return KNOWN[name]
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise HildaError(f"no configuration of {name!r} ({type(error).__name__}): it is neither a folder with config.json nor to be had from the hub; "
                         f"{nearest(name, KNOWN)}") from error


def plan(notebook: str, profile: str, overrides: Mapping | None = None, *, name: str = "dLLM", memory: float | None = None, rate: float | None = None) -> Plan:
    """Of arm `name` of 02_wsd or 03_sft. overrides: as for --set, for this notebook, 02 or 01 (`length`). rate: FLOP a second; None measures this machine."""
    if notebook not in ("02_wsd", "03_sft"):
        raise HildaError(f"{notebook} has no plan; use 02_wsd or 03_sft")
    chain = ["01_data", "02_wsd", *([notebook] if notebook != "02_wsd" else [])]
    own = {part: {field.name for field in dataclasses.fields(params.RECORDS[part])} for part in chain}
    for key in overrides or {}:
        if not any(key in keys for keys in own.values()):
            raise HildaError(f"--set: unknown parameter {key!r}; {nearest(key, set().union(*own.values()))}")
    given = {part: params.load(part, profile, {key: value for key, value in (overrides or {}).items() if key in own[part]}) for part in chain}
    values, first = given[notebook], given["02_wsd"]
    if notebook == "02_wsd":
        recipe = recipe_of(values, schedule_of(values), "wsd")
    else:
        recipe = recipe_of(values, BlockSchedule(stable=(values["block_size"], values["steps"])), "sft", adapter_rank=first["adapter_rank"],
                           label_shift=first["label_shift"], causal_context=first["causal_context"])
    config, length = config_of(first), given["01_data"]["length"]
    recipe = arm(recipe, name, length)
    dtype = torch.bfloat16 if "bfloat16" in (values["weights"], values["precision"]) else torch.float32
    math = "pascal" in profile.split("+")[1:]
    step = simulate(config, recipe, length, weights=values["weights"], quantize=first["quantize"], lora_rank=first["lora_rank"], math=math)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    return Plan(values, recipe, length, parameters, step, rate or devices.matmul_rate(devices.choose_device(), dtype, 1024) * 1e9, memory)


def remedy(notebook: str, profile: str, overrides: Mapping, **options) -> tuple[dict, Plan] | None:
    """The first of REMEDIES, cumulated, under which the stage fits, as overrides, and its plan; None where none is enough."""
    known = {field.name for part in ("02_wsd", notebook) for field in dataclasses.fields(params.RECORDS[part])}
    base, changed = plan(notebook, profile, overrides, **options), {}
    for change in REMEDIES:
        new = {key: value for key, value in change.items() if key in known and str(base.values.get(key)).lower() != value}
        if "weights" in new and "pascal" in profile:
            continue  # no bfloat16 there
        if "batch_size" in new:
            new["accumulate"] = str(base.recipe.global_batch)
        if not new:
            continue
        changed |= new
        found = plan(notebook, profile, {**overrides, **changed}, **options)
        if found.fits:
            return changed, found
    return None


def run(notebook: str, profile: str, overrides: Mapping, name: str, memory: str | None, gflops: float | None) -> int:
    """`hilda plan`: prints the plan; 1 if a memory was named and the stage does not fit, with what would make it fit."""
    options = {"name": name, "memory": None if memory is None else bytes_of(memory), "rate": gflops and gflops * 1e9}
    found = plan(notebook, profile, overrides, **options)
    print(f"{notebook}, profile {profile}, arm {name}: " + "\n".join(found.lines()))
    if found.fits is not False:
        return 0
    way = remedy(notebook, profile, overrides, **options | {"rate": found.rate})
    if way is None:
        print("\nno setting makes it fit; a shorter `length` (01_data) or a smaller model will")
    else:
        print("\nit fits with " + " ".join(f"--set {key}={value}" for key, value in way[0].items()) + ":\n" + "\n".join(way[1].lines()[2:]))
    return 1
