"""Loss against tokens: the curve through a base's runs, and how many tokens the base needs for the loss of a trick.

Speed-up = tokens that the base needs for the same loss / tokens that the trick used (Wen et al., arXiv 2509.02046). The base's
final losses at several token budgets give L(D) = alpha D^-exponent + floor, and this curve gives the tokens. The speed-up is a
figure only between the base's smallest and largest budget, outside a bound: a fit to Wen et al.'s losses at 1, 2, 4 and 8
misses 16 by 0.01 nats. Early in training the loss need not follow a power law; where the seeds at each budget reject one,
straight lines in log tokens join the mean losses instead.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

EXPONENTS = np.geomspace(0.02, 3, 400)  # that a curve may have; published ones lie between 0.2 and 0.5
DRAWS = 20_000  # of a bootstrap: another seed then moves an interval's end by 1 % of its half-width; 3 % with 2,000
LEVEL = 0.95  # of every interval
MISFIT = 0.05  # level of the test that rejects a power law
Values = Sequence[float]


class PowerLaw(NamedTuple):
    """L(D) = alpha D^-exponent + floor, and between which amounts it was measured."""

    alpha: float
    exponent: float
    floor: float
    least: float
    most: float
    rms: float  # of the residuals, nats

    def loss(self, amount):
        return self.alpha * amount**-self.exponent + self.floor

    def amount(self, loss: float) -> float:
        """D at that loss; inf at or below the floor."""
        return ((loss - self.floor) / self.alpha) ** (-1 / self.exponent) if loss > self.floor else math.inf

    @staticmethod
    def log_amounts(amounts: np.ndarray, losses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The logarithm of D at a loss, of many curves at once: amounts [n], losses [m, n], wanted [m] -> [m]. nan where the
        losses do not fall, inf where the floor is above the loss."""
        middle = np.log(amounts).mean()
        alpha, exponent, floor, _ = scan(amounts / np.exp(middle), losses)
        with np.errstate(invalid="ignore", divide="ignore"):
            logs = np.where(wanted > floor, np.log(np.maximum(wanted - floor, 1e-300) / alpha) / -exponent, np.inf)
        return np.where(np.isnan(alpha), np.nan, logs + middle)


class Lines(NamedTuple):
    """Straight lines in log tokens between the mean losses at each budget; a mean above an earlier one counts as level."""

    amounts: tuple[float, ...]
    losses: tuple[float, ...]
    least: float
    most: float

    @classmethod
    def through(cls, amounts: Values, losses: Values) -> "Lines":
        x, y, _ = means(amounts, losses)
        return cls(tuple(x.tolist()), tuple(np.minimum.accumulate(y).tolist()), float(x[0]), float(x[-1]))

    def amount(self, loss: float) -> float:
        """D at that loss; beyond the ends by the outermost lines, inf where the last one is level."""
        return float(np.exp(self.log_amounts(np.array(self.amounts), np.array([self.losses]), np.array([loss]))[0]))

    @staticmethod
    def log_amounts(amounts: np.ndarray, losses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """As `PowerLaw.log_amounts`."""
        levels, mean, _ = means(amounts, losses)
        x, falling = np.log(levels), np.minimum.accumulate(mean, axis=1)
        after = np.minimum((falling[:, 1:] > wanted[:, None]).sum(1), len(x) - 2)  # the line that meets the loss, or the last
        rows = np.arange(len(falling))
        start, end = falling[rows, after], falling[rows, after + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(wanted == start, 0.0, (start - wanted) / (start - end))
        return x[after] + part * (x[after + 1] - x[after])


Curve = PowerLaw | Lines


def means(amounts: Values, losses: Values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct amounts [k], rising; the mean loss at each [..., k]; for every run the index of its amount [n]."""
    levels, which = np.unique(np.asarray(amounts, float), return_inverse=True)
    y = np.asarray(losses, float)
    return levels, np.stack([y[..., which == i].mean(-1) for i in range(len(levels))], -1), which


def scan(amounts: np.ndarray, losses: np.ndarray, exponents: np.ndarray = EXPONENTS) -> tuple[np.ndarray, ...]:
    """Least squares of many curves at once: given the exponent, alpha and floor are a straight line's. Two budgets leave no
    choice of it: nearly a straight line in log tokens. amounts [n], near 1; losses [m, n]; exponents [g] -> alpha, exponent,
    floor and the sum of squares, [m] each; nan and inf where no curve that falls fits."""
    if len(np.unique(amounts)) == 2:
        exponents = EXPONENTS[:1]
    x = amounts[None] ** -exponents[:, None]  # [g, n]
    centred = x - x.mean(1, keepdims=True)
    y = losses - losses.mean(1, keepdims=True)
    length = np.sqrt((centred**2).sum(1))
    along = y @ (centred / length[:, None]).T  # [m, g]: the part of the losses that falls with that curve
    rows, best = np.arange(len(losses)), along.argmax(1)
    most = along[rows, best]
    alpha = np.where(most > 0, most / length[best], np.nan)
    squares = np.where(most > 0, np.maximum((y**2).sum(1) - most**2, 0), np.inf)
    return alpha, exponents[best], losses.mean(1) - alpha * x.mean(1)[best], squares


def fit(amounts: Values, losses: Values) -> PowerLaw | None:
    """By least squares, through finite losses at two or more budgets; None where the loss does not fall."""
    x, y = np.asarray(amounts, float), np.asarray([losses], float)
    unit = np.exp(np.log(x).mean())

    def at(exponent: float) -> list[float]:
        return [float(value[0]) for value in scan(x / unit, y, np.array([exponent]))]

    i = int(np.searchsorted(EXPONENTS, scan(x / unit, y)[1][0]))
    bounds = EXPONENTS[[max(0, i - 1), min(len(EXPONENTS) - 1, i + 1)]]
    best = optimize.minimize_scalar(lambda e: at(e)[3], bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    alpha, exponent, floor, left = at(best)
    rms = math.sqrt(left / len(x))
    law = PowerLaw(float(alpha * unit**exponent), exponent, floor, float(x.min()), float(x.max()), rms)
    return law if math.isfinite(alpha) else None


def curve_through(amounts: Values, losses: Values) -> Curve | None:
    """The power law, or `Lines` where the F test of lack of fit rejects it: the means at the budgets scatter about the law by
    more than runs scatter about their means. With one run per budget, or no more budgets than parameters, nothing is rejected.
    None where the loss does not fall."""
    law = fit(amounts, losses)
    if law is None:
        return None
    levels, mean, which = means(amounts, losses)
    within, about = np.asarray(losses, float) - mean[which], mean[which] - law.loss(levels)[which]
    inner = EXPONENTS[1] < law.exponent < EXPONENTS[-2]  # at a bound the exponent is no free parameter
    runs, left = len(within) - len(levels), len(levels) - 2 - inner
    if runs < 1 or left < 1 or not within.any():
        return law
    ratio = (about @ about / left) / (within @ within / runs)
    return Lines.through(amounts, losses) if stats.f.sf(ratio, left, runs) < MISFIT else law


class Speedup(NamedTuple):
    """Tokens that the base needs for the same loss / tokens that the trick used. Outside the base's budgets `ratio` is an
    extrapolation, and only `low` or `high` is known."""

    ratio: float
    inside: bool
    low: float  # bounds by the base's budgets; 0 and inf where there is none
    high: float
    between: float  # by straight lines instead of the curve; nan outside the base's mean losses

    def words(self) -> str:
        if self.inside:
            return f"{self.ratio:.2f}x"
        return f"> {self.low:.2f}x" if self.low else f"< {self.high:.2f}x"


def speedup(curve: Curve, amounts: Values, losses: Values, loss: float, amount: float) -> Speedup:
    """Of a run of `amount` tokens that ended at `loss`, against the base's runs and the curve through them."""
    wanted = curve.amount(loss)
    inside = curve.least * (1 - 1e-9) <= wanted <= curve.most * (1 + 1e-9)
    low = curve.most / amount if wanted > curve.most and not inside else 0.0
    high = curve.least / amount if wanted < curve.least and not inside else math.inf
    lines = Lines.through(amounts, losses)
    between = lines.amount(loss) if lines.losses[-1] <= loss <= lines.losses[0] else math.nan
    return Speedup(wanted / amount, inside, low, high, between / amount)


def pooled(samples: Sequence[Values]) -> tuple[float, float]:
    """Standard deviation of a loss over seeds and its degrees of freedom, by groups of runs that differ only in their seed."""
    df = sum(len(s) - 1 for s in samples)
    return math.sqrt(sum(float(np.var(s)) * len(s) for s in samples) / df), df


def bootstrap(
    form: type[Curve], amounts: Values, losses: Values, amount: float, own: Values, noise: Values, seed: int, draws: int = DRAWS
) -> np.ndarray:
    """Log speed-ups [draws] of a trick with the losses `own` after `amount` tokens, as other seeds might have given them: every
    loss is drawn anew, a curve of that form fitted to the base's. noise: by `pooled`; its own uncertainty is included, as
    resampling three seeds would give too narrow intervals. Base and trick are drawn independently although they share data
    orders, which can only make the interval too wide. nan where a draw has no curve, inf where its floor is above the loss."""
    rng, (sd, df) = np.random.default_rng(seed), noise
    x, y = np.asarray(amounts, float), np.asarray(losses, float)
    spread = np.sqrt(df / rng.chisquare(df, draws)) if math.isfinite(df) else np.ones(draws)
    sd = sd * spread[:, None]  # values that the true one may have, given the measured one
    redrawn = y + sd * rng.standard_normal((draws, len(y)))  # each run, so that a budget weighs by the number of its runs
    wanted = np.mean(own) + sd[:, 0] / math.sqrt(len(own)) * rng.standard_normal(draws)
    return form.log_amounts(x, redrawn, wanted) - math.log(amount)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Percentiles of the draws that are numbers; unbounded where more than a tenth are not."""
    numbers = draws[~np.isnan(draws)]
    if len(numbers) < 0.9 * len(draws):
        return -math.inf, math.inf
    low, high = np.quantile(numbers, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)
