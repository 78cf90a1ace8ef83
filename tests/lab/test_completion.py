"""The script for the Tab key, made once and asked by bash."""

import shlex
import subprocess
import warnings

import tricks
from engine.schedules import SCHEDULES
from lab import completion
from optimizers import OPTIMIZERS


def test_bash_completes_verbs_flags_and_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of runpy: the verbs are imported already
        (tmp_path / "script").write_text(completion.run(["bash"]))
    some = {"muon", "wsd", "record", "no_bias"}
    asked = {  # what is typed, the last word unfinished -> what is among the answers, and what is not
        "": ({"train", "compare", "watch", "completion"}, {"main", "--track"}),
        "com": ({"compare", "completion"}, {"train"}),
        "help sca": ({"scaling"}, {"train"}),
        "--tri": ({"--tricks"}, {"train"}),
        "--tricks mu": ({"muon"}, {"--tricks"}),
        "train --qui": ({"--quiet"}, {"--qk-norm"}),
        "train --tricks ": (some, {"adamw", "--steps"}),
        "train --tricks modern,mu": ({"modern,muon"}, {"muon"}),
        "train --tricks = mu": ({"muon"}, {"--steps"}),
        "train --optimizer ": (set(OPTIMIZERS), {"record"}),
        "train --schedule ": (set(SCHEDULES), {"muon_adamw"}),
        "train --track ti": ({"tiny"}, {"cpu"}),
        "plan --tra": ({"--track"}, set()),
        "plan --track ti": ({"tiny"}, set()),
        "plan --har": ({"--hardware"}, set()),
        "compare --": ({"--steps", "--arm", "--plan", "--json"}, {"--qk-norm", "--trials"}),
        "compare --chain muon w": ({"wsd"}, {"muon"}),
        "compare --base ": (some, {"adamw"}),
        "compare --optimizers adamw so": ({"soap"}, {"adamw"}),
        "compare --tricks muon -- --qk": ({"--qk-norm"}, set()),
        "compare t": ({"tune"}, {"--target"}),
        "compare tune --tr": ({"--trials"}, {"--tricks"}),
        "compare tune --workloads ": (set(tricks.TRACKS), {"muon"}),
        "scaling f": ({"fit"}, set()),
        "scaling fit --l": ({"--losses"}, {"--ladder"}),
        "records v": ({"verify"}, {"add"}),
        "records verify --": ({"--rerun", "--json"}, {"--why"}),
        "records add --category ": ({"gpt", "optimizer"}, {"muon"}),
        "runs ": ({"diff", "watch"}, {"in"}),
        "train --rotary-base ": (set(), {"muon"}),
        "optimizers mu": ({"muon"}, {"adamw"}),
        "schedules w": ({"wsd"}, {"muon"}),
        "study ": ({"all", "page"}, {"muon"}),
        "eval h": ({"hellaswag"}, {"bits-per-byte"}),
        "train --out ": (set(), {"muon", "--steps"}),  # bash itself completes files then
        "docs --": (set(), {"--track"}),
    }
    lines = ["source ./script"]
    for typed in asked:
        *words, last = typed.split(" ")
        words = " ".join(map(shlex.quote, ["run.sh", *words, last]))
        lines.append(f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _run_sh; echo "${{COMPREPLY[*]}}"')
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not done.stderr
    for (typed, (among, not_among)), line in zip(asked.items(), done.stdout.splitlines(), strict=True):
        answers = set(line.split())
        assert among <= answers and not not_among & answers, (typed, answers)
