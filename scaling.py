"""Do the tricks survive at larger model sizes? Their speed-up at each size of a ladder, its trend, a prediction, a verdict.

    python scaling.py --tricks muon soap --plan                         what it would cost here, and stop
    python scaling.py --tricks muon soap                                the `cpu` ladder: 0.1M to 4.2M parameters over bytes
    python scaling.py --tricks muon soap --at 124M --side-by-side 2
    python scaling.py --base baseline --tricks rope qk_norm relu2 --sizes 0.1M 0.3M 0.8M 1.5M
    python scaling.py --tricks muon --ladder gpt2 --processes 8 --plan --hardware 8xH100
    python scaling.py --report scaling/cpu-modern                       the report of a finished experiment
    python scaling.py fit --losses wen2025_best.csv                     the same arithmetic on published losses: --help

A trick is a name of tricks.py, or an optimizer SPEC. At each size base and trick get the same tokens and batch, their learning
rates by the same rule (--lr-transfer), then the better of as many factors on it (--retune). The base is run at several token
budgets (--budgets), more of them where a trick's loss lies outside, and the tokens that it would need for the trick's loss are
interpolated. Flags after `--` go to the trainer, for every arm. The same command continues after an interruption: a trial
that has ended is never trained again.

What comes out: --out (scaling/<ladder>-<base>) with trials.csv, curves.csv, scaling.json, README.md, and plots as PNG and
SVG. Exit codes: 0 judged or planned, 2 the command was wrong or nothing can be said, 130 interrupted.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optimizers
import train_gpt
import tricks
from data.shards import Dataset, dataset_folder
from engine.run_folder import lock, settings_hash
from engine.spec import UsageError, nearest, split
from lab import comparison, plots, trials
from lab.runner import (
    Runner,
    add_launcher_flags,
    at_least,
    check_folder,
    command,
    make_launcher,
    read_options,
    read_report,
    write_report,
)
from lab.scaling import ladder, plan, published, survival
from lab.scaling import report as survival_report
from lab.scaling.ladder import Ladder, Rung, retune_factors, size_of, size_words
from lab.scaling.plan import HERE, Work
from lab.trials import Arm, Trial

RETUNE_SEED, TIME_SEED = 1000, 2000  # first seeds of the re-tune and of the timing: none is used twice
REPORT = "scaling.json"
TIME_PAIRS = 3  # short runs of each arm at each size, by turns, for the seconds of a token
CALIBRATION_STEPS = 6  # of the runs by which --plan measures this machine
LAST_ONLY = ("--val-every", "1000000000")  # the loss at the end of a run is all that counts
POINTS = 20  # of the training loss that are kept of each of the hundreds of runs
LEAST_BUDGET = 0.125  # below which the base's curve is not extended


# ---------------------------------------------------------------- what is to be run


@dataclass(frozen=True)
class Cell:
    """One arm at one size and length of run, whatever the seed."""

    phase: str  # retune, curve or time
    name: str  # of the arm: the base or a trick
    rung: Rung
    budget: float
    factor: float  # on the learning rate
    steps: int
    arm: Arm

    def trials(self, seeds: range) -> list[Trial]:
        return [Trial(self.arm, self.steps, seed) for seed in seeds]

    def described(self) -> dict[str, Any]:
        return {
            "phase": self.phase, "arm": self.name, "size": self.rung.size.name, "budget": self.budget, "factor": self.factor,
            "steps": self.steps, "batch_tokens": self.rung.batch_tokens, "trial": self.arm.name,
        }  # fmt: skip


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

    def cell(self, phase: str, name: str, rung: Rung, budget: float, factor: float = 1.0) -> Cell:
        arm = ladder.at_size(name, self.arms[name], rung, self.ladder, self.options.lr_transfer, factor)
        steps = self.options.timing_steps if phase == "time" else rung.steps(budget)
        return Cell(phase, name, rung, budget, factor, steps, arm)

    def budgets(self, name: str) -> list[float]:
        return self.options.budgets if name == self.base else self.options.trick_budgets

    def retunes(self) -> list[Cell]:
        factors = retune_factors(self.options.retune, self.options.retune_step)
        if len(factors) < 2:
            return []
        return [self.cell("retune", name, rung, 1, f) for rung in self.rungs for f in factors for name in self.arms]

    def train_tokens(self) -> int:
        """Of the corpus.

        Raises:
            UsageError: it is not prepared here; says how.
        """
        config, _, _ = train_gpt.resolve(list(self.arms[self.base]))
        return len(Dataset(dataset_folder(config.data_root, config.corpus, config.tokenizer), "train"))


def make_experiment(options: argparse.Namespace) -> Experiment:
    """
    Raises:
        UsageError: unknown ladder, size or trick; the same settings twice; settings that the trainer refuses; a run longer than
            the corpus.
    """
    of = ladder.ladder(options.ladder)
    sizes = ladder.own_sizes(options.sizes, of) if options.sizes else of.sizes
    common = ("--track", of.track, *options.flags, *LAST_ONLY)
    arms = {options.base: ("--tricks", options.base, *common)}
    for word in options.tricks:
        arms[f"+{word}"] = (*trick_flags(options.base, word), *common)
    if len(arms) <= len(options.tricks):
        raise UsageError("the same trick twice: name each once")
    ratio = options.tokens_per_parameter or of.tokens_per_parameter
    rungs = tuple(ladder.rung(size, of, ratio, arms[options.base]) for size in sizes)
    made = Experiment(of, rungs, arms, options)
    seen: dict[str, str] = {}
    for name in arms:
        (trial,) = made.cell("curve", name, rungs[0], 1).trials(range(1))
        config, model, _ = train_gpt.resolve(trial.flags)  # the trainer's own check of every setting
        if config.batch_schedule != "constant":  # the same number of steps would be more tokens than the others get
            raise UsageError(
                f"{name}: --batch-schedule {config.batch_schedule} is not for a ladder, whose batch is set by size"
            )
        settings = settings_hash(vars(config) | vars(model), ("tricks",))
        if settings in seen:
            raise UsageError(
                f"{name} and {seen[settings]} are the same settings on this ladder, which sets width, layers, heads"
            )
        seen[settings] = name
    check_data(made)
    return made


def trick_flags(base: str, word: str) -> tuple[str, ...]:
    """Trainer flags of the base with a trick, or with an optimizer SPEC in the place of its own.

    Raises:
        UsageError: it is neither.
    """
    name, _ = split(word)
    if word in tricks.TRICKS:
        return "--tricks", f"{base},{word}"
    if name not in optimizers.OPTIMIZERS and ":" not in word and "." not in word:
        raise UsageError(f"unknown trick or optimizer {word!r}: {nearest(word, [*tricks.TRICKS, *optimizers.OPTIMIZERS])}")
    optimizers.check(word)
    constant = ("--schedule", "constant") if optimizers.own_schedule(name) else ()
    return "--tricks", base, "--optimizer", word, *constant


def check_data(experiment: Experiment) -> None:
    """
    Raises:
        UsageError: the longest run would see data twice; the corpus is not prepared, unless this is a plan alone.
    """
    options, rung = experiment.options, experiment.rungs[-1]
    try:
        there = experiment.train_tokens()
    except UsageError:
        if options.plan:
            return
        raise
    most = max(*options.budgets, *options.trick_budgets)
    if most * rung.tokens > there:
        ratio = math.floor(100 * there / (most * rung.parameters)) / 100
        raise UsageError(
            f"no data left: {size_words(rung.parameters)} parameters at budget {most:g} want {most * rung.tokens:,.0f} tokens, "
            f"the corpus has {there:,}: --tokens-per-parameter {ratio:g}, smaller --budgets, or fewer sizes"
        )


# ---------------------------------------------------------------- the plan


def work_of(experiment: Experiment) -> list[Work]:
    """All runs, by arm and size."""
    options, found = experiment.options, []
    for rung in experiment.rungs:
        for name in experiment.arms:
            runs = [(rung.steps(budget), options.seeds) for budget in experiment.budgets(name)]
            runs += [(rung.steps(1), options.retune)] * (options.retune > 1)
            runs += [(options.timing_steps, TIME_PAIRS)] * (options.timing_steps > 0)
            arm = experiment.cell("curve", name, rung, 1).arm
            found.append(Work(name, rung, arm.flags, sum(n for _, n in runs), sum(steps * n for steps, n in runs)))
    return found


def make_plan(experiment: Experiment) -> str:
    """The plan in words.

    Raises:
        UsageError: unknown hardware; a size that does not fit its memory (after the plan was printed).
    """
    options = experiment.options
    where = plan.machine(options.hardware, options.processes, options.price)
    if options.hardware == HERE:
        known = calibrate(experiment)
        seconds = lambda work: known[work.arm, work.rung.size.name]  # noqa: E731
        how = f"a token measured by runs of {CALIBRATION_STEPS} steps: the base at each size, tricks at the middle one"
    else:
        seconds = lambda work: plan.seconds_by_peak(work.flags, where)  # noqa: E731
        how = f"at {plan.MFU:.0%} of the peak, as the NanoGPT speedrun's logs have it; optimizers taken to cost nothing"
    found = plan.plan(work_of(experiment), where, seconds, options.side_by_side)
    words = plan.text(found, how)
    try:
        plan.check_memory(found)
    except UsageError:
        print(words)
        raise
    return words


def calibrate(experiment: Experiment) -> dict[tuple[str, str], float]:
    """Seconds of a token, by arm and size, on this machine now: a short run of the base at each size; of each trick at the
    middle one, its ratio to the base's taken for all."""
    options, middle = experiment.options, experiment.rungs[len(experiment.rungs) // 2]
    threads = max(1, (os.cpu_count() or 1) // options.side_by_side) if options.side_by_side > 1 else 0

    def seconds(name: str, rung: Rung) -> float:
        arm = experiment.cell("curve", name, rung, 1).arm
        short = Arm(arm.name, (*arm.flags, "--val-tokens", "4096"))
        print(f"measuring {arm.name}", file=sys.stderr, flush=True)
        outcome = trials.train(Trial(short, CALIBRATION_STEPS, TIME_SEED), options.processes, threads)
        if outcome.result is None or not outcome.result["tokens"]:
            raise UsageError(f"{arm.name} does not run here: {outcome.error or 'it diverged'}")
        return outcome.result["train_time"] / outcome.result["tokens"]

    base = {rung.size.name: seconds(experiment.base, rung) for rung in experiment.rungs}
    ratio = {name: seconds(name, middle) / base[middle.size.name] for name in experiment.arms if name != experiment.base}
    return {(name, size): s * ratio.get(name, 1.0) for size, s in base.items() for name in experiment.arms}


# ---------------------------------------------------------------- running


def run(options: argparse.Namespace) -> list[str]:
    """Plan, or run and judge; returns the lines to print."""
    experiment = make_experiment(options)
    if options.plan:
        return [make_plan(experiment)]
    out = options.out or Path("scaling") / f"{options.ladder}-{options.base.replace(',', '+')}"
    settings = {
        "ladder": options.ladder, "base": experiment.base, "lr_transfer": options.lr_transfer,
        "tokens_per_parameter": options.tokens_per_parameter or experiment.ladder.tokens_per_parameter,
        "flags": list(options.flags),
    }  # fmt: skip
    check_folder(out, REPORT, settings)
    held = lock(out)
    try:
        return measure(experiment, settings, out)
    finally:
        held.release()


def measure(experiment: Experiment, settings: dict[str, Any], out: Path) -> list[str]:
    """`run` in its output folder: re-tune, curves, more of the base's where they are needed, timing; then the report."""
    options = experiment.options
    runner = Runner(out, options.keep_checkpoints, POINTS)
    beside, alone = make_launcher(options, side_by_side=True), make_launcher(options, side_by_side=False)
    seeds, cells = range(options.seeds), experiment.retunes()
    runner.run_all("retune", [t for cell in cells for t in cell.trials(range(RETUNE_SEED, RETUNE_SEED + 1))], *beside)
    rows = lambda cells: runner.rows(cell.arm for cell in cells)  # noqa: E731
    factors = best_factors(experiment, cells, rows(cells)[0])
    curves = [
        experiment.cell("curve", name, rung, budget, factors[name, rung.size.name])
        for rung in experiment.rungs for budget in sorted({*options.budgets, *options.trick_budgets})
        for name in experiment.arms if budget in experiment.budgets(name)
    ]  # fmt: skip
    by_seed = lambda cells: [trial for seed in seeds for cell in cells for trial in cell.trials(range(seed, seed + 1))]  # noqa: E731
    runner.run_all("curve", by_seed(curves), *beside)
    while more := missing_budgets(experiment, curves, rows(curves)[0]):
        curves += more
        runner.run_all("curve", by_seed(more), *beside)
    timed = [
        experiment.cell("time", name, rung, 1, factors[name, rung.size.name])
        for rung in experiment.rungs for name in experiment.arms if options.timing_steps
    ]  # fmt: skip
    turns = [
        [trial for cell in timed if cell.rung == rung for trial in cell.trials(range(seed, seed + 1))]
        for rung in experiment.rungs for seed in range(TIME_SEED, TIME_SEED + TIME_PAIRS)
    ]  # fmt: skip
    runner.run_turns("time", turns, *alone)
    sizes = [
        {"size": r.size.name, "parameters": r.parameters, "layers": r.size.layers, "width": r.size.width, "tokens": r.tokens,
         "batch_tokens": r.batch_tokens}
        for r in experiment.rungs
    ]  # fmt: skip
    used, left_out = rows((*cells, *curves, *timed))
    settings |= {
        "command": options.command, "at": options.at_parameters or 10 * experiment.rungs[-1].parameters, "seeds": options.seeds,
        "hold_out": options.hold_out, "sizes": sizes, "arms": list(experiment.arms), "left_out": left_out,
        "cells": [cell.described() for cell in (*cells, *curves, *timed)],
    }  # fmt: skip
    return report(out, survival.summarise(used, settings))


def best_factors(experiment: Experiment, cells: Sequence[Cell], rows: Sequence[comparison.Row]) -> dict[tuple[str, str], float]:
    """The learning-rate factor of each arm at each size: the best of the re-tune, 1 without one.

    Raises:
        UsageError: the base diverged at all of them.
    """
    found = {}
    for rung in experiment.rungs:
        for name in experiment.arms:
            own = [cell.described() for cell in cells if (cell.name, cell.rung) == (name, rung)]
            tuned = survival.retuned(own, rows)
            found[name, rung.size.name] = tuned["best"] if tuned else 1.0
            if tuned and name == experiment.base and not math.isfinite(min(tuned["losses"].values())):
                raise UsageError(
                    f"all {len(own)} runs of {name} diverged or crashed at {rung.size.name}: lower its learning rate "
                    f"(--lr-transfer, -- --optimizer), or leave that size out"
                )
    return found


def missing_budgets(experiment: Experiment, curves: Sequence[Cell], rows: Sequence[comparison.Row]) -> list[Cell]:
    """Further runs of the base: twice its largest budget where a trick's loss is below, half its smallest where it is above;
    none beyond --most-budget, the corpus, or LEAST_BUDGET."""
    there, more = experiment.train_tokens(), []
    described = [(cell, cell.described()) for cell in curves]
    for rung in experiment.rungs:
        points = lambda name, rung=rung: survival.losses_by_budget(  # noqa: E731
            [d for cell, d in described if (cell.name, cell.rung) == (name, rung)], rows
        )
        base = {p["budget"]: sum(p["losses"]) / len(p["losses"]) for p in points(experiment.base) if p["losses"]}
        own = [
            p for name in experiment.arms if name != experiment.base for p in points(name) if p["budget"] == 1 and p["losses"]
        ]
        means = [sum(p["losses"]) / len(p["losses"]) for p in own]
        if not base or not means:
            continue
        tried = {cell.budget for cell, _ in described if (cell.name, cell.rung) == (experiment.base, rung)}
        wanted = []
        if min(means) < min(base.values()) and (up := 2 * max(tried)) <= experiment.options.most_budget:
            wanted += [up] * (up * rung.tokens <= there)
        if max(means) > max(base.values()) and (down := min(tried) / 2) >= LEAST_BUDGET:
            wanted.append(down)
        factor = next(cell.factor for cell, _ in described if (cell.name, cell.rung) == (experiment.base, rung))
        more += [experiment.cell("curve", experiment.base, rung, budget, factor) for budget in wanted]
    return more


def report(out: Path, summary: dict[str, Any]) -> list[str]:
    """Write scaling.json, README.md and the plots; returns the verdict lines.

    Raises:
        UsageError: nothing can be said of any trick.
    """
    summary["plots"] = plots.draw_scaling(out, summary)
    write_report(out, REPORT, summary, survival_report.markdown(summary))
    lines = survival_report.verdict_lines(summary)
    if not any(trick["trends"]["tokens"] for trick in summary["tricks"]):
        raise UsageError(f"nothing can be said: {'; '.join(lines)}; trials are kept in {out}")
    return lines


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    made = train_gpt.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = made.add_argument
    add("--tricks", nargs="+", default=[], metavar="TRICK", help="tricks, or optimizer SPECs, one at a time onto the base")
    add("--base", default="modern", help="recipe or comma-separated tricks that they are set against (default: modern)")
    add("--ladder", default="cpu", help=f"{' or '.join(ladder.LADDERS)} (default: cpu)")
    add("--sizes", nargs="+", default=[], metavar="SIZE", help="own sizes by non-embedding parameters, such as 0.3M, or a file "
        "with a line `name layers heads width` for each (default: the ladder's)")  # fmt: skip
    add("--tokens-per-parameter", type=float, default=0, help="tokens of budget 1, per non-embedding parameter (default: the "
        "ladder's)")  # fmt: skip
    add("--budgets", type=float, nargs="+", default=[0.5, 1, 2], help="of the base, times those tokens (default: 0.5 1 2)")
    add("--trick-budgets", type=float, nargs="+", default=[0.5, 1], help="of the tricks; 1 is needed (default: 0.5 1)")
    add("--most-budget", type=float, default=4, help="up to which the base's budgets are doubled where a trick's loss is below "
        "them (default: 4)")  # fmt: skip
    add("--seeds", type=int, default=3, help="runs at each point (default: 3)")
    add("--lr-transfer", default="mup", help="how the hidden matrices' learning rate goes with width: mup, power:EXPONENT or "
        "none (default: mup: -1 for Adam and its like, 0 for Muon; init and attention scale are left as they are)")  # fmt: skip
    add("--retune", type=int, default=3, help="factors on it that every arm tries at every size; 1: none (default: 3)")
    add("--retune-step", type=float, default=2, help="between two such factors (default: 2)")
    add("--timing-steps", type=int, default=20, help="steps of the runs that measure seconds a token; 0: none (default: 20)")
    add("--at", default="", help="size to predict for (default: 10 x the largest)")
    add("--hold-out", type=int, default=1, help="largest sizes that the smaller ones must predict (default: 1)")
    add("--plan", action="store_true", help="print runs, tokens, FLOPs, memory, hours and cost, and stop")
    add("--hardware", default=HERE, help=f"of --plan: 8xH100 and the like ({', '.join(plan.CARDS)}), or {HERE!r} (default)")
    add("--price", type=float, help="of --plan: $ an hour of one GPU (default: known for the H100 alone)")
    add("--report", type=Path, metavar="FOLDER", help="write a folder's report again from its trials")
    add("--side-by-side", type=int, default=1, help="trials at once, the cores shared; timing is one at a time (default: 1)")
    add_launcher_flags(made)
    add("--keep-checkpoints", action="store_true", help="keep the trials' weights (default: deleted when a trial has ended)")
    add("--out", type=Path, help="output folder (default: scaling/<ladder>-<base>)")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> options.

    Raises:
        UsageError: an unknown flag or a value out of range.
    """
    options = read_options(parser(), argv)
    if not options.report and not options.tricks:
        raise UsageError("scale what? --tricks muon soap ... (see --help)")
    if options.seeds == 1:
        raise UsageError("--seeds 1: one run has no variance and shows nothing; take at least 2, better 3")
    at_least(options, seeds=2, retune=1, timing_steps=0, hold_out=0, side_by_side=1, processes=1)
    if options.tokens_per_parameter < 0 or not options.retune_step > 1:
        raise UsageError("--tokens-per-parameter must be above 0 and --retune-step above 1")
    for name in ("budgets", "trick_budgets"):
        given = getattr(options, name)
        if len(set(given)) < len(given) or not all(0 < b < math.inf for b in given) or 1 not in given:
            raise UsageError(f"--{name.replace('_', '-')} takes different numbers above 0, one of them 1; not {given}")
    if len(options.budgets) < 2:
        raise UsageError("--budgets: the base's curve needs at least two, better 0.5 1 2")
    ladder.transfer_exponent(options.lr_transfer, "adamw")
    options.at_parameters = size_of(options.at) if options.at else None
    return options


def main(argv: list[str]) -> int:
    if argv[:1] == ["fit"]:
        return published.main(argv[1:])

    def work() -> str:
        options = parse(argv)
        if options.report:
            return "\n".join(report(options.report, survival.again(*read_report(options.report, REPORT))))
        return "\n".join(run(options))

    return command("scaling.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
