"""What the optimizers are made of: typed settings, routing by role, and the base classes.

Notation in all of them: w weight, g gradient, m and v averages, all after t steps; x^ is x with Adam's bias correction
x / (1 - b^t). State is fp32, whatever the weights are; gradients are read, never changed; parameters without gradient
are left alone.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import field

import torch
from torch import Tensor, nn

from model import roles as roles_of
from model import splits as splits_of
from spec import nearest

ROLES = ("matrix", "embedding", "head", "vector", "scalar")
DECAYED = ("matrix", "embedding", "head")


# ---------------------------------------------------------------- settings and parameter groups


def hyper(default, help: str, search: tuple[float, float, str] | None = None, least: float = 0, choices=None):
    """One hyperparameter: its default, what it is, (low, high, "log" or "linear") where it is worth tuning, the least
    value that makes sense and the words it takes."""
    return field(default=default, metadata={"help": help, "search": search, "least": least, "choices": choices})


def rest(default, help: str, search=None):
    """A hyperparameter of the optimizer that takes what a matrix method leaves."""
    f = hyper(default, help, search)
    return field(default=default, metadata=f.metadata | {"rest": True})


class Settings:
    """Base of the registered dataclasses: typed hyperparameters that know how to build their optimizer."""

    roles: tuple[str, ...] = ROLES  # what the method itself updates; AdamW takes the rest
    state_per_parameter = 8.0  # bytes of fp32 state for each parameter it updates; of a matrix method: at 1024 x 1024
    method: type  # the optimizer class, set by that class

    def build(self, gpt: nn.Module, steps: int) -> torch.optim.Optimizer:
        """The optimizer over all of gpt, for a run of `steps` steps."""
        return self.method(decay_groups(gpt, getattr(self, "weight_decay", 0.0)), **self.own(steps))

    def own(self, steps: int) -> dict:
        """Constructor arguments of `method`; lengths given as a fraction of the run in steps."""
        values = {f.name: getattr(self, f.name) for f in own_fields(type(self))}
        for name in ("warmup", "ramp", "start"):
            if 0 < values.get(name, 0) < 1:
                values[name] = round(values[name] * steps)
        return values


def own_fields(settings: type[Settings]) -> list[dataclasses.Field]:
    """The hyperparameters of the method itself: without those of the optimizer that takes the rest."""
    return [f for f in dataclasses.fields(settings) if "rest" not in f.metadata]


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


# ---------------------------------------------------------------- base classes


def evaluate(closure):
    """The loss of torch's optional closure, with gradients on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Optimizer(torch.optim.Optimizer):
    """What ours share: hyperparameters from the dataclass `settings`, checked, and state that stays in fp32.

    Each can be lifted into other torch code: `Lion(params, lr=1e-3)`, param groups, schedulers, state_dict as usual.
    """

    settings: type[Settings]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "settings" in vars(cls):
            cls.settings.method = cls

    def __init__(self, params, lr: float | None = None, **given):
        known = {f.name: f.default for f in own_fields(self.settings)}
        if unknown := given.keys() - known.keys():
            raise TypeError(f"{type(self).__name__} has no setting {min(unknown)!r}: {nearest(min(unknown), known)}")
        super().__init__(params, known | given | ({} if lr is None else {"lr": lr}))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group, name = self.param_groups[-1], type(self).__name__
        for f in own_fields(self.settings):
            value, least, choices = group[f.name], f.metadata["least"], f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{name} has no {f.name} {value!r}: {nearest(str(value), choices)}")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                most = 1 if f.name.startswith(("beta", "momentum", "decay")) else math.inf
                if not (least <= value < most):
                    raise ValueError(f"{name} needs {least:g} <= {f.name} < {most:g}, got {value}")

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        keep_fp32(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        loss = evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update_group(group, params)
        return loss

    def update_group(self, group: dict, params: list[Tensor]) -> None:
        raise NotImplementedError


def keep_fp32(optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """Undo torch's cast of loaded state to the type of its parameter: averages of bf16 weights must stay fp32."""
    numbers = [i for g in state_dict["param_groups"] for i in g["params"]]
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for i, p in zip(numbers, params, strict=True):
        if p.dtype != torch.float32 and i in state_dict["state"]:
            optimizer.state[p] = moved(state_dict["state"][i], p.device)


def moved(value, device: torch.device):
    """A copy of nested state on `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    return {k: moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value


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

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        keep_fp32(self, state_dict)

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

    def train(self) -> None:
        for part in self.parts:
            mode(part, "train")

    def eval(self) -> None:
        for part in self.parts:
            mode(part, "eval")


def parts(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that a chain holds; of any other, itself."""
    return optimizer.parts if isinstance(optimizer, Chain) else (optimizer,)


def mode(optimizer: torch.optim.Optimizer, name: str) -> None:
    """optimizer.train() or .eval(), for methods that evaluate other weights than they train; else nothing."""
    getattr(optimizer, name, lambda: None)()


PIECE = 2**17  # weights: with the state and temporaries of a method, what the second-level caches of a CPU hold


class Elementwise(Optimizer):
    """Base of methods in which a weight's update looks at that weight's own history alone.

    A subclass names its state tensors in `buffers` and writes its rule once, in `update`, over lists of tensors. On a GPU
    the lists are a whole param group, so that a step is a few kernels. On a CPU they are pieces that stay in its cache
    while the rule passes over them, so that a step costs one trip to memory, however many passes the rule makes.
    """

    buffers: tuple[str, ...] = ()

    def update_group(self, group: dict, params: list[Tensor]) -> None:
        for t, members in self.alike(group, params):
            extras = self.measure(group, t, members)
            for piece in self.pieces(members, *extras):
                self.update(group, t, *piece)

    def alike(self, group: dict, params: list[Tensor]) -> list[tuple[int, list[Tensor]]]:
        """Begin a step: (its number, the weights of one type and device for which it has that number)."""
        found = defaultdict(list)
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                self.initialise(group, p, state)
            if "aside" in state:
                raise RuntimeError(f"{type(self).__name__}: call train() before step(): evaluation weights are in place")
            state["step"] += 1
            found[state["step"], p.dtype, p.device].append(p)
        return [(t, members) for (t, *_), members in found.items()]

    def initialise(self, group: dict, p: Tensor, state: dict) -> None:
        for name in self.buffers:
            state[name] = torch.zeros_like(p, dtype=torch.float32)

    def measure(self, group: dict, t: int, params: list[Tensor]) -> list[list[Tensor]]:
        """What `update` gets beside weights, gradients and buffers: lists of single numbers, one a parameter."""
        return []

    def pieces(self, params: list[Tensor], *extras: list[Tensor]) -> Iterator[list[list[Tensor]]]:
        """Weights, gradients, buffers, extras: lists of equal length. Weights that are not fp32 are updated in fp32."""
        columns = [
            [p.detach() for p in params],
            [p.grad for p in params],
            *([self.state[p][name] for p in params] for name in self.buffers),
        ]
        if params[0].dtype != torch.float32:
            exact = [p.float() for p in params]
            yield [exact, [g.float() for g in columns[1]], *columns[2:], *extras]
            torch._foreach_copy_(params, exact)
            return
        if params[0].device.type != "cpu":
            yield [*columns, *extras]
            return
        piece, size = [], 0
        for *tensors, numbers in zip(*columns, zip(*extras, strict=True) if extras else [()] * len(params), strict=True):
            flat = tensors[0].is_contiguous()  # else its pieces would be copies
            for row in zip(*(x.reshape(-1).split(PIECE) if flat else (x,) for x in tensors), strict=True):
                if piece and size + row[0].numel() > PIECE:
                    yield list(map(list, zip(*piece, strict=True)))
                    piece, size = [], 0
                piece.append((*row, *numbers))
                size += row[0].numel()
        yield list(map(list, zip(*piece, strict=True)))

    def update(self, group: dict, t: int, w: list[Tensor], g: list[Tensor], *buffers: list[Tensor]) -> None:
        """The rule, for equal-length lists of weights, gradients, buffers and extras; t counts these weights' steps."""
        raise NotImplementedError


def average(m: list[Tensor], g: list[Tensor], beta: float) -> None:
    """m <- beta m + (1 - beta) g"""
    torch._foreach_lerp_(m, g, 1 - beta)


def average_squares(v: list[Tensor], g: list[Tensor], beta: float) -> None:
    """v <- beta v + (1 - beta) g^2"""
    torch._foreach_mul_(v, beta)
    torch._foreach_addcmul_(v, g, g, 1 - beta)


def denominator(v: list[Tensor], correction: float, eps: float) -> list[Tensor]:
    """sqrt(v / correction) + eps"""
    d = torch._foreach_sqrt(v)
    if correction != 1:
        torch._foreach_div_(d, math.sqrt(correction))
    torch._foreach_add_(d, eps)
    return d


def decay(group: dict, w: list[Tensor], factor: float | None = None) -> None:
    """w <- (1 - factor wd) w; factor is lr if not given."""
    if group["weight_decay"]:
        torch._foreach_mul_(w, 1 - (group["lr"] if factor is None else factor) * group["weight_decay"])


class Swapped:
    """Mixin of optimizers that are evaluated at other weights than they train at: eval() puts those in place and sets
    the training weights aside, exactly; train() puts them back. Both may be called again and again. A state_dict made
    in eval mode continues as one made in train mode does: load it beside the model's weights, then call train()."""

    def evaluation_weights(self, group: dict, params: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if self.state.get(p) and "aside" not in self.state[p]]
            for p, w in zip(params, self.evaluation_weights(group, params), strict=True):
                self.state[p]["aside"] = p.detach().clone()
                p.copy_(w)

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if (aside := self.state.get(p, {}).pop("aside", None)) is not None:
                    p.copy_(aside)
