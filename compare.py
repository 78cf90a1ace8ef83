"""How much does a trick really save on the way to the target, and how sure is that?

    python compare.py --base modern --tricks muon no_bias compile         each alone on top of the base
    python compare.py --chain modern muon compile                         each on top of all before it, from the baseline
    python compare.py --base record --leave-out modern compile            each removed alone from a stack
    python compare.py --optimizers adamw muon --tuned-on bytes-large      the optimizer alone, with its settings from `tune`
    python compare.py --optimizers adamw --arm fast=muon:lr=0.04 --steps 300 --seeds 4     no search: whose loss is lower?
    python compare.py --recipes baseline record --horizon baseline=2400 record=215
    python compare.py --again record                                      a recipe against itself: no difference expected
    python compare.py tune --optimizers adamw muon --trials 5             the same tuning budget for each: --help
    python compare.py score --times times.csv                             the AlgoPerf score of a table of times: --help

For each arm: find the smallest number of steps whose final loss meets the target (runs at several lengths, inverse
prediction), then confirm at a fixed length with fresh seeds: one trial at a time, A B A B, all arms on the same seeds and data
order. Flags after `--` go to the trainer, for every arm. The same command continues after an interruption: no finished trial is
trained again, except a confirming run over an hour old, of a seed that not all arms have trained.

What comes out: --out (comparisons/<track>-<name>) with trials.csv, curves.csv, comparison.json, README.md, and plots.
Exit codes: 0 compared, 2 the command was wrong or nothing can be said, 130 interrupted.
"""

import argparse
import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optimizers
import tricks
from config import resolve
from engine.command import Answer, Parser, command
from engine.run_folder import intact, read_json
from engine.schedules import Course
from engine.spec import UsageError, nearest, split
from lab import comparison, levers, plots, runner, stats
from lab.comparison import MARGIN, MODES
from lab.horizon import FIRST_SEED, Search, concluded, search
from lab.ledger import Row
from lab.markdown import table
from lab.runs import duration
from lab.scaling.plan import predicted
from lab.trials import Arm, Trial
from lab.tuning import score, tune

LEAST_SEEDS, MOST_SEEDS = 3, 8  # what a power calculation may choose
SEARCHED = 7  # runs that a plan counts for a search: five if it begins next to the horizon, one more for each stride
REPORT = "comparison.json"
VERBS = {"score": score.run, "levers": levers.run, "tune": tune.run}

# ---------------------------------------------------------------- arms


def make_arms(options: argparse.Namespace) -> list[Arm]:
    """The arms, the base first. Raises UsageError: unknown words, one arm, two alike, or settings that the trainer refuses."""
    common = ("--track", options.track, *options.flags, *(("--target-loss", str(options.target)) if options.target else ()))
    base = options.base or ("modern" if options.optimizers else "baseline")
    if options.optimizers:
        arms = [optimizer_arm(options, word, base, common) for word in options.optimizers]
    else:
        stacks = comparison.words_of_arms(options, base)
        arms = [Arm(name, ("--tricks", ",".join(words) or "baseline", *common)) for name, words in stacks]
    if options.again:
        arms[1] = dataclasses.replace(arms[1], first_seed=100)
    if len(arms) < 2:
        raise UsageError("one arm is no comparison: name at least two")
    seen: dict[Path, str] = {}
    for arm in arms:
        folder = Trial(arm, 1, 0).folder  # the trainer's own check of every setting
        if folder in seen:
            raise UsageError(f"{arm.name!r} and {seen[folder]!r} are the same settings: give two seeds to one arm instead")
        if arm.name in seen.values():
            raise UsageError("two arms have the same name: give each another, as in --arm fast=muon:lr=0.04")
        seen[folder] = arm.name
    return arms


def optimizer_arm(options: argparse.Namespace, word: str, base: str, common: tuple[str, ...]) -> Arm:
    """An optimizer on the base's model. One that brings its own schedule runs at a constant rate, whatever the others do."""
    name, word = comparison.named(word)
    spec, schedule = tuned_for(options.tuned_on, word) if options.tuned_on else (word, "")
    flags = ("--tricks", base, "--optimizer", spec, *(("--schedule", schedule) if schedule else ()), *common)
    if optimizers.find(word).own_schedule and resolve(list(flags))[0].schedule != "constant":
        flags += ("--schedule", "constant")
    return Arm(name, flags)


def tuned_for(workload: str, word: str) -> tuple[str, str]:
    """Optimizer and schedule as `compare tune` tuned them for a workload, or for FOLDER/WORKLOAD of its --out; keys that the
    word gives are kept. Raises UsageError: nothing was tuned for the workload, or not this optimizer."""
    folder, _, workload = workload.rpartition("/")
    file = Path(folder) / "tuned.json" if folder else tricks.TUNED
    if not file.exists():
        raise UsageError(f"--tuned-on {folder}/{workload}: there is no {file}; run: ./run.sh compare tune --out {folder}")
    name, known = split(word)[0], read_json(file)
    if workload not in known:
        raise UsageError(f"--tuned-on {workload}: nothing was tuned for it: {nearest(workload, known)}")
    if name not in known[workload]:
        raise UsageError(f"--tuned-on {workload}: {name!r} was not tuned for it: {nearest(name, known[workload])}")
    return tricks.tuned(workload, word, tricks.track(workload).settings["schedule"], file)


# ---------------------------------------------------------------- search, then confirm


class Comparison:
    """Arms, the base first, their trials in a folder, and what these say. settings: what identifies it in comparison.json."""

    def __init__(self, arms: list[Arm], options: argparse.Namespace, out: Path, settings: dict[str, Any]):
        self.arms, self.options, self.out, self.settings = arms, options, out, settings
        self.target, self.runner = settings["target"], runner.Runner(out, options.keep_checkpoints)
        self.launch, self.at_once = runner.make_launcher(options, side_by_side=True)  # of the search
        own = {arm.name: resolve(list(arm.flags))[0].steps for arm in arms}  # lengths of the recipes' own runs
        self.base_steps = options.given.get(arms[0].name) or own[arms[0].name]
        # a stack less one trick has no length of its own
        shared = options.first_steps or (self.base_steps if options.mode in ("chain", "leave_out") else 0)
        self.first = {name: shared or steps for name, steps in own.items()}  # where the searches begin

    def run(self) -> Answer:
        """Search, confirm, write the report; returns its verdict lines."""
        options, plan = self.options, dict(self.options.given)
        searches = self.find_horizons([arm for arm in self.arms if arm.name not in plan or arm.name in options.at])
        searches = {name: search for name, search in searches.items() if name not in plan}
        plan |= {name: math.ceil(search.found.steps * (1 + MARGIN)) for name, search in searches.items() if search.found}
        why = {name: search.why for name, search in searches.items()}
        arms = [dict(name=a.name, flags=list(a.flags), steps=plan.get(a.name), why=why.get(a.name, "")) for a in self.arms]
        seeds, planned = options.seeds or seeds_needed(searches), [arm for arm in self.arms if arm.name in plan]
        self.settings |= {"command": options.command, "margin": MARGIN, "seeds": seeds, "arms": arms}
        self.settings |= {"steps": options.steps} if options.steps else {}
        if len(planned) < 2 or planned[0] is not self.arms[0]:
            self.report()
            reasons = "; ".join(f"{arm.name}: {why[arm.name]}" for arm in self.arms if arm.name not in plan)
            raise UsageError(f"nothing to compare ({reasons}): raise --max-steps or --target; trials are kept in {self.out}")
        lengths = ", ".join(f"{arm.name} {plan[arm.name]} steps" for arm in planned)
        print(f"confirming with {seeds} seeds: {lengths}", flush=True)
        turns = [[Trial(arm, plan[arm.name], seed) for arm in planned] for seed in range(seeds)]
        self.runner.run_turns("confirm", turns, *runner.make_launcher(options, side_by_side=False))
        return self.report()

    def find_horizons(self, arms: list[Arm]) -> dict[str, Search]:
        """The search of each arm."""
        if self.options.mode != "chain":
            return {arm.name: search for arm, search in runner.in_turn(arms, self.find, self.at_once)}
        searches = {}
        for arm in arms:  # each begins where the one before ended: far below the recipe's own length
            searches[arm.name] = self.find(arm)
            if horizon := searches[arm.name].found:
                self.first = dict.fromkeys(self.first, round(horizon.steps))
        return searches

    def find(self, arm: Arm) -> Search:
        """An arm's horizon, by a search or at the lengths given."""
        options = self.options

        def run(steps: int, seed: int) -> float:
            row = self.runner.run("search", Trial(arm, steps, seed), self.launch)
            print(f"search  {arm.name}: {steps} steps, seed {seed}: {row.val_loss:.4f} (target {self.target:g})", flush=True)
            return row.val_loss

        if at := options.at.get(arm.name):
            return concluded([(steps, seed, run(steps, seed)) for seed, steps in enumerate(at, FIRST_SEED)], self.target)
        return search(run, self.first[arm.name], self.target, options.max_steps or 4 * self.base_steps)

    def plan(self) -> Answer:
        """What `run` has still to train, and how long that takes here by real steps of each arm. Nothing is written."""
        options, rows = self.options, []
        for arm in self.arms:
            first, given = self.first[arm.name], options.given.get(arm.name)
            steps = given or math.ceil(first * (1 + MARGIN))
            searched = options.at.get(arm.name, [] if given else [first] * SEARCHED)
            wanted = [Trial(arm, n, FIRST_SEED + i) for i, n in enumerate(searched)]
            wanted += [Trial(arm, steps, seed) for seed in range(options.seeds or seeds_needed({}))]
            left = [trial.steps for trial in wanted if not self.runner.done(trial)]
            of = predicted(Arm(arm.name, tuple(wanted[-1].flags)), [])
            batch = of.config.batch_tokens * Course(of.config).units_before(steps) / steps
            validations = 5 * len(left) * of.config.val_tokens / 3 / batch  # five a run, each forward pass a third of a step
            about = {"tokens": round(sum(left) * batch), "seconds": of.seconds * (sum(left) + validations)}
            rows.append({"arm": arm.name, "runs": " + ".join(f"{n} x {length}" for length, n in Counter(left).items())} | about)
        cells = [(row["arm"], row["runs"] or "-", f"{row['tokens']:,}", duration(row["seconds"])) for row in rows]
        time = f"about {duration(sum(row['seconds'] for row in rows))} here, one run at a time, beside starting and compiling"
        text = table(("arm", "runs x steps", "tokens", "time"), cells, aligned=True)
        return Answer(f"{text}\n{time}; a search is counted as {SEARCHED} runs of the length at which it begins", rows)

    def report(self) -> Answer:
        rows, left_out = self.runner.rows(self.arms)
        summary = comparison.summarise(rows, self.settings | {"left_out": left_out})
        return report(self.out, summary, rows, self.options.allow_mixed)


def seeds_needed(searches: dict[str, Search]) -> int:
    """Runs so that every arm, true to its search, is confirmed with p < 0.01 at a chance of 90 %; 5 without a search."""
    horizons = [search.found for search in searches.values() if search.found]
    wanted = [stats.runs_needed(-h.slope * math.log2(1 + MARGIN), h.sd, comparison.ALPHA, most=MOST_SEEDS) for h in horizons]
    return max(LEAST_SEEDS, *wanted) if wanted else 5


def report(out: Path, summary: dict[str, Any], rows: list[Row], allow_mixed: bool) -> Answer:
    """Write comparison.json, README.md and the plots; returns the verdict lines. Raises UsageError: times of several machines,
    unless `allow_mixed`."""
    if len(machines := summary["machines"]) > 1 and not allow_mixed:
        raise UsageError(f"times of {len(machines)} machines in one comparison ({'; '.join(machines)}): add --allow-mixed")
    curves = runner.read_curves(out / "curves.csv", [row for row in rows if row.run not in summary.get("left_out", ())])
    summary["plots"] = plots.draw_comparison(out, summary, curves)
    runner.write_report(out, REPORT, summary, comparison.markdown(summary))
    return Answer("\n".join(comparison.verdict_lines(summary)), summary)


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--track", default="cpu", help="track of all arms (default: cpu)")
    add("--base", default="", help="recipe or list of tricks to compare with (default: baseline, or modern with --optimizers)")
    modes = made.add_mutually_exclusive_group()
    modes.add_argument("--tricks", nargs="+", metavar="TRICK", help="each added alone to the base")
    modes.add_argument("--chain", nargs="+", metavar="TRICK", help="added one after the other to the base")
    modes.add_argument("--leave-out", nargs="+", metavar="TRICK", help="each removed alone from the base")
    modes.add_argument("--recipes", nargs="+", metavar="RECIPE", help="whole recipes; the first is the base")
    arms = dict(nargs="+", action="extend", metavar="[NAME=]SPEC", help="optimizers on the base's model; the first is the base")
    modes.add_argument("--optimizers", "--arm", **arms)
    modes.add_argument("--again", metavar="RECIPE", help="A/A: a recipe against itself, on other seeds")
    modes.add_argument("--report", type=Path, metavar="FOLDER", help="print the verdicts of a comparison, train nothing")
    add("--tuned-on", metavar="WORKLOAD", help="with --optimizers: `compare tune`'s best; FOLDER/WORKLOAD: of its --out")
    add("--target", type=float, default=0.0, help="validation loss to reach, nats per token (default: the track's)")
    add("--steps", type=int, default=0, help="length of all runs, instead of a search; --horizon: of one arm")
    add("--horizon", nargs="+", default=[], metavar="ARM=STEPS", help="length of an arm's confirming runs, instead of a search")
    add("--lengths", nargs="+", default=[], metavar="ARM=STEPS,...", help="lengths to search, or of runs beside --horizon")
    add("--first-steps", type=int, default=0, help="first length of a search (default: the recipe's or the stack's)")
    add("--max-steps", type=int, default=0, help="length at which a search gives up (default: 4 x the base's)")
    add("--seeds", type=int, default=0, help=f"confirming runs (default: {LEAST_SEEDS} to {MOST_SEEDS}, as the variance needs)")
    add("--side-by-side", type=int, default=1, help="arms searched at once, sharing the cores; confirming is one at a time")
    runner.add_launcher_flags(made)
    add("--plan", action="store_true", help="print runs, steps, tokens and time, and stop")
    add("--allow-mixed", action="store_true", help="compare times even if they are of several machines")
    add("--out", type=Path, help="output folder (default: comparisons/<track>-<what>)")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> options. Raises UsageError: an unknown flag or a value out of range."""
    options = runner.read_options(parser(), argv)
    if not options.report and not any(getattr(options, mode) for mode in MODES):
        raise UsageError("compare what? --tricks, --chain, --leave-out, --recipes, --optimizers or --again (see --help)")
    if options.tuned_on and not options.optimizers:
        raise UsageError("--tuned-on goes with --optimizers")
    runner.at_least(options, seeds=0, steps=0, first_steps=0, max_steps=0, side_by_side=1, processes=1)
    if options.steps and (options.first_steps or options.max_steps or "--steps" in options.flags):
        raise UsageError("--steps is the length of all runs: leave out --first-steps, --max-steps and the --steps after --")
    options.mode = next((mode for mode in MODES if getattr(options, mode)), "")
    options.given = {name: steps for name, (steps,) in steps_of_arms("--horizon", options.horizon, "2400").items()}
    options.at = steps_of_arms("--lengths", options.lengths, "2400,2000")
    return options


def steps_of_arms(flag: str, words: list[str], example: str) -> dict[str, list[int]]:
    """ARM=STEPS,STEPS ... -> arm -> [steps, steps], several if the example has several. Raises UsageError: another form."""
    steps = {}
    for word in words:
        name, equals, given = word.rpartition("=")
        lengths = given.split(",")
        if not equals or (len(lengths) > 1 and "," not in example) or not all(n.isdecimal() and int(n) for n in lengths):
            raise UsageError(f"{flag} takes ARM=STEPS, such as baseline={example}; not {word!r}")
        steps[name] = [int(n) for n in lengths]
    return steps


def run(options: argparse.Namespace) -> Answer:
    """The verdict lines of the comparison that was asked for, or its plan."""
    if options.report:
        summary, rows = runner.read_report(options.report, REPORT)
        with intact(options.report / REPORT):
            return report(options.report, comparison.again(summary, rows), rows, options.allow_mixed)
    arms = make_arms(options)
    names = [arm.name for arm in arms]
    for flag, given in (("--horizon", options.given), ("--lengths", options.at)):
        if unknown := set(given) - set(names):
            raise UsageError(f"{flag} {min(unknown)}: there is no such arm: {nearest(min(unknown), names)}")
    options.given = dict.fromkeys(names if options.steps else (), options.steps) | options.given
    what = f"{options.track}-{options.mode.replace('_', '-')}-{names[0].split(':')[0]}"
    out, target = options.out or Path("comparisons") / what, options.target or tricks.track(options.track).target_loss
    settings = {"track": options.track, "target": target, "base": names[0], "mode": options.mode}
    runner.check_folder(out, REPORT, settings)
    if options.plan:
        return Comparison(arms, options, out, settings).plan()
    return runner.alone_in(out, lambda: Comparison(arms, options, out, settings).run())


def main(argv: list[str]) -> int:
    if verb := VERBS.get(argv[0] if argv else ""):
        return command(f"compare.py {argv[0]}", lambda: verb(argv[1:]), argv)
    return command("compare.py", lambda: run(parse(argv)), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
