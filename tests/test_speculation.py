"""Self-speculation writes what the model's own block-size-1 mode writes, whatever is drafted, and counts what it cost."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tiny import EOS, FIRST, tiny

from hildalib import HildaError
from hildalib.decoding import ar_decode, self_speculate


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([2, 4, 8]), new=st.sampled_from([1, 5, 17]))
def test_4_the_text_is_that_of_block_size_1_alone_and_in_a_batch(seed, size, new):
    model, _ = tiny(seed % 9, causal=True, block_size=size, sharpen=6.0)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(FIRST, 15, (n,), generator=generator) for n in (3, 9, 1, 12)]
    width = max(map(len, prompts))
    batch = torch.stack([F.pad(p, (width - len(p), 0), value=EOS) for p in prompts])
    real = torch.stack([F.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    together = self_speculate(model, batch, attention_mask=real, max_new_tokens=new)
    for row, prompt in enumerate(prompts):
        expected = ar_decode(model, prompt[None], max_new_tokens=new).ids[0]
        alone = self_speculate(model, prompt[None], max_new_tokens=new)
        for out, index in ((alone, 0), (together, row)):
            assert torch.equal(out.ids[index, :len(expected)], expected) and (out.ids[index, len(expected):] == EOS).all()
        blocks = -(-(len(prompt) + new) // size) - len(prompt) // size
        assert alone.forwards[0] <= 1 + new + blocks  # one drafts; each of the others adds a token, or reads a corrected end of a block
        assert together.forwards[row] == alone.forwards[0] and together.positions_fed[row] == alone.positions_fed[0]


def test_accepted_drafts_cost_one_forward_a_block():
    """A model of zeros writes token 0 in both modes: one forward drafts the first block, each of the five blocks is verified by one
    that also drafts the next, but for the last; block and next block are fed, the first time the prompt's block and the draft."""
    model, _ = tiny(causal=True, sharpen=0.0)
    out = self_speculate(model, torch.tensor([[5, 6, 7, 8]]), max_new_tokens=20)
    assert (out.ids == 0).all() and out.forwards.tolist() == [6] and out.positions_fed.tolist() == [(4 + 4) + 4 * 8 + 4]


@pytest.mark.parametrize("tolerance", [0.7, 0.3, 1e-9])
def test_with_a_tolerance_no_token_is_less_probable_than_it_allows(tolerance):
    """Read once more token by token, each token of the text has at least `tolerance` of the favourite's probability; where everything is tolerated
    no draft is rejected."""
    kept = saved = 0
    for seed in range(6):
        model, _ = tiny(seed, causal=True, sharpen=3.0)
        prompt = torch.randint(FIRST, 15, (1, 8), generator=torch.Generator().manual_seed(seed))
        out = self_speculate(model, prompt, max_new_tokens=24, tolerance=tolerance)
        ids = torch.cat([prompt, out.ids], 1)
        with torch.no_grad():
            logits = model(input_ids=ids.clone()).logits[:, 7:-1]
        logits[..., model.config.hilda["mask_token_id"]] = -torch.inf
        ratio = (logits.gather(-1, out.ids.clone()[..., None])[..., 0] - logits.max(-1).values).exp()[0]
        written = len(ratio) if not (ends := (out.ids[0] == EOS).nonzero()).numel() else int(ends[0, 0]) + 1
        assert (ratio[:written] >= tolerance - 1e-5).all()
        kept += int((ratio[:written] < 1 - 1e-5).sum())
        saved += int(self_speculate(model, prompt, max_new_tokens=24).forwards - out.forwards)
        if tolerance < 1e-6:
            assert out.forwards[0] == 1 + -(-written // 4)
    assert kept > 0 and saved > 0


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.5])
def test_an_impossible_tolerance_is_refused(tolerance):
    with pytest.raises(HildaError, match="is no share of a probability"):
        self_speculate(tiny(causal=True)[0], torch.tensor([[5, 6]]), max_new_tokens=4, tolerance=tolerance)


@pytest.mark.parametrize("options", [{"causal": False}, {"shift": False, "causal": True}, {"block_size": 1, "causal": True}])
def test_a_model_without_an_ar_mode_is_refused(options):
    with pytest.raises(HildaError, match="needs a shifted dLLM with a causal context and blocks of at least 2"):
        self_speculate(tiny(**options)[0], torch.tensor([[5, 6]]), max_new_tokens=4)
