"""./run.sh study: the list, one study's files, the page, and what it refuses."""

import json
import re
import sys

import pytest

from engine.spec import UsageError
from studies import __main__ as command
from studies import algoperf, common


def test_every_study_says_what_it_is():
    """Claim, source and minutes; the lecture's order; together within 35 minutes."""
    found = command.studies()
    assert [of["slide"] for of in found.values()] == sorted({of["slide"] for of in found.values()})
    assert all(of["claim"].endswith(".") and of["source"] and of["text"] for of in found.values())
    assert sum(of["minutes"] for of in found.values()) <= 35
    listed = command.main([])
    assert all(re.search(rf"^  {name} .*min   .*\.$", listed, re.MULTILINE) for name in found)


@pytest.mark.slow
def test_one_study_leaves_picture_and_figures(tmp_path):
    said = command.main(["algoperf", "--out", str(tmp_path)])
    assert "holds: 11 of 11" in said
    assert {path.name for path in tmp_path.iterdir()} == {"algoperf.json", "algoperf.png"}
    result = json.loads((tmp_path / "algoperf.json").read_text())
    assert result["holds"] and result["seed"] == 0 and result["versions"]["torch"] and result["figures"]["ours"]


def test_an_interrupt_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "algoperf.json").write_text("old")

    def interrupted(figures):
        raise KeyboardInterrupt

    monkeypatch.setattr(algoperf, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(["algoperf", "--out", str(tmp_path)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("algoperf.json", "old")]


def test_all_runs_each_once(tmp_path, monkeypatch, capsys):
    """What is there from the same code, seed and size is not run again."""
    two = {name: command.studies()[name] for name in ("algoperf", "speedrun")}
    monkeypatch.setattr(command, "studies", lambda: two)
    assert command.main(["all", "--out", str(tmp_path)]) == f"pictures and figures: {tmp_path}"
    first = capsys.readouterr().out
    assert "algoperf: " in first and "speedrun: " in first
    monkeypatch.setattr(command, "experiment", lambda name, options: pytest.fail(f"{name} ran again"))
    command.main(["all", "--out", str(tmp_path)])
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_what_is_refused(tmp_path, monkeypatch):
    for words, message in (
        (["rosenbrok"], "unknown study 'rosenbrok': did you mean 'rosenbrock'?"),
        (["rosenbrock", "--sed", "1"], "unrecognized arguments"),
        (["rosenbrock", "--seed", "-1"], "--seed must be"),
        (["algoperf", "--run", str(tmp_path)], "--run is for .*rare_tokens"),
        (["all", "--run", str(tmp_path)], "--run goes with one study"),
        (["rare_tokens", "--run", str(tmp_path)], "holds no run"),
    ):
        with pytest.raises(UsageError, match=re.escape(message) if "?" in message else message):
            command.main(words)
    monkeypatch.delitem(sys.modules, "studies.images_and_words", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=re.escape("the studies need the package sklearn")) as error:
        command.main(["images_and_words", "--quick"])
    assert str(error.value).endswith("pip install -e .[studies]")


def test_the_page_is_generated():
    assert command.PAGE.read_text() == command.page(), "run: ./run.sh study page"


def test_kept_results_are_full_and_small():
    kept = {path.stem: json.loads(path.read_text()) for path in command.RESULTS.glob("*.json")}
    assert kept.keys() <= command.studies().keys() and not any(result["quick"] for result in kept.values())
    assert all((command.RESULTS / f"{name}.png").exists() and result["versions"] for name, result in kept.items())
    assert sum(path.stat().st_size for path in command.RESULTS.iterdir()) < 12e6
    assert all(path.stat().st_size < 1e6 for path in command.RESULTS.glob("*.gif"))


def test_numbers_that_json_can_store():
    assert common.rounded({1: (1.234567, float("nan"))}) == {"1": [1.2346, None]}
    mean, low, high = common.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.302653 / 3**0.5) and low == pytest.approx(4 - high)  # t(2, 0.975)


def test_batches_are_a_function_of_seed_and_step():
    text = common.tokens("repository")
    first, second = common.batches(text, 8, 4, seed=1)(5), common.batches(text, 8, 4, seed=1)(5)
    assert (first[0] == second[0]).all() and (first[0][:, 1:] == first[1][:, :-1]).all()
    ranks, counts = common.by_frequency(common.tokens("words")[:5000])
    assert (ranks.bincount() == counts).all() and (counts[:-1] >= counts[1:]).all()
