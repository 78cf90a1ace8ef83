"""Every optimizer, one registry, one way in: `build(spec, gpt)` gives one torch.optim.Optimizer.

    build("adamw:lr=3e-3", gpt)                      a registered method, its settings by key
    build("my_optimizer.py:Mine:lr=0.1", gpt)        your own: written like those here, or any torch Optimizer;
                                                     `engine.spec.trust([spec])` comes first
    build("heavyball.ForeachSOAP:lr=1e-3", gpt)      a class of torch.optim or a public collection that is installed

    base.py            hyperparameters, the base classes     elementwise.py  the classics, Adam and its relatives
    schedule_free.py   methods without a schedule            matrix.py       Muon and its relatives
    kronecker.py       Shampoo, CASPR, SOAP, Kron
    average.py         averages of the weights               mantissa.py     bf16 weights that lose nothing

To add a method: one class in its family's file, with its hyperparameters, its rule, and a docstring that states the rule and
its source. An element-wise rule is plain tensor arithmetic; `compile_update` turns it into one pass over memory.

Parameters are routed by `model.roles`, never by shape: a small embedding is 2-D too and must not be orthogonalised.
Weight decay acts on matrices, embeddings and the head; never on vectors (gains, biases) and scalars: nanoGPT's rule.
"""

import contextlib
import dataclasses
import inspect
import math
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine.spec import UsageError, check_trusted, convert, nearest, optional, parse, split, trust, typed_keys
from model import roles as roles_of
from optimizers import base, elementwise, schedule_free  # they fill the registry, in the order of these imports

# isort: split
from optimizers import kronecker, matrix
from optimizers.average import AVERAGES, OUTER, Averaged, build_around
from optimizers.base import OPTIMIZERS, ROLES, Chain, Method, decay_groups, groups, label, parts, with_rest

__all__ = ["AVERAGES", "OPTIMIZERS", "OUTER", "Choice", "build", "build_around", "compile_update", "find"]
__all__ += ["elementwise", "kronecker", "matrix", "parts", "period", "restore", "schedule_free", "state_bytes", "step"]

COLLECTIONS = ("torch.optim", "pytorch_optimizer", "heavyball")  # public packages whose classes are found by name


@dataclass(frozen=True)
class Choice:
    """The optimizer that a SPEC chooses, before it is built: a class, and the settings that the SPEC gives."""

    spec: str
    cls: type
    settings: dict[str, Any]

    @property
    def defaults(self) -> dict[str, Any]:
        """Of the settings that have one."""
        if issubclass(self.cls, Method):
            return {f.name: f.default for f in dataclasses.fields(self.cls)}
        return {key: p.default for key, p in inspect.signature(self.cls).parameters.items() if p.default is not p.empty}

    def setting(self, key: str, otherwise: Any = None) -> Any:
        """The value of a setting: the SPEC's, or the class's default; `otherwise` where it has none."""
        return (self.defaults | self.settings).get(key, otherwise)

    @property
    def hyperparameters(self) -> dict[str, tuple[Any, Any]]:
        """Key -> (default, range to search or None: see `base.hyper`). An outside class declares ranges in `search`; else the
        usual names have the usual ranges, and the rate a factor of 30 either way (1e-4 to 1 without a default). `betas/1` is
        the first of a tuple. Raises UsageError: what is declared is no range."""
        if issubclass(self.cls, Method):
            return {f.name: (f.default, f.metadata["search"]) for f in dataclasses.fields(self.cls)}
        usual, stated, defaults = {key: field(0.0).metadata["search"] for key, field in base.USUAL.items()}, self.defaults, {}
        for key in typed_keys(self.cls):
            value = stated.get(key)
            defaults |= {f"{key}/{n}": part for n, part in enumerate(value, 1)} if isinstance(value, tuple) else {key: value}
        if "lr" in defaults:
            rate = defaults["lr"] if isinstance(defaults["lr"], float) and defaults["lr"] > 0 else 0
            usual["lr"] = (float(f"{rate / 30:.3g}"), float(f"{rate * 30:.3g}"), "log") if rate else (1e-4, 1.0, "log")
            defaults["lr"] = rate or 1e-3
        if "adamw_lr" in defaults:
            defaults["adamw_lr"], usual["adamw_lr"] = find("adamw").hyperparameters["lr"]
        ranges = getattr(self.cls, "search", usual)
        for key, limits in ranges.items():
            if ranges is not usual and (key not in defaults or not base.is_range(limits)):
                known = f"(low, high, linear, log, complement or choice) for one of {', '.join(defaults)}"
                raise UsageError(f"optimizer {self.spec!r}: search has {key!r}: {limits!r}, which is not {known}")
        return {key: (default, ranges.get(key)) for key, default in defaults.items()}

    @property
    def own_schedule(self) -> bool:
        """Does it bring its own schedule? Then it must run at a constant learning rate."""
        return getattr(self.cls, "schedule_free", False)

    @property
    def has_momentum(self) -> bool:
        """Has it a setting `momentum`, which a schedule can move? Unknown for outside classes: True."""
        return not issubclass(self.cls, Method) or hasattr(self.cls, "momentum")

    @property
    def transfer(self) -> float:
        """Power of the width that `lr` goes with: see `Method.transfer`."""
        return self.cls.transfer_of(self.settings) if issubclass(self.cls, Method) else Method.transfer

    def of_length(self, steps: int) -> dict[str, Any]:
        """All settings that follow from the length of the run."""
        return self.cls.of_length(steps, **self.settings) if issubclass(self.cls, Method) else {}

    def build(self, gpt: nn.Module, steps: int) -> torch.optim.Optimizer:
        """Over all of gpt. An outside class may name its `roles`: AdamW has the rest, and its groups state `split`."""
        cls, roles = self.cls, getattr(self.cls, "roles", ROLES)
        if unknown := set(roles) - set(ROLES):
            raise UsageError(f"optimizer {cls.__name__} has an unknown role {min(unknown)!r}: known: {', '.join(ROLES)}")
        if not groups(gpt, roles):
            raise UsageError(f"optimizer {self.spec!r} is for {', '.join(roles)} weights, and there are none: use adamw")
        if issubclass(cls, Method):
            return cls.build(gpt, steps, **self.settings)
        if not issubclass(cls, torch.optim.Optimizer):
            raise UsageError(f"optimizer {self.spec!r}: {cls.__name__} is no torch.optim.Optimizer")
        settings, part = dict(self.settings), set(roles) < set(ROLES)
        params = decay_groups(gpt, self.setting("weight_decay") or 0.0, roles, by_split=part)
        rest = {"lr": settings.pop("adamw_lr")} if "adamw_lr" in settings else {}
        return with_rest(cls(params, **settings), gpt, roles, **rest)


def find(spec: str) -> Choice:
    """What `spec` chooses. Imports the file or package that it names: not for a SPEC that somebody else wrote. Raises
    UsageError: unknown name or key, or a value of the wrong type."""
    return Choice(spec, *parse(of_collection(spec), OPTIMIZERS, "optimizer"))


def build(
    spec: str, gpt: nn.Module, steps: int = 1000, average: str = "none", rates: str = "", outer: str = "none"
) -> torch.optim.Optimizer:
    """The optimizer that `spec` names (see the top of this file), over all trainable parameters of `gpt`, which may be wrapped
    in DistributedDataParallel or compiled. steps: of the run, for settings that are a fraction of it. average: SPEC of an
    average of the weights to evaluate at (AVERAGES), or none. rates: factors on learning rates, see `multiply_rates`. outer:
    SPEC of a method around it (OUTER), or none.

    Each param group has `lr`, `initial_lr` (what a schedule multiplies), `weight_decay` and `roles` (a label). `train()` and
    `eval()` exist on the result: call eval() before validation and checkpoints, train() after. Raises UsageError: unknown name
    or key, value out of range, a class that is no optimizer or misses parameters."""
    choice = find(spec)
    while (inner := getattr(gpt, "_orig_mod", getattr(gpt, "module", None))) is not None:
        gpt = inner  # wrappers put prefixes before the names, which would hide the parameters' roles
    with blaming(spec, TypeError, ValueError):
        optimizer = choice.build(gpt, steps)
        if hasattr(optimizer, "train"):  # which the optimizer inside a wrapper of others may lack
            optimizer.train()
    if any("lr" not in group for group in optimizer.param_groups):
        raise UsageError(f"optimizer {spec!r} has a param group without lr, which no schedule can change")
    times = Counter(p for group in optimizer.param_groups for p in group["params"])
    for name, p in gpt.named_parameters():  # in no group it would silently not train, in two it would be updated twice
        if p.requires_grad and times[p] != 1:
            raise UsageError(f"optimizer {spec!r} has parameter {name!r} in {times[p]} param groups instead of one")
    role = dict(zip(gpt.parameters(), roles_of(gpt).values(), strict=True))
    if rates:
        multiply_rates(optimizer, gpt, role, rates)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("weight_decay", 0.0)
        group.setdefault("initial_decay", group["weight_decay"])
        group.setdefault("roles", label(role[p] for p in group["params"]))
    if around := build_around(outer, average, steps):
        optimizer = Averaged(optimizer, *around)
    for name in ("train", "eval"):
        if not hasattr(optimizer, name):
            setattr(optimizer, name, lambda: None)
    return optimizer


@contextlib.contextmanager
def blaming(spec: str, *ours: type[Exception], restored: bool = False) -> Iterator[None]:
    """Raises UsageError, one line, for what goes wrong inside: for whatever an outside class raises, and where; for `ours` of a
    registered method; for everything where the state was restored."""
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        words = f"{type(error).__name__}: {line}"
        if restored:
            why = f"the checkpoint's state is not that of optimizer {spec!r} ({words}): --resume never starts anew"
        elif split(spec)[0] not in OPTIMIZERS:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            why = f"optimizer {spec!r}: {words} ({Path(frame.filename).name}:{frame.lineno})"
            why += '; a subclass with roles = ("matrix",) has those alone' * bool(re.search(r"\b2-?D\b|two dim", line))
        elif isinstance(error, ours):
            why = f"optimizer {spec!r}: {line}"
        else:
            raise
        raise UsageError(why) from error


def restore(optimizer: torch.optim.Optimizer, state: dict, spec: str) -> None:
    """optimizer.load_state_dict(state) in the types that were saved, outside classes included: torch casts to the weights'.
    Raises UsageError: it is the state of something else."""
    with blaming(spec, restored=True):
        optimizer.load_state_dict(state)
        if not isinstance(optimizer, (Method, Chain)) and "param_groups" in state:
            base.keep_fp32(optimizer, state)
        for p, own in optimizer.state.items() if all(isinstance(part, Method) for part in parts(optimizer)) else ():
            if any(isinstance(x, Tensor) and 0 < x.dim() == p.dim() and x.shape != p.shape for x in own.values()):
                raise ValueError("another shape")  # which arithmetic could take all the same
        optimizer.restored = True  # until it has stepped


def step(optimizer: torch.optim.Optimizer, spec: str) -> None:
    """optimizer.step(). Raises UsageError: an outside class fails in it, or the restored state does not fit."""
    restored, optimizer.restored = getattr(optimizer, "restored", False), False
    with blaming(spec, restored=restored):
        optimizer.step()


def of_collection(spec: str) -> str:
    """`heavyball.soap:lr=1e-3` as `heavyball:SOAP:lr=1e-3`: the class of that name, letter case and underscores aside. Raises
    UsageError: the package is not installed, or has no optimizer of that name."""
    name, colon, keys = spec.partition(":")
    package, _, word = name.rpartition(".")
    if package not in COLLECTIONS:
        return spec
    check_trusted(name, "optimizer")
    module = optional(package, f"optimizer {name!r} needs the package {package}: pip install {package}")
    if package == "heavyball" and not torch.cuda.is_available():
        module.utils.compile_mode = None  # its compilation takes minutes on a CPU, and may fail
    classes = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)]
    by_plain_name = {n.replace("_", "").lower(): n for n in classes}
    if (plain := word.replace("_", "").lower()) not in by_plain_name:
        raise UsageError(f"{package} has no optimizer {word!r}: {nearest(word, classes)}")
    chosen = f"{package}:{by_plain_name[plain]}"
    trust([chosen])
    return f"{chosen}{colon}{keys}"


def multiply_rates(optimizer: torch.optim.Optimizer, gpt: nn.Module, role: dict[Tensor, str], rates: str) -> None:
    """Multiply learning rates: `embedding=2,smear=0.1`. A word is a role, a parameter's name, or a part of it between dots; the
    last that fits a parameter counts. Raises UsageError: a word that fits no parameter, or no number of 0 or more after it."""
    words, factors = {p: {role[p], name, *name.split(".")} for name, p in gpt.named_parameters()}, {}
    for pair in filter(None, rates.split(",")):
        word, _, text = (part.strip() for part in pair.partition("="))
        factor = convert(text, float, f"--rates {word}=")
        if not 0 <= factor < 1e9:
            raise UsageError(f"--rates {word}= takes 0 or more, below 1e9, not {text}")
        fitting = [p for p in words if word in words[p]]
        if not fitting:
            known = {w for p in words for w in words[p] if not w.isdigit() and (w == role[p] or "." not in w)}
            raise UsageError(f"--rates: no parameter is called {word!r}: {nearest(word, known)}")
        factors |= dict.fromkeys(fitting, factor)
    divided = []
    for group in optimizer.param_groups:
        alike = defaultdict(list)
        for p in group["params"]:
            alike[factors.get(p, 1.0)].append(p)
        for factor, params in alike.items():
            divided.append(group | dict(params=params, lr=group["lr"] * factor, roles=label(role[p] for p in params)))
    optimizer.param_groups = divided
    if isinstance(optimizer, Chain):
        optimizer._link()


def period(spec: str) -> int:
    """Steps after which a registered method's work repeats, as roots and bases are renewed every few; 1 for outside classes,
    of which nothing is imported."""
    if split(spec)[0] not in OPTIMIZERS:
        return 1
    return math.lcm(*(find(spec).setting(key, 1) for key in ("every", "adamw_every")))


def compile_update(optimizer: torch.optim.Optimizer) -> None:
    """Fuse the update of the parts that have a compiled form (`base.Elementwise`) into one pass over memory."""
    getattr(optimizer, "compile", lambda: None)()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state held on this rank; 0 before the first step, since state is made when first needed."""
    held = [dict(optimizer.state), getattr(optimizer, "kept", {})]
    return sum(x.numel() * x.element_size() for x in tree_leaves(held) if isinstance(x, Tensor))
