"""scaling.py: published figures come out again, known truths give the right verdicts, and a small ladder runs to its report."""

import math
import re

import numpy as np
import pytest
from conftest import ROOT

import scaling
from lab import published, scaling_laws
from lab.scaling_laws import Noise, between, bootstrap, fit, fit_joint, speedup, trend

WEN = ROOT / "tests" / "wen2025_best.csv"  # Wen et al. 2025, arXiv 2509.02046: best loss of each optimizer, size and data ratio

# ---------------------------------------------------------------- published losses


@pytest.fixture(scope="module")
def wen():
    return published.published_speedups(published.read_losses(WEN), "adamw", [1, 2, 4, 8])


@pytest.mark.parametrize(("size", "right"), [("130m", 1.42), ("300m", 1.30), ("520m", 1.30), ("1.2b", 1.18)])
def test_muon_of_wen_et_al(wen, size, right):
    """Their speed-ups to two decimals. Our losses are rounded to four, which is worth 0.001 of a speed-up more."""
    (found,) = [s for row, s in wen["speedups"] if (row.optimizer, row.size, row.ratio) == ("muon", size, 1)]
    assert found.inside and found.ratio == pytest.approx(right, abs=0.005 + 0.001)


@pytest.mark.parametrize(
    ("size", "right"),
    [("130m", (0.4179, 0.4950, 3.1113)), ("300m", (0.3498, 0.4774, 2.9130)), ("520m", (0.3417, 0.3973, 2.7627)),
     ("1.2b", (0.2394, 0.4848, 2.6649))],
)  # fmt: skip
def test_adamw_curves_of_wen_et_al(wen, size, right):
    curve, amounts, losses = wen["curves"][size]
    assert (curve.alpha, curve.exponent, curve.floor) == pytest.approx(right, abs=0.0015)
    own = [curve.alpha, curve.exponent, curve.floor]
    squares = lambda a, b, c: sum((a * d**-b + c - y) ** 2 for d, y in zip(amounts[:4], losses[:4]))  # noqa: E731
    assert squares(*own) <= squares(*right)  # least squares: nothing near is better
    assert curve.rms == pytest.approx(math.sqrt(squares(*own) / 4), abs=1e-9)


def test_what_was_held_out_is_missed_and_what_lies_beyond_is_only_bounded(wen):
    miss = {size: value for size, ratio, value in wen["checks"] if ratio == 16}
    assert miss == pytest.approx({"130m": 0.010, "300m": 0.006}, abs=0.0006)
    found = {(row.size, row.ratio): s for row, s in wen["speedups"] if row.optimizer == "muon"}
    assert not found["130m", 8].inside and found["130m", 8].words() == "> 1.00x"
    assert found["130m", 8].ratio == pytest.approx(1.41, abs=0.005)  # what the fit would have claimed
    assert found["130m", 8].between == pytest.approx(1.35, abs=0.005)  # between the measured ratios 8 and 16
    assert all(s.inside or math.isinf(s.high) or s.low == 0 for s in found.values())


def test_fit_command(capsys):
    assert scaling.main(["fit", "--losses", str(WEN), "--at", "7B"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| muon | 130m | 1 | 3.4626 | 1.42x | 1.46x |  |" in lines
    assert "| muon | 130m | 8 | 3.2373 | > 1.00x | 1.35x | extrapolated: 1.41x |" in lines
    assert any(line.startswith("muon: fades: ") and "shrinking by" in line for line in lines)
    # one row for every line of the table that is not AdamW's own
    rows = [row for row in published.read_losses(WEN) if row.optimizer != "adamw" and math.isfinite(row.loss)]
    assert sum(line.count(" | ") == 6 for line in lines) == len(rows) + 2  # the head and its rule


@pytest.mark.parametrize(
    ("text", "message"),
    [("optimizer,size,chinchilla\n", "no column 'best_loss'"), ("optimizer,size,chinchilla,best_loss\n", "is empty"),
     ("optimizer,size,chinchilla,best_loss\nmuon,130m,1,low\n", "line 2: .*must be numbers"),
     ("optimizer,size,chinchilla,best_loss\nmuon,big,1,3\n", "'big' is no size"),
     ("optimizer,size,chinchilla,best_loss\nmuon,130m,1,3\nmuon,130m,1,3\n", "line 3: .*comes twice"),
     ("optimizer,size,chinchilla,best_loss\nmuon,130m,1,3\n", "--base adamw"),
     ("optimizer,size,chinchilla,best_loss\nadamw,130m,1,3\n", "no size with losses at two")],
)  # fmt: skip
def test_bad_table(tmp_path, capsys, text, message):
    path = tmp_path / "losses.csv"
    path.write_text(text)
    assert scaling.main(["fit", "--losses", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


# ---------------------------------------------------------------- curves


def test_a_curve_gives_back_its_own_parameters():
    x = np.array([3e5, 6e5, 1.2e6, 2.4e6, 4.8e6])
    curve = fit(x, 40 * x**-0.3 + 1.1)
    assert (curve.alpha, curve.exponent, curve.floor) == pytest.approx((40, 0.3, 1.1), rel=1e-4)
    assert curve.amount(curve.loss(1e6)) == pytest.approx(1e6) and curve.amount(1.0) == math.inf
    assert fit(x, 1 + x * 1e-7) is None  # a loss that rises
    two = fit([1, 4], [3.0, 2.8])  # two budgets: nearly a straight line in log tokens
    assert two.amount(2.9) == pytest.approx(2, rel=0.02) and between([1, 4], [3.0, 2.8], 2.9) == pytest.approx(2)
    with pytest.raises(ValueError, match="two or more budgets"):
        fit([1, 1], [3.0, 2.9])


def test_a_speedup_is_a_figure_inside_and_a_bound_outside():
    x, law = np.array([0.5, 1, 2]), lambda d: 1 + d**-0.4
    curve = fit(x, law(x))
    inside = speedup(curve, x, law(x), law(1.3), 1)
    assert inside.inside and inside.ratio == pytest.approx(1.3, rel=1e-3) and inside.words() == "1.30x"
    above, below = speedup(curve, x, law(x), law(3), 1), speedup(curve, x, law(x), law(0.3), 1)
    assert (above.low, above.high, above.words()) == (2, math.inf, "> 2.00x") and not above.inside
    assert (below.low, below.high, below.words()) == (0, 0.5, "< 0.50x") and math.isnan(below.between)


def test_joint_law_gives_back_its_exponents():
    rng = np.random.default_rng(0)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e5, 4e6, 5), np.geomspace(3e5, 9e6, 4)))
    losses = 0.8 + 3 * n**-0.2 + 30 * d**-0.35 + 1e-4 * rng.standard_normal(len(n))
    law = fit_joint(n, d, losses)
    assert (
        abs(law.size_exponent - 0.2) < law.half["size_exponent"] and abs(law.token_exponent - 0.35) < law.half["token_exponent"]
    )
    assert law.half["token_exponent"] < 0.05 and law.rms < 2e-4
    assert law.loss(1e6, 2e6) == pytest.approx(0.8 + 3 * 1e6**-0.2 + 30 * 2e6**-0.35, abs=1e-3)
    assert fit_joint(n[:4], d[:4], losses[:4]) is None


# ---------------------------------------------------------------- trends of known truth

SIZES = np.array([98e3, 332e3, 786e3, 1.54e6, 4.2e6])


def measured(truth: float, rng: np.random.Generator, sd=0.003, seeds=3, budgets=(0.5, 1, 2)):
    """Runs of a base and a trick that is `truth` times as fast -> its measured speed-up and the bootstrap's draws."""
    law = lambda d: 0.9 + 0.25 * d**-0.35  # noqa: E731
    x = np.repeat(budgets, seeds).astype(float)
    y, own = law(x) + sd * rng.standard_normal(len(x)), law(truth) + sd * rng.standard_normal(seeds)
    noise = Noise.pooled([*(y[x == b] for b in budgets), own])
    return speedup(fit(x, y), x, y, own.mean(), 1).ratio, bootstrap(x, y, 1, own, noise, seed=1, draws=500)


def test_bootstrap_interval_covers_the_true_speedup():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(200):
        _, draws = measured(1.3, rng)
        low, high = scaling_laws.interval(draws)
        hits.append(low <= math.log(1.3) <= high)
    assert 0.91 <= np.mean(hits) <= 0.99  # 95 %, +- 2.6 standard errors


def judged(truth, scatter: float, se: float, trials: int, at: float):
    """Trends of `trials` experiments in which the sizes' true speed-ups lie about `truth` with that scatter."""
    rng = np.random.default_rng(2)
    for k in range(trials):
        right = np.log([truth(n) for n in SIZES]) + scatter * rng.standard_normal(len(SIZES))
        y = right + se * rng.standard_normal(len(SIZES))
        found = trend(SIZES, np.exp(y), y + se * rng.standard_normal((600, len(SIZES))), at, 3, seed=k)
        yield found, truth(at) * math.exp(scatter * rng.standard_normal())


@pytest.mark.parametrize("scatter", [0, 0.05])
def test_prediction_intervals_cover(scatter):
    found = list(judged(lambda n: 1.5 * (n / 98e3) ** -0.05, scatter, 0.02, 200, 20e6))
    assert np.mean([t.low <= right <= t.high for t, right in found]) > 0.92
    assert np.median([t.high / t.low for t, _ in found]) < (1.25 if scatter == 0 else 1.6)  # and are not merely wide


@pytest.mark.parametrize(
    ("truth", "right", "least"),
    [(lambda n: 1.3, "survives", 0.95), (lambda n: 0.8, "reverses", 0.95), (lambda n: 1.6 * (n / 98e3) ** -0.1, "fades", 0.8),
     (lambda n: 1.0, "not decided", 0.5)],
)  # fmt: skip
def test_verdicts_of_known_truths(truth, right, least):
    verdicts = [t.verdict for t, _ in judged(truth, 0, 0.02, 100, 12e6)]
    assert verdicts.count(right) >= least * len(verdicts), {v: verdicts.count(v) for v in verdicts}
    wrong = {"survives": "reverses", "reverses": "survives"}.get(right, "survives")
    assert verdicts.count(wrong) <= 0.05 * len(verdicts)


def test_a_gain_that_is_surely_nothing_vanishes_and_an_open_question_says_what_it_takes():
    assert {t.verdict for t, _ in judged(lambda n: 1.0, 0, 0.002, 20, 12e6)} == {"vanishes"}
    open_ones = [t for t, _ in judged(lambda n: 1.08, 0, 0.05, 60, 12e6) if t.verdict == "not decided"]
    assert open_ones and all("would decide" in t.why for t in open_ones)
    needed = [int(t.why.split()[1]) for t in open_ones if t.why.startswith("about")]
    assert needed and min(needed) > 3


def test_the_line_meets_one_where_it_should():
    y = np.log(1.4) - 0.08 * np.log(SIZES / SIZES[0])
    found = trend(SIZES, np.exp(y), y + 0.005 * np.random.default_rng(0).standard_normal((1000, 5)), 20e6, 3)
    right = SIZES[0] * math.exp(math.log(1.4) / 0.08)
    assert found.crossing == pytest.approx(right, rel=0.01) and found.crossing_low < right < found.crossing_high
    assert found.slope == pytest.approx(-0.08) and "shrinking by 17% a decade" in found.words()
    with pytest.raises(ValueError, match="two sizes"):
        trend(SIZES[:1], [1.3], np.zeros((10, 1)), 20e6, 3)
