"""Pictures of comparisons and records, by matplotlib: each as PNG to look at and SVG to print."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spec import UsageError


def pyplot():
    """matplotlib's, drawing to files.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("plots need matplotlib: .venv/bin/pip install -r lab/requirements.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, folder: Path, name: str) -> str:
    # a fixed salt and no date: the same data gives the same file
    figure.savefig(folder / f"{name}.png", dpi=110)
    with pyplot().rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot().close(figure)
    return name


def draw_comparison(folder: Path, summary: dict[str, Any], curves: list[dict[str, Any]]) -> list[str]:
    """All pictures for which there is something to draw; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    names = [arm["name"] for arm in summary["arms"]]
    shown = [c for c in curves if c["phase"] == "confirm" and c["arm"] in names]
    if shown:
        drawn.append(loss_curves(folder, names, shown, summary["target"]))
    judged = [r for r in summary["ratios"] if r["confirmed"] or r["equal_loss"]]
    if judged:
        drawn.append(forest(folder, judged))
    if summary["mode"] in ("chain", "leave_out") and sum(1 for arm in summary["arms"] if time_of(arm)) > 1:
        drawn.append(waterfall(folder, summary))
    return drawn


def short(name: str) -> str:
    """An arm's name as a label: of a long list of tricks its first, its last and how many there are."""
    words = name.split(",")
    return name if len(name) <= 30 else f"{words[0]}...{words[-1]} ({len(words)} tricks)"


def loss_curves(folder: Path, names: Sequence[str], curves: list[dict[str, Any]], target: float) -> str:
    """Loss against seconds and against tokens: the mean over seeds of the confirming runs, and the band they span."""
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 5), constrained_layout=True, sharey=True)
    for i, name in enumerate(names):
        by_step = defaultdict(list)
        for c in curves:
            if c["arm"] == name and c["kind"] == "train":
                by_step[c["step"]].append(c)
        if not by_step:
            continue
        points = [by_step[step] for step in sorted(by_step)]
        loss = [[c["loss"] for c in p] for p in points]
        mean, low, high = (np.array([f(x) for x in loss]) for f in (np.mean, min, max))
        ends = [c for c in curves if c["arm"] == name and c["kind"] == "val" and c["step"] == max(by_step)]
        for axis, key in zip(axes, ("train_time", "tokens"), strict=True):
            x = np.array([np.mean([c[key] for c in p]) for p in points])
            axis.plot(x, mean, color=f"C{i % 10}", label=short(name), linewidth=1.2)
            axis.fill_between(x, low, high, color=f"C{i % 10}", alpha=0.25, linewidth=0)
            axis.plot([c[key] for c in ends], [c["loss"] for c in ends], "o", color=f"C{i % 10}", markersize=4)
    top = np.quantile([c["loss"] for c in curves if c["kind"] == "train"], 0.97)
    lowest = min(target, *(c["loss"] for c in curves))
    for axis, words in zip(axes, ("training time, s", "tokens"), strict=True):
        axis.axhline(target, color="0.4", linestyle=":", linewidth=1)
        axis.set(xlabel=words, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set(
        ylabel="loss, nats per token (lines: training; dots: final validation)", ylim=(lowest - 0.05 * (top - lowest), top)
    )
    axes[1].legend(fontsize=8)
    return save(figure, folder, "loss")


def forest(folder: Path, ratios: list[dict[str, Any]]) -> str:
    """Speed-up ratios with their intervals: wall-clock and steps."""
    figure, axis = pyplot().subplots(figsize=(9, 1.4 + 0.55 * len(ratios)), constrained_layout=True)
    ticks = []
    for row, ratio in enumerate(reversed(ratios)):
        measured = ratio["equal_loss"] or ratio["confirmed"]
        for cost, shift, colour in (("train_time", 0.13, "C0"), ("steps", -0.13, "C1")):
            r = measured[cost]
            error = [[r["ratio"] - r["low"]], [min(r["high"], 1e3 * r["ratio"]) - r["ratio"]]]
            axis.errorbar(r["ratio"], row + shift, xerr=error, fmt="o", color=colour, capsize=3, markersize=5)
        axis.annotate(ratio["verdict"], (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        ticks.append(f"{short(ratio['arm'])} / {short(ratio['base'])}")
    axis.axvline(1, color="0.4", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(ticks)), ticks)
    axis.set(xscale="log", xlabel="base / arm, 95 % interval: right of 1 the arm saves", ylim=(-0.6, len(ticks) - 0.4))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.plot([], [], "o", color="C0", label="wall-clock")
    axis.plot([], [], "o", color="C1", label="steps")
    axis.legend(fontsize=8, loc="lower right")
    return save(figure, folder, "forest")


def time_of(arm: dict[str, Any]) -> float | None:
    """Seconds to the target: at the horizon where there is one, else as confirmed."""
    claim = arm["confirmed"]
    if not claim or "costs" not in claim:
        return None
    steps = arm["horizon"]["steps"] if arm["horizon"] else claim["steps"]
    return claim["costs"]["train_time"] / claim["steps"] * steps


def waterfall(folder: Path, summary: dict[str, Any]) -> str:
    """Seconds to the target: of a chain, what each trick takes away; of a stack, what leaving a trick out adds."""
    timed = [(arm["name"], seconds) for arm in summary["arms"] if (seconds := time_of(arm))]
    figure, axis = pyplot().subplots(figsize=(max(6, 1.1 * len(timed) + 2), 5), constrained_layout=True)
    first = timed[0][1]
    axis.bar(0, first, color="0.6")
    before = first
    for i, (_, seconds) in enumerate(timed[1:], start=1):
        start = before if summary["mode"] == "chain" else first
        axis.bar(i, seconds - start, bottom=start, color="C2" if seconds < start else "C3")
        axis.plot([i - 1.4, i + 0.4], [start, start], color="0.4", linewidth=0.8)
        axis.annotate(f"{start / seconds:.2f}x", (i, max(seconds, start)), ha="center", va="bottom", fontsize=8)
        before = seconds
    axis.annotate(f"{first:,.3g} s", (0, first), ha="center", va="bottom", fontsize=8)
    if summary["mode"] == "chain":
        axis.bar(len(timed), before, color="0.6")
        axis.annotate(f"{before:,.3g} s", (len(timed), before), ha="center", va="bottom", fontsize=8)
    labels = [short(name) for name, _ in timed] + (["all"] if summary["mode"] == "chain" else [])
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    if first / min(s for _, s in timed) > 5 or max(s for _, s in timed) / first > 5:
        axis.set_yscale("log")
        axis.set_ylim(bottom=10 ** math.floor(math.log10(min(s for _, s in timed)) - 0.3))
    axis.set(ylabel="seconds to the target")
    axis.margins(y=0.08)
    axis.grid(axis="y", alpha=0.3)
    return save(figure, folder, "waterfall")


def history(folder: Path, track: str, about: list[dict[str, Any]], gained: list[float]) -> str:
    """Seconds to the target of every record of a track, by number: bar of the mean, whisker of the standard deviation;
    above it `gained`, baseline over this record as the table has it: seconds of two machines are no ratio."""
    figure, axis = pyplot().subplots(figsize=(max(6, 0.8 * len(about) + 2), 5), constrained_layout=True)
    seconds = [a["statistics"]["train_time"] for a in about]
    spread = [a["statistics"]["train_time_sd"] for a in about]
    axis.bar(range(len(about)), seconds, yerr=spread, color=["0.6"] + ["C0"] * (len(about) - 1), capsize=3)
    for i, value in enumerate(seconds):
        axis.annotate(
            f"{value:,.3g} s\n{gained[i]:.3g}x", (i, (value + spread[i]) * 1.03), ha="center", va="bottom", fontsize=8
        )
    axis.set_xticks(range(len(about)), [f"{a['number']:03d} {a['name']}" for a in about], rotation=35, ha="right", fontsize=8)
    axis.set(
        yscale="log", ylabel="training time to the target, s", title=f"{track} track", ylim=(min(seconds) / 2, max(seconds) * 2)
    )
    axis.grid(axis="y", alpha=0.3)
    return save(figure, folder, f"history-{track}")
