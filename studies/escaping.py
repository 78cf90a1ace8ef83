"""Gradient descent falls into the nearest local minimum; SGD jumps out of it.

One dimension, f(x) = x^2 / 6 + (1 - cos 2 pi x) / 4: a well at every whole number, the global minimum at 0. f is the mean of
ten functions f_i(x) = f(x) + c_i x whose c_i sum to 0. GD steps along f', SGD along f_i' with i drawn anew for each
step and start. Both begin at the same 200 points between -4 and 4, with the same step, which falls linearly to 0. We count
the starts that end in the basin of the global minimum, in five seeds.

Source: slide "fun stories" of the lecture; why noise leaves small wells: Kleinberg, Li, Yuan 2018 (arXiv 1802.06175).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studies.common import BLUE, GREY, ORANGE, axes, gif, mean_and_interval, rounded, say, train

MINUTES = 0.1
SLIDE = 11
SEEDS, STARTS, WIDE, LR = 5, 200, 4.0, 0.05
SLOPES = 5.0 * torch.linspace(-1, 1, 10)  # c_i, beside slopes of f of at most pi / 2 + 4 / 3


def f(x: Tensor) -> Tensor:
    return x * x / 6 + (1 - torch.cos(2 * torch.pi * x)) / 4


def well(x: Tensor) -> Tensor:
    """Number of the well, its bottom near a whole number. On the ridges x / 3 + pi / 2 sin 2 pi x = 0, so that x is
    arcsin(2 x / 3 pi) / 2 pi above k + 1/2."""
    return (x - torch.asin((2 * x / (3 * torch.pi)).clamp(-1, 1)) / (2 * torch.pi)).round()


class Points(nn.Module):
    """All starts of all seeds, [1, n]: they do not see each other."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = nn.Parameter(x.clone()[None])


def paths(starts: Tensor, slopes: Tensor, steps: int, seed: int) -> Tensor:
    """Where each start is after each step: [steps + 1, n]."""
    points, path, dice = Points(starts), [starts], torch.Generator().manual_seed(seed)

    def draws(step: int) -> tuple[Tensor]:
        return (slopes[torch.randint(len(slopes), starts.shape, generator=dice)],)

    def loss(model: nn.Module, c: Tensor) -> Tensor:
        return (f(model.x) + c * model.x).sum()  # a sum: each point has its own gradient

    train(points, f"sgd:lr={LR},momentum=0", draws, steps, loss=loss, after=lambda _: path.append(points.x.detach()[0].clone()))
    return torch.stack(path)


def run(seed: int = 0, quick: bool = False) -> dict[str, Any]:
    steps, dice = 300 if quick else 2000, torch.Generator().manual_seed(seed)
    starts = WIDE * (2 * torch.rand(SEEDS * STARTS, generator=dice) - 1)
    gd, sgd = (paths(starts, slopes, steps, seed) for slopes in (torch.zeros(1), SLOPES))
    home = {name: (well(x) == 0).float().view(SEEDS, STARTS).mean(1) for name, x in
            (("start", starts), ("gd", gd[-1]), ("sgd", sgd[-1]))}  # fmt: skip
    seen = torch.linspace(0, steps, 61).long()
    return rounded(
        {"share": home, "moved": (well(gd[-1]) != well(starts)).float().mean(), "steps": steps}
        | {"gd": gd[seen, :60], "sgd": sgd[seen, :60], "wells": {"gd": shares(gd[-1]), "sgd": shares(sgd[-1])}}
    )


def shares(x: Tensor) -> dict[int, float]:
    """Number of the well -> part of the points in it."""
    wells, counts = well(x).unique(return_counts=True)
    return {int(k): count / len(x) for k, count in zip(wells, counts.tolist(), strict=True)}


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    gd, sgd = (mean_and_interval(figures["share"][name]) for name in ("gd", "sgd"))
    words = f"{sgd[0]:.0%} of the starts reach the global basin by SGD (95 % interval {sgd[1]:.0%} to {sgd[2]:.0%}), "
    words += f"{gd[0]:.0%} by GD ({gd[1]:.0%} to {gd[2]:.0%}), which leaves its first well in {figures['moved']:.1%} of cases; "
    return sgd[1] > gd[2] and figures["moved"] < 0.005, words + f"{SEEDS} seeds of {STARTS} starts"


def scene(axis, x: Tensor, colour: str, title: str) -> None:
    """The function, and points on it."""
    line = torch.linspace(-WIDE - 0.5, WIDE + 0.5, 600)
    axis.plot(line, f(line), color=GREY, zorder=0)
    axis.scatter(x, f(x), s=70, color=colour, alpha=0.6, linewidth=0)
    axis.set(xlim=(-WIDE - 0.5, WIDE + 0.5), ylim=(-0.5, 3.9), yticks=[], ylabel="f(x)", title=title)


def draw(figures: dict[str, Any]):
    figure, parts = axes(2, width=13, height=5)
    for axis, name, colour, words in zip(parts, ("gd", "sgd"), (BLUE, ORANGE), ("GD stays", "SGD jumps out"), strict=True):
        wells = {int(k): share for k, share in figures["wells"][name].items()}
        bottoms = torch.tensor([k / (1 + 1 / (3 * torch.pi**2)) for k in wells])
        scene(axis, bottoms, colour, f"{words}: {wells[0]:.0%} end in the global basin")
        axis.set_xlabel("x at the end, with the share of 1,000 starts")
        for x, share in zip(bottoms, wells.values(), strict=True):
            say(axis, float(x), float(f(x)), f"{share:.0%}" if share > 0.01 else "< 1%", colour, xytext=(0, -18), ha="center")
    return figure


def animate(figures: dict[str, Any], path: Path) -> None:
    def frames() -> Iterator[Any]:
        for i in range(0, 61, 2):
            figure, parts = axes(2, width=9, height=3.4)
            step = figures["steps"] * i // 60
            for axis, name, colour in zip(parts, ("gd", "sgd"), (BLUE, ORANGE), strict=True):
                scene(axis, torch.tensor(figures[name][i]), colour, f"{name.upper()}, step {step}")
            yield figure
            figure.clear()

    gif(path, frames(), milliseconds=150)
