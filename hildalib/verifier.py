"""Whether two LaTeX answers are mathematically equal: the library math-verify (Apache-2.0), in worker processes that may hang or die.

What a model wrote decides how long sympy computes and how much memory it takes, so nothing is parsed in this process: answers go,
one JSON line each, to workers with a time and a memory limit; one that oversteps is killed and replaced. math-verify's own time
limits are off: they need the main thread and SIGALRM. Entry points: `equal` (many pairs, in order), `close`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil
from tqdm.auto import tqdm

from hildalib import HildaError, paths

WORKERS = min(4, os.cpu_count() or 1)  # 60 MB and 500 MATH answers in 5 s each: more would gain little
SECONDS = 5.0  # CPU time an answer: MATH answers need 0.01 s, the slowest of 500 takes 0.3 s
PATIENCE = 12  # times SECONDS of wall-clock time at the most: a busy machine must not turn right answers into wrong ones
START_SECONDS = 120.0  # a worker imports sympy in under a second; a cold disk or a busy machine may take long
MEMORY = 2**30  # bytes of address space a worker, where the platform can limit it (Linux)
_PROBE = (r"\frac{1}{2}", "0.5")  # a new worker must find these equal: a broken installation is an error, not a score of zero
_NUMBER = re.compile(r"Integer \([0-9]+ \)|Float \('[0-9]*\.?[0-9]*' \)")
_idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()


def equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """One truth value a pair (gold, answer) of LaTeX without delimiters, in order; True means mathematically equal.

    False for what cannot be parsed, takes more than `SECONDS` of computing (`PATIENCE` times that on the clock) or than `MEMORY`.
    The order within a pair matters: the form of the gold answer decides what is compared. Sums and products need not be worked
    out. Workers stay alive for the next call. HildaError if none can be started.
    """
    if not pairs:
        return []
    with ThreadPoolExecutor(min(WORKERS, len(pairs))) as threads:
        bar = tqdm(threads.map(_judge, pairs), total=len(pairs), desc="math-verify", unit="answer", leave=False, disable=None, delay=2)
        return list(bar)


def close() -> None:
    """Ends the idle workers; the next `equal` starts new ones."""
    with contextlib.suppress(queue.Empty):
        while True:
            _end(_idle.get_nowait())


atexit.register(close)


def _judge(pair: tuple[str, str]) -> bool:
    worker = _take()
    reply = _ask(worker, pair, SECONDS, PATIENCE)
    if reply is None:
        _end(worker)
    else:
        _idle.put(worker)
    return reply is True


def _take() -> subprocess.Popen:
    """A worker that is alive: an idle one, or a new one."""
    with contextlib.suppress(queue.Empty):
        while True:
            worker = _idle.get_nowait()
            if worker.poll() is None:
                return worker
            _end(worker)
    path = os.pathsep.join(filter(None, (str(paths.ROOT), os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen([sys.executable, "-P", "-m", "hildalib.verifier"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, encoding="utf-8", env=os.environ | {"PYTHONPATH": path})
    reply = _ask(worker, _PROBE, START_SECONDS, 1)
    if reply is not True:
        _end(worker)
        raise HildaError(f"the checker of mathematical answers does not work ({reply or 'it does not start'}); "
                         "install it with: pip install 'math-verify[antlr4-13-2]'")
    return worker


def _ask(worker: subprocess.Popen, pair: tuple[str, str], seconds: float, patience: int) -> bool | str | None:
    """The worker's reply: whether the pair is equal, or why it cannot work; None if it died or was killed for its time."""
    done, overdue = threading.Event(), threading.Event()
    watch = threading.Thread(target=_watch, args=(worker, done, overdue, seconds, patience), daemon=True)
    watch.start()
    reply = None
    with contextlib.suppress(OSError, ValueError):  # a dead worker: broken pipe, or an empty line
        worker.stdin.write(json.dumps(pair) + "\n")
        worker.stdin.flush()
        reply = json.loads(worker.stdout.readline())
    done.set()
    watch.join()
    return None if overdue.is_set() else reply


def _watch(worker: subprocess.Popen, done: threading.Event, overdue: threading.Event, seconds: float, patience: int) -> None:
    """Kills the worker when it has computed for `seconds`, at the latest after `patience` times that on the clock."""
    before = _cpu_seconds(worker)
    for _ in range(patience):
        if done.wait(seconds):
            return
        if _cpu_seconds(worker) - before > seconds / 2:  # half: a core that is shared with one other process
            break
    overdue.set()
    worker.kill()


def _cpu_seconds(worker: subprocess.Popen) -> float:
    try:
        return sum(psutil.Process(worker.pid).cpu_times()[:2])
    except psutil.Error:  # it has just died
        return 0.0


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    with contextlib.suppress(OSError), worker:  # what it never read cannot be flushed
        pass


# ---- in the worker --------------------------------------------------------------------------------------------------------------

def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on Windows, and not everywhere on macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _evaluate_numbers_only() -> None:
    """sympy reads number strings with Python's eval. From here on it does so for plain numbers, and refuses all other text."""
    import sympy.physics.units  # noqa: F401  evaluates names of its own when `simplify` first imports it
    from sympy.parsing import sympy_parser

    evaluate = sympy_parser.eval_expr

    def guarded(code, *arguments):
        if not (isinstance(code, str) and _NUMBER.fullmatch(code)):
            raise ValueError("text is not evaluated")
        return evaluate(code, *arguments)

    sympy_parser.eval_expr = guarded


def _checker():
    """(gold, answer) -> bool, with every import done."""
    from math_verify import LatexExtractionConfig, parse, verify

    _evaluate_numbers_only()
    found = [LatexExtractionConfig()]  # LaTeX only: the other extraction evaluates text

    def check(gold: str, answer: str) -> bool:
        one, other = (parse(rf"\boxed{{{text}}}", found, parsing_timeout=None) for text in (gold, answer))
        return verify(one, other, timeout_seconds=None)

    return check


def _serve() -> None:
    """Reads a JSON pair a line; writes true or false, or a string and ends if it cannot work at all."""
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is not a reply
    logging.disable(logging.CRITICAL)
    _limit_memory()
    try:
        check = _checker()
    except Exception as error:  # whatever the installation lacks, the parent reports it
        print(json.dumps(f"{type(error).__name__}: {error}"), file=replies, flush=True)
        return
    for line in sys.stdin:
        faulthandler.dump_traceback_later(2 * PATIENCE * SECONDS, exit=True)  # ends it even if the parent that should kill it is gone
        try:
            reply = bool(check(*json.loads(line)))
        except Exception:  # also too deep (RecursionError) and too big (MemoryError)
            reply = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
