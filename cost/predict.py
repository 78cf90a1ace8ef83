"""Flags of a run -> its memory, traffic, time and dollars: `./run.sh plan`."""

import argparse
import bisect
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
import torch

from config import Config, mean_flops, resolve, shares, stages
from cost.step import Step, attended, attending, communication, documents_of, fp8_head, pieces_of, record_step
from cost.time import real_times, step_time
from engine import hardware
from engine.command import Answer, Parser, command
from engine.hardware import CARDS, Card
from engine.spec import UsageError, nearest
from layers.shape import ModelConfig

HEADROOM = 0.9  # of a card's memory that tensors may take: the rest is CUDA's context, NCCL's buffers and fragments
SIZES = (8, 16, 24, 80)  # GB of the cards for which `plan` names a micro-batch
NAMES = {"pass": "passes over memory", "product": "matrix products", "factorisation": "factorisations"}


@dataclass(frozen=True)
class Machine:
    """cards: of one machine. card: None for this CPU."""

    name: str
    cards: int
    card: Card | None


def machine(words: str) -> Machine:
    """8xH100, H100 or here. Raises UsageError: no such card, or a GPU here that the table lacks."""
    if words == "here":
        if not torch.cuda.is_available():
            return Machine(hardware.processor_name(), 1, None)
        name = torch.cuda.get_device_name()
        if (known := hardware.card_named(name)) is None:
            raise UsageError(f"--hardware here: this GPU, {name}, is not in the table; known: {', '.join(CARDS)}")
        return Machine(known[0], torch.cuda.device_count(), known[1])
    count, name = re.fullmatch(r"(?s)(?:(\d+)x)?(.*)", words).groups(default="1")
    named = {key.lower().removeprefix(maker): key for key in CARDS for maker in ("rtx ", "")}
    key = named.get(name.strip().lower())
    if key is None or int(count) < 1:
        raise UsageError(f"--hardware {words}: unknown card {name!r}: {nearest(name, [*CARDS, 'here'])}; such as 8xH100")
    return Machine(key, int(count), CARDS[key])


def parse(argv: list[str]) -> tuple[argparse.Namespace, tuple[Config, ModelConfig, str]]:
    """The flags of `plan` itself, and what the trainer makes of the others. Raises UsageError: bad flags."""
    what = "Print what a run would take: memory, traffic, time, dollars. Nothing is trained or written."
    flags = Parser(prog="./run.sh plan", description=what, epilog="All other flags are the trainer's: ./run.sh train --help.")
    add = flags.add_argument
    add("--hardware", default="here", help="such as 8xH100, or here, where a CPU takes three real steps (default: here)")
    add("--world-size", type=int, default=0, metavar="N", help="ranks, one per card (default: the cards of one machine)")
    add("--gpu-price", type=float, default=0.0, metavar="DOLLARS", help="per card and hour (default: by engine/hardware.py)")
    own, rest = flags.parse_known_args(argv)
    return own, resolve(rest, others=flags._option_string_actions)


@dataclass(frozen=True)
class Prediction:
    """A run as it would be."""

    config: Config
    model_config: ModelConfig
    recipe: str
    where: Machine
    ranks: int
    dtype: torch.dtype
    step: Step  # of one rank, with the smallest batch and whole sequences
    times: dict[str, float]  # seconds of a step by part, the mean over the run
    price: float  # dollars of a card and hour; 0: not known

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times.values())


class TooLittleMemory(UsageError):
    """A step does not fit on a card. fits: tokens of the largest micro-batch that does; None: no micro-batch does."""

    def __init__(self, message: str, fits: int | None):
        super().__init__(message)
        self.fits = fits


def predict(argv: list[str]) -> Prediction:
    """What a run with these flags, `plan`'s and the trainer's, would take. Raises UsageError: bad flags, too little memory."""
    flags, (config, model_config, recipe) = parse(argv)
    where = machine(flags.hardware)
    ranks, card = flags.world_size or where.cards, where.card
    if card is None and ranks != 1:
        raise UsageError(f"--world-size {ranks}: on this CPU the steps of one rank are timed")
    if ranks < 1 or (ranks > where.cards and ranks % where.cards):
        machines = f"machines of {where.cards} {where.name}"
        raise UsageError(f"--world-size {ranks} on {machines}: at most {where.cards}, or a multiple of it")
    if model_config.head_dtype == "fp8" and not (card and card.fp8):
        able = ", ".join(name for name, other in CARDS.items() if other.fp8)
        raise UsageError(f"--head-dtype fp8: {where.name} has no fp8; cards that have it: {able}")
    device, memory = ("cuda", card.memory) if card else ("cpu", math.inf)
    _, micro = shares(config, model_config, ranks, device, memory)
    config = replace(config, micro_batch_tokens=micro * model_config.sequence_length)
    if card:
        dtype, (step, times) = card_dtype(config), card_times(config, model_config, where, ranks)
    else:
        dtype, _ = hardware.pick_dtype(config.dtype, torch.device("cpu"))
        step = record_step(config, model_config, ranks, dtype, "cpu")
        times = real_times(config, model_config, dtype, step.micro_batches)
    price = flags.gpu_price or (card.price if card else 0.0)
    return Prediction(config, model_config, recipe, where, ranks, dtype, step, times, price)


def card_dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.dtype == "fp32" else torch.bfloat16


def card_times(config: Config, model_config: ModelConfig, where: Machine, ranks: int) -> tuple[Step, dict[str, float]]:
    """The step of whole sequences, and seconds by part, the mean over the run's stages. Raises TooLittleMemory."""
    T, counts, card = model_config.sequence_length, stages(config, model_config), where.card
    link = card.link if ranks <= where.cards else min(card.link, card.network)  # of several machines the slowest wire
    documents = documents_of(config, model_config) if model_config.document_mask else None
    record = recording(config, model_config, ranks)
    whole = record(length=T)
    check_memory(whole, where, config.micro_batch_tokens // T, T, record)
    times: Counter[str] = Counter()
    for (part, length, size), steps in counts.items():
        pieces = pieces_of(*documents, T, length, config.align_documents) if documents else np.array([length])
        step = attending(record(length=length), attended(model_config, part, pieces), length)
        if model_config.head_dtype != "same" and card.fp8:
            step = fp8_head(step, model_config.padded_vocab)
        step = replace(step, micro_batches=step.micro_batches * size)
        for what, value in step_time(step, card, ranks, link).items():
            times[what] += value * steps / config.steps
    return whole, dict(times)


def recording(config: Config, model_config: ModelConfig, ranks: int) -> Callable[..., Step]:
    """Tokens of a micro-batch, length of its sequences -> the step on a card; by default the run's own."""
    # masked attention is fused: recorded without its masks, and counted by `attended`
    unmasked, dtype = replace(model_config, window=0, window_pattern="L", document_mask=False), card_dtype(config)

    @cache
    def record(tokens: int = config.micro_batch_tokens, length: int = model_config.sequence_length) -> Step:
        return record_step(replace(config, micro_batch_tokens=tokens), replace(unmasked, sequence_length=length), ranks, dtype)

    return record


def check_memory(step: Step, where: Machine, micro: int, length: int, record: Callable[[int], Step]) -> None:
    """Raises TooLittleMemory where the step does not fit on a card; says which micro-batch would. micro, length: sequences of a
    micro-batch, and tokens of each. record: tokens of a micro-batch -> the step."""
    room, memory = HEADROOM * where.card.memory, step.memory
    if memory.total <= room:
        return
    planned = f"of whose {where.card.memory / 1e9:.0f} GB {HEADROOM:.0%} may be planned"
    needs = f"a step needs {memory.total / 1e9:.1f} GB on each {where.name}, {planned}"
    fixed = memory.total - memory.activations
    for n in range(micro - 1, 0, -1):
        possible = micro * step.micro_batches % n == 0 and fixed + memory.activations * n / micro <= room
        if possible and record(n * length).memory.total <= room:  # some activations are the same for any micro-batch
            raise TooLittleMemory(f"{needs}: it fits with --micro-batch-tokens {n * length}", n * length)
    why = f"{fixed / 1e9:.1f} GB of that are weights, gradients and optimizer state: no micro-batch fits"
    raise TooLittleMemory(f"{needs}, and {why}; take a card with more memory, or an optimizer with less state", None)


def fits(p: Prediction) -> str:
    """The largest micro-batch on cards of several sizes, in words."""
    T, record = p.model_config.sequence_length, recording(p.config, p.model_config, p.ranks)
    sequences = p.config.batch_tokens // p.ranks // T
    sizes = [n * T for n in range(1, sequences + 1) if sequences % n == 0]
    fitting = {gb: bisect.bisect_right(sizes, HEADROOM * gb * 1e9, key=lambda n: record(n).memory.total) for gb in SIZES}
    return "   ".join(f"{gb} GB {sizes[n - 1] if n else 'none'}" for gb, n in fitting.items()) + "   (--micro-batch-tokens)"


def listed(values: dict[str, float], scale: float, form: str) -> str:
    return "   ".join(f"{name.replace('_', ' ')} {value / scale:{form}}" for name, value in values.items())


def report(p: Prediction) -> Answer:
    """What `plan` prints."""
    config, step, card, counts = p.config, p.step, p.where.card, stages(p.config, p.model_config)
    taken = max(1, round(60 * config.minutes / p.seconds)) if config.minutes else config.steps
    flops = mean_flops(config, p.model_config)
    tokens = round(config.batch_tokens * sum(size * steps for (_, _, size), steps in counts.items()) / config.steps)
    mean = " in the mean" * (len({size for _, _, size in counts}) > 1)
    room = f" of {card.memory / 1e9:.0f}" if card else ""
    mfu = tokens * flops / (p.seconds * p.ranks * card.bf16) if card and p.dtype == torch.bfloat16 else 0
    goal = f"; target {config.target_loss:g}, if these steps reach it" if config.target_loss else ""
    hours = p.seconds * taken / 3600 * p.ranks
    sent = listed(communication(step, p.ranks), 1e6, ",.0f") + "   by each rank" if p.ranks > 1 else "nothing"
    lines = {
        "parameters, M": listed(step.parameters, 1e6, ".3g"),
        "arithmetic": f"{flops / 1e6:,.1f} MFLOP a token, {flops * tokens / 1e12:,.4g} TFLOP a step of {tokens:,} tokens{mean}",
        "memory a rank, GB": f"{listed(asdict(step.memory), 1e9, '.3g')}   together {step.memory.total / 1e9:.1f}{room}",
        **({"fits at most on": fits(p)} if config.minutes else {}),
        "sent a step, MB": sent,
        "time, ms": listed({NAMES.get(part, part): value for part, value in p.times.items()}, 1e-3, ",.1f"),
        "a step": f"{p.seconds * 1e3:,.1f} ms, {tokens / p.seconds:,.0f} tokens/s" + (f"   MFU {mfu:.1%}" if mfu else ""),
        f"{taken:,} steps": f"{p.seconds * taken / 60:,.1f} min without compilation and validation{goal}",
    }
    if p.price:
        lines["cost"] = f"${hours * p.price:,.2f}: {hours:,.2f} card hours at ${p.price:g} (engine/hardware.py, or --gpu-price)"
    elif card:
        lines["cost"] = "no price known: --gpu-price DOLLARS, of a card and hour"
    total = sum(step.parameters.values()) / 1e6
    head = f"{config.track}, {p.recipe}: {total:.1f}M parameters on {p.ranks} x {p.where.name}, {str(p.dtype)[6:]}"
    rows = [f"{what:<20}{value}" for what, value in lines.items()]
    words = [head + ", compiled" * config.compile, *rows, "how far such predictions were off: benchmarks/README.md"]
    data = {"step_seconds": p.seconds, "steps": config.steps, "tokens_a_step": tokens, "ranks": p.ranks, "times": p.times}
    data |= {"memory": asdict(step.memory), "parameters": step.parameters, "flops_a_token": flops, "dollars": hours * p.price}
    return Answer("\n".join(words), data)


if __name__ == "__main__":
    sys.exit(command("plan", lambda: report(predict(sys.argv[1:])), sys.argv[1:]))
