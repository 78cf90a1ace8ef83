"""SPEC strings: how an optimizer or a schedule is chosen and set on the command line.

    muon                                   a registered name
    muon:lr=0.02,weight_decay=0.01         with settings; keys and types come from the registered class
    my/optimizer.py:Mine:lr=0.1            one's own class from a file
    package.module:Mine:lr=0.1             or from an importable module

Also what the settings of a run are made of (`setting`), and the one exception that means that the user can mend it.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """What the user can mend: bad words, too little memory. One line and exit code 2 (command.py). speaks: does this rank print
    it? None: the first rank of each machine does."""

    def __init__(self, message: str, speaks: bool | None = None):
        super().__init__(message)
        self.speaks = speaks


def setting(default, help: str, choices=None, least: float = 0, most: float = math.inf, below: float = math.inf):
    """A config field with the words that `--help` prints. least, most, below: of a number, or of each in a tuple."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most, below=below))


# Names of numbers whose range everybody means the same by, in classes of others too: least, below
RANGES = {r"(.*_)?(lr|eps|weight_decay|lambd|alpha|dampening|rho|t0)\d*": (0, math.inf), r"(.*_)?(betas?|momentum)\d*": (0, 1)}


def refusal(name: str, value: Any, about: Mapping[str, Any]) -> str:
    """Why a setting, by its metadata, does not take a value: words that go after its name. Empty: it does."""
    if isinstance(value, tuple):
        return next(filter(None, (refusal(name, part, about) for part in value)), "")
    if choices := about.get("choices"):
        near = nearest(value, choices) if isinstance(value, str) else ""
        hint = f": {near}" if near.startswith("did") else ""
        return "" if value in choices else f"takes {', '.join(choices)}; not {value!r}{hint}"
    if not isinstance(value, (int, float)):
        return ""
    least, below = next((limits for names, limits in RANGES.items() if re.fullmatch(names, name)), (-math.inf, math.inf))
    least, most, below = about.get("least", least), about.get("most", math.inf), min(about.get("below", below), below)
    if least <= value <= most and value < below:  # nan fails, and so does infinity
        return ""
    if not math.isfinite(value) and (least, most, below) == (-math.inf, math.inf, math.inf):
        return f"must be a finite number, got {value:g}"
    upper = f" and below {below:g}" if below < math.inf else ""
    words = f"{least:g} to {most:g}" if most < math.inf else f"at least {least:g}{upper}"
    return f"must be {words}, got {value:g}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Half a sentence that names the known word closest to `name`, or all of them if none is close."""
    known = {word.lower(): word for word in sorted(known)}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {known[close[0]]!r}?" if close else f"known: {', '.join(known.values())}"


UNIONS = (typing.Union, types.UnionType)
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def convert(text: str, annotation: Any, what: str) -> Any:
    """Parse `text` as the annotated type, of a union as the first of int, float, bool and str that takes it. `none` is None
    where that is a member; a tuple of numbers is written 0.9/0.95. Raises UsageError: the text is not of that type."""
    members = set(typing.get_args(annotation)) if typing.get_origin(annotation) in UNIONS else {annotation}
    if type(None) in members and text.lower() == "none":
        return None
    if any(tuple in (member, typing.get_origin(member)) for member in members) and ("/" in text or len(members) == 1):
        return tuple(convert(part, float, what) for part in text.split("/"))
    kinds = [kind for kind in (int, float, bool, str) if kind in members]
    for kind in kinds:
        with contextlib.suppress(ValueError, KeyError):
            if kind is int and "e" in text.lower() and float(text).is_integer():  # 1e6 tokens is how people write it
                return int(float(text))
            return TRUTHS[text.lower()] if kind is bool else kind(text)
    if not kinds:
        raise UsageError(f"{what} takes a value that no command line can give")
    wanted = "true or false" if kinds == [bool] else f"a value of type {' or '.join(kind.__name__ for kind in kinds)}"
    raise UsageError(f"{what} takes {wanted}, not {text!r}")


def split(spec: str) -> tuple[str, dict[str, str]]:
    """`name:key=value,key=value` -> (name, {key: value text}); the name may be `file.py:Class` or `module.path:Class`."""
    parts = spec.split(":")
    words = 2 if len(parts) > 1 and "=" not in parts[1] else 1
    name, rest = ":".join(parts[:words]), ":".join(parts[words:])
    settings: dict[str, str] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{spec!r}: expected key=value after the name, got {pair!r}")
        if (key := key.strip().replace("-", "_")) in settings:
            raise UsageError(f"{spec!r} gives {key} twice")
        settings[key] = value.strip()
    return name.strip(), settings


def typed_keys(cls: type) -> dict[str, Any]:
    """Key -> annotation of what `cls` accepts: dataclass fields, or its constructor's parameters, without a first that has no
    default: the weights. Without annotation it is the type of the default, a whole number's fractions too. A class that names
    its `roles` has `adamw_lr` too: AdamW takes the rest."""
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    keys, hints = {}, {}
    for place, p in enumerate(inspect.signature(cls).parameters.values()):
        if p.annotation is not p.empty:
            with contextlib.suppress(Exception):  # an annotation of others, with a name that does not exist
                alone = types.SimpleNamespace(__annotations__={p.name: p.annotation})
                hints |= typing.get_type_hints(alone, cls.__init__.__globals__)
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and (place or p.default is not p.empty):
            default = None if p.default is p.empty else p.default
            of_default = int | float if type(default) is int else type(default)
            keys[p.name] = hints.get(p.name, float if p.name == "lr" and default is None else of_default)
    return keys | ({"adamw_lr": float} if hasattr(cls, "roles") else {})


def parse(spec: str, registry: dict[str, type], what: str) -> tuple[type, dict[str, Any]]:
    """The class that a SPEC chooses, of `registry` (name -> class) or imported, and its typed keyword arguments. what: for
    messages, such as "optimizer". Raises UsageError: unknown name or key, wrong type, or a file that does not import."""
    name, texts = split(spec)
    registered, colon, word = name.partition(":")
    if colon and registered in registry:
        raise UsageError(f"{spec!r}: expected key=value after the name, got {word!r}")
    cls = load(name, what) if ":" in name else registry.get(name)
    if cls is None:
        raise UsageError(f"unknown {what} {name!r}: {nearest(name, registry)}")
    keys = typed_keys(cls)
    if unknown := [key for key in texts if key not in keys]:
        raise UsageError(f"{what} {name!r} has no key {unknown[0]!r}: {nearest(unknown[0], keys)}")
    values = {key: convert(text, keys[key], f"{what} key {name}:{key}") for key, text in texts.items()}
    about = {f.name: f.metadata for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for key, value in values.items():
        if why := refusal(key, value, about.get(key) or ({"least": 0} if name in registry else {})):
            raise UsageError(f"{what} key {name}:{key} {why}")
    return cls, values


def make(spec: str, registry: dict[str, type], what: str, method: str) -> Any:
    """An object of the class that a SPEC chooses. Raises UsageError: it lacks that method, or as `parse`."""
    cls, settings = parse(spec, registry, what)
    try:
        return getattr(cls, method) and cls(**settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{what} {spec!r} cannot be made: {error}") from None


def optional(module: str, message: str) -> types.ModuleType:
    """Import a module that only some uses need. Raises UsageError with this message."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(message) from None


TRUSTED: set[str] = set()  # words of the user's own command line: the only ones that may name code


def trust(argv: Iterable[str]) -> None:
    """Code may be imported where these words, which the user typed, name it, alone or behind the first `=`."""
    TRUSTED.update(part for word in argv for part in (word, word.partition("=")[2]))


def check_trusted(name: str, what: str) -> None:
    """Raises UsageError: the user's command line does not name it."""
    if not re.fullmatch(r"torch\.optim[.:]\w+", name) and not any(f"{word}:".startswith(f"{name}:") for word in TRUSTED):
        raise UsageError(f"{what} {name!r} is code, which is loaded only where the command line names it, never from a file")


def load(name: str, what: str) -> type:
    """Import `path/to/file.py:Class` or `package.module:Class`. Raises UsageError: not on the command line, or not there."""
    check_trusted(name, what)
    place, _, attribute = name.partition(":")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise UsageError(f"{what} {name!r}: no file {place}")
            module_spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_spec.name] = module  # where dataclasses and type hints look their module up
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except UsageError:
        raise
    except Exception as error:  # whatever the user's file raises is the user's to read, on one line
        raise UsageError(f"{what} {name!r}: {place} does not import ({type(error).__name__}: {error})") from error
    if isinstance(cls := getattr(module, attribute, None), type):  # getattr: a package may export its classes lazily
        return cls
    classes = [word for word, value in vars(module).items() if isinstance(value, type)]
    raise UsageError(f"{what} {name!r}: {place} has no class {attribute!r}: {nearest(attribute, classes)}")
