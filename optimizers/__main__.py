"""`python -m optimizers` lists every optimizer; `python -m optimizers NAME...` shows its rule, source and settings."""

import dataclasses
import inspect
import sys

from engine.spec import UsageError, nearest
from optimizers import OPTIMIZERS


def show(name: str) -> str:
    cls = OPTIMIZERS.get(name)
    if cls is None:
        raise UsageError(f"unknown optimizer {name!r}: {nearest(name, OPTIMIZERS)}")
    lines = [name, inspect.cleandoc(cls.__doc__), ""]
    for f in dataclasses.fields(cls):
        search = f.metadata["search"]
        tuned = f"; search {search[0]:g} to {search[1]:g}, {search[2]}" if search else ""
        lines.append(f"  {f.name + '=' + str(f.default):28} {f.metadata['help']}{tuned}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        if sys.argv[1:]:
            print("\n\n".join(map(show, sys.argv[1:])))
        else:
            for name, cls in OPTIMIZERS.items():
                print(f"{name:22} {' '.join(cls.__doc__.split())[:100]}...")
            print("\nadd a name to see its settings")
    except UsageError as error:
        print(f"optimizers: {error}", file=sys.stderr)
        sys.exit(2)
