"""What the trials of a scaling experiment say: the speed-up of each trick at each size, its trend, a verdict.

Speed-ups are base over trick, above 1 the trick saves, in two forms:

- final loss: the tokens with which the base would reach the loss that the trick reaches with the tokens of budget 1. Trends and
  verdicts stand on this.
- time to loss: the tokens of budget 1 over those with which the trick would reach the loss that the base reaches with them.

In seconds and in FLOPs a speed-up is that in tokens times the ratio of what a token costs: FLOPs by `model.flops_per_token`,
seconds by short runs of both arms by turns, one at a time.
"""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.spec import UsageError
from lab import stats
from lab.comparison import Row, compute_type, turns_apart
from lab.scaling import laws as scaling_laws
from lab.scaling.laws import DRAWS, Lines, Noise, PowerLaw, between, bootstrap, fit_joint, interval, speedup, trend

COSTS = ("tokens", "seconds", "flops")


def losses_by_budget(cells: Sequence[dict[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each planned length of run of one arm at one size: tokens and the final losses of its seeds."""
    found = []
    for cell in cells:
        own = [r for r in rows if (r.phase, r.arm, r.steps) == ("curve", cell["trial"], cell["steps"])]
        finite = [r.val_loss for r in own if math.isfinite(r.val_loss)]
        if own:
            tokens = cell["steps"] * cell["batch_tokens"]
            failed = len(own) - len(finite)
            found.append({"budget": cell["budget"], "tokens": tokens, "losses": finite, "failed": failed})
    return found


def token_cost(rows: Sequence[Row], trial: str) -> dict[str, Any]:
    """Of one arm at one size: FLOPs a token, and seconds a token by seed of the runs that were timed by turns."""
    own = [r for r in rows if r.arm == trial and r.tokens]
    timed = {r.pair: r.train_time / r.tokens for r in own if r.phase == "time" and r.status == "ok"}
    return {"flops": own[0].flops / own[0].tokens if own else math.nan, "seconds": timed}


def timings_apart(cells: Sequence[dict[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The turns of short runs, all arms at one size on one seed, that do not lie within the hour."""
    found = []
    for size in dict.fromkeys(cell["size"] for cell in cells):
        trials = {cell["trial"] for cell in cells if cell["size"] == size}
        turns = turns_apart((row for row in rows if row.arm in trials), "time")
        found += [{"size": size, "trials": trials} | turn for turn in turns]
    return found


def curve_of(points: Sequence[dict[str, Any]]) -> tuple[PowerLaw | Lines | None, list[float], list[float]]:
    """Curve, tokens and losses of the points that have losses; no curve with fewer than two budgets."""
    tokens = [p["tokens"] for p in points for _ in p["losses"]]
    losses = [loss for p in points for loss in p["losses"]]
    return (scaling_laws.curve_through(tokens, losses) if len(set(tokens)) > 1 else None), tokens, losses


def at_one_size(base: dict[str, Any], trick: dict[str, Any], seed: int) -> dict[str, Any]:
    """The speed-up of a trick at a size, or `why` there is none. base, trick: `points` and `cost`."""
    own = next((p for p in trick["points"] if p["budget"] == 1), None)
    if own is None or not own["losses"]:
        return {"why": "every run of it diverged or crashed" if own else "its runs are missing"}
    curve, tokens, losses = curve_of(base["points"])
    if curve is None:
        return {"why": "the base's loss does not fall with tokens there"}
    mean = statistics.mean(own["losses"])
    found = speedup(curve, tokens, losses, mean, own["tokens"])
    result = dataclasses.asdict(found) | {"words": found.words(), "loss": mean, "why": "", "curve": dataclasses.asdict(curve)}
    result["time_to_loss"] = time_to_loss(base, trick)
    straight = isinstance(curve, Lines)
    failed = f"{own['failed']} of {own['failed'] + len(own['losses'])} runs failed" if own["failed"] else ""
    result["note"] = "; ".join(filter(None, ("no power law fits the base" if straight else "", failed)))
    if not found.inside:
        way, end, limit = ("above", max, curve.most) if found.low else ("below", min, curve.least)
        ran = statistics.mean(end((p for p in base["points"] if p["losses"]), key=lambda p: p["tokens"])["losses"])
        why = f"the base's curve is {way} this loss at {limit / own['tokens']:.3g} x the tokens"
        if (ran <= mean) if found.low else (ran >= mean):  # curve and runs do not agree: the bound is none
            return result | {"words": "unclear", "why": why + ", but the mean of its runs there is not"}
        return result | {"why": why}
    samples = [p["losses"] for p in (*base["points"], *trick["points"]) if len(p["losses"]) > 1]
    if not samples:
        return result | {"why": "one seed: the noise is not known"}
    draws = bootstrap(tokens, losses, own["tokens"], own["losses"], Noise.pooled(samples), seed, straight=straight)
    result["draws"] = {"tokens": draws}
    result["ratios"] = {"tokens": found.ratio}
    flops = base["cost"]["flops"] / trick["cost"]["flops"]
    result["ratios"]["flops"], result["draws"]["flops"] = found.ratio * flops, draws + math.log(flops)
    pairs = sorted(base["cost"]["seconds"].keys() & trick["cost"]["seconds"].keys())
    if len(pairs) > 1:
        cost = stats.paired_ratio(*([arm["cost"]["seconds"][p] for p in pairs] for arm in (base, trick)))
        rng = np.random.default_rng(seed)
        error = cost.sd / math.sqrt(cost.n) * rng.standard_t(cost.n - 1, DRAWS)
        result["ratios"]["seconds"], result["draws"]["seconds"] = found.ratio * cost.ratio, draws + math.log(cost.ratio) + error
    result["intervals"] = {cost: [math.exp(v) for v in interval(d)] for cost, d in result["draws"].items()}
    return result


def time_to_loss(base: dict[str, Any], trick: dict[str, Any]) -> dict[str, Any] | None:
    """The other form: `words`, `ratio` and whether it lies `inside` the trick's budgets; None without a curve of the trick."""
    curve, tokens, losses = curve_of(trick["points"])
    target = next((p for p in base["points"] if p["budget"] == 1 and p["losses"]), None)
    if curve is None or target is None:
        return None
    loss = statistics.mean(target["losses"])
    wanted = curve.amount(loss)
    if curve.least <= wanted <= curve.most:
        words = f"{target['tokens'] / wanted:.2f}x"
    elif wanted < curve.least:
        words = f"> {target['tokens'] / curve.least:.2f}x"
    else:
        words = f"< {target['tokens'] / curve.most:.2f}x"
    straight = target["tokens"] / between(tokens, losses, loss)
    return {"ratio": target["tokens"] / wanted, "inside": words[-1] == "x" and words[0] not in "<>", "words": words,
            "between": straight}  # fmt: skip


def judge(sizes: Sequence[dict[str, Any]], cost: str, at: float, seeds: int) -> scaling_laws.Trend | None:
    """The trend through the sizes that have a figure in that cost; None with fewer than two."""
    usable = [s for s in sizes if cost in s.get("draws", {})]
    if len(usable) < 2:
        return None
    draws = np.stack([s["draws"][cost] for s in usable], 1)
    return trend([s["parameters"] for s in usable], [s["ratios"][cost] for s in usable], draws, at, seeds)


def held_out(sizes: Sequence[dict[str, Any]], count: int, seeds: int) -> list[dict[str, Any]]:
    """How well the smaller sizes predicted the `count` largest: predicted and measured speed-up in tokens, and whether the
    prediction's interval, widened by the measurement's own noise, has the measured one."""
    found = []
    for size in sizes[len(sizes) - count :]:
        smaller = judge(sizes[: len(sizes) - count], "tokens", size["parameters"], seeds)
        if smaller is None or math.isinf(smaller.high) or "draws" not in size:
            continue
        measured, own = size["ratios"]["tokens"], size["intervals"]["tokens"]
        logs = [math.log(v) for v in (smaller.low, smaller.ratio, smaller.high)]
        noise = [math.log(v / measured) if v > 0 else -math.inf for v in own]
        low = logs[1] - math.hypot(logs[1] - logs[0], noise[1])
        high = logs[1] + math.hypot(logs[2] - logs[1], noise[0])
        found.append(
            {"size": size["size"], "ratio": smaller.ratio, "low": math.exp(low), "high": math.exp(high),
             "measured": measured,             "hit": low <= math.log(measured) <= high, "verdict": smaller.verdict}
        )  # fmt: skip
    return found


def laws(arms: dict[str, dict[str, dict[str, Any]]], sizes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """L(N, D) of each arm whose runs determine it."""
    found = {}
    for name, of in arms.items():
        points = [(s["parameters"], p["tokens"], loss) for s in sizes for p in of[s["size"]]["points"] for loss in p["losses"]]
        law = fit_joint(*zip(*points, strict=True)) if points else None
        if law:
            found[name] = dataclasses.asdict(law)
    return found


def retuned(cells: Sequence[dict[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
    """Of one arm at one size: losses by learning-rate factor and what not re-tuning would have cost. {} without a re-tune."""
    planned = {(cell["trial"], cell["steps"]): cell["factor"] for cell in cells}
    own = [r for r in rows if r.phase == "retune" and (r.arm, r.steps) in planned]
    losses = {planned[r.arm, r.steps]: r.val_loss for r in own}
    if len(losses) < 2:
        return {}
    best = min(losses, key=losses.get)
    edge = best in (min(losses), max(losses))
    return {"losses": losses, "best": best, "cost": losses.get(1.0, math.inf) - losses[best], "edge": edge}


def summarise(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """scaling.json: `settings` (sizes, arms, the planned cells, at, hold_out, seeds, base, runs left out) and all that the
    trials say. The end of an interval that has none is None.

    Raises:
        UsageError: trials on different data or in several compute types; all runs of the base diverged at a size.
    """
    planned = {cell["trial"] for cell in settings["cells"]}
    rows = [row for row in rows if row.arm in planned and row.run not in settings.get("left_out", ())]
    if len({row.data for row in rows if row.data}) > 1:
        raise UsageError("trials on different data in one experiment: prepare one corpus, and start in a new --out")
    dtype = compute_type(rows)
    sizes, base = settings["sizes"], settings["base"]
    apart = timings_apart(settings["cells"], rows)
    timed = {(trial, turn["pair"]) for turn in apart for trial in turn["trials"]}
    rows = [row for row in rows if row.phase != "time" or (row.arm, row.pair) not in timed]
    arms: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name in settings["arms"]:
        for size in sizes:
            cells = [c for c in settings["cells"] if (c["arm"], c["size"]) == (name, size["size"])]
            curve = [c for c in cells if c["phase"] == "curve"]
            arms[name][size["size"]] = {
                "points": losses_by_budget(curve, rows),
                "cost": token_cost(rows, curve[0]["trial"]) if curve else {"flops": math.nan, "seconds": {}},
                "retune": retuned([c for c in cells if c["phase"] == "retune"], rows),
            }
    for size in sizes:
        points = arms[base][size["size"]]["points"]
        if points and not any(p["losses"] for p in points):
            failed = sum(p["failed"] for p in points)
            raise UsageError(
                f"all {failed} runs of {base} diverged or crashed at {size['size']}: lower its learning rate (--lr-transfer, "
                f"--retune, -- --optimizer), or leave that size out"
            )
    tricks = []
    for name in settings["arms"]:
        if name == base:
            continue
        found = [
            {"size": s["size"], "parameters": s["parameters"]} | at_one_size(arms[base][s["size"]], arms[name][s["size"]], i)
            for i, s in enumerate(sizes)
        ]
        trends = {cost: judge(found, cost, settings["at"], settings["seeds"]) for cost in COSTS}
        check = held_out(found, settings["hold_out"], settings["seeds"]) if settings["hold_out"] else []
        why = "" if trends["tokens"] else "; ".join(f"{s['size']}: {s['why']}" for s in found if s["why"])
        for s in found:
            s.pop("draws", None)
        trends = {cost: t and dataclasses.asdict(t) | {"words": t.words()} for cost, t in trends.items()}
        tricks.append({"trick": name, "sizes": found, "trends": trends, "held_out": check, "why": why})
    machines = sorted({row.machine for row in rows if row.machine})
    sources = sorted({row.source for row in rows if row.source})
    made = {"format": 1, "tricks": tricks, "curves": arms, "laws": laws(arms, sizes), "machines": machines, "sources": sources}
    apart = [{key: turn[key] for key in ("size", "pair", "hours")} for turn in apart]
    return finite(settings | made | ({"dtype": dtype} if dtype else {}) | ({"apart": apart} if apart else {}))


def again(summary: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The summary of the same experiment, made anew from its trials.

    Raises:
        UsageError: see summarise.
    """
    made = ("format", "tricks", "curves", "laws", "machines", "sources", "dtype", "apart", "plots")
    return summarise(rows, {key: value for key, value in summary.items() if key not in made})


def finite(value: Any) -> Any:
    """JSON has no infinity: None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
