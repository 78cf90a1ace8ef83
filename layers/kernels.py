"""Fast forms of a few operations, each beside the plain PyTorch that defines it.

    rms_norm            x / rms(x) w                        a few passes over memory, on CPUs
    gram, polynomial    X X^T and b A + c A A               Triton: the products of Newton-Schulz, half of each computed
    cross_entropy       of softcapped logits                Triton: no fp32 copy of the logits, forward or backward
    linear_relu2        relu(x W^T + b)^2                   Triton: one pass, only its result kept for backward
    fp8_linear          x W^T in 8-bit floats               Triton quantises, cuBLAS multiplies

Triton's take bf16 tensors on CUDA GPUs, unless `use` says otherwise; under torch.compile too, to which each is one opaque
operation. Everything else - CPUs, fp32, machines without Triton - gets the reference. Tiles and warps are fixed in the `plan_*`
functions, by times on one H100; benchmarks/kernels.py compiles the same code with them for GPUs that are not there.
"""

from __future__ import annotations  # Triton's types in signatures must not be looked up where it is missing

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:  # PyTorch's builds for CPUs and Apple come without it
    triton = tl = TensorDescriptor = None

ROOM = 210 * 1024  # bytes of shared memory a block, for linear_relu2

_mode = "auto"


def use(mode: str) -> None:
    """Which form runs from now on: `auto`; `off`: the reference; `triton` on any device, for tests in its interpreter; `meta`:
    on meta tensors the loss as one operation a pass, as a GPU runs it, for cost.py."""
    global _mode
    assert mode in ("auto", "off", "triton", "meta")
    _mode = mode


def fused(x: Tensor) -> bool:
    """Does Triton compute with x?"""
    if _mode == "auto":
        return triton is not None and x.is_cuda and x.dtype == torch.bfloat16
    return _mode == "triton"


def jit(kernel: Callable) -> Callable:
    return kernel if triton is None else triton.jit(kernel)


@dataclass(frozen=True)
class Plan:
    """A kernel and its launch arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def opaque(plan: Callable[..., Plan], schema: str, outputs: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel as a function that torch.compile calls without looking into it. outputs: makes its results, unfilled. In eager
    mode it is called directly: on one H100 PyTorch's dispatch of such an operation took 0.03 ms, as long as Triton's launch."""
    name = plan.__name__.removeprefix("plan_")

    def run(*arguments):
        made = outputs(*arguments)
        plan(*arguments, *(made if isinstance(made, tuple) else (made,))).run()
        return made

    operation = torch.library.custom_op(f"speedrun::{name}", run, mutates_args=(), schema=schema)
    operation.register_fake(outputs)
    return lambda *arguments: (operation if torch.compiler.is_compiling() or arguments[0].is_meta else run)(*arguments)


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def tiles(size: int, block: int) -> int:
    """How many; triton.cdiv takes ten times as long, and a launch waits for it."""
    return -(-size // block)


def roomy(device: torch.device) -> bool:
    """Has a block of threads the shared memory for linear_relu2's tiles? Hopper's and Blackwell's large chips have, and units
    that move tiles by descriptors; A100, graphics cards and AMD's (without such a property) have not. No limit on a CPU."""
    if device.type != "cuda":
        return True
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= ROOM


roomy._dynamo_marked_constant = True  # what torch.compiler.assume_constant_result does, without importing the compiler


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; without one, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


# ---------------------------------------------------------------- RMS normalisation


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class CPURMSNorm(torch.autograd.Function):
    """With r = 1/rms(x), n = x r, h = g w:  dx = r (h - n mean(h n)),  dw = sum over rows of g n. In three passes over memory
    forward and five backward; PyTorch's takes about ten, which for small models costs more than the matrix products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        # eps is added to the norm's square as in the reference; the norm itself is reduced in fp32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).float()
        r = (norm.square() / x.size(-1) + eps).rsqrt().to(x.dtype)
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n if weight is None else n * weight

    @staticmethod
    def backward(ctx, g: Tensor):
        n, r, weight = ctx.saved_tensors
        h = g if weight is None else g * weight
        gn = g * n
        if weight is None:
            mean, dweight = gn.mean(-1, keepdim=True), None
        else:
            flat = gn.flatten(0, -2)
            mean = (flat @ weight / n.size(-1)).view(r.shape)  # mean(h n) = mean(w g n)
            dweight = flat.sum(0)
        return torch.addcmul(h, n, mean, value=-1).mul_(r), dweight, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Over the last dimension of x; weight [C] in x's dtype or None. torch.compile and GPUs fuse PyTorch's own."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return rms_norm_reference(x, weight, eps)
    return CPURMSNorm.apply(x, weight, eps)


# ---------------------------------------------------------------- products of Newton-Schulz


@jit
def symmetric_kernel(
    x, old, out, M, K, x_batch, x_row, x_column, alpha, beta,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, HAS_OLD: tl.constexpr,
):  # fmt: skip
    """out = alpha x x^T + beta old: a program computes one tile on or below the diagonal and writes it there and mirrored. x
    [batch, M, K] of any strides; old, symmetric, and out [batch, M, M] are contiguous."""
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * tile + 1) - 1) / 2).to(tl.int32)  # tile = i (i + 1) / 2 + j, up to rounding
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    rows, columns, inner = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    x += batch * x_batch
    left = x + rows.to(tl.int64)[:, None] * x_row + inner[None, :] * x_column
    right = x + columns.to(tl.int64)[None, :] * x_row + inner[:, None] * x_column
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(left, mask=(rows[:, None] < M) & (inner[None, :] < K - k), other=0.0)
        b = tl.load(right, mask=(columns[None, :] < M) & (inner[:, None] < K - k), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BLOCK_K * x_column
        right += BLOCK_K * x_column
    total *= alpha
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    at = batch * M * M + rows[:, None] * M + columns[None, :]
    if HAS_OLD:
        total += beta * tl.load(old + at, mask=inside, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    tl.store(out + at, total, mask=inside)
    if i != j:
        at = batch * M * M + columns[:, None] * M + rows[None, :]
        tl.store(out + at, tl.trans(total), mask=(columns[:, None] < M) & (rows[None, :] < M))


def plan_symmetric(x: Tensor, old: Tensor | None, alpha: float, beta: float, out: Tensor) -> Plan:
    """alpha x x^T + beta old of x [batch, M, K] and symmetric old [batch, M, M]."""
    batch, M, K = x.shape
    block = min(128, max(16, triton.next_power_of_2(M)))
    n = tiles(M, block)
    strides = dict(zip(("x_batch", "x_row", "x_column"), x.stride()))
    arguments = dict(x=x, old=out if old is None else old.contiguous(), out=out, M=M, K=K, alpha=alpha, beta=beta, BLOCK=block,
                     BLOCK_K=64, HAS_OLD=old is not None)  # fmt: skip
    return Plan(symmetric_kernel, (n * (n + 1) // 2, batch), arguments | strides, num_warps=4, num_stages=3)


symmetric = opaque(
    plan_symmetric,
    "(Tensor x, Tensor? old, float alpha, float beta) -> Tensor",
    lambda x, *_: empty(x.size(0), x.size(1), x.size(1), like=x),
)


def gram(X: Tensor) -> Tensor:
    """X X^T of X [batch, m, n]."""
    return symmetric(X, None, 1.0, 0.0) if fused(X) else torch.bmm(X, X.mT)


def polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """b A + c A A of symmetric A [batch, m, m]: what Newton-Schulz multiplies X with (modded-nanogpt #27)."""
    return symmetric(A, A, c, b) if fused(A) else torch.baddbmm(A, A, A, beta=b, alpha=c)


# ---------------------------------------------------------------- cross-entropy of softcapped logits


def softcap(logits: Tensor, cap: float, form: str) -> Tensor:
    """Logits bounded by cap, smoothly; 0: as they are. rational: c x / sqrt(x^2 + c^2); tanh: c tanh(x / c);
    sigmoid: c sigmoid((x + 5) / 7.5), modded-nanogpt #54."""
    if not cap:
        return logits
    if form == "tanh":
        return cap * torch.tanh(logits / cap)
    if form == "sigmoid":
        return cap * torch.sigmoid((logits + 5) / 7.5)
    return cap * (logits * (logits * logits + cap**2).rsqrt())


def cross_entropy_reference(logits: Tensor, targets: Tensor, vocab_size: int, cap: float, form: str) -> Tensor:
    return F.cross_entropy(softcap(logits[:, :vocab_size].float(), cap, form), targets)


@jit
def softcapped(x, cap, FORM: tl.constexpr):
    """`softcap` and its derivative."""
    if FORM == "rational":
        r = tl.rsqrt(x * x + cap * cap) * cap
        return x * r, r * r * r
    elif FORM == "tanh":
        t = 2 * tl.sigmoid(2 * x / cap) - 1
        return cap * t, 1 - t * t
    elif FORM == "sigmoid":
        s = tl.sigmoid((x + 5) / 7.5)
        return cap * s, cap / 7.5 * s * (1 - s)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


@jit
def cross_entropy_forward_kernel(
    logits, targets, losses, normalisers, vocab_size, columns, cap, FORM: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes one row: its log-sum-exp in one pass, minus the largest logit so far. BOUNDED: minus the cap, which none
    exceeds; that saves one of two exponentials, which on an H100 cost more than the bytes."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    most, total = tl.full((BLOCK,), cap if BOUNDED else -float("inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x, _ = softcapped(tl.load(logits + at, mask=at < vocab_size, other=0.0).to(tl.float32), cap, FORM)
        x = tl.where(at < vocab_size, x, -1e30)  # finite: a lane that has met no logit yet must not become inf - inf
        if BOUNDED:
            total += tl.exp(x - cap)
        else:
            larger = tl.maximum(most, x)
            total = total * tl.exp(most - larger) + tl.exp(x - larger)
            most = larger
    highest = tl.max(most, 0)
    normaliser = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    target = tl.load(targets + row)
    right, _ = softcapped(tl.load(logits + tl.maximum(target, 0)).to(tl.float32), cap, FORM)
    tl.store(losses + row, tl.where(target < 0, 0.0, normaliser - right))
    tl.store(normalisers + row, normaliser)


@jit
def cross_entropy_backward_kernel(
    logits, targets, normalisers, upstream, out, vocab_size, columns, cap, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    """out = upstream (softmax - one-hot) softcap'(logits), 0 in the padding and where no target counts, by blocks of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * columns + at, mask=at < vocab_size, other=0.0).to(tl.float32)
    x, slope = softcapped(x, cap, FORM)
    target = tl.load(targets + row)
    miss = tl.exp(x - tl.load(normalisers + row)) - tl.where(at == target, 1.0, 0.0)
    grad = tl.where((at < vocab_size) & (target >= 0), miss * slope * tl.load(upstream), 0.0)
    tl.store(out + row * columns + at, grad.to(out.dtype.element_ty), mask=at < columns)


def plan_cross_entropy_forward(
    logits: Tensor, targets: Tensor, vocab_size: int, cap: float, form: str, losses: Tensor, normalisers: Tensor
) -> Plan:
    """Per row of logits [N, columns]: the loss, and the log of the sum of exponentials; [N] fp32 each."""
    # logits of at least -cap: exp(-2 cap) of them is to be a normal fp32 number, 1e-38, with room to add up
    arguments = dict(logits=logits.contiguous(), targets=targets, losses=losses, normalisers=normalisers, vocab_size=vocab_size)
    arguments |= dict(columns=logits.size(1), cap=cap, FORM=form if cap else "none", BOUNDED=0 < cap <= 40, BLOCK=2048)
    return Plan(cross_entropy_forward_kernel, (len(logits),), arguments, num_warps=8, num_stages=3)


def plan_cross_entropy_backward(
    logits: Tensor, targets: Tensor, normalisers: Tensor, upstream: Tensor, vocab_size: int, cap: float, form: str, out: Tensor
) -> Plan:
    """Gradient of the summed loss times `upstream` (0-dim, fp32) at the logits, in their dtype."""
    (rows, columns), logits = logits.shape, logits.contiguous()
    arguments = dict(logits=logits, targets=targets, normalisers=normalisers, upstream=upstream, out=out, vocab_size=vocab_size)
    arguments |= dict(columns=columns, cap=cap, FORM=form if cap else "none", BLOCK=1024)
    return Plan(cross_entropy_backward_kernel, (rows, tiles(columns, 1024)), arguments, num_warps=4, num_stages=1)


cross_entropy_forward = opaque(
    plan_cross_entropy_forward,
    "(Tensor logits, Tensor targets, int vocab_size, float cap, str form) -> (Tensor, Tensor)",
    lambda logits, *_: tuple(empty(len(logits), like=logits, dtype=torch.float32) for _ in range(2)),
)
cross_entropy_backward = opaque(
    plan_cross_entropy_backward,
    "(Tensor logits, Tensor targets, Tensor normalisers, Tensor upstream, int vocab_size, float cap, str form) -> Tensor",
    lambda logits, *_: empty(*logits.shape, like=logits),
)


class FusedCrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number a row, from which backward makes the softmax. Targets below 0 are left out."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, vocab_size: int, cap: float, form: str) -> Tensor:
        losses, normalisers = cross_entropy_forward(logits, targets, vocab_size, cap, form)
        counted = (targets >= 0).sum()
        ctx.save_for_backward(logits, targets, normalisers, counted)
        ctx.settings = vocab_size, cap, form
        return losses.sum() / counted

    @staticmethod
    def backward(ctx, upstream: Tensor):
        *saved, counted = ctx.saved_tensors
        return cross_entropy_backward(*saved, upstream.float() / counted, *ctx.settings), None, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, cap: float = 0.0, form: str = "rational") -> Tensor:
    """Mean cross-entropy, nats, fp32, of logits [N, columns] after `softcap`, of which the first vocab_size count (the rest
    pads the head). targets: [N] int64 below vocab_size; -100 where none counts."""
    recorded = _mode == "meta" and logits.is_meta and logits.dtype == torch.bfloat16
    if (recorded or fused(logits)) and form in ("rational", "tanh", "sigmoid"):
        return FusedCrossEntropy.apply(logits, targets.contiguous(), vocab_size, cap, form)
    return cross_entropy_reference(logits, targets, vocab_size, cap, form)


# ---------------------------------------------------------------- linear layer with squared ReLU


@jit
def linear_relu2_kernel(
    x, weight, bias, out, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out [M, N] = relu(x [M, K] weight [N, K]^T + bias [N])^2, each but the bias by a tensor descriptor. A program keeps
    running for all its tiles, and loads the next while it writes the last; tiles that share rows run together."""
    high, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), high * wide, PROGRAMS, flatten=True):
        i, j = tl.swizzle2d(tile // wide, tile % wide, high, wide, 8)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left, right = x.load([i * BLOCK_M, k]), weight.load([j * BLOCK_N, k])
            total = tl.dot(left, right.T, total, input_precision="ieee")
        if HAS_BIAS:
            columns = j * BLOCK_N + tl.arange(0, BLOCK_N)
            total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        total = tl.maximum(total, 0.0)
        out.store([i * BLOCK_M, j * BLOCK_N], (total * total).to(out.dtype))


@jit
def relu2_backward_kernel(y, upstream, out, size, BLOCK: tl.constexpr):
    """Gradient before the activation, of y = relu(x)^2:  2 relu(x) g = 2 sqrt(y) g."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    root = tl.sqrt(tl.load(y + at, mask=at < size, other=0.0).to(tl.float32))
    g = tl.load(upstream + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, (2 * root * g).to(out.dtype.element_ty), mask=at < size)


def plan_linear_relu2(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Plan:
    """Of tensors with rows of a multiple of 16 bytes."""
    (M, K), N, high, wide, deep = x.shape, len(weight), 128, 256, 128 // x.element_size()
    programs, weight = min(multiprocessors(x.device), tiles(M, high) * tiles(N, wide)), weight.contiguous()
    arguments = dict(
        x=TensorDescriptor.from_tensor(x.contiguous(), [high, deep]), weight=TensorDescriptor.from_tensor(weight, [wide, deep]),
        out=TensorDescriptor.from_tensor(out, [high, wide]), bias=weight if bias is None else bias, M=M, N=N, K=K,
        BLOCK_M=high, BLOCK_N=wide, BLOCK_K=deep, PROGRAMS=programs, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return Plan(linear_relu2_kernel, (programs,), arguments, num_warps=8, num_stages=3)


def plan_relu2_backward(y: Tensor, upstream: Tensor, out: Tensor) -> Plan:
    arguments = dict(y=y, upstream=upstream.contiguous(), out=out, size=y.numel(), BLOCK=4096)
    return Plan(relu2_backward_kernel, (tiles(y.numel(), 4096),), arguments, num_warps=8, num_stages=1)


linear_relu2_forward = opaque(
    plan_linear_relu2,
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: empty(len(x), len(weight), like=x),
)
relu2_backward = opaque(
    plan_relu2_backward, "(Tensor y, Tensor upstream) -> Tensor", lambda y, upstream: empty(*y.shape, like=y)
)


class FusedLinearReLU2(torch.autograd.Function):
    """Keeps only its result, from which backward takes relu(x) = sqrt(y)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = linear_relu2_forward(x, weight, bias)
        ctx.save_for_backward(x, weight, y)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, y = ctx.saved_tensors
        g = relu2_backward(y, upstream)
        return g @ weight, g.mT @ x, g.sum(0) if ctx.has_bias else None


def linear_relu2(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x W^T + b)^2 (arXiv 2109.08668) of x [..., C], weight [H, C] and bias [H] of one dtype -> [..., H]. The kernel loads
    and stores by tensor descriptors, whose rows have a multiple of 16 bytes."""
    if fused(x) and roomy(x.device) and not any(side * x.element_size() % 16 for side in weight.shape):
        return FusedLinearReLU2.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    x = F.relu(F.linear(x, weight, bias))
    return x * x  # not .square(): PyTorch's power is 40 times slower than its product for bf16 on CPU


# ---------------------------------------------------------------- linear layer in 8-bit floats

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@jit
def quantise_kernel(
    x, out, transposed, M, N, x_row, x_column, inverse, most, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out [M, N] = x inverse, in at most +-most, and out^T beside it: the matrix units read 8-bit floats along rows only."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_column
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    scaled = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse
    scaled = tl.clamp(scaled, -most, most, propagate_nan=tl.PropagateNan.ALL)
    q = scaled.to(out.dtype.element_ty, fp_downcast_rounding="rtne")
    tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], q, mask=inside)
    inside = (columns[:, None] < N) & (rows[None, :] < M)
    tl.store(transposed + columns.to(tl.int64)[:, None] * M + rows[None, :], tl.trans(q), mask=inside)


def plan_quantise(x: Tensor, scale: float, dtype: torch.dtype, out: Tensor, transposed: Tensor) -> Plan:
    M, N = x.shape
    arguments = dict(x=x, out=out, transposed=transposed, M=M, N=N, x_row=x.stride(0), x_column=x.stride(1), inverse=1 / scale,
                     most=LARGEST[dtype], BLOCK_M=128, BLOCK_N=128)  # fmt: skip
    return Plan(quantise_kernel, (tiles(M, 128), tiles(N, 128)), arguments, num_warps=4, num_stages=1)


fused_quantise = opaque(
    plan_quantise,
    "(Tensor x, float scale, ScalarType dtype) -> (Tensor, Tensor)",
    lambda x, scale, dtype: tuple(empty(*shape, like=x, dtype=dtype) for shape in (x.shape, x.shape[::-1])),
)


def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, N] / scale in an 8-bit float, clipped to its range, and its transpose [N, M]."""
    if fused(x):
        return fused_quantise(x, scale, dtype)
    q = (x.float() * (1 / scale)).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    return q, q.T.contiguous()


def scaled_product_reference(a: Tensor, b: Tensor, scale_a: float, scale_b: float, dtype: torch.dtype) -> Tensor:
    return ((a.float() @ b.float().T) * (scale_a * scale_b)).to(dtype)


def scaled_product_cublas(a: Tensor, b: Tensor, scale_a: float, scale_b: float, dtype: torch.dtype) -> Tensor:
    one, other = (torch.full((), scale, device=a.device) for scale in (scale_a, scale_b))
    return torch._scaled_mm(a, b.T, scale_a=one, scale_b=other, out_dtype=dtype)


def scaled_product(a: Tensor, b: Tensor, scale_a: float, scale_b: float, dtype: torch.dtype) -> Tensor:
    """(scale_a a) (scale_b b)^T of 8-bit a [M, K] and b [N, K] -> [M, N] of `dtype`. On CUDA: sides divisible by 16."""
    multiply = scaled_product_cublas if _mode != "off" and a.is_cuda else scaled_product_reference
    return multiply(a, b, scale_a, scale_b, dtype)


class FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scales: tuple[float, float, float]) -> Tensor:
        x_scale, weight_scale, _ = ctx.scales = scales
        x8, x8_transposed = quantise(x, x_scale, torch.float8_e4m3fn)
        w8, w8_transposed = quantise(weight, weight_scale, torch.float8_e4m3fn)
        ctx.save_for_backward(x8_transposed, w8_transposed)
        ctx.dtypes = x.dtype, weight.dtype
        return scaled_product(x8, w8, x_scale, weight_scale, x.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x8_transposed, w8_transposed = ctx.saved_tensors
        x_scale, weight_scale, gradient_scale = ctx.scales
        g8, g8_transposed = quantise(upstream, gradient_scale, torch.float8_e5m2)
        dx = scaled_product(g8, w8_transposed, gradient_scale, weight_scale, ctx.dtypes[0])
        dweight = scaled_product(g8_transposed, x8_transposed, gradient_scale, x_scale, ctx.dtypes[1])
        return dx, dweight, None


def fp8_linear(x: Tensor, weight: Tensor, scales: tuple[float, float, float]) -> Tensor:
    """x W^T, [N, V] in x's dtype, of x [N, C] and W [V, C] in e4m3, and the gradient in e5m2 (modded-nanogpt #19, for the
    head). scales: what x, the weight and the gradient are divided by before rounding, fixed."""
    return FP8Linear.apply(x, weight, scales)
