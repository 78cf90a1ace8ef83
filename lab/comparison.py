"""What the trials of a comparison say: how much each arm saves on the way to the target, and with what certainty.

Two kinds of figure, which must not be mixed up:

- at equal loss: (horizon of the base / horizon of the arm) x (cost of a step of the base / of the arm). The horizons are by
  inverse prediction over every run near the target, so their uncertainty is in the interval; the costs are of the
  confirming runs, paired by seed. Verdicts stand on this, for training time.
- as confirmed: total cost of the confirming runs, paired by seed. Exact, but each arm's margin below the target is in it.

Ratios are base over arm: above 1 the arm saves.
"""

import csv
import dataclasses
import io
import json
import math
import shlex
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import tricks
from engine.run_folder import atomic_write, now_utc
from engine.spec import UsageError
from lab import stats
from lab.markdown import table
from lab.trials import DTYPES, Outcome

COSTS = {  # name in trials.csv -> words; peak memory is no cost of a step
    "train_time": "wall-clock",
    "robust_train_time": "robust time",
    "process_time": "CPU time",
    "steps": "steps",
    "tokens": "tokens",
    "flops": "FLOPs",
    "peak_memory": "peak memory",
}
ALPHA = 0.01  # of a claim: the speedrun's rule
LEVEL = 0.95  # of every interval
MOST_APART = 1.0  # hours between runs whose times are compared: later the machine may be another


# ---------------------------------------------------------------- trials.csv


@dataclass(frozen=True)
class Row:
    """One trial, a line of trials.csv. SI units."""

    phase: str  # search or confirm
    arm: str
    steps: int
    pair: int  # trials of several arms with the same number form a pair
    seed: int
    run: str  # its run folder's name, which ends in the hash of its settings
    status: str  # ok, diverged or crashed
    val_loss: float  # nats per token; inf unless status is ok
    train_time: float
    robust_train_time: float
    process_time: float
    tokens: int
    flops: float
    peak_memory: int
    stalled: bool
    ended: str  # UTC
    machine: str
    commit: str
    source: str
    data: str
    error: str = ""
    dtype: str = ""  # of the matrix products: a value of DTYPES; empty for a crash, and in files from before the column

    @classmethod
    def of(cls, phase: str, outcome: Outcome) -> "Row":
        trial, result = outcome.trial, outcome.result
        same = dict(
            phase=phase, arm=trial.arm.name, steps=trial.steps, pair=trial.number, seed=trial.seed, run=trial.folder.name
        )
        if result is None:
            nothing = dict.fromkeys(("train_time", "robust_train_time", "process_time", "tokens", "flops", "peak_memory"), 0)
            where = dict.fromkeys(("machine", "commit", "source", "data"), "")
            error = " ".join(outcome.error.split())[:200]
            return cls(**same, **nothing, **where, status="crashed", val_loss=math.inf, stalled=False, ended=now_utc(), error=error)
        env = json.loads((trial.folder / "env.json").read_text())
        ended = next((e["utc"] for e in reversed(trial.log()) if e["event"] == "end"), now_utc())  # found ones ended earlier
        return cls(
            **same, status=result["status"], val_loss=outcome.loss, tokens=result["tokens"],
            flops=result["flops_per_token"] * result["tokens"], ended=ended, machine=machine(env),
            commit=(env["commit"] or "unknown")[:12] + ("+" if env["dirty"] else ""), source=env["source_sha256"][:12],
            data=env["data_fingerprint"], dtype=DTYPES[env["dtype"]],
            **{key: result[key] for key in ("train_time", "robust_train_time", "process_time", "peak_memory", "stalled")},
        )  # fmt: skip


def machine(env: dict[str, Any]) -> str:
    """What must be equal for times to be comparable, in one line."""
    gpus = (
        f"{env['world_size']} x {env['gpus'][0]}" if env["gpus"] else f"{env['world_size']} rank(s) x {env['threads']} threads"
    )
    return f"{env['cpu']}, {env['cpu_count']} cores, {gpus}, torch {env['torch']}"


class Ledger:
    """trials.csv of an output folder: every trial that has ended, found again by its run's name. Safe for threads."""

    def __init__(self, folder: Path):
        self.path, self.lock = folder / "trials.csv", threading.Lock()
        self.rows: dict[str, Row] = {row.run: row for row in read_rows(self.path)} if self.path.exists() else {}

    def add(self, row: Row) -> None:
        with self.lock:
            self.rows[row.run] = row
            text = io.StringIO()
            writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(dataclasses.asdict(r) for r in self.rows.values())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """
    Raises:
        UsageError: the file is no trials.csv, or a line of it is damaged.
    """
    read = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}
    kinds = {f.name: read[f.type if isinstance(f.type, str) else f.type.__name__] for f in dataclasses.fields(Row)}
    rows = []
    with path.open(newline="") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append(Row(**{name: kind(line[name]) for name, kind in kinds.items() if name in line or name != "dtype"}))
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{path} line {number} is no trial of a comparison: {error}") from None
    return rows


# ---------------------------------------------------------------- from trials to ratios


def near(rows: Iterable[Row]) -> list[Row]:
    """The runs that a line of loss against log steps may be drawn through: within a doubling of the confirmed length, or of
    the middle of the search where nothing is confirmed."""
    ended = [row for row in rows if math.isfinite(row.val_loss)]
    if not ended:
        return []
    confirmed = [row.steps for row in ended if row.phase == "confirm"]
    middle = confirmed[0] if confirmed else statistics.median(row.steps for row in ended)
    return [row for row in ended if 0.5 <= row.steps / middle <= 2]


def horizon(rows: Sequence[Row], target: float) -> stats.Horizon | None:
    """The arm's horizon from every run near it; None where there are too few, of one length, or without a sure slope: its
    interval has no end then, and the standard error, which takes the slope for known, says too little."""
    used = near(rows)
    if len(used) < 3 or len({row.steps for row in used}) < 2:
        return None
    found = stats.horizon([row.steps for row in used], [row.val_loss for row in used], target, LEVEL)
    return found if found and math.isfinite(found.high) else None


def confirmed(rows: Sequence[Row], target: float, sets_target: bool = False) -> dict[str, Any] | None:
    """The confirming runs of an arm as a claim: n, mean, sd, p. A run that did not end in a loss voids it.

    sets_target: the arm is the baseline at the length by whose mean the track's target was set. No number of runs would show
    that to be below itself; its mean must not be above.
    """
    runs = sorted((row for row in rows if row.phase == "confirm"), key=lambda row: row.seed)
    if not runs:
        return None
    losses = [row.val_loss for row in runs]
    claim = {"steps": runs[0].steps, "n": len(runs), "seeds": [row.seed for row in runs], "losses": losses}
    if not all(map(math.isfinite, losses)):
        return claim | {"met": False, "why": f"{sum(not math.isfinite(x) for x in losses)} of {len(losses)} runs failed"}
    sample = stats.Sample.of(losses)
    p = sample.p_above(target)
    claim |= {"mean": sample.mean, "sd": sample.sd, "interval": sample.interval(LEVEL), "p": p}
    claim["met"] = sample.mean <= target if sets_target else p < ALPHA
    claim["stalled"] = sum(row.stalled for row in runs)
    return claim | {"costs": {cost: statistics.mean(getattr(row, cost) for row in runs) for cost in COSTS}}


def pairs(base: Sequence[Row], arm: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Confirming runs of both that belong together: but in an A/A comparison, those with the same seed."""
    of = lambda rows: {r.pair: r for r in rows if r.phase == "confirm" and math.isfinite(r.val_loss)}  # noqa: E731
    one, other = of(base), of(arm)
    return [(one[pair], other[pair]) for pair in sorted(one.keys() & other.keys())]


def compare(base: Sequence[Row], arm: Sequence[Row], target: float, base_sets_target: bool = False) -> dict[str, Any]:
    """What `arm` saves against `base`: a verdict, and a ratio with interval and p for each cost."""
    matched = pairs(base, arm)
    found = {"n": len(matched), "confirmed": {}, "equal_loss": {}}
    if len(matched) < 2:
        return found | {"verdict": "not decided", "why": f"{len(matched)} pairs of confirming runs: at least two are needed"}
    for cost in COSTS:
        values = [[getattr(pair[i], cost) for pair in matched] for i in (0, 1)]
        if min(map(min, values)) > 0:
            ratio = stats.paired_ratio(*values, LEVEL)
            found["confirmed"][cost] = dataclasses.asdict(ratio) | {"bootstrap": stats.bootstrap_ratio(*values, LEVEL)}
    horizons = horizon(base, target), horizon(arm, target)
    claims = confirmed(base, target, base_sets_target), confirmed(arm, target)
    if all(horizons):
        lengths = [(math.log(h.steps) * sign, h.se, h.df) for h, sign in zip(horizons, (1, -1), strict=True)]
        for cost in COSTS:
            values = [[getattr(pair[i], cost) / pair[i].steps for pair in matched] for i in (0, 1)]
            if cost != "peak_memory" and min(map(min, values)) > 0:
                r = stats.paired_ratio(*values, LEVEL)
                step = (math.log(r.ratio), r.sd / math.sqrt(r.n), r.n - 1)
                found["equal_loss"][cost] = dataclasses.asdict(stats.product([*lengths, step], LEVEL))
        found["basis"], judged = "equal loss", stats.Ratio(**found["equal_loss"]["train_time"])
        smallest = stats.smallest_difference(max(2, judged.n), judged.sd * math.sqrt(judged.n), ALPHA)
    elif claims[0]["met"] and claims[1]["met"]:
        r = found["confirmed"]["train_time"]
        found["basis"] = "confirmed runs"
        judged = stats.Ratio(**{k: v for k, v in r.items() if k != "bootstrap"})
        smallest = stats.smallest_difference(judged.n, judged.sd, ALPHA)
    else:
        missing = [name for name, claim in zip(("base", "arm"), claims, strict=True) if not claim["met"]]
        return found | {
            "verdict": "not decided",
            "why": f"no horizon, and not confirmed at the target: {' and '.join(missing)}",
        }
    found["smallest_difference"] = math.expm1(smallest) if smallest < 700 else math.inf
    if judged.p >= ALPHA:
        return found | {"verdict": "no difference shown"}
    return found | {"verdict": "faster" if judged.ratio > 1 else "slower"}


def moment(text: str) -> datetime:
    """Of a time of day as logs and tables have it: UTC."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")


def hours_since(text: str) -> float:
    """Since that time of day."""
    return (moment(now_utc()) - moment(text)).total_seconds() / 3600


def hours_apart(rows: Iterable[Row]) -> float:
    """The longest pause between runs that follow each other, from the end of one to the start of the next; 0 for a run alone,
    or where the time of day was not kept."""
    ran = sorted((moment(row.ended), row.train_time) for row in rows if row.ended)
    return max([0.0, *((end - before).total_seconds() - seconds for (before, _), (end, seconds) in pairwise(ran))]) / 3600


def turns_apart(rows: Iterable[Row], phase: str = "confirm") -> list[dict[str, Any]]:
    """The turns, runs of all arms on one seed, that do not lie together: their times are not of one hour."""
    turns = defaultdict(list)
    for row in rows:
        if row.phase == phase and math.isfinite(row.val_loss):
            turns[row.pair].append(row)
    hours = {pair: hours_apart(turn) for pair, turn in sorted(turns.items())}
    return [{"pair": pair, "hours": round(apart, 2)} for pair, apart in hours.items() if apart > MOST_APART]


def check_machines(rows: Iterable[Row], allow_mixed: bool) -> list[str]:
    """The machines of the confirming runs.

    Raises:
        UsageError: there are several and `allow_mixed` is false; the same for several versions of the data, always.
    """
    timed = [row for row in rows if row.phase == "confirm" and row.status != "crashed"]
    machines = sorted({row.machine for row in timed})
    if len(machines) > 1 and not allow_mixed:
        raise UsageError(f"times of {len(machines)} machines in one comparison ({'; '.join(machines)}): add --allow-mixed")
    if len({row.data for row in timed}) > 1:
        raise UsageError("trials on different data in one comparison: prepare one corpus, and start in a new --out")
    return machines


def compute_type(rows: Iterable[Row]) -> str:
    """The one compute type of trials; empty where no row says it.

    Raises:
        UsageError: there are several: the same settings end at other losses.
    """
    runs = {row.dtype: row.run for row in rows if row.dtype}
    if len(runs) > 1:
        (one, first), (other, second) = sorted(runs.items())[:2]
        raise UsageError(
            f"{first} is in {one}, {second} in {other}, and their losses do not compare: go on on a machine like the one "
            "before, or choose another --out and add -- --dtype fp32, which every machine has"
        )
    return "".join(runs)


def summarise(rows: Sequence[Row], settings: dict[str, Any], allow_mixed: bool = False) -> dict[str, Any]:
    """comparison.json: `settings` (track, target, base, mode, arms with their flags, confirming steps and why a search failed,
    runs left out) and all that the trials say.

    Raises:
        UsageError: see check_machines and compute_type.
    """
    target, base = settings["target"], settings["base"]
    steps = {arm["name"]: arm["steps"] for arm in settings["arms"]}  # of the confirming runs
    # those of an earlier plan, of another length, confirm nothing; they say as much of the horizon as a run of the search
    rows = [r for r in rows if r.arm in steps and r.run not in settings.get("left_out", ())]
    rows = [r if r.steps == steps[r.arm] else dataclasses.replace(r, phase="search") for r in rows]
    machines, dtype = check_machines(rows, allow_mixed), compute_type(rows)
    of = {name: [row for row in rows if row.arm == name] for name in steps}
    track = tricks.track(settings["track"])
    sets = {n: n == "baseline" and (target, s) == (track.target_loss, track.settings["steps"]) for n, s in steps.items()}
    arms = []
    for arm in settings["arms"]:
        name = arm["name"]
        found, claim = horizon(of[name], target), confirmed(of[name], target, sets[name])
        arms.append(arm | {"horizon": found and dataclasses.asdict(found), "confirmed": claim, "runs": len(of[name])})
    wanted = [(base, name) for name in steps if name != base]
    if settings["mode"] == "chain":
        wanted += pairwise(name for name in steps if name != base)
    ratios = [{"arm": b, "base": a} | compare(of[a], of[b], target, sets[a]) for a, b in wanted]
    sources = sorted({row.source for row in rows if row.source})
    made = {"format": 1, "machines": machines, "sources": sources, "arms": arms, "ratios": ratios}
    apart = turns_apart(rows)
    return settings | made | ({"dtype": dtype} if dtype else {}) | ({"apart": apart} if apart else {})


def again(summary: dict[str, Any], rows: Sequence[Row], allow_mixed: bool = False) -> dict[str, Any]:
    """The summary of the same comparison, made anew from its trials.

    Raises:
        UsageError: see check_machines.
    """
    settings = {key: summary[key] for key in ("track", "target", "base", "mode", "command", "margin", "seeds")}
    settings["arms"] = [{key: arm[key] for key in ("name", "flags", "steps", "why")} for arm in summary["arms"]]
    settings |= {key: summary[key] for key in ("left_out",) if key in summary}  # comparisons from before have none
    return summarise(rows, settings, allow_mixed)


# ---------------------------------------------------------------- words


def ratio_words(ratio: dict[str, Any]) -> str:
    """A ratio and its interval; alone where every pair has the same one, as the chosen lengths of runs have."""
    interval = "" if math.isclose(ratio["low"], ratio["high"]) else f" ({ratio['low']:.3g}-{ratio['high']:.3g})"
    return f"{ratio['ratio']:.3g}x{interval}"


def where(summary: dict[str, Any]) -> str:
    """One line: on what, in which compute type where that is known, and by which code the trials were run."""
    dtype = f", in {summary['dtype']}" if "dtype" in summary else ""
    return f"Machine: {'; '.join(summary['machines']) or '-'}{dtype}. Source: {', '.join(summary['sources']) or '-'}."


def verdict_line(ratio: dict[str, Any], arm: dict[str, Any]) -> str:
    """One line: the verdict on an arm, with n, p and interval."""
    head = f"{ratio['arm']}: {ratio['verdict']}"
    if arm["why"]:
        return f"{ratio['arm']}: {arm['why']}"
    if ratio["verdict"] == "not decided":
        return f"{head}: {ratio['why']}"
    table = ratio["equal_loss"] or ratio["confirmed"]
    r, claim = table["train_time"], arm["confirmed"]
    line = f"{head} than {ratio['base']}" if ratio["verdict"] != "no difference shown" else f"{head} to {ratio['base']}"
    line += f", {ratio_words(r)} in wall-clock at {ratio['basis']}, {ratio_words(table['steps'])} in steps, "
    line += f"p = {r['p']:.2g}, n = {ratio['n']} pairs"
    if ratio["verdict"] == "no difference shown":
        line += f"; a difference of {ratio['smallest_difference']:.1%} would have been shown"
    if not claim["met"]:
        reason = claim.get("why") or f"mean {claim['mean']:.4f}, p = {claim['p']:.2g}"
        line += f"; NOT confirmed at {claim['steps']} steps ({reason})"
    return line


def verdict_lines(summary: dict[str, Any]) -> list[str]:
    """One of each ratio, then one of each turn whose times are not to be compared."""
    by_name = {arm["name"]: arm for arm in summary["arms"]}
    return [verdict_line(ratio, by_name[ratio["arm"]]) for ratio in summary["ratios"]] + [
        f"pair {turn['pair']} lies {turn['hours']:.1f} hours apart, too far for its times: the same command trains it again"
        for turn in summary.get("apart", ())
    ]


def trained_as(arms: Iterable[dict[str, Any]]) -> list[str]:
    """Lines: the command that trains each arm."""
    steps = lambda arm: f" --steps {arm['steps']}" if arm["steps"] else ""  # noqa: E731
    return [*(f"- `{arm['name']}`: `./run.sh train {shlex.join(arm['flags'])}{steps(arm)}`" for arm in arms), ""]


TUNED_ON = (
    "`--tuned-on`: settings as tuning had found them by then, written out below; the same command takes those of today.",
    "",
)


def markdown(summary: dict[str, Any]) -> str:
    """README.md of the output folder."""
    against = {ratio["arm"]: ratio for ratio in reversed(summary["ratios"])}  # the first: against the base
    rows = []
    for arm in summary["arms"]:
        h, claim, ratio = arm["horizon"], arm["confirmed"], against.get(arm["name"])
        costs = claim and claim.get("costs")
        measured = (ratio and (ratio["equal_loss"] or ratio["confirmed"])) or {}
        cell = lambda cost, measured=measured: ratio_words(measured[cost]) if cost in measured else "-"  # noqa: E731
        rows.append(
            (
                f"`{arm['name']}`",
                f"{h['steps']:,.0f} ({h['low']:,.0f}-{h['high']:,.0f})" if h else arm["why"] or "-",
                f"{claim['steps']:,}" if claim else "-",
                f"{claim['mean']:.4f} ({claim['sd']:.4f})" if costs else "-",
                f"{claim['p']:.2g}, n = {claim['n']}" if costs else (claim or {}).get("why", "-"),
                f"{costs['train_time']:,.1f}" if costs else "-",
                cell("train_time"), cell("steps"),
                "base" if arm["name"] == summary["base"] else ratio["verdict"] if ratio else "-",
            )
        )  # fmt: skip
    head = (
        "arm", "horizon, steps", "confirmed at", "loss, mean (sd)", "p against the target", "time, s", "saves time",
        "saves steps", "verdict",
    )  # fmt: skip
    costs = [
        (f"`{ratio['arm']}` / `{ratio['base']}`", kind.replace("_", " "), *(
            ratio_words(ratio[kind][cost]) if cost in ratio[kind] else "-" for cost in COSTS
        ))
        for ratio in summary["ratios"] for kind in ("equal_loss", "confirmed") if ratio[kind]
    ]  # fmt: skip
    return "\n".join(
        [
            f"# Comparison on `{summary['track']}`, target {summary['target']:g} nats per token",
            "",
            f"`./run.sh compare {summary['command']}`",
            "",
            *TUNED_ON * ("--tuned-on" in summary["command"].split()),
            table(head, rows),
            "",
            "Intervals are 95 %. A horizon is the length of run whose final loss meets the target, by inverse prediction; a",
            "ratio is base over arm: above 1 the arm saves. Verdicts: wall-clock, p < 0.01."
            + " Searched by cool-downs off shared runs, which are not independent: intervals of horizons are too narrow."
            * ("--branch" in summary["command"].split()),
            "",
            *(f"- {line}" for line in verdict_lines(summary)),
            "",
            *(trained_as(summary["arms"]) if summary["mode"] == "optimizers" else ()),  # others are named after their tricks
            table(("arm / base", "at", *COSTS.values()), costs) if costs else "",
            "",
            where(summary),
            "",
            *(f"![{name}]({name}.png)" for name in summary["plots"]),
            "",
        ]
    )
