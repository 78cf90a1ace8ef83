"""What is said of run folders, from their files alone."""

import hashlib
import json
import math
import os
import time
from unittest import mock

import pytest

from engine import run_folder
from engine.command import command
from engine.spec import UsageError
from lab import runs


def make(root, name, losses, end=None, val=None, age=0.0, **config):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 10, "seed": 0} | config))
    lines = [{"event": "start", "step": 0}]
    for step, loss in enumerate(losses, 1):
        lines.append({"event": "train", "step": step, "loss": loss, "train_time": 2.0 * step})
    lines += [{"event": "val", "step": len(losses), "loss": val}] if val else []
    lines += [{"event": "end", "status": end, "step": len(losses)}] if end else []
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "tr')
    os.utime(folder / "log.jsonl", (time.time() - age,) * 2)
    return folder


def test_runs_are_listed_watched_and_compared(tmp_path, capsys, monkeypatch):
    old = make(tmp_path, "tiny/old", [5.0, 4.0], end="ok", val=3.5, age=5000, seed=1, nested={"a": 1})
    live = make(tmp_path, "tiny/live", [5.0, 4.0, 3.0, 2.0], age=1)
    dead = make(tmp_path, "cpu/dead", [math.nan], age=9000)
    seen = {r.run: r for r in map(runs.see, (old, live, dead))}
    assert [(r.state, r.step, r.loss) for r in seen.values()][:2] == [("ok", 2, 3.5), ("training", 4, 2.0)]
    assert seen[str(dead)].state == "stopped" and seen[str(live)].left == 2.0 * 6
    assert [r["run"] for r in runs.run(["--root", str(tmp_path)]).data] == [str(live), str(old), str(dead)]
    lines = runs.run(["--root", str(tmp_path), "tiny"]).splitlines()
    assert len(lines) == 4 and str(live) in lines[2] and "2.0000" in lines[2] and "4.0 s" in lines[3]
    with pytest.raises(UsageError, match=r"no run in .* with tiny and x"):
        runs.run(["--root", str(tmp_path), "tiny", "x"])
    said = runs.run(["diff", str(old), str(live)])
    assert "seed" in said and "nested.a" in said and "steps" not in said
    assert said.data["seed"] == [1, 0] and "losses" not in runs.run(["--root", str(tmp_path)]).data[0]
    assert runs.run(["diff", str(old), str(old)]) == "the same settings and results"
    for words in (["diff", str(old)], ["diff", str(old), str(tmp_path)]):
        assert command("runs", lambda words=words: runs.run(words)) == 2
    capsys.readouterr()
    monkeypatch.setattr(runs.time, "sleep", mock.Mock(side_effect=[None, KeyboardInterrupt]))
    assert command("runs", lambda: runs.run(["watch", str(tmp_path)])) == 130
    out = capsys.readouterr().out
    assert "12.0 s" in out and out.count("left") == 2 and "\x1b" not in out and str(old) not in out
    assert [r["run"] for r in runs.run(["watch", str(tmp_path), "--json"]).data] == [str(live)]
    assert runs.run(["watch", str(tmp_path / "none"), "--json"]).data == []
    assert runs.duration(7200) == "2.0 h"


def test_a_log_is_on_the_disk_within_a_second(tmp_path, monkeypatch):
    """So `watch` sees a run whose next validation is far away; no step waits for the disk more often."""
    run, now = run_folder.Run.__new__(run_folder.Run), [10.0]
    run.main, run.display, run.flushed, run.log_hash = True, mock.Mock(), 0.0, hashlib.sha256()
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    with (tmp_path / "log.jsonl").open("wb") as run.log:
        lines = []
        for now[0] in (10.0, 10.5, 10.9, 11.5):
            run.event("train", step=len(lines))
            lines.append((tmp_path / "log.jsonl").read_text().count("\n"))
    assert lines == [1, 1, 1, 4]
