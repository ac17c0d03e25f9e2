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
WORTH = 2**17  # weights from which oneDNN's call, 10 microseconds more than MKL's, pays in float32
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
    is kept while the weight lives, but of a small one in float32."""
    layout = _layout([weight])
    if layout is not None:
        return _laid_out(layout, bias)
    turned = weight.t()  # a matmul takes half the time of F.linear at a row or two
    return (lambda x: torch.mm(x, turned)) if bias is None else (lambda x: torch.addmm(bias, x, turned))


def linears(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor | list[Tensor]]:
    """x (N, in) -> what `linear` makes of it with each weight: side by side, (N, sum of out), of one matmul where they are laid out together, else a
    list."""
    if len(weights) == 1:
        return linear(weights[0], biases[0])
    layout = _layout(weights) if len({bias is None for bias in biases}) == 1 else None
    if layout is not None:
        return _laid_out(layout, None if biases[0] is None else torch.cat([*biases]))
    functions = [linear(weight, bias) for weight, bias in zip(weights, biases)]
    return lambda x: [function(x) for function in functions]


def _pays(weights: Sequence[Tensor]) -> bool:
    """Whether oneDNN has a kernel for all of them together, on this machine, that is faster than PyTorch's own."""
    dtype, known = weights[0].dtype, torch.backends.mkldnn
    if dtype != torch.bfloat16 and (dtype != torch.float32 or sum(map(Tensor.numel, weights)) < WORTH):
        return False
    plain = all(weight.device.type == "cpu" and weight.dtype == dtype and type(weight.data) is Tensor for weight in weights)
    return plain and known.is_available() and known.enabled and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _laid_out(layout: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    call = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: call(x, layout, bias, "none", [], "")


def _layout(weights: Sequence[Tensor]) -> Tensor | None:
    """Of all `weights`, one below the other, as they are now; None where it would not pay."""
    counted = [(weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in weights]
    kept = _layouts.get(weights[0])
    if kept and kept.counted == counted and torch.equal(torch.cat(kept.probes), kept.were):
        return kept.layout
    if not _pays(weights):
        return None
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
