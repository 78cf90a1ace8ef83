"""A training run on a CUDA GPU is the run that a CPU makes: ./run.sh test --device cuda.

Kernels, attention and compiled code are checked there by test_kernels.py, test_attention.py and test_compile.py.
"""

import json

import pytest
import torch
from shared import losses, result, torchrun
from test_train import GOLDEN, GOLDEN_FLAGS, GOLDEN_TOLERANCE

import tricks
from config import resolve
from cost.predict import predict

# without 16-bit numbers of Muon's own, which it would take on a GPU
OPTIMIZER = ("--optimizer", tricks.merge_optimizer(resolve(["--track", "tiny", *GOLDEN_FLAGS])[0].optimizer, "muon:dtype=fp32"))


@pytest.fixture
def gpu(device, request) -> str:
    if device.type == "cpu" and not request.config.getoption("--device"):
        pytest.skip("needs a CUDA GPU; to rehearse it on a CPU: --device cpu")
    return device.type


def test_losses_are_those_of_a_cpu(gpu, train):
    folder, golden = train(*GOLDEN_FLAGS, *OPTIMIZER, "--device", gpu), json.loads(GOLDEN.read_text())
    for kind in ("train", "val"):
        assert losses(folder, kind) == pytest.approx(golden[kind], rel=GOLDEN_TOLERANCE)


def test_two_ranks_are_one(gpu, train, tmp_path):
    if gpu == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    flags = ("--steps", "8", "--tricks", "modern,muon", *OPTIMIZER, "--micro-batch-tokens", "128", "--device", gpu)
    one, two = train(*flags, out="one"), tmp_path / "two"
    torchrun(2, two, *flags)
    for kind in ("train", "val"):
        assert losses(two, kind) == pytest.approx(losses(one, kind), rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_compiled_is_eager(dtype, tolerance, gpu, train):
    """By Inductor; in bf16 with the Triton kernels inside."""
    if gpu == "cpu" and dtype == "bf16":
        pytest.skip("not every CPU has bf16")
    flags = ("--steps", "4", "--layers", "1", "--tricks", "record", "--dtype", dtype, "--device", gpu)
    eager, compiled = train(*flags, "--no-compile", out="eager"), train(*flags, "--compile", out="compiled")
    assert losses(compiled) == pytest.approx(losses(eager), rel=tolerance)


@pytest.mark.parametrize("tricks", ["baseline", "modern,muon"])
def test_memory_is_the_predicted_one(tricks, gpu, train):
    """Of tensors, at GPT-2's width and vocabulary."""
    if gpu == "cpu":
        pytest.skip("of a CPU: tests/cost/test_memory.py")
    flags = [
        "--steps",
        "3",
        "--tricks",
        tricks,
        "--layers",
        "6",
        "--width",
        "768",
        "--heads",
        "12",
        "--sequence-length",
        "1024",
    ]
    flags += ["--vocab-size", "50304", "--batch-tokens", "16384", "--dtype", "bf16", "--no-compile"]
    torch.cuda.reset_peak_memory_stats()
    peak = result(train(*flags, "--device", gpu))["peak_memory"]
    said = predict(["--track", "tiny", *flags, "--hardware", "here", "--world-size", "1"])
    assert said.step.memory.total == pytest.approx(peak, rel=0.1)
