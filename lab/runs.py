"""Run folders: list them, compare two, watch those in progress.

python -m lab.runs                                 all in runs/, the newest first
python -m lab.runs tiny                            those whose path contains a word
python -m lab.runs diff runs/tiny/a runs/tiny/b    settings and results that differ
python -m lab.runs watch [DIR]                     runs in progress, redrawn every two seconds (./run.sh watch)
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.command import Answer, Parser, command
from engine.run_folder import found, read_json
from engine.spec import UsageError
from lab.markdown import table

LIVE = 120  # seconds since its log was written in which a run counts as in progress
LAST = 200_000  # bytes of a log that are read: thousands of steps


@dataclass(frozen=True)
class Seen:
    """A run, by its log alone."""

    run: str
    state: str  # training, stopped, or the status of its end
    step: int
    steps: int  # 0: not known
    loss: float | None  # of the last validation, or of the last step if there was none
    seconds: float  # trained
    left: float  # seconds to its end, at the pace so far; nan: not known
    written: float  # when its log was
    losses: tuple[float, ...]


def see(folder: Path) -> Seen:
    """Lines that are no JSON are passed over: the last one may be half written."""
    path, events = folder / "log.jsonl", []
    written = path.stat().st_mtime
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                events.append(json.loads(line))
    events = [event for event in events if isinstance(event, dict)]
    train, vals = ([event for event in events if event.get("event") == kind] for kind in ("train", "val"))
    losses = [event.get("loss") or math.nan for event in train]
    val = vals[-1].get("loss") if vals else None
    step = next((event["step"] for event in reversed(events) if event.get("step")), 0)
    seconds = next((event["train_time"] for event in reversed(train) if event.get("train_time")), 0.0)
    try:
        config = read_json(folder / "config.json")
        steps, whole = int(config.get("steps") or 0), 60 * float(config.get("minutes") or 0)
    except (OSError, UsageError, ArithmeticError, ValueError, TypeError):
        steps = whole = 0
    left = whole - seconds if whole else seconds / step * (steps - step) if step and steps else math.nan
    state = "training" if time.time() - written < LIVE else "stopped"
    if events and events[-1].get("event") == "end":
        state = str(events[-1].get("status"))
    loss = val if val is not None else losses[-1] if losses else None
    return Seen(str(folder), state, int(step), 0 if whole else steps, loss, float(seconds), left, written, tuple(losses))


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def listed(runs: Sequence[Seen], live: bool = False) -> Answer:
    """A table for a terminal."""
    rows = []
    for r in runs:
        steps, loss = f"{r.step}/{r.steps}" if r.steps else str(r.step), "-" if r.loss is None else f"{r.loss:.4f}"
        when = duration(r.left) if live else time.strftime("%Y-%m-%d %H:%M", time.localtime(r.written))
        rows.append((r.run, r.state, steps, loss, duration(r.seconds), when))
    data = [{key: value for key, value in asdict(r).items() if key not in ("left", "losses")} for r in runs]
    return Answer(table(["run", "state", "step", "loss", "time", "left" if live else "ended"], rows, aligned=True), data)


def differences(first: Path, second: Path) -> Answer:
    """Settings and results that two runs do not share. Raises UsageError: one of them is no run."""
    different = {}
    for name in ("config.json", "result.json"):
        sides = [flat(read_json(path)) if (path := folder / name).exists() else {} for folder in (first, second)]
        if name == "config.json" and not all(sides):
            raise UsageError(f"{(first, second)[bool(sides[0])]} is no run: it has no config.json")
        keys = dict.fromkeys([*sides[0], *sides[1]])
        different |= {k: [side.get(k, "-") for side in sides] for k in keys if sides[0].get(k) != sides[1].get(k)}
    rows = [(key, *map(str, values)) for key, values in different.items()]
    words = table(("", str(first), str(second)), rows, aligned=True) if rows else "the same settings and results"
    return Answer(words, different)


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    items: dict[str, Any] = {}
    for key, value in values.items():
        items |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return items


def in_progress(root: Path) -> Answer:
    live = [run for run in map(see, found(root)) if run.state == "training"]
    return listed(live, live=True) if live else Answer(f"no run in progress in {root}", [])


def run(argv: list[str]) -> Answer:
    flags = Parser(prog="runs", description=__doc__)
    flags.add_argument("words", nargs="*", metavar="WORD", help="list: words of the path; diff A B; watch [DIR]")
    flags.add_argument("--root", type=Path, default=Path("runs"), help="folder to look in (default: runs)")
    options = flags.parse_args(argv)
    verb, *rest = options.words or [""]
    if verb == "diff":
        if len(rest) != 2:
            raise UsageError("diff takes two run folders: ./run.sh runs diff A B")
        return differences(*map(Path, rest))
    if verb == "watch":
        root, clear = Path(rest[0]) if rest else options.root, "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
        while not options.json:
            print(clear + in_progress(root), flush=True)
            time.sleep(2)
        return in_progress(root)
    runs = [r for r in map(see, found(options.root)) if all(word in r.run for word in options.words)]
    if not runs:
        raise UsageError(f"no run in {options.root}" + (f" with {' and '.join(options.words)}" if options.words else ""))
    return listed(runs)


if __name__ == "__main__":
    sys.exit(command("runs", lambda: run(sys.argv[1:]), sys.argv))
