"""What every verb prints: its answer alone with --quiet, as JSON with --json, and never a colour."""

import io
import json
import re
import sys

import pytest
import shared
from house import product
from tqdm import tqdm

import train_gpt
from engine.command import Answer, Parser, command


def work(answer):
    print("on the way")
    for _ in tqdm(range(2), disable=not sys.stderr.isatty()):
        print("a warning", file=sys.stderr)
    return answer


@pytest.mark.parametrize(
    ("answer", "code", "printed"),
    [
        (Answer("words", {"a": float("nan"), "b": 1}, 3), 3, {"a": None, "b": 1}),
        (Answer("words", []), 0, []),
        ("words", 0, "words"),
        (2, 2, None),
        (None, 0, None),
    ],
)
def test_an_answer_is_words_or_json(capsys, monkeypatch, answer, code, printed):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    words = "words\n" if isinstance(answer, str) else ""
    assert command("verb", lambda: work(answer)) == code
    out, err = capsys.readouterr()
    assert out == f"on the way\n{words}" and "2/2" in err
    assert command("verb", lambda: work(answer), ["--quiet"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == (words, "a warning\n" * 2)
    assert command("verb", lambda: work(answer), ["--json"]) == code
    out, err = capsys.readouterr()
    assert "on the way" in err and (json.loads(out) == printed if out else printed is None)


def test_a_terminal_that_has_not_every_letter(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert command("verb", lambda: "caf\u00e9") == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"caf?\n"


def test_errors_are_said_with_quiet(capsys):
    flags = Parser(prog="verb")
    assert command("verb", lambda: flags.parse_args(["--quiet", "--jsn"]), ["--quiet"]) == 2
    assert capsys.readouterr().err == "verb: unrecognized arguments: --jsn\n"


def test_training_is_quiet_when_asked(sotu, tmp_path, capsys):
    words = shared.tiny(tmp_path / "run", "--steps", "3")
    assert train_gpt.main([*words, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("target ") and out.count("\n") == 1 and not err
    assert "quiet" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert train_gpt.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shared.result(tmp_path / "run")


def test_nothing_is_coloured():
    """So NO_COLOR and pipes have nothing to switch off: the only escape is `watch` clearing a terminal."""
    for path, text in product().items():
        assert set(re.findall(r"x1b\[\w*", text)) <= {"x1b[2J", "x1b[H"}, path
        assert not re.search(r"\\033|colou?r=.*tqdm|tqdm\(.*colour|termcolor|import rich|colorama", text), path
