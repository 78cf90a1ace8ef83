"""Every operation of a training step, recorded on tensors that have shapes and no memory.

    with Recorder() as recorder:         # all that torch does in here, backward passes and collectives included
        gpt(tokens, targets).backward()
    operations(recorder.events, fused=True, keep=...)      # what a device would do
    peak(recorder.events, fused=True, keep=...)            # bytes that it would hold at most

Matrix products keep their shapes. The operations between them move memory: one pass each, or, under torch.compile, one pass
for all of them, which never writes a value that nobody else needs.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.ranks import WIRE, collective

# FLOPs of one factorisation of an n x n matrix, in n^3 (Golub and Van Loan, Matrix Computations, 4th ed.: 5.2, 8.3).
FACTORISATIONS = {"linalg_qr": 8 / 3, "_linalg_eigh": 9.0, "linalg_solve_triangular": 1.0}
LOOKUPS = ("embedding", "index", "gather", "index_select")


@dataclass(frozen=True)
class Operation:
    """A piece of work of one device.

    kind: product (of matrices), attention, pass (over memory), factorisation, or the name of a collective. bytes: read and
    written; of a collective, those of its larger side. shape: batch, m, n, k of a product.
    """

    kind: str
    bytes: float = 0.0
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()


@dataclass
class Event:
    """One call into torch, or several that run as one: the work (of the first), the storages read and written with the bytes
    touched in each, and, of several, the storages that begin in it."""

    work: Operation
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    created: set[int] = field(default_factory=set)


def touched(tensors: list[Tensor], most: float = math.inf) -> dict[int, int]:
    """Storage -> bytes that reading these tensors touches, at most `most` of each and no more than the storage has."""
    sizes: dict[int, int] = {}
    for t in tensors:
        storage = t.untyped_storage()
        sizes[storage._cdata] = min(storage.nbytes(), sizes.get(storage._cdata, 0) + min(t.nbytes, most))
    return sizes


class _Attention(torch.autograd.Function):
    """Fused causal attention as two events; the scores are never stored (FlashAttention, arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, recorder: "Recorder") -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        ctx.recorder = recorder
        recorder.attention([q, k, v], [out], 1)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors  # once: recomputed activations are handed out once
        grads = [torch.empty_like(t) for t in saved[:3]]
        ctx.recorder.attention([*saved, grad], grads, 2)
        return *grads, None


class _Functions(TorchFunctionMode):
    """On meta tensors PyTorch writes attention out, which a GPU runs fused; and it has no autocast for them."""

    def __init__(self, recorder: "Recorder", autocast: bool):
        super().__init__()
        self.recorder, self.autocast = recorder, autocast

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.autocast and func in (F.linear, F.scaled_dot_product_attention):
            args = [t.to(torch.bfloat16) if isinstance(t, Tensor) else t for t in args]
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], self.recorder)
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records every operation as an Event. autocast: linear layers and attention in bf16, whatever the type of their inputs."""

    def __init__(self, autocast: bool = False):
        super().__init__()
        self.events: list[Event] = []
        self.alive: list[torch.UntypedStorage] = []  # so that no two storages ever have one address
        self.functions = _Functions(self, autocast)

    def __enter__(self) -> "Recorder":
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.functions.__exit__(*exception)

    def attention(self, inputs: list[Tensor], outputs: list[Tensor], passes: int) -> None:
        """Causal: half of 2 products forward, and of twice as many backward (`flops_per_token` counts alike)."""
        B, H, T, D = inputs[0].shape
        work = Operation("attention", flops=passes * 2 * B * H * T * T * D, dtype=inputs[0].dtype)
        self.events.append(Event(work, touched(inputs), touched(outputs)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name.startswith("_fused_"):  # optimizers: in place, without meta kernels
            out = None
        elif name.startswith("_foreach_") and func._overloadname == "Tensor":  # the meta kernel would read a number's value
            out = None if name.endswith("_") else [torch.empty_like(t) for t in args[0]]
        else:
            out = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.alive += [t.untyped_storage() for t in (*inputs, *outputs)]
        if func.namespace == "c10d":
            kind, size = collective(func, args)
            if kind:
                self.events.append(Event(Operation(kind, size), {}, touched(inputs)))
            return out
        written = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in written if argument.alias_info is not None and argument.alias_info.is_write]
        mutated = [t for t in tree_leaves(written) if isinstance(t, Tensor)]
        reads = touched(inputs, sum(t.nbytes for t in outputs) if name in LOOKUPS else math.inf)
        writes = touched([t for t in outputs if t.untyped_storage()._cdata not in reads] + mutated)
        if writes and not name.startswith(("empty", "new_empty")):  # which only allocate
            dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
            work = replace(arithmetic(func, name, args, kwargs, inputs, out), dtype=dtype)
            self.events.append(Event(work, reads, writes))
        return out


def arithmetic(func, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], out: object) -> Operation:
    """What a call computes."""
    if func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        m, n = out.shape[-2:]
        batch = out.numel() // (m * n)
        return Operation("product", flops=flops, shape=(batch, m, n, round(flops / (2 * batch * m * n))))
    if name in FACTORISATIONS:
        rows, n = inputs[0].shape[-2:]
        last = rows if "solve" in name else n
        return Operation("factorisation", flops=FACTORISATIONS[name] * math.prod(inputs[-1].shape[:-1]) * n * last)
    return Operation("pass")


def grouped(events: list[Event], fused: bool) -> list[Event]:
    """Events in the order in which they run; fused: all passes between two other events are one."""
    groups: list[Event] = []
    seen: set[int] = set()
    for event in events:
        if not (fused and groups and event.work.kind == groups[-1].work.kind == "pass"):
            groups.append(Event(event.work))
        group = groups[-1]
        for storage, size in event.reads.items():
            if storage not in group.created and storage not in group.writes:
                group.reads[storage] = max(size, group.reads.get(storage, 0))
        for storage, size in event.writes.items():
            group.writes[storage] = max(size, group.writes.get(storage, 0))
        fresh = event.writes.keys() - seen - event.reads.keys()
        group.created |= fresh
        seen |= fresh | event.reads.keys()
    return groups


def readers_of(groups: list[Event]) -> dict[int, list[int]]:
    """Storage -> numbers of the groups that read it, ascending."""
    readers: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        for storage in group.reads:
            readers.setdefault(storage, []).append(i)
    return readers


def settled(events: list[Event], fused: bool, keep: Collection[int]) -> list[Event]:
    """Groups that write only what existed before, is read later, or is in `keep` (gradients).

    A fused group whose only lasting results are larger than what it reads does not write them: those of its readers that come
    after another kind of work compute them again. So does the partitioner of torch.compile between forward and backward pass.
    """
    groups = grouped(events, fused)
    readers = readers_of(groups)
    for i, group in enumerate(groups):
        read_later = {storage for storage in group.created & readers.keys() if readers[storage][-1] > i}
        lasting = (group.writes.keys() - group.created) | set(keep) | read_later
        group.writes = {storage: size for storage, size in group.writes.items() if storage in lasting}
        if not (fused and group.work.kind == "pass"):
            continue
        made = (group.created - set(keep)) & group.writes.keys()
        late = [storage for storage in made if all(groups[reader].work.kind == "pass" for reader in readers[storage])]
        if sum(group.writes[storage] for storage in late) <= sum(group.reads.values()):
            continue
        for storage in late:
            del group.writes[storage]
            for reader in readers[storage]:
                del groups[reader].reads[storage]
                groups[reader].reads.update(group.reads)
    return groups


def operations(events: list[Event], fused: bool, keep: Collection[int]) -> list[Operation]:
    """What a device does for these events. fused: passes as torch.compile runs them. keep: storages needed afterwards."""
    groups = settled(events, fused, keep)
    moved = [sum(group.reads.values()) + sum(group.writes.values()) for group in groups]
    return [g.work if g.work.kind in WIRE else replace(g.work, bytes=size) for g, size in zip(groups, moved, strict=True)]


def peak(events: list[Event], fused: bool, keep: Collection[int]) -> int:
    """Most bytes that values made by these events take up at once, `keep` aside, each freed after its last use."""
    groups = settled(events, fused, keep)
    readers = readers_of(groups)
    change = [0] * (len(groups) + 1)
    for i, group in enumerate(groups):
        for storage in (group.created - set(keep)) & group.writes.keys():
            change[i] += group.writes[storage]
            change[max(i, readers.get(storage, [i])[-1]) + 1] -= group.writes[storage]
    return max(accumulate(change))
