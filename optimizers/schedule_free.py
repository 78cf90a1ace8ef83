"""Methods that need no learning-rate schedule: Schedule-Free, and Prodigy, which finds the rate itself.

Schedule-Free methods are evaluated at other weights than they train at: call `eval()` before validation, `train()` after.
"""

import math

import torch

from optimizers.base import BETA1, BETA2, DECAY, EPS, LR, WARMUP, Elementwise, hyper, lerp, lerp_, total

BETWEEN = "b: where between z and x the gradient is taken"


def warm_rate(group: dict, t: int) -> float:
    """lr in step t, after a warm-up of the group's own."""
    return group["lr"] * (min(1.0, t / group["warmup"]) if group["warmup"] else 1.0)


def take_share(group: dict, weight: float) -> None:
    """c: the weight of this step in x, over the sum of those so far."""
    group["weights"] = group.get("weights", 0.0) + weight
    group["c"] = weight / group["weights"] if weight else 0.0


class ScheduleFree(Elementwise):
    """What Schedule-Free methods share: z, and evaluation at x, which is not stored: y = (1 - b) z + b x.

    eval() puts x in place and the training weights y aside, train() puts them back, exactly; both as often as you like. A
    state_dict made in eval mode continues like another: load it beside the model's weights, then call train()."""

    schedule_free, copies = True, ("z",)

    def update_group(self, group, params):
        group["t"] = group.get("t", 0) + 1
        group["now"] = warm_rate(group, group["t"])
        group["largest"] = max(group.get("largest", 0.0), group["now"])  # the largest rate so far counts, as in the reference
        take_share(group, group["largest"] ** 2)
        super().update_group(group, params)

    def numbers(self, group, t):
        """y of the new x and z is (1 - c) y + c z - lr (1 - b (1 - c)) u."""
        b, c, lr = group["beta1"], group["c"], group["now"]
        return dict(on_y=lr * (1 - b * (1 - c)), on_z=lr)

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            b, params = group["beta1"], [p for p in group["params"] if self.state.get(p) and "aside" not in self.state[p]]
            for p in params:
                self.state[p]["aside"] = p.detach().clone()
                p.lerp_(self.state[p]["z"].to(p.dtype), 1 - 1 / b)

    @torch.no_grad()
    def train(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            if (aside := self.state.get(p, {}).pop("aside", None)) is not None:
                p.copy_(aside)


class ScheduleFreeAdamW(ScheduleFree):
    """y = (1 - b) z + b x, where g is taken;  z <- z - lr (u + wd y), u = g or Adam's g / (sqrt(v^) + eps);
    x <- (1 - c) x + c z with c = lr^2 / (sum of lr^2 so far). Trains at y, evaluates at x.

    Source: arXiv 2405.15682, github.com/facebookresearch/schedule_free. Wants a constant schedule: its warm-up is a key."""

    lr, beta1, beta2 = LR(3e-3, 1e-3, 1e-1, "learning rate"), BETA1(0.9, help=BETWEEN, least=1e-3), BETA2(0.95)
    eps, warmup, weight_decay = EPS(), WARMUP(0.05), DECAY(0.1)
    buffers = ("z", "squares")

    @staticmethod
    def rule(y, g, z, v, *, new2, correction, eps, c, on_y, on_z, weight_decay):
        lerp_(v, g * g, new2)
        u = g / (v.sqrt() * correction + eps) + y * weight_decay
        lerp_(y, z, c).sub_(u * on_y)
        z.sub_(u * on_z)


class ScheduleFreeSGD(ScheduleFree):
    """y = (1 - b) z + b x, where g is taken;  z <- z - lr (g + wd y);  x <- (1 - c) x + c z, c = lr^2 / (sum of lr^2 so far).

    Source: arXiv 2405.15682, github.com/facebookresearch/schedule_free. Wants a constant schedule: its warm-up is a key."""

    name = "schedule_free_sgd"
    lr, beta1 = LR(1.0, help="learning rate"), BETA1(0.9, help=BETWEEN, least=1e-3)
    warmup, weight_decay = WARMUP(0.05), DECAY(0.0, 1e-5, 1e-2)
    buffers, state_per_parameter = ("z",), 4.0
    transfer, toy_lr = 0.0, 0.5

    @staticmethod
    def rule(y, g, z, *, c, on_y, on_z, weight_decay):
        u = g + y * weight_decay
        lerp_(y, z, c).sub_(u * on_y)
        z.sub_(u * on_z)


class Estimating(Elementwise):
    """What Prodigy and its Schedule-Free form share: one estimate d of the rate, for all weights. It is in the first param
    group, as tensors, so that no step waits for the device."""

    state_per_parameter, transfer, toy_lr = 16.0, 0.0, 1.0
    copies = ("z", "start")

    def update_weights(self):
        moving = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups if g["lr"] > 0]
        work = [(group, t, members) for group, params in moving for t, members in self.alike(group, params)]
        if not work:
            return
        first, device = self.param_groups[0], work[0][2][0].device
        for name, value in (("d", first["d0"]), ("d_max", first["d0"]), ("numerator", 0.0)):
            first[name] = torch.as_tensor(first.get(name, value), dtype=torch.float32, device=device)
        self.d = self.new_d = d = first["d"]
        r, size = first["numerator"] * math.sqrt(first["beta2"]), torch.zeros((), device=device)
        for group, t, members in work:
            along, sizes = self.sums(self.observe, group, t, members, 2)
            r = r + torch.stack(along).sum() * d.square() * (self.factor(group, t) / group["d0"])
            size = size + torch.stack(sizes).sum()
        d_max = torch.maximum(first["d_max"], first["d_coef"] * r / size.clamp(min=1e-30))
        self.new_d = torch.where(size > 0, torch.maximum(d, d_max), d)  # the reference, whose growth has no limit by default
        first["d"], first["numerator"], first["d_max"] = self.new_d, r, d_max
        self.begin()
        for group, t, members in work:
            self.sweep(self.rule, group, t, members)

    def begin(self) -> None:
        """Called once a step, between the estimate and the update."""

    def factor(self, group, t) -> float:
        """What d is multiplied by."""
        raise NotImplementedError

    def numbers(self, group, t):
        d, factor = self.d, self.factor(group, t)
        new_s = d.square() * ((1.0 if group.get("safeguard") else factor) / group["d0"])
        keep_s = math.sqrt(group["beta2"])
        return dict(d=d, new_d=self.new_d, rate=d * factor, eps=self.new_d * group["eps"], keep_s=keep_s, new_s=new_s)


class Prodigy(Estimating):
    """Adam whose learning rate is lr d: m, v are averages of d g, d^2 g^2;  r <- b3 r + d^2 lr^ <g, w0 - w> / d0;
    s <- b3 s + d^2 lr^ g / d0;  d <- max(d, d_coef r / |s|_1);  w <- (1 - d lr^ wd) w - d lr^ m / (sqrt(v) + d eps),
    with lr^ = lr sqrt(1 - b2^t) / (1 - b1^t) and b3 = sqrt(b2).

    Source: arXiv 2306.06101, github.com/konstmish/prodigy. One d for all. `safeguard`: no lr in s, for a warm-up."""

    lr = LR(1.0, 0.3, 3.0, "factor on the estimated rate; a schedule multiplies it")
    beta1, beta2, eps = BETA1(0.9), BETA2(0.95), EPS()
    d0 = hyper(1e-6, "first estimate of the rate; growing from it takes steps", (1e-7, 1e-5, "log"), least=1e-30)
    d_coef = hyper(1.0, "factor on the estimate", (0.5, 2.0, "log"))
    bias_correction = hyper(True, "Adam's, on lr")
    safeguard = hyper(True, "leave lr out of the denominator of the estimate")
    weight_decay = DECAY(0.1)
    buffers = ("average", "squares", "s", "start")

    def factor(self, group, t):
        correction = math.sqrt(1 - group["beta2"] ** t) / (1 - group["beta1"] ** t) if group["bias_correction"] else 1.0
        return group["lr"] * correction

    def numbers(self, group, t):
        numbers = super().numbers(group, t)
        return numbers | dict(keep=1 - numbers["rate"] * group["weight_decay"])

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


class ScheduleFreeProdigy(Estimating, ScheduleFree):
    """y = (1 - b) z + b x, where g is taken;  v is an average of d^2 g^2;  d as Prodigy's, from <g, w0 - z>;
    z <- z - lr d_before (d g / (sqrt(v) + d eps) + wd x);  x <- (1 - c) x + c z with c = t^r / (sum of t^r). Evaluates at x.

    Source: "Schedule-Free Prodigy" of AlgoPerf's first round, in github.com/facebookresearch/schedule_free (algoperf/). Wants
    a constant schedule: its warm-up is a key."""

    lr, beta1 = LR(1.0, 0.3, 3.0, "factor on the estimated rate"), BETA1(0.9, help=BETWEEN, least=1e-3)
    beta2, eps = BETA2(0.95), EPS()
    d0 = hyper(1e-6, "first estimate of the rate; growing from it takes steps", (1e-7, 1e-5, "log"), least=1e-30)
    d_coef = hyper(1.0, "factor on the estimate", (0.5, 2.0, "log"))
    r = hyper(0.75, "step t has weight t^r in x", (0.0, 2.0, "linear"))
    warmup, weight_decay = WARMUP(0.075), DECAY(0.1)
    buffers = ("z", "squares", "s", "start")

    factor = staticmethod(warm_rate)

    @staticmethod
    def observe(y, g, z, v, s, start, along, size, *, keep_s, new_s):
        along.add_(total((start - z) * g))
        size.add_(total((s * keep_s + g * new_s).abs()))

    def begin(self):
        for group in self.param_groups:
            group["t"] = group.get("t", 0) + 1
            take_share(group, group["t"] ** group["r"])

    def numbers(self, group, t):
        b = group["beta1"]
        return super().numbers(group, t) | dict(to_x=1 - 1 / b, to_y=1 - b)

    @staticmethod
    def rule(y, g, z, v, s, start, *, keep_s, new_s, new2, d, new_d, rate, eps, weight_decay, to_x, c, to_y):
        s.mul_(keep_s).add_(g * new_s)
        scaled = g * d
        lerp_(v, scaled * scaled, new2)
        x = lerp(y, z, to_x)
        z.sub_((g * new_d / (v.sqrt() + eps) + x * weight_decay) * rate)
        x = lerp(x, z, c)
        y.copy_(lerp(x, z, to_y))
