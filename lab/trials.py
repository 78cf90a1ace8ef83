"""Trials: one arm with one seed at one length, each a trainer process. A trial that has ended is found again by the hash of its
settings in the name of its run folder, whatever stopped the experiment.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from config import resolve
from engine import run_folder
from engine.run_folder import ROOT
from engine.spec import UsageError, optional

RAY_ENVIRONMENT = {"PYTHONPATH": str(ROOT)}  # of its workers: they import this module
RUNS = ROOT  # what the default run folders, runs/<track>/..., are relative to


def whole_lines(path: Path) -> str:
    """The text of a file without a last line that is being written or was cut by a full disk; empty without a file."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return text[: text.rfind("\n") + 1]


def validations(steps: int, every: int) -> list[int]:
    """The steps of a run after which the trainer validates. every: --val-every."""
    return [*range(every or math.ceil(steps / 5), steps, every or math.ceil(steps / 5)), steps]


@dataclass(frozen=True)
class Arm:
    """One recipe of a comparison: a name and the trainer flags that make it."""

    name: str
    flags: tuple[str, ...]
    first_seed: int = 0  # added to every seed: the second arm of an A/A comparison runs on its own seeds


@dataclass(frozen=True)
class Trial:
    """One arm, so many steps, one seed."""

    arm: Arm
    steps: int
    number: int  # trials of several arms with the same number are a pair
    extra: tuple[str, ...] = ()  # trainer flags that do not change what is trained
    root: Path | None = None  # what its run folder is relative to; None: RUNS

    @property
    def seed(self) -> int:
        return self.arm.first_seed + self.number

    @property
    def flags(self) -> list[str]:
        return [*self.arm.flags, "--steps", str(self.steps), "--seed", str(self.seed), *self.extra]

    @cached_property
    def folder(self) -> Path:
        """Where the trainer puts this run. Raises UsageError: the trainer refuses these flags, or they leave the steps open."""
        config, model_config, recipe = resolve(self.flags)
        if config.minutes:
            raise UsageError("trials are compared at fixed numbers of steps, and --minutes leaves them open: add --minutes 0")
        return (self.root or RUNS) / run_folder.default_folder(run_folder.all_settings(config, model_config, recipe))

    @property
    def result(self) -> dict[str, Any] | None:
        """Of a run that has ended; None also for a damaged one, or for a run of other source code."""
        return run_folder.result(self.folder) if self.env().get("source_sha256") == run_folder.source_hash() else None

    def env(self) -> dict[str, Any]:
        """What the run was trained by and on; empty without a run."""
        return self.read("env.json")

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder; empty if it is missing or damaged."""
        with contextlib.suppress(FileNotFoundError, UsageError):
            return run_folder.read_json(self.folder / name)
        return {}

    def log(self) -> list[dict[str, Any]]:
        """All events of the run so far."""
        return [json.loads(line) for line in whole_lines(self.folder / "log.jsonl").splitlines()]


@dataclass(frozen=True)
class Outcome:
    """A trial's result, or the last line of the error of a trainer that crashed twice."""

    trial: Trial
    result: dict[str, Any] | None
    error: str = ""

    @property
    def loss(self) -> float:
        """Final validation loss; infinite for a run that diverged or crashed."""
        loss = self.result["val_loss"] if self.result else None
        return float("inf") if loss is None else loss


Launcher = Callable[[Trial], Outcome]  # trains one trial, and returns when it has ended

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # compute types in env.json: as --dtype has them
ANEW = ("--resume", "never")  # `extra` of a trial that is to be trained though it has ended
INTERRUPTED = threading.Event()  # nothing is begun or waited for any more


def train(trial: Trial, processes: int = 1, threads: int = 0) -> Outcome:
    """Run the trainer unless the trial has ended before and is not wanted ANEW. A crash is tried once more, from the last
    checkpoint; a diverged run is a result, and so is that of another experiment that is at the same trial. processes: ranks,
    by torchrun if there are several. threads: of each rank; 0: what torch takes."""
    if trial.extra == ANEW:  # a trainer that crashes at once must not leave the old one
        (trial.folder / "result.json").unlink(missing_ok=True)
    command = [*trainer(processes), *trial.flags, "--out", str(trial.folder)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    result, error, pauses = trial.result, "", [1, 0]
    while result is None and pauses:
        while run_folder.in_use(trial.folder) and not INTERRUPTED.wait(0.5):
            pass
        if (result := trial.result) is not None:
            break
        of_other_code = trial.env().get("source_sha256") not in (None, run_folder.source_hash())
        code, error = run_to_end([*command, *(ANEW if of_other_code else ())], environment)
        result = trial.result
        if code == 2 and " is in use by " in error and not INTERRUPTED.is_set():  # somebody was quicker
            continue
        if result is not None or code in (2, -signal.SIGINT, 130):  # refused or interrupted: trying again would not help
            break
        time.sleep(pauses.pop(0))
    return Outcome(trial, result, "" if result else error)


def trainer(processes: int = 1) -> list[str]:
    """The words that start the trainer, with torchrun if there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "train_gpt.py"]


def run_to_end(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code of a process and the last line that it writes to stderr."""
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def on_ray(gpus: float) -> Launcher:
    """Trains on a Ray cluster (RAY_ADDRESS, or the one that runs here) when `gpus` GPUs, or one CPU if 0, are free there. The
    repository must stand at the same path on every machine, on a file system that they share. Raises UsageError: Ray is not
    installed, or there is no cluster."""
    ray = optional("ray", "--launcher ray needs the package ray: .venv/bin/pip install -e .[ray]")
    if not ray.is_initialized():
        try:
            ray.init("auto", log_to_driver=False, logging_level="warning", runtime_env={"env_vars": RAY_ENVIRONMENT})
        except ConnectionError:
            raise UsageError("--launcher ray: no Ray cluster is running here; start one: ray start --head") from None
    remote = ray.remote(num_gpus=gpus, num_cpus=1, max_retries=1)(train)

    def launch(trial: Trial) -> Outcome:
        try:
            return ray.get(remote.remote(trial, max(1, int(gpus)), 0 if gpus else 1))
        except ray.exceptions.RayError as error:
            return Outcome(trial, None, str(error).strip().splitlines()[-1])

    return launch
