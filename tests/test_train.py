"""The trainer's invariances: what must not change the numbers does not, and what goes wrong is said in one line.

The golden curve of `tiny` is written anew, after a change that is meant to change it, by: python tests/test_train.py
"""

import copy
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import forks
import pytest
import torch
from shared import DATA_ROOT, ROOT, events, losses, result, same, stored, tiny, torchrun, with_needs, with_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import optimizers
import train_gpt
import tricks
from config import resolve
from cost.step import communication, record_step
from data.shards import Dataset, validation_starts, write, write_manifest
from engine import run_folder, spec
from engine.schedules import Course
from engine.spec import UsageError
from optimizers import OPTIMIZERS
from optimizers.base import Elementwise
from tricks import TRACKS, TRICKS

GOLDEN = ROOT / "tests" / "golden_tiny.json"  # losses of a run on a CPU, with these flags
GOLDEN_FLAGS = ("--steps", "20", "--tricks", "record", "--batch-tokens", "1024", "--val-tokens", "8192")
GOLDEN_TOLERANCE = 1e-3  # relative, of every loss: machines round differently, and twenty steps add it up

OWN_OPTIMIZER = """
import torch

class SignDescent(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()
"""


def close(a: list[float], b: list[float], relative: float) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=relative) for x, y in zip(a, b))


# ---------------------------------------------------------------- what must not change the numbers


def test_golden_curve(train):
    """fp32 losses of a stored run. Machines round differently, hence not to the last digit."""
    folder = train(*GOLDEN_FLAGS)
    golden = json.loads(GOLDEN.read_text())
    assert close(losses(folder), golden["train"], GOLDEN_TOLERANCE)
    assert close(losses(folder, "val"), golden["val"], GOLDEN_TOLERANCE)


def test_first_loss_is_ln_vocabulary(train):
    assert losses(train("--steps", "1", out="gpt2"))[0] == pytest.approx(math.log(256), abs=0.1)
    assert losses(train("--steps", "1", "--tricks", "record", out="modern"))[0] == pytest.approx(math.log(256), abs=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_accumulation_equals_one_big_batch(train, optimizer):
    flags = ("--steps", "6", "--optimizer", optimizer, "--tricks", "ngram_embedding")
    big = train(*flags, out="big")
    small = train(*flags, "--micro-batch-tokens", "128", out="small")
    assert close(losses(big), losses(small), 1e-5)
    assert close(losses(big, "val"), losses(small, "val"), 1e-5)


@pytest.mark.parametrize("tricks", ["modern,muon", "ngram_embedding"])
@pytest.mark.slow
def test_ranks_do_not_change_the_run(train, tmp_path, tricks):
    flags = ("--steps", "5", "--tricks", tricks, "--batch-tokens", "512", "--micro-batch-tokens", "64", "--clip", "0.5")
    flags += ("--val-tokens", str(33 * 64))  # more for one rank than for the others
    one = train(*flags)
    for ranks in (2, 4) if tricks == "modern,muon" else (2,):
        folder = tmp_path / f"ranks{ranks}"
        torchrun(ranks, folder, *flags)
        for kind in ("train", "val"):
            assert close(losses(one, kind), losses(folder, kind), 1e-5)
        assert [e["grad_norm"] for e in events(one, "train")] == pytest.approx(
            [e["grad_norm"] for e in events(folder, "train")], rel=1e-4
        )
        assert result(folder)["tokens"] == result(one)["tokens"] == 5 * 512
        assert json.loads((folder / "env.json").read_text())["world_size"] == ranks


def test_the_display_divides_by_the_peak_of_all_ranks(sotu, tmp_path, monkeypatch):
    """Its rate is that of all: by one device's peak the MFU of eight would be eight times too high."""

    class Shown(Exception):
        pass

    def shown(config, folder, flops, peak, step, tokens):
        raise Shown(peak)

    flags = ["--track", "tiny", "--data-root", str(DATA_ROOT), "--out", str(tmp_path / "run")]
    training = train_gpt.Training(*resolve(flags), train_gpt.World("cpu"))
    training.world.size, training.world.gather = 8, lambda value: [value] * 8
    monkeypatch.setattr(train_gpt.hardware, "matmul_peak", lambda *_: (1e12, "measured"))
    monkeypatch.setattr(train_gpt.display, "Display", shown)
    with pytest.raises(Shown, match="8000000000000"):
        training.run()


def predicted(ranks: int, *flags: str) -> dict[str, float]:
    """What the cost model has each rank send in a step."""
    config, model_config, _ = resolve(["--track", "tiny", *flags])
    return communication(record_step(config, model_config, ranks, torch.float32, "cpu"), ranks)


@pytest.mark.slow
def test_gradients_may_travel_in_bf16(train, tmp_path):
    """The gradient of two ranks, taken from a step of plain descent, is that of one but for bf16's rounding; half the bytes."""
    flags = ("--steps", "1", "--optimizer", "sgd:lr=100,momentum=0", "--schedule", "constant", "--clip", "0")
    torch.manual_seed(0)
    start = train_gpt.GPT(resolve(["--track", "tiny"])[1]).state_dict()
    one, _ = stored(train(*flags))
    for reduce, least, most in (("fp32", 0.0, 1e-5), ("bf16", 2**-11, 2**-8)):
        folder = tmp_path / reduce
        torchrun(2, folder, *flags, "--reduce", reduce)
        two, _ = stored(folder)
        for name, w in one.items():
            error = (two[name] - w).norm() / (w - start[name]).norm()
            assert least <= error < most, (reduce, name, error)
        end = result(folder)
        weight = {"fp32": 4, "bf16": 2}[reduce] * end["parameters"]["total"]
        assert end["wire_bytes"] == weight + 16 == sum(predicted(2, *flags, "--reduce", reduce).values())  # of two in a ring


@pytest.mark.slow
def test_bytes_on_the_wire_are_those_of_the_dry_run(tmp_path):
    """Counted in the collectives of a step: here also the gathers of a matrix method, whose shares are padded."""
    flags = ("--optimizer", "muon:dtype=fp32", "--batch-tokens", "1024", "--micro-batch-tokens", "128")
    torchrun(4, tmp_path / "run", "--steps", "1", *flags)
    assert result(tmp_path / "run")["wire_bytes"] == sum(predicted(4, *flags).values())


@pytest.mark.slow
def test_compiled_equals_eager(train):
    flags = ("--steps", "4", "--layers", "1", "--tricks", "record")
    eager, compiled = train(*flags, out="eager"), train(*flags, "--compile", out="compiled")
    assert close(losses(eager), losses(compiled), 1e-4)


def test_warm_up_leaves_no_trace(sotu):
    """Weights, gradients, optimizer state and RNG before and after the compile warm-up."""
    config, model_config, recipe = resolve(["--track", "tiny", "--dropout", "0.2", "--data-root", str(DATA_ROOT)])
    training = train_gpt.Training(config, model_config, recipe, train_gpt.World("cpu"))
    before = {name: p.clone() for name, p in training.gpt.named_parameters()}
    rng = torch.get_rng_state()
    training.warm_up()
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in training.gpt.named_parameters())
    assert not training.optimizer.state and training.loader.ahead is None


# ---------------------------------------------------------------- clock, log, result


def test_clock_excludes_what_it_says(train, monkeypatch):
    """Time in set-up, validation, checkpoint and log is not training time; in the optimizer it is.

    The clock reads a time of the test's own making, which no stall of the machine can touch: a millisecond a reading, and
    what `slow` adds.
    """
    monkeypatch.chdir(ROOT)
    now = [0.0]

    def read() -> float:
        now[0] += 0.001
        return now[0]

    monkeypatch.setattr(
        train_gpt, "time", types.SimpleNamespace(perf_counter=read, process_time=time.process_time, monotonic=time.monotonic)
    )

    def slow(target, name, seconds):
        original = getattr(target, name)

        def slowed(*args, **kwargs):
            now[0] += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, slowed)

    flags = ("--steps", "4", "--val-every", "2", "--checkpoint-every", "2")
    for target, name in (
        (train_gpt.Training, "validate"), (train_gpt.Training, "save"), (train_gpt.Training, "log_step"), (train_gpt, "GPT"),
    ):  # fmt: skip
        slow(target, name, 0.5)
    off = result(train(*flags, out="off"))
    assert off["train_time"] == pytest.approx(4 * 0.001)
    slow(OPTIMIZERS["adamw"], "step", 0.2)
    on = result(train(*flags, out="on"))
    assert on["train_time"] == pytest.approx(4 * 0.201)
    assert on["robust_train_time"] == pytest.approx(4 * 0.201)
    assert on["process_time"] > 0


def test_robust_time_is_of_steps_of_equal_work(train):
    """A method that renews something every third step does not stall there."""
    assert [optimizers.period(s) for s in ("soap:every=4", "adamw", "muon:adamw_every=2", "mine.py:Mine")] == [4, 1, 2, 1]
    folder = train("--steps", "8", "--optimizer", "soap:every=3")
    times = [e["step_time"] for e in events(folder, "train")]
    alike = [times[start::3] for start in range(3)]
    robust = sum(len(some) * statistics.median(some) for some in alike)
    assert result(folder)["robust_train_time"] == pytest.approx(robust)


def test_clock_of_a_device_that_is_still_at_work(monkeypatch):
    """Steps that the device takes 3 s for and the host 1 s, two segments of three; a second of logging after each, which the
    device does not notice, and 10 s of validation. All that is counted is what the steps take; the clock waits between
    segments alone."""
    now, free, waits = [0.0], [0.0], []

    def spend(seconds: float) -> None:
        now[0] += seconds

    def wait() -> None:
        waits.append(now[0])
        now[0] = max(now[0], free[0])

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(train_gpt, "time", types.SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0]))
    progress, logged = train_gpt.Progress(), []
    clock = train_gpt.Clock(torch.device("cuda"), progress)
    for _ in range(2):
        for _ in range(3):
            clock.start()
            spend(0.5)
            free[0] = max(now[0], free[0]) + 2  # forward and backward
            now[0] = free[0]  # read the loss
            spend(0.5)
            free[0] = max(now[0], free[0]) + 1  # update
            logged.append(clock.stop("4096"))
            spend(1.0)
        clock.pause()
        clock.pause()
        assert now[0] >= free[0]
        spend(10.0)
    assert clock.train_time == pytest.approx(now[0] - 2 * 10.0) and clock.robust_train_time > 0
    assert len(waits) == 4 and sum(logged) < clock.train_time
    assert progress.process_time == pytest.approx(clock.train_time)  # of this host, which never sleeps


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Reads(TorchDispatchMode):
    """Notes operations whose result, or its shape, the host has to wait for."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masks or name in ("nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def read_by(train, monkeypatch, *flags: str) -> tuple[list[str], int]:
    """Who reads a number from a tensor, or waits for one, between the first step and the first validation; steps taken."""
    found, watching, steps = [], [], []

    def watch(target, name: str) -> None:
        real = getattr(target, name)

        def watched(*args, **kwargs):
            if watching and threading.current_thread() is threading.main_thread():
                found.append(sys._getframe(1).f_code.co_name)
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, watched)

    for name in READS:
        watch(torch.Tensor, name)
    watch(torch.cuda, "synchronize")
    step, validate = train_gpt.Training.step, train_gpt.Training.validate

    def watched_step(self):
        watching.append(True)
        steps.append(self.progress.step)
        with Reads(found):
            return step(self)

    def unwatched_validate(self):
        watching.clear()
        return validate(self)

    monkeypatch.setattr(train_gpt.Training, "step", watched_step)
    monkeypatch.setattr(train_gpt.Training, "validate", unwatched_validate)
    train(*flags)
    return found, len(steps)


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(n for n, method in OPTIMIZERS.items() if not issubclass(method, Elementwise))]
)
def test_a_step_waits_for_the_device_once(train, monkeypatch, optimizer):
    """Between forward and update, to learn whether all is finite. Not seen on a CPU: torch.linalg.eigh, with which Shampoo,
    CASPR and SOAP renew and begin, waits on a GPU. An element-wise rule that waits is not one graph (test_rules.py)."""
    found, steps = read_by(train, monkeypatch, "--steps", "4", "--val-every", "4", *with_optimizer(optimizer), "--clip", "0.1")
    begun = found.count("starting")  # SOAP's, in its first step: have the blocks of a shape a gradient yet?
    assert steps == 4 and found == ["backward"] + ["starting"] * begun + ["backward"] * (steps - 1)
    assert (begun > 0) == (optimizer == "soap")


@pytest.mark.parametrize("tricks", ["record", "baseline", "modern,muon,multi_token,retied_head,momentum_warmup,bf16_weights"])
def test_recipes_wait_for_the_device_once(train, monkeypatch, tricks):
    assert read_by(train, monkeypatch, "--steps", "6", "--tricks", tricks) == (["backward"] * 6, 6)


def test_validation_is_the_mean_over_sequences(sotu):
    """Also where the last micro-batch is smaller than the others."""
    gpt, val, world = train_gpt.GPT(resolve(["--track", "tiny"])[1]), Dataset(sotu, "val"), train_gpt.World("cpu")
    starts = validation_starts(val, 64, 9 * 64, True)
    each = [gpt(*val.batch([start], 64)).item() for start in starts]
    assert len(starts) == 9 and max(each) - min(each) > 0.01
    assert train_gpt.validate(gpt, val, starts, 64, 4, world) == pytest.approx(sum(each) / 9, rel=1e-6)


def test_other_text_and_the_ends_of_sequences_are_validated_once(train, tmp_path, capsys):
    """Each by itself is what validation on that text, or on the last targets alone, says."""
    root, generator = tmp_path / "data", torch.Generator().manual_seed(0)
    for name in ("mine", "other"):
        document = torch.randint(65, 91, (4096,), generator=generator).numpy().astype("uint16")
        splits = {s: write(root / f"{name}-bytes", name, s, [document], 0) for s in ("train", "val")}
        write_manifest(root / f"{name}-bytes", {"corpus": name, "tokenizer": "bytes", "splits": splits})
    flags = ("--corpus", "mine", "--data-root", str(root), "--steps", "3", "--val-tokens", "1024")
    folder = train(*flags, "--val-also", "tail,other,nowhere")
    assert "--val-also nowhere is left out" in capsys.readouterr().out
    also, gpt = result(folder)["val_also"], train_gpt.GPT(resolve(["--track", "tiny"])[1])
    gpt.load_state_dict(stored(folder)[0])
    for word, corpus, last in (("tail", "mine", 16), ("other", "other", 0)):
        tokens, targets = (dataset := Dataset(root / f"{corpus}-bytes", "val", last)).batch(
            validation_starts(dataset, 64, 256, True), 64
        )
        assert also[word] == pytest.approx(gpt(tokens, targets).item(), rel=1e-5)
    assert also.keys() == {"tail", "other"} and also["tail"] != result(folder)["val_loss"]
    shard = next((root / "other-bytes").glob("*val*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")  # found after the training: the run ends all the same
    assert result(train(*flags, "--val-also", "tail,other", out="damaged"))["val_also"].keys() == {"tail"}
    assert "--val-also other is left out: shard" in capsys.readouterr().out


def test_log_and_result_agree(train):
    folder = train("--steps", "10", "--target-loss", "4.6", "--val-every", "2")
    steps, vals, end = events(folder, "train"), events(folder, "val"), result(folder)
    assert [e["step"] for e in steps] == list(range(1, 11)) and [e["step"] for e in vals] == [2, 4, 6, 8, 10]
    assert end["train_time"] == pytest.approx(sum(e["step_time"] for e in steps))
    assert end["tokens"] == steps[-1]["tokens"] == 10 * 256
    assert end["tokens_per_second"] == pytest.approx(end["tokens"] / end["train_time"])
    env = json.loads((folder / "env.json").read_text())
    assert end["mfu"] == pytest.approx(end["tokens_per_second"] * end["flops_per_token"] / env["peak_flops"])
    assert end["val_loss"] == vals[-1]["loss"]
    first = next(e for e in vals if e["loss"] <= 4.6)
    assert end["target_reached"] and end["steps_to_target"] == first["step"]
    assert end["time_to_target"] == pytest.approx(first["train_time"])
    assert sum(e["event"] == "end" for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines())) == 1
    assert end["optimizer_state_bytes"] >= 8 * end["parameters"]["total"]
    assert end["peak_memory"] > 50e6


def test_mfu_is_of_the_faster_products(train, monkeypatch):
    """Those timed at the start were slowed by another process."""
    peaks = iter([(1e9, "measured"), (4e9, "measured")])
    monkeypatch.setattr(train_gpt.hardware, "matmul_peak", lambda *_: next(peaks))
    end = result(train("--steps", "2"))
    assert end["mfu"] == pytest.approx(end["tokens_per_second"] * end["flops_per_token"] / 4e9)


def test_stop_at_target(train):
    end = result(train("--steps", "30", "--target-loss", "5", "--val-every", "2", "--stop-at-target"))
    assert end["status"] == "stopped" and end["steps"] == end["steps_to_target"] < 30
    never = result(train("--steps", "3", "--target-loss", "0.1", out="never"))
    assert never["status"] == "ok" and never["time_to_target"] is None and not never["target_reached"]


def test_divergence_stops_before_the_update(train):
    folder = train("--steps", "10", "--optimizer", "sgd:lr=1e30", "--clip", "0", "--schedule", "constant", code=3)
    end = result(folder)
    assert end["status"] == "diverged" and not end["target_reached"] and end["val_loss"] is None
    (event,) = events(folder, "nonfinite")
    assert event["step"] == end["steps"] + 1 == len(losses(folder)) + 1
    assert all(math.isfinite(loss) for loss in losses(folder))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_reaches_no_state(sotu, tmp_path, optimizer):
    flags = ["--track", "tiny", "--dtype", "fp32", "--data-root", str(DATA_ROOT), "--out", str(tmp_path / "run")]
    training = train_gpt.Training(*resolve([*flags, *with_optimizer(optimizer)]), train_gpt.World("cpu"))
    training.optimizer.train()
    assert training.step() and training.step()
    before = copy.deepcopy((training.gpt.state_dict(), training.optimizer.state_dict()))
    hook = training.gpt.blocks[0].mlp.up.weight.register_hook(lambda g: g / 0)
    assert training.step() is None
    hook.remove()
    assert same((training.gpt.state_dict(), training.optimizer.state_dict()), before)


def test_weights_that_are_not_finite_after_the_last_update_are_no_result(train):
    """Every gradient was finite: the last update is what broke the weights."""
    folder = train("--steps", "1", "--optimizer", "sgd:lr=1e38,momentum=0", "--schedule", "constant", code=3)
    assert result(folder)["status"] == "diverged" and result(folder)["val_loss"] is None


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
@pytest.mark.parametrize("average", ["none", "lawa_ema:decay=0.9"])
@pytest.mark.parametrize("until", ["0.5", "1"])
def test_a_shared_weight_is_one_wherever_it_is_looked_at(train, monkeypatch, optimizer, average, until):
    """Validated and stored, whatever weights the method is judged by; then two, with one history."""
    seen, real = [], train_gpt.validate

    def look(gpt, *given):
        seen.append(torch.equal(gpt.embedding.weight, gpt.head.weight))
        return real(gpt, *given)

    monkeypatch.setattr(train_gpt, "validate", look)
    flags = (*with_optimizer(optimizer), "--average", average, "--no-tied-head", "--tied-until", until)
    folder = train(*flags, "--steps", "8", "--val-every", "2", "--clip", "0")
    assert seen == ([True] * 4 if until == "1" else [True, True, False, False])
    weights, state = stored(folder, *flags)
    assert torch.equal(weights["embedding.weight"], weights["head.weight"]) == (until == "1")
    if average != "none":
        assert all(len(kept) == 1 for kept in state["average"]["kept"])


def test_two_weights_go_on_with_one_history_though_a_step_is_left_out(sotu, tmp_path):
    flags = [
        "--track",
        "tiny",
        "--dtype",
        "fp32",
        "--data-root",
        str(DATA_ROOT),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "8",
    ]
    flags += ["--no-tied-head", "--tied-until", "0.5", "--nonfinite", "skip:1"]
    training = train_gpt.Training(*resolve(flags), train_gpt.World("cpu"))
    for step in range(8):
        hook = training.gpt.head.weight.register_hook(lambda g: g / 0) if step == 3 else None
        if training.step() is None:
            training.gpt.zero_grad(set_to_none=True)
            training.progress.step += 1
        if hook:
            hook.remove()
    steps = [int(training.optimizer.state[w]["step"]) for w in (training.gpt.embedding.weight, training.gpt.head.weight)]
    assert steps == [7, 7]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "amos", "schedule_free_prodigy", "muon", "shampoo", "soap", "kron"])
def test_each_kind_of_optimizer_trains_tiny(train, optimizer):
    """At its defaults, in 60 steps, to what single bytes can tell (their entropy is 3.1 nats) or further. Of each kind of state
    one; test_optimizers.py has every method."""
    flags = ("--steps", "60", "--val-every", "60", "--val-tokens", "4096", "--layers", "1")
    assert result(train(*with_optimizer(optimizer), *flags))["val_loss"] < 3.1


def test_average_is_what_is_validated_and_stored(train):
    plain, averaged = train("--steps", "40"), train("--steps", "40", "--average", "lawa_queue:length=3,every=2", out="averaged")
    assert losses(plain) == losses(averaged)  # training is not touched
    assert result(plain)["val_loss"] != result(averaged)["val_loss"]
    weights, state = stored(averaged, "--average", "lawa_queue:length=3,every=2")
    kept = state["average"]["kept"]
    assert len(kept[0][0]) == 3
    means = [torch.stack(own).mean(0) for (own,) in kept]
    assert all(any(torch.equal(mean, w) for w in weights.values() if w.shape == mean.shape) for mean in means)


def test_weight_decay_follows_its_own_schedule(train):
    flags = ("--optimizer", "adamw:weight_decay=0.2", "--schedule", "constant", "--decay-schedule", "power:outer=2.25")
    _, state = stored(train("--steps", "4", *flags), *flags)
    assert sorted({group["weight_decay"] for group in state["param_groups"]}) == [0, pytest.approx(0.2 * 0.25**2.25)]


def test_a_run_tells_where_it_is_to_who_asks(train, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_FOLDER_GOES_TO", str(tmp_path / "told"))
    folder = train("--steps", "1")
    assert (tmp_path / "told").read_text() == str(folder.resolve())


def test_finished_run_is_not_trained_again(train, capsys):
    folder = train("--steps", "3")
    before = (folder / "log.jsonl").read_bytes()
    train("--steps", "3")
    assert "--resume never" in capsys.readouterr().out and (folder / "log.jsonl").read_bytes() == before
    train("--steps", "3", "--resume", "never")
    assert [e["loss"] for e in events(folder, "train")] == losses(folder)
    assert len(losses(folder)) == 3


def test_run_folders_differ_by_what_is_computed():
    def folder(*flags):
        return run_folder.default_folder(run_folder.all_settings(*resolve(["--track", "tiny", *flags])))

    plain = folder()
    name = folder(
        "--tricks",
        "modern",
        "--steps",
        "9",
        "--optimizer",
        "muon:lr=0.1",
        "--no-bias",
        "--batch-stages",
        "1/2",
        "--batch-rates",
        "1/2",
    )
    assert name.startswith("runs/tiny/modern-muon-steps9-batch_stages1_2-batch_rates1_2-no_bias-s0-")
    assert folder("--name", "mine").startswith("runs/tiny/mine-s0-") and folder("--name", "mine")[-8:] == plain[-8:]
    with pytest.raises(UsageError, match="--name takes letters"):
        folder("--name", "../mine")
    assert plain == folder("--wandb") == folder("--resume", "never") and plain.startswith("runs/tiny/baseline-s0-")
    others = [
        folder("--seed", "1"),
        folder("--width", "128"),
        folder("--optimizer", "adamw:lr=1"),
        folder("--tricks", "qk_norm"),
    ]
    assert len({plain, *others}) == 5
    stack = tricks.spelled_out("gpt2-small", "record")
    long, other = (folder("--track", "gpt2-small", "--tricks", ",".join(some)) for some in (stack[:-1], stack))
    assert len(",".join(stack)) > 255 > 150 > len(Path(long).name) and long != other


def test_repeating_data_is_said(train, capsys, tmp_path):
    """A corpus of 40 sequences and steps of 16: the third step begins to repeat."""
    root = tmp_path / "data"
    document = torch.randint(1, 256, (40 * 64,)).numpy().astype("uint16")
    splits = {s: write(root / "mine-bytes", "mine", s, [document], 0) for s in ("train", "val")}
    write_manifest(root / "mine-bytes", {"corpus": "mine", "tokenizer": "bytes", "splits": splits})
    folder = train(
        "--corpus", "mine", "--data-root", str(root), "--val-tokens", "640", "--batch-tokens", "1024", "--steps", "6"
    )
    assert [(e["step"], e["epoch"]) for e in events(folder, "epoch")] == [(3, 1), (5, 2)]
    assert "all data seen 1 times" in capsys.readouterr().out


@pytest.mark.parametrize("rate", ["lr", "torch.tensor(lr)"])
def test_own_optimizer(train, tmp_path, rate):
    (tmp_path / "mine.py").write_text(OWN_OPTIMIZER.replace("dict(lr=lr)", f"dict(lr={rate})"))
    folder = train("--steps", "20", "--optimizer", f"{tmp_path / 'mine.py'}:SignDescent:lr=0.002")
    assert losses(folder)[-1] < losses(folder)[0] - 0.5


HOLDS = """
import torch
class Fails(torch.optim.SGD):
    def step(self):
        raise RuntimeError("a closure is required")


class Holds(torch.optim.SGD):
    def step(self):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["own"] = object()
"""


def test_what_the_first_step_shows_to_be_wrong_leaves_nothing(train, tmp_path, capsys):
    (tmp_path / "holds.py").write_text(HOLDS)
    flags = ("--steps", "3", "--optimizer", f"{tmp_path / 'holds.py'}:Holds:lr=0.01")
    folder = train(*flags, code=2)
    said = capsys.readouterr().err
    assert "is a object: a checkpoint holds" in said and "--checkpoint-minutes 0 trains without" in said
    assert not folder.exists()
    train(*flags[:-1], flags[-1].replace("Holds", "Fails"), code=2)
    assert "a closure is required" in capsys.readouterr().err and not folder.exists()
    train(*flags, "--checkpoint-minutes", "0")


def test_an_own_optimizer_that_was_changed_is_another_run(train, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    flags = ["--steps", "2", "--optimizer", f"{mine}:SignDescent:lr=0.002"]
    spec.trust(flags)
    named = lambda: run_folder.default_folder(run_folder.all_settings(*resolve(flags)))  # noqa: E731
    mine.write_text(OWN_OPTIMIZER)
    before = named()
    train(*flags)
    mine.write_text(OWN_OPTIMIZER.replace("p -= ", "p += "))
    assert named() != before
    train(*flags, code=2)
    assert "other settings (optimizer_code)" in capsys.readouterr().err


MARKS = """
from pathlib import Path
Path({!r}).touch()

class Mine:
    def value(self, step, steps):
        return 1.0
"""


def test_code_that_a_file_names_is_not_loaded(train, tmp_path, monkeypatch, capsys):
    """A SPEC in somebody's config.json or tuned.json; the same words on the user's own command line are loaded."""
    import sample

    code, mark = tmp_path / "code.py", tmp_path / "ran"
    code.write_text(MARKS.format(str(mark)))
    folder = train("--steps", "2")
    settings = json.loads((folder / "config.json").read_text())
    for key in ("schedule", "decay_schedule", "momentum_schedule", "optimizer", "average", "outer"):
        (folder / "config.json").write_text(json.dumps(settings | {key: f"{code}:Mine", "data_root": str(tmp_path / "else")}))
        assert sample.main(["--run", str(folder), "--tokens", "2"]) == 0
    tuned = {"tiny": {"adamw": {"optimizer": "adamw:lr=0.1", "schedule": f"{code}:Mine"}}}
    monkeypatch.setattr(tricks, "TUNED", tmp_path / "tuned.json")
    tricks.TUNED.write_text(json.dumps(tuned))
    with pytest.raises(UsageError, match="loaded only where the command line names it"):
        resolve(["--track", "tiny", "--optimizer", "adamw", "--schedule", f"{code}:Mine"])
    train("--steps", "2", "--tricks", "modern", out="tuned", code=2)
    (tmp_path / "torch.optim").mkdir()
    (tmp_path / "torch.optim" / "code.py").write_text(code.read_text())  # its path begins like a class of torch
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        with pytest.raises(UsageError, match="loaded only where the command line names it"):
            spec.load("torch.optim/code.py:Mine", "optimizer")
    assert not mark.exists() and not (tmp_path / "else").exists()
    train("--steps", "2", "--schedule", f"{code}:Mine", out="own")
    assert mark.exists()


def test_sampling(train, capsys):
    import sample

    folder = train("--steps", "3")
    capsys.readouterr()
    assert sample.main(["--run", str(folder), "--prompt", "Abc", "--tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("Abc")
    assert sample.main(["--run", str(folder / "nowhere")]) == 2
    with pytest.MonkeyPatch.context() as there:
        there.chdir(folder.parent)
        assert sample.main([]) == 2 and "runs/ holds no trained model" in capsys.readouterr().err
        shutil.copytree(folder, "runs/tiny/old")
        shutil.copytree(folder, "runs/tiny/new")
        for run, when in (("new", 2e9), ("old", 1e9)):
            os.utime(f"runs/tiny/{run}/log.jsonl", (when, when))
        assert sample.main(["--tokens", "1"]) == 0 and "the newest run: runs/tiny/new" in capsys.readouterr().err
    once, streamed = (["--prompt", "é", "--tokens", "90", "--top-p", "0.9", *more] for more in ([], ["--stream"]))
    texts = [sample.main(["--run", str(folder), *words]) or capsys.readouterr().out for words in (once, streamed)]
    assert texts[0] == texts[1] and len(texts[0]) > 40  # longer than the context
    for words in (
        *(["--temperature", "nan"], ["--temperature", "-1"], ["--top-k", "-1"], ["--tokens", "-5"], ["--seed", "1" * 20]),
        *(["--top-p", "0"], ["--top-p", "nan"]),
        ["--prompt", "\ud800"],
    ):
        assert sample.main(["--run", str(folder), *words]) == 2
        assert (err := capsys.readouterr().err).startswith("sample.py: --") and err.count("\n") == 1
    assert sample.main(["--run", str(folder), "--tokens", "2", "--temperature", "1e-300"]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("attention", "batch_stages")}))
    assert sample.main(["--run", str(folder), "--tokens", "2"]) == 0  # of an older trainer: defaults are the answer
    capsys.readouterr()
    odds = [{"heads": 0}, {"layers": "two"}, {"layers": 10**9}, {"tokenizer": 5}, {"window_stages": {"a": 1}}]
    for text in ("[1]", "{", "[" * 100_000, *(json.dumps(config | odd) for odd in odds)):
        (folder / "config.json").write_text(text)
        assert sample.main(["--run", str(folder)]) == 2
        assert "config.json" in (err := capsys.readouterr().err) and err.count("\n") == 1
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer": "gpt2"}))
    assert sample.main(["--run", str(folder), "--data-root", str(folder / "none")]) == 2 and not (folder / "none").exists()
    assert "gpt2 has tokens that the model, with 256, has not" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer": "mod97"}))
    assert (
        sample.main(["--run", str(folder), "--prompt", "hello"]) == 2 and "no text of the tokenizer" in capsys.readouterr().err
    )


def test_a_place_that_cannot_be_written_is_one_line(sotu, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        assert train_gpt.main(tiny(out)) == 2
        assert str(out)[:200] in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trik", "muon"], "unknown flag --trik: did you mean '--tricks'?"),
        (["--lr", "0.01"], "unknown flag --lr: a learning rate is a key of the optimizer, such as --optimizer adamw:lr=0.01"),
        (["--tricks", "modern", "muon"], "unknown flag muon: lists are written with commas, such as --tricks modern,muon"),
        (["--optimizer", "Muon"], "unknown optimizer 'Muon': did you mean 'muon'?"),
        (["--track", "cpuu"], "unknown track 'cpuu': did you mean 'cpu'?"),
        (["--tricks", "muno"], "unknown trick 'muno': did you mean 'muon'?"),
        (["--optimizer", "adamvw"], "unknown optimizer 'adamvw': did you mean 'adamw'?"),
        (["--optimizer", "muon:learning=1"], "no key 'learning'"),
        (["--optimizer", "muon:lr=fast"], "takes a value of type float"),
        (["--optimizer", "muon:scale=big"], "scale"),
        (["--optimizer", "nowhere.py:Mine"], "no file nowhere.py"),
        (["--schedule", "cosin"], "did you mean 'cosine'?"),
        (["--optimizer", "schedule_free_adamw"], "add --schedule constant"),
        (["--optimizer", "shampoo:grafting=adan"], "did you mean 'adam'?"),
        (["--skips=--"], "--skips takes none, unet, single; not '--'"),
        (["--batch-stages", "1/2"], "--batch-stages has 2 sizes, --batch-rates 1 rates"),
        (["--batch-stages", "1/x", "--batch-rates", "1/1"], "--batch-stages takes a value of type float, not 'x'"),
        (["--reduce", "fp16"], "--reduce takes fp32, bf16"),
        (["--average", "lawa"], "unknown average 'lawa'"),
        (["--average", "lawa_ema:decay=2"], "decay must be at least 0 and below 1, got 2"),
        (["--steps", "many"], "--steps takes a value of type int"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps"], "--steps"),
        (["--clip", "-1"], "--clip must be at least 0, got -1"),
        (["--clip", "nan"], "--clip must be at least 0, got nan"),
        (["--micro-batch-tokens", "-64"], "--micro-batch-tokens must be at least 0"),
        (["--nonfinite", "skip:\u00b2"], "--nonfinite takes stop or skip:K"),
        (["--minutes", "1e308"], "--minutes must be 0 to 1e+06"),
        (["--batch-stages", "1e18"], "--batch-stages must be 0 to 1e+06"),
        (["--positions", "rotary", "--rotary-base", "0"], "--rotary-base must be at least 1"),
        (["--vocab-multiple", "99999999999999999999"], "--vocab-multiple must be 1 to"),
        (["--vocab-size", "1000000000000"], "--vocab-size must be 1 to"),
        (["--layers", "100000000"], "--layers must be 1 to 1000, got 1e+08"),
        (["--logit-softcap", "1e300"], "--logit-softcap must be 0 to 1e+06"),
        (["--ngram-buckets", "64", "--ngram-orders", "2,9999999999"], "ngram_orders must be whole numbers from 2 to 99"),
        (["--rates", "embedding=inf"], "--rates embedding= takes 0 or more, below 1e9, not inf"),
        (["--optimizer", "torch.optim.ASGD:lambd=-5"], "lambd must be at least 0, got -5"),
        (["--optimizer", "torch.optim.SGD:dampening=-5"], "dampening must be at least 0, got -5"),
        (["--optimizer", "schedule_free_adamw:beta1=0"], "beta1 must be at least 0.001"),
        (["--seed", "-1"], "--seed must be 0 to 4.29497e+09, got -1"),
        (["--seed", "99999999999999999999"], "--seed must be 0 to"),
        (["--batch-stages", "inf/1", "--batch-rates", "1/1"], "--batch-stages must be 0 to 1e+06, got inf"),
        (["--momentum-schedule", "ramp:peak=1", "--optimizer", "sgd"], "peak must be at least 0 and below 1, got 1"),
        (["--tied-until", "1.5", "--no-tied-head"], "--tied-until must be 0 to 1, got 1.5"),
        (["--heads", "0"], "--heads must be at least 1"),
        (["--target-loss", "0", "--stop-at-target"], "--stop-at-target needs a target"),
        (["--tricks", "momentum_warmup"], "adamw has no momentum that it could change"),
        (["--tricks", "blockless"], "unknown trick 'blockless'"),
        (["--layers", "0"], "--layers must be 1 to 1000"),
        (["--schedule", "constant:final=0.1"], "schedule 'constant' has no key 'final'"),
        (["--schedule", "inverse_sqrt:final=0.1"], "schedule 'inverse_sqrt' has no key 'final'"),
        (["--dtype", "fp8"], "--dtype takes auto, bf16, fp32"),
        (["--width", "65"], "width 65 is not divisible by heads 2"),
        (["--batch-tokens", "1000"], "the nearest that is: 1024"),
        (["--micro-batch-tokens", "96"], "must be a multiple of the sequence length"),
        (["--corpus", "novels"], "run: ./run.sh data prepare novels --tokenizer bytes"),
        (["--val-tokens", "9000000"], "--val-tokens 9000000"),
        (["--sequence-length", "16000000", "--batch-tokens", "16000000"], "too few train tokens"),
        (["--resume", "must"], "no checkpoint"),
        (["--vocab-size", "100"], "add --vocab-size 256"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(sotu, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert train_gpt.main(["--track", "tiny", "--data-root", str(DATA_ROOT), "--out", str(out), *flags]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not out.exists()


def test_optimizer_file_that_does_not_import(sotu, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    flags = ["--track", "tiny", "--data-root", str(DATA_ROOT), "--out", str(tmp_path / "run")]
    assert train_gpt.main([*flags, "--optimizer", f"{tmp_path / 'broken.py'}:Mine"]) == 2
    printed = capsys.readouterr().err
    assert "does not import (ModuleNotFoundError" in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_device_and_dtype_that_are_absent(sotu, tmp_path, capsys, monkeypatch):
    flags = ["--track", "tiny", "--data-root", str(DATA_ROOT), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_gpt.main([*flags, "--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(train_gpt.hardware, "has_native_bf16", lambda device: False)
    assert train_gpt.main([*flags, "--dtype", "bf16"]) == 2
    assert "no native bf16" in capsys.readouterr().err
    assert train_gpt.hardware.pick_dtype("auto", torch.device("cpu"))[0] == torch.float32
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run_is_left_alone(train, capsys):
    folder = train("--steps", "3")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train("--steps", "4", code=2)
    assert "other settings (steps)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    folder.with_name("full").mkdir()
    (folder.with_name("full") / "thesis.txt").write_text("mine")
    train("--steps", "3", out="full", code=2)
    assert "holds no run" in capsys.readouterr().err


# ---------------------------------------------------------------- tracks, tricks and the README


@pytest.mark.parametrize("track", TRACKS)
def test_every_recipe_and_trick_resolves(track):
    built = set()  # most tricks change neither the model nor the optimizer
    for words in (*TRACKS[track].recipes, *TRICKS):
        settings = TRACKS[track].settings
        if words in ("short_sequences", "three_lengths") and settings.get("loss_tokens"):
            continue  # refused: the loss is at the end of whole sequences
        if words in ("batch_stages", "retied_head") and settings.get("minutes"):
            continue  # refused: they need a known number of steps
        config, model_config, _ = resolve(["--track", track, "--tricks", with_needs(words)])
        assert Course(config).at(0).lr >= 0
        model_config = dataclasses.replace(model_config, layers=min(2, model_config.layers))
        if (model_config, config.optimizer) not in built:
            built.add((model_config, config.optimizer))
            with torch.device("meta"):
                assert train_gpt.optimizers.build(config.optimizer, train_gpt.GPT(model_config)).param_groups


def test_tricks_are_ordered_and_flags_win():
    config, model_config, recipe = resolve(
        ["--track", "cpu", "--tricks", "modern,rope", "--steps", "7", "--no-qk-norm", "--optimizer", "sgd"]
    )
    assert model_config.positions == "rotary" and model_config.activation == "relu2" and not model_config.qk_norm
    assert (config.steps, config.optimizer, recipe) == (7, "sgd", "modern+rope")


def test_a_flags_keys_go_over_those_of_the_tricks():
    optimizer = lambda *words: spec.split(resolve(["--track", "gpt2-small", *words])[0].optimizer)  # noqa: E731
    _, keys = optimizer("--tricks", "modern,muon,normuon")
    assert keys["normuon"] == "true"
    assert optimizer("--tricks", "modern,muon,normuon", "--optimizer", "muon:momentum=0.9") == (
        "muon",
        keys | {"momentum": "0.9"},
    )
    assert optimizer("--tricks", "modern,muon,normuon", "--optimizer", "lion:lr=1")[0] == "lion"


def test_tricks_on_one_optimizer_add_their_keys():
    optimizer = lambda words: spec.split(tricks.apply("gpt2-small", words)[0]["optimizer"])  # noqa: E731
    name, keys = optimizer("muon")
    assert name == "muon" and keys["coefficients"] == "cubic"
    assert optimizer("muon,polar_express") == ("muon", keys | {"coefficients": "polar_express", "steps": "5"})
    assert optimizer("polar_express,muon") == ("muon", keys)  # the later one wins
    assert optimizer("polar_express") == (
        "muon",
        {"coefficients": "polar_express", "steps": "5"},
    )  # nothing of the track's AdamW


@pytest.mark.slow
def test_wrong_verb_and_help():
    done = subprocess.run(["./run.sh", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "trian" in done.stderr
    help = forks.run([sys.executable, "train_gpt.py", "--help"], cwd=ROOT)
    assert help.returncode == 0 and "--ngram-buckets" in help.stdout and "default: 4096" in help.stdout


if __name__ == "__main__":
    out = ROOT / "runs" / "golden"
    assert train_gpt.main(tiny(out, "--resume", "never", *GOLDEN_FLAGS)) == 0
    GOLDEN.write_text(json.dumps({kind: losses(out, kind) for kind in ("train", "val")}, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
