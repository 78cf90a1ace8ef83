"""What the trials of a scaling experiment say: the speed-up of each trick at each size, its trend, a verdict.

Speed-up = tokens that the base needs for the same loss / tokens that the trick used, at budget 1; above 1 the trick saves. In
seconds and in FLOPs it is multiplied by the ratio of what a token costs: FLOPs by `model.flops_per_token`, seconds by short
runs of all arms, interleaved, one at a time.
"""

import json
import math
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from engine.spec import UsageError
from lab import stats
from lab.ledger import Row, compute_type, turns_apart
from lab.scaling.curves import DRAWS, bootstrap, curve_through, interval, pooled, speedup
from lab.scaling.trend import Trend, trend

COSTS = ("tokens", "seconds", "flops")  # that a speed-up is given in
Found = dict[str, Any]  # a part of scaling.json


def losses_by_budget(cells: Sequence[Found], rows: Sequence[Row]) -> list[Found]:
    """For each planned length of run of one arm at one size: tokens and the final losses of its seeds."""
    points = []
    for cell in cells:
        ran = [r.val_loss for r in rows if (r.phase, r.arm, r.steps) == ("curve", cell["trial"], cell["steps"])]
        losses = [loss for loss in ran if math.isfinite(loss)]
        about = {"budget": cell["budget"], "tokens": cell["steps"] * cell["batch_tokens"], "losses": losses}
        points += [about | {"failed": len(ran) - len(losses)}] if ran else []
    return points


def retuned(cells: Sequence[Found], rows: Sequence[Row]) -> Found:
    """Losses by learning-rate factor, and what it would have cost not to re-tune. {} without a re-tune."""
    factors = {("retune", cell["trial"], cell["steps"]): cell["factor"] for cell in cells}
    losses = {factors[key]: r.val_loss for r in rows if (key := (r.phase, r.arm, r.steps)) in factors}
    if len(losses) < 2:
        return {}
    best = min(losses, key=losses.get)
    cost, edge = losses.get(1.0, math.inf) - losses[best], best in (min(losses), max(losses))
    return {"losses": losses, "best": best, "cost": cost, "edge": edge}


def measured(cells: Sequence[Found], rows: Sequence[Row]) -> Found:
    """All that is measured of one arm at one size. Its cost: FLOPs a token, and seconds a token by seed of the timed runs."""
    curve, tried = ([cell for cell in cells if cell["phase"] == phase] for phase in ("curve", "retune"))
    ran = [r for r in rows if r.tokens and r.arm == (curve[0]["trial"] if curve else "")]
    timed = {r.pair: r.train_time / r.tokens for r in ran if r.phase == "time" and r.status == "ok"}
    cost = {"flops": ran[0].flops / ran[0].tokens if ran else math.nan, "seconds": timed}
    return {"points": losses_by_budget(curve, rows), "cost": cost, "retune": retuned(tried, rows)}


def at_one_size(base: Found, trick: Found, seed: int) -> Found:
    """The speed-up of a trick at a size, or `why` there is none. base, trick: by `measured`."""
    if not trick["points"]:
        return {"why": "its runs are missing"}
    own = next(point for point in trick["points"] if point["budget"] == 1)
    if not own["losses"]:
        return {"why": "every run of it diverged or crashed"}
    ran = [point for point in base["points"] if point["losses"]]
    tokens = [point["tokens"] for point in ran for _ in point["losses"]]
    losses = [loss for point in ran for loss in point["losses"]]
    curve = curve_through(tokens, losses) if len(set(tokens)) > 1 else None
    if curve is None:
        return {"why": "the base's loss does not fall with tokens there"}
    mean, amount = statistics.mean(own["losses"]), own["tokens"]
    gain = speedup(curve, tokens, losses, mean, amount)
    result = gain._asdict() | {"words": gain.words(), "loss": mean, "why": "", "curve": curve._asdict()}
    if not gain.inside:  # a bound, if the base's runs at that end of its curve agree with it
        above = gain.low > 0
        limit, end = (curve.most, max) if above else (curve.least, min)
        there = statistics.mean(end(ran, key=lambda point: point["tokens"])["losses"])
        result["why"] = f"the base's curve is {'above' if above else 'below'} this loss at {limit / amount:.3g} x the tokens"
        if not (there > mean if above else there < mean):
            result |= {"why": f"{result['why']}, but the mean of its runs there is not", "words": "unclear"}
        return result
    samples = [p["losses"] for p in (*base["points"], *trick["points"]) if len(p["losses"]) > 1]
    if not samples:
        return result | {"why": "one seed: the noise is not known"}
    draws = bootstrap(type(curve), tokens, losses, amount, own["losses"], pooled(samples), seed)
    return result | in_every_cost(gain.ratio, draws, base["cost"], trick["cost"], seed)


def in_every_cost(ratio: float, draws: np.ndarray, base: Found, trick: Found, seed: int) -> Found:
    """A speed-up in tokens, and its bootstrap, in tokens, FLOPs and, where they were timed, seconds."""
    flops = base["flops"] / trick["flops"]
    ratios = {"tokens": ratio, "flops": ratio * flops}
    drawn = {"tokens": draws, "flops": draws + math.log(flops)}
    pairs = sorted(base["seconds"].keys() & trick["seconds"].keys())
    if len(pairs) > 1:
        cost = stats.paired_ratio(*([arm["seconds"][pair] for pair in pairs] for arm in (base, trick)))
        error = cost.sd / math.sqrt(cost.n) * np.random.default_rng(seed).standard_t(cost.n - 1, DRAWS)
        ratios["seconds"], drawn["seconds"] = ratio * cost.ratio, draws + math.log(cost.ratio) + error
    intervals = {cost: [math.exp(v) for v in interval(values)] for cost, values in drawn.items()}
    return {"ratios": ratios, "intervals": intervals, "draws": drawn}


def judge(sizes: Sequence[Found], cost: str, at: float, seeds: int) -> Trend | None:
    """The trend through the sizes that have a figure in that cost; None with fewer than two."""
    usable = [s for s in sizes if cost in s.get("draws", {})]
    if len(usable) < 2:
        return None
    draws = np.stack([s["draws"][cost] for s in usable], 1)
    return trend([s["parameters"] for s in usable], [s["ratios"][cost] for s in usable], draws, at, seeds)


def held_out(sizes: Sequence[Found], count: int, seeds: int) -> list[Found]:
    """How the smaller sizes predicted the `count` largest: is the measured speed-up, in tokens, inside the prediction's
    interval, widened by its own noise?"""
    checks, last = [], len(sizes) - count
    for size in sizes[last:]:
        predicted = judge(sizes[:last], "tokens", size["parameters"], seeds)
        if predicted is None or math.isinf(predicted.high) or "draws" not in size:
            continue
        ratio = size["ratios"]["tokens"]
        low, centre, high = (math.log(v) for v in (predicted.low, predicted.ratio, predicted.high))
        below, above = (math.log(v / ratio) if v > 0 else -math.inf for v in size["intervals"]["tokens"])
        low, high = centre - math.hypot(centre - low, above), centre + math.hypot(high - centre, below)
        check = {"size": size["size"], "ratio": predicted.ratio, "low": math.exp(low), "high": math.exp(high)}
        checks.append(check | {"measured": ratio, "hit": low <= math.log(ratio) <= high, "verdict": predicted.verdict})
    return checks


def judged(name: str, arms: dict[str, dict[str, Found]], settings: Found) -> Found:
    """A trick at all sizes, its trends, and the check on the largest sizes."""
    seeds, sizes = settings["seeds"], []
    for seed, size in enumerate(settings["sizes"]):
        against = at_one_size(arms[settings["base"]][size["size"]], arms[name][size["size"]], seed)
        sizes.append({"size": size["size"], "parameters": size["parameters"]} | against)
    trends = {cost: judge(sizes, cost, settings["at"], seeds) for cost in COSTS}
    checks = held_out(sizes, settings["hold_out"], seeds)
    why = "" if trends["tokens"] else "; ".join(f"{s['size']}: {s['why']}" for s in sizes if s["why"])
    said = {cost: t and t._asdict() | {"words": t.words()} for cost, t in trends.items()}
    sizes = [{key: value for key, value in s.items() if key != "draws"} for s in sizes]
    return {"trick": name, "sizes": sizes, "trends": said, "held_out": checks, "why": why}


def all_failed(runs: int, base: str, size: str) -> UsageError:
    instead = "lower its learning rate (--lr-transfer, --retune, -- --optimizer), or leave that size out"
    return UsageError(f"all {runs} runs of {base} diverged or crashed at {size}: {instead}")


def summarise(rows: Sequence[Row], settings: Found) -> Found:
    """scaling.json: `settings` (sizes, arms, the planned cells, at, hold_out, seeds, base, runs left out) and all that the
    trials say. Raises UsageError: different data or compute types in one experiment; all runs of the base failed at a size."""
    cells, left_out, apart = settings["cells"], settings.get("left_out", ()), []
    planned = {cell["trial"]: cell["size"] for cell in cells}
    rows = [row for row in rows if row.arm in planned and row.run not in left_out]
    if len({row.data for row in rows if row.data}) > 1:
        raise UsageError("trials on different data in one experiment: prepare one corpus, and start in a new --out")
    dtype = compute_type(rows)
    for size in dict.fromkeys(planned.values()):  # turns: short runs of all arms at one size, on one seed
        turns = turns_apart((row for row in rows if planned[row.arm] == size), "time")
        apart += [{"size": size} | turn for turn in turns]
    far = {(turn["size"], turn["pair"]) for turn in apart}
    rows = [row for row in rows if not (row.phase == "time" and (planned[row.arm], row.pair) in far)]
    arms: dict[str, dict[str, Found]] = {name: {} for name in settings["arms"]}
    for name, size in product(arms, (size["size"] for size in settings["sizes"])):
        arms[name][size] = measured([cell for cell in cells if (cell["arm"], cell["size"]) == (name, size)], rows)
        points = arms[name][size]["points"] if name == settings["base"] else []
        if points and not any(point["losses"] for point in points):
            raise all_failed(sum(point["failed"] for point in points), name, size)
    tricks = [judged(name, arms, settings) for name in settings["arms"] if name != settings["base"]]
    from_rows = {f"{key}s": sorted({getattr(row, key) for row in rows} - {""}) for key in ("machine", "source")}
    made = {"format": 1, "tricks": tricks, "curves": arms, **from_rows, "apart": apart}
    summary = settings | made | ({"dtype": dtype} if dtype else {})
    return json.loads(json.dumps(summary), parse_constant=lambda word: None)  # JSON has no infinity


def again(summary: Found, rows: Sequence[Row]) -> Found:
    """The summary of the same experiment, made anew from its trials. Raises as `summarise`."""
    made = ("format", "tricks", "curves", "machines", "sources", "dtype", "apart", "plots")
    return summarise(rows, {key: value for key, value in summary.items() if key not in made})
