"""Speed-ups from a table of published losses, by curves through AdamW's, and their trends over model sizes.

    python scaling.py fit --losses wen2025_best.csv --at 7B

The table has the columns optimizer, size, chinchilla (tokens: a ratio) and best_loss; others are ignored.
"""

import csv
import math
from pathlib import Path

import numpy as np

from engine.command import Parser
from engine.spec import UsageError
from lab.markdown import table
from lab.scaling.curves import PowerLaw, Speedup, bootstrap, fit, speedup
from lab.scaling.ladder import size_of
from lab.scaling.trend import trend

BASE, RATIOS = "adamw", (1, 2, 4, 8)  # whose curves, through its losses at these ratios
NOISE = 0.002, math.inf  # as `pooled`: the speedrun's repeated runs had 0.0013 nats (Muon) to 0.0025 (tuned AdamW)
Losses = dict[tuple[str, str, float], float]  # by optimizer, size and ratio


def read_losses(path: Path) -> Losses:
    """The finite losses, sorted. Raises UsageError: a missing file or column, or no number in a cell."""
    try:
        lines = list(csv.DictReader(path.read_text().splitlines()))
        losses = {(s["optimizer"], s["size"], float(s["chinchilla"])): float(s["best_loss"]) for s in lines}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} is no table of losses: {type(error).__name__} {error}") from None
    return {k: losses[k] for k in sorted(losses, key=lambda k: (k[0], size_of(k[1]), k[2])) if math.isfinite(losses[k])}


def of_base(losses: Losses, size: str, every: bool = True) -> tuple[list[float], list[float]]:
    """The base's ratios and losses at a size; every: not only those that its curve goes through."""
    points = {r: loss for (name, at, r), loss in losses.items() if (name, at) == (BASE, size) and (every or r in RATIOS)}
    return list(points), list(points.values())


def speedups(losses: Losses) -> tuple[dict[str, PowerLaw], dict[tuple[str, str, float], Speedup]]:
    """The base's curves by size, and the speed-up of every other loss there. Raises UsageError: there is no curve."""
    points = {size: of_base(losses, size, every=False) for name, size, _ in losses if name == BASE}
    curves = {size: curve for size, of in points.items() if len(of[0]) > 1 and (curve := fit(*of))}
    if not curves:
        raise UsageError(f"{BASE} has no size with losses at two of the ratios {RATIOS}")
    others = {key: loss for key, loss in losses.items() if key[0] != BASE and key[1] in curves}
    return curves, {key: speedup(curves[key[1]], *of_base(losses, key[1]), loss, key[2]) for key, loss in others.items()}


def fit_table(argv: list[str]) -> str:
    """What `scaling.py fit` prints. Raises UsageError: bad flags or a bad table."""
    flags = Parser(prog="scaling.py fit", description=__doc__)
    flags.add_argument("--losses", type=Path, required=True, help="CSV file: optimizer, size, chinchilla, best_loss")
    flags.add_argument("--at", default="", help="size at which to judge each optimizer by its trend at ratio 1, such as 7B")
    options = flags.parse_args(argv)
    losses = read_losses(options.losses)
    gains, rows = speedups(losses)[1], []
    for (name, size, ratio), gain in gains.items():
        between = f"{gain.between:.2f}x" if math.isfinite(gain.between) else "-"
        beyond = "" if gain.inside else f"extrapolated: {gain.ratio:.2f}x"
        rows.append((name, size, f"{ratio:g}", f"{losses[name, size, ratio]:.4f}", gain.words(), between, beyond))
    head = ("optimizer", "size", "ratio", "loss", "speed-up", "between", "beyond the fit")
    lines = [f"Speed-up = tokens that {BASE} needs for the same loss / tokens used, by the curve alpha D^-exponent + floor"]
    lines += ["through its losses; between: by straight lines in log tokens instead.", "", table(head, rows), ""]
    for name in dict.fromkeys(name for name, _, _ in gains if options.at):
        of = {key[1]: gain.ratio for key, gain in gains.items() if (key[0], key[2]) == (name, 1) and gain.inside}
        if len(of) > 1:
            base = {size: of_base(losses, size, every=False) for size in of}
            drawn = [bootstrap(PowerLaw, *base[s], 1, [losses[name, s, 1]], NOISE, i) for i, s in enumerate(of)]
            judged = trend([*map(size_of, of)], [*of.values()], np.stack(drawn, 1), size_of(options.at), seeds=1)
            lines.append(f"{name}: {judged.words()}")
    return "\n".join(lines)
