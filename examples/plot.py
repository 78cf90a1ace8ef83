"""Draw loss against training time of finished or running runs: a log is one JSON event a line.

.venv/bin/python examples/plot.py runs/tiny/*          writes loss.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

for folder in map(Path, sys.argv[1:]):
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    train, val = ([e for e in events if e["event"] == kind] for kind in ("train", "val"))
    label = f"{folder.name}: {json.loads((folder / 'config.json').read_text())['optimizer']}"
    (line,) = pyplot.plot([e["train_time"] for e in train], [e["loss"] for e in train], linewidth=0.7, label=label)
    pyplot.plot([e["train_time"] for e in val], [e["loss"] for e in val], "o", color=line.get_color())
pyplot.xlabel("training time, s")
pyplot.ylabel("loss, nats per token (dots: validation)")
pyplot.legend(fontsize=7)
pyplot.savefig("loss.png", dpi=150)
print("wrote loss.png")
