"""Large batches end in narrower minima than small ones.

An MLP (64-32-10, tanh) learns 1,000 of scikit-learn's digits by SGD at one rate, in batches of 10 and of all 1,000, until its
training loss is 0.05: equally deep minima. Five pairs from the same start compare the largest eigenvalue of the Hessian
of the training loss (Lanczos with Hessian-vector products, 30 iterations, all vectors kept orthogonal), the test loss, and both
losses on the line through the two minima. The large batch should have the larger eigenvalue; the source finds its test error
larger too. With `--run DIR`: eigenvalues at the weights of a trained GPT.

Source: Keskar et al. 2017 (arXiv 1609.04836); Hochreiter, Schmidhuber 1997, "Flat minima".
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimizers
from studies import surfaces
from studies.common import BLACK, BLUE, GREY, RED, axes, mean_and_interval, of_run, progress, rounded, say
from studies.initialisation import digits

MINUTES = 0.2
SLIDE = 15
SMALL, LARGE, LR, DEPTH, ITERATIONS = 10, 1000, 0.2, 0.05, 30


def hessian_product(loss: Tensor, weights: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """v -> H v for the Hessian of `loss` at all `weights`, flattened: the gradient of <gradient, v>."""
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    slope = torch.cat([g.flatten() for g in slopes])

    def product(v: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(slope, weights, v, retain_graph=True)])

    return product


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """Ritz values of a symmetric matrix, ascending: its outermost eigenvalues converge first. start: a random vector."""
    vectors, diagonal, beside = [start / start.norm()], [], []
    for i in range(min(iterations, len(start))):
        w = product(vectors[i])
        diagonal.append(torch.dot(w, vectors[i]).item())
        basis = torch.stack(vectors)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            w = w - basis.T @ (basis @ w)
        if w.norm() < 1e-10 * max(map(abs, diagonal)):
            break
        beside.append(w.norm().item())
        vectors.append(w / w.norm())
    n = len(diagonal)
    off = torch.tensor(beside[: n - 1], dtype=torch.float64)
    return torch.linalg.eigvalsh(torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off.diag(1) + off.diag(-1))


def spectrum(model: nn.Module, loss: Tensor, seed: int = 0, iterations: int = ITERATIONS) -> Tensor:
    weights = [w for w in model.parameters() if w.requires_grad]
    size, dice = sum(w.numel() for w in weights), torch.Generator().manual_seed(seed)
    return lanczos(hessian_product(loss, weights), torch.randn(size, generator=dice, dtype=weights[0].dtype), iterations)


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def trained(seed: int, batch: int, depth: float, x: Tensor, y: Tensor) -> nn.Module:
    """The first weights at which the loss on all of x is at most `depth`, checked after every tenth step."""
    model, dice = net(seed), torch.Generator().manual_seed(seed)
    optimizer = optimizers.build(f"sgd:lr={LR},momentum=0", model)
    for step in progress(range(20_000), f"batch {batch}, seed {seed}"):
        with torch.no_grad():
            if step % 10 == 0 and F.cross_entropy(model(x), y) <= depth:
                break
        rows = torch.randint(len(x), (batch,), generator=dice) if batch < len(x) else slice(None)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def run(seed: int = 0, quick: bool = False, folder: Path | None = None) -> dict[str, Any]:
    if folder:
        gpt, text = of_run(folder)
        loss = surfaces.text_loss(text, gpt.config.sequence_length, 2 if quick else 8)(gpt)
        found = spectrum(gpt, loss, seed, 5 if quick else ITERATIONS)
        return rounded({"run": folder.name, "loss": loss, "eigenvalues": found})
    images, classes = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images[order].double(), classes[order]
    train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    at, seeds = torch.linspace(-0.5, 1.5, 41), 2 if quick else 5
    figures: dict[str, Any] = {"at": at, "train": [], "test": []} | {name: {} for name in ("sharpness", "test_loss", "loss")}
    for number in range(seed, seed + seeds):
        pair = {batch: trained(number, batch, 0.2 if quick else DEPTH, *train) for batch in (SMALL, LARGE)}
        for batch, model in pair.items():
            loss = F.cross_entropy(model(train[0]), train[1])
            for key, value in (("sharpness", spectrum(model, loss, number)[-1]), ("loss", loss.detach()),
                               ("test_loss", F.cross_entropy(model(test[0]), test[1]).detach())):  # fmt: skip
                figures[key].setdefault(str(batch), []).append(value)
        between = {name: w.detach() - dict(pair[SMALL].named_parameters())[name].detach()
                   for name, w in pair[LARGE].named_parameters()}  # fmt: skip
        for name, (images, classes) in (("train", train), ("test", test)):
            figures[name].append(surfaces.losses(
                pair[SMALL], lambda m, x=images, y=classes: F.cross_entropy(m(x), y), [between], at[:, None]
            ))  # fmt: skip
    return rounded(figures)


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    if "run" in figures:
        low, high = figures["eigenvalues"][0], figures["eigenvalues"][-1]
        return (
            -low < high / 10,
            f"{figures['run']}: loss {figures['loss']:.3f}, Hessian's eigenvalues from {low:.3g} to {high:.3g}",
        )
    sharp, test = figures["sharpness"], figures["test_loss"]
    ratio, low, high = mean_and_interval(a / b for a, b in zip(sharp[str(LARGE)], sharp[str(SMALL)], strict=True))
    worse, least, most = mean_and_interval(a - b for a, b in zip(test[str(LARGE)], test[str(SMALL)], strict=True))
    words = (
        f"at equal training loss the large batch's largest eigenvalue is {ratio:.2f} times the small batch's (95 % interval "
    )
    words += f"{low:.2f} to {high:.2f}, {len(figures['train'])} seeds); test loss, large minus small: {worse:.4f} "
    words += f"({least:.4f} to {most:.4f})"
    return low > 1, words


def draw(figures: dict[str, Any]):
    if "run" in figures:
        figure, axis = axes()
        axis.stem(figures["eigenvalues"], [1] * len(figures["eigenvalues"]), linefmt=BLUE, markerfmt=" ", basefmt=" ")
        axis.set(title=f"Hessian of {figures['run']}", xlabel="eigenvalue (Lanczos)", yticks=[])
        return figure
    figure, (left, right) = axes(2, width=14, width_ratios=(2, 1))
    at = figures["at"]
    for name, colour, words in (("train", BLUE, "training"), ("test", RED, "test")):
        for line in figures[name]:
            left.plot(at, line, color=colour, linewidth=1.2)
        say(left, at[-1], figures[name][0][-1], words, colour)
    for a, words in ((0, f"batch {SMALL}"), (1, f"batch {LARGE}")):
        left.axvline(a, color=GREY, linestyle=":")
        left.annotate(words, (a, 1), xycoords=("data", "axes fraction"), ha="center", color=BLACK)
    left.set(xlabel="line through the two minima", ylabel="loss", xticks=[0, 1], ylim=(0, None))
    sharp = figures["sharpness"]
    for small, large in zip(sharp[str(SMALL)], sharp[str(LARGE)], strict=True):
        right.plot([0, 1], [small, large], "o-", color=BLUE, markersize=9)
    right.set(
        title="curvature", xticks=[0, 1], xticklabels=[f"batch {SMALL}", f"batch {LARGE}"], xlim=(-0.3, 1.3), ylim=(0, None)
    )
    right.set_ylabel("largest eigenvalue of the Hessian")
    return figure
