"""Runs model-written Python, contained, and judges it by tests that it can neither see nor influence.

Two processes (see `containment`): the candidate executes the code; the judge executes the tests, calls the candidate through a pipe
and alone has the verdict, its exit status. Each has no privileges, no network, no new process or thread, no signal to others, no file
but the standard library (read-only) and an empty working folder that goes with it; CPU, wall time, memory, output and disk are bounded.
NOT contained: bugs of the Linux kernel; timing and cache side channels; time, host name, ids and load of the machine can be read; with
Landlock alone also whether a path exists and its size, and a burst of some 100 MB may pass before the disk bound. A candidate that
recognises the arguments of a test may answer from memory. Entry points: `run`, `run_many`, `available`, `Result`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from hildalib import HildaError, containment

LAYERS = ("namespaces", "landlock")  # what keeps files away; one that works is enough, both are used where both work
UNSAFE = "HILDA_ALLOW_UNSAFE_CODE"
WALL_FACTOR = 3  # wall seconds for each CPU second: on a busy machine a process waits longer than it computes
OUTPUT_BYTES, FILE_BYTES, DISK_BYTES = 1 << 20, 1 << 20, 16 << 20  # no benchmark here prints or writes a hundredth of it
TICK = 0.1  # seconds between two looks at the disk space
_SCRIPT = Path(containment.__file__).resolve()


@dataclass(frozen=True)
class Result:
    """ok: True if the code loaded and every test passed. output: what the candidate printed. reason: "passed", or why not.
    seconds: wall time."""

    ok: bool
    output: str
    reason: str
    seconds: float


class _Drain(threading.Thread):
    """Reads a process' output; ends the process when it prints more than OUTPUT_BYTES."""

    def __init__(self, process: subprocess.Popen):
        super().__init__(daemon=True)
        self.process, self.data, self.spilt = process, b"", False
        self.start()

    def run(self) -> None:
        while part := os.read(self.process.stderr.fileno(), 1 << 16):
            self.data += part
            if len(self.data) > OUTPUT_BYTES:
                self.data, self.spilt = self.data[:OUTPUT_BYTES], True
                self.process.kill()
                return

    def text(self) -> str:
        self.join(1.0)  # at once, but for an uncontained candidate that left a process behind
        return self.data.decode("utf-8", "replace")


def _start(role: str, root: Path, contained: bool, limits: dict[str, int], reader: int, writer: int) -> subprocess.Popen:
    (root / role).mkdir()
    settings = {"role": role, "root": str(root / role), "contained": contained, "layers": list(LAYERS), "limits": limits}
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}  # without them Python may not start
    # A fixed hash seed, so that the same code gets the same verdict. -S: nothing but the standard library; -P: nothing from next to the script.
    return subprocess.Popen([sys.executable, "-s", "-S", "-P", "-B", "-u", "-X", "utf8", str(_SCRIPT), json.dumps(settings)], stdin=reader,
                            stdout=writer, stderr=subprocess.PIPE, env={**kept, "PYTHONHASHSEED": "0"}, start_new_session=os.name == "posix")


def _end(process: subprocess.Popen) -> None:
    """Kills the process and, where it was uncontained, what it left in its session."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):  # a file may go while it is looked at
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder))
    return 0


def _execute(task: dict, seconds: float, memory_mb: int, contained: bool) -> Result:
    """One candidate and its judge. HildaError if either could not be contained: then nothing was executed."""
    limits = {"cpu": math.ceil(seconds), "memory": memory_mb << 20, "file": FILE_BYTES, "disk": DISK_BYTES}
    began, processes, late = time.monotonic(), [], ""
    pipes = answers_in, answers_out, calls_in, calls_out = *os.pipe(), *os.pipe()
    with tempfile.TemporaryDirectory(prefix="hilda-sandbox-", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve()
        try:
            judge = _start("judge", root, contained, limits, answers_in, calls_out)
            processes.append(judge)
            heard = _Drain(judge)
            os.close(answers_in)
            with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(answers_out), "wb") as writer:  # first, so that it lies before any answer
                writer.write(json.dumps(task).encode() + b"\n")
            candidate = _start("candidate", root, contained, limits, calls_in, answers_out)
            processes.append(candidate)
            printed = _Drain(candidate)
            for pipe in (answers_out, calls_in, calls_out):
                os.close(pipe)
            pipes = ()
            while not late:
                heard.join(TICK)  # its end is the judge's end
                if judge.poll() is not None:
                    break
                if time.monotonic() - began > WALL_FACTOR * seconds:
                    late = f"no verdict within {WALL_FACTOR * seconds:g} s"
                elif _size(root / "candidate") > DISK_BYTES:
                    late = f"wrote more than {DISK_BYTES >> 20} MB"
        finally:
            for process in processes:
                _end(process)
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    os.close(pipe)
        output, reason = printed.text(), heard.text().strip()
    if not late and judge.returncode in (containment.REFUSED, containment.NOT_READY):
        raise HildaError(f"the sandbox did not start: {reason or output.strip() or 'no reason given'}; {_remedy()}")
    ok = judge.returncode == containment.PASSED and not late
    if printed.spilt and not ok:
        late = f"printed more than {OUTPUT_BYTES >> 20} MB"
    return Result(ok, output, "passed" if ok else late or reason or "the judge ended", time.monotonic() - began)


_HOSTILE = """
import ctypes, os, socket, subprocess, threading

def reached(folder, pid):
    def write(): open(folder + "/new", "w")
    def local(): open("own", "w").write("1"); os.remove("own"); raise OSError
    acts = {"read": lambda: open(folder + "/kept").read(), "write": write, "delete": lambda: os.remove(folder + "/kept"), "socket": socket.socket,
            "fork": lambda: os.fork() or os._exit(0), "signal": lambda: os.kill(pid, 0), "program": lambda: subprocess.run(["/bin/true"]),
            "/proc": lambda: open("/proc/%d/environ" % pid, "rb"), "thread": lambda: threading.Thread(target=int).start(), "local": local}
    found = []
    for name, act in acts.items():
        try:
            act()
            found.append(name)
        except (OSError, RuntimeError):
            pass
    return found
"""


@functools.cache
def _probe() -> tuple[bool, str]:
    """Tries, contained, what must fail, and looks whether it did."""
    with tempfile.TemporaryDirectory(prefix="hilda-probe-") as folder:
        (Path(folder) / "kept").write_text("kept", encoding="utf-8")
        tests = f"found = reached({folder!r}, {os.getpid()})\nassert not found, found"
        try:
            result = _execute({"code": _HOSTILE, "tests": tests, "names": ["reached"], "setup": ""}, 10.0, 256, contained=True)
        except HildaError as error:
            return False, str(error).partition("; " + _remedy())[0]
        if os.listdir(folder) != ["kept"]:
            return False, "a contained process changed a file outside"
    return result.ok, "" if result.ok else f"the trial of the containment failed: {result.reason}"


def available() -> tuple[bool, str]:
    """(True, "") if code can be contained here, found out once by trying; else (False, why)."""
    return _probe()


def _remedy() -> str:
    return ("use Linux on x86_64 or aarch64 with user namespaces or Landlock (6.2 or later), or, only for code that you trust, "
            f"allow_uncontained=True or {UNSAFE}=1")


def _check(allow_uncontained: bool) -> bool:
    """True: contained. False: uncontained, which was asked for. HildaError: neither."""
    contained, why = available()
    if contained:
        return True
    if allow_uncontained or os.environ.get(UNSAFE) == "1":
        return False
    raise HildaError(f"model-written code is not run, since it cannot be contained here: {why}; {_remedy()}")


def run(code: str, tests: str = "", names: Sequence[str] = (), *, setup: str = "", seconds: float = 10.0, memory_mb: int = 256,
        allow_uncontained: bool = False) -> Result:
    """Loads `code` as a module and executes `tests`, in which `names` are that module's functions and classes.

    tests, setup: trusted Python of the benchmark; setup comes before the names, which then hide its own. Arguments and results pass by
    value (None, numbers, text, bytes, containers; a subclass as its base), other objects as handles that can be called, iterated and
    have attributes. Without tests, ok says only that the code itself reports having loaded. Only the standard library can be imported.
    seconds: CPU seconds of each process, rounded up (the slowest gold program of MBPP needs 4); wall time is bounded by WALL_FACTOR times
    as many. memory_mb: of each process, in MiB of address space. allow_uncontained: where `available()` is False run all the same, in a
    folder of its own but with nothing bounded except wall time and output.
    HildaError: not available and not allowed, or the sandbox does not start.
    """
    contained = _check(allow_uncontained)
    task = {"code": code, "tests": tests, "names": list(names), "setup": setup}
    if len(json.dumps(task)) >= containment.LINE:
        return Result(False, "", f"more than {containment.LINE >> 20} MB of code", 0.0)
    return _execute(task, seconds, memory_mb, contained)


def run_many(jobs: Sequence[dict], *, workers: int | None = None, label: str = "sandbox") -> list[Result]:
    """`run(**job)` for each job, in order, `workers` at once (None: one a core), with a progress bar. HildaError as in `run`."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(tqdm(pool.map(lambda job: run(**job), jobs), total=len(jobs), desc=label, unit="program", disable=None))
