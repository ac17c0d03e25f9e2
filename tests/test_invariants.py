"""The invariants of HILDA's design, one group of tests each; a test's name begins with its invariant's number."""

import functools

import pandas as pd
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tiny import text as plain_text, tiny

from hildalib import attention, backbones
from hildalib.decoding import EditSettings, edit_decode
from hildalib.layout import Layout, target_logits
from hildalib.noise import corrupt
from hildalib.objective import diffusion_loss, elbo, exact_elbo, predictable
from hildalib.recipe import NoisedRows, Recipe, collate
from hildalib.training import train
from hildalib.wsd import BlockSchedule


text = functools.partial(plain_text, documents=True)


def aligned(model, x0, noisy, docs, size, shift, causal=False):
    """(B, L, V) aligned logits of one noisy copy through the training layout."""
    layout = Layout.build(x0, noisy[:, None], docs, size, shift, causal)
    everywhere = torch.ones_like(noisy, dtype=torch.bool)[:, None]
    return target_logits(model, layout, everywhere).view(*x0.shape, -1)


def noise(x0, maskable, model, size, **kwargs):
    return corrupt(x0, maskable, block_size=size, mask_token_id=model.config.hilda["mask_token_id"], forbidden_ids=range(5), **kwargs)


# 1 -----------------------------------------------------------------------------------------------------------------------

def test_1_block_size_1_shifted_t_1_is_the_ar_loss():
    model, _ = tiny()
    x0, docs = text()
    maskable = predictable(torch.ones_like(x0, dtype=torch.bool), docs, True)
    for weighting in ("1/t", "mean"):
        ours = diffusion_loss(aligned(model, x0, x0, docs, 1, True), x0, noise(x0, maskable, model, 1, t=1.0), weighting=weighting).total
        logits = model(input_ids=x0, attention_mask=attention.block_causal(16, 1, docs)).logits[:, :-1].clone()
        logits[..., 3] = -torch.inf  # the parent has no [MASK]
        theirs = F.cross_entropy(logits.flatten(0, 1), x0[:, 1:].flatten(), reduction="none").view(2, -1)
        assert torch.isclose(ours, theirs[docs[:, 1:] == docs[:, :-1]].mean(), atol=1e-5)


def test_1_block_size_1_general_layout_equals_its_shortcut():
    """The noisy+clean layout at size 1, written out, gives what the causal shortcut gives."""
    model, _ = tiny()
    x0, docs = text()
    full = torch.cat([torch.full_like(x0, 3), x0], 1)
    logits = model(input_ids=full, attention_mask=attention.noisy_clean(16, 1, docs), position_ids=torch.arange(16).repeat(2)[None]).logits
    shortcut = aligned(model, x0, x0, docs, 1, True)
    keep = [i for i in range(1, 16)]
    assert torch.allclose(logits[:, [16 + i - 1 for i in keep], 5:], shortcut[:, keep, 5:], atol=1e-5)


@pytest.mark.parametrize("shift", [True, False])
def test_1_block_size_L_is_plain_mdlm(shift):
    model, _ = tiny()
    x0, docs = text()
    noisy = noise(x0, torch.ones_like(x0, dtype=torch.bool), model, 16, t=0.5, generator=torch.Generator().manual_seed(1)).noisy_ids
    dropped = aligned(model, x0, noisy, docs, 16, shift)
    kept = model(input_ids=torch.cat([noisy, x0], 1), attention_mask=attention.noisy_clean(16, 16, docs),
                 position_ids=torch.arange(16).repeat(2)[None]).logits[:, :16]
    kept = torch.cat([kept[:, :1], kept[:, :-1]], 1) if shift else kept
    assert torch.allclose(dropped[..., 5:], kept[..., 5:], atol=1e-5)


def test_1_a_causal_context_is_the_ar_parent_at_any_block_size():
    """Its clean half gives the parent's logits, and at block size 1 the causal layout is the block-causal one."""
    model, _ = tiny()
    x0, docs = text()
    parent = model(input_ids=x0, attention_mask=attention.block_causal(16, 1, docs)).logits
    targets = predictable(torch.ones_like(x0, dtype=torch.bool), docs, True)
    for size, copies in ((2, 1), (4, 2), (8, 1)):
        layout = Layout.build(x0, torch.full((2, copies, 16), 3), docs, size, True, True)
        logits = target_logits(model, layout, torch.zeros(2, copies, 16, dtype=torch.bool), context=targets)
        assert torch.allclose(logits[:, 5:], parent[:, :-1][targets[:, 1:]][:, 5:], atol=1e-5)
    assert torch.equal(attention.noisy_clean(16, 1, docs), attention.noisy_clean(16, 1, docs, causal_context=True))


@pytest.mark.parametrize("causal", [True, False])
def test_1_a_block_in_training_is_the_open_block_in_decoding(causal):
    """One forward over [noisy | clean] gives each block the logits of a canvas in which only that block is open."""
    model, _ = tiny(shift=False)
    x0, docs = text(rows=1)
    docs = torch.zeros_like(docs)
    noisy = torch.where(torch.arange(16) % 3 == 0, 3, x0)
    logits = aligned(model, x0, noisy, docs, 4, False, causal)
    for start in range(0, 16, 4):
        canvas = torch.cat([x0[:, :start], noisy[:, start:start + 4]], 1)[0]
        expected = reference._logits(model, canvas, start + 4, reference.open_block(start, start + 4, 4, causal))[start:]
        assert torch.allclose(logits[0, start:start + 4, 5:], expected[:, 5:], atol=1e-5)


def test_1_edit_rate_0_is_m2t_only():
    model, _ = tiny()
    x0, docs = text()
    noised = noise(x0, torch.ones_like(x0, dtype=torch.bool), model, 4, t=0.5, edit_rate=0.0)
    losses = diffusion_loss(aligned(model, x0, noised.noisy_ids, docs, 4, False), x0, noised, edit_weight=3.0)
    assert losses.total == losses.m2t and losses.t2t == 0 and not noised.edit_targets.any()


# 2 -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_2_clean_tokens_of_a_block_never_reach_its_own_or_earlier_predictions(size, shift, causal):
    model, _ = tiny()
    x0, docs = text(documents=False)
    noisy = torch.full_like(x0, 3)
    before = aligned(model, x0, noisy, docs, size, shift, causal)
    for block in range(16 // size):
        changed = x0.clone()
        changed[:, block * size:(block + 1) * size] = (x0[:, block * size:(block + 1) * size] - 5 + 1) % 10 + 5
        after = aligned(model, changed, noisy, docs, size, shift, causal)
        end = (block + 1) * size
        assert torch.equal(before[:, :end], after[:, :end])
        assert end == 16 or not torch.equal(before[:, end:], after[:, end:])


def test_2_other_documents_and_padding_never_matter():
    model, _ = tiny()
    x0, docs = text()
    docs[:, 13:] = -1
    noisy = torch.where(torch.arange(16) % 2 == 0, x0, 3)
    before = aligned(model, x0, noisy, docs, 4, False)
    for first, last, rest in ((0, 7, slice(7, 13)), (7, 13, slice(0, 7)), (13, 16, slice(0, 13))):
        changed, canvas = x0.clone(), noisy.clone()
        changed[:, first:last] = canvas[:, first:last] = 9
        assert torch.equal(before[:, rest], aligned(model, changed, canvas, docs, 4, False)[:, rest])


def test_2_flex_attention_has_the_same_mask():
    from torch.nn.attention.flex_attention import create_mask

    _, docs = text()
    for size, copies in ((1, 1), (4, 1), (4, 2), (16, 1)):
        span = 16 * (copies + 1)
        for causal in (True, False):
            flex = create_mask(attention.noisy_clean_mod(16, size, docs, copies, causal), 2, 1, span, span, device="cpu")
            assert torch.equal(flex, attention.noisy_clean(16, size, docs, copies, causal))


# 3 -----------------------------------------------------------------------------------------------------------------------

def test_3_packed_equals_unpacked_loss_and_gradients():
    model, _ = tiny()
    x0, _ = text(rows=1)
    packed_docs = torch.tensor([[0] * 8 + [1] * 8])
    targets = torch.arange(16)[None] % 3 == 1

    def grads(parts):
        model.zero_grad()
        total = 0
        for ids, docs, where in parts:
            logits = aligned(model, ids, ids.masked_fill(where, 3), docs, 4, False)
            total = total + F.cross_entropy(logits[where], ids[where], reduction="sum")
        total.backward()
        return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    packed = grads([(x0, packed_docs, targets)])
    single = grads([(x0[:, a:a + 8], torch.zeros(1, 8, dtype=torch.long), targets[:, a:a + 8]) for a in (0, 8)])
    assert torch.allclose(packed[0], single[0], atol=1e-5) and torch.allclose(packed[1], single[1], atol=1e-5)


def small_run(folder, **changes):
    model, tokenizer = tiny()
    ids, docs = text(rows=12, seed=3)
    rows = {"input_ids": ids, "doc_ids": docs, "maskable": torch.ones_like(ids, dtype=torch.bool)}
    settings = {"schedule": BlockSchedule(warmup=[(1, 2)], stable=(4, 4)), "batch_size": 8, "lr": 1e-2, "warmup_steps": 1, "log_every": 1,
                "edit_rate": 0.2, "draft_share": 0.5, "keep_weight": 0.1}
    log = train(model, tokenizer, rows, Recipe(**settings | changes), folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), log


@pytest.mark.parametrize("options", [{}, {"causal_context": True, "context_weight": 0.5}])
def test_3_batch_8_equals_2_times_4_accumulated(tmp_path, options):
    whole, log = small_run(tmp_path / "a", **options)
    parts, log_parts = small_run(tmp_path / "b", batch_size=4, accumulate=2, **options)
    assert torch.allclose(whole, parts, atol=2e-5)
    for name in ("m2t", *(["context"] if options else [])):
        assert torch.allclose(torch.tensor(log[name].dropna().values), torch.tensor(log_parts[name].dropna().values), atol=1e-4)


# 4 -----------------------------------------------------------------------------------------------------------------------

@hypothesis_settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.booleans(), causal=st.booleans(), size=st.sampled_from([2, 4, 8]), tau_mask=st.sampled_from([0.2, 0.5, 0.8, 2.0]),
       tau_edit=st.sampled_from([0.0, 0.3, 0.7, 2.0]), post=st.sampled_from([0, 1, 4]), look_back=st.sampled_from([0, 0, 1, 2]), minimum=st.sampled_from([1, 2]))
def test_4_cached_equals_uncached_also_when_edits_reach_committed_blocks(seed, shift, causal, size, tau_mask, tau_edit, post, look_back, minimum):
    model, _ = tiny(seed % 7, shift=shift, causal=causal, block_size=size, sharpen=8.0)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(5, 15, (n,), generator=generator) for n in (3, 9, 1, 12)]
    settings = EditSettings(tau_mask=tau_mask, tau_edit=tau_edit, max_post_steps=post, look_back=look_back, minimum=minimum, max_new_tokens=17)
    width = max(map(len, prompts))
    batch = torch.stack([F.pad(p, (width - len(p), 0), value=2) for p in prompts])
    real = torch.stack([F.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    together = edit_decode(model, batch, settings, attention_mask=real)
    for row, prompt in enumerate(prompts):
        expected = reference.edit_decode(model, prompt, settings)
        alone = edit_decode(model, prompt[None], settings)
        assert torch.equal(alone.ids[0, :len(expected)], expected)
        assert torch.equal(together.ids[row, :len(expected)], expected)
        assert together.forwards[row] == alone.forwards[0] and together.positions_fed[row] == alone.positions_fed[0]
        assert (alone.ids[0, len(expected):] == model.config.eos_token_id).all()


def test_4_look_back_does_reach_committed_blocks():
    """The property above is not vacuous: some closed block does change."""
    reached = 0
    for seed in range(7):
        model, _ = tiny(seed, sharpen=8.0)
        settings = EditSettings(tau_mask=0.2, tau_edit=0.0, max_post_steps=2, max_new_tokens=24, look_back=1, stop_at_eos=False)
        prompt = torch.tensor([[5, 6, 7]])
        reached += not torch.equal(edit_decode(model, prompt, settings).ids, edit_decode(model, prompt, EditSettings(**{**settings.__dict__, "look_back": 0})).ids)
    assert reached


def test_4_tau_edit_above_1_never_edits_and_tau_mask_above_1_writes_one_token_a_forward():
    model, _ = tiny(sharpen=8.0)
    trace = edit_decode(model, torch.tensor([[5, 6, 7]]), EditSettings(tau_mask=2.0, tau_edit=2.0, max_new_tokens=13, stop_at_eos=False), trace=True).trace
    written = (trace.ids[1:] != trace.ids[:-1]).sum((1, 2))
    assert set(written.tolist()) <= {0, 1} and written.sum() == 13
    assert not (trace.state == 3).any()


# 5 -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [True, False])
def test_5_elbo_estimator_agrees_with_exact_enumeration(shift):
    model, _ = tiny(shift=shift, sharpen=4.0)
    x0 = torch.tensor([[5, 9, 7, 6, 8, 5]])
    maskable = torch.tensor([[False, True, True, True, True, True]])
    exact = exact_elbo(model, x0, maskable, block_size=3)
    draws = torch.stack([elbo(model, x0, maskable, block_size=3, samples=1, generator=torch.Generator().manual_seed(s)) for s in range(400)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error).all() and (error > 0).all()


def test_5_elbo_of_block_size_1_is_the_exact_log_likelihood():
    model, _ = tiny()
    x0, docs = text(rows=1, documents=False)
    maskable = predictable(torch.ones_like(x0, dtype=torch.bool), docs, True)
    logp = aligned(model, x0, x0, docs, 1, True).log_softmax(-1).gather(2, x0[..., None])[..., 0]
    assert torch.allclose(elbo(model, x0, maskable, block_size=1, samples=1), -logp[:, 1:].sum(1), atol=1e-4)


# 6 -----------------------------------------------------------------------------------------------------------------------

def test_6_mask_never_comes_out_even_when_it_is_the_favourite():
    model, _ = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = 50 * model.get_output_embeddings().weight.abs().mean(0)
    for shift in (True, False):
        model.config.hilda = model.config.hilda | {"label_shift": shift}
        out = edit_decode(model, torch.tensor([[5, 6, 7]]), EditSettings(tau_mask=0.0, tau_edit=0.0, max_new_tokens=20, stop_at_eos=False))
        assert not (out.ids == 3).any()


def test_6_special_and_padded_ids_never_go_in_as_noise():
    ids = torch.randint(5, 15, (64, 64))
    noised = corrupt(ids, torch.ones_like(ids, dtype=torch.bool), block_size=8, mask_token_id=3, forbidden_ids=[0, 1, 2, 4, 13, 14], edit_rate=1.0,
                     t=0.0, vocab_size=15)
    assert set(noised.noisy_ids.unique().tolist()) == set(range(5, 13))  # 13 and 14 stand for padded rows
    assert (noised.noisy_ids != ids).all()


def test_6_prompt_tokens_never_change():
    model, _ = tiny(sharpen=8.0)
    prompt = torch.tensor([[5, 6, 7, 8, 9, 5]])
    trace = edit_decode(model, prompt, EditSettings(tau_mask=0.0, tau_edit=0.0, max_new_tokens=14, look_back=1), trace=True).trace
    assert (trace.ids[:, 0, :6] == prompt.numpy()).all() and (trace.state[:, 0, :6] == 0).all()


# 7 and 8 -----------------------------------------------------------------------------------------------------------------

def test_7_interrupted_training_resumes_to_the_same_bytes(tmp_path):
    """A subprocess is killed with SIGKILL in the middle; the rerun gives the weights and the log of an undisturbed run, bit for bit."""
    import os
    import subprocess
    import sys
    import time
    from pathlib import Path

    code = ("import torch, sys; from pathlib import Path; torch.set_num_threads(1); sys.path.insert(0, {tests!r}); import test_invariants as t\n"
            "w, _ = t.small_run(Path({folder!r}), save_every=2, schedule=t.BlockSchedule(warmup=[(1, 4)], stable=(4, 36)))\n"
            "torch.save(w, {out!r})")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def command(folder):
        return [sys.executable, "-c", code.format(tests=here, folder=str(folder), out=str(folder) + ".pt")]

    process = subprocess.Popen(command(cut), env=environment)
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoints/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (cut / "model").exists(), "the run was over before it could be killed"
    for folder in (cut, whole):
        subprocess.run(command(folder), env=environment, check=True, capture_output=True)
    assert torch.equal(torch.load(str(cut) + ".pt", weights_only=True), torch.load(str(whole) + ".pt", weights_only=True))
    log, undisturbed = (pd.read_csv(folder / "log.csv").drop(columns=["clean_tokens_per_s", "peak_memory_gb"]) for folder in (cut, whole))
    assert log.to_csv() == undisturbed.to_csv()


def test_8_same_seed_same_bytes_another_seed_other_bytes(tmp_path):
    first, second, other = (small_run(tmp_path / name, seed=seed)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_8_a_row_is_a_function_of_its_number():
    ids, docs = text(rows=12)
    rows = {"input_ids": ids, "doc_ids": docs, "maskable": torch.ones_like(ids, dtype=torch.bool)}
    recipe = Recipe(schedule=BlockSchedule(stable=(4, 5)), batch_size=4, edit_rate=0.1, draft_share=0.5)
    tokens = {"mask_token_id": 3, "forbidden_ids": range(5), "vocab_size": 15}
    forward, again = NoisedRows(rows, recipe, tokens), NoisedRows(rows, recipe, tokens)
    late = collate([again[n] for n in (19, 3)])
    early = collate([forward[n] for n in (19, 3)])
    assert all(torch.equal(early[key], late[key]) for key in early if torch.is_tensor(early[key]))


def test_8_sampled_decoding_repeats():
    model, _ = tiny()
    settings = EditSettings(tau_mask=0.2, tau_edit=0.3, temperature=1.0, max_new_tokens=20)
    one, two, other = (edit_decode(model, torch.tensor([[5, 6]]), settings, generator=torch.Generator().manual_seed(s)).ids for s in (4, 4, 5))
    assert torch.equal(one, two) and not torch.equal(one, other)
