"""Adam does not converge on some simple convex problems: it ends at the worst point, while AMSGrad and SGD go to the best.

f_t(x) = 1010 x with probability 0.01, else -10 x, on [-1, 1]: f(x) = E f_t(x) = 0.2 x, the minimum is at -1. Adam divides the
rare large gradient by the root of an average that it has itself just raised, and the many small ones by the root of one
that has forgotten it. AMSGrad divides by the largest average so far. The mean of the gradient is 0.2, its standard deviation
101: finding the sign takes any method (101 / 0.2)^2 = 255,000 steps.

Source: Reddi, Kale and Kumar 2018 (arXiv 1904.09237), section 3 and figure 1.
"""

import torch
from torch import nn

import optimizers
from engine import schedules
from studies import common

MINUTES = 1.9
SLIDE = 4
METHODS = {
    "Adam": "adam:lr=0.015,beta2=0.99",
    "AMSGrad": "adam:lr=0.015,beta2=0.99,amsgrad=true",
    "SGD": "sgd:lr=6e-5,momentum=0",
}


class Points(nn.Module):
    """One x a seed, all started at 0; the methods here treat each number by itself."""

    def __init__(self, seeds: int):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(seeds))


def path(spec: str, steps: int, seeds: int, seed: int) -> torch.Tensor:
    """x [201 times, seeds], projected onto [-1, 1] after each step; the rate falls in a line to 0, in 200 stairs."""
    points, dice, part = Points(seeds), torch.Generator().manual_seed(seed), steps // 200
    optimizer, rate, found = optimizers.build(spec, points, steps=steps), schedules.build("linear", steps), [torch.zeros(seeds)]
    for stair in common.progress(range(200), spec):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(stair * part)
        for points.x.grad in torch.where(torch.rand(part, seeds, generator=dice) < 0.01, 1010.0, -10.0):
            optimizer.step()
            points.x.data.clamp_(-1, 1)
        found.append(points.x.detach().clone())
    return torch.stack(found)


def run(seed: int = 0, quick: bool = False) -> dict:
    steps, seeds = (4000, 128) if quick else (240_000, 64)
    paths = {name: path(spec, steps, seeds, seed) for name, spec in METHODS.items()}
    return common.rounded(
        {
            "steps": steps, "seeds": seeds, "specs": METHODS, "ends": {name: x[-1] for name, x in paths.items()},
            "mean": {name: x.mean(1) for name, x in paths.items()}, "some": {name: x[:, :3].T for name, x in paths.items()},
        }, 4,
    )  # fmt: skip


def verdict(figures: dict) -> tuple[bool, str]:
    ends = {name: common.mean_and_interval(x) for name, x in figures["ends"].items()}
    words = ", ".join(f"{name} {mean:.3f} ({low:.3f} to {high:.3f})" for name, (mean, low, high) in ends.items())
    right = [name for name in ("AMSGrad", "SGD") if ends[name][2] < 0]
    there = "" if all(ends[name][0] < -0.8 for name in right) else ", on the right side of the start at 0, but not at -1 yet"
    return ends["Adam"][1] > 0.9 and len(right) == 2, (
        f"mean x after {figures['steps']:,} steps, the minimum being at -1: {words}{there}; {figures['seeds']} seeds"
    )


def draw(figures: dict):
    figure, axis = common.axes()
    axis.set(title="Adam walks to the worst point", xlabel="step", ylabel="x", ylim=(-1.3, 1.1), yticks=(-1, 0, 1))
    colours, times = (common.RED, common.BLUE, common.GREEN), torch.linspace(0, figures["steps"], 201)
    for (name, x), colour in zip(figures["mean"].items(), colours):
        for one in figures["some"][name]:
            axis.plot(times, one, color=colour, linewidth=0.6, alpha=0.5)
        axis.plot(times, x, color=colour)
    named = zip(figures["mean"].items(), colours)
    common.ends(axis, [(figures["steps"], x[-1], name, colour) for (name, x), colour in named])
    axis.axhline(-1, color=common.GREY, linestyle=":")
    axis.text(0, -1.08, "minimum", color=common.GREY, va="top")
    return figure
