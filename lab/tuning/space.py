"""What a tuning contest compares: submissions (an optimizer with its schedule and average) and the space of their settings.

The ranges are the registry's (`./run.sh optimizers NAME` shows them), plus the warm-up's. They are the same on every workload,
as AlgoPerf requires: a submission brings a method, not a way of tuning it.
"""

import functools
import hashlib
import json
from typing import NamedTuple

from scipy.stats import qmc

import optimizers
from engine.run_folder import own_code
from engine.spec import UsageError, nearest, split
from optimizers.average import AVERAGES

WARMUP = (0.01, 0.2, "log")  # fraction of the run


class Dimension(NamedTuple):
    """One setting to search: `part` of the command it belongs to (`Submission.parts`), its range and scale."""

    part: str
    key: str
    low: float
    high: float
    scale: str  # linear, log, complement (1 - value is searched by its logarithm) or choice (low or high: two booleans)

    @property
    def name(self) -> str:
        return self.key if self.part == "optimizer" else f"{self.part}_{self.key}"

    def at(self, share: float) -> float:
        """The setting at a share (0 to 1) of the way from low to high; to three digits, as on the command line."""
        low, high = (1 - self.high, 1 - self.low) if self.scale == "complement" else (self.low, self.high)
        searched = low * (high / low) ** share if self.scale in ("log", "complement") else low + (high - low) * share
        if self.scale == "choice":
            return float(round(searched))
        return float(f"{1 - searched:.4g}" if self.scale == "complement" else f"{searched:.3g}")


class Submission(NamedTuple):
    """A registered optimizer (or one's own, path.py:Class), perhaps with fixed keys, its schedule, perhaps an average."""

    name: str
    optimizer: str
    schedule: str = "cosine"
    average: str = ""
    outer: str = ""
    decay_schedule: str = ""
    stated: tuple[Dimension, ...] = ()  # the whole space, where it is not the registry's

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The space. Raises UsageError: there is nothing to search."""
        if self.stated:
            return self.stated
        fixed, choice, space = split(self.optimizer)[1], optimizers.find(self.optimizer), []
        for key, (default, search) in choice.hyperparameters.items():
            # a default of None follows another setting: the method has its full strength without
            if search and default is not None and key.partition("/")[0] not in fixed:
                space.append(Dimension("optimizer", key, *search))
        if not choice.own_schedule:
            space.append(Dimension("schedule", "warmup", *WARMUP))
        if not space:
            raise UsageError(f"{self.name}: every setting is fixed, nothing is left to search")
        return tuple(space)

    @property
    def parts(self) -> dict[str, str]:
        """Trainer setting -> SPEC, without what is searched."""
        return {part: getattr(self, part) for part in ("optimizer", "schedule", "average", "outer", "decay_schedule")}

    @property
    def version(self) -> str:
        """A hash of all that a study's trials have in common; trials of another version are of another study."""
        about = {part: spec for part, spec in self.parts.items() if spec or part == "average"} | own_code(self.optimizer)
        text = json.dumps(about | {"space": self.dimensions})
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def flags(self, values: dict[str, float]) -> tuple[str, ...]:
        """Trainer flags for these settings, by the names of the dimensions."""
        parts = self.parts
        given: dict[tuple[str, str], list[str]] = {}  # part and key -> its numbers, of which a tuple has several
        for d in self.dimensions:
            if d.name in values:
                key, _, place = d.key.partition("/")
                whole = map(str, optimizers.find(self.optimizer).setting(key)) if place else [""]
                numbers = given.setdefault((d.part, key), list(whole))
                numbers[int(place or 1) - 1] = str(round(values[d.name])) if key == "every" else f"{values[d.name]:g}"
        for (part, key), numbers in given.items():
            parts[part] += f"{',' if '=' in parts[part] else ':'}{key}={'/'.join(numbers)}"
        return tuple(word for part, spec in parts.items() if spec for word in (f"--{part.replace('_', '-')}", spec))

    def defaults(self) -> dict[str, float]:
        """The optimizer's own settings for every dimension."""
        known, settings = optimizers.find(self.optimizer).hyperparameters, {}
        for d in self.dimensions:
            of_average = getattr(AVERAGES.get(self.average), d.key, 0.05)  # 0.05: the warm-up
            settings[d.name] = float(known[d.key][0]) if d.part == "optimizer" else of_average
        return settings


DECAY, EVERY = Dimension("average", "decay", 0.9, 0.999, "complement"), Dimension("average", "every", 1, 20, "log")
OF_NADAMW = Submission("nadamw", "nadamw").dimensions
EXTRAS = {
    # the classic two that AlgoPerf's targets are set by, beside AdamW and NAdamW; `sgd` is Nesterov's form
    "heavy_ball": Submission("heavy_ball", "sgd:nesterov=false"),
    # entries of AlgoPerf's first round: a schedule or an average on its baseline, NAdamW
    "cyclic": Submission("cyclic", "nadamw", "cyclic:cycles=2"),
    "lawa_ema": Submission("lawa_ema", "nadamw", average="lawa_ema", stated=(*OF_NADAMW, DECAY)),
    "lawa_queue": Submission("lawa_queue", "nadamw", average="lawa_queue", stated=(*OF_NADAMW, EVERY)),
}


def submission(word: str) -> Submission:
    """One of EXTRAS, a registered optimizer, or a SPEC whose keys stay fixed. Raises UsageError: there is none."""
    if word in EXTRAS:
        return EXTRAS[word]
    name, _ = split(word)
    try:
        choice = optimizers.find(word)
    except UsageError:
        if ":" in word or "." in word:
            raise
        raise UsageError(f"unknown submission {word!r}: {nearest(name, [*optimizers.OPTIMIZERS, *EXTRAS])}") from None
    return Submission(word, word, "constant" if choice.own_schedule else "cosine")


def points(space: tuple[Dimension, ...], count: int, study: int) -> list[dict[str, float]]:
    """`count` quasi-random points of the space, as settings by dimension name: scrambled Halton, as AlgoPerf's external tuning
    has it; other ones per study, and the same for every submission with as many dimensions."""
    return some_points(space, 1 << (count - 1).bit_length(), study)[:count]


@functools.cache
def some_points(space: tuple[Dimension, ...], count: int, study: int) -> list[dict[str, float]]:
    shares = qmc.Halton(len(space), scramble=True, rng=study).random(count)
    return [{d.name: d.at(share) for d, share in zip(space, row, strict=True)} for row in shares]
