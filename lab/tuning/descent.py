"""The contest's search: coordinate descent to settings that no single change improves, then new seeds.

It starts at the best point of a submission's first study. It moves one setting after the other by a fixed factor while the
loss falls, until a round of all settings moved none or the budget is spent. All its trials have one seed. Each trial follows
from those before it: a table of trials proves its own order (`records verify`).
"""

import itertools
import math
import statistics
from collections.abc import Generator, Mapping, Sequence

from lab.tuning.space import Dimension
from lab.tuning.tuned import Row, Table, Tables, step_seconds

BUDGET = 24  # trials of a submission on a workload, beside its first study
GAIN = 0.005  # nats by which a move must lower the loss: less is noise
SEED = 200_000  # of all trials of a descent; the final runs have the seeds after it
SEEDS = 3  # final runs
TOLERANCE, TOLERANCE_ON = 0.01, {"wiki": 0.02}  # nats by which no change may be better at the end

Settings = dict[str, float]


def ways(d: Dimension) -> tuple[int, ...]:
    """Up, down, and for weight decay to nothing."""
    return (1, -1, 0) if d.key == "weight_decay" else (1, -1)


def moved(settings: Settings, d: Dimension, way: int) -> Settings:
    """One setting up (1) or down (-1) by a factor: 2, or 4 for weight decay and what is searched over more than three decades.
    A complement moves in its distance to 1. Only rates leave their range. Way 0: no weight decay."""
    value = settings[d.name]
    by = (4.0 if d.key == "weight_decay" or d.high > 1000 * d.low > 0 else 2.0) ** way
    if d.scale == "choice" or not way:
        value = 1 - value if way else 0.0
    else:
        value = 1 - (1 - value) / by if d.scale == "complement" else value * by
        value = value if "lr" in d.key else min(max(value, d.low), d.high)
    return settings | {d.name: float(f"{value:.4g}" if d.scale == "complement" else f"{value:.3g}")}


def changes(space: Sequence[Dimension], settings: Settings) -> list[Settings]:
    """All moves from here."""
    made = [moved(settings, d, way) for d in space for way in ways(d)]
    return [each for n, each in enumerate(made) if each != settings and each not in made[:n]]


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
    run, points = descend(space, start), []
    for loss in (None, *losses):  # None starts it
        try:
            points.append(run.send(loss))
        except StopIteration:
            return points, None
    return points[:-1], points[-1]


def rows_of(table: Table) -> list[Row]:
    """The trials of its descent, in their order."""
    return sorted((row for row in table.of("descent") if row.status != "crashed"), key=lambda row: row.number)


def following(space: Sequence[Dimension], table: Table, start: Settings | None, most: int) -> Settings | None:
    """The next of at most so many trials of a table's descent; None: it has ended, or cannot begin."""
    losses = [row.val_loss for row in rows_of(table)]
    return order(space, start, losses)[1] if start and len(losses) < most else None


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


def ended(tables: Tables) -> Tables:
    """Registered submissions whose final runs are all there."""
    return {name: table for name, table in tables.items() if ":" not in name and len(finals(table)) >= SEEDS}


def rises(space: Sequence[Dimension], table: Table) -> list[float]:
    """How much the loss rises by each single change from where the descent has arrived, of those that were tried."""
    end, tried = found(table), [*table.of("descent"), *table.of("around")]
    losses = [[row.val_loss for row in tried if row.settings == each] for each in changes(space, end.settings)]
    return [first - end.val_loss for first, *_ in filter(None, losses)]


def speed_ups(tables: Tables) -> dict[str, tuple[float, float]]:
    """Submission -> (in steps, in time): what AdamW needs for the worse of the two final losses over what the submission needs,
    by mean curves of the final runs, which all must have. nan: untimed. Empty without AdamW."""
    curves, pairs = {}, {}
    for name, table in tables.items():
        validations = zip(*(row.losses for row in finals(table)))  # each of all runs, which have one length
        curves[name] = [(of[0][0], statistics.mean(loss for _, loss in of)) for of in validations]
    cost, adamw = step_seconds(tables), curves.get("adamw")
    for name, curve in curves.items() if adamw else ():
        target = max(curve[-1][1], adamw[-1][1])
        ratio = reached(adamw, target) / reached(curve, target)
        pairs[name] = ratio, ratio * cost.get("adamw", math.nan) / cost.get(name, math.nan)
    return pairs


def means(tables: Mapping[str, Tables]) -> dict[str, float]:
    """Submission -> geometric mean of its speed-ups in time over all workloads whose descents have ended, the best first."""
    finished = list(filter(None, map(ended, tables.values())))
    on_each, names = list(map(speed_ups, finished)), {name for of in finished for name in of}
    mean = {name: statistics.geometric_mean(of.get(name, (math.nan, math.nan))[1] for of in on_each) for name in sorted(names)}
    return dict(sorted(mean.items(), key=lambda item: (math.isnan(item[1]), -item[1])))


def reached(curve: Sequence[tuple[int, float]], target: float) -> float:
    """Steps at which a curve first comes to the target, between validations in a straight line."""
    for (start, above), (step, loss) in itertools.pairwise([curve[0], *curve]):
        if loss <= target:
            down = above - loss  # 0: the first validation
            return start + (step - start) * (above - target) / down if down > 0 else step
    return math.inf
