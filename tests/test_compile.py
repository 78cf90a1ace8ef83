"""The record recipe of gpt2-small compiles whole: one graph for forward and loss, with and without the Triton kernels.

Of an optimizer's update --compile takes element-wise rules, each in one graph too: test_rules.py,
test_compiled_update_is_the_same. The recipe's Muon and AdamW run uncompiled; the iteration in Muon would compile whole.
"""

import pytest
import torch
from torch._dynamo import explain

import optimizers
from config import resolve
from layers import kernels
from model import GPT
from optimizers.matrix import orthogonalize

TINY = ("--vocab-size", "200", "--sequence-length", "16", "--layers", "2", "--width", "32", "--heads", "2", "--window", "12")
RECORD = ("--track", "gpt2-small", "--tricks", "record", *TINY)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["off", "triton"])
def form(request, device):
    """Plain PyTorch, and the kernels (opaque operations to the compiler; in Triton's interpreter where there is no GPU)."""
    if device.type != DEVICE:
        pytest.skip("Triton's interpreter is for machines without a GPU")
    torch._dynamo.reset()
    kernels.use(request.param)
    yield request.param
    kernels.use("auto")
    torch._dynamo.reset()


def build(*flags: str) -> tuple[GPT, torch.Tensor, str]:
    config, model_config, _ = resolve([*RECORD, *flags])
    torch.manual_seed(0)
    gpt = GPT(model_config).to(DEVICE)
    for p in gpt.parameters():  # the projections start at zero and would hide the blocks
        torch.nn.init.normal_(p, std=0.1)
    return gpt, torch.randint(200, (2, 16), device=DEVICE), config.optimizer


@pytest.mark.slow
def test_forward_and_loss_are_one_graph(form):
    gpt, tokens, _ = build()
    report = explain(gpt)(tokens, tokens)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
    names = {str(getattr(op, "__name__", op)) for ops in report.ops_per_graph for op in ops}
    assert any("autograd_function" in name for name in names) == (form == "triton"), "the kernels are in the graph or are not"


@pytest.mark.slow
def test_compiled_is_eager(form):
    """fullgraph raises at a break. Loss and gradients are those of the uncompiled model."""
    gpt, tokens, _ = build()
    found = []
    for model in (gpt, torch.compile(gpt, fullgraph=True, backend="aot_eager")):
        gpt.zero_grad()
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in gpt.parameters()]))
    (loss, grads), (wanted, wanted_grads) = found
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grads, wanted_grads, atol=1e-5, rtol=1e-4)


def test_orthogonalize_is_one_graph(form):
    G = torch.randn(2, 20, 30, device=DEVICE)
    whole = torch.compile(orthogonalize, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(G, 3, "cubic", "fp32"), orthogonalize(G, 3, "cubic", "fp32"))


@pytest.mark.slow
def test_a_whole_step_trains():
    """Forward, loss and backward from one graph, then the recipe's own optimizer, on the same weights: the loss falls."""
    gpt, tokens, spec = build()
    optimizer = optimizers.build(spec, gpt, 10)
    model, found = torch.compile(gpt, fullgraph=True, backend="aot_eager"), []
    for _ in range(3):
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    assert found[-1] < found[0]
