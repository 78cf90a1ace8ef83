"""Reports kept in records/: comparisons and scaling experiments, each beside the trials from which its statistics follow, and
the rules that a report must keep."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from lab import comparison, ledger
from lab.records.rules import Broken, Verdict, judge, need, only_files
from lab.runner import read_curves
from lab.scaling import report as survival_report
from lab.scaling import survival

Summary = dict[str, Any]


class Kind(NamedTuple):
    """What a report consists of, and how it is made from its trials."""

    name: str  # of the file with its statistics
    again: Callable[[Summary, list[ledger.Row]], Summary]  # the same statistics, from the trials
    markdown: Callable[[Summary], str]


KINDS = {
    # of several machines or not: the summary says which ones
    "comparisons": Kind("comparison.json", partial(comparison.again, allow_mixed=True), comparison.markdown),
    "scaling": Kind("scaling.json", survival.again, survival_report.markdown),
}


@dataclass(frozen=True)
class Report:
    """A folder of records/comparisons or records/scaling."""

    folder: Path

    @property
    def label(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def kind(self) -> Kind:
        return KINDS[self.folder.parent.name]

    @cached_property
    def rows(self) -> list[ledger.Row]:
        return ledger.read_rows(self.folder / "trials.csv")

    @cached_property
    def summary(self) -> Summary:
        return json.loads((self.folder / self.kind.name).read_text())


def all_reports(root: Path) -> list[Report]:
    """All reports under a folder of records."""
    return [Report(path.parent) for name, kind in KINDS.items() for path in sorted((root / name).glob(f"*/{kind.name}"))]


def verdicts(report: Report) -> list[Verdict]:
    return judge(report, RULES)


def files(report: Report) -> str:
    """The expected files are there and no others; none names a path of a machine."""
    pictures = {f"{name}.png" for name in report.summary["plots"]}
    expected = {report.kind.name, "README.md", "trials.csv", "curves.csv"} | pictures
    only_files(report.folder, expected, "report")
    return f"{len(expected)} files, {sum(path.stat().st_size for path in report.folder.iterdir()) / 1000:,.0f} kB"


def trials(report: Report) -> str:
    """No two lines of trials.csv are one run; loss and time of each are those at the end of its curve in curves.csv."""
    ended = defaultdict(list)
    for c in read_curves(report.folder / "curves.csv"):
        if c["kind"] == "val" and c["step"] == c["steps"]:
            ended[c["arm"], c["seed"], c["steps"]].append(c)
    seen: set[tuple[float, float]] = set()
    for row in (row for row in report.rows if row.status == "ok"):
        who = f"{row.arm}, {row.steps} steps, seed {row.seed}"
        need((row.val_loss, row.train_time) not in seen, f"{who}: loss and time of another trial")
        seen.add((row.val_loss, row.train_time))
        ends = ended[row.arm, row.seed, row.steps]  # several where it was trained again
        need(bool(ends), f"{who}: curves.csv has no loss at its end")
        end = min(ends, key=lambda c: abs(c["train_time"] - row.train_time))
        loss, time = end["loss"], end["train_time"]
        need(abs(row.val_loss - loss) < 1e-5, f"{who}: the loss is {row.val_loss}, by curves.csv {loss}")
        need(abs(row.train_time - time) < 1e-3, f"{who}: the time is {row.train_time}, by curves.csv {time}")
    need(len({row.run for row in report.rows}) == len(report.rows), "a trial stands in trials.csv twice")
    return f"{len(report.rows)} trials, {len(seen)} with a loss"


def confirmed(report: Report) -> str:
    """Each arm of a comparison has a line for every planned confirming run, failed ones too. All arms on one seed ran within
    the hour."""
    summary = report.summary
    if report.kind is not KINDS["comparisons"]:
        return "no comparison"
    planned = {arm["name"]: arm["steps"] for arm in summary["arms"] if arm["steps"]}
    if len(planned) < 2 or summary["base"] not in planned:
        return "nothing was to be confirmed"
    valid = [row for row in report.rows if row.run not in summary.get("left_out", ())]
    for name, steps in planned.items():
        rows = [row for row in valid if (row.arm, row.steps, row.phase) == (name, steps, "confirm")]
        ran, most = sorted(row.pair for row in rows), max(len(rows), summary["seeds"])
        need(ran == list(range(most)), f"{name}: confirmed by the seeds {ran}, not by 0 to {most - 1}")
        shifts = {row.seed - row.pair for row in rows}
        need(len(shifts) == 1 and (shifts == {0} or summary["mode"] == "again"), f"{name}: seeds other than those planned")
    for far in ledger.turns_apart(row for row in valid if row.steps == planned.get(row.arm)):
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


RULES = {rule.__name__: rule for rule in (files, trials, confirmed, statistics, words)}


def difference(there: Any, again: Any) -> str:
    """Where two contents of JSON first differ, in words; empty if they do not. Numbers are the same to 1e-4: other machines
    round otherwise, and fits carry it on."""
    stated, followed = dict(leaves(there)), dict(leaves(again))
    if missing := stated.keys() ^ followed.keys():
        return f"{min(missing)} is not in both"
    for place, a in stated.items():
        b = followed[place]
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b))
        if not (math.isclose(a, b, rel_tol=1e-4) if numbers else a == b):
            return f"{place} is {a}, by the trials {b}"
    return ""


def leaves(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(where, value) of all that JSON holds: ("arms[0].steps", 740)."""
    parts = {f"{place}.{key}".lstrip("."): value for key, value in content.items()} if isinstance(content, dict) else {}
    parts |= {f"{place}[{i}]": value for i, value in enumerate(content)} if isinstance(content, list) else {}
    for where, value in parts.items():
        yield from leaves(value, where)
    if not parts:
        yield place, content
