"""Loss surfaces, for the studies that look at them: directions in weight space, and losses along them.

random_direction(model, seed)       normal, as long as all weights together
filter_normalised(model, seed)      normal, each row of a matrix as long as that row of the weights; 0 elsewhere
losses(model, loss, directions, points)     the loss at w + sum of coefficient x direction
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from studies.common import batches, progress

Direction = dict[str, Tensor]  # parameter name -> change


def normal(model: nn.Module, seed: int) -> Direction:
    dice = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=dice, dtype=w.dtype) for name, w in model.named_parameters()}


def length(direction: Direction) -> Tensor:
    return torch.stack([d.double().square().sum() for d in direction.values()]).sum().sqrt()


def cosine(a: Direction, b: Direction) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a) / length(a) / length(b))


def random_direction(model: nn.Module, seed: int) -> Direction:
    """A random direction of the length of all weights together."""
    direction, weights = normal(model, seed), {name: w.detach() for name, w in model.named_parameters()}
    factor = float(length(weights) / length(direction))
    return {name: factor * d for name, d in direction.items()}


def filter_normalised(model: nn.Module, seed: int) -> Direction:
    """A random direction whose rows (what one unit reads) each have the length of that row of the weights; vectors and scalars
    stay as they are. Source: Li et al. 2018 (arXiv 1712.09913), section 4."""
    weights = dict(model.named_parameters())

    def fitted(name: str, d: Tensor) -> Tensor:
        w = weights[name].detach()
        return d * (w.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True)) if d.dim() == 2 else torch.zeros_like(d)

    return {name: fitted(name, d) for name, d in normal(model, seed).items()}


@torch.no_grad()
def losses(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], directions: list[Direction], points: Tensor, what: str = ""
) -> Tensor:
    """loss(model) with the weights w + sum_k points[i, k] directions[k]: points [n, directions] -> [n]. The weights are put
    back."""
    start, found = {name: w.detach().clone() for name, w in model.named_parameters()}, []
    try:
        for point in progress(points.tolist(), what):
            for name, w in model.named_parameters():
                w.copy_(start[name])
                for coefficient, direction in zip(point, directions, strict=True):
                    w.add_(direction[name], alpha=coefficient)
            found.append(loss(model))
    finally:
        for name, w in model.named_parameters():
            w.copy_(start[name])
    return torch.stack(found)


def text_loss(of: Tensor, length: int, size: int = 32, seed: int = 1) -> Callable[[nn.Module], Tensor]:
    """The loss of a GPT, in eval mode, on a fixed batch of a corpus."""
    batch = batches(of, length, size, seed)(0)

    def loss(model: nn.Module) -> Tensor:
        training = model.training
        value = model.eval()(*batch)
        model.train(training)
        return value

    return loss
