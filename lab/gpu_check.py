"""The first hour on a real machine, in ten minutes and unattended: does everything compute there what it should, how fast?

    ./run.sh gpu-check                               all GPUs of this machine, 600 s
    ./run.sh gpu-check --gpus 1 --budget 300
    ./run.sh gpu-check --stages machine kernels      some of the five stages, to which the whole budget goes
    ./run.sh gpu-check --device cpu                  a rehearsal without a GPU: it proves nothing about one
    ./run.sh gpu-check --read gpu-check.json         the report of what somebody sent back

Five stages: the machine; every Triton kernel against its PyTorch form, and its time against PyTorch, torch.compile and the cost
model; the back-ends of attention likewise; a training run in fp32 against the losses that a CPU left; 50 steps of the recipes
through the trainer, on all GPUs, against the dry run. What computes on the device does so in processes of its own: what fails,
dies or hangs is named with its cause, and the rest goes on. No data is needed: the recipes train on random tokens.

What comes out: a folder with report.md and gpu-check.json (all figures; that is what to send back), written anew after every
finding. Exit codes: 0 nothing failed, 1 something did, 2 the command was wrong or there is no GPU.
"""

import argparse
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from engine import hardware
from engine.run_folder import atomic_write, git, now, source_hash
from engine.spec import UsageError
from lab import gpu_report, gpu_runs
from lab.gpu_report import FAIL, MARGIN, Finding, cause
from lab.gpu_runs import Check

BUDGET = 600.0


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    cuda: bool
    ranks: int
    budget: float
    out: Path
    read: Path | None
    stages: tuple[str, ...]


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing its usage and leaving."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def parser() -> Parser:
    made = Parser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = made.add_argument
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"of all stages together (default: {BUDGET:g})")
    add("--out", type=Path, metavar="FOLDER", help="default: runs/gpu-check/<time>")
    add("--gpus", type=int, metavar="N", help="the first N (default: all); with --device cpu: processes (default: 2)")
    add("--stages", nargs="+", choices=tuple(gpu_runs.STAGES), default=tuple(gpu_runs.STAGES), help="default: all")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal (default: cuda)")
    add("--read", type=Path, metavar="FILE", help="print the report of a gpu-check.json, and do nothing else")
    return made


def parse(argv: list[str]) -> Options:
    """The command line, checked against this machine.

    Raises:
        UsageError: a bad flag; no GPU, or fewer than asked for.
    """
    given = parser().parse_args(argv)
    if not given.budget >= 0:
        raise UsageError(f"--budget must be seconds, not {given.budget:g}")
    if given.gpus is not None and given.gpus < 1:
        raise UsageError(f"--gpus must be at least 1, got {given.gpus}")
    cuda, ranks = given.device == "cuda", given.gpus or 2
    if cuda and not given.read:
        there = torch.cuda.device_count()
        if not there:
            build = "" if torch.version.cuda or torch.version.hip else f" (torch {torch.__version__} is a build without CUDA)"
            raise UsageError(f"PyTorch sees no CUDA GPU here{build}; to rehearse on the CPU: ./run.sh gpu-check --device cpu")
        ranks = given.gpus or there
        if ranks > there:
            raise UsageError(f"--gpus {ranks}: PyTorch sees {there} here")
    out = given.out or Path("runs") / "gpu-check" / now().replace(":", "")
    return Options(cuda, ranks, given.budget, out, given.read, tuple(given.stages))


def write(check: Check, facts: dict) -> dict:
    """Both files, as far as the check has come; what the JSON holds."""
    device = hardware.counted(d["name"] for d in check.machine.get("devices", [{"name": "unknown device"}]))
    text = gpu_report.as_json(check.findings, **facts, device=device, machine=check.machine, seconds=check.seconds)
    path = check.out / "gpu-check.json"
    atomic_write(path, text)
    data = gpu_report.read(path)
    atomic_write(check.out / "report.md", gpu_report.report(data) + "\n")
    return data


def run(options: Options) -> int:
    """All stages, as far as the budget goes."""
    commit = git("rev-parse", "HEAD")
    facts = {
        "utc": now(), "rehearsal": not options.cuda, "budget": options.budget, "margin": MARGIN, "ranks": options.ranks,
        "commit": commit and commit.strip(), "dirty": bool(git("status", "--porcelain")), "source_sha256": source_hash(),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        whole = options.stages == tuple(gpu_runs.STAGES)
        check = Check(options.cuda, options.ranks, options.budget, options.out, Path(scratch).resolve(), whole)
        check.changed = lambda check: write(check, facts)
        if check.left() <= 0:
            tqdm.write(f"--budget {options.budget:g} leaves no time for anything")
        for name, stage in gpu_runs.STAGES.items():
            if name not in options.stages:
                continue
            tqdm.write(f"{name}, after {check.seconds:.0f} s")
            try:
                stage(check)
            except Exception as error:  # of the check itself: the other stages still tell something
                check.add(Finding(name, "the stage itself", FAIL, cause(error)))
    data = write(check, facts)
    print(f"\n{gpu_report.report(data)}\n\nto send back: {options.out / 'gpu-check.json'}")
    return gpu_report.exit_code(check.findings)


def main(argv: list[str]) -> int:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        options = parse(argv)
        if options.read:
            print(gpu_report.report(gpu_report.read(options.read)))
            return 0
        return run(options)
    except UsageError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu-check: interrupted; what was found until then is in the report", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
