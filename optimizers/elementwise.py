"""Methods that look at each weight's own history: the classics, and Adam with its relatives.

torch's own class stands where it is the method and is fused; the others are a `rule` each (see `base.Elementwise`).
"""

import math
from dataclasses import dataclass

import torch

from optimizers.base import (
    DECAYED,
    LONE,
    PIECE,
    ROLES,
    Chain,
    Elementwise,
    Settings,
    adam_numbers,
    compiled,
    decay_groups,
    groups,
    hyper,
    keep,
    lerp,
    lerp_,
    rest,
    total,
)

# ---------------------------------------------------------------- classics


@dataclass(frozen=True)
class SGDSettings(Settings):
    """g <- g + wd w;  m <- mu m + g;  w <- w - lr (g + mu m) with Nesterov's form, w - lr m without.

    Source: torch.optim.SGD (fused). Its weight decay is coupled: it passes through the momentum.
    """

    lr: float = hyper(0.1, "peak learning rate", (1e-2, 1.0, "log"))
    momentum: float = hyper(0.9, "mu", (0.8, 0.99, "complement"))
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

    lr: float = hyper(3e-4, "peak learning rate", (1e-4, 1e-2, "log"))
    momentum: float = hyper(0.9, "mu", (0.0, 0.99, "complement"))
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    state_per_parameter = 4.0


class Signum(Elementwise):
    settings, buffers = SignumSettings, ("average",)

    def numbers(self, group, t):
        return dict(new=1 - group["momentum"], lr=group["lr"], keep=keep(group))

    @staticmethod
    def rule(w, g, m, *, new, lr, keep):
        lerp_(m, g, new)
        w.mul_(keep).sub_(m.sign() * lr)


@dataclass(frozen=True)
class AdagradSettings(Settings):
    """s <- s + g^2;  w <- w - lr g / (sqrt(s) + eps), with g + wd w for g.

    Source: Duchi et al. 2011 (JMLR 12); torch.optim.Adagrad (fused on CPU).
    """

    lr: float = hyper(3e-3, "peak learning rate", (1e-3, 1e-1, "log"))
    initial: float = hyper(0.0, "start of s: damps the first steps")
    eps: float = hyper(1e-10, "floor of the denominator")
    weight_decay: float = hyper(0.0, "wd (coupled), decayed roles only", (1e-6, 1e-3, "log"))

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
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
    momentum: float = hyper(0.0, "mu", (0.0, 0.95, "complement"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.0, "wd (coupled), decayed roles only", (1e-6, 1e-3, "log"))

    state_per_parameter = 4.0  # 8 with momentum


class RMSprop(Elementwise):
    settings, buffers = RMSpropSettings, ("squares", "average")

    def names(self, group):
        return self.buffers if group["momentum"] else self.buffers[:1]

    def numbers(self, group, t):
        decay = group["weight_decay"]
        return dict(lr=group["lr"], new=1 - group["beta2"], mu=group["momentum"], eps=group["eps"], decay=decay)

    @staticmethod
    def rule(w, g, v, m=None, *, lr, new, mu, eps, decay):
        g = g + w * decay
        lerp_(v, g * g, new)
        u = g / (v.sqrt() + eps)
        w.sub_((u if m is None else m.mul_(mu).add_(u)) * lr)


@dataclass(frozen=True)
class AdadeltaSettings(Settings):
    """v <- rho v + (1 - rho) g^2;  d = g sqrt(u + eps) / sqrt(v + eps);  u <- rho u + (1 - rho) d^2;
    w <- (1 - lr wd) w - lr d.

    Source: arXiv 1212.5701; with wd = 0 the same numbers as torch.optim.Adadelta, in one pass over memory. eps sets the
    size of the first steps.
    """

    lr: float = hyper(1.0, "factor on the step", (0.1, 10.0, "log"))
    beta2: float = hyper(0.95, "rho", (0.9, 0.99, "complement"))
    eps: float = hyper(1e-6, "inside both roots", (1e-8, 1e-4, "log"))
    weight_decay: float = hyper(0.0, "wd, decayed roles only", (1e-3, 0.3, "log"))


class Adadelta(Elementwise):
    settings, buffers = AdadeltaSettings, ("squares", "steps_squared")

    def numbers(self, group, t):
        return dict(lr=group["lr"], new=1 - group["beta2"], eps=group["eps"], keep=keep(group))

    @staticmethod
    def rule(w, g, v, u, *, lr, new, eps, keep):
        lerp_(v, g * g, new)
        d = ((u + eps) / (v + eps)).sqrt() * g
        lerp_(u, d * d, new)
        w.mul_(keep).sub_(d * lr)


# ---------------------------------------------------------------- Adam and its relatives


@dataclass(frozen=True)
class AdamSettings(Settings):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr m^ / (sqrt(v^) + eps), with g + wd w for g.

    Source: arXiv 1412.6980; torch.optim.Adam (fused). amsgrad (arXiv 1904.09237): the largest v so far for v.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
    eps: float = hyper(1e-8, "floor of the denominator")
    amsgrad: bool = hyper(False, "divide by the largest average of squares so far; 4 more bytes of state")
    weight_decay: float = hyper(0.0, "wd (coupled), decayed roles only", (1e-6, 1e-3, "log"))

    def build(self, gpt, steps):
        params, betas = decay_groups(gpt, self.weight_decay), (self.beta1, self.beta2)
        return torch.optim.Adam(params, lr=self.lr, betas=betas, eps=self.eps, amsgrad=self.amsgrad, fused=True)


@dataclass(frozen=True)
class AdamWSettings(Settings):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps).

    Source: arXiv 1711.05101; torch.optim.AdamW (fused). beta2 0.95 rather than Adam's 0.999: GPT-3, nanoGPT.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
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
    beta1: float = hyper(0.95, "average of gradients", (0.8, 0.99, "complement"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))


class NAdamW(Elementwise):
    settings, buffers = NAdamWSettings, ("average", "squares")

    def numbers(self, group, t):
        return adam_numbers(group, t)

    @staticmethod
    def rule(w, g, m, v, *, new1, new2, rate, correction, eps, keep):
        lerp_(m, g, new1)
        lerp_(v, g * g, new2)
        w.mul_(keep).sub_(lerp(m, g, new1) / (v.sqrt() * correction + eps) * rate)


@dataclass(frozen=True)
class LionSettings(Settings):
    """u = sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g;  w <- (1 - lr wd) w - lr u.

    Source: arXiv 2302.06675. Against AdamW: lr 3-10 times lower, wd as much higher.
    """

    lr: float = hyper(6e-4, "peak learning rate", (5e-5, 5e-3, "log"))
    beta1: float = hyper(0.9, "weight of the average in the update", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.95, "average of gradients", (0.9, 0.999, "complement"))
    weight_decay: float = hyper(0.5, "wd, decayed roles only", (0.1, 3.0, "log"))

    state_per_parameter = 4.0


class Lion(Elementwise):
    settings, buffers = LionSettings, ("average",)

    def numbers(self, group, t):
        return dict(lr=group["lr"], new1=1 - group["beta1"], new2=1 - group["beta2"], keep=keep(group))

    @staticmethod
    def rule(w, g, m, *, lr, new1, new2, keep):
        w.mul_(keep).sub_(lerp(m, g, new1).sign() * lr)
        lerp_(m, g, new2)


@dataclass(frozen=True)
class AdEMAMixSettings(Settings):
    """AdamW with m^ + a m2 in the place of m^: m2 <- b3 m2 + (1 - b3) g, a slow average without bias correction; a rises
    in a line from 0 to alpha and b3, by equal steps of its half-life, from b1 to beta3 over `ramp` steps.

    Source: arXiv 2409.03137, github.com/apple/ml-ademamix.
    """

    lr: float = hyper(1e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "fast average of gradients", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
    beta3: float = hyper(0.999, "slow average of gradients", (0.99, 0.9999, "complement"))
    alpha: float = hyper(8.0, "weight of the slow average", (2.0, 10.0, "linear"))
    ramp: float = hyper(0.999, "steps until alpha and beta3 are reached; below 1: fraction of the run")
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))

    state_per_parameter = 12.0


class AdEMAMix(Elementwise):
    settings, buffers = AdEMAMixSettings, ("average", "slow_average", "squares")

    def numbers(self, group, t):
        done = min(1.0, t / group["ramp"]) if group["ramp"] else 1.0
        fast, final = (math.log(max(group[beta], 1e-8)) for beta in ("beta1", "beta3"))  # minus log 2 over the half-life
        slow_beta = math.exp(fast * final / ((1 - done) * final + done * fast))
        slow_rate = group["lr"] * done * group["alpha"]
        return adam_numbers(group, t) | dict(new3=1 - slow_beta, slow_rate=slow_rate)

    @staticmethod
    def rule(w, g, m, slow, v, *, new1, new2, new3, rate, slow_rate, correction, eps, keep):
        lerp_(m, g, new1)
        lerp_(slow, g, new3)
        lerp_(v, g * g, new2)
        w.mul_(keep).sub_((m * rate + slow * slow_rate) / (v.sqrt() * correction + eps))


@dataclass(frozen=True)
class ADOPTSettings(Settings):
    """u = g / max(sqrt(v), eps), each clipped to +-t^0.25;  m <- b1 m + (1 - b1) u;  w <- (1 - lr wd) w - lr m;
    v <- b2 v + (1 - b2) g^2: squares that g had no part in. The first step only sets v = g^2.

    Source: arXiv 2411.02853 with its clipping of November 2024, github.com/iShohei220/adopt.
    """

    lr: float = hyper(1e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of normalised gradients", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.99, "average of squares", (0.9, 0.9999, "complement"))
    eps: float = hyper(1e-6, "least denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))


class ADOPT(Elementwise):
    settings, buffers = ADOPTSettings, ("average", "squares")

    def numbers(self, group, t):
        limit = (t - 1) ** 0.25
        new = dict(new1=1 - group["beta1"], new2=1 - group["beta2"])
        return new | dict(first=t == 1, lr=group["lr"], limit=limit, eps=group["eps"], keep=keep(group))

    @staticmethod
    def rule(w, g, m, v, *, first, lr, new1, new2, limit, eps, keep):
        if first:
            v.add_(g * g)
            return
        lerp_(m, (g / v.sqrt().clamp(eps)).clamp(-limit, limit), new1)
        lerp_(v, g * g, new2)
        w.mul_(keep).sub_(m * lr)


@dataclass(frozen=True)
class NAdamPSettings(NAdamWSettings):
    """NAdamW with the p-th root of v^ in the place of its square root: w <- (1 - lr wd) w - lr m~ / (v^^(1/p) + eps).

    Source: "NadamP" of AlgoPerf's first round (algorithms_results_v0.5, team 11).
    """

    root: float = hyper(2.0, "p; 2 is NAdamW", (1.5, 3.0, "linear"), least=1)


class NAdamP(Elementwise):
    settings, buffers = NAdamPSettings, ("average", "squares")

    def numbers(self, group, t):
        power = 1 / group["root"]
        shape = dict(square=power == 0.5, power=power, correction=(1 - group["beta2"] ** t) ** -power)
        return adam_numbers(group, t) | shape

    @staticmethod
    def rule(w, g, m, v, *, square, new1, new2, rate, power, correction, eps, keep):
        lerp_(m, g, new1)
        lerp_(v, g * g, new2)
        root = v.sqrt() if square else v**power
        w.mul_(keep).sub_(lerp(m, g, new1) / (root * correction + eps) * rate)


@dataclass(frozen=True)
class GeneralizedAdamSettings(NAdamWSettings):
    """NAdamW; or, with precondition=false, m <- b1 m + g;  w <- (1 - lr wd) w - lr (g + b1 m), or - lr m without nesterov.

    Source: "Generalized Adam" of AlgoPerf's first round (algorithms_results_v0.5, team 11), which searches over NAdamW and
    momentum SGD with decoupled decay. Without nesterov its m is not bias-corrected (its quirk, kept).
    """

    nesterov: bool = hyper(True, "look one step ahead")
    precondition: bool = hyper(True, "divide by the root of the average of squares; if false lr is near 1")


class GeneralizedAdam(Elementwise):
    settings, buffers = GeneralizedAdamSettings, ("average", "squares")

    def names(self, group):
        return self.buffers if group["precondition"] else self.buffers[:1]

    def numbers(self, group, t):
        given = adam_numbers(group, t) | dict(beta1=group["beta1"], nesterov=group["nesterov"])
        return given if group["precondition"] and group["nesterov"] else given | dict(rate=group["lr"])

    @staticmethod
    def rule(w, g, m, v=None, *, nesterov, beta1, new1, new2, rate, correction, eps, keep):
        if v is None:
            m.mul_(beta1).add_(g)
            u = m * beta1 + g if nesterov else m
        else:
            lerp_(m, g, new1)
            lerp_(v, g * g, new2)
            u = (lerp(m, g, new1) if nesterov else m) / (v.sqrt() * correction + eps)
        w.mul_(keep).sub_(u * rate)


@dataclass(frozen=True)
class AmosSettings(Settings):
    """v <- b v + (1 - b) q, q the mean of g^2 over the weight tensor;  y = lr^2 q / (v^ sqrt(1 + sqrt(lr) k / 4));
    w <- w - average of (lr s g / sqrt(v^) + y w / 2) / (1 + sqrt(lr s) k / 4), s = sqrt(2 / columns), 1/2 for vectors;
    k <- k + y (1 + k).

    Source: arXiv 2210.11693; one v and k a tensor as in pytorch_optimizer. Weight decay and the decay of the rate are its own.
    """

    lr: float = hyper(1e-2, "relative step: xi", (3e-3, 3e-1, "log"))
    beta2: float = hyper(0.98, "average of the mean square", (0.9, 0.999, "complement"))
    momentum: float = hyper(0.9, "average of the updates", (0.0, 0.98, "complement"))
    eps: float = hyper(1e-18, "added to v")

    state_per_parameter = 4.0


class Amos(Elementwise):
    settings, buffers = AmosSettings, ("average",)
    of_slices = False

    def initialise(self, group, p, state):
        super().initialise(group, p, state)
        state["square"], state["decay"] = (torch.zeros((), device=p.device) for _ in range(2))

    def measure(self, group, t, params):
        lr, beta2 = group["lr"], group["beta2"]
        q = [torch.zeros((), device=p.device) for p in params]
        self.sweep(self.square, group, params, {}, q)
        torch._foreach_div_(q, [float(p.numel()) for p in params])
        rates = [lr * (math.sqrt(2 / p[0].numel()) if p.dim() > 1 else 0.5) for p in params]
        rate = torch.stack([torch.full_like(x, r) for x, r in zip(q, rates, strict=True)])  # no copy that waits for a GPU
        v, k = (torch.stack([self.state[p][name] for p in params]) for name in ("square", "decay"))
        q = torch.stack(q)
        v.lerp_(q, 1 - beta2)
        inverse = (1 - beta2**t) / (v + group["eps"])
        gamma = lr**2 * inverse * q * (1 + math.sqrt(lr) / 4 * k).rsqrt()
        slower = 1 + rate.sqrt() / 4 * k
        k = k + gamma * (1 + k)
        for name, values in (("square", v), ("decay", k)):
            torch._foreach_copy_([self.state[p][name] for p in params], list(values.unbind()))
        return [list((rate * inverse.sqrt() / slower).unbind()), list((gamma / (2 * slower)).unbind())]

    @staticmethod
    def square(w, g, m, square):
        square.add_(total(g * g))

    def numbers(self, group, t):
        return dict(new=1 - group["momentum"])

    @staticmethod
    def rule(w, g, m, on_g, on_w, *, new):
        lerp_(m, g * on_g + w * on_w, new)
        w.sub_(m)


@dataclass(frozen=True)
class MARSSettings(Settings):
    """c = g + gamma b1 / (1 - b1) (g - g_before), shortened to norm 1 per weight tensor;  AdamW on c.

    Source: arXiv 2411.10438, github.com/AGI-Arena/MARS, its form with the stored gradient of the step before. Vectors and
    scalars: AdamW.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.95, "average of corrected gradients", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.99, "average of their squares", (0.9, 0.999, "complement"))
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
    of_slices = False

    def numbers(self, group, t):
        return adam_numbers(group, t) | self.factor(group)

    @staticmethod
    def factor(group):
        return dict(factor=group["gamma"] * group["beta1"] / (1 - group["beta1"]))

    def measure(self, group, t, params):
        squares = [torch.zeros((), device=p.device) for p in params]
        self.sweep(self.size, group, params, self.factor(group), squares)
        return [[square.clamp(min=1).rsqrt() for square in squares]]

    @staticmethod
    def size(w, g, m, v, before, square, *, factor):
        c = g + (g - before) * factor
        square.add_(total(c * c))

    @staticmethod
    def rule(w, g, m, v, before, shorten, *, factor, new1, new2, rate, correction, eps, keep):
        c = (g + (g - before) * factor) * shorten
        before.copy_(g)
        lerp_(m, c, new1)
        lerp_(v, c * c, new2)
        w.mul_(keep).sub_(m / (v.sqrt() * correction + eps) * rate)


@dataclass(frozen=True)
class SophiaSettings(Settings):
    """m <- b1 m + (1 - b1) g;  w <- (1 - lr wd) w - lr clip(m / (rho B h + eps), +-1), B tokens a step; every `every` steps
    h <- b2 h + (1 - b2) s^2 with s the gradient on labels drawn from the model's own predictions.

    Source: Sophia-G, arXiv 2305.14342, github.com/Liuhong99/Sophia. The second forward and backward pass is on the clock.
    """

    lr: float = hyper(1e-3, "peak learning rate", (1e-4, 1e-2, "log"))
    beta1: float = hyper(0.965, "average of gradients", (0.9, 0.98, "complement"))
    beta2: float = hyper(0.99, "average of the curvature estimates", (0.9, 0.999, "complement"))
    rho: float = hyper(0.05, "clips more the lower it is", (0.01, 0.1, "log"))
    every: int = hyper(10, "steps between estimates", least=1)
    eps: float = hyper(1e-15, "floor of the denominator")
    weight_decay: float = hyper(0.2, "wd, decayed roles only", (1e-2, 1.0, "log"))


class Sophia(Elementwise):
    """See SophiaSettings. The training loop owes it `curvature(tokens)` whenever `wants_curvature()` after a step."""

    settings, buffers = SophiaSettings, ("average", "curvature")
    of_slices = False  # its estimates are made between steps, from whole gradients

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
            if params:
                self.sweep(self.estimate, group, params, dict(new=1 - group["beta2"]))

    def rehearse(self):
        super().rehearse()
        self.curvature(1)

    @staticmethod
    def estimate(w, g, m, h, *, new):
        lerp_(h, g * g, new)

    def numbers(self, group, t):
        scale = group["rho"] * group.get("tokens", 1)
        return dict(new=1 - group["beta1"], lr=group["lr"], scale=scale, eps=group["eps"], keep=keep(group))

    @staticmethod
    def rule(w, g, m, h, *, new, lr, scale, eps, keep):
        lerp_(m, g, new)
        w.mul_(keep).sub_((m / (h * scale + eps)).clamp(-1.0, 1.0) * lr)


@dataclass(frozen=True)
class AdafactorSettings(Settings):
    """v ~ row means x column means / mean of averages of g^2 (1 - t^-0.8 their weight);  u = g / sqrt(v), shortened to RMS d;
    w <- (1 - lr wd) w - lr max(eps2, RMS(w)) u.

    Source: arXiv 1804.04235; the same numbers as torch.optim.Adafactor.
    """

    lr: float = hyper(0.1, "peak relative step; at most t^-0.5", (1e-2, 1.0, "log"))
    beta2_decay: float = hyper(0.8, "average of squares: 1 - t^-this")
    d: float = hyper(1.0, "largest root mean square of an update")
    weight_decay: float = hyper(0.0, "wd, decayed roles only", (1e-3, 0.3, "log"))

    state_per_parameter = 0.0  # (m + n) / mn numbers


class Adafactor(Elementwise):
    """See AdafactorSettings. Three passes over memory: for the means of g^2, for RMS(u), for the update, which also sums up
    the squares of what it writes: the next step's RMS(w) (of weights that are changed in between, that of the step after).
    Vectors, whose v is whole, go by `rule`, all at once."""

    settings, buffers = AdafactorSettings, ("squares",)
    of_slices = False
    eps1, eps2 = torch.finfo(torch.float32).eps, 1e-3  # the least sqrt(v) and mean of row means; the least RMS(w)
    stack = 16  # rows that compiled code adds up side by side: the streams that a CPU prefetches

    def initialise(self, group, p, state):
        if p.dim() > 1:
            state["rows"] = p.new_zeros((*p.shape[:-1], 1), dtype=torch.float32)
            state["columns"] = p.new_zeros((*p.shape[:-2], 1, p.shape[-1]), dtype=torch.float32)
        else:
            super().initialise(group, p, state)
        state["size"] = p.detach().float().square().sum()

    def update_group(self, group, params):
        super().update_group(group, [p for p in params if p.dim() < 2])
        for t, members in self.alike(group, [p for p in params if p.dim() > 1]):
            for p in members:
                self.update_matrix(group, t, p)

    def rehearse(self):
        super().rehearse()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                group["params"][i] = torch.nn.Parameter(p.detach().flatten())
                group["params"][i].grad = p.grad.flatten()
        super().rehearse()

    def rate(self, group, t, count, size, size_of_u):
        """What u is multiplied by, for `count` weights whose sum of squares is `size`, as a tensor like that."""
        relative = (size / count).sqrt().clamp(min=self.eps2) / ((size_of_u / count).sqrt() / group["d"]).clamp(min=1)
        return relative * min(group["lr"], t**-0.5)

    # vectors

    def measure(self, group, t, params):
        sizes, sizes_of_u = [self.state[p]["size"] for p in params], [torch.zeros((), device=p.device) for p in params]
        self.sweep(self.observe, group, params, dict(new=t ** -group["beta2_decay"]), sizes_of_u)
        counts = torch.tensor([float(p.numel()) for p in params]).to(params[0].device, non_blocking=True)
        rates = self.rate(group, t, counts, torch.stack(sizes), torch.stack(sizes_of_u))
        torch._foreach_zero_(sizes)
        return [list(rates.unbind()), sizes]

    @staticmethod
    def observe(w, g, v, size_of_u, *, new):
        lerp_(v, g * g, new)
        u = g / v.sqrt().clamp(Adafactor.eps1)
        size_of_u.add_(total(u * u))

    def numbers(self, group, t):
        return dict(keep=keep(group))

    @staticmethod
    def rule(w, g, v, rate, size, *, keep):
        w.mul_(keep).sub_(g / v.sqrt().clamp(Adafactor.eps1) * rate)
        size.add_(total(w * w))

    # matrices

    def update_matrix(self, group, t, p):
        """One step of a weight that has rows and columns: its last two dimensions."""
        state, w, g = self.state[p], p.detach().float(), p.grad.float()
        rows, columns = state["rows"], state["columns"]
        fused = self.compiled and p.dtype == torch.float32 and w.dim() == 2 and w.numel() >= LONE
        fused = fused and len(w) >= 2 * self.stack and w.is_contiguous() and g.is_contiguous()
        run = compiled if fused else lambda rule: rule
        height = len(w) if fused or w.device.type != "cpu" else max(1, PIECE // w.shape[-1])
        cut = lambda x: [part.data for part in x.split(height, dim=-2)]  # noqa: E731

        if fused:
            even = len(g) - len(g) % self.stack
            over_columns, over_rows = compiled(self.squares)(g[:even].unflatten(0, (-1, self.stack)).data)
            sums = [(over_columns.flatten(0, 1), over_rows.sum(0)), self.squares(g[even:])]
        else:
            sums = [self.squares(part) for part in cut(g)]
        new = t ** -group["beta2_decay"]
        rows.lerp_(torch.cat([over_columns for over_columns, _ in sums], dim=-2) / w.shape[-1], new)
        columns.lerp_(sum(over_rows for _, over_rows in sums) / w.shape[-2], new)
        on_rows, on_columns = (rows / rows.mean(-2, keepdim=True).clamp(min=self.eps1)).rsqrt(), columns.rsqrt()
        pieces = list(zip(cut(w), cut(g), cut(on_rows), strict=True))
        size_of_u = sum(run(self.size_of_u)(g, on_rows, on_columns) for _, g, on_rows in pieces)
        numbers = self.rate(group, t, w.numel(), state["size"], size_of_u), torch.tensor(keep(group))
        state["size"] = sum(run(self.update)(*piece, on_columns, *numbers) for piece in pieces)
        if p.dtype != torch.float32:
            p.copy_(w)

    @staticmethod
    def squares(g):
        """Sums of g^2 over columns and over rows."""
        q = g * g
        return q.sum(-1, keepdim=True), q.sum(-2, keepdim=True)

    @staticmethod
    def size_of_u(g, on_rows, on_columns):
        u = g * (on_rows * on_columns).clamp(max=1 / Adafactor.eps1)  # two factors, worked out before: no root for each weight
        return total(u * u)

    @staticmethod
    def update(w, g, on_rows, on_columns, rate, keep):
        w.mul_(keep).sub_(g * (on_rows * on_columns).clamp(max=1 / Adafactor.eps1) * rate)
        return total(w * w)
