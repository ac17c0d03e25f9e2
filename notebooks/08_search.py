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
# # 08 · Order-token search
#
# **Question.** A diffusion model may write its positions in any order, and any token at each. Does it pay to search over both, at equal forwards: beside decoding once with more care, beside as many samples and a vote, beside the AR twin's beams? And what can judge an unfinished text in a model that sees nothing to the right of a block?
#
# **Needs.** [03 · SFT](03_sft.ipynb) and [04 · Edit decoding](04_decode.ipynb) with the same `profile` and `seed`.
#
# **Time.** Smoke: about 20 seconds. Profile nano: a minute. Profile smol: 13 minutes of one core.
#
# **Outputs.** `search.csv` (this seed), and figures over all seeds that have been run.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
task = "arithmetic"
items = 4
batch_size = 16
max_new_tokens = 32
chat = False
tau_masks = [0.3, 0.9]
draft = 0.3
temperature = 1.0
scorers = ["path", "causal"]
scorer = "causal"
widths = [[1, 2], [2, 2]]
width = [2, 2]
path_beams = [2]
ar_beams = [2]

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

from hildalib import artefacts, backbones, comparison, evaluate, figures, paths, tasks
from hildalib.decoding import EditSettings, SearchSettings, commit, self_speculate, vote

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK = "08_search"
output = paths.output_dir(profile, NOTEBOOK, seed)
chosen = artefacts.read_metrics(profile, "04_decode", seed)
folders = {name: artefacts.model_folder(profile, "03_sft", name, seed) for name in ("dLLM", "AR twin")}
models = {name: backbones.load(folder, dtype="float32")[0] for name, folder in folders.items()}
tokenizer = backbones.load(folders["dLLM"], dtype="float32")[1]
benchmark = tasks.load(task)

# %%
rows = []


def settings(tau_mask: float, tau_edit: float) -> EditSettings:
    return EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, max_post_steps=chosen["max_post_steps"],
                        max_new_tokens=max_new_tokens)


def record(arm: str, decoder, *, model: str = "dLLM", base: str = "", candidates: int = 1, judge: str = ""):
    frame = evaluate.run(models[model], tokenizer, benchmark, decoder, limit=items, seed=0,
                         batch_size=batch_size, chat=chat)
    rows.append(evaluate.summary(frame).assign(seed=seed, base=base, arm=arm, candidates=candidates,
                                               judge=judge))
    found = rows[-1].iloc[0]
    print(f"{base:14} {arm:22} {judge:9} candidates {candidates:2}: accuracy {found.accuracy:.3f} "
          f"in {found.nfe:5.1f} forwards, {found.positions_fed:6.1f} positions", flush=True)


# %% [markdown]
# ## Without search
#
# What a forward buys when it is spent on care: a higher threshold, or edits (presets S and Q of notebook 04, chosen on validation prompts). Self-speculation writes what the model's own AR mode would, in fewer forwards. The twin decodes with one beam and with several.

# %%
for tau_mask in sorted({*tau_masks, draft}):
    record("one draft", evaluate.diffusion(settings(tau_mask, 1.0)), judge=f"tau {tau_mask}")
for mode, preset in sorted(chosen["presets"].items()):
    record(f"dLLM {mode}", evaluate.diffusion(settings(preset["tau_mask"], preset["tau_edit"])))
record("self-speculation", lambda model, ids, real: self_speculate(
    model, ids, max_new_tokens=max_new_tokens, attention_mask=real))
for beams in [1, *ar_beams]:
    record("AR twin", evaluate.autoregressive(max_new_tokens, beams=beams), model="AR twin", candidates=beams)

# %% [markdown]
# ## What can judge a block?
#
# The published search writes two tokens a forward, every child with noise, which changes what is sure and so also the order. It judges them after the first forward of a block, by how likely their guess of the block is when the block is masked again. With nothing to the right that is the reading the guess came from. *As published* is that; *two a forward* is its control, without noise and search.
#
# The others work on drafts that are careless on purpose (`draft`, no edits): there is something to find. One child of every beam takes no noise. *First guess* is judged as published, and then the child without noise always wins. The other judges see finished blocks:
#
# * *path*: the confidences the tokens were written with; no forward;
# * *remasked*: the published score;
# * *halves*: each half of the tokens from the other; one forward;
# * *shadow*: each token from all others, in one forward (with more than one layer the others have seen it);
# * *causal*: next-token likelihood, for the closed part of the text is read as an AR model reads it; one forward;
# * *next*: how sure the model then is of the next block; one forward.
#
# Every beam pays for its forwards, and every candidate for its judge. Equal candidates become one and pay once from then on.

# %%
DRAFTS, Q, TWO = "careless drafts", "preset Q", "two a forward"
bases = {DRAFTS: settings(draft, 1.0), TWO: replace(settings(draft, 1.0), commit=commit.Quota(2)),
         Q: settings(*(chosen["presets"]["Q"][name] for name in ("tau_mask", "tau_edit")))}


def search(base: str, beams: int, children: int, judge: str, arm: str = "search", when: str = "block",
           greedy_child: bool = True):
    choices = SearchSettings(beams=beams, children=children, temperature=temperature, scorer=judge,
                             prune=when, greedy_child=greedy_child)
    record(arm, evaluate.searching(bases[base], choices, seed), base=base, candidates=choices.width,
           judge=judge)


record("two a forward", evaluate.diffusion(bases[TWO]))
search(TWO, *width, "remasked", arm="as published", when="first", greedy_child=False)
search(DRAFTS, *width, "remasked", arm="first guess", when="first")
for name in scorers:
    search(DRAFTS, *width, name)

# %% [markdown]
# ## Controls
#
# Wider searches with one of the judges; beside them as many whole texts, sampled with the same noise: the best by the confidences it was written with, the best by the same judge, and the one whose answer most of them give. *Paths* is beam search in the strict sense, one (position, token) pair a forward. Coverage is the share of prompts that at least one of the samples answers, what a perfect judge would reach.

# %%
answer = getattr(benchmark, "answer", str.strip)  # a task without `answer`: votes count whole texts


def counted(ids: torch.Tensor) -> str:
    return answer(tokenizer.decode(ids, skip_special_tokens=True))


def sample(base: str, count: int):
    kept = []
    choices = SearchSettings(beams=1, children=count, temperature=temperature, scorer="path", prune="end")
    record("best sample", evaluate.searching(bases[base], choices, seed, kept), base=base, candidates=count,
           judge="path")
    again = iter(kept)
    record("vote", lambda *batch: vote(next(again), counted), base=base, candidates=count)
    covered = evaluate.coverage(kept, tokenizer, benchmark, benchmark.items("test", limit=items, seed=0))
    rows[-1]["coverage"] = rows[-2]["coverage"] = covered
    print(f"{base:14} coverage of {count} samples: {covered:.3f}", flush=True)


for beams, children in widths:
    if [beams, children] != width or scorer not in scorers:  # else it is there already
        search(DRAFTS, beams, children, scorer)
    sample(DRAFTS, beams * children)
search(DRAFTS, 1, width[0] * width[1], scorer, arm="best sample, same judge", when="end")
search(Q, *width, scorer)
sample(Q, width[0] * width[1])

# %%
for beams in path_beams:
    search(DRAFTS, beams, 1, "path", arm="paths", when="write")
table = pd.concat(rows, ignore_index=True)
table.to_csv(output / "search.csv", index=False)

# %% [markdown]
# ## Over seeds
#
# A seed is a whole run, with its own parent, conversion, SFT and presets; intervals are 95 % t-intervals over seeds (with one seed: over items).

# %%
tables = {number: pd.read_csv(path, keep_default_na=False, na_values=[""]).fillna({"base": "", "judge": ""})
          for number, path in artefacts.seeds_done(profile, NOTEBOOK, "search.csv").items()}
everything = pd.concat(tables.values(), ignore_index=True)
keys = ["base", "arm", "candidates", "judge"]
means = evaluate.across_seeds(tables, keys, ["accuracy", "nfe", "tpf", "positions_fed"], shares=("accuracy",))
means = means.rename(columns={"accuracy_low": "low", "accuracy_high": "high"})
if len(tables) == 1:
    means[["low", "high"]] = table[["low", "high"]].to_numpy()
origin = {"profile": profile, "seeds": ", ".join(map(str, tables)), "task": task, "items": items,
          "interval": "95 % t over seeds" if len(tables) > 1 else "95 % Wilson over items",
          "device": str(models["dLLM"].device)}
print(means[[*keys, "accuracy", "low", "high", "nfe", "positions_fed"]].round(3).to_string(index=False))

# %%
same = everything[(everything.base == DRAFTS) & (everything.candidates == width[0] * width[1])]
judges = same[same.arm.isin(["first guess", "search"])]
judges = judges.assign(judge=judges.judge.where(judges.arm == "search", "first guess"))
alone = everything[(everything.arm == "one draft") & (everything.judge == f"tau {draft}")]
alone = alone.assign(judge="one draft")
judges = pd.concat([alone, judges], ignore_index=True)
figures.save(figures.ablation(judges, "accuracy", "judge", better="higher", within=(0, 1)), "08_judges", judges,
             profile=profile, seed=seed, provenance=origin | {"candidates": width[0] * width[1]})
plt.show()

# %%
shown = means[~means.arm.isin(["first guess", "best sample, same judge"])]
shown = shown[(shown.arm != "search") | (shown.judge == scorer)].replace({"base": {TWO: DRAFTS}})
figures.save(comparison.spending(shown), "08_search", shown, profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## Does search pay at equal forwards?
#
# Each line is another way to spend forwards, less the search over careless drafts with the judge chosen above, paired by seed: right of zero it is more accurate, or needs more forwards.

# %%
here, many = f"search, {scorer}", width[0] * width[1]


def pick(arm: str, label: str = "", **where) -> pd.DataFrame:
    part = everything[everything.arm == arm]
    for column, value in where.items():
        part = part[part[column] == value]
    return part.assign(arm=label or arm)


named = [pick("search", here, base=DRAFTS, judge=scorer, candidates=many)]
named += [pick(arm, base=DRAFTS, candidates=many)
          for arm in ("best sample", "best sample, same judge", "vote")]
named += [pick("paths", candidates=path_beams[0])]
named += [pick(arm, f"{arm} over Q", base=Q) for arm in ("search", "best sample", "vote")]
named += [pick("one draft", f"one draft, tau {tau_masks[-1]}", judge=f"tau {tau_masks[-1]}")]
named += [pick("two a forward"), pick("as published")]
named += [pick("dLLM S"), pick("dLLM Q"), pick("self-speculation"), pick("AR twin", candidates=1)]
named = pd.concat(named, ignore_index=True)
measures = {"accuracy": ("accuracy", "higher"), "nfe": ("forwards", "lower"),
            "positions_fed": ("positions fed", "lower")}
verdict = pd.concat([
    comparison.differences(named, column, reference=here).assign(measure=measure, better=better)
    for column, (measure, better) in measures.items()], ignore_index=True)
figures.save(comparison.verdicts(verdict, reference=here), "08_verdict", verdict,
             profile=profile, seed=seed, provenance=origin | {"candidates": width[0] * width[1]})
plt.show()

# %%
artefacts.write_metrics({"presets": chosen["presets"], "draft": draft, "scorer": scorer, "items": items,
                         "search": table.to_dict("records"), "verdict": verdict.to_dict("records")},
                        profile, NOTEBOOK, seed, model=models["dLLM"])
print(verdict.round(3).to_string(index=False))

# %% [markdown]
# ## What we learned
#
# Three runs of profile nano, 200 test prompts each: accuracy of seeds 0, 1 and 2, and the mean forwards an item.
#
# | | accuracy | forwards |
# |---|---|---|
# | one careless draft (tau_mask 0.3, no edits) | 91.5, 82.5, 66.0 % | 2.9 |
# | two tokens a forward, no search | 98.0, 98.5, 90.0 % | 9.7 |
# | search as published, over that | 96.0, 96.0, 87.5 % | 9.7 |
# | careless drafts, first guess judged | 91.5, 84.5, 65.5 % | 5.8 |
# | search, 2 beams of 2 children, judged by path | 92.5, 89.5, 79.0 % | 9.4 |
# | the same, judged by the causal copy | 96.0, 93.0, 85.5 % | 10.7 |
# | best of samples at equal forwards, same judge | 96.5, 92.5, 85.5 % | 10.9 |
# | search, 2 beams of 4 children, causal copy | 97.0, 94.0, 92.0 % | 19.9 |
# | every write a branch (paths) | 100.0, 99.5, 98.0 % | 36.7 |
# | one draft at tau_mask 0.9, no edits | 99.5, 98.5, 98.5 % | 3.7 |
# | preset Q, no search | 99.5, 100.0, 99.5 % | 4.2 |
# | preset Q, search | 100.0, 100.0, 99.5 % | 14.4 |
# | own text by self-speculation | 100.0, 100.0, 99.5 % | 4.3 |
# | AR twin | 100.0, 100.0, 99.5 % | 15.4 |
#
# - **Search as published costs accuracy here**, in each run: 2.0, 2.5 and 2.5 points beside the same two tokens a forward without noise and search, in as many forwards (2.3 in the mean [1.6, 3.1]). After the first forward of a block most children have written the same two tokens and become one (ours; the paper does not say), and the noise goes on. Its score is no help: where nothing stands to the right, a guess is judged by the reading it came from, and a child without noise always wins (*first guess*, in no run more than two points from one draft).
# - **What pays is the judge, not the search.** The causal copy, which reads the finished block, is 4.5 points [0.2, 8.8] over the path, for 1.3 forwards more; the shadow 4.7 [-0.4, 9.7]; halves are not over it (-1.0 to +2.5 by run), nor is the next block's evidence (-1.7 [-8.0, +4.7]), and hiding each token in turn is worst. Given the causal copy, as many independent samples are as good as beams (0.0 points [-1.2, +1.2] over the three runs).
# - **What does not replicate**: that beams beat samples under the path's own judgement (by -1.0, +1.0 and -1.5 points at four candidates). What does: search over careless drafts loses to a careful threshold in each run, which needs a third of its forwards (7.0 fewer [4.5, 9.5]); Q gains nothing from a search that costs 10.1 more.
# - *Own text*, Q and S give in 4.2 to 4.3 forwards (99.8, 99.7 and 99.7 %) what 36.7 buy by branching (99.2 %).
#
# Profile smol (SmolLM2-135M, adapters over a twin tuned in adapters, three runs, 40 test prompts of arithmetic each; accuracy of seeds 0, 1 and 2):
#
# | | accuracy | forwards |
# |---|---|---|
# | one careless draft (tau_mask 0.5, no edits) | 25.0, 40.0, 32.5 % | 5.5 |
# | two tokens a forward, no search | 30.0, 37.5, 27.5 % | 7.5 |
# | search as published, over that | 30.0, 32.5, 25.0 % | 11.0 |
# | search, 2 beams of 4 children, judged by path | 35.0, 42.5, 32.5 % | 20.7 |
# | the same, judged by the causal copy | 47.5, 42.5, 40.0 % | 25.1 |
# | best of samples, same judge | 47.5, 42.5, 37.5 % | 26.5 |
# | every write a branch (paths) | 45.0, 50.0, 32.5 % | 30.4 |
# | one draft at tau_mask 0.9, no edits | 37.5, 47.5, 32.5 % | 7.4 |
# | own text by self-speculation | 62.5, 57.5, 45.0 % | 6.5 |
# | AR twin; with two beams | 62.5, 57.5, 45.0 %; 65.0, 65.0, 47.5 % | 14.2; 28.3 |
#
# What replicates from nano: search as published gains nothing (2.5 points fewer than without it [-8.7, +3.7], in half as many forwards again); the causal copy is the best judge in the mean (6.7 points over the path [-9.0, +22.3]); as many samples under the same judge are as good as beams (0.8 fewer [-4.4, +2.8]). The best search is 4.2 points over a careful threshold [-15.8, +24.1], which needs under a third of its forwards, and the twin's own text, self-speculated, is ahead of every search over the dLLM in every run, in a quarter of them; two beams of the twin itself add 4.2 points [-3.0, +11.3] for 28 forwards. The presets, chosen on stories, are no starting point for sums (S and Q: 40, 10 and 17.5 %).
