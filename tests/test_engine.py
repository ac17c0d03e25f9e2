"""The engine: the text of the decoder, batched = alone, steps that replay to the answer, stops, rows that leave; dInfer against a stand-in."""

import json
import logging
import sys
import types

import pytest
import torch
from tiny import EOS, MASK, tiny

import hildalib
from hildalib import HildaError, engine as engines
from hildalib.decoding import ar_decode, edit_decode, self_speculate, settings_for
from hildalib.engine import OWN, Answer, Choices, DInferEngine, Engine, Step, open_engine

PROMPTS = ["1+2=", "7", "12-3+45=", "9+9=1;8+8=", "0"]


def an_engine(seed=0, **options):
    return Engine(*tiny(seed, sharpen=7.0, **options))


def test_the_text_is_that_of_the_decoder_and_of_hildalib_generate():
    engine = an_engine()
    ids = torch.tensor([engine.encode("1+2=")])
    for mode in "SQ":
        decoded = edit_decode(engine.model, ids, settings_for(mode, max_new_tokens=20))
        answer, = engine.answers([ids[0].tolist()], Choices(mode, max_new_tokens=20))
        assert answer.text == engine.tokenizer.decode(decoded.ids[0], skip_special_tokens=True) == engine.generate("1+2=", mode, max_new_tokens=20)
        assert answer.text == hildalib.generate("1+2=", model=(engine.model, engine.tokenizer), mode=mode, max_new_tokens=20)
        ended = EOS in decoded.ids[0].tolist()
        assert (answer.finish, answer.forwards, answer.prompt_tokens) == ("stop" if ended else "length", int(decoded.forwards[0]), 4)
        assert answer.tokens == (decoded.ids[0].tolist().index(EOS) + 1 if ended else 20)


def test_own_text_is_that_of_block_size_1_in_fewer_forwards():
    saved = 0
    for seed in range(4):
        engine, choices = an_engine(seed, causal=True), Choices(OWN, max_new_tokens=17)
        prompts = [engine.encode(prompt) for prompt in PROMPTS]
        for ids, answer in zip(prompts, engine.answers(prompts, choices)):
            plain = ar_decode(engine.model, torch.tensor([ids]), max_new_tokens=17)
            decoded = self_speculate(engine.model, torch.tensor([ids]), max_new_tokens=17)
            assert answer.text == engine.decode(plain.ids[0].tolist()) and answer.forwards == int(decoded.forwards) and answer == engine.answers([ids], choices)[0]
            saved += int(plain.forwards) - answer.forwards
        assert engine.generate(PROMPTS[0], OWN, max_new_tokens=17) == hildalib.generate(PROMPTS[0], (engine.model, engine.tokenizer), OWN, max_new_tokens=17)
    assert saved > 0


def test_own_text_has_no_thresholds_and_needs_a_causal_context():
    for wrong in ({"tau_mask": 0.5}, {"tau_edit": 1.0}, {"temperature": 0.5}):
        with pytest.raises(HildaError, match="leave tau_mask, tau_edit and temperature out"):
            an_engine(causal=True).generate("1+2=", OWN, **wrong)
    with pytest.raises(HildaError, match="convert one with causal_context: true"):
        an_engine().generate("1+2=", OWN)
    with pytest.raises(HildaError, match="max_new_tokens = 0"):
        an_engine(causal=True).generate("1+2=", OWN, max_new_tokens=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_of_a_batch_is_answered_as_alone(causal, temperature):
    forwards = set()
    for seed in range(4):
        engine, choices = an_engine(seed, causal=causal), Choices("Q", max_new_tokens=13, temperature=temperature, seed=seed)
        prompts = [engine.encode(prompt) for prompt in PROMPTS]
        together = engine.answers(prompts, choices)
        assert together == [engine.answers([ids], choices)[0] for ids in prompts]
        forwards |= {answer.forwards for answer in together}
    assert len(forwards) > 2  # rows did finish apart


@pytest.mark.parametrize("mode", ["S", OWN])
def test_steps_replay_to_the_answer_and_closed_text_only_grows(mode):
    edits = 0
    for seed in range(4):
        engine, choices = an_engine(seed, causal=mode == OWN), Choices(mode, max_new_tokens=14)
        canvas, texts, counts, answers = [{} for _ in PROMPTS], [""] * 5, [0] * 5, {}
        for row, event in engine.stream([engine.encode(prompt) for prompt in PROMPTS], choices, steps=True):
            if isinstance(event, Answer):
                answers[row] = event
                continue
            counts[row] += 1
            assert event.forward == counts[row] and event.text.startswith(texts[row]) and row not in answers
            texts[row] = event.text
            for place, token, sure in event.written:
                assert place not in canvas[row] and token != MASK and 0 < sure <= 1
                canvas[row][place] = token
            for place, old, token, sure in event.edited:
                assert canvas[row][place] == old != token
                canvas[row][place] = token
                edits += 1
        for row, answer in answers.items():
            ids = [canvas[row][place] for place in range(answer.tokens)]
            assert engine.decode(ids) == answer.text == texts[row] and counts[row] == answer.forwards
        assert len(answers) == len(PROMPTS)
    assert edits


def test_a_text_is_cut_at_its_first_stop_string_and_its_row_ends_early():
    cuts = 0
    for seed in range(5):
        engine, choices = an_engine(seed), Choices("Q", max_new_tokens=24)
        ids = engine.encode("1+2=")
        whole, = engine.answers([ids], choices)
        for stop in {*whole.text[3:9]}:
            answer, = engine.answers([ids], choices, [stop, "never"])
            assert answer.text == whole.text.split(stop)[0] and answer.finish == "stop"
            assert answer.tokens == len(answer.text) + 1 and answer.forwards <= whole.forwards  # one character a token
            cuts += answer.forwards < whole.forwards
        assert engine.answers([ids], choices, ["never"]) == [whole]
    assert cuts


def test_a_row_that_leaves_gets_no_answer_and_changes_no_other():
    engine, choices = an_engine(1), Choices("Q", max_new_tokens=24)
    prompts, seen = [engine.encode(prompt) for prompt in PROMPTS], []
    events = list(engine.stream(prompts, choices, steps=True, gone=lambda row: row == 2 and bool(seen.append(1)) is False and len(seen) > 3))
    answers = {row: event for row, event in events if isinstance(event, Answer)}
    assert answers == {row: answer for row, answer in enumerate(engine.answers(prompts, choices)) if row != 2}
    assert sum(row == 2 for row, _ in events) == 3
    assert not list(engine.stream(prompts, choices, gone=lambda row: True))


@pytest.mark.parametrize("prompt, options, message", [
    ("", {}, "at least one token"), ("1[MASK]2", {}, "contains \\[MASK\\]"),
    ("1" * 500, {"max_new_tokens": 13}, "need 513 positions, the model's context is 512"),
    ("1", {"mode": "X"}, "mode 'X' is unknown"), ("1", {"tau_mask": 2.0}, "outside"), ("1", {"max_new_tokens": 0}, "at least 1"),
    ("\ud800", {}, "not valid Unicode")])
def test_what_cannot_be_decoded_is_refused(prompt, options, message):
    with pytest.raises(HildaError, match=message):
        an_engine().generate(prompt, **options)


def test_an_autoregressive_model_is_refused():
    with pytest.raises(HildaError, match="not yet a dLLM"):
        an_engine(block_size=None)


# ---- dInfer ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def dinfer(monkeypatch, tmp_path):
    """A stand-in of the package with the call shapes of v0.2, and a folder of a LLaDA2 checkpoint without weights."""
    class SamplingParams:
        def __init__(self, threshold=0.9, low_threshold=0.6, cache="dual", temperature=0., early_stop=True, cont_weight=0.3, prefix_look=16,
                     after_look=16, warmup_steps=4, enable_torch_compile=True, mask_id=156895, eos_id=156892, parallel_decoding="threshold",
                     use_credit=False, use_bd=True, max_length=4096, ep_size=1, prefilling_limit=256, mini_batch_size=1, batch_size=1,
                     use_naive_batching=False):
            self.threshold, self.mask_id, self.eos_id, self.use_bd = threshold, mask_id, eos_id, use_bd

    class DiffusionLLMServing:
        def __init__(self, model, model_type="llada2", sample_params=None, server_port=None, num_gpus=None, dp_size=None, tpep_size=None,
                     backend="sglang", timeout=None, max_retries=3, start_port=30000, end_port=60000):
            assert model_type.startswith("llada2") and backend == "sglang" and dp_size * tpep_size <= num_gpus
            self.params, self.num_forwards = sample_params, 0

        def generate(self, prompts, gen_length=128, block_length=128, chat_uuid=None):
            assert prompts.ndim == 2 and prompts.dtype == torch.long and block_length == 32 and gen_length % block_length == 0
            self.num_forwards = 3
            own = torch.full((len(prompts), gen_length), self.params.eos_id)
            own[:, :4] = prompts[:, :1] + torch.arange(4)
            return torch.cat([prompts, own], 1)

    module = types.ModuleType("dinfer")
    module.SamplingParams, module.DiffusionLLMServing, module.__spec__ = SamplingParams, DiffusionLLMServing, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "dinfer", module)
    monkeypatch.setattr(engines, "cuda_fault", lambda: "")
    tiny()[1].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada2_moe"}))
    return tmp_path


def test_dinfer_gets_what_its_published_calls_take(dinfer):
    engine = open_engine(dinfer)
    assert isinstance(engine, DInferEngine) and engine.serving.params.mask_id == MASK and engine.serving.params.eos_id == EOS
    assert engine.generate("12", tau_edit=1.0, max_new_tokens=8) == "1234"
    answer, = engine.answers([engine.encode("12")], Choices(tau_edit=1.0, max_new_tokens=8), ["3"])
    assert answer == Answer("12", 2, 3, 3, "stop")
    assert engine.answers([engine.encode("5")], Choices(tau_edit=1.0, max_new_tokens=2))[0] == Answer("56", 1, 2, 3, "length")
    for choices, message in ((Choices(), "neither edits nor samples"), (Choices(tau_edit=1.0, tau_mask=0.9), "started with tau_mask = 0.7")):
        with pytest.raises(HildaError, match=message):
            engine.answers([[5]], choices)


def test_where_dinfer_cannot_work_the_reason_is_logged_or_raised(dinfer, monkeypatch, caplog, tmp_path):
    folder = hildalib.backbones.save(*tiny(), tmp_path / "model")
    with caplog.at_level(logging.INFO, "hildalib.engine"):
        assert type(open_engine(folder)) is Engine
    assert "dInfer has no class for model_type 'llama'" in caplog.text
    monkeypatch.setattr(engines, "cuda_fault", lambda: "no CUDA device")
    with pytest.raises(HildaError, match="dInfer cannot be used: no CUDA device; use the engine transformers"):
        open_engine(dinfer, "dinfer")
    monkeypatch.delitem(sys.modules, "dinfer")
    assert engines.dinfer_fault(dinfer) == "the package dinfer is not installed"
    with pytest.raises(HildaError, match="engine 'x' is unknown"):
        open_engine(folder, "x")


def test_step_is_what_one_forward_did():
    engine = an_engine()
    first = next(event for _, event in engine.stream([engine.encode("1+2=")], Choices(max_new_tokens=8), steps=True))
    assert isinstance(first, Step) and first.written and not first.edited
