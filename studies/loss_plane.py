"""On a plane around trained weights the loss is a basin; without residual connections it is rougher.

L(a, b) = L(w0 + a w1 + b w2) for a, b from -1 to 1, w1 and w2 random and filter-normalised: each row of a matrix as long
as that row of w0. w0: a small GPT (4 blocks of width 64, bytes of the State of the Union) before and after training, with its
residual connections, and trained the same way without them: a block is then f(x) instead of x + f(x). Roughness, after the
source: the curvatures at each point of the plane, from second differences; |smallest / largest| where the smallest is negative,
else 0; its mean over the plane is 0 for a convex surface. If the second half of the claim fails at this size, the losses say
why: attention without a residual connection mixes each token with all before it, so the net without them learns little more
than how frequent each byte is; and what has not been learnt leaves no rough surface.

Source: slide "loss surface" of the lecture; Li, Xu, Taylor, Studer, Goldstein 2018 (arXiv 1712.09913), section 6.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import Block
from studies import surfaces
from studies.common import BLACK, axes, batches, mean_and_interval, of_run, rounded, tiny_gpt, tokens, train

MINUTES = 5.3
SLIDE = 13


class PlainBlock(Block):
    """A block without its two residual connections."""

    def forward(self, x: Tensor, rotary: Any, values: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        return self.mlp(self.norm2(self.attention(self.norm1(x), rotary, values, documents)))


def made(skips: bool, seed: int, layers: int, **size: int) -> nn.Module:
    """The small GPT, with its residual connections or without them."""
    gpt = tiny_gpt(layers=layers, seed=seed, **size)
    if not skips:
        plain = [PlainBlock(gpt.config, layer) for layer in range(layers)]
        for block, old in zip(plain, gpt.blocks, strict=True):
            block.load_state_dict(old.state_dict())
        gpt.blocks = nn.ModuleList(plain)
    return gpt


def plane(model: nn.Module, loss, at: Tensor, seed: int = 0) -> Tensor:
    """Losses [len(at), len(at)], rows: b, columns: a."""
    directions = [surfaces.filter_normalised(model, 2 * seed + k) for k in (0, 1)]
    b, a = torch.meshgrid(at, at, indexing="ij")
    return surfaces.losses(model, loss, directions, torch.stack([a.flatten(), b.flatten()], 1), "plane").view(len(at), len(at))


def roughness(z: Tensor) -> float:
    """Mean over the inner points of |smallest / largest curvature| where the smallest is negative."""
    z = z.double()
    aa = z[1:-1, 2:] - 2 * z[1:-1, 1:-1] + z[1:-1, :-2]
    bb = z[2:, 1:-1] - 2 * z[1:-1, 1:-1] + z[:-2, 1:-1]
    ab = (z[2:, 2:] - z[2:, :-2] - z[:-2, 2:] + z[:-2, :-2]) / 4
    curvatures = torch.linalg.eigvalsh(torch.stack([torch.stack([aa, ab], -1), torch.stack([ab, bb], -1)], -1))
    small, worst = curvatures[..., 0], curvatures.abs().amax(-1)
    return float(torch.where(small < 0, small.abs() / worst, 0.0).mean())


def small(seed: int, quick: bool) -> dict[str, Any]:
    """Planes of the first model of each kind, and of all of them loss and roughness."""
    text, layers = tokens("repository") if quick else tokens(), 2 if quick else 4
    steps, models, at = (60, 1, torch.linspace(-1, 1, 7)) if quick else (400, 3, torch.linspace(-1, 1, 21))
    size = {"length": 32, "width": 32} if quick else {"length": 64}
    loss = surfaces.text_loss(text, size["length"], 16)
    figures: dict[str, Any] = {"at": at, "planes": {}, "roughness": {}, "loss": {}}
    for number in range(seed, seed + models):
        for skips in (True, False):
            gpt, kind = made(skips, number, layers, **size), "with skips" if skips else "without skips"
            for when in ("start", "end"):
                if when == "end":
                    train(gpt, "adamw:lr=3e-3", batches(text, size["length"], 16, number), steps)
                z = plane(gpt, loss, at, number)
                name = f"{when}, {kind}"
                figures["planes"].setdefault(name, z)
                figures["roughness"].setdefault(name, []).append(roughness(z))
                figures["loss"].setdefault(name, []).append(z[len(at) // 2, len(at) // 2])
    return figures


def run(seed: int = 0, quick: bool = False, folder: Path | None = None) -> dict[str, Any]:
    if not folder:
        return rounded(small(seed, quick))
    gpt, text = of_run(folder)
    at = torch.linspace(-1, 1, 9 if quick else 21)
    z, name = plane(gpt, surfaces.text_loss(text, gpt.config.sequence_length, 4), at), f"end, {folder.name}"
    return rounded({"at": at, "planes": {name: z}, "roughness": {name: [roughness(z)]}, "loss": {name: [z.min()]}})


def above(z: list[list[float]]) -> float:
    """How far the middle of the plane lies above its lowest point, as part of the height of the plane."""
    z = torch.tensor(z)
    return float((z[len(z) // 2, len(z) // 2] - z.min()) / (z.max() - z.min()))


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    offsets = {name: above(z) for name, z in figures["planes"].items() if name.startswith("end")}
    name, offset = next(iter(offsets.items()))
    words = f"the trained weights lie at the bottom of their plane (above its lowest point by {offset:.1%} of its height)"
    rough, count = figures["roughness"], len(figures["roughness"][name])
    if len(offsets) < 2 or count < 2:
        return offset < 0.01, f"{words}; roughness " + ", ".join(f"{x[0]:.3f} {key}" for key, x in rough.items())
    pairs = zip(rough["end, without skips"], rough["end, with skips"], strict=True)
    mean, low, high = mean_and_interval(without - skips for without, skips in pairs)
    loss = {name: sum(values) / count for name, values in figures["loss"].items()}
    words += (
        f", at a loss of {loss['end, with skips']:.2f} with residual connections and {loss['end, without skips']:.2f} without; "
    )
    words += "roughness {:.3f} with, {:.3f} without".format(
        *(sum(rough[f"end, {kind}"]) / count for kind in ("with skips", "without skips"))
    )
    return offset < 0.01 and low > 0, f"{words}; difference {mean:.3f} (95 % interval {low:.3f} to {high:.3f}, {count} seeds)"


def draw(figures: dict[str, Any]):
    chosen = [name for name in ("start, with skips", "end, with skips", "end, without skips") if name in figures["planes"]]
    chosen = chosen or list(figures["planes"])
    figure, parts = axes(len(chosen), width=4.6 * len(chosen), height=5.4, squeeze=False)
    for axis, name in zip(parts[0], chosen, strict=True):
        z = torch.tensor(figures["planes"][name])
        axis.contourf(figures["at"], figures["at"], z, levels=24, cmap="cividis")
        lines = axis.contour(figures["at"], figures["at"], z, levels=8, colors="white", linewidths=0.8)
        axis.clabel(lines, fontsize=10)
        axis.plot(0, 0, "+", color=BLACK, markersize=14, markeredgewidth=2)
        axis.set(title=name, xlabel="a", ylabel="b", aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    return figure
