"""Averages of the weights, round any optimizer: `--average lawa_ema:decay=0.99`."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.spec import make
from optimizers.base import Chain, hyper, moved, parts


@dataclass(frozen=True)
class LawaEMA:
    """a <- decay a + (1 - decay) w every `every` steps from `start` on; evaluates at a.

    Source: latest weight averaging, arXiv 2306.03241; "LAWA EMA" of AlgoPerf's first round.
    """

    decay: float = hyper(0.99, "of the average", (0.9, 0.999, "complement"), below=1)
    every: int = hyper(1, "steps between updates", least=1)
    start: float = hyper(0, "steps before the first; below 1: fraction of the run")

    def weights(self, kept: list[Tensor]) -> Tensor | None:
        return kept[0] if kept else None

    def keep(self, kept: list[Tensor], w: Tensor) -> None:
        if kept:
            kept[0].lerp_(w.float(), 1 - self.decay)
        else:
            kept.append(w.to(torch.float32, copy=True))  # in bf16 an average of many would stand still


@dataclass(frozen=True)
class LawaQueue:
    """Keeps the weights of every `every`-th step, the last `length` of them; evaluates at their mean once there are as many.

    Source: latest weight averaging, arXiv 2209.14981; "LAWA queue" of AlgoPerf's first round.
    """

    length: int = hyper(5, "weights kept; each costs 4 bytes a parameter", least=1)
    every: int = hyper(20, "steps between them", least=1)
    start: float = hyper(0, "steps before the first; below 1: fraction of the run")

    def weights(self, kept: list[Tensor]) -> Tensor | None:
        return torch.stack(kept).mean(0) if len(kept) == self.length else None

    def keep(self, kept: list[Tensor], w: Tensor) -> None:
        kept.append(w.to(torch.float32, copy=True))
        del kept[: -self.length]


AVERAGES = {"lawa_ema": LawaEMA, "lawa_queue": LawaQueue}


class Averaged(Chain):
    """An optimizer whose eval() puts an average of the weights in place of the weights, and train() takes it away again. What
    is kept stands in the state_dict under `average`, beside torch's own entries, weight by weight."""

    def __init__(self, optimizer: torch.optim.Optimizer, average: LawaEMA | LawaQueue):
        super().__init__(*parts(optimizer))
        self.average, self.t = average, 0
        self.kept: dict[Tensor, list[Tensor]] = {p: [] for g in self.param_groups for p in g["params"]}
        self.aside: dict[Tensor, Tensor] = {}  # the training weights, while the average is in their place

    def __getstate__(self):
        return super().__getstate__() | {name: getattr(self, name) for name in ("average", "t", "kept", "aside")}

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.t += 1
        if self.t > self.average.start and (self.t - self.average.start) % self.average.every == 0:
            for p, kept in self.kept.items():
                self.average.keep(kept, p.detach())
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        super().eval()
        for p, kept in self.kept.items():
            if p not in self.aside and (average := self.average.weights(kept)) is not None:
                self.aside[p] = p.detach().clone()
                p.copy_(average)

    @torch.no_grad()
    def train(self) -> None:
        while self.aside:
            p, weight = self.aside.popitem()
            p.copy_(weight)
        super().train()

    def state_dict(self) -> dict:
        params = [p for g in self.param_groups for p in g["params"]]
        kept = [self.kept[p] for p in params]
        return super().state_dict() | {"average": {"t": self.t, "kept": kept, "aside": [self.aside.get(p) for p in params]}}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        saved, params = state_dict["average"], [p for g in self.param_groups for p in g["params"]]
        self.t = saved["t"]
        self.kept = {p: moved(kept, p.device) for p, kept in zip(params, saved["kept"], strict=True)}
        self.aside = {p: moved(w, p.device) for p, w in zip(params, saved["aside"], strict=True) if w is not None}


def build_average(spec: str, steps: int) -> LawaEMA | LawaQueue | None:
    """The average that `spec` names, for a run of `steps` steps; None: none. Raises UsageError: unknown name or key, or a value
    out of range."""
    if spec == "none":
        return None
    made = make(spec, AVERAGES, "average", "keep")
    return dataclasses.replace(made, start=round(made.start * steps) if made.start < 1 else made.start)
