"""Muon is Shampoo without averages: W - lr (G G^T)^-1/4 G (G^T G)^-1/4 = W - lr U V^T.

G = U S V^T gives (G G^T)^-1/4 = U S^-1/2 U^T and (G^T G)^-1/4 = V S^-1/2 V^T on the range of G: their product with G is
U V^T. The exact U V^T is compared with the formula in fp64, one step of the registry's Shampoo, whose factors are fp32, and
one of its Muon: five Newton-Schulz iterations, which bring singular values above a hundredth of |G| to between 0.68 and
1.2. G: Gaussian matrices, and gradients of a small GPT in its first step, each divided by its norm.

Source: slide "Deriving Muon"; arXiv 1802.09568; Bernstein and Newhouse 2024 (arXiv 2409.20325); Keller Jordan's Muon.
"""

import torch
from torch import Tensor, nn

import optimizers
from optimizers.matrix import orthogonalize
from studies import common

MINUTES = 0.1
SLIDE = 5
SHAMPOO = "shampoo:lr=1,beta1=0,weight_decay=0,grafting=none,every=1,eps=1e-14"
MUON = "muon:lr=1,momentum=0,weight_decay=0,scale=none,dtype=fp32"
BAND, LARGE = (0.68, 1.21), 0.01  # where the quintic iteration leaves singular values that are larger than LARGE of the norm


class Matrices(nn.Module):
    """Zeros in the shapes of the gradients: after a step with lr 1 they are minus the update."""

    def __init__(self, gradients: list[Tensor]):
        super().__init__()
        self.w = nn.ParameterList(torch.zeros_like(G) for G in gradients)
        for w, G in zip(self.w, gradients):
            w.grad = G.clone()


def updates(spec: str, gradients: list[Tensor]) -> list[Tensor]:
    """One step of a registered optimizer, as what it takes off each weight."""
    model = Matrices(gradients)
    optimizers.build(spec, model).step()
    return [-w.detach() for w in model.w]


def root(A: Tensor) -> Tensor:
    """A^-1/4 on the range of a symmetric positive semi-definite matrix: singular values of G above 1e-6, as in `run`."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * torch.where(values > 1e-12 * values[-1], values.clamp(min=1e-300).pow(-0.25), 0)) @ vectors.T


def real_gradients(seed: int, quick: bool) -> list[Tensor]:
    """Of the hidden matrices of a small GPT on text."""
    gpt = common.tiny_gpt(seed=seed)
    text = common.tokens("repository" if quick else "sotu-bytes")
    gpt(*common.batches(text, 64, 32, seed)(0)).backward()
    return [p.grad for name, p in gpt.named_parameters() if p.dim() == 2 and name.startswith("blocks") and "qkv" not in name]


def run(seed: int = 0, quick: bool = False) -> dict:
    dice, figures = torch.Generator().manual_seed(seed), {}
    random = [torch.randn(*shape, generator=dice) for shape in ((48, 96), (96, 32), (32, 128), (64, 128))]
    for kind, gradients in {"Gaussian": random, "GPT": real_gradients(seed, quick)}.items():
        gradients = [G / G.norm() for G in gradients]
        formula, registry, muon, before, after = [], [], [], [], []
        for G, S, M in zip(gradients, updates(SHAMPOO, gradients), updates(MUON, gradients)):
            G = G.double()
            U, s, Vh = torch.linalg.svd(G, full_matrices=False)
            there = s > 1e-6 * s[0]  # a gradient behind a LayerNorm has a direction of singular value 0
            exact = U[:, there] @ Vh[there]
            formula.append(torch.linalg.matrix_norm(root(G @ G.T) @ G @ root(G.T @ G) - exact, 2).item())
            registry.append(torch.linalg.matrix_norm(S - exact, 2).item())
            turned = U.T @ M.double() @ Vh.T  # what Muon makes of each singular value: the diagonal
            muon.append(torch.linalg.matrix_norm(turned - turned.diagonal().diag(), 2).item())
            before, after = [*before, *s.tolist()], [*after, *turned.diagonal().tolist()]
        errors = {"formula, fp64": max(formula), "Shampoo, fp32": max(registry), "Muon beside its diagonal": max(muon)}
        figures[kind] = {"matrices": len(gradients), "errors": errors, "before": before, "after": after}
    values = torch.logspace(-4, 0, 200)
    alone = [
        orthogonalize(torch.tensor([[v, 0.0], [0.0, (1 - v * v).clamp(min=0).sqrt()]]), dtype="fp32")[0, 0] for v in values
    ]
    return common.rounded(figures | {"curve": [values, torch.stack(alone)]})


def within(figures: dict) -> list[float]:
    """What Muon makes of singular values above LARGE of the norm."""
    return [y for kind in ("Gaussian", "GPT") for x, y in zip(figures[kind]["before"], figures[kind]["after"]) if x > LARGE]


def verdict(figures: dict) -> tuple[bool, str]:
    formula = max(figures[kind]["errors"]["formula, fp64"] for kind in ("Gaussian", "GPT"))
    shampoo, moved = (figures["Gaussian"]["errors"]["Shampoo, fp32"], within(figures))
    low, high = min(moved), max(moved)
    small = sum(x <= LARGE for x in figures["GPT"]["before"]) / len(figures["GPT"]["before"])
    return formula < 1e-6 and shampoo < 1e-3 and low > BAND[0] and high < BAND[1], (
        f"the formula is off U V^T by {formula:.0e} at most in fp64 (largest singular value of the difference), the registry's"
        f" Shampoo by {shampoo:.0e} in fp32 on Gaussian matrices; Muon's singular values are {low:.2f} to {high:.2f} where they"
        f" were above {LARGE:g} of the norm, as {1 - small:.0%} of a GPT's are;"
        f" {figures['Gaussian']['matrices']} Gaussian matrices, {figures['GPT']['matrices']}"
        " of a GPT"
    )


def draw(figures: dict):
    figure, axis = common.axes()
    axis.semilogx(*figures["curve"], color=common.GREY, linewidth=1.2)
    for kind, colour in (("GPT", common.BLUE), ("Gaussian", common.ORANGE)):
        axis.plot(figures[kind]["before"], figures[kind]["after"], "o", color=colour, markersize=5, alpha=0.6)
    axis.axhline(1, color=common.BLACK)
    axis.axhspan(*BAND, color=common.GREY, alpha=0.15, linewidth=0)
    axis.text(1.1e-4, 1.02, "Shampoo, exact: 1", color=common.BLACK, va="bottom")
    axis.text(1.1e-4, 0.72, "Muon's band", color="0.35")
    axis.text(7e-4, 0.12, "gradients of a GPT", color=common.BLUE)
    axis.text(0.3, 0.4, "Gaussian\nmatrices", color=common.ORANGE)
    axis.set(title="Both set every singular value to 1; Muon nearly", xlabel="singular value of G, parts of its norm")
    axis.set(ylabel="after the update", xlim=(1e-4, 1), ylim=(0, 1.3))
    return figure
