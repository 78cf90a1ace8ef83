"""`./run.sh gpu-check`, as far as it goes without a GPU: a rehearsal of all stages, and that everything wrong is named."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cost
from data import shards
from engine.hardware import CARDS
from lab import gpu_check, gpu_device, gpu_report, gpu_runs, kernel_cases
from lab.gpu_report import FAIL, NO_TIME, NOT_RUN, PASS, SLOWER, Finding
from lab.gpu_runs import Check, Outcome

# The stages on the device with fewer cases, and compiled by nothing: Triton's interpreter and Inductor are slow.
FEWER = """
import sys, torch
from lab import attention_cases, gpu_device, kernel_cases
whole = kernel_cases.ragged
kernel_cases.ragged = lambda dtype: [c for c in whole(dtype) if any(w in c.what for w in ("5 x 90", "40 x 20", "5 x 97 of", "1 x 8 x 8", "48 x", "70 x 33"))]
attention_cases.LENGTHS, attention_cases.MASKS = (7,), {"both": (150, True)}
gpu_device.TIMED_MASKS = {"causal": (0, False)}
torch.compile = lambda function, **_: function
"""  # noqa: E501
RUN = "\nsys.exit(gpu_device.main(sys.argv[1:]))\n"


@pytest.fixture
def device_stage(monkeypatch, tmp_path):
    """device_stage(code): Python that runs in the processes of the device's stages."""

    def use(code: str) -> None:
        path = tmp_path / "stage.py"
        path.write_text(code)
        monkeypatch.setattr(gpu_runs, "DEVICE_STAGE", [sys.executable, str(path)])

    return use


@pytest.fixture
def stages(monkeypatch):
    """stages("kernels"): only these."""

    def use(*names: str, **own) -> None:
        monkeypatch.setattr(gpu_runs, "STAGES", {name: gpu_runs.STAGES[name] for name in names} | own)

    return use


def rehearse(folder: Path, *flags: str, code: int = 0) -> dict[str, list]:
    """Findings by stage of a rehearsal that must end with `code`."""
    assert gpu_check.main(["--device", "cpu", "--out", str(folder), *flags]) == code
    found: dict[str, list] = {}
    for finding in json.loads((folder / "gpu-check.json").read_text())["findings"]:
        found.setdefault(finding["stage"], []).append(Finding(**finding))
    return found


def check_on(tmp_path: Path, **given) -> Check:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Check(**dict(cuda=False, ranks=1, budget=600.0, out=tmp_path, scratch=scratch) | given)


# ---------------------------------------------------------------- all of it


def test_rehearsal(tmp_path, device_stage, monkeypatch, capsys, sotu):
    """Every stage on the CPU; the JSON tells the same report again."""
    device_stage(FEWER + RUN)
    monkeypatch.setattr(gpu_runs, "RECIPES", {("gpt2-small", "record"): 1.0})
    found = rehearse(tmp_path / "out", "--gpus", "1")
    verdicts = {stage: [f.verdict for f in findings] for stage, findings in found.items()}
    assert list(found) == ["machine", "kernels", "attention", "numerics", "recipes"]
    assert {f.what: f.verdict for f in found["attention"]}["flex"] == NOT_RUN and set(verdicts["attention"]) == {PASS, NOT_RUN}
    assert all(set(verdicts[stage]) == {PASS} for stage in ("machine", "kernels", "numerics", "recipes"))
    kernels = {f.what.split(",")[0] for f in found["kernels"]}
    assert kernels >= {"gram", "polynomial", "orthogonalize", "cross_entropy", "linear_relu2", "quantise", "fp8_linear"}
    (curve,), (recipe,) = found["numerics"], found["recipes"]
    assert "on 1 CPU rank" in curve.what and len(curve.figures["found"]["train"]) == 20
    figures = recipe.figures
    assert len(figures["losses"]) == 50 and figures["losses"][-1] < figures["losses"][0]
    assert figures["step"] == pytest.approx(np.median(figures["step_times"][10:]))
    assert figures["tokens_per_second"] == pytest.approx(figures["batch_tokens"] / figures["step"])
    assert figures["predicted"]["step"] > 0 and figures["result"]["status"] == "ok"
    data = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert data["schema"] == gpu_report.SCHEMA and data["rehearsal"] and data["machine"]["torch"] == torch.__version__
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gpu-check.json", "report.md"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.startswith("A rehearsal on a CPU: it proves nothing about a GPU.\n")
    capsys.readouterr()
    assert gpu_check.main(["--read", str(tmp_path / "out" / "gpu-check.json")]) == 0
    assert capsys.readouterr().out == report


def test_the_wire_between_two_ranks(tmp_path):
    check = check_on(tmp_path, ranks=2)
    gpu_runs.wire(check)
    (finding,) = check.findings
    whole = finding.figures["whole"]
    assert finding.verdict == PASS and finding.figures["ranks"] == 2 and whole["bytes"] == 2**20
    assert whole["bytes_per_second"] == pytest.approx(whole["bytes"] / whole["seconds"]), "each of two ranks sends all of it"
    check.ranks = 1
    gpu_runs.wire(check)
    assert check.findings == [finding], "one GPU has no wire"


def test_no_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.endswith("to rehearse on the CPU: ./run.sh gpu-check --device cpu\n")


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--gpus", "3"], "--gpus 3: PyTorch sees 2 here"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--budget", "-1"], "--budget must be seconds"),
        (["--budget", "nan"], "--budget must be seconds"),
        (["--device", "gpu"], "invalid choice"),
        (["--budgte", "3"], "unrecognized arguments: --budgte"),
    ],
)
def test_wrong_command_is_one_line(flags, answer, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_check.main(flags) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and answer in printed


def test_all_gpus_or_the_first_few(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_check.parse([]).ranks == 4 and gpu_check.parse(["--gpus", "2"]).ranks == 2
    check = check_on(tmp_path, cuda=True, ranks=2)
    assert check.environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,GPU-7a,1")
    assert check.environment["CUDA_VISIBLE_DEVICES"] == "5,3"


# ---------------------------------------------------------------- what is wrong is named


def test_a_wrong_kernel_is_named(tmp_path, device_stage, stages):
    device_stage(
        FEWER
        + """
from layers import kernels
right = kernels.cross_entropy_backward
kernels.cross_entropy_backward = lambda *given: right(*given) * 1.1
gpu_device.STAGES["kernels"] = lambda device, tasks=gpu_device.kernel_tasks: tasks(device)[:4]
"""
        + RUN
    )
    stages("kernels")
    found = {f.what: f for f in rehearse(tmp_path / "out", code=1)["kernels"]}
    wrong = found.pop("cross_entropy, bfloat16")
    assert wrong.verdict == FAIL and wrong.detail.startswith("5 x 97 of 97, no cap, gradient of the logits: off by 0.")
    assert len(found) == 3 and {f.verdict for f in found.values()} == {PASS}
    assert "**fail**" in (tmp_path / "out" / "report.md").read_text()


def test_a_stage_that_raises_is_named_and_the_others_run(tmp_path, stages):
    def breaks(check):
        raise OSError("the disk is on fire\nand more")

    stages(first=breaks, second=lambda check: check.add(Finding("second", "it", PASS)))
    found = rehearse(tmp_path / "out", code=1)
    assert found["first"] == [Finding("first", "the stage itself", FAIL, "OSError: the disk is on fire")]
    assert found["second"][0].verdict == PASS


def test_a_task_that_raises_is_named_and_the_others_run(tmp_path):
    def breaks(at):
        at("4 x 4")
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    tasks = [("one", breaks), ("two", lambda at: Finding("kernels", "two", PASS))]
    results = tmp_path / "results"
    assert gpu_device.run_tasks("kernels", tasks, torch.device("cpu"), results, skip=0) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    one, two = (Finding(**line["finding"]) for line in lines if "finding" in line)
    assert one.verdict == FAIL and two.verdict == PASS
    assert one.detail == "RuntimeError: CUDA error: an illegal memory access was encountered, at 4 x 4"


def test_a_fault_that_spoils_cuda_ends_the_process(tmp_path, monkeypatch):
    """The next process goes on after the task that did it."""
    monkeypatch.setattr(gpu_device, "spoilt", lambda device: True)
    tasks = [(name, lambda at, name=name: Finding("kernels", name, PASS)) for name in ("one", "two")]
    results = tmp_path / "results"
    for skip in (0, 1):
        assert gpu_device.run_tasks("kernels", tasks, torch.device("cpu"), results, skip) == gpu_device.BROKEN
    assert [json.loads(line)["finding"]["what"] for line in results.read_text().splitlines() if "finding" in line] == [
        "one",
        "two",
    ]


def test_what_is_too_large_is_not_a_failure(tmp_path, monkeypatch):
    """For the memory, or in fp32, in which the trainer uses no kernel, for a chip's shared memory."""

    class OutOfResources(Exception):
        pass

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def wide(drawn):
        raise OutOfResources("out of resource: shared memory, Required: 131072, Hardware limit: 101376.")

    results = tmp_path / "results"
    gpu_device.run_tasks("kernels", [("it", full)], torch.device("cpu"), results, 0)
    assert json.loads(results.read_text().splitlines()[-1])["finding"]["verdict"] == NOT_RUN
    verdicts = {}
    for dtype in (torch.float32, torch.bfloat16):
        for attempt in (full, wide):
            monkeypatch.setattr(kernel_cases, "both_forms", attempt)
            cases = kernel_cases.layers((1, 1, 3), 1, dtype)
            verdicts[dtype, attempt] = gpu_device.check_cases("it", cases, torch.device("cpu"), lambda where: None)
    bad = verdicts.pop((torch.bfloat16, wide))
    assert bad.verdict == FAIL and bad.detail.startswith("1 x 1 x 3 x 1: OutOfResources: out of resource: shared memory")
    assert {f.verdict for f in verdicts.values()} == {NOT_RUN}
    assert "for which the trainer takes plain PyTorch" in verdicts[torch.float32, wide].detail


# A stage by its protocol alone: one task is well, one dies, one spoils its process, one hangs, one is well again.
PROTOCOL = """
import json, os, signal, sys, time
names = ["well", "dies", "spoils", "hangs", "late"]
file = open(sys.argv[sys.argv.index("--results") + 1], "a", buffering=1)
say = lambda **words: file.write(json.dumps(words) + "\\n")
say(tasks=names)
for i, name in list(enumerate(names))[int(sys.argv[sys.argv.index("--skip") + 1]):]:
    say(begin=i)
    say(at="4 x 4")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        time.sleep(60)
    say(number=i, finding=dict(stage="kernels", what=name, verdict="fail" if name == "spoils" else "pass"))
    if name == "spoils":
        sys.exit(70)
"""


def test_what_dies_or_hangs_is_named_and_the_rest_goes_on(tmp_path, device_stage, monkeypatch):
    device_stage(PROTOCOL)
    monkeypatch.setattr(gpu_runs, "TASK_SECONDS", 2.0)
    check = check_on(tmp_path)
    gpu_runs.on_device(check, "kernels", 1.0)
    assert [(f.what, f.verdict, f.detail) for f in check.findings] == [
        ("well", PASS, ""),
        ("dies", FAIL, "died of SIGSEGV, at 4 x 4"),
        ("spoils", FAIL, ""),
        ("hangs", FAIL, "no word for 2 s, at 4 x 4"),
        ("late", PASS, ""),
    ]


def test_a_stage_that_does_not_start_says_why(tmp_path, device_stage):
    device_stage("import no_such_module")
    check = check_on(tmp_path)
    gpu_runs.on_device(check, "kernels", 1.0)
    (finding,) = check.findings
    assert finding.verdict == FAIL and finding.detail == "exit code 1: ModuleNotFoundError: No module named 'no_such_module'"
    assert "Traceback" in finding.figures["log"][0]


def test_cause_is_the_first_error_of_a_crowd():
    text = """
[rank3]: Traceback (most recent call last):
[rank3]:   File "ranks.py", line 1, in sum
[rank3]: torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled cuda error
[rank0]: RuntimeError: Connection closed by peer
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  train_gpt.py FAILED
"""
    assert gpu_report.cause_in(text, 1) == (
        "exit code 1: torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled cuda error"
    )
    own = "train_gpt.py: rank 2 hangs"
    assert gpu_report.cause_in(f"RuntimeError: x\n{own}\n{text}", 1) == f"exit code 1: {own}"
    assert gpu_report.cause_in("", -11) == "died of SIGSEGV" and gpu_report.cause_in("Killed", 137) == "exit code 137: Killed"


# ---------------------------------------------------------------- the budget


def test_without_time_nothing_is_run_and_everything_says_so(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(Check, "run", never)
    found = rehearse(tmp_path / "out", "--budget", "0", code=1)
    assert list(found) == ["machine", "kernels", "attention", "numerics", "recipes"]
    assert {(f.verdict, f.detail) for findings in found.values() for f in findings} == {(NOT_RUN, NO_TIME)}


def test_a_budget_is_kept(tmp_path, device_stage):
    """The task in hand is ended, torchrun's grandchildren and all; it and the rest are not run."""
    device_stage(PROTOCOL.replace('names = ["well", "dies", "spoils", "hangs", "late"]', 'names = ["well", "hangs", "late"]'))
    check = check_on(tmp_path, budget=gpu_runs.GRACE + 3)
    gpu_runs.on_device(check, "kernels", 1.0)
    assert check.seconds < check.budget
    assert [(f.what, f.verdict) for f in check.findings] == [("well", PASS), ("hangs", NOT_RUN), ("late", NOT_RUN)]


def test_stop_ends_what_a_process_started(tmp_path):
    """Also grandchildren with a session of their own that do not listen."""
    beat = tmp_path / "beat"
    grandchild = (
        f"import time, signal; signal.signal(15, signal.SIG_IGN)\nwhile True: open({str(beat)!r}, 'w').close(); time.sleep(.05)"
    )
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True).wait()"
    outcome = check_on(tmp_path).run([sys.executable, "-c", child], 30.0, lambda: not beat.exists())
    assert outcome.code is None
    beat.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not beat.exists()


# ---------------------------------------------------------------- what is compared


def curve(**changes: float) -> dict[str, list[float]]:
    golden = json.loads(gpu_runs.GOLDEN.read_text())
    for key, factor in changes.items():
        golden[key][-1] *= factor
    return golden


def test_a_loss_that_is_off_fails():
    compare = lambda found: gpu_runs.compare_curves("it", found, curve(), "a CPU")  # noqa: E731
    assert compare(curve()).verdict == compare(curve(train=1 + 9e-4)).verdict == PASS
    for found, words in (
        (curve(train=1 + 2e-3), "train loss 20 is 3.15018, not 3.14389: off by 0.002, allowed 0.001"),
        (curve(val=0.99), "val loss 5 is"),
        (curve(train=math.nan), "train loss 20 is nan"),
        (curve() | {"train": curve()["train"][:-1]}, "19 train losses, not 20"),
    ):
        finding = compare(found)
        assert finding.verdict == FAIL and finding.detail.startswith(words)


def test_losses_of_a_recipe():
    falling = [5 - i / 100 for i in range(50)]
    assert gpu_runs.trouble(falling) == ""
    assert "does not fall" in gpu_runs.trouble(falling[::-1])
    assert "not finite at step 8" in gpu_runs.trouble([*falling[:7], math.nan])
    assert "at step 8, or the run ended there" in gpu_runs.trouble(falling[:7])


def test_muon_computes_in_fp32_for_the_golden_curve():
    config = gpu_runs.train_gpt.resolve(gpu_runs.golden_flags())[0]
    assert "dtype=fp32" in config.optimizer and config.dtype == "fp32" and config.steps == 20


def test_results_that_cannot_be_compared_do_not_pass():
    finding = gpu_device.compared("kernels", "it", [("a", 0.1, 1.0), ("b", math.nan, 1.0)], [], [])
    assert finding.verdict == FAIL and finding.detail.startswith("b: off by nan")
    assert gpu_device.compared("kernels", "it", [], [], ["too large"]).verdict == NOT_RUN
    assert gpu_device.compared("kernels", "it", [("a", 0.1, 1.0)], ["c: boom"], []).detail == "c: boom"


def test_slower_than_predicted_or_than_its_rivals():
    verdict = lambda **s: gpu_device.timed("kernels", "it", s, "kernel", torch.device("cuda")).verdict  # noqa: E731
    assert verdict(kernel=1.2, torch=1.0, predicted=1.0) == PASS
    assert verdict(kernel=1.3, torch=2.0, predicted=1.0) == verdict(kernel=1.3, torch=1.0, predicted=2.0) == SLOWER
    assert verdict(kernel=1.3, torch=2.0, compiled=None, predicted=None) == PASS


def test_the_cost_model_knows_every_kernel():
    """At least what its products take at the card's peak; the loss at least what reading its logits takes."""
    H100 = CARDS["H100"]
    for case in kernel_cases.gpt2(torch.bfloat16):
        seconds = gpu_device.predicted(case.draw, H100)
        assert 1e-6 < seconds < 0.2, case
    layer = next(c for c in kernel_cases.gpt2(torch.bfloat16) if c.kernel == "linear_relu2")
    assert gpu_device.predicted(layer.draw, H100) > 3 * 2 * 65536 * 768 * 3072 / H100.bf16
    loss = next(c for c in kernel_cases.gpt2(torch.bfloat16) if c.kernel == "cross_entropy")
    assert gpu_device.predicted(loss.draw, H100) > 2 * kernel_cases.LOSS_ROWS * 50304 * 2 / H100.bandwidth


# ---------------------------------------------------------------- recipes on cards that are not here


def test_made_data_is_a_corpus_with_a_heavy_tail(tmp_path):
    folder = tmp_path / "made-gpt2"
    gpu_runs.make_data(folder, 512)
    assert shards.verify(folder) == []
    tokens = np.concatenate([np.asarray(s) for s in shards.Dataset(folder, "train").shards])
    counts = np.bincount(tokens, minlength=512) / len(tokens)
    assert len(counts) == 512 and (counts > 0).all()
    assert counts[0] == pytest.approx(1 / 2.7 / (1 / (np.arange(511) + 2.7)).sum(), rel=0.02)
    entropy = -(counts * np.log(counts)).sum()
    assert math.log(512) - 1.2 < entropy < math.log(512) - 0.3, "there is something to learn, in a few steps"


def on_cards(tmp_path: Path, card: str | None, ranks: int, monkeypatch) -> Check:
    monkeypatch.setattr(gpu_runs, "made_flags", lambda *_: [])
    return check_on(tmp_path, cuda=True, ranks=ranks, machine={"devices": [{"card": card}] * ranks})


def test_a_batch_that_fits_into_the_time(tmp_path, monkeypatch):
    """The track's own on 8 H100; on one card of a fifth of their speed a smaller one; none in no time."""
    check = on_cards(tmp_path, "H100", 8, monkeypatch)
    found, flags, _ = gpu_runs.fitted(check, "gpt2-small", "baseline", 60.0)
    assert found.config.batch_tokens == 524288 and found.ranks == 8
    assert found.seconds == cost.predict([*flags, "--hardware", "8xH100"]).seconds
    check.ranks, check.machine = 1, {"devices": [{"card": "A100"}]}
    found, flags, _ = gpu_runs.fitted(check, "gpt2-small", "baseline", 60.0)
    assert 1024 <= found.config.batch_tokens < 524288
    assert gpu_runs.START + 1.25 * 50 * found.seconds < 60
    with pytest.raises(gpu_runs.UsageError, match=NO_TIME):
        gpu_runs.fitted(check, "tiny", "baseline", gpu_runs.START)


def test_a_micro_batch_that_fits_into_the_memory(tmp_path, monkeypatch):
    check = on_cards(tmp_path, "RTX 4090", 1, monkeypatch)
    flags = ["--track", "gpt2-small", "--batch-tokens", "65536", "--layers", "6"]
    found, with_micro, _ = gpu_runs.predict(check, flags)
    assert with_micro[-2] == "--micro-batch-tokens" and found.step.memory.total < 0.9 * 24e9
    check.machine = {"devices": [{"card": None}]}
    assert gpu_runs.predict(check, flags) == (None, flags, "no prediction: this card is not in the table")


def test_mixed_cards_are_as_fast_as_the_slowest(tmp_path):
    check = check_on(tmp_path, cuda=True, ranks=2, machine={"devices": [{"card": "H100"}, {"card": "A100"}]})
    assert gpu_runs.card_word(check) == "2xA100"


def test_a_trainer_that_fails_tells_why(tmp_path, monkeypatch):
    """Not enough memory, say: the trainer's own line is the verdict."""
    said = "train_gpt.py: rank 0, step 1: forward and backward: CUDA out of memory; try --micro-batch-tokens 512"
    monkeypatch.setattr(gpu_runs, "fitted", lambda *_: (None, ["--track", "tiny"], ""))
    monkeypatch.setattr(Check, "run", lambda *_: Outcome(2, "", f"{said}\nTraceback"))
    finding = gpu_runs.recipe_run(check_on(tmp_path), "tiny", "baseline", 10.0)
    assert finding.verdict == FAIL and finding.detail == f"exit code 2: {said}"
    monkeypatch.setattr(Check, "run", lambda *_: Outcome(None, "", ""))
    finding = gpu_runs.recipe_run(check_on(tmp_path / "scratch"), "tiny", "baseline", 10.0)
    assert finding.verdict == NOT_RUN and finding.detail == f"{NO_TIME}: its time was up after 0 steps"


# ---------------------------------------------------------------- a JSON that somebody sent back


def sent(**changes) -> dict:
    facts = dict(schema=1, rehearsal=False, device="8 x H100", seconds=1.0, budget=2.0, utc="now", margin=1.25,
                 source_sha256="a" * 64, commit="b" * 40, dirty=False)  # fmt: skip
    return facts | {"findings": [dict(stage="kernels", what="gram", verdict="fail", detail="off | \x1b[2Jby 3")]} | changes


def test_report_of_a_json(tmp_path, capsys):
    path = tmp_path / "sent.json"
    path.write_text(json.dumps(sent()))
    assert gpu_check.main(["--read", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# GPU check: 8 x H100\n\n1 fail, in 1 of 2 s") and "| kernels | gram | **fail** |" in printed
    assert "\x1b" not in printed and "off \\|  [2Jby 3" in printed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (None, "No such file"),
        ("{", "it is not JSON"),
        ("[1]", "it is not a gpu-check.json"),
        (json.dumps(sent(schema=99)), "of schema 99, and this is a reader of schema 1"),
        (json.dumps({"schema": 1}), "it lacks budget, commit"),
        (json.dumps(sent(findings=[{"what": "gram"}])), "it is damaged (TypeError"),
        (json.dumps(sent(seconds="long")), "it is damaged (ValueError"),
    ],
)
def test_a_json_that_is_none_is_one_line(text, answer, tmp_path, capsys):
    path = tmp_path / "sent.json"
    if text is not None:
        path.write_text(text)
    assert gpu_check.main(["--read", str(path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and answer in printed


def test_a_loss_that_is_no_number_is_null_in_the_json():
    text = gpu_report.as_json([Finding("recipes", "tiny", FAIL, figures={"losses": [1.0, math.nan, [math.inf]]})])
    assert json.loads(text)["findings"][0]["figures"]["losses"] == [1.0, None, [None]]


def test_exit_code():
    finding = lambda verdict: Finding("s", "w", verdict)  # noqa: E731
    assert gpu_report.exit_code([finding(PASS), finding(SLOWER), finding(NOT_RUN)]) == 0
    assert gpu_report.exit_code([finding(PASS), finding(FAIL)]) == gpu_report.exit_code([finding(NOT_RUN)]) == 1
