"""The studies that look at loss surfaces: directions, curvature, and what the quick runs must show."""

import pytest
import torch
from torch import nn

from engine.spec import UsageError
from studies import common, loss_line, loss_plane, sightseeing, surfaces, wide_minima


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_directions_have_the_lengths_that_they_promise():
    gpt = common.tiny_gpt(length=8, width=16)
    weights = {name: w.detach() for name, w in gpt.named_parameters()}
    drawn, fitted = surfaces.random_direction(gpt, 0), surfaces.filter_normalised(gpt, 0)
    assert surfaces.length(drawn) == pytest.approx(surfaces.length(weights).item(), rel=1e-6)
    for name, w in weights.items():
        if w.dim() < 2:
            assert not fitted[name].any()
            continue
        for row, filter_ in zip(fitted[name], w):  # the definition: d <- d / |d| |w|, filter by filter
            assert row.norm().item() == pytest.approx(filter_.norm().item(), rel=1e-5)
        before = surfaces.normal(gpt, 0)[name]
        assert torch.allclose(nn.functional.cosine_similarity(fitted[name], before, dim=1), torch.ones(len(w)))
    assert surfaces.cosine(drawn, drawn) == pytest.approx(1)


def test_losses_on_a_line_are_those_of_moved_weights():
    net, x = small_net(), torch.randn(5, 3, dtype=torch.float64)
    direction = surfaces.random_direction(net, 1)
    before = {name: w.clone() for name, w in net.state_dict().items()}
    found = surfaces.losses(net, lambda model: model(x).square().mean(), [direction], torch.tensor([[0.0], [0.5]]))
    moved = torch.func.functional_call(net, {name: before[name] + 0.5 * direction[name] for name in before}, x)
    assert found.tolist() == pytest.approx([net(x).square().mean().item(), moved.square().mean().item()], rel=1e-12)
    assert all(torch.equal(net.state_dict()[name], w) for name, w in before.items())
    with pytest.raises(RuntimeError, match="stop"):  # weights come back whatever happens
        surfaces.losses(net, lambda model: (_ for _ in ()).throw(RuntimeError("stop")), [direction], torch.tensor([[1.0]]))
    assert all(torch.equal(net.state_dict()[name], w) for name, w in before.items())


def test_lanczos_against_the_dense_hessian():
    net, x, y = small_net(), torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,))
    names = [name for name, _ in net.named_parameters()]

    def of_flat(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([w.numel() for w in net.parameters()])
        weights = {name: part.view_as(w) for name, part, w in zip(names, parts, net.parameters())}
        return nn.functional.cross_entropy(torch.func.functional_call(net, weights, x), y)

    flat = torch.cat([w.detach().flatten() for w in net.parameters()])
    dense = torch.autograd.functional.hessian(of_flat, flat)
    exact = torch.linalg.eigvalsh(dense)
    loss = nn.functional.cross_entropy(net(x), y)
    product = wide_minima.hessian_product(loss, list(net.parameters()))
    v = torch.randn(len(flat), dtype=torch.float64)
    assert torch.allclose(product(v), dense @ v, atol=1e-12)
    found = wide_minima.spectrum(net, loss, iterations=12)  # of 26: both ends are there long before
    assert found[-1].item() == pytest.approx(exact[-1].item(), rel=1e-8)
    assert found[0].item() == pytest.approx(exact[0].item(), abs=1e-4)


def test_roughness_is_zero_where_the_surface_is_convex():
    a, b = torch.meshgrid(*[torch.linspace(-1, 1, 9)] * 2, indexing="ij")
    assert loss_plane.roughness(a**2 + a * b + b**2) == 0
    assert loss_plane.roughness(a**2 - b**2) == pytest.approx(1, rel=1e-6)
    assert loss_plane.roughness(2 * a**2 - b**2) == pytest.approx(0.5, rel=1e-6)


def test_a_block_without_skips_is_the_composition():
    gpt, plain = loss_plane.made(True, 0, 1), loss_plane.made(False, 0, 1)
    x = torch.randn(1, 4, 64)
    inner = gpt.blocks[0].attention(gpt.blocks[0].norm1(x), None)
    assert torch.equal(plain.blocks[0](x, None), gpt.blocks[0].mlp(gpt.blocks[0].norm2(inner)))
    assert all(torch.equal(p, q) for p, q in zip(gpt.parameters(), plain.parameters()))


@pytest.mark.slow
def test_surfaces_of_small_models():
    """Beside each margin: what seeds 0, 1 and 2 gave."""
    line = loss_line.run(quick=True)
    _, offset, height = loss_line.shape(line, "end")
    _, _, flat = loss_line.shape(line, "start")
    assert offset < 0.02 and height > 8 * flat  # 0 each; 22, 22, 34 times
    assert abs(line["cosine"]) < 4 * line["parameters"] ** -0.5
    plane = loss_plane.run(quick=True)
    assert loss_plane.above(plane["planes"]["end, with skips"]) < 0.1  # 0, 0.045, 0.049
    rough = plane["roughness"]
    assert rough["end, with skips"][0] < 0.1 < rough["start, with skips"][0]  # 0 each; 0.95, 0.96, 0.86


@pytest.mark.slow
def test_any_picture_can_be_found():
    figures = sightseeing.run(quick=True)
    assert figures["cat"]["correlation"][0] > 0.9  # 0.952, 0.947, 0.967 with seeds 0, 1 and 2
    assert sightseeing.verdict(figures)[0]


def test_large_batches_end_in_narrower_minima():
    sharp = wide_minima.run(quick=True)["sharpness"]
    assert all(large > 1.1 * small for small, large in zip(sharp["10"], sharp["1000"]))  # 1.27, 1.31, 1.27 times


def test_a_run_of_ones_own(train):
    folder = train("--steps", "3")
    for study in (loss_line, loss_plane, wide_minima):
        figures = study.run(quick=True, folder=folder)
        assert isinstance(study.verdict(figures)[1], str)
    assert figures["run"] == folder.name and len(figures["eigenvalues"]) == 5
    with pytest.raises(UsageError, match="holds no run"):
        loss_line.run(folder=folder.parent / "none")
