"""Committed keys that are rounded or thinned: nothing happens where nothing is asked, the rest against masks and loops written out."""

import pytest
import torch
from reference import _logits, open_block
from tiny import FIRST, MASK, VOCABULARY, text, tiny

from hildalib import HildaError, nano
from hildalib.decoding import Compression, EditSettings, compression, edit_decode
from hildalib.decoding.compression import CompressedCache, Drawn, Zap, knorm, large, rounded, targets

PROMPTS, REAL = torch.tensor([[2, 2, 5, 6, 7, 8], [9, 5, 6, 7, 8, 11]]), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
SETTINGS = dict(tau_mask=0.6, tau_edit=0.4, max_post_steps=3, max_new_tokens=14, stop_at_eos=False)


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_asked_nothing_changed_and_bytes_by_hand(causal):
    model, _ = tiny(3, causal=causal, sharpen=7.0)
    plain = edit_decode(model, PROMPTS, EditSettings(**SETTINGS), attention_mask=REAL)
    held = {}
    for kv in (Compression(), Compression(bits=8), Compression(keep=0.5)):
        out = edit_decode(model, PROMPTS, EditSettings(**SETTINGS, kv=kv), attention_mask=REAL)
        held[kv] = out.kv_bytes.tolist()
        if kv == Compression():
            assert torch.equal(out.ids, plain.ids) and torch.equal(out.forwards, plain.forwards) and plain.kv_bytes is None
    committed, numbers = torch.tensor([16, 16]), 2 * 2 * 32  # positions before the last block; keys and values of 2 layers, 32 wide
    assert list(held.values()) == [(committed * numbers * 4).tolist(), (committed * numbers + committed // 4 * numbers * 4).tolist(), (committed * numbers * 2).tolist()]


def test_a_number_is_off_by_half_a_step_at_most_and_a_constant_channel_by_nothing():
    x = torch.randn(5, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 0.25
    for bits in (4, 8):
        step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / (2**bits - 1)
        off = (rounded(x, bits) - x).abs()
        assert (off <= 0.5 * step + 4e-3).all() and (off[:, :, 0, 0] < 1e-6).all()  # float16 ends
        assert all(len(channel.unique()) <= 2**bits for channel in rounded(x, bits).permute(0, 2, 3, 1).flatten(0, 2))


def test_only_what_is_committed_is_rounded_and_only_once():
    cache = CompressedCache(10, Compression(bits=4), 4)
    assert cache.slots == 12
    positions = torch.arange(12).expand(2, -1)
    keys = torch.randn(24, 2, 3, generator=torch.Generator().manual_seed(1))
    cache.at(positions).write(cache.index, keys, 2 * keys, 0)
    held = keys.view(2, 12, 2, 3).clone()
    cache.settle(torch.tensor([4, 8]))
    first = cache.keys[0].clone()
    assert torch.equal(first[0, :4], rounded(held[0, :4][None], 4)[0]) and torch.equal(first[0, 4:], held[0, 4:])
    assert torch.equal(first[1, 4:8], rounded(held[1, 4:8][None], 4)[0]) and torch.equal(cache.values[0][1, 8:], 2 * held[1, 8:])
    cache.settle(torch.tensor([8, 8]))
    assert torch.equal(cache.keys[0][0, :4], first[0, :4]) and torch.equal(cache.keys[0][1], first[1]) and not torch.equal(cache.keys[0][0, 4:8], first[0, 4:8])


@pytest.mark.parametrize("kv", [{}, {"bits": 4}, {"keep": 0.5}])
@pytest.mark.parametrize("stop", [True, False])
def test_what_is_offloaded_is_read_as_it_was(kv, stop):
    """Alone and with what else may happen to a committed key; rows that end apart, so that the store is taken up again for those that go on."""
    model, _ = tiny(11, sharpen=7.0)
    prompts = text(4, 6, seed=3)[0]
    settings = SETTINGS | {"stop_at_eos": stop, "max_new_tokens": 24}
    there, away = (edit_decode(model, prompts, EditSettings(**settings, kv=Compression(**kv, offload=offload))) for offload in (False, True))
    assert len(there.forwards.unique()) > 1 or not stop or kv
    assert torch.equal(there.ids, away.ids) and torch.equal(there.forwards, away.forwards) and torch.equal(there.kv_bytes, away.kv_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_keys_are_in_a_file(monkeypatch, tmp_path, dtype):
    files = []

    def kept():
        files.append(tmp_path / str(len(files)))
        return open(files[-1], "w+b")

    monkeypatch.setattr(compression.tempfile, "TemporaryFile", kept)
    cache = CompressedCache(8, Compression(offload=True), 4)
    keys = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    read = cache.at(torch.arange(6).expand(2, -1)).write(cache.index, keys, 2 * keys, 0)
    assert torch.equal(read[0].transpose(1, 2).reshape(12, 2, 3), keys) and torch.equal(read[1], 2 * read[0])
    cache.keep_rows(torch.tensor([1]))
    assert len(files) == 4
    for file, held in zip(files[2:], (cache.keys[0], cache.values[0])):
        there = torch.frombuffer(bytearray(file.read_bytes()), dtype=dtype).view(1, 8, 2, 3)
        assert torch.equal(there, held) and there[0, :6].any()
    cache.only = torch.tensor([0])
    cache.at(torch.tensor([[6]])).write(cache.index, keys[:1], keys[1:2], 0)
    assert torch.equal(cache.keys[0][0, 6], keys[0]) and cache.only.tolist() == [0]


@pytest.mark.parametrize("keep, window", [(0.0, 0), (0.5, 0), (0.4, 3), (1.0, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_evicted_is_not_seen(keep, window, causal):
    """One layer, whose keys depend on the tokens alone, in view of two committed blocks: the uncached forward with the evicted ones masked, head by head."""
    model, _ = nano.nano(32, 1, 2, vocabulary=VOCABULARY, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6.0 if parameter.ndim > 1 else 1.0
    model.config.hilda = model.config.hilda | {"block_size": 4, "label_shift": True, "causal_context": causal}
    prompt = torch.randint(FIRST, 15, (8,), generator=torch.Generator().manual_seed(2))
    settings = EditSettings(tau_mask=2.0, tau_edit=2.0, max_new_tokens=4, stop_at_eos=False, kv=Compression(keep=keep, window=window))
    out = edit_decode(model, prompt[None], settings)
    layer = model.model.layers[0]
    with torch.no_grad():
        norms = layer.self_attn.k_proj(layer.input_layernorm(model.get_input_embeddings()(prompt))).view(8, 2, -1).norm(dim=-1)
    norms[8 - window:] = -torch.inf
    count = max(int(torch.tensor(keep * 8).ceil()), window)
    kept = norms.argsort(dim=0, stable=True).argsort(dim=0) < count  # (slots, heads)
    x = torch.cat([prompt, torch.full((4,), MASK)])
    for number in range(4):
        mask = open_block(8, 12, 4, causal).expand(1, 2, 12, 12).clone()
        if number:  # the prompt is compressed after the forward that read it
            mask[0, :, 8:, :8] &= kept.T[:, None]
        with torch.no_grad():
            z = _logits(model, x, 12, mask)[8:].softmax(-1)
        p, v = z.max(-1)
        best = p.masked_fill(x[8:] != MASK, -1).argmax()
        x[8 + best] = v[best]
    assert torch.equal(out.ids[0], x[8:])
    assert out.kv_bytes.tolist() == [count * 2 * 32 * 4]


def test_what_is_gone_stays_gone_and_the_window_stays():
    model, _ = tiny(1, causal=True, sharpen=7.0)
    seen = []
    original = CompressedCache.settle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressedCache, "settle", lambda self, start: (original(self, start), seen.append((start.clone(), {k: v.clone() for k, v in self.gone.items()})))[0])
        edit_decode(model, PROMPTS[1:], EditSettings(**SETTINGS, kv=Compression(keep=0.5, window=2, scorer=knorm)))
    for (_, before), (start, after) in zip(seen, seen[1:]):
        for layer in after:
            assert not (before[layer] & ~after[layer]).any() and not after[layer][:, int(start) - 2:].any()
    assert any(gone.any() for gone in seen[-1][1].values())


def test_targets_by_loops_and_a_regression_that_finds_a_line():
    model, _ = tiny(2, sharpen=4.0)
    ids, _ = text(3, 7)
    with torch.no_grad():
        hidden, wanted = targets(model, ids)
        model.set_attn_implementation("eager")
        out = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
        model.set_attn_implementation("sdpa")
        at = model.model.layers[1].self_attn
        stream = out.hidden_states[1]
        values = at.v_proj(model.model.layers[1].input_layernorm(stream)).view(3, 7, 2, -1)
        for n, i, head in ((0, 0, 0), (1, 3, 1), (2, 5, 0)):
            weight = at.o_proj.weight.view(32, 2, -1)[:, head]
            best = max(out.attentions[1][n, head, j, i] / stream[n, j].norm() for j in range(i + 1, 7)) * (weight @ values[n, i, head]).norm()
            assert wanted[1][n, i, head].item() == pytest.approx(float(best.log()), abs=1e-4)
    assert model.config._attn_implementation == "sdpa" and hidden[1].shape == (3, 6, 32)
    ids, _ = text(40, 12)
    line = torch.randn(33, 2, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        real = targets
        patch.setattr("hildalib.decoding.compression.targets", lambda model, ids: (h := real(model, ids)[0], [torch.cat([x, torch.ones_like(x[..., :1])], -1) @ line for x in h]))
        assert min(Zap.fit(model, ids, ridge=1e-8).r2(model, ids)) > 0.999
    zap = Zap.fit(model, ids)
    out = edit_decode(model, PROMPTS, EditSettings(**SETTINGS, kv=Compression(keep=0.5, scorer=zap)), attention_mask=REAL)
    assert out.ids.shape == (2, 14) and not (out.ids == MASK).any()


@pytest.mark.parametrize("bad, message", [({"bits": 2}, "bits = 2"), ({"keep": 1.5}, "keep = 1.5"), ({"window": -1}, "window = -1")])
def test_impossible_choices_are_refused(bad, message):
    with pytest.raises(HildaError, match=message):
        Compression(**bad)


def test_the_controls_are_the_opposite_and_a_draw_that_can_be_repeated():
    keys = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(large(0, None, keys).argsort(0), (-knorm(0, None, keys)).argsort(0))
    assert torch.equal(Drawn(3)(0, None, keys), Drawn(3)(1, None, keys)) and Drawn(3)(0, None, keys).shape == (6, 2)


def test_no_look_back_and_no_foreign_model():
    with pytest.raises(HildaError, match="look_back writes committed blocks again"):
        EditSettings(look_back=1, kv=Compression())
    model, _ = tiny()
    with pytest.raises(HildaError, match="plain Llama"):
        edit_decode(model.train(), PROMPTS, EditSettings(kv=Compression()))
