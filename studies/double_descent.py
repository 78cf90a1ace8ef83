"""Test error falls, rises to the interpolation threshold, and falls again.

Two models that are linear in p parameters, fitted by least squares, with the smallest norm if many fits are perfect:
Legendre polynomials of degree p - 1 through 20 noisy samples of 2 x + cos 25 x on [-1, 1], and p random ReLU features of 100
noisy samples of a linear function in 10 dimensions. Both sweep p from 1 far beyond the number of samples n, in 40 draws of
samples, features and noise; the curve is the median of the test error.
The peak should be at p = n, and the minimum beyond it below the first minimum. In theory the second depends on the noise
(Mei, Montanari 2019, arXiv 1908.05355), so the features are fitted again with five times as much.

Source: Belkin, Hsu, Ma, Mandal 2019 (arXiv 1812.11118); the polynomials: Schaeffer et al. 2023 (arXiv 2303.14151).
"""

from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

from studies.common import BLACK, BLUE, GREEN, GREY, ORANGE, RED, axes, progress, rounded, say

MINUTES = 0.5
SLIDE = 17
SAMPLES, FEATURE_SAMPLES, INPUTS, TEST = 20, 100, 10, 1000
NOISE, MORE_NOISE = 0.1, 0.5
FITS = (4, SAMPLES, 500)  # parameters of the polynomials that are drawn


def target(x: Tensor) -> Tensor:
    return 2 * x + torch.cos(25 * x)


def polynomials(x: Tensor, p: int) -> Tensor:
    """Legendre polynomials of degree 0 to p - 1: [..., p]."""
    return torch.from_numpy(legendre.legvander(x.numpy(), p - 1))


def minimum_norm(features: Tensor, y: Tensor) -> Tensor:
    """Least-squares coefficients of the smallest norm: features [draws, n, p], y [draws, n] -> [draws, p]."""
    return (torch.linalg.pinv(features, rtol=1e-12) @ y[..., None])[..., 0]


def of_polynomials(counts: list[int], draws: int, dice: torch.Generator) -> dict[str, Any]:
    """Test errors [counts, draws], and the fits of the first draw."""
    x = 2 * torch.rand(draws, SAMPLES, generator=dice, dtype=torch.float64) - 1
    y = target(x) + NOISE * torch.randn(x.shape, generator=dice, dtype=torch.float64)
    grid = torch.linspace(-1, 1, 500, dtype=torch.float64)
    train, test = polynomials(x, max(*counts, *FITS)), polynomials(grid, max(*counts, *FITS))
    errors = torch.stack([
        (minimum_norm(train[..., :p], y) @ test[:, :p].T - target(grid)).square().mean(1)
        for p in progress(counts, "polynomials")
    ])  # fmt: skip
    fits = {p: test[:, :p] @ minimum_norm(train[:1, :, :p], y[:1])[0] for p in FITS}
    return {"parameters": counts, "errors": errors, "x": x[0], "y": y[0], "grid": grid, "fits": fits}


def of_features(counts: list[int], draws: int, dice: torch.Generator, noise: float) -> dict[str, Any]:
    """Test errors [counts, draws] of random ReLU features."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    weights, direction = normal(draws, INPUTS, max(counts)), normal(draws, INPUTS, 1) / INPUTS**0.5
    x, far = normal(draws, FEATURE_SAMPLES, INPUTS), normal(draws, TEST, INPUTS)
    y = (x @ direction)[..., 0] + noise * normal(draws, FEATURE_SAMPLES)
    train, test, wanted = (x @ weights).relu(), (far @ weights).relu(), (far @ direction)[..., 0]
    errors = torch.stack([
        ((test[..., :p] @ minimum_norm(train[..., :p], y)[..., None])[..., 0] - wanted).square().mean(1)
        for p in progress(counts, "features")
    ])  # fmt: skip
    return {"parameters": counts, "errors": errors}


def around(n: int, most: int, quick: bool) -> list[int]:
    """Numbers of parameters: from 1 to `most`, each near n."""
    steps = np.geomspace(1, most, 16 if quick else 50).round().astype(int)
    return sorted({*steps.tolist(), *range(n - 3, n + 4)})


def run(seed: int = 0, quick: bool = False) -> dict[str, Any]:
    dice, draws = torch.Generator().manual_seed(seed), 10 if quick else 40
    figures = {
        "polynomials": {"samples": SAMPLES} | of_polynomials(around(SAMPLES, 500, quick), draws, dice),
    }
    for name, noise in (("features", NOISE), ("features with noise", MORE_NOISE)):
        counts = around(FEATURE_SAMPLES, 1000 if quick else 2000, quick)
        figures[name] = {"samples": FEATURE_SAMPLES} | of_features(counts, draws, dice, noise)
    for part in figures.values():
        part |= summary(part["parameters"], part.pop("errors"), part["samples"])
    return rounded(figures)


def summary(counts: list[int], errors: Tensor, n: int) -> dict[str, Any]:
    """Median and quartiles of the errors [counts, draws], the peak, and the minimum of the median on both sides of n."""
    low, median, high = errors.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=1)
    inside = torch.tensor(counts) < n
    return {
        "low": low, "median": median, "high": high, "draws": errors.size(1), "peak": counts[int(median.argmax())],
        "first": median[inside].min(), "second": median[~inside].min(),
    }  # fmt: skip


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    holds, words = True, []
    for name, part in figures.items():
        n, peak, first, second = (part[key] for key in ("samples", "peak", "first", "second"))
        holds &= abs(peak - n) <= 1 and (second < first or "noise" in name)
        words.append(
            f"{name}: error peaks at {peak} parameters for {n} samples; minimum {first:.3g} before, {second:.3g} after"
        )
    return holds, "; ".join(words) + f" (medians of {part['draws']} draws)"


def curve(axis, part: dict[str, Any], colour: str, title: str) -> None:
    p, n = part["parameters"], part["samples"]
    axis.fill_between(p, part["low"], part["high"], color=colour, alpha=0.25, linewidth=0)
    axis.loglog(p, part["median"], color=colour)
    axis.axvline(n, color=GREY, linestyle=":")
    say(axis, n, 0.97, f"{n} samples", GREY, xycoords=("data", "axes fraction"))
    axis.set(title=title, xlabel="parameters", ylabel="test error")


def draw(figures: dict[str, Any]):
    figure, parts = axes(3, 2, width=15, height=9)
    part = figures["polynomials"]
    for axis, (p, fit), colour in zip(parts[0], part["fits"].items(), (BLUE, RED, GREEN), strict=True):
        grid = torch.tensor(part["grid"])
        axis.plot(grid, target(grid), color=GREY, linewidth=1.2)
        axis.plot(part["x"], part["y"], "o", color=BLACK)
        axis.plot(grid, fit, color=colour)
        axis.set(ylim=(-4, 4), title=f"{p} parameters", xlabel="x")
    grid = parts[1, 0].get_gridspec()
    for axis in parts[1]:
        axis.remove()
    left, right = (figure.add_subplot(grid[1, place]) for place in (0, slice(1, 3)))
    curve(left, part, BLUE, "polynomials through 20 points")
    curve(right, figures["features"], ORANGE, "100 samples, random features: the error falls twice")
    noisy = figures["features with noise"]
    right.plot(noisy["parameters"], noisy["median"], color=GREY, linewidth=1.5)
    say(right, noisy["parameters"][-1], noisy["median"][-1], "more noise", GREY, ha="right", xytext=(0, 12))
    return figure
