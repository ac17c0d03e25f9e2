"""More tuning of a converted model on pairs of your own choice, outside the book: `hilda tune`, in as many processes as a launcher starts.

Adapters over a base, as those that come with HILDA, are tuned as notebook 03 made them: first the base learns the pairs left to right, in adapters
of its own, then the drafting adapters learn on over it, on the same pairs or on what the base itself answers. Every other model learns in all its
weights. Entry points: `tune`, `pairs_of`, `own_answers`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from hildalib import HildaError, artefacts, backbones, devices, evaluate, exports, gated, pairs, params, runs, training
from hildalib.cards import TUNING
from hildalib.decoding import ar_decode
from hildalib.recipe import Recipe, arm
from hildalib.stages import recipe_of
from hildalib.wsd import BlockSchedule

TOGETHER = 32  # prompts that the base answers together: 256 tokens of SmolLM2-135M each hold 0.2 GB of keys in bfloat16


@dataclass
class Plan:
    """sources: names of `hildalib.corpora` with pairs, or .jsonl files of {"prompt", "response"}, each with =N behind it or the first `pairs`.

    steps: of the base (0 leaves it as it is) or of all weights; draft_steps: of drafting adapters. own_answers: these learn on what the base answers
    instead of the responses (`own_answers`). length: tokens in a packed row. profile, overrides: notebook 03's parameters, which give the rest.
    arm: of `recipe.ARMS`, the objective of a model that learns in all its weights. license: of adapters to hand out.
    """

    sources: Sequence[str]
    pairs: int = 1600
    steps: int = 300
    draft_steps: int = 150
    own_answers: bool = False
    length: int = 256
    profile: str = "smol"
    overrides: Mapping[str, object] | None = None
    arm: str = "dLLM"
    license: str | None = None


def pairs_of(source: str, tokenizer, limit: int, seed: int, answered: bool = True) -> list[tuple[str, str]]:
    """(prompt as a user's turn, response) of a named source's train split, or of the first `limit` lines of a .jsonl file. HildaError for a line
    that is no pair; where nobody will look at responses (answered=False), they may be missing."""
    if not source.endswith(".jsonl"):
        return pairs.of_source(source, tokenizer, split="train", limit=limit, seed=seed)
    if not Path(source).is_file():
        raise HildaError(f"{source} is not there; give a .jsonl file of {{\"prompt\": ..., \"response\": ...}}, or the name of a corpus")
    found = []
    with open(source, encoding="utf-8") as lines:
        for number, line in zip(range(1, limit + 1), lines):
            try:
                prompt, response = (entry := json.loads(line))["prompt"], entry["response"] if answered else ""
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
    state = devices.processes()
    values, source, folder = params.load("03_sft", plan.profile, plan.overrides), backbones.fetch(model), Path(out)
    drafter, tokenizer = backbones.load(source, dtype=values["weights"])
    record, over = drafter.config.hilda, (source / backbones.ADAPTER_RECORD).is_file() and drafter.config.hilda.get("gated")
    if not record["block_size"]:
        raise HildaError(f"{model} is autoregressive; convert it first (notebook 02), or give a converted model such as smollm2-135m-dllm")
    if not over and hasattr(drafter, "peft_config"):
        raise HildaError(f"{model} holds adapters on every row; merge them first: hilda export {model} --to merged")
    if not over and (plan.own_answers or not plan.steps):
        raise HildaError(f"{model} is no drafting adapters over a base, so it needs steps of its own, on responses; leave out --own-answers and --steps 0")
    if state.is_main_process:
        _record(model, plan, values, folder)
    encoded = _encoded(plan, tokenizer, values["seed"])
    rows = _packed(encoded, plan.length, tokenizer, record["block_size"], state.is_main_process) if plan.steps or not plan.own_answers else None
    recipe = recipe_of(values, BlockSchedule(stable=(record["block_size"], plan.draft_steps if over else plan.steps)), "sft",
                       **{key: record[key] for key in ("label_shift", "causal_context")})
    if not over:
        changed = arm(replace(recipe, kl_weight=0.0), plan.arm, plan.length)  # a model that learns in all its weights has no parent under it
        training.train(drafter, tokenizer, rows, changed, folder / "every weight", title=plan.arm)
        return folder / "every weight" / "model"
    del drafter
    under = _base(source, tokenizer, rows, plan, values, folder / "twin")
    if plan.own_answers:
        encoded = own_answers(under, [prompt for prompt, _ in encoded], plan.length, values["precision"], folder, state)
        rows = _packed(encoded, plan.length, tokenizer, record["block_size"], state.is_main_process)
    drafter = backbones.load(source, dtype=values["weights"], base=under)[0]
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
    """What was asked, for the card, and lest a folder mix two tunings (HildaError where it would): names instead of this machine's folders, and of the
    parameters those that `plan` leaves to notebook 03."""
    used = {each.name for each in fields(Recipe)} | {"twin_rank", "weights"}
    told = {key: value for key, value in asdict(plan).items() if key not in ("overrides", "license")}
    told |= {"model": Path(model).name if Path(model).is_dir() else model, "sources": [Path(name).name if ".jsonl" in name else name for name in plan.sources],
             "parameters": {key: value for key, value in values.items() if key in used}}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TUNING
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(told)):
        raise HildaError(f"{folder} holds a tuning of another model or by other settings ({TUNING}); remove it or choose another --out")
    file.write_text(json.dumps(told, indent=1), encoding="utf-8")


def _base(source: Path, tokenizer, rows: dict[str, torch.Tensor] | None, plan: Plan, values: Mapping, folder: Path) -> str | Path:
    """What the drafting adapters of `source` shall lie on: their base, tuned for `plan.steps` steps, or as it is."""
    name = backbones.base_of(source)
    if not plan.steps:
        return name
    base = backbones.load(name, dtype=values["weights"])[0]
    if not hasattr(base, "peft_config"):
        torch.manual_seed(values["seed"])  # adapters are drawn from the global stream
        base = backbones.with_lora(base, values["twin_rank"])
    left_to_right = recipe_of(values, BlockSchedule(stable=(1, plan.steps)), "sft")
    training.train(base, tokenizer, rows, arm(replace(left_to_right, lr=values["adapter_lr"]), "AR twin"), folder, title="twin")
    return folder / "model"


def own_answers(model: str | Path, prompts: Sequence[list[int]], length: int, dtype: str, folder: Path, state) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, greedy answer ids) for those of `prompts` that the AR model `model` answers within `length` tokens, prompt and EOS included: what drafts
    for it should have learned, since they count where it would have written the same (distillation on the verifier's own text; DistillSpec, arXiv 2310.08461).

    The processes of `state` share the prompts; each keeps its part in `folder` (answers-*.csv), so nothing is asked twice.
    """
    speaker, tokenizer = backbones.load(model, dtype=dtype)
    if hasattr(speaker, "peft_config"):
        speaker = speaker.merge_and_unload()  # as `backbones.load` does under drafting adapters; plain, it decodes in straight lines
    fitting = [prompt for prompt in prompts if len(prompt) < length]
    mine = sorted(fitting[state.process_index::state.num_processes], key=len)  # those of a length together
    eos = tokenizer.eos_token_id

    def ask() -> pd.DataFrame:
        found = []
        for start in tqdm(range(0, len(mine), TOGETHER), desc="answers", unit="batch", disable=not state.is_main_process):
            part = mine[start:start + TOGETHER]
            ids, real = evaluate.left_pad(part, eos)
            decoded = ar_decode(speaker, ids.to(speaker.device), attention_mask=real.to(speaker.device), max_new_tokens=length - ids.shape[1])
            found += [(" ".join(map(str, prompt)), " ".join(map(str, row[:row.index(eos)])), tokenizer.decode(row[:row.index(eos)]))
                      for prompt, row in zip(part, decoded.ids.tolist()) if eos in row]
        return pd.DataFrame(found, columns=["prompt_ids", "answer_ids", "answer"])

    key = {"model": runs.digest(Path(model)) if Path(model).is_dir() else str(model), "prompts": mine, "length": length, "dtype": dtype}
    files = [folder / f"answers-{number}-of-{state.num_processes}.csv" for number in range(state.num_processes)]
    artefacts.kept(files[state.process_index], hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest(), ask)
    state.wait_for_everyone()
    found = pd.concat([artefacts.kept_table(file) for file in files])
    return [tuple([int(number) for number in text.split()] for text in both) for both in zip(found.prompt_ids, found.answer_ids)]


def _encoded(plan: Plan, tokenizer, seed: int) -> list[tuple[list[int], list[int]]]:
    wanted = [(name, int(count)) if count.isdecimal() else (entry, plan.pairs) for entry in plan.sources for name, _, count in [entry.rpartition("=")]]
    texts = [pair for name, count in wanted for pair in pairs_of(name, tokenizer, count, seed + 1, answered=plan.steps > 0 or not plan.own_answers)]
    return [tuple(tokenizer(list(pair), add_special_tokens=False)["input_ids"]) for pair in texts]


def _packed(encoded: list[tuple[list[int], list[int]]], length: int, tokenizer, block_size: int, say: bool) -> dict[str, torch.Tensor]:
    rows, left_out = pairs.pack_pairs(encoded, length, tokenizer.eos_token_id, block_size)
    if say:
        print(f"{len(encoded) - left_out:,} pairs in {len(rows['input_ids']):,} rows, {int(rows['maskable'].sum()):,} response tokens; "
              f"{left_out} longer than {length} tokens left out", flush=True)
    return rows
