"""More tuning of a converted model on pairs of your own choice, outside the book: `hilda tune`, in as many processes as a launcher starts.

Adapters over a base, as those that come with HILDA, are tuned as notebook 03 made them: first the base learns the pairs left to right, in adapters
of its own, then the drafting adapters learn on over it. Every other model learns in all its weights. Entry points: `tune`, `pairs_of`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from hildalib import HildaError, backbones, devices, exports, gated, pairs, params, training
from hildalib.cards import TUNING
from hildalib.recipe import Recipe, arm
from hildalib.stages import recipe_of
from hildalib.wsd import BlockSchedule


@dataclass
class Plan:
    """sources: names of `hildalib.corpora` with pairs, or .jsonl files of {"prompt", "response"}, each with =N behind it or the first `pairs`.

    steps: of the base or of all weights; draft_steps: of drafting adapters. length: tokens in a packed row. profile, overrides: notebook 03's
    parameters, which give the rest. arm: of `recipe.ARMS`, the objective of a model that learns in all its weights. license: of adapters to hand out.
    """

    sources: Sequence[str]
    pairs: int = 1600
    steps: int = 300
    draft_steps: int = 150
    length: int = 256
    profile: str = "smol"
    overrides: Mapping[str, object] | None = None
    arm: str = "dLLM"
    license: str | None = None


def pairs_of(source: str, tokenizer, limit: int, seed: int) -> list[tuple[str, str]]:
    """(prompt as a user's turn, response) of a named source's train split, or of the first `limit` lines of a .jsonl file. HildaError for a line
    that is no pair."""
    if not source.endswith(".jsonl"):
        return pairs.of_source(source, tokenizer, split="train", limit=limit, seed=seed)
    if not Path(source).is_file():
        raise HildaError(f"{source} is not there; give a .jsonl file of {{\"prompt\": ..., \"response\": ...}}, or the name of a corpus")
    found = []
    with open(source, encoding="utf-8") as lines:
        for number, line in zip(range(1, limit + 1), lines):
            try:
                prompt, response = (entry := json.loads(line))["prompt"], entry["response"]
            except (ValueError, KeyError, TypeError):
                prompt = response = None
            if not isinstance(prompt, str) or not isinstance(response, str):
                raise HildaError(f"{source}, line {number}: not {{\"prompt\": text, \"response\": text}}")
            found.append((backbones.chat_prompt(tokenizer, prompt), response))
    return found


def tune(model: str, out: str, plan: Plan) -> Path:
    """Tunes a copy of `model` by `plan` and returns the folder of what came of it: `out`/model, adapters to hand out, where `model` is adapters over a base
    that others have or adapters of one; else the folder of the last training. The same call continues what was interrupted. HildaError for a
    model that is not converted, sources without pairs, or a wrong parameter."""
    from accelerate import PartialState

    state = PartialState(cpu=devices.choose_device("auto").type == "cpu")  # chooses this process's device before a model is loaded
    values, source, folder = params.load("03_sft", plan.profile, plan.overrides), backbones.fetch(model), Path(out)
    drafter, tokenizer = backbones.load(source, dtype=values["weights"])
    record, over = drafter.config.hilda, (source / backbones.ADAPTER_RECORD).is_file() and drafter.config.hilda.get("gated")
    if not record["block_size"]:
        raise HildaError(f"{model} is autoregressive; convert it first (notebook 02), or give a converted model such as smollm2-135m-dllm")
    if not over and hasattr(drafter, "peft_config"):
        raise HildaError(f"{model} holds adapters on every row; merge them first: hilda export {model} --to merged")
    if state.is_main_process:
        _record(model, plan, values, folder)
    rows = _rows(plan, tokenizer, record["block_size"], values["seed"], say=state.is_main_process)
    recipe = recipe_of(values, BlockSchedule(stable=(record["block_size"], plan.draft_steps if over else plan.steps)), "sft",
                       **{key: record[key] for key in ("label_shift", "causal_context")})
    if not over:
        changed = arm(replace(recipe, kl_weight=0.0), plan.arm, plan.length)  # a model that learns in all its weights has no parent under it
        training.train(drafter, tokenizer, rows, changed, folder / "every weight", title=plan.arm)
        return folder / "every weight" / "model"
    del drafter
    twin = replace(recipe, schedule=BlockSchedule(stable=(record["block_size"], plan.steps)), lr=values["adapter_lr"])
    base = backbones.load(backbones.base_of(source), dtype=values["weights"])[0]
    if not hasattr(base, "peft_config"):
        torch.manual_seed(values["seed"])  # adapters are drawn from the global stream
        base = backbones.with_lora(base, values["twin_rank"])
    training.train(base, tokenizer, rows, arm(twin, "AR twin"), folder / "twin", title="twin")
    del base
    drafter = backbones.load(source, dtype=values["weights"], base=folder / "twin" / "model")[0]
    training.train(drafter, tokenizer, rows, replace(recipe, adapter_rank=gated.rank(drafter)), folder / "drafts", title="drafts")
    made = folder / "model"
    if state.is_main_process and not made.exists():
        try:
            print(exports.export(folder / "drafts" / "model", "adapter", made, license=plan.license), flush=True)
        except HildaError as error:
            print(f"what it lies on cannot be handed out beside it ({error}); it stays in two folders", flush=True)
    state.wait_for_everyone()
    return made if made.exists() else folder / "drafts" / "model"


def _record(model: str, plan: Plan, values: Mapping, folder: Path) -> None:
    """What was asked, for the card: names instead of this machine's folders, and of the parameters those that `plan` leaves to notebook 03."""
    used = {each.name for each in fields(Recipe)} | {"twin_rank", "weights"}
    told = {key: value for key, value in asdict(plan).items() if key not in ("overrides", "license")}
    told |= {"model": Path(model).name if Path(model).is_dir() else model, "sources": [Path(name).name if ".jsonl" in name else name for name in plan.sources],
             "parameters": {key: value for key, value in values.items() if key in used}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TUNING).write_text(json.dumps(told, indent=1), encoding="utf-8")


def _rows(plan: Plan, tokenizer, block_size: int, seed: int, say: bool) -> dict[str, torch.Tensor]:
    wanted = [(name, int(count)) if count.isdecimal() else (entry, plan.pairs) for entry in plan.sources for name, _, count in [entry.rpartition("=")]]
    texts = [pair for name, count in wanted for pair in pairs_of(name, tokenizer, count, seed + 1)]
    encoded = [tuple(tokenizer(list(pair), add_special_tokens=False)["input_ids"]) for pair in texts]
    rows, left_out = pairs.pack_pairs(encoded, plan.length, tokenizer.eos_token_id, block_size)
    if say:
        print(f"{len(encoded) - left_out:,} pairs in {len(rows['input_ids']):,} rows, {int(rows['maskable'].sum()):,} response tokens; "
              f"{left_out} longer than {plan.length} tokens left out", flush=True)
    return rows
