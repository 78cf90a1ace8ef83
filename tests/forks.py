"""Python commands in forks of a process that has imported the trainer: importing it takes 6 s, a fork 50 ms.

`Popen` and `run` stand in for subprocess's where Python runs a script, a module (-m) or code (-c). Each process of the tests
forks from one of its own, which only imports: torch's threads, which any computation starts, do not survive a fork.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing import connection, forkserver
from pathlib import Path
from subprocess import DEVNULL, PIPE, TimeoutExpired  # noqa: F401  # read by who takes this module for subprocess
from unittest import mock

import torch

from engine import hardware

TESTS = Path(__file__).parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forks", "pytest", "train_gpt", "torch._dynamo", "torch.distributed.checkpoint"])
LOCK = threading.Lock()  # who starts a process also looks which others have ended, and an exit code can be read only once


class Fork:
    """A Python command in a fork, with the methods of subprocess.Popen. Its output goes to files that `communicate` reads."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path):
        self.files = [tempfile.NamedTemporaryFile(prefix="fork-") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self.files]
        self.process = FORKS.Process(target=in_fork, args=(command[1:], dict(env), cwd, *names))
        with LOCK, mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (TESTS.parent, TESTS)))):
            forkserver.ensure_running()
            self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        with LOCK:
            return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        if not connection.wait([self.process.sentinel], timeout):
            raise TimeoutExpired("a fork", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (Path(file.name).read_text() for file in self.files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()


def Popen(command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None, **how) -> Fork | subprocess.Popen:
    """A fork, where the command is Python; else a process."""
    if command[0] != sys.executable:
        return subprocess.Popen(command, env=env, cwd=cwd, **how)
    return Fork(command, env or os.environ, cwd or Path.cwd())


def run(command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None, check: bool = False, **_):
    """subprocess.run of a Python command, in a fork."""
    process = Popen(command, env=env, cwd=cwd)
    out, err = process.communicate()
    assert not check or process.returncode == 0, err[-2000:]
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def in_fork(words: list[str], env: dict[str, str], cwd: Path, out: str, err: str) -> None:
    """In the fork: what `python words...` does."""
    assert "train_gpt" in sys.modules, "the process that is forked could not import the trainer"
    with contextlib.suppress(AttributeError):  # Linux: no fork outlives the tests
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if "OMP_NUM_THREADS" in env and words[0] != "-m":  # a module that forks in its turn: its pool of threads would not survive
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    hardware.matmul_peak = lambda *_: (1e11, "measured at start")  # which takes 0.3 s
    if words[0] in ("-c", "-m"):
        sys.argv = [words[0], *words[2:]]
    if words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Ranks:
    """A command on so many ranks, in forks that find each other through a store, as torchrun's do; for 0 in one without."""

    def __init__(self, count: int, command: list[str], env: dict[str, str], cwd: Path):
        if not count:
            self.forks = [Fork(command, env, cwd)]
            return
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self.forks = [Fork(command, env | words, cwd) for words in own]

    def __getitem__(self, rank: int) -> Fork:
        return self.forks[rank]

    def poll(self) -> int | None:
        """None while one runs; then the first exit code that is not 0."""
        codes = [fork.poll() for fork in self.forks]
        return None if None in codes else next(filter(None, codes), 0)

    def finish(self, timeout: float = 300, patience: float = 20) -> tuple[int, str, str]:
        """Wait for all, `patience` seconds where one has failed, and end the others: exit code, stdout and stderr."""
        while running := [fork for fork in self.forks if fork.poll() is None]:
            failed = any(fork.poll() for fork in self.forks)
            if not connection.wait([fork.process.sentinel for fork in running], patience if failed else timeout):
                for fork in running:
                    fork.kill()
        out, err = map("".join, zip(*(fork.communicate() for fork in self.forks), strict=True))
        return self.poll(), out, err
