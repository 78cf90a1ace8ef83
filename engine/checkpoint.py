"""Checkpoints: exact, verified, written while training goes on, read on any number of ranks.

    checkpoints/step-00001000/
        model.safetensors            the weights that are evaluated, alone: any safetensors reader takes them
        state/shard-*.safetensors    optimizer state and random generators, each tensor once, from the rank that holds it
        state.json                   everything that is not a tensor
        DONE                         size and sha256 of every other file

After llm.c's DONE files and torchtitan's rule that a resumed run has the same losses. torch.distributed.checkpoint writes
safetensors: its usual form has a pickle, and a stranger's pickle runs code.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.ranks import place
from engine.run_folder import atomic_write, file_hash, intact, read_json, settings_hash
from engine.spec import UsageError

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # plain python is one of our ways to run

State = dict[str, Any]
WEIGHTS, STATE, DONE = "model.safetensors", "state.json", "DONE"
NAME = re.compile(r"step-(\d{8,})")
PLAIN = (bool, int, float, str)
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
KINDS = dict(step=int, ranks=int, log_bytes=int, progress=dict, optimizer=dict, rng=list, config=str, data=str, source=str)
DTYPES = dict(F64="float64", F32="float32", F16="float16", BF16="bfloat16", BOOL="bool", U8="uint8", I8="int8")
DTYPES |= dict(I16="int16", I32="int32", I64="int64")  # safetensors' names -> torch's
FILE = re.compile(r"(state/)?[A-Za-z0-9_-][A-Za-z0-9._-]*")  # what DONE may list: nothing outside the folder


def pack(value: Any, path: str, tensors: dict[str, Tensor], blobs: dict[str, bytes]) -> Any:
    """Nested dicts, sequences, sets, arrays and plain values as JSON. Tensors go into `tensors` by their path; bytes, which may
    be a pickle, into `blobs` by their hash, which alone is stored. Raises TypeError: anything else."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return {"numpy": pack(torch.from_numpy(np.array(value)), path, tensors, blobs), "scalar": isinstance(value, np.generic)}
    if isinstance(value, dict):
        for key in value:
            if not all(isinstance(part, PLAIN) for part in (key if isinstance(key, tuple) else (key,))):
                raise TypeError(f"state has a key of type {type(key).__name__}: {key!r}")
        return {"dict": [[k, pack(v, f"{path}/{k}", tensors, blobs)] for k, v in value.items()]}
    for kind, cls in SEQUENCES.items():
        if isinstance(value, cls):
            items = sorted(value, key=repr) if kind.endswith("set") else value
            packed = {kind: [pack(v, f"{path}/{i}", tensors, blobs) for i, v in enumerate(items)]}
            return packed | ({"maxlen": value.maxlen} if kind == "deque" else {})
    if isinstance(value, bytes):
        blobs[digest := hashlib.sha256(value).hexdigest()] = value
        return {"bytes": digest}
    if isinstance(value, torch.dtype):
        return {"torch.dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, PLAIN):
        return {"value": value}
    raise TypeError(f"state {path} is a {type(value).__name__}: a checkpoint holds tensors and plain values alone")


def unpack(packed: Any, tensors: dict[str, Tensor], own: dict[str, bytes]) -> Any:
    """What `pack` took apart. own: a fresh optimizer's bytes by their hash. Raises UsageError: others were stored."""
    (kind, content), *_ = packed.items()
    if kind == "tensor":
        return tensors[content].reshape(packed["shape"])
    if kind == "numpy":
        array = unpack(content, tensors, own).numpy()
        return array[()] if packed["scalar"] else array
    if kind == "dict":
        return {tuple(k) if isinstance(k, list) else k: unpack(v, tensors, own) for k, v in content}
    if kind in SEQUENCES:
        items = [unpack(v, tensors, own) for v in content]
        return deque(items, packed["maxlen"]) if kind == "deque" else SEQUENCES[kind](items)
    if kind == "bytes" and content not in own:
        raise UsageError("the optimizer's state has bytes that may be code, and a fresh one has others: they are not restored")
    return own[content] if kind == "bytes" else getattr(torch, content) if kind == "torch.dtype" else content


def merged(ranks: list[Any]) -> Any:
    """Packed states of all ranks as one: dicts united key by key, everything else as the first rank has it."""
    if "dict" not in ranks[0]:
        return ranks[0]
    united: dict[str, tuple[Any, list[Any]]] = {}
    for key, value in itertools.chain.from_iterable(packed["dict"] for packed in ranks):
        united.setdefault(json.dumps(key), (key, []))[1].append(value)
    return {"dict": [[key, merged(values)] for key, values in united.values()]}


def only(packed: Any, own: Any) -> Any:
    """`packed` without the blocks (optimizers.matrix) that the packed state `own` has no part in."""
    if "dict" not in packed:
        return packed
    here, pairs = {json.dumps(k): v for k, v in own.get("dict", [])} if own else {}, []
    for key, value in packed["dict"]:
        inner = here.get(json.dumps(key))
        if key == "blocks" and inner is not None:
            mine = [k for k, _ in inner["dict"]]
            value = {"dict": [pair for pair in value["dict"] if pair[0] in mine]}
        pairs.append([key, only(value, inner)])
    return {"dict": pairs}


def references(packed: Any) -> Iterator[dict[str, Any]]:
    """The tensors of a packed state: {"tensor": path, "shape", "dtype"}. Raises ValueError or the like: not `pack`'s."""
    (kind, content), *_ = packed.items()
    if kind == "tensor":
        yield packed
    elif kind not in ("value", "bytes", "numpy", "dict", "torch.dtype", *SEQUENCES):
        raise ValueError(kind)
    elif kind == "torch.dtype" and content not in DTYPES.values():
        raise ValueError(content)
    elif kind in ("numpy", "dict", *SEQUENCES):
        for value in [content] if kind == "numpy" else [v for _, v in content] if kind == "dict" else content:
            yield from references(value)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a checkpoint, or what stands in its place. Renamed first: half deleted it must not look whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    away = path.with_name(f".{path.name.strip('.').removesuffix('.tmp')}.away.tmp")
    path.rename(away)
    shutil.rmtree(away)


def files(folder: Path) -> list[str]:
    """All files in a checkpoint but DONE, by their names relative to it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() and p.name != DONE)


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: every byte is as a run wrote it."""
    if any(p.is_symlink() or not (p.is_dir() or p.is_file()) for p in (folder, *folder.rglob("*"))):
        return "holds links or pipes"
    if not (folder / DONE).exists():
        return "was not finished"
    try:
        listed = read_json(folder / DONE)["files"]
        if not all(map(FILE.fullmatch, listed)):
            return f"{DONE} lists files outside the folder"
        if sorted(listed) != files(folder):
            return f"does not hold the files that {DONE} lists"
        for name, (size, digest) in listed.items():
            if (folder / name).stat().st_size != size or file_hash(folder / name) != digest:
                return f"{name} is damaged"
        return misfit(folder)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, SafetensorError, RecursionError) as error:
        return f"{DONE}, {STATE} or a file of tensors is damaged ({type(error).__name__})"


def misfit(folder: Path) -> str | None:
    """What is wrong with a state though its files are as they were written."""
    state = read_json(folder / STATE)
    if wrong := [key for key, kind in KINDS.items() if type(state.get(key)) is not kind]:
        return f"{STATE} has no {wrong[0]}"
    if not state["step"] == state["progress"]["step"] == step_of(folder) or state["log_bytes"] < 0:
        return f"{STATE} is of another step"
    progress = dict(skipped=0, process_time=0, last_val=None, stages={}, reached=None) | state["progress"]  # of train_gpt.py
    reached = progress["reached"] or {"steps": 0, "time": 0}
    numbers = [progress["skipped"], progress["process_time"], progress["last_val"] or 0]
    numbers += [*itertools.chain(*progress["stages"].values()), *map(reached.get, ("steps", "time"))]
    if not all(type(x) in (int, float) and x >= 0 for x in numbers):
        return f"{STATE} has a progress that no run makes"
    wanted = {r["tensor"]: (r["shape"] or [1], r["dtype"]) for r in references(state["optimizer"])}
    for rank, (i, size) in itertools.product(range(state["ranks"]), enumerate(state["rng"])):
        wanted[f"rng/{rank}/{i}"] = [size], "uint8"
    stored = {}
    for shard in (folder / WEIGHTS, *(folder / "state").glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  # it is no dict
            stored |= {key: (part.get_shape(), DTYPES.get(part.get_dtype())) for key, part in slices.items()}
    if differs := sorted(key for key, about in wanted.items() if stored.get(key) != about):
        return f"{STATE} and the tensors beside it disagree on {differs[0]}"
    return None


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def listing(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, finished or not."""
    return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), key=step_of, reverse=True)


def newest(folder: Path, log_bytes: float = math.inf, steps: float = math.inf) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint within these steps, if possible within these bytes of a log; a line for each passed over."""
    passed, whole = [], None
    for path in listing(folder):
        if not (problem := damage(path) or ("" if step_of(path) <= steps else f"the run has {steps} steps")):
            if read_json(path / STATE)["log_bytes"] <= log_bytes:
                return path, passed
            whole, problem = whole or path, "log.jsonl ends before it"
        passed.append(f"checkpoint {path} passed over: {problem}")
    return whole, passed


def trained(run: Path) -> Path:
    """The newest intact checkpoint of a run folder. Raises UsageError: it has none."""
    path, passed = newest(run / "checkpoints")
    if path is None:
        raise UsageError("; ".join([f"{run} holds no trained model", *passed]))
    return path


def branching_point(folders: Iterable[Path], settings: dict[str, Any], shared: Callable[[int], int]) -> Path | None:
    """The newest checkpoint of the runs in `folders` that a run with these settings would have written too: only the length
    differs, and what is scheduled was the same until then. So a stable phase is trained once for several cool-downs. shared:
    length of the other run, steps -> the first steps that both have in common. Raises UsageError: a run of other settings."""
    usable: list[Path] = []
    for folder in folders:
        try:
            other = read_json(folder / "config.json")
        except (OSError, UsageError):
            raise UsageError(f"--branch {folder}: there is no run") from None
        if settings_hash(other, ("steps",)) != settings_hash(settings, ("steps",)):
            raise UsageError(f"--branch {folder}: it differs from this run in more than its steps")
        with intact(folder / "config.json"):
            most = shared(other["steps"])
        usable += [p for p in listing(folder / "checkpoints") if step_of(p) <= most and damage(p) is None][:1]
    return max(usable, key=step_of, default=None)


def seed(number: int) -> None:
    """Seed all generators that training draws from: torch's, and those that optimizers of others take."""
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def generators(device: torch.device) -> list[Tensor]:
    """Their states: [bytes] uint8 each, on all ranks as long."""
    kind, words, *more = np.random.get_state()
    of_others = json.dumps([random.getstate(), [kind, words.tolist(), *more]]).ljust(1 << 14).encode()
    states = [torch.get_rng_state(), torch.frombuffer(bytearray(of_others), dtype=torch.uint8)]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_generators(states: list[Tensor], device: torch.device) -> None:
    """Raises UsageError: they are no states of these generators."""
    with intact("the checkpoint's state of the random generators"):
        torch.set_rng_state(states[0])
        (version, words, spare), of_numpy = json.loads(bytes(states[1].tolist()))
        random.setstate((version, tuple(words), spare))
        np.random.set_state(tuple(of_numpy))
        if device.type == "cuda" and len(states) > 2:
            torch.cuda.set_rng_state(states[2], device)


def load_weights(gpt: nn.Module, path: Path) -> None:
    """Copy a checkpoint's weights into `gpt`, in place. Raises UsageError: no safetensors file, or another model's weights."""
    try:
        saved = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path / WEIGHTS} cannot be read: {error}") from None
    here, there = ({name: w.shape for name, w in weights} for weights in (gpt.named_parameters(), saved.items()))
    if odd := sorted(name for name in here | there if here.get(name) != there.get(name)):
        raise UsageError(f"{path / WEIGHTS} holds another model: {odd[0]} differs")
    gpt.load_state_dict(saved, strict=False)  # strict would miss the second name of a tied weight


class Checkpoints:
    """The checkpoints of one run. Every rank, all of which see the same folder, calls save, wait and load at the same steps.
    save() copies the state; a thread writes it, with collectives of its own (a gloo group). origin: hashes of the run's config,
    data and source; `load` refuses others. keep: so many, the newest. milestone: steps between those that are kept for good."""

    def __init__(self, folder: Path, origin: dict[str, str] | None = None, keep: int = 2, milestone: int = 0):
        import torch.distributed.checkpoint as dcp  # here: two seconds that --help can do without

        self.dcp = dcp
        self.folder, self.origin, self.keep, self.milestone = folder, origin or {}, keep, milestone
        self.facts: list[dict[str, float]] = []  # what `finished` hands out
        self.rank, self.ranks = place()
        self.group = dist.new_group(backend="gloo") if self.ranks > 1 else None
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        self.copies: dict[str, Tensor] = {}  # of the last save, written over by the next: new memory costs more than a copy

    def save(self, step: int, gpt: nn.Module, optimizer: State, rng: list[Tensor], extra: State, alone: bool = False) -> None:
        """Copy the state and begin to write it, once the checkpoint before is written. optimizer: this rank's state_dict, whose
        `blocks` (optimizers.matrix) other ranks may hold in part. rng: states of this rank's generators. extra: plain values of
        rank 0, which `load` returns. alone: leave out an optimizer whose state cannot be stored. Raises UsageError: it cannot;
        OSError: the checkpoint before could not be written, such as to a full disk."""
        begin = time.perf_counter()
        self.wait()
        packed, tensors = self.packed(optimizer, alone)
        shared = [packed] * self.ranks
        if self.group:
            dist.all_gather_object(shared, packed, group=self.group)
        # what several ranks hold is alike: each writes its part of that, counted out in the same order
        holders: dict[str, list[int]] = {}
        for rank, structure in enumerate(shared):
            for reference in references(structure):
                holders.setdefault(reference["tensor"], []).append(rank)
        mine = {k: tensors[k] for i, (k, by) in enumerate(holders.items()) if by[i % len(by)] == self.rank}
        mine |= {f"rng/{self.rank}/{i}": state for i, state in enumerate(rng)}
        mine |= {f"model/{k}": v for k, v in gpt.named_parameters()} if self.rank == 0 else {}
        self.copies = {k: self._copy(k, v) for k, v in mine.items()}
        if any(v.device.type == "cuda" for v in mine.values()):
            torch.cuda.synchronize()
        about = dict(step=step, ranks=self.ranks, rng=[len(state) for state in rng], optimizer=merged(shared))
        state = json.dumps(extra | self.origin | about)  # now: training goes on
        self.pending = self.worker.submit(self._write, step, state, time.perf_counter() - begin)

    def packed(self, optimizer: State, alone: bool) -> tuple[Any, dict[str, Tensor]]:
        """An optimizer's state by `pack`, and its tensors. alone, UsageError: as `save` has them."""
        tensors: dict[str, Tensor] = {}
        try:
            return pack(optimizer, "optimizer", tensors, {}), tensors
        except TypeError as error:
            if not alone:
                raise UsageError(f"{error}; --checkpoint-minutes 0 trains without, and keeps the weights alone") from None
            return {"dict": []}, {}

    def _copy(self, name: str, value: Tensor) -> Tensor:
        old = self.copies.get(name)
        if old is None or old.shape != value.shape or old.dtype != value.dtype:
            old = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
        return old.copy_(value.detach(), non_blocking=True)

    def _write(self, step: int, state: str, blocked: float) -> None:
        begin = time.perf_counter()
        name = f"step-{step:08}"
        temporary, final = self.folder / f".{name}.tmp", self.folder / name
        own = {k: v.reshape(1) if v.dim() == 0 else v for k, v in self.copies.items() if not k.startswith("model/")}
        writer = self.dcp.HuggingFaceStorageWriter(str(temporary / "state"), save_distributed=True)
        self.dcp.save(own, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        if self.rank:
            return
        weights = {k.removeprefix("model/"): v for k, v in self.copies.items() if k.startswith("model/")}
        save_file(weights, temporary / WEIGHTS)
        sync(temporary / WEIGHTS)
        atomic_write(temporary / STATE, state)
        listed = {f: [(temporary / f).stat().st_size, file_hash(temporary / f)] for f in files(temporary)}
        sync(temporary / "state")
        atomic_write(temporary / DONE, json.dumps({"files": listed}, indent=1))
        sync(temporary)
        if final.exists():  # damaged, and trained anew since
            remove(final)
        temporary.rename(final)
        sync(self.folder)
        # what lies ahead was passed over as damaged: it takes no place of one that is intact
        finished = [p for p in listing(self.folder) if (p / DONE).exists() and step_of(p) <= step]
        for path in finished[self.keep :]:
            if not (self.milestone and step_of(path) % self.milestone == 0):
                remove(path)
        written = sum(size for size, _ in listed.values())
        self.facts.append(dict(step=step, bytes=written, seconds=time.perf_counter() - begin, blocked=blocked))

    def first(self, resume: str, steps: int, branch: Callable[[], Path | None]) -> Path | None:
        """On rank 0: the checkpoint to start from, the newest here of a run of so many steps, or else of another run. Clears
        away what is no use. Raises UsageError: `resume` is "must" and there is none."""
        log = self.folder.parent / "log.jsonl"
        length = log.stat().st_size if log.exists() else 0
        path, passed = newest(self.folder, length, steps) if resume != "never" else (None, [])
        sys.stderr.writelines(f"{line}\n" for line in passed)
        path = path or branch()
        if path is None and resume == "must":
            raise UsageError(f"--resume must: {passed[0]}; use --resume auto to start anew")
        self.folder.mkdir(parents=True, exist_ok=True)
        useless = list(self.folder.glob(".step-*.tmp"))  # what interrupted writes and deletions left
        if resume == "never":
            (self.folder.parent / "result.json").unlink(missing_ok=True)  # first: killed now, it must not pass for finished
            useless += listing(self.folder)
        for old in useless:
            remove(old)
        return path

    def finished(self, wait: bool = False) -> list[dict[str, float]]:
        """On rank 0: facts of each checkpoint completed since the last call: step, bytes, seconds that it took to write, and
        `blocked`, those that training stood still. Raises as `wait`."""
        if wait or (self.pending and self.pending.done()):
            self.wait()
        facts, self.facts = self.facts, []
        return facts

    def wait(self) -> None:
        """For the checkpoint being written. Raises what went wrong: an OSError, however the libraries wrapped it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except self.dcp.CheckpointException as error:
            raise next((e for e, _ in error.failures.values() if isinstance(e, OSError)), error) from error
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(code[1]), str(error)) if code else error) from error

    def close(self) -> None:
        self.worker.shutdown(wait=True)

    def load(self, path: Path, gpt: nn.Module, optimizer: State) -> tuple[State, State, list[Tensor]]:
        """Copy the weights of an intact checkpoint into `gpt`; returns the optimizer's state, the plain values, and the states
        of this rank's generators: none where fewer ranks wrote it. optimizer: state_dict of this rank's fresh optimizer, whose
        blocks are read. Raises UsageError: another model, other data, or other settings, unless this run branches off."""
        load_weights(gpt, path)
        state = read_json(path / STATE)
        here = self.origin or state
        if path.parent == self.folder and state["config"] != here["config"]:
            raise UsageError(f"{path} is of a run with other settings: choose another --out")
        if state["data"] != here["data"]:
            raise UsageError(f"{path} was trained on other data ({state['data']}, here {here['data']})")
        if self.rank == 0 and state["source"] != here["source"]:
            print(f"{path} was written by other code: what follows is not the same run", file=sys.stderr, flush=True)
        own: dict[str, bytes] = {}
        wanted = only(state.pop("optimizer"), pack(optimizer, "optimizer", {}, own))
        tensors = {r["tensor"]: torch.empty(r["shape"] or [1], dtype=getattr(torch, r["dtype"])) for r in references(wanted)}
        rng = [f"rng/{self.rank}/{i}" for i in range(len(state["rng"]) if self.rank < state["ranks"] else 0)]
        tensors |= {name: torch.empty(size, dtype=torch.uint8) for name, size in zip(rng, state["rng"])}
        reader = self.dcp.HuggingFaceStorageReader(str(path / "state"))
        self.dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        return unpack(wanted, tensors, own), state, [tensors[name] for name in rng]
