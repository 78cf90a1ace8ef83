"""The rules that a record must keep, each checked by machine: pass, fail, or not checkable here with the reason.

They answer what has gone wrong in published records: picked seeds, statistics that do not follow from the logs, validation
text in the training data, clocks that do not add up, models that look ahead. What was made by an older trainer is read as it
is stored: today's code says only whether it can train it again.
"""

import json
import math
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jsonschema
import scipy.stats
import torch
import torch.nn.functional as F

import optimizers
import tricks
from config import FIELDS, Config, flag_of, mean_flops, only
from data.shards import dataset_folder, read_manifest
from data.shards import verify as verify_shards
from engine import run_folder
from engine.schedules import Course
from engine.spec import UsageError
from engine.spec import split as split_spec
from lab import ledger, trials
from lab.records import record as records
from lab.records.overlap import repeats
from lab.records.record import Record
from layers.shape import ModelConfig
from model import GPT

SCHEMA = Path(__file__).with_name("record.schema.json")
LARGEST = 300_000  # bytes of a record
ALPHA = 0.01  # largest p of the claim that the mean loss is below the target
MOST_OVERLAP = 0.02  # of the validation sequences; a corpus quotes itself, and a leak is of whole documents
# What an entry of the `optimizer` category may choose; all else is what the track has with `modern`.
OPTIMIZER_SETTINGS = ("tricks", "recipe", "optimizer", "average", "schedule", "momentum_schedule", "steps", "clip", "compile")
# What no record may choose: it defines the track.
FIXED_SETTINGS = ("corpus", "tokenizer", "vocab_size", "val_tokens", "val_spread", "target_loss")
# Settings that older trainers had and today's has not, with the value at which they changed nothing.
GONE = dict.fromkeys(("batch_schedule", "window_schedule", "length_schedule"), "constant")
GONE |= {"shard_optimizer": False, "table_optimizer": "sparse_adagrad", "ngram_sparse": False}
SPECS = ("optimizer", "average", "schedule", "momentum_schedule")  # settings that may name code


class Verdict(NamedTuple):
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


def same(stated: dict[str, Any], followed: dict[str, Any], what: str = "") -> None:
    """Broken: a stated value is not the one that follows from the logs."""
    for key, value in followed.items():
        need(stated[key] == value, f"{what}{key} is {stated[key]}, the logs give {value}")


def judge(kept: Any, rules: dict[str, Callable[[Any], str]]) -> list[Verdict]:
    """The verdict of every rule. What has no sound record.json gets the verdict on that alone."""
    verdicts = []
    for name, rule in rules.items():
        try:
            verdicts.append(Verdict(name, "pass", rule(kept)))
        except NotCheckable as reason:
            verdicts.append(Verdict(name, "not checkable", str(reason)))
        except (Broken, UsageError) as problem:
            verdicts.append(Verdict(name, "fail", str(problem)))
        except Exception as problem:  # a file of another shape, or none; sizes that no machine has
            verdicts.append(Verdict(name, "fail", f"cannot be read: {type(problem).__name__} {problem}"))
        if name == "schema" and verdicts[-1].verdict == "fail":
            break
    return verdicts


def verdicts(record: Record, again: bool = False) -> list[Verdict]:
    """again: also train one of its seeds."""
    return judge(record, RULES | {"rerun": rerun} if again else RULES)


def schema(record: Record) -> str:
    """record.json has the fields and types of `lab/records/record.schema.json`; the folder has the record's name."""
    errors = sorted(jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(record.about), key=str)
    need(not errors, f"{errors[0].json_path}: {errors[0].message}" if errors else "")
    about = record.about
    label = f"{about['track']}/{about['number']:03d}-{about['name']}"
    need(record.label == label, f"the folder is {record.label}, record.json says {label}")
    return f"format {about['format']}"


def files(record: Record) -> str:
    """The expected files are there and no others; they are small; none names a path of a machine; README.md is what
    record.json gives."""
    expected = {"record.json", "README.md", *(log.path.name for log in (*record.logs, *record.timed_anew))}
    texts = only_files(record.folder, expected, "record")
    size = sum(path.stat().st_size for path in record.folder.iterdir())
    need(size <= LARGEST, f"{size:,} bytes, more than {LARGEST:,}")
    need(texts["README.md"] == records.readme(record.about), "README.md is not what record.json gives")
    return f"{len(expected)} files, {size / 1000:,.0f} kB"


def seeds(record: Record) -> str:
    """The seeds are 0 to n - 1 and each has its log: none was picked or dropped."""
    declared = record.about["seeds"]
    last = len(declared) - 1
    need(declared == list(range(last + 1)), f"seeds {declared} are not 0 to {last}: one was dropped or picked")
    for log, seed in zip(record.logs, declared, strict=True):
        need(log.start.get("seed") == seed, f"{log.path.name} is of seed {log.start.get('seed')}")
    return f"0 to {last}"


def distinct(record: Record) -> str:
    """No two logs are of one run: their losses and their times differ."""
    seen: dict[str, str] = {}
    for log in (*record.logs, *record.timed_anew):
        losses, times = json.dumps([e["loss"] for e in log.of("train")]), json.dumps(log.step_times)
        need(losses not in seen, f"{log.path.name} and {seen.get(losses)} are the same run")
        need(times not in seen, f"{log.path.name} and {seen.get(times)} have the same times")
        seen[losses] = seen[times] = log.path.name
    return f"{len(record.logs)} runs"


def configuration(record: Record) -> str:
    """All runs had the settings, the source and the data that record.json states, by their hashes."""
    about = record.about
    config = run_folder.settings_hash(about["settings"])
    need(about["config_sha256"] == config, "config_sha256 is not the hash of the settings: one of them was changed")
    for log in record.logs:
        made_with(log, "record.json states", config=config, source=about["source_sha256"], data=about["data"]["fingerprint"])
    for key in ("steps", "target_loss"):
        need(about[key] == about["settings"][key], f"{key} {about[key]} is not that of the settings")
    return f"config {config[:8]}, source {about['source_sha256'][:8]}"


def stopping(record: Record) -> str:
    """Every run ended at the one fixed length, whatever its own loss was, and its log has all steps."""
    steps = record.about["steps"]
    need(not record.about["settings"]["stop_at_target"], "the runs stopped by their own validation loss")
    for log in record.logs:
        name, end, following = log.path.name, log.end, 1
        need(bool(end) and end["status"] == "ok", f"{name} has no end, or did not end well")
        need(end["step"] == steps, f"{name} ended at step {end['step']} of {steps}")
        need(bool(log.of("val")) and log.of("val")[-1]["step"] == steps, f"{name} was not validated at its end")
        for e in log.of("train"):
            first, last = e["first"], e["last"]
            need(first == following, f"{name}: steps {following} to {first - 1} are missing")
            spans = math.ceil((last - first + 1) / e["span"])
            need(len(e["loss"]) == len(e["step_time"]) == spans, f"{name}: steps {first} to {last} are not all there")
            following = last + 1
        need(following == steps + 1, f"{name} does not hold steps 1 to {steps}")
    return f"{steps:,} steps"


def statistics(record: Record) -> str:
    """The statistics follow from the logs, to the printed digit."""
    about = record.about
    s = about["statistics"]
    same(s, records.outcome(record.logs, about["target_loss"]))
    config, model_config = today(record)
    same(s, records.work(about["settings"], mean_flops(config, model_config)))
    return f"n = {s['n']}, mean {s['mean']:.4f}, sd {s['sd']:.4f}, p = {s['p']:.2g}"


def target(record: Record) -> str:
    """The mean loss is below the target with p < 0.01. A baseline, by which a target may be set, is not above it."""
    s, goal = record.about["statistics"], record.about["target_loss"]
    if record.about["kind"] == "baseline":
        need(s["mean"] <= goal, f"the baseline's mean {s['mean']} is above the target {goal:g}")
        return f"baseline: mean {s['mean']:.4f} <= {goal:g}"
    need(s["p"] < ALPHA, f"p = {s['p']:.2g} that the mean is at or above {goal:g}: {ALPHA} is the limit")
    return f"p = {s['p']:.2g} < {ALPHA}"


def rival(record: Record) -> str:
    """The record was timed against the previous one of its category: on the same seeds, with the same source and data, at that
    record's settings and no longer than it."""
    about, against = record.about, record.about["against"]
    if against is None:
        return "none"
    before = records.previous(about["track"], about["category"], about["number"])
    name = before.folder.name if before else "none"
    need(against["record"] == name, f"timed against {against['record']}, the previous record is {name}")
    ran = sorted(log.start.get("seed") for log in record.rival_logs)
    need(ran == about["seeds"], f"the rival ran on seeds {ran}, the record on {about['seeds']}: a pair is of one seed")
    if not record.timed_anew:
        return f"{name}, its own runs"
    first = record.timed_anew[0]
    steps, full = first.end["step"], before.about["steps"]
    for log in record.timed_anew:
        made_with(log, "the record's own runs", source=about["source_sha256"], data=about["data"]["fingerprint"])
        made_with(log, first.path.name, config=first.start["config"])
        need((log.end.get("status"), log.end.get("step")) == ("ok", steps), f"{log.path.name} did not end well at step {steps}")
    need(steps <= full, f"the rival ran for {steps} steps, as a record for {full}: longer is slower")
    alike = complete(against["settings"]) == complete(before.about["settings"])
    ran_so = run_folder.settings_hash(against["settings"]) == first.start["config"]
    need(alike and ran_so, f"the runs that it was timed against have other settings than {name}")
    return f"{name}, {steps:,} of its {full:,} steps"


def faster(record: Record) -> str:
    """It takes less time than the previous record, paired by seed, on the same machine within the same hour: the interval of
    the ratio is above 1."""
    about, against = record.about, record.about["against"]
    if about["kind"] == "baseline":
        before = records.previous(about["track"], about["category"], about["number"])
        need(before is None, "a baseline is a category's first record")
        return "baseline: nothing before it"
    need(against is not None, "timed against nothing")
    for key in ("machine", "versions", "source_sha256"):
        comparable = record.timed_anew or record.rival.about[key] == about[key]
        need(comparable, f"{against['record']} was timed with another {key.removesuffix('_sha256')}")
    ratio = records.rounded(record.speed_ratio)
    same(against, ratio, "against ")
    words = f"{ratio['ratio']:.3g}x ({ratio['low']:.3g}-{ratio['high']:.3g})"
    need(ratio["low"] > 1, f"{words}: the interval holds 1, or slower")
    if not all(log.ended for pair in record.pairs for log in pair):
        raise NotCheckable("the logs are from before they kept the time of day")
    apart = max(map(ledger.hours_apart, record.pairs))
    need(apart <= ledger.MOST_APART, f"a run and its pair lie {apart:.1f} hours apart: interleave them, within the hour")
    return f"{words}, pairs at most {apart * 60:.0f} min apart"


def clock(record: Record) -> str:
    """Times are positive, grow and add up; robust time is steps x median step; stalled runs are counted."""
    for log in (*record.logs, *record.timed_anew):
        name, total, before, sums = log.path.name, 0.0, 0.0, {}
        need(min(log.step_times) > 0, f"{name}: a step took no time")
        for e in log.of("train"):
            sums[e["last"]] = total = total + sum(e["step_time"])
        for e in log.of("val"):
            step, time, summed = e["step"], e["train_time"], sums.get(e["step"], math.nan)
            need(time > before, f"{name}: the clock ran backwards at step {step}")
            agree = math.isclose(time, summed, rel_tol=1e-4)
            need(agree, f"{name}: the steps to {step} add up to {summed:.3f} s, the log says {time:.3f}")
            before = time
    today(record)
    for log in record.logs:
        robust = log.robust_train_time(record.about["settings"])
        agree = robust is None or math.isclose(robust, log.end["robust_train_time"], rel_tol=1e-3)
        need(agree, f"{log.path.name}: robust time is not steps x median step")
    return f"sums agree; {record.about['statistics']['stalled']} of {len(record.logs)} runs stalled"


def track(record: Record) -> str:
    """What defines the track is as the track has it, and what the category fixes is kept."""
    about = record.about
    problem = category_problem(about["settings"], about["category"])
    need(not problem, problem)
    need(about["settings"]["track"] == about["track"], "the settings are of another track")
    need(about["target_loss"] == tricks.track(about["track"]).target_loss, "the target is not the track's")
    return f"category {about['category']}, {about['settings']['val_tokens']:,} validation tokens"


def transformer(record: Record) -> str:
    """Category gpt: the blocks hold at least the baseline's hidden matrices, all parameters are at most twice the baseline's;
    these are stated by role, and so is the loss on the ends of sequences and on other text, which tables do not lower."""
    about = record.about
    if about["category"] != "gpt":
        return f"category {about['category']}"
    base, here = records.parameters(tricks.apply(about["track"], "baseline")[0]), records.parameters(about["settings"])
    need(about.get("parameters") == here, f"parameters by role are {here}")
    matrices, least, most = here.get("matrix", 0), base["matrix"], 2 * sum(base.values())
    need(matrices >= least, f"its blocks hold {matrices:,} parameters in matrices, fewer than the baseline's {least:,}")
    need(sum(here.values()) <= most, f"{sum(here.values()):,} parameters are more than twice the baseline's, {most:,}")
    wanted = tricks.track(about["track"]).settings.get("val_also", "").split(",")
    missing = set(filter(None, wanted)) - about["statistics"].get("also", {}).keys()
    need(not missing, f"no loss on {', '.join(sorted(missing))}: prepare that corpus (./run.sh data prepare) and train again")
    return f"{sum(here.values()) / 1e6:.1f}M parameters, {matrices / 1e6:.1f}M of them in the matrices of blocks"


def data(record: Record) -> str:
    """The shards here are the record's, by sha256."""
    stated, folder = record.about["data"], corpus(record)
    problems = verify_shards(folder)
    need(not problems, problems[0] if problems else "")
    manifest = read_manifest(folder)
    for split in ("train", "val"):
        need(records.shards(manifest, split) == stated[split], f"the {split} shards here are not those of the record")
    epochs = record.about["statistics"]["tokens"] / sum(entry["tokens"] for entry in stated["train"])
    return f"sha256 of {len(stated['train']) + len(stated['val'])} shards; {epochs:.2f} epochs"


def overlap(record: Record) -> str:
    """As many validation sequences stand in the training data as the record states, and at most 2 %."""
    stated, places = record.about["data"]["overlap"], repeats(corpus(record), record.about["settings"])
    where = f", such as validation token {places[-1][0]} at training token {places[-1][1]}" if places else ""
    words = f"{len(places)} of {stated['sequences']:,} validation sequences stand in the training data{where}"
    need(len(places) == stated["in_train"], f"{words}; the record says {stated['in_train']}")
    need(len(places) <= MOST_OVERLAP * stated["sequences"], f"{words}: more than {MOST_OVERLAP:.0%}")
    return words


def model(record: Record) -> str:
    """A model of these settings with random weights: no prediction depends on later tokens or on the rest of the batch,
    probabilities sum to one, evaluation changes no weight."""
    config = today(record)[1]
    torch.manual_seed(0)
    gpt = GPT(config).eval()
    length = min(config.sequence_length, 64)
    tokens = torch.randint(config.vocab_size, (2, length + 1))
    half, changed = length // 2, tokens[:, :-1].clone()
    changed[:, half:] = (changed[:, half:] + 1) % config.vocab_size
    with torch.no_grad():
        for p in gpt.parameters():  # projections that start at zero would hide everything behind them
            p.add_(torch.randn_like(p), alpha=0.02)
        before = [p.clone() for p in gpt.parameters()]
        logits, loss, later = gpt(tokens[:, :-1]), gpt(tokens[:, :-1], tokens[:, 1:]), gpt(changed)
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
    """The source here is the record's."""
    if run_folder.source_hash() != record.about["source_sha256"]:
        raise NotCheckable(f"made at commit {commit(record)} by other source than here")
    return record.about["source_sha256"][:8]


ORDER = (schema, files, seeds, distinct, configuration, stopping, statistics, target, rival, faster, clock, track, transformer)
RULES: dict[str, Callable[[Record], str]] = {rule.__name__: rule for rule in (*ORDER, data, overlap, model, code)}


def rerun(record: Record) -> str:
    """One seed trained again here ends within the record's own noise (99 % prediction interval)."""
    about = record.about
    today(record)
    for key in SPECS:
        if ":" in split_spec(about["settings"].get(key, ""))[0]:  # path/to/file.py:Class, or module:Class
            raise NotCheckable(f"its {key} is code from outside the repository, which a record may not have run")
    arm, seed = trials.Arm(about["name"], tuple(flags_of(complete(about["settings"])))), random.choice(about["seeds"])
    with tempfile.TemporaryDirectory() as fresh:  # a result that lies in runs/ proves nothing
        try:
            outcome = trials.train(trials.Trial(arm, about["steps"], seed, root=Path(fresh)))
        except UsageError as error:
            elsewhere(record, str(error))
    need(outcome.result is not None, f"it crashed: {outcome.error}")
    s = about["statistics"]
    half = float(scipy.stats.t.ppf(0.995, s["n"] - 1)) * s["sd"] * math.sqrt(1 + 1 / s["n"])
    words = f"seed {seed}: {outcome.loss:.4f}, the record's runs end at {s['mean']:.4f} +- {half:.4f}"
    need(abs(outcome.loss - s["mean"]) <= half, words)
    return words


def only_files(folder: Path, expected: set[str], what: str) -> dict[str, str]:
    """The texts of a folder by name. Broken: a file is missing, or not expected, or names a path of the machine it is from."""
    there = {path.name for path in folder.iterdir()}
    need(not expected - there, f"missing: {', '.join(sorted(expected - there))}")
    need(not there - expected, f"not part of a {what}: {', '.join(sorted(there - expected))}")
    texts = {name: (folder / name).read_text() for name in there if not name.endswith(".png")}
    for text in texts.values():
        path = re.search(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\)\S*", text)
        need(path is None, f"a path of a machine: {path and path[0]}")
    return texts


def made_with(log: records.Log, whose: str, **hashes: str) -> None:
    """Broken: the log starts with another hash."""
    for key, value in hashes.items():
        need(log.start.get(key) == value, f"{log.path.name} was made with another {key} than {whose}")


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings to compare between trainers: what one of them does not have is at the value that changes nothing. Length and the
    recipe's name are left out."""
    apart = (*run_folder.PRESENTATION, "seed", "steps", "tricks", "recipe")
    every = GONE | {name: field.default for name, field in FIELDS.items()} | settings
    return json.loads(json.dumps({key: value for key, value in every.items() if key not in apart}))


def category_problem(settings: dict[str, Any], category: str) -> str:
    """What of these settings the category does not allow; empty if nothing."""
    sets = {name: json.loads(json.dumps(tricks.apply(settings["track"], name)[0])) for name in ("baseline", "modern")}
    fixed = [("the track's", key, value) for key, value in sets["baseline"].items() if key in FIXED_SETTINGS]
    if category == "optimizer":
        free = (*OPTIMIZER_SETTINGS, *FIXED_SETTINGS, *run_folder.PRESENTATION)
        fixed += [("the `modern` model's", key, value) for key, value in sets["modern"].items() if key not in free]
    wrong = (f"{key} is {settings[key]!r}, {whose} is {value!r}" for whose, key, value in fixed if settings[key] != value)
    return next(wrong, "")


def corpus(record: Record) -> Path:
    """NotCheckable: it is not prepared here."""
    settings = record.about["settings"]
    folder = dataset_folder(records.RECORDS.parent / "corpora", settings["corpus"], settings["tokenizer"])
    if read_manifest(folder) is None:
        command = f"./run.sh data prepare {settings['corpus']} --tokenizer {settings['tokenizer']}"
        raise NotCheckable(f"the corpus is not here: {command}")
    return folder


def commit(record: Record) -> str:
    return (record.about["commit"] or "unknown")[:12]


def elsewhere(record: Record, why: str) -> NoReturn:
    raise NotCheckable(f"today's trainer cannot train this: {why}; check out commit {commit(record)}")


def today(record: Record) -> tuple[Config, ModelConfig]:
    """The record's settings as today's trainer has them. NotCheckable: it does not know one of them, or refuses it."""
    settings = record.about["settings"]
    for key, value in settings.items():
        if key not in (*FIELDS, "recipe", "optimizer_code") and (key not in GONE or GONE[key] != value):
            elsewhere(record, f"it has no setting {key} {value!r}")
    try:
        Course(records.config_of(settings))
        optimizers.period(settings["optimizer"])
        return records.config_of(settings), ModelConfig(**only(ModelConfig, settings))
    except ValueError as error:
        elsewhere(record, str(error))


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Trainer flags that give exactly these settings."""

    def words(name: str, value: Any) -> str:
        if FIELDS[name].type is bool:
            return flag_of(name) if value else flag_of(name).replace("--", "--no-", 1)
        return f"{flag_of(name)}={'/'.join(map(str, value)) if isinstance(value, list) else value}"

    return [words(name, settings[name]) for name in sorted(FIELDS.keys() & settings.keys())]
