"""benchmarks/gpu.py as far as it goes without a GPU: small shapes, kernels in Triton's interpreter, and no times."""

import forks
import pytest
import torch
from kernel_cases import numbers_that_numpy_lacks

from benchmarks import gpu
from engine.spec import UsageError
from layers.attention import ATTENTION


@pytest.fixture
def small(monkeypatch):
    sizes = dict(LAYERS=1, ROWS=8, TOKENS=8, WIDTH=16, HIDDEN=32, VOCABULARY=30, COLUMNS=32)
    sizes |= dict(ATTENTION_SHAPE=(2, 2, 48, 16), STEPS=12)
    for name, value in sizes.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "seconds_of", lambda call: float(call() is not None))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.slow
def test_every_form_computes(small):
    cpu = torch.device("cpu")
    with numbers_that_numpy_lacks():
        times = {name: gpu.kernel_times(computation) for name, computation in gpu.computations(cpu).items()}
    kernels = {name.split(",")[0] for name in times}
    assert kernels == {"gram", "polynomial", "orthogonalize", "cross_entropy", "linear_relu2", "fp8_linear"}
    assert all(forms == {"kernel": 1, "torch": 1, "compiled": 1} for forms in times.values())
    for settings in gpu.MASKS.values():
        assert gpu.attention_times(*settings, cpu).keys() == ATTENTION.keys() - {"flex"}


@pytest.mark.slow
def test_a_recipe_trains_on_random_tokens(small, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "subprocess", forks)
    figures = gpu.recipe_figures("tiny", "baseline", tmp_path, 1, "--layers", "1", "--width", "32", "--heads", "1")
    assert figures["tokens_per_second"] == pytest.approx(1024 / figures["step"])
    assert figures["mfu"] is None and figures["predicted"] > 0 and figures["peak_memory"] > figures["predicted_memory"] > 0


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA GPU here"):
        gpu.measure(tmp_path / "gpu.json")
    assert not (tmp_path / "gpu.json").exists()
