"""Memory that a training step takes on one rank, found without taking it.

The step itself is run on torch's fake tensors, which have shapes and no contents, and every storage that lives is counted: so
each architecture, optimizer and dtype is right by construction, with nothing to keep in step with the model. What is counted
is what tensors hold. Not counted: the allocator's rounding and fragments, workspaces inside kernels, the CUDA context,
what torch.compile fuses away; HEADROOM is left for them. tests/test_memory.py holds this against measured peaks.
"""

import dataclasses
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optimizers
from model import GPT, ModelConfig, parameter_counts
from optimizers import OPTIMIZERS
from spec import split

HEADROOM = 0.9  # of a device's memory may be planned for


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.count(value.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self.known:
            return
        key, size = id(storage), storage.nbytes()

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The first four are parts; not all of them are there at once."""

    weights: float
    gradients: float
    optimizer_state: float  # as on one rank: the matrix methods share theirs over the ranks
    activations: float  # kept from the forward for the backward pass of one micro-batch
    backward: float  # the most that there is while gradients are computed
    update: float  # and while the optimizer steps

    @property
    def peak(self) -> float:
        return max(self.backward, self.update)


def of_step(
    config: ModelConfig, optimizer: str, sequences: int, dtype: torch.dtype = torch.float32, accumulate: bool = False
) -> Memory:
    """Of training steps after the first, with micro-batches of `sequences`.

    accumulate: gradients are there from the beginning: several micro-batches a step, or several ranks, whose gradients live
    in DDP's buckets.
    """
    with FakeTensorMode(), LiveBytes() as live:
        gpt = GPT(config)
        gpt.compute_dtype = dtype
        weights = live.now
        built = optimizers.build(optimizer, gpt, 1000)
        for p in set(gpt.parameters()) - set(gpt.tables()):
            p.grad = torch.zeros_like(p)
        tokens = torch.zeros(sequences, config.sequence_length, dtype=torch.int64)
        try:
            built.step()  # makes the state
            state = optimizers.state_bytes(built)
        except DataDependentOutputException:  # its step reads a number, which fake tensors do not have
            state = OPTIMIZERS[split(optimizer)[0]].state_per_parameter * parameter_counts(gpt)["total"]
            built = None
        gpt.zero_grad(set_to_none=not accumulate)
        live.peak = before = live.now
        loss = gpt(tokens, tokens)
        activations = live.now - before
        loss.backward()
        del loss
        backward, live.peak = live.peak, live.now
        gradients = sum(p.grad.untyped_storage().nbytes() for p in gpt.parameters() if p.grad is not None)
        if built is None:
            return Memory(weights, gradients, state, activations, backward + state, live.now + state)
        built.step()
        return Memory(weights, gradients, optimizers.state_bytes(built), activations, backward, live.peak)


def estimate(
    config: ModelConfig, optimizer: str, sequences: int, dtype: torch.dtype = torch.float32, accumulate: bool = False
) -> Memory:
    """`of_step`, of deep models by a straight line through 3 and 6 layers: every further block adds as much."""
    if config.layers <= 6:
        return of_step(config, optimizer, sequences, dtype, accumulate)
    shallow, deeper = (
        dataclasses.astuple(of_step(dataclasses.replace(config, layers=n), optimizer, sequences, dtype, accumulate))
        for n in (3, 6)
    )
    return Memory(*(a + (b - a) * (config.layers - 3) / 3 for a, b in zip(shallow, deeper, strict=True)))
