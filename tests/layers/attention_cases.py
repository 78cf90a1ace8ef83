"""The cases in which every back-end of attention must agree with the plain one."""

import torch
from torch import Tensor

from layers.attention import ATTENTION, plain_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LENGTHS = (1, 7, 160)
MASKS = {"causal": (0, False), "window": (37, False), "documents": (0, True), "both": (150, True), "itself": (1, False)}
NAMES = ("result", "gradient of q", "gradient of k", "gradient of v")


def inputs(length: int, heads: int = 3, width: int = 16, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(length)
    drawn = (torch.randn(2, heads, length, width, generator=generator) for _ in range(4))
    return tuple(x.to(device).requires_grad_() for x in drawn)


def documents_of(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Documents of ragged lengths, other ones in each sequence; the last has the number of the first again."""
    generator = torch.Generator().manual_seed(length + 1)
    return ((torch.rand(2, length, generator=generator) < 0.05).cumsum(1) % 4).to(device)


def errors(backend: str, length: int, mask: str, device: torch.device | str = "cpu") -> dict[torch.dtype, list[float]]:
    """How far result and gradients are from those of plain attention in fp32, relative to the larger of 1 and the largest
    number; in fp32, and with everything in bf16.

    Raises:
        ValueError: another dtype than that of the inputs.
    """
    *qkv, upstream = inputs(length, device=device)
    window, has_documents = MASKS[mask]
    documents = documents_of(length, device) if has_documents else None
    exact = plain_attention(*qkv, 0.3, 0.0, window, documents)
    wanted = [exact, *torch.autograd.grad((exact * upstream).sum(), qkv)]
    found = {}
    for dtype in TOLERANCE:
        own = [x.detach().to(dtype).requires_grad_() for x in qkv]
        y = ATTENTION[backend](*own, 0.3, 0.0, window, documents)
        results = [y, *torch.autograd.grad((y * upstream.to(dtype)).sum(), own)]
        if any(x.dtype != dtype for x in results):
            raise ValueError(f"{backend} attention makes {[x.dtype for x in results]} of {dtype}")
        found[dtype] = [((a - b.float()).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in zip(wanted, results)]
    return found
