"""One page with everything kept: records, losses, the contest, scaling, the lecture's studies, the published history.

    ./run.sh page                        site/index.html, which needs no server and no network
    ./run.sh page --runs runs/tiny/*     with your own runs

Charts are Vega-Lite's, by Altair, with its JavaScript inside the page; other people's text (names, descriptions) is escaped.
"""

import base64
import csv
import functools
import html
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import altair as alt
    import vl_convert
except ImportError:
    alt = None

from engine.command import Parser, command
from engine.run_folder import ROOT, atomic_write, read_json
from engine.spec import UsageError
from lab import runner
from lab.runs import see
from lab.tuning import score, tuned
from studies import __main__ as studies

RECORDS = ROOT / "records"
TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 60  # of a loss curve
FROM = 0.1  # part of a curve that is left out at its start, where the loss falls by nats
Rows = list[dict[str, Any]]


# ---------------------------------------------------------------- charts


def charts(folders: Sequence[Path]) -> dict[str, Any]:
    """Vega-Lite charts by the name of their place in the page."""
    drawn = {"chain": chain(), "losses": losses(), "profiles": profiles(), "sensitivity": sensitivity()}
    drawn |= {"levers": levers(), "scaling": scaling(), "published": published()} | ({"runs": own(folders)} if folders else {})
    return {name: chart.configure_legend(orient="bottom", columns=2, labelLimit=140) for name, chart in drawn.items()}


def wide(rows: Rows, what: str) -> Any:
    """An empty chart as wide as the page; what: its description for those who cannot see it."""
    return alt.Chart(alt.Data(values=rows), description=what, width="container", height=320)


def chosen(chart: Any, rows: Rows, key: str, first: str = "") -> Any:
    """The chart with those of its rows whose value of a column the reader chooses; at the start `first`."""
    options = sorted({row[key] for row in rows})
    which = alt.param(value=first or options[0], bind=alt.binding_select(options=options, name=f"{key} "))
    return chart.transform_filter(alt.datum[key] == which).add_params(which)


def by_legend(field: str, faint: float = 0.1, **how: Any) -> tuple[Any, Any]:
    """What clicks in the legend pick, and the opacity that it leaves to the others."""
    picked = alt.selection_point(fields=[field], bind="legend", **how)
    return picked, alt.condition(picked, alt.value(1.0), alt.value(faint))


def curves(rows: Rows, name: str, what: str, tips: Sequence[str]) -> Any:
    """Training loss in lines by `name`, against nothing yet; a click in the legend picks lines."""
    picked, opacity = by_legend(name)
    y = alt.Y("loss:Q").scale(zero=False).title("training loss, nats")
    colour = alt.Color(f"{name}:N").legend(columns=1, labelLimit=300)
    lines = wide(rows, what).mark_line().add_params(picked)
    return lines.encode(y, colour, opacity=opacity, tooltip=[f"{name}:N", *tips, "loss:Q"])


def chain() -> Any:
    """Every kept record: its time, and how its settings differ from the previous record's."""
    rows, before = [], {}
    for path in sorted(RECORDS.glob("*/*/record.json")):
        about = read_json(path)
        s, against, key = about["statistics"], about["against"], (path.parts[-3], about["category"])
        old = before.get(key, {})
        changed = [f"{k}={v}" for k, v in about["settings"].items() if old and old.get(k) != v]
        before[key] = about["settings"]
        row = {word: about[word] for word in ("category", "steps", "date", "recipe", "why")}
        row |= dict(record=path.parent.name, seconds=s["train_time"], loss=s["mean"], n=s["n"], machine=about["machine"]["cpu"])
        ratio = f"{against['ratio']:.3g} times as fast as {against['record']}" if against else "-"
        rows.append(row | dict(against=ratio, changed=", ".join(changed) or "-"))
    points = wide(rows, "Training time of every kept record, seconds").mark_point(filled=True, size=140)
    x = alt.X("record:N", sort=None).title(None).axis(labelAngle=-30)
    y = alt.Y("seconds:Q").scale(type="log").title("training time, s (log)")
    tips = [f"{key}:N" for key in ("record", "category", "recipe", "against", "changed", "why", "machine", "date")]
    return points.encode(x, y, alt.Color("category:N"), tooltip=[*tips, "seconds:Q", "steps:Q", "loss:Q", "n:Q"])


def losses() -> Any:
    """Losses of the confirming runs of a comparison, the mean over seeds, against the axis that the reader chooses."""
    rows = []
    for path in sorted(RECORDS.glob("comparisons/*/curves.csv")):
        lines = [line for line in runner.read_curves(path) if (line["phase"], line["kind"]) == ("confirm", "train")]
        length = {line["arm"]: line["steps"] for line in lines}  # of the last plan
        points = defaultdict(list)
        for line in lines:
            if line["steps"] == length[line["arm"]] and line["step"] >= FROM * line["steps"]:
                points[line["arm"], line["step"]].append([line["tokens"], line["train_time"], line["loss"]])
        for (arm, step), runs in points.items():
            tokens, seconds, loss = np.mean(runs, axis=0).tolist()
            about = dict(comparison=path.parent.name, arm=arm, step=step)
            rows.append(about | dict(tokens=int(tokens), seconds=round(seconds, 2), loss=round(loss, 4)))
    against = alt.param(value="seconds", bind=alt.binding_radio(options=["seconds", "step", "tokens"], name="against "))
    lines = curves(rows, "arm", "Training loss of the arms of a comparison", ["step:Q", "seconds:Q", "tokens:Q"])
    lines = chosen(lines, rows, "comparison").transform_calculate(x=f"datum[{against.name}]")
    return lines.add_params(against).encode(alt.X("x:Q").title("seconds, steps or tokens"))


def own(folders: Sequence[Path]) -> Any:
    """Losses of run folders, finished or not. Raises UsageError: one holds no log."""
    rows = []
    for folder in folders:
        if not (folder / "log.jsonl").is_file():
            raise UsageError(f"{folder} holds no log: name run folders, such as runs/tiny/*")
        kept = see(folder).losses
        points = list(enumerate(kept, start=1))[:: max(1, len(kept) // POINTS)]
        rows += [dict(run=str(folder), step=step, loss=loss) for step, loss in points if math.isfinite(loss)]
    return curves(rows, "run", "Training loss of your runs", ["step:Q"]).encode(alt.X("step:Q"))


@functools.cache
def contest() -> tuple[Rows, Rows]:
    """Scores, the best first, and profiles."""
    times = score.medians(score.read_studies(RECORDS / "tuning" / "studies.csv"))
    tau, (_, ratios) = np.linspace(1, score.TAU_MAX, 60), score.ratios(times, {})
    values, shares = score.scores(times, {}), score.profile(ratios, tau).tolist()
    met = np.isfinite(ratios).sum(1).tolist()
    ranked, lines = [], []
    for i, (name, rank) in enumerate(zip(times.submissions, score.ranks(values))):
        ranked.append(dict(rank=rank, submission=name, score=f"{values[i]:.3f}", met=met[i]))
        lines += [dict(submission=name, tau=at, share=share) for at, share in zip(tau.round(3).tolist(), shares[i])]
    return sorted(ranked, key=lambda row: row["rank"]), lines


def profiles() -> Any:
    ranked, rows = contest()
    best = [row["submission"] for row in ranked]
    picked, opacity = by_legend("submission", 0.08, value=[{"submission": name} for name in best[:6]])
    lines = wide(rows, "Share of workloads within tau times the best time").add_params(picked)
    x = alt.X("tau:Q").scale(domain=[1, score.TAU_MAX]).title("time / best time of the field")
    y = alt.Y("share:Q").title("share of workloads")
    colour = alt.Color("submission:N", sort=best).legend(symbolLimit=40)
    tips = ["submission:N", "tau:Q", "share:Q"]
    return lines.mark_line(interpolate="step-after", strokeWidth=2).encode(x, y, colour, opacity=opacity, tooltip=tips)


def sensitivity() -> Any:
    """Of the contest's searches: learning rate and final loss."""
    rows = [
        dict(workload=track, submission=name, lr=row.settings["lr"], loss=row.val_loss)
        for track, tables in tuned.read_tables(RECORDS / "tuning").items()
        for name, table in tables.items()
        for row in table.of("search")
        if "lr" in row.settings and math.isfinite(row.val_loss)
    ]
    points = wide(rows, "Final loss against learning rate of one optimizer's trials").mark_point(filled=True, size=70)
    points = chosen(chosen(points, rows, "workload"), rows, "submission", contest()[0][0]["submission"])
    x = alt.X("lr:Q").scale(type="log").title("learning rate (log)")
    y = alt.Y("loss:Q").scale(zero=False).title("final loss, nats")
    return points.encode(x, y, tooltip=["submission:N", "lr:Q", "loss:Q"])


def levers() -> Any:
    """The lever board: difference to Muon with its interval."""
    rows = [
        line | dict(workload=workload, low=line["interval"][0], high=line["interval"][1])
        for workload, lines in read_json(RECORDS / "levers" / "levers.json").items()
        for line in lines
    ]
    x = alt.X("low:Q").title("final loss minus Muon's, nats: left is better")
    y = alt.Y("name:N", sort=alt.EncodingSortField("difference")).title(None)
    colours = {"helps": "#0072B2", "no difference": "#999999", "hurts": "#D55E00"}
    colour = alt.Color("verdict:N").scale(domain=list(colours), range=list(colours.values()))
    base = wide(rows, "Final loss minus Muon's, of each lever").encode(y, colour)
    tips = ["name:N", "verdict:N", "difference:Q", "low:Q", "high:Q", "steps:Q", "cost:Q"]
    points = base.mark_point(filled=True, size=70).encode(x="difference:Q", tooltip=tips)
    return chosen(base.mark_rule().encode(x, alt.X2("high:Q")) + points, rows, "workload")


def scaling() -> Any:
    """Speed-ups at each size, with intervals."""
    rows = []
    for path in sorted(RECORDS.glob("scaling/*/scaling.json")):
        for trick in read_json(path)["tricks"]:
            for size in (size for size in trick["sizes"] if "ratios" in size):
                values = [size["ratios"]["tokens"], *size["intervals"]["tokens"]]
                if all(value and math.isfinite(value) for value in values):
                    about = dict(experiment=path.parent.name, trick=trick["trick"], parameters=size["parameters"])
                    rows.append(about | dict(zip(("ratio", "low", "high"), values, strict=True)))
    x = alt.X("parameters:Q").scale(type="log").title("non-embedding parameters (log)")
    y = alt.Y("low:Q").scale(type="log").title("speed-up in tokens (log)")
    base = wide(rows, "Speed-up of each trick at each model size").encode(x, alt.Color("trick:N"))
    tips = ["trick:N", "parameters:Q", "ratio:Q", "low:Q", "high:Q"]
    lines = base.mark_line(point=True).encode(y="ratio:Q", tooltip=tips)
    return chosen(base.mark_rule().encode(y, alt.Y2("high:Q")) + lines, rows, "experiment")


def published() -> Any:
    """The history of modded-nanogpt."""
    with (RECORDS / "published" / "modded_records.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["record"].startswith("T1-") and r["train_time_s"]]
    rows = [row | {"minutes": float(row["train_time_s"]) / 60} for row in rows]
    what = "minutes to 3.28 on 8 H100"
    points = wide(rows, f"Published records of modded-nanogpt, {what}").mark_point(filled=True, size=70)
    y = alt.Y("minutes:Q").scale(type="log").title(f"{what} (log)")
    return points.encode(alt.X("date:T").title(None), y, tooltip=["record:N", "date:T", "minutes:Q", "description:N"])


# ---------------------------------------------------------------- the page


def score_table() -> str:
    """The contest as a table whose columns sort."""
    head = ("rank", "optimizer", "AlgoPerf score", "targets met")
    heads = "".join(f'<th scope="col"><button type="button">{h}</button></th>' for h in head)
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row.values()) for row in contest()[0])
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def studies_shown() -> str:
    """The lecture's studies in its order: claim, verdict, picture."""
    parts = []
    for name, about in studies.studies().items():
        result, picture = studies.RESULTS / f"{name}.json", studies.RESULTS / f"{name}.png"
        if result.exists():
            found = read_json(result)
            claim, verdict = html.escape(about["claim"]), html.escape(found["verdict"])
            image = base64.b64encode(picture.read_bytes()).decode()
            mark = "holds here" if found["holds"] else "does not hold here"
            caption = f"<figcaption><code>./run.sh study {name}</code> <strong>{mark}</strong>: {verdict}</figcaption>"
            shown = f'<img loading="lazy" alt="{claim}" src="data:image/png;base64,{image}">'
            parts.append(f"<article><h3>{claim}</h3><figure>{shown}{caption}</figure></article>")
    return "".join(parts)


def page(folders: Sequence[Path]) -> str:
    """The HTML. Raises UsageError: Altair is missing, or a folder is no run."""
    if alt is None:
        raise UsageError("the page needs Altair: .venv/bin/pip install -e .[page]")
    drawn = {name: chart.to_dict() for name, chart in charts(folders).items()}
    parts = {
        "SCORES": score_table(),
        "STUDIES": studies_shown(),
        "SPECS": json.dumps(drawn).replace("<", "\\u003c"),  # so that no name of a run can end the script
        "RUNS": '<section><h2>Your runs</h2><div class="chart" id="runs"></div></section>' if folders else "",
        "VEGA": vl_convert.javascript_bundle(),
    }
    text = TEMPLATE.read_text()
    for name, content in parts.items():
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
