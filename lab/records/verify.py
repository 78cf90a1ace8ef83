"""The rules that a record or a report must keep, each checked by machine: pass, fail, or not checkable here with the reason.

After the nine points of what goes wrong in published records: picked seeds, statistics that do not follow from the logs,
validation text in the training data, clocks that do not add up, models that look ahead.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

import train_gpt
import tricks
from data.shards import dataset_folder, read_manifest
from data.shards import verify as verify_shards
from engine import run_folder
from engine.spec import UsageError
from engine.spec import split as split_spec
from lab import comparison, trials
from lab.records import overlap
from lab.records import record as records
from lab.records.record import ALPHA, LARGEST, Record
from lab.records.reports import Report, difference
from lab.runner import read_curves
from model import GPT, ModelConfig

SCHEMA = Path(__file__).with_name("record.schema.json")
MOST_OVERLAP = 0.02  # of the validation sequences; a corpus quotes itself, by nature, and a leak is of whole documents


@dataclass(frozen=True)
class Verdict:
    rule: str
    verdict: str  # pass, fail or not checkable
    words: str


class Broken(Exception):
    """A rule is broken; its text says how."""


class NotCheckable(Exception):
    """A rule cannot be checked here; its text says why."""


def need(condition: bool, words: str) -> None:
    if not condition:
        raise Broken(words)


# ---------------------------------------------------------------- the rules; each returns what it saw


def files(record: Record) -> str:
    """Every file is expected, none is missing, all are small, none names a path of the machine."""
    expected = {"record.json", "README.md", *(log.path.name for log in record.logs)}
    against = record.about["against"]
    there = {path.name for path in record.folder.iterdir()}
    if against and against["logs"] == "here":
        expected |= {name for name in there if re.fullmatch(r"against-seed\d+\.log\.jsonl", name)}
    need(not expected - there, f"missing: {', '.join(sorted(expected - there))}")
    need(not there - expected, f"not part of a record: {', '.join(sorted(there - expected))}")
    size = sum(path.stat().st_size for path in record.folder.iterdir())
    need(size <= LARGEST, f"{size:,} bytes, more than {LARGEST:,}")
    pathless(path.read_text() for path in record.folder.iterdir())
    need((record.folder / "README.md").read_text() == records.readme(record.about), "README.md is not what record.json gives")
    return f"{len(there)} files, {size / 1000:,.0f} kB"


def schema(record: Record) -> str:
    """record.json has the fields and types of lab/record.schema.json, and its folder's name."""
    import jsonschema

    errors = sorted(jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(record.about), key=str)
    need(not errors, f"{errors[0].json_path}: {errors[0].message}" if errors else "")
    about = record.about
    label = f"{about['track']}/{about['number']:03d}-{about['name']}"
    need(record.label == label, f"the folder is {record.label}, record.json says {label}")
    return f"format {about['format']}"


def seeds(record: Record) -> str:
    """Seeds 0 .. n-1, declared, logged at the start of each run, all there: none was picked or dropped."""
    declared = record.about["seeds"]
    need(
        declared == list(range(len(declared))), f"seeds {declared} are not 0 to {len(declared) - 1}: one was dropped or picked"
    )
    for log, seed in zip(record.logs, declared, strict=True):
        need(log.start.get("seed") == seed, f"{log.path.name} is of seed {log.start.get('seed')}")
    return f"0 to {len(declared) - 1}"


def distinct(record: Record) -> str:
    """No two logs are of one run."""
    seen: dict[str, str] = {}
    for log in kept_logs(record):
        content = json.dumps([e["loss"] for e in log.of("train")])
        need(content not in seen, f"{log.path.name} and {seen.get(content)} are the same run")
        times = json.dumps(log.step_times)
        need(times not in seen, f"{log.path.name} and {seen.get(times)} have the same times")
        seen[content] = seen[times] = log.path.name
    return f"{len(record.logs)} runs"


def configuration(record: Record) -> str:
    """All runs had the settings, source and data that record.json states, by their hashes."""
    about = record.about
    expected = run_folder.settings_hash(about["settings"])
    need(about["config_sha256"] == expected, "config_sha256 is not the hash of the settings: one of them was changed")
    for log in record.logs:
        for key, value in (("config", expected), ("source", about["source_sha256"]), ("data", about["data"]["fingerprint"])):
            need(log.start.get(key) == value, f"{log.path.name} was made with another {key} than record.json states")
    for key in ("steps", "target_loss"):
        need(about[key] == about["settings"][key], f"{key} {about[key]} is not that of the settings")
    return f"config {expected[:8]}, source {about['source_sha256'][:8]}"


def stopping(record: Record) -> str:
    """Every run ended at the one fixed length, whatever its own loss was."""
    about = record.about
    need(not about["settings"]["stop_at_target"], "the runs stopped by their own validation loss")
    for log in record.logs:
        end, train = log.end, log.of("train")
        need(bool(end) and end["status"] == "ok", f"{log.path.name} has no end, or did not end well")
        need(end["step"] == about["steps"], f"{log.path.name} ended at step {end['step']} of {about['steps']}")
        need(
            bool(log.of("val")) and log.of("val")[-1]["step"] == about["steps"], f"{log.path.name} was not validated at its end"
        )
        counted = [(e["first"], e["last"], len(e["loss"]), len(e["step_time"]), e["span"]) for e in train]
        need(
            counted[0][0] == 1 and counted[-1][1] == about["steps"],
            f"{log.path.name} does not hold steps 1 to {about['steps']}",
        )
        for (first, last, losses, times, span), following in zip(counted, [*counted[1:], None], strict=True):
            need(
                losses == times == math.ceil((last - first + 1) / span),
                f"{log.path.name}: steps {first} to {last} are not all there",
            )
            need(following is None or following[0] == last + 1, f"{log.path.name}: steps are missing after {last}")
    return f"{about['steps']:,} steps"


def numbers(record: Record) -> str:
    """The statistics follow from the logs, to the printed digit."""
    about = record.about
    config = model_config(record)
    settings = about["settings"]
    run = train_gpt.Config(**{f.name: settings[f.name] for f in fields(train_gpt.Config) if f.name in settings})
    flops = train_gpt.mean_flops(run, config)
    found = records.statistics_of(record.logs, about["target_loss"], flops, settings)
    for key, value in found.items():
        need(about["statistics"][key] == value, f"{key} is {about['statistics'][key]}, the logs give {value}")
    return f"n = {found['n']}, mean {found['mean']:.4f}, sd {found['sd']:.4f}, p = {found['p']:.2g}"


def target(record: Record) -> str:
    """The mean loss is below the target with p < 0.01; a baseline's, by which a target may be set, is not above it."""
    s, goal = record.about["statistics"], record.about["target_loss"]
    if record.about["kind"] == "baseline":
        need(s["mean"] <= goal, f"the baseline's mean {s['mean']} is above the target {goal:g}")
        return f"baseline: mean {s['mean']:.4f} <= {goal:g}"
    need(s["p"] < ALPHA, f"p = {s['p']:.2g} that the mean is at or above {goal:g}: {ALPHA} is the limit")
    return f"p = {s['p']:.2g} < {ALPHA}"


def faster(record: Record) -> str:
    """Less time than the record before, paired by seed, on the same machine within the same hour."""
    about, against = record.about, record.about["against"]
    if about["kind"] == "baseline":
        return "baseline: nothing before it"
    need(against is not None, "timed against nothing")
    path = record.folder.parent / against["record"] / "record.json"
    need(path.exists(), f"the record it was timed against is not there: {against['record']}")
    rival = json.loads(path.read_text())
    if against["logs"] == "there":
        for key in ("machine", "versions", "source_sha256"):
            need(rival[key] == about[key], f"{against['record']} was timed with another {key.removesuffix('_sha256')}")
    found = records.ratio_of(record.speed_ratio)
    for key, value in found.items():
        need(against[key] == value, f"against {key} is {against[key]}, the logs give {value}")
    need(found["low"] > 1, f"{found['ratio']:.3g}x ({found['low']:.3g}-{found['high']:.3g}): the interval holds 1, or slower")
    apart = hours_apart(record)
    need(apart <= comparison.MOST_APART, f"a run and its pair lie {apart:.1f} hours apart: time both by turns, within the hour")
    return f"{found['ratio']:.3g}x ({found['low']:.3g}-{found['high']:.3g}), pairs at most {apart * 60:.0f} min apart"


def rival(record: Record) -> str:
    """The runs that it was timed against are the rival record's: on the same seeds, by the same source and data, with the
    rival's settings, and no longer than the rival is."""
    about, against = record.about, record.about["against"]
    if against is None:
        return "none"
    other, logs = Record(record.folder.parent / against["record"]).about, record.rival_logs
    ran = sorted(log.start.get("seed") for log in logs)
    need(ran == about["seeds"], f"the rival ran on seeds {ran}, the record on {about['seeds']}: a pair is of one seed")
    if against["logs"] == "there":
        return f"{against['record']}, its own runs"
    config, steps, own = logs[0].start["config"], logs[0].end["step"], "the record's own runs"
    same = (("source", about["source_sha256"], own), ("data", about["data"]["fingerprint"], own),
            ("config", config, logs[0].path.name))  # fmt: skip
    for log in logs:
        for key, value, whose in same:
            need(log.start.get(key) == value, f"{log.path.name} was made with another {key} than {whose}")
        need((log.end.get("status"), log.end.get("step")) == ("ok", steps), f"{log.path.name} did not end well at step {steps}")
    need(steps <= other["steps"], f"the rival ran for {steps} steps, as a record for {other['steps']}: longer is slower")
    settings = against.get("settings")
    if settings is None:  # of a record from before those of the rival were kept with it
        if other["settings"].keys() != about["settings"].keys():
            raise NotCheckable("between the rival's record and its runs here the trainer gained settings: other hashes")
        settings = other["settings"] | {"steps": steps}
    need(
        records.of_recipe(settings, other) and run_folder.settings_hash(settings) == config,
        f"the runs that it was timed against have other settings than {against['record']}",
    )
    return f"{against['record']}, {steps:,} of its {other['steps']:,} steps"


def hours_apart(record: Record) -> float:
    """The longest pause between a run and its pair: from the end of the one to the start of the other.

    Raises:
        NotCheckable: the logs do not tell the time of day.
    """
    rivals = {log.start["seed"]: log for log in record.rival_logs}
    longest = 0.0
    for log in record.logs:
        other = rivals.get(log.start["seed"])
        if other is None:
            continue
        times = [log.start.get("utc"), log.end.get("utc"), other.start.get("utc"), other.end.get("utc")]
        if None in times:
            raise NotCheckable("the logs are from before they kept the time of day")
        start, end, other_start, other_end = map(comparison.moment, times)
        longest = max(longest, (max(start, other_start) - min(end, other_end)).total_seconds() / 3600)
    return longest


def clock(record: Record) -> str:
    """Times are positive, grow, and add up, the rival's too; stalls are counted."""
    for log in kept_logs(record):
        times, name = log.step_times, log.path.name
        need(min(times) > 0, f"{name}: a step took no time")
        sums, total = {}, 0.0
        for e in log.of("train"):
            total += sum(e["step_time"])
            sums[e["last"]] = total
        before = 0.0
        for e in log.of("val"):
            need(e["train_time"] > before, f"{name}: the clock ran backwards at step {e['step']}")
            before = e["train_time"]
            need(math.isclose(e["train_time"], sums.get(e["step"], math.nan), rel_tol=1e-4),
                 f"{name}: the steps to {e['step']} add up to {sums.get(e['step'], math.nan):.3f} s, "
                 f"the log says {e['train_time']:.3f}")  # fmt: skip
        robust = log.robust_train_time(record.about["settings"])
        if robust is not None and log in record.logs:
            need(
                math.isclose(robust, log.end["robust_train_time"], rel_tol=1e-3),
                f"{name}: robust time is not steps x median step",
            )
    stalled = record.about["statistics"]["stalled"]
    return f"sums agree; {stalled} of {len(record.logs)} runs stalled"


def fixed(record: Record) -> str:
    """What defines the track is as the track has it, and the category's rules are kept."""
    about = record.about
    problem = records.category_problem(about["settings"], about["category"])
    need(not problem, problem)
    need(about["target_loss"] == tricks.track(about["track"]).target_loss, "the target is not the track's")
    return f"category {about['category']}, {about['settings']['val_tokens']:,} validation tokens"


def data(record: Record) -> str:
    """The shards here are those of the record, by sha256, and hold as many tokens as were trained on."""
    about = record.about
    folder = corpus(record)
    problems = verify_shards(folder)
    need(not problems, problems[0] if problems else "")
    manifest = read_manifest(folder)
    for split in ("train", "val"):
        need(records.shards(manifest, split) == about["data"][split], f"the {split} shards here are not those of the record")
    tokens = sum(entry["tokens"] for entry in about["data"]["train"])
    used = about["statistics"]["tokens"]
    return f"sha256 of {len(about['data']['train']) + len(about['data']['val'])} shards; {used / tokens:.2f} epochs"


def overlapping(record: Record) -> str:
    """As many validation sequences stand in the training data as the record states, and few at all."""
    said = record.about["data"]["overlap"]
    found = list(overlap.found(corpus(record), record.about["settings"]))
    where = f", such as validation token {found[-1][0]} at training token {found[-1][1]}" if found else ""
    words = f"{len(found)} of {said['sequences']:,} validation sequences stand in the training data{where}"
    need(len(found) == said["in_train"], f"{words}; the record says {said['in_train']}")
    need(len(found) <= MOST_OVERLAP * said["sequences"], f"{words}: more than {MOST_OVERLAP:.0%}")
    return words


def model(record: Record) -> str:
    """The model of these settings, its weights made random: a prediction does not depend on later tokens, nor on the rest
    of the batch; its probabilities sum to one; evaluation changes no weight."""
    config = model_config(record)
    torch.manual_seed(0)
    gpt = GPT(config)
    with torch.no_grad():
        for p in gpt.parameters():  # projections that start at zero would hide everything behind them
            p.add_(torch.randn_like(p), alpha=0.02)
    gpt.eval()
    length = min(config.sequence_length, 64)
    tokens = torch.randint(config.vocab_size, (2, length + 1))
    before = [p.clone() for p in gpt.parameters()]
    with torch.no_grad():
        logits = gpt(tokens[:, :-1])
        loss = gpt(tokens[:, :-1], tokens[:, 1:])
        changed = tokens[:, :-1].clone()
        half = length // 2
        changed[:, half:] = (changed[:, half:] + 1) % config.vocab_size
        later = gpt(changed)
        alone = torch.cat([gpt(row[None]) for row in tokens[:, :-1]])
    need(bool(torch.isfinite(logits).all()), "logits are not finite")
    need(torch.allclose(logits[:, :half], later[:, :half], atol=1e-4), "a prediction depends on later tokens")
    need(not torch.allclose(logits[:, half:], later[:, half:], atol=1e-4), "predictions do not depend on the tokens")
    need(torch.allclose(logits, alone, atol=1e-4), "a prediction depends on the rest of the batch")
    written_out = -F.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None]).mean()
    need(math.isclose(loss.item(), written_out.item(), rel_tol=1e-4), "the loss is not that of probabilities that sum to one")
    need(all(torch.equal(a, b) for a, b in zip(before, gpt.parameters(), strict=True)), "evaluation changed a weight")
    return f"{sum(p.numel() for p in gpt.parameters()) / 1e6:.1f}M parameters"


def code(record: Record) -> str:
    """The trainer here is the one that made the record."""
    if run_folder.source_hash() != record.about["source_sha256"]:
        commit = (record.about["commit"] or "unknown")[:12]
        raise NotCheckable(f"the trainer has changed since: it is that of commit {commit}")
    return record.about["source_sha256"][:8]


def rerun(record: Record) -> str:
    """One seed trained again here ends within the record's own noise (99 % prediction interval)."""
    about = record.about
    for key in ("optimizer", "average", "table_optimizer", "schedule", "momentum_schedule"):
        if ":" in split_spec(about["settings"].get(key, ""))[0]:  # path/to/file.py:Class, or module:Class
            raise NotCheckable(f"its {key} is code from outside the repository, which a record may not have run")
    trial = trials.Trial(trials.Arm(about["name"], tuple(flags_of(about["settings"]))), about["steps"], about["seeds"][0])
    try:
        outcome = trials.train(trial)
    except UsageError as error:
        raise NotCheckable(f"the trainer here refuses these settings: {error}") from None
    need(outcome.result is not None, f"it crashed: {outcome.error}")
    from lab.stats import stats

    s = about["statistics"]
    half = float(stats.t.ppf(0.995, s["n"] - 1)) * s["sd"] * math.sqrt(1 + 1 / s["n"])
    words = f"seed {trial.seed}: {outcome.loss:.4f}, the record's runs end at {s['mean']:.4f} +- {half:.4f}"
    need(abs(outcome.loss - s["mean"]) <= half, words)
    return words


RULES: dict[str, Callable[[Record], str]] = {
    "schema": schema, "files": files, "seeds": seeds, "distinct": distinct, "configuration": configuration,
    "stopping": stopping, "statistics": numbers, "target": target, "rival": rival, "faster": faster, "clock": clock,
    "track": fixed, "data": data, "overlap": overlapping, "model": model, "code": code,
}  # fmt: skip


# ---------------------------------------------------------------- the rules of a report


def report_files(kept: Report) -> str:
    """Every file is expected, none is missing, none names a path of the machine."""
    pictures = {f"{name}.{kind}" for name in kept.summary["plots"] for kind in ("png", "svg")}
    expected = {kept.kind.name, "README.md", "trials.csv", "curves.csv"} | pictures
    there = {path.name for path in kept.folder.iterdir()}
    need(not expected - there, f"missing: {', '.join(sorted(expected - there))}")
    need(not there - expected, f"not part of a report: {', '.join(sorted(there - expected))}")
    pathless(path.read_text() for path in kept.folder.iterdir() if path.suffix != ".png")
    return f"{len(there)} files, {sum(path.stat().st_size for path in kept.folder.iterdir()) / 1000:,.0f} kB"


def report_trials(kept: Report) -> str:
    """No two lines of trials.csv are one run, and loss and time of each are those at the end of its curve in curves.csv."""
    ended = defaultdict(list)
    for c in read_curves(kept.folder / "curves.csv"):
        if c["kind"] == "val" and c["step"] == c["steps"]:
            ended[c["arm"], c["seed"], c["steps"]].append(c)
    seen: set[tuple[float, ...]] = set()
    for row in (good := [row for row in kept.rows if row.status == "ok"]):
        who = f"{row.arm}, {row.steps} steps, seed {row.seed}"
        need((row.val_loss, row.train_time) not in seen, f"{who}: loss and time of another trial")
        seen.add((row.val_loss, row.train_time))
        ends = ended[row.arm, row.seed, row.steps]  # several where it was trained again
        need(bool(ends), f"{who}: curves.csv has no loss at its end")
        end = min(ends, key=lambda c: abs(c["train_time"] - row.train_time))
        need(abs(row.val_loss - end["loss"]) < 1e-5, f"{who}: the loss is {row.val_loss}, by curves.csv {end['loss']}")
        need(
            abs(row.train_time - end["train_time"]) < 1e-3,
            f"{who}: the time is {row.train_time}, by curves.csv {end['train_time']}",
        )
    need(len({row.run for row in kept.rows}) == len(kept.rows), "a trial stands in trials.csv twice")
    return f"{len(kept.rows)} trials, {len(good)} with a loss"


def report_confirmed(kept: Report) -> str:
    """Each arm of a comparison has a line for every planned confirming run, failed ones too: none was dropped. All arms on one
    seed ran within the hour."""
    if kept.kind.name != "comparison.json":
        return "no comparison"
    planned = {arm["name"]: arm["steps"] for arm in kept.summary["arms"] if arm["steps"]}
    if len(planned) < 2 or kept.summary["base"] not in planned:
        return "nothing was to be confirmed"
    valid = [row for row in kept.rows if row.run not in kept.summary.get("left_out", ())]
    for name, steps in planned.items():
        rows = [row for row in valid if (row.arm, row.steps, row.phase) == (name, steps, "confirm")]
        ran, most = sorted(row.pair for row in rows), max(len(rows), kept.summary["seeds"])
        need(ran == list(range(most)), f"{name}: confirmed by the seeds {ran}, not by 0 to {most - 1}")
        shifts = {row.seed - row.pair for row in rows}
        need(len(shifts) == 1 and (shifts == {0} or kept.summary["mode"] == "again"), f"{name}: seeds other than those planned")
    for far in comparison.turns_apart(row for row in valid if row.steps == planned.get(row.arm)):
        raise Broken(f"pair {far['pair']} lies {far['hours']:.1f} hours apart: by turns is within the hour")
    return f"{kept.summary['seeds']} seeds of {len(planned)} arms"


def report_numbers(kept: Report) -> str:
    """The statistics follow from the trials."""
    again = kept.kind.again(kept.summary, kept.rows) | {"plots": kept.summary["plots"]}
    words = difference(kept.summary, json.loads(json.dumps(again)))
    need(not words, words)
    return f"{len(kept.rows)} trials"


def report_text(kept: Report) -> str:
    """README.md is the statistics in words."""
    need(
        (kept.folder / "README.md").read_text() == kept.kind.markdown(kept.summary),
        f"README.md is not what {kept.kind.name} gives",
    )
    return "as generated"


REPORT_RULES: dict[str, Callable[[Report], str]] = {
    "files": report_files, "trials": report_trials, "confirmed": report_confirmed,
    "statistics": report_numbers, "words": report_text,
}  # fmt: skip


# ---------------------------------------------------------------- helpers


def kept_logs(record: Record) -> list[records.Log]:
    """The record's own, and those of its rival where they were timed anew."""
    return record.logs + (record.rival_logs if (record.about["against"] or {}).get("logs") == "here" else [])


def pathless(texts: Iterable[str]) -> None:
    """
    Raises:
        Broken: a text names a path of the machine that it was made on.
    """
    for text in texts:
        path = re.search(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\)\S*", text)
        need(path is None, f"a path of a machine: {path and path[0]}")


def corpus(record: Record) -> Path:
    """
    Raises:
        NotCheckable: the corpus is not prepared here.
    """
    settings = record.about["settings"]
    folder = dataset_folder(records.RECORDS.parent / "corpora", settings["corpus"], settings["tokenizer"])
    if read_manifest(folder) is None:
        command = f"./run.sh data prepare {settings['corpus']} --tokenizer {settings['tokenizer']}"
        raise NotCheckable(f"the corpus is not here: {command}")
    return folder


def model_config(record: Record) -> ModelConfig:
    """
    Raises:
        NotCheckable: a field of the settings that is none of today's model.
    """
    settings = record.about["settings"]
    return ModelConfig(**{f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings})


def flags_of(settings: dict) -> list[str]:
    """Trainer flags that give exactly these settings."""
    flags = []
    for cls in (train_gpt.Config, ModelConfig):
        for f in fields(cls):
            if f.name in settings and f.name != "steps":
                flag, value = f.name.replace("_", "-"), settings[f.name]
                flags += [f"--{flag}" if value else f"--no-{flag}"] if f.type is bool else [f"--{flag}={value}"]
    return flags


def verdicts(kept: Record | Report, again: bool = False) -> list[Verdict]:
    """The verdict of every rule. A record without a sound record.json gets that one alone."""
    found = []
    rules = REPORT_RULES if isinstance(kept, Report) else RULES | ({"rerun": rerun} if again else {})
    for name, rule in rules.items():
        try:
            found.append(Verdict(name, "pass", rule(kept)))
        except NotCheckable as reason:
            found.append(Verdict(name, "not checkable", str(reason)))
        except (Broken, UsageError) as problem:
            found.append(Verdict(name, "fail", str(problem)))
        except (KeyError, TypeError, ValueError, IndexError, OSError) as problem:  # a file of another shape, or none
            found.append(Verdict(name, "fail", f"cannot be read: {type(problem).__name__} {problem}"))
        if name == "schema" and found[-1].verdict == "fail":
            break
    return found


def report(chosen: list[Record | Report], again: bool = False) -> int:
    """Print the verdicts; 2 if a rule is broken, else 0."""
    if not chosen:
        raise UsageError("no records yet: ./run.sh records add")
    broken = 0
    for kept in chosen:
        found = verdicts(kept, again)
        failed = sum(v.verdict == "fail" for v in found)
        unchecked = sum(v.verdict == "not checkable" for v in found)
        broken += failed > 0
        print(f"{kept.label}: {'FAIL' if failed else 'pass'}, {len(found)} rules, {failed} broken, {unchecked} not checkable")
        for v in found:
            print(f"  {v.verdict:13s} {v.rule:13s} {v.words}")
    reports = sum(isinstance(kept, Report) for kept in chosen)
    print(f"{len(chosen) - reports} records, {reports} reports, {broken} with a broken rule")
    return 2 if broken else 0
