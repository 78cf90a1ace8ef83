"""What a training step costs before it is run: memory, communication, time, dollars; behind `train_gpt.py --dry-run`.

    python train_gpt.py --dry-run --track gpt2-small --tricks record --hardware 8xH100
    python train_gpt.py --dry-run --track gpt2-small --tricks record --hardware 8xH100 --world-size 16    two such machines
    python train_gpt.py --dry-run --track cpu --tricks record                                            this machine, measured

Model, optimizer and one micro-batch are gone through on meta tensors in a process group of as many pretended ranks
(trace.py). Each operation then takes the longer of its arithmetic at a share of the card's peak and its memory traffic at a
share of the card's bandwidth (the roofline of Williams et al. 2009); a step is their sum, what communication does not hide
behind the backward pass, and a fixed part. The shares are fitted to published speedruns (lab/cost.py), with what is left of
the error in benchmarks/README.md. On the CPU here rates are measured instead, products at the shapes that the step has.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import hardware
import optimizers
from hardware import CARDS, Card
from model import GPT, ModelConfig, flops_per_token, roles
from spec import UsageError, nearest
from trace import WIRE, Operation, Recorder, operations, peak

HEADROOM = 0.9  # of a card's memory that tensors may take: the rest is CUDA's context, NCCL's buffers and fragments
HIDDEN = 2 / 3  # of the last micro-batch is backward pass, behind which DDP's buckets travel


# ---------------------------------------------------------------- what a step does


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer_state: int
    activations: int  # most at once of what the passes over one micro-batch, or the update, hold beside the others

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.activations


@dataclass(frozen=True)
class Step:
    """One training step of one rank.

    passes: forward and backward of one micro-batch, of which there are `micro_batches`. update: (share of the steps in which
    it happens, operations). gradients: bytes to be summed over ranks; last of them: those that are ready only when the
    backward pass ends. tables: bytes of sparse gradients that each rank sends.
    """

    passes: list[Operation]
    micro_batches: int
    update: list[tuple[float, list[Operation]]]
    gradients: int
    last: int
    tables: int
    memory: Memory
    parameters: dict[str, int]  # by role


@contextlib.contextmanager
def pretended(ranks: int):
    """A process group of so many ranks in which collectives do nothing: this process is its rank 0."""
    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def record_step(
    model_config: ModelConfig,
    optimizer: str,
    sequences: int,
    micro: int,
    ranks: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = True,
    average: str = "none",
    table_optimizer: str = "sparse_adagrad",
    device: str = "meta",
    prepare: Callable[[GPT], None] = lambda gpt: None,
) -> Step:
    """Go through one step without computing it.

    Args:
        sequences, micro: of a rank in a step, and in one micro-batch.
        dtype: of activations and products.
        compiled: element-wise passes are fused, as by torch.compile.
        device: meta: what the trainer does on a GPU; cpu: what it does there.
        prepare: may change the model first.
    """
    fake = FakeTensorMode() if device == "cpu" else contextlib.nullcontext()
    with pretended(ranks), fake, torch.device(device):
        gpt = GPT(model_config)
        prepare(gpt)
        gpt.compute_dtype = dtype
        built = optimizers.build(optimizer, gpt, 1000, average, table_optimizer)
        if device == "cpu" and compiled:
            for part in optimizers.parts(built):
                part.compiled = hasattr(part, "compile")
        sparse = set(gpt.tables())
        for p in sparse:
            p.requires_grad_(False)
            gpt.ngrams.is_sparse = False
        tokens = torch.zeros(micro, model_config.sequence_length, dtype=torch.int64)
        with Recorder() as passes:
            gpt(tokens, tokens).backward()
    grads = [p.grad for p in gpt.parameters() if p.grad is not None]
    keep = {g.untyped_storage()._cdata for g in grads}
    with pretended(ranks), fake:
        settle(built, dtype)
        updates = record_updates(built)
    kind = roles(gpt)
    by_role: Counter[str] = Counter()
    for name, p in gpt.named_parameters():
        by_role[kind[name]] += p.numel()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    rows = micro * model_config.sequence_length * len(gpt.ngrams.orders) if sparse else 0
    table_bytes = rows * (4 * model_config.width + 8)
    passed = operations(passes.events, compiled, keep)
    if sparse:
        passed += table_operations(rows, model_config.width)
        updates.append((1.0, table_operations(rows, model_config.width), 0))
    state = optimizers.state_bytes(built) + sum(4 * p.numel() for p in sparse)
    return Step(
        passed, sequences // micro, [(share, work) for share, work, _ in updates], size(grads),
        size([gpt.embedding.weight]), table_bytes * (sequences // micro),
        Memory(
            size(gpt.parameters()), size(grads) + table_bytes, state,
            max(peak(passes.events, compiled, keep), *(most for _, _, most in updates)),
        ),
        dict(by_role),
    )  # fmt: skip


def settle(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """Make the optimizers' state, and decide for a card what they decide by their device: iterations in `dtype`, and fused
    AdamW, which torch refuses to begin on meta tensors but then runs."""
    fused = [group for group in optimizer.param_groups if group.get("fused")]
    for group in optimizer.param_groups:
        if group.get("dtype") == "auto":
            group["dtype"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    for part in optimizers.parts(optimizer):
        part._need_device_dtype_check_for_fused = False
    for group in fused:
        group["fused"] = False
    optimizer.step()
    for group in fused:
        group["fused"] = True


def record_updates(optimizer: torch.optim.Optimizer) -> list[tuple[float, list[Operation], int]]:
    """The update as (share of the steps, operations, most bytes held at once).

    Methods that renew something every k-th step do it in steps that are 0 or 1 modulo k: one step of either kind and one
    between are recorded.
    """
    every = max((group.get("every", 1) for group in optimizer.param_groups), default=1)
    shares = [1 / every] * min(every, 2) + ([(every - 2) / every] if every > 2 else [])
    found = []
    late = 2 * every * math.ceil(max((group.get("start", 0) for group in optimizer.param_groups), default=0) + 1)
    for i, share in enumerate(shares):
        for group in optimizer.param_groups:
            if "t" in group:
                group["t"] = late + i - 1  # the step adds one
        with Recorder() as recorder:
            optimizer.step()
        found.append((share, operations(recorder.events, False, set()), peak(recorder.events, False, set())))
    return found


def table_operations(rows: int, width: int) -> list[Operation]:
    """Of so many rows looked up in sparse tables: sorting them, and summing or updating what belongs to each."""
    values = 4.0 * rows * width
    return [
        Operation("pass", 16.0 * rows * math.log2(max(2, rows)), elements=rows, launches=8),
        Operation("pass", 3 * values, elements=rows * width, launches=3),
    ]


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Constants:
    """Shares of the data sheet that programs reach, and seconds. What is fitted: lab/cost.py; the rest is chosen."""

    products: float = 0.70  # of peak FLOP/s, in large matrix products
    attention: float = 0.45  # of peak FLOP/s, in fused attention
    bandwidth: float = 0.75  # of bytes/s, in passes over memory
    overhead: float = 3e-3  # seconds a step: data, launches, waiting for the slowest rank
    launch: float = 4e-6  # least seconds of an operation: chosen, the launch of a CUDA kernel from PyTorch
    factorisation: float = 0.01  # of fp32 FLOP/s, in QR and eigendecompositions: chosen, cuSOLVER on matrices of about 1,000
    link: float = 0.75  # of a link's bytes/s, in collectives: chosen, nccl-tests on NVLink reach 0.7 to 0.8
    latency: float = 3e-5  # seconds a collective: chosen


FITTED = Constants()


def roofline(card: Card, constants: Constants = FITTED) -> Callable[[Operation], float]:
    """Seconds of an operation on a card."""
    peaks = {torch.bfloat16: card.bf16, torch.float16: card.bf16, torch.float8_e4m3fn: card.fp8, torch.float64: card.fp32 / 2}

    def seconds(work: Operation) -> float:
        top = peaks.get(work.dtype, card.fp32)
        share = {"product": constants.products, "attention": constants.attention}.get(work.kind)
        if work.kind == "factorisation":
            top, share = card.fp32, constants.factorisation
        arithmetic = work.flops / (share * top) if share else 0.0
        return max(arithmetic, work.bytes / (constants.bandwidth * card.bandwidth), work.launches * constants.launch)

    return seconds


def step_time(
    step: Step, seconds: Callable[[Operation], float], ranks: int = 1, link: float = math.inf, constants: Constants = FITTED
) -> dict[str, float]:
    """Seconds of a step by part: product, attention, pass, optimizer, communication, overhead; their sum is the step's.

    Args:
        seconds: of an operation: `roofline(card)`, or `Here().seconds`.
        link: bytes/s of one card to the others, before the share that collectives reach.
    """
    found: dict[str, float] = defaultdict(float)
    for work in step.passes:
        found[work.kind] += seconds(work) * step.micro_batches
    compute = sum(found.values())
    rate = constants.link * link
    if ranks > 1:
        wire = WIRE["allreduce"](ranks) / rate
        behind = HIDDEN * compute / step.micro_batches
        found["communication"] += step.last * wire + max(0.0, (step.gradients - step.last) * wire - behind) + constants.latency
        found["communication"] += step.tables * (ranks - 1) / rate
    for share, operations_ in step.update:
        for work in operations_:
            if work.kind in WIRE:
                found["communication"] += share * (WIRE[work.kind](ranks) * work.bytes / rate + constants.latency)
            else:
                found["optimizer"] += share * seconds(work)
    found["overhead"] = constants.overhead
    return dict(found)


def communication(step: Step, ranks: int) -> dict[str, float]:
    """Bytes that one rank sends in a step, by what they are."""
    found = {"gradients, all-reduce": WIRE["allreduce"](ranks) * step.gradients}
    if step.tables:
        found["table rows, all-gather"] = float(step.tables * (ranks - 1))
    sent = sum(share * WIRE[w.kind](ranks) * w.bytes for share, ops in step.update for w in ops if w.kind in WIRE)
    return found | ({"updates, all-gather": sent} if sent else {})
