"""What a scaling experiment would cost, before it is run: the cost model's predictions of all runs, added up."""

import sys
from collections import Counter
from collections.abc import Sequence

from tqdm import tqdm

from cost.predict import Prediction, TooLittleMemory, predict
from engine.command import Answer
from engine.spec import UsageError
from lab.markdown import table
from lab.scaling.ladder import Cell, size_words
from lab.trials import Arm
from layers.shape import flops_per_token

HEAD = ["size", "non-embedding", "layers x width", "batch", "tokens at budget 1", "runs", "tokens of all", "FLOPs"]
HEAD += ["memory a rank", "micro-batch", "hours"]


def predicted(arm: Arm, machine: Sequence[str]) -> Prediction:
    """One run of the arm, with the trainer's own micro-batch or the largest that fits. Raises UsageError: none fits."""
    try:
        return predict([*machine, *arm.flags])
    except TooLittleMemory as error:
        if error.fits is None:
            raise UsageError(f"{arm.name}: {error}; add -- --checkpoint-activations, or leave that size out") from None
        return predict([*machine, *arm.flags, "--micro-batch-tokens", str(error.fits)])


def plan(planned: Sequence[tuple[Cell, int]], machine: Sequence[str]) -> Answer:
    """Of cells with their numbers of runs; machine: flags of the cost model. Raises as `predict`."""
    arms = {(cell.rung, cell.name): cell.arm for cell, _ in planned}
    bar = tqdm(arms.items(), desc="predicting", unit="arm", disable=not sys.stderr.isatty())
    predictions = {key: predicted(arm, machine) for key, arm in bar}
    rows, total = [], Counter()
    for rung in dict.fromkeys(rung for rung, _ in arms):
        sums, batch = Counter(), rung.batch_tokens
        for cell, runs in planned:
            if cell.rung == rung:
                of, tokens = predictions[rung, cell.name], runs * cell.steps * batch
                steps = (tokens + runs * of.config.val_tokens / 3) / batch  # a validation: the forward third of a pass
                flops = tokens * flops_per_token(of.model_config)
                sums += Counter(runs=runs, tokens=tokens, flops=flops, hours=of.seconds * steps / 3600)
        total += sums
        most = max((p for (at, _), p in predictions.items() if at == rung), key=lambda p: p.step.memory.total)
        row = [rung.size.name, size_words(rung.parameters), f"{rung.size.layers} x {rung.size.width}", f"{batch:,}"]
        row += [size_words(rung.tokens), f"{sums['runs']:,}", size_words(sums["tokens"]), f"{sums['flops']:.2g}"]
        row += [f"{most.step.memory.total / 1e9:.2f} GB", f"{batch // (most.ranks * most.step.micro_batches):,}"]
        rows.append([*row, f"{sums['hours']:.2f}"])
    cost = total["hours"] * most.ranks * most.price
    work = f"{total['runs']:,} runs, {size_words(total['tokens'])} tokens, {total['flops']:.2g} FLOPs"
    price = f"{total['hours']:.1f} hours{f', {cost:,.0f} $' if cost else ''} on {most.ranks} x {most.where.name}"
    left_out = "Starting processes is not counted. Memory: of the arm that takes most."
    return Answer(f"{table(HEAD, rows)}\n\n{work}, {price}, one run at a time. {left_out}", [dict(zip(HEAD, r)) for r in rows])
