"""The constants of the cost model, fitted to half of the published speedruns and judged by the other half.

    .venv/bin/python tests/cost/published_steps.py       fit, print constants and errors, write benchmarks/cost.json (a minute)

The step times are those of modded-nanogpt's logs (records/published/modded_records.csv, modded_stage_times.csv), all on 8 H100.
What each run did, as far as its time can tell, stands in SETUPS, from the sources that the logs begin with.
"""

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from config import Config
from cost.operations import Operation
from cost.step import Step, attending, fineweb_lengths, fp8_head, record_step
from cost.time import Constants, step_time
from engine.hardware import CARDS
from layers.shape import ModelConfig
from model import GPT

ROOT = Path(__file__).parent.parent.parent
PUBLISHED = ROOT / "records" / "published"
RESULTS = ROOT / "benchmarks" / "cost.json"
FREE = ("products", "attention", "bandwidth", "overhead")  # what is fitted
START = Constants(products=0.81, attention=0.50, bandwidth=0.80, overhead=3e-3)  # usual on H100: cuBLAS, FlashAttention, STREAM
PULL = 0.3
VOCABULARY = 50304


@dataclass(frozen=True)
class Setup:
    """What a published run did in a step, as far as its time can tell."""

    tokens: tuple[int, ...] = (524288,)  # of a step, one number a stage of the run
    keys: tuple[float, ...] = (0.0,)  # mean keys of a query in each stage; 0: all before it, of 1,024 tokens
    model: tuple[tuple[str, object], ...] = ()  # fields of ModelConfig that differ from DENSE
    optimizer: str = "muon"  # SPEC of ours that does the same work
    optimizer_ranks: int = 8  # 1: every rank did the whole update
    without_attention: int = 0  # blocks that lack it
    without_mlp: int = 0
    fp8_head: bool = False
    tables: float = 0  # embeddings [50,304, width] beyond the token embedding, in bf16, with their own Adam
    sharded: bool = False  # the ranks share that Adam
    micro_batches: int = 1
    autocast: bool = False  # the residual stream is in fp32, as before record 10
    cards: int = 8
    card: str = "H100"


DENSE = {
    **dict(vocab_size=50257, sequence_length=1024, layers=12, heads=6, width=768, vocab_multiple=128, bias=False),
    **dict(norm="rmsnorm", norm_gains=False, positions="rotary", qk_norm=True, activation="relu2", tied_head=False),
    **dict(embed_norm=True, logit_softcap=30.0, softcap_form="tanh", attention="sdpa"),
}


class Nothing(nn.Module):
    """Instead of a block's attention or MLP."""

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_zeros(())


def published_model(setup: Setup, config: ModelConfig) -> GPT:
    gpt = GPT(config)
    for block in gpt.blocks[: setup.without_attention]:
        block.attention = Nothing()
    for block in gpt.blocks[: setup.without_mlp]:
        block.mlp = Nothing()
    return gpt


@cache
def recorded(setup: Setup, tokens: int) -> Step:
    """One step of one rank, its attention still over all keys of the sequence."""
    per_rank = tokens // setup.cards
    length = 1024 if setup.keys == (0.0,) else per_rank
    ranks = 1 if setup.cards == 1 else setup.optimizer_ranks
    micro = per_rank // length // setup.micro_batches * length
    config = Config(optimizer=setup.optimizer, compile=True, batch_tokens=per_rank * ranks, micro_batch_tokens=micro)
    model_config = ModelConfig(**DENSE | dict(setup.model) | {"sequence_length": length})
    dtype = torch.float32 if setup.autocast else torch.bfloat16
    return record_step(config, model_config, ranks, dtype, autocast=setup.autocast, model=partial(published_model, setup))


def with_tables(step: Step, setup: Setup, tokens: int) -> Step:
    width = dict(setup.model).get("width", DENSE["width"])
    size = 2 * setup.tables * VOCABULARY * width  # bytes in bf16
    rows = setup.tables * tokens / setup.cards * width * 2 * 4  # looked up, and back
    passes = [Operation("pass", moved / setup.micro_batches) for moved in (3 * size, rows)]  # 3: zeroed, then written
    update = [*step.update, (1.0, [Operation("pass", 7 * size / (setup.cards if setup.sharded else 1))])]
    return replace(step, passes=step.passes + passes, gradients=step.gradients + int(size), update=update)


@cache
def predicted(setup: Setup, constants: Constants) -> float:
    """Seconds of a step of that run, the mean over its stages."""
    card, times = CARDS[setup.card], []
    for tokens, keys in zip(setup.tokens, setup.keys, strict=True):
        step = recorded(setup, tokens)
        if keys:
            step = attending(step, keys, tokens // setup.cards)
        if setup.fp8_head:
            step = fp8_head(step, VOCABULARY)
        if setup.tables:
            step = with_tables(step, setup, tokens)
        times.append(sum(step_time(step, card, setup.cards, card.link, constants).values()))
    return sum(times) / len(times)


@cache
def mean_keys(window: int, longest: int = 65536) -> float:
    """Keys that a query meets on average: those before it in its document, cut to `longest`, within the window; and half a
    block of 128, since attention kernels work in blocks."""
    lengths = np.minimum(fineweb_lengths(4096), longest)
    whole = np.minimum(lengths, window)
    met = whole**2 / 2 + window * (lengths - whole)
    return float(met.sum() / lengths.sum()) + 64


def windows(pairs: Sequence[tuple[int, int]], long: int, of: int, longest: int = 65536) -> tuple[float, ...]:
    """Mean keys in each stage over `of` attention layers: `long` have the first window of its pair, the others the second."""
    return tuple((long * mean_keys(a, longest) + (of - long) * mean_keys(b, longest)) / of for a, b in pairs)


def rising(most: int, shorter: int = 1, power: int = 1) -> tuple[float, ...]:
    """A window that rises from 64 to `most` as the power of progress; in 8 of 11 layers it is `shorter` times shorter."""
    steps = [max(64, round(most * ((i + 0.5) / 16) ** power)) for i in range(16)]
    return (float(np.mean(windows([(w, max(128, w // shorter)) for w in steps], long=3, of=11))),)


TIED = (("tied_head", True), ("embed_norm", False), ("logit_softcap", 0.0))
GPT2 = (("norm", "layernorm"), ("norm_gains", True), ("bias", True), ("positions", "learned"), ("qk_norm", False))
GPT2 = (*TIED, *GPT2, ("activation", "gelu"), ("heads", 12))
STAGES = ((384, 128), (896, 384), (1408, 640), (1664, 768))  # windows of the trainer since record 29
EARLY = Setup(model=TIED, autocast=True, optimizer="muon:dtype=bf16")
SETUPS: dict[str, Setup] = {}  # by the first record of each; the records after it have the same one
SOURCES = [  # record, what it starts from, what it changed: by the logs that modded_records.csv names
    ("T1-04", EARLY, dict(model=(*TIED, ("vocab_multiple", 1)), optimizer_ranks=1)),
    ("T1-06", EARLY, {}),
    ("T1-08", EARLY, dict(model=(("logit_softcap", 0.0),))),
    ("T1-10", Setup(), {}),
    ("T1-12", "T1-10", dict(keys=(mean_keys(1024),))),
    ("T1-14", "T1-12", dict(keys=rising(1792), tables=12)),
    ("T1-16", "T1-14", dict(tables=6)),
    ("T1-18", "T1-16", dict(tables=3, without_attention=1)),
    ("T1-20", "T1-18", dict(keys=rising(1792, 2), fp8_head=True)),
    ("T1-21", "T1-20", dict(tokens=(393216,))),
    ("T1-24", "T1-21", dict(sharded=True)),
    ("T1-29", "T1-24", dict(keys=(float(np.mean(windows(STAGES[:3], long=4, of=11, longest=2048))),))),
    ("T1-30", "T1-29", dict(without_mlp=1)),
    ("T1-35", "T1-30", dict(without_attention=2)),
    ("T1-38", "T1-35", dict(optimizer="muon:coefficients=polar_express")),
    ("T1-39", "T1-35", dict(tokens=(262144,))),
    ("T1-46", "T1-39", dict(tokens=(131072, 262144, 393216), keys=windows(STAGES[:3], long=4, of=10, longest=2048))),
    ("T1-62", "T1-46", dict(tables=8)),
    ("T1-63", "T1-62", dict(tables=10)),
    ("T1-72", "T1-63", dict(tables=12.5, keys=windows(STAGES[:3], long=4, of=10, longest=896))),
    ("T2-02", "T1-20", dict(model=(("layers", 16), ("heads", 8), ("width", 1024)))),
    ("T2-08", "T2-02", dict(fp8_head=False, keys=rising(3456, 2, 3))),
    ("T2-10", "T2-08", dict(tables=6)),
    ("X-1.5B", EARLY, dict(model=(*TIED, ("layers", 52), ("heads", 12), ("width", 1536)), tokens=(491520,), micro_batches=2)),
    ("X-10B", "T1-08", {}),
    ("X-6B", "T1-10", {}),
    ("X-abl9", EARLY, dict(model=())),
]
for record, start, changes in SOURCES:
    SETUPS[record] = replace(SETUPS[start] if isinstance(start, str) else start, **changes)
# llm.c, which is not PyTorch; SOAP before the optimizer comparison, and that comparison itself, which is predicted below
NOT_MODELLED = ("T1-01", "X-soap-0910", "X-opt")

Row = tuple[str, Setup, float, str]  # a step time that is predicted and never fitted: what, setup, published ms, source
BASE = Setup(model=TIED, autocast=True)
TRACK3 = Setup(optimizer="muon:steps=12,coefficients=cubic")
ONE_A100 = Setup(model=GPT2, optimizer="adamw", card="A100", cards=1, tokens=(12288,))
RTX = Setup(card="RTX 4090", cards=1, micro_batches=32)
OPTIMIZERS: list[Row] = [
    ("AdamW", replace(BASE, optimizer="adamw"), 138.6, "modded-nanogpt, 2024-10-29_Optimizers"),
    ("Muon", EARLY, 142.0, "the same"),
    ("Shampoo, every 10, over 8 ranks", replace(BASE, optimizer="shampoo:every=10,block=0"), 179.3, "the same"),
    ("SOAP, every 10, on each rank", replace(BASE, optimizer="soap:every=10,block=0", optimizer_ranks=1), 301.0, "the same"),
]
ELSEWHERE: list[Row] = [
    ("8xH100, optimizer track, Muon", TRACK3, 146.4, "modded-nanogpt track 3, result 6"),
    ("8xH200, the same, NorMuon", replace(TRACK3, card="H200"), 144.0, "result 10"),
    ("8xA100, the same, Muon and EMA", replace(TRACK3, card="A100"), 351.3, "result 39"),
    ("1xH200, the same, Muon", replace(TRACK3, card="H200", cards=1, micro_batches=8), 1068.9, "result 22"),
    ("8xA100, GPT-2, AdamW, llm.c", Setup(model=GPT2, optimizer="adamw", card="A100"), 300.0, "llm.c discussion 481"),
    ("1xA100, GPT-2, 12,288 tokens, nanoGPT of 2022 (attention not fused)", ONE_A100, 135.0, "nanoGPT README"),
    ("1xRTX 4090, a fork of the speedrun's code of 2024", RTX, 3884.0, "135k tokens/s, modded-nanogpt PR 38"),
]


def setup_of(record: str) -> Setup:
    """Of T1-21b: that of T1-21, the last of its track up to it."""
    return SETUPS[max(first for first in SETUPS if first[:2] == record[:2] and first <= record)]


@dataclass(frozen=True, eq=False)
class Run:
    """One published step time."""

    name: str
    what: str
    setup: Setup
    published: float  # seconds
    fitted: bool = False


def table(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open(newline="") as file:
        return list(csv.DictReader(file))


def runs() -> list[Run]:
    """All published step times that are modelled. Every other record is fitted, and every other record's stages."""
    everything: list[Run] = []
    for row in table("modded_records.csv"):
        if not row["record"].startswith(NOT_MODELLED):
            what, seconds = row["description"].split(" [")[0], float(row["step_avg_ms"]) / 1e3
            everything.append(Run(row["record"], what, setup_of(row["record"]), seconds, len(everything) % 2 == 0))
    rows = table("modded_stage_times.csv")
    records = list(dict.fromkeys(row["record"] for row in rows))
    for row in rows:
        longest = 896 if int(row["record"]) >= 72 else 2048
        keys = windows([STAGES[int(row["stage"]) - 1]], long=4, of=10, longest=longest)
        setup = replace(setup_of(f"T1-{row['record']}"), tokens=(int(row["tokens_per_step"]),), keys=keys)
        name, seconds = f"T1-{row['record']}, stage {row['stage']}", float(row["ms_per_step"]) / 1e3
        everything.append(Run(name, "", setup, seconds, records.index(row["record"]) % 2 == 0))
    return everything


def fit(chosen: list[Run]) -> Constants:
    """Constants with the least squares of log(predicted / published), large errors counted by their size alone (soft L1).

    On one card the three shares are nearly interchangeable, and what tells them apart is weak. So each is drawn to its value in
    START, where a departure of 10 % counts like an error of 3 %.
    """
    start = [getattr(START, name) for name in FREE]

    def constants(x: np.ndarray) -> Constants:
        return replace(START, **dict(zip(FREE, map(float, x), strict=True)))

    def errors(x: np.ndarray) -> list[float]:
        misses = [math.log(predicted(run.setup, constants(x)) / run.published) for run in chosen]
        return misses + [PULL * math.log(value / usual) for value, usual in zip(x[:3], start[:3], strict=True)]

    bounds = ([0.3, 0.05, 0.2, 0.0], [1.0, 1.0, 1.0, 0.02])
    return constants(least_squares(errors, start, bounds=bounds, x_scale=start, loss="soft_l1", f_scale=0.05).x)


def judged(chosen: list[Run], constants: Constants) -> dict[str, float]:
    errors = [abs(predicted(run.setup, constants) / run.published - 1) for run in chosen]
    return {"n": len(chosen), "median": float(np.median(errors))}


def main() -> None:
    everything = runs()
    for run in tqdm(everything, "recording", disable=None):
        predicted(run.setup, START)
    fitted, others = ([run for run in everything if run.fitted is used] for used in (True, False))
    early = [run for run in everything if run.name.startswith("X-") or run.name < "T1-21"]
    constants = fit(fitted)

    def ms(setup: Setup) -> float:
        return round(predicted(setup, constants) * 1e3, 1)

    def rows(of: list[Row]) -> list[dict]:
        return [dict(what=what, published=given, predicted=ms(setup), source=source) for what, setup, given, source in of]

    def row(r: Run) -> dict:
        return dict(name=r.name, what=r.what, fitted=r.fitted, published=round(r.published * 1e3, 2), predicted=ms(r.setup))

    later = judged([run for run in everything if run not in early], fit(early))
    errors = {"fitted": judged(fitted, constants), "not fitted": judged(others, constants)}
    results = {
        "constants": dataclasses.asdict(constants),
        "errors": errors | {"fitted to 2024-10 to 2025-01, predicted later and 350M": later},
        "runs": [row(run) for run in everything],
        "optimizers": rows(OPTIMIZERS),
        "elsewhere": rows(ELSEWHERE),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {RESULTS.relative_to(ROOT)}; the constants of cost.time.FITTED are to be:\n{constants}")
    for what, judgement in results["errors"].items():
        print(f"{what}: median error {judgement['median']:.1%} of {judgement['n']} step times")


if __name__ == "__main__":
    main()
