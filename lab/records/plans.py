"""What the command of a report plans: which arms with which flags, which runs. Broken: the report says otherwise."""

import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tricks
from engine.spec import split
from lab import comparison
from lab.horizon import FIRST_SEED
from lab.ledger import Row
from lab.records.judge import Broken, NotCheckable, need
from lab.scaling import experiment
from lab.scaling.ladder import Cell, Size

Summary = dict[str, Any]
Arms = dict[str, tuple[str, ...]]  # name of a trial's arm -> its flags


def words_of(command: str) -> dict[str, list[str]]:
    """Flag -> its words; `--` -> what the trainer gets."""
    said: dict[str, list[str]] = {}
    words, here = shlex.split(command), ""
    cut = words.index("--") if "--" in words else len(words)
    for word in words[:cut]:
        if word.startswith("--"):
            here, _, value = word.partition("=")
            here = "--optimizers" if here == "--arm" else here
            said[here] = said.get(here, []) * (here == "--optimizers") + [value] * bool(value)
        else:
            said.setdefault(here, []).append(word)
    return said | {"--": words[cut + 1 :]}


def registered(flags: Iterable[str]) -> list[str]:
    """The flags of somebody's report. NotCheckable: they name code, which is loaded for the user's own command line alone."""
    for name in (split(word)[0] for word in flags if not word.startswith("-")):
        if ":" in name or re.match(r"(?!torch\.optim\.)[a-z_]\w*\.", name, re.IGNORECASE):
            raise NotCheckable(f"{name} is code from outside the repository, which is not run unasked")
    return list(flags)


def agree(summary: Summary, planned: dict[str, Any]) -> None:
    """Broken: the summary has another value than the command."""
    for key, value in planned.items():
        need(summary.get(key) == value, f"{key} is {summary.get(key)!r}, by the command {value!r}")


def of_comparison(summary: Summary, rows: list[Row]) -> Arms:
    """The arms of a comparison, as the command names them. Broken: also where a run of a search is missing."""
    said = words_of(summary["command"])
    mode = next((m for m in comparison.MODES if f"--{m.replace('_', '-')}" in said), "")
    of = {m: said.get(f"--{m.replace('_', '-')}", []) for m in comparison.MODES}
    track, base = said.get("--track", ["cpu"])[0], said.get("--base", [""])[0]
    target = float(said.get("--target", [0])[0])
    about = {"track": track, "mode": mode, "target": target or tricks.track(track).target_loss}
    about |= {"margin": float(said.get("--margin", [comparison.MARGIN])[0]), "steps": int(said.get("--steps", [0])[0]) or None}
    about |= {"seeds": int(said["--seeds"][0])} if said.get("--seeds", ["0"]) != ["0"] else {}
    options = SimpleNamespace(**of | {"track": track, "base": base, "again": (of["again"] or [""])[0]})
    base = base or ("modern" if of["optimizers"] else "baseline")
    specs = dict(map(comparison.named, of["optimizers"]))
    stacks = {name: [base] for name in specs} or dict(comparison.words_of_arms(options, base))
    agree(summary, about | {"base": next(iter(stacks))})
    names = [arm["name"] for arm in summary["arms"]]
    given = dict.fromkeys(names if about["steps"] else (), about["steps"])
    given |= dict(word.rsplit("=", 1) for word in said.get("--horizon", []))
    need(names == list(stacks), f"arms {names}, by the command {list(stacks)}")
    common = ["--track", track, *said["--"], *(["--target-loss", str(target)] if target else [])]
    for arm in summary["arms"]:
        name, flags = arm["name"], list(arm["flags"])
        wanted = ["--tricks", ",".join(stacks[name]) or "baseline"]
        if of["optimizers"]:
            spec = flags[3] if "--tuned-on" in said and split(flags[3])[0] == split(specs[name])[0] else specs[name]
            wanted, flags = [*wanted, "--optimizer", spec], without(flags, "--schedule")
            common = without(common, "--schedule")
        need(flags == [*wanted, *common], f"{name}: flags {' '.join(flags)}, by the command {' '.join([*wanted, *common])}")
        planned = int(given.get(name, arm["steps"] or 0))
        need(planned == (arm["steps"] or 0), f"{name}: {arm['steps']} steps, by the command {planned}")
        searched(name, [r for r in rows if (r.arm, r.phase) == (name, "search")], summary, said)
    return {arm["name"]: tuple(arm["flags"]) for arm in summary["arms"]}


def without(flags: list[str], flag: str) -> list[str]:
    """Flags without one that takes a word."""
    return [word for i, word in enumerate(flags) if word != flag and (not i or flags[i - 1] != flag)]


def searched(name: str, rows: list[Row], summary: Summary, said: dict[str, list[str]]) -> None:
    """Broken: a run of an arm's search is missing. The first has the first seed, each further one the next."""
    used = [row for row in rows if row.run not in summary.get("left_out", ())]
    pairs = {row.pair for row in used}
    gap = set(range(FIRST_SEED, max(pairs, default=0))) - pairs
    need(not gap, f"{name}: the search's run with seed {min(gap, default=0)} is missing")
    first = said.get("--first-steps", ["0"])[0]
    begun = first == "0" or not rows or (int(first), FIRST_SEED) in {(row.steps, row.pair) for row in used}
    need(begun or summary["mode"] == "chain", f"{name}: the search's first run, of {first} steps, is missing")
    for word in said.get("--lengths", []):
        of, _, lengths = word.rpartition("=")
        for n, steps in enumerate(lengths.split(",") if of == name else ()):
            there = (int(steps), FIRST_SEED + n) in {(row.steps, row.pair) for row in used}
            need(there, f"{name}: its run of {steps} steps with seed {FIRST_SEED + n} is missing")


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
    agree(summary, made.described())
    used = [row for row in rows if row.run not in summary.get("left_out", ())]
    rungs, cells = {rung.size.name: rung for rung in made.rungs}, []
    for c in summary["cells"]:
        cell = made.cell(c["phase"], c["arm"], rungs[c["size"]], c["budget"], c["factor"])
        for key, value in cell.described().items():
            need(c[key] == value, f"{c['arm']} at {c['size']}: {key} is {c[key]!r}, by its size {value!r}")
        cells.append(cell)
    missing = set(map(as_planned, made.planned())) - set(map(as_planned, cells))
    need(not missing, f"a cell is missing: {min(missing, default='')}")
    ran = {(row.phase, row.arm, row.steps, row.pair) for row in used}
    planned = {(cell.phase, cell.arm.name, cell.steps, seed) for cell in cells for seed in made.seeds(cell.phase)}
    missing, strange = planned - ran, ran - planned
    need(not missing, f"a run is missing: {min(missing, default='')}")
    need(not strange, f"a run that was not planned: {min(strange, default='')}")
    best = made.best_factors([cell for cell in cells if cell.phase == "retune"], used)
    for cell in (cell for cell in cells if cell.phase != "retune"):
        factor = best[cell.rung, cell.name]
        words = f"{cell.name} at {cell.rung.size.name}: factor {cell.factor}, best is {factor}"
        need(math.isclose(cell.factor, factor), words)
    return {cell.arm.name: cell.arm.flags for cell in cells}


def as_planned(cell: Cell) -> tuple[str, str, str, float, float]:
    """Before the re-tune says which factor the cells after it have."""
    return cell.phase, cell.name, cell.rung.size.name, cell.budget, cell.factor if cell.phase == "retune" else 1
