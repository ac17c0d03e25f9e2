"""Tasks: splits that cannot overlap, gold answers that score 1, hostile answers that score 0 at once."""

import importlib.util
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hildalib import HildaError, nano, tasks
from hildalib.tasks import arithmetic, countdown, gsm8k, gsm_symbolic, shortcuts, sudoku, tinystories

needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym (the extra gym) is not installed")
PROCEDURAL = [arithmetic, countdown, shortcuts, sudoku]
GENERATED = [*PROCEDURAL, pytest.param(gsm_symbolic, marks=needs_gym)]
ONE_OF_EACH = [(arithmetic, {"terms": [40, 2], "ops": ["+"]}), (countdown, {"numbers": [3, 7, 5], "target": 26}), (gsm8k, {"answer": "#### 41"}),
               (gsm_symbolic, {"answer": "#### 41"}), (shortcuts, {"terms": [40, 2], "ops": ["+"]}), (sudoku, {"puzzle": "1234;3410;2040;4320"}), (tinystories, {})]
few = settings(max_examples=200, deadline=None)
HOSTILE = ["", " ", ";", ",", "=", "#### ", "x" * 1_000_000, "9" * 1_000_000, "(" * 100_000, "9**9**9**9", "1+" * 300_000 + "1", ";" * 1_000_000,
           "#### " + "9" * 1_000_000, "#### " * 200_000, "1," * 500_000, "٤٢", "#### ٤٢", "４２", "__import__('os').system('true')", "\0", "\ud800",
           "nan", "inf", "1e999", "-0", "0x2a", "3*7=21,21/0=26", "<<1=1>>" * 100_000, "-" * 500_000, "$" * 500_000, None, 42, b"42"]
STORIES = "\n\n".join(f"Once upon a time, there was a girl named G{i}. " + f"She saw a number {i} tree and a very big dog. " * 8 for i in range(40))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of data in the layout that HILDA_DATA has."""
    for folder in ("gsm8k", "tinystories", "countdown"):
        (tmp_path / folder).mkdir()
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i:,}.\n#### {2 * i:,}"} for i in range(900, 1100)]
    for name, part in (("train", rows[:150]), ("test", rows[150:])):
        (tmp_path / f"gsm8k/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (tmp_path / "tinystories/valid_a.txt").write_text(STORIES, encoding="utf-8")
    (tmp_path / "tinystories/stories.jsonl").write_text(json.dumps({"text": "Tom had a red ball. " * 9}) + "\n", encoding="utf-8")
    (tmp_path / "countdown/cd3_test_d1.jsonl").write_text('{"input": "30,100,93", "output": "23"}\n', encoding="utf-8")
    (tmp_path / "countdown/cd3_test_dream.jsonl").write_text('{"input": "1,2,52,54", "output": "1*2=2,2+52=54"}\n', encoding="utf-8")
    monkeypatch.setenv("HILDA_DATA", str(tmp_path))
    return tmp_path


def test_every_name_loads_a_task_with_the_whole_contract():
    for name in tasks.NAMES:
        task = tasks.load(name)
        assert task.name == name and isinstance(task.version, int)
        assert all(callable(getattr(task, part)) for part in ("items", "prompt", "response", "score"))
    with pytest.raises(HildaError, match="unknown task 'chess'"):
        tasks.load("chess")


# ---- procedural -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", GENERATED)
def test_no_question_is_in_two_splits_whatever_the_seed(task):
    keys = {split: {task.key(item) for seed in range(3) for item in task.items(split, 300, seed)} for split in tasks.SPLITS}
    assert all(len(found) > 300 for found in keys.values())
    assert all(keys[one].isdisjoint(keys[two]) for one, two in itertools.combinations(tasks.SPLITS, 2))


@pytest.mark.parametrize("task", GENERATED)
def test_same_seed_same_items_other_seed_others_and_no_repeats(task):
    items = task.items("train", 200, 5)
    assert items == task.items("train", 200, 5) != task.items("train", 200, 6)
    assert len({task.prompt(item) for item in items}) == 200
    assert task.items("train", 50, 5) == items[:50]
    assert {task.key(item) for item in itertools.islice(task.stream(5), 200)} <= {task.key(item) for item in task.items("train", 250, 5)}


@pytest.mark.parametrize("task", PROCEDURAL)
def test_default_sizes_are_there_and_gold_answers_score_one(task):
    for split, size in tasks.DEFAULT_SIZES.items():
        items = task.items(split)
        assert len(items) == size and all(task.score(task.response(item), item) == 1.0 for item in items)


def test_asking_for_more_questions_than_there_are_is_an_error():
    with pytest.raises(HildaError, match="lower the limit"):
        tasks.items_of(itertools.cycle([{"a": 1}]), str, 2, 10)
    with pytest.raises(HildaError, match="unknown split"):
        arithmetic.items("dev")


@pytest.mark.parametrize("task, item", ONE_OF_EACH)
def test_hostile_answers_score_zero(task, item):
    for text in HOSTILE:
        found = task.score(text, item)
        assert found == 0.0 or (task is tinystories and 0.0 < found <= 1.0), repr(text)[:40]


@few
@given(st.text(max_size=60) | st.text("0123456789+-*/=,;# $.", max_size=60))
def test_scores_are_numbers_in_the_unit_interval_for_any_text(text):
    for task, item in ONE_OF_EACH:
        assert 0.0 <= task.score(text, item) <= 1.0


def test_arithmetic_texts_are_as_documented():
    item = {"terms": [17, 25, 8], "ops": ["+", "-"]}
    assert (arithmetic.prompt(item), arithmetic.response(item)) == ("17+25-8=", "17+25=42;42-8=34;34")


@pytest.mark.parametrize("text, score, exact", [
    ("17+25=42;42-8=34;34", 1, 1), (" 17+25=42;42-8=34;34\n", 1, 1), ("17+25=41;41-8=34;34", 1, 0), ("17+25=42;42-8=34;35", 0, 0),
    ("34", 0, 0), (";34", 0, 0), ("17+25=42;42-8=34;034", 0, 0), ("17+25=42;42-8=34;34;", 0, 0), ("17+25=42;42-8=34", 0, 0)])
def test_arithmetic_scores_the_final_answer_and_exact_the_whole(text, score, exact):
    item = {"terms": [17, 25, 8], "ops": ["+", "-"]}
    assert (arithmetic.score(text, item), arithmetic.exact(text, item)) == (score, exact)


@pytest.mark.parametrize("text, right, of", [
    ("17+25=42;42", 7, 7), (" 17+25=42;42\n", 7, 7), ("17+25=43;43", 5, 7), ("17+25=42", 5, 7), ("17+25=42;42;", 7, 8), ("7+25=42;42", 6, 7), ("42", 0, 7),
    ("=17+25=42;42", 0, 8), ("", 0, 7), (None, 0, 7), ("9" * 1_000_000, 0, 7)])
def test_arithmetic_parts_are_numbers_and_signs_in_their_places(text, right, of):
    assert arithmetic.parts(text, {"terms": [17, 25], "ops": ["+"]}) == right / of


def test_arithmetic_stays_in_its_range_and_each_step_is_true():
    for item in itertools.islice(arithmetic.stream(1), 500):
        *steps, answer = arithmetic.response(item).split(";")
        assert len(steps) == len(item["ops"]) and all(1 <= term <= 99 for term in item["terms"])
        for step in steps:
            left, op, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
            assert int(left) + (1 if op == "+" else -1) * int(right) == int(result) <= 199
        assert result == answer


@pytest.mark.parametrize("text, score, worked", [("17+25=42;42-8=34;34", 1, True), ("34", 1, False), (" 34\n", 1, False), ("17+25=42;42-8=34;35", 0, True),
                                                 ("35", 0, False), ("034", 0, False), ("34;", 0, True), ("", 0, False)])
def test_shortcuts_score_the_answer_however_it_was_reached(text, score, worked):
    assert (shortcuts.score(text, {"terms": [17, 25, 8], "ops": ["+", "-"]}), shortcuts.worked(text)) == (score, worked)


def test_55_of_100_shown_answers_take_the_short_way_in_every_split():
    for split in tasks.SPLITS:
        items = shortcuts.items(split, 1000)
        shown = [shortcuts.response(item) for item in items]
        assert 0.5 < sum(not shortcuts.worked(text) for text in shown) / len(shown) < 0.6  # three standard deviations of 1,000 coins
        assert all(text == arithmetic.response(item) or text == str(arithmetic.answer(arithmetic.response(item))) for text, item in zip(shown, items))


# ---- countdown ------------------------------------------------------------------------------------------------------------------

def _reachable(numbers):
    """All results over whole non-negative steps, by splitting the numbers in two groups: an oracle that shares no code."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for size in range(1, len(numbers)):
        for left in set(itertools.permutations(numbers, size)):
            rest = list(numbers)
            for number in left:
                rest.remove(number)
            for a, b in itertools.product(_reachable(left), _reachable(tuple(rest))):
                found |= {a + b, a * b} | ({a - b} if a >= b else set()) | ({a // b} if b and a % b == 0 else set())
    return found


def test_countdown_solutions_are_all_there_and_all_score_one():
    rng = random.Random(0)
    for count in (2, 3, 4):
        for _ in range(10):
            numbers = tuple(rng.randint(1, 12) for _ in range(count))
            found = countdown.solutions(numbers)
            assert set(found) == _reachable(numbers)
            assert all(countdown.score(text, {"numbers": list(numbers), "target": target}) == 1 for target, text in found.items())


@pytest.mark.parametrize("text, score", [
    ("3*7=21,21+5=26", 1), ("7*3=21,5+21=26", 1), (" 3*7=21,21+5=26\n", 1), ("3*7=21, 21+5=26", 0), ("3*7=21,21+5=27", 0), ("3*7=22,22+4=26", 0),
    ("21+5=26", 0), ("3*7=21", 0), ("3*7=21,21+5=26,26+0=26", 0), ("3*7=21,7+5=12,21+5=26", 0), ("7+7=14,14+12=26", 0), ("3*7=21,21+5=26,", 0),
    ("5+21=26,3*7=21", 0), ("+3*7=21,21+5=26", 0), ("3*7=21,21+5=0026", 1)])
def test_countdown_needs_true_equations_each_number_once_and_the_target_last(text, score):
    assert countdown.score(text, {"numbers": [3, 7, 5], "target": 26}) == score


@pytest.mark.parametrize("text, numbers, target", [("3-5=-2,7+-2=5", [3, 5, 7], 5), ("7/2=3,3+5=8", [7, 2, 5], 8), ("5-5=0,7/0=7", [5, 5, 7], 7)])
def test_countdown_knows_no_negative_fraction_or_division_by_zero(text, numbers, target):
    assert countdown.score(text, {"numbers": numbers, "target": target}) == 0.0


def test_countdown_published_formats(data):
    (one,), (two,) = countdown.items("d1"), countdown.items("dream")
    assert countdown.prompt(one) == "30 100 93 -> 23:" and countdown.score(countdown.response(one), one) == 1.0
    assert two == {"numbers": [1, 2, 52], "target": 54, "solution": "1*2=2,2+52=54"} and countdown.score(two["solution"], two) == 1.0


def test_countdown_published_files_are_solved_and_never_in_procedural_training():
    if not os.environ.get("HILDA_DATA"):
        pytest.skip("HILDA_DATA is not set: the published Countdown files are not here")
    for split, size in (("d1", 240), ("dream", 940)):
        items = countdown.items(split)
        assert len(items) > size and all(countdown.score(countdown.response(item), item) == 1.0 for item in items)
        assert all(max(item["numbers"]) > countdown.LARGEST or tasks.question_split(countdown.key(item)) != "train" for item in items)


# ---- sudoku ---------------------------------------------------------------------------------------------------------------------

def _groups(rows):
    """Rows, columns and boxes of four rows of four."""
    boxes = [[rows[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return [*map(list, rows), *map(list, zip(*rows)), *boxes]


def _valid(text):
    rows = text.split(";")
    return [len(row) for row in rows] == [4] * 4 and all(sorted(group) == list("1234") for group in _groups(rows))


def _completions(puzzle):
    """All fillings of the holes that break no rule, hole by hole: an oracle that shares no code with the module."""
    hole = puzzle.find("0")
    if hole < 0:
        return [puzzle]
    tried = [puzzle[:hole] + digit + puzzle[hole + 1:] for digit in "1234"]
    kept = [one for one in tried if all(max(Counter(cell for cell in group if cell != "0").values(), default=0) < 2 for group in _groups(one.split(";")))]
    return [grid for one in kept for grid in _completions(one)]


def test_sudoku_grids_are_all_the_valid_ones():
    assert sorted(_completions("0000;0000;0000;0000")) == sorted(sudoku.grids()) and len(sudoku.grids()) == 288 and all(map(_valid, sudoku.grids()))


def test_sudoku_puzzles_have_one_solution_in_the_range_of_holes_and_stay_in_the_characters():
    holes = Counter()
    for item in itertools.islice(sudoku.stream(2), 300):
        assert _completions(item["puzzle"]) == [sudoku.response(item)] == list(sudoku.solutions(item["puzzle"]))
        assert set(sudoku.prompt(item) + sudoku.response(item)) <= set("01234;=") <= set(nano.CHARACTERS)
        holes[item["puzzle"].count("0")] += 1
    assert set(holes) == set(sudoku.HOLES)


def test_sudoku_of_all_fillings_of_the_holes_only_the_solution_scores_one():
    item = next(item for item in sudoku.stream(0) if item["puzzle"].count("0") == 6)
    fillings = (item["puzzle"].replace("0", "{}").format(*digits) for digits in itertools.product("1234", repeat=6))
    assert [text for text in fillings if sudoku.score(text, item)] == [item["solution"]]
    assert [grid for grid in sudoku.grids() if sudoku.score(grid, item)] == [item["solution"]]  # the others change a given


@pytest.mark.parametrize("change, score", [
    (lambda gold: f" {gold}\n", 1), (lambda gold: gold.replace(";", "\n"), 0), (lambda gold: gold.replace(";", ""), 0), (lambda gold: gold + ";", 0),
    (lambda gold: gold[:-1], 0), (lambda gold: gold[:-1] + "0", 0), (lambda gold: f"{gold};{gold}", 0), (lambda gold: "-" + gold, 0),
    (lambda gold: gold.translate(str.maketrans("1234", "１２３４")), 0), (lambda gold: gold.translate(str.maketrans("1234", "١٢٣٤")), 0),
    (lambda gold: gold.encode(), 0), (lambda gold: [gold], 0), (lambda gold: gold + "1" * 1_000_000, 0)])
def test_sudoku_needs_the_grid_in_its_form_and_nothing_else(change, score):
    item = sudoku.items("test", 1)[0]
    assert sudoku.score(change(item["solution"]), item) == score


def test_sudoku_all_24_renamings_of_the_digits_share_a_key_and_other_puzzles_do_not():
    one, other = (item["puzzle"] for item in sudoku.items("test", 2))
    keys = {sudoku.key({"puzzle": one.translate(str.maketrans("1234", "".join(digits)))}) for digits in itertools.permutations("1234")}
    assert len(keys) == 1 and sudoku.key({"puzzle": other}) not in keys


# ---- gsm_symbolic ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, strict, flexible", [("#### 288", 1, 1), ("#### -288", 0, 0), ("#### 0-288", 0, 1), ("-288", 0, 0), ("288 - 576\n#### 288", 1, 1),
                                                    ("#### 288\n#### -288", 0, 0), ("it is 288", 0, 1), ("#### −288", 0, 1)])
def test_gsm_symbolic_keeps_the_minus_sign(text, strict, flexible):
    item = {"question": "?", "answer": "144 * 2 = 288\n#### 288"}
    assert (gsm_symbolic.score(text, item), gsm_symbolic.flexible(text, item)) == (strict, flexible)


@needs_gym
def test_gsm_symbolic_questions_are_plain_and_gold_answers_score_one():
    items = gsm_symbolic.items("train", 1500, 1)
    for item in items:
        text, gold = gsm_symbolic.prompt(item), gsm_symbolic.response(item)
        assert set(text + gold) <= set(nano.CHARACTERS) and "final answer" not in text and "#### -" not in gold
        assert gsm_symbolic.score(gold, item) == gsm_symbolic.flexible(gold, item) == 1.0
        assert gsm_symbolic.score(gold.replace("#### ", "#### -"), item) == float(gold.endswith("#### 0"))
    names = {item["question"].split()[0] for item in items if " can peel " in item["question"]}
    assert len(names) > 3  # one or two if a template and its first value came from the same random number


@pytest.mark.parametrize("worked, kept", [
    ("0.5*40 = 20", True), ("0.46*40 = 18", False), ("78 / 12 = 6 pans", False), ("78 / 13 = 6 pans", True), ("13 * $6 = $78", True),
    ("$117.10 - $53.10 = $63", False),
    ("$420,000 + $1,200 = $421,200", True), ("350 puppies / 1400 puppies * 100% = 25%", True), ("360 puppies / 1400 puppies * 100% = 25%", False),
    ("2 * 1/4 = 1/2 miles", True), ("half * 44 / 2 = 11", True), ("2 * 1/4 = 1/3 miles", False), ("73 + 36 + T = 109 + T = 219", True),
    ("2x+30=70", True), ("30 girls x 2 boys/girl = 61", False),
    ("10 - 2 - 3 = 5", True), ("10 - 2 - 3 = 11", False), ("2 + 3 * 4 = 14", True), ("2 + 3 * 4 = 20", False), ("10÷1/2=20", False), ("3.3333333 kg", False),
    ("1.0 * £6.0 = €6", True), ("99 - 100 = -1\n#### -1", False)])
def test_gsm_symbolic_drops_questions_whose_worked_answer_does_not_hold(monkeypatch, worked, kept):
    def create_dataset(name, size, seed):
        text = f"1 + {seed} = {1 + seed}" if seed % 2 else worked
        gold = "-1" if text.endswith("#### -1") else "7"
        return [None, {"question": text + "? Give the result as your final answer. Do not include units.", "answer": gold,
                       "metadata": {"answer_cot": f"{text}\n#### {gold}.0"}}]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    found = [item["question"] for split in tasks.SPLITS for item in itertools.islice(gsm_symbolic.stream(0, split), 40)]
    assert any(not question.startswith("1 + ") for question in found) == kept and any(question.startswith("1 + ") for question in found)


def test_gsm_symbolic_names_do_not_part_a_question_from_its_twin():
    one, two = ({"question": f"{name} has 1,250 eggs at $2.50.", "answer": f"{name} asks for 3125.\n#### 3125"} for name in ("Ava", "Mary Ann"))
    assert gsm_symbolic.key(one) == gsm_symbolic.key(two) == "1,250 2.50 3125 3125" != gsm_symbolic.key(one | {"answer": "#### 3126"})


def test_gsm_symbolic_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(HildaError, match=r'needs the package reasoning-gym.* python -m pip install -c constraints\.txt -e "\.\[gym\]"'):
        gsm_symbolic.items("test", 1)


# ---- gsm8k ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, strict, flexible", [
    ("#### 1250", 1, 1), ("so\n#### 1,250.", 1, 1), ("#### $1,250.00", 1, 1), ("####1250", 1, 1), ("#### 1250 dollars", 1, 1), ("#### -1250", 0, 0),
    ("it is 1,250.00", 0, 1), ("#### 1250\nor 7", 1, 0), ("#### 7\n#### 1250", 1, 1), ("#### 1250.5", 0, 0), ("#### 1,2,5,0", 0, 0),
    ("#### 12500", 0, 0), ("#### 1" + "250" * 9, 0, 0), ("####\n1250", 0, 1), ("#### 01250", 1, 1)])
def test_gsm8k_strict_reads_after_the_mark_and_flexible_the_last_number(text, strict, flexible):
    item = {"answer": "x <<1+1=2>>2\n#### 1,250"}
    assert (gsm8k.score(text, item), gsm8k.flexible(text, item)) == (strict, flexible)


@few
@given(st.integers(-10**12, 10**12), st.integers(0, 999))
def test_gsm8k_normal_forms_are_equal_exactly_when_the_numbers_are(whole, thousandths):
    number = Fraction(whole) + (1 if whole >= 0 else -1) * Fraction(thousandths, 1000)
    written = [f"{whole}.{thousandths:03d}", f"{whole:,}.{thousandths:03d}0", f"${whole}.{thousandths:03d}"]
    forms = {gsm8k.normalise(text) for text in written if not (whole == 0 and thousandths == 0)} or {"0"}
    assert len(forms) == 1 and Fraction(forms.pop()) == number


def test_gsm8k_splits_are_disjoint_and_gold_answers_carry_no_marks(data):
    found = {split: gsm8k.items(split) for split in tasks.SPLITS}
    questions = [item["question"] for items in found.values() for item in items]
    assert len(questions) == len(set(questions)) == 200 and all(found.values())
    for item in found["train"]:
        assert "<<" not in gsm8k.response(item) and gsm8k.score(gsm8k.response(item), item) == gsm8k.flexible(gsm8k.response(item), item) == 1.0
    assert gsm8k.items("test", 7, 1) == gsm8k.items("test", 7, 1) != gsm8k.items("test", 7, 2)


def test_gsm8k_published_answers_all_score_one():
    if not os.environ.get("HILDA_DATA"):
        pytest.skip("HILDA_DATA is not set: the GSM8K files are not here")
    for split, size in (("train", 6744), ("validation", 729), ("test", 1319)):
        items = gsm8k.items(split)
        assert len(items) == size
        assert all(gsm8k.score(gsm8k.response(item), item) == gsm8k.flexible(gsm8k.response(item), item) == 1.0 for item in items)


# ---- tinystories ----------------------------------------------------------------------------------------------------------------

def test_tinystories_cuts_stories_after_their_opening_and_halves_the_validation_text(data):
    found = {split: tinystories.items(split) for split in tasks.SPLITS}
    assert [item["prompt"] + item["reference"] for item in found["train"]] == ["Tom had a red ball. " * 9]
    both = found["validation"] + found["test"]
    assert len({item["prompt"] for item in both}) == len(both) == 40 and found["validation"] and found["test"]
    assert all(len(item["prompt"].split()) == tinystories.OPENING_WORDS for item in both)


def test_repetition_in_closed_form():
    assert tinystories.repetition("a b c d e f") == 0.0 == tinystories.longest_repeat("a b c d e f")
    assert tinystories.repetition("a a a a a") == pytest.approx(2 / 3)  # three 3-grams, one different
    assert tinystories.longest_repeat("a b c x a b c") == pytest.approx(3 / 3) and tinystories.longest_repeat("a b c d a b") == pytest.approx(2 / 3)
    assert tinystories.longest_repeat("one two three one two three") == 1.0
    assert tinystories.score("a a", {}) == 0.0 and tinystories.score("a b c d", {}) == 1.0


@few
@given(st.lists(st.sampled_from("abc"), max_size=14))
def test_longest_repeat_equals_enumeration(found):
    size = len(found)
    best = max([n for n in range(size // 2 + 1) for i in range(size - n + 1) for j in range(i + n, size - n + 1) if found[i:i + n] == found[j:j + n]],
               default=0)
    assert tinystories.longest_repeat(" ".join(found)) == (best / (size // 2) if size > 1 else 0.0)


def test_metrics_tell_one_story_told_twice_from_two_stories():
    same, other = tinystories.metrics(["a b c d", "a b c d"]), tinystories.metrics(["a b c d", "e f g h"])
    assert (same["self_similarity"], other["self_similarity"]) == (1.0, 0.0)
    assert (same["distinct_1"], other["distinct_1"], same["distinct_3"]) == (0.5, 1.0, 0.5)
    assert tinystories.metrics([]) == dict.fromkeys(same, 0.0) and same["words"] == 4
