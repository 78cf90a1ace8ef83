"""The model of memory against what a real process takes, and activation checkpointing against the pass that keeps all."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train_gpt
from lab import memory
from model import GPT

SHAPE = ("--track", "cpu", "--layers", "3", "--heads", "3", "--width", "96")

# Two steps after small ones that load and set up the libraries; prints by how much the peak of the process's memory grew.
MEASURE = """
import dataclasses, sys, torch, hardware, optimizers, train_gpt
from model import GPT

def steps(config, sequences):
    gpt = GPT(config)
    optimizer = optimizers.build(sys.argv[1], gpt, 1000)
    tokens = torch.randint(256, (sequences, config.sequence_length))
    for _ in range(2):
        gpt(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

_, config, _ = train_gpt.resolve(sys.argv[3:])
steps(dataclasses.replace(config, layers=1, width=32, heads=1, sequence_length=16), 1)
before = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
steps(config, int(sys.argv[2]))
print(hardware.peak_memory(torch.device("cpu")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("optimizer", "sequences", "flags"),
    [("adamw", 24, ()), ("muon", 24, ("--tricks", "modern", "--checkpoint-activations"))],
)
def test_predicted_peak_is_the_measured_one(optimizer, sequences, flags):
    """Resident memory of a real process, with an allocator told to give back what is freed: by default glibc keeps freed
    blocks, and the same steps were seen to take up to 1.7 times as much."""
    words = [*SHAPE, *flags]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, optimizer, str(sequences), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1000:]
    _, config, _ = train_gpt.resolve(words)
    predicted = memory.of_step(config, optimizer, sequences)
    assert predicted.peak == pytest.approx(int(done.stdout), rel=0.1)


def test_parts_are_what_they_are_known_to_be():
    _, config, _ = train_gpt.resolve([*SHAPE, "--tricks", "modern"])
    n = sum(p.numel() for p in GPT(config).parameters())
    found = memory.of_step(config, "adamw", 4)
    assert found.gradients == 4 * n and found.optimizer_state == pytest.approx(8 * n, rel=0.001)
    assert found.weights == pytest.approx(4 * n, rel=0.05)  # and the tables of rotary positions
    more = memory.of_step(config, "adamw", 4, accumulate=True)
    assert found.peak < more.peak <= found.peak + found.gradients
    # a method whose step cannot be followed is counted by its registered state
    assert memory.of_step(config, "prodigy", 4).optimizer_state == 16 * n


def test_memory_grows_in_a_straight_line_with_depth():
    _, config, _ = train_gpt.resolve([*SHAPE, "--layers", "8", "--attention", "sdpa"])
    line, direct = (f(config, "adamw", 4, torch.bfloat16, True) for f in (memory.estimate, memory.of_step))
    assert dataclasses.astuple(line) == pytest.approx(dataclasses.astuple(direct), rel=0.02)


@pytest.mark.parametrize("flags", [(), ("--tricks", "modern"), ("--dropout", "0.2")])
def test_checkpointed_activations_give_the_same_gradients(flags):
    _, config, _ = train_gpt.resolve(["--track", "tiny", *flags])
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        gpt = GPT(dataclasses.replace(config, checkpoint_activations=checkpointed))
        tokens = torch.randint(config.vocab_size, (3, config.sequence_length))
        for p in gpt.parameters():  # what starts at zero would hide half of the gradients
            torch.nn.init.normal_(p, std=0.05)
        loss = gpt(tokens, tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    assert all(map(torch.equal, *found))
    kept, again = (
        memory.of_step(dataclasses.replace(config, layers=6, checkpoint_activations=c), "adamw", 8).activations
        for c in (False, True)
    )
    assert again < kept / 2.5
