"""Text from a trained model.

python sample.py --prompt "The state of the union" --tokens 300        from the newest run
python sample.py --run runs/cpu/record-s0-1a2b3c4d --stream
"""

from engine import checkpoint  # before torch  # isort: skip
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from config import DEFAULTS, only
from data import tokenizers
from engine.command import Parser, command
from engine.run_folder import found, intact, read_json
from engine.schedules import NO_RATES, Course
from engine.spec import UsageError
from layers.shape import ModelConfig
from model import GPT


def load_model(run: Path) -> tuple[GPT, dict]:
    """The trained model of a run folder, in eval mode on the CPU, and its config. Raises UsageError: no run, or untrained."""
    try:
        config = DEFAULTS | read_json(run / "config.json") | NO_RATES
        gpt, course = GPT(ModelConfig(**only(ModelConfig, config))), Course(SimpleNamespace(**config))
    except FileNotFoundError:
        raise UsageError(f"{run} holds no run; ./run.sh runs lists them") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{run / 'config.json'}: {error}") from None
    path = checkpoint.trained(run)
    checkpoint.load_weights(gpt, path)
    with intact(path):
        seconds = sum(map(sum, read_json(path / checkpoint.STATE)["progress"].get("stages", {}).values()))
        gpt.see(course.at(max(0, course.position(checkpoint.step_of(path) - 1, seconds))).windows)
    return gpt.eval(), config


def add_run(flags: Parser) -> None:
    """Flags that `opened` reads."""
    flags.add_argument("--run", type=Path, help="run folder of the trained model (default: the newest in runs/)")
    flags.add_argument("--data-root", type=Path, default=Path("corpora"), help="where the tokenizer is (default: corpora)")


def opened(options: argparse.Namespace) -> tuple[Path, GPT, tokenizers.Tokenizer]:
    """The run asked for or the one in runs/ that was trained last, its model, and its tokenizer; that is not where the run's
    config says: it may be a stranger's. Raises UsageError: there is none."""
    run = options.run or next((run for run in found(Path("runs")) if any((run / "checkpoints").glob("step-*"))), None)
    if run is None:
        raise UsageError("runs/ holds no trained model: ./run.sh trains one, --run names one elsewhere")
    if not options.run:
        print(f"the newest run: {run}", file=sys.stderr)
    gpt, config = load_model(run)
    with intact(run / "config.json"):
        known, most = tokenizers.TOKENIZERS.get(config["tokenizer"]), gpt.config.vocab_size
        if known and known.vocab_size > most:  # before its files are fetched
            raise UsageError(f"the tokenizer {known.name} has tokens that the model, with {most}, has not")
        return run, gpt, tokenizers.get(config["tokenizer"], options.data_root)


@torch.no_grad()
def generate(
    gpt: GPT, tokens: list[int], count: int, *, temperature: float, top_k: int, top_p: float, seed: int, vocabulary: int
) -> Iterator[int]:  # fmt: skip
    """`count` sampled tokens below `vocabulary`, each as it comes, that continue `tokens`. A full context keeps its last half.
    temperature 0: the likeliest token. top_k: sample among so many likeliest; 0: all. top_p: among the likeliest that have this
    probability together (nucleus sampling, arXiv 1904.09751); 1: all."""
    generator = torch.Generator().manual_seed(seed)
    room = gpt.config.sequence_length
    context = tokens[-room:]
    gpt.remember()
    for _ in range(count):
        if len(context) > room:
            context = context[-max(1, room // 2) :]
            gpt.remember()
        logits = gpt(torch.tensor([context]))[0, -1, :vocabulary].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            likeliest, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
            inside = likeliest.cumsum(-1) - likeliest < top_p  # what precedes a token has less than top_p together
            inside[top_k or len(inside) :] = False
            token = int(order[torch.multinomial(likeliest * inside, 1, generator=generator)])
        context.append(token)
        yield token


def parser() -> Parser:
    flags = Parser(description=__doc__)
    add_run(flags)
    flags.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    flags.add_argument("--tokens", type=int, default=300, help="tokens to add")
    flags.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    flags.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest; 0: all")
    flags.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest with this total probability")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--stream", action="store_true", help="print the text as it comes")
    return flags


def sample(argv: list[str]) -> str:
    options = parser().parse_args(argv)
    for name in ("tokens", "temperature", "top_k", "seed"):
        if not 0 <= (value := getattr(options, name)) <= 2**53:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0 and a usual number, got {value}")
    if not 0 < options.top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, got {options.top_p}")
    _, gpt, tokenizer = opened(options)
    try:
        start = [tokenizer.eot, *(int(t) for t in tokenizer.encode(options.prompt))]
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--prompt is no text of the tokenizer {tokenizer.name}: {error}") from None
    how = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    tokens, printed = start[1:], ""
    for token in generate(gpt, start, options.tokens, **how, vocabulary=tokenizer.vocab_size):
        tokens.append(token)
        if options.stream and not (options.json or options.quiet):
            # a character may be several tokens: until it is whole it ends with the replacement character
            text = tokenizer.decode(tokens).rstrip("\ufffd")
            print(text[len(printed) :], end="", flush=True)
            printed = text
    rest = tokenizer.decode(tokens)[len(printed) :]
    if printed:  # the line ends here too, though nothing may be left
        print(rest)
    return "" if printed else rest


def main(argv: list[str]) -> int:
    return command("sample.py", lambda: sample(argv), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
