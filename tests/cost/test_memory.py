"""The cost model's memory against a real process; activation checkpointing against the pass that keeps all."""

import dataclasses
import sys

import forks
import pytest
import torch
from shared import ROOT

from config import resolve
from cost.step import record_step
from model import GPT

SHAPE = ("--track", "cpu", "--layers", "3", "--heads", "3", "--width", "96", "--dtype", "fp32")

# Two steps after small ones that load and set up the libraries; prints by how much the peak of the process's memory grew. The
# allocator gives back what is freed: by default glibc keeps freed blocks, and the same steps were seen to take up to 1.7 times.
MEASURE = """
import ctypes, dataclasses, sys, torch, optimizers
for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    assert ctypes.CDLL(None).mallopt(parameter, 65536)
from config import resolve
from engine import hardware
from model import GPT

def steps(config, sequences):
    gpt = GPT(config)
    optimizer = optimizers.build(sys.argv[1], gpt, 1000)
    tokens = torch.randint(256, (sequences, config.sequence_length))
    for _ in range(2):
        gpt(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

_, config, _ = resolve(sys.argv[3:])
steps(dataclasses.replace(config, layers=1, width=32, heads=1, sequence_length=16), 1)
before = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
steps(config, int(sys.argv[2]))
print(hardware.peak_memory(torch.device("cpu")) - before)
"""


def memory_of(flags: list[str], sequences: int, device: str):
    config, model_config, _ = resolve(flags)
    tokens = sequences * model_config.sequence_length
    config = dataclasses.replace(config, batch_tokens=tokens, micro_batch_tokens=tokens)
    return record_step(config, model_config, dtype=torch.float32, device=device).memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("optimizer", "sequences", "flags"),
    [("adamw", 12, ()), ("muon", 12, ("--tricks", "modern", "--checkpoint-activations"))],
)
@pytest.mark.slow
def test_predicted_peak_is_the_measured_one(optimizer, sequences, flags):
    """Resident memory of a real process."""
    words = [*SHAPE, *flags]
    measured = forks.run([sys.executable, "-c", MEASURE, optimizer, str(sequences), *words], cwd=ROOT, check=True).stdout
    total = memory_of([*words, "--optimizer", optimizer], sequences, "cpu").total
    assert total == pytest.approx(int(measured), rel=0.1)


@pytest.mark.parametrize("flags", [(), ("--tricks", "modern"), ("--dropout", "0.2")])
@pytest.mark.slow
def test_checkpointed_activations_give_the_same_gradients(flags):
    _, config, _ = resolve(["--track", "tiny", *flags])
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
        memory_of(["--track", "tiny", *flags, "--layers", "6", *own], 8, "cpu").activations
        for own in ((), ("--checkpoint-activations",))
    )
    assert again < kept / 2.5
