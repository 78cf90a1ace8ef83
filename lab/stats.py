"""Statistics of runs: does an arm meet the target, by what factor do two arms differ, how many steps does an arm need,
how many runs does a claim need.

Runs (seeds) are the independent units, their variance is measured. Times are compared by the mean of their log ratios, so that
A/B and B/A give the same verdict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats
from scipy.special import stdtr, stdtrit  # Student's distribution function and its inverse; scipy.stats.t checks too slowly


@dataclass(frozen=True)
class Sample:
    """n runs: mean and standard deviation (n - 1; nan for one run)."""

    n: int
    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        x = np.asarray(values, float)
        return cls(len(x), float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval of the mean; unbounded for one run."""
        if self.n < 2:
            return -math.inf, math.inf
        half = float(stdtrit(self.n - 1, (1 + level) / 2)) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    def p_above(self, target: float) -> float:
        """p of the one-sided t-test whose null hypothesis is: the mean loss is at or above the target. nan for one run; 0 or 1
        where the runs do not differ at all."""
        if self.n < 2:
            return math.nan
        if self.sd == 0:
            return float(self.mean >= target)
        return float(stdtr(self.n - 1, (self.mean - target) / (self.sd / math.sqrt(self.n))))


@dataclass(frozen=True)
class Ratio:
    """How many times one arm's cost is the other's: geometric mean, interval, p that there is no difference."""

    n: int
    ratio: float
    low: float
    high: float
    p: float
    sd: float  # of the log ratios


def paired_ratio(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Ratio:
    """a / b from pairs (same seed, run side by side): paired t on the log ratios. Raises ValueError: unequal lengths, fewer
    than two pairs, or a value that is not positive."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    if x.shape != y.shape or len(x) < 2 or not (np.concatenate([x, y]) > 0).all():
        raise ValueError(f"pairs of positive values wanted, at least two: got {list(a)} and {list(b)}")
    sample = Sample.of(np.log(x / y))
    paired = product([(sample.mean, sample.sd / math.sqrt(sample.n), sample.n - 1)], level)
    return replace(paired, n=sample.n, sd=sample.sd)


def product(parts: Sequence[tuple[float, float, int]], level: float = 0.95) -> Ratio:
    """A ratio made of independent factors: (log of the factor, its standard error, degrees of freedom). Errors add in squares,
    with Welch and Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). `n` of the result is the largest number of
    runs with no more degrees of freedom; `sd` is the standard error."""
    log = sum(value for value, _, _ in parts)
    variances = [(se**2, df) for _, se, df in parts if se > 0]
    if not variances:
        return Ratio(0, math.exp(log), math.exp(log), math.exp(log), float(log == 0), 0.0)
    variance = sum(v for v, _ in variances)
    df = variance**2 / sum(v**2 / df for v, df in variances)
    se = math.sqrt(variance)
    half, p = stdtrit(df, (1 + level) / 2) * se, float(2 * stdtr(df, -abs(log) / se))
    return Ratio(math.floor(df) + 1, *(math.exp(x) for x in (log, log - half, log + half)), p, se)


def power(n: int | np.ndarray, effect: float, alpha: float, two_sided: bool = False) -> float | np.ndarray:
    """The chance of a t-test on n values to find an effect of so many standard deviations (noncentral t)."""
    shift, critical = effect * np.sqrt(n), stats.t.isf(alpha / 2 if two_sided else alpha, n - 1)
    wrong_way = np.nan_to_num(stats.nct.cdf(-critical, n - 1, shift)) if two_sided else 0.0  # nan: too small for scipy
    return stats.nct.sf(critical, n - 1, shift) + wrong_way


def runs_needed(
    gap: float, sd: float, alpha: float = 0.01, chance: float = 0.9, most: int = 1000, two_sided: bool = False
) -> int:
    """Runs so that a test finds a true gap (one-sided: target - expected mean loss) with that chance, `most` at most."""
    if gap <= 0 or sd == 0:
        return 2 if gap > 0 else most
    n = np.arange(2, most + 1)
    enough = power(n, gap / sd, alpha, two_sided) >= chance
    return int(n[enough.argmax()]) if enough.any() else most


def smallest_difference(n: int, sd: float, alpha: float = 0.01, chance: float = 0.9) -> float:
    """The gap that n values with that standard deviation would have shown with that chance, two-sided."""
    if n < 2 or sd == 0:
        return math.inf if n < 2 else 0.0
    most = 1.0
    while power(n, most, alpha, two_sided=True) < chance:
        most *= 2
    return sd * float(optimize.brentq(lambda effect: power(n, effect, alpha, two_sided=True) - chance, 1e-6, most))


@dataclass(frozen=True)
class Horizon:
    """Steps at which the mean final loss meets the target, with an interval; high is inf where the runs do not say."""

    steps: float
    low: float
    high: float
    slope: float  # loss per doubling of the steps
    sd: float  # of a run about the line
    se: float  # standard error of log(steps), for `product`
    df: int  # degrees of freedom of both


def horizon(steps: Sequence[float], losses: Sequence[float], target: float, level: float = 0.95) -> Horizon | None:
    """Inverse prediction (Draper and Smith, Applied Regression Analysis, section 3.2): a line through final loss against
    log2(steps), solved for the target, with Fieller's interval. Each loss is of a whole run, its schedule ending at its last
    step; the variance is about the line. None: the loss does not fall with steps. Raises ValueError: fewer than three runs, or
    all of one length."""
    x, y = np.log2(np.asarray(steps, float)), np.asarray(losses, float)
    n = len(x)
    if n < 3 or np.ptp(x) == 0:
        raise ValueError(f"a line with an interval needs at least three runs of at least two lengths, got {n}")
    middle, spread = x.mean(), ((x - x.mean()) ** 2).sum()
    slope = float(((x - middle) * y).sum() / spread)
    if slope >= 0:
        return None
    sd = math.sqrt(float(((y - y.mean() - slope * (x - middle)) ** 2).sum()) / (n - 2))
    offset = (target - y.mean()) / slope  # where the line meets the target, from the middle
    # all d with (y_mean + slope d - target)^2 <= t^2 sd^2 (1/n + d^2 / spread)
    t2 = (stdtrit(n - 2, (1 + level) / 2) * sd) ** 2
    a, b, c = slope**2 - t2 / spread, slope * (y.mean() - target), (y.mean() - target) ** 2 - t2 / n
    root, low, high = b * b - a * c, -math.inf, math.inf
    if a > 0:  # real roots, but for rounding
        low, high = ((-b + sign * math.sqrt(max(0.0, root))) / a for sign in (-1, 1))
    elif a < 0 < offset and root > 0 and c > 0:  # the slope is not certain: no upper bound; the middle is surely too short
        low = (-b - math.sqrt(root)) / a
    se = math.log(2) * sd / -slope * math.sqrt(1 / n + offset**2 / spread)  # delta method
    return Horizon(*(float(2.0 ** (middle + d)) for d in (offset, low, high)), slope, sd, se, n - 2)
