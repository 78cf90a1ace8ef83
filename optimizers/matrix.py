"""Methods that treat a weight as a matrix: Muon, Shampoo, CASPR, SOAP, Kron; AdamW takes what is no hidden matrix.

First what they share: blocks of weights in batches of one shape, each block owned by one rank.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress, product

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


@dataclass(frozen=True)
class Block:
    """One matrix of the work: a fused part of weight `p`, or a tile of one."""

    p: Tensor
    id: int  # among all blocks of the optimizer
    split: int
    part: int
    rows: tuple[int, int]
    columns: tuple[int, int]

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
    owners: list[int]  # rank of each
    state: dict[str, Tensor]  # this rank's blocks stacked: [own, ...]

    def of_rank(self, rank: int) -> list[Block]:
        return [b for b, owner in zip(self.blocks, self.owners, strict=True) if owner == rank]


def tiles(size: int, block: int) -> list[tuple[int, int]]:
    """[0, size) in as few near-equal pieces as have at most `block` elements; 0: one piece."""
    n = -(-size // block) if block else 1
    return [(size * i // n, size * (i + 1) // n) for i in range(n)]


def balance(costs: list[float], ranks: int) -> list[int]:
    """The rank of each piece of work: dearest first to the least loaded rank (Graham 1969: at most 4/3 of the best)."""
    load, owner = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(ranks), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner


class MatrixMethod(Optimizer):
    """Base of methods that treat a weight as a matrix [rows, columns] (further dimensions are flattened into columns).

    A weight is cut into blocks: its `split` fused matrices (a param group says how many), each in tiles of at most `block` rows
    and columns. Blocks of one shape are one batch. Under torch.distributed each block has one owner, who alone holds its state;
    the ranks share the cost evenly and gather updates while they compute the next batch. One rank takes the same path and owns
    all. checkpoint.py unites the blocks of all ranks. A subclass says how a batch of blocks starts (`initial`), what it costs
    and how it is updated. AdamW, set by the same keys, takes embeddings, head, vectors and scalars.
    """

    adamw_lr = hyper(3e-3, "peak learning rate of vectors and scalars", (3e-4, 3e-2, "log"), rest=True)
    embedding_lr = hyper(None, "peak rate of embeddings; none or 0: adamw_lr", (1e-3, 1.0, "log"), rest=True)
    head_lr = hyper(None, "peak rate of an untied head; none or 0: adamw_lr", (3e-4, 3e-2, "log"), rest=True)
    adamw_beta1 = hyper(0.9, "AdamW's average of gradients", rest=True)
    adamw_beta2 = hyper(0.95, "AdamW's average of squares", rest=True)
    adamw_eps = hyper(1e-10, "floor of AdamW's denominator", rest=True)
    adamw_weight_decay = hyper(0.0, "wd of embeddings and head", rest=True)
    adamw_cautious = hyper(False, "decay only weights that the update shrinks (modded-nanogpt #50)", rest=True)
    adamw_every = hyper(1, "steps between AdamW's updates, by the sum of the gradients since (modded-nanogpt #39)", rest=True)

    roles = ("matrix",)
    _linked = None  # the state dict that `_buckets` belong to

    @classmethod
    def build(cls, gpt, steps, /, **given):
        method, rest = cls(groups(gpt, cls.roles, by_split=True), **cls.of_length(steps, **given)), cls.of_rest(given)
        shapes = [(-(-p.numel() // b**2), b) for g in method.param_groups if (b := g.get("block", 0)) for p in g["params"]]
        if (count := sum(blocks for blocks, _ in shapes)) > MOST_BLOCKS:
            least = math.ceil(shapes[0][1] * math.sqrt(count / MOST_BLOCKS))
            why = f"about {count:,} blocks, and each has tensors of its own"
            raise ValueError(f"block={shapes[0][1]} makes {why}: take block={least} or more")
        lr, decay, cautious, every = (rest.pop(key) for key in ("lr", "weight_decay", "cautious", "every"))
        rates = {role: rest.pop(f"{role}_lr") or lr for role in ("embedding", "head")}
        others = [g for role, rate in rates.items() for g in groups(gpt, (role,), lr=rate, weight_decay=decay)]
        others += groups(gpt, ("vector", "scalar"), weight_decay=0.0)
        if not others:
            return method
        how = dict(cautious=cautious, every=every) if cautious or every != 1 else {}
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

    def __setstate__(self, state):
        super().__setstate__(state)
        self._linked = None

    def initial(self, group: dict, count: int, m: int, n: int) -> dict[str, Tensor]:
        """State of `count` blocks [m, n]: fp32 tensors whose first dimension is the block."""
        raise NotImplementedError

    def cost(self, m: int, n: int) -> float:
        """Operations for one block, up to a factor."""
        raise NotImplementedError

    def update(self, group: dict, state: dict[str, Tensor], G: Tensor, ids: list[int]) -> Tensor:
        """Advance the state of a batch by its gradients G [k, m, n] (fp32, its own to overwrite); what lr multiplies."""
        raise NotImplementedError

    def update_dtype(self, group: dict, device: torch.device) -> torch.dtype:
        return torch.float32

    def _cut(self) -> list[Bucket]:
        """All blocks with their owners, by shape; without state."""
        alike: dict[tuple, list[Block]] = defaultdict(list)
        count = 0
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                split, block = group["split"], group.get("block", 0)
                for part, rows, columns in product(range(split), tiles(p.size(0) // split, block), tiles(p[0].numel(), block)):
                    piece = Block(p, count, split, part, rows, columns)
                    alike[i, piece.shape, p.device].append(piece)
                    count += 1
        batches = sorted(alike.items(), key=lambda item: -len(item[1]) * self.cost(*item[0][1]))  # dearest first
        owners = iter(balance([self.cost(*key[1]) for key, blocks in batches for _ in blocks], place()[1]))
        buckets = []
        for (i, *_), blocks in batches:
            ranked = sorted(zip((next(owners) for _ in blocks), blocks, strict=True), key=lambda pair: pair[0])
            buckets.append(Bucket(i, [b for _, b in ranked], [owner for owner, _ in ranked], {}))
        return buckets

    def _link(self) -> None:
        """Cut, share out, and (re)connect the buckets with what `self.state` holds, dropping what others own."""
        self._buckets = self._cut()
        loaded = {b.p: self.state[b.p].get("blocks", {}) for bucket in self._buckets for b in bucket.blocks}
        for p in loaded:
            self.state[p]["blocks"] = {}
        for bucket in self._buckets:
            mine, first = bucket.of_rank(place()[0]), bucket.blocks[0]
            with torch.device(first.p.device):
                bucket.state = self.initial(self.param_groups[bucket.group], len(mine), *first.shape)
            for k, b in enumerate(mine):
                views = {name: stacked[k] for name, stacked in bucket.state.items()}
                for name, value in loaded[b.p].get(b.id, {}).items():
                    views[name].copy_(value)
                self.state[b.p]["blocks"][b.id] = views
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
        group, mine = self.param_groups[bucket.group], bucket.of_rank(place()[0])
        active = [k for k, b in enumerate(mine) if b.p.grad is not None]
        device = bucket.blocks[0].p.device
        if not active:
            return torch.zeros(len(mine), *bucket.blocks[0].shape, dtype=self.update_dtype(group, device), device=device)
        G = torch.stack([mine[k].of(mine[k].p.grad.contiguous()) for k in active]).float()
        ids = [mine[k].id for k in active]
        if len(active) == len(mine):
            return self.update(group, bucket.state, G, ids)
        some = {name: value[active] for name, value in bucket.state.items()}
        updates = self.update(group, some, G, ids)
        for name, value in some.items():
            bucket.state[name][active] = value
        full = updates.new_zeros(len(mine), *updates.shape[1:])
        full[active] = updates
        return full

    def _share(self, bucket: Bucket, updates: Tensor) -> Callable[[], Tensor]:
        """Start gathering the updates of all ranks; the function returned waits and gives [blocks, m, n]."""
        if (ranks := place()[1]) == 1:
            return lambda: updates
        counts = [bucket.owners.count(r) for r in range(ranks)]
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


def frobenius(X: Tensor) -> Tensor:
    """The norm of each [m, n], as [..., 1, 1]: at least its largest singular value."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


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
    """

    lr = LR(0.02, 3e-3, 1e-1, RATE)
    momentum = MOMENTUM(0.95, 0.85)
    nesterov = hyper(True, "look one step ahead")
    weight_decay = DECAY(0.01, 1e-3, 0.3, WD)
    cautious = hyper(False, "decay only weights that the update shrinks (nanochat)")
    steps = hyper(5, "orthogonalisation iterations", least=1)
    coefficients = hyper("quintic", f"of the iteration: {', '.join(COEFFICIENTS)} (cubic wants 12 steps)", choices=COEFFICIENTS)
    scale = hyper("keller", f"factor by shape: {', '.join(SCALES)}; learning rates do not carry over", choices=SCALES)
    normuon = hyper(False, "even out the rows of the update by their second moment")
    normuon_beta2 = hyper(0.95, "normuon's average of squares")
    dtype = hyper("auto", "of the iteration: auto (bf16 where native), fp32, bf16", choices=("auto", *DTYPES))

    state_per_parameter = 4.0

    @classmethod
    def transfer_of(cls, settings):
        """Its updates have singular values of 1 times a factor by shape, which grows with the width only in Moonlight's scale.
        Tuned rates fall all the same: 0.016 to 0.004 from 130M to 1.2B (arXiv 2509.02046)."""
        return -0.5 if settings.get("scale", cls.scale) == "moonlight" else 0.0

    def initial(self, group, count, m, n):
        state = {"momentum": torch.zeros(count, m, n)}
        return state | ({"rows": torch.zeros(count, m, 1)} if group["normuon"] else {})

    def cost(self, m, n):
        return min(m, n) ** 2 * (2 * max(m, n) + min(m, n))

    def update_dtype(self, group, device):
        return torch.float32 if group["normuon"] else iteration_dtype(group["dtype"], device)

    def update(self, group, state, G, ids):
        momentum = state["momentum"].lerp_(G, 1 - group["momentum"])
        u = G.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        o = orthogonalize(u, group["steps"], group["coefficients"], group["dtype"])
        if group["normuon"]:
            o = o.float()
            rows = state["rows"].lerp_(o.square().mean(-1, keepdim=True), 1 - group["normuon_beta2"])
            even = o / (rows.sqrt() + 1e-8)
            o = even * (frobenius(o) / (frobenius(even) + 1e-8))
        return o * SCALES[group["scale"]](*G.shape[-2:])


def inverse_root(A: Tensor, exponent: float, eps: float, old: Tensor, relative: bool = False) -> Tensor:
    """(A + eps I)^-exponent of symmetric positive semi-definite [k, n, n], in fp64 inside; `old` where that fails. The factors
    of a gradient with fewer columns than rows are singular: eigenvalues that rounding made negative are lifted to 0 before eps
    (relative: times the largest) is added, as in distributed_shampoo."""
    A = A.double()
    try:
        values, vectors = torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # one matrix of the batch did not converge: find it
        values, vectors = map(torch.stack, zip(*map(eigh_or_nan, A), strict=True))
    values = values - values[:, :1].clamp(max=0)
    values = values + eps * (values[:, -1:].clamp(min=1e-30) if relative else 1)
    root = ((vectors * values.pow(-exponent).unsqueeze(-2)) @ vectors.mT).to(old.dtype)
    return torch.where(root.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), root, old)


def eigh_or_nan(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of one matrix; a second try with a little on its diagonal; NaN when that fails too."""
    for jitter in (0.0, 1e-10):
        try:
            return torch.linalg.eigh(A + jitter * A.diagonal().abs().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device))
        except torch.linalg.LinAlgError:
            pass
    return A.diagonal() * math.nan, A * math.nan


def at_norm(u: Tensor, graft: Tensor) -> Tensor:
    """Grafting (arXiv 2002.11803): each u [k, m, n] at the norm of its graft; the graft itself where u is zero."""
    size = frobenius(u)
    return torch.where(size > 0, u * (frobenius(graft) / size.clamp(min=1e-30)), graft)


class Shampoo(MatrixMethod):
    """L <- b2 L + (1 - b2) g g^T;  R <- b2 R + (1 - b2) g^T g;  u = L^^-e m^ R^^-e, at the norm of Adam's update of the same
    block;  w <- (1 - lr wd) w - lr u.

    Source: arXiv 1802.09568; grafting, blocks and averages as in distributed_shampoo (arXiv 2309.06497,
    github.com/facebookresearch/optimizers). Roots are renewed every `every` steps; before `start` the update is Adam's.
    e = 1/4 is the paper's; 1/2 makes each side K-FAC-like. `one_sided` preconditions the shorter side alone, with 2 e.
    """

    lr, beta1 = LR(6e-3, 3e-4, 3e-2, RATE), BETA1(0.9, help="average of gradients; 0: none")
    beta2 = BETA2(0.95, help="average of the factors, and of the squares of grafting")
    eps, weight_decay = EPS(1e-12, "added to the factors' eigenvalues (above 1e-8 it hurts)"), DECAY(0.05, help=WD)
    exponent = hyper(0.25, "e, of each side", (0.125, 0.5, "linear"))
    one_sided = hyper(False, "precondition the shorter side only")
    every = hyper(10, "steps between renewals of the roots", least=1)
    start: float = hyper(10, "first step that is preconditioned; below 1: fraction of the run")
    block = hyper(1024, "largest side of a block; 0: whole matrices")
    grafting = hyper("adam", "size of the update: adam, or none for its own", choices=("adam", "none"))
    graft_eps = EPS(help="floor of Adam's denominator in grafting")

    state_per_parameter = 24.0

    def initial(self, group, count, m, n):
        state = {"average": torch.zeros(count, m, n)} if group["beta1"] else {}
        if group["grafting"] == "adam":
            state["squares"] = torch.zeros(count, m, n)
        for side, size in self.sides(group, m, n):
            state |= {side: torch.zeros(count, size, size), f"{side}_root": torch.eye(size).repeat(count, 1, 1)}
        return state

    def sides(self, group, m, n) -> list[tuple[str, int]]:
        """Name and size of each factor."""
        both = [("left", m), ("right", n)]
        return [min(both, key=lambda side: side[1])] if group.get("one_sided") else both

    def cost(self, m, n):
        return m * n * (m + n) + 10 * (m**3 + n**3) / self.defaults["every"]

    def update(self, group, state, G, ids):
        t, beta1, beta2 = group["t"], group["beta1"], group["beta2"]
        sides = self.sides(group, *G.shape[-2:])
        for side, _ in sides:
            X = G if side == "left" else G.mT
            state[side].baddbmm_(X, X.mT, beta=beta2, alpha=1 - beta2)
        m = state["average"].lerp_(G, 1 - beta1) / (1 - beta1**t) if beta1 else G
        graft = None
        if group["grafting"] == "adam":
            v = state["squares"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
            graft = m / ((v / (1 - beta2**t)).sqrt_() + group["graft_eps"])
            if t < group["start"]:
                return graft
        first = max(1, group["start"]) if group["grafting"] == "adam" else 1
        if t == first or t % group["every"] == 0:
            power = group["exponent"] * (2 if group["one_sided"] else 1)
            for side, _ in sides:
                root = state[side + "_root"]
                root.copy_(inverse_root(state[side] / (1 - beta2**t), power, group["eps"], root))
        u = torch.bmm(state["left_root"], m) if "left_root" in state else m
        u = torch.bmm(u, state["right_root"]) if "right_root" in state else u
        return u if graft is None else at_norm(u, graft)


class CASPR(MatrixMethod):
    """L <- b2 L + (1 - b2) g g^T;  R <- b2 c R + (1 - b2) (P g)^T (P g) / rows;  u = P m~ Q with P = L^-1/2, Q = R^-1/2 and
    m~ NAdam's average, at the norm of NAdam's update;  w <- (1 - lr wd) w - lr u.

    Source: "CASPR Adaptive" of AlgoPerf's first round (algorithms_results_v0.5, team 16): R is of gradients that the left
    side has preconditioned already, and c = tr(P L_before P) / rows fits it to a P just renewed. CASPR itself: Duvvuri et al.,
    ICLR 2024. Up to `start` the update is NAdam's. Here the norm is the block's, there the whole weight's.
    """

    lr, beta1 = LR(3e-3, help=RATE), BETA1(0.9)
    beta2 = BETA2(0.95, help="average of the factors, and of the squares of grafting")
    eps = hyper(1e-6, "added to the factors, relative to their largest eigenvalue", (1e-8, 1e-4, "log"))
    weight_decay = DECAY(0.05, help=WD)
    every = hyper(10, "steps between renewals of the roots", least=1)
    start: float = hyper(10, "last step that is not preconditioned; below 1: fraction of the run")
    block = hyper(1024, "largest side of a block; 0: whole matrices")
    graft_eps = EPS(help="floor of NAdam's denominator")

    state_per_parameter = 28.0

    def initial(self, group, count, m, n):
        eye = {size: torch.eye(size).repeat(count, 1, 1) for size in (m, n)}
        state = {"average": torch.zeros(count, m, n), "squares": torch.zeros(count, m, n)}
        state |= {"left": group["eps"] * eye[m], "left_before": group["eps"] * eye[m], "left_root": eye[m].clone()}
        return state | {"right": eye[n].clone(), "right_root": eye[n].clone()}

    def cost(self, m, n):
        return 3 * m * n * (m + n) + 10 * (m**3 + n**3) / self.defaults["every"]

    def update(self, group, state, G, ids):
        t, beta1, beta2, rows = group["t"], group["beta1"], group["beta2"], G.size(-2)
        left, right, P, Q = (state[name] for name in ("left", "right", "left_root", "right_root"))
        if t > 1 and (t - 1) % group["every"] == 0:  # P was renewed in the step before
            before = state["left_before"]
            ridge = group["eps"] * torch.linalg.eigvalsh(before)[:, -1:].unsqueeze(-1)
            fit = (torch.bmm(P, before) * P).sum((-2, -1), keepdim=True) + ridge * P.square().sum((-2, -1), keepdim=True)
            right.mul_(fit / rows)
            before.copy_(left)
        PG = torch.bmm(P, G)
        left.baddbmm_(G, G.mT, beta=beta2, alpha=1 - beta2)
        right.baddbmm_(PG.mT, PG, beta=beta2, alpha=(1 - beta2) / rows)
        m = state["average"].lerp_(G, 1 - beta1)
        m = torch.lerp(G, m, beta1) / (1 - beta1**t)
        v = state["squares"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        graft = m / ((v / (1 - beta2**t)).sqrt_() + group["graft_eps"])
        if t % group["every"] == 0:
            for factor, root in ((left, P), (right, Q)):
                root.copy_(inverse_root(factor, 0.5, group["eps"], root, relative=True))
        if t <= group["start"]:
            return graft
        return at_norm(torch.bmm(torch.bmm(P, m), Q), graft)


class SOAP(MatrixMethod):
    """Adam in the eigenbasis of Shampoo's factors: g' = Q_L^T g Q_R;  m, v of g' as Adam's;
    u = Q_L (m^ / (sqrt(v^) + eps)) Q_R^T;  w <- (1 - lr wd) w - lr u;  then L, R as Shampoo's and, every `every` steps,
    Q <- QR(L Q).

    Source: arXiv 2409.11321, github.com/nikhilvyas/SOAP. The first step only starts the factors and their bases. When a basis
    turns, m turns with it and v stays, its rows sorted by eigenvalue. A block starts at its first gradient other than zero. The
    source starts at the first of all; where that is zero the bases start as the identity, which QR steps leave only slowly.
    """

    lr, beta1 = LR(6e-3, 3e-4, 3e-2, RATE), BETA1(0.95)
    beta2, shampoo_beta = BETA2(0.95, help="average of squares in the basis"), BETA2(0.95, help="average of the factors")
    eps, weight_decay = EPS(), DECAY(0.01, 1e-3, 1.0, WD)
    every = hyper(10, "steps between renewals of the bases", least=1)
    block = hyper(1024, "largest side of a block; 0: whole matrices")

    state_per_parameter = 24.0

    def initial(self, group, count, m, n):
        sizes = {"average": (m, n), "squares": (m, n), "steps": ()}  # steps: since the bases were started, that one included
        sizes |= {"left": (m, m), "left_basis": (m, m), "right": (n, n), "right_basis": (n, n)}
        return {name: torch.zeros(count, *size) for name, size in sizes.items()}

    def _link(self) -> None:
        super()._link()
        self._started: set[int] = set()  # blocks whose bases are known to stand: to ask the device again is to wait for it

    def starting(self, state: dict[str, Tensor], G: Tensor, ids: list[int]) -> list[int]:
        """Places of the blocks that have their first gradient other than zero."""
        unknown = [k for k, i in enumerate(ids) if i not in self._started]
        if not unknown or G.is_meta:
            return []
        stands = state["steps"][unknown] > 0
        moves = (G[unknown].flatten(1).abs().amax(1) > 0) & ~stands
        moves, stands = torch.stack([moves, stands]).tolist()
        self._started |= {ids[k] for k, *either in zip(unknown, moves, stands, strict=True) if any(either)}
        return list(compress(unknown, moves))

    def cost(self, m, n):
        return 4 * m * n * (m + n) + 4 * (m**3 + n**3) / self.defaults["every"]

    def update(self, group, state, G, ids):
        t, beta1, beta2, shampoo_beta = (group[key] for key in ("t", "beta1", "beta2", "shampoo_beta"))
        m, v, steps = state["average"], state["squares"], state["steps"]
        left, right = state["left_basis"], state["right_basis"]  # zero before they are started, and so is all that follows
        rotated = torch.bmm(torch.bmm(left.mT, G), right)
        m.lerp_(rotated, 1 - beta1)
        v.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        d = v.sqrt().add_(group["eps"])
        shares = [-torch.expm1(steps.clamp(min=1) * math.log(max(beta, 1e-38))) for beta in (beta1, beta2)]
        u = torch.bmm(torch.bmm(left, m / d), right.mT).mul_((shares[1].sqrt() / shares[0])[:, None, None])
        state["left"].baddbmm_(G, G.mT, beta=shampoo_beta, alpha=1 - shampoo_beta)
        state["right"].baddbmm_(G.mT, G, beta=shampoo_beta, alpha=1 - shampoo_beta)
        if t > 1 and (t - 1) % group["every"] == 0:  # the first step, which only starts the bases, does not count
            self.turn(state)
        steps.add_(steps > 0)
        if starting := self.starting(state, G, ids):
            for side in ("left", "right"):
                state[side + "_basis"][starting] = torch.linalg.eigh(state[side][starting])[1].flip(-1)
            steps[starting] = 1
        return u

    def turn(self, state):
        """One step of orthogonal iteration on each basis, columns sorted by the eigenvalues that they estimate."""
        m, v = state["average"], state["squares"]
        for side, dim in (("left", 1), ("right", 2)):
            factor, old = state[side], state[side + "_basis"]
            product = torch.bmm(factor, old)
            order = (old * product).sum(1).argsort(-1, descending=True)  # diagonal of Q^T L Q, [k, size]
            columns = order.unsqueeze(1).expand_as(old)
            new = torch.linalg.qr(product.gather(2, columns))[0]
            v.copy_(v.gather(dim, (order.unsqueeze(2) if dim == 1 else order.unsqueeze(1)).expand_as(v)))
            back = torch.bmm(new.mT, old)  # from the old basis into the new one
            m.copy_(torch.bmm(back, m) if dim == 1 else torch.bmm(m, back.mT))
            old.copy_(new * (state["steps"] > 0)[:, None, None])  # zero still where it was not started


class Kron(MatrixMethod):
    """m <- b1 m + (1 - b1) g;  u = Q_L^T Q_L m^ Q_R^T Q_R, its root mean square at most 1.1;  w <- (1 - lr wd) w - lr u;
    first, with a probability that falls from 1 to `least_probability`: A = Q_L m^ Q_R^T, B = Q_L^-T V Q_R^-1, V ~ N(0, 1),
    Q_L <- Q_L - rate triu(A A^T - B B^T) Q_L / |A A^T + B B^T|, Q_R likewise with A^T A, B^T B.

    Source: PSGD, arXiv 1512.04202; github.com/evanatyourservice/kron_torch. Q are upper triangular; |.| is a cheap lower
    bound of the spectral norm.
    """

    lr, beta1, weight_decay = LR(3e-3, 1e-4, 1e-2, RATE), BETA1(0.9), DECAY(0.5, 0.1, 3.0, WD)
    rate = hyper(0.1, "step of Q", (0.03, 0.3, "log"))
    flat = hyper(500, "steps at probability 1; then it falls by exp(-0.001 a step)")
    least_probability = hyper(0.03, "of renewing Q in a step", (0.01, 1.0, "log"))
    scale = hyper(1.0, "first Q_L and Q_R: the root of this, times the identity")
    clip = hyper(1.1, "largest root mean square of an update; 0: none")
    block = hyper(1024, "largest side of a block; 0: whole matrices")

    state_per_parameter = 12.0

    def initial(self, group, count, m, n):
        scale = math.sqrt(group["scale"])
        sides = {side: scale * torch.eye(size).repeat(count, 1, 1) for side, size in (("left", m), ("right", n))}
        return {"average": torch.zeros(count, m, n)} | sides

    def cost(self, m, n):
        return 6 * m * n * (m + n)

    def update(self, group, state, G, ids):
        t, beta1 = group["t"], group["beta1"]
        m = state["average"].lerp_(G, 1 - beta1) / (1 - beta1**t)
        left, right = state["left"], state["right"]
        dice = random.Random(t)
        if dice.random() < max(group["least_probability"], math.exp(-0.001 * (t - 1 - group["flat"]))):
            if dice.random() < 0.01:  # keeps the two sides at one size; their product stays
                sizes = left.abs().amax((-2, -1), keepdim=True), right.abs().amax((-2, -1), keepdim=True)
                left.mul_((sizes[1] / sizes[0]).sqrt())
                right.mul_((sizes[0] / sizes[1]).sqrt())
            self.learn(group["rate"], left, right, m, self.probe(m, t, ids))
        u = torch.bmm(left.mT, torch.bmm(left, torch.bmm(torch.bmm(m, right.mT), right)))
        if not group["clip"]:
            return u
        return u * (group["clip"] / (u.square().mean((-2, -1), keepdim=True).sqrt() + 1e-30)).clamp(max=1)

    @staticmethod
    def probe(m: Tensor, t: int, ids: list[int]) -> Tensor:
        """Normal numbers [k, m, n], those of a block a function of its id and the step."""
        V = torch.empty_like(m)
        if V.is_meta:  # a dry run: shapes alone
            return V
        generator = torch.Generator(m.device)
        for row, block in zip(V, ids, strict=True):
            row.normal_(generator=generator.manual_seed(t * 1_000_003 + block))
        return V

    @staticmethod
    def learn(rate: float, left: Tensor, right: Tensor, G: Tensor, V: Tensor) -> None:
        """One step of Q_L, Q_R towards E[(Q^T Q) g g^T] = 1, by the relative gradient of the triangular group."""
        A = torch.bmm(torch.bmm(left, G), right.mT)
        B = torch.linalg.solve_triangular(left.mT, V, upper=False)
        B = torch.linalg.solve_triangular(right, B, upper=True, left=False)
        for Q, X, Y in ((left, A, B), (right, A.mT, B.mT)):
            one, two = torch.bmm(X, X.mT), torch.bmm(Y, Y.mT)
            step = rate / (norm_lower_bound(one + two) + torch.finfo(torch.bfloat16).tiny)
            Q.sub_(torch.bmm((one - two).triu() * step, Q))


def norm_lower_bound(A: Tensor) -> Tensor:
    """A lower bound of the spectral norms of symmetric [k, n, n], as [k, 1, 1]: |A x|, x the largest row through A once."""
    most = A.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
    A = A / most
    largest = A.square().sum(-1).argmax(-1)
    row = A.gather(1, largest.view(-1, 1, 1).expand(-1, 1, A.size(-1)))  # [k, 1, n]
    x = torch.bmm(row, A)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-30)
    return most * torch.linalg.vector_norm(torch.bmm(x, A), dim=-1, keepdim=True)
