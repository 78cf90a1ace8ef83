"""Give every optimizer the same tuning budget, keep every trial, and report which is better on which workload.

    ./run.sh compare tune --optimizers adamw muon soap --trials 5                 on every workload
    ./run.sh compare tune --optimizers all --trials 5 --machine-hours 8 --plan    print what that would train
    ./run.sh compare tune --optimizers my_optimizer.py:Mine                       your own, in the same tables
    ./run.sh compare tune --optimizers adamw muon --descend                       continue from there, one setting at a time
    ./run.sh compare tune --report                                                rewrite tables, plots and tuned.json

As in AlgoPerf's external ruleset (Dahl et al. 2023, arXiv 2306.07179), a study is --trials quasi-random points of a
submission's space, the same on every workload; --studies repeats that with other points. After the search come the neighbours
of the best settings. The four submissions that set a workload's target are rerun at three quarters of its length: the target is
the best median of these reruns. A submission that met a target on a machine or with code that AdamW was not trained on is timed
against AdamW in a few short interleaved runs: only such step times compare. --descend continues from the best point of the
first study (lab/tuning/descent.py).

A trial that diverged counts as the worst. Every trial is a line of --out/<workload>/<optimizer>.csv and is never trained again.
A workload keeps the compute type (--dtype) of its first trial.
"""

import argparse
import math
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tricks
from config import resolve
from engine import hardware
from engine.command import Parser
from engine.run_folder import intact, refuse_links
from engine.spec import UsageError, nearest
from lab import trials
from lab.runner import alone_in, at_least, run_through, threads
from lab.trials import Arm, Trial
from lab.tuning import descent, report, tuned
from lab.tuning.space import EXTRAS, Submission, points, submission
from lab.tuning.tuned import SETTERS, SHORT, TIMED, Row, Table
from optimizers import OPTIMIZERS

WORKLOADS = [name for name, track in tricks.TRACKS.items() if track.workload]
VALIDATIONS = 20  # of a run: how finely the time to a target is known
TIMINGS = 3  # runs that time a step beside AdamW's
CALIBRATED = 0.1  # of a workload's length: the run by which a plan knows what a trial takes


class Job(NamedTuple):
    """One trial to be trained: what it is for, its settings and its length."""

    kind: str
    track: str
    submission: Submission
    table: Table  # its row's
    study: int
    number: int
    seed: int
    steps: int
    settings: dict[str, float]

    def trial(self, dtype: str) -> Trial:
        every = ("--val-every", str(max(1, self.steps // VALIDATIONS)))
        flags = ("--track", self.track, *self.submission.flags(self.settings), *every, "--dtype", dtype)
        return Trial(Arm(self.submission.name, flags), self.steps, self.seed)


def length(track: str) -> int:
    """Steps of a workload's runs."""
    return tricks.track(track).settings["steps"]


class Contest:
    """Everybody's trials on every workload: which there are, which are wanted, and what these train for."""

    def __init__(self, options: argparse.Namespace):
        """Raises UsageError: a damaged table, or trials of another space or another compute type than asked for."""
        self.options, self.tables = options, defaultdict(dict, tuned.read_tables(options.out))
        self.dtypes = {track: self.dtype(track) for track in options.tracks}
        self.deadline = time.monotonic() + 3600 * (options.machine_hours or math.inf)
        self.late = 0  # trials that were not begun, since the hours were over
        # AdamW's too, which steps are compared with
        for track, entry in product(options.tracks, (submission("adamw"), *options.submissions)):
            table = self.table(track, entry.name)
            if any(row.space != entry.version for row in table.of("search")):
                why = "its trials are of another version of the space, or of the optimizer's file"
                raise UsageError(f"{table.path}: {why}: move the table away first")

    def dtype(self, track: str) -> str:
        """Of a workload's trials, there and to come. Raises UsageError: --dtype is another, or this machine lacks it."""
        kept, asked = tuned.dtype_of(self.tables[track]), self.options.dtype
        if kept and asked not in ("auto", kept):
            where = f"the trials of {track} in {self.options.out} are in {kept}"
            raise UsageError(f"--dtype {asked}: {where}: choose another --out")
        dtype, _ = hardware.pick_dtype(kept or asked, hardware.pick_device("auto"))
        return trials.DTYPES[str(dtype).removeprefix("torch.")]

    def table(self, track: str, name: str) -> Table:
        """Of a submission's trials on a workload; empty before the first."""
        if name not in self.tables[track]:
            self.tables[track][name] = tuned.table_of(self.options.out, track, name)
        return self.tables[track][name]

    # ---------------------------------------------------------------- what is to be trained

    def wanted(self, kind: str, track: str, entry: Submission) -> list[Job]:
        """The trials of a submission on a workload: `search`, `target` (the best settings of the first study of those that set
        targets, on new seeds) or `neighbour` (one setting off the best, same seed); of a `descent` the first, and once it has
        ended, `around` (the changes that it has not tried) and `final` (its end on new seeds)."""
        options, table, steps = self.options, self.table(track, entry.name), length(track)
        job, end = partial(Job, kind, track, entry, table), descent.found(table)
        if kind == "search":
            tried = ((study, points(entry.dimensions, options.trials, study)) for study in range(options.studies))
            return [job(study, n, 1000 * study + n, steps, point) for study, of in tried for n, point in enumerate(of)]
        if kind == "target":
            best = table.best(tuned.FIRST_STUDY) if entry.name in SETTERS else None
            seeds, short = range(options.target_seeds if best else 0), round(SHORT * steps)
            return [job(tuned.target_study(best), n, 100_000 + n, short, best.settings) for n in seeds]
        if kind == "neighbour":
            best = table.best() if options.neighbours else None
            off = tuned.neighbours(best.settings).values() if best else ()
            return [job(best.study, 10 * best.number + n, best.seed, best.steps, each) for n, each in enumerate(off)]
        if kind == "descent":
            return [job(0, 0, descent.SEED, steps, {})]
        if kind == "final":
            return [job(0, n, descent.SEED + 1 + n, steps, end.settings) for n in range(descent.SEEDS if end else 0)]
        done = [row.settings for row in descent.rows_of(table)]
        left = [each for each in descent.changes(entry.dimensions, end.settings) if each not in done] if end else []
        return [job(0, n, descent.SEED, steps, each) for n, each in enumerate(left)]

    def timings(self, track: str) -> list[Job]:
        """Interleaved: AdamW and the best settings of those that met the target and were not trained beside it."""
        adamw, steps = submission("adamw"), max(1, round(TIMED * length(track)))
        runs, cost = {adamw: self.table(track, adamw.name)}, tuned.step_seconds(self.tables[track])
        target = tuned.target_of(self.tables[track])
        for entry in self.options.submissions if target else ():
            table = self.table(track, entry.name)
            if min(table.steps_of_studies(target["loss"]), default=math.inf) < math.inf and entry.name not in cost:
                runs[entry] = table
        turn = 1 + max((row.study for table in runs.values() for row in table.of("timing")), default=-1)
        jobs = []
        for number, (entry, table) in product(range(TIMINGS), runs.items() if len(runs) > 1 else ()):
            settings = best.settings if (best := table.best()) else entry.defaults()
            jobs.append(Job("timing", track, entry, table, turn, number, 1000 * turn + number, steps, settings))
        return jobs

    # ---------------------------------------------------------------- training

    def train(self, kind: str, jobs: list[Job]) -> None:
        """All that is not there."""
        run_through(kind, jobs, self.ended, self.descend if kind == "descent" else self.one, self.options.side_by_side)

    def ended(self, job: Job) -> bool:
        """One that crashed is tried again. Of a descent: all of it."""
        if job.kind == "descent":
            return self.next_settings(job) is None
        row = job.table.rows.get((job.kind, job.study, job.number, job.steps))
        return row is not None and row.status != "crashed"

    def one(self, job: Job) -> str:
        """Train a job; a line about it, or nothing where no time was left."""
        if time.monotonic() > self.deadline:
            self.late += 1
            return ""
        begun = time.monotonic()
        outcome = trials.train(job.trial(self.dtypes[job.track]), threads=threads(self.options.side_by_side))
        about = dict(kind=job.kind, study=job.study, number=job.number, settings=job.settings, space=job.submission.version)
        row = Row.of(outcome, time.monotonic() - begun, **about)
        job.table.add(row)
        loss = f"{row.val_loss:.4f}" if row.status == "ok" else f"{row.status} {outcome.error}".strip()
        return f"{job.track}  {job.submission.name}  study {job.study}, trial {job.number}: {loss}, {row.wall:.0f} s"

    def descend(self, first: Job) -> str:
        """A submission's descent on a workload, from where it stands to its end."""
        while not (trials.INTERRUPTED.is_set() or self.late) and (settings := self.next_settings(first)):
            number = len(descent.rows_of(first.table))
            line = self.one(first._replace(number=number, settings=settings))
            if len(descent.rows_of(first.table)) == number:  # it crashed, or no time was left
                return line
            print(f"descent  {line}", flush=True)
        return f"{first.track}  {first.submission.name}: {len(descent.rows_of(first.table))} trials"

    def next_settings(self, job: Job) -> dict[str, float] | None:
        """Of a descent that `job` begins: its next trial."""
        start = job.table.best(tuned.FIRST_STUDY)
        return descent.following(job.submission.dimensions, job.table, start and start.settings, descent.BUDGET)

    # ---------------------------------------------------------------- the plan

    def seconds_of_a_trial(self, track: str) -> float:
        """Wall-clock, of a search trial: the median, or by a short run of AdamW. Raises UsageError: it crashed."""
        walls = [row.wall for entry in self.options.submissions for row in self.table(track, entry.name).of("search")]
        if walls:
            return statistics.median(walls)  # a machine may stand still for minutes
        print(f"plan: timing {track}", flush=True)
        adamw, steps, new_seed = submission("adamw"), length(track), time.time_ns() % 2**32  # no run has had it
        part, table = max(2, round(CALIBRATED * steps)), self.table(track, "adamw")
        trial = Job("plan", track, adamw, table, 0, 0, new_seed, part, adamw.defaults()).trial(self.dtypes[track])
        begun = time.monotonic()
        outcome = trials.train(trial, threads=threads(self.options.side_by_side))
        seconds = time.monotonic() - begun
        shutil.rmtree(trial.folder, ignore_errors=True)
        if outcome.result is None:
            raise UsageError(f"{track} does not train: {outcome.error}")
        return seconds + outcome.result["train_time"] * (steps / part - 1)

    def left(self, track: str, entry: Submission) -> float:
        """What a submission still takes on a workload, in search trials; all that follows an unfinished search."""
        options, kinds = self.options, ("search", "neighbour", "target", "around", "final")
        search, near, target, *later = (sum(not self.ended(job) for job in self.wanted(kind, track, entry)) for kind in kinds)
        if search:
            near, target = 4 * options.neighbours, options.target_seeds * (entry.name in SETTERS)
        if search or not self.ended(*self.wanted("descent", track, entry)):  # at most
            moves, there = sum(len(descent.ways(d)) for d in entry.dimensions), descent.rows_of(self.table(track, entry.name))
            later = descent.BUDGET - len(there), moves, descent.SEEDS
        return search + near + SHORT * target + options.descend * sum(later)

    def plan(self) -> None:
        """Print it, with the trials cut to --machine-hours. Raises UsageError: not even one for everyone fits."""
        options = self.options
        each = {track: self.seconds_of_a_trial(track) for track in options.tracks}

        def hours() -> dict[str, float]:
            left = {track: sum(self.left(track, entry) for entry in options.submissions) for track in each}
            return {track: left[track] * seconds / 3600 / options.side_by_side for track, seconds in each.items()}

        while options.machine_hours and (needed := sum(hours().values())) > options.machine_hours:
            if options.trials == 1:
                raise UsageError(f"--machine-hours {options.machine_hours:g}: one trial for everyone takes {needed:.1f} hours")
            options.trials -= 1
        kind = f"studies of {options.trials} trials each"
        print(f"plan: {len(options.submissions)} submissions, {options.studies} {kind}, {options.side_by_side} at a time")
        for track, spent in hours().items():
            print(f"  {track:14} {length(track):6,} steps  about {each[track]:4.0f} s a trial  {spent:5.2f} hours")
        print(f"  together about {sum(hours().values()):.1f} hours of this machine, beside what is there", flush=True)

    def run(self) -> None:
        """Plan, then train all that is not there, the search round by round: an early stop leaves everyone as many trials."""
        self.plan()
        for kind in ("search", "target", "neighbour", *(("descent", "around", "final") if self.options.descend else ())):
            pairs = product(self.options.tracks, self.options.submissions)
            jobs = [job for track, entry in pairs for job in self.wanted(kind, track, entry)]
            self.train(kind, sorted(jobs, key=lambda job: (job.study, job.number)) if kind == "search" else jobs)
        self.train("timing", [job for track in self.options.tracks for job in self.timings(track)])
        if self.late:
            print(f"the hours are over: {self.late} trials were not begun; the same command continues", flush=True)


def add_running(made: argparse.ArgumentParser) -> None:
    """How trials are trained, or not."""
    add, cores = made.add_argument, os.cpu_count() or 1
    dtype = "of matrix products (default: as the workload's trials so far, else bf16 where it is native)"
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help=dtype)
    add("--side-by-side", type=int, default=cores, help=f"trials at a time, sharing the cores (default: {cores})")
    add("--machine-hours", type=float, default=0, help="fit the plan into this many hours, and begin nothing after them")
    add("--plan", action="store_true", help="print the plan and stop")
    add("--report", action="store_true", help="train nothing: write tables, plots and settings of what is there")


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="compare.py tune", description=__doc__)
    add = made.add_argument
    entries = f"registered optimizers, {', '.join(EXTRAS)}, your own path.py:Class, or all; keys given stay fixed"
    add("--optimizers", nargs="+", default=[], metavar="SPEC", help=entries)
    add("--workloads", nargs="+", default=WORKLOADS, metavar="TRACK", help=f"default: {' '.join(WORKLOADS)}")
    add("--trials", type=int, default=5, help="per study (default: 5)")
    add("--studies", type=int, default=1, help="per submission and workload (default: 1; AlgoPerf: 3)")
    add("--neighbours", action=argparse.BooleanOptionalAction, default=True, help="also change each setting of the best alone")
    further = f"then coordinate descent, {descent.BUDGET} trials, and {descent.SEEDS} new seeds"
    add("--descend", action="store_true", help=further)
    add("--target-seeds", type=int, default=3, help="reruns of those that set the target (default: 3; AlgoPerf: 20)")
    add_running(made)
    add("--out", type=Path, default=Path("records/tuning"), help="default: records/tuning")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UsageError: an unknown submission or workload, or a value out of range."""
    options = parser().parse_args(argv)
    at_least(options, trials=1, studies=1, side_by_side=1, target_seeds=1, machine_hours=0)
    options.tracks = list(dict.fromkeys(options.workloads))
    for name in options.tracks:
        if name not in tricks.TRACKS:
            raise UsageError(f"unknown workload {name!r}: {nearest(name, tricks.TRACKS)}")
    if not options.optimizers and not options.report:
        raise UsageError("tune what? --optimizers adamw muon ..., or all (see --help)")
    words = [*OPTIMIZERS, *EXTRAS] if options.optimizers == ["all"] else list(dict.fromkeys(options.optimizers))
    options.submissions = [submission(word) for word in words]
    for entry, track in product(options.submissions, options.tracks):  # the trainer must take what comes of the space
        resolve(["--track", track, *entry.flags(points(entry.dimensions, 1, 0)[0])])
    return options


def carried_out(options: argparse.Namespace, contest: type[Contest], write: Callable[[Path], str]) -> str:
    """As the flags of `add_running` say: the plan, or the trials and what `write` says of the folder's report."""
    for folder in (options.out, *(options.out / track for track in options.tracks)):
        refuse_links(folder)
    if options.plan:
        contest(options).plan()
        return ""
    if not options.report:
        alone_in(options.out, lambda: contest(options).run())
    with intact(options.out):
        return write(options.out)


def run(argv: list[str]) -> str:
    return carried_out(parse(argv), Contest, report.report)
