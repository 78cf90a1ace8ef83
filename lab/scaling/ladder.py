"""Ladders of model sizes: shapes, tokens, batch and learning rate at each size, as trainer flags.

One dial sets a size: d layers of d heads, each head as wide at every size, so that width / layers stays what it is and
parameters go with d^3. GPT-2's published sizes keep their own shapes. What else a size is given follows from its number of
non-embedding parameters N by rules stated here:

- tokens D = ratio x N, the same for every arm; `budgets` multiply D.
- batch = the track's batch x (D / the tokens that the track was tuned at)^0.383, rounded to a power of two, the same for all
  budgets of a size (nanochat's exponent).
- learning rate of the hidden matrices x (width / the track's width)^exponent; see TRANSFER.
- a warm-up or cool-down that the recipe states in steps becomes that fraction of a run of the track's length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

import optimizers
import train_gpt
import tricks
from engine.spec import UsageError, nearest, parse, split
from lab.trials import Arm
from layers.shape import PRESETS, ModelConfig
from model import GPT, parameter_counts

BATCH_EXPONENT = 0.383  # nanochat: batch = 2^19 (D / D_ref)^0.383


def size_of(word: str) -> float:
    """Parameters that a word such as 130m, 1.2B or 98k stands for.

    Raises:
        UsageError: it is no size.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    number, unit = (word[:-1], units[word[-1].lower()]) if word and word[-1].lower() in units else (word, 1.0)
    try:
        value = float(number) * unit
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
    # the corpus has 10.9M tokens: 2 x 1.25 x 4.2M of them are the longest run, and none is seen twice
    "cpu": Ladder("cpu", 32, tuple(dial(d, 32) for d in (2, 3, 4, 5, 7)), 1.25, 2400 * 4096),
    # Chinchilla's 20 (Hoffmann et al. 2022)
    "gpt2": Ladder("gpt2-small", 64, tuple(Size(name, **shape) for name, shape in PRESETS.items()), 20, 19560 * 524288),
}


def ladder(name: str) -> Ladder:
    """
    Raises:
        UsageError: there is none of that name.
    """
    if name not in LADDERS:
        raise UsageError(f"--ladder {name}: {nearest(name, LADDERS)}")
    return LADDERS[name]


def own_sizes(words: Sequence[str], of: Ladder) -> tuple[Size, ...]:
    """Sizes by numbers of non-embedding parameters (each the nearest on the dial), by names of the ladder's own, or those in
    a file: a line each of `name layers heads width`.

    Raises:
        UsageError: a word that is no size, a file that cannot be read, one size twice, sizes out of order, or only one.
    """
    known = {size.name: size for size in of.sizes}
    if len(words) == 1 and (path := Path(words[0])).is_file():
        sizes = tuple(read_sizes(path))
    elif len(words) == 1 and len(path.parts) > 1:
        raise UsageError(f"--sizes {path}: there is no such file")
    else:
        nearest_dial = lambda word: max(1, round((size_of(word) / (12 * of.head_width**2)) ** (1 / 3)))  # noqa: E731
        sizes = tuple(known.get(word) or dial(nearest_dial(word), of.head_width) for word in words)
    check_order(sizes)
    return sizes


def read_sizes(path: Path) -> list[Size]:
    """
    Raises:
        UsageError: a line that is no size.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, *shape = line.split() or [""]
        if not name or name.startswith("#"):
            continue
        if len(shape) != 3 or not all(word.isdigit() for word in shape):
            raise UsageError(f"{path} line {number}: a size is `name layers heads width`, such as `small 4 4 128`")
        found.append(Size(name, *map(int, shape)))
    return found


def check_order(sizes: Sequence[Size]) -> None:
    """
    Raises:
        UsageError: see own_sizes.
    """
    if len(sizes) < 2:
        raise UsageError("one size is no ladder: name at least two, better five")
    for smaller, larger in pairwise(sizes):
        counts = [12 * size.layers * size.width**2 for size in (smaller, larger)]
        shapes = f"{smaller.name} ({smaller.layers} x {smaller.width}) and {larger.name} ({larger.layers} x {larger.width})"
        if counts[0] == counts[1]:
            raise UsageError(f"{shapes} are the same size: sizes must differ")
        if counts[0] > counts[1]:
            raise UsageError(f"sizes out of order: {shapes}; name the smallest first")
    if len({size.name for size in sizes}) < len(sizes):
        raise UsageError("two sizes have the same name")


# ---------------------------------------------------------------- learning rate


# Optimizer -> power of the width that the learning rate of hidden matrices goes with, by the rule of muP (arXiv 2203.03466,
# arXiv 2310.17813): an update's largest singular value should stay what it is. Element-wise and Shampoo-like updates have
# entries of one size, so it grows with the width: -1. Plain gradients shrink by themselves; methods that find their own
# rate have none to transfer. Muon is below. One `lr` serves all roles of the element-wise methods, so theirs is scaled for
# all; the matrix methods' `adamw_lr`, `embedding_lr` and `head_lr` are left alone, as muP leaves embeddings.
TRANSFER = {"sgd": 0.0, "prodigy": 0.0, "schedule_free_prodigy": 0.0, "schedule_free_sgd": 0.0, "amos": -0.5}
# Muon's updates have singular values of 1 times a factor by shape, which fixed shapes leave alone but for Moonlight's
# 0.2 sqrt(longer side). Tuned rates fall all the same: 0.016 to 0.004 from 130M to 1.2B (arXiv 2509.02046).
MUON_TRANSFER = {"keller": 0.0, "moonlight": -0.5}
KEY = "lr"  # of the hidden matrices, in every registered optimizer


def mup_exponent(spec: str) -> float:
    """Power of the width that the optimizer's `lr` goes with under muP."""
    name, keys = split(spec)
    if name == "muon":
        return MUON_TRANSFER.get(keys.get("scale", "keller"), 0.0)
    return TRANSFER.get(name, -1.0)


def transfer_exponent(rule: str, spec: str) -> float:
    """Power of the width under `--lr-transfer`: mup, power:EXPONENT or none.

    Raises:
        UsageError: it is neither.
    """
    word, colon, number = rule.partition(":")
    if (word, colon) == ("mup", ""):
        return mup_exponent(spec)
    if (word, colon) == ("none", ""):
        return 0.0
    try:
        if word == "power" and math.isfinite(exponent := float(number)):
            return exponent
    except ValueError:
        pass
    raise UsageError(f"--lr-transfer takes mup, power:EXPONENT (such as power:-0.5) or none; not {rule!r}")


def with_lr_factor(spec: str, factor: float) -> str:
    """The same optimizer with its `lr` times `factor`.

    Raises:
        UsageError: it has no such key.
    """
    if factor == 1:
        return spec
    cls, settings = parse(optimizers.of_collection(spec), optimizers.OPTIMIZERS, "optimizer")
    rate = settings.get(KEY, optimizers.default_of(cls, KEY, None))
    if not isinstance(rate, (int, float)):
        raise UsageError(f"optimizer {spec!r} has no {KEY!r} to transfer: use --lr-transfer none and --retune 1")
    name, keys = split(spec)
    return name + ":" + ",".join(f"{k}={v}" for k, v in (keys | {KEY: f"{rate * factor:.4g}"}).items())


def retune_factors(count: int, step: float) -> list[float]:
    """`count` factors round 1 on a log grid; 1 first, then outwards: 1, 1/step, step, 1/step^2, ..."""
    return [step ** (((i + 1) // 2) * (-1) ** i) for i in range(count)]


# ---------------------------------------------------------------- what a size is given


def fractional(spec: str, steps: int) -> str:
    """A schedule SPEC whose lengths in steps are fractions of a run of `steps` instead."""
    name, keys = split(spec)
    for key in ("warmup", "cooldown"):
        if key in keys and float(keys[key]) >= 1:
            keys[key] = f"{float(keys[key]) / steps:.4g}"
    return name + ":" * bool(keys) + ",".join(f"{k}={v}" for k, v in keys.items())


@dataclass(frozen=True)
class Rung:
    """A size and what follows from it."""

    size: Size
    parameters: int  # non-embedding
    tokens: float  # at budget 1
    batch_tokens: int

    def steps(self, budget: float) -> int:
        return max(1, round(budget * self.tokens / self.batch_tokens))


def abstract_model(config: ModelConfig) -> GPT:
    """The model without memory for its weights: for counting."""
    with torch.device("meta"):
        return GPT(config)


def rung(size: Size, of: Ladder, tokens_per_parameter: float, flags: Sequence[str]) -> Rung:
    """What `size` is given, under the base's `flags`."""
    config, model, _ = train_gpt.resolve(["--track", of.track, *flags, *size.flags])
    parameters = parameter_counts(abstract_model(model))["non_embedding"]
    tokens = tokens_per_parameter * parameters
    batch = config.batch_tokens * (tokens / of.tuned_tokens) ** BATCH_EXPONENT
    return Rung(size, parameters, tokens, max(model.sequence_length, 2 ** round(math.log2(batch))))


def at_size(name: str, flags: Sequence[str], rung: Rung, of: Ladder, transfer: str, factor: float = 1.0) -> Arm:
    """The arm `flags` at a size: its learning rate transferred, times `factor`.

    Raises:
        UsageError: what the trainer refuses.
    """
    own = [*flags, *rung.size.flags, "--batch-tokens", str(rung.batch_tokens)]
    config, model, _ = train_gpt.resolve(own)
    track = tricks.track(config.track).settings
    width = track["width"]
    spec = with_lr_factor(config.optimizer, factor * (model.width / width) ** transfer_exponent(transfer, config.optimizer))
    for key, flag in (("schedule", "--schedule"), ("momentum_schedule", "--momentum-schedule")):
        if (restated := fractional(getattr(config, key), track["steps"])) != getattr(config, key):
            own += [flag, restated]
    if spec != config.optimizer:
        own += ["--optimizer", spec]
    return Arm(f"{name} at {rung.size.name}" + (f", lr x {factor:.3g}" if factor != 1 else ""), tuple(own))
