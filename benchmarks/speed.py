"""Speed and memory on this machine, side by side with nanoGPT's loop, interleaved in one run. Prints Markdown.

    python -m benchmarks.speed            all of it
    python -m benchmarks.speed record-mfu where-time-goes ranks        some of it

Ratios are medians over interleaved rounds (A B A B ...) with the smallest and largest beside them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import train_gpt
from config import resolve
from engine import hardware
from engine.command import command
from engine.ranks import World
from engine.spec import UsageError, nearest
from lab.markdown import table
from lab.trials import trainer
from layers.shape import ModelConfig, flops_per_token
from model import GPT

ROOT = Path(__file__).parent.parent
SEQUENCES, ROUNDS = 16, 7
FLAGS = ["--track", "cpu", "--val-tokens", "512", "--val-every", "1000"]


def interleave(steps: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round; the first two rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            times[name].append(timeit.timeit(step, "gc.enable()", number=1))  # which timeit itself would disable
    return {name: values[2:] for name, values in times.items()}


def ratio(a: list[float], b: list[float]) -> str:
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


class PlainGPT(torch.nn.Module):
    """nanoGPT's model in PyTorch's own parts: blocks with the norm first, scaled_dot_product_attention, GELU, a tied head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, length = config.width, config.sequence_length
        block = torch.nn.TransformerEncoderLayer(width, config.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerEncoder(block, config.layers, torch.nn.LayerNorm(width), enable_nested_tensor=False)
        self.tokens, self.places = torch.nn.Embedding(config.vocab_size, width), torch.nn.Embedding(length, width)
        self.mask = torch.nn.Transformer.generate_square_subsequent_mask(length)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of tokens and targets [B, T] in nats per token."""
        x = self.blocks(self.tokens(tokens) + self.places.weight, self.mask, is_causal=True)
        return F.cross_entropy((x @ self.tokens.weight.T).flatten(0, 1), targets.flatten())


def ours_against_nanogpt() -> str:
    """A step of the cpu track's baseline: nanoGPT's loop (fp32 on a CPU, clipping, fused AdamW) and ours, compiled and not."""
    config = resolve(["--track", "cpu"])[1]
    tokens = torch.randint(config.vocab_size, (SEQUENCES, config.sequence_length))

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(tokens, tokens.clone()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    models: dict[str, torch.nn.Module] = {"nanoGPT, float32": PlainGPT(config)}
    for dtype in [torch.float32, torch.bfloat16][: 1 + hardware.has_native_bf16(torch.device("cpu"))]:
        models[f"ours, {str(dtype)[6:]}"] = gpt = GPT(config)
        gpt.compute_dtype = dtype
    models |= {f"{name}, compiled": torch.compile(model) for name, model in models.items()}
    times = interleave({n: partial(step, m, torch.optim.AdamW(m.parameters(), fused=True)) for n, m in models.items()})
    rates = {name: f"{tokens.numel() / statistics.median(each):,.0f}" for name, each in times.items()}
    rows = [(name, rates[name], ratio(times["nanoGPT, float32, compiled"], each)) for name, each in times.items()]
    return table(("same GPT-2, batch and AdamW", "tokens per second", "nanoGPT, compiled / this"), rows)


def of_record() -> train_gpt.Training:
    """The cpu track's record recipe, ready to step with whole sequences, as in the second half of a run."""
    flags = ["--track", "cpu", "--tricks", "record", "--length-stages", "1", "--out", tempfile.mkdtemp()]
    training = train_gpt.Training(*resolve(flags), World("cpu"))
    if training.compiled:
        training.warm_up()
    return training


def record_mfu() -> str:
    """Step of the cpu track's record recipe against the peak of matrix products measured between the steps."""
    training, peaks, cpu = of_record(), [], torch.device("cpu")
    steps = {"step": training.step, "peak": lambda: peaks.append(hardware.matmul_peak(cpu, training.dtype)[0])}
    step = statistics.median(interleave(steps, rounds=15)["step"])
    tokens = training.config.batch_tokens
    done = tokens * flops_per_token(training.model_config) / step
    rows = [
        ("step", f"{step * 1e3:.0f} ms, {tokens / step:,.0f} tokens per second"),
        ("model arithmetic", f"{done / 1e9:,.0f} GFLOP/s"),
        (f"matrix product peak, {str(training.dtype)[6:]}", f"{max(peaks) / 1e9:,.0f} GFLOP/s"),
        ("MFU", f"{done / max(peaks):.0%}"),
    ]
    return table(("cpu track, record recipe", ""), rows)


PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl::_mkl_linear", "mkldnn::_linear_pointwise"}


def kind_of(event: Any) -> str:
    """What an operation of a step is for, by its name and those that called it."""
    names, parent = [event.name], event.cpu_parent
    while parent is not None:
        names, parent = [*names, parent.name], parent.cpu_parent
    if any(name.startswith("Optimizer.step") for name in names):
        return "optimizer: matrix products" if event.name in PRODUCTS else "optimizer: the rest"
    if event.name in PRODUCTS:
        return "attention: matrix products" if event.name in ("aten::bmm", "aten::baddbmm") else "model: matrix products"
    if any("CompiledFxGraph" in name or name.startswith("CompiledFunction") for name in names):
        return "model: fused passes over memory (norms, activations, softmax, casts)"
    return "model: other operations"


def where_time_goes() -> str:
    """A step of the cpu track's record recipe by what its operations are for."""
    training = of_record()
    for _ in range(3):
        training.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step = timeit.timeit(training.step, "gc.enable()", number=ROUNDS) / ROUNDS
    seconds: Counter[str] = Counter()
    for event in profile.events():
        seconds[kind_of(event)] += event.self_cpu_time_total / 1e6 / ROUNDS
    seconds["outside of PyTorch's operations: data, Python, waiting"] = step - seconds.total()
    rows = [(kind, f"{each / step:.1%}") for kind, each in seconds.most_common()]
    return table((f"of a step of {step * 1e3:.0f} ms (with the profiler)", "share"), rows)


def trained(flags: list[str], ranks: int = 1, **environment: str) -> dict:
    """result.json of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*trainer(ranks), *FLAGS, *flags, "--out", folder + "/run"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | environment)
        return json.loads(Path(folder, "run", "result.json").read_text())


def ranks() -> str:
    """Two gloo ranks of one thread against one process of two threads, interleaved."""
    launches, rows = {"1 process, 2 threads": (1, "2"), "2 gloo ranks, 1 thread each": (2, "1")}, []
    for recipe in ("baseline", "record"):
        results: dict[str, list[dict]] = {what: [] for what in launches}
        for what, (processes, threads) in [*launches.items()] * 3:
            results[what].append(trained(["--tricks", recipe, "--steps", "25"], processes, OMP_NUM_THREADS=threads))
        rates = {what: [r["tokens"] / r["robust_train_time"] for r in each] for what, each in results.items()}
        for what, rate in rates.items():
            relative, memory = ratio(rate, next(iter(rates.values()))), results[what][-1]["peak_memory"] / 1e6
            rows.append((f"`{recipe}`", what, f"{statistics.median(rate):,.0f}", relative, f"{memory:,.0f} MB"))
    return table(("recipe on 2 cores", "", "tokens per second", "relative", "peak memory of a process"), rows)


WAITING = {  # how threads wait for each other: environment of libgomp
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "30,000 spins": {"GOMP_SPINCOUNT": "30000"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def waiting_threads() -> str:
    """Training on a quiet machine and beside one process that computes, by how threads wait; interleaved."""
    flags = ["--tricks", "modern,muon", "--steps", "6"]
    times: dict[tuple[str, bool], list[float]] = {(what, busy): [] for what in WAITING for busy in (False, True)}
    for what, busy in [*times] * 3:
        beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            times[what, busy].append(trained(flags, **WAITING[what])["train_time"])
        finally:
            if beside:
                beside.kill()
    cells = {key: (f"{statistics.median(t):.1f}", ratio(t, times["libgomp's own", key[1]])) for key, t in times.items()}
    rows = [(what, *cells[what, False], *cells[what, True]) for what in WAITING]
    usual = "x libgomp's own"
    return table(("threads wait", "quiet, s", usual, "beside a busy process, s", usual), rows)


PARTS = {p.__name__.replace("_", "-"): p for p in (ours_against_nanogpt, record_mfu, where_time_goes, ranks, waiting_threads)}


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in PARTS]:
        raise UsageError(f"unknown part {unknown[0]!r}: {nearest(unknown[0], PARTS)}")
    print(f"{hardware.processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in names or PARTS:
        print(f"\n{PARTS[name]()}", flush=True)


if __name__ == "__main__":
    sys.exit(command("speed", lambda: main(sys.argv[1:])))
