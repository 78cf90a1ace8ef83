"""Runs of a fixed time (--minutes): what is scheduled follows the clock, which is one of the test's own making here."""

import inspect
import itertools
import json
import time
import types
from collections.abc import Callable

import pytest
from shared import Cut, events, launch, losses, result

import sample
import train_gpt
from config import resolve
from engine.schedules import Course
from engine.spec import UsageError
from lab import runs
from lab.records import judge, rules
from lab.trials import Arm, Trial

STEPS, MINUTES = 15, 4  # steps of 16 s, if all take as long: numbers that floating point holds exactly
FLAGS = ("--steps", str(STEPS), "--optimizer", "adamw:lr=0.01", "--layers", "1")
TIMED = (*FLAGS, "--minutes", str(MINUTES))
STAGES = ("--window-stages", "0.25/0.5/1", "--window-pattern", "LS", "--window", "32", "--length-stages", "0.5/1")
STAGES += ("--schedule", "wsd:cooldown=0.5,warmup=3", "--future-tokens", "1")


def ticking(pace: Callable[[int], float]) -> types.SimpleNamespace:
    """The trainer's module `time`, on which a step takes so many seconds and all else none: it is read before and after."""
    now, count = [0.0], itertools.count()

    def read() -> float:
        step, after = divmod(next(count), 2)
        now[0] += pace(step) * after
        return now[0]

    return types.SimpleNamespace(perf_counter=read, process_time=lambda: 0.0, monotonic=time.monotonic)


RANKS = f"""import itertools, os, sys, time, types
from collections.abc import Callable
import train_gpt

{inspect.getsource(ticking)}
train_gpt.time = ticking(lambda step: (16.0, 5.0)[int(os.environ["RANK"])])
train_gpt.leave(train_gpt.main(sys.argv[1:]))
"""


@pytest.fixture
def run(train, monkeypatch):
    """run(pace, *flags): the folder of a run on such a clock."""

    def on(pace: Callable[[int], float], *flags: str, out: str):
        monkeypatch.setattr(train_gpt, "time", ticking(pace))
        return train(*flags, out=out)

    return on


def column(folder, key: str) -> list[float]:
    return [event[key] for event in events(folder, "train")]


def test_on_a_steady_clock_it_is_the_run_by_steps(run):
    """Bit by bit: learning rates, windows, lengths, weights of further tokens, validations; so is one that is resumed."""
    by_steps, timed = (run(lambda _: 16.0, *flags, *STAGES, out=flags[-1]) for flags in (FLAGS, TIMED))
    assert losses(timed) == losses(by_steps) and losses(timed, "val") == losses(by_steps, "val")
    assert [e["step"] for e in events(timed, "val")] == [3, 6, 9, 12, 15]
    assert result(timed)["status"] == "ok" and result(timed)["steps"] == STEPS and result(timed)["train_time"] == 60 * MINUTES
    windows = [[block.attention.window for block in sample.load_model(folder)[0].blocks] for folder in (timed, by_steps)]
    assert windows[0] == windows[1] == [32]


@pytest.mark.parametrize(
    ("pace", "steps"),
    [
        (lambda _: 16.0, 15),
        (lambda _: 8.0, 30),  # a machine twice as fast
        (lambda step: 100.0 if step == 4 else 16.0, 10),  # one that stalls
        (lambda step: 7.0 + step, 17),
    ],
    ids=["steady", "fast", "stall", "slowing"],
)
def test_the_rate_follows_the_time(run, pace, steps, capsys):
    """lr = (1 - t / T) of its peak, whatever the steps; the last step begins before T and ends after it."""
    folder = run(pace, *TIMED, "--schedule", "linear", out="run")
    assert f"ETA {60 * MINUTES - pace(0):.0f} s" in capsys.readouterr().out
    ends = list(itertools.accumulate(map(pace, range(steps))))
    assert column(folder, "train_time") == ends and ends[-2] < 60 * MINUTES <= ends[-1]
    assert column(folder, "lr") == pytest.approx([0.01 * (1 - t / (60 * MINUTES)) for t in [0.0, *ends[:-1]]])
    vals = [e["step"] for e in events(folder, "val")]
    fifths = [sum(t < part * 48 for t in ends) + 1 for part in range(1, 6)]  # the first step that ends after each fifth
    assert vals == sorted(set(fifths)) and result(folder)["val_loss"] == losses(folder, "val")[-1]


def test_resumed_goes_on_at_its_time(run, monkeypatch):
    """A stall before the interruption is not forgotten after it; text is sampled with the windows of that time."""
    pace, flags = lambda step: 70.0 if step == 2 else 16.0, (*TIMED, *STAGES, "--checkpoint-every", "4", "--val-every", "5")
    whole, log_step = run(pace, *flags, out="whole"), train_gpt.Training.log_step

    def cut_off(self, *done):
        log_step(self, *done)
        if self.progress.step == 6:
            self.checkpoints.wait()
            raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(train_gpt.Training, "log_step", cut_off)
        with pytest.raises(Cut):
            run(pace, *flags, out="cut")
    folder = whole.parent / "cut"
    gpt, _ = sample.load_model(folder)
    assert gpt.blocks[0].attention.window == 16  # at 118 of 240 s; step 4 of 15 is in the first stage
    run(lambda step: pace(step + 4), *flags, out="cut")
    assert [e["step"] for e in events(folder, "resume")] == [4]
    assert losses(folder) == losses(whole) and column(folder, "lr") == column(whole, "lr")
    assert [e["step"] for e in events(folder, "val")] == [e["step"] for e in events(whole, "val")] == [5, 10, 12]


@pytest.mark.slow
def test_ranks_go_by_the_clock_of_the_first(run, sotu, tmp_path):
    """All take the same steps, though a clock of their own says otherwise."""
    flags = (*TIMED, "--schedule", "linear", "--check-ranks", "1")
    one = run(lambda _: 16.0, *flags, out="one")
    (tmp_path / "ranks.py").write_text(RANKS)
    code, _, said = launch(2, tmp_path / "two", *flags, script=tmp_path / "ranks.py").finish()
    assert code == 0, said[-2000:]
    assert column(tmp_path / "two", "lr") == column(one, "lr") and losses(tmp_path / "two") == pytest.approx(
        losses(one), rel=1e-5
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-stages", "1/2", "--batch-rates", "1/1"), "must be known for --batch-stages"),
        (("--no-tied-head", "--tied-until", "0.5"), "--tied-until"),
        (("--branch", "runs/x"), "--branch"),
        (("--average", "lawa_ema:start=0.5"), "a fraction of the run"),
        (("--optimizer", "schedule_free_adamw:warmup=0.1", "--schedule", "constant"), "give it in steps"),
        (("--minutes", "-1"), "--minutes must be 0 to"),
    ],
)
def test_what_needs_a_known_number_of_steps_is_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        resolve(["--track", "tiny", "--minutes", "1", *flags])
    assert resolve(["--track", "tiny", "--minutes", "1", "--average", "lawa_ema:start=5"])


def test_the_track_and_who_asks_for_steps(tmp_path):
    config, model_config, _ = resolve(["--track", "gpt2-small-10min", "--tricks", "record"])
    assert (config.minutes, config.batch_tokens, model_config.width, config.target_loss) == (10, 131072, 768, 0)
    course = Course(config)
    assert course.position(3, 600.0) == config.steps and course.at(config.steps).lr == 0 < course.at(config.steps - 1e-3).lr
    with pytest.raises(UsageError, match="add --minutes 0"):
        _ = Trial(Arm("timed", ("--track", "gpt2-small-10min")), 5, 0).folder
    assert Trial(Arm("by steps", ("--track", "gpt2-small-10min", "--minutes", "0")), 5, 0).folder
    with pytest.raises(judge.Broken, match="a record has a fixed number of steps"):
        rules.stopping(types.SimpleNamespace(about={"settings": {"stop_at_target": False, "minutes": 10}}, timed_anew=[]))
    (tmp_path / "config.json").write_text(json.dumps({"steps": 10, "minutes": 1}))
    (tmp_path / "log.jsonl").write_text('{"event": "train", "step": 3, "train_time": 45.0, "loss": 1.0}\n')
    assert (runs.see(tmp_path).left, runs.see(tmp_path).steps) == (15.0, 0)
