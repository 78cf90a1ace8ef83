"""Orthogonalisation and Muon against plain loops; how optimizers route, save and resume, and how one brings one's own."""

import copy
import dataclasses
import io
import sys

import pytest
import torch
from torch import nn

import optimizers
from engine.spec import UsageError, trust, typed_keys
from model import GPT, ModelConfig, roles, splits
from optimizers import OPTIMIZERS, build, state_bytes
from optimizers.base import ROLES, Chain, Elementwise
from optimizers.elementwise import Lion
from optimizers.matrix import COEFFICIENTS, Muon, balance, orthogonalize, tiles

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(vocab_size: int = 61, **fields) -> GPT:
    torch.manual_seed(0)
    fields = dict(sequence_length=16, layers=2, heads=2, width=32) | fields
    return GPT(ModelConfig(vocab_size=vocab_size, **fields))


def give_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def owner(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict:
    (group,) = [g for g in optimizer.param_groups if any(p is q for q in g["params"])]
    return group


# ---------------------------------------------------------------- orthogonalisation


def with_singular_values(values: torch.Tensor, m: int, n: int) -> torch.Tensor:
    """An [m, n] matrix with these singular values."""
    k = len(values)
    U, V = (torch.linalg.qr(torch.randn(size, k))[0] for size in (m, n))
    return U * values @ V.T


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("coefficients", "steps", "low", "high"),
    [
        ("quintic", 5, 0.65, 1.25),
        ("polar_express", 5, 0.80, 1.20),
        ("polar_express", 12, 0.97, 1.03),
        ("cubic", 12, 0.97, 1.03),
    ],
)
def test_singular_values_end_in_the_band(coefficients, steps, low, high, dtype):
    torch.manual_seed(0)
    shapes = [(32, 128), (128, 32), (64, 96), (1, 7), (3, 16, 64), (2, 3, 40, 10)]
    batches = [torch.randn(shape) for shape in shapes]
    batches += [with_singular_values(torch.linspace(0.1, 1, 48), 48, 48) * size for size in (1e-3, 1.0, 1e4)]
    batches += [torch.outer(torch.randn(20), torch.randn(30))]  # rank one: the norm is the largest singular value
    for G in batches:
        X = orthogonalize(G, steps, coefficients, dtype)
        assert X.shape == G.shape
        assert X.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        values = torch.linalg.svdvals(X.float())
        values = values[:1] if G is batches[-1] else values
        assert low < values.min() and values.max() < high, (G.shape, values.min(), values.max())


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (5, 16, 24)])
def test_cubic_converges_to_the_polar_factor(shape):
    torch.manual_seed(1)
    m, n = shape[-2:]
    G = torch.stack([with_singular_values(torch.linspace(0.2, 1, min(m, n)), m, n) for _ in range(5)])
    G = G[0] if len(shape) == 2 else G
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(orthogonalize(G, 12, "cubic", "fp32"), U @ Vh, atol=1e-4, rtol=0)


def test_orthogonalize_keeps_its_input_and_takes_zeros():
    G = torch.zeros(3, 8, 5)
    G[0] = torch.randn(8, 5)
    before = G.clone()
    X = orthogonalize(G, dtype="fp32")
    assert torch.equal(G, before)
    assert torch.isfinite(X).all() and X[1:].abs().max() == 0


def test_polar_express_repeats_its_last_step():
    G = torch.randn(16, 32)
    X = orthogonalize(G, 5, "polar_express", "fp32")
    a, b, c = COEFFICIENTS["polar_express"][-1]
    A = X @ X.T
    torch.testing.assert_close(orthogonalize(G, 6, "polar_express", "fp32"), a * X + (b * A + c * A @ A) @ X)


# ---------------------------------------------------------------- Muon against its rule


def plain_muon(weights, gradients_by_step, lr, mu, nesterov, decay, iterations, scale, split):
    """Muon one matrix at a time, in double precision; `iterations` = the (a, b, c) of each step."""
    weights = [w.detach().double().clone() for w in weights]
    averages = [torch.zeros_like(w) for w in weights]
    for gradients in gradients_by_step:
        for w, m, g, n in zip(weights, averages, gradients, split, strict=True):
            g = g.double()
            m.copy_(mu * m + (1 - mu) * g)
            update = (1 - mu) * g + mu * m if nesterov else m
            for target, u in zip(w.chunk(n), update.chunk(n), strict=True):
                u = u.flatten(1)
                rows, columns = u.shape
                X = u / (u.norm() + 1e-7)
                for a, b, c in iterations:
                    A = X @ X.T
                    X = a * X + (b * A + c * A @ A) @ X
                factor = {
                    "keller": max(1, rows / columns) ** 0.5,
                    "moonlight": 0.2 * max(rows, columns) ** 0.5,
                    "mup": (rows / columns) ** 0.5,
                    "none": 1,
                }[scale]
                target.mul_(1 - lr * decay).sub_((lr * factor * X).view(target.shape))
    return weights


@pytest.mark.parametrize("scale", ["keller", "moonlight", "mup", "none"])
@pytest.mark.parametrize(("nesterov", "coefficients"), [(True, "quintic"), (False, "polar_express")])
def test_muon_agrees_with_the_plain_loop(scale, nesterov, coefficients):
    torch.manual_seed(2)
    shapes = [(16, 16), (16, 48), (48, 16), (48, 16), (48, 16), (24, 40), (8, 4, 3, 3)]
    split = [1, 1, 1, 3, 3, 2, 1]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    groups = [dict(params=[w for w, own in zip(weights, split, strict=True) if own == n], split=n) for n in sorted(set(split))]
    how = dict(nesterov=nesterov, coefficients=coefficients, scale=scale, dtype="fp32")
    muon = Muon(groups, lr=0.05, momentum=0.9, weight_decay=0.1, **how)
    table = COEFFICIENTS[coefficients]
    expected = plain_muon(
        weights, gradients, 0.05, 0.9, nesterov, 0.1, [table[min(i, len(table) - 1)] for i in range(5)], scale, split
    )
    for step in gradients:
        for w, g in zip(weights, step, strict=True):
            w.grad = g.clone()
        muon.step()
        assert all(torch.equal(w.grad, g) for w, g in zip(weights, step, strict=True))  # gradients stay the caller's
    for w, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.double(), right, atol=2e-5, rtol=2e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
@pytest.mark.parametrize(("scale", "adjust"), [("keller", "original"), ("moonlight", "match_rms_adamw")])
def test_muon_agrees_with_torch(scale, adjust):
    """torch iterates in bf16 always, so to bf16's accuracy; ours cast after normalising, torch before."""
    torch.manual_seed(3)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(32, 32), (32, 96), (96, 32)]]
    start = [w.detach().clone() for w in ours]
    theirs = [nn.Parameter(w.detach().clone()) for w in ours]
    a = Muon(ours, lr=0.1, momentum=0.9, weight_decay=0.1, scale=scale, dtype="bf16")
    b = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn=adjust)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    for w, right, before in zip(ours, theirs, start, strict=True):
        assert (w - right).norm() < 0.03 * (right - before).norm()


def test_muon_skips_parameters_without_gradient_and_bears_zero_gradients():
    idle, zero, busy = (nn.Parameter(torch.ones(4, 6)) for _ in range(3))
    muon = Muon([idle, zero, busy], lr=0.1, weight_decay=0.0)
    zero.grad, busy.grad = torch.zeros(4, 6), torch.randn(4, 6)
    muon.step()
    assert torch.equal(idle, torch.ones(4, 6))
    assert torch.equal(zero, torch.ones(4, 6))
    assert torch.isfinite(busy).all() and not torch.equal(busy, torch.ones(4, 6))


def test_momentum_of_a_group_is_read_at_every_step():
    a, b = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    changed, fixed = Muon([a], momentum=0.5, dtype="fp32"), Muon([b], momentum=0.9, dtype="fp32")
    changed.param_groups[0]["momentum"] = 0.9
    for step in range(3):
        give_gradients([a], step)
        give_gradients([b], step)
        changed.step()
        fixed.step()
    assert torch.equal(a, b)


def test_work_is_cut_and_shared_evenly():
    assert tiles(50257, 1024)[0] == (0, 1005) and tiles(50257, 1024)[-1][1] == 50257
    assert tiles(768, 0) == tiles(768, 1024) == [(0, 768)]
    owners = balance([5, 4, 3, 3, 3], 2)
    assert sorted(sum(c for c, o in zip([5, 4, 3, 3, 3], owners, strict=True) if o == r) for r in (0, 1)) == [8, 10]
    assert set(balance([1.0] * 48, 8)) == set(range(8))


# ---------------------------------------------------------------- routing


def test_every_parameter_lies_in_one_group_that_states_its_roles():
    gpt = tiny(tied_head=False)
    role = roles(gpt)
    for name in OPTIMIZERS:
        optimizer = build(name, gpt)
        for parameter, p in gpt.named_parameters():
            group = owner(optimizer, p)
            assert role[parameter] in group["roles"].split("+"), (name, parameter)
            assert {"lr", "initial_lr", "weight_decay", "roles"} <= set(group)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(gpt.parameters()))
        assert all(g["lr"] == g["initial_lr"] for g in optimizer.param_groups)
        optimizer.eval()
        optimizer.train()


def test_vectors_and_scalars_never_decay():
    gpt = tiny(tied_head=False)
    role = roles(gpt)
    for name, cls in OPTIMIZERS.items():
        if keys := [key for key in ("weight_decay", "adamw_weight_decay") if hasattr(cls, key)]:
            optimizer = build(name + ":" + ",".join(f"{key}=0.3" for key in keys), gpt)
            for parameter, p in gpt.named_parameters():
                decays = role[parameter] in ("matrix", "embedding", "head")
                assert owner(optimizer, p)["weight_decay"] == (0.3 if decays else 0.0), (name, parameter)


@pytest.mark.parametrize("fields", [{}, {"tied_head": False}])
def test_muon_takes_hidden_matrices_and_nothing_else(fields):
    gpt = tiny(vocab_size=32, **fields)  # as small and square as a hidden matrix
    muon, adamw = build("muon", gpt).parts
    taken = {p for g in muon.param_groups for p in g["params"]}
    assert taken == {p for name, p in gpt.named_parameters() if roles(gpt)[name] == "matrix"}
    assert gpt.embedding.weight not in taken
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    for name, p in gpt.named_parameters():
        if p in taken:
            assert owner(muon, p)["split"] == splits(gpt).get(name, 1)


def test_muon_sets_each_role_by_its_own_key():
    gpt = tiny(tied_head=False)
    optimizer = build("muon:lr=0.1,adamw_lr=0.2,embedding_lr=0.3,head_lr=0", gpt)
    lr = {role: g["lr"] for g in optimizer.param_groups for role in g["roles"].split("+")}
    assert lr == {"matrix": 0.1, "embedding": 0.3, "head": 0.2, "vector": 0.2}
    for cautious in ("false", "true"):  # torch's AdamW, or ours: the second step by hand, its gradients 1 and 3
        keys = "adamw_beta2=0.9,embedding_beta2=0.99,head_beta1=0.5,head_beta2=0.98,adamw_lr=1,embedding_lr=1,head_lr=1"
        optimizer = build(f"muon:{keys},adamw_cautious={cautious}", gpt)
        for gradient in (1.0, 3.0):
            before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
            for p in gpt.parameters():
                p.grad = torch.full_like(p, gradient)
            optimizer.step()
        for name, b1, b2 in (("embedding.weight", 0.9, 0.99), ("head.weight", 0.5, 0.98), ("norm.weight", 0.9, 0.9)):
            m, v = (b1 * (1 - b1) + (1 - b1) * 3) / (1 - b1**2), (b2 * (1 - b2) + (1 - b2) * 9) / (1 - b2**2)
            moved = before[name] - dict(gpt.named_parameters())[name].detach()
            torch.testing.assert_close(moved, torch.full_like(moved, m / v**0.5), rtol=1e-4, atol=1e-5)


def test_wrapped_models_route_like_bare_ones():
    class Wrapper(nn.Module):  # what DistributedDataParallel does to names
        def __init__(self, module):
            super().__init__()
            self.module = module

    gpt = tiny(vocab_size=32)
    groups = [g["roles"] for g in build("muon", Wrapper(gpt)).param_groups]
    assert groups == [g["roles"] for g in build("muon", gpt).param_groups]


def test_frozen_parameters_are_left_out():
    gpt = tiny()
    gpt.embedding.weight.requires_grad_(False)
    for name in OPTIMIZERS:
        held = {p for g in build(name, gpt).param_groups for p in g["params"]}
        assert held == {p for p in gpt.parameters() if p.requires_grad}


NAMES = """sgd signum adagrad rmsprop adadelta adam adamw cautious_adamw nadamw nadamp generalized_adam amos lion ademamix adopt
mars schedule_free_adamw schedule_free_sgd prodigy schedule_free_prodigy muon muown shampoo caspr soap kron"""


def test_registered_methods_are_documented():
    assert list(OPTIMIZERS) == NAMES.split()
    for name, cls in OPTIMIZERS.items():
        assert dataclasses.is_dataclass(cls) and "Source: " in cls.__doc__, name
        assert set(cls.roles) <= set(ROLES) and cls.state_per_parameter > 0
        assert list(typed_keys(cls)) == [f.name for f in dataclasses.fields(cls)]
        for f in dataclasses.fields(cls):
            assert f.metadata["help"], (name, f.name)
            if f.metadata["search"]:
                low, high, kind = f.metadata["search"]
                assert low < high and kind in ("log", "linear", "complement", "choice")
                assert f.default in (None, 0.0) or low <= f.default <= high, (name, f.name)


# ---------------------------------------------------------------- state


def train(gpt, optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        tokens = torch.randint(gpt.config.vocab_size, (4, 17), generator=torch.Generator().manual_seed(step % 3))
        loss = gpt(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SPECS = {name: name for name in OPTIMIZERS}
SPECS |= {"muon": "muon:dtype=fp32", "shampoo": "shampoo:start=2,every=2", "soap": "soap:every=2"}  # renewals within 13 steps
SPECS |= {name: f"{name}:d0=1e-4" for name in ("prodigy", "schedule_free_prodigy")}  # from 1e-6 the rate takes longer to grow


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_method_learns_and_continues_identically_from_its_state(name):
    """The loss falls, the state is as large as the registry states, and what was saved goes on as if it had not stopped."""
    spec, gpt = SPECS[name], tiny()
    optimizer = build(spec, gpt, steps=16)
    assert state_bytes(optimizer) == 0 or name == "adagrad"  # torch makes that one's state at once
    losses = train(gpt, optimizer, 13)
    assert losses[-1] < losses[0] - 0.1
    check_state_bytes(OPTIMIZERS[name], gpt, optimizer)
    file = io.BytesIO()
    torch.save([gpt.state_dict(), optimizer.state_dict()], file)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    expected = train(gpt, optimizer, 3, first=13)

    file.seek(0)
    weights, state = torch.load(file)  # weights_only: nothing but tensors and plain values may be inside
    other = tiny()
    resumed = build(spec, other, steps=16)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for group in resumed.param_groups:
        group["lr"] *= 0.5  # must reach the parts of a Chain
    assert train(other, resumed, 3, first=13) == expected
    for p, q in zip(gpt.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def check_state_bytes(cls: type, gpt: GPT, optimizer: torch.optim.Optimizer) -> None:
    if cls.roles == ("matrix",):  # stated for square matrices
        p = nn.Parameter(torch.randn(128, 128))
        p.grad = torch.randn(128, 128)
        method = cls([p])
        method.step()
        assert state_bytes(method) == pytest.approx(cls.state_per_parameter * 128**2, rel=0.04)
        return
    role = roles(gpt)
    expected = sum((cls.state_per_parameter if role[n] in cls.roles else 8.0) * p.numel() for n, p in gpt.named_parameters())
    counters = 8 * len(list(gpt.parameters()))  # step counts and the like: a number or two for each tensor
    assert expected <= state_bytes(optimizer) <= expected + counters


def test_chain_is_one_ordinary_optimizer():
    a, b, c = (nn.Parameter(torch.ones(3, 3)) for _ in range(3))
    groups = [dict(params=[b]), dict(params=[c], lr=0.25)]
    chain = Chain(torch.optim.SGD([a], lr=1.0), torch.optim.AdamW(groups, lr=0.5, weight_decay=0.0))
    assert [g["lr"] for g in chain.param_groups] == [1.0, 0.5, 0.25]
    assert chain.parts[1].param_groups == chain.param_groups[1:]
    chain.param_groups[0]["lr"] = 0.125
    for p in (a, b, c):
        p.grad = torch.ones(3, 3)
    loss = chain.step(lambda: torch.tensor(7.0))
    assert loss == 7
    assert a[0, 0] == 0.875 and torch.allclose(b, torch.tensor(0.5)) and torch.allclose(c, torch.tensor(0.75))
    assert chain.state[b] is chain.parts[1].state[b]
    chain.zero_grad()
    assert a.grad is None and b.grad is None and c.grad is None
    scheduler = torch.optim.lr_scheduler.LambdaLR(chain, lambda step: 0.5)
    assert scheduler.get_last_lr() == [0.0625, 0.25, 0.125]


# ---------------------------------------------------------------- one's own

OWN_CLASS = """
import torch
class Mine(torch.optim.Optimizer):
    {roles}
    def __init__(self, params, lr=0.1, weight_decay=0.5):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad.sign(), alpha=group["lr"])
"""


@pytest.fixture
def own(tmp_path):
    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        trust([f"{tmp_path / name}:Mine"])
        return str(tmp_path / name)

    return write


OWN_RULE = """
from optimizers.base import BETA1, BETA2, DECAY, LR, Elementwise, lerp, lerp_

class Mine(Elementwise):
    \"\"\"u = sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g;  w <- (1 - lr wd) w - lr u.   Source: arXiv 2302.06675.\"\"\"
    lr, beta1, beta2, weight_decay = LR(6e-4), BETA1(0.9), BETA2(0.95), DECAY(0.5)
    buffers = ("average",)

    @staticmethod
    def rule(w, g, m, *, lr, new1, new2, keep):
        w.mul_(keep).sub_(lerp(m, g, new1).sign() * lr)
        lerp_(m, g, new2)
"""


def test_own_method_written_like_those_here(own):
    gpt, twin = tiny(), tiny()
    train(gpt, build(own(OWN_RULE) + ":Mine:lr=0.002,weight_decay=0.2", gpt), 5)
    train(twin, build("lion:lr=0.002,weight_decay=0.2", twin), 5)
    assert all(torch.equal(p, q) for p, q in zip(gpt.parameters(), twin.parameters(), strict=True))
    assert "mine" not in OPTIMIZERS
    with pytest.raises(UsageError, match="did you mean 'weight_decay'"):
        build(own(OWN_RULE) + ":Mine:decay=0.5", gpt)


def test_a_class_in_the_package_registers_itself(monkeypatch):
    monkeypatch.setattr(optimizers.base, "OPTIMIZERS", {})
    for name, base, body in (("FreshLion", Lion, {}), ("FreshSGD", Lion, {"name": "fresh_sgd"}), ("ABase", Elementwise, {})):
        type(name, (base,), body | {"__module__": "optimizers.elementwise"})
    assert list(optimizers.base.OPTIMIZERS) == ["fresh_lion", "fresh_sgd"]


def test_own_class_from_a_file(own):
    gpt = tiny()
    optimizer = build(own(OWN_CLASS.format(roles="")) + ":Mine:lr=0.01", gpt)
    assert type(optimizer).__name__ == "Mine"
    assert [(g["lr"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.01, 0.01, 0.5),
        (0.01, 0.01, 0.0),
    ]
    losses = train(gpt, optimizer, 10)
    assert losses[-1] < losses[0]
    optimizer.eval()
    optimizer.train()


def test_own_class_that_owns_only_matrices(own):
    gpt = tiny()
    optimizer = build(own(OWN_CLASS.format(roles='roles = ("matrix",)')) + ":Mine", gpt)
    mine, adamw = optimizer.parts
    assert type(mine).__name__ == "Mine" and isinstance(adamw, torch.optim.AdamW)
    for name, p in gpt.named_parameters():
        assert owner(mine if roles(gpt)[name] == "matrix" else adamw, p)
    assert sorted(g["split"] for g in mine.param_groups) == [1, 3]


@pytest.mark.parametrize("name", ["torch.optim:RMSprop", "torch.optim.RMSprop", "torch.optim.rmsprop"])
def test_a_class_of_an_installed_package(name):
    optimizer = build(name + ":lr=0.001,momentum=0.5", tiny())
    assert isinstance(optimizer, torch.optim.RMSprop) and optimizer.param_groups[0]["momentum"] == 0.5


def test_what_a_spec_can_be_asked(own):
    """Before anything is built. `period` imports nothing: it is asked of SPECs that others wrote, too."""
    mine = own(OWN_CLASS.format(roles="")) + ":Mine"
    asked = {spec: optimizers.find(spec) for spec in ("adamw", "muon:scale=moonlight", "schedule_free_sgd:lr=0.5", mine)}
    assert [choice.has_momentum for choice in asked.values()] == [False, True, False, True]
    assert [choice.own_schedule for choice in asked.values()] == [False, False, True, False]
    assert [choice.transfer for choice in asked.values()] == [-1.0, -0.5, 0.0, -1.0]
    assert [choice.setting("lr") for choice in asked.values()] == [3e-3, 0.02, 0.5, 0.1]
    assert asked["adamw"].setting("momentum", 7) == asked[mine].setting("momentum", 7) == 7
    assert asked["schedule_free_sgd:lr=0.5"].of_length(1000)["warmup"] == 50 and asked[mine].of_length(1000) == {}
    assert [optimizers.period(s) for s in ("soap:every=4", "adamw", "muon:adamw_every=2", "no.py:Mine")] == [4, 1, 2, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("muonn", "did you mean 'muon'"),
        ("muon:weight_decy=1", "did you mean 'weight_decay'"),
        ("muon:lr=fast", "float"),
        ("muon:steps=0", "steps"),
        ("muon:steps=1000000000", "steps must be 1 to 100"),
        ("prodigy:d0=0", "d0 must be at least 1e-30, got 0"),
        ("schedule_free_prodigy:d0=0", "d0 must be at least 1e-30, got 0"),
        ("soap:block=1", "makes about 24,576 blocks, and each has tensors of its own: take block=2 or more"),
        ("muon:lr=nan", "lr"),
        ("muon:scale=kelle", "did you mean 'keller'"),
        ("muon:coefficients=quintik", "did you mean 'quintic'"),
        ("muon:dtype=bf61", "did you mean 'bf16'"),
        ("adamw:lr=-1", "lr must be at least 0, got -1"),
        ("sgd:momentum=-1", "momentum"),
        ("adamw:lr=1e-3,lr=0.5", "gives lr twice"),
        ("adamw:weight_decay=nan", "weight_decay must be at least 0, got nan"),
        ("adamw:lr=1e400", "lr must be at least 0, got inf"),
        ("muon:embedding_lr=-0.5", "embedding_lr must be at least 0"),
        ("muon:normuon=true,normuon_beta2=1.5", "normuon_beta2 must be at least 0 and below 1"),
        ("soap:shampoo_beta=1", "shampoo_beta must be at least 0 and below 1"),
        ("torch.optim:AdamW:betas=0.9/1.5", "betas must be at least 0 and below 1, got 1.5"),
        ("torch.optim:AdamW:weight_decay=inf", "weight_decay must be at least 0, got inf"),
        ("torch.optim:Rprop:etas=nan/1.2", "etas must be a finite number, got nan"),
        ("nowhere.py:Mine", "no file"),
        ("no_such_package_at_all:Mine", "does not import"),
        ("torch.optim:AdamV", "did you mean"),
        ("torch.nn:Linear", "no torch.optim.Optimizer"),
    ],
)
def test_bad_words_get_one_line(spec, message):
    trust([spec])
    with pytest.raises(UsageError, match=message) as error:
        build(spec, tiny())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "does not import .ModuleNotFoundError"),
        ("class Other: pass", "no class 'Mine'"),
        (OWN_CLASS.format(roles='roles = ("matrices",)'), "unknown role 'matrices'"),
        (OWN_CLASS.format(roles="").replace("(params, dict", "(params[:1], dict"), "in 0 param groups"),
    ],
)
def test_bad_files_get_one_line(own, text, message):
    with pytest.raises(UsageError, match=message):
        build(own(text) + ":Mine", tiny())


def test_building_steps_no_weights_and_reads_no_random_numbers():
    gpt = tiny()
    before, state = copy.deepcopy(gpt.state_dict()), torch.get_rng_state()
    for name in OPTIMIZERS:
        optimizers.build(name, gpt)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in gpt.state_dict().items())


# ---------------------------------------------------------------- public collections


@pytest.mark.parametrize("name", ["pytorch_optimizer.lion", "pytorch_optimizer.Lion", "heavyball.soap"])
def test_a_class_of_a_public_collection(name):
    pytest.importorskip(name.split(".")[0])
    trust([name])
    gpt = tiny()
    optimizer = build(name + ":lr=0.002", gpt)
    assert type(optimizer).__name__.lower() == name.split(".")[1].lower()
    assert optimizer.param_groups[0]["lr"] == 0.002


def test_tuples_are_written_with_a_slash():
    pytest.importorskip("pytorch_optimizer")
    trust(["pytorch_optimizer.lion", "torch.optim:AdamW"])
    assert build("pytorch_optimizer.lion:betas=0.8/0.9", tiny()).param_groups[0]["betas"] == (0.8, 0.9)
    assert build("torch.optim:AdamW:betas=0.8/0.9", tiny()).param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(UsageError, match="float"):
        build("torch.optim:AdamW:betas=0.8/x", tiny())


def test_keys_of_a_class_of_others_have_the_types_that_it_states(tmp_path):
    file = tmp_path / "own_types.py"
    file.write_text(
        "from __future__ import annotations\nimport torch\n\n\nclass Mine(torch.optim.SGD):\n"
        "    def __init__(self, params, lr: float, flag: bool | None = None, mix: float | bool = 0.5, count: int = 3,\n"
        "                 weight_decay=0, shape: torch.Size | None = None, word: str | float = '', odd: Nowhere = None):\n"
        "        self.given = dict(flag=flag, mix=mix, count=count, word=word)\n"
        "        super().__init__(params, lr=lr, weight_decay=weight_decay)\n"
    )
    plain = type("Plain", (), {"__init__": lambda self, final=0.1, *, warmup=0: None})  # of a schedule: it takes no weights
    assert typed_keys(plain) == {"final": float, "warmup": int | float}
    trust([f"{file}:Mine"])
    made = build(f"{file}:Mine:lr=0.1,flag=false,mix=true,weight_decay=0.1,word=0.5", tiny())
    assert made.given == dict(flag=False, mix=True, count=3, word=0.5) and made.param_groups[0]["weight_decay"] == 0.1
    assert build(f"{file}:Mine:lr=0.1,flag=none,mix=1,word=a", tiny()).given == dict(flag=None, mix=1.0, count=3, word="a")
    for keys, message in (
        ("count=0.5", "of type int, not"),
        ("shape=3", "takes a value that no"),
        ("params=1", "no key 'params'"),
    ):
        with pytest.raises(UsageError, match=message):
            build(f"{file}:Mine:lr=0.1,{keys}", tiny())


def test_momentum_that_a_schedule_begins_at_zero():
    """Nesterov's form is decided in each step, as momentum is."""
    a, b = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    ours, theirs = OPTIMIZERS["sgd"]([a], lr=0.1, momentum=0.0), torch.optim.SGD([b], lr=0.1, momentum=0.9, nesterov=True)
    for momentum in (0.0, 0.9, 0.9):
        ours.param_groups[0]["momentum"] = momentum
        a.grad = a.detach().clone()
        ours.step()
        if momentum:
            b.grad = b.detach().clone()
            theirs.step()
        else:
            b.data.mul_(0.9)
    assert torch.allclose(a, b)


ODD = """
import torch


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


class Wants(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params.parameters(), lr)


class Decays(torch.optim.AdamW):
    def __init__(self, params, lr=0.1, weight_decay=None):
        super().__init__(params, lr, weight_decay=0.5)


class Fails(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("two dimensions only")
"""


def test_what_a_class_of_others_raises_is_one_line(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text(ODD)
    trust([f"{file}:{name}" for name in ("NoRate", "Wants", "Decays", "Fails")])
    for name, words in (("NoRate", "without lr"), ("Wants", r"AttributeError: .* \(odd.py:12\)")):
        with pytest.raises(UsageError, match=words):
            build(f"{file}:{name}", tiny())
    assert build(f"{file}:Decays", tiny()).param_groups[0]["weight_decay"] == 0.0
    failing = build(f"{file}:Fails", tiny())
    with pytest.raises(UsageError, match=r"RuntimeError: two dimensions only \(odd.py:\d+\); .*roles = \(.matrix.,\)"):
        optimizers.step(failing, f"{file}:Fails")
    with pytest.raises(AttributeError):  # a fault of ours keeps its traceback
        optimizers.step(None, "adamw")


TYPES = """
import torch
class Types(torch.optim.SGD):
    def step(self):
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p] = {"sum": torch.zeros(1, dtype=torch.float64)}
            self.state[p]["sum"] += p.grad.double().sum()
        super().step()
"""


def test_state_of_others_keeps_its_types_and_other_state_is_one_line(tmp_path):
    (file := tmp_path / "types.py").write_text(TYPES)
    trust([spec := f"{file}:Types:lr=0.1"])
    gpt = tiny()
    for p in gpt.parameters():
        p.grad = torch.full_like(p, 1e-9)
    one, two = (optimizers.build(spec, gpt) for _ in range(2))
    optimizers.step(one, spec)
    optimizers.restore(two, one.state_dict(), spec)
    p = next(gpt.parameters())
    assert two.state[p]["sum"].dtype == torch.float64 and torch.equal(two.state[p]["sum"], one.state[p]["sum"])
    adamw = optimizers.build("adamw", gpt)
    optimizers.step(adamw, "adamw")
    state = adamw.state_dict()
    for wrong in ({}, {"state": {}, "param_groups": []}, {"state": [], "param_groups": state["param_groups"]}):
        with pytest.raises(UsageError, match=r"state is not that of optimizer 'adamw'.*--resume never"):
            optimizers.restore(optimizers.build("adamw", gpt), wrong, "adamw")
    for inner in state["state"].values():
        inner |= {key: value[:1] for key, value in inner.items() if isinstance(value, torch.Tensor) and value.dim()}
    with pytest.raises(UsageError, match="another shape"):
        optimizers.restore(optimizers.build("adamw", gpt), state, "adamw")
    for inner in state["state"].values():
        inner |= {key: torch.zeros(()) if key == "step" else None for key in inner}
    optimizers.restore(resumed := optimizers.build("adamw", gpt), state, "adamw")
    with pytest.raises(UsageError, match="the checkpoint's state is not that of optimizer 'adamw'"):
        optimizers.step(resumed, "adamw")


def test_a_class_that_its_package_exports_lazily(tmp_path):
    lazy = tmp_path / "lazy.py"
    lazy.write_text("def __getattr__(name):\n    import torch\n    return getattr(torch.optim, name)\n")
    trust([f"{lazy}:SGD"])
    assert type(build(f"{lazy}:SGD:lr=0.1", tiny())).__name__ == "SGD"


def test_a_collection_that_is_missing_or_lacks_the_name(monkeypatch):
    pytest.importorskip("pytorch_optimizer")
    trust(["pytorch_optimizer.lionn", "heavyball.soap"])
    with pytest.raises(UsageError, match="did you mean 'Lion'"):
        build("pytorch_optimizer.lionn", tiny())
    monkeypatch.setitem(sys.modules, "heavyball", None)
    with pytest.raises(UsageError, match="pip install heavyball"):
        build("heavyball.soap", tiny())
