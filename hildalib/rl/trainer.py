"""The RL loop: sample groups of completions, score them, take a few gradient steps, repeat; interrupted runs go on where they were.

Everything random is a function of (seed, step), so a resumed run is the same run. Entry points: `train`, `RLRecipe`, `METHODS`,
`success_rates` (which prompts are worth a pool).
"""

import copy
import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from hildalib import HildaError, backbones
from hildalib.attention import TILED
from hildalib.decoding import EditSettings
from hildalib.decoding.decoded import eos_ids
from hildalib.devices import peak_memory_gb
from hildalib.evaluate import left_pad
from hildalib.rl import objectives
from hildalib.rl.exploration import EXPLORATIONS, Explorer
from hildalib.rl.gradient import Batch, blocks_scored, policy_gradient, scored
from hildalib.rl.likelihood import States, denoising, elbo_states, mean_field, redrawn, trajectory
from hildalib.rl.rollout import Rollout, sample, score, spliced
from hildalib.runs import load_finished, publish


@dataclass(frozen=True)
class Method:
    """states: (rollout, samples, eos ids, generator) -> States. objective: of `objectives`. predictions: a sample is every prediction
    of a block, scored on its own, and not the completion. draws: predictions drawn anew of each state, judged against each other
    instead of against all of the prompt; 0 = the one that decoding made. reference: the objective needs the frozen start policy."""

    states: Callable[[Rollout, int, list[int], torch.Generator], States]
    objective: Callable
    predictions: bool = False
    draws: int = 0
    reference: bool = False


def _elbo(scheme: str):
    return lambda rollout, samples, eos, generator: elbo_states(rollout, samples, scheme, generator)


def _trajectory(edits: bool):
    return lambda rollout, samples, eos, generator: trajectory(rollout, edits=edits, samples=samples, generator=generator)


def _mean_field(rollout, samples, eos, generator):
    return mean_field(rollout)


def _denoising(rollout, samples, eos, generator):
    return denoising(rollout, eos, samples, generator)


METHODS = {
    "wd1++": Method(_denoising, objectives.wd1, predictions=True),
    "wd1++ redrawn": Method(_denoising, objectives.wd1, predictions=True, draws=16),  # ours: verifying sixteen short texts costs less than a forward
    "wd1": Method(_mean_field, objectives.wd1),
    "ESPO": Method(_elbo("balanced"), partial(objectives.espo, beta=3e-3), reference=True),  # ESPO's beta for Countdown
    "EBPO": Method(_elbo("stratified"), objectives.ebpo),
    "diffu-GRPO": Method(_mean_field, objectives.diffu_grpo, reference=True),
    "AGRPO": Method(_trajectory(edits=False), objectives.agrpo),
    "AGRPO with edits": Method(_trajectory(edits=True), objectives.agrpo),
    "REINFORCE": Method(_elbo("balanced"), objectives.reinforce),
    "SFT on successes": Method(_elbo("balanced"), objectives.imitation),
    "AR GRPO": Method(_mean_field, objectives.grpo),  # for block size 1, where the mean field is exact
}


@dataclass(frozen=True)
class RLRecipe:
    """Every choice of an RL run. prompts x group completions a step (wd1++: 64), `updates` gradient steps on each (mu; the ratio
    moves only from the second on). samples: noisy copies of an ELBO, or rounds of a block that a trajectory scores. Prompts are
    revisited pass by pass: with ever-new ones a public small-scale reproduction of d1 did not learn. micro_batch: rows of a
    forward with gradient; smaller ones give the same gradient for less memory and a third more time. lr_end: the share of lr that is
    left at the end of a linear decay; 1 = constant, as published; with few and noisy steps 0 averages the last ones. exploration: who
    makes the second half of each group (`exploration.EXPLORATIONS`), within the forwards of the first; "" = all are plain."""

    method: str = "wd1++"
    steps: int = 20  # wd1++'s published count
    prompts: int = 8
    group: int = 8
    updates: int = 1
    samples: int = 4
    lr: float = 1e-4  # d1's 3e-6 is for 8 B parameters; ours, for a few million
    lr_end: float = 1.0
    weight_decay: float = 0.01  # ESPO
    max_grad_norm: float = 0.2  # d1, wd1, ESPO
    micro_batch: int = 64
    exploration: str = ""
    seed: int = 0
    save_every: int = 5
    eval_every: int = 5

    def __post_init__(self):
        if self.method not in METHODS:
            raise HildaError(f"method {self.method!r} is unknown; use one of {', '.join(METHODS)}")
        for name in ("steps", "prompts", "updates", "samples", "micro_batch", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise HildaError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.group < 2:
            raise HildaError(f"group = {self.group}: a completion is judged against the others of its prompt; use at least 2")
        if self.exploration not in ("", *EXPLORATIONS):
            raise HildaError(f"exploration {self.exploration!r} is unknown; use one of {', '.join(EXPLORATIONS)}, or an empty text for none")
        if self.exploration and self.group % 2:
            raise HildaError(f"group = {self.group}: with exploration half of a group are plain attempts; use an even number")

    @property
    def plain(self) -> int:
        """Completions of a step that are plain attempts; they come first."""
        return self.prompts * (self.group // 2 if self.exploration else self.group)


def _generator(seed: int, step: int, part: int) -> torch.Generator:
    """The stream of one part (0 prompts, 1 rollouts, 2.. masks) of one step."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + part) % 2**63)  # primes: neighbouring runs share no stream


def prompts_of(step: int, recipe: RLRecipe, pool: list[dict]) -> list[dict]:
    """The items of a step: the pool in a new order at every pass."""
    first = step * recipe.prompts
    orders = {at // len(pool) for at in range(first, first + recipe.prompts)}
    shuffled = {one: torch.randperm(len(pool), generator=_generator(recipe.seed, one, 0)).tolist() for one in orders}
    return [pool[shuffled[at // len(pool)][at % len(pool)]] for at in range(first, first + recipe.prompts)]


def _encode(tokenizer, task, items: list[dict], chat: bool, pad_id: int) -> tuple[Tensor, Tensor]:
    texts = [task.prompt(item) for item in items]
    texts = [backbones.chat_prompt(tokenizer, text) for text in texts] if chat else texts
    return left_pad(tokenizer(texts, add_special_tokens=False)["input_ids"], pad_id)


def success_rates(model, tokenizer, task, items: list[dict], settings: EditSettings, *, group: int = 8, chat: bool = False, batch_size: int = 256,
                  seed: int = 0) -> Tensor:
    """(n,) mean reward of `group` completions of each item: only prompts with a rate inside (0, 1) teach anything. batch_size: rows."""
    rates, prompts = [], max(batch_size // group, 1)
    for start in range(0, len(items), prompts):
        asked = [item for item in items[start:start + prompts] for _ in range(group)]
        ids, real = (value.to(model.device) for value in _encode(tokenizer, task, asked, chat, eos_ids(model)[0]))
        rollout = sample(model, ids, settings, attention_mask=real, generator=_generator(seed, start, 1))
        rates.append(score(rollout.ids, tokenizer, task, asked).view(-1, group).mean(1))
    return torch.cat(rates)


class _Run:
    """State of one run: model, optimiser, step. `reference`: the start policy, where the method needs it."""

    def __init__(self, model, tokenizer, task, pool: list[dict], recipe: RLRecipe, settings: EditSettings, chat: bool):
        self.model, self.tokenizer, self.task, self.pool, self.recipe, self.settings, self.chat = model, tokenizer, task, pool, recipe, settings, chat
        self.method, self.eos, self.step = METHODS[recipe.method], eos_ids(model), 0
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)  # betas: d1
        self.wrapper = EXPLORATIONS.get(recipe.exploration)
        start = copy.deepcopy(model).requires_grad_(False) if self.method.reference or self.wrapper and self.wrapper.reference else None
        self.reference = start if self.method.reference else None
        self.explorer = Explorer(model, start, tokenizer, task, settings, self.eos)

    def roll(self) -> tuple[Rollout, list[dict], Tensor, Tensor]:
        """The completions of the present step with their items, rewards and groups."""
        recipe = self.recipe
        if self.wrapper:
            items = prompts_of(self.step, recipe, self.pool)
            ids, real = _encode(self.tokenizer, self.task, items, self.chat, self.eos[0])
            prompts = [row[mask.bool()].tolist() for row, mask in zip(ids, real)]
            return self.explorer.explore(recipe.exploration, prompts, items, recipe.group, _generator(recipe.seed, self.step, 1))
        items = [item for item in prompts_of(self.step, recipe, self.pool) for _ in range(recipe.group)]
        ids, real = _encode(self.tokenizer, self.task, items, self.chat, self.eos[0])
        rollout = sample(self.model, ids.to(self.model.device), self.settings, attention_mask=real.to(self.model.device),
                         generator=_generator(recipe.seed, self.step, 1))
        rewards = score(rollout.ids, self.tokenizer, self.task, items)
        return rollout, items, rewards, torch.arange(recipe.prompts).repeat_interleave(recipe.group)

    def advance(self) -> dict:
        """One step; returns its log row."""
        wall, cpu = time.perf_counter(), time.process_time()
        rollout, items, rewards, groups = self.roll()
        row = {"step": self.step + 1, "reward": rewards[:self.recipe.plain].mean().item(),
               "equal_groups": 1 - objectives.informative(rewards, groups).float().mean().item(),
               "tokens": rollout.scored.sum(1).float().mean().item(), "confidence": rollout.confidence[rollout.written].nanmean().item(),
               "edits": rollout.edits.float().mean().item(), "forwards": rollout.forwards.sum().item(), "positions": rollout.positions_fed.sum().item()}
        row |= self._learn(rollout, items, rewards, groups)
        self.step += 1
        return row | {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "peak_memory_gb": peak_memory_gb()}

    def _batch(self, rollout: Rollout, items: list[dict], rewards: Tensor, groups: Tensor, update: int) -> Batch | None:
        """The samples of one update, without the groups whose rewards are all equal; None where no other is left."""
        predictions, generator = self.method.predictions, _generator(self.recipe.seed, self.step, 2 + update)
        if self.method.draws:
            quota = getattr(self.settings.commit, "tokens", None)
            states = redrawn(self.model, rollout, self.eos, self.method.draws, quota, self.recipe.samples, generator)
        else:
            states = self.method.states(rollout, self.recipe.samples, self.eos, generator)
        states = replace(states, weight=states.weight * rollout.credit[:, None])
        owner, lengths = torch.arange(len(items)), (rollout.scored & (rollout.credit > 0)).sum(1).clamp(min=1)
        if predictions:
            where = blocks_scored(states)
            owner, copy, block = where.nonzero().T
            lengths = (states.weight != 0).unflatten(-1, (-1, states.block_size)).sum(-1)[where]
            drafts = spliced(rollout, states.labels, where, self.eos)
            rewards = score(drafts, self.tokenizer, self.task, [items[row] for row in owner.tolist()])
            groups = groups[owner] if not self.method.draws else (owner * where.shape[1] + copy // states.draws) * where.shape[2] + block
        kept = objectives.informative(rewards, groups)
        if not kept.any() or not states.weight.any():
            return None
        if predictions:
            where[where.clone()] = kept
            states = replace(states, weight=states.weight * where.repeat_interleave(states.block_size, -1))
        rows = torch.isin(torch.arange(len(items)), owner[kept])
        return Batch(states.take(rows), rewards[kept], groups[kept], lengths[kept], predictions)

    def _learn(self, rollout: Rollout, items: list[dict], rewards: Tensor, groups: Tensor) -> dict:
        """`updates` optimiser steps; statistics of the last one, and row-forwards and positions fed, a backward pass counted as two
        forwards. Old and reference log-probabilities are taken before the first step, under the masks that the update will use."""
        micro, batches, cost = self.recipe.micro_batch, [], {"learn_forwards": 0, "learn_positions": 0}
        for update in range(self.recipe.updates):
            batch = self._batch(rollout, items, rewards, groups, update)
            if batch is None:
                return cost
            old = scored(self.model, batch.states, micro) if update else None
            reference = None if self.reference is None else scored(self.reference, batch.states, micro)
            batches.append(replace(batch, old=old, reference=reference))
            passes = 3 + (len(batch.states.x0) > micro) + (old is not None) + (reference is not None) + (self.method.draws > 0)
            cost = {"learn_forwards": cost["learn_forwards"] + passes * len(batch.states.x0),
                    "learn_positions": cost["learn_positions"] + passes * batch.states.positions}
        for batch in batches:
            self.optimizer.param_groups[0]["lr"] = self.recipe.lr * (1 + (self.recipe.lr_end - 1) * self.step / self.recipe.steps)
            self.optimizer.zero_grad()
            statistics = policy_gradient(self.model, batch.states, partial(batch.loss, self.method.objective), micro)
            statistics["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.max_grad_norm).item()
            self.optimizer.step()
        return statistics | cost

    def save(self, path: Path, log: list[dict], fingerprint: str) -> None:
        """Everything that the next step depends on, atomically."""
        temporary = path.with_suffix(".tmp")
        torch.save({"fingerprint": fingerprint, "step": self.step, "log": log, "weights": {name: p.detach() for name, p in self.trained.items()},
                    "optimizer": self.optimizer.state_dict()}, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path, fingerprint: str) -> list[dict]:
        """The log of the run that `save` wrote, whose state is taken over; [] and nothing done for another run's or a damaged file."""
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            return []
        if state["fingerprint"] != fingerprint:
            return []
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        return state["log"]


def _fingerprint(model, pool: list[dict], recipe: RLRecipe, settings: EditSettings, task) -> str:
    """What a run depends on; a checkpoint of another fingerprint is never resumed. Without a wrapper it is what it was before there were any."""
    wrapper = {"wrapper": EXPLORATIONS[recipe.exploration]} if recipe.exploration else {}
    record = [{name: value for name, value in asdict(recipe).items() if value != ""} | wrapper, asdict(settings), task.name, getattr(task, "version", 0), pool]
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True, default=str).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def train(model, tokenizer, task, pool: list[dict], recipe: RLRecipe, settings: EditSettings, folder: Path, *, chat: bool = False,
          evaluate: Callable[[torch.nn.Module], dict] | None = None) -> pd.DataFrame:
    """Trains `model` in place on the items of `pool`, saves it as folder/model and returns the log, one row a step.

    settings: how completions are sampled; temperature > 0, or all answers to a prompt are the same. Block size 1 with tau_edit
    >= 1 and method "AR GRPO" is the AR reference. evaluate: called with the model after every recipe.eval_every steps and the
    last one; what it returns joins the row. The model stays in eval mode: with dropout the first ratio would not be 1.

    Columns: step, reward (mean of the plain attempts), equal_groups (share of samples whose group has one reward: no signal), tokens,
    edits (a completion), confidence (mean at the last write), forwards, positions (of the rollout), learn_forwards, learn_positions (see
    `_Run._learn`), loss, entropy (nats a scored token), grad_norm (before clipping), the objective's statistics, seconds,
    cpu_seconds, peak_memory_gb. An interrupted run with the same arguments and start weights continues from its last checkpoint;
    a finished one is loaded. Raises HildaError on an empty pool, temperature 0, or a loss that is not a number.
    """
    if not pool or settings.temperature == 0:
        raise HildaError("temperature = 0 samples the same answer again and again; use 1.0" if pool else "the pool of prompts is empty; pass items of a task")
    log_file, checkpoint = folder / "log.csv", folder / "state.pt"
    fingerprint, marker = _fingerprint(model, pool, recipe, settings, task), folder / "fingerprint.txt"
    if log_file.exists() and marker.exists() and marker.read_text(encoding="utf-8") == fingerprint:
        load_finished(model, folder / "model")
        return pd.read_csv(log_file)
    folder.mkdir(parents=True, exist_ok=True)
    log_file.unlink(missing_ok=True)
    marker.write_text(fingerprint, encoding="utf-8")
    model.eval()
    model.set_attn_implementation(TILED)
    run = _Run(model, tokenizer, task, pool, recipe, settings, chat)
    log, progress = run.resume(checkpoint, fingerprint), Progress(recipe)
    while run.step < recipe.steps:
        row = run.advance()
        if evaluate and (run.step % recipe.eval_every == 0 or run.step == recipe.steps):
            row |= evaluate(model)
        log.append(row)
        progress.show(row)
        if run.step % recipe.save_every == 0:
            run.save(checkpoint, log, fingerprint)
    model.set_attn_implementation("sdpa")
    model.config.hilda = model.config.hilda | {"stage": "rl"}
    frame = pd.DataFrame(log)
    publish(model, tokenizer, frame, folder)
    checkpoint.unlink(missing_ok=True)
    return frame


class Progress:
    """A line every few seconds: step, reward, what the gradient did, ETA."""

    SECONDS = 10.0  # as in training.ProgressLines

    def __init__(self, recipe: RLRecipe):
        self.recipe, self.start, self.last, self.first = recipe, time.monotonic(), 0.0, None

    def show(self, row: dict) -> None:
        now, step = time.monotonic(), row["step"]
        self.first = step - 1 if self.first is None else self.first
        if now - self.last < self.SECONDS and step < self.recipe.steps:
            return
        eta, self.last = (now - self.start) / (step - self.first) * (self.recipe.steps - step), now
        shown = "  ".join(f"{name} {row[name]:.3f}" for name in ("reward", "equal_groups", "entropy", "grad_norm") if name in row)
        title = " + ".join(filter(None, (self.recipe.method, self.recipe.exploration)))
        print(f"{title}  step {step}/{self.recipe.steps}  {shown}  ETA {int(eta // 60)}:{int(eta % 60):02d}", flush=True)
