"""Runs of the book, started and watched over HTTP: known notebooks, known profiles, checked parameters, and no text that could name a path.

A job is `hilda run` in a process of its own, one at a time. Entry points: `Jobs`, `Order`.
"""

import asyncio
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

from pydantic import BaseModel, ConfigDict, Field

from hildalib import HildaError, book, params, paths
from hildalib.serving.guard import Refused

KEPT, LINES = 20, 500  # finished jobs, and lines of each, that are remembered
GRACE_SECONDS = 10  # between asking a run to stop and stopping it


class Order(BaseModel):
    """A run that is asked for: the arguments of `hilda run`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    notebooks: list[str] = Field(min_length=1, max_length=32)
    profile: str
    seeds: list[int] = Field(default_factory=list, max_length=16)
    set: dict[str, bool | int | float | str | list] = Field(default_factory=dict)
    force: bool = False

    def command(self) -> list[str]:
        """The checked command; HildaError where a name or a value is wrong, Refused where a value is free text."""
        base, *overlays = self.profile.split("+")
        for kind, name, known in (("profile", base, params.profiles()), *(("overlay", name, params.overlays()) for name in overlays)):
            if name not in known:
                raise HildaError(f"unknown {kind} {name!r}; {params.nearest(name, known)}")
        if any(seed < 0 for seed in self.seeds):
            raise HildaError("seeds must be at least 0")
        jobs = book.plan(book.Book(), self.notebooks, self.profile, self.set, self.seeds or None)
        for job in jobs:
            declared = {entry.name: entry for entry in dataclasses.fields(job.book.records[job.notebook])}
            for key in self.set:
                leaves = [self.set[key]]
                while any(isinstance(leaf, list) for leaf in leaves):
                    leaves = [part for leaf in leaves for part in (leaf if isinstance(leaf, list) else [leaf])]
                free = key in declared and declared[key].metadata["choices"] is None
                if free and any(isinstance(leaf, str) for leaf in leaves):
                    raise Refused(422, f"set.{key}: text is taken over HTTP only where a parameter has a list of choices; use `hilda run`",
                                  "free_text", key)
        seeds = ["--seeds", *map(str, self.seeds)] if self.seeds else []
        values = [part for key, value in self.set.items() for part in ("--set", f"{key}={json.dumps(value)}")]  # JSON is YAML
        force = ["--force"] if self.force else []
        return [sys.executable, "-m", "hildalib", "run", *self.notebooks, "--profile", self.profile, *seeds, *values, *force]


class Job:
    """One run. state: running, done, failed or stopped."""

    def __init__(self, number: int, order: Order, command: list[str]):
        self.number, self.order, self.stopping = number, order, False
        self.started, self.ended = _now(), None
        self.lines, self.count = deque(maxlen=LINES), 0  # (number, line) of the last ones; lines ever written
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))}
        self.process = subprocess.Popen(command, cwd=paths.ROOT, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=os.name == "posix")
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((self.count, line.rstrip("\n")[:2000]))
            self.count += 1
        self.process.wait()
        self.ended = _now()

    @property
    def state(self) -> str:
        if self.ended is None:
            return "running"
        return "done" if self.process.returncode == 0 else "stopped" if self.stopping else "failed"

    def facts(self) -> dict:
        return {"id": self.number, "state": self.state, "order": self.order.model_dump(), "started": self.started, "ended": self.ended,
                "status": self.process.poll(), "lines": self.count}

    def stop(self) -> None:
        """As Ctrl-C: kernels are stopped, what was finished stays; after a while without mercy."""
        if self.ended is None and not self.stopping:
            self.stopping = True
            self.process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
            threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        try:
            self.process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Jobs:
    """The jobs of a server."""

    def __init__(self):
        self.jobs: dict[int, Job] = {}
        self.lock = threading.Lock()

    def start(self, order: Order) -> Job:
        """Refused (409) while another one runs."""
        command = order.command()
        with self.lock:
            if running := [job.number for job in self.jobs.values() if job.ended is None]:
                raise Refused(409, f"job {running[0]} is running; wait for it, or stop it with DELETE /jobs/{running[0]}", "job_running")
            number = max(self.jobs, default=0) + 1
            self.jobs[number] = Job(number, order, command)
            for old in sorted(self.jobs)[:-KEPT]:
                del self.jobs[old]
            return self.jobs[number]

    def find(self, number: int) -> Job:
        """Refused (404) where there is none of that number."""
        if number not in self.jobs:
            raise Refused(404, f"there is no job {number}; GET /jobs lists them", "no_such_job")
        return self.jobs[number]

    def stop(self) -> None:
        """Stops what runs; called when the server ends."""
        for job in self.jobs.values():
            job.stop()
        end = time.monotonic() + GRACE_SECONDS
        while any(job.ended is None for job in self.jobs.values()) and time.monotonic() < end:
            time.sleep(0.05)


async def watch(job: Job):
    """NDJSON: a line {"line": ...} for each line of output, those of before first, and the job's facts at its end."""
    told = 0
    while True:
        ended = job.ended is not None  # asked first: what is written until then is told below
        for number, line in list(job.lines):
            if number >= told:
                told = number + 1
                yield json.dumps({"line": line}) + "\n"
        if ended:
            yield json.dumps(job.facts()) + "\n"
            return
        await asyncio.sleep(0.2)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
