"""The AlgoPerf score: performance profiles over workloads, and the area under them.

    ./run.sh compare score --times times.csv --held-out "wmt_glu_tanh=wmt,fastmri_tanh=fastmri" --plot profile
    ./run.sh compare score --studies studies.csv                 with intervals, from several studies of each

times.csv: first column `submission`, then one column per workload: seconds to the target, `inf` = missed, empty = not run.
studies.csv: columns submission, workload, study, seconds; a workload's time is the median over its studies.

Rules of AlgoPerf (Dahl et al. 2023, arXiv 2306.07179; Kasimbeg et al. 2025, arXiv 2502.15015; mlcommons/algorithmic-efficiency)
in this order, where not run counts as missed: a held-out variant is missed if its base is; a time above 4 x the best time of
its workload is missed; a base workload is missed if its variant is (rule of v0.5); r = time / best time left of the base
workload. A submission's profile is rho(tau) = the share of base workloads with r <= tau; its score is the mean of rho over tau
from 1 to 4, by the trapezoid rule on 100 points. Unlike theirs, this code is told a variant's base, and refuses a NaN.

A score depends on the field. So it comes with the ranks when any one submission is left out; with intervals by resampling
studies, for those that have several on every workload; and, with --reference, with a score that ignores the field: the mean
over workloads of how far log(reference time / time) lies on the way from -log(4) to log(4): 0.5 is the reference's own, 1 is
four times as fast or more.
"""

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.integrate import trapezoid

from engine.command import Answer, Parser
from engine.run_folder import intact
from engine.spec import UsageError, nearest
from lab import plots
from lab.markdown import table

POINTS = 100
TAU_MAX = 4.0  # the largest ratio to the best time that counts
HIGHLIGHTED = 6  # of the profiles in a picture, the best ones
Studies = dict[tuple[str, str], list[float]]  # (submission, workload) -> seconds of each study


class Times(NamedTuple):
    """seconds [submissions, workloads]; inf where missed or not run."""

    submissions: list[str]
    workloads: list[str]
    seconds: np.ndarray

    def without(self, submission: str) -> "Times":
        gone = self.submissions.index(submission)
        return Times([s for s in self.submissions if s != submission], self.workloads, np.delete(self.seconds, gone, 0))


def read_studies(path: Path) -> Studies:
    """Of a table of studies, or of times: one study each. Raises UsageError: no such table, or a cell that is no time."""
    try:
        with path.open(newline="") as file:
            head, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row] or [[""]]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is no CSV file: {error}") from None
    if head[0] != "submission":
        raise UsageError(f"{path}: the first column must be `submission`")
    studies, seen = defaultdict(list), set()
    by_study = head[1:] == ["workload", "study", "seconds"]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(head):
            raise UsageError(f"{path} line {number}: {len(row)} cells instead of {len(head)}")
        for submission, workload, study, cell in [row] if by_study else [(row[0], w, "", c) for w, c in zip(head[1:], row[1:])]:
            where, key = f"{path} line {number}: {submission!r} on {workload!r}", (submission, workload, study)
            if not submission or not workload or key in seen:
                raise UsageError(f"{where} comes twice" if key in seen else f"{where}: a name is missing")
            seen.add(key)
            try:
                seconds = float(cell or "inf")
            except ValueError:
                seconds = math.nan
            if not seconds > 0:
                raise UsageError(f"{where}: {cell!r} is no time: seconds must be above 0; inf is missed, nothing is not run")
            studies[submission, workload].append(seconds)
    return studies


def medians(studies: Studies) -> Times:
    """The medians over studies. Raises UsageError: fewer than two workloads, or no target met."""
    submissions, workloads = (list(dict.fromkeys(key[part] for key in studies)) for part in (0, 1))
    if len(workloads) < 2:
        raise UsageError(f"a profile needs at least two workloads, not {len(workloads)}")
    table = np.array([[statistics.median(studies.get((s, w), [math.inf])) for w in workloads] for s in submissions])
    if not np.isfinite(table).any():
        raise UsageError("no submission met any target: nothing to score")
    return Times(submissions, workloads, table)


def read_held_out(text: str, workloads: list[str]) -> dict[str, str]:
    """`variant=base,...` -> base workload of each variant. Raises UsageError: no such workload."""
    bases = {}
    for word in filter(None, map(str.strip, text.split(","))):
        variant, _, base = word.partition("=")
        if not base or variant == base:
            raise UsageError(f"--held-out takes variant=base, not {word!r}")
        for name in (variant, base):
            if name not in workloads:
                raise UsageError(f"--held-out {word}: no workload {name!r}: {nearest(name, workloads)}")
        bases[variant] = base
    return bases


def ratios(times: Times, held_out: dict[str, str]) -> tuple[list[str], np.ndarray]:
    """Base workloads, and r [submissions, base workloads]: time over the best time; inf where missed."""
    t, column = times.seconds.copy(), times.workloads.index
    pairs = [(column(variant), column(base)) for variant, base in held_out.items()]
    for variant, base in pairs:
        t[np.isinf(t[:, base]), variant] = np.inf
    t[t > TAU_MAX * t.min(0)] = np.inf
    for variant, base in pairs:
        t[np.isinf(t[:, variant]), base] = np.inf
    bases = [w for w in times.workloads if w not in held_out]
    t = t[:, [column(w) for w in bases]]
    with np.errstate(invalid="ignore"):
        return bases, np.where(np.isinf(t), np.inf, t / t.min(0))


def profile(r: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """rho [submissions, tau]: share of the workloads with r <= tau."""
    return (r[:, :, None] <= tau).mean(1)


def scores(times: Times, held_out: dict[str, str]) -> np.ndarray:
    """The AlgoPerf score of every submission."""
    tau = np.linspace(1, TAU_MAX, POINTS)
    return trapezoid(profile(ratios(times, held_out)[1], tau), tau, axis=1) / (TAU_MAX - 1)


def reference_scores(times: Times, held_out: dict[str, str], reference: str) -> np.ndarray:
    """Against one submission, on the workloads that it met. Raises UsageError: there is none, or it met none."""
    if reference not in times.submissions:
        raise UsageError(f"--reference {reference!r}: {nearest(reference, times.submissions)}")
    own = times.seconds[times.submissions.index(reference)]
    met = np.isfinite(own) & [w not in held_out for w in times.workloads]
    if not met.any():
        raise UsageError(f"--reference {reference}: it met no target")
    gain = np.log(own[met]) - np.log(times.seconds[:, met])
    return np.clip(0.5 + gain / (2 * math.log(TAU_MAX)), 0, 1).mean(1)


def ranks(values: np.ndarray) -> list[int]:
    """1 for the highest; equal values share the better rank."""
    return stats.rankdata(-values.round(12), method="min").astype(int).tolist()


def intervals(studies: Studies, held_out: dict[str, str], draws: int = 1000) -> np.ndarray:
    """95 % intervals [submissions, 2] of the score, by drawing studies with replacement."""
    dice, drawn = np.random.default_rng(0), []
    for _ in range(draws):  # sorted: the same whatever order the studies are given in
        again = {key: list(dice.choice(values, len(values))) for key, values in sorted(studies.items())}
        drawn.append(scores(medians({key: again[key] for key in studies}), held_out))
    return np.quantile(drawn, [0.025, 0.975], axis=0).T


def summary(studies: Studies, held_out: dict[str, str], reference: str = "") -> dict[str, Any]:
    """All of it, as JSON: a list of submissions, best score first. Raises UsageError: see medians and reference_scores."""
    times = medians(studies)
    value, (bases, r) = scores(times, held_out), ratios(times, held_out)
    ranked = {name: [rank] for name, rank in zip(times.submissions, ranks(value))}  # with all, then without each of the others
    for gone in times.submissions if len(ranked) > 2 else ():
        fewer = times.without(gone)
        for name, rank in zip(fewer.submissions, ranks(scores(fewer, held_out))):
            ranked[name].append(rank)
    against = reference_scores(times, held_out, reference) if reference else None
    # one study says nothing of luck
    repeated = {name: all(len(studies.get((name, w), ())) > 1 for w in times.workloads) for name in ranked}
    spread = intervals(studies, held_out) if any(repeated.values()) else None
    rows = []
    for i, (name, (rank, *without)) in enumerate(ranked.items()):
        row = {"submission": name, "score": float(value[i]), "rank": rank, "targets_met": int(np.isfinite(r[i]).sum())}
        row["ranks_when_one_is_left_out"] = [min(without, default=rank), max(without, default=rank)]
        row["ratios"] = {w: (None if math.isinf(x) else float(x)) for w, x in zip(bases, r[i])}
        row |= {"interval": spread[i].tolist()} if repeated[name] else {}
        row |= {"against_reference": float(against[i])} if reference else {}
        rows.append(row)
    rows.sort(key=lambda row: -row["score"])
    return {"workloads": bases, "held_out": held_out, "reference": reference, "submissions": rows}


def score_table(summary: dict[str, Any], digits: int = 3, aligned: bool = False) -> str:
    """The summary for people."""
    head = ["rank", "submission", "AlgoPerf score", "95 %, studies redrawn", "targets met", "rank if one is left out"]
    reference, rows = summary["reference"], []
    for row in summary["submissions"]:
        low, high = row["ranks_when_one_is_left_out"]
        cells = [str(row["rank"]), f"`{row['submission']}`", f"{row['score']:.{digits}f}"]
        cells.append("{:.3f} to {:.3f}".format(*row["interval"]) if "interval" in row else "-")
        cells += [f"{row['targets_met']} of {len(summary['workloads'])}", f"{low} to {high}" if low < high else str(low)]
        rows.append(cells + ([f"{row['against_reference']:.3f}"] if reference else []))
    return table([*head, f"against {reference}"] if reference else head, rows, aligned)


def draw(times: Times, held_out: dict[str, str]) -> Any:
    """A figure of the profiles."""
    tau = np.linspace(1, TAU_MAX, 600)
    rho, value = profile(ratios(times, held_out)[1], tau), scores(times, held_out)
    figure, axes = plots.pyplot().subplots(figsize=(9, 5), constrained_layout=True)
    order = np.argsort(-value, kind="stable")
    for i in order[:HIGHLIGHTED]:
        axes.step(tau, rho[i], where="post", label=f"{times.submissions[i]}  {value[i]:.3f}")
    if len(rest := order[HIGHLIGHTED:]):  # their names would be one on the other: the table has them
        first, *_ = axes.step(tau, rho[rest].T, where="post", color="0.75", linewidth=0.8, zorder=1)
        first.set_label(f"{len(rest)} more  {value[rest[0]]:.3f} - {value[rest[-1]]:.3f}")
    axes.set(xlabel="tau: time / best time of the field", xlim=(1, TAU_MAX))
    axes.set(ylabel="share of workloads within tau", ylim=(0, 1.02))
    axes.legend(title="submission, score", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def run(argv: list[str]) -> Answer:
    parser = Parser(prog="compare.py score", description=__doc__)
    about = "table of seconds to target, or of single studies, which gives intervals too"
    parser.add_argument("--times", "--studies", type=Path, required=True, help=about)
    parser.add_argument("--held-out", default="", help="variant=base,...: columns that are variants of a workload")
    parser.add_argument("--reference", default="", help="also score against this submission alone")
    parser.add_argument("--plot", type=Path, help="draw the profiles: PLOT.png")
    options = parser.parse_args(argv)
    with intact(options.times):
        studies = read_studies(options.times)
    times = medians(studies)
    held_out = read_held_out(options.held_out, times.workloads)
    result = summary(studies, held_out, options.reference)
    if options.plot:
        plots.save(draw(times, held_out), options.plot.parent, options.plot.name)
    return Answer(score_table(result, digits=4, aligned=True), result)
