"""What a run writes: its folder (config.json, env.json, log.jsonl, checkpoints/, lock, result.json) and its display.

Only rank 0 writes. The contract of the files stands in README.md, "Where results go".
"""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from engine.spec import UsageError

ROOT = Path(__file__).parent.parent
# Settings that do not change what is computed: left out of the run's hash.
PRESENTATION = (
    "out", "resume", "branch", "data_root", "checkpoint_every", "checkpoint_minutes", "keep", "milestone_every", "check_ranks",
    "timeout", "wandb", "tensorboard",
)  # fmt: skip


def all_settings(config: Any, model_config: Any, recipe: str) -> dict[str, Any]:
    """Everything that a run is told: what config.json has. Of an optimizer in a file of one's own the file's hash too: the
    same command after a change of it is another run."""
    file = Path(config.optimizer.partition(":")[0])
    own = {"optimizer_code": hashlib.sha256(file.read_bytes()).hexdigest()} if file.suffix == ".py" else {}
    return vars(config) | vars(model_config) | {"recipe": recipe} | own


def settings_hash(settings: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    """sha256 over everything that changes what is computed; without the seed, the same for all runs of an experiment."""
    kept = {k: v for k, v in settings.items() if k not in (*PRESENTATION, *without)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def default_folder(settings: dict[str, Any], recipe: str) -> str:
    """runs/<track>/<recipe>-s<seed>-<hash of everything that changes what is computed>. The words of a long recipe are cut
    off: a file's name has 255 bytes at most."""
    return str(Path("runs") / settings["track"] / f"{recipe[:100]}-s{settings['seed']}-{settings_hash(settings)[:8]}")


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def atomic_write(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# What trains: a change of any other file leaves finished trials what they are.
TRAINING = ("train_gpt.py", "model.py", "tricks.py", "optimizers", "layers", "engine", "data")


def sources() -> list[Path]:
    """The files that a run executes."""
    found = [(ROOT / name, (ROOT / name).glob("*.py")) for name in TRAINING]
    return sorted(path for place, inside in found for path in ([place] if place.is_file() else inside))


def source_hash() -> str:
    """sha256 over `sources`."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def lock(folder: Path) -> FileLock:
    """Take `folder` for this process until it ends, however it ends: the system frees what a dead process held.

    Raises:
        UsageError: another process has it; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    held = FileLock(path)
    try:
        held.acquire(blocking=False)
    except Timeout:
        try:
            holder = json.loads(path.read_text())
            who = f"process {int(holder['pid'])} on {str(holder['host'])[:60]}, since {str(holder['since'])[:30]}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        raise UsageError(f"{folder} is in use by {who}: wait for it, or choose another folder") from None
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}))
    return held


class Run:
    """The run folder and everything that is written to it but checkpoints. Only rank 0 writes."""

    def __init__(self, folder: Path, config: dict[str, Any], resume: str):
        self.folder, self.config, self.log = folder, config, None
        self.checkpoints = folder / "checkpoints"
        comparable = {k: v for k, v in config.items() if k not in PRESENTATION}
        if (folder / "config.json").exists():
            try:
                there = json.loads((folder / "config.json").read_text())
            except ValueError:
                raise UsageError(f"{folder / 'config.json'} is damaged: choose another --out") from None
            different = sorted(k for k in comparable if there.get(k, comparable[k]) != comparable[k])
            if different:
                raise UsageError(f"{folder} holds a run with other settings ({', '.join(different)}): choose another --out")
        # what a run leaves that was ended before it wrote its config.json is no reason to refuse
        elif folder.exists() and any(p.name not in ("lock", "checkpoints", "config.tmp") for p in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no run: choose another --out")
        self.finished = resume != "never" and (folder / "result.json").exists()

    def open(self, env: dict[str, Any], log_bytes: int, stem: Path | None = None) -> None:
        """Write what is known before the first step; of a log keep the first `log_bytes`, those of the checkpoint.

        stem: folder of the run that this one branches off from, whose log up to there is this run's too.

        Raises:
            UsageError: the log is shorter than that.
        """
        log, source = self.folder / "log.jsonl", (stem or self.folder) / "log.jsonl"
        there = source.stat().st_size if source.exists() else 0
        if there < log_bytes:
            repair = "leave out --branch" if stem else "add --resume never to start anew"
            raise UsageError(f"{source} has {there} bytes, its checkpoint speaks of {log_bytes}: {repair}")
        (self.folder / "result.json").unlink(missing_ok=True)
        atomic_write(self.folder / "config.json", json.dumps(self.config, indent=1))
        atomic_write(self.folder / "env.json", json.dumps(env, indent=1))
        if stem:
            log.write_bytes(source.read_bytes()[:log_bytes])
        self.log = log.open("ab")
        self.log.truncate(log_bytes)
        self.log.seek(0, os.SEEK_END)

    def event(self, event: str, **values: Any) -> None:
        # JSON has no NaN: a non-finite number is logged as null and named by its event
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.log.write((json.dumps({"event": event, **values}) + "\n").encode())
        if event != "train":
            self.log.flush()

    def logged(self) -> int:
        """Bytes of the log, all of them on the disk: what a checkpoint made now may rely on."""
        self.log.flush()
        os.fsync(self.log.fileno())
        return self.log.tell()

    def close(self, result: dict[str, Any]) -> None:
        """The run has ended: result.json says so."""
        self.event("end", status=result["status"], step=result["steps"], utc=now())
        self.log.close()
        atomic_write(self.folder / "result.json", json.dumps(result, indent=1))


class Display:
    """A progress bar on a terminal, plain lines elsewhere, and the optional loggers. `config` is the trainer's."""

    def __init__(self, config: Any, folder: Path, flops: int, peak: float | None, first: int):
        self.config, self.flops, self.peak, self.val = config, flops, peak, None
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=config.steps, initial=first, disable=not self.terminal, unit="step", dynamic_ncols=True)
        self.every = max(1, config.steps // 20)
        self.wandb = self.writer = None
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project="nanogpt-speedrun", name=folder.name, dir=folder, config=vars(config))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard")

    def scalars(self, step: int, **values: float) -> None:
        if self.wandb:
            self.wandb.log(values, step=step)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def step(self, step: int, loss: float, lr: float, step_time: float, train_time: float, rate: float) -> None:
        """rate: tokens per second of this step."""
        config = self.config
        mfu = f"{rate * self.flops / self.peak:.0%}" if self.peak else "n/a"
        target = f"/{config.target_loss:g}" if config.target_loss else ""
        val = f"{self.val:.4f}{target}" if self.val is not None else f"-{target}"
        self.scalars(step, **{"train/loss": loss, "train/lr": lr, "train/step_time": step_time})
        self.bar.set_postfix_str(f"loss {loss:.3f}, val {val}, {rate:,.0f} tok/s, MFU {mfu}", refresh=False)
        self.bar.update()
        if not self.terminal and (step % self.every == 0 or step == 1):
            eta = train_time / step * (config.steps - step)
            print(
                f"step {step}/{config.steps}  loss {loss:.4f}  val {val}  {train_time:.1f} s  {rate:,.0f} tok/s  "
                f"MFU {mfu}  ETA {eta:.0f} s",
                flush=True,
            )

    def validated(self, step: int, loss: float) -> None:
        self.val = loss
        self.scalars(step, **{"val/loss": loss})
        self.note(f"step {step}: validation loss {loss:.4f}")

    def note(self, text: str) -> None:
        self.bar.write(text) if self.terminal else print(text, flush=True)

    def close(self) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.writer:
            self.writer.close()
