"""Model cards of what `exports` writes: what it is, how to use it, how it was made and measured as far as the runs recorded it, and its licence.

Entry point: `card`. A number is in a card only where a table of the run that made the model has it.
"""

import json
from pathlib import Path

import pandas as pd

from hildalib import weights

CODE = "```"
TUNING = "tuning.json"  # what `hilda tune` was told, in its folder
WHOLE = """As a left-to-right model, with Transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```
"""
DIFFUSION = """As a diffusion model, which writes several tokens a forward and edits them, with hildalib:

```python
import hildalib

hildalib.generate("PROMPT", model="FOLDER", mode="Q")
```
"""
GATED = """The adapters act on the noisy rows of a block alone, so what reads the prompt and the closed blocks is the base (with the adapters in `twin/`,
where there is such a folder), and mode "own" writes its own greedy text, drafted in blocks and verified.
"""


def card(source: Path, model, checked: str, license: str | None, *, adapter: bool = False) -> str:
    """Markdown with the head that hubs read. source: the folder the model came from, inside the run that made it; checked: what reading it back
    showed; license: of the weights, None = that of the parent; adapter: the folder holds adapters beside a named base."""
    record, parent = model.config.hilda, model.config.hilda.get("parent") or "unknown"
    size, terms, kind = record["block_size"], license or "other", (model.config.architectures or ["causal LM"])[0]
    what = f"An editable block-diffusion language model (block size {size})" if size else "An autoregressive model with a [MASK] token"
    how = f"LoRA adapters and a [MASK] embedding for `{parent}`" if adapter else f"a plain `{kind}` with one more token, no remote code"
    head = ["---", f"license: {terms}", *([] if license else ["license_name: that-of-the-parent"]), f"library_name: {'peft' if adapter else 'transformers'}",
            "pipeline_tag: text-generation", *([f"base_model: {parent}"] if weights.HUB_ID.fullmatch(parent) else []),
            "tags:", "- block-diffusion", "- diffusion-language-model", "- hilda", "---"]
    origin = f" Its weights: {record['weights']}." if record.get("weights") else ""
    licence = f"{terms}." if license else f"The weights carry the licence of their parent, `{parent}`: look it up before you publish them."
    return "\n".join([
        *head, "", f"# {source.name}", "", f"{what}, made with HILDA from `{parent}`: {how}.{origin}", "",
        "## Use", "", *([] if adapter else [WHOLE]), *([DIFFUSION] if size else []), *([GATED] if adapter else []),
        *_numbers(source), "## How it was made", "", *_recipe(source),
        "The record in its configuration, key `hilda`:", "", f"{CODE}json", json.dumps(record, indent=1), CODE, "",
        "## Checked", "", checked, "", "## Licence", "", licence, ""])


def _run(source: Path) -> Path | None:
    """The folder of the run that `source` lies in."""
    return next((place for place in [source.absolute(), *source.absolute().parents[:3]] if (place / "stamp.json").is_file()), None)


def _recipe(source: Path) -> list[str]:
    """Parameters of `hilda tune`, or of the notebook that made the model and of those before it, with the clean tokens that they report."""
    last, lines = _run(source), []
    told = next((file for place in source.absolute().parents[:2] if (file := place / TUNING).is_file()), None)
    if told is not None:
        return ["Tuned further by `hilda tune`:", "", f"{CODE}json", told.read_text(encoding="utf-8"), CODE, ""]
    if last is None:
        return ["The parameters of its training were not recorded beside the weights.", ""]
    for run in sorted({last, *(file.parent for file in last.parent.glob("[0-9][0-9]_*/stamp.json") if file.parent.name < last.name)}):
        steps = json.loads((run / "stamp.json").read_text(encoding="utf-8"))["inputs"]["parameters"]
        tokens = json.loads(file.read_text(encoding="utf-8")).get("clean_tokens") if (file := run / "metrics.json").is_file() else None
        lines += [f"<details><summary>notebook `{run.name}` of HILDA{f', {tokens:,} clean tokens' if tokens else ''}</summary>", "", f"{CODE}json",
                  json.dumps(steps, indent=1), CODE, "", "</details>", ""]
    return lines


def _numbers(source: Path) -> list[str]:
    """The table of notebook 05 of the same run, where there is one."""
    run = _run(source)
    file = None if run is None else run.parent / "05_benchmarks" / "benchmarks.csv"
    if file is None or not file.is_file():
        return []
    rows = ["| task | decoder | right, 95 % interval | test items | tokens a forward | tokens a second |", "|---|---|---|---|---|---|"]
    rows += [f"| {row.task} | {row.arm} | {100 * row.accuracy:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}] | {row.items} | {row.tpf:.2f} | "
             f"{row.tokens_per_s:.1f} |" for row in pd.read_csv(file).itertuples()]
    return ["## Numbers", "", "From notebook `05_benchmarks` of the same run, beside the AR twin that saw the same tokens:", "", *rows, ""]
