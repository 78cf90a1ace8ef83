"""A record: evidence that a recipe meets a track's target, in a form that a stranger can check by machine.

A record is a folder records/<track>/NNN-name/: record.json (see record.schema.json), `seedN.log.jsonl` of each run, README.md.
Here is what it says and how it is written; what it must keep is in rules.py.
"""

import contextlib
import json
import math
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import optimizers
import tricks
from config import Config, flag_of, only
from data.shards import dataset_folder, read_manifest
from engine.run_folder import PRESENTATION, read_json, settings_hash
from engine.schedules import NO_RATES, Course
from engine.spec import UsageError
from lab import comparison, stats, trials
from lab.records.overlap import SETTINGS, repeats
from layers.shape import ModelConfig
from model import GPT, roles

RECORDS = Path(__file__).parents[2] / "records"
LEFT = {"cpu": (3, 4, 5, 6, 7, 8, 11)}  # numbers of records that are gone: records/lessons.md
OWN = "optimizer.py"  # in a record's folder: the file of an optimizer of one's own
STALLED = 1.1  # train time over robust time
LOGGED_STEPS = 18_000  # in a record's logs; longer ones keep spans of steps
SPECS = ("optimizer", "outer", "average", "schedule", "decay_schedule", "momentum_schedule")  # settings that may name code
CATEGORIES = ("gpt", "optimizer")  # and `open`, which takes no new record: any model, tables without a transformer too
FACTS = {  # what a record keeps of its runs' env.json
    "machine": ("device", "platform", "cpu", "cpu_count", "threads", "gpus", "world_size"),
    "versions": ("python", "torch", "cuda"),
    "numerics": ("dtype", "compile"),
}


class Log:
    """The log of one run as a record keeps it (`compact`). Raises UsageError: the file is missing or a line is no event."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.events = [json.loads(line) for line in path.read_text().splitlines()]
            first, last, train, val = self.events[0], self.events[-1], self.of("train"), self.of("val")
            self.start: dict[str, Any] = first if first["event"] == "start" else {}
            self.end: dict[str, Any] = last if last["event"] == "end" else {}
            self.losses = [loss for e in train for loss in e["loss"]]  # of each span of steps
            self.step_times = [seconds for e in train for seconds in e["step_time"]]
            self.loss = math.inf if not val or val[-1]["loss"] is None else val[-1]["loss"]  # of the last validation
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UsageError(f"{path.parent.name}/{path.name} is damaged: {error!r}") from None
        self.own = {"losses": str(self.losses), "times": str(self.step_times)}  # what no two runs have in common
        self.train_time = sum(self.step_times)
        self.ended: str | None = self.end.get("utc")  # None in logs from before they kept the time of day

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == kind]

    def robust_train_time(self, settings: dict[str, Any]) -> float | None:
        """Steps x median step, summed over groups of steps of equal work; None where the log has spans of several steps."""
        if any(e["span"] != 1 for e in self.of("train")):
            return None
        groups, course, period = defaultdict(list), Course(config_of(settings)), optimizers.period(settings["optimizer"])
        for step, seconds in enumerate(self.step_times):
            groups[course.at(step).batch, step % period].append(seconds)
        return sum(len(times) * statistics.median(times) for times in groups.values())


@dataclass(frozen=True)
class Kept:
    """What is kept in a folder of records/."""

    folder: Path

    @property
    def label(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


class Record(Kept):
    """A folder of records/<track>/."""

    @cached_property
    def about(self) -> dict[str, Any]:
        """record.json. UsageError: it is damaged."""
        return read_json(self.folder / "record.json")

    @cached_property
    def logs(self) -> list[Log]:
        return [Log(self.folder / f"seed{seed}.log.jsonl") for seed in self.about["seeds"]]

    @cached_property
    def rival(self) -> "Record":
        """The record that this one was timed against."""
        return Record(self.folder.parent / self.about["against"]["record"])

    @cached_property
    def timed_anew(self) -> list[Log]:
        """Runs of the rival that were trained anew beside this record's own and are kept with it."""
        here = (self.about["against"] or {}).get("logs") == "here"
        return [Log(path) for path in sorted(self.folder.glob("against-seed*.log.jsonl"))] if here else []

    @property
    def all_logs(self) -> list[Log]:
        return [*self.logs, *self.timed_anew]

    @property
    def rival_logs(self) -> list[Log]:
        return self.timed_anew or self.rival.logs

    @property
    def pairs(self) -> list[tuple[Log, Log]]:
        """Its runs, each with the rival's run of the same seed."""
        rivals = {log.start["seed"]: log for log in self.rival_logs}
        return [(log, rivals[seed]) for log in self.logs if (seed := log.start["seed"]) in rivals]

    @property
    def speed_ratio(self) -> stats.Ratio:
        """Time of the rival over time of this record."""
        return stats.paired_ratio([log.train_time for _, log in self.pairs], [log.train_time for log, _ in self.pairs])


def of_track(track: str, category: str | None = None) -> list[Record]:
    """The records of a track, oldest first, without damaged ones: each is judged on its own. The category `gpt` begins with the
    baseline with which `open` began."""
    records = []
    for path in sorted((RECORDS / track).glob("*/record.json")):
        with contextlib.suppress(UsageError):
            read_json(path)
            records.append(Record(path.parent))
    wanted = [(category, "record"), (category, "baseline"), ("open" if category == "gpt" else category, "baseline")]
    return [r for r in records if category is None or (r.about.get("category"), r.about.get("kind")) in wanted]


def previous(track: str, category: str, number: float = math.inf) -> Record | None:
    """The newest record of a category below a number: what the next one must be faster than."""
    return next((r for r in reversed(of_track(track, category)) if r.about["number"] < number), None)


def next_number(track: str) -> int:
    """Numbers are given once: those of records that left are not given again."""
    return 1 + max((0, *LEFT.get(track, ()), *(r.about["number"] for r in of_track(track))))


def config_of(settings: dict[str, Any]) -> Config:
    """A run's settings, without the schedules of rates: these may name code, and a record may be a stranger's."""
    return Config(**only(Config, settings) | NO_RATES)


def parameters(settings: dict[str, Any]) -> dict[str, int]:
    """Number of a model's parameters by role (model.roles)."""
    with torch.device("meta"):
        gpt = GPT(ModelConfig(**only(ModelConfig, settings)))
    role, counts = roles(gpt), Counter()
    for name, p in gpt.named_parameters():
        counts[role[name]] += p.numel()
    return dict(counts)


@dataclass(frozen=True)
class FinishedRun:
    """A run folder of the trainer."""

    folder: Path
    config: dict[str, Any]
    env: dict[str, Any]
    result: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """UsageError: a file is damaged or missing; a run without result.json has not ended."""
        try:
            return cls(folder, *(read_json(folder / f"{name}.json") for name in ("config", "env", "result")))
        except FileNotFoundError as error:
            raise UsageError(f"{folder} has no {Path(error.filename).name}: not a finished run") from None

    @property
    def facts(self) -> dict[str, Any]:
        """What the runs of one experiment have in common, under the names of record.json."""
        settings = {k: v for k, v in self.config.items() if k not in (*PRESENTATION, "seed")}
        made = {"source_sha256": self.env["source_sha256"], "data": {"fingerprint": self.env["data_fingerprint"]}}
        return {"settings": settings} | made | {part: {key: self.env[key] for key in keys} for part, keys in FACTS.items()}

    def log(self, span: int) -> str:
        """The log as a record keeps it. UsageError: it does not end."""
        path, facts = self.folder / "log.jsonl", self.facts
        about = {"seed": self.config["seed"], "config": settings_hash(facts["settings"])}
        about |= {"source": facts["source_sha256"], "data": facts["data"]["fingerprint"]}
        events = compact(map(json.loads, trials.whole_lines(path).splitlines()), about, span)
        if not events or events[-1]["event"] != "end":
            raise UsageError(f"{path} does not end with an end event: the run was cut off")
        events[-1] |= {key: round(self.result[key], 4) for key in ("robust_train_time", "process_time", "peak_memory")}
        events[-1]["val_also"] = {word: round(loss, 5) for word, loss in self.result.get("val_also", {}).items()}
        return "".join(json.dumps(e, separators=(",", ":")) + "\n" for e in events)


def compact(events: Iterable[dict[str, Any]], about: dict[str, Any], span: int) -> list[dict[str, Any]]:
    """A run's log with its training steps between other events as one line of lists: per span of so many steps the mean loss
    and the sum of seconds. about: what the `start` line says of the run: seed, hashes."""
    lines: list[dict[str, Any]] = []
    for kind, group in groupby(events, lambda e: e["event"]):
        steps = list(group)
        if kind == "start":
            steps = [{"event": "start", **about, "utc": e.get("utc")} for e in steps]
        if kind == "train":
            spans = [steps[i : i + span] for i in range(0, len(steps), span)]
            made = {"event": "train", "first": steps[0]["step"], "last": steps[-1]["step"], "span": span}
            made["loss"] = [round(statistics.mean(s["loss"] for s in some), 4) for some in spans]
            made["step_time"] = [float(f"{sum(s['step_time'] for s in some):.5g}") for some in spans]
            steps = [made]
        lines += [{key: value for key, value in e.items() if key != "tokens"} for e in steps]
    return lines


def write(folder: Path, runs: list[FinishedRun], anew: list[FinishedRun], rival: Record | None, said: dict[str, Any]) -> Record:
    """Write a record's files into an empty folder. runs: by seed. anew: the rival's, interleaved; else its own logs count."""
    facts, config = runs[0].facts, runs[0].config
    settings, goal, seeds = facts["settings"], config["target_loss"], [run.config["seed"] for run in runs]
    corpus = dataset_folder(config["data_root"], config["corpus"], config["tokenizer"])
    if (manifest := read_manifest(corpus)) is None:
        raise UsageError(f"{corpus} is not here: the hashes of the data belong to a record")
    span = math.ceil(sum(run.config["steps"] for run in (*runs, *anew)) / LOGGED_STEPS)
    for prefix, group in (("", runs), ("against-", anew)):
        for run in group:
            (folder / f"{prefix}seed{run.config['seed']}.log.jsonl").write_text(run.log(span))
    if "optimizer_code" in settings:
        keep_optimizer(Path(settings["optimizer"].partition(":")[0]), folder)
    logs = [Log(folder / f"seed{seed}.log.jsonl") for seed in seeds]
    about = {"format": 1, "track": config["track"], **said, "date": (logs[-1].ended or "unknown")[:10]}
    about |= {"recipe": ",".join(tricks.spelled_out(config["track"], config["tricks"])) or "baseline", **facts}
    about |= {"config_sha256": settings_hash(settings), "steps": config["steps"], "seeds": seeds, "target_loss": goal}
    about |= {"statistics": outcome(logs, goal) | work(settings, runs[0].result["flops_per_token"])}
    about |= {"commit": runs[0].env["commit"], "parameters": parameters(settings)}
    about["data"] |= {split: shards(manifest, split) for split in ("train", "val")}
    count, places = config["val_tokens"] // config["sequence_length"], repeats(corpus, *(settings[key] for key in SETTINGS))
    about["data"]["overlap"] = {"sequences": count, "in_train": len(places)}
    about["against"] = rival and {"record": rival.folder.name, "logs": "here" if anew else "there"}
    if anew:
        about["against"]["settings"] = anew[0].facts["settings"]
    (folder / "record.json").write_text(json.dumps(about))
    if rival:
        about["against"] |= rounded(Record(folder).speed_ratio)
    (folder / "record.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "README.md").write_text(readme(about))
    return Record(folder)


def keep_optimizer(file: Path, folder: Path) -> None:
    """Raises UsageError: the file of the optimizer that ran is not here any more."""
    try:
        (folder / OWN).write_bytes(file.read_bytes())
    except OSError as error:
        raise UsageError(f"a record keeps its optimizer's file, and {file} cannot be read: {error.strerror}") from None


def outcome(logs: list[Log], target: float) -> dict[str, Any]:
    """Losses and times in record.json, from the logs alone. Rounded: every figure is compared to the printed digit."""
    losses, times = stats.Sample.of([log.loss for log in logs]), stats.Sample.of([log.train_time for log in logs])
    made = {"n": losses.n, "mean": round(losses.mean, 5), "sd": round(losses.sd, 5)}
    made |= {"interval": [round(x, 5) for x in losses.interval()], "p": float(f"{losses.p_above(target):.3g}")}
    made |= {"train_time": round(times.mean, 3), "train_time_sd": round(times.sd, 3)}
    for key, digits in (("robust_train_time", 3), ("process_time", 3), ("peak_memory", None)):
        made[key] = round(statistics.mean(log.end[key] for log in logs), digits)
    also = [log.end.get("val_also", {}) for log in logs]
    if words := set.intersection(*map(set, also)):
        made["also"] = {word: round(statistics.mean(losses[word] for losses in also), 5) for word in sorted(words)}
    return made | {"stalled": sum(log.train_time > STALLED * log.end["robust_train_time"] for log in logs)}


def work(settings: dict[str, Any], flops_per_token: float) -> dict[str, Any]:
    """Tokens and FLOPs in record.json."""
    tokens = Course(config_of(settings)).units_before(settings["steps"]) * settings["batch_tokens"]
    return {"tokens": tokens, "flops": float(f"{tokens * flops_per_token:.5g}")}


def rounded(ratio: stats.Ratio) -> dict[str, Any]:
    """A time ratio as record.json has it."""
    return {"n": ratio.n} | {key: float(f"{getattr(ratio, key):.4g}") for key in ("ratio", "low", "high", "p")}


def shards(manifest: dict[str, Any], split: str) -> list[dict[str, Any]]:
    return [{key: entry[key] for key in ("file", "tokens", "sha256")} for entry in manifest["splits"][split]]


def command_of(about: dict[str, Any]) -> str:
    """The command that trains a record's runs. An entry of the `optimizer` category chose more than its tricks."""
    words = ["./run.sh", "train", "--track", about["track"], "--tricks", about["recipe"]]
    if about["category"] == "optimizer":
        for key in (*SPECS, "clip"):
            value = str(about["settings"].get(key, "none"))
            says = value not in ("none", "keep") and (key, value) != ("decay_schedule", "constant")
            words += [flag_of(key), value] * says
    return shlex.join([*words, "--steps", str(about["steps"]), "--seed", "N"])


def readme(about: dict[str, Any]) -> str:
    """README.md of a record's folder, all of it from record.json."""
    s, against, machine = about["statistics"], about["against"], about["machine"]
    where = machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"# {about['track']} {about['number']:03d}: {about['name']}", "", about["why"], "",
        f"`{command_of(about)}`, N = 0 to {s['n'] - 1}", "",
        f"- loss: mean {s['mean']:.4f}, sd {s['sd']:.4f}, n = {s['n']}, target {about['target_loss']:g}, p = {s['p']:.2g}",
        f"- time: {s['train_time']:.1f} s (sd {s['train_time_sd']:.1f}), robust {s['robust_train_time']:.1f} s, "
        f"{s['stalled']} stalled; {about['steps']:,} steps, {s['tokens'] / 1e6:.2f}M tokens, {s['peak_memory'] / 1e6:,.0f} MB",
        f"- machine: {where}, {trials.DTYPES[about['numerics']['dtype']]}, torch {about['versions']['torch']}, "
        f"commit {(about['commit'] or 'unknown')[:12]}",
    ]  # fmt: skip
    if counts := about.get("parameters"):
        by_role = ", ".join(f"{role} {count:,}" for role, count in counts.items())
        lines.append(f"- model: {sum(counts.values()) / 1e6:.2f}M parameters: {by_role}")
    if also := s.get("also"):
        lines.append("- loss elsewhere: " + ", ".join(f"`{word}` {loss:.4f}" for word, loss in also.items()))
    if against:
        where = f"interleaved on the same machine, n = {against['n']} pairs"
        lines.append(f"- {comparison.ratio_words(against)} as fast as {against['record']}, {where}")
    return "\n".join([*lines, "", "Checked by `./run.sh records verify`. Generated from record.json.", ""])
