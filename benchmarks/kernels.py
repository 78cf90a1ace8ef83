"""The Triton kernels, compiled for GPUs that are not there: registers, spills and shared memory as the compiler reports them.

    python -m benchmarks.kernels [FILE]     a minute; writes kernels.json, or FILE

Needs Triton (`pip install -e .[test]`), which brings NVIDIA's assembler, and no GPU. Each kernel is compiled with the tiles,
warps and pipeline stages of its launch, specialised for the shapes of GPT-2 124M (64 sequences of 1,024 tokens). So the code
exists for a chip and fits it; how fast it is, benchmarks/gpu.py measures.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.command import command
from engine.run_folder import file_hash
from engine.spec import UsageError
from layers import kernels
from layers.kernels import Plan

EIGHTHS = {torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5"}
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", **EIGHTHS}
MATRIX_UNITS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # PTX, newest first


# By compute capability: bytes of shared memory a thread block may have, opted in; registers a thread; arithmetic in 8-bit
# floats (from 8.9 on). CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
CHIPS = {
    80: dict(name="A100", shared=163 * 1024, registers=255, fp8=False),
    90: dict(name="H100, H200", shared=227 * 1024, registers=255, fp8=True),
    100: dict(name="B200", shared=227 * 1024, registers=255, fp8=True),
}


def runs(plan: Plan, chip: dict) -> bool:
    """Would the trainer launch it there?"""
    needs_fp8 = any(isinstance(x, Tensor) and x.dtype in EIGHTHS for x in plan.arguments.values())
    needs_room = plan.kernel is kernels.linear_relu2_kernel
    return (chip["fp8"] or not needs_fp8) and (chip["shared"] >= kernels.ROOM or not needs_room)


def plans() -> dict[str, Plan]:
    """Every kernel as GPT-2 124M launches it, by name."""
    tokens, width, hidden, columns, vocabulary = 65536, 768, 3072, 50304, 50257
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    wide, tall, square = empty(12, width, hidden), empty(12, hidden, width).mT, empty(12, width, width)
    logits, targets = empty(tokens, columns), empty(tokens, dtype=torch.int64)
    row, upstream = empty(tokens, dtype=torch.float32), empty((), dtype=torch.float32)
    x, weight, bias, y = empty(tokens, width), empty(hidden, width), empty(hidden), empty(tokens, hidden)
    found = {
        "gram": kernels.plan_symmetric(wide, None, 1.0, 0.0, square),
        "gram, transposed": kernels.plan_symmetric(tall, None, 1.0, 0.0, square),
        "polynomial": kernels.plan_symmetric(square, square, 2.0, -4.8, square),
    }
    for form, cap in (("no cap", 0.0), ("rational", 15.0), ("tanh", 15.0), ("sigmoid", 23.0)):
        how, name = (vocabulary, cap, form), f"cross_entropy, {form}"
        found[f"{name}, forward"] = kernels.plan_cross_entropy_forward(logits, targets, *how, row, row)
        found[f"{name}, backward"] = kernels.plan_cross_entropy_backward(logits, targets, row, upstream, *how, logits)

    def quantise(values: Tensor, dtype: torch.dtype) -> Plan:
        return kernels.plan_quantise(values, 1.0, dtype, empty(values.shape, dtype=dtype), empty(values.T.shape, dtype=dtype))

    return found | {
        "linear_relu2, forward": kernels.plan_linear_relu2(x, weight, None, y),
        "linear_relu2 with bias, forward": kernels.plan_linear_relu2(x, weight, bias, y),
        "linear_relu2, backward": kernels.plan_relu2_backward(y, y, y),
        "fp8_linear, activations to e4m3": quantise(x, torch.float8_e4m3fn),
        "fp8_linear, gradients to e5m2": quantise(logits, torch.float8_e5m2),
    }


def source(plan: Plan) -> ASTSource:
    """The kernel specialised as Triton's launcher does it: constants, ones, and what is divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(plan.kernel.params):
        name, value, aligned = parameter.name, plan.arguments[parameter.name], False
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, Tensor):
            signature[name], aligned = TYPES[value.dtype], True  # as torch's allocator aligns
        elif isinstance(value, int):
            signature[name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(plan.kernel, signature, constants, attributes)


def compiled(work: tuple[str, int]) -> dict[str, int | str]:
    """What the compiler reports of a kernel, by name, for a chip: `registers` and bytes `spilled` a thread, bytes `shared` a
    block, and `matrix_units`, the instruction that multiplies (wgmma from Hopper on, tcgen05 from Blackwell on)."""
    name, capability = work
    plan, log = plans()[name], io.StringIO()
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "enable_fp_fusion": True}  # as launched
    with contextlib.redirect_stdout(log):
        binary = triton.compile(source(plan), target=GPUTarget("cuda", capability, 32), options=options)
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())))
    row = dict(kernel=name, chip=capability, warps=plan.num_warps, stages=plan.num_stages, registers=int(registers))
    units = next((unit for unit in MATRIX_UNITS if unit in binary.asm["ptx"]), "")
    return row | dict(spilled=spilled, shared=binary.metadata.shared, matrix_units=units)


def measure(path: Path) -> str:
    """A row per kernel and chip."""
    if triton.knobs.runtime.interpret:
        raise UsageError("TRITON_INTERPRET is set, and nothing is compiled then: unset it")
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    work = [(name, capability) for name, plan in plans().items() for capability, chip in CHIPS.items() if runs(plan, chip)]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        triton.knobs.cache.dir = folder
        rows = list(tqdm(pool.map(compiled, work), total=len(work), unit="kernel", disable=None))
    about = {"triton": triton.__version__, "source": file_hash(Path(kernels.__file__))[:12]}  # of other kernels it is stale
    path.write_text(json.dumps({**about, "chips": CHIPS, "kernels": rows}, indent=1) + "\n")
    return f"wrote {path}"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    sys.exit(command("kernels", lambda: measure(path)))
