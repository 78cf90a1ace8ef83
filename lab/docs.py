"""The tables of the pages and the first picture, generated from the registries, the benchmarks' figures and the records.

python -m lab.docs          write them all (./run.sh docs)
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import optimizers
import tricks
from config import entries
from engine import schedules
from engine.hardware import CARDS
from engine.run_folder import ROOT, read_json
from lab import markdown, plots
from lab.markdown import table
from lab.records import history
from lab.records.record import of_track
from lab.scaling import report as survival_report
from lab.tuning import descent, tuned

KEPT, BENCHMARKS = ROOT / "records", ROOT / "benchmarks"
CHAOS = BENCHMARKS / "chaos.json"  # a list
LADDER = KEPT / "scaling" / "h100-modern" / "scaling.json"
PICTURE = ROOT / "docs" / "first-run.png"
SCHEDULES = {"schedule": schedules.SCHEDULES, "momentum schedule": schedules.MOMENTUM_SCHEDULES}


def rule(cls: type) -> str:
    """What the docstring of a registered class says first."""
    return " ".join(cls.__doc__.split("Source:")[0].split("\n\n")[0].split())


def source(cls: type) -> str:
    """What the docstring of a registered class says after `Source:`, up to the end of that sentence."""
    text = " ".join(cls.__doc__.split("Source: ")[1].split())
    return re.split(r"(?<!et al)[.;](?= |$)", text)[0].rstrip(".")


def settable(head: str, registry: dict[str, type]) -> str:
    rows = []
    for name, cls in registry.items():
        keys = ", ".join(f"`{f.name}={f.default}`" for f in dataclasses.fields(cls))
        rows.append((f"`{name}`", rule(cls), keys))
    return table((head, "what it does", "settings and defaults"), rows)


def trick_tables() -> dict[str, str]:
    tracks = [(f"`{n}`", t.summary, f"{t.target_loss or '-'}", t.target_source) for n, t in tricks.TRACKS.items()]
    recipes = []
    for track, about in tricks.TRACKS.items():
        for name, words in about.recipes.items() if not about.workload else ():
            listed = ", ".join(f"`{word}`" for word in words) or "none: GPT-2 as published + AdamW"
            recipes.append((f"`{track}`", f"`{name}`", listed))
    rows = [(f"`{n}`", t.kind, t.source, t.claim, t.scale or "-") for n, t in tricks.TRICKS.items()]
    return {
        "tracks": table(("track", "what", "target, nats per token", "where the target is from"), tracks),
        "recipes": table(("track", "recipe", "tricks"), recipes),
        "tricks": table(("trick", "kind", "source", "what its authors claim", "at other sizes"), rows),
    }


def optimizer_tables() -> dict[str, str]:
    steps = read_json(BENCHMARKS / "optimizers.json")["step"]
    rows = []
    for name, cls in optimizers.OPTIMIZERS.items():
        ratio = next((f"{row['ratio']:.2g}" for row in steps.get(name, []) if row["what"] == "ours"), "-")
        rows.append((f"`{name}`", rule(cls), f"{cls.state_per_parameter:g}", ratio, source(cls)))
    head = ("optimizer", "rule", "bytes of state a weight", "step, x AdamW", "source")
    return {
        "optimizers": table(head, rows),
        "averages": settable("average", optimizers.AVERAGES),
        "outer": settable("outer method", optimizers.OUTER),
    }


def as_fast(clock: dict[str, Any]) -> str:
    return f"{clock['ratio']:.1f} times as fast ({clock['low']:.1f}-{clock['high']:.1f})"


def times(comparison: str, arm: str) -> str:
    """How many times as fast as AdamW an arm of a kept comparison is: at equal loss; as confirmed where it has no horizon."""
    ratio = next(r for r in read_json(ROOT / comparison / "comparison.json")["ratios"] if r["arm"] == arm)
    clock = (ratio["equal_loss"] or ratio["confirmed"])["train_time"]
    return as_fast(clock) if ratio["verdict"] in ("faster", "slower") else f"not significant (p = {clock['p']:.2g})"


def findings() -> list[tuple[str, str, str]]:
    """Question, answer and evidence: what records/ and benchmarks/ hold, at most eight rows."""
    tables = tuned.read_tables(KEPT / "tuning")
    contest, tasks = descent.means(tables), sum(map(bool, map(descent.ended, tables.values())))
    board = next(iter(read_json(KEPT / "levers" / "levers.json").values()))  # of its first workload, the best lever first
    levers = ", ".join(f"`{x['name']}` {x['steps']:.2f}x" for x in board[:3] if x["verdict"] == "helps")
    tried = read_json(LADDER)["tricks"]
    alive = [f"`{t['trick'][1:]}`" for t in tried if (t["trends"]["tokens"] or {}).get("verdict") == "survives"]
    off = read_json(BENCHMARKS / "cost.json")["errors"]["not fitted"]
    faults, lost = (sum(row[key] for row in json.loads(CHAOS.read_text())) for key in ("faults", "lost"))
    fair, gained = "records/comparisons/cpu-optimizers", history.gains(of_track("cpu", "gpt"))[-1]
    best = ", ".join(f"`{name}` {mean:.1f}x" for name, mean in list(contest.items())[:3])
    larger = f"{len(alive)} of {len(tried)}: {', '.join(alive)}"
    rows = [
        ("The `cpu` track's record instead of GPT-2 with AdamW", as_fast(vars(gained)), "records"),
        ("Muon instead of AdamW, both tuned", times(fair, "muon"), fair),
        ("Schedule-Free AdamW instead of AdamW, both tuned", times(fair, "schedule_free_adamw"), fair),
        ("Best levers on a tuned Muon: its steps for their loss", levers, "records/levers"),
        (f"The fastest of {len(contest)} optimizers tuned alike on {tasks} small tasks, over AdamW", best, "records/tuning"),
        ("Tricks expected to help at ten times the largest size tried", larger, "docs/scaling.md"),
        ("Error of `./run.sh plan` on published GPU runs", f"{off['median']:.1%} (median of {off['n']})", "benchmarks"),
        (f"Runs lost to {faults} kills and full disks", f"{lost}", "benchmarks"),
    ]
    pages = {link: link if link.endswith(".md") else f"{link}/README.md" for *_, link in rows}
    return [(question, answer, f"[{Path(link).stem}]({pages[link]})") for question, answer, link in rows]


def optimizer_figures() -> dict[str, str]:
    """What benchmarks/optimizers.py left of the methods that there are."""
    groups, rows = read_json(BENCHMARKS / "optimizers.json")["step"].values(), []
    for row in (row for group in groups for row in group if row["name"] in optimizers.OPTIMIZERS):
        if row["what"] != "torch.optim.AdamW fused":  # what the others are compared with
            name = f"`{row['name']}`" if row["what"] == "ours" else ""
            ratio = f"{row['ratio']:.2f} ({row['smallest']:.2f}-{row['largest']:.2f})"
            state, chip = f"{row['state_per_parameter']:.1f}", row["machine"].split("(R)")[0].split(",")[0]
            rows.append((name, row["what"], f"{row['milliseconds']:,.0f}", ratio, state, chip))
    head = ("method", "code", "ms a step", "x fused AdamW (smallest-largest)", "bytes of state a weight", "processor")
    return {"step": table(head, rows)}


def cost_tables() -> dict[str, str]:
    """What tests/cost/published_steps.py left, and the cards that the cost model knows."""
    figures = read_json(BENCHMARKS / "cost.json")
    errors = [(what, str(e["n"]), f"{e['median']:.1%}") for what, e in figures["errors"].items()]
    elsewhere, cards = [], []
    for r in figures["optimizers"] + figures["elsewhere"]:
        off = f"{r['predicted'] / r['published'] - 1:+.1%}"
        elsewhere.append((r["what"], f"{r['published']:,.1f}", f"{r['predicted']:,.1f}", off, r["source"]))
    for name, c in CARDS.items():
        numbers = (f"{c.bf16 / 1e12:.0f}", f"{c.reached:.0%}", f"{c.bandwidth / 1e12:.2f}", f"{c.memory / 1e9:.0f}")
        cards.append((f"`{name}`", *numbers, f"{c.link / 1e9:.0f}", f"{c.price:g}" if c.price else "-", c.source))
    of_cards = ("card", "bf16, TFLOP/s", "reached", "memory, TB/s", "GB", "link, GB/s", "$ an hour", "source")
    return {
        "cost errors": table(("step times", "number", "median error"), errors),
        "cost elsewhere": table(("setup", "published, ms", "predicted, ms", "off by", "source"), elsewhere),
        "cards": table(of_cards, cards),
    }


def published_tables() -> dict[str, str]:
    """The optimizer track of modded-nanogpt: the best family first, in it the fewest steps."""
    rows = sorted(entries(), key=lambda row: int(row["steps_to_target"]))
    order = [row["family"] for row in rows]
    rows.sort(key=lambda row: order.index(row["family"]))
    cells = [(r["family"], f"#{r['result']}", f"{int(r['steps_to_target']):,}", r["readme_n"], r["settings"]) for r in rows]
    return {"track 3": table(("family", "entry", "steps to 3.28", "runs", "settings"), cells)}


def benchmark_tables() -> dict[str, str]:
    keys = ("what", "faults", "recovered", "lost", "seconds_per_fault")
    chaos = [tuple(str(c[key] if c[key] is not None else "-") for key in keys) for c in json.loads(CHAOS.read_text())]
    head = ("what", "faults", "recovered", "lost", "s lost a fault")
    return optimizer_figures() | cost_tables() | {"chaos": table(head, chaos)}


def draw_first_run() -> None:
    """Loss against time of the `cpu` track's records; the first is drawn as it was timed beside the second."""
    first, second, *_ = chain = of_track("cpu", "gpt")
    logs = [second.rival_logs, *(record.logs for record in chain[1:])]
    labels = [f"{record.about['number']:03d} {record.about['name']}" for record in chain]
    plots.losses(PICTURE, dict(zip(labels, map(history.curve, logs))), first.about["target_loss"])


DOCUMENTS = {
    ROOT / "README.md": lambda: {"findings": table(("question", "answer", "evidence"), findings())},
    ROOT / "docs" / "tricks.md": trick_tables,
    ROOT / "docs" / "optimizers.md": optimizer_tables,
    ROOT / "docs" / "schedules.md": lambda: {f"{head}s": settable(head, registry) for head, registry in SCHEDULES.items()},
    ROOT / "docs" / "scaling.md": lambda: {"scaling": survival_report.survival_table(read_json(LADDER), "tokens")},
    BENCHMARKS / "README.md": benchmark_tables,
    KEPT / "README.md": history.tables,
    KEPT / "published" / "README.md": published_tables,
}


def filled(path: Path) -> str:
    """The page's text with every generated table as the registries and results have it."""
    return markdown.filled(path.read_text(), DOCUMENTS[path](), str(path))


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(filled(path))
        print(f"wrote {path.relative_to(ROOT)}")
    draw_first_run()
    print(f"wrote {PICTURE.relative_to(ROOT)}")
