"""Schedules of learning rate, momentum, batches, windows and sequence lengths: pure functions of the step, chosen by SPEC.

    python -m engine.schedules wsd cosine:warmup=0.1 --out schedules.png       draw them (needs matplotlib)
    build("wsd:cooldown=0.4,warmup=100", steps=1000)(step) -> multiplier of the peak learning rate

Every schedule has `warmup` (linear from 0) and `final` (the multiplier approached at the end). Lengths are in steps
when >= 1 and a fraction of the run when < 1. With t = step - W, T = steps - W, p = t / T, the last step still moves
(p < 1), so `final` is approached, not reached: the step at p = 1 would be wasted at learning rate 0.
Formulas and the settings others use: warm-up and cosine as in GPT-3 (arXiv 2005.14165), WSD and its 1-sqrt cool-down
(arXiv 2405.18392), linear to zero (arXiv 2502.15938), inverse sqrt (arXiv 1706.03762), restarts (arXiv 1608.03983).
"""

import argparse
import bisect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from engine.spec import UsageError, parse


def length(value: float, steps: int) -> float:
    """Steps when value >= 1, a fraction of the run when below."""
    return value if value >= 1 else value * steps


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then `shape(progress)`; subclasses give the shape."""

    warmup: float = 0.0  # steps (>= 1) or fraction of the run (< 1)

    def __post_init__(self):
        if self.warmup < 0:
            raise UsageError(f"schedule key warmup must not be negative, got {self.warmup}")

    def multiplier(self, step: int, steps: int) -> float:
        """Learning rate at `step` (0-based) of a run of `steps`, as a multiple of its peak."""
        warmup = length(self.warmup, steps)
        if step < warmup:
            return min(1.0, (step + 1) / warmup)  # a warm-up need not be whole: 0.05 of 50 steps is 2.5
        return self.shape(step - warmup, max(steps - warmup, 1))

    def shape(self, t: float, total: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """1."""

    def shape(self, t, total):
        return 1.0


@dataclass(frozen=True)
class Decaying(Schedule):
    """One that ends at `final`."""

    final: float = 0.0  # multiplier at the end of the run


@dataclass(frozen=True)
class Linear(Decaying):
    """1 -> final in a straight line."""

    def shape(self, t, total):
        return 1 + (self.final - 1) * t / total


@dataclass(frozen=True)
class Cosine(Decaying):
    """final + (1 - final) (1 + cos(pi p)) / 2."""

    def shape(self, t, total):
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * t / total)) / 2


@dataclass(frozen=True)
class Exponential(Decaying):
    """final^p: the same factor every step."""

    final: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.final <= 0:
            raise UsageError("schedule exponential needs final > 0: it multiplies by the same factor every step")

    def shape(self, t, total):
        return self.final ** (t / total)


@dataclass(frozen=True)
class WSD(Decaying):
    """Warm-up, stable at 1, decay over the last `cooldown` of the run in one of three forms:
    linear 1 - q, sqrt 1 - sqrt(q), exponential 0.01^q scaled to end at `final` (q = progress within the cool-down).
    """

    cooldown: float = 0.4  # steps or fraction of the whole run
    form: str = "linear"

    FORMS = {
        "linear": lambda q: 1 - q,
        "sqrt": lambda q: 1 - math.sqrt(q),
        "exponential": lambda q: (0.01**q - 0.01) / 0.99,
    }

    def __post_init__(self):
        super().__post_init__()
        if self.form not in self.FORMS:
            raise UsageError(f"schedule wsd has no form {self.form!r}: known: {', '.join(self.FORMS)}")
        if self.cooldown <= 0:
            raise UsageError("schedule wsd needs cooldown > 0: use 'constant' for none")

    def multiplier(self, step, steps):
        decay = length(self.cooldown, steps) if self.cooldown != 1 else steps
        q = max(0.0, (step - (steps - decay)) / decay)
        down = self.final + (1 - self.final) * self.FORMS[self.form](q)
        return min(down, super().multiplier(step, steps))

    def shape(self, t, total):
        return 1.0


@dataclass(frozen=True)
class Cyclic(Decaying):
    """Cosine with warm restarts: `cycles` equal cosines, each peak `decay` times the one before."""

    cycles: int = 4
    decay: float = 1.0

    def shape(self, t, total):
        cycle, within = divmod(t * self.cycles / total, 1)
        return self.decay**cycle * (self.final + (1 - self.final) * (1 + math.cos(math.pi * within)) / 2)


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """sqrt(W / step) after a warm-up of W steps."""

    warmup: float = 0.05

    def multiplier(self, step, steps):
        warmup = max(length(self.warmup, steps), 1.0)
        return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


@dataclass(frozen=True)
class Keep:
    """Momentum stays as the optimizer has it."""

    def value(self, step: int, steps: int) -> float | None:
        return None


@dataclass(frozen=True)
class Ramp:
    """Momentum start -> peak over `warmup`, stays, peak -> end over the last `cooldown`
    (speedrun record 9: 0.85 -> 0.95 over 300 steps; record 39 adds the way down)."""

    start: float = 0.85
    peak: float = 0.95
    end: float = 0.85
    warmup: float = 300.0  # steps or fraction of the run
    cooldown: float = 0.0  # steps or fraction of the run; 0: none

    def value(self, step: int, steps: int) -> float | None:
        warmup, cooldown = length(self.warmup, steps), length(self.cooldown, steps)
        up = min(1.0, step / warmup) if warmup else 1.0
        down = max(0.0, (step - (steps - cooldown)) / cooldown) if cooldown else 0.0
        return self.start + (self.peak - self.start) * up + (self.end - self.peak) * down


@dataclass(frozen=True)
class SameBatch:
    """--batch-tokens in every step."""

    sizes = (1.0,)
    rates = (1.0,)


@dataclass(frozen=True)
class Stages:
    """Stages of equal length: of `sizes` times --batch-tokens, at `rates` times the learning rate (speedrun record 46: 131k,
    262k and 393k tokens; its rates grow about as the root of the batch).
    """

    sizes: tuple[float, ...] = (1, 2, 3)
    rates: tuple[float, ...] = (1.0, 1.52, 1.73)

    def __post_init__(self):
        if len(self.sizes) != len(self.rates):
            raise UsageError(f"batch schedule stages has {len(self.sizes)} sizes and {len(self.rates)} rates: one each a stage")
        if not all(size >= 1 and size == int(size) for size in self.sizes):
            raise UsageError("batch schedule stages takes whole multiples of --batch-tokens as sizes, such as sizes=1/2/3")


@dataclass(frozen=True)
class WholeWindow:
    """The model's own windows in every step."""

    parts = (1.0,)


@dataclass(frozen=True)
class WindowStages:
    """Stages of equal length in which the long window is `parts` of the model's; the last has it whole (speedrun record 13:
    from 64 tokens to 1,792 in the course of the run; record 29: in stages; today's trainer: 384, 896, 1,408, 1,664).
    """

    parts: tuple[float, ...] = (0.25, 0.5, 1.0)

    def __post_init__(self):
        check_parts(self.parts, "window schedule")


@dataclass(frozen=True)
class WholeLength:
    """The model's --sequence-length in every step."""

    parts = (1.0,)


@dataclass(frozen=True)
class LengthStages:
    """Stages of equal length in which sequences are cut into pieces, `parts` of the model's length, at the same tokens a step;
    the last has them whole (speedrun record 72 cuts documents at 896 tokens first and then at 2,048).
    """

    parts: tuple[float, ...] = (0.5, 1.0)

    def __post_init__(self):
        check_parts(self.parts, "length schedule")


def check_parts(parts: tuple[float, ...], what: str) -> None:
    if parts[-1] != 1 or min(parts) <= 0 or max(parts) > 1:
        raise UsageError(f"{what} stages takes parts above 0 of what the model has, and ends with all of it: parts=0.5/1")


def stage_starts(stages: int, steps: int) -> list[int]:
    """First step of each of so many stages of equal length."""
    return [math.ceil(i * steps / stages) for i in range(stages)]


class Parts:
    """A schedule of parts of something that the model has whole, over a run of `steps`."""

    def __init__(self, stages: WholeWindow | WindowStages | WholeLength | LengthStages, steps: int):
        self.parts, self.starts = stages.parts, stage_starts(len(stages.parts), steps)

    def until(self, step: int) -> tuple[float, ...]:
        """The parts of all stages that have begun at `step`; the last holds in it."""
        return self.parts[: bisect.bisect_right(self.starts, step)]


class Batches:
    """A batch-size schedule over a run of `steps`, in units of --batch-tokens. Steps past the end are of the last stage."""

    def __init__(self, stages: SameBatch | Stages, steps: int):
        self.sizes, self.rates = [int(size) for size in stages.sizes], stages.rates
        self.starts = stage_starts(len(self.sizes), steps)

    def stage(self, step: int) -> int:
        return bisect.bisect_right(self.starts, step) - 1

    def size(self, step: int) -> int:
        """Units in the batch of `step`."""
        return self.sizes[self.stage(step)]

    def rate(self, step: int) -> float:
        """Factor on the learning rate at `step`."""
        return self.rates[self.stage(step)]

    def before(self, step: int) -> int:
        """Units in all steps before `step`."""
        ends = [*self.starts[1:], step]
        spans = zip(self.sizes, self.starts, ends, strict=True)
        return sum(size * max(0, min(step, end) - start) for size, start, end in spans)


def future_weights(tokens: int, step: int, steps: int) -> list[float]:
    """Weights of the losses on the tokens after the next (`model.future_loss`): the k-th starts at 2^-k, and they fade one
    after another, the furthest first, each in a straight line over 1 / (tokens + 1) of the run; the last part has none.

    Speedrun record 53, with two tokens: [1, 0.5, 0.25 -> 0], [1, 0.5 -> 0], [1].
    """
    stage = (tokens + 1) * step / steps
    return [0.5**k * min(1.0, max(0.0, tokens - k + 1 - stage)) for k in range(1, tokens + 1)]


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "wsd": WSD,
    "exponential": Exponential,
    "cyclic": Cyclic,
    "inverse_sqrt": InverseSqrt,
}
MOMENTUM_SCHEDULES: dict[str, type] = {"keep": Keep, "ramp": Ramp}
BATCH_SCHEDULES: dict[str, type] = {"constant": SameBatch, "stages": Stages}
WINDOW_SCHEDULES: dict[str, type] = {"constant": WholeWindow, "stages": WindowStages}
LENGTH_SCHEDULES: dict[str, type] = {"constant": WholeLength, "stages": LengthStages}


def build(spec: str, steps: int) -> Callable[[int], float]:
    """Learning-rate schedule: step (0-based) -> multiplier of the peak learning rate.

    Raises:
        UsageError: unknown schedule or key, or a value out of range.
    """
    cls, settings = parse(spec, SCHEDULES, "schedule")
    schedule = cls(**settings)
    return lambda step: schedule.multiplier(step, steps)


def build_momentum(spec: str, steps: int) -> Callable[[int], float | None]:
    """Momentum schedule: step (0-based) -> momentum, or None to leave the optimizer's own."""
    cls, settings = parse(spec, MOMENTUM_SCHEDULES, "momentum schedule")
    schedule = cls(**settings)
    return lambda step: schedule.value(step, steps)


def build_batches(spec: str, steps: int) -> Batches:
    """Batch-size schedule.

    Raises:
        UsageError: unknown schedule or key, or values that make no sense.
    """
    cls, settings = parse(spec, BATCH_SCHEDULES, "batch schedule")
    return Batches(cls(**settings), steps)


def build_windows(spec: str, steps: int) -> Parts:
    """Window schedule: parts of the model's long window.

    Raises:
        UsageError: unknown schedule or key, or parts that are none.
    """
    cls, settings = parse(spec, WINDOW_SCHEDULES, "window schedule")
    return Parts(cls(**settings), steps)


def build_lengths(spec: str, steps: int) -> Parts:
    """Schedule of sequence lengths: parts of the model's.

    Raises:
        UsageError: unknown schedule or key, or parts that are none.
    """
    cls, settings = parse(spec, LENGTH_SCHEDULES, "length schedule")
    return Parts(cls(**settings), steps)


def main() -> None:
    """Draw the named schedules into one picture."""
    parser = argparse.ArgumentParser(description="Draw learning-rate schedules.")
    parser.add_argument("specs", nargs="*", default=list(SCHEDULES), help="schedule SPECs (default: all)")
    parser.add_argument("--steps", type=int, default=1000, help="length of the run, steps")
    parser.add_argument("--out", default="schedules.png", help="picture to write (.png or .svg)")
    options = parser.parse_args()
    built = [(spec, build(spec, options.steps)) for spec in options.specs]
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError("drawing needs matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for spec, schedule in built:
        axes.plot([schedule(step) for step in range(options.steps)], label=spec)
    axes.set(xlabel="step", ylabel="multiple of the peak learning rate", ylim=(-0.02, 1.05))
    axes.legend()
    figure.savefig(options.out, dpi=150)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"schedules.py: {error}", file=sys.stderr)
        sys.exit(2)
