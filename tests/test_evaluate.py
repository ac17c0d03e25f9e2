"""Scores, costs and intervals against known tokens, published numbers and direct computation."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import EOS, tiny

from hildalib import HildaError, evaluate, tasks
from hildalib.decoding import Decoded, EditSettings, ar_decode, edit_decode
from hildalib.intervals import mean_interval, sign_test, t_quantile, wilson


def fake_task(answers):
    """Items are numbers; the right answer to n is answers[n]."""
    return SimpleNamespace(name="fake", items=lambda split, limit=None, seed=0: [*range(len(answers))][:limit] if split == "test" else [],
                           prompt=lambda n: "1+" * n + "2=", score=lambda text, n: float(text == answers[n]))


def scripted(tokenizer, lines, calls):
    """A decoder that writes known texts: batch by batch the next of `lines`; row r of a batch costs 2 + r forwards."""
    def decode(model, ids, real):
        done = sum(len(call[0]) for call in calls)
        calls.append((ids, real))
        rows = [tokenizer(line, add_special_tokens=False)["input_ids"] + [EOS] for line in lines[done:done + len(ids)]]
        width = 8
        return Decoded(torch.tensor([row + [EOS] * (width - len(row)) for row in rows]), torch.arange(len(ids)) + 2, torch.full((len(ids),), 40))
    return decode


def test_known_tokens_give_exact_scores_tokens_and_tokens_per_forward():
    model, tokenizer = tiny()
    calls = []
    frame = evaluate.run(model, tokenizer, fake_task(["3", "4", "55"]), scripted(tokenizer, ["3", "44", "55"], calls), batch_size=2)
    assert frame.text.tolist() == ["3", "44", "55"] and frame.score.tolist() == [1.0, 0.0, 1.0]
    assert frame.tokens.tolist() == [2, 3, 3]  # the first EOS counts, the padding after it does not
    assert frame.forwards.tolist() == [2, 3, 2] and frame.positions_fed.tolist() == [40] * 3
    assert [tuple(ids.shape) for ids, _ in calls] == [(2, 4), (1, 6)] and calls[0][1].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    row = evaluate.summary(frame).iloc[0]
    assert (row.accuracy, row["items"], row.nfe, row.positions_fed) == (2 / 3, 3, 7 / 3, 40)
    assert row.tpf == 8 / 7 and row.tokens == 8 / 3 and row.tokens_per_s == pytest.approx(8 / frame.seconds.sum())
    assert (row.low, row.high) == pytest.approx(wilson(2, 3))


def test_a_row_without_eos_counts_all_its_tokens():
    ids = torch.tensor([[7, 8, EOS, EOS], [7, 8, 9, 9], [EOS, 7, EOS, 7]])
    assert evaluate.generated_tokens(ids, [EOS]).tolist() == [3, 4, 1]
    assert evaluate.generated_tokens(ids, [EOS, 9]).tolist() == [3, 3, 1]


def test_an_empty_split_is_an_error_that_names_task_and_split():
    model, tokenizer = tiny()
    with pytest.raises(HildaError, match="task fake: split 'validation' is empty"):
        evaluate.run(model, tokenizer, fake_task(["1"]), None, split="validation")


def test_the_decoders_of_run_are_the_decoders_themselves():
    model, tokenizer = tiny(sharpen=6.0)
    ids, real = evaluate.left_pad([[5, 6], [7, 8, 9, 10]], EOS)
    assert ids.tolist() == [[EOS, EOS, 5, 6], [7, 8, 9, 10]] and real.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    settings = EditSettings(max_new_tokens=9, temperature=0.7)
    ours = evaluate.diffusion(settings, seed=3)
    direct = edit_decode(model, ids, settings, attention_mask=real, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours(model, ids, real).ids, direct.ids) and torch.equal(ours(model, ids, real).ids, direct.ids)  # each call begins anew
    twin = evaluate.autoregressive(9)(model, ids, real)
    assert torch.equal(twin.ids, ar_decode(model, ids, attention_mask=real, max_new_tokens=9).ids)


def test_likelihood_is_the_mean_of_the_log_probabilities_of_the_text_alone():
    model, tokenizer = tiny(sharpen=4.0)
    prompts, texts = ["12+3=", "", "7", "9-9="], ["15;15", "1+2", "", "0"]
    found = evaluate.likelihood(model, tokenizer, prompts, texts, batch_size=3)
    for prompt, text, value in zip(prompts, texts, found):
        head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        if not tail:
            assert math.isnan(value)
            continue
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
        row = head + tail
        direct = [-logp[i - 1, row[i]].item() for i in range(max(len(head), 1), len(row))]  # the very first token has no context
        assert value == pytest.approx(sum(direct) / len(direct), abs=1e-5)


@pytest.mark.parametrize("successes, trials, low, high", [  # computed from the closed form with z = 1.959964; 81/263 is in Newcombe (1998), table I
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)])
def test_wilson_intervals_of_the_literature(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("more, fewer", [(0, 0), (1, 0), (12, 2), (2, 12), (7, 7), (600, 500)])
def test_the_sign_test_is_the_binomial_one(more, fewer):
    gaps = [0.3] * more + [-0.1] * fewer + [0.0, float("nan")]
    chances = np.array([math.comb(more + fewer, k) / 2 ** (more + fewer) for k in range(more + fewer + 1)])
    expected = chances[chances <= chances[more] * (1 + 1e-9)].sum()  # every split that is no likelier
    assert sign_test(gaps) == pytest.approx(expected)



@pytest.mark.parametrize("freedom, quantile", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_t_quantiles_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-3 if freedom == 1 else 1e-4)


def test_a_mean_over_seeds_has_the_t_interval_and_a_single_seed_none():
    tables = {seed: pd.DataFrame({"arm": ["a", "b"], "accuracy": [value, 0.5], "tpf": [value, 2.0]}) for seed, value in enumerate((0.1, 0.2, 0.6))}
    table = evaluate.across_seeds(tables, ["arm"], ["accuracy", "tpf"], shares=("accuracy",)).set_index("arm")
    half = 4.302653 * pd.Series([0.1, 0.2, 0.6]).std() / 3 ** 0.5
    assert table.loc["a", ["tpf", "tpf_low", "tpf_high"]].tolist() == pytest.approx([0.3, 0.3 - half, 0.3 + half], abs=1e-4)
    assert half > 0.3 and table.loc["a", ["accuracy_low", "accuracy_high"]].tolist() == pytest.approx([0.0, 0.3 + half], abs=1e-4)
    assert table.loc["b", ["accuracy_low", "accuracy_high"]].tolist() == pytest.approx([0.5, 0.5]) and table.n_seeds.tolist() == [3, 3]
    lonely = evaluate.across_seeds({0: tables[0]}, ["arm"], ["accuracy"])
    assert lonely.accuracy.tolist() == [0.1, 0.5] and lonely.accuracy_low.isna().all() and mean_interval([2.0])[0] == 2.0


def test_seeds_are_joined_by_every_key():
    table = pd.DataFrame({"arm": ["a", "a"], "tau": [0.5, 0.9], "x": [1.0, 2.0]})
    joined = evaluate.across_seeds({0: table, 1: table.iloc[:1]}, ["arm", "tau"], ["x"])
    assert json.loads(joined[["arm", "tau", "n_seeds", "x"]].to_json(orient="values")) == [["a", 0.5, 2, 1.0], ["a", 0.9, 1, 2.0]]


def test_an_opening_is_continued_and_a_question_is_asked():
    """In a chat, prompts that open a text are not a user's turn."""
    class Chatty:
        chat_template = "x"

        def apply_chat_template(self, turns, **_):
            return f"<{turns[0]['content']}>"

    assert evaluate.worded(tasks.load("arithmetic"), Chatty(), ["1+1="], True) == ["<1+1=>"]
    assert evaluate.worded(tasks.load("arithmetic"), Chatty(), ["1+1="], False) == ["1+1="]
    assert evaluate.worded(tasks.load("tinystories"), Chatty(), ["Once"], True) == ["Once"]
