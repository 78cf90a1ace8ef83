"""The head that is untied during a run."""

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from optimizers.average import Averaged


class TiedHead:
    """A head that shares the embedding's weight for the first part of a run, though both exist (`--tied-until`). While tied,
    only the head is updated, by the gradients of both, and the embedding copies it; then the embedding continues from the
    head's optimizer state (modded-nanogpt #51, #53). until: step of the first update with two weights; 0: never tied."""

    def __init__(self, gpt: nn.Module, optimizer: torch.optim.Optimizer, until: float):
        self.head, self.embedding, self.optimizer = gpt.head.weight, gpt.embedding.weight, optimizer
        self.until = until

    def before_step(self, step: int) -> None:
        """In the first step of two weights: one history for both."""
        if self.until and step == math.ceil(self.until):
            state = self.optimizer.state
            state[self.embedding] = tree_map_only(Tensor, Tensor.clone, state[self.head])
            if isinstance(self.optimizer, Averaged):
                self.optimizer.copy(self.head, self.embedding)

    def after_backward(self, step: int) -> None:
        if step < self.until:
            self.head.grad.add_(self.embedding.grad)
            self.embedding.grad = None

    def after_update(self, step: int) -> None:
        """step: updates done. After every change of the weights, an average's for the training weights included."""
        if self.until and step - 1 < self.until:
            self.embedding.data.copy_(self.head)
