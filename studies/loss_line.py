"""Along a random line the loss is flat around the start of training, and a basin around its end.

L(a) = L(w0 + a w1) for a from -1 to 1, w1 a random direction as long as w0. w0: the weights of a small GPT (2 layers, width 64,
bytes of the State of the Union) before and after training, without dropout and with 0.2; L: the loss on fixed text, without
dropout. Three models of each kind with two directions each; the same with filter-normalised directions (each row of a matrix as
long as the row of w0), which make models comparable. Two random directions of p weights should be
orthogonal: a cosine of about 1 / sqrt(p).

Source: slide "loss surface" of the lecture; Li, Xu, Taylor, Studer, Goldstein 2018 (arXiv 1712.09913).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies import surfaces
from studies.common import BLUE, GREY, ORANGE, axes, batches, of_run, rounded, say, tiny_gpt, tokens, train

MINUTES = 2.6
SLIDE = 12
KINDS = {"random": surfaces.random_direction, "filters": surfaces.filter_normalised}
RUNS = {"start, dropout 0": GREY, "end, dropout 0": BLUE, "start, dropout 0.2": GREY, "end, dropout 0.2": ORANGE}


def lines(model, loss, at: Tensor, seeds: range) -> dict[str, Tensor]:
    """Kind of direction -> losses [seeds, len(at)]."""
    return {
        kind: torch.stack([surfaces.losses(model, loss, [make(model, seed)], at[:, None], kind) for seed in seeds])
        for kind, make in KINDS.items()
    }


def small(seed: int, quick: bool) -> dict[str, Any]:
    """Lines of the small GPT: name of RUNS -> kind -> [models x directions, points]."""
    text = tokens("repository") if quick else tokens()
    steps, models, at = (150, 1, torch.linspace(-1, 1, 9)) if quick else (500, 3, torch.linspace(-1, 1, 41))
    size = {"length": 32, "layers": 1, "width": 32} if quick else {"length": 64}
    loss, found = surfaces.text_loss(text, size["length"]), {name: [] for name in RUNS}
    for number in range(seed, seed + models):
        for dropout in (0.0, 0.2):
            gpt = tiny_gpt(seed=number, dropout=dropout, **size)
            for when in ("start", "end"):
                if when == "end":
                    train(gpt, "adamw:lr=3e-3", batches(text, size["length"], 16, number), steps)
                found[f"{when}, dropout {dropout:g}"].append(lines(gpt, loss, at, range(2)))
    cosine = surfaces.cosine(*(surfaces.random_direction(gpt, seed) for seed in (0, 1)))
    joined = {name: {kind: torch.cat([part[kind] for part in parts]) for kind in KINDS} for name, parts in found.items()}
    return {"at": at, "lines": joined, "cosine": cosine, "parameters": sum(w.numel() for w in gpt.parameters())}


def of_folder(folder: Path, quick: bool) -> dict[str, Any]:
    """Lines of a trained run."""
    gpt, text = of_run(folder)
    at = torch.linspace(-1, 1, 11 if quick else 41)
    found = lines(gpt, surfaces.text_loss(text, gpt.config.sequence_length, 8), at, range(3))
    cosine = surfaces.cosine(*(surfaces.random_direction(gpt, seed) for seed in (0, 1)))
    size = sum(w.numel() for w in gpt.parameters())
    return {"at": at, "lines": {f"end, {folder.name}": found}, "cosine": cosine, "parameters": size}


def run(seed: int = 0, quick: bool = False, folder: Path | None = None) -> dict[str, Any]:
    return rounded(of_folder(folder, quick) if folder else small(seed, quick))


def shape(figures: dict[str, Any], when: str) -> tuple[int, float, float]:
    """Of the lines whose name begins with `when`: how many; how far a = 0 lies above the lowest point at most, as part of the
    height; and the largest height, as a multiple of the loss at 0."""
    offsets, heights, middle = [0.0], [0.0], len(figures["at"]) // 2
    for name, kinds in figures["lines"].items():
        for line in (line for lines in kinds.values() for line in lines if name.startswith(when)):
            known = [x for x in line if x is not None]
            offsets.append((line[middle] - min(known)) / (max(known) - min(known)))
            heights.append((max(known) - min(known)) / line[middle])
    return len(offsets) - 1, max(offsets), max(heights)


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    ends, offset, height = shape(figures, "end")
    starts, _, flat = shape(figures, "start")
    typical = figures["parameters"] ** -0.5
    words = (
        f"on {ends} lines trained weights lie at the bottom (above it by at most {offset:.1%} of the height, which is up to "
    )
    words += f"{height:.2f} times the loss there)"
    words += f"; {starts} lines around the start vary by at most {flat:.1%} of the loss" if starts else ""
    words += f"; cosine of two random directions {figures['cosine']:.4f}, 1 / sqrt(p) = {typical:.4f}"
    return offset < 0.02 and abs(figures["cosine"]) < 4 * typical and flat < height / 4, words


def draw(figures: dict[str, Any]):
    figure, parts = axes(2, width=14, sharey=True)
    titles = {"random": "random direction", "filters": "filter-normalised direction"}
    places = {"start, dropout 0": ("before training", -24), "end, dropout 0": ("trained without dropout", -16)}
    places |= {"end, dropout 0.2": ("trained with dropout 0.2", 34)}
    middle = len(figures["at"]) // 2
    for axis, kind in zip(parts, KINDS, strict=True):
        for name, kinds in figures["lines"].items():
            colour = RUNS.get(name, BLUE)
            for line in kinds[kind]:
                axis.plot(figures["at"], line, color=colour, linewidth=1.2)
            if name not in RUNS or name in places:
                below = min(line[middle] for line in kinds[kind])
                words, shift = places.get(name, (name, -16))
                say(axis, 0, below, words, colour, xytext=(0, shift), ha="center")
        axis.margins(y=0.15)
        axis.set(title=titles[kind], xlabel="a", xlim=(-1, 1))
    parts[0].set_ylabel("loss at w0 + a w1")
    return figure
