"""Methods that need no learning-rate schedule: Schedule-Free, and Prodigy, which finds the rate itself.

Schedule-Free methods are evaluated at other weights than they train at: call `eval()` before validation and checkpoints
and `train()` after.
"""

import math
from dataclasses import dataclass

import torch

from optimizers.base import Elementwise, Settings, Swapped, evaluate, hyper, lerp, lerp_, total


@dataclass(frozen=True)
class ScheduleFreeSettings(Settings):
    """y = (1 - b) z + b x, where g is taken;  z <- z - lr (u + wd y), u = g or Adam's g / (sqrt(v^) + eps);
    x <- (1 - c) x + c z with c = lr^2 / (sum of lr^2 so far). Trains at y, evaluates at x.

    Source: arXiv 2405.15682, github.com/facebookresearch/schedule_free. Wants a constant schedule: its warm-up is a key.
    """

    lr: float = hyper(3e-3, "learning rate", (1e-3, 1e-1, "log"))
    beta1: float = hyper(0.9, "b: where between z and x the gradient is taken", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
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

    def numbers(self, group, t):
        beta2 = group["beta2"]
        given = dict(new2=1 - beta2, correction=1 / math.sqrt(1 - beta2**t), eps=group["eps"])
        return given | self.shares(group)

    @staticmethod
    def shares(group):
        """x is not stored: y of the new x and z is (1 - c) y + c z - lr (1 - b (1 - c)) u."""
        b, c, lr, decay = group["beta1"], group["c"], group["now"], group["weight_decay"]
        return dict(c=c, on_y=lr * (1 - b * (1 - c)), on_z=lr, decay=decay)

    @staticmethod
    def rule(y, g, z, v, *, new2, correction, eps, c, on_y, on_z, decay):
        lerp_(v, g * g, new2)
        u = g / (v.sqrt() * correction + eps) + y * decay
        lerp_(y, z, c).sub_(u * on_y)
        z.sub_(u * on_z)

    def evaluation_weights(self, group, params):
        b = group["beta1"]
        return [p.lerp(self.state[p]["z"].to(p.dtype), 1 - 1 / b) if b else p for p in params]


@dataclass(frozen=True)
class ScheduleFreeSGDSettings(Settings):
    """y = (1 - b) z + b x, where g is taken;  z <- z - lr (g + wd y);  x <- (1 - c) x + c z, c = lr^2 / (sum of lr^2 so far).

    Source: arXiv 2405.15682, github.com/facebookresearch/schedule_free. Wants a constant schedule: its warm-up is a key.
    """

    lr: float = hyper(1.0, "learning rate", (0.1, 10.0, "log"))
    beta1: float = hyper(0.9, "b: where between z and x the gradient is taken", (0.8, 0.98, "complement"))
    warmup: float = hyper(0.05, "steps of linear warm-up; below 1: fraction of the run", (0.0, 0.2, "linear"))
    weight_decay: float = hyper(0.0, "wd, decayed roles only", (1e-5, 1e-2, "log"))

    state_per_parameter = 4.0


class ScheduleFreeSGD(ScheduleFreeAdamW):
    """See ScheduleFreeSGDSettings."""

    settings, buffers = ScheduleFreeSGDSettings, ("z",)

    def numbers(self, group, t):
        return self.shares(group)

    @staticmethod
    def rule(y, g, z, *, c, on_y, on_z, decay):
        u = g + y * decay
        lerp_(y, z, c).sub_(u * on_y)
        z.sub_(u * on_z)


@dataclass(frozen=True)
class ProdigySettings(Settings):
    """Adam whose learning rate is lr d: m, v are averages of d g, d^2 g^2;  r <- b3 r + d^2 lr^ <g, w0 - w> / d0;
    s <- b3 s + d^2 lr^ g / d0;  d <- max(d, d_coef r / |s|_1);  w <- (1 - d lr^ wd) w - d lr^ m / (sqrt(v) + d eps),
    with lr^ = lr sqrt(1 - b2^t) / (1 - b1^t) and b3 = sqrt(b2).

    Source: arXiv 2306.06101, github.com/konstmish/prodigy. One d for all weights. `safeguard` leaves lr out of s: for
    schedules that warm up.
    """

    lr: float = hyper(1.0, "factor on the estimated rate; a schedule multiplies it", (0.3, 3.0, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
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
    of_slices = False

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
            along, sizes = ([torch.zeros((), device=device) for _ in members] for _ in range(2))
            self.sweep(self.observe, group, members, self.on_s(group, t, d), along, sizes)
            r = r + torch.stack(along).sum() * d.square() * (self.rate(group, t) / group["d0"])
            size = size + torch.stack(sizes).sum()
        found = first["d_coef"] * r / size.clamp(min=1e-30)
        d_max = torch.maximum(first["d_max"], found)
        new = torch.where(size > 0, torch.maximum(d, d_max), d)  # the reference, whose growth has no limit by default
        first["d"], first["numerator"], first["d_max"] = new, r, d_max
        self.begin()
        for group, t, members in work:
            self.sweep(self.rule, group, members, self.on_s(group, t, d) | self.on_w(group, t, d, new))
        return loss

    def begin(self) -> None:
        """Called once a step, between the estimate and the update."""

    def rate(self, group, t) -> float:
        correction = math.sqrt(1 - group["beta2"] ** t) / (1 - group["beta1"] ** t) if group["bias_correction"] else 1.0
        return group["lr"] * correction

    def on_s(self, group, t, d):
        """The part of `numbers` that moves s."""
        new_s = d.square() * ((1.0 if group.get("safeguard") else self.rate(group, t)) / group["d0"])
        return dict(keep_s=math.sqrt(group["beta2"]), new_s=new_s)

    def on_w(self, group, t, d, new):
        """The rest of `numbers`."""
        rate = d * self.rate(group, t)
        shares = dict(new1=1 - group["beta1"], new2=1 - group["beta2"])
        return shares | dict(d=d, rate=rate, keep=1 - rate * group["weight_decay"], eps=new * group["eps"])

    @staticmethod
    def observe(w, g, m, v, s, start, along, size, *, keep_s, new_s):
        """along += <g, w0 - w>, size += |s|_1 after this step. One pass that only reads; `rule` moves s in the other."""
        along.add_(total((start - w) * g))
        size.add_(total((s * keep_s + g * new_s).abs()))

    @staticmethod
    def rule(w, g, m, v, s, start, *, keep_s, new_s, new1, new2, d, rate, keep, eps):
        s.mul_(keep_s).add_(g * new_s)
        g = g * d
        lerp_(m, g, new1)
        lerp_(v, g * g, new2)
        w.mul_(keep).sub_(m / (v.sqrt() + eps) * rate)


@dataclass(frozen=True)
class ScheduleFreeProdigySettings(Settings):
    """y = (1 - b) z + b x, where g is taken;  v is an average of d^2 g^2;  d as Prodigy's, from <g, w0 - z>;
    z <- z - lr d_before (d g / (sqrt(v) + d eps) + wd x);  x <- (1 - c) x + c z with c = t^r / (sum of t^r). Evaluates at x.

    Source: "Schedule-Free Prodigy" of AlgoPerf's first round, in github.com/facebookresearch/schedule_free (algoperf/). Wants
    a constant schedule: its warm-up is a key.
    """

    lr: float = hyper(1.0, "factor on the estimated rate", (0.3, 3.0, "log"))
    beta1: float = hyper(0.9, "b: where between z and x the gradient is taken", (0.8, 0.98, "complement"), least=1e-3)
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
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

    @staticmethod
    def observe(y, g, z, v, s, start, along, size, *, keep_s, new_s):
        along.add_(total((start - z) * g))
        size.add_(total((s * keep_s + g * new_s).abs()))

    def begin(self):
        for group in self.param_groups:
            group["t"] = group.get("t", 0) + 1
            weight = group["t"] ** group["r"]
            group["weights"] = group.get("weights", 0.0) + weight
            group["c"] = weight / group["weights"]

    def on_w(self, group, t, d, new):
        b, decay, scales = group["beta1"], group["weight_decay"], dict(d=d, new=new, rate=d * self.rate(group, t))
        shares = dict(new2=1 - group["beta2"], c=group["c"], to_x=1 - 1 / b, to_y=1 - b)
        return scales | shares | dict(eps=new * group["eps"], decay=decay)

    @staticmethod
    def rule(y, g, z, v, s, start, *, keep_s, new_s, new2, d, new, rate, eps, decay, to_x, c, to_y):
        s.mul_(keep_s).add_(g * new_s)
        scaled = g * d
        lerp_(v, scaled * scaled, new2)
        x = lerp(y, z, to_x)
        z.sub_((g * new / (v.sqrt() + eps) + x * decay) * rate)
        x = lerp(x, z, c)
        y.copy_(lerp(x, z, to_y))

    evaluation_weights = ScheduleFreeAdamW.evaluation_weights
