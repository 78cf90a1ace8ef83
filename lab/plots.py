"""Pictures of runs, comparisons, records and scaling experiments: PNG, by matplotlib.

python -m lab.plots runs/tiny/*          loss against time of finished or running runs: loss.png (./run.sh plot)
"""

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.command import Parser, command
from engine.run_folder import atomic_write, intact
from engine.spec import UsageError
from lab.stats import Ratio
from lab.trials import whole_lines


def pyplot():
    """matplotlib's, drawing to files; imported when something is drawn, since that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def data_hash(name: str, data: Any) -> str:
    """Of what a picture of that name is drawn from, any JSON."""
    return hashlib.sha256(json.dumps([name, data], sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(picture: Path) -> str:
    """The data_hash that `save` wrote into a PNG; empty: none, or half a PNG. It lies in a chunk of text, beside the pixels."""
    content = picture.read_bytes()
    whole = content[:6] + content[-8:] == b"\x89PNG\r\nIEND\xaeB`\x82"
    found = re.search(rb"tEXtData\0([0-9a-f]{16})", content * whole)
    return found[1].decode() if found else ""


def save(figure, folder: Path, name: str, data: Any = None) -> str:
    """data: what the picture is drawn from, so that anyone can see later whether it still shows that."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, metadata={"Data": data_hash(name, data)})
    atomic_write(folder / f"{name}.png", picture.getvalue())
    pyplot().close(figure)
    return name


Curve = tuple[np.ndarray, np.ndarray, float]  # minutes, training loss, last validation loss


def curve(loss: Sequence[Sequence[float]], step_times: Sequence[Sequence[float]], ends: Sequence[float]) -> Curve:
    """The mean over runs of one recipe, up to twenty steps a point: training losses and seconds [runs, steps]."""
    size = max(1, min(20, len(loss[0]) // 30))
    steps = len(loss[0]) // size * size
    minutes = np.mean(np.cumsum(step_times, axis=1), axis=0)[size - 1 : steps : size] / 60
    return minutes, np.mean(loss, axis=0)[:steps].reshape(-1, size).mean(1), float(np.mean(ends))


def of_run(folder: Path) -> Curve:
    """Of a run that has ended or not. Raises UsageError: the folder holds no log of a step."""
    log = folder / "log.jsonl"
    with intact(log):
        events = [json.loads(line) for line in whole_lines(log).splitlines()]
        steps, vals = ([e for e in events if e["event"] == kind] for kind in ("train", "val"))
        if not steps:
            raise UsageError(f"{folder} holds no log of a step: name run folders, such as runs/tiny/*")
        ends = [math.nan, *(e["loss"] for e in vals if e["loss"] is not None)]
        return curve([[float(e["loss"]) for e in steps]], [[float(e["step_time"]) for e in steps]], ends[-1:])


def losses(path: Path, curves: dict[str, Curve], target: float | None) -> None:
    """Loss against minutes of training, by label."""
    figure, axis = pyplot().subplots(figsize=(7, 3.6), constrained_layout=True)
    for label, (minutes, loss, end) in curves.items():
        (line,) = axis.plot(minutes, loss, label=label, linewidth=1.2)
        axis.plot(minutes[-1], end, "o", color=line.get_color(), markersize=5)
    lowest = min(float(loss.min()) for _, loss, _ in curves.values())
    if target:
        axis.axhline(target, color="0.4", linestyle=":", linewidth=1, label=f"target {target:g} (dots: validation at the end)")
        lowest = min(lowest, target)
    axis.set(xlabel="training time, minutes", ylabel="loss, nats per token", ylim=(0.9 * lowest, 2.3 * lowest), xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path.parent, path.stem)


def draw_comparison(folder: Path, summary: dict[str, Any], curves: list[dict[str, Any]]) -> list[str]:
    """All pictures for which there is something to draw; returns their names."""
    drawn, data = [], [without_plots(summary), curves]
    steps = {arm["name"]: arm["steps"] for arm in summary["arms"]}  # of the confirming runs; earlier plans' are left out
    if shown := [c for c in curves if c["phase"] == "confirm" and c["steps"] == steps.get(c["arm"])]:
        drawn.append(save(loss_curves(list(steps), shown, summary["target"]), folder, "loss", data))
    if judged := [r for r in summary["ratios"] if r["confirmed"] or r["equal_loss"]]:
        drawn.append(save(forest(judged), folder, "forest", data))
    return drawn


def without_plots(summary: dict[str, Any]) -> dict[str, Any]:
    """As it was when the pictures were drawn."""
    return {key: value for key, value in summary.items() if key != "plots"}


def panels(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and so many axes of that size in inches, at most `columns` in a row, their loss axis shared."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(6, width * columns), height * rows + 0.4)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def short(name: str) -> str:
    """An arm's name as a label: of a long list of tricks its first, its last and how many there are."""
    words = name.replace("$", r"\$").split(",")  # no formula
    return ",".join(words) if len(name) <= 30 else f"{words[0]}...{words[-1]} ({len(words)} tricks)"


def log_ticks(axis, low: float, high: float, most: int = 8) -> None:
    """About `most` ticks at most, plain numbers: decades and, with room, what lies between; within a factor of 5 even steps."""
    if high / low < 5:
        ticks = pyplot().MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
        of = next(of for of in digits if len(of) * math.log10(high / low) <= most or of == (1,))
        ticks = [digit * 10.0**decade for decade in decades[:: -(-len(decades) // most) if of == (1,) else 1] for digit in of]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def loss_curves(names: Sequence[str], curves: list[dict[str, Any]], target: float) -> Any:
    """Loss against seconds and against tokens: the mean over seeds of the confirming runs, and the band they span."""
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 5), constrained_layout=True, sharey=True)
    for i, name in enumerate(names):
        train, vals = ([c for c in curves if (c["arm"], c["kind"]) == (name, kind)] for kind in ("train", "val"))
        steps, colour = sorted({c["step"] for c in train}), f"C{i % 10}"
        points = [[c for c in train if c["step"] == step] for step in steps]
        ends = [c for c in vals if c["step"] in steps[-1:]]
        mean, low, high = ([f([c["loss"] for c in p]) for p in points] for f in (np.mean, min, max))
        for axis, key in zip(axes, ("train_time", "tokens") if train else ()):
            x = [np.mean([c[key] for c in p]) for p in points]
            axis.plot(x, mean, color=colour, label=short(name), linewidth=1.2)
            axis.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.plot([c[key] for c in ends], [c["loss"] for c in ends], "o", color=colour, markersize=4)
    top = np.quantile([c["loss"] for c in curves if c["kind"] == "train"], 0.97)
    lowest = min(target, *(c["loss"] for c in curves))
    for axis, words in zip(axes, ("training time, s", "tokens"), strict=True):
        axis.axhline(target, color="0.4", linestyle=":", linewidth=1)
        axis.set(xlabel=words, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set(ylim=(lowest - 0.05 * (top - lowest), top))
    axes[0].set_ylabel("loss, nats per token (lines: training; dots: final validation)")
    axes[1].legend(fontsize=8)
    return figure


def forest(ratios: list[dict[str, Any]]) -> Any:
    """Speed-up ratios with their intervals: wall-clock and steps."""
    figure, axis = pyplot().subplots(figsize=(9, 1.4 + 0.55 * len(ratios)), constrained_layout=True)
    ticks = [f"{short(ratio['arm'])} / {short(ratio['base'])}" for ratio in reversed(ratios)]
    for row, ratio in enumerate(reversed(ratios)):
        measured = ratio["equal_loss"] or ratio["confirmed"]
        for cost, shift, colour, words in (("train_time", 0.13, "C0", "wall-clock"), ("steps", -0.13, "C1", "steps")):
            r, how = measured[cost], dict(fmt="o", color=colour, capsize=3, markersize=5, label=words if row == 0 else None)
            error = [[r["ratio"] - r["low"]], [min(r["high"], 1e3 * r["ratio"]) - r["ratio"]]]
            axis.errorbar(r["ratio"], row + shift, xerr=error, **how)
        axis.annotate(ratio["verdict"], (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axis.axvline(1, color="0.4", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(ticks)), ticks)
    axis.set(xscale="log", xlabel="base / arm, 95 % interval: right of 1 the arm saves", ylim=(-0.6, len(ticks) - 0.4))
    log_ticks(axis.xaxis, *axis.get_xlim())
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)  # above: anywhere else are points
    return figure


def history_data(about: list[dict[str, Any]], gained: list[Ratio]) -> list[list[Any]]:
    """What `history` shows."""
    shown = []
    for a, g in zip(about, gained, strict=True):
        figures = (a["statistics"]["train_time"], g.ratio, g.low, g.high)
        shown.append([a["number"], a["name"], a["kind"], *(f"{x:.4g}" for x in figures)])
    return shown


def history(folder: Path, track: str, about: list[dict[str, Any]], gained: list[Ratio]) -> str:
    """How much faster than its category's baseline (grey) each record is: bars of `gained`, 95 % intervals, seconds above."""
    figure, axis = pyplot().subplots(figsize=(max(6, 0.8 * len(about) + 2), 5), constrained_layout=True)
    errors = [[g.ratio - g.low for g in gained], [g.high - g.ratio for g in gained]]
    colours = ["0.6" if a["kind"] == "baseline" else "C0" for a in about]
    axis.bar(range(len(about)), [g.ratio for g in gained], yerr=errors, color=colours, capsize=3)
    for i, (a, g) in enumerate(zip(about, gained, strict=True)):
        words = f"{g.ratio:.3g}x\n{a['statistics']['train_time']:,.3g} s"
        axis.annotate(words, (i, g.high * 1.03), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(about)), [f"{a['number']:03d} {a['name']}" for a in about], rotation=35, ha="right", fontsize=8)
    top = 2 * max(g.high for g in gained)
    axis.set(yscale="log", ylabel="baseline / record, time to the target", title=f"{track} track", ylim=(0.7, top))
    log_ticks(axis.yaxis, 0.7, top)
    axis.grid(axis="y", alpha=0.3)
    return save(figure, folder, f"history-{track}", history_data(about, gained))


def draw_scaling(folder: Path, summary: dict[str, Any]) -> list[str]:
    """All pictures of a scaling experiment for which there is something to draw; returns their names."""
    drawn, data = [], without_plots(summary)
    if any("words" in s for trick in summary["tricks"] for s in trick["sizes"]):
        drawn.append(save(survival(summary), folder, "survival", data))
    if any(of["points"] for of in summary["curves"][summary["base"]].values()):
        drawn.append(save(size_curves(summary), folder, "sizes", data))
    return drawn


def survival(summary: dict[str, Any]) -> Any:
    """Speed-up in tokens against size, a panel a trick: measured, bounds, the trend's line and its prediction."""
    figure, axes = panels(len(summary["tricks"]), 4, 3.6, 3.3)
    drawn = [1.0]
    for axis, trick in zip(axes, summary["tricks"], strict=True):
        drawn += survival_panel(axis, trick, summary["at"])
    low, high = min(drawn) / 1.25, max(drawn) * 1.25
    axes[0].set_ylim(low, high)
    log_ticks(axes[0].yaxis, low, high, most=10)
    for axis in axes:
        axis.set_xlim(summary["sizes"][0]["parameters"] / 2, max(summary["at"], summary["sizes"][-1]["parameters"]) * 2)
    about = "diamond: prediction; arrowhead: the interval goes on; triangle: a bound; ?: no figure"
    figure.supxlabel(f"non-embedding parameters\n{about}", fontsize=9)
    figure.supylabel("base's tokens / trick's, equal loss", fontsize=9)
    return figure


def survival_panel(axis, trick: dict[str, Any], at: float) -> list[float]:
    """The ends of all that was drawn."""
    trend, drawn = trick["trends"]["tokens"], []
    axis.set(xscale="log", yscale="log")
    points = [(s["parameters"], s["ratios"]["tokens"], *s["intervals"]["tokens"]) for s in trick["sizes"] if "ratios" in s]
    if trend:
        first, last = points[0][0], points[-1][0]
        for ends, style in ((np.array([first, last]), "-"), (np.array([last, at]), "--")):
            axis.plot(ends, trend["ratio"] * (ends / at) ** trend["slope"], style, color="C0", linewidth=1)
        points.append((at, trend["ratio"], trend["low"], trend["high"]))
    for n, ratio, low, high in points:
        colour, marker = ("C1", "D") if n == at else ("C0", "o")
        for end, limit, arrowhead in ((low, ratio / 10, 7), (high, ratio * 10, 6)):  # 6, 7: matplotlib's
            shown = limit if end is None else min(max(end, ratio / 10), ratio * 10)
            axis.plot([n, n], [ratio, shown], color=colour, linewidth=1.4)
            axis.plot(n, shown, marker="_" if shown == end else arrowhead, color=colour, markersize=7)
            drawn.append(shown)
        axis.plot(n, ratio, marker, color=colour, markersize=5)
    for s in (size for size in trick["sizes"] if "ratios" not in size):
        if s.get("words", "-")[0] in "<>":
            bound, marker = (s["low"], "^") if s["low"] else (s["high"], "v")
            axis.plot(s["parameters"], bound, marker, color="C0", markerfacecolor="none")
            drawn.append(bound)
        else:
            axis.annotate("?", (s["parameters"], 0.03), xycoords=("data", "axes fraction"), ha="center", color="0.4")
    axis.axhline(1, color="0.4", linestyle=":", linewidth=1)
    axis.set_title(f"{short(trick['trick'])}: {trend['verdict'] if trend else 'not decided'}", fontsize=10)
    axis.grid(alpha=0.3)
    return drawn


def size_curves(summary: dict[str, Any]) -> Any:
    """Final loss against tokens, a panel a trick: the base's runs and the curve through them by size, the trick's crosses."""
    figure, axes = panels(len(summary["tricks"]), 4, 3.6, 3.3)
    colours = pyplot().get_cmap("viridis")(np.linspace(0, 0.9, len(summary["sizes"])))
    for axis, trick in zip(axes, summary["tricks"], strict=True):
        for size, colour in zip(trick["sizes"], colours, strict=True):
            for arm, marker in ((summary["base"], "o"), (trick["trick"], "x")):
                points = summary["curves"][arm][size["size"]]["points"]
                x = [p["tokens"] for p in points for _ in p["losses"]]
                axis.plot(x, [loss for p in points for loss in p["losses"]], marker, color=colour, markersize=4)
            if curve := size.get("curve"):
                if "amounts" in curve:  # straight lines
                    x, y = curve["amounts"], curve["losses"]
                else:
                    x = np.geomspace(curve["least"], curve["most"], 50)
                    y = curve["alpha"] * x ** -curve["exponent"] + curve["floor"]
                axis.plot(x, y, color=colour, linewidth=1, label=size["size"])
        axis.set(xscale="log")
        axis.set_title(short(trick["trick"]), fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, title="size", title_fontsize=7)
    figure.supxlabel("tokens of the run (dots, line: base; crosses: trick)", fontsize=9)
    figure.supylabel("final validation loss, nats per token", fontsize=9)
    return figure


def draw(argv: list[str]) -> str:
    parser = Parser(prog="./run.sh plot", description="Draw loss against training time of runs, finished or not.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, such as runs/tiny/*")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="picture to write (default: loss.png)")
    options = parser.parse_args(argv)
    losses(options.out, {folder.name: of_run(folder) for folder in options.runs}, None)
    return f"wrote {options.out.with_suffix('.png')}"


if __name__ == "__main__":
    sys.exit(command("plot", lambda: draw(sys.argv[1:]), sys.argv))
