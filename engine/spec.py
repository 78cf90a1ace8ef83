"""SPEC strings: how an optimizer or a schedule is chosen and set on the command line.

    muon                                   a registered name
    muon:lr=0.02,weight_decay=0.01         with settings; keys and types come from the registered class
    my/optimizer.py:Mine:lr=0.1            one's own class from a file
    package.module:Mine:lr=0.1             or from an importable module

Also what the settings of a run are made of (`setting`), and the one exception that means that the user can mend it.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """What the user can mend: bad words, too little memory. Verbs print it as one line and exit with code 2 (command.py).
    speaks: does this rank print it? None: the first rank of each machine does."""

    def __init__(self, message: str, speaks: bool | None = None):
        super().__init__(message)
        self.speaks = speaks


def setting(default, help: str, choices: tuple[str, ...] | None = None, least: float = 0, most: float = math.inf):
    """A config field with the words that `--help` prints. least, most: of a number."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


def refusal(field: dataclasses.Field, value: Any) -> str:
    """Why a field does not take a value, in words that go after its name; empty: it does."""
    choices, least, most = (field.metadata[key] for key in ("choices", "least", "most"))
    if choices:
        return "" if value in choices else f"takes {', '.join(choices)}; not {value!r}"
    if not isinstance(value, (int, float)) or least <= value <= most:  # not a number: nan too fails the comparison
        return ""
    return f"must be at least {least:g}, got {value:g}" if most == math.inf else f"must be {least:g} to {most:g}, got {value:g}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Half a sentence that names the known word closest to `name`, or all of them if none is close."""
    known = {word.lower(): word for word in sorted(known)}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {known[close[0]]!r}?" if close else f"known: {', '.join(known.values())}"


TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def convert(text: str, annotation: Any, what: str) -> Any:
    """Parse `text` as the annotated type. `none` is accepted where None is; a tuple of numbers is written 0.9/0.95. Raises
    UsageError: the text is not of that type."""
    if tuple in (annotation, typing.get_origin(annotation)):
        return tuple(convert(part, float, what) for part in text.split("/"))
    kind = next((t for t in (annotation, *typing.get_args(annotation)) if t in (int, float, bool, str)), str)
    word = text.lower()
    if type(None) in typing.get_args(annotation) and word == "none":
        return None
    if kind is bool:
        if word not in TRUTHS:
            raise UsageError(f"{what} takes true or false, not {text!r}")
        return TRUTHS[word]
    try:
        if kind is int and "e" in word and float(text).is_integer():  # 1e6 tokens is how people write it
            return int(float(text))
        return kind(text)
    except ValueError:
        raise UsageError(f"{what} takes a value of type {kind.__name__}, not {text!r}") from None


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
        settings[key.strip().replace("-", "_")] = value.strip()
    return name.strip(), settings


def typed_keys(cls: type) -> dict[str, Any]:
    """Key -> annotation of what `cls` accepts: dataclass fields, or the keyword parameters of its constructor. A parameter
    whose annotation is absent or no plain type takes the type of its default."""
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    keys = {}
    for p in inspect.signature(cls).parameters.values():
        if p.default is not p.empty or p.kind is p.KEYWORD_ONLY:
            clear = {int, float, bool, str} & {p.annotation, *typing.get_args(p.annotation)}
            keys[p.name] = p.annotation if clear or p.default in (p.empty, None) else type(p.default)
    return keys


def parse(spec: str, registry: dict[str, type], what: str) -> tuple[type, dict[str, Any]]:
    """The class that a SPEC chooses, of `registry` (name -> class) or imported, and its typed keyword arguments. what:
    "optimizer" or "schedule", for messages. Raises UsageError: unknown name or key, wrong type, or a file that does not import.
    """
    name, texts = split(spec)
    registered, colon, word = name.partition(":")
    if colon and registered in registry:
        raise UsageError(f"{spec!r}: expected key=value after the name, got {word!r}")
    cls = load(name, what) if ":" in name else registry.get(name)
    if cls is None:
        raise UsageError(f"unknown {what} {name!r}: {nearest(name, registry)}")
    keys = typed_keys(cls)
    for key in texts:
        if key not in keys:
            raise UsageError(f"{what} {name!r} has no key {key!r}: {nearest(key, keys)}")
    return cls, {key: convert(text, keys[key], f"{what} key {name}:{key}") for key, text in texts.items()}


TRUSTED: set[str] = set()  # words of the user's own command line: the only ones that may name code


def trust(argv: Iterable[str]) -> None:
    """Code may be imported where these words name it, as `name:key=value` or `--flag=name`. For what the user typed alone."""
    TRUSTED.update(word.partition("=")[2] if word.startswith("--") else word for word in argv)


def check_trusted(name: str, what: str) -> None:
    """Raises UsageError: the user's command line does not name it; a file of settings may be somebody else's."""
    if not re.fullmatch(r"torch\.optim[.:]\w+", name) and not any(f"{word}:".startswith(f"{name}:") for word in TRUSTED):
        raise UsageError(f"{what} {name!r} is code, which is loaded only where the command line names it, never from a file")


def load(name: str, what: str) -> type:
    """Import `path/to/file.py:Class` or `package.module:Class`. Raises UsageError: the command line does not name it, it does
    not import, or has no such class."""
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
