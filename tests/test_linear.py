"""A weight laid out once multiplies as it always did, and is laid out anew when it changes, however it changes."""

import gc

import pytest
import torch
import torch.nn.functional as F

from hildalib.decoding import linear as laid
from hildalib.decoding.linear import linear, linears

SMALL, LARGE = (24, 40), (512, 320)  # below and above what is laid out in float32 before it has met many rows


def drawn(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("rows", [1, 2, 8, 33, 2200])
def test_it_is_f_linear(dtype, shape, rows):
    weight, bias, x = drawn(shape, 1, dtype), drawn(shape[:1], 2, dtype), drawn((rows, shape[1]), 3, dtype)
    close = {"atol": 0.5, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(linear(weight)(x), F.linear(x, weight), **close)
    torch.testing.assert_close(linear(weight, bias)(x), F.linear(x, weight, bias), **close)


@torch.inference_mode()
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [5, 2000])
@pytest.mark.parametrize("shapes", [[(8, 40), (24, 40)], [(200, 320), (56, 320), (256, 320)]])
def test_weights_that_read_the_same_rows_are_one_matmul_or_several(shapes, rows, biased):
    weights = [drawn(shape, number) for number, shape in enumerate(shapes)]
    biases = [drawn(shape[:1], 9 + number) if biased else None for number, shape in enumerate(shapes)]
    x = drawn((rows, shapes[0][1]), 20)
    outs = linears(weights, biases)(x)
    outs = outs.split([len(weight) for weight in weights], -1) if isinstance(outs, torch.Tensor) else outs
    assert len(outs) == len(weights)
    for out, weight, bias in zip(outs, weights, biases):
        torch.testing.assert_close(out, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


def by_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


def by_data(weight):
    weight.data += 0.5


def by_new_storage(weight):
    weight.data = weight.data.clone() * 2


@pytest.mark.parametrize("change", [by_optimizer, by_data, by_new_storage])
def test_a_changed_weight_is_laid_out_anew(change):
    weight, other, x = torch.nn.Parameter(drawn(LARGE)), torch.nn.Parameter(drawn(LARGE, 1)), drawn((4, LARGE[1]), 2)
    with torch.inference_mode():
        before = linears([other, weight], [None, None])(x).chunk(2, -1)[1].clone()
    change(weight)
    with torch.inference_mode():
        after = linears([other, weight], [None, None])(x).chunk(2, -1)[1]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, F.linear(x, weight.detach()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [by_optimizer, by_data, by_new_storage])
def test_so_is_a_small_one_that_has_met_many_rows(change):
    weight, x = torch.nn.Parameter(drawn(SMALL)), drawn((laid.BUSY // 960 + 1, SMALL[1]), 2)
    with torch.inference_mode():
        linear(weight)(x)
    change(weight)
    with torch.inference_mode():
        for rows in (x, x[:3]):
            torch.testing.assert_close(linear(weight)(rows), F.linear(rows, weight.detach()), atol=1e-4, rtol=1e-4)


def test_a_layout_is_made_once_and_goes_with_its_weight(monkeypatch):
    made, call = [], laid.torch.ops.mkldnn._reorder_linear_weight
    if not laid._has_kernel([drawn(LARGE)]):
        pytest.skip("this PyTorch has no oneDNN: nothing is laid out")
    monkeypatch.setattr(laid, "_reorder", lambda *given: made.append(1) or call(*given))
    weight = torch.nn.Parameter(drawn(LARGE))
    gc.collect()  # what other tests left
    held = len(laid._layouts)
    for _ in range(3):
        with torch.inference_mode():
            linear(weight)(drawn((2, LARGE[1])))
    assert len(made) == 1 and len(laid._layouts) == held + 1
    del weight
    gc.collect()
    assert len(laid._layouts) == held


@torch.inference_mode()
def test_a_row_in_bfloat16_has_the_same_numbers_whatever_stands_beside_it():
    weight, x = drawn((1536, 576), 1, torch.bfloat16), drawn((16, 576), 2, torch.bfloat16)
    if not laid._has_kernel([weight]):
        pytest.skip("this CPU has no bfloat16 kernels: PyTorch's own matmul is used")
    run = linear(weight)
    whole = run(x)
    for rows in (1, 2, 4, 8):
        assert torch.equal(run(x[:rows].contiguous()), whole[:rows])
