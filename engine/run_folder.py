"""What a run writes, rank 0 alone: its folder, whose files docs/checkpoints.md describes."""

import contextlib
import functools
import hashlib
import json
import math
import os
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from engine.display import Display, describe
from engine.spec import UsageError

ROOT = Path(__file__).parent.parent
# Settings that do not change what is computed: left out of the run's hash.
PRESENTATION = (
    "out", "name", "resume", "branch", "data_root", "checkpoint_every", "checkpoint_minutes", "keep", "milestone_every",
    "check_ranks", "timeout", "wandb", "tensorboard", "val_also",
)  # fmt: skip


def all_settings(config: Any, model_config: Any, recipe: str) -> dict[str, Any]:
    """What config.json has."""
    settings = vars(config) | vars(model_config) | {"recipe": recipe} | own_code(config.optimizer)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}  # as JSON has them


def own_code(optimizer: str) -> dict[str, str]:
    """The hash of the file that a SPEC names, if any: once changed it is another optimizer."""
    file = Path(optimizer.partition(":")[0])
    return {"optimizer_code": file_hash(file)} if file.suffix == ".py" else {}


def settings_hash(settings: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    """sha256 over everything that changes what is computed; without the seed, the same for all runs of an experiment."""
    kept = {k: v for k, v in settings.items() if k not in (*PRESENTATION, *without)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def default_folder(settings: dict[str, Any]) -> str:
    """runs/<track>/<name>-s<seed>-<settings_hash>. A file's name has 255 bytes at most."""
    return str(Path("runs") / settings["track"] / f"{settings['name'][:100]}-s{settings['seed']}-{settings_hash(settings)[:8]}")


def found(root: Path) -> list[Path]:
    """The run folders below a folder, the one whose log was written last first."""
    logs = [path for path in root.rglob("log.jsonl") if path.is_file() and (path.parent / "config.json").is_file()]
    return [path.parent for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)]


def now_utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def atomic_write(path: Path, text: str | bytes) -> None:
    """A reader sees the old file or the whole new one; a full disk leaves nothing behind; a link there is replaced."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # as other files; mkstemp's are the owner's alone
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def refuse_links(folder: Path) -> None:
    """Raises UsageError: something in the folder, which may be somebody else's, is a link, or neither file nor folder."""
    if odd := [path for path in folder.glob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]:
        raise UsageError(f"{odd[0]} is a {'link' if odd[0].is_symlink() else 'pipe'}: remove it, or choose another folder")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be somebody else's. Raises FileNotFoundError, and UsageError: it is damaged, or no
    regular file (a pipe would hold its reader up for ever)."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UsageError(f"{path} is no regular file")
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(content := json.loads(path.read_bytes()), dict):
            return content
    raise UsageError(f"{path} is damaged: it holds no JSON object")


@contextlib.contextmanager
def intact(what: object) -> Iterator[None]:
    """Read in here what may be somebody else's. Raises UsageError for whatever comes of it."""
    try:
        yield
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{what} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from error


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def code_version() -> dict[str, Any]:
    """Which code runs: commit, whether files differ from it, and the hash of what trains."""
    commit = git("rev-parse", "HEAD")
    return {"commit": commit and commit.strip(), "dirty": bool(git("status", "--porcelain")), "source_sha256": source_hash()}


# What trains: a change of any other file leaves finished trials what they are.
TRAINING = ("train_gpt.py", "config.py", "hub.py", "model.py", "tricks.py", "optimizers", "layers", "engine", "data")


def sources() -> list[Path]:
    """The files that a run executes."""
    return sorted(path for name in TRAINING for path in ROOT.glob(name if name.endswith(".py") else f"{name}/*.py"))


@functools.cache
def source_hash() -> str:
    """sha256 over `sources`, read once: what a process has imported does not change any more."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def lock(folder: Path) -> FileLock:
    """Take `folder` for this process until it ends, however it ends. Raises UsageError: another process has it; says which."""
    path = folder / "lock"
    held = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire(blocking=False)
    except Timeout:
        who = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(path.read_text())
            who = f"process {int(holder['pid'])} on {str(holder['host'])[:60]}, since {str(holder['since'])[:30]}"
        raise UsageError(f"{folder} is in use by {who}: wait for it, or choose another folder") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from None
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now_utc()}))
    return held


def in_use(folder: Path) -> bool:
    """Does another process hold the folder's lock?"""
    try:
        with FileLock(folder / "lock", timeout=0) if (folder / "lock").exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


def result(folder: Path) -> dict[str, Any] | None:
    """result.json of a run that has ended. None: there is none, or not the one whose hash ends the log."""
    path, log = folder / "result.json", folder / "log.jsonl"
    with contextlib.suppress(OSError, UsageError), intact(path):
        there, end = read_json(path), json.loads(log.read_bytes().splitlines()[-1]) if log.is_file() else {}
        return there if file_hash(path).startswith(end.get("result", "")) else None  # logs did not always have it


class Run:
    """The run folder and all that is written to it except checkpoints, by rank 0 (`main`) alone. Raises UsageError: the folder
    holds a run with other settings, or something else."""

    def __init__(self, folder: Path, config: dict[str, Any], resume: str, main: bool = True):
        self.folder, self.config, self.main = folder, config, main
        self.log, self.display, self.lock = None, None, None
        self.checkpoints = folder / "checkpoints"
        refuse_links(folder)
        resumed = resume != "never" and any(self.checkpoints.glob("step-*"))  # whose checkpoints name their settings themselves
        try:
            there = read_json(folder / "config.json")
        except UsageError:
            if not resumed:
                raise
        except FileNotFoundError:
            # what a run leaves that was ended before it wrote its config.json is no reason to refuse
            left = [p for p in folder.glob("*") if p.name not in ("lock", "checkpoints") and p.suffix != ".tmp"]
            if left and not resumed:
                raise UsageError(f"{folder} is not empty and holds no run: choose another --out") from None
        else:
            if different := sorted(k for k, v in config.items() if k not in PRESENTATION and there.get(k, v) != v):
                raise UsageError(f"{folder} holds a run with other settings ({', '.join(different)}): choose another --out")
        self.finished: dict[str, Any] | None = None  # the result of a run that has ended; one that is damaged is made again
        if resume != "never" and (there := result(folder)):
            with contextlib.suppress(UsageError), intact(folder):
                self.finished = there if describe(there, folder) and there["status"] else None

    def open(self, env: dict[str, Any], saved: dict[str, Any], display: Display, stem: Path | None = None) -> None:
        """On rank 0: write what is known before the first step; of a log keep what the checkpoint's `saved` values speak of
        (`logged`). stem: folder of the run that this one branches off from, whose log up to there is this run's too. Raises
        UsageError: it is shorter."""
        log, source, log_bytes = self.folder / "log.jsonl", (stem or self.folder) / "log.jsonl", saved.get("log_bytes", 0)
        kept = source.read_bytes()[:log_bytes] if log_bytes and source.exists() else b""
        if len(kept) < log_bytes:
            repair = "leave out --branch" if stem else "add --resume never to start anew"
            raise UsageError(f"{source} is {len(kept)} bytes long; the checkpoint expects at least {log_bytes}: {repair}")
        (self.folder / "result.json").unlink(missing_ok=True)
        atomic_write(self.folder / "config.json", json.dumps(self.config, indent=1))
        atomic_write(self.folder / "env.json", json.dumps(env, indent=1))
        self.log_hash = hashlib.sha256(kept)
        if stem:
            log.write_bytes(kept)
        self.log, self.display, self.flushed = log.open("ab"), display, 0.0
        self.log.truncate(log_bytes)
        self.log.seek(0, os.SEEK_END)
        if kept and saved.get("log_sha256", self.log_hash.hexdigest()) != self.log_hash.hexdigest():
            display.note(f"{source} is not the log that the checkpoint was written with: it was changed since")

    def event(self, event: str, note: str = "", **values: Any) -> None:
        """Log an event and show it. note: a line for people."""
        if not self.main:
            return
        # JSON has no NaN: a non-finite number is logged as null and named by its event
        logged = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = (json.dumps({"event": event, **logged}) + "\n").encode()
        self.log.write(line)
        self.log_hash.update(line)
        if event != "train" or time.monotonic() - self.flushed > 1:  # so that who watches the log sees every second
            self.log.flush()
            self.flushed = time.monotonic()
        self.display.event(event, note, values)

    def logged(self) -> dict[str, Any]:
        """Bytes of the log, now on the disk, and their hash: what a checkpoint may rely on."""
        if not self.main:
            return {}
        self.log.flush()
        os.fsync(self.log.fileno())
        return {"log_bytes": self.log.tell(), "log_sha256": self.log_hash.hexdigest()}

    def close(self, result: dict[str, Any]) -> None:
        """The run has ended: result.json says so."""
        if self.main:
            text = json.dumps(result, indent=1)
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            self.event("end", status=result["status"], step=result["steps"], utc=now_utc(), result=digest)
            self.log.close()
            atomic_write(self.folder / "result.json", text)
            if asked := os.environ.get("RUN_FOLDER_GOES_TO"):  # a file of run.sh's, which shows this run then
                Path(asked).write_text(str(self.folder.resolve()))

    def release(self, wrong: bool = False) -> None:
        """Let go of log, display and lock, whatever happened before. wrong: the command was; no file is left of the run."""
        if self.display:
            self.display.close()
        if self.log:
            with contextlib.suppress(OSError):  # the disk is full: said already
                self.log.close()
        if self.lock:
            self.lock.release()
        if wrong and self.log and not (any(self.checkpoints.glob("step-*")) or (self.folder / "result.json").exists()):
            for name in ("config.json", "env.json", "log.jsonl", "lock"):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: there is something of the user's
                self.checkpoints.rmdir()
                self.folder.rmdir()
