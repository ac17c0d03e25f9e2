"""Pipelined blocks (D2F) and causal ones (CARD): the cached decoder against an uncached one, masks and rates against their definitions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tiny import EOS, FIRST, MASK, as_rows, text, tiny

from hildalib import HildaError, attention
from hildalib.decoding import EditSettings, PipelineSettings, edit_decode, pipeline_decode
from hildalib.layout import Layout, target_logits, validate
from hildalib.noise import Noised, block_rates, rising_rates, soft_tail
from hildalib.objective import combine, context_weights, source_rows
from hildalib.recipe import NoisedRows, Recipe, arm
from hildalib.training import train
from hildalib.wsd import BlockSchedule


def batch_of(lengths, generator):
    prompts = [torch.randint(FIRST, 15, (n,), generator=generator) for n in lengths]
    width = max(lengths)
    return prompts, torch.stack([F.pad(p, (width - len(p), 0), value=EOS) for p in prompts]), torch.stack(
        [F.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])


@torch.no_grad()
def plain(model, prompt, s):
    """Algorithm 2 without a cache, batch of one: (ids up to and with the first EOS, forwards)."""
    record, P = model.config.hilda, len(prompt)
    K, shift, causal = record["block_size"], record["label_shift"], record["causal_context"]
    end = -(-(P + s.max_new_tokens) // K) * K
    x = torch.full((end,), MASK)
    x[:P] = prompt
    opened, forwards, place = P // K * K + K, 0, torch.arange(end)
    while True:
        share = (x.view(-1, K) != MASK).float().mean(-1)
        whole = next((k * K for k, part in enumerate(share) if part < 1), end)
        eos = next((i for i in range(P, end) if x[i] == EOS), end)
        if eos < whole or whole == end:
            out = x[P:P + s.max_new_tokens]
            return out[:eos - P + 1], forwards
        if share[opened // K - 1] >= s.tau_add and opened < end and opened - whole < s.blocks * K and eos >= opened:
            opened += K
        ends = torch.where((place < whole) & causal, place + 1, (place // K + 1) * K)
        mask = (place[None] < ends[:, None])[None, None]
        z = model(input_ids=x[None], attention_mask=mask, position_ids=place[None], use_cache=False).logits[0].float()
        z[:, MASK] = -torch.inf
        z = torch.cat([z[:1], z[:-1]]) if shift else z
        forwards += 1
        p, v = z.softmax(-1).max(-1)
        for k in range(whole // K, opened // K):
            part = slice(k * K, (k + 1) * K)
            masked = x[part] == MASK
            sure = masked & (p[part] > s.tau_mask)
            if masked.any() and not sure.any() and (k * K == whole or share[k - 1] >= s.tau_act):
                sure[p[part].masked_fill(~masked, -1).argmax()] = True
            x[part] = torch.where(sure, v[part], x[part])


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), causal=st.booleans(), shift=st.booleans(), blocks=st.integers(1, 4), tau=st.sampled_from([0.2, 0.5, 0.9]),
       add=st.sampled_from([0.0, 0.1, 0.5, 1.0]), act=st.sampled_from([0.25, 0.95]), new=st.sampled_from([3, 17]))
def test_pipelined_decoding_is_the_uncached_one_alone_and_in_a_batch(seed, causal, shift, blocks, tau, add, act, new):
    model, _ = tiny(seed % 7, shift=shift, causal=causal, sharpen=6.0)
    settings = PipelineSettings(tau_mask=tau, tau_add=add, tau_act=act, blocks=blocks, max_new_tokens=new)
    prompts, batch, real = batch_of((3, 9, 1, 12), torch.Generator().manual_seed(seed))
    together = pipeline_decode(model, batch, settings, attention_mask=real)
    for row, prompt in enumerate(prompts):
        expected, forwards = plain(model, prompt, settings)
        alone = pipeline_decode(model, prompt[None], settings)
        for out, index in ((alone, 0), (together, row)):
            assert torch.equal(out.ids[index, :len(expected)], expected) and (out.ids[index, len(expected):] == EOS).all()
            assert out.forwards[index] == forwards <= new + 4
        assert together.positions_fed[row] == alone.positions_fed[0]


@pytest.mark.parametrize("causal", [False, True])
def test_one_open_block_is_edit_decode_without_edits(causal):
    model, _ = tiny(2, causal=causal, sharpen=6.0)
    _, batch, real = batch_of((5, 8), torch.Generator().manual_seed(0))
    ours = pipeline_decode(model, batch, PipelineSettings(tau_mask=0.4, blocks=1, max_new_tokens=14), attention_mask=real)
    theirs = edit_decode(model, batch, EditSettings(tau_mask=0.4, tau_edit=1.0, max_new_tokens=14), attention_mask=real)
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.forwards, theirs.forwards) and torch.equal(ours.positions_fed, theirs.positions_fed)


def test_a_pipeline_needs_fewer_forwards_where_the_model_is_sure():
    """A model of zeros is never sure: each forward of a lone block writes one token, of four blocks one a block that is urgent."""
    model, _ = tiny(sharpen=0.0)
    prompt = torch.tensor([[5, 6, 7, 8]])
    spent = {blocks: int(pipeline_decode(model, prompt, PipelineSettings(tau_add=0.0, tau_act=0.0, blocks=blocks, max_new_tokens=16)).forwards)
             for blocks in (1, 4)}
    assert spent == {1: 16, 4: 6}  # two are open in the first forward, four in the third, and the last then needs three more


@pytest.mark.parametrize("bad, message", [({"tau_add": 1.2}, "tau_add = 1.2"), ({"blocks": 0}, "blocks = 0"), ({"block_size": 0}, "block_size = 0")])
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(HildaError, match=message):
        PipelineSettings(**bad)


def test_an_ar_model_is_refused():
    model, _ = tiny()
    model.config.hilda = model.config.hilda | {"block_size": None}
    with pytest.raises(HildaError, match="no dLLM"):
        pipeline_decode(model, torch.tensor([[5, 6]]))


def test_the_mask_of_a_group_written_out():
    """L = 4, K = 1, groups of 2: a noisy row sees its group up to itself, and the clean rows of earlier groups."""
    seen = attention.noisy_clean(4, 1, pipeline=2)[0, 0].int().tolist()
    assert seen[:4] == [[1, 0, 0, 0] + [0] * 4, [1, 1, 0, 0] + [0] * 4, [0, 0, 1, 0] + [1, 1, 0, 0], [0, 0, 1, 1] + [1, 1, 0, 0]]
    assert seen[4:] == attention.noisy_clean(4, 1)[0, 0].int().tolist()[4:]
    causal = attention.noisy_clean(4, 4, causal_blocks=True)[0, 0, :4].int().tolist()
    assert causal == [[1, 0, 0, 0] + [0] * 4, [1, 1, 0, 0] + [0] * 4, [1, 1, 1, 0] + [0] * 4, [1] * 4 + [0] * 4]


@pytest.mark.parametrize("causal", [False, True])
def test_what_a_group_is_trained_on_is_what_a_pipeline_reads(causal):
    """The layout's logits of a group of three unfinished blocks behind clean ones are those of `Reader.read_open`."""
    from hildalib.decoding.reader import Reader

    model, _ = tiny(1, causal=causal, sharpen=4.0)
    ids, docs = text(1, 24)
    generator = torch.Generator().manual_seed(3)
    masked = torch.rand(24, generator=generator) < torch.linspace(0, 1, 24)
    noisy = ids.masked_fill(masked, MASK)
    layout = Layout.build(ids, noisy[:, None], docs, 4, True, causal, pipeline=3)
    targets = masked[None, None] & (torch.arange(24) >= 12)
    canvas = torch.where(torch.arange(24) < 12, ids, noisy)
    with torch.inference_mode():
        reader = Reader(model, canvas, 4)
        at = [torch.tensor([n]) for n in (12, 12, 24)]
        read = reader.read_open(canvas, *at, torch.tensor([0]))
        trained = target_logits(model, layout, targets)
    assert torch.allclose(read[0, masked[12:]], trained, atol=1e-5)


def test_rates_rise_inside_a_group_and_stay_in_their_band():
    generator = torch.Generator().manual_seed(0)
    rates = block_rates(200, 10, low=0.2, high=0.7, full_share=0.1, generator=generator)
    rising = rising_rates(rates, 4, high=0.7, generator=generator)
    assert rising.shape == rates.shape
    for start in (0, 4, 8):
        group = rising[:, start:start + 4]
        assert torch.equal(group[:, 0], rates[:, start]) and (group.diff(dim=1) >= 0).all()
    assert set(rising[rising > 0.7].tolist()) == {1.0} and (rising >= 0.2).all() and (rising[rates == 1] == 1).all()
    spread = rising[(rates[:, :4] < 1).all(1), 3] - rates[(rates[:, :4] < 1).all(1), 0]
    middle = (0.7 - rates[(rates[:, :4] < 1).all(1), 0]).mean() / 2  # three steps of mean (high - p) / 6
    assert abs(spread.mean() - middle) < 0.02


def test_the_soft_tail_is_a_window_at_the_end():
    maskable = torch.zeros(4000, 40, dtype=torch.bool)
    maskable[:, 8:36] = True
    rates = soft_tail(maskable, 1.5, generator=torch.Generator().manual_seed(0))
    assert (rates[~maskable] == 0).all()
    inside = rates > 0
    assert inside[:, 35].all() and ((inside[:, 8:36].int().diff(dim=1)) >= 0).all()  # one stretch, up to the last maskable position
    assert abs(rates.sum(1).mean() - 14.5) < 0.3  # N ~ U{1..28}
    assert rates.max() <= 1.0 and (rates[inside].view(-1) >= 1 / 1.5 - 1e-6).all()


def test_context_weights_by_hand():
    masked = torch.tensor([[False, True, True, False, True]])
    costs, seen, expected = [0, 1, 2, 0, 1], 0.0, []  # a mask behind a mask counts twice
    for cost in costs:
        expected.append(1 / (1 + seen))
        seen = cost + 0.5 * seen
    assert torch.allclose(context_weights(masked), torch.tensor([expected]))
    loss = torch.arange(5.0)[None]
    noised = Noised(masked.long(), masked, torch.zeros_like(masked), masked.float(), torch.ones_like(masked))
    total = combine(loss, noised, weighting="context").m2t
    assert torch.allclose(total, (loss * torch.tensor([expected])).sum() / 5)


def test_a_causal_stream_is_read_as_causal_blocks_are_decoded():
    """CARD trains on noisy rows alone; with masks only in the last block its logits are those of a clean prefix and one causal block."""
    model, _ = tiny(4, sharpen=4.0)
    model.config.hilda = model.config.hilda | {"causal_blocks": True, "causal_context": False}
    ids, docs = text(2, 16)
    where = torch.arange(16).expand(2, -1) >= 12
    noisy = ids.masked_fill(where, MASK)
    stream = target_logits(model, Layout.build(ids, noisy[:, None], docs, 4, True, stream=True), where[:, None])
    beside = target_logits(model, Layout.build(ids, noisy[:, None], docs, 4, True, causal_blocks=True), where[:, None])
    assert torch.allclose(stream, beside, atol=1e-5)
    out = edit_decode(model, ids[:, :12], EditSettings(tau_mask=0.0, tau_edit=1.0, max_new_tokens=4, stop_at_eos=False))
    assert torch.equal(out.ids, stream.argmax(-1).view(2, 4))
    for prompt in ids[:, :10]:
        x = torch.cat([prompt, torch.full((14,), MASK)])
        for end in (12, 16, 20, 24):
            while (open_ := (x == MASK) & (torch.arange(24) < end)).any():
                z = model(input_ids=x[None, :end], attention_mask=attention.block_causal(end, 1), use_cache=False).logits[0].detach()
                z[:, MASK] = -torch.inf
                p, v = torch.cat([z[:1], z[:-1]]).softmax(-1).max(-1)
                sure = open_[:end] & (p > 0.4)
                sure[p.masked_fill(~open_[:end], -1).argmax()] = True
                x[:end] = torch.where(sure, v, x[:end])
        long = edit_decode(model, prompt[None], EditSettings(tau_mask=0.4, tau_edit=1.0, max_new_tokens=14, stop_at_eos=False))
        assert torch.equal(long.ids[0], x[10:])


def recipe_of(**options):
    return Recipe(**({"schedule": BlockSchedule(warmup=[(1, 2)], decay=[(4, 6)]), "batch_size": 2, "edit_rate": 0.1, "draft_share": 0.5, "causal_context": True,
                      "context_weight": 1.0, "warmup_steps": 2} | options))


@pytest.mark.parametrize("name", ["pipelined", "CARD"])
def test_both_arms_train_and_leave_a_model_that_decodes(name, tmp_path):
    model, tokenizer = tiny()
    ids, docs = text(8, 16)
    changed = arm(recipe_of(), name)
    log = train(model, tokenizer, as_rows(ids, docs), changed, tmp_path / name, title=name)
    assert len(log) and torch.isfinite(torch.tensor(log.m2t.values)).all()
    assert model.config.hilda.get("causal_blocks", False) == (name == "CARD") and model.config.hilda["block_size"] == 4
    losses = validate(model, as_rows(ids, docs), block_size=4)
    assert all(loss > 0 for loss in losses.values())
    decode = pipeline_decode if name == "pipelined" else edit_decode
    settings = PipelineSettings(max_new_tokens=6) if name == "pipelined" else EditSettings(max_new_tokens=6)
    assert decode(model, ids[:2, :6], settings).ids.shape == (2, 6)


def test_groups_that_do_not_fit_and_half_a_card_are_refused():
    ids, docs = text(8, 24)
    with pytest.raises(HildaError, match="groups of 4 blocks of 4 do not divide length 24"):
        NoisedRows(as_rows(ids, docs), recipe_of(pipeline=4), {"mask_token_id": MASK, "forbidden_ids": [], "vocab_size": 19})
    for bad in ({"tail_slack": 1.5}, {"weighting": "context"}, {"pipeline": 0}):
        with pytest.raises(HildaError):
            recipe_of(**bad)
    card = arm(recipe_of(), "CARD")
    assert card.cost(24) < recipe_of().cost(24) and replace(card, seed=1).tail_slack == card.tail_slack


def test_source_rows_of_a_group_stay_in_it():
    assert source_rows(4, 1 * 2, True).tolist() == [[0, 0, 5, 2]]  # position 1 is predicted by noisy row 0, position 2 by clean row 1
