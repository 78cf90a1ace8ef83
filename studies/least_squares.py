"""SGD with a constant step never settles on an inconsistent least-squares problem, whatever the step.

f(x) = 1/m sum_i (<a_i, x> - b_i)^2 / 2 with |a_i| = 1, m = 40 equations, n = 5 unknowns; one equation a step. In a consistent
system all gradients are 0 at the solution: the distance shrinks by a constant factor a step. In an inconsistent one
(b + noise of 0.1) they are not: x wanders, and further with a longer step. With |a_i| = 1 each step multiplies the squared
distance to a consistent equation by 1 + (s^2 - 2 s) cos^2: it grows for s > 2 / L = 2, in every step.

Source: slide "SGD diverges for LLS"; Bottou, Curtis and Nocedal 2018 (arXiv 1606.04838); Strohmer and Vershynin 2009.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

import optimizers
from studies import common

MINUTES = 0.1
SLIDE = 2
EQUATIONS, UNKNOWNS, NOISE = 40, 5, 0.1
SIZES = (0.1, 0.5, 1.0, 1.9, 2.1)  # of the step, in 1 / L


class Points(nn.Module):
    """Unknowns [steps x seeds, n] that an optimizer of the registry can own."""

    def __init__(self, count: int):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(count, UNKNOWNS, dtype=torch.float64))


def system(noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """A [m, n] with rows of norm 1, b [m], and the least-squares solution [n]."""
    dice = torch.Generator().manual_seed(0)
    A = nn.functional.normalize(torch.randn(EQUATIONS, UNKNOWNS, generator=dice, dtype=torch.float64))
    b = A @ torch.randn(UNKNOWNS, generator=dice, dtype=torch.float64)
    b = b + noise * torch.randn(EQUATIONS, generator=dice, dtype=torch.float64)
    return A, b, torch.linalg.lstsq(A, b[:, None]).solution[:, 0]


def distances(noise: float, steps: int, seeds: int, seed: int) -> Tensor:
    """|x_k - x*| [steps, sizes, seeds] of SGD. Row r of the unknowns has the step that its loss is multiplied by."""
    A, b, solution = system(noise)
    points, dice = Points(len(SIZES) * seeds), torch.Generator().manual_seed(seed)
    sizes, found = torch.tensor(SIZES, dtype=torch.float64).repeat_interleave(seeds), []
    optimizer = optimizers.build("sgd:lr=1,momentum=0", points)
    for _ in common.progress(range(steps), "least_squares"):
        found.append((points.x.detach() - solution).norm(dim=1))
        rows = torch.randint(EQUATIONS, (len(points.x),), generator=dice)
        optimizer.zero_grad()
        (sizes * ((A[rows] * points.x).sum(1) - b[rows]).square() / 2).sum().backward()
        optimizer.step()
    return torch.stack(found).unflatten(1, (len(SIZES), seeds))


def run(seed: int = 0, quick: bool = False) -> dict:
    steps, seeds = (1500, 16) if quick else (5000, 32)
    consistent, inconsistent = (distances(noise, steps, seeds, seed) for noise in (0.0, NOISE))
    shown = torch.linspace(0, steps - 1, 150).long()
    curve = {"consistent": consistent, "inconsistent": inconsistent}
    return common.rounded(
        {
            "steps": steps, "seeds": seeds, "sizes": SIZES, "k": shown,
            "curves": {name: of[shown].log().mean(2).exp().T for name, of in curve.items()},  # geometric means of seeds
            "ends": consistent[-1], "floors": inconsistent[steps // 2 :].square().mean(0).sqrt(),
            "closest": inconsistent[steps // 2 :].amin((0, 2)),
        }
    )  # fmt: skip


def verdict(figures: dict) -> tuple[bool, str]:
    *stable, divergent = range(len(SIZES))
    ends = [max(figures["ends"][i]) for i in stable]
    floors = [common.mean_and_interval(figures["floors"][i]) for i in stable]
    grown = min(figures["ends"][divergent])
    settled = figures["steps"] < 5000 or max(ends) < 1e-10
    rising = all(below[2] < above[1] for below, above in pairwise(floors))
    words = ", ".join(f"{mean:.2g} ({low:.2g} to {high:.2g}) at {SIZES[i]:g}/L" for i, (mean, low, high) in enumerate(floors))
    return settled and rising and grown > 10 and floors[0][1] > 0.01, (
        f"inconsistent: the distance to the solution stays at {words}; consistent: it falls below {max(ends):.0e} with each of"
        f" these steps, in {figures['steps']:,}; at {SIZES[-1]:g}/L both diverge; {figures['seeds']} seeds"
    )


def draw(figures: dict):
    figure, panels = common.axes(2, width=14, height=6, sharey=True)
    colours = (common.BLUE, common.GREEN, common.ORANGE, common.PURPLE, common.RED)
    titles = {"consistent": "Consistent: to machine precision", "inconsistent": "Inconsistent: a floor for every step"}
    for axis, (name, curves) in zip(panels, figures["curves"].items()):
        axis.set(title=titles[name], xlabel="step k", ylim=(1e-17, 1e5), yscale="log")
        labels = []
        for size, curve, colour in zip(SIZES, curves, colours):
            inside = [(k, y) for k, y in zip(figures["k"], curve) if y and y < 1e4]
            axis.plot(*zip(*inside), color=colour)
            labels.append((*inside[-1], f"{size:g}/L", colour))
        common.ends(axis, labels)
    panels[0].set_ylabel("distance to the solution")
    return figure
