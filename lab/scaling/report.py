"""The report of a scaling experiment in words: verdict lines and the README.md of its folder, from scaling.json's content."""

import statistics
from typing import Any

from lab.comparison import where
from lab.markdown import table
from lab.scaling.ladder import size_words
from lab.scaling.laws import LAW_FIELDS, with_interval

Summary = dict[str, Any]

EXPLAINED = """\
Effective speed-up: tokens with which the base would reach the trick's final loss, over the trick's own; above 1 the trick
saves. Intervals are 95 %. `>` and `<`: the loss lies outside what the base was measured at; that is a bound, and left out of
the trend. *unclear*: it lies outside the base's curve, but not outside its runs. The prediction is the trend's, for {at}
non-embedding parameters. *survives*: its interval is above 1; *reverses*: below 1; *vanishes*: within 5 % of 1; *fades*: surely
shrinking, and no gain is shown at that size; else *not decided*."""

STRAIGHT = """*No power law fits the base*: its budgets scatter about the best one by more than seeds do (F test of lack of fit,
5 %); its mean losses are joined by straight lines in log tokens."""


def verdict_lines(summary: Summary) -> list[str]:
    """One line for each trick: in tokens, and in seconds where these were measured; then one of each turn of short runs whose
    times are not to be compared."""
    lines = []
    for trick in summary["tricks"]:
        tokens, seconds = trick["trends"]["tokens"], trick["trends"]["seconds"]
        if tokens is None:
            lines.append(f"{trick['trick']}: not decided: {trick['why']}")
            continue
        words = f"{trick['trick']}: {tokens['words']}"
        if seconds:
            words += f"; in seconds {seconds['verdict']}, {judged(seconds)}"
        left = [f"{s['size']} ({s['why']})" for s in trick["sizes"] if s["why"]]
        lines.append(words + (f"; left out: {', '.join(left)}" if left else ""))
    return lines + [
        f"short runs of seed {turn['pair']} at {turn['size']} lie {turn['hours']:.1f} hours apart and are left out: the same "
        "command times them again"
        for turn in summary.get("apart", ())
    ]


def judged(trend: dict[str, Any] | None) -> str:
    return with_interval(trend["ratio"], trend["low"], trend["high"]) if trend else "-"


def measured(size: dict[str, Any], cost: str) -> str:
    """A speed-up with its interval, a bound in tokens, or nothing."""
    if cost in size.get("ratios", {}):
        return with_interval(size["ratios"][cost], *size["intervals"][cost])
    return size.get("words", "-") if cost == "tokens" else "-"


def survival_table(summary: Summary, cost: str) -> str:
    """Trick x size, the prediction and the verdict; empty where nothing was measured in that cost."""
    head = ("trick", *(s["size"] for s in summary["sizes"]), f"at {size_words(summary['at'])}", "verdict")
    rows = []
    for trick in summary["tricks"]:
        trend = trick["trends"][cost]
        if trend or cost == "tokens":
            cells = [measured(s, cost) for s in trick["sizes"]]
            rows.append((f"`{trick['trick']}`", *cells, judged(trend), trend["verdict"] if trend else "not decided"))
    return table(head, rows) if rows else ""


def corpora_table(summaries: dict[str, Summary]) -> str:
    """Do verdicts transfer? The tricks that all of several experiments have, a row an experiment; corpus -> summary."""
    shared = [t["trick"] for t in next(iter(summaries.values()))["tricks"]]
    shared = [name for name in shared if all(name in (t["trick"] for t in s["tricks"]) for s in summaries.values())]
    sizes = list(dict.fromkeys(size["size"] for s in summaries.values() for size in s["sizes"]))
    rows = []
    for name in shared:
        for corpus, summary in summaries.items():
            trick = next(t for t in summary["tricks"] if t["trick"] == name)
            cells = {s["size"]: measured(s, "tokens") for s in trick["sizes"]}
            trend = trick["trends"]["tokens"]
            verdict = f"{trend['verdict']} at {size_words(trend['at'])}" if trend else "not decided"
            rows.append((f"`{name}`", corpus, *(cells.get(size, "-") for size in sizes), judged(trend), verdict))
    return table(("trick", "corpus", *sizes, "predicted", "verdict"), rows)


def forms_table(summary: Summary) -> str:
    rows = []
    for trick in summary["tricks"]:
        for s in trick["sizes"]:
            if "words" not in s:
                rows.append((f"`{trick['trick']}`", s["size"], "-", "-", "-", "-", s["why"]))
                continue
            straight = f"{s['between']:.2f}x" if s["between"] is not None else "-"
            other = s["time_to_loss"]["words"] if s["time_to_loss"] else "-"
            note = "; ".join(filter(None, (s["note"], s["why"])))
            rows.append((f"`{trick['trick']}`", s["size"], s["words"], straight, other, measured(s, "flops"), note))
    head = ("trick", "size", "at equal loss", "by straight lines", "time to the base's loss", "in FLOPs", "note")
    return table(head, rows)


def losses_table(summary: Summary) -> str:
    budgets = sorted({p["budget"] for by_size in summary["curves"].values() for of in by_size.values() for p in of["points"]})
    rows = []
    for arm, by_size in summary["curves"].items():
        for size, of in by_size.items():
            at = {p["budget"]: p for p in of["points"]}
            rows.append((f"`{arm}`", size, *(losses_cell(at[b]) if b in at else "" for b in budgets)))
    return table(("arm", "size", *(f"budget {b:g}" for b in budgets)), rows)


def losses_cell(point: dict[str, Any]) -> str:
    losses = point["losses"]
    failed = f"{point['failed']} failed" if point["failed"] else ""
    if not losses:
        return failed
    sd = f" ({statistics.stdev(losses):.4f})" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.4f}{sd}, n = {len(losses)}" + (f", {failed}" if failed else "")


def retune_table(summary: Summary) -> str:
    rows = []
    for arm, by_size in summary["curves"].items():
        for size, of in by_size.items():
            if r := of["retune"]:
                cost = "it diverged" if r["cost"] is None else f"{r['cost']:.4f}"
                rows.append((f"`{arm}`", size, f"{r['best']:.3g}" + (", the edge of the grid" if r["edge"] else ""), cost))
    return table(("arm", "size", "best factor", "cost of not re-tuning, nats"), rows) if rows else ""


def held_out_table(summary: Summary) -> str:
    rows = [
        (f"`{trick['trick']}`", h["size"], judged(h), f"{h['measured']:.2f}x", "yes" if h["hit"] else "no")
        for trick in summary["tricks"]
        for h in trick["held_out"]
    ]
    return table(("trick", "size", "predicted", "measured", "within the interval"), rows) if rows else ""


def laws_table(summary: Summary) -> str:
    rows = [
        (f"`{name}`", *(f"{law[f]:.3g} +- {law['half'][f]:.2g}" for f in LAW_FIELDS), f"{law['rms']:.4f}")
        for name, law in summary["laws"].items()
    ]
    return table(("arm", *(f.replace("_", " ") for f in LAW_FIELDS), "rms"), rows) if rows else ""


def sizes_table(summary: Summary) -> str:
    rows = [
        (s["size"], f"{s['parameters']:,}", f"{s['layers']} x {s['width']}", f"{s['tokens']:,.0f}", f"{s['batch_tokens']:,}")
        for s in summary["sizes"]
    ]
    return table(("size", "non-embedding parameters", "layers x width", "tokens at budget 1", "batch, tokens"), rows)


def markdown(summary: Summary) -> str:
    """README.md of the output folder."""
    sections = [
        ("In seconds", survival_table(summary, "seconds"), ""),
        ("The largest sizes, predicted from the smaller ones", held_out_table(summary), ""),
        ("At equal loss, and to a given loss", forms_table(summary), STRAIGHT),
        ("Final losses, nats per token: mean (sd), n", losses_table(summary), ""),
        ("Learning rate, re-tuned at each size", retune_table(summary), "The best of a few single runs: its cost is "
         "flattered by about the noise of a run."),
        ("Loss against parameters and tokens", laws_table(summary), "L(N, D) = floor + size factor N^-size exponent + "
         "token factor D^-token exponent, N and D in units of their geometric means over the runs."),
        ("Sizes", sizes_table(summary), f"Learning rates go with the width by `{summary['lr_transfer']}`."),
    ]  # fmt: skip
    lines = [
        f"# Do the tricks survive? Ladder `{summary['ladder']}`, base `{summary['base']}`",
        "",
        f"`./run.sh scaling {summary['command']}`",
        "",
        survival_table(summary, "tokens"),
        "",
        EXPLAINED.format(at=size_words(summary["at"])),
        "",
        *(f"- {line}" for line in verdict_lines(summary)),
        "",
        *(f"![{name}]({name}.png)" for name in summary["plots"]),
        "",
    ]
    for title, body, note in sections:
        if body:
            lines += [f"## {title}", "", body, "", *([note, ""] if note else [])]
    lines.append(where(summary))
    return "\n".join(lines) + "\n"
