"""A linear layer as a function of rows, its weight laid out once as the CPU's matmul reads it.

A matmul of a few rows, which is what a decode consists of, takes about as long as laying out the weight for it, and PyTorch does both each time.
oneDNN keeps the layout: the same sums, in bfloat16 to the bit, in half to three quarters of the time, and those of a row hardly depend on the rows
beside it (torch.compile with freezing does the same, for one shape a graph; a decode meets dozens). Weights that read the same rows are laid out as one. Entry points: `linear`, `linears`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ROWS = 8  # for which the layout is chosen: a block and its copy; up to 64 rows are as fast with it as with their own
WORTH = 2**17  # weights from which oneDNN's call, 10 microseconds more than MKL's, pays in float32 whatever the rows
BUSY = 2**21  # multiplications from which it pays with fewer weights, and with looking whether they are still those of the layout
PROBES = 64  # weights compared, next to the version that PyTorch counts, before a layout is used again: changes through .data are not counted

_layouts = WeakTensorKeyDictionary()  # the first weight -> _Kept, for as long as it lives


class _Kept(NamedTuple):
    """A layout of weights: address and version of each, views of their probes, what those were then."""

    counted: list
    probes: list[Tensor]
    were: Tensor
    layout: Tensor


def linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x (N, in) -> x W' + b (N, out), W (out, in) as it is now; to be called where nothing is differentiated. On a CPU a second copy of the weight
    is kept while the weight lives, but of a small one in float32 only once it has met many rows."""
    return linears([weight], [bias])


def linears(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor | list[Tensor]]:
    """x (N, in) -> what each weight makes of it: side by side, (N, sum of out), of one matmul, or, where that is slower, a list; of one weight a
    tensor."""
    together = len({bias is None for bias in biases}) == 1 and _has_kernel(weights)
    if together and (weights[0].dtype != torch.float32 or sum(map(Tensor.numel, weights)) >= WORTH):
        return _laid_out(weights, biases)
    if len(weights) > 1 and not together:
        functions = [linear(weight, bias) for weight, bias in zip(weights, biases)]
        return lambda x: [function(x) for function in functions]
    few = _plain(weights[0], biases[0]) if len(weights) == 1 else _plains(weights, biases)
    if not together:
        return few
    most = -(-BUSY // sum(map(Tensor.numel, weights)))
    return lambda x: few(x) if len(x) < most else _laid_out(weights, biases)(x)


def _plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    turned = weight.t()  # a matmul takes half the time of F.linear at a row or two
    return (lambda x: torch.mm(x, turned)) if bias is None else (lambda x: torch.addmm(bias, x, turned))


def _plains(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Callable[[Tensor], list[Tensor]]:
    turned = [weight.t() for weight in weights]
    if biases[0] is None:
        return lambda x: [torch.mm(x, part) for part in turned]
    return lambda x: [torch.addmm(bias, x, part) for bias, part in zip(biases, turned)]


def _has_kernel(weights: Sequence[Tensor]) -> bool:
    """Whether oneDNN multiplies all of them together on this machine."""
    dtype, known = weights[0].dtype, torch.backends.mkldnn
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    plain = all(weight.device.type == "cpu" and weight.dtype == dtype and type(weight.data) is Tensor for weight in weights)
    return plain and known.is_available() and known.enabled and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _laid_out(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
    call, layout, bias = torch.ops.mkldnn._linear_pointwise.default, _layout(weights), None if biases[0] is None else torch.cat([*biases])
    return lambda x: call(x, layout, bias, "none", [], "")


def _layout(weights: Sequence[Tensor]) -> Tensor:
    """Of all `weights`, one below the other, as they are now."""
    counted = [(weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in weights]
    kept = _layouts.get(weights[0])
    if kept and kept.counted == counted and torch.equal(torch.cat(kept.probes), kept.were):
        return kept.layout
    probes = [_probes(weight) for weight in weights]
    with torch.no_grad():
        whole = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
        _layouts[weights[0]] = kept = _Kept(counted, probes, torch.cat(probes), _reorder(whole))
    return kept.layout


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def _probes(weight: Tensor) -> Tensor:
    """(about PROBES,) of its elements, apart by an odd step, which meets all columns."""
    return weight.detach().view(-1)[::weight.numel() // PROBES | 1]
