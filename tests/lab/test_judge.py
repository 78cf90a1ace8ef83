"""judge.py: the checks of a class, the plan, and the page. A formula stands in the place of the trainer."""

import json
import math
import shlex
from pathlib import Path

import pytest
from test_compare import FakeTrainer, fake  # noqa: F401

import compare
import judge
import scaling
from config import resolve
from engine.command import command
from engine.spec import split, trust
from lab import trials
from lab.tuning import tune
from lab.tuning.tuned import Table

# Each is AdamW with one fault
OWN = """
import torch

class Fine(torch.optim.AdamW):
    pass

class Forgets(torch.optim.AdamW):
    steps = 0
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups: group["weight_decay"] *= self.steps
        super().step()

class Stale(torch.optim.AdamW):
    def step(self, closure=None):
        for group in self.param_groups: group["lr"] = 1e-3
        super().step()

class Decays(torch.optim.AdamW):
    def step(self, closure=None):
        for group in self.param_groups: group["weight_decay"] = 0.1
        super().step()

class Wants(torch.optim.AdamW):
    def step(self, closure=None):
        for group in self.param_groups: sum(p.grad.norm() for p in group["params"])
        super().step()

class Single(torch.optim.AdamW):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]: torch.ones(2, 3, dtype=p.dtype) @ torch.ones(3, 2)

class Breaks(torch.optim.AdamW):
    def step(self, closure=None): raise RuntimeError("no closure")

class Object(torch.optim.AdamW):
    def step(self, closure=None):
        super().step()
        for p in self.state: self.state[p]["helper"] = Fine
"""
FAULTS = {
    "Fine": "",
    "Forgets": "stored and resumed, against `steps`: NOT FINE: changes embedding, matrix",
    "Stale": "hardly any lr: NOT FINE: changes embedding, matrix, vector",
    "Decays": "zero gradients, weight decay: NOT FINE: changes embedding, matrix, vector",
    "Wants": "no gradient of the embedding: NOT FINE: optimizer 'mine.py:Wants': AttributeError: 'NoneType'",
    "Single": "bf16 weights: NOT FINE: optimizer 'mine.py:Single': RuntimeError: expected m1 and m2 to have the same dtype",
}


class Horizons(dict):
    """By the first word of an arm's name, which has more in a ladder."""

    def get(self, name, default):
        return super().get(name.removeprefix("+").split(":")[0].split()[0], default)


def call(*words: str) -> int:
    return command("judge.py", lambda: judge.parse(list(words)).run(), words)


@pytest.fixture
def judged(fake, tmp_path, monkeypatch):  # noqa: F811
    """judged("lion", budget=40, lion=3) -> exit code, page, trainer. A number is the steps to the loss 3.0; 84 times as many
    meet the target, 2.36. most: trials after which it is interrupted."""
    monkeypatch.setattr(judge, "check", lambda name: [f"{name}: checked"])
    monkeypatch.setattr(judge, "step", lambda name: [f"{name}: timed"])

    def run(name: str, budget: float = 40, most: float = math.inf, **horizons: float) -> tuple[int, str, FakeTrainer]:
        trainer = fake(Horizons({"adamw": 4.5, "baseline": 4.5, "muon": 1.5} | horizons))

        def train(trial, *how, **more):
            if len(trainer.trained) >= most:
                raise KeyboardInterrupt
            return trainer(trial, *how, **more)

        monkeypatch.setattr(trials, "train", train)
        code = call(name, "--budget", str(budget), "--out", str(tmp_path / "out"))
        page = tmp_path / "out" / "README.md"
        return code, page.read_text() if page.exists() else "", trainer

    return run


@pytest.mark.slow
def test_each_fault_of_a_class_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    trust([f"mine.py:{name}" for name in FAULTS])
    for name, fault in FAULTS.items():
        wrong = [line for line in judge.check(f"mine.py:{name}") if "NOT FINE" in line]
        assert (len(wrong), wrong[0][: len(fault)]) == (1, fault) if fault else not wrong, wrong
    assert not [line for name in ("muon", "schedule_free_adamw") for line in judge.check(name) if "NOT FINE" in line]
    for name, why in (("Breaks", "steps: .*no closure"), ("Object", "stored and resumed, against `steps`: UnpicklingError")):
        assert call(f"mine.py:{name}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"judge.py: mine.py:{name} cannot train: ") and why.split(".*")[0] in line
    assert not Path("runs").exists()


def test_a_step_is_timed_beside_those_of_the_rivals(monkeypatch):
    monkeypatch.setattr(judge, "ROUNDS", 1)
    monkeypatch.setattr(judge, "resolve", lambda words: resolve(["--track", "tiny", *words[2:]]))
    seconds = {"adamw": 1.0, "muon": 4.0, "lion": 2.0}
    monkeypatch.setattr(
        judge, "seconds", lambda optimizer, *_: seconds[type(optimizer).__name__.lower().replace("chain", "muon")]
    )
    assert judge.step("lion") == ["its step: 2 x adamw's (2 to 2)", "its step: 0.5 x muon's (0.5 to 0.5)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lionn"], "did you mean 'lion'"),
        (["lion:lr=0.1"], "without keys"),
        (["adamw"], "another optimizer's name"),
        (["torch.optim.nadm"], "did you mean 'NAdam'"),
        (["/tmp/mine.py:Mine"], "put the file beside the repository's"),
        (["lion", "--budgte", "3"], "unrecognized arguments"),
    ],
)
def test_bad_words_are_one_line(words, message, capsys):
    assert call(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_verdict_on_each_rival_and_on_the_sizes_though_interrupted(judged, tmp_path, capsys, monkeypatch):
    code, page, first = judged("lion", most=10, lion=3)
    assert (code, page) == (130, "") and len(first.trained) < 15
    code, page, trainer = judged("lion", lion=3)
    assert not set(first.trained) & set(trainer.trained)
    assert code == 0 and "plan: 5 x 3 of 5 x 3 trials on 1 of 5 workloads, then 4 seeds, then 2 of 2 sizes" in page
    for words, right in (
        ("faster than adamw, ", 1.5),
        ("slower than muon, ", 0.5),
        ("a gain on adamw survives, in tokens: ", 1.5),
    ):
        assert float(page.partition(words)[2].partition("x")[0]) == pytest.approx(right, rel=0.1), words
    assert "- lion: checked\n- lion: timed" in page
    lion, rivals = Table(tmp_path / "out/tune/bytes-small/lion.csv"), ("adamw", "muon")
    points = {(row.study, row.number) for row in lion.of("search")}
    for rival in rivals:
        rows = Table(tmp_path / f"out/tune/bytes-small/{rival}.csv").of("search")
        assert len(rows) == 15 and {(row.study, row.number) for row in rows} == points
    confirmed = [t for t in trainer.trained if t[2] < 4 and t[0] in ("lion", *rivals) and t[1] != 500]
    assert len(confirmed) == 12 and [t[0] for t in confirmed[:3]] == ["adamw", "muon", "lion"]
    found = json.loads((tmp_path / "out/judge.json").read_text())
    verbs = {"judge": judge.parse, "compare tune": tune.parse, "compare": compare.parse, "scaling": scaling.parse}
    for line, (verb, parse) in zip(found["commands"], verbs.items(), strict=True):
        assert line.startswith(f"./run.sh {verb} ") and line in page
        assert parse(shlex.split(line.removeprefix(f"./run.sh {verb} ")))
    arms = json.loads((tmp_path / "out/compare/comparison.json").read_text())["arms"]  # on the model that they were tuned on
    assert {resolve(arm["flags"])[1] for arm in arms} == {resolve(["--track", "bytes-small"])[1]}
    at_256 = split(shlex.split(found["commands"][-1])[3])[1]["lr"]  # the ladder moves it to 64, the workload's width, by muP
    assert float(at_256) == pytest.approx(lion.best().settings["lr"] * 64 / 256, rel=1e-3)
    said = capsys.readouterr().out
    assert all(line in said for line in found["verdicts"])
    assert (
        judged("lion", lion=3)[2].trained == []
        and (tmp_path / "out/README.md").read_text().splitlines()[:5] == page.splitlines()[:5]
    )
    monkeypatch.setattr(judge.comparison, "verdict_line", lambda ratio, arm: "lion: not decided: no horizon")
    page = judged("lion", lion=3)[1]
    assert all(f"- lion: not decided against {rival}: no horizon\n" in page for rival in rivals)


def test_a_small_budget_is_said_and_the_rivals_are_cut_to_it(judged, tmp_path):
    code, page, _ = judged("lion", budget=1, lion=20)
    assert code == 0 and "plan: 2 x 1 of 5 x 3 trials on 1 of 5 workloads, then 3 seeds, then 0 of 2 sizes; about" in page
    assert page.count("- lion: did not reach the target within 1,000 steps") == 1
    for name in ("adamw", "muon", "lion"):
        rows = Table(tmp_path / f"out/tune/bytes-small/{name}.csv").of("search")
        assert [(row.study, row.number) for row in rows] == [(0, 0), (0, 1)]


def test_of_one_that_always_diverges_the_page_says_so(judged):
    code, page, _ = judged("lion", lion=-1)
    assert code == 0 and "'lion' was not tuned for it" in page
