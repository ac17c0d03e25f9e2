"""Cheap forms of a LoRA step compute what the plain forms compute: the [MASK] row, frozen weights in bfloat16, attention written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import MASK, text, tiny
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hildalib import adapters, attention, backbones


def base(tied):
    """A tiny model whose head is its embedding, or has weights of its own."""
    model = tiny()[0]
    if tied:
        return model
    torch.manual_seed(0)
    untied = type(model)(type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": False})).eval()
    untied.config.hilda = model.config.hilda
    return untied


def adapted(ours, tied):
    """`base` with a stirred adapter and [MASK] row: through `with_lora`, or as PEFT makes it."""
    model = base(tied)
    torch.manual_seed(0)
    model = backbones.with_lora(model, 4) if ours else get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", trainable_token_indices=[MASK]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_the_mask_row_costs_no_table_and_gives_the_logits_and_gradients_of_peft(tied):
    ids = text(rows=2)[0]
    ids[:, ::3] = MASK
    found = []
    for model in (adapted(True, tied), copy.deepcopy(adapted(True, tied)), adapted(False, tied)):
        logits = model(input_ids=ids).logits
        logits[..., MASK] = -torch.inf  # as wherever logits are read
        F.cross_entropy(logits.flatten(0, 1), text(rows=2)[0].flatten()).backward()
        found.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base(tied)(input_ids=ids).logits)
    (logits, gradients), second, (theirs, expected) = found
    assert torch.equal(logits, second[0]) and all(torch.equal(gradients[name], second[1][name]) for name in gradients)
    torch.testing.assert_close(logits, theirs)
    assert gradients.keys() == expected.keys() and any("trainable_tokens" in name for name in gradients)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=name)


def test_within_halved_autocast_computes_the_same_and_afterwards_the_weights_are_back():
    model, labels = adapted(True, True).train(), text(rows=2)[0]
    ids = labels.masked_fill(torch.arange(16) % 3 == 0, MASK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_and_gradients():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, gradients = loss_and_gradients()
    with adapters.halved(model):
        assert sum(p.dtype == torch.bfloat16 for p in model.parameters()) == 2 * 7 + 1 and all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        loss, halved = loss_and_gradients()
    assert abs(float(loss - plain)) < 2e-3 * float(plain) and gradients.keys() == halved.keys()
    for name, gradient in gradients.items():  # products are bfloat16 either way; the residual stream only within
        assert F.cosine_similarity(gradient.flatten(), halved[name].flatten(), 0) > 0.99, name
    assert all(torch.equal(p, before[name]) and p.dtype == before[name].dtype for name, p in model.named_parameters())
    assert all(getattr(module, "cast_input_dtype_enabled", True) for module in model.modules())


@pytest.mark.parametrize("heads, shared", [(4, 4), (6, 2), (3, 1)])
def test_attention_written_out_is_sdpa(heads, shared):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, rows, 8, generator=generator, requires_grad=True) for n, rows in ((heads, 5), (shared, 9), (shared, 9)))
    mask = torch.rand(2, 1, 5, 9, generator=generator) < 0.5
    mask[..., 0] = True

    class Module(torch.nn.Module):
        num_key_value_groups, is_causal = heads // shared, False

    results = []
    for attend in (attention._written_out, sdpa_attention_forward):
        out, _ = attend(Module(), query, key, value, mask, scaling=0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
