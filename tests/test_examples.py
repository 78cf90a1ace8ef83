"""The Dockerfile, read line by line, and the notebook, run: nothing here builds an image."""

import contextlib
import importlib.util
import io
import json
import math
import re
import subprocess
import sys
import types

import pytest
from shared import ROOT, result

NOTEBOOK = ROOT / "examples" / "speedrun.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
KERNEL = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))
INSTRUCTIONS = "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL ONBUILD RUN SHELL STOPSIGNAL USER VOLUME WORKDIR"


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its words) of a Dockerfile, in order; comments left out, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(words[0], words[1]) for words in (line.split(maxsplit=1) for line in lines.splitlines() if line.strip())]


def wrong(text: str) -> list[str]:
    """What is wrong with a Dockerfile of ours."""
    found = instructions(text)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    copied = [word for name, words in found if name == "COPY" for word in words.split()[:-1] if not word.startswith("--")]
    users = [words for name, words in found if name == "USER"]
    made = " ".join(words for name, words in found if name == "RUN")
    problems = {
        "an unknown instruction": not all(name in INSTRUCTIONS.split() for name, _ in found),
        "it does not begin with one FROM": [name for name, _ in found].count("FROM") != 1 or found[0][0] != "FROM",
        "its base has no version": not re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", found[0][1]) or "latest" in text,
        "it copies what git does not have": not {".", *tracked}.issuperset(copied),
        "it runs as root": not users or users[-1] in ("root", "0") or f"useradd --create-home {users[-1]}" not in made,
        "its entry is not run.sh": found[-1] != ("ENTRYPOINT", '["./run.sh"]'),
        "it installs nothing": "./run.sh " not in made,
    }
    return [problem for problem, there in problems.items() if there]


def test_dockerfile():
    text = (ROOT / "Dockerfile").read_text()
    assert wrong(text) == []
    for old, new, problem in (
        ("RUN", "RNU", "an unknown instruction"),
        (":13.0.1-base-ubuntu24.04", ":latest", "its base has no version"),
        (":13.0.1-base-ubuntu24.04", "", "its base has no version"),
        ("COPY --chown=speedrun .", "COPY requirements.txt", "it copies what git does not have"),
        ("USER speedrun", "USER root", "it runs as root"),
    ):
        assert problem in wrong(text.replace(old, new)), new
    ignored = {
        line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/") or line[0] == "/"
    }
    kept_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {".git", *ignored} - {".pytest_cache", ".ruff_cache"} <= kept_out


def test_the_notebook_is_stored_without_output():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) >= 4 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def left(folder) -> None:
    """What the notebook leaves: two runs and a picture of them."""
    (work,) = folder.glob("speedrun-*")
    adamw, muon = (result(work / name) for name in ("adamw", "muon"))
    assert muon["val_loss"] < adamw["val_loss"] < math.log(256) and adamw["steps"] == muon["steps"]
    assert (work / "loss.png").stat().st_size > 10_000


@pytest.mark.skipif(not KERNEL, reason="needs nbclient and ipykernel: .venv/bin/pip install -e .[notebook]")
@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(sotu, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where Jupyter starts it
    done = nbclient.NotebookClient(nbformat.read(NOTEBOOK, 4), timeout=170, kernel_name="python3", resources=place).execute()
    assert any("image/png" in output.get("data", {}) for cell in done.cells for output in cell.get("outputs", ()))
    left(tmp_path)


@pytest.mark.skipif(KERNEL, reason="a kernel runs them")
@pytest.mark.slow
def test_the_cells_run_one_after_another(sotu, tmp_path, monkeypatch, one_thread):
    """Without a kernel, and with a stand-in for IPython's picture."""
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None, version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(Image=lambda path: open(path).close()))
    scope: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for cell in CELLS:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), scope)
    assert len(re.findall(r"validation loss \d\.\d{3} nats a byte after", said.getvalue())) == 2
    left(tmp_path)
