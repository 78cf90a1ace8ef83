"""Markdown that is generated: tables, and the places in a document where they stand."""

import re
from collections.abc import Iterable, Mapping, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], aligned: bool = False) -> str:
    """aligned: with columns of even width, for a terminal."""
    lines = [[escaped(cell).replace("|", "\\|") for cell in line] for line in (head, ["-"] * len(head), *rows)]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*lines)]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text of others, without the tags that a page would take for its own."""
    return re.sub("<(?=[a-zA-Z/!])", "&lt;", text)


def filled(text: str, content: Mapping[str, str], where: str) -> str:
    """`text` with everything between `<!-- name -->` and `<!-- /name -->` replaced by content[name]. Raises ValueError: `where`
    has no markers for a name."""
    for name, new in content.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{where} has no markers for {name!r}")
        text = pattern.sub(lambda m, new=new: m[1] + new + "\n" + m[2], text)
    return text
