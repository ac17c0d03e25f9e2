"""A forward in straight lines gives the numbers of Transformers' modules (in bfloat16 to the bit), packed or not, and other models keep their own forward."""

import pytest
import torch
from tiny import MASK, tiny
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hildalib import attention
from hildalib.decoding import EditSettings, ar_decode, edit_decode, revise, self_speculate
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.forward import Forward, _attend, is_straight

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 23,
         "attn_implementation": "sdpa"}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}  # turns a position by how long the text is
MODELS = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
          "dynamic": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8, rope_parameters=DYNAMIC)),
          "stretched": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})),
          "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[name]().eval().to(dtype)


def two_forwards(model, straight, real=None, wanted=None, asked=None):
    """A context of 8, then 4 other tokens at different places in two rows; the logits of the second forward, the cache, and the
    first layer's keys before it."""
    forward, cache, generator = Forward(model), BlockCache(16), torch.Generator().manual_seed(1)
    forward.straight &= straight
    ids, start = torch.randint(23, (2, 12), generator=generator), torch.tensor([8, 4])
    for positions, wants in ((torch.arange(8).expand(2, -1), None), (start[:, None] + torch.arange(4), wanted)):
        mask = attention.window(positions, cache.at(positions).used, 4)
        later = positions.shape[1] == 4
        before = cache.keys[0].clone() if later else None
        with torch.inference_mode():
            out = forward((ids.gather(1, positions) + later) % 23, positions, mask, cache, wants, real=real if later else None, asked=asked if later else None)
    return out, cache, before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_models_own_forward(name, dtype):
    """In float32 RMSNorm is two fused operations instead of six, which round apart in the last bits; elsewhere the bits are the same."""
    assert is_straight(build(name, dtype))
    (ours, keys, _), (theirs, expected, _) = two_forwards(build(name, dtype), True), two_forwards(build(name, dtype), False)
    near = {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float32 else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(ours, theirs, **near)
    for layer in expected.keys:
        torch.testing.assert_close(keys.keys[layer], expected.keys[layer], **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("heads_of_bias", [None, 1, 6])
def test_heads_that_share_a_key_attend_as_if_each_had_its_own(dtype, rows, heads_of_bias):
    """Beside attention written out in float64, where each query head has a copy of its key head."""
    torch.manual_seed(0)
    queries = torch.randn(2, rows, 6, 8).to(dtype).transpose(1, 2)  # (b, H, Q, D), as a forward has them
    keys, values = torch.randn(2, 2, 2, 11, 8).to(dtype)  # two key heads for six of queries
    bias = None
    if heads_of_bias:
        seen = torch.rand(2, heads_of_bias, rows, 11) < 0.6
        seen[..., 0] = True
        bias = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
    scores = queries.double() @ keys.double().repeat_interleave(3, 1).mT / 8 ** 0.5
    expected = (scores if bias is None else scores + bias.double()).softmax(-1) @ values.double().repeat_interleave(3, 1)
    near = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(_attend(queries, keys, values, bias).double(), expected, atol=near, rtol=near)


@pytest.mark.parametrize("name", MODELS)
def test_rows_left_out_change_no_other_row_and_leave_no_key(name):
    whole, *_ = two_forwards(build(name), True)
    real, wanted = torch.tensor([[True, True, True, True], [True, True, False, False]]), torch.tensor([0, 2, 3, 4, 5, 6])
    asked = torch.tensor([True, False, True, False, True, False])
    part, cache, before = two_forwards(build(name), True, real, wanted, asked)
    assert torch.allclose(part[asked][:2], whole[wanted[asked]][:2], atol=1e-5) and (part[~asked] == 0).all()
    assert torch.equal(cache.keys[0][1, 6:], before[1, 6:]) and not torch.equal(cache.keys[0][1, 4:6], before[1, 4:6])


def test_other_models_keep_their_own_forward():
    model, _ = tiny()
    assert is_straight(model) and not is_straight(model.train()) and is_straight(model.eval())
    assert not is_straight(GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)).eval())
    sliding = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=4, max_window_layers=1)).eval()
    assert not is_straight(sliding)
    eager = tiny()[0]
    eager.set_attn_implementation("eager")
    assert not is_straight(eager)


def test_hooks_and_replaced_layers_are_still_called():
    model, _ = tiny(sharpen=7.0)
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    out = edit_decode(model, torch.tensor([[5, 6, 7]]), EditSettings(max_new_tokens=8))
    handle.remove()
    assert len(seen) == out.forwards[0]


@pytest.mark.parametrize("name", revise.RULES)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_decoders_write_the_same_in_straight_lines_and_through_modules(monkeypatch, name, shift, causal):
    """Also: what a rule says it does not read it does not need."""
    model, _ = tiny(3, shift=shift, causal=causal, sharpen=8.0)
    prompts, real = torch.tensor([[2, 2, 5, 6, 7], [9, 5, 6, 7, 8], [2, 2, 2, 2, 9]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    settings = EditSettings(tau_mask=0.6, revise=revise.RULES[name](), max_post_steps=3, max_new_tokens=18, stop_at_eos=False)
    never = EditSettings(tau_mask=0.6, tau_edit=2.0, max_new_tokens=18)
    decoders = [lambda s=s: edit_decode(model, prompts, s, attention_mask=real, generator=torch.Generator().manual_seed(0)) for s in (settings, never)]
    decoders.append(lambda: ar_decode(model, prompts, attention_mask=real, max_new_tokens=18))
    if shift and causal:
        decoders.append(lambda: self_speculate(model, prompts, attention_mask=real, max_new_tokens=18))
    found = [decode() for decode in decoders]
    monkeypatch.setattr("hildalib.decoding.forward.is_straight", lambda model: False)
    monkeypatch.setattr(revise.Revision, "reads", True)
    for out, decode in zip(found, decoders):
        expected = decode()
        width = min(out.ids.shape[1], expected.ids.shape[1])  # `generate` stops when every row has ended
        assert torch.equal(out.ids[:, :width], expected.ids[:, :width]) and (out.ids[:, width:] == model.config.eos_token_id).all()
        assert torch.equal(out.forwards, expected.forwards) and torch.equal(out.positions_fed, expected.positions_fed)
        assert not (out.ids == MASK).any()
