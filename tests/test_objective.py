"""Losses against numbers worked out by hand, closed forms, and the cases in which a careless sum gives nan."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import MASK, text

from hildalib import HildaError
from hildalib.noise import Noised, complement, corrupt
from hildalib.objective import combine, correct_entropy, diffusion_loss, parent_kl, predictable, source_rows, target_counts

LOSS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])


def by_hand():
    """Row 0: mask mask edit keep, t 0.5; row 1: mask edit edit prompt, t 0.25."""
    def where(*spots):
        out = torch.zeros(2, 4, dtype=torch.bool)
        out[tuple(torch.tensor(spots).T)] = True
        return out
    t = torch.tensor([[0.5] * 4, [0.25] * 4])
    return Noised(torch.zeros(2, 4, dtype=torch.long), where((0, 0), (0, 1), (1, 0)), where((0, 2), (1, 1), (1, 2)), t, ~where((1, 3)))


@pytest.mark.parametrize("weighting, m2t", [("mean", (1 + 2 + 5) / 3), ("1/t", (1 / 0.5 + 2 / 0.5 + 5 / 0.25) / 7)])
def test_losses_of_a_worked_example(weighting, m2t):
    losses = combine(LOSS, by_hand(), weighting=weighting, edit_weight=0.5, keep_weight=0.1)
    t2t, keep = (3 + 6 + 7) / 3, 4.0
    assert torch.allclose(torch.stack([losses.m2t, losses.t2t, losses.keep, losses.total]), torch.tensor([m2t, t2t, keep, m2t + 0.5 * t2t + 0.1 * keep]))


@pytest.mark.parametrize("weighting", ["mean", "1/t"])
def test_parts_with_the_counts_of_the_whole_add_up_to_the_whole(weighting):
    whole = by_hand()
    parts = [Noised(*(getattr(whole, name)[row:row + 1] for name in ("noisy_ids", "mask_targets", "edit_targets", "t", "maskable"))) for row in (0, 1)]
    counts = target_counts(whole, weighting)
    total = sum(combine(LOSS[row:row + 1], part, weighting=weighting, keep_weight=0.3, counts=counts).total for row, part in enumerate(parts))
    assert torch.isclose(total, combine(LOSS, whole, weighting=weighting, keep_weight=0.3).total)


def test_unknown_weighting_is_refused():
    with pytest.raises(HildaError, match="'2/t' is unknown; use '1/t', 'mean' or 'context'"):
        combine(LOSS, by_hand(), weighting="2/t")


@pytest.mark.parametrize("weighting", ["mean", "1/t"])
def test_no_targets_and_rubbish_outside_the_targets_give_no_nan(weighting):
    x0, _ = text(1, 8)
    empty = corrupt(x0, torch.zeros_like(x0, dtype=torch.bool), block_size=4, mask_token_id=MASK, forbidden_ids=[], t=0.0)
    assert combine(torch.full(x0.shape, torch.nan), empty, weighting=weighting, keep_weight=1.0).total == 0
    rubbish = torch.where(by_hand().maskable, LOSS, torch.inf)
    assert torch.equal(combine(rubbish, by_hand(), weighting=weighting).total, combine(LOSS, by_hand(), weighting=weighting).total)


def test_the_complement_of_a_fully_masked_block_adds_nothing_to_the_1_over_t_loss():
    """Its rate is 0: 1/t is infinite there, but nothing is masked."""
    x0, _ = text(2, 8)
    rates = torch.tensor([[1.0, 0.5]] * 2)
    first = corrupt(x0, torch.ones_like(x0, dtype=torch.bool), block_size=4, mask_token_id=MASK, forbidden_ids=[], t=rates,
                    generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 8, 19, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = diffusion_loss(logits, x0, complement(first, x0, MASK)).m2t
    loss.backward()
    assert loss > 0 and torch.isfinite(logits.grad).all() and (logits.grad[:, :4] == 0).all()


def test_the_first_token_of_a_document_has_a_source_row_only_without_shift():
    docs = torch.tensor([[0, 0, 1, 1, 2, -1, -1]])
    maskable = torch.tensor([[True, True, True, True, True, True, False]])
    assert predictable(maskable, docs, False)[0].tolist() == [True] * 5 + [False] * 2
    assert predictable(maskable, docs, True)[0].tolist() == [False, True, False, True, False, False, False]


def test_source_rows_written_out_for_length_4_and_block_size_2():
    assert source_rows(4, 2, False).tolist() == [[0, 1, 2, 3]]
    assert source_rows(4, 2, False, copies=2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert source_rows(4, 2, True).tolist() == [[0, 0, 5, 2]]  # position 2 begins a block: clean row 1, which is row 4 + 1
    assert source_rows(4, 2, True, copies=2).tolist() == [[0, 0, 9, 2], [4, 4, 9, 6]]
    assert source_rows(4, 4, True, clean=False).tolist() == [[0, 0, 1, 2]]


def logits_pair(seed, rows=6, size=9, barred=False):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, size, generator=generator) for _ in range(2))
    if barred:
        student[:, MASK] = teacher[:, MASK] = -torch.inf
    return student, teacher.log_softmax(-1)


@pytest.mark.parametrize("barred", [False, True])
def test_parent_kl_over_the_whole_vocabulary_is_the_exact_kl(barred):
    student, teacher = logits_pair(0, barred=barred)
    finite = [i for i in range(9) if not barred or i != MASK]
    p, q = teacher.double().exp()[:, finite], student.double().softmax(-1)[:, finite]
    exact = (p * (p / q).log()).sum(-1)
    student.requires_grad_()
    ours = parent_kl(student, *teacher.topk(9, dim=-1))
    ours.sum().backward()
    assert torch.allclose(ours.double(), exact, atol=1e-5) and torch.isfinite(student.grad).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 8))
def test_parent_kl_grows_with_k_up_to_the_exact_kl_and_is_never_negative(seed, k):
    student, teacher = logits_pair(seed)
    values = [parent_kl(student, *teacher.topk(n, dim=-1)) for n in (k, k + 1)]
    assert (values[0] >= -1e-5).all() and (values[0] <= values[1] + 1e-4).all()


def test_parent_kl_to_itself_is_zero_with_zero_gradient():
    _, teacher = logits_pair(3)
    student = teacher.clone().requires_grad_()
    for k in (1, 4, 9):
        student.grad = None
        value = parent_kl(student, *teacher.topk(k, dim=-1))
        value.sum().backward()
        assert value.abs().max() < 1e-5 and student.grad.abs().max() < 1e-5


def test_mass_leaked_into_the_tail_costs():
    """Half of the parent's only token's mass moved elsewhere: KL(1 || 1/2) = ln 2."""
    teacher = torch.tensor([[0.0]])
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert torch.isclose(parent_kl(student, teacher, torch.tensor([[0]])), torch.tensor(math.log(2)), atol=1e-5)


def test_entropy_counts_right_rows_only_and_survives_a_barred_mask():
    uniform = torch.zeros(3, 5)
    uniform[:, MASK] = -torch.inf  # four outcomes remain: ln 4
    uniform[:, 0] += torch.tensor([1e-4, 1e-4, 1e-4])  # makes 0 the argmax
    logits = uniform.requires_grad_()
    entropy, right = correct_entropy(logits, torch.tensor([0, 1, 0]))
    entropy.sum().backward()
    assert right.tolist() == [True, False, True] and torch.allclose(entropy, math.log(4) * right, atol=1e-3)
    assert torch.isfinite(logits.grad).all() and (logits.grad[1] == 0).all()
