"""Methods that need no learning-rate schedule: Schedule-Free, and Prodigy, which finds the rate itself.

Schedule-Free methods are evaluated at other weights than they train at: call `eval()` before validation and checkpoints
and `train()` after.
"""

import math
from dataclasses import dataclass

import torch

from optimizers.base import Elementwise, Settings, Swapped, average_squares, denominator, evaluate, hyper


@dataclass(frozen=True)
class ScheduleFreeSettings(Settings):
    """y = (1 - b) z + b x, where g is taken;  z <- z - lr (u + wd y), u = g or Adam's g / (sqrt(v^) + eps);
    x <- (1 - c) x + c z with c = lr^2 / (sum of lr^2 so far). Trains at y, evaluates at x.

    Source: arXiv 2405.15682, github.com/facebookresearch/schedule_free. Wants a constant schedule: its warm-up is a key.
    """

    lr: float = hyper(1e-2, "learning rate", (1e-3, 1e-1, "log"))
    beta1: float = hyper(0.9, "b: where between z and x the gradient is taken", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    warmup: float = hyper(0.05, "steps of linear warm-up; below 1: fraction of the run", (0.0, 0.2, "linear"))
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))


class ScheduleFreeAdamW(Swapped, Elementwise):
    """See ScheduleFreeSettings."""

    settings, buffers = ScheduleFreeSettings, ("z", "squares")
    schedule_free = True

    def initialise(self, group, p, state):
        super().initialise(group, p, state)
        state["z"].copy_(p)

    def update_group(self, group, params):
        group["t"] = t = group.get("t", 0) + 1
        group["now"] = group["lr"] * min(1.0, t / group["warmup"] if group["warmup"] else 1.0)
        self.share(group, group["now"])
        super().update_group(group, params)

    def share(self, group, lr):
        """c, from the sum of squared rates so far; the largest rate counts, as in the reference."""
        group["largest"] = max(group.get("largest", 0.0), lr)
        weight = group["largest"] ** 2
        group["weights"] = group.get("weights", 0.0) + weight
        group["c"] = weight / group["weights"] if weight else 0.0

    def update(self, group, t, y, g, z, v):
        average_squares(v, g, group["beta2"])
        u = torch._foreach_div(g, denominator(v, 1 - group["beta2"] ** t, group["eps"]))
        self.move(group, group["now"], y, u, z)

    def move(self, group, lr, y, u, z):
        """x is not stored: y (1 - c) + c z, then minus lr (1 - b (1 - c)) u, is y of the new x and z."""
        b, c = group["beta1"], group["c"]
        if group["weight_decay"]:
            u = torch._foreach_add(u, y, alpha=group["weight_decay"])
        torch._foreach_lerp_(y, z, c)
        torch._foreach_add_(y, u, alpha=lr * (b * (1 - c) - 1))
        torch._foreach_add_(z, u, alpha=-lr)

    def evaluation_weights(self, group, params):
        b = group["beta1"]
        return [p.lerp(self.state[p]["z"].to(p.dtype), 1 - 1 / b) if b else p for p in params]


@dataclass(frozen=True)
class ScheduleFreeSGDSettings(Settings):
    """y = (1 - b) z + b x, where g is taken;  z <- z - lr (g + wd y);  x <- (1 - c) x + c z, c = lr^2 / (sum of lr^2 so far).

    Source: arXiv 2405.15682, github.com/facebookresearch/schedule_free. Wants a constant schedule: its warm-up is a key.
    """

    lr: float = hyper(1.0, "learning rate", (0.1, 10.0, "log"))
    beta1: float = hyper(0.9, "b: where between z and x the gradient is taken", (0.8, 0.98, "linear"))
    warmup: float = hyper(0.05, "steps of linear warm-up; below 1: fraction of the run", (0.0, 0.2, "linear"))
    weight_decay: float = hyper(0.0, "wd, decayed roles only", (1e-5, 1e-2, "log"))

    state_per_parameter = 4.0


class ScheduleFreeSGD(ScheduleFreeAdamW):
    """See ScheduleFreeSGDSettings."""

    settings, buffers = ScheduleFreeSGDSettings, ("z",)

    def update(self, group, t, y, g, z):
        self.move(group, group["now"], y, g, z)


@dataclass(frozen=True)
class ProdigySettings(Settings):
    """Adam whose learning rate is lr d: m, v are averages of d g, d^2 g^2;  r <- b3 r + d^2 lr^ <g, w0 - w> / d0;
    s <- b3 s + d^2 lr^ g / d0;  d <- max(d, d_coef r / |s|_1);  w <- (1 - d lr^ wd) w - d lr^ m / (sqrt(v) + d eps),
    with lr^ = lr sqrt(1 - b2^t) / (1 - b1^t) and b3 = sqrt(b2).

    Source: arXiv 2306.06101, github.com/konstmish/prodigy. One d for all weights. `safeguard` leaves lr out of s: for
    schedules that warm up.
    """

    lr: float = hyper(1.0, "factor on the estimated rate; a schedule multiplies it", (0.3, 3.0, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    d0: float = hyper(1e-6, "first estimate of the rate; growing from it takes steps", (1e-7, 1e-5, "log"))
    d_coef: float = hyper(1.0, "factor on the estimate", (0.5, 2.0, "log"))
    bias_correction: bool = hyper(True, "Adam's, on lr")
    safeguard: bool = hyper(True, "leave lr out of the denominator of the estimate")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    state_per_parameter = 16.0


class Prodigy(Elementwise):
    """See ProdigySettings. The estimate stands in the first param group: tensors, so that no step waits for the device."""

    settings, buffers = ProdigySettings, ("average", "squares", "s", "start")

    def initialise(self, group, p, state):
        super().initialise(group, p, state)
        state["start"].copy_(p)

    @torch.no_grad()
    def step(self, closure=None):
        loss = evaluate(closure)
        work = [
            (group, t, members)
            for group in self.param_groups
            if group["lr"] > 0
            for t, members in self.alike(group, [p for p in group["params"] if p.grad is not None])
        ]
        if not work:
            return loss
        first, device = self.param_groups[0], work[0][2][0].device
        for name, value in (("d", first["d0"]), ("d_max", first["d0"]), ("numerator", 0.0)):
            first[name] = torch.as_tensor(first.get(name, value), dtype=torch.float32, device=device)
        d, r, size = first["d"], first["numerator"] * math.sqrt(first["beta2"]), torch.zeros((), device=device)
        for group, t, members in work:
            rate = self.rate(group, t)
            for piece in self.pieces(members):
                along, total = self.observe(group, rate, d, *piece)
                r, size = r + along * d.square() * (rate / group["d0"]), size + total
        found = first["d_coef"] * r / size.clamp(min=1e-30)
        d_max = torch.maximum(first["d_max"], found)
        new = torch.where(size > 0, torch.maximum(d, d_max), d)  # the reference, whose growth has no limit by default
        first["d"], first["numerator"], first["d_max"] = new, r, d_max
        self.begin()
        for group, t, members in work:
            rate = self.rate(group, t)
            for piece in self.pieces(members):
                self.move(group, rate, d, new, *piece)
        return loss

    def begin(self) -> None:
        """Called once a step, between the estimate and the update."""

    def rate(self, group, t) -> float:
        correction = math.sqrt(1 - group["beta2"] ** t) / (1 - group["beta1"] ** t) if group["bias_correction"] else 1.0
        return group["lr"] * correction

    def observe(self, group, rate, d, w, g, m, v, s, start):
        """Advance the averages; <g, w0 - w> and |s|_1 of the piece."""
        scaled = torch._foreach_mul(g, d)
        torch._foreach_mul_(m, group["beta1"])
        torch._foreach_add_(m, scaled, alpha=1 - group["beta1"])
        average_squares(v, scaled, group["beta2"])
        return self.estimate(group, rate, d, w, g, s, start, scaled)

    @staticmethod
    def estimate(group, rate, d, w, g, s, start, scaled):
        """Advance s by the scaled gradient d g; <g, w0 - w> and |s|_1."""
        torch._foreach_mul_(s, math.sqrt(group["beta2"]))
        torch._foreach_mul_(scaled, d)
        torch._foreach_add_(s, scaled, alpha=(1.0 if group.get("safeguard") else rate) / group["d0"])
        moved = torch._foreach_sub(start, w)
        torch._foreach_mul_(moved, g)
        return sum(x.sum() for x in moved), sum(torch._foreach_norm(s, 1))

    def move(self, group, rate, d, new, w, g, m, v, s, start):
        if group["weight_decay"]:
            torch._foreach_mul_(w, 1 - d * (rate * group["weight_decay"]))
        below = torch._foreach_sqrt(v)
        torch._foreach_add_(below, new * group["eps"])
        u = torch._foreach_div(m, below)
        torch._foreach_mul_(u, d * rate)
        torch._foreach_sub_(w, u)


@dataclass(frozen=True)
class ScheduleFreeProdigySettings(Settings):
    """y = (1 - b) z + b x, where g is taken;  v is an average of d^2 g^2;  d as Prodigy's, from <g, w0 - z>;
    z <- z - lr d_before (d g / (sqrt(v) + d eps) + wd x);  x <- (1 - c) x + c z with c = t^r / (sum of t^r). Evaluates at x.

    Source: "Schedule-Free Prodigy" of AlgoPerf's first round, in github.com/facebookresearch/schedule_free (algoperf/). Wants
    a constant schedule: its warm-up is a key.
    """

    lr: float = hyper(1.0, "factor on the estimated rate", (0.3, 3.0, "log"))
    beta1: float = hyper(0.9, "b: where between z and x the gradient is taken", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    d0: float = hyper(1e-6, "first estimate of the rate; growing from it takes steps", (1e-7, 1e-5, "log"))
    d_coef: float = hyper(1.0, "factor on the estimate", (0.5, 2.0, "log"))
    r: float = hyper(0.75, "how much later steps weigh more in x", (0.0, 2.0, "linear"))
    warmup: float = hyper(0.075, "steps of linear warm-up; below 1: fraction of the run", (0.0, 0.2, "linear"))
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    state_per_parameter = 16.0


class ScheduleFreeProdigy(Swapped, Prodigy):
    """See ScheduleFreeProdigySettings."""

    settings, buffers = ScheduleFreeProdigySettings, ("z", "squares", "s", "start")
    schedule_free = True

    def initialise(self, group, p, state):
        super().initialise(group, p, state)
        state["z"].copy_(p)

    def rate(self, group, t):
        return group["lr"] * (min(1.0, t / group["warmup"]) if group["warmup"] else 1.0)

    def observe(self, group, rate, d, y, g, z, v, s, start):
        scaled = torch._foreach_mul(g, d)
        average_squares(v, scaled, group["beta2"])
        return self.estimate(group, rate, d, z, g, s, start, scaled)

    def begin(self):
        for group in self.param_groups:
            group["t"] = group.get("t", 0) + 1
            weight = group["t"] ** group["r"]
            group["weights"] = group.get("weights", 0.0) + weight
            group["c"] = weight / group["weights"]

    def move(self, group, rate, d, new, y, g, z, v, s, start):
        b, c = group["beta1"], group["c"]
        x = torch._foreach_lerp(y, z, 1 - 1 / b)
        below = torch._foreach_sqrt(v)
        torch._foreach_add_(below, new * group["eps"])
        u = torch._foreach_mul(g, new)
        torch._foreach_div_(u, below)
        if group["weight_decay"]:
            torch._foreach_add_(u, x, alpha=group["weight_decay"])
        torch._foreach_mul_(u, d * rate)
        torch._foreach_sub_(z, u)
        torch._foreach_lerp_(x, z, c)
        torch._foreach_copy_(y, torch._foreach_lerp(x, z, 1 - b))

    evaluation_weights = ScheduleFreeAdamW.evaluation_weights
