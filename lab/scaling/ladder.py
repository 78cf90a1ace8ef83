"""Ladders of model sizes: shapes, tokens, batch and learning rate at each size, as trainer flags.

One dial sets a size: d layers of d heads, each head as wide at every size, so that parameters go with d^3. GPT-2's published
sizes keep their own shapes. The rest follows from the number of non-embedding parameters N:

- tokens D = ratio x N, the same for every arm; `budgets` multiply D.
- batch = the track's batch x (D / the tokens that the track was tuned at)^0.383, rounded to a power of two, the same for all
  budgets of a size (nanochat's exponent).
- learning rate of the hidden matrices x (width / the track's width)^exponent; see `transfer_exponent`.
- a warm-up or cool-down that the recipe states in steps becomes that fraction of a run of the track's length.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

import optimizers
import tricks
from config import resolve
from engine.spec import UsageError, nearest, split
from lab.trials import Arm, Trial
from layers.shape import PRESETS
from model import GPT, parameter_counts

BATCH_EXPONENT = 0.383
LAST_ONLY = ("--val-every", "1000000000")  # only the loss at the end of a run counts
RETUNE_SEED, TIME_SEED = 1000, 2000  # first seeds of the re-tune and of the timing: none is used twice
TIME_PAIRS = 3  # short runs of each arm at each size, interleaved, for the seconds of a token
POINTS = 20  # of the training loss that are kept of each of the hundreds of runs
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def size_of(word: str) -> float:
    """Parameters that a word such as 130m, 1.2B or 98k stands for. Raises UsageError: it is no size."""
    unit = UNITS.get(word[-1:].lower())
    try:
        value = float(word[:-1]) * unit if unit else float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{word!r} is no size: write it as 0.3M, 124M or 1.5B")
    return value


def size_words(parameters: float) -> str:
    """1.5B, 124M, 98k: at most three digits."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= 0.9995 * unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:.3g}"


@dataclass(frozen=True)
class Size:
    """A shape of the model."""

    name: str
    layers: int
    heads: int
    width: int

    @property
    def flags(self) -> tuple[str, ...]:
        return "--layers", str(self.layers), "--heads", str(self.heads), "--width", str(self.width)


@dataclass(frozen=True)
class Ladder:
    """A track at several sizes."""

    track: str
    head_width: int
    sizes: tuple[Size, ...]
    tokens_per_parameter: float
    tuned_tokens: float  # that the track's own batch and schedule were tuned at


def dial(d: int, head_width: int) -> Size:
    """d layers of d heads."""
    return Size(size_words(12 * d * (d * head_width) ** 2), d, d, d * head_width)


LADDERS = {
    # the corpus has 10.9M tokens; the longest run takes 2 x 1.25 x 4.2M of them, so that none is seen twice
    "cpu": Ladder("cpu", 32, tuple(dial(d, 32) for d in (2, 3, 4, 5, 7)), 1.25, 2400 * 4096),
    # Chinchilla's 20 (Hoffmann et al. 2022)
    "gpt2": Ladder("gpt2-small", 64, tuple(Size(name, **shape) for name, shape in PRESETS.items()), 20, 19560 * 524288),
}


def own_sizes(words: Sequence[str], of: Ladder) -> tuple[Size, ...]:
    """By a ladder's names, or the nearest on its dial. Raises UsageError: no size, only one, or they do not grow."""
    sizes, known = [], {size.name: size for size in of.sizes}
    for word in words:
        heads = 0 if word in known else round((size_of(word) / (12 * of.head_width**2)) ** (1 / 3))
        sizes.append(known.get(word) or dial(max(1, heads), of.head_width))
    if len(sizes) < 2:
        raise UsageError("one size is no ladder: name at least two, better five")
    for a, b in pairwise(sizes):
        if a.layers * a.width**2 >= b.layers * b.width**2:
            shapes = f"{a.name} ({a.layers} x {a.width}) and {b.name} ({b.layers} x {b.width})"
            raise UsageError(f"sizes must grow, the smallest first: {shapes} do not")
    return tuple(sizes)


def trick_flags(base: str, word: str) -> tuple[str, ...]:
    """Trainer flags of the base with a trick, or with another optimizer SPEC. Raises UsageError: it is neither."""
    name, _ = split(word)
    if word in tricks.TRICKS:
        return "--tricks", f"{base},{word}"
    if name not in optimizers.OPTIMIZERS and ":" not in word and "." not in word:
        raise UsageError(f"unknown trick or optimizer {word!r}: {nearest(word, [*tricks.TRICKS, *optimizers.OPTIMIZERS])}")
    constant = ("--schedule", "constant") if optimizers.find(word).own_schedule else ()
    return "--tricks", base, "--optimizer", word, *constant


def transfer_exponent(rule: str, spec: str) -> float:
    """The power of the width that an optimizer's `lr` goes with, by `--lr-transfer`. With mup an update's largest singular
    value stays what it is (`transfer`; arXiv 2203.03466, 2310.17813). One `lr` serves all roles of element-wise methods; the
    matrix methods' `adamw_lr`, `embedding_lr` and `head_lr` stay, as muP leaves embeddings. Raises UsageError: no such rule."""
    if rule == "mup":
        return optimizers.find(spec).transfer
    try:
        exponent = 0.0 if rule == "none" else float(rule.removeprefix("power:"))
    except ValueError:
        exponent = math.nan
    if math.isfinite(exponent) and rule.startswith(("power:", "none")):
        return exponent
    raise UsageError(f"--lr-transfer takes mup, power:EXPONENT (such as power:-0.5) or none; not {rule!r}")


def with_lr_factor(spec: str, factor: float) -> str:
    """The same optimizer with its `lr`, of the hidden matrices, times `factor`. Raises UsageError: it has no such key."""
    if factor == 1:
        return spec
    rate = optimizers.find(spec).setting("lr")
    if not isinstance(rate, (int, float)):
        raise UsageError(f"optimizer {spec!r} has no 'lr' to transfer: use --lr-transfer none and --retune 1")
    return tricks.merge_optimizer(spec, f"{split(spec)[0]}:lr={rate * factor:.4g}")


def retune_factors(count: int) -> list[float]:
    """`count` factors round 1, outwards: 1, 1/2, 2, 1/4, ..."""
    return [2 ** (((i + 1) // 2) * (-1) ** i) for i in range(count)]


@dataclass(frozen=True)
class Rung:
    """A size and what follows from it."""

    size: Size
    parameters: int  # non-embedding
    tokens: float  # at budget 1
    batch_tokens: int

    def steps(self, budget: float) -> int:
        return max(1, round(budget * self.tokens / self.batch_tokens))

    def described(self) -> dict[str, float | str]:
        shape = {"size": self.size.name, "parameters": self.parameters, "layers": self.size.layers, "width": self.size.width}
        return shape | {"tokens": self.tokens, "batch_tokens": self.batch_tokens}


@functools.cache
def resolved(flags: tuple[str, ...]) -> tuple[Any, ...]:
    """`resolve`, once for all factors of an arm at a size."""
    return resolve(list(flags))


@functools.cache
def rung(size: Size, of: Ladder, tokens_per_parameter: float, flags: tuple[str, ...]) -> Rung:
    """What `size` is given, under the base's `flags`."""
    config, model, _ = resolved(("--track", of.track, *flags, *size.flags))
    with torch.device("meta"):
        parameters = parameter_counts(GPT(model))["non_embedding"]
    tokens = tokens_per_parameter * parameters
    batch = config.batch_tokens * (tokens / of.tuned_tokens) ** BATCH_EXPONENT
    return Rung(size, parameters, tokens, max(model.sequence_length, 2 ** round(math.log2(batch))))


def fractional(spec: str, steps: int) -> str:
    """A schedule SPEC whose lengths in steps are fractions of a run of `steps` instead."""
    name, keys = split(spec)
    lengths = {key: float(keys[key]) for key in ("warmup", "cooldown") if key in keys}
    keys |= {key: f"{length / steps:.4g}" for key, length in lengths.items() if length >= 1}
    return name + ":" * bool(keys) + ",".join(f"{key}={value}" for key, value in keys.items())


def at_size(name: str, flags: Sequence[str], rung: Rung, transfer: str, factor: float = 1.0) -> Arm:
    """The arm `flags` at a size: its learning rate transferred, times `factor`. Raises UsageError: what the trainer refuses."""
    sized = (*flags, *rung.size.flags, "--batch-tokens", str(rung.batch_tokens))
    config, model, _ = resolved(sized)
    track = tricks.track(config.track).settings
    factor_at_width = (model.width / track["width"]) ** transfer_exponent(transfer, config.optimizer)
    restated = {"optimizer": with_lr_factor(config.optimizer, factor * factor_at_width)}
    restated |= {key: fractional(getattr(config, key), track["steps"]) for key in ("schedule", "momentum_schedule")}
    for key, spec in restated.items():
        sized += (f"--{key.replace('_', '-')}", spec) if spec != getattr(config, key) else ()
    return Arm(f"{name} at {rung.size.name}" + (f", lr x {factor:.3g}" if factor != 1 else ""), sized)


@dataclass(frozen=True)
class Cell:
    """One arm at one size and length of run, whatever the seed."""

    phase: str  # retune, curve or time
    name: str  # of the arm: the base or a trick
    rung: Rung
    budget: float
    factor: float  # on the learning rate
    steps: int
    arm: Arm

    def trial(self, seed: int) -> Trial:
        return Trial(self.arm, self.steps, seed)

    def described(self) -> dict[str, float | str]:
        same = {"phase": self.phase, "arm": self.name, "budget": self.budget, "factor": self.factor, "steps": self.steps}
        return same | {"size": self.rung.size.name, "batch_tokens": self.rung.batch_tokens, "trial": self.arm.name}
