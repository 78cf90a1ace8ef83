"""The cost model on this machine's CPU: predicted against measured step time of our own runs at five sizes.

    python -m benchmarks.cost        two minutes of CPU time; writes benchmarks/cost.json, the source of the README's table

On one thread, in CPU seconds, which do not count the time that other processes have the core. Each step is timed
right after the rates that predict it, so that both see the same neighbours in caches and on the core's other thread; the
spread over rounds says how much these matter.
"""

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time

import torch
from tqdm import tqdm

import train_gpt
from cost import FITTED, Here, record_step, step_time
from cost.fit import RESULTS, stored
from engine import hardware

# layers, width, heads, sequence length
SIZES = ((2, 64, 2, 128), (2, 128, 2, 256), (4, 192, 4, 256), (4, 256, 4, 256), (6, 384, 6, 256))
ROUNDS = 7
FLAGS = ["--track", "cpu", "--tricks", "modern,muon", "--batch-tokens", "2048", "--micro-batch-tokens", "2048"]


def step_seconds(training: train_gpt.Training) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    training.step()
    return time.process_time() - start


def main() -> None:
    predicted: dict[tuple, list[float]] = {size: [] for size in SIZES}
    measured: dict[tuple, list[float]] = {size: [] for size in SIZES}
    trainings, recorded = {}, {}
    constants = dataclasses.replace(FITTED, overhead=0.0)
    torch.set_num_threads(1)
    here = Here(time.process_time)
    with contextlib.ExitStack() as stack:
        for size in SIZES:
            layers, width, heads, length = map(str, size)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            words = [*FLAGS, "--layers", layers, "--width", width, "--heads", heads, "--sequence-length", length]
            config, model_config, recipe = train_gpt.resolve([*words, "--out", folder + "/run"])
            trainings[size] = train_gpt.Training(config, model_config, recipe, train_gpt.World("cpu"))
            stack.callback(trainings[size].close)
            sequences, micro = trainings[size].sequences, trainings[size].micro
            recorded[size] = record_step(
                model_config, config.optimizer, sequences, micro, 1, trainings[size].dtype, config.compile, device="cpu"
            )
            trainings[size].step()  # makes the optimizer's state
        for _ in tqdm(range(ROUNDS), "rounds", disable=None):
            for size in SIZES:
                here.measure()
                predicted[size].append(sum(step_time(recorded[size], here.seconds, constants=constants).values()))
                measured[size].append(step_seconds(trainings[size]))
    rows = []
    for size in SIZES:
        ratios = sorted(p / m for p, m in zip(predicted[size], measured[size], strict=True))
        row = dict(
            zip(("layers", "width", "heads", "sequence_length"), size, strict=True),
            predicted=statistics.median(predicted[size]), measured=statistics.median(measured[size]),
            ratio=statistics.median(ratios), smallest=ratios[0], largest=ratios[-1],
            spread=max(measured[size]) / min(measured[size]),
        )  # fmt: skip
        rows.append(row)
        print(f"{size}: {row}")
    about = dict(machine=hardware.processor_name(), threads=torch.get_num_threads(), rounds=ROUNDS, sizes=rows)
    RESULTS.write_text(json.dumps(stored() | {"cpu": about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
