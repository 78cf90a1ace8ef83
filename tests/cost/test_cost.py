"""The cost model: a recorded step has the memory and arithmetic of a real one; step times against published runs."""

import dataclasses
import functools
import json
import math
import statistics
import timeit
from pathlib import Path

import numpy as np
import published_steps as published
import pytest
import torch
import torch.distributed as dist

import optimizers
from config import Config, resolve, shares
from cost.operations import Operation, Recorder, operations, peak
from cost.predict import TooLittleMemory, machine, predict, report
from cost.step import FINEWEB_MEDIAN, FINEWEB_SIGMA, Step, attended, attending, communication, pieces_of, record_step
from cost.time import FITTED, Constants, roofline, step_time
from data.shards import aligned
from engine.command import command
from engine.hardware import CARDS, card_named
from engine.spec import UsageError
from layers.shape import ModelConfig, flops_per_token
from model import GPT

ROOT = Path(__file__).parent.parent.parent
H100 = CARDS["H100"]

SMALL = ModelConfig(vocab_size=97, sequence_length=32, layers=2, heads=2, width=64)
MODERN = dataclasses.replace(
    dataclasses.replace(SMALL, norm="rmsnorm", positions="half_rotary", qk_norm=True, activation="relu2", tied_head=False),
    **dict(logit_softcap=15.0, embed_norm=True, vocab_multiple=32),
)
NGRAMS = dataclasses.replace(SMALL, ngram_buckets=64)


def step_of(
    model: ModelConfig = SMALL, optimizer: str = "adamw", micro: int = 4, batch: int = 0, ranks: int = 1, **own
) -> Step:
    """micro: sequences in a micro-batch. batch: sequences of a rank in a step; 0: one micro-batch."""
    T = model.sequence_length
    tokens = dict(batch_tokens=(batch or micro) * T * ranks, micro_batch_tokens=micro * T)
    return record_step(Config(optimizer=optimizer, **tokens, **dict(compile=True) | own), model, ranks)


def seconds_of(step: Step, **constants: float) -> dict[str, float]:
    return step_time(step, H100, constants=dataclasses.replace(FITTED, **constants))


@pytest.mark.parametrize("config", [SMALL, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("compiled", [True, False])
def test_arithmetic_is_that_of_the_model(config, compiled):
    work = step_of(config, compile=compiled).passes
    found = sum(w.flops for w in work if w.kind in ("product", "attention"))
    assert found == flops_per_token(config) * 4 * config.sequence_length


STATES = ("adamw", "muon", "soap:every=2", "shampoo:every=2", "kron", "lion", "schedule_free_adamw")


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [(SMALL, "adamw"), (NGRAMS, "adamw"), *((MODERN, optimizer) for optimizer in STATES)],
    ids=["gpt2", "ngrams", *STATES],
)
def test_memory_by_kind_is_that_of_a_real_step(config, optimizer):
    memory = step_of(config, optimizer).memory
    torch.manual_seed(0)
    gpt = GPT(config)
    real = optimizers.build(optimizer, gpt)
    tokens = torch.randint(97, (4, 32))
    gpt(tokens, tokens).backward()
    for _ in range(2):
        real.step()
    assert memory.weights == sum(p.nbytes for p in gpt.parameters())
    assert memory.optimizer_state == optimizers.state_bytes(real)
    assert memory.gradients == sum(p.grad.nbytes for p in gpt.parameters())


def test_activations_are_bounded_by_what_autograd_saves():
    """Unfused, the peak holds at least what the forward pass saves, and at most all that it ever makes."""
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.device("meta"):
        gpt = GPT(dataclasses.replace(SMALL, attention="plain"))
        tokens = torch.zeros(4, 32, dtype=torch.int64)
        kept = {p.untyped_storage()._cdata for p in gpt.parameters()} | {tokens.untyped_storage()._cdata}
        with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            gpt(tokens, tokens).backward()
    grads = {p.grad.untyped_storage()._cdata for p in gpt.parameters()}
    most = peak(recorder.events, False, grads)
    made = sum(size for event in recorder.events for s, size in event.writes.items() if s not in event.reads)
    assert sum(size for s, size in saved.items() if s not in kept) <= most < made


def test_activations_grow_with_the_micro_batch_alone():
    one, two = (step_of(micro=n).memory.activations for n in (16, 32))
    assert 1.8 < two / one < 2.0  # weights are cast once, whatever the micro-batch
    halves = step_of(micro=16, batch=32)
    assert halves.memory.activations == one and halves.micro_batches == 2


def test_fused_passes_move_less_memory_for_the_same_arithmetic():
    fused, single = (step_of(MODERN, compile=compiled).passes for compiled in (True, False))
    moved, moved_single = (sum(w.bytes for w in work if w.kind == "pass") for work in (fused, single))
    assert moved < moved_single / 2
    assert [w.shape for w in fused if w.shape] == [w.shape for w in single if w.shape]


def test_a_chain_of_passes_by_hand():
    """exp(x) + 1, twice used: fused, x is read and y written; one by one, exp's result is written and read as well."""
    x = torch.zeros(1000, device="meta")
    with Recorder() as recorder:
        y = x.exp() + 1
        z = y.view(10, 100) @ y.view(100, 10)
    keep = {z.untyped_storage()._cdata}
    fused, single = (operations(recorder.events, f, keep) for f in (True, False))
    assert [w.bytes for w in fused] == [8000, 4000 + 400] and [w.bytes for w in single] == [8000, 8000, 4400]
    assert fused[1].shape == (1, 10, 10, 100) and fused[1].flops == 2 * 10 * 10 * 100
    assert peak(recorder.events, True, keep) == 4000 and peak(recorder.events, False, keep) == 8000


def test_communication_and_state_are_shared_over_ranks():
    alone, eight = (step_of(optimizer="muon", ranks=n) for n in (1, 8))
    sent = communication(eight, 8)
    weights = sum(eight.parameters.values())
    assert sent["gradients, all-reduce"] == 2 * 7 / 8 * 4 * weights
    assert sent["updates, all-gather"] >= 7 / 8 * 2 * eight.parameters["matrix"]  # bf16, and padding to equal shares
    assert alone.memory.optimizer_state > eight.memory.optimizer_state
    assert "communication" not in seconds_of(alone)
    assert not dist.is_initialized()


def test_renewals_are_amortised():
    shares = [share for share, _ in step_of(optimizer="soap:every=5").update]
    assert sum(shares) == pytest.approx(1) and len(shares) == 3
    often, seldom = (seconds_of(step_of(optimizer=f"soap:every={every}"))["optimizer"] for every in (1, 100))
    assert often > 1.2 * seldom


@pytest.mark.slow
def test_parts_that_move_at_their_own_pace_are_each_amortised():
    """SOAP's bases every fifth step, its AdamW every second: ten steps, six kinds, half of them with AdamW's arithmetic."""
    both = step_of(optimizer="soap:every=5,adamw_every=2")
    assert sum(share for share, _ in both.update) == pytest.approx(1) and len(both.update) == 6
    paces = ((5, 2), (10, 2), (20, 2), (5, 4), (5, 8))
    steps = {pace: step_of(optimizer="soap:every={},adamw_every={}".format(*pace)) for pace in paces}
    soap = {pace: seconds_of(step, launch=0.0)["optimizer"] for pace, step in steps.items()}
    assert soap[5, 2] == pytest.approx(soap[10, 2] + (soap[5, 2] - soap[20, 2]) * 2 / 3, rel=1e-3)  # linear in 1 / every
    assert soap[5, 4] == pytest.approx(soap[5, 2] + (soap[5, 8] - soap[5, 2]) * 2 / 3, rel=1e-3)


def test_roofline_by_hand():
    constants = dataclasses.replace(FITTED, products=0.5, bandwidth=0.5, launch=1e-6)
    card = dataclasses.replace(H100, bf16=1e15, reached=0.8, bandwidth=2e12)
    seconds = roofline(card, constants)
    assert seconds(Operation("product", 1e6, 4e12, torch.bfloat16)) == pytest.approx(0.01)
    assert seconds(Operation("product", 1e10, 4e9, torch.bfloat16)) == pytest.approx(0.01)  # bound by memory
    assert seconds(Operation("pass", 1e3)) == pytest.approx(1e-6)


def test_cards_are_found_by_the_names_that_drivers_give():
    assert card_named("NVIDIA H100 80GB HBM3")[0] == "H100" and card_named("NVIDIA H100 PCIe")[0] == "H100 PCIe"
    assert card_named("NVIDIA GeForce RTX 4090")[1].memory == 24e9 and card_named("Radeon") is None
    assert card_named("AMD Instinct MI300X")[0] == "MI300X"
    for name, word, memory in (
        ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB", 40e9), ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", 80e9),
        ("NVIDIA H100 NVL", "H100 NVL", 94e9), ("NVIDIA H200 NVL", "H200 NVL", 141e9), ("NVIDIA H200", "H200", 141e9),
    ):  # fmt: skip
        assert card_named(name)[0] == word and card_named(name)[1].memory == memory
    assert card_named("NVIDIA GeForce RTX 4090 Laptop GPU") is None and card_named("NVIDIA GeForce RTX 4090 D") is None


def test_double_precision_costs_what_the_card_has():
    """Gaming cards have a 64th of their fp32."""
    wide = Operation("product", 3 * 8 * 1024**2, 2 * 1024**3, torch.float64, (1, 1024, 1024, 1024))
    RTX = CARDS["RTX 4090"]
    assert roofline(RTX)(wide) > 30 * roofline(H100)(wide)
    roots = dataclasses.replace(wide, kind="factorisation")
    assert roofline(RTX)(roots) > 30 * roofline(H100)(roots)


# ---------------------------------------------------------------- the command


RUN = ["--track", "tiny", "--tricks", "record"]
CARD = [*RUN, "--hardware", "H100", "--width", "512", "--heads", "4", "--layers", "2", "--sequence-length", "512"]


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_every_optimizer_is_planned(optimizer):
    assert step_of(optimizer=optimizer).update[0][1]


def test_an_update_that_cannot_be_followed_is_refused_in_words():
    with pytest.raises(UsageError, match=r"--optimizer torch\.optim\.ASGD: plan cannot follow its update"):
        step_of(optimizer="torch.optim.ASGD")


def test_plan_prints_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without any corpus
    found = predict([*RUN, "--hardware", "2xH100", "--gpu-price", "2"])
    printed = report(found)
    hours = found.seconds * resolve(RUN)[0].steps / 3600 * 2
    assert f"${2 * hours:,.2f}" in printed and "2 x H100" in printed and "MFU" in printed
    assert "MFU" not in report(predict(RUN))  # this machine
    assert list(tmp_path.iterdir()) == []


def test_a_cpu_is_timed_by_real_steps(monkeypatch):
    """Three micro-batches of each stage and three updates, after one that does not count; the mean over the stages."""
    now = [0.0]
    monkeypatch.setattr("cost.time.timeit.repeat", functools.partial(timeit.repeat, timer=lambda: now[0]))
    AdamW, seen = optimizers.OPTIMIZERS["adamw"], []
    forward, step = GPT.forward, AdamW.step

    def slow(self, tokens, targets):
        seen.append((self.blocks[0].attention.window, tokens.shape))
        now[0] += tokens.shape[1] / 1000
        return forward(self, tokens, targets)

    def update(self):
        now[0] += 0.5
        return step(self)

    monkeypatch.setattr(GPT, "forward", slow)
    monkeypatch.setattr(AdamW, "step", update)
    flags = ["--track", "tiny", "--steps", "4", "--batch-tokens", "256", "--micro-batch-tokens", "128"]
    flags += ["--sequence-length", "64", "--batch-stages", "1/2", "--batch-rates", "1/1"]
    flags += ["--length-stages", "0.5/1", "--window-stages", "0.5/1"]
    found = predict([*flags, "--window", "16", "--window-pattern", "SL"])
    del seen[0]  # recorded, on the meta device
    assert len(seen) == 8 and {shape for _, shape in seen} == {(4, 32), (2, 64)}
    assert found.times["forward and backward"] == pytest.approx((2 * 0.032 + 4 * 0.064) / 2)
    assert found.times["optimizer"] == pytest.approx(0.5) and found.step.memory.total > 0


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--hardware", "8xH1000"], "did you mean 'H100'?"),
        (["--hardware", "0xH100"], "unknown card"),
        (["--hardwar", "8xH100"], "did you mean '--hardware'?"),
        (["--layer", "3"], "did you mean '--layers'?"),
        (["--hardware", "8xH100", "--world-size", "3"], "is not divisible by ranks x sequence length = 3 x"),
        (["--hardware", "8xH100", "--world-size", "12"], "at most 8, or a multiple of it"),
        (["--hardware", "8xH100", "--world-size", "many"], "invalid int value"),
        (["--hardware", "8xH100", "--tricks", "recrod"], "did you mean 'record'?"),
        (["--hardware", "8xA100", "--head-dtype", "fp8"], "A100 has no fp8"),
        (["--world-size", "2"], "the steps of one rank are timed"),
    ],
)
def test_bad_input_is_one_line(flags, answer, capsys):
    assert command("plan", lambda: report(predict([*RUN, *flags]))) == 2
    captured = capsys.readouterr()
    assert answer in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_cards_by_their_words():
    for words, name, cards in (
        ("8xH100", "H100", 8),
        ("h100", "H100", 1),
        ("2x4090", "RTX 4090", 2),
        ("rtx 4090", "RTX 4090", 1),
    ):
        assert (machine(words).name, machine(words).cards) == (name, cards)


def test_stages_are_a_mean_over_the_steps():
    """Batches of 1, 2 and 3 units with windows of a quarter, a half and all: by single runs of each."""
    shape = [*CARD, "--steps", "9", "--window-pattern", "LS", "--micro-batch-tokens", "2048", "--batch-tokens"]
    found = predict([*shape, "2048", "--batch-stages", "1/2/3", "--batch-rates", "1/1/1", "--window-stages", "0.25/0.5/1"])
    assert "a step of 4,096 tokens in the mean" in report(found)
    single = [predict([*shape, str(2048 * n), "--window", str(w)]).seconds for n, w in ((1, 128), (2, 256), (3, 512))]
    assert found.seconds == pytest.approx(sum(single) / 3)


def test_lengths_are_a_mean_over_the_steps():
    shape = [*CARD, "--steps", "8", "--micro-batch-tokens", "4096", "--batch-tokens", "16384"]
    shape += ["--window-pattern", "LS", "--window", "256"]
    mixed, long, short = (
        predict([*shape, *own]).seconds for own in (["--length-stages", "0.5/1"], [], ["--sequence-length", "256"])
    )
    assert mixed == pytest.approx((long + short) / 2)


@pytest.mark.parametrize(("card", "faster"), [("H100", True), ("A100", False)])
def test_fp8_head_is_faster_where_the_card_has_it(card, faster):
    shape = [*CARD, "--hardware", card, "--vocab-size", "50304", "--batch-tokens", "16384"]
    same, auto = (predict([*shape, "--head-dtype", head]).seconds for head in ("same", "auto"))
    assert auto < same if faster else auto == same


def test_windows_take_arithmetic_from_attention_alone():
    config = ModelConfig(vocab_size=256, sequence_length=512, layers=4, heads=4, width=512, window=128, window_pattern="LS")
    whole = dataclasses.replace(config, window=0, window_pattern="L")
    dense = step_of(whole)
    windowed = attending(dense, attended(config, 1.0, np.array([512])), 512)
    before, after = (sum(w.flops for w in step.passes) for step in (dense, windowed))
    saved = (flops_per_token(whole) - flops_per_token(config)) * 4 * 512  # tokens of a step_of
    assert before - after == pytest.approx(saved, rel=1e-3)
    assert [w for w in windowed.passes if w.kind != "attention"] == [w for w in dense.passes if w.kind != "attention"]


def test_bf16_weights_halve_weights_and_gradients_of_matrices():
    full, half = step_of(), step_of(weights="bf16")
    matrices = full.parameters["matrix"]
    assert full.memory.weights - half.memory.weights == full.memory.gradients - half.memory.gradients == 2 * matrices
    assert full.gradients - half.gradients == 2 * matrices
    assert half.memory.optimizer_state - full.memory.optimizer_state == 2 * matrices


@pytest.mark.slow
def test_too_little_memory_says_what_fits(monkeypatch):
    """The micro-batch that it names fits, and is the largest that does."""
    monkeypatch.setitem(CARDS, "H100", dataclasses.replace(H100, memory=4e6))
    flags = [*RUN, "--hardware", "H100", "--micro-batch-tokens", "1024"]
    with pytest.raises(TooLittleMemory, match="it fits with --micro-batch-tokens") as error:
        predict(flags)
    fits = error.value.fits
    assert f"{fits}" in str(error.value) and predict([*flags, "--micro-batch-tokens", str(fits)])
    with pytest.raises(TooLittleMemory):
        predict([*flags, "--micro-batch-tokens", str(2 * fits)])
    monkeypatch.setitem(CARDS, "H100", dataclasses.replace(H100, memory=1e5))
    with pytest.raises(TooLittleMemory, match="no micro-batch fits"):
        predict(flags)


def test_micro_batches_that_fit(monkeypatch):
    """Those that `plan` names for a run of ten minutes are the largest; the trainer's own shrink with the card."""
    flags = [*CARD, "--tricks", "baseline", "--minutes", "10", "--batch-tokens", "8192"]
    config, model_config, _ = resolve(flags[: flags.index("--hardware")] + flags[flags.index("--hardware") + 2 :])
    needs = {n: record_step(dataclasses.replace(config, micro_batch_tokens=n), model_config).memory.total for n in (2048, 4096)}
    monkeypatch.setattr("cost.predict.SIZES", sizes := (1e-3, needs[2048] / 0.89e9, needs[4096] / 0.91e9, 80))
    named, found = zip(sizes, ("none", 2048, 2048, 8192), strict=True), predict(flags)
    assert "   ".join(f"{size} GB {tokens}" for size, tokens in named) in (said := report(found))
    assert f"{600 / found.seconds:,.0f} steps" in said
    config, model_config, _ = resolve(["--track", "gpt2-small-10min"])
    for memory, sequences in ((141e9, 64), (80e9, 64), (24e9, 16), (16e9, 8), (8e9, 4), (1e9, 1)):
        assert shares(config, model_config, 1, "cuda", memory) == (128, sequences)
    assert shares(config, model_config, 1, "cuda") == (128, 64)


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize(("length", "align"), [(32, False), (8, False), (32, True), (8, True)])
def test_keys_inside_documents_against_a_count(length, align):
    """Of every query in every sequence, as the loader cuts them, one by one; half of its own key left out, as in T / 2, but
    where the window shuts out another."""
    rng = np.random.default_rng(0)
    starts = np.unique(np.r_[0, rng.integers(0, 4000, 300)])
    config = ModelConfig(vocab_size=256, sequence_length=32, layers=2, heads=4, width=16, window=5, window_pattern="LS")
    begins = aligned(starts, 4000, 32) if align else range(0, 4000 - 32, 32)
    met = {window: [] for window in config.windows(1.0)}
    for begin in begins:
        for at in range(begin, begin + 32):
            first = max(at - (at - begin) % length, starts[starts <= at].max())
            for window, keys in met.items():
                seen = sum(k > at - (window or 32) for k in range(first, at + 1))
                keys.append(seen - 0.5 * (at - first < (window or 32)))
    expected = np.mean([np.mean(met[window]) for window in config.windows(1.0)])
    assert attended(config, 1.0, pieces_of(starts, 4000, 32, length, align)) == pytest.approx(expected, rel=1e-9)


def test_a_document_mask_saves_time_where_documents_are_known(capsys, tmp_path):
    """Of FineWeb as stated; of a corpus that is not here nothing is claimed; and arithmetic is what a run's result has."""
    shape = ["--sequence-length", "8192", "--batch-tokens", "65536", "--document-mask", "--data-root", str(tmp_path)]
    shape += ["--hardware", "H100", "--width", "512", "--heads", "4", "--vocab-size", "50304", "--end-of-text", "50256"]
    said, times = {}, {}
    for corpus in ("fineweb10B", "nowhere"):
        found = predict(["--track", "cpu", *shape, "--corpus", corpus, "--tokenizer", "gpt2"])
        text = report(found)
        said[corpus] = {line[:20].strip(): line[20:] for line in text.splitlines()}
        times[corpus] = found.times
    assert said["nowhere"]["arithmetic"] == said["fineweb10B"]["arithmetic"]
    assert {name for name, value in times["nowhere"].items() if value != times["fineweb10B"][name]} == {"attention"}
    assert times["fineweb10B"]["attention"] < 0.5 * times["nowhere"]["attention"]


# ---------------------------------------------------------------- against published runs


def test_keys_of_a_window_against_a_simulation():
    """Documents drawn one by one, each query's keys counted."""
    drawn = np.random.default_rng(1).lognormal(math.log(FINEWEB_MEDIAN), FINEWEB_SIGMA, 4000)
    lengths = np.ceil(drawn).clip(max=2048).astype(int)
    met = [np.minimum(np.arange(1, n + 1), 256).sum() for n in lengths]
    assert published.mean_keys(256, 2048) - 64 == pytest.approx(sum(met) / lengths.sum(), rel=0.03)


def test_half_of_the_published_runs_is_fitted():
    everything = published.runs()
    assert len(everything) == 82 and sum(run.fitted for run in everything) == 41
    assert [run.fitted for run in everything[:4]] == [True, False, True, False]
    stages = [run for run in everything if "stage" in run.name]
    assert {run.name[:5] for run in stages if run.fitted}.isdisjoint({run.name[:5] for run in stages if not run.fitted})
    assert not any(run.name in ("T1-01", "X-opt-soap", "X-opt-adamw") for run in everything)


@pytest.mark.slow
def test_stored_predictions_are_those_of_the_constants_in_use():
    """One of the late runs and an optimizer, recorded anew."""
    results = json.loads(published.RESULTS.read_text())
    for name, value in results["constants"].items():
        assert getattr(FITTED, name) == pytest.approx(value, rel=2e-3)
    constants = Constants(**results["constants"])
    rows = {row["name"]: row for row in results["runs"]}
    everything = {run.name: run for run in published.runs()}
    for name in ("T1-46, stage 2",):
        assert published.predicted(everything[name].setup, constants) * 1e3 == pytest.approx(rows[name]["predicted"], abs=0.06)
    adamw = published.OPTIMIZERS[0]
    assert published.predicted(adamw[1], constants) * 1e3 == pytest.approx(results["optimizers"][0]["predicted"], abs=0.06)


def test_median_error_of_runs_that_were_not_fitted():
    held = [row for row in json.loads(published.RESULTS.read_text())["runs"] if not row["fitted"]]
    errors = [abs(row["predicted"] / row["published"] - 1) for row in held]
    stated = json.loads(published.RESULTS.read_text())["errors"]["not fitted"]
    assert statistics.median(errors) == pytest.approx(stated["median"], abs=1e-3) and len(held) == stated["n"]
    assert stated["median"] < 0.10


@pytest.mark.slow
def test_fit_finds_constants_again(monkeypatch):
    """Of made-up runs, whose times are the model's own: the pull towards usual values taken away."""
    right = dataclasses.replace(published.START, products=0.6, attention=0.3, bandwidth=0.9, overhead=2e-3)
    small = (("layers", 2), ("width", 512), ("heads", 4))
    setups = [published.Setup(tokens=(n,), keys=(k,), model=small) for n in (65536, 524288) for k in (64.0, 4000.0)]
    setups.append(published.Setup(tokens=(524288,), model=(("layers", 2), ("width", 2048), ("heads", 16))))
    made = [published.Run("", "", s, published.predicted(s, right)) for s in setups]
    monkeypatch.setattr(published, "PULL", 0.0)
    found = published.fit(made)
    for name in ("products", "attention", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(right, name), rel=0.02)
    assert all(math.isfinite(published.predicted(run.setup, found)) for run in made)


@pytest.mark.slow
def test_predictions_of_one_h100():
    """Against what was measured on one (benchmarks/h100): `record`, and memory. The time of `tiny` set Constants.host; GPT-2's
    baseline, with others, Constants.unaligned."""
    measured = json.loads((ROOT / "benchmarks" / "h100" / "h100.json").read_text())
    for line in measured["findings"]:
        if line["stage"] == "recipes":
            said, figures = predict([*line["figures"]["flags"], "--hardware", "1xH100"]), line["figures"]
            assert said.seconds == pytest.approx(figures["step"], rel=0.1), line["what"]
            if line["what"] == "gpt2-small:baseline":
                assert said.step.memory.total == pytest.approx(figures["peak_memory"], rel=0.03)
