"""A trained model's scores on well-known tasks.

python evaluate.py --run runs/gpt2-small/record-s0-1a2b3c4d hellaswag --file hellaswag_val.jsonl
python evaluate.py bits-per-byte --file my.txt                                                for the newest run

hellaswag (arXiv 1905.07830): the share of questions whose right ending is the likeliest of four, by the sum of its tokens'
log-probabilities (acc) or by their mean (acc_norm), as in build-nanogpt (GPT-2 124M: 0.2859 and 0.2955). The file is the public
one, a question per line. bits-per-byte: of any text; each token sees at least half a context before it.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.tokenizers import Tokenizer
from engine.command import Answer, Parser, command
from engine.spec import UsageError
from model import GPT
from sample import add_run, opened

BATCH_TOKENS = 8192


@torch.no_grad()
def log_probabilities(gpt: GPT, rows: Sequence[list[int]], counts: Sequence[int], unit: str) -> list[float]:
    """Of the last `count` tokens of each row together, given those before, nats. A row longer than the context loses its
    beginning. Rows of like length share a batch. unit: what a row is, for the progress bar."""
    sums, cut = [0.0] * len(rows), [torch.tensor(row[-gpt.config.sequence_length - 1 :], dtype=torch.long) for row in rows]
    order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))
    with tqdm(total=len(rows), unit=unit, disable=None) as bar:
        while order:
            size = max(1, BATCH_TOKENS // max(1, len(cut[order[0]])))
            batch, order = order[:size], order[size:]
            tokens = pad_sequence([cut[i] for i in batch], batch_first=True)
            logits, targets = gpt(tokens[:, :-1]), tokens[:, 1:]
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            for i, loss in zip(batch, losses):
                end = len(cut[i]) - 1
                sums[i] = -float(loss[max(0, end - counts[i]) : end].double().sum())
            bar.update(len(batch))
    return sums


def questions(path: Path) -> list[tuple[str, list[str], int]]:
    """(context, endings, number of the right one) of a file of HellaSwag. Raises UsageError: a line of another form."""
    read = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            q = json.loads(line)
            context, endings, label = q["ctx"], q["endings"], int(q["label"])
            if not (all(isinstance(text, str) for text in (context, *endings)) and 0 <= label < len(endings)):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{path}, line {number}: no question with ctx, endings and label") from None
        read.append((context, endings, label))
    if not read:
        raise UsageError(f"{path} has no question")
    return read


def hellaswag(gpt: GPT, tokenizer: Tokenizer, path: Path) -> Answer:
    asked, rows, counts = questions(path), [], []
    for context, endings, _ in asked:
        start = tokenizer.encode(context).tolist()
        for ending in endings:
            end = tokenizer.encode(" " + ending).tolist()
            rows.append(start + end)
            counts.append(len(end))
    sums, lengths, right = iter(log_probabilities(gpt, rows, counts, "ending")), iter(counts), [0, 0]
    for _, endings, label in asked:
        total = [next(sums) for _ in endings]
        mean = [value / max(1, next(lengths)) for value in total]
        for at, scores in enumerate((total, mean)):
            right[at] += scores.index(max(scores)) == label
    acc, norm = (r / len(asked) for r in right)
    half = 1.96 * math.sqrt(max(acc * (1 - acc), norm * (1 - norm)) / len(asked))
    words = f"hellaswag: acc {acc:.4f}, acc_norm {norm:.4f} of {len(asked):,} questions (+- {half:.4f})"
    return Answer(words, {"acc": acc, "acc_norm": norm, "questions": len(asked), "half_interval": half})


def bits_per_byte(gpt: GPT, tokenizer: Tokenizer, path: Path) -> Answer:
    text = path.read_text(errors="strict")
    tokens = [tokenizer.eot, *tokenizer.encode(text).tolist()]
    if len(tokens) < 2:
        raise UsageError(f"{path} is empty")
    room = gpt.config.sequence_length
    step = max(1, room // 2)
    ends = sorted({*range(min(room + 1, len(tokens)), len(tokens), step), len(tokens)})
    counts = [end - (ends[i - 1] if i else 1) for i, end in enumerate(ends)]
    nats = -sum(log_probabilities(gpt, [tokens[max(0, end - room - 1) : end] for end in ends], counts, "sequence"))
    size = len(text.encode())
    data = {"bits_per_byte": nats / math.log(2) / size, "tokens": len(tokens) - 1, "bytes": size}
    return Answer("bits per byte: {bits_per_byte:.4f} ({tokens:,} tokens, {bytes:,} bytes)".format(**data), data)


TASKS = {"hellaswag": hellaswag, "bits-per-byte": bits_per_byte}


def run(argv: list[str]) -> Answer:
    flags = Parser(prog="evaluate.py", description=__doc__)
    flags.add_argument("task", choices=TASKS, help="what to score")
    flags.add_argument("--file", type=Path, required=True, help="hellaswag_val.jsonl, or a text")
    add_run(flags)
    options = flags.parse_args(argv)
    if not options.file.is_file():
        raise UsageError(f"no file {options.file}; hellaswag_val.jsonl is at github.com/rowanz/hellaswag")
    _, gpt, tokenizer = opened(options)
    try:
        return TASKS[options.task](gpt, tokenizer, options.file)
    except UnicodeDecodeError:
        raise UsageError(f"{options.file} is no UTF-8 text") from None


if __name__ == "__main__":
    sys.exit(command("evaluate.py", lambda: run(sys.argv[1:]), sys.argv))
