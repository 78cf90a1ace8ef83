"""Keep, check and show records (records/README.md): evidence that a recipe meets a track's target, checked by machine.

./run.sh records add --comparison comparisons/muon --arm modern,muon --against-arm record --name muon --why "..."
./run.sh records verify [cpu/010-muon scaling/cpu-modern] [--rerun]  every rule on every record and report, or on some
./run.sh records render                                              tables and pictures of records/README.md
./run.sh records summary runs/cpu/record-s0-1a2b3c4d                 one run beside the track's records
"""

import argparse
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import tricks
from engine.command import Answer, Parser, command
from engine.run_folder import intact, source_hash
from engine.spec import UsageError, nearest
from lab import runner, trials
from lab.records import history, reports, rules, tables
from lab.records import record as records
from lab.records.history import Tree
from lab.records.judge import Verdict, judge
from lab.records.record import CATEGORIES, FinishedRun, Kept, Record
from lab.records.reports import Report
from lab.records.tables import Levers, Tuning


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="records", description=__doc__)
    verbs = made.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("add", help="keep runs of a comparison as the track's next record").add_argument
    add("--comparison", type=Path, required=True, metavar="FOLDER", help="output folder of `compare`")
    add("--arm", required=True, help="arm of the comparison whose confirming runs become the record")
    add("--against-arm", metavar="ARM", help="arm of the comparison that is the previous record")
    add("--name", required=True, help="short name in lower case")
    add("--why", required=True, help="what is new and why it pays off, a sentence or two")
    add("--category", choices=CATEGORIES, default="gpt", help="gpt: a GPT of baseline size; optimizer: the `modern` model")
    add("--kind", choices=("record", "baseline"), default="record", help="baseline: what the track starts from")
    checker = verbs.add_parser("verify", help="check records and reports; exit code 2 if a rule is broken")
    checker.add_argument("names", nargs="*", metavar="NAME", help="such as cpu/010-muon, scaling/cpu-modern, tuning, levers")
    checker.add_argument("--rerun", action="store_true", help="also train one seed again and compare")
    verbs.add_parser("render", help="rewrite the tables and pictures of records/README.md")
    verbs.add_parser("summary", help="one run beside the track's records").add_argument("run", type=Path)
    return made


def add(
    folders: list[Path], name: str, why: str, category: str = "gpt", against: Sequence[Path] = (), kind: str = "record"
) -> Record:
    """Keep finished runs as the track's next record, if they meet every rule. Raises UsageError: the rule that is not met;
    nothing is kept then. against: run folders of the previous record, interleaved with these; else its own logs count."""
    if kind == "baseline" and against:
        raise UsageError("a baseline is what others are timed against: leave out --against-arm")
    runs, anew = (sorted(map(FinishedRun.read, group), key=lambda run: run.config["seed"]) for group in (folders, against))
    if len(runs) < 2:
        raise UsageError("1 run is no evidence: at least two seeds, better five")
    for run in (*runs, *anew):
        for part in records.FACTS if run in runs else ("machine", "versions"):  # precision and compiling are a recipe's choice
            if run.facts[part] != runs[0].facts[part]:
                raise UsageError(f"{run.folder} and {runs[0].folder} have different {part}")
    track = runs[0].config["track"]
    rival = records.previous(track, category) if kind == "record" else None
    if kind == "record" and rival is None:
        raise UsageError(f"{track} has no record to be faster than: add its baseline first, with --kind baseline")
    said = {"kind": kind, "category": category, "number": records.next_number(track), "name": name, "why": why}
    folder = records.RECORDS / track / f"{said['number']:03d}-{name}"
    folder.mkdir(parents=True)
    try:
        record = records.write(folder, runs, anew, rival, said)
        for v in verdicts_on(record):
            if v.verdict == "fail":
                raise UsageError(f"not a record: {v.rule}: {v.words}")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return record


def runs_of(folder: Path, arm: str) -> list[Path]:
    """Run folders of the confirming runs of an arm of a comparison."""
    summary, rows = runner.read_report(folder, "comparison.json")
    steps = {a["name"]: a["steps"] for a in summary["arms"]}
    if arm not in steps:
        raise UsageError(f"{folder} has no arm {arm!r}: {nearest(arm, steps)}")
    names = [row.run for row in rows if (row.arm, row.phase, row.steps) == (arm, "confirm", steps[arm])]
    if not names:
        raise UsageError(f"arm {arm!r} of {folder} has no confirming runs")
    return [trials.RUNS / "runs" / summary["track"] / name for name in names]


RULES = {Record: rules.RULES, Report: reports.RULES, Tuning: tables.RULES, Levers: tables.LEVER_RULES, Tree: history.RULES}
RERUN = {Record: {"rerun": rules.rerun}, Report: {"rerun": reports.rerun}}


def verdicts_on(kept: Kept, rerun: bool = False) -> list[Verdict]:
    """rerun: also train something of it again, where it is a record or report."""
    return judge(kept, RULES[type(kept)] | (RERUN.get(type(kept), {}) if rerun else {}))


def chosen(names: list[str]) -> list[Kept]:
    """What is kept, sound or not, by its labels; all where none is named, records/ itself the last."""
    root, places = records.RECORDS, dict.fromkeys(tricks.TRACKS, Record) | dict.fromkeys(reports.KINDS, Report)
    kept = [kind(path) for place, kind in places.items() for path in sorted((root / place).glob("*")) if path.is_dir()]
    kept += [kind(root / kind.label) for kind in (Tuning, Levers) if (root / kind.label).is_dir()]
    every = {one.label: one for one in (*kept, Tree(root))}
    labels = [name.rstrip("/").removeprefix("records/") for name in names] or list(every)
    for label in labels:
        if label not in every:
            raise UsageError(f"no record {label!r}: {nearest(label, every)}")
    return [every[label] for label in labels]


def verify(names: list[str], rerun: bool) -> Answer:
    """Print the verdicts as they come; returns the last words, all verdicts, and exit code 2 if a rule is broken, else 0."""
    kept, broken, older, data = chosen(names), 0, defaultdict(list), {}
    for one in kept:
        verdicts = verdicts_on(one, rerun)
        data[one.label] = [v._asdict() for v in verdicts]
        count = Counter(v.verdict for v in verdicts)
        broken += count["fail"] > 0
        counted = f"{count['fail']} broken, {count['not checkable']} not checkable"
        print(f"{one.label}: {'FAIL' if count['fail'] else 'pass'}, {len(verdicts)} rules, {counted}")
        for v in verdicts:
            print(f"  {v.verdict:13s} {v.rule:13s} {v.words}")
        if isinstance(one, Record) and verdicts[-1].rule != "schema" and one.about["source_sha256"] != source_hash():
            older[rules.commit(one)].append(one.label)
    if made := "; ".join(f"{commit} ({', '.join(labels)})" for commit, labels in older.items()):
        instead = "verified as text; to train one again, check out its commit"
        print(f"made by other sources than these, at commits {made}: {instead}")
    numbers = [sum(isinstance(one, kind) for one in kept) for kind in (Record, Report)]
    words = f"{numbers[0]} records, {numbers[1]} reports, {broken} with a broken rule\n"
    words += "verify cannot find what was invented as a whole, every number following from another: "
    return Answer(words + "--rerun would, by training again", data, 2 if broken else 0)


def run(argv: list[str]) -> int | str:
    options = parser().parse_args(argv)
    if options.verb == "add":
        runs, against = (runs_of(options.comparison, arm) if arm else [] for arm in (options.arm, options.against_arm))
        record = add(runs, options.name, options.why, options.category, against, options.kind)
        return f"{record.folder}\nkept; now: ./run.sh records render"
    if options.verb == "verify":
        return verify(options.names, options.rerun)
    if options.verb == "render":
        return history.render()
    with intact(options.run):
        return history.summary(options.run)


def main(argv: list[str]) -> int:
    return command("records", lambda: run(argv), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
