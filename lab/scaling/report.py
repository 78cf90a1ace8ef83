"""The report of a scaling experiment in words: verdict lines and the README.md of its folder, from scaling.json's content."""

import statistics
from typing import Any

from lab.comparison import where
from lab.markdown import table
from lab.scaling.ladder import size_words
from lab.scaling.trend import with_interval

Summary = dict[str, Any]
OF_FEW = "The best of a few single runs: the cost is too high by about the noise of a run."
SHORT = 1000  # steps: runs at budget 1 that are shorter show the beginning of training alone

EXPLAINED = """\
Speed-up = tokens that the base needs for the same loss / tokens that the trick used; above 1 the trick saves. We measure it at
each size, fit a line and extend it to {at} non-embedding parameters. Intervals are 95 %. `>` and `<`: the loss lies outside the
range that the base was measured in, so there is only a bound. *unclear*: it lies outside the base's curve, but the base's own
runs contradict that. The line leaves both out.

*survives*: the predicted interval is above 1; *reverses*: below 1; *vanishes*: within 5 % of 1; *fades*: the gain surely
shrinks with size and is not shown at the predicted size; else *not decided*."""


def verdict_lines(summary: Summary) -> list[str]:
    """A line for each trick, then one for each turn of short runs whose times do not compare."""
    lines = []
    for trick in summary["tricks"]:
        tokens, seconds = trick["trends"]["tokens"], trick["trends"]["seconds"]
        words = f"{trick['trick']}: " + (tokens["words"] if tokens else f"not decided: {trick['why']}")
        words += f"; in seconds {seconds['verdict']}, {predicted(seconds)}" if seconds else ""
        left = ", ".join(f"{s['size']} ({s['why']})" for s in trick["sizes"] if s["why"])
        lines.append(f"{words}; left out: {left}" if tokens and left else words)
    why = "hours apart and are left out: the same command times them again"
    return lines + [f"short runs of seed {t['pair']} at {t['size']} lie {t['hours']:.1f} {why}" for t in summary["apart"]]


def predicted(trend: dict[str, Any] | None) -> str:
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
            rows.append((f"`{trick['trick']}`", *cells, predicted(trend), trend["verdict"] if trend else "not decided"))
    return table(head, rows) if rows else ""


def measurements(summary: Summary) -> list[tuple[str, str, Summary]]:
    """(arm, size, what was measured there), in the order of the tables."""
    return [(f"`{arm}`", size, of) for arm, by_size in summary["curves"].items() for size, of in by_size.items()]


def losses_table(summary: Summary) -> str:
    budgets = sorted({point["budget"] for *_, of in measurements(summary) for point in of["points"]})
    rows = []
    for arm, size, of in measurements(summary):
        cells = dict.fromkeys(budgets, "")
        for point in of["points"]:
            losses, failed = point["losses"], point["failed"]
            sd = f" ({statistics.stdev(losses):.4f})" if len(losses) > 1 else ""
            words = [f"{statistics.mean(losses):.4f}{sd}, n = {len(losses)}"] if losses else []
            cells[point["budget"]] = ", ".join(words + ([f"{failed} failed"] if failed else []))
        rows.append((arm, size, *cells.values()))
    return table(("arm", "size", *(f"budget {budget:g}" for budget in budgets)), rows)


def retune_table(summary: Summary) -> str:
    rows = []
    for arm, size, of in measurements(summary):
        if r := of["retune"]:
            cost = "it diverged" if r["cost"] is None else f"{r['cost']:.4f}"
            rows.append((arm, size, f"{r['best']:.3g}" + (", the edge of the grid" if r["edge"] else ""), cost))
    return table(("arm", "size", "best factor", "cost of not re-tuning, nats"), rows) if rows else ""


def held_out_table(summary: Summary) -> str:
    checks = [(f"`{trick['trick']}`", h) for trick in summary["tricks"] for h in trick["held_out"]]
    rows = [(name, h["size"], predicted(h), f"{h['measured']:.2f}x", "yes" if h["hit"] else "no") for name, h in checks]
    return table(("trick", "size", "predicted", "measured", "within the interval"), rows) if rows else ""


def sizes_table(summary: Summary) -> str:
    rows = [
        (s["size"], f"{s['parameters']:,}", f"{s['layers']} x {s['width']}", f"{s['tokens']:,.0f}", f"{s['batch_tokens']:,}")
        for s in summary["sizes"]
    ]
    return table(("size", "non-embedding parameters", "layers x width", "tokens at budget 1", "batch, tokens"), rows)


def straight(summary: Summary) -> str:
    """At which sizes the base's curve is straight lines, and why."""
    bent = {s["size"] for trick in summary["tricks"] for s in trick["sizes"] if "amounts" in s.get("curve", ())}
    names = ", ".join(s["size"] for s in summary["sizes"] if s["size"] in bent)
    why = f"No power law fits the base at {names}: its mean losses scatter about the best one by more than seeds do\n"
    return names and why + "(F test of lack of fit, 5 %), so straight lines in log tokens join them."


def markdown(summary: Summary) -> str:
    """README.md of the output folder."""
    ratios = [s["ratios"] for trick in summary["tricks"] for s in trick["sizes"] if "ratios" in s]
    dearer = any(abs(r["flops"] / r["tokens"] - 1) > 0.005 for r in ratios)  # is a token of some trick?
    steps = [cell["steps"] for cell in summary["cells"] if (cell["phase"], cell["budget"]) == ("curve", 1)]
    sections = {
        "In seconds": (survival_table(summary, "seconds"), ""),
        "In FLOPs": (survival_table(summary, "flops") if dearer else "", ""),
        "The largest sizes, predicted from the smaller ones": (held_out_table(summary), ""),
        "Final losses, nats per token: mean (sd), n": (losses_table(summary), straight(summary)),
        "Learning rate, re-tuned at each size": (retune_table(summary), OF_FEW),
        "Sizes": (sizes_table(summary), f"Learning rates go with the width by `{summary['lr_transfer']}`."),
    }
    lines = [f"# Do the tricks survive? Ladder `{summary['ladder']}`, base `{summary['base']}`", ""]
    lines += [f"`./run.sh scaling {summary['command']}`", "", survival_table(summary, "tokens"), ""]
    lines += [EXPLAINED.format(at=size_words(summary["at"])), ""]
    if max(steps, default=SHORT) < SHORT:
        lines += [f"**Runs are short ({min(steps)}-{max(steps)} steps at budget 1): trust only the sign.**", ""]
    lines += [*(f"- {line}" for line in verdict_lines(summary)), ""]
    lines += [*(f"![{name}]({name}.png)" for name in summary["plots"]), ""]
    for title, (body, note) in sections.items():
        if body:
            lines += [f"## {title}", "", body, "", *([note, ""] if note else [])]
    lines.append(where(summary))
    return "\n".join(lines) + "\n"
