"""The tables of the README files, generated from the registries, what the benchmarks left and the records.

python -m lab.readme          rewrite them between their markers
"""

import dataclasses
import functools
import json
import re
import statistics
from pathlib import Path

import cost
import optimizers
import tricks
from data.corpora import CORPORA
from engine import schedules
from engine.hardware import CARDS
from lab import gpu_report, markdown
from lab.comparison import ratio_words
from lab.gpu_report import NOT_RUN, Finding
from lab.gpu_runs import WARM
from lab.markdown import table
from lab.records import record as records
from lab.scaling import report as survival_report
from lab.tuning import tuned

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "optimizers.json"
CHAOS = ROOT / "benchmarks" / "chaos.json"
KERNELS = ROOT / "benchmarks" / "kernels.json"
COST = ROOT / "benchmarks" / "cost.json"
H100 = ROOT / "benchmarks" / "h100"  # what `./run.sh gpu-check` left on one
KEPT = ROOT / "records"

SETTABLE = (  # marker, head of the first column, registry
    ("averages", "average", optimizers.AVERAGES),
    ("schedules", "schedule", schedules.SCHEDULES),
    ("momentum schedules", "momentum schedule", schedules.MOMENTUM_SCHEDULES),
    ("batch schedules", "batch-size schedule", schedules.BATCH_SCHEDULES),
    ("window schedules", "window schedule", schedules.WINDOW_SCHEDULES),
    ("length schedules", "sequence-length schedule", schedules.LENGTH_SCHEDULES),
)


def keys(cls: type) -> str:
    """`name=default` of every setting of a registered class."""
    return ", ".join(f"`{f.name}={f.default}`" for f in dataclasses.fields(cls))


def first_line(cls: type) -> str:
    return " ".join(cls.__doc__.split("\n\n")[0].split())


def source(cls: type) -> str:
    """What the docstring of a registered class says after `Source:`, up to the end of that sentence."""
    text = " ".join(cls.__doc__.split("Source: ")[1].split())
    return re.split(r"(?<!et al)[.;](?= |$)", text)[0]


def measured(part: str) -> dict:
    """What benchmarks/optimizers.py left; empty before its first run."""
    return json.loads(MEASURED.read_text())[part] if MEASURED.exists() else {}


def optimizer_rows() -> list[tuple[str, ...]]:
    rows = []
    for name, cls in optimizers.OPTIMIZERS.items():
        ours = next((row for row in measured("step").get(name, []) if row["what"] == "ours"), None)
        ratio = f"{ours['ratio']:.2g}" if ours else "-"
        state = f"{cls.state_per_parameter:g}" if cls.state_per_parameter else "< 0.1"
        rows.append((f"`{name}`", first_line(cls), state, ratio, source(cls)))
    return rows


def kernel_table() -> str:
    """What benchmarks/kernels.py left: a row a kernel, a column a chip."""
    report = json.loads(KERNELS.read_text())
    cells = {
        (row["kernel"], str(row["chip"])): f"{row['registers']}, {row['spilled']}, {row['shared'] / 1024:.0f}"
        + (f", {row['matrix_units']}" if row["matrix_units"] else "")
        for row in report["kernels"]
    }
    head = [f"sm_{capability} ({chip['name']})" for capability, chip in report["chips"].items()]
    rows = [
        (name, *(cells.get((name, chip), "not for this chip") for chip in report["chips"]))
        for name in dict.fromkeys(row["kernel"] for row in report["kernels"])
    ]
    limit = [f"{chip['registers']}, 0, {chip['shared'] / 1024:.0f}" for chip in report["chips"].values()]
    return table(("kernel", *head), [*rows, ("*at most*", *limit)])


def measured_tables() -> dict[str, str]:
    """Marker name -> table of benchmarks/README.md."""
    steps, runs, pass_ = measured("step"), measured("cpu_track"), measured("share")
    processor = lambda row: row["machine"].split("(R)")[0].split(",")[0]  # noqa: E731
    rows = [
        (
            f"`{row['name']}`" if row["what"] == "ours" else "", row["what"], f"{row['milliseconds']:,.0f}",
            f"{row['ratio']:.2f} ({row['smallest']:.2f}-{row['largest']:.2f})", f"{row['state_per_parameter']:.1f}",
            processor(row),
        )
        for group in steps.values() for row in group
    ]  # fmt: skip
    shares = []
    if pass_:
        for name, group in steps.items():
            ours = group[0]
            layers = 6 if optimizers.OPTIMIZERS[name].roles == ("matrix",) else 1  # measured on two of twelve layers
            step = ours["milliseconds"] / 1e3 * layers
            parts = [step / (step + pass_["seconds"] * n) for n in (8, 64, 512)]
            shares.append((f"`{name}`", f"{step:.2f}", *(f"{p:.1%}" for p in parts)))
    losses = [
        (f"`{name}`", f"{row['val_loss']:.3f}" if row["val_loss"] else row["status"], f"{row['step_time'] * 1e3:.0f}",
         f"{row['optimizer_state_bytes'] / 1e6:.1f}", f"`{row['schedule']}`", processor(row), row["dtype"])
        for name, row in sorted(runs.items(), key=lambda item: item[1]["val_loss"] or 99)
    ]  # fmt: skip
    chaos = [
        (c["what"], *(str(c[key]) for key in ("faults", "recovered", "lost")), str(c["seconds_per_fault"] or "-"))
        for c in (json.loads(CHAOS.read_text()) if CHAOS.exists() else [])
    ]
    of_steps = ("method", "code", "ms a step", "x fused AdamW (smallest-largest)", "bytes of state a weight", "processor")
    of_losses = ("method", "validation loss", "ms a step", "state, MB", "schedule", "processor", "computes in")
    return {
        **cost_tables(),
        **h100_tables(),
        "step": table(of_steps, rows),
        "chaos": table(("what", "faults", "recovered or refused", "lost", "s lost a fault"), chaos),
        "kernels": kernel_table(),
        "share": table(("method", "s a step, all 12 layers", "8 sequences", "64 sequences", "512 sequences"), shares),
        "cpu track": table(of_losses, losses),
    }


def off(row: dict) -> str:
    return f"{row['predicted'] / row['published'] - 1:+.1%}"


def h100_findings() -> dict[tuple[str, str], Finding]:
    """The newest finding of each (stage, what)."""
    reports = sorted(map(gpu_report.read, H100.glob("*.json")), key=lambda report: report["utc"])
    return {(f["stage"], f["what"]): Finding(**f) for report in reports for f in report["findings"] if f["verdict"] != NOT_RUN}


@functools.lru_cache
def h100_tables() -> dict[str, str]:
    """Marker name -> table of what gpu-check found: times of kernels and of attention, and recipes beside the dry run's words
    of today."""
    found = h100_findings()
    milliseconds = lambda seconds: f"{seconds * 1e3:.3g}" if isinstance(seconds, float) else "-"  # noqa: E731
    times = [f for f in found.values() if f.what.startswith("time of")]
    of_kernels = [
        (f.what.removeprefix("time of ").removesuffix(", bfloat16"), *(milliseconds(f.figures.get(name)) for name in
         ("kernel", "torch", "compiled", "predicted")), milliseconds(f.figures.get("launched", {}).get("kernel")))
        for f in times if f.stage == "kernels"
    ]  # fmt: skip
    of_attention = [
        (f.what.removeprefix("time of "), *(milliseconds(f.figures.get(name)) for name in ("sdpa", "flex", "chunked", "plain")))
        for f in times if f.stage == "attention"
    ]  # fmt: skip
    recipes = []
    for f in found.values():
        if f.stage != "recipes" or not f.figures.get("step_times"):
            continue
        step, peak = statistics.median(f.figures["step_times"][WARM:]), f.figures["result"].get("peak_memory")
        flags = f.figures["flags"]
        today = cost.predict([*flags, "--hardware", "1xH100", "--world-size", "1"])
        batch = int(flags[flags.index("--batch-tokens") + 1])
        recipes.append(
            (f"`{f.what.split(',')[0]}`", f"{batch:,}", milliseconds(step), milliseconds(today.seconds), f"{batch / step:,.0f}",
             f"{peak / 1e9:.1f}" if peak else "-", f"{today.step.memory.total / 1e9:.1f}")
        )  # fmt: skip
    return {
        "h100 kernels": table(("forward and backward", "Triton", "PyTorch", "compiled", "cost model", "launched"), of_kernels),
        "h100 attention": table(("mask, B x H x T x D", "sdpa", "flex", "chunked", "plain"), of_attention),
        "h100 recipes": table(
            ("recipe", "tokens a step", "ms a step", "predicted", "tokens/s", "GB at most", "predicted"), recipes
        ),
    }


def cost_tables() -> dict[str, str]:
    """Marker name -> table of benchmarks/README.md, from what lab/cost.py and benchmarks/cost.py left."""
    found = json.loads(COST.read_text())
    runs = found["runs"]
    held = [row for row in runs if not row["fitted"]]
    worst = sorted(held, key=lambda row: -abs(row["predicted"] / row["published"] - 1))[:6]
    of_run = lambda row: (row["name"], row["what"], f"{row['published']:.1f}", f"{row['predicted']:.1f}", off(row))  # noqa: E731
    elsewhere = [
        (row["what"], f"{row['published']:,.1f}", f"{row['predicted']:,.1f}", off(row), row["source"])
        for row in found["optimizers"] + found["elsewhere"]
    ]
    cpu = [
        (
            f"{row['layers']} x {row['width']}, {row['heads']} heads, {row['sequence_length']} tokens",
            f"{row['measured'] * 1e3:.0f}", f"{row['predicted'] * 1e3:.0f}",
            f"{row['ratio']:.2f} ({row['smallest']:.2f}-{row['largest']:.2f})", f"{row['spread']:.2f}",
        )
        for row in found.get("cpu", {"sizes": []})["sizes"]
    ]  # fmt: skip
    cards = [
        (
            f"`{name}`", f"{c.bf16 / 1e12:.0f}", f"{c.fp8 / 1e12:.0f}" if c.fp8 else "-", f"{c.reached:.0%}",
            f"{c.bandwidth / 1e12:.2f}", f"{c.memory / 1e9:.0f}", f"{c.link / 1e9:.0f}",
            f"{c.price:g}" if c.price else "-", c.source,
        )
        for name, c in CARDS.items()
    ]  # fmt: skip
    return {
        "cost errors": table(
            ("step times", "number", "median error"),
            [(what, str(e["n"]), f"{e['median']:.1%}") for what, e in found["errors"].items()],
        ),
        "cost worst": table(("run", "what", "published, ms", "predicted, ms", "off by"), map(of_run, worst)),
        "cost runs": table(
            ("run", "what", "published, ms", "predicted, ms", "off by", "fitted"),
            [(*of_run(row), "yes" if row["fitted"] else "") for row in runs],
        ),
        "cost elsewhere": table(("setup", "published, ms", "predicted, ms", "off by", "source"), elsewhere),
        "cost cpu": table(("model", "measured, ms", "predicted, ms", "ratio", "slowest / fastest round"), cpu),
        "cards": table(
            (
                "card", "bf16, TFLOP/s", "fp8", "reached", "memory, TB/s", "GB", "link, GB/s", "$ an hour", "source",
            ),
            cards,
        ),
    }  # fmt: skip


def ladder(name: str) -> dict:
    """scaling.json of an experiment that is kept."""
    return json.loads((KEPT / "scaling" / name / "scaling.json").read_text())


def comparison(name: str) -> dict:
    """comparison.json of a comparison that is kept."""
    return json.loads((KEPT / "comparisons" / name / "comparison.json").read_text())


BASES = {"equal_loss": "at equal loss", "confirmed": "at confirmed lengths"}  # of a comparison's ratio


def saved(*names: str) -> str:
    """What each arm of comparisons that are kept saves, in words: most wall-clock first, its interval, then steps."""
    found: dict[str, list[tuple[float, str]]] = {basis: [] for basis in BASES}
    for kept in map(comparison, names):
        met = {arm["name"] for arm in kept["arms"] if (arm["confirmed"] or {}).get("met")}
        for r in kept["ratios"]:
            for basis in [basis for basis in BASES if r[basis]][:1]:
                steps, time = r[basis]["steps"], r[basis]["train_time"]
                said = f"`{r['arm']}` {ratio_words(time)}, steps {steps['ratio']:.3g}x"
                said += ", no difference shown" * (r["verdict"] == "no difference shown")
                said += ", its target not confirmed" * (r["arm"] not in met)
                found[basis].append((-time["ratio"], said))
    return "; ".join(f"{BASES[basis]} " + "; ".join(said for _, said in sorted(arms)) for basis, arms in found.items() if arms)


def findings() -> list[tuple[str, str, str]]:
    """Question, answer and evidence of what is in records/."""
    chain = records.of_track("cpu", "open")
    product = records.gains(chain)[-1]
    ends = comparison("cpu-ends")
    turns = ends["ratios"][0]["confirmed"]["train_time"]
    reached = all(arm["confirmed"]["met"] for arm in ends["arms"])
    far = "to the target" if reached else "to the end of the runs, the target itself not confirmed"
    stack = comparison("cpu-record")
    met = {arm["name"]: arm["confirmed"]["met"] for arm in stack["arms"]}
    slower = [
        f"`{r['arm'][1:]}` {1 / r['equal_loss']['train_time']['ratio']:.1f}"
        + " (its target not confirmed)" * (not met[r["arm"]])
        for r in stack["ratios"]
        if r["verdict"] == "slower"
    ]
    found = tuned.read_tables(KEPT / "tuning")
    _, contest, _ = tuned.scored(tuned.studies(found))
    best = ", ".join(f"`{row['submission']}` {row['score']:.2f}" for row in contest["submissions"][:5])
    sizes = ladder("h100-modern")
    verdicts: dict[str, list[str]] = {}
    for trick in sizes["tricks"]:
        trend = trick["trends"]["tokens"]
        verdicts.setdefault(trend["verdict"] if trend else "not decided", []).append(f"`{trick['trick'][1:]}`")
    return [
        (
            "How much faster than GPT-2 as published?",
            f"{len(chain) - 1} records on `cpu`, together {product.ratio:.0f}x ({product.low:.0f}-{product.high:.0f}) in "
            f"wall-clock to the target (a product of pairs); record 006 by turns with the baseline {turns['ratio']:.0f}x "
            f"({turns['low']:.0f}-{turns['high']:.0f}) {far}",
            "[records](#records)",
        ),
        (
            "Which tricks of the record earn their place?",
            f"{len(slower)} of {len(stack['ratios'])}; left out, the target takes so many times as long: {', '.join(slower)}"
            + "".join(f"; `{r['arm'][1:]}`: {r['verdict']}" for r in stack["ratios"] if r["verdict"] != "slower"),
            "[leave-one-out](records/comparisons/cpu-record/README.md)",
        ),
        (
            "How much does the optimizer alone save?",
            "wall-clock against AdamW on the `modern` GPT of `cpu`, all with their defaults: "
            f"{saved('cpu-optimizers-defaults', 'cpu-optimizers-schedule-free', 'cpu-optimizers-slow')}",
            "[five](records/comparisons/cpu-optimizers-defaults/README.md), "
            "[Schedule-Free](records/comparisons/cpu-optimizers-schedule-free/README.md) and "
            "[SGD, Lion](records/comparisons/cpu-optimizers-slow/README.md)",
        ),
        (
            "And with tuned settings?",
            "the same, as tuned on `bytes-large` by its first study, AdamW the better for it and SOAP from its old start: "
            f"{saved('cpu-optimizers')}",
            "[tuned](records/comparisons/cpu-optimizers/README.md)",
        ),
        (
            "Whose optimizer, equally tuned?",
            f"AlgoPerf score of {len(contest['submissions'])} submissions on {len(contest['workloads'])} workloads: {best}",
            "[contest](#equal-tuning-and-the-algoperf-score)",
        ),
        (
            "Which tricks survive at larger sizes?",
            f"{sizes['sizes'][0]['size']} to {sizes['sizes'][-1]['size']} parameters, seen from ten times the largest: "
            + "; ".join(f"{', '.join(names)}: {verdict}" for verdict, names in verdicts.items()),
            "[ladder](#a-ladder-of-25k-to-105m-parameters)",
        ),
    ]


def tables() -> dict[str, str]:
    """Marker name -> table of README.md."""
    return {
        "tracks": table(
            ("track", "what", "target, nats per token", "where the target is from"),
            [
                (f"`{n}`", t.summary, f"{t.target_loss:g}" if t.target_loss else "-", t.target_source)
                for n, t in tricks.TRACKS.items()
            ],
        ),
        "recipes": table(
            ("track", "recipe", "tricks"),
            [
                (f"`{track}`", f"`{name}`", ", ".join(f"`{w}`" for w in words) or "none: GPT-2 as published + AdamW")
                for track, t in tricks.TRACKS.items()
                if not t.workload
                for name, words in t.recipes.items()
            ],
        ),
        "tricks": table(
            ("trick", "kind", "source", "what its authors claim", "at other sizes"),
            [(f"`{n}`", t.kind, t.source, t.claim, t.scale or "-") for n, t in tricks.TRICKS.items()],
        ),
        "optimizers": table(
            ("optimizer", "rule", "bytes of state a weight", "step, x AdamW", "source"),
            optimizer_rows(),
        ),
        "findings": table(("question", "answer so far", "evidence"), findings()),
        **{
            marker: table(
                (first, "what it does", "settings and defaults"),
                [(f"`{n}`", first_line(cls), keys(cls)) for n, cls in of.items()],
            )
            for marker, first, of in SETTABLE
        },
        "cpu records": records.history("cpu", "open", "records/"),
        "scaling": survival_report.survival_table(ladder("h100-modern"), "tokens"),
        "scaling corpora": survival_report.corpora_table({"sotu": ladder("cpu-modern"), "wiki": ladder("wiki-modern")}),
        "tuning": tuned.overview(KEPT / "tuning"),
        "corpora": table(
            ("corpus", "what", "source"),
            [(f"`{n}`", c.summary, c.source) for n, c in CORPORA.items()],
        ),
    }


DOCUMENTS = {
    ROOT / "README.md": tables,
    ROOT / "benchmarks" / "README.md": measured_tables,
    ROOT / "records" / "README.md": records.tables,
}


def filled(path: Path) -> str:
    """The document's text with every generated table as the registries and results have it."""
    return markdown.filled(path.read_text(), DOCUMENTS[path](), str(path))


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(filled(path))
        print(f"wrote {path.relative_to(ROOT)}")
