"""A GPT of the NanoGPT speedrun repository, for transformers: loaded with trust_remote_code=True, for inference.

The fields of config.json are those of ModelConfig in that repository's layers/shape.py, where the source of each stands;
`windows` is what each block sees, tokens (0: all). Without a cache: each token computes the whole context.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class SpeedrunConfig(PretrainedConfig):
    model_type = "speedrun_gpt"
    attribute_map = {"num_hidden_layers": "layers", "hidden_size": "width", "num_attention_heads": "heads"}


def norm(c):
    if c.norm == "rmsnorm":
        return nn.RMSNorm(c.width, eps=1e-6, elementwise_affine=c.norm_gains)
    return nn.LayerNorm(c.width, eps=1e-5, elementwise_affine=c.norm_gains, bias=c.bias)


class Parts(nn.Module):
    """Weights and parts, under the names that they have in the trainer's model."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


class Gate(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, min(12, width)))

    def forward(self, x):
        return F.linear(x[..., : self.weight.size(1)], self.weight).sigmoid()


def value_table(c, layer):
    n = min(c.value_embeddings, c.layers)
    return layer if layer < n else layer - (c.layers - n) if layer >= c.layers - n else None


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.c = c
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.bias)
        self.projection = nn.Linear(c.width, c.width, bias=c.bias)
        mix = Parts(gate=Gate(c.width, c.heads)) if c.value_gates else Parts(weights=torch.full((2,), 0.5))
        self.extras = Parts(
            values=mix if value_table(c, layer) is not None else None,
            gate=Gate(c.width, c.heads) if c.attention_gate else None,
            exclusion=Parts(strength=torch.zeros(c.heads)) if c.exclusive_attention else None,
        )

    def forward(self, x, cos, sin, values, mask):
        (B, T, C), c = x.shape, self.c
        q, k, v = self.qkv(x).view(B, T, 3, c.heads, C // c.heads).unbind(2)
        if c.qk_norm:
            q, k = (F.rms_norm(z, z.shape[-1:], eps=1e-6) for z in (q, k))
        if c.positions != "learned":
            cos, sin = (table[:T, None].to(x.dtype) for table in (cos, sin))
            halves = (z.chunk(2, -1) for z in (q, k))
            q, k = (torch.cat([a * cos + b * sin, b * cos - a * sin], -1) for a, b in halves)
        if (mix := self.extras.values) is not None:
            e = values.view_as(v)
            v = v + 2 * mix.gate(x).unsqueeze(-1) * e if c.value_gates else mix.weights[0] * v + mix.weights[1] * e
        if c.key_offset:
            before = torch.cat([k[:, :1], k[:, :-1]], dim=1).chunk(4, -1)
            now = k.chunk(4, -1)
            k = torch.cat([now[0], before[1], now[2], before[3]], -1)
        q, k, z = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, z, attn_mask=mask, scale=c.attention_scale or None).transpose(1, 2)
        if c.exclusive_attention:
            own = F.normalize(v, dim=-1, eps=1e-4)
            y = y - self.extras.exclusion.strength.tanh().unsqueeze(-1) * (y * own).sum(-1, keepdim=True) * own
        if c.attention_gate:
            y = y * self.extras.gate(x).unsqueeze(-1)
        return self.projection(y.reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm1, self.attention, self.norm2 = norm(c), Attention(c, layer), norm(c)
        hidden, self.relu2 = c.mlp_ratio * c.width, c.activation == "relu2"
        self.mlp = Parts(up=nn.Linear(c.width, hidden, bias=c.bias), projection=nn.Linear(hidden, c.width, bias=c.bias))

    def forward(self, x, *about):
        x = x + self.attention(self.norm1(x), *about)
        h = self.mlp.up(self.norm2(x))
        return x + self.mlp.projection(F.relu(h).square() if self.relu2 else F.gelu(h, approximate="tanh"))


class GPT(nn.Module):
    """Tokens [B, T] -> logits [B, T, vocab_size]; the parts and their names are those of the trainer's model.py."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c.padded_vocab, c.width)
        if c.positions == "learned":
            self.positions = nn.Embedding(c.sequence_length, c.width)
        else:
            for name in ("cos", "sin"):
                self.register_buffer(name, torch.zeros(c.sequence_length, c.width // c.heads // 2))
        if c.ngram_buckets:
            self.orders = [int(n) for n in c.ngram_orders.split(",")]
            self.ngrams = Parts(table=nn.Embedding(len(self.orders) * c.ngram_buckets, min(c.ngram_width or c.width, c.width)))
        if c.smear:
            self.smear = Parts(gate=Gate(c.width, 1), strength=torch.zeros(()))
        self.embed_norm = norm(c) if c.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.paths = Parts()
        if c.value_embeddings:
            tables = (nn.Embedding(c.padded_vocab, c.width) for _ in range(min(c.value_embeddings, c.layers)))
            self.paths.values = Parts(tables=nn.ModuleList(tables))
        self.skips = c.skips if c.layers > 1 else "none"
        if self.skips == "unet":
            self.paths.skips = Parts(weights=torch.ones(c.layers // 2))
        if self.skips == "single":
            self.paths.skips = Parts(strength=torch.tensor(-1.5), gate=Gate(c.width, 1))
        if c.input_shortcut:
            self.paths.shortcut = Parts(stream=torch.ones(c.layers), inputs=torch.ones(c.layers))
        if c.backout:
            self.paths.backout = Parts(strength=torch.tensor(0.5))
        self.norm = norm(c)
        self.head = nn.Linear(c.width, c.padded_vocab, bias=c.head_bias)

    def ngram_rows(self, tokens):
        digest, rows = torch.zeros_like(tokens), {}
        for back in range(max(self.orders)):
            digest = (digest * 1000003 + F.pad(tokens, (back, 0))[:, : tokens.size(1)] + 1) % 2147483647
            mixed = (digest ^ (digest >> 15)) * 69621 % 2147483647
            rows[back + 1] = (mixed ^ (mixed >> 13)) % self.c.ngram_buckets
        return torch.stack([rows[n] + i * self.c.ngram_buckets for i, n in enumerate(self.orders)], -1)

    def around(self, layer, x, inputs, outputs):
        """What the paths make of the stream before a block."""
        c, paths = self.c, self.paths
        mirror = c.layers - 1 - layer
        if self.skips == "unet" and mirror < layer:
            x = x + paths.skips.weights[mirror] * outputs[mirror]
        source = min(c.layers // 3, c.layers // 2 - 1)
        if self.skips == "single" and mirror == source:
            x = x + paths.skips.strength.sigmoid() * 2 * paths.skips.gate(inputs) * outputs[source]
        return paths.shortcut.stream[layer] * x + paths.shortcut.inputs[layer] * inputs if c.input_shortcut else x

    def forward(self, tokens):
        c, T = self.c, tokens.size(1)
        x = self.embedding(tokens)
        if c.positions == "learned":
            x = x + self.positions.weight[:T]
        if c.ngram_buckets:
            found = self.ngrams.table(self.ngram_rows(tokens))  # each order in its slice of the stream, in turn
            slices, rest = divmod(c.width, found.size(-1))
            found = F.pad(found, (0, 0, 0, -len(self.orders) % slices))
            x = x + F.pad(found.unflatten(2, (-1, slices)).sum(2).flatten(-2), (0, rest))
        if c.smear:
            gated = self.smear.strength * self.smear.gate(x[:, 1:]) * x[:, :-1]
            x = torch.cat([x[:, :1], x[:, 1:] + gated], dim=1)
        x = self.embed_norm(x)
        cos, sin = (None, None) if c.positions == "learned" else (self.cos, self.sin)
        distance = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
        document = (tokens == c.end_of_text).cumsum(1)
        same = document[:, None, :, None] == document[:, None, None, :] if c.document_mask else True
        inputs, outputs = x, []
        for layer, block in enumerate(self.blocks):
            mask = (distance >= 0) & (distance < (c.windows[layer] or T)) & same
            table = value_table(c, layer)
            values = None if table is None else self.paths.values.tables[table](tokens)
            x = block(self.around(layer, x, inputs, outputs), cos, sin, values, mask)
            outputs.append(x)
        if c.backout:
            x = x - self.paths.backout.strength * outputs[2 * c.layers // 3]
        logits, cap = self.head(self.norm(x))[..., : c.vocab_size].float(), c.logit_softcap
        if not cap:
            return logits
        if c.softcap_form == "sigmoid":
            return cap * ((logits + 5) / 7.5).sigmoid()
        return cap * (logits / cap).tanh() if c.softcap_form == "tanh" else cap * logits / (logits.square() + cap**2).sqrt()


class SpeedrunGPT(PreTrainedModel, GenerationMixin):
    config_class = SpeedrunConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = GPT(config)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, labels=None, **_):
        """Logits [B, T, vocab_size]; with labels [B, T] also the mean cross-entropy of the next token, nats."""
        logits = self.model(input_ids[:, -self.config.sequence_length :])
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
