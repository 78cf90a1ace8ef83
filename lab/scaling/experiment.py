"""What a command of scaling.py asks for: its options, the sizes, the arms, and every run that is known before the first."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from engine.command import Parser
from engine.spec import UsageError, nearest
from lab import runner
from lab.ledger import Row
from lab.scaling import ladder, survival
from lab.scaling.ladder import LADDERS, RETUNE_SEED, TIME_PAIRS, TIME_SEED, Cell, Rung, Size, size_of

DESCRIBED = ("ladder", "base", "lr_transfer", "tokens_per_parameter", "flags", "command", "at", "seeds", "hold_out")
Factors = dict[tuple[Rung, str], float]  # on the learning rate, by size and arm


@dataclass(frozen=True)
class Experiment:
    """A ladder's rungs, and the arms with their flags, the base first."""

    ratio: float  # tokens per parameter
    rungs: tuple[Rung, ...]
    arms: dict[str, tuple[str, ...]]
    options: argparse.Namespace

    @property
    def base(self) -> str:
        return next(iter(self.arms))

    def described(self) -> dict[str, Any]:
        """As scaling.json has it."""
        options = vars(self.options) | {"tokens_per_parameter": self.ratio, "flags": list(self.options.flags)}
        options["at"] = size_of(self.options.at) if self.options.at else 10 * self.rungs[-1].parameters
        about = {key: options[key] for key in DESCRIBED}
        return about | {"sizes": [rung.described() for rung in self.rungs], "arms": list(self.arms)}

    def cell(self, phase: str, name: str, rung: Rung, budget: float = 1, factor: float = 1.0) -> Cell:
        arm = ladder.at_size(name, self.arms[name], rung, self.options.lr_transfer, factor)
        steps = self.options.timing_steps if phase == "time" else rung.steps(budget)
        return Cell(phase, name, rung, budget, factor, steps, arm)

    def seeds(self, phase: str) -> range:
        """Of the runs of each cell."""
        first, count = {"retune": (RETUNE_SEED, 1), "curve": (0, self.options.seeds), "time": (TIME_SEED, TIME_PAIRS)}[phase]
        return range(first, first + count)

    def retunes(self) -> list[Cell]:
        factors = ladder.retune_factors(self.options.retune) if self.options.retune > 1 else []
        return [self.cell("retune", name, rung, 1, f) for rung in self.rungs for f in factors for name in self.arms]

    def best_factors(self, retunes: Sequence[Cell], rows: Sequence[Row]) -> Factors:
        """Of the re-tune; 1 without one. Raises UsageError: the base diverged at all of them."""
        best = {}
        for rung, name in product(self.rungs, self.arms):
            tuned = survival.retuned([c.described() for c in retunes if (c.name, c.rung) == (name, rung)], rows)
            best[rung, name] = tuned["best"] if tuned else 1.0
            if tuned and name == self.base and not math.isfinite(min(tuned["losses"].values())):
                raise survival.all_failed(len(tuned["losses"]), name, rung.size.name)
        return best

    def curves(self, factors: Factors) -> list[Cell]:
        wanted = product(self.rungs, sorted(self.options.budgets), self.arms)
        return [self.cell("curve", name, r, b, factors[r, name]) for r, b, name in wanted if b == 1 or name == self.base]

    def timings(self, factors: Factors) -> list[Cell]:
        return [self.cell("time", name, rung, 1, f) for (rung, name), f in factors.items() if self.options.timing_steps]

    def planned(self) -> list[Cell]:
        """Every cell, as far as they are known before the first run."""
        once = dict.fromkeys(product(self.rungs, self.arms), 1.0)
        return [*self.retunes(), *self.curves(once), *self.timings(once)]


def make(options: argparse.Namespace, sizes: Sequence[Size] = ()) -> Experiment:
    """sizes: instead of the command's. Raises UsageError: unknown ladder, size or trick; what the trainer refuses."""
    if options.ladder not in LADDERS:
        raise UsageError(f"--ladder {options.ladder}: {nearest(options.ladder, LADDERS)}")
    of = LADDERS[options.ladder]
    sizes = sizes or (ladder.own_sizes(options.sizes, of) if options.sizes else of.sizes)
    common = ("--track", of.track, *options.flags, *ladder.LAST_ONLY)
    base = ("--tricks", options.base, *common)
    arms = {options.base: base} | {f"+{word}": (*ladder.trick_flags(options.base, word), *common) for word in options.tricks}
    if len(arms) <= len(options.tricks):
        raise UsageError("the same trick twice: name each once")
    ratio = options.tokens_per_parameter or of.tokens_per_parameter
    return Experiment(ratio, tuple(ladder.rung(size, of, ratio, base) for size in sizes), arms, options)


def parser(about: str) -> argparse.ArgumentParser:
    made = Parser(description=about)
    add = made.add_argument
    add("--tricks", nargs="+", default=[], metavar="TRICK", help="tricks or optimizer SPECs, each tried alone on the base")
    add("--base", default="modern", help="recipe or comma-separated tricks to compare with (default: modern)")
    add("--ladder", default="cpu", help=f"{' or '.join(LADDERS)} (default: cpu)")
    add("--sizes", nargs="+", default=[], help="such as 0.3M 0.8M (default: the ladder's)")
    add("--tokens-per-parameter", type=float, default=0, help="at budget 1, non-embedding (default: the ladder's)")
    add("--budgets", type=float, nargs="+", default=[0.5, 1, 2], help="of the base; a trick has budget 1 (default: 0.5 1 2)")
    add("--most-budget", type=float, default=4, help="double the base's budgets up to this to meet a trick's loss (default: 4)")
    add("--seeds", type=int, default=3, help="runs at each point (default: 3)")
    add("--lr-transfer", default="mup", help="learning rate by width: mup, power:EXPONENT or none (default: mup)")
    add("--retune", type=int, default=3, help="learning rates tried at every size, in factors of 2; 1: no tuning (default: 3)")
    add("--timing-steps", type=int, default=20, help="steps of the runs that measure seconds per token; 0: none (default: 20)")
    add("--at", default="", help="size to predict for (default: 10 x the largest)")
    add("--hold-out", type=int, default=1, help="number of largest sizes that the smaller ones must predict (default: 1)")
    add("--plan", action="store_true", help="print runs, tokens, FLOPs, memory, hours and cost, and stop")
    add("--hardware", default="here", help="for --plan: such as 8xH100, or here (default)")
    add("--price", type=float, default=0, help="for --plan: dollars per GPU and hour (default: by engine/hardware.py)")
    add("--report", type=Path, metavar="FOLDER", help="rewrite a folder's report from its trials")
    add("--side-by-side", type=int, default=1, help="trials at once, sharing the cores; timing is one at a time (default: 1)")
    runner.add_launcher_flags(made)
    add("--out", type=Path, help="output folder (default: scaling/<ladder>-<base>)")
    return made


def parse(argv: list[str], about: str = "") -> argparse.Namespace:
    """Command line -> options; about: what --help says first. Raises UsageError: an unknown flag or a value out of range."""
    options = runner.read_options(parser(about), argv)
    if not options.report and not options.tricks:
        raise UsageError("scale what? --tricks muon soap ... (see --help)")
    runner.at_least(options, seeds=2, retune=1, timing_steps=0, hold_out=0, side_by_side=1, processes=1, tokens_per_parameter=0)
    given = options.budgets
    if len(set(given)) < max(2, len(given)) or not all(0 < budget < math.inf for budget in given) or 1 not in given:
        raise UsageError(f"--budgets takes at least two different numbers above 0, one of them 1; not {given}")
    return options
