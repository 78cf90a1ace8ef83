"""How a speed-up goes with model size, and what to expect at a larger one: a verdict.

A line through log speed-up against log parameters, by random-effects regression (Higgins, Thompson and Spiegelhalter 2009, J.
R. Stat. Soc. A 172). Two things make it uncertain: the noise of seeds and of the curve, known from a bootstrap, and the scatter
of the sizes about the line, which more seeds do not reduce. A handful of sizes hardly shows how large that scatter is, so
intervals are Student's with (sizes - 2) degrees of freedom (Knapp and Hartung 2003, Statistics in Medicine 22). In simulations
with five sizes and a prediction at ten times the largest, they cover the truth in 94 % or more, for a scatter of up to 0.3 in
log speed-up, about what matrix methods have here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from lab.scaling.curves import interval
from lab.scaling.ladder import size_words

NOTHING = math.log(1.05)  # a speed-up that is surely within 5 % of 1 has vanished
MOST_SEEDS = 100  # that an advice counts up to


def with_interval(ratio: float, low: float, high: float | None) -> str:
    """2.38x (0.58-9.52). high: None is infinite, as in JSON."""
    values = ratio, low, math.inf if high is None else high
    return "{}x ({}-{})".format(*(f"{v:.2f}" if v < 1000 or math.isinf(v) else f"{v:.0e}" for v in values))


class Trend(NamedTuple):
    """The line, and what it says at `at` parameters. Ratios, not logarithms."""

    at: float
    ratio: float
    low: float
    high: float
    slope: float  # d log speed-up / d log parameters
    slope_low: float
    slope_high: float
    scatter: float  # standard deviation of the sizes about the line in log speed-up, beyond seed noise
    crossing: float  # parameters at which the line meets 1; nan unless it surely slopes and does so within a decade
    crossing_low: float
    crossing_high: float
    verdict: str
    why: str  # of a verdict that is not decided: what would decide it

    def words(self) -> str:
        text = f"{self.verdict}: {with_interval(self.ratio, self.low, self.high)} at {size_words(self.at)} parameters"
        if self.slope_high < 0 or self.slope_low > 0:  # it surely changes with size
            decade = abs(math.exp(self.slope * math.log(10)) - 1)
            text += f", {'shrinking' if self.slope < 0 else 'growing'} by {decade:.0%} a decade"
        if math.isfinite(self.crossing):
            ends = f"{size_words(self.crossing_low)}-{size_words(self.crossing_high)}"
            text += f", 1x at {size_words(self.crossing)} ({ends})"
        return f"{text}; {self.why}" if self.why else text


def line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of many lines: x [k], y and weights [m, k] -> intercepts and slopes [m]."""
    total = weights.sum(1)
    x_mean, y_mean = (weights * x).sum(1) / total, (weights * y).sum(1) / total
    centred = x - x_mean[:, None]
    slope = (weights * centred * y).sum(1) / (weights * centred**2).sum(1)
    return y_mean - slope * x_mean, slope


def scatter_about_line(x: np.ndarray, y: np.ndarray, se: np.ndarray) -> float:
    """Standard deviation of the sizes about a line beyond their errors `se`: with it, the weighted squares equal the degrees of
    freedom (Paule and Mandel 1982, J. Res. Natl. Bur. Stand. 87). 0 where the errors explain them."""

    def excess(scatter: float) -> float:
        weights = 1 / (se[None] ** 2 + scatter**2)
        a, b = line(x, y[None], weights)
        return float((weights * (y - a[:, None] - b[:, None] * x) ** 2).sum()) - (len(x) - 2)

    if len(x) < 3 or excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, math.sqrt(len(x)) * np.ptp(y)))


def trend(
    parameters: Sequence[float], ratios: Sequence[float], draws: np.ndarray, at: float, seeds: int, seed: int = 0
) -> Trend:
    """The verdict on a trick at `at` parameters, by two sizes or more; the interval of two is unbounded, as they lie on a line.
    ratios: measured speed-ups at the sizes [k]. draws: log speed-ups [m, k] by `bootstrap`. seeds: runs at each point."""
    x, y = np.log(np.asarray(parameters, float)), np.log(np.asarray(ratios, float))
    middle = x.mean()
    x, at_x = x - middle, math.log(at) - middle
    draws = draws[np.isfinite(draws).all(1)]
    low, high = np.quantile(draws, [0.16, 0.84], axis=0)
    se = np.maximum((high - low) / 2, 1e-6)
    scatter, freedom = scatter_about_line(x, y, se), len(x) - 2
    weights = np.broadcast_to(1 / (se**2 + scatter**2), draws.shape)
    rng = np.random.default_rng(seed)
    student = np.sqrt(freedom / rng.chisquare(max(freedom, 1), len(draws)))  # turns normal errors into Student's
    # draws lie about the measured value as that lies about the truth; the bootstrap's own bias is small beside the interval
    errors = draws - y + scatter * rng.standard_normal(draws.shape)
    a, b = line(x, y + student[:, None] * errors, weights)
    predicted = a + b * at_x + student * scatter * rng.standard_normal(len(draws))
    (low, high), (slope_low, slope_high) = (interval(v) if freedom else (-math.inf, math.inf) for v in (predicted, b))
    a0, b0 = (float(v[0]) for v in line(x, y[None], weights[:1]))
    centre = a0 + b0 * at_x
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing, ends = np.divide(-a0, b0), interval(-a / b)
    near = x[0] - math.log(10) <= crossing <= max(x[-1], at_x) + math.log(10)
    if not near or slope_low <= 0 <= slope_high:
        crossing, ends = math.nan, (math.nan, math.nan)
    verdict = verdict_of(low, high, slope_high, a0 + b0 * x[0] > 0)
    why = more_seeds(x, se, at_x, scatter, centre, (high - low) / 2, seeds) if verdict == "not decided" else ""
    with np.errstate(over="ignore"):
        at_size, sizes = (np.exp(v).tolist() for v in ((centre, low, high), (crossing + middle, *np.add(ends, middle))))
    return Trend(at, *at_size, b0, slope_low, slope_high, scatter, *sizes, verdict, why)


def verdict_of(low: float, high: float, slope_high: float, gained: bool) -> str:
    """By the interval of the log speed-up at the size asked for; `gained`: was there a gain at the smallest size?"""
    if low > 0:
        return "survives"
    if high < 0:
        return "reverses"
    if max(-low, high) < NOTHING:
        return "vanishes"
    return "fades" if slope_high < 0 and gained else "not decided"


def more_seeds(x: np.ndarray, se: np.ndarray, at: float, scatter: float, centre: float, half: float, seeds: int) -> str:
    """How many would decide: with them, an interval that has half-width `half` with `seeds` excludes 1 or lies near it."""
    if len(x) < 3:
        return "two sizes do not show how far sizes scatter: add a third"

    def error(count: int) -> float:
        weights = 1 / (se**2 * seeds / count + scatter**2)
        x_mean = (weights * x).sum() / weights.sum()
        return math.sqrt(1 / weights.sum() + (at - x_mean) ** 2 / (weights * (x - x_mean) ** 2).sum() + scatter**2)

    for count in range(seeds + 1, MOST_SEEDS + 1):
        width = half * error(count) / error(seeds)
        if abs(centre) > width or abs(centre) + width < NOTHING:
            return f"about {count} seeds a point instead of {seeds} would decide"
    return f"not even {MOST_SEEDS} seeds a point would decide at these sizes: add one nearer to the size asked for"
