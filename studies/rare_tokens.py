"""SGD makes no progress on rare tokens: Adam is better at heavy-tailed classes, not at heavy-tailed noise.

A small GPT on 12,000 GPT-2 tokens, 17 times over. The tokens are put into ten groups by frequency, each a tenth of the text;
the picture has each group's loss under SGD, sign descent (both with momentum 0.9) and Adam, each at its best rate of a grid.
Five seeds: SGD's best rate is close to the edge of stability, and with three seeds one run decided, which rounding can move.
The control is softmax regression on full batches, hence without noise: inputs uniform in [0, 1], seven groups of 64 examples
whose k-th has 2^k classes, or as many examples in equal classes. With `--run DIR`: the loss of each group under that run's
model.

Source: Kunstner et al. 2024 (arXiv 2402.19449); Kunstner et al. 2023 (arXiv 2304.13960).
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import optimizers
from model import GPT
from studies import common

MINUTES = 5.4
SLIDE = 9
METHODS = {"SGD": "sgd:momentum=0.9,lr={}", "sign descent": "signum:momentum=0.9,weight_decay=0,lr={}", "Adam": "adam:lr={}"}
RATES = {"SGD": (0.1, 0.3, 1.0), "sign descent": (3e-4, 1e-3, 3e-3), "Adam": (3e-3, 1e-2, 3e-2)}
CONTROL = {"SGD": "sgd:momentum=0.9,lr=0.1", "Adam": "adam:lr=0.01"}
COLOURS = {"SGD": common.RED, "sign descent": common.ORANGE, "Adam": common.BLUE}
LENGTH, BATCH, GROUPS = 32, 16, 10

# ---------------------------------------------------------------- the GPT


def groups_of(counts: Tensor) -> Tensor:
    """Group 0 (most frequent) to 9 of each token: a tenth of the text each, by the middle of its share. counts: descending."""
    middle = (counts.cumsum(0) - counts / 2) / counts.sum()
    return (GROUPS * middle).long().clamp(max=GROUPS - 1)


@torch.no_grad()
def group_losses(gpt: GPT, groups: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each group of target tokens [groups]; nan where there are none."""
    total, count = torch.zeros(GROUPS), torch.zeros(GROUPS)
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH)):
        losses = nn.functional.cross_entropy(gpt(x).flatten(0, 1), y.flatten(), reduction="none")
        total.index_add_(0, groups[y.flatten()], losses)
        count.index_add_(0, groups[y.flatten()], torch.ones_like(losses))
    return total / count


def language(name: str, spec: str, text: Tensor, groups: Tensor, steps: int, seed: int) -> list[Tensor]:
    """Losses of the groups at 9 times from the start to the end of a run, on a fixed part of the text it is trained on."""
    gpt = common.tiny_gpt(len(groups), LENGTH, seed=seed)
    fixed = common.batches(text, LENGTH, min(128, 2 * steps), seed + 10_000)(0)
    found = [group_losses(gpt, groups, *fixed)]

    def look(step: int) -> None:
        if (step + 1) % (steps // 8) == 0:
            found.append(group_losses(gpt, groups, *fixed))

    common.train(gpt, spec, common.batches(text, LENGTH, BATCH, seed), steps, after=look, what=f"{name} {seed}")
    return found + [torch.full((GROUPS,), math.inf)] * (9 - len(found))


# ---------------------------------------------------------------- the control


class Regression(nn.Module):
    """Linear classifiers, one a learning rate, trained side by side: weights [classes, inputs] each."""

    def __init__(self, count: int, classes: int, inputs: int):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(classes, inputs) for _ in range(count))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Losses [count, examples]."""
        logits = torch.stack([x @ w.T for w in self.weights])
        return nn.functional.cross_entropy(logits.transpose(1, 2), y.expand(len(logits), -1), reduction="none")


def classes(kind: str, m: int) -> Tensor:
    """Labels of (m + 1) 2^m examples. zipf: group k has 2^k classes of 2^(m-k) examples; balanced: m + 1 groups of classes of
    equal size."""
    if kind == "balanced":
        return torch.arange((m + 1) * 2**m) // 8
    parts = [2**k - 1 + torch.arange(2**m) // 2 ** (m - k) for k in range(m + 1)]
    return torch.cat(parts)


def control(kind: str, spec: str, m: int, factors: tuple[float, ...], seed: int) -> tuple[float, Tensor]:
    """Of the factors on the rate with which the loss never rises above its start, that of the smallest loss after 40 steps on
    full batches, and that run's loss by group [m + 1], most frequent classes first. As many inputs as examples, uniform in
    [0, 1]: all classes can be told apart."""
    y = classes(kind, m)
    x = torch.rand(len(y), len(y), generator=torch.Generator().manual_seed(seed))
    model = Regression(len(factors), int(y.max()) + 1, len(y))
    optimizer = optimizers.build(spec, model, rates=",".join(f"{i}={f}" for i, f in enumerate(factors)))
    highest = torch.zeros(len(factors))
    for _ in common.progress(range(40), f"{kind} {spec}"):
        losses = model(x, y)
        highest = highest.maximum(losses.detach().mean(1).nan_to_num(nan=math.inf))
        optimizer.zero_grad()
        losses.mean(1).sum().backward()
        optimizer.step()
    losses = model(x, y).detach()
    start = math.log(int(y.max()) + 1)
    best = int(losses.mean(1).masked_fill(highest > 1.001 * start, math.inf).argmin())
    return factors[best], losses[best].unflatten(0, (m + 1, -1)).mean(1)


# ---------------------------------------------------------------- the study


def run(seed: int = 0, quick: bool = False, folder: Path | None = None) -> dict:
    if folder:
        return of_a_run(folder)
    steps, seeds, m, size = (8, 2, 6, 10_000) if quick else (400, 5, 6, 12_000)
    text, counts = common.by_frequency((common.tokens("words") if quick else common.tokens("sotu-gpt2"))[:size])
    groups = groups_of(counts)
    figures: dict = {"steps": steps, "seeds": seeds, "vocabulary": len(counts), "specs": {}, "grids": {}, "losses": {}}
    figures["tokens"] = torch.bincount(groups, minlength=GROUPS)
    for name, spec in METHODS.items():

        def final(spec: str, name=name) -> float:
            return language(name, spec, text, groups, steps, seed + 1000)[-1].mean().item()

        rates = RATES[name][1:2] if quick else RATES[name]
        best, grid = common.tuned(spec, rates, final)
        figures["specs"][name], figures["grids"][name] = best, grid
        figures["losses"][name] = [language(name, best, text, groups, steps, seed + i) for i in range(seeds)]
    factors = (1.0, 3.16) if quick else (0.1, 0.316, 1.0, 3.16, 10.0)
    for kind in ("zipf", "balanced"):
        runs = {name: [control(kind, spec, m, factors, seed + i) for i in range(seeds)] for name, spec in CONTROL.items()}
        figures[kind] = {name: {"factors": [f for f, _ in of], "losses": [loss for _, loss in of]} for name, of in runs.items()}
    return common.rounded(figures, 4)


def of_a_run(folder: Path) -> dict:
    """Loss of each group on the validation text of a run's corpus."""
    gpt, text = common.of_run(folder)
    counts = torch.bincount(text, minlength=gpt.config.vocab_size)
    order = counts.argsort(descending=True, stable=True)
    groups = groups_of(counts[order])[order.argsort()]
    losses = group_losses(gpt, groups, *common.batches(text, gpt.config.sequence_length, 128)(0))
    return common.rounded(
        {"run": folder.name, "tokens": torch.bincount(groups[counts > 0], minlength=GROUPS), "losses": losses}
    )


def falls(figures: dict, group: int) -> dict[str, list[float]]:
    """By how much each method lowers the loss of a group, one number a seed; 0 of a run that diverged."""
    ends = {name: [(of[0][group], of[-1][group]) for of in runs] for name, runs in figures["losses"].items()}
    return {name: [0.0 if end is None else start - end for start, end in of] for name, of in ends.items()}


def gaps(figures: dict, kind: str, group: int) -> list[float]:
    """Control: loss of SGD minus loss of Adam in a group of classes, one number a seed."""
    of = figures[kind]
    return [sgd[group] - adam[group] for sgd, adam in zip(of["SGD"]["losses"], of["Adam"]["losses"])]


def verdict(figures: dict) -> tuple[bool, str]:
    if "run" in figures:
        there = [loss for loss in figures["losses"] if loss is not None]
        words = f"the rarest tenth of the tokens of {figures['run']} has {there[-1]:.2f} nats, the most frequent {there[0]:.2f}"
        return there[-1] > there[0], words
    rare, often = falls(figures, GROUPS - 1), falls(figures, 0)
    words = ", ".join(f"{name} {common.mean_and_interval(of)[0]:.2f}" for name, of in rare.items())
    behind, often_behind = (  # of runs with the same seed, so with the same batches
        common.mean_and_interval(adam - sgd for sgd, adam in zip(of["SGD"], of["Adam"])) for of in (rare, often)
    )
    zipf, even = (common.mean_and_interval(gaps(figures, kind, -1)) for kind in ("zipf", "balanced"))
    return behind[1] > max(0.0, often_behind[2]) and zipf[1] > max(0.5, 3 * abs(even[0])), (
        f"the loss of the rarest tenth of the text falls by {words} nats: SGD is {behind[0]:.2f} ({behind[1]:.2f} to"
        f" {behind[2]:.2f}) behind Adam, on the most frequent tenth {often_behind[0]:.2f} ({often_behind[1]:.2f} to"
        f" {often_behind[2]:.2f}), in pairs of equal seed; control without noise, at the best rates with which the loss never"
        f" explodes: SGD is {zipf[0]:.2f} ({zipf[1]:.2f} to {zipf[2]:.2f}) behind on the rarest classes, {even[0]:.2f}"
        f" ({even[1]:.2f} to {even[2]:.2f}) where classes are balanced; {figures['seeds']} seeds"
    )


def draw(figures: dict):
    if "run" in figures:
        figure, axis = common.axes()
        axis.bar(range(1, GROUPS + 1), [loss or 0 for loss in figures["losses"]], color=common.BLUE)
        axis.set(title=f"Loss by frequency: {figures['run'][:40]}", ylabel="loss, nats")
        axis.set_xlabel("tenths of the text, most frequent tokens first")
        return figure
    figure, panels = common.axes(4, width=18, height=5.6, width_ratios=(1, 1, 1, 0.9))
    steps = torch.linspace(0, figures["steps"], 9)
    shades = [str(0.75 * (1 - g / (GROUPS - 1))) for g in range(GROUPS)]  # black: the rarest
    for axis, (name, runs) in zip(panels, figures["losses"].items()):
        mean = torch.tensor(runs).mean(0)
        for g in range(GROUPS):
            colour = COLOURS[name] if g == GROUPS - 1 else shades[g]
            axis.plot(steps, mean[:, g], color=colour, linewidth=4 if g == GROUPS - 1 else 1.6)
        axis.set(title=name, xlabel="step", ylim=(0, 12))
        axis.text(steps[-1], mean[5, -1] + 0.4, "rarest tenth", color=COLOURS[name], ha="right", va="bottom")
        axis.text(steps[-1], 0.4, "most frequent", color="0.5", ha="right")
    panels[0].set_ylabel("training loss by frequency, nats")
    kinds, width = ("zipf", "balanced"), 0.38
    for i, name in enumerate(("SGD", "Adam")):
        heights = [sum(of[-1] for of in figures[kind][name]["losses"]) / figures["seeds"] for kind in kinds]
        panels[3].bar([k + width * (i - 0.5) for k in range(2)], heights, width, color=COLOURS[name])
        for k, height in enumerate(heights):
            panels[3].text(
                k + width * (i - 0.5), height, f"{name}\n{height:.2g}", ha="center", va="bottom", color=COLOURS[name]
            )
    panels[3].set_xticks(range(2), ["rare\nclasses", "balanced\nclasses"])
    panels[3].set(title="No noise: loss\nof rare classes", yticks=[])
    panels[3].margins(y=0.25)
    return figure
