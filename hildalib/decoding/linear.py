"""A linear layer as a function of rows, its weight laid out once as the CPU's matmul reads it.

A matmul of a few rows, which is what a decode consists of, takes about as long as laying out the weight for it, and PyTorch does both each time.
oneDNN keeps the layout: the same sums, in bfloat16 to the bit, in half to three quarters of the time, and those of a row hardly depend on the rows
beside it. Weights that read the same rows are laid out as one. Entry points: `linear`, `linears`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ROWS = 8      # for which the layout is chosen: a block and its copy; up to 64 rows are as fast with it as with their own
WORTH = 2**17  # weights from which oneDNN's call, 10 microseconds more than MKL's, pays in float32
PROBES = 64   # weights compared, next to the version that PyTorch counts, before a layout is used again: changes through .data are not counted

_layouts = WeakTensorKeyDictionary()  # the first weight -> what all were then, their layout; for as long as it lives


def linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x (N, in) -> x W' + b (N, out), W (out, in) as it is now. On a CPU a second copy of the weight is kept while the weight lives; to be called
    where nothing is differentiated."""
    if _fits([weight]):
        return _laid_out([weight], bias)
    turned = weight.t()  # a matmul takes half the time of F.linear at a row or two
    return (lambda x: torch.mm(x, turned)) if bias is None else (lambda x: torch.addmm(bias, x, turned))


def linears(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Callable[[Tensor], Sequence[Tensor]]:
    """x (N, in) -> x W' + b of each weight, as `linear`, in one matmul where weights are laid out; those are slices of one tensor."""
    if not _fits(weights) or len({bias is None for bias in biases}) > 1:
        return _each([linear(weight, bias) for weight, bias in zip(weights, biases)])
    run, sizes = _laid_out(weights, None if biases[0] is None else torch.cat([*biases])), [len(weight) for weight in weights]
    return lambda x: run(x).split(sizes, -1)


def _each(functions: Sequence[Callable]) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda x: [function(x) for function in functions]


def _fits(weights: Sequence[Tensor]) -> bool:
    """Whether oneDNN has a kernel for them together, on this machine, that pays."""
    first, known = weights[0], torch.backends.mkldnn
    if not known.is_available() or not known.enabled or any(type(weight.data) is not Tensor or weight.device.type != "cpu" or weight.dtype != first.dtype
                                                            for weight in weights):
        return False
    if first.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return first.dtype == torch.float32 and sum(weight.numel() for weight in weights) >= WORTH


def _laid_out(weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    layout, call = _layout(weights), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: call(x, layout, bias, "none", [], "")


def _layout(weights: Sequence[Tensor]) -> Tensor:
    """Of all `weights`, one below the other, as they are now."""
    counted = [(weight.data_ptr(), None if weight.is_inference() else weight._version, weight.shape) for weight in weights]
    probed = torch.stack([_probes(weight) for weight in weights])
    kept = _layouts.get(weights[0])
    if kept is None or kept[0] != counted or not torch.equal(kept[1], probed):
        with torch.no_grad():
            whole = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
            kept = _layouts[weights[0]] = counted, probed, _reorder(whole)
    return kept[2]


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def _probes(weight: Tensor) -> Tensor:
    """(PROBES,) of its elements, apart by a step that meets all columns."""
    flat = weight.detach().reshape(-1)
    return flat[torch.arange(PROBES) * (len(flat) // PROBES | 1) % len(flat)]
