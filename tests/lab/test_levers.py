"""compare.py levers: what is trained, and what the board says. A formula stands in the place of the trainer."""

import dataclasses
import json
import math

import pytest
from test_tune import FakeTrainer, fake  # noqa: F401  (a fixture)

import compare
import optimizers
from config import resolve
from engine.spec import split
from lab import levers, trials
from lab.records import tables
from lab.records.judge import Broken, judge
from lab.tuning import descent
from lab.tuning.tuned import Table


class Fake(FakeTrainer):
    """With a tail average 0.05 nats better than without, on a sphere 0.05 worse, and ln 2 / 10 better for each doubling."""

    def __call__(self, trial, processes=1, threads=0):
        config, _, _ = resolve(trial.flags)
        outcome = super().__call__(trial, processes, threads)
        changed = 0.002 * ((7 * trial.seed + len(trial.arm.name)) % 5) - 0.1 * math.log(trial.steps / 40)
        changed += 0.05 * ("sphere" in config.optimizer) - 0.05 * (config.average != "none")
        outcome.result["val_loss"] = round(outcome.result["val_loss"] + changed, 5)
        log = [json.loads(line) for line in (trial.folder / "log.jsonl").read_text().splitlines()]
        log[-1]["loss"] = outcome.result["val_loss"]
        (trial.folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
        return outcome


NAMES = ["tail_ema", "hyperball", "equal_rows", "soap"]


@pytest.mark.slow
def test_the_board_says_what_helps(fake, tmp_path, monkeypatch, capsys):  # noqa: F811
    made = Fake(best=0.03)
    monkeypatch.setattr(trials, "train", made)
    out = tmp_path / "levers"
    words = ["levers", "--levers", *NAMES, "--workloads", "wiki", "--side-by-side", "1", "--out", str(out)]
    made.stop_after = 30
    assert compare.main(words) == 130
    made.stop_after = math.inf
    assert compare.main(words) == 0
    lines = {line["name"]: line for line in json.loads((out / "levers.json").read_text())["wiki"]}
    verdicts = {name: lines[name]["verdict"] for name in NAMES[:3]}
    assert verdicts == {"tail_ema": "helps", "hyperball": "hurts", "equal_rows": "no difference"}
    for name in NAMES:
        rows = descent.rows_of(Table(out / "wiki" / f"{name}.csv"))
        assert len(rows) <= levers.TRIALS and {row.seed for row in rows} == {descent.SEED}
        runs = levers.finals(Table(out / "wiki" / f"{name}.csv"))
        assert [row.seed - descent.SEED for row in runs] == [1, 2, 3, 4, 5, 6] and {row.steps for row in runs} == {40}
    muon = descent.rows_of(Table(out / "wiki" / "muon.csv"))
    assert levers.TRIALS <= len(muon) <= 2 * levers.TRIALS
    line = lines["tail_ema"]
    assert line["steps"] == pytest.approx(math.exp(-line["difference"] / 0.1), rel=0.05)
    timed = Table(out / "wiki" / "tail_ema.csv").of("timing")
    assert {(row.study, row.steps) for row in timed} == {(1 + len(NAMES), 10)}, "one turn, of all"
    assert line["cost"] == pytest.approx(1) and line["holm"] >= line["p"]
    text = (out / "README.md").read_text()
    agree = {row.split("`")[1]: row.split(" | ")[-1] for row in text.splitlines() if "x |" in row}
    assert [agree[name] for name in NAMES[:3]] == ["yes |", "no |", "not seen |"]
    assert "| `tail_ema` | helps | -0.0" in text and "Missing here: aux_betas, " in text
    board = tables.Levers(out)
    found = {v.rule: v.verdict for v in judge(board, tables.LEVER_RULES)}
    assert {found[rule] for rule in ("trials", "moves", "results")} == {"pass"}
    assert found["pictures"] == "fail", "none was drawn"
    forged = Table(out / "wiki" / "tail_ema.csv")
    for row, said in (
        (
            dataclasses.replace(descent.rows_of(forged)[1], val_loss=1.0),
            "wiki/tail_ema: the losses of the descent lead elsewhere",
        ),
        (dataclasses.replace(levers.finals(forged)[0], seed=7), "wiki/tail_ema: final 0 was not planned"),
    ):
        text = forged.path.read_text()
        Table(forged.path).add(row)
        with pytest.raises(Broken, match=said):
            tables.moves(tables.Levers(out))
        forged.path.write_text(text)
    forged.path.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("final,0,5,")))
    with pytest.raises(Broken, match="wiki/tail_ema: not all of its planned runs are there"):
        tables.moves(tables.Levers(out))
    forged.path.write_text(text)
    count = len(made.trained)
    assert compare.main(words) == 0 and len(made.trained) == count
    capsys.readouterr()
    assert compare.main([*words[:2], "tail_emma", *words[5:]]) == 2
    assert "did you mean 'tail_ema'" in capsys.readouterr().err


def test_every_lever_is_muon_with_one_thing_changed():
    """What the trainer is asked for: all of Muon's settings where they are not moved, and the lever's own."""
    end = {"lr": 0.02, "adamw_lr": 0.004, "momentum": 0.9, "weight_decay": 0.03, "schedule_warmup": 0.05}
    base, _, _ = resolve(["--track", "wiki", *levers.entry("muon", end).flags(end)])
    assert base.schedule == "wsd:cooldown=0.7,warmup=0.05"
    for name, lever in levers.LEVERS.items():
        entry, start = levers.entry(name, end), levers.begin(name, end)
        config, _, _ = resolve(["--track", "wiki", *entry.flags(start)])
        changed = {key for key in vars(config) if vars(config)[key] != vars(base)[key]} - {"name", "optimizer"}
        assert changed == {k for k in ("average", "outer", "decay_schedule") if getattr(lever, k)} | (
            {"schedule"} if lever.schedule != levers.SCHEDULE else set()
        ), name
        (method, keys), moved = split(config.optimizer), {d.key for d, _ in lever.own} | {k for k, _ in lever.start}
        fixed = {"lr", "adamw_lr", "momentum", "weight_decay"} - moved - set(split(lever.optimizer)[1])
        for key in (key for key in fixed if hasattr(optimizers.OPTIMIZERS[method], key)):
            assert float(keys[key]) == end[key], (name, key)
        assert set(start) == {d.name for d in entry.dimensions}, name
        for point in descent.changes(entry.dimensions, start):  # the trainer takes every move
            resolve(["--track", "wiki", *entry.flags(point)])
