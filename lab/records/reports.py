"""Reports kept in records/: comparisons and scaling experiments, with the trials from which their statistics follow, and the
rules that they must keep."""

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache, cached_property
from itertools import pairwise, product
from typing import Any, NamedTuple

from config import mean_flops, resolve
from engine.run_folder import read_json, source_hash
from engine.schedules import Course
from engine.spec import UsageError
from lab import comparison, ledger, plots, stats, trials
from lab.records import judge, plans
from lab.records.judge import Broken, NotCheckable, need, only_files
from lab.records.record import STALLED, Kept
from lab.runner import POINTS, curves_by_run, read_curves
from lab.scaling import ladder, survival
from lab.scaling import report as survival_report

MACHINE = r".+, (\d+) cores, \d+ (rank\(s\) )?x .+, torch \S+"  # as ledger.machine has it
ONE_AT_A_TIME = ("confirm", "time")  # phases whose clocks count


class Kind(NamedTuple):
    """What a report consists of, and how it is made from its trials."""

    name: str  # of the file with its statistics
    again: Callable[[plans.Summary, list[ledger.Row]], plans.Summary]  # the same statistics, from the trials
    markdown: Callable[[plans.Summary], str]
    planned: Callable[[plans.Summary, list[ledger.Row]], plans.Arms]
    points: int  # that curves.csv keeps of a trial's training loss


COMPARISON = Kind("comparison.json", comparison.again, comparison.markdown, plans.of_comparison, POINTS)
SCALING = Kind("scaling.json", survival.again, survival_report.markdown, plans.of_scaling, ladder.POINTS)
KINDS = {"comparisons": COMPARISON, "scaling": SCALING}


class Report(Kept):
    """A folder of records/comparisons or records/scaling."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.folder.parent.name]

    @cached_property
    def rows(self) -> list[ledger.Row]:
        return ledger.read_rows(self.folder / "trials.csv")

    @cached_property
    def summary(self) -> plans.Summary:
        return read_json(self.folder / self.kind.name)

    @cached_property
    def counted(self) -> list[ledger.Row]:
        """The rows that are not left out."""
        return [row for row in self.rows if row.run not in self.summary.get("left_out", ())]

    @cached_property
    def flags(self) -> plans.Arms:
        """Of each arm's trials. Broken: the command planned another report."""
        return self.kind.planned(self.summary, self.counted)


def files(report: Report) -> str:
    """Exactly the expected files are there; none names a path of a machine."""
    expected = {report.kind.name, "README.md", "trials.csv", "curves.csv", *(f"{name}.png" for name in report.summary["plots"])}
    only_files(report.folder, expected, "report")
    return f"{len(expected)} files, {sum(path.stat().st_size for path in report.folder.iterdir()) / 1000:,.0f} kB"


def command(report: Report) -> str:
    """The report did what its command says: arms and their flags, target, seeds, lengths, sizes; no planned run is missing, and
    what is listed as left out was run."""
    wrong = set(report.summary.get("left_out", ())) - {row.run for row in report.rows}
    need(not wrong, f"left out is a run that is not there: {min(wrong, default='')}")
    return f"{len(report.flags)} arms"


def runs(report: Report) -> str:
    """No two lines of trials.csv are one run. A run's name states its recipe and seed; CPU time and memory are possible; runs
    whose times count did not overlap."""
    rows, seen, ran = report.rows, set(), defaultdict(list)
    need(len({row.run for row in rows}) == len(rows), "a trial stands in trials.csv twice")
    for row in rows:
        who = named(row)
        if words := report.flags.get(row.arm):
            recipe = words[words.index("--tricks") + 1].replace(",", "+")[:100]  # then the flags, if there is room
            fits = re.fullmatch(rf"{re.escape(recipe)}(-.+)?-s{row.seed}-[0-9a-f]{{8}}", row.run)
            need(fits, f"{who}: its run cannot have the name {row.run}")
        if row.status == "crashed":
            continue
        need(row.status != "ok" or (row.val_loss, row.train_time) not in seen, f"{who}: loss and time of another trial")
        seen.add((row.val_loss, row.train_time))
        machine = re.fullmatch(MACHINE, row.machine)
        need(machine, f"{who}: {row.machine!r} is no machine")
        judge.used(who, "cpu" if machine[2] else "cuda", int(machine[1]), row.train_time, vars(row))
        need(row.stalled == (row.train_time > STALLED * row.robust_train_time), f"{who}: stalled is {row.stalled}")
        ran[row.phase].append((ledger.moment(row.ended), row.train_time, who))
    for phase in () if "--launcher ray" in report.summary["command"] else ONE_AT_A_TIME:
        for (ended, _, one), (later, seconds, other) in pairwise(sorted(ran[phase])):
            need((later - ended).total_seconds() + 1 >= seconds, f"{one} and {other} ran at the same time")
    return f"{len(rows)} trials, {len(seen)} with a loss"


def settings(report: Report) -> str:
    """Tokens, FLOPs and paired seeds follow from the flags, and so do run names if the source is today's."""
    moving, first, again = set(), {}, report.summary.get("mode") == "again"
    for row in (row for row in report.rows if row.arm in report.flags and row.status != "crashed"):
        who, flags, shift = named(row), report.flags[row.arm], row.seed - row.pair
        need(first.setdefault(row.arm, shift) == shift and (again or not shift), f"{who}: a pair is of one seed")
        of_today = row.source == source_hash()[:12]
        if "record" in flags and not of_today:  # what `record` was then, trains no more
            moving.add((row.tokens / row.steps, round(row.flops / row.tokens)))
            need(not again or len(moving) == 1, f"{who}: other tokens or FLOPs a step than other runs of the recipe")
            continue
        try:
            tokens, _, flops = work(flags, row.steps)
        except UsageError as error:
            need(not of_today, str(error))
            raise NotCheckable(f"today's trainer cannot train {row.arm}: {error}") from None
        need(row.tokens == tokens[-1], f"{who}: {row.tokens:,} tokens, by its settings {tokens[-1]:,}")
        same = math.isclose(row.flops, flops * row.tokens, rel_tol=1e-6)
        need(same, f"{who}: {row.flops:.6g} FLOPs, by its settings {flops * row.tokens:.6g}")
        if of_today and row in report.counted:
            name = trials.Trial(trials.Arm(row.arm, flags, shift), row.steps, row.pair).folder.name
            need(row.run == name, f"{who}: a run of these settings is named {name}, not {row.run}")
    if moving:
        raise NotCheckable("what `record` was then, trains no more")
    return f"{len(first)} arms"


@cache
def work(flags: tuple[str, ...], steps: int) -> tuple[list[int], list[int], int]:
    """Of a run: tokens after so many steps, the steps of its validations, FLOPs a token."""
    config, model, _ = resolve([*plans.without(plans.registered(flags), "--optimizer"), "--steps", str(steps)])
    before = Course(config).units_before
    tokens = [before(step) * config.batch_tokens for step in range(steps + 1)]
    return tokens, trials.validations(steps, config.val_every), mean_flops(config, model)


def named(row: ledger.Row) -> str:
    return f"{row.arm}, {row.steps} steps, seed {row.seed}"


def curves(report: Report) -> str:
    """Each curve is of a run in trials.csv and ends in its loss, time and tokens; it has all its points, in order, and its
    validation losses agree with its training losses; seeds differ by more than a little noise."""
    ends, alike = defaultdict(list), defaultdict(dict)
    there = {(row.arm, row.seed, row.steps) for row in report.rows}
    drawn = curves_by_run(report.folder / "curves.csv")
    for lines in drawn:
        train, val = ([line for line in lines if line["kind"] == kind] for kind in ("train", "val"))
        arm, seed, steps = run = tuple(lines[0][key] for key in ("arm", "seed", "steps"))
        who = f"{arm}, {steps} steps, seed {seed}"
        need(run in there, f"{who}: curves.csv has a run that trials.csv has not")
        span = math.ceil(steps / report.kind.points)
        need([c["step"] for c in train] == [*range(span, steps, span), steps], f"{who}: curves.csv lacks points")
        for part, key in product((train, val), ("step", "tokens", "train_time")):
            values = [0, *(c[key] for c in part)]
            need(values == sorted(values), f"{who}: {key} runs backwards in curves.csv")
        flags = report.flags.get(arm, ())
        if flags and "record" not in flags:  # what `record` was then, trains no more
            as_planned(who, lines, flags, steps)
        future = "future" in " ".join(flags)
        judge.smooth(who, steps, *([(c["step"], c["loss"]) for c in part] for part in (train, val)), future)
        alike[arm, steps][who] = [c["loss"] for c in train]
        ends[run] += val[-1:]
    for losses in alike.values():
        judge.unlike(losses)
    for row in (row for row in report.rows if row.status == "ok"):
        of_run = ends[row.arm, row.seed, row.steps]  # several where it was trained again
        need(of_run, f"{named(row)}: curves.csv has no loss at its end")
        end = min(of_run, key=lambda c: abs(c["train_time"] - row.train_time))
        for word, stated, shown, most in (
            ("loss", row.val_loss, end["loss"], 1e-5),
            ("time", row.train_time, end["train_time"], 1e-3),
            ("number of tokens", row.tokens, end["tokens"], 0),
        ):
            need(abs(stated - shown) <= most, f"{named(row)}: the {word} is {stated}, by curves.csv {shown}")
    return f"{len(drawn)} curves"


def as_planned(who: str, lines: list[dict[str, Any]], flags: tuple[str, ...], steps: int) -> None:
    """Broken: a curve has other validations or tokens than its flags lead to."""
    try:
        tokens, planned, _ = work(flags, steps)
    except (UsageError, NotCheckable):  # as `settings` says
        return
    validated = [c["step"] for c in lines if c["kind"] == "val"]
    need(validated == planned, f"{who}: validated at steps {validated}, planned are {planned}")
    for step, seen in ((c["step"], c["tokens"]) for c in lines):
        need(seen == tokens[step], f"{who}: {seen:,} tokens at step {step}, by its settings {tokens[step]:,}")


def confirmed(report: Report) -> str:
    """Every planned confirming run of a comparison has a line, failed ones too. All arms on one seed ran within the hour."""
    summary = report.summary
    if report.kind is SCALING:
        return "no comparison"
    planned = {arm["name"]: arm["steps"] for arm in summary["arms"] if arm["steps"]}
    if len(planned) < 2 or summary["base"] not in planned:
        return "nothing was to be confirmed"
    for name, steps in planned.items():
        rows = [row for row in report.counted if (row.arm, row.steps, row.phase) == (name, steps, "confirm")]
        ran, most = sorted(row.pair for row in rows), max(len(rows), summary["seeds"])
        need(len(ran) == most and ran == [*range(len(ran))], f"{name}: confirmed by the seeds {ran}, not by 0 to {most - 1}")
    for far in ledger.turns_apart(row for row in report.counted if row.steps == planned.get(row.arm)):
        raise Broken(f"pair {far['pair']} lies {far['hours']:.1f} hours apart: interleaved is within the hour")
    return f"{summary['seeds']} seeds of {len(planned)} arms"


def statistics(report: Report) -> str:
    """The statistics follow from the trials."""
    again = report.kind.again(report.summary, report.rows) | {"plots": report.summary["plots"]}
    words = difference(report.summary, json.loads(json.dumps(again)))
    need(not words, words)
    return f"{len(report.rows)} trials"


def words(report: Report) -> str:
    """README.md is the statistics in words."""
    text = (report.folder / "README.md").read_text()
    need(text == report.kind.markdown(report.summary), f"README.md is not what {report.kind.name} gives")
    return "as generated"


def pictures(report: Report) -> str:
    """The pictures were drawn from these statistics and curves: each names the hash of what it shows."""
    shown = plots.without_plots(report.summary)
    if report.kind is COMPARISON:
        shown = [shown, read_curves(report.folder / "curves.csv", report.counted)]
    return judge.pictured(report.folder, dict.fromkeys(report.summary["plots"], shown))


def data(report: Report) -> str:
    """The trials were trained on the corpus prepared here."""
    for fingerprint, arm in {row.data: row.arm for row in report.rows if row.data and row.arm in report.flags}.items():
        config, _, _ = resolve(plans.registered(report.flags[arm]))
        _, here = judge.corpus(config.corpus, config.tokenizer)
        same = fingerprint == judge.fingerprint(here["splits"])
        need(same, f"{arm}: trained on other data ({fingerprint}) than {config.corpus} here")
    return "as prepared here"


def code(report: Report) -> str:
    """The commits that the trials name have their source, and are older than the trials."""
    kept = defaultdict(list)
    for row in (row for row in report.rows if row.status == "ok" or row.source):
        need(row.source and row.data, f"{named(row)}: it does not say its source and data")
        kept[row.commit, row.source].append(row.ended)
    for (commit, source), ended in kept.items():
        judge.made_at(commit, source, ended)
    return f"{len(kept)} commits"


ORDER = (files, command, runs, settings, curves, confirmed, statistics, words, pictures, data, code)
RULES = {rule.__name__: rule for rule in ORDER}


def rerun(report: Report) -> str:
    """One confirming run trained again here ends within the noise of its arm's (99 % prediction interval)."""
    groups = defaultdict(list)
    for row in report.counted:
        if row.arm in report.flags and row.status == "ok" and row.phase in ("confirm", "curve"):
            groups[row.arm, row.steps].append(row)
    several = [rows for rows in groups.values() if len(rows) > 2]
    if not several:
        raise NotCheckable("no arm has three runs of one length")
    rows = random.choice(several)
    row = random.choice(rows)
    arm = trials.Arm(row.arm, plans.registered(report.flags[row.arm]), row.seed - row.pair)
    return judge.trained_again(trials.Trial(arm, row.steps, row.pair), stats.Sample.of([r.val_loss for r in rows]))


def difference(there: Any, again: Any, place: str = "") -> str:
    """Where two contents of JSON first differ, in words. Numbers may by 1e-4: other machines round otherwise."""
    lists = isinstance(there, list) and isinstance(again, list)
    if lists:
        there, again = dict(enumerate(there)), dict(enumerate(again))
    if isinstance(there, dict) and isinstance(again, dict):
        for key in there | again:
            inner = f"{place}[{key}]" if lists else f"{place}.{key}".lstrip(".")
            if key not in there or key not in again:
                return f"{inner} is not in both"
            if words := difference(there[key], again[key], inner):
                return words
        return ""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (there, again))
    same = math.isclose(there, again, rel_tol=1e-4) if numbers else there == again
    return "" if same else f"{place} is {there}, by the trials {again}"
