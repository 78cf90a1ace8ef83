"""What the trials of a comparison say: how much each arm saves on the way to the target, and how sure that is.

Ratios are base over arm: above 1 the arm saves. There are two kinds, which must not be mixed up:

- at equal loss: (horizon of the base / horizon of the arm) x (cost of a step of the base / of the arm). The horizons are by
  inverse prediction over every run near the target, so their uncertainty is in the interval; the costs are of the
  confirming runs, paired by seed. Verdicts stand on this, for training time.
- as confirmed: total cost of the confirming runs, paired by seed. Exact, but each arm's margin below the target is in it.
"""

import dataclasses
import math
import shlex
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import tricks
from engine.spec import UsageError, nearest
from lab import stats
from lab.horizon import concluded
from lab.ledger import Row, compute_type, turns_apart
from lab.markdown import table

# Column of trials.csv -> words; peak memory is no cost of a step.
COSTS = {"train_time": "wall-clock", "robust_train_time": "robust time", "process_time": "CPU time"}
COSTS |= {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "peak_memory": "peak memory"}
MODES = ("tricks", "chain", "leave_out", "recipes", "optimizers", "again")
MARGIN = 0.05  # steps of the confirming runs beyond the horizon: at it, half of all arms would miss the target
MOST_PAIRS = 100  # that a verdict asks for
ALPHA = 0.01  # of a claim: the speedrun's rule
LEVEL = 0.95  # of every interval
NONE = "no difference shown"
Rows = Sequence[Row]
Made = dict[str, Any]  # a part of comparison.json


def named(word: str) -> tuple[str, str]:
    """[NAME=]SPEC -> the arm's name, which is the SPEC if it has no other, and the SPEC."""
    name, equals, spec = word.partition("=")
    return (name, spec) if equals and ":" not in name else (word, word)


def words_of_arms(options: Any, base: str) -> list[tuple[str, list[str]]]:
    """Name and tricks of every arm that is not a SPEC. Raises UsageError: what is to be left out is not in the base."""
    if options.again:
        return [(options.again, [options.again]), (f"{options.again} again", [options.again])]
    if options.recipes:
        others = [name for name in options.recipes if name != options.base]
        return [(name, [name]) for name in ([options.base] if options.base else []) + others]
    if options.tricks:
        return [(base, [base]), *((f"+{t}", [base, t]) for t in options.tricks)]
    if options.chain:
        return [(base, [base]), *((f"+{t}", [base, *options.chain[: n + 1]]) for n, t in enumerate(options.chain))]
    stack = tricks.spelled_out(options.track, base)
    for word in options.leave_out:
        if word not in stack:
            raise UsageError(f"--leave-out {word}: it is not in {base}: {nearest(word, stack)}")
    return [(base, [base]), *((f"-{w}", [x for x in stack if x != w]) for w in options.leave_out)]


def horizon(rows: Rows, target: float) -> stats.Horizon | None:
    """The arm's horizon, from its runs within a doubling of the confirmed length, or else of the middle of the search. None:
    too few, of one length, or without a sure slope: its interval has no end then, and the standard error, which takes the slope
    for known, says too little."""
    ended = [row for row in rows if math.isfinite(row.val_loss)]
    confirmed = (row.steps for row in ended if row.phase == "confirm")
    middle = next(confirmed, None) or statistics.median([row.steps for row in ended] or [1])
    fitted = concluded([(row.steps, row.seed, row.val_loss) for row in ended], target, middle).found
    return fitted if fitted and math.isfinite(fitted.high) else None


def confirmed(rows: Rows, target: float, sets_target: bool = False) -> Made | None:
    """The confirming runs of an arm as a claim: n, mean, sd, p. A run that did not end in a loss voids it. sets_target: the
    target is the mean of this very arm and length, which no number of runs would show to be below: it must not be above."""
    runs = sorted((row for row in rows if row.phase == "confirm"), key=lambda row: row.seed)
    if not runs:
        return None
    losses = [row.val_loss for row in runs]
    claim = {"steps": runs[0].steps, "n": len(runs), "seeds": [row.seed for row in runs], "losses": losses}
    if failed := sum(not math.isfinite(loss) for loss in losses):
        return claim | {"met": False, "why": f"{failed} of {len(losses)} runs failed"}
    sample = stats.Sample.of(losses)
    p = sample.p_above(target)
    claim |= {"mean": sample.mean, "sd": sample.sd, "interval": sample.interval(LEVEL), "p": p}
    claim["met"] = sample.mean <= target if sets_target else p < ALPHA
    claim["stalled"] = sum(row.stalled for row in runs)
    return claim | {"costs": {cost: statistics.mean(getattr(row, cost) for row in runs) for cost in COSTS}}


def ratios(matched: Sequence[tuple[Row, Row]], per_step: bool) -> dict[str, stats.Ratio]:
    """Base over arm of each cost that is known, of whole runs or of a step."""
    by_cost = {}
    for cost in COSTS:
        base, arm = ([getattr(row, cost) / (row.steps if per_step else 1) for row in runs] for runs in zip(*matched))
        if min(*base, *arm) > 0 and not (per_step and cost == "peak_memory"):
            by_cost[cost] = stats.paired_ratio(base, arm, LEVEL)
    return by_cost


def loss_difference(matched: Sequence[tuple[Row, Row]]) -> Made:
    """How far the arm's final loss lies below the base's, nats per token, by a paired t-test."""
    sample = stats.Sample.of([base.val_loss - arm.val_loss for base, arm in matched])
    p = stats.product([(sample.mean, sample.sd / math.sqrt(sample.n), sample.n - 1)]).p
    verdict = NONE if p >= ALPHA or sample.n < 3 else "lower" if sample.mean > 0 else "higher"
    return {"below": sample.mean, "interval": sample.interval(LEVEL), "p": p, "verdict": verdict}


def compare(base: Rows, arm: Rows, target: float, base_sets_target: bool = False, at_steps: bool = False) -> Made:
    """What `arm` saves against `base`: a verdict, and a ratio with interval and p for each cost. at_steps: lengths were given
    without a search: equal ones say which loss is lower then, and nothing about the time to the target."""
    one, other = ({r.pair: r for r in rows if r.phase == "confirm" and math.isfinite(r.val_loss)} for rows in (base, arm))
    matched = [(one[pair], other[pair]) for pair in sorted(one.keys() & other.keys())]  # of one seed, except of A/A
    made: Made = {"n": len(matched), "confirmed": {}, "equal_loss": {}}
    few = {"verdict": "not decided", "why": f"{len(matched)} pairs of confirming runs: at least three are needed"}
    if len(matched) < 2:
        return made | few
    whole, equal = ratios(matched, per_step=False), {}
    horizons = horizon(base, target), horizon(arm, target)
    if all(horizons):
        lengths = [(math.log(h.steps) * sign, h.se, h.df) for h, sign in zip(horizons, (1, -1))]
        for cost, r in ratios(matched, per_step=True).items():
            equal[cost] = stats.product([*lengths, (math.log(r.ratio), r.sd / math.sqrt(r.n), r.n - 1)], LEVEL)
    if given := at_steps and matched[0][0].steps == matched[0][1].steps:
        made["loss"] = loss_difference(matched)
    for kind, by_cost in (("confirmed", {} if given else whole), ("equal_loss", equal)):
        made[kind] = {cost: dataclasses.asdict(ratio) for cost, ratio in by_cost.items()}
    claims = {"base": confirmed(base, target, base_sets_target), "arm": confirmed(arm, target)}
    missing = [name for name, claim in claims.items() if not claim["met"]]
    if not equal and (missing or given):
        why = "the time to the target, since no search chose these lengths" if given else "no horizon"
        why += f", and not confirmed at the target: {' and '.join(missing)}" if missing else ""
        return made | few | {"why": why}
    made["basis"] = "equal loss" if equal else "confirmed runs"
    if len(matched) < 3:  # two agree by luck too often
        return made | few
    if equal:  # the lengths of confirming runs were chosen
        made["steps"] = judged(equal["steps"], equal["steps"].sd * math.sqrt(equal["steps"].n))
    time = (equal or whole)["train_time"]
    return made | judged(time, time.sd * math.sqrt(time.n) if equal else time.sd)


def judged(ratio: stats.Ratio, sd: float) -> Made:
    """The verdict on a cost; the smallest difference that would have been shown; and, without one shown, the number of pairs
    that would show this one (chance 90 %; None: over a hundred). sd: of the log ratio of a pair."""
    smallest, shown = stats.smallest_difference(max(2, ratio.n), sd, ALPHA), ratio.p < ALPHA
    pairs = None if shown else stats.runs_needed(abs(math.log(ratio.ratio)), sd, ALPHA, most=MOST_PAIRS + 1, two_sided=True)
    return {
        "verdict": NONE if not shown else "faster" if ratio.ratio > 1 else "slower",
        "smallest_difference": math.expm1(smallest) if smallest < 700 else math.inf,
        "pairs": None if pairs is None or pairs > MOST_PAIRS else pairs,
    }


def summarise(rows: Rows, settings: Made) -> Made:
    """comparison.json: `settings` (track, target, base, mode, arms with their flags, confirming steps and why a search failed,
    runs left out) and all that the trials say. Raises UsageError: several versions of the data, or as compute_type."""
    target, base = settings["target"], settings["base"]
    steps = {arm["name"]: arm["steps"] for arm in settings["arms"]}  # of the confirming runs
    # those of an earlier plan, of another length, confirm nothing; they say as much of the horizon as a run of the search
    rows = [r for r in rows if r.arm in steps and r.run not in settings.get("left_out", ())]
    rows = [r if r.steps == steps[r.arm] else dataclasses.replace(r, phase="search") for r in rows]
    timed = [row for row in rows if row.phase == "confirm" and row.status != "crashed"]
    if len({row.data for row in timed}) > 1:
        raise UsageError("trials on different data in one comparison: prepare one corpus, and start in a new --out")
    of = {name: [row for row in rows if row.arm == name] for name in steps}
    track = tricks.track(settings["track"])
    sets = {n: n == "baseline" and (target, s) == (track.target_loss, track.settings["steps"]) for n, s in steps.items()}
    arms = []
    for arm in settings["arms"]:
        runs = of[arm["name"]]
        at, claim = horizon(runs, target), confirmed(runs, target, sets[arm["name"]])
        arms.append(arm | {"horizon": at and dataclasses.asdict(at), "confirmed": claim, "runs": len(runs)})
    others = [name for name in steps if name != base]
    wanted = [(base, name) for name in others] + (list(pairwise(others)) if settings["mode"] == "chain" else [])
    ratios = [{"arm": b, "base": a} | compare(of[a], of[b], target, sets[a], "steps" in settings) for a, b in wanted]
    made = {"format": 1, "machines": sorted({row.machine for row in timed}), "arms": arms, "ratios": ratios}
    made |= {"sources": sorted({row.source for row in rows if row.source})}
    known = {"dtype": compute_type(rows), "apart": turns_apart(rows)}
    return settings | made | {key: value for key, value in known.items() if value}


def again(summary: Made, rows: Rows) -> Made:
    """The summary of the same comparison, made anew from its trials. Raises UsageError: see `summarise`."""
    settings = {key: summary[key] for key in ("track", "target", "base", "mode", "command", "margin", "seeds")}
    settings["arms"] = [{key: arm[key] for key in ("name", "flags", "steps", "why")} for arm in summary["arms"]]
    settings |= {key: summary[key] for key in ("left_out", "steps") if key in summary}  # comparisons from before have none
    return summarise(rows, settings)


def ratio_words(ratio: Made) -> str:
    """A ratio and its interval; alone where every pair has the same one, as the chosen lengths of runs have."""
    interval = "" if math.isclose(ratio["low"], ratio["high"]) else f" ({ratio['low']:.3g}-{ratio['high']:.3g})"
    return f"{ratio['ratio']:.3g}x{interval}"


def where(summary: Made) -> str:
    """One line: on what, in which compute type where that is known, and by which code the trials were run."""
    dtype = f", in {summary['dtype']}" if "dtype" in summary else ""
    return f"Machine: {'; '.join(summary['machines']) or '-'}{dtype}. Source: {', '.join(summary['sources']) or '-'}."


def in_words(made: Made, ratio: Made, base: str) -> str:
    """made: by `judged`."""
    sure = made["verdict"] != NONE
    leans = "" if sure or ratio["low"] <= 1 <= ratio["high"] else "faster" if ratio["low"] > 1 else "slower"
    against = f" {'than' if sure or leans else 'to'} {base}" if base else ""
    level = " at 95 %, not at the 99 % asked for" if leans else ""
    return f"{leans or made['verdict']}{against}{level}, {ratio_words(ratio)}"


def pairs_words(made: Made) -> str:
    """Of a cost without a difference: which one would have been shown, and how many pairs would show this one."""
    if made["verdict"] != NONE:
        return ""
    least = made["smallest_difference"]
    shown = f"a difference of {least:.1%} would have been shown" if least < 1 else "a factor of 2 would not have been shown"
    return f" ({shown}; about {made['pairs']} pairs would show this one)" if made["pairs"] else f" ({shown})"


def loss_line(arm: Made, ratio: Made) -> str:
    """An arm's final loss at the length that was given, and how far below the base's it lies. ratio: empty of the base."""
    claim, of = arm["confirmed"], ratio.get("loss")
    loss = claim.get("why") or "loss {:.4f} ({:.4f}-{:.4f})".format(claim["mean"], *claim["interval"])
    line = f"{arm['name']}: after {arm['steps']:,} steps {loss}"
    if not of:
        return line
    below = "{:.4f} ({:.4f} to {:.4f}) below".format(of["below"], *of["interval"])
    return f"{line}, {below} {ratio['base']}: {of['verdict']}, p = {of['p']:.2g}, n = {ratio['n']} pairs"


def verdict_line(ratio: Made, arm: Made) -> str:
    """One line: the verdict on an arm, with n, p and interval."""
    verdict = ratio["verdict"]
    if arm["why"] or verdict == "not decided":
        return f"{ratio['arm']}: {arm['why'] or f'{verdict}: ' + ratio['why']}"
    measured, claim = ratio["equal_loss"] or ratio["confirmed"], arm["confirmed"]
    time, steps = measured["train_time"], measured["steps"]
    line = f"{ratio['arm']}: {in_words(ratio, time, ratio['base'])} in wall-clock at {ratio['basis']}"
    line += f", p = {time['p']:.2g}, n = {ratio['n']} pairs{pairs_words(ratio)}; "
    if of := ratio.get("steps"):
        line += f"{in_words(of, steps, '')} in steps, p = {steps['p']:.2g}{pairs_words(of)}"
    else:
        line += f"{ratio_words(steps)} in steps, as chosen"
    if claim["met"]:
        return line
    reason = claim.get("why") or f"mean {claim['mean']:.4f}, p = {claim['p']:.2g}"
    return f"{line}; NOT confirmed at {claim['steps']} steps ({reason})"


def against_base(summary: Made) -> dict[str, Made]:
    """Arm -> its ratio, in a chain the first of its two."""
    return {ratio["arm"]: ratio for ratio in summary["ratios"] if ratio["base"] == summary["base"]}


def verdict_lines(summary: Made) -> list[str]:
    """One of each ratio, then one of each turn whose times are not to be compared."""
    by_name = {arm["name"]: arm for arm in summary["arms"]}
    lines = [verdict_line(ratio, by_name[ratio["arm"]]) for ratio in summary["ratios"]]
    if "steps" in summary:
        against = against_base(summary)
        lines = [loss_line(arm, against.get(name, {})) for name, arm in by_name.items() if arm["confirmed"]] + lines
    why = "too far for its times: the same command trains it again"
    return lines + [f"pair {t['pair']} lies {t['hours']:.1f} hours apart, {why}" for t in summary.get("apart", ())]


def arm_cells(arm: Made, ratio: Made, is_base: bool) -> tuple[str, ...]:
    """ratio: against the base; empty if there is none."""
    h, claim = arm["horizon"], arm["confirmed"] or {}
    measured = ratio.get("equal_loss") or ratio.get("confirmed", {})
    loss, p, seconds = "-", claim.get("why", "-"), "-"
    if costs := claim.get("costs"):
        loss, p = f"{claim['mean']:.4f} ({claim['sd']:.4f})", f"{claim['p']:.2g}, n = {claim['n']}"
        seconds = f"{costs['train_time']:,.1f}"
    horizon = f"{h['steps']:,.0f} ({h['low']:,.0f}-{h['high']:,.0f})" if h else arm["why"] or "-"
    saved = [ratio_words(measured[cost]) if cost in measured else "-" for cost in ("train_time", "steps")]
    verdicts = "base" if is_base else ratio.get("verdict", "-"), ratio.get("steps", {}).get("verdict", "-")
    return f"`{arm['name']}`", horizon, f"{claim['steps']:,}" if claim else "-", loss, p, seconds, *saved, *verdicts


def markdown(summary: Made) -> str:
    """README.md of the output folder."""
    head = ["arm", "horizon, steps", "confirmed at", "loss, mean (sd)", "p against the target", "time, s"]
    head += ["saves time", "saves steps", "verdict: time", "steps"]
    against, base = against_base(summary), summary["base"]
    arms = [arm_cells(arm, against.get(arm["name"], {}), arm["name"] == base) for arm in summary["arms"]]
    costs = []
    for ratio in summary["ratios"]:
        for kind in (kind for kind in ("equal_loss", "confirmed") if ratio[kind]):
            cells = [ratio_words(ratio[kind][cost]) if cost in ratio[kind] else "-" for cost in COSTS]
            costs.append((f"`{ratio['arm']}` / `{ratio['base']}`", kind.replace("_", " "), *cells))
    lines = [f"# Comparison on `{summary['track']}`, target {summary['target']:g} nats per token", ""]
    lines += [f"`./run.sh compare {summary['command']}`", ""]
    if "--tuned-on" in summary["command"].split():
        today = "written out below; the same command takes those of today."
        lines += [f"`--tuned-on`: settings as tuning had found them by then, {today}", ""]
    lines += [table(head, arms), ""]
    lines += ["Intervals are 95 %. A horizon is the length of run whose final loss meets the target, by inverse prediction; a"]
    lines += ["ratio is base over arm: above 1 the arm saves. Verdicts: p < 0.01."]
    lines += ["", *(f"- {line}" for line in verdict_lines(summary)), ""]
    if summary["mode"] == "optimizers":  # other arms are named after their tricks
        for arm in summary["arms"]:
            steps = f" --steps {arm['steps']}" if arm["steps"] else ""
            lines.append(f"- `{arm['name']}`: `./run.sh train {shlex.join(arm['flags'])}{steps}`")
        lines.append("")
    lines += [table(("arm / base", "at", *COSTS.values()), costs) if costs else "", "", where(summary), ""]
    return "\n".join([*lines, *(f"![{name}]({name}.png)" for name in summary["plots"]), ""])
