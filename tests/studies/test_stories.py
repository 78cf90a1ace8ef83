"""What the quick runs of initialisation, escaping, exponential_rate, double_descent and grokking must show."""

import math

import pytest
import torch

from studies import double_descent, escaping, exponential_rate, grokking, initialisation


def test_initialisation():
    equal = initialisation.equal_units(3)
    assert equal["same"] and equal["moved"] > 0.005
    short = initialisation.of_depth(22, 100, 1, 0)
    ends = {name: part["losses"][:, -20:].mean().item() for name, part in short.items()}
    assert ends["He"] < 1.8 < 2.2 < ends["Xavier"]  # 1.31, 1.06, 1.17 and 2.303 each with seeds 0, 1 and 2
    # each layer multiplies the mean square by n s^2 / 2: 1/2 for Xavier, over 20 layers within its scatter
    squares = short["Xavier"]["squares"]
    assert math.log2(squares[0] / squares[-1]) == pytest.approx(20, abs=6)


def test_escaping():
    figures = escaping.run(quick=True)
    home = {name: sum(share) / len(share) for name, share in figures["share"].items()}
    assert figures["moved"] == 0 and home["gd"] == pytest.approx(home["start"])
    assert home["sgd"] > home["gd"] + 0.12  # by 0.20, 0.24 and 0.21 with seeds 0, 7 and 8


def test_wells():
    """The ridges of f are where the number of the well changes."""
    x = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    y = escaping.f(x)
    ridges = x[1:-1][(y[1:-1] > y[:-2]) & (y[1:-1] > y[2:])]
    changes = x[1:][escaping.well(x).diff() != 0]
    assert len(ridges) == len(changes) == 8 and (ridges - changes).abs().max() < 2e-4


def test_exponential_rate():
    figures = exponential_rate.run(quick=True)
    assert max(figures["worst"]) < 1e-10  # the issue asks for 1e-4; 7e-15 and 9e-15 with seeds 0 and 1
    assert min(figures["control"], figures["plain"]) > 0.05  # 0.09 and 0.4, 0.1 and 0.5
    root = exponential_rate.larger_root(0.9, 0.02, 0.008)
    assert root**2 - (1 + 0.9 - 0.02 * 0.008) * root + 0.9 == pytest.approx(0, abs=1e-15) and 0.9 < root < 1
    net = exponential_rate.Net(0, True)
    x = torch.randn(3, 16, dtype=torch.float64)
    before = net(x)
    with torch.no_grad():
        net.layers[1].mul_(7)
    assert torch.allclose(net(x), before, rtol=1e-12)


def test_double_descent():
    figures = double_descent.run(quick=True)
    for name, part in figures.items():
        assert abs(part["peak"] - part["samples"]) <= 1, name
    assert figures["features"]["second"] < 0.5 * figures["features"]["first"]
    assert max(figures["features"]["median"]) > 10 * figures["features"]["first"]


def test_minimum_norm_fits():
    features, y = torch.randn(1, 5, 9, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    w = double_descent.minimum_norm(features, y)
    assert torch.allclose(features[0] @ w[0], y[0]) and torch.allclose(
        w, torch.linalg.lstsq(features[0], y[0], driver="gelsd")[0]
    )


@pytest.mark.slow
def test_memorised_before_understood():
    seen = grokking.run(quick=True)["AdamW"]
    known = grokking.first(seen, "train")
    assert known == 100 and max(seen["val"]) < 0.1  # seeds 0, 1 and 2: 100; 0.008 each


def test_first_steps():
    seen = {"step": [50, 100, 150], "train": [0.5, 0.99, 1], "val": [0.1, 0.2, 0.3]}
    assert grokking.first(seen, "train") == 100 and grokking.first(seen, "val") is None
