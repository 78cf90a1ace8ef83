"""Kill and starve runs at random, and count what is lost. Damaged files: tests/fuzz.py.

    python -m benchmarks.chaos                 all of it: about 10 minutes on 2 cores
    python -m benchmarks.chaos --kills 10      a taste

Kills: a run of `tiny`, with an optimizer of the registry on 1 or 2 ranks, is killed (SIGKILL, all of its processes) at random
moments and started again by the same command until it ends. Then losses, weights and optimizer state must be those of an
undisturbed run, bit by bit. Write errors: a random write of a run fails as on a full disk, and the same command continues.

Prints a table, and writes it to benchmarks/chaos.json. Exit code 1 when anything was lost.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch.utils._pytree import tree_flatten
from tqdm import tqdm

import train_gpt
from config import ModelConfig, only
from data import corpora
from engine import checkpoint, run_folder
from lab.trials import trainer
from optimizers import OPTIMIZERS, find

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).with_name("chaos.json")
FLAGS = ["--track", "tiny", "--steps", "40", "--checkpoint-every", "4", "--val-every", "10", "--dropout", "0.1"]
FLAGS += ["--dtype", "fp32", "--deterministic"]


@dataclass
class Count:
    """One line of the table."""

    what: str
    faults: int = 0
    recovered: int = 0  # ended with the same bits
    lost: int = 0
    seconds_per_fault: float | None = None  # that the run took longer, start of a new process included

    def add(self, fine: bool, where: str, faults: int = 1) -> None:
        self.faults += faults
        self.recovered += faults * fine
        self.lost += faults * (not fine)
        if not fine:
            print(f"LOST: {self.what}, {where}", file=sys.stderr)


def flags_of(optimizer: str) -> list[str]:
    return [*FLAGS, "--optimizer", optimizer, *(["--schedule", "constant"] if find(optimizer).own_schedule else [])]


def ended(folder: Path) -> tuple:
    """All that must be equal: losses, weights, optimizer state."""
    losses = [event["loss"] for event in map(json.loads, (folder / "log.jsonl").open()) if event["event"] in ("train", "val")]
    gpt = train_gpt.GPT(ModelConfig(**only(ModelConfig, json.loads((folder / "config.json").read_text()))))
    path, _ = checkpoint.newest(folder / "checkpoints")
    state, _, _ = checkpoint.Checkpoints(folder / "checkpoints").load(path, gpt, {})
    return losses, gpt.state_dict(), state


def same(a: tuple, b: tuple) -> bool:
    (left, shape), (right, other) = tree_flatten(a), tree_flatten(b)
    equal = (torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y for x, y in zip(left, right))
    return shape == other and all(equal)


def start(folder: Path, ranks: int, flags: list[str]) -> subprocess.Popen:
    how = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return subprocess.Popen([*trainer(ranks), *flags, "--out", str(folder)], start_new_session=True, **how)


def killed(cut: Path, ranks: int, flags: list[str], dice: random.Random) -> int:
    """Train to the end, killed up to eight times at random moments after set-up; how often."""
    kills = 0
    while not (cut / "result.json").exists():
        process, log = start(cut, ranks, flags), cut / "log.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else None
        while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns != before):
            time.sleep(0.01)  # it is still setting up
        time.sleep(dice.random() * 0.8)
        if process.poll() is None and kills < 8:
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid)])  # the ranks, which torchrun put in sessions of their own
            process.kill()
            kills += 1
        process.communicate()
    return kills


def kills(ranks: int, total: int, dice: random.Random, folder: Path) -> Count:
    """Runs with every optimizer in turn, killed and continued, until `total` kills were made."""
    count, seconds = Count(f"kills, {ranks} rank{'s' if ranks > 1 else ''}"), []
    names = itertools.cycle(dice.sample(sorted(OPTIMIZERS), len(OPTIMIZERS)))
    with tqdm(total=total, desc=count.what, unit="kill") as bar:
        while count.faults < total:
            name = next(names)
            flags, whole, cut = flags_of(name), folder / f"{bar.n}-{name}-whole", folder / f"{bar.n}-{name}-cut"
            begin = time.monotonic()
            _, errors = start(whole, ranks, flags).communicate()
            if not (whole / "result.json").exists():
                raise SystemExit(f"{name} on {ranks} ranks does not train: {errors.decode()[-500:]}")
            middle = time.monotonic()
            made = killed(cut, ranks, flags, dice)
            bar.update(made)
            count.add(same(ended(whole), ended(cut)), f"{name}: {whole} and {cut}", made)
            seconds += [(time.monotonic() - 2 * middle + begin) / made] if made else []
    count.seconds_per_fault = round(statistics.median(seconds), 2) if seconds else None
    return count


def write_errors(total: int, dice: random.Random, folder: Path) -> Count:
    """The n-th write of a run fails; what it had written stays whole, and the same command ends with the same bits."""
    count, flags = Count("write errors (disk full)"), [*flags_of("adamw"), "--steps", "12"]
    assert train_gpt.main([*flags, "--out", str(folder / "whole")]) == 0
    right = ended(folder / "whole")
    targets = [(checkpoint, "save_file"), (checkpoint, "atomic_write"), (checkpoint, "sync"), (run_folder.Run, "event")]
    targets += [(run_folder.Run, "logged"), (run_folder, "atomic_write"), (dcp, "save")]
    for i in tqdm(range(total), desc="write errors"):
        target, name = targets[i % len(targets)]
        out, real, fatal, calls = folder / f"error-{i}", getattr(target, name), dice.randrange(1, 6), []

        def failing(*args, real=real, fatal=fatal, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == fatal:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            with mock.patch.object(target, name, failing):
                code = train_gpt.main([*flags, "--out", str(out)])
            again = train_gpt.main([*flags, "--out", str(out)])
        if len(calls) >= fatal:
            fine = code == 2 and "no space left" in said.getvalue() and again == 0 and same(ended(out), right)
            count.add(fine, f"{name}, {out}: exit code {code}, then {again}")
            shutil.rmtree(out)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"--kills": 100, "--errors": 40, "--seed": 0}.items():
        parser.add_argument(flag, type=int, default=default)
    options = parser.parse_args()
    dice, work = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="chaos-"))
    corpora.prepare("sotu", "bytes", ROOT / "corpora")
    counts = [write_errors(options.errors, dice, work / "errors")]
    counts += [kills(ranks, options.kills // 2, dice, work / f"kills-{ranks}") for ranks in (1, 2)]
    RESULT.write_text(json.dumps([dataclasses.asdict(c) for c in counts], indent=1) + "\n")
    for c in counts:
        print(f"{c.what:28} {c.faults:4} faults  {c.recovered:4} recovered  {c.lost:3} lost  {c.seconds_per_fault or ''}")
    lost = any(c.lost for c in counts)
    if not lost:
        shutil.rmtree(work)
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
