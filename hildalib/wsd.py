"""Warmup-stable-decay over block sizes (LLaDA2.0 section 4.1) and the merge of its best checkpoints (section 4.3).

Warmup climbs a ladder from block size 1, where the model is its AR parent; stable runs at full sequence length, plain
MDLM; decay comes down to the working size. Entry points: `BlockSchedule`, `merge_checkpoints`.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file

from hildalib import HildaError

Rung = tuple[int, int]  # (block size, optimiser steps)


@dataclass(frozen=True)
class BlockSchedule:
    """Block size as a function of the optimiser step.

    warmup, decay: [(size, steps), ...] in order; stable: (size, steps), 0 steps to leave the stage out. The size of the
    last rung holds for every later step.
    """

    warmup: list[Rung] = field(default_factory=list)
    stable: Rung = (1, 0)
    decay: list[Rung] = field(default_factory=list)

    def __post_init__(self):
        for size, steps in self.rungs():
            if size < 1 or steps < 0:
                raise HildaError(f"block schedule: rung ({size}, {steps}) needs size >= 1 and steps >= 0")
        if not self.total_steps:
            raise HildaError("block schedule: no steps at all; give warmup, stable or decay at least one")

    def rungs(self) -> list[Rung]:
        """Every rung in order."""
        return [tuple(rung) for rung in (*self.warmup, self.stable, *self.decay)]

    @property
    def total_steps(self) -> int:
        return sum(steps for _, steps in self.rungs())

    def _rung(self, step: int) -> int:
        ends = list(accumulate(steps for _, steps in self.rungs()))
        return next((i for i, end in enumerate(ends) if step < end), max(i for i, (_, n) in enumerate(self.rungs()) if n))

    def block_size(self, step: int) -> int:
        """Block size K at optimiser step `step` (0-based)."""
        return self.rungs()[self._rung(step)][0]

    def stage(self, step: int) -> str:
        """"warmup", "stable" or "decay"."""
        rung = self._rung(step)
        return "warmup" if rung < len(self.warmup) else "stable" if rung == len(self.warmup) else "decay"

    def scaled(self, factor: float) -> "BlockSchedule":
        """The same rungs, each `factor` times as long (rounded; a rung that had steps keeps at least one)."""
        longer = [(size, max(round(steps * factor), 1) if steps else 0) for size, steps in self.rungs()]
        split = len(self.warmup)
        return BlockSchedule(longer[:split], longer[split], longer[split + 1:])

    def with_stable_stage(self) -> "BlockSchedule":
        """Half of the last decay rung given to the stable stage, at the size that is set for it. HildaError without a decay rung."""
        if not self.decay:
            raise HildaError("block schedule: no decay rung to take a stable stage from; give `decay` at least one")
        (size, steps), kept = self.decay[-1], self.stable[1]
        return BlockSchedule(self.warmup, (self.stable[0], kept + steps // 2), [*self.decay[:-1], (size, steps - steps // 2)])

    def without_size_one(self) -> "BlockSchedule":
        """The rungs at block size 1, where only clean rows learn, given to the rung after them. HildaError where none follows."""
        rungs, waiting = [], 0
        for size, steps in self.rungs():
            rungs.append((size, 0 if size == 1 else steps + waiting * bool(steps)))
            waiting = waiting + steps if size == 1 else waiting * (not steps)
        if waiting:
            raise HildaError("block schedule: no larger block size follows the steps at size 1")
        split = len(self.warmup)
        return BlockSchedule(rungs[:split], rungs[split], rungs[split + 1:])

    def check(self, length: int, group: int = 1) -> "BlockSchedule":
        """Itself, or a HildaError naming the first size that, in groups of that many blocks, does not divide the row length L."""
        for size, steps in self.rungs():
            if steps and group > 1 and 1 < size < length and length % (size * group):
                raise HildaError(f"block schedule: groups of {group} blocks of {size} do not divide length {length}; change `length`, `pipeline` or the rung")
            if steps and length % size:
                raise HildaError(f"block schedule: block size {size} does not divide length {length}; "
                                 f"change `length` or the rung")
        return self


def merge_checkpoints(files: list[Path]) -> dict[str, torch.Tensor]:
    """Uniform arithmetic mean of safetensors files (LLaDA2.0 section 4.3), taken in float32, in each tensor's own dtype.

    Raises HildaError when there is no file, or the files do not hold the same tensors.
    """
    if not files:
        raise HildaError("no checkpoint to merge; save some at the working block size (`save_every`) first")
    mean: dict[str, torch.Tensor] = {}
    for file in files:
        state = load_file(file)
        if mean and (state.keys() != mean.keys() or any(state[name].shape != mean[name].shape for name in state)):
            raise HildaError(f"{file}: holds other tensors than {files[0]}; merge checkpoints of one run only")
        for name, value in state.items():
            mean[name] = mean.get(name, 0) + value.float() / len(files)
    return {name: mean[name].to(value.dtype) for name, value in state.items()}
