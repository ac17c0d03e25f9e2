"""A training run as one of several processes; started by test_processes.py. Usage: processes.py FOLDER [KEY=JSON ...]"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny import as_rows, text, tiny

from hildalib import training
from hildalib.recipe import NoisedRows, Recipe, arm
from hildalib.training import DiffusionTrainer, train
from hildalib.wsd import BlockSchedule

BASE = {"batch_size": 4, "accumulate": 2, "lr": 1e-2, "warmup_steps": 1, "log_every": 1, "edit_rate": 0.2, "keep_weight": 0.1, "save_every": 2}


class Sharded(DiffusionTrainer):
    """FSDP2 as `accelerate launch --use_fsdp` sets it up, which accelerate itself does on accelerators only (on a CPU it runs DDP)."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type, self.is_fsdp_enabled = DistributedType.FSDP, True
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT")


def run(folder, name="dLLM", steps=4, causal=2, sharded=False, **changes):
    """Trains `folder`; leaves beside it, of each process, the numbers of the rows that it read."""
    torch.set_num_threads(1)
    training.DiffusionTrainer = Sharded if sharded else DiffusionTrainer
    model, tokenizer = tiny()
    rows = as_rows(*text(12, seed=3, documents=True))
    recipe = arm(Recipe(BlockSchedule(warmup=[(1, causal)], stable=(4, steps)), **BASE | changes), name)
    read, item = [], NoisedRows.__getitem__
    NoisedRows.__getitem__ = lambda self, n: read.append(n) or item(self, n)
    log = train(model, tokenizer, rows, recipe, folder, parent=tiny(1)[0] if recipe.kl_weight else None)
    NoisedRows.__getitem__ = item
    Path(f"{folder}.rows{os.environ.get('RANK', '0')}.json").write_text(json.dumps(read), encoding="utf-8")
    return log


if __name__ == "__main__":
    for line in sys.argv[1:]:
        given = json.loads(line)
        run(Path(given.pop("folder")), **given)
