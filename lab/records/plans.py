"""What the command of a report plans: which arms with which flags, which runs. Broken: the report says otherwise. `rows` are
the trials that are not left out."""

import argparse
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tricks
from config import flag_of
from engine.command import Parser
from engine.spec import split
from lab import comparison
from lab.horizon import FIRST_SEED
from lab.ledger import Row
from lab.records.judge import Broken, NotCheckable, agree, need
from lab.scaling import experiment
from lab.scaling.ladder import Cell, Size

Summary = dict[str, Any]
Arms = dict[str, tuple[str, ...]]  # name of a trial's arm -> its flags
# Flags of compare.py that say what runs: with one word, and its default; with several
ONE = {"track": "cpu", "base": "", "again": "", "tuned_on": "", "target": 0.0, "margin": comparison.MARGIN, "steps": 0}
ONE |= {"seeds": 0, "first_steps": 0}
SEVERAL = ("tricks", "chain", "leave_out", "recipes", "horizon", "lengths")
BY_COMMAND = "{key} is {stated!r}, by the command {expected!r}"


def options_of(command: str) -> argparse.Namespace:
    """What a command of compare.py says of arms and runs; `flags` is what the trainer gets."""
    parser, words = Parser(add_help=False), shlex.split(command)
    parser.add_argument("--optimizers", "--arm", nargs="+", action="extend", default=[])
    for name in SEVERAL:
        parser.add_argument(flag_of(name), nargs="+", default=[])
    for name, default in ONE.items():
        parser.add_argument(flag_of(name), type=type(default), default=default)
    cut = words.index("--") if "--" in words else len(words)
    options, _ = parser.parse_known_args(words[:cut])
    options.flags = words[cut + 1 :]
    return options


def registered(flags: Iterable[str]) -> list[str]:
    """The flags of somebody's report. NotCheckable: they name code, which is loaded for the user's own command line alone."""
    for name in (split(word)[0] for word in flags if not word.startswith("-")):
        if ":" in name or re.match(r"(?!torch\.optim\.)[a-z_]\w*\.", name, re.IGNORECASE):
            raise NotCheckable(f"{name} is code from outside the repository, which is not run unasked")
    return list(flags)


def of_comparison(summary: Summary, rows: list[Row]) -> Arms:
    """The arms of a comparison, as the command names them. Broken: also where a run of a search is missing."""
    options = options_of(summary["command"])
    specs, steps, target = dict(map(comparison.named, options.optimizers)), options.steps, options.target
    base = options.base or ("modern" if specs else "baseline")
    stacks = {name: [base] for name in specs} or stacks_of(options, base, summary)
    about = {"track": options.track, "mode": next((mode for mode in comparison.MODES if getattr(options, mode)), "")}
    about |= {"target": target or tricks.track(options.track).target_loss, "base": next(iter(stacks))}
    about |= {"margin": options.margin, "steps": steps or None} | ({"seeds": options.seeds} if options.seeds else {})
    agree(summary, about, BY_COMMAND)
    names = [arm["name"] for arm in summary["arms"]]
    need(names == list(stacks), f"arms {names}, by the command {list(stacks)}")
    given = dict.fromkeys(names if steps else (), steps) | dict(word.rsplit("=", 1) for word in options.horizon)
    common = ["--track", options.track, *options.flags, *(["--target-loss", str(target)] if target else [])]
    for arm in summary["arms"]:
        name, flags = arm["name"], list(arm["flags"])
        wanted = ["--tricks", ",".join(stacks[name]) or "baseline"]
        if specs:
            spec = flags[3] if options.tuned_on and split(flags[3])[0] == split(specs[name])[0] else specs[name]
            wanted, flags = [*wanted, "--optimizer", spec], without(flags, "--schedule")
            common = without(common, "--schedule")
        need(flags == [*wanted, *common], f"{name}: flags {' '.join(flags)}, by the command {' '.join([*wanted, *common])}")
        ran, planned = arm["steps"] or 0, int(given.get(name, arm["steps"] or 0))
        need(ran == planned, f"{name}: {ran} steps, by the command {planned}")
        searched(name, [row for row in rows if (row.arm, row.phase) == (name, "search")], options)
    return {arm["name"]: tuple(arm["flags"]) for arm in summary["arms"]}


def stacks_of(options: argparse.Namespace, base: str, summary: Summary) -> dict[str, list[str]]:
    """Arm -> its tricks. With --leave-out, all tricks of its arms are the named recipe, which may be another by now."""
    if not options.leave_out or base not in tricks.track(options.track).recipes:
        return dict(comparison.words_of_arms(options, base))
    told = {arm["name"]: arm["flags"][1].split(",") for arm in summary["arms"]}
    left = {name: word for word in options.leave_out if (name := f"-{word}") in told}
    wholes = {tuple(sorted([*told[name], word])) for name, word in left.items()}  # a trick that is still there is there twice
    need(len(wholes) == 1 == max(Counter(*wholes).values()), f"its arms are not one {base} with a trick left out of each")
    return {base: [base]} | {name: told[name] for name in left}


def without(flags: list[str], flag: str) -> list[str]:
    """Flags without one that takes a word."""
    return [word for before, word in zip(["", *flags], flags) if flag not in (before, word)]


def searched(name: str, rows: list[Row], options: argparse.Namespace) -> None:
    """Broken: a run of an arm's search is missing. The first has the first seed, each further one the next."""
    pairs, ran = {row.pair for row in rows}, {(row.steps, row.pair) for row in rows}
    gap = set(range(FIRST_SEED, max(pairs, default=0))) - pairs
    need(not gap, f"{name}: the search's run with seed {min(gap, default=0)} is missing")
    first = options.first_steps
    begun = not first or not rows or (first, FIRST_SEED) in ran or options.chain
    need(begun, f"{name}: the search's first run, of {first} steps, is missing")
    for word in options.lengths:
        of, _, lengths = word.rpartition("=")
        for n, steps in enumerate(lengths.split(",") if of == name else ()):
            need((int(steps), FIRST_SEED + n) in ran, f"{name}: its run of {steps} steps with seed {FIRST_SEED + n} is missing")


# ---------------------------------------------------------------- scaling


def listed(words: list[str]) -> tuple[Size, ...]:
    """The sizes of a file in records/scaling, by which they could once be given."""
    if len(words) != 1 or not words[0].startswith("records/scaling/"):
        return ()
    file = Path(__file__).parents[2] / "records" / "scaling" / Path(words[0]).name
    lines = (line.split() for line in file.read_text().splitlines() if not line.startswith("#"))
    return tuple(Size(name, *map(int, shape)) for name, *shape in lines)


def of_scaling(summary: Summary, rows: list[Row]) -> Arms:
    """The arms at every size. Broken: also where a planned cell or run is missing, or a cell does not follow from its size."""
    try:
        options = experiment.parse(shlex.split(summary["command"]))
    except SystemExit:
        raise Broken("its command asks for help alone") from None
    registered(options.tricks)
    made = experiment.make(options, listed(options.sizes))
    agree(summary, made.described(), BY_COMMAND)
    rungs, cells = {rung.size.name: rung for rung in made.rungs}, []
    for c in summary["cells"]:
        cell = made.cell(c["phase"], c["arm"], rungs[c["size"]], c["budget"], c["factor"])
        agree(c, cell.described(), f"{c['arm']} at {c['size']}: {{key}} is {{stated!r}}, by its size {{expected!r}}")
        cells.append(cell)
    missing = set(map(as_planned, made.planned())) - set(map(as_planned, cells))
    need(not missing, f"a cell is missing: {min(missing, default='')}")
    ran = {(row.phase, row.arm, row.steps, row.pair) for row in rows}
    planned = {(cell.phase, cell.arm.name, cell.steps, seed) for cell in cells for seed in made.seeds(cell.phase)}
    need(not planned - ran, f"a run is missing: {min(planned - ran, default='')}")
    need(not ran - planned, f"a run that was not planned: {min(ran - planned, default='')}")
    best = made.best_factors([cell for cell in cells if cell.phase == "retune"], rows)
    for cell in (cell for cell in cells if cell.phase != "retune"):
        factor = best[cell.rung, cell.name]
        need(math.isclose(cell.factor, factor), f"{cell.name} at {cell.rung.size.name}: factor {cell.factor}, best is {factor}")
    return {cell.arm.name: cell.arm.flags for cell in cells}


def as_planned(cell: Cell) -> tuple[str, str, str, float, float]:
    """Before the re-tune says which factor the cells after it have."""
    return cell.phase, cell.name, cell.rung.size.name, cell.budget, cell.factor if cell.phase == "retune" else 1
