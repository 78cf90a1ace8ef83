"""scaling.py: published figures come out again, known truths give the right verdicts, and a small ladder runs to its report."""

import dataclasses
import json
import math
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from shared import ROOT

import scaling
import train_gpt
from config import resolve
from engine.run_folder import source_hash
from engine.spec import UsageError
from lab import plots, trials
from lab.ledger import read_rows
from lab.scaling import ladder, plan, published, survival
from lab.scaling.curves import Lines, PowerLaw, bootstrap, curve_through, fit, interval, pooled, speedup
from lab.scaling.trend import scatter_about_line, trend
from lab.trials import Outcome
from model import GPT, parameter_counts

RATIOS = [1, 2, 4, 8]
WEN = ROOT / "tests" / "wen2025_best.csv"  # Wen et al. 2025, arXiv 2509.02046: best loss of each optimizer, size and data ratio

# ---------------------------------------------------------------- published losses


@pytest.fixture(scope="module")
def wen():
    """Losses, AdamW's curves and all speed-ups, by (optimizer, size, ratio)."""
    losses = published.read_losses(WEN)
    return losses, *published.speedups(losses)


@pytest.mark.parametrize(("size", "right"), [("130m", 1.42), ("300m", 1.30), ("520m", 1.30), ("1.2b", 1.18)])
def test_muon_of_wen_et_al(wen, size, right):
    """Their speed-ups to two decimals. Our losses are rounded to four, which is worth 0.001 of a speed-up more."""
    found = wen[2]["muon", size, 1]
    assert found.inside and found.ratio == pytest.approx(right, abs=0.005 + 0.001)


@pytest.mark.parametrize(
    ("size", "right"),
    [("130m", (0.4179, 0.4950, 3.1113)), ("300m", (0.3498, 0.4774, 2.9130)), ("520m", (0.3417, 0.3973, 2.7627)),
     ("1.2b", (0.2394, 0.4848, 2.6649))],
)  # fmt: skip
def test_adamw_curves_of_wen_et_al(wen, size, right):
    losses, curves, _ = wen
    curve, y = curves[size], [losses["adamw", size, ratio] for ratio in RATIOS]
    assert (curve.alpha, curve.exponent, curve.floor) == pytest.approx(right, abs=0.0015)

    def squares(a, b, c):
        return sum((a * d**-b + c - loss) ** 2 for d, loss in zip(RATIOS, y))

    assert squares(curve.alpha, curve.exponent, curve.floor) <= squares(*right)  # least squares: nothing near is better
    assert curve.rms == pytest.approx(math.sqrt(squares(curve.alpha, curve.exponent, curve.floor) / 4), abs=1e-9)


def test_what_was_held_out_is_missed_and_what_lies_beyond_is_only_bounded(wen):
    losses, curves, gains = wen
    miss = {size: curves[size].loss(16) - losses["adamw", size, 16] for size in ("130m", "300m")}
    assert miss == pytest.approx({"130m": 0.010, "300m": 0.006}, abs=0.0006)
    found = {(size, ratio): gain for (name, size, ratio), gain in gains.items() if name == "muon"}
    assert not found["130m", 8].inside and found["130m", 8].words() == "> 1.00x"
    assert found["130m", 8].ratio == pytest.approx(1.41, abs=0.005)  # what the fit would have claimed
    assert found["130m", 8].between == pytest.approx(1.35, abs=0.005)  # between the measured ratios 8 and 16
    assert all(gain.inside or math.isinf(gain.high) or gain.low == 0 for gain in found.values())


def test_fit_command(capsys):
    assert scaling.main(["fit", "--losses", str(WEN), "--at", "7B"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| muon | 130m | 1 | 3.4626 | 1.42x | 1.46x |  |" in lines
    assert "| muon | 130m | 8 | 3.2373 | > 1.00x | 1.35x | extrapolated: 1.41x |" in lines
    assert any(line.startswith("muon: fades: ") and "shrinking by" in line for line in lines)
    # one row for every loss of the table that is not AdamW's own
    rows = [name for name, _, _ in published.read_losses(WEN) if name != "adamw"]
    assert sum(line.count(" | ") == 6 for line in lines) == len(rows) + 2  # the head and its rule


@pytest.mark.parametrize(
    ("text", "message"),
    [("optimizer,size,chinchilla\nmuon,130m,1\n", "no table of losses: KeyError 'best_loss'"),
     ("optimizer,size,chinchilla,best_loss\nmuon,130m,1,low\n", "no table of losses: .*'low'"),
     ("optimizer,size,chinchilla,best_loss\nmuon,big,1,3\n", "'big' is no size"),
     ("optimizer,size,chinchilla,best_loss\nmuon,130m,1,3\n", "no size with losses at two"),
     ("optimizer,size,chinchilla,best_loss\nadamw,130m,1,3\n", "no size with losses at two")],
)  # fmt: skip
def test_bad_table(tmp_path, capsys, text, message):
    path = tmp_path / "losses.csv"
    path.write_text(text)
    assert scaling.main(["fit", "--losses", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


# ---------------------------------------------------------------- curves


def test_a_curve_gives_back_its_own_parameters():
    x = np.array([3e5, 6e5, 1.2e6, 2.4e6, 4.8e6])
    curve = fit(x, 40 * x**-0.3 + 1.1)
    assert (curve.alpha, curve.exponent, curve.floor) == pytest.approx((40, 0.3, 1.1), rel=1e-4)
    assert curve.amount(curve.loss(1e6)) == pytest.approx(1e6) and curve.amount(1.0) == math.inf
    assert fit(x, 1 + x * 1e-7) is None  # a loss that rises
    two = fit([1, 4], [3.0, 2.8])  # two budgets: nearly a straight line in log tokens
    assert two.amount(2.9) == pytest.approx(2, rel=0.02)
    assert speedup(two, [1, 4], [3.0, 2.8], 2.9, 1).between == pytest.approx(2)


def test_a_speedup_is_a_figure_inside_and_a_bound_outside():
    x, law = np.array([0.5, 1, 2]), lambda d: 1 + d**-0.4
    curve = fit(x, law(x))
    inside = speedup(curve, x, law(x), law(1.3), 1)
    assert inside.inside and inside.ratio == pytest.approx(1.3, rel=1e-3) and inside.words() == "1.30x"
    above, below = speedup(curve, x, law(x), law(3), 1), speedup(curve, x, law(x), law(0.3), 1)
    assert (above.low, above.high, above.words()) == (2, math.inf, "> 2.00x") and not above.inside
    assert (below.low, below.high, below.words()) == (0, 0.5, "< 0.50x") and math.isnan(below.between)


def test_straight_lines_inside_and_beyond():
    lines = Lines.through([1, 1, 2, 4, 8], [3.1, 2.9, 2.5, 2.6, 1.5])  # the third mean is above the second: level there
    assert lines.losses == (3.0, 2.5, 2.5, 1.5) and (lines.least, lines.most) == (1, 8)
    assert [lines.amount(loss) for loss in (3, 2.75, 2, 1.5)] == pytest.approx([1, 2**0.5, 4 * 2**0.5, 8])
    assert [lines.amount(loss) for loss in (3.5, 0.5)] == pytest.approx([0.5, 16])  # by the outermost lines
    assert Lines.through([1, 2, 4], [3, 2, 2]).amount(1.9) == math.inf
    bound = speedup(lines, [1, 1, 2, 4, 8], [3.1, 2.9, 2.5, 2.6, 1.5], 1.2, 1)
    assert not bound.inside and bound.words() == "> 8.00x" and math.isnan(bound.between)


BUDGETS = np.repeat([0.25, 0.5, 1, 2, 4, 8], 3)


def test_a_power_law_stands_until_its_runs_reject_it():
    """Of 400 true power laws about 5 % are rejected; what falls faster and faster always is, but not by single runs."""
    rng, noise = np.random.default_rng(0), 0.01 * np.random.default_rng(1).standard_normal((400, len(BUDGETS)))
    found = [isinstance(curve_through(BUDGETS, 1 + BUDGETS**-0.4 + e), Lines) for e in noise]
    assert 0.02 <= np.mean(found) <= 0.08
    faster = 3 - 0.1 * np.log2(4 * BUDGETS) ** 1.5
    assert all(isinstance(curve_through(BUDGETS, faster + e), Lines) for e in noise[:50])
    once = slice(None, None, 3)
    assert isinstance(curve_through(BUDGETS[once], (faster + noise[0])[once]), PowerLaw)
    assert curve_through(BUDGETS, 1 + BUDGETS + 0.01 * rng.standard_normal(len(BUDGETS))) is None  # a loss that rises


def test_straight_intervals_cover_where_a_power_law_misses():
    rng, law = np.random.default_rng(0), lambda d: 3 - 0.1 * np.log2(4 * d) ** 1.5
    hits = {PowerLaw: [], Lines: []}
    for _ in range(200):
        y, own = law(BUDGETS) + 0.01 * rng.standard_normal(len(BUDGETS)), law(4) + 0.01 * rng.standard_normal(3)
        noise = pooled([*(y[b == BUDGETS] for b in np.unique(BUDGETS)), own])
        for form, hit in hits.items():
            low, high = interval(bootstrap(form, BUDGETS, y, 1, own, noise, 1, 400))
            hit.append(low <= math.log(4) <= high)
    assert 0.91 <= np.mean(hits[Lines]) <= 0.99 and np.mean(hits[PowerLaw]) < 0.75


# ---------------------------------------------------------------- trends of known truth

SIZES = np.array([98e3, 332e3, 786e3, 1.54e6, 4.2e6])


def measured(truth: float, rng: np.random.Generator, sd=0.003, seeds=3, budgets=(0.5, 1, 2)) -> np.ndarray:
    """The bootstrap of runs of a base and a trick that is `truth` times as fast."""

    def law(d):
        return 0.9 + 0.25 * d**-0.35

    x = np.repeat(budgets, seeds).astype(float)
    y, own = law(x) + sd * rng.standard_normal(len(x)), law(truth) + sd * rng.standard_normal(seeds)
    noise = pooled([*(y[x == b] for b in budgets), own])
    return bootstrap(PowerLaw, x, y, 1, own, noise, seed=1, draws=500)


def test_bootstrap_interval_covers_the_true_speedup():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(200):
        low, high = interval(measured(1.3, rng))
        hits.append(low <= math.log(1.3) <= high)
    assert 0.91 <= np.mean(hits) <= 0.99  # 95 %, +- 2.6 standard errors


def judged(truth, scatter: float, se: float, trials: int, at: float):
    """Trends of `trials` experiments in which the sizes' true speed-ups lie about `truth` with that scatter."""
    rng = np.random.default_rng(2)
    for k in range(trials):
        right = np.log([truth(n) for n in SIZES]) + scatter * rng.standard_normal(len(SIZES))
        y = right + se * rng.standard_normal(len(SIZES))
        found = trend(SIZES, np.exp(y), y + se * rng.standard_normal((600, len(SIZES))), at, 3, seed=k)
        yield found, truth(at) * math.exp(scatter * rng.standard_normal())


@pytest.mark.parametrize(("scatter", "se", "widest"), [(0, 0.02, 1.25), (0.05, 0.02, 1.6), (0.15, 0.07, 5), (0.3, 0.07, 25)])
def test_prediction_intervals_cover(scatter, se, widest, monkeypatch):
    """95 %, however far the sizes scatter: 400 experiments, 2.6 standard errors."""
    monkeypatch.setattr("lab.scaling.trend.more_seeds", lambda *about: "")  # advice, which takes half of the time
    found = list(judged(lambda n: 1.5 * (n / 98e3) ** -0.05, scatter, se, 400, 20e6))
    assert np.mean([t.low <= right <= t.high for t, right in found]) > 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / 400)
    assert np.median([t.high / t.low for t, _ in found]) < widest  # and are not merely wide


def test_scatter_about_a_line_is_what_lies_beyond_the_errors():
    rng, x, errors = np.random.default_rng(0), np.log(SIZES), np.full(5, 0.05)
    scatters = [scatter_about_line(x, x + np.hypot(0.3, 0.05) * rng.standard_normal(5), errors) for _ in range(400)]
    assert np.mean(np.square(scatters)) == pytest.approx(0.3**2, rel=0.15)  # unbiased, as its square
    assert scatter_about_line(x, 1 + 2 * x, errors) == 0


def test_two_sizes_predict_nothing():
    found = trend(SIZES[:2], [1.3, 1.2], np.log([1.3, 1.2]) + 0.01 * np.random.default_rng(0).standard_normal((500, 2)), 1e6, 3)
    assert (found.low, found.high, found.verdict) == (0, math.inf, "not decided") and "add a third" in found.words()


def test_an_interval_does_not_hang_on_the_bootstraps_seed():
    y = 3 - 0.1 * np.log2(4 * BUDGETS)
    draws = [bootstrap(Lines, BUDGETS, y, 1, [2.8] * 3, (0.01, 12), seed) for seed in range(10)]
    ends = np.array([interval(d) for d in draws])
    assert ends[:, 0].std() < 0.02 * np.ptp(ends, axis=1).mean() / 2


@pytest.mark.parametrize(
    ("truth", "right", "least"),
    [(lambda n: 1.3, "survives", 0.95), (lambda n: 0.8, "reverses", 0.95), (lambda n: 1.6 * (n / 98e3) ** -0.1, "fades", 0.8),
     (lambda n: 1.0, "not decided", 0.5)],
)  # fmt: skip
def test_verdicts_of_known_truths(truth, right, least):
    verdicts = [t.verdict for t, _ in judged(truth, 0, 0.02, 100, 12e6)]
    assert verdicts.count(right) >= least * len(verdicts), {v: verdicts.count(v) for v in verdicts}
    wrong = {"survives": "reverses", "reverses": "survives"}.get(right, "survives")
    assert verdicts.count(wrong) <= 0.05 * len(verdicts)


def test_a_gain_that_is_surely_nothing_vanishes_and_an_open_question_says_what_it_takes():
    assert {t.verdict for t, _ in judged(lambda n: 1.0, 0, 0.002, 20, 12e6)} == {"vanishes"}
    open_ones = [t for t, _ in judged(lambda n: 1.08, 0, 0.05, 60, 12e6) if t.verdict == "not decided"]
    assert open_ones and all("would decide" in t.why for t in open_ones)
    needed = [int(t.why.split()[1]) for t in open_ones if t.why.startswith("about")]
    assert needed and min(needed) > 3


def test_the_line_meets_one_where_it_should():
    y = np.log(1.4) - 0.08 * np.log(SIZES / SIZES[0])
    found = trend(SIZES, np.exp(y), y + 0.005 * np.random.default_rng(0).standard_normal((1000, 5)), 20e6, 3)
    right = SIZES[0] * math.exp(math.log(1.4) / 0.08)
    assert found.crossing == pytest.approx(right, rel=0.01) and found.crossing_low < right < found.crossing_high
    assert found.slope == pytest.approx(-0.08) and "shrinking by 17% a decade" in found.words()


# ---------------------------------------------------------------- ladders


def test_ladders_have_one_dial_and_their_rules():
    cpu, gpt2 = ladder.LADDERS["cpu"], ladder.LADDERS["gpt2"]
    assert (
        len(cpu.sizes) >= 5
        and {s.width // s.heads for s in cpu.sizes} == {32}
        and {s.width // s.layers for s in cpu.sizes} == {32}
    )
    rungs = [ladder.rung(s, cpu, cpu.tokens_per_parameter, ("--tricks", "modern")) for s in cpu.sizes]
    n = [r.parameters for r in rungs]
    assert n[-1] / n[0] > 10**1.5 and all(12 * r.size.layers * r.size.width**2 < r.parameters for r in rungs)
    for r in rungs:
        _, config, _ = resolve(["--track", "cpu", "--tricks", "modern", *r.size.flags])
        assert parameter_counts(GPT(config))["non_embedding"] == r.parameters and r.tokens == 1.25 * r.parameters
        assert r.batch_tokens == 2 ** round(math.log2(4096 * (r.tokens / (2400 * 4096)) ** 0.383))
        assert abs(r.steps(1) * r.batch_tokens - r.tokens) <= r.batch_tokens / 2
    assert 2 * rungs[-1].tokens < 10_896_718  # training bytes of the corpus: nothing is seen twice
    rung = ladder.rung(gpt2.sizes[0], gpt2, 20, ("--tricks", "baseline"))
    assert rung.parameters == 85_056_000 and rung.size.name == "124M"  # GPT-2's 124.4M without 39.4M of embeddings


@pytest.mark.parametrize(
    ("words", "message"),
    [(["0.3M"], "one size is no ladder"), (["0.8M", "0.3M"], "must grow, the smallest first: 786k .* and 332k"),
     (["big", "1M"], "'big' is no size"), (["0.30M", "0.33M"], "must grow"), (["-1M", "1M"], "no size")],
)  # fmt: skip
def test_bad_sizes(words, message):
    with pytest.raises(UsageError, match=message):
        ladder.own_sizes(words, ladder.LADDERS["cpu"])


def test_own_sizes():
    cpu, gpt2 = ladder.LADDERS["cpu"], ladder.LADDERS["gpt2"]
    assert [s.layers for s in ladder.own_sizes(["0.1M", "0.8M", "6M"], cpu)] == [2, 4, 8]
    assert ladder.own_sizes(["124M", "1.5B"], gpt2) == (gpt2.sizes[0], gpt2.sizes[3])


def test_learning_rates_go_with_the_width():
    cpu = ladder.LADDERS["cpu"]
    rung = ladder.rung(cpu.sizes[2], cpu, 1.25, ("--tricks", "modern"))  # width 128, half of the track's

    def sized(rule, *words, factor=1.0):
        flags = ("--track", "cpu", "--tricks", "modern", *words)
        return resolve([*ladder.at_size("x", flags, rung, rule, factor).flags])[0]

    def rate(rule, spec, factor=1.0):
        return sized(rule, "--optimizer", spec, factor=factor).optimizer

    assert sized("mup").optimizer == "adamw:lr=0.004" and sized("none").optimizer == "adamw:lr=2e-3"
    assert rate("power:-0.5", "soap:lr=0.01,every=5") == "soap:lr=0.01414,every=5"
    assert rate("mup", "muon") == "muon"  # its update has the same singular values at every width
    assert rate("mup", "muon:scale=moonlight,lr=0.01") == "muon:scale=moonlight,lr=0.01414"
    assert rate("mup", "amos:lr=0.01") == "amos:lr=0.01414" and rate("mup", "sgd:lr=0.1") == "sgd:lr=0.1"
    assert rate("mup", "torch.optim:Adagrad:lr=0.01") == "torch.optim:Adagrad:lr=0.02"  # element-wise, as far as we know
    assert rate("none", "muon", factor=2) == "muon:lr=0.04"  # the class's default, doubled
    # a warm-up of 100 of the track's 2,400 steps is the same fraction of any run; a trick's own schedule stays
    assert sized("mup").schedule == "cosine:warmup=0.04167"
    assert sized("mup", "--schedule", "wsd:cooldown=0.7").schedule == "wsd:cooldown=0.7"
    assert ladder.retune_factors(5) == [1, 0.5, 2, 0.25, 4]
    for rule in ("mupp", "power:", "power:x", "none:1"):
        with pytest.raises(UsageError, match="takes mup, power:EXPONENT"):
            ladder.transfer_exponent(rule, "adamw")


# ---------------------------------------------------------------- from trials to a report

FLAGS = ["--sequence-length", "64", "--val-tokens", "512"]
ENV = {"cpu": "some CPU", "cpu_count": 2, "gpus": [], "world_size": 1, "threads": 2, "torch": "2.13.0", "dtype": "float32",
       "commit": "0123456789abcdef", "dirty": False, "source_sha256": source_hash(), "data_fingerprint": "a-b"}  # fmt: skip


class FakeTrainer:
    """Leaves the run folder that a trainer would have left. Loss = law(N, s D) of the arm's own speed-up s(N), worse by
    `off` (log2 of the learning-rate factor)^2; arms in `diverge` diverge at the sizes named there."""

    def __init__(self, speedups, paces=None, best_factor=None, diverge=(), noise=0.002):
        self.speedups, self.paces, self.best_factor = speedups, paces or {}, best_factor or {}
        self.diverge, self.noise, self.trained = set(diverge), noise, []

    def __call__(self, trial, processes=1, threads=0):
        if trial.result is not None and trial.extra != trials.ANEW:
            return Outcome(trial, trial.result)
        config, model, _ = resolve(trial.flags)
        name, size = trial.arm.name.split(",")[0].split(" at ")
        factor = float(trial.arm.name.split("lr x ")[1]) if "lr x " in trial.arm.name else 1.0
        self.trained.append((trial.arm.name, trial.steps, trial.seed))
        n = 12 * model.layers * model.width**2
        tokens = trial.steps * config.batch_tokens
        dice = random.Random(f"{trial.arm.name} {trial.steps} {trial.seed}")
        speed = self.speedups.get(name, lambda n: 1.0)(n)
        off = 0.02 * math.log2(factor / self.best_factor.get(name, 1.0)) ** 2
        loss = 0.7 + 2.5 * n**-0.15 + 20 * (speed * tokens) ** -0.3 + off + dice.gauss(0, self.noise)
        diverged = (name, size) in self.diverge
        seconds = tokens * n * 1e-9 * self.paces.get(name, 1.0) * math.exp(dice.gauss(0, 0.01))
        result = {
            "status": "diverged" if diverged else "ok", "steps": trial.steps, "val_loss": None if diverged else loss,
            "train_time": seconds, "robust_train_time": seconds, "process_time": seconds, "tokens": tokens,
            "flops_per_token": 6 * n, "peak_memory": 10**8, "stalled": False,
        }  # fmt: skip
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / "env.json").write_text(json.dumps(ENV))
        (trial.folder / "log.jsonl").write_text(json.dumps(dict(event="end", utc="2026-01-01T00:00:00Z")) + "\n")
        (trial.folder / "result.json").write_text(json.dumps(result))
        return Outcome(trial, result)


@pytest.fixture
def fake(tmp_path, monkeypatch, sotu):
    """fake(speedups, ...) puts a FakeTrainer in the trainer's place."""
    monkeypatch.setattr(trials, "RUNS", tmp_path / "work")
    monkeypatch.setattr(plots, "draw_scaling", lambda folder, summary: [])  # drawn by one test below

    def install(*args, **kwargs):
        trainer = FakeTrainer(*args, **kwargs)
        monkeypatch.setattr(trials, "train", trainer)
        return trainer

    return install


def command(out, *flags, sizes=("0.1M", "0.33M", "0.8M", "1.5M")):
    return [*flags, "--sizes", *sizes, "--out", str(out), "--", *FLAGS]


def summary(out):
    return json.loads((out / "scaling.json").read_text())


@pytest.mark.slow
def test_survival_of_known_tricks(fake, tmp_path, capsys):
    trainer = fake(
        {"+muon": lambda n: 1.5, "+soap": lambda n: 1.6 * (n / 1e5) ** -0.15, "+lion": lambda n: 0.8}, paces={"+soap": 2.0}
    )
    out = tmp_path / "s"
    assert scaling.main(command(out, "--tricks", "muon", "soap", "lion", "--retune", "1", "--at", "4M")) == 0
    found = {t["trick"]: t for t in summary(out)["tricks"]}
    verdicts = {name: t["trends"]["tokens"]["verdict"] for name, t in found.items()}
    assert verdicts["+muon"] == "survives" and verdicts["+lion"] == "reverses" and verdicts["+soap"] in ("fades", "not decided")
    for name, right in (("+muon", 1.5), ("+lion", 0.8)):
        for size in found[name]["sizes"]:
            low, high = size["intervals"]["tokens"]
            assert size["ratios"]["tokens"] == pytest.approx(right, rel=0.12) and low / 1.1 < right < high * 1.1
            assert size["ratios"]["flops"] == size["ratios"]["tokens"]
    seconds = [s["ratios"]["seconds"] / s["ratios"]["tokens"] for s in found["+soap"]["sizes"]]
    assert seconds == pytest.approx([0.5] * 4, rel=0.03)
    (held,) = found["+muon"]["held_out"]
    assert held["size"] == "1.54M" and held["hit"] and held["low"] < 1.5 < held["high"]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert (
        lines[0].startswith("+muon: survives: ")
        and "; in seconds survives, " in lines[0]
        and lines[2].startswith("+lion: reverses")
    )
    text = (out / "README.md").read_text()
    assert (
        "| trick | 98.3k | 332k | 786k | 1.54M | at 4M | verdict |" in text
        and "./run.sh scaling --tricks muon soap lion" in text
    )
    assert summary(out)["dtype"] == "fp32" and ", in fp32. Source: " in text
    # what is printed is what trials.csv gives again; nothing is trained twice
    count = len(trainer.trained)
    assert scaling.main(command(out, "--tricks", "muon", "soap", "lion", "--retune", "1", "--at", "4M")) == 0
    assert len(trainer.trained) == count == len(set(trainer.trained))
    before = (out / "scaling.json").read_text()
    assert scaling.main(["--report", str(out)]) == 0 and (out / "scaling.json").read_text() == before


def test_a_ladder_in_two_compute_types_is_refused(fake, tmp_path, capsys, monkeypatch):
    """Half of a ladder on a machine with bf16 would shift a trick against its base."""
    out = tmp_path / "s"
    fake({"muon": lambda n: 1.5})
    few = ("--seeds", "2", "--retune", "1", "--timing-steps", "0", "--hold-out", "0")
    assert scaling.main(command(out, "--tricks", "muon", *few, sizes=("0.1M", "0.33M"))) == 0
    before = (out / "trials.csv").read_text()
    monkeypatch.setitem(ENV, "dtype", "bfloat16")
    capsys.readouterr()
    assert scaling.main(command(out, "--tricks", "muon", "soap", *few, sizes=("0.1M", "0.33M"))) == 2
    error = capsys.readouterr().err
    assert "their losses do not compare" in error and error.count("\n") == 1 and (out / "trials.csv").read_text() == before


def test_runs_of_other_settings_are_left_out(fake, tmp_path, capsys):
    out = tmp_path / "s"
    trainer = fake({"+muon": lambda n: 1.5})
    words = command(out, "--tricks", "muon", "--retune", "1", "--timing-steps", "0", "--hold-out", "0", sizes=("0.1M", "0.33M"))
    assert scaling.main(words) == 0 and summary(out)["left_out"] == []
    first = read_rows(out / "trials.csv")
    # as if the trainer had gained a setting since: the arms have their names, and their runs other ones
    text = (out / "trials.csv").read_text()
    for row in first:
        text = text.replace(row.run, row.run[:-8] + row.run[:-9:-1]).replace(repr(row.val_loss), repr(row.val_loss + 0.3))
    (out / "trials.csv").write_text(text)
    trainer.trained.clear()
    assert scaling.main(words) == 0 and len(trainer.trained) == 0  # found by their run folders
    assert len(summary(out)["left_out"]) == len(first) == len(read_rows(out / "trials.csv")) / 2
    assert f"{len(first)} trials in this folder are of other settings" in capsys.readouterr().out
    points = [p for arm in summary(out)["curves"].values() for size in arm.values() for p in size["points"]]
    assert sorted(loss for p in points for loss in p["losses"]) == sorted(row.val_loss for row in first)
    before = summary(out)
    assert scaling.main(["--report", str(out)]) == 0 and summary(out) == before


def test_the_timings_of_a_turn_lie_together(fake, tmp_path):
    """A turn that was cut off is timed anew as a whole; one whose runs lie hours apart is left out, and said."""
    out, trainer = tmp_path / "s", fake({"+muon": lambda n: 1.5}, paces={"+muon": 1.4})
    words = command(out, "--tricks", "muon", "--retune", "1", "--seeds", "2", "--hold-out", "0", sizes=("0.1M", "0.33M"))
    assert scaling.main(words) == 0 and summary(out)["apart"] == []
    timed = [row for row in read_rows(out / "trials.csv") if row.phase == "time"]
    last = timed[-1]
    assert len(timed) == 2 * 2 * ladder.TIME_PAIRS and last.arm == "+muon at 332k"
    text = (out / "trials.csv").read_text().splitlines(keepends=True)
    (out / "trials.csv").write_text("".join(line for line in text if last.run not in line))
    shutil.rmtree(tmp_path / "work" / "runs" / "cpu" / last.run)
    trainer.trained.clear()
    assert scaling.main(words) == 0
    assert trainer.trained == [("modern at 332k", last.steps, last.pair), ("+muon at 332k", last.steps, last.pair)]
    line = next(line for line in (out / "trials.csv").read_text().splitlines() if last.run in line)
    (out / "trials.csv").write_text((out / "trials.csv").read_text().replace(line, line.replace("T00:", "T09:")))
    assert scaling.main(["--report", str(out)]) == 0
    found = summary(out)
    assert found["apart"] == [{"size": "332k", "pair": last.pair, "hours": 9.0}]
    assert sorted(found["curves"]["modern"]["332k"]["cost"]["seconds"]) == [str(row.pair) for row in timed[-6:-2:2]]
    assert f"- short runs of seed {last.pair} at 332k lie 9.0 hours apart and are left out" in (out / "README.md").read_text()
    assert survival.again(found, read_rows(out / "trials.csv")) | {"plots": found["plots"]} == found


def test_no_bound_where_the_runs_themselves_do_not_keep_it():
    """A curve through runs that scatter says that the base does not get there, or was there from the start; its runs there say
    otherwise."""

    def size(base, trick):
        points = [{"budget": b, "tokens": 1000 * b, "losses": losses, "failed": 0} for b, losses in base.items()]
        own = {"budget": 1, "tokens": 1000, "losses": trick, "failed": 0}
        return survival.at_one_size(*({"points": p, "cost": {"flops": 1.0, "seconds": {}}} for p in (points, [own])), seed=0)

    base = {1: [3.2, 3.0, 2.8], 2: [2.85, 2.95, 2.75], 4: [2.9, 2.6, 2.7], 8: [2.8, 2.65, 2.47]}
    found = size(base, [2.2, 2.3, 2.25])
    assert found["words"] == "> 8.00x" and found["why"] == "the base's curve is above this loss at 8 x the tokens"
    found = size(base | {8: [2.95, 2.62, 2.0]}, [2.53, 2.53, 2.53])  # mean 2.523
    assert found["words"] == "unclear" and found["why"].endswith("at 8 x the tokens, but the mean of its runs there is not")
    found = size(base, [3.6, 3.5, 3.4])
    assert found["words"] == "< 1.00x" and found["why"] == "the base's curve is below this loss at 1 x the tokens"
    found = size(base | {1: [3.7, 3.1, 2.6]}, [3.1325, 3.1325, 3.1325])  # mean 3.1333
    assert found["words"] == "unclear" and found["why"].startswith("the base's curve is below this loss at 1 x the tokens, but")


def test_retune_is_equal_and_its_cost_is_told(fake, tmp_path):
    trainer = fake({"+muon": lambda n: 1.4}, best_factor={"modern": 2.0}, noise=0.0005)
    out = tmp_path / "s"
    words = command(out, "--tricks", "muon", "--seeds", "2", "--timing-steps", "0", sizes=("0.1M", "0.33M"))
    assert scaling.main(words) == 0
    tried = [name.split(" at ")[0] for name, _, seed in trainer.trained if seed == ladder.RETUNE_SEED]
    assert tried.count("modern") == tried.count("+muon") == 3 * 2
    found = summary(out)["curves"]
    for size in ("98.3k", "332k"):
        assert found["modern"][size]["retune"]["best"] == 2 and found["modern"][size]["retune"]["edge"]
        assert found["modern"][size]["retune"]["cost"] == pytest.approx(0.02, abs=0.003)
        assert found["+muon"][size]["retune"]["best"] == 1 and found["+muon"][size]["retune"]["cost"] == 0
    # the curves were run at the better rate
    assert all("lr x 2" in name for name, _, seed in trainer.trained if name.startswith("modern") and seed < 1000)
    assert summary(out)["tricks"][0]["sizes"][0]["ratios"]["tokens"] == pytest.approx(1.4, rel=0.05)


def test_base_budgets_are_extended_only_as_far_as_they_may(fake, tmp_path, capsys):
    trainer = fake({"+muon": lambda n: 3.0}, noise=0.0005)
    words = ("--tricks", "muon", "--retune", "1", "--seeds", "2", "--timing-steps", "0")
    out = tmp_path / "a"
    assert scaling.main(command(out, *words, sizes=("0.1M", "0.33M"))) == 0
    assert {p["budget"] for p in summary(out)["curves"]["modern"]["98.3k"]["points"]} == {0.5, 1, 2, 4}
    assert summary(out)["tricks"][0]["sizes"][0]["ratios"]["tokens"] == pytest.approx(3, rel=0.1)
    out = tmp_path / "b"
    assert scaling.main(command(out, *words, "--most-budget", "2", sizes=("0.1M", "0.33M"))) == 2
    error = capsys.readouterr().err
    assert "nothing can be said: +muon: not decided: 98.3k: the base's curve is above this loss at 2 x the tokens" in error
    assert error.count("\n") == 1 and "> 2.0" in (out / "README.md").read_text()
    assert trainer.trained


def test_all_runs_diverged_at_a_size(fake, tmp_path, capsys, monkeypatch):
    fake({"+muon": lambda n: 1.4}, diverge={("modern", "332k")})
    words = ("--tricks", "muon", "--seeds", "2", "--timing-steps", "0")
    assert scaling.main(command(tmp_path / "a", *words, sizes=("0.1M", "0.33M"))) == 2
    assert "all 3 runs of modern diverged or crashed at 332k" in capsys.readouterr().err
    assert scaling.main(command(tmp_path / "b", *words, "--retune", "1", sizes=("0.1M", "0.33M"))) == 2
    error = capsys.readouterr().err
    assert "all 6 runs of modern diverged or crashed at 332k" in error and error.count("\n") == 1
    # a trick's size is left out, and said
    monkeypatch.setattr(trials, "RUNS", tmp_path / "other work")
    fake({"+muon": lambda n: 1.4}, diverge={("+muon", "332k")})
    assert scaling.main(command(tmp_path / "c", *words, "--retune", "1", sizes=("0.1M", "0.33M", "0.8M"))) == 0
    assert "left out: 332k (every run of it diverged or crashed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "scale what"), (["--tricks", "muno"], "did you mean 'muon'"), (["--tricks", "muon", "muon"], "twice"),
     (["--tricks", "wide_heads"], "are the same settings on this ladder"),
     (["--tricks", "batch_stages"], "are not for a ladder, whose batch is set by size"),
     (["--tricks", "muon", "--seeds", "1"], "no variance"), (["--tricks", "muon", "--ladder", "cpus"], "did you mean 'cpu'"),
     (["--tricks", "muon", "--sizes", "1M"], "one size is no ladder"),
     (["--tricks", "muon", "--sizes", "1M", "0.1M"], "must grow"),
     (["--tricks", "muon", "--tokens-per-parameter", "20"], "no data left: 4.23M parameters at budget 2 want 169,"),
     (["--tricks", "muon", "--budgets", "1"], "at least two"), (["--tricks", "muon", "--budgets", "2", "4"], "one of them 1"),
     (["--tricks", "muon", "--lr-transfer", "mupp"], "takes mup"), (["--tricks", "soap:lrr=1"], "no key 'lrr'"),
     (["--tricks", "muon", "--at", "big"], "'big' is no size"), (["--report", "nowhere"], "holds no experiment"),
     (["--tricks", "muon", "--plan", "--hardware", "8xH10"], "did you mean 'H100'")],
)  # fmt: skip
def test_bad_command(fake, tmp_path, capsys, flags, message):
    fake({})
    assert scaling.main([*flags, "--out", str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------- plans


def prediction(seconds=0.0, memory=0.0, ranks=1, price=0.0, micro_batches=1):
    """What `plan` reads of the cost model's prediction, of a run at its flags."""

    def predict(flags):
        config, model, _ = resolve(list(flags[4:]))
        step = SimpleNamespace(memory=SimpleNamespace(total=memory), micro_batches=micro_batches)
        where = SimpleNamespace(name="H100")
        return SimpleNamespace(
            config=config, model_config=model, seconds=seconds, step=step, ranks=ranks, price=price, where=where
        )

    return predict


def test_a_plan_counts_what_is_run(fake, tmp_path, capsys, monkeypatch):
    """Runs, tokens and FLOPs of the plan are those of the trials; its hours those of the cost model, and the cost follows."""
    trainer = fake({"+muon": lambda n: 1.4})
    monkeypatch.setattr(plan, "predict", prediction(seconds=3.6, ranks=8, price=2.5, memory=7e9, micro_batches=2))
    words = command(tmp_path / "s", "--tricks", "muon", "--hardware", "8xH100", sizes=("0.1M", "0.33M"))
    assert scaling.main(["--plan", *words]) == 0
    text = capsys.readouterr().out
    assert not trainer.trained and not (tmp_path / "s").exists()
    runs, tokens = re.search(r"^([\d,]+) runs, ([\d.]+)M tokens", text, re.MULTILINE).groups()
    assert scaling.main(words) == 0
    assert int(runs) == len(trainer.trained)
    rows = read_rows(tmp_path / "s" / "trials.csv")
    assert float(tokens) == pytest.approx(sum(r.tokens for r in rows) / 1e6, rel=0.005)
    hours, cost = map(float, re.search(r"([\d.]+) hours, ([\d,]+) \$ on 8 x H100", text).groups())
    batch = {r.arm.split(" at ")[1].split(",")[0]: r.tokens / r.steps for r in rows}
    validated = sum(512 / 3 / batch[r.arm.split(" at ")[1].split(",")[0]] for r in rows)  # as steps
    assert hours == pytest.approx((sum(r.steps for r in rows) + validated) * 3.6 / 3600, abs=0.05 + 1e-9)
    assert cost == pytest.approx(hours * 8 * 2.5, abs=0.05 * 20 + 0.5)
    first = text.splitlines()[2].strip("| ").split(" | ")
    assert first[0] == "98.3k" and first[-3:-1] == ["7.00 GB", f"{int(first[3].replace(',', '')) // 16:,}"]


def test_a_plan_asks_the_cost_model(fake, tmp_path, capsys, monkeypatch):
    """Once for each arm and size, for the machine that is named."""
    fake({})
    asked, predict = [], plan.predict

    def noted(flags):
        asked.append(predict(flags))
        return asked[-1]

    monkeypatch.setattr(plan, "predict", noted)
    words = command(tmp_path / "s", "--tricks", "lion", "--hardware", "2xH100", "--price", "5000", sizes=("12k", "98k"))
    assert scaling.main(["--plan", *words]) == 0
    text = capsys.readouterr().out
    seconds = {(p.model_config.width, "lion" in p.config.optimizer): p.seconds for p in asked}
    assert [*seconds] == [(32, False), (32, True), (64, False), (64, True)]
    assert {(p.where.name, p.ranks) for p in asked} == {("H100", 2)} and len(asked) == 4
    cost = float(re.search(r"hours, ([\d,]+) \$ on 2 x H100", text)[1].replace(",", ""))
    made = scaling.make_experiment(scaling.parse(["--plan", *words]))
    runs = [(len(made.seeds(cell.phase)), cell) for cell in made.planned()]
    steps = [count * cell.steps * seconds[cell.rung.size.width, cell.name == "+lion"] for count, cell in runs]
    assert cost == pytest.approx(sum(steps) / 3600 * 2 * 5000, rel=0.1)  # and validations


def test_a_plan_takes_the_largest_micro_batch_that_fits(fake, tmp_path, capsys, monkeypatch):
    fits = {"12.3k": 128, "98.3k": None}

    def predict(flags):
        if "--micro-batch-tokens" in flags:
            assert flags[-1] == "128"
            return prediction()(flags)
        width = flags[flags.index("--width") + 1]
        raise plan.TooLittleMemory("a step needs 100 GB", fits["12.3k" if width == "32" else "98.3k"])

    fake({})
    monkeypatch.setattr(plan, "predict", predict)
    words = command(tmp_path / "s", "--tricks", "muon", "--plan", "--hardware", "1xL40S", sizes=("12k", "98k"))
    assert scaling.main(words) == 2
    error = capsys.readouterr().err
    assert "modern at 98.3k: a step needs 100 GB; add -- --checkpoint-activations" in error and error.count("\n") == 1
    fits["98.3k"] = 128
    assert scaling.main(words) == 0


# ---------------------------------------------------------------- the real trainer


@pytest.mark.slow
def test_a_small_ladder_from_command_to_pictures(tmp_path, monkeypatch, sotu):
    """The trainer in this process: test_trials.py has what starts it as one of its own."""
    monkeypatch.setattr(trials, "RUNS", tmp_path / "work")

    def here(trial, processes=1, threads=0):
        assert train_gpt.main([*trial.flags, "--out", str(trial.folder)]) == 0
        return Outcome(trial, trial.result)

    monkeypatch.setattr(trials, "train", here)
    monkeypatch.setattr("lab.scaling.experiment.TIME_PAIRS", 1)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # which only a main thread may call
    out = tmp_path / "s"
    sizes = (ladder.Size("3k", 1, 1, 16), ladder.Size("12k", 1, 1, 32))
    monkeypatch.setitem(ladder.LADDERS, "cpu", dataclasses.replace(ladder.LADDERS["cpu"], sizes=sizes))
    words = ["--tricks", "muon", "--tokens-per-parameter", "0.1", "--budgets", "1", "4",
             "--most-budget", "1", "--seeds", "2", "--retune", "1", "--timing-steps", "2"]  # fmt: skip
    own = ["--sequence-length", "32", "--val-tokens", "512", "--checkpoint-minutes", "0"]
    code = scaling.main([*words, "--at", "1M", "--out", str(out), "--", *own])
    found, rows = summary(out), read_rows(out / "trials.csv")
    assert {r.phase for r in rows} == {"curve", "time"} and {r.status for r in rows} == {"ok"}
    said = [s for s in found["tricks"][0]["sizes"] if "ratios" in s]
    assert (code == 0) == (len(said) == 2)  # so short a run may leave only bounds
    for size in found["curves"]["modern"].values():
        points = {p["budget"]: p for p in size["points"]}
        assert points.keys() >= {1, 4} and all(len(p["losses"]) == 2 for p in points.values())
        assert max(points[4]["losses"]) < min(points[1]["losses"])  # it learns
        assert set(size["cost"]["seconds"]) == {"2000"}
    for name in ("README.md", "survival.png", "sizes.png"):
        assert (out / name).stat().st_size > 100, name


def test_the_survival_picture_shows_open_ends_and_sizes_without_a_figure():
    sizes = [{"size": name, "parameters": n} for name, n in (("10k", 1e4), ("100k", 1e5), ("1M", 1e6))]
    measured = [
        {"ratios": {"tokens": 1.2}, "intervals": {"tokens": [1.1, None]}}, {"words": "unclear"}, {"words": "> 8x", "low": 8.0}
    ]  # fmt: skip
    measured = [size | found for size, found in zip(sizes, measured, strict=True)]
    tricks = [{"trick": f"+{i}", "sizes": measured, "trends": {"tokens": None}} for i in range(5)]
    axes = plots.survival({"at": 1e7, "sizes": sizes, "tricks": tricks}).axes[:5]
    markers = [line.get_marker() for line in axes[0].lines]
    assert markers.count("_") == 1 and markers.count(6) == 1  # a cap below, an arrowhead above
    assert [text.get_text() for text in axes[0].texts] == ["?"]
    labelled = [axis.xaxis.get_tick_params()["labelbottom"] for axis in axes]
    assert all(labelled)


def test_a_gpu_and_a_cpu_trained_the_same_runs_to_the_same_losses():
    """README's words on the two ladders that are kept: those runs that have the same settings in both, in fp32."""
    cpu, gpu = (
        {
            (r.arm, r.steps, r.seed): r.val_loss
            for r in read_rows(ROOT / "records" / "scaling" / name / "trials.csv")
            if ("H100" in r.machine) == (name == "h100-modern")  # three runs of that ladder are a CPU's
        }
        for name in ("cpu-modern", "h100-modern")
    )
    apart = [abs(cpu[run] - gpu[run]) for run in cpu.keys() & gpu.keys()]
    assert len(apart) == 195 and np.median(apart) < 0.0003 and sum(d > 0.01 for d in apart) == 25
