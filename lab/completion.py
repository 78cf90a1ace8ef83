"""Tab completion for ./run.sh, from the verbs' own parsers and the registries; completion.bash has the rest.

./run.sh completion bash > FILE          then, in ~/.bashrc: source FILE
"""

import argparse
import contextlib
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import optimizers
import tricks
from engine.command import Parser, command
from engine.run_folder import ROOT
from engine.schedules import SCHEDULES

# part of what a flag, its metavar or a verb is called -> the names that it takes
NAMES = {"optimizer": optimizers.OPTIMIZERS, "schedule": SCHEDULES, "track": tricks.TRACKS}
NAMES |= {kind: [*tricks.TRICKS, "baseline", "record"] for kind in ("trick", "recipe", "base")}


def parser_of(place: str, *words: str) -> argparse.ArgumentParser:
    """Of a file or module with these words: it is run until it would parse them."""
    stop = mock.patch.object(argparse.ArgumentParser, "parse_known_args", autospec=True, side_effect=SystemExit)
    with stop as parse, mock.patch.object(sys, "argv", [place, *words]), contextlib.suppress(SystemExit):
        runpy.run_module(place.removesuffix(".py"), run_name="__main__")
    return parse.call_args.args[0]


def words_of(typed: str, parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """What was typed, a verb or a verb and a flag -> what may follow."""
    words: dict[str, list[str]] = {typed: []}
    for action in parser._actions:
        called = f"{action.dest} {action.metavar} {'' if action.option_strings else typed}".lower()
        values = [*(action.choices or next((names for kind, names in NAMES.items() if re.search(rf"\b{kind}", called)), []))]
        words[typed] += action.option_strings or values
        words |= {f"{typed} {flag}": values for flag in action.option_strings}
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                words |= words_of(f"{typed} {name}", below)
    return words


def run(argv: list[str]) -> str:
    """The script. run.sh names the verbs and their files; the description of a verb, those below it."""
    flags = Parser(prog="./run.sh completion", description=__doc__)
    flags.add_argument("shell", choices=("bash",))
    flags.parse_args(argv)
    text = (ROOT / "run.sh").read_text()
    words = {"": re.findall(r"^#   \./run\.sh ([a-z]+) ", text, re.MULTILINE)}
    for verb, place in re.findall(r'^  (\w+)\)(?:(?!;;).)*?run \S+ (?:-m )?(\S+) [^\n]*"\$@"', text, re.MULTILINE | re.DOTALL):
        parser = parser_of(place)
        words |= words_of(verb, parser)
        for below in re.findall(rf"^ *(?:python|\./run\.sh) .*?\b{verb}(?:\.py)? ([a-z]\w+)", parser.description, re.MULTILINE):
            words[verb].append(below)
            if (own := parser_of(place, below)).prog != parser.prog:
                words |= words_of(f"{verb} {below}", own)
    lines = [f'"{typed}") echo "{" ".join(dict.fromkeys(follow))}" ;;' for typed, follow in words.items() if follow]
    return Path(__file__).with_suffix(".bash").read_text().rstrip().replace("# WORDS", "\n    ".join(lines))


if __name__ == "__main__":
    sys.exit(command("completion", lambda: run(sys.argv[1:]), sys.argv))
