"""Hashed n-gram embeddings: memory by lookup, besides what the blocks compute."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.shape import ModelConfig


class NgramEmbedding(nn.Module):
    """A learned vector for the last n tokens, looked up by hash, summed over the orders n. Starts at zero.

    modded-nanogpt record 62 (bigrams, after DeepSeek's Engram); on bytes, where one token says little, longer n-grams
    pay too. Training copes with collisions. Positions before the start of the sequence count as token 0. The tables of
    all orders lie in one parameter [orders * ngram_buckets, ngram_width]: one lookup, one gradient. Narrow vectors go to
    slices of the stream in turn, by order: as many parameters hold more rows, with fewer collisions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.orders = [int(n) for n in config.ngram_orders.split(",")]
        self.buckets = config.ngram_buckets
        width = min(config.ngram_width or config.width, config.width)
        self.slices, self.rest = divmod(config.width, width)
        self.table = nn.Embedding(len(self.orders) * self.buckets, width)

    def rows(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 -> rows of the table [B, T, orders]: a multiply-and-add hash, latest token first."""
        digest, rows = torch.zeros_like(tokens), {}
        for back in range(max(self.orders)):
            past = F.pad(tokens, (back, 0))[:, : tokens.size(1)]
            digest = (digest * 1000003 + past + 1) % 2147483647
            mixed = (digest ^ (digest >> 15)) * 69621 % 2147483647  # a linear hash would put neighbours in few buckets
            rows[back + 1] = (mixed ^ (mixed >> 13)) % self.buckets
        return torch.stack([rows[n] + i * self.buckets for i, n in enumerate(self.orders)], -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 -> [B, T, C] fp32."""
        found = self.table(self.rows(tokens))  # [B, T, orders, ngram_width]
        found = F.pad(found, (0, 0, 0, -len(self.orders) % self.slices))
        return F.pad(found.unflatten(2, (-1, self.slices)).sum(2).flatten(-2), (0, self.rest))
