"""The house stays small and its imports run one way (tests/house.py)."""

import house
import pytest

SOURCES = house.product()


def test_sizes():
    assert [what for what, count, most in house.counts(SOURCES) if count > most] == []


def test_no_long_function():
    assert [name for lines, name in house.functions(SOURCES) if lines > 60] == []


def test_imports_run_one_way():
    assert house.wrong_imports(SOURCES) == []


def test_every_module_is_packaged():
    text = (house.ROOT / "pyproject.toml").read_text()
    for path in SOURCES:
        name = path.split("/")[0]
        assert (f'"{name}*"' if "/" in path else f'"{house.module(name)}"') in text, path


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"engine/spec.py": "from layers import shape", "layers/shape.py": ""}, ["engine.spec imports layers.shape"]),
        ({"train_gpt.py": "import cost", "cost/__init__.py": ""}, ["train_gpt imports cost"]),
        ({"lab/a.py": "def f():\n    import model", "model.py": ""}, ["lab.a imports model inside a function"]),
        (
            {"lab/a.py": "def f():\n    importlib.import_module('model')", "model.py": ""},
            ["lab.a imports model inside a function"],
        ),
        ({"lab/a.py": "from lab import b", "lab/b.py": "from lab.a import x"}, ["a circle: lab.a -> lab.b -> lab.a"]),
        ({"data/__main__.py": "import tricks", "tricks.py": "", "compare.py": "import lab.a", "lab/a.py": ""}, []),
    ],
)
def test_wrong_imports_are_seen(sources, words):
    assert house.wrong_imports(sources) == words


def test_long_functions_are_measured():
    assert house.functions({"a.py": "def f():\n    x = 1\n    return x\n\ndef g(): pass\n"}) == [(3, "a.py: f"), (1, "a.py: g")]
