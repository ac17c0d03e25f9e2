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
# # 03 · Supervised fine-tuning
#
# **Question.** What do masked and edited response tokens teach that plain text did not, and what does the AR twin gain from the same pairs?
#
# **Needs.** [01 · Data](01_data.ipynb) and [02 · Conversion](02_wsd.ipynb) with the same `profile` and `seed`.
#
# **Time.** Smoke: about 20 seconds. Profile nano: 18 minutes of one core.
#
# **Outputs.** Tuned models under `outputs/<profile>/03_sft/checkpoints`, `losses.csv`, `validation.csv`, two figures, and text that the models wrote.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
block_size = 8
steps = 6
batch_size = 8
accumulate = 1
lr = 0.001
weighting = "mean"
low = 0.0
high = 1.0
full_share = 0.2
suffix_share = 0.0
complementary = False
edit_rate = 0.1
edit_weight = 0.5
keep_weight = 0.1
draft_share = 0.5
draft_turns = 1
ar_share = 0.0
context_weight = 1.0
adapter_lr = 0.0
adapter_base = ""
twin_rank = 0
weights = "float32"
head_rows = 0
kl_weight = 0.0
kl_top_k = 16
optimizer = "adamw_torch_fused"
precision = "float32"
gradient_checkpointing = False
save_every = 0
arms = ["dLLM", "no T2T", "AR twin"]
sample_task = "arithmetic"
sample_items = 3
max_new_tokens = 32
chat = False

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

from hildalib import artefacts, backbones, evaluate, figures, layout, params, paths, stages, tasks
from hildalib.decoding import settings_for

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK = "03_sft"

# %% [markdown]
# ## Only the response is noised
#
# The prompt stays visible in both halves and is never a target. Each pair sits on its own blocks, as in decoding, and ends with EOS up to the block border. Of the targets, masked tokens are to be predicted (M2T); tokens that carry the model's own draft or a random token are to be recovered (T2T).
#
# In a share of the blocks (`suffix_share`) the masks are the last positions of the block, the state of a block that is being written from left to right. Masks at random places often leave visible what stands behind a token and gives it away: in `45+35=▨▨;80` the sum can be copied, in `45+35=▨▨▨▨▨` it must be computed.
#
# Where notebook 02 made the dLLM of adapters over a frozen parent, that parent reads and verifies, and tuning the adapters teaches it no format. With `adapter_base` the twin is tuned first, and the adapters go on learning over its weights, drawn to its distribution (`kl_weight`). What such a model writes when it verifies its drafts is the twin's text to the letter; the adapters decide how fast (notebook 05). With `twin_rank` the twin itself is tuned in adapters, over the model that those of 02 lie on, so that both together are small enough to hand out (`hilda export --to adapter`).

# %%
given = params.of(NOTEBOOK, globals())
stage = stages.tuning(given)
tokenizer, rows, folder = stage.tokenizer, stage.rows["train"], stage.folder
response_tokens = int(rows["maskable"].sum())
print(f"{len(rows['input_ids']):,} rows, {response_tokens:,} response tokens; {stages.beginnings(given)}")

# %%
logs = pd.concat([stage.train(name).assign(arm=name) for name in arms], ignore_index=True)


def tuned(name: str):  # one model in memory at a time
    return backbones.load(artefacts.model_folder(profile, NOTEBOOK, name, seed), dtype=weights)[0]

# %%
table = logs[["arm", "step", "block_size", *[c for c in ("m2t", "t2t") if c in logs]]]
origin = {"data": f"01_data of profile {profile}", "seed": seed, "device": str(tuned(arms[0]).device)}
figures.save(figures.losses(table), "03_losses", table, profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## On pairs that nobody has trained on
#
# The same held-out responses with the same masks for every diffusion arm. A gap between these losses and the last ones above is what was learned by heart.

# %%
held_out = artefacts.load_rows(profile, "01_data", "sft-validation", seed)
portion = {"batch_size": batch_size, "head_rows": head_rows} if head_rows else {}  # large vocabularies
validation = pd.DataFrame([{"arm": name, "t": t, "loss": value} for name in arms if name != "AR twin"
                           for t, value in layout.validate(tuned(name), held_out,
                                                           block_size=block_size, **portion).items()])
figures.save(figures.loss_by_t(validation), "03_loss_by_t", validation,
             profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## What they write
#
# The same validation prompts, decoded by each model: the dLLMs in Q mode, the twin token by token.

# %%
task = tasks.load(sample_task)
samples = []
for name in arms:
    twin = name == "AR twin"
    decoder = (evaluate.autoregressive(max_new_tokens) if twin
               else evaluate.diffusion(settings_for("Q", max_new_tokens=max_new_tokens)))
    frame = evaluate.run(tuned(name), tokenizer, task, decoder, limit=sample_items, split="validation",
                         chat=chat)
    samples.append(frame.assign(arm=name)[["arm", "prompt", "text", "score", "forwards"]])
samples = pd.concat(samples, ignore_index=True)
for row in samples.itertuples():
    print(f"{row.arm:8} | {row.prompt[-60:]!r} -> {row.text[:200]!r}  "
          f"score {row.score:.0f}, {row.forwards} forwards")

# %%
output = paths.output_dir(profile, NOTEBOOK, seed)
logs.drop(columns=["clean_tokens_per_s", "peak_memory_gb"]).to_csv(output / "losses.csv", index=False)
validation.to_csv(output / "validation.csv", index=False)
samples.to_csv(output / "samples.csv", index=False)
artefacts.write_metrics({"steps": steps, "response_tokens": response_tokens,
                         "tokens_per_s": logs.groupby("arm").clean_tokens_per_s.median().to_dict()},
                        profile, NOTEBOOK, seed, model=tuned(arms[0]))

# %% [markdown]
# ## What we learned
#
# In three runs of profile nano a held-out answer costs 0.004 to 0.024 nats per masked token at t = 0.15 and 0.02 to 0.10 with all of a block masked, 0.4 to 1.7 times what the last 200 training steps cost with few masks, 1.1 to 1.3 times with all. *Own text* is 0.0, 0.2 and 0.2 points behind the twin after these 4,000 steps, Q mode 0.4, 0.4 and 0.2 (notebook 05, test prompts). Three choices brought it there, all made on validation prompts of one run (seed 2, 3,000 prompts, own text; tokens a forward are those of these prompts, which are longer than the test's):
#
# | steps | blocks masked completely | context_weight | own text | the twin | tokens a forward |
# |---|---|---|---|---|---|
# | 2,600 | 0.2 | 3 | 96.1 % | 97.3 % | 3.43 |
# | 4,000 | 0.2 | 3 | 98.1 % | 99.3 % | 4.04 |
# | 4,000 | 0.5 | 3 | 98.0 % | 99.3 % | 4.16 |
# | 4,000 | 0.5 | 6 | 98.8 % | 99.3 % | 3.98 |
#
# A draft starts from a block that is all masks, so half of the blocks are trained so (`full_share`); what is kept of it is judged by the next-token half, which is where most of the accuracy is learned (`context_weight`). Masking more last positions instead (`suffix_share` 0.8) changed nothing.
#
# Profile smol (one run, 323,338 response tokens of stories and five tasks, 300 steps): the twin, in adapters of rank 8 over the base that 02 had frozen, falls from 2.6 nats to 1.14 (mean of the last 50 steps), most of it in the first 40; with every weight of 02's twin tuned instead (an earlier run) it came to 0.94 and was a few points better (63 % of 60 validation prompts of arithmetic beside 60 %, 40 % of 20 of Sudoku beside 25), but nobody can be handed that in 25 MB. Over it the KL of the dLLM's adapters falls from 1.6 to 1.06, a masked token from 2.7 to 2.2 (held out: 1.41 with few masks, 2.67 with all of a block masked). Tuned over the parent that 02 had frozen instead, Q mode answered 1 of 140 test prompts right: what reads had not learned the format, and adapters on other rows cannot make up for that.
#
# All arms saw the same pairs in the same order for the same steps. The losses of the diffusion arms and of the twin are not comparable with each other (they predict different things); what the models can do is measured next, on prompts nobody has seen.
#
# Next: [04 · Edit decoding](04_decode.ipynb).
