"""Code benchmarks: gold programs pass, wrong ones fail, holes fit their programs, pass@k is what enumeration says."""

import itertools
import json
import os
from fractions import Fraction

import pytest

from hildalib import HildaError, corpora, sandbox, tasks
from hildalib.tasks import code, humaneval, infilling, mbpp

HERE, WHY = sandbox.available()
contained = pytest.mark.skipif(not HERE, reason=f"code cannot be contained here: {WHY}")
real = pytest.mark.skipif(not os.environ.get("HILDA_DATA"), reason="HILDA_DATA is not set: the published problems are not there")
CODE_TASKS = [humaneval, mbpp, infilling]
ROWS = [
    {"task_id": "Own/0", "entry_point": "twice", "canonical_solution": "    total = x\n    total += x\n\n    return total\n",
     "prompt": 'from math import inf\n\n\ndef twice(x: int) -> int:\n    """ Two times x.\n    >>> twice(2)\n    4\n    """\n',
     "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n"},
    {"task_id": "Own/1", "entry_point": "undo", "canonical_solution": "    return [x - 1 for x in xs]\n",
     "prompt": 'def shift(xs: list):\n    """ Adds 1. """\n    return [x + 1 for x in xs]\n\n\ndef undo(xs: list):\n    """ Inverse of shift. """\n',
     "test": "def check(candidate):\n    for xs in ([], [1, 2], [7.5]):\n        assert candidate(shift(xs)) == xs\n"}]
PROBLEMS = [
    {"task_id": 11, "text": "Write a function to add.", "code": "def sum(a, b):\r\n  return a + b", "test_setup_code": "", "challenge_test_list": [],
     "test_list": ["assert sum(1, 2) == 3", "assert sum(-1, 1) == 0"]},
    {"task_id": 12, "text": "Write a function for the area.", "code": "import math\nclass Disc(object):\n  def __init__(self, r):\n    self.r = r\n"
     "def area(disc):\n  return math.pi * disc.r ** 2", "test_setup_code": "disc = Disc(1)\r\nbig = Disc(1)\r\nbig.r = 2", "challenge_test_list": [],
     "test_list": ["assert math.isclose(area(disc), math.pi)", "assert area(big) == 4 * math.pi"]}]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The two small problems of each benchmark, in the layout that HILDA_DATA has."""
    for name, rows in (("humaneval/HumanEval", ROWS), ("mbpp/mbpp", PROBLEMS)):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("HILDA_DATA", str(tmp_path))


@contained
@pytest.mark.parametrize("task", CODE_TASKS)
def test_gold_answers_pass(task, data):
    items = task.items("test")
    assert len(items) >= 2 and task.scores([task.response(item) for item in items], items) == [1.0] * len(items)
    assert task.score(task.response(items[0]), items[0]) == 1.0


@real
@contained
@pytest.mark.parametrize("task, count", [(humaneval, 30), (mbpp, 30), (infilling, 10)])
def test_published_gold_answers_pass(task, count):
    items = task.items("test", limit=count, seed=1)
    scores = task.scores([task.response(item) for item in items], items)
    assert [item["task_id"] for item, score in zip(items, scores) if score != 1.0] == []


@real
@pytest.mark.parametrize("task, split, count", [(humaneval, "test", 164), (mbpp, "test", 500), (mbpp, "validation", 90), (mbpp, "train", 374),
                                                (infilling, "single-line", 1033), (infilling, "multi-line", 5815)])  # as published
def test_published_counts(task, split, count):
    assert len(task.items(split)) == count


@contained
@pytest.mark.parametrize("task", CODE_TASKS)
@pytest.mark.parametrize("text", ["", "    pass\n", "    return 0\n", "def twice(x):\n    return x\n",
                                  "```python\ndef sum(a, b):\n    return 3\n```", "\0", "((((", "\ud800"])
def test_wrong_answers_fail(task, text, data):
    item = task.items("test")[0]
    assert task.score(text, item) == 0.0


@pytest.mark.parametrize("task", CODE_TASKS)
def test_what_is_no_text_scores_zero(task, data):
    item = task.items("test")[0]
    assert [task.score(text, item) for text in (None, 42, b"42")] == [0.0] * 3


@pytest.mark.parametrize("task", CODE_TASKS)
def test_without_a_sandbox_a_score_is_an_error_not_a_zero(task, data, monkeypatch):
    monkeypatch.setattr(sandbox, "_probe", lambda: (False, "no such kernel"))
    monkeypatch.delenv(sandbox.UNSAFE, raising=False)
    item = task.items("test")[0]
    with pytest.raises(HildaError, match="cannot be contained"):
        task.score(task.response(item), item)


@pytest.mark.parametrize("task", CODE_TASKS)
def test_samples_are_by_seed_in_order_and_splits_are_checked(task, data):
    items = task.items("test")
    assert task.items("test", limit=1, seed=3) == task.items("test", limit=1, seed=3) and task.items("test", limit=99) == items
    for seed in range(5):
        drawn = task.items("test", limit=2, seed=seed)
        assert drawn == [item for item in items if item in drawn] and len(drawn) == 2
    with pytest.raises(HildaError, match="unknown split 'dev'"):
        task.items("dev")


def test_scores_need_one_text_an_item(data):
    with pytest.raises(HildaError, match="1 texts for 2 items"):
        humaneval.scores([""], humaneval.items("test"))


# ---- programs in texts -----------------------------------------------------------------------------------------------------------------------

@contained
@pytest.mark.parametrize("text, score", [
    ("    return 2 * x\n\n\nprint(twice(1))\ndef twice(x):\n    broken", 1), ("    return 2 * x\n\n\nprint('go on')\n", 1),
    ("    return 2 * x\n```\nThat is it.", 1),
    ("Here it is:\n```python\ndef twice(x):\n    return help(x)\ndef help(x):\n    return x + x\n```\nDone.", 1), ("```\n    return x + x\n```", 1),
    ("def twice(x: int) -> int:\n    return x + x\n\nassert twice(1) == 3\n", 1), ("def twice(x):\n    return inf * x\n", 0),
    ("def twice(x):\n    return x + x if inf else 0\n", 1)])
def test_humaneval_finds_the_program_in_the_text(text, score, data):
    assert humaneval.score(text, humaneval.items("test")[0]) == score


@contained
def test_humaneval_tests_use_the_prompts_helper_not_the_candidates(data):
    item = humaneval.items("test")[1]
    text = "```python\ndef undo(xs):\n    return xs\ndef shift(xs):\n    return xs\n```"  # with its own shift this would be right
    assert humaneval.score(text, item) == 0.0


@contained
@pytest.mark.parametrize("text, score", [
    ("def sum(a, b):\n    return a + b\n\nassert sum(1, 2) == 4\n", 1), ("Sure.\n```python\ndef sum(a, b):\n    return a + b\n```\nDone", 1),
    ("def sum(a, b):\n    return a + b\n[DONE]\nmore", 1), ("def sum(a, b):\n    return a + b\n```\nmore", 1),
    ("def add(a, b):\n    return a + b\n", 0)])
def test_mbpp_finds_the_program_in_the_text(text, score, data):
    assert mbpp.score(text, mbpp.items("test")[0]) == score


def test_mbpp_names_and_modules_are_those_the_tests_use(data):
    one, two = mbpp.items("test")
    assert mbpp.job("", one)["names"] == ["sum"] and mbpp.job("", one)["setup"] == ""
    assert mbpp.job("", two)["names"] == ["Disc", "area"] and mbpp.job("", two)["setup"] == "import math"


def test_mbpp_prompts_are_those_of_the_corpus(data):
    rows = list(corpora.rows("mbpp", "test"))
    assert [(mbpp.prompt(item), mbpp.response(item)) for item in mbpp.items("test")] == [(row["prompt"], row["response"]) for row in rows]


# ---- infilling -------------------------------------------------------------------------------------------------------------------------------

def test_holes_are_every_line_and_every_run_of_lines(data):
    single, multi = infilling.items("single-line"), infilling.items("multi-line")
    assert [item["middle"] for item in single if item["entry_point"] == "twice"] == ["    total = x\n", "    total += x\n", "    return total\n"]
    assert len(multi) == 3 * 4 // 2 + 1 and infilling.items("test") == multi
    for item in single + multi:
        row = next(row for row in ROWS if row["entry_point"] == item["entry_point"])
        assert infilling.prefix(item) + infilling.response(item) + infilling.suffix(item) == row["prompt"] + row["canonical_solution"]
        assert infilling.prompt(item) == infilling.prefix(item) and infilling.prefix(item).endswith("\n")
        assert infilling.prompt_with_suffix(item).endswith(infilling.prefix(item))
        assert infilling.suffix(item).rstrip() in infilling.prompt_with_suffix(item)
    assert len({item["task_id"] for item in multi}) == len(multi)


def test_a_text_that_goes_on_with_the_suffix_is_cut_there(data):
    def lines(text):
        return [line for line in text.splitlines() if line.strip()]

    for item in infilling.items("single-line") + infilling.items("multi-line"):
        for text in (item["middle"], item["middle"].rstrip("\n"), item["middle"] + item["suffix"],
                     item["middle"] + item["suffix"] + "\n\ndef other():\n    pass\n",
                     f"```python\n{item['middle']}```\n", f"{item['middle']}```\nSo much for that."):
            assert lines(infilling.middle(text, item)) == lines(item["middle"])


@contained
def test_an_answer_that_fits_otherwise_passes_and_one_that_does_not_fails(data):
    item = next(item for item in infilling.items("single-line") if item["middle"] == "    total += x\n")
    for text, score in {"    total = 2 * x": 1, "    total *= 2\n    total = 0\n": 1, "    return 2 * x": 1, "    pass": 0, "  total += x": 0}.items():
        assert infilling.score(text, item) == score


# ---- pass@k ----------------------------------------------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            answers = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                subsets = list(itertools.combinations(answers, k))
                assert code.pass_at_k(samples, correct, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))), abs=1e-12)


@pytest.mark.parametrize("samples, correct, k", [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0), (0, 0, 1)])
def test_pass_at_k_outside_its_range_is_an_error(samples, correct, k):
    with pytest.raises(HildaError, match="needs 0 <= correct"):
        code.pass_at_k(samples, correct, k)


def test_code_tasks_are_in_the_list_of_tasks():
    assert {task.name for task in CODE_TASKS} <= set(tasks.NAMES) and all(tasks.load(task.name) is task for task in CODE_TASKS)
