"""What people read of the records: the history of each track, as a table and a picture, and one run beside its track's."""

import itertools
import math
import re
from pathlib import Path

import tricks
from engine.run_folder import atomic_write
from lab import markdown, plots, stats, trials
from lab.comparison import ratio_words
from lab.records import judge, reports, rules
from lab.records import record as records
from lab.records import tables as tuning_tables
from lab.records.record import CATEGORIES, FinishedRun, Kept, Log, Record

PICTURE = "time to the target: baseline of the category, in grey, over each of its records"
FOLDERS = ("comparisons", "scaling", "tuning", "levers", "published")  # beside those of the tracks


def gains(chain: list[Record]) -> list[stats.Ratio]:
    """Baseline over each record: the product of the time ratios down to it, with the interval that the pairs of all leave."""
    parts: dict[str, list[tuple[float, float, int]]] = {}
    for record in chain:
        parts[record.folder.name] = []
        if against := record.about["against"]:
            ratio = record.speed_ratio
            part = math.log(against["ratio"]), ratio.sd / math.sqrt(ratio.n), ratio.n - 1
            parts[record.folder.name] = [*parts[against["record"]], part]
    return [stats.product(of_record) for of_record in parts.values()]


def history(track: str, category: str) -> str:
    """The table of the records of a track's category."""
    chain, rows = records.of_track(track, category), []
    for record, total in zip(chain, gains(chain), strict=True):
        about, s, against = record.about, record.about["statistics"], record.about["against"]
        link = f"[{about['number']:03d}]({track}/{record.folder.name}/README.md) {about['name']}"
        gained = (f"{against['record'][:3]}: {ratio_words(against)}" if against else "-", ratio_words(vars(total)))
        loss = (f"{s['mean']:.4f} ({s['sd']:.4f})", f"{s['n']}, {s['p']:.1g}")
        dtype = trials.DTYPES[about["numerics"]["dtype"]]
        rows.append((link, f"{about['steps']:,}", f"{s['train_time']:,.1f}", dtype, *gained, *loss, about["date"]))
    head = ("record", "steps", "time, s", "dtype", "previous / this", "baseline / this", "loss, mean (sd)", "n, p", "date")
    return markdown.table(head, rows)


def tables() -> dict[str, str]:
    """Marker name -> generated part of records/README.md."""
    of = {"record": rules.RULES, "report": reports.RULES, "tuning": tuning_tables.RULES}
    of |= {"levers": {"moves": tuning_tables.moves}, "records/": RULES}
    asked = [(kind, f"`{name}`", " ".join(rule.__doc__.split())) for kind, kept in of.items() for name, rule in kept.items()]
    held = [(t, c) for t, c in itertools.product(chains(), (*CATEGORIES, "open")) if records.of_track(t, c)]
    shown = [f"`{track}`, category {category}:\n\n{history(track, category)}" for track, category in held]
    shown += [f"![{PICTURE}](history-{track}.png)" for track in chains()]
    return {"history": "\n\n".join(shown), "rules": markdown.table(("of", "rule", "what it asks"), asked)}


def chains() -> dict[str, list[Record]]:
    """All records of each track that has any, by category."""
    of = {t: dict.fromkeys(r for c in ("open", *CATEGORIES) for r in records.of_track(t, c)) for t in tricks.TRACKS}
    return {track: list(kept) for track, kept in of.items() if kept}


def render() -> str:
    """Write the tables and pictures of records/README.md; returns what was written."""
    path = records.RECORDS / "README.md"
    atomic_write(path, markdown.filled(path.read_text(), tables(), str(path)))
    written = [path.name]
    for track, kept in chains().items():
        written.append(plots.history(records.RECORDS, track, [r.about for r in kept], gains(kept)) + ".png")
    return "\n".join(f"wrote records/{name}" for name in written)


class Tree(Kept):
    """The folder records/ itself."""

    label = "records"


def tree(tree: Tree) -> str:
    """records/ holds tracks, comparisons, scaling, tuning, levers, published, and in these only files that something names."""
    folders = {path.name for path in tree.folder.iterdir() if path.is_dir()} & {*FOLDERS, *tricks.TRACKS}
    may = {"lessons.md", *(f"history-{track}.png" for track in chains())}
    expected = {"README.md", *folders, *(name for name in may if (tree.folder / name).exists())}
    judge.only_files(tree.folder, expected, "folder of records", folders)
    page = (tree.folder / "README.md").read_text()
    for link in re.findall(r"\]\((\w[\w./-]*)", page):
        judge.need((tree.folder / link).exists(), f"README.md leads to {link}, which is not there")
    for place in sorted(folders - {"tuning", "levers"}):
        here = tree.folder / place
        beside = (here / "README.md").read_text() if place == "published" else ""
        commands = " ".join(path.read_text() for path in here.glob("*/scaling.json"))
        for path in sorted(here.iterdir()):
            name = path.name
            if path.is_dir():
                judge.need(f"]({place}/{name}/README.md)" in page, f"README.md does not name {place}/{name}")
            elif name != "README.md" and name not in beside:
                judge.need(f"/{name} " in commands, f"{place}/ has the stray file {name}")
    return f"{len(folders)} folders"


def page(tree: Tree) -> str:
    """README.md's tables are those of the records and rules; its pictures are drawn from the records."""
    text = (tree.folder / "README.md").read_text()
    as_rendered = text == markdown.filled(text, tables(), "README.md")
    judge.need(as_rendered, "the tables of README.md are not those of the records: ./run.sh records render")
    shown = {f"history-{t}": plots.history_data([r.about for r in kept], gains(kept)) for t, kept in chains().items()}
    judge.pictured(tree.folder, shown)
    return "as rendered"


RULES = {rule.__name__: rule for rule in (tree, page)}


def curve(logs: list[Log]) -> plots.Curve:
    """The mean loss curve of a record's runs."""
    return plots.curve([log.losses for log in logs], [log.step_times for log in logs], [log.loss for log in logs])


def summary(folder: Path) -> str:
    """What a person wants to know of a finished run, beside its track's first and newest GPT record; draws loss.png."""
    run = FinishedRun.read(folder)
    config, result, chain = run.config, run.result, records.of_track(run.config["track"], "gpt")
    shown, beside = {"this run": result | {"mean": result["val_loss"]}}, chain[:1] + chain[1:][-1:]
    for r in beside:
        shown[f"{r.folder.name} (n = {r.about['statistics']['n']})"] = r.about["statistics"] | {"steps": r.about["steps"]}
    rows = []
    for name, s in shown.items():
        loss = "-" if s["mean"] is None else f"{s['mean']:.4f}"  # of a run that diverged
        costs = (f"{s['train_time']:,.1f}", f"{s['process_time']:,.1f}", f"{s['peak_memory'] / 1e9:,.1f}")
        rows.append((name, loss, f"{s['steps']:,}", f"{s['tokens']:,}", *costs))
    head = ("", "validation loss", "steps", "tokens", "time, s", "CPU time, s", "memory, GB")
    reached = f"target {result['target_loss'] or 0:g} {'reached' if result['target_reached'] else 'NOT reached'}"
    speed = f"{result['tokens_per_second']:,.0f} tokens per second" + (f", MFU {result['mfu']:.0%}" if result["mfu"] else "")
    what = f"{config['track']} track, recipe {config['recipe']}, seed {config['seed']} on {run.env['cpu']}"
    lines = [f"{what}: {reached if result['target_loss'] else 'no target'}, {speed}", markdown.table(head, rows, aligned=True)]
    lines += ["Times of records are those of the machine that ran them; for a fair ratio: ./run.sh compare"] * bool(chain)
    if result["val_loss"] is not None and result["target_loss"]:
        curves = {f"record {record.folder.name}, on its machine": curve(record.logs) for record in beside}
        plots.losses(folder / "loss.png", curves | {"this run": plots.of_run(folder)}, result["target_loss"])
        lines.append(f"picture: {folder / 'loss.png'}")
    return "\n".join(lines)
