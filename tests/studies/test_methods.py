"""Studies 1 to 9: the number of each claim in a quick run. Beside each margin: what seeds 0 to 4 gave."""

import csv
import json
import math
from itertools import pairwise

import pytest
import torch

import optimizers
from studies import adam_fails, algoperf, common, images_and_words, least_squares, muon_is_shampoo, noise_floor

# isort: split
from studies import rare_tokens, rosenbrock, speedrun

pytestmark = pytest.mark.usefixtures("one_thread")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def figures_of(study, **options) -> dict:
    """Of a quick run; json can store them, and a picture and a sentence come of them."""
    figures = json.loads(json.dumps(study.run(quick=True, **options), allow_nan=False))
    assert study.draw(figures).axes and len(study.verdict(figures)[1]) > 40
    return figures


# ---------------------------------------------------------------- the toy problems and the registry


def test_newton_finds_the_minimum():
    w, value = noise_floor.minimum()
    w.requires_grad_(True)
    (gradient,) = torch.autograd.grad(noise_floor.losses(w, *noise_floor.data()).sum(), w)
    assert gradient.norm() < 1e-12
    assert value < noise_floor.losses(torch.zeros_like(w), *noise_floor.data()).item()


@pytest.mark.slow
def test_logistic_regression_is_solved():
    """By one method of each kind of state, on full gradients; without weight decay, which would move the minimum."""
    (X, y), best = noise_floor.data(), noise_floor.minimum()[1]
    X, y = X.float(), y.float()
    for name in ("sgd", "adamw", "lion", "amos", "prodigy", "schedule_free_adamw", "muon", "shampoo", "soap", "kron"):
        point = noise_floor.Point(torch.zeros(1, noise_floor.FEATURES))
        spec = rosenbrock.without_decay(f"{name}:warmup=10" if "free" in name else name, optimizers.OPTIMIZERS[name].toy_lr)
        common.train(point, spec, lambda step: (), 400, loss=lambda point: noise_floor.losses(point.w, X, y).sum())
        gap = noise_floor.losses(point.w.detach().double(), X.double(), y.double()).item() - best
        assert -1e-12 < gap < 1e-6, name


@pytest.mark.parametrize(
    ("name", "rate"),
    {"sgd": 1e-3, "adamw": 0.05, "lion": 0.03, "muon": 0.03, "soap": 0.05, "schedule_free_adamw": 0.2}.items(),
)
def test_the_valley_is_descended(name, rate):
    """Rosenbrock's own, with the factor 100, without noise."""
    spec, start = rosenbrock.without_decay(name, rate), (-1.2, 1.0)
    assert rosenbrock.valley(torch.tensor(start), 100.0).item() == pytest.approx(24.2)
    path = rosenbrock.path(spec, 1000, start=start, factor=100.0, noise=0.0, schedule="linear")
    assert rosenbrock.valley(path[-1, 0], 100.0) < (0.2 if name == "sgd" else 0.02)


# ---------------------------------------------------------------- studies


@pytest.mark.slow
def test_noise_floor():
    f = figures_of(noise_floor)
    assert 3.6 < mean(f["floor ratios"]) < 4.4  # 3.74 to 4.11
    assert -1.15 < mean(f["slopes"]) < -0.85  # -1.05 to -0.96
    assert -1.15 < mean(f["slopes with momentum"]) < -0.85  # -1.05 to -1.00
    assert f["GD straightness"] > 0.999  # 0.99997


@pytest.mark.slow
def test_least_squares():
    f = figures_of(least_squares)
    assert max(f["ends"][2]) < 1e-13  # 2e-15 at most: consistent, step 1 / L: machine precision
    floors = [mean(of) for of in f["floors"]]
    assert all(after > 1.4 * before for before, after in pairwise(floors))  # 1.69 to 4.4 times
    assert floors[0] > 0.05 and min(f["ends"][-1]) > 1e6  # 0.062 to 0.069: never 0; above 2 / L: 6e12 and more


@pytest.mark.slow
def test_adam_fails():
    f = figures_of(adam_fails)
    assert mean(f["ends"]["Adam"]) > 0.8  # 0.90 to 0.93: the worst point is 1
    assert mean(f["ends"]["Adam"]) - mean(f["ends"]["AMSGrad"]) > 0.3  # 0.37 to 0.43
    assert mean(f["ends"]["SGD"]) < 0.05  # -0.06 to -0.03, and more with more steps


def test_muon_is_shampoo():
    f = figures_of(muon_is_shampoo)
    assert f["Gaussian"]["errors"]["formula, fp64"] < 1e-12
    assert f["GPT"]["errors"]["formula, fp64"] < 1e-5
    assert f["Gaussian"]["errors"]["Shampoo, fp32"] < 1e-3
    low, high = muon_is_shampoo.BAND
    assert all(low < value < high for value in muon_is_shampoo.within(f)) and len(muon_is_shampoo.within(f)) > 250


def test_algoperf_and_speedrun():
    """Nothing is drawn by chance: all scores to four digits, and the history as the CSV has it."""
    f = figures_of(algoperf)
    assert len(f["ours"]) == 11 and all(abs(ours - right) < 6e-5 for ours, right in zip(f["ours"], f["published"]))
    assert algoperf.verdict(f)[0]
    f = figures_of(speedrun)
    with speedrun.HISTORY.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["record"].startswith("T1-")]
    assert [(row["record"], row["date"], row["description"]) for row in rows] == [
        (of["record"], of["date"], of["what"]) for of in f["records"]
    ]
    assert all(of["seconds"] == float(row["train_time_s"] or 2738.4) for of, row in zip(f["records"], rows, strict=True))
    assert speedrun.verdict(f)[0]


@pytest.mark.slow
def test_images_and_words():
    f = figures_of(images_and_words)
    for task in ("images", "words"):
        assert all(end < start for of in f[task]["finals"].values() for end, start in zip(of, f[task]["starts"]))


@pytest.mark.slow
def test_rare_tokens():
    """The control is the claim: without noise SGD falls behind on rare classes, and only there."""
    f = figures_of(rare_tokens)
    assert mean(rare_tokens.gaps(f, "zipf", -1)) > 2.5  # 3.27 to 3.32
    assert mean(rare_tokens.gaps(f, "zipf", 0)) < 1
    assert abs(mean(rare_tokens.gaps(f, "balanced", -1))) < 0.3  # 0.16 to 0.17
    counts = torch.tensor([5, 3, 1, 1])
    assert rare_tokens.groups_of(counts).tolist() == [2, 6, 8, 9]
    assert torch.bincount(rare_tokens.classes("zipf", 3)).tolist() == [8, 4, 4, 2, 2, 2, 2, *[1] * 8]


@pytest.mark.slow
def test_rare_tokens_of_a_run(train):
    f = rare_tokens.run(folder=train("--steps", "30"))
    assert f["losses"][0] < f["losses"][-1] and rare_tokens.draw(f).axes and "the rarest tenth" in rare_tokens.verdict(f)[1]


def test_training_ends_at_a_loss_that_is_not_finite():
    point = noise_floor.Point(torch.ones(1, 2))
    losses = common.train(point, "sgd:lr=1e30,momentum=0", lambda step: (), 5, loss=lambda point: point.w.square().sum())
    assert len(losses) == 5 and losses[0] == 2 and math.isinf(losses[-1])
