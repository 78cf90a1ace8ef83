"""What tuning has found: tables of trials, the best settings and their neighbours, targets, times for the AlgoPerf score.

Losses do not depend on how busy a machine was; times do. So the time to a target is the number of steps to it (the first
validation at or below it) times the cost of a step: CPU seconds of training a step, the lower quartile over the
submission's trials on that workload, each trained on one core. A shared machine's step takes a third longer in one session
than in another, so that only ratios to AdamW's step in the same session are carried over.

Who was given more studies has no more luck: a time or a loss is the median over studies, a target is set by first studies, and
a quartile hardly depends on the number of trials, where a least one falls with it. Only the settings worth having (`best`) are
from all of them.
"""

import csv
import dataclasses
import hashlib
import json
import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.run_folder import atomic_write
from engine.spec import UsageError
from lab import plots
from lab.markdown import table as markdown_table
from lab.trials import DTYPES, PRUNED, Outcome
from lab.tuning import score
from lab.tuning.space import submission
from optimizers import OPTIMIZERS

FIRST_STUDY = 0  # its number: everybody has it
SETTERS = ("adamw", "nadamw", "sgd", "heavy_ball")  # of targets, as AlgoPerf has them (arXiv 2306.07179, section 4)
COLUMNS = (
    "kind", "study", "number", "seed", "steps", "status", "val_loss", "seconds", "wall", "settings", "losses", "machine",
    "dtype", "source", "space",
)  # fmt: skip


def plain(name: str) -> str:
    """A submission's name as a file's."""
    return "".join(c if c.isalnum() or c in "_-=.," else "-" for c in name)


@dataclass(frozen=True)
class Row:
    """One trial that has ended."""

    kind: str  # search, neighbour, target, timing or self
    study: int
    number: int
    seed: int
    steps: int
    status: str  # ok, diverged, crashed or pruned
    val_loss: float  # nats per token; inf unless ok or pruned
    seconds: float  # CPU time of the training steps
    wall: float  # of the whole process, s; of a run that had ended before an interruption, of its training alone
    settings: dict[str, float]
    losses: list[tuple[int, float]]  # step, validation loss
    machine: str
    dtype: str  # of the matrix products: a value of DTYPES, or empty for a run that crashed before it had one
    source: str
    space: str  # the version of the space that the settings are from: a hash

    @classmethod
    def of(
        cls, kind: str, study: int, number: int, settings: dict[str, float], outcome: Outcome, wall: float, version: str
    ) -> "Row":
        trial, result = outcome.trial, outcome.result
        log = trial.log() if (trial.folder / "log.jsonl").exists() else []
        env = trial.folder / "env.json"
        about = json.loads(env.read_text()) if env.exists() else {"cpu": "", "dtype": "", "source_sha256": ""}
        losses = validations(log)
        if result is not None:
            status, loss, seconds = result["status"], outcome.loss, result["process_time"]
            wall = max(wall, result["train_time"])
        else:
            status, seconds = (PRUNED if outcome.error == PRUNED else "crashed"), 0.0
            loss = losses[-1][1] if status == PRUNED and losses else math.inf
        return cls(
            kind, study, number, trial.seed, trial.steps, status, loss, seconds, wall, settings, losses, about["cpu"],
            DTYPES.get(about["dtype"], ""), about["source_sha256"][:12], space_hash(version),
        )  # fmt: skip

    def cells(self) -> dict[str, str]:
        """As a line of a table."""
        found = {name: str(getattr(self, name)) for name in COLUMNS}
        found |= {"val_loss": f"{self.val_loss:.6g}", "seconds": f"{self.seconds:.2f}", "wall": f"{self.wall:.1f}"}
        found["settings"] = " ".join(f"{key}={value:g}" for key, value in self.settings.items())
        found["losses"] = " ".join(f"{step}:{loss:.5g}" for step, loss in self.losses)
        return found

    @classmethod
    def read(cls, cells: dict[str, str]) -> "Row":
        """
        Raises:
            KeyError, ValueError, TypeError: it is no line of such a table.
        """
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        found: dict[str, Any] = {name: {int: int, float: float}.get(kinds[name], str)(cells[name]) for name in COLUMNS}
        found["settings"] = {k: float(v) for k, v in (word.split("=") for word in cells["settings"].split())}
        found["losses"] = [(int(s), float(v)) for s, v in (word.split(":") for word in cells["losses"].split())]
        return cls(**found)


def space_hash(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()[:8]


def validations(log: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of each validation that was finite."""
    return [(e["step"], e["loss"]) for e in log if e["event"] == "val" and e["loss"] is not None]


class Table:
    """All trials of a submission on a workload: a CSV file, written anew with every trial. Safe for threads."""

    def __init__(self, path: Path):
        """
        Raises:
            UsageError: the file is no such table, or a line of it is damaged.
        """
        self.path, self.lock, self.rows = path, threading.RLock(), []
        if not path.exists():
            return
        with path.open(newline="") as file:
            for number, cells in enumerate(csv.DictReader(file), start=2):
                try:
                    self.rows.append(Row.read(cells))
                except (KeyError, ValueError, TypeError, AttributeError) as error:
                    raise UsageError(f"{path} line {number} is no trial of a tuning table: {error}") from None

    def check(self, version: str, what: str) -> None:
        """
        Raises:
            UsageError: the trials that are there searched another space.
        """
        if any(row.space != space_hash(version) for row in self.rows if row.kind == "search"):
            raise UsageError(f"{self.path}: the trials of {what} are of another version of its space: move the file away first")

    def of(self, kind: str, study: int | None = None) -> list[Row]:
        return [row for row in self.rows if row.kind == kind and study in (None, row.study)]

    def find(self, kind: str, study: int, number: int, steps: int) -> Row | None:
        """The trial, unless it crashed: that one is tried again."""
        same = [row for row in self.of(kind, study) if (row.number, row.steps) == (number, steps) and row.status != "crashed"]
        return same[0] if same else None

    def add(self, row: Row) -> None:
        with self.lock:
            key = lambda r: (r.kind, r.study, r.number, r.steps)  # noqa: E731
            self.rows = sorted([r for r in self.rows if key(r) != key(row)] + [row], key=lambda r: (r.kind != "search", key(r)))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [",".join(COLUMNS)]
            lines += [",".join(row.cells()[name].replace(",", ";") for name in COLUMNS) for row in self.rows]
            atomic_write(self.path, "\n".join(lines) + "\n")

    def studies(self) -> dict[int, list[Row]]:
        """Search trials by study. A study with fewer trials than another is not finished, and left out."""
        found: dict[int, list[Row]] = defaultdict(list)
        for row in self.of("search"):
            found[row.study].append(row)
        most = max(map(len, found.values()), default=0)
        return {study: rows for study, rows in found.items() if len(rows) == most}

    def typical(self) -> float:
        """The lowest final loss of a study: the median over studies, so that more studies are not more luck. inf: none."""
        lowest = [min((r.val_loss for r in rows if r.status == "ok"), default=math.inf) for rows in self.studies().values()]
        return statistics.median(lowest) if lowest else math.inf

    def best(self, study: int | None = None) -> Row | None:
        """The search trial with the lowest final loss, of one study or all; None where none has ended well."""
        ended = [row for row in self.of("search", study) if row.status == "ok" and math.isfinite(row.val_loss)]
        return min(ended, key=lambda row: row.val_loss, default=None)


def read_tables(folder: Path) -> dict[str, dict[str, Table]]:
    """workload -> submission -> table."""
    found: dict[str, dict[str, Table]] = {}
    for path in sorted(folder.glob("*/*.csv")):
        found.setdefault(path.parent.name, {})[path.stem] = Table(path)
    return found


def compute_type(track: str, tables: Iterable[Table]) -> str:
    """The compute type of all trials of a workload; empty where there is none. Of 356 neighbours trained in fp32 and in bf16,
    same seed, half end 0.008 nats apart or more and a tenth over 0.1, as far as from the best: a table holds one of the two.

    Raises:
        UsageError: there are two.
    """
    found = sorted({row.dtype for table in tables for row in table.rows} - {""})
    if len(found) > 1:
        raise UsageError(f"the trials of {track} are in {' and in '.join(found)}, whose losses do not compare: move some away")
    return found[0] if found else ""


# ---------------------------------------------------------------- what they say


def neighbours(settings: dict[str, float]) -> list[tuple[str, dict[str, float]]]:
    """The settings with one of them off, by what was changed."""
    changes = [("lr / 2", "lr", 0.5), ("lr x 2", "lr", 2.0), ("no weight decay", "weight_decay", 0.0)]
    warmup = next((key for key in ("warmup", "schedule_warmup") if key in settings), None)
    if warmup:
        changes.append(("half the warm-up", warmup, 0.5))
    return [(name, settings | {key: settings[key] * factor}) for name, key, factor in changes if settings.get(key)]


def sensitivity(table: Table) -> dict[str, float]:
    """What was changed -> how much the final loss rose above the best, same seed; inf where the run diverged."""
    best, found = table.best(), {}
    for name, settings in neighbours(best.settings) if best else ():
        written = {key: float(f"{value:g}") for key, value in settings.items()}
        row = next((r for r in table.of("neighbour") if (r.settings, r.seed) == (written, best.seed)), None)
        if row:
            found[name] = row.val_loss - best.val_loss
    return found


def beaten(tables: Iterable[Table]) -> list[str]:
    """How many of the best settings have a neighbour that ends lower, and by how much: what a study has left to be found."""
    rises = [list(found.values()) for table in tables if (found := sensitivity(table))]
    if not rises:
        return []
    lower = [max(0.0, -min(rise)) for rise in rises]
    counts = ", ".join(f"{sum(gain > least for gain in lower)} by more than {least:g}" for least in (0.001, 0.01, 0.04))
    return [
        "",
        f"Of {len(rises)} best settings with neighbours ({sum(map(len, rises))} trials) so many have one that ends lower, in "
        f"nats: {counts}, at most by {max(lower):.2f}.",
    ]


def rate_neighbours(table: Table) -> list[Row]:
    """The runs of the best settings at another learning rate, same seed; a diverged one has the loss inf."""
    best = table.best()
    fixed = {k: v for k, v in best.settings.items() if k != "lr"} if best else {}
    near = [r for r in table.of("neighbour") if best and r.seed == best.seed and r.settings["lr"] != best.settings["lr"]]
    return [r for r in near if {k: v for k, v in r.settings.items() if k != "lr"} == fixed]


def steps_to(row: Row, target: float) -> int | None:
    """Steps to the first validation at or below the target."""
    return next((step for step, loss in row.losses if loss <= target), None)


def steps_of_studies(table: Table, target: float) -> list[float]:
    """Steps to the target of each study: the least over its trials, inf where all missed."""
    steps = lambda row: steps_to(row, target) or math.inf  # noqa: E731
    return [min(map(steps, rows)) for rows in table.studies().values()]


def meets(table: Table, target: float) -> bool:
    """Whether any study does."""
    return min(steps_of_studies(table, target), default=math.inf) < math.inf


def target_study(best: Row) -> int:
    """The study number of the reruns of a trial: those of another trial are another study."""
    return 1000 * best.study + best.number


def target_of(tables: dict[str, Table]) -> dict[str, Any] | None:
    """A workload's target: the lowest median, over the submissions that set it, of the reruns of the best settings of their
    first study, so that a target does not fall with the number of studies. A rerun that diverged has the loss inf."""
    medians = {}
    for name in SETTERS:
        table = tables.get(name)
        best = table and table.best(FIRST_STUDY)
        runs = table.of("target", target_study(best)) if best else []
        if runs:
            medians[name] = (statistics.median(r.val_loss for r in runs), len(runs), runs[0].steps)
    by = min(medians, key=lambda name: medians[name][0], default=None)
    if by is None or math.isinf(medians[by][0]):
        return None
    loss, runs, steps = medians[by]
    return {"loss": float(f"{loss:.4g}"), "set_by": by, "runs": runs, "steps": steps}


def targets(folder: Path) -> dict[str, float]:
    """workload -> target, where it is set."""
    found = {track: target_of(tables) for track, tables in read_tables(folder).items()}
    return {track: target["loss"] for track, target in found.items() if target}


def step_seconds(tables: dict[str, Table]) -> dict[str, float]:
    """Submission -> CPU seconds of a step on one workload: its ratio to AdamW's step, the geometric mean over the sessions that
    trained both, times AdamW's step in the session with most of AdamW's trials; none for who was never trained beside AdamW. A
    session is a machine and the source that ran on it; runs that time a step, by turns with AdamW, are one of their own each
    time (their study). Reruns for the target are of few submissions, and left out."""
    seconds: dict[tuple[str, str, int | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, table in tables.items():
        for row in (*table.of("search"), *table.of("neighbour"), *table.of("timing")):
            if row.status == "ok" and row.seconds:
                turn = row.study if row.kind == "timing" else None
                seconds[row.machine, row.source, turn][name].append(row.seconds / row.steps)
    typical = {
        session: {name: float(np.quantile(each, 0.25, method="median_unbiased")) for name, each in of.items()}
        for session, of in seconds.items()
    }
    sessions = {session: len(of["adamw"]) for session, of in seconds.items() if "adamw" in of}
    if not sessions:
        return {}
    adamw = typical[max(sessions, key=sessions.get)]["adamw"]
    ratios = {name: [typical[s][name] / typical[s]["adamw"] for s in sessions if name in typical[s]] for name in tables}
    return {name: adamw * statistics.geometric_mean(each) for name, each in ratios.items() if each}


def timed(table: Table, adamw: Table) -> bool:
    """Whether there is a session in which a submission was trained beside AdamW."""
    return "it" in step_seconds({"adamw": adamw, "it": table})


def studies(found: dict[str, dict[str, Table]]) -> score.Studies:
    """(submission, workload) -> seconds to the target of each study: the least over its trials, inf where all missed. Left out
    is who met it with steps of unknown cost. Rounded as in studies.csv: scores jump where two times tie, and must agree."""
    result: score.Studies = {}
    for track, tables in found.items():
        target, cost = target_of(tables), step_seconds(tables)
        for name, table in tables.items() if target else ():
            steps = steps_of_studies(table, target["loss"])
            if steps and (name in cost or not meets(table, target["loss"])):
                result[name, track] = [float(f"{n * cost.get(name, 1.0):.5g}") for n in steps]
    return result


def untimed(found: dict[str, dict[str, Table]], times: score.Studies) -> list[str]:
    """A line about the submissions that met a target and have no time to it; none where there is none."""
    lacking = [
        f"`{name}` on {track}"
        for track, tables in found.items() if target_of(tables)
        for name, table in tables.items() if table.studies() and (name, track) not in times
    ]  # fmt: skip
    words = "Not scored, for want of steps that were timed beside AdamW's (`compare tune` of them makes some): "
    return ["", f"{words}{', '.join(lacking)}."] if lacking else []


# ---------------------------------------------------------------- report


def words(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def workload_table(track: str, tables: dict[str, Table]) -> str:
    target, cost = target_of(tables), step_seconds(tables)
    lines, changes = [], ("lr / 2", "lr x 2", "no weight decay", "half the warm-up")
    for name, table in tables.items():
        search, best = table.of("search"), table.best()
        if not search and not table.of("self"):
            continue
        lost, untuned = sensitivity(table), table.of("self")
        steps = statistics.median(steps_of_studies(table, target["loss"])) if search and target else math.inf
        lines.append((
            table.typical(),
            (
                f"[`{name}`]({track}/{name}.csv)", str(len(search)),
                str(sum(r.status == "diverged" for r in search)), words(table.typical()) if best else "-",
                words(statistics.median(r.val_loss for r in search)) if search else "-",
                f"{steps:,g}" if math.isfinite(steps) else "missed" if target else "-",
                f"{cost[name] / cost['adamw']:.2f}" if name in cost else "-",
                f"{sum(r.seconds for r in search):,.0f}",
                words(statistics.median(r.val_loss for r in untuned)) if untuned else "-",
                *(f"{lost[c]:+.4f}" if c in lost else "-" for c in changes),
                "`" + " ".join(f"{k}={v:g}" for k, v in best.settings.items()) + "`" if best else "-",
            ),
        ))  # fmt: skip
    head = (
        "submission", "trials", "diverged", "best loss", "median loss", "steps to target", "step, x AdamW", "CPU s of training",
        "defaults, 3 x the steps", *changes, "best settings",
    )  # fmt: skip
    about = (
        f"Target {target['loss']:g}: set by `{target['set_by']}`, median of {target['runs']} reruns of the best settings of "
        f"its first study, at {target['steps']} steps."
        if target else "No target yet: none of those that set it has been rerun."
    )  # fmt: skip
    if dtype := compute_type(track, tables.values()):  # none where every trial crashed at once
        about += f" All trials in {dtype}."
    rows = [line for _, line in sorted(lines, key=lambda x: x[0])]
    kept = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]  # a column that nobody has says nothing
    return f"## `{track}`\n\n{about}\n\n" + markdown_table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def report(folder: Path) -> str:
    """Write README.md, studies.csv, tuned.json and the plots of all tables in `folder`; returns a few lines about them.

    Raises:
        UsageError: there is no table, or no trial that ended well, or a workload's trials are of two compute types.
    """
    found = {t: {n: table for n, table in tables.items() if table.rows} for t, tables in read_tables(folder).items()}
    found = {t: tables for t, tables in found.items() if tables}
    if not found:
        raise UsageError(f"{folder} holds no finished trial: ./run.sh compare tune --optimizers ...")
    if not any(row.status == "ok" for tables in found.values() for table in tables.values() for row in table.rows):
        raise UsageError(f"{folder}: every trial diverged or crashed: nothing to choose from")
    times = studies(found)
    lines = ["submission,workload,study,seconds"]
    lines += [f"{s},{w},{n},{t:.5g}" for (s, w), each in sorted(times.items()) for n, t in enumerate(each)]
    atomic_write(folder / "studies.csv", "\n".join(lines) + "\n")
    atomic_write(folder / "tuned.json", json.dumps(winners(found), indent=1) + "\n")
    scored = score_table(folder, times)
    drawn = [track for track, tables in found.items() if any(table.best() for table in tables.values())]
    for track in drawn:
        draw_sensitivity(folder, track, found[track])
    text = [
        "# Tuning",
        "",
        "Generated by `./run.sh compare tune --report`. Every trial is a line of `<workload>/<submission>.csv`. A submission",
        "is an optimizer with its schedule: a warm-up and a cosine to zero, but for methods that bring their own. *Best loss*",
        "and *steps to target* are those of a study's best trial, the median over studies; *median loss* is over all search",
        "trials; *step, x AdamW* compares the lower quartiles of CPU seconds a step within a session that trained both, the",
        "geometric mean of such sessions. The *best settings* are those of the best of all trials, of which some submissions",
        "have more. `lr / 2` and the like, where tried, say how much the final loss rises with one of them off, one seed each.",
        "In the pictures they are orange, joined with half and twice their rate.",
        "",
        *scored,
        *untimed(found, times),
        *beaten(table for tables in found.values() for table in tables.values()),
    ]
    for track, tables in found.items():
        text += ["", workload_table(track, tables)]
        text += ["", f"![loss of every trial](sensitivity-{track}.png)"] if track in drawn else []
    atomic_write(folder / "README.md", "\n".join(text) + "\n")
    trials_there = sum(len(table.rows) for tables in found.values() for table in tables.values())
    return f"{trials_there} trials on {len(found)} workloads: {folder / 'README.md'}"


def score_table(folder: Path, times: score.Studies) -> list[str]:
    """The AlgoPerf score over the workloads that have a target, as Markdown, with its profiles drawn; or why there is none."""
    found = scored(times)
    if isinstance(found, str):
        return [found]
    table, summary, reference = found
    score.draw(table, {}, score.TAU_MAX, folder / "profile")
    command = f"./run.sh compare score --studies {folder}/studies.csv" + (f" --reference {reference}" * bool(reference))
    return [
        "## Score",
        "",
        f"Over {', '.join(table.workloads)}: `{command}`",
        "",
        markdown_table(
            ("rank", "submission", "AlgoPerf score", "95 %, studies redrawn", "targets met", "rank if one is left out",
             "against AdamW"),
            [score_cells(row, len(table.workloads), reference) for row in summary["submissions"]],
        ),
        "",
        "![profiles](profile.png)",
    ]  # fmt: skip


def scored(times: score.Studies) -> tuple[score.Times, dict[str, Any], str] | str:
    """Times, score.summary and reference (AdamW, or none) of the submissions that were run on every workload with a target;
    or why there is no score."""
    workloads = list(dict.fromkeys(w for _, w in times))
    if len(workloads) < 2 or not any(math.isfinite(t) for each in times.values() for t in each):
        return "No score yet: it needs two workloads with a target."
    # a submission that was not run everywhere would be scored as if it had missed
    whole = [s for s in dict.fromkeys(s for s, _ in times) if all((s, w) in times for w in workloads)]
    times = {(s, w): each for (s, w), each in times.items() if s in whole}
    if len(whole) < 2:
        return "No score yet: it needs two submissions that were run on every workload."
    table = score.medians(times)
    repeated = any(len(each) > 1 for each in times.values())
    reference = "adamw" if "adamw" in whole and np.isfinite(table.seconds[whole.index("adamw")]).any() else ""
    return table, score.summary(table, {}, score.TAU_MAX, reference, times if repeated else None), reference


def score_cells(row: dict[str, Any], workloads: int, reference: str) -> tuple[str, ...]:
    low, high = row["ranks_when_one_is_left_out"]
    return (
        str(row["rank"]), f"`{row['submission']}`", f"{row['score']:.3f}",
        "{:.3f} to {:.3f}".format(*row["interval"]) if "interval" in row else "-",
        f"{row['targets_met']} of {workloads}", f"{low} to {high}" if low < high else str(low),
        f"{row['against_reference']:.3f}" if reference else "-",
    )  # fmt: skip


def overview(folder: Path) -> str:
    """Of every submission its score and, for each workload, the lowest final loss of a study: a table for the README."""
    found = {t: tables for t, tables in read_tables(folder).items() if any(table.best() for table in tables.values())}
    result = scored(studies(found))
    scores = {} if isinstance(result, str) else {row["submission"]: row for row in result[1]["submissions"]}
    best = {(n, t): table.typical() for t, tables in found.items() for n, table in tables.items() if table.best()}
    names = list(dict.fromkeys(name for name, _ in best))
    cell = lambda name, track: f"{best[name, track]:.4f}" if (name, track) in best else "-"  # noqa: E731
    mean = lambda name: statistics.mean(best.get((name, t), math.inf) for t in found)  # noqa: E731
    names.sort(key=lambda name: (-scores[name]["score"] if name in scores else 0, mean(name)))
    counts = {t: sum(len(table.of("search")) for table in tables.values()) for t, tables in found.items()}
    return markdown_table(
        ("submission", "AlgoPerf score", *(f"`{t}`, {n} trials" for t, n in counts.items())),
        [(f"`{n}`", f"{scores[n]['score']:.3f}" if n in scores else "-", *(cell(n, t) for t in found)) for n in names],
    )


def winners(found: dict[str, dict[str, Table]]) -> dict[str, dict[str, dict[str, Any]]]:
    """workload -> registered optimizer -> its best settings, as words of the command line, and how good they were: what the
    trainer takes as the optimizer's defaults on that track (tricks.tuned)."""
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for track, tables in found.items():
        for name, table in tables.items():
            if name in OPTIMIZERS and (best := table.best()):
                flags = submission(name).flags(best.settings)
                words = {flag.removeprefix("--"): word for flag, word in zip(flags[::2], flags[1::2], strict=True)}
                about = {"val_loss": best.val_loss, "trials": len(table.of("search"))}
                chosen.setdefault(track, {})[name] = words | about
    return chosen


def draw_sensitivity(folder: Path, track: str, tables: dict[str, Table]) -> None:
    """Final loss of every search trial against its learning rate; the best one joined with half and twice its rate."""
    shown = [(name, table) for name, table in tables.items() if table.best()]
    columns = min(6, len(shown))
    rows = math.ceil(len(shown) / columns)
    pyplot = plots.pyplot()
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(2.3 * columns, 1.9 * rows + 0.4), constrained_layout=True, sharey=True, squeeze=False
    )
    lowest = [table.best().val_loss for _, table in shown]
    usual = []  # losses that each submission's panel should show
    for axis, (name, table) in zip(axes.flat, shown):
        best = table.best()
        ended = [r for r in table.of("search") if math.isfinite(r.val_loss)]
        axis.scatter([r.settings["lr"] for r in ended], [r.val_loss for r in ended], s=12, color="tab:blue")
        line = sorted((r.settings["lr"], r.val_loss) for r in (best, *rate_neighbours(table)) if math.isfinite(r.val_loss))
        axis.plot(*zip(*line), "o-", ms=3, color="tab:orange")
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(pyplot.NullFormatter())
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
        usual += [statistics.median(r.val_loss for r in ended), *(loss for _, loss in line)]
    least, most = min(lowest), max(*lowest, float(np.quantile(usual, 0.75)))
    top = most + 0.3 * (most - least)
    axes.flat[0].set_ylim(least - 0.05 * (most - least), top)
    for axis, (_, table) in zip(axes.flat, shown):  # what is far above is cut off, what diverged with it: at the upper edge
        for tried, colour in ((table.of("search"), "tab:blue"), (rate_neighbours(table), "tab:orange")):
            above = [r.settings["lr"] for r in tried if not r.val_loss <= top]
            axis.plot(above, [top - 0.04 * (top - least)] * len(above), "^", ms=4, color=colour, markerfacecolor="none")
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    figure.suptitle(track, fontsize=9)
    figure.supxlabel(
        "learning rate (orange: the best one, and where tried half and twice its rate; triangle: above the panel, or diverged)",
        fontsize=8,
    )
    figure.supylabel("final loss, nats", fontsize=8)
    plots.save(figure, folder, f"sensitivity-{track}")
