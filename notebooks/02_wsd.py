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
# # 02 · Conversion
#
# **Question.** How does an autoregressive model become a block-diffusion model, and which parts of the recipe pay at equal tokens?
#
# **Needs.** [01 · Data](01_data.ipynb) with the same `profile`, `model` and `seed`.
#
# **Time.** Smoke: about 25 seconds. Profile nano: 8 minutes of one core (six of them train the AR parent). Profile smol (SmolLM2-135M, 1 M tokens): on two cores with bfloat16 87 minutes for the dLLM, in two processes of `hilda train`, and 88 for the twin, most of it in one of two threads (two processes would send each other all 135 M gradients: 6.0 s a step instead of 4.7); 5 minutes for the rest.
#
# **Outputs.** Parent, dLLM, AR twin and ablation arms under `outputs/<profile>/02_wsd/checkpoints`, `losses.csv`, `validation.csv`, three figures.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
model = "nano"
hidden = 32
layers = 2
parent_steps = 30
parent_batch = 8
parent_lr = 0.003
batch_size = 8
accumulate = 1
lr = 0.002
warmup = [[1, 2], [4, 6]]
stable = [64, 0]
decay = [[8, 12]]
label_shift = True
causal_context = True
context_weight = 1.0
weighting = "mean"
low = 0.0
high = 1.0
full_share = 0.1
suffix_share = 0.0
complementary = False
copies = 1
edit_rate = 0.1
edit_weight = 0.5
keep_weight = 0.1
draft_share = 0.5
draft_turns = 1
ar_share = 0.1
cap_weight = 0.0
kl_weight = 0.5
kl_top_k = 16
adapter_rank = 0
adapter_lr = 0.0
weights = "float32"
quantize = ""
lora_rank = 0
head_rows = 0
mask_noise = 0.1
mask_noise_steps = 5
optimizer = "adamw_torch_fused"
precision = "float32"
gradient_checkpointing = False
merge_top_k = 0
probe_task = "arithmetic"
probe_items = 16
probe_masks = [0.5]
probe_edits = [0.5, 1.0]
probe_tokens = 32
save_every = 0
arms = ["dLLM", "no T2T", "AR twin"]

# %%
import itertools
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

from hildalib import artefacts, backbones, comparison, evaluate, figures, layout, params, paths, stages, tasks
from hildalib.decoding import EditSettings
from hildalib.recipe import arm

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK = "02_wsd"

# %% [markdown]
# ## The parent
#
# `nano` is trained here from random weights, by the same code that converts it: block size 1 with shifted labels *is* next-token prediction. Any other name is loaded with its weights as they are. Everything that follows from the parameters above is made in `hildalib.stages`, for `hilda train` makes the same of them when several processes share the work; arms that it has trained are found finished here.

# %%
stage = stages.conversion(params.of(NOTEBOOK, globals()))
parent, tokenizer, rows, folder = stage.parent, stage.tokenizer, stage.rows, stage.folder
print(f"{parent.num_parameters():,} parameters, {rows['train']['maskable'].sum():,} training tokens, "
      f"device {parent.device}")

# %% [markdown]
# ## The schedule
#
# Warmup climbs from block size 1, where the model is still its parent, to larger blocks; stable, if given, runs at full length; decay comes down to the working size. Validation first: at block size 1 the diffusion loss of the untouched parent *is* its next-token loss. That is where the conversion starts.

# %%
schedule = stage.recipe.schedule
working = schedule.block_size(schedule.total_steps)
portion = {"batch_size": batch_size, "head_rows": head_rows} if head_rows else {}  # of validation: large vocabularies


def next_token_loss(model) -> float:
    return layout.validate(model, rows["validation"], block_size=1, label_shift=True, rates=(1.0,), **portion)[1.0]


parent_loss = next_token_loss(parent)
print(f"{schedule.total_steps} steps, working block size {working}; "
      f"the parent's next-token loss is {parent_loss:.3f} nats")

# %% [markdown]
# ## Conversion, ablations and the twin
#
# A block that is being written sees itself in both directions. What it sees of the blocks before it is a choice: with `causal_context` they are read as the parent read them, token by token from the left, so their keys are those the parent knows how to use; a next-token loss on them (`context_weight`) keeps it so. Without it (LLaDA2.0) closed blocks too are read in both directions, and the parent must learn to read all over again.
#
# Every arm starts from the same parent and sees the same text in the same order for the same number of optimiser steps. The AR twin simply goes on with next-token prediction: what the extra training alone buys.

# %%
recipe, length = stage.recipe, rows["train"]["input_ids"].shape[1]
logs = pd.concat([stage.train(name).assign(arm=name) for name in arms], ignore_index=True)


def converted(name: str):  # one model in memory at a time
    return backbones.load(artefacts.model_folder(profile, NOTEBOOK, name, seed), dtype=weights)[0]

# %%
curves = [column for column in ("m2t", "t2t", "kl") if column in logs]
table = logs[["arm", "step", "stage", "block_size", *curves]]
origin = {"model": f"{model}, {parent.num_parameters():,} parameters",
          "data": f"01_data of profile {profile}", "seed": seed, "device": str(parent.device)}
figures.save(figures.losses(table, parent=parent_loss), "02_losses", table,
             profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# Block size is the price tag of the curve: whenever it grows, the model must predict more tokens from less context, and the loss steps up before it comes down again.
#
# ## Loss by mask rate
#
# One number hides much. Near the end of a block's decoding few tokens are masked (small t); at its start all are (t = 1). The same held-out masks for every arm:

# %%
measured = {name: layout.validate(converted(name), rows["validation"], block_size=working, **portion)
            for name in arms if name != "AR twin"}
validation = pd.DataFrame([{"arm": name, "t": t, "loss": loss}
                           for name, losses in measured.items() for t, loss in losses.items()])
figures.save(figures.loss_by_t(validation), "02_loss_by_t", validation,
             profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## What is left of the parent
#
# At block size 1 every converted model is still an autoregressive one. Its next-token loss, beside the parent's and the twin's, is the knowledge that the conversion cost.

# %%
kept = {name: next_token_loss(converted(name)) for name in arms if arm(recipe, name).label_shift}
kept |= {"parent": parent_loss}
kept = pd.Series(kept, name="next_token_loss").rename_axis("arm").reset_index()
speed = logs.groupby("arm", sort=False).agg({"clean_tokens_per_s": "median", "peak_memory_gb": "max"})
summary = kept.merge(speed.reset_index(), how="left", on="arm")
label = "next-token loss (nats)"
figures.save(figures.ablation(kept.rename(columns={"next_token_loss": label}), label, "arm", better="lower"),
             "02_next_token", kept, profile=profile, seed=seed, provenance=origin)
plt.show()
summary

# %% [markdown]
# ## One question, one figure
#
# Losses of arms with different targets do not compare; answers do. The autoregressive models first, token by token:

# %%
exact = {}
for name in ("parent", *{"AR twin"} & {*arms}) if probe_task else ():
    reader = parent if name == "parent" else converted(name)
    frame = evaluate.run(reader, tokenizer, tasks.load(probe_task), evaluate.autoregressive(probe_tokens),
                         limit=probe_items, split="validation", batch_size=64)
    exact[name] = frame.score.mean()
    print(f"{name:8} answers {exact[name]:.1%} of {len(frame)} validation prompts right")

# %% [markdown]
# Each diffusion arm answers the same validation prompts over the same thresholds in blocks of the working size, straight after conversion, and is set beside the first arm at equal tokens per forward. Other seeds of this profile that have been run are included; with at least three the interval means something. Every question has its file in the folder of figures; the first few are shown.

# %%
output = paths.output_dir(profile, NOTEBOOK, seed)
diffusion_arms = [name for name in arms if name != "AR twin"] if probe_task and probe_masks and probe_edits else []
asked = {"task": probe_task, "items": probe_items, "masks": probe_masks, "edits": probe_edits, "tokens": probe_tokens}


def answers_of(name: str) -> pd.DataFrame:
    model, found = converted(name), []
    for tau_mask, tau_edit in itertools.product(probe_masks, probe_edits):
        decoder = evaluate.diffusion(EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, block_size=working, max_new_tokens=probe_tokens))
        frame = evaluate.run(model, tokenizer, tasks.load(probe_task), decoder, limit=probe_items,
                             split="validation", batch_size=64)
        found.append(evaluate.summary(frame).assign(seed=seed, arm=name, tau_mask=tau_mask, tau_edit=tau_edit))
        print(f"{name:16} tau_mask {tau_mask:<4} tau_edit {tau_edit:<4} "
              f"accuracy {found[-1].accuracy[0]:.3f}  TPF {found[-1].tpf[0]:.2f}", flush=True)
    return pd.concat(found, ignore_index=True)


probe = []
for name in diffusion_arms:  # an interrupted run keeps the arms it has asked
    key = asked | {"run": (folder / name / "fingerprint.txt").read_text()}
    probe.append(artefacts.kept(folder / name / "probe.csv", key, partial(answers_of, name)))

# %%
verdicts, SHOWN = {}, 3  # a page of all answers follows
if probe:
    pd.concat(probe, ignore_index=True).to_csv(output / "probe.csv", index=False)
    found = artefacts.seeds_done(profile, NOTEBOOK, "probe.csv").values()
    probes = pd.concat([pd.read_csv(path) for path in found], ignore_index=True)
    for number, other in enumerate(diffusion_arms[1:]):
        pair = comparison.both(probes, diffusion_arms[0], other)
        verdicts[other] = comparison.at_equal_tpf(pair, reference=diffusion_arms[0], other=other)
        figure = comparison.arms(pair, verdicts[other])
        figures.save(figure, f"02_{other.replace(' ', '_')}", pair, profile=profile, seed=seed,
                     provenance=origin | {"items": probe_items, "seeds": pair.seed.nunique()})
        plt.show() if number < SHOWN else plt.close(figure)
answers = pd.DataFrame([{"against": other, **verdict} for other, verdict in verdicts.items()])
print(answers.round(3).to_string(index=False) if verdicts else "no questions asked")

# %% [markdown]
# All questions on one page. Answers over a few hundred prompts are noisy from one run to the next; the losses on the same held-out masks, against the same hard labels, are less so. Each difference is taken within a seed, from one parent. An arm that ends in *at equal compute* was given as many more (or fewer) steps as a step is cheaper (or dearer); the others had the first arm's steps.

# %%
logs.drop(columns=["clean_tokens_per_s", "peak_memory_gb"]).to_csv(output / "losses.csv", index=False)
validation.to_csv(output / "validation.csv", index=False)
summary.to_csv(output / "summary.csv", index=False)


def every_seed(name: str) -> pd.DataFrame:
    found = artefacts.seeds_done(profile, NOTEBOOK, name).items()
    return pd.concat([pd.read_csv(path).assign(seed=number) for number, path in found], ignore_index=True)


first = arms[0]
masked = every_seed("validation.csv").groupby(["arm", "seed"], sort=False).loss.mean().reset_index()
own = every_seed("summary.csv").query("arm != 'parent'")
measures = [comparison.differences(masked, "loss", reference=first).assign(measure="loss on masked tokens (nats)"),
            comparison.differences(own, "next_token_loss", reference=first).assign(measure="next-token loss (nats)")]
measures = [part.assign(better="lower") for part in measures]
if verdicts:
    gaps = pd.DataFrame([(name, -v["difference"], -v["high"], -v["low"], v["seeds"]) for name, v in verdicts.items()],
                        columns=["arm", "difference", "low", "high", "seeds"])
    measures = [gaps.assign(measure="accuracy at equal tokens per forward", better="higher"), *measures]
page = pd.concat(measures, ignore_index=True)
if len(page):
    figures.save(comparison.verdicts(page, reference=first), "02_questions", page, profile=profile, seed=seed,
                 provenance=origin | {"seeds": page.seeds.max()})
    plt.show()
    print(page.round(3).to_string(index=False))

# %%
clean_tokens = schedule.total_steps * recipe.global_batch * length
artefacts.write_metrics({"parent_loss": parent_loss, "working_block_size": working,
                         "steps": schedule.total_steps, "parameters": parent.num_parameters(),
                         "clean_tokens": clean_tokens, "exact": exact, "questions": verdicts,
                         "next_token_loss": dict(zip(kept.arm, kept.next_token_loss))},
                        profile, NOTEBOOK, seed, model=parent)
print(summary.round(3).to_string(index=False))

# %% [markdown]
# ## What we learned
#
# The conversion starts at the parent's own loss and leaves it only when blocks grow. In three runs of profile nano 400 steps cost the model 0.032 nats of its next-token loss [0.010, 0.055] (0.453 to 0.485), where the twin went to 0.460: most of the parent is still there.
#
# Profile recipes asks what that is owed to: 17 arms beside the same dLLM, three seeds each, every arm one idea away (figures/recipes/02_questions). Differences are *arm minus dLLM*: accuracy at equal tokens per forward, right after conversion, with its 95 % interval over seeds.
#
# What is sure:
#
# - **Full-sequence diffusion forgets.** As the only stage it leaves 1 to 2 % of answers right (-68 points [-97, -39]), and half of the last rung given to it, LLaDA2.0's *stable* stage, costs 35 points [-51, -20] and 0.055 nats of next-token loss at this budget. It was made for far larger budgets.
# - **Unshifted labels start from nothing** (-59 points [-76, -43]): the parent's head predicts the next token, and 400 steps do not teach it to predict the same one.
# - **The next-token term on the causal half keeps the AR mode**: without it that loss is 0.095 nats worse [0.051, 0.138].
# - **T2T costs a little next-token loss** (0.015 nats [0.006, 0.024] better without it).
#
# What three seeds do not settle: T2T (without it -7 points [-32, +18] at equal steps, -27 [-53, -1] at equal compute, one comparison of seventeen; after tuning, in notebook 05, no answer either), block-causal instead of causal context (-18 points [-46, +11]), direct conversion to the working size (-9 [-21, +3]), hard labels for the same compute instead of the parent's distribution (-3 [-33, +28]), complementary masks (+5 [-8, +17]), rows at block size 1 (+1 [-28, +30]), the mean of the best checkpoints (-0.3 [-3, +2]), noise on the mask's embedding, the keep loss, suffix masks and random instead of own drafts (7 to 23 points worse in the mean, intervals of 34 to 56 points to either side). No gain is claimed for any of them.
#
# Losses and answers disagree once: adapters that act on noisy rows over the frozen parent have the *lower* masked loss in every seed (-0.057 nats [-0.080, -0.034]) and keep the parent's next-token loss exactly, but answered 54, 31 points fewer prompts in two seeds and 3.5 more in the third (best setting of each; at equal tokens per forward -20 points [-88, +49]). A masked loss is taken beside a clean context; decoding has to live with what it wrote.
#
# Profile smol converts the real SmolLM2-135M on 1,024,000 tokens, by adapters on noisy rows over the frozen parent (one run). The KL of a masked token to the parent falls in blocks of 4 from 1.61 nats (first 30 steps) to 1.31 by step 400, 1.20 by 900 and 1.23 at the end, where rows differ by more than that; a masked token costs 2.16 nats where few are masked and 3.47 where all of its block are. The next-token loss is the parent's 2.233 by construction, and that is the other side of losing nothing: the twin, all of whose weights learn, goes to 1.453 on the same texts.
#
# Fifty-one comparisons at 95 % are expected to be wrong two or three times. The four under *sure* lie one and a half to four half-widths of their intervals away from zero.
#
# Next: [03 · Supervised fine-tuning](03_sft.ipynb).
