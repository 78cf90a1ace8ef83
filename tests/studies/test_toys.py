"""The two problems that can be understood: what each optimizer reaches, and where SGD stalls."""

import pytest
import torch

from engine.spec import UsageError
from studies import toys


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_newton_finds_the_minimum():
    w, value = toys.minimum()
    w.requires_grad_(True)
    X, y = (x.double() for x in toys.data())
    (gradient,) = torch.autograd.grad(toys.logistic(w, X, y), w)
    assert gradient.norm() < 1e-12
    assert value < toys.logistic(torch.zeros_like(w), X, y)


@pytest.mark.slow
def test_logistic_regression_is_solved():
    """By one method of each kind of state: the page draws them all."""
    for name in ("sgd", "adamw", "lion", "amos", "prodigy", "schedule_free_adamw", "muon", "shampoo", "soap", "kron"):
        gaps = toys.logistic_gaps(name)
        assert gaps[0] > 0.05 and -1e-12 < gaps[-1] < toys.TOLERANCE, name


@pytest.mark.parametrize("name", toys.VALLEY)
def test_the_valley_is_descended(name):
    start = toys.rosenbrock(torch.tensor([[-1.2, 1.0]]))
    assert start == pytest.approx(24.2)
    assert toys.rosenbrock(toys.valley_path(name)[-1]) < (0.2 if name == "sgd" else 0.02)


@pytest.mark.slow
def test_a_constant_step_stalls_at_its_noise_floor_and_a_falling_one_does_not():
    ends = [
        toys.noise_gaps(rate, falls, seed=0, steps=1500)[-375:] for rate, falls in ((0.1, False), (0.01, False), (0.1, True))
    ]
    large, small, falling = (sum(gaps) / 375 for gaps in ends)
    assert 0.02 < large < 0.1
    assert 5 < large / small < 20  # the floor is proportional to the step
    assert falling < small / 5


@pytest.mark.slow
def test_the_command_draws_and_refuses(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(toys, "noise_gaps", lambda rate, falling, seed: [rate] * 10)
    toys.main(["--out", str(tmp_path / "toys.png"), "adamw", "muon"])
    assert (tmp_path / "toys.png").stat().st_size > 20_000
    with pytest.raises(UsageError, match="did you mean 'muon'"):
        toys.main(["muonn"])
