"""Methods around any optimizer: averages of the weights to evaluate at (`--average lawa_ema:decay=0.99`), and gradients from a
point ahead of the weights (`--outer ema_nesterov`)."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from engine.spec import make
from optimizers.base import Chain, hyper, moved, parts


def fp32(w: Tensor) -> Tensor:
    """A copy: a bf16 average of many would stand still."""
    return w.to(torch.float32, copy=True)


@dataclass(frozen=True)
class Average:
    """Takes in the weights every `every` steps from `start` on. `kept` is what it has for the weight w."""

    every: int = hyper(1, "steps between updates", least=1)
    start: float = hyper(0, "steps before the first; below 1: fraction of the run")

    def at(self, kept: list[Tensor], w: Tensor) -> Tensor:
        """The weight to evaluate at."""
        return kept[0] if kept else w

    def after(self, kept: list[Tensor], w: Tensor, t: int, rate: float) -> None:
        """Step t, at `rate` times the peak learning rate, has led to w."""
        if t > self.start and (t - self.start) % self.every == 0:
            self.keep(kept, w)


@dataclass(frozen=True)
class LawaEMA(Average):
    """a <- decay a + (1 - decay) w every `every` steps from `start` on; evaluates at a.

    Source: latest weight averaging, arXiv 2306.03241; "LAWA EMA" of AlgoPerf's first round."""

    decay: float = hyper(0.99, "of the average", (0.9, 0.999, "complement"), below=1)

    def keep(self, kept: list[Tensor], w: Tensor) -> None:
        if kept:
            kept[0].lerp_(w.float(), 1 - self.decay)
        else:
            kept.append(fp32(w))


@dataclass(frozen=True)
class TailEMA(LawaEMA):
    """a as in `lawa_ema`, over the end of the run; evaluates at (1 - blend) w + blend a.

    Source: modded-nanogpt's optimizer track #45: over 150 steps, blend 0.6, over the last 500 of 2,900."""

    decay: float = hyper(0.9933, "of the average", (0.95, 0.998, "complement"), below=1)
    start: float = hyper(0.83, "steps before the first; below 1: fraction of the run")
    blend: float = hyper(0.6, "share of the average", (0.2, 1.0, "linear"), most=1)

    def at(self, kept, w):
        return torch.lerp(w.float(), kept[0], self.blend) if kept else w


@dataclass(frozen=True)
class LawaQueue(Average):
    """Keeps the weights every `every` steps, the last `length` times; evaluates at their mean once it has that many.

    Source: latest weight averaging, arXiv 2209.14981; "LAWA queue" of AlgoPerf's first round."""

    length: int = hyper(5, "weights kept; each costs 4 bytes a parameter", least=1)
    every: int = hyper(20, "steps between them", least=1)

    def at(self, kept, w):
        return torch.stack(kept).mean(0) if len(kept) == self.length else w

    def keep(self, kept, w):
        kept.append(fp32(w))
        del kept[: -self.length]


@dataclass(frozen=True)
class EMANesterov:
    """x <- A(x + beta m), with the gradient taken there;  m <- decay m + (1 - decay) (x - x before). A is the optimizer.
    beta follows the learning rate, and is 0 before `start` and after `stop`. Evaluates at x.

    Source: arXiv 2605.25395; modded-nanogpt's optimizer track #39; start and stop are its steps 500 and 2,400 of 3,125."""

    beta: float = hyper(0.6, "at the peak learning rate", (0.1, 0.95, "log"))
    decay: float = hyper(0.99, "of the average of steps", (0.9, 0.998, "complement"), below=1)
    start: float = hyper(0.16, "steps before the first; below 1: fraction of the run")
    stop: float = hyper(0.77, "the last step; up to 1: fraction of the run")

    at = Average.at

    def after(self, kept, w, t, rate):
        """Moves w on to the point ahead."""
        if not self.start < t <= self.stop:
            kept.clear()
        elif not kept:
            kept += [fp32(w), torch.zeros_like(w, dtype=torch.float32)]
        else:
            x, m = kept
            m.lerp_(w - x, 1 - self.decay)
            x.copy_(w)
            w.add_(m, alpha=self.beta * rate)


AVERAGES = {"lawa_ema": LawaEMA, "lawa_queue": LawaQueue, "tail_ema": TailEMA}
OUTER = {"ema_nesterov": EMANesterov}
Around = Average | EMANesterov


class Averaged(Chain):
    """An optimizer with such methods around it, the outer one first. eval() swaps their weights in for the training weights,
    train() swaps those back. What is kept is in the state_dict under `average`, weight by weight."""

    def __init__(self, optimizer: torch.optim.Optimizer, *around: Around):
        super().__init__(*parts(optimizer))
        self.around, self.t = around, 0
        self.kept: dict[Tensor, list[list[Tensor]]] = {p: [[] for _ in around] for g in self.param_groups for p in g["params"]}
        self.aside: dict[Tensor, Tensor] = {}  # the training weights, while others are in their place

    def update_weights(self) -> None:
        super().update_weights()
        self.t += 1
        for group in self.param_groups:
            rate = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
            for p in group["params"]:
                for method, kept in reversed(list(zip(self.around, self.kept[p], strict=True))):
                    method.after(kept, p.detach(), self.t, rate)

    @torch.no_grad()
    def eval(self) -> None:
        super().eval()
        for p, of_methods in self.kept.items() if not self.aside else ():
            w = p.detach()
            for method, kept in zip(self.around, of_methods, strict=True):
                w = method.at(kept, w)
            if any(of_methods):
                self.aside[p] = p.detach().clone()
                p.copy_(w)

    @torch.no_grad()
    def train(self) -> None:
        while self.aside:
            p, weight = self.aside.popitem()
            p.copy_(weight)
        super().train()

    def state_dict(self) -> dict:
        kept, aside = list(self.kept.values()), [self.aside.get(p) for p in self.kept]
        return super().state_dict() | {"average": {"t": self.t, "kept": kept, "aside": aside}}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        saved = state_dict["average"]
        self.t = saved["t"]
        self.kept = {p: moved(kept, p.device) for p, kept in zip(self.kept, saved["kept"], strict=True)}
        self.aside = {p: moved(w, p.device) for p, w in zip(self.kept, saved["aside"], strict=True) if w is not None}

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Let `target` continue with what is kept of `source`."""
        self.kept[target] = tree_map_only(Tensor, Tensor.clone, self.kept[source])


def build_around(outer: str, average: str, steps: int) -> list[Around]:
    """The methods that two SPECs name, for a run of `steps` steps. Raises UsageError: unknown name or key, wrong value."""
    given = ((outer, OUTER, "outer method"), (average, AVERAGES, "average"))
    around = []
    for method in (make(spec, known, what, "at") for spec, known, what in given if spec != "none"):
        ends = {key: getattr(method, key) for key in ("start", "stop") if hasattr(method, key)}
        in_steps = {key: round(n * steps) for key, n in ends.items() if n < 1 or (key, n) == ("stop", 1)}
        around.append(dataclasses.replace(method, **in_steps))
    return around
