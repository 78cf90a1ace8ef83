"""Train a GPT to a target validation loss: one file, read from top to bottom.

    python train_gpt.py --track cpu --tricks record                 a laptop: a minute or two on 2 cores with bf16
    python train_gpt.py --track cpu --tricks modern,muon --steps 600 --seed 1
    python train_gpt.py --track gpt2-small --tricks record          one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track gpt2-small --tricks record

What comes out: one run folder (runs/<track>/<name>-s<seed>-<hash>) with config.json, env.json, log.jsonl (one event a line),
checkpoints/ and, written last, result.json. Exit codes: 0 trained, 1 ranks died, hung or differ, 2 the command was wrong
(nothing was written), or memory or disk is full, 3 diverged, 75 ended by a signal after a checkpoint. After 1, 2 and 75 the
same command continues.

The global batch is `--batch-tokens`, whatever the number of ranks or micro-batches, and its content depends only on the seed
and the step: one rank, eight ranks, and a resumed run train on the same data in the same order.
"""

from engine import display, hardware  # before torch: it sets how threads wait  # isort: skip
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import hub
import optimizers
from config import Config, allowed_skips, mean_flops, more_memory, resolve, shared_steps, shares, standing
from data.shards import Dataset, Loader, dataset_folder, validation_starts
from engine.checkpoint import Checkpoints, branching_point, generators, listing, newest, seed, set_generators
from engine.command import Answer, Interrupt, command
from engine.ranks import Traffic, World, leave
from engine.run_folder import Run, all_settings, code_version, default_folder, lock, now_utc, settings_hash, source_hash
from engine.schedules import Course, Moment
from engine.spec import UsageError
from layers import attention, kernels
from layers.shape import ModelConfig
from model import GPT, parameter_counts, roles
from optimizers.mantissa import keep_mantissas, to_bf16
from optimizers.tied import TiedHead

STOPPED = 75  # exit code of a run that a signal ended: EX_TEMPFAIL of sysexits.h, "try again later"


class Diverged(Exception):
    """A loss, gradient or weight is not finite."""


@dataclass
class Progress:
    """How far a run has come: what a checkpoint keeps beside weights, optimizer and generators."""

    step: int = 0  # updates done
    last_val: float | None = None  # nats per token
    reached: dict[str, float] | None = None  # steps and seconds at the first validation that met the target
    skipped: int = 0  # steps left out because something was not finite
    stages: dict[str, list[float]] = field(default_factory=dict)  # seconds of each step, by kind of step
    process_time: float = 0.0  # CPU seconds


# ---------------------------------------------------------------- clock


class Clock:
    """Training time: everything between start() and stop(), nothing else. Seconds.

    A step is timed from fetching its data to the end of the update; set-up, compilation, validation, checkpoints and logging
    are outside. Machines stall, so three figures are kept: the sum; steps x median step per stage (steps of equal work: of one
    batch size and, where a method does something every few steps, of one place in that round); CPU time of the process.

    Waiting for a GPU at each stop() would leave it idle. There the clock runs on, through logging too: a step lasts from one
    stop() to the next, and pause() waits for the device before work off the clock. The sum is still wall-clock time.
    """

    def __init__(self, device: torch.device, progress: Progress):
        self.wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
        self.progress, self.running = progress, False

    def start(self) -> None:
        if not self.running:
            if self.wait:
                self.wait()
            self.wall, self.cpu, self.running = time.perf_counter(), time.process_time(), True

    def stop(self, stage: str) -> float:
        """Seconds of the step that ends here."""
        step_time = self.passed()
        self.progress.stages.setdefault(stage, []).append(step_time)
        self.stage, self.running = stage, self.wait is not None
        return step_time

    def pause(self) -> None:
        """Off the clock from here; what the device has yet to do is the last step's."""
        if self.running:
            self.wait()
            self.progress.stages[self.stage][-1] += self.passed()
            self.running = False

    def passed(self) -> float:
        """Seconds since the clock was last read."""
        wall, cpu = time.perf_counter(), time.process_time()
        seconds = wall - self.wall
        self.progress.process_time += cpu - self.cpu
        self.wall, self.cpu = wall, cpu
        return seconds

    @property
    def train_time(self) -> float:
        return sum(map(sum, self.progress.stages.values()))

    @property
    def robust_train_time(self) -> float:
        return sum(len(times) * statistics.median(times) for times in self.progress.stages.values())


# ---------------------------------------------------------------- model and validation


def wrap(gpt: GPT, config: Config, course: Course, world: World) -> tuple[torch.nn.Module, bool]:
    """The model as the loop calls it, compiled and under DistributedDataParallel as asked; and whether it is compiled."""
    model: torch.nn.Module = gpt
    if compiled := config.compile and hardware.can_compile(world.device):
        flex = attention.choose(world.device, gpt.config.dropout, True, gpt.config.attention) == "flex"
        if flex and len(course.windows) > 1:
            gpt.free_windows()  # else a graph a stage, each of which takes a minute to compile
        torch._dynamo.config.recompile_limit = max(8, len(course.windows) + len(course.lengths))  # a graph a stage
        # a graph a length: one for all is slower
        model = torch.compile(gpt, dynamic=None if len(course.lengths) == 1 else False)
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        # the only buffers are constant tables: nothing to broadcast before each forward pass
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False)
        if config.reduce == "bf16":  # a lambda, since under its own name DDP takes torch's hook with NCCL alone
            model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return model, compiled


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


# ---------------------------------------------------------------- training


class Training:
    """Everything that one run holds: built in the order in which data meets it, then `run()`."""

    def __init__(self, config: Config, model_config: ModelConfig, recipe: str, world: World):
        self.config, self.model_config, self.world = config, model_config, world
        self.progress, self.course = Progress(), Course(config)
        self.clock = Clock(world.device, self.progress)
        self.seconds = 0.0  # on rank 0's clock: `position` follows it under --minutes
        self.dtype, self.dtype_reason = hardware.pick_dtype(config.dtype, world.device)
        attention.check(model_config.attention, world.device)
        kernels.use(config.kernels)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        self.build_data()
        self.build_model()
        self.build_optimizer()
        self.open_folder(recipe)

    def build_data(self) -> None:
        config, model_config, world, T = self.config, self.model_config, self.world, self.model_config.sequence_length
        sequences, self.micro = shares(config, model_config, world.size, world.device.type, hardware.card_memory(world.device))
        folder = dataset_folder(config.data_root, config.corpus, config.tokenizer)
        align = model_config.end_of_text if config.align_documents else None
        order = dict(seed=config.seed, shuffle=config.shuffle, before=self.course.units_before, align=align)
        ranks = dict(rank=world.rank, world_size=world.size, device=world.device)
        self.loader = Loader(Dataset(folder, "train", config.loss_tokens), T, sequences * world.size, **order, **ranks)
        self.val = Dataset(folder, "val", config.loss_tokens)
        self.val_starts = validation_starts(self.val, T, config.val_tokens, config.val_spread)
        if (self.val.vocab_size or 0) > model_config.vocab_size:
            raise UsageError(f"{folder} has a vocabulary of {self.val.vocab_size}: add --vocab-size {self.val.vocab_size}")
        if model_config.document_mask:
            self.val.documents(model_config.end_of_text)  # refuses a corpus without any
        self.datasets = (self.loader.dataset, self.val)
        self.fingerprint = "-".join(dataset.fingerprint for dataset in self.datasets)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a machine
            for dataset in self.datasets:
                dataset.prove(model_config.vocab_size)

    def build_model(self) -> None:
        """The same weights on every rank, then each rank its own stream for dropout."""
        config, world = self.config, self.world
        torch.manual_seed(config.seed)
        self.gpt = GPT(self.model_config).to(world.device)
        hub.fill(self.gpt, config.init_from)
        self.gpt.compute_dtype = self.dtype
        self.gpt.head.fp8, self.head_note = hardware.pick_fp8(self.model_config.head_dtype, world.device)
        if config.tied_until:
            self.gpt.head.weight.data.copy_(self.gpt.embedding.weight)
        if config.weights == "bf16":
            role = roles(self.gpt)
            self.mantissas = to_bf16([p for name, p in self.gpt.named_parameters() if role[name] == "matrix"])
        self.own_seed = config.seed * 1009 + world.rank + 1
        seed(self.own_seed)
        self.model, self.compiled = wrap(self.gpt, config, self.course, world)
        self.flops = mean_flops(config, self.model_config)

    def build_optimizer(self) -> None:
        config = self.config
        self.optimizer = optimizers.build(config.optimizer, self.gpt, config.steps, config.average, config.rates, config.outer)
        if config.weights == "bf16":
            self.optimizer = keep_mantissas(self.optimizer, self.mantissas)
        if optimizers.find(config.optimizer).own_schedule and config.schedule != "constant":
            name = config.optimizer.split(":")[0]
            raise UsageError(f"{name} brings its own schedule and warm-up: add --schedule constant, not {config.schedule}")
        self.tied = TiedHead(self.gpt, self.optimizer, config.tied_until * config.steps)
        self.period = optimizers.period(config.optimizer)

    def open_folder(self, recipe: str) -> None:
        """Find or make the run folder, lock it, and choose the checkpoint to continue from."""
        config, world = self.config, self.world
        settings = all_settings(config, self.model_config, recipe)
        self.run_folder = Run(Path(config.out or default_folder(settings)), settings, config.resume, world.main)
        folder = self.run_folder.checkpoints
        origin = dict(config=settings_hash(settings), data=self.fingerprint, source=source_hash())
        self.checkpoints = Checkpoints(folder, origin, config.keep, config.milestone_every)
        self.alone = not (config.checkpoint_minutes or config.checkpoint_every)  # then weights alone may be kept
        self.saved: int | None = None  # step of the last checkpoint
        self.wire_bytes = 0 if world.size == 1 else None  # that this rank sends in a step; None: not measured yet
        self.wishes = [0.0, 0.0]  # of this rank: to stop, to save; once a step has summed them up, of all ranks
        self.start: Path | None = None  # the checkpoint to continue from, of this run or of one that it branches off from
        if self.run_folder.finished:
            return
        if config.resume == "must" and not listing(folder):
            raise UsageError(f"--resume must: no checkpoint in {folder}; use --resume auto to start one")
        self.check_data(wait=1.0)  # shards of less than a gigabyte have been read by then
        self.start = world.main_does(self.take)
        self.branched = self.start is not None and self.start.parent != folder  # does it start from another run's checkpoint?

    def take(self) -> Path | None:
        """On rank 0: lock the run folder and choose the checkpoint to continue from. Raises UsageError where it cannot."""
        config, run = self.config, self.run_folder
        run.lock = lock(run.folder)
        stems = [Path(folder) for folder in config.branch.split(",") if folder]
        branch = partial(branching_point, stems, run.config, partial(shared_steps, config))
        try:
            return self.checkpoints.first(config.resume, config.steps, branch)
        except UsageError:
            run.release()
            raise

    def run(self) -> dict[str, Any] | None:
        """Train to the end, the target (when asked to stop there) or divergence; write and return the result. A signal ends
        the run earlier, with a checkpoint and without a result: None."""
        self.begin()
        with Interrupt() as interrupt:
            try:
                status = self.loop(interrupt)
            except Diverged:
                status = "diverged"
            return None if status == "signal" else self.finish(status)

    def begin(self) -> None:
        """Restore, compile, and open the log: what comes before the first step, off the clock."""
        config, world, folder = self.config, self.world, self.run_folder
        saved = self.restore() if self.start else {}
        first, self.seconds = self.progress.step, self.clock.train_time
        self.peak, source = hardware.matmul_peak(world.device, self.dtype)
        cards = world.gather(hardware.device_name(world.device))
        if self.compiled:
            world.beat("compiling")
            self.warm_up()
        if world.main:
            env = dict(data_fingerprint=self.fingerprint, world_size=world.size, dtype=str(self.dtype).removeprefix("torch."))
            env |= dict(compile=self.compiled, peak_flops=self.peak, peak_source=source)
            show = display.Display(config, folder.folder, self.flops, self.peak and self.peak * world.size, first, self.tokens)
            stem = self.start.parent.parent if self.branched else None
            folder.open(hardware.describe(world.device) | code_version() | env, saved, show, stem)
        about = dict(seed=config.seed, config=settings_hash(folder.config, ("seed",)), source=source_hash())
        kind = "branch" if self.branched else "resume" if self.start else "start"
        folder.event(kind, display.greeting(self, cards), step=first, **about, data=self.fingerprint, utc=now_utc())
        self.model.train()
        self.optimizer.train()
        self.tied.after_update(first)

    def warm_up(self) -> None:
        """Compile what each stage still to come needs, by a forward and backward on random tokens, and the update. Leaves
        weights, gradients, optimizer, RNG and data position as they were."""
        first, device = self.position, self.world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for position in sorted({max(start, first) for start in self.course.new_shapes()}):
                now = self.course.at(position)
                self.gpt.see(now.windows)
                tokens = torch.randint(self.model_config.vocab_size, self.shape(now), device=device)
                # targets in memory of their own, as in training: a tensor given twice would make another graph
                self.model(tokens, tokens.clone(), hardware.upload(now.future, device)).backward()
                self.model.zero_grad(set_to_none=True)
        optimizers.compile_update(self.optimizer)

    def loop(self, interrupt: Interrupt) -> str:
        """Step after step; returns why it ended: ok, stopped (at the target) or signal."""
        config, progress, fifth, self.saved_at = self.config, self.progress, math.ceil(self.config.steps / 5), time.monotonic()
        while (before := self.position) < config.steps and not (config.stop_at_target and progress.reached):
            self.note_epoch()
            overdue = bool(config.checkpoint_minutes) and time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes
            self.wishes = [float(interrupt.name is not None), float(self.world.main and overdue)]
            done = self.step() if self.wire_bytes is not None else self.measured_step()
            stop, overdue = self.wishes  # of any rank: all hear of them in the same step
            if done:
                self.log_step(*done)
            else:
                self.leave_out()
            if config.minutes:
                self.seconds = self.world.of_main(f"seconds/{progress.step}", self.clock.train_time)
            step, over = progress.step, self.position >= config.steps
            if step == 1:  # what no checkpoint can hold is said now, not after ten minutes
                self.checkpoints.packed(self.optimizer.state_dict(), self.alone)
            if config.check_ranks and step % config.check_ranks == 0:
                self.clock.pause()
                self.world.check_equal(list(self.gpt.parameters()), f"step {step}: weights")
            if over or (step % config.val_every == 0 if config.val_every else self.position // fifth > before // fifth):
                self.validate()
            if stop and not over:
                self.save()
                self.log_checkpoints(wait=True)
                self.run_folder.event("stopped", step=step, signal=interrupt.name, utc=now_utc())
                return "signal"
            if overdue or (config.checkpoint_every and step % config.checkpoint_every == 0):
                self.save()
        if self.saved != progress.step:
            self.save()
        return "ok" if self.position >= config.steps else "stopped"

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.course.units_before(self.progress.step) * self.config.batch_tokens

    @property
    def position(self) -> float:
        """Of the next step in the course: alike on all ranks."""
        return self.course.position(self.progress.step, self.seconds)

    def step(self) -> tuple[float, float, float] | None:
        """One update on the clock: loss over the global batch, gradient norm, seconds. None when not finite: no update."""
        config, step, world = self.config, self.progress.step, self.world
        now = self.course.at(self.position)
        self.clock.start()
        self.tied.before_step(step)
        self.gpt.see(now.windows)
        world.beat(f"step {step + 1}: data")
        x, y = (tokens.view(-1, self.shape(now)[1]) for tokens in self.loader.next(step))
        world.beat(f"step {step + 1}: forward and backward")
        loss, norm = self.backward(x, y, now)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.clock.stop("nonfinite")
            return None
        if config.clip and norm > config.clip:
            torch._foreach_mul_(self.gradients(), config.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = group["initial_lr"] * now.lr, group["initial_decay"] * now.decay
            if now.momentum is not None and "momentum" in group:
                group["momentum"] = now.momentum
        world.beat(f"step {step + 1}: update")
        optimizers.step(self.optimizer, config.optimizer)
        self.gpt.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.tied.after_update(self.progress.step)
        stage = str(config.batch_tokens * now.batch)  # steps of equal work, where roots or bases are renewed every few
        return loss, norm, self.clock.stop(stage if self.period == 1 else f"{stage} {step % self.period}")

    def backward(self, x: torch.Tensor, y: torch.Tensor, now: Moment) -> tuple[float, float]:
        """Gradients of the mean loss over the global batch [sequences, length]; that loss and their norm."""
        world, future = self.world, hardware.upload(now.future, self.world.device)
        loss = torch.zeros((), device=world.device)
        micro, _ = self.shape(now)
        parts = range(0, len(x), micro)
        for i in parts:
            # DDP averages gradients over ranks once per step: no_sync must cover forward and backward of the others
            with self.model.no_sync() if world.size > 1 and i != parts[-1] else contextlib.nullcontext():
                part = self.model(x[i : i + micro], y[i : i + micro], future) / len(parts)
                part.backward()
            loss += part.detach()
        self.tied.after_backward(self.progress.step)
        norm = torch.nn.utils.get_total_norm(self.gradients())
        self.loss_here = loss
        # The one place where a step waits for the device: what is not finite must be seen before the update. It then idles for
        # 0.8 ms of GPT-2's 80 (148 weights, a slow core); to keep and put back AdamW's 1.5 GB would take an H100 over 2 ms.
        everyone = torch.cat([torch.stack([loss, norm]), hardware.upload(self.wishes, world.device)])
        loss_sum, norm_sum, *self.wishes = world.sum(everyone).tolist()
        return loss_sum / world.size, norm_sum / world.size

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.gpt.parameters() if p.grad is not None]

    def shape(self, now: Moment) -> tuple[int, int]:
        """Sequences of a micro-batch and their length: where they are cut shorter, there are as many more."""
        length = round(self.model_config.sequence_length * now.length)
        return self.micro * self.model_config.sequence_length // length, length

    def measured_step(self) -> tuple[float, float, float] | None:
        """`step`, and what this rank sends in it: the first of several ranks, a little slower for that."""
        with Traffic(self.world.size) as traffic:
            done = self.step()
        self.wire_bytes = traffic.sent if done else None
        return done

    def leave_out(self) -> None:
        """A step whose loss or gradient was not finite was not taken: say what and where. Raises Diverged: one too many."""
        self.clock.pause()
        bad = [name for name, p in self.gpt.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        ranks = [rank for rank, fine in enumerate(self.world.gather(bool(self.loss_here.isfinite()))) if not fine]
        self.gpt.zero_grad(set_to_none=True)
        progress, step = self.progress, self.progress.step + 1
        progress.skipped += 1
        goes_on = progress.skipped <= allowed_skips(self.config.nonfinite)
        progress.step += goes_on
        self.checkpoints.wait()
        last = newest(self.run_folder.checkpoints)[0] if self.world.main else None
        about = dict(step=step, ranks=ranks, parameters=bad[:8], skipped=goes_on, tokens=self.tokens)
        note = display.nonfinite(step, ranks, bad, goes_on, last)
        self.run_folder.event("nonfinite", note, **about, train_time=self.clock.train_time)
        if not goes_on:
            raise Diverged

    def note_epoch(self) -> None:
        """Say when the data begins anew."""
        step, epoch = self.progress.step, math.floor(self.loader.epochs(self.progress.step))
        if step and epoch > math.floor(self.loader.epochs(step - 1)):
            note = f"step {step}: all data seen {epoch} times, it repeats from here"
            self.run_folder.event("epoch", note, step=step, epoch=epoch)

    def log_step(self, loss: float, norm: float, step_time: float) -> None:
        about = dict(step=self.progress.step, tokens=self.tokens, loss=loss, lr=float(self.optimizer.param_groups[0]["lr"]))
        self.run_folder.event("train", **about, grad_norm=norm, step_time=step_time, train_time=self.clock.train_time)
        self.log_checkpoints()

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """The weights by which a method is judged, and which are stored as the model, instead of those it trains at."""
        self.optimizer.eval()
        self.tied.after_update(self.progress.step)
        yield
        self.optimizer.train()
        self.tied.after_update(self.progress.step)

    def loss_on(self, dataset: Dataset, starts: list[int]) -> float:
        """On the bare model: DDP's forward pass may wait for ranks that have fewer sequences to validate, and off the clock a
        graph of its own would take longer to compile than it saves."""
        with self.evaluated():
            return validate(self.gpt, dataset, starts, self.model_config.sequence_length, self.micro, self.world)

    def validate(self) -> None:
        self.clock.pause()
        config, progress, seconds = self.config, self.progress, self.clock.train_time
        self.world.beat(f"step {progress.step}: validation")
        progress.last_val = loss = self.loss_on(self.val, self.val_starts)
        note = f"step {progress.step}: validation loss {loss:.4f}"
        self.run_folder.event("val", note, step=progress.step, tokens=self.tokens, loss=loss, train_time=seconds)
        if config.target_loss and loss <= config.target_loss and progress.reached is None:
            progress.reached = {"steps": progress.step, "time": seconds}
            self.run_folder.event("target", step=progress.step, loss=loss, target_loss=config.target_loss, train_time=seconds)
        if not math.isfinite(loss):  # after the last update: its gradient was finite, the weights are not
            raise Diverged

    def validate_also(self) -> dict[str, float]:
        """Nats per token by the words of --val-also, on a fourth of --val-tokens; a corpus that cannot be read is left out."""
        config, T, losses = self.config, self.model_config.sequence_length, {}
        for word in filter(None, config.val_also.split(",")):
            corpus, last = (config.corpus, T // 4) if word == "tail" else (word, 0)
            problem, folder = None, dataset_folder(config.data_root, corpus, config.tokenizer)
            try:
                dataset = Dataset(folder, "val", last).check(self.model_config.vocab_size)
                starts = validation_starts(dataset, T, max(T, config.val_tokens // 4), True)
            except UsageError as error:
                problem = str(error)
            if problem := next(filter(None, self.world.gather(problem)), None):  # all ranks leave it out, or none waits
                self.run_folder.event("note", f"--val-also {word} is left out: {problem}")
            else:
                losses[word] = self.loss_on(dataset, starts)
        return losses

    def save(self) -> None:
        """Begin to write a checkpoint; it is complete when its event is logged. Raises Diverged: weights are not finite."""
        self.clock.pause()
        self.check_data()
        self.world.beat(f"step {self.progress.step}: checkpoint")
        progress = asdict(self.progress) | {"process_time": sum(self.world.gather(self.progress.process_time))}
        extra, rng = dict(progress=progress) | self.run_folder.logged(), generators(self.world.device)
        with self.evaluated():
            if not torch.stack([p.isfinite().all() for p in self.gpt.parameters()]).all():
                raise Diverged
            self.checkpoints.save(self.progress.step, self.gpt, self.optimizer.state_dict(), rng, extra, self.alone)
        self.saved_at, self.saved = time.monotonic(), self.progress.step

    def restore(self) -> dict[str, Any]:
        """Continue from the checkpoint `start`: weights, optimizer, generators, clock. Returns its plain values."""
        optimizer, saved, states = self.checkpoints.load(self.start, self.gpt, self.optimizer.state_dict())
        optimizers.restore(self.optimizer, optimizer, self.config.optimizer)
        if len(states) and saved["ranks"] == self.world.size:
            set_generators(states, self.world.device)
        else:  # other ranks than before: dropout cannot repeat itself, but must not repeat what it began with
            seed(self.own_seed * 1_000_003 + saved["step"])
        self.progress = self.clock.progress = Progress(**saved["progress"])
        self.progress.process_time *= self.world.main  # rank 0 has the sum of all ranks
        self.saved = None if self.branched else self.progress.step
        return saved

    def check_data(self, wait: float | None = None) -> None:
        """Before something is kept that damaged data would spoil; on every rank. Raises UsageError where a shard is damaged,
        holds tokens of another vocabulary, or has changed since the run began."""
        everyones = self.world.gather([dataset.problem(wait) for dataset in self.datasets])
        if problems := [problem for rank in everyones for problem in rank if problem]:
            raise UsageError(problems[0])

    def log_checkpoints(self, wait: bool = False) -> None:
        """Log those complete by now, or the one being written too. Raises what went wrong in writing it."""
        for facts in self.checkpoints.finished(wait):
            self.run_folder.event("checkpoint", **facts)

    def finish(self, status: str) -> dict[str, Any]:
        self.log_checkpoints(wait=True)
        progress, diverged, device = self.progress, status == "diverged", self.world.device
        seconds, robust, tokens = self.clock.train_time, self.clock.robust_train_time, self.tokens
        rate = tokens / seconds if seconds else 0.0
        about = hardware.peak_memory(device), optimizers.state_bytes(self.optimizer), self.wire_bytes or 0
        everyone = self.world.gather((progress.process_time, *about))
        process_times, memories, states, sent = zip(*everyone, strict=True)
        reached = progress.reached or {"time": None, "steps": None}
        # again: another process may have slowed the products at the start
        peak = self.peak and max(self.peak, hardware.matmul_peak(device, self.dtype)[0])
        result: dict[str, Any] = dict(status=status, steps=progress.step, tokens=tokens)
        result |= dict(val_loss=None if diverged else progress.last_val, val_also={} if diverged else self.validate_also())
        result |= dict(target_loss=self.config.target_loss or None, target_reached=bool(progress.reached) and not diverged)
        result |= dict(time_to_target=reached["time"], steps_to_target=reached["steps"])
        result |= dict(train_time=seconds, robust_train_time=robust, stalled=seconds > 1.1 * robust)
        result |= dict(process_time=sum(process_times), tokens_per_second=rate, flops_per_token=self.flops)
        result |= dict(mfu=rate * self.flops / (peak * self.world.size) if peak else None, peak_memory=max(memories))
        result |= dict(optimizer_state_bytes=max(states), wire_bytes=max(sent), parameters=parameter_counts(self.gpt))
        self.run_folder.close(result)
        return result

    def close(self) -> None:
        """Let go of the run folder: what was logged is written, a checkpoint begun is finished. Nothing is left where the first
        step showed that the command was wrong."""
        self.checkpoints.close()
        self.run_folder.release(isinstance(sys.exc_info()[1], UsageError) and self.progress.step < 2)


# ---------------------------------------------------------------- the command


def train(argv: list[str]) -> Answer | int:
    """Train as the flags say; the answer, of ranks other than the first the exit code."""
    config, model_config, recipe = resolve(argv, __doc__)
    display.check_loggers(config)
    training, world = None, World(config.device, config.timeout)
    try:
        training = Training(config, model_config, recipe, world)
        folder, there = training.run_folder.folder, training.run_folder.finished
        if result := there or training.run():
            said = "already there; --resume never trains it again\n" * bool(there) + display.describe(result, folder)
            said, code = said + standing(config, model_config, result), 3 if result["status"] == "diverged" else 0
        else:
            said, code = f"stopped after step {training.progress.step}; the same command continues: {folder}", STOPPED
        return Answer(said, result, code) if world.main else code
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):  # as a CPU has it
            raise
        said = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        advice = more_memory(config, model_config, world.size, world.device.type, hardware.card_memory(world.device))
        raise UsageError(f"rank {world.rank}, {world.doing}: {said}; {advice}", world.first("out of memory")) from error
    finally:
        if training:
            training.close()
        training = None  # DDP first: were it the last to hold gloo's group, freeing that would wait for the GIL it holds
        world.close()


def main(argv: list[str]) -> int:
    return command("train_gpt.py", lambda: train(argv), argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
