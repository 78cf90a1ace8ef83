"""Any picture can be found in the loss surface of a network.

Multi-point optimisation: a plane w0 + x u + y v through the weights of a small MLP (2-24-24-2, tanh, two interleaved spirals of
100 points) is trained so that its losses on a grid draw a chosen pattern: 0.2 nats where the pattern is dark, 1.2 where it is
light. All (3 x p) numbers of the plane learn together, by Adam, from all points of the grid at once:
minimise sum_xy (log L(w0 + x u + y v) - log target_xy)^2. The result is the correlation of losses and pattern on
the grid, and at points between, which were not trained.

Source: Skorokhodov, Burtsev 2019 (arXiv 1910.03867).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.common import axes, rounded, train

MINUTES = 0.9
SLIDE = 14
PATTERNS = {
    "cat": """
        .................
        ..#...........#..
        ..##.........##..
        ..###.......###..
        ..#############..
        ..#############..
        ..###..###..###..
        ..###..###..###..
        ..#############..
        ..######.######..
        ..#####...#####..
        ..####.###.####..
        ...###########...
        ....#########....
        .....#######.....
        .................
    """,
    "minimum": """
        .................
        .##...........##.
        .##...........##.
        .##...........##.
        ..##.........##..
        ..##.........##..
        ..###.......###..
        ...##.......##...
        ...###.....###...
        ....##.....##....
        ....###...###....
        .....#######.....
        ......#####......
        .................
        ......#####......
        .................
    """,
}
LOW, HIGH, WIDTH = 0.2, 1.2, 24


def bitmap(name: str) -> Tensor:
    """[rows, columns], 1 where the pattern is dark."""
    return torch.tensor([[float(c == "#") for c in line] for line in PATTERNS[name].split()])


def spirals(points: int) -> tuple[Tensor, Tensor]:
    t = torch.linspace(0.5, 3, points // 2)
    arm = torch.stack([t * torch.cos(2 * t), t * torch.sin(2 * t)], 1) / 3
    return torch.cat([arm, -arm]), torch.arange(2).repeat_interleave(points // 2)


SHAPES = ((WIDTH, 3), (WIDTH, WIDTH + 1), (2, WIDTH + 1))  # the last column of each: biases


def outputs(weights: Tensor, x: Tensor) -> Tensor:
    """Logits [n, points, 2] of n networks, weights [n, p]."""
    y, at = x.expand(len(weights), *x.shape), 0
    for rows, columns in SHAPES:
        w = weights[:, at : at + rows * columns].view(-1, rows, columns)
        y, at = torch.baddbmm(w[:, None, :, -1], y if at == 0 else y.tanh(), w[..., :-1].mT), at + rows * columns
    return y


class Plane(nn.Module):
    """Origin and two directions, [3, p]."""

    def __init__(self, seed: int, points: int):
        super().__init__()
        self.data, dice = spirals(points), torch.Generator().manual_seed(seed)
        parts = [torch.randn(3, rows * columns, generator=dice) / columns**0.5 for rows, columns in SHAPES]
        self.weights = nn.Parameter(torch.cat(parts, 1))

    def forward(self, grid: Tensor) -> Tensor:
        """Mean losses [n] at grid [n, 2]."""
        x, y = self.data
        logits = outputs(F.pad(grid, (1, 0), value=1.0) @ self.weights, x)
        return F.cross_entropy(logits.mT, y.expand(len(grid), -1), reduction="none").mean(1)


def grid_of(rows: int, columns: int) -> Tensor:
    """[rows x columns, 2] from -1 to 1, the first row on top."""
    y, x = torch.meshgrid(torch.linspace(1, -1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def search(name: str, seed: int, steps: int, points: int) -> dict[str, Any]:
    """Train a plane; its correlation with the pattern, and its losses on a grid three times as fine."""
    dark, plane = bitmap(name), Plane(seed, points)
    wanted, (rows, columns) = torch.where(dark > 0, LOW, HIGH), dark.shape
    grid, fine = grid_of(rows, columns), grid_of(3 * rows - 2, 3 * columns - 2)

    def miss(model: nn.Module, points: Tensor) -> Tensor:
        return (model(points).log() - wanted.flatten().log()).square().mean()

    train(plane, "adam:lr=0.02,beta2=0.99,weight_decay=0", lambda _: (grid,), steps, loss=miss, what=f"{name}, seed {seed}")
    with torch.no_grad():
        z, between = plane(grid).view(dark.shape), plane(fine).view(3 * rows - 2, 3 * columns - 2)
    smooth = F.interpolate(wanted[None, None], between.shape, mode="bilinear", align_corners=True)[0, 0]
    return {"correlation": correlation(z, wanted), "between": correlation(between, smooth), "losses": between}


def run(seed: int = 0, quick: bool = False) -> dict[str, Any]:
    steps, seeds = (300, 1) if quick else (800, 2)
    found = {
        name: [search(name, number, steps, 40 if quick else 100) for number in range(seed, seed + seeds)]
        for name in list(PATTERNS)[: 1 if quick else 2]
    }
    return rounded({
        name: {"losses": parts[0]["losses"]} | {key: [part[key] for part in parts] for key in ("correlation", "between")}
        for name, parts in found.items()
    }, 4)  # fmt: skip


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    lowest = min(min(part["correlation"]) for part in figures.values())
    words = "; ".join(
        f"{name}: " + ", ".join(f"{a:.3f} (between {b:.3f})" for a, b in zip(part["correlation"], part["between"], strict=True))
        for name, part in figures.items()
    )
    return lowest > 0.9, f"correlation of losses and pattern, by seed: {words}"


def draw(figures: dict[str, Any]):
    figure, parts = axes(len(figures), width=6.4 * len(figures), height=6, squeeze=False)
    for axis, (name, part) in zip(parts[0], figures.items(), strict=True):
        image = axis.imshow(part["losses"], extent=(-1, 1, -1, 1), cmap="cividis", vmin=0, vmax=1.3 * HIGH)
        axis.set(title=f"{name}: correlation {part['correlation'][0]:.2f}", xlabel="x", ylabel="y")
        figure.colorbar(image, ax=axis, label="loss, nats", shrink=0.8)
    return figure
