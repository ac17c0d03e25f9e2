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
# # 06 · The RL laboratory
#
# **Question.** A model that has seen problems worked out and problems answered at once does both, and only one of them well. Can reinforcement learning with a verifiable reward bring out the better habit, how many completions does that take, and which method pays?
#
# **Needs.** [03 · SFT](03_sft.ipynb) (or, with `source = "02_wsd"`, [02 · Conversion](02_wsd.ipynb)) with the same `profile` and `seed`.
#
# **Time.** Smoke: about a CPU-minute. Profile nano: nine minutes on one core, a method half a CPU-minute.
#
# **Outputs.** A model a method under `outputs/<profile>/06_rl/checkpoints`, `curves.csv`, `costs.csv`, `test.csv`, `audit.csv`, six figures.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
source = "03_sft"
task = "shortcuts"
start_steps = 3
start_pairs = 60
start_length = 64
start_batch = 4
start_lr = 5e-4
methods = ["wd1++", "wd1++ redrawn", "wd1", "ESPO", "EBPO", "diffu-GRPO", "AGRPO", "AGRPO with edits",
           "REINFORCE", "SFT on successes", "AR GRPO"]
wrappers = ["STP-inspired", "LENS-like", "R3L-like"]
quota = 2
edit_rollouts = 0.5
max_new_tokens = 24
chat = False
draw = 6
draw_group = 4
steps = 2
prompts = 2
group = 4
updates = 1
samples = 2
lr = 1e-3
lr_end = 0.0
temperature = 1.0
partial_credit = False
micro_batch = 64
save_every = 5
eval_every = 1
items = 8
test_items = 8
batch_size = 64
noise_batches = 2
audit_prompts = 2
audit_copies = [2, 4]
audit_draws = 4

# %%
import copy

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

from hildalib import artefacts, backbones, comparison, evaluate, figures, gated, learning, pairs, paths, rl, tasks
from hildalib.decoding import EditSettings, commit
from hildalib.recipe import Recipe, arm
from hildalib.rl import likelihood, noise, rollout, trainer
from hildalib.training import train
from hildalib.wsd import BlockSchedule

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK, TWIN = "06_rl", "AR GRPO"
output, folder = paths.output_dir(profile, NOTEBOOK, seed), paths.checkpoint_dir(profile, NOTEBOOK, seed)
loaded = {name: backbones.load(artefacts.model_folder(profile, source, name, seed), dtype="float32")
          for name in ("dLLM", "AR twin")}
tokenizer, benchmark = loaded["dLLM"][1], tasks.load(task)
loaded = {name: model for name, (model, _) in loaded.items()}

# %% [markdown]
# ## The start
#
# Both models see the same demonstrations for a few steps: questions of [notebook 03](03_sft.ipynb), 45 of 100 worked out as there, 55 answered at once, whatever the question. One million parameters do one operation in a forward and fail at two, so what the start knows and what it does are two things. RL can then show what it does best: it teaches nothing that the model could not do, it makes it do it. (What happens where the habit is not the problem stands at the end.)

# %%
def encoded(item: dict) -> tuple[list[int], list[int]]:
    prompt = backbones.chat_prompt(tokenizer, benchmark.prompt(item)) if chat else benchmark.prompt(item)
    return tuple(tokenizer([prompt, benchmark.response(item)], add_special_tokens=False)["input_ids"])


if start_steps:
    record = loaded["dLLM"].config.hilda
    rank = gated.rank(loaded["dLLM"])
    shown = benchmark.items("train", limit=start_pairs, seed=seed + 1)
    demonstrations = pairs.pack_pairs(map(encoded, shown), start_length, tokenizer.eos_token_id,
                                      record["block_size"])[0]
    recipe = Recipe(schedule=BlockSchedule(stable=(record["block_size"], start_steps)), batch_size=start_batch,
                    lr=start_lr, suffix_share=0.5, full_share=0.2, complementary=True, edit_rate=0.02,
                    keep_weight=0.1, context_weight=0.0 if rank else 3.0, adapter_rank=rank, adapter_lr=start_lr,
                    label_shift=record["label_shift"], causal_context=record["causal_context"], stage="start",
                    seed=seed)
    for name, model in loaded.items():
        train(model, tokenizer, demonstrations, arm(recipe, name), folder / "start" / name, title=name)
starts = {method: loaded["AR twin" if method == TWIN else "dLLM"] for method in methods}

# %% [markdown]
# *Fast* writes the `quota` most confident tokens of every forward and never edits; *edited* is the same with editing, which repairs much and costs forwards; *slow* writes one token a forward, as the AR twin does, which is always greedy and from left to right. The quota holds the speed of *fast*: at a threshold, a model that RL makes surer of itself also writes more at once, and what it gained in one is lost in the other.

# %%
def settings(tau_edit: float = 1.0, **changes) -> EditSettings:
    return EditSettings(tau_edit=tau_edit, max_new_tokens=max_new_tokens,
                        **{"commit": commit.Quota(quota)} | changes)


decoders = {"fast": evaluate.diffusion(settings()), "edited": evaluate.diffusion(settings(edit_rollouts)),
            "slow": evaluate.diffusion(settings(commit=commit.Quota(1))),
            "twin": evaluate.autoregressive(max_new_tokens)}


def answers(model, decoder: str, split: str, count: int) -> pd.DataFrame:
    frame = evaluate.run(model, tokenizer, benchmark, decoders[decoder], limit=count, seed=0, split=split,
                         batch_size=batch_size, chat=chat)
    found = evaluate.summary(frame).assign(setting=decoder)
    if not hasattr(benchmark, "worked"):
        return found
    worked = frame.text.map(benchmark.worked)
    return found.assign(worked=worked.mean(), right=frame.score[worked].mean())


ways = {"dLLM": ("fast", "edited", "slow"), "AR twin": ("twin",)}
start = pd.concat([answers(loaded[name], decoder, "validation", items).assign(arm=name)
                   for name, decoders_of in ways.items() for decoder in decoders_of], ignore_index=True)
columns = ["arm", "setting", "accuracy", "low", "high", "worked", "right", "tpf", "nfe"]
print(start[start.columns.intersection(columns, sort=False)].round(3).to_string(index=False))

# %% [markdown]
# ## Prompts that teach
#
# A group of completions whose rewards are all equal moves no weight in any method here. Some training prompts are answered a few times each: with the final answer alone as the reward, only those between never right and always right teach. With `partial_credit` the reward is the share of the worked response's numbers and signs that are right, each in its place, and nearly every group has a difference; what is reported stays the answer. Training, validation and test questions are disjoint by construction: a hash of the question decides where it belongs.

# %%
drawn = benchmark.items("train", limit=draw, seed=seed)
teacher = rollout.graded(benchmark) if partial_credit else benchmark
sampling = settings(temperature=temperature)
rates = trainer.success_rates(starts[methods[0]], tokenizer, benchmark, drawn, sampling, group=draw_group,
                              chat=chat, seed=seed)
pool = [item for item, rate in zip(drawn, rates.tolist()) if partial_credit or 0 < rate < 1]
if not pool:
    print("no prompt is answered right now and then: all are kept, and little can be learned from them")
pool = pool or drawn
origin = {"profile": profile, "task": task, "seed": seed, "device": str(starts[methods[0]].device)}
histogram = pd.DataFrame({"prompt": [benchmark.prompt(item) for item in drawn], "rate": rates.tolist()})
figures.save(learning.prompts(rates.numpy(), draw_group), "06_prompts", histogram, profile=profile, seed=seed,
             provenance=origin | {"completions": draw_group})
plt.show()

# %% [markdown]
# ## The experiment
#
# Every method starts from the same weights and takes the same number of steps on the same prompts, with the same number of completions, sampled at the fast setting; each then makes one update. Learning rate and clipping of the gradient are shared too. They differ in the likelihood that they give a completion and in what they make of it:
#
# | method | likelihood of a completion | objective |
# |---|---|---|
# | wd1++ | each whole prediction of a block, at the state it was made in, scored on its own | softmax weights, praise and blame |
# | wd1++ redrawn | the same states, sixteen predictions drawn anew of each; only the tokens that the quota would write (ours) | the same, each prediction judged against the others of its state |
# | wd1 | one forward, the block masked completely | the same |
# | ESPO | block ELBO, balanced pairs of masks | ratio of the sequence, k2 penalty |
# | EBPO | block ELBO, stratified masks | clipped ratio of the sequence |
# | diffu-GRPO | one forward, the block masked completely | clipped ratio a token, k3 penalty |
# | AGRPO | the decoder's own choices, each where it was made | clipped ratio a token |
# | AGRPO with edits | the same, edits too; sampled with editing on | the same |
# | REINFORCE | block ELBO, balanced pairs | advantage times likelihood |
# | SFT on successes | block ELBO, balanced pairs | likelihood of right answers only: the control |
# | AR GRPO | exact (block size 1): the twin, sampled one token a forward | clipped ratio a token |

# %%
def sampled(method: str) -> EditSettings:
    if method == TWIN:
        return settings(block_size=1, temperature=temperature)
    return settings(edit_rollouts, temperature=temperature) if "edits" in method else sampling


def held_out(method: str):
    decoder = "twin" if method == TWIN else "fast"
    return lambda model: {"accuracy": answers(model, decoder, "validation", items).accuracy[0]}


shared = dict(steps=steps, prompts=prompts, group=group, updates=updates, samples=samples, lr=lr,
              lr_end=lr_end, micro_batch=micro_batch, seed=seed, save_every=save_every, eval_every=eval_every)
recipes = {method: rl.RLRecipe(method=method, **shared) for method in methods}
logs, trained = {}, {}
for method in methods:
    trained[method] = copy.deepcopy(starts[method])
    log = rl.train(trained[method], tokenizer, teacher, pool, recipes[method], sampled(method),
                   folder / method, chat=chat, evaluate=held_out(method))
    print(f"{method:17} {log.accuracy.iloc[-1]:.3f}, {log.cpu_seconds.sum():.0f} CPU-seconds", flush=True)
    logs[method] = log

# %% [markdown]
# ## Other ways to spend the rollouts
#
# A wrapper changes which completions are sampled, not what is made of them, so it goes with any method; here with wd1, the cheapest of all. Half of each group are plain attempts; the other half is made with what those showed, and may cost the forwards that they cost, no more:
#
# | wrapper | the other half | what leaves the loss |
# |---|---|---|
# | STP-inspired | is given the beginning on which all plain attempts surely agree, and finishes a block at once when it is sure of all of it | that beginning, and what was written at once |
# | LENS-like | of prompts that mostly fail: answers without the prompt tokens that RL has moved most; right ones replace wrong ones, behind the whole prompt | wrong answers to the shorter prompt |
# | R3L-like | of failed attempts: the same again from the first wrong block on, with editing | everything before that block, in both |
#
# Only the abstract of STP (arXiv 2602.08905) is public; constants of LENS (arXiv 2601.21244) are unverified; R3L (arXiv 2601.03715) reflects in words before it tries again, which these models do not. All three were published for other models and are small here: read them as tests of an idea. None may spend more forwards than its plain half twice, the price of plain rollouts on average; some spend less, and small batches cost more CPU-seconds a forward: both are in the tables.

# %%
BASE = "wd1"
wrapped = {f"{BASE} + {wrapper}": wrapper for wrapper in wrappers}
for name, wrapper in wrapped.items():
    recipes[name] = rl.RLRecipe(method=BASE, exploration=wrapper, **shared)
    starts[name], trained[name] = loaded["dLLM"], copy.deepcopy(loaded["dLLM"])
    logs[name] = rl.train(trained[name], tokenizer, teacher, pool, recipes[name], sampled(BASE),
                          folder / name, chat=chat, evaluate=held_out(BASE))
    print(f"{name:18} {logs[name].accuracy.iloc[-1]:.3f}, {logs[name].cpu_seconds.sum():.0f} CPU-seconds",
          flush=True)

# %% [markdown]
# ## All of them
#
# Held-out accuracy against steps; the axis of the twin is its own.

# %%
arms = [*methods, *wrapped]
before = dict(zip(start.setting, start.accuracy))
first = {name: before["twin" if name == TWIN else "fast"] for name in arms}
curves = learning.learning_curves(logs, first, prompts * group)
curves.to_csv(output / "curves.csv", index=False)


def every_seed(name: str) -> pd.DataFrame:
    found = artefacts.seeds_done(profile, NOTEBOOK, name).items()
    return pd.concat([pd.read_csv(path).assign(seed=number) for number, path in found], ignore_index=True)


everyone = every_seed("curves.csv")
origin |= {"seeds": ", ".join(map(str, sorted(everyone.seed.unique()))), "items": items, "lr": lr,
           "completions a step": f"{prompts} prompts x {group}"}
figures.save(learning.curves(everyone, apart=(TWIN,)), "06_steps", everyone, profile=profile, seed=seed,
             provenance=origin)
plt.show()

# %% [markdown]
# The same runs against what they cost. CPU-seconds count sampling, scoring and learning, not the evaluations.

# %%
figures.save(learning.curves(everyone, x="cpu_seconds", apart=(TWIN,)), "06_cpu", everyone, profile=profile,
             seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## What the gradient had to work with
#
# *noise*: the variance of the start's gradient over fresh batches, as a multiple of the squared mean gradient: how many steps an average would need until it is as much signal as noise. *mask noise*: the part of it that the draw of masks or rounds makes, with the same completions. *equal groups*: the share of completions without a signal. *log-ratio std* is 0 with one update a batch: the policy that sampled is the one that learns. *forwards*: of the rollouts, summed over rows. *learn_mb*: the memory that scoring and the backward pass of a step need beside weights and optimiser. Under a wrapper *equal groups* counts completions that were sampled and not used, and *noise* is that of the start, where LENS has nothing to compare.

# %%
spent = learning.costs(logs, prompts * group)
for name in arms:
    found = noise.gradient_noise(copy.deepcopy(starts[name]), tokenizer, teacher, pool, recipes[name],
                                 sampled(name), batches=noise_batches, chat=chat)
    spent.loc[spent.arm == name, list(found)] = list(found.values())
spent.to_csv(output / "costs.csv", index=False)
columns = ["arm", "cpu_seconds", "learn_mb", "forwards", "equal_groups", "noise", "mask_noise", "log_ratio_std",
           "grad_norm", "entropy", "tokens", "edits"]
print(spent[columns].round(3).to_string(index=False))

# %% [markdown]
# ## The likelihood is the problem
#
# A diffusion model has no cheap exact likelihood. On a few completions of the start, with edits, each estimator is set beside the exact value, which enumerates all masks of a block. The ELBO estimators are unbiased and noisy; the mean field, one forward, is certain and wrong. *ratio std* is what an objective feels: the spread of the log-ratio between the start and the model that wd1++ trained, under the same masks for both, and (*fresh*) with masks drawn for each: never compare two policies under different masks.

# %%
asked = pool[:audit_prompts]
texts = evaluate.worded(benchmark, tokenizer, [benchmark.prompt(item) for item in asked], chat)
model = starts[methods[0]]
ids, real = evaluate.left_pad(tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
rolled = rollout.sample(model, ids, settings(edit_rollouts, temperature=temperature),
                        attention_mask=real, generator=torch.Generator().manual_seed(seed))
audit = likelihood.audit(model, rolled, tuple(audit_copies), audit_draws, torch.Generator().manual_seed(seed),
                         other=trained[methods[0]])
audit.to_csv(output / "audit.csv", index=False)
figures.save(learning.estimators(audit), "06_estimators", audit, profile=profile, seed=seed,
             provenance=origin | {"completions": len(asked), "draws": audit_draws})
plt.show()
print(audit.drop(columns="noise").round(3).to_string(index=False))

# %% [markdown]
# ## On test prompts
#
# Everything so far was chosen and watched on validation prompts. Here each model answers the test prompts once, at the fast setting that it was trained for, with editing, and slowly.

# %%
rows = []
for name, model in {"dLLM": loaded["dLLM"], "AR twin": loaded["AR twin"], **trained}.items():
    for decoder in ways["AR twin" if name in (TWIN, "AR twin") else "dLLM"]:
        rows.append(answers(model, decoder, "test", test_items).assign(arm=name))
tested = pd.concat(rows, ignore_index=True)
tested["start"] = ["AR twin" if setting == "twin" else "dLLM" for setting in tested.setting]
tested = tested.merge(tested[["arm", "setting", "accuracy"]], left_on=["start", "setting"],
                      right_on=["arm", "setting"], suffixes=("", "_start")).drop(columns="arm_start")
tested["gain"] = tested.accuracy - tested.accuracy_start
tested.to_csv(output / "test.csv", index=False)
watched = [column for column in ("accuracy", "gain", "tpf", "worked", "right") if column in tested]
means = evaluate.across_seeds(dict(tuple(every_seed("test.csv").groupby("seed"))), ["arm", "setting"], watched,
                              shares=("accuracy", "worked", "right"))
kept = ["rollouts", "cpu_seconds", "learn_mb", "noise", "equal_groups", "entropy", "tokens"]
cost = every_seed("costs.csv").groupby("arm")[kept].mean()
means = means.merge(cost.reset_index(), how="left", on="arm")
means["rollouts_per_point"] = (means.rollouts / (100 * means.gain)).where(means.gain > 0)
columns = ["arm", "setting", "n_seeds", "accuracy", "gain", "gain_low", "gain_high", "tpf",
           "rollouts_per_point", "cpu_seconds", "learn_mb"]
print(means[columns].round(3).to_string(index=False))

# %%
page = means[means.arm.isin(arms)]
page = page.rename(columns={"gain": "difference", "gain_low": "low", "gain_high": "high"})
page = page.assign(measure=page.setting.map({"twin": "slow"}).fillna(page.setting),
                   better="higher")
page["arm"] = page.arm.replace({TWIN: "AR GRPO (twin)"})
figures.save(comparison.verdicts(page, reference="the start"), "06_gains", means, profile=profile, seed=seed,
             provenance=origin | {"test prompts": test_items})
plt.show()

# %% [markdown]
# Where the points came from: how often a model works a problem out, at the fast setting, and how often it is right when it does.

# %%
if "worked" in tested:
    fast = every_seed("test.csv").query("setting == 'fast' and arm != 'AR twin'")
    figures.save(learning.habits(fast, start="dLLM"), "06_habits", fast, profile=profile, seed=seed,
                 provenance=origin | {"test prompts": test_items})
    plt.show()

# %%
artefacts.write_metrics({"start": start.to_dict("records"), "pool": len(pool), "drawn": len(drawn),
                         "test": tested.to_dict("records"), "costs": spent.to_dict("records")},
                        profile, NOTEBOOK, seed, model=loaded["dLLM"])
print(f"{len(pool)} prompts in the pool; {prompts * group * steps} completions a method")

# %% [markdown]
# ## What we learned
#
# Three runs of profile nano, 200 test prompts each, 20 steps of 64 completions, 95 % t-intervals over runs. At the start the fast answers are right in 31.0 % (39.5, 28.5 and 25.0), after wd1++ in 79.8: **48.8 points more [42.6, 55.1]** for 1,280 completions and 21 CPU-seconds, 26 completions a point. The models had learned both habits from the same demonstrations; the reward made them choose: 28 to 44 % of the answers were worked out before and 94 to 98 % after (first panel of the last figure). Reinforcement learning chose here, it did not teach: of the answers worked out 84 % were right before and 83 % after.
#
# - **One start of three parts the methods** (seed 1): what imitates or follows the whole answer's likelihood (SFT on successes, REINFORCE, ESPO, EBPO) gains 30 to 34 points in it, *AGRPO with edits* 36.5, all others but *wd1++ redrawn* 43.5 to 51.5. In the other two runs everything but that gains 45 to 51.5. Over the three runs the means lie between 42.7 and 50.2, every interval overlaps every other, and all but that of *wd1++ redrawn* exclude 0.
# - **The same from other starts.** Three runs from models tuned for 2,600 steps instead of 4,000 (an earlier profile, starts of 43, 25 and 22 %): wd1++ +34.7 points [2.0, 67.3], for seed 1 gained only 19.5, and there what imitates gained 11 to 13. Three from models tuned for 1,700 steps (33, 26 and 25 %): wd1++ +41.5 [34.9, 48.1], nine of ten methods between +38.5 and +44.3, the control that only imitates among them (+41.8). That RL brings the habit out does not depend on the start; how much, and which methods are behind, does.
# - **Prices.** wd1, one forward with the block masked, gains what wd1++ gains (+47.7 [39.6, 55.7]) for less than half its CPU-seconds and two fifths of its memory (9 instead of 21 s, 119 instead of 293 MB for a step's learning); ESPO takes most memory (311 MB).
# - **The wrappers change the bill**: on wd1, R3L-like +48.8 points [42.7, 55.0] with 30 % fewer forwards, STP-inspired +47.3 [44.7, 49.9] with 16 % fewer, LENS-like +44.8 [41.7, 48.0] with 5 %. In the slow run of the earlier start two of them gained more than wd1 alone (27.5 and 26.5 points, it 19.0).
# - ***wd1++ redrawn*** judges predictions that a state might have made against each other, which suits a wrong digit and not a habit: +31.7 points [-3.5, 66.8], 23 and 24 in two runs and 48 in the third (from the earlier starts +27, +8 and +22, and +44, +38 and -5).
# - **The twin starts higher** (84.8 %) and ends higher (98.8 %, +14.0 points [-8.5, +36.5]), one token a forward. Two tokens a forward explain 7 of the 19 points that wd1++ is behind it: written slowly, the same models are right in 86.5 % (92.0, 82.5 and 85.0), still 12 points behind.
# - **The audit.** With four copies in one forward a balanced ELBO scatters by 0.3, 1.0 and 1.5 nats around the exact value in the three models, a random one by 0.3, 1.4 and 3.1; what bias they show (0.0 to 0.4, and 0.0 to 0.8) is a quarter of that or less. The mean field is 0.6, 1.4 and 4.8 nats too low each time. Under different masks the ratio of two policies varies 1.2 to 3.1 times as much (random, four copies).
#
# **Where the habit is not the problem.** Before, the same methods were tried on a start that works everything out and loses it only when it writes too many tokens at once (two after notebook 02, four or eight after notebook 03). There they bring little, and nothing that holds in all runs. Single runs on 200 validation prompts, 20 steps each, the learning rate falling to 0, one change at a time; parts: partial credit for each right number and sign:
#
# | start, quota | seed | method, reward | completions a step | learning rate | fast, at the start, after 5, 10, 15, 20 steps |
# |---|---|---|---|---|---|
# | 02, 2 | 1 | wd1++, answer | 16 x 8 | 1.5e-4 | 39.0, 46.0, 46.5, 47.5, 48.0 % |
# | 02, 2 | 1 | the same, prompts right now and then (235 of 700) | 16 x 8 | 1.5e-4 | 39.0, 47.0, 46.0, 46.5, 46.5 % |
# | 02, 2 | 1 | the same, temperature 0.5 | 16 x 8 | 1.5e-4 | 39.0, 40.0, 42.5, 45.5, 46.0 % |
# | 02, 2 | 1 | wd1++, parts | 16 x 8 | 2e-4 | 39.0, 44.0, 45.5, 44.0, 46.5 % |
# | 02, 2 | 1 | wd1++, parts | 16 x 8 | 6e-4 | 39.0, 26.0, 17.5, 17.5, stopped |
# | 02, 2 | 2 | wd1++, parts | 16 x 8 | 2e-4 | 49.5, -, 44.0, -, 44.0 % |
# | 02, 2 | 2 | wd1++ redrawn, parts | 16 x 8 | 2e-4 | 49.5, 55.0, 49.5, 46.5, 45.0 % |
# | 03, 4 | 2 | wd1++, answer | 24 x 8 | 2e-4 | 45.5, 46.0, 49.0, 48.5, 48.0 % |
# | 03, 8 | 1 | wd1++, answer | 24 x 8 | 1e-4 | 28.0, 27.0, 27.0, 33.0, 32.5 % |
# | 03, 8 | 1 | AGRPO, answer | 24 x 8 | 1e-4 | 28.0, 24.5, 29.0, 31.0, - % |
# | 03, 8 | 1 | wd1++, parts | 24 x 8 | 3e-4 | 28.0, 31.0, 32.5, 33.0, 34.0 % |
# | 03, 8 | 1 | wd1++ redrawn, parts | 16 x 8 | 3e-4 | 28.0, 30.0, 35.0, 39.5, 41.5 % |
# | 03, 8 | 1 | wd1++ redrawn, parts | 16 x 8 | 1e-3 | 28.0, 16.0, 12.5, 32.5, 30.0 % |
