"""This process among the ranks that torchrun started, or alone under plain python.

A rank that dies or hangs is named: every rank leaves word of what it does in torchrun's store (`beat`); when it has waited too
long, a thread says whose words are the oldest. torchrun then starts all ranks anew, from the newest checkpoint.
"""

import itertools
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import hardware
from engine.spec import UsageError

# What each of n ranks sends for a collective whose larger side has S bytes, over S: ring algorithms (nccl-tests,
# PERFORMANCE.md). Of a reduce to one rank the mean over ranks, since that one sends nothing.
WIRE = {"allreduce": lambda n: 2 * (n - 1) / n}
WIRE |= dict.fromkeys(("allgather", "reduce_scatter", "reduce"), lambda n: (n - 1) / n)  # in this order: by parts of names

T = TypeVar("T")


class RankError(RuntimeError):
    """Ranks that died, hang or no longer agree: one line, on rank 0, and exit code 1."""

    speaks = False  # another rank does, since rank 0 cannot


class World:
    """Rank, number of ranks and device (auto, cpu, cuda or mps) of this process, and what ranks exchange. timeout: seconds that
    a rank waits for the others. Raises UsageError: no such device, or too few of it for the ranks of this machine."""

    def __init__(self, device_name: str, timeout: float = 600):
        words = {name: os.environ.get(name, usual) for name, usual in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1").items()}
        self.rank, local, self.size = (int(word) if word.isdecimal() else -1 for word in words.values())
        self.device = hardware.pick_device(device_name)
        self.main, self.timeout = self.rank == 0, timeout
        self.beats, self.doing, self.since = 0, "the start", time.monotonic()
        self.store, self.ending = None, threading.Event()
        if self.device.type == "mps" and self.size > 1:
            raise UsageError(f"{self.size} ranks on --device mps, which has no collectives: start one, or use --device cpu")
        if self.device.type == "cuda":
            here, there = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
            if here > there:
                seen = os.environ.get("CUDA_VISIBLE_DEVICES")
                why = f" (CUDA_VISIBLE_DEVICES={seen})" if seen else ""
                raise UsageError(f"{here} ranks on a machine with {there} CUDA GPUs{why}: torchrun --nproc_per_node={there}")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        where = "MASTER_ADDR" in os.environ and os.environ.get("MASTER_PORT", "0").isdecimal()
        if not 0 <= self.rank < self.size or local < 0 or (self.size > 1 and not where):
            given = ", ".join(f"{name}={word}" for name, word in words.items())
            raise UsageError(f"{given}, MASTER_ADDR, MASTER_PORT do not fit: torchrun sets them, without it unset them", True)
        if self.size > 1:
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.size, timeout=timedelta(seconds=timeout)))
            self.store = own_corner(store, self.rank, self.size, timeout)
            self.watch = threading.Thread(target=self._watch, daemon=True, name="watch")
            self.watch.start()
            # collectives wait a little longer than that thread, which knows whom they wait for
            backend = "nccl" if self.device.type == "cuda" and dist.is_nccl_available() else "gloo"
            wait = timedelta(seconds=timeout * 1.5 + 30)
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=wait)

    def beat(self, doing: str) -> None:
        """Leave word of what this rank begins to do: all do the same things in the same order."""
        self.beats, self.doing, self.since = self.beats + 1, doing, time.monotonic()

    def _watch(self) -> None:
        """Post this rank's word every second; when it is `timeout` seconds old, say who holds up the others."""
        for tick in itertools.count():
            try:
                self.store.set(f"beat/{self.rank}", f"{self.beats} {tick} {self.doing}")
                if time.monotonic() - self.since > self.timeout:
                    print(f"train_gpt.py: rank {self.rank}: {self.laggards()}", file=sys.stderr, flush=True)
                    os._exit(1)  # the main thread is inside a collective and cannot be woken; torchrun ends the rest
            except (RuntimeError, AttributeError):  # the store has gone: closed, or torchrun has ended
                return
            if self.ending.wait(1):
                return

    def laggards(self) -> str:
        """Who holds up the others: ranks whose word no longer changes, else those that have done least."""

        def words() -> list[tuple[int, int, str]]:
            keys = [f"beat/{rank}" for rank in range(self.size)]
            said = [self.store.get(key).decode() if self.store.check([key]) else "0 -1 the start" for key in keys]
            return [(int(beats), int(tick), doing) for beats, tick, doing in (words.split(" ", 2) for words in said)]

        before = words()
        time.sleep(3)
        now = words()
        frozen = [r for r in range(self.size) if r != self.rank and before[r][1] == now[r][1]]
        least = min(beats for beats, _, _ in now)
        late = frozen or [r for r in range(self.size) if now[r][0] == least]
        why = "does not run any more" if frozen else "is behind" if len(late) < self.size else "waits as all others do"
        names = "; ".join(f"rank {r} {why}, at {now[r][2]}" for r in late)
        return f"no progress for {self.timeout:g} s: {names}"

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def of_main(self, key: str, value: float) -> float:
        """Rank 0's value, through the store, so that none waits for its device. key: new each time."""
        if self.main:
            if self.store:
                self.store.set(key, repr(value))
            return value
        while not self.store.check([key]):  # not get(), which would keep `_watch` from the store
            time.sleep(1e-4)
        return float(self.store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """One small object from each rank, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def main_does(self, work: Callable[[], T]) -> T:
        """Rank 0's result, or its UsageError, on every rank."""
        problem = value = None
        try:
            value = work() if self.main else None
        except UsageError as error:
            problem = str(error)
        problem, value = self.gather((problem, value))[0]
        if problem:
            raise UsageError(problem)
        return value

    def check_equal(self, tensors: list[torch.Tensor], what: str) -> None:
        """Raises RankError: ranks, which it names, hold other bits of `tensors` than most, by checksums."""
        if self.size == 1:
            return
        bits = self.gather(torch.stack([checksum(t) for t in tensors]).tolist())
        usual = max(bits, key=bits.count)
        if odd := [rank for rank, value in enumerate(bits) if value != usual]:
            raise RankError(f"{what} of rank {', '.join(map(str, odd))} differ from those of the other ranks")

    def first(self, what: str) -> bool:
        """Is this the first rank that asks? What befalls several is said once."""
        return self.store is None or self.store.add(f"first/{what}", 1) == 1

    def close(self) -> None:
        self.ending.set()
        if self.size > 1:
            self.watch.join(10)  # not for ever: the store may not answer
            self.store = None
            dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Rank and number of ranks in torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def leave(code: int) -> NoReturn:
    """Exit; a rank without the interpreter's clean-up, in which a thread of gloo's that lets go of a tensor aborts the process
    (pytorch issues 190489 and 38228): torchrun would report a finished run as a failed one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def collective(func: torch._ops.OpOverload, args: tuple) -> tuple[str | None, int]:
    """Kind of a collective of WIRE and the bytes of its larger side; (None, 0) of other operations."""
    kind = next((kind for kind in WIRE if func.namespace == "c10d" and kind in func._schema.name), None)
    sides = (sum(t.numel() * t.element_size() for t in tree_leaves(side) if isinstance(t, torch.Tensor)) for side in args)
    return kind, max(sides) if kind else 0


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives in here; DDP's buckets too."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.sent = ranks, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind, size = collective(func, args)
        if kind:
            self.sent += round(WIRE[kind](self.ranks) * size)
        return func(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what is compiled stays so in here


def own_corner(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """A part of torchrun's store for the ranks of this start alone. torchrun (2.13) keeps one store through all restarts, with
    the addresses of dead ranks, and two agents may count restarts differently. So rank 0 draws a name, and tells it to those
    who ask now: a question carries a random number. Raises RankError: a rank did not ask, or rank 0 not answer, in time."""
    end = time.monotonic() + timeout
    if rank:
        nonce = uuid.uuid4().hex
        store.set(f"ask/{rank}", nonce)
        while not store.check([answer := f"answer/{rank}/{nonce}"]):
            if time.monotonic() > end + 5:  # rank 0 knows whom it waits for: it speaks first
                error = RankError(f"no word from rank 0 in {timeout:g} s: not started, or hung")
                error.speaks = rank == 1
                raise error
            time.sleep(0.01)
        name = store.get(answer).decode()
        store.set(f"heard/{rank}/{name}", "")
    else:
        name, left = uuid.uuid4().hex, set(range(1, size))
        while left:
            for other in list(left):
                if store.check([f"ask/{other}"]):
                    nonce = store.get(f"ask/{other}").decode()
                    store.set(f"answer/{other}/{nonce}", name)
                    if store.check([f"heard/{other}/{name}"]):
                        left.remove(other)
            if left and time.monotonic() > end:
                raise RankError(f"no word from rank {', '.join(map(str, sorted(left)))} in {timeout:g} s: not started, or hung")
            time.sleep(0.01)
    return dist.PrefixStore(name, store)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's bits read as integers, int64, on its device: no single number can change unseen."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().reshape(-1).view(integers).sum(dtype=torch.int64)
