"""Text from a trained model.

python sample.py --run runs/cpu/record-s0-1a2b3c4d --prompt "The state of the union" --tokens 300
"""

from engine import checkpoint  # before torch  # isort: skip
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from config import FIELDS, only
from data import tokenizers
from engine.command import Parser, command
from engine.run_folder import read_json
from engine.schedules import Course
from engine.spec import UsageError
from layers.shape import ModelConfig
from model import GPT


def load_model(run: Path) -> tuple[GPT, dict]:
    """The trained model of a run folder, in eval mode on the CPU, and the run's config. Raises UsageError: no such run, or it
    has no checkpoint yet."""
    rates = {"schedule": "constant", "momentum_schedule": "keep"}  # they do not matter here, and may name a stranger's code
    try:
        config = {name: field.default for name, field in FIELDS.items()} | read_json(run / "config.json") | rates
        gpt, course = GPT(ModelConfig(**only(ModelConfig, config))), Course(SimpleNamespace(**config))
    except FileNotFoundError:
        raise UsageError(f"{run} holds no run; runs are listed by: ls runs/*") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{run / 'config.json'}: {error}") from None
    path, passed = checkpoint.newest(run / "checkpoints")
    if path is None:
        raise UsageError("; ".join([f"{run} holds no trained model", *passed]))
    checkpoint.load_weights(gpt, path)
    gpt.see(course.at(max(0, checkpoint.step_of(path) - 1)).windows)
    return gpt.eval(), config


@torch.no_grad()
def generate(
    gpt: GPT, tokens: list[int], count: int, temperature: float, top_k: int, seed: int, vocabulary: int
) -> list[int]:  # fmt: skip
    """`tokens` continued by `count` sampled ones below `vocabulary`; the context is the last `sequence_length` of them. At
    temperature 0 the likeliest token is taken. top_k: sample among so many likeliest; 0: all."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(count):
        context = torch.tensor([tokens[-gpt.config.sequence_length :]])
        logits = gpt(context)[0, -1, :vocabulary].double()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        if top_k:
            floor = logits.topk(min(top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < floor, float("-inf"))
        tokens.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return tokens


def parser() -> Parser:
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--run", type=Path, required=True, help="run folder of the trained model")
    flags.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    flags.add_argument("--tokens", type=int, default=300, help="tokens to add")
    flags.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    flags.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest; 0: all")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--data-root", type=Path, default=Path("corpora"), help="of the tokenizer's files (default: corpora)")
    return flags


def sample(argv: list[str]) -> str:
    options = parser().parse_args(argv)
    for name in ("tokens", "temperature", "top_k", "seed"):
        if not 0 <= (value := getattr(options, name)) <= 2**53:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0 and a usual number, got {value}")
    gpt, config = load_model(options.run)
    tokenizer = tokenizers.get(config["tokenizer"], options.data_root)  # not where the run folder says: it may be a stranger's
    try:
        start = [tokenizer.eot, *(int(t) for t in tokenizer.encode(options.prompt))]
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--prompt is no text of the tokenizer {tokenizer.name}: {error}") from None
    if max(start) >= gpt.config.vocab_size:
        raise UsageError(f"the tokenizer {tokenizer.name} has tokens that the model, with {gpt.config.vocab_size}, has not")
    tokens = generate(gpt, start, options.tokens, options.temperature, options.top_k, options.seed, tokenizer.vocab_size)
    return tokenizer.decode(tokens[1:])


def main(argv: list[str]) -> int:
    return command("sample.py", lambda: sample(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
