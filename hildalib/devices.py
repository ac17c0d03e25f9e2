"""Devices: what this machine can compute with, and the numeric settings that follow.

Entry points: `choose_device`, `processes`, `choose_dtype`, `prepare` (called by every load), `start_peak` and `peak_memory_gb`, and `device_report`
(what `hilda doctor` prints). bfloat16 is chosen only where hardware multiplies it; a GTX 1080 (sm_61) gets float32 and plain (math) attention.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import platform
import re
import time
from pathlib import Path

import torch

from hildalib import HildaError

BF16_CAPABILITY = (8, 0)  # Ampere: first NVIDIA generation whose tensor cores multiply bfloat16
TENSOR_CAPABILITY = (7, 0)  # Volta: first with tensor cores, and the oldest that Triton (hence FlexAttention) compiles for
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of a Linux process: its peak, and where a 5 starts it anew
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.cache
def cuda_fault() -> str:
    """"" where CUDA computes, else why not. A driver alone is not enough: PyTorch builds drop old cards (sm_61 last in CUDA 12.6 builds)."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device; with an NVIDIA card and its driver: {_cuda_build()}"
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        return (f"{torch.cuda.get_device_name()} does not run under PyTorch {torch.__version__} ({str(error).splitlines()[0]}); a card older than "
                f"sm_75 needs a build for CUDA 12.6: {_cuda_build()}")
    return ""


def _cuda_build() -> str:
    """The command that installs this PyTorch for CUDA 12.6, the last to have kernels for cards older than sm_75."""
    return f"python -m pip install torch=={torch.__version__.split('+')[0]}+cu126 --index-url https://download.pytorch.org/whl/cu126"


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """"auto" is CUDA where it computes, else the CPU. Raises HildaError if the device asked for is absent."""
    if str(device) == "auto":
        return torch.device("cpu" if cuda_fault() else "cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise HildaError(f"unknown device {device!r}; use auto, cpu, cuda, cuda:0 or mps") from error
    fault = ""
    if chosen.type == "cuda":
        fault = cuda_fault() or ("" if (chosen.index or 0) < torch.cuda.device_count() else f"there are {torch.cuda.device_count()} CUDA devices")
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        fault = "this machine has no Apple GPU"
    if fault:
        raise HildaError(f"device {str(device)!r} cannot be used: {fault}; or use device auto or cpu")
    return chosen


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); elsewhere bf16 is emulated and slower than fp32."""
    flags = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def processes():
    """accelerate's PartialState: this process among those of its launcher (alone without one), on its own device. To be asked before a model is loaded."""
    from accelerate import PartialState

    return PartialState(cpu=choose_device().type == "cpu")  # without a GPU it must be told


def choose_dtype(device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> torch.dtype:
    """The dtype asked for, or with "auto": bfloat16 on CUDA capability >= 8.0 and on CPUs that multiply it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise HildaError(f"unknown dtype {dtype!r}; use auto, " + ", ".join(DTYPES))
        return DTYPES[dtype]
    return torch.float32 if bf16_fault(choose_device(device)) else torch.bfloat16


def bf16_fault(device: torch.device) -> str:
    """"" where `device` multiplies bfloat16 in hardware, else why it should not be used there."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "" if (major, minor) >= BF16_CAPABILITY else f"this card (sm_{major}{minor}) has no bfloat16"
    return "" if device.type == "cpu" and cpu_has_bf16() else "this CPU emulates bfloat16" if device.type == "cpu" else f"bfloat16 is not known to be fast on {device.type}"


def prepare(device: torch.device) -> list[str]:
    """Sets the process-wide switches this device needs and names them: before Volta only math attention is dependable."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= TENSOR_CAPABILITY:
        return []
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return ["math SDPA only"]


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 512) -> float:
    """GFLOP/s (2 * size^3 operations) of a `size`^3 matrix product: the best of up to four, stopping after 0.2 s where it is emulated."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    while len(seconds) < 4 and sum(seconds) < 0.2:
        wait()
        start = time.perf_counter()
        left @ right
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def nf4_works(device: torch.device) -> str:
    """"yes", or why a bitsandbytes NF4 layer does not run on `device`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "no: bitsandbytes is not installed"
    try:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(device)
        return "yes" if layer(torch.ones(1, 64, device=device)).isfinite().all() else "no: the result is not finite"
    except Exception as error:  # a broken CUDA set-up fails in many ways, and all of them mean the same here
        return f"no: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        import psutil

        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def start_peak() -> None:
    """`peak_memory_gb` counts from here on, where the system lets a process start its peak anew (CUDA, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif RESET.exists():
        with contextlib.suppress(OSError):  # a sandbox may forbid it; then the peak is that of the process
            RESET.write_text("5")


def peak_memory_gb() -> float:
    """Peak memory of this process in GB since `start_peak` (elsewhere than on CUDA and Linux since it began): the accelerator's if there is one, else
    resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(found[1]) * 1024 / 1e9
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss) / 1e9  # Windows keeps a peak; elsewhere the current size, logged often, has one


def device_report(device: str | torch.device = "auto") -> dict[str, str]:
    """What this machine has and which settings follow, as printable pairs; takes about a second. Key order is print order."""
    asked, device = str(device), choose_device(device)
    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else None
    dtype = choose_dtype(device)
    flex = cuda and capability >= TENSOR_CAPABILITY and importlib.util.find_spec("triton") is not None
    settings = ["sdpa attention", f"{dtype} weights".replace("torch.", ""), *prepare(device)]
    if not flex:
        settings.append("dense 4-D masks")
    if device.type == "cpu" and asked == "auto":
        settings.append(f"CPU, because {cuda_fault()}")
    return {
        "device": f"{device} ({torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()})",
        "capability": f"sm_{capability[0]}{capability[1]}" if cuda else torch.backends.cpu.get_cpu_capability(),
        "memory": _memory(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "fp32 matmul": f"{matmul_rate(device, torch.float32):.0f} GFLOP/s",
        "bf16 matmul": f"no: {bf16_fault(device)}" if cuda and bf16_fault(device) else f"{matmul_rate(device, torch.bfloat16):.0f} GFLOP/s",
        "flash attention": "yes, but never under a 4-D mask" if cuda and capability >= BF16_CAPABILITY else "no",
        "flex attention": "yes" if flex else "no",
        "bitsandbytes": _version("bitsandbytes"),
        "nf4": nf4_works(device),
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft")),
        "settings": "; ".join(settings),
    }
