"""What the README shows exists: its tables are those of the registries and results, its commands parse."""

import re
import shlex

import pytest
from conftest import ROOT

import compare
import cost
import scaling
import train_gpt
from data import __main__ as data_command
from engine.spec import UsageError
from lab import gpu_check, readme
from lab.records import record as records
from lab.tuning import tune
from optimizers.__main__ import show

TEXT = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)\n```$", TEXT, re.DOTALL | re.MULTILINE)
BLOCKS = "\n".join(text for language, text in FENCED if language != "python").replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True) for line in BLOCKS.splitlines() if "run.sh" in line or "train_gpt.py" in line]


@pytest.mark.parametrize("path", readme.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_generated(path):
    assert readme.filled(path) == path.read_text(), "run: .venv/bin/python -m lab.readme"


def test_commands_were_found():
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_parses(words, monkeypatch):
    if "train_gpt.py" in words:
        train_gpt.resolve(words[words.index("train_gpt.py") + 1 :])
        return
    assert words[0] == "./run.sh"
    verb, rest = (words[1], words[2:]) if len(words) > 1 else ("main", [])
    assert re.search(rf"^  {verb}\)", (ROOT / "run.sh").read_text(), re.MULTILINE), verb
    if verb == "train" and "--help" not in rest and not any("mine.py" in word for word in rest):
        own, rest = cost.own_flags(rest)
        cost.machine(own.hardware)
        train_gpt.resolve(rest)
    if verb == "optimizers":
        assert all(show(name) for name in rest)
    if verb == "compare" and rest[0] == "tune":
        if not any("mine.py" in word for word in rest):
            assert tune.parse(rest[1:])
    elif verb == "compare":
        options = compare.parse(rest)
        assert options.report or len(compare.make_arms(options)) > 1
    if verb == "scaling" and rest[0] != "fit":
        options = scaling.parse(["--plan", *rest])  # needs no corpus
        assert len(scaling.make_experiment(options).arms) > 1
    if verb == "gpu-check":
        monkeypatch.setattr(gpu_check.torch.cuda, "device_count", lambda: 8)
        assert gpu_check.parse(rest).ranks
    if verb == "records":
        assert records.parser().parse_args(rest).verb == "verify"
    if verb == "data":
        options = data_command.parser().parse_args(rest)
        assert options.verb in ("list", "prepare", "verify")


def test_wrong_command_would_not_parse():
    """The check above can fail."""
    with pytest.raises(UsageError):
        train_gpt.resolve(["--trikcs", "record"])


def test_linked_files_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_findings_say_what_their_figures_stand_on():
    answers = {question: answer for question, answer, _ in readme.findings()}
    whole = answers["How much faster than GPT-2 as published?"]
    assert re.search(r"together \d+x \(\d+-\d+\) in wall-clock", whole) and whole.endswith("the target itself not confirmed")
    assert " not confirmed" not in readme.saved("cpu-optimizers-slow") and " not confirmed" in readme.saved("cpu-record")
    alone = answers["How much does the optimizer alone save?"]
    assert "all with their defaults: at equal loss `muon` 2." in alone and ", steps 3." in alone
    named = [(arm, float(ratio)) for arm, ratio in re.findall(r"`(\w+)` ([\d.]+)x \(", alone)]
    assert {arm for arm, _ in named} == {"nadamw", "muon", "shampoo", "soap", "schedule_free_adamw", "sgd", "lion"}
    assert named == sorted(named, key=lambda found: -found[1])  # the most saving first
    assert re.findall(r"`(\w+)` [\d.]+x|(at \w+ \w+)", answers["And with tuned settings?"]) == [
        ("", "at equal loss"), ("muon", ""), ("schedule_free_adamw", ""), ("", "at confirmed lengths"), ("soap", "")
    ]  # fmt: skip  # of SOAP there is one length: no horizon
