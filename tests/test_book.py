"""The runner: which runs are accepted, what is repeated, what is refused before a kernel starts. Kernels are real, notebooks tiny."""

import json
import multiprocessing
import os
import shutil
import subprocess
import threading

import nbformat
import pandas as pd
import pytest

from hildalib import HildaError, artefacts, book, execution, params, paths, progress, stamps
from hildalib.execution import Kernel, compact
from hildalib.records import Common, field


@params.dataclasses.dataclass(frozen=True, kw_only=True)
class Record(Common):
    steps: int = field(1, "steps", low=1)


METRICS = "import json\nfrom hildalib import paths\nout = paths.output_dir(profile, {name!r}, seed)\n(out / 'metrics.json').write_text(json.dumps({{'steps': steps, 'device': 'cpu'}}))"


@pytest.fixture
def made(tmp_path):
    """A book of two notebooks, a then b; `write(name, *cells)` replaces a notebook, whose last cell writes its metrics."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    library = tmp_path / "hildalib"
    library.mkdir()
    (library / "__init__.py").write_text("", encoding="utf-8")
    (library / "paths.py").write_text("", encoding="utf-8")

    def write(name, *cells, metrics=True):
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
        nb.cells = [nbformat.v4.new_markdown_cell("# words"),
                    nbformat.v4.new_code_cell("profile = 'smoke'\nseed = 0\nsteps = 1", metadata={"tags": ["parameters"]}),
                    *map(nbformat.v4.new_code_cell, cells)]
        nb.cells += [nbformat.v4.new_code_cell(METRICS.format(name=name))] if metrics else []
        nbformat.write(nb, folder / f"{name}.ipynb")

    write("a")
    write("b")
    made = book.Book(notebooks=folder, params=tmp_path / "params", library=library, chain={"a": (), "b": ("a",)}, records={"a": Record, "b": Record})
    (tmp_path / "params").mkdir()
    return made, write


def output(name, *more):
    return paths.output_dir("smoke", name, create=False).joinpath(*more)


def finished_looking(name):
    return [file for file in (f"{name}.ipynb", "stamp.json", "metrics.json") if output(name, file).exists()]


def states(made):
    return {row["notebook"]: row["state"] for row in book.status("smoke", made)}


def test_a_rerun_does_only_what_changed(made, capsys):
    made, write = made
    assert states(made) == {"a": "missing", "b": "missing"}
    assert book.run((), "smoke", book=made) == 0
    stamp = stamps.read(output("b", "stamp.json"))
    assert stamp["wall_seconds"] > 0 and stamp["cpu_seconds"] > 0 and stamp["peak_rss_bytes"] > 2**20 and stamp["device"] == "cpu"
    assert stamp["inputs"]["upstream"] == {"a": stamps.read(output("a", "stamp.json"))["digest"]} and stamp["inputs"]["parameters"]["steps"] == 1
    assert list(stamp["artefacts"]) == ["metrics.json"] and not output("b", "unfinished.json").exists()
    capsys.readouterr()

    assert book.run((), "smoke", book=made) == 0
    assert capsys.readouterr().out.count("up to date") == 2
    assert stamps.read(output("b", "stamp.json")) == stamp

    write("b", "1 + 1")
    assert states(made) == {"a": "up to date", "b": "stale"}
    assert book.run((), "smoke", book=made) == 0
    shown = capsys.readouterr().out
    assert "a: up to date" in shown and "b: running (changed: cells)" in shown

    (made.library / "paths.py").write_text("changed = True\n", encoding="utf-8")
    (made.library / "other.py").write_text("", encoding="utf-8")
    assert [row["why"] for row in book.status("smoke", made)] == ["changed: modules hildalib.paths"] * 2
    (made.library / "paths.py").write_text("", encoding="utf-8")
    assert states(made) == {"a": "up to date", "b": "up to date"}
    output("a", "metrics.json").unlink()
    assert states(made) == {"a": "stale", "b": "stale"}


def test_a_changed_result_upstream_reruns_what_needs_it(made, capsys):
    made, write = made
    assert book.run((), "smoke", book=made) == 0
    assert book.run(["a"], "smoke", {"steps": "2"}, book=made) == 0
    assert states(made)["b"] == "stale"  # its own inputs are as before; what a wrote is not
    capsys.readouterr()
    assert book.run(["b"], "smoke", book=made) == 0
    assert "b: running (changed: upstream a)" in capsys.readouterr().out


@pytest.mark.parametrize("cells, message", [
    (["print('before')", "raise ValueError('spilled')", "1"], "cell 4 of a.ipynb: ValueError: spilled"),
    (["import sys", "sys.exit(0)", "1"], "cell 4 of a.ipynb: the kernel was asked to exit"),
    (["import os", "os._exit(0)", "1"], "cell 4 of a.ipynb: DeadKernelError"),
])
def test_a_run_that_does_not_reach_its_end_is_no_result(made, capsys, cells, message):
    made, write = made
    output("a").mkdir(parents=True)
    for file in ("a.ipynb", "metrics.json"):
        output("a", file).write_text("{}", encoding="utf-8")  # from an earlier run: must not pass for the result of this one
    write("a", *cells)
    assert book.run((), "smoke", book=made) == 1
    shown = capsys.readouterr()
    assert message in shown.err and str(output("a", "a.partial.ipynb")) in shown.err and "b: skipped" in shown.out
    assert finished_looking("a") == [] and output("a", "a.partial.ipynb").is_file()
    assert states(made) == {"a": "failed", "b": "missing"}


def test_without_the_promised_artefact_a_run_is_refused(made, capsys):
    made, write = made
    write("a", "2 + 2", metrics=False)
    assert book.run(["a"], "smoke", book=made) == 1
    assert "without a readable metrics.json" in capsys.readouterr().err and finished_looking("a") == []


KEEP = "from hildalib import paths\nstate = paths.checkpoint_dir(profile, 'a', seed) / 'state'\nprint('found' if state.exists() else 'fresh')\nstate.write_text('x')"


def test_checkpoints_survive_an_interrupted_run_and_nothing_else(made, capsys):
    made, write = made

    def run(*arguments, **keywords):
        code = book.run(["a"], "smoke", *arguments, book=made, **keywords)
        shown = capsys.readouterr().out
        return code, [word for word in ("found", "fresh") if f"  {word}\n" in shown]

    write("a", KEEP, "if not (state.parent / 'second').exists():\n    (state.parent / 'second').write_text('')\n    raise KeyboardInterrupt")
    assert run() == (1, ["fresh"])
    assert run() == (0, ["found"])  # the same command continues ...
    assert run(force=True) == (1, ["fresh"])  # ... and what was finished, or is asked anew, starts afresh
    assert run({"steps": 2}) == (1, ["fresh"])


@pytest.mark.parametrize("notebooks, overrides, message", [
    ((), {"stepz": "1"}, "did you mean 'steps'"),
    ((), {"steps": "many"}, "expected an integer"),
    (("c",), {}, "unknown notebook 'c'"),
    (("b",), {}, "first: hilda run a --profile smoke"),
])
def test_mistakes_are_refused_before_a_kernel_starts(made, monkeypatch, notebooks, overrides, message):
    made, _ = made
    monkeypatch.setattr(book, "run_one", lambda *_, **__: pytest.fail("a kernel would have started"))
    with pytest.raises(HildaError, match=message):
        book.run(notebooks, "smoke", overrides, book=made)
    assert not paths.outputs_root().exists()


def test_a_parameters_cell_that_differs_from_its_record_is_refused(made):
    made, write = made
    source = made.source("a")
    source.write_text(source.read_text(encoding="utf-8").replace("steps = 1", "steps = 2"), encoding="utf-8")
    with pytest.raises(HildaError, match="steps is 2 in the cell and 1 in the record"):
        book.run((), "smoke", book=made)


def test_seeds_have_their_own_folders_and_run_side_by_side(made):
    made, _ = made
    assert book.run(["a"], "smoke", seeds=[0, 2], jobs=2, book=made) == 0
    stamp = stamps.read(paths.outputs_root() / "smoke" / "seed2" / "a" / "stamp.json")
    assert stamp["seed"] == stamp["inputs"]["parameters"]["seed"] == 2 and output("a", "stamp.json").is_file()
    assert {(row["seed"], row["notebook"]): row["state"] for row in book.status("smoke", made)} == {
        (0, "a"): "up to date", (0, "b"): "missing", (2, "a"): "up to date", (2, "b"): "missing"}
    first, never = book.plan(made, ["a", "b"], "smoke", {"seed": 7})  # a new seed is expected to take what another took
    assert book.expected_seconds(first) == stamps.read(output("a", "stamp.json"))["wall_seconds"] and book.expected_seconds(never) is None


def _hold(outputs, ready, release):
    os.environ["HILDA_OUTPUTS"] = outputs
    with book.lock("smoke"):
        ready.set()
        release.wait(30)


def test_a_second_run_is_refused_and_names_the_first(made):
    made, _ = made
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(paths.outputs_root()), ready, release))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(HildaError, match=f"process {other.pid}"):
            book.run((), "smoke", book=made)
    finally:
        release.set()
        other.join()
    with book.lock("smoke"):
        assert (paths.outputs_root() / "smoke" / "run.pid").read_text(encoding="utf-8") == str(os.getpid())


def test_a_killed_holder_frees_the_lock():
    context = multiprocessing.get_context("spawn")
    ready, never = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(paths.outputs_root()), ready, never))
    other.start()
    assert ready.wait(30)
    other.kill()
    other.join()
    with book.lock("smoke"):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("a small file system cannot be mounted here (needs Linux and root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_that_looks_finished(made, small_disk, monkeypatch, capfd):
    made, write = made
    monkeypatch.setenv("HILDA_OUTPUTS", str(small_disk))
    write("a", "from hildalib import paths\nprint(paths.output_dir(profile, 'a').joinpath('big.bin').write_bytes(bytes(4_000_000)))")
    assert book.run(["a"], "smoke", book=made) == 1
    said = capfd.readouterr().err
    assert said.count("No space left on device") == 1 and paths.MORE_SPACE in said and "Traceback" not in said
    assert finished_looking("a") == [] and states(made)["a"] == "failed"


def test_a_full_disk_outside_a_notebook_is_one_clear_error_too(monkeypatch, capsys):
    from hildalib import __main__

    def act(options):
        raise OSError(28, "No space left on device", "run.pid")

    monkeypatch.setattr(__main__, "_doctor", act)
    assert __main__.main(["doctor"]) == 2
    assert paths.MORE_SPACE in capsys.readouterr().err


def test_stopping_a_kernel_ends_its_run(made):
    made, write = made
    write("a", "import time\ntime.sleep(600)")
    kernel = Kernel(lambda number: number == 3 and threading.Timer(0.2, kernel.stop).start())
    job = book.plan(made, ["a"], "smoke")[0]
    with pytest.raises(HildaError, match="cell 3 of a.ipynb"):
        book.run_one(job, kernel)
    assert finished_looking("a") == []


def test_the_executed_copy_is_compact():
    stream = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("x", outputs=[
        stream("stream", name="stderr", text="\r 10%"), stream("stream", name="stderr", text="\r 99%\r100%\n"),
        stream("stream", name="stdout", text="a\r\nb\n"), stream("stream", name="stdout", text=f"{paths.ROOT}/x.py:1\n"),
        stream("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "w"})], metadata={"papermill": {"duration": 1}})
    nb = compact(nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": 1}, "papermill": {"input_path": "x"}}))
    assert [output.get("text") or output.data for output in nb.cells[0].outputs] == ["100%\n", "a\nb\n<hilda>/x.py:1\n", {"text/plain": "w"}]
    assert nb.metadata == {} and nb.cells[0].metadata == {}


def test_long_training_logs_are_thinned_and_bars_that_never_moved_are_gone():
    stream, texts = nbformat.v4.new_output, ["parent  step 5/5  K=1  ETA 0:00\n"]
    for step in range(1, 101):
        texts += [f"dLLM  step {step}/100  K=8 decay  m2t 0.1  ETA 0:{100 - step:02d}\n"]
        texts += ["Writing model shards:   0%|          | 0/1 [00:00<?, ?it/s]\r", "\n"] if step % 20 == 0 else []
    outputs = [stream("stream", name="stderr" if text[0] in "W\n" else "stdout", text=text) for text in [*texts, "done\n"]]
    outputs.insert(50, stream("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "shards:   0%|          | 0/1 [00:00<?, ?it/s]"}))
    cell = nbformat.v4.new_code_cell("x", outputs=outputs)
    output, = compact(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs
    lines = output.text.splitlines()
    assert lines[0].startswith("parent") and lines[-1] == "done" and len(lines) == 2 + execution.PROGRESS_LINES
    assert [line.split()[2] for line in lines[1:-1]][::execution.PROGRESS_LINES - 1] == ["1/100", "100/100"]


@pytest.fixture
def library(tmp_path):
    files = {"__init__.py": "class Error: pass\ndef generate():\n    from lib.decode import go\n", "a.py": "from lib import Error, b\n", "b.py": "",
             "decode/__init__.py": "from .edit import loop\n", "decode/edit.py": "from ..a import x\n",
             "tasks/__init__.py": "import importlib\ndef load(name): return importlib.import_module(name)\n", "tasks/one.py": "", "alone.py": ""}
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "lib"


@pytest.mark.parametrize("cell, expected", [
    ("import numpy", ""),
    ("from lib import a", "lib lib.a lib.b"),
    ("%matplotlib inline\nfrom lib import Error", "lib"),
    ("import lib.b", "lib lib.b"),
    ("import lib\nlib.generate()", "lib lib.a lib.b lib.decode lib.decode.edit"),
    ("def f():\n    from lib import generate", "lib lib.a lib.b lib.decode lib.decode.edit"),
    ("from lib.tasks import load", "lib lib.tasks lib.tasks.one"),
])
def test_only_imported_modules_decide_whether_a_run_is_stale(library, cell, expected):
    assert list(stamps.modules([cell], library)) == expected.split()


def test_content_digests_ignore_line_ends_and_key_order():
    assert stamps.digest("a\r\nb") == stamps.digest("a\nb") != stamps.digest("a\nc")
    assert stamps.digest({"a": 1, "b": 2}) == stamps.digest(json.loads('{"b": 2, "a": 1}'))


def test_every_link_of_the_chain_points_backwards_and_has_a_record():
    names = list(book.CHAIN)
    assert set(names) == set(params.RECORDS)
    assert all(names.index(up) < names.index(name) for name in names for up in book.CHAIN[name])
    assert book.Book().upstream("05_benchmarks") == ["01_data", "02_wsd", "03_sft", "04_decode"]


def test_a_table_is_made_again_only_for_another_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return pd.DataFrame({"x": [0.1 + 0.2, 1 / 3], "arm": ["a", "b, c"]})

    first = artefacts.kept(tmp_path / "t.csv", {"items": 3}, make)
    again = artefacts.kept(tmp_path / "t.csv", {"items": 3}, make)
    assert len(made) == 1 and again.equals(first)  # to the last bit
    artefacts.kept(tmp_path / "t.csv", {"items": 4}, make)
    assert len(made) == 2 and not list(tmp_path.glob("*.tmp"))


def test_texts_of_a_kept_table_come_back_to_the_letter(tmp_path):
    table = pd.DataFrame({"text": ["007", "null", "", 'a "b",\r\n# c\n'], "score": [1.0, float("nan"), 0.1 + 0.2, 0.0], "tokens": [3, 1, 0, 9]})
    for _ in range(2):
        assert artefacts.kept(tmp_path / "t ≥ 1.csv", [1], lambda: table).equals(table)


def test_a_file_that_is_no_kept_table_is_made_again(tmp_path):
    (tmp_path / "t.csv").write_text("x\n1\n")
    assert artefacts.kept(tmp_path / "t.csv", [1], lambda: pd.DataFrame({"x": [2]})).x.tolist() == [2]


def test_a_run_that_takes_longer_than_the_last_one_has_no_eta(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    shown = progress.Progress(2, {"a": 10.0, "b": 5.0})
    with shown:
        shown.start("a", "because", 3)
        clock[0] = 4.0
        assert shown.eta() == "ETA 0:11"
        clock[0] = 11.0
        assert shown.eta() == "ETA unknown, this takes longer than the last time"
