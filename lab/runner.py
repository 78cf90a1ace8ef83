"""Running the trials of an experiment: each once, whatever interrupts it, and what they leave in the output folder."""

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from engine.run_folder import atomic_write, lock, now_utc, read_json, refuse_links, source_hash
from engine.spec import UsageError
from lab import trials
from lab.ledger import MOST_APART, Ledger, Row, compute_type, hours_apart, moment, read_rows
from lab.trials import Arm, Launcher, Outcome, Trial, whole_lines

POINTS = 100  # of the training loss that are kept of a trial, at most
J, T = TypeVar("J"), TypeVar("T")


def in_turn(jobs: Iterable[J], work: Callable[[J], T], at_once: int) -> Iterator[tuple[J, T]]:
    """Each job as it ends, with what `work` made of it. Begun in their order, side by side; an interrupt begins no more."""
    pool = ThreadPoolExecutor(at_once)
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        trials.INTERRUPTED.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        trials.INTERRUPTED.clear()  # for who comes next: all of these have seen it


def run_through(what: str, jobs: Sequence[J], ended: Callable[[J], Any], work: Callable[[J], str], at_once: int) -> None:
    """Do the jobs that have not `ended` before. `work` gives a line to print, or none; the rest is estimated by `steps`."""
    left = [job for job in jobs if not ended(job)]
    if len(left) < len(jobs):
        print(f"{what}: {len(jobs) - len(left)} of {len(jobs)} trials are there already", flush=True)
    begun, steps, total = time.monotonic(), 0, sum(job.steps for job in left)
    with tqdm(total=len(left), unit="trial", desc=what, disable=None) as bar:
        for count, (job, line) in enumerate(in_turn(left, work, at_once), start=1):
            bar.update()
            steps += job.steps
            rest = (time.monotonic() - begun) * (total / steps - 1) / 60
            if line:
                with bar.external_write_mode():
                    print(f"{what}  {line}; {len(left) - count} left, about {rest:.0f} min", flush=True)


class Runner:
    """Runs the trials of an experiment and keeps what they leave: rows in trials.csv, thinned loss curves in curves.csv."""

    def __init__(self, out: Path, keep_checkpoints: bool, points: int = POINTS):
        self.out, self.keep_checkpoints, self.points = out, keep_checkpoints, points
        self.ledger = Ledger(out / "trials.csv", Row)

    def done(self, trial: Trial) -> Row | None:
        """The row of a trial that has ended; None if it crashed or the trainer's code has changed since: it is tried again."""
        row = self.ledger.rows.get(trial.folder.name)
        return row if row and row.status != "crashed" and row.source in ("", source_hash()[:12]) else None

    def rows(self, arms: Iterable[Arm]) -> tuple[list[Row], list[str]]:
        """The rows of these arms as set and coded now; and the runs under an arm's name of other settings or other code."""
        named = {arm.name: arm for arm in arms}

        def current(row: Row) -> bool:
            with contextlib.suppress(UsageError):  # a length that the arm as it is set now cannot have
                same = Trial(named[row.arm], row.steps, row.pair).folder.name == row.run
                return same and row.source in ("", source_hash()[:12])  # none: it crashed
            return False

        of_arms = [row for row in self.ledger.rows.values() if row.arm in named]
        used = [row for row in of_arms if current(row)]
        return used, [row.run for row in of_arms if row not in used]

    def run(self, phase: str, trial: Trial, launch: Launcher) -> Row:
        """The trial's row, trained if it is not there. Raises UsageError: its compute type is not that of the others."""
        if row := self.done(trial):
            return row
        if trials.INTERRUPTED.is_set():
            raise KeyboardInterrupt
        outcome = launch(trial)
        row = Row.of(phase, outcome)
        compute_type([*(r for r in self.ledger.rows.values() if r.source == row.source), row])
        if outcome.result is not None:
            self.keep_curve(row, trial)
            if not self.keep_checkpoints:  # they are large, and of use for sampling and resuming alone
                shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
        self.ledger.add(row)
        return row

    def run_all(self, phase: str, wanted: Sequence[Trial], launch: Launcher, at_once: int) -> None:
        """Train all that are not there, begun in their order."""

        def one(trial: Trial) -> str:
            row = self.run(phase, trial, launch)
            loss = f"{row.val_loss:.4f}" if row.status == "ok" else f"{row.status} {row.error}"
            return f"{row.arm}: {row.steps} steps, seed {row.seed}: {loss}, {row.train_time:.1f} s"

        run_through(phase, wanted, self.done, one, at_once)

    def run_turns(self, phase: str, turns: Sequence[Sequence[Trial]], launch: Launcher, at_once: int) -> None:
        """`run_all`, one turn after the other. Times are compared within a turn: unless all of one have ended, and together,
        those that ended over an hour ago, here or by their run folders in another experiment, are trained again."""
        wanted, again, now = [], 0, moment(now_utc())
        for turn in turns:
            rows = [self.done(trial) or (Row.of("", Outcome(trial, trial.result)) if trial.result else None) for trial in turn]
            together = all(rows) and hours_apart(rows) <= MOST_APART
            for trial, row in zip(turn, rows):
                if row and not together and (now - moment(row.ended)).total_seconds() > 3600 * MOST_APART:
                    self.ledger.rows.pop(trial.folder.name, None)
                    trial, again = dataclasses.replace(trial, extra=trials.ANEW), again + 1
                wanted.append(trial)
        if again:
            print(f"{again} trials ended over an hour ago, others of their turns did not: they are trained again", flush=True)
        self.run_all(phase, wanted, launch, at_once)

    def keep_curve(self, row: Row, trial: Trial) -> None:
        """Add to curves.csv, in one piece: validation losses, and means of the training loss over spans of steps."""
        events = trial.log()
        train = [e for e in events if e["event"] == "train"]
        span = max(1, math.ceil(len(train) / self.points))
        pieces = [train[start : start + span] for start in range(0, len(train), span)]
        lines = [piece[-1] | {"loss": round(sum(e["loss"] for e in piece) / len(piece), 4)} for piece in pieces]
        lines += [e | {"loss": round(e["loss"], 5)} for e in events if e["event"] == "val" and e["loss"] is not None]
        points = [(e["event"], e["step"], e["tokens"], round(e["train_time"], 3), e["loss"]) for e in lines]
        path, text = self.out / "curves.csv", io.StringIO()
        with self.ledger.lock:
            there = whole_lines(path) or "arm,seed,phase,kind,step,tokens,train_time,loss\n"
            csv.writer(text, lineterminator="\n").writerows((row.arm, row.seed, row.phase, *point) for point in points)
            self.out.mkdir(parents=True, exist_ok=True)
            atomic_write(path, there + text.getvalue())


def read_options(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Command line -> options; `flags`: what stood after `--`, for the trainer; `command`: the whole. Raises UsageError: an
    unknown flag, a single seed, or an optimizer in a file outside of this folder."""
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:cut])
    options.flags, options.command = tuple(argv[cut + 1 :]), shlex.join(argv)
    for file in (Path(word.partition(":")[0].rpartition("=")[2]) for word in argv if ".py:" in word):
        if file.is_absolute() or ".." in file.parts:  # a report or record that names it would be refused after all training
            raise UsageError(f"{file} is a path of this machine: put the file beside the repository's, as in own/{file.name}")
    if getattr(options, "seeds", 0) == 1:
        raise UsageError("--seeds 1: one run has no variance and shows nothing; take at least 2, better 5")
    return options


def at_least(options: argparse.Namespace, **least: float) -> None:
    """Raises UsageError: an option is below its least value."""
    for name, value in least.items():
        if getattr(options, name) < value:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(options, name)}")


def check_folder(out: Path, file: str, settings: dict[str, Any]) -> None:
    """Raises UsageError: the folder holds a report `file` with other settings, or something else, or links."""
    refuse_links(out)
    if (out / file).exists():
        there = read_json(out / file)
        for key, value in settings.items():
            if there.get(key) != value:
                raise UsageError(f"{out} holds a {file} with {key} {there.get(key)!r}, not {value!r}: choose another --out")
    elif out.exists() and any(p.name != "lock" for p in out.iterdir()) and not (out / "trials.csv").exists():
        raise UsageError(f"{out} is not empty and holds no {file}: choose another --out")


def alone_in(out: Path, work: Callable[[], T]) -> T:
    """Do the work while nobody else uses the folder: two experiments in one would write over each other's trials."""
    held = lock(out)
    try:
        return work()
    finally:
        held.release()


def write_report(out: Path, file: str, summary: dict[str, Any], text: str) -> None:
    """The summary as JSON, and the README that says the same in words."""
    if left_out := summary.get("left_out"):
        print(f"{len(left_out)} trials in this folder are of other settings or other code: left out", flush=True)
    atomic_write(out / file, json.dumps(summary, indent=1) + "\n")
    atomic_write(out / "README.md", text)


def read_report(folder: Path, file: str) -> tuple[dict[str, Any], list[Row]]:
    """Summary and trials of an experiment. Raises UsageError: the folder holds none."""
    try:
        return read_json(folder / file), read_rows(folder / "trials.csv")
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no experiment: {Path(error.filename).name} is missing") from None


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Where trials run, and what stays of them."""
    add = parser.add_argument
    add("--keep-checkpoints", action="store_true", help="keep the trials' weights (default: deleted when a trial has ended)")
    add("--processes", type=int, default=1, help="ranks of a trial, by torchrun (default: 1)")
    add("--launcher", choices=("local", "ray"), default="local", help="where trials run (default: local)")
    add("--gpus-per-trial", type=float, default=0, help="with --launcher ray (default: 0, one CPU)")


def threads(side_by_side: int) -> int:
    """Of each of so many trials at a time."""
    return max(1, (os.cpu_count() or 1) // side_by_side)


def make_launcher(options: argparse.Namespace, side_by_side: bool) -> tuple[Launcher, int]:
    """How a trial is trained, and how many at once: several on one machine only where no clock is read."""
    if options.launcher == "ray":
        return trials.on_ray(options.gpus_per_trial), 64  # Ray itself holds back what does not fit
    if side_by_side and options.side_by_side > 1:
        return lambda trial: trials.train(trial, threads=threads(options.side_by_side)), options.side_by_side
    return lambda trial: trials.train(trial, options.processes), 1


def read_curves(path: Path, rows: Iterable[Row] | None = None) -> list[dict[str, Any]]:
    """Lines of `curves_by_run`. rows: of these runs alone, by their clocks: a trial trained again has the name of the first."""
    runs = curves_by_run(path)
    if rows is not None:
        clocks = {(row.arm, row.seed, round(row.train_time, 3)) for row in rows}
        runs = [run for run in runs if (run[-1]["arm"], run[-1]["seed"], run[-1]["train_time"]) in clocks]
    return [line for run in runs for line in run]


def curves_by_run(path: Path) -> list[list[dict[str, Any]]]:
    """Lines of curves.csv by run: training losses, then validations; `steps`: its length. Raises UsageError: a damaged line."""
    number = {"seed": int, "step": int, "tokens": int, "train_time": float, "loss": float}
    runs: list[list[dict[str, Any]]] = []
    for place, cells in enumerate(csv.DictReader(io.StringIO(whole_lines(path))), start=2):
        try:
            line = {key: number.get(key, str)(cells[key]) for key in (*number, "arm", "phase", "kind")}
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{path} line {place} is no point of a curve: delete the line") from None
        last = runs[-1][-1] if runs else {}
        same = all(line[key] == last.get(key) for key in ("arm", "seed", "phase"))
        if not same or (line["kind"] == "train" and (last["kind"] == "val" or line["step"] <= last["step"])):
            runs.append([])
        runs[-1].append(line)
    return [[line | {"steps": max(x["step"] for x in run)} for line in run] for run in runs]
