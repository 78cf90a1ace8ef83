"""The search for an arm's horizon, on arms whose true horizon is known."""

import math
import random

import pytest

from lab.horizon import FIRST_SEED, search


def arm(right: float, noise: float = 0.0, slope: float = 0.1, target: float = 1.13):
    """Mean loss falls by `slope` a doubling and meets the target at `right` steps."""

    def run(steps: int, seed: int) -> float:
        return target - slope * math.log2(steps / right) + noise * random.Random(f"{right} {steps} {seed}").gauss(0, 1)

    return run


@pytest.mark.parametrize("first", [50, 300, 331, 2400])
def test_the_horizon_is_found_from_either_side(first):
    found = search(arm(331), first, 1.13, most=9600).found
    assert found.steps == pytest.approx(331, rel=1e-6) and found.low == pytest.approx(found.high)


def test_noise_widens_the_interval_which_holds_the_truth():
    results = [search(arm(331 + i, noise=0.004), 400, 1.13, most=9600) for i in range(40)]
    assert sum(r.found.low <= 331 + i <= r.found.high for i, r in enumerate(results)) >= 34  # of 40 at 95 %
    assert all(len({(steps, seed) for steps, seed, _ in r.runs}) == len(r.runs) for r in results)
    assert all(seed >= FIRST_SEED for r in results for _, seed, _ in r.runs)


def test_a_target_out_of_reach_is_said():
    hopeless = search(lambda steps, seed: 2.0, 100, 1.13, most=400)
    assert hopeless.found is None and "within 400 steps" in hopeless.why and hopeless.runs[-1][0] == 400
    assert (
        "diverged" in search(lambda steps, seed: math.inf if seed > FIRST_SEED else arm(331)(steps, seed), 300, 1.13, 999).why
    )
    assert "the least" in search(lambda steps, seed: 1.0, 100, 1.13, most=400).why
