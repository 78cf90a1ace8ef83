"""Give every optimizer the same tuning budget, keep every trial, and say who is better on which workload.

    ./run.sh compare tune --optimizers adamw muon soap --trials 5                 on every workload
    ./run.sh compare tune --optimizers all --trials 5 --machine-hours 8 --plan    what that would train, and stop
    ./run.sh compare tune --optimizers muon --workloads wiki --sampler tpe --trials 30
    ./run.sh compare tune --optimizers my_optimizer.py:Mine                       one's own, into the same tables
    ./run.sh compare tune --report                                                tables, plots and tuned.json anew

External ruleset, as AlgoPerf has it (Dahl et al. 2023, arXiv 2306.07179): a study is so many quasi-random trials of the space
of a submission, the same points on every workload; --studies repeats that with other points. After the search come, for the
best settings, their neighbours (half and twice the learning rate, no weight decay, half the warm-up), and for the four
submissions that set a workload's target, reruns at three quarters of its length: the target is the best median of these. Who
meets a target on a machine or with code that AdamW was not trained on is timed beside it, in a few short runs by turns: only
such steps compare.
Self-tuning ruleset (--ruleset self): the registry's defaults, nothing searched, three times the length.

A trial that diverged counts as the worst; one that was pruned keeps the loss it was pruned at. Every trial is a line of
--out/<workload>/<optimizer>.csv: what is there is never trained again, on whatever machine. --storage takes any Optuna
storage URL, so that several machines work on one study. A workload keeps the compute type (--dtype) of its first trial.
"""

import argparse
import math
import os
import shutil
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from tqdm import tqdm

import train_gpt
import tricks
from engine import hardware
from engine.run_folder import lock
from engine.spec import UsageError, nearest
from lab import trials
from lab.runner import at_least, command
from lab.trials import Arm, Trial
from lab.tuning import tuned
from lab.tuning.space import EXTRAS, Submission, points, submission, values
from lab.tuning.tuned import SETTERS, Row, Table
from optimizers import OPTIMIZERS

WORKLOADS = [name for name, track in tricks.TRACKS.items() if track.workload]
VALIDATIONS = 20  # of a run: how finely the time to a target is known
SELF_LENGTH = 3  # budget of the self-tuning ruleset, times that of the external one
TIMINGS, TIMED = 3, 0.25  # runs that time a step beside AdamW's, and their share of a workload's length
SHORT = 0.75  # of a workload's length: what its target is set at, so that a tuned setter meets it before the end

SAMPLERS = ("halton", "tpe")
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3),
    "halving": optuna.pruners.SuccessiveHalvingPruner,
}


@dataclass(frozen=True)
class Job:
    """One trial to be trained: what it is for, its settings (None: a sampler will say) and its length."""

    kind: str
    track: str
    submission: Submission
    study: int
    number: int
    seed: int
    steps: int
    settings: dict[str, float] | None = None

    @property
    def table(self) -> tuple[str, str]:
        return self.track, self.submission.name

    def trial(self, settings: dict[str, float], dtype: str) -> Trial:
        every = max(1, self.steps // VALIDATIONS)
        flags = ("--track", self.track, *self.submission.flags(settings), "--val-every", str(every), "--dtype", dtype)
        return Trial(Arm(self.submission.name, flags), self.steps, self.seed)


def length(track: str) -> int:
    """Steps of a workload's runs."""
    return tricks.track(track).settings["steps"]


@dataclass
class Tuner:
    """Trains jobs, side by side, and keeps a row of each."""

    options: argparse.Namespace
    tables: dict[tuple[str, str], Table]
    studies: dict[tuple[str, str, int], optuna.Study] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    deadline: float = math.inf
    late: int = 0  # trials that were not begun in time
    elsewhere: int = 0  # trials that another machine has claimed

    def run(self, jobs: list[Job], what: str) -> None:
        """Train what is not there yet, in this order, until the deadline."""
        left = [job for job in jobs if self.tables[job.table].find(job.kind, job.study, job.number, job.steps) is None]
        if len(left) < len(jobs):
            print(f"{what}: {len(jobs) - len(left)} of {len(jobs)} trials are there already", flush=True)
        bar = tqdm(total=len(left), unit="trial", desc=what, disable=not sys.stderr.isatty())
        pool = ThreadPoolExecutor(self.options.side_by_side)
        begun = time.monotonic()
        try:
            done = [pool.submit(self.one, job) for job in left]
            for count, future in enumerate(as_completed(done), start=1):
                row, job = future.result(), left[done.index(future)]
                bar.update()
                if row is None:
                    continue
                rest = (time.monotonic() - begun) / count * (len(left) - count) / 60
                words = f"{row.val_loss:.4f}" if row.status in ("ok", "pruned") else row.status
                line = f"{what}  {job.track}  {job.submission.name}  study {job.study}, trial {job.number}: {words}"
                tqdm.write(f"{line}, {row.wall:.0f} s; {len(left) - count} left, about {rest:.0f} min")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()

    def one(self, job: Job) -> Row | None:
        """Train a job; its row. None where no time was left, or another machine has taken it."""
        if time.monotonic() > self.deadline:
            self.late += 1
            return None
        asked, settings = None, job.settings
        if job.kind == "search":
            asked = self.ask(job)
            if asked is None:
                self.elsewhere += 1
                return None
            settings = values(job.submission.dimensions, asked.params)
        trial = job.trial(settings, self.options.dtypes[job.track])
        watch = self.watch(asked) if asked and self.options.prune != "none" else None
        begun = time.monotonic()
        outcome = trials.train(trial, threads=self.options.threads, watch=watch)
        row = Row.of(job.kind, job.study, job.number, settings, outcome, time.monotonic() - begun, job.submission.version)
        self.tables[job.table].add(row)
        if asked and row.status == "crashed":  # no result: the number is free again
            asked.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        elif asked:
            asked.set_user_attr("row", row.cells())
            asked.study.tell(asked, self.objective(job, row))
        return row

    def ask(self, job: Job) -> optuna.Trial | None:
        """The settings to try, claimed in the study. None where somebody else has claimed this number."""
        space, halton = job.submission.dimensions, self.options.sampler == "halton"
        with self.lock:
            study = self.study(job)
            live = [t for t in study.get_trials(deepcopy=False) if t.state != optuna.trial.TrialState.FAIL]
            if any(t.user_attrs.get("number") == job.number for t in live):
                return None
            if halton:
                point = points(space, job.number + 1, job.study)[job.number]
                study.sampler = optuna.samplers.PartialFixedSampler(point, optuna.samplers.RandomSampler())
            asked = study.ask({d.name: d.distribution for d in space})
            asked.set_user_attr("number", job.number)
            return asked

    def watch(self, asked: optuna.Trial) -> Callable[[Trial], bool]:
        """Reports a run's validations to the pruner as they come; false once it says that the trial is hopeless."""
        told = 0

        def go_on(trial: Trial) -> bool:
            nonlocal told
            found = tuned.validations(trial.log()) if (trial.folder / "log.jsonl").exists() else []
            for step, loss in found[told:]:
                asked.report(loss, step)
            told = len(found)
            return not (told and asked.should_prune())

        return go_on

    def objective(self, job: Job, row: Row) -> float:
        """What the search makes small: the final loss, or the time to the target (CPU seconds of training)."""
        if self.options.objective == "loss" or row.status != "ok":
            return row.val_loss
        steps = tuned.steps_to(row, self.options.targets[job.track])
        return math.inf if steps is None else steps * row.seconds / row.steps

    def study(self, job: Job) -> optuna.Study:
        """The Optuna study of a job, holding the trials that the table has; and the table those that it has.

        Raises:
            UsageError: the storage cannot be read, or holds a study of another version of the space or compute type.
        """
        key = (*job.table, job.study)
        if key in self.studies:
            return self.studies[key]
        options, entry, table = self.options, job.submission, self.tables[job.table]
        name = f"{job.track}/{entry.name}/{job.study}"
        try:
            study = optuna.create_study(
                storage=options.opened_storage, study_name=name, load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=job.study, multivariate=True, constant_liar=True),
                pruner=PRUNERS[options.prune](),
            )  # fmt: skip
            version, there = study.user_attrs.get("version", entry.version), study.get_trials(deepcopy=False)
        except Exception as error:  # a journal's JSON or a data base's own errors: they share no class
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"study {name} cannot be read from the storage: {reason}") from None
        if version != entry.version:
            raise UsageError(
                f"study {name} is of another version of the space of {entry.name}: choose another --storage and --out"
            )
        dtype = options.dtypes[job.track]
        if (other := study.user_attrs.get("dtype", dtype)) != dtype:
            raise UsageError(f"study {name} is in {other}, not in {dtype}: add --dtype {other}, or choose another --storage")
        study.set_user_attr("version", entry.version)
        study.set_user_attr("dtype", dtype)
        for trial in there:
            if trial.state == optuna.trial.TrialState.RUNNING and options.own_storage:  # left by a process that was killed
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            elif "row" in trial.user_attrs:
                table.add(Row.read(trial.user_attrs["row"]))
        known = {trial.user_attrs.get("number") for trial in there if trial.state == optuna.trial.TrialState.COMPLETE}
        for row in table.of("search", job.study):
            if row.number not in known and row.status != "crashed":
                study.add_trial(optuna.trial.create_trial(
                    params={d.name: d.searched(row.settings[d.name]) for d in entry.dimensions},
                    distributions={d.name: d.distribution for d in entry.dimensions},
                    value=self.objective(job, row), user_attrs={"number": row.number, "row": row.cells()},
                ))  # fmt: skip
        self.studies[key] = study
        return study


# ---------------------------------------------------------------- what is to be trained


def search_jobs(options: argparse.Namespace) -> list[Job]:
    """Round by round, so that whoever stops early has given everyone the same number of trials."""
    return [
        Job("search", track, entry, study, number, 1000 * study + number, length(track))
        for study in range(options.studies)
        for number in range(options.trials)
        for track in options.tracks
        for entry in options.submissions
    ]


def self_jobs(options: argparse.Namespace) -> list[Job]:
    return [
        Job("self", track, entry, study, 0, study, SELF_LENGTH * length(track), entry.defaults())
        for study in range(options.studies)
        for track in options.tracks
        for entry in options.submissions
    ]


def neighbour_jobs(options: argparse.Namespace, tables: dict[tuple[str, str], Table]) -> list[Job]:
    """One setting off the best: what it costs to have it wrong. Same seed as the best, so that nothing else differs."""
    jobs = []
    for track in options.tracks:
        for entry in options.submissions:
            best = tables[track, entry.name].best()
            for number, (_, settings) in enumerate(tuned.neighbours(best.settings) if best else ()):
                jobs.append(
                    Job("neighbour", track, entry, best.study, 10 * best.number + number, best.seed, best.steps, settings)
                )
    return jobs


def target_jobs(options: argparse.Namespace, tables: dict[tuple[str, str], Table]) -> list[Job]:
    """The best settings of the first study of each submission that sets targets, on new seeds, at SHORT of the length."""
    jobs = []
    for track in options.tracks:
        for entry in options.submissions:
            best = tables[track, entry.name].best(tuned.FIRST_STUDY)
            if best and entry.name in SETTERS:
                steps, study = round(SHORT * length(track)), tuned.target_study(best)
                jobs += [Job("target", track, entry, study, n, 100_000 + n, steps, best.settings)
                         for n in range(options.target_seeds)]  # fmt: skip
    return jobs


def timing_jobs(options: argparse.Namespace, tables: dict[tuple[str, str], Table]) -> list[Job]:
    """By turns AdamW and the best settings of those that met a target and were not trained beside it: a time to target is steps
    times the cost of a step, in which machines, or one machine on two days, differ more than many submissions."""
    jobs, adamw = [], submission("adamw")
    for track, target in tuned.targets(options.out).items():
        own = {entry: tables[track, entry.name] for entry in options.submissions if track in options.tracks}
        beside = tables.get((track, adamw.name))
        untimed = {e: table for e, table in own.items() if tuned.meets(table, target) and not tuned.timed(table, beside)}
        if not untimed:
            continue
        runs, steps = {adamw: beside} | untimed, max(1, round(TIMED * length(track)))
        turn = 1 + max((row.study for table in runs.values() for row in table.of("timing")), default=-1)
        for number in range(TIMINGS):
            for entry, table in runs.items():
                settings = best.settings if (best := table.best()) else entry.defaults()
                jobs.append(Job("timing", track, entry, turn, number, 1000 * turn + number, steps, settings))
    return jobs


# ---------------------------------------------------------------- the plan


def seconds_of_a_trial(options: argparse.Namespace, tables: dict[tuple[str, str], Table]) -> dict[str, float]:
    """Wall-clock seconds of one search trial on each workload: of those that are there, or by two short runs of AdamW."""
    found = {}
    for track in options.tracks:
        walls = [row.wall for entry in options.submissions for row in tables[track, entry.name].of("search")]
        found[track] = statistics.median(walls) if walls else calibrate(options, track)  # a machine may stand still for minutes
    return found


def calibrate(options: argparse.Namespace, track: str) -> float:
    """By a run of one step and a run of a tenth of the length, both with validations as often as a trial has them."""
    print(f"plan: timing {track}", flush=True)
    steps, adamw, walls = length(track), submission("adamw"), []
    flags = ("--track", track, *adamw.flags(adamw.defaults()), "--val-every", str(max(1, steps // VALIDATIONS)))
    flags = (*flags, "--dtype", options.dtypes[track])
    part = max(2, steps // 10)
    for count in (1, part):
        trial = Trial(Arm("plan", flags), count, time.time_ns() % 10**9)  # a seed that no run has had: it must be trained
        begun = time.monotonic()
        outcome = trials.train(trial, threads=options.threads)
        walls.append(time.monotonic() - begun)
        shutil.rmtree(trial.folder, ignore_errors=True)
        if outcome.result is None:
            raise UsageError(f"{track} does not train: {outcome.error}")
    start, longer = walls
    return start + (longer - start) * steps / part


def left(options: argparse.Namespace, tables: dict[tuple[str, str], Table], track: str) -> float:
    """What a workload still takes, in search trials. While a search is not finished, all that follows it is still to come."""
    count = lambda jobs: sum(tables[j.table].find(j.kind, j.study, j.number, j.steps) is None for j in jobs)  # noqa: E731
    total, alongside = 0.0, "adamw" in [entry.name for entry in options.submissions]
    for entry in options.submissions:
        one = argparse.Namespace(**vars(options) | {"tracks": [track], "submissions": [entry]})
        if options.ruleset == "self":
            total += SELF_LENGTH * count(self_jobs(one))
        elif searching := count(search_jobs(one)):
            total += searching + 4 * options.neighbours + SHORT * options.target_seeds * (entry.name in SETTERS)
        else:
            total += SHORT * count(target_jobs(one, tables))
            total += count(neighbour_jobs(one, tables)) if options.neighbours else 0
        if options.ruleset != "self" and not alongside and not tuned.timed(tables[track, entry.name], tables[track, "adamw"]):
            total += 2 * TIMINGS * TIMED
    return total


def plan(options: argparse.Namespace, tables: dict[tuple[str, str], Table]) -> None:
    """Print what will be trained and how long it will take; cut the trials to --machine-hours, the same for all.

    Raises:
        UsageError: not even one trial for everyone fits.
    """
    each = seconds_of_a_trial(options, tables)
    hours = lambda: {t: left(options, tables, t) * s / 3600 / options.side_by_side for t, s in each.items()}  # noqa: E731
    if options.machine_hours:
        while sum(hours().values()) > options.machine_hours:
            if options.trials == 1:
                needed = sum(hours().values())
                raise UsageError(f"--machine-hours {options.machine_hours:g}: one trial for everyone takes {needed:.1f} hours")
            options.trials -= 1
    kind = "runs of the defaults" if options.ruleset == "self" else f"studies of {options.trials} trials ({options.sampler})"
    print(f"plan: {len(options.submissions)} submissions, {options.studies} {kind} each, {options.side_by_side} at a time")
    for track, spent in hours().items():
        print(f"  {track:14} {length(track):6,} steps  about {each[track]:4.0f} s a trial  {spent:5.2f} hours")
    print(f"  together about {sum(hours().values()):.1f} hours of this machine, beside what is there", flush=True)


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    made = train_gpt.Parser(
        prog="compare.py tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, cores = made.add_argument, os.cpu_count() or 1
    add("--optimizers", nargs="+", default=[], metavar="SPEC", help="submissions: registered optimizers, "
        f"{', '.join(EXTRAS)}, one's own path.py:Class, or all; keys given stay fixed")  # fmt: skip
    add("--workloads", nargs="+", default=WORKLOADS, metavar="TRACK", help=f"default: {' '.join(WORKLOADS)}")
    add("--trials", type=int, default=5, help="of each study (default: 5)")
    add("--studies", type=int, default=1, help="of each submission and workload (default: 1; AlgoPerf: 3)")
    add("--sampler", choices=SAMPLERS, default="halton", help="default: halton, quasi-random")
    add("--objective", choices=("loss", "time"), default="loss", help="final validation loss, or time to the target")
    add("--prune", choices=PRUNERS, default="none", help="end hopeless trials early (default: none)")
    add("--ruleset", choices=("external", "self"), default="external", help="self: defaults, nothing tuned, 3 x the length")
    add("--neighbours", action=argparse.BooleanOptionalAction, default=True, help="also try the best one setting off")
    add("--target-seeds", type=int, default=3, help="reruns of those that set the target (default: 3; AlgoPerf: 20)")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="of matrix products; auto (default): that of the "
        "trials of a workload that are there, else bf16 where it is native")  # fmt: skip
    add("--side-by-side", type=int, default=cores, help=f"trials at a time, the cores shared (default: {cores})")
    add("--machine-hours", type=float, default=0, help="plan within so many hours, and begin nothing after them")
    add("--plan", action="store_true", help="print the plan and stop")
    add("--report", action="store_true", help="train nothing: tables, plots and tuned.json of what is there")
    add("--storage", default="", help="Optuna storage URL (default: the file journal.log in --out)")
    add("--out", type=Path, default=Path("records/tuning"), help="default: records/tuning")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """
    Raises:
        UsageError: an unknown submission or workload, or a value out of range.
    """
    options = parser().parse_args(argv)
    at_least(options, trials=1, studies=1, side_by_side=1, target_seeds=1)
    if options.machine_hours < 0:
        raise UsageError(f"--machine-hours must be above 0, got {options.machine_hours:g}")
    for name in options.workloads:
        if name not in tricks.TRACKS:
            raise UsageError(f"unknown workload {name!r}: {nearest(name, tricks.TRACKS)}")
    options.tracks = list(dict.fromkeys(options.workloads))
    if not options.optimizers and not options.report:
        raise UsageError("tune what? --optimizers adamw muon ..., or all (see --help)")
    words = [*OPTIMIZERS, *EXTRAS] if options.optimizers == ["all"] else list(dict.fromkeys(options.optimizers))
    options.submissions = [submission(word) for word in words]
    for entry in options.submissions:  # the space must not be empty, and the trainer must take what comes of it
        first = values(entry.dimensions, points(entry.dimensions, 1, 0)[0])
        for track in options.tracks:
            train_gpt.resolve(["--track", track, *entry.flags(first)])
    options.threads = max(1, (os.cpu_count() or 1) // options.side_by_side)
    return options


def open_storage(options: argparse.Namespace) -> optuna.storages.BaseStorage:
    """
    Raises:
        UsageError: the journal is damaged, or the URL leads nowhere.
    """
    options.own_storage = not options.storage
    try:
        if options.storage:
            return optuna.storages.get_storage(options.storage)
        backend = optuna.storages.journal.JournalFileBackend(str(options.out / "journal.log"))
        return optuna.storages.JournalStorage(backend)
    except Exception as error:  # see Tuner.open
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = options.storage or options.out / "journal.log"
        again = "" if options.storage else "; delete it: the tables hold every trial that has ended"
        raise UsageError(f"{where} cannot be read as a study's storage ({reason}){again}") from None


def read_tables(options: argparse.Namespace) -> dict[tuple[str, str], Table]:
    """(workload, submission) -> its trials so far; AdamW's too, which steps are compared with.

    Raises:
        UsageError: a damaged table, or trials of another version of a space.
    """
    tables = {}
    for track in options.tracks:
        for entry in {e.name: e for e in (submission("adamw"), *options.submissions)}.values():
            table = Table(options.out / track / f"{tuned.plain(entry.name)}.csv")
            table.check(entry.version, f"{entry.name} on {track}")
            tables[track, entry.name] = table
    return tables


def compute_types(options: argparse.Namespace) -> dict[str, str]:
    """Workload -> the compute type of its trials, those of all submissions that are there and those to come.

    Raises:
        UsageError: --dtype is not that of the trials that are there, or this machine lacks it.
    """
    found, there, device = {}, tuned.read_tables(options.out), hardware.pick_device("auto")
    for track in options.tracks:
        kept = tuned.compute_type(track, there.get(track, {}).values())
        if kept and options.dtype not in ("auto", kept):
            raise UsageError(
                f"--dtype {options.dtype}: the trials of {track} in {options.out} are in {kept}: choose another --out"
            )
        dtype, _ = hardware.pick_dtype(kept or options.dtype, device)
        found[track] = trials.DTYPES[str(dtype).removeprefix("torch.")]
    return found


def run(options: argparse.Namespace) -> None:
    options.dtypes = compute_types(options)
    if options.plan:
        plan(options, read_tables(options))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    held = lock(options.out)
    try:
        tables = read_tables(options)
        plan(options, tables)
        options.targets = tuned.targets(options.out)
        missing = [t for t in options.tracks if t not in options.targets]
        if options.objective == "time" and missing:
            raise UsageError(
                f"--objective time: {missing[0]} has no target yet: tune {', '.join(SETTERS)} on it with --objective loss first"
            )
        options.opened_storage = open_storage(options)
        deadline = time.monotonic() + 3600 * options.machine_hours if options.machine_hours else math.inf
        tuner = Tuner(options, tables, deadline=deadline)
        if options.ruleset == "self":
            tuner.run(self_jobs(options), "self-tuning")
        else:
            tuner.run(search_jobs(options), "search")
            tuner.run(target_jobs(options, tables), "target")
            if options.neighbours:
                tuner.run(neighbour_jobs(options, tables), "neighbours")
            tuner.run(timing_jobs(options, tables), "timing")
        if tuner.late:
            print(f"the hours are over: {tuner.late} trials were not begun; the same command continues", flush=True)
        if tuner.elsewhere:
            print(f"{tuner.elsewhere} trials are on other machines: the same command takes them over once they have ended")
    finally:
        held.release()


def main(argv: list[str]) -> int:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the sampler of given points

    def work() -> str:
        options = parse(argv)
        if not options.report:
            run(options)
        return "" if options.plan else tuned.report(options.out)

    return command("compare.py tune", work)
