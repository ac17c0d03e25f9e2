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
# # 07 · Residual context
#
# **Question.** Each forward says something about every mask, and decoding throws away what it says of the masks that it leaves. Does a model that gets it back answer more, at equal forwards and equal training tokens?
#
# **Needs.** [03 · SFT](03_sft.ipynb) with the same `profile` and `seed`.
#
# **Time.** Smoke: about 20 seconds. Profile nano: 3 minutes on one core. Profile smol: 20 minutes of one core.
#
# **Outputs.** Two further trained dLLMs and their AR twin under `outputs/<profile>/07_residual/checkpoints`, `losses.csv`, `looks.csv`, `sweep.csv`, `benchmarks.csv`, and figures over all seeds that have been run.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
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
kl_weight = 0.0
kl_top_k = 16
residual_share = 1.0
temperature = 1.0
top_k = 0
optimizer = "adamw_torch_fused"
precision = "float32"
gradient_checkpointing = False
save_every = 0
arms = ["residual", "no residual", "AR twin"]
looks_rows = 32
task = "arithmetic"
items = 16
tau_masks = [0.5, 0.9]
tau_edits = [0.5, 1.0]
max_post_steps = 4
max_new_tokens = 32
tpf_floor = 2.0
test_items = 16
chat = False

# %%
import itertools

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

from hildalib import artefacts, backbones, comparison, evaluate, figures, gated, layout, params, paths, stages, tasks
from hildalib.decoding import EditSettings
from hildalib.recipe import arm
from hildalib.residual import Residual, Smoothing
from hildalib.training import train
from hildalib.wsd import BlockSchedule

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK = "07_residual"
folder, output = paths.checkpoint_dir(profile, NOTEBOOK, seed), paths.output_dir(profile, NOTEBOOK, seed)


def load(notebook: str, name: str):
    return backbones.load(artefacts.model_folder(profile, notebook, name, seed), dtype="float32")

# %% [markdown]
# ## What a mask can carry
#
# Residual Context Diffusion (RCD, arXiv 2601.22954) keeps, for each mask that a forward leaves, what it said there: the distribution $p$ over the vocabulary. In the next forward the mask is read not as $E_{[M]}$ but as
#
# $$e = (1-\alpha)\,E_{[M]} + \alpha \sum_v p(v)\,E_v, \qquad \alpha = H(p)/\ln V.$$
#
# Sure positions ($\alpha \approx 0$) are about to be written anyway; unsure ones tell their neighbours what they might become. The first forward of a block has nothing to carry, and a token, once written, is read as itself.
#
# ## Stage 2
#
# The tuned dLLM of notebook 03 learns to read such masks. It is also, frozen, the reference that supplies $p$: one more forward of the same rows, without a gradient, in one step. The control goes on for as many steps on the same rows with the same masks, without; the AR twin too, where it is among the `arms`.

# %%
reference, tokenizer = load("03_sft", "dLLM")
record = reference.config.hilda
rows = artefacts.load_rows(profile, "01_data", "sft-train", seed,
                           vocab_size=len(reference.get_input_embeddings().weight))
kept = {key: record[key] for key in ("label_shift", "causal_context")}
recipe = stages.recipe_of(params.of(NOTEBOOK, globals()), BlockSchedule(stable=(record["block_size"], steps)),
                          "residual", seed=seed + 1_000, **kept,  # rows in a new order
                          adapter_rank=gated.rank(reference), adapter_lr=lr if gated.is_gated(reference) else 0.0)
teacher = load("02_wsd", "AR twin")[0] if kl_weight else None
logs = []
for name in arms:
    start = load("03_sft", "AR twin" if name == "AR twin" else "dLLM")[0]
    log = train(start, tokenizer, rows, arm(recipe, name), folder / name, parent=teacher,
                reference=reference, title=name)
    logs.append(log.assign(arm=name))
logs = pd.concat(logs, ignore_index=True)
logs.drop(columns=["clean_tokens_per_s", "peak_memory_gb"]).to_csv(output / "losses.csv", index=False)
cost = {name: arm(recipe, name).cost() for name in arms}
print(f"{steps} steps of {recipe.global_batch} rows; forwards over a row that a row costs: "
      + ", ".join(f"{name} {value:.1f}" for name, value in cost.items()))

# %%
table = logs[["arm", "step", "block_size", *[c for c in ("m2t", "t2t") if c in logs]]]
origin = {"data": f"01_data of profile {profile}", "seed": seed, "device": str(reference.device)}
figures.save(figures.losses(table), "07_losses", table, profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## A second look
#
# The same held-out masks, looked at twice. The first look reads plain masks; the second reads what the first said of them, and no token more. If the residual holds anything that the model can use, its second look is better than its first, and better than the control's.

# %%
held_out = artefacts.load_rows(profile, "01_data", "sft-validation", seed)
held_out = {key: value[:looks_rows] for key, value in held_out.items()}
models = {name: load(NOTEBOOK, name)[0] for name in arms}
if "AR twin" not in arms:
    models["AR twin"] = load("03_sft", "AR twin")[0]  # without further steps
looks = [{"arm": name, "look": look, "t": t, "loss": value}
         for name in arms if name != "AR twin" for look, twice in (("first", False), ("second", True))
         for t, value in layout.validate(models[name], held_out, block_size=record["block_size"],
                                         residual=twice).items()]
looks = pd.DataFrame(looks)
looks.to_csv(output / "looks.csv", index=False)
drawn = looks.assign(arm=looks.arm + ", " + looks.look + " look")
figures.save(figures.loss_by_t(drawn), "07_looks", drawn, profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## Answers
#
# Every contestant decodes the same validation prompts over the same thresholds. All have seen equally many tokens. Beside the two models of stage 2: what the residual does to a model that never learned to read it, the training-free smoothing of dInfer (a small share of the expectation is added to every mask), and the model of stage 2 without the residual that it was trained with.

# %%
carried = Residual(temperature=temperature, top_k=top_k)
contestants = {"residual": ("residual", carried), "no residual": ("no residual", None),
               "residual, untrained": ("no residual", carried),
               "smoothing, untrained": ("no residual", Smoothing()),
               "residual, taken away": ("residual", None)}
benchmark = tasks.load(task)


def answers(label: str, split: str, count: int, tau_mask: float = 1.0, tau_edit: float = 1.0) -> pd.DataFrame:
    """Summary of one contestant at one pair of thresholds."""
    name, residual = contestants.get(label, (label, None))
    settings = EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, max_post_steps=max_post_steps,
                            max_new_tokens=max_new_tokens, residual=residual)
    decoder = (evaluate.autoregressive(max_new_tokens) if name == "AR twin" else evaluate.diffusion(settings))
    frame = evaluate.run(models[name], tokenizer, benchmark, decoder, limit=count, split=split,
                         batch_size=64, chat=chat)
    thresholds = {} if name == "AR twin" else {"tau_mask": tau_mask, "tau_edit": tau_edit}
    return evaluate.summary(frame).assign(seed=seed, arm=label, **thresholds)


sweep = []
for label, tau_mask, tau_edit in itertools.product(contestants, tau_masks, tau_edits):
    sweep.append(answers(label, "validation", items, tau_mask, tau_edit))
    print(f"{label:20} tau_mask {tau_mask:<4} tau_edit {tau_edit:<4} accuracy {sweep[-1].accuracy[0]:.3f}  "
          f"NFE {sweep[-1].nfe[0]:.2f}", flush=True)
sweep.append(answers("AR twin", "validation", items))
sweep = pd.concat(sweep, ignore_index=True)
sweep.to_csv(output / "sweep.csv", index=False)

# %% [markdown]
# Accuracy against forwards, with and without, over all seeds that have been run. With at least three the interval means something.

# %%
def every_seed(name: str) -> pd.DataFrame:
    found = artefacts.seeds_done(profile, NOTEBOOK, name).items()
    return pd.concat([pd.read_csv(path).assign(seed=number) for number, path in found], ignore_index=True)


sweeps = every_seed("sweep.csv")
pair = sweeps[sweeps.arm.isin(["residual", "no residual", "AR twin"])]
origin |= {"seed": ", ".join(map(str, sweeps.seed.unique())), "items": items,
           "training": f"{steps} further steps each"}
figures.save(comparison.forwards(pair), "07_forwards", pair, profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# All contestants beside the control, each difference taken within a seed: the mean distance of the two curves at equal tokens per forward.

# %%
verdicts = {label: comparison.at_equal_tpf(sweeps[sweeps.arm.isin([label, "no residual"])],
                                           reference=label, other="no residual")
            for label in contestants if label != "no residual"}
columns = ["difference", "low", "high", "seeds"]
gaps = pd.DataFrame([(label, *map(verdict.get, columns)) for label, verdict in verdicts.items()],
                    columns=["arm", *columns])
gaps = gaps.assign(measure="accuracy at equal tokens per forward", better="higher")
seen = every_seed("looks.csv").groupby(["arm", "look", "seed"], sort=False).loss.mean().reset_index()
called = {("residual", "first"): "residual, taken away", ("residual", "second"): "residual",
          ("no residual", "first"): "no residual", ("no residual", "second"): "residual, untrained"}
seen["arm"] = [called[key] for key in zip(seen.arm, seen.look)]
seen = comparison.differences(seen, "loss", reference="no residual")
seen = seen.assign(measure="loss on masked tokens (nats)", better="lower")
page = pd.concat([gaps, seen], ignore_index=True)
figures.save(comparison.verdicts(page, reference="no residual"), "07_controls", page,
             profile=profile, seed=seed, provenance=origin)
plt.show()
print(page.round(4).to_string(index=False))

# %% [markdown]
# ## On test prompts, once
#
# For each contestant the most accurate pair of thresholds among those that wrote at least `tpf_floor` tokens a forward on the validation prompts (the fastest, if none is that fast).

# %%
def chosen(label: str) -> pd.Series:
    own = sweep[sweep.arm == label]
    return own[own.tpf >= min(tpf_floor, own.tpf.max())].sort_values(["accuracy", "tpf"]).iloc[-1]


best = {label: chosen(label) for label in contestants}
tests = [answers(label, "test", test_items, row.tau_mask, row.tau_edit) for label, row in best.items()]
tests = pd.concat([*tests, answers("AR twin", "test", test_items)], ignore_index=True)
tests.to_csv(output / "benchmarks.csv", index=False)
tables = {number: part for number, part in every_seed("benchmarks.csv").groupby("seed")}
means = evaluate.across_seeds(tables, ["arm"], ["accuracy", "tpf", "nfe"], shares=("accuracy",))
columns = ["arm", "tau_mask", "tau_edit", "accuracy", "low", "high", "nfe", "tpf", "tokens_per_s"]
print(tests[columns].round(3).to_string(index=False))
columns = ["arm", "n_seeds", "accuracy", "accuracy_low", "accuracy_high", "nfe", "tpf"]
print(f"\nover {len(tables)} seed(s):")
print(means[columns].round(3).to_string(index=False))

# %%
artefacts.write_metrics({"steps": steps, "rows": steps * recipe.global_batch, "cost_of_a_row": cost,
                         "verdicts": verdicts, "benchmarks": tests.to_dict("records"),
                         "looks": looks.to_dict("records")}, profile, NOTEBOOK, seed, model=reference)

# %% [markdown]
# ## What we learned
#
# Three runs of profile nano, 200 further steps each: **a negative result.**
#
# - At equal tokens per forward the residual is worth +0.1 points [-1.1, +1.3] (validation prompts, 95 % over runs). On 500 test prompts, at some 3.6 tokens a forward, answers are right in 99.3 % with it and 99.1 % without (99.6, 99.6, 98.6 beside 99.2, 99.6, 98.6), in 4.37 and 4.47 forwards (0.04 fewer, 0.01 more, 0.28 fewer; in the last run the control's thresholds, chosen on validation prompts, were the more careful ones): nothing that three runs could call a saving. The twin, after as many more tokens, has 99.3 %.
# - Its training costs 13.5 forward passes a row where the control costs 10.5.
# - Taken away from the model that was trained with it, nothing changes (99.3 % on test prompts, +0.3 points [-1.3, +1.9] on validation): that model has learned to live with it, not from it. Given to a model that never learned to read it, it costs 0.7 points [-2.2, +3.5]; iteration smoothing, which needs no training, does nothing (-0.2 points [-0.9, +0.6]).
# - A second look, at the same masks, with what the first look expected: +0.0003 nats [-0.0011, +0.0017] beside the control's first. There is little to be carried where a block is written in two or three forwards. After 2,600 steps of tuning instead of 4,000, where the models were less sure, it was as little: -1.1 points [-4.8, +2.5], -0.0018 nats [-0.0191, +0.0155].
#
# Profile smol, three runs, 24 further steps of the adapters each, is as negative: 40.0, 47.5 and 30.0 % of 40 test prompts right with a residual, 40.0, 47.5 and 27.5 % without, in 6.0 forwards both (the twin, without further steps: 62.5, 57.5 and 45.0 % in 14.2). At equal tokens per forward that is 0.0 points [-12.4, +12.4] (20 validation prompts a run); masked tokens cost 0.004 nats less [-0.003, +0.011] for 9.0 forward passes a row instead of 7.0. Given untrained, to the control, it changes not one count of right answers. Twenty-four steps are few: what is shown is that nothing comes for free, not that nothing could be learned.
#
# RCD was published for models that write a block in many forwards, one or two tokens in each. Here most blocks are done before there is anything to remember.
#
# Back to [05 · Benchmarks](05_benchmarks.ipynb).
