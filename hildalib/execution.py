"""One notebook, executed: papermill in a kernel of its own, measured, and accepted only if every code cell completed.

Entry points: `execute(source, target, parameters, kernel) -> Measured`, `RunFailed` where the notebook did not reach its end,
`Kernel` to watch and stop it; `python -m hildalib.execution NOTEBOOK.ipynb ...` renews the committed outputs with smoke values.
`book.py` decides what is executed and what becomes of the result.
"""

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import nbformat.reader
import psutil
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import execute_notebook

from hildalib import HildaError, paths

KERNEL = "python3"
SAMPLE_SECONDS = 0.2  # between two looks at a kernel's memory and CPU time: short beside any training step that allocates
UNMOVED = re.compile(r"(?m)^.*\| +0/\d+ \[00:00<\?.*\n?")  # a bar at its first frame; of a bar that was a widget no other is kept
PROGRESS_LINES = 12  # of one training in the executed copy: enough to see its course; the losses themselves are in a figure
START_SECONDS = 180  # a loaded machine needs more than papermill's 60 s to start a kernel


class RunFailed(HildaError):
    """A notebook did not run to its end."""


@dataclass(frozen=True)
class Measured:
    """Cost of a run. cpu and peak_rss include the kernel's children and are sampled; cell_seconds has one entry a code cell."""
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    cell_seconds: list[float]


class Kernel:
    """The process behind a running notebook: which cell it is in, what it uses, and the means to stop it."""

    def __init__(self, on_cell: Callable[[int], None] = lambda number: None):
        self.cell, self.pid, self.stopped, self.peak = 0, None, False, 0
        self._on_cell, self._cpu, self._done = on_cell, {}, threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def cell_started(self, number: int, pid: int | None) -> None:
        """number: the cell's place in the source notebook, from 1."""
        if self.stopped:
            raise RunFailed("stopped")
        self.cell = number
        if self.pid is None and pid is not None:
            self.pid = pid
            self._sampler.start()
        self._on_cell(number)

    def stop(self) -> None:
        """Ends the kernel and its children at once; what a training step had saved stays."""
        self.stopped = True
        for process in self._family():
            try:
                process.kill()
            except psutil.Error:
                pass

    def finish(self) -> float:
        """CPU seconds that the kernel and its children have used."""
        self._done.set()
        if self._sampler.is_alive():
            self._sampler.join()
        return sum(self._cpu.values())

    def look(self) -> None:
        """Takes one sample of memory and CPU time."""
        resident = 0
        for process in self._family():
            try:
                resident += process.memory_info().rss
                times = process.cpu_times()
                self._cpu[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:  # it ended between the listing and the look
                pass
        self.peak = max(self.peak, resident)

    def _family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.pid) if self.pid else None
            return [parent, *parent.children(recursive=True)] if parent else []
        except psutil.Error:
            return []

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.look()


class _WatchedEngine(Engine):
    """papermill's own client, with the kernel's process id, environment and folder in our hands.

    papermill's `cwd` would change the folder of this process, which runs in other threads share.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, kernel, folder, environment, output, start_timeout, **_):
        client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=None,
                                         stdout_file=output, stderr_file=output,
                                         extra_arguments=["--log-level=ERROR"])  # else a warning about TCP at each start
        cells = nb_man.nb.cells
        added = next((i for i, cell in enumerate(cells) if "injected-parameters" in cell.metadata.get("tags", [])), len(cells))
        client.on_cell_start = lambda cell, cell_index: kernel.cell_started(
            cell_index + 1 - (cell_index >= added), getattr(client.km.provisioner, "pid", None))
        client.on_cell_executed = lambda **_: kernel.look()
        client.execute(cwd=str(folder), env=environment)


papermill_engines.register("hilda", _WatchedEngine)


def execute(source: Path, target: Path, parameters: dict, kernel: Kernel, *, output=None, threads: int | None = None) -> Measured:
    """Runs notebook `source` with `parameters`; `target` holds the executed copy, also that of a run that failed.

    output: a text file object that receives what cells print. threads: OMP_NUM_THREADS of the kernel. Raises RunFailed, naming the cell
    and its error, when a cell raises or exits, the kernel dies or cannot start.
    """
    environment = os.environ | {
        # Absolute, as the kernel works in another folder; and the same hildalib as ours, whichever copy is installed.
        "HILDA_OUTPUTS": str(paths.outputs_root()), "HILDA_FIGURES": str(paths.figures_root()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    started, failure = time.perf_counter(), None
    try:
        execute_notebook(str(source), str(target), parameters, engine_name="hilda", kernel_name=KERNEL, progress_bar=False,
                         start_timeout=START_SECONDS, kernel=kernel, folder=source.parent, environment=environment, output=output)
    except PapermillExecutionError as error:
        failure = f"{error.ename}: {error.evalue}"
    except RunFailed as error:
        failure = str(error)
    except Exception as error:  # a dead kernel, one that never started: whatever it was, this is no result
        failure = f"{type(error).__name__}: {error}"
    cpu = kernel.finish()
    wall = time.perf_counter() - started
    nb = _executed(target)
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if failure is None and not all(_completed(cell) for cell in code):
        failure = "the kernel was asked to exit before the last cell"
    seconds = [round(cell.metadata.get("papermill", {}).get("duration") or 0.0, 2) for cell in code]
    try:
        nbformat.write(compact(nb), target)
    except OSError as error:
        failure = failure or str(error)
    if failure is not None:
        failure += f"; {paths.MORE_SPACE}" if paths.disk_full(failure) else ""
        raise RunFailed(f"cell {kernel.cell} of {source.name}: {failure}" if kernel.cell else f"{source.name}: {failure}")
    return Measured(round(wall, 2), round(cpu, 2), kernel.peak, seconds)


def _executed(target: Path):
    """The executed copy as far as it could be written; empty where it could not."""
    try:
        return nbformat.read(target, as_version=4)
    except (OSError, nbformat.reader.NotJSONError):
        return nbformat.v4.new_notebook()


def _completed(cell) -> bool:
    """Both papermill's word and the kernel's count: after `sys.exit(0)` papermill alone would call the rest done."""
    return cell.metadata.get("papermill", {}).get("status") == "completed" and cell.execution_count is not None


def compact(nb):
    """`nb` without what only the machine of the run knows or needs: progress frames, widget state, timings, absolute paths."""
    nb.metadata.pop("widgets", None)
    nb.metadata.pop("papermill", None)
    for cell in nb.cells:
        for key in ("papermill", "execution", *(["tags"] if not cell.metadata.get("tags") else [])):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs)
    return nb


def _tidy(outputs: list) -> list:
    """Outputs as a reader wants them: streams whole, each line as a terminal would show it at the end, long runs of progress thinned."""
    for output in outputs:
        if "data" in output:
            output.data.pop("application/vnd.jupyter.widget-view+json", None)
        if "text/plain" in output.get("data", {}):
            output.data["text/plain"] = _here(output.data["text/plain"])
        if output.output_type == "error":
            output.traceback = [_here(line) for line in output.traceback]
    outputs = _joined([output for output in outputs if not UNMOVED.search(output.get("data", {}).get("text/plain", ""))])
    for stream in (output for output in outputs if output.output_type == "stream"):
        text = re.sub(r"[^\n]*\r(?=[^\n])", "", stream.text.replace("\r\n", "\n")).replace("\r", "")
        stream.text = _here(UNMOVED.sub("", text))
    outputs = _joined([output for output in outputs if output.get("text") != "" and output.get("data") != {}])
    for stream in (output for output in outputs if output.output_type == "stream"):
        stream.text = _thinned(stream.text)
    return outputs


def _joined(outputs: list) -> list:
    """Outputs with neighbouring pieces of a stream in one."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def _thinned(text: str) -> str:
    """`text` with at most PROGRESS_LINES training lines of one title in a row, evenly spread, the first and the last among them."""
    kept = []
    for title, group in itertools.groupby(text.splitlines(keepends=True), lambda line: (re.match(r"(.+)  step \d+/\d+ .*  ETA ", line) or [None] * 2)[1]):
        lines = list(group)
        last = len(lines) - 1
        every = range(PROGRESS_LINES) if title and last >= PROGRESS_LINES else ()
        kept += [lines[round(n * last / (PROGRESS_LINES - 1))] for n in every] or lines
    return "".join(kept)


def _here(text: str) -> str:
    for folder, name in ((sys.prefix, "<python>"), (str(paths.ROOT), "<hilda>"), (str(Path.home()), "~")):
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


def refresh(path: Path) -> None:
    """Executes a notebook with its own defaults and puts the executed copy in its place; on failure it stays as it was."""
    target = path.with_suffix(".partial.ipynb")
    try:
        execute(path, target, {}, Kernel(), output=sys.stdout)
        os.replace(target, path)
    finally:
        target.unlink(missing_ok=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        refresh(Path(name).resolve())
