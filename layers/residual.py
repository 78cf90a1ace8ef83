"""What the speedrun adds around the blocks and inside attention. Each piece exists only if its field of ModelConfig asks for
it; a block without any of them is `x = block(x, rotary)`, in model.py.

The definitions are modded-nanogpt's, each with the record that brought it. Gates' weights start at zero; `model.roles` calls
them vectors, so that no optimizer takes them for matrices (modded-nanogpt moved them from Muon to Adam in #56) or decays them.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.shape import ModelConfig

GATE_CHANNELS = 12  # of the residual stream that a gate reads (#28)


class Gate(nn.Module):
    """sigmoid(W x[..., :12]), [..., C] -> [..., outputs]; 1/2 at the start (#28)."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, min(GATE_CHANNELS, width)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x[..., : self.weight.size(1)], self.weight.to(x.dtype)).sigmoid()


class Smear(nn.Module):
    """x_t + l sigmoid(W x_t[:12]) x_(t-1) of the embedding x [B, T, C], before its norm; l starts at 0 (#34)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config.width, 1)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        now, before = x[:, 1:], x[:, :-1]
        return torch.cat([x[:, :1], now + self.strength * self.gate(now) * before], dim=1)


class ResidualPaths(nn.Module):
    """The blocks, and the paths around them that the config asks for."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.values = ValueEmbeddings(config) if config.value_embeddings else None
        skips = {"unet": UNetSkips, "single": SingleSkip}.get(config.skips)
        self.skips = skips(config) if skips and config.layers > 1 else None  # nothing to skip with a single block
        self.shortcut = InputShortcut(config) if config.input_shortcut else None
        self.backout = Backout(config) if config.backout else None

    def forward(
        self, blocks: Iterable[Callable[..., Tensor]], x: Tensor, rotary: tuple[Tensor, Tensor] | None, tokens: Tensor,
        documents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, T, C] -> [B, T, C], through all blocks; tokens [B, T] are those that x embeds."""
        inputs, outputs = x, []
        for layer, block in enumerate(blocks):
            if self.skips is not None:
                x = self.skips(layer, x, outputs, inputs)
            if self.shortcut is not None:
                x = self.shortcut(layer, x, inputs)
            values = None if self.values is None else self.values(layer, tokens, x.dtype)
            x = block(x, rotary, values, documents)
            outputs.append(x)
        return x if self.backout is None else self.backout(x, outputs)


class InputShortcut(nn.Module):
    """a x + b x0 before each block, x0 what enters the first; a and b, learned for each, start at 1 and 0 (#9)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.stream = nn.Parameter(torch.ones(config.layers))
        self.inputs = nn.Parameter(torch.zeros(config.layers))

    def forward(self, layer: int, x: Tensor, inputs: Tensor) -> Tensor:
        return self.stream[layer] * x + self.inputs[layer] * inputs


class UNetSkips(nn.Module):
    """The output of block j is added before block L - 1 - j, for j < L/2, by a learned weight that starts at 1 (#11)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = config.layers
        self.weights = nn.Parameter(torch.ones(config.layers // 2))  # by j

    def forward(self, layer: int, x: Tensor, outputs: list[Tensor], inputs: Tensor) -> Tensor:
        source = self.layers - 1 - layer
        return x + self.weights[source] * outputs[source] if source < layer else x


class SingleSkip(nn.Module):
    """The U-net's skip from a third of the depth, 4 -> 7 of 12 blocks (#45), times sigmoid(l) 2 sigmoid(W x0[:12])
    (#55), with l = -1.5 at the start: 0.18 in all."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.source = min(config.layers // 3, config.layers // 2 - 1)
        self.target = config.layers - 1 - self.source
        self.strength = nn.Parameter(torch.tensor(-1.5))
        self.gate = Gate(config.width, 1)

    def forward(self, layer: int, x: Tensor, outputs: list[Tensor], inputs: Tensor) -> Tensor:
        if layer != self.target:
            return x
        return x + self.strength.sigmoid() * 2 * self.gate(inputs) * outputs[self.source]


class Backout(nn.Module):
    """x - c y after the last block, y the output of the block at two thirds of the depth, c learned from 1/2 on (#40): takes
    what the lower blocks wrote only for the upper ones out of the prediction."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.source = 2 * config.layers // 3  # 8 of 12
        self.strength = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        return x - self.strength * outputs[self.source]


def value_table(config: ModelConfig, layer: int) -> int | None:
    """Which table of value embeddings a block reads: n tables serve the first n and last n blocks, 0 1 2 ... 0 1 2 (#17)."""
    n = min(config.value_embeddings, config.layers)
    if layer < n:
        return layer
    return layer - (config.layers - n) if layer >= config.layers - n else None


class ValueEmbeddings(nn.Module):
    """A vector for the token itself, beside the values that attention makes of the stream (#14; of fewer blocks, #17)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n = min(config.value_embeddings, config.layers)
        self.tables = nn.ModuleList(nn.Embedding(config.padded_vocab, config.width) for _ in range(n))
        self.of_layer = [value_table(config, layer) for layer in range(config.layers)]

    def forward(self, layer: int, tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
        """tokens [B, T] -> [B, T, C], or None for a block in the middle."""
        table = self.of_layer[layer]
        return None if table is None else self.tables[table](tokens).to(dtype)


class AttentionExtras(nn.Module):
    """What the config adds before and after the softmax of one block's attention."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.key_offset = config.key_offset
        self.values = ValueMix(config) if value_table(config, layer) is not None else None
        self.exclusion = Exclusion(config) if config.exclusive_attention else None
        self.gate = Gate(config.width, config.heads) if config.attention_gate else None

    def before(self, v: Tensor, x: Tensor, values: Tensor | None) -> Tensor:
        """Values [B, T, H, D] to attend with; x [B, T, C]: what attention reads, values [B, T, C]: value embeddings."""
        return v if self.values is None else self.values(v, values, x)

    def keys(self, k: Tensor) -> Tensor:
        """Keys [B, T, H, D] of all tokens. With `key_offset` each has the previous one's still channels, except the first: a
        query that finds what stood before a token then finds the token itself, induction in one layer (#49)."""
        if not self.key_offset:
            return k
        before = torch.cat([k[:, :1], k[:, :-1]], dim=1)
        turning, _, turning_too, _ = k.chunk(4, dim=-1)
        _, still, _, still_too = before.chunk(4, dim=-1)
        return torch.cat([turning, still, turning_too, still_too], dim=-1)

    def after(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The heads' output, [B, T, H, D]."""
        if self.exclusion is not None:
            y = self.exclusion(y, v)
        return y if self.gate is None else y * self.gate(x).unsqueeze(-1)


class ValueMix(nn.Module):
    """Values v [B, T, H, D] and value embeddings e [B, T, C] -> a v + b e, a and b learned from 1/2 on (#14);
    with `value_gates` v + 2 sigmoid(W x[:12]) e, a gate a head (#55)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config.width, config.heads) if config.value_gates else None
        self.weights = None if config.value_gates else nn.Parameter(torch.full((2,), 0.5))

    def forward(self, v: Tensor, e: Tensor, x: Tensor) -> Tensor:
        e = e.view_as(v)
        if self.gate is None:
            return self.weights[0] * v + self.weights[1] * e
        return v + 2 * self.gate(x).unsqueeze(-1) * e


class Exclusion(nn.Module):
    """y - tanh(a) <y, v^> v^ with v^ = v / |v|: attention's output without the token's own value. y and v [B, T, H, D];
    a learned, one a head, from 0 on (exclusive self attention, #82)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(config.heads))

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        own = F.normalize(v, dim=-1, eps=1e-4)
        return y - self.strength.tanh().to(y.dtype).unsqueeze(-1) * (y * own).sum(-1, keepdim=True) * own
