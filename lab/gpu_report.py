"""What `./run.sh gpu-check` finds, and how it is told: findings, causes of failures, the JSON to send back and its report."""

import json
import math
import re
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.spec import UsageError
from lab.markdown import table

SCHEMA = 1
PASS, FAIL, SLOWER, NOT_RUN = "pass", "fail", "slower than predicted", "not run"
VERDICTS = (PASS, FAIL, SLOWER, NOT_RUN)
MARGIN = 1.25  # what takes more than so many times what was predicted is slower
REHEARSAL = "A rehearsal on a CPU: it proves nothing about a GPU."
NO_TIME = "no time left"


@dataclass(frozen=True)
class Finding:
    """One line of the report. figures: all numbers behind it, in SI units."""

    stage: str
    what: str
    verdict: str
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- causes


ERROR = re.compile(r"(?:\[rank\d+\]:? *)*((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Resources|Interrupt)\b.*)")


def cause(error: BaseException) -> str:
    """The type of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def cause_in(text: str, code: int) -> str:
    """Why a process ended, from what it printed to stderr: what the trainer says itself, else the first exception (the first
    rank's: those of the others follow from it), else the last line; and the exit code or signal."""
    ended = f"died of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("train_gpt.py:")]
    errors = [found[1] for line in lines if (found := ERROR.fullmatch(line)) and "ChildFailedError" not in line]
    said = (own or errors or lines[-1:] or [""])[0]
    return f"{ended}: {said}" if said else ended


# ---------------------------------------------------------------- the report


def counts(findings: list[Finding]) -> str:
    """3 pass, 1 fail."""
    found = [f.verdict for f in findings]
    return ", ".join(f"{found.count(v)} {v}" for v in VERDICTS if v in found) or "nothing was run"


def exit_code(findings: list[Finding]) -> int:
    """0: nothing failed, and something was run."""
    verdicts = {f.verdict for f in findings}
    return int(FAIL in verdicts or not verdicts & {PASS, SLOWER})


def clean(text: str) -> str:
    """On one line, without what would steer a terminal: it may come from another machine."""
    return "".join(c if c.isprintable() else " " for c in text)


def bold(verdict: str) -> str:
    return f"**{verdict}**" if verdict == FAIL else verdict


def report(data: dict[str, Any]) -> str:
    """The Markdown of what gpu-check.json holds."""
    findings = [Finding(**f) for f in data["findings"]]
    state = "with changes" if data["dirty"] else "as committed"
    lines = [
        *([REHEARSAL, ""] if data["rehearsal"] else []),
        f"# {'Rehearsal' if data['rehearsal'] else 'GPU check'}: {clean(data['device'])}",
        "",
        f"{counts(findings)}, in {data['seconds']:.0f} of {data['budget']:.0f} s, {clean(data['utc'])}.",
        f"Source {clean(str(data['source_sha256']))[:12]}, commit {clean(str(data['commit']))[:12]}, {state}.",
        "",
        table(
            ("stage", "what", "verdict", "detail"),
            [tuple(map(clean, (f.stage, f.what, bold(f.verdict), f.detail))) for f in findings],
        ),
        "",
        f"*Slower than predicted*: takes {data['margin']:g} times what the cost model says, or what another form of the same "
        "takes, or more.",
    ]  # fmt: skip
    return "\n".join(lines)


KEYS = {"schema", "rehearsal", "device", "seconds", "budget", "utc", "margin", "source_sha256", "commit", "dirty", "findings"}


def read(path: Path) -> dict[str, Any]:
    """What a gpu-check.json holds.

    Raises:
        UsageError: no such file, not such a file, or of another version.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--read {path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"--read {path}: it is not JSON") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise UsageError(f"--read {path}: it is not a gpu-check.json")
    if data["schema"] != SCHEMA:
        raise UsageError(f"--read {path}: of schema {data['schema']!r}, and this is a reader of schema {SCHEMA}")
    if missing := sorted(KEYS - data.keys()):
        raise UsageError(f"--read {path}: it lacks {', '.join(missing)}")
    try:
        report(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"--read {path}: it is damaged ({cause(error)})") from None
    return data


def finite(value: Any) -> Any:
    """The same with null where JSON has no number: the loss of a run that diverged."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(findings: list[Finding], **facts: Any) -> str:
    """The text of gpu-check.json."""
    return json.dumps(finite({"schema": SCHEMA, **facts, "findings": [asdict(f) for f in findings]}), indent=1) + "\n"
