# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: notebooks///ipynb,notebooks///py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Edit decoding
#
# **Question.** What do the two thresholds do: how sure must the model be to write a token (tau_mask), and to change its mind about one (tau_edit)?
#
# **Needs.** [03 · SFT](03_sft.ipynb) with the same `profile` and `seed`; where it has not run, SmolLM2-135M as HILDA hands it out is decoded.
#
# **Time.** Smoke: about 25 seconds. Profile nano: a minute.
#
# **Outputs.** `grid.csv`, presets S and Q tuned on validation prompts (`metrics.json`), stored traces, four figures, and the sliders at the end.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
arm = "dLLM"
task = "arithmetic"
items = 16
batch_size = 64
tau_masks = [0.5, 0.9]
tau_edits = [0.0, 0.5, 1.0]
max_post_steps = 4
max_new_tokens = 32
trace_prompts = 2
chat = False
judge = ""
tpf_q = 2.0
tpf_s = 3.0

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers

from hildalib import artefacts, backbones, evaluate, figures, intervals, paths, tasks, widgets
from hildalib.decoding import PRESETS, EditSettings, edit_decode

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK = "04_decode"
HANDED_OUT = "smollm2-135m-dllm"  # comes with HILDA, but for its base, which is downloaded once (98 MB)
source = artefacts.model_folder(profile, "03_sft", arm, seed, otherwise=HANDED_OUT)
model, tokenizer = backbones.load(source, dtype="float32")
who, chat = (HANDED_OUT, True) if source == HANDED_OUT else (f"{arm} of profile {profile}", chat)
benchmark = tasks.load(task)
referee = backbones.load(judge, dtype="float32") if judge else None
measure = "likelihood of a token" if judge else "accuracy"
print(f"{who}: block size {model.config.hilda['block_size']}, label shift {model.config.hilda['label_shift']}")

# %% [markdown]
# ## One decode, step by step
#
# Each forward looks at the current block. Masked positions whose best token is more probable than tau_mask are written (at least one); written ones whose best token has changed, with more than tau_edit, are edited. The block closes at the first forward that finds no mask and edits nothing.

# %%
prompts = [benchmark.prompt(item) for item in benchmark.items("validation", limit=trace_prompts, seed=seed)]
texts = evaluate.worded(benchmark, tokenizer, prompts, chat)


def settings(tau_mask: float, tau_edit: float) -> EditSettings:
    return EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, max_post_steps=max_post_steps,
                        max_new_tokens=max_new_tokens)


def decode(prompt: str, tau_mask: float, tau_edit: float):
    ids = torch.tensor(tokenizer([prompt], add_special_tokens=False)["input_ids"], device=model.device)
    return edit_decode(model, ids, settings(tau_mask, tau_edit), trace=True).trace


pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
fast = decode(texts[0], PRESETS["S"].tau_mask, PRESETS["S"].tau_edit)
last = figures.cells(fast, len(fast.ids) - 1, pieces)
origin = {"model": who, "task": task, "seed": seed, "device": str(model.device)}
figures.save(figures.filmstrip(fast, pieces), "04_filmstrip", last, profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## Quality against speed
#
# All pairs of thresholds on the same validation prompts. Tokens per forward (TPF) counts every forward: the prompt's, and the one that confirms each block. The quality is the share of right answers; texts without a right answer have a `judge`, an AR model, and their quality is the likelihood of a token under it (the geometric mean over the text, averaged over texts).

# %%
def quality(frame: pd.DataFrame) -> pd.DataFrame:
    row = evaluate.summary(frame)
    if not judge:
        return row
    nats = pd.Series(evaluate.likelihood(*referee, frame.prompt.tolist(), frame.text.tolist())).dropna()
    mean, low, high = intervals.mean_interval(np.exp(-nats))
    return row.assign(**{measure: mean, "low": low, "high": high, "judge_nats": nats.mean()})


rows = []
for tau_mask, tau_edit in itertools.product(tau_masks, tau_edits):
    decoder = evaluate.diffusion(settings(tau_mask, tau_edit))
    frame = evaluate.run(model, tokenizer, benchmark, decoder, limit=items, seed=seed, split="validation",
                         batch_size=batch_size, chat=chat)
    rows.append(quality(frame).assign(tau_mask=tau_mask, tau_edit=tau_edit))
    print(f"tau_mask {tau_mask:<4} tau_edit {tau_edit:<4} "
          f"{measure} {rows[-1][measure][0]:.3f}  TPF {rows[-1].tpf[0]:.2f}", flush=True)
grid = pd.concat(rows, ignore_index=True).assign(arm="dLLM")

# %% [markdown]
# ## Presets for this model
#
# The published thresholds belong to other models. Ours: **Q** is the pair of the best quality that writes at least `tpf_q` tokens a forward, **S** the best with at least `tpf_s` (the fastest, if none is that fast). Chosen here on validation prompts, used on test prompts in notebook 05.

# %%
def best(floor: float) -> pd.Series:
    fast = grid[grid.tpf >= min(floor, grid.tpf.max())]
    return fast.sort_values([measure, "tpf"]).iloc[-1]


presets = {"Q": best(tpf_q), "S": best(tpf_s)}
grid["preset"] = ""
for name, row in presets.items():
    grid.loc[row.name, "preset"] = " and ".join(filter(None, [grid.preset[row.name], name]))
columns = ["tau_mask", "tau_edit", measure, "low", "high", "tpf", "nfe", "positions_fed", "preset"]
grid[columns].round(3)

# %%
named = {name: (row.tau_mask, row.tau_edit) for name, row in presets.items()}
origin["items"] = items
figures.save(figures.surface(grid, quality=measure, presets=named), "04_surface", grid, profile=profile, seed=seed, provenance=origin)
plt.show()

# %%
figures.save(figures.pareto(grid, quality=measure), "04_pareto", grid, profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## Can its confidence be believed?
#
# A token is written because it was probable. How often was it right? Right means: equal to the gold response at that position, for prompts whose gold response is unique (stories have none).

# %%
items_seen = benchmark.items("validation", limit=items, seed=seed)
confidences, right = [], []
for item in items_seen[:min(items, 64)] if not judge else ():
    prompt = benchmark.prompt(item)
    trace = decode(evaluate.worded(benchmark, tokenizer, [prompt], chat)[0], *named["Q"])
    gold = tokenizer(benchmark.response(item), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    start = int(trace.prompt_length[0])
    span = slice(start, min(start + len(gold), trace.ids.shape[2]))
    written = ~np.isnan(trace.confidence[-1, 0, span])
    confidences += trace.confidence[-1, 0, span][written].tolist()
    right += (trace.ids[-1, 0, span] == np.array(gold[:span.stop - start]))[written].tolist()
if confidences:
    calibration = figures.calibration(confidences, right)
    figures.save(figures.confidence(calibration), "04_confidence", calibration, profile=profile, seed=seed,
                 provenance=origin | {"items": min(items, 64)})
    plt.show()

# %% [markdown]
# ## Drag the thresholds
#
# Every pair of thresholds has its trace stored: a slider only shows another drawing, no model runs. *Decode again* runs the model at the thresholds shown.

# %%
text_of = dict(zip(prompts, texts))
traces = {point: decode(text_of[point[0]], *point[1:])
          for point in itertools.product(prompts, tau_masks, tau_edits)}
widgets.explorer(traces, grid, tokens=pieces, quality=measure,
                 decode_again=lambda prompt, *thresholds: decode(text_of[prompt], *thresholds))

# %%
output = paths.output_dir(profile, NOTEBOOK, seed)
grid.to_csv(output / "grid.csv", index=False)
found = {name: {"tau_mask": float(row.tau_mask), "tau_edit": float(row.tau_edit),
                "validation": float(row[measure]), "tpf": float(row.tpf)} for name, row in presets.items()}
artefacts.write_metrics({"presets": found, "measure": measure, "max_post_steps": max_post_steps,
                         "items": items},
                        profile, NOTEBOOK, seed, model=model)
for name, row in presets.items():
    print(f"{name}: tau_mask {row.tau_mask}, tau_edit {row.tau_edit}: "
          f"{measure} {row[measure]:.3f} [{row.low:.3f}, {row.high:.3f}] at {row.tpf:.2f} tokens per forward")

# %% [markdown]
# ## What we learned
#
# The surface shows what each threshold buys: a low tau_mask writes more tokens a forward and gets more of them wrong; a low tau_edit repairs that and pays for it in forwards that confirm.
#
# In three runs of profile nano editing repairs nearly everything. Without it (tau_edit 1) accuracy falls from 97.9 % at 4.3 tokens a forward (tau_mask 0.9) to 77.6 % at 5.6 (tau_mask 0.1); with tau_edit 0 it is 99.1 to 99.3 % wherever tau_mask stands, at 3.7 (tau_mask 0.1) to 3.4 tokens a forward (0.9). So a careless draft that is edited is as good as a careful one that is edited, and faster; beside a careful one that is not (tau_mask 0.9), it is no worse (+1.4 points [-2.0, +4.9]) at 3.7 instead of 4.3 tokens a forward (means over runs, validation prompts). All pairs that edit are fast enough for S and accurate enough for Q, so S and Q are one pair in each of these runs. Where the front lies is the answer for this model and this task, not a law.
#
# Profile smol (SmolLM2-135M after 1 M tokens and tuning, twelve stories judged by the parent) is far from that: the likelihood of a token is 0.16 at one token a forward, 0.14 at 1.7 (Q) and 0.11 at 2.8 (S), with intervals over stories that span 0.03 to 0.24. Where drafts are careless it is 0.02 higher with edits (0.11 to 0.14 at tau_mask 0.2, 0.09 to 0.11 at 0.1), well within those; from 0.25 on edits do nothing. Over a twin of which every weight was tuned (an earlier run) Q and S had half of that, 0.07 and 0.06; perhaps because that twin is further from the base over which the adapters were trained.
#
# Next: [05 · Benchmarks](05_benchmarks.ipynb).
