"""Speed-ups from a table of published losses, by curves through the base's: `./run.sh scaling fit`.

    python scaling.py fit --losses wen2025_best.csv                     every optimizer, size and ratio against AdamW
    python scaling.py fit --losses wen2025_best.csv --at 7B             and what the trend over sizes says of a larger one

The table has the columns optimizer, size, chinchilla (tokens: a ratio or a number) and best_loss; others are ignored.
"""

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.command import Parser
from engine.spec import UsageError, nearest
from lab.markdown import table
from lab.scaling.curves import Noise, PowerLaw, Speedup, bootstrap, fit, speedup
from lab.scaling.ladder import size_of
from lab.scaling.trend import trend

COLUMNS = ("optimizer", "size", "chinchilla", "best_loss")
# By how much a loss varies between seeds, nats, which one loss per setting does not show: the NanoGPT speedrun's repeated runs
# showed 0.0013 for Muon and its relatives, 0.0025 for tuned AdamW.
NOISE = Noise(0.002, math.inf)
Key = tuple[str, str, float]  # optimizer, size, ratio


def read_losses(path: Path) -> dict[Key, float]:
    """The finite losses, sorted. Raises UsageError: a missing file or column, no number in a cell, a line that comes twice."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise UsageError(f"{path} has no column {missing[0]!r}: wanted are {', '.join(COLUMNS)}")
    losses: dict[Key, float] = {}
    for number, cells in enumerate(lines, start=2):
        try:
            key, loss = (cells["optimizer"], cells["size"], float(cells["chinchilla"])), float(cells["best_loss"])
        except (TypeError, ValueError):
            raise UsageError(f"{path} line {number}: chinchilla and best_loss must be numbers") from None
        if not (size_of(key[1]) and key[2] > 0) or math.isnan(loss):
            raise UsageError(f"{path} line {number}: chinchilla must be above 0 and best_loss a number")
        if key in losses:
            raise UsageError(f"{path} line {number}: {' '.join(map(str, key))} comes twice")
        losses[key] = loss
    if not losses:
        raise UsageError(f"{path} is empty")
    by_size = sorted(losses, key=lambda key: (key[0], size_of(key[1]), key[2]))
    return {key: losses[key] for key in by_size if math.isfinite(losses[key])}


def of_base(losses: dict[Key, float], base: str, size: str, ratios: Sequence[float] = ()) -> tuple[list[float], list[float]]:
    """The base's ratios and losses at a size; ratios: only these."""
    points = [(r, loss) for (name, at, r), loss in losses.items() if (name, at) == (base, size) and (not ratios or r in ratios)]
    return [ratio for ratio, _ in points], [loss for _, loss in points]


def base_curves(losses: dict[Key, float], base: str, ratios: Sequence[float]) -> dict[str, PowerLaw]:
    """By size, through the base's losses at `ratios` if it has two of them. Raises UsageError: no such optimizer or size."""
    names = {name for name, _, _ in losses}
    if base not in names:
        raise UsageError(f"--base {base}: {nearest(base, names)}")
    points = {size: of_base(losses, base, size, ratios) for name, size, _ in losses if name == base}
    curves = {size: curve for size, of in points.items() if len(of[0]) > 1 and (curve := fit(*of))}
    if not curves:
        raise UsageError(f"{base} has no size with losses at two of the ratios {', '.join(f'{r:g}' for r in ratios)}")
    return curves


def speedups(losses: dict[Key, float], base: str, ratios: Sequence[float]) -> dict[Key, Speedup]:
    """Of every loss at a size where the base has a curve, except its own. Raises as `base_curves`."""
    curves = base_curves(losses, base, ratios)
    return {
        (name, size, ratio): speedup(curves[size], *of_base(losses, base, size), loss, ratio)
        for (name, size, ratio), loss in losses.items()
        if name != base and size in curves
    }


def verdicts(
    losses: dict[Key, float], gains: dict[Key, Speedup], base: str, ratios: Sequence[float], at: float
) -> Iterator[str]:
    """A line for each optimizer whose speed-up at the first ratio lies inside the base's range at two or more sizes."""
    for name in dict.fromkeys(name for name, _, _ in gains):
        keys = [key for key, gain in gains.items() if (key[0], key[2]) == (name, ratios[0]) and gain.inside]
        if len(keys) > 1:
            draws = [
                bootstrap(PowerLaw, *of_base(losses, base, key[1], ratios), ratios[0], [losses[key]], NOISE, seed)
                for seed, key in enumerate(keys)
            ]
            sizes = [size_of(size) for _, size, _ in keys]
            yield f"{name}: {trend(sizes, [gains[key].ratio for key in keys], np.stack(draws, 1), at, seeds=1).words()}"


def fit_table(argv: list[str]) -> str:
    """What `scaling.py fit` prints. Raises UsageError: bad flags or a bad table."""
    parser = Parser(
        prog="scaling.py fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--losses", type=Path, required=True, help="CSV file: optimizer, size, chinchilla, best_loss")
    add("--base", default="adamw", help="optimizer that the others are set against (default: adamw)")
    add("--ratios", type=float, nargs="+", default=[1, 2, 4, 8], help="of the base's curves (default: 1 2 4 8)")
    add("--at", help="size at which to judge each optimizer by its trend at the first ratio, such as 7B")
    options = parser.parse_args(argv)
    losses = read_losses(options.losses)
    gains = speedups(losses, options.base, options.ratios)
    rows = [
        (name, size, f"{ratio:g}", f"{losses[name, size, ratio]:.4f}", gain.words(),
         f"{gain.between:.2f}x" if math.isfinite(gain.between) else "-",
         "" if gain.inside else f"extrapolated: {gain.ratio:.2f}x")
        for (name, size, ratio), gain in gains.items()
    ]  # fmt: skip
    lines = [
        f"Speed-up = tokens that {options.base} needs for the same loss / tokens used, by the curve alpha D^-exponent + floor",
        "through its losses; between: by straight lines in log tokens instead.",
        "",
        table(("optimizer", "size", "ratio", "loss", "speed-up", "between", "beyond the fit"), rows),
    ]
    if options.at:
        judged = [*verdicts(losses, gains, options.base, options.ratios, size_of(options.at))]
        lines += ["", *(judged or ["not decided: a trend needs speed-ups at two sizes"])]
    return "\n".join(lines)
