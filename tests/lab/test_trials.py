"""Trials are real trainer processes on the tiny track: found again, tried again, refused in one line."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, launch

from engine import run_folder
from engine.spec import UsageError
from lab import trials
from lab.trials import Arm, Trial, in_turn, train

FLAGS = ("--track", "tiny", "--val-tokens", "512", "--layers", "1", "--width", "32", "--batch-tokens", "256")


def run(wanted):
    return list(in_turn(wanted, train))


@pytest.fixture
def here(tmp_path, monkeypatch, sotu):
    """Trials whose run folders stand in a temporary folder, over the tests' corpus."""
    monkeypatch.setattr(trials, "RUNS", tmp_path)
    return Arm("baseline", FLAGS)


def test_a_trial_is_trained_once_and_found_again(here):
    wanted = [Trial(here, 3, seed) for seed in (0, 1)]
    first, second = run(wanted)
    assert first.result["steps"] == 3 and first.loss == first.result["val_loss"] < 7
    assert first.trial.folder != second.trial.folder and first.loss != second.loss
    assert first.trial.log()[0]["event"] == "start"
    ended = [o.trial.log()[-1] for o in (first, second)]
    again = run(wanted)
    assert [o.loss for o in again] == [first.loss, second.loss] and [o.trial.log()[-1] for o in again] == ended
    marked = first.trial.folder / "result.json"
    marked.write_text(json.dumps(first.result | {"val_loss": 99.0}))
    assert run(wanted)[0].loss == 99
    assert run([dataclasses.replace(wanted[0], extra=trials.ANEW)])[0].loss == pytest.approx(first.loss, rel=1e-3)


def test_the_source_of_a_run_is_all_that_it_imports(tmp_path, sotu):
    script = tmp_path / "imports.py"
    script.write_text(
        "import sys, train_gpt\ncode = train_gpt.main(sys.argv[1:])\n"
        "print('\\n'.join(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    process = launch(0, tmp_path / "run", "--steps", "2", "--val-tokens", "512", script=script)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    files = {Path(line) for line in errors.splitlines() if line.endswith(".py")}
    own = {path for path in files if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv")} - {script}
    assert ROOT / "train_gpt.py" in own
    assert own <= set(run_folder.sources())
    assert all((ROOT / name).exists() for name in run_folder.TOOLS)


def test_a_trial_of_other_settings_is_another(here):
    assert Trial(here, 3, 0).folder != Trial(here, 4, 0).folder
    assert Trial(here, 3, 0).folder != Trial(Arm("lion", (*here.flags, "--optimizer", "lion")), 3, 0).folder
    with pytest.raises(UsageError, match="unknown trick 'muno'"):
        _ = Trial(Arm("typo", (*here.flags, "--tricks", "muno")), 3, 0).folder


BROKEN = """
import torch


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("out of luck")
"""


def test_a_crash_is_tried_again_from_its_checkpoint_and_then_reported(here, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    arm = Arm("crash", (*here.flags, "--optimizer", f"{tmp_path / 'broken.py'}:Broken"))
    (outcome,) = run([Trial(arm, 3, 0)])
    assert outcome.result is None and outcome.loss == float("inf") and outcome.error == "RuntimeError: out of luck"
    refused = Trial(Arm("no file", (*here.flags, "--optimizer", "no_such_file.py:Thing")), 3, 0)
    with pytest.raises(UsageError, match="no_such_file"):
        _ = refused.folder

    calls = []

    def killed(command, **kwargs):
        calls.append(command)
        if len(calls) == 1:
            command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        return real(command, **kwargs)

    real = trials.subprocess.Popen
    monkeypatch.setattr(trials.subprocess, "Popen", killed)
    (outcome,) = run([Trial(here, 2, 5)])
    assert len(calls) == 2 and outcome.result["steps"] == 2


def test_a_trial_that_is_watched_ends_when_the_watcher_says_so(here):
    asked = []
    trial = Trial(Arm("long", (*here.flags, "--val-every", "1")), 100_000, 0)
    outcome = trials.train(trial, watch=lambda trial: asked.append(trial) or (trial.folder / "log.jsonl").exists() is False)
    assert outcome.result is None and outcome.error == trials.PRUNED and asked and not (trial.folder / "result.json").exists()


def test_a_diverged_run_is_a_result(here):
    arm = Arm("diverged", (*here.flags, "--optimizer", "sgd:lr=1e30", "--clip", "0"))
    (outcome,) = run([Trial(arm, 6, 0)])
    assert outcome.result["status"] == "diverged" and outcome.loss == float("inf")
    assert json.loads((outcome.trial.folder / "result.json").read_text())["val_loss"] is None
