"""At one learning rate, 0.003, the methods take different paths through Rosenbrock's valley, and some end far from its minimum.

f(x, y) = (1 - x)^2 + 10 (y - x^2)^2 from (-1.5, 2) to its minimum at (1, 1); each gradient has noise N(0, 1) added. 3,000
steps; 16 seeds are 16 points in one model. The factor is 10: with the usual 100, L is 1,002 at the minimum, SGD's 0.003 is
above 2 / L, and it diverges. Each point is a matrix of one row, whose orthogonal form (Muon) is its direction.

Source: slide "Many methods"; Rosenbrock 1960.
"""

import torch
from torch import Tensor, nn

import optimizers
from engine import schedules
from studies import common

MINUTES = 1.0
SLIDE = 3
RATE, FACTOR, NOISE, START, GOAL = 0.003, 10.0, 1.0, (-1.5, 2.0), (1.0, 1.0)
METHODS = {
    "SGD": "sgd:momentum=0", "momentum": "sgd:momentum=0.9,nesterov=false", "Nesterov": "sgd:momentum=0.9",
    "AdaGrad": "adagrad", "RMSProp": "rmsprop", "Adadelta": "adadelta", "Adam": "adam", "AdamW": "adamw", "Lion": "lion",
    "Muon": "muon", "SOAP": "soap", "Schedule-Free": "schedule_free_adamw",
}  # fmt: skip
COLOURS = (common.BLUE, common.ORANGE, common.GREEN, common.RED, common.PURPLE, common.SKY)


class Points(nn.Module):
    """Points [[x, y]], each a matrix of its own to the methods for matrices."""

    def __init__(self, start: tuple[float, float], seeds: int):
        super().__init__()
        self.points = nn.ParameterList(torch.tensor([start]) for _ in range(seeds))


def valley(w: Tensor, factor: float = FACTOR) -> Tensor:
    """(1 - x)^2 + factor (y - x^2)^2 of points w [..., 2]."""
    x, y = w.unbind(-1)
    return (1 - x) ** 2 + factor * (y - x * x) ** 2


def path(
    spec: str, steps: int, seeds: int = 1, seed: int = 0, *, start=START, factor=FACTOR, noise=NOISE, schedule="constant"
) -> Tensor:
    """The points visited, at evaluation weights: [steps + 1, seeds, 2]."""
    model, dice = Points(start, seeds), torch.Generator().manual_seed(seed)
    optimizer = optimizers.build(spec, model, steps=steps)
    rate = schedules.build("constant" if optimizers.find(spec).own_schedule else schedule, steps)
    found = [torch.tensor([start] * seeds)]
    for step in common.progress(range(steps), spec):
        optimizer.train()
        w = torch.cat([p.detach() for p in model.points])
        x, y = w.unbind(-1)
        inner = y - x * x
        gradient = torch.stack([-2 * (1 - x) - 4 * factor * x * inner, 2 * factor * inner], -1)
        gradient = gradient + noise * torch.randn(gradient.shape, generator=dice)
        for point, of in zip(model.points, gradient):
            point.grad = of[None]
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(step)
        optimizer.step()
        optimizer.eval()
        found.append(torch.cat([p.detach() for p in model.points]).clone())
    return torch.stack(found)


def without_decay(spec: str, rate: float) -> str:
    """The SPEC with this rate and without weight decay, which would move the minimum."""
    name, _, keys = spec.partition(":")
    decays = "weight_decay" in optimizers.OPTIMIZERS[name].__dataclass_fields__
    return f"{name}:{','.join(filter(None, [keys, f'lr={rate}', 'weight_decay=0' * decays]))}"


def run(seed: int = 0, quick: bool = False) -> dict:
    steps, seeds = (300, 4) if quick else (3000, 16)
    paths = {name: path(without_decay(spec, RATE), steps, seeds, seed) for name, spec in METHODS.items()}
    shown = (torch.linspace(0, 1, 181) ** 2 * steps).long().unique()  # dense at first, where most moves
    away = {name: (of[-steps // 10 :] - torch.tensor(GOAL)).norm(dim=-1).mean(0) for name, of in paths.items()}
    return common.rounded(
        {
            "steps": steps, "seeds": seeds, "rate": RATE, "distances": away,
            "paths": {name: of[shown, 0] for name, of in paths.items()},
        }, 4,
    )  # fmt: skip


def verdict(figures: dict) -> tuple[bool, str]:
    ends = {name: common.mean_and_interval(of) for name, of in figures["distances"].items()}
    order = sorted(ends, key=lambda name: ends[name][0])
    words = ", ".join(f"{name} {ends[name][0]:.2g} ({ends[name][1]:.2g} to {ends[name][2]:.2g})" for name in order)
    holds = ends[order[-1]][1] > 10 * ends[order[0]][2]
    return holds, (
        f"mean distance to the minimum over the last tenth of {figures['steps']:,} steps at learning rate {RATE:g}: {words};"
        f" {figures['seeds']} seeds"
    )


def scene(axis, figures: dict, names: list[str], until: int) -> None:
    """The valley, and the paths up to the recorded point `until`."""
    x, y = torch.meshgrid(torch.linspace(-2.1, 2.1, 200), torch.linspace(-1, 3.2, 200), indexing="xy")
    axis.contour(x, y, valley(torch.stack([x, y], -1)), levels=[4.0**k for k in range(-2, 6)], colors="0.85", linewidths=1)
    for name, colour in zip(names, COLOURS):
        of = torch.tensor(figures["paths"][name])[: until + 1]
        axis.plot(of[:, 0], of[:, 1], color=colour, linewidth=1.8)
        axis.plot(*of[-1], "o", color=colour, markersize=8)
    axis.plot(*GOAL, "*", color=common.BLACK, markersize=18)
    axis.set(xlim=(-2.1, 2.1), ylim=(-1, 3.2), xticks=[], yticks=[])


def draw(figures: dict):
    names = list(METHODS)
    figure, panels = common.axes(3, width=17, height=6.2, width_ratios=(1, 1, 0.8))
    for axis, some in zip(panels, (names[:6], names[6:])):
        scene(axis, figures, some, len(figures["paths"]["SGD"]))
        for i, (name, colour) in enumerate(zip(some, COLOURS)):
            axis.text(0.98, 0.5 - 0.075 * i, name, color=colour, transform=axis.transAxes, ha="right")
    panels[0].set_title(f"{figures['steps']:,} noisy steps, learning rate {RATE:g}")
    ends = {name: common.mean_and_interval(of) for name, of in figures["distances"].items()}
    order = sorted(ends, key=lambda name: -ends[name][0])
    for row, name in enumerate(order):
        colour, (mean, low, high) = COLOURS[names.index(name) % 6], ends[name]
        panels[2].plot([low, high], [row, row], color=colour, linewidth=5, solid_capstyle="butt")
        panels[2].plot(mean, row, "o", color=colour, markersize=9)
    panels[2].set_yticks(range(len(order)), order)
    panels[2].set(title="Distance to the minimum", xscale="log")
    panels[2].grid(axis="x", alpha=0.4)
    return figure


def animate(figures: dict, path) -> None:
    """The paths of the first seed as they grow: 60 frames."""
    names = list(METHODS)

    def frames():
        count = len(figures["paths"]["SGD"])
        for i in range(60):
            figure, panels = common.axes(2, width=9, height=4.4)
            for axis, some in zip(panels, (names[:6], names[6:])):
                scene(axis, figures, some, round(i / 59 * (count - 1)))
                for j, (name, colour) in enumerate(zip(some, COLOURS)):
                    axis.text(0.98, 0.5 - 0.085 * j, name, color=colour, transform=axis.transAxes, ha="right", fontsize=12)
            yield figure

    common.gif(path, frames(), 100)
