"""The contest's search: coordinate descent to settings that no single change improves, then new seeds.

It starts at the best point of a submission's first study. It moves one setting after the other by a fixed factor while the
loss falls, until a round of all settings moved none or the budget is spent. All its trials have one seed. Each trial follows
from those before it: a table of trials proves its own order (`records verify`).
"""

import itertools
import math
import statistics
from collections.abc import Generator, Sequence
from typing import NamedTuple

from lab.tuning.space import Dimension
from lab.tuning.tuned import FIRST_STUDY, Row, Table, Tables, step_seconds

BUDGET = 24  # trials of a submission on a workload, those of its first study included
GAIN = 0.005  # nats by which a move must lower the loss to be made: less is noise
SEED = 200_000  # of all trials of a descent; the final runs have those after it
SEEDS = 3  # final runs
TOLERANCE, TOLERANCE_ON = 0.01, {"wiki": 0.02}  # nats by which no change may be better at the end; elsewhere

Settings = dict[str, float]


def moved(settings: Settings, d: Dimension, way: int) -> Settings:
    """One setting up (1) or down (-1) by a factor: 2, or 4 for weight decay and what is searched over more than three decades.
    An average's factor moves in its distance to 1. Only rates leave their range. Way 0: no weight decay."""
    by = (4.0 if d.key == "weight_decay" or d.high > 1000 * d.low > 0 else 2.0) ** way
    value = settings[d.name]
    if d.scale == "choice":
        value = 1 - value
    else:
        value = 1 - (1 - value) / by if d.scale == "complement" else value * by if way else 0.0
        value = value if "lr" in d.key or not way else min(max(value, d.low), d.high)
    return settings | {d.name: float(f"{value:.4g}" if d.scale == "complement" else f"{value:.3g}")}


def changes(space: Sequence[Dimension], settings: Settings) -> list[Settings]:
    """All moves from here."""
    made = [moved(settings, d, way) for d in space for way in ways(d)]
    return [each for n, each in enumerate(made) if each != settings and each not in made[:n]]


def ways(d: Dimension) -> tuple[int, ...]:
    return (1, -1, 0) if d.key == "weight_decay" else (1, -1)


def descend(space: Sequence[Dimension], start: Settings) -> Generator[Settings, float, None]:
    """The settings to try; takes the loss of each."""
    best, lowest, tried, still = start, (yield start), [start], 0
    for d in itertools.cycle(space):
        still += 1
        for way in ways(d):
            while (point := moved(best, d, way)) not in tried:
                tried.append(point)
                loss = yield point
                if not loss < lowest - GAIN:
                    break
                best, lowest, still = point, loss, 1
        if still >= len(space):
            return


def order(space: Sequence[Dimension], start: Settings, losses: Sequence[float]) -> tuple[list[Settings], Settings | None]:
    """The settings that a descent tries with these losses, and the next one; None: it has ended."""
    run = descend(space, start)
    points = [next(run)]
    for loss in losses:
        try:
            points.append(run.send(loss))
        except StopIteration:
            return points, None
    return points[:-1], points[-1]


def rows_of(table: Table) -> list[Row]:
    """The trials of its descent, in their order."""
    return sorted((row for row in table.of("descent") if row.status != "crashed"), key=lambda row: row.number)


def following(space: Sequence[Dimension], table: Table, start: Settings | None, most: int) -> Settings | None:
    """The next trial of a table's descent; None: it has ended, or cannot begin. most: trials of it."""
    rows = rows_of(table)
    return order(space, start, [row.val_loss for row in rows])[1] if start and len(rows) < most else None


def found(table: Table, first: int | None = None) -> Row | None:
    """Where the descent has arrived; with the first so many of its trials."""
    best, *later = rows_of(table)[:first] or [None]
    for row in later:
        best = row if row.val_loss < best.val_loss - GAIN else best
    return best


def best_of(table: Table) -> Row | None:
    """Of its search and its descent."""
    return min(filter(None, (table.best(), found(table))), key=lambda row: row.val_loss, default=None)


def finals(table: Table, kind: str = "final") -> list[Row]:
    """Its runs of that kind at the settings where the descent has arrived."""
    end = found(table)
    return [row for row in table.of(kind) if end and row.status != "crashed" and row.settings == end.settings]


# ---------------------------------------------------------------- what came of it


class Ending(NamedTuple):
    """The outcome of a submission's descent on a workload."""

    best: Row
    trials: int  # with those of the first study
    rise: list[tuple[float, str]]  # of each single change that was tried, the best first: how much the loss rises; the change
    losses: list[float]  # of the final runs


def ending(space: Sequence[Dimension], table: Table) -> Ending | None:
    """None: there was no descent, or its final runs are still to come."""
    best, runs = found(table), finals(table)
    if best is None or len(runs) < SEEDS:
        return None
    tried = [row for kind in ("descent", "around") for row in table.of(kind)]
    rise = []
    for settings in changes(space, best.settings):
        key = next(k for k in settings if settings[k] != best.settings[k])
        losses = [row.val_loss for row in tried if row.settings == settings]
        rise += [(losses[0] - best.val_loss, f"{key}={settings[key]:g}")] if losses else []
    count = len(rows_of(table)) + len(table.of("search", FIRST_STUDY))
    return Ending(best, count, sorted(rise), [row.val_loss for row in runs])


def speed_ups(tables: Tables) -> dict[str, tuple[float, float]]:
    """Submission -> (in steps, in time): what AdamW needs for the worse of its own and the other's final loss, over what the
    other needs; by mean curves of the final runs. Time is steps times the cost of a step. nan: untimed, or no AdamW."""
    curves = {name: mean_curve(runs) for name, table in tables.items() if (runs := finals(table))}
    cost, adamw = step_seconds(tables), curves.get("adamw")
    pairs = {}
    for name, curve in curves.items() if adamw else ():
        target = max(curve[-1][1], adamw[-1][1])
        ratio = reached(adamw, target) / reached(curve, target)
        pairs[name] = ratio, ratio * cost.get("adamw", math.nan) / cost.get(name, math.nan)
    return pairs


def mean_curve(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """(step, mean validation loss, nats) of runs of one length."""
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*(row.losses for row in rows))]


def reached(curve: Sequence[tuple[int, float]], target: float) -> float:
    """Steps at which a curve first comes to the target, between validations in a straight line."""
    before = curve[0]
    for step, loss in curve:
        if loss <= target:
            down = before[1] - loss
            return step if down <= 0 else before[0] + (step - before[0]) * (before[1] - target) / down
        before = step, loss
    return math.inf
