"""Our rules and losses against independent ones: diffusers' block-refinement scheduler, and a few plain lines of MDLM.

The ELBO against enumeration, FlexAttention's mask and the uncached decoder are in test_invariants.py.
"""

import pytest
import torch
from tiny import MASK, text

from hildalib.decoding import rules
from hildalib.noise import block_rates, corrupt
from hildalib.objective import diffusion_loss

SIZE, VOCABULARY = 8, 19
CASES = [(tau_mask, tau_edit, masks) for tau_mask in (0.0, 0.3, 0.6, 0.95) for tau_edit in (0.05, 0.5, 0.9) for masks in (0.0, 0.2, 0.7, 1.0)]


def scheduler():
    """At num_inference_steps = block length it fills at least one mask a step, as ours with minimum 1."""
    diffusers = pytest.importorskip("diffusers", reason="the oracle is BlockRefinementScheduler of diffusers, which is not installed")
    if not hasattr(diffusers, "BlockRefinementScheduler"):
        pytest.skip(f"diffusers {diffusers.__version__} has no BlockRefinementScheduler")
    oracle = diffusers.BlockRefinementScheduler(block_length=SIZE, num_inference_steps=SIZE, minimal_topk=1)
    oracle.set_timesteps(SIZE)
    return oracle


def our_step(logits, canvas, prompt, tau_mask, tau_edit):
    tokens, confidence = rules.choose(logits, 0.0, None)
    masked = canvas == MASK
    filled = rules.fill(confidence, masked, tau_mask)
    edited = rules.edit(tokens, confidence, canvas, ~masked & ~prompt, tau_edit)
    return torch.where(filled | edited, tokens, canvas), filled, edited


@pytest.mark.parametrize("tau_mask, tau_edit, masks", CASES)
def test_one_step_of_fill_and_edit_is_the_schedulers_token_for_token(tau_mask, tau_edit, masks):
    oracle = scheduler()
    generator = torch.Generator().manual_seed(CASES.index((tau_mask, tau_edit, masks)))
    for case in range(8):  # 8 x 4 rows in each of 48 settings
        logits = 4 * torch.randn(4, SIZE, VOCABULARY, generator=generator)
        logits[..., MASK] = -torch.inf
        canvas = torch.randint(5, VOCABULARY, (4, SIZE), generator=generator)
        keep = torch.rand(4, SIZE, generator=generator) < 0.5  # half of the visible tokens already are the argmax
        canvas = torch.where(keep, logits.argmax(-1), canvas)
        prompt = torch.arange(SIZE) < case % 4
        canvas = canvas.masked_fill((torch.rand(4, SIZE, generator=generator) < masks) & ~prompt, MASK)
        theirs = oracle.step(logits, timestep=case, sample=canvas, mask_token_id=MASK, temperature=0.0, threshold=tau_mask, editing_threshold=tau_edit,
                             minimal_topk=1, prompt_mask=prompt)
        ours, filled, edited = our_step(logits, canvas, prompt, tau_mask, tau_edit)
        assert torch.equal(ours, theirs.prev_sample)
        assert torch.equal(filled, theirs.transfer_index) and torch.equal(edited, theirs.editing_transfer_index)


def test_a_whole_block_decoded_by_both_goes_through_the_same_canvases():
    """Logits that depend on the canvas, step after step, until both have nothing left to do."""
    oracle, generator = scheduler(), torch.Generator().manual_seed(0)
    table = 3 * torch.randn(SIZE, VOCABULARY, SIZE, VOCABULARY, generator=generator)  # what each token at each place says of each place
    table[..., MASK] = -torch.inf
    changes = 0
    for start in range(20):
        ours = theirs = torch.full((1, SIZE), MASK)
        ours[0, 0] = theirs[0, 0] = 5 + start % (VOCABULARY - 5)
        prompt = torch.arange(SIZE) == 0
        for step in range(3 * SIZE):
            logits = (table[torch.arange(SIZE), ours[0]].nan_to_num(neginf=-1e9).mean(0))[None]
            ours, _, edited = our_step(logits, ours, prompt, 0.6, 0.4)
            changes += int(edited.sum())
            theirs = oracle.step(logits, timestep=step, sample=theirs, mask_token_id=MASK, threshold=0.6, editing_threshold=0.4, prompt_mask=prompt).prev_sample
            assert torch.equal(ours, theirs)
        assert not (ours == MASK).any()
    assert changes  # edits did happen


@pytest.mark.parametrize("per_block", [False, True])
def test_1_over_t_loss_is_the_published_sum_written_out(per_block):
    """LLaDA guidelines: the cross-entropy of every masked token over its own t, summed, over the number of maskable tokens."""
    x0, _ = text(4, 16)
    maskable = torch.arange(16).expand(4, -1) >= 3
    t = block_rates(4, 4, low=0.2, generator=torch.Generator().manual_seed(0)) if per_block else torch.tensor([0.2, 0.5, 0.7, 1.0])
    noised = corrupt(x0, maskable, block_size=4, mask_token_id=MASK, forbidden_ids=range(5), t=t, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(4, 16, VOCABULARY, generator=torch.Generator().manual_seed(2))
    total = 0.0
    for row in range(4):
        for i in range(16):
            if noised.noisy_ids[row, i] == MASK:
                rate = t[row, i // 4] if per_block else t[row]
                p = torch.exp(logits[row, i].double())
                total -= (p[x0[row, i]] / p.sum()).log().item() / rate.item()
    assert diffusion_loss(logits, x0, noised, weighting="1/t").total.item() == pytest.approx(total / (4 * 13), rel=1e-5)


def test_1_over_t_and_the_uniform_subset_form_have_the_same_mean():
    """LLaDA guidelines Eq. 6: t ~ U(0, 1) with 1/t, and m ~ U{1..n} with n/m, estimate the same sum; n = 3, enumerated against sampled."""
    nll = torch.tensor([1.0, 2.0, 4.0])  # of each token, whatever is masked with it: then the exact value is their sum
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((1, 3), 7)
    from hildalib.objective import combine

    draws = []
    for _ in range(4000):
        noised = corrupt(x0, torch.ones(1, 3, dtype=torch.bool), block_size=3, mask_token_id=MASK, forbidden_ids=[], low=0.02, generator=generator)
        draws.append(3 * combine(nll[None], noised, weighting="1/t").m2t)
    draws = torch.stack(draws)
    assert abs(draws.mean() - 7) < 4 * draws.std() / len(draws) ** 0.5
