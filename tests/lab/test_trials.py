"""Trials are real trainer processes on the tiny track: found again, tried again, refused in one line."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from shared import DATA_ROOT, ROOT, tiny

import train_gpt
from engine import run_folder
from engine.spec import UsageError
from lab import trials
from lab.runner import Runner, in_turn, read_curves
from lab.trials import Arm, Trial, train

FLAGS = ("--track", "tiny", "--val-tokens", "512", "--layers", "1", "--width", "32", "--batch-tokens", "256", "--dtype", "fp32")


@pytest.fixture
def here(tmp_path, monkeypatch, sotu):
    """Trials whose run folders stand in a temporary folder, over the tests' corpus."""
    monkeypatch.setattr(trials, "RUNS", tmp_path)
    return Arm("baseline", FLAGS)


def test_a_trial_is_trained_once_and_found_again(here, monkeypatch):
    trial, other = Trial(here, 3, 0), Trial(here, 3, 1)
    first = train(trial)
    assert first.result["steps"] == 3 and first.loss == first.result["val_loss"] < 7 and other.result is None
    assert trial.folder != other.folder and trial.log()[0]["event"] == "start" and trial.env()["dtype"] == "float32"
    monkeypatch.setattr(trials, "run_to_end", lambda *_: pytest.fail("it is there already"))
    assert train(trial).result == first.result
    monkeypatch.undo()
    (trial.folder / "result.json").write_text(json.dumps(first.result | {"val_loss": 99.0}))
    for again in (trial, dataclasses.replace(trial, extra=trials.ANEW)):  # changed, or wanted anew
        assert train(again).loss == pytest.approx(first.loss, rel=1e-3)
    with (trial.folder / "log.jsonl").open("a") as log:  # a line that is still being written
        log.write('{"event": "tr')
    assert trial.log()[-1]["event"] == "end"


def test_a_trial_that_another_experiment_is_at_is_waited_for(here, monkeypatch):
    trial, said = Trial(here, 3, 0), []
    trial.folder.mkdir(parents=True)
    holder = FileLock(trial.folder / "lock", thread_local=False)
    holder.acquire()

    def end() -> None:
        (trial.folder / "env.json").write_text(json.dumps({"source_sha256": run_folder.source_hash()}))
        (trial.folder / "result.json").write_text(json.dumps({"val_loss": 2.5}))
        holder.release()

    def run_to_end(*_) -> tuple[int, str]:
        said.append("begun")
        return 2, f"{trial.folder} is in use by process 1"

    monkeypatch.setattr(trials, "run_to_end", run_to_end)
    threading.Timer(0.3, end).start()
    assert train(trial).loss == 2.5 and not said  # nothing was started
    (trial.folder / "result.json").unlink()
    monkeypatch.setattr(trials, "run_to_end", lambda *_: run_to_end() if not said else (end(), (0, ""))[1])
    assert train(trial).loss == 2.5 and said == ["begun"]  # somebody was quicker: another look, no crash


def test_a_curve_that_a_full_disk_has_cut_is_read_without_its_last_line(tmp_path):
    runner, arm = Runner(tmp_path, False), Arm("a", ())
    log = [{"event": "val", "step": 1, "tokens": 8, "train_time": 0.5, "loss": 3.25}]
    row = dataclasses.make_dataclass("Row", ["arm", "seed", "phase"])("a", 0, "search")
    trial = dataclasses.make_dataclass("Trial", ["arm", "log"])(arm, lambda: log)
    curves = tmp_path / "curves.csv"
    runner.keep_curve(row, trial)
    whole = curves.read_text()
    curves.write_text(whole + "a,0,search,train,2")
    assert [point["loss"] for point in read_curves(curves)] == [3.25]
    runner.keep_curve(row, trial)
    assert curves.read_text() == whole + whole.splitlines()[1] + "\n"
    curves.write_text(whole + "a,0,search,train,2a,0,search,val,1,8,0.5,3.25\n")
    with pytest.raises(UsageError, match="line 3 is no point of a curve"):
        read_curves(curves)
    assert read_curves(tmp_path / "none.csv") == []


def test_jobs_are_done_side_by_side_until_one_is_interrupted():
    done, seen = [], []
    assert sorted(in_turn([3, 1, 2], lambda n: 10 * n, 2)) == [(1, 10), (2, 20), (3, 30)]

    def work(job: int) -> None:
        if job == 1:
            raise KeyboardInterrupt
        seen.append(trials.INTERRUPTED.wait(5 * (job > 1)))  # who is at work when job 1 is interrupted is told
        done.append(job)

    with pytest.raises(KeyboardInterrupt):
        list(in_turn(range(50), work, 1))
    assert not seen[0] and all(seen[1:]) and 49 not in done and not trials.INTERRUPTED.is_set()


@pytest.mark.slow
def test_the_source_of_a_run_is_all_that_it_imports(tmp_path, sotu):
    script = tmp_path / "imports.py"
    script.write_text(
        "import sys, train_gpt\ncode = train_gpt.main(sys.argv[1:])\n"
        "print('\\n'.join(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    words = [sys.executable, str(script), *tiny(tmp_path / "run", "--steps", "2")]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    files = {Path(line) for line in done.stderr.splitlines() if line.endswith(".py")}
    own = {path for path in files if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv")} - {script}
    assert ROOT / "train_gpt.py" in own and own <= set(run_folder.sources())


def test_a_trial_of_other_settings_is_another(here):
    assert Trial(here, 3, 0).folder != Trial(here, 4, 0).folder
    assert Trial(here, 3, 0).folder != Trial(Arm("lion", (*here.flags, "--optimizer", "lion")), 3, 0).folder
    for flags, message in ((("--tricks", "muno"), "unknown trick 'muno'"), (("--optimizer", "no.py:Thing"), "no.py")):
        with pytest.raises(UsageError, match=message):
            _ = Trial(Arm("typo", (*here.flags, *flags)), 3, 0).folder


@pytest.mark.slow
def test_a_crash_is_tried_again_and_then_reported(here, monkeypatch):
    """The trainer is another program here: a crash, a crash that a second try mends, a refusal."""
    real, calls, programs = trials.subprocess.Popen, [], []

    def popen(command, **kwargs):
        calls.append(command)
        return real([sys.executable, "-c", programs.pop(0)] if programs else command, **kwargs)

    monkeypatch.setattr(trials.subprocess, "Popen", popen)
    unlucky = "raise RuntimeError('out of luck')"
    programs += [unlucky, unlucky]
    outcome = train(Trial(here, 3, 0))
    assert (outcome.result, outcome.loss, outcome.error) == (None, float("inf"), "RuntimeError: out of luck") and len(
        calls
    ) == 2
    programs += ["import sys; sys.exit(2)"]
    assert train(Trial(here, 3, 0)).error == "exit code 2" and len(calls) == 3
    programs += ["import os; os.kill(os.getpid(), 9)"]
    outcome = train(Trial(here, 2, 5))
    assert len(calls) == 5 and outcome.result["steps"] == 2 and calls[-1][1] == "train_gpt.py"


def test_a_diverged_run_is_a_result(here):
    trial = Trial(Arm("diverged", (*here.flags, "--optimizer", "sgd:lr=1e30", "--clip", "0")), 6, 0)
    train_gpt.main([*trial.flags, "--data-root", str(DATA_ROOT), "--out", str(trial.folder)])  # in this process
    outcome = train(trial)
    assert outcome.result["status"] == "diverged" and outcome.loss == float("inf")
    assert json.loads((trial.folder / "result.json").read_text())["val_loss"] is None
