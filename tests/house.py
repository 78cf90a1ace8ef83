"""The size of the house and who imports whom. Prints the counts and their limits, and what is over them:

.venv/bin/python tests/house.py
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

TRAINS = ("train_gpt", "config", "optimizers", "data", "tricks", "hub", "model", "layers", "engine")
ALL = (*TRAINS, "cost", "lab", "compare", "scaling", "sample")
MAY_IMPORT = {  # a module at the top, or a folder -> what it may import, itself aside
    "engine": (),
    "layers": ("engine",),
    "data": ("engine",),
    "model": ("layers", "engine"),
    "hub": ("model", "layers", "engine"),
    "optimizers": ("model", "layers", "engine"),
    "tricks": ("layers", "engine"),
    "config": TRAINS[2:],
    "train_gpt": TRAINS[1:],
    "cost": TRAINS,
    "lab": (*TRAINS, "cost"),
    "compare": ALL,
    "scaling": ALL,
    "judge": (*ALL, "benchmarks"),
    "sample": ALL,
    "evaluate": ALL,
    "export": ALL,
    "benchmarks": (*ALL, "studies"),
    "page": (*ALL, "studies"),
    "studies": (*ALL, "benchmarks"),
}


MOST_LINES = 17_550  # of product; CONTRIBUTING.md says when it grows


def product() -> dict[str, str]:
    """Path -> text of every Python file but tests and studies."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    paths = [path for path in listed if not path.startswith(("tests/", "studies/")) and (ROOT / path).exists()]
    return {path: (ROOT / path).read_text() for path in paths}


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


# ---------------------------------------------------------------- sizes


def functions(sources: dict[str, str]) -> list[tuple[int, str]]:
    """(lines, path: name) of every function, the longest first."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{path}: {node.name}")
        for path, text in sources.items()
        for node in ast.walk(parsed(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return sorted(found, reverse=True)


def counts(sources: dict[str, str]) -> list[tuple[str, int, int]]:
    """(what, how many, at most)."""
    lines = {path: text.count("\n") for path, text in sources.items()}
    readme = (ROOT / "README.md").read_bytes()
    return [
        ("product, lines", sum(lines.values()), MOST_LINES),
        ("train_gpt.py, lines", lines["train_gpt.py"], 600),
        ("model.py, lines", lines["model.py"], 450),
        ("longest function, lines", functions(sources)[0][0], 60),
        ("README.md, lines", readme.count(b"\n"), 250),
        ("README.md, bytes", len(readme), 16_000),
    ]


# ---------------------------------------------------------------- imports


def module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(name: str) -> str:
    """The key of MAY_IMPORT; a command (`python -m data`) is a verb, and may import what `compare` may."""
    return "compare" if name.endswith(".__main__") else name.split(".")[0]


def imported(node: ast.AST, modules: set[str]) -> list[str]:
    """Our own modules that this statement or call imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and isinstance(node.args[0], ast.Constant):
        names = [node.args[0].value]
    else:
        return []
    return [name if name in modules else name.rpartition(".")[0] for name in names if name.split(".")[0] in roots(modules)]


def roots(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def arrows(sources: dict[str, str]) -> Iterator[tuple[str, str, bool]]:
    """(importing module, imported module, inside a function?)."""
    modules = set(map(module, sources))
    for path, text in sources.items():
        tree = parsed(text)
        lazy = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, (ast.FunctionDef, ast.Lambda))
            for inner in ast.walk(outer)
        }
        for node in ast.walk(tree):
            for target in imported(node, modules):
                yield module(path), target, id(node) in lazy


def circle(edges: list[tuple[str, str, bool]]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    graph: dict[str, set[str]] = {}
    for source, target, _ in edges:
        graph.setdefault(source, set()).add(target)
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        ring = next(
            filter(None, (walk(target, [*trail, name]) for target in sorted(graph.get(name, ())) if target != name)), []
        )
        done.add(name)
        return ring

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """Imports that go up, hide in a function or close a circle, a line each."""
    lines, edges = [], list(arrows(sources))
    for source, target, lazy in edges:
        here, there = room(source), target.split(".")[0]
        if here != there and there not in MAY_IMPORT.get(here, ()) and source.split(".")[0] != there:
            lines.append(f"{source} imports {target}")
        if lazy:
            lines.append(f"{source} imports {target} inside a function")
    ring = circle(edges)
    return sorted(set(lines)) + ([f"a circle: {' -> '.join(ring)}"] if ring else [])


if __name__ == "__main__":
    sources = product()
    table = counts(sources)
    for what, count, most in table:
        print(f"{what:24s}{count:8,d}  of {most:,d}{'' if count <= most else '   OVER'}")
    over = [f"{name} has {lines} lines" for lines, name in functions(sources) if lines > 60] + wrong_imports(sources)
    print("\n".join(over))
    sys.exit(bool(over) or any(count > most for _, count, most in table))
