"""Token shards on disk and the loader that reads them: all of `data` that training needs.

Format, as the speedrun community has it (llm.c, modded-nanogpt): 256 little-endian int32 header words (magic 20240520,
version 1, token count), then little-endian uint16 tokens; an end-of-text token *before* each document. Beside the
shards dataset.json: corpus, tokenizer, vocabulary size, source, and file, tokens and sha256 of every shard.
"""

import contextlib
import hashlib
import json
import operator
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.run_folder import atomic_write, file_hash, read_json
from engine.spec import UsageError

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_WORDS
SHARD_TOKENS = 100_000_000  # as the published FineWeb shards
TOKEN = np.dtype("<u2")
IGNORED = -100  # a target that no loss counts: what torch's cross_entropy leaves out
LOCAL = "local files: "  # how the source of one's own text begins
UNFINISHED = "unfinished"  # in the folder of a corpus that is being prepared
# Of a file's stat: what changes when somebody writes to it or puts another in its place
STAMP = operator.attrgetter("st_size", "st_mtime_ns", "st_ino")
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.bin")  # what dataset.json may name: files in its own folder


def dataset_folder(data_root: str | Path, corpus: str, tokenizer: str) -> Path:
    return Path(data_root) / f"{corpus}-{tokenizer}"


def repair(folder: Path) -> str:
    """The command that makes a dataset folder whole again, with the user's own words."""
    corpus, dash, tokenizer = folder.name.rpartition("-")
    words = f"run: ./run.sh data prepare {f'{corpus} --tokenizer ' if dash else ''}{tokenizer}"
    with contextlib.suppress(OSError, UsageError, KeyError):
        source = str(read_json(folder / "dataset.json")["source"])
        if source.startswith(LOCAL) and (names := re.findall(r"(.+?) \(sha256 \w+\)(?:, )?", source.removeprefix(LOCAL))):
            words += f" --files {shlex.join(names)}"
    return words + (f" --data-root {folder.parent}" if folder.parent != Path("corpora") else "")


def header(tokens: int) -> bytes:
    words = np.zeros(HEADER_WORDS, dtype="<i4")
    words[:3] = MAGIC, VERSION, tokens
    return words.tobytes()


def chunks(documents: Iterable[np.ndarray], eot: int, size: int) -> Iterator[np.ndarray]:
    """The token stream, end-of-text before each document, in pieces of `size` tokens; the last may be shorter."""
    held, count = [], 0
    mark = np.array([eot], dtype=TOKEN)
    for document in documents:
        for piece in (mark, np.asarray(document, dtype=TOKEN)):
            while count + len(piece) >= size:
                yield np.concatenate([*held, piece[: size - count]])
                piece, held, count = piece[size - count :], [], 0
            held.append(piece)
            count += len(piece)
    if count:
        yield np.concatenate(held)


def write(
    folder: Path, corpus: str, split: str, documents: Iterable[np.ndarray], eot: int, shard_tokens: int = SHARD_TOKENS
) -> list[dict[str, Any]]:
    """Write one split ("train" or "val") as shards `<corpus>_<split>_<index>.bin`; returns its entries for dataset.json.
    documents: token arrays, each below 65,536, without end-of-text marks. A shard that is there and equal is left alone, so an
    interrupted preparation repeats only the tokenizing."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, tokens in enumerate(chunks(documents, eot, shard_tokens)):
        path = folder / f"{corpus}_{split}_{index:06d}.bin"
        content = header(len(tokens)) + tokens.tobytes()
        digest = hashlib.sha256(content).hexdigest()
        if not path.exists() or file_hash(path) != digest:
            atomic_write(path, content)
        written.append({"file": path.name, "tokens": len(tokens), "sha256": digest})
    return written


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """dataset.json, written last: the folder is no longer unfinished."""
    atomic_write(folder / "dataset.json", json.dumps(manifest, indent=1))
    (folder / UNFINISHED).unlink(missing_ok=True)


def read(path: Path) -> np.ndarray:
    """Tokens of one shard, memory-mapped uint16. Raises UsageError: missing, no shard, or not as long as its header says."""
    if not path.is_file():
        raise UsageError(f"shard {path} is missing; {repair(path.parent)}")
    size = path.stat().st_size
    words = np.fromfile(path, dtype="<i4", count=HEADER_WORDS) if size >= HEADER_BYTES else np.zeros(HEADER_WORDS)
    if words[0] != MAGIC or words[1] != VERSION:
        raise UsageError(f"shard {path} is damaged: its header is not that of a version {VERSION} shard; {repair(path.parent)}")
    tokens = int(words[2])
    if size != HEADER_BYTES + tokens * TOKEN.itemsize:
        there = (size - HEADER_BYTES) // TOKEN.itemsize
        raise UsageError(f"shard {path} is truncated or damaged: {there} tokens of {tokens}; {repair(path.parent)}")
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(tokens,)) if tokens else np.zeros(0, TOKEN)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """dataset.json, or None when there is none (shards that somebody else made). Raises UsageError: it is not what
    `write_manifest` wrote, or the preparation has not ended."""
    if (folder / UNFINISHED).exists():
        raise UsageError(f"the preparation of {folder} has not ended; {repair(folder)}")
    try:
        manifest = read_json(folder / "dataset.json")
        splits, most = [manifest["splits"][split] for split in ("train", "val")], manifest.get("vocab_size", 2**16)
        listed = [entry for split in splits for entry in split]
        numbers = [manifest[key] for key in ("vocab_size", "eot") if key in manifest] + [entry["tokens"] for entry in listed]
        fine = all(SHARD_NAME.fullmatch(entry["file"]) and len(entry["sha256"]) == 64 for entry in listed)
        fine &= all(type(n) is int and 0 <= n < 2**31 for n in numbers) and all(splits) and manifest.get("eot", 0) < most
        if not fine or len({entry["file"] for entry in listed}) < len(listed):
            raise ValueError
        return manifest
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UsageError(f"{folder / 'dataset.json'} is damaged; {repair(folder)}") from None


def entries(manifest: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of all shards."""
    return [entry for split in manifest["splits"].values() for entry in split] if manifest else []


def damage(path: Path, entry: dict[str, Any]) -> str:
    """What is wrong with a shard: by its header, and by what `entry`, of dataset.json, says of it. Empty: nothing."""
    try:
        tokens = len(read(path))
    except UsageError as error:
        return str(error)
    if entry.get("tokens", tokens) != tokens:
        return f"shard {path} has {tokens} tokens, dataset.json says {entry['tokens']}; {repair(path.parent)}"
    if "sha256" in entry and file_hash(path) != entry["sha256"]:
        return f"shard {path} is damaged: its sha256 differs from dataset.json; delete it, then {repair(path.parent)}"
    return ""


def verify(folder: Path) -> list[str]:
    """Problems found in a dataset folder, one line each; hashes are checked where dataset.json has them."""
    listed = entries(read_manifest(folder)) or [{"file": path.name} for path in sorted(folder.glob("*.bin"))]
    if not listed:
        return [f"no shards in {folder}; {repair(folder)}"]
    return [problem for entry in listed if (problem := damage(folder / entry["file"], entry))]


class Dataset:
    """All shards of one split as a single stream of `len(self)` tokens. loss_tokens: of each sequence only the last so many
    targets count; the others are IGNORED. 0: all count. Raises UsageError: the split has no shards, or damaged ones."""

    def __init__(self, folder: Path | str, split: str, loss_tokens: int = 0):
        self.folder, self.split, self.loss_tokens = Path(folder), split, loss_tokens
        manifest = read_manifest(self.folder)
        listed = manifest["splits"][split] if manifest else []
        self.paths = [self.folder / entry["file"] for entry in listed] or sorted(self.folder.glob(f"*_{split}_*.bin"))
        if not self.paths:
            raise UsageError(f"no {split} shards in {self.folder}; {repair(self.folder)}")
        self.shards = [read(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.opened = [STAMP(path.stat()) for path in self.paths]
        self.entries = listed if manifest else [{"tokens": len(shard)} for shard in self.shards]
        self.vocab_size, self.end_of_text = ((manifest or {}).get(key) for key in ("vocab_size", "eot"))  # None: not known
        # the same on every machine that holds the same data: no paths, no times
        self.fingerprint = hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()[:16]
        self.proof: Future | None = None

    def prove(self, vocab_size: int) -> None:
        """Begin to `check` in the background."""
        self.proof = ThreadPoolExecutor(1, thread_name_prefix="proof").submit(self.check, vocab_size)

    def check(self, vocab_size: int) -> "Dataset":
        """Read every shard. Raises UsageError: its bytes are not those of dataset.json, or a token is not in the vocabulary."""
        for path, shard, entry in zip(self.paths, self.shards, self.entries, strict=True):
            if problem := damage(path, entry):
                raise UsageError(problem)
            if (largest := int(shard.max(initial=0))) >= vocab_size:
                raise UsageError(f"{path} holds token {largest}, the vocabulary has {vocab_size}: another tokenizer made it")
        return self

    def shared(self, other: "Dataset") -> str:
        """A warning, if a shard is in the other split too: what is learned by heart would count as learned."""
        mine, theirs = ({entry.get("sha256") for entry in dataset.entries} for dataset in (self, other))
        both = mine & theirs - {None}
        return f"{len(both)} of {len(other.entries)} validation shards are training shards too" if both else ""

    def problem(self, wait: float | None = None) -> str | None:
        """What is wrong with the shards, as far as is known after `wait` seconds (None: until all are read)."""
        for path, then in zip(self.paths, self.opened, strict=True):
            if not path.exists() or STAMP(path.stat()) != then:
                return f"shard {path} has changed since this run opened it; {repair(self.folder)}"
        try:
            _ = self.proof and self.proof.result(wait)
        except (TimeoutError, UsageError) as error:
            return str(error) or None  # not read to the end yet: a TimeoutError without words
        return None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def documents(self, end_of_text: int) -> np.ndarray:
        """Where documents begin: [n] int64. Reads the whole split. Raises UsageError: none do, or with another token."""
        if (eot := self.end_of_text) not in (None, end_of_text):
            raise UsageError(f"documents in {self.folder} begin with token {eot}: add --end-of-text {eot}")
        pairs = zip(self.ends, self.shards, strict=True)
        starts = np.concatenate([end - len(shard) + np.flatnonzero(shard == end_of_text) for end, shard in pairs])
        if not len(starts):
            raise UsageError(f"{self.folder} has no token {end_of_text} before its documents: they cannot be told apart")
        return starts

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), across shard borders: [length] uint16."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        offset, pieces = start - int(self.ends[shard]) + len(self.shards[shard]), []
        while length:
            pieces.append(self.shards[shard][offset : offset + length])
            length -= len(pieces[-1])
            shard, offset = shard + 1, 0
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def batch(self, starts: Iterable[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the sequences at `starts`: two [sequences, length] int64, targets one token later."""
        windows = torch.from_numpy(np.stack([self.window(int(s), length + 1) for s in starts]).astype(np.int64))
        tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].clone()  # of one row, both would be views of the same
        if self.loss_tokens:
            targets[:, : -self.loss_tokens] = IGNORED
        return tokens, targets


def validation_starts(dataset: Dataset, sequence_length: int, tokens: int, spread: bool) -> list[int]:
    """Where the fixed validation sequences begin, `tokens` to predict in all. spread: evenly over the whole split (a corpus in
    the order of its years would else be judged by its oldest); otherwise at its beginning, as the speedrun's rule for FineWeb.
    Raises UsageError: the split has too few tokens, or not a single sequence is asked for."""
    wanted, available = tokens // sequence_length, (len(dataset) - 1) // sequence_length
    if not 0 < wanted <= available:
        there = f"the {len(dataset)} validation tokens in {dataset.folder}"
        raise UsageError(f"--val-tokens {tokens} must give 1 to {available} sequences of {sequence_length} from {there}")
    return [sequence_length * (i * available // wanted if spread else i) for i in range(wanted)]


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at `indices` only: [n] int64 -> [n] int64. A balanced Feistel
    network over the next even number of bits, walked until it lands below `size` (cycle walking, Black and Rogaway 2002): any
    position of any epoch in O(1), where a shuffled list would cost memory and time at every start and epoch."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([key, size]).generate_state(4, np.uint64)
    result = indices.astype(np.uint64)
    pending = np.ones(len(result), dtype=bool)
    while pending.any():
        left, right = result[pending] >> np.uint64(half), result[pending] & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0xBF58476D1CE4E5B9)  # the mixing steps of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(31)) & mask)
        result[pending] = left << np.uint64(half) | right
        pending = result >= size
    return result.astype(np.int64)


def aligned(documents: np.ndarray, tokens: int, length: int) -> np.ndarray:
    """Where sequences of `length` inputs begin that begin with a document: [n] int64 (modded-nanogpt #26).

    After a sequence the rest of the document that it ends in is left out, unless this document fills all of the sequence: then
    the next one goes on with it. (modded-nanogpt leaves that out too; of corpora with long documents little would stay.)
    documents: where they begin in a stream of `tokens`, ascending.
    """
    ends = np.append(documents[1:], tokens)
    pieces = -(-(ends - documents) // length)  # sequences that hold a document which begins one
    after = np.searchsorted(documents, documents + pieces * length).tolist()
    begun, at = [], 0
    while at < len(documents):
        begun.append(at)
        at = after[at]
    documents, pieces = documents[begun], pieces[begun]
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(documents, pieces) + length * within
    return starts[starts + length < tokens]  # each needs a target more


class Loader:
    """Batches of sequences whose content depends on (seed, position) alone, whatever the number of ranks.

    The stream of N x T + 1 tokens is N sequences of T inputs; or, with `align`, the token before each document, N that are
    `aligned` to documents. Position p of a run is sequence p mod N of epoch p div N, in an order shuffled anew each epoch. Step
    s takes positions s B ... (s + 1) B - 1, each rank its own part. B is `batch_sequences`; where steps grow, `before(s)` says
    how many batches of B come before step s.
    """

    def __init__(
        self, dataset: Dataset, sequence_length: int, batch_sequences: int, *, seed: int = 0, shuffle: bool = True,
        rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu",
        before: Callable[[int], int] = lambda step: step, align: int | None = None,
    ):  # fmt: skip
        self.dataset, self.sequence_length, self.batch_sequences = dataset, sequence_length, batch_sequences
        self.seed, self.shuffle, self.device = seed, shuffle, torch.device(device)
        self.rank, self.share, self.before = rank, batch_sequences // world_size, before
        self.sequences, self.aligned = (len(dataset) - 1) // sequence_length, None
        if align is not None:
            self.aligned = aligned(dataset.documents(align), len(dataset), sequence_length)
            self.sequences = len(self.aligned)
        if self.sequences < 1:
            raise UsageError(f"{dataset.folder} has too few {dataset.split} tokens for a sequence of {sequence_length}")
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self.ahead: tuple[int, Future] | None = None

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """First token of the sequences at these positions of the run: [n] int64."""
        epochs, within = np.divmod(positions, self.sequences)
        if self.shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                within[here] = permute(within[here], self.sequences, self.seed * 100_003 + int(epoch))
        return within * self.sequence_length if self.aligned is None else self.aligned[within]

    def epochs(self, steps: int) -> float:
        """Passes over the corpus after `steps` steps."""
        return self.before(steps) * self.batch_sequences / self.sequences

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets at `step`: two [sequences of the step / world_size, T] int64, on the CPU. Pure."""
        share = self.share * (self.before(step + 1) - self.before(step))
        first = self.before(step) * self.batch_sequences + self.rank * share
        return self.dataset.batch(self.starts(np.arange(first, first + share)), self.sequence_length)

    def _fetch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch(step)
        return tuple(t.pin_memory() for t in batch) if self.device.type == "cuda" else batch

    def next(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`batch(step)` on the device; step + 1 is gathered in the background meanwhile."""
        held = self.ahead[1] if self.ahead and self.ahead[0] == step else self.worker.submit(self._fetch, step)
        batch = held.result()
        self.ahead = step + 1, self.worker.submit(self._fetch, step + 1)
        return tuple(t.to(self.device, non_blocking=True) for t in batch)
