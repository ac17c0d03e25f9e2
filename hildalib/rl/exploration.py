"""Other ways to spend a step's rollouts: half of each group are plain attempts, the other half is sampled with what they showed.

That half may spend what the plain half spent and no forward more: a step then costs at most twice its plain half, which is what a step of
plain rollouts costs on average. Any objective learns from both halves. Entry points: `EXPLORATIONS` (name -> wrapper), `Explorer` (its
`explore` makes a step's rollouts).
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from hildalib.decoding import EditSettings
from hildalib.decoding.rules import Block, at_least
from hildalib.rl.likelihood import States, token_logp
from hildalib.rl.objectives import SAME, advantages
from hildalib.rl.rollout import Rollout, continued, joined, most_forwards, moved, sample, score, spared

Made = tuple[Rollout, list[dict], Tensor, Tensor]  # rows, and of each its item, reward and group


@dataclass(frozen=True)
class Finish:
    """A commit rule: what `rule` writes, or all masks of the block as soon as each is more confident than tau."""

    rule: Callable[[Block], Tensor]
    tau: float

    @property
    def tokens(self) -> int:
        """The fewest that it writes where masks are left."""
        return getattr(self.rule, "tokens", getattr(self.rule, "minimum", 1))

    def __call__(self, block: Block) -> Tensor:
        chosen = at_least(self.rule(block), block.confidence, block.masked, 1)
        certain = (~block.hidden | (block.confidence > self.tau)).all(-1, keepdim=True)
        return torch.where(certain, block.masked, chosen)


@dataclass(frozen=True)
class Plain:
    """The plain half of a step: n prompts as token lists with their items, and half attempts each, one after the other, with rewards
    (n * half,). budget: the forwards they cost, which is what the other half may cost."""

    prompts: list[list[int]]
    items: list[dict]
    rollout: Rollout
    rewards: Tensor
    half: int

    @property
    def groups(self) -> Tensor:
        return torch.arange(len(self.prompts)).repeat_interleave(self.half)

    @property
    def budget(self) -> int:
        return int(self.rollout.forwards.sum())

    @property
    def rounds(self) -> list[int]:
        """Every prompt's number `half` times, each prompt in its turn: where a budget ends early, it ends alike for all."""
        return list(range(len(self.prompts))) * self.half

    def with_others(self, first: Rollout, second: Rollout | None, rewards: Tensor, groups: Tensor) -> Made:
        """The plain rows as `first` and behind them those of `second`, of which rewards and groups (m,) are given."""
        rollout, every = (first if second is None else joined([first, second])), torch.cat([self.groups, groups])
        return rollout, [self.items[number] for number in every.tolist()], torch.cat([self.rewards, rewards]), every


@dataclass(frozen=True)
class Explorer:
    """What a wrapper works with. start: the policy before the first step, for wrappers that ask for it (`reference`)."""

    model: torch.nn.Module
    start: torch.nn.Module | None
    tokenizer: object
    task: object
    settings: EditSettings
    eos: list[int]

    def explore(self, name: str, prompts: list[list[int]], items: list[dict], group: int, generator: torch.Generator) -> Made:
        """A step's rollouts: of each prompt group // 2 plain ones, first, and as many others as wrapper `name` makes and can pay."""
        half = group // 2
        asked = [number for number in range(len(prompts)) for _ in range(half)]
        rollout, _ = self.decode([prompts[number] for number in asked], self.settings, generator)
        rewards = score(rollout.ids, self.tokenizer, self.task, [items[number] for number in asked])
        return EXPLORATIONS[name](self, Plain(prompts, items, rollout, rewards, half), generator)

    def decode(self, prompts: list[list[int]], settings: EditSettings, generator: torch.Generator,
               budget: float = math.inf) -> tuple[Rollout | None, list[int]]:
        """(a completion each of the first prompts that the budget of forwards surely pays, their numbers); None where it pays none.

        A row is begun only if its worst case is covered, so none has to be cut short, which would favour short answers; what
        the worst case left over pays for more rows.
        """
        size, device = settings.block_size or self.model.config.hilda["block_size"], self.model.device
        worst = [most_forwards(settings, size, len(prompt)) for prompt in prompts]
        parts, begun = [], 0
        while count := bisect_right(list(accumulate(worst[begun:])), budget):
            part = prompts[begun:begun + count]
            width = max(map(len, part))
            ids = torch.tensor([[self.eos[0]] * (width - len(prompt)) + prompt for prompt in part])
            real = torch.arange(width) >= torch.tensor([[width - len(prompt)] for prompt in part])
            parts.append(sample(self.model, ids.to(device), settings, attention_mask=real.long().to(device), generator=generator))
            begun, budget = begun + count, budget - int(parts[-1].forwards.sum())
        return (joined(parts) if parts else None), list(range(begun))

    def resume(self, plain: Plain, numbers: list[int], kept: list[list[int]], settings: EditSettings,
               generator: torch.Generator) -> tuple[Rollout | None, Tensor, Tensor]:
        """(completions, rewards, groups) of prompts `numbers`, each with what `kept` says of prompt and completion given; no more than
        the budget pays."""
        ends = [len(plain.prompts[number]) + settings.max_new_tokens for number in numbers]
        room = max((end - len(ids) for end, ids in zip(ends, kept)), default=1)
        rollout, begun = self.decode(kept, replace(settings, max_new_tokens=room), generator, plain.budget)
        groups = torch.tensor(numbers, dtype=torch.long)[begun]
        if rollout is None:
            return None, torch.zeros(0), groups
        lengths = torch.tensor([len(plain.prompts[number]) for number in groups.tolist()])
        rollout = continued(rollout, lengths, settings.max_new_tokens, self.eos)
        return rollout, score(rollout.ids, self.tokenizer, self.task, [plain.items[number] for number in groups.tolist()]), groups

    @torch.no_grad()
    def moved_by(self, prompts: list[list[int]]) -> list[Tensor]:
        """|log-probability under the policy - under the start| of each token of each prompt, read at block size 1; 0 for the first, which
        nothing predicts. Two forwards a prompt."""
        width, mask = max(map(len, prompts)), self.model.config.hilda["mask_token_id"]
        x0 = torch.tensor([prompt + [mask] * (width - len(prompt)) for prompt in prompts])
        real = torch.arange(width) < torch.tensor([[len(prompt)] for prompt in prompts])
        scored = real & (torch.arange(width) > 0)
        states = States(x0, real.long() - 1, torch.full_like(x0, mask)[:, None], x0[:, None], scored[:, None].float(), 1)
        now, then = (token_logp(model, states)[0][:, 0].cpu() for model in (self.model, self.start))
        return [row[:len(prompt)] for row, prompt in zip((now - then).abs(), prompts)]


@dataclass(frozen=True)
class Prune:
    """STP-inspired (arXiv 2602.08905; only its abstract is public, so priors, ratios and loss are ours). Spatial: the beginning of a
    completion on which all plain attempts agree, each token written with more than tau, is given to the other half and leaves
    everyone's loss. Only a beginning: its left context is the same for all, while a token further on may stand elsewhere in an
    answer that took another way, and a block-causal decoder writes left blocks without having seen it. Temporal: in that half the
    masks of a block are written in one forward as soon as all are surer than tau; what that wrote beyond what any forward
    writes leaves the loss with the rest of it."""

    tau: float = 0.9
    reference = False

    def __call__(self, bench: Explorer, plain: Plain, generator: torch.Generator) -> Made:
        until = self._until(plain, bench.eos)
        kept = [plain.rollout.x0[number * plain.half, :int(until[number])].tolist() for number in plain.rounds]
        rule = Finish(bench.settings.commit_rule, self.tau)
        second, rewards, groups = bench.resume(plain, plain.rounds, kept, replace(bench.settings, commit=rule), generator)
        if second is not None:
            second = replace(second, credit=second.credit.masked_fill(self._late(second, rule.tokens), 0.0))
        return plain.with_others(spared(plain.rollout, until[plain.groups]), second, rewards, groups)

    def _until(self, plain: Plain, eos: list[int]) -> Tensor:
        """(n,) the position before which the attempts of a prompt agree and were sure; never beyond an EOS."""
        rollout, length = plain.rollout, plain.rollout.prompt_length
        x0 = rollout.x0.unflatten(0, (-1, plain.half))
        sure = rollout.scored & (rollout.confidence > self.tau) & ~torch.isin(rollout.x0, torch.tensor(eos))
        sure = sure.unflatten(0, (-1, plain.half)).all(1) & (x0 == x0[:, :1]).all(1)
        return (sure | (torch.arange(sure.shape[1]) < length[::plain.half, None])).long().cumprod(1).sum(1)

    def _late(self, rollout: Rollout, least: int) -> Tensor:
        """(B, L) bool: written by a block's last forward, which wrote more than `least`, each with more than tau."""
        step, confidence = (value.unflatten(1, (-1, rollout.block_size)) for value in (rollout.step_map, rollout.confidence))
        last = (step == step.amax(-1, keepdim=True)) & (step > 0)
        pruned = (last.sum(-1, keepdim=True) > least) & (~last | (confidence > self.tau)).all(-1, keepdim=True)
        return (last & pruned).flatten(1)


@dataclass(frozen=True)
class Purify:
    """LENS-like (arXiv 2601.21244). Where less than tau of the plain attempts are right, the other half answers a prompt without its
    ceil(gamma * length) tokens whose log-probability RL has moved most; elsewhere it is plain. If the shorter prompt is answered
    better, its right answers replace as many wrong ones, and the loss is that of the whole prompt; what is not used has a group of
    its own, which teaches nothing. Right plain attempts then count a, the others 1 - a, with a the plain share of right ones.

    gamma: the paper's 1 to 5 %. tau and the weight w~ in the paper's ratio are unverified: tau is ours, and there is no ratio to the
    policy on the shorter prompt, as if the whole one had been answered so. The score is read at block size 1 (ours: a diffusion model
    has no log-probability of a prompt), where a frozen parent (`gated`) never moves, and nothing is deleted at the first step."""

    gamma: float = 0.05
    tau: float = 0.5
    reference = True

    def __call__(self, bench: Explorer, plain: Plain, generator: torch.Generator) -> Made:
        right, count = (plain.rewards >= 1 - SAME).view(-1, plain.half), len(plain.prompts)
        rates = right.float().mean(1)
        hard = (rates < self.tau).nonzero()[:, 0].tolist()
        affordable, spent = 2 * len(hard) <= plain.budget, torch.zeros_like(plain.rollout.forwards)
        shorter = self._shorter(bench, {number: plain.prompts[number] for number in hard}) if hard and affordable else {}
        if hard and affordable:
            spent[[number * plain.half for number in hard]] = 2
        asked = [shorter.get(number, plain.prompts[number]) for number in plain.rounds]
        second, begun = bench.decode(asked, bench.settings, generator, plain.budget - int(spent.sum()))
        fed = spent * plain.rollout.prompt_length
        first = replace(plain.rollout, forwards=plain.rollout.forwards + spent, positions_fed=plain.rollout.positions_fed + fed)
        groups = torch.tensor(plain.rounds, dtype=torch.long)[begun]
        if second is None:
            return plain.with_others(first, None, torch.zeros(0), groups)
        rewards = score(second.ids, bench.tokenizer, bench.task, [plain.items[number] for number in groups.tolist()])
        second = moved_back(second, groups, plain, shorter, bench.eos)
        rollout, items, rewards, every = plain.with_others(first, second, rewards, groups)
        for number in shorter:
            alone = self._transfer(rollout, rewards, every, number, plain.half * count, rates[number].item())
            every[alone] = count + alone
        return rollout, items, rewards, every

    def _shorter(self, bench: Explorer, prompts: dict[int, list[int]]) -> dict[int, list[int]]:
        """The prompts, by number, without the tokens that moved most; those of which none has moved are left out."""
        found = {}
        for (number, prompt), change in zip(prompts.items(), bench.moved_by(list(prompts.values()))):
            gone = set(change.topk(min(math.ceil(self.gamma * len(prompt)), len(prompt) - 1)).indices.tolist())
            if change.max() > 0:
                found[number] = [token for at, token in enumerate(prompt) if at not in gone]
        return found

    def _transfer(self, rollout: Rollout, rewards: Tensor, groups: Tensor, number: int, plain: int, rate: float) -> Tensor:
        """Rows of prompt `number` that are not used; weighs the others in place. plain: the plain rows, which come first."""
        rows = (groups == number).nonzero()[:, 0]
        own, other, right = rows[rows < plain], rows[rows >= plain], rewards >= 1 - SAME
        won, lost = other[right[other]], own[~right[own]]
        if not len(other) or right[other].float().mean() <= rate:
            return other
        many = min(len(won), len(lost))
        used = torch.cat([own[right[own]], lost[many:], won[:many]])
        rollout.credit[used] *= torch.where(right[used] & (used < plain), rate, 1 - rate)[:, None]
        return rows[~torch.isin(rows, used)]


def moved_back(second: Rollout, groups: Tensor, plain: Plain, shorter: dict[int, list[int]], eos: list[int]) -> Rollout:
    """`second`, whose rows answer the prompts groups (m,), with those that answered a shorter one behind the whole one, in the same order."""
    changed = torch.isin(groups, torch.tensor(list(shorter), dtype=torch.long))
    if not changed.any():
        return second
    back = moved(second.take(changed), [plain.prompts[number] for number in groups[changed].tolist()], eos)
    order = torch.cat([changed.nonzero()[:, 0], (~changed).nonzero()[:, 0]]).argsort()
    return joined([back, second.take(~changed)]).take(order)


@dataclass(frozen=True)
class Retry:
    """R3L-like (arXiv 2601.03715, its published code; without the reflection in words, which a small model does not write). A plain
    attempt that failed is decoded again from its first wrong block on, with editing; before that nothing of either attempt is
    trained (pivotal credit). Above its group's mean a right answer counts 1 and another one three times its advantage (positive
    amplification); attempts that were right are not repeated, and what their share would have cost is not spent.

    The first wrong block is where the text leaves every right answer, if the task can tell (`sound`); else the one with the token
    that was written with the least confidence (ours). tau_edit: preset Q's; max_post_steps: ours, for what editing may cost."""

    tau_edit: float = 0.5
    max_post_steps: int = 2
    amplified: float = 3.0  # the code's factor
    reference = False

    def __call__(self, bench: Explorer, plain: Plain, generator: torch.Generator) -> Made:
        order = torch.arange(len(plain.rewards)).view(-1, plain.half).T.flatten()  # each prompt in its turn
        failed = order[plain.rewards[order] < 1 - SAME]
        until = torch.tensor([self._wrong(bench, plain, row) for row in failed.tolist()], dtype=torch.long)
        kept = [plain.rollout.x0[row, :end].tolist() for row, end in zip(failed.tolist(), until.tolist())]
        editing = {} if bench.settings.block_size == 1 else {"tau_edit": self.tau_edit, "max_post_steps": self.max_post_steps}  # the AR arm
        second, rewards, groups = bench.resume(plain, plain.groups[failed].tolist(), kept, replace(bench.settings, **editing), generator)
        pivots = torch.zeros(len(plain.rewards), dtype=torch.long)
        pivots[failed[:len(groups)]] = until[:len(groups)]
        rollout, items, rewards, groups = plain.with_others(spared(plain.rollout, pivots), second, rewards, groups)
        return replace(rollout, credit=rollout.credit * self._factor(rewards, groups)[:, None]), items, rewards, groups

    def _wrong(self, bench: Explorer, plain: Plain, row: int) -> int:
        """Where the first wrong block of a failed attempt begins, or its completion if that is later."""
        rollout, item = plain.rollout, plain.items[row // plain.half]
        start, ids = int(rollout.prompt_length[row]), rollout.x0[row][rollout.scored[row]].tolist()
        if hasattr(bench.task, "sound"):
            text = lambda count: bench.tokenizer.decode(ids[:count], skip_special_tokens=True)  # noqa: E731
            right = bench.task.sound(text(len(ids)), item)
            at = bisect_right(range(1, len(ids)), right, key=lambda count: len(text(count)))  # tokens whose characters are all right
        else:
            at = int(rollout.confidence[row][rollout.scored[row]].argmin())
        return max((start + at) // rollout.block_size * rollout.block_size, start)

    def _factor(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(N,) by which the advantage of each is to be multiplied."""
        a = advantages(rewards, groups)
        return torch.where(a <= SAME, 1.0, torch.where(rewards >= 1 - SAME, 1 / a.clamp(min=SAME), self.amplified))


EXPLORATIONS = {"STP-inspired": Prune(), "LENS-like": Purify(), "R3L-like": Retry()}
