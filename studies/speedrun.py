"""The NanoGPT speedrun went from 45 minutes to under 3, then below 1.5, one trick after another.

Records of modded-nanogpt, about every second one, read from its logs: minutes to a validation loss of 3.28 on FineWeb, GPT-2
124M, eight H100 GPUs. The first has no time in its log: 140 ms a step times 19,560 steps. Beside it are this project's records
on two CPU cores (track `cpu`: bytes, 3.3M parameters), with another target and clock: compare only the direction.

Source: modded-nanogpt (github.com/KellerJordan/modded-nanogpt); records/published/modded_records.csv; records/cpu.
"""

import csv
import json
from datetime import date
from itertools import pairwise

from studies import common

MINUTES = 0.1
SLIDE = 7
HISTORY = common.ROOT / "records" / "published" / "modded_records.csv"
OURS = {"GPT-2, AdamW": "001-baseline", "modern GPT, AdamW": "009-adamw", "modern GPT, Muon": "010-muon"}
NAMED = {  # what stands beside a point: from the description
    "T1-01": "llm.c baseline", "T1-04": "Muon", "T1-08": "untied head", "T1-10": "bf16", "T1-12": "FlexAttention, 64K tokens",
    "T1-20": "merged QKV, batched Muon", "T1-46": "growing batch", "T1-62": "bigram embedding",
    "T1-87": "faster ReLU^2",
}  # fmt: skip


def seconds(row: dict[str, str]) -> float:
    """Of training; where the log has no time, steps times the stated milliseconds a step."""
    return float(row["train_time_s"] or float(row["steps"]) * float(row["step_avg_ms"]) / 1000)


def run(seed: int = 0, quick: bool = False) -> dict:
    """No seed, and quick in any case: published history."""
    with HISTORY.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["record"].startswith("T1-")]
    ours = {}
    for name, folder in OURS.items():
        statistics = json.loads((common.ROOT / "records" / "cpu" / folder / "record.json").read_text())["statistics"]
        ours[name] = {key: statistics[key] for key in ("n", "train_time", "train_time_sd")}
    records = [
        {"record": row["record"], "date": row["date"], "what": row["description"], "seconds": seconds(row)} for row in rows
    ]
    return common.rounded({"records": records, "ours": ours}, 7)


def verdict(figures: dict) -> tuple[bool, str]:
    minutes = [row["seconds"] / 60 for row in figures["records"]]
    dates = [row["date"] for row in figures["records"]]
    under = next((day for day, m in zip(dates, minutes) if m < 3), None)
    best = min(range(len(minutes)), key=minutes.__getitem__)
    faster = sum(after < before for before, after in pairwise(minutes))
    first, *_, last = figures["ours"].values()
    return 44 < minutes[0] < 47 and under is not None and minutes[best] < 1.5, (
        f"{minutes[0]:.1f} minutes on {dates[0]}, under 3 on {under}, {minutes[best]:.2f} on {dates[best]}: {len(minutes)}"
        f" records, {faster} of {len(minutes) - 1} steps between them faster in one logged run; ours:"
        f" {first['train_time']:.0f} s (n = {first['n']}) to {last['train_time']:.0f} s (n = {last['n']}) on two cores"
    )


def draw(figures: dict):
    figure, (left, right) = common.axes(2, width=15, height=6.5, width_ratios=(2.4, 1))
    rows = figures["records"]
    days, minutes = [date.fromisoformat(row["date"]) for row in rows], [row["seconds"] / 60 for row in rows]
    left.semilogy(days, minutes, "o-", color=common.BLUE, markersize=5)
    for day, value, row in zip(days, minutes, rows):
        if row["record"] in NAMED:
            left.annotate(f"{NAMED[row['record']]}, {value:.3g}", (day, value), xytext=(8, 8), textcoords="offset points",
                          fontsize=12, annotation_clip=False)  # fmt: skip
    left.set(title="modded-nanogpt: minutes to 3.28 on 8 H100", yticks=(1, 2, 5, 10, 20, 45), ylim=(1, 70))
    left.set_yticks([], minor=True)
    left.set_yticklabels(["1", "2", "5", "10", "20", "45"])
    left.set_xticks([date(2024, 7, 1), date(2025, 1, 1), date(2025, 7, 1), date(2026, 1, 1), date(2026, 7, 1)])
    left.set_xticklabels(["7/2024", "1/2025", "7/2025", "1/2026", "7/2026"])
    ours = figures["ours"]
    times = [of["train_time"] / 60 for of in ours.values()]
    right.bar(range(len(ours)), times, yerr=[of["train_time_sd"] / 60 for of in ours.values()], color=common.ORANGE, capsize=6)
    right.set_xticks(range(len(ours)), [name.replace(", ", "\n") for name in ours], fontsize=12)
    right.set(title="Ours: minutes, 2 CPU cores")
    for i, (value, of) in enumerate(zip(times, ours.values())):
        right.text(i, value + of["train_time_sd"] / 60 + 0.1, f"{value:.1f}", ha="center")
    return figure
