"""For embedding tables whose gradients are sparse: only the rows that a batch looked up are read and written."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizers.base import Optimizer, Settings, hyper


@dataclass(frozen=True)
class SparseAdagradSettings(Settings):
    """Of the rows looked up in this step:  s <- s + g^2;  w <- w - lr g / (sqrt(s) + eps).

    Source: Duchi et al. 2011 (JMLR 12), made for features that are rare: a row seen for the n-th time moves by about
    lr / sqrt(n), as an estimate from counts should. Same numbers as torch.optim.Adagrad, which has no fused sparse form.
    """

    lr: float = hyper(0.05, "peak learning rate", (1e-2, 0.3, "log"))
    eps: float = hyper(1e-10, "floor of the denominator")

    roles = ("table",)
    state_per_parameter = 4.0


class SparseAdagrad(Optimizer):
    """See SparseAdagradSettings. A step costs as much as the rows in the gradient, whatever the size of the table."""

    settings = SparseAdagradSettings

    def update_group(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["sum"] = torch.zeros_like(p, dtype=torch.float32)
            grad = p.grad.coalesce()
            rows, g = grad.indices()[0], grad.values().float()
            squares = state["sum"].index_select(0, rows).addcmul_(g, g)
            state["sum"].index_copy_(0, rows, squares)
            step = g / squares.sqrt_().add_(group["eps"])
            p.index_add_(0, rows, step.to(p.dtype), alpha=-group["lr"])


TABLE_OPTIMIZERS: dict[str, type[Settings]] = {"sparse_adagrad": SparseAdagradSettings}
