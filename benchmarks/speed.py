"""Speed and memory on this machine, side by side with transformers, interleaved in one run. Prints Markdown.

    python -m benchmarks.speed            all of it, about 8 minutes on 2 quiet cores (needs pip install -e .[test])
    python -m benchmarks.speed ours-against-transformers record-mfu ranks large-pages waiting-threads        some of it

Ratios are medians over interleaved rounds (A B A B ...) with the smallest and largest beside them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train_gpt
import tricks
from config import resolve
from engine import hardware
from engine.command import command
from engine.ranks import World
from engine.spec import UsageError, nearest
from layers.shape import ModelConfig, flops_per_token
from model import GPT

ROOT = Path(__file__).parent.parent
SEQUENCES, ROUNDS = 16, 7
FLAGS = [sys.executable, "train_gpt.py", "--track", "cpu", "--val-tokens", "512", "--val-every", "1000"]


def interleave(steps: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round; the first two rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in times.items()}


def ratio(a: list[float], b: list[float]) -> str:
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def ours_against_transformers() -> None:
    """The cpu track's baseline model and batch, AdamW: transformers' GPT2LMHeadModel in a plain loop, and ours."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings, _ = tricks.apply("cpu", "baseline")
    shape = {key: settings[key] for key in ("vocab_size", "sequence_length", "layers", "heads", "width")}
    tokens = torch.randint(shape["vocab_size"], (SEQUENCES, shape["sequence_length"]))
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    hf_shape = dict(zip(names, shape.values(), strict=True))

    def step_of(model: torch.nn.Module, loss_of: Callable[[torch.nn.Module], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def hf_loss(model: torch.nn.Module, autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=tokens, labels=tokens).loss

    steps = {}
    for name, autocast in (("transformers fp32", False), ("transformers bf16", True)):
        hf = GPT2LMHeadModel(GPT2Config(**hf_shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
        steps[name] = step_of(hf, lambda model, autocast=autocast: hf_loss(model, autocast))
    for name, dtype in (("ours fp32", torch.float32), ("ours bf16", torch.bfloat16)):
        gpt = GPT(ModelConfig(**shape))
        gpt.compute_dtype = dtype
        steps[name] = step_of(gpt, lambda model: model(tokens, tokens))
    times = interleave(steps)
    print("\n| same GPT-2, batch and AdamW | tokens per second | ours (bf16) is faster by |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {tokens.numel() / statistics.median(values):,.0f} | {ratio(values, times['ours bf16'])} |")


def record_mfu() -> None:
    """Step of the cpu track's record recipe against the peak of matrix products measured between the steps."""
    config, model_config, recipe = resolve(["--track", "cpu", "--tricks", "record", "--out", tempfile.mkdtemp()])
    training, peaks = train_gpt.Training(config, model_config, recipe, World("cpu")), []
    if training.compiled:
        training.warm_up()

    def peak() -> None:
        peaks.append(hardware.matmul_peak(torch.device("cpu"), training.dtype)[0])

    step = statistics.median(interleave({"step": training.step, "peak": peak}, rounds=15)["step"])
    done = config.batch_tokens * flops_per_token(model_config) / step
    print("\n| cpu track, record recipe | |\n|---|---|")
    print(f"| step | {step * 1e3:.0f} ms, {config.batch_tokens / step:,.0f} tokens per second |")
    print(f"| model arithmetic | {done / 1e9:,.0f} GFLOP/s |")
    print(f"| matrix product peak, {str(training.dtype)[6:]} | {max(peaks) / 1e9:,.0f} GFLOP/s |")
    print(f"| MFU | {done / max(peaks):.0%} |")


def trained(words: list[str], **environment: str) -> dict:
    """result.json of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*words, "--out", folder + "/run"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | environment)
        return json.loads(Path(folder, "run", "result.json").read_text())


def ranks() -> None:
    """Two gloo ranks of one thread against one process of two threads, interleaved."""
    two = [FLAGS[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *FLAGS[1:]]
    launches = {"1 process, 2 threads": (FLAGS, "2"), "2 gloo ranks, 1 thread each": (two, "1")}
    print("\n| recipe on 2 cores | | tokens per second | relative | peak memory of a process |\n|---|---|---|---|---|")
    for recipe in ("baseline", "record"):
        results: dict[str, list[dict]] = {what: [] for what in launches}
        for what, (words, threads) in [*launches.items()] * 3:
            results[what].append(trained([*words, "--tricks", recipe, "--steps", "25"], OMP_NUM_THREADS=threads))
        rates = {what: [r["tokens"] / r["robust_train_time"] for r in each] for what, each in results.items()}
        for what, rate in rates.items():
            relative, memory = ratio(rate, next(iter(rates.values()))), results[what][-1]["peak_memory"] / 1e6
            print(f"| `{recipe}` | {what} | {statistics.median(rate):,.0f} | {relative} | {memory:,.0f} MB |", flush=True)


def large_pages() -> None:
    """Tensors of 2 MB and more in large pages (hardware.py) and not, interleaved: two sizes of vocabulary."""
    print("\n| memory in pages of 4 kB / large pages | time | peak memory |\n|---|---|---|")
    for track in ("tokens", "bytes-large"):
        words = [*FLAGS[:2], "--track", track, "--steps", "30", "--val-every", "1000"]
        results = [[trained(words, THP_MEM_ALLOC_ENABLE=large) for large in "01"] for _ in range(5)]
        columns = [[[r[key] for r in each] for each in zip(*results)] for key in ("robust_train_time", "peak_memory")]
        print(f"| `{track}` | {' | '.join(ratio(small, large) for small, large in columns)} |", flush=True)


WAITING = {  # how threads wait for each other: environment of libgomp
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "30,000 spins": {"GOMP_SPINCOUNT": "30000"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def waiting_threads() -> None:
    """Training on a quiet machine and beside one process that computes, by how threads wait; interleaved."""
    words = [*FLAGS, "--tricks", "modern,muon", "--steps", "6"]
    times: dict[tuple[str, bool], list[float]] = {(what, busy): [] for what in WAITING for busy in (False, True)}
    for _ in range(3):
        for what, busy in times:
            beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                times[what, busy].append(trained(words, **WAITING[what])["train_time"])
            finally:
                if beside:
                    beside.kill()
    print("\n| threads wait | quiet, s | x libgomp's own | beside a busy process, s | x libgomp's own |\n|---|---|---|---|---|")
    for what in WAITING:
        each = [(times[what, busy], times["libgomp's own", busy]) for busy in (False, True)]
        print(f"| {what} | {' | '.join(f'{statistics.median(t):.1f} | {ratio(t, usual)}' for t, usual in each)} |", flush=True)


PARTS = {f.__name__.replace("_", "-"): f for f in (ours_against_transformers, record_mfu, ranks, large_pages, waiting_threads)}


def main(names: list[str]) -> None:
    for name in names:
        if name not in PARTS:
            raise UsageError(f"unknown part {name!r}: {nearest(name, PARTS)}")
    print(f"{hardware.processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in names or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    sys.exit(command("speed", lambda: main(sys.argv[1:])))
