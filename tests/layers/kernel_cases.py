"""The cases in which every Triton kernel must agree with its reference: ragged shapes, and on a GPU those of GPT-2 124M."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layers import kernels
from optimizers.matrix import orthogonalize

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FORMS = ((0.0, "rational"), (15.0, "rational"), (30.0, "tanh"), (23.0, "sigmoid"))  # cap, form; cap 0: none
TOKENS, WIDTH, HIDDEN, VOCABULARY, COLUMNS = 65536, 768, 3072, 50257, 50304  # GPT-2 124M, 64 sequences of 1,024 tokens
LOSS_ROWS = 4096  # of logits at once: the reference keeps several fp32 copies of them
FP8_SCALES = (4 / 448, 0.5 / 448)  # of activations and weights that are at most 4 and 0.5


@dataclass(frozen=True)
class Drawn:
    """A computation with its inputs drawn: calling it gives the results and, one for each of `inputs`, the gradients.

    names: of what it gives.
    """

    names: tuple[str, ...]
    forward: Callable[[], tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...] = ()
    upstream: Tensor | None = None  # of the first result

    def __call__(self) -> tuple[Tensor, ...]:
        results = self.forward()
        if not self.inputs:
            return results
        return (*results, *torch.autograd.grad(results[0], self.inputs, self.upstream))


@dataclass(frozen=True)
class Case:
    """`draw(device)` in either form of the kernels must give the same, up to an `error` that is `allowed`."""

    kernel: str
    what: str  # shape and options
    dtype: torch.dtype
    draw: Callable[[torch.device], Drawn]
    tolerance: float | None = None  # where it is not that of a result's dtype
    fp8: bool = False  # needs a card with 8-bit floats

    def allowed(self, result: Tensor) -> float:
        return TOLERANCE[result.dtype] if self.tolerance is None else self.tolerance

    def __str__(self) -> str:
        return f"{self.kernel}, {self.what}, {str(self.dtype)[6:]}"


def error(found: Tensor, wanted: Tensor) -> float:
    """How far they are apart, relative to the larger of 1 and the largest number wanted, and relative by norm: the larger of
    both. Not a number where either has one.

    Raises:
        ValueError: another shape or dtype.
    """
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        raise ValueError(f"{found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    difference, size = (found.float() - wanted.float()), wanted.float()
    largest = (difference.abs().max() / size.abs().max().clamp(min=1.0)).item()
    norm = (difference.norm() / size.norm()).item() if difference.any() else 0.0
    return max(largest, norm)


def both_forms(drawn: Drawn) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What Triton computes, and what the reference does."""
    try:
        kernels.use("triton")
        found = drawn()
        kernels.use("off")
        return found, drawn()
    finally:
        kernels.use("auto")


# ---------------------------------------------------------------- inputs


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same at every call on one kind of device."""
    return (torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device) * scale).to(dtype)


def draw_gram(batch: int, m: int, n: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> Drawn:
    X = random(device, batch, m, n, dtype=dtype, scale=n**-0.5)
    X = X.mT.contiguous().mT if transposed else X
    return Drawn(("product",), lambda: (kernels.gram(X),))


def draw_polynomial(batch: int, m: int, n: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> Drawn:
    X = random(device, batch, m, n, dtype=dtype, scale=n**-0.5)
    X = X.mT.contiguous().mT if transposed else X
    A = torch.bmm(X, X.mT)
    return Drawn(("product",), lambda: (kernels.polynomial(A, -4.775, 2.0315),))


def draw_orthogonalize(
    batch: int, m: int, n: int, steps: int, coefficients: str, dtype: torch.dtype, device: torch.device
) -> Drawn:
    G = random(device, batch, m, n)
    name = "fp32" if dtype == torch.float32 else "bf16"
    return Drawn(("result",), lambda: (orthogonalize(G, steps, coefficients, name),))


def draw_cross_entropy(
    rows: int, vocabulary: int, columns: int, cap: float, form: str, dtype: torch.dtype, device: torch.device
) -> Drawn:
    logits = random(device, rows, columns, dtype=dtype, scale=10)
    logits[0] += 300  # would overflow an exponential
    logits[1] *= 10
    targets = (random(device, rows, seed=1).abs() * vocabulary / 6).long().clamp(max=vocabulary - 1)
    if rows > 3:
        targets[3] = -100  # does not count
    logits.requires_grad_()
    upstream = torch.full((), 3.0, device=device)
    names = ("loss", "gradient of the logits")
    return Drawn(names, lambda: (kernels.cross_entropy(logits, targets, vocabulary, cap, form),), (logits,), upstream)


def draw_linear_relu2(shape: tuple[int, ...], hidden: int, has_bias: bool, dtype: torch.dtype, device: torch.device) -> Drawn:
    x = random(device, *shape, dtype=dtype).requires_grad_()
    weight = random(device, hidden, shape[-1], dtype=dtype, seed=1, scale=shape[-1] ** -0.5).requires_grad_()
    bias = random(device, hidden, dtype=dtype, seed=2).requires_grad_() if has_bias else None
    upstream = random(device, *shape[:-1], hidden, dtype=dtype, seed=3)
    names = ("result", "gradient of x", "gradient of the weight", "gradient of the bias")
    inputs = (x, weight, bias) if has_bias else (x, weight)
    return Drawn(names[: 1 + len(inputs)], lambda: (kernels.linear_relu2(x, weight, bias),), inputs, upstream)


def draw_quantise(rows: int, columns: int, to: torch.dtype, dtype: torch.dtype, device: torch.device) -> Drawn:
    x = random(device, rows, columns, dtype=dtype, scale=20)
    x[0, 0], x[0, 1], x[0, 2] = 1e9, -1e9, 0.0
    return Drawn(("result", "its transpose"), lambda: kernels.quantise(x, 0.25, to))


def draw_fp8_linear(rows: int, columns: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Drawn:
    x = random(device, rows, columns, dtype=dtype).requires_grad_()
    weight = random(device, hidden, columns, dtype=dtype, seed=1, scale=0.1).requires_grad_()
    upstream = random(device, rows, hidden, dtype=dtype, seed=2) / rows
    scales = (*FP8_SCALES, 1 / rows / 448)
    names = ("result", "gradient of x", "gradient of the weight")
    return Drawn(names, lambda: (kernels.fp8_linear(x, weight, scales),), (x, weight), upstream)


# ---------------------------------------------------------------- the table


def case(kernel: str, what: str, dtype: torch.dtype, draw: Callable[..., Drawn], *settings: object, **options: object) -> Case:
    return Case(kernel, what, dtype, lambda device: draw(*settings, dtype, device), **options)


def products(batch: int, m: int, n: int, transposed: bool, dtype: torch.dtype) -> list[Case]:
    what = f"{batch} x {m} x {n}{', transposed' * transposed}"
    return [
        case("gram", what, dtype, draw_gram, batch, m, n, transposed),
        case("polynomial", what, dtype, draw_polynomial, batch, m, n, transposed),
    ]


def losses(rows: int, vocabulary: int, columns: int, dtype: torch.dtype) -> list[Case]:
    what = f"{rows} x {vocabulary} of {columns}"
    return [
        case("cross_entropy", f"{what}, {form} {cap:g}", dtype, draw_cross_entropy, rows, vocabulary, columns, cap, form)
        for cap, form in FORMS
    ]


def layers(shape: tuple[int, ...], hidden: int, dtype: torch.dtype) -> list[Case]:
    words = " x ".join(map(str, (*shape, hidden)))
    return [
        case("linear_relu2", f"{words}{', bias' * has_bias}", dtype, draw_linear_relu2, shape, hidden, has_bias)
        for has_bias in (False, True)
    ]


def orthogonalizations(batch: int, m: int, n: int, steps: int, coefficients: str, dtype: torch.dtype) -> list[Case]:
    """Each of the steps rounds, and the next one builds on it."""
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    what = f"{batch} x {m} x {n}, {steps} steps {coefficients}"
    return [case("orthogonalize", what, dtype, draw_orthogonalize, batch, m, n, steps, coefficients, tolerance=tolerance)]


def quantisations(rows: int, columns: int, dtype: torch.dtype) -> list[Case]:
    what = f"{rows} x {columns}"
    return [
        case("quantise", f"{what}, {str(to)[13:]}", dtype, draw_quantise, rows, columns, to, tolerance=0.0, fp8=True)
        for to in kernels.LARGEST
    ]


def fp8_layers(rows: int, columns: int, hidden: int, dtype: torch.dtype) -> list[Case]:
    """Tensor cores add 8-bit products up in fewer bits than fp32 has (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), so fp32
    is no better than bf16 here; on a CPU both forms are equal."""
    what, tolerance = f"{rows} x {columns} x {hidden}", TOLERANCE[torch.bfloat16]
    return [case("fp8_linear", what, dtype, draw_fp8_linear, rows, columns, hidden, fp8=True, tolerance=tolerance)]


def ragged(dtype: torch.dtype) -> list[Case]:
    """Small, of sizes that no tile divides."""
    return [
        *(c for m, n in ((1, 3), (5, 90), (130, 70)) for t in (False, True) for c in products(2, m, n, t, dtype)),
        *orthogonalizations(2, 40, 20, 5, "quintic", dtype),
        *(c for size in ((5, 97, 97), (3, 5000, 5056)) for c in losses(*size, dtype)),
        *(
            c
            for shape, hidden in (((1, 1, 8), 8), ((3, 7, 24), 40), ((130, 72), 264), ((1150, 8), 136), ((5, 3), 7))
            for c in layers(shape, hidden, dtype)
        ),
        *quantisations(70, 33, dtype),
        *fp8_layers(48, 32, 80, dtype),
    ]


def gpt2(dtype: torch.dtype) -> list[Case]:
    """Of GPT-2 124M; too large for an interpreter."""
    return [
        *products(12, WIDTH, HIDDEN, False, dtype),
        *products(12, WIDTH, HIDDEN, True, dtype)[:1],
        *orthogonalizations(12, WIDTH, HIDDEN, 12, "cubic", dtype),
        *losses(LOSS_ROWS, VOCABULARY, COLUMNS, dtype),
        *layers((TOKENS, WIDTH), HIDDEN, dtype),
        *quantisations(TOKENS, WIDTH, dtype),
        *fp8_layers(LOSS_ROWS, WIDTH, COLUMNS, dtype),
    ]


# ---------------------------------------------------------------- Triton's interpreter


@contextlib.contextmanager
def numbers_that_numpy_lacks() -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bf16 numbers, and loses the carry when it rounds to 8 bits: not in here."""
    import triton.language as tl
    from triton.runtime import interpreter

    Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = Builder.create_dot, Builder.create_fp_to_fp
    eighths = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def round_as_torch(self, x, target, rounding):
        if target.scalar not in eighths or x.dtype.scalar != tl.float32:
            return cast(self, x, target, rounding)
        assert rounding == interpreter._ir.ROUNDING_MODE.RTNE
        rounded = torch.from_numpy(x.data.copy()).to(eighths[target.scalar])
        return Handle(rounded.view(torch.uint8).numpy(), target.scalar)

    Builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    Builder.create_fp_to_fp = round_as_torch
    try:
        yield
    finally:
        Builder.create_dot, Builder.create_fp_to_fp = dot, cast
