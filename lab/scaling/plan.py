"""What a scaling experiment would cost, before it is run: the cost model's predictions of all runs, added up."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cost import Prediction, TooLittleMemory, predict
from engine.spec import UsageError
from lab.markdown import table
from lab.scaling.ladder import Rung, size_words
from lab.trials import Arm
from layers.shape import flops_per_token

HEAD = (
    "size", "non-embedding", "layers x width", "batch", "tokens at budget 1", "runs", "tokens of all", "FLOPs",
    "memory a rank", "micro-batch", "hours",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """All runs of one arm at one size."""

    arm: Arm
    rung: Rung
    runs: int
    steps: int  # of all runs together

    def totals(self, of: Prediction) -> Counter[str]:
        """Runs, tokens, FLOPs and hours. A validation takes the forward third of a training pass."""
        tokens = self.steps * self.rung.batch_tokens
        validated = self.runs * of.config.val_tokens / 3
        hours = of.seconds * (tokens + validated) / self.rung.batch_tokens / 3600
        return Counter(runs=self.runs, tokens=tokens, flops=tokens * flops_per_token(of.model_config), hours=hours)


def predicted(work: Work, machine: Sequence[str]) -> Prediction:
    """One run of that work, with the trainer's own micro-batch or the largest that fits. Raises UsageError: none fits."""
    flags = [*machine, *work.arm.flags]
    try:
        return predict(flags)
    except TooLittleMemory as error:
        if error.fits is None:
            raise UsageError(f"{work.arm.name}: {error}; add -- --checkpoint-activations, or leave that size out") from None
        return predict([*flags, "--micro-batch-tokens", str(error.fits)])


def plan(work: Sequence[Work], machine: Sequence[str]) -> str:
    """The plan in words: a row for each size, and the sums. machine: flags of the cost model. Raises as `predict`."""
    rows, total = [], Counter()
    for rung in dict.fromkeys(w.rung for w in work):
        predictions = [(w, predicted(w, machine)) for w in work if w.rung == rung]
        most = max((p for _, p in predictions), key=lambda p: p.step.memory.total)
        micro_batch = rung.batch_tokens // (most.ranks * most.step.micro_batches)
        sums = sum((w.totals(p) for w, p in predictions), Counter())
        total += sums
        rows.append(
            (
                rung.size.name, size_words(rung.parameters), f"{rung.size.layers} x {rung.size.width}",
                f"{rung.batch_tokens:,}", size_words(rung.tokens), f"{sums['runs']:,}", size_words(sums["tokens"]),
                f"{sums['flops']:.2g}", f"{most.step.memory.total / 1e9:.2f} GB", f"{micro_batch:,}", f"{sums['hours']:.2f}",
            )
        )  # fmt: skip
    cost = total["hours"] * most.ranks * most.price
    return "\n".join(
        [
            table(HEAD, rows),
            "",
            f"{total['runs']:,} runs, {size_words(total['tokens'])} tokens, {total['flops']:.2g} FLOPs, {total['hours']:.1f} "
            f"hours{f', {cost:,.0f} $' if cost else ''} on {most.ranks} x {most.where.name}, one run at a time. "
            "Starting processes is not counted. Memory: of the arm that takes most.",
        ]
    )
