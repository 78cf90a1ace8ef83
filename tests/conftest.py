"""Shared: the repository on the path, the prepared default corpus, and a tiny run of the trainer."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
from data import corpora  # noqa: E402

DATA_ROOT = ROOT / "corpora"


@pytest.fixture(scope="session")
def sotu() -> Path:
    """Folder of the sotu corpus as bytes, prepared once (idempotent)."""
    return corpora.prepare("sotu", "bytes", DATA_ROOT)


@pytest.fixture
def train(sotu, tmp_path):
    """train("--steps", "5", out="a") -> run folder of a `tiny` run in fp32 that must end with `code`."""

    def run(*flags: str, out: str = "run", code: int = 0) -> Path:
        folder = tmp_path / out
        defaults = ["--track", "tiny", "--dtype", "fp32", "--data-root", str(DATA_ROOT), "--out", str(folder)]
        assert train_gpt.main([*defaults, *flags]) == code
        return folder

    return run


def events(folder: Path, kind: str) -> list[dict]:
    """The events of one kind in a run's log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [event["loss"] for event in events(folder, kind)]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())
