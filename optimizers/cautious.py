"""AdamW as the speedrun has it for what Muon leaves: cautious weight decay, and updates every few steps."""

from dataclasses import dataclass

import torch

from optimizers.base import Elementwise, Settings, adam_numbers, hyper, lerp_


@dataclass(frozen=True)
class CautiousAdamWSettings(Settings):
    """AdamW whose decay touches only weights that the update shrinks: u = m^ / (sqrt(v^) + eps);
    w <- w - lr (u + wd [u w > 0] w). With `every` = k it moves in every k-th step alone, by the sum of the gradients since.

    Source: cautious weight decay, arXiv 2510.12402, modded-nanogpt #50 and #53 (> in the place of >=); `every`: #39.
    """

    lr: float = hyper(3e-3, "peak learning rate", (3e-4, 3e-2, "log"))
    beta1: float = hyper(0.9, "average of gradients", (0.8, 0.98, "complement"))
    beta2: float = hyper(0.95, "average of squares", (0.9, 0.999, "complement"))
    eps: float = hyper(1e-8, "floor of the denominator")
    weight_decay: float = hyper(0.1, "wd, decayed roles only", (1e-2, 1.0, "log"))
    cautious: bool = hyper(True, "false: decay all weights, as AdamW does")
    every: int = hyper(1, "steps between updates", least=1)


class CautiousAdamW(Elementwise):
    settings, buffers = CautiousAdamWSettings, ("average", "squares")

    def names(self, group):
        return (*self.buffers, "gathered") if group["every"] > 1 else self.buffers

    def numbers(self, group, t):
        decay = group["lr"] * group["weight_decay"]
        return adam_numbers(group, t) | dict(decay=decay, cautious=group["cautious"])

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
                self.sweep(self.rule, group, members, self.numbers(group, t // group["every"]))

    def rehearse(self):
        for _ in range(max(g["every"] for g in self.param_groups)):
            self.step()
