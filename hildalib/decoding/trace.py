"""What happened in a decode, forward by forward, for figures and sliders. Entry points: `Trace`, `Recorder`."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PROMPT, MASK, DRAFT, EDITED, COMMITTED = range(5)  # state codes of a position


@dataclass(frozen=True)
class Trace:
    """The canvas before the first forward (entry 0) and after each of S forwards; numpy arrays.

    ids (S+1, B, T) int64. state (S+1, B, T) uint8: PROMPT, MASK, DRAFT (filled, block open), EDITED (changed by an edit at
    least once), COMMITTED (block closed, never edited). confidence (S+1, B, T) float32: probability of the token when it was
    last written, nan for prompt and mask. forward (S+1, B) int64: forwards the row had taken part in. predicted (S+1, B, T) int64:
    ids, with the token that the model chose for it in place of every mask that this forward read and left. prompt_length (B,).
    """

    ids: np.ndarray
    state: np.ndarray
    confidence: np.ndarray
    forward: np.ndarray
    predicted: np.ndarray
    prompt_length: np.ndarray
    block_size: int
    mask_token_id: int

    def save(self, path: Path) -> Path:
        """Writes a compressed .npz."""
        np.savez_compressed(path, **{field.name: getattr(self, field.name) for field in fields(self)})
        return Path(path)

    @classmethod
    def load(cls, path: Path) -> "Trace":
        with np.load(path, allow_pickle=False) as stored:
            values = {field.name: stored[field.name] for field in fields(cls)}
        return cls(**values | {name: int(values[name]) for name in ("block_size", "mask_token_id")})


class Recorder:
    """Collects a Trace while a decoder runs; all inputs (B, T) of the full batch."""

    def __init__(self, canvas: Tensor, prompt_length: Tensor, block_size: int, mask_token_id: int):
        self.meta = (prompt_length.cpu().numpy(), block_size, mask_token_id)
        prompt = torch.arange(canvas.shape[1], device=canvas.device) < prompt_length[:, None]
        self.state = torch.where(prompt, PROMPT, MASK).to(torch.uint8)
        self.confidence = torch.full(canvas.shape, torch.nan, device=canvas.device)
        self.left = torch.full_like(canvas, mask_token_id)  # what the model chose for masks that it then left
        self.frames: list[tuple] = []
        self.snap(canvas, torch.zeros_like(prompt_length))

    def snap(self, canvas: Tensor, forwards: Tensor) -> None:
        """Stores the canvas and the forwards (B,) spent so far."""
        predicted = torch.where(canvas == self.meta[2], self.left, canvas)
        frame = (canvas, self.state, self.confidence, forwards, predicted)
        self.frames.append(tuple(value.cpu().numpy().copy() for value in frame))
        self.left.fill_(self.meta[2])

    def write(self, rows: Tensor, positions: Tensor, filled: Tensor, revised: Tensor, confidence: Tensor, tokens: Tensor, remasks: bool = False) -> None:
        """rows (b,); the others (b, Q): what one forward wrote, and how sure of which token it was at every position. remasks: the
        revised became masks."""
        self.left[rows[:, None], positions] = tokens
        after = (MASK, torch.full_like(confidence, torch.nan)) if remasks else (EDITED, confidence)
        for where, code, score in ((filled, DRAFT, confidence), (revised, *after)):
            row, column = rows[:, None].expand_as(positions)[where], positions[where]
            self.state[row, column] = code
            self.confidence[row, column] = score[where].float()

    def close(self, rows: Tensor, starts: Tensor, block_size: int) -> None:
        """The blocks of `rows` that begin at `starts` are closed: drafts become committed."""
        for row, start in zip(rows.tolist(), starts.tolist()):
            block = self.state[row, start:start + block_size]
            block[block == DRAFT] = COMMITTED

    def trace(self) -> Trace:
        return Trace(*(np.stack(frames) for frames in zip(*self.frames)), *self.meta)
