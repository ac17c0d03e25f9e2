"""The runner of the book: validates, executes what changed with papermill, accepts or refuses each run, stamps what it accepts.

Entry points: `run` and `status`; `CHAIN` says once which notebook needs which. A run is accepted only if the kernel reached the last
cell and the promised files are there; only then do `<notebook>.ipynb` and `stamp.json` appear. Everything else leaves
`<notebook>.partial.ipynb` to read and `unfinished.json`, from which a rerun knows whether it continues or starts afresh.
"""

import contextlib
import dataclasses
import datetime
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
from filelock import FileLock, Timeout

from hildalib import HildaError, params, paths, stamps
from hildalib.progress import Progress, duration

CHAIN: dict[str, tuple[str, ...]] = {
    "01_data": (), "02_wsd": ("01_data",), "03_sft": ("02_wsd",), "04_decode": ("03_sft",), "05_benchmarks": ("03_sft", "04_decode"),
    "06_rl": ("02_wsd", "03_sft"), "07_residual": ("03_sft",), "08_search": ("03_sft", "04_decode"), "09_speed": ("04_decode", "07_residual")}
PROMISED = ("metrics.json",)  # what every notebook writes into its output folder


@dataclass(frozen=True)
class Book:
    """Which notebooks there are, what each needs and takes. chain is in running order."""
    notebooks: Path = paths.notebooks()
    params: Path = paths.params()
    library: Path = paths.ROOT / "hildalib"
    chain: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: CHAIN)
    records: Mapping[str, type] = dataclasses.field(default_factory=lambda: params.RECORDS)

    def source(self, notebook: str) -> Path:
        return self.notebooks / f"{notebook}.ipynb"

    def upstream(self, notebook: str) -> list[str]:
        """All that `notebook` needs, directly or not, in running order."""
        needed = {name for direct in self.chain[notebook] for name in (direct, *self.upstream(direct))}
        return [name for name in self.chain if name in needed]


@dataclass(frozen=True)
class Job:
    """One notebook with one set of checked parameters."""
    book: Book
    notebook: str
    parameters: dict

    @property
    def profile(self) -> str:
        return self.parameters["profile"]

    @property
    def name(self) -> str:
        return self.notebook + (f" seed {self.parameters['seed']}" if self.parameters["seed"] else "")

    @property
    def folder(self) -> Path:
        return paths.output_dir(self.profile, self.notebook, self.parameters["seed"], create=False)

    def beside(self, notebook: str) -> Path:
        """Output folder of another notebook of the same profile and seed."""
        return paths.output_dir(self.profile, notebook, self.parameters["seed"], create=False)

    def inputs(self) -> dict:
        upstream = {name: (stamps.read(self.beside(name) / stamps.STAMP) or {}).get("digest", "missing")
                    for name in self.book.chain[self.notebook]}
        return stamps.inputs(self.book.source(self.notebook), self.parameters, upstream, self.book.library)

    def state(self) -> tuple[str, str]:
        """("up to date" | "stale" | "failed" | "missing", why)."""
        stamp = stamps.read(self.folder / stamps.STAMP)
        if stamp is None:
            return ("failed", "did not finish") if (self.folder / stamps.UNFINISHED).is_file() else ("missing", "never run")
        lost = stamps.lost(self.folder, stamp.get("artefacts", {}))
        if lost:
            return "stale", f"lost {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
        changed = stamps.differences(stamp.get("inputs", {}), self.inputs())
        return ("stale", f"changed: {changed}") if changed else ("up to date", "")


def plan(book: Book, notebooks: Sequence[str] = (), profile: str = "nano", overrides: Mapping | None = None,
         seeds: Sequence[int] | None = None) -> list[Job]:
    """Jobs in running order, every parameter checked; without names, the notebooks that the profile has a file for.

    An override goes to each chosen notebook that has the key, and must fit one.
    """
    for name in notebooks:
        if name not in book.chain:
            raise HildaError(f"unknown notebook {name!r}; {params.nearest(name, book.chain)}")
    chosen = [name for name in book.chain if name in notebooks] or params.covered(book.chain, profile, book.params)
    overrides = dict(overrides or {})
    if seeds and "seed" in overrides:
        raise HildaError("--set seed and --seeds both name seeds; use one of the two")
    keys = {name: {entry.name for entry in dataclasses.fields(book.records[name])} for name in chosen}
    for key in overrides:
        if not any(key in own for own in keys.values()):
            known = sorted(set().union(*keys.values()))
            raise HildaError(f"--set: unknown parameter {key!r} of {', '.join(chosen)}; {params.nearest(key, known)}")
    jobs = []
    for seed in dict.fromkeys(seeds or [None]):
        for name in chosen:
            own = {key: value for key, value in overrides.items() if key in keys[name]} | ({} if seed is None else {"seed": seed})
            jobs.append(Job(book, name, params.load(name, profile, own, record=book.records[name], folder=book.params)))
    return jobs


def _check_sources(book: Book, jobs: list[Job]) -> None:
    """The notebook is there and its parameters cell is the record's; else papermill would warn at most, and run the defaults."""
    for name in dict.fromkeys(job.notebook for job in jobs):
        source = book.source(name)
        if not source.is_file():
            raise HildaError(f"{source} does not exist; `jupytext --to ipynb {source.with_suffix('.py').name}` makes it from its text")
        try:
            mismatch = params.cell_mismatch(nbformat.read(source, as_version=4), book.records[name])
        except HildaError as error:
            raise HildaError(f"{source}: {error}") from None
        if mismatch:
            raise HildaError(f"{source}: parameters cell and record in params.py disagree: {'; '.join(mismatch)}")


def _check_upstream(jobs: list[Job]) -> None:
    chosen = {(job.notebook, job.parameters["seed"]) for job in jobs}
    for job in jobs:
        seed = job.parameters["seed"]
        outside = [name for name in job.book.upstream(job.notebook) if (name, seed) not in chosen]
        stamp = {name: stamps.read(job.beside(name) / stamps.STAMP) for name in outside}
        gone = [name for name in outside if stamp[name] is None or stamps.lost(job.beside(name), stamp[name].get("artefacts", {}))]
        if gone:
            command = f"hilda run {' '.join(gone)} --profile {job.profile}" + (f" --seeds {seed}" if seed else "")
            raise HildaError(f"{job.name} needs the results of {', '.join(gone)}, which are not in {job.folder.parent}; first: {command}")


def ready(jobs: list[Job]) -> None:
    """HildaError unless the notebooks of `jobs` are there, with parameters cells like their records, and all results that they need."""
    _check_sources(jobs[0].book, jobs)
    _check_upstream(jobs)


@contextlib.contextmanager
def lock(profile: str) -> Iterator[None]:
    """One run at a time in outputs/<profile>. The system frees the lock when its holder ends, however it ends."""
    folder = paths.outputs_root() / profile
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "run.pid"
    try:
        with FileLock(folder / "run.lock", timeout=0):
            holder.write_text(str(os.getpid()), encoding="utf-8")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout:
        pid = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
        raise HildaError(f"another run (process {pid}) is writing {folder}; wait for it, stop it, or use another --profile") from None


def _busy(profile: str) -> bool:
    try:
        with lock(profile):
            return False
    except HildaError:
        return True


def begin(job: Job, inputs: dict, force: bool) -> None:
    """Clears what could be mistaken for the result of this run.

    Checkpoints survive only where the last run of the same cells, parameters and upstream did not finish: then it is continued.
    """
    before = stamps.read(job.folder / stamps.UNFINISHED)
    same = before is not None and not force and not (job.folder / stamps.STAMP).is_file() and all(
        before["inputs"][key] == inputs[key] for key in ("cells", "parameters", "upstream"))
    if not same:
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    expected = expected_seconds(job)
    stamps.write(job.folder / stamps.UNFINISHED, {"inputs": inputs, "wall_seconds": expected})
    for name in (stamps.STAMP, f"{job.notebook}.ipynb", f"{job.notebook}.partial.ipynb", *PROMISED):
        (job.folder / name).unlink(missing_ok=True)


def expected_seconds(job: Job) -> float | None:
    """Wall seconds of the last finished run, else of another seed's; None where there was none."""
    profile = paths.outputs_root() / job.profile
    others = [profile / job.notebook / stamps.STAMP, *sorted(profile.glob(f"seed*/{job.notebook}/{stamps.STAMP}"))]
    records = map(stamps.read, (job.folder / stamps.STAMP, job.folder / stamps.UNFINISHED, *others))
    return next((record["wall_seconds"] for record in records if record and record.get("wall_seconds")), None)


def run_one(job: Job, kernel, *, output=None, threads: int | None = None, force: bool = False) -> dict:
    """Executes one job and returns its stamp. RunFailed (execution.py) where it is not accepted; then no stamp is left."""
    from hildalib.execution import RunFailed, execute

    inputs, begun = job.inputs(), datetime.datetime.now(datetime.timezone.utc)
    begin(job, inputs, force)
    partial = job.folder / f"{job.notebook}.partial.ipynb"
    try:
        measured = execute(job.book.source(job.notebook), partial, job.parameters, kernel, output=output, threads=threads)
        for name in PROMISED:
            if stamps.read(job.folder / name) is None:
                raise RunFailed(f"{job.notebook} ended without a readable {name} in {job.folder}")
    except RunFailed as error:
        raise RunFailed(f"{error}\n  executed copy: {partial}") from None
    kept = stamps.artefacts(job.folder)
    device = (stamps.read(job.folder / PROMISED[0]) or {}).get("device")
    stamp = {"notebook": job.notebook, "profile": job.profile, "seed": job.parameters["seed"], "inputs": inputs, "artefacts": kept,
             "digest": stamps.digest(kept), "device": device, "started": begun.isoformat(timespec="seconds"),
             "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
             **dataclasses.asdict(measured), **stamps.environment()}
    os.replace(partial, partial.with_name(f"{job.notebook}.ipynb"))
    stamps.write(job.folder / stamps.STAMP, stamp)
    (job.folder / stamps.UNFINISHED).unlink(missing_ok=True)
    return stamp


def run(notebooks: Sequence[str] = (), profile: str = "nano", overrides: Mapping | None = None, *, force: bool = False, jobs: int = 1,
        seeds: Sequence[int] | None = None, book: Book | None = None) -> int:
    """Brings the chosen notebooks (default: all) up to date. Returns 0, or 1 if one failed; what does not depend on it still runs.

    jobs: notebooks at a time. Raises HildaError before any kernel starts on a wrong parameter, absent upstream results, or a
    second run in the same profile; KeyboardInterrupt after stopping the kernels.
    """
    if jobs < 1:
        raise HildaError(f"--jobs {jobs}: must be at least 1")
    todo = plan(book or Book(), notebooks, profile, overrides, seeds)
    ready(todo)
    with lock(profile):
        return _schedule(todo, jobs, force)


def _schedule(todo: list[Job], at_once: int, force: bool) -> int:
    from hildalib.execution import Kernel, RunFailed

    total, failed, settled, kernels = len(todo), set(), set(), {}
    waiting = {(job.notebook, job.parameters["seed"]): job for job in todo}
    threads = max(1, (psutil.cpu_count(logical=False) or 1) // at_once) if at_once > 1 else None
    with Progress(total, {job.name: expected_seconds(job) for job in todo}, at_once) as progress, ThreadPoolExecutor(at_once) as pool:
        running = {}
        try:
            while waiting or running:
                for key, job in list(waiting.items()):
                    needs = {(name, key[1]) for name in job.book.upstream(job.notebook)}
                    if needs & failed:
                        progress.skip(job.name, "skipped: something it needs failed")
                        failed.add(key)
                    elif needs & ({*waiting} | {*running.values()}) or len(running) >= at_once:
                        continue
                    elif not force and job.state()[0] == "up to date":
                        progress.skip(job.name, "up to date")
                    else:
                        progress.start(job.name, job.state()[1] or "forced", len(nbformat.read(job.book.source(job.notebook), as_version=4).cells))
                        kernels[key] = Kernel(lambda cell, name=job.name: progress.cell(name, cell))
                        future = pool.submit(run_one, job, kernels[key], output=progress.stream(job.name), threads=threads, force=force)
                        running[future] = key
                    del waiting[key]
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED) if running else ((), ())
                progress.tick()
                for future in done:
                    key = running.pop(future)
                    name = next(job.name for job in todo if (job.notebook, job.parameters["seed"]) == key)
                    try:
                        stamp = future.result()
                        progress.end(name, f"done in {duration(stamp['wall_seconds'])}, peak {stamp['peak_rss_bytes'] / 2**20:.0f} MiB")
                    except RunFailed as error:
                        failed.add(key)
                        progress.end(name, f"FAILED: {error}", error=True)
        except BaseException:
            for kernel in kernels.values():
                kernel.stop()
            raise
    return 1 if failed else 0


def status(profile: str | None = None, book: Book | None = None) -> list[dict]:
    """A row for each notebook, profile and seed that has a parameter set: its state, why, wall seconds and when it finished."""
    book, rows = book or Book(), []
    for name in [profile] if profile else params.profiles(book.params):
        found = [int(path.name[4:]) for path in (paths.outputs_root() / name).glob("seed*") if path.name[4:].isdigit()]
        busy = (paths.outputs_root() / name / "run.lock").is_file() and _busy(name)
        for seed in [0, *sorted(found)]:
            outdated = set()
            for notebook in params.covered(book.chain, name, book.params):
                row = {"notebook": notebook, "profile": name, "seed": seed}
                try:
                    job = plan(book, [notebook], name, {"seed": seed})[0]
                    if not book.source(notebook).is_file():
                        raise HildaError("no notebook")
                    state, why = job.state()
                except HildaError as error:
                    rows.append(row | {"state": "invalid", "why": str(error), "wall": None, "finished": None})
                    continue
                behind = [up for up in book.chain[notebook] if up in outdated]
                if behind and state == "up to date":
                    state, why = "stale", f"{behind[0]} will run again"
                if state == "failed" and busy:
                    state, why = "running", ""
                if state != "up to date":
                    outdated.add(notebook)
                stamp = stamps.read(job.folder / stamps.STAMP) or {}
                rows.append(row | {"state": state, "why": why, "wall": stamp.get("wall_seconds"), "finished": stamp.get("finished")})
    return rows
