"""What does a trick really save on the way to the target, and how sure are we?

    python compare.py --base modern --tricks muon no_bias compile         each alone on top of the base
    python compare.py --chain modern muon compile                         each on top of all before it, from the baseline
    python compare.py --base record --leave-out sparse_ngrams compile     each alone out of a stack
    python compare.py --optimizers adamw muon soap -- --schedule wsd      the optimizer alone, on the `modern` model
    python compare.py --optimizers adamw muon --tuned-on bytes-large      each with its settings from `compare tune`
    python compare.py --recipes baseline record --horizon baseline=2400 record=222 --lengths baseline=2000 record=200
    python compare.py --again record                                      a recipe against itself: must show no difference
    python compare.py --report comparisons/cpu-record                     the verdicts of a finished comparison
    python compare.py tune --optimizers adamw muon --trials 5             the same tuning budget for each, on workloads: --help
    python compare.py score --times times.csv                             the AlgoPerf score of a table of times: --help

For each arm: find the smallest number of steps whose final loss meets the target (runs at several lengths, inverse
prediction), then confirm at a fixed length with fresh seeds: one trial at a time, A B A B, all arms on the same seeds and data
order. Flags after `--` go to the trainer, for every arm. The same command continues after an interruption: a trial that has
ended is not trained again, unless it is a confirming run of over an hour ago whose turn was not complete.

What comes out: --out (comparisons/<track>-<name>) with trials.csv, curves.csv, comparison.json, README.md, and plots as PNG
and SVG. Exit codes: 0 compared, 2 the command was wrong or nothing can be said, 130 interrupted.
"""

import argparse
import dataclasses
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import optimizers
import train_gpt
import tricks
from engine.run_folder import lock
from engine.spec import UsageError, nearest, split
from lab import comparison, plots, stats
from lab.horizon import Search, search, search_at
from lab.runner import (
    Runner,
    add_launcher_flags,
    at_least,
    check_folder,
    command,
    make_launcher,
    read_curves,
    read_options,
    read_report,
    say,
    write_report,
)
from lab.trials import Arm, Trial
from lab.tuning import score

MARGIN = 0.05  # steps of the confirming runs beyond the horizon: at it, half of all arms would miss the target
LEAST_SEEDS, MOST_SEEDS = 3, 8  # what a power calculation may choose
AGAIN = 100  # first seed of the second arm of an A/A comparison
REPORT = "comparison.json"
MODES = ("tricks", "chain", "leave_out", "recipes", "optimizers", "again")

# ---------------------------------------------------------------- arms


def make_arms(options: argparse.Namespace) -> list[Arm]:
    """The arms, the base first.

    Raises:
        UsageError: unknown words, no arm or the same arm twice, or settings that the trainer refuses.
    """
    track, common = options.track, ("--track", options.track, *options.flags)
    if options.target:
        common += ("--target-loss", str(options.target))
    base = options.base or ("modern" if options.optimizers else "baseline")

    def arm(name: str, words: list[str], *flags: str) -> Arm:
        return Arm(name, ("--tricks", ",".join(words) or "baseline", *flags, *common))

    if options.tricks:
        arms = [arm(base, [base])] + [arm(f"+{t}", [base, t]) for t in options.tricks]
    elif options.chain:
        arms = [arm(base, [base])] + [arm(f"+{t}", [base, *options.chain[: n + 1]]) for n, t in enumerate(options.chain)]
    elif options.leave_out:
        stack = tricks.spelled_out(track, base)
        for word in options.leave_out:
            if word not in stack:
                raise UsageError(f"--leave-out {word}: it is not in {base}: {nearest(word, stack)}")
        arms = [arm(base, [base])] + [arm(f"-{w}", [x for x in stack if x != w]) for w in options.leave_out]
    elif options.recipes:
        names = [base, *(r for r in options.recipes if r != base)] if options.base else options.recipes
        arms = [arm(name, [name]) for name in names]
    elif options.again:
        one = arm(options.again, [options.again])
        return [one, Arm(f"{options.again} again", one.flags, first_seed=AGAIN)]
    else:
        arms = []
        for word in options.optimizers:
            spec, schedule = tuned_for(options.tuned_on, word) if options.tuned_on else (word, "")
            made = arm(word, [base], "--optimizer", spec, *(("--schedule", schedule) if schedule else ()))
            given = train_gpt.resolve(list(made.flags))[0].schedule
            if optimizers.own_schedule(split(word)[0]) and given != "constant":  # whatever schedule the others have
                made = dataclasses.replace(made, flags=(*made.flags, "--schedule", "constant"))
            arms.append(made)
    if len(arms) < 2:
        raise UsageError("one arm is no comparison: name at least two")
    seen: dict[Path, str] = {}
    for made in arms:
        folder = Trial(made, 1, 0).folder  # the trainer's own check of every setting
        if folder in seen:
            raise UsageError(f"{made.name!r} and {seen[folder]!r} are the same settings: give two seeds to one arm instead")
        seen[folder] = made.name
    return arms


def tuned_for(workload: str, word: str) -> tuple[str, str]:
    """Optimizer and schedule as tuned for a workload by `compare tune`, keys that the word gives kept.

    Raises:
        UsageError: nothing was tuned for the workload, or not this optimizer.
    """
    name, known = split(word)[0], json.loads(tricks.TUNED.read_text())
    if workload not in known:
        raise UsageError(f"--tuned-on {workload}: nothing was tuned for it: {nearest(workload, known)}")
    if name not in known[workload]:
        raise UsageError(f"--tuned-on {workload}: {name!r} was not tuned for it: {nearest(name, known[workload])}")
    return tricks.tuned(workload, word, tricks.track(workload).settings["schedule"])


# ---------------------------------------------------------------- trials


def find_horizons(arms: list[Arm], options: argparse.Namespace, runner: Runner, base_steps: int) -> dict[str, Search]:
    """The search of every arm: its own, beside a base of `base_steps`, or at the lengths given; as many arms at once as
    --side-by-side says."""
    most = options.max_steps or 4 * base_steps
    launch, at_once = make_launcher(options, side_by_side=True)
    target = target_of(options)
    bar = tqdm(unit="trial", desc="search", disable=not sys.stderr.isatty())

    def one(arm: Arm, first: int) -> Search:
        trained: list[Trial] = []

        def run(steps: int, seed: int) -> float:
            branch = options.branch and arm.name not in options.at  # given lengths have a seed each: nothing in common
            trial = Trial(arm, steps, seed, branching(trained, seed, first) if branch else ())
            row = runner.run("search", trial, launch)
            trained.append(trial)
            say(bar, f"search  {arm.name}: {steps} steps, seed {seed}: {row.val_loss:.4f} (target {target:g})")
            return row.val_loss

        try:
            if arm.name in options.at:
                return search_at(run, options.at[arm.name], target)
            return search(run, first, target, most, by_trunk=options.branch)
        finally:
            for trial in trained:
                runner.drop_checkpoints(trial)

    lengths = [options.first_steps or train_gpt.resolve(list(arm.flags))[0].steps for arm in arms]
    if mode_of(options) == "leave_out" and not options.first_steps:  # a stack less one trick has no length of its own
        lengths = [base_steps] * len(arms)
    if mode_of(options) == "chain":  # each begins where the one before ended: far below the recipe's own length
        found, first = {}, options.first_steps
        for arm, length in zip(arms, lengths, strict=True):
            found[arm.name] = one(arm, first or options.given.get(options.base or "baseline") or length)
            first = round(found[arm.name].found.steps) if found[arm.name].found else first
    else:
        pool = ThreadPoolExecutor(at_once)
        try:
            found = dict(zip([arm.name for arm in arms], pool.map(one, arms, lengths), strict=True))
        except BaseException:
            runner.interrupted.set()  # the other arms' searches stop after the trial that they are at
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    bar.close()
    return found


def branching(trained: list[Trial], seed: int, first: int) -> tuple[str, ...]:
    """Trainer flags: keep states on the way, and begin with the last one that a run of another length has in common."""
    every = str(max(1, first // 20))
    others = ",".join(str(t.folder) for t in trained if t.seed == seed and (t.folder / "checkpoints").exists())
    return ("--checkpoint-every", every, "--milestone-every", every, "--branch", others)


def confirm(plan: dict[str, int], seeds: range, arms: list[Arm], options: argparse.Namespace, runner: Runner) -> None:
    """Interleaved: every arm at seed 0, then every arm at seed 1, ..."""
    turns = [[Trial(arm, plan[arm.name], seed) for arm in arms if arm.name in plan] for seed in seeds]
    runner.run_turns("confirm", turns, *make_launcher(options, side_by_side=False))


def target_of(options: argparse.Namespace) -> float:
    return options.target or tricks.track(options.track).target_loss


def lengths(arms: list[Arm], found: dict[str, Search], given: dict[str, int], margin: float) -> dict[str, int]:
    """Steps of the confirming runs of each arm that has a horizon."""
    plan = {}
    for arm in arms:
        if arm.name in given:
            plan[arm.name] = given[arm.name]
        elif (horizon := found[arm.name].found) is not None:
            plan[arm.name] = math.ceil(horizon.steps * (1 + margin))
    return plan


def seeds_needed(found: dict[str, Search], margin: float) -> int:
    """Runs so that every arm, true to its search, is confirmed with p < 0.01 at a chance of 90 %."""
    gaps = [(-s.found.slope * math.log2(1 + margin), s.found.sd) for s in found.values() if s.found]
    wanted = [stats.runs_needed(gap, sd, comparison.ALPHA, most=MOST_SEEDS) for gap, sd in gaps]
    return max([LEAST_SEEDS, *wanted]) if wanted else 5


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    made = train_gpt.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = made.add_argument
    add("--track", default="cpu", help="track of all arms (default: cpu)")
    add("--base", default="", help="recipe or comma-separated tricks that the others are set against (default: baseline; "
        "modern with --optimizers)")  # fmt: skip
    modes = made.add_mutually_exclusive_group()
    modes.add_argument("--tricks", nargs="+", metavar="TRICK", help="one at a time onto the base")
    modes.add_argument("--chain", nargs="+", metavar="TRICK", help="one after the other onto the base")
    modes.add_argument("--leave-out", nargs="+", metavar="TRICK", help="one at a time out of the base")
    modes.add_argument("--recipes", nargs="+", metavar="RECIPE", help="whole recipes; the first is the base")
    modes.add_argument("--optimizers", nargs="+", metavar="SPEC", help="optimizers on the base's model; the first is the base")
    modes.add_argument("--again", metavar="RECIPE", help="A/A: a recipe against itself, on other seeds")
    modes.add_argument("--report", type=Path, metavar="FOLDER", help="print the verdicts of a comparison, train nothing")
    add("--tuned-on", metavar="WORKLOAD", help="with --optimizers: settings and schedules as `compare tune` found them "
        "best for a workload, instead of the track's")  # fmt: skip
    add("--target", type=float, default=0.0, help="validation loss to reach, nats per token (default: the track's)")
    add("--horizon", nargs="+", default=[], metavar="ARM=STEPS", help="length of an arm's confirming runs, instead of a search")
    add("--lengths", nargs="+", default=[], metavar="ARM=STEPS,STEPS", help="lengths of an arm's search, instead of its own "
        "choice; with --horizon: runs beside the confirming ones, which a ratio at equal loss needs")  # fmt: skip
    add("--first-steps", type=int, default=0, help="length that each search begins at (default: the recipe's, "
        "with --leave-out the whole stack's)")  # fmt: skip
    add("--max-steps", type=int, default=0, help="length at which a search gives up (default: 4 x the base's)")
    add("--branch", action="store_true", help="in the search, train what runs of several lengths have in common once and "
        "branch their cool-downs off (schedules such as wsd: the same losses, sooner; confirming runs are whole). Runs off one "
        "trunk are not independent: the interval of a horizon is too narrow then")  # fmt: skip
    add("--margin", type=float, default=MARGIN, help=f"confirm at so much more than the horizon (default: {MARGIN})")
    add("--seeds", type=int, default=0, help="confirming runs of each arm (default: by a power calculation on the measured "
        f"variance, {LEAST_SEEDS} to {MOST_SEEDS})")  # fmt: skip
    add("--side-by-side", type=int, default=1, help="arms searched at once, the cores shared; confirming is one at a time")
    add_launcher_flags(made)
    add("--allow-mixed", action="store_true", help="compare times of several machines all the same")
    add("--keep-checkpoints", action="store_true", help="keep the trials' weights (default: deleted when a trial has ended)")
    add("--out", type=Path, help="output folder (default: comparisons/<track>-<what>)")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> options.

    Raises:
        UsageError: an unknown flag or a value out of range.
    """
    options = read_options(parser(), argv)
    if not options.report and not any(getattr(options, mode) for mode in MODES):
        raise UsageError("compare what? --tricks, --chain, --leave-out, --recipes, --optimizers or --again (see --help)")
    if options.tuned_on and not options.optimizers:
        raise UsageError("--tuned-on goes with --optimizers")
    if options.seeds == 1:
        raise UsageError("--seeds 1: one run has no variance and shows nothing; take at least 2, better 5")
    at_least(options, seeds=0, first_steps=0, max_steps=0, side_by_side=1, processes=1, margin=0)
    options.given = {name: steps[0] for name, steps in steps_of_arms("--horizon", options.horizon, "2400")}
    options.at = dict(steps_of_arms("--lengths", options.lengths, "2400,2000"))
    return options


def steps_of_arms(flag: str, words: list[str], example: str) -> list[tuple[str, list[int]]]:
    """ARM=STEPS,STEPS -> (arm, [steps, steps]) of each word, several where the example has several.

    Raises:
        UsageError: a word of another form.
    """
    found = []
    for word in words:
        name, equals, given = word.rpartition("=")
        lengths = given.split(",")
        if not equals or (len(lengths) > 1 and "," not in example) or not all(n.isdigit() and int(n) for n in lengths):
            raise UsageError(f"{flag} takes ARM=STEPS, such as baseline={example}; not {word!r}")
        found.append((name, [int(n) for n in lengths]))
    return found


def mode_of(options: argparse.Namespace) -> str:
    return next(m for m in MODES if getattr(options, m))


def run(options: argparse.Namespace) -> list[str]:
    """Search, confirm, write the report; returns its verdict lines."""
    arms = make_arms(options)
    names = [arm.name for arm in arms]
    for flag, given in (("--horizon", options.given), ("--lengths", options.at)):
        if unknown := set(given) - set(names):
            raise UsageError(f"{flag} {min(unknown)}: there is no such arm: {nearest(min(unknown), names)}")
    mode = mode_of(options)
    out = options.out or Path("comparisons") / f"{options.track}-{mode.replace('_', '-')}-{names[0].split(':')[0]}"
    settings = {"track": options.track, "target": target_of(options), "base": names[0], "mode": mode}
    check_folder(out, REPORT, settings)
    held = lock(out)  # two comparisons in one folder would write over each other's trials
    try:
        return compare(arms, options, settings, out)
    finally:
        held.release()


def compare(arms: list[Arm], options: argparse.Namespace, settings: dict[str, Any], out: Path) -> list[str]:
    """`run` in its output folder."""
    names = [arm.name for arm in arms]
    runner = Runner(out, options.keep_checkpoints)
    base_steps = options.given.get(names[0]) or train_gpt.resolve(list(arms[0].flags))[0].steps
    searched = [arm for arm in arms if arm.name not in options.given or arm.name in options.at]
    found = find_horizons(searched, options, runner, base_steps)
    free = {name: search for name, search in found.items() if name not in options.given}
    why = {name: s.why for name, s in free.items()}
    plan = lengths(arms, free, options.given, options.margin)
    seeds = options.seeds or seeds_needed(free, options.margin)
    described = [{"name": a.name, "flags": list(a.flags), "steps": plan.get(a.name), "why": why.get(a.name, "")} for a in arms]
    settings |= {"command": options.command, "margin": options.margin, "seeds": seeds, "arms": described}

    def write() -> list[str]:
        rows, settings["left_out"] = runner.rows(arms)
        return report(out, comparison.summarise(rows, settings, options.allow_mixed), rows)

    if len(plan) < 2 or names[0] not in plan:
        write()
        reasons = "; ".join(f"{name}: {why[name]}" for name in names if name not in plan)
        raise UsageError(f"nothing to compare ({reasons}): raise --max-steps or --target; trials are kept in {out}")
    print(f"confirming with {seeds} seeds: " + ", ".join(f"{name} {steps} steps" for name, steps in plan.items()), flush=True)
    confirm(plan, range(seeds), arms, options, runner)
    return write()


def report(out: Path, summary: dict[str, Any], rows: list[comparison.Row]) -> list[str]:
    """Write comparison.json, README.md and the plots; returns the verdict lines."""
    left_out = summary.get("left_out", ())
    curves = read_curves(out / "curves.csv", [row for row in rows if row.run not in left_out])
    summary["plots"] = plots.draw_comparison(out, summary, curves)
    write_report(out, REPORT, summary, comparison.markdown(summary))
    return comparison.verdict_lines(summary)


def main(argv: list[str]) -> int:
    if argv[:1] == ["score"]:
        return score.main(argv[1:])
    if argv[:1] == ["tune"]:
        from lab.tuning import tune  # here: only this verb needs Optuna

        return tune.main(argv[1:])

    def work() -> str:
        options = parse(argv)
        if options.report:
            there, rows = read_report(options.report, REPORT)
            return "\n".join(report(options.report, comparison.again(there, rows, options.allow_mixed), rows))
        return "\n".join(run(options))

    return command("compare.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
