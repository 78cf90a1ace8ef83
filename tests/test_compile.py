"""The record recipe of gpt2-small compiles whole: one graph for forward and loss, with and without the Triton kernels.

Of an optimizer's update --compile takes element-wise rules, each in one graph too: test_rules.py,
test_compiled_update_is_the_same. The recipe's Muon and AdamW run uncompiled; the iteration in Muon would compile whole.
"""

import pytest
import torch
from torch._dynamo import lookup_backend

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
    """fullgraph raises at a break. Loss and gradients are those of the uncompiled model; the recipe's optimizer trains it."""
    gpt, tokens, spec = build()
    graphs, real = [], lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return real(graph, inputs)

    compiled = torch.compile(gpt, fullgraph=True, backend=backend)
    (wanted, wanted_grads), (loss, grads) = (passed(model, gpt, tokens) for model in (gpt, compiled))
    (names,) = graphs
    assert any("autograd_function" in name for name in names) == (form == "triton"), "the kernels are in the graph or are not"
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grads, wanted_grads, atol=1e-5, rtol=1e-4)
    in_fp32 = ",dtype=fp32" if DEVICE == "cpu" else ""  # Triton's interpreter takes the bits of bf16 factors for integers
    optimizer = optimizers.build(spec + in_fp32, gpt, 10)
    optimizer.step()
    end, _ = passed(compiled, gpt, tokens)
    assert end < loss and len(graphs) == 1


def passed(model: torch.nn.Module, gpt: GPT, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of one pass."""
    gpt.zero_grad()
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    return loss.detach(), [p.grad for p in gpt.parameters()]


def test_orthogonalize_is_one_graph(form):
    G = torch.randn(2, 20, 30, device=DEVICE)
    whole = torch.compile(orthogonalize, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(G, 3, "cubic", "fp32"), orthogonalize(G, 3, "cubic", "fp32"))
