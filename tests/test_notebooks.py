"""The notebooks: paired without drift, parameterised, headed, committed as executed, and every cell runs with smoke parameters."""

import os
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest
from jupytext.config import load_jupytext_config

from hildalib import book, params, paths
from hildalib.__main__ import main

FOUND = sorted(paths.notebooks().glob("*.ipynb"))
HEAD = ("Question", "Needs", "Time", "Outputs")
each = pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]


def test_the_chain_is_what_lies_in_the_folder():
    assert [path.stem for path in FOUND] == list(book.CHAIN)
    assert {path.stem for path in paths.notebooks().glob("*.py")} == set(book.CHAIN)


@each
def test_a_notebook_reads_only_what_the_chain_says_it_needs(path):
    """Whichever notebooks run at the same time, what one reads is there: its chain names every notebook whose results its cells ask for."""
    named = {name for cell in code(path) for name in re.findall(r'"(\d\d_\w+)"', cell.source)} & set(book.CHAIN)
    assert named - {path.stem} <= set(book.Book().upstream(path.stem))


@each
def test_text_and_notebook_say_the_same(path):
    text = path.with_suffix(".py")
    config = load_jupytext_config(str(path))
    nb = jupytext.read(path, config=config)
    assert jupytext.writes(nb, fmt="py:percent", config=config) == text.read_text(encoding="utf-8"), (
        f"{text.name} and {path.name} differ: jupytext --to ipynb --update {text.name}, or --to py:percent {path.name}")


@each
def test_kernel_is_the_portable_one(path):
    assert read(path).metadata.kernelspec.name == "python3"


@each
def test_parameters_cell_is_the_record(path):
    assert params.cell_mismatch(read(path), params.RECORDS[path.stem]) == []


@each
def test_first_cell_says_what_is_asked_needed_and_made(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and [word for word in HEAD if not re.search(rf"\b{word}\b", first.source)] == []


@each
def test_committed_as_executed_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code(path)]
    assert counts == list(range(1, len(counts) + 1)) and any(cell.outputs for cell in code(path))
    assert not [output for cell in code(path) for output in cell.outputs if output.output_type == "error"]


@each
def test_small_and_free_of_the_machine_it_ran_on(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_500_000 and "widgets" not in read(path).metadata
    assert str(paths.ROOT) not in text and not re.search(r"/(home|Users|tmp|root)/\w|[A-Z]:\\\\Users", text)


@pytest.mark.timeout(1800)  # all notebooks on a slow, shared CPU
def test_every_cell_runs_with_smoke_parameters(tmp_path):
    """nbval in a process of its own: cells run in order, the notebooks in chain order, results in a temporary folder."""
    assert FOUND
    environment = os.environ | {"HILDA_OUTPUTS": str(tmp_path / "outputs"), "HILDA_FIGURES": str(tmp_path / "figures"),
                                "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "-p", "no:cacheprovider", "-q",
               "-o", "addopts=", "--timeout=0", "-rA", f"--nbval-sanitize-with={paths.ROOT / 'tests' / 'nbval_sanitize.cfg'}", *map(str, FOUND)]
    done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed == sum(len(code(path)) for path in FOUND), "nbval did not run every code cell"
    missing = [path.stem for path in FOUND if not (tmp_path / "outputs" / "smoke" / path.stem / "metrics.json").is_file()]
    assert not missing, f"no metrics.json from {missing}"


SHRUNK = {"01_data": ("documents=200", "eval_documents=20", "sft_documents=100", "sft_eval_documents=20"),
          "02_wsd": ("hidden=32", "layers=1", "parent_steps=3", "warmup=[[1,1]]", "decay=[[8,2]]", "probe_items=4"),
          "03_sft": ("steps=3",), "04_decode": ("items=4", "tau_masks=[0.5,0.9]", "tau_edits=[0.5,1.0]", "trace_prompts=1"), "05_benchmarks": ("items=8",)}


def test_profile_nano_runs_with_its_own_switches(tmp_path, monkeypatch, capfd):
    """01 to 05 as `hilda run` starts them, every number smaller and nothing else changed: what nano leaves empty must be allowed to be."""
    monkeypatch.setenv("HILDA_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("HILDA_FIGURES", str(tmp_path / "figures"))
    for notebook, changes in SHRUNK.items():
        assert main(["run", notebook, "--profile", "nano", *(part for change in changes for part in ("--set", change))]) == 0, capfd.readouterr().out[-3000:]
    assert (tmp_path / "outputs" / "nano" / "05_benchmarks" / "benchmarks.csv").is_file()
