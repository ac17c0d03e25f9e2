"""S2D2 as published: the cached decoder against an uncached one that walks token by token, its routing against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from reference import _logits, open_block
from tiny import EOS, FIRST, MASK, tiny

from hildalib import HildaError
from hildalib.decoding import EditSettings, RoutedSettings, edit_decode, routed_decode
from hildalib.decoding.routed import expected, first_run


def judge(model, x, a, e, causal):
    """(K, V) block-size-1 probabilities of positions a..e of x, all of them filled, behind the context before a."""
    K, position = e - a, torch.arange(e)
    mask = (position[:, None] >= position) | (open_block(a, e, K, causal)[0, 0] & (position[:, None] < a))
    if model.config.hilda["label_shift"]:
        return _logits(model, x, e, mask[None, None])[a:].softmax(-1)
    ids = torch.cat([x[:e], torch.full((K,), MASK)])
    strict = torch.cat([position < a + i for i in range(K)]).view(K, e)
    own = torch.cat([torch.cat([mask, torch.zeros(e, K, dtype=torch.bool)], 1), torch.cat([strict, torch.eye(K, dtype=torch.bool)], 1)])
    z = model(input_ids=ids[None], attention_mask=own[None, None], position_ids=torch.cat([position, position[a:]])[None], use_cache=False).logits[0, e:]
    z[:, MASK] = -torch.inf
    return z.softmax(-1)


@torch.no_grad()
def plain(model, prompt, s, r, generator):
    """(ids up to and with the first EOS, forwards: those that read masks, and the judge's)"""
    record = model.config.hilda
    K, causal, P = record["block_size"], record["causal_context"], len(prompt)
    x, forwards = torch.full((-(-(P + s.max_new_tokens) // K) * K,), MASK), 0
    x[:P] = prompt
    for a in range(P // K * K, len(x), K):
        e, post, on = a + K, 0, False
        while True:
            m = x[a:e] == MASK
            post += not m.any()
            if post > s.max_post_steps:
                break
            z = _logits(model, x, e, open_block(a, e, K, causal))[a:e].softmax(-1)
            forwards += int(m.any())
            p, v = z.max(-1)
            edit = ~m & (torch.arange(a, e) >= P) & (p > s.tau_edit) & (v != x[a:e])
            run = [i for i in range(K) if m[i] and m[int(m.long().argmax()):i].all()]
            alive, hope = 1.0, 0.0
            for i in run:
                alive *= math.exp(torch.special.entr(z[i]).sum().item() / -math.log(z.shape[1]))
                hope += alive
            count = int((m & (p > s.tau_mask)).sum()) if r.route == "dynamic" else 1
            score = {"always": math.inf, "span": len(run)}.get(r.route, hope - r.cost * count)
            on = score >= (r.bar if r.off is None or not on else r.off)
            wrote = torch.zeros(K, dtype=torch.bool)
            if run and on:
                filled = x.clone()
                filled[a:e] = torch.where(m | edit, v, x[a:e])
                q, draw = judge(model, filled, a, e, causal), None if r.greedy else torch.rand(K + 1, generator=generator, dtype=torch.float64)
                forwards += 1
                for i in run:
                    wrote[i] = True
                    if q[i].argmax() != v[i] if r.greedy else draw[i] >= q[i, v[i]] / p[i]:
                        left = (q[i] - z[i]).clamp(min=0).double()
                        left = (left if left.sum() > 0 else q[i].double()).cumsum(0)
                        v[i] = q[i].argmax() if r.greedy else int((left <= draw[K] * left[-1]).sum())
                        break
            if not (run and on) or wrote.sum() < r.quota:
                rest = m & ~wrote
                sure = rest & (p > s.tau_mask)
                if rest.any() and not sure.any():
                    sure[p.masked_fill(~rest, -1).argmax()] = True
                wrote |= sure
            x[a:e] = torch.where(wrote | edit, v, x[a:e])
            if not m.any() and not edit.any():
                break
        if (x[P:e] == EOS).any():
            break
    out = x[P:P + s.max_new_tokens]
    return (out[:int((out == EOS).nonzero()[0]) + 1] if (out == EOS).any() else out), forwards


ROUTES = [RoutedSettings("always", greedy=True), RoutedSettings("always"), RoutedSettings("static", cost=1.5), RoutedSettings("dynamic", bar=-0.5, quota=3),
          RoutedSettings("dynamic", bar=0.7, off=-1.0, greedy=True), RoutedSettings("span", bar=3)]


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), causal=st.booleans(), shift=st.booleans(), routing=st.sampled_from(ROUTES), tau_edit=st.sampled_from([0.4, 2.0]),
       new=st.sampled_from([3, 14]))
def test_the_text_is_that_of_the_uncached_walk(seed, causal, shift, routing, tau_edit, new):
    model, _ = tiny(seed % 5, shift=shift, causal=causal, sharpen=6.0)
    settings = EditSettings(tau_mask=0.6, tau_edit=tau_edit, max_post_steps=2, max_new_tokens=new)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(FIRST, 15, (n,), generator=generator) for n in (3, 9, 1)]
    width = max(map(len, prompts))
    batch, real = (torch.stack([F.pad(part(p), (width - len(p), 0)) for p in prompts]) for part in (lambda p: p, torch.ones_like))
    together = routed_decode(model, batch, settings, routing, attention_mask=real, generator=torch.Generator().manual_seed(seed))
    for row, prompt in enumerate(prompts):
        theirs, forwards = plain(model, prompt, settings, routing, torch.Generator().manual_seed(seed))
        alone = routed_decode(model, prompt[None], settings, routing, generator=torch.Generator().manual_seed(seed))
        for out, index in ((alone, 0), (together, row))[:1 + routing.greedy]:  # a batch shares the draws
            assert torch.equal(out.ids[index, :len(theirs)], theirs) and (out.ids[index, len(theirs):] == EOS).all()
        assert tau_edit < 1 or alone.forwards[0] == forwards  # without edits commits ride along


def test_nobody_is_asked_below_the_bar_and_the_text_is_the_plain_one():
    model, _ = tiny(1, causal=True, sharpen=6.0)
    prompt, settings = torch.tensor([[5, 6, 7]]), EditSettings(tau_mask=0.5, tau_edit=0.5, max_new_tokens=15)
    ours, theirs = routed_decode(model, prompt, settings, RoutedSettings("span", bar=9)), edit_decode(model, prompt, settings)
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.forwards, theirs.forwards) and torch.equal(ours.positions_fed, theirs.positions_fed)


def test_runs_and_hopes_by_hand():
    masked = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]]).bool()
    assert first_run(masked).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    entropy = math.log(16) * torch.tensor([[9.0, 0.0, 1.0, 9.0, 0.5]])
    assert expected(entropy, first_run(masked[:1]), 16).item() == pytest.approx(1 + math.exp(-1))


def test_what_is_rejected_is_written_by_the_judge_with_the_law_of_what_is_left():
    """Draft law p, judge law q at one position: a draft token v stays with min(1, q/p), else another is drawn from (q - p)+."""
    from hildalib.decoding.routed import _Routed

    size, count = 1, 40_000
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])

    class Block:
        tokens, confidence = torch.zeros(count, size, dtype=torch.long), torch.full((count, size), 0.5)
        probabilities = staticmethod(lambda: p.expand(count, size, 3))

    walk = _Routed.__new__(_Routed)
    walk.routing, walk.generator, walk._judge = RoutedSettings(), torch.Generator().manual_seed(0), lambda *_: q.expand(count, size, 3)
    every = torch.ones(count, size, dtype=torch.bool)
    assert walk._walk(Block, every, every[:, 0]).all()
    shares = torch.bincount(Block.tokens[:, 0], minlength=3) / count
    assert torch.allclose(shares, torch.tensor([0.4, 0.0, 0.6]), atol=0.01)


@pytest.mark.parametrize("bad, message", [({"route": "bandit"}, "route = 'bandit'"), ({"off": 1.0}, "off = 1.0 is above"), ({"quota": -1}, "quota = -1")])
def test_impossible_routes_are_refused(bad, message):
    with pytest.raises(HildaError, match=message):
        RoutedSettings(**bad)
