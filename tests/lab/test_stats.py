"""The statistics against scipy's own functions, by simulation, and against published groups of speedrun records."""

import csv
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from shared import ROOT

from lab import stats

RNG = np.random.default_rng(0)
LOSSES = [3.2781, 3.2769, 3.2793, 3.2775, 3.2786]


def p_above(losses, target=3.28) -> float:
    return stats.Sample.of(losses).p_above(target)


def test_p_is_scipys():
    expected = scipy_stats.ttest_1samp(LOSSES, 3.28, alternative="less").pvalue
    assert p_above(LOSSES) == pytest.approx(expected, rel=1e-12)
    assert p_above([3.2, 3.2]) == 0 and p_above([3.3, 3.3]) == 1 and math.isnan(p_above([3.2]))


def test_the_interval_of_a_mean_is_scipys():
    s = stats.Sample.of(LOSSES)
    expected = scipy_stats.t.interval(0.95, 4, loc=np.mean(LOSSES), scale=scipy_stats.sem(LOSSES))
    assert s.interval() == pytest.approx(expected, rel=1e-12)
    assert stats.Sample.of([1.0]).interval() == (-math.inf, math.inf)


def test_a_ratio_is_scipys_paired_test_on_logs():
    a, b = RNG.lognormal(3, 0.1, 8), RNG.lognormal(2, 0.1, 8)
    found, expected = stats.paired_ratio(a, b), scipy_stats.ttest_rel(np.log(a), np.log(b))
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.low < found.ratio < found.high
    back = stats.paired_ratio(b, a)
    assert back.ratio == pytest.approx(1 / found.ratio) and back.p == pytest.approx(found.p)


def test_runs_that_do_not_differ_and_pairs_that_are_none():
    same = stats.paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert (same.ratio, same.low, same.high, same.p) == pytest.approx((2, 2, 2, 0))
    assert stats.paired_ratio([1.0, 1.0], [1.0, 1.0]).p == 1
    for a, b in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 0.0], [1.0, 1.0])):
        with pytest.raises(ValueError, match="want"):
            stats.paired_ratio(a, b)


def test_arms_that_do_not_differ_are_called_different_in_five_of_a_hundred():
    pairs = RNG.lognormal(4, 0.05, (2000, 2, 5))
    wrong = np.mean([stats.paired_ratio(a, b).p < 0.05 for a, b in pairs])
    assert 0.04 <= wrong <= 0.06


def test_power_is_what_simulation_finds():
    sd, gap = 0.0013, 0.0015
    n = stats.runs_needed(gap, sd, alpha=0.01, chance=0.9)
    assert stats.power(n - 1, gap / sd, 0.01) < 0.9 <= stats.power(n, gap / sd, 0.01)
    runs = RNG.normal(3.28 - gap, sd, (4000, n))
    found = np.mean([p_above(r) < 0.01 for r in runs])
    assert found == pytest.approx(stats.power(n, gap / sd, 0.01), abs=0.02)
    seen = stats.smallest_difference(6, 0.02, alpha=0.05, chance=0.8)
    draws = RNG.normal(seen, 0.02, (4000, 6))
    assert np.mean(scipy_stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_power_at_the_edges():
    assert stats.runs_needed(0.0, 1.0) == 1000 and stats.runs_needed(1.0, 0.0) == 2
    assert stats.smallest_difference(1, 0.1) == math.inf and stats.smallest_difference(5, 0.0) == 0
    assert stats.runs_needed(0.001, 1.0, most=50) == 50


def test_horizon_interval_covers_at_its_rate():
    """True line: 1.2 at 256 steps, falling 0.1 a doubling, so that 1.13 is met at 256 x 2^0.7."""
    lengths, right = np.array([256, 362, 512, 512, 256, 362]), 256 * 2**0.7
    covered = []
    for _ in range(2000):
        losses = 1.2 - 0.1 * np.log2(lengths / 256) + RNG.normal(0, 0.01, len(lengths))
        found = stats.horizon(lengths, losses, 1.13)
        covered.append(found is not None and found.low <= right <= found.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_horizon_without_noise_and_without_an_answer():
    lengths = [100, 200, 400]
    exact = stats.horizon(lengths, [3.0, 2.0, 1.0], 1.5)
    assert (exact.steps, exact.low, exact.high, exact.slope) == pytest.approx((100 * 2**1.5,) * 3 + (-1,))
    assert stats.horizon(lengths, [1.0, 1.1, 1.2], 0.9) is None
    unsure = stats.horizon(lengths, [1.2, 1.0, 1.15], 0.5)
    assert unsure.high == math.inf and unsure.low <= unsure.steps
    for bad in ([100, 200], [100, 100, 100]):
        with pytest.raises(ValueError, match="two lengths"):
            stats.horizon(bad, [1.0] * len(bad), 0.5)


def test_published_groups_are_reproduced():
    """The p of every group of repeated speedrun records, from its published mean and standard deviation."""
    with open(ROOT / "records" / "published" / "modded_record_groups.csv") as file:
        groups = [row for row in csv.DictReader(file) if row["p_below_target"]]
    assert len(groups) > 20
    for row in groups:
        mean, sd, n = float(row["mean_val_loss"]), float(row["sd_val_loss"]), int(row["n_runs"])
        target = 2.92 if row["folder"].startswith("track_2") else 3.28
        rounding = [
            stats.Sample(n, mean + dm, sd + ds).p_above(target) for dm in (-5e-6, 5e-6) for ds in (-5e-6, 5e-6) if sd + ds > 0
        ]
        assert min(rounding) - 6e-6 <= float(row["p_below_target"]) <= max(rounding) + 6e-6, row["folder"]
