"""Reports kept in records/: comparisons and scaling experiments, each beside the trials from which its statistics follow."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lab import comparison
from lab.scaling import report as survival_report
from lab.scaling import survival

Summary = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a report consists of, and how it is made from its trials."""

    name: str  # of the file with its statistics
    again: Callable[[Summary, list[comparison.Row]], Summary]  # the same statistics, from the trials
    markdown: Callable[[Summary], str]


KINDS = {
    # of several machines or not: which ones it was, the summary says
    "comparisons": Kind("comparison.json", partial(comparison.again, allow_mixed=True), comparison.markdown),
    "scaling": Kind("scaling.json", survival.again, survival_report.markdown),
}


@dataclass(frozen=True)
class Report:
    """A folder of records/comparisons or records/scaling."""

    folder: Path

    @property
    def label(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def kind(self) -> Kind:
        return KINDS[self.folder.parent.name]

    @cached_property
    def rows(self) -> list[comparison.Row]:
        return comparison.read_rows(self.folder / "trials.csv")

    @cached_property
    def summary(self) -> Summary:
        return json.loads((self.folder / self.kind.name).read_text())


def kept(root: Path) -> list[Report]:
    """All reports under a folder of records."""
    return [Report(path.parent) for name, kind in KINDS.items() for path in sorted((root / name).glob(f"*/{kind.name}"))]


def difference(there: Any, again: Any, place: str = "") -> str:
    """Where two contents of JSON first differ, in words; empty if they do not. Numbers are the same to 1e-4: other
    machines round otherwise, and a bootstrap's fit carries it on."""
    if isinstance(there, dict) and isinstance(again, dict):
        if missing := there.keys() ^ again.keys():
            return f"{place or 'the top'}: {min(missing)} is not in both"
        pairs = [(there[key], again[key], f"{place}.{key}".lstrip(".")) for key in there]
    elif isinstance(there, list) and isinstance(again, list):
        if len(there) != len(again):
            return f"{place} has {len(there)} entries, by the trials {len(again)}"
        pairs = [(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(there, again, strict=True))]
    else:
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (there, again))
        same = math.isclose(there, again, rel_tol=1e-4) if numbers else there == again
        return "" if same else f"{place} is {there}, by the trials {again}"
    return next((words for a, b, at in pairs if (words := difference(a, b, at))), "")
