"""What this machine can do, a description of it for the record, and CARDS: accelerators with what their data sheets say."""

import contextlib
import importlib.util
import math
import os
import platform
import shutil
import sysconfig
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.spec import UsageError


@dataclass(frozen=True)
class Card:
    """One accelerator, by its data sheet. Prices are RunPod's of March 2026, after deploybase.ai (best-gpu-for-llm-training,
    2026-03-21; runpod-gpu-pricing, 2026-03-10); others differ by 2.5 times."""

    bf16: float  # FLOP/s, dense, with fp32 accumulation
    fp8: float  # 0: the card has none
    fp32: float
    bandwidth: float  # of its memory, bytes/s
    memory: float  # bytes
    link: float  # bytes/s to the other cards of its machine, in one direction: NVLink, Infinity Fabric, else PCIe
    price: float  # dollars an hour; 0: unknown, give --gpu-price
    source: str
    reached: float = 0.80  # share of bf16 in the fastest large products (MAMF, github.com/stas00/ml-engineering; else H100's)
    network: float = 50e9  # bytes/s to other machines, one adapter a card as in the vendors' own systems
    fp64: float = 1 / 64  # as a share of fp32


# By a word of torch.cuda.get_device_name (longest match wins).
CARDS: dict[str, Card] = {
    "A100": Card(312e12, 0, 19.5e12, 2.039e12, 80e9, 300e9, 1.39, "NVIDIA A100 80GB SXM data sheet", 0.859, 25e9, 1.0),
    "A100-SXM4-40GB": Card(312e12, 0, 19.5e12, 1.555e12, 40e9, 300e9, 0, "NVIDIA A100 40GB SXM data sheet", 0.859, 25e9, 1.0),
    "A100 80GB PCIe": Card(312e12, 0, 19.5e12, 1.935e12, 80e9, 32e9, 0, "NVIDIA A100 80GB PCIe data sheet", 0.859, 25e9, 1.0),
    "A100-PCIE-40GB": Card(312e12, 0, 19.5e12, 1.555e12, 40e9, 32e9, 0, "NVIDIA A100 40GB PCIe data sheet", 0.859, 25e9, 1.0),
    "H100": Card(989e12, 1979e12, 67e12, 3.35e12, 80e9, 450e9, 2.69, "NVIDIA H100 SXM data sheet", 0.803, fp64=1.0),
    "H100 PCIe": Card(756e12, 1513e12, 51e12, 2.0e12, 80e9, 64e9, 1.99, "NVIDIA H100 PCIe data sheet", fp64=1.0),
    # their NVLink bridges join two or four cards alone
    "H100 NVL": Card(835e12, 1671e12, 60e12, 3.9e12, 94e9, 64e9, 0, "NVIDIA H100 NVL data sheet", fp64=1.0),
    "H200 NVL": Card(835e12, 1671e12, 60e12, 4.8e12, 141e9, 64e9, 0, "NVIDIA H200 NVL data sheet", fp64=1.0),
    "H200": Card(989e12, 1979e12, 67e12, 4.8e12, 141e9, 450e9, 3.59, "NVIDIA H200 SXM data sheet", 0.803, fp64=1.0),
    "GH200": Card(989e12, 1979e12, 67e12, 4.0e12, 96e9, 450e9, 0, "NVIDIA GH200 data sheet, 96 GB", 0.83, fp64=1.0),
    "B200": Card(2250e12, 4500e12, 75e12, 7.7e12, 180e9, 900e9, 5.98, "NVIDIA HGX B200 data sheet", 0.776, fp64=0.5),
    "MI300X": Card(1307e12, 2615e12, 163e12, 5.3e12, 192e9, 448e9, 0, "AMD Instinct MI300X data sheet", 0.601, fp64=1.0),
    "A6000": Card(155e12, 0, 38.7e12, 0.768e12, 48e9, 32e9, 0, "NVIDIA RTX A6000 data sheet"),
    "L40S": Card(362e12, 733e12, 91.6e12, 0.864e12, 48e9, 32e9, 0.79, "NVIDIA L40S data sheet"),
    "RTX 3090": Card(71e12, 0, 35.6e12, 0.936e12, 24e9, 32e9, 0.22, "NVIDIA GA102 white paper"),
    "RTX 4090": Card(165e12, 330e12, 82.6e12, 1.008e12, 24e9, 32e9, 0.34, "NVIDIA Ada white paper"),
    "RTX 5090": Card(210e12, 419e12, 105e12, 1.792e12, 32e9, 64e9, 0.69, "NVIDIA RTX Blackwell white paper"),
}


def card_named(name: str) -> tuple[str, Card] | None:
    """The table's word and card for a GPU's name, or None. Laptops and D models have smaller cards of the same name."""
    known = [word for word in CARDS if word in name and "Laptop" not in name and not name.endswith(" D")]
    word = max(known, key=len, default=None)
    return word and (word, CARDS[word])


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA when there is one, else the CPU. Raises UsageError: the device asked for is not there."""
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
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Compute type and the reason for it. `auto`: bf16 where it is native, else fp32. Raises UsageError: bf16 only emulated."""
    native = has_native_bf16(device)
    if name == "bf16" and not native:
        raise UsageError(f"--dtype bf16: this {device.type} has no native bf16 and would emulate it slowly; use fp32")
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name], "asked for"
    return (torch.bfloat16, "native here") if native else (torch.float32, f"no native bf16 on this {device.type}")


def pick_fp8(name: str, device: torch.device) -> tuple[bool, str]:
    """Does the head multiply 8-bit floats, and what is to be said of it? Raises UsageError: asked for on a GPU without."""
    if name == "same":
        return False, ""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9):
        return True, ""
    if name == "fp8" and device.type == "cpu":
        return True, "8-bit floats of the head are simulated on this cpu"
    lacking = f"{device_name(device)} has no 8-bit floats of the kind that NVIDIA's cards have from compute capability 8.9 on"
    if name == "fp8":
        raise UsageError(f"--head-dtype fp8: {lacking}: use auto or same")
    return False, f"{lacking}: the head's products stay in the type of the others"


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: on a CUDA GPU, of tensors; else resident. 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # of Linux, whose ru_maxrss begins with what the process that started this one held
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compiler_lacks(device: torch.device) -> str:
    """What torch.compile lacks here: on a CPU a C++ compiler and Python's headers, on CUDA Triton. Nothing: empty."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "no Triton here"
    if device.type != "cpu":
        return ""
    compiler = os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++")))
    there = compiler and Path(sysconfig.get_path("include"), "Python.h").exists()
    return "" if there else "no C++ compiler with Python headers here"


def can_compile(device: torch.device) -> bool:
    return not compiler_lacks(device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """Peak of matrix products in FLOP/s, None where it is unknown, and where the figure is from. GPUs: data sheet (bf16 only).
    CPU: the fastest of a few products timed now, about 0.2 s."""
    if device.type == "cuda":
        known = card_named(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None
        return (known[1].bf16, "data sheet") if known else (None, "unknown GPU or dtype")
    if device.type != "cpu":
        return None, "unknown device"
    n = 2048 if dtype == torch.bfloat16 else 1024
    own = torch.Generator().manual_seed(0)  # the run's own numbers, such as its dropout, stay what they are
    a, b = (torch.randn(n, n, generator=own).to(dtype) for _ in range(2))
    times = timeit.repeat(lambda: a @ b, number=1, repeat=8)  # the first ones set up the primitive
    return 2 * n**3 / min(times), "measured at start"


def card_memory(device: torch.device) -> float:
    """Bytes of a CUDA device, whoever holds them; inf of others."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf


def upload(numbers: Sequence[float], device: torch.device) -> torch.Tensor | None:
    """[n] fp32 on the device, without waiting for it; None without numbers."""
    if not numbers:
        return None
    here = torch.tensor(numbers)
    return (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)


def processor_name() -> str:
    """The CPU's own name where the system tells it."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and software facts for env.json."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device.type == "cuda" else []
    about = dict(device=device.type, cpu=processor_name(), cpu_count=os.cpu_count(), threads=torch.get_num_threads(), gpus=gpus)
    about |= dict(python=platform.python_version(), platform=platform.system())
    return about | dict(torch=torch.__version__, cuda=torch.version.cuda)
