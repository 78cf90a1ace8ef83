"""schedules.py against closed forms written out again here, and its drawing command."""

import functools
import itertools
import math
import sys
import types

import pytest

from engine import schedules
from engine.schedules import MOMENTUM_SCHEDULES, SCHEDULES, build
from engine.spec import UsageError

STEPS = 200
build_momentum = functools.partial(build, registry=MOMENTUM_SCHEDULES, what="momentum schedule")


def ramp(warmup: float):
    """Linear warm-up, 1 from its last step on."""
    return lambda s: min(1.0, (s + 1) / warmup)


# spec -> multiplier at step s of a run of 200 steps
CLOSED_FORMS = {
    "constant": lambda s: 1.0,
    "constant:warmup=10": ramp(10),
    "constant:warmup=0.05": ramp(10),
    "linear": lambda s: 1 - s / 200,
    "linear:final=0.1": lambda s: 1 - 0.9 * s / 200,
    "linear:warmup=20": lambda s: (s + 1) / 20 if s < 20 else (200 - s) / 180,
    "cosine": lambda s: 0.5 + 0.5 * math.cos(math.pi * s / 200),
    "cosine:final=0.1": lambda s: 0.55 + 0.45 * math.cos(math.pi * s / 200),
    "cosine:warmup=0.1,final=0.1": lambda s: (s + 1) / 20 if s < 20 else 0.55 + 0.45 * math.cos(math.pi * (s - 20) / 180),
    "exponential": lambda s: 10 ** (-s / 200),
    "exponential:final=0.01": lambda s: 100 ** (-s / 200),
    "wsd": lambda s: 1.0 if s < 120 else (200 - s) / 80,
    "wsd:cooldown=50": lambda s: 1.0 if s < 150 else (200 - s) / 50,
    "wsd:cooldown=1": lambda s: 1 - s / 200,
    "wsd:cooldown=0.5,final=0.2": lambda s: 1.0 if s < 100 else 0.2 + 0.8 * (200 - s) / 100,
    "wsd:cooldown=0.5,warmup=10": lambda s: min(1.0, (s + 1) / 10, (200 - s) / 100),
    "wsd:cooldown=0.5,form=sqrt": lambda s: 1.0 if s < 100 else 1 - math.sqrt((s - 100) / 100),
    "wsd:cooldown=0.5,form=exponential": lambda s: 1.0 if s < 100 else (100 ** (1 - (s - 100) / 100) - 1) / 99,
    "wsd:cooldown=0.5,power=1.2": lambda s: 1.0 if s < 100 else ((200 - s) / 100) ** 1.2,
    "power": lambda s: 1 - s / 200,
    "power:inner=0.4,outer=2,final=0.1,warmup=20": lambda s: (
        (s + 1) / 20 if s < 20 else 0.1 + 0.9 * (1 - ((s - 20) / 180) ** 0.4) ** 2
    ),
    "fast_slow:hold=0.1,knee=100,level=0.2,power=0.6,final=0.05": lambda s: (
        1.0 if s <= 20 else 1 - 0.8 * ((s - 20) / 80) ** 0.6 if s < 100 else 0.2 - 0.15 * (s - 100) / 100
    ),
    "fast_slow": lambda s: 1 - 0.8 * max(0, (s - 12.8) / 99.2) ** 0.6 if s < 112 else 0.2 * (200 - s) / 88,
    "cyclic": lambda s: 0.5 + 0.5 * math.cos(math.pi * (s % 50) / 50),
    "cyclic:cycles=2,decay=0.5,final=0.1": lambda s: (
        (0.5 if s >= 100 else 1.0) * (0.55 + 0.45 * math.cos(math.pi * (s % 100) / 100))
    ),
    "inverse_sqrt": lambda s: (s + 1) / 10 if s < 10 else math.sqrt(10 / (s + 1)),
    "inverse_sqrt:warmup=50": lambda s: (s + 1) / 50 if s < 50 else math.sqrt(50 / (s + 1)),
}


@pytest.mark.parametrize("spec", CLOSED_FORMS)
def test_closed_form(spec):
    schedule = build(spec, STEPS)
    for step in range(STEPS):
        assert schedule(step) == pytest.approx(CLOSED_FORMS[spec](step), abs=1e-12), step


def test_every_schedule_has_a_closed_form_here():
    assert {spec.split(":")[0] for spec in CLOSED_FORMS} == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_pure_in_the_step(name):
    schedule, again = build(name, STEPS), build(name, STEPS)
    forwards = [schedule(step) for step in range(STEPS)]
    assert [schedule(step) for step in reversed(range(STEPS))] == forwards[::-1]
    assert [again(step) for step in range(STEPS)] == forwards


@pytest.mark.parametrize("name", SCHEDULES)
def test_between_zero_and_the_peak_for_every_length(name):
    """Also where the warm-up is no whole number of steps (0.05 of 50), or 0.1 * 30 = 3.0000000000000004."""
    for steps, warmup in itertools.product((1, 3, 10, 30, 50, 199), ("0", "1", "2.5", "0.05", "0.1", "7", "0.35")):
        schedule = build(f"{name}:warmup={warmup}", steps)
        values = [schedule(step) for step in range(steps)]
        assert all(0 < v <= 1 for v in values), (steps, warmup, values)


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential", "wsd"])
def test_final_is_approached_and_not_reached(name):
    schedule = build(f"{name}:final=0.25", STEPS)
    assert schedule(0) == 1
    assert 0.25 < schedule(STEPS - 1) < 0.28
    assert schedule(STEPS) == pytest.approx(0.25)


@pytest.mark.parametrize("form", ["linear", "sqrt", "exponential"])
def test_wsd_forms_fall_steadily_from_one_to_final(form):
    schedule = build(f"wsd:cooldown=100,form={form},final=0.1", STEPS)
    values = [schedule(step) for step in range(100, STEPS + 1)]
    assert values[0] == 1
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(values))


def test_cyclic_restarts_at_the_peak():
    schedule = build("cyclic:cycles=4,decay=0.5", STEPS)
    assert [schedule(step) for step in (0, 50, 100, 150)] == [1, 0.5, 0.25, 0.125]
    assert all(schedule(step) < 0.002 for step in (49, 99, 149, 199))


def test_warmup_counts_from_the_first_step():
    schedule = build("constant:warmup=4", STEPS)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_momentum_kept_unless_asked():
    assert build_momentum("keep", STEPS)(0) is None
    assert set(MOMENTUM_SCHEDULES) == {"keep", "ramp"}


def test_momentum_ramp():
    momentum = build_momentum("ramp:start=0.8,peak=0.9,end=0.7,warmup=50,cooldown=0.2", STEPS)
    for step in range(STEPS):
        if step < 50:
            expected = 0.8 + 0.1 * step / 50
        elif step < 160:
            expected = 0.9
        else:
            expected = 0.9 - 0.2 * (step - 160) / 40
        assert momentum(step) == pytest.approx(expected, abs=1e-12), step
    published = build_momentum("ramp", 1000)  # modded-nanogpt record 9: 0.85 to 0.95 over 300 steps
    assert [published(step) for step in (0, 150, 300, 999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosin", "did you mean 'cosine'"),
        ("cosine:warmpu=1", "did you mean 'warmup'"),
        ("cosine:warmup=soon", "float"),
        ("cosine:warmup", "key=value"),
        ("cosine:warmup=-1", "warmup must be at least 0, got -1"),
        ("linear:final=nan", "final must be at least 0, got nan"),
        ("linear:final=-1", "final must be at least 0"),
        ("wsd:form=cubic", "linear, sqrt, exponential"),
        ("wsd:cooldown=0", "cooldown must be at least 1e-06, got 0"),
        ("exponential:final=0", "final must be 1e-09 to 1, got 0"),
        ("cyclic:cycles=0", "cycles must be at least 1"),
        ("cyclic:cycles=2.5", "int"),
    ],
)
def test_bad_words_get_one_line(spec, message):
    with pytest.raises(UsageError, match=message) as error:
        build(spec, STEPS)
    assert "\n" not in str(error.value)


def test_bad_momentum_schedule():
    with pytest.raises(UsageError, match="did you mean 'ramp'"):
        build_momentum("ram", STEPS)


# ---------------------------------------------------------------- the drawing command


class FakeAxes:
    def __init__(self):
        self.lines = {}

    def plot(self, values, label):
        self.lines[label] = values

    def set(self, **_):
        pass

    legend = set


def test_draws_what_the_schedules_say(monkeypatch, tmp_path):
    """With a stand-in for matplotlib, so that the drawing is tested where it is not installed, too."""
    axes, saved = FakeAxes(), []
    figure = types.SimpleNamespace(savefig=lambda path, **_: saved.append(path))
    pyplot = types.SimpleNamespace(subplots=lambda **_: (figure, axes))
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    out = str(tmp_path / "drawing.svg")
    monkeypatch.setattr(sys, "argv", ["schedules.py", "wsd:cooldown=0.5", "cosine", "--steps", "40", "--out", out])
    assert schedules.draw() == f"wrote {out}" and saved == [out]
    assert axes.lines == {spec: [build(spec, 40)(s) for s in range(40)] for spec in ("wsd:cooldown=0.5", "cosine")}


def test_drawing_without_matplotlib_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setattr(sys, "argv", ["schedules.py", "--out", str(tmp_path / "drawing.png")])
    with pytest.raises(UsageError, match="pip install matplotlib"):
        schedules.draw()
    assert not any(tmp_path.iterdir())


def test_drawing_an_unknown_schedule(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["schedules.py", "wds"])
    with pytest.raises(UsageError, match="did you mean 'wsd'"):
        schedules.draw()
