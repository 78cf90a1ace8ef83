"""Do tricks survive at larger model sizes? Speed-up at each size of a ladder, trend, prediction, verdict.

    python scaling.py --tricks muon soap --plan                         print what it would cost here
    python scaling.py --tricks muon soap                                the `cpu` ladder: 0.1M to 4.2M parameters over bytes
    python scaling.py --base baseline --tricks rope qk_norm relu2 --sizes 0.1M 0.3M 0.8M 1.5M
    python scaling.py --tricks muon --ladder gpt2 --processes 8 --plan --hardware 8xH100
    python scaling.py fit --losses wen2025_best.csv --at 7B             the same arithmetic on published losses

A trick is a name of tricks.py, or an optimizer SPEC. Speed-up = tokens that the base needs for the same loss / tokens that the
trick used. Base and trick train with the same batch, their learning rates moved to each size by the same rule (--lr-transfer)
and then re-tuned with equally many runs (--retune). The base trains at several token budgets (--budgets), and at more if a
trick's loss lies outside. Flags after `--` go to the trainer, for every arm. The same command continues after an interruption.

Output: --out (scaling/<ladder>-<base>) with trials.csv, curves.csv, scaling.json, README.md and plots. Exit codes: 0 judged or
planned, 2 the command was wrong or nothing can be said, 130 interrupted.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from config import resolve
from data.shards import Dataset, dataset_folder
from engine.command import Answer, command
from engine.run_folder import intact, settings_hash
from engine.spec import UsageError
from lab import plots, runner
from lab.ledger import Row
from lab.scaling import ladder, published, survival
from lab.scaling import report as survival_report
from lab.scaling.experiment import Experiment, make, parse
from lab.scaling.ladder import Cell, size_words
from lab.scaling.plan import plan

REPORT = "scaling.json"
LEAST_BUDGET = 0.125  # below which the base's curve is not extended
SAME = ("ladder", "base", "lr_transfer", "tokens_per_parameter", "flags")  # in every experiment of one folder


def make_experiment(options: argparse.Namespace) -> Experiment:
    """Raises UsageError: as `make`; two arms have the same settings; the batch changes within a run, whose steps would then be
    more tokens than the others get; the longest run would see data twice; the corpus is not prepared, unless this is a plan."""
    experiment, seen = make(options), {}
    for name in experiment.arms:
        config, model, _ = resolve(experiment.cell("curve", name, experiment.rungs[0]).trial(0).flags)
        if set(config.batch_stages) != {1.0}:
            raise UsageError(f"{name}: --batch-stages are not for a ladder, whose batch is set by size")
        same = seen.setdefault(settings_hash(vars(config) | vars(model), ("tricks",)), name)
        if same != name:
            raise UsageError(f"{name} and {same} are the same settings on this ladder, which sets width, layers, heads")
    try:
        there = train_tokens(experiment)
    except UsageError:
        if options.plan:
            return experiment
        raise
    rung, most = experiment.rungs[-1], max(options.budgets)
    if most * rung.tokens > there:
        ratio = math.floor(100 * there / (most * rung.parameters)) / 100
        wanted = f"{size_words(rung.parameters)} parameters at budget {most:g} want {most * rung.tokens:,.0f} tokens"
        instead = f"--tokens-per-parameter {ratio:g}, smaller --budgets, or fewer sizes"
        raise UsageError(f"no data left: {wanted}, the corpus has {there:,}: {instead}")
    return experiment


def train_tokens(experiment: Experiment) -> int:
    """Of the corpus. Raises UsageError: it is not prepared here; says how."""
    config, _, _ = resolve(list(experiment.arms[experiment.base]))
    return len(Dataset(dataset_folder(config.data_root, config.corpus, config.tokenizer), "train"))


def run(options: argparse.Namespace) -> str:
    """The verdict lines of the experiment that was asked for, or its plan."""
    if options.report:
        with intact(options.report / REPORT):
            return report(options.report, survival.again(*runner.read_report(options.report, REPORT)))
    experiment = make_experiment(options)
    if options.plan:
        ranks = ["--world-size", str(options.processes)] if options.hardware == "here" else []
        runs = [(cell, len(experiment.seeds(cell.phase))) for cell in experiment.planned()]
        return plan(runs, ["--hardware", options.hardware, "--gpu-price", str(options.price), *ranks])
    out = options.out or Path("scaling") / f"{options.ladder}-{options.base.replace(',', '+')}"
    about = experiment.described()
    runner.check_folder(out, REPORT, {key: about[key] for key in SAME})
    return runner.alone_in(out, lambda: measure(experiment, out))


def measure(experiment: Experiment, out: Path) -> str:
    """`run` in its output folder: re-tune, curves, further runs of the base where needed, timing; then the report."""
    options = experiment.options
    trainer = runner.Runner(out, options.keep_checkpoints, ladder.POINTS)
    beside, alone = (runner.make_launcher(options, side_by_side) for side_by_side in (True, False))

    def trained(phase: str, cells: Sequence[Cell]) -> None:
        trainer.run_all(phase, [cell.trial(seed) for seed in experiment.seeds(phase) for cell in cells], *beside)

    def rows(cells: Iterable[Cell]) -> list[Row]:
        return trainer.rows(cell.arm for cell in cells)[0]

    retunes = experiment.retunes()
    trained("retune", retunes)
    factors = experiment.best_factors(retunes, rows(retunes))
    curves = experiment.curves(factors)
    trained("curve", curves)
    while more := missing_budgets(experiment, curves, rows(curves)):
        trained("curve", more)
        curves += more
    timed = experiment.timings(factors)
    turns = product(experiment.rungs, experiment.seeds("time"))
    trainer.run_turns("time", [[c.trial(seed) for c in timed if c.rung == rung] for rung, seed in turns], *alone)
    cells = [*retunes, *curves, *timed]
    used, left_out = trainer.rows(cell.arm for cell in cells)
    settings = experiment.described() | {"left_out": left_out, "cells": [cell.described() for cell in cells]}
    return report(out, survival.summarise(used, settings))


def missing_budgets(experiment: Experiment, curves: Sequence[Cell], rows: Sequence[Row]) -> list[Cell]:
    """Further runs of the base: twice its largest budget where a trick's loss is below its losses, half its smallest where one
    is above; none beyond --most-budget, the corpus, or LEAST_BUDGET."""
    there, more = train_tokens(experiment), []
    for rung in experiment.rungs:
        of_base = [cell for cell in curves if (cell.rung, cell.name) == (rung, experiment.base)]
        of_tricks = [cell for cell in curves if cell.rung == rung and cell.name != experiment.base]
        points = (survival.losses_by_budget([cell.described() for cell in cells], rows) for cells in (of_base, of_tricks))
        base, others = ([statistics.mean(p["losses"]) for p in of if p["losses"]] for of in points)
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


def main(argv: list[str]) -> int:
    if argv[:1] == ["fit"]:
        return command("scaling.py", lambda: published.fit_table(argv[1:]), argv)
    return command("scaling.py", lambda: run(parse(argv, __doc__)), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
