"""Fast-dLLM's caches: exact where nothing is stale, the definition where something is, and what staleness measures."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tiny import EOS, FIRST, MASK, VOCABULARY, tiny

from hildalib import HildaError, nano
from hildalib.decoding import RefreshedSettings, refreshed_decode, staleness


def shallow(seed, shift):
    """One layer: its keys are those of the tokens alone, which change only inside the block."""
    model, _ = nano.nano(32, 1, 2, vocabulary=VOCABULARY, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6.0 if parameter.ndim > 1 else 1.0
    model.config.hilda = model.config.hilda | {"block_size": 4, "label_shift": shift, "causal_context": False}
    return model


@torch.no_grad()
def plain(model, prompt, s):
    """(ids up to and with the first EOS, forwards, positions fed), each forward from its definition: full attention of the fed positions, in their
    latest versions, over everybody's keys, which are those of the last forward that fed them."""
    K, P, shift = s.block_size, len(prompt), int(model.config.hilda["label_shift"])
    end = -(-(P + s.max_new_tokens) // K) * K
    x = torch.full((end,), MASK)
    x[:P] = prompt
    forwards = fed = 0
    layers = model.config.num_hidden_layers
    kept = [[None] * end for _ in range(layers)]
    for a in range(P // K * K, end, K):
        age = 0
        while (x[a:a + K] == MASK).any():
            anew = s.cache == "none" or age == 0 or (s.refresh and age % s.refresh == 0)
            rows = list(range(end)) if anew else list(range(max(a - shift, 0), end if s.cache == "prefix" else a + K))
            forwards, fed, age = forwards + 1, fed + len(rows), age + 1
            z = forward(model, x, rows, kept)
            z[:, MASK] = -torch.inf
            z = z[[rows.index(max(i - shift, 0)) for i in range(a, a + K)]]
            p, v = z.softmax(-1).max(-1)
            masked = x[a:a + K] == MASK
            sure = masked & (p > s.tau_mask)
            sure[p.masked_fill(~masked, -1).argmax()] = True
            x[a:a + K] = torch.where(sure, v, x[a:a + K])
        if (x[P:a + K] == EOS).any():
            break
    out = x[P:P + s.max_new_tokens]
    return (out[:int((out == EOS).nonzero()[0]) + 1] if (out == EOS).any() else out), forwards, fed


def forward(model, x, rows, kept):
    """Logits (n, V) of the positions `rows`, through Transformers' own layers; kept[layer][position] holds the keys and values that others see."""
    class Store:
        def update(self, keys, values, layer, *_):
            for column, row in enumerate(rows):
                kept[layer][row] = keys[:, :, column], values[:, :, column]
            return tuple(torch.stack([pair[which] for pair in kept[layer]], 2) for which in (0, 1))

        def get_seq_length(self, layer=0):
            return 0

    mask = torch.ones(1, 1, len(rows), len(x), dtype=torch.bool)
    return model(input_ids=x[rows][None], attention_mask=mask, position_ids=torch.tensor([rows]), past_key_values=Store()).logits[0].clone()


def batch_of(seed, lengths=(3, 9, 1, 12)):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(FIRST, 15, (n,), generator=generator) for n in lengths]
    batch, real = (torch.stack([F.pad(part(p), (max(lengths) - len(p), 0)) for p in prompts]) for part in (lambda p: p, torch.ones_like))
    return prompts, batch, real


@hypothesis_settings(max_examples=16, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.booleans(), cache=st.sampled_from(["none", "prefix", "dual"]), refresh=st.sampled_from([None, 1, 2]),
       size=st.sampled_from([4, 5]), straight=st.booleans())
def test_the_text_is_that_of_the_definition_alone_and_in_a_batch(seed, shift, cache, refresh, size, straight):
    model, _ = tiny(seed % 7, shift=shift, sharpen=6.0)
    settings = RefreshedSettings(cache, refresh, tau_mask=0.6, block_size=size, max_new_tokens=11)
    prompts, batch, real = batch_of(seed)
    with pytest.MonkeyPatch.context() as patch:
        if not straight:
            patch.setattr("hildalib.decoding.forward.is_straight", lambda model: False)
        together = refreshed_decode(model, batch, settings, attention_mask=real)
        for row, prompt in enumerate(prompts):
            theirs, forwards, fed = plain(model, prompt, settings)
            alone = refreshed_decode(model, prompt[None], settings)
            for out, index in ((alone, 0), (together, row)):
                assert torch.equal(out.ids[index, :len(theirs)], theirs) and (out.ids[index, len(theirs):] == EOS).all()
                assert (out.forwards[index], out.positions_fed[index]) == (forwards, fed)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_nothing_is_stale_where_all_is_read_anew_or_keys_do_not_depend_on_the_text(cache, shift):
    _, batch, real = batch_of(1)
    base = RefreshedSettings("none", tau_mask=0.6, block_size=4, max_new_tokens=14)
    for model, refresh in ((tiny(1, shift=shift, sharpen=6.0)[0], 1), (shallow(1, shift), None)):
        settings = RefreshedSettings(cache, refresh, tau_mask=0.6, block_size=4, max_new_tokens=14)
        ours, theirs = (refreshed_decode(model, batch, s, attention_mask=real) for s in (settings, base))
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.forwards, theirs.forwards)
        assert staleness(model, batch, settings, attention_mask=real).kl.abs().max() < 1e-5


def test_staleness_sees_what_is_stale():
    _, batch, real = batch_of(2)
    model, _ = tiny(3, sharpen=6.0)
    table = staleness(model, batch, RefreshedSettings("dual", tau_mask=0.9, block_size=4, max_new_tokens=14), attention_mask=real)
    assert table.kl[table.age == 0].abs().max() < 1e-5 and table.kl[table.age > 0].mean() > 1e-3 and (table.kl > -1e-5).all()


@pytest.mark.parametrize("bad, message", [({"cache": "suffix"}, "cache = 'suffix'"), ({"refresh": 0}, "refresh = 0"), ({"block_size": 0}, "block_size = 0")])
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(HildaError, match=message):
        RefreshedSettings(**bad)


def test_a_model_with_a_causal_context_is_refused():
    with pytest.raises(HildaError, match="reads in both directions"):
        refreshed_decode(tiny(causal=True)[0], torch.tensor([[5, 6]]))
