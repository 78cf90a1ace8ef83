"""Train a GPT to a target validation loss: one file, read from top to bottom.

    python train_gpt.py --track cpu --tricks record                 a laptop: a minute on 2 cores, most of it compiling
    python train_gpt.py --track cpu --tricks modern,muon --steps 600 --seed 1
    python train_gpt.py --track gpt2-small --tricks record          one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track gpt2-small --tricks record

What comes out: one run folder (runs/<track>/<recipe>-s<seed>-<hash>) with config.json, env.json, log.jsonl (an event
a line), checkpoints/ and, written last, result.json. Exit codes: 0 trained (whether the target was reached stands in
result.json), 2 the command was wrong (nothing was written), 3 diverged.

The global batch is `--batch-tokens`, whatever the number of ranks or micro-batches, and its content depends on the
seed and the step alone; so one rank, eight ranks, and a resumed run train on the same data in the same order.
"""

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import hardware
import optimizers
import schedules
import tricks
from data.shards import Dataset, Loader, dataset_folder, validation_starts
from model import GPT, ModelConfig, flops_per_token, parameter_counts, setting
from run_folder import Display, Run, default_folder, git, now, settings_hash, source_hash
from spec import UsageError, convert, nearest

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
    schedule: str = setting("constant", "learning-rate schedule SPEC")
    momentum_schedule: str = setting("keep", "momentum schedule SPEC")
    steps: int = setting(1000, "optimizer updates")
    batch_tokens: int = setting(4096, "global batch, tokens, whatever the number of ranks")
    micro_batch_tokens: int = setting(0, "tokens per forward pass and rank; 0: as many as usually fit")
    clip: float = setting(0.0, "largest global gradient norm; 0 is off")
    seed: int = setting(0, "seed of weights, dropout and data order")
    corpus: str = setting("sotu", "what to train on: `./run.sh data list`")
    tokenizer: str = setting("bytes", "bytes or gpt2")
    data_root: str = setting("corpora", "folder of the prepared corpora")
    shuffle: bool = setting(True, "shuffle sequences every epoch; otherwise the corpus in its own order")
    val_tokens: int = setting(262144, "validation tokens, fixed per track")
    val_spread: bool = setting(True, "validate on sequences spread over the whole split; otherwise on its beginning")
    val_every: int = setting(0, "steps between validations; 0: five times a run. The last step is always validated")
    target_loss: float = setting(0.0, "validation loss to reach, nats per token; 0: none")
    stop_at_target: bool = setting(False, "stop at the first validation that meets the target")
    out: str = setting("", "run folder; empty: runs/<track>/<recipe>-s<seed>-<hash>")
    resume: str = setting(
        "auto",
        "auto: continue an unfinished run; never: start anew; must: fail without a checkpoint",
        ("auto", "never", "must"),
    )
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: only at the end")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    dtype: str = setting("auto", "type of activations and matrix products; weights are fp32", ("auto", "bf16", "fp32"))
    compile: bool = setting(False, "torch.compile the model and the update; the warm-up is off the clock")
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
    all_fields = {f.name: f for cls in (Config, ModelConfig) for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if isinstance(value, str):
            given[key] = convert(value, all_fields[key].type, "--" + key.replace("_", "-"))
    settings, recipe = tricks.apply(given.get("track", Config.track), given.get("tricks", Config.tricks))
    settings |= given
    for key, value in settings.items():
        choices = all_fields[key].metadata["choices"]
        if choices and value not in choices:
            raise UsageError(f"--{key.replace('_', '-')} takes {', '.join(choices)}; not {value!r}")
    pick = lambda cls: cls(**{f.name: settings[f.name] for f in dataclasses.fields(cls) if f.name in settings})  # noqa: E731
    config = pick(Config)
    for key in ("steps", "batch_tokens", "val_tokens"):
        if getattr(config, key) < 1:
            raise UsageError(f"--{key.replace('_', '-')} must be at least 1, got {getattr(config, key)}")
    optimizers.check(config.optimizer, config.average, config.table_optimizer)
    schedules.build(config.schedule, config.steps)
    schedules.build_momentum(config.momentum_schedule, config.steps)
    try:
        return config, pick(ModelConfig), recipe
    except ValueError as error:
        raise UsageError(str(error)) from None


# ---------------------------------------------------------------- Ranks


class World:
    """This process among the ranks that torchrun started, or alone under plain python."""

    def __init__(self, device_name: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = hardware.pick_device(device_name)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.main = self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_sparse(self, grad: torch.Tensor) -> torch.Tensor:
        """Sum of a sparse gradient over ranks: the rows of all, made as many on every rank by rows of zeros; coalesced."""
        rows = grad._indices()[0]
        if bool((rows[1:] > rows[:-1]).all()):  # as the model makes them; autograd forgets to say so
            grad = grad._coalesced_(True)
        grad = grad.coalesce()  # adds up what a row got from several places
        if self.size == 1:
            return grad
        rows, values = grad.indices()[0], grad.values()
        most = torch.tensor(len(rows), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        missing = most.item() - len(rows)
        rows, values = F.pad(rows, (0, missing)), F.pad(values, (0, 0, 0, missing))
        everyone = [[torch.empty_like(x) for _ in range(self.size)] for x in (rows, values)]
        for found, own in zip(everyone, (rows, values), strict=True):
            dist.all_gather(found, own)
        rows, values = map(torch.cat, everyone)
        return torch.sparse_coo_tensor(rows[None], values, grad.shape, check_invariants=False).coalesce()

    def gather(self, value: Any) -> list[Any]:
        """One small object from each rank, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------- Clock


class Clock:
    """Training time: everything between start() and stop(), nothing else. Seconds.

    The loop starts it before a step's data is fetched and stops it after the optimizer's update; set-up, compilation
    and its warm-up, validation, checkpoints and logging are outside. Machines stall, so three figures are kept: the
    sum, the robust time = steps x median step per stage (steps of one batch size), and the CPU time of the process.
    """

    def __init__(self, device: torch.device):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.stages: dict[str, list[float]] = {}
        self.process_time = 0.0

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, stage: str) -> float:
        """Ends one step; returns its seconds."""
        self.synchronize()
        step_time = time.perf_counter() - self.wall
        self.process_time += time.process_time() - self.cpu
        self.stages.setdefault(stage, []).append(step_time)
        return step_time

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


def warm_up(model: torch.nn.Module, micro: int, model_config: ModelConfig, device: torch.device) -> None:
    """Compile by one forward and backward on random tokens, off the clock.

    Leaves weights, gradients, optimizer, RNG and data position as they were: it takes no step and reads no data.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        tokens = torch.randint(model_config.vocab_size, (micro, model_config.sequence_length), device=device)
        model(tokens, tokens).backward()
    model.zero_grad(set_to_none=True)


class Training:
    """Everything that one run holds: built in the order in which data meets it, then `run()`."""

    def __init__(self, config: Config, model_config: ModelConfig, recipe: str, world: World):
        self.config, self.model_config, self.world = config, model_config, world
        self.dtype, self.dtype_reason = hardware.pick_dtype(config.dtype, world.device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        # data
        self.sequences, self.micro = shares(config, model_config, world)
        T = model_config.sequence_length
        folder = dataset_folder(config.data_root, config.corpus, config.tokenizer)
        self.loader = Loader(
            Dataset(folder, "train"), T, self.sequences * world.size, seed=config.seed, shuffle=config.shuffle,
            rank=world.rank, world_size=world.size, device=world.device,
        )  # fmt: skip
        self.val = Dataset(folder, "val")
        self.val_starts = validation_starts(self.val, T, config.val_tokens, config.val_spread)
        if (self.val.vocab_size or 0) > model_config.vocab_size:
            raise UsageError(f"{folder} has a vocabulary of {self.val.vocab_size}: add --vocab-size {self.val.vocab_size}")
        self.fingerprint = f"{self.loader.dataset.fingerprint}-{self.val.fingerprint}"
        # model: the same weights on every rank, then each rank its own stream for dropout
        torch.manual_seed(config.seed)
        self.gpt = GPT(model_config).to(world.device)
        self.gpt.compute_dtype = self.dtype
        torch.manual_seed(config.seed * 1009 + world.rank + 1)
        self.compiled = config.compile and hardware.can_compile(world.device)
        self.model = self.alone = torch.compile(self.gpt) if self.compiled else self.gpt
        if world.size > 1:
            sparse = [name for name, p in self.alone.named_parameters() if any(p is t for t in self.gpt.tables())]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.alone, sparse)  # `sum_sparse` adds them up
            ids = [world.device.index] if world.device.type == "cuda" else None
            # the only buffers are constant tables: nothing to broadcast before each forward pass
            self.model = DistributedDataParallel(
                self.alone, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        # optimizer and schedules
        self.optimizer = optimizers.build(config.optimizer, self.gpt, config.steps, config.average, config.table_optimizer)
        if optimizers.schedule_free(self.optimizer) and config.schedule != "constant":
            name = config.optimizer.split(":")[0]
            raise UsageError(f"{name} brings its own schedule and warm-up: add --schedule constant, not {config.schedule}")
        self.multiplier = schedules.build(config.schedule, config.steps)
        self.momentum = schedules.build_momentum(config.momentum_schedule, config.steps)
        # clock and log
        self.clock = Clock(world.device)
        self.peak, self.peak_source = hardware.matmul_peak(world.device, self.dtype)
        self.flops = flops_per_token(model_config)
        self.steps_done, self.last_val, self.reached = 0, None, None
        settings = vars(config) | vars(model_config) | {"recipe": recipe}
        out = config.out or default_folder(settings, recipe)
        self.run_folder = Run(Path(out), settings, config.resume)
        world.gather(None)  # nobody writes into the folder before everybody has looked at it

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

    def restore(self) -> None:
        """Continue from the run folder's checkpoint: weights, optimizer, RNG of this rank, clock."""
        state = torch.load(self.run_folder.checkpoint, map_location=self.world.device, weights_only=True)
        if len(state["rng"]) != self.world.size:
            raise UsageError(f"the checkpoint was written by {len(state['rng'])} ranks, this run has {self.world.size}")
        self.gpt.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"][self.world.rank].cpu())
        self.steps_done, self.last_val, self.reached = state["step"], state["last_val"], state["reached"]
        self.clock.stages, self.clock.process_time = state["stages"], state["process_time"]

    def save(self) -> None:
        rng = self.world.gather(torch.get_rng_state())
        self.optimizer.eval()  # methods that evaluate other weights than they train: store those as the model
        state = optimizers.full_state_dict(self.optimizer)
        if self.world.main:
            self.run_folder.save(
                {
                    "model": self.gpt.state_dict(), "optimizer": state, "rng": rng,
                    "step": self.steps_done, "last_val": self.last_val, "reached": self.reached,
                    "stages": self.clock.stages, "process_time": self.clock.process_time,
                }
            )  # fmt: skip
        self.optimizer.train()

    def backward(self, x: torch.Tensor, y: torch.Tensor | None) -> tuple[float, float]:
        """Gradients of the mean loss over the global batch; that loss and their norm.

        y: targets; None draws them from the model's own predictions (the curvature estimate of Sophia).
        """
        loss = torch.zeros((), device=self.world.device)
        parts = range(0, len(x), self.micro)
        for i in parts:
            tokens = x[i : i + self.micro]
            # DDP averages gradients over ranks once per step: no_sync must cover forward and backward of the others
            with self.model.no_sync() if self.world.size > 1 and i != parts[-1] else contextlib.nullcontext():
                if y is None:
                    logits = self.model(tokens).flatten(0, 1)
                    drawn = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(1)
                    part = F.cross_entropy(logits, drawn) / len(parts)
                else:
                    part = self.model(tokens, y[i : i + self.micro]) / len(parts)
                part.backward()
            loss += part.detach()
        for p in self.gpt.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = self.world.sum_sparse(p.grad)
                p.grad.values().div_(self.world.size)
        norm = torch.nn.utils.get_total_norm(self.gradients())
        # the only transfer of a step: a loss or gradient that is not finite must be seen before the update
        loss_now, norm_now = (self.world.sum(torch.stack([loss, norm])) / self.world.size).tolist()
        return loss_now, norm_now

    def gradients(self) -> list[torch.Tensor]:
        """All of them, dense; of a coalesced sparse one the rows it has. They share memory with the originals."""
        found = [p.grad for p in self.gpt.parameters() if p.grad is not None]
        return [g._values() if g.is_sparse else g for g in found]

    def step(self) -> tuple[float, float, float] | None:
        """One update on the clock: loss over the global batch, gradient norm, seconds. None when not finite."""
        config, step = self.config, self.steps_done
        self.clock.start()
        x, y = self.loader.next(step)
        loss_now, norm_now = self.backward(x, y)
        if not (math.isfinite(loss_now) and math.isfinite(norm_now)):
            self.clock.stop("nonfinite")
            return None
        if config.clip and norm_now > config.clip:
            torch._foreach_mul_(self.gradients(), config.clip / norm_now)
        multiplier, momentum = self.multiplier(step), self.momentum(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if momentum is not None and "momentum" in group:
                group["momentum"] = momentum
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for part in optimizers.parts(self.optimizer):
            if getattr(part, "wants_curvature", bool)():
                if not math.isfinite(self.backward(x, None)[1]):
                    self.clock.stop("nonfinite")
                    return None
                part.curvature(config.batch_tokens)
                self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return loss_now, norm_now, self.clock.stop(str(config.batch_tokens))

    def validate(self) -> None:
        self.optimizer.eval()
        # without DDP round it, whose forward pass may wait for ranks that have fewer sequences to validate
        loss = validate(self.alone, self.val, self.val_starts, self.model_config.sequence_length, self.micro, self.world)
        self.optimizer.train()
        self.last_val = loss
        config, step, now = self.config, self.steps_done, self.clock.train_time
        met = bool(config.target_loss) and loss <= config.target_loss
        if self.world.main:
            self.run_folder.event("val", step=step, tokens=step * config.batch_tokens, loss=loss, train_time=now)
            self.display.validated(step, loss)
        if met and self.reached is None:
            self.reached = {"steps": step, "time": now}
            if self.world.main:
                self.run_folder.event("target", step=step, loss=loss, target_loss=config.target_loss, train_time=now)

    def run(self) -> dict[str, Any]:
        """Train to the last step, the target (when asked to stop there) or divergence; write and return the result."""
        config, main = self.config, self.world.main
        if self.run_folder.continued:
            self.restore()
        first = self.steps_done
        if self.compiled:
            warm_up(self.model, self.micro, self.model_config, self.world.device)
            optimizers.compile_update(self.optimizer)
        if main:
            self.run_folder.open(self.environment(), first)
            about = dict(seed=config.seed, config=settings_hash(self.run_folder.config, ("seed",)), source=source_hash())
            self.run_folder.event("resume" if first else "start", step=first, **about, data=self.fingerprint, utc=now())
            self.display = Display(config, self.run_folder.folder, self.flops, self.peak, first)
            self.display.note(self.greeting())
        every = config.val_every or math.ceil(config.steps / 5)
        status = "ok"
        self.model.train()
        self.optimizer.train()
        while self.steps_done < config.steps:
            epoch = math.floor(self.loader.epochs(self.steps_done))
            if main and self.steps_done and epoch > math.floor(self.loader.epochs(self.steps_done - 1)):
                self.run_folder.event("epoch", step=self.steps_done, epoch=epoch)
                self.display.note(f"step {self.steps_done}: all data seen {epoch} times, it repeats from here")
            done = self.step()
            if done is None:
                status = "diverged"
                if main:
                    self.run_folder.event("nonfinite", step=self.steps_done + 1, train_time=self.clock.train_time)
                break
            if main:
                self.log_step(*done)
            if self.steps_done % every == 0 or self.steps_done == config.steps:
                self.validate()
                if config.stop_at_target and self.reached:
                    status = "ok" if self.steps_done == config.steps else "stopped"
                    break
            if config.checkpoint_every and self.steps_done % config.checkpoint_every == 0:
                self.save()
        if status != "diverged":
            self.save()
        return self.finish(status)

    def log_step(self, loss: float, norm: float, step_time: float) -> None:
        step, lr = self.steps_done, self.optimizer.param_groups[0]["lr"]
        now = self.clock.train_time
        self.run_folder.event(
            "train", step=step, tokens=step * self.config.batch_tokens, loss=loss, lr=lr, grad_norm=norm,
            step_time=step_time, train_time=now,
        )  # fmt: skip
        self.display.step(step, loss, lr, step_time, now)

    def greeting(self) -> str:
        counts = parameter_counts(self.gpt)
        epochs = self.loader.epochs(self.config.steps)
        without = "" if self.compiled == self.config.compile else "\nno C++ compiler with Python headers here: not compiled"
        return (
            f"{self.run_folder.folder}{without}\n"
            f"{counts['total'] / 1e6:.1f}M parameters on {self.world.size} x {self.world.device.type}, "
            f"{str(self.dtype).removeprefix('torch.')} ({self.dtype_reason}), {self.config.steps:,} steps of "
            f"{self.config.batch_tokens:,} tokens ({epochs:.2f} epochs of {self.config.corpus})"
        )

    def finish(self, status: str) -> dict[str, Any]:
        config, clock = self.config, self.clock
        seconds = clock.train_time
        tokens = self.steps_done * config.batch_tokens
        rate = tokens / seconds if seconds else 0.0
        if self.world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            import resource  # not on Windows

            unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        everyone = self.world.gather((clock.process_time, memory, optimizers.state_bytes(self.optimizer)))
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
            "process_time": sum(p for p, _, _ in everyone),
            "tokens_per_second": rate,
            "flops_per_token": self.flops,
            "mfu": rate * self.flops / (self.peak * self.world.size) if self.peak else None,
            "peak_memory": max(m for _, m, _ in everyone),
            "optimizer_state_bytes": max(b for _, _, b in everyone),
            "parameters": parameter_counts(self.gpt),
        }
        if self.world.main:
            self.display.close()
            self.run_folder.close(result)
        return result


def describe_result(result: dict[str, Any], folder: Path) -> str:
    loss = "not finite" if result["val_loss"] is None else f"{result['val_loss']:.4f}"
    target = f" (target {result['target_loss']:g})" if result["target_loss"] else ""
    return (
        f"{result['status']}: validation loss {loss}{target}, {result['steps']} steps, {result['train_time']:.1f} s: {folder}"
    )


def main(argv: list[str]) -> int:
    world = training = None
    try:
        config, model_config, recipe = resolve(argv)
        for flag, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
            if getattr(config, flag) and importlib.util.find_spec(package) is None:
                raise UsageError(f"--{flag} needs the package {package}: pip install {package}")
        world = World(config.device)
        training = Training(config, model_config, recipe, world)
        folder = training.run_folder.folder
        if training.run_folder.finished:
            result = json.loads((folder / "result.json").read_text())
            print(f"already there; --resume never trains it again\n{describe_result(result, folder)}")
            return 3 if result["status"] == "diverged" else 0
        result = training.run()
        if world.main:
            print(describe_result(result, folder))
        return 3 if result["status"] == "diverged" else 0
    except UsageError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("train_gpt.py: no space left on the disk; free some, and the same command continues", file=sys.stderr)
        return 2
    finally:
        training = None  # DDP first: were it the last to hold gloo's group, freeing that would wait for the GIL it holds
        if world:
            world.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
