"""GPT-2, faithful by default; every architecture trick is one field of ModelConfig (layers/shape.py).

    GPT(ModelConfig())                         GPT-2 124M as published
    GPT(ModelConfig(**PRESETS["1.5B"]))        its largest size

Published GPT-2 (Radford et al. 2019, github.com/openai/gpt-2): learned positions, pre-LayerNorm with bias, biases in every
linear layer, tanh-GELU, head tied to the token embedding, weights N(0, 0.02), positions N(0, 0.01), residual projections scaled
by 1/sqrt(2 * layers), dropout. ModelConfig names the source of every other form.

Weights are kept in fp32 (optimizers/mantissa.py can keep half of each). `compute_dtype` (set by the trainer) is the type of
activations, the residual stream included, and of the matrix products, as in modded-nanogpt since record 10: half the memory
traffic of autocast. The loss is computed in fp32.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.attention import KeyValues, attention
from layers.kernels import cross_entropy, fp8_linear, linear_relu2, rms_norm, softcap
from layers.ngrams import NgramEmbedding
from layers.residual import AttentionExtras, ResidualPaths, Smear
from layers.shape import ModelConfig

Rotary = tuple[Tensor, Tensor] | None  # cos and sin, see rotary_tables


class Linear(nn.Linear):
    """nn.Linear whose fp32 weight is cast to the type of its input."""

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.cast(x.dtype))


class Head(Linear):
    """Stream [B, T, C] -> logits [B, T, padded_vocab]; in training by 8-bit floats where `fp8` says so: normalised x is at most
    sqrt(C), weights are within 24 (modded-nanogpt since record 19), gradients of the mean over N tokens within 1 / N."""

    fp8 = False  # set by the trainer

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fp8 and self.training):
            return super().forward(x)
        flat = x.flatten(0, -2)
        scales = (x.size(-1) ** 0.5 / 448, 24 / 448, 1 / len(flat) / 448)
        weight, bias = self.cast(x.dtype)
        y = fp8_linear(flat, weight, scales).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rms = config.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.ones(config.width)) if config.norm_gains else None
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.bias and config.norm_gains and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if self.rms:
            return rms_norm(x, weight)
        return F.layer_norm(x, x.shape[-1:], weight, None if self.bias is None else self.bias.to(x.dtype), 1e-5)


def rotary_tables(config: ModelConfig, parts: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """cos and sin, each [sequence_length, head_width / 2], fp32.

    Full: frequencies base^(-i / (D/2)), i < D/2. Half: D/4 frequencies from 1 to 1/base inclusive, the other D/4 stand still:
    half of each head carries no position (modded-nanogpt record 17).

    parts: of the long window, in the stages of a run so far. At each change, from a to b tokens, YaRN (arXiv 2309.00071)
    stretches the waves that turn less than once in a by b / a, leaves those that turn more than 32 times, and does a part of
    it between; q.k grows by 1 + 0.2 ln(b / a), as in modded-nanogpt record 31, here by the root of that on both tables.
    """
    half = config.head_width // 2
    if config.positions == "half_rotary":
        turning = (1 / config.rotary_base) ** torch.linspace(0, 1, half // 2)
        frequencies = torch.cat([turning, torch.zeros(half // 2)])
    else:
        frequencies = (1 / config.rotary_base) ** (torch.arange(half) / half)
    factor = 1.0
    for before, after in pairwise(config.long_window(part) for part in parts):
        kept = ((before * frequencies / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) * before / after)
        factor *= 1 + 0.2 * math.log(after / before)
    angles = torch.outer(torch.arange(config.sequence_length).float(), frequencies)
    return angles.cos() * factor**0.5, angles.sin() * factor**0.5


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[..., i], x[..., i + D/2]) of x [B, T, ..., D]; cos, sin: broadcastable to [B, T, ..., D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention, [B, T, C] -> [B, T, C]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.qkv = Linear(config.width, 3 * config.width, bias=config.bias)
        self.projection = Linear(config.width, config.width, bias=config.bias)
        self.scale = config.attention_scale or config.head_width**-0.5
        self.window = config.windows()[layer]
        extras = AttentionExtras(config, layer)
        self.extras = extras if extras.key_offset or [*extras.children()] else None
        self.past: KeyValues | None = None  # GPT.remember()

    def forward(self, x: Tensor, rotary: Rotary, values: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        (B, T, C), config = x.shape, self.config
        qk, v = self.qkv(x).view(B, T, 3, config.heads, config.head_width).split([2, 1], dim=2)
        if config.qk_norm:  # of queries and keys together: half as many small operations
            qk = rms_norm(qk)
        if rotary is not None:
            cos, sin = (table[:T, None, None].to(x.dtype) for table in rotary)  # [T, 1, 1, D/2]
            qk = rotate(qk, cos, sin)
        dropout = config.dropout if self.training else 0.0
        q, k, v = *qk.unbind(2), v.squeeze(2)  # [B, T, H, D]
        if self.extras is not None:
            v = self.extras.before(v, x, values)
        if self.past is not None:
            k, v = self.past.extend(k, v)
        if self.extras is not None:
            k = self.extras.keys(k)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        y = attention(q, k, v, self.scale, dropout, self.window, documents, config.attention).transpose(1, 2)
        if self.extras is not None:
            y = self.extras.after(y, v.transpose(1, 2)[:, -T:], x)
        return self.projection(y.reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers with the activation between, [B, T, C] -> [B, T, C]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.relu2 = config.activation == "relu2"
        self.up = Linear(config.width, config.mlp_ratio * config.width, bias=config.bias)
        self.projection = Linear(config.mlp_ratio * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = linear_relu2(x, *self.up.cast(x.dtype)) if self.relu2 else F.gelu(self.up(x), approximate="tanh")
        return self.projection(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm1 = Norm(config)
        self.attention = Attention(config, layer)
        self.norm2 = Norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary, values: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), rotary, values, documents))
        return x + self.dropout(self.mlp(self.norm2(x)))


def future_loss(logits: Tensor, targets: Tensor, future: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, T, V] fp32 on targets [B, T] int64, plus future[k - 1] ([n] fp32, n < T) times that of
    the same logits on the target k positions later, where there is one: multi-token prediction without further parameters
    (modded-nanogpt #53; with heads of their own: arXiv 2404.19737)."""
    T = targets.size(1)
    later = torch.arange(T, device=targets.device)[:, None] + torch.arange(len(future) + 1, device=targets.device)  # [T, n + 1]
    wanted = targets[:, later.clamp(max=T - 1)]  # [B, T, n + 1]
    there = (later < T) & (wanted >= 0)  # below 0: ignored, as in F.cross_entropy
    losses = logits.logsumexp(-1, keepdim=True) - logits.gather(-1, wanted.clamp(min=0))
    means = (losses * there).sum((0, 1)) / there.sum((0, 1))
    return means[0] + means[1:] @ future


class GPT(nn.Module):
    """tokens -> logits or loss."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.seen: tuple[float, ...] = (1.0,)  # see()
        self.kept: list[KeyValues] = []  # remember()
        dtype = {"same": None, "bf16": torch.bfloat16}[config.embedding_dtype]
        self.embedding = nn.Embedding(config.padded_vocab, config.width, dtype=dtype)
        self.positions = nn.Embedding(config.sequence_length, config.width) if config.positions == "learned" else None
        self.ngrams = NgramEmbedding(config) if config.ngram_buckets else None
        self.smear = Smear(config) if config.smear else None
        self.embed_norm = Norm(config) if config.embed_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        paths = ResidualPaths(config)
        self.paths = paths if [*paths.children()] else None
        self.norm = Norm(config)
        self.head = Head(config.width, config.padded_vocab, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        if self.positions is None:
            for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's initialisation or another; zeros where `zero_init_projections` asks for them."""
        config = self.config
        if self.embedding.weight.is_meta:  # nothing to fill, and PyTorch is slow at that
            return
        fan_in, zero = config.initialisation == "fan_in", config.zero_init_projections
        for name, p in self.named_parameters():
            std = math.sqrt(0.33 / p.size(1)) if fan_in and p.dim() == 2 else 0.02
            if name.endswith("projection.weight"):  # GPT-2 scales by the square root of the number of residual branches
                std = 0.0 if zero else std / math.sqrt(2 * config.layers)
            elif name == "positions.weight":
                std = 0.01
            elif name == "embedding.weight" and fan_in:
                std = 1.0
            # a head is only listed when it is untied
            if name.startswith("ngrams") or name.endswith(("gate.weight", "bias")) or (name == "head.weight" and zero):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)

    def embed(self, tokens: Tensor, past: int) -> Tensor:
        """What enters the first block, [B, T - past, C]: of tokens [B, T] those after the first `past`."""
        reach = 1 if self.ngrams is None else max(self.ngrams.orders)  # so far do smear and n-grams look back
        first = max(0, past - reach)
        near = tokens[:, first:]
        x = self.embedding(near)
        if self.positions is not None:
            x = x + self.positions.weight[first : tokens.size(1)]
        if self.ngrams is not None:
            x = x + self.ngrams(near)
        x = self.dropout(x.to(self.compute_dtype))
        if self.smear is not None:
            x = self.smear(x)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x[:, past - first :]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, future: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size] fp32 of tokens [B, T] int64, T at most sequence_length; or, with targets (int64, the tokens
        one position later), the mean cross-entropy in nats. future: [n] fp32, weights of the losses on the n tokens after those
        (`future_loss`), for training alone. After `remember`, logits [B, new, vocab_size] of the tokens not yet seen."""
        config, past = self.config, self.kept[0].length if self.kept else 0
        x = self.embed(tokens, past)
        rotary = None if self.positions is not None else (self.cos[past:], self.sin[past:])
        # by number; what precedes the first end-of-text is 0
        documents = (tokens == config.end_of_text).cumsum(1) if config.document_mask else None
        recompute = config.checkpoint_activations and torch.is_grad_enabled()
        blocks = [partial(checkpoint, block, use_reentrant=False) for block in self.blocks] if recompute else self.blocks
        if self.paths is None:
            for block in blocks:
                x = block(x, rotary, documents=documents)
        else:
            x = self.paths(blocks, x, rotary, tokens[:, past:], documents)
        logits, cap = self.head(self.norm(x)), (config.logit_softcap, config.softcap_form)
        if targets is not None and future is None:
            return cross_entropy(logits.flatten(0, 1), targets.flatten(), config.vocab_size, *cap)
        logits = softcap(logits[..., : config.vocab_size].float(), *cap)
        return logits if targets is None else future_loss(logits, targets, future)

    def remember(self) -> None:
        """Start anew, and keep keys and values: a later call with more tokens computes those alone."""
        self.kept = [KeyValues(self.config.sequence_length) for _ in self.blocks]
        for block, past in zip(self.blocks, self.kept):
            block.attention.past = past

    def free_windows(self) -> None:
        """Make the windows inputs of the graph, for FlexAttention alone: blocks with one tensor share a mask."""
        windows, device = self.config.windows(), self.embedding.weight.device
        tensors = {window: torch.tensor(window or self.config.sequence_length, device=device) for window in windows}
        for block, window in zip(self.blocks, windows, strict=True):
            block.attention.window = tensors[window]

    @torch.no_grad()
    def see(self, parts: tuple[float, ...]) -> None:
        """Attention windows from now on: the last of `parts` of the long one, those of the stages of a run so far. Under
        torch.compile a window is a constant of the graph, unless `free_windows`: each stage is compiled once."""
        if parts == self.seen:
            return
        self.seen = parts
        for block, window in zip(self.blocks, self.config.windows(parts[-1]), strict=True):
            if isinstance(block.attention.window, Tensor):
                block.attention.window.fill_(window or self.config.sequence_length)
            else:
                block.attention.window = window
        if self.config.yarn:
            for table, now in zip((self.cos, self.sin), rotary_tables(self.config, parts), strict=True):
                table.copy_(now)


def roles(gpt: nn.Module) -> dict[str, str]:
    """Parameter name -> what optimizers route by: matrix, hidden weights inside blocks; embedding, token, position, value and
    n-gram tables (and a head tied to one); head, an untied one; vector, gains, biases, gates, weights of paths; scalar."""

    def role(name: str, p: nn.Parameter) -> str:
        if p.dim() == 0 or p.numel() == 1:
            return "scalar"
        if p.dim() == 1 or name.endswith("gate.weight"):
            return "vector"
        if name.startswith(("embedding.", "positions.", "ngrams.", "paths.values.")):
            return "embedding"
        return "head" if name == "head.weight" else "matrix"

    return {name: role(name, p) for name, p in gpt.named_parameters()}


def splits(gpt: nn.Module) -> dict[str, int]:
    """Parameter name -> number of matrices fused along its first dimension (queries, keys and values: 3). Matrix optimizers
    take them apart first, or their scale is wrong (microsoft/dion #111)."""
    return {name: 3 for name, _ in gpt.named_parameters() if name.endswith("qkv.weight")}


def parameter_counts(gpt: nn.Module) -> dict[str, int]:
    """`total`, and `non_embedding` = total without embedding tables and head (the N of scaling laws)."""
    sizes, role = {name: p.numel() for name, p in gpt.named_parameters()}, roles(gpt)
    tables = sum(size for name, size in sizes.items() if role[name] in ("embedding", "head") or name == "head.bias")
    return {"total": sum(sizes.values()), "non_embedding": sum(sizes.values()) - tables}
