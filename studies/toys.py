"""The optimizers on two problems that can be understood: Rosenbrock's valley, and strongly convex logistic regression.

    python -m studies.toys --out toys.png                 draws the pictures, about a minute (needs matplotlib)
    python -m studies.toys --out toys.png adamw muon      of these methods only

First: paths through Rosenbrock's valley from (-1.2, 1). Second: logistic regression (200 examples, 10 features, regulariser
mu = 1) with one example a step, by SGD: a constant step stalls at a noise floor proportional to it; a step that falls as
1/t goes on. The others, by family: the same on full gradients, the smallest f(w) - min f so far.

Both problems are a single 1 x n matrix, so that the methods for matrices own it too.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import optimizers
from engine.command import Parser, command
from engine.spec import UsageError, nearest
from lab.plots import pyplot

EXAMPLES, FEATURES, MU = 200, 10, 1.0
STEPS = 400
# The learning rates for logistic regression (`toy_lr` of each method) fall in a line to 0 over STEPS (Schedule-Free: constant).
# TOLERANCE: the f(w) - min f that all must reach.
KEYS = {"schedule_free_adamw": "warmup=10", "schedule_free_sgd": "warmup=10", "schedule_free_prodigy": "warmup=10"}
TOLERANCE = 1e-6


def data() -> tuple[Tensor, Tensor]:
    """X [200, 10] and labels +-1 [200], drawn from a logistic model."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(EXAMPLES, FEATURES, generator=generator)
    chance = torch.sigmoid(X @ torch.linspace(-2, 2, FEATURES))
    return X, (torch.rand(EXAMPLES, generator=generator) < chance).float() * 2 - 1


def logistic(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """mean log(1 + exp(-y x.w)) + mu/2 |w|^2; w [1, 10]."""
    return nn.functional.softplus(-y * (X @ w[0])).mean() + MU / 2 * w.square().sum()


def minimum() -> tuple[Tensor, float]:
    """The exact minimiser [1, 10] and value, by Newton's method in float64."""
    X, y = (x.double() for x in data())
    w = torch.zeros(1, FEATURES, dtype=torch.float64)
    for _ in range(30):
        margin = torch.sigmoid(-y * (X @ w[0]))
        gradient = -(X * (y * margin).unsqueeze(1)).mean(0) + MU * w[0]
        hessian = (X.T * (margin * (1 - margin))) @ X / EXAMPLES + MU * torch.eye(FEATURES, dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, gradient)
    return w, logistic(w, X, y).item()


def rosenbrock(w: Tensor) -> Tensor:
    """(1 - x)^2 + 100 (y - x^2)^2; w = [[x, y]]."""
    x, y = w[0]
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


class Point(nn.Module):
    """A point that an optimizer can own: `model.roles` calls a 2-D weight of a name it does not know a matrix."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.w = nn.Parameter(start.clone())


def spec_of(name: str, rate: float) -> str:
    """Without weight decay: the problems have their minimum where they have it."""
    fields = optimizers.OPTIMIZERS[name].__dataclass_fields__
    keys = [f"lr={rate}", *filter(None, [KEYS.get(name)]), *(["weight_decay=0"] if "weight_decay" in fields else [])]
    return f"{name}:{','.join(keys)}"


def descend(
    spec: str, start: Tensor, loss: Callable[[Tensor, int], Tensor], steps: int, schedule: Callable[[int], float]
) -> list[Tensor]:
    """The points visited, at evaluation weights; `schedule` multiplies the learning rate."""
    point = Point(start)
    optimizer, constant = optimizers.build(spec, point, steps=steps), optimizers.find(spec).own_schedule
    path = [start.clone()]
    for step in range(steps):
        optimizer.train()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 if constant else schedule(step))
        optimizer.zero_grad()
        loss(point.w, step).backward()
        optimizer.step()
        optimizer.eval()
        path.append(point.w.detach().clone())
    return path


def linear(steps: int) -> Callable[[int], float]:
    return lambda step: 1 - step / steps


def logistic_gaps(name: str) -> list[float]:
    """f(w) - min f after each step on full gradients."""
    X, y = data()
    spec = spec_of(name, optimizers.OPTIMIZERS[name].toy_lr)
    return gaps(descend(spec, torch.zeros(1, FEATURES), lambda w, _: logistic(w, X, y), STEPS, linear(STEPS)))


def gaps(path: list[Tensor]) -> list[float]:
    """f(w) - min f in float64 of every point [1, 10]."""
    (X, y), w = data(), torch.cat(path).double()
    f = nn.functional.softplus(-y * (w @ X.double().T)).mean(1) + MU / 2 * w.square().sum(1)
    return (f - minimum()[1]).tolist()


def noise_gaps(rate: float, falling: bool, seed: int, steps: int = 3000) -> list[float]:
    """f(w) - min f of SGD with one example a step: constant, or 1 / (1 + mu rate t / 2) of the rate at step t."""
    X, y = data()
    order = torch.randint(EXAMPLES, (steps,), generator=torch.Generator().manual_seed(seed))
    one = lambda w, step: logistic(w, X[order[step]].unsqueeze(0), y[order[step]].unsqueeze(0))  # noqa: E731
    schedule = (lambda step: 1 / (1 + MU * rate * step / 2)) if falling else (lambda step: 1.0)
    return gaps(descend(f"sgd:lr={rate},momentum=0", torch.zeros(1, FEATURES), one, steps, schedule))


VALLEY = {"sgd": 1e-3, "adamw": 0.05, "lion": 0.03, "muon": 0.03, "soap": 0.05, "schedule_free_adamw": 0.2}


def valley_path(name: str, steps: int = 1000) -> list[Tensor]:
    return descend(spec_of(name, VALLEY[name]), torch.tensor([[-1.2, 1.0]]), lambda w, _: rosenbrock(w), steps, linear(steps))


def draw(names: list[str], out: str) -> None:
    figure, axes = pyplot().subplots(2, 3, figsize=(18, 10), constrained_layout=True)
    left, right, *families = axes.flat
    x, y = torch.meshgrid(torch.linspace(-1.6, 1.6, 200), torch.linspace(-0.6, 1.9, 200), indexing="xy")
    left.contour(x, y, (1 - x) ** 2 + 100 * (y - x * x) ** 2, levels=[2.0**k for k in range(-2, 11)], colors="0.8")
    for name in filter(VALLEY.get, names):
        path = torch.cat(valley_path(name))
        left.plot(path[:, 0], path[:, 1], label=f"{name}, ends at {rosenbrock(path[-1:]):.1e}", linewidth=1.2)
    left.plot(1, 1, "k*", markersize=12)
    left.set(title="Rosenbrock, 1,000 steps from (-1.2, 1)", xlabel="x", ylabel="y", xlim=(-1.6, 1.6), ylim=(-0.6, 1.9))
    left.legend(fontsize=8, loc="upper center")
    every = list(optimizers.OPTIMIZERS)
    cuts = [0, every.index("adam"), every.index("schedule_free_adamw"), every.index("muon"), len(every)]
    titles = ("classics", "Adam and its relatives", "no schedule needed", "matrix methods")
    for axis, title, first, end in zip(families, titles, cuts[:-1], cuts[1:], strict=True):
        for i, name in enumerate(every[first:end]):
            if name in names:
                best = torch.tensor(logistic_gaps(name)).clamp(min=1e-10).cummin(0).values
                axis.semilogy(best, label=name, color=f"C{i % 10}", linestyle="-" if i < 10 else "--")
        axis.set(
            title=f"logistic regression, full gradients: {title}", xlabel="step", ylabel="best f(w) - min f", ylim=(5e-11, 0.2)
        )
        if axis.lines:
            axis.legend(fontsize=7, loc="upper right", ncols=2)
    for i, (rate, falling) in enumerate(((0.1, False), (0.01, False), (0.1, True))):
        gaps = torch.tensor([noise_gaps(rate, falling, seed) for seed in range(5)]).mean(0).clamp(min=1e-10)
        label = f"{rate:g} / (1 + mu {rate:g} t / 2)" if falling else f"constant {rate:g}"
        right.semilogy(gaps, label=label, color=f"C{i}", linewidth=1)
    right.set(title="SGD, one example a step, mean of 5 seeds", xlabel="step", ylabel="f(w) - min f")
    right.legend()
    figure.savefig(out, dpi=110)


def main(argv: list[str]) -> str:
    parser = Parser(prog="studies.toys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="optimizers; all if none is given")
    parser.add_argument("--out", default="toys.png", help="picture to write (default: toys.png)")
    chosen = parser.parse_args(argv)
    for name in chosen.names:
        if name not in optimizers.OPTIMIZERS:
            raise UsageError(f"unknown optimizer {name!r}: {nearest(name, optimizers.OPTIMIZERS)}")
    draw(chosen.names or list(optimizers.OPTIMIZERS), chosen.out)
    return f"wrote {chosen.out}"


if __name__ == "__main__":
    sys.exit(command("toys", lambda: main(sys.argv[1:])))
