"""Speed-ups from a table of published losses, by curves through the base's: `./run.sh scaling fit`.

    python scaling.py fit --losses wen2025_best.csv                     every optimizer, size and ratio against AdamW
    python scaling.py fit --losses wen2025_best.csv --at 7B             and what the trend over sizes says of a larger one

The table has the columns optimizer, size, chinchilla (tokens, as a ratio or in numbers) and best_loss; others are left alone.
One loss a setting has no variance: --noise says what a loss varies by between seeds. Its default is the middle of what the
NanoGPT speedrun's repeated runs showed: 0.0013 for Muon and its relatives, 0.0025 for tuned AdamW.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.spec import UsageError, nearest
from lab.markdown import table
from lab.scaling import laws as scaling_laws
from lab.scaling.ladder import size_of
from lab.scaling.laws import Noise, bootstrap, fit, speedup


@dataclass(frozen=True)
class Published:
    """One line of a table of losses."""

    optimizer: str
    size: str
    ratio: float
    loss: float


COLUMNS = ("optimizer", "size", "chinchilla", "best_loss")


def read_losses(path: Path) -> list[Published]:
    """A CSV file with the columns optimizer, size, chinchilla (the ratio of tokens to Chinchilla's, or tokens) and best_loss;
    others are left alone.

    Raises:
        UsageError: missing file or column, a cell that is no number, a line that comes twice.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            head, lines = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is no CSV file: {error}") from None
    if missing := [name for name in COLUMNS if name not in head]:
        raise UsageError(f"{path} has no column {missing[0]!r}: wanted are {', '.join(COLUMNS)}")
    rows, seen = [], set()
    for number, cells in enumerate(lines, start=2):
        try:
            row = Published(cells["optimizer"], cells["size"], float(cells["chinchilla"]), float(cells["best_loss"]))
        except (TypeError, ValueError):
            raise UsageError(f"{path} line {number}: chinchilla and best_loss must be numbers") from None
        size_of(row.size)
        if not row.ratio > 0 or math.isnan(row.loss):
            raise UsageError(f"{path} line {number}: chinchilla must be above 0 and best_loss a number")
        if (key := (row.optimizer, row.size, row.ratio)) in seen:
            raise UsageError(f"{path} line {number}: {' '.join(map(str, key))} comes twice")
        seen.add(key)
        rows.append(row)
    if not rows:
        raise UsageError(f"{path} is empty")
    return rows


def published_speedups(rows: Sequence[Published], base: str, ratios: Sequence[float]) -> dict[str, Any]:
    """Speed-ups over `base` of every line, by curves through the base's losses at `ratios`, for each size that has them.

    Returns:
        `curves`: size -> (curve, amounts, losses); `checks`: (size, ratio, miss in nats) of the base's other ratios;
        `speedups`: (line, Speedup); `left_out`: sizes whose base has too few ratios.
    Raises:
        UsageError: no such optimizer, or at no size two of those ratios.
    """
    names = {row.optimizer for row in rows}
    if base not in names:
        raise UsageError(f"--base {base}: {nearest(base, names)}")
    found: dict[str, Any] = {"curves": {}, "checks": [], "speedups": [], "left_out": []}
    sizes = sorted({row.size for row in rows}, key=size_of)
    for size in sizes:
        own = sorted((r.ratio, r.loss) for r in rows if r.size == size and r.optimizer == base and math.isfinite(r.loss))
        used = [(d, loss) for d, loss in own if d in ratios]
        curve = fit(*zip(*used, strict=True)) if len(used) > 1 else None
        if curve is None:
            found["left_out"].append(size)
            continue
        found["curves"][size] = curve, *zip(*own, strict=True)
        found["checks"] += [(size, d, curve.loss(d) - loss) for d, loss in own if d not in ratios]
    if not found["curves"]:
        raise UsageError(f"{base} has no size with losses at two of the ratios {', '.join(f'{r:g}' for r in ratios)}")
    for row in sorted(rows, key=lambda r: (r.optimizer, size_of(r.size), r.ratio)):
        if row.optimizer != base and row.size in found["curves"] and math.isfinite(row.loss):
            curve, amounts, losses = found["curves"][row.size]
            found["speedups"].append((row, speedup(curve, amounts, losses, row.loss, row.ratio)))
    return found


def text(found: dict[str, Any], base: str) -> str:
    """Curves, the ratios that they were not fitted to, and a line for every optimizer, size and ratio."""
    curves = [
        (size, f"{c.alpha:.4f}", f"{c.exponent:.4f}", f"{c.floor:.4f}", f"{c.least:g}-{c.most:g}", f"{c.rms:.4f}")
        for size, (c, _, _) in found["curves"].items()
    ]
    checks = [f"{size} at {ratio:g}: {miss:+.4f}" for size, ratio, miss in found["checks"]]
    rows = [
        (
            row.optimizer, row.size, f"{row.ratio:g}", f"{row.loss:.4f}", s.words(),
            f"{s.between:.2f}x" if math.isfinite(s.between) else "-", "" if s.inside else f"extrapolated: {s.ratio:.2f}x",
        )
        for row, s in found["speedups"]
    ]  # fmt: skip
    return "\n".join(
        [
            f"loss of {base} = alpha D^-exponent + floor, D in the units of the table:",
            "",
            table(("size", "alpha", "exponent", "floor", "fitted to", "rms"), curves),
            "",
            *([f"beyond the fit, predicted - measured: {'; '.join(checks)}", ""] if checks else []),
            *([f"left out, too few ratios of {base}: {', '.join(found['left_out'])}", ""] if found["left_out"] else []),
            f"tokens that {base} would need for the same loss over those used (between: by straight lines in log tokens):",
            "",
            table(("optimizer", "size", "ratio", "loss", "speed-up", "between", "beyond the fit"), rows),
        ]
    )


def trends(rows: Sequence[Published], found: dict[str, Any], at: float, ratio: float, noise: float, used: Sequence[float]):
    """(optimizer, Trend) of each that has figures inside the base's range at two or more sizes, at one ratio of tokens."""
    inside = [(row, s) for row, s in found["speedups"] if row.ratio == ratio and s.inside]
    for name in dict.fromkeys(row.optimizer for row, _ in inside):
        own = [(row, s) for row, s in inside if row.optimizer == name]
        if len(own) < 2:
            continue
        draws = []
        for row, _ in own:
            _, amounts, losses = found["curves"][row.size]
            points = [(d, loss) for d, loss in zip(amounts, losses, strict=True) if d in used]
            draws.append(bootstrap(*zip(*points, strict=True), row.ratio, [row.loss], Noise(noise, math.inf), seed=len(draws)))
        sizes, ratios = [size_of(row.size) for row, _ in own], [s.ratio for _, s in own]
        yield name, scaling_laws.trend(sizes, ratios, np.stack(draws, 1), at, runs=1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scaling.py fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--losses", type=Path, required=True, help="CSV file: optimizer, size, chinchilla, best_loss")
    parser.add_argument("--base", default="adamw", help="optimizer that the others are set against (default: adamw)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 2, 4, 8], help="of the base, that its curves are fitted "
                        "to; others are a check (default: 1 2 4 8)")  # fmt: skip
    parser.add_argument("--at", help="size at which to judge each optimizer by its trend, such as 7B")
    parser.add_argument("--ratio", type=float, default=1, help="ratio of tokens of that trend (default: 1)")
    parser.add_argument("--noise", type=float, default=0.002, help="sd of a loss between seeds, nats (default: 0.002)")
    options = parser.parse_args(argv)
    try:
        at = size_of(options.at) if options.at else None
        if not options.noise > 0:
            raise UsageError(f"--noise must be above 0, got {options.noise:g}")
        rows = read_losses(options.losses)
        found = published_speedups(rows, options.base, options.ratios)
        print(text(found, options.base))
        if at:
            print()
            judged = list(trends(rows, found, at, options.ratio, options.noise, options.ratios))
            if not judged:
                raise UsageError(f"a trend needs two sizes: at ratio {options.ratio:g} no optimizer has figures at two")
            for name, trend in judged:
                print(f"{name}: {trend.words()}")
        return 0
    except UsageError as error:
        print(f"scaling.py fit: {error}", file=sys.stderr)
        return 2
