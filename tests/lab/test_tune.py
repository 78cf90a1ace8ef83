"""compare.py tune: the space, the budget, and what the tables say. A formula stands in the place of the trainer; one test runs
the real one."""

import dataclasses
import itertools
import json
import math
import signal
import zlib
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from scipy import stats

import compare
import optimizers
import train_gpt
import tricks
from config import resolve
from engine import hardware, spec
from engine.spec import UsageError, split, trust
from lab import plots, trials
from lab.records import tables
from lab.records.judge import Broken
from lab.trials import Arm, Outcome, Trial
from lab.tuning import descent, report, tune, tuned
from lab.tuning.space import EXTRAS, Dimension, points, submission
from lab.tuning.tuned import Row, Table
from model import GPT
from optimizers.__main__ import run as show

EVERYONE = [*optimizers.OPTIMIZERS, *EXTRAS]
SAVE = plots.save


class FakeTrainer:
    """Leaves the run folder that a trainer would have: a bowl of the logarithm of the learning rate, lowest at `best`."""

    def __init__(self, best=3e-3, diverged=(), seconds=0.02):
        self.crashing: set[str] = set()
        self.cpu = "some CPU"
        self.best, self.diverged, self.seconds, self.trained, self.stop_after = best, set(diverged), seconds, [], math.inf

    def __call__(self, trial, processes=1, threads=0):
        if trial.result is not None:
            return Outcome(trial, trial.result)
        if len(self.trained) >= self.stop_after:
            raise KeyboardInterrupt
        config, _, _ = resolve(trial.flags)
        self.dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.dtype]
        if trial.arm.name in self.crashing:
            return Outcome(trial, None, "RuntimeError: out of luck")
        if trial.seed < 10**6:  # else a plan measures
            self.trained.append((trial.arm.name, trial.steps, trial.seed, config.optimizer, config.track))
        rate = float(split(config.optimizer)[1].get("lr", 1e-3))
        final = 2.0 + 0.1 * math.log(rate / self.best) ** 2 + 1e-3 * (trial.seed % 7)
        status = "diverged" if trial.arm.name in self.diverged else "ok"
        validated = [*range(config.val_every, trial.steps, config.val_every), trial.steps]
        above = 1 + zlib.crc32(" ".join(trial.flags).encode()) % 9973 / 1e4  # no two settings have one curve
        log = [dict(event="val", step=s, loss=final + above * (1 - s / trial.steps)) for s in validated]
        trial.folder.mkdir(parents=True)
        (trial.folder / "env.json").write_text(
            json.dumps({"cpu": self.cpu, "dtype": self.dtype, "source_sha256": trials.run_folder.source_hash()})
        )
        (trial.folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
        result = {
            "status": status,
            "val_loss": None if status == "diverged" else final,
            "process_time": self.seconds * trial.steps,
            "train_time": 1.5 * self.seconds * trial.steps,
        }
        (trial.folder / "result.json").write_text(json.dumps(result))
        return Outcome(trial, result)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A FakeTrainer for two short workloads. Pictures are not drawn."""
    trainer = FakeTrainer()
    monkeypatch.setattr(trials, "train", trainer)
    monkeypatch.setattr(plots, "save", lambda figure, folder, name, data: plots.pyplot().close(figure) or name)
    monkeypatch.setattr(trials, "RUNS", tmp_path)
    for name in ("wiki", "tokens"):
        short = tricks.TRACKS[name].settings | {"steps": 40}
        monkeypatch.setitem(tricks.TRACKS, name, dataclasses.replace(tricks.TRACKS[name], settings=short))
    return trainer


def call(tmp_path, *words: str) -> int:
    where = ["--workloads", "wiki", "tokens", "--side-by-side", "1", "--out", str(tmp_path / "out")]
    return compare.main(["tune", *words, *where])


def table(tmp_path, name: str, track: str = "wiki") -> Table:
    return Table(tmp_path / "out" / track / f"{name}.csv")


# ---------------------------------------------------------------- space


@pytest.mark.parametrize(("scale", "middle"), [("linear", 0.5495), ("log", 0.3146), ("complement", 0.9684)])
def test_a_dimension_is_even_on_its_scale(scale, middle):
    low, high = (0.9, 0.99) if scale == "complement" else (0.1, 0.999)
    d = Dimension("optimizer", "x", low, high, scale)
    found = d.at(0.5)
    expected = {"linear": (low + high) / 2, "log": math.sqrt(low * high), "complement": 1 - math.sqrt((1 - low) * (1 - high))}
    assert found == pytest.approx(expected[scale], rel=2e-3) and found == pytest.approx(middle, abs=2e-3)
    assert {d.at(0), d.at(1)} == {low, high}


@pytest.mark.parametrize("name", EVERYONE)
def test_every_corner_of_every_space_builds(name):
    entry = submission(name)
    keys = [d.name for d in entry.dimensions]
    assert len(set(keys)) == len(keys) and "lr" in keys and any("warmup" in key for key in keys)
    if name != "amos":  # whose decay is part of the rule
        assert any("weight_decay" in key for key in keys)
    config = tune.tricks.track("bytes-small").settings
    _, model, _ = resolve(["--track", "bytes-small", "--layers", "1"])
    for share in (0, 1):
        flags = entry.flags({d.name: d.at(share) for d in entry.dimensions})
        run, _, _ = resolve(["--track", "bytes-small", *flags])
        built = optimizers.build(run.optimizer, GPT(model), config["steps"], run.average)
        assert all(math.isfinite(g["lr"]) for g in built.param_groups)
    assert entry.flags(entry.defaults()) and set(entry.defaults()) == set(keys)


def test_points_are_the_same_for_all_with_as_many_dimensions_and_other_ones_per_study():
    adam, lion = submission("adamw").dimensions, submission("lion").dimensions
    share = lambda dims, point: [  # noqa: E731
        (math.log(point[d.name] / d.at(0)) / math.log(d.at(1) / d.at(0))) if d.scale == "log" else None for d in dims
    ]
    for one, other in zip(points(adam, 5, 0), points(lion, 5, 0), strict=True):
        assert share(adam, one)[0] == pytest.approx(share(lion, other)[0], abs=2e-3)
    assert points(adam, 3, 0) == points(adam, 5, 0)[:3] and points(adam, 3, 1) != points(adam, 3, 0)
    rates = sorted(p["lr"] for p in points(adam, 5, 0))  # quasi-random: no two close together
    assert min(b / a for a, b in itertools.pairwise(rates)) > 1.3


OWN = """
import torch
from optimizers.base import *

class Plain(torch.optim.AdamW):
    pass

class Matrices(torch.optim.Optimizer):
    roles = ("matrix",)
    def __init__(self, params, lr, momentum=0.9, rank=4): super().__init__(params, dict(lr=lr, momentum=momentum))

class Declared(torch.optim.AdamW):
    search = {"lr": (0.01, 10, "log"), "betas/2": (0.9, 0.999, "complement"), "amsgrad": (0, 1, "choice")}

class Like(Elementwise):
    lr, sharpness = LR(0.5), hyper(2.0, "how sharp", (1.0, 4.0, "linear"))

class Wrong(torch.optim.SGD):
    search = {"lr": (0.1, 0.01, "log")}
"""


def test_own_optimizers_are_searched_as_the_registered_ones(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw_sensitivity", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    (file := Path("mine.py")).write_text(OWN)
    plain, matrices, declared, like, wrong = names = [f"{file}:{c}" for c in ("Plain", "Matrices", "Declared", "Like", "Wrong")]
    trust(names)
    spaces = {name: {d.name: (d.low, d.high) for d in submission(name).dimensions} for name in names[:4]}
    warmup, adamw = {"schedule_warmup": (0.01, 0.2)}, {d.name: (d.low, d.high) for d in submission("adamw").dimensions}
    usual = {"betas/1": adamw["beta1"], "betas/2": adamw["beta2"], "weight_decay": adamw["weight_decay"]}
    assert spaces[plain] == {"lr": (3.33e-5, 0.03), **usual, **warmup}
    assert spaces[matrices] == {"lr": (1e-4, 1.0), "momentum": (0.8, 0.99), "adamw_lr": adamw["lr"], **warmup}
    assert spaces[declared] == {"lr": (0.01, 10), "betas/2": (0.9, 0.999), "amsgrad": (0, 1), **warmup}
    assert spaces[like] == {"lr": (0.05, 5), "sharpness": (1.0, 4.0), **warmup}
    with pytest.raises(UsageError, match=r"search has 'lr': \(0.1, 0.01, 'log'\), which is not \(low, high, linear"):
        _ = submission(wrong).dimensions
    settings = {"lr": 0.1, "betas/2": 0.99, "amsgrad": 1.0}
    assert submission(declared).flags(settings)[1] == f"{declared}:lr=0.1,betas=0.9/0.99,amsgrad=1"
    fixed = submission(f"{plain}:betas=0.9/0.99")
    assert [d.name for d in fixed.dimensions] == ["lr", "weight_decay", "schedule_warmup"]
    gpt = GPT(resolve(["--track", "tiny"])[1])
    assert {g["lr"] for g in optimizers.build(f"{matrices}:lr=0.1,adamw_lr=0.02", gpt).param_groups} == {0.1, 0.02}

    words = ("--optimizers", "adamw", plain, matrices, "--trials", "2", "--no-neighbours")
    assert call(tmp_path, *words) == 0
    chosen = json.loads((tmp_path / "out" / "tuned.json").read_text())["wiki"]
    assert {plain, matrices} <= set(chosen) and chosen[plain]["optimizer"].startswith(f"{plain}:lr=")
    arms = ["--track", "tiny", "--optimizers", "adamw", matrices, "--tuned-on", f"{tmp_path / 'out'}/wiki"]
    for arm, name in zip(compare.make_arms(compare.parse(arms)), ("adamw", matrices), strict=True):
        run, *_ = resolve(list(arm.flags))
        assert (run.optimizer, run.schedule) == (chosen[name]["optimizer"], chosen[name]["schedule"])
    monkeypatch.setattr(spec, "TRUSTED", set())  # another day: the report imports no code, and keeps what was found
    assert call(tmp_path, "--report") == 0
    assert json.loads((tmp_path / "out" / "tuned.json").read_text())["wiki"] == chosen
    monkeypatch.setattr(tricks, "TUNED", tmp_path / "out" / "tuned.json")
    spec.trust([plain])  # as typed again
    assert f"wiki: {chosen[plain]['optimizer']}" in (shown := show([plain])) and "lr" in shown.data[plain]


def test_fixed_keys():
    fixed = submission("sgd:nesterov=false,momentum=0.9")
    assert [d.key for d in fixed.dimensions] == ["lr", "weight_decay", "warmup"]
    assert fixed.flags({"lr": 0.1})[:2] == ("--optimizer", "sgd:nesterov=false,momentum=0.9,lr=0.1")
    with pytest.raises(UsageError, match="did you mean 'muon'"):
        submission("muno")
    everything = ",".join(f"{d.key}=0.1" for d in submission("schedule_free_sgd").dimensions)
    with pytest.raises(UsageError, match="nothing is left to search"):
        _ = submission(f"schedule_free_sgd:{everything}").dimensions


# ---------------------------------------------------------------- running


def test_everyone_gets_the_same_budget_and_nothing_is_trained_twice(fake, tmp_path, capsys):
    words = ("--optimizers", "adamw", "muon", "heavy_ball", "--trials", "3", "--target-seeds", "2")
    assert call(tmp_path, *words) == 0
    search = [t for t in fake.trained if t[1] == 40]
    by_name = {name: [t for t in search if t[0] == name] for name in ("adamw", "muon", "heavy_ball")}
    assert {name: len(t) for name, t in by_name.items()} == {
        "adamw": 2 * (3 + 4),
        "muon": 2 * (3 + 4),
        "heavy_ball": 2 * (3 + 4),
    }
    assert sum(t[1] == 30 for t in fake.trained) == 2 * 2 * 2  # targets, of the two that set them, at three quarters
    rows = table(tmp_path, "adamw").of("search")
    assert [row.number for row in rows] == [0, 1, 2] and len({row.seed for row in rows}) == 3
    assert [r.settings for r in rows] == [r.settings for r in table(tmp_path, "adamw", "tokens").of("search")]

    count = len(fake.trained)
    assert call(tmp_path, *words) == 0 and len(fake.trained) == count
    capsys.readouterr()
    assert call(tmp_path, *words, "--studies", "2", "--no-neighbours") == 0
    assert len(table(tmp_path, "muon").of("search", 1)) == 3 and len(table(tmp_path, "muon").of("search", 0)) == 3
    assert "there already" in capsys.readouterr().out


def test_links_are_refused(fake, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "wiki").symlink_to(tmp_path)
    assert call(tmp_path, "--optimizers", "adamw") == 2
    assert "wiki is a link" in capsys.readouterr().err and not fake.trained


def test_an_interrupted_search_goes_on(fake, tmp_path):
    fake.stop_after = 4
    words = ("--optimizers", "adamw", "lion", "--trials", "3", "--no-neighbours", "--target-seeds", "1")
    assert call(tmp_path, *words) == 130
    assert len(fake.trained) == 4
    fake.stop_after = math.inf
    assert call(tmp_path, *words) == 0
    assert len(fake.trained) == 2 * 2 * 3 + 2 and len(set(fake.trained)) == len(fake.trained)
    lion = submission("lion").dimensions
    assert [row.settings for row in table(tmp_path, "lion").of("search")] == points(lion, 3, 0)


def test_a_descent_ends_where_no_single_change_is_better(fake, tmp_path, capsys):
    """With the bowl of the rate alone as the loss; interrupted on the way, its order proved by the rule of records/."""
    words = ("--optimizers", "adamw", "sgd", "--trials", "3", "--no-neighbours", "--target-seeds", "1", "--descend")
    fake.stop_after = 22
    assert call(tmp_path, *words) == 130
    fake.stop_after = math.inf
    assert call(tmp_path, *words) == 0
    for name in ("adamw", "sgd"):
        rows, entry = descent.rows_of(table(tmp_path, name)), submission(name)
        end = descent.found(table(tmp_path, name))
        assert rows[0].settings == table(tmp_path, name).best().settings and {row.seed for row in rows} == {descent.SEED}
        assert abs(math.log2(end.settings["lr"] / 3e-3)) < 0.6 and len(rows) <= descent.BUDGET, end  # a factor of 2 is a move
        finals = table(tmp_path, name).of("final")
        assert [(r.seed - descent.SEED, r.settings) for r in finals] == [(n, end.settings) for n in (1, 2, 3)]
        rises = descent.rises(entry.dimensions, table(tmp_path, name))
        assert len(rises) == len(descent.changes(entry.dimensions, end.settings)) and min(rises) > -0.005
    text = (tmp_path / "out" / "README.md").read_text()
    assert "In 4 of 4 cases no change is better; of " in text and "| `adamw` | 1.00 | " in text
    count = len(fake.trained)
    assert call(tmp_path, *words) == 0 and len(fake.trained) == count

    of_tables = tables.Tuning(tmp_path / "out")
    assert tables.studies(of_tables) == "as drawn"
    path = tmp_path / "out" / "wiki" / "sgd.csv"
    whole, forged = path.read_text(), table(tmp_path, "sgd")
    last = len(descent.rows_of(forged)) - 1
    for kind, words in (("final,0,2,", "2 final runs, not 3"), (f"descent,0,{last},", "its descent has not ended")):
        path.write_text("".join(line for line in whole.splitlines(keepends=True) if not line.startswith(kind)))
        with pytest.raises(Broken, match=words):
            tables.studies(tables.Tuning(path.parent.parent))
    middle = descent.rows_of(forged)[3]
    forged.add(dataclasses.replace(middle, val_loss=1.0))
    with pytest.raises(Broken, match="wiki/sgd: the losses of the descent lead elsewhere"):
        tables.studies(tables.Tuning(path.parent.parent))


def test_moves_of_a_descent(tmp_path):
    lr, beta, decay = (
        Dimension("optimizer", *d)
        for d in (("lr", 0.001, 0.1, "log"), ("b", 0.8, 0.98, "complement"), ("weight_decay", 0.01, 1, "log"))
    )
    choice, warmup = Dimension("optimizer", "nesterov", 0, 1, "choice"), Dimension("schedule", "warmup", 0.01, 0.2, "log")
    at = {"lr": 0.1, "b": 0.97, "weight_decay": 0.01, "nesterov": 0.0, "schedule_warmup": 0.15}
    found = [
        (key, each[key])
        for each in descent.changes((lr, beta, decay, choice, warmup), at)
        for key in at
        if each[key] != at[key]
    ]
    rates = [("lr", 0.2), ("lr", 0.05), ("b", 0.98), ("b", 0.94), ("weight_decay", 0.04), ("weight_decay", 0.0)]
    assert found == [*rates, ("nesterov", 1.0), ("schedule_warmup", 0.2), ("schedule_warmup", 0.075)]
    losses = {0.1: 2.0, 0.2: 1.9, 0.4: 1.897, 0.05: 9.0}  # 0.4 is better by less than what counts
    tried, following = [], at
    while following:
        tried.append(losses[following["lr"]])
        order, following = descent.order((lr,), at, tried)
    assert [each["lr"] for each in order] == [0.1, 0.2, 0.4]
    curves = {"adamw": [(20, 3.0), (40, 2.0)], "fast": [(20, 2.0), (40, 1.0)]}
    finals = {
        name: [row("final", n, curve[-1][1], losses=curve, seconds=s) for n in range(3)]
        for (name, curve), s in zip(curves.items(), (1, 1.5), strict=True)
    }
    held = {
        name: made(tmp_path, name, row("descent", 0, 2.0), row("search", 1, seconds=s), *finals[name])
        for name, s in (("adamw", 1), ("fast", 1.5))
    }
    assert descent.speed_ups(held) == {"adamw": (1, 1), "fast": (2, pytest.approx(2 / 1.5))}


def test_a_crashed_trial_is_tried_again_with_its_own_settings(fake, tmp_path, capsys):
    fake.crashing = {"lion"}
    words = ("--optimizers", "adamw", "lion", "--trials", "2", "--no-neighbours", "--target-seeds", "1")
    assert call(tmp_path, *words) == 0
    said = capsys.readouterr().out
    assert "lion  study 0, trial 0: crashed RuntimeError: out of luck" in said and "hours are over" not in said
    fake.crashing = set()
    assert call(tmp_path, *words) == 0
    lion = submission("lion").dimensions
    rows = table(tmp_path, "lion").of("search")
    assert [r.status for r in rows] == ["ok", "ok"] and [r.settings for r in rows] == points(lion, 2, 0)


def test_a_workload_keeps_its_compute_type(fake, tmp_path, capsys, monkeypatch):
    """The neighbours of trials in fp32 would else be in bf16 on a machine that has it, and the two end apart."""
    words = ("--optimizers", "adamw", "--trials", "2", "--target-seeds", "1")
    types = lambda: {row.dtype for row in table(tmp_path, "adamw").rows.values()}  # noqa: E731
    monkeypatch.setattr(hardware, "has_native_bf16", lambda device: False)
    assert call(tmp_path, *words, "--no-neighbours") == 0 and types() == {"fp32"}
    monkeypatch.setattr(hardware, "has_native_bf16", lambda device: True)
    assert call(tmp_path, *words) == 0 and types() == {"fp32"} and len(table(tmp_path, "adamw").of("neighbour")) == 4
    assert "All trials in fp32." in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert call(tmp_path, *words, "--dtype", "bf16") == 2
    assert "are in fp32: choose another --out" in (err := capsys.readouterr().err) and err.count("\n") == 1
    mixed = made(tmp_path / "mixed", "adamw", row(), row(number=1, dtype="bf16"))
    with pytest.raises(UsageError, match="trials are in bf16 and in fp32, and their losses do not compare"):
        tuned.dtype_of({"adamw": mixed})


def test_diverged_trials_are_kept_and_never_win(fake, tmp_path, capsys):
    fake.diverged = {"lion"}
    words = ("--optimizers", "adamw", "lion", "--trials", "2", "--no-neighbours", "--target-seeds", "1")
    assert call(tmp_path, *words) == 0
    assert table(tmp_path, "adamw").best().status == "ok"
    assert table(tmp_path, "lion").best() is None
    lion = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "lion.csv" in line]
    assert len(lion) == 2 and all("| diverged |" in line for line in lion)


@pytest.mark.slow
def test_the_plan_keeps_within_the_hours(fake, tmp_path, capsys, monkeypatch):
    words = ("--optimizers", "adamw", "muon", "--no-neighbours", "--target-seeds", "1")
    assert call(tmp_path, *words, "--plan", "--trials", "7") == 0
    assert "2 submissions, 1 studies of 7 trials" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert not fake.trained and not any((tmp_path / "runs").rglob("result.json"))  # what was timed is cleared away
    monkeypatch.setattr(tune.Contest, "seconds_of_a_trial", lambda contest, track: 60.0)
    assert call(tmp_path, *words, "--machine-hours", "0.0001", "--plan") == 2
    assert "one trial for everyone takes" in capsys.readouterr().err
    assert call(tmp_path, *words, "--machine-hours", "0.3", "--trials", "500", "--plan") == 0
    planned = int(capsys.readouterr().out.split("studies of ")[1].split()[0])
    assert 1 <= planned < 500


def test_the_plan_counts_only_what_is_not_there(fake, tmp_path, capsys):
    """Else a resumed search would be cut to hours that are spent already."""
    near = lambda value: pytest.approx([value, value], abs=0.006)  # noqa: E731

    def hours(*words: str) -> list[float]:
        capsys.readouterr()
        assert call(tmp_path, *words, "--optimizers", "adamw", "muon", "--target-seeds", "1", "--plan") == 0
        return [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines() if " a trial " in line]

    assert call(tmp_path, "--optimizers", "adamw", "muon", "--trials", "3", "--target-seeds", "1", "--no-neighbours") == 0
    for path in (tmp_path / "out").glob("*/*.csv"):  # an hour and a half each
        found = Table(path)
        for each in list(found.rows.values()):
            found.add(dataclasses.replace(each, wall=5400.0))
    assert hours("--trials", "3", "--no-neighbours") == [0, 0]
    assert hours("--trials", "3") == [2 * 4 * 1.5] * 2
    assert hours("--trials", "5", "--no-neighbours") == near(1.5 * (2 * 2 + 0.75))  # targets may be others then
    assert hours("--trials", "3", "--studies", "2", "--no-neighbours", "--machine-hours", "30") == near(1.5 * (2 * 3 + 0.75))
    words = ("--trials", "3", "--no-neighbours", "--descend")
    moves = sum(len(descent.ways(d)) for name in ("adamw", "muon") for d in submission(name).dimensions)
    assert hours(*words) == near(1.5 * (2 * (descent.BUDGET + descent.SEEDS) + moves))
    assert call(tmp_path, *words, "--optimizers", "adamw", "muon", "--target-seeds", "1") == 0
    assert hours(*words) == [0, 0]


def test_bad_words_are_one_line(fake, tmp_path, capsys):
    for words, said in {
        ("--trials", "3"): "tune what?",
        ("--optimizers", "muoon"): "did you mean 'muon'?",
        ("--optimizers", "adamw", "--trials", "0"): "--trials must be at least 1",
        ("--optimizers", "adamw", "--machine-hours", "-1"): "--machine-hours must be at least 0",
        ("--optimizers", "adamw", "--trails", "3"): "unrecognized arguments: --trails",
        ("--report",): "holds no finished trial",
    }.items():
        assert call(tmp_path, *words) == 2, words
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert compare.main(["tune", "--optimizers", "adamw", "--workloads", "wikki"]) == 2
    assert "did you mean 'wiki'" in capsys.readouterr().err
    assert not fake.trained


def test_damaged_tables_are_refused_by_name(fake, tmp_path, capsys):
    words = ("--optimizers", "adamw", "--trials", "2", "--no-neighbours", "--target-seeds", "1")
    assert call(tmp_path, *words) == 0
    capsys.readouterr()
    path = table(tmp_path, "adamw").path
    text = path.read_text()
    path.write_text(text.replace(",ok,", ",ok,x", 1))
    assert call(tmp_path, *words) == 2 and "adamw.csv line 2 is no trial" in capsys.readouterr().err
    path.write_text(text.replace(table(tmp_path, "adamw", "tokens").of("search")[0].space, "00000000"))
    assert call(tmp_path, *words) == 2 and "another version of the space" in capsys.readouterr().err


def test_tables_of_own_optimizers_keep_apart(fake, tmp_path, capsys, monkeypatch):
    """By name, though both would be the same in a file's letters; and by the code that the file held."""
    monkeypatch.setattr(report, "draw_sensitivity", lambda *_: None)
    names = []
    for path in ("x/b.py", "x-b.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("import torch\nclass Mine(torch.optim.SGD):\n    pass\n")
        names.append(f"{tmp_path / path}:Mine")
    trust(names)
    words = ("--optimizers", *names, "--trials", "2", "--no-neighbours")
    assert call(tmp_path, *words) == 0
    there = tuned.read_tables(tmp_path / "out")["wiki"]
    assert set(names) <= set(there) and all(len(there[name].rows) >= 2 for name in names)
    page = (tmp_path / "out" / "README.md").read_text()
    assert unquote(unquote(page)).count(f"](wiki/{names[1]}.csv)") == 1
    (tmp_path / "x-b.py").write_text("import torch\nclass Mine(torch.optim.SGD):\n    other = 1\n")
    capsys.readouterr()
    assert call(tmp_path, *words) == 2 and "or of the optimizer's file: move" in capsys.readouterr().err


def test_all_diverged(fake, tmp_path, capsys):
    fake.diverged = {"adamw"}
    assert call(tmp_path, "--optimizers", "adamw", "--trials", "2", "--target-seeds", "1") == 2
    assert "every trial diverged or crashed" in capsys.readouterr().err


# ---------------------------------------------------------------- what the tables say


def row(
    kind="search",
    number=0,
    loss=2.0,
    study=0,
    seed=0,
    steps=10,
    settings=None,
    losses=(),
    seconds=1.0,
    machine="a",
    status="ok",
    dtype="fp32",
    source="s",
):
    settings = settings or {"lr": 0.01, "weight_decay": 0.1, "schedule_warmup": 0.1}
    about = (machine, dtype, source, "v")
    return Row(kind, study, number, seed, steps, status, loss, seconds, 1.0, settings, list(losses), *about)


def made(tmp_path, name: str, *rows: Row) -> Table:
    found = Table(tmp_path / "wiki" / f"{name}.csv")
    for each in rows:
        found.add(each)
    return Table(found.path)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(number=1, losses=[(5, 2.5), (10, 2.0)]),
        row(number=0, loss=math.inf, status="diverged"),
        row("target", study=1),
    ]
    found = made(tmp_path, "adamw", *rows)
    assert list(found.rows.values()) == rows
    assert made(tmp_path, "adamw", row(number=1, loss=1.5)).best().val_loss == 1.5  # the same trial again takes its place


def test_a_run_that_had_ended_before_costs_its_training(tmp_path, monkeypatch):
    """`tune` was killed between the end of a run and its row: the next one finds the run there, in no time."""
    monkeypatch.setattr(trials, "RUNS", tmp_path)
    trial = Trial(Arm("adamw", ("--track", "wiki")), 40, 0)
    ended = Outcome(trial, {"status": "ok", "val_loss": 2.0, "process_time": 30.0, "train_time": 40.0})
    about = dict(kind="search", study=0, number=0, settings={}, space="v")
    assert [Row.of(ended, wall, **about).wall for wall in (0.0, 55.0)] == [40.0, 55.0]


def test_neighbours_differ_in_one_setting_and_are_judged_on_the_best_one_s_seed(tmp_path):
    best = row(number=3, seed=3, loss=2.0)
    found = tuned.neighbours(best.settings)
    assert list(found) == ["lr / 2", "lr x 2", "no weight decay", "half the warm-up"]
    for settings in found.values():
        assert sum(settings[key] != best.settings[key] for key in settings) == 1
    off = [row("neighbour", n, 2.1 + n / 10, seed=3, settings=s) for n, s in enumerate(found.values())]
    stray = row("neighbour", 9, 9.0, seed=4, settings=found["lr / 2"])
    held = made(tmp_path, "adamw", best, row(loss=2.5), *off, stray)
    assert {change: r.number for change, r in held.neighbours().items()} == {change: n for n, change in enumerate(found)}
    assert made(tmp_path / "none", "adamw", row(status="diverged", loss=math.inf), off[0]).neighbours() == {}
    lost = held.sensitivity()
    assert lost == pytest.approx({"lr / 2": 0.1, "lr x 2": 0.2, "no weight decay": 0.3, "half the warm-up": 0.4})
    better = made(tmp_path / "better", "sgd", best, row("neighbour", 0, 1.98, seed=3, settings=found["lr / 2"]))
    said = " ".join(tuned.beaten([held, better, made(tmp_path / "no", "lion", best)]))
    assert said.startswith(" Of 2 best settings with neighbours (5 trials)") and "at most by 0.02" in said
    assert "1 by more than 0.001, 1 by more than 0.01, 0 by more than 0.04" in said


def test_the_target_is_the_best_median_of_the_reruns(tmp_path):
    reruns = lambda losses: [row("target", n, x, study=0, seed=100 + n, steps=8) for n, x in enumerate(losses)]  # noqa: E731
    tables = {
        "adamw": made(tmp_path, "adamw", row(), *reruns([2.2, 2.1, 2.6])),
        "sgd": made(tmp_path, "sgd", row(), *reruns([2.15, 2.14, 2.0])),
        "muon": made(tmp_path, "muon", row(), *reruns([1.0, 1.0, 1.0])),  # sets none
    }
    assert tuned.target_of(tables) == {"loss": 2.14, "set_by": "sgd", "runs": 3, "steps": 8}
    assert tuned.target_of({"muon": tables["muon"]}) is None
    diverged = [row("target", n, math.inf, seed=100 + n, steps=8, status="diverged") for n in (1, 2)]
    tables["sgd"] = made(tmp_path, "sgd", *diverged)  # one rerun at 2.15 is left: its median is inf
    assert tuned.target_of(tables)["set_by"] == "adamw" and tuned.target_of({"sgd": tables["sgd"]}) is None


def test_a_target_does_not_hang_on_the_number_of_studies(fake, tmp_path):
    reruns = [row("target", n, 2.1, study=4, seed=100 + n, steps=8) for n in range(3)]
    others = [row("target", n, 1.8, study=1002, seed=100 + n, steps=8) for n in range(3)]
    adamw = made(tmp_path, "adamw", row(number=4), *reruns, row(number=2, study=1, loss=1.5), *others)
    assert adamw.best().study == 1 and tuned.target_of({"adamw": adamw})["loss"] == 2.1
    contest = tune.Contest(tune.parse(["--optimizers", "adamw", "--workloads", "wiki", "--out", str(tmp_path / "none")]))
    contest.tables["wiki"]["adamw"] = adamw
    assert {job.study for job in contest.wanted("target", "wiki", submission("adamw"))} == {4}  # these are what is rerun


def test_a_step_is_not_cheaper_for_who_has_more_trials(tmp_path):
    """Times of a busy machine, right-skewed: 5 and 21 of one distribution."""
    times = lambda n: [10 + 3 * stats.gamma(2).ppf((i + 0.5) / n) for i in range(n)]  # noqa: E731
    few, many = (made(tmp_path, name, *(row(number=i, seconds=t) for i, t in enumerate(times(n)))) for name, n in
                 (("muon", 5), ("adamw", 21)))  # fmt: skip
    cost = tuned.step_seconds({"adamw": many, "muon": few})
    assert cost["muon"] / cost["adamw"] == pytest.approx(1, abs=0.01) and min(times(5)) / min(times(21)) > 1.05


def test_columns_that_nobody_has_are_left_out(tmp_path):
    found = made(tmp_path, "adamw", row())
    head = report.workload_table("wiki", {"adamw": found}).splitlines()[4]
    assert "best loss" in head and "lr / 2" not in head
    found = made(tmp_path, "adamw", row("neighbour", settings=tuned.neighbours(row().settings)["lr / 2"]))
    head = report.workload_table("wiki", {"adamw": found, "sgd": made(tmp_path, "sgd", row())}).splitlines()[4]
    assert "lr / 2" in head and "lr x 2" not in head


def test_times_are_steps_times_the_cost_of_a_step_and_ratios_carry_over_sessions(tmp_path):
    curve = [(5, 2.4), (10, 2.0)]
    tables = {
        "adamw": made(
            tmp_path, "adamw", row(seconds=10, losses=curve), row(number=1, seconds=10), row(number=2, seconds=5, machine="b")
        ),
        "muon": made(tmp_path, "muon", row(seconds=7.5, machine="b", losses=curve)),
        "lion": made(tmp_path, "lion", row(loss=3.0, losses=[(10, 3.0)])),
    }
    cost = tuned.step_seconds(tables)
    assert cost == pytest.approx({"adamw": 1.0, "muon": 1.5, "lion": 0.1})
    tables["muon"].add(row("neighbour", number=40, seconds=1, source="later"))  # without AdamW it says nothing
    assert tuned.step_seconds(tables) == cost
    later = row("neighbour", number=40, seconds=0.5, source="later")  # with it: a step of twice AdamW's
    tables["adamw"].add(later)
    assert tuned.step_seconds(tables)["muon"] == pytest.approx((1.5 * 2) ** 0.5)
    del tables["adamw"].rows[later.key]
    for name, seconds in (("adamw", 1), ("muon", 3)):  # runs that time a step are compared with each other alone
        tables[name].add(row("timing", seconds=seconds, machine="b", steps=5))
    tables["adamw"].add(row("timing", study=1, seconds=0.1, machine="b", steps=5))  # another day, with somebody else
    assert tuned.step_seconds(tables)["muon"] == pytest.approx((1.5 * 3) ** 0.5)
    for name in ("adamw", "muon"):
        tables[name].rows = {key: r for key, r in tables[name].rows.items() if r.kind == "search"}
    tables["sgd"] = made(tmp_path, "sgd", row(), row("target", loss=2.4, steps=8))
    times = tuned.studies({"wiki": tables})
    assert times["adamw", "wiki"] == [5.0] and times["muon", "wiki"] == [7.5] and times["lion", "wiki"] == [math.inf]
    tables["muon"].add(dataclasses.replace(tables["muon"].of("search")[0], seconds=7.123456))
    assert tuned.studies({"wiki": tables})["muon", "wiki"] == [7.1235]  # as studies.csv has it: one score, from file or trials


def test_of_several_studies_the_median_counts_and_of_an_unfinished_one_nothing(tmp_path):
    """More studies are no more luck: else who has three would be quoted with the best of fifteen trials."""
    study = lambda n, *losses, first=10: [  # noqa: E731
        row(study=n, number=i, loss=loss, losses=[(first, 2.0), (20, loss)], steps=20) for i, loss in enumerate(losses)
    ]
    rows = [*study(0, 1.5, 1.4), *study(1, 1.0, 9.0, first=5), *study(2, 1.3, 1.2), *study(3, 0.5, first=1)]
    found = made(tmp_path, "adamw", *rows)
    assert list(found.studies()) == [0, 1, 2] and found.typical() == 1.2
    assert found.steps_of_studies(2.0) == [10, 5, 10] and found.steps_of_studies(1.3) == [math.inf, 20, 20]
    assert found.best().val_loss == 0.5  # settings are worth having wherever they are from
    assert "| 7 | 0 | 1.2000 |" in report.workload_table("wiki", {"adamw": found})
    assert made(tmp_path / "none", "adamw", row(status="diverged", loss=math.inf)).typical() == math.inf


@pytest.mark.slow
def test_who_was_not_trained_beside_adamw_is_timed_beside_it(fake, tmp_path):
    """A new optimizer on a new machine: without AdamW's step there its time to a target says nothing."""
    words = ("--trials", "2", "--no-neighbours", "--target-seeds", "1")
    assert call(tmp_path, "--optimizers", "adamw", "sgd", *words) == 0
    assert not table(tmp_path, "adamw").of("timing")
    fake.cpu, fake.best, fake.seconds = "another CPU", 0.03, 0.5
    fake.trained.clear()
    assert call(tmp_path, "--optimizers", "muon", *words) == 0
    assert [name for name, steps, *_ in fake.trained if steps == 10] == ["adamw", "muon"] * 3 * 2  # by turns, a quarter of 40
    best = table(tmp_path, "muon").best()
    assert [r.settings for r in table(tmp_path, "muon").of("timing")] == [best.settings] * 3
    text, out = (tmp_path / "out" / "README.md").read_text(), tmp_path / "out"
    assert "| 1 | `muon` |" in text and "Not scored" not in text
    count = len(fake.trained)
    assert call(tmp_path, "--optimizers", "muon", *words) == 0 and len(fake.trained) == count
    found = tuned.read_tables(out)["wiki"]
    first, other = (next(r for r in found["adamw"].rows.values() if r.machine == cpu) for cpu in ("some CPU", "another CPU"))
    assert other.seconds / other.steps > 20 * first.seconds / first.steps
    assert tuned.step_seconds(found)["muon"] == pytest.approx(tuned.step_seconds(found)["adamw"])  # not 25 times as dear
    for track in ("wiki", "tokens"):  # as it was before it had been timed
        path = out / track / "muon.csv"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("timing")))
    report.report(out)
    text = (out / "README.md").read_text()
    assert "| `muon` |" not in text and "of them does so): `muon` on tokens, `muon` on wiki." in text
    fake.crashing = {"muon"}  # what failed is tried again
    timed = lambda: "muon" in tuned.step_seconds({name: table(tmp_path, name) for name in ("muon", "adamw")})  # noqa: E731
    assert call(tmp_path, "--optimizers", "muon", *words) == 0 and not timed()
    fake.crashing = set()
    assert call(tmp_path, "--optimizers", "muon", *words) == 0 and timed()


@pytest.mark.slow
def test_the_report_has_score_settings_and_plots(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", SAVE)
    assert call(tmp_path, "--optimizers", "adamw", "muon", "sgd", "--trials", "3", "--target-seeds", "1", "--studies", "2") == 0
    out = tmp_path / "out"
    text = (out / "README.md").read_text()
    assert "AlgoPerf score" in text and "## `wiki`" in text and "`adamw`" in text
    for name in ("profile.png", "sensitivity-wiki.png", "sensitivity-tokens.png", "studies.csv"):
        assert (out / name).stat().st_size > 100, name
    best = table(tmp_path, "muon").best()
    monkeypatch.setattr(tricks, "TUNED", out / "tuned.json")
    config, _, _ = resolve(["--track", "wiki", "--optimizer", "muon:lr=0.5,nesterov=false"])
    keys = split(config.optimizer)[1]
    assert keys["lr"] == "0.5" and keys["nesterov"] == "false" and float(keys["momentum"]) == best.settings["momentum"]
    assert config.schedule == f"cosine:warmup={best.settings['schedule_warmup']:g}"
    config, _, _ = resolve(["--track", "wiki", "--optimizer", "muon", "--schedule", "wsd"])
    assert config.schedule == "wsd" and float(split(config.optimizer)[1]["lr"]) == best.settings["lr"]
    config, _, _ = resolve(["--track", "wiki", "--optimizer", "lion"])  # not tuned
    assert config.optimizer == "lion" and config.schedule == "cosine:warmup=0.05"
    assert report.report(out) and (out / "README.md").read_text() == text  # the same again


@pytest.mark.slow
def test_the_real_trainer(tmp_path, monkeypatch, sotu):
    """In this process: test_trials.py has what starts it as a process."""

    def train(trial, *_, **__):
        assert train_gpt.main([*trial.flags, "--checkpoint-minutes", "0", "--out", str(trial.folder)]) == 0
        return Outcome(trial, trial.result)

    monkeypatch.setattr(trials, "train", train)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which only a main thread may call
    monkeypatch.setattr(trials, "RUNS", tmp_path)
    words = ["--workloads", "tiny", "--optimizers", "adamw", "--trials", "2", "--no-neighbours", "--target-seeds", "1"]
    short = tricks.TRACKS["tiny"].settings | {"steps": 20, "val_tokens": 512, "data_root": str(trials.ROOT / "corpora")}
    monkeypatch.setitem(tricks.TRACKS, "tiny", dataclasses.replace(tricks.TRACKS["tiny"], settings=short))
    monkeypatch.setattr(tune.Contest, "seconds_of_a_trial", lambda contest, track: 1.0)
    assert compare.main(["tune", *words, "--side-by-side", "1", "--out", str(tmp_path / "out")]) == 0
    rows = Table(tmp_path / "out" / "tiny" / "adamw.csv").of("search")
    assert [r.status for r in rows] == ["ok", "ok"] and all(0 < r.val_loss < 6 and r.seconds > 0 for r in rows)
    assert len(rows[0].losses) == 20 and rows[0].losses[-1][1] == pytest.approx(rows[0].val_loss, abs=1e-4)
    assert torch.isfinite(torch.tensor([loss for r in rows for _, loss in r.losses])).all()
