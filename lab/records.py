"""Keep finished runs as records, and compare a run with the track's baseline.

    python -m lab.records keep baseline runs/cpu/baseline-s*       copy finished runs to records/cpu/baseline/
    python -m lab.records summary runs/cpu/record-s0-1a2b3c4d      a run against the stored baseline

A record is records/<track>/<name>/seed<n>/ with config.json, env.json, result.json and the log, compressed.
"""

import argparse
import gzip
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from spec import UsageError

RECORDS = Path(__file__).parent.parent / "records"


def load(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a run folder.

    Raises:
        UsageError: it is missing; a run without result.json has not ended.
    """
    try:
        return json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {name}: not a finished run") from None


def keep(name: str, runs: list[Path]) -> list[Path]:
    """Copy finished runs into the records of their track; returns the new folders.

    Raises:
        UsageError: a run has not ended, or two runs have the same seed.
    """
    kept = []
    for run in runs:
        config = load(run, "config.json")
        target = RECORDS / config["track"] / name / f"seed{config['seed']}"
        if target in kept:
            raise UsageError(f"{run}: seed {config['seed']} was given twice")
        files = {file: load(run, file) for file in ("config.json", "env.json", "result.json")}
        files["config.json"]["out"] = ""  # where the run stood is no part of the record
        target.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (target / file).write_text(json.dumps(content, indent=1) + "\n")
        # mtime=0: the same log gives the same bytes
        (target / "log.jsonl.gz").write_bytes(gzip.compress((run / "log.jsonl").read_bytes(), mtime=0))
        kept.append(target)
    return kept


def results(track: str, name: str) -> list[dict[str, Any]]:
    """result.json of every kept run of a record, by seed; empty when there is none."""
    return [load(folder, "result.json") for folder in sorted((RECORDS / track / name).glob("seed*"))]


def summary(run: Path) -> str:
    """What a person wants to know of a finished run, beside the baseline's stored figures."""
    config, result, env = (load(run, f"{name}.json") for name in ("config", "result", "env"))
    base = results(config["track"], "baseline")
    number = lambda v, form, unit="": "-" if v is None else format(v, form) + unit  # noqa: E731
    rows = [("", "this run", f"baseline (mean of {len(base)} runs)" if base else "baseline: none stored")]

    def row(label: str, key: str, form: str, unit: str = "") -> None:
        known = [r[key] for r in base if r[key] is not None]
        rows.append((label, number(result[key], form, unit), number(statistics.mean(known) if known else None, form, unit)))

    row("validation loss", "val_loss", ".4f", " nats")
    row("time to target", "time_to_target", ".1f", " s")
    row("steps to target", "steps_to_target", ",.0f")
    row("steps", "steps", ",.0f")
    row("tokens", "tokens", ",.0f")
    row("training time", "train_time", ".1f", " s")
    row("tokens per second", "tokens_per_second", ",.0f")
    row("MFU", "mfu", ".1%")
    row("peak memory", "peak_memory", ",.0f", " bytes")
    target = result["target_loss"]
    verdict = f"target {target:g} {'reached' if result['target_reached'] else 'NOT reached'}" if target else "no target"
    head = f"{config['track']} track, recipe {config['recipe']}, seed {config['seed']} on {env['cpu']}: {verdict}"
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    lines = ["  ".join((r[0].ljust(widths[0]), r[1].rjust(widths[1]), r[2].rjust(widths[2]))) for r in rows]
    if base:
        lines.append("Baseline times are from the machine that recorded them; for a fair ratio run both here.")
    return "\n".join([head, *lines])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="records", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    keeper = verbs.add_parser("keep", help="copy finished runs into records/")
    keeper.add_argument("name", help="baseline, record, ...")
    keeper.add_argument("runs", type=Path, nargs="+")
    verbs.add_parser("summary", help="one run beside the baseline").add_argument("run", type=Path)
    options = parser.parse_args(argv)
    try:
        if options.verb == "keep":
            print("\n".join(str(folder) for folder in keep(options.name, options.runs)))
        else:
            print(summary(options.run))
        return 0
    except UsageError as error:
        print(f"records: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
