"""The speedrun's tricks: each against its formula written out; every trick in training, compiled, resumed, causal."""

import copy
import functools
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared import DATA_ROOT, Cut, events, losses, result, same, stored, torchrun, with_needs

import optimizers
import sample
import train_gpt
from config import mean_flops, resolve
from data import shards
from data.shards import Dataset, Loader
from engine import schedules
from engine.schedules import Course
from engine.spec import UsageError
from layers.residual import GATE_CHANNELS, Backout, SingleSkip, value_table
from layers.shape import ModelConfig, flops_per_token
from model import GPT, future_loss, roles, rotary_tables, rotate, splits
from optimizers.elementwise import CautiousAdamW
from optimizers.mantissa import halves, keep_mantissas, to_bf16, whole
from tricks import TRACKS, TRICKS

SMALL = {"vocab_size": 61, "sequence_length": 24, "layers": 4, "heads": 2, "width": 32}
TOKENS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
MODEL_FIELDS = {f for f in ModelConfig.__dataclass_fields__}
SMALL_TABLES = ("--ngram-buckets", "512")
# what has no effect but speed, or is another's size: tested where it belongs
HERE = [name for name in TRICKS if name not in ("compile", "wide_heads", "padded_vocab")]


def small(**settings) -> GPT:
    """Every weight random, so that nothing is hidden behind a start at zero."""
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(**SMALL | settings))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.3)
    return gpt.eval()


def embedded(gpt: GPT) -> torch.Tensor:
    return gpt.embedding(TOKENS) + gpt.positions.weight


def logits(gpt: GPT, x: torch.Tensor) -> torch.Tensor:
    return gpt.head(gpt.norm(x))


def gate(module, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x[..., :GATE_CHANNELS] @ module.weight.T)


def flags_of(name: str, *more: str) -> tuple[str, ...]:
    return ("--tricks", name, "--schedule", "constant", *(SMALL_TABLES if "ngram" in name else ()), *more)


def training(tmp_path, *flags: str) -> train_gpt.Training:
    base = ["--track", "tiny", "--dtype", "fp32", "--data-root", str(DATA_ROOT), "--out", str(tmp_path / "run")]
    made = train_gpt.Training(*resolve([*base, *flags]), train_gpt.World("cpu"))
    made.model.train()
    made.optimizer.train()
    return made


# ---------------------------------------------------------------- every trick


def groups(names: list[str], most: int) -> list[str]:
    """The tricks in few groups, none of more than so many and none with two that set the same field."""
    made: list[list[str]] = []
    for name in names:
        for group in made:
            if len(group) < most and all(TRICKS[name].settings.keys().isdisjoint(TRICKS[other].settings) for other in group):
                group.append(name)
                break
        else:
            made.append([name])
    return [",".join(group) for group in made]


@pytest.mark.parametrize("names", [*groups([name for name in HERE if name != "batch_stages"], 4), "batch_stages"])
def test_tricks_train(sotu, tmp_path, names):
    """On `tiny`: the loss falls, a gradient reaches every weight, what is put away at step 12 goes on as it would have, bit by
    bit, and after all that no logit depends on a later token."""
    flags = flags_of(",".join(map(with_needs, names.split(","))), "--steps", "15")
    if names != "batch_stages":  # whose rates suit the track's batch
        flags += ("--batch-tokens", "256")
    made = training(tmp_path, *flags)
    reached = set()
    for parameter, p in made.gpt.named_parameters():

        def note(p, parameter=parameter):
            if p.grad.abs().sum() > 0:
                reached.add(parameter)

        p.register_post_accumulate_grad_hook(note)
    found = []
    for step in range(15):
        if step == 12:
            saved = copy.deepcopy((made.gpt.state_dict(), made.optimizer.state_dict()))
        found.append(made.step()[0])
    made.close()
    assert sum(found[-3:]) < sum(found[:3]) - 0.3 * 3
    assert reached == {parameter for parameter, _ in made.gpt.named_parameters()}

    again = training(tmp_path, *flags)
    again.gpt.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.progress.step = 12
    assert [again.step()[0] for _ in range(3)] == found[12:]
    again.close()
    assert same((again.gpt.state_dict(), again.optimizer.state_dict()), (made.gpt.state_dict(), made.optimizer.state_dict()))

    gpt = again.gpt.eval()
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 256
    with torch.no_grad():
        before, after = gpt(tokens), gpt(changed)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-5)
    assert not torch.allclose(before[:, 40], after[:, 40], atol=1e-3)


IN_GRAPH = [n for n in HERE if TRICKS[n].settings.keys() & (MODEL_FIELDS | {"future_tokens", "weights"})]


@pytest.mark.parametrize("names", groups(IN_GRAPH, 8))
def test_tricks_are_one_graph(names):
    """No graph break, and the graph's numbers are those of the code."""
    settings = {key: value for name in names.split(",") for key, value in TRICKS[name].settings.items()}
    more = {"ngram_buckets": 64} if "ngram_buckets" in settings else {}
    gpt = small(**{k: v for k, v in settings.items() if k in MODEL_FIELDS} | more | {"layers": 2})
    if settings.get("weights") == "bf16":
        to_bf16([p for n, p in gpt.named_parameters() if roles(gpt)[n] == "matrix"])
    future = torch.tensor([0.5, 0.25]) if settings.get("future_tokens") else None
    torch._dynamo.reset()
    compiled = torch.compile(gpt, backend="eager", fullgraph=True)
    expected = gpt(TOKENS, TOKENS.roll(-1, 1), future)
    wanted = torch.autograd.grad(expected, list(gpt.parameters()))
    got = compiled(TOKENS, TOKENS.roll(-1, 1), future)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, list(gpt.parameters())), wanted)


TOGETHER = (
    "normuon,cautious_decay,cautious_rest,adam_every_other,value_gates,input_shortcut,single_skip,smear,backout,attention_gate,"
    "exclusive_attention,key_offset,logit_rescale,multi_token,retied_head,batch_stages,momentum_cooldown,long_short_windows,"
    "yarn,document_mask,align_documents,short_sequences"
)


def stop_at(step: int):
    real = train_gpt.Training.log_step

    def patched(self, *args):
        real(self, *args)
        if self.progress.step == step:
            raise Cut

    return patched


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        (TOGETHER, 5),
        (TOGETHER, 9),
        ("muon,bf16_weights,reference_script", 5),
        ("bf16_weights,reference_script", 9),
    ],
)
@pytest.mark.slow
def test_tricks_go_on_from_a_checkpoint(train, monkeypatch, name, checkpoint):
    """Cut short and continued: the same losses, weights and state, bit by bit. At 9 the head has just been untied."""
    flags = flags_of(name, "--steps", "12", "--checkpoint-every", str(checkpoint), "--deterministic", "--val-every", "12")
    flags += () if "muon" in name else ("--optimizer", "cautious_adamw")
    whole = train(*flags, out="whole")
    with monkeypatch.context() as patched:
        patched.setattr(train_gpt.Training, "log_step", stop_at(checkpoint + 1))
        with pytest.raises(Cut):
            train(*flags, out="cut")
    cut = train(*flags, out="cut")
    assert [e["step"] for e in events(cut, "resume")] == [checkpoint]
    assert losses(cut) == losses(whole) and losses(cut, "val") == losses(whole, "val")
    assert [e["tokens"] for e in events(cut, "train")] == [e["tokens"] for e in events(whole, "train")]
    assert same(stored(whole, *flags), stored(cut, *flags))


@pytest.mark.parametrize(("name", "expected"), [("baseline", 1), (TOGETHER, 4 + 1)], ids=["baseline", "together"])
@pytest.mark.slow
def test_nothing_is_compiled_on_the_clock(sotu, tmp_path, monkeypatch, name, expected):
    """The warm-up compiles what every step of every stage runs, and the update where torch has it not fused."""
    monkeypatch.setattr(train_gpt.hardware, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = training(tmp_path, *flags_of(name, "--steps", "6", "--micro-batch-tokens", "128", "--compile"))
    made.warm_up()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(6):
        made.step()
    made.close()
    assert graphs == expected and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_tricks_together_on_two_ranks_are_those_on_one(train, tmp_path):
    # six steps, two of each stage of the batch: sums in another order differ by 1e-7 at first and by 3e-6 then, but in a ninth
    # step, on some CPUs and with some numbers of threads, by 2e-5
    flags = flags_of(TOGETHER, "--steps", "6", "--batch-tokens", "512", "--micro-batch-tokens", "128")
    flags += ("--rates", "tables=2,smear=0.5")
    one, two = train(*flags), tmp_path / "two"
    torchrun(2, two, *flags, "--check-ranks", "2")  # which compares the weights of both, bit by bit
    for kind in ("train", "val"):
        assert losses(two, kind) == pytest.approx(losses(one, kind), rel=1e-5)
    assert [e["tokens"] for e in events(two, "train")] == [e["tokens"] for e in events(one, "train")]
    assert result(two)["tokens"] == result(one)["tokens"] == 2 * 512 * (1 + 2 + 3)


@pytest.mark.slow
def test_record_of_gpt2_on_eight_ranks_is_that_on_one(train, tmp_path):
    """Its tricks at the sizes of `tiny`, documents shortened so that the mask acts; fp32 weights, whose sums are exact enough,
    and not compiled: both have tests of their own."""
    root, generator = tmp_path / "data", np.random.default_rng(0)
    documents = [generator.integers(65, 91, n).astype(np.uint16) for n in generator.integers(5, 150, 300)]
    splits = {s: shards.write(root / "mine-bytes", "mine", s, documents, 0) for s in ("train", "val")}
    shards.write_manifest(root / "mine-bytes", {"corpus": "mine", "eot": 0, "splits": splits})
    tricks = [t for t in TRACKS["gpt2-small"].recipes["record"] if t not in ("compile", "bf16_weights")]
    flags = ("--tricks", ",".join(tricks), "--corpus", "mine", "--data-root", str(root), "--steps", "6", "--clip", "0")
    flags += ("--batch-tokens", "1024")
    one, eight = train(*flags), tmp_path / "eight"
    torchrun(8, eight, *flags, "--check-ranks", "2")
    # Muon lifts a gradient's rounding to full size in the directions that the gradient lacks (a projection's first has singular
    # values of 1e-9 of its largest): after its updates, sums in another order alone, one rank's micro-batches of 128 tokens,
    # move losses by up to 5e-5. An eighth of the batch lost moves the second loss by 8e-4 and the sixth by 3.5e-3
    assert losses(eight)[:2] == pytest.approx(losses(one)[:2], rel=1e-5)
    for kind in ("train", "val"):
        assert losses(eight, kind) == pytest.approx(losses(one, kind), rel=2e-4)
    assert losses(one)[-1] < losses(one)[0]


@pytest.mark.slow
def test_bf16_weights_on_two_ranks(train, tmp_path):
    """Their gradients are added up in bf16, 8 bits: as near as that allows."""
    flags = flags_of("muon,bf16_weights,reference_script", "--steps", "6", "--check-ranks", "2")
    one, two = train(*flags), tmp_path / "two"
    torchrun(2, two, *flags)  # whose --check-ranks compares the weights of both, bit by bit
    assert losses(two) == pytest.approx(losses(one), rel=5e-3)


def test_recomputed_activations_change_nothing():
    fields = dict(value_embeddings=1, skips="unet", input_shortcut=True, backout=True, exclusive_attention=True)
    found = []
    for recompute in (False, True):
        gpt = small(**fields, checkpoint_activations=recompute)
        loss = gpt(TOKENS, TOKENS.roll(-1, 1))
        found.append((loss, torch.autograd.grad(loss, list(gpt.parameters()))))
    torch.testing.assert_close(found[1], found[0])


def test_what_a_recipe_does_not_use_is_not_there():
    names = {name for name, _ in small().named_modules()}
    assert names == {name for name, _ in small(qk_norm=True, logit_softcap=15.0).named_modules()}
    words = {part for name in names for part in name.split(".") if part and not part.isdigit()}
    assert words == {"embedding", "positions", "dropout", "blocks", "norm1", "attention", "qkv", "projection", "norm2", "mlp",
                     "up", "norm", "head"}  # fmt: skip


def test_roles_of_what_tricks_add():
    gpt = small(
        value_embeddings=1, value_gates=True, input_shortcut=True, skips="single", smear=True, backout=True,
        attention_gate=True, exclusive_attention=True,
    )  # fmt: skip
    plain, found = roles(small()), roles(gpt)
    added = {name: role for name, role in found.items() if name not in plain}
    assert {name: found[name] for name in plain} == plain and splits(gpt) == splits(small())
    expected = {"paths.values.tables.0.weight": "embedding", "smear.gate.weight": "vector", "smear.strength": "scalar",
                "paths.skips.gate.weight": "vector", "paths.skips.strength": "scalar", "paths.backout.strength": "scalar",
                "paths.shortcut.stream": "vector", "paths.shortcut.inputs": "vector"}  # fmt: skip
    for block in range(4):
        expected |= {f"blocks.{block}.attention.extras.{part}": "vector" for part in ("gate.weight", "exclusion.strength")}
    expected |= {f"blocks.{block}.attention.extras.values.gate.weight": "vector" for block in (0, 3)}
    assert added == expected
    assert roles(small(value_embeddings=1))["blocks.0.attention.extras.values.weights"] == "vector"
    assert roles(small(skips="unet"))["paths.skips.weights"] == "vector"


# ---------------------------------------------------------------- definitions: between the blocks


def test_smear():
    gpt = small(smear=True)
    x = embedded(gpt)
    expected = x.clone()
    for t in range(1, 24):
        expected[:, t] = x[:, t] + gpt.smear.strength * gate(gpt.smear.gate, x[:, t]) * x[:, t - 1]
    torch.testing.assert_close(gpt.smear(x), expected)
    for block in gpt.blocks:
        expected = block(expected, None)
    torch.testing.assert_close(gpt(TOKENS), logits(gpt, expected))


def test_input_shortcut():
    gpt = small(input_shortcut=True)
    x0 = x = embedded(gpt)
    for block, a, b in zip(gpt.blocks, gpt.paths.shortcut.stream, gpt.paths.shortcut.inputs):
        x = block(a * x + b * x0, None)
    torch.testing.assert_close(gpt(TOKENS), logits(gpt, x))
    fresh = GPT(ModelConfig(**SMALL, input_shortcut=True)).paths.shortcut
    assert fresh.stream.tolist() == [1] * 4 and fresh.inputs.tolist() == [0] * 4


@pytest.mark.parametrize(("layers", "pairs"), [(4, {2: 1, 3: 0}), (5, {3: 1, 4: 0})])
def test_unet_skips(layers, pairs):
    gpt = small(layers=layers, skips="unet")
    x, outputs = embedded(gpt), []
    for i, block in enumerate(gpt.blocks):
        if i in pairs:
            x = x + gpt.paths.skips.weights[pairs[i]] * outputs[pairs[i]]
        x = block(x, None)
        outputs.append(x)
    torch.testing.assert_close(gpt(TOKENS), logits(gpt, x))
    assert GPT(ModelConfig(**SMALL, skips="unet")).paths.skips.weights.tolist() == [1, 1]


def test_single_skip():
    gpt = small(skips="single")
    skip = gpt.paths.skips
    x0 = embedded(gpt)
    after0 = gpt.blocks[0](x0, None)
    after1 = gpt.blocks[1](after0, None)
    x = after1 + torch.sigmoid(skip.strength) * 2 * gate(skip.gate, x0) * after1
    x = gpt.blocks[3](gpt.blocks[2](x, None), None)
    torch.testing.assert_close(gpt(TOKENS), logits(gpt, x))
    published = SingleSkip(ModelConfig())  # 12 blocks
    assert (published.source, published.target) == (4, 7)
    assert published.strength.sigmoid().item() == pytest.approx(0.18, abs=0.005)
    for kind in ("single", "unet"):
        assert small(layers=1, skips=kind).state_dict().keys() == small(layers=1).state_dict().keys()
    assert (SingleSkip(ModelConfig(layers=2)).source, SingleSkip(ModelConfig(layers=2)).target) == (0, 1)


def test_backout():
    gpt = small(backout=True)
    x = embedded(gpt)
    for i, block in enumerate(gpt.blocks):
        x = block(x, None)
        if i == 2:
            middle = x
    torch.testing.assert_close(gpt(TOKENS), logits(gpt, x - gpt.paths.backout.strength * middle))
    published = Backout(ModelConfig())
    assert published.source == 8 and published.strength.item() == 0.5


# ---------------------------------------------------------------- definitions: inside attention


def attention_written_out(gpt: GPT, block: int, x: torch.Tensor) -> torch.Tensor:
    """One token and head at a time, from what the module's parameters say."""
    module, config = gpt.blocks[block].attention, gpt.config
    B, T, C = x.shape
    D = config.head_width
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).view(B, T, 3, config.heads, D).unbind(2)

    def turned(z: torch.Tensor, t: int) -> torch.Tensor:
        if config.positions == "learned":
            return z
        first, second = z[..., : D // 2], z[..., D // 2 :]
        cos, sin = gpt.cos[t], gpt.sin[t]
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)

    still = [i for i in range(D) if i % (D // 2) >= D // 4]
    table = value_table(config, block)
    y = torch.zeros(B, T, config.heads, D)
    for b in range(B):
        for h in range(config.heads):
            keys, values = [], []
            for t in range(T):
                key, value = turned(k[b, t, h], t), v[b, t, h]
                if config.key_offset and t:
                    key = key.clone()
                    key[still] = turned(k[b, t - 1, h], t - 1)[still]
                if table is not None:
                    e = gpt.paths.values.tables[table].weight[TOKENS[b, t]].view(config.heads, D)[h]
                    mix = module.extras.values
                    if config.value_gates:
                        value = value + 2 * gate(mix.gate, x[b, t])[h] * e
                    else:
                        value = mix.weights[0] * value + mix.weights[1] * e
                keys.append(key)
                values.append(value)
                scores = torch.stack(keys) @ turned(q[b, t, h], t) / math.sqrt(D)
                out = scores.softmax(0) @ torch.stack(values)
                if config.exclusive_attention:
                    own = value / value.norm()
                    out = out - torch.tanh(module.extras.exclusion.strength[h]) * (out @ own) * own
                if config.attention_gate:
                    out = out * gate(module.extras.gate, x[b, t])[h]
                y[b, t, h] = out
    return y.view(B, T, C) @ module.projection.weight.T + module.projection.bias


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"value_embeddings": 1},
        {"value_embeddings": 1, "value_gates": True},
        {"attention_gate": True},
        {"exclusive_attention": True},
        {"positions": "half_rotary", "key_offset": True},
        {"value_embeddings": 1, "attention_gate": True, "exclusive_attention": True, "positions": "half_rotary",
         "key_offset": True},
    ],
    ids=lambda fields: "+".join(fields) or "plain",
)  # fmt: skip
def test_attention_is_its_formula(fields):
    gpt = small(**fields)
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))
    rotary = None if gpt.positions is not None else (gpt.cos, gpt.sin)
    for block in (0, 1, 3):
        values = None if gpt.paths is None else gpt.paths.values(block, TOKENS, x.dtype)
        got = gpt.blocks[block].attention(x, rotary, values)
        torch.testing.assert_close(got, attention_written_out(gpt, block, x), atol=1e-4, rtol=1e-4)


def test_value_embeddings_reach_the_blocks_that_they_serve():
    table = lambda n, layers: [value_table(ModelConfig(layers=layers, value_embeddings=n), i) for i in range(layers)]  # noqa: E731
    assert table(3, 12) == [0, 1, 2, *[None] * 6, 0, 1, 2]
    assert table(3, 4) == [0, 1, 2, 2] and table(3, 2) == [0, 1] and table(0, 3) == [None] * 3
    gpt = small(value_embeddings=1)
    asked = {}
    for i, block in enumerate(gpt.blocks):
        block.attention.register_forward_hook(lambda module, given, out, i=i: asked.update({i: given[2]}))
    gpt(TOKENS)
    expected = gpt.paths.values.tables[0](TOKENS)
    assert torch.equal(asked[0], expected) and torch.equal(asked[3], expected) and asked[1] is asked[2] is None


def test_gates_start_as_published():
    gpt = GPT(ModelConfig(**SMALL, value_embeddings=1, value_gates=True, attention_gate=True, exclusive_attention=True))
    attention = gpt.blocks[0].attention.extras
    assert attention.gate(torch.randn(3, 32)).tolist() == [[0.5, 0.5]] * 3  # halves each head (#28)
    assert attention.values.gate.weight.abs().max() == 0 == attention.exclusion.strength.abs().max()  # v + e; y
    assert attention.gate.weight.shape == (2, 12)
    mixed = GPT(ModelConfig(**SMALL, value_embeddings=1)).blocks[0].attention.extras.values.weights
    assert mixed.tolist() == [0.5, 0.5]


# ---------------------------------------------------------------- definitions: head and loss


def test_logit_rescale():
    x = torch.linspace(-40, 40, 9)
    free, bound = small(), small(logit_softcap=23.0, softcap_form="sigmoid")
    torch.testing.assert_close(bound(TOKENS), 23 / (1 + torch.exp(-(free(TOKENS) + 5) / 7.5)))
    assert (23 * torch.sigmoid((x + 5) / 7.5)).max() < 23


def test_future_loss():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 7, 11, generator=generator, requires_grad=True)
    targets = torch.randint(11, (3, 7), generator=generator)
    targets[0, 3] = -100  # left out, as in F.cross_entropy
    weights = torch.tensor([0.5, 0.2])
    expected = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
    for k, weight in enumerate(weights, 1):
        pairs = [(scores[b, t], targets[b, t + k]) for b in range(3) for t in range(7 - k) if targets[b, t + k] >= 0]
        ahead = [F.cross_entropy(score, target) for score, target in pairs]
        expected = expected + weight * torch.stack(ahead).mean()
    got = future_loss(scores, targets, weights)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(expected, scores))
    torch.testing.assert_close(
        future_loss(scores, targets, torch.zeros(2)), F.cross_entropy(scores.flatten(0, 1), targets.flatten())
    )


def test_future_tokens_do_not_touch_validation(train):
    """The same weights are validated alike; the training loss is larger by the further terms."""
    plain = train("--steps", "2", "--val-every", "1", "--optimizer", "sgd:lr=0", out="plain")
    more = train("--steps", "2", "--val-every", "1", "--optimizer", "sgd:lr=0", "--tricks", "multi_token", out="more")
    assert losses(plain, "val") == losses(more, "val")
    assert losses(more)[0] == pytest.approx(1.75 * losses(plain)[0], rel=0.02)


def test_retied_head_is_a_tied_head_until_it_is_not(train, sotu, tmp_path):
    """Twelve steps, eight of them tied: the losses of a tied model; then two weights that went on from one state."""
    flags = ("--steps", "12", "--clip", "1")
    tied = train(*flags, out="tied")
    retied = train(*flags, "--tricks", "retied_head", out="retied")
    assert losses(retied)[:9] == pytest.approx(losses(tied)[:9], rel=1e-5)
    assert [e["grad_norm"] for e in events(retied, "train")][:9] == pytest.approx(
        [e["grad_norm"] for e in events(tied, "train")][:9], rel=1e-4
    )
    assert abs(losses(retied)[10] - losses(tied)[10]) > 1e-6
    made = training(tmp_path, *flags, "--tricks", "retied_head")
    embedding, head, state = made.gpt.embedding.weight, made.gpt.head.weight, made.optimizer.state
    for step in range(12):
        made.step()
        # 0.667 of 12: steps 1 to 9 are tied
        assert torch.equal(embedding, head) == (step <= 8)
        assert (embedding in state) == (step >= 9)
        if step == 8:
            before = int(state[head]["step"])
        if step == 9:  # both have taken one step of their own from there
            assert state[embedding]["step"] == state[head]["step"] == before + 1
            assert not torch.equal(state[embedding]["exp_avg"], state[head]["exp_avg"])
    made.close()


# ---------------------------------------------------------------- definitions: optimizers and schedules


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("normuon", dict(normuon=True)),
        ("equal_rows", dict(equal_rows=True)),
        ("cautious_decay", dict(cautious=True)),
        ("polar_express", dict(coefficients="polar_express")),
    ],
)
def test_muon_tricks_set_their_keys(name, keys):
    """The rules behind the keys are tested in test_rules.py and test_optimizers.py."""
    config, model_config, _ = resolve(["--track", "tiny", "--tricks", f"muon,{name}"])
    muon, _ = optimizers.build(config.optimizer, GPT(model_config)).parts
    assert keys.items() <= muon.param_groups[0].items()


def test_cautious_muon_decays_what_it_shrinks():
    """Of w, u = orthogonalize(m): w - lr u - lr wd [u w >= 0] w."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(6, 8))
    before, gradient = w.detach().clone(), torch.randn(6, 8)
    make = lambda p, wd, cautious: optimizers.matrix.Muon([p], lr=0.1, weight_decay=wd, cautious=cautious, dtype="fp32")  # noqa: E731
    free = torch.nn.Parameter(before.clone())
    w.grad, free.grad = gradient.clone(), gradient.clone()
    make(w, 0.5, True).step()
    make(free, 0.0, False).step()
    u = (before - free.detach()) / 0.1
    torch.testing.assert_close(w.detach(), before - 0.1 * u - 0.1 * 0.5 * torch.where(u * before >= 0, before, 0))


def test_what_muon_leaves_can_be_cautious_and_rare():
    gpt = small(tied_head=False)
    spec = "muon:dtype=fp32,adamw_cautious=true,adamw_every=2,adamw_weight_decay=0.3,adamw_lr=0.1,embedding_lr=0.2"
    optimizer = optimizers.build(spec, gpt)
    assert isinstance(optimizer.parts[1], CautiousAdamW)
    found = {g["roles"]: (g["lr"], g["weight_decay"], g["every"], g["cautious"]) for g in optimizer.parts[1].param_groups}
    assert found == {
        "embedding": (0.2, 0.3, 2, True), "head": (0.1, 0.3, 2, True), "vector": (0.1, 0.0, 2, True),
    }  # fmt: skip
    moved = []
    for step in range(4):
        before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
        for p in gpt.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1)) + 0.01 * torch.randn_like(p)
        optimizer.step()
        moved.append({roles(gpt)[n] for n, p in gpt.named_parameters() if not torch.equal(p, before[n])})
    assert moved == [{"matrix"}, {"matrix", "embedding", "head", "vector"}] * 2


def test_momentum_of_record_39():
    """2,420 steps: 0.85 to 0.95 over 300, back over the last 50."""
    momentum = schedules.build(TRICKS["momentum_cooldown"].settings["momentum_schedule"], 2420, schedules.MOMENTUM_SCHEDULES)
    assert momentum(0) == 0.85 and momentum(150) == pytest.approx(0.9, abs=1e-3)
    assert momentum(301) == momentum(2369) == 0.95 and momentum(2419) == pytest.approx(0.852, abs=1e-3)


@pytest.mark.parametrize("spec", ["adamw", "muon:dtype=fp32", "lion", "schedule_free_adamw"])
def test_rates_multiply(spec):
    gpt = small(tied_head=False, smear=True)
    plain = {p: g["lr"] for g in optimizers.build(spec, gpt).param_groups for p in g["params"]}
    optimizer = optimizers.build(spec, gpt, rates="embedding=3,head=0.5,smear=0.25,norm1=0")
    factors = {"embedding.weight": 3, "positions.weight": 3, "head.weight": 0.5, "smear.gate.weight": 0.25,
               "smear.strength": 0.25} | {f"blocks.{i}.norm1.{w}": 0 for i in range(4) for w in ("weight", "bias")}  # fmt: skip
    for name, p in gpt.named_parameters():
        (group,) = (g for g in optimizer.param_groups if any(p is q for q in g["params"]))
        assert group["lr"] == group["initial_lr"] == pytest.approx(plain[p] * factors.get(name, 1)), name
        assert roles(gpt)[name] in group["roles"].split("+")
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    gpt(TOKENS, TOKENS.roll(-1, 1)).backward()
    optimizer.step()
    assert {n for n, p in gpt.named_parameters() if torch.equal(p, before[n])} == {n for n, f in factors.items() if f == 0}


def test_a_rate_may_be_for_one_parameter_by_its_name():
    """As the record's retied head has it: of the embedding alone, whether there are tables of the same role or not."""
    words = TRACKS["gpt2-small"].tuning["retied_head"]["rates"]
    for gpt in (small(tied_head=False), small(tied_head=False, value_embeddings=2)):
        one, other = ({p: g["lr"] for g in made.param_groups for p in g["params"]} for made in (
            optimizers.build("adamw", gpt), optimizers.build("adamw", gpt, rates=words)))  # fmt: skip
        assert [n for n, p in gpt.named_parameters() if one[p] != other[p]] == ["embedding.weight"]


@pytest.mark.parametrize(
    ("rates", "message"),
    [("embeding=2", "did you mean 'embedding'"), ("head=-1", "0 or more"), ("head", "type float"), ("head=nan", "0 or more")],
)
def test_wrong_rates_are_said(rates, message):
    with pytest.raises(UsageError, match=message):
        optimizers.build("adamw", small(tied_head=False), rates=rates)


def test_halves_make_a_whole():
    bits = torch.randint(-(2**31), 2**31, (10000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    weight = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40])])
    high, low = halves(weight)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(whole(high, low).view(torch.int32), weight.view(torch.int32))
    finite = weight.isfinite() & (weight.abs() > 1e-30)
    assert ((high.float() - weight).abs() <= weight.abs() * 2**-7)[finite].all()


@pytest.mark.parametrize("spec", ["adamw", "muon:dtype=fp32", "cautious_adamw:every=2", "soap:every=2"])
def test_bf16_weights_lose_nothing(spec):
    """The same gradients give the same fp32 weights, bit by bit, as if they were kept in one piece; a state_dict too."""
    full, split = small(), small()
    split.load_state_dict(full.state_dict())
    matrices = {n for n, role in roles(full).items() if role == "matrix"}
    lower = to_bf16([p for n, p in split.named_parameters() if n in matrices])
    one, two = optimizers.build(spec, full), keep_mantissas(optimizers.build(spec, split), lower)
    for step in range(6):
        for number, (p, q) in enumerate(zip(full.parameters(), split.parameters(), strict=True)):
            generator = torch.Generator().manual_seed(100 * step + number)
            q.grad = torch.randn(p.shape, generator=generator).to(q.dtype)
            p.grad = q.grad.float()
        one.step()
        two.step()
        if step == 2:  # continued from its state, in a new optimizer
            saved = copy.deepcopy(two.state_dict())
            two = keep_mantissas(optimizers.build(spec, split), lower)
            two.load_state_dict(saved)
    mantissas = [state["mantissa"] for state in two.state.values() if "mantissa" in state]
    assert len(mantissas) == len(matrices)
    for (name, p), w in zip(split.named_parameters(), full.parameters(), strict=True):
        if name in matrices:
            assert p.dtype == torch.bfloat16
            made = [whole(p.data, m) for m in mantissas if m.shape == p.shape]
            assert sum(torch.equal(candidate, w) for candidate in made) == 1, name
        else:
            assert torch.equal(p, w), name


def test_bf16_weights_refuse_averages():
    gpt = small()
    lower = to_bf16([gpt.blocks[0].mlp.up.weight])
    for optimizer in (optimizers.build("schedule_free_adamw", gpt), optimizers.build("adamw", gpt, average="lawa_ema")):
        with pytest.raises(UsageError, match="no averages"):
            keep_mantissas(optimizer, lower)


# ---------------------------------------------------------------- definitions: attention windows


def seen_by_the_last(gpt: GPT) -> list[int]:
    """Positions that the logits of the last token depend on."""
    x = gpt.embedding(TOKENS[:1]).detach().requires_grad_()
    hook = gpt.embedding.register_forward_hook(lambda *_: x)
    (grad,) = torch.autograd.grad(gpt(TOKENS[:1])[0, -1].sum(), x)
    hook.remove()
    return grad[0].abs().sum(-1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({}, [0, 0, 0, 0]),
        ({"window": 4}, [4, 4, 4, 4]),
        ({"window": 8, "window_pattern": "LSS"}, [8, 4, 4, 8]),
        ({"window": 6, "window_pattern": "S"}, [3, 3, 3, 6]),
        ({"window_pattern": "LS"}, [0, 12, 0, 0]),
        ({"window": 24, "window_pattern": "SL"}, [12, 0, 12, 0]),
        ({"window": 1, "window_pattern": "SL"}, [1, 1, 1, 1]),
    ],
)
def test_windows(settings, windows):
    """A block of window w reaches w - 1 tokens back; blocks add up."""
    gpt = small(**settings)
    assert [block.attention.window for block in gpt.blocks] == windows
    reach = sum((w or 24) - 1 for w in windows)
    assert seen_by_the_last(gpt) == list(range(max(0, 23 - reach), 24))


def test_pattern_of_twelve_blocks_can_be_modded_nanogpts():
    windows = ModelConfig(window=768, window_pattern="LSSSLSSLSSSL").windows()
    assert [w == 768 for w in windows] == [layer in (0, 4, 7, 11) for layer in range(12)] and set(windows) == {768, 384}


def test_windows_follow_their_schedule(sotu, tmp_path):
    flags = ("--window-stages", "0.25/0.5/1", "--window-pattern", "SL", "--window", "48", "--steps", "7")
    made = training(tmp_path, *flags)
    found = []
    for _ in range(7):
        made.step()
        found.append([block.attention.window for block in made.gpt.blocks])
    made.close()
    assert found == 3 * [[6, 12]] + 2 * [[12, 24]] + 2 * [[24, 48]]


@pytest.mark.parametrize("positions", ["rotary", "half_rotary"])
def test_yarn(positions):
    """Frequency by frequency, after windows of 6, 12 and 24 tokens; the tables are those of the stages, whatever was before."""
    config = dict(positions=positions, rotary_base=1024.0, yarn=True, width=64)
    gpt, parts = small(**config), (0.25, 0.5, 1.0)
    plain_cos, plain_sin = rotary_tables(gpt.config)
    assert torch.equal(gpt.cos, plain_cos) and torch.equal(gpt.sin, plain_sin)
    gpt.see(parts)
    scale, stretched = 1.0, 0
    for i in range(16):
        frequency = 1024 ** -(i / 16) if positions == "rotary" else 1024 ** -(i / 7) if i < 8 else 0.0
        original, scale = frequency, 1.0
        for a, b in ((6, 12), (12, 24)):
            turns = a * frequency / (2 * math.pi)
            keep = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
            frequency *= a / b * (1 - keep) + keep
            scale *= 1 + 0.2 * math.log(b / a)
        stretched += frequency < original
        for t in (0, 1, 23):
            assert gpt.cos[t, i].item() == pytest.approx(math.sqrt(scale) * math.cos(t * frequency), abs=1e-5)
            assert gpt.sin[t, i].item() == pytest.approx(math.sqrt(scale) * math.sin(t * frequency), abs=1e-5)
    assert stretched == (16 if positions == "rotary" else 8)
    q, k = torch.randn(2, 32)
    turned = rotate(q, gpt.cos[5], gpt.sin[5]) @ rotate(k, gpt.cos[5], gpt.sin[5])
    assert turned.item() == pytest.approx(scale * (q @ k).item(), rel=1e-4)
    gpt.see(parts[:1])
    assert torch.equal(gpt.cos, plain_cos)


def test_text_is_sampled_with_the_windows_of_the_checkpoint(train):
    flags = ("--tricks", "long_short_windows,yarn", "--steps", "6", "--checkpoint-every", "3", "--keep", "9")
    folder = train(*flags, "--window", "32")
    whole, _ = sample.load_model(folder)
    assert [block.attention.window for block in whole.blocks] == [32, 32]
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    half, _ = sample.load_model(folder)
    assert [block.attention.window for block in half.blocks] == [16, 16]
    assert torch.equal(half.cos, rotary_tables(half.config, (0.25, 0.5))[0]) and not torch.equal(half.cos, whole.cos)


def test_document_mask():
    """With positions that are relative, each document of a sequence gives the logits that it gives alone."""
    gpt = small(positions="half_rotary", document_mask=True, end_of_text=7)
    documents = [
        torch.tensor(words) for words in ([3, 1, 4], [7, 5, 9, 2, 6, 5], [7, 3], [7], [7, 8, 9, 7 + 1])
    ]  # the first is cut
    tokens = torch.cat(documents)[None]
    alone = torch.cat([gpt(document[None]) for document in documents], 1)
    torch.testing.assert_close(gpt(tokens), alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(small(positions="half_rotary")(tokens), alone, atol=1e-2)
    expected = F.cross_entropy(alone[0, :-1], tokens[0, 1:])  # the loss is of the same logits, in validation too
    assert gpt(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(expected.item(), rel=1e-4)
    both = small(positions="half_rotary", document_mask=True, end_of_text=7, window=2)
    assert not torch.allclose(both(tokens), alone, atol=1e-2)


def test_corpora_without_separators_are_refused(train, tmp_path, capsys):
    root = tmp_path / "data"
    for end_of_text, words in ((0, "begin with token 0: add --end-of-text 0"), (None, "has no token 9 before its documents")):
        folder, document = root / f"mine{end_of_text}-bytes", np.full(5000, 65, dtype=np.uint16)
        splits = {s: shards.write(folder, "mine", s, [document], 0) for s in ("train", "val")}
        shards.write_manifest(
            folder, {"corpus": "mine", "splits": splits} | ({} if end_of_text is None else {"eot": end_of_text})
        )
        for trick in ("document_mask", "align_documents"):
            flags = ("--corpus", f"mine{end_of_text}", "--data-root", str(root), "--val-tokens", "640", "--tricks", trick)
            out = train(*flags, "--end-of-text", "9", out="refused", code=2)
            printed = capsys.readouterr().err
            assert words in printed and printed.count("\n") == 1 and not out.exists()
            train(*flags, "--steps", "2", out=f"{trick}{end_of_text}")
            capsys.readouterr()


def test_flops_count_windows():
    """Keys met by each token, one by one, up to the half token by which a mean over positions is above T / 2."""
    config = ModelConfig(**SMALL, window=8, window_pattern="LSS")
    met = sum(sum(min(t + 1, w) - 0.5 * w / 24 for t in range(24)) / 24 for w in config.windows())
    without = 6 * (4 * 12 * 32**2 + 61 * 32)
    assert flops_per_token(config) == pytest.approx(without + 12 * 32 * met, abs=12 * 32 * 4)
    assert flops_per_token(config, 0.5) < flops_per_token(config) < flops_per_token(ModelConfig(**SMALL))
    run = resolve(["--track", "tiny", "--tricks", "window_warmup", "--steps", "9"])
    expected = sum(flops_per_token(run[1], part) for part in (0.25, 0.5, 1)) / 3
    assert mean_flops(*run[:2]) == pytest.approx(expected)
    grown = resolve(["--track", "tiny", "--tricks", "window_warmup,batch_stages", "--steps", "9"])
    expected = sum(n * flops_per_token(run[1], part) for n, part in ((1, 0.25), (2, 0.5), (3, 1))) / 6
    assert mean_flops(*grown[:2]) == pytest.approx(expected)


# ---------------------------------------------------------------- definitions: the head in 8-bit floats


def rounded(x: torch.Tensor, scale: float, kind: torch.dtype) -> torch.Tensor:
    return (x / scale).to(kind).float() * scale


def test_fp8_head():
    """The products written out, forward and backward, of the model's own normalised stream; evaluation is not touched."""
    gpt = small(vocab_multiple=16, norm_gains=False, norm="rmsnorm", head_dtype="fp8", tied_head=False, head_bias=True)
    wanted_in_evaluation, stream = gpt(TOKENS), []
    gpt.head.fp8 = True
    assert torch.equal(gpt(TOKENS), wanted_in_evaluation)
    gpt.train()
    gpt.norm.register_forward_hook(lambda _, __, out: stream.append(out))
    loss = gpt(TOKENS, TOKENS.roll(-1, 1))
    (found,) = torch.autograd.grad(loss, gpt.head.weight)
    x, w = stream[0].detach().flatten(0, 1), gpt.head.weight.detach()
    assert x.abs().max() <= 32**0.5 and w.abs().max() < 24
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x8 = rounded(x, 32**0.5 / 448, e4m3)
    made = (x8 @ rounded(w, 24 / 448, e4m3).T + gpt.head.bias.detach())[:, :61].requires_grad_()
    expected = F.cross_entropy(made, TOKENS.roll(-1, 1).flatten())
    torch.testing.assert_close(loss, expected)
    (g,) = torch.autograd.grad(expected, made)
    assert g.abs().max() <= 1 / 48
    torch.testing.assert_close(found[:61], rounded(g, 1 / 48 / 448, e5m2).T @ x8, atol=1e-6, rtol=1e-4)
    assert (found[61:] == 0).all()
    exact = F.cross_entropy(x @ w[:61].T + gpt.head.bias[:61], TOKENS.roll(-1, 1).flatten())
    assert 0 < abs(loss.item() - exact.item()) < 0.02 * exact.item()


@pytest.mark.slow
def test_fp8_head_is_one_graph():
    gpt = small(vocab_multiple=16, head_dtype="fp8", layers=2).train()
    gpt.head.fp8 = True
    torch._dynamo.reset()
    compiled = torch.compile(gpt, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(f(TOKENS, TOKENS.roll(-1, 1)), list(gpt.parameters())) for f in (gpt, compiled)]
    torch.testing.assert_close(found[1], found[0])


def test_fp8_head_trains_and_says_where_it_cannot(train, capsys, monkeypatch):
    flags = ("--steps", "12", "--schedule", "constant", "--tricks", "fp8_head", "--deterministic")
    simulated = train(*flags, "--head-dtype", "fp8", out="fp8")
    assert "simulated on this cpu" in capsys.readouterr().out
    plain = train(*flags, out="auto")
    assert "cpu has no 8-bit floats" in capsys.readouterr().out
    assert losses(simulated) != losses(plain) == losses(train(*flags, "--head-dtype", "same", out="same"))
    fall = lambda folder: losses(folder)[0] - sum(losses(folder)[-3:]) / 3  # noqa: E731
    assert fall(simulated) == pytest.approx(fall(plain), rel=0.1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    cuda = torch.device("cuda")
    for capability, able in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert train_gpt.hardware.pick_fp8("auto", cuda)[0] == able
        if able:
            assert train_gpt.hardware.pick_fp8("fp8", cuda) == (True, "")
        else:
            with pytest.raises(UsageError, match="fp8: NVIDIA A100-SXM4-80GB has no 8-bit floats"):
                train_gpt.hardware.pick_fp8("fp8", cuda)


# ---------------------------------------------------------------- definitions: sequences that grow


def test_short_sequences_are_the_same_tokens_cut(sotu, tmp_path, monkeypatch):
    flags = ("--tricks", "three_lengths", "--steps", "6", "--micro-batch-tokens", "256")
    made, seen = training(tmp_path, *flags), []
    made.gpt.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    for step in range(6):
        seen.clear()
        made.step()
        length = (16, 16, 32, 32, 64, 64)[step]
        assert [tokens.shape for tokens, _ in seen] == 4 * [(256 // length, length)]
        for uncut, parts in zip(made.loader.batch(step), zip(*seen, strict=True), strict=True):
            assert torch.equal(torch.cat(parts).flatten(), uncut.flatten())
    made.close()


def test_loss_of_short_sequences(sotu, tmp_path):
    """That of a run on sequences of this length, in the corpus's own order, where these are the same."""
    flags = ("--no-shuffle", "--steps", "4", "--optimizer", "sgd:lr=0", "--schedule", "constant", "--positions", "rotary")
    found = []
    for more in (("--length-stages", "0.5/1"), ("--sequence-length", "32")):
        made = training(tmp_path, *flags, *more)
        found.append([made.step()[0] for _ in range(2)])
        made.close()
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_flops_of_short_sequences():
    run = resolve(["--track", "tiny", "--tricks", "short_sequences,long_short_windows", "--steps", "8"])
    short = resolve(["--track", "tiny", "--sequence-length", "32"])[1]  # in which a window of 32 tokens is all
    assert mean_flops(*run[:2]) == (flops_per_token(short) + flops_per_token(run[1])) / 2


# ---------------------------------------------------------------- definitions: batches that grow


def course(steps: int, **fields: str) -> Course:
    """Of a run of `steps`, with these flags."""
    flags = [word for name, value in fields.items() for word in ("--" + name.replace("_", "-"), value)]
    return Course(resolve(["--track", "tiny", "--no-tied-head", "--steps", str(steps), *flags])[0])


def test_future_weights_are_those_of_record_53():
    """[1, 0.5, 0.25 -> 0], [1, 0.5 -> 0], [1]."""
    run = course(600, future_tokens="2")
    wanted = {0: (0.5, 0.25), 100: (0.5, 0.125), 200: (0.5, 0), 300: (0.25, 0), 400: (0, 0), 599: (0, 0)}
    assert {step: run.at(step).future for step in wanted} == wanted
    assert course(10).at(5).future == ()


def test_windows_and_heads_along_a_course():
    run = course(10, window_stages="0.2/0.6/1", tied_until="0.5")
    windows = [run.at(step).windows for step in (0, 3, 4, 6, 7, 9, 12)]
    assert windows == 2 * [(0.2,)] + 2 * [(0.2, 0.6)] + 3 * [(0.2, 0.6, 1)]
    assert [run.at(step).tied for step in (0, 4, 5, 9)] == [True, True, False, False]
    assert course(10).at(7).windows == (1,) and course(2, window_stages="0.25/0.5/1").at(1).windows == (0.25, 0.5)
    for parts, message in (("0.5", "ends with all"), ("0/1", "above 0"), ("1/2", "ends with all")):
        with pytest.raises(UsageError, match=message):
            course(10, window_stages=parts)


def test_batches_along_a_course():
    run = course(10, batch_stages="1/2/3", batch_rates="1/1.5/2", schedule="constant")
    assert [run.at(s).batch for s in range(12)] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert [run.at(s).lr for s in (0, 4, 9)] == [1, 1.5, 2]
    for one in (run, course(10), course(2, batch_stages="1/2/3", batch_rates="1/1/1")):  # the last: fewer steps than stages
        for step in range(13):
            assert one.units_before(step) == sum(one.at(s).batch for s in range(step))
    for sizes, message in (
        ("1/2", "2 sizes, --batch-rates 3 rates"),
        ("1/1.5/2", "whole multiples"),
        ("0/1/2", "whole multiples"),
    ):
        with pytest.raises(UsageError, match=message):
            course(10, batch_stages=sizes, batch_rates="1/1/1")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_growing_batches_read_the_same_stream(sotu, ranks):
    """Step by step the sequences that steps of one size would read, none twice, none left out, whatever the ranks."""
    run, data = course(7, batch_stages="1/2/3", batch_rates="1/1/1"), Dataset(sotu, "train")
    plain = Loader(data, 64, 4, seed=3)
    expected = torch.cat([plain.batch(step)[0] for step in range(run.units_before(7))])
    loaders = [Loader(data, 64, 4, seed=3, rank=r, world_size=ranks, before=run.units_before) for r in range(ranks)]
    steps = [torch.cat([loader.batch(step)[0] for loader in loaders]) for step in range(7)]
    assert [len(step) for step in steps] == [4 * run.at(s).batch for s in range(7)]
    assert torch.equal(torch.cat(steps), expected)
    assert loaders[0].epochs(7) == plain.epochs(run.units_before(7))


def test_growing_batches_are_counted(train):
    stages = ("--tricks", "batch_stages", "--batch-tokens", "512", "--schedule", "constant")
    folder = train("--steps", "6", *stages, "--val-every", "2")
    steps, vals, end = events(folder, "train"), events(folder, "val"), result(folder)
    assert [e["tokens"] for e in steps] == [512, 1024, 2048, 3072, 4608, 6144]
    assert [e["tokens"] for e in vals] == [1024, 3072, 6144] and end["tokens"] == 6144
    assert end["tokens_per_second"] == pytest.approx(6144 / end["train_time"])
    assert [e["lr"] for e in steps] == pytest.approx([3e-3 * rate for rate in (1, 1, 1.52, 1.52, 1.73, 1.73)])
    times = [e["step_time"] for e in steps]
    assert end["robust_train_time"] == pytest.approx(sum(times))  # the median of two is their mean


def test_a_step_of_a_later_stage_is_one_large_batch(train):
    """The last stage alone, as a run of large steps, gives the same losses: the mean is over the whole batch."""
    flags = ("--steps", "3", "--optimizer", "sgd:lr=0")
    grown = train(*flags, "--tricks", "batch_stages", "--batch-tokens", "512", out="grown")
    assert losses(grown)[0] != losses(grown)[1]
    whole = train(*flags, "--batch-tokens", "512", "--batch-stages", "3", out="whole")
    parts = train(*flags, "--batch-tokens", "512", "--steps", "9", out="parts")
    assert losses(whole)[0] == pytest.approx(sum(losses(parts)[:3]) / 3, rel=1e-5)
    assert losses(grown)[1] == pytest.approx(sum(losses(parts)[1:3]) / 2, rel=1e-5)


@pytest.mark.slow
def test_a_branch_shares_no_step_that_a_trick_would_do_otherwise(train):
    """Runs of 12 and 18 steps at one rate and momentum: they part where batches, weights of losses or the head do."""
    for trick, first in (
        ("batch_stages", 4),
        ("multi_token", 0),
        ("retied_head", 8),
        ("window_warmup", 4),
        ("short_sequences", 6),
    ):
        flags = ("--schedule", "constant", "--checkpoint-every", "2", "--keep", "9", "--deterministic", "--tricks", trick)
        flags += ("--layers", "1")
        stem, whole = train(*flags, "--steps", "12", out=f"{trick}-stem"), train(*flags, "--steps", "18", out=f"{trick}-whole")
        branch = train(*flags, "--steps", "18", "--branch", str(stem), out=f"{trick}-branch")
        assert [e["step"] for e in events(branch, "branch")] == ([first] if first else [])
        assert losses(branch) == losses(whole)
        assert same(stored(branch, *flags), stored(whole, *flags))


def test_contradicting_tricks_are_said():
    for flags, message in (
        (("--tied-until", "0.5"), "--no-tied-head"),
        (("--tied-until", "0.5", "--no-tied-head", "--embedding-dtype", "bf16"), "--embedding-dtype same"),
        (("--future-tokens", "64"), "0 to 63"),
        (("--key-offset",), "half_rotary"),
        (("--value-gates",), "value_embeddings"),
        (("--window", "65"), "window must be 0 to 64"),
        (("--window-pattern", "LX"), "letters L and S"),
        (("--yarn",), "yarn needs positions"),
        (("--length-stages", "0.3/1"), "must divide"),
        (("--length-stages", "0.001/1"), "must divide"),
        (("--head-dtype", "fp8", "--vocab-size", "250"), "divisible by 16"),
        (("--length-stages", "1/0.5"), "ends with all"),
        (("--length-stages", "0.5/1", "--loss-tokens", "2"), "give one of them"),
        (("--length-stages", "0.5/1", "--future-tokens", "32"), "0 to 31"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve(["--track", "tiny", *flags])
