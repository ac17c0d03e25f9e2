"""MATH-500: gold answers score 1, others 0, in order; hostile answers score 0, and the next answer is still scored right."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hildalib import HildaError, corpora, evaluate, tasks, verifier
from hildalib.tasks import math500

PROBLEMS = [  # answer, another way to write it, a wrong one
    ("42", "6 \\cdot 7", "41"), ("\\frac{3}{4}", "0.75", "\\frac{4}{3}"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", "(\\pi/2, 3)"),
    ("2\\sqrt{13}", "\\sqrt{52}", "\\sqrt{26}"), ("x^2 - 1", "(x-1)(x+1)", "(x-1)^2"), ("[-2,7]", "[-2, 7.0]", "(-2,7]"),
    ("\\text{even}", "\\text{ even }", "\\text{odd}"), ("1000", "1{,}000", "100"), ("-5", "x = -5", "5")]
DEEP = "\\frac{1}{" * 10_000 + "1" + "}" * 10_000
SLOW = ["9^{9^{9^9}}", "100000000!", "\\sum_{n=1}^{10^9} \\frac{1}{n^2}"]  # each would compute for hours
HOSTILE = ["", "\\boxed{", "\\boxed{}", "\\boxed{" * 100_000, "}" * 1_000_000, "\\boxed{" + "9" * 1_000_000 + "}", "\\boxed{" + DEEP + "}",
           "x" * 1_000_000, "\\boxed{" + "\\frac{1}{" * 18 + "1" + "}" * 19, "\\boxed{" + "(" * 199 + "}", "\\boxed{٤٢}", "\\boxed{４２}",
           "\\boxed{\ud800}", "\\boxed{\0}", "\\boxed{42\n41}", "\\boxed{__import__('os').system('true')}", "\\boxed{$}", "\\boxed{1/0}",
           "42", "$42$", None, 42, b"\\boxed{42}"]


@pytest.fixture(scope="module")
def items():
    """Own problems in the form of the published ones."""
    return [{"problem": f"Problem {n}?", "solution": f"It is $\\boxed{{{answer}}}$.", "answer": answer} for n, (answer, _, _) in enumerate(PROBLEMS)]


@pytest.fixture
def published():
    if not os.environ.get("HILDA_DATA"):
        pytest.skip("HILDA_DATA is not set: the MATH-500 file is not here")
    return math500.items("test")


def box(answer):
    return f"Some steps, \\boxed{{0}}, and so it is $\\boxed{{{answer}}}$."


# ---- right and wrong ------------------------------------------------------------------------------------------------------------

def test_gold_equal_and_wrong_answers_are_told_apart_in_order(items):
    texts = [math500.response(item) for item in items] + [box(other) for _, other, _ in PROBLEMS] + [box(wrong) for *_, wrong in PROBLEMS]
    assert math500.scores(texts, items * 3) == [1.0] * 2 * len(items) + [0.0] * len(items)
    mixed = [box(PROBLEMS[n][1 + n % 2]) for n in range(len(items))] * 3
    assert math500.scores(mixed, items * 3) == [1.0 - n % 2 for n in range(len(items))] * 3
    assert math500.score(texts[-1], items[-1]) == 0.0 and math500.score(box("\\frac{84}{2}"), items[0]) == 1.0


def test_every_published_gold_solution_scores_one(published):
    assert len(published) == 500 and all(math500.boxed(math500.response(item)) == item["answer"] for item in published)
    assert math500.scores([math500.response(item) for item in published], published) == [1.0] * 500
    assert all(verifier.equal([(item["answer"], item["answer"]) for item in published]))  # math-verify itself rejects none


def test_published_whole_numbers_equal_their_fractions_and_not_their_neighbours(published):
    whole = [item for item in published if item["answer"].isdecimal()]
    assert len(whole) > 250
    assert math500.scores([box(f"\\frac{{{2 * int(item['answer'])}}}{{2}}") for item in whole], whole) == [1.0] * len(whole)
    assert math500.scores([box(int(item["answer"]) + 1) for item in whole], whole) == [0.0] * len(whole)


def test_the_solution_of_another_published_problem_scores_zero(published):
    others = published[1:] + published[:1]
    same = [float(item["answer"].removeprefix("x=") == other["answer"].removeprefix("x=")) for item, other in zip(published, others)]
    assert math500.scores([math500.response(other) for other in others], published) == same and sum(same) < 10


def test_only_the_last_closed_box_counts():
    for text, answer in [("\\boxed{1} or \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}} x", "\\frac{1}{2}"), ("\\boxed{1} \\boxed{2", ""),
                         ("boxed{1}", ""), ("\\boxed{ 7 }", "7"), ("\\boxed{" + "1" * 200 + "}", "1" * 200), ("\\boxed{" + "1" * 201 + "}", "")]:
        assert math500.boxed(text) == answer


# ---- hostile --------------------------------------------------------------------------------------------------------------------

def test_hostile_texts_score_zero_and_the_next_answer_is_scored_right(items, monkeypatch):
    monkeypatch.setattr(verifier, "SECONDS", 1.0)
    monkeypatch.setattr(verifier, "PATIENCE", 60)  # as many seconds on the clock as ever: the machine may be busy
    texts = HOSTILE + [box(answer) for answer in SLOW]
    mixed = [text for hostile in texts for text in (hostile, box("\\frac{84}{2}"))]
    assert math500.scores(mixed, [items[0]] * len(mixed)) == [0.0, 1.0] * len(texts)


def test_a_worker_that_hangs_or_dies_is_replaced_by_another(monkeypatch):
    monkeypatch.setattr(verifier, "SECONDS", 1.0)
    monkeypatch.setattr(verifier, "PATIENCE", 60)  # as many seconds on the clock as ever: the machine may be busy
    monkeypatch.setattr(verifier, "WORKERS", 1)
    verifier.close()
    found = []
    for pair in [("42", "6 \\cdot 7"), ("42", "9^{9^{9^9}}"), ("42", "6 \\cdot 7")]:
        found.append(verifier.equal([pair])[0])
        if verifier._idle.qsize():
            worker = verifier._take()
            worker.kill()  # as the system does when memory runs out
            worker.wait()
            verifier._idle.put(worker)
    assert found == [True, False, True]
    assert verifier._take() is not worker


def test_the_worker_stays_alive_from_one_call_to_the_next():
    verifier.close()
    assert verifier.equal([("1", "1")]) == [True] and verifier._idle.qsize() == 1
    worker = verifier._take()
    verifier._idle.put(worker)
    assert verifier.equal([("1", "2")]) == [False] and verifier._take() is worker
    verifier._end(worker)
    assert worker.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is known to limit a process's address space")
def test_memory_of_a_worker_is_limited():
    code = "from hildalib import verifier; verifier._limit_memory(); bytearray(2 * verifier.MEMORY)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "MemoryError" in done.stderr


def test_workers_let_sympy_evaluate_numbers_and_no_other_text(monkeypatch):
    import sympy
    from sympy.parsing import sympy_parser

    monkeypatch.setattr(sympy_parser, "eval_expr", sympy_parser.eval_expr)  # put back afterwards
    verifier._evaluate_numbers_only()
    assert sympy.Number("17") == 17 and sympy.Number("0.5") == 0.5
    for text in ("2+2", "x", "__import__('os')", "lambda: 1"):
        with pytest.raises((ValueError, sympy.SympifyError)):
            sympy.sympify(text)


def test_a_missing_library_is_an_error_and_not_a_score_of_zero(items, tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verifier.close()
    with pytest.raises(HildaError, match=r"no antlr.*pip install 'math-verify"):
        math500.score(box("43"), items[0])


# ---- as a task ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def data(items, tmp_path, monkeypatch):
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500/test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    monkeypatch.setenv("HILDA_DATA", str(tmp_path))


def test_items_are_a_seeded_sample_in_file_order_and_the_corpus_holds_their_prompts(items, data):
    task = tasks.load("math500")
    samples = [task.items("test", 4, seed) for seed in range(5)]
    assert task.items("test") == items and samples == [task.items("test", 4, seed) for seed in range(5)]
    assert all([item for item in items if item in sample] == sample for sample in samples)
    assert len({str(sample) for sample in samples}) > 2
    assert math500.prompt(items[0]) == "Question: Problem 0?\nSolve the problem step by step. Put the final answer in \\boxed{}.\nAnswer:"
    corpus = corpora.load("math500", split="test")
    assert corpus["prompt"] == [task.prompt(item) for item in items] and corpus["response"] == [task.response(item) for item in items]
    assert corpora.provenance(corpus)["licence"] == "MIT"


def test_there_is_nothing_to_train_or_tune_on(data):
    for split in ("train", "validation"):
        with pytest.raises(HildaError, match=f"no split '{split}'.*tune on gsm8k"):
            math500.items(split)
    with pytest.raises(HildaError, match="unknown split 'dev'"):
        math500.items("dev")


def test_evaluation_scores_a_batch_at_once_where_the_task_can(monkeypatch):
    batches = []
    task = SimpleNamespace(name="fake", items=lambda split, limit, seed: [1, 2, 3], prompt=str, score=None,
                           scores=lambda texts, part: batches.append((texts, part)) or [float(n == 2) for n in part])

    class Tokenizer:
        def __call__(self, texts, **_):
            return {"input_ids": [[5]] * len(texts)}

        def batch_decode(self, ids, **_):
            return [f"text {n}" for n in range(len(ids))]

    def decoder(model, ids, real):
        return SimpleNamespace(ids=ids, forwards=torch.ones(len(ids)), positions_fed=torch.ones(len(ids)), kv_bytes=None)

    monkeypatch.setattr(evaluate, "eos_ids", lambda model: [0])
    frame = evaluate.run(SimpleNamespace(device="cpu"), Tokenizer(), task, decoder, batch_size=2)
    assert frame.score.tolist() == [0.0, 1.0, 0.0]
    assert batches == [(["text 0", "text 1"], [1, 2]), (["text 0"], [3])]
