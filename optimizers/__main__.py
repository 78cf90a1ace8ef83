"""`python -m optimizers` lists every optimizer; `python -m optimizers NAME...` shows its rule, source and settings.

A NAME may be in your own file, FILE.py:Class, or in a package: pytorch_optimizer.Lion.
"""

import inspect
import sys

import tricks
from engine.command import Answer, Parser, command
from engine.run_folder import read_json
from optimizers import OPTIMIZERS, find


def show(name: str) -> str:
    choice = find(name)
    lines = [name, inspect.cleandoc(choice.cls.__doc__ or ""), ""]
    fields = getattr(choice.cls, "__dataclass_fields__", {})
    for key, (default, search) in choice.hyperparameters.items():
        tuned = "; search {} to {}, {}".format(*search) if search else ""
        lines.append(f"  {f'{key}={default}':28} {fields[key].metadata.get('help', '') if key in fields else ''}{tuned}")
    best = {track: of[name]["optimizer"] for track, of in read_json(tricks.TUNED).items() if name in of}
    lines += ["", "  default where it was tuned:", *(f"    {track}: {spec}" for track, spec in best.items())] if best else []
    return "\n".join(lines)


def listing() -> str:
    lines = [f"{name:22} {' '.join(cls.__doc__.split())[:100]}..." for name, cls in OPTIMIZERS.items()]
    return "\n".join([*lines, "", "add a name to see its settings"])


def run(argv: list[str]) -> Answer:
    flags = Parser(prog="./run.sh optimizers", description=__doc__)
    flags.add_argument("names", nargs="*", metavar="NAME", help="an optimizer; none: list them all")
    names = flags.parse_args(argv).names
    data = {name: {key: default for key, (default, _) in find(name).hyperparameters.items()} for name in names or OPTIMIZERS}
    return Answer("\n\n".join(map(show, names)) or listing(), data)


if __name__ == "__main__":
    sys.exit(command("optimizers", lambda: run(sys.argv[1:]), sys.argv))
