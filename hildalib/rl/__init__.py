"""Reinforcement learning with verifiable rewards on an editable block-diffusion model.

`rollout` samples completions, `exploration` spends them otherwise, `likelihood` says how likely a policy makes them, `objectives` turns both into a loss, `trainer` repeats.
Entry points: `train`, `RLRecipe`, `METHODS`.
"""

from hildalib.rl.trainer import METHODS, RLRecipe, train

__all__ = ["METHODS", "RLRecipe", "train"]
