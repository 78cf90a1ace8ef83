"""What the pages show exists: tables are those of the registries and results, commands parse, code runs, links lead on."""

import json
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from shared import ROOT, losses

import compare
import judge
import sample
import scaling
import tricks
from config import resolve
from cost import predict
from data.__main__ import parser as data_parser
from engine.spec import UsageError, trust
from lab import docs, levers, plots
from lab.records.__main__ import parser as records_parser
from lab.tuning import tune
from optimizers.__main__ import show

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md", ROOT / "records" / "README.md"]
README = (ROOT / "README.md").read_text()


def fenced(text: str, python: bool) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in blocks if (language == "python") == python]


def commands() -> list[list[str]]:
    """Every command of the pages, without comments (three blanks and a text)."""
    lines = "\n".join(block for page in PAGES for block in fenced(page.read_text(), python=False)).replace("\\\n", " ")
    lines = [re.split(r" {3,}", line)[0] for line in lines.splitlines() if line.startswith(("./run.sh", ".venv/bin/"))]
    words = [shlex.split(line, comments=True) for line in lines]
    return [list(command) for command in dict.fromkeys(map(tuple, words))]


OPTIMIZER, TRICK = fenced(README, python=True)
VERBS = re.findall(r"^#   \./run\.sh ([a-z]+) ", (ROOT / "run.sh").read_text(), re.MULTILINE)


@pytest.fixture
def additions(tmp_path, monkeypatch):
    """The README's optimizer as mine.py in the working folder, its trick in TRICKS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OPTIMIZER)
    monkeypatch.setattr(tricks, "TRICKS", dict(tricks.TRICKS))
    exec(TRICK, vars(tricks))


# ---------------------------------------------------------------- tables and links


@pytest.mark.parametrize("path", docs.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_generated(path):
    assert docs.filled(path) == path.read_text(), "run: ./run.sh docs"


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_the_map_names_what_there_is():
    names = re.findall(r"^([\w./]+) {2,}\S", fenced(README, python=False)[-1], re.MULTILINE)
    assert len(names) > 12 and all((ROOT / name).exists() for name in names)
    assert "\nclass Clock" in (ROOT / "train_gpt.py").read_text()


def test_findings_are_few_and_say_when_nothing_was_shown():
    answers = {question: answer for question, answer, _ in docs.findings()}
    assert len(answers) <= 8
    assert answers["Muon instead of AdamW, both tuned"].startswith("2.3 times as fast (")
    assert docs.times("records/comparisons/cpu-optimizers", "soap").startswith("not significant (p = 0.0")
    assert re.fullmatch(r"(`\w+` 1\.\d\dx(, )?)+", answers["Best levers on a tuned Muon: its steps for their loss"])
    (fastest,) = (
        answer for question, answer in answers.items() if question.startswith("The fastest of 10 optimizers tuned alike")
    )
    assert fastest.startswith("`muon` ") and re.fullmatch(r"(`\w+` \d\.\dx(, )?){3}", fastest)


# ---------------------------------------------------------------- code


def test_optimizer_of_the_readme(additions, train, tmp_path):
    assert OPTIMIZER.count("\n") < 15
    scope: dict = {}
    exec(OPTIMIZER, scope)
    w, g = torch.randn(3, 4), torch.randn(3, 4)
    p = torch.nn.Parameter(w.clone())
    p.grad = g
    scope["SignDescent"]([p], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(p, 0.95 * w - 0.1 * g.sign())
    folder = train("--optimizer", f"{tmp_path / 'mine.py'}:SignDescent:lr=0.002", "--steps", "10")
    assert losses(folder)[-1] < losses(folder)[0]


def test_trick_of_the_readme(additions, train):
    assert TRICK.count("\n") < 15
    assert resolve(["--track", "cpu", "--tricks", "long_warmup"])[0].schedule == "linear:warmup=0.3"
    folder = train("--tricks", "modern,muon,long_warmup", "--steps", "2", "--schedule", "linear:warmup=0.3")
    assert len(losses(folder)) == 2


def test_runs_are_drawn(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    steps = [{"event": "train", "step_time": 0.5, "loss": 5 - i / 30} for i in range(90)]
    (run / "log.jsonl").write_text(
        "\n".join(map(json.dumps, [*steps, {"event": "val", "loss": 2.0}, {"event": "val", "loss": None}, {}]))
    )  # it diverged
    assert plots.draw([str(run), "--out", str(tmp_path / "picture.png")]) == f"wrote {tmp_path / 'picture.png'}"
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    minutes, loss, end = plots.of_run(run)
    assert minutes[:2].tolist() == pytest.approx([0.025, 0.05]) and loss[0] == pytest.approx(5 - 1 / 30) and end == 2
    with pytest.raises(UsageError, match="holds no log of a step"):
        plots.draw([str(tmp_path)])


# ---------------------------------------------------------------- commands


def check_plan(words: list[str]) -> None:
    predict.machine(predict.parse(words)[0].hardware)


def check_compare(words: list[str]) -> None:
    if words[0] == "tune":
        assert tune.parse(words[1:])
    elif words[0] == "levers":
        assert levers.parse(words[1:])
    elif words[0] != "score":
        options = compare.parse(words)
        assert options.report or len(compare.make_arms(options)) > 1


def check_scaling(words: list[str]) -> None:
    if words[0] != "fit":
        assert len(scaling.make_experiment(scaling.parse(["--plan", *words])).arms) > 1  # --plan needs no corpus


CHECKS = {
    "train": resolve,
    "plan": check_plan,
    "compare": check_compare,
    "scaling": check_scaling,
    "judge": lambda words: judge.parse(words),
    "sample": lambda words: sample.parser().parse_args(words),
    "data": lambda words: data_parser().parse_args(words),
    "records": lambda words: records_parser().parse_args(words),
    "optimizers": lambda words: [show(name) for name in words if name != "--json"],
}


def test_commands_were_found():
    assert len(commands()) > 60 and {"test", "help", *CHECKS} <= set(VERBS)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_parses(words, additions):
    if any(word.startswith("path/to") for word in words):
        return
    trust(words)
    if "train_gpt.py" in words:
        resolve(words[words.index("train_gpt.py") + 1 :])
    elif words[0] != "./run.sh":
        assert words[1] != "-m" or (ROOT / (words[2].replace(".", "/") + ".py")).exists()
        assert not words[1].endswith(".py") or (ROOT / words[1]).exists()
    elif len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in VERBS
        if words[1] in CHECKS:
            CHECKS[words[1]](words[2:])


def test_wrong_command_would_not_parse():
    """The check above can fail."""
    with pytest.raises(UsageError):
        CHECKS["train"](["--trikcs", "record"])


# ---------------------------------------------------------------- run.sh


def run_sh(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "run.sh", *words], capture_output=True, text=True)


def test_help_lists_every_verb_and_does_nothing():
    text = (ROOT / "run.sh").read_text()
    done = run_sh("--help")
    assert done.returncode == 0 and not done.stderr and run_sh("help").stdout == done.stdout
    assert all(f"  ./run.sh {verb} " in done.stdout and re.search(rf"^  {verb}\)", text, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize(("words", "near"), [(["tset"], "test"), (["help", "trian"], "train"), (["Compare"], "compare")])
def test_wrong_verb_is_answered_by_the_nearest(words, near):
    done = run_sh(*words)
    assert done.returncode == 2 and done.stderr == f"run.sh: unknown verb '{words[-1]}': did you mean '{near}'?\n"


def test_unknown_verb_leads_to_the_list():
    done = run_sh("qqqq")
    assert done.returncode == 2 and done.stderr.endswith(": ./run.sh --help lists all\n") and not done.stdout


def test_paths_are_those_of_the_user_s_folder(tmp_path):
    """From another folder and through a link: what is there is meant, defaults stay in the repository."""
    copy, away = tmp_path / "repository", tmp_path / "away"
    for folder in (copy / ".venv" / "bin", away):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "run.sh", copy)
    shutil.copy(ROOT / "pyproject.toml", copy)
    python = copy / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\npwd\nfor word; do echo "$word"; done\n')
    python.chmod(0o755)
    cksum = subprocess.run("cksum < pyproject.toml", shell=True, cwd=copy, capture_output=True, text=True).stdout
    (copy / ".venv" / f".installed-{cksum.replace(' ', '').strip()}-").touch()
    for name in ("mine.txt", "mine.py", "muon"):
        (away / name).touch()
    (away / "run").symlink_to("../repository/run.sh")
    train = ["--optimizer", "mine.py:Mine:lr=0.1", "--out", "here", "--data-root=data", "--tricks", "muon", "--schedule=wsd"]
    there = [f"{away}/mine.py:Mine:lr=0.1", f"{away}/here", f"--data-root={away}/data", "muon", "--schedule=wsd"]
    for command in ("./run", "../repository/run.sh", copy / "run.sh"):
        done = subprocess.run([command, "train", *train], cwd=away, capture_output=True, text=True)
        place, script, *words = done.stdout.splitlines()
        assert (place, script, done.returncode) == (str(copy), "train_gpt.py", 0), done.stderr
        assert [word for word in words if word not in ("--optimizer", "--out", "--tricks")] == there
    done = subprocess.run(
        ["./run", "data", "prepare", "muon", "--files", "mine.txt", "none.txt"], cwd=away, capture_output=True, text=True
    )
    assert done.stdout.split()[3:] == ["prepare", "muon", "--files", f"{away}/mine.txt", "none.txt"]
    for words, mapped in {
        "export OUT": "{}/OUT",
        "export --to hf --run none a/b": "--to hf --run {}/none {}/a/b",
        "export --to=hf OUT --data-root d": "--to=hf {}/OUT --data-root {}/d",
        "export -h": "-h",
        "watch muon": "watch {}/muon",
        "watch none": "watch none",
        "runs muon": "muon",
    }.items():
        done = subprocess.run(["./run", *words.split()], cwd=away, capture_output=True, text=True)
        assert done.stdout.split()[3:] == mapped.replace("{}", str(away)).split(), done.stderr
    done = subprocess.run([copy / "run.sh", "train", "--out", "here"], cwd=copy, capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["train_gpt.py", "--out", "here"]
