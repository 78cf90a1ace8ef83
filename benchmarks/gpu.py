"""Times on this machine's GPUs: kernels and attention against plain PyTorch, and recipes against the cost model.

    python -m benchmarks.gpu [FILE]      some six minutes on one H100; writes FILE (default: benchmarks/gpu.json)

Kernels compute forward and backward at the shapes of GPT-2 124M, in bf16, replayed from a CUDA graph, so that launches do not
count. A recipe trains 50 steps on all GPUs, on random tokens; its step time is the median of the last 40.
This says how fast the numbers come; `./run.sh test --device cuda` says whether they are right.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tricks
from config import mean_flops
from cost.predict import TooLittleMemory, predict
from data import shards
from engine import hardware
from engine.command import command
from engine.run_folder import ROOT, now_utc
from engine.spec import UsageError
from lab.trials import trainer
from layers import attention, kernels
from optimizers.matrix import orthogonalize

LAYERS, TOKENS, WIDTH, HIDDEN, VOCABULARY, COLUMNS = 12, 65536, 768, 3072, 50257, 50304
ROWS = 4096  # of logits at once: the reference keeps several fp32 copies of them
ATTENTION_SHAPE = (16, 6, 1024, 128)  # B, H, T, D: a fourth of the record recipe's micro-batch
MASKS = {"causal": (0, False), "window of 256": (256, False), "documents": (0, True)}
RECIPES = (("gpt2-small", "record"), ("gpt2-small", "baseline"), ("tiny", "baseline"))
STEPS, WARM = 50, 10


def seconds_of(call: Callable[[], object]) -> float:
    """That the GPU computes for a call: the median."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()
    return do_bench_cudagraph(call, return_mode="median") / 1e3


def both_passes(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call that computes the result and the gradients of the inputs."""
    upstream = torch.ones_like(forward())
    return (lambda: torch.autograd.grad(forward(), inputs, upstream)) if inputs else forward


# kernel, inputs, and what it has to beat; None: the same call without the kernel, which takes its reference
Computation = tuple[Callable[[], Tensor], tuple[Tensor, ...], Callable[[], Tensor] | None]


def computations(device: torch.device) -> dict[str, Computation]:
    """Every kernel by name."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).bfloat16()

    X, momentum = random(LAYERS, WIDTH, HIDDEN, scale=HIDDEN**-0.5), torch.randn(LAYERS, WIDTH, HIDDEN, device=device)
    A = torch.bmm(X, X.mT)
    logits, targets = random(ROWS, COLUMNS, scale=10).requires_grad_(), torch.randint(VOCABULARY, (ROWS,), device=device)
    x, weight = random(TOKENS, WIDTH).requires_grad_(), random(HIDDEN, WIDTH, scale=WIDTH**-0.5).requires_grad_()
    rows, head = random(ROWS, WIDTH).requires_grad_(), random(COLUMNS, WIDTH, scale=0.1).requires_grad_()
    shape = f"{LAYERS} x {WIDTH} x {HIDDEN}"
    table: dict[str, Computation] = {
        f"gram, {shape}": (lambda: kernels.gram(X), (), None),
        f"polynomial, {shape}": (lambda: kernels.polynomial(A, -4.775, 2.0315), (), None),
        f"orthogonalize, {shape}, 12 steps cubic": (lambda: orthogonalize(momentum, 12, "cubic", "bf16"), (), None),
        f"linear_relu2, {TOKENS} x {WIDTH} x {HIDDEN}": (lambda: kernels.linear_relu2(x, weight), (x, weight), None),
    }
    for cap, form in ((0.0, "rational"), (15.0, "rational"), (30.0, "tanh"), (23.0, "sigmoid")):
        name = f"cross_entropy, {ROWS} x {VOCABULARY} of {COLUMNS}, {f'{form} {cap:g}' if cap else 'no cap'}"
        how = (VOCABULARY, cap, form)
        table[name] = (lambda how=how: kernels.cross_entropy(logits, targets, *how), (logits,), None)
    if device.type != "cuda" or torch.cuda.get_device_capability() >= (8, 9):
        eighths = partial(kernels.fp8_linear, rows, head, (4 / 448, 0.5 / 448, 1 / 448))
        table[f"fp8_linear, {ROWS} x {WIDTH} x {COLUMNS}"] = (eighths, (rows, head), partial(F.linear, rows, head))
    return table


def kernel_times(computation: Computation) -> dict[str, float]:
    """Seconds of the kernel, of PyTorch, and of PyTorch compiled."""
    kernel, inputs, rival = computation
    rival = rival or kernel
    torch._dynamo.reset()
    times, calls = {}, {"kernel": kernel, "torch": rival, "compiled": torch.compile(rival, dynamic=False)}
    for name, call in calls.items():
        kernels.use("triton" if name == "kernel" else "off")
        times[name] = seconds_of(both_passes(call, inputs))
    kernels.use("auto")
    return times


def attention_times(window: int, has_documents: bool, device: torch.device) -> dict[str, float]:
    """Seconds of each back-end that is there, forward and backward."""
    B, _, T, _ = ATTENTION_SHAPE
    q, k, v = (torch.randn(ATTENTION_SHAPE, device=device).bfloat16().requires_grad_() for _ in range(3))
    documents = (torch.arange(T, device=device) // (T // 3)).expand(B, -1) if has_documents else None
    times = {}
    for name, attend in attention.ATTENTION.items():
        torch._dynamo.reset()
        try:
            attention.check(name, device)
        except UsageError:
            continue
        call = both_passes(lambda attend=attend: attend(q, k, v, 0.12, 0.0, window, documents), (q, k, v))
        times[name] = seconds_of(call)
    return times


def make_data(folder: Path, vocabulary: int) -> None:
    """A corpus of random tokens, in documents of some hundreds."""
    rng, splits = np.random.default_rng(0), {}
    for split, size in (("train", 4_000_000), ("val", 1_000_000)):
        tokens = rng.integers(vocabulary - 1, size=size).astype(shards.TOKEN)
        borders = np.cumsum(rng.geometric(1 / 700, size // 700))
        splits[split] = shards.write(folder, "made", split, np.split(tokens, borders[borders < size]), eot=vocabulary - 1)
    shards.write_manifest(folder, {"corpus": "made", "vocab_size": vocabulary, "source": "random", "splits": splits})


def recipe_figures(track: str, recipe: str, root: Path, ranks: int, *more: str) -> dict:
    """STEPS steps through the trainer, beside what the cost model says of them."""
    settings = tricks.apply(track, recipe)[0]
    folder = shards.dataset_folder(root, "made", settings["tokenizer"])
    if not folder.exists():
        make_data(folder, settings["vocab_size"])
    flags = ["--track", track, "--tricks", recipe, "--steps", str(STEPS), "--schedule", "constant", "--corpus", "made"]
    flags += ["--batch-stages", "1", "--batch-rates", "1", "--val-tokens", str(settings["batch_tokens"]), *more]
    try:
        said = predict([*flags, "--world-size", str(ranks)])
    except TooLittleMemory as error:
        flags += ["--micro-batch-tokens", str(error.fits)]
        said = predict([*flags, "--world-size", str(ranks)])
    out = root / f"{track}-{recipe}"
    places = ["--data-root", str(root), "--out", str(out), "--val-every", str(STEPS), "--checkpoint-minutes", "0"]
    subprocess.run([*trainer(ranks), *flags, *places], cwd=ROOT, check=True)
    events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    step = statistics.median([event["step_time"] for event in events if event["event"] == "train"][WARM:])
    rate, card = said.config.batch_tokens / step, said.where.card
    mfu = rate * mean_flops(said.config, said.model_config) / (card.bf16 * ranks) if card else None
    figures = {"flags": flags, "step": step, "predicted": said.seconds, "tokens_per_second": rate, "mfu": mfu}
    figures["peak_memory"] = json.loads((out / "result.json").read_text())["peak_memory"]
    return figures | {"predicted_memory": said.step.memory.total}


def measure(path: Path) -> str:
    """Everything; what is measured is written at once."""
    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no CUDA GPU here")
    device, findings = torch.device("cuda"), []
    report = {"utc": now_utc(), "machine": hardware.describe(device), "findings": findings}

    def add(stage: str, what: str, figures: dict) -> None:
        findings.append({"stage": stage, "what": what, "figures": figures})
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{what}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, (int, float))), flush=True)

    for name, computation in computations(device).items():
        add("kernels", f"time of {name}", kernel_times(computation))
    for mask, settings in MASKS.items():
        add("attention", f"time of {mask}, {' x '.join(map(str, ATTENTION_SHAPE))}", attention_times(*settings, device))
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for track, recipe in RECIPES:
            add("recipes", f"{track}:{recipe}", recipe_figures(track, recipe, Path(folder), torch.cuda.device_count()))
    return f"wrote {path}"


if __name__ == "__main__":
    sys.exit(command("gpu", lambda: measure(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json"))))
