"""What the command of a report plans: which arms with which flags, which runs. Broken: the report says otherwise."""

import math
import re
import shlex
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tricks
from engine.spec import split
from lab import comparison
from lab.horizon import FIRST_SEED
from lab.ledger import Row
from lab.records.judge import NotCheckable, need
from lab.scaling import ladder, survival
from lab.scaling.ladder import RETUNE_SEED, TIME_PAIRS, TIME_SEED, Rung, Size

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


def sizes_of(words: list[str], of: ladder.Ladder) -> tuple[Size, ...]:
    """The sizes of a command: the ladder's own, by words, or, as they could once be given, by a file in records/scaling."""
    if len(words) == 1 and words[0].startswith("records/scaling/"):
        listed = Path(__file__).parents[2] / "records" / "scaling" / Path(words[0]).name
        lines = (line.split() for line in listed.read_text().splitlines() if not line.startswith("#"))
        return tuple(Size(name, *map(int, shape)) for name, *shape in lines)
    return ladder.own_sizes(words, of) if words else of.sizes


def of_scaling(summary: Summary, rows: list[Row]) -> Arms:
    """The arms at every size. Broken: also where a planned run is missing."""
    said = words_of(summary["command"])
    of, base, extra = ladder.LADDERS[said.get("--ladder", ["cpu"])[0]], said.get("--base", ["modern"])[0], said["--"]
    common = ("--track", of.track, *extra, *ladder.LAST_ONLY)
    arms = {base: ("--tricks", base, *common)}
    registered(said.get("--tricks", []))
    arms |= {f"+{word}": (*ladder.trick_flags(base, word), *common) for word in said.get("--tricks", [])}
    ratio = float(said.get("--tokens-per-parameter", [0])[0]) or of.tokens_per_parameter
    rungs = [ladder.rung(size, of, ratio, arms[base]) for size in sizes_of(said.get("--sizes", []), of)]
    at, seeds = said.get("--at", [""])[0], int(said.get("--seeds", [3])[0])
    about = {"ladder": said.get("--ladder", ["cpu"])[0], "base": base, "flags": extra, "arms": list(arms), "seeds": seeds}
    about |= {"tokens_per_parameter": ratio, "lr_transfer": said.get("--lr-transfer", ["mup"])[0]}
    about |= {"hold_out": int(said.get("--hold-out", [1])[0]), "at": ladder.size_of(at) if at else 10 * rungs[-1].parameters}
    agree(summary, about | {"sizes": [rung.described() for rung in rungs]})
    cells = of_cells(summary, arms, {rung.size.name: rung for rung in rungs}, said)
    used = {(row.phase, row.arm, row.steps, row.pair) for row in rows if row.run not in summary.get("left_out", ())}
    wanted = {"retune": [RETUNE_SEED], "curve": range(seeds), "time": range(TIME_SEED, TIME_SEED + TIME_PAIRS)}
    planned = {(c["phase"], c["trial"], c["steps"], pair) for c in summary["cells"] for pair in wanted[c["phase"]]}
    missing, strange = planned - used, used - planned
    need(not missing, f"a run is missing: {min(missing, default='')}")
    need(not strange, f"a run that was not planned: {min(strange, default='')}")
    factors(summary, rows)
    return cells


def of_cells(summary: Summary, arms: Arms, rungs: dict[str, Rung], said: dict[str, list[str]]) -> Arms:
    """The flags of every cell's trials. Broken: a cell is missing, or its length, batch or name do not follow."""
    flags, there = {}, set()
    for c in summary["cells"]:
        rung, budget = rungs[c["size"]], c["budget"]
        arm = ladder.at_size(c["arm"], arms[c["arm"]], rung, summary["lr_transfer"], c["factor"])
        steps = int(said.get("--timing-steps", ["20"])[0]) if c["phase"] == "time" else rung.steps(budget)
        follows = {"trial": arm.name, "steps": steps, "batch_tokens": rung.batch_tokens}
        for key, value in follows.items():
            need(c[key] == value, f"{c['arm']} at {c['size']}: {key} is {c[key]!r}, by its size {value!r}")
        flags[arm.name] = arm.flags
        there.add((c["phase"], c["arm"], c["size"], budget, c["factor"] if c["phase"] == "retune" else 1))
    count, step = int(said.get("--retune", [3])[0]), float(said.get("--retune-step", [2])[0])
    budgets = [float(b) for b in said.get("--budgets", ["0.5", "1", "2"])]
    tried = ladder.retune_factors(count, step) if count > 1 else []
    wanted = {("retune", name, size, 1, factor) for name, size, factor in product(arms, rungs, tried)}
    wanted |= {
        ("curve", name, size, b, 1) for name, size, b in product(arms, rungs, budgets) if b == 1 or name == summary["base"]
    }
    missing = wanted - there
    need(not missing, f"a cell is missing: {min(missing, default='')}")
    return flags


def factors(summary: Summary, rows: Iterable[Row]) -> None:
    """Broken: a curve was not trained at the best factor of its re-tune."""
    for name, size in product(summary["arms"], (size["size"] for size in summary["sizes"])):
        cells = [c for c in summary["cells"] if (c["arm"], c["size"]) == (name, size)]
        best = survival.retuned([c for c in cells if c["phase"] == "retune"], list(rows)).get("best", 1.0)
        for c in cells:
            need(
                c["phase"] == "retune" or math.isclose(c["factor"], best),
                f"{name} at {size}: factor {c['factor']}, best is {best}",
            )
