"""Methods that treat a weight as a matrix: what they share, Muon and its relatives; AdamW takes the rest.

They share batches of equal blocks of weights, each block owned by one rank. Shampoo and others: kronecker.py.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from engine.hardware import has_native_bf16
from engine.ranks import place
from layers.kernels import gram, polynomial
from optimizers.base import BETA1, BETA2, DECAY, EPS, LR, MOMENTUM, Chain, Optimizer, groups, hyper
from optimizers.elementwise import AdamW, CautiousAdamW

MOST_BLOCKS = 10_000  # a step with so many takes over a second on a CPU, and a checkpoint holds six tensors for each
RATE, WD = "peak learning rate of the hidden matrices", "wd of the hidden matrices"


@dataclass
class Block:
    """One matrix of the work: a fused part of weight `p`, or a tile of one."""

    p: Tensor
    id: int  # among all blocks of the optimizer
    split: int
    part: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    owner: int = 0  # rank

    def of(self, tensor: Tensor) -> Tensor:
        """Its view [m, n] in a contiguous tensor of p's shape; dimensions after the first are flattened."""
        return tensor.view(self.split, -1, tensor[0].numel())[self.part, slice(*self.rows), slice(*self.columns)]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


@dataclass
class Bucket:
    """Blocks of one shape in one param group, which go through the arithmetic as one batch."""

    group: int
    blocks: list[Block]  # ordered by owner
    own: list[Block]  # of this rank
    state: dict[str, Tensor]  # of those, stacked: [own, ...]


def tiles(size: int, block: int) -> list[tuple[int, int]]:
    """[0, size) in the fewest near-equal pieces of at most `block` elements; 0: one piece."""
    n = -(-size // block) if block else 1
    return [(size * i // n, size * (i + 1) // n) for i in range(n)]


def balance(costs: list[float], ranks: int) -> list[int]:
    """The rank of each piece of work: dearest first to the least loaded rank (Graham 1969: at most 4/3 of the best)."""
    load, owner = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(ranks), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner


def frobenius(X: Tensor) -> Tensor:
    """The norm of each [m, n], as [..., 1, 1]: at least its largest singular value."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


def spectral(X: Tensor) -> Tensor:
    """The largest singular value of each [k, m, n], approximated from below, as [k, 1, 1]: by 64 power iterations at once."""
    A = torch.bmm(X, X.mT) if X.size(-2) <= X.size(-1) else torch.bmm(X.mT, X)
    for _ in range(6):
        A = A / frobenius(A).clamp(min=1e-30)
        A = torch.bmm(A, A)
    longest = torch.linalg.vector_norm(A, dim=-1).argmax(-1)
    v = A[torch.arange(len(A), device=A.device), longest].unsqueeze(-1)
    v = v / frobenius(v).clamp(min=1e-30)
    return frobenius(torch.bmm(X.mT if X.size(-2) <= X.size(-1) else X, v))


# A size of matrices, and the size R that each of W [k, m, n] is kept at, by the size that it has.
SPHERES = {
    "none": None,
    # its own, or GPT-2's at the start where it starts at zero: "hyperball", MuonH of modded-nanogpt's optimizer track #5
    "frobenius": (frobenius, lambda W, size: torch.where(size > 0, size, 0.02 * math.sqrt(W[0].numel()))),
    # muP's (arXiv 2310.17813): MuonSphere of arXiv 2601.08393, whose other method corrects the direction too
    "spectral": (spectral, lambda W, size: torch.full_like(size, math.sqrt(W.size(-2) / W.size(-1)))),
}


def on_sphere(W: Tensor, u: Tensor, lr: float, sphere: str) -> Tensor:
    """W <- R unit(W - lr R unit(u)): unit divides by the sphere's kind of size, R is the size kept."""
    measure, radius = SPHERES[sphere]
    R = radius(W, measure(W))
    W = W - u * (lr * R / measure(u).clamp(min=1e-30))
    return W * (R / measure(W).clamp(min=1e-30))


class MatrixMethod(Optimizer):
    """Base of methods that treat a weight as a matrix [rows, columns] (further dimensions are flattened into columns).

    A weight is cut into blocks: its `split` fused matrices (a param group says how many), each in tiles of at most `block` rows
    and columns. Blocks of one shape are one batch. Under torch.distributed only a block's owner holds its state; the ranks
    share the cost evenly and gather updates while they compute the next batch. checkpoint.py merges the blocks of all ranks.
    A subclass says how a block starts (`initial`), what it costs and how a batch is updated. AdamW, set by the same keys, takes
    embeddings, head, vectors and scalars."""

    adamw_lr = hyper(3e-3, "peak learning rate of vectors and scalars", (3e-4, 3e-2, "log"), rest=True)
    embedding_lr = hyper(None, "peak rate of embeddings; none or 0: adamw_lr", (1e-3, 1.0, "log"), rest=True)
    head_lr = hyper(None, "peak rate of an untied head; none or 0: adamw_lr", (3e-4, 3e-2, "log"), rest=True)
    adamw_beta1 = hyper(0.9, "AdamW's average of gradients", rest=True)
    adamw_beta2 = hyper(0.95, "AdamW's average of squares", rest=True)
    adamw_eps = hyper(1e-10, "floor of AdamW's denominator", rest=True)
    adamw_weight_decay = hyper(0.0, "wd of embeddings and head", rest=True)
    adamw_cautious = hyper(False, "decay only weights that the update shrinks (modded-nanogpt #50)", rest=True)
    embedding_beta1 = hyper(None, "the same for embeddings; none: adamw_beta1", rest=True)
    embedding_beta2 = hyper(None, "the same for embeddings; none: adamw_beta2", (0.9, 0.999, "complement"), rest=True)
    head_beta1 = hyper(None, "the same for an untied head; none: adamw_beta1", rest=True)
    head_beta2 = hyper(None, "the same for an untied head; none: adamw_beta2", (0.9, 0.999, "complement"), rest=True)
    adamw_every = hyper(1, "steps between AdamW's updates, by the sum of the gradients since (modded-nanogpt #39)", rest=True)

    sphere = hyper("none", f"keep each matrix at its size, without decay: {', '.join(SPHERES)}", choices=SPHERES)

    roles = ("matrix",)
    _linked = None  # the state dict that `_buckets` belong to

    @classmethod
    def build(cls, gpt, steps, /, **given):
        method, rest = cls(groups(gpt, cls.roles, by_split=True), **cls.of_length(steps, **given)), cls.of_rest(given)
        block, weights = method.defaults.get("block", 0), [p for g in method.param_groups for p in g["params"]]
        if block and (count := sum(-(-p.numel() // block**2) for p in weights)) > MOST_BLOCKS:
            why = f"about {count:,} blocks, and each has tensors of its own"
            least = math.ceil(block * math.sqrt(count / MOST_BLOCKS))
            raise ValueError(f"block={block} makes {why}: take block={least} or more")
        lr, decay, cautious, every = (rest.pop(key) for key in ("lr", "weight_decay", "cautious", "every"))
        how, others = dict(cautious=cautious, every=every) if cautious or every != 1 else {}, []
        for role in ("embedding", "head"):
            own = {key: rest.pop(f"{role}_{key}") for key in ("lr", "beta1", "beta2")}
            betas = {key: rest[key] if own[key] is None else own[key] for key in ("beta1", "beta2")}
            named = betas if how else {"betas": tuple(betas.values())}  # torch's AdamW has one tuple
            others += groups(gpt, (role,), lr=own["lr"] or lr, weight_decay=decay, **named)
        others += groups(gpt, ("vector", "scalar"), weight_decay=0.0)
        if not others:
            return method
        return Chain(method, (CautiousAdamW if how else AdamW)(others, lr=lr, **rest, **how))

    def add_param_group(self, param_group: dict) -> None:
        param_group.setdefault("split", 1)
        param_group.setdefault("t", 0)  # steps taken by this group
        super().add_param_group(param_group)
        for p in param_group["params"]:
            if p.dim() < 2 or p.size(0) % param_group["split"]:
                name = type(self).__name__
                raise ValueError(f"{name} with split {param_group['split']} got a weight of shape {tuple(p.shape)}")
        self._linked = None

    def initial(self, group: dict, m: int, n: int) -> dict[str, Tensor]:
        """State of a block [m, n]: fp32 tensors."""
        raise NotImplementedError

    def cost(self, m: int, n: int) -> float:
        """Operations for one block, up to a factor."""
        raise NotImplementedError

    def update(self, group: dict, state: dict[str, Tensor], G: Tensor, blocks: list[Block]) -> Tensor:
        """Advance the state of a batch by its gradients G [k, m, n] (fp32, its own to overwrite); what lr multiplies."""
        raise NotImplementedError

    def update_dtype(self, group: dict, device: torch.device) -> torch.dtype:
        """Of what `update` returns."""
        return torch.float32

    def _cut(self) -> list[Bucket]:
        """All blocks with their owners, by shape; without state."""
        alike: dict[tuple, list[Block]] = defaultdict(list)
        count, (rank, ranks) = 0, place()
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                split, block = group["split"], group.get("block", 0)
                for part, rows, columns in product(range(split), tiles(p.size(0) // split, block), tiles(p[0].numel(), block)):
                    piece = Block(p, count, split, part, rows, columns)
                    alike[i, piece.shape, p.device].append(piece)
                    count += 1
        batches = sorted(alike.items(), key=lambda item: -len(item[1]) * self.cost(*item[0][1]))  # dearest first
        everything = [b for _, blocks in batches for b in blocks]
        for b, owner in zip(everything, balance([self.cost(*b.shape) for b in everything], ranks), strict=True):
            b.owner = owner
        by_owner = [(i, sorted(blocks, key=lambda b: b.owner)) for (i, *_), blocks in batches]
        return [Bucket(i, blocks, [b for b in blocks if b.owner == rank], {}) for i, blocks in by_owner]

    def _link(self) -> None:
        """Cut, share out, and (re)connect the buckets with what `self.state` holds, dropping what others own."""
        self._buckets = self._cut()
        loaded = {b.p: self.state[b.p].get("blocks", {}) for bucket in self._buckets for b in bucket.blocks}
        for p in loaded:
            self.state[p]["blocks"] = {}
        for bucket in self._buckets:
            first = bucket.blocks[0]
            with torch.device(first.p.device):
                one = self.initial(self.param_groups[bucket.group], *first.shape)
            bucket.state = {name: x.repeat(len(bucket.own), *[1] * x.dim()) for name, x in one.items()}
            for k, b in enumerate(bucket.own):
                self.state[b.p]["blocks"][b.id] = views = {name: stacked[k] for name, stacked in bucket.state.items()}
                for name, value in loaded[b.p].get(b.id, {}).items():
                    views[name].copy_(value)
        self._linked = self.state

    def update_weights(self):
        if self._linked is not self.state:
            self._link()
        for group in self.param_groups:
            group["t"] += 1
        shared = [self._share(bucket, self._own(bucket)) for bucket in self._buckets]
        for bucket, finish in zip(self._buckets, shared, strict=True):
            self._apply(bucket, finish())

    def _own(self, bucket: Bucket) -> Tensor:
        """Updates [own, m, n] of this rank's blocks; zeros where there is no gradient."""
        group, count, first = self.param_groups[bucket.group], len(bucket.own), bucket.blocks[0]
        active = [k for k, b in enumerate(bucket.own) if b.p.grad is not None]
        if not active:
            dtype = self.update_dtype(group, first.p.device)
            return torch.zeros(count, *first.shape, dtype=dtype, device=first.p.device)
        blocks = [bucket.own[k] for k in active]
        G = torch.stack([b.of(b.p.grad.contiguous()) for b in blocks]).float()
        if len(active) == count:
            return self.update(group, bucket.state, G, blocks)
        some = {name: value[active] for name, value in bucket.state.items()}
        updates = self.update(group, some, G, blocks)
        for name, value in some.items():
            bucket.state[name][active] = value
        full = updates.new_zeros(count, *updates.shape[1:])
        full[active] = updates
        return full

    def _share(self, bucket: Bucket, updates: Tensor) -> Callable[[], Tensor]:
        """Start gathering the updates of all ranks; the function returned waits and gives [blocks, m, n]."""
        if (ranks := place()[1]) == 1:
            return lambda: updates
        counts = [sum(b.owner == rank for b in bucket.blocks) for rank in range(ranks)]
        most = max(counts)  # the gather wants equal shares
        padded = updates.new_zeros(most, *updates.shape[1:])
        padded[: len(updates)] = updates
        everyone = updates.new_empty(ranks * most, *updates.shape[1:])
        handle = dist.all_gather_single(everyone, padded, async_op=True)

        def finish() -> Tensor:
            handle.wait()
            return torch.cat([everyone[r * most : r * most + count] for r, count in enumerate(counts)])

        return finish

    def _apply(self, bucket: Bucket, updates: Tensor) -> None:
        """w <- (1 - lr wd) w - lr update, for the blocks of weights that have a gradient."""
        group = self.param_groups[bucket.group]
        active = [(b, u) for b, u in zip(bucket.blocks, updates, strict=True) if b.p.grad is not None]
        if not active:
            return
        weights, directions = [b.of(b.p.detach()) for b, _ in active], [u.to(b.p.dtype) for b, u in active]
        if (sphere := group.get("sphere", "none")) != "none":
            kept = on_sphere(torch.stack(weights).float(), torch.stack(directions).float(), group["lr"], sphere)
            torch._foreach_copy_(weights, list(kept))
            return
        if group["weight_decay"] and group.get("cautious"):  # decay only what the update shrinks already
            for w, u in zip(weights, directions, strict=True):
                w.mul_(1 - group["lr"] * group["weight_decay"] * (w * u >= 0))
        elif group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-group["lr"])


# (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, one per step; the last one repeats.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Keller Jordan: steepest at 0, so 5 steps suffice, but singular values end anywhere within about 0.68-1.2.
    "quintic": ((3.4445, -4.775, 2.0315),),
    # Polar Express (arXiv 2505.16932), each step optimal for what the one before leaves; as tabulated by nanochat.
    "polar_express": (
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.5000),
        (3.8917, -2.7725, 0.5061),
        (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
        (1.875, -1.25, 0.375),  # what they go to: converges to 1
    ),
    # Converges exactly, to second order at 1: 12 steps in modded-nanogpt's optimizer track.
    "cubic": ((2.0, -1.5, 0.5),),
}

# Factor on the update of a matrix that maps `columns` inputs to `rows` outputs. Learning rates do not carry over.
SCALES = {
    "keller": lambda rows, columns: max(1.0, rows / columns) ** 0.5,  # github.com/KellerJordan/Muon
    "moonlight": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,  # arXiv 2502.16982: AdamW's update size
    "mup": lambda rows, columns: (rows / columns) ** 0.5,  # arXiv 2310.17813: spectral norm
    "none": lambda rows, columns: 1.0,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@lru_cache
def iteration_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where matrix products in it are native (the iteration tolerates it), else fp32."""
    return DTYPES.get(name) or (torch.bfloat16 if has_native_bf16(device) else torch.float32)


def orthogonalize(G: Tensor, steps: int = 5, coefficients: str = "quintic", dtype: str = "auto") -> Tensor:
    """U V^T, nearly, of G = U S V^T by Newton-Schulz iteration: every singular value is driven towards 1. G [..., m, n] is a
    batch of independent matrices. dtype, of the iteration and the result: "auto", "fp32" or "bf16"."""
    if G.size(-2) > G.size(-1):  # the products below are the cheaper the fewer rows there are
        return orthogonalize(G.mT, steps, coefficients, dtype).mT
    X = (G / (frobenius(G) + 1e-7)).to(iteration_dtype(dtype, G.device)).reshape(-1, *G.shape[-2:])
    table = COEFFICIENTS[coefficients]
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        B = polynomial(gram(X), b, c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.view(G.shape)


class Muon(MatrixMethod):
    """m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m (Nesterov) or m;  w <- (1 - lr wd) w - lr scale orthogonalize(u).

    Source: Keller Jordan, kellerjordan.github.io/posts/muon; settings near modded-nanogpt's optimizer track. `normuon` (arXiv
    2510.05491): r <- b r + (1 - b) mean over a row of o^2, o = orthogonalize(u); o / sqrt(r), brought back to the norm of o.
    `slow` (modded-nanogpt pull request #340): from `slow_start` on m = s fast + (1 - s) slow, two averages that begin at m."""

    lr = LR(0.02, 3e-3, 1e-1, RATE)
    momentum = MOMENTUM(0.95, 0.85)
    nesterov = hyper(True, "look one step ahead")
    weight_decay = DECAY(0.01, 1e-3, 0.3, WD)
    cautious = hyper(False, "decay only weights that the update shrinks (nanochat)")
    steps = hyper(5, "orthogonalisation iterations", least=1, most=100)
    coefficients = hyper("quintic", f"of the iteration: {', '.join(COEFFICIENTS)} (cubic wants 12 steps)", choices=COEFFICIENTS)
    scale = hyper("keller", f"factor by shape: {', '.join(SCALES)}; learning rates do not carry over", choices=SCALES)
    normuon = hyper(False, "even out the rows of the update by their second moment")
    normuon_beta2 = hyper(0.95, "normuon's average of squares")
    equal_rows = hyper(False, "bring the rows of u to one norm before the iteration (MuonEq-R, arXiv 2603.28254)")
    fixed_norm = hyper(False, "bring its result to the norm of a polar factor (Muon+, arXiv 2602.21545)")
    slow = hyper(None, "mu of a second, slower average (0.98); none: only one", (0.95, 0.995, "complement"), below=1)
    fast = hyper(0.85, "mu of the first average once there are two", below=1)
    fast_share = hyper(0.4385, "s, the share of the first average", most=1)
    slow_start: float = hyper(1 / 3, "steps before there are two; below 1: fraction of the run")
    dtype = hyper("auto", "of the iteration: auto (bf16 where native), fp32, bf16", choices=("auto", *DTYPES))
    state_per_parameter = 4.0

    @classmethod
    def transfer_of(cls, settings):
        """Its updates have singular values of 1 times a factor by shape, which grows with the width only in Moonlight's scale.
        Tuned rates fall all the same: 0.016 to 0.004 from 130M to 1.2B (arXiv 2509.02046)."""
        return -0.5 if settings.get("scale", cls.scale) == "moonlight" else 0.0

    def initial(self, group, m, n):
        state = {"momentum": torch.zeros(m, n)}
        state |= {"slow": torch.zeros(m, n)} if group.get("slow") else {}
        return state | ({"rows": torch.zeros(m, 1)} if group["normuon"] else {})

    def cost(self, m, n):
        return min(m, n) ** 2 * (2 * max(m, n) + min(m, n))

    def update_dtype(self, group, device):
        return torch.float32 if group["normuon"] else iteration_dtype(group["dtype"], device)

    def update(self, group, state, G, blocks):
        momentum, slow = state["momentum"], state.get("slow")
        two = slow is not None and group["t"] > group["slow_start"]
        momentum.lerp_(G, 1 - group["fast" if two else "momentum"])
        if slow is not None:  # until there are two it is the same as the first
            slow.lerp_(G, 1 - group["slow"]) if two else slow.copy_(momentum)
        m = slow.lerp(momentum, group["fast_share"]) if two else momentum
        u = G.lerp_(m, group["momentum"]) if group["nesterov"] else m
        if group.get("equal_rows"):
            u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp(min=1e-30)
        o = orthogonalize(u, group["steps"], group["coefficients"], group["dtype"])
        if group.get("fixed_norm"):
            o = o * (math.sqrt(min(G.shape[-2:])) / frobenius(o).clamp(min=1e-7))
        if group["normuon"]:
            o = o.float()
            rows = state["rows"].lerp_(o.square().mean(-1, keepdim=True), 1 - group["normuon_beta2"])
            even = o / (rows.sqrt() + 1e-8)
            o = even * (frobenius(o) / (frobenius(even) + 1e-8))
        return o * SCALES[group["scale"]](*G.shape[-2:])


class Muown(MatrixMethod):
    """W = diag(g) unit(V), unit by row, g >= 0: V takes Muon's step at the rate lr share sqrt(max(m, n)), g takes Adam's at the
    rate lr, each by its own gradient. V steps sideways, so its rows grow.

    Source: modded-nanogpt's optimizer track #23, arXiv 2605.10797; its schedule of V's norms, tuned by layer, is left out. A
    row of zeros starts with g = 0 in the direction against its first gradient."""

    lr, momentum = LR(0.0035, 3e-4, 3e-2, RATE), MOMENTUM(0.95, 0.85)
    share = hyper(0.2, "of sqrt(max(rows, columns)), the scale of the direction's step", (0.05, 0.8, "log"))
    beta1, beta2, eps = BETA1(0.9), BETA2(0.95), EPS()
    weight_decay = DECAY(0.0, 1e-3, 0.3, WD)
    steps = hyper(6, "orthogonalisation iterations", least=1, most=100)
    coefficients = hyper("polar_express", "of the iteration", choices=COEFFICIENTS)
    dtype = hyper("auto", "of the iteration: auto (bf16 where native), fp32, bf16", choices=("auto", *DTYPES))
    state_per_parameter = 4.0
    cost = Muon.cost

    def initial(self, group, m, n):
        return {"momentum": torch.zeros(m, n)} | {name: torch.zeros(m, 1) for name in ("lengths", "average", "squares")}

    def update(self, group, state, G, blocks):
        t, lr, lengths, (m, n) = group["t"], group["lr"], state["lengths"], G.shape[-2:]
        W = torch.stack([b.of(b.p.detach()) for b in blocks]).float()
        gain = torch.linalg.vector_norm(W, dim=-1, keepdim=True)
        against = G / -torch.linalg.vector_norm(G, dim=-1, keepdim=True).clamp(min=1e-30)
        direction = torch.where(gain > 0, W / gain.clamp(min=1e-30), against)
        lengths.copy_(torch.where(lengths > 0, lengths, torch.where(gain > 0, gain, 0.02 * math.sqrt(n))))
        along = (G * direction).sum(-1, keepdim=True)  # the gradient of g
        g = (G - along * direction) * gain / lengths
        momentum = state["momentum"].lerp_(g, 1 - group["momentum"])
        o = orthogonalize(g.lerp_(momentum, group["momentum"]), group["steps"], group["coefficients"], group["dtype"]).float()
        mean = state["average"].lerp_(along, 1 - group["beta1"])
        square = state["squares"].lerp_(along.square(), 1 - group["beta2"])
        root = (square / (1 - group["beta2"] ** t)).sqrt() + group["eps"]
        gain = (gain - lr * mean / (1 - group["beta1"] ** t) / root).clamp(min=1e-8)  # at 0 the direction would be lost
        V = direction * lengths - lr * group["share"] * math.sqrt(max(m, n)) * o
        lengths.copy_(torch.linalg.vector_norm(V, dim=-1, keepdim=True))
        still = (mean == 0) & (o == 0).all(-1, keepdim=True) | (lr == 0)  # else rounding would move it
        return torch.where(still, 0.0, (W - gain * V / lengths.clamp(min=1e-30)) / max(lr, 1e-30))
