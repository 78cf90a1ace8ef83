"""How every verb ends: what the user can mend is one line on stderr and an exit code; a signal ends the step first."""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch

from engine.ranks import RankError
from engine.spec import UsageError, trust

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


class Answer(str):
    """What a verb says. data: the same for scripts, any JSON. code: its exit code."""

    def __new__(cls, text: str, data: Any = None, code: int = 0):
        answer = super().__new__(cls, text)
        answer.data, answer.code = data, code
        return answer


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of leaving, with the flags of every verb, which `command` obeys."""

    def __init__(self, **how: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | how)
        self.add_argument("--json", action="store_true", help="print the answer as JSON, all else on stderr")
        self.add_argument("--quiet", action="store_true", help="print the answer and errors, no progress")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def command(name: str, work: Callable[[], int | str | None], argv: Sequence[str] = ()) -> int:
    """Run a verb, print the text that it returns (with --json an Answer's data), and return its exit code: 0, that of the
    Answer, or what `work` returns. 1 ranks died, hang or differ; 2 bad words, no memory or a full disk; 130 interrupted. Of
    several ranks one speaks. argv: what the user typed, which alone may name code."""
    trust(argv)
    with contextlib.suppress(AttributeError):  # a terminal that has not every letter
        sys.stdout.reconfigure(errors="replace")
    try:
        with aside(argv):
            done = work()
        if isinstance(done, str) and "--json" in argv:
            text = json.dumps(getattr(done, "data", str(done)), default=str)
            print(json.dumps(json.loads(text, parse_constant=lambda word: None), indent=1))  # JSON has no NaN
        elif isinstance(done, str) and done:
            print(done)
        return getattr(done, "code", 0) if isinstance(done, str) else done or 0
    except BrokenPipeError:  # the reader, such as head, has seen enough; what is left unflushed must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UsageError, RankError, torch.distributed.DistError, OSError, KeyboardInterrupt) as error:
        words, code = explained(error)
        if not words:
            raise
        if speaks(error):
            print(f"{name}: {words}", file=sys.stderr, flush=True)
        return code


@contextlib.contextmanager
def aside(argv: Sequence[str]) -> Iterator[None]:
    """What is said on the way to an answer goes to stderr with --json, nowhere with --quiet."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if quiet := "--quiet" in argv:
            sys.stderr.isatty = lambda: False  # so nobody draws a bar on it
            stack.callback(delattr, sys.stderr, "isatty")
        if quiet or "--json" in argv:
            stack.enter_context(contextlib.redirect_stdout(nowhere if quiet else sys.stderr))
        yield


def explained(error: BaseException) -> tuple[str, int]:
    """Words for the user and the exit code; no words: a fault of ours, whose traceback is wanted."""
    if isinstance(error, (UsageError, RankError)):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, torch.distributed.DistError):
        more = "; NCCL_DEBUG=INFO says more" if isinstance(error, torch.distributed.DistBackendError) else ""
        return f"rank {os.environ.get('RANK', 0)}: {str(error).strip().splitlines()[0]}{more}", 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what is finished is kept: the same command continues", 130
    if error.errno in FULL:
        return "no space left on the disk; free some, and the same command continues", 2
    return (f"{error.filename}: {error.strerror}", 2) if error.errno in REFUSED and error.filename else ("", 1)


def speaks(error: BaseException) -> bool:
    """Is it for this rank to say so?"""
    if isinstance(error, UsageError):  # once a machine: it may be wrong on one of several
        return int(os.environ.get("LOCAL_RANK", 0)) == 0 if error.speaks is None else error.speaks
    return not isinstance(error, RankError) or error.speaks or int(os.environ.get("RANK", 0)) == 0


class Interrupt(contextlib.ExitStack):
    """SIGINT, SIGTERM and SIGUSR1 ask the run to end after the step that it is in; a second SIGINT ends the process at once."""

    name: str | None = None

    def __enter__(self) -> "Interrupt":
        for name in ("SIGINT", "SIGTERM", *["SIGUSR1"] * hasattr(signal, "SIGUSR1")):  # which Windows lacks
            number = getattr(signal, name)
            self.callback(signal.signal, number, signal.signal(number, self.ask))
        return self

    def ask(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
