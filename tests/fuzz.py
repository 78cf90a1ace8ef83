"""Odd words and damaged files, at random: never a traceback, never a hang, never an exit code but the documented ones.

    .venv/bin/python tests/fuzz.py                      2,000 cases, some minutes
    .venv/bin/python tests/fuzz.py --cases 500 --seed 7 --kinds spec checkpoint

Everything runs in this process: a case calls a verb, or what a verb does first, with words or files that were changed at random
(dice seeded by the kind and the number of the case). Trainers that a verb would start are not started. A case fails if anything
but a UsageError or a documented exit code comes out of it, or nothing within two minutes; or if a damaged shard or checkpoint
is not seen.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import compare
import config
import evaluate
import optimizers
import sample
import scaling
import train_gpt
from cost import predict
from data import __main__ as data
from data import shards
from engine import checkpoint, run_folder, schedules
from engine.command import command
from engine.spec import UsageError
from lab import plots, runs, trials
from lab.records import __main__ as records
from lab.scaling import experiment
from lab.tuning import tune
from model import GPT
from tricks import TRICKS

CODES = {0, 1, 2, 3, 75, 130}
SECONDS = 120  # wall-clock: a busy machine may take ten times as long as a quiet one
TINY = ["--track", "tiny", "--layers", "1", "--width", "32", "--heads", "2", "--batch-tokens", "256", "--val-tokens", "512"]
TINY += ["--device", "cpu", "--dtype", "fp32"]
ODD = ["", "0", "-1", "1", "2", "0.5", "1e400", "nan", "-inf", "1e17", "9" * 20, "none", "true", "é", "\ud800", "\0", "a" * 300]
ODD += ["../x", "/", "*", "$(x)", "1/0", "0.9/0.95", "x=y", ":", ",", "=", "keep", "name:key=value", "-", "--", "1,2"]
ODD_JSON = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    1e308,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "é\0",
    [],
    {},
    [[]],
    {"x": 1},
    [1, 2],
]


class Hang(BaseException):
    """A case that does not end."""


def stop(*_: Any) -> None:
    raise Hang


# ---------------------------------------------------------------- changes at random


def word(dice: random.Random, known: list[str]) -> str:
    """A known word, an odd one, or one made of others."""
    kind = dice.randrange(6)
    if kind < 2:
        return dice.choice(known)
    if kind < 4:
        return dice.choice(ODD)
    text = list(dice.choice(known) + dice.choice(["", ":", ",", "="]) + dice.choice([*known, *ODD]))
    for _ in range(dice.randrange(3)):
        text.insert(dice.randrange(len(text) + 1), dice.choice("=:,/.-0e\0é "))
    return "".join(text)


def spec(dice: random.Random, registry: dict[str, type]) -> str:
    """A SPEC whose name or keys may be right."""
    name = dice.choice([*registry, "torch.optim.AdamW", "torch.optim:SGD", word(dice, list(registry))])
    keys = [f.name for f in config.dataclasses.fields(registry[name])] if name in registry else ["lr", "betas", "momentum"]
    pairs = [f"{word(dice, keys or ['lr'])}={word(dice, ['0.1', '1', '1e-3', 'true'])}" for _ in range(dice.randrange(4))]
    return name + ":" * bool(pairs) + ",".join(pairs)


def changed_bytes(dice: random.Random, content: bytes) -> bytes:
    place = dice.randrange(len(content) + 1)
    kind = dice.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes(dice.randrange(256) for _ in range(dice.randrange(1, 9))) + content[place:]
    if kind == 2:
        return content[:place] + content[place + dice.randrange(1, 40) :]
    place = min(place, max(0, len(content) - 1))
    return content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :]


def changed_json(dice: random.Random, value: Any) -> Any:
    """One to three parts of a JSON value replaced, left out, or doubled."""
    for _ in range(dice.randrange(1, 4)):
        inner, path = value, []
        while isinstance(inner, (dict, list)) and inner and (not path or dice.random() < 0.8):
            path.append((inner, key := dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))))
            inner = inner[key]
        if not path:
            return dice.choice(ODD_JSON)
        parent, key = path[-1]
        if dice.random() < 0.3:
            del parent[key]
        else:
            parent[key] = dice.choice(
                [dice.choice(ODD_JSON), str(inner), [inner], -inner if type(inner) in (int, float) else inner]
            )
    return value


def change(dice: random.Random, path: Path) -> bool:
    """A file damaged, or a JSON file with another content. Is it another file now?"""
    content = path.read_bytes()
    changed(dice, path, content)
    return path.read_bytes() != content


def changed(dice: random.Random, path: Path, content: bytes) -> None:
    if path.suffix in (".json", ".jsonl") and dice.random() < 0.7:
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        at = dice.randrange(len(lines))
        lines[at] = json.dumps(changed_json(dice, json.loads(lines[at]))).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif path.suffix == ".csv" and dice.random() < 0.7:
        rows = [line.split(b",") for line in content.splitlines()]
        row = dice.choice(rows)
        row[dice.randrange(len(row))] = dice.choice(ODD).encode(errors="replace")
        path.write_bytes(b"\n".join(map(b",".join, rows)) + b"\n")
    else:
        path.write_bytes(changed_bytes(dice, content))


# ---------------------------------------------------------------- kinds of case


class Cases:
    """What the kinds of case share: a finished run, a comparison, tables, a corpus, all tiny, in a folder of their own."""

    def __init__(self, work: Path):
        self.work, self.fresh = work, work / "case"
        self.gpt, self.repository = GPT(config.resolve(TINY)[1]), Path(__file__).parent.parent

    def make(self, name: str) -> None:
        """What a kind of case damages."""
        kept = self.repository / "records"
        if name == "run":
            argv = ["--steps", "2", "--checkpoint-every", "1", "--out", str(self.work / "run")]
            assert train_gpt.main([*TINY, *argv, "--data-root", str(self.repository / "corpora")]) == 0
        elif name == "mine-bytes":
            documents, folder = [torch.arange(1, n).numpy() for n in (40, 90)], self.work / name
            splits = {split: shards.write(folder, "mine", split, documents, 0, 50) for split in ("train", "val")}
            shards.write_manifest(folder, dict(corpus="mine", tokenizer="bytes", vocab_size=256, eot=0, splits=splits))
        elif name == "tuning":
            for track, optimizer in itertools.product(("bytes-small", "wiki"), ("adamw", "muon")):
                (folder := self.work / name / track).mkdir(parents=True, exist_ok=True)
                shutil.copy(kept / name / track / f"{optimizer}.csv", folder)
        elif name == "times.csv":
            lines = [f"{submission},{track},{n}\n" for n, submission in enumerate("ab", 1) for track in "xy"]
            (self.work / name).write_text("submission,workload,seconds\n" + "".join(lines))
        else:
            report = sorted((kept / name).glob("*/*.json"))[0]
            shutil.copytree(report.parent, self.work / name)

    def copy(self, name: str) -> Path:
        """A fresh copy of a folder or file of `work`."""
        if not (source := self.work / name).exists():
            self.make(name)
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir()
        return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, self.fresh / name))

    def spec(self, dice: random.Random) -> None:
        """A SPEC of an optimizer, a schedule or an average, resolved and built."""
        flags = {
            "--optimizer": optimizers.OPTIMIZERS, "--schedule": schedules.SCHEDULES,
            "--momentum-schedule": schedules.MOMENTUM_SCHEDULES, "--average": optimizers.AVERAGES,
        }  # fmt: skip
        flag = dice.choice([*flags, "--optimizer", "--optimizer"])
        settings, *_ = config.resolve([*TINY, f"{flag}={spec(dice, flags[flag])}"])
        optimizers.build(settings.optimizer, self.gpt, settings.steps, settings.average)
        schedules.Course(settings).at(0)

    def flags(self, dice: random.Random) -> None:
        """Flags of the trainer, up to where data is read."""
        flags = list(config.parser()._option_string_actions)
        known = ["tiny", "cpu", "modern,muon", "0.25/0.5/1", "1/2", "32", "64", "gelu", "rotary", *TRICKS]
        argv = [
            f"{word(dice, flags)}={word(dice, known)}" if dice.random() < 0.8 else word(dice, flags)
            for _ in range(dice.randrange(1, 4))
        ]
        settings, model_config, recipe = config.resolve([*TINY, *argv])
        config.shares(settings, model_config, 1, "cpu")
        config.mean_flops(settings, model_config)
        run_folder.default_folder(run_folder.all_settings(settings, model_config, recipe))

    def verb(self, dice: random.Random) -> int:
        """Words of the other verbs; they train nothing."""
        verbs = {
            "compare": (compare.parser(), compare.main),
            "scaling": (experiment.parser(""), scaling.main),
            "tune": (tune.parser(), lambda words: compare.main(["tune", *words])),
            "data": (data.parser(), data.main),
            "sample": (sample.parser(), sample.main),
            "plan": (None, lambda words: command("plan", lambda: predict.report(predict.predict(words)))),
            "plot": (None, lambda words: command("plot", lambda: plots.draw(words))),
        }
        name = dice.choice([*verbs])
        parser, main = verbs[name]
        flags = list(parser._option_string_actions) if parser else ["--out", "--track", "--tricks", "--hardware"]
        known = ["tiny", "muon", "adamw", "modern", "baseline", "verify", "list", "3", "0.5", "sotu", "baseline=3", "no_bias"]
        argv = [word(dice, flags) if dice.random() < 0.5 else word(dice, known) for _ in range(dice.randrange(1, 6))]
        if name == "data" and "prepare" in argv:
            return 0  # which may download
        out = [] if name in ("data", "sample", "plan") else ["--out", str(self.fresh / "out")]
        cut = argv.index("--") if "--" in argv else len(argv)
        argv[cut:cut] = out
        return main(argv)

    def corpus(self, dice: random.Random) -> None:
        """A corpus with a damaged file: all of it read."""
        folder = self.copy("mine-bytes")
        damaged = change(dice, path := dice.choice(sorted(folder.iterdir()))) and path.suffix == ".bin"
        with contextlib.suppress(UsageError):
            assert shards.verify(folder) or not damaged, "verify does not see it"
        train, val = shards.Dataset(folder, "train").check(256), shards.Dataset(folder, "val").check(256)
        train.shared(val)
        shards.validation_starts(val, 16, 64, True)
        loader = shards.Loader(train, 16, 2)
        for step in range(3):
            loader.batch(step)
        assert not damaged, "it was trained on"

    def checkpoint(self, dice: random.Random) -> None:
        """A run folder with a damaged file, of which half the time the hashes are made anew; then what resuming reads."""
        folder = self.copy("run")
        path = folder / "checkpoints" / "step-00000002"
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"]
        damaged = change(dice, file := dice.choice([*files, *[path / "state.json"] * 4]))
        damaged &= path in file.parents and file.name != "DONE"
        if dice.random() < 0.6:
            listed = {f: [(path / f).stat().st_size, run_folder.file_hash(path / f)] for f in checkpoint.files(path)}
            (path / "DONE").write_text(json.dumps({"files": listed}))
        else:
            assert not damaged or checkpoint.damage(path), "it is not seen"
        settings, model_config, recipe = config.resolve([*TINY, "--steps", "2"])
        every = run_folder.all_settings(settings, model_config, recipe)
        run = run_folder.Run(folder, every, "auto")
        if run.finished:
            train_gpt.display.describe(run.finished, folder)
        (folder / "result.json").unlink(missing_ok=True)
        saver = checkpoint.Checkpoints(folder / "checkpoints")
        if newest := saver.first("auto", 2, lambda: None):
            optimizer = optimizers.build(settings.optimizer, self.gpt, 2)
            state, saved, states = saver.load(newest, self.gpt, optimizer.state_dict())
            optimizers.restore(optimizer, state, settings.optimizer)
            checkpoint.set_generators(states, torch.device("cpu"))
            train_gpt.Progress(**saved["progress"])
            for p in self.gpt.parameters():
                p.grad = torch.zeros_like(p)
            optimizers.step(optimizer, settings.optimizer)

    def resume(self, dice: random.Random) -> int:
        """The trainer itself on such a folder."""
        folder = self.copy("run")
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"]
        change(dice, dice.choice(files))
        if dice.random() < 0.7:
            (folder / "result.json").unlink(missing_ok=True)
        with mock.patch.object(train_gpt.hardware, "matmul_peak", return_value=(1e11, "")):
            return train_gpt.main(
                [*TINY, "--steps", "3", "--out", str(folder), "--data-root", str(self.repository / "corpora")]
            )

    def reader(self, dice: random.Random) -> int:
        """Verbs that read what others left: a run, the reports of compare, scaling and tune, scores, tuned settings."""
        source = {"compare": "comparisons", "scaling": "scaling", "tune": "tuning", "score": "times.csv"}
        kind = dice.choice(["sample", "plot", "runs", "summary", "evaluate", "tuned", *source])
        folder = self.copy(source.get(kind, "run"))
        suffixes = (".json", ".jsonl", ".csv")
        change(
            dice, dice.choice([p for p in sorted(folder.rglob("*")) if p.suffix in suffixes] if folder.is_dir() else [folder])
        )
        if kind == "sample":
            return sample.main(["--run", str(folder), "--tokens", "2"])
        if kind == "plot":
            return command("plot", lambda: plots.draw([str(folder), "--out", str(self.fresh / "loss.png")]))
        if kind == "runs":
            return command("runs", lambda: runs.run(["--root", str(folder.parent)]))
        if kind == "summary":
            return records.main(["summary", str(folder)])
        if kind == "evaluate":
            words = ["bits-per-byte", "--file", str(self.repository / "CITATION.cff"), "--run", str(folder)]
            return command("evaluate.py", lambda: evaluate.run(words))
        if kind == "score":
            return compare.main(["score", "--times", str(folder)])
        if kind == "tune":
            return compare.main(["tune", "--report", "--out", str(folder)])
        if kind in ("compare", "scaling"):
            return (compare if kind == "compare" else scaling).main(["--report", str(folder)])
        (there := self.fresh / "tuned.json").write_text(
            json.dumps({"tiny": {"adamw": {"optimizer": "adamw:lr=0.1", "schedule": "wsd"}}})
        )
        change(dice, there)
        with mock.patch.object(compare.tricks, "TUNED", there):
            config.resolve(TINY)
            compare.main(
                ["--track", "tiny", "--optimizers", "adamw", "muon", "--tuned-on", "tiny", "--out", str(self.fresh / "out")]
            )
        return 0


KINDS = ("spec", "flags", "verb", "corpus", "checkpoint", "resume", "reader")
SHARE = dict(spec=6, flags=5, verb=3, corpus=6, checkpoint=5, resume=1, reader=3)  # of the cases


@contextlib.contextmanager
def quiet(work: Path):
    """No output, no trainers, no pictures, nothing written but in `work`; afterwards all is as it was."""
    place = Path.cwd()
    os.chdir(work)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with (
            mock.patch.object(trials, "run_to_end", return_value=(2, "not started")),
            mock.patch.object(plots, "save", lambda figure, folder, name, data=None: plots.pyplot().close(figure) or name),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        os.chdir(place)
        signal.signal(signal.SIGALRM, before)


def tried(cases: Cases, kind: str, number: int) -> str:
    """What is wrong with a case; nothing: it ended as it may."""
    dice = random.Random(f"{kind} {number}")
    cases.fresh.mkdir(exist_ok=True)
    signal.alarm(SECONDS)
    try:
        code = getattr(cases, kind)(dice)
        return f"exit code {code}" if code not in (None, *CODES) else ""
    except UsageError as error:
        return "" if "\n" not in str(error) else f"several lines: {error}"
    except SystemExit as error:  # argparse's --help
        return "" if error.code in (None, 0) else f"SystemExit {error.code}"
    except Hang:
        return f"no end in {SECONDS} s"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__}: {error} at " + " < ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-5:-1]
        )
    finally:
        signal.alarm(0)


def run(cases: int, seed: int, kinds: tuple[str, ...] = KINDS) -> tuple[dict[str, int], list[str]]:
    """How many cases of each kind were tried, and those that failed."""
    counts = {kind: max(1, cases * SHARE[kind] // sum(SHARE[k] for k in kinds)) for kind in kinds}
    failed = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, quiet(Path(folder)):
        made = Cases(Path(folder))
        for kind, count in counts.items():
            for number in range(seed * 1_000_000, seed * 1_000_000 + count):
                if wrong := tried(made, kind, number):
                    failed.append(f"{kind} {number}: {wrong[:400]!r}")
    return counts, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts, failed = run(options.cases, options.seed, tuple(options.kinds))
    print("\n".join([*failed, *(f"{kind:12} {count:5} cases" for kind, count in counts.items()), f"{len(failed)} failed"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
