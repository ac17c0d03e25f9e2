"""The harness' model class: its generations and likelihoods are those of evaluate and objective, also through lm_eval's own command line."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

pytest.importorskip("lm_eval")
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hildalib import HildaError, backbones, evaluate, objective, paths, tasks  # noqa: E402
from hildalib.decoding import ar_decode, edit_decode, settings_for  # noqa: E402
from hildalib.harness import HildaLM  # noqa: E402

LOCAL = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
GENERATION = LOCAL + """task: tiny_generation
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE = LOCAL + """task: tiny_choice
output_type: multiple_choice
doc_to_choice: ["12", "7+1"]
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def _task(folder, text, rows):
    """A task folder with one local YAML and its rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(text.format(file=folder / "rows.jsonl"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def _requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


def test_a_generation_task_gives_the_numbers_of_evaluate(tmp_path):
    pair, task = tiny(1, sharpen=7.0), tasks.load("arithmetic")
    frame = evaluate.run(*pair, task, evaluate.diffusion(settings_for("S", max_new_tokens=12)), limit=6)
    rows = [{"prompt": prompt, "answer": text if n % 3 else "no"} for n, (prompt, text) in enumerate(zip(frame.prompt, frame.text))]
    manager = _task(tmp_path, GENERATION, rows)
    found = lm_eval.simple_evaluate(HildaLM(pair, mode="S", batch_size=4), tasks=["tiny_generation"], task_manager=manager, bootstrap_iters=0)
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"]["tiny_generation"]}
    assert [texts[n] for n in range(6)] == frame.text.tolist() and len({*texts.values()}) > 3
    assert found["results"]["tiny_generation"]["exact_match,none"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("block_size", [None, 1])
def test_a_likelihood_task_gives_the_numbers_of_the_elbo(tmp_path, block_size):
    model, tokenizer = tiny(2, sharpen=3.0)
    lm = HildaLM((model, tokenizer), samples=6, seed=3, batch_size=8, block_size=block_size)
    prompts, scores = ["1+2=", "9-", "3+"], {}
    manager = _task(tmp_path, CHOICE, [{"prompt": prompt, "label": 0} for prompt in prompts])
    found = lm_eval.simple_evaluate(lm, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0)
    for sample in found["samples"]["tiny_choice"]:
        for choice, (value, _) in zip(("12", "7+1"), sample["filtered_resps"]):
            scores[sample["doc"]["prompt"], choice] = float(value)
    for (prompt, choice), value in scores.items():
        ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
        maskable = (torch.arange(ids.shape[1]) >= len(prompt))[None]
        if block_size == 1:  # an independent oracle: the plain forward
            logits = model(input_ids=ids).logits[:, :-1].float()
            logits[..., model.config.hilda["mask_token_id"]] = -torch.inf
            expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")[:, len(prompt) - 1:].sum()
        else:
            expected = objective.elbo(model, ids.expand(6, -1), maskable.expand(6, -1), block_size=4, samples=1,
                                      generator=torch.Generator().manual_seed(3)).mean()
            exact = objective.exact_elbo(model, ids, maskable, block_size=4).item()
            many = HildaLM((model, tokenizer), samples=800, batch_size=200).score(ids[0, :len(prompt)].tolist(), ids[0, len(prompt):].tolist())
            assert -many == pytest.approx(exact, rel=0.06)
        assert value == pytest.approx(-expected.item(), rel=1e-4)
    right = [scores[prompt, "12"] > scores[prompt, "7+1"] for prompt in prompts]
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / 3)


@pytest.mark.parametrize("block_size", [None, 1])
def test_greedy_is_what_the_decoder_writes(block_size):
    lm = HildaLM(tiny(1, sharpen=7.0), block_size=block_size)
    for prompt in ("1+2=", "77", "3"):
        context = torch.tensor([lm.tok_encode(prompt)])
        ar, settings = block_size == 1, settings_for("Q", max_new_tokens=4)
        own = (ar_decode(lm.model, context, max_new_tokens=4) if ar else edit_decode(lm.model, context, settings)).ids[0].tolist()
        assert lm.greedy(context[0].tolist(), own) and not any(lm.greedy(context[0].tolist(), [*own[:n], own[n] ^ 1, *own[n + 1:]]) for n in range(4))


def test_rolling_likelihoods_add_up_over_windows_and_long_contexts_lose_their_beginning():
    lm = HildaLM(tiny(2, sharpen=3.0, max_length=16), block_size=1)
    text = "1+2=3;4+5=9;6-1=5;7+7=14"
    ids = lm.tok_encode(text)
    first, second = lm.score([lm.prefix_token_id], ids[:15]), lm.score(ids[:15][-7:], ids[15:])
    total, = lm.loglikelihood_rolling(_requests("loglikelihood_rolling", (text,)))
    assert total == pytest.approx(first + second, rel=1e-5) and len(ids) == 24
    assert lm.score(ids[:20], ids[20:]) == pytest.approx(lm.score(ids[8:20], ids[20:]), rel=1e-6)
    long = lm.generate_until(_requests("generate_until", (text, {"until": [";"], "max_gen_toks": 6})))
    assert long == lm.generate_until(_requests("generate_until", (text[-10:], {"until": ";", "max_gen_toks": 6}))) and ";" not in long[0]
    with pytest.raises(HildaError, match="leaves no room"):
        lm.generate_until(_requests("generate_until", ("1", {"max_gen_toks": 16})))


def test_a_model_without_shift_has_no_autoregressive_mode_and_an_ar_model_is_refused():
    with pytest.raises(HildaError, match="leave block_size out"):
        HildaLM(tiny(shift=False), block_size=1)
    with pytest.raises(HildaError, match="not yet a dLLM"):
        HildaLM(tiny(block_size=None))


def test_the_command_line_of_lm_eval_finds_the_model(tmp_path):
    folder = backbones.save(*tiny(1, sharpen=7.0), tmp_path / "model")
    _task(tmp_path, GENERATION, [{"prompt": "1+2=", "answer": "3"}, {"prompt": "7+", "answer": "3"}])
    command = [sys.executable, "-m", "hildalib.harness", "--model", "hilda", "--model_args", f"pretrained={folder},mode=S,tau_edit=1,dtype=float32",
               "--include_path", str(tmp_path), "--tasks", "tiny_generation", "--device", "cpu", "--batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hilda (" in done.stdout and "tiny_generation" in done.stdout
