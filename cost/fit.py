"""The cost model against published speedruns: fitted on half of them, judged by the other half.

    python -m cost.fit           fit, print constants and errors, rewrite benchmarks/cost.json (a minute)

The published step times are those of modded-nanogpt's logs (records/published/modded_records.csv, modded_stage_times.csv), all
on 8 H100. What each run did is written down below as far as a step's time can tell, from the sources that the logs begin with;
`Setup` says what is told apart. Every other row in the order of the file is fitted, the rest is not looked at by the fit.
"""

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.stats import lognorm
from torch import nn
from tqdm import tqdm

from cost import FINEWEB_MEDIAN, FINEWEB_SIGMA, Constants, Step, record_step, roofline, step_time
from cost.operations import Operation
from engine.hardware import CARDS, Card
from model import GPT, ModelConfig

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "records" / "published"
RESULTS = ROOT / "benchmarks" / "cost.json"
FREE = ("products", "attention", "bandwidth", "overhead")  # what is fitted
START = Constants(products=0.81, attention=0.50, bandwidth=0.80, overhead=3e-3)  # usual on H100: cuBLAS, FlashAttention, STREAM
PULL = 0.3
VOCABULARY = 50304

DOCUMENTS = lognorm(s=FINEWEB_SIGMA, scale=FINEWEB_MEDIAN)


@cache
def mean_keys(window: int, longest: int = 65536) -> float:
    """Keys that a query meets on average: those before it in its document, cut to `longest`, within the window.

    Attention kernels work in blocks, so half a block of 128 is added.
    """
    lengths = np.minimum(DOCUMENTS.ppf((np.arange(4096) + 0.5) / 4096), longest)
    whole = np.minimum(lengths, window)
    met = whole**2 / 2 + window * (lengths - whole)
    return float(met.sum() / lengths.sum()) + 64


@dataclass(frozen=True)
class Setup:
    """What a published run did in a step, as far as its time can tell.

    Args:
        model: fields of ModelConfig other than the first of `DENSE`.
        optimizer: SPEC of ours that does the same work.
        optimizer_ranks: 1 where every rank did all of the update.
        keys: mean keys of a query, one a stage of the run; 0: all before it (1,024 tokens, causal).
        without_attention, without_mlp: blocks that lack it.
        fp8_head: the head's product in fp8.
        tables: embedding tables [50,304, width] beyond the token embedding, in bf16, with their own Adam.
        autocast: the residual stream in fp32, as before record 10.
        sharded: that Adam and its gradients are shared out over ranks.
    """

    tokens: tuple[int, ...] = (524288,)
    model: tuple[tuple[str, object], ...] = ()
    optimizer: str = "muon"
    optimizer_ranks: int = 8
    keys: tuple[float, ...] = (0.0,)
    without_attention: int = 0
    without_mlp: int = 0
    fp8_head: bool = False
    tables: float = 0
    sharded: bool = False
    micro_batches: int = 1
    autocast: bool = False
    cards: int = 8
    card: str = "H100"


DENSE = dict(
    vocab_size=50257, sequence_length=1024, layers=12, heads=6, width=768, vocab_multiple=128, bias=False, norm="rmsnorm",
    norm_gains=False, positions="rotary", qk_norm=True, activation="relu2", tied_head=False, embed_norm=True,
    logit_softcap=30.0, softcap_form="tanh", attention="sdpa",
)  # fmt: skip


class Nothing(nn.Module):
    """In the place of a block's attention or MLP that a run left out."""

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_zeros(())


@cache
def recorded(setup: Setup, tokens: int) -> Step:
    """One step of one rank, its attention still over all keys of the sequence."""
    per_rank = tokens // setup.cards
    length = 1024 if setup.keys == (0.0,) else per_rank
    config = ModelConfig(**DENSE | dict(setup.model) | dict(sequence_length=length))

    def prepare(gpt: GPT) -> None:
        for block in gpt.blocks[: setup.without_attention]:
            block.attention = Nothing()
        for block in gpt.blocks[: setup.without_mlp]:
            block.mlp = Nothing()

    sequences = per_rank // length
    ranks = 1 if setup.cards == 1 else setup.optimizer_ranks
    dtype = torch.float32 if setup.autocast else torch.bfloat16
    return record_step(
        config,
        setup.optimizer,
        sequences,
        sequences // setup.micro_batches,
        ranks,
        dtype,
        autocast=setup.autocast,
        prepare=prepare,
    )


def changed(work: Operation, setup: Setup, length: int, keys: float) -> Operation:
    """The operation as that run had it."""
    if work.kind == "attention" and keys:
        return dataclasses.replace(work, flops=work.flops * keys / (length / 2))
    if setup.fp8_head and work.kind == "product" and VOCABULARY in work.shape:
        return dataclasses.replace(work, dtype=torch.float8_e4m3fn)
    return work


@cache
def predicted(setup: Setup, constants: Constants, card: Card | None = None) -> float:
    """Seconds of a step of that run, the mean over its stages."""
    card = card or CARDS[setup.card]
    seconds, times = roofline(card, constants), []
    for tokens, keys in zip(setup.tokens, setup.keys, strict=True):
        step = recorded(setup, tokens)
        width = dict(setup.model).get("width", DENSE["width"])
        table = 2 * setup.tables * VOCABULARY * width  # bytes in bf16
        share = setup.cards if setup.sharded else 1
        extra = [
            Operation("pass", 3 * table / setup.micro_batches),  # gradients zeroed, then written
            Operation("pass", setup.tables * tokens / setup.cards / setup.micro_batches * width * 2 * 4),  # looked up, and back
        ]
        changes = [changed(work, setup, tokens // setup.cards, keys) for work in step.passes]
        step = dataclasses.replace(
            step, passes=changes + (extra if table else []),
            gradients={"allreduce": step.gradients["allreduce"] + int(table)},
            update=step.update + ([(1.0, [Operation("pass", 7 * table / share)])] if table else []),
        )  # fmt: skip
        times.append(sum(step_time(step, seconds, setup.cards, card.link, constants).values()))
    return sum(times) / len(times)


# ---------------------------------------------------------------- what each published run did


def windows(*pairs: tuple[int, int], long: int, of: int, longest: int = 65536) -> tuple[float, ...]:
    """Mean keys over `of` attention layers, `long` of which have the first window and the others the second, a pair a stage."""
    return tuple((long * mean_keys(a, longest) + (of - long) * mean_keys(b, longest)) / of for a, b in pairs)


def rising(most: int, shorter: int = 1, power: int = 1) -> tuple[float, ...]:
    """Of a window that rises from 64 to `most` as the power of progress; in 8 of 11 layers it is `shorter` times shorter."""
    steps = [max(64, round(most * ((i + 0.5) / 16) ** power)) for i in range(16)]
    pairs = [(w, max(128, w // shorter)) for w in steps]
    return (float(np.mean(windows(*pairs, long=3, of=11))),)


THIRDS = (131072, 262144, 393216)
TIED = (("tied_head", True), ("embed_norm", False), ("logit_softcap", 0.0))
MEDIUM = (("layers", 16), ("heads", 8), ("width", 1024))
EARLY = Setup(model=TIED, autocast=True, optimizer="muon:dtype=bf16")
UNTIED = dataclasses.replace(EARLY, model=(("logit_softcap", 0.0),))
CAPPED = Setup()
FLEX = Setup(keys=(mean_keys(1024),))
RISING = Setup(keys=rising(1792))
LONG_SHORT = Setup(keys=rising(1792, 2), without_attention=1, fp8_head=True, tables=3)
SMALLER = dataclasses.replace(LONG_SHORT, tokens=(393216,))
FA3 = ((384, 128), (896, 384), (1408, 640))
VARLEN = dataclasses.replace(
    SMALLER, sharded=True, keys=(float(np.mean(windows(*FA3, long=4, of=11, longest=2048))),), without_mlp=1
)
SMALLEST = dataclasses.replace(VARLEN, tokens=(262144,), without_attention=2)
STAGED = dataclasses.replace(
    VARLEN, tokens=THIRDS, keys=windows((384, 128), (896, 384), (1408, 640), long=4, of=10, longest=2048), without_attention=2
)
SHORT_DOCUMENTS = windows((384, 128), (896, 384), (1408, 640), long=4, of=10, longest=896)
HASHED = dataclasses.replace(STAGED, tables=8)
LATE = dataclasses.replace(STAGED, tables=12.5, keys=SHORT_DOCUMENTS)
MEDIUM_RUN = Setup(model=MEDIUM, keys=rising(1792, 2), without_attention=1, fp8_head=True, tables=3)
MEDIUM_CUBIC = dataclasses.replace(MEDIUM_RUN, fp8_head=False, keys=rising(3456, 2, 3))

# First record from which a setup holds; those before it keep the one before. Sources: the logs named in modded_records.csv.
SETUPS: dict[str, Setup] = {
    "T1-04": dataclasses.replace(EARLY, model=(*TIED, ("vocab_multiple", 1)), optimizer_ranks=1),
    "T1-06": EARLY,
    "T1-08": UNTIED,
    "T1-10": CAPPED,
    "T1-12": FLEX,
    "T1-14": dataclasses.replace(RISING, tables=12),
    "T1-16": dataclasses.replace(RISING, tables=6),
    "T1-18": dataclasses.replace(RISING, tables=3, without_attention=1),
    "T1-20": LONG_SHORT,
    "T1-21": SMALLER,
    "T1-24": dataclasses.replace(SMALLER, sharded=True),
    "T1-29": dataclasses.replace(VARLEN, without_mlp=0),
    "T1-30": VARLEN,
    "T1-35": dataclasses.replace(VARLEN, without_attention=2),
    "T1-38": dataclasses.replace(VARLEN, without_attention=2, optimizer="muon:coefficients=polar_express"),
    "T1-39": SMALLEST,
    "T1-46": STAGED,
    "T1-62": HASHED,
    "T1-63": dataclasses.replace(HASHED, tables=10),
    "T1-72": LATE,
    "T2-02": MEDIUM_RUN,
    "T2-08": MEDIUM_CUBIC,
    "T2-10": dataclasses.replace(MEDIUM_CUBIC, tables=6),
    "X-abl9": dataclasses.replace(UNTIED, model=()),
    "X-1.5B": dataclasses.replace(
        EARLY, model=(*TIED, ("layers", 52), ("heads", 12), ("width", 1536)), tokens=(491520,), micro_batches=2
    ),
    "X-10B": UNTIED,
    "X-6B": CAPPED,
}
NOT_MODELLED = {
    "T1-01": "llm.c: hand-written CUDA, not PyTorch",
    "X-soap-0910": "SOAP before the optimizer comparison; optimizers are predicted apart",
    "X-opt": "the optimizer comparison, predicted apart and never fitted",
}


def number(record: str) -> tuple[str, float]:
    """T1-21b -> ("T1", 21)."""
    track, _, rest = record.partition("-")
    digits = "".join(c for c in rest.split("-")[0] if c.isdigit())
    return track, float(digits or 0)


def setup_of(record: str) -> Setup | None:
    """None for a run that is not modelled."""
    if any(record.startswith(word) for word in NOT_MODELLED):
        return None
    if record.startswith("X"):
        return next(setup for word, setup in SETUPS.items() if record.startswith(word))
    track, n = number(record)
    known = [word for word in SETUPS if number(word)[0] == track and number(word)[1] <= n]
    return SETUPS[known[-1]]


@dataclass(frozen=True, eq=False)
class Run:
    """One published step time."""

    name: str
    what: str
    setup: Setup
    published: float  # seconds
    fitted: bool = False


def runs() -> list[Run]:
    """All published step times that are modelled; of the records every other is fitted, of the stages every other record."""
    read = lambda name: list(csv.DictReader((PUBLISHED / name).open(newline="")))  # noqa: E731
    found = []
    for row in read("modded_records.csv"):
        setup = setup_of(row["record"])
        if setup:
            what = row["description"].split(" [")[0]
            found.append(Run(row["record"], what, setup, float(row["step_avg_ms"]) / 1e3, len(found) % 2 == 0))
    late = ((384, 128), (896, 384), (1408, 640), (1664, 768))
    rows = read("modded_stage_times.csv")
    records = list(dict.fromkeys(row["record"] for row in rows))
    for row in rows:
        setup = setup_of(f"T1-{row['record']}")
        longest = 896 if int(row["record"]) >= 72 else 2048
        keys = windows(late[int(row["stage"]) - 1], long=4, of=10, longest=longest)
        setup = dataclasses.replace(setup, tokens=(int(row["tokens_per_step"]),), keys=keys)
        name = f"T1-{row['record']}, stage {row['stage']}"
        found.append(Run(name, "", setup, float(row["ms_per_step"]) / 1e3, records.index(row["record"]) % 2 == 0))
    return found


# Step times of other setups, predicted and never fitted: (what, setup, published ms, source).
BASE = dict(model=TIED, autocast=True)
TRACK3 = Setup(optimizer="muon:steps=12,coefficients=cubic")
GPT2 = (("norm", "layernorm"), ("norm_gains", True), ("bias", True), ("positions", "learned"), ("qk_norm", False),
        ("activation", "gelu"), ("heads", 12), *TIED)  # fmt: skip
Row = tuple[str, Setup, float, str]
OPTIMIZERS: list[Row] = [
    ("AdamW", Setup(optimizer="adamw", **BASE), 138.6, "modded-nanogpt, 2024-10-29_Optimizers"),
    ("Muon", EARLY, 142.0, "the same"),
    ("Shampoo, every 10, over 8 ranks", Setup(optimizer="shampoo:every=10,block=0", **BASE), 179.3, "the same"),
    ("SOAP, every 10, on each rank", Setup(optimizer="soap:every=10,block=0", optimizer_ranks=1, **BASE), 301.0, "the same"),
]
ELSEWHERE: list[Row] = [
    ("8xH100, optimizer track, Muon", TRACK3, 146.4, "modded-nanogpt track 3, result 6"),
    ("8xH200, the same, NorMuon", dataclasses.replace(TRACK3, card="H200"), 144.0, "result 10"),
    ("8xA100, the same, Muon and EMA", dataclasses.replace(TRACK3, card="A100"), 351.3, "result 39"),
    ("1xH200, the same, Muon", dataclasses.replace(TRACK3, card="H200", cards=1, micro_batches=8), 1068.9, "result 22"),
    ("8xA100, GPT-2, AdamW, llm.c", Setup(model=GPT2, optimizer="adamw", card="A100"), 300.0, "llm.c discussion 481"),
    ("1xA100, GPT-2, 12,288 tokens, nanoGPT of 2022 (attention not fused)",
     Setup(model=GPT2, optimizer="adamw", card="A100", cards=1, tokens=(12288,)), 135.0, "nanoGPT README"),
    ("1xRTX 4090, a fork of the speedrun's code of 2024", Setup(card="RTX 4090", cards=1, micro_batches=32), 3884.0,
     "135k tokens/s, modded-nanogpt PR 38"),
]  # fmt: skip


# ---------------------------------------------------------------- fit


def fit(chosen: list[Run]) -> Constants:
    """Constants with the least squares of log(predicted / published), large errors counted by their size alone (soft L1).

    The three shares are nearly interchangeable on one card: what tells them apart is weak, so each is drawn to the value in
    START, where a departure of 10 % counts like an error of 3 %.
    """

    def constants(x: np.ndarray) -> Constants:
        return dataclasses.replace(START, **dict(zip(FREE, map(float, x), strict=True)))

    def errors(x: np.ndarray) -> list[float]:
        misses = [math.log(predicted(run.setup, constants(x)) / run.published) for run in chosen]
        return misses + [PULL * math.log(value / usual) for value, usual in zip(x[:3], start, strict=False)]

    start = [getattr(START, name) for name in FREE]
    bounds = ([0.3, 0.05, 0.2, 0.0], [1.0, 1.0, 1.0, 0.02])
    return constants(least_squares(errors, start, bounds=bounds, x_scale=start, loss="soft_l1", f_scale=0.05).x)


def error(run: Run, constants: Constants) -> float:
    return predicted(run.setup, constants) / run.published - 1


def median_error(chosen: list[Run], constants: Constants) -> float:
    return float(np.median([abs(error(run, constants)) for run in chosen]))


def main() -> None:
    everything = runs()
    for run in tqdm(everything, "recording", disable=None):
        predicted(run.setup, START)
    fitted, held = ([run for run in everything if run.fitted == side] for side in (True, False))
    constants = fit(fitted)
    early = [run for run in everything if run.name.startswith("X-") or run.name < "T1-21"]
    late = [run for run in everything if run not in early]
    ms = lambda setup: round(predicted(setup, constants) * 1e3, 1)  # noqa: E731
    other = lambda rows: [  # noqa: E731
        dict(what=what, published=published, predicted=ms(setup), source=source) for what, setup, published, source in rows
    ]
    results = {
        "constants": dataclasses.asdict(constants),
        "errors": {
            "fitted": dict(n=len(fitted), median=median_error(fitted, constants)),
            "not fitted": dict(n=len(held), median=median_error(held, constants)),
            "fitted to 2024-10 to 2025-01, predicted later and 350M": dict(n=len(late), median=median_error(late, fit(early))),
        },
        "runs": [
            dict(name=r.name, what=r.what, fitted=r.fitted, published=round(r.published * 1e3, 2), predicted=ms(r.setup))
            for r in everything
        ],
        "optimizers": other(OPTIMIZERS),
        "elsewhere": other(ELSEWHERE),
    }
    RESULTS.write_text(json.dumps(results | {k: v for k, v in stored().items() if k not in results}, indent=1) + "\n")
    print(f"wrote {RESULTS.relative_to(ROOT)}; the constants of cost.FITTED are to be:\n{constants}")
    for what, found in results["errors"].items():
        print(f"{what}: median error {found['median']:.1%} of {found['n']} step times")


def stored() -> dict:
    """benchmarks/cost.json; empty before its first run."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


if __name__ == "__main__":
    main()
