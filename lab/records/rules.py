"""The rules that a record must keep, each checked by machine: pass, fail, or not checkable here with the reason.

They answer what has gone wrong in published records: picked seeds, statistics that do not follow from the logs, validation
text in the training data, clocks that do not add up, models that look ahead.
"""

import json
import math
import random
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import jsonschema
import torch
import torch.nn.functional as F

import optimizers
import tricks
from config import FIELDS, Config, flag_of, mean_flops, only
from data.shards import verify as verify_shards
from engine import run_folder
from engine.schedules import Course
from engine.spec import split as split_spec
from lab import comparison, ledger, stats, trials
from lab.records import judge
from lab.records import record as records
from lab.records.judge import NotCheckable, agree, need, only_files
from lab.records.overlap import SETTINGS, repeats
from lab.records.record import SPECS, Record
from layers.shape import ModelConfig
from model import GPT

SCHEMA = Path(__file__).with_name("record.schema.json")
LARGEST = 300_000  # bytes of a record
ALPHA = 0.01  # largest p of the claim that the mean loss is below the target
MOST_OVERLAP = 0.02  # of the validation sequences; a corpus quotes itself, and a leak is of whole documents
# What an entry of the `optimizer` category may choose; all else is what the track has with `modern`.
OPTIMIZER_SETTINGS = ("tricks", "recipe", *SPECS, "steps", "clip", "compile")
# What no record may choose: it defines the track.
FIXED_SETTINGS = ("corpus", "tokenizer", "vocab_size", "val_tokens", "val_spread", "target_loss")
# Settings that older trainers had and today's has not, with the value at which they changed nothing.
GONE = dict.fromkeys(("batch_schedule", "window_schedule", "length_schedule"), "constant")
GONE |= {"shard_optimizer": False, "table_optimizer": "sparse_adagrad", "ngram_sparse": False}
BY_LOGS = "{key} is {stated}, the logs give {expected}"
EVENTS = {"start", "resume", "branch", "stopped", "train", "val", "target", "epoch", "checkpoint", "note", "end"}


def schema(record: Record) -> str:
    """record.json has the fields and types of `lab/records/record.schema.json`; the folder has the record's name."""
    errors = sorted(jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(record.about), key=str)
    need(not errors, f"{errors[0].json_path}: {errors[0].message}" if errors else "")
    about = record.about
    label = f"{about['track']}/{about['number']:03d}-{about['name']}"
    need(record.label == label, f"the folder is {record.label}, record.json says {label}")
    return f"format {about['format']}"


def files(record: Record) -> str:
    """Exactly the expected files are there, small ones; none names a path of a machine; README.md follows from record.json."""
    about = record.about
    expected = {"record.json", "README.md", *(f"seed{seed}.log.jsonl" for seed in about["seeds"])}
    expected |= {log.path.name for log in record.timed_anew}
    expected |= {records.OWN} if "optimizer_code" in about["settings"] else set()
    only_files(record.folder, expected, "record")
    size = sum(path.stat().st_size for path in record.folder.iterdir())
    need(size <= LARGEST, f"{size:,} bytes, more than {LARGEST:,}")
    need((record.folder / "README.md").read_text() == records.readme(about), "README.md is not what record.json gives")
    return f"{len(expected)} files, {size / 1000:,.0f} kB"


def number(record: Record) -> str:
    """A track's numbers are used once, with no gaps except those in lessons.md, and their dates are in order."""
    about = record.about
    here, date, gone = about["number"], about["date"], records.LEFT.get(about["track"], ())
    given = [int(path.name[:3]) for path in record.folder.parent.glob("[0-9][0-9][0-9]*") if path.is_dir()]
    need(given.count(here) == 1 and here not in gone, f"number {here} was given twice")
    missing = set(range(1, here)) - {*given, *gone}
    need(not missing, f"there is no record {min(missing, default=0)}")
    before = records.previous(about["track"], about["category"], here)
    if before and "unknown" not in (before.about["date"], date):
        need(date >= before.about["date"], f"its date {date} is before that of {before.folder.name}")
    return f"{here}, {date}"


def seeds(record: Record) -> str:
    """The seeds are 0 to n - 1 and each has its log: none was picked or dropped."""
    declared, last = record.about["seeds"], len(record.about["seeds"]) - 1
    need(declared == list(range(last + 1)), f"seeds {declared} are not 0 to {last}: one was dropped or picked")
    for log, seed in zip(record.logs, declared, strict=True):
        need(log.start.get("seed") == seed, f"{log.path.name} is of seed {log.start.get('seed')}")
    return f"0 to {last}"


def distinct(record: Record) -> str:
    """No two logs, here or in other records of the category, are of one run: seeds differ by more than a little noise."""
    track, category = record.about["track"], record.about["category"]
    others = [other for other in records.of_track(track, category) if other.folder != record.folder]
    seen = {what: f"{other.label}, {log.path.name}" for other in others for log in other.logs for what in log.own.values()}
    here: dict[str, str] = {}
    for log in record.all_logs:
        for word, what in log.own.items():
            same = here.get(what) or (log in record.logs and seen.get(what))  # the rival's runs may be those of its record
            need(not same, f"{log.path.name} and {same} are the same run: they have the same {word}")
            here[what] = log.path.name
    for logs in (record.logs, record.timed_anew):
        judge.unlike({log.path.name: log.losses for log in logs})
    return f"{len(record.logs)} runs"


def configuration(record: Record) -> str:
    """By their hashes, all runs had the settings, source and data of record.json; the recipe's name follows from them."""
    about, settings = record.about, record.about["settings"]
    config, data = run_folder.settings_hash(settings), about["data"]["fingerprint"]
    need(about["config_sha256"] == config, "config_sha256 is not the hash of the settings: one of them was changed")
    made_as_stated(record.logs, about, config)
    agree(about, {key: settings[key] for key in ("steps", "target_loss")}, "{key} {stated} is not that of the settings")
    words = settings["tricks"].split(",")
    need(settings.get("recipe", about["recipe"]) == "+".join(words), f"the recipe of the settings is not {settings['tricks']}")
    if "record" not in words:  # whose meaning moves on
        spelled = ",".join(tricks.spelled_out(about["track"], settings["tricks"])) or "baseline"
        need(about["recipe"] == spelled, f"the recipe is {about['recipe']}, by the settings {spelled}")
    of_shards = judge.fingerprint(about["data"])
    need(data == of_shards, f"the fingerprint of these shards is {of_shards}")
    if "optimizer_code" in settings:
        kept = run_folder.file_hash(record.folder / records.OWN)
        need(kept == settings["optimizer_code"], f"{records.OWN} is not the optimizer that ran")
    return f"config {config[:8]}, source {about['source_sha256'][:8]}"


def made_as_stated(logs: list[records.Log], about: dict[str, Any], config: str) -> None:
    """Broken: a run had other settings, by their hash, or another source or data."""
    made = {"config": config, "source": about["source_sha256"], "data": about["data"]["fingerprint"]}
    for log in logs:
        agree(log.start, made, f"{log.path.name} was made with another {{key}} than record.json states")


def stopping(record: Record) -> str:
    """Every run, the rival's too, ended at a fixed length whatever its loss; its log has all steps and exactly the planned
    validations, whose losses agree with the training losses."""
    about, settings = record.about, record.about["settings"]
    need(not settings["stop_at_target"], "the runs stopped by their own validation loss")
    need(not settings.get("minutes"), "the runs ended by the clock: a record has a fixed number of steps")
    for log in record.logs:
        whole(log, about["steps"], settings)
    for log in record.timed_anew:
        whole(log, record.timed_anew[0].end.get("step", 0), about["against"]["settings"])
    return f"{about['steps']:,} steps"


def whole(log: records.Log, steps: int, settings: dict[str, Any]) -> None:
    """Broken: the log of a run of that length lacks a step, or has an event too many."""
    name, end, following, points = log.path.name, log.end, 1, []
    need(end.get("status") == "ok", f"{name} has no end, or did not end well")
    need(end["step"] == steps, f"{name} ended at step {end['step']} of {steps}")
    for e in log.of("train"):
        first, last = e["first"], e["last"]
        need(first == following, f"{name}: steps {following} to {first - 1} are missing")
        ends = [*range(first + e["span"] - 1, last, e["span"]), last]  # of the spans
        need(len(e["loss"]) == len(e["step_time"]) == len(ends), f"{name}: steps {first} to {last} are not all there")
        points += zip(ends, e["loss"])
        following = last + 1
    need(following == steps + 1, f"{name} does not hold steps 1 to {steps}")
    planned = trials.validations(steps, settings["val_every"])
    validations = [(e["step"], e["loss"]) for e in log.of("val")]
    ran = [step for step, _ in validations]
    need(ran == planned, f"{name} was validated at steps {ran}, planned are {planned}")
    judge.smooth(name, steps, points, validations, settings.get("future_tokens", 0))
    kinds = [e["event"] for e in log.events]
    framed = kinds[0] == "start" and kinds[-1] == "end" and kinds.count("start") == kinds.count("end") == 1
    need(framed, f"{name} has not one start and one end")
    strange = {*kinds} - EVENTS
    need(not strange, f"{name} has the event {min(strange, default='')}")
    met = [(step, loss, settings["target_loss"]) for step, loss in validations if loss <= settings["target_loss"]][:1]
    said = [(e["step"], e["loss"], e["target_loss"]) for e in log.of("target")]
    need(said == met, f"{name}: the target was met at {met}, the log says {said}")
    for e in log.of("checkpoint"):
        need(0 < e["step"] <= steps and e["bytes"] > 0, f"{name}: a checkpoint of step {e['step']}, {e['bytes']} bytes")
    order = ("train", "val", "target")  # of those of one step
    passed = [(e.get("last", e.get("step")), order.index(e["event"])) for e in log.events if e["event"] in order]
    need(passed == sorted(passed), f"{name}: its events are not in the order of their steps")


def statistics(record: Record) -> str:
    """The statistics follow from the logs, to the printed digit."""
    about, s = record.about, record.about["statistics"]
    followed = records.outcome(record.logs, about["target_loss"])
    agree(s, followed, BY_LOGS)
    extra = s.keys() - followed.keys() - {"tokens", "flops"}
    need(not extra, f"{min(extra, default='')} does not follow from the logs")
    agree(s, records.work(about["settings"], mean_flops(*today(record))), BY_LOGS)
    return f"n = {s['n']}, mean {s['mean']:.4f}, sd {s['sd']:.4f}, p = {s['p']:.2g}"


def target(record: Record) -> str:
    """The mean loss is below the target with p < 0.01. A baseline, which may set the target, is not above it."""
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
    made_as_stated(record.timed_anew, about, run_folder.settings_hash(against["settings"]))
    steps, full = record.timed_anew[0].end["step"], before.about["steps"]
    need(steps <= full, f"the rival ran for {steps} steps, as a record for {full}: longer is slower")
    pair = (complete(settings) for settings in (against["settings"], before.about["settings"]))
    theirs, its = ({k: split_spec(v) if k in SPECS else v for k, v in settings.items()} for settings in pair)
    need(theirs == its, f"the runs that it was timed against have other settings than {name}")
    return f"{name}, {steps:,} of its {full:,} steps"


def faster(record: Record) -> str:
    """It takes less time than the previous record, by pairs of one seed, machine and hour: the ratio's interval is above 1."""
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
    agree(against, ratio, f"against {BY_LOGS}")
    words = comparison.ratio_words(ratio)
    need(ratio["low"] > 1, f"{words}: the interval holds 1, or slower")
    logs = [log for pair in record.pairs for log in pair]
    if not all(log.ended for log in logs):
        raise NotCheckable("the logs are from before they kept the time of day")
    ran = sorted((ledger.moment(log.start["utc"]), log.path.name, ledger.moment(log.ended)) for log in logs)
    for (_, one, ended), (begun, other, _) in pairwise(ran):
        need(ended <= begun, f"{one} and {other} ran at the same time")
    apart = max(map(ledger.hours_apart, record.pairs))
    need(apart <= ledger.MOST_APART, f"a run and its pair lie {apart:.1f} hours apart: interleave them, within the hour")
    return f"{words}, pairs at most {apart * 60:.0f} min apart"


def clock(record: Record) -> str:
    """Times are positive, grow, add up and fit between start and end; robust time is steps x median step; stalled runs are
    counted; CPU time and memory are possible; the date is when the last run ended."""
    about, machine = record.about, record.about["machine"]
    for log in record.all_logs:
        name, total, before, train = log.path.name, log.train_time, 0.0, log.of("train")
        need(min(log.step_times) > 0, f"{name}: a step took no time")
        sums = dict(zip((e["last"] for e in train), accumulate(sum(e["step_time"]) for e in train)))
        for e in (e for e in log.events if e["event"] in ("val", "target")):
            step, time, summed = e["step"], e["train_time"], sums.get(e["step"], math.nan)
            need(time >= before, f"{name}: the clock ran backwards at step {step}")
            same = math.isclose(time, summed, rel_tol=1e-4)
            need(same, f"{name}: the steps to {step} add up to {summed:.3f} s, the log says {time:.3f}")
            before = time
        judge.used(name, machine["device"], machine["cpu_count"], total, log.end)
        if log.ended or about["category"] != "open":
            need(log.ended and log.start["utc"], f"{name} has no time of day")
            span = (ledger.moment(log.ended) - ledger.moment(log.start["utc"])).total_seconds()
            need(span + 1 >= total, f"{name}: steps of {total:.0f} s between a start and an end {span:.0f} s apart")
    need(about["date"] == (record.logs[-1].ended or "unknown")[:10], "the date is not that of the last run's end")
    today(record)
    rivals = about["against"]["settings"] if record.timed_anew else {}
    for log in record.all_logs:
        robust = log.robust_train_time(about["settings"] if log in record.logs else rivals)
        same = robust is None or math.isclose(robust, log.end["robust_train_time"], rel_tol=1e-3)
        need(same, f"{log.path.name}: robust time is not steps x median step")
    return f"sums agree; {about['statistics']['stalled']} of {len(record.logs)} runs stalled"


def track(record: Record) -> str:
    """Settings that define the track, and those that the category fixes, are unchanged."""
    about, settings, category = record.about, record.about["settings"], record.about["category"]
    weights = settings.get("init_from")
    need(not weights, f"it starts from the weights of {weights}: a record's are random at first")
    baseline, modern = (json.loads(json.dumps(tricks.apply(settings["track"], name)[0])) for name in ("baseline", "modern"))
    fixed = {key: value for key, value in baseline.items() if key in FIXED_SETTINGS}
    agree(settings, fixed, "{key} is {stated!r}, the track's is {expected!r}")
    if category == "optimizer":
        free = (*OPTIMIZER_SETTINGS, *FIXED_SETTINGS, *run_folder.PRESENTATION)
        fixed = {key: value for key, value in modern.items() if key not in free}
        agree(settings, fixed, "{key} is {stated!r}, the `modern` model's is {expected!r}")
    need(settings["track"] == about["track"], "the settings are of another track")
    need(about["target_loss"] == tricks.track(about["track"]).target_loss, "the target is not the track's")
    return f"category {category}, {settings['val_tokens']:,} validation tokens"


def transformer(record: Record) -> str:
    """Category gpt: the blocks hold at least the baseline's hidden matrices, all parameters are at most twice the baseline's.
    The record states them by role, and losses that tables do not lower: on the ends of sequences and on other text."""
    about = record.about
    here = records.parameters(about["settings"]) if "parameters" in about or about["category"] == "gpt" else None
    need(about.get("parameters") == here, f"parameters by role are {here}")
    if about["category"] != "gpt":
        return f"category {about['category']}"
    base = records.parameters(tricks.apply(about["track"], "baseline")[0])
    matrices, least, total, most = here.get("matrix", 0), base["matrix"], sum(here.values()), 2 * sum(base.values())
    need(matrices >= least, f"its blocks hold {matrices:,} parameters in matrices, fewer than the baseline's {least:,}")
    need(total <= most, f"{total:,} parameters are more than twice the baseline's, {most:,}")
    wanted = tricks.track(about["track"]).settings.get("val_also", "").split(",")
    missing = set(filter(None, wanted)) - about["statistics"].get("also", {}).keys()
    need(not missing, f"no loss on {', '.join(sorted(missing))}: prepare that corpus (./run.sh data prepare) and train again")
    return f"{total / 1e6:.1f}M parameters, {matrices / 1e6:.1f}M of them in the matrices of blocks"


def data(record: Record) -> str:
    """The shards here have the record's sha256."""
    stated, settings = record.about["data"], record.about["settings"]
    folder, manifest = judge.corpus(settings["corpus"], settings["tokenizer"])
    problems = verify_shards(folder)
    need(not problems, "; ".join(problems))
    for split in ("train", "val"):
        need(records.shards(manifest, split) == stated[split], f"the {split} shards here are not those of the record")
    epochs = record.about["statistics"]["tokens"] / sum(entry["tokens"] for entry in stated["train"])
    return f"sha256 of {len(stated['train']) + len(stated['val'])} shards; {epochs:.2f} epochs"


def overlap(record: Record) -> str:
    """The training data contains as many validation sequences as the record states, and at most 2 %."""
    stated, settings = record.about["data"]["overlap"], record.about["settings"]
    said, sequences = stated["sequences"], settings["val_tokens"] // settings["sequence_length"]
    need(said == sequences, f"the record says {said:,} validation sequences, there are {sequences:,}")
    corpus, _ = judge.corpus(settings["corpus"], settings["tokenizer"])
    places = repeats(corpus, *(settings[key] for key in SETTINGS))
    where = f", such as validation token {places[-1][0]} at training token {places[-1][1]}" if places else ""
    words = f"{len(places)} of {sequences:,} validation sequences stand in the training data{where}"
    need(len(places) == stated["in_train"], f"{words}; the record says {stated['in_train']}")
    need(len(places) <= MOST_OVERLAP * sequences, f"{words}: more than {MOST_OVERLAP:.0%}")
    return words


def model(record: Record) -> str:
    """A model of these settings with random weights: no prediction depends on later tokens or on the rest of the batch,
    probabilities sum to one, evaluation changes no weight."""
    torch.manual_seed(0)
    config = today(record)[1]
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
    need(torch.isfinite(logits).all(), "logits are not finite")
    need(torch.allclose(logits[:, :half], later[:, :half], atol=1e-4), "a prediction depends on later tokens")
    need(not torch.allclose(logits[:, half:], later[:, half:], atol=1e-4), "predictions do not depend on the tokens")
    need(torch.allclose(logits, alone, atol=1e-4), "a prediction depends on the rest of the batch")
    written_out = -F.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None]).mean()
    need(math.isclose(loss.item(), written_out.item(), rel_tol=1e-4), "the loss is not that of probabilities that sum to one")
    need(all(torch.equal(a, b) for a, b in zip(before, gpt.parameters(), strict=True)), "evaluation changed a weight")
    return f"{sum(p.numel() for p in gpt.parameters()) / 1e6:.1f}M parameters"


def code(record: Record) -> str:
    """The commit that the record names has the record's source, and is older than its runs."""
    times = [time for log in record.all_logs for time in (log.start.get("utc"), log.ended)]
    judge.made_at(record.about["commit"] or "unknown", record.about["source_sha256"], times)
    return f"{record.about['source_sha256'][:8]} of commit {commit(record)}"


ORDER = (schema, files, number, seeds, configuration, stopping, statistics, target, rival, faster, clock, track, transformer)
RULES: dict[str, Callable[[Record], str]] = {rule.__name__: rule for rule in (*ORDER, distinct, data, overlap, model, code)}


def rerun(record: Record) -> str:
    """One seed trained again here ends within the record's own noise (99 % prediction interval)."""
    about = record.about
    today(record)
    for key in SPECS:
        if ":" in split_spec(about["settings"].get(key, ""))[0]:  # path/to/file.py:Class, or module:Class
            instead = f"read {records.OWN}, then name it in --optimizer" if key == "optimizer" else "registered names are"
            raise NotCheckable(f"its {key} is code from outside the repository, which is not run unasked: {instead}")
    settings, flags, s = complete(about["settings"]), [], about["statistics"]
    for name in sorted(FIELDS.keys() & settings.keys()):
        flag, value = flag_of(name), settings[name]
        if FIELDS[name].type is bool:
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags.append(f"{flag}={'/'.join(map(str, value)) if isinstance(value, list) else value}")
    trial = trials.Trial(trials.Arm(about["name"], tuple(flags)), about["steps"], random.choice(about["seeds"]))
    return judge.trained_again(trial, stats.Sample(s["n"], s["mean"], s["sd"]), f"; check out commit {commit(record)}")


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings to compare between trainers: what one does not have is at the value that changes nothing. No length or names."""
    apart = (*run_folder.PRESENTATION, "seed", "steps", "tricks", "recipe")
    every = GONE | {name: field.default for name, field in FIELDS.items()} | settings
    if not (every["document_mask"] or every["align_documents"]):
        apart += ("end_of_text",)  # which then acts on nothing
    return json.loads(json.dumps({key: value for key, value in every.items() if key not in apart}))


def commit(record: Record) -> str:
    return (record.about["commit"] or "unknown")[:12]


def today(record: Record) -> tuple[Config, ModelConfig]:
    """The record's settings as today's trainer has them. NotCheckable: it does not know one of them, or refuses it."""
    settings = record.about["settings"]
    known = {*FIELDS, "recipe", "optimizer_code", *(key for key, value in GONE.items() if settings.get(key) == value)}
    try:
        if strange := sorted(settings.keys() - known):
            raise ValueError(f"it has no setting {strange[0]} {settings[strange[0]]!r}")
        Course(records.config_of(settings))
        optimizers.period(settings["optimizer"])
        return records.config_of(settings), ModelConfig(**only(ModelConfig, settings))
    except ValueError as error:
        raise NotCheckable(f"today's trainer cannot train this: {error}; check out commit {commit(record)}") from None
