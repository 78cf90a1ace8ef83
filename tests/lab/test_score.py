"""The AlgoPerf score: the published table to four decimals, and what a table may get wrong."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

import compare
from engine.spec import UsageError
from lab.tuning import score

PUBLISHED = Path(__file__).parents[2] / "records" / "published" / "algoperf_external.csv"
HELD_OUT = (
    "criteo1tb_embed_init=criteo1tb,fastmri_tanh=fastmri,imagenet_resnet_large_bn_init=imagenet_resnet,"
    "librispeech_conformer_layernorm=librispeech_conformer,ogbg_model_size=ogbg,wmt_glu_tanh=wmt"
)


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def published(tmp_path) -> tuple[Path, dict[str, float]]:
    """AlgoPerf's first round, external tuning: its times as a table, and its published scores."""
    with PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [c for c in rows[0] if c not in ("ruleset", "published_score", "recomputed_score")]
    lines = [",".join(columns), *(",".join(row[c] for c in columns) for row in rows)]
    return table(tmp_path / "times.csv", *lines), {row["submission"]: float(row["published_score"]) for row in rows}


def test_published_scores_to_four_decimals(published, capsys):
    path, right = published
    assert compare.main(["score", "--times", str(path), "--held-out", HELD_OUT, "--json"]) == 0
    found = {row["submission"]: row["score"] for row in json.loads(capsys.readouterr().out)["submissions"]}
    assert len(found) == 11 and {n: round(v, 4) for n, v in found.items()} == right


def test_leaving_out_the_eighth_flips_the_first_two(published, capsys):
    """As research on that round found: without CASPR, Schedule-Free AdamW comes first."""
    path, _ = published
    assert compare.main(["score", "--times", str(path), "--held-out", HELD_OUT, "--json"]) == 0
    rows = {row["submission"]: row for row in json.loads(capsys.readouterr().out)["submissions"]}
    assert rows["shampoo_submission"]["rank"] == 1 and rows["shampoo_submission"]["ranks_when_one_is_left_out"][1] > 1
    assert rows["schedule_free_adamw"]["ranks_when_one_is_left_out"][0] == 1


def by_definition(times: score.Times) -> list[float]:
    """Without held-out workloads, the exact area: mean over workloads of the part of [1, 4] above r."""
    best = times.seconds.min(0)
    return [sum(max(0.0, 4 - t / b) / 3 for t, b in zip(row, best) if t < math.inf) / len(best) for row in times.seconds]


def test_area_is_that_of_the_definition():
    dice = np.random.default_rng(0)
    seconds = dice.uniform(10, 60, (6, 9))
    seconds[dice.random(seconds.shape) < 0.2] = np.inf
    seconds[0] = 20
    times = score.Times([f"s{i}" for i in range(6)], [f"w{i}" for i in range(9)], seconds)
    assert score.scores(times, {}) == pytest.approx(by_definition(times), abs=0.02)  # 100 points


def test_held_out_variants_in_their_order():
    """A base is missed where its variant is; a variant where its base is; 4 times the best is the limit."""
    times = score.Times(["a", "b", "c"], ["w", "v", "u"], np.array([[10, 10, 10], [12, 41, 10], [math.inf, 1, 10.0]]))
    bases, r = score.ratios(times, {"v": "w"})
    assert bases == ["w", "u"]
    assert r.tolist() == [[1, 1], [math.inf, 1], [math.inf, 1]]


def test_against_a_reference_the_field_does_not_matter():
    seconds = np.array([[10.0, 10], [5, 5], [40, 400], [1, math.inf]])
    times = score.Times(["ref", "twice", "slow", "half"], ["w", "v"], seconds)
    assert score.reference_scores(times, {}, "ref") == pytest.approx([0.5, 0.75, 0.0, 0.5])
    assert score.reference_scores(times.without("half"), {}, "ref") == pytest.approx([0.5, 0.75, 0.0])
    with pytest.raises(UsageError, match="did you mean 'ref'"):
        score.reference_scores(times, {}, "reff")


@pytest.mark.slow
def test_intervals_from_studies(tmp_path, capsys):
    """Two that differ by more than their studies do are told apart; two that do not, are not."""
    dice = np.random.default_rng(1)
    lines = ["submission,workload,study,seconds"]
    for name, pace in (("fast", 10.0), ("slow", 30.0), ("same", 10.0)):
        for workload in ("a", "b", "c"):
            lines += [f"{name},{workload},{i},{pace * math.exp(dice.normal(0, 0.1)):.3f}" for i in range(5)]
    lines += ["once,a,0,10.0", *(f"once,{w},{i},10.0" for w in "bc" for i in range(5))]
    path = table(tmp_path / "studies.csv", *lines)
    assert compare.main(["score", "--studies", str(path)]) == 0
    once = next(line for line in capsys.readouterr().out.splitlines() if "`once`" in line)
    assert "| - " in once  # a study on `a` alone says nothing of luck
    studies = score.read_studies(path)
    times = score.medians(studies)
    rows = {row["submission"]: row for row in score.summary(studies, {})["submissions"]}
    assert "interval" not in rows.pop("once")
    assert rows["slow"]["interval"][1] < rows["fast"]["interval"][0]
    assert rows["same"]["interval"][1] > rows["fast"]["interval"][0]
    for row in rows.values():
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
    table(path, lines[0], *sorted(lines[1:], reverse=True, key=lambda line: line.split(",")[:2]))  # listed in another order
    again = score.read_studies(path)
    order = [times.submissions.index(name) for name in score.medians(again).submissions]
    spread = [score.intervals(each, {}, draws=20) for each in (studies, again)]
    assert order != sorted(order) and (spread[0][order] == spread[1]).all()


def test_a_picture_names_the_best_few():
    times = score.Times([f"s{i:02}" for i in range(9)], ["a", "b"], np.linspace(1, 2, 18).reshape(9, 2))
    figure = score.draw(times, {})
    words = [text.get_text().split()[0] for text in figure.axes[0].get_legend().get_texts()]
    assert words == ["s00", "s01", "s02", "s03", "s04", "s05", "3"]


def test_table_and_plot(published, capsys, tmp_path):
    path, _ = published
    words = ["score", "--times", str(path), "--held-out", HELD_OUT, "--plot", str(tmp_path / "p" / "profile")]
    assert compare.main([*words, "--reference", "schedule_free_adamw"]) == 0
    out = capsys.readouterr().out
    assert "0.7784" in out and "against schedule_free_adamw" in out
    assert (tmp_path / "p" / "profile.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["submission,a,b", "x,1,2", "x,3,4"], "'x' on 'a' comes twice"),
        (["submission,a,a", "x,1,2"], "'x' on 'a' comes twice"),
        (["submission,a,b", "x,-1,2"], "must be above 0"),
        (["submission,a,b", "x,fast,2"], "'fast' is no time"),
        (["submission,a,b", "x,nan,2"], "must be above 0"),
        (["submission,a", "x,1"], "at least two workloads"),
        (["submission,a,b", "x,1"], "line 2: 2 cells instead of 3"),
        (["name,a,b", "x,1,2"], "first column must be `submission`"),
        (["submission,a,b"], "at least two workloads"),
        (["submission,a,b", "x,inf,"], "no submission met any target"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, capsys, lines, message):
    assert compare.main(["score", "--times", str(table(tmp_path / "t.csv", *lines))]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out", "c=a"], "no workload 'c'"),
        (["--held-out", "a"], "takes variant=base"),
        (["--held-out", "a=a"], "takes variant=base"),
        (["--reference", "y"], "--reference 'y'"),
    ],
)
def test_bad_words_are_one_line(tmp_path, capsys, words, message):
    path = table(tmp_path / "t.csv", "submission,a,b", "x,1,2")
    assert compare.main(["score", "--times", str(path), *words]) == 2
    assert message in capsys.readouterr().err
    assert compare.main(["score", "--times", str(tmp_path / "none.csv")]) == 2
    assert "cannot be read" in capsys.readouterr().err
