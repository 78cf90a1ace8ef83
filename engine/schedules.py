"""Schedules of learning rate and momentum, chosen by SPEC, and the course of a run: all that depends on step or time.

    python -m engine.schedules wsd cosine:warmup=0.1 --out schedules.png       draw them (needs matplotlib)
    build("wsd:cooldown=0.4,warmup=100", steps=1000)(step) -> multiplier of the peak learning rate
    Course(config).at(step) -> Moment(lr, momentum, batch, windows, length, future, tied)

Every schedule has `warmup` (linear from 0), most `final`, the multiplier that is approached at the end: with t = step - W, T =
steps - W, the last step has p = t / T < 1. Lengths are in steps when >= 1 and a fraction of the run when < 1. Sources: warm-up
and cosine as in GPT-3 (arXiv 2005.14165), WSD and its 1-sqrt cool-down (arXiv 2405.18392), linear to zero (arXiv 2502.15938),
inverse sqrt (arXiv 1706.03762), restarts (arXiv 1608.03983).
"""

import bisect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from engine.command import Parser, command
from engine.spec import UsageError, make, optional, setting


def length(value: float, steps: int) -> float:
    """Steps when value >= 1, a fraction of the run when below."""
    return value if value >= 1 else value * steps


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then `shape`: 1, unless a subclass gives another. Subclasses are dataclasses like this one."""

    warmup: float = 0.0  # steps (>= 1) or fraction of the run (< 1)

    def __init_subclass__(cls):
        dataclass(frozen=True)(cls)

    def value(self, step: float, steps: int) -> float:
        """Learning rate at `step` (0-based) of a run of `steps`, as a multiple of its peak."""
        warmup = length(self.warmup, steps)
        if step < warmup:
            return min(1.0, (step + 1) / warmup)  # a warm-up need not be whole: 0.05 of 50 steps is 2.5
        return self.shape(step - warmup, max(steps - warmup, 1))

    def shape(self, t: float, total: float) -> float:
        return 1.0


class Constant(Schedule):
    """1."""


class Decaying(Schedule):
    final: float = 0.0  # multiplier at the end of the run


class Linear(Decaying):
    """1 -> final in a straight line."""

    def shape(self, t, total):
        return 1 + (self.final - 1) * t / total


class Cosine(Decaying):
    """final + (1 - final) (1 + cos(pi p)) / 2."""

    def shape(self, t, total):
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * t / total)) / 2


class Exponential(Decaying):
    """final^p: the same factor every step."""

    final: float = setting(0.1, "multiplier at the end of the run", least=1e-9, most=1)

    def shape(self, t, total):
        return self.final ** (t / total)


class Power(Decaying):
    """final + (1 - final) (1 - p^inner)^outer (modded-nanogpt's optimizer track: pull request #345 has inner = 0.4)."""

    inner: float = setting(1.0, "power of p", least=1e-3)
    outer: float = setting(1.0, "power of what it leaves of 1", least=1e-3)

    def shape(self, t, total):
        return self.final + (1 - self.final) * (1 - (t / total) ** self.inner) ** self.outer


class FastSlow(Decaying):
    """1 for `hold`; then fast, 1 - (1 - level) q^power, down to `level` at `knee`; then in a straight line to final
    (modded-nanogpt's optimizer track, pull request #351: 200 and 1,750 of 3,125 steps)."""

    hold: float = setting(0.064, "steps or fraction of the run", least=0)
    knee: float = setting(0.56, "steps or fraction of the run", least=0)
    level: float = setting(0.2, "multiplier at the knee", most=1)
    power: float = setting(0.6, "of the fast part", least=1e-3)

    def value(self, step, steps):
        hold, knee = length(self.hold, steps), length(self.knee, steps)
        if step < knee:
            down = 1 - (1 - self.level) * (max(0.0, step - hold) / max(knee - hold, 1e-9)) ** self.power
        else:
            down = self.level + (self.final - self.level) * (step - knee) / max(steps - knee, 1e-9)
        return min(down, super().value(step, steps))


FORMS = {"linear": lambda q: 1 - q, "sqrt": lambda q: 1 - math.sqrt(q), "exponential": lambda q: (0.01**q - 0.01) / 0.99}


class WSD(Decaying):
    """Warm-up, stable at 1, decay over the last `cooldown` of the run in one of three forms:
    linear 1 - q, sqrt 1 - sqrt(q), exponential 0.01^q scaled to end at `final` (q = progress within the cool-down), raised to
    `power` (modded-nanogpt's optimizer track #46: linear, 1.2)."""

    cooldown: float = setting(0.4, "steps or fraction of the whole run", least=1e-6)
    form: str = setting("linear", "of the cool-down", choices=tuple(FORMS))
    power: float = setting(1.0, "of the form", least=1e-3)

    def value(self, step, steps):
        decay = length(self.cooldown, steps) if self.cooldown != 1 else steps
        q = max(0.0, (step - (steps - decay)) / decay)
        down = self.final + (1 - self.final) * max(0.0, FORMS[self.form](q)) ** self.power
        return min(down, super().value(step, steps))


class Cyclic(Decaying):
    """Cosine with warm restarts: `cycles` equal cosines, each peak `decay` times the one before."""

    cycles: int = setting(4, "how many", least=1)
    decay: float = 1.0

    def shape(self, t, total):
        cycle, within = divmod(t * self.cycles / total, 1)
        return self.decay**cycle * (self.final + (1 - self.final) * (1 + math.cos(math.pi * within)) / 2)


class InverseSqrt(Schedule):
    """sqrt(W / step) after a warm-up of W steps."""

    warmup: float = 0.05

    def value(self, step, steps):
        warmup = max(length(self.warmup, steps), 1.0)
        return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


@dataclass(frozen=True)
class Keep:
    """Momentum stays as the optimizer has it."""

    def value(self, step, steps):
        return None


@dataclass(frozen=True)
class Ramp:
    """Momentum start -> peak over `warmup`, stays, peak -> end over the last `cooldown`
    (speedrun record 9: 0.85 -> 0.95 over 300 steps; record 39 adds the way down)."""

    start: float = setting(0.85, "momentum of the first step", below=1)
    peak: float = setting(0.95, "momentum after the warm-up", below=1)
    end: float = setting(0.85, "momentum of the last step", below=1)
    warmup: float = 300.0  # steps or fraction of the run
    cooldown: float = 0.0  # steps or fraction of the run; 0: none

    def value(self, step: float, steps: int) -> float | None:
        warmup, cooldown = length(self.warmup, steps), length(self.cooldown, steps)
        up = min(1.0, step / warmup) if warmup else 1.0
        down = max(0.0, (step - (steps - cooldown)) / cooldown) if cooldown else 0.0
        return self.start + (self.peak - self.start) * up + (self.end - self.peak) * down


SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "linear": Linear, "cosine": Cosine, "wsd": WSD}
SCHEDULES |= {"power": Power, "fast_slow": FastSlow, "exponential": Exponential, "cyclic": Cyclic, "inverse_sqrt": InverseSqrt}
MOMENTUM_SCHEDULES: dict[str, type] = {"keep": Keep, "ramp": Ramp}
# For whom rates do not matter: these settings of a run may name a stranger's code.
NO_RATES = {"schedule": "constant", "decay_schedule": "constant", "momentum_schedule": "keep"}


def build(spec: str, steps: int, registry: dict[str, type] = SCHEDULES, what: str = "schedule") -> Callable[[float], Any]:
    """The schedule of that SPEC: step (0-based) -> multiplier of the peak learning rate; of MOMENTUM_SCHEDULES momentum, None
    for the optimizer's own. Raises UsageError: unknown schedule or key, or a value out of range."""
    schedule = make(spec, registry, what, "value")
    return lambda step: schedule.value(step, steps)


@dataclass(frozen=True)
class Moment:
    """Everything in one step of a run that depends on the step."""

    lr: float  # multiplier of the peak learning rates
    decay: float  # multiplier of the weight decay
    momentum: float | None  # None: the optimizer's own
    batch: int  # in units of --batch-tokens
    windows: tuple[float, ...]  # parts of the long attention window, in all stages so far; the last holds now
    length: float  # of the sequences, as a part of --sequence-length
    future: tuple[float, ...]  # weights of the losses on the tokens after the next
    tied: bool  # does the head still share the embedding's weight?


class Course:
    """What a run does in each of its steps: `Course(config).at(position)`, a pure function of the position and the run's
    length. The position is the step; under --minutes it is the share of the time that has passed, times `steps`.

    Stages of batches, windows and sequence lengths divide the run into equal parts (speedrun records 46; 13, 29; 72). config:
    the trainer's. steps: of the run; None: the config's. Raises UsageError: an unknown schedule or key, or odd stages.
    """

    def __init__(self, config: Any, steps: int | None = None):
        self.steps = config.steps if steps is None else steps
        self.rate, self.decay = build(config.schedule, self.steps), build(config.decay_schedule, self.steps)
        self.momentum = build(config.momentum_schedule, self.steps, MOMENTUM_SCHEDULES, "momentum schedule")
        self.batches, self.batch_rates = config.batch_stages, config.batch_rates
        self.windows, self.lengths = config.window_stages, config.length_stages
        self.future_tokens, self.tied_until = config.future_tokens, config.tied_until
        self.seconds = 60 * config.minutes  # of training; 0: the run ends by steps
        if (sizes := len(self.batches)) != (rates := len(self.batch_rates)):
            raise UsageError(f"--batch-stages has {sizes} sizes, --batch-rates {rates} rates: one a stage")
        if not all(size >= 1 and size == int(size) for size in self.batches):
            raise UsageError("--batch-stages takes whole multiples of --batch-tokens, such as 1/2/3")
        for flag, parts in (("--window-stages", self.windows), ("--length-stages", self.lengths)):
            if parts[-1] != 1 or not all(0 < part <= 1 for part in parts):
                raise UsageError(f"{flag} takes parts above 0 of what the model has, and ends with all of it: such as 0.5/1")

    def position(self, step: int, seconds: float) -> float:
        """Of a run that has taken `step` steps and trained for `seconds`; at `self.steps` it ends."""
        return seconds * self.steps / self.seconds if self.seconds else step

    def at(self, step: float) -> Moment:
        """Of a position, which counts from 0; after the end the last stages hold."""
        batch, window, length = (stage(parts, step, self.steps) for parts in (self.batches, self.windows, self.lengths))
        return Moment(
            lr=self.rate(step) * self.batch_rates[batch],
            decay=self.decay(step),
            momentum=self.momentum(step),
            batch=int(self.batches[batch]),
            windows=self.windows[: window + 1],
            length=self.lengths[length],
            future=future_weights(self.future_tokens, step, self.steps),
            tied=step < self.tied_until * self.steps,
        )

    def units_before(self, step: int) -> int:
        """Batch units in all steps before `step`."""
        spans = zip(self.batches, pairwise([*stage_starts(self.batches, self.steps), math.inf]), strict=True)
        return sum(int(size) * max(0, min(step, end) - start) for size, (start, end) in spans)

    def stage_starts(self) -> list[int]:
        """First steps of all stages."""
        return sorted({*self.new_shapes(), *(start for start in stage_starts(self.batches, self.steps) if start < self.steps)})

    def new_shapes(self) -> list[int]:
        """First steps of the stages with other windows or lengths than before: torch.compile makes a graph for each."""
        starts = {*stage_starts(self.windows, self.steps), *stage_starts(self.lengths, self.steps)}
        return sorted(start for start in starts if start < self.steps)


def stage_starts(stages: tuple[float, ...], steps: int) -> list[int]:
    """First step of each of the stages, which divide the run into equal parts."""
    return [math.ceil(i * steps / len(stages)) for i in range(len(stages))]


def stage(stages: tuple[float, ...], step: float, steps: int) -> int:
    """Index of the stage that holds in `step`. A run of fewer steps than stages skips some."""
    return bisect.bisect_right(stage_starts(stages, steps), step) - 1


def future_weights(tokens: int, step: float, steps: int) -> tuple[float, ...]:
    """Weights of the losses on the tokens after the next (`model.future_loss`): the k-th starts at 2^-k; the furthest first,
    each fades in a line over 1 / (tokens + 1) of the run. Speedrun record 53: [1, 0.5, 0.25 -> 0], [1, 0.5 -> 0], [1]."""
    done = (tokens + 1) * step / steps
    return tuple(0.5**k * min(1.0, max(0.0, tokens - k + 1 - done)) for k in range(1, tokens + 1))


def draw() -> str:
    parser = Parser(prog="./run.sh schedules", description="Draw learning-rate schedules.")
    parser.add_argument("specs", nargs="*", default=list(SCHEDULES), help="schedule SPECs (default: all)")
    parser.add_argument("--steps", type=int, default=1000, help="length of the run, steps")
    parser.add_argument("--out", default="schedules.png", help="picture to write (.png or .svg)")
    options = parser.parse_args()
    built = [(spec, build(spec, options.steps)) for spec in options.specs]
    plt = optional("matplotlib.pyplot", "drawing needs matplotlib: pip install matplotlib")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for spec, schedule in built:
        axes.plot([schedule(step) for step in range(options.steps)], label=spec)
    axes.set(xlabel="step", ylabel="multiple of the peak learning rate", ylim=(-0.02, 1.05))
    axes.legend()
    figure.savefig(options.out, dpi=150)
    return f"wrote {options.out}"


if __name__ == "__main__":
    sys.exit(command("schedules", draw, sys.argv[1:]))
