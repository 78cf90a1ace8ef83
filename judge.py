"""Is an optimizer faster than AdamW and Muon? One command, one page.

    ./run.sh judge my_optimizer.py:Mine              half an hour on two cores; --budget 60: minutes

1. The class: does it do what a trainer relies on? Its step: how long, against fused AdamW's and Muon's?
2. `compare tune`: as many trials as AdamW and Muon had (records/tuning), or as many for all as there is time for.
3. `compare`: all three with their best settings, on fresh seeds, interleaved, to a workload's target.
4. `scaling`: what does it save over AdamW at two sizes?
The plan follows from the time of the first trial. The same command continues, and trains nothing twice. Output: --out, with
README.md and pictures. Exit codes: 0 judged, 2 wrong arguments or a class that cannot train, 130 interrupted.
"""

import io
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import compare
import optimizers
import scaling
import tricks
from benchmarks.optimizers import ROUNDS, seconds
from config import resolve
from data import corpora
from engine.command import Parser, command
from engine.run_folder import read_json
from engine.spec import UsageError, split
from lab import comparison, plots, runner
from lab.scaling import ladder
from lab.scaling.report import measured
from lab.tuning import tune, tuned
from model import GPT, roles

RIVALS, WORKLOADS = ("adamw", "muon"), ("bytes-small", "wiki", "bytes-large", "tokens", "division")  # the cheapest first
FIRST, CORES = WORKLOADS[0], os.cpu_count() or 1
# (trials a study, studies, workloads, seeds, sizes) -> cost on two cores, in trials of the first workload. Rivals: 5, 3, all
PLANS = {(2, 1, 1, 3, 0): 15, (5, 1, 1, 3, 0): 16, (5, 1, 1, 3, 2): 39, (5, 2, 1, 3, 2): 42, (5, 3, 1, 4, 2): 47}
PLANS |= {(5, 3, 2, 5, 2): 57, (5, 3, 3, 6, 2): 72, (5, 3, 5, 8, 2): 111}
FLAGS = ("--dtype", "fp32", "--val-tokens", "16384", "--val-also", "")  # as the recorded trials of the first workload
SMALL, ALL = ["--track", "tiny", "--positions", "rotary"], {"embedding", "matrix", "vector"}
TRIES = {  # arguments of `trained`, roles whose weights must change, and must not
    "steps": ({}, ALL, set()),
    "stored and resumed, against `steps`": ({"stop": True}, set(), ALL),
    "no gradient of the embedding": ({"change": lambda gpt: gpt.embedding.zero_grad()}, {"matrix", "vector"}, {"embedding"}),
    "zero gradients, weight decay": ({"change": lambda gpt: gpt.zero_grad(set_to_none=False)}, set(), {"vector"}),
    "a NaN gradient, where runs stop": ({"change": lambda gpt: gpt.embedding.weight.grad.fill_(math.nan)}, set(), set()),
    "bf16 weights": ({"dtype": torch.bfloat16}, ALL, set()),
    "hardly any lr": ({"rate": 1e-12}, set(), ALL),
}


def trained(spec: str, steps: int = 4, change: Callable = id, dtype=torch.float32, rate=1.0, stop=False) -> list[torch.Tensor]:
    """Weights of a small GPT after steps with random gradients. change: of these. stop: state stored and resumed half-way."""

    def fresh() -> tuple[GPT, torch.optim.Optimizer]:
        torch.manual_seed(0)
        gpt = GPT(resolve(SMALL)[1]).to(dtype)
        return gpt, optimizers.build(spec, gpt)

    gpt, optimizer = fresh()
    for number in range(steps):
        if stop and number == steps // 2:
            torch.save((gpt.state_dict(), optimizer.state_dict()), file := io.BytesIO())
            weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            gpt, optimizer = fresh()
            gpt.load_state_dict(weights)
            optimizers.restore(optimizer, state, spec)
        torch.manual_seed(number)
        for p in gpt.parameters():
            p.grad = 0.01 * torch.randn_like(p)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["initial_lr"]
        change(gpt)
        optimizers.step(optimizer, spec)
    return [p.detach() for p in gpt.parameters()]


def check(spec: str) -> list[str]:
    """A line on each of TRIES. Raises UsageError: it takes no step, or its state cannot be stored, which ends every run."""
    lines, of, plain = [], roles(GPT(resolve(SMALL)[1])).values(), []
    for what, (how, must, never) in TRIES.items():
        try:
            before, after = plain if "stop" in how else trained(spec, 0, **how), trained(spec, **how)
            plain = plain or after
            changed = {role for role, a, b in zip(of, before, after) if (a - b).abs().max() > 1e-10 * ("rate" in how)}
            broken = sum(not w.isfinite().all() for w in after)
            fine = must <= changed and not never & changed and (not broken or "NaN" in what)
            words = f"changes {', '.join(sorted(changed)) or 'nothing'}; {broken} of {len(after)} tensors are not finite"
        except Exception as error:  # whatever a class of others raises is a line about it
            fine, words = False, " ".join(f"{type(error).__name__}: {error}".removeprefix("UsageError: ").split())[:300]
            if not lines or "stop" in how:
                raise UsageError(f"{spec} cannot train: {what}: {words}") from error
        lines.append(f"{what}: {'fine' if fine else 'NOT FINE'}: {words}")
    return lines


def step(name: str) -> list[str]:
    """Its time on the `modern` model of the `cpu` track against each rival's, over interleaved rounds after a first one."""
    gpt = GPT(resolve(["--track", "cpu", "--tricks", "modern"])[1])
    weights, times = list(gpt.parameters()), {n: [] for n in (*RIVALS, name)}
    made, gradients = {n: optimizers.build(n, gpt) for n in times}, [0.01 * torch.randn_like(w) for w in weights]
    for n in [*times] * (1 + ROUNDS):
        times[n].append(seconds(made[n], optimizers.period(n), weights, gradients))
    ratios = {rival: sorted([a / b for a, b in zip(times[name], times[rival])][1:]) for rival in RIVALS}
    return [f"its step: {r[ROUNDS // 2]:.3g} x {rival}'s ({r[0]:.3g} to {r[-1]:.3g})" for rival, r in ratios.items()]


class Judgement:
    """Of an optimizer, in a folder. A method named after a verb gives words of its command."""

    def __init__(self, name: str, minutes: float, out: Path):
        self.name, self.minutes, self.out, self.lines, self.begun = name, minutes, out, [], time.monotonic()
        self.table = partial(tuned.table_of, out / "tune")  # of a track and an optimizer
        self.commands = [f"./run.sh judge {shlex.join([name, '--budget', f'{minutes:g}', '--out', str(out)])}"]

    def run(self) -> str:
        """The verdicts. Raises UsageError: it cannot train."""
        self.lines = [*check(self.name), *step(self.name)]
        print("\n".join(self.lines), flush=True)
        tune.run(self.tune(1, 1, 1))
        trials, studies, count, seeds, sizes = self.plan()
        tune.run(self.said("compare tune", self.tune(trials, studies, count)))
        for verb, words in ((compare, lambda: self.compare(seeds)), (scaling, self.scaling))[: 1 + bool(sizes)]:
            where = ["--base", "baseline", "--side-by-side", str(CORES), "--out", str(self.out / verb.__name__), "--", *FLAGS]
            try:
                verb.run(verb.parse(self.said(verb.__name__, [*words(), *where])))
            except UsageError as error:  # such as a target that nobody met: the page says so
                self.lines.append(f"{verb.__name__}: {error}")
        return self.report()

    def said(self, verb: str, words: list[str]) -> list[str]:
        self.commands.append(f"./run.sh {verb} {shlex.join(words)}")
        print(f"\n{(time.monotonic() - self.begun) / 60:.0f} minutes are over; now {self.commands[-1]}", flush=True)
        return words

    def plan(self) -> tuple[int, ...]:
        """The largest of PLANS that fits the minutes, by the wall-clock time of the first trial."""
        trial = next(iter(self.table(FIRST, self.name).rows.values())).wall / 60 * 2 / min(2, CORES)
        plan = max((p for p, cost in PLANS.items() if cost * trial <= self.minutes), key=PLANS.get, default=min(PLANS))
        words = "plan: {0} x {1} of 5 x 3 trials on {2} of 5 workloads, then {3} seeds, then {4} of 2 sizes"
        self.lines.append(f"{words.format(*plan)}; about {PLANS[plan] * trial:.0f} minutes")
        print(self.lines[-1], flush=True)
        return plan

    def tune(self, trials: int, studies: int, count: int) -> list[str]:
        """Puts the rivals' recorded trials at the same points beside its own."""
        for track in WORKLOADS[:count]:
            corpora.prepare(*(tricks.track(track).settings[key] for key in ("corpus", "tokenizer")), Path("corpora"))
            for rival in RIVALS:
                for row in tuned.table_of(tricks.TUNED.parent, track, rival).of("search"):
                    if row.number < trials and row.study < studies:
                        self.table(track, rival).add(row)
        words = ["--optimizers", self.name, "--trials", str(trials), "--studies", str(studies), "--no-neighbours"]
        return [*words, *FLAGS[:2], "--out", str(self.out / "tune"), "--workloads", *WORKLOADS[:count]]

    def compare(self, seeds: int) -> list[str]:
        """A search at about 0.5, 0.75, 1.1 x the steps in which the best trials met the target, then seeds."""
        target = tuned.target_of(tuned.read_tables(tricks.TUNED.parent)[FIRST])["loss"]
        best = {name: self.table(FIRST, name).best() for name in (*RIVALS, self.name)}
        steps = {name: tuned.steps_to(row, target) for name, row in best.items() if row}
        at = [f"{n}={s / 2 + 3:.0f},{0.75 * s:.0f},{1.1 * s:.0f}" for n, s in steps.items() if s < math.inf]
        words = ["--track", FIRST, "--target", f"{target:g}", "--optimizers", *best, "--tuned-on", f"{self.out}/tune/{FIRST}"]
        return [*words, "--lengths", *at, "--max-steps", str(2 * tune.length(FIRST)), "--seeds", str(seeds)]

    def scaling(self) -> list[str]:
        """With the best settings, the rate moved to the width from which the ladder moves it on."""
        narrow, wide = (tricks.track(name).settings["width"] for name in (FIRST, "cpu"))
        spec, _ = compare.tuned_for(f"{self.out}/tune/{FIRST}", self.name)
        spec = ladder.with_lr_factor(spec, (wide / narrow) ** optimizers.find(self.name).transfer)
        return ["--tricks", spec, "--sizes", "0.1M", "0.3M", "--seeds", "2", "--timing-steps", "0", "--hold-out", "0"]

    def report(self) -> str:
        """Write the page, as far as the stages came; returns its verdicts: one on each rival and one on the sizes."""
        lines, out, sizes = [], self.out, self.out / "scaling" / scaling.REPORT
        if (out / "compare" / compare.REPORT).exists():
            summary, rows = runner.read_report(out / "compare", compare.REPORT)
            summary = comparison.again(summary | {"mode": "chain"}, rows)  # sets the last arm against Muon too
            plots.draw_comparison(out, summary, runner.read_curves(out / "compare" / "curves.csv", rows))
            arm, ratios = summary["arms"][-1], [ratio for ratio in summary["ratios"] if ratio["arm"] == self.name]
            made = [comparison.verdict_line(r, arm).replace("decided:", f"decided against {r['base']}:", 1) for r in ratios]
            lines = list(dict.fromkeys(made))  # whoever missed the target did so against both
        if sizes.exists():
            at = read_json(sizes)["tricks"][0]["sizes"]
            gains = [s.get("intervals", {"tokens": [s.get("low") or 0]})["tokens"][0] > 1 for s in at]
            found = " and ".join(f"{measured(size, 'tokens')} at {size['size']} parameters" for size in at)
            lines.append(f"a gain on adamw {'survives' if all(gains) else 'is not shown at both sizes'}, in tokens: {found}")
        pictures = [*sorted(out.glob("*.png")), *out.glob("tune/sens*.png"), *out.glob("scaling/sizes.png")]
        text = [f"# `{self.name}` against AdamW and Muon", "", *(f"- {line}" for line in lines), ""]
        more = ", ".join(f"[{page.parent.name}]({page.relative_to(out)})" for page in sorted(out.glob("*/README.md")))
        text += [f"Above 1 it saves; intervals are 95 %, those of a step all that was seen. More: {more}.", ""]
        text += [*(f"![{p.stem}]({p.relative_to(out)})" for p in pictures), "", *(f"- {line}" for line in self.lines)]
        about = {"optimizer": self.name, "verdicts": lines, "lines": self.lines, "commands": self.commands}
        runner.write_report(out, "judge.json", about, "\n".join([*text, "", "```", *self.commands, "```", ""]))
        return "\n".join([*lines, f"wrote {out / 'README.md'}"])


def parse(argv: list[str]) -> Judgement:
    """Raises UsageError: an unknown optimizer, or one with keys, or a rival."""
    parser = Parser(prog="judge.py", description=__doc__)
    parser.add_argument("name", help="a registered optimizer, path.py:Class, or a class of a package: heavyball.SOAP")
    parser.add_argument("--budget", type=float, default=30, help="minutes (default: 30)")
    parser.add_argument("--out", type=Path, help="output folder (default: judge/NAME)")
    options = runner.read_options(parser, argv)
    optimizers.find(name := options.name)
    if split(name)[1] or name in RIVALS:
        raise UsageError(f"judge {name}: another optimizer's name is wanted, without keys: they are tuned")
    return Judgement(name, options.budget, options.out or Path("judge") / tuned.plain(name))


if __name__ == "__main__":
    sys.exit(command("judge.py", lambda: parse(sys.argv[1:]).run(), sys.argv[1:]))
