"""The stages of `./run.sh gpu-check` that compute on the device, each in a process of its own: a kernel that faults spoils
CUDA for the process that it runs in.

    python -m lab.gpu_device kernels --device cuda --results FILE --skip 3       started by lab/gpu_check.py

A stage is a list of tasks. Of each, FILE gets a line when it begins, where it is at, and what it found: so the one who
started it can say what a process was at when it died or hung, and start another one that skips it.
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cost
from cost.operations import Recorder, operations
from engine import hardware
from engine.hardware import Card
from engine.ranks import World, leave
from engine.spec import UsageError
from lab import attention_cases, kernel_cases
from lab.gpu_report import FAIL, MARGIN, NOT_RUN, PASS, SLOWER, Finding, cause
from lab.kernel_cases import COLUMNS, TOKENS, VOCABULARY, Case, Drawn
from layers import attention, kernels
from layers.attention import ATTENTION

BROKEN = 70  # exit code of a process whose CUDA context a fault has spoiled: EX_SOFTWARE of sysexits.h
BUCKET = 25 * 2**20  # bytes that DDP sends at once
ATTENTION_SHAPE = (16, 6, 1024, 128)  # B, H, T, D: a fourth of the record recipe's micro-batch
TIMED_MASKS = {"causal": (0, False), "window of 256": (256, False), "documents": (0, True)}

At = Callable[[str], None]  # says what a task is at
Task = tuple[str, Callable[[At], Finding]]


# ---------------------------------------------------------------- measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: torch.device, least: float = 0.05) -> float:
    """Median seconds of a call, of as many as take `least` seconds, after three that do not count. On a GPU between two of its
    events: of short work, what the host takes to launch it."""
    if device.type != "cuda":
        return cost.timed(call, time.perf_counter, least=1e-3)

    def one() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    first = min(one() for _ in range(3))
    return statistics.median(one() for _ in range(max(5, min(100, int(least / max(first, 1e-6))))))


def computing(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that the device computes for a call: it is captured as a CUDA graph, ten of whose replays are one measurement."""
    if device.type != "cuda":
        return seconds_of(call, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return seconds_of(lambda: [graph.replay() for _ in range(10)], device) / 10


def card_here(device: torch.device) -> Card | None:
    found = hardware.card_named(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return found[1] if found else None


def has_fp8(device: torch.device) -> bool:
    """CPUs have the types, and compute in fp32."""
    return device.type != "cuda" or torch.cuda.get_device_capability() >= (8, 9)


def predicted(draw: Callable[[torch.device], Drawn], card: Card | None) -> float | None:
    """Seconds that the cost model (cost.py) gives the reference on a card, its passes fused."""
    if card is None:
        return None
    drawn, seconds = draw(torch.device("meta")), cost.roofline(card)
    with Recorder() as recorder:
        results = drawn(drawn.rival)
    keep = {t.untyped_storage()._cdata for t in results}
    return sum(map(seconds, operations(recorder.events, True, keep)))


def ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:.3g} ms"


# ---------------------------------------------------------------- 1: the machine


def query(*words: str) -> str:
    """What nvidia-smi answers; nothing where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20, check=True).stdout
    return ""


def software(device: torch.device) -> dict[str, Any]:
    """Versions of what a step runs on."""
    cuda = device.type == "cuda"
    nccl = torch.cuda.nccl.version() if cuda and dist.is_nccl_available() else None
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": query("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None,
        "nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else nccl,
        "triton": getattr(kernels.triton, "__version__", None),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def devices(device: torch.device) -> list[dict[str, Any]]:
    """Facts of each GPU, or of this processor."""
    if device.type != "cuda":
        return [{"name": hardware.processor_name(), "threads": torch.get_num_threads()}]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        known = hardware.card_named(p.name)
        found.append(
            {
                "name": p.name, "card": known and known[0], "memory": p.total_memory, "free": torch.cuda.mem_get_info(i)[0],
                "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
                "fp8": (p.major, p.minor) >= (8, 9),
            }
        )  # fmt: skip
    return found


def machine_tasks(device: torch.device) -> list[Task]:
    def gpus(at: At) -> Finding:
        found = devices(device)
        words, figures = hardware.counted(d["name"] for d in found), {"devices": found, "topology": query("topo", "-m")}
        if device.type != "cuda":
            return Finding("machine", "processor", PASS, words, figures)
        mixed = len({d["name"] for d in found}) > 1
        sizes = sorted({f"{d['memory'] / 1e9:.0f} GB" for d in found})
        words += f"; {', '.join(sizes)}, compute capability {', '.join(sorted({d['capability'] for d in found}))}"
        words += "; 8-bit floats: " + ("yes" if all(d["fp8"] for d in found) else "no")
        words += "; of different kinds: the slowest sets the pace of all" if mixed else ""
        if unknown := sorted({d["name"] for d in found if d["card"] is None}):
            words += f"; not in the table of cards, so nothing is predicted: {', '.join(unknown)}"
        return Finding("machine", "GPUs", PASS, words, figures)

    def versions(at: At) -> Finding:
        found = software(device)
        missing = [name for name in ("triton", "nccl") if device.type == "cuda" and found[name] is None]
        words = ", ".join(f"{name} {value}" for name, value in found.items() if value)
        words += "".join(f"; no {name} here" for name in missing)
        return Finding("machine", "software", PASS, words, found)

    tasks: list[Task] = [("GPUs" if device.type == "cuda" else "processor", gpus), ("software", versions)]
    for i in range(torch.cuda.device_count() if device.type == "cuda" else 1):
        here = torch.device("cuda", i) if device.type == "cuda" else device
        tasks.append((name_of(here), lambda at, here=here: rates(here)))
    return tasks


def name_of(device: torch.device) -> str:
    return f"GPU {device.index}" if device.type == "cuda" else "CPU"


def rates(device: torch.device) -> Finding:
    """Products and copies on one device, which a card that is throttled, shared or damaged shows."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    card, (dtype, _) = card_here(device), hardware.pick_dtype("auto", device)
    n, size = (8192, 2**30) if device.type == "cuda" else (512, 2**22)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    products = 2 * n**3 / seconds_of(lambda: a @ b, device)
    one, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    traffic = 2 * size / seconds_of(lambda: one.copy_(other), device)
    figures, words = {"flops": products, "bytes_per_second": traffic}, []
    parts = [("products", products / 1e12, "TFLOP/s"), ("copies", traffic / 1e12, "TB/s")]
    expected = [card.bf16 * card.reached / 1e12, card.bandwidth * cost.FITTED.bandwidth / 1e12] if card else [None, None]
    if dtype != torch.bfloat16:
        expected[0] = None
    slow = False
    for (what, rate, unit), wanted in zip(parts, expected, strict=True):
        words.append(f"{what} at {rate:.3g} {unit}" + (f" (predicted {wanted:.3g})" if wanted else ""))
        slow |= bool(wanted) and rate * MARGIN < wanted
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        taken = total - free - torch.cuda.memory_reserved(device)
        if taken > 0.1 * total:
            words.append(f"{taken / 1e9:.0f} of {total / 1e9:.0f} GB are taken: is another process on it?")
    return Finding("machine", name_of(device), SLOWER if slow else PASS, "; ".join(words), figures)


# ---------------------------------------------------------------- 2: kernels


def fits(device: torch.device, size: float) -> bool:
    return device.type != "cuda" or torch.cuda.mem_get_info()[0] > size


def spoilt(device: torch.device) -> bool:
    """Has a fault left CUDA unusable in this process?"""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def compared(stage: str, what: str, found: list[tuple[str, float, float]], wrong: list[str], notes: list[str]) -> Finding:
    """found: (shape and name, error, what is allowed) of every result that could be compared. wrong: of what could not."""
    off = [f"{where}: off by {error:.2g}, allowed {allowed:g}" for where, error, allowed in found if not error <= allowed]
    figures = {"errors": [{"what": where, "error": error, "allowed": allowed} for where, error, allowed in found]}
    wrong = wrong + off
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Finding(stage, what, FAIL, "; ".join(wrong[:3]) + more, figures | {"wrong": wrong})
    if not found:
        return Finding(stage, what, NOT_RUN, "; ".join(notes))
    where, error, allowed = max(found, key=lambda f: f[1] / f[2] if f[2] else f[1])
    words = [f"{len(found)} results, the worst off by {error:.2g} of {allowed:g} ({where})", *notes]
    return Finding(stage, what, PASS, "; ".join(words), figures)


def check_cases(what: str, cases: list[Case], device: torch.device, at: At) -> Finding:
    found, wrong, notes = [], [], []
    for case in cases:
        at(case.what)
        if case.fp8 and not has_fp8(device):
            return Finding("kernels", what, NOT_RUN, "this card has no 8-bit floats")
        try:
            drawn = case.draw(device)
            for name, a, b in zip(drawn.names, *kernel_cases.both_forms(drawn), strict=True):
                found.append((f"{case.what}, {name}", kernel_cases.error(a, b), case.allowed(b)))
        except torch.OutOfMemoryError:
            notes.append(f"{case.what}: too large for this GPU's memory")
        except Exception as error:
            if case.dtype == torch.float32 and type(error).__name__ == "OutOfResources":  # Triton's, of shared memory
                notes.append(f"{case.what}: its tiles do not fit this chip in fp32, for which the trainer takes plain PyTorch")
                continue
            wrong.append(f"{case.what}: {cause(error)}")
            if spoilt(device):
                break
        drawn = a = b = None
    return compared("kernels", what, found, wrong, notes)


def check_offsets(device: torch.device, at: At) -> Finding:
    """The loss over more logits than 32 bits can count, on whose last rows the gradient is compared."""
    what = "cross_entropy, offsets beyond 2^31"
    rows, vocabulary, columns, last = (TOKENS, VOCABULARY, COLUMNS, 512) if device.type == "cuda" else (8, 97, 128, 4)
    if not fits(device, 2.2 * rows * columns * 2 + 2e9):
        return Finding("kernels", what, NOT_RUN, "too large for this GPU's memory")
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, 10, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    kernels.use("triton")
    try:
        loss = kernels.cross_entropy(logits.requires_grad_(), targets, vocabulary, 15.0)
        (grad,) = torch.autograd.grad(loss, logits)
    finally:
        kernels.use("auto")
    part = logits.detach()[-last:].requires_grad_()
    wanted = kernels.cross_entropy_reference(part, targets[-last:], vocabulary, 15.0, "rational")
    (wanted_grad,) = torch.autograd.grad(wanted * last / rows, part)
    with torch.no_grad():
        sums = [
            kernels.cross_entropy_reference(logits[i : i + last], targets[i : i + last], vocabulary, 15.0, "rational")
            for i in range(0, rows, last)
        ]
    found = [
        ("loss", kernel_cases.error(loss.detach(), torch.stack(sums).mean()), 1e-5),
        ("gradient of the last logits", kernel_cases.error(grad[-last:], wanted_grad), 2e-2),
    ]
    return compared("kernels", what, found, [], [])


def time_case(case: Case, device: torch.device, at: At) -> Finding:
    """Forward and backward: what the device computes for the kernel, PyTorch and PyTorch compiled; the cost model; and the
    kernel with its launches."""
    what = f"time of {case}"
    if case.fp8 and not has_fp8(device):
        return Finding("kernels", what, NOT_RUN, "this card has no 8-bit floats")
    drawn = case.draw(device)
    rival = drawn.rival or drawn.forward
    figures: dict[str, Any] = {"predicted": predicted(case.draw, card_here(device))}
    try:
        at("the kernel")
        kernels.use("triton")
        figures["launched"] = {"kernel": seconds_of(drawn, device)}
        figures["kernel"] = computing(drawn, device)
        at("PyTorch")
        kernels.use("off")
        figures["torch"] = computing(lambda: drawn(rival), device)
        at("PyTorch, compiled")
        torch._dynamo.reset()
        compiled = torch.compile(rival, dynamic=False)
        try:
            figures["compiled"] = computing(lambda: drawn(compiled), device)
        except Exception as error:
            figures["compiled"], figures["why_not_compiled"] = None, cause(error)
    finally:
        kernels.use("auto")
    return timed("kernels", what, figures, "kernel", device)


def timed(stage: str, what: str, figures: dict[str, Any], own: str, device: torch.device) -> Finding:
    """Seconds by name. Slower is what takes longer than predicted, or than another of them; nothing is, in a rehearsal."""
    rivals = {name: s for name, s in figures.items() if name not in (own, "predicted") and isinstance(s, float)}
    slow = [name for name, s in rivals.items() if figures[own] > MARGIN * s]
    if figures.get("predicted") and figures[own] > MARGIN * figures["predicted"]:
        slow.append("predicted")
    words = [f"{own} {ms(figures[own])}", *(f"{name} {ms(s)}" for name, s in rivals.items())]
    words += [f"{own} with its launches {ms(s)}" for s in figures.get("launched", {}).values()]
    words.append(f"cost model {ms(figures.get('predicted'))}")
    words += [f"not compiled: {figures['why_not_compiled']}"] if "why_not_compiled" in figures else []
    slower = slow and device.type == "cuda"
    return Finding(stage, what, SLOWER if slower else PASS, ", ".join(words), figures)


def by_kernel(cases: list[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(f"{case.kernel}, {str(case.dtype)[6:]}", []).append(case)
    return found


def kernel_tasks(device: torch.device) -> list[Task]:
    """bf16 first, in which alone the trainer uses them; then the times; then fp32, which proves the arithmetic."""
    if kernels.triton is None:
        return [("all", lambda at: Finding("kernels", "all", NOT_RUN, "no Triton here: the trainer takes plain PyTorch"))]
    if device.type == "cuda" and not hardware.has_native_bf16(device):
        return [("all", lambda at: Finding("kernels", "all", NOT_RUN, "no bf16 on this GPU: the trainer takes plain PyTorch"))]
    large = device.type == "cuda"
    tasks: dict[torch.dtype, list[Task]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        cases = by_kernel(kernel_cases.ragged(dtype) + (kernel_cases.gpt2(dtype) if large else []))
        tasks[dtype] = [
            (name, lambda at, name=name, own=own: check_cases(name, own, device, at)) for name, own in cases.items()
        ]
    to_time = (
        kernel_cases.gpt2(torch.bfloat16)
        if large
        else [own[0] for own in by_kernel(kernel_cases.ragged(torch.bfloat16)).values()]
    )
    return [
        *tasks[torch.bfloat16],
        ("cross_entropy, offsets beyond 2^31", lambda at: check_offsets(device, at)),
        *((f"time of {case}", lambda at, case=case: time_case(case, device, at)) for case in to_time),
        *tasks[torch.float32],
    ]  # fmt: skip


# ---------------------------------------------------------------- 3: attention


def check_attention(backend: str, device: torch.device, at: At) -> Finding:
    """Each mask and length, as in the tests; of flex, which compiles each of them, one length."""
    try:
        attention.check(backend, device)
    except UsageError as error:
        return Finding("attention", backend, NOT_RUN, str(error))
    found, wrong = [], []
    for mask in attention_cases.MASKS:
        for length in attention_cases.LENGTHS[-1:] if backend == "flex" else attention_cases.LENGTHS:
            at(f"{mask}, {length} tokens")
            torch._dynamo.reset()  # each mask is a graph, and there is a limit to how many one function may have
            attention.fused_flex.cache_clear()
            try:
                errors = attention_cases.errors(backend, length, mask, device)
            except Exception as error:
                wrong.append(f"{mask}, {length} tokens: {cause(error)}")
                if spoilt(device):
                    return compared("attention", backend, found, wrong, [])
                continue
            for dtype, values in errors.items():
                where = f"{mask}, {length} tokens, {str(dtype)[6:]}"
                allowed = attention_cases.TOLERANCE[dtype]
                found += [(f"{where}, {name}", e, allowed) for name, e in zip(attention_cases.NAMES, values, strict=True)]
    return compared("attention", backend, found, wrong, [])


def attention_drawn(
    backend: str, shape: tuple[int, ...], window: int, documents: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Drawn:
    q, k, v = (kernel_cases.random(device, *shape, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    upstream = kernel_cases.random(device, *shape, dtype=dtype, seed=3)
    attend = ATTENTION[backend]
    return Drawn(("result",), lambda: (attend(q, k, v, 0.12, 0.0, window, documents),), (q, k, v), upstream)


def time_attention(mask: str, device: torch.device, at: At) -> Finding:
    """Forward and backward, all back-ends; the one that `auto` takes is held against the others."""
    window, has_documents = TIMED_MASKS[mask]
    shape = ATTENTION_SHAPE if device.type == "cuda" else (2, 2, 64, 16)
    dtype, _ = hardware.pick_dtype("auto", device)
    documents = (torch.arange(shape[2], device=device) // (shape[2] // 3)).expand(shape[0], -1) if has_documents else None
    chosen = attention.choose(device, 0.0, bool(window) or has_documents)
    figures: dict[str, Any] = {}
    for backend in sorted(ATTENTION, key=lambda name: name != chosen):
        at(backend)
        with contextlib.suppress(UsageError, torch.OutOfMemoryError):  # not here, or too large
            torch._dynamo.reset()
            attention.check(backend, device)
            figures[backend] = computing(attention_drawn(backend, shape, window, documents, dtype, device), device)
    figures["predicted"] = None
    if not window and not has_documents:  # the cost model knows no other mask
        card = card_here(device)
        figures["predicted"] = predicted(lambda meta: attention_drawn("sdpa", shape, 0, None, dtype, meta), card)
    return timed("attention", f"time of {mask}, {' x '.join(map(str, shape))}, auto is {chosen}", figures, chosen, device)


def attention_tasks(device: torch.device) -> list[Task]:
    backends = [name for name in ATTENTION if name != "plain"]
    return [
        *((name, lambda at, name=name: check_attention(name, device, at)) for name in backends),
        *((f"time of {mask}", lambda at, mask=mask: time_attention(mask, device, at)) for mask in TIMED_MASKS),
    ]


# ---------------------------------------------------------------- 5: the wire, one process a rank


def wire(world: World, size: int) -> Finding:
    """All-reduce of fp32 gradients of `size` bytes, whole and in DDP's buckets: bytes/s of the link (nccl-tests' busbw)."""
    figures: dict[str, Any] = {"ranks": world.size, "backend": dist.get_backend()}
    card = card_here(world.device)
    expected = card.link * cost.FITTED.link if card else None
    wrong = []
    for what, part in (("whole", size), ("bucket", min(size, BUCKET))):
        values = torch.full((part // 4,), world.rank + 1.0, device=world.device)
        dist.all_reduce(values)
        if not bool((values == world.size * (world.size + 1) / 2).all()):
            wrong.append(f"{part / 1e6:.0f} MB are not summed up right")
        world.beat(f"all-reduce of {part} bytes")
        times = []
        for _ in range(8):
            dist.barrier()
            synchronize(world.device)
            start = time.perf_counter()
            dist.all_reduce(values)
            synchronize(world.device)
            times.append(time.perf_counter() - start)
        figures[what] = {"bytes": part, "seconds": (took := statistics.median(times)),
                         "bytes_per_second": cost.WIRE["allreduce"](world.size) * part / took}  # fmt: skip
    rate = figures["whole"]["bytes_per_second"]
    figures["predicted"] = expected
    words = ", ".join(
        f"{f['bytes'] / 1e6:.0f} MB in {ms(f['seconds'])}: {f['bytes_per_second'] / 1e9:.3g} GB/s"
        for f in (figures["whole"], figures["bucket"])
    )
    words += f" a link, by {figures['backend']}" + (f" (predicted {expected / 1e9:.3g})" if expected else "")
    slow = expected and rate * MARGIN < expected
    what = f"all-reduce on {world.size} ranks"
    if wrong:
        return Finding("recipes", what, FAIL, "; ".join(wrong), figures)
    return Finding("recipes", what, SLOWER if slow else PASS, words, figures)


# ---------------------------------------------------------------- the process


STAGES: dict[str, Callable[[torch.device], list[Task]]] = {
    "machine": machine_tasks,
    "kernels": kernel_tasks,
    "attention": attention_tasks,
}


def run_tasks(stage: str, tasks: list[Task], device: torch.device, results: Path, skip: int) -> int:
    """Run the tasks from number `skip` on, and write down what they do. BROKEN: one has spoilt this process."""
    with results.open("a", buffering=1) as file:

        def say(**words: Any) -> None:
            file.write(json.dumps(words) + "\n")

        say(tasks=[name for name, _ in tasks])
        for number, (name, work) in list(enumerate(tasks))[skip:]:
            say(begin=number)
            last = ""

            def at(where: str) -> None:
                nonlocal last
                last = where
                say(at=where)

            try:
                finding = work(at)
                synchronize(device)
            except torch.OutOfMemoryError:
                finding = Finding(stage, name, NOT_RUN, "too large for this GPU's memory")
            except Exception as error:
                where = f", at {last}" if last else ""
                finding = Finding(stage, name, FAIL, f"{cause(error)}{where}")
            say(number=number, finding=dataclasses.asdict(finding))
            if spoilt(device):
                return BROKEN
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def main(argv: list[str]) -> int:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("stage", choices=(*STAGES, "wire"))
    flags.add_argument("--device", default="cuda")
    flags.add_argument("--results", type=Path, required=True)
    flags.add_argument("--skip", type=int, default=0, help="tasks that are done")
    flags.add_argument("--bytes", type=int, default=2**20, help="of the gradients that wire sends")
    options = flags.parse_args(argv)
    if options.stage == "wire":
        world = World(options.device, timeout=60)
        finding = wire(world, options.bytes)
        if world.main:
            options.results.write_text(json.dumps(dataclasses.asdict(finding)))
        world.close()
        return 0
    device = torch.device(options.device)
    interpreted = device.type == "cpu" and kernels.triton is not None
    with kernel_cases.numbers_that_numpy_lacks() if interpreted else contextlib.nullcontext():
        return run_tasks(options.stage, STAGES[options.stage](device), device, options.results, options.skip)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
