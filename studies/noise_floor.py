"""With noise in the gradient, SGD with a constant step stalls at a floor, and a falling step converges only as 1/k.

f(x) = mu/2 |x|^2 + 1/m sum_i log(1 + exp(-y_i <a_i, x>)), m = 200, n = 10, mu = 1; two examples a step, 64 seeds. The gap is
f(x_k) - min f. Gradient descent: gap <= (1 - mu/L)^k. SGD with a constant step a: a floor proportional to a. SGD with the step
10 a / (1 + 10 mu a k / 2): gap ~ C / k. Momentum 0.9 changes floor and C, not the slope.

Source: slides 1-10; Bottou, Curtis and Nocedal 2018 (arXiv 1606.04838), theorems 4.6 and 4.7.
"""

import math

import torch
from torch import Tensor, nn

import optimizers
from studies import common

MINUTES = 0.4
SLIDE = 1
EXAMPLES, FEATURES, MU, BATCH, SEEDS, GROUPS = 200, 10, 1.0, 2, 64, 8
STEP = 0.02  # a; small beside 2/L, so that the floor is proportional to it


class Point(nn.Module):
    """Weights [rows, n] that an optimizer of the registry can own: `model.roles` calls a 2-D weight a matrix."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.w = nn.Parameter(start.clone())


def data() -> tuple[Tensor, Tensor]:
    """X [200, 10] and labels +-1 [200], drawn from a logistic model."""
    dice = torch.Generator().manual_seed(0)
    X = torch.randn(EXAMPLES, FEATURES, generator=dice)
    chance = torch.sigmoid(X @ torch.linspace(-2, 2, FEATURES))
    return X.double(), (torch.rand(EXAMPLES, generator=dice) < chance).double() * 2 - 1


def losses(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """f of each row of w [rows, n]: [rows]. Examples: the same for all, X [m, n], y [m]; or each row's own, [rows, m, n]."""
    products = w @ X.T if X.dim() == 2 else torch.einsum("rmn,rn->rm", X, w)
    return nn.functional.softplus(-y * products).mean(-1) + MU / 2 * w.square().sum(-1)


def minimum() -> tuple[Tensor, float]:
    """The exact minimiser [1, 10] and value, by Newton's method."""
    (X, y), w = data(), torch.zeros(1, FEATURES, dtype=torch.float64)
    for _ in range(30):
        margin = torch.sigmoid(-y * (X @ w[0]))
        gradient = -(X * (y * margin).unsqueeze(1)).mean(0) + MU * w[0]
        hessian = (X.T * (margin * (1 - margin))) @ X / EXAMPLES + MU * torch.eye(FEATURES, dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, gradient)
    return w, losses(w, X, y).item()


def gradient_descent(steps: int = 100) -> Tensor:
    """Gaps [steps] with full gradients and the step 0.1."""
    (X, y), best, point, gaps = data(), minimum()[1], Point(torch.zeros(1, FEATURES, dtype=torch.float64)), []

    def loss(point: Point) -> Tensor:
        gaps.append(losses(point.w, X, y).sum())
        return gaps[-1]

    common.train(point, "sgd:lr=0.1,momentum=0", lambda k: (), steps, schedule="constant", loss=loss)
    return torch.stack(gaps).detach() - best


def sgd(kinds: list[str], momentum: float, steps: int, seeds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Times k [t] and gaps [t, kinds, seeds]. All kinds and seeds are rows of one weight: a step a on f is a step 1 on a f, so
    that each row has the step that its loss is multiplied by: a, a/4, or 10 a / (1 + 10 mu a k / 2) for 1/k."""
    (X, y), best, dice = data(), minimum()[1], torch.Generator().manual_seed(seed)
    point = Point(torch.zeros(len(kinds) * seeds, FEATURES, dtype=torch.float64))
    optimizer = optimizers.build(f"sgd:lr=1,momentum={momentum},nesterov=false", point)
    times, gaps = [], []
    for k in common.progress(range(steps + 1), "noise_floor"):
        if k % 10 == 0 or k < 100:
            times.append(k)
            gaps.append(losses(point.w.detach(), X, y) - best)
        rate = {"a": STEP, "a/4": STEP / 4, "1/k": 10 * STEP / (1 + 10 * STEP * MU * k / 2)}
        rows = torch.randint(EXAMPLES, (len(point.w), BATCH), generator=dice)
        scale = torch.tensor([rate[kind] for kind in kinds], dtype=torch.float64).repeat_interleave(seeds)
        optimizer.zero_grad()
        (scale * losses(point.w, X[rows], y[rows])).sum().backward()
        optimizer.step()
    return torch.tensor(times), torch.stack(gaps).unflatten(1, (len(kinds), seeds))


def slopes(k: Tensor, gaps: Tensor) -> list[float]:
    """Of log gap against log k over the last factor of 8, for each group of seeds: gaps [t, groups]."""
    chosen = torch.searchsorted(k, torch.logspace(math.log10(int(k[-1]) / 8), math.log10(int(k[-1])), 40).long())
    x = k[chosen].double().log()[:, None]
    x = x - x.mean()
    return ((x * gaps[chosen].log()).sum(0) / x.square().sum()).tolist()


def run(seed: int = 0, quick: bool = False) -> dict:
    steps, seeds = (1500, 64) if quick else (10_000, SEEDS)
    k, plain = sgd(["a", "a/4", "1/k"], 0.0, steps, seeds, seed)
    _, moving = sgd(["a", "1/k"], 0.9, steps, seeds, seed)
    gaps = torch.cat([plain, moving], 1).unflatten(2, (GROUPS, -1)).mean(-1)  # [t, kinds, groups of seeds]
    floors = gaps[k >= steps // 2].mean(0)
    names = ["SGD, step a", "SGD, step a/4", "SGD, step ~ 1/k", "momentum, step a", "momentum, step ~ 1/k"]
    shown = torch.searchsorted(k, torch.logspace(0, math.log10(steps), 150).long()).unique()
    full = gradient_descent()
    line = full[full > 1e-12].log10()  # below is rounding
    line = torch.stack([torch.arange(len(line)), line])
    return common.rounded(
        {
            "steps": steps, "seeds": seeds, "step": STEP, "GD": full.clamp(min=1e-15),
            "GD straightness": torch.corrcoef(line)[0, 1].square(),
            "GD digits a step": (line[1, 0] - line[1, -1]) / line[0, -1],
            "k": k[shown], "gaps": dict(zip(names, gaps.mean(2).T[:, shown])), "floor ratios": floors[0] / floors[1],
            "slopes": slopes(k, gaps[:, 2]), "slopes with momentum": slopes(k, gaps[:, 4]),
        }
    )  # fmt: skip


def verdict(figures: dict) -> tuple[bool, str]:
    ratio, plain, moving = (common.mean_and_interval(figures[n]) for n in ("floor ratios", "slopes", "slopes with momentum"))
    straight = figures["GD straightness"]
    words = (
        f"a step four times as long has a floor {ratio[0]:.2f} times as high ({ratio[1]:.2f} to {ratio[2]:.2f}); with the step"
        f" ~ 1/k the slope is {plain[0]:.2f} ({plain[1]:.2f} to {plain[2]:.2f}), with momentum {moving[0]:.2f} ({moving[1]:.2f}"
        f" to {moving[2]:.2f}); gradient descent gains {figures['GD digits a step']:.2f} digits in every step (R^2"
        f" {straight:.3f}); {figures['seeds']} seeds"
    )
    return abs(ratio[0] - 4) < 0.4 and abs(plain[0] + 1) < 0.15 and abs(moving[0] + 1) < 0.15 and straight > 0.99, words


def draw(figures: dict):
    figure, (left, right) = common.axes(2, width=15, height=6)
    gaps, k = figures["gaps"], figures["k"]
    left.semilogy(figures["GD"], color=common.BLACK)
    left.set(title="Without noise: a straight line", xlabel="step k of gradient descent", ylabel="f(x) - min f", xlim=(0, 80))
    colours = (common.RED, common.ORANGE, common.BLUE, common.PURPLE, common.SKY)
    for (name, gap), colour in zip(gaps.items(), colours):
        right.loglog(k, gap, color=colour, linestyle="--" if "momentum" in name else "-")
    start = gaps["SGD, step ~ 1/k"][-1] / 3
    right.loglog([k[-1] / 8, k[-1]], [8 * start, start], color=common.GREY, linestyle=":")
    labels = [(k[-1], gap[-1], name, colour) for (name, gap), colour in zip(gaps.items(), colours)]
    common.ends(right, [*labels, (k[-1], start, "slope -1", common.GREY)])
    right.set(title="With noise: a floor, or 1/k", xlabel="step k", ylabel="f(x) - min f")
    return figure
