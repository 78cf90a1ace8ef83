"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, and the messages."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine import hardware
from engine.schedules import Course
from engine.spec import UsageError


def check_loggers(config: Any) -> None:
    """Raises UsageError: a logger that is asked for is not installed."""
    for package in ("wandb", "tensorboard"):
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise UsageError(f"--{package} needs the package {package}: pip install {package}")


class Display:
    """Shows the events of a log as they are written, and passes them to the optional loggers. flops: that training needs per
    token. peak: FLOP/s of all devices together; None: not known. step, tokens: at which it begins."""

    def __init__(self, config: Any, folder: Path, flops: int, peak: float | None, step: int, tokens: int):
        self.config, self.flops, self.peak, self.tokens, self.val = config, flops, peak, tokens, None
        self.terminal = sys.stderr.isatty()
        self.course, self.position = Course(config), float(step)
        length = dict(total=config.steps, initial=step, unit="step")
        if config.minutes:  # tqdm's own guess of the time left counts validation and what was trained before a resume
            length = dict(total=60 * config.minutes, bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}")
        self.bar = tqdm(**length, disable=not self.terminal, dynamic_ncols=True)
        self.wandb = self.writer = None
        if config.wandb:
            import wandb

            about = dict(id=folder.name, resume="allow", name=folder.name, dir=folder)  # resumed it is the same run there too
            self.wandb = wandb.init(project="nanogpt-speedrun", config=vars(config), **about)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def event(self, kind: str, note: str, values: dict[str, Any]) -> None:
        if kind == "train":
            self.step(**values)
        elif kind == "val":
            self.val = values["loss"]
            self.scalars(values["step"], **{"val/loss": self.val})
        self.tokens = values.get("tokens", self.tokens)
        if note:
            self.note(note)

    def scalars(self, step: int, **values: float) -> None:
        if self.wandb:
            self.wandb.log(values, step=step)
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def step(self, step: int, tokens: int, loss: float, lr: float, step_time: float, train_time: float, **_: float) -> None:
        config, rate = self.config, (tokens - self.tokens) / step_time
        mfu = f"{rate * self.flops / self.peak:.0%}" if self.peak else "n/a"
        val = "-" if self.val is None else f"{self.val:.4f}"
        val += f"/{config.target_loss:g}" if config.target_loss else ""
        self.scalars(step, **{"train/loss": loss, "train/lr": lr, "train/step_time": step_time})
        self.bar.set_postfix_str(f"loss {loss:.3f}, val {val}, {rate:,.0f} tok/s, MFU {mfu}", refresh=False)
        self.bar.update(train_time - self.bar.n if config.minutes else 1)
        before, self.position = self.position, self.course.position(step, train_time)
        every = max(1, config.steps // 20)
        if not self.terminal and (self.position // every > before // every or step == 1):
            left = max(0.0, train_time / self.position * (config.steps - self.position))
            of = "" if config.minutes else f"/{config.steps}"
            speed = f"{train_time:.1f} s  {rate:,.0f} tok/s  MFU {mfu}  ETA {left:.0f} s"
            print(f"step {step}{of}  loss {loss:.4f}  val {val}  {speed}", flush=True)

    def note(self, text: str) -> None:
        self.bar.write(text) if self.terminal else print(text, flush=True)

    def close(self) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.writer:
            self.writer.close()


def greeting(run: Any, cards: list[str]) -> str:
    """What is trained on what, and what this machine lacks. run: the trainer's Training; cards: the device of each rank."""
    config, model, world = run.config, run.model_config, run.world
    dtype, cuda = str(run.dtype).removeprefix("torch."), world.device.type == "cuda"
    fused = cuda and config.kernels == "auto" and dtype == "bfloat16"
    compiler = hardware.compiler_lacks(world.device)
    slow_wire = cuda and world.size > 1 and not torch.distributed.is_nccl_available()
    kinds = ", ".join(f"{count} x {name}" for name, count in Counter(cards).items())
    lacks = [
        run.compiled != config.compile and f"{compiler}: not compiled",
        fused and compiler and f"{compiler}: plain PyTorch instead of the fused kernels",
        slow_wire and "this PyTorch has no NCCL: ranks talk through gloo, which is slower",
        run.head_note,
        run.loader.dataset.shared(run.val),
        len(set(cards)) > 1 and f"GPUs of different kinds, {kinds}: the slowest sets the pace of all",
    ]
    size = f"{sum(p.numel() for p in run.gpt.parameters()) / 1e6:.1f}M parameters"
    sizes = " / ".join(f"{config.batch_tokens * int(size):,}" for size in config.batch_stages)
    length = f"{config.steps:,} steps of {sizes} tokens ({run.loader.epochs(config.steps):.2f} epochs of {config.corpus})"
    if config.minutes:
        length = f"{config.minutes:g} minutes of training in steps of {sizes} tokens of {config.corpus}"
    method = f"{config.optimizer}, schedule {config.schedule}"
    first = [f"{run.run_folder.folder}", f"GPT, {model.layers} blocks of width {model.width}, {size}, {method}"]
    first += [f"{world.size} x {world.device.type}, {dtype} ({run.dtype_reason}), {length}"]
    return "\n".join([*first, *filter(None, lacks)])


def nonfinite(step: int, ranks: list[int], parameters: list[str], goes_on: bool, checkpoint: Path | None) -> str:
    """What was not finite in a step. ranks: whose loss; parameters: whose gradients."""
    loss = f"the loss of rank {', '.join(map(str, ranks))}, " if ranks else ""
    gradients = ", ".join(parameters[:8]) or "nothing"
    gradients += f" and {len(parameters) - 8} more" if len(parameters) > 8 else ""
    then = "the step was left out" if goes_on else "nothing was updated"
    return f"step {step}: not finite: {loss}gradients of {gradients}; {then}; newest checkpoint: {checkpoint or 'none'}"


def describe(result: dict[str, Any], folder: Path) -> str:
    """The last line of a run."""
    target, loss, seconds = result["target_loss"], result["val_loss"], result["train_time"]
    if loss is None:
        verdict = "diverged: validation loss not finite"
    else:
        reached = f"reached after {result['steps_to_target']:,} steps" if result["target_reached"] else "NOT reached"
        verdict = f"{f'target {target:g} {reached}' if target else 'trained'}: validation loss {loss:.4f}"
    stalled = f" ({result['robust_train_time']:.1f} s without this machine's stalls)" if result["stalled"] else ""
    return f"{verdict}, {result['steps']:,} steps, {seconds:.1f} s{stalled}: {folder}"
