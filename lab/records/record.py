"""Records: kept evidence that a recipe meets a track's target, in a form that a stranger can check by machine.

    ./run.sh records add --comparison comparisons/cpu-chain-baseline --arm +muon --name muon --why "..."
    ./run.sh records add runs/cpu/mine-s* --name mine --why "..."        check finished runs and keep them as a record
    ./run.sh records verify                                              every rule on every record and report: pass, fail, ...
    ./run.sh records verify cpu/002-modern --rerun                       and train one of its seeds again
    ./run.sh records verify scaling/cpu-modern                           do its statistics follow from its trials?
    ./run.sh records render                                              tables and plots of records/README.md
    ./run.sh records summary runs/cpu/record-s0-1a2b3c4d                 one run beside the track's records

A record is records/<track>/NNN-name/: record.json (lab/record.schema.json says what stands in it), `seedN.log.jsonl` for each
run, README.md. A record needs runs of one recipe at one fixed length, seeds 0, 1, ..., n-1, whose mean loss is at or below the
target with p < 0.01 (one-sided t), and a time below that of the record before it, both timed side by side on one machine.
"""

import argparse
import csv
import json
import math
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optimizers
import tricks
from data.shards import dataset_folder, read_manifest
from engine import schedules
from engine.run_folder import PRESENTATION, atomic_write, settings_hash
from engine.spec import UsageError, nearest
from lab import markdown, stats
from lab.markdown import table
from lab.records import overlap, reports
from lab.trials import DTYPES

RECORDS = Path(__file__).parent.parent.parent / "records"
LARGEST = 300_000  # bytes of a record
ENTRIES = 18_000  # of steps in a record's logs; longer ones keep spans of steps
ALPHA = 0.01
CATEGORIES = ("open", "optimizer")
# Settings that an entry of the `optimizer` category may choose; all others are those of the track with `modern`.
OPTIMIZER_SETTINGS = ("tricks", "recipe", "optimizer", "average", "schedule", "momentum_schedule", "steps", "clip", "compile")
# Settings that no record may choose: they define the track.
FIXED_SETTINGS = ("corpus", "tokenizer", "vocab_size", "val_tokens", "val_spread", "target_loss")


# ---------------------------------------------------------------- logs


def compact(events: Iterable[dict[str, Any]], about: dict[str, Any], spans: int) -> list[dict[str, Any]]:
    """A run's log with the training steps in lines of lists: per span of `spans` steps its mean loss and its seconds.

    about: what the `start` line says of the run: seed, hashes.
    """
    events = list(events)
    start = next((e for e in events if e["event"] == "start"), {})
    lines: list[dict[str, Any]] = [{"event": "start", **about, "utc": start.get("utc")}]
    train = [e for e in events if e["event"] == "train"]
    other = [e for e in events if e["event"] not in ("start", "train")]
    piece: list[dict[str, Any]] = []

    def flush() -> None:
        if piece:
            groups = [piece[i : i + spans] for i in range(0, len(piece), spans)]
            losses = [round(statistics.mean(e["loss"] for e in g), 4) for g in groups]
            times = [float(f"{sum(e['step_time'] for e in g):.5g}") for g in groups]
            lines.append({"event": "train", "first": piece[0]["step"], "last": piece[-1]["step"], "span": spans,
                          "loss": losses, "step_time": times})  # fmt: skip
            piece.clear()

    rest = iter(train)
    upcoming = next(rest, None)
    for e in other:
        while upcoming and upcoming["step"] <= e.get("step", math.inf):
            piece.append(upcoming)
            upcoming = next(rest, None)
        flush()
        lines.append({k: v for k, v in e.items() if k != "tokens"})
    return lines


@dataclass(frozen=True)
class Log:
    """One run as a record keeps it."""

    path: Path

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """
        Raises:
            UsageError: it is missing or a line is no event.
        """
        try:
            found = [json.loads(line) for line in self.path.read_text().splitlines()]
            if not found or any("event" not in e for e in found):
                raise ValueError("a line without an event")
            return found
        except FileNotFoundError:
            raise UsageError(f"{self.path.parent.name} has no {self.path.name}") from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.path.parent.name}/{self.path.name} is damaged: {error}") from None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == kind]

    @property
    def start(self) -> dict[str, Any]:
        return self.events[0] if self.events[0]["event"] == "start" else {}

    @property
    def end(self) -> dict[str, Any]:
        return self.events[-1] if self.events[-1]["event"] == "end" else {}

    @property
    def step_times(self) -> list[float]:
        """Seconds of each span."""
        return [seconds for e in self.of("train") for seconds in e["step_time"]]

    @property
    def train_time(self) -> float:
        return sum(self.step_times)

    def robust_train_time(self, settings: dict[str, Any]) -> float | None:
        """Steps x median step, over the stages with steps of equal work; None where the log has spans of several steps."""
        if any(e["span"] != 1 for e in self.of("train")):
            return None
        stages, batches, period = defaultdict(list), batches_of(settings), optimizers.period(settings["optimizer"])
        for step, seconds in enumerate(self.step_times):
            stages[batches.size(step), step % period].append(seconds)
        return sum(len(times) * statistics.median(times) for times in stages.values())

    @property
    def loss(self) -> float:
        """Of the last validation; inf without one."""
        values = self.of("val")
        return values[-1]["loss"] if values and values[-1]["loss"] is not None else math.inf


@dataclass(frozen=True)
class Record:
    """A folder of records/<track>/."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """record.json.

        Raises:
            UsageError: it is missing or no JSON.
        """
        try:
            return json.loads((self.folder / "record.json").read_text())
        except FileNotFoundError:
            raise UsageError(f"{self.folder} has no record.json") from None
        except ValueError as error:
            raise UsageError(f"{self.folder / 'record.json'} is damaged: {error}") from None

    @property
    def label(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @cached_property
    def logs(self) -> list[Log]:
        return [Log(self.folder / f"seed{seed}.log.jsonl") for seed in self.about["seeds"]]

    @cached_property
    def rival_logs(self) -> list[Log]:
        """The runs that this record was timed against, by seed."""
        against = self.about["against"]
        if against is None:
            return []
        if against["logs"] == "here":
            return [Log(path) for path in sorted(self.folder.glob("against-seed*.log.jsonl"))]
        return Record(self.folder.parent / against["record"]).logs

    @property
    def speed_ratio(self) -> stats.Ratio:
        """Time of the rival over time of this record, paired by seed."""
        own, other = ({log.start["seed"]: log.train_time for log in logs} for logs in (self.logs, self.rival_logs))
        shared = sorted(own.keys() & other.keys())
        if len(shared) < 2:
            raise UsageError(f"{len(shared)} seeds in common with {self.about['against']['record']}: a time ratio needs two")
        return stats.paired_ratio([other[s] for s in shared], [own[s] for s in shared])


def of_track(track: str, category: str | None = None) -> list[Record]:
    """The records of a track, oldest first."""
    found = [Record(path.parent) for path in sorted((RECORDS / track).glob("*/record.json"))]
    return [r for r in found if category in (None, r.about["category"])]


def batches_of(settings: dict[str, Any]) -> schedules.Batches:
    """The batch-size schedule of a run. Records from before there were such are of one size."""
    return schedules.build_batches(settings.get("batch_schedule", "constant"), settings["steps"])


def statistics_of(logs: list[Log], target: float, flops_per_token: float, settings: dict[str, Any]) -> dict[str, Any]:
    """What record.json says of its runs, from their logs alone. Rounded: every figure is compared to the printed digit."""
    losses, times = [log.loss for log in logs], [log.train_time for log in logs]
    sample, clock = stats.Sample.of(losses), stats.Sample.of(times)
    tokens = batches_of(settings).before(logs[0].end["step"]) * settings["batch_tokens"]
    mean = lambda key: statistics.mean(log.end[key] for log in logs)  # noqa: E731
    return {
        "n": sample.n, "mean": round(sample.mean, 5), "sd": round(sample.sd, 5),
        "interval": [round(x, 5) for x in sample.interval()], "p": float(f"{sample.p_above(target):.3g}"),
        "train_time": round(clock.mean, 3), "train_time_sd": round(clock.sd, 3),
        "robust_train_time": round(mean("robust_train_time"), 3), "process_time": round(mean("process_time"), 3),
        "tokens": tokens, "flops": float(f"{tokens * flops_per_token:.5g}"), "peak_memory": round(mean("peak_memory")),
        "stalled": sum(log.train_time > 1.1 * log.end["robust_train_time"] for log in logs),
    }  # fmt: skip


def ratio_of(ratio: stats.Ratio) -> dict[str, Any]:
    """As record.json has it."""
    rounded = {key: float(f"{getattr(ratio, key):.4g}") for key in ("ratio", "low", "high", "p")}
    return {"n": ratio.n, **rounded}


# ---------------------------------------------------------------- adding


def load(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a run folder.

    Raises:
        UsageError: it is missing; a run without result.json has not ended.
    """
    try:
        return json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {name}: not a finished run") from None


@dataclass(frozen=True)
class Finished:
    """A run folder of the trainer."""

    folder: Path
    config: dict[str, Any]
    env: dict[str, Any]
    result: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Finished":
        return cls(folder, *(load(folder, f"{name}.json") for name in ("config", "env", "result")))

    @property
    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.config.items() if k not in (*PRESENTATION, "seed")}

    def log(self, spans: int) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        if not path.exists():
            raise UsageError(f"{self.folder} has no log.jsonl: nothing to keep of this run")
        events = [json.loads(line) for line in path.read_text().splitlines()]
        about = {
            "seed": self.config["seed"], "config": settings_hash(self.config, ("seed",)), "source": self.env["source_sha256"],
            "data": self.env["data_fingerprint"],
        }  # fmt: skip
        lines = compact(events, about, spans)
        if lines[-1]["event"] != "end":
            raise UsageError(f"{path} does not end with an end event: the run was cut off")
        lines[-1] |= {key: round(self.result[key], 4) for key in ("robust_train_time", "process_time", "peak_memory")}
        return lines


def one_experiment(runs: list[Finished], what: str) -> list[Finished]:
    """The runs by seed, checked to be one experiment: seeds 0 .. n-1, equal settings, source, data and machine.

    Raises:
        UsageError: they are not.
    """
    if len(runs) < 2:
        raise UsageError(f"{what}: {len(runs)} run is no evidence: at least two seeds, better five")
    runs = sorted(runs, key=lambda run: run.config["seed"])
    seeds = [run.config["seed"] for run in runs]
    if seeds != list(range(len(runs))):
        raise UsageError(f"{what}: seeds must be 0 to {len(runs) - 1}, each once, so that none was picked; these are {seeds}")
    for name, of in (
        ("settings", lambda r: r.settings),
        ("source code", lambda r: r.env["source_sha256"]),
        ("data", lambda r: r.env["data_fingerprint"]),
        ("machines", machine_of),
        ("software", software_of),
        ("numerics", numerics_of),
    ):
        odd = [run for run in runs if of(run) != of(runs[0])]
        if odd:
            raise UsageError(f"{what}: {odd[0].folder} and {runs[0].folder} have different {name}")
    return runs


def machine_of(run: Finished) -> dict[str, Any]:
    return {key: run.env[key] for key in ("device", "platform", "cpu", "cpu_count", "threads", "gpus", "world_size")}


def software_of(run: Finished) -> dict[str, Any]:
    return {key: run.env[key] for key in ("python", "torch", "cuda")}


def numerics_of(run: Finished) -> dict[str, Any]:
    return {key: run.env[key] for key in ("dtype", "compile")}


def category_problem(settings: dict[str, Any], category: str) -> str:
    """What of these settings the category does not allow; empty if nothing."""
    track = settings["track"]
    fixed = tricks.apply(track, "baseline")[0]
    wrong = [k for k in FIXED_SETTINGS if k in fixed and settings[k] != fixed[k]]
    if wrong:
        return f"{wrong[0]} is {settings[wrong[0]]!r}, the track's is {fixed[wrong[0]]!r}"
    if category == "optimizer":
        modern = tricks.apply(track, "modern")[0]
        free = (*OPTIMIZER_SETTINGS, *FIXED_SETTINGS)
        wrong = [k for k, v in modern.items() if k not in free and settings[k] != v]
        if wrong:
            return f"{wrong[0]} is {settings[wrong[0]]!r}, the `modern` model's is {modern[wrong[0]]!r}"
    return ""


def add(
    folders: list[Path], name: str, why: str, category: str = "open", against: list[str] | None = None, kind: str = "record"
) -> Record:
    """Check finished runs against every rule and keep them as the track's next record.

    Args:
        against: name of the record whose runs these were timed beside, or run folders of it timed anew. Default: the
            newest record of the category.
    Raises:
        UsageError: the rule that is not met; nothing is kept then.
    """
    from lab.records import verify

    runs = one_experiment([Finished.of(folder) for folder in folders], "these runs")
    settings, track = runs[0].settings, runs[0].config["track"]
    if problem := category_problem(settings, category):
        raise UsageError(f"not of category {category} on {track}: {problem}")
    rivals, rival = ([], None) if kind == "baseline" else rival_of(against, track, category)
    number = 1 + max((r.about["number"] for r in of_track(track)), default=0)
    folder = RECORDS / track / f"{number:03d}-{name}"
    folder.mkdir(parents=True)
    try:
        record = write(
            folder, runs, rivals, rival, {"kind": kind, "category": category, "number": number, "name": name, "why": why}
        )
        failed = [v for v in verify.verdicts(record) if v.verdict == "fail"]
        if failed:
            raise UsageError(f"not a record: {failed[0].rule}: {failed[0].words}")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return record


def write(folder: Path, runs: list[Finished], rivals: list[Finished], rival: Record | None, said: dict[str, Any]) -> Record:
    """The files of a record, in an empty folder."""
    settings, env = runs[0].settings, runs[0].env
    spans = math.ceil((len(runs) * settings["steps"] + sum(r.config["steps"] for r in rivals)) / ENTRIES)
    for prefix, group in (("", runs), ("against-", rivals)):
        for run in group:
            lines = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in run.log(spans))
            (folder / f"{prefix}seed{run.config['seed']}.log.jsonl").write_text(lines)
    seeds = [run.config["seed"] for run in runs]
    logs = [Log(folder / f"seed{seed}.log.jsonl") for seed in seeds]
    goal, flops = settings["target_loss"], runs[0].result["flops_per_token"]
    corpus = dataset_folder(runs[0].config["data_root"], settings["corpus"], settings["tokenizer"])
    if (manifest := read_manifest(corpus)) is None:
        raise UsageError(f"{corpus} is not here: the hashes of the data belong to a record")
    about = {
        "format": 1, "track": settings["track"], **said, "date": (logs[-1].end.get("utc") or "unknown")[:10],
        "recipe": ",".join(tricks.spelled_out(settings["track"], settings["tricks"])) or "baseline",
        "settings": settings, "config_sha256": settings_hash(settings),
        "steps": settings["steps"], "seeds": seeds, "target_loss": goal,
        "statistics": statistics_of(logs, goal, flops, settings),
        "machine": machine_of(runs[0]), "versions": software_of(runs[0]), "numerics": numerics_of(runs[0]),
        "commit": env["commit"],
        "source_sha256": env["source_sha256"],
        "data": {"fingerprint": env["data_fingerprint"], "overlap": overlap.count(corpus, settings)}
        | {split: shards(manifest, split) for split in ("train", "val")},
        "against": rival and {"record": rival.folder.name, "logs": "here" if rivals else "there"},
    }  # fmt: skip
    if rivals:
        about["against"]["settings"] = rivals[0].settings
    (folder / "record.json").write_text(json.dumps(about))
    if rival:
        about["against"] |= ratio_of(Record(folder).speed_ratio)
    atomic_write(folder / "record.json", json.dumps(about, indent=1) + "\n")
    (folder / "README.md").write_text(readme(about))
    return Record(folder)


def rival_of(against: list[str] | None, track: str, category: str) -> tuple[list[Finished], Record]:
    """Runs timed anew, if any were given, and the record that they or the record's own runs stand for."""
    before = of_track(track, category)
    if not before:
        raise UsageError(f"{track} has no record to be faster than: add its baseline first, with --kind baseline")
    names = {r.folder.name: r for r in before}
    if against and (Path(against[0]) / "config.json").exists():
        runs = one_experiment([Finished.of(Path(word)) for word in against], "--against")
        same = [r for r in before if of_recipe(runs[0].settings, r.about)]
        if not same:
            raise UsageError("--against: these runs have the settings of no record of this track and category")
        return runs, same[-1]
    word = against[0] if against else before[-1].folder.name
    if word not in names:
        raise UsageError(f"--against {word!r}: no such record: {nearest(word, names)}")
    return [], names[word]


def of_recipe(settings: dict[str, Any], about: dict[str, Any]) -> bool:
    """Are these the settings of a record, by what it knows? It may be older than some; its length and the words for it may be
    others."""
    apart = (*PRESENTATION, "steps", "tricks", "recipe")
    return all(settings.get(key) == value for key, value in about["settings"].items() if key not in apart)


def shards(manifest: dict[str, Any], split: str) -> list[dict[str, Any]]:
    return [{key: entry[key] for key in ("file", "tokens", "sha256")} for entry in manifest["splits"][split]]


def own_flags(about: dict[str, Any]) -> str:
    """What an entry of the `optimizer` category has chosen beside its tricks, as flags; the name of a recipe says the rest."""
    if about["category"] != "optimizer":
        return ""
    settings = about["settings"]
    chosen = {key: settings[key] for key in ("optimizer", "average", "schedule", "momentum_schedule", "clip")}
    return "".join(f" --{key.replace('_', '-')} {value}" for key, value in chosen.items() if value not in ("none", "keep"))


def readme(about: dict[str, Any]) -> str:
    """README.md of a record's folder, all of it from record.json."""
    s, against = about["statistics"], about["against"]
    machine = about["machine"]
    where = machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"# {about['track']} {about['number']:03d}: {about['name']}", "", about["why"], "",
        f"`./run.sh train --track {about['track']} --tricks {about['recipe']}{own_flags(about)} --steps {about['steps']} "
        f"--seed N`, N = 0 to {s['n'] - 1}", "",
        f"- loss: mean {s['mean']:.4f}, sd {s['sd']:.4f}, n = {s['n']}, target {about['target_loss']:g}, p = {s['p']:.2g}",
        f"- time: {s['train_time']:.1f} s (sd {s['train_time_sd']:.1f}), robust {s['robust_train_time']:.1f} s, "
        f"{s['stalled']} stalled; {about['steps']:,} steps, {s['tokens'] / 1e6:.2f}M tokens, {s['peak_memory'] / 1e6:,.0f} MB",
        f"- machine: {where}, {DTYPES[about['numerics']['dtype']]}, torch {about['versions']['torch']}, "
        f"commit {(about['commit'] or 'unknown')[:12]}",
    ]  # fmt: skip
    if against:
        lines.append(f"- against {against['record']} on the same machine, by turns: {against['ratio']:.3g}x "
                     f"({against['low']:.3g}-{against['high']:.3g}), n = {against['n']} pairs")  # fmt: skip
    return "\n".join([*lines, "", "Checked by `./run.sh records verify`. Generated from record.json.", ""])


# ---------------------------------------------------------------- showing


def gains(found: list[Record]) -> list[stats.Ratio]:
    """Baseline over each of a track's records: the product of the ratios down to it, each timed by turns, with the interval
    that the pairs of all of them leave."""
    steps: dict[str, list[tuple[float, float, int]]] = {}
    for record in found:
        steps[record.folder.name] = []
        if against := record.about["against"]:
            own = record.speed_ratio
            part = math.log(against["ratio"]), own.sd / math.sqrt(own.n), own.n - 1
            steps[record.folder.name] = [*steps[against["record"]], part]
    return [stats.product(parts) for parts in steps.values()]


def history(track: str, category: str, root: str = "") -> str:
    """The table of a track's records; `root`: the way to records/ from the document that it stands in."""
    rows, found = [], of_track(track, category)
    for record, total in zip(found, gains(found), strict=True):
        about = record.about
        s, against = about["statistics"], about["against"]
        gain = f"{against['ratio']:.3g}x ({against['low']:.3g}-{against['high']:.3g})" if against else "-"
        whole = f"{total.ratio:.3g}x" + (f" ({total.low:.3g}-{total.high:.3g})" if against else "")
        rows.append((
            f"[{about['number']:03d}]({root}{track}/{record.folder.name}/README.md)", about["name"], f"{about['steps']:,}",
            f"{s['train_time']:,.1f}", DTYPES[about["numerics"]["dtype"]], whole, gain, f"{s['mean']:.4f} ({s['sd']:.4f})",
            f"{s['n']}, {s['p']:.1g}", about["date"],
        ))  # fmt: skip
    if not rows:
        return "None yet."
    head = (
        "record",
        "what",
        "steps",
        "time, s",
        "dtype",
        "baseline / this",
        "before / this, by turns",
        "loss, mean (sd)",
        "n, p",
        "date",
    )
    return table(head, rows)


def published() -> dict[str, str]:
    """The speedrun's own history and its optimizer track, from records/published/."""
    read = lambda name: list(csv.DictReader((RECORDS / "published" / name).open(newline="")))  # noqa: E731
    short = [r for r in read("modded_records.csv") if r["record"].startswith("T1-") and r["train_time_s"]]
    rows = [
        (
            r["record"][3:],
            r["description"],
            f"{int(r['steps']):,}",
            f"{float(r['train_time_s']):,.1f}",
            r["final_val_loss"],
            r["date"],
        )
        for r in short
    ]
    entries = [r for r in read("modded_track3.csv") if r["was_record"] == "True"]
    steps = [(r["result"], r["description"], f"{int(r['steps_to_target']):,}", r["readme_n"], r["date"]) for r in entries]
    return {
        "published records": table(("record", "what", "steps", "time, s", "loss of one run", "date"), rows),
        "published optimizers": table(("result", "what", "steps to 3.28", "n", "date"), steps),
    }


def tables() -> dict[str, str]:
    """Marker name -> table of records/README.md."""
    shown = [(track, c) for track in tricks.TRACKS for c in CATEGORIES if track == "cpu" or of_track(track, c)]
    return {f"{track} {category}": history(track, category) for track, category in shown} | published()


def render() -> list[str]:
    """Write the tables and pictures of records/README.md; returns what was written."""
    from lab import plots

    path = RECORDS / "README.md"
    atomic_write(path, markdown.filled(path.read_text(), tables(), str(path)))
    written = [str(path.name)]
    for track in tricks.TRACKS:
        if found := of_track(track, "open"):
            written += [f"{plots.history(RECORDS, track, [r.about for r in found], gains(found))}.png"]
    return written


def summary(run: Path) -> str:
    """What a person wants to know of a finished run, beside the track's first and newest record."""
    done = Finished.of(run)
    config, result = done.config, done.result
    kept = of_track(config["track"], "open")
    columns = [(f"{r.folder.name} (n = {r.about['statistics']['n']})", r.about) for r in dict.fromkeys((*kept[:1], *kept[-1:]))]
    number = lambda v, form, unit="": "-" if v is None else format(v, form) + unit  # noqa: E731
    rows = [("", "this run", *(name for name, _ in columns))]
    for label, key, form, unit in (
        ("validation loss", "val_loss", ".4f", " nats"),
        ("steps", "steps", ",.0f", ""),
        ("tokens", "tokens", ",.0f", ""),
        ("training time", "train_time", ".1f", " s"),
        ("CPU time", "process_time", ".1f", " s"),
        ("peak memory", "peak_memory", ",.0f", " bytes"),
    ):
        others = [a["statistics"].get("mean" if key == "val_loss" else key, a.get(key)) for _, a in columns]
        rows.append((label, *(number(v, form, unit) for v in (result[key], *others))))
    rows.append(("tokens per second", number(result["tokens_per_second"], ",.0f"), *("" for _ in columns)))
    rows.append(("MFU", number(result["mfu"], ".1%"), *("" for _ in columns)))
    target = result["target_loss"]
    verdict = f"target {target:g} {'reached' if result['target_reached'] else 'NOT reached'}" if target else "no target"
    head = f"{config['track']} track, recipe {config['recipe']}, seed {config['seed']} on {done.env['cpu']}: {verdict}"
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join((r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True)))) for r in rows]
    if columns:
        lines.append("Times of records are those of the machine that ran them; for a fair ratio: ./run.sh compare")
    return "\n".join([head, *lines])


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="records", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    adder = verbs.add_parser("add", help="keep finished runs as the track's next record")
    adder.add_argument("runs", type=Path, nargs="*", help="run folders, one a seed")
    adder.add_argument("--comparison", type=Path, metavar="FOLDER", help="take the runs from a comparison: needs --arm")
    adder.add_argument("--arm", help="arm of the comparison whose confirming runs become the record")
    adder.add_argument("--against-arm", metavar="ARM", help="arm of the comparison that is a record, timed by turns with it")
    adder.add_argument("--name", required=True, help="short name in lower case")
    adder.add_argument("--why", required=True, help="what is new and why it pays, a sentence or two")
    adder.add_argument("--category", choices=CATEGORIES, default="open", help="optimizer: on the fixed `modern` model")
    adder.add_argument("--against", nargs="+", help="record, or run folders of it, timed beside these (default: the newest)")
    adder.add_argument("--kind", choices=("record", "baseline"), default="record", help="baseline: what the track starts from")
    checker = verbs.add_parser("verify", help="check records and reports; exit code 2 if a rule is broken")
    checker.add_argument(
        "records", nargs="*", metavar="TRACK/NNN-NAME", help="or comparisons/NAME, scaling/NAME (default: all)"
    )
    checker.add_argument("--rerun", action="store_true", help="also train one seed again and compare")
    verbs.add_parser("render", help="rewrite the tables and plots of records/README.md")
    verbs.add_parser("summary", help="one run beside the track's records").add_argument("run", type=Path)
    return made


def runs_of(folder: Path, arm: str) -> list[Path]:
    """Run folders of the confirming runs of an arm of a comparison.

    Raises:
        UsageError: no comparison, no such arm, or an arm without confirming runs.
    """
    from lab import trials
    from lab.comparison import read_rows

    try:
        steps = {a["name"]: a["steps"] for a in load(folder, "comparison.json")["arms"]}
        rows = read_rows(folder / "trials.csv")
    except (UsageError, FileNotFoundError):
        raise UsageError(f"{folder} holds no comparison") from None
    if arm not in steps:
        raise UsageError(f"{folder} has no arm {arm!r}: {nearest(arm, steps)}")
    track = load(folder, "comparison.json")["track"]
    found = [r for r in rows if r.arm == arm and r.phase == "confirm" and r.steps == steps[arm]]
    if not found:
        raise UsageError(f"arm {arm!r} of {folder} has no confirming runs")
    return [trials.RUNS / "runs" / track / r.run for r in found]


def named_runs(options: argparse.Namespace) -> tuple[list[Path], list[str] | None]:
    """Run folders of the record and what it is against, as the command line says."""
    if bool(options.runs) == bool(options.comparison):
        raise UsageError("add what? run folders, or --comparison FOLDER --arm ARM")
    if not options.comparison:
        return options.runs, options.against
    if not options.arm:
        raise UsageError("--comparison needs --arm: which of its arms becomes the record?")
    rival = [str(run) for run in runs_of(options.comparison, options.against_arm)] if options.against_arm else options.against
    return runs_of(options.comparison, options.arm), rival


def chosen(names: list[str]) -> Iterator[Record | reports.Report]:
    """Records and reports by their labels; all where none is named.

    Raises:
        UsageError: there is none of that name.
    """
    found = [r for track in sorted(RECORDS.iterdir()) if track.is_dir() for r in of_track(track.name)]
    everything = {kept.label: kept for kept in (*found, *reports.kept(RECORDS))}
    for name in names or everything:
        if name.rstrip("/").removeprefix("records/") not in everything:
            raise UsageError(f"no record {name!r}: {nearest(name, everything)}")
        yield everything[name.rstrip("/").removeprefix("records/")]


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    try:
        if options.verb == "add":
            runs, against = named_runs(options)
            print(add(runs, options.name, options.why, options.category, against, options.kind).folder)
        elif options.verb == "verify":
            from lab.records import verify

            return verify.report(list(chosen(options.records)), options.rerun)
        elif options.verb == "render":
            print("\n".join(f"wrote records/{name}" for name in render()))
        else:
            print(summary(options.run))
        return 0
    except UsageError as error:
        print(f"records: {error}", file=sys.stderr)
        return 2
