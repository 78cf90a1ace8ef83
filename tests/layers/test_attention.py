"""Every back-end of attention against the plain one: ragged lengths, windows, documents, gradients."""

import dataclasses

import pytest
import torch
from attention_cases import LENGTHS, MASKS, NAMES, TOLERANCE, documents_of, errors, inputs
from torch.nn.attention import flex_attention as torch_flex

import train_gpt
from engine.spec import UsageError
from layers import attention
from layers.attention import ATTENTION, plain_attention
from model import GPT, ModelConfig


@pytest.fixture
def flex_trains_here(monkeypatch):
    """PyTorch has FlexAttention's backward for CPUs, unfused, behind a check that refuses it there."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "check", lambda *_: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(  # FlexAttention takes a second a case, on a GPU to compile it: the longest will do
    ("backend", "length"), [(name, length) for name in ATTENTION for length in LENGTHS[2 * (name == "flex") :]]
)
def test_agrees_with_plain(backend, length, mask, device, request):
    """Result and gradients."""
    if device.type == "cpu":
        request.getfixturevalue("flex_trains_here")
    elif backend == "flex":
        torch._dynamo.reset()  # each mask is a graph, and one function may have only so many
        attention.fused_flex.cache_clear()
    for dtype, found in errors(backend, length, mask, device).items():
        assert max(found) <= TOLERANCE[dtype], dict(zip(NAMES, found))


@pytest.mark.parametrize("mask", MASKS)
def test_plain_is_the_definition(mask):
    """Each output is a weighted mean over exactly the tokens that may be seen, by loops."""
    q, k, v, _ = (z.detach().double() for z in inputs(40))
    window, has_documents = MASKS[mask]
    documents = documents_of(40)
    y = plain_attention(q, k, v, 0.3, 0.0, window, documents if has_documents else None)
    for b in range(2):
        for t in range(40):
            seen = [
                s for s in range(t + 1)
                if (not window or t - s < window) and (not has_documents or documents[b, s] == documents[b, t])
            ]  # fmt: skip
            weights = (0.3 * q[b, :, t, None] * k[b][:, seen]).sum(-1).softmax(-1)
            assert torch.allclose(y[b, :, t], (weights[..., None] * v[b][:, seen]).sum(1), atol=1e-5)  # scores are kept in fp32


@pytest.mark.slow
def test_flex_compiles_whole(flex_trains_here):
    """The mask is built and used in one graph, as the trainer's --compile would have it on CUDA."""
    *qkv, _ = inputs(130)
    window, documents = MASKS["both"][0], documents_of(130)
    whole = torch.compile(attention.attention, fullgraph=True, backend="aot_eager", dynamic=False)
    y = whole(*qkv, 0.3, 0.0, window, documents, "flex")
    assert torch.allclose(y, plain_attention(*qkv, 0.3, 0.0, window, documents), atol=1e-5)


def test_auto_chooses(monkeypatch):
    assert [attention.choose(torch.device(d), 0.0, masked=m) for d in ("cpu", "cuda", "mps") for m in (False, True)] == [
        "chunked", "chunked", "sdpa", "flex", "sdpa", "sdpa"
    ]  # fmt: skip
    assert attention.choose(torch.device("cuda"), 0.1, masked=True) == "sdpa", "FlexAttention has no dropout"
    monkeypatch.setattr(attention.kernels, "triton", None)
    assert attention.choose(torch.device("cuda"), 0.0, masked=True) == "sdpa", "nothing to compile it with"
    q, k, v, _ = inputs(20)
    chosen = attention.attention(q, k, v, 0.3, window=5)
    assert torch.equal(chosen, ATTENTION["chunked"](q, k, v, 0.3, 0.0, 5))


def test_what_flex_cannot_do_is_one_line(tmp_path, capsys):
    q, k, v, _ = inputs(20)
    with pytest.raises(UsageError, match="no dropout: use --attention sdpa"):
        ATTENTION["flex"](q, k, v, 0.3, 0.1)
    with pytest.raises(UsageError, match="trains on CUDA only, not on cpu: use --attention chunked"):
        ATTENTION["flex"](q, k, v, 0.3, 0.0)
    for flags, words in ((["--dropout", "0.1"], "no dropout"), (["--device", "cpu"], "trains on CUDA only")):
        assert train_gpt.main(["--track", "tiny", "--attention", "flex", "--out", str(tmp_path / "run"), *flags]) == 2
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_window_that_changes_is_no_new_graph(flex_trains_here):
    """Where it is a tensor, as `free_windows` makes it; all blocks with one window have one mask."""
    config = ModelConfig(sequence_length=24, vocab_size=61, layers=2, width=32, heads=2, window=12, window_pattern="SL",
                         positions="rotary", attention="flex")  # fmt: skip
    gpt, tokens = GPT(config), torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = GPT(dataclasses.replace(config, attention="plain"))
    plain.load_state_dict(gpt.state_dict())
    gpt.free_windows()
    assert len({id(block.attention.window) for block in gpt.blocks}) == 2
    compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager", dynamic=False)
    for parts in ((0.25,), (0.25, 0.5), (0.25, 0.5, 1.0)):
        for model in (gpt, plain):
            model.see(parts)
        with torch.compiler.set_stance("fail_on_recompile" if len(parts) > 1 else "default"):
            loss = compiled(tokens, tokens.clone())
        wanted = plain(tokens, tokens.clone())
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-5), parts
        for model, value in ((gpt, loss), (plain, wanted)):
            model.zero_grad()
            value.backward()
        for (name, p), q in zip(gpt.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-5), (name, parts)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_evaluates_without_gradients():
    q, k, v = (z.detach() for z in inputs(50)[:3])
    assert torch.allclose(ATTENTION["flex"](q, k, v, 0.3, 0.0, 9), plain_attention(q, k, v, 0.3, 0.0, 9), atol=1e-5)


def test_dropout_drops():
    q, k, v, _ = inputs(64)
    for backend in ("plain", "chunked", "sdpa"):
        torch.manual_seed(0)
        mean = sum(ATTENTION[backend](q, k, v, 0.3, 0.5, 9) for _ in range(400)) / 400
        assert (mean - plain_attention(q, k, v, 0.3, 0.0, 9)).abs().mean() < 0.05, "its mean is attention without"
        assert not torch.equal(ATTENTION[backend](q, k, v, 0.3, 0.5, 9), ATTENTION[backend](q, k, v, 0.3, 0.5, 9))
