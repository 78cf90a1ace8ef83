"""Methods that look at each weight's own history: the classics, and Adam with its relatives.

torch's own class stands where it is the method and is fused; the others are written over pieces of cache size (see
`base.Elementwise`).
"""

import math
from dataclasses import dataclass

import torch

from optimizers.base import (
    DECAYED,
    ROLES,
    Chain,
    Elementwise,
    Settings,
    average,
    average_squares,
    decay,
    decay_groups,
    denominator,
    groups,
    hyper,
    rest,
)  # fmt: skip

# ---------------------------------------------------------------- classics


@dataclass(frozen=True)
class SGDSettings(Settings):
    """g <- g + wd w;  m <- mu m + g;  w <- w - lr (g + mu m) with Nesterov's form, w - lr m without.

    Source: torch.optim.SGD (fused). Its weight decay is coupled: it passes through the momentum.
    """

    lr: float = hyper(0.1, "peak learning rate", (1e-2, 1.0, "log"))
    momentum: float = hyper(0.9, "mu", (0.8, 0.99, "linear"))
    nesterov: bool = hyper(True, "look one step ahead")
    weight_decay: float = hyper(0.0, "wd, decayed roles only", (1e-5, 1e-2, "log"))

    state_per_parameter = 4.0

    def build(self, gpt, steps):
        nesterov = self.nesterov and self.momentum > 0  # torch refuses Nesterov's form without momentum
        params = decay_groups(gpt, self.weight_decay)
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, nesterov=nesterov, fused=True)


@dataclass(frozen=True)
class SignumSettings(Settings):
    """m <- mu m + (1 - mu) g;  w <- (1 - lr wd) w - lr sign(m).

    Source: arXiv 1802.04434; momentum 0 is signSGD.
    """

    lr: float = hyper(3e-3, "peak learning rate", (1e-4, 1e-2, "log"))
    momentum: float = hyper(0.9, "mu", (0.0, 0.99, "linear"))
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    state_per_parameter = 4.0


class Signum(Elementwise):
    settings, buffers = SignumSettings, ("average",)

    def update(self, group, t, w, g, m):
        average(m, g, group["momentum"])
        decay(group, w)
        torch._foreach_add_(w, torch._foreach_sign(m), alpha=-group["lr"])


@dataclass(frozen=True)
class AdagradSettings(Settings):
    """s <- s + g^2;  w <- w - lr g / (sqrt(s) + eps), with g + wd w for g.

    Source: Duchi et al. 2011 (JMLR 12); torch.optim.Adagrad (fused on CPU).
    """

    lr: float = hyper(1e-2, "peak learning rate", (1e-3, 1e-1, "log"))
    initial: float = hyper(0.0, "start of s: damps the first steps")
    eps: float = hyper(1e-10, "floor of the denominator")
    weight_decay: float = hyper(0.0, "wd (coupled), decayed roles only")

    state_per_parameter = 4.0

    def build(self, gpt, steps):
        params = decay_groups(gpt, self.weight_decay)
        fused = all(p.device.type == "cpu" for p in gpt.parameters())  # torch has no other fused version
        return torch.optim.Adagrad(params, lr=self.lr, initial_accumulator_value=self.initial, eps=self.eps, fused=fused)


@dataclass(frozen=True)
class RMSpropSettings(Settings):
    """v <- b2 v + (1 - b2) g^2;  u = g / (sqrt(v) + eps);  m <- mu m + u;  w <- w - lr m, with g + wd w for g.

    Source: Tieleman and Hinton 2012 (lecture 6.5); the same numbers as torch.optim.RMSprop, in one pass over memory.
    Without bias correction the first steps are 1 / sqrt(1 - b2) too long: warm up.
    """

    lr: float = hyper(1e-3, "peak learning rate", (1e-4, 1e-2, "log"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    momentum: float = hyper(0.0, "mu", (0.0, 0.95, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.0, "wd (coupled), decayed roles only")


class RMSprop(Elementwise):
    settings, buffers = RMSpropSettings, ("squares", "average")

    def update(self, group, t, w, g, v, m):
        if group["weight_decay"]:
            g = torch._foreach_add(g, w, alpha=group["weight_decay"])
        average_squares(v, g, group["beta2"])
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_addcdiv_(m, g, denominator(v, 1, group["eps"]))
        torch._foreach_add_(w, m, alpha=-group["lr"])


@dataclass(frozen=True)
class AdadeltaSettings(Settings):
    """v <- rho v + (1 - rho) g^2;  d = g sqrt(u + eps) / sqrt(v + eps);  u <- rho u + (1 - rho) d^2;
    w <- (1 - lr wd) w - lr d.

    Source: arXiv 1212.5701; with wd = 0 the same numbers as torch.optim.Adadelta, in one pass over memory. eps sets the
    size of the first steps.
    """

    lr: float = hyper(1.0, "factor on the step", (0.1, 10.0, "log"))
    beta2: float = hyper(0.95, "rho", (0.9, 0.99, "linear"))
    eps: float = hyper(1e-6, "inside both roots", (1e-8, 1e-4, "log"))
    weight_decay: float = hyper(0.0, "wd, decayed roles only")


class Adadelta(Elementwise):
    settings, buffers = AdadeltaSettings, ("squares", "steps_squared")

    def update(self, group, t, w, g, v, u):
        average_squares(v, g, group["beta2"])
        d = torch._foreach_add(u, group["eps"])
        root = torch._foreach_add(v, group["eps"])
        torch._foreach_div_(d, root)
        torch._foreach_sqrt_(d)
        torch._foreach_mul_(d, g)
        average_squares(u, d, group["beta2"])
        decay(group, w)
        torch._foreach_add_(w, d, alpha=-group["lr"])


# ---------------------------------------------------------------- Adam and its relatives


@dataclass(frozen=True)
class AdamSettings(Settings):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr m^ / (sqrt(v^) + eps), with g + wd w for g.

    Source: arXiv 1412.6980; torch.optim.Adam (fused). amsgrad (arXiv 1904.09237): the largest v so far for v.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    amsgrad: bool = hyper(False, "divide by the largest average of squares so far; 4 more bytes of state")
    weight_decay: float = hyper(0.0, "wd (coupled), decayed roles only")

    def build(self, gpt, steps):
        params, betas = decay_groups(gpt, self.weight_decay), (self.beta1, self.beta2)
        return torch.optim.Adam(params, lr=self.lr, betas=betas, eps=self.eps, amsgrad=self.amsgrad, fused=True)


@dataclass(frozen=True)
class AdamWSettings(Settings):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps).

    Source: arXiv 1711.05101; torch.optim.AdamW (fused). beta2 0.95 rather than Adam's 0.999: GPT-3, nanoGPT.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    def build(self, gpt, steps, wanted: tuple[str, ...] = ROLES):
        params, betas = decay_groups(gpt, self.weight_decay, wanted), (self.beta1, self.beta2)
        return torch.optim.AdamW(params, lr=self.lr, betas=betas, eps=self.eps, fused=True)


@dataclass(frozen=True)
class NAdamWSettings(Settings):
    """AdamW with b1 m + (1 - b1) g, m already updated, in the place of m (Nesterov's form).

    Source: Dozat 2016, as AlgoPerf's baseline has it; torch.optim.NAdam has another momentum schedule.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.95, "average of gradients", (0.8, 0.99, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))


class NAdamW(Elementwise):
    settings, buffers = NAdamWSettings, ("average", "squares")

    def update(self, group, t, w, g, m, v):
        beta1, beta2 = group["beta1"], group["beta2"]
        average(m, g, beta1)
        average_squares(v, g, beta2)
        ahead = torch._foreach_lerp(g, m, beta1)
        decay(group, w)
        torch._foreach_addcdiv_(w, ahead, denominator(v, 1 - beta2**t, group["eps"]), -group["lr"] / (1 - beta1**t))


@dataclass(frozen=True)
class LionSettings(Settings):
    """u = sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g;  w <- (1 - lr wd) w - lr u.

    Source: arXiv 2302.06675. Against AdamW: lr 3-10 times lower, wd as much higher.
    """

    lr: float = hyper(2e-3, "peak learning rate", (5e-5, 5e-3, "log"))
    beta1: float = hyper(0.9, "weight of the average in the update", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of gradients", (0.9, 0.999, "linear"))
    weight_decay: float = hyper(0.5, "wd, decayed roles only", (0.1, 3.0, "log"))

    state_per_parameter = 4.0


class Lion(Elementwise):
    settings, buffers = LionSettings, ("average",)

    def update(self, group, t, w, g, m):
        u = torch._foreach_lerp(g, m, group["beta1"])
        torch._foreach_sign_(u)
        average(m, g, group["beta2"])
        decay(group, w)
        torch._foreach_add_(w, u, alpha=-group["lr"])


@dataclass(frozen=True)
class AdEMAMixSettings(Settings):
    """AdamW with m^ + a m2 in the place of m^: m2 <- b3 m2 + (1 - b3) g, a slow average without bias correction; a rises
    in a line from 0 to alpha and b3, by equal steps of its half-life, from b1 to beta3 over `ramp` steps.

    Source: arXiv 2409.03137, github.com/apple/ml-ademamix.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "fast average of gradients", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "linear"))
    beta3: float = hyper(0.999, "slow average of gradients", (0.99, 0.9999, "linear"))
    alpha: float = hyper(8.0, "weight of the slow average", (2.0, 10.0, "linear"))
    ramp: float = hyper(0.999, "steps until alpha and beta3 are reached; below 1: fraction of the run")
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    state_per_parameter = 12.0


class AdEMAMix(Elementwise):
    settings, buffers = AdEMAMixSettings, ("average", "slow_average", "squares")

    def update(self, group, t, w, g, m, slow, v):
        beta1, beta2, beta3 = group["beta1"], group["beta2"], group["beta3"]
        done = min(1.0, t / group["ramp"]) if group["ramp"] else 1.0
        fast, final = math.log(beta1), math.log(beta3)  # 1/log is minus the half-life in units of log 2
        slow_beta = math.exp(fast * final / ((1 - done) * final + done * fast))
        average(m, g, beta1)
        average(slow, g, slow_beta)
        average_squares(v, g, beta2)
        u = torch._foreach_div(m, 1 - beta1**t)
        torch._foreach_add_(u, slow, alpha=done * group["alpha"])
        decay(group, w)
        torch._foreach_addcdiv_(w, u, denominator(v, 1 - beta2**t, group["eps"]), -group["lr"])


@dataclass(frozen=True)
class ADOPTSettings(Settings):
    """u = g / max(sqrt(v), eps), each clipped to +-t^0.25;  m <- b1 m + (1 - b1) u;  w <- (1 - lr wd) w - lr m;
    v <- b2 v + (1 - b2) g^2: squares that g had no part in. The first step only sets v = g^2.

    Source: arXiv 2411.02853 with its clipping of November 2024, github.com/iShohei220/adopt.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of normalised gradients", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.99, "average of squares", (0.9, 0.9999, "linear"))
    eps: float = hyper(1e-6, "least denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))


class ADOPT(Elementwise):
    settings, buffers = ADOPTSettings, ("average", "squares")

    def update(self, group, t, w, g, m, v):
        if t == 1:
            torch._foreach_addcmul_(v, g, g)
            return
        d = torch._foreach_sqrt(v)
        torch._foreach_clamp_min_(d, group["eps"])
        u = torch._foreach_div(g, d)
        limit = (t - 1) ** 0.25
        torch._foreach_clamp_min_(u, -limit)
        torch._foreach_clamp_max_(u, limit)
        average(m, u, group["beta1"])
        average_squares(v, g, group["beta2"])
        decay(group, w)
        torch._foreach_add_(w, m, alpha=-group["lr"])


@dataclass(frozen=True)
class NAdamPSettings(NAdamWSettings):
    """NAdamW with the p-th root of v^ in the place of its square root: w <- (1 - lr wd) w - lr m~ / (v^^(1/p) + eps).

    Source: "NadamP" of AlgoPerf's first round (algorithms_results_v0.5, team 11).
    """

    root: float = hyper(2.0, "p; 2 is NAdamW", (1.5, 3.0, "linear"), least=1)


class NAdamP(NAdamW):
    settings = NAdamPSettings

    def update(self, group, t, w, g, m, v):
        beta1, beta2 = group["beta1"], group["beta2"]
        average(m, g, beta1)
        average_squares(v, g, beta2)
        ahead = torch._foreach_lerp(g, m, beta1)
        d = torch._foreach_div(v, 1 - beta2**t)
        torch._foreach_pow_(d, 1 / group["root"])
        torch._foreach_add_(d, group["eps"])
        decay(group, w)
        torch._foreach_addcdiv_(w, ahead, d, -group["lr"] / (1 - beta1**t))


@dataclass(frozen=True)
class GeneralizedAdamSettings(NAdamWSettings):
    """NAdamW; or, with precondition=false, m <- b1 m + g;  w <- (1 - lr wd) w - lr (g + b1 m), or - lr m without nesterov.

    Source: "Generalized Adam" of AlgoPerf's first round (algorithms_results_v0.5, team 11), which searches over NAdamW and
    momentum SGD with decoupled decay. Without nesterov its m is not bias-corrected (its quirk, kept).
    """

    nesterov: bool = hyper(True, "look one step ahead")
    precondition: bool = hyper(True, "divide by the root of the average of squares; if false lr is near 1")


class GeneralizedAdam(NAdamW):
    settings = GeneralizedAdamSettings

    def update(self, group, t, w, g, m, v):
        beta1, beta2, lr = group["beta1"], group["beta2"], group["lr"]
        if group["precondition"] and group["nesterov"]:
            super().update(group, t, w, g, m, v)
            return
        decay(group, w)
        if group["precondition"]:
            average(m, g, beta1)
            average_squares(v, g, beta2)
            torch._foreach_addcdiv_(w, m, denominator(v, 1 - beta2**t, group["eps"]), -lr)
        else:
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, g)
            torch._foreach_add_(w, torch._foreach_add(g, m, alpha=beta1) if group["nesterov"] else m, alpha=-lr)


@dataclass(frozen=True)
class AmosSettings(Settings):
    """v <- b v + (1 - b) q, q the mean of g^2 over the weight tensor;  y = lr^2 q / (v^ sqrt(1 + sqrt(lr) k / 4));
    w <- w - average of (lr s g / sqrt(v^) + y w / 2) / (1 + sqrt(lr s) k / 4), s = sqrt(2 / columns), 1/2 for vectors;
    k <- k + y (1 + k).

    Source: arXiv 2210.11693; one v and k a tensor as in pytorch_optimizer. Weight decay and the decay of the rate are its own.
    """

    lr: float = hyper(3e-2, "relative step: xi", (3e-3, 3e-1, "log"))
    beta2: float = hyper(0.98, "average of the mean square", (0.9, 0.999, "linear"))
    momentum: float = hyper(0.9, "average of the updates", (0.0, 0.98, "linear"))
    eps: float = hyper(1e-18, "added to v")

    state_per_parameter = 4.0


class Amos(Elementwise):
    settings, buffers = AmosSettings, ("average",)

    def initialise(self, group, p, state):
        super().initialise(group, p, state)
        state["square"], state["decay"] = (torch.zeros((), device=p.device) for _ in range(2))

    def measure(self, group, t, params):
        lr, beta2 = group["lr"], group["beta2"]
        q = torch._foreach_norm([p.grad.float() for p in params])
        torch._foreach_mul_(q, q)
        torch._foreach_div_(q, [float(p.numel()) for p in params])
        v, k = [self.state[p]["square"] for p in params], [self.state[p]["decay"] for p in params]
        average(v, q, beta2)
        inverse = torch._foreach_add(v, group["eps"])
        torch._foreach_reciprocal_(inverse)
        torch._foreach_mul_(inverse, 1 - beta2**t)
        on_g, on_w = torch._foreach_sqrt(inverse), []
        rates = [lr * (math.sqrt(2 / p[0].numel()) if p.dim() > 1 else 0.5) for p in params]
        torch._foreach_mul_(on_g, rates)
        for i, (slowed, rate) in enumerate(zip(k, rates, strict=True)):
            gamma = lr**2 * inverse[i] * q[i] * (1 + math.sqrt(lr) / 4 * slowed).rsqrt()
            slower = 1 + math.sqrt(rate) / 4 * slowed
            on_g[i].div_(slower)
            on_w.append(gamma / (2 * slower))
            slowed.add_(gamma * (1 + slowed))
        return [on_g, on_w]

    def update(self, group, t, w, g, m, on_g, on_w):
        u = torch._foreach_mul(g, on_g)
        torch._foreach_addcmul_(u, w, on_w)
        average(m, u, group["momentum"])
        torch._foreach_sub_(w, m)


@dataclass(frozen=True)
class MARSSettings(Settings):
    """c = g + gamma b1 / (1 - b1) (g - g_before), shortened to norm 1 per weight tensor;  AdamW on c.

    Source: arXiv 2411.10438, github.com/AGI-Arena/MARS, its form with the stored gradient of the step before. Vectors and
    scalars: AdamW.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.95, "average of corrected gradients", (0.8, 0.98, "linear"))
    beta2: float = hyper(0.99, "average of their squares", (0.9, 0.999, "linear"))
    gamma: float = hyper(0.025, "weight of the correction", (0.005, 0.1, "log"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))
    adamw_lr: float = rest(3e-3, "peak learning rate of vectors and scalars", (3e-4, 3e-2, "log"))

    roles = DECAYED
    state_per_parameter = 12.0

    def build(self, gpt, steps):
        mars = self.method(groups(gpt, self.roles, weight_decay=self.weight_decay), **self.own(steps))
        others = groups(gpt, ("vector", "scalar"), weight_decay=0.0)
        return Chain(mars, torch.optim.AdamW(others, lr=self.adamw_lr, betas=(0.9, 0.95), fused=True)) if others else mars


class MARS(Elementwise):
    settings, buffers = MARSSettings, ("average", "squares", "gradient_before")

    def correction(self, group, g, before):
        """c before it is shortened."""
        factor = group["gamma"] * group["beta1"] / (1 - group["beta1"])
        c = torch._foreach_mul(before, -factor)
        torch._foreach_add_(c, g, alpha=1 + factor)
        return c

    def measure(self, group, t, params):
        totals = [torch.zeros((), device=p.device) for p in params]
        for _, g, _, _, before, total in self.pieces(params, totals):
            for squared, norm in zip(total, torch._foreach_norm(self.correction(group, g, before)), strict=True):
                squared.add_(norm.square())
        return [[total.clamp(min=1).rsqrt() for total in totals]]

    def update(self, group, t, w, g, m, v, before, shorten):
        c = self.correction(group, g, before)
        torch._foreach_mul_(c, shorten)
        torch._foreach_copy_(before, g)
        beta1, beta2 = group["beta1"], group["beta2"]
        average(m, c, beta1)
        average_squares(v, c, beta2)
        decay(group, w)
        torch._foreach_addcdiv_(w, m, denominator(v, 1 - beta2**t, group["eps"]), -group["lr"] / (1 - beta1**t))


@dataclass(frozen=True)
class SophiaSettings(Settings):
    """m <- b1 m + (1 - b1) g;  w <- (1 - lr wd) w - lr clip(m / (rho B h + eps), +-1), B tokens a step; every `every` steps
    h <- b2 h + (1 - b2) s^2 with s the gradient on labels drawn from the model's own predictions.

    Source: Sophia-G, arXiv 2305.14342, github.com/Liuhong99/Sophia. The second forward and backward pass is on the clock.
    """

    lr: float = hyper(3e-3, "peak learning rate", (1e-4, 1e-2, "log"))
    beta1: float = hyper(0.965, "average of gradients", (0.9, 0.98, "linear"))
    beta2: float = hyper(0.99, "average of the curvature estimates", (0.9, 0.999, "linear"))
    rho: float = hyper(0.05, "clips more the lower it is", (0.01, 0.1, "log"))
    every: int = hyper(10, "steps between estimates", least=1)
    eps: float = hyper(1e-15, "floor of the denominator")
    weight_decay: float = hyper(0.2, "wd, decayed roles only", (1e-2, 1.0, "log"))


class Sophia(Elementwise):
    """See SophiaSettings. The training loop owes it `curvature(tokens)` whenever `wants_curvature()` after a step."""

    settings, buffers = SophiaSettings, ("average", "curvature")

    def wants_curvature(self) -> bool:
        """Is it time for an estimate: after every `every` steps."""
        steps = max((s["step"] for s in self.state.values() if s), default=0)
        return steps > 0 and steps % self.param_groups[0]["every"] == 0

    @torch.no_grad()
    def curvature(self, tokens: int) -> None:
        """Take up the gradients that stand in the parameters now: of the mean loss over `tokens` sampled labels."""
        for group in self.param_groups:
            group["tokens"] = tokens
            params = [p for p in group["params"] if p.grad is not None and self.state.get(p)]
            for _, g, _, h in self.pieces(params) if params else ():
                average_squares(h, g, group["beta2"])

    def update(self, group, t, w, g, m, h):
        average(m, g, group["beta1"])
        d = torch._foreach_mul(h, group["rho"] * group.get("tokens", 1))
        torch._foreach_add_(d, group["eps"])
        u = torch._foreach_div(m, d)
        torch._foreach_clamp_max_(u, 1.0)
        torch._foreach_clamp_min_(u, -1.0)
        decay(group, w)
        torch._foreach_add_(w, u, alpha=-group["lr"])


@dataclass(frozen=True)
class AdafactorSettings(Settings):
    """v ~ row means x column means / mean of averages of g^2 (1 - t^-0.8 their weight);  u = g / sqrt(v), shortened to RMS d;
    w <- (1 - lr wd) w - lr max(eps2, RMS(w)) u.

    Source: arXiv 1804.04235; torch.optim.Adafactor.
    """

    lr: float = hyper(0.1, "peak relative step", (1e-2, 1.0, "log"))
    beta2_decay: float = hyper(0.8, "average of squares: 1 - t^-this")
    d: float = hyper(1.0, "largest root mean square of an update")
    weight_decay: float = hyper(0.0, "wd, decayed roles only")

    state_per_parameter = 0.0  # (m + n) / mn numbers

    def build(self, gpt, steps):
        params = decay_groups(gpt, self.weight_decay)
        return torch.optim.Adafactor(params, lr=self.lr, beta2_decay=-self.beta2_decay, d=self.d)
