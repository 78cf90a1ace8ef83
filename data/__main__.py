"""Prepare and check corpora.

python -m data list                                    what there is
python -m data prepare sotu                            the default corpus as bytes, seconds
python -m data prepare sotu --tokenizer gpt2
python -m data prepare fineweb10B --tokenizer gpt2 --for gpt2-small:record     only the shards that this recipe needs
python -m data prepare mine --files a.txt b.jsonl      your own text
python -m data verify                                  every shard of every prepared corpus
"""

import argparse
import math
import sys
from pathlib import Path

from config import resolve
from data import corpora, shards, tokenizers
from engine.command import Answer, Parser, command
from engine.schedules import Course
from engine.spec import UsageError


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="data", description=__doc__)
    verbs = made.add_subparsers(dest="verb", required=True, parser_class=Parser)
    verbs.add_parser("list", help="the corpora and tokenizers")
    prepare = verbs.add_parser("prepare", help="download, tokenize and write shards")
    prepare.add_argument("corpus", help="a corpus, or a name for --files")
    prepare.add_argument("--tokenizer", default="bytes", help=f"{', '.join(tokenizers.TOKENIZERS)} (default: bytes)")
    prepare.add_argument("--files", type=Path, nargs="+", default=[], help="your own .txt, .jsonl or .parquet files")
    prepare.add_argument("--shards", type=int, default=1, help="fineweb10B: training shards of 100M tokens (default: 1)")
    prepare.add_argument("--for", dest="recipe", help="fineweb10B: as many shards as TRACK:TRICKS needs")
    verify = verbs.add_parser("verify", help="check shards against their headers and sha256")
    verify.add_argument("folders", type=Path, nargs="*", help="dataset folders (default: all)")
    for verb in (prepare, verify):
        verb.add_argument("--data-root", type=Path, default=Path("corpora"), help="folder of all corpora")
    return made


def shards_for(recipe: str) -> int:
    """Training shards of fineweb10B that `TRACK:TRICKS` reads; where they are not enough for it, all, which it will repeat."""
    track, _, words = recipe.partition(":")
    config, _, _ = resolve(["--track", track, "--tricks", words])
    tokens = Course(config).units_before(config.steps) * config.batch_tokens
    if config.align_documents:  # which leaves the ends of documents out: half as much again is chosen
        tokens += tokens // 2
    wanted = max(1, math.ceil((tokens + 1) / shards.SHARD_TOKENS))
    if wanted > corpora.FINEWEB_SHARDS:
        print(f"{recipe} reads {wanted} shards, there are {corpora.FINEWEB_SHARDS}: its data will repeat", flush=True)
    return min(wanted, corpora.FINEWEB_SHARDS)


def run(argv: list[str]) -> str:
    options = parser().parse_args(argv)
    if options.verb == "list":
        listed = [f"{name:12s}{corpus.summary}; {corpus.source}" for name, corpus in corpora.CORPORA.items()]
        words = "\n".join([*listed, f"tokenizers: {', '.join(tokenizers.TOKENIZERS)}"])
        return Answer(words, {name: corpus.summary for name, corpus in corpora.CORPORA.items()})
    if options.verb == "prepare":
        count = shards_for(options.recipe) if options.recipe else options.shards
        folder = corpora.prepare(options.corpus, options.tokenizer, options.data_root, files=options.files, shard_count=count)
        counts = {split: len(shards.Dataset(folder, split)) for split in ("train", "val")}
        return f"{folder}: {counts['train']:,} training and {counts['val']:,} validation tokens"
    folders = options.folders or sorted(p for p in options.data_root.glob("*-*") if p.is_dir())
    if not folders:
        raise UsageError(f"nothing prepared in {options.data_root}; run: ./run.sh data prepare sotu")
    problems = [problem for folder in folders for problem in shards.verify(folder)]
    return Answer("\n".join(problems) or f"{len(folders)} corpora, every shard as it should be", problems, int(bool(problems)))


def main(argv: list[str]) -> int:
    return command("data", lambda: run(argv), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
