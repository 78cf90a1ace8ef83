"""What the studies share: numbers, training by the project's own optimizers, a small GPT with its text, the look of pictures.

rounded(x)                      anything that json can store, five significant digits
mean_and_interval(values)       mean and its 95 % interval (Student)
train(model, spec, batches, steps)     losses of a run by an optimizer SPEC and a schedule SPEC of the project
tiny_gpt(), tokens(), batches() a small GPT, a corpus as one tensor, its batches;  of_run(folder): a trained run's
axes(), say()                   matplotlib axes for a slide, and a label that stands beside what it names
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import optimizers
from data import corpora
from data.shards import Dataset
from engine import schedules
from engine.spec import UsageError
from lab import plots
from lab.stats import Sample
from layers.shape import ModelConfig
from model import GPT
from sample import load_model

ROOT = Path(__file__).parent.parent
CORPORA = ROOT / "corpora"
Batches = Callable[[int], tuple[Tensor, ...]]  # step -> what `loss` takes after the model

# ---------------------------------------------------------------- numbers


def rounded(x: Any, digits: int = 5) -> Any:
    """Tensors, arrays, lists and dicts as json stores them, numbers to `digits` digits; nan and infinity are None."""
    if isinstance(x, dict):
        return {str(key): rounded(value, digits) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value, digits) for value in x]
    if isinstance(x, (Tensor, np.ndarray, np.generic)):
        return rounded(x.tolist(), digits)
    if isinstance(x, float):
        return float(f"{x:.{digits}g}") if math.isfinite(x) else None
    return x


def mean_and_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval. Raises ValueError: fewer than two values."""
    x = Sample.of(list(values))
    if x.n < 2:
        raise ValueError("an interval needs at least two values")
    return (x.mean, *x.interval())


def progress(steps: Iterable, what: str = "") -> Iterable:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(steps, desc=what, leave=False, disable=None)


# ---------------------------------------------------------------- training


def of_model(model: nn.Module, *batch: Tensor) -> Tensor:
    """The loss of a model that returns it, as GPT does of (tokens, targets)."""
    return model(*batch)


def train(
    model: nn.Module, spec: str, batches: Batches, steps: int, *, loss: Callable[..., Tensor] = of_model,
    schedule: str = "linear", after: Callable[[int], None] | None = None, what: str = "",
) -> list[float]:  # fmt: skip
    """Train in place; the loss before each of the steps. spec, schedule: SPECs of the project; methods that bring their own
    schedule stay at a constant rate. after(step): called after each, at evaluation weights. Stops at a loss that is not finite,
    which fills the rest."""
    optimizer = optimizers.build(spec, model, steps=steps)
    rate = schedules.build("constant" if optimizers.find(spec).own_schedule else schedule, steps)
    losses: list[float] = []
    for step in progress(range(steps), what or spec):
        optimizer.train()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(step)
        value = loss(model, *batches(step))
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            return losses + [math.inf] * (steps - len(losses))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if after:
            optimizer.eval()
            after(step)
    optimizer.eval()
    return losses


def tuned(spec: str, rates: Sequence[float], final: Callable[[str], float]) -> tuple[str, dict[str, float]]:
    """The SPEC, which has `{}` for the learning rate, with the rate of the smallest final loss; and the losses of all. A single
    rate is not tried."""
    if len(rates) == 1:
        return spec.format(f"{rates[0]:g}"), {}
    losses = {f"{rate:g}": final(spec.format(f"{rate:g}")) for rate in rates}
    finite = {rate: loss if math.isfinite(loss) else math.inf for rate, loss in losses.items()}
    return spec.format(min(finite, key=finite.__getitem__)), losses


# ---------------------------------------------------------------- a small GPT and its text


def tiny_gpt(vocabulary: int = 256, length: int = 64, layers: int = 2, width: int = 64, seed: int = 0, **fields: Any) -> GPT:
    """The project's GPT, small: about 0.12M parameters. fields: of ModelConfig."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT(ModelConfig(vocabulary, length, layers, fields.pop("heads", 4), width, **fields))


def tokens(corpus: str = "sotu-bytes", split: str = "train") -> Tensor:
    """[n] int64: a corpus of the data module, prepared at first use. Or this project's pages and code, which need no network:
    `repository`, their bytes; `words`, numbers of their words and signs."""
    if corpus in ("repository", "words"):
        places = ("*.md", "docs/*.md", "*.py", "optimizers/*.py", "engine/*.py")
        text = "".join(file.read_text() for place in places for file in sorted(ROOT.glob(place)))
        if corpus == "repository":
            return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        found = re.findall(r"\w+|[^\w\s]", text)
        number = {word: i for i, word in enumerate(dict.fromkeys(found))}
        return torch.tensor([number[word] for word in found])
    name, _, tokenizer = corpus.rpartition("-")
    return whole(Dataset(corpora.prepare(name, tokenizer, CORPORA), split))


def by_frequency(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens numbered anew, 0 the most frequent, and how often each comes: [n] and [vocabulary], int64."""
    _, numbers, counts = tokens.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return order.argsort()[numbers], counts[order]


def whole(dataset: Dataset) -> Tensor:
    return torch.from_numpy(dataset.window(0, len(dataset)).astype(np.int64))


def batches(of: Tensor, length: int, size: int, seed: int = 0) -> Batches:
    """step -> inputs and targets [size, length], at random places: a pure function of seed and step."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = of[torch.randint(len(of) - length, (size, 1), generator=dice) + torch.arange(length + 1)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return batch


def of_run(folder: Path, split: str = "val") -> tuple[GPT, Tensor]:
    """The trained model of a run folder, and its corpus as `tokens`. Raises UsageError: no run, or no corpus."""
    gpt, config = load_model(folder)
    place = CORPORA / f"{config['corpus']}-{config['tokenizer']}"
    if not place.is_dir():
        raise UsageError(f"{folder} was trained on {place.name}, which is not here: ./run.sh data prepare {config['corpus']}")
    return gpt, whole(Dataset(place, split))


# ---------------------------------------------------------------- pictures

# Okabe and Ito 2008: eight colours that colour-blind people can tell apart
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
GREY = "0.55"
STYLE = {
    "font.size": 15, "axes.titlesize": 18, "axes.labelsize": 16, "lines.linewidth": 2.4, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlepad": 14, "figure.dpi": 100, "savefig.dpi": 100,
}  # fmt: skip


def axes(columns: int = 1, rows: int = 1, width: float = 10, height: float = 5.6, **options: Any):
    """(figure, axes) of a slide's size in inches, with its large letters. options: of pyplot.subplots."""
    pyplot = plots.pyplot()
    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(rows, columns, figsize=(width, height), constrained_layout=True, **options)


def say(axis, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    """Words in the colour of what they name, to the right of the point (x, y) of the data: instead of a legend."""
    where = dict(xytext=(6, 0), textcoords="offset points", va="center", annotation_clip=False)
    axis.annotate(text, (x, y), color=colour, **(where | options))


def ends(axis, labels: Sequence[tuple[float, float, str, str]], gap: float = 22) -> None:
    """`say` for several (x, y, text, colour), moved apart to `gap` points at least; when the limits of the axis are set."""
    placed, height = -math.inf, {}
    for x, y, text, _ in sorted(labels, key=lambda label: label[1]):
        here = axis.transData.transform((x, y))[1] * 72 / axis.figure.dpi
        placed = max(here, placed + gap)
        height[text] = placed - here
    for x, y, text, colour in labels:
        say(axis, x, y, text, colour, xytext=(6, height[text]))


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Means over `window` neighbours: [n - window + 1]."""
    return np.convolve(np.asarray(values, dtype=float), np.ones(window) / window, mode="valid")


def gif(path: Path, frames: Iterable[Any], milliseconds: int = 80) -> None:
    """matplotlib figures as one GIF, with 64 colours, so that it stays small."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.pyplot import close
    from PIL import Image

    pictures = []
    for figure in frames:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64, dither=Image.Dither.NONE))
        close(figure)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=True)
