"""The length of run at which an arm meets the target: by runs at several lengths and inverse prediction.

The target must hold at the end of a schedule of that length, so a validation half-way through a longer run says nothing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from lab.stats import Horizon, horizon

STRIDE = math.sqrt(2)  # between the lengths tried: half a doubling
LEAST = 4  # steps: nothing shorter is tried
SEEDS = 2  # runs at each of three lengths about the target: what the variance is measured from
FIRST_SEED = 1000  # of the search, whose runs have a seed each; confirming runs have seeds from 0: none is used twice
Runs = list[tuple[int, int, float]]  # steps, seed, loss


class Search(NamedTuple):
    """Every run of a search and what they say; `found` is None if the target was out of reach."""

    runs: Runs
    found: Horizon | None
    why: str = ""  # of a search without a result


def search(run: Callable[[int, int], float], first: int, target: float, most: int) -> Search:
    """Find the horizon of an arm by `run`: (steps, seed) -> final validation loss; inf for a run that diverged.

    Gallops from `first` (by STRIDE, then 2, then 2 STRIDE) until one length misses the target and another meets it, halves the
    gap until it is no wider than STRIDE; then runs both, and the length between, once more, and draws a line through the runs
    within a doubling of the target. Runs of one seed have most of their scatter in common, whatever their length, and the
    line's interval takes runs for independent: so each has a seed of its own. Beyond `most` steps the target is out of reach.
    """
    runs: Runs = []

    def tried(steps: int) -> float:
        seed = FIRST_SEED + len(runs)
        runs.append((steps, seed, run(steps, seed)))
        return runs[-1][2]

    steps, met, missed, stride = max(LEAST, min(first, most)), 0, 0, STRIDE
    while not (met and missed) or met / missed > STRIDE * 1.01:
        if tried(steps) <= target:
            met = steps
        else:
            missed = steps
        if met == LEAST:
            return Search(runs, None, f"meets the target in {LEAST} steps, the least that is tried")
        if missed == most:
            return Search(runs, None, f"did not reach the target within {most:,} steps")
        if met and missed:
            steps = round(math.sqrt(met * missed))
        else:
            steps = max(LEAST, math.floor(met / stride)) if met else min(most, math.ceil(missed * stride))
            stride = 2 if stride == STRIDE else 2 * STRIDE
    between = round(math.sqrt(met * missed))
    for length in (missed, between, met) * (SEEDS - 1):
        tried(length)
    return concluded(runs, target, between)


def concluded(runs: Runs, target: float, middle: float = 0) -> Search:
    """The horizon that the runs say; middle: those within a doubling of this length alone."""
    near = [(steps, loss) for steps, _, loss in runs if not middle or 0.5 <= steps / middle <= 2]
    if not all(math.isfinite(loss) for _, loss in near):
        return Search(runs, None, "some runs near the target diverged")
    if len(near) < 3 or len({steps for steps, _ in near}) < 2:
        return Search(runs, None, "fewer than three runs, or all of one length")
    found = horizon(*zip(*near), target)
    return Search(runs, found, "" if found else "more steps did not lower the loss")
