"""The check itself: its budget, the processes that it starts, and the stages that train by the trainer."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import cost
import train_gpt
import tricks
from data import shards
from engine import hardware
from engine.spec import UsageError
from lab.gpu_report import FAIL, MARGIN, NO_TIME, NOT_RUN, PASS, SLOWER, Finding, cause, cause_in

ROOT = Path(__file__).parent.parent
DEVICE_STAGE = [sys.executable, "-m", "lab.gpu_device"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
GRACE = 5.0  # seconds that a process has to end when it is told to, and the report to be written
TASK_SECONDS = 150.0  # a task on the device that takes longer hangs
START, COMPILE = 15.0, 80.0  # seconds that a trainer takes on a GPU before its first step, and to compile: on an H100 8 and 57

GOLDEN = ROOT / "tests" / "golden_tiny.json"  # losses of a run on a CPU, with these flags
GOLDEN_FLAGS = ("--steps", "20", "--tricks", "record")
GOLDEN_TOLERANCE = 1e-3  # relative, of every loss: machines round differently, and twenty steps add it up

STEPS, WARM = 50, 10  # of a recipe, and those at its beginning that its time leaves out
RECIPES = {  # track and recipe, what matters most first -> the part of what is then left of the budget that it may take
    ("gpt2-small", "record"): 0.75,
    ("tiny", "baseline"): 0.2,
    ("gpt2-small", "baseline"): 1.0,
    ("gpt2-medium", "record"): 1.0,
}
SMALL = {"sequence_length": 32, "vocab_size": 512, "end_of_text": 511, "layers": 1, "width": 32, "heads": 2, "window": 16}
REHEARSED = {"gpt2-small": SMALL}  # the track's recipes on a CPU
MADE_TOKENS = {"train": 4_000_000, "val": 1_000_000}


@dataclass(frozen=True)
class Outcome:
    """How a process ended. code: None when its time was up."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def log(self) -> list[str]:
        """The end of what it said went wrong."""
        return self.stderr.strip().splitlines()[-30:]


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs, on Linux."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started: torchrun's ranks have sessions of their own."""
    if process.poll() is not None:
        return
    started = descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    for pid in (*started, process.pid):
        with contextlib.suppress(OSError):
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()


@dataclass
class Check:
    """One check: what it may use, how long it may take, what it has found.

    cuda: else it is a rehearsal on the CPU. ranks: GPUs, or processes on the CPU. out: where the report goes; scratch: what is
    removed in the end. whole: all stages, so that none may take more than its share of the budget.
    """

    cuda: bool
    ranks: int
    budget: float
    out: Path
    scratch: Path
    whole: bool = True
    started: float = field(default_factory=time.monotonic)
    findings: list[Finding] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    changed: Callable[["Check"], None] = lambda check: None  # called after every finding

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def left(self, share: float = 1.0) -> float:
        """Seconds until so much of the budget is spent, less what ending takes."""
        return (share if self.whole else 1.0) * self.budget - self.seconds - GRACE

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        tqdm.write(f"  {finding.what}: {finding.verdict}{': ' * bool(finding.detail)}{finding.detail}")
        self.changed(self)

    def not_run(self, stage: str, what: str, why: str = NO_TIME) -> None:
        self.add(Finding(stage, what, NOT_RUN, why))

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: the GPUs that it may see; fp32 is fp32; one thread a rank on a CPU; Triton interpreted there."""
        own = {
            "NVIDIA_TF32_OVERRIDE": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        if self.cuda:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            own["CUDA_VISIBLE_DEVICES"] = ",".join(
                (seen.split(",") if seen else list(map(str, range(self.ranks))))[: self.ranks]
            )
        else:
            own |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return os.environ | own

    def run(self, command: list[str], seconds: float, watch: Callable[[], bool] = lambda: True) -> Outcome:
        """Run a command to its end, or until its time is up or `watch`, asked ten times a second, says no."""
        names = self.scratch / "stdout", self.scratch / "stderr"
        end = time.monotonic() + seconds
        with open(names[0], "wb") as out, open(names[1], "wb") as errors:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=errors)
            try:
                while process.poll() is None and time.monotonic() < end and watch():
                    time.sleep(0.1)
                code = process.poll()
            finally:
                stop(process)
        where = (f"{ROOT}/", f"{sysconfig.get_paths()['purelib']}/")  # what is sent back names no folders of this machine
        texts = [path.read_text(errors="replace") for path in names]
        return Outcome(code, *(functools.reduce(lambda text, folder: text.replace(folder, ""), where, text) for text in texts))


# ---------------------------------------------------------------- stages on the device


class Follower:
    """What a stage on the device has written so far, over all the processes that it takes.

    tasks: their names, once they are known; done: how many; where: what the one in hand is at.
    """

    def __init__(self, check: Check, stage: str, bar: tqdm):
        self.check, self.bar = check, bar
        self.path = check.scratch / f"{stage}.jsonl"
        self.tasks: list[str] = []
        self.done, self.where = 0, ""
        self.place, self.since = 0, time.monotonic()

    def start(self) -> None:
        """A process begins."""
        self.since = time.monotonic()

    def __call__(self) -> bool:
        """Read on; has there been word lately?"""
        text = b""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.place)
                text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.place += len(whole)
        for line in map(json.loads, whole.splitlines()):
            self.since = time.monotonic()
            self.tasks = line.get("tasks", self.tasks)
            self.bar.total = len(self.tasks)
            self.where = "" if "begin" in line else line.get("at", self.where)
            if "finding" in line:
                self.done = line["number"] + 1
                self.bar.update()
                self.check.add(Finding(**line["finding"]))
        return time.monotonic() - self.since < TASK_SECONDS


def on_device(check: Check, stage: str, share: float) -> None:
    """Run a stage of gpu_device.py until `share` of the budget is spent. What dies or hangs is named, and the rest goes on."""
    command = [*DEVICE_STAGE, stage, "--device", check.device, "--results", str(check.scratch / f"{stage}.jsonl")]
    with tqdm(desc=stage, unit="task", leave=False, disable=None) as bar:
        follow = Follower(check, stage, bar)
        while check.left(share) > 0 and (not follow.tasks or follow.done < len(follow.tasks)):
            before = follow.done
            follow.start()
            outcome = check.run([*command, "--skip", str(before)], check.left(share), follow)
            hangs = not follow() and outcome.code is None
            if outcome.code is None and not hangs:
                break
            if follow.done > before and not hangs:
                continue  # all is done; or a task has spoilt its process, or the next one has ended it: it is tried first now
            why = f"no word for {TASK_SECONDS:.0f} s" if hangs else cause_in(outcome.stderr, outcome.code)
            what = follow.tasks[follow.done] if follow.tasks else "all"
            at = f", at {follow.where}" if follow.where else ""
            check.add(Finding(stage, what, FAIL, why + at, {"log": outcome.log}))
            if not follow.tasks:
                return
            follow.done += 1
        for name in follow.tasks[follow.done :] if follow.tasks else ["all"]:
            check.not_run(stage, name)


def machine(check: Check) -> None:
    on_device(check, "machine", 0.08)
    for finding in check.findings:
        if finding.what in ("GPUs", "processor", "software"):
            check.machine |= finding.figures


def kernels(check: Check) -> None:
    on_device(check, "kernels", 0.33)


def attention(check: Check) -> None:
    on_device(check, "attention", 0.43)


# ---------------------------------------------------------------- 4: numerics


def train(check: Check, ranks: int, flags: list[str], name: str, seconds: float, device: str = "") -> tuple[Path, Outcome]:
    """Run the trainer; the run folder and how it ended."""
    folder = check.scratch / name
    command = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    own = ["--device", device or check.device, "--out", str(folder), "--resume", "never", "--checkpoint-minutes", "0"]
    own += ["--timeout", f"{max(120.0, TASK_SECONDS):g}"]
    return folder, check.run([*command, "train_gpt.py", *flags, *own], seconds)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Those of one kind in a run's log; none where there is no log."""
    path = folder / "log.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if line["event"] == kind]


def losses(folder: Path, kind: str) -> list[float]:
    """NaN for one that was not finite."""
    return [math.nan if e["loss"] is None else e["loss"] for e in events(folder, kind)]


def ended(outcome: Outcome, folder: Path) -> str:
    """Why a trainer that should have ended well did not; nothing if it did."""
    if outcome.code is None:
        steps = len(events(folder, "train"))
        return f"its time was up after {steps} steps"
    return "" if outcome.code == 0 else cause_in(outcome.stderr, outcome.code)


def golden_flags() -> list[str]:
    """Of a run of the golden curve: fp32, Muon's iteration too, which would take bf16 on a GPU."""
    flags = ["--track", "tiny", *GOLDEN_FLAGS]
    optimizer = tricks.merge_optimizer(train_gpt.resolve(flags)[0].optimizer, "muon:dtype=fp32")
    return [*flags, "--optimizer", optimizer, "--dtype", "fp32"]


def compare_curves(what: str, found: dict[str, list[float]], wanted: dict[str, list[float]], source: str) -> Finding:
    """Every training and validation loss to within GOLDEN_TOLERANCE."""
    figures = {"found": found, "wanted": wanted, "tolerance": GOLDEN_TOLERANCE, "source": source}
    worst = (0.0, "")
    for kind, losses in wanted.items():
        own = found.get(kind, [])
        if len(own) != len(losses):
            return Finding("numerics", what, FAIL, f"{len(own)} {kind} losses, not {len(losses)}", figures)
        for i, (a, b) in enumerate(zip(own, losses, strict=True)):
            off = abs(a - b) / abs(b)
            if not off <= GOLDEN_TOLERANCE:
                words = (
                    f"{kind} loss {i + 1} is {a:.5f}, not {b:.5f}: off by {off:.2g}, allowed {GOLDEN_TOLERANCE:g}, of {source}"
                )
                return Finding("numerics", what, FAIL, words, figures)
            worst = max(worst, (off, f"{kind} loss {i + 1}"))
    count = sum(map(len, wanted.values()))
    words = f"{count} losses, the worst off by {worst[0]:.2g} of {GOLDEN_TOLERANCE:g} ({worst[1]}), of {source}"
    return Finding("numerics", what, PASS, words, figures)


def numerics(check: Check, share: float = 0.52) -> None:
    """`tiny` in fp32 on one device and on all, against the curve that a CPU left; without its corpus, against this CPU."""
    flags, wanted, source = golden_flags(), json.loads(GOLDEN.read_text()), "the stored curve of a CPU"
    data_root = ROOT / "corpora"
    there = shards.dataset_folder(data_root, "sotu", "bytes") / "dataset.json"
    if not there.exists() and check.left(share) > 0:
        check.run([sys.executable, "-m", "data", "prepare", "sotu"], min(60.0, check.left(share)))
    flags += ["--data-root", str(data_root)]
    if not there.exists() and check.left(share) > 0:
        source = "this machine's CPU (the corpus sotu could not be fetched)"
        flags += made_flags(check, "bytes", 256)
        folder, outcome = train(check, 1, flags, "golden-cpu", check.left(share), device="cpu")
        if why := ended(outcome, folder):
            check.add(Finding("numerics", "tiny:record on the CPU", FAIL, why, {"log": outcome.log}))
            return
        wanted = {kind: losses(folder, kind) for kind in ("train", "val")}
    for ranks in sorted({1, check.ranks}):
        what = f"tiny:record in fp32 on {ranks} {'GPU' if check.cuda else 'CPU rank'}{'s' * (ranks > 1)}"
        if check.left(share) < (START if check.cuda else 0):
            check.not_run("numerics", what)
            continue
        folder, outcome = train(check, ranks, flags, f"golden-{ranks}", check.left(share))
        found = {kind: losses(folder, kind) for kind in ("train", "val")}
        if outcome.code is None:
            check.not_run("numerics", what, f"{NO_TIME}: {ended(outcome, folder)}")
        elif why := ended(outcome, folder):
            check.add(Finding("numerics", what, FAIL, why, {"log": outcome.log, "found": found}))
        else:
            check.add(compare_curves(what, found, wanted, source))


# ---------------------------------------------------------------- 5: recipes


def make_data(folder: Path, vocab_size: int) -> None:
    """A corpus of random tokens whose frequencies fall as Zipf's law has it, in documents of a few hundred: what there is to
    learn is how often each comes."""
    rng = np.random.default_rng(0)
    share = np.cumsum(1 / (np.arange(vocab_size - 1) + 2.7))
    splits = {}
    for split, size in MADE_TOKENS.items():
        tokens = np.searchsorted(share / share[-1], rng.random(size)).clip(max=vocab_size - 2).astype(shards.TOKEN)
        borders = np.cumsum(rng.geometric(1 / 700, size // 700))
        documents = np.split(tokens, borders[borders < size])
        splits[split] = shards.write(folder, "made", split, documents, eot=vocab_size - 1)
    manifest = {"corpus": "made", "tokenizer": folder.name.rpartition("-")[2], "vocab_size": vocab_size, "source": "random"}
    shards.write_manifest(folder, manifest | {"splits": splits})


def made_flags(check: Check, tokenizer: str, vocab_size: int) -> list[str]:
    """Trainer flags for made data, which is made if it is not there."""
    folder = shards.dataset_folder(check.scratch, "made", tokenizer)
    if not (folder / "dataset.json").exists():
        make_data(folder, vocab_size)
    return ["--corpus", "made", "--tokenizer", tokenizer, "--data-root", str(check.scratch)]


def card_word(check: Check) -> str | None:
    """--hardware of these GPUs, by their slowest; `here` of a CPU; None where the table lacks one."""
    if not check.cuda:
        return "here"
    words = [d.get("card") for d in check.machine.get("devices", [])]
    if not words or None in words:
        return None
    return f"{check.ranks}x{min(words, key=lambda word: hardware.CARDS[word].bf16)}"


def predict(check: Check, flags: list[str]) -> tuple[cost.Prediction | None, list[str], str]:
    """What the dry run says of a run with these flags, the flags with a micro-batch that fits, and why nothing is said.

    Raises:
        UsageError: no micro-batch fits.
    """
    word = card_word(check)
    if word is None:
        return None, flags, "no prediction: this card is not in the table"
    dry = ["--hardware", word, "--world-size", str(check.ranks)]
    try:
        return cost.predict([*flags, *dry]), flags, ""
    except cost.TooLittleMemory as error:
        if not error.fits:
            raise
        flags = [*flags, "--micro-batch-tokens", str(error.fits)]
        return cost.predict([*flags, *dry]), flags, ""


def fitted(check: Check, track: str, recipe: str, seconds: float) -> tuple[cost.Prediction | None, list[str], str]:
    """As `predict`, for a batch that so many seconds allow: the track's own, or the largest half of a half of it. Without a
    prediction, 64 sequences a rank at most.

    Raises:
        UsageError: no micro-batch fits, or no batch.
    """
    small = REHEARSED.get(track, {}) if not check.cuda else {}
    settings = tricks.apply(track, recipe)[0] | small
    length, vocab_size = settings["sequence_length"], settings["vocab_size"]
    flags = ["--track", track, "--tricks", recipe, "--steps", str(STEPS), "--schedule", "constant", "--check-ranks", "25"]
    # batches of one size: their time is to be one number, beside one prediction
    flags += ["--val-every", str(STEPS), "--batch-schedule", "constant"]
    flags += [word for key, value in small.items() for word in ("--" + key.replace("_", "-"), str(value))]
    flags += [*(["--no-compile"] if small else []), *made_flags(check, settings["tokenizer"], vocab_size)]
    unit = check.ranks * length
    sequences = max(1, (64 * unit if small else settings["batch_tokens"]) // unit)
    if check.cuda and card_word(check) is None:
        sequences = min(sequences, 64)
    start = (START + COMPILE * bool(settings.get("compile"))) if check.cuda else 0.0
    while True:
        batch = ["--batch-tokens", str(sequences * unit), "--val-tokens", str(min(sequences * unit, MADE_TOKENS["val"] // 2))]
        found, all_flags, why = predict(check, flags + batch)
        if found is None or not check.cuda or start + MARGIN * STEPS * found.seconds < seconds:
            return found, all_flags, why
        if sequences == 1:
            raise UsageError(f"{NO_TIME}: {STEPS} steps are predicted to take {STEPS * found.seconds:.0f} s")
        sequences //= 2


def recipe_run(check: Check, track: str, recipe: str, seconds: float) -> Finding:
    """STEPS steps by the trainer on all devices, against the dry run."""
    what = f"{track}:{recipe}, {STEPS} steps on {check.ranks} {'GPU' if check.cuda else 'CPU rank'}{'s' * (check.ranks > 1)}"
    began = time.monotonic()
    try:
        prediction, flags, why_none = fitted(check, track, recipe, seconds)
    except UsageError as error:
        return Finding("recipes", what, NOT_RUN, str(error))
    started = time.time()
    folder, outcome = train(check, check.ranks, flags, "run", seconds - (time.monotonic() - began))
    config, model_config, _ = train_gpt.resolve(flags)
    found, times = losses(folder, "train"), [e["step_time"] for e in events(folder, "train")]
    ready = [datetime.fromisoformat(e["utc"]).timestamp() - started for e in events(folder, "start")]
    result = json.loads(path.read_text()) if (path := folder / "result.json").exists() else {}
    shutil.rmtree(folder, ignore_errors=True)
    flags = [word.replace(str(check.scratch), "scratch") for word in flags]
    figures: dict[str, Any] = {"flags": flags, "losses": found, "step_times": times, "result": result}
    figures["seconds_to_start"] = ready[0] if ready else None
    if prediction:
        parts = prediction.times | {"step": prediction.seconds}
        figures["predicted"] = parts | {"memory": dataclasses.asdict(prediction.step.memory)}
    if outcome.code is None and not result:
        return Finding("recipes", what, NOT_RUN, f"{NO_TIME}: {ended(outcome, folder)}", figures | {"log": outcome.log})
    if outcome.code and result.get("status") != "diverged":
        return Finding("recipes", what, FAIL, ended(outcome, folder), figures | {"log": outcome.log})
    if wrong := trouble(found):
        return Finding("recipes", what, FAIL, wrong, figures)
    step = statistics.median(times[WARM:])
    rate = config.batch_tokens / step
    peak = result["peak_memory"]
    figures |= {"step": step, "tokens_per_second": rate, "peak_memory": peak, "batch_tokens": config.batch_tokens}
    words = [
        f"loss {found[0]:.2f} to {found[-1]:.2f}",
        f"{step * 1e3:.3g} ms a step" + (f" (predicted {prediction.seconds * 1e3:.3g})" if prediction else ""),
        f"{rate:,.0f} tokens/s of batches of {config.batch_tokens:,}",
        *(f"ready in {s:.0f} s" for s in ready),
    ]
    card = prediction.where.card if prediction else None
    if card and check.cuda:
        figures["mfu"] = rate * train_gpt.mean_flops(config, model_config) / (card.bf16 * check.ranks)
        words.append(f"MFU {figures['mfu']:.1%}")
    memory = f" (predicted {prediction.step.memory.total / 1e9:.3g})" if card else ""
    words.append(f"{peak / 1e9:.3g} GB at most{memory}")
    words += [why_none] if why_none else []
    slow = bool(card) and step > MARGIN * prediction.seconds
    return Finding("recipes", what, SLOWER if slow else PASS, ", ".join(words), figures)


def trouble(found: list[float]) -> str:
    """What is wrong with the losses of a recipe, if anything."""
    bad = [i + 1 for i, loss in enumerate(found) if not math.isfinite(loss)]
    if bad or len(found) < STEPS:
        where = f"step {bad[0]}" if bad else f"step {len(found) + 1}"
        return f"the loss is not finite at {where}, or the run ended there"
    first, last = statistics.mean(found[:5]), statistics.mean(found[-5:])
    return "" if last < first else f"the loss does not fall: {first:.4f} in the first five steps, {last:.4f} in the last"


def wire(check: Check) -> None:
    """NCCL's all-reduce, at the size of GPT-2 124M's gradients."""
    what = f"all-reduce on {check.ranks} ranks"
    if check.ranks == 1:
        return
    results = check.scratch / "wire.json"
    module = ["-m", *DEVICE_STAGE[2:]] if DEVICE_STAGE[1] == "-m" else DEVICE_STAGE[1:]
    size = 4 * 124_439_808 if check.cuda else 2**20
    command = [*TORCHRUN, f"--nproc_per_node={check.ranks}", *module, "wire", "--device", check.device]
    outcome = check.run([*command, "--results", str(results), "--bytes", str(size)], min(90.0, check.left()))
    if results.exists():
        check.add(Finding(**json.loads(results.read_text())))
    elif outcome.code is None:
        check.add(Finding("recipes", what, FAIL, "no answer in 90 s: the ranks do not reach each other", {"log": outcome.log}))
    else:
        check.add(Finding("recipes", what, FAIL, cause_in(outcome.stderr, outcome.code), {"log": outcome.log}))


def recipes(check: Check) -> None:
    if check.left() > 0:
        wire(check)
    for (track, recipe), share in RECIPES.items():
        if not check.cuda and track != "tiny" and track not in REHEARSED:
            continue
        what = f"{track}:{recipe}"
        if check.left() < (START if check.cuda else 1.0):
            check.not_run("recipes", what)
            continue
        try:
            check.add(recipe_run(check, track, recipe, share * check.left()))
        except Exception as error:
            check.add(Finding("recipes", what, FAIL, cause(error)))


STAGES: dict[str, Callable[[Check], None]] = {
    "machine": machine,
    "kernels": kernels,
    "attention": attention,
    "numerics": numerics,
    "recipes": recipes,
}
