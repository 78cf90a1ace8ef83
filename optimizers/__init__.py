"""Every optimizer, one registry, one way in: `build(spec, gpt)` gives one torch.optim.Optimizer.

    build("adamw:lr=3e-3", gpt)                      a registered method, its settings by key
    build("my_optimizer.py:Mine:lr=0.1", gpt)        one's own: a torch Optimizer, or a dataclass with `build(gpt)`
    build("heavyball.ForeachSOAP:lr=1e-3", gpt)      a class of a public collection, where that package is installed

    base.py            settings, groups, base classes        elementwise.py  the classics, Adam and its relatives
    schedule_free.py   methods without a schedule            matrix.py       Muon, Shampoo, CASPR, SOAP, Kron
    sparse.py          tables with sparse gradients          cautious.py     AdamW as the speedrun has it
    average.py         averages of the weights               shard.py        state divided over ranks
    mantissa.py        bf16 weights of which nothing is lost this file       the registry and the way in

To add a method: in its family's file a frozen dataclass of its settings, whose docstring is the update rule and its
source, and a class that states that rule once (or torch's own); here, one line in OPTIMIZERS. An element-wise rule
is plain tensor arithmetic; `compile_update` turns it into one pass over memory.

Parameters are routed by `model.roles`, never by shape: a small embedding is 2-D too and must not be orthogonalised.
Weight decay acts on matrices, embeddings and the head; never on vectors (gains, biases) and scalars: nanoGPT's rule.
"""

import importlib
import inspect
import math
from collections import Counter, defaultdict

import torch
from torch import Tensor, nn

from engine.spec import UsageError, convert, nearest, parse, split, typed_keys
from model import roles as roles_of
from optimizers.average import AVERAGES, Averaged, build_average
from optimizers.base import ALL_ROLES, ROLES, Chain, Settings, decay_groups, groups, parts
from optimizers.cautious import CautiousAdamWSettings
from optimizers.elementwise import (
    AdadeltaSettings,
    AdafactorSettings,
    AdagradSettings,
    AdamSettings,
    AdamWSettings,
    AdEMAMixSettings,
    ADOPTSettings,
    AmosSettings,
    GeneralizedAdamSettings,
    LionSettings,
    MARSSettings,
    NAdamPSettings,
    NAdamWSettings,
    RMSpropSettings,
    SGDSettings,
    SignumSettings,
    SophiaSettings,
)  # fmt: skip
from optimizers.matrix import CASPRSettings, KronSettings, MuonSettings, ShampooSettings, SOAPSettings
from optimizers.schedule_free import ProdigySettings, ScheduleFreeProdigySettings, ScheduleFreeSettings, ScheduleFreeSGDSettings
from optimizers.sparse import TABLE_OPTIMIZERS

__all__ = [
    "AVERAGES",
    "OPTIMIZERS",
    "TABLE_OPTIMIZERS",
    "build",
    "check",
    "compile_update",
    "copy_state",
    "has_momentum",
    "own_schedule",
    "parts",
    "period",
    "schedule_free",
    "state_bytes",
]

OPTIMIZERS: dict[str, type[Settings]] = {
    "sgd": SGDSettings,
    "signum": SignumSettings,
    "adagrad": AdagradSettings,
    "rmsprop": RMSpropSettings,
    "adadelta": AdadeltaSettings,
    "adam": AdamSettings,
    "adamw": AdamWSettings,
    "cautious_adamw": CautiousAdamWSettings,
    "nadamw": NAdamWSettings,
    "nadamp": NAdamPSettings,
    "generalized_adam": GeneralizedAdamSettings,
    "amos": AmosSettings,
    "adafactor": AdafactorSettings,
    "lion": LionSettings,
    "ademamix": AdEMAMixSettings,
    "adopt": ADOPTSettings,
    "mars": MARSSettings,
    "sophia": SophiaSettings,
    "schedule_free_adamw": ScheduleFreeSettings,
    "schedule_free_sgd": ScheduleFreeSGDSettings,
    "prodigy": ProdigySettings,
    "schedule_free_prodigy": ScheduleFreeProdigySettings,
    "muon": MuonSettings,
    "shampoo": ShampooSettings,
    "caspr": CASPRSettings,
    "soap": SOAPSettings,
    "kron": KronSettings,
}
COLLECTIONS = ("pytorch_optimizer", "heavyball")  # public packages whose classes are found by name


def build(
    spec: str,
    gpt: nn.Module,
    steps: int = 1000,
    average: str = "none",
    tables: str = "sparse_adagrad",
    rates: str = "",
) -> torch.optim.Optimizer:
    """The optimizer that `spec` names, over all trainable parameters of `gpt`.

    Args:
        spec: see the top of this file.
        gpt: the model; wrapped in DistributedDataParallel or compiled is fine.
        steps: length of the run, for settings that are a fraction of it.
        average: SPEC of an average of the weights to evaluate at (AVERAGES), or none.
        tables: SPEC of the optimizer of tables with sparse gradients (TABLE_OPTIMIZERS), where the model has any.
        rates: factors on learning rates, see `multiply_rates`.

    Each param group has `lr`, `initial_lr` (what a schedule multiplies), `weight_decay` and `roles` (a label).
    `train()` and `eval()` exist on the result: call eval() before validation and checkpoints, train() after.

    Raises:
        UsageError: unknown name or key, value out of range, a class that is no optimizer or misses parameters.
    """
    cls, settings = parse(of_collection(spec), OPTIMIZERS, "optimizer")
    gpt = unwrapped(gpt)
    try:
        if issubclass(cls, torch.optim.Optimizer):
            optimizer = build_own(cls, settings, gpt)
        elif issubclass(cls, Settings):
            if not groups(gpt, cls.roles):
                raise UsageError(f"optimizer {spec!r} is for {', '.join(cls.roles)} weights, and there are none: use adamw")
            optimizer = cls(**settings).build(gpt, steps)
        elif hasattr(cls, "build"):
            optimizer = cls(**settings).build(gpt)
        else:
            raise UsageError(f"optimizer {spec!r}: {cls.__name__} is no torch.optim.Optimizer and has no build(gpt)")
        if sparse := groups(gpt, ("table",)):
            cls, settings = parse(tables, TABLE_OPTIMIZERS, "table optimizer")
            optimizer = Chain(*parts(optimizer), cls.method(sparse, **cls(**settings).own(steps)))
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {spec!r}: {error}") from error
    check_every_parameter_once(spec, optimizer, gpt)
    multiply_rates(optimizer, gpt, rates)
    if average != "none":
        optimizer = Averaged(optimizer, build_average(average, steps))
    role = {p: roles_of(gpt)[name] for name, p in gpt.named_parameters()}
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("weight_decay", 0.0)
        group.setdefault("roles", "+".join(sorted({role[p] for p in group["params"]}, key=ALL_ROLES.index)))
    for name in ("train", "eval"):
        if not hasattr(optimizer, name):
            setattr(optimizer, name, lambda: None)
    return optimizer


def of_length(spec: str, average: str, steps: int) -> tuple[dict, object]:
    """All settings of the optimizer and the average that follow from the length of the run."""
    cls, settings = parse(of_collection(spec), OPTIMIZERS, "optimizer")
    own = cls(**settings).own(steps) if issubclass(cls, Settings) else {}
    return own, None if average == "none" else build_average(average, steps)


def check(spec: str, average: str = "none", tables: str = "sparse_adagrad") -> None:
    """Are these words right? Builds nothing.

    Raises:
        UsageError: unknown name or key, or a value of the wrong type.
    """
    parse(of_collection(spec), OPTIMIZERS, "optimizer")
    if average != "none":
        build_average(average, 1)
    parse(tables, TABLE_OPTIMIZERS, "table optimizer")


def of_collection(spec: str) -> str:
    """`heavyball.soap:lr=1e-3` as `heavyball:SOAP:lr=1e-3`: the class of that name, letter case and underscores aside.

    Raises:
        UsageError: the package is not installed, or has no optimizer of that name.
    """
    name, colon, keys = spec.partition(":")
    package, dot, word = name.partition(".")
    if package not in COLLECTIONS or not dot or "." in word:
        return spec
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise UsageError(f"optimizer {name!r} needs the package {package}: pip install {package}") from None
    plain = lambda text: text.replace("_", "").lower()  # noqa: E731
    found = {}
    for attribute, value in vars(module).items():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
            found[plain(attribute)] = attribute
    if plain(word) not in found:
        raise UsageError(f"{package} has no optimizer {word!r}: {nearest(word, found.values())}")
    return f"{package}:{found[plain(word)]}{colon}{keys}"


def build_own(cls: type[torch.optim.Optimizer], settings: dict, gpt: nn.Module) -> torch.optim.Optimizer:
    """An outside torch Optimizer over decay and no-decay groups. Its class attribute `roles`, if any, names what it
    takes; AdamW at its defaults takes the rest, and the groups state `split` (see `groups`)."""
    own = getattr(cls, "roles", ROLES)
    if unknown := set(own) - set(ROLES):
        raise UsageError(f"optimizer {cls.__name__} has an unknown role {min(unknown)!r}: known: {', '.join(ROLES)}")
    decay = settings.get("weight_decay", default_of(cls, "weight_decay", 0.0))
    optimizer = cls(decay_groups(gpt, decay, own, by_split=set(own) < set(ROLES)), **settings)
    rest = tuple(r for r in ROLES if r not in own)
    return Chain(optimizer, AdamWSettings().build(gpt, 0, rest)) if groups(gpt, rest) else optimizer


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


def multiply_rates(optimizer: torch.optim.Optimizer, gpt: nn.Module, rates: str) -> None:
    """Multiply learning rates: `embedding=2,smear=0.1`. Groups are divided where their parameters differ.

    A word is a role, a parameter's name, or what stands between dots in it; of several that fit a parameter the last counts.

    Raises:
        UsageError: a word that fits no parameter, or no number of 0 or more after it.
    """
    role, factors = roles_of(gpt), {}
    for pair in filter(None, rates.split(",")):
        word, _, text = (part.strip() for part in pair.partition("="))
        factor = convert(text, float, f"--rates {word}=")
        if not factor >= 0:
            raise UsageError(f"--rates {word}= takes 0 or more, not {text}")
        fitting = [p for name, p in gpt.named_parameters() if word in (role[name], name, *name.split("."))]
        if not fitting:
            words = {w for name in role for w in (role[name], *name.split(".")) if not w.isdigit()}
            raise UsageError(f"--rates: no parameter is called {word!r}: {nearest(word, words)}")
        factors |= dict.fromkeys(fitting, factor)
    if not factors:
        return
    divided = []
    for group in optimizer.param_groups:
        alike = defaultdict(list)
        for p in group["params"]:
            alike[factors.get(p, 1.0)].append(p)
        for factor, params in alike.items():
            found = {role[name] for name, p in gpt.named_parameters() if any(p is own for own in params)}
            label = "+".join(sorted(found, key=ALL_ROLES.index))
            divided.append(group | {"params": params, "lr": group["lr"] * factor, "roles": label})
    optimizer.param_groups = divided
    if isinstance(optimizer, Chain):
        optimizer._link()


def copy_state(optimizer: torch.optim.Optimizer, source: nn.Parameter, target: nn.Parameter) -> None:
    """Have `target` go on with the state that `source` has, where both are updated by the same method."""
    slices = getattr(optimizer, "slice_of", {})
    source, target = slices.get(source, source), slices.get(target, target)
    optimizer.state[target] = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in optimizer.state[source].items()
    }
    if kept := getattr(optimizer, "kept", {}):  # of an average
        kept[target] = [w.clone() for w in kept[source]]


def schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Does it bring its own schedule? It must be run at a constant learning rate then."""
    return any(getattr(part, "schedule_free", False) for part in parts(optimizer))


def own_schedule(name: str) -> bool:
    """Does the registered optimizer of that name bring its own schedule? False for names that are not registered."""
    return getattr(getattr(OPTIMIZERS.get(name), "method", None), "schedule_free", False)


def has_momentum(spec: str) -> bool:
    """Does its learning go by a setting `momentum`, which a schedule can move? Of one's own methods nobody knows before they
    are built: True."""
    cls, _ = parse(of_collection(spec), OPTIMIZERS, "optimizer")
    return not issubclass(cls, Settings) or "momentum" in typed_keys(cls)


def period(spec: str) -> int:
    """Steps after which the work of a registered method repeats itself: roots and bases are renewed every few steps. 1: all are
    alike, or one's own method, of which nobody knows."""
    if split(spec)[0] not in OPTIMIZERS:
        return 1
    cls, settings = parse(spec, OPTIMIZERS, "optimizer")
    made = cls(**settings)
    return math.lcm(*(getattr(made, key, 1) for key in ("every", "adamw_every")))


def compile_update(optimizer: torch.optim.Optimizer) -> None:
    """Fuse the update of the parts that have a compiled form (`base.Elementwise`) into one pass over memory."""
    for part in parts(optimizer):
        getattr(part, "compile", lambda: None)()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state held on this rank; 0 before the first step, since state is made when first needed."""

    def size(value) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    return size(dict(optimizer.state)) + size(getattr(optimizer, "kept", {}))
