"""compare.py: from trials to verdicts. Most tests put a formula in the place of the trainer; one runs the real one."""

import dataclasses
import json
import math
import random
import shlex
import shutil
import signal
import types
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

import compare
import train_gpt
import tricks
from config import resolve
from engine import run_folder, spec
from lab import comparison, ledger, markdown, plots, runner, stats, trials
from lab.ledger import Row, read_rows
from lab.records import reports
from lab.records.judge import judge
from lab.trials import Outcome

FLAGS = ["--track", "tiny", "--val-tokens", "512", "--layers", "1", "--width", "32", "--batch-tokens", "256"]
ENV = {
    "cpu": "some CPU", "cpu_count": 2, "gpus": [], "world_size": 1, "threads": 2, "torch": "2.13.0",
    "commit": "0123456789abcdef", "dirty": False, "source_sha256": run_folder.source_hash(), "data_fingerprint": "a-b",
    "dtype": "float32",
}  # fmt: skip


ROW = dict.fromkeys((f.name for f in dataclasses.fields(Row)), 0) | {"val_loss": 2.0}
SAVE = plots.save


class FakeTrainer:
    """Writes the run folder that a trainer would have left: loss falls by 0.1 a doubling of the steps, each arm meets 3.0 at
    its own `horizon` and takes its own `pace` (seconds a step)."""

    def __init__(self, horizons: dict[str, float], paces: dict[str, float] | None = None, noise=0.003, time_noise=0.01):
        self.horizons, self.paces, self.noise, self.time_noise = horizons, paces or {}, noise, time_noise
        self.env, self.trained, self.crashes = dict(ENV), [], set()
        self.hours_ago = 0.0  # that trials end

    def __call__(self, trial, processes=1, threads=0):
        if trial.result is not None and trial.extra != trials.ANEW:
            return Outcome(trial, trial.result)
        name, steps = trial.arm.name, trial.steps
        self.trained.append((name, steps, trial.seed))
        if name in self.crashes:
            return Outcome(trial, None, "RuntimeError: out of memory")
        dice = random.Random(f"{name} {steps} {trial.seed}")
        right = self.horizons.get(name, math.inf)
        loss = 3.0 - 0.1 * math.log2(steps / right) + dice.gauss(0, self.noise) if 0 < right < math.inf else 4.0
        seconds = steps * self.paces.get(name, 0.1) * math.exp(dice.gauss(0, self.time_noise))
        result = {
            "status": "ok", "steps": steps, "val_loss": loss, "train_time": seconds, "robust_train_time": seconds * 0.99,
            "process_time": 2 * seconds, "tokens": 256 * steps, "flops_per_token": 1000, "peak_memory": 10**8, "stalled": False,
        }  # fmt: skip
        if right == -1:
            result |= {"status": "diverged", "val_loss": None}
        (trial.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (trial.folder / "checkpoints" / "weights").write_text("weights")
        (trial.folder / "env.json").write_text(json.dumps(self.env))
        times = [seconds * (i + 1) / steps for i in range(steps)]
        log = [
            dict(event="train", step=i + 1, tokens=256 * (i + 1), loss=3 + 1 / (i + 1), train_time=times[i])
            for i in range(steps)
        ]
        log.append(dict(event="val", step=steps, tokens=256 * steps, loss=result["val_loss"], train_time=seconds))
        ended = datetime.now(timezone.utc) - timedelta(hours=self.hours_ago)
        log.append(dict(event="end", status=result["status"], step=steps, utc=ended.strftime("%Y-%m-%dT%H:%M:%SZ")))
        (trial.folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
        (trial.folder / "result.json").write_text(json.dumps(result))
        return Outcome(trial, result)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(horizons, paces) replaces the trainer by a FakeTrainer. Pictures are not drawn."""
    monkeypatch.setattr(trials, "RUNS", tmp_path / "work")
    monkeypatch.setattr(plots, "save", lambda figure, folder, name, data: plots.pyplot().close(figure) or name)

    def install(*args, **kwargs):
        trainer = FakeTrainer(*args, **kwargs)
        monkeypatch.setattr(trials, "train", trainer)
        return trainer

    return install


def command(out, *flags, first="100"):
    return [*flags, "--track", "tiny", "--target", "3.0", "--first-steps", first, "--out", str(out), "--", *FLAGS[2:]]


def summary(out):
    return json.loads((out / "comparison.json").read_text())


def test_a_wide_interval_says_how_many_pairs_would_decide():
    """Of the user who had 2.98x (1.5-5.92), p = 0.018: no difference shown at 99 %, shown at 95 %."""
    wide = stats.paired_ratio([2.0, 2.6, 4.2], [1.0, 1.0, 1.0])
    said = comparison.judged(wide, wide.sd)
    assert said["verdict"] == "no difference shown" and wide.low > 1 and 3 < said["pairs"] < 12
    effect = math.log(wide.ratio) / wide.sd
    few, enough = (stats.power(n, effect, comparison.ALPHA, two_sided=True) for n in (said["pairs"] - 1, said["pairs"]))
    assert few < 0.9 <= enough
    words = comparison.in_words(said, vars(wide), "adamw") + comparison.pairs_words(said)
    assert (
        words.startswith("faster than adamw at 95 %, not at the 99 % asked for, 2.8x") and "pairs would show this one" in words
    )
    sure = stats.paired_ratio([2.0, 2.1, 2.05], [1.0, 1.0, 1.0])
    assert comparison.judged(sure, sure.sd) | {"smallest_difference": 0} == {
        "verdict": "faster", "smallest_difference": 0, "pairs": None
    }  # fmt: skip
    none = stats.paired_ratio([1.0, 1.1, 0.91], [1.0, 1.0, 1.0])
    assert comparison.judged(none, none.sd)["pairs"] is None
    assert comparison.in_words(comparison.judged(none, none.sd), vars(none), "adamw").startswith("no difference shown to adamw")


def test_a_path_of_this_machine_is_refused_before_anything_is_trained(capsys):
    for path in ("/somewhere/mine.py", "../mine.py"):
        assert compare.main(["--track", "tiny", "--optimizers", "adamw", f"{path}:Mine"]) == 2
        assert "is a path of this machine: put the file beside" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trick_that_halves_the_steps_is_found_faster(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "save", SAVE)
    trainer = fake({"baseline": 200, "+modern": 100, "+no_bias": 202}, {"+modern": 0.12}, noise=0.002)
    out = tmp_path / "c"
    assert compare.main(command(out, "--base", "baseline", "--tricks", "modern", "no_bias", "--seeds", "5")) == 0
    found = summary(out)
    modern, bias = found["ratios"]
    assert modern["verdict"] == "faster" and bias["verdict"] == "no difference shown"
    steps, time = modern["equal_loss"]["steps"], modern["equal_loss"]["train_time"]
    assert steps["ratio"] == pytest.approx(2, rel=0.05) and time["ratio"] == pytest.approx(2 / 1.2, rel=0.05)
    assert modern["confirmed"]["tokens"]["ratio"] == pytest.approx(modern["confirmed"]["steps"]["ratio"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("+modern: faster than baseline, ") and "n = 5 pairs" in lines[0]
    assert "would have been shown" in lines[1] and modern["steps"]["verdict"] == "faster" and "; faster, " in lines[0]
    # every confirming run is at one length with fresh seeds, and the arms take turns
    confirming = [t for t in trainer.trained if t[2] < 1000]
    assert [t[0] for t in confirming[:4]] == ["baseline", "+modern", "+no_bias", "baseline"]
    assert all(len({s for n, s, _ in confirming if n == name}) == 1 for name in trainer.horizons)
    assert all(arm["confirmed"]["met"] for arm in found["arms"])
    for name in ("trials.csv", "curves.csv", "README.md", "loss.png", "forest.png"):
        assert (out / name).stat().st_size > 100, name
    assert not list(tmp_path.glob("work/**/weights"))
    # the printed ratio is the one recomputed from trials.csv
    rows = read_rows(out / "trials.csv")
    again = comparison.compare([r for r in rows if r.arm == "baseline"], [r for r in rows if r.arm == "+modern"], 3.0)
    assert again["equal_loss"]["train_time"]["ratio"] == pytest.approx(time["ratio"], rel=1e-12)


def test_lengths_of_a_search_may_be_given(fake, tmp_path, capsys):
    """Beside confirming runs they give the slope that a ratio at equal loss needs; alone they are the whole search."""
    trainer = fake({"baseline": 200, "modern": 100}, noise=0.002)
    words = ["--recipes", "baseline", "modern", "--seeds", "3", "--horizon", "baseline=210"]
    words += ["--lengths", "baseline=180", "modern=105,90,90,105"]
    assert compare.main(command(tmp_path / "c", *words)) == 0
    searched = [t for t in trainer.trained if t[2] >= 1000]
    assert searched == [("baseline", 180, 1000), *(("modern", n, 1000 + i) for i, n in enumerate((105, 90, 90, 105)))]
    base, modern = summary(tmp_path / "c")["arms"]
    assert base["steps"] == 210 and base["why"] == "" and base["horizon"]["steps"] == pytest.approx(200, rel=0.05)
    assert modern["steps"] == pytest.approx(105, rel=0.05)  # the horizon and its margin
    (ratio,) = summary(tmp_path / "c")["ratios"]
    assert ratio["equal_loss"]["steps"]["ratio"] == pytest.approx(2, rel=0.05)
    capsys.readouterr()
    assert compare.main(command(tmp_path / "d", *words[:-1], "modern=105,105,105")) == 2
    assert "modern: fewer than three runs, or all of one length" in capsys.readouterr().err


@pytest.mark.slow
def test_a_given_length_says_which_loss_is_lower_and_nothing_about_time(fake, tmp_path, capsys, monkeypatch):
    """Labelled arms, no search; the rules of kept reports hold, and see through a summary that says otherwise."""
    trainer = fake({"adamw": 200, "fast": 100, "same": 200}, {"fast": 0.12}, noise=0.002)
    monkeypatch.setattr(plots, "save", SAVE)
    out = tmp_path / "comparisons" / "c"
    words = [
        "--optimizers",
        "adamw",
        "--arm",
        "fast=muon:lr=0.04",
        "--steps",
        "80",
        "--seeds",
        "4",
        "--arm",
        "same=adamw:lr=0.1",
    ]
    words = [*words, "--track", "tiny", "--target", "3.0", "--out", str(out), "--", *FLAGS[2:]]
    assert compare.main(words) == 0
    assert trainer.trained == [(name, 80, seed) for seed in range(4) for name in ("adamw", "fast", "same")]
    found, said = summary(out), capsys.readouterr().out
    fast, same = found["ratios"]
    assert found["steps"] == 80 and found["plots"] == ["loss"] and found["base"] == "adamw"
    assert (
        fast["loss"]["below"] == pytest.approx(0.1, abs=0.01)
        and fast["loss"]["verdict"] == "lower"
        and fast["loss"]["p"] < 1e-3
    )
    assert same["loss"]["verdict"] == "no difference shown" and not fast["confirmed"] and fast["verdict"] == "not decided"
    low, high = found["arms"][1]["confirmed"]["interval"]
    assert f"fast: after 80 steps loss {found['arms'][1]['confirmed']['mean']:.4f} ({low:.4f}-{high:.4f}), 0." in said
    assert "below adamw: lower, p = " in said and "adamw: after 80 steps loss 3.1" in said and "in wall-clock" not in said
    assert (
        "fast: not decided: the time to the target, since no search chose these lengths, and not confirmed at the target"
        in said
    )
    assert "--optimizer muon:lr=0.04" in (out / "README.md").read_text() and "| `fast` |" in (out / "README.md").read_text()
    broken = lambda: {v.rule: v.words for v in judge(reports.Report(out), reports.RULES) if v.verdict == "fail"}  # noqa: E731
    others = {
        "files",
        "runs",
        "settings",
        "curves",
        "data",
        "code",
    }  # which a stand-in for the trainer and a folder for tests cannot keep
    assert broken().keys() <= others
    for change, words_of in (({"steps": 90}, "steps is 90, by the command 80"), ({}, "arms ['adamw', 'fast', 'sane']")):
        changed = found | change
        changed["arms"] = [arm | {"name": arm["name"].replace("same", "same" if change else "sane")} for arm in found["arms"]]
        (out / "comparison.json").write_text(json.dumps(changed))
        assert words_of in broken()["command"]
    (out / "comparison.json").write_text(json.dumps(found))
    assert compare.main(["--report", str(out)]) == 0 and summary(out) == found
    # an arm's own length, and runs of several lengths beside it, lead back to verdicts on time
    words[words.index("--seeds") : words.index("--seeds")] = [
        "--horizon",
        "fast=110",
        "--lengths",
        "adamw=100,120,150",
        "fast=90",
    ]
    assert compare.main(words) == 0 and [arm["steps"] for arm in summary(out)["arms"]] == [80, 110, 80]
    assert "loss" not in (own := summary(out)["ratios"][0]) and own["verdict"] == "faster" and own["basis"] == "equal loss"
    none = comparison.loss_difference([(Row(**ROW), Row(**ROW))] * 3)
    assert none["p"] == 1 and none["verdict"] == "no difference shown"


def test_a_plan_says_what_is_left_and_writes_nothing(fake, tmp_path, capsys, monkeypatch):
    trainer, asked = fake({"baseline": 200, "modern": 100}), []
    monkeypatch.chdir(tmp_path)

    def predicted(arm, machine):
        asked.append(arm)
        return types.SimpleNamespace(config=resolve(list(arm.flags))[0], seconds=2.0)

    monkeypatch.setattr(compare, "predicted", predicted)
    words = command(tmp_path / "c", "--recipes", "baseline", "modern", "--seeds", "3", "--horizon", "baseline=60")
    assert compare.main(["--plan", "--json", *words]) == 0 and not trainer.trained and not list(tmp_path.iterdir())
    base, modern = json.loads(capsys.readouterr().out)
    assert (base["runs"], modern["runs"]) == ("3 x 60", "7 x 100 + 3 x 105")
    assert base["tokens"] == 3 * 60 * 256 and base["seconds"] == pytest.approx(2 * (180 + 5 * 3 * 512 / 3 / 256))
    assert [arm.flags[-4:] for arm in asked] == [("--steps", "60", "--seed", "2"), ("--steps", "105", "--seed", "2")]
    assert compare.main(words) == 0
    capsys.readouterr()
    assert compare.main(["--plan", *words]) == 0
    assert "| baseline | -" in (said := capsys.readouterr().out) and "about " in said and "one run at a time" in said


def test_interrupted_comparison_trains_nothing_twice(fake, tmp_path, monkeypatch):
    trainer = fake({"baseline": 200, "modern": 100})
    words = command(tmp_path / "c", "--recipes", "baseline", "modern", "--seeds", "3")
    whole = trainer.__call__

    def interrupted(trial, *args, **kwargs):
        if len(trainer.trained) == 14:
            raise KeyboardInterrupt
        return whole(trial)

    monkeypatch.setattr(trials, "train", interrupted)
    assert compare.main(words) == 130
    monkeypatch.setattr(trials, "train", trainer)
    assert compare.main(words) == 0
    assert len(trainer.trained) == len(set(trainer.trained)) > 14
    # the run folders are not needed: trials.csv is enough, on another machine or in a fresh clone
    monkeypatch.setattr(trials, "RUNS", tmp_path / "elsewhere")
    before = (tmp_path / "c" / "comparison.json").read_text()
    count = len(trainer.trained)
    assert compare.main(words) == 0 and len(trainer.trained) == count
    assert (tmp_path / "c" / "comparison.json").read_text() == before
    assert compare.main(["--report", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / "comparison.json").read_text() == before


def test_runs_of_an_earlier_plan_confirm_nothing_but_say_where_the_horizon_is(fake, tmp_path, monkeypatch):
    fake({"baseline": 200, "modern": 100})
    drawn = []
    monkeypatch.setattr(plots, "loss_curves", lambda names, curves, target: drawn.append(curves))
    words = ["--recipes", "baseline", "modern", "--seeds", "5", "--horizon", "baseline=215"]
    assert compare.main(command(tmp_path / "c", *words, "modern=150")) == 0
    assert compare.main(command(tmp_path / "c", *words, "modern=110")) == 0
    found = summary(tmp_path / "c")
    assert found["ratios"][0]["confirmed"]["steps"]["ratio"] == pytest.approx(215 / 110)
    assert [arm["confirmed"]["n"] for arm in found["arms"]] == [5, 5]
    base, modern = (arm["horizon"] for arm in found["arms"])
    assert base is None and modern["low"] < 100 < modern["high"] < 120, "the base ran at one length, the other at two"
    ends = [{(c["arm"], c["seed"], c["step"]) for c in curves if c["kind"] == "val"} for curves in drawn]
    plans = [{"baseline": 215, "modern": 150}, {"baseline": 215, "modern": 110}]
    assert ends == [{(name, seed, steps) for name, steps in plan.items() for seed in range(5)} for plan in plans]
    assert {c["steps"] for c in drawn[1] if c["kind"] == "train"} == {215, 110}


def test_runs_of_other_code_are_trained_anew(fake, tmp_path, monkeypatch):
    out = tmp_path / "out"
    trainer = fake({"baseline": 200, "modern": 100})
    words = command(out, "--recipes", "baseline", "modern", "--seeds", "3")
    assert compare.main(words) == 0
    trained = sorted(trainer.trained)
    trainer.trained.clear()
    monkeypatch.setattr(run_folder, "source_hash", lambda: "0" * 64)
    monkeypatch.setattr(runner, "source_hash", lambda: "0" * 64)
    trainer.env["source_sha256"] = "0" * 64
    assert compare.main(words) == 0
    assert sorted(trainer.trained) == trained
    assert {row.source for row in read_rows(out / "trials.csv")} == {"0" * 12}


def test_runs_of_other_settings_or_code_under_an_arms_name_are_left_out(fake, tmp_path, capsys, monkeypatch):
    """Flags after `--`, tuned settings and the trainer change what an arm's name stands for."""
    out, trainer = tmp_path / "c", fake({"baseline": 200, "modern": 100})
    drawn = []
    monkeypatch.setattr(plots, "loss_curves", lambda names, curves, target: drawn.append(curves))
    words = command(out, "--recipes", "baseline", "modern", "--seeds", "3", "--horizon", "baseline=215", "modern=110")
    assert compare.main([*words, "--clip", "0.5"]) == 0 and summary(out)["left_out"] == []
    first = {row.run for row in read_rows(out / "trials.csv")}
    trainer.horizons, trainer.paces = {"baseline": 199, "modern": 50}, {"baseline": 0.2, "modern": 0.2}
    assert compare.main(words) == 0
    found = summary(out)
    assert set(found["left_out"]) == first and [arm["runs"] for arm in found["arms"]] == [3, 3]
    assert found["ratios"][0]["n"] == 3 and found["arms"][1]["confirmed"]["mean"] < 2.9
    assert "6 trials in this folder are of other settings or other code: left out" in capsys.readouterr().out
    ends = [{(c["arm"], c["seed"], c["loss"]) for c in curves if c["kind"] == "val"} for curves in drawn]
    assert [len(seen) for seen in ends] == [6, 6] and not ends[0] & ends[1]
    assert compare.main(["--report", str(out)]) == 0 and summary(out) == found
    # other code: two seeds are trained anew, the third of the old code is not mixed in
    for module in (run_folder, runner):
        monkeypatch.setattr(module, "source_hash", lambda: "0" * 64)
    trainer.env["source_sha256"] = "0" * 64
    words[words.index("--seeds") + 1] = "2"
    assert compare.main(words) == 0
    assert [arm["runs"] for arm in summary(out)["arms"]] == [2, 2] and summary(out)["sources"] == ["0" * 12]


def test_baseline_that_set_the_target_need_not_be_below_it(fake, tmp_path):
    """tiny's baseline has 60 steps: at that length its mean is compared with the target, not tested against it."""
    fake({"baseline": 60 / 2**0.01, "modern": 30}, noise=0.003)
    words = ["--recipes", "baseline", "modern", "--seeds", "4", "--out", str(tmp_path / "c"), "--track", "tiny"]
    assert compare.main([*words, "--horizon", "baseline=60", "modern=35", "--", *FLAGS[2:]]) == 0
    base, arm = summary(tmp_path / "c")["arms"]
    assert base["confirmed"]["p"] > 0.01 and base["confirmed"]["met"] and arm["confirmed"]["met"]
    assert summary(tmp_path / "c")["ratios"][0]["verdict"] == "faster"


def test_crashed_trials_are_tried_again_next_time(fake, tmp_path, capsys):
    trainer = fake({"baseline": 200, "modern": 100})
    words = command(
        tmp_path / "c", "--recipes", "baseline", "modern", "--seeds", "5", "--horizon", "baseline=215", "modern=110"
    )
    trainer.crashes = {"modern"}
    assert compare.main(words) == 0
    (ratio,) = summary(tmp_path / "c")["ratios"]
    assert ratio["verdict"] == "not decided" and "out of memory" in capsys.readouterr().out
    trainer.crashes = set()
    assert compare.main(words) == 0
    (ratio,) = summary(tmp_path / "c")["ratios"]
    assert ratio["verdict"] == "faster" and ratio["basis"] == "confirmed runs"


def test_the_runs_of_a_turn_lie_together(fake, tmp_path, capsys):
    """Those of an interrupted turn, or of another comparison, are trained again where the others would be hours later."""
    trainer = fake({"baseline": 200, "modern": 100, "muon": 110})
    given = ["baseline=215", "modern=110", "muon=120"]
    words = lambda out, other, seeds: command(  # noqa: E731
        tmp_path / out, "--recipes", "baseline", other, "--seeds", seeds, "--horizon", given[0], given[1 + (other == "muon")]
    )
    trainer.hours_ago = 9.0
    assert compare.main(words("c", "modern", "3")) == 0
    trainer.hours_ago = 0.0
    trainer.trained.clear()
    assert compare.main(words("c", "modern", "3")) == 0 and not trainer.trained, "complete turns stay"
    assert compare.main(words("d", "modern", "3")) == 0 and not trainer.trained, "also where they are found"
    # the baseline's runs of nine hours ago are no partners for another arm's of now
    assert compare.main(words("e", "muon", "2")) == 0
    assert trainer.trained == [("baseline", 215, 0), ("muon", 120, 0), ("baseline", 215, 1), ("muon", 120, 1)]
    assert "2 trials ended over an hour ago" in capsys.readouterr().out
    assert ledger.turns_apart(read_rows(tmp_path / "e" / "trials.csv")) == []
    # a turn that was interrupted nine hours ago
    trainer.trained.clear()
    path = tmp_path / "c" / "trials.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    for folder in (tmp_path / "work" / "runs" / "tiny").glob("modern-*-s2-*"):
        shutil.rmtree(folder)
    assert compare.main(words("c", "modern", "3")) == 0
    assert trainer.trained == [("baseline", 215, 2), ("modern", 110, 2)] and "apart" not in summary(tmp_path / "c")


def test_turns_that_lie_apart_are_told_and_are_no_evidence(fake, tmp_path, capsys):
    trainer, out = fake({"baseline": 200, "modern": 100}), tmp_path / "comparisons" / "c"
    words = command(out, "--recipes", "baseline", "modern", "--seeds", "3", "--horizon", "baseline=215", "modern=110")
    assert compare.main(words) == 0
    verdict = lambda: next(v for v in judge(reports.Report(out), reports.RULES) if v.rule == "confirmed")  # noqa: E731
    assert verdict().verdict == "pass"
    path = out / "trials.csv"
    row = next(row for row in read_rows(path) if (row.arm, row.seed) == ("modern", 1))
    early = (ledger.moment(row.ended) - timedelta(hours=9)).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [line.replace(row.ended, early) if row.run in line else line for line in path.read_text().splitlines(keepends=True)]
    path.write_text("".join(lines))
    assert compare.main(["--report", str(out)]) == 0
    assert (
        "pair 1 lies 9.0 hours apart" in capsys.readouterr().out and "lies 9.0 hours apart" in (out / "README.md").read_text()
    )
    assert verdict().verdict == "fail" and "pair 1 lies 9.0 hours apart" in verdict().words
    trainer.trained.clear()
    assert compare.main(words) == 0 and trainer.trained == [("modern", 110, 1)] and verdict().verdict == "pass"


def test_neighbours_in_a_turn_need_not_be_near_its_ends():
    rows = rows_of("a", 200, 0.1, np.random.default_rng(0))[-4:]
    at = lambda hours: [  # noqa: E731
        dataclasses.replace(row, pair=0, train_time=1800.0, ended=f"2026-01-01T{hour:02d}:00:00Z")
        for row, hour in zip(rows, hours, strict=True)
    ]
    assert ledger.hours_apart(at([1, 2, 3, 4])) == 0.5 and not ledger.turns_apart(at([4, 2, 1, 3]))
    assert ledger.turns_apart(at([1, 2, 5, 6])) == [{"pair": 0, "hours": 2.5}]


def test_chain_is_set_against_its_base_and_its_predecessor(fake, tmp_path):
    fake({"baseline": 400, "+modern": 200, "+muon": 100})
    out = tmp_path / "c"
    assert compare.main(command(out, "--chain", "modern", "muon", "--seeds", "3", "--max-steps", "1600")) == 0
    found = summary(out)
    assert [(r["base"], r["arm"]) for r in found["ratios"]] == [
        ("baseline", "+modern"), ("baseline", "+muon"), ("+modern", "+muon"),
    ]  # fmt: skip
    for ratio, right in zip(found["ratios"], (2, 4, 2), strict=True):
        assert ratio["equal_loss"]["steps"]["ratio"] == pytest.approx(right, rel=0.05)
    assert found["plots"] == ["loss", "forest"]


def test_what_is_left_out_is_searched_from_the_length_of_the_stack(fake, tmp_path):
    trainer = fake({"modern,muon": 100, "-muon": 150})
    words = ["--base", "modern,muon", "--leave-out", "muon", "--horizon", "modern,muon=110", "--seeds", "3"]
    words += ["--track", "tiny", "--target", "3.0", "--out", str(tmp_path / "c"), "--", *FLAGS[2:]]
    assert compare.main(words) == 0
    assert next(steps for name, steps, _ in trainer.trained if name == "-muon") == 110
    assert summary(tmp_path / "c")["ratios"][0]["confirmed"]["steps"]["ratio"] == pytest.approx(110 / 157, rel=0.1)


def test_a_recipe_against_itself(fake, tmp_path):
    fake({"modern": 200, "modern again": 200})
    out = tmp_path / "c"
    assert compare.main(command(out, "--again", "modern", "--seeds", "4", "--max-steps", "800")) == 0
    (ratio,) = summary(out)["ratios"]
    assert ratio["verdict"] == "no difference shown" and ratio["n"] == 4
    seeds = [{r.seed for r in read_rows(out / "trials.csv") if r.arm == arm} for arm in ("modern", "modern again")]
    assert not seeds[0] & seeds[1]


def test_target_out_of_reach(fake, tmp_path, capsys, monkeypatch):
    fake({"baseline": 200, "modern": math.inf, "muon": -1})
    out = tmp_path / "c"
    assert compare.main(command(out, "--recipes", "baseline", "modern", "muon", "--max-steps", "800")) == 2
    error = capsys.readouterr().err
    assert "modern: did not reach the target within 800 steps" in error and "trials are kept" in error
    assert (out / "trials.csv").exists() and "did not reach" in (out / "README.md").read_text()
    monkeypatch.setattr(trials, "RUNS", tmp_path / "elsewhere")
    fake({"baseline": 200, "modern": 100, "muon": -1})
    assert compare.main(command(tmp_path / "d", "--recipes", "baseline", "modern", "muon", "--max-steps", "800")) == 0
    lines = capsys.readouterr().out
    assert "muon: did not reach the target within 800 steps" in lines and "modern: faster" in lines


def test_runs_without_any_variance(fake, tmp_path):
    fake({"baseline": 200, "modern": 100}, noise=0, time_noise=0)
    out = tmp_path / "c"
    assert compare.main(command(out, "--recipes", "baseline", "modern")) == 0
    (ratio,) = summary(out)["ratios"]
    assert ratio["equal_loss"]["steps"]["ratio"] == pytest.approx(2, rel=1e-6) and ratio["verdict"] == "faster"


def test_two_machines_or_two_corpora_are_refused(fake, tmp_path, capsys):
    trainer = fake({"baseline": 200, "modern": 100})

    def words(seeds, *flags):
        given = ("--horizon", "baseline=210", "modern=110")
        return command(tmp_path / "c", "--recipes", "baseline", "modern", *given, "--seeds", seeds, *flags)

    assert compare.main(words("2")) == 0
    trainer.env["cpu"] = "another CPU"
    assert compare.main(words("4")) == 2
    assert "add --allow-mixed" in capsys.readouterr().err
    assert compare.main(words("4", "--allow-mixed")) == 0
    assert len(summary(tmp_path / "c")["machines"]) == 2
    trainer.env["data_fingerprint"] = "a-c"
    assert compare.main(words("5", "--allow-mixed")) == 2
    assert "different data" in capsys.readouterr().err


def test_two_compute_types_are_refused_before_anything_is_kept(fake, tmp_path, capsys):
    """The same processor may have bf16 in one virtual machine and not in the next, and the losses differ."""
    trainer = fake({"baseline": 200, "modern": 100})
    out = tmp_path / "c"

    def words(seeds, *flags):
        return command(
            out, "--recipes", "baseline", "modern", "--horizon", "baseline=210", "modern=110", "--seeds", seeds, *flags
        )

    assert compare.main(words("2")) == 0
    assert summary(out)["dtype"] == "fp32" and "torch 2.13.0, in fp32. Source:" in (out / "README.md").read_text()
    before = (out / "trials.csv").read_text()
    trainer.env["dtype"] = "bfloat16"
    capsys.readouterr()
    assert compare.main(words("3", "--allow-mixed")) == 2
    err = capsys.readouterr().err
    assert "their losses do not compare" in err and "--dtype fp32" in err and err.count("\n") == 1
    assert (out / "trials.csv").read_text() == before
    rows = read_rows(out / "trials.csv")
    with pytest.raises(spec.UsageError, match="in bf16 and in fp32"):
        comparison.again(summary(out), [dataclasses.replace(rows[0], dtype="bf16"), *rows[1:]])
    old = [line.rsplit(",", 1)[0] for line in before.splitlines()]  # as files were before the column
    (out / "trials.csv").write_text("\n".join(old) + "\n")
    assert "dtype" not in comparison.again(summary(out), read_rows(out / "trials.csv"))
    assert compare.main(["--report", str(out)]) == 0 and "torch 2.13.0. Source:" in (out / "README.md").read_text()


def test_full_disk_is_one_line_and_loses_no_trial(fake, tmp_path, capsys, monkeypatch):
    trainer = fake({"baseline": 200, "modern": 100})
    words = command(tmp_path / "c", "--recipes", "baseline", "modern", "--seeds", "2")
    write = ledger.atomic_write

    def full(path, text):
        if text.count("\n") > 8:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(ledger, "atomic_write", full)
    assert compare.main(words) == 2
    assert "no space left" in capsys.readouterr().err and len(read_rows(tmp_path / "c" / "trials.csv")) == 7
    monkeypatch.setattr(ledger, "atomic_write", write)
    assert compare.main(words) == 0
    assert len(trainer.trained) == len(set(trainer.trained))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "modern"], "compare what?"),
        (["--tricks", "muno"], "unknown trick 'muno': did you mean 'muon'?"),
        (["--recipes", "baseline"], "one arm is no comparison"),
        (["--recipes", "modern,muon", "modern,muon"], "are the same settings"),
        (["--base", "record", "--leave-out", "smear"], "it is not in record"),
        (["--tricks", "muon", "--seeds", "1"], "one run has no variance"),
        (["--tricks", "muon", "--horizon", "muon"], "ARM=STEPS"),
        (["--tricks", "muon", "--horizon", "muon=20"], "there is no such arm: did you mean '+muon'?"),
        (["--tricks", "muon", "--horizon", "modern=20,30"], "such as baseline=2400; not 'modern=20,30'"),
        (["--tricks", "muon", "--lengths", "+muon=20,"], "such as baseline=2400,2000; not '+muon=20,'"),
        (["--tricks", "muon", "--lengths", "muon=20,30"], "--lengths muon: there is no such arm: did you mean '+muon'?"),
        (["--tricks", "muon", "--side-by-side", "0"], "must be at least 1"),
        (["--tricks", "muon", "--launcher", "slurm"], "invalid choice"),
        (["--optimizers", "adamw", "muno"], "unknown optimizer 'muno'"),
        (["--tricks", "muon", "--tuned-on", "wiki"], "--tuned-on goes with --optimizers"),
        (["--optimizers", "adamw", "muon", "--tuned-on", "wikki"], "nothing was tuned for it: did you mean 'wiki'?"),
        (["--tricks", "muon", "--track", "tniy"], "unknown track 'tniy'"),
        (["--report", "nowhere"], "holds no experiment"),
        (["--tricks", "muon", "--steps", "20", "--max-steps", "30"], "--steps is the length of all runs: leave out"),
        (["--tricks", "muon", "--steps", "20", "--", "--steps", "30"], "and the --steps after --"),
        (["--tricks", "muon", "--steps", "-1"], "--steps must be at least 0"),
        (["--tricks", "muon", "--arm", "fast=muon"], "not allowed with argument --tricks"),
        (["--optimizers", "adamw", "--arm", "fast=muno"], "unknown optimizer 'muno'"),
        (["--arm", "a=adamw", "b=adamw"], "'b' and 'a' are the same settings"),
        (["--arm", "a=adamw", "a=muon"], "two arms have the same name"),
        (["--arm", "a=adamw", "b=/x/mine.py:Mine"], "is a path of this machine"),
        (["--tricks", "muon", "--", "--layres", "2"], "unknown flag --layres: did you mean '--layers'?"),
    ],
)
def test_bad_input_is_one_line(fake, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    trainer = fake({})
    assert compare.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not trainer.trained
    assert not (tmp_path / "comparisons").exists()


def test_an_optimizer_that_was_not_tuned_is_one_line(fake, tmp_path, capsys, monkeypatch):
    kept = json.loads(tricks.TUNED.read_text())["wiki"]
    (tmp_path / "tuned.json").write_text(json.dumps({"wiki": {name: kept[name] for name in ("adamw", "soap")}}))
    monkeypatch.setattr(tricks, "TUNED", tmp_path / "tuned.json")
    monkeypatch.chdir(tmp_path)
    trainer = fake({})
    assert compare.main(["--optimizers", "adamw", "lion", "--tuned-on", "wiki"]) == 2
    error = capsys.readouterr().err
    assert "--tuned-on wiki: 'lion' was not tuned for it" in error and error.count("\n") == 1 and not trainer.trained
    assert not (tmp_path / "comparisons").exists()


def test_folder_of_something_else_is_left_alone(fake, tmp_path, capsys):
    fake({"baseline": 200, "modern": 100, "muon": 50})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    assert compare.main(command(tmp_path / "c", "--recipes", "baseline", "modern")) == 2
    assert "holds no comparison.json" in capsys.readouterr().err
    assert compare.main(command(tmp_path / "d", "--recipes", "baseline", "modern")) == 0
    assert compare.main(command(tmp_path / "d", "--recipes", "muon", "modern")) == 2
    assert "holds a comparison.json with base 'baseline'" in capsys.readouterr().err


def test_schedule_free_arms_run_at_a_constant_rate():
    words = ["--optimizers", "adamw", "schedule_free_adamw"]
    for more, schedule in ([], "cosine:warmup=100"), (["--", "--schedule", "wsd"], "wsd"):
        arms = compare.make_arms(compare.parse(words + more))
        assert [resolve(list(arm.flags))[0].schedule for arm in arms] == [schedule, "constant"]


def test_a_comparison_of_optimizers_says_how_each_is_trained(fake, tmp_path):
    fake({"adamw": 200, "schedule_free_adamw": 100})
    words = ["--optimizers", "adamw", "schedule_free_adamw", "--seeds", "3"]
    words += ["--horizon", "adamw=215", "schedule_free_adamw=110"]
    assert compare.main([*words, "--tuned-on", "wiki", "--target", "3.0", "--out", str(tmp_path / "c")]) == 0
    told = [
        line.split("`")[1::2] for line in (tmp_path / "c" / "README.md").read_text().splitlines() if "./run.sh train" in line
    ]
    assert "the same command takes those of today" in (tmp_path / "c" / "README.md").read_text()
    assert [name for name, _ in told] == ["adamw", "schedule_free_adamw"]
    for (name, line), steps in zip(told, (215, 110), strict=True):
        config = resolve(shlex.split(line)[2:])[0]
        assert (config.optimizer, config.schedule) == tuple(json.loads(tricks.TUNED.read_text())["wiki"][name].values())[:2]
        assert config.steps == steps and line.count("--schedule") == 1


def test_arms_take_what_was_tuned_on_a_workload():
    best = json.loads(tricks.TUNED.read_text())["bytes-large"]
    words = ["--optimizers", "adamw", "muon:momentum=0.9", "schedule_free_adamw", "--tuned-on", "bytes-large"]
    adamw, muon, free = (resolve(list(arm.flags))[0] for arm in compare.make_arms(compare.parse(words)))
    assert (adamw.optimizer, adamw.schedule) == (best["adamw"]["optimizer"], best["adamw"]["schedule"])
    assert (free.optimizer, free.schedule) == (best["schedule_free_adamw"]["optimizer"], "constant")
    keys = spec.split(best["muon"]["optimizer"])[1] | {"momentum": "0.9"}
    assert spec.split(muon.optimizer)[1] == keys and muon.schedule == best["muon"]["schedule"]


def test_names_of_others_are_text():
    """No formula in a picture, no tag in a page."""
    assert plots.short("a$^$b") == r"a\$^\$b"
    assert "| &lt;img src=x> x <- 1 \\| 2 |" in markdown.table(["name"], [["<img src=x> x <- 1 | 2"]])


@pytest.mark.parametrize(
    ("low", "high", "least", "most"),
    [(0.77, 205, 4, 8), (0.52, 4.2, 5, 8), (0.1, 2000, 3, 9), (0.9, 1.3, 3, 9), (1e-5, 1e9, 3, 9)],
)
def test_ticks_of_a_logarithmic_axis_are_few_and_apart(low, high, least, most):
    _, axis = plots.pyplot().subplots()
    axis.set(xscale="log", xlim=(low, high))
    plots.log_ticks(axis.xaxis, low, high)
    ticks = axis.get_xticks()
    assert least <= len(ticks) <= most and not len(axis.get_xticks(minor=True))
    assert np.diff(np.log(ticks)).min() > 0.04 * np.log(high / low)
    plots.pyplot().close()


def test_a_horizon_without_an_end_is_none():
    rows = rows_of("a", 200, 0.1, np.random.default_rng(0))
    row = rows[-1]
    at = lambda pairs: [dataclasses.replace(row, steps=s, val_loss=loss) for s, loss in pairs]  # noqa: E731
    steep = [(150, 3.046), (172, 3.020), (172, 3.022), (172, 3.021)]
    assert math.isfinite(comparison.horizon(at(steep), 3.03).high)
    scattered = [(150, 3.046), (172, 3.020), (172, 3.031), (172, 3.023)]
    lengths, losses = zip(*scattered, strict=True)
    assert math.isinf(stats.horizon(lengths, losses, 3.03).high) and comparison.horizon(at(scattered), 3.03) is None


def test_two_pairs_show_nothing():
    """However well they agree; a ratio is given, and no verdict."""
    rng = np.random.default_rng(0)
    both = {n: [rows_of("a", 200, 0.10, rng, seeds=n), rows_of("b", 100, 0.10, rng, seeds=n)] for n in (2, 3)}
    two, three = (comparison.compare(*both[n], 3.03) for n in (2, 3))
    assert two["verdict"] == "not decided" and "2 pairs" in two["why"] and two["equal_loss"]["steps"]["ratio"] > 1.5
    assert three["verdict"] == "faster"


# ---------------------------------------------------------------- the rate of wrong verdicts


def rows_of(name: str, right: float, pace: float, rng, noise=0.003, time_noise=0.02, seeds=5) -> list[Row]:
    """An arm as compare.py leaves it: a search, then confirming runs at the length that the search gave."""

    def row(phase: str, steps: int, seed: int) -> Row:
        loss = 3.0 - 0.1 * math.log2(steps / right) + rng.normal(0, noise)
        seconds = steps * pace * math.exp(rng.normal(0, time_noise))
        return Row(phase, name, steps, seed, seed, f"{name} {steps} {seed}", "ok", loss, seconds, seconds, seconds, 256 * steps,
                   1e3 * steps, 1, False, "", "m", "c", "s", "d")  # fmt: skip

    rows: list[Row] = []

    def run(steps: int, seed: int) -> float:
        rows.append(row("search", steps, seed))
        return rows[-1].val_loss

    found = compare.search(run, 200, 3.0, 3200).found
    if found is None:
        return []
    return rows + [row("confirm", math.ceil(found.steps * 1.05), seed) for seed in range(seeds)]


@pytest.mark.slow
def test_two_arms_that_are_one_recipe_come_out_as_no_different(monkeypatch):
    """A/A: 5 % of 1,000 comparisons have p < 0.05, and 1 % are called faster or slower."""
    monkeypatch.setattr(stats, "smallest_difference", lambda *_: 0.0)  # most of the time, and no verdict depends on it
    rng, values, verdicts = np.random.default_rng(1), [], []
    for _ in range(1000):
        base, arm = rows_of("a", 210, 0.1, rng), rows_of("b", 210, 0.1, rng)
        found = comparison.compare(base, arm, 3.0)
        values.append(found["equal_loss"]["train_time"]["p"])
        verdicts.append(found["verdict"])
    assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.015)
    assert np.mean([v != "no difference shown" for v in verdicts]) < 0.02


@pytest.mark.slow
def test_a_true_ratio_is_covered_and_found(monkeypatch):
    monkeypatch.setattr(stats, "smallest_difference", lambda *_: 0.0)
    rng, covered, faster = np.random.default_rng(2), [], []
    for _ in range(400):
        found = comparison.compare(rows_of("a", 260, 0.1, rng), rows_of("b", 200, 0.11, rng), 3.0)
        r = found["equal_loss"]["train_time"]
        covered.append(r["low"] < 26 / 22 < r["high"])
        faster.append(found["verdict"] == "faster")
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03) and np.mean(faster) > 0.9


@pytest.mark.slow
def test_smallest_difference_is_found_at_the_stated_chance(monkeypatch):
    """What a verdict of `no difference shown` says it would have shown, is shown by 90 % of comparisons."""
    rng = np.random.default_rng(3)
    said = [comparison.compare(rows_of("a", 210, 0.1, rng), rows_of("b", 210, 0.1, rng), 3.0) for _ in range(100)]
    smallest = float(np.median([s["smallest_difference"] for s in said]))
    monkeypatch.setattr(stats, "smallest_difference", lambda *_: 0.0)
    found = [
        comparison.compare(rows_of("a", 210 * (1 + smallest), 0.1, rng), rows_of("b", 210, 0.1, rng), 3.0)["verdict"]
        for _ in range(300)
    ]
    assert np.mean([v == "faster" for v in found]) == pytest.approx(0.9, abs=0.08)


def test_seeds_come_from_the_measured_variance():
    search = lambda sd: compare.Search((), stats.Horizon(200, 190, 210, -0.1, sd, 0.01, 4))  # noqa: E731
    gap = 0.1 * math.log2(1.05)
    for sd in (0.001, 0.002, 0.003):
        n = compare.seeds_needed({"a": search(sd)})
        assert n in (compare.LEAST_SEEDS, compare.MOST_SEEDS) or stats.power(n, gap / sd, 0.01) >= 0.9 > stats.power(
            n - 1, gap / sd, 0.01
        )
    assert compare.seeds_needed({"a": search(0.0001)}) < compare.seeds_needed({"a": search(0.003)})


# ---------------------------------------------------------------- the real trainer


@pytest.mark.slow
def test_real_trials(tmp_path, monkeypatch, sotu):
    """The trainer in this process: test_trials.py has what starts it as a process."""

    def train(trial, *_, **__):
        assert train_gpt.main([*trial.flags, "--checkpoint-minutes", "0", "--out", str(trial.folder)]) == 0
        return Outcome(trial, trial.result)

    monkeypatch.setattr(trials, "train", train)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which only a main thread may call
    monkeypatch.setattr(trials, "RUNS", tmp_path / "work")
    out = tmp_path / "c"
    words = ["--recipes", "baseline", "modern", "--target", "7", "--horizon", "baseline=3", "modern=2", "--seeds", "2"]
    assert compare.main([*words, "--track", "tiny", "--out", str(out), "--", *FLAGS[2:]]) == 0
    (ratio,) = summary(out)["ratios"]
    assert ratio["n"] == 2 and ratio["confirmed"]["steps"]["ratio"] == pytest.approx(1.5)
    rows = read_rows(out / "trials.csv")
    assert {(r.arm, r.seed) for r in rows} == {(a, s) for a in ("baseline", "modern") for s in (0, 1)}
    assert all(r.status == "ok" and r.train_time > 0 and len(r.source) == 12 and "cores" in r.machine for r in rows)


@pytest.mark.slow
def test_ray(tmp_path, monkeypatch, sotu):
    """A real Ray: one trial of a comparison's launcher on a worker."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(trials, "RUNS", tmp_path / "work")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": trials.RAY_ENVIRONMENT})
    try:
        launch, at_once = runner.make_launcher(compare.parse(["--again", "baseline", "--launcher", "ray"]), side_by_side=False)
        trial = trials.Trial(trials.Arm("baseline", tuple(FLAGS)), 2, 7)
        assert trial.folder.is_relative_to(tmp_path)  # which goes with it
        outcome = launch(trial)
        assert trial.result == outcome.result and outcome.result["steps"] == 2 and math.isfinite(outcome.loss)
        assert at_once > 1
    finally:
        ray.shutdown()
