"""What tests share: the prepared default corpus, a tiny run of the trainer, and what it left."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined: test_kernels.py runs them so, in numpy

import forks  # noqa: E402

import train_gpt  # noqa: E402
from config import resolve  # noqa: E402
from data import corpora, shards  # noqa: E402
from engine import checkpoint, hardware  # noqa: E402
from optimizers import find  # noqa: E402

hardware.matmul_peak = functools.cache(hardware.matmul_peak)  # measured once, not in every run
REALLY_CHECK, PROVEN = shards.Dataset.check, set()
DATA_ROOT = ROOT / "corpora"
BACK = dict(smear=True, key_offset=True, window=8, window_pattern="SL", yarn=True)  # all that makes a model look back
BACK |= dict(ngram_buckets=64, ngram_orders="2,3,4", ngram_width=12)
PATHS = dict(value_embeddings=1, value_gates=True, skips="unet", backout=True, input_shortcut=True, attention_gate=True)


def check(self, vocab_size: int) -> shards.Dataset:
    """Shards that nobody has touched are read once, not in every run."""
    about = (vocab_size, self.fingerprint, *zip(self.paths, self.opened))
    if about not in PROVEN:
        REALLY_CHECK(self, vocab_size)
        PROVEN.add(about)
    return self


shards.Dataset.check = check


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where kernels, attention and compiled code are tested: a CUDA GPU where there is one, unless --device says otherwise."""
    name = request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: PyTorch sees no CUDA GPU here")
    return torch.device(name)


@pytest.fixture
def one_thread():
    """Tensors this small lose more to threads than they win, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sotu() -> Path:
    """Folder of the sotu corpus as bytes, prepared once (idempotent)."""
    return corpora.prepare("sotu", "bytes", DATA_ROOT)


@pytest.fixture(autouse=True)
def trials_in_forks(monkeypatch):
    """The lab's trials too are forks of a process that has imported the trainer."""
    monkeypatch.setattr("lab.trials.subprocess", forks)


@pytest.fixture
def train(sotu, tmp_path):
    """train("--steps", "5", out="a") -> run folder of a `tiny` run in fp32 that must end with `code`."""

    def run(*flags: str, out: str = "run", code: int = 0) -> Path:
        assert train_gpt.main(tiny(tmp_path / out, *flags)) == code
        return tmp_path / out

    return run


class Cut(BaseException):
    """A run that dies: nothing of ours catches it."""


def events(folder: Path, kind: str) -> list[dict]:
    """The events of one kind in a run's log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [event["loss"] for event in events(folder, kind)]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def stored(folder: Path, *flags: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and optimizer state in the newest checkpoint of a `tiny` run that was trained with `flags` on one rank."""
    path, passed = checkpoint.newest(folder / "checkpoints")
    assert path is not None and not passed
    gpt, state = train_gpt.GPT(resolve(["--track", "tiny", *flags])[1]), {}
    loaded, _, _ = checkpoint.Checkpoints(folder / "checkpoints").load(path, gpt, state)
    return gpt.state_dict(), loaded


def with_needs(trick: str) -> str:
    """A trick with the one that it changes something of, where there is such: alone it is refused."""
    needs = {"momentum_warmup": "muon", "momentum_cooldown": "muon"}
    return f"{needs[trick]},{trick}" if trick in needs else trick


def with_optimizer(name: str) -> tuple[str, ...]:
    """Flags that choose an optimizer, with the schedule that it allows."""
    return ("--optimizer", name, *(("--schedule", "constant") if find(name).own_schedule else ()))


def same(a, b) -> bool:
    """Equality of nested state, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tiny(folder: Path, *flags: str) -> list[str]:
    """The trainer's flags for a run on `tiny` in fp32, with small batches, validated on little."""
    small = ("--track", "tiny", "--dtype", "fp32", "--batch-tokens", "256", "--val-tokens", "256")
    return [*small, "--data-root", str(DATA_ROOT), "--out", str(folder), *flags]


def launch(ranks: int, folder: Path, *flags: str, script: Path | str = "train_gpt.py") -> forks.Ranks:
    """Start the trainer, or a script that runs it, on so many ranks; 0: alone."""
    words = [sys.executable, str(script), *tiny(folder, *flags)]
    return forks.Ranks(ranks, words, os.environ | {"OMP_NUM_THREADS": "1"}, ROOT)


def torchrun(ranks: int, folder: Path, *flags: str) -> None:
    """Train to the end on so many ranks."""
    code, _, errors = launch(ranks, folder, *flags).finish()
    assert code == 0, errors[-20000:]
