"""Judging what is kept: verdicts, and what every kept run must keep, in a record's logs as in a line of trials.csv."""

import dataclasses
import hashlib
import io
import json
import math
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

from scipy.special import stdtrit

from data.shards import dataset_folder, read_manifest
from engine import run_folder
from engine.spec import UsageError
from lab import ledger, plots, stats, trials
from lab.records import record as records

Points = Sequence[tuple[int, float]]  # (step, loss)
MOST_GAP = {500: 0.25, 0: 0.5}  # nats between the last validation and the training loss before it, by least steps of the run
MOST_GAP_BEFORE = 1.0  # at earlier validations: the schedule has hardly begun to fall
MOST_BELOW = 0.5  # nats by which a training loss may be below all validations: kept runs stay within 0.2
ALIKE = 0.1  # of the scatter from step to step: seeds differ by about as much as steps do
LEAST_MEMORY = 200_000_000  # bytes of a process that has imported torch
OLDER_SOURCES = ("data", "optimizers")  # folders that once ran, beside the files at the top; later without these:
TOOLS = ("compare.py", "cost.py", "operations.py", "sample.py", "scaling.py")


class Verdict(NamedTuple):
    rule: str
    verdict: str  # pass, fail or not checkable
    words: str


class Broken(Exception):
    """A rule is broken; its text says how."""


class NotCheckable(Exception):
    """A rule cannot be checked here; its text says why."""


def need(condition: object, words: str) -> None:
    if not condition:
        raise Broken(words)


def agree(stated: Mapping[str, Any], expected: Mapping[str, Any], words: str) -> None:
    """Broken: another value is stated than the expected one. words: with places for key, stated and expected."""
    for key, value in expected.items():
        need(stated.get(key) == value, words.format(key=key, stated=stated.get(key), expected=value))


def judge(kept: Any, rules: Mapping[str, Callable[[Any], str]]) -> list[Verdict]:
    """The verdict of every rule. What breaks the rule `schema` gets the verdict on that alone."""
    verdicts = []
    for name, rule in rules.items():
        try:
            verdict, words = "pass", rule(kept)
        except NotCheckable as reason:
            verdict, words = "not checkable", str(reason)
        except (Broken, UsageError) as problem:
            verdict, words = "fail", str(problem)
        except Exception as problem:  # a file of another shape, or none; sizes that no machine has
            verdict, words = "fail", f"cannot be read: {type(problem).__name__} {problem}"
        verdicts.append(Verdict(name, verdict, words))
        if (name, verdict) == ("schema", "fail"):
            break
    return verdicts


def only_files(folder: Path, expected: set[str], what: str, folders: Collection[str] = ()) -> None:
    """Broken: a file is missing, not expected or a link, or a text names a path of the machine that it is from."""
    there = {path.name for path in folder.iterdir() if path.name != "lock" or not path.is_file()}  # git leaves it out too
    links = {name for name in there if (folder / name).is_symlink()}
    for wrong, names in (("missing", expected - there), (f"not part of a {what}", there - expected), ("a link", links)):
        need(not names, f"{wrong}: {', '.join(sorted(names))}")
    for name in there - set(folders):
        text = "" if name.endswith(".png") else (folder / name).read_text()
        path = re.search(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\)\S*", text)
        need(path is None, f"a path of a machine: {path and path[0]}")


def smooth(who: str, steps: int, train: Points, val: Points, future: bool = False) -> None:
    """Broken: a validation loss is far from the training losses just before it, or a training loss far below all of them.
    future: training also predicts later tokens."""
    need(all(isinstance(x, (int, float)) and math.isfinite(x) for _, x in (*train, *val)), f"{who}: a loss is no number")
    last = max(1, len(train) // 20)
    for at, loss in val:
        before = mean([x for step, x in train if step <= at][-last:] or [math.inf])
        most = next(gap for least, gap in MOST_GAP.items() if steps >= least) if at == steps else MOST_GAP_BEFORE * (1 + future)
        words = f"{who}: the validation loss at step {at} is {loss:.4f}, the training loss before it {before:.4f}"
        need(abs(loss - before) <= most, f"{words}: further apart than {most:g}")
    low, least = min((x for _, x in train), default=0), min((x for _, x in val), default=0)
    need(low >= least - MOST_BELOW, f"{who}: a training loss of {low:.4f} lies far below all validations, {least:.4f}")


def unlike(runs: Mapping[str, Sequence[float]]) -> None:
    """Broken: two runs of one recipe, whose seeds differ, have nearly the same training losses. runs: losses of equal steps."""
    late = {name: losses[len(losses) // 2 :] for name, losses in runs.items()}  # where the trend is small
    for (one, a), (other, b) in combinations(late.items(), 2):
        if len(a) == len(b) >= 8:
            apart = pstdev([y - x for x, y in zip(a, b, strict=True)])
            scatter = pstdev([x - 2 * y + z for x, y, z in zip(a, a[1:], a[2:])]) / math.sqrt(3)  # the same, of steps
            need(apart >= ALIKE * scatter, f"{one} and {other} are the same run: their losses differ by {apart:.2g} only")


def used(who: str, device: str, cores: int, train_time: float, end: Mapping[str, float]) -> None:
    """Broken: CPU time or memory that no process can have. end: process_time, peak_memory."""
    seconds, memory = end["process_time"], end["peak_memory"]
    possible = 0 <= seconds <= records.STALLED * cores * train_time + 1
    need(possible, f"{who}: {seconds:.1f} s of CPU time in {train_time:.1f} s on {cores} cores")
    need(memory >= (LEAST_MEMORY if device == "cpu" else 1), f"{who}: {memory:,} bytes of memory, torch alone needs more")


@cache
def at_commit(commit: str) -> tuple[set[str], datetime]:
    """Hashes of what trained at a commit, in each way that they were ever made; and its time. NotCheckable: it is not here."""
    stamp = run_folder.git("show", "-s", "--format=%ct", commit) if re.fullmatch(r"[0-9a-f]{7,64}", commit) else None
    if not stamp:
        raise NotCheckable(f"commit {commit} is not here")
    archive = subprocess.run(["git", "archive", commit, "--", "*.py"], capture_output=True, check=True, cwd=run_folder.ROOT)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        texts = {Path(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}
    flat = {path: path.name for path in texts if str(path.parent) in (".", *OLDER_SOURCES)}
    ways = [{path: str(path) for path in texts if len(path.parts) < 3 and path.parts[0] in run_folder.TRAINING}]
    ways += [flat, {path: name for path, name in flat.items() if name not in TOOLS}]
    contents = (b"".join(way[path].encode() + b"\0" + texts[path] for path in sorted(way)) for way in ways)
    hashes = {hashlib.sha256(content).hexdigest() for content in contents}
    return hashes, datetime.fromtimestamp(int(stamp), timezone.utc).replace(tzinfo=None)


def made_at(commit: str, source: str, ended: Iterable[str]) -> None:
    """Broken: the commit has another source than the runs, or is younger than one of them; a run is from the future. A `+` at
    its end: its files were changed."""
    times, now = list(map(ledger.moment, filter(None, ended))), ledger.moment(run_folder.now_utc())
    for time in times:
        need(time <= now, f"a run ended in the future: {time}")
    hashes, made = at_commit(commit.rstrip("+"))
    same = commit.endswith("+") or any(known.startswith(source) for known in hashes)
    need(same, f"commit {commit[:12]} has not the source {source[:12]}")
    for time in times:
        need(made <= time, f"a run of {time} is older than its commit {commit[:12]}, of {made}")


def pictured(folder: Path, pictures: Mapping[str, Any]) -> str:
    """Broken: a picture was drawn from other data than these. pictures: name -> what it shows."""
    for name, data in pictures.items():
        drawn = plots.drawn_from(folder / f"{name}.png")
        need(drawn == plots.data_hash(name, data), f"{name}.png was not drawn from these data: draw it again")
    return f"{len(pictures)} pictures"


def corpus(name: str, tokenizer: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the manifest of a corpus that is prepared here. NotCheckable: it is not."""
    folder = dataset_folder(records.RECORDS.parent / "corpora", name, tokenizer)
    if (manifest := read_manifest(folder)) is None:
        raise NotCheckable(f"the corpus is not here: ./run.sh data prepare {name} --tokenizer {tokenizer}")
    return folder, manifest


def fingerprint(splits: Mapping[str, Any]) -> str:
    """As env.json has it, from the shards of both splits."""
    texts = (json.dumps(splits[split], sort_keys=True).encode() for split in ("train", "val"))
    return "-".join(hashlib.sha256(text).hexdigest()[:16] for text in texts)


def trained_again(trial: trials.Trial, kept: stats.Sample, instead: str = "") -> str:
    """Train it here in a fresh folder, since a result in runs/ proves nothing. Broken: it ends outside the 99 % prediction
    interval of the kept runs. NotCheckable: today's trainer refuses it; instead: what to do then."""
    with tempfile.TemporaryDirectory() as fresh:
        try:
            outcome = trials.train(dataclasses.replace(trial, root=Path(fresh)))
        except UsageError as error:
            raise NotCheckable(f"today's trainer cannot train this: {error}{instead}") from None
    need(outcome.result is not None, f"it crashed: {outcome.error}")
    half = float(stdtrit(kept.n - 1, 0.995)) * kept.sd * math.sqrt(1 + 1 / kept.n)
    words = f"{trial.arm.name}, seed {trial.seed}: {outcome.loss:.4f}"
    words += f", the runs that were kept end at {kept.mean:.4f} +- {half:.4f}"
    need(abs(outcome.loss - kept.mean) <= half, words)
    return words
