"""The training half of notebooks 02 and 03, from their checked parameters: the same start, recipe and folder in a notebook and under a launcher.

Entry points: `conversion` (02) and `tuning` (03), each a `Stage` whose `train` trains one arm; `run` is `hilda train`, which trains the arms in as
many processes as `accelerate launch` or `torchrun` starts, and leaves them where the notebook finds them finished.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from hildalib import HildaError, artefacts, backbones, book, devices, gated, nano, paths, training
from hildalib.recipe import Recipe, arm, every_weight
from hildalib.wsd import BlockSchedule


@dataclass
class Stage:
    """What the arms of a notebook have in common. start(arm's name, its recipe) -> model to train; parent: the teacher, or for 02 what the arms
    start from; rows: split -> rows; rates: arm -> peak learning rate, where that is not the recipe's."""

    folder: Path
    tokenizer: object
    rows: dict[str, dict]
    recipe: Recipe
    start: Callable
    parent: object = None
    rates: Mapping[str, float] = field(default_factory=dict)

    def train(self, name: str):
        """Trains arm `name`, or takes it over where it is finished, and returns its log. A parent that does not teach waits in main memory."""
        changed = arm(self.recipe, name, self.rows["train"]["input_ids"].shape[1])
        changed = replace(changed, lr=self.rates.get(name, changed.lr))
        model = self.start(name, changed)
        teacher = self.parent if changed.kl_weight and not hasattr(model, "peft_config") else None
        with contextlib.nullcontext() if teacher or self.parent is None else _waiting(self.parent):
            return training.train(model, self.tokenizer, self.rows["train"], changed, self.folder / name, parent=teacher, title=name,
                                  validation=self.rows.get("validation"))


@contextlib.contextmanager
def _waiting(parent):
    """Within, `parent` is in main memory; a quantised one is small and stays."""
    device = parent.device
    if device.type == "cpu" or getattr(parent, "is_quantized", False):
        yield
        return
    parent.to("cpu")
    torch.cuda.empty_cache()
    yield
    parent.to(device)


def recipe_of(values: Mapping, schedule: BlockSchedule, stage: str, **given) -> Recipe:
    """The recipe that `values` (parameters of a notebook) and `given`, which go first, describe: a parameter is the field of its name."""
    names = {each.name for each in fields(Recipe)} - {*given, "schedule", "stage"}
    return Recipe(schedule=schedule, stage=stage, **given, **{name: value for name, value in values.items() if name in names})


def schedule_of(values: Mapping) -> BlockSchedule:
    """Of notebook 02."""
    warmup, decay = ([tuple(rung) for rung in values[name]] for name in ("warmup", "decay"))
    return BlockSchedule(warmup=warmup, stable=tuple(values["stable"]), decay=decay)


def conversion(values: Mapping) -> Stage:
    """Notebook 02: `nano` is trained first, as an AR model; any other parent is loaded. HildaError where quantised weights would have to learn."""
    profile, seed, folder = values["profile"], values["seed"], paths.checkpoint_dir(values["profile"], "02_wsd", values["seed"])
    recipe = recipe_of(values, schedule_of(values), "wsd")
    adapters = values["lora_rank"] or (recipe.adapter_rank and values["arms"] == ["dLLM"])
    if values["quantize"] and not adapters:
        raise HildaError(f"quantize = {values['quantize']}: quantised weights are frozen; set lora_rank to the rank of adapters that learn, e.g. 32")
    if values["model"] == "nano":
        parent, tokenizer = nano.nano(values["hidden"], values["layers"], seed=seed)
        parent.to(devices.choose_device())
    else:
        parent, tokenizer = backbones.load(values["model"], dtype=values["weights"], quantize=values["quantize"] or None)
    vocabulary = len(parent.get_input_embeddings().weight)
    rows = {split: artefacts.load_rows(profile, "01_data", split, seed, vocab_size=vocabulary) for split in ("train", "validation")}
    if values["model"] == "nano":
        steps = values["parent_steps"]
        first = Recipe(schedule=BlockSchedule(stable=(1, steps)), batch_size=values["parent_batch"], lr=values["parent_lr"],
                       warmup_steps=min(50, steps // 10), stage="ar", seed=seed, save_every=values["save_every"])
        training.train(parent, tokenizer, rows["train"], first, folder / "parent", title="AR parent")
        parent.name_or_path = str(folder / "parent" / "model")

    def start(_, recipe: Recipe):
        model = copy.deepcopy(parent)
        torch.manual_seed(seed)  # adapters are drawn from the global stream
        if recipe.adapter_rank:  # adapters on noisy rows alone: what reads clean text stays the parent
            return gated.gate(backbones.with_lora(model, recipe.adapter_rank))
        return backbones.with_lora(model, values["lora_rank"]) if values["lora_rank"] else model

    return Stage(folder, tokenizer, rows, recipe, start, parent)


def origins(values: Mapping) -> dict[str, Path | str]:
    """Arm of notebook 03 -> the model that it starts from: its own of 02, or where 02 has none, the dLLM; the twin with `twin_rank` from the base of
    the dLLM's adapters. HildaError where there are no such adapters."""
    profile, seed, found = values["profile"], values["seed"], {}
    there = {path.parent.name for path in paths.checkpoint_dir(profile, "02_wsd", seed).glob("*/model")}
    for name in values["arms"]:
        bare = name == "AR twin" and values["twin_rank"]
        folder = artefacts.model_folder(profile, "02_wsd", name if name in {*there, "AR twin"} and not bare else "dLLM", seed)
        if bare and not (folder / backbones.ADAPTER_RECORD).is_file():
            raise HildaError(f"twin_rank = {values['twin_rank']}: notebook 02 made no adapters on noisy rows; set its adapter_rank, or twin_rank to 0")
        found[name] = backbones.base_of(folder) if bare else folder
    return found


def beginnings(values: Mapping) -> str:
    """What `origins` says, in words."""
    return ", ".join(f"{name} starts from {f'{start.parent.name} of 02' if isinstance(start, Path) else start}" for name, start in origins(values).items())


def tuning(values: Mapping) -> Stage:
    """Notebook 03: what 02 made of an arm, tuned on responses; adapters on noisy rows over the tuned weights of arm `adapter_base`, where it is named."""
    profile, seed, folders = values["profile"], values["seed"], origins(values)

    def load(name: str, base: str = ""):
        return backbones.load(folders[name], dtype=values["weights"], base=artefacts.model_folder(profile, "03_sft", base, seed) if base else None)

    def start(name: str, recipe: Recipe):
        model = load(name, values["adapter_base"] if recipe.adapter_rank else "")[0]
        if name != "AR twin" or not values["twin_rank"]:
            return model
        torch.manual_seed(seed)  # adapters are drawn from the global stream
        return backbones.with_lora(model, values["twin_rank"])

    converted = [name for name in values["arms"] if name != "AR twin"]
    keeping = [name for name in converted if not every_weight(name)]
    first, tokenizer = load(next(iter(keeping or converted), "AR twin"))
    record, rank = first.config.hilda, gated.rank(first)
    if values["adapter_base"] and keeping and not rank:
        raise HildaError(f"adapter_base = {values['adapter_base']}: notebook 02 made no adapters on noisy rows; set its adapter_rank, or adapter_base to ''")
    rows = {"train": artefacts.load_rows(profile, "01_data", "sft-train", seed, vocab_size=len(first.get_input_embeddings().weight))}
    kept = {key: record[key] for key in ("label_shift", "causal_context")}
    if not keeping and not kept["causal_context"]:
        kept["context_weight"] = 0.0  # of the dLLM, which is not among these arms
    recipe = recipe_of(values, BlockSchedule(stable=(values["block_size"], values["steps"])), "sft", adapter_rank=rank, **kept)
    teacher = None
    if not rank and any(arm(recipe, name, rows["train"]["input_ids"].shape[1]).kl_weight for name in values["arms"]):  # adapters learn from the parent under them
        teacher = backbones.load(artefacts.model_folder(profile, "02_wsd", "AR twin", seed), dtype=values["weights"])[0]
    rates = {"AR twin": values["adapter_lr"]} if values["twin_rank"] else {}
    return Stage(paths.checkpoint_dir(profile, "03_sft", seed), tokenizer, rows, recipe, start, teacher, rates)


STAGES = {"02_wsd": conversion, "03_sft": tuning}


def run(notebook: str, profile: str, overrides: Mapping | None = None, arms: Sequence[str] = ()) -> int:
    """`hilda train`: the arms of a notebook (default: all), trained by all processes of the launcher; 0 when they are there.

    The run is begun as `hilda run` begins it, so the same command, in any number of processes, continues what was interrupted, and `hilda run`
    afterwards finds the arms trained. HildaError for a notebook without a training half, a wrong parameter or absent results of 01 or 02.
    """
    if notebook not in STAGES:
        raise HildaError(f"{notebook} has no training that several processes could share; use {' or '.join(STAGES)}")
    state = devices.processes()
    (job,) = book.plan(book.Book(), [notebook], profile, overrides)
    values = job.parameters | ({"arms": list(arms)} if arms else {})
    with book.lock(profile) if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            book.ready([job])
            if job.state()[0] == "up to date":
                print(f"{job.name} is up to date")
            else:
                book.begin(job, job.inputs(), force=False)
        state.wait_for_everyone()
        if job.state()[0] != "up to date":
            stage = STAGES[notebook](values)
            for name in values["arms"]:
                stage.train(name)
    if state.is_main_process:
        print(f"next: hilda run {notebook} --profile {profile}" + "".join(f" --set {key}={value}" for key, value in (overrides or {}).items()))
    return 0
