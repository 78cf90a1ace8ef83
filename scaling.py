"""Do tricks survive at larger model sizes? Speed-up at each size of a ladder, trend, prediction, verdict.

    python scaling.py --tricks muon soap --plan                         print what it would cost here
    python scaling.py --tricks muon soap                                the `cpu` ladder: 0.1M to 4.2M parameters over bytes
    python scaling.py --base baseline --tricks rope qk_norm relu2 --sizes 0.1M 0.3M 0.8M 1.5M
    python scaling.py --tricks muon --ladder gpt2 --processes 8 --plan --hardware 8xH100
    python scaling.py fit --losses wen2025_best.csv --at 7B             the same arithmetic on published losses

A trick is a name of tricks.py, or an optimizer SPEC. Speed-up = tokens that the base needs for the same loss / tokens that the
trick used. Base and trick train with the same batch, their learning rates moved to each size by the same rule (--lr-transfer)
and then re-tuned with equally many runs (--retune). The base trains at several token budgets (--budgets), and at more if a
trick's loss lies outside. Flags after `--` go to the trainer, for every arm. The same command continues after an
interruption: a trial that has ended is never trained again.

Output: --out (scaling/<ladder>-<base>) with trials.csv, curves.csv, scaling.json, README.md and plots. Exit codes: 0 judged or
planned, 2 the command was wrong or nothing can be said, 130 interrupted.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from config import resolve
from data.shards import Dataset, dataset_folder
from engine.command import Answer, Parser, command
from engine.run_folder import intact, settings_hash
from engine.spec import UsageError, nearest
from lab import plots, runner
from lab.ledger import Row
from lab.scaling import ladder, published, survival
from lab.scaling import report as survival_report
from lab.scaling.ladder import LADDERS, RETUNE_SEED, TIME_PAIRS, TIME_SEED, Cell, Ladder, Rung, size_of, size_words
from lab.scaling.plan import plan

REPORT = "scaling.json"
LEAST_BUDGET = 0.125  # below which the base's curve is not extended
Factors = dict[tuple[Rung, str], float]  # on the learning rate, by size and arm


# ---------------------------------------------------------------- what is to be run


@dataclass(frozen=True)
class Experiment:
    """A ladder, its rungs, and the arms with their flags, the base first."""

    ladder: Ladder
    rungs: tuple[Rung, ...]
    arms: dict[str, tuple[str, ...]]
    options: argparse.Namespace

    @property
    def base(self) -> str:
        return next(iter(self.arms))

    def cell(self, phase: str, name: str, rung: Rung, budget: float = 1, factor: float = 1.0) -> Cell:
        arm = ladder.at_size(name, self.arms[name], rung, self.options.lr_transfer, factor)
        steps = self.options.timing_steps if phase == "time" else rung.steps(budget)
        return Cell(phase, name, rung, budget, factor, steps, arm)

    def retunes(self) -> list[Cell]:
        factors = ladder.retune_factors(self.options.retune, self.options.retune_step) if self.options.retune > 1 else []
        return [self.cell("retune", name, rung, 1, f) for rung in self.rungs for f in factors for name in self.arms]

    def curves(self, factors: Factors) -> list[Cell]:
        wanted = product(self.rungs, sorted(self.options.budgets), self.arms)
        return [self.cell("curve", name, r, b, factors[r, name]) for r, b, name in wanted if b == 1 or name == self.base]

    def timings(self, factors: Factors) -> list[Cell]:
        return [self.cell("time", name, rung, 1, f) for (rung, name), f in factors.items() if self.options.timing_steps]

    def planned(self) -> list[tuple[Cell, int]]:
        """Every cell and its number of runs, as far as they are known before the first run."""
        once = dict.fromkeys(product(self.rungs, self.arms), 1.0)
        counts = {"retune": 1, "curve": self.options.seeds, "time": TIME_PAIRS}
        return [(cell, counts[cell.phase]) for cell in (*self.retunes(), *self.curves(once), *self.timings(once))]

    def train_tokens(self) -> int:
        """Of the corpus. Raises UsageError: it is not prepared here; says how."""
        config, _, _ = resolve(list(self.arms[self.base]))
        return len(Dataset(dataset_folder(config.data_root, config.corpus, config.tokenizer), "train"))


def make_experiment(options: argparse.Namespace) -> Experiment:
    """Raises UsageError: unknown ladder, size or trick; what the trainer, `check_settings` or `check_data` refuses."""
    if options.ladder not in LADDERS:
        raise UsageError(f"--ladder {options.ladder}: {nearest(options.ladder, LADDERS)}")
    of = LADDERS[options.ladder]
    sizes = ladder.own_sizes(options.sizes, of) if options.sizes else of.sizes
    common = ("--track", of.track, *options.flags, *ladder.LAST_ONLY)
    arms = {options.base: ("--tricks", options.base, *common)}
    arms |= {f"+{word}": (*ladder.trick_flags(options.base, word), *common) for word in options.tricks}
    if len(arms) <= len(options.tricks):
        raise UsageError("the same trick twice: name each once")
    ratio = options.tokens_per_parameter or of.tokens_per_parameter
    rungs = tuple(ladder.rung(size, of, ratio, arms[options.base]) for size in sizes)
    experiment = Experiment(of, rungs, arms, options)
    check_settings(experiment)
    check_data(experiment)
    return experiment


def check_settings(experiment: Experiment) -> None:
    """Raises UsageError: two arms have the same settings, or the batch changes within a run, whose steps would then be more
    tokens than the others get."""
    seen: dict[str, str] = {}
    for name in experiment.arms:
        config, model, _ = resolve(experiment.cell("curve", name, experiment.rungs[0]).trial(0).flags)
        if set(config.batch_stages) != {1.0}:
            raise UsageError(f"{name}: --batch-stages are not for a ladder, whose batch is set by size")
        same = seen.setdefault(settings_hash(vars(config) | vars(model), ("tricks",)), name)
        if same != name:
            raise UsageError(f"{name} and {same} are the same settings on this ladder, which sets width, layers, heads")


def check_data(experiment: Experiment) -> None:
    """Raises UsageError: the longest run would see data twice; the corpus is not prepared, unless this is only a plan."""
    options, rung = experiment.options, experiment.rungs[-1]
    try:
        there, most = experiment.train_tokens(), max(options.budgets)
    except UsageError:
        if options.plan:
            return
        raise
    if most * rung.tokens > there:
        ratio = math.floor(100 * there / (most * rung.parameters)) / 100
        wanted = f"{size_words(rung.parameters)} parameters at budget {most:g} want {most * rung.tokens:,.0f} tokens"
        instead = f"--tokens-per-parameter {ratio:g}, smaller --budgets, or fewer sizes"
        raise UsageError(f"no data left: {wanted}, the corpus has {there:,}: {instead}")


# ---------------------------------------------------------------- running


def run(options: argparse.Namespace) -> str:
    """Plan, or run and judge; returns what to print."""
    experiment = make_experiment(options)
    if options.plan:
        ranks = ["--world-size", str(options.processes)] if options.hardware == "here" else []
        return plan(experiment.planned(), ["--hardware", options.hardware, "--gpu-price", str(options.price), *ranks])
    out = options.out or Path("scaling") / f"{options.ladder}-{options.base.replace(',', '+')}"
    ratio = options.tokens_per_parameter or experiment.ladder.tokens_per_parameter
    settings = {"ladder": options.ladder, "base": experiment.base, "lr_transfer": options.lr_transfer}
    settings |= {"tokens_per_parameter": ratio, "flags": list(options.flags)}
    runner.check_folder(out, REPORT, settings)
    return runner.alone_in(out, lambda: measure(experiment, settings, out))


def measure(experiment: Experiment, settings: dict[str, Any], out: Path) -> str:
    """`run` in its output folder: re-tune, curves, further runs of the base where needed, timing; then the report."""
    options = experiment.options
    trainer, seeds = runner.Runner(out, options.keep_checkpoints, ladder.POINTS), range(options.seeds)
    beside, alone = runner.make_launcher(options, side_by_side=True), runner.make_launcher(options, side_by_side=False)

    def trained(phase: str, cells: Sequence[Cell], seeds: Iterable[int]) -> None:
        trainer.run_all(phase, [cell.trial(seed) for seed in seeds for cell in cells], *beside)

    def rows(cells: Iterable[Cell]) -> list[Row]:
        return trainer.rows(cell.arm for cell in cells)[0]

    retunes = experiment.retunes()
    trained("retune", retunes, [RETUNE_SEED])
    factors = best_factors(experiment, retunes, rows(retunes))
    curves = experiment.curves(factors)
    trained("curve", curves, seeds)
    while more := missing_budgets(experiment, curves, rows(curves)):
        trained("curve", more, seeds)
        curves += more
    timed = experiment.timings(factors)
    turns = product(experiment.rungs, range(TIME_SEED, TIME_SEED + TIME_PAIRS))
    trainer.run_turns("time", [[c.trial(seed) for c in timed if c.rung == rung] for rung, seed in turns], *alone)
    cells = [*retunes, *curves, *timed]
    used, left_out = trainer.rows(cell.arm for cell in cells)
    settings |= {"command": options.command, "at": options.at_parameters or 10 * experiment.rungs[-1].parameters}
    settings |= {"seeds": options.seeds, "hold_out": options.hold_out}
    settings |= {"sizes": [rung.described() for rung in experiment.rungs], "arms": list(experiment.arms)}
    settings |= {"left_out": left_out, "cells": [cell.described() for cell in cells]}
    return report(out, survival.summarise(used, settings))


def best_factors(experiment: Experiment, retunes: Sequence[Cell], rows: Sequence[Row]) -> Factors:
    """The best learning-rate factor of the re-tune; 1 without one. Raises UsageError: the base diverged at all of them."""
    factors = {}
    for rung, name in product(experiment.rungs, experiment.arms):
        tried = [cell.described() for cell in retunes if (cell.name, cell.rung) == (name, rung)]
        tuned = survival.retuned(tried, rows)
        factors[rung, name] = tuned["best"] if tuned else 1.0
        if tuned and name == experiment.base and not math.isfinite(min(tuned["losses"].values())):
            raise survival.all_failed(len(tried), name, rung.size.name)
    return factors


def missing_budgets(experiment: Experiment, curves: Sequence[Cell], rows: Sequence[Row]) -> list[Cell]:
    """Further runs of the base: twice its largest budget where a trick's loss is below its losses, half its smallest where one
    is above; none beyond --most-budget, the corpus, or LEAST_BUDGET."""
    there, more = experiment.train_tokens(), []
    losses = defaultdict(list)
    for row in rows:
        if row.phase == "curve" and math.isfinite(row.val_loss):
            losses[row.arm, row.steps].append(row.val_loss)
    means = {cell: statistics.mean(of) for cell in curves if (of := losses[cell.arm.name, cell.steps])}
    for rung in experiment.rungs:
        of_base = [cell for cell in curves if (cell.rung, cell.name) == (rung, experiment.base)]
        base = [means[cell] for cell in of_base if cell in means]
        others = [means[cell] for cell in means if cell.rung == rung and cell.name != experiment.base]
        if not base or not others:
            continue
        up, down = 2 * max(cell.budget for cell in of_base), min(cell.budget for cell in of_base) / 2
        may_double = up <= experiment.options.most_budget and up * rung.tokens <= there
        wanted = [up] * (min(others) < min(base) and may_double) + [down] * (max(others) > max(base) and down >= LEAST_BUDGET)
        more += [experiment.cell("curve", experiment.base, rung, budget, of_base[0].factor) for budget in wanted]
    return more


def report(out: Path, summary: dict[str, Any]) -> Answer:
    """Write scaling.json, README.md, plots; returns the verdict lines. Raises UsageError: nothing can be said of any trick."""
    summary["plots"] = plots.draw_scaling(out, summary)
    runner.write_report(out, REPORT, summary, survival_report.markdown(summary))
    lines = survival_report.verdict_lines(summary)
    if not any(trick["trends"]["tokens"] for trick in summary["tricks"]):
        raise UsageError(f"nothing can be said: {'; '.join(lines)}; trials are kept in {out}")
    return Answer("\n".join(lines), summary)


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
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
    add("--retune", type=int, default=3, help="learning rates that every arm tries at every size; 1: no tuning (default: 3)")
    add("--retune-step", type=float, default=2, help="ratio of neighbouring rates (default: 2)")
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


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> options. Raises UsageError: an unknown flag or a value out of range."""
    options = runner.read_options(parser(), argv)
    if not options.report and not options.tricks:
        raise UsageError("scale what? --tricks muon soap ... (see --help)")
    runner.at_least(options, seeds=2, retune=1, timing_steps=0, hold_out=0, side_by_side=1, processes=1)
    if options.tokens_per_parameter < 0 or not options.retune_step > 1:
        raise UsageError("--tokens-per-parameter must be above 0 and --retune-step above 1")
    given = options.budgets
    if len(set(given)) < max(2, len(given)) or not all(0 < budget < math.inf for budget in given) or 1 not in given:
        raise UsageError(f"--budgets takes at least two different numbers above 0, one of them 1; not {given}")
    ladder.transfer_exponent(options.lr_transfer, "adamw")
    options.at_parameters = size_of(options.at) if options.at else None
    return options


def main(argv: list[str]) -> int:
    def work() -> str:
        if argv[:1] == ["fit"]:
            return published.fit_table(argv[1:])
        options = parse(argv)
        if options.report:
            with intact(options.report / REPORT):
                return report(options.report, survival.again(*runner.read_report(options.report, REPORT)))
        return run(options)

    return command("scaling.py", work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
