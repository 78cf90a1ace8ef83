"""One page with everything kept: records, losses, the contest, scaling, the lecture's studies, the published history.

    ./run.sh page                        site/index.html, which needs no server and no network
    ./run.sh page --runs runs/tiny/*     with your own runs

Charts are Vega-Lite's, by Altair, with its JavaScript inside the page; other people's text (names, descriptions) is escaped.
"""

import base64
import csv
import functools
import html
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.command import Parser, command
from engine.run_folder import ROOT, atomic_write
from engine.spec import UsageError
from lab import runner
from lab.records import record as records
from lab.runs import see
from lab.tuning import score, tuned
from studies import __main__ as studies

RECORDS = ROOT / "records"
TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 60  # of a loss curve
FROM = 0.1  # part of a curve that is left out at its start, where the loss falls by nats
Rows = list[dict[str, Any]]


def altair() -> Any:
    """The library, imported when a page is made. Raises UsageError: it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("altair", "vl_convert")):
        raise UsageError("the page needs Altair: .venv/bin/pip install -e .[page]")
    import altair

    return altair


# ---------------------------------------------------------------- what is shown


def chain() -> Rows:
    """Every kept record: its time, and how its settings differ from the previous record's."""
    rows, before = [], {}
    for track in sorted(p.name for p in RECORDS.iterdir() if any(p.glob("*/record.json"))):
        for record in records.of_track(track):
            about = record.about
            s, key = about["statistics"], (track, about["category"])
            old = before.get(key, {})
            changed = [f"{k}={v}" for k, v in about["settings"].items() if old and old.get(k) != v]
            before[key] = about["settings"]
            ratio = about["against"] and f"{about['against']['ratio']:.3g} times as fast as {about['against']['record']}"
            row = dict(record=record.folder.name, track=track, category=about["category"], seconds=s["train_time"], n=s["n"])
            row |= dict(loss=s["mean"], steps=about["steps"], date=about["date"], recipe=about["recipe"], why=about["why"])
            rows.append(row | dict(against=ratio or "-", changed=", ".join(changed) or "-", machine=about["machine"]["cpu"]))
    return rows


def losses() -> Rows:
    """Training losses of the confirming runs of every comparison, the mean over seeds at each step."""
    rows = []
    for path in sorted(RECORDS.glob("comparisons/*/curves.csv")):
        lines = [line for line in runner.read_curves(path) if (line["phase"], line["kind"]) == ("confirm", "train")]
        length = {line["arm"]: line["steps"] for line in lines}  # of the last plan
        of: dict[tuple[str, int], Rows] = {}
        for line in lines:
            if line["steps"] == length[line["arm"]] and line["step"] >= FROM * line["steps"]:
                of.setdefault((line["arm"], line["step"]), []).append(line)
        for (arm, step), runs in of.items():
            tokens, seconds, loss = (float(np.mean([run[key] for run in runs])) for key in ("tokens", "train_time", "loss"))
            about = dict(comparison=path.parent.name, arm=arm, step=step, tokens=int(tokens))
            rows.append(about | dict(seconds=round(seconds, 2), loss=round(loss, 4)))
    return rows


def own(folders: Iterable[Path]) -> Rows:
    """Losses of run folders, finished or not. Raises UsageError: one holds no log."""
    rows = []
    for folder in folders:
        if not (folder / "log.jsonl").exists():
            raise UsageError(f"{folder} holds no log: name run folders, such as runs/tiny/*")
        kept = see(folder).losses
        every = max(1, len(kept) // POINTS)
        name = str(folder)
        rows += [dict(run=name, step=i + 1, loss=loss) for i, loss in enumerate(kept) if i % every == 0 and math.isfinite(loss)]
    return rows


@functools.cache
def contest() -> tuple[Rows, Rows, Rows]:
    """Scores, profiles and the trials behind them."""
    times = score.medians(score.read_studies(RECORDS / "tuning" / "studies.csv"))
    tau, (_, r) = np.linspace(1, score.TAU_MAX, 60), score.ratios(times, {})
    value, met = score.scores(times, {}), np.isfinite(r).sum(1)
    ranked = [
        dict(rank=rank, submission=name, score=f"{value[i]:.3f}", met=int(met[i]))
        for i, (name, rank) in enumerate(zip(times.submissions, score.ranks(value), strict=True))
    ]
    rho = score.profile(r, tau)
    profiles = [
        dict(submission=name, tau=round(float(t), 3), share=float(share))
        for name, of in zip(times.submissions, rho, strict=True)
        for t, share in zip(tau, of, strict=True)
    ]
    trials = [
        dict(workload=track, submission=name, lr=row.settings["lr"], loss=row.val_loss)
        for track, tables in tuned.read_tables(RECORDS / "tuning").items()
        for name, table in tables.items()
        for row in table.of("search")
        if "lr" in row.settings and math.isfinite(row.val_loss)
    ]
    return sorted(ranked, key=lambda row: row["rank"]), profiles, trials


def scaling() -> Rows:
    """Speed-ups at each size, with intervals."""
    rows = []
    for path in sorted(RECORDS.glob("scaling/*/scaling.json")):
        for trick in json.loads(path.read_text())["tricks"]:
            for size in trick["sizes"]:
                if "ratios" in size:
                    low, high = size["intervals"]["tokens"]
                    about = dict(experiment=path.parent.name, trick=trick["trick"], parameters=size["parameters"])
                    rows.append(about | dict(ratio=size["ratios"]["tokens"], low=low, high=high))
    return [row for row in rows if all(row[key] and math.isfinite(row[key]) for key in ("ratio", "low", "high"))]


def levers() -> Rows:
    """The lever board: difference to Muon with its interval."""
    path, rows = RECORDS / "levers" / "levers.json", []
    for workload, lines in (json.loads(path.read_text()) if path.exists() else {}).items():
        for line in lines:
            low, high = line["interval"]
            about = {key: line[key] for key in ("name", "verdict", "difference", "steps", "cost")}
            rows.append(about | dict(workload=workload, low=low, high=high))
    return rows


def published() -> Rows:
    with (RECORDS / "published" / "modded_records.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["record"].startswith("T1-") and r["train_time_s"]]
    return [
        dict(record=r["record"], date=r["date"], minutes=float(r["train_time_s"]) / 60, what=r["description"]) for r in rows
    ]


# ---------------------------------------------------------------- charts


def charts(folders: Sequence[Path]) -> dict[str, Any]:
    """Vega-Lite charts by the name of their place in the page."""
    alt = altair()
    drawn = {"chain": chain_chart(alt), "losses": curves(alt, losses()), "scaling": scaling_chart(alt)}
    drawn |= {"profiles": profile_chart(alt), "sensitivity": sensitivity_chart(alt), "published": published_chart(alt)}
    if rows := levers():
        drawn["levers"] = levers_chart(alt, rows)
    if folders:
        drawn["runs"] = runs_chart(alt, own(folders))
    return {name: chart.configure_legend(orient="bottom", columns=2, labelLimit=140) for name, chart in drawn.items()}


def wide(alt: Any, rows: Rows, what: str) -> Any:
    """An empty chart as wide as the page; what: its description for those who cannot see it."""
    return alt.Chart(alt.Data(values=rows), description=what, width="container", height=320)


def choice(alt: Any, name: str, options: Iterable[str], first: str = "") -> Any:
    """The reader's choice from a list."""
    options = sorted(set(options))
    return alt.param(value=first or options[0], bind=alt.binding_select(options=options, name=f"{name} "))


def chain_chart(alt: Any) -> Any:
    tips = [f"{key}:N" for key in ("record", "category", "recipe", "against", "changed", "why", "machine", "date")]
    return (
        wide(alt, chain(), "Training time of every kept record, seconds")
        .mark_point(filled=True, size=140)
        .encode(
            alt.X("record:N", sort=None, title=None, axis=alt.Axis(labelAngle=-30)),
            alt.Y("seconds:Q", scale=alt.Scale(type="log"), title="training time, s (log)"),
            alt.Color("category:N"),
            tooltip=[*tips, "seconds:Q", "steps:Q", "loss:Q", "n:Q"],
        )
    )


def profile_chart(alt: Any) -> Any:
    ranked, profiles, _ = contest()
    best = [row["submission"] for row in ranked]
    arm = alt.selection_point(fields=["submission"], bind="legend", value=[{"submission": name} for name in best[:6]])
    return (
        wide(alt, profiles, "Share of workloads within tau times the best time")
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            alt.X("tau:Q", title="time / best time of the field", scale=alt.Scale(domain=[1, score.TAU_MAX])),
            alt.Y("share:Q", title="share of workloads"),
            alt.Color("submission:N", sort=best, legend=alt.Legend(symbolLimit=40)),
            opacity=alt.condition(arm, alt.value(1.0), alt.value(0.08)),
            tooltip=["submission:N", "tau:Q", "share:Q"],
        )
        .add_params(arm)
    )


def sensitivity_chart(alt: Any) -> Any:
    ranked, _, trials = contest()
    where = choice(alt, "workload", (t["workload"] for t in trials))
    who = choice(alt, "optimizer", (t["submission"] for t in trials), ranked[0]["submission"])
    return (
        wide(alt, trials, "Final loss against learning rate of one optimizer's trials")
        .mark_point(filled=True, size=70)
        .transform_filter((alt.datum.workload == where) & (alt.datum.submission == who))
        .encode(
            alt.X("lr:Q", scale=alt.Scale(type="log"), title="learning rate (log)"),
            alt.Y("loss:Q", scale=alt.Scale(zero=False), title="final loss, nats"),
            tooltip=["submission:N", "lr:Q", "loss:Q"],
        )
        .add_params(where, who)
    )


def scaling_chart(alt: Any) -> Any:
    sizes = scaling()
    which = choice(alt, "experiment", (row["experiment"] for row in sizes))
    base = wide(alt, sizes, "Speed-up of each trick at each model size").transform_filter(alt.datum.experiment == which)
    x = alt.X("parameters:Q", scale=alt.Scale(type="log"), title="non-embedding parameters (log)")
    y = alt.Y("low:Q", title="speed-up in tokens (log)", scale=alt.Scale(type="log"))
    tips = ["trick:N", "parameters:Q", "ratio:Q", "low:Q", "high:Q"]
    spans = base.mark_rule().encode(x, y, alt.Y2("high:Q"), alt.Color("trick:N"))
    return (spans + base.mark_line(point=True).encode(x, y="ratio:Q", color="trick:N", tooltip=tips)).add_params(which)


def levers_chart(alt: Any, rows: Rows) -> Any:
    which = choice(alt, "workload", (row["workload"] for row in rows))
    base = wide(alt, rows, "Final loss minus Muon's, of each lever").transform_filter(alt.datum.workload == which)
    y = alt.Y("name:N", sort=alt.EncodingSortField("difference"), title=None)
    colour = alt.Color(
        "verdict:N", scale=alt.Scale(domain=["helps", "no difference", "hurts"], range=["#0072B2", "#999999", "#D55E00"])
    )
    spans = base.mark_rule().encode(
        alt.X("low:Q", title="final loss minus Muon's, nats: left is better"), alt.X2("high:Q"), y, colour
    )
    tips = ["name:N", "verdict:N", "difference:Q", "low:Q", "high:Q", "steps:Q", "cost:Q"]
    return (spans + base.mark_point(filled=True, size=70).encode(x="difference:Q", y=y, color=colour, tooltip=tips)).add_params(
        which
    )


def published_chart(alt: Any) -> Any:
    return (
        wide(alt, published(), "Published records of modded-nanogpt, minutes to 3.28 on 8 H100")
        .mark_point(filled=True, size=70)
        .encode(
            alt.X("date:T", title=None),
            alt.Y("minutes:Q", scale=alt.Scale(type="log"), title="minutes to 3.28 on 8 H100 (log)"),
            tooltip=["record:N", "date:T", "minutes:Q", "what:N"],
        )
    )


def runs_chart(alt: Any, rows: Rows) -> Any:
    run = alt.selection_point(fields=["run"], bind="legend")
    return (
        wide(alt, rows, "Training loss of your runs")
        .mark_line()
        .encode(
            alt.X("step:Q"),
            alt.Y("loss:Q", scale=alt.Scale(zero=False), title="training loss, nats"),
            alt.Color("run:N", legend=alt.Legend(columns=1, labelLimit=300)),
            opacity=alt.condition(run, alt.value(1.0), alt.value(0.1)),
            tooltip=["run:N", "step:Q", "loss:Q"],
        )
        .add_params(run)
    )


def curves(alt: Any, rows: Rows) -> Any:
    """Loss against the axis, for the comparison, that the reader chooses; a click in the legend picks arms."""
    which = choice(alt, "comparison", (row["comparison"] for row in rows))
    against = alt.param(value="seconds", bind=alt.binding_radio(options=["seconds", "step", "tokens"], name="against "))
    arm = alt.selection_point(fields=["arm"], bind="legend", toggle="true")
    return (
        wide(alt, rows, "Training loss of the arms of a comparison")
        .mark_line()
        .transform_filter(alt.datum.comparison == which)
        .transform_calculate(x=f"datum[{against.name}]")
        .encode(
            alt.X("x:Q", title="seconds, steps or tokens"),
            alt.Y("loss:Q", scale=alt.Scale(zero=False), title="training loss, nats"),
            alt.Color("arm:N", legend=alt.Legend(columns=1, labelLimit=300)),
            opacity=alt.condition(arm, alt.value(1.0), alt.value(0.1)),
            tooltip=["arm:N", "step:Q", "seconds:Q", "tokens:Q", "loss:Q"],
        )
        .add_params(which, against, arm)
    )


# ---------------------------------------------------------------- the page


def score_table() -> str:
    """The contest as a table whose columns sort."""
    head = ("rank", "optimizer", "AlgoPerf score", "targets met")
    rows = [row.values() for row in contest()[0]]
    heads = "".join(f'<th scope="col"><button type="button">{html.escape(h)}</button></th>' for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def studies_shown() -> str:
    """The lecture's studies in its order: claim, verdict, picture."""
    parts = []
    for name, about in studies.studies().items():
        result, picture = studies.RESULTS / f"{name}.json", studies.RESULTS / f"{name}.png"
        if result.exists() and picture.exists():
            found = json.loads(result.read_text())
            claim, verdict = html.escape(about["claim"]), html.escape(found["verdict"])
            image = base64.b64encode(picture.read_bytes()).decode()
            mark = "holds here" if found["holds"] else "does not hold here"
            caption = f"<figcaption><code>./run.sh study {name}</code> <strong>{mark}</strong>: {verdict}</figcaption>"
            shown = f'<img loading="lazy" alt="{claim}" src="data:image/png;base64,{image}">'
            parts.append(f"<article><h3>{claim}</h3><figure>{shown}{caption}</figure></article>")
    return "".join(parts) or "<p>None yet: <code>./run.sh study all</code></p>"


def page(folders: Sequence[Path]) -> str:
    """The HTML. Raises UsageError: Altair is missing, or a folder is no run."""
    drawn = {name: chart.to_dict() for name, chart in charts(folders).items()}
    import vl_convert

    specs = json.dumps(drawn).replace("<", "\\u003c")  # so that no name of a run can end the script
    text = TEMPLATE.read_text()
    filled = {"SCORES": score_table(), "STUDIES": studies_shown(), "SPECS": specs}
    board = '<section id="levers-board"><h2>Levers on Muon</h2><div class="chart" id="levers"></div></section>'
    filled |= {"LEVERS": board if "levers" in drawn else ""}
    filled |= {"RUNS": '<section><h2>Your runs</h2><div class="chart" id="runs"></div></section>' if folders else ""}
    filled |= {"VEGA": vl_convert.javascript_bundle()}
    for name, content in filled.items():
        text = text.replace(f"<!-- {name} -->", content, 1)
    return text


def run(argv: list[str]) -> str:
    flags = Parser(prog="page", description=__doc__)
    flags.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN", help="run folders to draw too")
    flags.add_argument("--out", type=Path, default=Path("site/index.html"), help="file to write (default: site/index.html)")
    options = flags.parse_args(argv)
    text = page(options.runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out, text)
    return f"wrote {options.out}, {len(text.encode()) / 1e6:.1f} MB: open it in a browser"


if __name__ == "__main__":
    sys.exit(command("page", lambda: run(sys.argv[1:]), sys.argv))
