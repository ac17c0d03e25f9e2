"""The command line: exit status, messages, and that nothing heavy is imported before the arguments are known to be good."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from hildalib import HildaError, book, paths, tasks
from hildalib.__main__ import main, parser

REQUIREMENT = re.compile(r"([\w-]+)(?:\[[\w,-]+\])?\s*[<>=!~].*")


def run(*arguments):
    try:
        return main(arguments)
    except SystemExit as end:  # argparse ends the process itself
        return end.code


def test_help_and_mistakes_do_not_import_torch():
    code = ("import sys\nfrom hildalib.__main__ import main\n"
            "status = main(['run', '--profile', 'smoke', '--set', 'stepz=1'])\nassert status == 2, status\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'transformers', 'papermill', 'datasets'} & {*sys.modules}, 'heavy import'\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "error: --set: unknown parameter 'stepz'" in done.stderr and "examples:" in done.stdout


def test_every_command_explains_itself(capsys):
    names = list(next(action for action in parser()._actions if action.dest == "command").choices)
    assert names == ["run", "train", "tune", "compare", "plan", "tokenise", "status", "generate", "serve", "export", "smoke-test", "doctor", "fetch"]
    for name in names:
        assert run(name, "--help") == 0
        assert f"usage: hilda {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    ((), "required: COMMAND"),
    (("run", "--set", "seed"), "is not KEY=VALUE"),
    (("run", "--jobs", "0"), "at least 1"),
    (("run", "--seeds", "-1"), "at least 0"),
    (("run", "--seeds", "1.5"), "whole number"),
    (("run", "9_nothing"), "unknown notebook '9_nothing'"),
    (("run", "--profile", "smokee"), "did you mean 'smoke'"),
    (("run", "--profile", "smoke", "--set", "profile=nano"), "use --profile nano"),
    (("run", "--profile", "smoke", "--set", "seed=-1"), "must be at least 0"),
    (("generate", "x", "--tau-edit", "1.2"), "not a number in [0, 1]"),
    (("generate", "x", "--mode", "X"), "invalid choice"),
])
def test_a_mistake_of_the_caller_ends_with_status_2_and_one_clear_line(capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "error: " in error and "Traceback" not in error


@pytest.mark.parametrize("outcome, status, message", [(HildaError("no such thing; do that"), 2, "error: no such thing; do that"),
                                                      (KeyboardInterrupt(), 130, "the same command again")])
def test_errors_become_a_line_and_a_status(monkeypatch, capsys, outcome, status, message):
    def raising(*_, **__):
        raise outcome
    monkeypatch.setattr(book, "run", raising)
    assert run("run") == status and message in capsys.readouterr().err


def test_run_hands_its_arguments_on_and_its_status_back(monkeypatch):
    calls = []
    monkeypatch.setattr(book, "run", lambda *given, **named: calls.append((given, named)) or 1)
    assert run("run", "02_wsd", "--profile", "smol", "--set", "a=b=c", "--set", "seed=1", "--jobs", "2", "--force") == 1
    assert calls == [((["02_wsd"], "smol", {"a": "b=c", "seed": "1"}), {"force": True, "jobs": 2, "seeds": None})]


def test_status_prints_a_row_for_each_notebook(capsys):
    assert run("status", "--profile", "smoke") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:4] == ["notebook", "profile", "seed", "state"] and [row.split()[0] for row in rows[1:]] == list(book.CHAIN)


def test_smoke_test_prints_ok(capsys):
    assert run("smoke-test") == 0
    assert capsys.readouterr().out == "OK\n"


def test_doctor_tells_device_and_folders(capsys):
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert "torch" in shown and "device" in shown and str(paths.outputs_root()) in shown


def test_generate_refuses_a_model_that_does_not_exist(capsys, tmp_path):
    assert run("generate", "x", "--model", str(tmp_path / "nothing")) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def test_what_is_made_on_the_spot_needs_no_fetching(capsys):
    assert tasks.GENERATED == tuple(name for name in tasks.NAMES if hasattr(tasks.load(name), "stream"))
    assert run("fetch", *tasks.GENERATED, "nano") == 0
    assert capsys.readouterr().out.count("made on the spot") == len(tasks.GENERATED) + 1


def test_fetch_refuses_an_unknown_name(capsys):
    assert run("fetch", "no-such-name") == 2
    assert "no-such-name" in capsys.readouterr().err


def _project():
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_constraints_pin_every_direct_dependency_once():
    lines = [line for line in (paths.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", line) for line in lines)
    pinned = [line.partition("==")[0] for line in lines]
    extras = _project()["optional-dependencies"]
    direct = {REQUIREMENT.fullmatch(line)[1] for line in _project()["dependencies"] + [line for extra in extras.values() for line in extra]}
    assert len(pinned) == len({*pinned}) and direct <= {*pinned}


def test_environment_yml_leaves_the_list_to_pyproject():
    entries = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert entries == ["python=3.11", "pip", {"pip": ["-c constraints.txt", "-e .[test]"]}]
    assert _project()["requires-python"] == ">=3.11" and "test" in _project()["optional-dependencies"]


def test_readme_and_ci_give_the_same_test_command():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ *(python .*-m pytest) *$", readme, re.MULTILINE)
    assert commands and commands[0] == 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest'
    script = (paths.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script and "pip install" not in script  # taken from README, not written twice
