"""What a run shows while it works: one status line with elapsed time and ETA, and the cells' own output above it.

Entry point: `Progress`. On a terminal the status is a line that stays at the bottom; in a log it is printed when a notebook starts
or ends and every half minute between. The ETA is the time that the last finished run took, and unknown until there was one.
"""

import sys
import threading
import time

from tqdm import tqdm

LOG_SECONDS = 30  # between two status lines in a log
FRAME_SECONDS = 5  # between two frames of a cell's own progress bar


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """expected: run name -> wall seconds of its last run or None; at_once: runs in parallel. Safe to call from any thread."""

    def __init__(self, total: int, expected: dict[str, float | None], at_once: int = 1):
        self.total, self.expected, self.at_once = total, dict(expected), at_once
        self.started, self.settled, self.active, self.spoken = time.perf_counter(), 0, {}, time.perf_counter()
        self.lock = threading.RLock()

    def __enter__(self):
        self.bar = tqdm(bar_format="{desc}", disable=None, dynamic_ncols=True, leave=False, file=sys.stderr)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def say(self, text: str, error: bool = False) -> None:
        with self.lock:
            tqdm.write(text, file=sys.stderr if error else sys.stdout)
            (sys.stderr if error else sys.stdout).flush()

    def skip(self, name: str, why: str) -> None:
        with self.lock:
            self.settled += 1
            self.expected.pop(name, None)
            self.say(f"[{self.settled}/{self.total}] {name}: {why}")

    def start(self, name: str, why: str, cells: int) -> None:
        with self.lock:
            self.active[name] = {"cell": 0, "cells": cells, "since": time.perf_counter()}
            self.say(f"[{self.settled + len(self.active)}/{self.total}] {name}: running ({why}), {self.eta()}")
            self.spoken = time.perf_counter()

    def cell(self, name: str, number: int) -> None:
        with self.lock:
            if name in self.active:
                self.active[name]["cell"] = number

    def end(self, name: str, outcome: str, error: bool = False) -> None:
        with self.lock:
            self.settled += 1
            self.active.pop(name, None)
            self.expected.pop(name, None)
            self.say(f"[{self.settled}/{self.total}] {name}: {outcome}", error)

    def tick(self) -> None:
        """Renews the status line; call it about twice a second."""
        with self.lock:
            if not self.active:
                return
            if not self.bar.disable:
                self.bar.set_description_str(self.line())
            elif time.perf_counter() - self.spoken > LOG_SECONDS:
                self.spoken = time.perf_counter()
                self.say(self.line())

    def line(self) -> str:
        parts = [f"notebook {self.settled + place}/{self.total} {name} cell {facts['cell']}/{facts['cells']}"
                 for place, (name, facts) in enumerate(self.active.items(), start=1)]
        return f"{', '.join(parts)}, elapsed {duration(time.perf_counter() - self.started)}, {self.eta()}"

    def eta(self) -> str:
        if any(seconds is None for seconds in self.expected.values()):
            return "ETA unknown before a first finished run"
        spent = {name: time.perf_counter() - facts["since"] for name, facts in self.active.items()}
        if any(spent.get(name, 0.0) > seconds for name, seconds in self.expected.items()):
            return "ETA unknown, this takes longer than the last time"
        left = [seconds - spent.get(name, 0.0) for name, seconds in self.expected.items()]
        return f"ETA {duration(max(sum(left) / self.at_once, max(left, default=0.0)))}"

    def stream(self, name: str):
        """A text file object: whole lines are shown as they come, frames of a progress bar now and then."""
        return _Lines(lambda text: self.say(f"  {name}: {text}" if self.at_once > 1 else f"  {text}"))


class _Lines:
    def __init__(self, show):
        self.show, self.held, self.frame = show, "", 0.0

    def write(self, text: str) -> int:
        *lines, self.held = (self.held + text).split("\n")
        for line in lines:
            shown = line.rstrip("\r").rpartition("\r")[2]
            if shown.strip():
                self.show(shown)
        if "\r" in self.held:
            shown = self.held.rstrip("\r").rpartition("\r")[2]
            self.held = "\r" + shown
            if shown.strip() and time.monotonic() - self.frame > FRAME_SECONDS:
                self.frame = time.monotonic()
                self.show(shown)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: a line is shown when it is whole."""
