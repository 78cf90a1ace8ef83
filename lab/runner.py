"""Running the trials of an experiment: each once, whatever interrupts it, and what they leave in the output folder."""

import argparse
import csv
import dataclasses
import errno
import json
import math
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.run_folder import atomic_write, source_hash
from engine.spec import UsageError
from lab import trials
from lab.comparison import MOST_APART, Ledger, Row, compute_type, hours_apart, hours_since, read_rows
from lab.trials import Arm, Launcher, Trial

POINTS = 100  # of the training loss that are kept of a trial, at most


class Runner:
    """Runs the trials of an experiment and keeps what they leave: rows in trials.csv, thinned loss curves in curves.csv."""

    def __init__(self, out: Path, keep_checkpoints: bool, points: int = POINTS):
        self.out, self.keep_checkpoints, self.points = out, keep_checkpoints, points
        self.ledger, self.lock = Ledger(out), threading.Lock()
        self.seconds: dict[str, float] = {}  # arm -> of one step, as last seen
        self.interrupted = threading.Event()

    def find(self, trial: Trial) -> Row | None:
        """The row of a trial that has ended, unless the trainer's code has changed since."""
        row = self.ledger.rows.get(trial.folder.name)
        return row if row and row.source in ("", source_hash()[:12]) else None

    def ended(self, trial: Trial) -> Row | None:
        """The row of a trial that has ended without a crash, here or, by its run folder, in another experiment."""
        row = self.find(trial)
        if row is None or row.status == "crashed":
            return Row.of("", trials.Outcome(trial, trial.result)) if trial.result else None
        return row

    def anew(self, trial: Trial) -> Trial:
        """The trial, to be trained though it has ended."""
        self.ledger.rows.pop(trial.folder.name, None)
        return dataclasses.replace(trial, extra=trials.ANEW)

    def rows(self, arms: Iterable[Arm]) -> tuple[list[Row], list[str]]:
        """The rows of these arms as they are set and coded now; and the runs that bear an arm's name but are of other settings
        or other code."""
        named = {arm.name: arm for arm in arms}

        def current(row: Row) -> bool:
            try:
                return self.find(Trial(named[row.arm], row.steps, row.pair)) is row
            except UsageError:  # a length that the arm as it is set now cannot have
                return False

        own = [(row, current(row)) for row in self.ledger.rows.values() if row.arm in named]
        return [row for row, kept in own if kept], [row.run for row, kept in own if not kept]

    def run(self, phase: str, trial: Trial, launch: Launcher) -> Row:
        """The trial's row, trained if it is not there. A trial that crashed in an earlier session is tried again.

        Raises:
            UsageError: it is of another compute type than those that are there.
        """
        row = self.find(trial)
        if row is None or row.status == "crashed":
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            outcome = launch(trial)
            row = Row.of(phase, outcome)
            compute_type([*(r for r in self.ledger.rows.values() if r.source == row.source), row])
            if outcome.result is not None:
                self.keep_curve(row, trial)
                if "--branch" not in trial.extra:
                    self.drop_checkpoints(trial)
            self.ledger.add(row)
        self.seconds[trial.arm.name] = row.train_time / max(1, row.steps)
        return row

    def drop_checkpoints(self, trial: Trial) -> None:
        """They are of use for sampling and resuming alone, and large."""
        if not self.keep_checkpoints:
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)

    def run_all(self, phase: str, wanted: Sequence[Trial], launch: Launcher, at_once: int) -> list[Row]:
        """The rows of all, in their order; those that are not there are trained, started in that order."""
        left = [trial for trial in wanted if (row := self.find(trial)) is None or row.status == "crashed"]
        if len(left) < len(wanted):
            print(f"{len(wanted) - len(left)} of {len(wanted)} trials to {phase} are there already", flush=True)
        bar = tqdm(total=len(left), unit="trial", desc=phase, disable=not sys.stderr.isatty())
        rows: dict[str, Row] = {}

        def launched(trial: Trial) -> trials.Outcome:
            rows[trial.folder.name] = self.run(phase, trial, launch)
            return trials.Outcome(trial, None)

        for count, outcome in enumerate(trials.in_turn(left, launched, at_once), start=1):
            row = rows[outcome.trial.folder.name]
            rest = sum(self.seconds.get(t.arm.name, 0.0) * t.steps for t in left[count:]) / at_once
            loss = f"{row.val_loss:.4f}" if row.status == "ok" else f"{row.status} {row.error}"
            say(bar, f"{phase} {row.arm}: {row.steps} steps, seed {row.seed}: {loss}, {row.train_time:.1f} s; "
                     f"{len(left) - count} left, about {rest / 60:.0f} min")  # fmt: skip
        bar.close()
        return [self.ledger.rows[trial.folder.name] for trial in wanted]

    def run_turns(self, phase: str, turns: Sequence[Sequence[Trial]], launch: Launcher, at_once: int) -> None:
        """`run_all`, one turn after the other. Times are compared within a turn: unless all of one have ended, and together,
        those that ended over an hour ago are trained again."""
        wanted = []
        for turn in turns:
            rows = [self.ended(trial) for trial in turn]
            together = all(rows) and hours_apart(rows) <= MOST_APART
            old = [not together and row is not None and hours_since(row.ended) > MOST_APART for row in rows]
            wanted += [self.anew(trial) if is_old else trial for trial, is_old in zip(turn, old, strict=True)]
        if again := sum(trial.extra == trials.ANEW for trial in wanted):
            print(f"{again} trials ended over an hour ago, others of their turns did not: they are trained again", flush=True)
        self.run_all(phase, wanted, launch, at_once)

    def keep_curve(self, row: Row, trial: Trial) -> None:
        """Append to curves.csv: validation losses, and means of the training loss over spans of steps."""
        lines, events = [], trial.log()
        train = [e for e in events if e["event"] == "train"]
        span = max(1, math.ceil(len(train) / self.points))
        for start in range(0, len(train), span):
            piece = train[start : start + span]
            mean = sum(e["loss"] for e in piece) / len(piece)
            lines.append((row.arm, row.seed, row.phase, "train", piece[-1]["step"], piece[-1]["tokens"],
                          round(piece[-1]["train_time"], 3), round(mean, 4)))  # fmt: skip
        for e in events:
            if e["event"] == "val" and e["loss"] is not None:
                lines.append((row.arm, row.seed, row.phase, "val", e["step"], e["tokens"], round(e["train_time"], 3),
                              round(e["loss"], 5)))  # fmt: skip
        with self.lock:
            path = self.out / "curves.csv"
            self.out.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(("arm", "seed", "phase", "kind", "step", "tokens", "train_time", "loss"))
                writer.writerows(lines)


def command(name: str, work: Callable[[], str]) -> int:
    """Print what `work` returns; its exit code. What the user can mend is one line: bad words, a full disk, an interruption."""
    try:
        print(work())
        return 0
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{name}: no space left on the disk; finished trials are kept: free some and run this again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; finished trials are kept: the same command continues", file=sys.stderr)
        return 130


def read_options(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Command line -> options; `flags` is what stood after `--`, for the trainer, `command` the whole."""
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:cut])
    options.flags, options.command = tuple(argv[cut + 1 :]), shlex.join(argv)
    return options


def at_least(options: argparse.Namespace, **least: float) -> None:
    """
    Raises:
        UsageError: an option is below its least value.
    """
    for name, value in least.items():
        if getattr(options, name) < value:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(options, name)}")


def check_folder(out: Path, file: str, settings: dict[str, Any]) -> None:
    """May an experiment with these settings, whose report is `file`, be kept in this folder?

    Raises:
        UsageError: it holds another one, or something else.
    """
    if (out / file).exists():
        there = json.loads((out / file).read_text())
        for key, value in settings.items():
            if there.get(key) != value:
                raise UsageError(f"{out} holds a {file} with {key} {there.get(key)!r}, not {value!r}: choose another --out")
    elif out.exists() and any(p.name != "lock" for p in out.iterdir()) and not (out / "trials.csv").exists():
        raise UsageError(f"{out} is not empty and holds no {file}: choose another --out")


def write_report(out: Path, file: str, summary: dict[str, Any], text: str) -> None:
    """The summary as JSON, and the README that says the same in words."""
    if left_out := summary.get("left_out"):
        print(f"{len(left_out)} trials in this folder are of other settings or other code: left out", flush=True)
    atomic_write(out / file, json.dumps(summary, indent=1) + "\n")
    atomic_write(out / "README.md", text)


def read_report(folder: Path, file: str) -> tuple[dict[str, Any], list[Row]]:
    """Summary and trials of an experiment.

    Raises:
        UsageError: the folder holds none.
    """
    try:
        return json.loads((folder / file).read_text()), read_rows(folder / "trials.csv")
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no experiment: {Path(error.filename).name} is missing") from None


def say(bar: tqdm, line: str) -> None:
    bar.update()
    bar.write(line) if not bar.disable else print(line, flush=True)


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Where trials run."""
    add = parser.add_argument
    add("--processes", type=int, default=1, help="ranks of a trial, by torchrun (default: 1)")
    add("--launcher", choices=("local", "ray"), default="local", help="where trials run (default: local)")
    add("--gpus-per-trial", type=float, default=0, help="with --launcher ray (default: 0, one CPU)")
    add("--ray-address", default="auto", help="with --launcher ray (default: auto)")


def make_launcher(options: argparse.Namespace, side_by_side: bool) -> tuple[Launcher, int]:
    """How a trial is trained, and how many at once: several on one machine only where no clock is read."""
    if options.launcher == "ray":
        return trials.on_ray(options.gpus_per_trial, options.ray_address), 64  # Ray itself holds back what does not fit
    if side_by_side and options.side_by_side > 1:
        threads = max(1, (os.cpu_count() or 1) // options.side_by_side)
        return lambda trial: trials.train(trial, threads=threads), options.side_by_side
    return lambda trial: trials.train(trial, options.processes), 1


def read_curves(path: Path, rows: Iterable[Row] | None = None) -> list[dict[str, Any]]:
    """Lines of curves.csv; `steps` is the length of the run that a line belongs to, whose lines stand together.

    rows: the runs wanted (default: all); by their clocks, since a trial trained again has the name of the first.
    """
    if not path.exists():
        return []
    number: dict[str, Callable[[str], Any]] = {"seed": int, "step": int, "tokens": int, "train_time": float, "loss": float}
    with path.open(newline="") as file:
        lines = [{k: number.get(k, str)(v) for k, v in line.items()} for line in csv.DictReader(file)]
    runs: list[list[dict[str, Any]]] = []
    for line in lines:
        last = runs[-1][-1] if runs else None
        if (
            last is None
            or any(line[key] != last[key] for key in ("arm", "seed", "phase"))
            or (line["kind"] == "train" and (last["kind"] == "val" or line["step"] <= last["step"]))
        ):
            runs.append([])
        runs[-1].append(line)
    if rows is not None:
        clocks = {(row.arm, row.seed, round(row.train_time, 3)) for row in rows}
        runs = [run for run in runs if (run[-1]["arm"], run[-1]["seed"], run[-1]["train_time"]) in clocks]
    return [line | {"steps": max(x["step"] for x in run)} for run in runs for line in run]
