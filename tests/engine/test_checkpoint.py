"""Never lose a run: what is resumed is the same run, bit by bit; what is damaged is named; who dies or hangs is named."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from shared import ROOT, Cut, events, launch, losses, result, same, stored, tiny, torchrun
from torch.distributed.elastic.utils.distributed import get_free_port

import train_gpt
from config import resolve
from data.shards import Dataset
from engine import checkpoint, ranks, run_folder
from engine.command import Interrupt
from engine.schedules import SCHEDULES
from engine.spec import UsageError
from lab import trials

SMALL = ("--layers", "1", "--batch-tokens", "256", "--val-tokens", "512")


def wait_for(folder: Path, words: str, process: forks.Ranks | forks.Fork) -> None:
    """Until the log of a running trainer has these words (a regular expression), or it has ended."""
    while process.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and re.search(words, log.read_text()):
            return
        time.sleep(0.02)


def wait_for_step(folder: Path, step: int, process: forks.Ranks | forks.Fork) -> None:
    wait_for(folder, rf'"step": {step}\b', process)


# ---------------------------------------------------------------- 1. exact resume


def stop_at(step: int):
    """A Training.log_step that interrupts the run after so many steps, as a crash would."""

    def log_step(self, *args, original=train_gpt.Training.log_step):
        original(self, *args)
        if self.progress.step == step:
            self.checkpoints.wait()
            raise Cut

    return log_step


# One method for each kind of state, and every schedule; test_optimizers.py saves and loads every method by itself.
KINDS = [
    ("adamw", "wsd", ()),
    ("sgd", "cosine", ("--momentum-schedule", "ramp")),
    ("nadamw", "linear", ("--average", "lawa_ema:decay=0.8")),
    ("muon", "exponential", ("--tricks", "ngram_embedding", "--micro-batch-tokens", "256")),
    ("soap:every=4", "cyclic", ()),
    ("muown", "power", ("--decay-schedule", "linear")),
    ("muon:slow=0.9,slow_start=3", "fast_slow", ("--outer", "ema_nesterov:start=2,stop=9", "--average", "tail_ema:start=4")),
    ("kron", "inverse_sqrt", ()),  # draws random numbers
    ("schedule_free_prodigy", "constant", ()),
]


def test_kinds_have_every_schedule():
    assert {schedule for _, schedule, _ in KINDS} == set(SCHEDULES)


@pytest.mark.parametrize(("optimizer", "schedule", "more"), KINDS)
def test_resumed_equals_uninterrupted(train, monkeypatch, optimizer, schedule, more):
    """A run of 12 steps, and one that dies at 8 and continues from its checkpoint at 5: the same rates, losses, weights and
    optimizer state, bit by bit; the log tells of every step once."""
    flags = ("--steps", "12", "--checkpoint-every", "5", "--deterministic", "--optimizer", optimizer, "--schedule", schedule)
    flags += ("--dropout", "0.1", *SMALL, *more)
    whole = train(*flags, out="whole")
    with monkeypatch.context() as patched:
        patched.setattr(train_gpt.Training, "log_step", stop_at(8))
        with pytest.raises(Cut):
            train(*flags, out="cut")
    cut = train(*flags, out="cut")
    assert [e["step"] for e in events(cut, "resume")] == [5]
    assert losses(cut) == losses(whole) and losses(cut, "val") == losses(whole, "val")
    assert [e["lr"] for e in events(cut, "train")] == [e["lr"] for e in events(whole, "train")]
    assert same(stored(whole, *flags), stored(cut, *flags))
    assert result(cut)["train_time"] == pytest.approx(events(cut, "train")[-1]["train_time"])


@pytest.mark.slow
def test_a_branch_is_the_run_that_it_would_have_been(train, capsys):
    """A cool-down from a stable phase that another run has trained: same weights, state and losses as a whole run."""
    flags = (*SMALL, "--schedule", "wsd:cooldown=0.5,warmup=3", "--deterministic", "--dropout", "0.1")
    train(*flags, "--steps", "24", "--checkpoint-every", "4", "--milestone-every", "4", out="stem")
    for steps, start in ((40, 12), (16, 8)):
        whole = train(*flags, "--steps", str(steps), out=f"whole-{steps}")
        stem = whole.parent / "stem"
        branch = train(*flags, "--steps", str(steps), "--branch", str(stem), out=f"branch-{steps}")
        assert [e["step"] for e in events(branch, "branch")] == [start] and not events(branch, "resume")
        assert losses(branch) == losses(whole) and losses(branch, "val")[-1] == losses(whole, "val")[-1]
        assert same(stored(branch, *flags), stored(whole, *flags))
    both = f"{stem},{whole.parent / 'branch-40'}"  # of several, the one that reaches furthest
    longer = train(*flags, "--steps", "60", "--branch", both, out="longer")
    assert [e["step"] for e in events(longer, "branch")] == [12]
    cosine = (*SMALL, "--schedule", "cosine", "--checkpoint-every", "2", "--milestone-every", "2")
    train(*cosine, "--steps", "8", out="cosine")
    alone = train(*cosine, "--steps", "9", "--branch", str(whole.parent / "cosine"), out="alone")
    assert not events(alone, "branch")  # no two steps have the same learning rate
    killed = shutil.copytree(branch, branch.parent / "killed")  # before its first step: all but the files of the start
    for name in ("log.jsonl", "result.json", "checkpoints"):
        shutil.rmtree(killed / name) if (killed / name).is_dir() else (killed / name).unlink()
    again = train(*flags, "--steps", str(steps), "--branch", str(stem), out="killed")
    assert losses(again) == losses(whole)
    capsys.readouterr()
    for words, said in (
        (("--seed", "1"), "differs from this run in more than its steps"),
        (("--branch", "nowhere"), "there is no run"),
    ):
        train(*flags, "--steps", "40", "--branch", str(stem), *words, out="bad", code=2)
        assert said in capsys.readouterr().err
    own = (*SMALL, "--optimizer", "schedule_free_adamw:warmup=0.2", "--schedule", "constant", "--checkpoint-every", "4")
    train(*own, "--steps", "8", out="own")
    train(*own, "--steps", "16", "--branch", str(whole.parent / "own"), out="worse", code=2)
    assert "fractions of the run's length" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment(sotu, tmp_path):
    """SIGKILL three times at random moments; a last line cut in two; the data repeat themselves meanwhile."""
    flags = ("--steps", "60", "--checkpoint-every", "4", "--val-every", "7", "--deterministic", "--optimizer", "muon", *SMALL)
    whole, cut, moment = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    torchrun(0, whole, *flags)
    for first in (5, 14, 30):
        process = launch(0, cut, *flags)
        wait_for_step(cut, first, process)
        time.sleep(moment.random() * 0.1)
        process[0].kill()
        process.finish()
        with (cut / "log.jsonl").open("a") as log:
            log.write('{"event": "train", "st')
    torchrun(0, cut, *flags)
    assert losses(cut) == losses(whole) and losses(cut, "val") == losses(whole, "val")
    assert same(stored(whole, *flags), stored(cut, *flags))


def test_other_code_and_other_data_are_noticed(train, monkeypatch, capsys, tmp_path):
    flags = ("--steps", "4", "--checkpoint-every", "2")
    folder = train(*flags)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    again = shutil.copytree(folder, tmp_path / "again")
    monkeypatch.setattr(train_gpt, "source_hash", lambda: "other")
    train(*flags)
    assert "written by other code" in capsys.readouterr().err
    for name in ("config.json", "env.json", "log.jsonl"):
        (again / name).unlink()
    train(*flags, "--seed", "9", out=again.name, code=2)
    assert "run with other settings" in capsys.readouterr().err
    real = Dataset.__init__

    def other(self, *args):
        real(self, *args)
        self.fingerprint = "other"

    monkeypatch.setattr(Dataset, "__init__", other)
    train(*flags, out=again.name, code=2)
    assert "trained on other data" in capsys.readouterr().err


# ---------------------------------------------------------------- 2. any number of ranks


@pytest.mark.parametrize("optimizer", ["muon", "shampoo:every=2,start=2"])
@pytest.mark.slow
def test_a_checkpoint_continues_on_other_ranks(train, sotu, tmp_path, optimizer):
    """Written by 4 ranks, continued by 1 and by 2; written by 1, continued by 4: the losses of one rank, but for rounding."""
    flags = ("--steps", "8", "--optimizer", optimizer, "--checkpoint-every", "4", *SMALL, "--batch-tokens", "512")
    flags += ("--micro-batch-tokens", "128")
    one = train(*flags, out="one")
    four = tmp_path / "four"
    torchrun(4, four, *flags)
    # Shampoo's inverse roots magnify rounding: what undisturbed runs on 1 and 4 ranks differ by is the measure
    noise = max(abs(a / b - 1) for a, b in zip(losses(four), losses(one), strict=True))
    assert noise < 5e-4

    def continued(source: Path, count: int) -> None:
        folder = shutil.copytree(source, tmp_path / f"{source.name}-on-{count}")
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "step-00000008")
        torchrun(count, folder, *flags)
        assert [e["step"] for e in events(folder, "resume")] == [4]
        for kind in ("train", "val"):
            assert losses(folder, kind) == pytest.approx(losses(one, kind), rel=max(1e-5, 3 * noise))

    continued(four, 0)
    continued(four, 2)
    continued(one, 4)
    # sharded state was written by those who hold it, each tensor once
    shards = sorted((four / "checkpoints" / "step-00000008" / "state").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in shards]
    assert len(shards) == 4 and max(sizes) < 0.6 * sum(sizes)


@pytest.mark.slow
def test_ranks_that_hold_unlike_shares_forget_nothing(train, tmp_path):
    """5 ranks have 2 or 3 of Muon's 12 blocks; of AdamW's state, which all have alike, one must still write each tensor."""
    flags = ("--steps", "2", "--optimizer", "muon:dtype=fp32", "--batch-tokens", "320", "--val-tokens", "320")
    torchrun(5, tmp_path / "five", *flags)
    one, five = (stored(folder, *flags)[1]["state"] for folder in (train(*flags, out="one"), tmp_path / "five"))
    held = lambda state: {  # noqa: E731
        number: {name: set(own) if name == "blocks" else torch.as_tensor(own).shape for name, own in kept.items()}
        for number, kept in state.items()
    }
    assert held(one) == held(five)


def test_weights_export_as_safetensors(train):
    """Any reader of safetensors takes them."""
    from safetensors.torch import load_file

    path, _ = checkpoint.newest(train("--steps", "2") / "checkpoints")
    gpt = train_gpt.GPT(resolve(["--track", "tiny"])[1])
    assert load_file(path / "model.safetensors").keys() == dict(gpt.named_parameters()).keys()


# ---------------------------------------------------------------- 3. atomic and verified


FOUR = ("--steps", "4", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def trained(sotu, tmp_path_factory) -> Path:
    """Run folder of a whole run of four steps: to copy."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    assert train_gpt.main(tiny(folder, *FOUR)) == 0
    return folder


@pytest.fixture
def two(trained, tmp_path) -> Path:
    """A folder with the checkpoints of steps 2 and 4."""
    return shutil.copytree(trained, tmp_path / "run") / "checkpoints"


def test_every_flipped_byte_is_found(two):
    """200 bytes at random, in every file of a checkpoint."""
    newest = two / "step-00000004"
    dice = random.Random(1)
    names = [*checkpoint.files(newest), "DONE"]
    for i in range(200):
        path = newest / names[i % len(names)]
        whole = path.read_bytes()
        place = dice.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << dice.randrange(8))]) + whole[place + 1 :])
        assert checkpoint.damage(newest), (path, place)
        path.write_bytes(whole)
    assert checkpoint.damage(newest) is None


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "DONE").unlink(), "not finished"),
        (lambda p: (p / "DONE").write_text("{"), "DONE, state.json or a file of tensors is damaged"),
        (lambda p: (p / "DONE").write_text("[]"), "DONE, state.json or a file of tensors is damaged"),
        (lambda p: os.truncate(p / "model.safetensors", 1000), "model.safetensors is damaged"),
        (lambda p: (p / "state.json").unlink(), "does not hold the files"),
        (lambda p: (p / "state" / "more.safetensors").write_bytes(b""), "does not hold the files"),
    ],
)
def test_the_newest_intact_one_wins(two, capsys, train, harm, message):
    harm(two / "step-00000004")
    assert message in checkpoint.damage(two / "step-00000004")
    (two.parent / "result.json").unlink()
    whole = losses(two.parent)
    folder = train(*FOUR)
    assert re.search(rf"step-00000004 passed over: .*{message}", capsys.readouterr().err)
    assert [e["step"] for e in events(folder, "resume")] == [2] and losses(folder) == whole
    assert checkpoint.newest(two)[0].name == "step-00000004"


def test_a_damaged_checkpoint_takes_no_place_of_an_intact_one(train, monkeypatch):
    flags = ("--steps", "12", "--checkpoint-every", "3", "--keep", "1", "--milestone-every", "6", *SMALL)
    folder = train(*flags)
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step-00000012" / "DONE").write_text("{")
    with monkeypatch.context() as patched:
        patched.setattr(train_gpt.Training, "log_step", stop_at(10))
        with pytest.raises(Cut):
            train(*flags)
    assert checkpoint.newest(folder / "checkpoints")[0].name == "step-00000009"  # with --keep 1, beside the damaged one
    train(*flags)
    assert [e["step"] for e in events(folder, "resume")] == [6, 9] and losses(folder) == losses(train(*flags, out="whole"))


def test_a_run_that_ended_at_its_target_ends_there_again(train, monkeypatch):
    """Ended by force between its last checkpoint and its result: it must not train past the target."""
    flags = ("--steps", "30", "--target-loss", "5", "--val-every", "2", "--stop-at-target")
    folder = train(*flags)
    before, log = result(folder), losses(folder)
    (folder / "result.json").unlink()
    train(*flags)
    assert result(folder)["steps"] == before["steps"] and losses(folder) == log and result(folder)["status"] == "stopped"


def test_the_last_step_is_saved_once(train):
    folder = train("--steps", "6", "--checkpoint-every", "3")
    assert [e["step"] for e in events(folder, "checkpoint")] == [3, 6]


def test_nothing_intact_is_said(two, capsys, train):
    for path in checkpoint.listing(two):
        os.truncate(path / "model.safetensors", 10)
    (two.parent / "result.json").unlink()
    train(*FOUR, "--resume", "must", code=2)
    assert "--resume must: checkpoint" in capsys.readouterr().err


def test_keep_and_milestones(train):
    folder = train("--steps", "10", "--checkpoint-every", "1", "--keep", "3", "--milestone-every", "4", *SMALL)
    assert [int(p.name[5:]) for p in checkpoint.listing(folder / "checkpoints")] == [10, 9, 8, 4]


def test_training_goes_on_while_a_checkpoint_is_written(train, monkeypatch):
    """However slow the disk: what the run waits for is the copy alone. Off the clock, in the log."""
    real = checkpoint.file_hash
    monkeypatch.setattr(checkpoint, "file_hash", lambda path: (time.sleep(0.3), real(path))[1])
    folder = train("--steps", "6", "--checkpoint-every", "6")
    (event,) = events(folder, "checkpoint")[:1]
    assert event["seconds"] > 0.9 and event["blocked"] < 0.1 * event["seconds"] and event["bytes"] > 1e5


def test_by_the_minute(train):
    folder = train("--steps", "6", "--checkpoint-minutes", "1e-9", "--keep", "9")
    assert len(checkpoint.listing(folder / "checkpoints")) >= 3
    assert len(checkpoint.listing(train("--steps", "6", "--checkpoint-minutes", "0", out="off") / "checkpoints")) == 1


# ---------------------------------------------------------------- 4. signals


@pytest.mark.slow
def test_a_signal_ends_the_run_after_its_step(sotu, tmp_path):
    """Stopped three times, the run is the one that nobody stopped."""
    flags = ("--steps", "90", "--val-every", "3", *SMALL)  # each validation writes the log out
    folder, stopped = tmp_path / "run", 0
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        process = launch(0, folder, *flags)
        wait_for_step(folder, stopped + 1, process)
        process[0].send_signal(getattr(signal, name))
        code, out, errors = process.finish()
        assert code == train_gpt.STOPPED == 75, errors
        event = events(folder, "stopped")[-1]
        assert event["signal"] == name and stopped < event["step"] < 90 and "the same command continues" in out
        stopped = event["step"]
        assert not (folder / "result.json").exists()
        assert checkpoint.newest(folder / "checkpoints")[0].name == f"step-{stopped:08}"
    torchrun(0, folder, *flags)
    torchrun(0, tmp_path / "whole", *flags)
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_second_sigint_leaves_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.name == "SIGINT" and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step(sotu, tmp_path):
    """One of them is told; all save, and the command continues."""
    flags = ("--steps", "300", "--val-every", "300")
    process = launch(2, tmp_path / "run", *flags)
    wait_for_step(tmp_path / "run", 0, process)
    time.sleep(1)
    process[1].send_signal(signal.SIGTERM)
    assert process.finish()[0] == train_gpt.STOPPED
    (event,) = events(tmp_path / "run", "stopped")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == f"step-{event['step']:08}"


# ---------------------------------------------------------------- 5. ranks die


RANK = """
import sys, torch, train_gpt
torch.set_num_threads(1)
assert train_gpt.main(sys.argv[1:]) == 0
"""


def rank_of(agent: forks.Fork) -> int:
    """Process number of the one rank that a torchrun agent has started."""
    words = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout.split()
    (rank,) = map(int, words)
    return rank


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_and_a_killed_node_are_replaced(sotu, tmp_path, monkeypatch):
    """Two nodes of one rank each, under torchrun itself: a rank is killed and started anew by its agent, then the node of rank
    0 is lost with everything on it and another takes its place: the same losses and weights."""
    flags = ("--steps", "40", "--checkpoint-every", "4", "--optimizer", "muon", "--val-every", "4", "--deterministic", *SMALL)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    (script := tmp_path / "rank.py").write_text(RANK)

    def agent(out: Path, *words: str) -> forks.Fork:
        """torchrun; its ranks are forks of it, which has imported the trainer."""
        command = [sys.executable, "-m", "torch.distributed.run", *words, "--run-path", "--start-method=fork", str(script)]
        return forks.Popen([*command, *tiny(out, *flags)], env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)

    undisturbed = agent(whole, "--standalone", "--nproc_per_node=2")
    _, errors = undisturbed.communicate()
    assert undisturbed.returncode == 0, errors[-2000:]
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # why: docs/gpu.md
    two = ["--nnodes=2", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=run", "--nproc_per_node=1"]
    two += [f"--rdzv-endpoint=127.0.0.1:{get_free_port()}"]

    def node(address: str, has_store: bool) -> forks.Fork:
        """torchrun gives ranks in order of addresses; a node that sends no word for 3 s (usually 15) counts as lost."""
        conf = f"--rdzv-conf=is_host={has_store},keep_alive_interval=1,keep_alive_max_attempt=3"
        return agent(folder, *two, f"--local-addr={address}", conf)

    nodes = [node("127.0.0.2", True), node("127.0.0.1", False)]
    try:
        wait_for_step(folder, 8, nodes[1])
        os.kill(rank_of(nodes[0]), signal.SIGKILL)
        wait_for(folder, '"event": "resume"(.|\n)*"step": 20,', nodes[1])
        lost = nodes.pop()
        for pid in (lost.pid, rank_of(lost)):  # torchrun first: it must not see its rank die
            os.kill(pid, signal.SIGKILL)
        lost.communicate()
        assert not (folder / "result.json").exists()
        nodes.append(node("127.0.0.1", False))
        for process in nodes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in nodes:
            process.send_signal(signal.SIGTERM)  # whoever still runs ends its rank too
    first, second = (event["step"] for event in events(folder, "resume"))
    assert 4 <= first < second < 40
    assert losses(folder) == losses(whole) and losses(folder, "val") == losses(whole, "val")
    assert same(stored(folder, *flags), stored(whole, *flags))


@pytest.mark.slow
def test_a_hung_rank_is_named(sotu, tmp_path):
    flags = ("--steps", "100000", "--timeout", "4", "--val-every", "100000")
    process = launch(2, tmp_path / "run", *flags)
    wait_for_step(tmp_path / "run", 0, process)
    time.sleep(1)
    process[1].send_signal(signal.SIGSTOP)
    code, _, errors = process.finish(patience=0.5)
    assert code != 0
    assert "no progress for 4 s: rank 1 does not run any more, at step " in errors


SLOW_TO_START = """
import os, sys, time, torch, train_gpt
torch.set_num_threads(1)
if os.environ["RANK"] == "{hung}":
    time.sleep(60)
sys.exit(train_gpt.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])
def test_a_rank_that_hangs_before_its_first_word_is_named(sotu, tmp_path, hung):
    (script := tmp_path / "start.py").write_text(SLOW_TO_START.format(hung=hung))
    begun = time.monotonic()
    process = launch(2, tmp_path / "run", "--timeout", "1", script=script)
    code, _, errors = process.finish(patience=0.5)
    assert code != 0 and errors == f"train_gpt.py: no word from rank {hung} in 1 s: not started, or hung\n"
    assert time.monotonic() - begun < 40  # 1 s, 5 more without rank 0, and what a busy machine takes to start


# ---------------------------------------------------------------- 6. numbers

HARMFUL = """
import os
import torch


class Harmful(torch.optim.SGD):
    calls = 0

    def step(self, closure=None):
        super().step()
        Harmful.calls += 1
        if Harmful.calls == 3 and os.environ.get("RANK") == "1":
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[7] += 1e-3
"""


@pytest.mark.slow
def test_ranks_that_drift_apart_are_found(sotu, tmp_path):
    (tmp_path / "harmful.py").write_text(HARMFUL)
    flags = ("--steps", "20", "--optimizer", f"{tmp_path / 'harmful.py'}:Harmful:lr=0.01")
    torchrun(2, tmp_path / "unseen", *flags)  # 20 steps: before the first check
    code, _, errors = launch(2, tmp_path / "run", *flags, "--check-ranks", "5").finish()
    assert code != 0 and "step 5: weights of rank" in errors


def test_no_bit_changes_unseen():
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = ranks.checksum(w)
    for bit in range(32):
        other = w.clone()
        other.view(torch.int32)[bit * 31] ^= -(2**31) if bit == 31 else 1 << bit
        assert ranks.checksum(other) != before
    assert ranks.checksum(w.bfloat16()).dtype == torch.int64


def spoil(monkeypatch, *steps: int) -> None:
    """The loss of these steps is not a number."""
    real = train_gpt.Training.backward

    def backward(self, x, y, now):
        hooks = []
        if self.progress.step + 1 in steps:
            hooks.append(self.gpt.blocks[0].mlp.up.weight.register_hook(lambda g: g * float("nan")))
        done = real(self, x, y, now)
        for hook in hooks:
            hook.remove()
        return done

    monkeypatch.setattr(train_gpt.Training, "backward", backward)


def test_what_is_not_finite_is_named_and_stops_the_run(train, monkeypatch, capsys):
    spoil(monkeypatch, 5)
    folder = train("--steps", "9", "--checkpoint-every", "2", code=3)
    (event,) = events(folder, "nonfinite")
    assert event["step"] == 5 and event["parameters"] == ["blocks.0.mlp.up.weight"] and event["ranks"] == []
    said = capsys.readouterr().out
    assert "step 5: not finite: gradients of blocks.0.mlp.up.weight; nothing was updated" in said
    assert "newest checkpoint" in said and "step-00000004" in said and result(folder)["status"] == "diverged"


def test_steps_that_are_not_finite_can_be_left_out(train, monkeypatch):
    spoil(monkeypatch, 3, 5)
    folder = train("--steps", "8", "--nonfinite", "skip:2")
    assert [e["step"] for e in events(folder, "nonfinite")] == [3, 5]
    assert [e["step"] for e in events(folder, "train")] == [1, 2, 4, 6, 7, 8] and result(folder)["steps"] == 8
    assert result(train("--steps", "8", "--nonfinite", "skip:1", out="one", code=3))["status"] == "diverged"


NAN_ON_RANK_1 = """
import sys
import train_gpt
real = train_gpt.Training.backward

def backward(self, x, y, now):
    if self.progress.step == 2 and self.world.rank == 1:
        with __import__("torch").no_grad():
            self.gpt.norm.weight.fill_(float("nan"))
    return real(self, x, y, now)

train_gpt.Training.backward = backward
train_gpt.leave(train_gpt.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_rank_whose_loss_is_not_finite_is_named(sotu, tmp_path):
    (tmp_path / "nan.py").write_text(NAN_ON_RANK_1)
    launch(2, tmp_path / "run", "--steps", "5", script=tmp_path / "nan.py").finish()
    (event,) = events(tmp_path / "run", "nonfinite")
    assert event["ranks"] == [1] and event["step"] == 3


BUSY_AT_THE_END = """
import os, sys, threading, time
sys.path.insert(0, os.getcwd())
import torch
from engine import ranks

def add():
    while True:
        torch.zeros(100) + 1

for _ in range(4):
    threading.Thread(target=add, daemon=True).start()
time.sleep(0.1)
print("the end", end="")
ranks.leave(3)
"""


@pytest.mark.slow
def test_a_rank_whose_threads_still_work_ends_with_its_own_code():
    """With sys.exit the interpreter (before 3.14) aborts here."""
    command = [sys.executable, "-c", BUSY_AT_THE_END]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"WORLD_SIZE": "2"})
    assert (process.returncode, process.stdout) == (3, "the end"), process.stderr


# ---------------------------------------------------------------- 7. disk and data


@pytest.mark.parametrize("target", ["save_file", "atomic_write", "sync"])
def test_full_disk_in_a_checkpoint(trained, train, monkeypatch, capsys, target):
    real, calls = getattr(checkpoint, target), []

    def full(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, target, full)
        train("--steps", "4", "--checkpoint-every", "1", code=2)
    assert "no space left" in capsys.readouterr().err
    folder = train("--steps", "4", "--checkpoint-every", "1")
    assert losses(folder) == losses(trained) and not list((folder / "checkpoints").glob(".*"))


def test_full_disk_inside_the_libraries(trained, train, monkeypatch, capsys):
    """What torch.distributed.checkpoint and safetensors make of a full disk is one line all the same."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def refused(*args):
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for target, name, failing in (
        (dcp.HuggingFaceStorageWriter, "write_data", full), (checkpoint, "save_file", refused),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(target, name, failing)
            train(*FOUR, out=name, code=2)
        assert "no space left" in capsys.readouterr().err
        assert losses(train(*FOUR, out=name)) == losses(trained)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_full_disk_in_what_a_run_writes_of_itself(train, monkeypatch, capsys, call):
    """config.json, env.json and result.json: whichever fails, the same command goes on."""
    real, calls = run_folder.atomic_write, []

    def full(path, text):
        calls.append(path.name)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        real(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "atomic_write", full)
        train("--steps", "3", code=2)
    assert calls[-1] == ("config.json", "env.json", "result.json")[call - 1] and "no space left" in capsys.readouterr().err
    assert len(losses(train("--steps", "3"))) == 3


def test_full_disk_in_the_log(trained, train, monkeypatch, capsys):

    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_folder.Run, "logged", full)
        train(*FOUR, code=2)
    assert "no space left" in capsys.readouterr().err
    assert losses(train(*FOUR)) == losses(trained)


@pytest.fixture
def copy_of_sotu(sotu, tmp_path) -> Path:
    """A corpus to damage."""
    return shutil.copytree(sotu, tmp_path / "data" / sotu.name)


def test_damaged_shards_are_refused(train, copy_of_sotu, capsys):
    flags = ("--steps", "2", "--data-root", str(copy_of_sotu.parent))
    shard = sorted(copy_of_sotu.glob("*train*.bin"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    train(*flags, code=2)
    assert f"{shard} is damaged" in capsys.readouterr().err
    shard.write_bytes(whole)
    train(*flags)


def test_a_shard_that_changes_under_a_run_is_noticed(train, copy_of_sotu, monkeypatch, capsys):
    shard = sorted(copy_of_sotu.glob("*train*.bin"))[0]
    real = train_gpt.Training.log_step

    def touched(self, *args):
        real(self, *args)
        if self.progress.step == 3:
            os.utime(shard, ns=(1, 1))

    monkeypatch.setattr(train_gpt.Training, "log_step", touched)
    folder = train("--steps", "6", "--checkpoint-every", "2", "--data-root", str(copy_of_sotu.parent), code=2)
    assert f"{shard} has changed since" in capsys.readouterr().err
    assert [p.name for p in checkpoint.listing(folder / "checkpoints")] == ["step-00000002"]


def test_tokens_of_another_vocabulary_are_refused(train, capsys):
    train("--steps", "2", "--vocab-size", "64", code=2)
    assert "vocabulary" in capsys.readouterr().err


# ---------------------------------------------------------------- 8. trust


def test_nothing_that_is_loaded_can_run():
    """No pickle is read in the repository's own code, except nanoGPT's and judge's own, by the reader of PyTorch that makes
    tensors alone."""
    sources = [p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)]
    assert len(sources) > 30
    for path in sources:
        text = path.read_text()
        for own in (
            'torch.load(path, map_location="cpu", weights_only=True)',
            "torch.load(io.BytesIO(file.getvalue()), weights_only=True)",
        ):
            text = text.replace(own, "") if path.name in ("hub.py", "judge.py") else text
        assert "torch.load(" not in text and "import pickle" not in text and "FileSystemReader" not in text, path
        assert "allow_pickle=True" not in text, path


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "state/../../outside", "state/sub/file"])
def test_names_that_lead_outside_are_refused(two, name):
    path = two / "step-00000004"
    listed = json.loads((path / "DONE").read_text())
    listed["files"][name] = [0, "0" * 64]
    (path / "DONE").write_text(json.dumps(listed))
    assert "outside the folder" in checkpoint.damage(path)


def test_links_are_refused(two):
    path = two / "step-00000004"
    target = path / "model.safetensors"
    shutil.copy(target, two / "elsewhere")
    target.unlink()
    target.symlink_to(two / "elsewhere")
    assert "links" in checkpoint.damage(path)


def test_weights_of_another_model_are_refused(two):
    gpt = train_gpt.GPT(resolve(["--track", "tiny", "--width", "32"])[1])
    with pytest.raises(UsageError, match="another model"):
        checkpoint.load_weights(gpt, two / "step-00000004")
    (two / "step-00000004" / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load_weights(gpt, two / "step-00000004")


# ---------------------------------------------------------------- 9. two at once


@pytest.mark.slow
def test_two_processes_cannot_have_one_folder(train, tmp_path, capsys):
    process = launch(0, tmp_path / "run", "--steps", "100000", "--val-every", "100000")
    wait_for_step(tmp_path / "run", 0, process)
    train("--steps", "100000", "--val-every", "100000", code=2)
    said = capsys.readouterr().err
    assert f"in use by process {process[0].pid} on " in said and said.count("\n") == 1
    process[0].kill()
    process.finish()
    run_folder.lock(tmp_path / "run").release()  # who died holds nothing


def test_packed_state_comes_back():
    """Whatever optimizers of others hold; of bytes, which may be a pickle, only those that a fresh one holds too."""
    state = {
        "a": [1, 2.5, None, True, "x"],
        3: {True: torch.arange(3)},
        "t": (torch.tensor(2.0), float("inf")),
        (1, "b"): {2, 1},
    }
    state |= {"d": deque([1, 2], 5), "f": frozenset("ab"), "y": torch.bfloat16, "n": np.float32(0.1), "m": np.arange(4)}
    state["h"] = {"code": b"a pickle"}
    tensors: dict[str, torch.Tensor] = {}
    own: dict[str, bytes] = {}
    packed = json.loads(json.dumps(checkpoint.pack(state, "s", tensors, own)))
    back = checkpoint.unpack(packed, tensors, own)
    assert np.array_equal(back.pop("m"), state.pop("m")) and same(back, state) and len(tensors) == 4
    assert {key: type(value) for key, value in back.items()} == {key: type(value) for key, value in state.items()}
    assert back["d"].maxlen == 5 and "a pickle" not in json.dumps(packed)
    with pytest.raises(UsageError, match="not restored"):
        checkpoint.unpack(packed, tensors, {})
    for wrong, word in (({"a": object()}, "object"), ({None: 3}, "key of type NoneType")):
        with pytest.raises(TypeError, match=word):
            checkpoint.pack(wrong, "s", {}, {})


def rewritten(path: Path, change, name: str = "state.json") -> None:
    """Somebody changes a file of a checkpoint, and DONE with it."""
    there, done = path / name, json.loads((path / "DONE").read_text())
    there.write_text(change if isinstance(change, str) else json.dumps(change(state := json.loads(there.read_text())) or state))
    done["files"][name] = [there.stat().st_size, run_folder.file_hash(there)]
    (path / "DONE").write_text(json.dumps(done))


@pytest.mark.parametrize(
    "change",
    [
        "[" * 100_000,
        "null",
        lambda s: s.pop("progress") and None,
        lambda s: s.update(step="4"),
        lambda s: s["progress"].update(step=10**9),
        lambda s: s["progress"].update(last_val="x"),
        lambda s: s["progress"].update(reached={"step": 99}),
        lambda s: s["progress"].update(stages=[]),
        lambda s: s["progress"].update(stages={"256": "x"}),
        lambda s: s["progress"].update(skipped=-5),
        lambda s: s["progress"].update(process_time=-1e9),
        lambda s: s.update(rng=[10**13]),
        lambda s: s.update(log_bytes=-1),
        lambda s: s.update(optimizer={}),
        lambda s: s.update(optimizer={"set": 5}),
        lambda s: s.update(optimizer={"dict": [["x", {"torch.dtype": "load"}]]}),
        lambda s: s.update(optimizer={"dict": [["x", {"torch.dtype": "value"}]]}),
        lambda s: next(checkpoint.references(s["optimizer"])).update(shape=[10**13]),
        lambda s: next(checkpoint.references(s["optimizer"])).update(dtype="int8"),
        lambda s: next(checkpoint.references(s["optimizer"])).update(tensor="model/x"),
    ],
)
def test_a_state_that_no_run_has_written_is_passed_over(two, change):
    rewritten(two / "step-00000004", change)
    path, (line,) = checkpoint.newest(two)
    assert path.name == "step-00000002" and "state.json" in line


def test_weights_that_are_none_are_passed_over(two, train):
    rewritten(two / "step-00000004", "words", "model.safetensors")
    assert checkpoint.newest(two)[0].name == "step-00000002"


def test_a_step_beyond_the_end_is_passed_over(two, train, capsys):
    (two.parent / "result.json").unlink()
    far = (two / "step-00000004").rename(two / "step-1000000000")
    rewritten(far, lambda s: s.update(step=10**9, progress=s["progress"] | {"step": 10**9}))
    assert result(train(*FOUR))["steps"] == 4
    assert "step-1000000000 passed over: the run has 4 steps" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(two, harm):
    done = two / "step-00000004" / "DONE"
    done.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[harm](done)
    assert checkpoint.newest(two)[0].name == "step-00000002"


def test_a_damaged_folder_goes_on_from_its_checkpoints(two, train, capsys):
    """Nothing is deleted that was not proven bad."""
    folder, whole = two.parent, losses(two.parent)
    there = (folder / "result.json").read_text()
    flipped = there.replace('"val_loss": 4', '"val_loss": 5'), there.replace('"train_time": ', '"train_time": 1')
    for text in ("", '{"status": "ok"}', "[" * 100_000, *flipped):  # the result is made again
        assert text != there
        (folder / "result.json").write_text(text)
        assert losses(train(*FOUR)) == whole and result(folder)["status"] == "ok"
    for text in ("{", "[1]", None):  # the checkpoint knows the hash of its settings
        (folder / "result.json").unlink()
        (folder / "config.json").write_text(text) if text else (folder / "config.json").unlink()
        train(*FOUR, "--seed", "1", code=2)
        assert "other settings" in capsys.readouterr().err
        assert losses(train(*FOUR)) == whole
    (folder / "result.json").unlink()
    for path in checkpoint.listing(two):
        (path / "DONE").unlink()
    train(*FOUR, "--resume", "must", code=2)
    assert (two / "step-00000002" / "model.safetensors").exists()


def test_a_log_that_was_changed_is_said(two, train, capsys):
    log, said = two.parent / "log.jsonl", "log.jsonl is not the log that the checkpoint was written with"
    whole = log.read_text()
    for text in (whole, whole.replace('"loss": ', '"loss":1', 1)):
        log.write_text(text)
        (two.parent / "result.json").unlink()
        train(*FOUR)
        assert (said in capsys.readouterr().out) == (text != whole)


def test_weights_that_are_not_finite_are_not_kept(train, tmp_path):
    """The last update before a checkpoint spoils them: the good ones stay."""
    file = tmp_path / "spoils.py"
    file.write_text(HARMFUL.replace('3 and os.environ.get("RANK") == "1"', "4").replace("1e-3", 'float("nan")'))
    train("--optimizer", f"{file}:Harmful:lr=0.1", "--steps", "6", "--checkpoint-every", "2", "--keep", "1", code=3)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == "step-00000002"


def test_links_in_a_run_folder_are_refused(train, tmp_path, capsys):
    """What somebody else's folder leads to is neither written nor deleted."""
    folder = train("--steps", "2")
    (folder / "result.json").unlink()
    for name in ("log.jsonl", "env.json", "checkpoints"):
        outside = tmp_path / f"outside-{name}"
        kept = folder / f"{name}.kept"
        (folder / name).rename(kept)
        outside.mkdir() if name == "checkpoints" else outside.write_text("mine")
        (folder / name).symlink_to(outside)
        train("--steps", "2", code=2)
        assert f"{name} is a link" in capsys.readouterr().err
        assert outside.is_dir() or outside.read_text() == "mine"
        (folder / name).unlink()
        os.mkfifo(folder / name)
        train("--steps", "2", code=2)
        assert f"{name} is a pipe" in capsys.readouterr().err and not trials.whole_lines(folder / name)
        (folder / name).unlink()
        kept.rename(folder / name)


def test_a_file_is_replaced_and_a_link_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "config.json").symlink_to(outside)
    (tmp_path / "config.tmp").symlink_to(outside)
    run_folder.atomic_write(tmp_path / "config.json", "new")
    assert outside.read_text() == "mine" and (tmp_path / "config.json").read_text() == "new"
    assert not (tmp_path / "config.json").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "config.tmp", "outside"
    ]  # fmt: skip


def test_a_run_begun_anew_is_not_finished_when_it_is_killed_at_once(train, monkeypatch):
    folder = train("--steps", "2")
    with monkeypatch.context() as patched:
        patched.setattr(train_gpt.Training, "begin", lambda self: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            train("--steps", "2", "--resume", "never")
    assert not (folder / "result.json").exists() and len(losses(train("--steps", "2"))) == 2
