"""A training run as data: every choice in `Recipe`, every example in `NoisedRows`.

Everything random about row n of a run (its text, block size, noise, drafts) is a function of (seed, n) alone, so resumed,
accumulated and multi-process runs see the same data. Entry points: `Recipe`, `arm` (one idea changed), `NoisedRows`, `collate`, `noised_of`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hildalib import HildaError
from hildalib.noise import Noised, block_rates, complement, corrupt, rising_rates, soft_tail, suffix_blocks
from hildalib.objective import predictable
from hildalib.wsd import BlockSchedule


@dataclass(frozen=True)
class Recipe:
    """Every choice of a training run; defaults are the plain LLaDA2.0 objective. Unpublished values are ours.

    schedule: block sizes by step. low, high, full_share: bandwidth of t and the share of fully masked blocks. suffix_share:
    share of blocks whose masks are their last positions (`noise.suffix_blocks`); then the loss is no likelihood bound.
    edit_rate: share of visible tokens replaced at random (T2T). draft_share: share of rows whose masks are partly filled by
    the model's own argmax in `draft_turns` no-gradient turns. complementary: a second copy with the complement mask.
    residual_share: share of rows whose masks carry what a frozen reference expects there (`residual.Residual`; 1 in RCD); residual_lag: share
    of the visible response that is still masked for the reference, as it was a forward ago in decoding (ours; 0 in RCD).
    ar_share: share of steps at block size 1 after the first. kl_weight: M2T label = (1-w) hard + w parent's top-k.
    causal_context: the clean half attends causally, so that it stays an AR model; context_weight: weight of its next-token loss.
    pipeline: blocks of a group, of which noisy rows see the noisy ones before theirs, at mask rates that rise (D2F); 1: no groups.
    tail_slack: lambda of CARD's soft tail; noisy copies stand alone and are read causally. 0: not CARD.
    adapter_rank: of LoRA on noisy rows alone over the frozen parent (`gated`), trained at adapter_lr; 0 trains every weight at lr.
    head_rows: rows of the output head that are worked on at a time, for large vocabularies; 0: all.
    mask_noise: std of the Gaussian noise on [MASK] embeddings, fading to 0 over mask_noise_steps.
    """

    schedule: BlockSchedule
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    lr_floor: float = 0.05  # final lr as a share of the peak: a cosine that ends in steps too small to matter wastes them
    warmup_steps: int = 20
    weight_decay: float = 0.1
    optimizer: str = "adamw_torch_fused"
    label_shift: bool = True
    weighting: str = "mean"
    low: float = 0.0
    high: float = 1.0
    full_share: float = 0.1
    suffix_share: float = 0.0
    complementary: bool = False
    copies: int = 1
    edit_rate: float = 0.0
    edit_weight: float = 0.5
    keep_weight: float = 0.0
    draft_share: float = 0.0
    draft_turns: int = 1
    residual_share: float = 0.0
    residual_lag: float = 0.0
    ar_share: float = 0.0
    cap_weight: float = 0.0
    kl_weight: float = 0.0
    kl_top_k: int = 16
    causal_context: bool = False
    context_weight: float = 0.0
    pipeline: int = 1
    tail_slack: float = 0.0
    adapter_rank: int = 0
    adapter_lr: float = 0.0
    mask_noise: float = 0.0
    mask_noise_steps: int = 0
    precision: str = "float32"  # or "bfloat16": autocast over float32 weights
    gradient_checkpointing: bool = False
    head_rows: int = 0
    seed: int = 0
    log_every: int = 10
    save_every: int = 0  # 0: only at the end
    merge_top_k: int = 0  # mean of the k saved checkpoints of the last rung with the best validation loss; 0: the last weights
    stage: str = "wsd"

    def __post_init__(self):
        if self.suffix_share and self.weighting != "mean":
            raise HildaError(f"suffix_share = {self.suffix_share} with weighting {self.weighting}: masks that are not drawn with probability t have no such "
                             "weight; set weighting to mean, or suffix_share to 0")

        if self.context_weight and not self.causal_context:
            raise HildaError(f"context_weight = {self.context_weight} trains next-token prediction where later tokens of the block are in sight; "
                             "set causal_context to true, or context_weight to 0")
        if self.tail_slack and (self.tail_slack < 1 or self.weighting != "context" or not self.label_shift or self.causal_context or self.suffix_share):
            raise HildaError(f"tail_slack = {self.tail_slack}: CARD's window is no shorter than its masks, its loss has weights of its own, its rows no "
                             "clean half; set tail_slack to 1 or more, weighting to context, label_shift to true, causal_context and suffix_share to 0")
        if self.weighting == "context" and not self.tail_slack:
            raise HildaError("weighting context is that of CARD's causal rows; set tail_slack, or weighting to mean")
        if self.pipeline < 1:
            raise HildaError(f"pipeline = {self.pipeline} must be at least 1, the blocks of a group")
        if self.adapter_rank and self.adapter_lr <= 0:
            raise HildaError(f"adapter_rank = {self.adapter_rank} needs adapter_lr > 0, the peak learning rate of adapters")

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulate

    def share(self, processes: int) -> tuple[int, int]:
        """(batch_size, accumulate) of each of `processes`, which together take the same rows a step: micro-batches are divided first, then their rows.

        Process p takes micro-batches p, p + processes, ...; nothing else of a run depends on how many there are. CAP's mean over right rows is
        taken in each micro-batch, so it alone changes where those are divided. HildaError where the rows cannot be divided.
        """
        together = math.gcd(self.accumulate, processes)
        if self.batch_size % (processes // together):
            raise HildaError(f"{processes} processes cannot share a step of {self.accumulate} micro-batches of {self.batch_size} rows; start as many "
                             "as divide accumulate, or accumulate x batch_size, or change these")
        return self.batch_size // (processes // together), self.accumulate // together

    @property
    def copies_used(self) -> int:
        return 2 if self.complementary else self.copies

    def cost(self, length: int | None = None) -> float:
        """Forward passes over one clean row that a row of this recipe costs, mean over its steps; a backward pass counts as two.

        Steps at block size `length` and those of CARD have no clean half, steps at (shifted) block size 1 nothing else; a teacher reads each row once more,
        a residual's reference its share of them in all that stands there.
        """
        rows = 0.0
        for size, steps in self.schedule.rungs():
            alone = 1.0 if size == 1 and self.label_shift else self.ar_share
            rows += steps * (alone + (1 - alone) * (self.copies_used + (size != length and not self.tail_slack)))
        return rows / self.schedule.total_steps * (3 + self.draft_share * self.draft_turns + self.residual_share) + (self.kl_weight > 0)


class NoisedRows(torch.utils.data.Dataset):
    """Row n of a training run with its noise, a pure function of (recipe, n).

    rows: {"input_ids", "doc_ids", "maskable"}, each (N, L); row n shows text `order[n]`, n // global_batch is its step.
    Items: input_ids, doc_ids (L,), noisy_ids, mask_targets, edit_targets, maskable, t, fill, unseen (C, L), carries, block_size, row.
    carries: its masks carry a residual; unseen: the reference reads [MASK] there.
    """

    def __init__(self, rows: dict[str, Tensor], recipe: Recipe, tokenizer_ids: dict):
        self.rows, self.recipe, self.ids = rows, recipe, tokenizer_ids
        self.batch = recipe.global_batch
        recipe.schedule.check(rows["input_ids"].shape[1], recipe.pipeline)
        count, wanted = len(rows["input_ids"]), len(self)
        rng = np.random.default_rng(recipe.seed)
        self.order = np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]

    def __len__(self) -> int:
        return self.recipe.schedule.total_steps * self.batch

    def block_size(self, step: int) -> int:
        size = self.recipe.schedule.block_size(step)
        if step and self.recipe.ar_share and np.random.default_rng([self.recipe.seed, step, 1]).random() < self.recipe.ar_share:
            return 1
        return size

    def __getitem__(self, n: int) -> dict:
        recipe, step = self.recipe, n // self.batch
        x0, docs, maskable = (self.rows[key][self.order[n]][None] for key in ("input_ids", "doc_ids", "maskable"))
        size = self.block_size(step)
        maskable = predictable(maskable, docs, recipe.label_shift)
        generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + n) % 2**63)
        copies = []
        for _ in range(1 if recipe.complementary else recipe.copies):
            # size 1 is the AR objective: everything is a target of the clean half
            causal = size == 1 and recipe.label_shift
            t = 1.0 if causal else self._rates(maskable, size, generator)
            suffix = suffix_blocks(*t.shape, recipe.suffix_share, generator=generator) if recipe.suffix_share and not causal else None
            copies.append(corrupt(x0, maskable, block_size=size, edit_rate=recipe.edit_rate, t=t, suffix=suffix, generator=generator, **self.ids))
        if recipe.complementary:
            copies.append(complement(copies[0], x0, self.ids["mask_token_id"], suffix, size))
        drafted = torch.rand(1, generator=generator) < recipe.draft_share
        fill = [c.mask_targets & drafted & (torch.rand(x0.shape, generator=generator) < torch.rand(1, generator=generator)) for c in copies]
        item = {name: torch.cat([getattr(c, name) for c in copies]) for name in ("noisy_ids", "mask_targets", "edit_targets", "t", "maskable")}
        carries = torch.rand((), generator=generator) < recipe.residual_share  # drawn last: other recipes see the noise they always saw
        unseen = (torch.rand(item["maskable"].shape, generator=generator) < recipe.residual_lag) & item["maskable"]
        return item | {"fill": torch.cat(fill), "unseen": unseen, "carries": carries, "input_ids": x0[0], "doc_ids": docs[0], "block_size": size, "row": n}

    def _rates(self, maskable: Tensor, size: int, generator: torch.Generator) -> Tensor:
        recipe, length = self.recipe, maskable.shape[1]
        if recipe.tail_slack:
            return soft_tail(maskable, recipe.tail_slack, generator=generator)
        rates = block_rates(1, -(-length // size), low=recipe.low, high=recipe.high, full_share=recipe.full_share, generator=generator)
        grouped = recipe.pipeline > 1 and size < length
        return rising_rates(rates, recipe.pipeline, high=recipe.high, generator=generator) if grouped else rates


def collate(items: list[dict]) -> dict:
    """Stack of items; copies stay a dimension: noisy_ids (B, C, L)."""
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key not in ("block_size", "row")}
    return batch | {"block_size": items[0]["block_size"], "row": items[0]["row"]}


def noised_of(batch: dict) -> Noised:
    """The batch's noise as (B * C, L) tensors."""
    return Noised(*(batch[name].flatten(0, 1) for name in ("noisy_ids", "mask_targets", "edit_targets", "t", "maskable")))


def arm(recipe: Recipe, name: str, length: int | None = None) -> Recipe:
    """`recipe` with one idea changed, for a comparison at equal tokens and steps; ARMS lists the names.

    "AR twin" keeps parent, text, optimiser, batch and number of steps, and trains next-token prediction. Any other name may end in
    " at equal compute": then every rung is as much longer as a row of `length` tokens is cheaper (`Recipe.cost`).
    """
    if name.endswith(EQUAL_COMPUTE):
        changed = arm(recipe, name.removesuffix(EQUAL_COMPUTE))
        return replace(changed, schedule=changed.schedule.scaled(recipe.cost(length) / changed.cost(length)))
    if name == "AR twin":
        steps = recipe.schedule.total_steps
        return replace(recipe, schedule=BlockSchedule(stable=(1, steps)), label_shift=True, kl_weight=0.0, ar_share=0.0, complementary=False,
                       copies=1, cap_weight=0.0, causal_context=False, context_weight=0.0, adapter_rank=0, pipeline=1, tail_slack=0.0, weighting="mean", residual_share=0.0, residual_lag=0.0,
                       mask_noise_steps=0, **NO_EDITING, stage=f"{recipe.stage} twin")
    if name not in ARMS:
        raise HildaError(f"arm {name!r} is unknown; use one of {', '.join(ARMS)}")
    changes = ARMS[name](recipe)
    return replace(recipe, **changes)


def every_weight(name: str) -> bool:
    """Whether arm `name` trains every weight where others of the same recipe train adapters on noisy rows."""
    gated = Recipe(BlockSchedule(decay=((4, 1), (2, 1))), adapter_rank=1, adapter_lr=1.0, causal_context=True)
    return arm(gated, name.removesuffix(EQUAL_COMPUTE)).adapter_rank == 0


def _direct(recipe: Recipe) -> BlockSchedule:
    """The working block size from the first step on."""
    steps = recipe.schedule.total_steps
    return BlockSchedule(stable=(recipe.schedule.block_size(steps), steps))


EQUAL_COMPUTE = " at equal compute"
NO_EDITING = {"edit_rate": 0.0, "draft_share": 0.0, "keep_weight": 0.0}
PLAIN = {"label_shift": False, "causal_context": False, "context_weight": 0.0, "ar_share": 0.0, "kl_weight": 0.0, "adapter_rank": 0, "low": 0.0, "high": 1.0,
         "full_share": 0.0, "suffix_share": 0.0, "complementary": False, "copies": 1, "cap_weight": 0.0, "mask_noise_steps": 0, "merge_top_k": 0,
         "residual_share": 0.0, "residual_lag": 0.0, "pipeline": 1, **NO_EDITING}
CARD = {"tail_slack": 1.5, "weighting": "context", "causal_context": False, "context_weight": 0.0, "suffix_share": 0.0, "complementary": False,
        "ar_share": 0.0, "cap_weight": 0.0, "kl_weight": 0.0, "adapter_rank": 0, "residual_share": 0.0, "residual_lag": 0.0, "pipeline": 1, **NO_EDITING}
ARMS = {
    "dLLM": lambda r: {},
    "no T2T": lambda r: NO_EDITING,
    "random T2T": lambda r: {"draft_share": 0.0, "edit_rate": r.edit_rate or 0.1},
    "hard labels": lambda r: {"kl_weight": 0.0},
    "parent KL": lambda r: {"kl_weight": r.kl_weight or 0.5},
    "unshifted": lambda r: {"label_shift": False},
    "no size-1 rows": lambda r: {"ar_share": 0.0},
    "size-1 rows": lambda r: {"ar_share": r.ar_share or 0.2},
    "complementary": lambda r: {"complementary": True},
    "suffix masks": lambda r: {"suffix_share": r.suffix_share or 0.5},
    "residual": lambda r: {"residual_share": r.residual_share or 1.0, "residual_lag": 0.0},
    "lagging residual": lambda r: {"residual_share": r.residual_share or 1.0, "residual_lag": r.residual_lag or 1.0},
    "no residual": lambda r: {"residual_share": 0.0, "residual_lag": 0.0},
    "no keep": lambda r: {"keep_weight": 0.0},
    "causal context": lambda r: {"causal_context": True, "context_weight": r.context_weight or 1.0},
    "block-causal context": lambda r: {"causal_context": False, "context_weight": 0.0},
    "no AR term": lambda r: {"context_weight": 0.0},
    "all weights": lambda r: {"adapter_rank": 0, "context_weight": (r.context_weight or 1.0) * r.causal_context},
    "gated adapters": lambda r: {"adapter_rank": r.adapter_rank or 64, "adapter_lr": r.adapter_lr or 2 * r.lr, "causal_context": True,
                                 "context_weight": 0.0, "ar_share": 0.0, "schedule": r.schedule.without_size_one()},
    "pipelined": lambda r: {"pipeline": max(r.pipeline, 2)},
    "CARD": lambda r: {**CARD, "schedule": _direct(r)},
    "no mask noise": lambda r: {"mask_noise_steps": 0},
    "full sequence": lambda r: {"schedule": BlockSchedule(stable=(r.schedule.stable[0], r.schedule.total_steps))},
    "checkpoint merge": lambda r: {"merge_top_k": r.merge_top_k or 3, "save_every": max(r.schedule.total_steps // 8, 1)},
    "stable stage": lambda r: {"schedule": r.schedule.with_stable_stage()},
    "direct": lambda r: {"schedule": _direct(r)},
    "plain conversion": lambda r: {**PLAIN, "schedule": _direct(r)},
    "AR twin": None,
}
