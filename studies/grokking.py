"""A network memorises half of a table long before it understands the other half.

The table: a / b = c modulo 97, 9,312 equations, a random half to train on (the project's corpus `division`). The project's
GPT, 2 layers of width 128 with 4 heads, reads a and b and predicts c. Optimizers: AdamW at rate 1e-3 with batches of 512 and
weight decay 0.7, and Muon for the hidden matrices with the same decay a step. We measure the first step at which accuracy on
each half is at least 99 %, to 50 steps.
The wait depends on decay and start. Weights start as in the source, at PyTorch's defaults (embeddings N(0, 1)). In single runs
of AdamW the other half took 10 times as many steps with decay 0.5, 4.4 with the source's 1, 2 from GPT-2's small weights.

Source: Power et al. 2022 (arXiv 2201.02177); Muon: Tveit, Remseth, Pedersen Skogvold 2025 (arXiv 2504.16041).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimizers
from data import corpora
from layers.shape import ModelConfig
from model import GPT
from studies.common import CORPORA, GREEN, GREY, PURPLE, axes, progress, rounded, say

MINUTES = 5.6
SLIDE = 18
MODULUS, WIDTH, BATCH, EVERY, WARMUP, ENOUGH = 97, 128, 512, 50, 10, 0.99
SPECS = {
    "AdamW": "adamw:lr=1e-3,beta2=0.98,weight_decay=0.7",
    "Muon": "muon:lr=0.02,weight_decay=0.035,adamw_lr=1e-3,adamw_beta2=0.98,adamw_weight_decay=0.7",
}


def table() -> tuple[Tensor, Tensor]:
    """Equations (a, b, c), those to train on and the others: [4656, 3] each."""
    texts = corpora.division(CORPORA)
    return tuple(torch.tensor([[int(word) for word in text.split()] for text in texts[split]]) for split in ("train", "val"))


def made(seed: int, layers: int) -> GPT:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gpt = GPT(ModelConfig(MODULUS, 2, layers, 4, WIDTH, tied_head=False, attention="sdpa"))
        for part in gpt.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                part.reset_parameters()
        return gpt


def answers(gpt: GPT, rows: Tensor) -> Tensor:
    """Logits [n, MODULUS] of c."""
    return gpt(rows[:, :2])[:, -1]


@torch.no_grad()
def accuracy(gpt: GPT, rows: Tensor) -> float:
    return float((answers(gpt, rows).argmax(1) == rows[:, 2]).float().mean())


def course(spec: str, gpt: GPT, halves: tuple[Tensor, Tensor], seed: int, steps: int, what: str) -> dict[str, Any]:
    """Train until both halves are known; the accuracies after every EVERY steps."""
    (train, val), optimizer = halves, optimizers.build(spec, gpt, steps=steps)
    dice, seen = torch.Generator().manual_seed(seed), {"step": [], "train": [], "val": []}
    for step in progress(range(1, steps + 1), what):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, step / WARMUP)
        rows = train[torch.randint(len(train), (min(BATCH, len(train)),), generator=dice)]
        optimizer.zero_grad()
        F.cross_entropy(answers(gpt, rows), rows[:, 2]).backward()
        optimizer.step()
        if step % EVERY == 0:
            for key, value in (("step", step), ("train", accuracy(gpt, train[:1024])), ("val", accuracy(gpt, val))):
                seen[key].append(value)
            if first(seen, "val") and first(seen, "train"):
                break
    return seen


def first(seen: dict[str, Any], half: str) -> int | None:
    """The first step at which the accuracy on this half was ENOUGH."""
    return next((step for step, value in zip(seen["step"], seen[half], strict=True) if value >= ENOUGH), None)


def run(seed: int = 0, quick: bool = False) -> dict[str, Any]:
    specs = {"AdamW": SPECS["AdamW"]} if quick else SPECS
    train, val = table()
    halves, layers, steps = ((train[:300], val[:1000]), 1, 150) if quick else ((train, val), 2, 8000)
    return rounded({name: course(spec, made(seed, layers), halves, seed, steps, name) for name, spec in specs.items()}, 4)


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    words, ratios = [], {}
    for name, seen in figures.items():
        known, understood = first(seen, "train"), first(seen, "val")
        if not understood:
            words.append(
                f"{name}: trained half at step {known}, other half at {seen['val'][-1]:.0%} after {seen['step'][-1]} steps"
            )
            continue
        ratio = ratios[name] = understood / known
        words.append(f"{name}: 99 % of the trained half at step {known}, of the other at step {understood}: {ratio:.1f} times")
    return ratios.get("AdamW", 0) >= 5, "; ".join(words) + " (one seed)"


def draw(figures: dict[str, Any]):
    figure, parts = axes(len(figures), width=7 * len(figures), squeeze=False, sharey=True)
    for axis, (name, seen) in zip(parts[0], figures.items(), strict=True):
        for half, colour, words in (
            ("train", GREY, "trained half"),
            ("val", PURPLE if name == "Muon" else GREEN, "other half"),
        ):
            axis.semilogx(seen["step"], [100 * value for value in seen[half]], color=colour)
            if (step := first(seen, half)) is not None:
                axis.axvline(step, color=colour, linewidth=1, linestyle=":")
            rising = next(
                (step for step, value in zip(seen["step"], seen[half], strict=True) if value >= 0.5), seen["step"][-1]
            )
            say(axis, rising, 60, words, colour, xytext=(-12, 0), ha="right")
        known, understood = first(seen, "train"), first(seen, "val")
        axis.set(title=f"{name}: 99 % at steps {known} and {understood}", xlabel="step", ylim=(0, 103))
    parts[0, 0].set_ylabel("accuracy, %")
    return figure
