"""Every setting of a run: Config, the flags generated from it, and what follows from the settings before anything is built.

config, model_config, recipe = resolve(["--track", "cpu", "--tricks", "modern,muon", "--steps", "600"])
"""

import argparse
import bisect
import csv
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import hub
import optimizers
import tricks
from engine.command import Parser
from engine.run_folder import PRESENTATION
from engine.schedules import Course
from engine.spec import UsageError, convert, nearest, refusal, setting, split
from layers.shape import ModelConfig, flops_per_token


@dataclass(frozen=True)
class Config:
    """Every setting of a run except the model's own (ModelConfig); both become flags, flat. Tracks and tricks set them."""

    track: str = setting("cpu", "corpus, model size and target: " + ", ".join(tricks.TRACKS))
    tricks: str = setting("baseline", "comma-separated tricks or a recipe (baseline, record); README lists them")
    optimizer: str = setting("adamw", "optimizer SPEC, name or name:key=value,...; or path/to/file.py:Class")
    average: str = setting("none", "average of the weights to evaluate at, SPEC: " + ", ".join(optimizers.AVERAGES))
    outer: str = setting("none", "method around the optimizer, SPEC: " + ", ".join(optimizers.OUTER))
    rates: str = setting("", "factors on learning rates, by role or part of a parameter's name: embedding=2,smear=0.1")
    schedule: str = setting("constant", "learning-rate schedule SPEC")
    decay_schedule: str = setting("constant", "schedule SPEC of the weight decay; a step decays by this times the rate")
    momentum_schedule: str = setting("keep", "momentum schedule SPEC")
    steps: int = setting(1000, "optimizer updates; with --minutes only what a length such as warmup=100 is a part of", least=1)
    minutes: float = setting(0.0, "end after so much training time, which schedules follow; 0: by --steps", most=1e6)
    batch_tokens: int = setting(4096, "global batch, tokens, whatever the number of ranks", least=1)
    batch_stages: tuple[float, ...] = setting((1.0,), "batches in stages of equal length, in --batch-tokens: 1/2/3", most=1e6)
    batch_rates: tuple[float, ...] = setting((1.0,), "factors on the learning rates in the batch stages: 1/1.52/1.73")
    window_stages: tuple[float, ...] = setting((1.0,), "windows in stages of equal length, parts of --window: 0.25/0.5/1")
    length_stages: tuple[float, ...] = setting((1.0,), "sequences in stages of equal length, parts of --sequence-length: 0.5/1")
    micro_batch_tokens: int = setting(0, "tokens per forward pass and rank; 0: as many as usually fit")
    clip: float = setting(0.0, "largest global gradient norm; 0 is off")
    future_tokens: int = setting(0, "also predict this many tokens after the next, fading out (modded-nanogpt #53: 2)")
    tied_until: float = setting(0.0, "fraction of the run with the head still tied (modded-nanogpt #51, #53: 2/3)", most=1)
    weights: str = setting("fp32", "hidden matrices; bf16: other half in the optimizer (modded-nanogpt #57)", ("fp32", "bf16"))
    reduce: str = setting("fp32", "gradients between ranks: as they are, or bf16 at half the bytes", ("fp32", "bf16"))
    init_from: str = setting("", "start from these weights: a run folder, a Hugging Face folder, or a nanoGPT ckpt.pt")
    seed: int = setting(0, "seed of weights, dropout and data order", most=2**32 - 1)
    corpus: str = setting("sotu", "what to train on: `./run.sh data list`")
    tokenizer: str = setting("bytes", "bytes, gpt2, or mod97 for the corpus division")
    data_root: str = setting("corpora", "folder of the prepared corpora")
    align_documents: bool = setting(False, "start training sequences with a document (modded-nanogpt #26)")
    shuffle: bool = setting(True, "shuffle sequences every epoch; otherwise the corpus in its own order")
    val_tokens: int = setting(262144, "validation tokens, fixed per track", least=1)
    val_spread: bool = setting(True, "validate on sequences spread over the whole split; otherwise on its beginning")
    loss_tokens: int = setting(0, "loss on only this many last targets of each sequence; 0: on all")
    val_also: str = setting("", "also validate at the end: tail (the last quarter of each sequence), other corpora")
    val_every: int = setting(0, "steps between validations; 0: five times a run. The last step is always validated")
    target_loss: float = setting(0.0, "validation loss to reach, nats per token; 0: none")
    stop_at_target: bool = setting(False, "stop at the first validation that meets the target")
    out: str = setting("", "run folder; empty: runs/<track>/<name>-s<seed>-<hash>")
    name: str = setting("", "start of the run folder's name; empty: the recipe and the flags that change it")
    resume: str = setting("auto", "continue a run; never: begin anew; must: fail without checkpoint", ("auto", "never", "must"))
    branch: str = setting("", "comma-separated folders of runs of another length: start from the last state shared with one")
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: by the minutes, and at the end")
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints; 0: off")
    keep: int = setting(2, "checkpoints to keep, the newest", least=1)
    milestone_every: int = setting(0, "keep checkpoints at multiples of this many steps for good; 0: none")
    nonfinite: str = setting("stop", "at a non-finite loss or gradient: stop, or skip:K to leave out up to K updates")
    check_ranks: int = setting(100, "steps between checks that all ranks hold the same weights; 0: never")
    timeout: float = setting(600.0, "seconds that ranks wait for one that hangs")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    dtype: str = setting("auto", "type of activations and matrix products", ("auto", "bf16", "fp32"))
    compile: bool = setting(False, "torch.compile the model and the update; the warm-up is off the clock")
    kernels: str = setting("auto", "fused Triton kernels; auto: for bf16 on CUDA; off: plain PyTorch", ("auto", "off"))
    deterministic: bool = setting(False, "only deterministic kernels")
    wandb: bool = setting(False, "also log to Weights & Biases")
    tensorboard: bool = setting(False, "also log to TensorBoard")


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Flags generated from the two dataclasses; an absent flag leaves no trace: tracks and tricks may set it."""
    flags = Parser(argument_default=argparse.SUPPRESS)
    for title, cls in (("run", Config), ("model", ModelConfig)):
        group = flags.add_argument_group(title)
        for f in dataclasses.fields(cls):
            several = isinstance(f.default, tuple)
            default = "/".join(f"{x:g}" for x in f.default) if several else f.default
            words = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
            if f.type is bool:
                group.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, help=words)
            else:
                group.add_argument(flag_of(f.name), metavar="A/B/C" if several else f.type.__name__.upper(), help=words)
    return flags


def flag_of(name: str) -> str:
    """batch_tokens -> --batch-tokens"""
    return "--" + name.replace("_", "-")


NAME = re.compile(r"[\w,+-][\w.,+-]*")  # what a run may be called
CARD_MEMORY = 80e9  # bytes: of the card for which 65,536 tokens are usually not too many; a smaller one takes as many fewer
FIELDS = {f.name: f for cls in (Config, ModelConfig) for f in dataclasses.fields(cls)}
DEFAULTS = {name: f.default for name, f in FIELDS.items()}


def resolve(argv: list[str], description: str = "", others: Iterable[str] = ()) -> tuple[Config, ModelConfig, str]:
    """Command line -> config, model config, recipe name. others: flags of the verb, which a misspelt word may mean. Raises
    UsageError: an unknown word, a wrong type, a contradiction."""
    given = flags_given(argv, description, others)
    changes, recipe = tricks.apply(given.get("track", Config.track), given.get("tricks", Config.tricks))
    settings = DEFAULTS | changes
    if "optimizer" in given:  # its keys go over those of the tricks, where it is the same method
        given["optimizer"] = tricks.merge_optimizer(settings["optimizer"], given["optimizer"])
    settings |= hub.read(given["init_from"])[0] if given.get("init_from") else {}
    settings |= given
    settings["optimizer"], schedule = tricks.tuned(*(settings[key] for key in ("track", "optimizer", "schedule")))
    settings["schedule"] = given.get("schedule", schedule)  # whoever asks for one gets it
    settings["name"] = given.get("name") or run_name(recipe, given)
    for key, value in settings.items():
        if why := refusal(key, value, FIELDS[key].metadata):
            raise UsageError(f"{flag_of(key)} {why}")
    config = Config(**only(Config, settings))
    model_config = ModelConfig(**only(ModelConfig, settings))
    check(config, model_config)
    return config, model_config, recipe


def flags_given(argv: list[str], description: str, others: Iterable[str]) -> dict[str, Any]:
    """The flags of a command line by field, typed. Raises UsageError: an unknown flag, or a value of the wrong type."""
    flags = parser()
    flags.description = description
    options, unknown = flags.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        hint = {"--lr": "a learning rate is a key of the optimizer, such as --optimizer adamw:lr=0.01"}.get(name)
        hint = hint or ("lists are written with commas, such as --tricks modern,muon" if name[:1] != "-" else "")
        raise UsageError(f"unknown flag {name}: {hint or nearest(name, [*flags._option_string_actions, *others])}")
    return {  # argparse makes an empty list of the value `--`
        key: value if isinstance(value, bool) else convert("--" if value == [] else value, FIELDS[key].type, flag_of(key))
        for key, value in vars(options).items()
        if key in FIELDS
    }


def run_name(recipe: str, given: dict[str, Any]) -> str:
    """The recipe and the flags that change it: modern-muon-steps300. Of a SPEC its name alone: the hash has the rest."""

    def word(key: str, value: Any) -> str:
        if isinstance(value, bool):
            return key if value else f"no_{key}"
        if isinstance(value, str):
            return split(value)[0].rpartition(":")[2]
        return key + "_".join(f"{x:g}" for x in (value if isinstance(value, tuple) else (value,)))

    named = [key for key in FIELDS if key in given and key not in ("track", "tricks", "seed", *PRESENTATION)]
    return re.sub(r"[^\w.,+-]+", "_", "-".join(filter(None, [recipe, *(word(key, given[key]) for key in named)])))


def only(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are fields of a dataclass."""
    return {f.name: settings[f.name] for f in dataclasses.fields(cls) if f.name in settings}


def check(config: Config, model_config: ModelConfig) -> None:
    """Raises UsageError: settings that contradict each other, or a SPEC with a wrong word."""
    allowed_skips(config.nonfinite)
    optimizer, _ = optimizers.find(config.optimizer), optimizers.build_around(config.outer, config.average, config.steps)
    course, T, method = Course(config), model_config.sequence_length, split(config.optimizer)[0]
    lengths, cut = [round(T * part) for part in course.lengths], min(course.lengths) < 1
    tieable = not model_config.tied_head and model_config.embedding_dtype == "same"
    still, uneven = not optimizer.has_momentum, any(n < 1 or T % n for n in lengths)
    ramp, shortest = config.momentum_schedule, min(lengths)
    known = needs_steps(config) if config.minutes else ""
    untied = "needs a head that can be untied, and an embedding of its type: add --no-tied-head or --embedding-dtype same"
    wrong = {
        f"--name takes letters, digits and . , + - _; not {config.name!r}": not NAME.fullmatch(config.name),
        f"--loss-tokens must be 0 to {T}, the sequence length; got {config.loss_tokens}": config.loss_tokens > T,
        "--stop-at-target needs a target: add --target-loss": config.stop_at_target and not config.target_loss,
        f"--minutes leaves the number of steps to the machine; it must be known for {known}": known,
        f"--momentum-schedule {ramp}: {method} has no momentum that it could change": ramp != "keep" and still,
        f"--tied-until {config.tied_until:g} {untied}": config.tied_until and not tieable,
        f"--length-stages: its parts of {T} tokens must divide them, such as 0.25/0.5/1": uneven,
        "--length-stages cuts sequences, of which --loss-tokens counts the end: give one of them": config.loss_tokens and cut,
        f"--future-tokens must be 0 to {shortest - 1}, got {config.future_tokens}": config.future_tokens >= shortest,
    }
    if words := next(filter(wrong.get, wrong), ""):
        raise UsageError(words)


def needs_steps(config: Config) -> str:
    """The first given setting that names a certain step of the run; empty: none."""
    fractions = "a length in --optimizer or --average that is a fraction of the run: give it in steps"
    given = {"--batch-stages": len(config.batch_stages) > 1, "--tied-until": config.tied_until, "--branch": config.branch}
    given[fractions] = of_length(config, 10**3) != of_length(config, 10**6)
    return next(filter(given.get, given), "")


def of_length(config: Config, steps: int) -> tuple[dict[str, Any], list[Any]]:
    """Settings of the optimizer, and of what is around it, that are fractions of the run's length, for so many steps."""
    return optimizers.find(config.optimizer).of_length(steps), optimizers.build_around(config.outer, config.average, steps)


def allowed_skips(nonfinite: str) -> int:
    """Updates that may be left out because something was not finite: 0 for "stop", K for "skip:K"."""
    word, _, count = nonfinite.partition(":")
    if (word, count) != ("stop", "") and not (word == "skip" and count.isdecimal()):
        raise UsageError(f"--nonfinite takes stop or skip:K, such as skip:3; not {nonfinite!r}")
    return int(count or 0)


def shares(config: Config, model: ModelConfig, ranks: int, device_type: str, memory: float = CARD_MEMORY) -> tuple[int, int]:
    """Sequences per rank and step, and per micro-batch. memory: bytes of a card. Raises UsageError: no even division."""
    T, unit = model.sequence_length, ranks * model.sequence_length
    per_rank, rest = divmod(config.batch_tokens, unit)
    if rest:
        near, divisor = max(1, round(config.batch_tokens / unit)) * unit, f"ranks x sequence length = {ranks} x {T}"
        raise UsageError(f"--batch-tokens {config.batch_tokens} is not divisible by {divisor}: the nearest that is: {near}")
    if config.micro_batch_tokens:
        micro, rest = divmod(config.micro_batch_tokens, T)
        if rest or not micro or per_rank % micro:
            words = f"must be a multiple of the sequence length {T} that divides the {per_rank * T} tokens of a rank"
            raise UsageError(f"--micro-batch-tokens {config.micro_batch_tokens} {words}")
        return per_rank, micro
    most = max(1, round(65536 * min(1.0, memory / CARD_MEMORY) if device_type == "cuda" else 16384) // T)
    return per_rank, max(n for n in range(1, min(per_rank, most) + 1) if per_rank % n == 0)


def stages(config: Config, model_config: ModelConfig) -> Counter[tuple[float, int, int]]:
    """(part of the windows, tokens of a sequence, size of the batch in --batch-tokens) -> in how many steps of the run."""
    course, counted = Course(config), Counter()
    for start, end in pairwise([*course.stage_starts(), config.steps]):
        now = course.at(start)
        counted[now.windows[-1], round(model_config.sequence_length * now.length), now.batch] += end - start
    return counted


def mean_flops(config: Config, model_config: ModelConfig) -> int:
    """FLOPs that training needs per token: `flops_per_token`, the mean over a run whose windows or sequences change."""
    counted = stages(config, model_config).items()
    flops = sum(steps * size * flops_per_token(model_config, part, length) for (part, length, size), steps in counted)
    return round(flops / sum(steps * size for (_, _, size), steps in counted))


def shared_steps(config: Config, steps: int) -> int:
    """How many first steps a run of `steps` steps, all else equal, has in common with this one. Raises UsageError: settings of
    the optimizer are fractions of the run's length."""
    if of_length(config, config.steps) != of_length(config, steps):
        raise UsageError(f"--branch: settings of {config.optimizer} are fractions of the run's length")
    this, other, both = Course(config), Course(config, steps), min(config.steps, steps)
    return next((step for step in range(both) if this.at(step) != other.at(step)), both)


# What modded-nanogpt's optimizer track fixes beside the model
GIVEN = ("corpus", "tokenizer", "batch_tokens", "batch_stages", "window_stages", "length_stages", "future_tokens", "tied_until",
         "shuffle", "align_documents", "loss_tokens", "val_tokens", "val_spread", "target_loss", "init_from")  # fmt: skip


def entries() -> list[dict[str, str]]:
    """Those of that track, by number: the rows of records/published/modded_track3.csv."""
    with (Path(__file__).parent / "records" / "published" / "modded_track3.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def standing(config: Config, model_config: ModelConfig, result: dict[str, Any]) -> str:
    """A line on where the steps of a run that met that track's target stand among its entries; empty for any other run."""
    theirs, model, _ = resolve(["--track", "gpt2-small", "--tricks", "modern_muon"])
    same = model_config == dataclasses.replace(model, initialisation=model_config.initialisation)
    if not (same and result["target_reached"] and all(getattr(config, key) == getattr(theirs, key) for key in GIVEN)):
        return ""
    ranked, steps = sorted((int(row["steps_to_target"]), int(row["result"])) for row in entries()), result["steps_to_target"]
    at = bisect.bisect_left(ranked, (steps, 0))
    near = ranked[max(0, at - 1) : at + 1]
    where = "between entries" if len(near) == 2 else "after entry" if at else "before entry"
    names = " and ".join(f"#{number} ({needed:,})" for needed, number in reversed(near))
    about = "of modded-nanogpt's optimizer track, most of them means of several runs"
    return f"\n{steps:,} steps to {config.target_loss:g}: {where} {names} {about}"


def more_memory(config: Config, model: ModelConfig, ranks: int, device_type: str, memory: float) -> str:
    """What to change where a step does not fit."""
    sequences, micro = shares(config, model, ranks, device_type, memory)
    smaller = next((n for n in range(micro // 2, 0, -1) if sequences % n == 0), 0)
    ways = [f"--micro-batch-tokens {smaller * model.sequence_length}"] * bool(smaller)
    ways += ["--checkpoint-activations"] * (not model.checkpoint_activations)
    advice = " or ".join(ways) or "more GPUs, or an optimizer with less state"
    return f"micro-batches have {micro * model.sequence_length} tokens; try {advice}"
