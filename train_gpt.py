"""Train a GPT to a target validation loss: one file, read from top to bottom.

    python train_gpt.py --track cpu --tricks record                 a laptop: a minute on 2 cores, most of it compiling
    python train_gpt.py --track cpu --tricks modern,muon --steps 600 --seed 1
    python train_gpt.py --track gpt2-small --tricks record          one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track gpt2-small --tricks record

What comes out: one run folder (runs/<track>/<recipe>-s<seed>-<hash>) with config.json, env.json, log.jsonl (an event
a line), checkpoints/ and, written last, result.json. Exit codes: 0 trained (whether the target was reached stands in
result.json), 1 ranks died, hung or differ, 2 the command was wrong (nothing was written), or memory or disk is full,
3 diverged, 75 ended by a signal after a checkpoint. After 1, 2 and 75 the same command continues.

The global batch is `--batch-tokens`, whatever the number of ranks or micro-batches, and its content depends on the
seed and the step alone; so one rank, eight ranks, and a resumed run train on the same data in the same order.
"""

import argparse
import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import optimizers
import tricks
from data.shards import IGNORED, Dataset, Loader, dataset_folder, validation_starts
from engine import hardware, schedules
from engine.checkpoint import Checkpoints, damage, listing, newest, step_of
from engine.ranks import RankError, Traffic, World, leave, reduce_in_bf16
from engine.run_folder import Display, Run, all_settings, default_folder, git, lock, now, settings_hash, source_hash
from engine.spec import UsageError, convert, nearest, split
from layers import attention, kernels
from model import GPT, ModelConfig, flops_per_token, parameter_counts, refusal, roles, setting
from optimizers.mantissa import keep_mantissas, to_bf16
from optimizers.shard import Sharded

STOPPED = 75  # exit code of a run that a signal ended: EX_TEMPFAIL of sysexits.h, "try again later"

# ---------------------------------------------------------------- Config


@dataclass(frozen=True)
class Config:
    """Every setting of a run but the model's own (ModelConfig); both become flags, flat. Tracks and tricks set them."""

    track: str = setting("cpu", "corpus, model size and target: " + ", ".join(tricks.TRACKS))
    tricks: str = setting("baseline", "comma-separated tricks or a recipe (baseline, record); README lists them")
    optimizer: str = setting("adamw", "optimizer SPEC, name or name:key=value,...; or path/to/file.py:Class")
    average: str = setting("none", "average of the weights to evaluate at, SPEC: " + ", ".join(optimizers.AVERAGES))
    table_optimizer: str = setting(
        "sparse_adagrad", "optimizer of n-gram tables with --ngram-sparse, SPEC: " + ", ".join(optimizers.TABLE_OPTIMIZERS)
    )
    rates: str = setting("", "factors on learning rates, by role or part of a parameter's name: embedding=2,smear=0.1")
    schedule: str = setting("constant", "learning-rate schedule SPEC")
    momentum_schedule: str = setting("keep", "momentum schedule SPEC")
    steps: int = setting(1000, "optimizer updates", least=1)
    batch_tokens: int = setting(4096, "global batch, tokens, whatever the number of ranks", least=1)
    batch_schedule: str = setting("constant", "batch-size schedule SPEC: multiples of --batch-tokens")
    window_schedule: str = setting("constant", "attention-window schedule SPEC: parts of --window")
    length_schedule: str = setting("constant", "sequence-length schedule SPEC: parts of --sequence-length")
    micro_batch_tokens: int = setting(0, "tokens per forward pass and rank; 0: as many as usually fit")
    clip: float = setting(0.0, "largest global gradient norm; 0 is off")
    future_tokens: int = setting(
        0, "tokens after the next that training also predicts, less and less (modded-nanogpt #53: 2); its loss is then a sum"
    )
    tied_until: float = setting(
        0.0, "part of the run in which an untied head shares the weight of the embedding (modded-nanogpt #51, #53: 2/3)", most=1
    )
    weights: str = setting(
        "fp32", "hidden matrices: fp32, or bf16 with the other 16 bits in the optimizer (modded-nanogpt #57)", ("fp32", "bf16")
    )
    reduce: str = setting(
        "fp32", "gradients on their way between ranks: as they are, or bf16 at half the bytes", ("fp32", "bf16")
    )
    shard_optimizer: bool = setting(
        False,
        "divide the state of element-wise optimizers over the ranks (ZeRO-1, arXiv 1910.02054), and give each rank only the "
        "gradients that it needs",
    )
    seed: int = setting(0, "seed of weights, dropout and data order")
    corpus: str = setting("sotu", "what to train on: `./run.sh data list`")
    tokenizer: str = setting("bytes", "bytes or gpt2")
    data_root: str = setting("corpora", "folder of the prepared corpora")
    align_documents: bool = setting(False, "training sequences begin with a document (modded-nanogpt #26)")
    shuffle: bool = setting(True, "shuffle sequences every epoch; otherwise the corpus in its own order")
    val_tokens: int = setting(262144, "validation tokens, fixed per track", least=1)
    val_spread: bool = setting(True, "validate on sequences spread over the whole split; otherwise on its beginning")
    loss_tokens: int = setting(0, "loss on the last so many targets of each sequence alone; 0: on all")
    val_every: int = setting(0, "steps between validations; 0: five times a run. The last step is always validated")
    target_loss: float = setting(0.0, "validation loss to reach, nats per token; 0: none")
    stop_at_target: bool = setting(False, "stop at the first validation that meets the target")
    out: str = setting("", "run folder; empty: runs/<track>/<recipe>-s<seed>-<hash>")
    resume: str = setting(
        "auto",
        "auto: continue an unfinished run; never: start anew; must: fail without a checkpoint",
        ("auto", "never", "must"),
    )
    branch: str = setting("", "comma-separated folders of runs of another length: start from the last state shared with one")
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: by the minutes, and at the end")
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints; 0: off")
    keep: int = setting(2, "checkpoints to keep, the newest", least=1)
    milestone_every: int = setting(0, "checkpoints at multiples of so many steps are kept for good; 0: none")
    nonfinite: str = setting("stop", "a loss or gradient that is not finite: stop, or skip:K to leave out up to K updates")
    check_ranks: int = setting(100, "steps between checks that all ranks hold the same weights; 0: never")
    timeout: float = setting(600.0, "seconds that ranks wait for one that hangs")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    dtype: str = setting("auto", "type of activations and matrix products", ("auto", "bf16", "fp32"))
    compile: bool = setting(False, "torch.compile the model and the update; the warm-up is off the clock")
    kernels: str = setting("auto", "fused Triton kernels; auto: for bf16 on CUDA; off: plain PyTorch", ("auto", "off"))
    deterministic: bool = setting(False, "only deterministic kernels")
    wandb: bool = setting(False, "also log to Weights & Biases")
    tensorboard: bool = setting(False, "also log to TensorBoard")


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing its usage and leaving."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """Flags generated from the two dataclasses; absent flags leave no trace, so that tracks and tricks can set them."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument(
        "--dry-run", action="store_true", default=argparse.SUPPRESS,
        help="train nothing: print memory, communication, time and cost; takes --hardware 8xH100 (default: here), "
        "--world-size N and --gpu-price DOLLARS an hour (cost.py)",
    )  # fmt: skip
    for title, cls in (("run", Config), ("model", ModelConfig)):
        group = made.add_argument_group(title)
        for f in dataclasses.fields(cls):
            flag, help = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
            if f.type is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
            else:
                group.add_argument(flag, default=argparse.SUPPRESS, help=help, metavar=f.type.__name__.upper())
    return made


def resolve(argv: list[str]) -> tuple[Config, ModelConfig, str]:
    """Command line -> config, model config, recipe name.

    Raises:
        UsageError: unknown flag, track, trick, optimizer, schedule or key; wrong type; contradicting settings.
    """
    flags = parser()
    found, unknown = flags.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        raise UsageError(f"unknown flag {name}: {nearest(name, flags._option_string_actions)}")
    given = vars(found)
    given.pop("dry_run", None)  # main's business
    all_fields = {f.name: f for cls in (Config, ModelConfig) for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if isinstance(value, str):
            given[key] = convert(value, all_fields[key].type, "--" + key.replace("_", "-"))
    settings, recipe = tricks.apply(given.get("track", Config.track), given.get("tricks", Config.tricks))
    settings |= given
    words = {key: settings.get(key, getattr(Config, key)) for key in ("optimizer", "schedule")}
    settings["optimizer"], schedule = tricks.tuned(settings.get("track", Config.track), **words)
    settings["schedule"] = given.get("schedule", schedule)  # whoever asks for one gets it
    for key, value in settings.items():
        if why := refusal(all_fields[key], value):
            raise UsageError(f"--{key.replace('_', '-')} {why}")
    pick = lambda cls: cls(**{f.name: settings[f.name] for f in dataclasses.fields(cls) if f.name in settings})  # noqa: E731
    config = pick(Config)
    allowed_skips(config.nonfinite)
    optimizers.check(config.optimizer, config.average, config.table_optimizer)
    schedules.build(config.schedule, config.steps)
    schedules.build_momentum(config.momentum_schedule, config.steps)
    schedules.build_batches(config.batch_schedule, config.steps)
    schedules.build_windows(config.window_schedule, config.steps)
    lengths = schedules.build_lengths(config.length_schedule, config.steps).parts
    try:
        model_config = pick(ModelConfig)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not 0 <= config.loss_tokens <= model_config.sequence_length:
        most = model_config.sequence_length
        raise UsageError(f"--loss-tokens must be 0 to {most}, the sequence length; got {config.loss_tokens}")
    if config.stop_at_target and not config.target_loss:
        raise UsageError("--stop-at-target needs a target: add --target-loss")
    if config.momentum_schedule != "keep" and not optimizers.has_momentum(config.optimizer):
        name = split(config.optimizer)[0]
        raise UsageError(f"--momentum-schedule {config.momentum_schedule}: {name} has no momentum that it could change")
    if config.tied_until and model_config.tied_head:
        raise UsageError(f"--tied-until {config.tied_until:g} needs a head that can be untied: add --no-tied-head")
    T = model_config.sequence_length
    if any(round(T * part) < 1 or T % round(T * part) for part in lengths):
        raise UsageError(f"--length-schedule: its parts of {T} tokens must divide them, such as parts=0.25/0.5/1")
    if config.loss_tokens and min(lengths) < 1:
        raise UsageError("--length-schedule cuts sequences, of which --loss-tokens counts the end: give one of them")
    shortest = round(T * min(lengths))
    if not 0 <= config.future_tokens < shortest:
        raise UsageError(f"--future-tokens must be 0 to {shortest - 1}, got {config.future_tokens}")
    return config, model_config, recipe


def allowed_skips(nonfinite: str) -> int:
    """Updates that may be left out because something was not finite: 0 for "stop", K for "skip:K"."""
    word, _, count = nonfinite.partition(":")
    if (word, count) != ("stop", "") and not (word == "skip" and count.isdigit()):
        raise UsageError(f"--nonfinite takes stop or skip:K, such as skip:3; not {nonfinite!r}")
    return int(count or 0)


# ---------------------------------------------------------------- Clock


class Clock:
    """Training time: everything between start() and stop(), nothing else. Seconds.

    The loop starts it before a step's data is fetched and stops it after the optimizer's update; set-up, compilation
    and its warm-up, validation, checkpoints and logging are outside. Machines stall, so three figures are kept: the
    sum, the robust time = steps x median step per stage (steps of equal work: of one batch size and, where a method does
    something every few steps, of one place in that round), and the CPU time of the process.

    A GPU is still at work when stop() is called. To wait for it in each step would have it idle until the first kernels of
    the next one come; so there the clock runs on, through logging too, and a step lasts from one stop() to the next. Before
    what is off the clock, pause() waits for the device. The sum is wall-clock time, then, whatever is done when.
    """

    def __init__(self, device: torch.device):
        self.wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
        self.stages: dict[str, list[float]] = {}
        self.process_time, self.running = 0.0, False

    def start(self) -> None:
        """Begins a step."""
        if not self.running:
            if self.wait:
                self.wait()
            self.wall, self.cpu, self.running = time.perf_counter(), time.process_time(), True

    def stop(self, stage: str) -> float:
        """Ends a step; returns its seconds."""
        step_time = self.passed()
        self.stages.setdefault(stage, []).append(step_time)
        self.stage, self.running = stage, self.wait is not None
        return step_time

    def pause(self) -> None:
        """Something off the clock is next; what the device has yet to do is the last step's."""
        if self.running:
            self.wait()
            self.stages[self.stage][-1] += self.passed()
            self.running = False

    def passed(self) -> float:
        """Seconds since the clock was last read."""
        wall, cpu = time.perf_counter(), time.process_time()
        seconds, self.process_time = wall - self.wall, self.process_time + cpu - self.cpu
        self.wall, self.cpu = wall, cpu
        return seconds

    @property
    def train_time(self) -> float:
        return sum(map(sum, self.stages.values()))

    @property
    def robust_train_time(self) -> float:
        return sum(len(times) * statistics.median(times) for times in self.stages.values())


# ---------------------------------------------------------------- Training


def shares(config: Config, model_config: ModelConfig, world: World) -> tuple[int, int]:
    """Sequences per rank and step, and per micro-batch.

    Raises:
        UsageError: the batch does not divide evenly.
    """
    unit = world.size * model_config.sequence_length
    if config.batch_tokens % unit:
        near = max(unit, round(config.batch_tokens / unit) * unit)
        raise UsageError(
            f"--batch-tokens {config.batch_tokens} is not divisible by ranks x sequence length = {world.size} x "
            f"{model_config.sequence_length}: the nearest that is: {near}"
        )
    per_rank = config.batch_tokens // unit
    if config.micro_batch_tokens:
        micro, rest = divmod(config.micro_batch_tokens, model_config.sequence_length)
        if rest or not micro or per_rank % micro:
            raise UsageError(
                f"--micro-batch-tokens {config.micro_batch_tokens} must be a multiple of the sequence length "
                f"{model_config.sequence_length} that divides the {per_rank * model_config.sequence_length} tokens of a rank"
            )
        return per_rank, micro
    most = max(1, (65536 if world.device.type == "cuda" else 16384) // model_config.sequence_length)
    return per_rank, max(n for n in range(1, min(per_rank, most) + 1) if per_rank % n == 0)


def scheduled(config: Config, steps: int) -> Callable[[int], tuple]:
    """step -> everything in it that depends on the length of the run."""
    rate, momentum = schedules.build(config.schedule, steps), schedules.build_momentum(config.momentum_schedule, steps)
    batches = schedules.build_batches(config.batch_schedule, steps)
    windows = schedules.build_windows(config.window_schedule, steps)
    lengths = schedules.build_lengths(config.length_schedule, steps)
    return lambda step: (
        rate(step), momentum(step), batches.size(step), batches.rate(step), step + 1 < config.tied_until * steps,
        schedules.future_weights(config.future_tokens, step, steps), windows.until(step),
        lengths.until(step)[-1],
    )  # fmt: skip


def stages(config: Config) -> Counter[tuple[float, float, int]]:
    """(part of the windows, part of the sequences, size of the batch in --batch-tokens) -> in how many steps of the run."""
    lengths = schedules.build_lengths(config.length_schedule, config.steps)
    windows = schedules.build_windows(config.window_schedule, config.steps)
    batches = schedules.build_batches(config.batch_schedule, config.steps)
    each = ((windows.until(step)[-1], lengths.until(step)[-1], batches.size(step)) for step in range(config.steps))
    return Counter(each)


def mean_flops(config: Config, model_config: ModelConfig) -> int:
    """FLOPs that training needs per token: `model.flops_per_token`, the mean over a run whose windows or sequences change."""
    T = model_config.sequence_length
    units = [
        (steps * size, flops_per_token(model_config, part, round(T * cut)))
        for (part, cut, size), steps in stages(config).items()
    ]
    return round(sum(n * flops for n, flops in units) / sum(n for n, _ in units))


@torch.no_grad()
def validate(model: torch.nn.Module, dataset: Dataset, starts: list[int], length: int, micro: int, world: World) -> float:
    """Mean loss in nats per token over the fixed validation sequences, shared over the ranks."""
    model.eval()
    mine = starts[world.rank :: world.size]
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(0, len(mine), micro):
        tokens, targets = dataset.batch(mine[i : i + micro], length)
        loss = model(tokens.to(world.device), targets.to(world.device))
        total += torch.tensor([loss.item() * len(tokens), len(tokens)], dtype=torch.float64)
    model.train()
    total = world.sum(total if world.device.type == "mps" else total.to(world.device))  # MPS has no fp64
    return (total[0] / total[1]).item()


def warm_up(
    model: torch.nn.Module, shape: tuple[int, int], model_config: ModelConfig, device: torch.device,
    future: torch.Tensor | None = None, logits: bool = False,
) -> None:  # fmt: skip
    """Compile by one forward and backward on random tokens [sequences, length], off the clock; of the loss, or the logits.

    Leaves weights, gradients, optimizer, RNG and data position as they were: it takes no step and reads no data.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        tokens = torch.randint(model_config.vocab_size, shape, device=device)
        # targets in memory of their own, as in training: torch.compile would make another graph for one tensor given twice
        (model(tokens).sum() if logits else model(tokens, tokens.clone(), future)).backward()
    model.zero_grad(set_to_none=True)


class Interrupt:
    """SIGINT, SIGTERM and SIGUSR1 ask the run to end after the step that it is in; a second SIGINT ends the process at once."""

    def __init__(self):
        self.name: str | None = None

    def __enter__(self) -> "Interrupt":
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1
        self.before = {number: signal.signal(number, self.ask) for number in (getattr(signal, name) for name in names)}
        return self

    def ask(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Training:
    """Everything that one run holds: built in the order in which data meets it, then `run()`."""

    def __init__(self, config: Config, model_config: ModelConfig, recipe: str, world: World):
        self.config, self.model_config, self.world = config, model_config, world
        self.dtype, self.dtype_reason = hardware.pick_dtype(config.dtype, world.device)
        attention.check(model_config.attention, world.device)
        kernels.use(config.kernels)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        # data
        self.sequences, self.micro = shares(config, model_config, world)
        self.batches = schedules.build_batches(config.batch_schedule, config.steps)
        T = model_config.sequence_length
        folder = dataset_folder(config.data_root, config.corpus, config.tokenizer)
        self.loader = Loader(
            Dataset(folder, "train", config.loss_tokens), T, self.sequences * world.size, seed=config.seed,
            shuffle=config.shuffle, rank=world.rank, world_size=world.size, device=world.device,
            before=self.batches.before, align=model_config.end_of_text if config.align_documents else None,
        )  # fmt: skip
        self.val = Dataset(folder, "val", config.loss_tokens)
        self.val_starts = validation_starts(self.val, T, config.val_tokens, config.val_spread)
        if (self.val.vocab_size or 0) > model_config.vocab_size:
            raise UsageError(f"{folder} has a vocabulary of {self.val.vocab_size}: add --vocab-size {self.val.vocab_size}")
        if model_config.document_mask:
            self.val.documents(model_config.end_of_text)  # there are some
        self.fingerprint = f"{self.loader.dataset.fingerprint}-{self.val.fingerprint}"
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a machine
            for dataset in (self.loader.dataset, self.val):
                dataset.prove(model_config.vocab_size)
        # model: the same weights on every rank, then each rank its own stream for dropout
        torch.manual_seed(config.seed)
        self.gpt = GPT(model_config).to(world.device)
        self.gpt.compute_dtype = self.dtype
        self.gpt.head.fp8, self.head_note = hardware.pick_fp8(model_config.head_dtype, world.device)
        if config.tied_until:
            self.gpt.head.weight.data.copy_(self.gpt.embedding.weight)
        if config.weights == "bf16":
            role = roles(self.gpt)
            mantissas = to_bf16([p for name, p in self.gpt.named_parameters() if role[name] == "matrix"])
        torch.manual_seed(config.seed * 1009 + world.rank + 1)
        self.windows, self.seen = schedules.build_windows(config.window_schedule, config.steps), (1.0,)
        self.compiled = config.compile and hardware.can_compile(world.device)
        self.lengths = schedules.build_lengths(config.length_schedule, config.steps)
        flex = attention.choose(world.device, model_config.dropout, True, model_config.attention) == "flex"
        if self.compiled and flex and len(self.windows.starts) > 1:
            self.gpt.free_windows()  # else a graph a stage, each of which takes a minute to compile
        if self.compiled:  # a graph a stage
            torch._dynamo.config.recompile_limit = max(8, len(self.windows.starts) + len(self.lengths.starts))
        dynamic = None if len(self.lengths.parts) == 1 else False  # a graph a length, not one for all, which is slower
        self.model = torch.compile(self.gpt, dynamic=dynamic) if self.compiled else self.gpt
        if world.size > 1:
            sparse = [name for name, p in self.model.named_parameters() if any(p is t for t in self.gpt.tables())]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, sparse)  # `sum_sparse` adds them up
            ids = [world.device.index] if world.device.type == "cuda" else None
            # the only buffers are constant tables: nothing to broadcast before each forward pass
            self.model = DistributedDataParallel(
                self.model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False
            )
        # optimizer and schedules
        self.optimizer = optimizers.build(
            config.optimizer, self.gpt, config.steps, config.average, config.table_optimizer, config.rates
        )
        if config.shard_optimizer:
            self.optimizer = Sharded(self.optimizer)
        self.scattered = config.shard_optimizer and world.size > 1  # gradients: each rank has the sums that it needs
        if self.scattered:
            self.model.register_comm_hook(torch.bfloat16 if config.reduce == "bf16" else None, self.optimizer.reduce)
        elif config.reduce == "bf16" and world.size > 1:
            self.model.register_comm_hook(None, reduce_in_bf16)
        if config.weights == "bf16":
            self.optimizer = keep_mantissas(self.optimizer, mantissas)
        if optimizers.schedule_free(self.optimizer) and config.schedule != "constant":
            name = config.optimizer.split(":")[0]
            raise UsageError(f"{name} brings its own schedule and warm-up: add --schedule constant, not {config.schedule}")
        self.multiplier = schedules.build(config.schedule, config.steps)
        self.momentum = schedules.build_momentum(config.momentum_schedule, config.steps)
        # clock and log
        self.clock, self.period = Clock(world.device), optimizers.period(config.optimizer)
        self.peak, self.peak_source = hardware.matmul_peak(world.device, self.dtype)
        self.flops = mean_flops(config, model_config)
        self.steps_done, self.last_val, self.reached, self.skipped = 0, None, None, 0
        self.saved: int | None = None  # step of the last checkpoint
        self.wire_bytes = 0  # that this rank sends in a step
        self.wishes = [0.0, 0.0]  # of this rank: to stop, to save; of all ranks together once a step has summed them up
        settings = all_settings(config, model_config, recipe)
        out = config.out or default_folder(settings, recipe)
        self.run_folder = Run(Path(out), settings, config.resume)
        self.checkpoints = Checkpoints(self.run_folder.checkpoints, config.keep, config.milestone_every, self.written)
        self.complete: list[dict[str, float]] = []  # checkpoints written since the log was last
        self.start: Path | None = None  # the checkpoint to continue from, of this run or of one that it branches off from
        self.lock = None
        if not self.run_folder.finished:
            if config.resume == "must" and not listing(self.run_folder.checkpoints):
                raise UsageError(
                    f"--resume must: no checkpoint in {self.run_folder.checkpoints}; use --resume auto to start one"
                )
            self.check_data(wait=1.0)  # shards of less than a gigabyte have been read by then
            self.take()

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.batches.before(self.steps_done) * self.config.batch_tokens

    def take(self) -> None:
        """Lock the run folder and choose the checkpoint to continue from, on rank 0 for all.

        Raises:
            UsageError: another process has the folder; `--resume must` and nothing to continue from.
        """
        problem = None
        if self.world.main:
            try:
                self.lock = lock(self.run_folder.folder)
                passed: list[str] = []
                if self.config.resume != "never":
                    self.start, passed = newest(self.run_folder.checkpoints)
                for line in passed:
                    print(line, file=sys.stderr, flush=True)
                if self.start is None and self.config.branch:
                    self.start = self.branching_point()
                if self.start is None and self.config.resume == "must":
                    problem = f"--resume must: {passed[0]}; use --resume auto to start anew"
                else:
                    self.checkpoints.clean(everything=self.config.resume == "never")
            except UsageError as error:
                problem = str(error)
        problem, self.start = self.world.gather((problem, self.start))[0]
        if problem:
            if self.lock:
                self.lock.release()
            raise UsageError(problem)

    def branching_point(self) -> Path | None:
        """The newest checkpoint of the runs in `branch` that this run would have written too: their settings are the same but
        for the length, and what is scheduled was the same at every step until then.

        So a stable phase is trained once for several cool-downs, and a branch is the very run that it would have been.

        Raises:
            UsageError: a run of other settings, or of settings that follow the length in another way than by the schedule.
        """
        found: list[Path] = []
        for folder in map(Path, self.config.branch.split(",")):
            try:
                other = json.loads((folder / "config.json").read_text())
            except (OSError, ValueError):
                raise UsageError(f"--branch {folder}: there is no run") from None
            if settings_hash(other, ("steps",)) != settings_hash(self.run_folder.config, ("steps",)):
                raise UsageError(f"--branch {folder}: it differs from this run in more than its steps")
            if optimizers.of_length(self.config.optimizer, self.config.average, other["steps"]) != optimizers.of_length(
                self.config.optimizer, self.config.average, self.config.steps
            ):
                raise UsageError(f"--branch {folder}: settings of {self.config.optimizer} are fractions of the run's length")
            own, theirs = scheduled(self.config, self.config.steps), scheduled(self.config, other["steps"])
            shared = 0
            while shared < min(self.config.steps, other["steps"]) and own(shared) == theirs(shared):
                shared += 1
            usable = [p for p in listing(folder / "checkpoints") if step_of(p) <= shared and damage(p) is None]
            found += usable[:1]
        return max(found, key=step_of, default=None)

    def close(self) -> None:
        """Let go of the run folder, whatever happened: what was logged is written, a checkpoint begun is finished."""
        self.checkpoints.close()
        if self.run_folder.log:
            with contextlib.suppress(OSError):  # the disk is full: said already
                self.run_folder.log.close()
        if self.lock:
            self.lock.release()

    def check_data(self, wait: float | None = None) -> None:
        """Every rank calls this where something is about to be kept that damaged data would spoil.

        Raises:
            UsageError: a shard is damaged, holds tokens of another vocabulary, or has changed since the run began.
        """
        problems = [dataset.problem(wait) for dataset in (self.loader.dataset, self.val)]
        found = [p for rank in self.world.gather(problems) for p in rank if p]
        if found:
            raise UsageError(found[0])

    def environment(self) -> dict[str, Any]:
        commit = git("rev-parse", "HEAD")
        return hardware.describe(self.world.device) | {
            "commit": commit and commit.strip(),
            "dirty": bool(git("status", "--porcelain")),
            "source_sha256": source_hash(),
            "data_fingerprint": self.fingerprint,
            "world_size": self.world.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": self.compiled,
            "peak_flops": self.peak,
            "peak_source": self.peak_source,
        }

    @property
    def branched(self) -> bool:
        """Does it start from another run's checkpoint?"""
        return self.start is not None and self.start.parent != self.run_folder.checkpoints

    def restore(self) -> int:
        """Continue from the checkpoint `start`: weights, optimizer, generators, clock. Returns the log's length then, bytes.

        Raises:
            UsageError: the settings or the data are not those that the checkpoint was trained with.
        """
        optimizer, saved, generators = self.checkpoints.load(self.start, self.gpt, self.optimizer.state_dict())
        if not self.branched and saved["config"] != settings_hash(self.run_folder.config):
            raise UsageError(f"{self.start} is of a run with other settings: choose another --out")
        if saved["data"] != self.fingerprint:
            raise UsageError(f"{self.start} was trained on other data ({saved['data']}, here {self.fingerprint})")
        if self.world.main and saved["source"] != source_hash():
            print(f"{self.start} was written by other code: what follows is not the same run", file=sys.stderr, flush=True)
        self.optimizer.load_state_dict(optimizer)
        if len(generators) and saved["ranks"] == self.world.size:
            torch.set_rng_state(generators[0])
            if self.world.device.type == "cuda" and len(generators) > 1:
                torch.cuda.set_rng_state(generators[1], self.world.device)
        else:  # other ranks than before: dropout cannot repeat itself, but must not repeat what it began with
            torch.manual_seed((self.config.seed * 1009 + self.world.rank + 1) * 1_000_003 + saved["step"])
        self.steps_done, self.last_val, self.reached = saved["step"], saved["last_val"], saved["reached"]
        self.skipped, self.clock.stages = saved["skipped"], saved["stages"]
        self.clock.process_time = saved["process_time"] if self.world.main else 0.0  # of all ranks together
        self.saved = None if self.branched else self.steps_done
        return saved["log_bytes"]

    def save(self) -> None:
        """Begin to write a checkpoint; it is complete when its `checkpoint` event is in the log."""
        self.clock.pause()
        self.check_data()
        self.world.beat(f"step {self.steps_done}: checkpoint")
        generators = [torch.get_rng_state()]
        if self.world.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.world.device))
        extra = {
            "last_val": self.last_val, "reached": self.reached, "skipped": self.skipped, "stages": self.clock.stages,
            "process_time": sum(self.world.gather(self.clock.process_time)),
            "log_bytes": self.run_folder.logged() if self.world.main else 0,
            "data": self.fingerprint, "source": source_hash(), "config": settings_hash(self.run_folder.config),
        }  # fmt: skip
        with self.evaluated():
            self.checkpoints.save(self.steps_done, self.gpt, self.optimizer.state_dict(), generators, extra)
        self.saved_at, self.saved = time.monotonic(), self.steps_done

    def backward(self, x: torch.Tensor, y: torch.Tensor, drawn: bool = False) -> tuple[float, float]:
        """Gradients of the mean loss over the global batch; that loss and their norm.

        drawn: in the place of the targets y, where they count, take some that the model itself predicts (the curvature
            estimate of Sophia).
        """
        future = self.future()
        loss = torch.zeros((), device=self.world.device)
        micro, _ = self.micro_batch(self.steps_done)
        parts = range(0, len(x), micro)
        for i in parts:
            tokens = x[i : i + micro]
            # DDP averages gradients over ranks once per step: no_sync must cover forward and backward of the others
            with self.model.no_sync() if self.world.size > 1 and i != parts[-1] else contextlib.nullcontext():
                targets = y[i : i + micro]
                if drawn:
                    logits = self.model(tokens).flatten(0, 1)
                    labels = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(1)
                    labels = labels.where(targets.flatten() != IGNORED, IGNORED)
                    part = F.cross_entropy(logits, labels, ignore_index=IGNORED) / len(parts)
                else:
                    part = self.model(tokens, targets, future) / len(parts)
                part.backward()
            loss += part.detach()
        for p in self.gpt.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = self.world.sum_sparse(p.grad, torch.bfloat16 if self.config.reduce == "bf16" else p.grad.dtype)
                p.grad.values().div_(self.world.size)
        if self.tied:
            self.gpt.head.weight.grad.add_(self.gpt.embedding.weight.grad)
            self.gpt.embedding.weight.grad = None
        norm = torch.nn.utils.get_total_norm(self.optimizer.counted() if self.scattered else self.gradients())
        self.loss_here = loss
        # The one place where a step waits for the device: a loss or gradient that is not finite must be seen before the
        # update. So the device idles until the update's first kernel, for as long as Python takes there: 0.8 ms for GPT-2's
        # 148 weights on a slow core, 1 % of an 80 ms step. To let it decide by itself would cost more: weights and state of
        # any method would have to be kept and put back, for AdamW 1.5 GB copied and selected from, over 2 ms on an H100.
        numbers = torch.stack([loss, norm.square() if self.scattered else norm])  # squares add up to the whole norm's
        everyone = torch.cat([numbers, upload(self.wishes, self.world.device)])
        loss_now, norm_now, *self.wishes = self.world.sum(everyone).tolist()
        return loss_now / self.world.size, math.sqrt(norm_now) if self.scattered else norm_now / self.world.size

    def follow(self, step: int) -> None:
        """Give the model the attention windows of `step`."""
        parts = self.windows.until(step)
        if parts != self.seen:
            self.gpt.see(parts)
            self.seen = parts

    def micro_batch(self, step: int) -> tuple[int, int]:
        """Sequences of a micro-batch of `step` and their length: where they are cut shorter, there are as many more."""
        length = round(self.model_config.sequence_length * self.lengths.until(step)[-1])
        return self.micro * self.model_config.sequence_length // length, length

    def future(self) -> torch.Tensor | None:
        """Weights of the losses on the tokens after the next, in this step."""
        if not self.config.future_tokens:
            return None
        weights = schedules.future_weights(self.config.future_tokens, self.steps_done, self.config.steps)
        return upload(weights, self.world.device)

    @property
    def tied(self) -> bool:
        """Do embedding and head, though two weights, move as one in this step?"""
        return self.steps_done < self.config.tied_until * self.config.steps

    def retie(self) -> None:
        """Give the embedding the head's weight, where they moved as one in the last step."""
        if self.config.tied_until and self.steps_done - 1 < self.config.tied_until * self.config.steps:
            self.gpt.embedding.weight.data.copy_(self.gpt.head.weight)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """The weights by which a method is judged, and which are stored as the model, in the place of those it trains at."""
        self.optimizer.eval()
        self.retie()
        yield
        self.optimizer.train()
        self.retie()

    def gradients(self) -> list[torch.Tensor]:
        """All of them, dense; of a coalesced sparse one the rows it has. They share memory with the originals."""
        found = [p.grad for p in self.gpt.parameters() if p.grad is not None]
        return [g._values() if g.is_sparse else g for g in found]

    def step(self) -> tuple[float, float, float] | None:
        """One update on the clock: loss over the global batch, gradient norm, seconds. None when not finite: no update."""
        config, step = self.config, self.steps_done
        self.clock.start()
        if config.tied_until and step == math.ceil(config.tied_until * config.steps):  # from here on two, with one history
            optimizers.copy_state(self.optimizer, self.gpt.head.weight, self.gpt.embedding.weight)
        self.follow(step)
        self.world.beat(f"step {step + 1}: data")
        x, y = (tokens.view(-1, self.micro_batch(step)[1]) for tokens in self.loader.next(step))
        self.world.beat(f"step {step + 1}: forward and backward")
        loss_now, norm_now = self.backward(x, y)
        if not (math.isfinite(loss_now) and math.isfinite(norm_now)):
            self.clock.stop("nonfinite")
            return None
        if config.clip and norm_now > config.clip:
            torch._foreach_mul_(self.gradients(), config.clip / norm_now)
        multiplier, momentum = self.multiplier(step) * self.batches.rate(step), self.momentum(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if momentum is not None and "momentum" in group:
                group["momentum"] = momentum
        self.world.beat(f"step {step + 1}: update")
        self.optimizer.step()
        self.gpt.zero_grad(set_to_none=True)
        for part in optimizers.parts(self.optimizer):
            if getattr(part, "wants_curvature", bool)():
                if math.isfinite(self.backward(x, y, drawn=True)[1]):  # else the estimate before serves on
                    counted = self.config.loss_tokens / self.model_config.sequence_length or 1
                    part.curvature(round(config.batch_tokens * self.batches.size(step) * counted))
                self.gpt.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.retie()
        place = f" {step % self.period}" * (self.period > 1)
        return loss_now, norm_now, self.clock.stop(f"{config.batch_tokens * self.batches.size(step)}{place}")

    def measured_step(self) -> tuple[float, float, float] | None:
        """`step`, with a look at what this rank sends in it: the first step of several ranks, a little slower for that."""
        with Traffic(self.world.size) as traffic:
            done = self.step()
        self.wire_bytes = traffic.sent if done else 0
        if self.world.main and done:
            self.display.note(f"each rank sends {self.wire_bytes / 1e6:,.3g} MB a step")
        return done

    def leave_out(self) -> bool:
        """A step whose loss or gradient was not finite, and was not taken: say what and where. May the run go on?"""
        self.clock.pause()
        bad = [n for n, p in self.gpt.named_parameters() if p.grad is not None and not all_finite(p.grad)]
        losses, found = zip(*self.world.gather((bool(self.loss_here.isfinite()), bad)), strict=True)
        ranks = [rank for rank, fine in enumerate(losses) if not fine]
        bad = list(dict.fromkeys(name for names in found for name in names))  # scattered, each rank sees its own
        self.gpt.zero_grad(set_to_none=True)
        step, self.skipped = self.steps_done + 1, self.skipped + 1
        on = self.skipped <= allowed_skips(self.config.nonfinite)
        self.checkpoints.wait()
        if self.world.main:
            self.run_folder.event(
                "nonfinite", step=step, ranks=ranks, parameters=bad[:8], skipped=on, train_time=self.clock.train_time
            )
            where = f"the loss of rank {', '.join(map(str, ranks))}, " if ranks else ""
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            last, _ = newest(self.run_folder.checkpoints)
            self.display.note(
                f"step {step}: not finite: {where}gradients of {', '.join(bad[:8]) or 'nothing'}{more}; "
                f"{'the step was left out' if on else 'nothing was updated'}; newest checkpoint: {last or 'none'}"
            )
        self.steps_done += on
        return on

    def validate(self) -> None:
        self.clock.pause()
        self.world.beat(f"step {self.steps_done}: validation")
        # the bare model: DDP's forward pass may wait for ranks that have fewer sequences to validate, and off the clock a graph
        # of its own would take longer to compile than it saves
        with self.evaluated():
            loss = validate(self.gpt, self.val, self.val_starts, self.model_config.sequence_length, self.micro, self.world)
        self.last_val = loss
        config, step, now = self.config, self.steps_done, self.clock.train_time
        met = bool(config.target_loss) and loss <= config.target_loss
        if self.world.main:
            self.run_folder.event("val", step=step, tokens=self.tokens, loss=loss, train_time=now)
            self.display.validated(step, loss)
        if met and self.reached is None:
            self.reached = {"steps": step, "time": now}
            if self.world.main:
                self.run_folder.event("target", step=step, loss=loss, target_loss=config.target_loss, train_time=now)

    def warm_up(self) -> None:
        """Compile what each stage still to come needs, and the update."""
        starts = (*self.windows.starts, *self.lengths.starts)
        for step in sorted({max(start, self.steps_done) for start in starts if start < self.config.steps}):
            self.follow(step)
            shape = self.micro_batch(step)
            warm_up(self.model, shape, self.model_config, self.world.device, self.future())
            if any(hasattr(part, "wants_curvature") for part in optimizers.parts(self.optimizer)):
                warm_up(self.model, shape, self.model_config, self.world.device, logits=True)
        optimizers.compile_update(self.optimizer)

    def run(self) -> dict[str, Any] | None:
        """Train to the last step, the target (when asked to stop there) or divergence; write and return the result.

        A signal ends the run earlier, with a checkpoint and without a result: None.
        """
        config, main = self.config, self.world.main
        log_bytes = self.restore() if self.start else 0
        first = self.steps_done
        cards = self.world.gather(hardware.device_name(self.world.device))
        if self.compiled:
            self.world.beat("compiling")
            self.warm_up()
        if main:
            self.run_folder.open(self.environment(), log_bytes, self.start.parent.parent if self.branched else None)
            about = dict(seed=config.seed, config=settings_hash(self.run_folder.config, ("seed",)), source=source_hash())
            kind = "branch" if self.branched else "resume" if self.start else "start"
            self.run_folder.event(kind, step=first, **about, data=self.fingerprint, utc=now())
            self.display = Display(config, self.run_folder.folder, self.flops, self.peak and self.peak * self.world.size, first)
            self.display.note("\n".join([self.greeting(), *self.fallbacks(cards)]))
        every = config.val_every or math.ceil(config.steps / 5)
        status, self.saved_at = "ok", time.monotonic()
        self.model.train()
        self.optimizer.train()
        self.retie()
        with Interrupt() as interrupt:
            while self.steps_done < config.steps and not (config.stop_at_target and self.reached):
                epoch = math.floor(self.loader.epochs(self.steps_done))
                if main and self.steps_done and epoch > math.floor(self.loader.epochs(self.steps_done - 1)):
                    self.run_folder.event("epoch", step=self.steps_done, epoch=epoch)
                    self.display.note(f"step {self.steps_done}: all data seen {epoch} times, it repeats from here")
                due = bool(config.checkpoint_minutes) and time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes
                self.wishes = [float(interrupt.name is not None), float(main and due)]
                done = self.step() if self.world.size == 1 or self.wire_bytes else self.measured_step()
                stop, due = self.wishes  # of any rank: all hear of them in the same step
                if done is None and not self.leave_out():
                    status = "diverged"
                    break
                if main and done:
                    self.log_step(*done)
                if config.check_ranks and self.steps_done % config.check_ranks == 0:
                    self.clock.pause()
                    self.world.check_equal(list(self.gpt.parameters()), f"step {self.steps_done}: weights")
                if self.steps_done % every == 0 or self.steps_done == config.steps:
                    self.validate()
                    if not math.isfinite(self.last_val):  # the last update: its gradient was finite, the weights are not
                        status = "diverged"
                        break
                if stop and self.steps_done < config.steps:
                    self.save()
                    self.end_of_checkpoint()
                    if main:
                        self.run_folder.event("stopped", step=self.steps_done, signal=interrupt.name, utc=now())
                        self.display.close()
                    return None
                if due or (config.checkpoint_every and self.steps_done % config.checkpoint_every == 0):
                    self.save()
            if status == "ok" and self.steps_done < config.steps:
                status = "stopped"
            if status != "diverged" and self.saved != self.steps_done:
                self.save()
            self.end_of_checkpoint()
        return self.finish(status)

    def end_of_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, and log it."""
        self.checkpoints.wait()
        if self.world.main:
            self.log_checkpoint()

    def written(self, **facts: float) -> None:
        """Called from another thread when a checkpoint is complete."""
        self.complete.append(facts)

    def log_checkpoint(self) -> None:
        """On rank 0, once a checkpoint is complete. Raises what went wrong in writing it."""
        self.checkpoints.poll()
        while self.complete:
            self.run_folder.event("checkpoint", **self.complete.pop(0))

    def log_step(self, loss: float, norm: float, step_time: float) -> None:
        step, lr = self.steps_done, self.optimizer.param_groups[0]["lr"]
        now = self.clock.train_time
        self.run_folder.event(
            "train", step=step, tokens=self.tokens, loss=loss, lr=lr, grad_norm=norm,
            step_time=step_time, train_time=now,
        )  # fmt: skip
        rate = self.config.batch_tokens * self.batches.size(step - 1) / step_time
        self.display.step(step, loss, lr, step_time, now, rate)
        self.log_checkpoint()

    def greeting(self) -> str:
        counts = parameter_counts(self.gpt)
        epochs = self.loader.epochs(self.config.steps)
        sizes = " / ".join(f"{self.config.batch_tokens * size:,}" for size in self.batches.sizes)
        return (
            f"{self.run_folder.folder}\n"
            f"{counts['total'] / 1e6:.1f}M parameters on {self.world.size} x {self.world.device.type}, "
            f"{str(self.dtype).removeprefix('torch.')} ({self.dtype_reason}), {self.config.steps:,} steps of "
            f"{sizes} tokens ({epochs:.2f} epochs of {self.config.corpus})"
        )

    def fallbacks(self, cards: list[str]) -> list[str]:
        """What this machine lacks and the run does without. cards: the device of each rank."""
        device, found = self.world.device, []
        if self.compiled != self.config.compile:
            found.append(f"{hardware.compiler_lacks(device)}: not compiled")
        if device.type == "cuda" and kernels.triton is None and self.config.kernels == "auto" and self.dtype == torch.bfloat16:
            found.append("no Triton here: plain PyTorch in place of the fused kernels")
        if device.type == "cuda" and self.world.size > 1 and not torch.distributed.is_nccl_available():
            found.append("this PyTorch has no NCCL: ranks talk through gloo, which is slower")
        if self.head_note:
            found.append(self.head_note)
        if len(set(cards)) > 1:
            found.append(f"GPUs of different kinds, {hardware.counted(cards)}: the slowest sets the pace of all")
        return found

    def finish(self, status: str) -> dict[str, Any]:
        config, clock = self.config, self.clock
        seconds = clock.train_time
        tokens = self.tokens
        rate = tokens / seconds if seconds else 0.0
        memory = hardware.peak_memory(self.world.device)
        everyone = self.world.gather((clock.process_time, memory, optimizers.state_bytes(self.optimizer), self.wire_bytes))
        process_times, memories, states, sent = zip(*everyone, strict=True)
        result = {
            "status": status,
            "steps": self.steps_done,
            "tokens": tokens,
            "val_loss": self.last_val if status != "diverged" else None,
            "target_loss": config.target_loss or None,
            "target_reached": bool(self.reached) and status != "diverged",
            "time_to_target": self.reached["time"] if self.reached else None,
            "steps_to_target": self.reached["steps"] if self.reached else None,
            "train_time": seconds,
            "robust_train_time": clock.robust_train_time,
            "stalled": seconds > 1.1 * clock.robust_train_time,
            "process_time": sum(process_times),
            "tokens_per_second": rate,
            "flops_per_token": self.flops,
            "mfu": rate * self.flops / (self.peak * self.world.size) if self.peak else None,
            "peak_memory": max(memories),
            "optimizer_state_bytes": max(states),
            "wire_bytes": max(sent),
            "parameters": parameter_counts(self.gpt),
        }
        if self.world.main:
            self.display.close()
            self.run_folder.close(result)
        return result


def upload(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """[n] fp32 on the device, without waiting until it has done what was asked of it before."""
    here = torch.tensor(numbers)
    return (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)


def all_finite(grad: torch.Tensor) -> bool:
    return bool((grad.coalesce().values() if grad.is_sparse else grad).isfinite().all())


def describe_result(result: dict[str, Any], folder: Path) -> str:
    loss = "not finite" if result["val_loss"] is None else f"{result['val_loss']:.4f}"
    target = f" (target {result['target_loss']:g})" if result["target_loss"] else ""
    return (
        f"{result['status']}: validation loss {loss}{target}, {result['steps']} steps, {result['train_time']:.1f} s: {folder}"
    )


def more_memory(config: Config, model_config: ModelConfig, world: World) -> str:
    """What to change where a step does not fit."""
    sequences, micro = shares(config, model_config, world)
    smaller = next((n for n in range(micro // 2, 0, -1) if sequences % n == 0), None)
    ways = [f"--micro-batch-tokens {smaller * model_config.sequence_length}"] if smaller else []
    ways += [] if model_config.checkpoint_activations else ["--checkpoint-activations"]
    tokens = micro * model_config.sequence_length
    return f"micro-batches have {tokens} tokens; try {' or '.join(ways) or 'more GPUs, or an optimizer with less state'}"


def main(argv: list[str]) -> int:
    world = training = None
    try:
        if "--dry-run" in argv:
            return importlib.import_module("cost").dry_run(argv)
        config, model_config, recipe = resolve(argv)
        for flag, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
            if getattr(config, flag) and importlib.util.find_spec(package) is None:
                raise UsageError(f"--{flag} needs the package {package}: pip install {package}")
        world = World(config.device, config.timeout)
        training = Training(config, model_config, recipe, world)
        folder = training.run_folder.folder
        if training.run_folder.finished:
            result = json.loads((folder / "result.json").read_text())
            print(f"already there; --resume never trains it again\n{describe_result(result, folder)}")
            return 3 if result["status"] == "diverged" else 0
        result = training.run()
        if result is None:
            if world.main:
                print(f"stopped after step {training.steps_done}; the same command continues: {folder}", flush=True)
            return STOPPED
        if world.main:
            print(describe_result(result, folder))
        return 3 if result["status"] == "diverged" else 0
    except UsageError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a machine: it may be wrong on one of several
            print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        if world.first("out of memory"):
            said = ". ".join(str(error).split(". ")[:2]).rstrip(".")
            print(
                f"train_gpt.py: rank {world.rank}, {world.doing}: {said}; {more_memory(config, model_config, world)}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        return 2
    except torch.distributed.DistBackendError as error:  # NCCL's; it tells of its causes in its own log only
        said = str(error).strip().splitlines()[0]
        print(f"train_gpt.py: rank {os.environ.get('RANK', 0)}: {said}; NCCL_DEBUG=INFO says more", file=sys.stderr, flush=True)
        return 1
    except RankError as error:
        if world.main:
            print(f"train_gpt.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("train_gpt.py: no space left on the disk; free some, and the same command continues", file=sys.stderr)
        return 2
    finally:
        if training:
            training.close()
        training = None  # DDP first: were it the last to hold gloo's group, freeing that would wait for the GIL it holds
        if world:
            world.close()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
