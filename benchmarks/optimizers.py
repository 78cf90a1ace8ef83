"""Time and memory of every optimizer beside torch's and the public packages' own.

    python -m benchmarks.optimizers [NAME...]     time of a step on the 124M model's shapes, about 10 minutes

Needs a quiet machine and `pip install -e .[test]`; writes optimizers.json. Ratios are medians over interleaved rounds (A B C
A B C ...) with the smallest and largest beside them. Element-wise methods, ours compiled as under the trainer's --compile, step
over all weights of the 124M model. Matrix methods step over the hidden matrices of two of its twelve layers, queries, keys and
values apart; their time is linear in the layers. What renews something every k steps is timed over whole periods.
"""

import contextlib
import gc
import importlib
import io
import json
import statistics
import sys
import timeit
from functools import partial
from pathlib import Path
from typing import Any

import torch

import optimizers
from engine import hardware
from engine.command import Parser, command
from engine.spec import UsageError, nearest
from layers.shape import PRESETS, ModelConfig
from model import GPT

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, EVERY, BLOCK = 7, 10, 1024

PERIODIC = ("shampoo", "caspr", "soap")
MACHINE = f"{hardware.processor_name()}, {torch.get_num_threads()} threads"  # stated with every row: sessions differ
SOAP = f"precondition_frequency={EVERY}"
SHAMPOO = f"preconditioning_compute_steps={EVERY},start_preconditioning_step=1,block_size={BLOCK},use_svd=true"
RIVALS = (  # ours, what the same method with the same numerics is called, and its SPEC where that differs
    ("adamw", "torch.optim.AdamW foreach", "torch.optim.AdamW:foreach=true"),
    ("adamw", "pytorch_optimizer.AdamW", ""),
    ("adamw", "heavyball.AdamW", ""),
    ("rmsprop", "torch.optim.RMSprop", "torch.optim.RMSprop:momentum=0"),
    ("adadelta", "torch.optim.Adadelta", ""),
    ("lion", "pytorch_optimizer.Lion", ""),
    ("ademamix", "pytorch_optimizer.AdEMAMix", ""),
    ("adopt", "pytorch_optimizer.ADOPT", ""),
    ("mars", "pytorch_optimizer.MARS", ""),
    ("prodigy", "prodigyopt.Prodigy", "prodigyopt:Prodigy:use_bias_correction=true"),
    ("schedule_free_adamw", "schedulefree.AdamWScheduleFree", "schedulefree:AdamWScheduleFree"),
    ("schedule_free_adamw", "pytorch_optimizer.ScheduleFreeAdamW", ""),
    ("schedule_free_adamw", "heavyball.SFAdamW", ""),
    ("muon", "torch.optim.Muon", ""),
    ("muon", "heavyball.Muon", ""),
    ("shampoo", "pytorch_optimizer.ScalableShampoo, eigendecompositions", f"pytorch_optimizer.ScalableShampoo:{SHAMPOO}"),
    ("soap", "pytorch_optimizer.SOAP, whole matrices", f"pytorch_optimizer.SOAP:{SOAP},max_precondition_dim=4096"),
    ("soap", "heavyball.SOAP, whole matrices", f"heavyball.SOAP:{SOAP},max_precond_dim=4096"),
    ("soap", "heavyball.SOAP, no basis for sides of 3,072", f"heavyball.SOAP:{SOAP}"),
)


def ours(name: str, weights: list[torch.nn.Parameter], **changes: Any) -> torch.optim.Optimizer:
    """Our class over bare parameters, compiled where it can be, at its defaults with the common period and block."""
    cls = optimizers.OPTIMIZERS[name]
    settings = {"block": BLOCK, "start": 1} | ({"every": EVERY} if name in PERIODIC else {}) | changes
    optimizer = cls(weights, **cls.of_length(1000, **{key: value for key, value in settings.items() if hasattr(cls, key)}))
    optimizers.compile_update(optimizer)
    return optimizer


def rival(spec: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """A class of a package, quiet and without its compile step."""
    with contextlib.redirect_stdout(io.StringIO()):
        choice = optimizers.find(spec)
        if spec.startswith("heavyball"):
            utils = importlib.import_module("heavyball").utils
            utils.compile_mode = utils.compile_mode_recommended_to_none = None
        optimizer = choice.cls(weights, **choice.settings)
        getattr(optimizer, "train", lambda: None)()
    return optimizer


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
        total += timeit.timeit(optimizer.step, "gc.enable()", number=1)  # which timeit itself would disable
    return total / steps


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of any optimizer, ours or another's, whatever its state is nested in."""
    storages, left = {}, [dict(optimizer.state)]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple, set)):
            left += value
        else:
            left += (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    return sum(storages.values())


def compare(name: str) -> list[dict]:
    """Rows for our method, torch's fused AdamW on the same weights, and the rivals, interleaved."""
    makes = {"ours": partial(ours, name)} | ({} if name == "adamw" else {"torch.optim.AdamW fused": partial(ours, "adamw")})
    makes |= {"ours, whole matrices": partial(ours, name, block=0)} if name == "soap" else {}
    makes |= {what: partial(rival, spec or what) for of, what, spec in RIVALS if of == name}
    steps = EVERY if name in PERIODIC else 1
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in shapes(name)]
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
    base, count, rows = times["ours" if name == "adamw" else "torch.optim.AdamW fused"], sum(w.numel() for w in weights), []
    for what, optimizer in made.items():
        ratios = sorted(a / b for a, b in zip(times[what], base, strict=True))
        row = dict(name=name, what=what, machine=MACHINE, milliseconds=statistics.median(times[what]) * 1e3)
        row |= dict(ratio=statistics.median(ratios), smallest=ratios[0], largest=ratios[-1])
        rows.append(row | dict(state_per_parameter=state_bytes(optimizer) / count, parameters=count))
        print(f"  {name:22s} {what:55s} {row['milliseconds']:9.1f} ms  {row['ratio']:6.2f} x AdamW", flush=True)
    return rows


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="optimizers; all if none is given")
    chosen = parser.parse_args(argv)
    if unknown := [name for name in chosen.names if name not in optimizers.OPTIMIZERS]:
        raise UsageError(f"unknown optimizer {unknown[0]!r}: {nearest(unknown[0], optimizers.OPTIMIZERS)}")
    results = json.loads(RESULTS.read_text())
    for name in chosen.names or optimizers.OPTIMIZERS:
        elsewhere = [row for row in results["step"].get(name, []) if row["machine"] != MACHINE]
        results["step"][name] = elsewhere + compare(name)
        gc.collect()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command("optimizers", lambda: main(sys.argv[1:]), [spec or what for _, what, spec in RIVALS]))
