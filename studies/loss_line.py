"""Along a random line the loss is flat around the start of training, and a basin around its end.

L(a) = L(w0 + a w1) for a from -1 to 1, w1 a random direction as long as w0. w0: the weights of a small GPT (2 layers, width 64,
bytes of the State of the Union) before and after training, without dropout and with 0.2; L: the loss on fixed text, without
dropout. Three models of each kind with two directions each; the same with filter-normalised directions (each row of a matrix as
long as the row of w0), which make lines of different models comparable. Two random directions of p weights should be
orthogonal: a cosine of about 1 / sqrt(p).

Source: slide "loss surface" of the lecture; Li, Xu, Taylor, Studer, Goldstein 2018 (arXiv 1712.09913).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies import surfaces
from studies.common import BLACK, BLUE, GREY, ORANGE, axes, batches, of_run, rounded, say, tiny_gpt, tokens, train

MINUTES = 2.0
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
    steps, models, at = (60, 1, torch.linspace(-1, 1, 11)) if quick else (500, 3, torch.linspace(-1, 1, 41))
    loss, found = surfaces.text_loss(text, 64, 8 if quick else 32), {name: [] for name in RUNS}
    for number in range(seed, seed + models):
        for dropout in (0.0, 0.2):
            gpt = tiny_gpt(seed=number, dropout=dropout)
            for when in ("start", "end"):
                if when == "end":
                    train(gpt, "adamw:lr=3e-3", batches(text, 64, 16, number), steps)
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


def lowest(figures: dict[str, Any], when: str) -> tuple[int, int, float]:
    """Of the lines whose name begins with `when`: those with their minimum at a = 0, all, and the largest rise over the line
    as a multiple of the loss at 0."""
    found = [line for name, kinds in figures["lines"].items() if name.startswith(when) for part in kinds.values() for line in part]
    middle = len(figures["at"]) // 2
    rises = [(max(x for x in line if x is not None) - line[middle]) / line[middle] for line in found]
    return sum(line[middle] <= min(x for x in line if x is not None) for line in found), len(found), max(rises)


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    basins, ends, rise = lowest(figures, "end")
    _, starts, flat = lowest(figures, "start") if len(figures["lines"]) > 1 else (0, 0, 0.0)
    typical = figures["parameters"] ** -0.5
    words = f"{basins} of {ends} lines through trained weights have their minimum at 0 and rise up to {rise:.1f} times the loss"
    words += f"; the {starts} through weights at the start rise by at most {flat:.1%}" if starts else ""
    words += f"; cosine of two random directions {figures['cosine']:.4f}, 1 / sqrt(p) = {typical:.4f}"
    return basins == ends and abs(figures["cosine"]) < 4 * typical and flat < rise / 10, words


def draw(figures: dict[str, Any]):
    figure, parts = axes(2, width=14, sharey=True)
    titles = {"random": "random direction", "filters": "filter-normalised direction"}
    for axis, kind in zip(parts, KINDS, strict=True):
        for name, kinds in figures["lines"].items():
            colour = RUNS.get(name, BLUE)
            for line in kinds[kind]:
                axis.plot(figures["at"], line, color=colour, linewidth=1.2)
            if "dropout 0.2" not in name or "end" in name:
                say(axis, 1, kinds[kind][0][-1], name.replace(", dropout 0.2", ",\ndropout 0.2"), colour)
        axis.set(title=titles[kind], xlabel="a", xlim=(-1, 1.35), ylabel="loss at w + a direction")
        axis.axvline(0, color=BLACK, linewidth=0.8, linestyle=":")
    return figure
