"""optimizers/shard.py: state divided over ranks changes no weight, takes its part of the memory, and moves to other ranks."""

import copy
import shutil

import pytest
import torch
from conftest import events, losses, result, same, stored, torchrun
from torch import nn

import cost
import optimizers
import train_gpt
from model import GPT, ModelConfig
from optimizers import OPTIMIZERS, shard
from spec import UsageError

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
    """AdamW, and beside Muon: weights and losses of one rank after 20 steps; bytes as the dry run has them."""
    optimizer = "adamw:eps=1e-4" if ranks != 4 else "muon:adamw_eps=1e-4,dtype=fp32"  # no update out of rounding alone
    flags = ("--steps", "20", "--tricks", "modern", "--optimizer", optimizer, "--batch-tokens", "512", "--val-tokens", "1024")
    one = train(*flags, "--shard-optimizer", out="one")
    torchrun(ranks, tmp_path / "run", *flags, "--shard-optimizer")
    weights, _ = stored(one, *flags)
    shared, _ = stored(tmp_path / "run", *flags)
    for name, w in weights.items():
        assert (shared[name] - w).norm() <= 1e-5 * w.norm(), name
    _, model_config, _ = train_gpt.resolve(["--track", "tiny", *flags])
    how = dict(dtype=torch.float32, compiled=False, device="cpu", shard=True)
    step = cost.record_step(model_config, optimizer, 8 // ranks, 8 // ranks, ranks, **how)
    end, alone = result(tmp_path / "run"), result(one)["optimizer_state_bytes"]
    assert end["wire_bytes"] == sum(cost.communication(step, ranks).values())
    assert end["optimizer_state_bytes"] == step.memory.optimizer_state < 1.25 * alone / ranks


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
