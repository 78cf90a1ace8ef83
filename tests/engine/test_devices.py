"""What is wrong with GPUs, NCCL or Triton is one line; what is harmless is a note. CUDA is pretended: no GPU is needed."""

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shared import ROOT

import engine
import train_gpt
from engine import display, hardware, ranks
from engine.spec import UsageError
from train_gpt import World

TINY = ["--track", "tiny", "--device", "cuda"]


@pytest.fixture
def gpus(monkeypatch):
    """gpus(2, RANK=1, WORLD_SIZE=2): two GPUs, and the environment that torchrun gives."""

    def pretend(count: int, **environment: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        for key, value in environment.items():
            monkeypatch.setenv(key, str(value))

    return pretend


@pytest.mark.parametrize(("local", "lines"), [(0, 1), (3, 0)])
def test_more_ranks_than_gpus(local, lines, gpus, monkeypatch, capsys, tmp_path):
    """Every rank leaves, and one of each machine says why: also of a second machine, whose first rank is not rank 0."""
    gpus(2, RANK=8 + local, WORLD_SIZE=12, LOCAL_RANK=local, LOCAL_WORLD_SIZE=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert train_gpt.main([*TINY, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == lines and not (tmp_path / "run").exists()
    if lines:
        assert "4 ranks on a machine with 2 CUDA GPUs (CUDA_VISIBLE_DEVICES=4,5): torchrun --nproc_per_node=2" in printed


def test_without_torchruns_word_the_rank_itself_counts(gpus, monkeypatch):
    gpus(2, LOCAL_RANK=2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="3 ranks on a machine with 2 CUDA GPUs"):
        World("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert World("cuda").device == torch.device("cuda", 1)


def test_several_ranks_on_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert World("mps").device.type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 ranks on --device mps, which has no collectives"):
        World("mps")


@pytest.mark.parametrize(("there", "backend"), [(True, "nccl"), (False, "gloo")])
def test_without_nccl_ranks_take_gloo(there, backend, gpus, monkeypatch):
    gpus(2, RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
    found = []
    monkeypatch.setattr(dist, "is_nccl_available", lambda: there)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(ranks, "own_corner", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: found.append(backend))
    World("cuda")
    assert found == [backend]


def lacks(cards: list[str], **given) -> list[str]:
    """What the greeting of two CUDA ranks in bf16 says that they lack."""
    settings = dict(
        compile=True,
        kernels="auto",
        batch_tokens=1024,
        batch_stages=(1,),
        steps=1,
        minutes=0.0,
        corpus="sotu",
        optimizer="muon",
        schedule="wsd",
    )
    own = dict(
        world=SimpleNamespace(device=torch.device("cuda", 0), size=2), config=SimpleNamespace(**settings), compiled=True,
        dtype=torch.bfloat16, dtype_reason="native here", gpt=torch.nn.Linear(1, 1), head_note="",
        val=None, run_folder=SimpleNamespace(folder="runs/x"),
        model_config=SimpleNamespace(layers=2, width=64),
        loader=SimpleNamespace(epochs=lambda steps: 0.0, dataset=SimpleNamespace(shared=lambda other: "")),
    )  # fmt: skip
    return display.greeting(SimpleNamespace(**own | given), cards).splitlines()[3:]


def test_what_is_missing_but_harmless_is_a_note(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert lacks(["A100", "A100"]) == []
    assert lacks(["H100", "A100"]) == ["GPUs of different kinds, 1 x H100, 1 x A100: the slowest sets the pace of all"]
    assert lacks(["H100", "H100"], head_note="the head is in bf16") == ["the head is in bf16"]
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    notes = lacks(["H100", "H100"], compiled=False)
    assert [note.split(":")[0] for note in notes] == ["no Triton here", "no Triton here", "this PyTorch has no NCCL"]
    assert "not compiled" in notes[0] and "fused kernels" in notes[1]
    assert lacks(["H100", "H100"], dtype=torch.float32) == notes[2:]  # fp32 has no kernels anyway


def test_compile_needs_triton_on_cuda(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert hardware.can_compile(cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not hardware.can_compile(cuda) and hardware.compiler_lacks(cuda) == "no Triton here"
    assert hardware.can_compile(torch.device("mps"))


def test_memory_of_a_system_that_does_not_say(monkeypatch):
    """As on Windows, which has neither /proc nor `resource`."""
    assert hardware.peak_memory(torch.device("cpu")) > 0
    monkeypatch.setattr(hardware.Path, "exists", lambda path: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert hardware.peak_memory(torch.device("cpu")) == 0


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.50 GiB is free. "
    "Including non-PyTorch memory, this process has 77 GiB in use. Of the allocated memory 70 GiB is allocated by PyTorch."
)


@pytest.mark.parametrize(
    ("flags", "way"),
    [
        ([], "micro-batches have 256 tokens; try --micro-batch-tokens 128 or --checkpoint-activations"),
        (["--micro-batch-tokens", "64"], "micro-batches have 64 tokens; try --checkpoint-activations"),
        (["--micro-batch-tokens", "64", "--checkpoint-activations"], "try more GPUs, or an optimizer with less state"),
    ],
)
def test_out_of_memory_is_a_line_with_a_way_out(flags, way, train, monkeypatch, capsys):
    forward, calls = train_gpt.GPT.forward, []

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3 * (256 // (64 if flags else 256)):
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(train_gpt.GPT, "forward", full)
    train("--val-every", "60", *flags, code=2)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.endswith(way + "\n")
    assert printed.startswith(
        "train_gpt.py: rank 0, step 4: forward and backward: CUDA out of memory. Tried to allocate 2.00 GiB;"
    )


@pytest.mark.parametrize(
    "given",
    [
        *({"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "x"}, {"RANK": "-1"}),
        {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
    ],
)
def test_an_environment_of_ranks_that_makes_no_sense_is_refused(monkeypatch, given):
    for name, word in given.items():
        monkeypatch.setenv(name, word)
    with pytest.raises(UsageError, match="torchrun sets them"):
        World("cpu")


def test_what_befalls_several_ranks_is_said_once():
    store = dist.HashStore()
    worlds = [World("cpu") for _ in range(3)]
    for world in worlds:
        world.store = store
    assert [world.first("out of memory") for world in worlds] == [True, False, False]
    assert worlds[2].first("something else") and World("cpu").first("alone")


def test_nccl_that_fails_is_a_line(monkeypatch, capsys, train):
    said = "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited\nncclRemoteError: A call failed\nLast error: none"

    def fails(*_):
        raise dist.DistBackendError(said)

    monkeypatch.setattr(train_gpt.Training, "backward", fails)
    monkeypatch.setitem(os.environ, "RANK", "0")
    train(code=1)
    printed = capsys.readouterr().err
    assert printed == f"train_gpt.py: rank 0: {said.splitlines()[0]}; NCCL_DEBUG=INFO says more\n"


LARGE_PAGES = """
import mmap, re
import train_gpt, torch

def large():
    return int(re.search(r"AnonHugePages: *([0-9]+)", open("/proc/self/smaps_rollup").read())[1])

start = large()
plain = mmap.mmap(-1, 100_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
plain.madvise(mmap.MADV_HUGEPAGE)
plain.write(bytes(100_000_000))
asked = large()
kept = torch.ones(25_000_000)
print(asked - start, large() - asked)
"""
ROLLUP, MODE = Path("/proc/self/smaps_rollup"), Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.slow
@pytest.mark.skipif(not (ROLLUP.exists() and MODE.exists() and "[madvise]" in MODE.read_text()), reason="none on request")
def test_large_tensors_are_in_large_pages():
    """As are those of a program that asks for them itself."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", LARGE_PAGES]
    words = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    plain, tensor = map(int, words.split())  # kB, of 100 MB each
    if plain < 80_000:
        pytest.skip("the kernel has none to give")
    assert tensor > 50_000


def test_measuring_the_peak_draws_none_of_the_runs_numbers():
    before = torch.get_rng_state()
    rate, _ = hardware.matmul_peak.__wrapped__(torch.device("cpu"), torch.float32)
    assert rate > 1e9 and torch.equal(before, torch.get_rng_state())


def ended(**given) -> str:
    about = dict(status="ok", val_loss=1.12, target_loss=1.13, target_reached=True, steps_to_target=700, steps=740)
    about |= dict(train_time=210.0, robust_train_time=205.0, stalled=False)
    return display.describe(about | given, Path("runs/x"))


def test_the_last_line_says_what_became_of_the_target():
    assert ended().startswith("target 1.13 reached after 700 steps: validation loss 1.1200, 740 steps, 210.0 s: runs/x")
    assert ended(target_reached=False, val_loss=1.3344).startswith("target 1.13 NOT reached: validation loss 1.3344")
    assert ended(status="diverged", target_reached=False, val_loss=None).startswith("diverged: ")
    assert ended(target_loss=None).startswith("trained: validation loss 1.1200")
    assert "(205.0 s without this machine's stalls)" in ended(stalled=True)


def test_how_threads_wait_is_set_before_torch_and_left_to_the_user(monkeypatch):
    for name, value, spins in (("OMP_WAIT_POLICY", "ACTIVE", None), ("GOMP_SPINCOUNT", "7", "7"), ("OTHER", "", "1000")):
        with monkeypatch.context() as patched:
            for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
                patched.delenv(variable, raising=False)
            patched.setenv(name, value)
            importlib.reload(engine)
            assert os.environ.get("GOMP_SPINCOUNT") == spins
    for verb in ("train_gpt.py", "sample.py"):
        first = next(
            node for node in ast.parse((ROOT / verb).read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        )
        assert ast.unparse(first).startswith("from engine import")
