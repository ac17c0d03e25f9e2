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
# # 05 · Benchmarks
#
# **Question.** On prompts that nothing was tuned on: what does the editable block-diffusion model get right, at what cost, beside its autoregressive twin? And which parts of its recipe pay, at equal tokens per forward?
#
# **Needs.** [03 · SFT](03_sft.ipynb) and [04 · Edit decoding](04_decode.ipynb) with the same `profile` and `seed`.
#
# **Time.** Smoke: about 20 seconds. Profile nano: 20 seconds.
#
# **Outputs.** `benchmarks.csv` and `items.csv` (this seed), `questions.csv`, `paired.csv`, and figures over all seeds that have been run.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
dtype = "float32"
task_names = ["arithmetic"]
items = 16
open_items = 16
tolerance = 0.1
batch_size = 64
max_new_tokens = 32
other_arms = ["no T2T"]
sweep_masks = [0.5, 0.9]
sweep_edits = [0.5, 1.0]
sweep_items = 16
against = ["no T2T"]
against_tasks = ["arithmetic"]
against_items = 16
judge = ""
chat = False

# %%
import itertools
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers

from hildalib import (artefacts, backbones, comparison, duel, evaluate, figures, intervals, paths,
                      tasks)
from hildalib.decoding import EditSettings

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK = "05_benchmarks"
output, left = paths.output_dir(profile, NOTEBOOK, seed), paths.checkpoint_dir(profile, NOTEBOOK, seed)
chosen = artefacts.read_metrics(profile, "04_decode", seed)
folders = {name: artefacts.model_folder(profile, "03_sft", name, seed)
           for name in ("dLLM", "AR twin", *other_arms)}
folders |= {name: folder for name in against
            if (folder := artefacts.model_folder(profile, "03_sft", name, seed, otherwise=""))}
models = {name: backbones.load(folder, dtype=dtype)[0] for name, folder in folders.items()}
tokenizer = backbones.load(folders["dLLM"], dtype=dtype)[1]

# %% [markdown]
# ## The table
#
# S and Q are the presets that notebook 04 chose on validation prompts; test prompts are used here and only here. A dLLM with a causal context has a third way, *own text*: it drafts a block, reads it token by token and keeps what it would have written so (self-speculation; notebook 09). Where adapters draft over frozen weights, that is the greedy text of what lies under them: of the parent, or of the tuned twin (`adapter_base` in 03). With a `tolerance` below 1 a draft also stays while it is at least that many times as probable as what would have been written: another text, in fewer forwards. The twin decodes greedily with a KV cache. Intervals are 95 % Wilson intervals over items; forwards, tokens per forward and positions fed count everything from the prompt's forward on.

# %%
def settings(tau_mask: float, tau_edit: float) -> EditSettings:
    return EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, max_post_steps=chosen["max_post_steps"],
                        max_new_tokens=max_new_tokens)


contestants = {f"dLLM {mode}": ("dLLM", evaluate.diffusion(settings(preset["tau_mask"], preset["tau_edit"])))
               for mode, preset in sorted(chosen["presets"].items())}
record = models["dLLM"].config.hilda
if record["causal_context"] and record["label_shift"]:
    contestants["dLLM own text"] = ("dLLM", evaluate.speculative(max_new_tokens))
    if tolerance < 1:
        contestants[f"dLLM own text ≥ {tolerance:g}"] = ("dLLM", evaluate.speculative(max_new_tokens, tolerance))
contestants["AR twin"] = ("AR twin", evaluate.autoregressive(max_new_tokens))


def answers(task_name: str, label: str, count: int) -> pd.DataFrame:
    """One row a test item; an interrupted run keeps what it has asked."""
    name, decoder = contestants[label]
    task = tasks.load(task_name)
    limit = open_items if hasattr(task, "metrics") else count
    ask = partial(evaluate.run, models[name], tokenizer, task, decoder, seed=0, batch_size=batch_size,
                  chat=chat, limit=limit)
    key = {"model": (folders[name].parent / "fingerprint.txt").read_text(), "presets": chosen, "items": limit,
           "tokens": max_new_tokens, "tolerance": tolerance, "batch": batch_size, "chat": chat}
    return artefacts.kept(left / f"{task_name}, {label}, {limit}.csv", key, ask)


frames = [answers(task_name, label, items).assign(task=task_name, arm=label)
          for task_name, label in itertools.product(task_names, contestants)]
everything = pd.concat(frames, ignore_index=True)
parts = everything.groupby(["task", "arm"], sort=False)
table = pd.concat([evaluate.summary(part).assign(task=task_name, arm=label)
                   for (task_name, label), part in parts], ignore_index=True)
table.insert(0, "seed", seed)
table.to_csv(output / "benchmarks.csv", index=False)
everything.to_csv(output / "items.csv", index=False)
columns = ["task", "arm", "accuracy", "low", "high", "tpf", "nfe", "positions_fed", "tokens_per_s", "cpu_seconds"]
table[columns].round(3)

# %% [markdown]
# Texts have no right answer: they are measured by their likelihood under a fixed judge (nats per token, lower is more likely; and the likelihood of a token as a multiple of the twin's on the same prompts, with its 95 % interval), by repetition and by diversity.

# %%
open_tasks = [name for name in task_names if hasattr(tasks.load(name), "metrics")]
if judge and open_tasks:
    referee, referee_tokenizer = backbones.load(judge, dtype="float32")
    rows = []
    for task_name in open_tasks:
        texts = {label: part for (name, label), part in parts if name == task_name}
        nats = {label: np.array(evaluate.likelihood(referee, referee_tokenizer, part.prompt.tolist(), part.text.tolist()))
                for label, part in texts.items()}
        for label, part in texts.items():
            gap = nats["AR twin"] - nats[label]
            ratio = np.exp(intervals.mean_interval(gap[~np.isnan(gap)]))
            rows.append({"task": task_name, "arm": label, "judge_nats": np.nanmean(nats[label]),
                         **dict(zip(("of_twin", "of_twin_low", "of_twin_high"), ratio)),
                         "tpf": part.tokens.sum() / part.forwards.sum(), **tasks.load(task_name).metrics(part.text.tolist())})
    judged = pd.DataFrame(rows)
    judged.to_csv(output / "judge.csv", index=False)
    print(judged.round(3).to_string(index=False))

# %% [markdown]
# ## Which parts of the recipe pay?
#
# The models of `other_arms` went through conversion and SFT with one idea changed ("no T2T": never trained to edit). All are decoded over the same thresholds on the same test prompts; the fair comparison is at equal tokens per forward. Profile nano leaves these arms out for time; profile recipes trains them.

# %%
sweep = []
asked = ["dLLM", *other_arms] if other_arms else []
for name, tau_mask, tau_edit in itertools.product(asked, sweep_masks, sweep_edits):
    decoder = evaluate.diffusion(settings(tau_mask, tau_edit))
    frame = evaluate.run(models[name], tokenizer, tasks.load(task_names[0]), decoder, limit=sweep_items, seed=0,
                         batch_size=batch_size, chat=chat)
    sweep.append(evaluate.summary(frame).assign(seed=seed, arm=name, tau_mask=tau_mask, tau_edit=tau_edit))
    print(f"{name:18} tau_mask {tau_mask:<4} tau_edit {tau_edit:<4} "
          f"accuracy {sweep[-1].accuracy[0]:.3f}  TPF {sweep[-1].tpf[0]:.2f}", flush=True)
if sweep:
    pd.concat(sweep, ignore_index=True).to_csv(output / "questions.csv", index=False)

# %% [markdown]
# ## Beside other conversions, prompt by prompt
#
# The models of `against` had the same tokens in conversion and in tuning. *Plain conversion* is what one does without a recipe: masks at uniform rates, blocks of the final size from the first step, every weight trained, nothing distilled, no edits. They answer in Q and at their most careful, one token a forward; the dLLM in its own text (with a causal context) and in Q. Differences are the dLLM's minus theirs on the same prompt, with 95 % t-intervals over prompts and the p of an exact sign test: of the score, or for stories of the nats a token under the judge, where less is better.

# %%
for name in set(against) - set(folders):
    print(f'"{name}" was not trained and is left out. To have it, before this notebook:\n'
          f'  hilda train 02_wsd --profile {profile} --arm "{name}"\n'
          f'  hilda train 03_sft --profile {profile} --arm "{name}"')
rivals = [name for name in against if name in folders]
for name in rivals:
    contestants |= {f"{name} Q": (name, contestants["dLLM Q"][1]),
                    f"{name}, one token a forward": (name, evaluate.diffusion(settings(1.0, 1.0)))}
theirs = [label for label, (name, _) in contestants.items() if name in rivals]
duels = []
for task_name in against_tasks if rivals else []:
    ours = [label for label in ("dLLM own text", "dLLM Q") if label in contestants]
    found = {label: answers(task_name, label, against_items) for label in (*ours, *theirs)}
    if hasattr(tasks.load(task_name), "metrics"):
        found = duel.judged(found, backbones.load(judge, dtype="float32"))
    for mine in ours:
        beside = duel.beside({label: found[label] for label in (mine, *theirs)}, mine)
        duels.append(beside.assign(seed=seed, task=task_name, arm=mine))
if duels:
    duels = pd.concat(duels, ignore_index=True)[["seed", "task", "arm", *duel.BESIDE]]
    duels.to_csv(output / "paired.csv", index=False)
    print(duels.drop(columns="seed").to_string(index=False, float_format="{:.3g}".format))

# %% [markdown]
# ## Over seeds
#
# A seed is a whole run: its own parent, conversion, SFT and presets. `python -m hildalib run --profile nano --seeds 1 2 0` makes three; whatever is there is averaged here, with t-intervals over seeds. With one seed the intervals are those over items.

# %%
tables = {number: pd.read_csv(path)
          for number, path in artefacts.seeds_done(profile, NOTEBOOK, "benchmarks.csv").items()}
costs = ["accuracy", "tpf", "nfe", "tokens_per_s", "positions_fed", "cpu_seconds", "peak_memory_gb"]
means = evaluate.across_seeds(tables, ["task", "arm"], costs, shares=("accuracy",))
if len(tables) == 1:
    means[["accuracy_low", "accuracy_high"]] = table[["low", "high"]].to_numpy()
shown = means.rename(columns={"accuracy_low": "low", "accuracy_high": "high"})
origin = {"profile": profile, "seeds": ", ".join(map(str, tables)),
          "items": f"{items}, stories {open_items}" if open_tasks else items,
          "interval": "95 % t over seeds" if len(tables) > 1 else "95 % Wilson over items",
          "device": str(models["dLLM"].device)}
measure = "accuracy (stories: 1 − repetition)" if open_tasks else "accuracy"
shown = shown.rename(columns={"accuracy": measure})
figures.save(figures.benchmarks(shown, score=measure), "05_benchmarks", means,
             profile=profile, seed=seed, provenance=origin)
plt.show()

# %%
verdicts = {}
for other in other_arms:
    found = artefacts.seeds_done(profile, NOTEBOOK, "questions.csv").values()
    sweeps = pd.concat([pd.read_csv(path) for path in found], ignore_index=True)
    pair = comparison.both(sweeps, "dLLM", other)
    verdicts[other] = verdict = comparison.at_equal_tpf(pair, reference="dLLM", other=other)
    figures.save(comparison.arms(pair, verdict), f"05_{other.replace(' ', '_')}", pair,
                 profile=profile, seed=seed, provenance=origin | {"items": sweep_items})
    plt.show()
    sure = (f"[{verdict['low']:+.3f}, {verdict['high']:+.3f}] over {len(found)} seeds" if len(found) > 1
            else "(one seed: no interval)")
    print(f"dLLM minus {other}, at equal tokens per forward: {verdict['difference']:+.3f} {sure}")

# %%
artefacts.write_metrics({"presets": chosen["presets"], "benchmarks": table.to_dict("records"), "questions": verdicts},
                        profile, NOTEBOOK, seed, model=models["dLLM"])
columns = ["task", "arm", "n_seeds", "accuracy", "accuracy_low", "accuracy_high", "tpf", "nfe", "tokens_per_s"]
print(means[columns].round(3).to_string(index=False))

# %% [markdown]
# ## What we learned
#
# In three runs of profile nano *own text*, what the dLLM's block-size-1 mode would write, answers 100.0, 99.8 and 99.4 % of 500 test prompts right, the twin 100.0, 100.0 and 99.6 %: 0.1 points fewer on average [-0.4, +0.2 over runs], at 3.7 tokens a forward. Q mode, which is S mode in these runs (notebook 04), answers 99.6, 99.6 and 99.4 %, 0.3 points fewer [-0.6, -0.0], at 3.7 as well. In batches of 64 on two cores none of them is faster: own text writes 0.92, 0.73 and 0.83 times the twin's tokens a second, the thresholds 0.55 to 0.89 times, for a forward of eight positions and their copies costs more than one of a single token. One prompt at a time is another matter (notebook 09). With 2,600 steps of tuning instead of 4,000 (an earlier profile, see 03) own text was 0.4 points behind [-0.9, 1.7] and Q 0.9 [-1.4, 3.3].
#
# Training to edit did not pay in three runs of profile recipes: at equal tokens per forward the model with T2T answered 3.3 points fewer right than the one without, with an interval over seeds from 24.8 fewer to 18.3 more, that is, no answer. At the best pair of thresholds of each (picked on these very prompts) T2T is ahead in every run, 98.3, 97.0 and 92.3 % beside 96.7, 96.7 and 90.7 %; and editing never harmed it, while at tau_mask 0.9 the model without T2T gained five points by it in one run and lost eleven in another.
#
# Profile smol is SmolLM2-135M after 1 M tokens and 300 tuning steps, its adapters laid over a twin that was tuned in every weight (one run, made before `twin_rank`; 20 test prompts a task and 40 stories: wide intervals). The twin answers 80 % of arithmetic [58, 92], 15 % of GSM8K and Sudoku, 10 % of Countdown, 5 % of HumanEval and MBPP, nothing of MATH-500. The dLLM's own text is the twin's in all 180 answers, as it must be, in fewer forwards: 2.1 tokens each in arithmetic and Sudoku, 1.8 in Countdown, 1.5 in GSM8K, 1.3 in stories. What is predictable is drafted; stories are not. With a tolerance of 0.02 a story takes 1.44 tokens a forward, and a token of it is 0.93 times as likely to the judge as one of the twin's [0.85, 1.01], at the same repetition (0.13 beside 0.11).
#
# Thresholds lose more than that: Q, 1.9 tokens a forward on stories, 0.31 times as likely [0.24, 0.40]; S, 3.0 and 0.43. The adapters' distribution is not the twin's (1.1 nats apart), and a threshold believes it; verification asks the twin. S (tau_mask 0.1) answers 65 % of arithmetic [43, 82], Q (0.2) 25 % [11, 47], and in Sudoku 10 and 15: twenty prompts do not say which is better. Presets chosen on stories are no presets for sums.
#
# Beside a plain conversion profile smol's recipe pays (one run each; tables in `outputs/smol/model/beside-plain`, the first by the cells above, the second by `hilda compare`). After 1,000 and 600 steps both could do nothing with GSM-symbolic, 10 of 1,000 test questions in the dLLM's own text and 9 in the plain one's most careful decoding (p = 1; in Q none, p = 0.002), but stories were another matter: 1.05 nats a token under the judge beside 1.39 and, in Q, 4.25 (40 stories, p below 10⁻⁵). After 750 more steps on other questions from the same templates (`hilda tune`) own text answers 15.5 %, the plain one 6.6 (p below 10⁻¹⁴), and stories cost 1.18 and 1.56 nats.
#
# In time nothing beats the twin's 100 tokens a second on stories: 31 in own text, 54 in Q (one thread beside another job, batches of 20). A forward of this model reads four positions, their copies, and adapters on some of them; 1.3 to 2.1 tokens do not pay for that on a CPU. Adapters tuned over the untuned parent instead (an earlier run, 20 stories): own text was that parent's, 2 of 140 problems right at 1.2 tokens a forward; Q answered one, and its stories, 0.91 times as likely as the twin's [0.64, 1.28], went round in circles (repetition 0.59).
#
# The first figure is the honest table: accuracy with its interval, and what it cost in forwards and time, for both modes and the twin. The others answer one question each: where the two curves lie at the same tokens per forward, and the printed difference with its interval says whether that is more than noise.
#
# A tokens-per-forward above one is not a speed-up by itself: a diffusion forward feeds a whole block. The last cost column of the first figure is the wall clock.
