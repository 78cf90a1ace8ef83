"""Scores equal to those of an independent implementation: a row at a time, by log_softmax."""

import json
import math

import pytest
import torch
from test_model import awake, small

import evaluate
from data.tokenizers import Bytes
from engine.spec import UsageError

BYTES = Bytes()


@pytest.fixture
def gpt():
    return awake(small(vocab_size=256)).eval()


@torch.no_grad()
def slowly(gpt, row: list[int], first: int) -> float:
    """Log-probability of row[first:], each token by the 48 before it at most that fit the row's last 49."""
    offset = max(0, len(row) - 49)
    logits = gpt(torch.tensor([row[offset:-1]]))[0].log_softmax(-1)
    return sum(float(logits[i - 1 - offset, row[i]]) for i in range(max(first, offset + 1), len(row)))


def test_hellaswag(gpt, tmp_path, capsys):
    torch.manual_seed(0)
    words = ["the man ", "a dog", " runs to", " sits down and waits", "é", " on the roof of the house that burns"]
    pick = lambda: "".join(words[i] for i in torch.randint(len(words), (3,)))  # noqa: E731
    asked = [{"ctx": pick(), "endings": [pick() for _ in range(4)], "label": i % 4} for i in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    right = [0, 0]
    for q in asked:
        start, ends = list(q["ctx"].encode()), [list(f" {e}".encode()) for e in q["endings"]]
        sums = [slowly(gpt, start + end, len(start)) for end in ends]
        means = [s / len(end) for s, end in zip(sums, ends)]
        right[0] += sums.index(max(sums)) == q["label"]
        right[1] += means.index(max(means)) == q["label"]
    said = evaluate.hellaswag(gpt, BYTES, tmp_path / "q.jsonl")
    assert said.startswith(f"hellaswag: acc {right[0] / 30:.4f}, acc_norm {right[1] / 30:.4f} of 30 questions")
    assert right[0] != right[1] or right[0] not in (0, 30)
    for bad in ("[", '{"ctx": "a"}', '{"ctx": "a", "endings": ["b"], "label": 1}', '{"ctx": 1, "endings": ["b"], "label": 0}'):
        (tmp_path / "q.jsonl").write_text(json.dumps(asked[0]) + "\n" + bad)
        with pytest.raises(UsageError, match="line 2"):
            evaluate.hellaswag(gpt, BYTES, tmp_path / "q.jsonl")


@pytest.mark.parametrize("length", [1, 30, 48, 49, 130])
def test_bits_per_byte(gpt, tmp_path, length):
    """Every byte once; after the first context each by at least half of one."""
    text = ("Fellow citizens of the Senate, é" * 5).encode()[:length].decode(errors="ignore")
    (tmp_path / "t.txt").write_text(text)
    row, end, nats = [0, *text.encode()], min(49, len(text.encode()) + 1), 0.0
    start = 1
    while start < len(row):
        nats -= slowly(gpt, row[:end], start)
        start, end = end, min(len(row), end + 24)
    said = evaluate.bits_per_byte(gpt, BYTES, tmp_path / "t.txt")
    assert said.startswith(f"bits per byte: {nats / math.log(2) / (len(row) - 1):.4f} ({len(row) - 1} tokens")


def test_wrong_input_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="no file none"):
        evaluate.run(["hellaswag", "--file", "none"])
    with pytest.raises(UsageError, match="hellaswg"):
        evaluate.run(["hellaswg", "--file", "x"])
    (tmp_path / "t.txt").write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        evaluate.bits_per_byte(awake(small(vocab_size=256)), BYTES, tmp_path / "t.txt")
