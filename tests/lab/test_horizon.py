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


def test_the_interval_holds_the_truth_where_a_seed_shifts_all_its_runs():
    """Of one seed, runs of several lengths had 0.7 to 0.9 of their scatter in common: so each has a seed of its own."""

    def covered(number: int) -> bool:
        dice, common = random.Random(number), {}

        def run(steps: int, seed: int) -> float:
            shift = common.setdefault(seed, dice.gauss(0, 1))
            noise = 0.9 * shift + math.sqrt(1 - 0.9**2) * dice.gauss(0, 1)
            return arm(331)(steps, seed) + 0.004 * noise

        found = search(run, dice.choice((180, 260, 400, 700)), 1.13, most=9600).found
        return found is not None and found.low <= 331 <= found.high

    assert 0.925 <= sum(covered(i) for i in range(1000)) / 1000 <= 0.97


def test_every_run_has_its_own_seed():
    runs = search(arm(331), 1000, 1.13, most=9600).runs
    assert [seed for _, seed, _ in runs] == list(range(FIRST_SEED, FIRST_SEED + len(runs)))


def test_a_target_out_of_reach_is_said():
    hopeless = search(lambda steps, seed: 2.0, 100, 1.13, most=400)
    assert hopeless.found is None and "within 400 steps" in hopeless.why and hopeless.runs[-1][0] == 400
    last = len(search(arm(331), 300, 1.13, 999).runs) - 1
    loss = lambda steps, seed: math.inf if seed == FIRST_SEED + last else arm(331)(steps, seed)  # noqa: E731
    assert "diverged" in search(loss, 300, 1.13, 999).why
    assert "the least" in search(lambda steps, seed: 1.0, 100, 1.13, most=400).why
