"""Time and memory of every optimizer beside torch's and the public packages' own, and what each reaches in 300 steps.

    python -m benchmarks.optimizers step [NAME...]     time of a step on the 124M model's shapes, about 10 minutes
    python -m benchmarks.optimizers share              the same as a share of a whole training step of the 124M model
    python -m benchmarks.optimizers cpu-track [NAME...]  300 steps of the `cpu` track with default settings, about 30
                                                       minutes; runs that are already there are not repeated
    python -m lab.docs                               writes the tables from what these leave in optimizers.json

Needs a quiet machine and the extra `test`. Ratios are medians over interleaved rounds (A B C A B C ...) with the
smallest and largest beside them. Element-wise methods, ours compiled as under the trainer's --compile, step over all weights
of the 124M model; matrix methods over the hidden matrices of two of its twelve layers, queries, keys and values apart, which
is what each method would see; their time is linear in the layers. A method that renews something every k steps is timed over
whole periods.
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import optimizers
from engine import hardware
from engine.spec import UsageError, nearest
from layers.shape import PRESETS, ModelConfig
from model import GPT

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, EVERY, BLOCK = 7, 10, 1024
CPU_STEPS, CPU_SCHEDULE = 300, "linear:warmup=0.1"

MACHINE = f"{hardware.processor_name()}, {torch.get_num_threads()} threads"  # stated with every row: sessions differ
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def package(name: str, attribute: str, **settings) -> Make:
    """Constructor of a class of a public package, quiet and without its compile step."""

    def make(params):
        with contextlib.redirect_stdout(io.StringIO()):
            module = __import__(name)
            if name == "heavyball":
                module.utils.compile_mode = module.utils.compile_mode_recommended_to_none = None
            optimizer = getattr(module, attribute)(params, **settings)
            getattr(optimizer, "train", lambda: None)()
        return optimizer

    return make


# The same method with the same numerics: what differs is said in the name.
RIVALS: dict[str, dict[str, Make]] = {
    "adamw": {
        "torch.optim.AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "pytorch_optimizer.AdamW": package("pytorch_optimizer", "AdamW"),
        "heavyball.AdamW": package("heavyball", "AdamW"),
    },
    "rmsprop": {"torch.optim.RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.0)},
    "adadelta": {"torch.optim.Adadelta": torch.optim.Adadelta},
    "lion": {"pytorch_optimizer.Lion": package("pytorch_optimizer", "Lion")},
    "ademamix": {"pytorch_optimizer.AdEMAMix": package("pytorch_optimizer", "AdEMAMix")},
    "adopt": {"pytorch_optimizer.ADOPT": package("pytorch_optimizer", "ADOPT")},
    "mars": {"pytorch_optimizer.MARS": package("pytorch_optimizer", "MARS")},
    "prodigy": {"prodigyopt.Prodigy": package("prodigyopt", "Prodigy", use_bias_correction=True)},
    "schedule_free_adamw": {
        "schedulefree.AdamWScheduleFree": package("schedulefree", "AdamWScheduleFree"),
        "pytorch_optimizer.ScheduleFreeAdamW": package("pytorch_optimizer", "ScheduleFreeAdamW"),
        "heavyball.SFAdamW": package("heavyball", "SFAdamW"),
    },
    "muon": {
        "torch.optim.Muon": torch.optim.Muon,
        "pytorch_optimizer.Muon": package("pytorch_optimizer", "Muon"),
        "heavyball.Muon": package("heavyball", "Muon"),
    },
    "shampoo": {
        "pytorch_optimizer.ScalableShampoo, eigendecompositions": package(
            "pytorch_optimizer", "ScalableShampoo", preconditioning_compute_steps=EVERY, start_preconditioning_step=1,
            block_size=BLOCK, use_svd=True,
        ),
    },
    "soap": {
        "ours, whole matrices": lambda p: ours("soap", block=0)(p),
        "pytorch_optimizer.SOAP, whole matrices": package(
            "pytorch_optimizer", "SOAP", precondition_frequency=EVERY, max_precondition_dim=4096
        ),
        "heavyball.SOAP, whole matrices": package("heavyball", "SOAP", precondition_frequency=EVERY, max_precond_dim=4096),
        "heavyball.SOAP, no basis for sides of 3,072": package("heavyball", "SOAP", precondition_frequency=EVERY),
    },
}  # fmt: skip
PERIODIC = {"shampoo": "every", "caspr": "every", "soap": "every"}


def shapes(name: str) -> list[tuple[int, ...]]:
    """Of the 124M model's weights: all, or the hidden matrices of two layers."""
    if optimizers.OPTIMIZERS[name].roles == ("matrix",):
        return [(768, 768)] * 4 * 2 + [(3072, 768), (768, 3072)] * 2
    with torch.device("meta"):
        return [tuple(p.shape) for p in GPT(ModelConfig(**PRESETS["124M"])).parameters()]


def ours(name: str, block: int = BLOCK) -> Make:
    """Our class over bare parameters, compiled where it can be, at its defaults with the common period and block."""
    cls = optimizers.OPTIMIZERS[name]
    keys = {key: value for key, value in (("every", EVERY), ("block", block), ("start", 1)) if hasattr(cls, key)}
    if name == "cautious_adamw":  # its `every` is part of the method, no work that is put off
        keys.pop("every")
    values = cls.of_length(1000, **keys)

    def make(params):
        optimizer = cls(params, **values)
        getattr(optimizer, "compile", lambda: None)()
        return optimizer

    return make


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
    seen: dict[int, int] = {}

    def walk(value) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            any(walk(v) for v in value.values())
        elif isinstance(value, (list, tuple, set)):
            any(walk(v) for v in value)
        elif hasattr(value, "__dict__"):
            walk(vars(value))

    walk(dict(optimizer.state))
    return sum(seen.values())


def compare(name: str) -> list[dict]:
    """Rows for our method, torch's fused AdamW on the same weights, and the rivals, interleaved."""
    makes = {"ours": ours(name), "torch.optim.AdamW fused": ours("adamw"), **RIVALS.get(name, {})}
    if name == "adamw":
        del makes["torch.optim.AdamW fused"]
    steps = EVERY if name in PERIODIC else 1
    sizes = shapes(name)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in sizes]
    gradients = [torch.randn(w.shape, generator=generator) * 1e-3 for w in weights]
    found, times = {}, {}
    for what, make in makes.items():
        try:
            optimizer = make(weights)
            seconds(optimizer, steps + 1, weights, gradients)  # state, first preconditioners
            found[what], times[what] = optimizer, []
        except Exception as error:  # a package that is missing or does not take these weights is no reason to stop
            print(f"  {what}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    for _ in range(3 if name in PERIODIC or name == "kron" else ROUNDS):
        for what, optimizer in found.items():
            times[what].append(seconds(optimizer, steps, weights, gradients))
    base = times["ours" if name == "adamw" else "torch.optim.AdamW fused"]
    count = sum(w.numel() for w in weights)
    rows = []
    for what, optimizer in found.items():
        ratios = sorted(a / b for a, b in zip(times[what], base, strict=True))
        rows.append(
            dict(
                name=name, what=what, machine=MACHINE,
                milliseconds=statistics.median(times[what]) * 1e3, ratio=statistics.median(ratios),
                smallest=ratios[0], largest=ratios[-1], state_per_parameter=state_bytes(optimizer) / count, parameters=count,
            )
        )  # fmt: skip
        print(f"  {name:22s} {what:55s} {rows[-1]['milliseconds']:9.1f} ms  {rows[-1]['ratio']:6.2f} x AdamW", flush=True)
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
    flags = [
        "--optimizer",
        name,
        "--schedule",
        schedule,
        "--steps",
        str(CPU_STEPS),
        "--val-every",
        "1000",
        "--out",
        str(folder),
    ]
    done = subprocess.run([sys.executable, "train_gpt.py", "--track", "cpu", *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise UsageError(done.stderr.strip().splitlines()[-1])
    result = json.loads((folder / "result.json").read_text())
    row = {key: result[key] for key in ("status", "val_loss", "optimizer_state_bytes")}
    dtype = json.loads((folder / "env.json").read_text())["dtype"]
    row |= {
        "step_time": result["robust_train_time"] / result["steps"],
        "schedule": schedule,
        "machine": MACHINE,
        "dtype": dtype,
    }
    print(f"  {name:22s} {row['status']:8s} {row['val_loss'] or float('nan'):.4f}  {row['step_time'] * 1e3:.0f} ms", flush=True)
    return row


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("step", "share", "cpu-track"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="optimizers; all if none is given")
    chosen = parser.parse_args(argv)
    for name in chosen.names:
        if name not in optimizers.OPTIMIZERS:
            raise UsageError(f"unknown optimizer {name!r}: {nearest(name, optimizers.OPTIMIZERS)}")
    names = chosen.names or list(optimizers.OPTIMIZERS)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"step": {}, "share": {}, "cpu_track": {}}
    if chosen.part == "share":
        results["share"] = share()
    for name in names if chosen.part != "share" else ():
        if chosen.part == "step":
            elsewhere = [row for row in results["step"].get(name, []) if row["machine"] != MACHINE]
            results["step"][name] = elsewhere + compare(name)
            gc.collect()
        else:
            results["cpu_track"][name] = cpu_track(name)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        print(f"benchmarks.optimizers: {error}", file=sys.stderr)
        sys.exit(2)
