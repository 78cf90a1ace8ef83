"""One training step of one rank: its operations, memory and traffic, recorded without computing it.

The trainer's own model and optimizer run one micro-batch and one update on tensors without memory, in a
simulated process group. So a new trick or optimizer needs no code here.
"""

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.graph import _engine_run_backward
from torch.testing._internal.distributed.fake_pg import FakeStore

import optimizers
from config import Config, shares
from cost.operations import Operation, Recorder, operations, peak
from data.shards import Dataset, aligned, dataset_folder
from engine.ranks import WIRE
from engine.spec import UsageError
from layers import attention, kernels
from layers.shape import ModelConfig
from model import GPT, roles
from optimizers.mantissa import keep_mantissas, to_bf16

STATISTICS = 16  # bytes that the ranks add up before an update: loss, gradient norm, two wishes


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. activations: the most that a micro-batch, or the update, holds at once besides the others."""

    weights: int
    gradients: int
    optimizer_state: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.activations


@dataclass(frozen=True)
class Step:
    """One training step of one rank."""

    passes: list[Operation]  # forward and backward of one micro-batch
    micro_batches: int
    update: list[tuple[float, list[Operation]]]  # (share of the steps in which it happens, operations)
    gradients: int  # bytes that the ranks add up
    last: int  # of these, bytes that are ready only when the backward pass ends
    memory: Memory
    parameters: dict[str, int]  # by role
    compiled: bool  # the host does not launch the passes one by one


def communication(step: Step, ranks: int) -> dict[str, float]:
    """Bytes that one rank sends in a step, by what they are."""
    allreduce = WIRE["allreduce"](ranks)
    sent = {"gradients, all-reduce": allreduce * step.gradients, "loss, norm, signals, all-reduce": allreduce * STATISTICS}
    updates = sum(share * WIRE[w.kind](ranks) * w.bytes for share, work in step.update for w in work if w.kind in WIRE)
    return sent | ({"updates, all-gather": updates} if updates else {})


@contextlib.contextmanager
def pretended(ranks: int, fused_loss: bool):
    """This process as rank 0 of so many; collectives do nothing. fused_loss: the loss takes the passes of a GPU's kernels."""
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            stack.callback(dist.destroy_process_group)
        stack.callback(kernels.use, "auto")
        kernels.use("meta" if fused_loss else "auto")
        yield


def build(config: Config, gpt: GPT, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The run's optimizer over a fresh model, which computes in `dtype` from now on."""
    gpt.compute_dtype = dtype
    matrices = [p for p, role in zip(gpt.parameters(), roles(gpt).values(), strict=True) if role == "matrix"]
    lower = to_bf16(matrices) if config.weights == "bf16" else {}
    optimizer = optimizers.build(config.optimizer, gpt, config.steps, config.average, config.rates, config.outer)
    return keep_mantissas(optimizer, lower) if lower else optimizer


def size(tensors: Iterable[torch.Tensor], each: int = 4) -> int:
    """Bytes of tensors whose numbers take at most `each`."""
    return sum(t.numel() * min(t.element_size(), each) for t in tensors)


def record_step(
    config: Config,
    model_config: ModelConfig,
    ranks: int = 1,
    dtype: torch.dtype = torch.bfloat16,  # of activations and products
    device: str = "cuda",  # or cpu: whose attention and loss
    autocast: bool = False,  # bf16 products of activations that stay in `dtype`, as torch.autocast has it; the trainer does not
    model: Callable[[ModelConfig], GPT] = GPT,
) -> Step:
    """Go through one step without computing it."""
    sequences, micro = shares(config, model_config, ranks, device)
    if device == "cpu":
        chosen = attention.choose(torch.device("cpu"), model_config.dropout, False, model_config.attention)
        model_config = replace(model_config, attention=chosen)
    with pretended(ranks, device == "cuda" and not config.compile):  # compiled code fuses the passes of the loss itself
        with torch.device("meta"):
            gpt = model(model_config)
        optimizer = build(config, gpt, dtype)  # with numbers of its own that are real
        with torch.device("meta"):
            tokens = torch.zeros(micro, model_config.sequence_length, dtype=torch.int64)
            with Recorder(autocast) as recorder:
                loss = gpt(tokens, tokens)
                # loss.backward() would compute checkpointed activations again without the recorder's function mode
                how = dict(allow_unreachable=True, accumulate_grad=True)
                _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **how)
        gradients = [p.grad for p in gpt.parameters() if p.grad is not None]
        try:
            make_state(optimizer, dtype)
            updates = record_updates(optimizer)
        except RuntimeError as error:  # of torch: a number is read that nobody has computed
            raise UsageError(f"--optimizer {config.optimizer}: plan cannot follow its update: {error}") from None
    keep = {gradient.untyped_storage()._cdata for gradient in gradients}
    activations = max(peak(recorder.events, config.compile, keep), *(held for _, _, held in updates))
    on_the_wire, parameters = 2 if config.reduce == "bf16" else 4, Counter()
    for p, role in zip(gpt.parameters(), roles(gpt).values(), strict=True):
        parameters[role] += p.numel()
    return Step(
        passes=operations(recorder.events, config.compile, keep),
        micro_batches=sequences // micro,
        update=[(share, work) for share, work, _ in updates],
        gradients=size(gradients, on_the_wire),
        last=size([gpt.embedding.weight], on_the_wire),
        memory=Memory(size(gpt.parameters()), size(gradients), optimizers.state_bytes(optimizer), activations),
        parameters=dict(parameters),
        compiled=config.compile,
    )


def make_state(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """Take the first step, and decide as on a GPU what optimizers decide by their device.

    Iterations are in `dtype`; AdamW is fused, which torch refuses to begin on meta tensors but then runs.
    """
    for part in optimizers.parts(optimizer):
        part._need_device_dtype_check_for_fused = False
    fused = [group for group in optimizer.param_groups if group.get("fused")]
    for group in optimizer.param_groups:
        if group.get("dtype") == "auto":
            group["dtype"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    for group in fused:
        group["fused"] = False
    with Recorder():
        optimizer.step()
    for group in fused:
        group["fused"] = True


def record_updates(optimizer: torch.optim.Optimizer) -> list[tuple[float, list[Operation], int]]:
    """The update as (share of the steps, operations, most bytes held at once).

    A method that renews something every k-th step does it in steps that are 0 or 1 modulo k, so three kinds of step are
    recorded: both of these, and one between. Where parts have different k, as SOAP's bases and its AdamW may, one step of each
    combination is recorded.
    """
    everys = sorted({group.get("every", 1) for group in optimizer.param_groups})
    period = math.lcm(*everys)
    kinds = [tuple(min(step % every, 2) for every in everys) for step in range(period)]
    late = 2 * period * math.ceil(max((group.get("start", 0) for group in optimizer.param_groups), default=0) + 1)
    updates = []
    for kind, times in Counter(kinds).items():
        done = late + kinds.index(kind) - 1  # the step adds one
        for part in optimizers.parts(optimizer):
            for group in part.param_groups:
                if "t" in group:
                    group["t"] = done
            for state in part.state.values():
                if isinstance(state.get("step"), int):  # torch's own methods count in a tensor, and have no such kinds
                    state["step"] = done
        with Recorder() as recorder:
            optimizer.step()
        updates.append((times / period, operations(recorder.events, False, ()), peak(recorder.events, False, ())))
    return updates


# FineWeb documents in GPT-2 tokens: median about 400 (a comment in modded-nanogpt's loader, record 29), mean about 700 (15T
# tokens in 23B documents, arXiv 2406.17557). A lognormal distribution with these has the sigma below.
FINEWEB_MEDIAN, FINEWEB_MEAN = 400, 700
FINEWEB_SIGMA = math.sqrt(2 * math.log(FINEWEB_MEAN / FINEWEB_MEDIAN))


def fineweb_lengths(count: int) -> np.ndarray:
    """Lengths [count] of FineWeb's documents: the quantiles of their distribution, ascending."""
    normal = statistics.NormalDist(math.log(FINEWEB_MEDIAN), FINEWEB_SIGMA)
    return np.exp([normal.inv_cdf((i + 0.5) / count) for i in range(count)])


def pieces_of(starts: np.ndarray, tokens: int, sequence: int, length: int, align: bool) -> np.ndarray:
    """Tokens [n] of each document in each sequence, where sequences are cut to `length`; attention stays inside them. starts:
    where documents begin in a stream of so many tokens, ascending."""
    begins = aligned(starts, tokens, sequence) if align else np.arange(0, tokens - sequence, sequence)
    begins = (begins[:, None] + np.arange(0, sequence, length)).ravel()
    edges = np.union1d(starts, np.concatenate([begins, begins + length]))
    edges = edges[edges >= begins[0]]
    before = begins[np.searchsorted(begins, edges[:-1], side="right") - 1]  # the sequence that began last
    return np.diff(edges)[edges[:-1] < before + length]


def documents_of(config: Config, model_config: ModelConfig) -> tuple[np.ndarray, int] | None:
    """Where documents begin in the first training shard, and its tokens; else by FineWeb's distribution. None: not known."""
    try:
        shard = Dataset(dataset_folder(config.data_root, config.corpus, config.tokenizer), "train").shards[0]
    except UsageError:
        if (config.corpus, config.tokenizer) != ("fineweb10B", "gpt2"):
            return None
        lengths = fineweb_lengths(2**14).round().astype(int)
        ends = np.cumsum(np.random.default_rng(0).permutation(lengths))
        return ends - np.diff(ends, prepend=0), int(ends[-1])
    starts = np.flatnonzero(shard == model_config.end_of_text)
    return (starts, len(shard)) if len(starts) and len(shard) > 2 * model_config.sequence_length else None


def attended(model_config: ModelConfig, part: float, pieces: np.ndarray) -> float:
    """Keys that a query meets, the mean over all blocks with `part` of their windows, counted as in `flops_per_token`. pieces:
    tokens [n] within which a query meets those before it."""
    within = [np.minimum(window or pieces.max(), pieces) for window in model_config.windows(part)]
    return float(np.mean([(w * (pieces - w / 2)).sum() / pieces.sum() for w in within]))


def attending(step: Step, keys: float, length: int) -> Step:
    """The step with queries that meet so many keys in the mean, which was recorded with attention to all of `length` tokens.
    Blocks of a mask that are computed in part, and the making of masks, are left out."""
    whole = length / 2
    passes = [replace(w, flops=w.flops * keys / whole) if w.kind == "attention" else w for w in step.passes]
    return replace(step, passes=passes)


def fp8_head(step: Step, vocabulary: int) -> Step:
    """The step with products of the head, which have the vocabulary as a side, in 8-bit floats. Rounding is left out."""
    passes = [replace(work, dtype=torch.float8_e4m3fn) if vocabulary in work.shape else work for work in step.passes]
    return replace(step, passes=passes)
