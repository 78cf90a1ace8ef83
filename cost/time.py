"""Seconds of a training step: a recorded one on a card, by a roofline; real ones on this CPU, by the clock.

On a card each operation takes the longer of two times: its arithmetic at a share of the card's peak, and its memory traffic at
a share of its bandwidth (the roofline of Williams et al. 2009). A step is the sum of these, the communication that the backward
pass does not hide, and a fixed part.
"""

import math
import statistics
import timeit
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

import optimizers
from config import Config, stages
from cost.operations import Operation
from cost.step import Step, build
from engine import hardware
from engine.hardware import Card
from engine.ranks import WIRE
from layers.shape import ModelConfig
from model import GPT

HIDDEN = 2 / 3  # of the last micro-batch is backward pass, behind which DDP's buckets travel


@dataclass(frozen=True)
class Constants:
    """Shares of the data sheet that programs reach, and seconds. The first four are fitted by tests/cost/published_steps.py."""

    products: float  # of the FLOP/s that the card's fastest products reach
    attention: float  # of the same, in fused attention
    bandwidth: float  # of bytes/s, in passes over memory
    overhead: float  # seconds a step: data, launches, waiting for the slowest rank
    host: float = 2.7e-5  # seconds in which the host launches an operation that is not compiled: `tiny:baseline` on one H100
    launch: float = 4e-6  # least seconds of an operation: the launch of a CUDA kernel
    factorisation: float = 0.02  # of fp32 FLOP/s: SOAP renewed in every step (result 27 of modded-nanogpt's optimizer track)
    # of `products`, where rows are no multiple of 16 bytes, such as 50,257 logits: Hopper's fast paths cannot load them. 0.28
    # explains record 4 of the speedrun, 0.22 GPT-2's baseline on one H100 (benchmarks/h100)
    unaligned: float = 0.27
    link: float = 0.75  # of a link's bytes/s, in collectives: nccl-tests on NVLink reach 0.7 to 0.8
    latency: float = 3e-5  # seconds a collective


FITTED = Constants(products=0.676, attention=0.453, bandwidth=0.783, overhead=1.72e-3)  # by tests/cost/published_steps.py


def roofline(card: Card, constants: Constants = FITTED) -> Callable[[Operation], float]:
    """Seconds of an operation on a card."""
    half, double = card.bf16, card.fp64 * card.fp32
    peaks = {torch.bfloat16: half, torch.float16: half, torch.float8_e4m3fn: card.fp8, torch.float64: double}
    factorisation = constants.factorisation / card.reached
    shares = {"product": constants.products, "attention": constants.attention, "factorisation": factorisation}

    def seconds(work: Operation) -> float:
        share = shares.get(work.kind)
        if work.kind == "product" and any(side * work.dtype.itemsize % 16 for side in work.shape[1:]):
            share *= constants.unaligned
        arithmetic = work.flops / (share * card.reached * peaks.get(work.dtype, card.fp32)) if share else 0.0
        return max(arithmetic, work.bytes / (constants.bandwidth * card.bandwidth), constants.launch)

    return seconds


def step_time(
    step: Step, card: Card, ranks: int = 1, link: float = math.inf, constants: Constants = FITTED
) -> dict[str, float]:
    """Seconds of a step by part: product, attention, pass, optimizer, communication, overhead. Their sum is the step's. link:
    bytes/s of one card to the others, before the share that collectives reach."""
    seconds, rate = roofline(card, constants), constants.link * link
    times: dict[str, float] = defaultdict(float)
    for work in step.passes:
        times[work.kind] += seconds(work) * step.micro_batches
    compute = sum(times.values())
    if ranks > 1:
        everything, last = (WIRE["allreduce"](ranks) * part / rate for part in (step.gradients, step.last))
        hidden = HIDDEN * compute / step.micro_batches
        times["communication"] += last + max(0.0, everything - last - hidden) + constants.latency
    for share, update in step.update:
        for work in update:
            if work.kind in WIRE:
                times["communication"] += share * (WIRE[work.kind](ranks) * work.bytes / rate + constants.latency)
            else:
                times["optimizer"] += share * seconds(work)
    launches = 0.0 if step.compiled else len(step.passes) * step.micro_batches * constants.host
    times["overhead"] = constants.overhead + max(0.0, launches - compute)  # the device waits where it has less to do
    return dict(times)


def clocked(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of so many calls, after one that does not count."""
    return timeit.repeat(work, "gc.enable()", number=1, repeat=1 + times)[1:]  # which timeit itself would disable


def real_times(config: Config, model_config: ModelConfig, dtype: torch.dtype, micro_batches: int) -> dict[str, float]:
    """Seconds of a step on this CPU by part, the mean over the run's stages. Only the tokens are not real, but random."""
    torch.manual_seed(config.seed)
    gpt = GPT(model_config)
    optimizer = build(config, gpt, dtype)
    compiled = config.compile and hardware.can_compile(torch.device("cpu"))
    model = torch.compile(gpt, dynamic=False) if compiled else gpt
    if compiled:
        optimizers.compile_update(optimizer)

    @cache
    def micro_batch(part: float, length: int) -> float:
        """Seconds with that part of the windows and sequences of that length, the median of three."""
        gpt.see((part,))
        tokens = torch.randint(model_config.vocab_size, (config.micro_batch_tokens // length, length))
        # targets in memory of their own, as in training: torch.compile makes another graph for one tensor given twice
        return statistics.median(clocked(lambda: model(tokens, tokens.clone()).backward(), 3))

    counts = stages(config, model_config)
    passes = sum(steps * size * micro_batch(part, length) for (part, length, size), steps in counts.items())
    period = optimizers.period(config.optimizer)
    updates = clocked(optimizer.step, 3 if period == 1 else 2 * period)  # whole rounds of what is renewed every few steps
    update = statistics.median(updates) if period == 1 else statistics.mean(updates)
    return {"forward and backward": micro_batches * passes / config.steps, "optimizer": update}
