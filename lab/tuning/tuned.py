"""What tuning has found: tables of trials, the best settings and their neighbours, targets, times for the AlgoPerf score.

Losses do not depend on how busy a machine was; times do. So the time to a target is the number of steps to it (the first
validation at or below it) times the cost of a step: CPU seconds of training, the lower quartile over the submission's trials,
each on one core. A step takes a third longer in one session than in another: only ratios to AdamW's step in the same session
are carried over.

More studies must not be more luck: a time or a loss is the median over studies, a target is set by first studies, and a
quartile hardly depends on the number of trials. Only the best settings (`best`) come from all of them.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from lab.ledger import Ledger, compute_type
from lab.trials import DTYPES, Outcome
from lab.tuning import score

FIRST_STUDY = 0  # its number: everybody has it
SETTERS = ("adamw", "nadamw", "sgd", "heavy_ball")  # of targets, as AlgoPerf has them (arXiv 2306.07179, section 4)
SHORT = 0.75  # of a workload's length: what its target is set at, so that a tuned setter meets it before the end
TIMED = 0.25  # of a workload's length: a run that times a step beside AdamW's
CHANGES = {"lr / 2": ("lr", 0.5), "lr x 2": ("lr", 2.0), "no weight decay": ("weight_decay", 0.0)}
CHANGES |= {"half the warm-up": ("warmup", 0.5)}  # of the best settings, one at a time: which setting, times what


def plain(name: str) -> str:
    """A submission's name as a file's."""
    return quote(name, safe="=,")


@dataclass(frozen=True)
class Row:
    """One trial that has ended, a line of a workload's table of a submission."""

    kind: str  # as in `tune.Contest.wanted`, or timing
    study: int
    number: int
    seed: int
    steps: int
    status: str  # ok, diverged or crashed
    val_loss: float  # nats per token; inf unless ok
    seconds: float  # CPU time of the training steps
    wall: float  # s of the whole process; of a run that was found there, of its training
    settings: dict[str, float]
    losses: list[tuple[int, float]]  # step, validation loss
    machine: str
    dtype: str  # of the matrix products: a value of DTYPES, or empty for a run that crashed before it had one
    source: str
    space: str  # the version of the space that the settings are from: a hash

    @property
    def key(self) -> tuple[str, int, int, int]:
        return self.kind, self.study, self.number, self.steps

    @classmethod
    def of(cls, outcome: Outcome, wall: float, **about: Any) -> "Row":
        """about: kind, study, number, settings and space."""
        trial, env = outcome.trial, outcome.trial.env()
        result = outcome.result or {"status": "crashed", "process_time": 0.0, "train_time": 0.0}
        vals = [event for event in trial.log() if event["event"] == "val" and event["loss"] is not None]  # else not finite
        about["losses"] = [(event["step"], float(f"{event['loss']:.5g}")) for event in vals]
        about |= dict(seed=trial.seed, steps=trial.steps, status=result["status"], val_loss=float(f"{outcome.loss:.6g}"))
        about |= dict(seconds=round(result["process_time"], 2), wall=round(max(wall, result["train_time"]), 1))
        about |= dict(machine=env.get("cpu", ""), source=env.get("source_sha256", "")[:12])
        return cls(**about, dtype=DTYPES.get(env.get("dtype"), ""))


class Table(Ledger):
    """All trials of a submission on a workload."""

    def __init__(self, path: Path):
        super().__init__(path, Row)

    def of(self, kind: str, study: int | None = None) -> list[Row]:
        return [row for row in self.rows.values() if row.kind == kind and study in (None, row.study)]

    def studies(self) -> dict[int, list[Row]]:
        """Search trials by study. A study with fewer trials than another is not finished, and left out."""
        trials: dict[int, list[Row]] = defaultdict(list)
        for row in self.of("search"):
            trials[row.study].append(row)
        most = max(map(len, trials.values()), default=0)
        return {study: rows for study, rows in sorted(trials.items()) if len(rows) == most}

    def typical(self) -> float:
        """The lowest final loss of a study, the median over studies. inf: none."""
        return statistics.median([min(row.val_loss for row in rows) for rows in self.studies().values()] or [math.inf])

    def best(self, study: int | None = None) -> Row | None:
        """The search trial with the lowest final loss, of one study or all; None where none has ended well."""
        ended = [row for row in self.of("search", study) if math.isfinite(row.val_loss)]
        return min(ended, key=lambda row: row.val_loss, default=None)

    def neighbours(self) -> dict[str, Row]:
        """What was changed -> the run of the best settings with that changed, on the same seed."""
        if (best := self.best()) is None:
            return {}
        runs = [row for row in self.of("neighbour") if row.seed == best.seed]
        return {name: row for name, off in neighbours(best.settings).items() for row in runs if row.settings == off}

    def sensitivity(self) -> dict[str, float]:
        """What was changed -> how much the final loss rose above the best."""
        return {name: row.val_loss - self.best().val_loss for name, row in self.neighbours().items()}

    def steps_of_studies(self, target: float) -> list[float]:
        """Steps to the target of each study: the least over its trials, inf where all missed."""
        return [min(steps_to(row, target) for row in rows) for rows in self.studies().values()]


Tables = dict[str, Table]  # submission -> its trials on one workload


def table_of(folder: Path, track: str, name: str) -> Table:
    return Table(folder / track / f"{plain(name)}.csv")


def read_tables(folder: Path) -> dict[str, Tables]:
    """workload -> submission -> table."""
    tables: dict[str, Tables] = {}
    for path in sorted(folder.glob("*/*.csv")):
        if (table := Table(path)).rows:
            tables.setdefault(path.parent.name, {})[unquote(path.stem)] = table
    return tables


def dtype_of(tables: Tables) -> str:
    """Of all trials of a workload: see compute_type."""
    return compute_type(row for table in tables.values() for row in table.rows.values())


def neighbours(settings: dict[str, float]) -> dict[str, dict[str, float]]:
    """What is changed -> the settings with that changed."""
    changes = ((name, key if key in settings else f"schedule_{key}", by) for name, (key, by) in CHANGES.items())
    return {name: settings | {key: float(f"{settings[key] * by:g}")} for name, key, by in changes if settings.get(key)}


def beaten(tables: Iterable[Table]) -> list[str]:
    """How many of the best settings have a neighbour that ends lower, and by how much, as Markdown."""
    rises = [list(rise.values()) for table in tables if (rise := table.sensitivity())]
    lower = [max(0.0, -min(rise)) for rise in rises]
    counts = ", ".join(f"{sum(gain > least for gain in lower)} by more than {least:g}" for least in (0.001, 0.01, 0.04))
    there = f"Of {len(rises)} best settings with neighbours ({sum(map(len, rises))} trials) so many have one"
    return ["", f"{there} that ends lower, in nats: {counts}, at most by {max(lower):.2f}."] if rises else []


def steps_to(row: Row, target: float) -> float:
    """Steps to the first validation at or below the target; inf where there is none."""
    return next((step for step, loss in row.losses if loss <= target), math.inf)


def target_study(best: Row) -> int:
    """Of the reruns of a trial."""
    return 1000 * best.study + best.number


def target_of(tables: Tables) -> dict[str, Any] | None:
    """The lowest median, over those that set it, of the reruns of the best settings of their first study."""
    candidates = []
    for name in SETTERS:
        best = tables[name].best(FIRST_STUDY) if name in tables else None
        if best and (runs := tables[name].of("target", target_study(best))):
            loss = float(f"{statistics.median(run.val_loss for run in runs):.4g}")  # inf where most diverged
            candidates.append({"loss": loss, "set_by": name, "runs": len(runs), "steps": runs[0].steps})
    met = [target for target in candidates if math.isfinite(target["loss"])]
    return min(met, key=lambda target: target["loss"], default=None)


def step_seconds(tables: Tables) -> dict[str, float]:
    """Submission -> CPU seconds of a step on one workload: its ratio to AdamW's step, the geometric mean over the sessions that
    trained both, times AdamW's step in the session with most of AdamW's trials. A session is a machine and the source that ran
    on it; or the runs of a study that time a step. Reruns for the target are of few submissions, and left out."""
    seconds: dict[tuple[str, str, int | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, table in tables.items():
        for row in (*table.of("search"), *table.of("neighbour"), *table.of("timing")):
            if row.status == "ok" and row.seconds:
                turn = row.study if row.kind == "timing" else None
                seconds[row.machine, row.source, turn][name].append(row.seconds / row.steps)
    sessions = sorted((of for of in seconds.values() if "adamw" in of), key=lambda of: -len(of["adamw"]))
    low = [{name: float(np.quantile(each, 0.25, method="median_unbiased")) for name, each in of.items()} for of in sessions]
    ratios = {name: [of[name] / of["adamw"] for of in low if name in of] for name in tables}
    return {name: low[0]["adamw"] * statistics.geometric_mean(each) for name, each in ratios.items() if each}


def studies(tables: dict[str, Tables]) -> score.Studies:
    """(submission, workload) -> seconds to the target of each study, as in studies.csv: scores jump where two times tie.
    Submissions that met it and were never timed are left out."""
    times: score.Studies = {}
    for track, of in tables.items():
        target, cost = target_of(of), step_seconds(of)
        for name, table in of.items() if target else ():
            steps = table.steps_of_studies(target["loss"])
            if steps and (name in cost or min(steps) == math.inf):
                times[name, track] = [float(f"{n * cost.get(name, 1.0):.5g}") for n in steps]
    return times


Scored = tuple[score.Studies, dict[str, Any]] | None


def scored(times: score.Studies) -> Scored:
    """Times and score.summary of the submissions that were run on every workload with a target; None: nothing to score."""
    submissions, workloads = ({key[part] for key in times} for part in (0, 1))
    whole = {s for s in submissions if all((s, w) in times for w in workloads)}
    times = {(s, w): each for (s, w), each in times.items() if s in whole}
    met = {s for (s, _), each in times.items() if math.isfinite(statistics.median(each))}
    if len(workloads) < 2 or len(whole) < 2 or not met:
        return None
    return times, score.summary(times, {}, reference="adamw" if "adamw" in met else "")
