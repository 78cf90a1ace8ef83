"""An exponentially growing learning rate works, and equals weight decay.

If the loss does not change when the weights are scaled, L(c w) = L(w), as behind every normalisation, then SGD with momentum g,
constant rate h and weight decay d visits the same functions as SGD without decay at the rate h a^(-2t-1), where a < 1 is the
larger root of a^2 - (1 + g - h d) a + g = 0 and the momentum begins at -(1 - a) w0 / (h a): its weights are a^(-t) times as
large. Here: an MLP of normalised weights on noisy labels, float64; we compare outputs on fixed inputs after each step.
Controls: the constant rate without decay gives other functions, and so do the two rates on a net without normalisation.
The theorem is exact, arithmetic is not: if training is chaotic, rounding of 1e-16 grows until the runs part (with ReLU,
h = 0.2 and d = 0.002 after 900 steps). The net here is smooth and the rate mild.

Source: Li, Arora 2019 (arXiv 1910.07454), theorem 2.12.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimizers
from studies.common import BLACK, BLUE, GREY, ORANGE, axes, progress, rounded, say, smooth

MINUTES = 1.1
SLIDE = 16
LR, MOMENTUM, DECAY, BATCH, CLASSES = 0.02, 0.9, 0.008, 64, 4


class Net(nn.Module):
    """Three linear layers without biases, each weight divided by its norm where `normalised`: then L(c w) = L(w)."""

    def __init__(self, seed: int, normalised: bool):
        super().__init__()
        dice, sizes = torch.Generator().manual_seed(seed), (16, 64, 64, CLASSES)
        self.layers = nn.ParameterList(
            torch.randn(out, into, generator=dice, dtype=torch.float64) * (2 / into) ** 0.5 for into, out in pairwise(sizes)
        )
        self.normalised = normalised

    def forward(self, x: Tensor) -> Tensor:
        for i, w in enumerate(self.layers):
            scale = (2 * w.size(0)) ** 0.5 / w.norm() if self.normalised else 1.0
            x = F.linear(x if i == 0 else F.gelu(x), w * scale)
        return x


def larger_root(momentum: float, lr: float, decay: float) -> float:
    b = 1 + momentum - lr * decay
    return (b + math.sqrt(b * b - 4 * momentum)) / 2


def course(seed: int, steps: int, *, decay: float = 0.0, grows: bool = False, normalised: bool = True) -> dict[str, Any]:
    """Train. After each step: the loss, the outputs [64, CLASSES] on fixed inputs, the rate, the norm of the weights."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 16, generator=dice, dtype=torch.float64)
    y = (x @ torch.randn(16, CLASSES, generator=dice, dtype=torch.float64)).argmax(1)
    y = torch.where(torch.rand(512, generator=dice) < 0.1, torch.randint(CLASSES, (512,), generator=dice), y)
    net, root = Net(seed, normalised), larger_root(MOMENTUM, LR, DECAY)
    spec = f"sgd:lr={LR},momentum={MOMENTUM},nesterov=false,weight_decay={decay}"
    optimizer, seen = optimizers.build(spec, net), {"loss": [], "outputs": [], "rate": [], "norm": []}
    if grows:
        for w in net.parameters():
            optimizer.state[w]["momentum_buffer"] = -(1 - root) / (LR * root) * w.detach()
    for step in progress(range(steps), "growing rate" if grows else f"decay {decay:g}"):
        rate = LR * root ** (-2 * step - 1) if grows else LR
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(512, (BATCH,), generator=dice)
        loss = F.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            norm = sum(w.square().sum() for w in net.parameters()).sqrt()
            for key, value in (("loss", loss.detach()), ("outputs", net(x[:64])), ("rate", torch.tensor(rate)), ("norm", norm)):
                seen[key].append(value)
    return {key: torch.stack(values) for key, values in seen.items()}


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Of two outputs [steps, 64, CLASSES], relative to the first, after each step."""
    return (a - b).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)


def run(seed: int = 0, quick: bool = False) -> dict[str, Any]:
    steps, seeds = (150, 1) if quick else (1500, 3)
    figures = {"steps": steps, "root": larger_root(MOMENTUM, LR, DECAY), "worst": []}
    for number in range(seed, seed + seeds):
        decayed, growing = course(number, steps, decay=DECAY), course(number, steps, grows=True)
        figures["worst"].append(difference(decayed["outputs"], growing["outputs"]).max())
        if number == seed:
            constant, plain, lost = (course(number, steps, **how) for how in (
                {}, {"decay": DECAY, "normalised": False}, {"grows": True, "normalised": False}
            ))  # fmt: skip
            figures["control"] = difference(decayed["outputs"], constant["outputs"]).max()
            figures["plain"] = difference(plain["outputs"], lost["outputs"]).max()
            runs = {"decay": decayed, "growing": growing, "constant": constant}
            drawn = {
                name: {key: r[key][:: max(1, steps // 500)] for key in ("loss", "rate", "norm")} for name, r in runs.items()
            }
            figures |= {
                "runs": drawn,
                "difference": difference(decayed["outputs"], growing["outputs"])[:: max(1, steps // 500)],
            }
    return rounded(figures)


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    worst, control = max(figures["worst"]), figures["control"]
    rates = figures["runs"]["growing"]["rate"]
    words = f"over {figures['steps']} steps, while the rate grows {rates[-1] / rates[0]:,.0f} times, outputs differ by at most "
    words += f"{worst:.1e} (relative, {len(figures['worst'])} seeds), by {control:.1g} from those of the constant rate without "
    words += f"decay; without normalisation the two rates differ by {figures['plain']:.1g}"
    return worst < 1e-4 and min(control, figures["plain"]) > 0.05, words


def draw(figures: dict[str, Any]):
    figure, (left, right) = axes(2, width=14)
    runs, steps = figures["runs"], figures["steps"]
    at = torch.linspace(0, steps, len(runs["decay"]["rate"]))
    for name, colour, words in (("growing", ORANGE, "growing, no decay"), ("decay", BLUE, "constant, with decay")):
        left.semilogy(at, runs[name]["rate"], color=colour)
        say(
            left,
            float(at[len(at) // 2]),
            runs[name]["rate"][len(at) // 2],
            words,
            colour,
            xytext=(12, 10 if name == "decay" else -4),
        )
    left.set(title="two learning rates ...", xlabel="step", ylabel="learning rate")
    for name, colour, width in (("constant", GREY, 1.2), ("decay", BLUE, 6), ("growing", ORANGE, 2)):
        loss = smooth(runs[name]["loss"], 10)
        right.plot(at[: len(loss)], loss, color=colour, linewidth=width)
    say(right, float(at[len(loss) - 1]), loss[-1], "both", BLACK)
    say(right, float(at[len(loss) - 1]), smooth(runs["constant"]["loss"], 10)[-1], "constant,\nno decay", GREY)
    right.set(
        title=f"... the same function: outputs differ by {max(figures['worst']):.0e}", xlabel="step", ylabel="training loss"
    )
    return figure
