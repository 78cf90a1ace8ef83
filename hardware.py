"""What this machine can do: device, native bf16, the peak of its matrix products, and a description for the record."""

import os
import platform
import shutil
import sysconfig
import time
from pathlib import Path

import torch

from spec import UsageError

# Dense bf16 peaks in FLOP/s from the vendors' data sheets, by a word of torch.cuda.get_device_name (longest match wins).
GPU_PEAKS = {
    "A100": 312e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
}


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA when there is one, else the CPU.

    Raises:
        UsageError: the device asked for is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}: use auto, cpu, cuda or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu, or install a CUDA build")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch sees no Apple GPU here; use --device cpu")
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 here, not merely emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Compute type and the reason for it. `auto` is bf16 where it is native, else fp32.

    Raises:
        UsageError: bf16 asked for where the device only emulates it.
    """
    native = has_native_bf16(device)
    if name == "fp32":
        return torch.float32, "asked for"
    if name == "bf16":
        if not native:
            raise UsageError(f"--dtype bf16: this {device.type} has no native bf16 and would emulate it slowly; use fp32")
        return torch.bfloat16, "asked for"
    return (torch.bfloat16, "native here") if native else (torch.float32, f"no native bf16 on this {device.type}")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: on CPU a C++ compiler and Python's headers."""
    if device.type != "cpu":
        return True
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """Peak of matrix products in FLOP/s, and where the figure is from; (None, ...) where it is unknown.

    GPUs: data sheet (bf16 only). CPU: the fastest of a few 2048^3 products timed now, about 0.2 s.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [word for word in GPU_PEAKS if word in name]
        if known and dtype == torch.bfloat16:
            return GPU_PEAKS[max(known, key=len)], "data sheet"
        return None, "unknown GPU or dtype"
    if device.type != "cpu":
        return None, "unknown device"
    n = 2048 if dtype == torch.bfloat16 else 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best = float("inf")
    for _ in range(8):  # the first ones set up the primitive
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, "measured at start"


def processor_name() -> str:
    """The CPU's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict:
    """Hardware and software facts for env.json."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device.type == "cuda" else []
    return {
        "device": device.type,
        "cpu": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "python": platform.python_version(),
        "platform": platform.system(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
