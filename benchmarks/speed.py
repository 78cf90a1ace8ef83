"""Speed and memory on this machine, side by side with transformers, interleaved in one run. Prints Markdown.

    python -m benchmarks.speed            all of it, about 8 minutes on 2 quiet cores (needs the extra `test`)
    python -m benchmarks.speed ours-against-transformers record-mfu ranks large-pages start-up        some of it

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
from engine import hardware
from model import GPT, ModelConfig, flops_per_token

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cpu")
SEQUENCES, ROUNDS = 16, 7


def one_step(model: torch.nn.Module, loss_of: Callable, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """A function that makes one training step and returns its seconds."""

    def step() -> float:
        start = time.perf_counter()
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def interleave(steps: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round; the first two rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            times[name].append(step())
    return {name: values[2:] for name, values in times.items()}


def ratio(a: list[float], b: list[float]) -> str:
    ratios = sorted(x / y for x, y in zip(a, b))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def ours_against_transformers() -> None:
    """The cpu track's baseline model and batch, AdamW: transformers' GPT2LMHeadModel in a plain loop, and ours."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings, _ = tricks.apply("cpu", "baseline")
    shape = {k: settings[k] for k in ("vocab_size", "sequence_length", "layers", "heads", "width")}
    tokens = torch.randint(shape["vocab_size"], (SEQUENCES, shape["sequence_length"]))
    hf_config = GPT2Config(
        vocab_size=shape["vocab_size"], n_positions=shape["sequence_length"], n_embd=shape["width"], n_layer=shape["layers"],
        n_head=shape["heads"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    steps = {}
    for name, autocast in (("transformers fp32", False), ("transformers bf16", True)):
        hf = GPT2LMHeadModel(hf_config)

        def hf_loss(model, autocast=autocast):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(input_ids=tokens, labels=tokens).loss

        steps[name] = one_step(hf, hf_loss, torch.optim.AdamW(hf.parameters(), fused=True))
    for name, dtype in (("ours fp32", torch.float32), ("ours bf16", torch.bfloat16)):
        gpt = GPT(ModelConfig(**shape))
        gpt.compute_dtype = dtype
        steps[name] = one_step(gpt, lambda model: model(tokens, tokens), torch.optim.AdamW(gpt.parameters(), fused=True))
    times = interleave(steps)
    print("\n| same GPT-2, batch and AdamW | tokens per second | ours (bf16) is faster by |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {tokens.numel() / statistics.median(values):,.0f} | {ratio(values, times['ours bf16'])} |")


def record_mfu() -> None:
    """Step of the cpu track's record recipe against the peak of matrix products measured between the steps."""
    config, model_config, recipe = train_gpt.resolve(["--track", "cpu", "--tricks", "record", "--out", tempfile.mkdtemp()])
    training = train_gpt.Training(config, model_config, recipe, train_gpt.World("cpu"))
    if training.compiled:
        training.warm_up()
    peak = lambda: 1 / hardware.matmul_peak(DEVICE, training.dtype)[0]  # noqa: E731
    times = interleave({"step": lambda: training.step()[2], "peak": peak}, rounds=15)
    step, top = statistics.median(times["step"]), 1 / min(times["peak"])
    done = config.batch_tokens * flops_per_token(model_config) / step
    print("\n| cpu track, record recipe | |\n|---|---|")
    print(f"| step | {step * 1e3:.0f} ms, {config.batch_tokens / step:,.0f} tokens per second |")
    print(f"| model arithmetic | {done / 1e9:,.0f} GFLOP/s |")
    print(f"| matrix product peak, {str(training.dtype)[6:]} | {top / 1e9:,.0f} GFLOP/s |")
    print(f"| MFU | {done / top:.0%} |")


FLAGS = ["train_gpt.py", "--track", "cpu", "--val-tokens", "512", "--val-every", "1000"]


def trained(words: list[str], **environment: str) -> dict:
    """result.json of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*words, "--out", folder + "/run"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | environment)
        return json.loads(Path(folder, "run", "result.json").read_text())


def ranks() -> None:
    """Two gloo ranks of one thread against one process of two threads, interleaved."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    print("\n| recipe on 2 cores | | tokens per second | relative | peak memory of a process |\n|---|---|---|---|---|")
    for recipe in ("baseline", "record"):
        rates, memory = {"one": [], "two": []}, {}
        for _ in range(3):
            for name, launch, threads in (("one", [sys.executable], 2), ("two", torchrun, 1)):
                words = [*launch, *FLAGS, "--tricks", recipe, "--steps", "25"]
                result = trained(words, OMP_NUM_THREADS=str(threads))
                rates[name].append(result["tokens"] / result["robust_train_time"])
                memory[name] = result["peak_memory"]
        for name, what in (("one", "1 process, 2 threads"), ("two", "2 gloo ranks, 1 thread each")):
            relative = ratio(rates[name], rates["one"])
            rate = statistics.median(rates[name])
            print(f"| `{recipe}` | {what} | {rate:,.0f} | {relative} | {memory[name] / 1e6:,.0f} MB |", flush=True)


def large_pages() -> None:
    """Tensors of 2 MB and more in large pages (hardware.py) and not, interleaved: two sizes of vocabulary."""
    print("\n| memory in pages of 4 kB / large pages | time | peak memory |\n|---|---|---|")
    for track in ("tokens", "bytes-large"):
        words = [sys.executable, "train_gpt.py", "--track", track, "--steps", "30", "--val-every", "1000"]
        found = [[trained(words, THP_MEM_ALLOC_ENABLE=large) for large in "01"] for _ in range(5)]
        columns = [[[r[key] for r in each] for each in zip(*found)] for key in ("robust_train_time", "peak_memory")]
        print(f"| `{track}` | {' | '.join(ratio(small, large) for small, large in columns)} |", flush=True)


def start_up() -> None:
    """Seconds from the command to the first validation, after one step: what a user waits for."""
    print("\n| command to the end of its first step, data ready | seconds: median (smallest-largest) |\n|---|---|")
    for what, flag in (("not compiled", "--no-compile"), ("compiled before", "--compile")):
        seconds = []
        for _ in range(4):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                words = [sys.executable, *FLAGS, "--tricks", "record", "--steps", "1", flag, "--out", folder + "/run"]
                process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
                log = Path(folder, "run", "log.jsonl")
                while not (log.exists() and '"val"' in log.read_text()):
                    time.sleep(0.02)
                seconds.append(time.perf_counter() - start)
                process.wait()
        seconds = sorted(seconds[1:])
        print(f"| `record`, {what} | {seconds[1]:.1f} ({seconds[0]:.1f}-{seconds[2]:.1f}) |", flush=True)


PARTS = {
    "ours-against-transformers": ours_against_transformers,
    "record-mfu": record_mfu,
    "ranks": ranks,
    "large-pages": large_pages,
    "start-up": start_up,
}

if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in PARTS]
    if unknown:
        print(f"speed: unknown part {unknown[0]!r}: {', '.join(PARTS)}", file=sys.stderr)
        sys.exit(2)
    print(f"{hardware.processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
