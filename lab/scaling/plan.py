"""What a scaling experiment would cost, before it is run: tokens, FLOPs, memory, hours, money, by kind of machine."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

import cost
import train_gpt
from engine import hardware
from engine.hardware import CARDS
from engine.spec import UsageError, nearest
from lab.markdown import table
from lab.scaling.ladder import Rung, size_words
from lab.trials import Arm
from model import flops_per_token

# Of the peak in matrix products, what training takes: the NanoGPT speedrun's logs of October 2024 on 8 H100, with model
# FLOPs as `model.flops_per_token` counts them: 37 % at 124M (142 ms a step), 36 % at 1.5B (9.62 h for 10B tokens).
MFU = 0.36
HERE = "this machine"


@dataclass(frozen=True)
class Machine:
    """What trials run on."""

    name: str
    device: str  # cuda or cpu
    ranks: int
    memory: float  # bytes of each rank
    peak: float | None  # FLOP/s of each rank
    price: float | None  # of an hour of all ranks, $


def machine(words: str, ranks: int, price: float | None) -> Machine:
    """`8xH100`, or `this machine` with so many ranks. price: $ an hour of one GPU; None: by the table.

    Raises:
        UsageError: it is neither.
    """
    if words == HERE:
        device = hardware.pick_device("auto")
        dtype, _ = hardware.pick_dtype("auto", device)
        peak, _ = hardware.matmul_peak(device, dtype)
        if device.type == "cuda":
            room = torch.cuda.get_device_properties(device).total_memory
        else:
            room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
        return Machine(HERE, device.type, ranks, room, peak, price and price * ranks)
    found = re.fullmatch(r"(\d+)x(.+)", words)
    if not found or int(found[1]) < 1:
        raise UsageError(f"--hardware takes 8xH100 and the like, or {HERE!r}; not {words!r}")
    count, gpu = int(found[1]), found[2]
    if gpu not in CARDS:
        raise UsageError(f"--hardware {words}: {nearest(gpu, CARDS)}")
    card = CARDS[gpu]
    each = card.price or None if price is None else price
    return Machine(words, "cuda", count, card.memory, card.bf16, each and each * count)


@dataclass(frozen=True)
class Work:
    """All runs of one arm at one size."""

    arm: str
    rung: Rung
    flags: tuple[str, ...]
    runs: int
    steps: int  # of all runs together

    @property
    def tokens(self) -> int:
        return self.steps * self.rung.batch_tokens


def memory_of(flags: Sequence[str], micro: int, ranks: int = 1, device: str = "cpu") -> cost.Memory:
    """Of a rank in a step with micro-batches of `micro` sequences, as the dry run has it: of a model of more than 6 layers by a
    straight line through 3 and 6, since every further block adds as much."""
    config, model, _ = train_gpt.resolve(list(flags))
    dtype = torch.bfloat16 if device == "cuda" and config.dtype != "fp32" else torch.float32

    def recorded(layers: int) -> tuple[float, ...]:
        step = cost.record_step(
            dataclasses.replace(model, layers=layers), config.optimizer, micro, micro, ranks, dtype, config.compile,
            config.average, config.table_optimizer, "meta" if device == "cuda" else "cpu", shard=config.shard_optimizer,
        )  # fmt: skip
        return dataclasses.astuple(step.memory)

    if model.layers <= 6:
        return cost.Memory(*recorded(model.layers))
    shallow, deeper = recorded(3), recorded(6)
    return cost.Memory(*(round(a + (b - a) * (model.layers - 3) / 3) for a, b in zip(shallow, deeper, strict=True)))


@dataclass(frozen=True)
class Fit:
    """Bytes of one rank at a size, and the micro-batch that it takes; `sequences` is 0 where not even one fits."""

    sequences: int
    memory: int


def fits(flags: Sequence[str], machine: Machine) -> Fit:
    """The largest micro-batch up to the trainer's own choice that the machine has memory for."""
    config, model, _ = train_gpt.resolve(list(flags))
    world = SimpleNamespace(size=machine.ranks, device=torch.device(machine.device))
    per_rank, sequences = train_gpt.shares(config, model, world)
    needed = lambda micro: memory_of(flags, micro, machine.ranks, machine.device).total  # noqa: E731
    room, most, least = cost.HEADROOM * machine.memory, needed(sequences), needed(1)
    if most <= room:
        return Fit(sequences, most)
    if least > room:
        return Fit(0, least)
    each = (most - least) / (sequences - 1)  # of a further sequence
    fitting = 1 + int((room - least) / each)
    chosen = next(n for n in range(min(fitting, sequences - 1), 0, -1) if per_rank % n == 0)
    return Fit(chosen, needed(chosen))


def hungriest(arms: dict[str, Arm]) -> str:
    """The arm whose step takes most memory, at the size given."""
    total = {name: memory_of(arm.flags, 1).total for name, arm in arms.items()}
    return max(total, key=total.get)


def seconds_by_peak(flags: Sequence[str], machine: Machine) -> float:
    """Of a token, on a machine that is not here: model FLOPs over MFU x peak. Optimizers are taken to cost nothing."""
    _, model, _ = train_gpt.resolve(list(flags))
    return flops_per_token(model) / (MFU * machine.peak * machine.ranks)


def plan(work: Sequence[Work], machine: Machine, seconds: Callable[[Work], float], side_by_side: int = 1) -> dict[str, Any]:
    """Of all runs: a row for each size, and the sums.

    Args:
        seconds: of one token of that work.
        side_by_side: trials at once.
    """
    rows = []
    hungry = None
    for rung in dict.fromkeys(w.rung for w in work):
        own = [w for w in work if w.rung == rung]
        arms = {w.arm: Arm(w.arm, w.flags) for w in own}
        hungry = hungry or hungriest(arms)
        fit = fits(arms[hungry].flags, machine)
        _, model, _ = train_gpt.resolve(list(own[0].flags))
        val_tokens = [train_gpt.resolve(list(w.flags))[0].val_tokens for w in own]
        hours = 0.0
        for w, val in zip(own, val_tokens, strict=True):
            trained = w.tokens + w.runs * val / 3  # a validation is the forward third of a training pass
            hours += seconds(w) * trained / 3600 / side_by_side
        all_tokens = sum(w.tokens for w in own)
        rows.append(
            {
                "size": rung.size.name, "parameters": rung.parameters, "layers": rung.size.layers, "width": rung.size.width,
                "batch_tokens": rung.batch_tokens, "tokens": rung.tokens, "runs": sum(w.runs for w in own),
                "all_tokens": all_tokens, "flops": all_tokens * flops_per_token(model), "memory": fit.memory,
                "fits": fit.sequences > 0, "micro_batch_tokens": fit.sequences * model.sequence_length, "hours": hours,
                "hungriest": hungry,
            }
        )  # fmt: skip
    hours = sum(row["hours"] for row in rows)
    total = {key: sum(row[key] for row in rows) for key in ("runs", "all_tokens", "flops")}
    price = None if machine.price is None else hours * machine.price
    return {"machine": machine.name, "room": machine.memory, "rows": rows, "total": total | {"hours": hours, "cost": price}}


def text(found: dict[str, Any], how: str) -> str:
    """The plan for people. how: where the seconds are from."""
    rows = [
        (
            r["size"], size_words(r["parameters"]), f"{r['layers']} x {r['width']}", f"{r['batch_tokens']:,}",
            size_words(r["tokens"]), f"{r['runs']:,}", size_words(r["all_tokens"]), f"{r['flops']:.2g}",
            f"{r['memory'] / 1e9:.2f} GB", f"{r['micro_batch_tokens']:,}" if r["fits"] else "does not fit", f"{r['hours']:.2f}",
        )
        for r in found["rows"]
    ]  # fmt: skip
    head = (
        "size", "non-embedding", "layers x width", "batch", "tokens at budget 1", "runs", "tokens of all", "FLOPs",
        "memory a rank", "micro-batch", "hours",
    )  # fmt: skip
    total = found["total"]
    price = "" if total["cost"] is None else f", {total['cost']:,.0f} $"
    return "\n".join(
        [
            table(head, rows),
            "",
            f"{total['runs']:,} runs, {size_words(total['all_tokens'])} tokens, {total['flops']:.2g} FLOPs, "
            f"{total['hours']:.1f} hours{price} on {found['machine']} ({how}; starting processes is not counted).",
            f"Memory: of `{found['rows'][0]['hungriest']}`, the arm that takes most; there are {found['room'] / 1e9:.0f} GB, "
            f"of which {cost.HEADROOM:.0%} are planned for.",
        ]
    )


def check_memory(found: dict[str, Any]) -> None:
    """
    Raises:
        UsageError: a size does not fit, even with micro-batches of one sequence.
    """
    for row in found["rows"]:
        if not row["fits"]:
            raise UsageError(
                f"{row['size']} takes {row['memory'] / 1e9:.1f} GB a rank with micro-batches of one sequence, "
                f"{found['machine']} has {found['room'] / 1e9:.1f}: add -- --checkpoint-activations, or leave that size out"
            )
