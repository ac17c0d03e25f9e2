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
# # 09 · Speed
#
# **Question.** How much faster than its autoregressive twin does a block-diffusion model write, which of the published decoders buys that, and what does it cost in accuracy?
#
# **Needs.** [03 · SFT](03_sft.ipynb) and [04 · Edit decoding](04_decode.ipynb) with the same `profile` and `seed`, converted with `causal_context`.
#
# **Time.** Smoke: about 40 seconds. Profile nano: 20 minutes on half a core.
#
# **Outputs.** Up to four models under `outputs/<profile>/09_speed/checkpoints`, `speed.csv`, `decoders.csv`, `roofline.csv`, three figures.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
task = "arithmetic"
items = 16
single_items = 4
rounds = 1
batch_size = 64
max_new_tokens = 32
chat = False
arms = ["gated", "continued", "pipelined", "CARD"]
steps = 4
train_rows = 6
lr = 0.001
rank = 8
adapter_lr = 0.002
suffix_share = 0.5
full_share = 0.5
context_weight = 1.0
kl_weight = 0.5
pipeline = 4
thresholds = [0.5, 0.9]
draft = 0.5
decoders = ["threshold", "factor", "wino + wino", "threshold + edit"]
sizes = [1, 4]
batches = [1]
context = 32
shape = []

# %%
import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

from hildalib import artefacts, backbones, comparison, evaluate, figures, gated, paths, roofline, tasks
from hildalib.decoding import EditSettings, PipelineSettings, commit, revise
from hildalib.recipe import Recipe, arm
from hildalib.training import train
from hildalib.wsd import BlockSchedule

print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
NOTEBOOK = "09_speed"
output, folder = paths.output_dir(profile, NOTEBOOK, seed), paths.checkpoint_dir(profile, NOTEBOOK, seed)
models, benchmark = {}, tasks.load(task)
for name in ("dLLM", "AR twin"):
    models[name], tokenizer = backbones.load(artefacts.model_folder(profile, "03_sft", name, seed), dtype="float32")
size = models["dLLM"].config.hilda["block_size"]

# %% [markdown]
# ## Four more models
#
# - *gated*: the twin is frozen; a LoRA that acts on noisy rows alone learns to draft blocks for it. Rows that are read, and rows that verify, stay the twin's to the last bit.
# - *pipelined*: the dLLM goes on learning with blocks in groups, each seeing the unfinished blocks before it, with mask rates that rise (D2F).
# - *CARD*: the twin goes on learning on noisy rows that are read causally. A causal model with masks: blocks cost no mask of attention and no copy, and a token never sees what stands right of it.
# - *continued*: the dLLM with as many more steps of what it already does, the control of the other three.
#
# All see the pairs of notebook 03, in the same order, for the same number of steps.

# %%
rows = artefacts.load_rows(profile, "01_data", "sft-train", seed,
                           vocab_size=models["AR twin"].get_input_embeddings().num_embeddings)
kept = {key: models["dLLM"].config.hilda[key] for key in ("label_shift", "causal_context")}
recipe = Recipe(schedule=BlockSchedule(stable=(size, steps)), batch_size=train_rows, lr=lr, suffix_share=suffix_share,
                full_share=full_share, context_weight=context_weight, draft_share=0.5, edit_rate=0.02, keep_weight=0.1,
                adapter_rank=gated.rank(models["dLLM"]), adapter_lr=adapter_lr, stage="speed", seed=seed, **kept)
recipe = replace(recipe, context_weight=0.0) if recipe.adapter_rank else recipe
ways = {"gated": ("AR twin", replace(arm(recipe, "no T2T"), adapter_rank=rank, context_weight=0.0,
                                     kl_weight=kl_weight, causal_context=True)),
        "continued": ("dLLM", recipe),
        "pipelined": ("dLLM", replace(arm(recipe, "no T2T"), pipeline=pipeline)),
        "CARD": ("AR twin", arm(recipe, "CARD"))}


def started(name: str):
    model = backbones.load(artefacts.model_folder(profile, "03_sft", ways[name][0], seed), dtype="float32")[0]
    if name == "gated":
        torch.manual_seed(seed)  # LoRA draws its start from the global stream
        return gated.gate(backbones.with_lora(model, rank))
    return model


for name in arms:
    models[name] = started(name)
    train(models[name], tokenizer, rows, ways[name][1], folder / name, parent=models["AR twin"], title=name)

# %% [markdown]
# ## One by one
#
# A person at a laptop asks one question at a time. All contestants take turns on the same prompts, several rounds long, and speeds are compared within a round, in processor time. The twin decodes greedily with its cache, once in the straight lines that the diffusion decoders use too and once by Transformers' `generate`. Of the dLLM's texts
#
# - *S* and *Q* are its own, at the thresholds of notebook 04;
# - *own AR text* is that of its block-size-1 mode: it drafts a block and keeps what that mode would have written (`self_speculate`);
# - *twin's text*, by the gated adapter, is the twin's.

# %%
presets = artefacts.read_metrics(profile, "04_decode", seed)
plain = EditSettings(max_new_tokens=max_new_tokens, max_post_steps=presets["max_post_steps"])
chosen = {name: replace(plain, tau_mask=preset["tau_mask"], tau_edit=preset["tau_edit"])
          for name, preset in sorted(presets["presets"].items())}
one_by_one = evaluate.autoregressive(max_new_tokens)
contestants = {"AR twin": ("AR twin", one_by_one),
               "AR twin, generate": ("AR twin", evaluate.generating(max_new_tokens)), "dLLM, block size 1": ("dLLM", one_by_one),
               **{f"dLLM {name}": ("dLLM", evaluate.diffusion(settings)) for name, settings in chosen.items()},
               "dLLM, own AR text": ("dLLM", evaluate.speculative(max_new_tokens))}
if "gated" in arms:
    contestants["gated, twin's text"] = ("gated", evaluate.speculative(max_new_tokens))


def answers(name: str, decoder, split: str = "test", limit: int = items, batch: int = batch_size) -> pd.DataFrame:
    return evaluate.run(models[name], tokenizer, benchmark, decoder, limit=limit, seed=0, split=split,
                        batch_size=batch, chat=chat)


runs = []
for turn, (name, (model, decoder)) in itertools.product(range(rounds), contestants.items()):
    runs.append(answers(model, decoder, limit=single_items, batch=1).assign(round=turn, arm=name))
runs = pd.concat(runs, ignore_index=True)
sums = runs.pivot_table(["tokens", "cpu_seconds"], "round", "arm", aggfunc="sum")
rate = sums.tokens / sums.cpu_seconds
speed = rate.div(rate["AR twin"], axis=0)
alone = pd.concat([evaluate.summary(part).assign(arm=name, speed=speed[name].median(), slowest=speed[name].min(),
                                                 fastest=speed[name].max(), seed=seed)
                   for name, part in runs.groupby("arm", sort=False)], ignore_index=True)
alone.to_csv(output / "speed.csv", index=False)
columns = ["arm", "tpf", "positions_fed", "tokens_per_s", "speed", "slowest", "fastest"]
print(alone[columns].round(2).to_string(index=False))

# %% [markdown]
# ## Everything on one model
#
# The published decoders differ in who is written and who is revised; each decodes the same test prompts, at its published constants. Revision rules work on drafts that are written carelessly (`draft`), for a good draft leaves them nothing to do. Nothing is chosen here, so nothing is tuned on test prompts.

# %%
frequencies = commit.unigram(rows["input_ids"], models["dLLM"].get_input_embeddings().num_embeddings)


def rule_of(words: str) -> EditSettings:
    written, _, revised = words.partition(" + ")
    rule = commit.RULES[written]()
    if written == "pc":
        rule = replace(rule, frequencies=frequencies)
    if revised and written == "threshold":
        rule = commit.Threshold(draft)
    return replace(plain, commit=rule, revise=revise.RULES[revised]() if revised else revise.Edit(1.0))


plan = [("", name, model, decoder) for name, (model, decoder) in contestants.items()]
plan += [("who is revised" if "+" in words else "who is written", words, "dLLM",
          evaluate.diffusion(rule_of(words), seed)) for words in decoders]
for name, tau in itertools.product(arms, thresholds):
    decoder = evaluate.diffusion(replace(plain, tau_mask=tau, tau_edit=1.0))
    if name == "pipelined":
        open_blocks = PipelineSettings(tau_mask=tau, blocks=pipeline, max_new_tokens=max_new_tokens)
        decoder = evaluate.pipelined(open_blocks)
    plan.append(("other training, no edits", name, name, decoder))
table, texts = [], {}
for base, name, model, decoder in plan:
    frame = answers(model, decoder)
    texts.setdefault(name, frame.text.tolist())
    table.append(evaluate.summary(frame).assign(base=base, arm=name, seed=seed))
    print(f"{base or 'beside all':24} {name:20}",
          "accuracy {accuracy:.3f}  NFE {nfe:5.1f}  TPF {tpf:.2f}".format(**table[-1].iloc[0]))
table = pd.concat(table, ignore_index=True)
table.to_csv(output / "decoders.csv", index=False)

# %%
found = artefacts.seeds_done(profile, NOTEBOOK, "decoders.csv").items()
tables = {number: pd.read_csv(path, keep_default_na=False, na_values=["nan"]) for number, path in found}
tables = {number: part.assign(setting=part.groupby(["base", "arm"]).cumcount())
          for number, part in tables.items()}
page = table
if len(tables) > 2:
    values = ["accuracy", "nfe", "tpf", "tokens_per_s"]
    page = evaluate.across_seeds(tables, ["base", "arm", "setting"], values, shares=("accuracy",))
    page = page.rename(columns={"accuracy_low": "low", "accuracy_high": "high"})
origin = {"profile": profile, "seeds": ", ".join(map(str, tables)), "items": items,
          "interval": "95 %, over seeds" if len(tables) > 2 else "95 % Wilson, over items"}
figures.save(comparison.spending(page[~page.arm.isin(["dLLM, block size 1", "AR twin, generate"])]), "09_decoders", page,
             profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# Are the two lossless ways lossless? Each text beside the text it must equal:

# %%
pairs = {"dLLM, own AR text": "dLLM, block size 1", "gated, twin's text": "AR twin"}
same = {name: sum(map(str.__eq__, texts[name], texts[other])) / len(texts[name])
        for name, other in pairs.items() if name in texts}
print("\n".join(f"{name}: {share:.1%} of {items} texts are those of {pairs[name]}" for name, share in same.items()))

# %% [markdown]
# ## The two floors
#
# Tokens per forward are not a speed. A forward reads the weights once and multiplies them with every position; while reading takes longer than multiplying, more positions are free. Where that ends depends on the machine and on the size of the model.

# %%
machine = roofline.Machine.measure()
print(f"matmul {machine.flops / 1e9:.0f} GFLOP/s, memory {machine.bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
timed = {f"this model, {models['dLLM'].num_parameters() / 1e6:.1f} M": models["dLLM"]}
if shape:
    other = roofline.random_llama(*shape)
    timed[f"random Llama, {other.num_parameters() / 1e6:.0f} M"] = other
grid = dict(sizes=sizes, batches=batches, context=context)
costs = pd.concat([roofline.measure(model, machine, **grid).assign(model=name) for name, model in timed.items()],
                  ignore_index=True)
costs.to_csv(output / "roofline.csv", index=False)
figures.save(roofline.figure(costs), "09_roofline", costs, profile=profile, seed=seed,
             provenance={"threads": torch.get_num_threads(), "GFLOP/s": round(machine.flops / 1e9),
                         "GB/s": round(machine.bandwidth / 1e9, 1), "context": context})
plt.show()
print(costs.round(5).to_string(index=False))

# %% [markdown]
# How fast the contestants were, as a multiple of the twin's tokens a CPU-second; the bar spans the rounds, or with three seeds its 95 % interval over them.

# %%
label, found = "tokens a CPU-second, twin = 1", artefacts.seeds_done(profile, NOTEBOOK, "speed.csv").items()
shown = pd.concat([pd.read_csv(path).query("arm != 'AR twin'").assign(seed=number) for number, path in found])
shown = shown.rename(columns={"speed": label})
figures.save(figures.ablation(shown, label, "arm", better="higher"), "09_speed", shown, profile=profile, seed=seed,
             provenance=origin | {"items": f"{single_items}, one by one, {rounds} rounds"})
plt.show()

# %%
artefacts.write_metrics({"identical": same, "speed": alone.to_dict("records"), "decoders": table.to_dict("records"),
                         "machine": {"gflops": machine.flops / 1e9, "gb_per_s": machine.bandwidth / 1e9}},
                        profile, NOTEBOOK, seed, model=models["dLLM"])
columns = ["base", "arm", "accuracy", "nfe", "tpf", "tokens_per_s"]
print(table.sort_values("accuracy")[columns].round(3).to_string(index=False))

# %% [markdown]
# ## What we learned
#
# One run of profile nano so far (seed 1, one thread, a machine shared with other work: read ratios, and wait for two more seeds).
#
# - **Lossless is lossless**: all 500 texts of both ways of self-speculation are the ones they must be, at 3.1 tokens a forward for the dLLM's own AR text (98.2 % right) and 2.0 for the twin's text from an adapter trained for 500 steps (99.4 %).
# - **Tokens per forward are not a speed.** One by one, S, Q and the dLLM's own AR text are 1.3, 1.1 and 1.35 times as fast as the twin in the same straight lines, at 3.1, 2.7 and 2.7 tokens a forward; Transformers' `generate`, on the twin, runs at 0.37, so they are three to four times as fast as that. The adapter goes through modules of peft and is slower than either.
# - **Of the commit rules** the plain threshold (94.6 % in 4.5 forwards), credit, hierarchy and factor (93.2 to 94.2 % in 4.4) are one cloud; entropy, WINO and Saber lie below it; KLASS, which can write nothing before its third forward, needs 11.5 for what others do in 4.4.
# - **Of the revision rules**, on careless drafts, editing (96.0 % in 5.1 forwards) and re-masking what is now improbable (95.4 % in 5.6) repair most. Re-masking what was written with the least confidence, WINO's and Saber's verifiers repair little and cost as much or more.
# - **Pipelined blocks are the one thing that moves the front**: 88.2 % at 3.8 forwards and 78.8 % at 3.0, where the dLLM with as many more steps has 90.0 % at 4.2 and 72.4 % at 3.9. That is bought where accuracy is already below S.
# - **CARD**, after 500 steps from the twin, writes 1.6 tokens a forward at 80 %: a causal model needs longer to learn to guess than one that sees its block.
# - A forward over 8 positions costs 1.5 times one over a single position at 1.1 M weights, over 16 it costs 1.8 times as much: neither floor is near, what takes the time is the number of small operations. At 135 M weights the matmuls count from some ten positions on, and a forward takes 1.7 to 2.5 times as long as they alone would.
