"""What a training run says of itself: sums between two logs, over all processes, and a line every few seconds.

Entry points: `Sums`, `ProgressLines` (a Trainer callback), `BUCKETS` (edges of the per-t loss curves).
"""

import time

import torch
from torch import Tensor
from transformers import TrainerCallback

from hildalib.devices import peak_memory_gb
from hildalib.noise import Noised

BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
PARTS = ("m2t", "t2t", "keep", "context", "kl", *(f"m2t_t{high:.2f}" for high in BUCKETS[1:]))


class Sums:
    """Summed nats and counts of each part since the last log, and the clean tokens read."""

    def __init__(self):
        self.totals = dict.fromkeys([*PARTS, *(f"{part}_n" for part in PARTS), "clean_tokens"], 0.0)
        self.clock = time.perf_counter()

    def add(self, part: str, nats: float, count: float) -> None:
        self.totals[part] += nats
        self.totals[f"{part}_n"] += count

    def watch(self, noised: Noised, targets: Tensor, nll: Tensor, clean_tokens: int) -> None:
        """nll: nats of the True positions of targets (B, L), row-major."""
        grid = torch.zeros(targets.shape, device=nll.device).masked_scatter(targets, nll)
        parts = {"m2t": noised.mask_targets, "t2t": noised.edit_targets, "keep": noised.keep_targets & targets}
        for low, high in zip(BUCKETS, BUCKETS[1:]):
            parts[f"m2t_t{high:.2f}"] = noised.mask_targets & (noised.t > low) & (noised.t <= high)
        for part, where in parts.items():
            self.add(part, (grid * where).sum().item(), where.sum().item())
        self.totals["clean_tokens"] += clean_tokens

    def means(self, accelerator) -> dict[str, float]:
        """Means of the parts that had targets, tokens a second and peak memory, of all processes together; all of them must ask. Starts anew."""
        totals = torch.tensor([*self.totals.values()], dtype=torch.float64, device=accelerator.device)
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals, "sum")  # the curve of the run, not of this process's share of its rows
        sums, spent = dict(zip(self.totals, totals.tolist())), time.perf_counter() - self.clock
        self.__init__()
        means = {part: sums[part] / sums[f"{part}_n"] for part in PARTS if sums[f"{part}_n"]}
        return means | {"clean_tokens_per_s": sums["clean_tokens"] / spent, "peak_memory_gb": peak_memory_gb()}


class ProgressLines(TrainerCallback):
    """A line every few seconds: step, block size, losses, speed, ETA; step and ETA alone where logs are far apart.

    Plain lines survive papermill; bars do not."""

    SECONDS = 10.0  # often enough to see life, rare enough to keep an executed notebook short
    PATIENCE = 60.0  # without a log for so long, a large model on a small machine shows its steps

    def __init__(self, title: str):
        self.title, self.start, self.last = title, time.monotonic(), 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        now = time.monotonic()
        if "m2t" not in (logs or {}) or (now - self.last < self.SECONDS and state.global_step < state.max_steps):
            return
        losses = "  ".join(f"{name} {logs[name]:.3f}" for name in ("m2t", "t2t", "kl") if name in logs)
        self._print(state, f"  K={logs['block_size']} {logs['stage']}  {losses}  {logs['clean_tokens_per_s']:,.0f} tokens/s")

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_log and time.monotonic() - max(self.last, self.start) > self.PATIENCE and state.global_step < state.max_steps:
            self._print(state)

    def _print(self, state, facts: str = "") -> None:
        self.last, done = time.monotonic(), max(state.global_step - self.first, 1)
        eta = (self.last - self.start) / done * (state.max_steps - state.global_step)
        if state.is_world_process_zero:
            print(f"{self.title}  step {state.global_step}/{state.max_steps}{facts}  ETA {int(eta // 60)}:{int(eta % 60):02d}", flush=True)
