"""What losses at several sizes and lengths of run say: how many tokens a base would need for a trick's loss, how that ratio
goes with size, and what may be expected at a larger one.

The effective speed-up of a trick at a size is the method of Wen et al. (arXiv 2509.02046): the base's final losses at several
token budgets give L(D) = alpha D^-exponent + floor; the D at which that curve has the trick's loss, over the D that the trick
had, is the speed-up. It is a figure only where that D lies between the base's smallest and largest budget. Outside there is
a bound: four points of three parameters say little about a fifth (their fit to 1, 2, 4, 8 misses 16 by 0.01 nats). Early in
training the loss need not fall like that, it may even fall faster and faster in log tokens, which no such curve does: where the
seeds at each budget reject it, straight lines between their means take its place.

The trend of its logarithm over log parameters is a random-effects regression (Higgins, Thompson and Spiegelhalter 2009, J. R.
Stat. Soc. A 172): seed noise and the curve's uncertainty by a parametric bootstrap, and beside them a scatter of the sizes
about the line, which no number of seeds removes: a learning rate that suits one size a little better than the next. How large
it is a handful of sizes hardly says, so intervals are Student's with as many degrees of freedom as there are sizes less two
(Knapp and Hartung 2003, Statistics in Medicine 22). By simulation, five sizes and a prediction at ten times the largest, they
cover the truth in 94 % or more for a scatter of up to 0.3 in log speed-up, about what matrix methods have here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from lab.scaling.ladder import size_words

EXPONENTS = np.geomspace(0.02, 3, 400)  # that a curve may have; published ones lie between 0.2 and 0.5
DRAWS = 20_000  # of a bootstrap: an interval's end then moves by 1 % of its half-width with the seed, with 2,000 by 3 %
LEVEL = 0.95  # of every interval
MISFIT = 0.05  # level of the test that rejects a power law
NOTHING = math.log(1.05)  # a speed-up that is surely within 5 % of 1 has vanished


# ---------------------------------------------------------------- loss against tokens


@dataclass(frozen=True)
class PowerLaw:
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
        """D at which the loss is that; inf at or below the floor."""
        return ((loss - self.floor) / self.alpha) ** (-1 / self.exponent) if loss > self.floor else math.inf


@dataclass(frozen=True)
class Lines:
    """Straight lines in log tokens between the mean losses at each budget, none above the one before."""

    amounts: tuple[float, ...]
    losses: tuple[float, ...]
    least: float
    most: float

    @classmethod
    def through(cls, amounts: Sequence[float], losses: Sequence[float]) -> "Lines":
        x, y, _ = means(amounts, losses)
        return cls(tuple(x.tolist()), tuple(np.minimum.accumulate(y).tolist()), float(x[0]), float(x[-1]))

    def amount(self, loss: float) -> float:
        """D at which the loss is that; beyond the ends by the outermost lines, inf where the last one is level."""
        return float(np.exp(log_amounts(np.log(self.amounts), np.array([self.losses]), np.array([loss]))[0]))


def log_amounts(x: np.ndarray, losses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of many such lines at once, the logarithm of the amount at a loss [m].

    Args:
        x: logarithms of the amounts [k], rising. losses: [m, k]. wanted: [m].
    """
    falling = np.minimum.accumulate(losses, axis=1)
    after = np.minimum((falling[:, 1:] > wanted[:, None]).sum(1), len(x) - 2)  # the line that meets it, or the end's
    rows = np.arange(len(losses))
    drop = falling[rows, after] - falling[rows, after + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(wanted == falling[rows, after], 0.0, (falling[rows, after] - wanted) / drop)
    return x[after] + part * (x[after + 1] - x[after])


def scan(amounts: np.ndarray, losses: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, ...]:
    """Least squares of many curves at once: for each exponent the other two parameters are a straight line's.

    Args:
        amounts: [n], positive. losses: [m, n]. exponents: [g].
    Returns:
        alpha, exponent, floor and the sum of squares, [m] each; nan and inf where no curve that falls fits.
    """
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


def candidates(amounts: np.ndarray) -> np.ndarray:
    """Exponents to scan: two budgets leave no choice but (nearly) a straight line in log tokens."""
    return EXPONENTS if len(np.unique(amounts)) > 2 else EXPONENTS[:1]


def fit(amounts: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """Least squares through runs at two or more budgets; None where the loss does not fall with them.

    Raises:
        ValueError: all at one budget, or a value that is not finite.
    """
    x, y = np.asarray(amounts, float), np.asarray(losses, float)
    if len(np.unique(x)) < 2 or not (np.isfinite(y).all() and (x > 0).all()):
        raise ValueError("a curve needs finite losses at two or more budgets")
    unit = float(np.exp(np.log(x).mean()))  # tokens in numbers near 1
    squares = lambda exponent: float(scan(x / unit, y[None], np.array([exponent]))[3][0])  # noqa: E731
    tried = candidates(x)
    exponent = scan(x / unit, y[None], tried)[1][0]
    if len(tried) > 1:
        i = int(np.searchsorted(tried, exponent))
        edges = tried[max(0, i - 1)], tried[min(len(tried) - 1, i + 1)]
        exponent = float(optimize.minimize_scalar(squares, bounds=edges, method="bounded", options={"xatol": 1e-9}).x)
    (alpha,), _, (floor,), (rest,) = scan(x / unit, y[None], np.array([exponent]))
    if not math.isfinite(alpha):
        return None
    rms = math.sqrt(rest / len(x))
    return PowerLaw(float(alpha * unit**exponent), float(exponent), float(floor), float(x.min()), float(x.max()), rms)


def between(amounts: Sequence[float], losses: Sequence[float], loss: float) -> float:
    """The amount at that loss by straight lines between the measured means; nan outside them. A check of `fit` that believes
    in no form of the curve."""
    lines = Lines.through(amounts, losses)
    return lines.amount(loss) if lines.losses[-1] <= loss <= lines.losses[0] else math.nan


def means(amounts: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct amounts, rising, the mean loss at each, and for every run the number of its amount among them."""
    levels, which = np.unique(np.asarray(amounts, float), return_inverse=True)
    return levels, np.bincount(which, np.asarray(losses, float)) / np.bincount(which), which


def curve_through(amounts: Sequence[float], losses: Sequence[float]) -> PowerLaw | Lines | None:
    """The power law through runs at two or more budgets, or `Lines` where it is rejected; None where the loss does not fall.

    Rejected by the F test of lack of fit: the means at the budgets scatter about it by more than runs scatter about their
    means. One run a budget, or no more budgets than parameters, reject nothing.

    Raises:
        ValueError: see `fit`.
    """
    law = fit(amounts, losses)
    if law is None:
        return None
    levels, mean, which = means(amounts, losses)
    own, form = np.asarray(losses, float) - mean[which], mean[which] - law.loss(levels)[which]
    inner = EXPONENTS[1] < law.exponent < EXPONENTS[-2]  # else it is a bound, and no parameter
    runs, left = len(own) - len(levels), len(levels) - 2 - inner
    if runs < 1 or left < 1 or not own.any():
        return law
    ratio = (form @ form / left) / (own @ own / runs)
    return Lines.through(amounts, losses) if stats.f.sf(ratio, left, runs) < MISFIT else law


# ---------------------------------------------------------------- effective speed-up


@dataclass(frozen=True)
class Speedup:
    """How many times the tokens of a trick the base needs for its loss. Outside the base's budgets `ratio` is an
    extrapolation, and `low` or `high` the only thing known."""

    ratio: float
    inside: bool
    low: float  # bounds by the base's budgets; 0 and inf where there is none
    high: float
    between: float  # the same by straight lines in log tokens; nan where they say nothing

    def words(self) -> str:
        if self.inside:
            return f"{self.ratio:.2f}x"
        return f"> {self.low:.2f}x" if self.low else f"< {self.high:.2f}x"


def speedup(curve: PowerLaw | Lines, amounts: Sequence[float], losses: Sequence[float], loss: float, amount: float) -> Speedup:
    """Of a run of `amount` tokens that ended at `loss`, against the base's runs and the curve through them."""
    wanted = curve.amount(loss)
    inside = curve.least * (1 - 1e-9) <= wanted <= curve.most * (1 + 1e-9)
    low = curve.most / amount if wanted > curve.most and not inside else 0.0
    high = curve.least / amount if wanted < curve.least and not inside else math.inf
    return Speedup(wanted / amount, inside, low, high, between(amounts, losses, loss) / amount)


@dataclass(frozen=True)
class Noise:
    """Standard deviation of a final loss over seeds, and the degrees of freedom that it was measured with."""

    sd: float
    df: float

    @classmethod
    def pooled(cls, samples: Sequence[Sequence[float]]) -> "Noise":
        """From several groups of runs that differ in their seed alone.

        Raises:
            ValueError: no group has two runs.
        """
        df = sum(len(s) - 1 for s in samples)
        if df < 1:
            raise ValueError("no two runs differ in their seed alone: the noise is not known")
        return cls(math.sqrt(sum(float(np.var(s)) * len(s) for s in samples) / df), df)

    def draw(self, rng: np.random.Generator, draws: int) -> np.ndarray:
        """Values that the true standard deviation may have, given the measured one."""
        return self.sd * (np.sqrt(self.df / rng.chisquare(self.df, draws)) if math.isfinite(self.df) else np.ones(draws))


def bootstrap(
    amounts: Sequence[float],
    losses: Sequence[float],
    own_amount: float,
    own_losses: Sequence[float],
    noise: Noise,
    seed: int = 0,
    draws: int = DRAWS,
    straight: bool = False,
) -> np.ndarray:
    """Log speed-ups [draws] as other seeds might have given them: every mean redrawn, the curve (`straight`: `Lines`) drawn
    anew through them.

    Parametric, with the noise's own uncertainty: resampling three seeds would give intervals that are too narrow. Base and
    trick are drawn independently, though they share data orders: if that made a difference the interval would be too wide.
    nan where a draw has no curve, inf where its floor is above the loss.
    """
    rng = np.random.default_rng(seed)
    x, y = np.asarray(amounts, float), np.asarray(losses, float)
    sd = noise.draw(rng, draws)[:, None]
    redrawn = y + sd * rng.standard_normal((draws, len(y)))  # each run: so that budgets weigh by their runs
    own = np.mean(own_losses) + sd[:, 0] / math.sqrt(len(own_losses)) * rng.standard_normal(draws)
    if straight:
        levels, _, which = means(x, y)
        at_each = np.stack([redrawn[:, which == i].mean(1) for i in range(len(levels))], 1)
        return log_amounts(np.log(levels), at_each, own) - math.log(own_amount)
    unit = float(np.exp(np.log(x).mean()))
    alpha, exponent, floor, _ = scan(x / unit, redrawn, candidates(x))
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.where(own > floor, np.log(np.maximum(own - floor, 1e-300) / alpha) / -exponent, np.inf)
    return np.where(np.isnan(alpha), np.nan, wanted + math.log(unit / own_amount))


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentiles of the draws that are numbers; unbounded where too many are not."""
    kept = draws[~np.isnan(draws)]
    if len(kept) < 0.9 * len(draws):
        return -math.inf, math.inf
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


# ---------------------------------------------------------------- trend


def with_interval(ratio: float, low: float, high: float | None) -> str:
    """2.38x (0.58-9.52). high: None is infinite, as JSON has it."""
    words = [f"{v:.2f}" if v < 1000 or math.isinf(v) else f"{v:.0e}" for v in (ratio, low, math.inf if high is None else high)]
    return "{}x ({}-{})".format(*words)


@dataclass(frozen=True)
class Trend:
    """A line through log speed-up against log parameters, and what it says at a size `at`. Ratios, not logarithms."""

    at: float  # parameters
    ratio: float
    low: float
    high: float
    slope: float  # d log speed-up / d log parameters
    slope_low: float
    slope_high: float
    scatter: float  # of the sizes about the line, beyond seed noise: its standard deviation in log speed-up
    crossing: float  # parameters at which the line meets 1; nan unless it surely slopes and does so within a decade
    crossing_low: float
    crossing_high: float
    verdict: str
    why: str  # of a verdict that is not decided: how many runs would

    @property
    def slopes(self) -> bool:
        """Does the speed-up surely change with size?"""
        return self.slope_high < 0 or self.slope_low > 0

    def words(self) -> str:
        text = f"{self.verdict}: {with_interval(self.ratio, self.low, self.high)} at {size_words(self.at)} parameters"
        if self.slopes:
            decade = abs(math.exp(self.slope * math.log(10)) - 1)
            text += f", {'shrinking' if self.slope < 0 else 'growing'} by {decade:.0%} a decade"
        if math.isfinite(self.crossing):
            ends = f"{size_words(self.crossing_low)}-{size_words(self.crossing_high)}"
            text += f", 1 at {size_words(self.crossing)} ({ends})"
        return f"{text}; {self.why}" if self.why else text


def line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of many lines: x [k], y and weights [m, k] -> intercepts and slopes [m]."""
    total = weights.sum(1)
    x_mean, y_mean = (weights * x).sum(1) / total, (weights * y).sum(1) / total
    centred = x - x_mean[:, None]
    slope = (weights * centred * y).sum(1) / (weights * centred**2).sum(1)
    return y_mean - slope * x_mean, slope


def scatter_about_line(x: np.ndarray, y: np.ndarray, se: np.ndarray) -> float:
    """Standard deviation of the sizes about a line beyond their errors `se`: the one with which their weighted squares come to
    the degrees of freedom (Paule and Mandel 1982, J. Res. Natl. Bur. Stand. 87); 0 where the errors explain them."""

    def excess(scatter: float) -> float:
        weights = 1 / (se[None] ** 2 + scatter**2)
        a, b = line(x, y[None], weights)
        return float((weights * (y - a[:, None] - b[:, None] * x) ** 2).sum()) - (len(x) - 2)

    if len(x) < 3 or excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, math.sqrt(len(x)) * np.ptp(y)))


def trend(
    parameters: Sequence[float], ratios: Sequence[float], draws: np.ndarray, at: float, runs: int, seed: int = 0
) -> Trend:
    """The verdict on a trick at `at` parameters.

    Args:
        ratios: measured speed-ups at the sizes [k].
        draws: log speed-ups [m, k] by `bootstrap`.
        runs: seeds at each point, of which a verdict that is not decided says how many more it takes.
    Raises:
        ValueError: fewer than two sizes; with two the interval is unbounded.
    """
    x_all, y, at_x = np.log(np.asarray(parameters, float)), np.log(np.asarray(ratios, float)), math.log(at)
    if len(x_all) < 2:
        raise ValueError("a trend needs at least two sizes")
    middle = x_all.mean()
    x = x_all - middle
    kept = draws[np.isfinite(draws).all(1)]
    low, high = np.quantile(kept, [0.16, 0.84], axis=0)
    se = np.maximum((high - low) / 2, 1e-6)
    scatter, freedom = scatter_about_line(x, y, se), len(x) - 2
    weights = np.broadcast_to(1 / (se**2 + scatter**2), kept.shape)
    rng = np.random.default_rng(seed)
    student = np.sqrt(freedom / rng.chisquare(max(freedom, 1), len(kept)))  # makes of normal errors Student's
    # bootstrap errors about the measured values; the bootstrap's own bias (draws lie about the measured value, which lies about
    # the truth) is left in, as it is small beside the interval
    errors = kept - y + scatter * rng.standard_normal(kept.shape)
    a, b = line(x, y + student[:, None] * errors, weights)
    predicted = a + b * (at_x - middle) + student * scatter * rng.standard_normal(len(kept))
    # two sizes lie on a line however they scatter
    (low, high), (slope_low, slope_high) = (interval(v) if freedom else (-math.inf, math.inf) for v in (predicted, b))
    a0, b0 = (float(v[0]) for v in line(x, y[None], weights[:1]))
    centre = a0 + b0 * (at_x - middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        meets = -a / b + middle
    crossing, ends = -a0 / b0 + middle if b0 else math.inf, interval(meets)
    near = x_all[0] - math.log(10) <= crossing <= max(x_all[-1], at_x) + math.log(10)
    if not near or slope_low <= 0 <= slope_high:
        crossing, ends = math.nan, (math.nan, math.nan)
    verdict = verdict_of(low, high, slope_high, a0 + b0 * x[0] > 0)
    why = more_runs(x, se, at_x - middle, scatter, centre, (high - low) / 2, runs) if verdict == "not decided" else ""
    with np.errstate(over="ignore"):
        ratios_at, sizes_at = (np.exp(v).tolist() for v in ((centre, low, high), (crossing, *ends)))
    return Trend(at, *ratios_at, b0, slope_low, slope_high, scatter, *sizes_at, verdict, why)


def verdict_of(low: float, high: float, slope_high: float, gained: bool) -> str:
    """From the interval of the log speed-up at the size asked for.

    survives: above 1. reverses: below 1. vanishes: within 5 % of 1. fades: a gain that surely shrinks, and is not shown to be
    there at that size. Else: not decided.
    """
    if low > 0:
        return "survives"
    if high < 0:
        return "reverses"
    if max(-low, high) < NOTHING:
        return "vanishes"
    return "fades" if slope_high < 0 and gained else "not decided"


def more_runs(
    x: np.ndarray, se: np.ndarray, at: float, scatter: float, centre: float, half: float, runs: int, most: int = 100
) -> str:
    """Seeds at each point with which the interval, of half-width `half` with `runs`, would exclude 1 or lie within 5 % of it,
    about the same line."""
    if len(x) < 3:
        return "two sizes do not show how far sizes scatter: add a third"

    def error(seeds: int) -> float:
        weights = 1 / (se**2 * runs / seeds + scatter**2)
        x_mean = (weights * x).sum() / weights.sum()
        return math.sqrt(1 / weights.sum() + (at - x_mean) ** 2 / (weights * (x - x_mean) ** 2).sum() + scatter**2)

    def decided(seeds: int) -> bool:
        left = half * error(seeds) / error(runs)
        return abs(centre) > left or abs(centre) + left < NOTHING

    enough = next((n for n in range(runs + 1, most + 1) if decided(n)), None)
    if enough is None:
        return f"not even {most} seeds a point would decide at these sizes: add one nearer to the size asked for"
    return f"about {enough} seeds a point instead of {runs} would decide"


# ---------------------------------------------------------------- loss against parameters and tokens


@dataclass(frozen=True)
class JointLaw:
    """L(N, D) = floor + size_factor N^-size_exponent + token_factor D^-token_exponent (Hoffmann et al. 2022, approach 3),
    N in units of `unit_n` parameters and D of `unit_d` tokens. `half` has the half-widths of the intervals, by name."""

    floor: float
    size_factor: float
    size_exponent: float
    token_factor: float
    token_exponent: float
    unit_n: float
    unit_d: float
    rms: float
    half: dict[str, float]

    def loss(self, parameters, tokens):
        n, d = parameters / self.unit_n, tokens / self.unit_d
        return self.floor + self.size_factor * n**-self.size_exponent + self.token_factor * d**-self.token_exponent

    def words(self, name: str) -> str:
        return f"{getattr(self, name):.3g} +- {self.half[name]:.2g}"


LAW_FIELDS = ("floor", "size_factor", "size_exponent", "token_factor", "token_exponent")


def fit_joint(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> JointLaw | None:
    """Least squares by scipy's curve_fit, intervals from its covariance and Student's t; None where the runs do not determine
    five parameters: fewer than seven, or of fewer than three sizes or two budgets a size, or a fit that runs away or ends at
    a bound."""
    n, d, y = (np.asarray(v, float) for v in (parameters, tokens, losses))
    if len(y) < 7 or len(np.unique(n)) < 3 or len({*zip(n, d, strict=True)}) < 7:
        return None
    unit_n, unit_d = (float(np.exp(np.log(v).mean())) for v in (n, d))

    def law(at, floor, a, alpha, b, beta):
        return floor + a * at[0] ** -alpha + b * at[1] ** -beta

    spread = max(float(np.ptp(y)), 1e-3)
    bounds = ([0, 0, 0.01, 0, 0.01], [y.min(), 100 * spread, 3, 100 * spread, 3])
    best = None
    for start in ([0.9 * y.min(), spread / 3, 0.3, spread / 3, 0.3], [0.5 * y.min(), spread, 0.1, spread, 0.1]):
        try:
            found = optimize.curve_fit(law, np.stack([n / unit_n, d / unit_d]), y, start, bounds=bounds, max_nfev=20000)
        except RuntimeError:  # no convergence from here
            continue
        squares = float(((law([n / unit_n, d / unit_d], *found[0]) - y) ** 2).sum())
        if best is None or squares < best[0]:
            best = squares, *found
    if best is None or not np.isfinite(best[2]).all():
        return None
    squares, values, covariance = best
    low, high = np.asarray(bounds, float)
    if (np.minimum(values - low, high - values) < 1e-6 * (high - low)).any():  # the rest would be what rounding makes of it
        return None
    half = stats.t.ppf((1 + LEVEL) / 2, max(1, len(y) - 5)) * np.sqrt(np.diag(covariance))
    rms = math.sqrt(squares / len(y))
    return JointLaw(*map(float, values), unit_n, unit_d, rms, dict(zip(LAW_FIELDS, map(float, half))))
