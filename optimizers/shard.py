"""Optimizer state divided over the ranks: ZeRO-1, arXiv 1910.02054.

Each rank updates its slice of every weight, keeps the state of that slice alone, and then all gather the slices of all. Of the
gradients a rank receives the sums that it needs: a reduce-scatter of each weight, where DDP's all-reduce sends twice as much,
and of a matrix method's blocks a reduce to the owner of each (`Sharded.reduce`). Weights that the ranks do not divide evenly,
blocks that are not whole rows, and vectors, which are too small to be worth it, are summed for all as ever; so are the rows of
sparse tables. Gradients take up as much memory as without: they lie in DDP's buckets.

A reduce-scatter and a gather send together what an all-reduce does; so what is saved on the wire is half of a matrix method's
gradients, and in time the larger part of the element-wise update. The backward pass may hide an all-reduce, but not the gathers
after it: `--dry-run` with and without says what a machine would gain or lose. Gloo (torch 2.13) has a reduce-scatter in name
alone: on 4 ranks of one machine it was seen to send as much as an all-reduce, 1.5 times the gradients. With NCCL on several
GPUs none of this has been run.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.spec import UsageError
from optimizers.average import Averaged
from optimizers.base import Chain, Swapped, evaluate, parts
from optimizers.matrix import MatrixMethod, world
from optimizers.sparse import SparseAdagrad

FUSED = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW)  # of torch's, those in our registry
DIVIDED = (MatrixMethod, SparseAdagrad)  # share out their blocks by themselves; touch few rows of their tables


@dataclass(frozen=True)
class Slice:
    """Weights [first, end) of p, flattened. The parameter `own` is a view of them: to update it is to update p."""

    p: nn.Parameter
    own: nn.Parameter
    first: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor like p."""
        return tensor.reshape(-1)[self.first : self.end]


class Sharded(Chain):
    """An optimizer whose element-wise parts update slices: in their groups a view of this rank's slice stands for each weight.

    All of a weight that the ranks do not divide evenly, a scalar for one, is every rank's slice. In its state_dict a slice is
    a block, named by its first and end, so that checkpoints unite the slices of all ranks (checkpoint.py) and any other
    number of ranks can cut its own out of them.

    Raises:
        UsageError: a method whose rule needs whole weights, an average of the weights, weights that are not fp32.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        if isinstance(optimizer, Averaged):
            raise UsageError("--shard-optimizer knows no averages: leave out --average")
        super().__init__(*parts(optimizer))
        self.slices: dict[Tensor, Slice] = {}  # by the parameter that stands in the groups
        self.slice_of: dict[Tensor, Tensor] = {}  # weight -> that parameter
        self.weights = [p for group in self.param_groups for p in group["params"]]
        self.spans: dict[Tensor, list[tuple[int, int, int]]] = {}  # weight whose gradient is scattered -> (rank, first, end)
        rank, ranks = world()
        for part in self.parts:
            if isinstance(part, DIVIDED):
                self.spans |= part.spans() if isinstance(part, MatrixMethod) and ranks > 1 else {}
                continue
            if not getattr(part, "of_slices", isinstance(part, FUSED)):
                raise UsageError(
                    f"--shard-optimizer: the rule of {type(part).__name__} needs whole weights, not slices of them"
                )
            for group in part.param_groups:
                for i, p in enumerate(group["params"]):
                    if p.dtype != torch.float32:
                        raise UsageError(
                            "--shard-optimizer divides fp32 weights alone: with --weights bf16 it wants a matrix method"
                        )
                    size, rest = divmod(p.numel(), ranks)
                    first, end = (0, p.numel()) if rest else (rank * size, (rank + 1) * size)
                    own = group["params"][i] = self.slice_of[p] = nn.Parameter(p.data.view(-1)[first:end])
                    self.slices[own] = Slice(p, own, first, end)
                    if ranks > 1 and not rest and p.dim() > 1:
                        self.spans[p] = [(r, r * size, (r + 1) * size) for r in range(ranks)]
                    if p in self.state:  # Adagrad's begins before the first step
                        self.state[own] = joined({(0, p.numel()): flat(self.state.pop(p))}, first, end)

    def collective(self, p: Tensor) -> str:
        """How the gradient of a weight is summed over ranks: a key of ranks.WIRE."""
        if p not in self.spans:
            return "allreduce"
        return "reduce_scatter" if p in self.slice_of else "reduce"

    def reduce(self, dtype: torch.dtype | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook: each rank gets the mean over ranks of what it needs of a bucket's gradients.

        Begins as soon as the bucket is full, in place; the end of the backward pass waits for it. What a rank does not need of
        a scattered gradient is its own, or part of a sum.

        Args:
            dtype: gradients travel in it; None: in their own.
        """
        buffer, params = bucket.buffer(), bucket.parameters()
        wire = buffer.to(dtype or buffer.dtype).div_(world()[1])
        pending, vectors = [], []
        for p, grad in zip(params, wire.split([p.numel() for p in params]), strict=True):
            if (how := self.collective(p)) == "reduce_scatter":
                own = self.slices[self.slice_of[p]].of(grad)
                pending.append(dist.reduce_scatter_single(own, grad, async_op=True))
            elif how == "reduce":
                pending += [dist.reduce(grad[first:end], owner, async_op=True) for owner, first, end in self.spans[p]]
            elif p.dim() > 1:
                pending.append(dist.all_reduce(grad, async_op=True))
            else:
                vectors.append(grad)
        together = torch.cat(vectors) if vectors else None
        if vectors:
            pending.append(dist.all_reduce(together, async_op=True))

        def finish() -> None:
            for work in pending:
                work.wait()
            if vectors:
                torch._foreach_copy_(vectors, together.split([v.numel() for v in vectors]))
            if wire is not buffer:
                buffer.copy_(wire)

        # DDP could wait by itself for futures, which gloo's reduce-scatter does not have
        torch.autograd.Variable._execution_engine.queue_callback(finish)
        done = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer)
        return done

    def counted(self) -> list[Tensor]:
        """The gradients that count on this rank, so that with those of all ranks each number counts once: what it needs of the
        scattered ones, and on rank 0 all others."""
        rank, _ = world()
        found = []
        for p in self.weights:
            if p.grad is None:
                continue
            if p in self.spans:
                found += [p.grad.view(-1)[first:end] for owner, first, end in self.spans[p] if owner == rank]
            elif rank == 0:
                found.append(p.grad._values() if p.grad.is_sparse else p.grad)
        return found or [torch.zeros((), device=self.weights[0].device)]

    @torch.no_grad()
    def step(self, closure=None):
        loss = evaluate(closure)
        for s in self.slices.values():
            s.own.grad = None if s.p.grad is None else s.of(s.p.grad)
        pending = []
        for part in reversed(self.parts):  # what AdamW takes beside a matrix method travels while that one computes
            part.step()
            pending += self.gather(part)
        for work in pending:
            work.wait()
        for s in self.slices.values():
            s.own.grad = None
        return loss

    def gather(self, part: torch.optim.Optimizer) -> list[dist.Work]:
        """Begin to send this rank's slices to all others."""
        slices = [self.slices[own] for group in part.param_groups for own in group["params"] if own in self.slices]
        cut = [s for s in slices if s.own.numel() < s.p.numel()]
        return [dist.all_gather_single(s.p.data.view(-1), s.own.data, async_op=True) for s in cut]

    def train(self) -> None:
        super().train()
        self.swapped()

    def eval(self) -> None:
        super().eval()
        self.swapped()

    def swapped(self) -> None:
        for part in self.parts:
            for work in self.gather(part) if isinstance(part, Swapped) else ():
                work.wait()

    def state_dict(self) -> dict:
        found = super().state_dict()
        for own, number in self.numbered(found):
            s = self.slices[own]
            found["state"][number] = {"blocks": {(s.first, s.end): found["state"].get(number, {})}}
        return found

    def load_state_dict(self, state_dict: dict) -> None:
        state = dict(state_dict["state"])
        for own, number in self.numbered(state_dict):
            s = self.slices[own]
            state[number] = joined(state[number]["blocks"], s.first, s.end)
        super().load_state_dict(state_dict | {"state": state})

    def numbered(self, state_dict: dict) -> list[tuple[Tensor, int]]:
        """The parameters that are slices, with their numbers in a state_dict."""
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        return [(p, i) for p, i in zip(params, numbers, strict=True) if p in self.slices]


def flat(state: dict) -> dict:
    return {name: value.reshape(-1) if isinstance(value, Tensor) and value.dim() else value for name, value in state.items()}


def joined(blocks: dict[tuple[int, int], dict], first: int, end: int) -> dict:
    """State of the slice [first, end) from that of slices that cover it; numbers and 0-dim tensors are equal in all."""
    within = [(max(first, a) - a, min(end, b) - a, state) for (a, b), state in sorted(blocks.items()) if a < end and first < b]
    return {
        name: torch.cat([state[name][a:b] for a, b, state in within]) if isinstance(value, Tensor) and value.dim() else value
        for name, value in within[0][2].items()
    }
