"""What the optimizers are made of: typed hyperparameters, the registry, routing by role, and the base classes.

Notation in all of them: w weight, g gradient, m and v averages, all after t steps; x^ is x with Adam's bias correction
x / (1 - b^t). State is fp32, whatever the weights are; gradients are read, never changed; parameters without gradient
are left alone.
"""

import dataclasses
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, field
from functools import lru_cache, partial, partialmethod
from itertools import compress

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from engine.hardware import can_compile
from engine.spec import nearest, refusal, setting
from model import roles as roles_of
from model import splits as splits_of

ROLES = ("matrix", "embedding", "head", "vector", "scalar")
DECAYED = ("matrix", "embedding", "head")
OPTIMIZERS: dict[str, type["Method"]] = {}  # name -> class: every subclass of Method in this package enters itself


# ---------------------------------------------------------------- hyperparameters


def hyper(default, help: str, search: tuple | None = None, *, rest: bool = False, **limits) -> Field:
    """One hyperparameter, with limits as `engine.spec.setting` has them. Its type is the default's (None: a float or None),
    unless the attribute is annotated. search: (low, high, scale) if it is worth tuning, see SCALES. rest: it belongs to the
    optimizer that takes the rest."""
    return field(default=default, metadata={**setting(default, help, **limits).metadata, "search": search, "rest": rest})


def common(help: str, low: float, high: float, scale: str) -> Callable[..., Field]:
    """A hyperparameter that many methods have, as a function of its default and of what differs from the usual."""
    return lambda default, low=low, high=high, help=help, **limits: hyper(default, help, (low, high, scale), **limits)


def LR(default: float, low: float | None = None, high: float | None = None, help: str = "peak learning rate") -> Field:
    """Worth tuning from a tenth to ten times the default, unless said otherwise."""
    return hyper(default, help, (low or float(f"{default / 10:g}"), high or default * 10, "log"))


def EPS(default: float = 1e-8, help: str = "floor of the denominator") -> Field:
    return hyper(default, help)


MOMENTUM = common("mu", 0.8, 0.99, "complement")
BETA1 = common("average of gradients", 0.8, 0.98, "complement")
BETA2 = common("average of squares", 0.9, 0.999, "complement")
DECAY = common("wd, decayed roles only", 1e-2, 1.0, "log")
WARMUP = common("steps of linear warm-up; below 1: fraction of the run", 0.0, 0.2, "linear")
USUAL = {"beta1": BETA1, "betas/1": BETA1, "beta2": BETA2, "betas/2": BETA2, "momentum": MOMENTUM, "weight_decay": DECAY}
# Scale of a range to search -> what its numbers are above. complement: the logarithm of 1 - value is even, as suits the factor
# of an average: 0.9, 0.99, 0.999. choice: between two booleans
SCALES = {"linear": -math.inf, "log": 0, "complement": 0, "choice": -1}


def is_range(limits: object) -> bool:
    """(low, high, scale), the numbers within what the scale is for?"""
    try:
        low, high, scale = limits
        return SCALES[scale] < low < high < (1 if scale == "complement" else math.inf)
    except (TypeError, ValueError, KeyError):
        return False


# ---------------------------------------------------------------- parameter groups


def groups(gpt: nn.Module, wanted: Collection[str], by_split: bool = False, **options) -> list[dict]:
    """gpt's trainable parameters of the `wanted` roles as one param group with `options`; an empty list if it has none.
    by_split: one group per number of fused matrices instead, which the group states as `split`."""
    role, split, made = roles_of(gpt), splits_of(gpt), {}
    for name, p in gpt.named_parameters():
        if p.requires_grad and role[name] in wanted:
            stated = {"split": split.get(name, 1)} if by_split else {}
            group = made.setdefault(stated.get("split"), dict(params=[], roles=set()) | options | stated)
            group["params"].append(p)
            group["roles"].add(role[name])
    return [made[n] | {"roles": label(made[n]["roles"])} for n in sorted(made)]


def label(roles) -> str:
    """What a param group says of the roles in it: `matrix+embedding`."""
    return "+".join(sorted(set(roles), key=ROLES.index))


def decay_groups(gpt: nn.Module, weight_decay: float, wanted: tuple[str, ...] = ROLES, by_split=False) -> list[dict]:
    """Parameters of the `wanted` roles in two kinds of group: with weight decay, and without (vectors and scalars)."""
    decayed, never = set(wanted) & set(DECAYED), set(wanted) - set(DECAYED)
    return groups(gpt, decayed, by_split, weight_decay=weight_decay) + groups(gpt, never, by_split, weight_decay=0.0)


# ---------------------------------------------------------------- base classes


class Method:
    """An optimization method in one class: hyperparameters as class attributes, the rule, and what others must know of it.

    Each is a torch optimizer like any other, to be lifted into other code: `Lion(params, lr=1e-3)`. A subclass in this package
    that has an `lr` is registered under its `name`, or its class's name in snake case. Its docstring is the rule and
    "Source: ..."; `dataclasses.fields` lists its hyperparameters."""

    roles: tuple[str, ...] = ROLES  # what the method itself updates; AdamW takes the rest
    state_per_parameter = 8.0  # bytes of fp32 state for each parameter it updates; of a matrix method: at 1024 x 1024
    schedule_free = False  # does it bring its own schedule? Then it runs at a constant learning rate
    toy_lr = 0.1  # solves logistic regression in 400 steps (studies/noise_floor.py): 0.1 where a step is about lr long
    # Power of the width that `lr` goes with (lab/scaling), by muP's rule (arXiv 2203.03466, 2310.17813): the update's largest
    # singular value stays. -1 for updates whose entries all have one size; 0 for plain gradients and rates found by the method.
    transfer = -1.0

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        hypers = {name: f.default for name, f in vars(cls).items() if isinstance(f, Field)}
        types = {name: float | None if default is None else type(default) for name, default in hypers.items()}
        cls.__annotations__ = types | {n: kind for n, kind in inspect.get_annotations(cls).items() if n in types}
        dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
        if hasattr(cls, "lr") and cls.__module__.startswith(f"{__package__}."):
            words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", cls.__name__)  # CautiousAdamW: cautious_adamw
            OPTIMIZERS[vars(cls).get("name", words.lower())] = cls

    def __init__(self, params, lr: float | None = None, **given):
        known = {f.name: f.default for f in self.own_fields()}
        if unknown := given.keys() - known.keys():
            raise TypeError(f"{type(self).__name__} has no setting {min(unknown)!r}: {nearest(min(unknown), known)}")
        super().__init__(params, **self.arguments(**known | given | ({} if lr is None else {"lr": lr})))

    def arguments(self, **values) -> dict:
        """What the torch class underneath is made with, from the hyperparameters."""
        return {"defaults": values}

    @classmethod
    def own_fields(cls) -> list[Field]:
        """The hyperparameters of the method itself: without those of the optimizer that takes the rest."""
        return [f for f in dataclasses.fields(cls) if not f.metadata["rest"]]

    @classmethod
    def of_length(cls, steps: int, /, **given) -> dict:
        """Arguments of the constructor for a run of `steps` steps; lengths given as a fraction of the run in steps."""
        values = {f.name: given.get(f.name, f.default) for f in cls.own_fields()}
        for name in ("warmup", "ramp", "start", *["slow_start"] * bool(values.get("slow"))):
            if 0 < values.get(name, 0) < 1:
                values[name] = round(values[name] * steps)
        return values

    @classmethod
    def build(cls, gpt: nn.Module, steps: int, /, **given) -> torch.optim.Optimizer:
        """The optimizer over all of gpt, for a run of `steps` steps."""
        params = decay_groups(gpt, given.get("weight_decay", getattr(cls, "weight_decay", 0.0)), cls.roles)
        return with_rest(cls(params, **cls.of_length(steps, **given)), gpt, cls.roles, **cls.of_rest(given))

    @classmethod
    def of_rest(cls, given: dict) -> dict:
        """Settings of the AdamW that takes the rest."""
        rest = [f for f in dataclasses.fields(cls) if f.metadata["rest"]]
        return {f.name.removeprefix("adamw_"): given.get(f.name, f.default) for f in rest}

    @classmethod
    def transfer_of(cls, settings: dict) -> float:
        """`transfer` under these settings."""
        return cls.transfer


class Updater(torch.optim.Optimizer):
    """A torch optimizer by `update_weights`; loaded state keeps its types."""

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        keep_fp32(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_weights()
        return loss

    def update_weights(self) -> None:
        """Of all groups, where there is a gradient."""
        raise NotImplementedError


class Optimizer(Method, Updater):
    """Base of the methods that are written here: hyperparameters are checked, state stays in fp32."""

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for f in self.own_fields():
            if why := refusal(f.name, self.param_groups[-1][f.name], f.metadata):
                raise ValueError(f"{type(self).__name__}: {f.name} {why}")


def keep_fp32(optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """Undo torch's cast of loaded state to its parameter's type: averages of bf16 weights, say, must stay fp32."""
    numbers = [i for g in state_dict["param_groups"] for i in g["params"]]
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for i, p in zip(numbers, params, strict=True):
        saved = state_dict["state"].get(i, {})
        if any(isinstance(value, Tensor) and value.dtype != p.dtype for value in tree_leaves(saved)):
            optimizer.state[p] = moved(saved, p.device)


def moved(state, device: torch.device):
    """A copy of nested state on `device`."""
    return tree_map_only(Tensor, lambda x: x.detach().to(device, copy=True), state)


class Chain(Updater):
    """Several optimizers as one ordinary one, for schedulers, checkpoints and zero_grad too. The parts' param groups (the same
    dicts, marked with the index `part`) and one state dict belong to chain and parts alike."""

    def __init__(self, *parts: torch.optim.Optimizer):
        super().__init__([g | {"part": i} for i, part in enumerate(parts) for g in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self.parts = parts
        self._link()

    def _link(self) -> None:
        for i, part in enumerate(self.parts):
            part.param_groups = [g for g in self.param_groups if g["part"] == i]
            part.state = self.state

    def __setstate__(self, state):  # torch's load_state_dict ends here, with new dicts
        super().__setstate__(state)
        self._link()

    def update_weights(self) -> None:
        with torch.enable_grad():  # as a part has it that is stepped by itself
            for part in self.parts:
                part.step()

    def each(self, name: str) -> None:
        """Call the method of that name of all parts that have one."""
        for part in self.parts:
            getattr(part, name, lambda: None)()

    train, eval, compile = partialmethod(each, "train"), partialmethod(each, "eval"), partialmethod(each, "compile")


def parts(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """A chain's optimizers; any other is its own only part."""
    return optimizer.parts if isinstance(optimizer, Chain) else (optimizer,)


def with_rest(optimizer: torch.optim.Optimizer, gpt: nn.Module, roles: tuple[str, ...], /, **settings) -> torch.optim.Optimizer:
    """An optimizer of these roles, chained to AdamW for the other weights of gpt, if there are any."""
    adamw = OPTIMIZERS["adamw"]
    rest = decay_groups(gpt, adamw.weight_decay, tuple(r for r in ROLES if r not in roles))
    return Chain(optimizer, adamw(rest, **settings)) if rest else optimizer


# ---------------------------------------------------------------- element-wise methods


class Many:
    """Tensors computed with as if they were one: every operation is one torch._foreach call over the list. Other operands are
    lists as long, numbers, or 0-dim tensors. A rule may use what torch._foreach has: `x.sqrt()`, `x.mul_(y)`."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors

    def apply(self, name: str, *operands):
        # asked for alpha, torch adds a 0-dim tensor as it is, where else it would wait for the device to read its number
        alpha = {"alpha": 1} if name in ("add", "add_") and isinstance(operands[0], Tensor) else {}
        operands = (x.tensors if isinstance(x, Many) else x for x in operands)
        result = getattr(torch, f"_foreach_{name}")(self.tensors, *operands, **alpha)
        return self if name.endswith("_") else Many(result)

    def __getattr__(self, name: str) -> Callable:
        return partial(self.apply, name)

    __add__, __sub__, __mul__ = partialmethod(apply, "add"), partialmethod(apply, "sub"), partialmethod(apply, "mul")
    __truediv__, __pow__ = partialmethod(apply, "div"), partialmethod(apply, "pow")

    def clamp(self, least: float, most: float | None = None):
        return self.clamp_min(least) if most is None else self.clamp_min(least).clamp_max(most)

    def sum(self, *dim: int):
        return Many([x.sum(*dim) for x in self.tensors])


PIECE = 2**17  # weights: with the state and temporaries of a method, what the second-level caches of a CPU hold
LONE = 2**14  # weights: from here on a tensor is worth a call of compiled code (50 us) of its own
ROW = 256  # weights: compiled code sees a large tensor as rows of so many
Value = Tensor | Many  # what a rule computes with

# The usual scalars, which a rule gets if it names them; by the param group and the step.
SCALARS: dict[str, Callable[[dict, int], float]] = {
    "new": lambda group, t: 1 - group["momentum"],  # share of the newest gradient in an average
    "new1": lambda group, t: 1 - group["beta1"],
    "new2": lambda group, t: 1 - group["beta2"],
    "rate": lambda group, t: group["lr"] / (1 - group["beta1"] ** t),  # lr with the bias correction of Adam's first average
    "correction": lambda group, t: 1 / math.sqrt(1 - group["beta2"] ** t),  # factor on the root of Adam's second average
    "decay": lambda group, t: group["lr"] * group["weight_decay"],
    "keep": lambda group, t: 1 - group["lr"] * group["weight_decay"],  # what decoupled weight decay leaves of a weight
}


class Elementwise(Optimizer):
    """Base of methods in which a weight's update depends only on its own history.

    A subclass names its state tensors in `buffers`, and writes its formula once, as `rule`: plain tensor arithmetic in place.
    It gets weights, gradients and buffers, and by name the scalars it asks for: from `numbers`, the usual ones (SCALARS),
    hyperparameters. It runs over lists of tensors, one torch._foreach call an operation; on a CPU in pieces that stay in its
    cache. After `compile()`, on a CPU, it runs over one large tensor at a time in one fused pass, as fast as memory."""

    buffers: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()  # buffers that start as the weight; the others start at zero
    compiled = False

    @staticmethod
    def rule(w: Value, g: Value, *buffers: Value, **scalars: float) -> None:
        """Update weights and buffers in place from the gradients. Buffers come in the order of `names`, extras after them."""
        raise NotImplementedError

    def numbers(self, group: dict, t: int) -> dict[str, float | bool]:
        """Scalars of the rule in step t that are not among the usual ones."""
        return {}

    def names(self, group: dict) -> tuple[str, ...]:
        """The buffers in use under this group's settings."""
        return self.buffers

    def compile(self) -> None:
        """Run the rule as one compiled pass from now on, where weights are on a CPU with a C++ compiler. Compiles at once, with
        dummy weights: nothing of this optimizer is touched."""
        devices = {p.device for g in self.param_groups for p in g["params"]}
        self.compiled = devices == {torch.device("cpu")} and can_compile(torch.device("cpu"))
        if self.compiled:
            dummy = [g | {"params": [nn.Parameter(torch.zeros(LONE // ROW, ROW))]} for g in self.param_groups]
            twin = type(self)(dummy)
            twin.compiled = True
            for g in dummy:
                g["params"][0].grad = torch.zeros(LONE // ROW, ROW)
            for _ in range(max(2, *(g.get("every", 1) for g in dummy))):  # the first step may be another than those after
                twin.step()

    def update_weights(self) -> None:
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self.update_group(group, params)

    def update_group(self, group: dict, params: list[Tensor]) -> None:
        for t, members in self.alike(group, params):
            self.sweep(self.rule, group, t, members, *self.measure(group, t, members))

    def alike(self, group: dict, params: list[Tensor]) -> list[tuple[int, list[Tensor]]]:
        """Begin a step: (its number, the weights of one type and device for which it has that number)."""
        by_step = defaultdict(list)
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                for name in self.names(group):
                    self.buffer(p, name)
            if "aside" in state:
                raise RuntimeError(f"{type(self).__name__}: call train() before step(): evaluation weights are in place")
            state["step"] += 1
            by_step[state["step"], p.dtype, p.device].append(p)
        return [(t, members) for (t, *_), members in by_step.items()]

    def buffer(self, p: Tensor, name: str, like: Tensor | None = None) -> Tensor:
        """Made where there is none yet: a schedule may begin without momentum. like: has its shape, if it is not p's."""
        if name not in self.state[p]:
            zeros = torch.zeros_like(p if like is None else like, dtype=torch.float32)
            self.state[p][name] = zeros.copy_(p.detach()) if name in self.copies else zeros
        return self.state[p][name]

    def measure(self, group: dict, t: int, params: list[Tensor]) -> list[list[Tensor]]:
        """Extras of the rule: lists of 0-dim tensors, one a parameter."""
        return []

    def sums(self, rule: Callable[..., None], group: dict, t: int, params: list[Tensor], count: int = 1) -> list[list[Tensor]]:
        """What a rule with so many extras adds to them: 0-dim tensors, one a parameter, that start at zero."""
        extras = [[torch.zeros((), device=p.device) for p in params] for _ in range(count)]
        self.sweep(rule, group, t, params, *extras)
        return extras

    def sweep(self, rule: Callable[..., None], group: dict, t: int, params: list[Tensor], *extras: list[Tensor]) -> None:
        """rule(weight, gradient, buffers, extras, **scalars) over all of `params`, of one type and device; in fp32 always. The
        scalars, which it asks for by name, are worked out in double precision, so that 1 - beta is exact."""
        wanted, numbers = keywords(rule), self.numbers(group, t)
        usual = {name: SCALARS[name](group, t) for name in wanted if name in SCALARS and name not in numbers}
        values = group | usual | numbers
        scalars = {name: values[name] for name in wanted}
        rows = [
            (p.detach(), p.grad, *(self.buffer(p, name) for name in self.names(group)), *extra)
            for p, *extra in zip(params, *extras, strict=True)
        ]
        if cast := params[0].dtype != torch.float32:
            rows = [(w.float(), g.float(), *others) for w, g, *others in rows]
        elif self.compiled:
            fused = compiled(rule)
            as_tensors = {k: v if isinstance(v, bool) else torch.as_tensor(v, dtype=torch.float32) for k, v in scalars.items()}
            large = [w.numel() >= LONE and w.numel() % ROW == 0 and w.is_contiguous() for w, *_ in rows]
            for row in compress(rows, large):
                fused(*(x.reshape(-1, ROW).data if x.dim() else x for x in row), **as_tensors)  # .data: no view to guard on
            rows = [row for row, alone in zip(rows, large, strict=True) if not alone]
        for piece in [rows] if cast else pieces(rows):
            rule(*map(Many, map(list, zip(*piece, strict=True))), **scalars)
        if cast:
            torch._foreach_copy_(params, [w for w, *_ in rows])


@lru_cache
def keywords(rule: Callable[..., None]) -> tuple[str, ...]:
    return tuple(p.name for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY)


@lru_cache
def compiled(rule: Callable[..., None]) -> Callable[..., None]:
    """Of any size and with any scalars, which come as 0-dim tensors: a Python float would be compiled in."""
    return torch.compile(rule, dynamic=True, fullgraph=True)


def pieces(rows: list[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """rows; on a CPU in pieces of at most PIECE weights, for which large tensors are cut."""
    if rows and rows[0][0].device.type != "cpu":
        yield rows
        return
    piece, size = [], 0
    for row in rows:
        flat = row[0].is_contiguous()  # else its pieces would be copies
        n = -(-row[0].numel() // PIECE) if flat else 1
        for cut in zip(*(x.reshape(-1).split(PIECE) if flat and x.dim() else (x,) * n for x in row), strict=True):
            if piece and size + cut[0].numel() > PIECE:
                yield piece
                piece, size = [], 0
            piece.append(cut)
            size += cut[0].numel()
    if piece:
        yield piece


def lerp(start: Value, end: Value, weight: float) -> Value:
    """start + weight (end - start). torch's own has two formulas, on either side of weight 1/2, and its compiled form works
    out both for every number, which on one core costs up to a fifth of AdamW's time."""
    return start.lerp(end, weight) if isinstance(start, Many) else start + (end - start) * weight


def lerp_(start: Value, end: Value, weight: float) -> Value:
    """`lerp` in place: a moving average that takes up `end`."""
    return start.lerp_(end, weight) if isinstance(start, Many) else start.add_((end - start) * weight)


def total(x: Value) -> Value:
    """The sum of all elements; by rows first, since one long sum costs compiled code more than reading memory does."""
    return x.sum(-1).sum()
