"""The lecture's claims, each tried at a size that two cores manage.

./run.sh study                           the studies: name, claim, minutes on two quiet cores
./run.sh study rosenbrock                run one: prints claim, number and verdict; its picture and figures are in runs/studies
./run.sh study loss_line --run runs/cpu/record-s0-1a2b3c4d     look at a run of your own
./run.sh study all                       run all in the lecture's order, except those done
./run.sh study page                      write studies/README.md from studies/results
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import io
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from tqdm import tqdm

from engine.command import Answer, Parser, command
from engine.run_folder import ROOT, atomic_write, source_hash
from engine.spec import UsageError, nearest
from lab.markdown import escaped

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "README.md"
SHARED = ("common", "surfaces")  # files beside the studies that are none
HEAD = """# The lecture, run

Each study tries one claim of a lecture on optimization methods for neural networks, at a size that two cores manage.
`./run.sh study` lists them, `./run.sh study NAME` runs one, `./run.sh study page` writes this page from `results/`.
"""

# ---------------------------------------------------------------- the list


def about(path: Path) -> dict[str, Any]:
    """What a study says of itself: claim, text, source, and its constants. Read, not imported, so the list is instant."""
    tree = ast.parse(path.read_text())
    pairs = [(node.targets[0].id, node.value) for node in tree.body if isinstance(node, ast.Assign)
             and isinstance(node.targets[0], ast.Name)]  # fmt: skip
    constants = {name: value.value for name, value in pairs if isinstance(value, ast.Constant)}
    claim, _, text = ast.get_docstring(tree).partition("\n\n")
    text, _, source = text.partition("Source: ")
    of = {"name": path.stem, "minutes": constants["MINUTES"], "slide": constants["SLIDE"]}
    return of | {"claim": " ".join(claim.split()), "text": text.strip(), "source": " ".join(source.split())}


def studies() -> dict[str, dict[str, Any]]:
    """All of them by name, in the lecture's order."""
    files = [path for path in HERE.glob("*.py") if not path.stem.startswith("_") and path.stem not in SHARED]
    return {of["name"]: of for of in sorted(map(about, files), key=lambda of: of["slide"])}


def listed() -> Answer:
    rows = [f"  {of['name']:18s}{of['minutes']:4.1f} min   {of['claim']}" for of in studies().values()]
    total = sum(of["minutes"] for of in studies().values())
    rows.append(f"  {'all':18s}{total:4.1f} min   on two quiet cores; one: ./run.sh study NAME")
    return Answer("\n".join(rows), [*studies().values()])


# ---------------------------------------------------------------- one study


def load(name: str) -> ModuleType:
    """Raises UsageError: no such study, or a package that it needs is not installed."""
    if name not in studies():
        raise UsageError(f"unknown study {name!r}: {nearest(name, [*studies(), 'all', 'page'])}")
    return importlib.import_module(f"studies.{name}")


def code(name: str) -> str:
    """Of all code that a study's figures come from."""
    own = [(HERE / f"{part}.py").read_bytes() for part in (name, *SHARED)]
    return hashlib.sha256(source_hash().encode() + b"".join(own)).hexdigest()


def experiment(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a study and put picture, animation and figures into options.out: all of them, or nothing."""
    study = load(name)
    folder = {"folder": options.run} if options.run else {}
    if folder and "folder" not in inspect.signature(study.run).parameters:
        able = [n for n in studies() if "folder" in inspect.signature(load(n).run).parameters]
        raise UsageError(f"the study {name} does not look at runs: --run is for {', '.join(able)}")
    made_by, wall, work = code(name), time.monotonic(), time.process_time()
    figures = study.run(seed=options.seed, quick=options.quick, **folder)
    minutes, cpu = (time.monotonic() - wall) / 60, (time.process_time() - work) / 60
    holds, words = study.verdict(figures)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    result = {"study": name, "seed": options.seed, "quick": options.quick, "run": options.run and str(options.run)}
    result |= {"minutes": round(minutes, 2), "cpu_minutes": round(cpu, 2), "versions": versions, "code": made_by}
    result |= {"holds": bool(holds), "verdict": words, "figures": figures}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=options.out) as unfinished:
        place = Path(unfinished)
        picture(study, figures, place / f"{name}.png")
        if hasattr(study, "animate"):
            study.animate(figures, place / f"{name}.gif")
        (place / f"{name}.json").write_text(json.dumps(result, allow_nan=False) + "\n")
        for file in sorted(place.iterdir(), key=lambda file: file.suffix == ".json"):  # last: what says that all is there
            os.replace(file, options.out / file.name)
    return result


def picture(study: ModuleType, figures: dict[str, Any], path: Path) -> None:
    figure, drawn = study.draw(figures), io.BytesIO()
    figure.savefig(drawn, format="png")
    path.write_bytes(drawn.getvalue())
    importlib.import_module("matplotlib.pyplot").close(figure)


def said(result: dict[str, Any]) -> Answer:
    of, there = studies()[result["study"]], "holds" if result["holds"] else "does not hold here"
    words = f"{of['name']}: {of['claim']}\n  {there}: {result['verdict']}\n  seed {result['seed']}, {result['minutes']:.1f} min"
    return Answer(words, result)


def finished(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The result of the same study with the same settings and code, if it is there."""
    try:
        there = json.loads((options.out / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    same = (there.get("code"), there.get("seed"), there.get("quick")) == (code(name), options.seed, options.quick)
    return there if same and not there.get("run") else None


def all_of_them(options: argparse.Namespace) -> str:
    bar = tqdm(studies(), leave=False, disable=None)
    for name in bar:
        bar.set_description(name)
        tqdm.write(said(finished(name, options) or experiment(name, options)))
    return f"pictures and figures: {options.out}"


# ---------------------------------------------------------------- the page


def page() -> str:
    """studies/README.md: every claim in the lecture's order, with its picture and what was found."""
    parts = [HEAD]
    for of in studies().values():
        name, path = of["name"], RESULTS / f"{of['name']}.json"
        parts += [f"## {of['slide']}. {name}", "", f"**{of['claim']}**", ""]
        if path.exists():
            result = json.loads(path.read_text())
            moving = (RESULTS / f"{name}.gif").exists()
            parts += [f"![{name}](results/{name}.{ending})" for ending in ("png", *(["gif"] if moving else []))]
            there = "Holds" if result["holds"] else "Does not hold here"
            parts += ["", f"{there}: {result['verdict']}.", ""]
        parts += [of["text"], "", f"`./run.sh study {name}`, {of['minutes']:g} min. Source: {of['source']}", ""]
    return escaped("\n".join(parts))


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> str:
    parser = Parser(prog="./run.sh study", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a study, all, or page; nothing: list them")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder of the results (default: runs/studies)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--quick", action="store_true", help="run for seconds, at a size that shows little, as the tests do")
    parser.add_argument("--run", type=Path, help="a run folder: look at its model instead of a small one")
    options = parser.parse_args(argv)
    if not 0 <= options.seed < 2**31:
        raise UsageError(f"--seed must be 0 to {2**31 - 1}, got {options.seed}")
    if options.name is None:
        return listed()
    if options.name == "page":
        atomic_write(PAGE, page())
        return f"wrote {PAGE.relative_to(ROOT)}"
    if options.name == "all" and options.run:
        raise UsageError("--run goes with one study, not with all")
    try:
        return all_of_them(options) if options.name == "all" else said(experiment(options.name, options))
    except ModuleNotFoundError as error:
        raise UsageError(f"the studies need the package {error.name}: .venv/bin/pip install -e .[studies]") from None


if __name__ == "__main__":
    sys.exit(command("study", lambda: main(sys.argv[1:]), sys.argv[1:]))
