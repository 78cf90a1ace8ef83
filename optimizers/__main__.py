"""`python -m optimizers` lists every optimizer; `python -m optimizers NAME...` shows its rule, source and settings."""

import dataclasses
import inspect
import sys

from engine.command import command
from engine.spec import UsageError, nearest
from optimizers import OPTIMIZERS


def show(name: str) -> str:
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {name!r}: {nearest(name, OPTIMIZERS)}")
    lines = [name, inspect.cleandoc(OPTIMIZERS[name].__doc__), ""]
    for f in dataclasses.fields(OPTIMIZERS[name]):
        tuned = "; search {} to {}, {}".format(*f.metadata["search"]) if f.metadata["search"] else ""
        lines.append(f"  {f.name + '=' + str(f.default):28} {f.metadata['help']}{tuned}")
    return "\n".join(lines)


def listing() -> str:
    lines = [f"{name:22} {' '.join(cls.__doc__.split())[:100]}..." for name, cls in OPTIMIZERS.items()]
    return "\n".join([*lines, "", "add a name to see its settings"])


if __name__ == "__main__":
    sys.exit(command("optimizers", lambda: "\n\n".join(show(word) for word in sys.argv[1:] if word[:1] != "-") or listing()))
