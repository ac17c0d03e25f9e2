"""Parameter records: what is merged, what is refused, and how the refusal helps."""

import nbformat
import pytest

from hildalib import HildaError, params
from hildalib.records import Common, Pairs, field


@params.dataclasses.dataclass(frozen=True, kw_only=True)
class Record(Common):
    lr: float = field(1e-3, "peak learning rate", low=0)
    tau_edit: float = field(0.9, "confidence needed to edit", low=0, high=1)
    steps: int = field(10, "optimiser steps", low=1)
    flag: bool = field(False, "switch")
    name: str = field("mean", "weighting", choices=("mean", "1/t"))
    cap: float | None = field(None, "optional cap", low=0)
    rates: list[float] = field([0.1, 0.5], "rates to sweep", low=0, high=1)
    warmup: Pairs = field([[1, 2], [4, 2]], "block-size schedule", low=1)


NANO = "profile: nano\nseed: 0\nlr: 1e-3\ntau_edit: 0.9\nsteps: 10\nflag: true\nname: 1/t\ncap: null\nrates: [0, 1]\nwarmup: [[1, 3]]\n"


@pytest.fixture
def load(tmp_path):
    def load(text=NANO, profile="nano", **overrides):
        (tmp_path / "nano").mkdir(exist_ok=True)
        (tmp_path / "nano" / "toy.yaml").write_text(text, encoding="utf-8")
        return params.load("toy", profile, overrides, record=Record, folder=tmp_path)
    return load


def test_smoke_is_the_defaults(load):
    assert load(profile="smoke") == params.defaults("toy", Record) == {
        "profile": "smoke", "seed": 0, "lr": 1e-3, "tau_edit": 0.9, "steps": 10, "flag": False, "name": "mean", "cap": None,
        "rates": [0.1, 0.5], "warmup": [[1, 2], [4, 2]]}


def test_file_then_set_win_in_that_order(load):
    values = load(steps="7", flag="false", lr="2e-5", warmup="[[2, 5]]", name="mean", cap="3")
    assert (values["profile"], values["steps"], values["flag"], values["lr"], values["warmup"]) == ("nano", 7, False, 2e-5, [[2, 5]])
    assert values["name"] == "mean" and values["cap"] == 3.0 and values["rates"] == [0.0, 1.0]
    assert all(type(rate) is float for rate in values["rates"])


def test_a_profile_covers_the_notebooks_it_has_a_file_for(load, tmp_path):
    load()
    assert params.covered(["before", "toy", "after"], "nano", tmp_path) == ["toy"]
    assert params.covered(["before", "toy"], "smoke", tmp_path) == params.covered(["before", "toy"], "nonsense", tmp_path) == ["before", "toy"]


@pytest.mark.parametrize("line, message", [
    ("lrr: 1", "unknown parameter 'lrr'; did you mean 'lr'?"),
    ("lr: 2", "'lr' is written twice"),
    ("x: [", "not YAML"),
])
def test_a_bad_line_in_a_file_is_named(load, line, message):
    with pytest.raises(HildaError, match=r"toy\.yaml.*") as error:
        load(NANO + line + "\n")
    assert message in str(error.value)


def test_a_missing_key_is_named_with_its_smoke_value(load):
    with pytest.raises(HildaError) as error:
        load(NANO.replace("steps: 10\n", "").replace("warmup: [[1, 3]]\n", ""))
    assert "missing steps, warmup" in str(error.value) and "`steps: 10`" in str(error.value) and "`warmup: [[1, 2], [4, 2]]`" in str(error.value)


@pytest.mark.parametrize("text", ["", "- 1\n", "word\n"])
def test_a_file_that_is_no_mapping_is_refused(load, text):
    with pytest.raises(HildaError, match="key: value"):
        load(text)


@pytest.mark.parametrize("key, value, message", [
    ("steps", "3.0", "expected an integer, for example `steps: 10`"),
    ("steps", "true", "expected an integer"),
    ("steps", "0", "must be at least 1"),
    ("lr", "true", "expected a finite number"),
    ("lr", "fast", "expected a finite number"),
    ("lr", ".nan", "expected a finite number"),
    ("lr", ".inf", "expected a finite number"),
    ("lr", "-1e-3", "must be at least 0"),
    ("lr", "", "expected a finite number"),
    ("tau_edit", "1.01", "must be in [0, 1] (confidence needed to edit)"),
    ("flag", "1", "expected true or false"),
    ("name", "meen", "did you mean 'mean'?"),
    ("name", "3", "expected a string"),
    ("cap", "high", "expected a finite number or null"),
    ("cap", "-1", "must be at least 0"),
    ("rates", "0.5", "expected a list, each item a finite number"),
    ("rates", "[0.5, 2]", "must be in [0, 1]"),
    ("warmup", "[[1, 2, 3]]", "expected a list of [size, steps] pairs"),
    ("warmup", "[[1, 2.5]]", "expected a list of [size, steps] pairs"),
    ("warmup", "[[0, 2]]", "must be at least 1"),
    ("step", "1", "did you mean 'steps'?"),
])
def test_a_bad_value_is_refused_with_what_was_expected(load, key, value, message):
    with pytest.raises(HildaError) as error:
        load(**{key: value})
    assert f"--set: {'unknown parameter ' + repr(key) if key == 'step' else key}" in str(error.value) and message in str(error.value)


def test_the_profile_is_not_a_thing_to_set(tmp_path):
    with pytest.raises(HildaError, match="use --profile smol"):
        params.load("toy", overrides={"profile": "smol"}, record=Record, folder=tmp_path)


def test_a_profile_file_must_name_its_own_profile(load):
    with pytest.raises(HildaError, match="write `profile: nano`"):
        load(NANO.replace("nano", "smol"))


def test_unknown_profile_and_notebook_suggest_a_name(load, tmp_path):
    with pytest.raises(HildaError, match="did you mean 'nano'"):
        load(profile="nanno")
    with pytest.raises(HildaError, match="did you mean '02_wsd'"):
        params.load("02_wds")
    with pytest.raises(HildaError, match="other.yaml does not exist"):
        params.load("other", "nano", record=Record, folder=tmp_path)


def test_an_overlay_changes_what_a_notebook_has_of_its_keys_and_names_the_results(load, tmp_path):
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "old.yaml").write_text("lr: 5e-4\nprecision: bfloat16\n", encoding="utf-8")  # precision: of other notebooks
    values = load(profile="nano+old", steps="7")
    assert (values["profile"], values["lr"], values["tau_edit"], values["steps"]) == ("nano+old", 5e-4, 0.9, 7) and "precision" not in values
    assert load(profile="smoke+old")["lr"] == 5e-4 and params.profiles(tmp_path) == ["smoke", "nano"]
    assert params.covered(["before", "toy"], "nano+old", tmp_path) == ["toy"]


@pytest.mark.parametrize("text, profile, message", [
    ("lr: 5e-4", "nano+older", "unknown overlay 'older'; did you mean 'old'"), ("lrr: 1", "nano+old", "no notebook has a parameter 'lrr'"),
    ("lr: -1", "nano+old", "must be at least 0"), ("profile: x", "nano+old", "no notebook has a parameter 'profile'"), ("lr: 1", "none+old", "unknown profile")])
def test_a_bad_overlay_is_refused(load, tmp_path, text, profile, message):
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "old.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(HildaError, match=message):
        load(profile=profile)


def test_defaults_are_not_shared_between_callers():
    params.defaults("toy", Record)["warmup"].append("changed")
    assert params.defaults("toy", Record)["warmup"] == [[1, 2], [4, 2]]


def cell(source, tags=("parameters",)):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})])


SAME = ("profile: str = 'smoke'\nseed = 0  # help\nlr = 1e-3\ntau_edit = 0.9\nsteps = 10\nflag = False\nname = 'mean'\n"
        "cap: float | None = None\nrates = [\n    0.1,\n    0.5,\n]\nwarmup = [(1, 2), (4, 2)]\n")


def test_a_cell_equal_to_its_record_has_no_mismatch():
    assert params.cell_mismatch(cell(SAME), Record) == []


def test_names_values_and_types_of_a_cell_are_compared():
    changed = SAME.replace("steps = 10", "stps = 10").replace("lr = 1e-3", "lr = 1").replace("flag = False", "flag = 0")
    assert {line.split()[0] for line in params.cell_mismatch(cell(changed), Record)} == {"stps", "steps", "lr", "flag"}


@pytest.mark.parametrize("notebook, message", [(cell(SAME, tags=()), "0 cells carry the tag"),
                                               (cell(SAME + "half = steps // 2\n"), "not `name = literal`"),
                                               (cell(SAME + "import os\n"), "not `name = literal`")])
def test_a_cell_that_could_overrule_its_parameters_is_refused(notebook, message):
    with pytest.raises(HildaError, match=message):
        params.cell_mismatch(notebook, Record)


def test_every_committed_parameter_file_loads_and_nano_is_complete():
    files = {(path.parent.name, path.stem) for path in params.paths.params().glob("*/*.yaml") if path.parent.name != params.OVERLAYS}
    for profile, name in files:
        assert params.load(name, profile)["profile"] == profile
    assert {name for profile, name in files if profile == "nano"} == set(params.RECORDS)
    for overlay in params.paths.params().glob(f"{params.OVERLAYS}/*.yaml"):
        for name in params.RECORDS:
            assert params.load(name, f"smoke+{overlay.stem}")["profile"] == f"smoke+{overlay.stem}"


def test_under_pascal_nothing_is_left_in_bfloat16():
    for path in params.paths.params().glob("*/*.yaml"):
        if path.parent.name != params.OVERLAYS:
            values = params.load(path.stem, f"{path.parent.name}+pascal")
            assert "bfloat16" not in {values.get(name) for name in ("dtype", "precision", "weights")}, path


def test_every_record_passes_its_own_check():
    for name, record in params.RECORDS.items():
        assert params.check(record, params.defaults(name), name) == params.defaults(name)
