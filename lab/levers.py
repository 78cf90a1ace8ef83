"""The lever board: what each lever of the optimizer race adds to a tuned Muon, alone, tuned, on several seeds.

    ./run.sh compare levers --plan                                print what that would train
    ./run.sh compare levers --workloads bytes-large               train it, write the board
    ./run.sh compare levers --levers tail_ema --workloads wiki    one of them

Muon is tuned by coordinate descent (lab/tuning/descent.py) from its settings in records/tuning. A lever branches off half-way
with its own settings; these and its rates are tuned in as many trials as Muon has left. Then all train with new seeds,
interleaved, at one length; Muon at two other lengths too, whose slope turns losses into steps. Short runs of all time a step.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import ttest_1samp

import optimizers
import tricks
from engine.command import Parser
from engine.run_folder import atomic_write
from engine.spec import UsageError, nearest, split
from lab import plots, stats
from lab.ledger import to_text
from lab.markdown import table as markdown_table
from lab.runner import at_least
from lab.tuning import descent, tune
from lab.tuning.report import Contents
from lab.tuning.space import Dimension, Submission, submission
from lab.tuning.tuned import TIMED, Row, Tables, read_tables, table_of

TRIALS = 12  # of a lever, after as many that it shares with Muon, which goes on for as many more
SEEDS = 6
LENGTHS = (0.8, 1.25)  # of Muon's other runs, as parts of the workload's length
SCHEDULE = "wsd:cooldown=0.7"  # of modded-nanogpt's optimizer track
OUT = Path("records/levers")
LEVEL = 0.05  # of the verdicts, after Holm's correction
NONE = "no difference"


class Lever(NamedTuple):
    """A change to Muon. claim: what its authors measured, in steps to 3.28 on GPT-2 124M unless it says otherwise; #N are
    entries and pull requests of modded-nanogpt's optimizer track. says: the claim as a verdict; empty: nobody measured it
    alone. own: its own settings to tune, and where they start. start: of rates that do not continue from Muon's."""

    claim: str
    says: str = "helps"
    optimizer: str = "muon"
    own: tuple[tuple[Dimension, float], ...] = ()
    start: tuple[tuple[str, float], ...] = ()
    schedule: str = SCHEDULE
    average: str = ""
    outer: str = ""
    decay_schedule: str = ""


def beta(key: str, start: float, part: str = "optimizer") -> tuple[Dimension, float]:
    return Dimension(part, key, 0.5, 0.999, "complement"), start


def share(key: str, start: float, part: str = "optimizer", most: float = 1.0) -> tuple[Dimension, float]:
    return Dimension(part, key, 0.1, most, "linear"), start


DECAY = Dimension("optimizer", "weight_decay", 1e-3, 1.0, "log")
SOAP, SHAMPOO = "soap:every=1,beta2=0.9,shampoo_beta=0.9", "shampoo:every=1,exponent=0.333,grafting=rms,beta1=0.95"
# fmt: off
LEVERS: dict[str, Lever] = {
    "placebo": Lever("Muon itself, its rates tuned as a lever's are", ""),
    "aux_betas": Lever("12 of 17 records of a frozen benchmark raised beta2 to 0.98-0.999; not measured alone", "",
                       own=(beta("adamw_beta2", 0.98), beta("embedding_beta2", 0.98), beta("head_beta2", 0.98))),
    "ema_nesterov": Lever("3,325 to 3,125, n = 20 (#39)", outer="ema_nesterov",
                          own=(share("beta", 0.6, "outer", 0.95), beta("decay", 0.95, "outer"))),
    "hyperball": Lever("3,250 to 3,250, both tuned (#36, #37)", NONE, "muon:sphere=frobenius", start=(("lr", 0.02),)),
    "hyperball_power": Lever("3,250 to 3,150 (#345)", optimizer="muon:sphere=frobenius", start=(("lr", 0.03),),
                             schedule="power:inner=0.4"),
    "spectral_sphere": Lever("better at 1.7B; untested at 124M", optimizer="muon:sphere=spectral", start=(("lr", 0.02),)),
    "two_speed": Lever("3,250 to 3,210, n = 8 (#340)",
                       own=(beta("slow", 0.98), beta("fast", 0.85), share("fast_share", 0.4385))),
    "tail_ema": Lever("42 fewer, on a stack (#46)", average="tail_ema",
                      own=(beta("decay", 0.9, "average"), share("blend", 0.6, "average"))),
    "equal_rows": Lever("very slight (nanochat)", optimizer="muon:equal_rows=true"),
    "fixed_norm": Lever("very slight, with equal rows (nanochat)", optimizer="muon:fixed_norm=true"),
    "normuon": Lever("3,325 to 3,250, n = 20 (#10, #12)", optimizer="muon:normuon=true", own=(beta("normuon_beta2", 0.95),)),
    "cautious": Lever("19 fewer, on a stack (#46)", optimizer="muon:cautious=true", own=((DECAY, 0.05),)),
    "decay_schedule": Lever("not measured alone", "", decay_schedule="power:outer=2.25", own=((DECAY, 0.1),)),
    "power_cooldown": Lever("part of a stack (#46)", "", schedule="wsd:cooldown=0.7,power=1.2"),
    "fast_slow": Lever("MuonH: 3,250 to 3,125, n = 20 (#351)", schedule="fast_slow"),
    "floor": Lever("part of stacks", "", schedule="wsd:cooldown=0.7,final=0.1"),
    "soap": Lever("on the MLP alone 3,225 to 3,150, n = 4 (#14)", optimizer=SOAP, start=(("lr", 0.01),)),
    "soap_muon": Lever("backbone of the best stacks (#44 to #46)", "", SOAP + ",polar=true"),
    "kl_soap_hyperball": Lever("3,040, n = 5, the best clean entry (#25)", optimizer=SOAP + ",kl=true,sphere=frobenius",
                               start=(("lr", 0.018),)),
    "shampoo_rms": Lever("3,150 at three times the step, n = 4 (#327)", optimizer=SHAMPOO),
    "muown": Lever("3,075, n = 30 (#23)", optimizer="muown", start=(("lr", 0.01),)),
}
# fmt: on
SPACE = tuple(sorted(submission("muon").dimensions, key=lambda d: d.key != "lr"))  # of Muon, its rate first


def entry(name: str, end: dict[str, float]) -> Submission:
    """Muon; or a lever, the settings that it does not move fixed where Muon stood half-way, `end`."""
    if name == "muon":
        return Submission(name, name, SCHEDULE, stated=SPACE)
    lever, method, moved = LEVERS[name], split(LEVERS[name].optimizer)[0], [d for d, _ in LEVERS[name].own]
    rates = [d for d in SPACE if "lr" in d.key]
    free = {"schedule_warmup", *(d.name for d in (*moved, *rates))}
    fixed = {k: v for k, v in end.items() if k not in free and hasattr(optimizers.OPTIMIZERS[method], k)}
    optimizer = tricks.merge_optimizer(f"{method}:" + ",".join(f"{k}={v:g}" for k, v in fixed.items()), lever.optimizer)
    schedule = f"{lever.schedule}{',' if '=' in lever.schedule else ':'}warmup={end['schedule_warmup']:g}"
    space = (rates[0], *moved, *rates[1:])
    return Submission(name, optimizer, schedule, lever.average, lever.outer, lever.decay_schedule, stated=space)


def begin(name: str, end: dict[str, float]) -> dict[str, float]:
    """Where a lever's descent begins; end: where Muon stood half-way."""
    lever = LEVERS[name]
    return {"lr": end["lr"]} | {d.name: value for d, value in lever.own} | {"adamw_lr": end["adamw_lr"]} | dict(lever.start)


class Board(tune.Contest):
    """The trials of the board."""

    most_of_muon = TRIALS  # at first

    def end(self, track: str, name: str, first: int | None = None) -> dict[str, float]:
        row = descent.found(self.table(track, name), first)
        return row.settings if row else {}

    def job(self, kind: str, track: str, name: str, number: int = 0, steps: int = 0, turn: int = 0) -> tune.Job:
        about = (turn, number, descent.SEED + (kind != "descent") * (1 + number), steps or tune.length(track))
        of = entry(name, self.end(track, "muon", TRIALS))
        return tune.Job(kind, track, of, self.table(track, name), *about, self.end(track, name))

    def next_settings(self, job: tune.Job) -> dict[str, float] | None:
        """Muon begins at its best in records/tuning, which may have changed since."""
        track, name = job.track, job.submission.name
        if there := descent.rows_of(job.table):
            start = there[0].settings
        elif name == "muon":
            best = descent.best_of(table_of(tricks.TUNED.parent, track, name))
            start = best.settings if best else submission(name).defaults()
        else:
            start = begin(name, self.end(track, "muon", TRIALS))
        most = self.most_of_muon if name == "muon" else TRIALS
        return descent.following(job.submission.dimensions, job.table, start, most)

    def run(self) -> None:
        """The descents, then, seed by seed, all levers and Muon at each of its lengths."""
        tracks, names, jobs = self.options.tracks, ("muon", *self.options.levers), []
        self.train("descent", [self.job("descent", track, "muon") for track in tracks])
        self.most_of_muon = 2 * TRIALS  # the second half beside the levers, which need the first alone
        self.train("descent", [self.job("descent", track, name) for track in tracks for name in names])
        for track in tracks:
            ended = [name for name in names if self.end(track, name)]
            lengths = [round(part * tune.length(track)) for part in LENGTHS] if ended else []
            for n in range(SEEDS):
                jobs += [self.job("final", track, name, n) for name in ended]
                jobs += [self.job("length", track, "muon", n, steps) for steps in lengths]
        self.train("final", jobs)
        self.train("timing", [job for track in tracks for job in self.timings(track)])

    def timings(self, track: str) -> list[tune.Job]:
        """Of all with final runs, interleaved; anew when there are more of them, whose number is the turn's."""
        names = [name for name in ("muon", *LEVERS) if len(finals(self.table(track, name))) == SEEDS]
        steps, rounds = round(TIMED * tune.length(track)), range(tune.TIMINGS if len(names) > 1 else 0)
        return [self.job("timing", track, name, n, steps, len(names)) for n in rounds for name in names]

    def plan(self) -> None:
        for track in self.options.tracks:
            count = (1 + len(self.options.levers)) * (TRIALS + SEEDS + 1) + TRIALS + len(LENGTHS) * SEEDS  # 1: the timings
            hours = count * self.seconds_of_a_trial(track) / self.options.side_by_side / 3600
            print(f"{track}: at most {count} trials of about {tune.length(track)} steps, {hours:.1f} hours")


# ---------------------------------------------------------------- what came of it


def finals(table: tune.Table, kind: str = "final") -> list[Row]:
    """Its runs with new seeds that ended, by seed."""
    rows = [row for row in descent.finals(table, kind) if math.isfinite(row.val_loss)]
    return sorted(rows, key=lambda row: (row.steps, row.number))


def lines_of(tables: Tables) -> list[dict[str, Any]]:
    """A line for each lever that has all its seeds and was timed, the best first. Differences are paired by seed."""
    lines, runs = [], {name: finals(table) for name, table in tables.items()}
    muon = runs.get("muon", [])
    lengths = [*muon, *finals(tables["muon"], "length")] if muon else []
    turn = max((row.study for row in finals(tables["muon"], "timing")), default=0) if muon else 0
    seconds = {n: [row.seconds for row in finals(table, "timing") if row.study == turn] for n, table in tables.items()}
    for name in (name for name in LEVERS if len(runs.get(name, ())) == len(muon) == SEEDS and seconds[name]):
        pairs = list(zip(runs[name], muon, strict=True))
        gaps = [lever.val_loss - base.val_loss for lever, base in pairs]
        d, loss = stats.Sample.of(gaps), statistics.mean(lever.val_loss for lever, _ in pairs)
        worth = stats.horizon([row.steps for row in lengths], [row.val_loss for row in lengths], loss)
        steps = [2.0 ** (gap / worth.slope) if worth else math.nan for gap in (d.mean, *d.interval())]
        line = dict(name=name, loss=loss, difference=d.mean, interval=list(d.interval()), p=float(ttest_1samp(gaps, 0).pvalue))
        line |= dict(smallest=stats.smallest_difference(SEEDS, d.sd, LEVEL), steps=steps[0], steps_interval=sorted(steps[1:]))
        lines.append(line | dict(cost=statistics.median(map(truediv, seconds[name], seconds["muon"]))))
    highest = 0.0
    for rank, line in enumerate(sorted(lines, key=lambda line: line["p"])):
        line["holm"] = highest = max(highest, min(1.0, line["p"] * (len(lines) - rank)))
        line["verdict"] = NONE if highest >= LEVEL else "helps" if line["difference"] < 0 else "hurts"
    return sorted(lines, key=lambda line: line["difference"])


ABOUT = f"""# Levers

Generated by `./run.sh compare levers`. Each lever of modded-nanogpt's optimizer track is added to a tuned Muon, alone. Muon has
at most {2 * TRIALS} trials of coordinate descent, on one seed; a lever branches off after {TRIALS} and has {TRIALS} more with
its own settings. `placebo`, which changes nothing, shows what branching off costs: a lever that ends no further behind does not
hurt. Then all train with {SEEDS} new seeds at one length. *Difference*: the final loss minus Muon's on the same seed (95 %
interval). *Steps*: how many times as many steps Muon needs for the lever's loss, from its runs at {LENGTHS[0]} to {LENGTHS[1]}
of the length. *Cost*: CPU time of a step over Muon's, median of {tune.TIMINGS} short runs of all, interleaved. *Time*: steps
over cost. A verdict is Holm's at {LEVEL:.0%}. *Would show*: the smallest difference that {SEEDS} seeds show with a chance of
90 %. Read the order, not the size: models are small and runs short. What the authors say is on GPT-2 124M, in steps to 3.28;
*agree* sets it beside our verdict.
"""
HEAD = ["lever", "verdict", "difference, nats", "p (Holm)", "would show", "steps", "cost", "time", "its authors", "agree"]


def page(boards: dict[str, list[dict[str, Any]]], tables: dict[str, Tables]) -> str:
    """README.md."""
    parts = [ABOUT]
    for track, lines in boards.items():
        rows, settings, of = [], [], tables[track]
        for line in lines:
            (low, high), (few, many) = line["interval"], line["steps_interval"]
            lever, cost, verdict = LEVERS[line["name"]], line["cost"], line["verdict"]
            agree = "yes" if verdict == lever.says else "not seen" if verdict == NONE else "no"
            cells = [f"`{line['name']}`", verdict, f"{line['difference']:+.4f} ({low:+.4f} to {high:+.4f})"]
            cells += [f"{line['holm']:.2g}", f"{line['smallest']:.4f}", f"{line['steps']:.2f}x ({few:.2f}-{many:.2f})"]
            cells += [f"{cost:.2f}", f"{line['steps'] / cost:.2f}x", lever.claim, agree if lever.says else "-"]
            rows.append(cells)
        for name in ("muon", *(line["name"] for line in lines)):
            end, trials = descent.found(of[name]), descent.rows_of(of[name])
            settings.append([f"`{name}`", str(len(trials)), f"{end.val_loss:.4f}", f"`{to_text(end.settings)}`"])
        parts.append(f"## `{track}`: {tricks.track(track).summary.removeprefix('workload: ')}, {tune.length(track)} steps\n")
        parts += [markdown_table(HEAD, rows), f"\n![difference to Muon](levers-{track}.png)\n"]
        parts += [markdown_table(["lever", "trials", "loss, tuning seed", "settings"], settings) + "\n"]
        if missing := sorted(set(LEVERS) - {line["name"] for line in lines}):
            parts.append(f"Missing here: {', '.join(missing)}.\n")
    return "\n".join(parts)


def draw(track: str, lines: Sequence[dict[str, Any]]) -> Any:
    """A forest: differences to Muon with their intervals, the best lever on top."""
    figure, axis = plots.pyplot().subplots(figsize=(8, 0.36 * len(lines) + 1.3), constrained_layout=True)
    colours = {"helps": "#0072B2", "hurts": "#D55E00", NONE: "0.6"}
    for y, line in enumerate(reversed(lines)):
        axis.plot(line["interval"], [y, y], color=colours[line["verdict"]], linewidth=2)
        axis.plot(line["difference"], y, "o", color=colours[line["verdict"]])
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(lines)), [line["name"] for line in reversed(lines)])
    axis.set_xlabel(f"final loss minus Muon's, nats; left is better ({SEEDS} seeds, 95 % interval)")
    axis.set_title(f"{track}: blue helps, red hurts, grey shows no difference", fontsize=10)
    return figure


def contents(tables: dict[str, Tables]) -> Contents:
    """What follows from the tables: files, and what each picture is drawn from: the lines of a workload's board."""
    boards = {track: lines for track, of in tables.items() if (lines := lines_of(of))}
    texts = {"README.md": page(boards, tables), "levers.json": json.dumps(boards, indent=1) + "\n"}
    return Contents(texts, {f"levers-{track}": lines for track, lines in boards.items()})


def report(folder: Path) -> str:
    made = contents(read_tables(folder))
    if not made.pictures:
        raise UsageError(f"{folder} holds no lever with {SEEDS} seeds beside Muon: ./run.sh compare levers")
    for name, text in made.texts.items():
        atomic_write(folder / name, text)
    for name, lines in made.pictures.items():
        plots.save(draw(name.partition("-")[2], lines), folder, name, lines)
    count = sum(map(len, made.pictures.values()))
    return f"{count} levers on {len(made.pictures)} workloads: {folder / 'README.md'}"


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UsageError: an unknown lever or workload."""
    made = Parser(prog="compare.py levers", description=__doc__)
    made.add_argument("--levers", nargs="+", default=list(LEVERS), metavar="LEVER", help=f"default: all: {', '.join(LEVERS)}")
    made.add_argument("--workloads", nargs="+", default=["bytes-large", "wiki"], help="default: bytes-large wiki")
    tune.add_running(made)
    made.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    options = made.parse_args(argv)
    at_least(options, side_by_side=1, machine_hours=0)
    for words, known in ((options.levers, LEVERS), (options.workloads, tune.WORKLOADS)):
        if unknown := [word for word in words if word not in known]:
            raise UsageError(f"unknown {unknown[0]!r}: {nearest(unknown[0], known)}")
    options.tracks, options.submissions = list(dict.fromkeys(options.workloads)), []
    return options


def run(argv: list[str]) -> str:
    return tune.carried_out(parse(argv), Board, report)
