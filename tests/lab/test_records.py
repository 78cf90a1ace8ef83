"""Records are kept only when every rule holds, and every kind of tampering is found and named."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA_ROOT

import train_gpt
from data.shards import Dataset, validation_starts
from lab.records import overlap, verify
from lab.records import record as records
from lab.records.record import Log, Record
from lab.records.reports import Report, difference

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def runs(sotu, tmp_path_factory):
    """Run folders of tiny's baseline and record recipe, three seeds each, by turns."""
    root = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        for name, tricks, steps in (("baseline", "baseline", 60), ("quick", "modern,muon", 30)):
            words = ["--track", "tiny", "--tricks", tricks, "--steps", str(steps), "--seed", str(seed), "--dtype", "fp32"]
            assert train_gpt.main([*words, "--data-root", str(DATA_ROOT), "--out", str(root / f"{name}{seed}")]) == 0
    return {name: [root / f"{name}{seed}" for seed in SEEDS] for name in ("baseline", "quick")}


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """The two records, made from those runs, to be copied. Their time ratio is set by hand: no test of this machine."""
    root = tmp_path_factory.mktemp("made")
    (root / "corpora").symlink_to(DATA_ROOT)
    for name, seconds in ("baseline", 10.0), ("quick", 0.1):
        for run in runs[name]:
            timed(run, seconds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "RECORDS", root / "records")
        records.add(runs["baseline"], "baseline", "GPT-2 as published with AdamW.", kind="baseline")
        records.add(runs["quick"], "quick", "Muon on the modern model needs half of the steps.")
    return root / "records"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """records/ of its own, with the tests' corpus beside it."""
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    (tmp_path / "corpora").symlink_to(DATA_ROOT)
    return tmp_path


@pytest.fixture
def kept(made, place):
    """The two records, to be tampered with."""
    shutil.copytree(made, place / "records")
    return Record(place / "records" / "tiny" / "001-baseline"), Record(place / "records" / "tiny" / "002-quick")


def timed(run, seconds: float) -> None:
    """About so many seconds a step, a little more in a later one and for a higher seed."""
    path = run / "log.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for e in events:
        if e["event"] == "train":
            e["step_time"] = seconds * (1 + e["step"] / 1e4 * (1 + int(run.name[-1])))
        if "train_time" in e:
            e["train_time"] = sum(x["step_time"] for x in events if x["event"] == "train" and x["step"] <= e["step"])
    path.write_text("".join(json.dumps(e) + "\n" for e in events))
    result = json.loads((run / "result.json").read_text())
    times = [e["step_time"] for e in events if e["event"] == "train"]
    result |= {"train_time": sum(times), "robust_train_time": len(times) * float(np.median(times))}
    (run / "result.json").write_text(json.dumps(result))


def failures(record: Record) -> dict[str, str]:
    return {v.rule: v.words for v in verify.verdicts(Record(record.folder)) if v.verdict == "fail"}


def edit(path, change) -> None:
    """Change the events of a log, or a JSON document, in place."""
    if path.suffix == ".jsonl":
        events = [json.loads(line) for line in path.read_text().splitlines()]
        change(events)
        path.write_text("".join(json.dumps(e, separators=(",", ":")) + "\n" for e in events))
    else:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document, indent=1) + "\n")


def test_a_record_passes_every_rule_and_is_small(kept, capsys, place):
    _, quick = kept
    for record in kept:
        found = verify.verdicts(record)
        assert [v.verdict for v in found] == ["pass"] * len(verify.RULES), [v for v in found if v.verdict != "pass"]
        assert sum(p.stat().st_size for p in record.folder.iterdir()) < 30_000
    assert quick.about["against"]["record"] == "001-baseline" and quick.about["against"]["ratio"] > 2
    assert records.main(["verify"]) == 0
    assert "2 records, 0 reports, 0 with a broken rule" in capsys.readouterr().out
    assert records.main(["verify", "tiny/002-quick"]) == 0
    assert "16 rules, 0 broken, 0 not checkable" in capsys.readouterr().out


def test_command_of_an_optimizer_record_trains_its_settings(kept):
    about = kept[1].about | {"category": "optimizer", "recipe": "modern"}
    flags = ["--tricks", "modern", "--optimizer", "muon:lr=0.01"]
    flags += ["--average", "lawa_ema:decay=0.9", "--schedule", "wsd", "--clip", "0"]
    for words in flags, flags[:4]:
        settings = dataclasses.asdict(train_gpt.resolve(["--track", "tiny", *words])[0])
        line = records.readme(about | {"settings": settings}).splitlines()[4]
        told = line.split("`")[1].split()
        assert told[:3] == ["./run.sh", "train", "--track"] and told[-2:] == ["--seed", "N"]
        again = dataclasses.asdict(train_gpt.resolve(told[2:-2])[0])
        keys = ("tricks", "optimizer", "average", "schedule", "momentum_schedule", "clip", "compile")
        assert [again[key] for key in keys] == [settings[key] for key in keys]


def test_printed_numbers_are_those_of_the_runs(kept, runs):
    _, quick = kept
    losses = [json.loads((run / "result.json").read_text())["val_loss"] for run in runs["quick"]]
    times = [json.loads((run / "result.json").read_text())["train_time"] for run in runs["quick"]]
    s = quick.about["statistics"]
    assert s["mean"] == pytest.approx(np.mean(losses), abs=1e-5) and s["sd"] == pytest.approx(np.std(losses, ddof=1), abs=1e-5)
    assert s["train_time"] == pytest.approx(np.mean(times), rel=1e-3)
    assert f"mean {s['mean']:.4f}" in (quick.folder / "README.md").read_text()


def edited_loss(record):
    def lower(events):
        last = [e for e in events if e["event"] == "val"][-1]
        last["loss"] -= 0.01

    edit(record.folder / "seed1.log.jsonl", lower)


def dropped_seed(record):
    (record.folder / "seed1.log.jsonl").unlink()
    edit(record.folder / "record.json", lambda about: about.update(seeds=[0, 2]))


def missing_log(record):
    (record.folder / "seed2.log.jsonl").unlink()


def duplicated_log(record):
    text = (record.folder / "seed0.log.jsonl").read_text()
    (record.folder / "seed1.log.jsonl").write_text(text.replace('"seed":0', '"seed":1', 1))


def changed_config(record):
    edit(record.folder / "record.json", lambda about: about["settings"].update(width=128))


def changed_config_and_hash(record):
    from engine.run_folder import settings_hash

    def change(about):
        about["settings"].update(width=128)
        about["config_sha256"] = settings_hash(about["settings"])

    edit(record.folder / "record.json", change)


def other_source(record):
    edit(record.folder / "seed0.log.jsonl", lambda events: events[0].update(source="0" * 64))


def claimed_mean(record):
    edit(record.folder / "record.json", lambda about: about["statistics"].update(mean=about["statistics"]["mean"] - 0.001))


def faster_clock(record):
    def change(events):
        for e in events:
            if e["event"] == "train":
                e["step_time"] = [t * 0.9 for t in e["step_time"]]

    edit(record.folder / "seed0.log.jsonl", change)


def backward_clock(record):
    edit(
        record.folder / "seed0.log.jsonl",
        lambda events: [e for e in events if e["event"] == "val"][-1].update(train_time=0.001),
    )


def stopped_early(record):
    edit(record.folder / "seed0.log.jsonl", lambda events: events[-1].update(step=29))


def left_out_steps(record):
    def change(events):
        first = next(e for e in events if e["event"] == "train")
        first["loss"].pop()
        first["step_time"].pop()

    edit(record.folder / "seed0.log.jsonl", change)


def extra_file(record):
    (record.folder / "notes.txt").write_text("trust me")


def path_of_a_machine(record):
    edit(record.folder / "record.json", lambda about: about.update(why="ran in /home/me/runs"))


def claimed_ratio(record):
    edit(record.folder / "record.json", lambda about: about["against"].update(ratio=99.0))


def another_target(record):
    edit(record.folder / "record.json", lambda about: about.update(target_loss=3.5))


def no_field(record):
    edit(record.folder / "record.json", lambda about: about.pop("seeds"))


@pytest.mark.parametrize(
    ("tamper", "rule", "words"),
    [
        (edited_loss, "statistics", "the logs give"),
        (dropped_seed, "seeds", "one was dropped or picked"),
        (missing_log, "files", "missing: seed2.log.jsonl"),
        (duplicated_log, "distinct", "seed1.log.jsonl and seed0.log.jsonl are the same run"),
        (changed_config, "configuration", "one of them was changed"),
        (changed_config_and_hash, "configuration", "made with another config"),
        (other_source, "configuration", "seed0.log.jsonl was made with another source"),
        (claimed_mean, "statistics", "mean is"),
        (faster_clock, "clock", "add up to"),
        (backward_clock, "clock", "ran backwards"),
        (stopped_early, "stopping", "seed0.log.jsonl ended at step 29 of 30"),
        (left_out_steps, "stopping", "are not all there"),
        (extra_file, "files", "not part of a record: notes.txt"),
        (path_of_a_machine, "files", "a path of a machine: /home/me/runs"),
        (claimed_ratio, "faster", "against ratio is 99.0"),
        (another_target, "track", "the target is not the track's"),
        (no_field, "schema", "'seeds' is a required property"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_tampering_is_found_and_named(kept, capsys, tamper, rule, words):
    _, quick = kept
    tamper(quick)
    found = failures(quick)
    assert words in found[rule], found
    assert records.main(["verify", "tiny/002-quick"]) == 2
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["fail", rule])
    assert words in line


def own_corpus(place):
    """A copy of the corpus, to damage."""
    (place / "corpora").unlink()
    shutil.copytree(DATA_ROOT / "sotu-bytes", place / "corpora" / "sotu-bytes")
    return place / "corpora" / "sotu-bytes"


def test_validation_text_in_the_training_data_is_found(kept, place):
    _, quick = kept
    folder = own_corpus(place)
    val, settings = Dataset(folder, "val"), quick.about["settings"]
    start = validation_starts(val, 64, settings["val_tokens"], settings["val_spread"])[3]
    stretch = np.array(val.window(start, 64))
    path = sorted(folder.glob("*_train_*.bin"))[0]
    content = bytearray(path.read_bytes())
    content[1024 + 2 * 5000 : 1024 + 2 * 5064] = stretch.tobytes()
    path.write_bytes(bytes(content))
    found = failures(quick)
    assert f"{quick.about['data']['overlap']['in_train'] + 1} of 128" in found["overlap"]
    assert "is damaged" in found["data"]


def test_without_the_corpus_its_rules_are_not_checkable(kept, place):
    (place / "corpora").unlink()
    verdict = {v.rule: v for v in verify.verdicts(kept[1])}
    assert verdict["data"].verdict == verdict["overlap"].verdict == "not checkable"
    assert "./run.sh data prepare sotu" in verdict["data"].words
    assert not failures(kept[1])


def test_rolling_hash_finds_what_is_there():
    tokens = np.random.default_rng(0).integers(0, 65535, 500).astype("<u2")
    for length in (1, 2, 3, 7, 64, 100):
        hashes = overlap.rolling_hash(tokens, length)
        assert len(hashes) == 500 - length + 1 and len(set(hashes.tolist())) > 400
        assert all(overlap.hash_of(tokens[i : i + length]) == hashes[i] for i in (0, 1, 250, 500 - length))


def test_a_model_that_looks_ahead_is_found(kept, monkeypatch):
    import model

    monkeypatch.setitem(model.ATTENTION, "chunked", lambda q, k, v, scale, *_: (q @ k.mT * scale).softmax(-1) @ v)
    assert "depends on later tokens" in failures(kept[1])["model"]


def test_rerun_is_within_the_records_noise(kept, tmp_path, monkeypatch):
    from lab import trials

    monkeypatch.setattr(trials, "RUNS", tmp_path / "again")
    (verdict,) = [v for v in verify.verdicts(kept[1], again=True) if v.rule == "rerun"]
    assert verdict.verdict == "pass" and "seed 0" in verdict.words
    edit(kept[1].folder / "record.json", lambda about: about["statistics"].update(mean=2.0))
    (verdict,) = [v for v in verify.verdicts(Record(kept[1].folder), again=True) if v.rule == "rerun"]
    assert verdict.verdict == "fail"
    # a stranger's record runs nothing of its own
    code = tmp_path / "code.py"
    code.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Mine: pass\n")
    edit(kept[1].folder / "record.json", lambda about: about["settings"].update(schedule=f"{code}:Mine"))
    (verdict,) = [v for v in verify.verdicts(Record(kept[1].folder), again=True) if v.rule == "rerun"]
    assert verdict.verdict == "not checkable" and "outside the repository" in verdict.words
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("pick", "keywords", "message"),
    [
        (lambda r: r["quick"][:1], {}, "1 run is no evidence"),
        (lambda r: r["quick"][1:], {}, "seeds must be 0 to 1"),
        (lambda r: [*r["quick"][:2], r["quick"][1]], {}, "seeds must be 0 to 2, each once"),
        (lambda r: [r["quick"][0], r["baseline"][1]], {}, "have different settings"),
        (lambda r: r["baseline"], {"category": "optimizer"}, "not of category optimizer"),
        (lambda r: r["quick"], {"against": ["001-basline"]}, "did you mean '001-baseline'?"),
        (lambda r: r["baseline"], {}, "not a record: faster"),
        (lambda r: [r["quick"][0].parent / "nowhere"], {}, "not a finished run"),
    ],
)
def test_what_is_no_record_is_refused_and_leaves_nothing(kept, runs, pick, keywords, message):
    from engine.spec import UsageError

    before = sorted(records.RECORDS.rglob("*"))
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        records.add(pick(runs), "third", "why", **keywords)
    assert sorted(records.RECORDS.rglob("*")) == before


def test_runs_timed_anew_are_kept_with_the_record(runs, made, place):
    shutil.copytree(made, place / "records")
    shutil.rmtree(place / "records" / "tiny" / "002-quick")
    record = records.add(runs["quick"], "quick", "Faster.", against=[str(run) for run in runs["baseline"]])
    assert record.about["against"]["logs"] == "here" and not failures(record)
    assert len(list(record.folder.glob("against-seed*.log.jsonl"))) == 3
    edit(
        record.folder / "against-seed0.log.jsonl",
        lambda events: events[1].update(step_time=[9.0] * len(events[1]["step_time"])),
    )
    assert "the logs give" in failures(record)["faster"]


def another_seed(record):
    (record.folder / "against-seed1.log.jsonl").unlink()


def other_source_of_the_rival(record):
    edit(record.folder / "against-seed1.log.jsonl", lambda events: events[0].update(source="f" * 64))


def other_data_of_the_rival(record):
    edit(record.folder / "against-seed1.log.jsonl", lambda events: events[0].update(data="nothing"))


def one_run_of_other_settings(record):
    edit(record.folder / "against-seed1.log.jsonl", lambda events: events[0].update(config="0" * 64))


def runs_of_other_settings(record):
    for path in record.folder.glob("against-seed*"):
        edit(path, lambda events: events[0].update(config="0" * 64))


def settings_of_another(record):
    """The runs of another recipe, honest in themselves, in the rival's place."""
    from engine.run_folder import settings_hash

    other = record.about["against"]["settings"] | {"width": 8}
    edit(record.folder / "record.json", lambda about: about["against"].update(settings=other))
    for path in record.folder.glob("against-seed*"):
        edit(path, lambda events: events[0].update(config=settings_hash(other)))


def slower_rival(record):
    """Every step twice as long, and the ratio to match; the clock at the validations is left as it was."""
    for path in record.folder.glob("against-seed*"):
        edit(
            path, lambda events: [e.update(step_time=[2 * t for t in e["step_time"]]) for e in events if e["event"] == "train"]
        )


def shorter_record_of_the_rival(record):
    edit(record.folder.parent / "001-baseline" / "record.json", lambda about: about.update(steps=59))


@pytest.fixture(scope="module")
def beside(runs, made, tmp_path_factory):
    """As `made`, the baseline timed anew beside the second record."""
    root = tmp_path_factory.mktemp("beside")
    (root / "corpora").symlink_to(DATA_ROOT)
    shutil.copytree(made, root / "records")
    shutil.rmtree(root / "records" / "tiny" / "002-quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "RECORDS", root / "records")
        records.add(runs["quick"], "quick", "Faster.", against=[str(run) for run in runs["baseline"]])
    return root / "records"


@pytest.mark.parametrize(
    ("tamper", "rule", "words"),
    [
        (another_seed, "rival", "the rival ran on seeds [0, 2], the record on [0, 1, 2]"),
        (other_source_of_the_rival, "rival", "against-seed1.log.jsonl was made with another source"),
        (other_data_of_the_rival, "rival", "against-seed1.log.jsonl was made with another data"),
        (one_run_of_other_settings, "rival", "another config than against-seed0.log.jsonl"),
        (runs_of_other_settings, "rival", "have other settings than 001-baseline"),
        (settings_of_another, "rival", "have other settings than 001-baseline"),
        (shorter_record_of_the_rival, "rival", "the rival ran for 60 steps, as a record for 59"),
        (slower_rival, "clock", "against-seed0.log.jsonl: the steps to"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_runs_of_the_rival_are_its_own(beside, place, tamper, rule, words):
    shutil.copytree(beside, place / "records")
    record = Record(place / "records" / "tiny" / "002-quick")
    assert not failures(record) and record.about["against"]["settings"]["steps"] == 60
    tamper(record)
    ratio = records.ratio_of(Record(record.folder).speed_ratio)
    edit(record.folder / "record.json", lambda about: about["against"].update(ratio))
    (record.folder / "README.md").write_text(records.readme(Record(record.folder).about))
    assert words in failures(record)[rule]


def test_settings_of_the_rival_in_older_records(beside, place):
    """Those kept with the record are new: without them the rival record's own must have the hash, if it knows all of them."""
    shutil.copytree(beside, place / "records")
    record, other = (Record(place / "records" / "tiny" / name) for name in ("002-quick", "001-baseline"))
    edit(record.folder / "record.json", lambda about: about["against"].pop("settings"))
    assert not failures(record)
    runs_of_other_settings(record)
    assert "have other settings than 001-baseline" in failures(record)["rival"]
    edit(other.folder / "record.json", lambda about: about["settings"].pop("average"))
    (verdict,) = [v for v in verify.verdicts(Record(record.folder)) if v.rule == "rival"]
    assert verdict.verdict == "not checkable" and "the trainer gained settings" in verdict.words


def test_a_rival_that_ran_longer_than_its_record_is_refused(runs, made, place):
    from engine.spec import UsageError

    shutil.copytree(made, place / "records")
    shutil.rmtree(place / "records" / "tiny" / "002-quick")
    edit(place / "records" / "tiny" / "001-baseline" / "record.json", lambda about: about.update(steps=59))
    with pytest.raises(UsageError, match="rival: the rival ran for 60 steps"):
        records.add(runs["quick"], "quick", "Faster.", against=[str(run) for run in runs["baseline"]])


def test_a_record_is_taken_from_a_comparison(runs, made, place, monkeypatch, capsys):
    from lab import trials

    monkeypatch.setattr(trials, "RUNS", place)
    shutil.copytree(made, place / "records")
    shutil.rmtree(place / "records" / "tiny" / "002-quick")
    lines = ["phase,arm,steps,pair,seed,run,status,val_loss,train_time,robust_train_time,process_time,tokens,flops,peak_memory,"
             "stalled,ended,machine,commit,source,data,error"]  # fmt: skip
    for arm, steps in (("baseline", 60), ("quick", 30)):
        for seed, run in enumerate(runs[arm]):
            shutil.copytree(run, place / "runs" / "tiny" / run.name)
            lines.append(f"confirm,{arm},{steps},{seed},{seed},{run.name},ok,2.5,1,1,1,1,1,1,False,now,m,c,s,d,")
    (place / "c").mkdir()
    (place / "c" / "trials.csv").write_text("\n".join(lines) + "\n")
    arms = [{"name": "baseline", "steps": 60}, {"name": "quick", "steps": 30}, {"name": "lost", "steps": 10}]
    (place / "c" / "comparison.json").write_text(json.dumps({"track": "tiny", "arms": arms}))
    words = ["add", "--comparison", str(place / "c"), "--name", "quick", "--why", "Faster."]
    for more, message in (
        ([], "--comparison needs --arm"),
        (["--arm", "quik"], "did you mean 'quick'?"),
        (["--arm", "lost"], "has no confirming runs"),
        (["--arm", "quick", "somewhere"], "add what?"),
    ):
        assert records.main([*words, *more]) == 2 and message in capsys.readouterr().err
    assert records.main([*words, "--arm", "quick", "--against-arm", "baseline"]) == 0
    record = Record(place / "records" / "tiny" / "002-quick")
    assert not failures(record) and record.about["against"]["logs"] == "here"


def test_long_logs_are_kept_in_spans(runs, monkeypatch):
    events = [json.loads(line) for line in (runs["quick"][0] / "log.jsonl").read_text().splitlines()]
    whole, short = (records.compact(events, {"seed": 0}, spans) for spans in (1, 4))
    count = lambda lines: sum(len(e["step_time"]) for e in lines if e["event"] == "train")  # noqa: E731
    total = lambda lines: sum(sum(e["step_time"]) for e in lines if e["event"] == "train")  # noqa: E731
    assert count(whole) == 30 and count(short) == 10  # five lines of six steps: two spans each
    assert total(whole) == pytest.approx(total(short), rel=1e-4)


def test_log_that_is_damaged_is_one_line(kept):
    path = kept[1].folder / "seed0.log.jsonl"
    path.write_text(path.read_text()[:-20])
    assert "seed0.log.jsonl is damaged" in failures(kept[1])["seeds"]
    with pytest.raises(ValueError, match="damaged"):
        _ = Log(path).events


def test_summary_sets_a_run_beside_the_records(kept, runs, capsys):
    assert records.main(["summary", str(runs["quick"][0])]) == 0
    shown = capsys.readouterr().out
    assert "target 3 reached" in shown and "001-baseline (n = 3)" in shown and "002-quick (n = 3)" in shown
    assert records.main(["summary", "nowhere"]) == 2
    assert records.main(["verify", "tiny/003"]) == 2
    assert "no record 'tiny/003'" in capsys.readouterr().err


REPORTS = [kept for kept in records.chosen([]) if isinstance(kept, Report)]


def test_committed_records_pass():
    """As `./run.sh records verify` in this checkout."""
    for record in records.chosen([]):
        if isinstance(record, Record):
            assert not failures(record), record.label


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.label)
def test_committed_reports_pass(report):
    found = verify.verdicts(report)
    assert [v.verdict for v in found] == ["pass"] * len(verify.REPORT_RULES), found


# ---------------------------------------------------------------- reports that were tampered with


def edit_row(number: int, **changes: str):
    """Change fields of a line of trials.csv."""

    def edit(folder: Path) -> None:
        with (folder / "trials.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        rows[number] |= changes
        with (folder / "trials.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    return edit


def drop_row(folder: Path) -> None:
    lines = (folder / "trials.csv").read_text().splitlines(keepends=True)
    (folder / "trials.csv").write_text("".join(lines[:-1]))


def twice(folder: Path) -> None:
    lines = (folder / "trials.csv").read_text().splitlines(keepends=True)
    (folder / "trials.csv").write_text("".join([*lines, lines[-1]]))


def edit_text(name: str, old: str, new: str):
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return edit


@pytest.mark.parametrize(
    ("tamper", "rule", "words"),
    [
        (edit_row(0, val_loss="1.1"), "trials", "the loss is 1.1, by curves.csv 1."),
        (edit_row(1, val_loss="1.1"), "statistics", ", by the trials "),
        (edit_row(0, process_time="1"), "statistics", "process_time"),
        (drop_row, "statistics", ", by the trials "),
        (twice, "trials", "loss and time of another trial"),
        (edit_text("README.md", "154x", "164x"), "words", "README.md is not what comparison.json gives"),
        (edit_text("comparison.json", '"n": 3', '"n": 5'), "statistics", ".n is 5, by the trials 3"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "files", "not part of a report: notes.txt"),
        (lambda folder: (folder / "curves.csv").unlink(), "files", "missing: curves.csv"),
        (edit_text("README.md", "# Comparison", "# /home/me/Comparison"), "files", "a path of a machine: /home/me/Comparison"),
        (lambda folder: (folder / "comparison.json").write_text("[]"), "files", "cannot be read"),
    ],
)  # fmt: skip
def test_tampering_with_a_report_is_found(tmp_path, tamper, rule, words):
    folder = tmp_path / "comparisons" / "cpu-ends"
    shutil.copytree(records.RECORDS / "comparisons" / "cpu-ends", folder)
    assert {v.verdict for v in verify.verdicts(Report(folder))} == {"pass"}
    tamper(folder)
    assert words in {v.rule: v.words for v in verify.verdicts(Report(folder)) if v.verdict == "fail"}[rule]


def test_a_seed_that_was_dropped_or_a_time_that_was_edited_is_found(tmp_path):
    """Also where the statistics were made again from what was left."""
    folder = tmp_path / "comparisons" / "cpu-small"
    shutil.copytree(records.RECORDS / "comparisons" / "cpu-small", folder)
    whole = (folder / "trials.csv").read_text()

    def broken(text: str) -> dict[str, str]:
        (folder / "trials.csv").write_text(text)
        kept = Report(folder)
        made = kept.kind.again(kept.summary, kept.rows) | {"plots": kept.summary["plots"]}
        (folder / "comparison.json").write_text(json.dumps(made))
        (folder / "README.md").write_text(kept.kind.markdown(made))
        return {v.rule: v.words for v in verify.verdicts(Report(folder)) if v.verdict == "fail"}

    lines = whole.splitlines(keepends=True)
    less = [line for line in lines if not line.startswith("confirm,+rope,192,2,2,")]
    assert len(less) == len(lines) - 1
    assert broken("".join(less)) == {"confirmed": "+rope: confirmed by the seeds [0, 1, 3, 4], not by 0 to 4"}
    (folder / "trials.csv").write_text(whole)
    for number, row in enumerate(csv.DictReader(whole.splitlines())):
        if row["arm"] == "+huge_ngrams":
            edit_row(number, train_time=str(0.7 * float(row["train_time"])))(folder)
    found = broken((folder / "trials.csv").read_text())
    assert list(found) == ["trials"] and "by curves.csv" in found["trials"] and "the time is" in found["trials"]
    assert not broken(whole)


def test_difference_says_where():
    there = {"a": [1.0, {"b": 2.0}], "c": None}
    assert difference(there, {"a": [1.0, {"b": 2.0 + 1e-9}], "c": None}) == ""
    assert difference(there, {"a": [1.0, {"b": 2.1}], "c": None}) == "a[1].b is 2.0, by the trials 2.1"
    assert difference(there, {"a": [1.0], "c": None}) == "a has 2 entries, by the trials 1"
    assert difference(there, {"a": [1.0, {"b": 2.0}]}) == "the top: c is not in both"
    assert difference(there, {"a": [1.0, {"b": 2.0}], "c": 0}) == "c is None, by the trials 0"
    assert difference({"x": True}, {"x": 1}) == ""
    assert difference({"x": math.inf}, {"x": math.inf}) == "" and difference({"x": 1.0}, {"x": math.inf})


def test_what_all_steps_gain_has_the_interval_of_all_their_pairs():
    found = records.of_track("cpu", "open")
    gained, against = records.gains(found), [r.about["against"] for r in found[1:]]
    assert (gained[0].low, gained[0].ratio, gained[0].high) == (1, 1, 1)
    assert gained[-1].ratio == pytest.approx(math.prod(a["ratio"] for a in against))
    wide = [math.log(g.high / g.low) for g in gained[1:]]
    assert wide[0] == pytest.approx(math.log(against[0]["high"] / against[0]["low"]), rel=1e-2)  # one step: its own
    assert wide[-1] > 1.5 * math.log(against[-1]["high"] / against[-1]["low"])
