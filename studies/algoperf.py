"""Eleven submissions scored by performance profiles: Shampoo first, Schedule-Free AdamW second.

r = time of a submission on a workload / best time of all; rho(tau) = share of the workloads with r <= tau; score = mean of
rho over tau from 1 to 4. The published times of AlgoPerf's first round (external tuning, 8 workloads with 6 held-out variants)
go through this project's own scorer, lab/tuning/score.py, which `./run.sh compare score` uses.

Source: Dahl et al. 2023 (arXiv 2306.07179); Kasimbeg et al. 2025 (arXiv 2502.15015); times in records/published.
"""

import csv

import numpy as np

from lab.tuning import score
from studies import common

MINUTES = 0.1
SLIDE = 6
TIMES = common.ROOT / "records" / "published" / "algoperf_external.csv"
HELD_OUT = {
    "criteo1tb_embed_init": "criteo1tb", "fastmri_tanh": "fastmri", "imagenet_resnet_large_bn_init": "imagenet_resnet",
    "librispeech_conformer_layernorm": "librispeech_conformer", "ogbg_model_size": "ogbg", "wmt_glu_tanh": "wmt",
}  # fmt: skip


def run(seed: int = 0, quick: bool = False) -> dict:
    """No seed, and quick in any case: nothing is drawn by chance."""
    with TIMES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    workloads = [c for c in rows[0] if c not in ("ruleset", "submission", "published_score", "recomputed_score")]
    seconds = np.array([[float(row[w] or "inf") for w in workloads] for row in rows])
    times = score.Times([row["submission"] for row in rows], workloads, seconds)
    tau = np.linspace(1, score.TAU_MAX, 200)
    rho = score.profile(score.ratios(times, HELD_OUT)[1], tau)
    ours, published = score.scores(times, HELD_OUT), [float(row["published_score"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -published[i])
    figures = {"submissions": [times.submissions[i] for i in order], "published": [published[i] for i in order]}
    return common.rounded(figures | {"ours": ours[order], "tau": tau, "profiles": rho[order]}, 6)


def verdict(figures: dict) -> tuple[bool, str]:
    pairs = list(zip(figures["ours"], figures["published"]))
    equal = sum(round(ours, 4) == published for ours, published in pairs)
    off = max(abs(ours - published) for ours, published in pairs)
    names, values = figures["submissions"], figures["ours"]
    return equal == len(pairs) and names[:2] == ["shampoo_submission", "schedule_free_adamw"], (
        f"{equal} of {len(pairs)} scores equal the published ones to four digits (largest difference {off:.5f}); first are"
        f" {names[0]} ({values[0]:.4f}) and {names[1]} ({values[1]:.4f}); the baseline has"
        f" {values[names.index('baseline')]:.4f}; one round of published medians, no seeds"
    )


def draw(figures: dict):
    figure, axis = common.axes(width=11, height=6.2)
    axis.set(title="Time to the target, relative to the best", xlabel="tau", ylabel="share of the workloads within tau x best")
    axis.set(xlim=(1, score.TAU_MAX), ylim=(0, 1.02))
    highlighted = {
        "shampoo_submission": common.RED, "schedule_free_adamw": common.BLUE, "baseline": common.BLACK,
        "schedule_free_prodigy": common.PURPLE,
    }  # fmt: skip
    labels = [(score.TAU_MAX, 0.5, f"the other {len(figures['ours']) - len(highlighted)}", "0.5")]
    for name, value, rho in reversed(list(zip(figures["submissions"], figures["ours"], figures["profiles"]))):
        colour = highlighted.get(name)
        axis.step(figures["tau"], rho, where="post", color=colour or "0.75", linewidth=3 if colour else 1.2)
        labels += [(score.TAU_MAX, rho[-1], f"{value:.3f}  {name}", colour)] if colour else []
    common.ends(axis, labels, gap=24)
    return figure
