"""The tables of README.md, generated from the registries, so that they cannot drift.

python -m lab.readme          rewrite them between their markers
"""

import dataclasses
import re
from pathlib import Path

import optimizers
import schedules
import tricks
from data.corpora import CORPORA

README = Path(__file__).parent.parent / "README.md"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("-",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def keys(cls: type) -> str:
    """`name=default` of every setting of a registered class."""
    return ", ".join(f"`{f.name}={f.default}`" for f in dataclasses.fields(cls))


def first_line(cls: type) -> str:
    return " ".join(cls.__doc__.split("\n\n")[0].split())


def tables() -> dict[str, str]:
    """Marker name -> Markdown table."""
    return {
        "tracks": table(
            ("track", "what", "target, nats per token", "where the target is from"),
            [(f"`{n}`", t.summary, f"{t.target_loss:g}", t.target_source) for n, t in tricks.TRACKS.items()],
        ),
        "recipes": table(
            ("track", "recipe", "tricks"),
            [
                (f"`{track}`", f"`{name}`", ", ".join(f"`{w}`" for w in words) or "none: GPT-2 as published + AdamW")
                for track, t in tricks.TRACKS.items()
                for name, words in t.recipes.items()
            ],
        ),
        "tricks": table(
            ("trick", "kind", "source", "what its authors claim"),
            [(f"`{n}`", t.kind, t.source, t.claim) for n, t in tricks.TRICKS.items()],
        ),
        "optimizers": table(
            ("optimizer", "rule", "settings and defaults"),
            [(f"`{n}`", first_line(cls), keys(cls)) for n, cls in optimizers.OPTIMIZERS.items()],
        ),
        "schedules": table(
            ("schedule", "shape", "settings and defaults"),
            [(f"`{n}`", first_line(cls), keys(cls)) for n, cls in schedules.SCHEDULES.items()],
        ),
        "momentum schedules": table(
            ("momentum schedule", "shape", "settings and defaults"),
            [(f"`{n}`", first_line(cls), keys(cls)) for n, cls in schedules.MOMENTUM_SCHEDULES.items()],
        ),
        "corpora": table(
            ("corpus", "what", "source"),
            [(f"`{n}`", c.summary, c.source) for n, c in CORPORA.items()],
        ),
    }


def filled(text: str) -> str:
    """README text with every table between `<!-- name -->` and `<!-- /name -->` as the registries have it."""
    for name, content in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no markers for the table {name!r}")
        text = pattern.sub(lambda m, content=content: m[1] + content + "\n" + m[2], text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    print(f"wrote {README.name}")
