"""What a training step costs before it is run: memory, communication, time, dollars; behind `train_gpt.py --dry-run`.

    python train_gpt.py --dry-run --track gpt2-small --tricks record --hardware 8xH100
    python train_gpt.py --dry-run --track gpt2-small --tricks record --hardware 8xH100 --world-size 16    two such machines
    python train_gpt.py --dry-run --track cpu --tricks record                                            this machine, measured

Model, optimizer and one micro-batch are gone through on meta tensors in a process group of as many pretended ranks
(operations.py). Each operation then takes the longer of its arithmetic at a share of the card's peak and its memory traffic
at a share of its bandwidth (the roofline of Williams et al. 2009); a step is their sum, what communication does not hide
behind the backward pass, and a fixed part. The shares are fitted to published speedruns (lab/cost.py), with what is left of
the error in benchmarks/README.md. On the CPU here rates are measured instead, products at the shapes that the step has.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.testing._internal.distributed.fake_pg import FakeStore

import optimizers
from cost.operations import Operation, Recorder, operations, peak
from data.shards import Dataset, aligned, dataset_folder
from engine import hardware, schedules
from engine.hardware import CARDS, Card
from engine.ranks import WIRE
from engine.spec import UsageError, nearest, parse
from layers import kernels
from model import GPT, ModelConfig, roles
from optimizers import TABLE_OPTIMIZERS
from optimizers.mantissa import keep_mantissas, to_bf16
from optimizers.shard import Sharded

HEADROOM = 0.9  # of a card's memory that tensors may take: the rest is CUDA's context, NCCL's buffers and fragments
STATISTICS = 16  # bytes that the ranks add up before an update: loss, norm, two wishes
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
    it happens, operations). gradients: bytes to be summed over ranks, by the collective that does it, a key of WIRE; last of
    them: those that are ready only when the backward pass ends. tables: bytes of sparse gradients that each rank sends.
    compiled: nobody launches the passes one by one.
    """

    passes: list[Operation]
    micro_batches: int
    update: list[tuple[float, list[Operation]]]
    gradients: dict[str, int]
    last: dict[str, int]
    tables: int
    memory: Memory
    parameters: dict[str, int]  # by role
    compiled: bool = True


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


@contextlib.contextmanager
def loss_by_kernel(on: bool):
    """Record the loss as a GPU's kernels pass over the logits; compiled code fuses the passes of the reference."""
    if not on:
        yield
        return
    kernels.use("meta")
    try:
        yield
    finally:
        kernels.use("auto")


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
    autocast: bool = False,
    reduce: str = "fp32",
    shard: bool = False,
    prepare: Callable[[GPT], None] = lambda gpt: None,
    weights: str = "fp32",
) -> Step:
    """Go through one step without computing it.

    Args:
        sequences, micro: of a rank in a step, and in one micro-batch.
        dtype: of activations and products.
        compiled: element-wise passes are fused, as by torch.compile.
        device: meta: what the trainer does on a GPU; cpu: what it does there.
        autocast: bf16 products of activations that stay in `dtype`, as torch.autocast has it; the trainer does not.
        reduce: bf16: gradients travel in it.
        shard: state of element-wise optimizers is divided over the ranks, and gradients are scattered.
        prepare: may change the model first.
        weights: of hidden matrices, fp32 or bf16.
    """
    fake = FakeTensorMode() if device == "cpu" else contextlib.nullcontext()
    with pretended(ranks), fake, torch.device(device):
        gpt = GPT(model_config)
        prepare(gpt)
        gpt.compute_dtype = dtype
        kind = roles(gpt)
        if weights == "bf16":
            mantissas = to_bf16([p for name, p in gpt.named_parameters() if kind[name] == "matrix"])
        built = optimizers.build(optimizer, gpt, 1000, average, table_optimizer)
        if shard:
            built = Sharded(built)
        if weights == "bf16":
            built = keep_mantissas(built, mantissas)
        if device == "cpu" and compiled:
            for part in optimizers.parts(built):
                part.compiled = hasattr(part, "compile")
        sparse = set(gpt.tables())
        for p in sparse:
            p.requires_grad_(False)
            gpt.ngrams.is_sparse = False
        tokens = torch.zeros(micro, model_config.sequence_length, dtype=torch.int64)
        with loss_by_kernel(not compiled), Recorder(autocast) as passes:
            loss = gpt(tokens, tokens)
            # loss.backward(), which would have activations computed again without the recorder's function mode
            how = dict(allow_unreachable=True, accumulate_grad=True)
            _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **how)
        lookups, rows_updated = record_tables(gpt, tokens, table_optimizer, compiled) if sparse else ([], [])
    grads = [p.grad for p in gpt.parameters() if p.grad is not None]
    keep = {g.untyped_storage()._cdata for g in grads}
    with pretended(ranks), fake:
        settle(built, dtype)
        updates = record_updates(built)
    by_role: Counter[str] = Counter()
    for name, p in gpt.named_parameters():
        by_role[kind[name]] += p.numel()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    rows = micro * model_config.sequence_length * len(gpt.ngrams.orders) if sparse else 0
    table_bytes = rows * (4 * model_config.width + 8)
    sent = lambda t: t.numel() * (2 if reduce == "bf16" else t.element_size())  # noqa: E731
    how = built.collective if shard else lambda p: "allreduce"
    gradients: Counter[str] = Counter()
    for p in gpt.parameters():
        gradients[how(p)] += sent(p.grad) if p.grad is not None else 0
    rows_sent = rows * ((2 if reduce == "bf16" else 4) * model_config.width + 8)
    passed = operations(passes.events, compiled, keep) + lookups
    if sparse:
        updates.append((1.0, rows_updated, 0))
    state = optimizers.state_bytes(built)
    return Step(
        passed, sequences // micro, [(share, work) for share, work, _ in updates], dict(gradients),
        {how(gpt.embedding.weight): sent(gpt.embedding.weight)}, rows_sent * (sequences // micro),
        Memory(
            size(gpt.parameters()), size(grads) + table_bytes, state,
            max(peak(passes.events, compiled, keep), *(most for _, _, most in updates)),
        ),
        dict(by_role), compiled,
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

    Methods that renew something every k-th step do it in steps that are 0 or 1 modulo k: a step of either kind and one between
    are recorded; of parts with other k, as SOAP's bases and its AdamW may be, one of each kind that occurs.
    """
    everys = sorted({group.get("every", 1) for group in optimizer.param_groups})
    period = math.lcm(*everys)
    kinds = [tuple(min(step % every, 2) for every in everys) for step in range(period)]
    late = 2 * period * math.ceil(max((group.get("start", 0) for group in optimizer.param_groups), default=0) + 1)
    found = []
    for kind, times in Counter(kinds).items():
        for part in optimizers.parts(optimizer):
            done = late + kinds.index(kind) - 1  # the step adds one
            for group in part.param_groups:
                if "t" in group:
                    group["t"] = done
            for state in part.state.values():
                if isinstance(state.get("step"), int):  # torch's own methods count in a tensor, and have no such kinds
                    state["step"] = done
        with Recorder() as recorder:
            optimizer.step()
        found.append((times / period, operations(recorder.events, False, set()), peak(recorder.events, False, set())))
    return found


def record_tables(gpt: GPT, tokens: torch.Tensor, optimizer: str, compiled: bool) -> tuple[list[Operation], list[Operation]]:
    """What sparse tables add to a backward pass and to the update, as if no row were looked up twice.

    The number of distinct rows depends on the data, so model.SummedLookup cannot be recorded: its operations are repeated here.
    """
    k, width = len(gpt.ngrams.orders), gpt.config.width
    n = tokens.numel() * k
    settings, keys = parse(optimizer, TABLE_OPTIMIZERS, "table optimizer")
    table, grad = gpt.ngrams.table.weight.detach(), torch.zeros(tokens.numel(), width)
    squares, rows, values = torch.zeros_like(table), torch.zeros(n, dtype=torch.int64), torch.zeros(n, width)
    with Recorder() as passes:
        _, order = rows.sort(stable=True)
        F.embedding_bag(order // k, grad, rows, mode="sum")
    with Recorder() as update:
        settings.method.rule(table, squares, rows, values, 1.0, settings(**keys).eps)
    kept = {t.untyped_storage()._cdata for t in (table, squares)}
    sorting = Operation("pass", 16.0 * n, special=4 * n * math.log2(n))  # a comparison counts as four exponentials
    return [sorting, *operations(passes.events, False, set())], operations(update.events, compiled, kept)


# FineWeb documents in GPT-2 tokens: median about 400 (a comment in modded-nanogpt's loader, record 29), mean about 700 (15T
# tokens in 23B documents, arXiv 2406.17557). A lognormal distribution with these has the sigma below.
FINEWEB_MEDIAN, FINEWEB_MEAN = 400, 700
FINEWEB_SIGMA = math.sqrt(2 * math.log(FINEWEB_MEAN / FINEWEB_MEDIAN))


@dataclass(frozen=True)
class Documents:
    """Where documents begin in a stream of so many tokens, [n] ascending; `source` says whose."""

    starts: np.ndarray
    tokens: int
    source: str

    def pieces(self, sequence: int, length: int, align: bool) -> np.ndarray:
        """Tokens of each document in each sequence, where sequences are cut to `length`: [n]; what attention stays in."""
        begins = aligned(self.starts, self.tokens, sequence) if align else np.arange(0, self.tokens - sequence, sequence)
        begins = (begins[:, None] + np.arange(0, sequence, length)).ravel()
        edges = np.union1d(self.starts, np.concatenate([begins, begins + length]))
        edges = edges[edges >= begins[0]]
        last = begins[np.searchsorted(begins, edges[:-1], side="right") - 1]  # to begin before
        return np.diff(edges)[edges[:-1] < last + length]


def documents_of(config: Any, model_config: ModelConfig) -> Documents | None:
    """Those of the first shard of training data, if it is here; else of FineWeb by its distribution. None: nothing is known."""
    try:
        dataset = Dataset(dataset_folder(config.data_root, config.corpus, config.tokenizer), "train")
    except UsageError:
        if not (config.corpus.startswith("fineweb") and config.tokenizer == "gpt2"):
            return None
        normal = statistics.NormalDist(math.log(FINEWEB_MEDIAN), FINEWEB_SIGMA)
        lengths = np.exp([normal.inv_cdf((i + 0.5) / 2**14) for i in range(2**14)]).round().astype(int)
        ends = np.cumsum(np.random.default_rng(0).permutation(lengths))
        return Documents(ends - np.diff(ends, prepend=0), int(ends[-1]), "assumed lognormal as FineWeb's (cost.py)")
    shard = dataset.shards[0]
    starts = np.flatnonzero(shard == model_config.end_of_text)
    enough = len(starts) and len(shard) > 2 * model_config.sequence_length
    return Documents(starts, len(shard), f"as in {dataset.paths[0]}") if enough else None


def attended(model_config: ModelConfig, part: float, pieces: np.ndarray) -> float:
    """Keys that a query meets in the mean over all blocks, as `model.flops_per_token` counts them.

    part: of the windows. pieces: tokens [n] in which each query meets those before it.
    """
    within = [np.minimum(window or pieces.max(), pieces) for window in model_config.windows(part)]
    met = [(w * (pieces - w / 2)).sum() / pieces.sum() for w in within]
    return float(sum(met) / max(1, len(met)))


def in_window(step: Step, model_config: ModelConfig, part: float, length: int = 0, pieces: np.ndarray | None = None) -> Step:
    """A step recorded with attention to all tokens before, as it is with the windows of the model in a stage that has `part` of
    them, and inside `pieces` of sequences (`Documents`) where they are given. Blocks of a mask that are computed in part, and
    the making of masks, are left out."""
    T = length or model_config.sequence_length
    share = attended(model_config, part, np.array([T]) if pieces is None else pieces) / (T / 2)
    passes = [dataclasses.replace(w, flops=w.flops * share) if w.kind == "attention" else w for w in step.passes]
    return dataclasses.replace(step, passes=passes)


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Constants:
    """Shares of the data sheet that programs reach, and seconds. What is fitted: lab/cost.py; the rest is chosen."""

    products: float  # of the FLOP/s that the card's fastest products reach
    attention: float  # of the same, in fused attention
    bandwidth: float  # of bytes/s, in passes over memory
    overhead: float  # seconds a step: data, launches, waiting for the slowest rank
    # seconds in which the host launches an operation that is not compiled: 5.35 ms for the 135 of `tiny:baseline`, of which
    # 1.72 are overhead, on one H100 (benchmarks/h100)
    host: float = 2.7e-5
    launch: float = 4e-6  # least seconds of an operation: chosen, the launch of a CUDA kernel from PyTorch
    # of fp32 FLOP/s, in QR and eigendecompositions: chosen by SOAP renewed in every step on one H100 (2,655 ms: result 27 of
    # modded-nanogpt's optimizer track)
    factorisation: float = 0.02
    # of `products`, where rows are no multiple of 16 bytes, as those of 50,257 logits: Hopper's fast paths cannot load them.
    # Chosen: 0.28 makes record 4 of the speedrun come out right, were its head all that slowed it; 0.22 GPT-2's baseline on
    # one H100 (benchmarks/h100)
    unaligned: float = 0.27
    link: float = 0.75  # of a link's bytes/s, in collectives: chosen, nccl-tests on NVLink reach 0.7 to 0.8
    latency: float = 3e-5  # seconds a collective: chosen


FITTED = Constants(products=0.676, attention=0.453, bandwidth=0.783, overhead=1.72e-3)  # by python -m cost.fit


def roofline(card: Card, constants: Constants = FITTED) -> Callable[[Operation], float]:
    """Seconds of an operation on a card."""
    peaks = {
        torch.bfloat16: card.bf16,
        torch.float16: card.bf16,
        torch.float8_e4m3fn: card.fp8,
        torch.float64: card.fp64 * card.fp32,
    }

    def seconds(work: Operation) -> float:
        top = peaks.get(work.dtype, card.fp32)
        share = {"product": constants.products, "attention": constants.attention}.get(work.kind)
        if work.kind == "factorisation":
            share = constants.factorisation / card.reached
        if work.kind == "product" and any(side * work.dtype.itemsize % 16 for side in work.shape[1:]):
            share *= constants.unaligned
        arithmetic = work.flops / (share * card.reached * top) if share else 0.0
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
        everything, last = (sum(reduced(sizes, ranks).values()) / rate for sizes in (step.gradients, step.last))
        behind = HIDDEN * compute / step.micro_batches
        found["communication"] += last + max(0.0, everything - last - behind) + constants.latency
        found["communication"] += step.tables * (ranks - 1) / rate
    for share, operations_ in step.update:
        for work in operations_:
            if work.kind in WIRE:
                found["communication"] += share * (WIRE[work.kind](ranks) * work.bytes / rate + constants.latency)
            else:
                found["optimizer"] += share * seconds(work)
    launches = 0.0 if step.compiled else len(step.passes) * step.micro_batches * constants.host
    found["overhead"] = constants.overhead + max(0.0, launches - compute)  # the device waits for them where it has less to do
    return dict(found)


def reduced(gradients: dict[str, int], ranks: int) -> dict[str, float]:
    """Bytes that one rank sends to sum up gradients, by collective."""
    return {kind: WIRE[kind](ranks) * size for kind, size in gradients.items()}


def communication(step: Step, ranks: int) -> dict[str, float]:
    """Bytes that one rank sends in a step, by what they are."""
    names = {"allreduce": "all-reduce", "reduce_scatter": "reduce-scatter"}
    found = {f"gradients, {names.get(kind, kind)}": sent for kind, sent in reduced(step.gradients, ranks).items()}
    found["loss, norm, signals, all-reduce"] = WIRE["allreduce"](ranks) * STATISTICS
    if step.tables:
        found["table rows, all-gather"] = float(step.tables * (ranks - 1))
    sent = sum(share * WIRE[w.kind](ranks) * w.bytes for share, ops in step.update for w in ops if w.kind in WIRE)
    return found | ({"updates, all-gather": sent} if sent else {})


# ---------------------------------------------------------------- this machine's CPU


class Here:
    """Seconds of operations on this CPU, from rates measured when first asked for: the median of a few calls.

    Products are timed at the shapes that the step has, long ones in part. Passes take their traffic at the rate of an addition
    whose operands and result take up as much, and more for exp and its like. Results are newly allocated, and operands are not
    in the caches, as in a step that has done other things since it made them.
    """

    LARGEST = 2e8  # operations of a product that is timed whole
    SIZES = tuple(2**n for n in range(14, 28, 2))  # bytes of operands and result of an addition
    POOL = 2**25  # numbers that operands are cut from in turn: 128 MB, more than caches hold

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.products: dict[tuple, float] = {}
        self.pool, self.place = torch.randn(self.POOL), 0
        self.measure()

    def cold(self, *shape: int) -> torch.Tensor:
        """Numbers of that shape that were not touched lately."""
        size = math.prod(shape)
        if self.place + size > self.POOL:
            self.place = 0
        self.place += size
        return self.pool[self.place - size : self.place].view(shape)

    def measure(self) -> None:
        """Time the passes anew, and forget the products."""
        self.products.clear()
        self.rates = {}
        for size in self.SIZES:
            n = size // 12
            self.rates[size] = 12 * n / timed(lambda n=n: self.cold(n) + self.cold(n), self.clock)
        small = torch.randn(8)
        self.launch = timed(lambda: small + small, self.clock)
        x = torch.randn(2**16)
        self.special = max(0.0, timed(x.exp, self.clock) - timed(lambda: x + x, self.clock)) / x.numel()

    def rate(self, size: float) -> float:
        """Bytes/s of a pass over so many bytes: between the measured sizes, linear in their logarithm."""
        low = max((s for s in self.SIZES if s <= size), default=self.SIZES[0])
        high = min((s for s in self.SIZES if s >= size), default=self.SIZES[-1])
        if low >= high:
            return self.rates[high if size < low else low]
        part = math.log(size / low) / math.log(high / low)
        return self.rates[low] ** (1 - part) * self.rates[high] ** part

    def product(self, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        """Seconds of a product, batch x [m, k] x [k, n]."""
        if (shape, dtype) not in self.products:
            batch, m, n, k = shape
            parts = max(1, math.ceil(2 * batch * m * n * k / self.LARGEST))
            if batch >= parts:
                batch = max(1, batch // parts)
            elif m >= k:
                m = max(1, m // parts)
            else:
                k = max(1, k // parts)
            whole = math.prod(shape) / (batch * m * n * k)
            multiply = torch.bmm if batch > 1 else lambda a, b: torch.mm(a[0], b[0])
            if dtype == torch.float32:
                call = lambda: multiply(self.cold(batch, m, k), self.cold(batch, k, n))  # noqa: E731
            else:
                a, b = torch.randn(batch, m, k).to(dtype), torch.randn(batch, k, n).to(dtype)
                call = lambda: multiply(a, b)  # noqa: E731
            self.products[shape, dtype] = whole * timed(call, self.clock)
        return self.products[shape, dtype]

    def seconds(self, work: Operation) -> float:
        if work.kind == "product":
            return self.product(work.shape, work.dtype)
        arithmetic = 0.0
        if work.kind == "factorisation":
            arithmetic = work.flops / self.factorisations
        elif work.flops:  # fused attention, as products of a common size
            arithmetic = work.flops / (2 * 256**3) * self.product((1, 256, 256, 256), work.dtype)
        return arithmetic + work.bytes / self.rate(work.bytes) + work.special * self.special + work.launches * self.launch

    @functools.cached_property
    def factorisations(self) -> float:
        """FLOP/s of a QR decomposition, as operations.py counts them."""
        a = torch.randn(256, 256)
        return 8 / 3 * 256**3 / timed(lambda: torch.linalg.qr(a), self.clock)


def timed(call: Callable[[], object], clock: Callable[[], float], least: float = 2e-3) -> float:
    """Median seconds of a call, over 5 samples of at least `least` seconds; what comes before them does not count."""
    times: list[float] = []
    calls = 1
    while len(times) < 5:
        start = clock()
        for _ in range(calls):
            call()
        spent = clock() - start
        if spent < least and not times:
            calls *= 2  # too short for the clock, or still setting up the primitive
        else:
            times.append(spent / calls)
    return statistics.median(times)


# ---------------------------------------------------------------- the dry run


@dataclass(frozen=True)
class Machine:
    """cards: of one machine. card: None for this CPU."""

    name: str
    cards: int
    card: Card | None

    def link(self, ranks: int) -> float:
        """Bytes/s between ranks: of the slowest wire, when they are on several machines."""
        if self.card is None:
            return math.inf
        return self.card.link if ranks <= self.cards else min(self.card.link, self.card.network)


def machine(words: str) -> Machine:
    """8xH100, H100 or here.

    Raises:
        UsageError: no such card, or a GPU here that the table lacks.
    """
    if words == "here":
        if not torch.cuda.is_available():
            return Machine(hardware.processor_name(), 1, None)
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
        found = hardware.card_named(name)
        if found is None:
            raise UsageError(f"--hardware here: this GPU, {name}, is not in the table; known: {', '.join(CARDS)}")
        return Machine(found[0], count, found[1])
    count, times, name = words.partition("x")
    if not (times and count.isdigit()):
        count, name = "1", words
    known = {key.lower(): key for key in CARDS} | {key.split()[-1].lower(): key for key in CARDS if key.startswith("RTX")}
    if name.strip().lower() not in known or int(count) < 1:
        raise UsageError(f"--hardware {words}: unknown card {name!r}: {nearest(name, [*CARDS, 'here'])}; such as 8xH100")
    key = known[name.strip().lower()]
    return Machine(key, int(count), CARDS[key])


def check_fp8(settings: dict[str, object], where: Machine) -> None:
    """Does a setting ask for 8-bit floats that the card lacks?

    Raises:
        UsageError: it does.
    """
    asking = [key for key, value in settings.items() if value == "fp8" or ("fp8" in key and value)]
    if asking and not (where.card and where.card.fp8):
        able = ", ".join(name for name, card in CARDS.items() if card.fp8)
        raise UsageError(f"--{asking[0].replace('_', '-')}: {where.name} has no fp8; cards that have it: {able}")


class TooLittleMemory(UsageError):
    """A step does not fit on a card. fits: tokens of the largest micro-batch with which it would; None: no micro-batch."""

    def __init__(self, message: str, fits: int | None):
        super().__init__(message)
        self.fits = fits


def check_memory(where: Machine, record: Callable[[int], Step], sequences: int, micro: int, length: int) -> Step:
    """The step with micro-batches of `micro` sequences, where it fits.

    Args:
        record: sequences in a micro-batch -> the step.
    Raises:
        TooLittleMemory: it does not fit; says which micro-batch would, or that none does.
    """
    step = record(micro)
    room = HEADROOM * where.card.memory
    memory = step.memory
    if memory.total <= room:
        return step
    rest = memory.total - memory.activations
    have = f"of whose {where.card.memory / 1e9:.0f} GB {HEADROOM:.0%} may be planned"
    least = f"needs {memory.total / 1e9:.1f} GB on each {where.name}, {have}"
    smaller = [n for n in range(micro - 1, 0, -1) if sequences % n == 0 and rest + memory.activations * n / micro <= room]
    for n in smaller:  # weights are cast whatever the micro-batch, so what it takes is not in proportion: look
        if record(n).memory.total <= room:
            raise TooLittleMemory(f"a step {least}: it fits with --micro-batch-tokens {n * length}", n * length)
    raise TooLittleMemory(
        f"a step {least}, and {rest / 1e9:.1f} GB of that are weights, gradients and optimizer state: no micro-batch fits; "
        "take a card with more memory, or an optimizer with less state", None,
    )  # fmt: skip


def own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the dry run, and those that are left for the trainer.

    Raises:
        UsageError: a number that is none.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--dry-run", action="store_true")
    flags.add_argument("--hardware", default="here")
    flags.add_argument("--world-size", type=int, default=0)
    flags.add_argument("--gpu-price", type=float, default=0.0)
    try:
        return flags.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None


@dataclass(frozen=True)
class Prediction:
    """A run as it would be. times: seconds of a step by part. price: dollars an hour and card; 0: not known."""

    config: Any  # train_gpt.Config
    model_config: ModelConfig
    recipe: str
    where: Machine
    ranks: int
    dtype: torch.dtype
    step: Step
    times: dict[str, float]
    price: float
    documents: Documents | None  # that a mask keeps apart, where they are known

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times.values())


def dry_run(argv: list[str]) -> int:
    """`train_gpt.py --dry-run ...`: print what the run would cost. Nothing is written. Raises as `predict`."""
    print(report(**vars(predict(argv))))
    return 0


def predict(argv: list[str]) -> Prediction:
    """What a run with these flags, of the dry run and of the trainer, would take.

    Raises:
        UsageError: bad flags, a batch that the ranks do not divide, too little memory.
    """
    import train_gpt  # which imports this module when asked for a dry run

    own, rest = own_flags(argv)
    config, model_config, recipe = train_gpt.resolve(rest)
    where = machine(own.hardware)
    ranks = own.world_size or where.cards
    if ranks < 1 or (ranks > where.cards and ranks % where.cards):
        raise UsageError(
            f"--world-size {ranks} on machines of {where.cards} {where.name}: at most {where.cards}, or a multiple of it"
        )
    check_fp8(vars(config) | vars(model_config), where)
    device = torch.device("cuda" if where.card else "cpu")
    sequences, micro = train_gpt.shares(config, model_config, SimpleNamespace(size=ranks, device=device))
    if where.card:
        dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
    else:
        dtype, _ = hardware.pick_dtype(config.dtype, device)

    # on a card masked attention is fused: recorded without its masks, and counted by `in_window`
    unmasked = dataclasses.replace(
        model_config, window=0, window_pattern="L", document_mask=model_config.document_mask and not where.card
    )
    whole = model_config.sequence_length

    def record(micro: int, part: float = 1.0, length: int = whole) -> Step:
        def prepare(gpt: GPT) -> None:
            for block, window in zip(gpt.blocks, model_config.windows(part), strict=True):
                block.attention.window = 0 if where.card else window

        return record_step(
            dataclasses.replace(unmasked, sequence_length=length), config.optimizer, sequences * whole // length,
            micro * whole // length, ranks, dtype, config.compile, config.average,
            config.table_optimizer, "meta" if where.card else "cpu", reduce=config.reduce, shard=config.shard_optimizer,
            prepare=prepare, weights=config.weights,
        )  # fmt: skip

    def as_run(step: Step) -> Step:
        """With the head in 8-bit floats, where it will be. (Their rounding is left out.)"""
        if model_config.head_dtype == "same" or not (where.card and where.card.fp8):
            return step
        eighth = lambda w: w.kind == "product" and model_config.padded_vocab in w.shape  # noqa: E731
        passes = [dataclasses.replace(w, dtype=torch.float8_e4m3fn) if eighth(w) else w for w in step.passes]
        return dataclasses.replace(step, passes=passes)

    stages = train_gpt.stages(config)
    forms = {(part, round(whole * cut)) for part, cut, _ in stages}
    if where.card:
        step = check_memory(where, record, sequences, micro, model_config.sequence_length)
        of_length = {length: step if length == whole else record(micro, length=length) for _, length in forms}
        documents = documents_of(config, model_config) if model_config.document_mask else None
        pieces = lambda length: documents and documents.pieces(whole, length, config.align_documents)  # noqa: E731
        by_form = {(p, length): in_window(of_length[length], model_config, p, length, pieces(length)) for p, length in forms}
        seconds, constants, price = roofline(where.card), FITTED, own.gpu_price or where.card.price
    else:
        by_form = {(part, length): record(micro, part, length) for part, length in forms}
        step, documents = by_form[max(by_form)], None
        seconds, constants, price = Here().seconds, dataclasses.replace(FITTED, overhead=0.0, host=0.0), own.gpu_price
    times: Counter[str] = Counter()  # the mean over all steps
    for (part, cut, size), steps in stages.items():
        now = dataclasses.replace(
            as_run(by_form[part, round(whole * cut)]), micro_batches=step.micro_batches * size, tables=step.tables * size
        )
        for what, value in step_time(now, seconds, ranks, where.link(ranks), constants).items():
            times[what] += value * steps / config.steps
    return Prediction(config, model_config, recipe, where, ranks, dtype, step, dict(times), price, documents)


def mask_saves(config, model_config: ModelConfig, documents: Documents | None, fused: bool) -> str:
    """What a mask of documents saves, in words."""
    if documents is None:
        return "what it saves is not counted: no documents here to know their lengths" if fused else "saves nothing on a CPU"
    T = model_config.sequence_length
    whole, masked = (
        attended(model_config, 1.0, pieces)
        for pieces in (np.array([T]), documents.pieces(T, T, config.align_documents))
    )  # fmt: skip
    saved = 12 * model_config.width * model_config.layers * (whole - masked)
    return (
        f"{masked:,.0f} keys a query, not {whole:,.0f}, saves {saved / 1e6:,.1f} MFLOP a token: in the time, not in arithmetic "
        f"and MFU; documents of {documents.tokens / len(documents.starts):,.0f} tokens, {documents.source}"
    )


def report(config, model_config: ModelConfig, recipe: str, where: Machine, ranks: int, dtype: torch.dtype, step: Step,
           times: dict[str, float], price: float, documents: Documents | None) -> str:  # fmt: skip
    """What the dry run prints."""
    import train_gpt  # as above

    listed = lambda values, scale, form: "   ".join(f"{name} {value / scale:{form}}" for name, value in values.items())  # noqa: E731
    batches = schedules.build_batches(config.batch_schedule, config.steps)
    tokens, size = round(config.batch_tokens * batches.before(config.steps) / config.steps), max(batches.sizes)
    step = dataclasses.replace(step, tables=step.tables * size)
    flops, total = train_gpt.mean_flops(config, model_config), sum(times.values())
    whole = total * config.steps
    memory = {f.name.replace("_", " "): getattr(step.memory, f.name) for f in dataclasses.fields(Memory)}
    room = f" of {where.card.memory / 1e9:.0f}" if where.card else ""
    peak_flops = where.card.bf16 if where.card and dtype == torch.bfloat16 else None
    mfu = f"   MFU {tokens * flops / (total * ranks * peak_flops):.1%}" if peak_flops else ""
    named = {"pass": "passes over memory", "product": "matrix products", "factorisation": "factorisations"}
    times = {named.get(part, part): value for part, value in times.items()}
    goal = f"; target {config.target_loss:g}, if these steps reach it" if config.target_loss else ""
    lines = {
        "parameters, M": listed(step.parameters, 1e6, ".3g"),
        "arithmetic": f"{flops / 1e6:,.1f} MFLOP a token, {flops * tokens / 1e12:,.4g} TFLOP a step of "
        f"{tokens:,} tokens{' in the mean' if size > 1 else ''}",
        "memory a rank, GB": f"{listed(memory, 1e9, '.3g')}   together {step.memory.total / 1e9:.1f}{room}",
        f"sent {'at most' if size > 1 else 'a step'}, MB": f"{listed(communication(step, ranks), 1e6, ',.0f')}   by each rank"
        if ranks > 1
        else "nothing",
        "time, ms": listed(times, 1e-3, ",.1f"),
        "a step": f"{total * 1e3:,.1f} ms, {tokens / total:,.0f} tokens/s{mfu}",
        f"{config.steps:,} steps": f"{whole / 60:,.1f} min without compilation and validation{goal}",
    }
    if model_config.document_mask:
        lines["document mask"] = mask_saves(config, model_config, documents, fused=where.card is not None)
    if price:
        hours = whole / 3600 * ranks
        lines["cost"] = f"${hours * price:,.2f}: {hours:,.2f} card hours at ${price:g} (hardware.py, or --gpu-price)"
    elif where.card:
        lines["cost"] = "no price known: --gpu-price DOLLARS, of a card and hour"
    return "\n".join(
        [
            f"{config.track}, {recipe}: {sum(step.parameters.values()) / 1e6:.1f}M parameters on {ranks} x {where.name}, "
            f"{str(dtype)[6:]}{', compiled' if config.compile else ''}",
            *(f"{what:<20}{value}" for what, value in lines.items()),
            "how far such predictions were off: benchmarks/README.md",
        ]
    )
