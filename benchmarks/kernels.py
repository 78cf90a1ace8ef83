"""The Triton kernels, compiled for GPUs that are not there: registers, spills and shared memory as the compiler reports them.

    python -m benchmarks.kernels [FILE]     a minute; writes kernels.json, or FILE
    python -m lab.docs                      writes the table from it

Needs Triton (the extra `test`), which brings NVIDIA's assembler, and no GPU. Each kernel is compiled with the tiles,
warps and pipeline stages of its launch, specialised for the shapes of GPT-2 124M (64 sequences of 1,024 tokens). That says that
the code exists for a chip and fits it, not how fast it is. 8-bit floats and the largest tiles only where the chip has room.
"""

import contextlib
import dataclasses
import io
import json
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.spec import UsageError
from layers import kernels
from layers.kernels import Plan

RESULTS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Chip:
    """Limits by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    name: str
    shared: int  # bytes a thread block may have, opted in
    registers: int  # a thread
    fp8: bool  # arithmetic in 8-bit floats: from 8.9 on


CHIPS = {
    80: Chip("A100", 163 * 1024, 255, False),
    90: Chip("H100, H200", 227 * 1024, 255, True),
    100: Chip("B200", 227 * 1024, 255, True),
}

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def plans() -> dict[str, Plan]:
    """Every kernel as GPT-2 124M launches it, by name."""
    tokens, width, hidden, columns, vocabulary = 65536, 768, 3072, 50304, 50257
    wide, square = empty(12, width, hidden), empty(12, width, width)
    tall = empty(12, hidden, width).mT
    logits, targets = empty(tokens, columns), empty(tokens, dtype=torch.int64)
    row, upstream = empty(tokens, dtype=torch.float32), empty(dtype=torch.float32)
    x, weight, bias, y = empty(tokens, width), empty(hidden, width), empty(hidden), empty(tokens, hidden)
    found = {
        "gram": kernels.plan_symmetric(wide, None, square, 1.0, 0.0),
        "gram, transposed": kernels.plan_symmetric(tall, None, square, 1.0, 0.0),
        "polynomial": kernels.plan_symmetric(square, square, square, 2.0, -4.8),
    }
    for form, cap in (("no cap", 0.0), ("rational", 15.0), ("tanh", 15.0), ("sigmoid", 23.0)):
        setting = (vocabulary, cap, form)
        found[f"cross_entropy, {form}, forward"] = kernels.plan_cross_entropy_forward(logits, targets, row, row, *setting)
        found[f"cross_entropy, {form}, backward"] = kernels.plan_cross_entropy_backward(
            logits, targets, row, upstream, logits, *setting
        )
    return found | {
        "linear_relu2, forward": kernels.plan_linear_relu2(x, weight, None, y),
        "linear_relu2 with bias, forward": kernels.plan_linear_relu2(x, weight, bias, y),
        "linear_relu2, backward": kernels.plan_relu2_backward(y, y, y),
        "fp8_linear, activations to e4m3": kernels.plan_quantise(x, *eighths(x, torch.float8_e4m3fn), 1.0),
        "fp8_linear, gradients to e5m2": kernels.plan_quantise(logits, *eighths(logits, torch.float8_e5m2), 1.0),
    }


def eighths(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(*x.shape, dtype=dtype), empty(*x.shape[::-1], dtype=dtype)


def source(plan: Plan) -> ASTSource:
    """The kernel specialised as Triton's launcher does it: constants, ones, and what is divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(plan.kernel.params):
        name, value = parameter.name, plan.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[name], aligned = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>", False
        elif isinstance(value, torch.Tensor):
            signature[name], aligned = TYPES[value.dtype], True  # as torch's allocator aligns
        elif isinstance(value, int):
            signature[name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(plan.kernel, signature, constants, attributes)


MATRIX_UNITS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # PTX, newest first


def compiled(plan: Plan, capability: int) -> dict[str, int | str]:
    """What the compiler reports of a kernel for a chip: `registers` and bytes `spilled` a thread, bytes `shared` a block, and
    `matrix_units`, the instruction that multiplies (wgmma from Hopper on, tcgen05 from Blackwell on)."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        options = {
            "num_warps": plan.num_warps,
            "num_stages": plan.num_stages,
            "enable_fp_fusion": True,
        }  # the launcher's default
        binary = triton.compile(source(plan), target=GPUTarget("cuda", capability, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    units = next((name for name in MATRIX_UNITS if name in binary.asm["ptx"]), "")
    shared = binary.metadata.shared
    return {"registers": int(registers), "spilled": sum(map(int, spills)), "shared": shared, "matrix_units": units}


def runs_on(chip: Chip, plan: Plan) -> bool:
    """Would the trainer launch it there?"""
    needs_fp8 = any(isinstance(x, torch.Tensor) and x.dtype in kernels.LARGEST for x in plan.arguments.values())
    return (chip.fp8 or not needs_fp8) and (chip.shared >= kernels.ROOM or plan.kernel is not kernels.linear_relu2_kernel)


def row(work: tuple[str, int]) -> dict:
    name, capability = work
    plan = plans()[name]
    facts = {"kernel": name, "chip": capability, "warps": plan.num_warps, "stages": plan.num_stages}
    return facts | compiled(plan, capability)


def measure() -> list[dict]:
    """A row per kernel and chip."""
    if triton.knobs.runtime.interpret:
        raise UsageError("TRITON_INTERPRET is set, and nothing is compiled then: unset it")
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    work = [(name, chip) for name, plan in plans().items() for chip in CHIPS if runs_on(CHIPS[chip], plan)]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        triton.knobs.cache.dir = folder
        return list(tqdm(pool.map(row, work), total=len(work), unit="kernel", disable=None))


def main(argv: list[str]) -> int:
    try:
        rows = measure()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    report = {
        "triton": triton.__version__,
        "chips": {capability: dataclasses.asdict(chip) for capability, chip in CHIPS.items()},
        "kernels": rows,
    }
    path = Path(argv[0]) if argv else RESULTS
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
