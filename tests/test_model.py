"""GPT-2 equals Hugging Face's; every trick alone keeps the model causal and starts at ln(vocabulary)."""

import math

import pytest
import torch
import torch.nn.functional as F
from shared import BACK, PATHS

from layers.kernels import CPURMSNorm, rms_norm_reference
from layers.shape import PRESETS, ModelConfig, flops_per_token
from model import GPT, parameter_counts, roles, rotary_tables, rotate, splits
from tricks import MODERN, TRICKS

SMALL = {"vocab_size": 97, "sequence_length": 48, "layers": 2, "heads": 2, "width": 32}
FIELDS = ModelConfig.__dataclass_fields__
ARCHITECTURE = {
    name: {key: value for key, value in t.settings.items() if key in FIELDS}
    for name, t in TRICKS.items() if t.kind == "architecture" or name == "padded_vocab"
}  # fmt: skip
TOKENS = torch.randint(97, (3, 48), generator=torch.Generator().manual_seed(0))


def small(seed: int = 0, **settings) -> GPT:
    torch.manual_seed(seed)
    return GPT(ModelConfig(**SMALL | settings))


def awake(gpt: GPT) -> GPT:
    """Every weight random, so that nothing is hidden behind a zero initialisation."""
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.3)
    return gpt


def test_kept_keys_and_values_give_the_same_logits():
    """Token by token and in pieces, with everything that looks back: smear, n-grams, key offsets, windows, documents."""
    modern = dict(positions="half_rotary", norm="rmsnorm", qk_norm=True, activation="relu2", bias=False, tied_head=False)
    kinds = [{}, modern, modern | BACK, modern | BACK | PATHS | dict(layers=3, exclusive_attention=True, embed_norm=True)]
    for settings in (*kinds, modern | dict(document_mask=True, end_of_text=7, window=16, smear=True)):
        gpt = awake(small(**settings)).eval()
        with torch.no_grad():
            whole = gpt(TOKENS)
            gpt.remember()
            ends = [5, 6, 7, 8, 20, 21, 47, 48]
            pieces = torch.cat([gpt(TOKENS[:, :end]) for end in ends], dim=1)
        torch.testing.assert_close(pieces, whole, atol=2e-4, rtol=1e-4)
        assert (whole[:, 1:] - whole[:, :-1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_each_trick_alone(name):
    """Loss at initialisation is ln(vocabulary), the future does not leak, and every weight can learn."""
    drawn = [small(seed, **ARCHITECTURE[name])(TOKENS, TOKENS.roll(1)).item() for seed in range(8)]
    assert abs(sum(drawn) / 8 - math.log(97)) < 0.03  # one draw of a wider model's logits strays by as much
    gpt = awake(small(**ARCHITECTURE[name]))
    changed = TOKENS.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 97
    with torch.no_grad():
        a, b = gpt(TOKENS), gpt(changed)
    assert torch.allclose(a[:, :30], b[:, :30], atol=1e-4)
    assert not torch.allclose(a[:, 30:], b[:, 30:], atol=1e-2)
    gpt(TOKENS, TOKENS.roll(1)).backward()
    # position 0 attends to itself only, so a key bias shifts nothing: every gradient exists, not every one is nonzero
    assert all(p.grad is not None for p in gpt.parameters())


@pytest.mark.parametrize("gains", [True, False])
def test_fast_rms_norm_agrees_with_its_reference(gains):
    x = torch.randn(5, 7, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(24, dtype=torch.float64, requires_grad=True) if gains else None
    inputs = (x, weight) if gains else (x,)
    upstream = torch.randn_like(x)
    fast, slow = CPURMSNorm.apply(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6)
    assert torch.allclose(fast, slow, atol=1e-6)  # the row norm is kept in fp32
    for a, b in zip(torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream)):
        assert torch.allclose(a, b, atol=1e-5)


def test_bf16_is_close_to_fp32():
    gpt = small(**MODERN)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        exact = gpt(TOKENS, TOKENS.roll(1)).item()
        gpt.compute_dtype = torch.bfloat16
        assert abs(gpt(TOKENS, TOKENS.roll(1)).item() - exact) < 0.02 * exact


def test_rotation_depends_on_distance_only():
    for kind in ("rotary", "half_rotary"):
        config = ModelConfig(**SMALL, positions=kind)
        cos, sin = rotary_tables(config)
        q, k = torch.randn(16), torch.randn(16)
        at = lambda x, t: rotate(x, cos[t], sin[t])  # noqa: B023, E731
        assert torch.allclose(at(q, 10) @ at(k, 7), at(q, 40) @ at(k, 37), atol=1e-4)
        assert not torch.allclose(at(q, 10) @ at(k, 7), at(q, 10) @ at(k, 2), atol=1e-3)
        assert torch.allclose(at(q, 25).norm(), q.norm(), atol=1e-5)
    still = rotate(q, cos[30], sin[30])  # half rotary: the second quarter of each half carries no position
    assert torch.equal(still[4:8], q[4:8]) and torch.equal(still[12:], q[12:])


def test_definitions():
    """What each field does, against the formula."""
    x = torch.linspace(-3, 3, 11)
    mlp = small(activation="relu2").blocks[0].mlp
    up = mlp.up(torch.ones(32))
    assert torch.allclose(mlp(torch.ones(32)), mlp.projection(up.clamp(min=0) ** 2), atol=1e-6)
    for form, formula in (("rational", 15 * x / (x**2 + 225).sqrt()), ("tanh", 15 * torch.tanh(x / 15))):
        capped, free = awake(small(logit_softcap=15.0, softcap_form=form)), awake(small())
        capped.load_state_dict(free.state_dict())
        logits = free(TOKENS)
        expected = 15 * logits / (logits**2 + 225).sqrt() if form == "rational" else 15 * torch.tanh(logits / 15)
        assert torch.allclose(capped(TOKENS), expected, atol=1e-4)
        assert formula.abs().max() < 15
    zero = small(zero_init_projections=True, tied_head=False)
    assert zero.head.weight.abs().max() == 0
    assert all(b.attention.projection.weight.abs().max() == 0 == b.mlp.projection.weight.abs().max() for b in zero.blocks)
    padded = small(vocab_multiple=64)
    assert padded.embedding.weight.shape[0] == 128 and padded(TOKENS).shape[-1] == 97
    scaled = small(attention_scale=0.12)
    assert scaled.blocks[0].attention.scale == 0.12 and small().blocks[0].attention.scale == 0.25
    assert not any(name.endswith("bias") for name, _ in small(bias=False).named_parameters())


def test_ngrams_look_back_n_tokens():
    gpt = small(ngram_buckets=4096, ngram_orders="3")
    with torch.no_grad():
        gpt.ngrams.table.weight.normal_()
    a = torch.arange(10)[None] % 97
    b = a.clone()
    b[0, 4] = 50
    same = (gpt.ngrams(a) == gpt.ngrams(b)).all(-1)[0]
    assert same.tolist() == [True] * 4 + [False] * 3 + [True] * 3


def test_narrow_ngrams_take_slices_in_turn():
    """Orders 2 and 4 add to the first half of the stream, order 3 to the second: a changed token is seen as far back."""
    ngrams = small(ngram_buckets=4096, ngram_orders="2,3,4", ngram_width=16).ngrams
    assert ngrams.table.weight.shape == (3 * 4096, 16) and small().config.width == 32
    with torch.no_grad():
        ngrams.table.weight.normal_()
    a = torch.arange(10)[None] % 97
    b = a.clone()
    b[0, 4] = 50
    changed = (ngrams(a) != ngrams(b))[0]  # [T, C]
    assert changed[:, :16].any(-1).nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert changed[:, 16:].any(-1).nonzero().flatten().tolist() == [4, 5, 6]
    found = ngrams.table(ngrams.rows(a))[0]
    torch.testing.assert_close(ngrams(a)[0], torch.cat([found[:, 0] + found[:, 2], found[:, 1]], -1))
    uneven = small(ngram_buckets=64, ngram_orders="2,3", ngram_width=12).ngrams  # two slices of 12, and 8 channels without
    with torch.no_grad():
        uneven.table.weight.normal_()
    assert (uneven(a)[..., :24] != 0).all() and (uneven(a)[..., 24:] == 0).all() and uneven(a).size(-1) == 32
    assert small(ngram_buckets=64, ngram_width=48).ngrams.table.weight.size(1) == 32


def test_ngram_hash_spreads():
    """Distinct n-grams share buckets no more often than chance would have it; the orders never share a row."""
    table = small(ngram_buckets=4096, ngram_orders="2,5").ngrams
    tokens = torch.randint(97, (1, 20000), generator=torch.Generator().manual_seed(0))
    rows = table.rows(tokens)[0, 5:]
    assert rows[:, 0].max() < 4096 <= rows[:, 1].min()
    for column, n in ((0, 2), (1, 5)):
        grams = {tuple(tokens[0, i - n + 1 : i + 1].tolist()): rows[i - 5, column].item() for i in range(5, 20000)}
        used = len(set(grams.values()))
        expected = 4096 * (1 - (1 - 1 / 4096) ** len(grams))  # balls in bins
        assert abs(used - expected) < 100


def test_gpt2_initialisation():
    gpt = small(width=64, heads=4, layers=8)
    std = lambda name: gpt.state_dict()[name].std().item()  # noqa: E731
    assert std("embedding.weight") == pytest.approx(0.02, rel=0.1)
    assert std("positions.weight") == pytest.approx(0.01, rel=0.1)
    assert std("blocks.3.attention.qkv.weight") == pytest.approx(0.02, rel=0.1)
    assert std("blocks.3.mlp.projection.weight") == pytest.approx(0.02 / 4, rel=0.1)


def test_roles_and_splits():
    gpt = small(**MODERN)
    kinds = roles(gpt)
    assert kinds["embedding.weight"] == "embedding" and kinds["head.weight"] == "head"
    assert kinds["blocks.0.attention.qkv.weight"] == kinds["blocks.1.mlp.up.weight"] == "matrix"
    assert kinds["blocks.0.norm1.weight"] == kinds["blocks.0.mlp.up.bias"] == "vector"
    assert set(kinds) == {name for name, _ in gpt.named_parameters()}
    assert splits(gpt) == {f"blocks.{i}.attention.qkv.weight": 3 for i in range(2)}
    assert "head.weight" not in roles(small())  # tied: it is the embedding


def test_sizes_and_flops():
    with torch.device("meta"):
        counts = {name: parameter_counts(GPT(ModelConfig(**size)))["total"] for name, size in PRESETS.items()}
    # Hugging Face lists the four GPT-2 sizes as 124M, 355M, 774M and 1.56B parameters
    assert counts == {"124M": 124439808, "350M": 354823168, "774M": 774030080, "1.5B": 1557611200}
    # nanoGPT's 854.8 MFLOP per token (6 N + 12 L C T, N = 123.6M) counts the masked half of attention and the vectors
    flops = flops_per_token(ModelConfig())
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert flops == 6 * matrices + 6 * 12 * 768 * 1024
    assert pytest.approx(flops, rel=2e-3) == 854.8e6 - 6 * 12 * 768 * 1024


def test_flops_match_pytorchs_count():
    """Against torch's own counter, which counts attention in full: plain attention adds the masked half."""
    from torch.utils.flop_counter import FlopCounterMode

    gpt = small(attention="plain")
    counter = FlopCounterMode(display=False)
    with counter:
        gpt(TOKENS, TOKENS).backward()
    config = gpt.config
    expected = flops_per_token(config) + 6 * config.layers * config.sequence_length * config.width
    assert counter.get_total_flops() == TOKENS.numel() * expected


def test_dropout_acts_in_training_only():
    gpt = awake(small(dropout=0.5))
    assert not torch.equal(gpt(TOKENS), gpt(TOKENS))
    gpt.eval()
    assert torch.equal(gpt(TOKENS), gpt(TOKENS))


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 3},
        {"layers": -1},
        {"dropout": 1.0},
        {"norm": "batchnorm"},
        {"ngram_orders": "2,x", "ngram_buckets": 8},
    ],
)
def test_contradictions_raise(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ModelConfig(**SMALL | wrong)


def test_loss_is_the_mean_cross_entropy():
    gpt = awake(small())
    targets = TOKENS.roll(1)
    expected = F.cross_entropy(gpt(TOKENS).double().flatten(0, 1), targets.flatten())
    assert gpt(TOKENS, targets).item() == pytest.approx(expected.item(), rel=1e-5)
