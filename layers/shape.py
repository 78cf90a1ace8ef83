"""Shape and form of the model: ModelConfig, whose fields are the architecture tricks, and GPT-2's published sizes."""

import math
from dataclasses import dataclass, fields

from engine.spec import UsageError, refusal, setting
from layers.attention import ATTENTION


@dataclass(frozen=True)
class ModelConfig:
    """Shape and form of the model. Raises UsageError: fields that contradict each other."""

    vocab_size: int = setting(50257, "tokens in the vocabulary", least=1, most=2**24)
    sequence_length: int = setting(1024, "context, tokens", least=1, most=2**24)
    layers: int = setting(12, "transformer blocks", least=1, most=1000)
    heads: int = setting(12, "attention heads per block", least=1)
    width: int = setting(768, "residual width, channels", least=1, most=2**20)
    mlp_ratio: int = setting(4, "hidden width of the MLP / residual width", least=1, most=1000)
    dropout: float = setting(0.0, "dropout probability on embeddings, attention weights and both residual branches", below=1)
    bias: bool = setting(True, "biases in linear layers and LayerNorms (speedruns drop them: modded-nanogpt #2)")
    norm: str = setting("layernorm", "normalisation (RMSNorm: arXiv 1910.07467)", ("layernorm", "rmsnorm"))
    norm_gains: bool = setting(True, "learned gains in the normalisation layers")
    positions: str = setting(
        "learned",
        "position encoding; rotary: arXiv 2104.09864; half_rotary: only half of each head turns, modded-nanogpt #17",
        ("learned", "rotary", "half_rotary"),
    )
    rotary_base: float = setting(10000.0, "slowest rotary wavelength / 2 pi, tokens (modded-nanogpt: 1024)", least=1)
    yarn: bool = setting(False, "rotary positions and q.k follow a growing window (arXiv 2309.00071, modded-nanogpt #31)")
    qk_norm: bool = setting(False, "RMS-normalise queries and keys per head (arXiv 2010.04245, modded-nanogpt #5)")
    attention_scale: float = setting(0.0, "factor on q.k; 0 means 1/sqrt(head width) (modded-nanogpt #20: 0.12)")
    activation: str = setting("gelu", "MLP activation; relu2 = ReLU(x)^2, arXiv 2109.08668", ("gelu", "relu2"))
    zero_init_projections: bool = setting(False, "residual projections and an untied head start at zero (modded-nanogpt #5)")
    initialisation: str = setting("gpt2", "gpt2: N(0, 0.02); fan_in: variance 0.33 / inputs, embedding 1", ("gpt2", "fan_in"))
    embedding_dtype: str = setting("same", "of the token embedding and its updates; same: as other weights", ("same", "bf16"))
    head_bias: bool = setting(False, "a bias on the logits")
    tied_head: bool = setting(True, "head shares its weight with the token embedding (untied: modded-nanogpt #8)")
    embed_norm: bool = setting(False, "normalise right after the embedding (modded-nanogpt #8)")
    logit_softcap: float = setting(0.0, "bound on the logits, nats; 0 is off (Gemma 2: 30, modded-nanogpt #18: 15)", most=1e6)
    softcap_form: str = setting(
        "rational",
        "c x / sqrt(x^2 + c^2), c tanh(x / c), or c sigmoid((x + 5) / 7.5) (modded-nanogpt #54, with c = 23)",
        ("rational", "tanh", "sigmoid"),
    )
    vocab_multiple: int = setting(1, "pad embedding and head to a multiple of this; no logits of padding", least=1, most=2**24)
    head_dtype: str = setting(
        "same",
        "head's products in training; same: as activations; auto: 8-bit floats where the card has them (modded-nanogpt #19)",
        ("same", "auto", "fp8"),
    )
    ngram_buckets: int = setting(0, "rows of each hashed n-gram embedding table; 0 is off (modded-nanogpt #62)")
    ngram_orders: str = setting("2,3", "n-gram lengths with a table each, tokens, comma-separated")
    ngram_width: int = setting(0, "channels of n-gram vectors, each order's in its slice of the stream; 0: all of them")
    value_embeddings: int = setting(0, "value embeddings of this many first and last blocks; 0: off (modded-nanogpt #14, #17)")
    value_gates: bool = setting(False, "gates on the value embeddings, one a head (modded-nanogpt #55)")
    input_shortcut: bool = setting(False, "add the first block's input before each block (modded-nanogpt #9)")
    skips: str = setting("none", "skips, lower to upper blocks (modded-nanogpt #11; single: #45)", ("none", "unet", "single"))
    smear: bool = setting(False, "add a gated part of the previous token to each embedding (modded-nanogpt #34)")
    backout: bool = setting(False, "subtract the stream at two thirds of the depth at the end (modded-nanogpt #40)")
    attention_gate: bool = setting(False, "a gate on each head's output (sparse attention gate, modded-nanogpt #28)")
    exclusive_attention: bool = setting(False, "take a token's own value out of its heads' outputs (modded-nanogpt #82)")
    key_offset: bool = setting(False, "half-rotary keys: still channels of the previous token (modded-nanogpt #49)")
    window: int = setting(0, "long attention window: tokens that a token sees, itself included; 0: all before it")
    window_pattern: str = setting("L", "windows by block, repeated: L long, S half; the last is long (modded-nanogpt #20)")
    document_mask: bool = setting(False, "attention only within a token's document, in validation too (modded-nanogpt #12)")
    end_of_text: int = setting(50256, "the tokenizer's token before each document")
    attention: str = setting("auto", "attention code; auto: sdpa or flex on GPUs, chunked on CPU", ("auto", *ATTENTION))
    checkpoint_activations: bool = setting(False, "recompute blocks in the backward pass: less memory, a third more work")

    def __post_init__(self):
        for f in fields(self):
            if why := refusal(f.name, getattr(self, f.name), f.metadata):
                raise UsageError(f"{f.name} {why}")
        if self.attention == "flex" and self.dropout:
            raise UsageError("attention flex has no dropout: use sdpa, or dropout 0")
        if self.width % self.heads:
            raise UsageError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.positions != "learned" and self.head_width % 4:
            raise UsageError(f"rotary positions need a head width divisible by 4, got {self.head_width}")
        if self.value_gates and not self.value_embeddings:
            raise UsageError("value_gates need value_embeddings: such as 3")
        if self.key_offset and self.positions != "half_rotary":
            raise UsageError(f"key_offset needs positions half_rotary, got {self.positions}")
        if not 0 <= self.window <= self.sequence_length:
            raise UsageError(f"window must be 0 to {self.sequence_length}, the sequence length; got {self.window}")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise UsageError(f"window_pattern takes the letters L and S, such as LSSS; not {self.window_pattern!r}")
        if self.yarn and self.positions == "learned":
            raise UsageError("yarn needs positions rotary or half_rotary, got learned")
        if self.head_dtype != "same" and (self.padded_vocab % 16 or self.width % 16):
            sides = f"{self.width} and {self.padded_vocab}: such as vocab_multiple 128"
            raise UsageError(f"head_dtype {self.head_dtype} needs a width and a vocabulary divisible by 16, got {sides}")
        if self.ngram_buckets and not all(n.isdecimal() and 1 < int(n) < 100 for n in self.ngram_orders.split(",")):
            raise UsageError(f"ngram_orders must be whole numbers from 2 to 99, such as 2,3; got {self.ngram_orders!r}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    def long_window(self, part: float = 1.0) -> int:
        """The long window, tokens, in a stage of a run that has `part` of it; never 0."""
        return max(1, round(part * (self.window or self.sequence_length)))

    def windows(self, part: float = 1.0) -> list[int]:
        """The window of each block, tokens; 0: all before a token."""
        long, pattern = self.long_window(part), self.window_pattern
        kinds = [*(pattern[layer % len(pattern)] for layer in range(self.layers - 1)), "L"][: self.layers]
        windows = [long if kind == "L" else max(1, long // 2) for kind in kinds]
        return [window if window < self.sequence_length else 0 for window in windows]


# The four published sizes (GPT-2 paper, table 2; sizes as counted since its correction).
PRESETS: dict[str, dict[str, int]] = {
    "124M": dict(layers=12, heads=12, width=768),
    "350M": dict(layers=24, heads=16, width=1024),
    "774M": dict(layers=36, heads=20, width=1280),
    "1.5B": dict(layers=48, heads=25, width=1600),
}


def flops_per_token(config: ModelConfig, part: float = 1.0, length: int = 0) -> int:
    """Floating-point operations that training needs per token: forward and backward, 2 per multiply-add. In a stage of a run,
    part: of the long window; length: of sequences, tokens (0: the model's).

    6 x weights in matrix products (blocks and head, tied or not) + attention: each token meets on average T/2 keys, for q.k and
    for the values: 2 x 2 x T/2 x C forward, three times that with backward = 6 T C per layer. A window of w tokens meets
    w - w^2 / 2T keys. nanoGPT's and PaLM's formula counts 12 T C, the masked half included; ours does not flatter MFU."""
    C, T = config.width, length or config.sequence_length
    weights = config.layers * (4 * C * C + 2 * config.mlp_ratio * C * C) + config.padded_vocab * C
    seen = [min(window or T, T) for window in config.windows(part)]
    return 6 * weights + 6 * C * sum(2 * w - w * w // T for w in seen)
