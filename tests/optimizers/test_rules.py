"""Every optimizer against its published rule, written out here one weight at a time in float64, and against public packages.

Gradients are given, the same for both sides, so that an error shows up as itself and not as another trajectory.
"""

import copy
import functools
import io
import math
import os
import random
import sys
from pathlib import Path

import forks
import pytest
import torch
from shared import ROOT, same
from torch import nn

import optimizers
from engine.hardware import can_compile
from model import GPT, ModelConfig, roles, splits
from optimizers import OPTIMIZERS, build, state_bytes
from optimizers.average import Averaged, build_around
from optimizers.base import Elementwise, Optimizer
from optimizers.elementwise import Lion, RMSprop
from optimizers.kronecker import SOAP, Kron, Shampoo
from optimizers.matrix import Muon, Muown, tiles

STEPS = 20


pytestmark = pytest.mark.usefixtures("one_thread")


def small(**fields) -> GPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=61, sequence_length=16, layers=2, heads=2, width=32, tied_head=False)
    return GPT(ModelConfig(**shape | fields))


def gradient(p: torch.Tensor, step: int, number: int) -> torch.Tensor:
    """Mostly new at every step, with a part that stays: Prodigy's rate grows only along a steady direction."""
    draw = lambda seed: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return 0.1 * draw(1000 * step + number) + 0.05 * draw(10**6 + number)


def give(gpt: nn.Module, step: int) -> None:
    for number, p in enumerate(gpt.parameters()):
        p.grad = gradient(p, step, number).to(p.dtype)


# ---------------------------------------------------------------- the rules, plainly

# Each: (w, gradients, wd, key=value...) -> the weights after every gradient. wd is 0 where the role does not decay.


def signum(w, gradients, wd, lr, momentum):
    m = 0
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        w = w - lr * (m.sign() + wd * w)
    return w


def sgd(w, gradients, wd, lr, momentum, nesterov):
    m = 0
    for g in gradients:
        g = g + wd * w
        m = momentum * m + g
        w = w - lr * (g + momentum * m if nesterov else m)
    return w


def adagrad(w, gradients, wd, lr, initial, eps):
    s = torch.full_like(w, initial)
    for g in gradients:
        g = g + wd * w
        s = s + g**2
        w = w - lr * g / (s.sqrt() + eps)
    return w


def rmsprop(w, gradients, wd, lr, beta2, momentum, eps):
    v = m = 0
    for g in gradients:
        g = g + wd * w
        v = beta2 * v + (1 - beta2) * g**2
        m = momentum * m + g / (v.sqrt() + eps)
        w = w - lr * m
    return w


def adadelta(w, gradients, wd, lr, beta2, eps):
    v = u = torch.zeros_like(w)
    for g in gradients:
        v = beta2 * v + (1 - beta2) * g**2
        d = g * (u + eps).sqrt() / (v + eps).sqrt()
        u = beta2 * u + (1 - beta2) * d**2
        w = (1 - lr * wd) * w - lr * d
    return w


def adam(w, gradients, wd, lr, beta1, beta2, eps, amsgrad):
    m, v, most = 0, 0, torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        g = g + wd * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        most = torch.maximum(most, v)
        w = w - lr * m / (1 - beta1**t) / (((most if amsgrad else v) / (1 - beta2**t)).sqrt() + eps)
    return w


def adamw(w, gradients, wd, lr, beta1, beta2, eps):
    m = v = 0
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = (1 - lr * wd) * w - lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w


def cautious_adamw(w, gradients, wd, lr, beta1, beta2, eps, cautious=True, every=1):
    m = v = 0
    for t in range(1, len(gradients) // every + 1):
        g = sum(gradients[(t - 1) * every : t * every])
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = w - lr * u - lr * wd * torch.where((u * w > 0) | (not cautious), w, 0)
    return w


def nadamp(w, gradients, wd, lr, beta1, beta2, eps, root=2):
    m = v = 0
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        ahead = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
        w = (1 - lr * wd) * w - lr * ahead / ((v / (1 - beta2**t)) ** (1 / root) + eps)
    return w


def generalized_adam(w, gradients, wd, lr, beta1, beta2, eps, nesterov, precondition):
    if precondition and nesterov:
        return nadamp(w, gradients, wd, lr, beta1, beta2, eps)
    m = v = 0
    for t, g in enumerate(gradients, 1):
        if precondition:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            u = m / ((v / (1 - beta2**t)).sqrt() + eps)
        else:
            m = g + beta1 * m
            u = g + beta1 * m if nesterov else m
        w = w - lr * (u + wd * w)
    return w


def amos(w, gradients, wd, lr, beta2, momentum, eps):
    v = b = m = 0.0
    scale = math.sqrt(2 / w[0].numel()) if w.dim() > 1 else 0.5
    for t, g in enumerate(gradients, 1):
        square = (g**2).mean().item()
        v = beta2 * v + (1 - beta2) * square
        inverse = (1 - beta2**t) / (v + eps)
        gamma = (1 + 0.25 * math.sqrt(lr) * b) ** -0.5 * lr**2 * inverse * square
        delta = (lr * scale * math.sqrt(inverse) * g + gamma / 2 * w) / (1 + 0.25 * math.sqrt(lr * scale) * b)
        b = b + gamma * (1 + b)
        m = momentum * m + (1 - momentum) * delta
        w = w - m
    return w


def lion(w, gradients, wd, lr, beta1, beta2):
    m = 0
    for g in gradients:
        w = (1 - lr * wd) * w - lr * (beta1 * m + (1 - beta1) * g).sign()
        m = beta2 * m + (1 - beta2) * g
    return w


def ademamix(w, gradients, wd, lr, beta1, beta2, beta3, alpha, ramp, eps):
    m = slow = v = 0
    half_life = lambda beta: math.log(0.5) / math.log(beta) - 1  # noqa: E731
    for t, g in enumerate(gradients, 1):
        a = min(1, t / ramp)
        now = 0.5 ** (1 / ((1 - a) * half_life(beta1) + a * half_life(beta3) + 1))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        slow = now * slow + (1 - now) * g
        u = (m / (1 - beta1**t) + a * alpha * slow) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = w - lr * (u + wd * w)
    return w


def adopt(w, gradients, wd, lr, beta1, beta2, eps):
    v, m = gradients[0] ** 2, 0
    for n, g in enumerate(gradients[1:], 1):
        u = (g / v.sqrt().clamp(min=eps)).clamp(-(n**0.25), n**0.25)
        m = beta1 * m + (1 - beta1) * u
        w = (1 - lr * wd) * w - lr * m
        v = beta2 * v + (1 - beta2) * g**2
    return w


def mars(w, gradients, wd, lr, beta1, beta2, gamma, eps):
    m = v = before = 0
    for t, g in enumerate(gradients, 1):
        c = g + gamma * beta1 / (1 - beta1) * (g - before)
        c = c / max(1, c.norm().item())
        m, v, before = beta1 * m + (1 - beta1) * c, beta2 * v + (1 - beta2) * c**2, g
        w = (1 - lr * wd) * w - lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w


def schedule_free(w, gradients, wd, lr, beta1, warmup, beta2=None, eps=None):
    """Returns x, where it is evaluated."""
    x = y = z = w
    v, total = 0, 0.0
    for t, g in enumerate(gradients, 1):
        rate = lr * min(1, t / warmup)
        total += rate**2
        u = g
        if beta2 is not None:
            v = beta2 * v + (1 - beta2) * g**2
            u = g / ((v / (1 - beta2**t)).sqrt() + eps)
        z = z - rate * (u + wd * y)
        x = x + rate**2 / total * (z - x)
        y = (1 - beta1) * z + beta1 * x
    return x


ELEMENTWISE = {
    "sgd": (sgd, dict(lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1)),
    "sgd heavy ball": (sgd, dict(lr=0.05, momentum=0.8, nesterov=False, weight_decay=0.1)),
    "sgd without momentum": (sgd, dict(lr=0.05, momentum=0.0, nesterov=True, weight_decay=0.1)),
    "signum": (signum, dict(lr=0.02, momentum=0.8, weight_decay=0.1)),
    "adagrad": (adagrad, dict(lr=0.05, initial=0.01, eps=1e-4, weight_decay=0.1)),
    "rmsprop": (rmsprop, dict(lr=0.02, beta2=0.8, momentum=0.5, eps=1e-3, weight_decay=0.1)),
    "adadelta": (adadelta, dict(lr=2.0, beta2=0.8, eps=1e-3, weight_decay=0.1)),
    "adam": (adam, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, amsgrad=False, weight_decay=0.1)),
    "adam amsgrad": (adam, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, amsgrad=True, weight_decay=0.1)),
    "adamw": (adamw, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3)),
    "cautious_adamw": (cautious_adamw, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3)),
    "cautious_adamw every": (cautious_adamw, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3, every=3)),
    "cautious_adamw plain": (
        cautious_adamw,
        dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3, every=2, cautious=False),
    ),
    "nadamw": (nadamp, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3)),
    "nadamp": (nadamp, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, root=1.5, weight_decay=0.3)),
    "generalized_adam": (
        generalized_adam,
        dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, nesterov=True, precondition=True, weight_decay=0.3),
    ),
    "generalized_adam plain": (
        generalized_adam,
        dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, nesterov=False, precondition=True, weight_decay=0.3),
    ),
    "generalized_adam sgd": (
        generalized_adam,
        dict(lr=0.1, beta1=0.8, beta2=0.7, eps=1e-3, nesterov=True, precondition=False, weight_decay=0.3),
    ),
    "amos": (amos, dict(lr=0.3, beta2=0.9, momentum=0.6, eps=1e-12)),
    "lion": (lion, dict(lr=0.02, beta1=0.8, beta2=0.9, weight_decay=0.3)),
    "ademamix": (
        ademamix,
        dict(lr=0.02, beta1=0.8, beta2=0.7, beta3=0.99, alpha=4.0, ramp=15, eps=1e-3, weight_decay=0.3),
    ),
    "adopt": (adopt, dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3)),
    "mars": (mars, dict(lr=0.02, beta1=0.8, beta2=0.7, gamma=0.1, eps=1e-3, weight_decay=0.3)),
    "schedule_free_adamw": (
        schedule_free,
        dict(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, warmup=5, weight_decay=0.3),
    ),
    "schedule_free_sgd": (schedule_free, dict(lr=0.3, beta1=0.8, warmup=5, weight_decay=0.3)),
}


def spec_of(name: str, keys: dict) -> str:
    return name.split()[0] + ":" + ",".join(f"{key}={value}" for key, value in keys.items())


def run(spec: str, gpt: GPT | None = None, steps: int = STEPS) -> tuple[GPT, dict, torch.optim.Optimizer]:
    """(model after `steps` given gradients at its evaluation weights, float64 weights before, optimizer)."""
    gpt = gpt or small()
    before = {name: p.detach().double().clone() for name, p in gpt.named_parameters()}
    optimizer = build(spec, gpt)
    optimizer.train()
    for step in range(steps):
        give(gpt, step)
        optimizer.step()
    optimizer.eval()
    return gpt, before, optimizer


def error(got: torch.Tensor, right: torch.Tensor, before: torch.Tensor) -> float:
    """Relative to how far the weight has moved."""
    return ((got.double() - right).norm() / (right - before).norm()).item()


def gradients_of(gpt: GPT, steps: int = STEPS) -> dict[str, list[torch.Tensor]]:
    return {
        name: [gradient(p, step, number).double() for step in range(steps)]
        for number, (name, p) in enumerate(gpt.named_parameters())
    }


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_method_is_its_rule(name):
    rule, keys = ELEMENTWISE[name]
    gpt, before, _ = run(spec_of(name, keys))
    role, given = roles(gpt), gradients_of(gpt)
    own = OPTIMIZERS[name.split()[0]].roles
    keys = dict(keys)
    wd = keys.pop("weight_decay", 0.0)
    for parameter, p in gpt.named_parameters():
        decays = wd if role[parameter] in ("matrix", "embedding", "head") else 0.0
        if role[parameter] in own:
            right = rule(before[parameter], given[parameter], decays, **keys)
        else:  # MARS leaves vectors to AdamW
            right = adamw(before[parameter], given[parameter], 0.0, 3e-3, 0.9, 0.95, 1e-8)
        assert error(p, right, before[parameter]) < 1e-5, parameter


def test_every_method_has_its_rule_here():
    elsewhere = {"prodigy", "schedule_free_prodigy", "muon", "muown", "shampoo", "caspr", "soap", "kron"}
    assert {name.split()[0] for name in ELEMENTWISE} | elsewhere == set(OPTIMIZERS)


# ---------------------------------------------------------------- Prodigy: one rate for all weights


def plain_prodigy(ws, gs, wds, lr, beta1, beta2, eps, d0, d_coef, bias_correction, safeguard):
    d, r, ms, vs, ss, starts = d0, 0.0, [0] * len(ws), [0] * len(ws), [0] * len(ws), ws
    rates = []
    for t in range(1, len(gs[0]) + 1):
        hat = lr * (math.sqrt(1 - beta2**t) / (1 - beta1**t) if bias_correction else 1)
        r *= math.sqrt(beta2)
        for i, g in enumerate(gs):
            g = g[t - 1]
            r += d / d0 * d * hat * (g * (starts[i] - ws[i])).sum().item()
            ms[i], vs[i] = beta1 * ms[i] + (1 - beta1) * d * g, beta2 * vs[i] + (1 - beta2) * d**2 * g**2
            ss[i] = math.sqrt(beta2) * ss[i] + d / d0 * d * (1 if safeguard else hat) * g
        new = max(d, d_coef * r / sum(s.abs().sum().item() for s in ss))
        ws = [
            (1 - wd * d * hat) * w - d * hat * m / (v.sqrt() + new * eps) for w, m, v, wd in zip(ws, ms, vs, wds, strict=True)
        ]
        d = new
        rates.append(d)
    return ws, rates


def plain_schedule_free_prodigy(ws, gs, wds, lr, beta1, beta2, eps, d0, d_coef, r, warmup):
    n = len(ws)
    d, numerator, total, vs, ss, starts = d0, 0.0, 0.0, [0] * n, [0] * n, ws
    xs, zs, rates = ws, ws, []
    for t in range(1, len(gs[0]) + 1):
        D = d * lr * min(1, t / warmup)
        numerator *= math.sqrt(beta2)
        for i in range(n):
            g = gs[i][t - 1]
            numerator += d * D * (g * (starts[i] - zs[i])).sum().item()
            vs[i] = beta2 * vs[i] + (1 - beta2) * d**2 * g**2
            ss[i] = math.sqrt(beta2) * ss[i] + d * D * g
        new = max(d, d_coef * numerator / sum(s.abs().sum().item() for s in ss))
        total += t**r
        zs = [
            z - wd * D * x - new * D * g[t - 1] / (v.sqrt() + new * eps)
            for z, x, g, v, wd in zip(zs, xs, gs, vs, wds, strict=True)
        ]
        xs = [x + t**r / total * (z - x) for x, z in zip(xs, zs, strict=True)]
        d = new
        rates.append(d)
    return xs, rates


@pytest.mark.parametrize("safeguard", [True, False])
@pytest.mark.parametrize("free", [False, True])
def test_prodigy_is_its_rule(free, safeguard):
    keys = dict(lr=0.7, beta1=0.8, beta2=0.7, eps=1e-3, d0=1e-3, d_coef=0.5)
    own = dict(r=0.75, warmup=3) if free else dict(bias_correction=safeguard, safeguard=safeguard)
    name, plain = ("schedule_free_prodigy", plain_schedule_free_prodigy) if free else ("prodigy", plain_prodigy)
    gpt, before, optimizer = run(spec_of(name, keys | own | dict(weight_decay=0.1)))
    given, role = gradients_of(gpt), roles(gpt)
    wds = [0.1 if role[name] in ("matrix", "embedding", "head") else 0.0 for name in before]
    right, rates = plain(list(before.values()), list(given.values()), wds, **keys, **own)
    assert rates[-1] > 1.5e-3, "the test must see the rate grow"
    assert optimizer.param_groups[0]["d"].item() == pytest.approx(rates[-1], rel=1e-4)
    for p, w, start in zip(gpt.parameters(), right, before.values(), strict=True):
        assert error(p, w, start) < 1e-4


# ---------------------------------------------------------------- matrix methods: one block at a time


def cut(w: torch.Tensor, split: int, block: int) -> list[torch.Tensor]:
    """Views of the blocks of a weight."""
    pieces = []
    for part in w.chunk(split):
        for a, b in tiles(part.size(0), block):
            pieces += [part[a:b, c:d] for c, d in tiles(part.size(1), block)]
    return pieces


def root_of(A: torch.Tensor, power: float, ridge: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(A)
    return vectors @ torch.diag((values.clamp(min=0) + ridge) ** -power) @ vectors.T


def muon_updates(gs, momentum, nesterov, normuon, normuon_beta2, slow=0, fast=0, fast_share=1, slow_start=99, equal_rows=False):
    m, n, rows = 0, 0, 0
    for t, g in enumerate(gs, 1):
        if t <= slow_start:
            m = n = momentum * m + (1 - momentum) * g
        else:
            m, n = fast * m + (1 - fast) * g, slow * n + (1 - slow) * g
        both = fast_share * m + (1 - fast_share) * n
        u = (1 - momentum) * g + momentum * both if nesterov else both
        u = u / u.norm(dim=1, keepdim=True) if equal_rows else u
        U, _, V = torch.linalg.svd(u, full_matrices=False)
        o = U @ V  # the cubic iteration's limit
        if normuon:
            rows = normuon_beta2 * rows + (1 - normuon_beta2) * (o**2).mean(1, keepdim=True)
            even = o / rows.sqrt()
            o = even * o.norm() / even.norm()
        yield o * max(1, g.size(0) / g.size(1)) ** 0.5


def shampoo_updates(gs, beta1, beta2, eps, exponent, one_sided, every, start, grafting, graft_eps):
    L = R = m = v = 0
    left = right = None
    sides = "LR" if not one_sided else "L" if gs[0].size(0) <= gs[0].size(1) else "R"
    for t, g in enumerate(gs, 1):
        L, R = beta2 * L + (1 - beta2) * g @ g.T, beta2 * R + (1 - beta2) * g.T @ g
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        mean, correction = m / (1 - beta1**t), 1 - beta2**t
        graft = mean / ((v / correction).sqrt() + graft_eps)
        if t < start and grafting == "adam":
            yield graft
            continue
        if left is None or t % every == 0:
            power = exponent * (2 if one_sided else 1)
            left = root_of(L / correction, power, eps) if "L" in sides else torch.eye(len(L)).double()
            right = root_of(R / correction, power, eps) if "R" in sides else torch.eye(len(R)).double()
        u = left @ mean @ right
        if grafting == "rms":
            u = u * 0.04 * math.sqrt(u.size(0) / 768) / u.square().mean().sqrt()
        yield u * graft.norm() / u.norm() if grafting == "adam" else u


def caspr_updates(gs, beta1, beta2, eps, every, start, graft_eps):
    rows, columns = gs[0].shape
    L = before = eps * torch.eye(rows).double()
    R, P, Q = torch.eye(columns).double(), torch.eye(rows).double(), torch.eye(columns).double()
    m = v = 0
    for t, g in enumerate(gs, 1):
        c = 1.0
        if t > 1 and (t - 1) % every == 0:
            ridge = eps * torch.linalg.eigvalsh(before).max()
            c = torch.trace(P @ (before + ridge * torch.eye(rows)) @ P) / rows
            before = L
        R = beta2 * c * R + (1 - beta2) * (P @ g).T @ (P @ g) / rows
        L = beta2 * L + (1 - beta2) * g @ g.T
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        mean = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
        graft = mean / ((v / (1 - beta2**t)).sqrt() + graft_eps)
        if t % every == 0:
            P = root_of(L, 0.5, eps * torch.linalg.eigvalsh(L).max())
            Q = root_of(R, 0.5, eps * torch.linalg.eigvalsh(R).max())
        u = P @ mean @ Q
        yield graft if t <= start else u * graft.norm() / u.norm()


def soap_updates(gs, beta1, beta2, shampoo_beta, eps, every, polar=False, kl=False):
    """The first step only starts the factors and their bases; t counts the steps after it."""
    L, R = (1 - shampoo_beta) * gs[0] @ gs[0].T, (1 - shampoo_beta) * gs[0].T @ gs[0]
    left, right = (torch.linalg.eigh(A)[1].flip(-1) for A in (L, R))
    m = v = torch.zeros_like(gs[0])
    yield m
    for t, g in enumerate(gs[1:], 1):
        rotated = left.T @ g @ right
        m, v = beta1 * m + (1 - beta1) * rotated, beta2 * v + (1 - beta2) * rotated**2
        u = left @ (m / (v.sqrt() + eps)) @ right.T * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        U, _, V = torch.linalg.svd(u, full_matrices=False)
        yield U @ V * max(1, g.size(0) / g.size(1)) ** 0.5 if polar else u
        of_rows, of_columns = (
            (inverse_by(R, right) / len(R), inverse_by(L, left) / len(L)) if kl else map(torch.eye, reversed(g.shape))
        )
        L, R = (
            shampoo_beta * L + (1 - shampoo_beta) * g @ of_rows.double() @ g.T,
            shampoo_beta * R + (1 - shampoo_beta) * g.T @ of_columns.double() @ g,
        )
        if t % every == 0:
            m = left @ m @ right.T
            turned = []
            for A, Q, dim in ((L, left, 0), (R, right, 1)):
                order = (Q.T @ A @ Q).diagonal().argsort(descending=True)
                v = v.index_select(dim, order)
                turned.append(torch.linalg.qr(A @ Q[:, order])[0])
            left, right = turned
            m = left.T @ m @ right


def inverse_by(A, basis):
    """A^-1 if the basis were A's eigenvectors; eigenvalues lifted by a thousandth of the largest."""
    values = (basis.T @ A @ basis).diagonal()
    return basis @ torch.diag(1 / (values + 1e-3 * values.max())) @ basis.T


def kron_updates(gs, ids, beta1, rate, flat, least_probability, scale, clip):
    left, right = (scale**0.5 * torch.eye(n).double() for n in gs[0].shape)
    m = 0

    def bound(A):
        A, most = A / A.abs().max(), A.abs().max()
        row = A[A.norm(dim=1).argmax()]
        x = row @ A
        return most * (x / x.norm() @ A).norm()

    for t, g in enumerate(gs, 1):
        m = beta1 * m + (1 - beta1) * g
        mean = m / (1 - beta1**t)
        dice = random.Random(t)
        if dice.random() < max(least_probability, min(1, math.exp(-0.001 * (t - 1 - flat)))):
            if dice.random() < 0.01:
                a, b = left.abs().max(), right.abs().max()
                left, right = left * (b / a) ** 0.5, right * (a / b) ** 0.5
            V = noise(mean, t, ids)
            A = left @ mean @ right.T
            B = torch.linalg.inv(left).T @ V @ torch.linalg.inv(right)
            both = A @ A.T, B @ B.T, A.T @ A, B.T @ B
            left = left - rate * torch.triu(both[0] - both[1]) @ left / bound(both[0] + both[1])
            right = right - rate * torch.triu(both[2] - both[3]) @ right / bound(both[2] + both[3])
        u = left.T @ left @ mean @ right.T @ right
        yield u * min(1, clip / u.square().mean().sqrt().item())


def noise(like: torch.Tensor, t: int, block: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(99 * t + block)).double()


COMMON = dict(lr=0.02, weight_decay=0.3)
SHAMPOO = dict(
    beta1=0.8, beta2=0.7, eps=1e-8, exponent=0.25, one_sided=False, every=3, start=4, grafting="adam", graft_eps=1e-3
)
MATRIX = {
    # rule, its keys, keys that only choose the numerics, tolerance
    "muon": (muon_updates, dict(momentum=0.8, nesterov=True, normuon=False, normuon_beta2=0.9), 1e-4),
    "muon normuon": (muon_updates, dict(momentum=0.8, nesterov=False, normuon=True, normuon_beta2=0.9), 1e-4),
    "shampoo": (shampoo_updates, SHAMPOO, 1e-4),
    "shampoo one-sided": (shampoo_updates, SHAMPOO | dict(one_sided=True, exponent=0.2), 1e-4),
    "shampoo ungrafted": (shampoo_updates, SHAMPOO | dict(grafting="none", exponent=0.5, eps=1e-4), 1e-4),
    "muon two averages": (
        muon_updates,
        dict(momentum=0.8, nesterov=True, normuon=False, normuon_beta2=0.9, slow=0.95, fast=0.7, fast_share=0.4, slow_start=4),
        1e-4,
    ),
    "muon equal rows": (
        muon_updates,
        dict(momentum=0.8, nesterov=True, normuon=False, normuon_beta2=0.9, equal_rows=True),
        1e-4,
    ),
    "shampoo rms": (shampoo_updates, SHAMPOO | dict(grafting="rms", exponent=1 / 3, eps=1e-4, start=1), 1e-4),
    "caspr": (caspr_updates, dict(beta1=0.8, beta2=0.7, eps=1e-4, every=3, start=4, graft_eps=1e-3), 1e-4),
    "soap": (soap_updates, dict(beta1=0.8, beta2=0.7, shampoo_beta=0.9, eps=1e-3, every=3), 1e-4),
    "soap kl": (soap_updates, dict(beta1=0.8, beta2=0.7, shampoo_beta=0.9, eps=1e-3, every=3, kl=True), 1e-4),
    "kron": (kron_updates, dict(beta1=0.8, rate=0.1, flat=5, least_probability=0.2, scale=1.5, clip=0.5), 1e-4),
}


@pytest.mark.parametrize(("name", "block"), [(n, block) for n in MATRIX for block in ((0,) if "muon" in n else (16, 24))])
def test_matrix_method_is_its_rule(name, block, monkeypatch):
    """1e-4: products and eigenvectors in fp32 against fp64, over 12 steps. 16 makes every block square, 24 none."""
    rule, keys, tolerance = MATRIX[name]
    extra = dict(block=block)
    if rule is muon_updates:
        extra = dict(coefficients="cubic", steps=30, dtype="fp32")
    if rule is soap_updates:  # the null space of one gradient's factor has no basis of its own: give both sides the same
        eigh = torch.linalg.eigh
        ramp = lambda A: torch.diag(torch.arange(A.size(-1), dtype=A.dtype))  # noqa: E731
        monkeypatch.setattr(torch.linalg, "eigh", lambda A: eigh(A + ramp(A)))
    drawn = lambda m, t, ids: torch.stack([noise(row, t, i) for row, i in zip(m, ids, strict=True)]).float()  # noqa: E731
    monkeypatch.setattr(Kron, "probe", staticmethod(drawn))
    gpt, before, _ = run(spec_of(name, COMMON | keys | extra), steps=12)
    role, split, given = roles(gpt), splits(gpt), gradients_of(gpt, 12)
    number = 0
    # blocks are numbered in the order of the param groups: by how many matrices are fused
    for parameter, p in sorted(gpt.named_parameters(), key=lambda item: split.get(item[0], 1)):
        if role[parameter] != "matrix":
            right = adamw(before[parameter], given[parameter], 0.0, 3e-3, 0.9, 0.95, 1e-10)
            assert error(p, right, before[parameter]) < 5e-5, parameter
            continue
        right, n = before[parameter].clone(), split.get(parameter, 1)
        blocks = [cut(g, n, block) for g in given[parameter]]
        for i, target in enumerate(cut(right, n, block)):
            own = (number + i,) if rule is kron_updates else ()
            for u in rule([step[i] for step in blocks], *own, **keys):
                target.mul_(1 - 0.02 * 0.3).sub_(0.02 * u)
        number += len(blocks[0])
        assert error(p, right, before[parameter]) < tolerance, parameter


def test_a_sphere_keeps_the_size_and_the_other_levers_of_muon(capsys):
    """Against plain float64: the sphere's rule for both sizes, from zeros too; Muon+ where the iteration has not ended."""
    torch.manual_seed(0)
    for sphere, m, n, zero in (
        ("frobenius", 8, 6, False),
        ("frobenius", 8, 6, True),
        ("spectral", 6, 9, False),
        ("spectral", 6, 9, True),
    ):
        w = nn.Parameter(torch.zeros(m, n) if zero else torch.randn(m, n))
        size = (lambda x: x.norm()) if sphere == "frobenius" else lambda x: torch.linalg.matrix_norm(x, 2)
        R = math.sqrt(m / n) if sphere == "spectral" else 0.02 * math.sqrt(m * n) if zero else w.detach().double().norm()
        right, momentum = w.detach().double(), 0
        muon = Muon([w], lr=0.1, weight_decay=0.5, sphere=sphere, steps=30, coefficients="cubic", dtype="fp32", nesterov=False)
        for step in range(6):
            w.grad = gradient(w, step, 0)
            muon.step()
            momentum = 0.95 * momentum + 0.05 * w.grad.double()
            U, _, V = torch.linalg.svd(momentum, full_matrices=False)
            right = right - 0.1 * R * (U @ V) / size(U @ V)
            right = right * (R / size(right))
            torch.testing.assert_close(w.detach().double(), right, atol=2e-4, rtol=2e-3)
            near = 2e-3 if sphere == "spectral" else 1e-5  # power iterations
            assert float(size(w.detach().double())) == pytest.approx(float(R), rel=near)
    G = torch.randn(3, 8, 5)
    muon = Muon([nn.Parameter(torch.zeros(24, 5))], fixed_norm=True, dtype="fp32", nesterov=False, scale="none")
    u = muon.update(muon.param_groups[0] | {"t": 1}, {"momentum": torch.zeros(3, 8, 5)}, G, [0, 1, 2])
    torch.testing.assert_close(u.norm(dim=(1, 2)), torch.full((3,), math.sqrt(5)))
    assert torch.linalg.svdvals(u).std() > 0.01, "the iteration had ended: nothing was tested"


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_muown_moves_gain_and_direction_each_by_its_own_gradient(shape):
    """By autograd through W = g unit(V), in float64."""
    torch.manual_seed(1)
    w = nn.Parameter(torch.randn(shape))
    with torch.no_grad():
        w[2] = 0
    muown = Muown([w], lr=0.05, steps=30, coefficients="cubic", dtype="fp32")
    g, V = w.detach().double().norm(dim=1, keepdim=True), w.detach().double()
    momentum = m = v = 0
    for step in range(1, 9):
        w.grad = gradient(w, step, 0)
        G = w.grad.double()
        if step == 1:
            V[2] = -G[2] / G[2].norm() * 0.02 * math.sqrt(shape[1])
        muown.step()
        g.requires_grad_(True), V.requires_grad_(True)
        (g * V / V.norm(dim=1, keepdim=True) * G).sum().backward()
        of_gain, of_direction = g.grad, V.grad
        with torch.no_grad():
            momentum = 0.95 * momentum + 0.05 * of_direction
            U, S, Vh = torch.linalg.svd(0.05 * of_direction + 0.95 * momentum, full_matrices=False)
            U = U * (S > 1e-9)  # the row of zeros has no gradient across its direction in the first step
            m, v = 0.9 * m + 0.1 * of_gain, 0.95 * v + 0.05 * of_gain**2
            g = (g - 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)).clamp(min=1e-8).detach()
            V = (V - 0.05 * 0.2 * math.sqrt(max(shape)) * U @ Vh).detach()
            torch.testing.assert_close(w.detach().double(), g * V / V.norm(dim=1, keepdim=True), atol=1e-4, rtol=1e-3)


def test_cautious_decay_shrinks_only_where_the_update_does():
    w = nn.Parameter(torch.randn(8, 8))
    start = w.detach().clone()
    w.grad = torch.randn(8, 8)
    settings = dict(lr=0.1, steps=30, coefficients="cubic", dtype="fp32")
    plain = nn.Parameter(start.clone())
    plain.grad = w.grad
    Muon([w], weight_decay=0.5, cautious=True, **settings).step()
    Muon([plain], weight_decay=0.0, **settings).step()
    u = (start - plain.detach()) / 0.1
    torch.testing.assert_close(w.detach(), start - 0.1 * u - 0.05 * start * (u * start >= 0), atol=1e-6, rtol=0)


def test_shampoo_without_averages_is_the_polar_factor():
    """One step, no momentum, no graft: (G G^T)^-1/4 G (G^T G)^-1/4 = U V^T, what Muon iterates towards."""
    torch.manual_seed(3)
    G = torch.randn(24, 24)
    w = nn.Parameter(torch.zeros(24, 24))
    w.grad = G.clone()
    Shampoo([w], lr=1.0, beta1=0.0, grafting="none", eps=1e-14, weight_decay=0.0).step()
    U, _, V = torch.linalg.svd(G)
    torch.testing.assert_close(-w.detach(), U @ V, atol=1e-3, rtol=0)


def test_soap_in_the_identity_basis_is_adam():
    torch.manual_seed(4)
    w, start = nn.Parameter(torch.randn(8, 12)), None
    soap = SOAP([w], lr=0.05, beta1=0.8, beta2=0.7, eps=1e-3, every=1000, weight_decay=0.0)
    gradients = [torch.randn(8, 12) for _ in range(7)]
    for t, g in enumerate(gradients):
        w.grad = g
        if t == 1:
            start = w.detach().double().clone()
            (blocks,) = soap.state[w]["blocks"].values()
            for side in ("left_basis", "right_basis"):
                blocks[side].copy_(torch.eye(len(blocks[side])))
        soap.step()
    m = v = 0
    right = start
    for t, g in enumerate(gradients[1:], 1):
        m, v = 0.8 * m + 0.2 * g.double(), 0.7 * v + 0.3 * g.double() ** 2
        # SOAP adds eps before the bias correction
        right = right - 0.05 * m / (1 - 0.8**t) / ((v.sqrt() + 1e-3) / math.sqrt(1 - 0.7**t))
    torch.testing.assert_close(w.detach().double(), right, atol=1e-5, rtol=0)


def test_soap_starts_a_block_at_its_first_gradient_that_is_not_zero():
    """As if the steps before had not been: those of a model whose head and projections start at zero. Saved between them."""
    torch.manual_seed(5)
    start, gradients = torch.randn(24, 12), [torch.randn(24, 12) for _ in range(9)]

    def trained(first_zeros: list[int], save_at: int = -1) -> torch.Tensor:
        """first_zeros: of the gradients of the upper and of the lower block, how many zeros come before the others."""
        w = nn.Parameter(start.clone())
        make = lambda: SOAP([w], lr=0.05, beta1=0.8, beta2=0.7, every=3, block=12, weight_decay=0.0)  # noqa: E731
        soap = make()
        for t in range(9 + max(first_zeros)):
            w.grad = torch.zeros(24, 12)
            for rows, zeros in zip((slice(0, 12), slice(12, 24)), first_zeros, strict=True):
                if 0 <= t - zeros < 9:
                    w.grad[rows] = gradients[t - zeros][rows]
            soap.step()
            if t == save_at:
                saved, soap = soap.state_dict(), make()
                soap.load_state_dict(saved)
        return w.detach()

    right = trained([0, 0])
    assert not torch.equal(right, start)
    for zeros, save_at in (([3, 3], -1), ([6, 6], 4), ([6, 6], 8)):
        torch.testing.assert_close(trained(zeros, save_at), right, atol=1e-6, rtol=0)
    # the block that began earlier goes on: its zero gradients at the end are its own
    torch.testing.assert_close(trained([3, 0])[:12], right[:12], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- public packages


def other(package: str, name: str, **keys):
    """Constructor of a public package's optimizer over decayed and not decayed parameters; skips where it is missing."""
    module = pytest.importorskip(package)
    return lambda gpt, wd: getattr(module, name)(
        [dict(g, params=g["params"]) for g in optimizers.base.decay_groups(gpt, wd)], **keys
    )


ADAM = dict(betas=(0.8, 0.7), eps=1e-3)
PUBLIC = {
    # ours: package, class, its keys. Left out: pytorch_optimizer.ADOPT, whose clip counts one step more than the authors'
    "rmsprop": ("torch.optim", "RMSprop", dict(lr=0.02, alpha=0.8, momentum=0.5, eps=1e-3)),
    "adadelta": ("torch.optim", "Adadelta", dict(lr=2.0, rho=0.8, eps=1e-3)),
    "lion": ("pytorch_optimizer", "Lion", dict(lr=0.02, betas=(0.8, 0.9), weight_decouple=True)),
    "schedule_free_adamw": ("schedulefree", "AdamWScheduleFree", dict(lr=0.02, warmup_steps=5, **ADAM)),
    "schedule_free_sgd": ("schedulefree", "SGDScheduleFree", dict(lr=0.3, momentum=0.8, warmup_steps=5)),
    "prodigy": (
        "prodigyopt",
        "Prodigy",
        dict(lr=0.7, d0=1e-3, d_coef=0.5, use_bias_correction=True, safeguard_warmup=True, **ADAM),
    ),
}
PUBLIC_KEYS = {name: dict(ELEMENTWISE[name][1]) for name in PUBLIC if name in ELEMENTWISE}
PUBLIC_KEYS["adadelta"]["weight_decay"] = 0.0  # torch's is coupled
PUBLIC_KEYS["prodigy"] = dict(lr=0.7, beta1=0.8, beta2=0.7, eps=1e-3, d0=1e-3, d_coef=0.5, weight_decay=0.1)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_package_gives_the_same(name, capsys):
    package, cls, theirs = PUBLIC[name]
    gpt, before, _ = run(spec_of(name, PUBLIC_KEYS[name]))
    twin = small()
    optimizer = other(package, cls, **theirs)(twin, PUBLIC_KEYS[name]["weight_decay"])
    getattr(optimizer, "train", lambda: None)()
    for step in range(STEPS):
        give(twin, step)
        optimizer.step()
    getattr(optimizer, "eval", lambda: None)()
    for (parameter, p), q in zip(gpt.named_parameters(), twin.parameters(), strict=True):
        assert error(p, q.detach().double(), before[parameter]) < 1e-4, parameter


# ---------------------------------------------------------------- averages, evaluation weights


TAIL = "tail_ema:decay=0.7,every=2,start=4,blend=0.6"


@pytest.mark.parametrize("average", ["lawa_queue:length=3,every=2,start=4", "lawa_ema:decay=0.7,every=2,start=4", TAIL])
def test_average_is_the_explicit_one(average):
    gpt, twin = small(), small()
    averaged, plain = build("adamw", gpt, average=average), build("adamw", twin)
    kept = []
    for step in range(12):
        for model, optimizer in ((gpt, averaged), (twin, plain)):
            give(model, step)
            optimizer.step()
        if step + 1 in (6, 8, 10, 12):
            kept.append([p.detach().clone() for p in twin.parameters()])
    averaged.eval()
    averaged.eval()  # once more does no harm
    for i, p in enumerate(gpt.parameters()):
        if "queue" in average:
            right = sum(w[i] for w in kept[-3:]) / 3
        else:
            right = kept[0][i]
            for w in kept[1:]:
                right = 0.7 * right + 0.3 * w[i]
            right = 0.4 * kept[-1][i] + 0.6 * right if average == TAIL else right
        torch.testing.assert_close(p.detach(), right, atol=1e-6, rtol=1e-5)
    averaged.train()
    assert all(torch.equal(p, q) for p, q in zip(gpt.parameters(), twin.parameters(), strict=True))


def test_ema_nesterov_is_its_rule():
    """Around SGD on a bowl, in float64 beside it; with an average of the same x."""
    a, b = nn.Parameter(torch.tensor([3.0, -2.0])), nn.Parameter(torch.tensor([1.0]))
    around = build_around("ema_nesterov:beta=0.5,decay=0.8,start=2,stop=7", "tail_ema:decay=0.5,start=3,blend=0.25", 10)
    optimizer = Averaged(torch.optim.SGD([dict(params=[a, b], initial_lr=0.2)], lr=0.1), *around)
    x, m, ema = torch.tensor([3.0, -2.0, 1.0]).double(), 0, None
    ahead = x
    for t in range(1, 11):
        for p in (a, b):
            p.grad = 2 * p.detach()
        optimizer.step()
        before, x = x, ahead - 0.1 * 2 * ahead
        m = 0.8 * m + 0.2 * (x - before) if t > 3 else 0
        ahead = x + 0.5 * 0.5 * m if t <= 7 else x
        ema = (x if ema is None else 0.5 * ema + 0.5 * x) if t > 3 else None
        torch.testing.assert_close(torch.cat([a, b]).detach().double(), ahead, atol=1e-6, rtol=1e-6)
        optimizer.eval()
        torch.testing.assert_close(
            torch.cat([a, b]).detach().double(), x if ema is None else 0.75 * x + 0.25 * ema, atol=1e-6, rtol=1e-6
        )
        optimizer.train()


SWAPPING = [
    "muon lawa_queue ema_nesterov:start=65,stop=80",
    "adamw tail_ema:start=65",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedule_free_prodigy",
    "adamw lawa_ema:decay=0.7",
    "muon lawa_queue",
]


@pytest.mark.parametrize("words", SWAPPING)
def test_evaluation_leaves_training_as_it_was(words):
    spec, average, outer = (words.split() + ["none"] * 2)[:3]
    make = lambda gpt: build(spec + (":dtype=fp32" if spec == "muon" else ""), gpt, average=average, outer=outer)  # noqa: E731
    gpt, twin, third = small(), small(), small()
    one, two = make(gpt), make(twin)
    saved = None
    for step in range(60, 90):
        for model, optimizer in ((gpt, one), (twin, two)):
            optimizer.train()
            give(model, step)
            optimizer.step()
        if step % 3 == 0:
            two.eval()
        if step == 81:  # a checkpoint made in eval mode
            saved = {k: v.clone() for k, v in twin.state_dict().items()}, copy.deepcopy(two.state_dict())
    one.train(), two.train()
    third.load_state_dict(saved[0])
    three = make(third)
    three.load_state_dict(saved[1])
    three.train()
    for step in range(82, 90):
        give(third, step)
        three.step()
    for p, q, r in zip(gpt.parameters(), twin.parameters(), third.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_schedule_free_refuses_a_step_at_its_evaluation_weights():
    gpt = small()
    optimizer = build("schedule_free_sgd", gpt)
    give(gpt, 0)
    optimizer.step()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="train"):
        optimizer.step()


# ---------------------------------------------------------------- traps


def test_momentum_may_begin_at_zero():
    """And be moved from there by a schedule: RMSprop keeps no average as long as there is none to keep."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = RMSprop([p], lr=1.0, beta2=0.0, momentum=0.0, eps=0.0, weight_decay=0.0)
    moved = []
    for momentum in (0.0, 0.5, 0.5):
        optimizer.param_groups[0]["momentum"] = momentum
        before, p.grad = p.detach().clone(), torch.ones(4)
        optimizer.step()
        moved.append((before - p.detach())[0].item())
    assert moved == pytest.approx([1.0, 1.0, 1.5])


@pytest.mark.parametrize("spec", ["ademamix:beta1=0", "ademamix:beta3=0", "ademamix:beta1=0,beta3=0"])
def test_no_fast_average_is_no_error(spec):
    """The paper's variant that saves memory has beta1 = 0."""
    gpt, before, _ = run(spec)
    assert all(p.isfinite().all() and not torch.equal(p, before[n]) for n, p in gpt.named_parameters())


def test_averages_are_kept_in_fp32():
    """In bf16 a hundredth of a step of 0.25 would be rounded away, each time."""
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    averaged = Averaged(torch.optim.SGD([w], lr=0.0), *build_around("none", "lawa_ema:decay=0.99", 1000))
    w.grad = torch.zeros_like(w)
    averaged.step()
    w.data.fill_(1.25)
    for _ in range(1000):
        averaged.step()
    averaged.eval()
    assert w.tolist() == pytest.approx([1.25] * 3, abs=0.01)


@pytest.mark.parametrize(
    ("name", "own"), [("sgd", {}), ("sgd", {"momentum": 0}), ("sgd", {"nesterov": False}), ("adagrad", {}), ("adamw", {})]
)
def test_torchs_methods_move_bf16_weights(name, own):
    """As fp32 weights, but for rounding: torch 2.13's fused SGD leaves 16 and more of them as they are (pytorch#191763)."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 96, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    start, optimizers = p.detach().clone(), [OPTIMIZERS[name]([w], lr=0.1, **own) for w in (p, q)]
    for optimizer, w in zip(optimizers, (p, q), strict=True):
        for _ in range(3):
            w.grad = torch.full_like(w, 0.5)
            optimizer.step()
    assert (p - start).abs().min() > 0.1
    torch.testing.assert_close(q.detach().float(), p.detach(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", [name for name, cls in OPTIMIZERS.items() if issubclass(cls, Optimizer)])
def test_bf16_weights_keep_fp32_state(name):
    """Our own methods; torch's keep the type of the weight, and AdamW for the rest is torch's."""
    p, q = nn.Parameter(torch.randn(8, 12)), None
    q = nn.Parameter(p.detach().bfloat16())
    p.data.copy_(q.detach())
    own = OPTIMIZERS[name].of_length(1000)
    own |= {key: 1 for key in ("start", "every") if key in own}
    if name == "muon":
        own["dtype"] = "fp32"
    one, two = OPTIMIZERS[name]([p], **own), OPTIMIZERS[name]([q], **own)
    for step in range(3):
        q.grad = gradient(q, step, 0).bfloat16()
        p.grad = q.grad.float()
        p.data.copy_(q.detach())
        one.step()
        two.step()
        torch.testing.assert_close(q.detach(), p.detach().bfloat16(), atol=1e-2, rtol=1e-2)
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file))
    assert same(two.state_dict(), torch.load(io.BytesIO(file.getvalue())))  # not rounded on its way
    q.grad = gradient(q, 3, 0).bfloat16()
    two.step()

    def types(value) -> set:
        if isinstance(value, torch.Tensor):
            return {value.dtype}
        return set().union(*map(types, value.values())) if isinstance(value, dict) else set()

    assert types(dict(two.state)) == {torch.float32}
    assert torch.isfinite(q).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_missing_and_zero_gradients(name):
    gpt = small(tied_head=True)
    keys = [key for key in ("weight_decay", "adamw_weight_decay") if hasattr(OPTIMIZERS[name], key)]
    optimizer = build(name + ":" * bool(keys) + ",".join(f"{key}=0" for key in keys), gpt)
    idle = {gpt.blocks[0].mlp.up.weight, gpt.blocks[1].norm1.weight}
    zero = {gpt.blocks[0].mlp.projection.weight, gpt.positions.weight}
    before = {p: p.detach().clone() for p in gpt.parameters()}
    for step in range(14):
        give(gpt, step)
        for p in idle:
            p.grad = None
        for p in zero:
            p.grad.zero_()
        optimizer.step()
    for p in gpt.parameters():
        assert torch.isfinite(p).all()
        if p in idle or (p in zero and name not in ("amos",)):  # Amos shrinks by itself
            assert torch.equal(p, before[p])
        elif p not in zero:
            assert not torch.equal(p, before[p])


@pytest.mark.parametrize("name", ["shampoo", "caspr", "soap", "kron", "muon"])
def test_gradients_of_rank_one_stay_finite(name):
    w = nn.Parameter(torch.randn(24, 40))
    optimizer = OPTIMIZERS[name]([w], **OPTIMIZERS[name].of_length(1000))
    for step in range(25):
        w.grad = torch.outer(torch.randn(24), torch.randn(40)) * (0 if step % 7 == 6 else 1e-3)
        optimizer.step()
        assert torch.isfinite(w).all()


def test_a_root_survives_eigh_failing(monkeypatch):
    def broken(A):
        raise torch.linalg.LinAlgError("did not converge")

    w = nn.Parameter(torch.ones(6, 9))
    shampoo = Shampoo([w], start=1, every=1)
    torch.manual_seed(0)
    for step in range(3):
        w.grad = torch.randn(6, 9)
        with monkeypatch.context() as patched:
            if step == 2:
                patched.setattr(torch.linalg, "eigh", broken)
                (blocks,) = shampoo.state[w]["blocks"].values()
                old = blocks["left_root"].clone()
            shampoo.step()
    assert torch.equal(blocks["left_root"], old) and torch.isfinite(w).all()


def test_grafted_blocks_have_the_size_of_adams():
    torch.manual_seed(5)
    w = nn.Parameter(torch.zeros(20, 32))
    shampoo = Shampoo([w], lr=1.0, beta1=0.0, beta2=0.5, weight_decay=0.0, start=1, every=1, block=16)
    w.grad = torch.randn(20, 32)
    shampoo.step()
    for block, g in zip(cut(w.detach(), 1, 16), cut(w.grad, 1, 16), strict=True):
        assert block.norm().item() == pytest.approx((g / (g.abs() + 1e-8)).norm().item(), rel=1e-4)


def test_a_vocabulary_is_cut_into_blocks():
    w = nn.Parameter(torch.randn(5000, 16))
    w.grad = torch.randn(5000, 16)
    shampoo = Shampoo([w], block=64)
    shampoo.step()
    assert state_bytes(shampoo) < 12 * 64 * w.numel() / 16 * 4  # whole, its left factor alone would be 100 MB


def test_strided_weights_and_single_numbers():
    base = torch.randn(6, 10)
    strided, plain, scalar = nn.Parameter(base.t()), nn.Parameter(base.t().contiguous()), nn.Parameter(torch.tensor(2.0))
    assert not strided.is_contiguous()
    a, b = Lion([strided, scalar], lr=0.1), Lion([plain], lr=0.1)
    strided.grad = torch.randn(10, 6)
    plain.grad, scalar.grad = strided.grad.clone(), torch.tensor(3.0)
    a.step()
    b.step()
    assert torch.equal(strided, plain) and scalar.item() == pytest.approx(2 - 0.1 * (1 + 0.5 * 2))


def test_pieces_do_not_change_the_result(monkeypatch):
    torch.manual_seed(6)
    shapes = [(700, 300), (17,), (5, 9), (64, 64)]
    results = []
    for size in (100, 10**9):
        monkeypatch.setattr(optimizers.base, "PIECE", size)
        torch.manual_seed(7)
        ws = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        lion_ = Lion(ws)
        for _ in range(2):
            for w in ws:
                w.grad = torch.randn(w.shape)
            lion_.step()
        results.append(ws)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


FUSED = [name for name, cls in OPTIMIZERS.items() if issubclass(cls, Elementwise)]


VARIANTS = ["rmsprop:momentum=0.9", "generalized_adam:precondition=false"]
EARLY = ("prodigy", "schedule_free_prodigy")  # from 1e-6 the first steps are too short to compare
RULES = [*(f"{n}:d0=0.01" if n in EARLY else n for n in FUSED), *VARIANTS]
# signs, masks, roots and a clamp, two sweeps: C++ takes seven seconds a rule, tracing does not
IN_CPP = ("signum", "cautious_adamw", "mars", "prodigy:d0=0.01")


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler and Python's headers")
@pytest.mark.parametrize("name", IN_CPP)
@pytest.mark.slow
def test_compiled_update_is_the_same(name):
    """The rule fused by Inductor."""
    check_compiled(name)


@pytest.mark.parametrize("name", [name for name in RULES if name not in IN_CPP])
def test_update_is_one_graph(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("optimizers.base.can_compile", lambda device: True)
    check_compiled(name)


def check_compiled(name: str) -> None:
    """For tensors of several sizes and at changing numbers, against the rule in pieces; all graphs are made beforehand."""
    results, compilations = [], []
    torch._dynamo.reset()
    for fused in (False, True):
        torch.manual_seed(0)
        gpt = nn.Module()
        gpt.a, gpt.b, gpt.small = (nn.Parameter(torch.randn(s) * 0.01) for s in ((256, 100), (300, 256), (12, 12)))
        before = [p.detach().double().clone() for p in gpt.parameters()]
        optimizer = build(name, gpt)
        if fused:
            optimizers.compile_update(optimizer)
            compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / 10)
            give(gpt, step)
            optimizer.step()
        optimizer.eval()
        results.append([p.detach() for p in gpt.parameters()])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations[0], "compiled in a step"
    assert all(part.compiled for part in optimizers.parts(optimizer) if isinstance(part, Elementwise))
    for eager, compiled, start in zip(*results, before, strict=True):
        assert error(compiled, eager.double(), start) < 1e-5


# ---------------------------------------------------------------- ranks

RANKS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests", sys.argv[2] + "/tests/optimizers"]
import optimizers
from engine.checkpoint import Checkpoints, newest
from test_rules import SHARED, give, small
folder, rank, world = sys.argv[1], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
for number, spec in enumerate(SHARED):
    if world == 8 and number % 2:  # eight ranks on two cores: a Muon, a Shampoo and Kron are enough
        continue
    saved = Checkpoints(Path(folder, f"saved-{number}"))
    for how in ("run", "resume") if world in (1, 2) else ("run",):
        gpt = small()
        optimizer = optimizers.build(spec, gpt)
        first = 0
        if how == "resume":
            state, _, _ = saved.load(newest(saved.folder)[0], gpt, optimizer.state_dict())
            optimizer.load_state_dict(state)
            first = 5
        for step in range(first, 9):
            give(gpt, step)
            optimizer.step()
            if step == 4 and world == 4:
                if rank == 0:
                    saved.folder.mkdir()
                about = dict(config="", data="", source="", log_bytes=0, progress={"step": 5})
                saved.save(5, gpt, optimizer.state_dict(), [], about)
                saved.wait()
        torch.save([gpt.state_dict(), optimizers.state_bytes(optimizer)], f"{folder}/{how}-{world}-{rank}-{number}.pt")
if world > 1:
    dist.destroy_process_group()
"""
SHARED = {  # SPEC -> how far the weights may differ, relative to how far they have moved
    "muon:dtype=fp32,normuon=true,slow=0.98,slow_start=3,equal_rows=true,sphere=spectral": 1e-5,
    "muon:dtype=bf16": 0.04,
    "shampoo:start=3,every=4,block=16": 1e-5,
    "soap:every=4,block=16,kl=true,sphere=frobenius": 1e-5,
    "kron:block=16,flat=5,least_probability=0.5": 1e-5,
    "caspr:start=3,every=4,block=16": 1e-5,
    "muown:dtype=fp32,steps=12": 1e-5,
}


def launch(folder: Path, world: int) -> None:
    (folder / "rank.py").write_text(RANKS)
    commands = [[sys.executable, "rank.py", str(folder), str(ROOT), str(rank), str(world)] for rank in range(world)]
    processes = [forks.Popen(c, cwd=folder, env=os.environ | dict(OMP_NUM_THREADS="1")) for c in commands]
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-2000:]


@pytest.mark.slow
def test_ranks_share_the_work_and_agree(tmp_path):
    """1, 2, 4 and 8 ranks: the same weights, state divided; a checkpoint of 4 ranks continues on 1 and on 2."""
    for world in (4, 1, 2, 8):
        launch(tmp_path, world)
    load = lambda *words: torch.load(tmp_path / ("-".join(map(str, words)) + ".pt"))  # noqa: E731
    start, role = small().state_dict(), roles(small())
    for number, (spec, tolerance) in enumerate(SHARED.items()):
        alone, whole = load("run", 1, 0, number)
        eight = [("run", 8)] if number % 2 == 0 else []
        for how, world in (("run", 2), ("run", 4), *eight, ("resume", 1), ("resume", 2)):
            weights, _ = load(how, world, 0, number)
            for name, w in weights.items():
                moved = (alone[name] - start[name]).norm()
                assert (w - alone[name]).norm() <= tolerance * moved + 1e-7 * alone[name].norm(), (spec, how, world, name)
            own = [load(how, world, rank, number) for rank in range(world)]
            assert all(torch.equal(other[name], w) for other, _ in own for name, w in weights.items())
        rest = 8 * sum(p.numel() for n, p in small().named_parameters() if role[n] != "matrix")
        most = 8 if eight else 4
        parts = [load("run", most, rank, number)[1] - rest for rank in range(most)]
        assert max(parts) < (0.3 if eight else 0.5) * (whole - rest), spec
