"""Methods that look at each weight's own history: the classics, and Adam with its relatives.

A method is torch's own class if that is fused; else a `rule` (see `base.Elementwise`).
"""

import math

import torch
from torch.utils._pytree import tree_leaves

from optimizers.base import BETA1, BETA2, DECAY, EPS, LR, MOMENTUM, Elementwise, Method, hyper, lerp, lerp_, total


class SGD(Method, torch.optim.SGD):
    """g <- g + wd w;  m <- mu m + g;  w <- w - lr (g + mu m) with Nesterov's form, w - lr m without.

    Source: torch.optim.SGD (fused). Its weight decay is coupled: it passes through the momentum."""

    lr, momentum = LR(0.1), MOMENTUM(0.9)
    nesterov = hyper(True, "look one step ahead")
    weight_decay = DECAY(0.0, 1e-5, 1e-2)
    state_per_parameter, transfer = 4.0, 0.0

    def __init__(self, params, lr=None, **given):
        super().__init__(params, lr, **given)
        # torch 2.13's fused version on a CPU leaves 16-bit weights as they are (pytorch#191763)
        for group in self.param_groups:
            group["fused"] = not any(p.device.type == "cpu" and p.element_size() == 2 for p in group["params"])

    def arguments(self, nesterov, **values):
        self.ahead = nesterov
        return values | dict(nesterov=nesterov and values["momentum"] > 0, fused=True)  # torch refuses it without momentum

    def step(self, closure=None):
        for group in self.param_groups:  # a schedule may begin without momentum
            group["nesterov"] = self.ahead and group["momentum"] > 0
        return super().step(closure)


class Signum(Elementwise):
    """m <- mu m + (1 - mu) g;  w <- (1 - lr wd) w - lr sign(m).

    Source: arXiv 1802.04434; momentum 0 is signSGD."""

    lr, momentum, weight_decay = LR(3e-4, 1e-4, 1e-2), MOMENTUM(0.9, 0.0), DECAY(0.1)
    buffers, state_per_parameter, toy_lr = ("average",), 4.0, 0.02

    @staticmethod
    def rule(w, g, m, *, new, lr, keep):
        lerp_(m, g, new)
        w.mul_(keep).sub_(m.sign() * lr)


class Adagrad(Method, torch.optim.Adagrad):
    """s <- s + g^2;  w <- w - lr g / (sqrt(s) + eps), with g + wd w for g.

    Source: Duchi et al. 2011 (JMLR 12); torch.optim.Adagrad (fused on CPU)."""

    lr, initial, eps = LR(3e-3, 1e-3, 1e-1), hyper(0.0, "start of s: damps the first steps"), EPS(1e-10)
    weight_decay = DECAY(0.0, 1e-6, 1e-3, "wd (coupled), decayed roles only")
    state_per_parameter, toy_lr = 4.0, 0.3

    def __init__(self, params, lr=None, **given):
        params = list(params)
        self.on_cpu = all(p.device.type == "cpu" for p in tree_leaves(params) if isinstance(p, torch.Tensor))
        super().__init__(params, lr, **given)

    def arguments(self, initial, **values):
        return values | dict(initial_accumulator_value=initial, fused=self.on_cpu)  # torch has no other fused version


class RMSprop(Elementwise):
    """v <- b2 v + (1 - b2) g^2;  u = g / (sqrt(v) + eps);  m <- mu m + u;  w <- w - lr m, with g + wd w for g.

    Source: Tieleman and Hinton 2012 (lecture 6.5); the same numbers as torch.optim.RMSprop, in one pass over memory.
    Without bias correction the first steps are 1 / sqrt(1 - b2) too long: warm up."""

    lr, beta2, momentum, eps = LR(1e-3), BETA2(0.95), MOMENTUM(0.0, 0.0, 0.95), EPS()
    weight_decay = DECAY(0.0, 1e-6, 1e-3, "wd (coupled), decayed roles only")
    buffers, state_per_parameter = ("squares", "average"), 4.0  # 8 with momentum

    def names(self, group):
        return self.buffers if group["momentum"] else self.buffers[:1]

    @staticmethod
    def rule(w, g, v, m=None, *, lr, new2, momentum, eps, weight_decay):
        g = g + w * weight_decay
        lerp_(v, g * g, new2)
        u = g / (v.sqrt() + eps)
        w.sub_((u if m is None else m.mul_(momentum).add_(u)) * lr)


class Adadelta(Elementwise):
    """v <- rho v + (1 - rho) g^2;  d = g sqrt(u + eps) / sqrt(v + eps);  u <- rho u + (1 - rho) d^2;
    w <- (1 - lr wd) w - lr d.

    Source: arXiv 1212.5701; with wd = 0 the same numbers as torch.optim.Adadelta. eps sets the size of the first steps."""

    lr, beta2 = LR(1.0, help="factor on the step"), BETA2(0.95, 0.9, 0.99, "rho")
    eps = hyper(1e-6, "inside both roots", (1e-8, 1e-4, "log"))
    weight_decay = DECAY(0.0, 1e-3, 0.3)
    buffers, toy_lr = ("squares", "steps_squared"), 3.0

    @staticmethod
    def rule(w, g, v, u, *, lr, new2, eps, keep):
        lerp_(v, g * g, new2)
        d = ((u + eps) / (v + eps)).sqrt() * g
        lerp_(u, d * d, new2)
        w.mul_(keep).sub_(d * lr)


class Adam(Method, torch.optim.Adam):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr m^ / (sqrt(v^) + eps), with g + wd w for g.

    Source: arXiv 1412.6980; torch.optim.Adam (fused). amsgrad (arXiv 1904.09237): the largest v so far for v."""

    lr, beta1, beta2, eps = LR(3e-3), BETA1(0.9), BETA2(0.95), EPS()
    amsgrad = hyper(False, "divide by the largest average of squares so far; 4 more bytes of state")
    weight_decay = DECAY(0.0, 1e-6, 1e-3, "wd (coupled), decayed roles only")

    def arguments(self, beta1, beta2, **values):
        return values | dict(betas=(beta1, beta2), fused=True)


class AdamW(Method, torch.optim.AdamW):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps).

    Source: arXiv 1711.05101; torch.optim.AdamW (fused). beta2 0.95 rather than Adam's 0.999: GPT-3, nanoGPT."""

    lr, beta1, beta2, eps, weight_decay = LR(3e-3), BETA1(0.9), BETA2(0.95), EPS(), DECAY(0.1)

    arguments = Adam.arguments


class CautiousAdamW(Elementwise):
    """AdamW whose decay touches only weights that the update shrinks: u = m^ / (sqrt(v^) + eps);
    w <- w - lr (u + wd [u w > 0] w). With `every` = k it moves only every k-th step, by the sum of the gradients since.

    Source: cautious weight decay, arXiv 2510.12402, modded-nanogpt #50 and #53 (> instead of >=); `every`: #39."""

    lr, beta1, beta2, eps, weight_decay = LR(3e-3), BETA1(0.9), BETA2(0.95), EPS(), DECAY(0.1)
    cautious = hyper(True, "false: decay all weights, as AdamW does")
    every = hyper(1, "steps between updates", least=1)
    buffers = ("average", "squares")

    def names(self, group):
        return (*self.buffers, "gathered") if group["every"] > 1 else self.buffers

    @staticmethod
    def rule(w, g, m, v, gathered=None, *, new1, new2, rate, correction, eps, keep, decay, cautious):
        if gathered is not None:
            g = gathered + g
            gathered.mul_(0)
        lerp_(m, g, new1)
        lerp_(v, g * g, new2)
        u = m / (v.sqrt() * correction + eps)
        if cautious:
            w.sub_((w * u).sign().clamp(0) * w * decay + u * rate)
        else:
            w.mul_(keep).sub_(u * rate)

    def update_group(self, group, params):
        for t, members in self.alike(group, params):
            if t % group["every"]:
                gathered = [self.state[p]["gathered"] for p in members]
                torch._foreach_add_(gathered, [p.grad for p in members])
            else:
                self.sweep(self.rule, group, t // group["every"], members)


class NAdamW(Elementwise):
    """AdamW with b1 m + (1 - b1) g, m already updated, instead of m (Nesterov's form).

    Source: Dozat 2016, as AlgoPerf's baseline has it; torch.optim.NAdam has another momentum schedule."""

    lr, beta1, beta2, eps, weight_decay = LR(3e-3), BETA1(0.95, 0.8, 0.99), BETA2(0.95), EPS(), DECAY(0.1)
    buffers = ("average", "squares")

    @staticmethod
    def rule(w, g, m, v, *, new1, new2, rate, correction, eps, keep):
        lerp_(m, g, new1)
        lerp_(v, g * g, new2)
        w.mul_(keep).sub_(lerp(m, g, new1) / (v.sqrt() * correction + eps) * rate)


class NAdamP(NAdamW):
    """NAdamW with the p-th root of v^ instead of its square root: w <- (1 - lr wd) w - lr m~ / (v^^(1/p) + eps).

    Source: "NadamP" of AlgoPerf's first round (algorithms_results_v0.5, team 11)."""

    root = hyper(2.0, "p; 2 is NAdamW", (1.5, 3.0, "linear"), least=1)

    def numbers(self, group, t):
        power = 1 / group["root"]
        return dict(square=power == 0.5, power=power, correction=(1 - group["beta2"] ** t) ** -power)

    @staticmethod
    def rule(w, g, m, v, *, square, new1, new2, rate, power, correction, eps, keep):
        lerp_(m, g, new1)
        lerp_(v, g * g, new2)
        root = v.sqrt() if square else v**power
        w.mul_(keep).sub_(lerp(m, g, new1) / (root * correction + eps) * rate)


class GeneralizedAdam(NAdamW):
    """NAdamW; or, with precondition=false, m <- b1 m + g;  w <- (1 - lr wd) w - lr (g + b1 m), or - lr m without nesterov.

    Source: "Generalized Adam" of AlgoPerf's first round (algorithms_results_v0.5, team 11), which searches over NAdamW and
    momentum SGD with decoupled decay. Without nesterov its m is not bias-corrected (its quirk, kept)."""

    lr = LR(3e-3, 3e-4, 1.0)
    nesterov = hyper(True, "look one step ahead", (False, True, "choice"))
    precondition = hyper(True, "divide by the root of the average of squares; if false lr is near 1", (False, True, "choice"))

    def names(self, group):
        return self.buffers if group["precondition"] else self.buffers[:1]

    def numbers(self, group, t):
        return {} if group["precondition"] and group["nesterov"] else dict(rate=group["lr"])

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


class Amos(Elementwise):
    """v <- b v + (1 - b) q, q the mean of g^2 over the weight tensor;  y = lr^2 q / (v^ sqrt(1 + sqrt(lr) k / 4));
    w <- w - average of (lr s g / sqrt(v^) + y w / 2) / (1 + sqrt(lr s) k / 4), s = sqrt(2 / columns), 1/2 for vectors;
    k <- k + y (1 + k).

    Source: arXiv 2210.11693; one v and k per tensor as in pytorch_optimizer. Weight decay and rate decay are its own."""

    lr, beta2 = LR(1e-2, 3e-3, 3e-1, "relative step: xi"), BETA2(0.98, help="average of the mean square")
    momentum, eps = MOMENTUM(0.9, 0.0, 0.98, "average of the updates"), EPS(1e-18, "added to v")
    buffers, state_per_parameter, toy_lr, transfer = ("average",), 4.0, 0.3, -0.5

    def measure(self, group, t, params):
        lr, beta2, (q,) = group["lr"], group["beta2"], self.sums(self.square, group, t, params)
        torch._foreach_div_(q, [float(p.numel()) for p in params])
        rates = [lr * (math.sqrt(2 / p[0].numel()) if p.dim() > 1 else 0.5) for p in params]
        rate = torch.stack([torch.full_like(x, r) for x, r in zip(q, rates, strict=True)])  # no copy that waits for a GPU
        v, k = (torch.stack([self.buffer(p, name, x) for p, x in zip(params, q, strict=True)]) for name in ("square", "decay"))
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

    @staticmethod
    def rule(w, g, m, on_g, on_w, *, new):
        lerp_(m, g * on_g + w * on_w, new)
        w.sub_(m)


class Lion(Elementwise):
    """u = sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g;  w <- (1 - lr wd) w - lr u.

    Source: arXiv 2302.06675. Against AdamW: lr 3-10 times lower, wd as much higher."""

    lr, beta1 = LR(6e-4, 5e-5, 5e-3), BETA1(0.9, help="weight of the average in the update")
    beta2, weight_decay = BETA2(0.95, help="average of gradients"), DECAY(0.5, 0.1, 3.0)
    buffers, state_per_parameter, toy_lr = ("average",), 4.0, 0.02

    @staticmethod
    def rule(w, g, m, *, lr, new1, new2, keep):
        w.mul_(keep).sub_(lerp(m, g, new1).sign() * lr)
        lerp_(m, g, new2)


class AdEMAMix(Elementwise):
    """AdamW with m^ + a m2 instead of m^: m2 <- b3 m2 + (1 - b3) g, a slow average without bias correction; a rises
    in a line from 0 to alpha and b3, by equal steps of its half-life, from b1 to beta3 over `ramp` steps.

    Source: arXiv 2409.03137, github.com/apple/ml-ademamix."""

    lr, beta1 = LR(1e-3, 3e-4, 3e-2), BETA1(0.9, help="fast average of gradients")
    beta2, beta3 = BETA2(0.95), BETA1(0.999, 0.99, 0.9999, "slow average of gradients")
    alpha = hyper(8.0, "weight of the slow average", (2.0, 10.0, "linear"))
    ramp = hyper(0.999, "steps until alpha and beta3 are reached; below 1: fraction of the run")
    eps, weight_decay = EPS(), DECAY(0.1)
    buffers, state_per_parameter = ("average", "slow_average", "squares"), 12.0

    def numbers(self, group, t):
        done = min(1.0, t / group["ramp"]) if group["ramp"] else 1.0
        fast, final = (math.log(max(group[beta], 1e-8)) for beta in ("beta1", "beta3"))  # minus log 2 over the half-life
        slow_beta = math.exp(fast * final / ((1 - done) * final + done * fast))
        return dict(new3=1 - slow_beta, slow_rate=group["lr"] * done * group["alpha"])

    @staticmethod
    def rule(w, g, m, slow, v, *, new1, new2, new3, rate, slow_rate, correction, eps, keep):
        lerp_(m, g, new1)
        lerp_(slow, g, new3)
        lerp_(v, g * g, new2)
        w.mul_(keep).sub_((m * rate + slow * slow_rate) / (v.sqrt() * correction + eps))


class ADOPT(Elementwise):
    """u = g / max(sqrt(v), eps), each clipped to +-t^0.25;  m <- b1 m + (1 - b1) u;  w <- (1 - lr wd) w - lr m;
    v <- b2 v + (1 - b2) g^2, so u divides by a v without g. The first step only sets v = g^2.

    Source: arXiv 2411.02853 with its clipping of November 2024, github.com/iShohei220/adopt."""

    lr, beta1 = LR(1e-3, 3e-4, 3e-2), BETA1(0.9, help="average of normalised gradients")
    beta2, eps, weight_decay = BETA2(0.99, 0.9, 0.9999), EPS(1e-6), DECAY(0.1)
    buffers = ("average", "squares")

    def numbers(self, group, t):
        return dict(first=t == 1, limit=(t - 1) ** 0.25)

    @staticmethod
    def rule(w, g, m, v, *, first, lr, new1, new2, limit, eps, keep):
        if first:
            v.add_(g * g)
            return
        lerp_(m, (g / v.sqrt().clamp(eps)).clamp(-limit, limit), new1)
        lerp_(v, g * g, new2)
        w.mul_(keep).sub_(m * lr)


class MARS(Elementwise):
    """c = g + gamma b1 / (1 - b1) (g - g_before), shortened to norm 1 per weight tensor;  AdamW on c.

    Source: arXiv 2411.10438, github.com/AGI-Arena/MARS, in the form that stores the previous gradient."""

    lr, beta1 = LR(3e-3), BETA1(0.95, help="average of corrected gradients")
    beta2 = BETA2(0.99, help="average of their squares")
    gamma = hyper(0.025, "weight of the correction", (0.005, 0.1, "log"))
    eps, weight_decay = EPS(), DECAY(0.1)
    adamw_lr = hyper(3e-3, "peak learning rate of vectors and scalars", (3e-4, 3e-2, "log"), rest=True)
    roles = ("matrix", "embedding", "head")
    buffers, state_per_parameter = ("average", "squares", "gradient_before"), 12.0

    def numbers(self, group, t):
        return dict(factor=group["gamma"] * group["beta1"] / (1 - group["beta1"]))

    def measure(self, group, t, params):
        (squares,) = self.sums(self.size, group, t, params)
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
