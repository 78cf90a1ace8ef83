"""Each Triton kernel against its reference, in Triton's interpreter where there is no GPU; and compiled for three chips."""

import contextlib
import json
import math
import os
import subprocess
import sys

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import TOLERANCE
from shared import ROOT
from torch import Tensor

from config import resolve
from engine.run_folder import file_hash
from engine.spec import UsageError
from layers import kernels
from model import GPT
from optimizers.matrix import orthogonalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = (kernel_cases.gpt2,) if torch.cuda.is_available() else ()
CASES = [case for dtype in TOLERANCE for table in (kernel_cases.ragged, *LARGE) for case in table(dtype)]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def interpreter(device):
    if device.type != DEVICE:
        pytest.skip("Triton's interpreter is for machines without a GPU")
    with kernel_cases.numbers_that_numpy_lacks() if DEVICE == "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture
def forms():
    """forms(f) -> f() by Triton, f() by the reference."""

    def both(f):
        found = []
        for mode in ("triton", "off"):
            kernels.use(mode)
            found.append(f())
        return found

    yield both
    kernels.use("auto")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.to(DEVICE, dtype).requires_grad_()


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    error = (found.float() - wanted.float()).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, wanted.float().abs().max().item()), error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_its_reference(case):
    """The results of either form, and the gradients where there are any."""
    if case.fp8 and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no 8-bit floats")
    try:
        found, wanted = kernel_cases.both_forms(case.draw(DEVICE))
    except Exception as error:
        if case.dtype == torch.float32 and type(error).__name__ == "OutOfResources":  # Triton's, of shared memory
            pytest.skip("its tiles do not fit this chip in fp32, for which the trainer takes plain PyTorch")
        raise
    for a, b in zip(found, wanted, strict=True):
        assert kernel_cases.error(a, b) <= case.allowed(b)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory of a GPU: --device cuda")
def test_cross_entropy_beyond_32_bits():
    """More logits than 32 bits can count; the gradient is compared on the last rows."""
    rows, vocabulary, last = 65536, 50257, 512
    logits = torch.empty(rows, 50304, dtype=torch.bfloat16, device=DEVICE).normal_(0, 10).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    loss = kernels.cross_entropy(logits, targets, vocabulary, 15.0)
    (grad,) = torch.autograd.grad(loss, logits)

    def reference(x: Tensor, at: int) -> Tensor:
        return kernels.cross_entropy_reference(x, targets[at : at + last], vocabulary, 15.0, "rational")

    part = logits.detach()[-last:].requires_grad_()
    (wanted,) = torch.autograd.grad(reference(part, rows - last) * last / rows, part)
    assert kernel_cases.error(grad[-last:], wanted) < TOLERANCE[torch.bfloat16]
    with torch.no_grad():
        whole = torch.stack([reference(logits[i : i + last], i) for i in range(0, rows, last)]).mean()
    assert kernel_cases.error(loss.detach(), whole) < 1e-5


def test_error_is_relative_and_sees_everything():
    wanted = torch.tensor([4.0, 0.0, 3.0])
    assert kernel_cases.error(wanted, wanted) == 0
    assert kernel_cases.error(wanted + torch.tensor([0.0, 0.5, 0.0]), wanted) == pytest.approx(0.125)  # of the largest
    assert kernel_cases.error(2e-3 * wanted, 1e-3 * wanted) == pytest.approx(1.0)  # small numbers: by norm
    assert kernel_cases.error(torch.ones(1), torch.zeros(1)) == math.inf
    assert math.isnan(kernel_cases.error(torch.tensor([math.nan, 0.0, 3.0]), wanted))
    for other in (wanted.double(), wanted[None]):
        with pytest.raises(ValueError, match=r"not torch\.float32"):
            kernel_cases.error(other, wanted)


# ---------------------------------------------------------------- Newton-Schulz


def test_products_are_computed_in_tiles_on_and_below_the_diagonal():
    """Every tile of the lower triangle belongs to one program, for as many tiles as a matrix may have."""
    meta = torch.empty(3, 1500, 8, device="meta")
    assert kernels.plan_symmetric(meta, None, 1.0, 0.0, meta).grid == (12 * 13 // 2, 3)
    X = random(1, 400, 3).detach()  # 4 x 4 tiles
    kernels.use("triton")
    try:
        torch.testing.assert_close(kernels.gram(X), X @ X.mT)
    finally:
        kernels.use("auto")


def test_a_product_above_the_diagonal_is_a_copy(forms):
    X = random(2, 130, 70).detach()
    A, _ = forms(lambda: kernels.gram(X))
    assert torch.equal(A[:, 128:, :128], A[:, :128, 128:].mT)


@DTYPES
def test_orthogonalize(dtype, forms):
    G = random(2, 40, 20, dtype=torch.float32).detach()
    found, _ = forms(lambda: orthogonalize(G, 5, "quintic", "fp32" if dtype == torch.float32 else "bf16"))
    sizes = torch.linalg.svdvals(found.float())
    assert sizes.min() > 0.6 and sizes.max() < 1.25


# ---------------------------------------------------------------- cross-entropy


@DTYPES
def test_cross_entropy_leaves_padding_and_ignored_rows_alone(dtype, forms):
    logits, targets = random(5, 128, dtype=dtype, scale=10), torch.tensor([0, 96, 5, -100, 7], device=DEVICE)
    found, _ = forms(lambda: torch.autograd.grad(kernels.cross_entropy(logits, targets, 97, 15.0), logits)[0])
    assert (found[:, 97:] == 0).all() and (found[3] == 0).all()


def test_cross_entropy_stores_no_fp32_logits(forms):
    """Neither between forward and backward nor as a gradient."""
    targets, stored = torch.zeros(4, dtype=torch.int64, device=DEVICE), []

    def largest_fp32():
        stored.clear()
        logits = random(4, 1000, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
            kernels.cross_entropy(logits, targets, 1000, 15.0, "rational").backward()
        assert logits.grad.dtype == torch.bfloat16
        return max(x.numel() for x in stored if x.dtype == torch.float32)

    fused, reference = forms(largest_fp32)
    assert fused == 4 and reference >= 4000, "one number a row; the reference keeps the logits"


def test_softcap_forms_that_no_kernel_knows_take_the_reference(forms, monkeypatch):
    monkeypatch.setattr(kernels, "softcap", lambda logits, cap, form: logits * 0.5)
    logits, targets = random(3, 20).detach(), torch.tensor([1, 2, 3], device=DEVICE)
    found, wanted = forms(lambda: kernels.cross_entropy(logits, targets, 20, 5.0, "halved"))
    assert found == wanted == F.cross_entropy(logits * 0.5, targets)


# ---------------------------------------------------------------- 8-bit floats


@pytest.mark.parametrize("dtype", kernels.LARGEST, ids=str)
def test_quantise(dtype, forms):
    x = random(70, 33, scale=20).detach()
    x[0, :3] = torch.tensor([1e9, -1e9, 0.0])
    (q, transposed), (wanted, _) = forms(lambda: kernels.quantise(x, 0.25, dtype))
    assert torch.equal(q.float(), wanted.float()) and torch.equal(transposed.float(), q.float().T)
    assert q.dtype == dtype and transposed.is_contiguous()
    assert q[0, :3].float().tolist() == [kernels.LARGEST[dtype], -kernels.LARGEST[dtype], 0.0]
    steps = 2.0 ** (-4 if dtype == torch.float8_e4m3fn else -3)  # half of the last bit
    assert ((q.float() * 0.25 - x).abs()[1:] <= steps * x.abs()[1:] + 1e-3).all()


def test_scaled_product_is_cublas_own():
    """PyTorch has the call for CPUs too: its arguments are right, up to the rounding of the result."""
    a, b = (random(n, 48, seed=n).detach().to(torch.float8_e4m3fn) for n in (32, 16))
    a = a.float().to(torch.float8_e5m2)
    found = kernels.scaled_product_cublas(a, b, 0.5, 3.0, torch.bfloat16)
    close(found, kernels.scaled_product_reference(a, b, 0.5, 3.0, torch.bfloat16), torch.bfloat16)


def test_fp8_linear(forms):
    """The Triton form is the reference bit by bit, and both are a linear layer to within 8-bit rounding."""
    x, weight = random(48, 32), random(80, 32, seed=1, scale=0.1)
    upstream = random(48, 80, seed=2).detach() / 48
    scales = (4 / 448, 0.5 / 448, 1 / 48 / 448)

    def result_and_gradients():
        y = kernels.fp8_linear(x, weight, scales)
        return y, *torch.autograd.grad(y, (x, weight), upstream)

    found, wanted = forms(result_and_gradients)
    assert all(map(torch.equal, found, wanted))
    y = x @ weight.T
    for a, b in zip(found, (y, *torch.autograd.grad(y, (x, weight), upstream))):
        assert (a - b).norm() < 0.08 * b.norm()  # e5m2 rounds by up to 1/8, e4m3 by up to 1/16


# ---------------------------------------------------------------- in the model


@DTYPES
def test_the_model_is_the_same_with_and_without(dtype, forms):
    _, config, _ = resolve(["--track", "tiny", "--tricks", "modern,padded_vocab", "--vocab-size", "250"])
    tokens = torch.randint(250, (2, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.manual_seed(0)
    gpt = GPT(config).to(DEVICE)
    gpt.compute_dtype = dtype
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.1)

    def losses():
        gpt.zero_grad()
        loss = gpt(tokens, tokens.roll(-1, 1))
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in gpt.parameters()])

    (loss, grad), (wanted, wanted_grad) = forms(losses)
    close(loss, wanted, dtype)
    assert (grad - wanted_grad).norm() < TOLERANCE[dtype] * wanted_grad.norm()


def test_cpu_tensors_and_fp32_take_the_reference():
    cpu = torch.zeros(1, dtype=torch.bfloat16)
    assert not kernels.fused(cpu) and not kernels.fused(torch.zeros(1, device=DEVICE))
    assert kernels.fused(cpu.to(DEVICE)) == (DEVICE == "cuda")


@pytest.mark.slow
def test_without_triton_all_is_there():
    """As in PyTorch's builds for CPUs: the module imports, and every function computes."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\nfrom layers import kernels as k\n"
        "x = torch.ones(4, 4)\n"
        "assert k.triton is None and not k.fused(x)\n"
        "print(k.gram(x[None]).sum().item(), k.linear_relu2(x, x).sum().item(), k.polynomial(x[None], 1., 1.).sum().item(),\n"
        "      k.cross_entropy(x, torch.arange(4), 4).item(), k.fp8_linear(x, x, (1., 1., 1.)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [float(n) for n in done.stdout.split()] == pytest.approx([64, 256, 80, math.log(4), 64])


# ---------------------------------------------------------------- compiled for GPUs that are not there


COMPILE = """
import json, sys
from benchmarks.kernels import compiled, triton
triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
print(json.dumps([compiled((name, int(chip))) for name, chip in zip(sys.argv[1::2], sys.argv[2::2])]))
"""


@pytest.mark.slow
def test_the_published_table_is_that_of_these_kernels():
    """A row for each of three chips compiled anew; and the table is of this source and this Triton."""
    from benchmarks.kernels import triton

    table, source = json.loads((ROOT / "benchmarks" / "kernels.json").read_text()), file_hash(ROOT / "layers" / "kernels.py")
    assert (table["source"], table["triton"]) == (source[:12], triton.__version__), "run: python -m benchmarks.kernels"
    some = [("polynomial", 100), ("linear_relu2, forward", 90), ("cross_entropy, tanh, backward", 80)]
    command = [sys.executable, "-c", COMPILE, *(str(word) for row in some for word in row)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [r for k in some for r in table["kernels"] if (r["kernel"], r["chip"]) == k]


def test_every_kernel_fits_every_chip():
    """No spills, within each chip, on its matrix units, every kernel for every chip; 8-bit floats and tiles that need more
    shared memory not for the A100."""
    table = json.loads((ROOT / "benchmarks" / "kernels.json").read_text())
    units = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for row in table["kernels"]:
        chip = table["chips"][str(row["chip"])]
        assert row["spilled"] == 0 and row["registers"] <= chip["registers"] and row["shared"] <= chip["shared"], row
        if row["kernel"].startswith(("linear_relu2, forward", "linear_relu2 with")):
            assert row["shared"] <= kernels.ROOM
        if row["kernel"].startswith(("gram", "polynomial", "linear_relu2, forward", "linear_relu2 with")):
            assert row["matrix_units"] == units[row["chip"]], row
    named = {(row["kernel"], row["chip"]) for row in table["kernels"]}
    names = {name for name, _ in named}
    missing = {(name, chip) for name in names for chip in (80, 90, 100)} - named
    lacking = ("fp8", "linear_relu2, forward", "linear_relu2 with bias")
    assert missing == {(name, 80) for name in names if name.startswith(lacking)} and len(missing) == 4
    defined = [name for name, value in vars(kernels).items() if name.startswith("plan_")]
    assert len(defined) == 6 and len(names) == 16, "a new kernel belongs in benchmarks/kernels.py"


def test_interpreter_is_refused(monkeypatch, tmp_path):
    from benchmarks.kernels import measure, triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(UsageError, match="unset it"):
        measure(tmp_path / "kernels.json")
