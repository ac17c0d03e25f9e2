"""`hilda compare`: paired by prompt as 05 pairs, answers kept, names and modes of contestants, what is refused."""

import pandas as pd
import pytest
from tiny import tiny

from hildalib import HildaError, backbones, comparison, duel, evaluate, runs, tasks
from hildalib.__main__ import main
from hildalib.gated import gate


@pytest.fixture
def folders(tmp_path):
    """Two dLLMs and a model that predicts in place, untrained; their vocabulary is that of nano."""
    made = {}
    for name, seed, shift in (("one", 0, True), ("other", 1, True), ("plain", 2, False)):
        model, tokenizer = backbones.nano(32, 2, 2, seed=seed)
        model.config.hilda |= {"block_size": 4, "label_shift": shift, "causal_context": shift}
        made[name] = str(backbones.save(model, tokenizer, tmp_path / name))
    return made


CONTEST = duel.Contest(["arithmetic"], items=6, batch_size=4, max_new_tokens=6, dtype="float32", chat=False)


def test_answers_are_those_of_evaluate_and_differences_those_of_comparison(folders, tmp_path):
    table = duel.compare([f"ours={folders['one']}:own", f"{folders['other']}:S", f"in place={folders['plain']}:single", f"ar={folders['one']}:ar"], CONTEST, tmp_path / "out")
    assert list(table.rival) == [f"{folders['other']}:S", "in place", "ar"] and set(table["items"]) == {6}
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    expected = comparison.paired(scores, "score", reference="ours")
    assert list(table.difference) == list(expected.difference) and list(table.p) == list(expected.p)
    model, tokenizer = backbones.load(folders["one"], dtype="float32", device="cpu")
    frame = evaluate.run(model, tokenizer, tasks.load("arithmetic"), evaluate.speculative(6), limit=6, batch_size=4)
    assert scores[scores.arm == "ours"].tokens.tolist() == frame.tokens.tolist() and table.our_tpf[0] == evaluate.summary(frame).tpf[0]
    assert scores[scores.arm == "ours"].tokens.tolist() == scores[scores.arm == "ar"].tokens.tolist()  # own text is the AR mode's
    assert pd.read_csv(tmp_path / "out" / "paired.csv").round(12).equals(table.round(12))


def test_answers_are_kept_until_the_model_changes(folders, tmp_path, monkeypatch):
    asked, run = [], evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda *a, **k: asked.append(1) or run(*a, **k))
    both = [f"a={folders['one']}:Q", f"b={folders['other']}:Q"]
    first = duel.compare(both, CONTEST, tmp_path / "out")
    assert duel.compare(both, CONTEST, tmp_path / "out").equals(first) and len(asked) == 2
    duel.compare([*both, f"c={folders['one']}:single"], CONTEST, tmp_path / "out")
    assert len(asked) == 3
    model, tokenizer = backbones.nano(32, 2, 2, seed=9)
    model.config.hilda |= {"block_size": 4, "causal_context": True}
    backbones.save(model, tokenizer, folders["other"])
    duel.compare(both, CONTEST, tmp_path / "out")
    assert len(asked) == 4


def test_answers_are_asked_again_when_what_adapters_lie_on_has_changed(tmp_path):
    model, tokenizer = backbones.nano(32, 2, 2)
    base = backbones.save(model, tokenizer, tmp_path / "base")
    adapted = gate(backbones.with_lora(backbones.load(base, dtype="float32", device="cpu")[0], 2))
    drafts, before = backbones.save(adapted, tokenizer, tmp_path / "drafts"), runs.digest(tmp_path / "drafts")
    assert runs.digest(drafts) == before
    backbones.save(backbones.nano(32, 2, 2, seed=1)[0], tokenizer, base)
    assert runs.digest(drafts) != before


def test_open_texts_are_measured_by_the_judge(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "likelihood", lambda judge, tokenizer, prompts, texts: [float(len(text)) for text in texts])

    class Stories:
        name, CONTINUES = "arithmetic", True
        items, prompt, score, metrics = tasks.load("arithmetic").items, tasks.load("arithmetic").prompt, lambda *_: 1.0, None

    monkeypatch.setattr(tasks, "load", lambda _: Stories)
    contest = duel.Contest(["stories"], items=6, open_items=3, batch_size=4, max_new_tokens=6, dtype="float32", chat=False, judge=folders["one"])
    table = duel.compare([f"a={folders['one']}:Q", f"b={folders['other']}:Q"], contest, tmp_path / "out")
    assert table.measure[0] == "nats a token" and table["items"][0] == 3 and table.theirs[0] > 0


def test_names_and_modes_of_contestants():
    assert duel.contestant("smollm2-135m-dllm") == ("smollm2-135m-dllm:own", "smollm2-135m-dllm", "own")
    assert duel.contestant(r"new=C:\models\mine:Q") == ("new", r"C:\models\mine", "Q")
    assert duel.contestant("C:/models/mine") == ("C:/models/mine:own", "C:/models/mine", "own")
    with pytest.raises(HildaError, match="mode 'fast' is unknown; use one of own, S, Q, single, ar"):
        duel.contestant("model:fast")


def test_what_cannot_be_compared_is_refused(folders, tmp_path, capsys):
    for mode in ("own", "ar"):
        with pytest.raises(HildaError, match="no left-to-right text"):
            duel.compare([f"{folders['plain']}:{mode}", folders["one"]], CONTEST, tmp_path / "out")
    with pytest.raises(HildaError, match="different names"):
        duel.compare([folders["one"], folders["one"]], CONTEST, tmp_path / "out")
    model, tokenizer = tiny(block_size=None)
    backbones.save(model, tokenizer, tmp_path / "ar")
    with pytest.raises(HildaError, match="is autoregressive; use"):
        duel.compare([f"{tmp_path / 'ar'}:Q", folders["one"]], CONTEST, tmp_path / "out")
    few = ["--tasks", "arithmetic", "--out", str(tmp_path / "cli"), "--items", "3", "--max-new-tokens", "4", "--bare"]
    assert main(["compare", f"a={folders['one']}", f"b={folders['other']}:Q", *few]) == 0
    assert "difference" in capsys.readouterr().out
