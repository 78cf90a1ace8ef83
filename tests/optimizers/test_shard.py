"""optimizers/shard.py: state divided over ranks and scattered gradients change no weight, take their part of memory and wire,
and the state moves to other ranks."""

import copy
import dataclasses
import shutil

import pytest
import torch
from conftest import events, launch, losses, result, same, stored, torchrun
from torch import nn

import cost
import optimizers
import train_gpt
from engine.spec import UsageError
from model import GPT, ModelConfig, roles
from optimizers import OPTIMIZERS, shard

SMALL = ModelConfig(vocab_size=96, sequence_length=16, layers=2, heads=2, width=32)
WHOLE = ("adafactor", "amos", "mars", "prodigy", "schedule_free_prodigy", "sophia")  # whose rules need whole weights
MATRIX = ("muon", "shampoo", "caspr", "soap", "kron")


class Together:
    """Several ranks in one process: each with weights of its own and its slices; what they send is copied between them."""

    def __init__(self, monkeypatch, name: str, ranks: int):
        self.ranks, self.sharded = ranks, []
        monkeypatch.setattr(shard.dist, "all_gather_single", lambda *_, **__: Done())
        for rank in range(ranks):
            monkeypatch.setattr(shard, "world", lambda rank=rank: (rank, ranks))
            torch.manual_seed(0)
            gpt = GPT(SMALL)
            self.sharded.append((gpt, shard.Sharded(optimizers.build(name, gpt, 100))))

    def step(self, number: int) -> None:
        for gpt, optimizer in self.sharded:
            gradients(gpt, number)
            optimizer.step()
        self.exchange()

    def exchange(self) -> None:
        for others in zip(*(optimizer.slices.values() for _, optimizer in self.sharded), strict=True):
            for s in others:
                for to in others:
                    s.of(to.p.data).copy_(s.own.data)


class Done:
    def wait(self) -> None: ...


def gradients(gpt: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in gpt.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in (*WHOLE, *MATRIX)])
def test_slices_are_updated_as_the_whole(monkeypatch, name):
    """Every element-wise method, on 1 to 8 ranks: the weights of the undivided optimizer; state in equal parts."""
    torch.manual_seed(0)
    gpt = GPT(SMALL)
    alone = optimizers.build(name, gpt, 100)
    for number in range(4):
        gradients(gpt, number)
        alone.step()
    values = [value for state in alone.state.values() for value in state.values()]
    counters = 4 * sum(isinstance(value, torch.Tensor) and value.dim() == 0 for value in values)  # the steps, of torch's own
    for ranks in (1, 2, 8):
        together = Together(monkeypatch, name, ranks)
        for number in range(4):
            together.step(number)
        for other, optimizer in together.sharded:
            for p, q in zip(gpt.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
            assert optimizers.state_bytes(optimizer) == (optimizers.state_bytes(alone) - counters) / ranks + counters
        alone.eval()
        for _, optimizer in together.sharded:
            optimizer.eval()
        together.exchange()
        for other, _ in together.sharded:
            assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(gpt.parameters(), other.parameters()))
        alone.train()


def test_state_is_cut_anew_for_other_ranks(monkeypatch):
    """Of 2, 3 and 4 ranks, 3 of which divide few weights evenly: united, then continued by another number."""
    torch.manual_seed(0)
    gpt = GPT(SMALL)
    alone = optimizers.build("adamw", gpt)
    for number in range(5):
        gradients(gpt, number)
        alone.step()
    for before, after in ((2, 4), (4, 1), (3, 2), (1, 3)):
        first, second = (Together(monkeypatch, "adamw", ranks) for ranks in (before, after))
        for number in range(3):
            first.step(number)
        states = [optimizer.state_dict() for _, optimizer in first.sharded]
        united = copy.deepcopy(states[0])
        for state in states[1:]:
            for number, own in state["state"].items():
                united["state"][number]["blocks"] |= own["blocks"]
        for other, optimizer in second.sharded:
            other.load_state_dict(first.sharded[0][0].state_dict())
            optimizer.load_state_dict(copy.deepcopy(united))
        for number in (3, 4):
            second.step(number)
        for other, _ in second.sharded:
            for p, q in zip(gpt.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", WHOLE)
def test_methods_that_need_whole_weights_are_refused_by_name(name):
    with pytest.raises(UsageError, match=f"{OPTIMIZERS[name].method.__name__} needs whole weights"):
        shard.Sharded(optimizers.build(name, GPT(SMALL)))


def test_averages_and_other_types_are_refused():
    with pytest.raises(UsageError, match="--average"):
        shard.Sharded(optimizers.build("adamw", GPT(SMALL), average="lawa_ema"))
    with pytest.raises(UsageError, match="fp32 weights alone"):
        shard.Sharded(optimizers.build("adamw", GPT(SMALL).bfloat16()))


def test_two_weights_that_part_have_one_history():
    gpt = GPT(ModelConfig(**(vars(SMALL) | {"tied_head": False})))
    optimizer = shard.Sharded(optimizers.build("adamw", gpt))
    gradients(gpt, 0)
    optimizer.step()
    optimizers.copy_state(optimizer, gpt.head.weight, gpt.embedding.weight)
    one, other = (optimizer.state[optimizer.slice_of[p]]["exp_avg"] for p in (gpt.head.weight, gpt.embedding.weight))
    assert torch.equal(one, other) and one is not other and len(optimizer.state) == len(optimizer.slices)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_run_on_ranks_that_share_the_state(train, tmp_path, ranks):
    """AdamW, and beside Muon, with micro-batches and clipping: weights, losses and norms of one rank without the option after
    20 steps; bytes as the dry run has them, and half of an all-reduce's for gradients that are scattered."""
    optimizer = "adamw:eps=1e-4" if ranks != 4 else "muon:adamw_eps=1e-4,dtype=fp32"  # no update out of rounding alone
    flags = ("--steps", "20", "--optimizer", optimizer, "--batch-tokens", "512", "--val-tokens", "1024")
    flags += ("--micro-batch-tokens", "64", "--clip", "1.5", "--check-ranks", "1")
    one = train(*flags, out="one")
    torchrun(ranks, tmp_path / "run", *flags, "--shard-optimizer")
    weights, _ = stored(one, *flags)
    shared, _ = stored(tmp_path / "run", *flags)
    for name, w in weights.items():
        assert (shared[name] - w).norm() <= 1e-5 * w.norm(), name
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=1e-5)
    norms, expected = ([e["grad_norm"] for e in events(folder, "train")] for folder in (tmp_path / "run", one))
    assert norms == pytest.approx(expected, rel=1e-4) and min(norms) < 1.5 < max(norms)
    _, model_config, _ = train_gpt.resolve(["--track", "tiny", *flags])
    how = dict(dtype=torch.float32, compiled=False, device="cpu")
    whole, step = (cost.record_step(model_config, optimizer, 8 // ranks, 1, ranks, **how, shard=x) for x in (False, True))
    end, alone = result(tmp_path / "run"), result(one)["optimizer_state_bytes"]
    sent = cost.communication(step, ranks)
    assert end["wire_bytes"] == sum(sent.values())
    assert end["optimizer_state_bytes"] == step.memory.optimizer_state < 1.25 * alone / ranks
    assert step.memory.gradients == whole.memory.gradients
    params = list(GPT(model_config).parameters())
    vectors, rest = (4 * sum(p.numel() for p in params if (p.dim() > 1) == large) for large in (False, True))
    by_gradients = sum(value for name, value in sent.items() if name.startswith("gradients"))
    assert vectors > 0 and by_gradients == (2 * vectors + rest) * (ranks - 1) / ranks
    if ranks != 4:  # of AdamW the slices are all that is gathered
        assert end["wire_bytes"] == by_gradients + (vectors + rest + 2 * 16) * (ranks - 1) / ranks


def test_gradients_may_be_scattered_in_bf16(tmp_path):
    """And bf16 weights have theirs reduced as such. The sums of two ranks are those of an all-reduce."""
    flags = ("--steps", "5", "--optimizer", "muon:dtype=fp32", "--reduce", "bf16", "--weights", "bf16", "--clip", "0")
    found = []
    for name, own in (("whole", ()), ("scattered", ("--shard-optimizer",))):
        torchrun(2, tmp_path / name, *flags, *own)
        found.append((stored(tmp_path / name, *flags)[0], losses(tmp_path / name), result(tmp_path / name)["wire_bytes"]))
    (weights, loss, sent), (others, other_loss, fewer) = found
    assert all(torch.allclose(others[name].float(), w.float(), rtol=1e-5, atol=1e-7) for name, w in weights.items())
    assert other_loss == pytest.approx(loss, rel=1e-6)
    gpt = GPT(train_gpt.resolve(["--track", "tiny", *flags])[1])
    scattered = sum(p.numel() for p in gpt.parameters() if p.dim() > 1)
    sliced = sum(p.numel() for name, p in gpt.named_parameters() if roles(gpt)[name] != "matrix")
    assert fewer == sent - 2 * scattered / 2 + 4 * sliced / 2  # half of the gradients in bf16; slices are gathered in fp32


@pytest.mark.parametrize("name", MATRIX)
def test_spans_of_blocks_are_theirs(monkeypatch, name):
    """Each number of a weight goes to the owner of the block in which it lies, as views of the weight itself show it."""
    monkeypatch.setattr("optimizers.matrix.world", lambda: (1, 4))
    gpt = GPT(SMALL)
    for block in (0, 48, 16):  # whole, cut by rows, cut by columns too
        if block and "block" not in {f.name for f in dataclasses.fields(OPTIMIZERS[name])}:
            continue
        method = optimizers.parts(optimizers.build(f"{name}:block={block}" if block else name, gpt))[0]
        spans = method.spans()
        for p in (p for group in method.param_groups for p in group["params"]):
            owner = torch.full(p.shape, -1)
            for bucket in method._cut():
                for b, rank in zip(bucket.blocks, bucket.owners, strict=True):
                    if b.p is p:
                        b.of(owner).fill_(rank)
            assert (p in spans) == (not block or p[0].numel() <= block)
            for rank, first, end in spans.get(p, ()):
                assert (owner.view(-1)[first:end] == rank).all()
                owner.view(-1)[first:end] = -1
            assert p not in spans or (owner == -1).all()
        assert {rank for found in spans.values() for rank, *_ in found} == (set() if block == 16 else set(range(4)))


NAN_OF_RANK_1 = """
import sys
import train_gpt

real, calls = train_gpt.Sharded.counted, []

def counted(self):
    calls.append(self.weights[0].grad)
    if len(calls) == 3 and train_gpt.torch.distributed.get_rank() == 1:
        calls[-1].view(-1)[-1] = float("nan")
    return real(self)

train_gpt.Sharded.counted = counted
sys.exit(train_gpt.main(sys.argv[1:]))
"""


def test_what_one_rank_alone_sees_stops_all_and_is_named(sotu, tmp_path):
    (tmp_path / "nan.py").write_text(NAN_OF_RANK_1)
    launch(2, tmp_path / "run", "--steps", "5", "--shard-optimizer", script=tmp_path / "nan.py").communicate()
    (event,) = events(tmp_path / "run", "nonfinite")
    first = next(name for name, p in GPT(SMALL).named_parameters() if p.dim() > 1)
    assert event["step"] == 3 and event["ranks"] == [] and event["parameters"] == [first]


def test_a_checkpoint_of_slices_continues_on_other_ranks(train, tmp_path):
    """Written by 4 ranks, continued by 1; written by 1, continued by 2."""
    flags = ("--steps", "8", "--tricks", "modern", "--optimizer", "adamw:eps=1e-4", "--checkpoint-every", "4")
    flags += ("--batch-tokens", "512", "--val-tokens", "1024", "--shard-optimizer")
    one, four = train(*flags, out="one"), tmp_path / "four"
    torchrun(4, four, *flags)
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    for source, ranks in ((four, 0), (one, 2)):
        folder = shutil.copytree(source, tmp_path / f"{source.name}-on-{ranks}")
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "step-00000008")
        torchrun(ranks, folder, *flags)
        assert [e["step"] for e in events(folder, "resume")] == [4]
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
    assert same(stored(one, *flags)[1]["param_groups"], stored(four, *flags)[1]["param_groups"])
