"""For embedding tables whose gradients are sparse: only the rows that a batch looked up are read and written."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.hardware import can_compile
from optimizers.base import Optimizer, Settings, compiled, hyper


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
    compiled = False

    def add_param_group(self, param_group: dict) -> None:
        """The sums are made here, as in torch.optim.Adagrad: filling 200 MB of them took a tenth of a short run's time."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["sum"] = torch.zeros_like(p, dtype=torch.float32)

    @staticmethod
    def rule(w: Tensor, squares: Tensor, rows: Tensor, g: Tensor, lr: Tensor | float, eps: float) -> None:
        """Of the n distinct `rows` of w and squares, both [N, C], with their gradients g [n, C]."""
        new = squares[rows] + g * g
        squares[rows] = new
        w[rows] -= (lr * g / (new.sqrt() + eps)).to(w.dtype)

    @torch.no_grad()
    def compile(self) -> None:
        """One pass over memory from now on, where there is a compiler; compiles at once, for dummy weights."""
        members = [(g, p) for g in self.param_groups for p in g["params"]]
        self.compiled = all(can_compile(p.device) for _, p in members)
        for group, p in members if self.compiled else ():
            # other sizes than the table's, no two of them equal: the compiled code must not take any for granted
            width = p.size(1)
            table = torch.zeros(width + 7, width, dtype=p.dtype, device=p.device)
            squares = torch.zeros_like(table, dtype=torch.float32)
            for n in {3, 5} - {width}:
                rows, g = torch.arange(n, device=p.device), torch.zeros(n, width, device=p.device)
                compiled(self.rule)(table, squares, rows, g, torch.tensor(0.1), group["eps"])

    def update_group(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            grad = p.grad.coalesce()
            update, lr = (compiled(self.rule), torch.tensor(group["lr"])) if self.compiled else (self.rule, group["lr"])
            # .data, _indices, _values: no views, which compiled code would have to guard on
            update(p.data, self.state[p]["sum"], grad._indices()[0].data, grad._values().float(), lr, group["eps"])


TABLE_OPTIMIZERS: dict[str, type[Settings]] = {"sparse_adagrad": SparseAdagradSettings}
