"""Weights in fewer bits: what is kept, what it takes, and that decoding goes on; torchao where it is installed."""

import pytest
import torch
from tiny import MASK, tiny

from hildalib import HildaError, formats
from hildalib.decoding import EditSettings, edit_decode

torchao = pytest.mark.skipif(not pytest.importorskip("importlib.util").find_spec("torchao"), reason="torchao, an optional package, is not installed")
PROMPT = torch.tensor([[5, 6, 7]])


def text_of(model):
    return edit_decode(model, PROMPT, EditSettings(tau_mask=0.5, max_new_tokens=12, stop_at_eos=False)).ids


def test_float32_is_the_model_and_bfloat16_half_of_it():
    model, _ = tiny(1, causal=True, sharpen=6.0)
    same, half = formats.convert(model, "float32"), formats.convert(model, "bfloat16")
    assert torch.equal(text_of(same), text_of(model)) and same is not model
    held = sum(p.nbytes for p in model.parameters())
    assert formats.weight_bytes(half) < formats.weight_bytes(same) and abs(formats.weight_bytes(same) - held) <= 64  # and the rotary frequencies
    assert not (text_of(half) == MASK).any() and next(model.parameters()).dtype == torch.float32


@torchao
@pytest.mark.parametrize("name, bits", [("int8", 8), ("int8, rows too", 8), ("int4", 4)])
def test_torchao_weights_are_near_and_no_weight_is_left_out(name, bits):
    model, _ = tiny(1, causal=True, sharpen=6.0)
    made = formats.convert(model, name)
    for (where, plain), (_, quantised) in zip(model.named_modules(), made.named_modules()):
        if isinstance(plain, torch.nn.Linear):
            off = (quantised.weight.dequantize() - plain.weight).abs()
            rows = plain.weight.abs().amax(1, keepdim=True)
            assert (off <= rows / (2**(bits - 1) - 1) * 1.01).all() and off.max() > 0, where  # a step, for the scale may be asymmetric
    assert not (text_of(made) == MASK).any()
    if name == "int8":
        assert formats.weight_bytes(made) < formats.weight_bytes(model)


def test_a_format_that_does_not_run_says_why_in_its_row(monkeypatch):
    model, _ = tiny(1, causal=True)
    monkeypatch.setitem(formats.FORMATS, "int4, packed", "NoSuchConfig")
    rows = formats.table(model, ["float32", "int4, packed"], size=4, context=8)
    assert rows.milliseconds[0] > 0 and rows.reason[0] == "" and rows.megabytes[0] == pytest.approx(formats.weight_bytes(model) / 1e6)
    assert "does not run here" in rows.reason[1] and rows.milliseconds.isna()[1]
    assert formats.table(model, [], size=4, context=8).query("reason == ''").empty
    with pytest.raises(HildaError, match="'int3' is unknown"):
        formats.convert(model, "int3")
