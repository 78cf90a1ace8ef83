"""Weights must not start all equal, and with depth their scale decides whether a net learns at all.

Equal: an MLP whose weights all start at one constant is trained by Adam; the units of a layer stay identical, bit for bit.
Scale: ReLU nets of 22 and 30 layers of width 64 on the 8 x 8 digits of scikit-learn, weights from N(0, s^2): s = 0.01,
0.1 and 0.25, Xavier's s^2 = 1 / n and He's 2 / n for n inputs; three seeds of each, trained by SGD with momentum. Before
training a layer multiplies the mean square of its input by n s^2 / 2. Also the project's GPT, weights scaled, by AdamW.
At 22 layers He should be faster than Xavier; at 30 layers Xavier should stall (loss above 2.2; chance is 2.30) and He learn
(below 1.8).

Source: He et al. 2015 (arXiv 1502.01852), figures 2 and 3; Glorot, Bengio 2010; Sutskever et al. 2013.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.common import BLUE, GREY, ORANGE, PURPLE, SKY, axes, batches, rounded, say, smooth, tiny_gpt, tokens, train

MINUTES = 1.2
SLIDE = 10
WIDTH, CLASSES, LR, BATCH = 64, 10, 0.002, 64
SCALES = {"0.01": 0.01, "0.1": 0.1, "0.25": 0.25, "Xavier": WIDTH**-0.5, "He": (2 / WIDTH) ** 0.5}
COLOURS = {"0.01": GREY, "0.1": SKY, "0.25": PURPLE, "Xavier": BLUE, "He": ORANGE}
FACTORS = (0.1, 1.0, 5.0, 25.0)  # of GPT-2's 0.02


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64], normalised, and classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(y)


class Deep(nn.Module):
    """ReLU nets without biases side by side, one for each standard deviation: hidden weights [nets, WIDTH, WIDTH], and a last
    layer that is the same for all."""

    def __init__(self, deviations: list[float], layers: int, seed: int):
        super().__init__()
        dice = torch.Generator().manual_seed(seed)
        scale = torch.tensor(deviations)[:, None, None]
        self.layers = nn.ParameterList(
            torch.randn(len(deviations), WIDTH, WIDTH, generator=dice) * scale for _ in range(layers - 1)
        )
        self.last = nn.Parameter(torch.randn(len(deviations), CLASSES, WIDTH, generator=dice) * WIDTH**-0.5)

    def forward(self, x: Tensor, squares: list[Tensor] | None = None) -> Tensor:
        """Logits [nets, batch, CLASSES]; to `squares` goes the mean square after each layer, [nets]."""
        x = x.expand(len(self.last), *x.shape)
        for w in self.layers:
            x = torch.bmm(x, w.mT).relu()
            if squares is not None:
                squares.append(x.square().mean((1, 2)))
        return torch.bmm(x, self.last.mT)


def of_depth(layers: int, steps: int, seeds: int, seed: int) -> dict[str, Any]:
    """Scale -> training losses [seeds, steps], and mean squares by layer before training."""
    images, classes = digits()
    nets, dice = Deep(list(SCALES.values()) * seeds, layers, seed), torch.Generator().manual_seed(seed)
    squares: list[Tensor] = []
    with torch.no_grad():
        nets(images[:256], squares)
    history: list[Tensor] = []

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        each = F.cross_entropy(model(images[rows]).transpose(1, 2), classes[rows].expand(len(model.last), -1), reduction="none")
        history.append(each.detach().mean(1))
        return each.mean(1).nan_to_num(0, 0, 0).sum()  # a sum: each net has its own gradient

    train(nets, f"sgd:lr={LR},momentum=0.9", lambda _: (torch.randint(len(images), (BATCH,), generator=dice),), steps,
          loss=loss, schedule="constant", what=f"{layers} layers")  # fmt: skip
    losses = torch.stack(history, 1).view(seeds, len(SCALES), steps)
    by_layer = torch.stack(squares).view(layers - 1, seeds, len(SCALES)).mean(1)
    return {name: {"losses": losses[:, i], "squares": by_layer[:, i]} for i, name in enumerate(SCALES)}


class Layer(nn.Linear):
    """A linear layer written as a sum, which adds in the same order for every unit; BLAS does not promise that."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None, :] * self.weight).sum(-1) + self.bias


def equal_units(steps: int = 20) -> dict[str, Any]:
    """Train an MLP from a constant: do the units of its hidden layers stay the same to the last bit, and have they moved?"""
    images, classes = (part[:256] for part in digits())
    net = nn.Sequential(Layer(64, 32), nn.ReLU(), Layer(32, 32), nn.ReLU(), Layer(32, CLASSES))
    for w in net.parameters():
        nn.init.constant_(w, 0.01)
    train(net, "adam:lr=0.01", lambda _: (images, classes), steps, loss=lambda model, x, y: F.cross_entropy(model(x), y))
    first, second = (net[i].weight.detach() for i in (0, 2))
    same = all(torch.equal(w, w[:1].expand_as(w)) for w in (first, second))
    return {"same": same, "moved": float((first - 0.01).abs().max())}


def of_gpt(factor: float, steps: int, seed: int, text: Tensor) -> float:
    """Mean loss of the last tenth of training, of the small GPT with its first matrices multiplied."""
    gpt = tiny_gpt(seed=seed)
    with torch.no_grad():
        for w in gpt.parameters():
            if w.dim() == 2:
                w.mul_(factor)
    losses = train(gpt, "adamw:lr=3e-3", batches(text, 64, 16, seed), steps, what=f"GPT x {factor:g}")
    return sum(losses[-(steps // 10) :]) / (steps // 10)


def run(seed: int = 0, quick: bool = False) -> dict[str, Any]:
    steps, seeds = (250, 1) if quick else (600, 3)
    figures = {"depths": {str(layers): of_depth(layers, steps, seeds, seed) for layers in (22, 30)}, "equal": equal_units()}
    if not quick:
        text = tokens()
        figures["gpt"] = {f"{f:g}": [of_gpt(f, 200, number, text) for number in (seed, seed + 1)] for f in FACTORS}
    for nets in figures["depths"].values():
        for part in nets.values():
            part["end"] = part["losses"][:, -steps // 10 :].mean(1)
            part["losses"] = part["losses"].mean(0).tolist()
    return rounded(figures, 4)


def reached(losses: list[float], level: float = 1.0) -> int | None:
    """The step at which the mean loss of 10 steps is first at or below `level`."""
    return next((i for i, x in enumerate(smooth(losses, 10)) if x <= level), None)


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    equal, (short, long) = figures["equal"], (figures["depths"][n] for n in ("22", "30"))
    he, xavier = (reached(short[name]["losses"]) for name in ("He", "Xavier"))
    learnt, stalled = (long[name]["end"] for name in ("He", "Xavier"))
    words = f"equal units stay {'equal bit for bit' if equal['same'] else 'nearly equal'}; 22 layers: loss 1 after {he} steps "
    words += f"with He, {xavier or 'never'} with Xavier; 30 layers: final loss at most {max(learnt):.2f} with He, at least "
    words += f"{min(stalled):.2f} with Xavier (chance: 2.30; {len(learnt)} seeds)"
    if "gpt" in figures:
        words += "; GPT with weights " + ", ".join(f"x {f}: {sum(x) / len(x):.2f}" for f, x in figures["gpt"].items())
    faster = he is not None and (xavier is None or he < xavier)
    return equal["same"] and faster and max(learnt) < 1.8 and min(stalled) > 2.2, words


def draw(figures: dict[str, Any]):
    figure, (left, *others) = axes(3, width=17)
    for name, part in figures["depths"]["30"].items():
        left.semilogy(range(1, 30), part["squares"], color=COLOURS[name])
        shown = max(i for i, square in enumerate(part["squares"]) if square > 1e-33)
        say(left, shown + 1, part["squares"][shown], name, COLOURS[name])
    left.set(
        xlim=(0, 39), title="signal before training", xlabel="layer", ylabel="mean square of activations", ylim=(1e-36, 1e10)
    )
    for axis, (layers, nets) in zip(others, figures["depths"].items(), strict=True):
        for name in ("Xavier", "He"):
            loss = smooth(nets[name]["losses"], 10)
            axis.plot(loss, color=COLOURS[name])
            say(axis, len(loss), loss[-1], name, COLOURS[name])
        axis.set(title=f"{layers} layers", xlabel="step", ylabel="training loss", ylim=(0, 2.6), xlim=(0, 1.25 * len(loss)))
    return figure
