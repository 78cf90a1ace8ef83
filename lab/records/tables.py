"""The tuning tables kept in records/, and the rules that they must keep."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from itertools import zip_longest
from statistics import median

import tricks
from engine.run_folder import read_json
from lab import ledger, levers
from lab.records import judge
from lab.records.judge import NotCheckable, need
from lab.records.record import Kept
from lab.trials import validations
from lab.tuning import descent, report, tune, tuned
from lab.tuning.space import EXTRAS, Submission, points, submission
from optimizers import OPTIMIZERS

LONE = 1.0  # nats by which one validation may lie below all others of its run
LEAST_SHARE = 0.1  # of the wall-clock time of a trial is CPU time of its steps, as the median over a table


class Tuning(Kept):
    """The folder records/tuning."""

    label = "tuning"
    command = "./run.sh compare tune --report"
    names = (*OPTIMIZERS, *EXTRAS)

    @cached_property
    def tables(self) -> dict[str, tuned.Tables]:
        return tuned.read_tables(self.folder)

    @cached_property
    def contents(self) -> report.Contents:
        return report.contents(self.tables, "records/tuning", read_json(self.folder / "tuned.json"))

    def rows(self) -> Iterator[tuple[str, str, str, list[tuned.Row]]]:
        """(workload/submission, workload, submission, its trials as they stand in the file)."""
        for track, of in self.tables.items():
            for name, table in of.items():
                yield f"{track}/{name}", track, name, ledger.read(table.path, tuned.Row)


class Levers(Tuning):
    """The folder records/levers."""

    label = "levers"
    command = "./run.sh compare levers --report"
    names = ("muon", *levers.LEVERS)

    @cached_property
    def contents(self) -> report.Contents:
        return levers.contents(self.tables)


def files(tuning: Tuning) -> str:
    """Exactly the expected files are there: a table of each submission, which is registered or somebody's file."""
    pictures = {f"{name}.png" for name in tuning.contents.pictures}
    judge.only_files(tuning.folder, {*tuning.tables, *tuning.contents.texts, *pictures}, "tuning report", tuning.tables)
    for track, of in tuning.tables.items():
        need(track in tricks.TRACKS, f"there is no workload {track}")
        judge.only_files(tuning.folder / track, {f"{name}.csv" for name in of}, "workload")
        for name in of:
            need(name in tuning.names or ":" in name, f"{track}: there is no submission {name}")
    return f"{sum(map(len, tuning.tables.values()))} tables of {len(tuning.tables)} workloads"


def trials(tuning: Tuning) -> str:
    """No trial is there twice. A loss is the end of its curve, which has all its points and no lone low one; CPU time is that
    of computing."""
    count = 0
    for who, _, _, rows in tuning.rows():
        need(len({row.key for row in rows}) == len(rows), f"{who}: a trial stands there twice")
        ended, curves = [row for row in rows if row.status == "ok"], {}
        for row in rows:
            name = f"{who}, {row.kind} {row.study}, {row.number}"
            need((row.status == "ok") == math.isfinite(row.val_loss), f"{name}: {row.status} with the loss {row.val_loss}")
            need(0 <= row.seconds < math.inf, f"{name}: {row.seconds} s of CPU time")
            if row.status != "ok":
                continue
            steps, planned = [step for step, _ in row.losses], validations(row.steps, max(1, row.steps // tune.VALIDATIONS))
            need(steps == planned, f"{name}: validated at steps {steps}, planned are {planned}")
            same = curves.setdefault(tuple(row.losses), row)
            need((same.seed, same.settings) == (row.seed, row.settings), f"{name} has the curve of {same.kind} {same.number}")
            step, last = row.losses[-1]
            same = step == row.steps and math.isclose(last, row.val_loss, rel_tol=1e-4)
            need(same, f"{name}: {row.val_loss}, by its curve {last}")
            lowest = sorted(loss for _, loss in row.losses)[:2]
            need(lowest[-1] - lowest[0] <= LONE, f"{name}: one validation, {lowest[0]}, lies far below all others")
        share = median([row.seconds / max(row.wall, 0.1) for row in ended] or [1])
        need(share >= LEAST_SHARE, f"{who}: {share:.1%} of the trials' time is CPU time of their steps")
        count += len(rows)
    return f"{count} trials"


def studies(tuning: Tuning) -> str:
    """Settings and seed of each trial are those of its study: points of the space, one setting off them, or repeats; a
    descent's trials follow from the losses before them. None of a study, of a point's neighbours or of an end is missing."""
    own, sizes = [], set()
    for who, track, name, rows in tuning.rows():
        if ":" in name:
            own.append(who)
            continue
        entry, search = submission(name), defaultdict(dict)
        for row in (row for row in rows if row.kind == "search"):
            need(row.space == entry.version, f"{who}: trials of another space than today's")
            search[row.study][row.number] = row
        for study, of in search.items():
            need(sorted(of) == list(range(len(of))), f"{who}: study {study} has the trials {sorted(of)}")
            sizes.add(len(of))
            need(len(sizes) == 1, f"{who}: study {study} has {len(of)} trials, another has {max(sizes)}")
            for number, settings in enumerate(points(entry.dimensions, len(of), study)):
                need(of[number].settings == settings, f"{who}: trial {number} of study {study} is no point of it")
        near = Counter((row.study, row.number // 10) for row in rows if row.kind == "neighbour")
        for (study, number), count in near.items():
            whole = len(tuned.neighbours(search[study][number].settings)) if number in search[study] else 0
            need(count == whole, f"{who}: {count} neighbours of trial {number} of study {study}, not {whole}")
        length, of_descent = tune.length(track), descended(who, entry, tuning.tables[track][name])
        for row in rows:
            allowed = planned(row, search, length) + [(seed, length, each) for seed, each in of_descent.get(row.kind, ())]
            need((row.seed, row.steps, row.settings) in allowed, f"{who}: {row.kind} {row.study}, {row.number} was not planned")
    if own:
        raise NotCheckable(f"the space of an optimizer of one's own is not here: {', '.join(own)}")
    return "as drawn"


def in_order(who: str, entry: Submission, start: descent.Settings, rows: list[tuned.Row]) -> list[descent.Settings]:
    """What a descent from `start` has tried. Broken: other moves than its losses lead to."""
    tried, _ = descent.order(entry.dimensions, start, [row.val_loss for row in rows])
    need([row.settings for row in rows] == tried, f"{who}: the losses of the descent lead elsewhere")
    return tried


def descended(who: str, entry: Submission, table: tuned.Table) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """(seed, settings) that the trials of a descent may have, by their kind. Broken: its own did not come in this order."""
    if not (rows := descent.rows_of(table)):
        return {}
    start, end = table.best(tuned.FIRST_STUDY).settings, descent.found(table).settings
    tried, off = in_order(who, entry, start, rows), descent.changes(entry.dimensions, end)
    if finals := table.of("final"):
        need(descent.following(entry.dimensions, table, start, descent.BUDGET) is None, f"{who}: its descent has not ended")
        need(len(finals) == descent.SEEDS, f"{who}: {len(finals)} final runs, not {descent.SEEDS}")
        done = len(descent.rises(entry.dimensions, table))
        need(done == len(off), f"{who}: {done} of {len(off)} changes of its end were tried")
    return {
        "descent": [(descent.SEED, each) for each in tried],
        "around": [(descent.SEED, each) for each in off],
        "final": [(descent.SEED + 1 + n, end) for n in range(descent.SEEDS)],
    }


def planned(row: tuned.Row, search: dict[int, dict[int, tuned.Row]], length: int) -> list[tuple[int, int, dict[str, float]]]:
    """(seed, steps, settings) that such a trial may have, as tune.Contest makes them."""
    if row.kind == "search":
        return [(1000 * row.study + row.number, length, row.settings)]
    if row.kind == "neighbour":
        of = search.get(row.study, {}).get(row.number // 10)
        return [(of.seed, of.steps, settings) for settings in tuned.neighbours(of.settings).values()] if of else []
    if row.kind == "target":
        of = search.get(row.study // 1000, {}).get(row.study % 1000)
        return [(100_000 + row.number, round(tuned.SHORT * length), of.settings)] if of else []
    if row.kind == "timing":  # of the best, or of the defaults where there is none
        seed, steps = 1000 * row.study + row.number, max(1, round(tuned.TIMED * length))
        tried = [trial.settings for of in search.values() for trial in of.values()]
        return [(seed, steps, settings) for settings in tried or [row.settings]]
    return []


def results(tuning: Tuning) -> str:
    """README.md and the other files beside it follow from the tables."""
    for name, text in tuning.contents.texts.items():
        lines = zip_longest((tuning.folder / name).read_text().splitlines(), text.splitlines())
        for number, (there, follows) in enumerate(lines, 1):
            need(there == follows, f"{name} line {number} does not follow from the tables: {tuning.command}")
    return ", ".join(tuning.contents.texts)


def pictures(tuning: Tuning) -> str:
    """The pictures were drawn from these tables: each names the hash of what it shows."""
    return judge.pictured(tuning.folder, tuning.contents.pictures)


def moves(board: Levers) -> str:
    """Trials of a descent follow from the losses before them; a lever's begins where Muon stood half-way. Final runs have the
    settings at a descent's end, and the planned seeds and lengths."""
    for who, track, name, rows in board.rows():
        table, length = board.tables[track][name], tune.length(track)
        end = descent.found(board.tables[track]["muon"], levers.TRIALS).settings
        entry, of, best = levers.entry(name, end), descent.rows_of(table), descent.found(table).settings
        in_order(who, entry, of[0].settings if name == "muon" else levers.begin(name, end), of)
        again, most = (len(levers.LENGTHS), 2 * levers.TRIALS) if name == "muon" else (0, levers.TRIALS)
        whole = [len(table.of(kind)) for kind in ("final", "length")] == [levers.SEEDS, levers.SEEDS * again]
        ended = descent.following(entry.dimensions, table, of[0].settings, most) is None
        need(whole and ended, f"{who}: not all of its planned runs are there")
        lengths = {"final": {length}, "descent": {length}, "timing": {round(tuned.TIMED * length)}}
        lengths["length"] = {round(part * length) for part in levers.LENGTHS}
        for row in rows:
            seed = descent.SEED + (row.kind != "descent") * (1 + row.number)
            fits = row.seed == seed and row.steps in lengths.get(row.kind, ()) and row.space == entry.version
            need(fits and (row.kind == "descent" or row.settings == best), f"{who}: {row.kind} {row.number} was not planned")
    return "as they follow"


RULES = {rule.__name__: rule for rule in (files, trials, studies, results, pictures)}
LEVER_RULES = {rule.__name__: rule for rule in (files, trials, moves, results, pictures)}
