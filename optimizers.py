"""Every optimizer, one registry, one way in: `build(spec, gpt)` gives one torch.optim.Optimizer.

    build("adamw:lr=3e-3", gpt)                      a registered method, its settings by key
    build("my_optimizer.py:Mine:lr=0.1", gpt)        one's own: a torch Optimizer, or a dataclass with `build(gpt)`

To add a method: write its torch.optim.Optimizer (or use torch's), a frozen dataclass of its settings whose docstring
is the update rule, and one line in OPTIMIZERS. Notation: w weight, g gradient, m and v averages, all after t steps.
Parameters are routed by `model.roles`, never by shape: a small embedding is 2-D too and must not be orthogonalised.
Weight decay acts on matrices, embeddings and the head; never on vectors (gains, biases) and scalars: nanoGPT's rule.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hardware import has_native_bf16
from model import roles as roles_of
from model import splits as splits_of
from spec import UsageError, nearest, parse

ROLES = ("matrix", "embedding", "head", "vector", "scalar")
DECAYED = ("matrix", "embedding", "head")


# ---------------------------------------------------------------- settings and parameter groups


def hyper(default, help: str, search: tuple[float, float, str] | None = None):
    """One hyperparameter: its default, what it is, and (low, high, "log" or "linear") where it is worth tuning."""
    return field(default=default, metadata={"help": help, "search": search})


class Settings:
    """Base of the registered dataclasses: typed hyperparameters that know how to build their optimizer."""

    roles: tuple[str, ...] = ROLES  # what the method itself updates; AdamW takes the rest
    state_per_parameter = 8.0  # bytes of fp32 state for each parameter it updates

    def build(self, gpt: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError


def groups(gpt: nn.Module, wanted: tuple[str, ...], by_split: bool = False, **options) -> list[dict]:
    """gpt's trainable parameters of the `wanted` roles as one param group with `options`; an empty list if it has none.

    by_split: one group per number of fused matrices instead, which the group states as `split`.
    """
    role, split = roles_of(gpt), splits_of(gpt)
    chosen = defaultdict(list)
    for name, p in gpt.named_parameters():
        if p.requires_grad and role[name] in wanted:
            chosen[split.get(name, 1) if by_split else None].append((role[name], p))
    found = []
    for n, members in sorted(chosen.items()):
        label = "+".join(r for r in ROLES if any(r == own for own, _ in members))
        found.append(dict(params=[p for _, p in members], roles=label, **options) | ({"split": n} if by_split else {}))
    return found


def decay_groups(gpt: nn.Module, weight_decay: float, wanted: tuple[str, ...] = ROLES, by_split=False) -> list[dict]:
    """Parameters of the `wanted` roles in two kinds of group: with weight decay, and without (vectors and scalars)."""
    decayed = tuple(r for r in wanted if r in DECAYED)
    never = tuple(r for r in wanted if r not in DECAYED)
    return groups(gpt, decayed, by_split, weight_decay=weight_decay) + groups(gpt, never, by_split, weight_decay=0.0)


class Chain(torch.optim.Optimizer):
    """Several optimizers as one, in torch's usual state_dict format.

    The parts' param groups (the same dicts, marked with the index `part`) and one state dict belong to the chain and
    to its parts alike, so that schedulers, checkpoints and zero_grad see a single ordinary optimizer.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts: tuple[torch.optim.Optimizer, ...] = ()  # empty while the parts' own groups are being taken over
        super().__init__([g | {"part": i} for i, part in enumerate(parts) for g in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self.parts = parts
        self._link()

    def _link(self) -> None:
        for i, part in enumerate(self.parts):
            part.param_groups = [g for g in self.param_groups if g["part"] == i]
            part.state = self.state

    def __getstate__(self):
        return super().__getstate__() | {"parts": self.parts}

    def __setstate__(self, state):  # torch's load_state_dict ends here, with new dicts; so does copy.deepcopy
        super().__setstate__(state)
        self._link()

    def add_param_group(self, param_group: dict) -> None:
        """A group without `part` goes to the last optimizer, the one that takes whatever is left."""
        param_group.setdefault("part", len(self.parts) - 1)
        super().add_param_group(param_group)
        if self.parts:
            self.parts[param_group["part"]].add_param_group(param_group)  # fills in that optimizer's defaults
            self._link()

    def step(self, closure=None):
        loss = evaluate(closure)
        for part in self.parts:
            part.step()
        return loss

    def _switch(self, mode: str) -> None:
        for part in self.parts:
            getattr(part, mode, do_nothing)()

    def train(self) -> None:
        self._switch("train")

    def eval(self) -> None:
        self._switch("eval")


def evaluate(closure):
    """The loss of torch's optional closure, with gradients on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def do_nothing() -> None:
    """train() and eval() of an optimizer whose weights are the same in both."""


# ---------------------------------------------------------------- first-order methods


@dataclass(frozen=True)
class SGDSettings(Settings):
    """g <- g + wd w;  m <- mu m + g;  w <- w - lr (g + mu m) with Nesterov's form, w - lr m without.

    Source: torch.optim.SGD (fused). Its weight decay is coupled: it passes through the momentum.
    """

    lr: float = hyper(0.1, "peak learning rate", (1e-2, 1.0, "log"))
    momentum: float = hyper(0.9, "mu", (0.8, 0.99, "linear"))
    nesterov: bool = hyper(True, "look one step ahead")
    weight_decay: float = hyper(0.0, "wd, decayed roles only", (1e-5, 1e-2, "log"))

    state_per_parameter = 4.0

    def build(self, gpt):
        nesterov = self.nesterov and self.momentum > 0  # torch refuses Nesterov's form without momentum
        params = decay_groups(gpt, self.weight_decay)
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, nesterov=nesterov, fused=True)


@dataclass(frozen=True)
class AdamWSettings(Settings):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps),
    with m^ = m / (1 - b1^t), v^ = v / (1 - b2^t).

    Source: arXiv 1711.05101, torch.optim.AdamW (fused). beta2 0.95 rather than Adam's 0.999: GPT-3, nanoGPT.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    def build(self, gpt, wanted: tuple[str, ...] = ROLES):
        params, betas = decay_groups(gpt, self.weight_decay, wanted), (self.beta1, self.beta2)
        return torch.optim.AdamW(params, lr=self.lr, betas=betas, eps=self.eps, fused=True)


# ---------------------------------------------------------------- matrix methods: Muon

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
    """U V^T, nearly, of G = U S V^T by Newton-Schulz iteration: every singular value is driven towards 1.

    Args:
        G: [..., m, n]; leading dimensions are a batch of independent matrices.
        steps: iterations.
        coefficients: a key of COEFFICIENTS.
        dtype: of the iteration: "auto", "fp32" or "bf16".
    Returns:
        [..., m, n] in the iteration's dtype.
    """
    if G.size(-2) > G.size(-1):  # the products below are the cheaper the fewer rows there are
        return orthogonalize(G.mT, steps, coefficients, dtype).mT
    norm = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)  # Frobenius: at least the largest singular value
    X = (G / (norm + 1e-7)).to(iteration_dtype(dtype, G.device)).reshape(-1, *G.shape[-2:])
    table = COEFFICIENTS[coefficients]
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.view(G.shape)


def orthogonalize_shared(matrices: list[Tensor], *how) -> Tensor:
    """`orthogonalize` of equal-shaped [m, n] matrices, shared between the ranks; all get all: [len(matrices), m, n].

    Gradients, hence matrices, are equal on all ranks under DDP. One rank is the same path with everything as its share.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)
    share = -(-len(matrices) // world)
    mine = matrices[rank * share : (rank + 1) * share]
    mine = mine + [torch.zeros_like(matrices[0])] * (share - len(mine))  # the gather wants equal shares
    result = orthogonalize(torch.stack(mine), *how)
    if world == 1:
        return result
    gathered = result.new_empty(world * share, *result.shape[1:])
    dist.all_gather_into_tensor(gathered, result.contiguous())
    return gathered[: len(matrices)]


class Muon(torch.optim.Optimizer):
    """m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m (Nesterov) or m;  w <- (1 - lr wd) w - lr scale orthogonalize(u).

    For hidden weight matrices only ([rows, columns, ...], the rest flattened). A group may set `split` = n when its
    weights are n matrices fused along the first dimension: each is orthogonalised and scaled on its own.
    Same-shape matrices, tall ones transposed, go through one batched call; under torch.distributed each rank takes a
    share of it. Parameters without gradient are skipped. Source: Keller Jordan, kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        steps: int = 5,
        coefficients: str = "quintic",
        scale: str = "keller",
        dtype: str = "auto",
    ):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        defaults |= {"steps": steps, "coefficients": coefficients, "scale": scale, "dtype": dtype, "split": 1}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key, known in (("coefficients", COEFFICIENTS), ("scale", SCALES), ("dtype", ("auto", *DTYPES))):
            if group[key] not in known:
                raise ValueError(f"Muon has no {key} {group[key]!r}: {nearest(group[key], known)}")
        if not (group["lr"] >= 0 and 0 <= group["momentum"] < 1 and group["weight_decay"] >= 0 and group["steps"] > 0):
            raise ValueError("Muon needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0 and steps >= 1")
        for p in group["params"]:
            if p.dim() < 2 or p.size(0) % group["split"]:
                raise ValueError(f"Muon with split {group['split']} got a weight of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = evaluate(closure)
        work, buckets = [], defaultdict(list)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = self._momentum(group, params)
            work.append((group, params, updates))
            how = group["steps"], group["coefficients"], group["dtype"]
            for matrix in self._matrices(group, updates):
                buckets[matrix.shape, matrix.dtype, matrix.device, how].append(matrix)
        for (*_, how), matrices in buckets.items():
            torch._foreach_copy_(matrices, orthogonalize_shared(matrices, *how).unbind())  # views: this fills `updates`
        for group, params, updates in work:
            shapes = [(u.size(0) // group["split"], u[0].numel()) for u in updates]
            torch._foreach_mul_(updates, [SCALES[group["scale"]](*shape) for shape in shapes])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
        return loss

    def _momentum(self, group: dict, params: list[Tensor]) -> list[Tensor]:
        """Advance the averages; the updates before orthogonalisation, in tensors of their own."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in params]
        gradients = [p.grad for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        if not group["nesterov"]:
            return [m.clone() for m in averages]
        return torch._foreach_lerp(gradients, averages, group["momentum"])

    def _matrices(self, group: dict, updates: list[Tensor]) -> Iterator[Tensor]:
        """Views [m, n], m <= n, of the single matrices in `updates`."""
        for update in updates:
            for matrix in update.view(group["split"], -1, update[0].numel()).unbind():
                yield matrix.mT if matrix.size(0) > matrix.size(1) else matrix


@dataclass(frozen=True)
class MuonSettings(Settings):
    """Hidden matrices: w <- (1 - lr wd) w - lr scale orthogonalize(momentum of g). Everything else: AdamW.

    Source: Keller Jordan's Muon; settings near modded-nanogpt's optimizer track. `adamw_*` set the other optimizer.
    """

    lr: float = hyper(0.02, "peak learning rate of the hidden matrices", (3e-3, 1e-1, "log"))
    momentum: float = hyper(0.95, "mu", (0.85, 0.99, "linear"))
    nesterov: bool = hyper(True, "look one step ahead")
    weight_decay: float = hyper(0.01, "wd of the hidden matrices", (1e-3, 0.3, "log"))
    steps: int = hyper(5, "orthogonalisation iterations")
    coefficients: str = hyper("quintic", f"of the iteration: {', '.join(COEFFICIENTS)} (cubic wants 12 steps)")
    scale: str = hyper("keller", f"factor by shape: {', '.join(SCALES)}; learning rates do not carry over")
    dtype: str = hyper("auto", "of the iteration: auto (bf16 where native), fp32, bf16")
    adamw_lr: float = hyper(3e-3, "peak learning rate of vectors and scalars", (3e-4, 3e-2, "log"))
    embedding_lr: float | None = hyper(None, "peak rate of embeddings; none or 0: adamw_lr", (1e-3, 1.0, "log"))
    head_lr: float | None = hyper(None, "peak rate of an untied head; none or 0: adamw_lr", (3e-4, 3e-2, "log"))
    adamw_beta1: float = hyper(0.9, "AdamW's average of gradients", (0.7, 0.95, "linear"))
    adamw_beta2: float = hyper(0.95, "AdamW's average of squares", (0.9, 0.999, "linear"))
    adamw_eps: float = hyper(1e-10, "floor of AdamW's denominator")
    adamw_weight_decay: float = hyper(0.0, "wd of embeddings and head", (1e-3, 0.3, "log"))

    roles = ("matrix",)
    state_per_parameter = 4.0

    def build(self, gpt):
        keys = ("lr", "momentum", "nesterov", "weight_decay", "steps", "coefficients", "scale", "dtype")
        muon = Muon(groups(gpt, self.roles, by_split=True), **{key: getattr(self, key) for key in keys})
        decay = self.adamw_weight_decay
        rest = groups(gpt, ("embedding",), lr=self.embedding_lr or self.adamw_lr, weight_decay=decay)
        rest += groups(gpt, ("head",), lr=self.head_lr or self.adamw_lr, weight_decay=decay)
        rest += groups(gpt, ("vector", "scalar"), weight_decay=0.0)
        betas = (self.adamw_beta1, self.adamw_beta2)
        return Chain(muon, torch.optim.AdamW(rest, lr=self.adamw_lr, betas=betas, eps=self.adamw_eps, fused=True))


# ---------------------------------------------------------------- the way in

OPTIMIZERS: dict[str, type[Settings]] = {
    "adamw": AdamWSettings,
    "sgd": SGDSettings,
    "muon": MuonSettings,
}


def build(spec: str, gpt: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `spec` names, over all trainable parameters of `gpt`.

    Each param group has `lr`, `initial_lr` (what a schedule multiplies), `weight_decay` and `roles` (a label).
    `train()` and `eval()` exist on the result: call eval() before validation and checkpoints, train() after.

    Raises:
        UsageError: unknown name or key, value out of range, a class that is no optimizer or misses parameters.
    """
    cls, settings = parse(spec, OPTIMIZERS, "optimizer")
    gpt = unwrapped(gpt)
    try:
        if issubclass(cls, torch.optim.Optimizer):
            optimizer = build_own(cls, settings, gpt)
        elif hasattr(cls, "build"):
            optimizer = cls(**settings).build(gpt)
        else:
            raise UsageError(f"optimizer {spec!r}: {cls.__name__} is no torch.optim.Optimizer and has no build(gpt)")
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {spec!r}: {error}") from error
    check_every_parameter_once(spec, optimizer, gpt)
    role = {p: roles_of(gpt)[name] for name, p in gpt.named_parameters()}
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("weight_decay", 0.0)
        group.setdefault("roles", "+".join(sorted({role[p] for p in group["params"]}, key=ROLES.index)))
    for mode in ("train", "eval"):
        if not hasattr(optimizer, mode):
            setattr(optimizer, mode, do_nothing)
    return optimizer


def build_own(cls: type[torch.optim.Optimizer], settings: dict, gpt: nn.Module) -> torch.optim.Optimizer:
    """An outside torch Optimizer over decay and no-decay groups. Its class attribute `roles`, if any, names what it
    takes; AdamW at its defaults takes the rest, and the groups state `split` (see `groups`)."""
    own = getattr(cls, "roles", ROLES)
    if unknown := set(own) - set(ROLES):
        raise UsageError(f"optimizer {cls.__name__} has an unknown role {min(unknown)!r}: known: {', '.join(ROLES)}")
    decay = settings.get("weight_decay", default_of(cls, "weight_decay", 0.0))
    optimizer = cls(decay_groups(gpt, decay, own, by_split=set(own) < set(ROLES)), **settings)
    rest = tuple(r for r in ROLES if r not in own)
    return Chain(optimizer, AdamWSettings().build(gpt, rest)) if groups(gpt, rest) else optimizer


def default_of(cls: type, key: str, otherwise):
    """Default of a constructor's keyword, `otherwise` where it has none."""
    parameter = inspect.signature(cls).parameters.get(key)
    return otherwise if parameter is None or parameter.default is parameter.empty else parameter.default


def unwrapped(gpt: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, whose prefixes would hide the parameters' roles."""
    while (inner := getattr(gpt, "_orig_mod", getattr(gpt, "module", None))) is not None:
        gpt = inner
    return gpt


def check_every_parameter_once(spec: str, optimizer: torch.optim.Optimizer, gpt: nn.Module) -> None:
    """A parameter in no group would silently not train; one in two groups would be updated twice.

    Raises:
        UsageError: with the name of the first such parameter.
    """
    times = Counter(p for group in optimizer.param_groups for p in group["params"])
    for name, p in gpt.named_parameters():
        if p.requires_grad and times[p] != 1:
            raise UsageError(f"optimizer {spec!r} has parameter {name!r} in {times[p]} param groups instead of one")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state held on this rank; 0 before the first step, since state is made when first needed."""

    def size(value) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    return size(dict(optimizer.state))
