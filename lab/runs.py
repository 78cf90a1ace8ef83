"""Run folders: list them, compare two, watch those in progress.

python -m lab.runs                                 all in runs/, the newest first
python -m lab.runs tiny --sort loss                those whose path contains a word, the lowest loss first
python -m lab.runs diff runs/tiny/a runs/tiny/b    settings and results that differ
python -m lab.runs watch [DIR]                     runs in progress, redrawn every two seconds (./run.sh watch)
"""

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

BARS = "▁▂▃▄▅▆▇█"
SORTS = {"new": lambda run: -run.written, "loss": lambda run: run.loss or math.inf, "time": lambda run: run.seconds}
LIVE = 120  # seconds since its log was written in which a run counts as in progress
LAST = 200_000  # bytes of a log that are read: thousands of steps


@dataclass(frozen=True)
class Seen:
    """A run, by its log alone."""

    run: str
    state: str  # training, stopped, or the status of its end
    step: int
    steps: int  # 0: not known
    loss: float | None  # of the last validation, or of the last step where there was none
    seconds: float  # trained
    left: float  # seconds to its end, at the pace so far; nan: not known
    written: float  # when its log was
    losses: tuple[float, ...]


def see(folder: Path) -> Seen:
    """Lines that are no JSON are passed over: the last one may be half written."""
    path = folder / "log.jsonl"
    written, step, seconds, val, losses, state = path.stat().st_mtime, 0, 0.0, None, [], ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST))
        lines = file.read().splitlines()
    for line in lines:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        step = event.get("step") or step
        if kind == "train":
            seconds = event.get("train_time") or seconds
            losses.append(event.get("loss") or math.nan)
            state = ""
        elif kind == "val":
            val = event.get("loss")
        elif kind == "end":
            state = str(event.get("status"))
    try:
        config = read_json(folder / "config.json")
        steps, whole = int(config.get("steps") or 0), 60 * float(config.get("minutes") or 0)
    except (OSError, UsageError, ValueError, TypeError):
        steps = whole = 0
    left = whole - seconds if whole else seconds / step * (steps - step) if step and steps else math.nan
    state = state or ("training" if time.time() - written < LIVE else "stopped")
    loss = val if val is not None else losses[-1] if losses else None
    return Seen(str(folder), state, int(step), 0 if whole else steps, loss, float(seconds), left, written, tuple(losses))


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Means of `width` equal pieces, as bars between the smallest and the largest."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    count = min(width, len(finite))
    pieces = [finite[i * len(finite) // count : (i + 1) * len(finite) // count] for i in range(count)]
    means = [sum(piece) / len(piece) for piece in pieces]
    low, high = min(means), max(means)
    return "".join(BARS[round((m - low) / (high - low or 1) * (len(BARS) - 1))] for m in means)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def listed(runs: Sequence[Seen], live: bool = False) -> Answer:
    """A table for a terminal."""
    head = ["run", "state", "step", "loss", "time"] + (["left", "training loss"] if live else ["ended"])
    rows = []
    for r in runs:
        loss = "-" if r.loss is None else f"{r.loss:.4f}"
        row = [r.run, r.state, f"{r.step}/{r.steps}" if r.steps else str(r.step), loss, duration(r.seconds)]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(r.written))
        rows.append(row + ([duration(r.left), sparkline(r.losses)] if live else [when]))
    data = [{key: value for key, value in asdict(r).items() if key not in ("left", "losses")} for r in runs]
    return Answer(table(head, rows, aligned=True), data)


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
    flags.add_argument("--sort", choices=SORTS, default="new", help="new, loss or time (default: new)")
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
    runs.sort(key=SORTS[options.sort])
    if not runs:
        raise UsageError(f"no run in {options.root}" + (f" with {' and '.join(options.words)}" if options.words else ""))
    return listed(runs)


if __name__ == "__main__":
    sys.exit(command("runs", lambda: run(sys.argv[1:]), sys.argv))
