"""Trials: one arm with one seed at one length, each a trainer process. A trial that has ended is found again by the hash
of its settings in the name of its run folder, so that whatever stops an experiment loses no finished trial.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import run_folder
import train_gpt

ROOT = Path(__file__).parent.parent
RUNS = ROOT  # what the default run folders, runs/<track>/..., are relative to


@dataclass(frozen=True)
class Arm:
    """One recipe of a comparison: a name and the trainer flags that make it."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One arm, so many steps, one seed."""

    arm: Arm
    steps: int
    seed: int

    @property
    def flags(self) -> list[str]:
        return [*self.arm.flags, "--steps", str(self.steps), "--seed", str(self.seed)]

    @cached_property
    def folder(self) -> Path:
        """Where the trainer puts this run.

        Raises:
            UsageError: what the trainer refuses: an unknown trick, a value out of range.
        """
        config, model_config, recipe = train_gpt.resolve(self.flags)
        return RUNS / run_folder.default_folder(vars(config) | vars(model_config) | {"recipe": recipe}, recipe)

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json once the run has ended, else None."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def log(self) -> list[dict[str, Any]]:
        """All events of the run."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: its result, or the last line of the error of a trainer that crashed twice."""

    trial: Trial
    result: dict[str, Any] | None
    error: str = ""
    fresh: bool = False  # trained now, not found

    @property
    def loss(self) -> float:
        """Final validation loss; infinite for a run that diverged or crashed."""
        loss = self.result["val_loss"] if self.result else None
        return float("inf") if loss is None else loss


def train(trial: Trial, processes: int = 1, tries: int = 2) -> Outcome:
    """Run the trainer unless the trial has ended before. A crash is tried once more, from its last checkpoint if there is
    one; a diverged run is a result."""
    if (result := trial.result) is not None:
        return Outcome(trial, result)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    error = ""
    for attempt in range(tries):
        if attempt:
            time.sleep(1)
        command = [*launcher, "train_gpt.py", *trial.flags, "--out", str(trial.folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if (result := trial.result) is not None:
            return Outcome(trial, result, fresh=True)
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if done.returncode == 2:  # refused: trying again would not help
            break
    return Outcome(trial, None, error, fresh=True)


def local(trials: Iterable[Trial], processes: int = 1) -> Iterator[Outcome]:
    """One trial after the other on this machine, torchrun inside where `processes` > 1: in their order, for paired clocks."""
    for trial in trials:
        yield train(trial, processes)


def on_ray(trials: Iterable[Trial], gpus: float, address: str = "auto") -> Iterator[Outcome]:
    """All trials at once on a Ray cluster, each when `gpus` GPUs (or one CPU, if 0) are free; in the order they end.

    The repository must stand at the same path on every machine, on a file system that they share.
    """
    import ray

    if not ray.is_initialized():
        ray.init(address, log_to_driver=False)
    remote = ray.remote(num_gpus=gpus, num_cpus=1, max_retries=1)(train)
    waiting = {remote.remote(trial, max(1, int(gpus))): trial for trial in trials}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        trial = waiting.pop(ready)
        try:
            yield ray.get(ready)
        except ray.exceptions.RayError as error:
            yield Outcome(trial, None, str(error).strip().splitlines()[-1])
