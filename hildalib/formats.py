"""The same weights in fewer bits, and compiled forwards: what they take, how fast they are here, and why some do not run.

Entry points: FORMATS (names), `convert` (a model in a format), `weight_bytes`, `table` (a row a format). int8 and int4 are torchao's, an optional
package; "compiled" is the float32 forward of decoding as one graph of torch.compile, for one shape.
"""

import copy
import time
import warnings
from collections.abc import Callable

import pandas as pd
import torch

from hildalib import HildaError, attention
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.forward import Forward
from hildalib.roofline import in_turns

GROUP = 32  # weights that share a scale in int4: torchao's smallest usual one, a quarter of the width of a nano
FORMATS = {"float32": None, "bfloat16": None, "compiled": None, "int8": "Int8WeightOnlyConfig", "int8, rows too": "Int8DynamicActivationInt8WeightConfig",
           "int4": "IntxWeightOnlyConfig", "int4, packed": "Int4WeightOnlyConfig"}


def _options(name: str) -> dict:
    """int4 in the general form is kept one weight a byte; the packed form needs a kernel of its own."""
    if name == "int4":
        from torchao.quantization import PerGroup

        return {"weight_dtype": torch.int4, "granularity": PerGroup(GROUP)}
    return {"group_size": GROUP} if name == "int4, packed" else {}


def convert(model, name: str):
    """A copy of `model` in the format; its head is then no longer tied. Raises HildaError with the reason where that does not run here."""
    if name not in FORMATS:
        raise HildaError(f"format {name!r} is unknown; use one of {', '.join(FORMATS)}")
    made = copy.deepcopy(model)
    if FORMATS[name] is None:
        return made.bfloat16() if name == "bfloat16" else made
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that other machines have
            from torchao import quantization

            quantization.quantize_(made, getattr(quantization, FORMATS[name])(**_options(name)))
    except (ImportError, RuntimeError, AssertionError, NotImplementedError, AttributeError) as error:
        remedy = "pip install torchao" if isinstance(error, ModuleNotFoundError) and "torchao" in str(error) else "leave it out"
        raise HildaError(f"format {name!r} does not run here: {next(iter(str(error).splitlines()), type(error).__name__)}; {remedy}") from error
    return made


def weight_bytes(model) -> int:
    """Bytes of the weights as they lie in memory, tied ones once; a quantised weight is its codes and scales."""
    seen = {}
    for weight in (*model.parameters(), *model.buffers()):
        parts = [getattr(weight, part) for part in weight.__tensor_flatten__()[0]] if hasattr(weight, "__tensor_flatten__") else [weight]
        seen |= {part.data_ptr(): part.nbytes for part in parts if isinstance(part, torch.Tensor) and part.numel()}
    return sum(seen.values())


def _prepared(model, name: str, size: int, context: int) -> tuple[dict, Callable[[], None] | None]:
    """The row of a format as `table` has it, still without its time, and the forward to be timed; None with the reason where there is none."""
    row = {"format": name, "milliseconds": float("nan"), "megabytes": float("nan"), "compile_s": 0.0, "reason": ""}
    try:
        made = convert(model, name)
        forward, cache, ids = Forward(made), BlockCache(context + size), torch.zeros(1, context + size, dtype=torch.long)
        before, block = torch.arange(context)[None], context + torch.arange(size)[None]
        forward(ids[:, :context], before, attention.window(before, cache.at(before).used, 1), cache, None)
        cache.at(block)
        mask = attention.window(block, cache.used, 1)
        compiled = torch.compile(forward, dynamic=False) if name == "compiled" else forward
        run = lambda: compiled(ids[:, context:], block, mask, cache, None)  # noqa: E731
        start = time.perf_counter()
        run()
        row["compile_s"] = (time.perf_counter() - start) * (name == "compiled")
        return row | {"megabytes": weight_bytes(made) / 1e6}, run
    except (HildaError, RuntimeError) as error:
        return row | {"reason": str(error).splitlines()[0]}, None


@torch.inference_mode()
def table(model, names: list[str], *, size: int, context: int, seconds: float = 0.5, rounds: int = 3) -> pd.DataFrame:
    """A row a format in `names`: a forward over `size` positions behind `context` cached ones.

    They are timed `in_turns`. Columns: format, milliseconds (the shortest CPU time), megabytes (of the weights), compile_s (wall seconds
    that the first call took; 0 where nothing is compiled), reason ("" or why it does not run).
    """
    prepared = [_prepared(model, name, size, context) for name in names]
    timed = [(row, run) for row, run in prepared if run]
    for (row, _), fastest in zip(timed, in_turns([run for _, run in timed], seconds=seconds, rounds=rounds, clock=time.process_time)):
        row["milliseconds"] = 1e3 * fastest
    return pd.DataFrame([row for row, _ in prepared], columns=["format", "milliseconds", "megabytes", "compile_s", "reason"])
