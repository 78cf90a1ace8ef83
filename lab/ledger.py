"""Ledgers: CSV files with a line for each trial that has ended. `Row` is a line of trials.csv, which compare.py and scaling.py
keep; lab/tuning has lines of its own.
"""

import csv
import dataclasses
import io
import math
import threading
import typing
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.run_folder import atomic_write, now_utc
from engine.spec import UsageError
from lab.trials import DTYPES, Outcome

MOST_APART = 1.0  # hours between runs whose times are compared: later the machine may be another


def to_text(value: Any) -> str:
    """A cell: settings as `lr=0.01 momentum=0.9`, losses as `step:loss step:loss`."""
    if isinstance(value, dict):
        return " ".join(f"{name}={v:g}" for name, v in value.items())
    return " ".join(f"{step}:{loss:.5g}" for step, loss in value) if isinstance(value, list) else str(value)


def from_text(text: str, kind: type) -> Any:
    if kind is bool:
        return text == "True"
    if kind is dict:
        return {name: float(value) for name, value in (word.split("=") for word in text.split())}
    if kind is list:
        return [(int(step), float(loss)) for step, loss in (word.split(":") for word in text.split())]
    return kind(text)


def cells(row: Any) -> dict[str, str]:
    return {f.name: to_text(getattr(row, f.name)) for f in dataclasses.fields(row)}


def read(path: Path, kind: type) -> list[Any]:
    """Its rows; a column with a default may be missing. Raises UsageError: no such ledger, or a damaged line."""
    rows, hints = [], typing.get_type_hints(kind)
    with path.open(newline="", errors="replace") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            wanted = [f.name for f in dataclasses.fields(kind) if f.name in line or f.default is dataclasses.MISSING]
            try:
                rows.append(kind(**{n: from_text(line[n], typing.get_origin(hints[n]) or hints[n]) for n in wanted}))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{path} line {number} is no trial: {error}") from None
    return rows


class Ledger:
    """A file of such lines, written anew with every trial. Safe for threads. kind: a frozen dataclass with `key`, a trial's."""

    def __init__(self, path: Path, kind: type):
        self.path, self.lock = path, threading.RLock()
        self.rows: dict[Hashable, Any] = {row.key: row for row in read(path, kind)} if path.exists() else {}

    def add(self, row: Any) -> None:
        """The same trial again takes the place of the first."""
        with self.lock:
            self.rows[row.key] = row
            text, lines = io.StringIO(), [cells(each) for each in self.rows.values()]
            csv.writer(text, lineterminator="\n").writerows([lines[0].keys(), *(line.values() for line in lines)])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, text.getvalue())


@dataclass(frozen=True)
class Row:
    """One trial, a line of trials.csv. SI units."""

    phase: str  # search or confirm; of a scaling experiment retune, curve or time
    arm: str
    steps: int
    pair: int  # trials of several arms with the same number form a pair
    seed: int
    run: str  # its run folder's name, which ends in the hash of its settings
    status: str  # ok, diverged or crashed
    val_loss: float  # nats per token; inf unless status is ok
    train_time: float
    robust_train_time: float
    process_time: float
    tokens: int
    flops: float
    peak_memory: int
    stalled: bool
    ended: str  # UTC
    machine: str
    commit: str
    source: str
    data: str
    error: str = ""
    dtype: str = ""  # of the matrix products: a value of DTYPES; empty for a crash, and in files from before the column

    @property
    def key(self) -> str:
        return self.run

    @classmethod
    def of(cls, phase: str, outcome: Outcome) -> "Row":
        trial, result = outcome.trial, outcome.result
        about: dict[str, Any] = dict(phase=phase, arm=trial.arm.name, steps=trial.steps, pair=trial.number, seed=trial.seed)
        about |= dict(run=trial.folder.name, val_loss=outcome.loss)
        costs = ("train_time", "robust_train_time", "process_time", "peak_memory")
        if result is None:
            about |= dict.fromkeys((*costs, "tokens", "flops"), 0) | dict.fromkeys(("machine", "commit", "source", "data"), "")
            return cls(**about, status="crashed", stalled=False, ended=now_utc(), error=" ".join(outcome.error.split())[:200])
        env = trial.env()
        about |= {key: result[key] for key in (*costs, "status", "tokens", "stalled")}
        about |= dict(flops=result["flops_per_token"] * result["tokens"], machine=machine(env), data=env["data_fingerprint"])
        commit = (env["commit"] or "unknown")[:12] + ("+" if env["dirty"] else "")
        ended = [event["utc"] for event in trial.log() if event["event"] == "end"]  # long ago, for a run that was there already
        about |= dict(commit=commit, source=env["source_sha256"][:12], dtype=DTYPES[env["dtype"]])
        return cls(**about, ended=(ended or [now_utc()])[-1])


read_rows = partial(read, kind=Row)  # the lines of a trials.csv


def machine(env: dict[str, Any]) -> str:
    """What must be equal for times to be comparable, in one line."""
    unit = env["gpus"][0] if env["gpus"] else f"{env['threads']} threads"
    ranks = f"{env['world_size']}{'' if env['gpus'] else ' rank(s)'}"
    return f"{env['cpu']}, {env['cpu_count']} cores, {ranks} x {unit}, torch {env['torch']}"


def compute_type(rows: Iterable[Any]) -> str:
    """The one compute type of trials; empty if no row says it. Of 356 pairs of trials, one in fp32 and one in bf16, half ended
    at least 0.008 nats apart and a tenth over 0.1. Raises UsageError: there are several."""
    types = sorted({row.dtype for row in rows} - {""})
    if len(types) > 1:
        instead = "or give the trainer --dtype fp32, which every machine has, and choose another --out"
        why = f"trials are in {' and in '.join(types)}, and their losses do not compare"
        raise UsageError(f"{why}: go on on a machine like the one before, {instead}")
    return "".join(types)


def moment(text: str) -> datetime:
    """A time of day as logs and tables have it: UTC."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")


def hours_apart(rows: Iterable[Row]) -> float:
    """The longest pause from the end of a run to the start of the next; 0 for a run alone, or without the time of day."""
    ran = sorted((moment(row.ended), row.train_time) for row in rows if row.ended)
    return max([0.0, *((end - before).total_seconds() - seconds for (before, _), (end, seconds) in pairwise(ran))]) / 3600


def turns_apart(rows: Iterable[Row], phase: str = "confirm") -> list[dict[str, Any]]:
    """The turns (runs of all arms on one seed) with a pause of over an hour: their times are not to be compared."""
    ended = [row for row in rows if row.phase == phase and math.isfinite(row.val_loss)]
    hours = {pair: hours_apart(row for row in ended if row.pair == pair) for pair in sorted({row.pair for row in ended})}
    return [{"pair": pair, "hours": round(apart, 2)} for pair, apart in hours.items() if apart > MOST_APART]
