"""Time and memory of every optimizer beside torch's and the public packages' own, and what each reaches in 300 steps.

    python -m benchmarks.optimizers step [NAME...]     time of a step on the 124M model's shapes, about 10 minutes
    python -m benchmarks.optimizers share              the same as a share of a whole training step of the 124M model
    python -m benchmarks.optimizers cpu-track [NAME...]  300 steps of the `cpu` track with default settings, about 30
                                                       minutes; runs that are already there are not repeated

Needs a quiet machine and `pip install -e .[test]`; writes optimizers.json. Ratios are medians over interleaved rounds (A B C
A B C ...) with the smallest and largest beside them. Element-wise methods, ours compiled as under the trainer's --compile, step
over all weights of the 124M model. Matrix methods step over the hidden matrices of two of its twelve layers, queries, keys and
values apart, as each method sees them; their time is linear in the layers. A method that renews something every k steps is
timed over whole periods.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import optimizers
from engine import hardware
from engine.command import command
from engine.spec import UsageError, nearest
from layers.shape import PRESETS, ModelConfig
from model import GPT

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, EVERY, BLOCK = 7, 10, 1024
CPU_STEPS, CPU_SCHEDULE = 300, "linear:warmup=0.1"

MACHINE = f"{hardware.processor_name()}, {torch.get_num_threads()} threads"  # stated with every row: sessions differ
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def ours(name: str, **changes: Any) -> Make:
    """Our class over bare parameters, compiled where it can be, at its defaults with the common period and block."""
    cls = optimizers.OPTIMIZERS[name]
    settings = {"block": BLOCK, "start": 1} | ({"every": EVERY} if name in PERIODIC else {}) | changes
    values = cls.of_length(1000, **{key: value for key, value in settings.items() if hasattr(cls, key)})

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = cls(params, **values)
        optimizers.compile_update(optimizer)
        return optimizer

    return make


def rival(spec: str) -> Make:
    """A class of a package, quiet and without its compile step."""

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):
            choice = optimizers.find(spec)
            if spec.startswith("heavyball"):
                utils = importlib.import_module("heavyball").utils
                utils.compile_mode = utils.compile_mode_recommended_to_none = None
            optimizer = choice.cls(params, **choice.settings)
            getattr(optimizer, "train", lambda: None)()
        return optimizer

    return make


PERIODIC = ("shampoo", "caspr", "soap")
SHAMPOO = f"preconditioning_compute_steps={EVERY},start_preconditioning_step=1,block_size={BLOCK},use_svd=true"
# The same method with the same numerics, as SPECs: what differs is said in the name.
RIVALS: dict[str, dict[str, str]] = {
    "adamw": {
        "torch.optim.AdamW foreach": "torch.optim.AdamW:foreach=true",
        "pytorch_optimizer.AdamW": "pytorch_optimizer.AdamW",
        "heavyball.AdamW": "heavyball.AdamW",
    },
    "rmsprop": {"torch.optim.RMSprop": "torch.optim.RMSprop:momentum=0"},
    "adadelta": {"torch.optim.Adadelta": "torch.optim.Adadelta"},
    "lion": {"pytorch_optimizer.Lion": "pytorch_optimizer.Lion"},
    "ademamix": {"pytorch_optimizer.AdEMAMix": "pytorch_optimizer.AdEMAMix"},
    "adopt": {"pytorch_optimizer.ADOPT": "pytorch_optimizer.ADOPT"},
    "mars": {"pytorch_optimizer.MARS": "pytorch_optimizer.MARS"},
    "prodigy": {"prodigyopt.Prodigy": "prodigyopt:Prodigy:use_bias_correction=true"},
    "schedule_free_adamw": {
        "schedulefree.AdamWScheduleFree": "schedulefree:AdamWScheduleFree",
        "pytorch_optimizer.ScheduleFreeAdamW": "pytorch_optimizer.ScheduleFreeAdamW",
        "heavyball.SFAdamW": "heavyball.SFAdamW",
    },
    "muon": {name: name for name in ("torch.optim.Muon", "pytorch_optimizer.Muon", "heavyball.Muon")},
    "shampoo": {"pytorch_optimizer.ScalableShampoo, eigendecompositions": f"pytorch_optimizer.ScalableShampoo:{SHAMPOO}"},
    "soap": {
        "pytorch_optimizer.SOAP, whole matrices": "pytorch_optimizer.SOAP:precondition_frequency=10,max_precondition_dim=4096",
        "heavyball.SOAP, whole matrices": "heavyball.SOAP:precondition_frequency=10,max_precond_dim=4096",
        "heavyball.SOAP, no basis for sides of 3,072": "heavyball.SOAP:precondition_frequency=10",
    },
}


def shapes(name: str) -> list[tuple[int, ...]]:
    """Of the 124M model's weights: all, or the hidden matrices of two layers."""
    if optimizers.OPTIMIZERS[name].roles == ("matrix",):
        return [(768, 768)] * 4 * 2 + [(3072, 768), (768, 3072)] * 2
    with torch.device("meta"):
        return [tuple(p.shape) for p in GPT(ModelConfig(**PRESETS["124M"])).parameters()]


def seconds(optimizer: torch.optim.Optimizer, steps: int, weights: list, gradients: list) -> float:
    """Per step. The gradients are set anew before each: heavyball takes them away."""
    total = 0.0
    for _ in range(steps):
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g
        start = time.perf_counter()
        optimizer.step()
        total += time.perf_counter() - start
    return total / steps


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of any optimizer, ours or another's, whatever its state is nested in."""
    storages: dict[int, int] = {}

    def walk(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                walk(item)
        elif hasattr(value, "__dict__"):
            walk(vars(value))

    walk(dict(optimizer.state))
    return sum(storages.values())


def compare(name: str) -> list[dict]:
    """Rows for our method, torch's fused AdamW on the same weights, and the rivals, interleaved."""
    makes = {"ours": ours(name)} | ({} if name == "adamw" else {"torch.optim.AdamW fused": ours("adamw")})
    makes |= {"ours, whole matrices": ours(name, block=0)} if name == "soap" else {}
    makes |= {what: rival(spec) for what, spec in RIVALS.get(name, {}).items()}
    steps = EVERY if name in PERIODIC else 1
    sizes = shapes(name)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in sizes]
    gradients = [torch.randn(w.shape, generator=generator) * 1e-3 for w in weights]
    made, times = {}, {}
    for what, make in makes.items():
        try:
            optimizer = make(weights)
            seconds(optimizer, steps + 1, weights, gradients)  # state, first preconditioners
            made[what], times[what] = optimizer, []
        except Exception as error:  # a package that is missing or does not take these weights is no reason to stop
            print(f"  {what}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    for _ in range(3 if name in PERIODIC or name == "kron" else ROUNDS):
        for what, optimizer in made.items():
            times[what].append(seconds(optimizer, steps, weights, gradients))
    base = times["ours" if name == "adamw" else "torch.optim.AdamW fused"]
    count = sum(w.numel() for w in weights)
    rows = []
    for what, optimizer in made.items():
        ratios = sorted(a / b for a, b in zip(times[what], base, strict=True))
        middle, milliseconds = statistics.median(ratios), statistics.median(times[what]) * 1e3
        row = dict(name=name, what=what, machine=MACHINE, milliseconds=milliseconds, ratio=middle)
        row |= dict(
            smallest=ratios[0], largest=ratios[-1], state_per_parameter=state_bytes(optimizer) / count, parameters=count
        )
        rows.append(row)
        print(f"  {name:22s} {what:55s} {milliseconds:9.1f} ms  {middle:6.2f} x AdamW", flush=True)
    return rows


def share() -> dict:
    """Seconds of forward and backward of the 124M model, one sequence of 1,024 tokens."""
    gpt = GPT(ModelConfig(**PRESETS["124M"]))
    gpt.compute_dtype = hardware.pick_dtype("auto", torch.device("cpu"))[0]
    tokens = torch.randint(50257, (1, 1024))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        gpt(tokens, tokens).backward()
        times.append(time.perf_counter() - start)
        gpt.zero_grad(set_to_none=True)
    print(f"  forward and backward of 124M, 1,024 tokens: {min(times[1:]):.2f} s", flush=True)
    return {"seconds": statistics.median(times[1:]), "tokens": 1024, "dtype": str(gpt.compute_dtype)[6:], "machine": MACHINE}


def cpu_track(name: str) -> dict:
    """What `name` at its defaults reaches in 300 steps of the cpu track."""
    folder = ROOT / "runs" / "benchmark" / name
    schedule = "constant" if optimizers.own_schedule(name) else CPU_SCHEDULE
    flags = ["--track", "cpu", "--optimizer", name, "--schedule", schedule, "--steps", str(CPU_STEPS), "--val-every", "1000"]
    words = [sys.executable, "train_gpt.py", *flags, "--out", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise UsageError(done.stderr.strip().splitlines()[-1])
    result, environment = (json.loads((folder / file).read_text()) for file in ("result.json", "env.json"))
    row = {key: result[key] for key in ("status", "val_loss", "optimizer_state_bytes")}
    row |= {"step_time": result["robust_train_time"] / result["steps"], "schedule": schedule, "machine": MACHINE}
    print(f"  {name:22s} {row['status']:8s} {row['val_loss'] or float('nan'):.4f}  {row['step_time'] * 1e3:.0f} ms", flush=True)
    return row | {"dtype": environment["dtype"]}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("step", "share", "cpu-track"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="optimizers; all if none is given")
    chosen = parser.parse_args(argv)
    for name in chosen.names:
        if name not in optimizers.OPTIMIZERS:
            raise UsageError(f"unknown optimizer {name!r}: {nearest(name, optimizers.OPTIMIZERS)}")
    results = json.loads(RESULTS.read_text())
    if chosen.part == "share":
        results["share"] = share()
    for name in [] if chosen.part == "share" else chosen.names or list(optimizers.OPTIMIZERS):
        if chosen.part == "step":
            elsewhere = [row for row in results["step"].get(name, []) if row["machine"] != MACHINE]
            results["step"][name] = elsewhere + compare(name)
            gc.collect()
        else:
            results["cpu_track"][name] = cpu_track(name)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command("optimizers", lambda: main(sys.argv[1:])))
